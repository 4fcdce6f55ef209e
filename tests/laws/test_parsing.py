"""Whatever the bytes: a value, or a ValueError with a reason. What we write, we read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from watcher.model import Entry, Kind, Part, Sidecar
from watcher.ollama import manifests, names, ranges, sidecars

INT64 = st.integers(-(2**63), 2**63 - 1)
PARTS = st.builds(Part, INT64, INT64, INT64, INT64)
KEYS = st.sampled_from(["N", "n", "Offset", "Size", "SIZE", "Completed", "layers", "config",
                        "digest", "size", "mediaType", "schemaVersion", "x"])  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
#: JSON of the right words, and what stands around it in a damaged file.
BYTES = st.binary(max_size=60) | st.builds(
    lambda before, value, behind, cut: (before + json.dumps(value).encode() + behind)[:cut],
    st.sampled_from([b"", b" ", b"\xef\xbb\xbf", b"\0"]),
    JSON,
    st.sampled_from([b"", b"\n", b"x", b"\0\0", b"\xff"]),
    st.integers(0, 300) | st.just(None),
)
ENTRY = Entry("x", Kind.FILE, 60, 4096, 1, 1, 1, 0, 0, 0, 0, 0o644)


@given(PARTS)
def test_a_sidecar_is_read_as_it_was_written(part: Part) -> None:
    assert sidecars.parse(sidecars.write(part)) == part


@given(BYTES)
def test_any_bytes_as_a_sidecar(raw: bytes) -> None:
    try:
        part = sidecars.parse(raw)
    except ValueError:
        return
    assert all(-(2**63) <= number < 2**63 for number in part)


@given(BYTES)
def test_any_bytes_as_a_manifest(raw: bytes) -> None:
    try:
        manifest = manifests.parse(raw)
    except ValueError:
        return
    _, faults = manifest
    assert all(fault.isprintable() for fault in faults)


@given(st.binary(max_size=80))
def test_any_bytes_as_a_file_name(raw: bytes) -> None:
    name = raw.decode("utf-8", "surrogateescape")
    parsed = names.parse_blob(name)
    assert (len(parsed.digest) == 64) == bool(parsed.digest)
    assert names.printable(name).isprintable()
    assert names.file_safe(name).isascii()


@given(st.text(max_size=20))
def test_a_model_that_people_write_comes_back_as_it_is_shown(text: str) -> None:
    model = names.parse_model(text)
    if model is not None:
        assert names.parse_model(model.shown) == model._replace(
            host=names.DEFAULT_HOST if model.host.lower() == names.DEFAULT_HOST else model.host
        )
        assert names.model_from_path(tuple(model.path.split("/"))) == model


SMALL = st.builds(
    Part, st.integers(0, 4), st.integers(-1, 60), st.integers(-1, 40), st.integers(0, 3)
)


@settings(max_examples=some(400))
@given(st.lists(SMALL, max_size=6), st.integers(1, 100))
def test_believable_parts_fit_the_layer_and_overlap_no_other_claim(
    found: list[Part], total: int
) -> None:
    each = [
        Sidecar(ENTRY, part.number, part, sidecars.part_fault(part.number, part)) for part in found
    ]
    sidecars.faults(each, total)
    alone = sidecars.believable(each, total)
    sound = [one.part for one in each if one.part and not one.fault and one.part.end <= total]
    for part in alone:
        assert 0 <= part.offset < part.end <= total
        others = list(sound)
        others.remove(part)
        assert all(part.end <= other.offset or other.end <= part.offset for other in others)
    filled = sidecars.fill_gaps(alone, total, ())
    assert sum(part.size for part in filled) == total
    assert ranges.normal((part.offset, part.end) for part in filled) == ((0, total),)
    assert set(alone) <= set(filled)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 336])
@given(st.data())
def test_any_valid_partition_has_no_fault(n: int, data: st.DataObject) -> None:
    edges = sorted(data.draw(st.sets(st.integers(1, 10**12), min_size=n, max_size=n)))
    starts = [0, *edges[:-1]]
    each = [
        Sidecar(ENTRY, at, Part(at, start, end - start, 0), None)
        for at, (start, end) in enumerate(zip(starts, edges, strict=True))
    ]
    assert sidecars.faults(each, edges[-1]) == ()
    if n > 1:
        del each[data.draw(st.integers(0, n - 1))]
        assert sidecars.faults(each, edges[-1])
