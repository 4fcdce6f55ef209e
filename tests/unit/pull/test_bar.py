"""All layers of a model in one sum."""

from __future__ import annotations

from tests.support.calls import calls
from watcher.pull.layers import ModelProgress

A, B, C = "a" * 64, "b" * 64, "c" * 64
MB = 1_000_000


def bar(present: frozenset[str] = frozenset()) -> ModelProgress:
    made = ModelProgress()
    made.expect({A: 10 * MB, B: 5 * MB, C: 100}, present)
    return made


def test_layers_join_into_one() -> None:
    made = bar(frozenset({B}))
    assert (made.total, made.done, made.present) == (15 * MB + 100, 5 * MB, 5 * MB)
    assert made.note(A, 10 * MB, 4 * MB) == 0
    assert made.done == 9 * MB
    made.note(A, 10 * MB, 10 * MB)
    made.note(C, 100, 100)
    assert made.done == made.total


def test_lost_bytes_are_reported_only_beyond_rounding_errors() -> None:
    made = bar()
    made.note(A, 10 * MB, 4 * MB)
    assert made.note(A, 10 * MB, 4 * MB - 1000) == 0
    assert made.note(A, 10 * MB, MB) == 3 * MB - 1000
    assert made.done == MB


def test_a_verified_model_counts_as_downloaded() -> None:
    made = bar()
    made.note(A, 10 * MB, 4 * MB)
    made.complete()
    assert made.done == made.total


def test_a_server_that_counts_too_far_is_cut() -> None:
    made = bar()
    made.note(A, 10 * MB, 11 * MB)
    assert made.done == 10 * MB


def test_a_layer_that_nobody_knew_is_taken_on_once_its_length_is_known() -> None:
    made = ModelProgress()
    made.note(A, 0, 0)
    assert (made.total, made.done) == (0, 0)
    made.note(A, 10 * MB, MB)
    assert (made.total, made.done) == (10 * MB, MB)


def test_a_line_without_a_length_takes_nothing_away() -> None:
    """Another client's request prepares what an earlier pull has left."""
    made = bar()
    made.here({A: 4 * MB}, ())
    assert made.note(A, 0, 0) == 0
    assert made.done == 4 * MB
    made.note_all(15 * MB, 9 * MB)
    made.note_all(0, 0)
    assert made.done == 9 * MB


def test_the_sum_of_the_transfer_path_is_no_layer() -> None:
    made = bar()
    made.note_all(15 * MB + 100, 3 * MB)
    assert (made.total, made.done) == (15 * MB + 100, 3 * MB)
    alone = ModelProgress()
    alone.note_all(7 * MB, MB)
    assert (alone.total, alone.done) == (7 * MB, MB)


def test_progress_restarts_from_the_bytes_that_the_store_has() -> None:
    made = bar()
    made.note(A, 10 * MB, 10 * MB)
    made.note(B, 5 * MB, 5 * MB)
    made.here({A: 2 * MB}, {C})
    assert made.done == 2 * MB + 100


def test_another_manifest_forgets_what_it_does_not_name() -> None:
    made = bar()
    made.note(A, 10 * MB, 4 * MB)
    made.note(B, 5 * MB, MB)
    made.expect({B: 5 * MB}, ())
    assert (made.total, made.done) == (5 * MB, MB)


def test_a_line_costs_as_much_whatever_the_number_of_layers() -> None:
    def cost(layers: int) -> int:
        made = ModelProgress()
        sizes = {f"{number:064x}": MB for number in range(layers)}
        made.expect(sizes, frozenset(list(sizes)[:5]))

        def work() -> None:
            for done, digest in enumerate(sizes):
                made.note(digest, MB, MB)
                assert made.done == MB * max(5, done + 1)
                assert made.total == MB * layers

        return calls(work)

    assert cost(400) < 2.5 * cost(200)
