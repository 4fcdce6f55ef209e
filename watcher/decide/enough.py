"""How much of a clean-up is enough for so many free bytes. Pure."""

from __future__ import annotations

from watcher.model import DAY, Action, Plan


def until_free(planned: Plan, wanted: int) -> Plan:
    """The part of a plan that leaves `wanted` bytes free, the oldest first, then the largest.

    All of what frees anything where that is not enough.
    """
    chosen: set[Action] = set()
    free = planned.free
    for action in sorted(planned.actions, key=_worth_least_first):
        if free >= wanted:
            break
        if action.frees:
            chosen.add(action)
            free += action.frees
    return planned.filtered(lambda each: each in chosen)


def _worth_least_first(action: Action) -> tuple[int, int, str]:
    """By the day of the last change, so that the size counts among those of a day."""
    changed = max((entry.changed_at for entry in action.expects), default=0.0)
    return int(changed // DAY), -action.frees, action.subject
