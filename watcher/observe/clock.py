"""What time it certainly is: the wall clock, as far as the machine's own counting bears it out.

The machine counts the seconds since its start, asleep ones too, and no setting of a clock moves
that (CLOCK_BOOTTIME). While both clocks advance alike, look for look, the wall clock is believed;
where they don't, it was set, and only what was counted is certain, for hours.
"""

from __future__ import annotations

from watcher.model import CLOCK_SETTLED_SECONDS, CLOCK_TOLERANCE_SECONDS, Clock, Shift

#: A clock that is brought right slowly gains half of this.
_DRIFT = 0.001
#: So soon after its start a machine may not have asked anybody for the time.
_YOUNG_SECONDS = 600.0
#: Settings of the clock that are kept in mind.
_MOST_SHIFTS = 8


def look(before: Clock | None, wall: float, counted: float, boot: str) -> Clock:
    """The clocks at a look. `before`: as they were remembered; `counted`: since the start `boot`.

    A first look has nothing to compare with, and takes the wall clock as it is; so does one on a
    machine that does not say which start this is.
    """
    if before is None or not boot:
        return Clock(boot, wall, counted, wall, CLOCK_SETTLED_SECONDS, wall - counted)
    if before.boot != boot:
        return _after_start(before, wall, counted, boot)
    passed = counted - before.counted
    jump = wall - before.wall - passed
    if abs(jump) <= CLOCK_TOLERANCE_SECONDS + _DRIFT * abs(passed):
        held = before.held + passed
        certain = wall if held >= CLOCK_SETTLED_SECONDS else before.certain + passed
        return before._replace(wall=wall, counted=counted, certain=certain, held=held, jump=0.0)
    return Clock(
        boot,
        wall,
        counted,
        certain=before.certain + passed,
        held=0.0,
        # Whenever it was set since the last look: times from then on are of this clock.
        begun=wall - passed,
        jump=jump,
        jumped=jump > 0,
        shifts=_shifted(before, before.wall + passed, jump),
    )


def _after_start(before: Clock, wall: float, counted: float, boot: str) -> Clock:
    """The first look in another start of the machine: it was off, nobody knows for how long."""
    begun = wall - counted
    behind = min(0.0, begun - before.wall + CLOCK_TOLERANCE_SECONDS)
    # Where this start is older than that look, as on another machine, they are counted already.
    certain = before.certain + (0.0 if behind else counted)
    asked = min(before.counted, counted) >= _YOUNG_SECONDS
    if not behind and asked and (not before.jumped or before.held >= CLOCK_SETTLED_SECONDS):
        # Two starts, and the later one's clock bears out what the earlier one's had said.
        certain = max(certain, before.wall)
    return Clock(
        boot,
        wall,
        counted,
        certain,
        held=0.0,
        begun=begun,
        jump=behind,
        jumped=False,
        shifts=_shifted(before, before.wall, behind) if behind else before.shifts,
    )


def _shifted(before: Clock, until: float, jump: float) -> tuple[Shift, ...]:
    """What times of earlier settings have to be moved by, to be compared with this one's."""
    moved = (Shift(start, end, by + jump) for start, end, by in before.shifts)
    kept = [each for each in moved if abs(each.by) > CLOCK_TOLERANCE_SECONDS]
    return (*kept, Shift(before.begun, until, jump))[-_MOST_SHIFTS:]
