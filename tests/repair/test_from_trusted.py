"""Laws of the way from trusted ranges to sidecars."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from watcher.model import MIB, Entry, Kind, Part, Ranges, Sidecar
from watcher.ollama import ranges, sidecars

MOST_GAPS = 128
CONNECTIONS = 16
SMALLEST_CUT = 32 * MIB
#: The bounded gaps, those cut further, and a trusted tail.
MOST_PARTS = CONNECTIONS + MOST_GAPS + 1 + 1
ENTRY = Entry("x", Kind.FILE, 60, 4096, 1, 1, 1, 0, 0, 0, 0, 0o644)

TOTALS = st.one_of(
    st.integers(1, 3 * MIB),
    st.integers(1, 100 * MIB),
    st.integers(1, 40_000 * MIB),
    st.sampled_from([1, MIB - 1, MIB, MIB + 1, 262_144_000, 1600 * 10**6 + 5]),
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Ranges, int]:
    """Trusted ranges, and the length of the layer that they lie in."""
    total = draw(TOTALS)
    points = draw(
        st.one_of(
            st.lists(st.integers(0, total), max_size=12),
            st.lists(st.integers(0, 400).map(lambda n: total * n // 400), max_size=300),
        )
    )
    near = draw(st.lists(st.integers(-3, 3), min_size=len(points), max_size=len(points)))
    edges = sorted({min(total, max(0, at + by)) for at, by in zip(points, near, strict=True)})
    return ranges.normal(tuple(pairwise(edges))[:: draw(st.sampled_from([1, 2]))]), total


def missing(parts: tuple[Part, ...]) -> list[int]:
    """Bytes that each part still lacks, those that lack none left out."""
    return [part.size - part.completed for part in parts if part.completed < part.size]


AT_LEAST = st.one_of(st.just(1), st.integers(1, 40), st.integers(1, 1000))


@settings(max_examples=some(300))
@given(layers(), AT_LEAST)
def test_the_parts_are_a_valid_set(layer: tuple[Ranges, int], at_least: int) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total, at_least)
    assert [part.number for part in made] == list(range(len(made)))
    assert [part.offset for part in made] == [0, *(part.end for part in made[:-1])]
    assert made[-1].end == total
    assert sum(part.size for part in made) == total
    assert all(part.size > 0 and 0 <= part.completed <= part.size for part in made)
    read = [Sidecar(ENTRY, n, sidecars.parse(sidecars.write(p)), None) for n, p in enumerate(made)]
    assert tuple(each.part for each in read) == made, "they read back"
    assert sidecars.faults(read, total) == ()


@settings(max_examples=some(300))
@given(layers(), AT_LEAST)
def test_nothing_is_claimed_that_is_not_trusted(layer: tuple[Ranges, int], at_least: int) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total, at_least)
    assert not ranges.difference(sidecars.claims(made), trusted)
    assert made == sidecars.from_trusted(trusted, total, at_least), "the same parts each time"


@settings(max_examples=some(300))
@given(layers(), AT_LEAST)
def test_doing_it_twice_changes_nothing(layer: tuple[Ranges, int], at_least: int) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total, at_least)
    again = sidecars.from_trusted(sidecars.claims(made), total, len(made))
    assert sidecars.claims(again) == sidecars.claims(made)
    assert again == made


@settings(max_examples=some(300))
@given(layers())
def test_progress_files_give_up_at_most_1_mib_per_gap(layer: tuple[Ranges, int]) -> None:
    """With few gaps no more than 1 MiB is given up for each."""
    trusted, total = layer
    gaps = ranges.complement(trusted, total)
    lost = ranges.size(trusted) - ranges.size(
        sidecars.claims(sidecars.from_trusted(trusted, total))
    )
    if len(gaps) <= MOST_GAPS:
        assert lost <= len(gaps) * MIB


@settings(max_examples=some(300))
@given(layers())
def test_parts_are_few_and_their_missing_pieces_not_tiny(layer: tuple[Ranges, int]) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total)
    assert len(made) <= MOST_PARTS
    if total >= MIB:
        assert all(size >= MIB for size in missing(made))


@settings(max_examples=some(300))
@given(layers())
def test_progress_files_spread_missing_bytes_over_sixteen_connections(
    layer: tuple[Ranges, int],
) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total)
    left = missing(made)
    if len(left) < CONNECTIONS:
        # Cut once more, a piece would be too small; the cuts lie on the grid of MiB.
        assert all(size < 2 * SMALLEST_CUT + 2 * MIB for size in left)
    gaps = ranges.complement(sidecars.claims(made), total)
    assert len(left) <= max(CONNECTIONS, len(gaps))
    if len(left) > len(gaps):
        cut = [part for part in made if part.completed == 0 and part.offset not in dict(gaps)]
        assert all(part.offset % MIB == 0 for part in cut)
        assert all(part.size >= SMALLEST_CUT - 2 * MIB for part in cut)


@settings(max_examples=some(200))
@given(layers(), AT_LEAST)
def test_so_many_parts_as_are_asked_for(layer: tuple[Ranges, int], at_least: int) -> None:
    trusted, total = layer
    made = sidecars.from_trusted(trusted, total, at_least)
    plain = sidecars.from_trusted(trusted, total)
    assert len(made) >= min(at_least, total)
    assert len(made) <= max(at_least, len(plain))
    assert sidecars.claims(made) == sidecars.claims(plain), "how many changes no claim"
