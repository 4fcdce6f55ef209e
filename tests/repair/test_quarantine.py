"""What lies in quarantine, where two things have one name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.support.driving import HealthyStore, host, private_proc
from tests.support.runs import changed, one_run, rules
from watcher.model import Result

VERIFY = rules(repair=False, hash=True, verify=True, writers_visible=True)
REPAIR = rules(repair=True, hash=True, online=True, writers_visible=True)


def test_two_of_one_name_are_both_kept_and_distinguished(tmp_path: Path) -> None:
    store = HealthyStore(tmp_path / "models")
    blob = store.blobs / f"sha256-{store.digests[0]}"
    size = blob.stat().st_size
    here = replace(host(store, private_proc(tmp_path / "proc")), registry_length=lambda *_: size)

    def put_aside(text: str) -> None:
        blob.write_text(text.ljust(size))
        one_run(here, VERIFY)

        report = one_run(here, REPAIR)
        assert [each.result for each in report.outcomes if each.action.subject == blob.name] == [
            Result.DONE
        ]
        assert not blob.exists()

    put_aside("the first")
    put_aside("the second")
    kept = sorted((store.ours / "quarantine").glob(f"*-{blob.name}"))
    assert [path.read_text().strip() for path in kept] == ["the first", "the second"]
    labels = frozenset(path.name for path in kept)
    assert len({label.partition("-")[0] for label in labels}) == 2
    (first, second) = sorted(labels)
    policy = rules(repair=False, writers_visible=True)
    (outcome,) = one_run(here, changed(policy, restore=frozenset({first}))).outcomes
    assert outcome.result is Result.DONE
    assert blob.read_text().strip() == "the first"
    report = one_run(here, changed(policy, restore=frozenset({second})))
    assert report.outcomes == ()
    assert [each.subject for each in report.plan.refusals] == [second]
    assert (store.ours / "quarantine" / second).read_text().strip() == "the second"
