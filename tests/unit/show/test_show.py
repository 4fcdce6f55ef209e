"""Reports as text and as JSON: they fit the terminal, and show nothing that it would obey."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

import pytest

from tests.support.runs import rules
from tests.unit.decide.seen import CLEANING, MB, D, diagnosis, download, entry, evidence, server
from watcher import reconcile
from watcher.decide import plan
from watcher.model import (
    DAY,
    Action,
    ActionKind,
    BlobCensus,
    Evidence,
    ManifestFault,
    OddManifest,
    Place,
    Plan,
    Rules,
    Trust,
)
from watcher.show import documents, plans, tables
from watcher.show.text import render
from watcher.state import json_file

ODD = os.fsdecode(b"\xff\n\x1b[31m")


def report(seen: Evidence, policy: Rules = CLEANING) -> reconcile.Report:
    told_of = diagnosis(seen, policy)
    return reconcile.Report(seen, told_of, plan.make(told_of.diagnosed, seen, policy))


def text(seen: Evidence, *, verbose: bool = True) -> str:
    return render(tables.audit(report(seen), verbose=verbose), color=False)


def document(seen: Evidence) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json_file.line(documents.audit(report(seen))))
    return made


FULL = evidence(
    download(ago=9 * DAY, trusted=((0, 60 * MB),), models=("m" * 70 + ":latest",)),
    download(ago=9 * DAY, digest="a" * 64, faults=("part 0: empty", "x" * 200)),
    census=BlobCensus(
        manifests=3,
        unnamed=tuple(entry(f"sha256-{n:064}", ago=9 * DAY) for n in range(30)),
        odd_manifests=(
            OddManifest("manifests/h/n/m/t", ManifestFault.CORRUPT, "w" * 200, "h/n/m:t"),
        ),
    ),
    servers=(server(version="0.33.0"),),
    place=Place("/a/very/long/path" * 20, "--store"),
)


def test_no_line_is_wider_than_80_columns() -> None:
    lines = [*text(FULL).splitlines()]
    lines += render(plans.plan(report(FULL).plan), color=False).splitlines()
    assert max(len(line) for line in lines if not is_in_one_piece(line)) <= 80


def is_in_one_piece(line: str) -> bool:
    """A command or a name is on one line, however long: broken, it could not be pasted."""
    words = line.split() or [""]
    return words[0] in ("->", "Run:") or max(map(len, words)) > 60


def test_the_whole_path_of_the_store_can_be_read() -> None:
    assert any(FULL.place.path in line for line in text(FULL).splitlines()), "it is never broken"


def test_colors_only_where_asked_for() -> None:
    shown = list(tables.audit(report(FULL), verbose=True))
    assert "\x1b" not in render(shown, color=False)
    assert "\x1b" in render(shown, color=True)
    planned = list(plans.plan(report(FULL).plan))
    assert "\x1b" not in render(planned, color=False)
    assert "\x1b" in render(planned, color=True)


def test_of_findings_alike_only_some_are_shown_and_the_rest_is_counted() -> None:
    assert "and 20 more blob_orphan" in text(FULL, verbose=False)
    assert "more blob_orphan" not in text(FULL)


def test_a_document_has_a_schema_integers_and_times() -> None:
    made = document(FULL)
    assert made["schema"] == "ollama-watch/audit/1"
    assert made["time"] == "2025-11-24T16:00:00.000Z"
    one = made["downloads"][0]
    assert one["bytes"]["claimed"] == 50 * MB
    assert one["ranges"]["trusted"] == [[0, 60 * MB]]
    assert all(each["severity"] in ("info", "warning", "error") for each in made["findings"])


def test_byte_counts_of_an_unreadable_download_are_null_not_zero() -> None:
    (one,) = document(evidence(download(unreadable="Input/output error")))["downloads"]
    assert one["bytes"]["claimed"] is None
    assert one["bytes"]["present"] is None


ODD_SIDECAR = download(ago=9 * DAY, data=False, trusted=(), faults=("x",), parts=1)
ODD_SIDECAR = replace(
    ODD_SIDECAR,
    sidecars=(ODD_SIDECAR.sidecars[0]._replace(entry=entry(f"sha256-{D}-partial-{ODD}")),),
)


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [each for part in value.values() for each in strings(part)]
    return [each for part in value for each in strings(part)] if isinstance(value, list) else []


def test_a_drawing_shows_what_most_of_each_piece_is() -> None:
    trust = Trust(((0, 25),), ((0, 50),), ((0, 50),))
    assert tables.part_map(trust, 100, 4) == "#+.."
    assert tables.part_map(Trust(), 100, 4) == "...."


@pytest.mark.parametrize("total", [1, 3, 63, 64, 65, 1000])
def test_a_whole_download_is_drawn_whole_however_small(total: int) -> None:
    every = ((0, total),)
    assert tables.part_map(Trust(every, every, every), total, 64) == "#" * 64


def test_a_piece_half_claimed_and_half_present_is_not_drawn_as_missing() -> None:
    trust = Trust(((0, 50),), ((0, 100),), ((0, 100),))
    assert "." not in tables.part_map(trust, 100, 1)


@pytest.mark.parametrize("policy", [rules(stale_after=1e12), rules(stale_after=0.0)])
def test_any_policy_can_be_shown(policy: Rules) -> None:
    made = report(evidence(download(ago=2 * DAY)), policy)
    json_file.line(documents.audit(made))
    render(tables.audit(made, verbose=True), color=False)


@pytest.mark.parametrize(
    "seen",
    [
        evidence(ODD_SIDECAR),
        evidence(census=BlobCensus(unlisted=(f"manifests/{ODD}",), manifests=1)),
        evidence(
            census=BlobCensus(
                unlisted=(f"manifests/{ODD}",),
                manifests=1,
                unnamed=(entry("sha256-" + "a" * 64, ago=9 * DAY),),
            )
        ),
        evidence(census=BlobCensus(foreign=(entry(ODD),), manifests=1)),
        evidence(place=Place(f"/m/{ODD}[", "--store", globbed=True)),
        evidence(servers=(server(store=f"/{ODD}", user="x"),)),
    ],
    ids=["sidecar", "unlisted", "unlisted and orphans", "foreign", "place", "server"],
)
def test_names_from_outside_are_always_shown_escaped(seen: Evidence) -> None:
    assert "\x1b" not in text(seen)
    line = json_file.line(documents.audit(report(seen)))
    assert b"\x1b" not in line
    # Programs get it as it is, by JSON's own escape.
    assert (b"\\u001b" in line) is (b"31m" in line)


@pytest.mark.parametrize("kind", [ActionKind.REMOVE_TEMPORARY, ActionKind.PURGE])
def test_a_files_name_is_escaped_once(kind: ActionKind) -> None:
    planned = Plan(actions=(Action(kind, "split-gguf-a\\b\x1b", "it is old", ()),))
    shown = render(plans.plan(planned), color=False)
    assert "split-gguf-a\\x5cb\\x1b" in shown
    assert "\x1b" not in shown
