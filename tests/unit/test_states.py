"""States: the ways between them are those that a real server takes, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from watcher.state import records
from watcher.state.records import ACTIVE, WAYS, State

TRUTH = Path(__file__).parents[1] / "fidelity" / "truth"
RESTING = frozenset(State) - ACTIVE


def recorded() -> Iterator[tuple[str, list[str]]]:
    """The statuses of each pull in the recordings of a real server."""

    def pulls(value: object) -> Iterator[list[str]]:
        if isinstance(value, dict):
            if "statuses" in value:
                yield value["statuses"]
            for each in value.values():
                yield from pulls(each)
        elif isinstance(value, list):
            for each in value:
                yield from pulls(each)

    for path in sorted(TRUTH.glob("*.json")):
        for number, statuses in enumerate(pulls(json.loads(path.read_bytes()))):
            yield f"{path.stem}-{number}", statuses


#: Of the transfer path, and of pulls that replace a model, the recordings have none.
NOT_RECORDED = [
    ("transfer", ["pulling manifest", "pulling model", "sha256:ab", "writing manifest", "success"]),
    ("replaced", ["pulling manifest", "verifying sha256 digest", "writing manifest",
                  "removing unused layers", "success"]),
    ("nothing-but-a-config", ["pulling manifest", "writing manifest", "success"]),
]  # fmt: skip
SEQUENCES = [*recorded(), *NOT_RECORDED]


def test_there_are_recordings() -> None:
    assert len(SEQUENCES) > 20


@pytest.mark.parametrize(
    "statuses", [given for _, given in SEQUENCES], ids=[i for i, _ in SEQUENCES]
)
def test_a_pull_goes_by_legal_ways_only(statuses: list[str]) -> None:
    taken = [State.STARTING]
    for status in statuses:
        state = State.ERROR if status.startswith("error: ") else records.of_status(status)
        assert state is not None, status
        taken.append(state)
    for before, after in pairwise(taken):
        assert records.may_follow(before, after), (before, after)
    assert taken[-1] in (State.COMPLETED, State.ERROR)


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ("pulling manifest", State.PULLING_MANIFEST),
        ("pulling 3102ddefe309", State.DOWNLOADING),
        ("pulling model", State.DOWNLOADING),
        (f"sha256:{'3a' * 32}", State.DOWNLOADING),
        ("verifying sha256 digest", State.VERIFYING),
        ("writing manifest", State.WRITING_MANIFEST),
        ("removing unused layers", State.WRITING_MANIFEST),
        ("success", State.COMPLETED),
        ("pulling 3102", None),
        ("pulling manifests", None),
        ("Success", None),
        ("using existing layer", None),
        ("", None),
    ],
)  # fmt: skip
def test_each_status_has_its_state(status: str, state: State | None) -> None:
    assert records.of_status(status) is state


@pytest.mark.parametrize("state", State)
def test_to_stay_is_legal_and_no_way(state: State) -> None:
    assert records.may_follow(state, state)
    assert state not in WAYS[state]


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_somebody_at_work_may_always_fail_end_or_begin_again(state: State) -> None:
    assert WAYS[state] >= {State.ERROR, State.COMPLETED, State.STARTING} - {state}


@pytest.mark.parametrize("state", sorted(ACTIVE))
def test_nothing_is_reset_or_forgotten_while_somebody_is_at_work(state: State) -> None:
    assert not WAYS[state] & {State.RESET, State.IDLE}


@pytest.mark.parametrize("state", sorted(RESTING))
def test_a_try_begins_from_all_that_rests(state: State) -> None:
    assert WAYS[state] >= {State.STARTING, State.DOWNLOADING, State.ERROR, State.RESET} - {state}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *((state, State.VERIFYING) for state in (*sorted(RESTING), State.STARTING)),
        *((state, State.WRITING_MANIFEST) for state in (*sorted(RESTING), State.STARTING)),
        (State.STARTING, State.DOWNLOADING),
        (State.DOWNLOADING, State.PULLING_MANIFEST),
        (State.VERIFYING, State.DOWNLOADING),
        (State.VERIFYING, State.PULLING_MANIFEST),
        (State.WRITING_MANIFEST, State.VERIFYING),
        (State.WRITING_MANIFEST, State.DOWNLOADING),
        (State.IDLE, State.COMPLETED),
        (State.RESET, State.COMPLETED),
    ],
)
def test_transitions_that_no_server_makes_are_illegal(before: State, after: State) -> None:
    assert not records.may_follow(before, after)


@pytest.mark.parametrize(
    "ways",
    [
        (State.IDLE, State.DOWNLOADING, State.ERROR, State.DOWNLOADING, State.COMPLETED),
        (State.IDLE, State.ERROR, State.COMPLETED, State.DOWNLOADING),
        (State.VERIFYING, State.ERROR, State.RESET, State.STARTING),
        (State.ERROR, State.IDLE, State.STARTING),
    ],
    ids="-".join,
)
def test_transitions_for_pulls_of_others_and_for_resets_are_allowed(
    ways: tuple[State, ...],
) -> None:
    for before, after in pairwise(ways):
        assert records.may_follow(before, after), (before, after)


def test_every_state_has_words_for_people() -> None:
    stages = [state.stage for state in State]
    assert len(set(stages)) == len(State) == 9
    assert State.STARTING.stage == "Waiting for manifest..."
    assert State.PULLING_MANIFEST.stage == "Pulling manifest from Ollama registry..."
    assert State.DOWNLOADING.stage == "Downloading model layers..."
    assert State.VERIFYING.stage == "Verifying download integrity..."
    assert State.WRITING_MANIFEST.stage == "Writing model manifest..."


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", [State.DOWNLOADING, State.ERROR, State.COMPLETED, State.IDLE])
def test_the_way_to_what_was_seen_is_a_legal_one(before: State, after: State) -> None:
    for step in (steps := records.way(before, after)):
        assert records.may_follow(before, step)
        before = step
    assert before is after
    assert len(steps) <= 2
