"""A blob that a manifest names is in no plan, whatever else lies in the store."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from tests.support.notation import Store, digest_of, manifest_bytes
from tests.support.runs import one_look, one_run, rules

BLOBS = st.dictionaries(
    st.sampled_from([f"b{n}" for n in range(6)]),
    st.tuples(st.sampled_from(["1s", "2h", "8d", "90d"]), st.booleans()),
    max_size=6,
)
NAMES = st.lists(
    st.tuples(
        st.sampled_from(["a/latest", "b/latest", "c/latest", "hf.co/x/y/z", "ten/MIXED"]),
        st.lists(st.sampled_from([f"b{n}" for n in range(6)]), max_size=3),
        st.sampled_from(["sha256:{}", "sha256:{}", "sha256-{}"]),
        st.sampled_from(
            ["whole", "whole", "whole", "behind", "cut", "empty", "wrong size", "link"]
        ),
    ),
    max_size=5,
)
PARTIALS = st.dictionaries(
    st.sampled_from([f"b{n}" for n in range(6)]),
    st.sampled_from(["0:0 -:0", "-:0", "E:0"]),
    max_size=3,
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


@settings(max_examples=some(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BLOBS, NAMES, PARTIALS)
def test_a_blob_that_a_manifest_names_stays(
    here: Path,
    blobs: dict[str, tuple[str, bool]],
    named: list[tuple[str, list[str], str, str]],
    partials: dict[str, str],
) -> None:
    shutil.rmtree(here / "models", ignore_errors=True)
    models = Store(here / "models")
    for name, (aged, _) in blobs.items():
        models.blob(b"content", name=name, aged=aged)
    for name, parts in partials.items():
        models.broken(parts, name=name, aged="9d")
    kept: set[str] = set()
    readable = True
    manifests: dict[str, tuple[set[str], bool]] = {}
    for model, layers, spelling, state in named:
        size = 5 if state == "wrong size" else 7
        raw = manifest_bytes({spelling.format(digest_of(name)): size for name in layers})
        raw = {"cut": raw[:-3], "empty": b"", "behind": raw + b"\0garbage"}.get(state, raw)
        path = models.manifest(model, b"")
        path.unlink()
        if state == "link":
            target = here / "models" / f"elsewhere-{model.replace('/', '-')}"
            target.write_bytes(raw)
            path.symlink_to(target)
        else:
            path.write_bytes(raw)
        manifests[model] = (
            {f"sha256-{digest_of(name)}" for name in layers},
            state in ("cut", "empty"),
        )
    for layers_of, broken in manifests.values():
        kept |= set() if broken else layers_of
        readable &= not broken

    made = one_look(models.host(), rules(clean=True, repair=False)).plan
    planned = {entry.name for action in made.actions for entry in action.expects}
    finished = {name for name in planned if len(name) == len("sha256-") + 64}
    assert not finished & kept
    assert readable or not finished
    assert not finished & {
        f"sha256-{digest_of(name)}" for name, (aged, _) in blobs.items() if aged in ("1s", "2h")
    }
    one_run(models.host(), rules(clean=True, repair=False))
    assert {name for name in models.names() if name in kept} == {
        f"sha256-{digest_of(name)}" for name in blobs
    } & kept
