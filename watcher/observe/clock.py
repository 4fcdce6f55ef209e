"""What time it certainly is: the wall clock, as far as the machine's own counting bears it out.

No setting of a clock moves the seconds since the machine's start (CLOCK_BOOTTIME). While both
advance alike, the wall clock is believed; else only what was counted is certain, for hours.
"""

from collections.abc import Sequence

from watcher.model import CLOCK_SETTLED_SECONDS, CLOCK_TOLERANCE_SECONDS, Clock, Shift, Unsure

_DRIFT = 0.001  #: a clock that is brought right slowly gains half of this
_YOUNG_SECONDS = 600.0  #: so soon after its start a machine may not have asked anybody for the time
_MOST_SHIFTS = 8  #: settings of the clock that are kept in mind
_MOST_MACHINES = 8  #: one that is forgotten begins as another machine


def read(boot: str, wall: float, counted: float, machine: str) -> Clock:
    """A machine's clock with nothing known of it; `counted`: seconds since the start `boot`."""
    return Clock(boot, wall, counted, wall, held=0.0, begun=wall - counted, machine=machine)


def look(known: Sequence[Clock], now: Clock) -> tuple[Clock, tuple[Clock, ...]]:
    """This machine's clock, and those of others that share the store, each compared with itself.

    `known`: those of the looks before, the last one last. A first look has nothing to compare with,
    and takes the wall clock as it is; so does one on a machine that does not identify its starts.
    """
    if not known or not now.boot:
        return now._replace(held=CLOCK_SETTLED_SECONDS), ()
    before = next((each for each in known if each.boot == now.boot), None)
    if before is not None:
        own = _decided(_compared(before, now), known)._replace(machine=now.machine)
    elif (before := _earlier_start(known, now)) is None:
        # Another machine: it has one reading, and what others know.
        own = now._replace(certain=max(each.certain for each in known))
    else:
        own = _after_start(before, now)
        if own.unsure is not None:
            before = None  # it may be another machine's
    gone = {now.boot, *([before.boot] if before is not None else [])}
    others = tuple(each for each in known if each.boot not in gone)[1 - _MOST_MACHINES :]
    shifts = tuple(each for other in others for each in other.shifts if each.by > 0)
    return own._replace(others=shifts), others


def _compared(before: Clock, now: Clock) -> Clock:
    wall, counted = now.wall, now.counted
    passed = counted - before.counted
    jump = wall - before.wall - passed
    if abs(jump) <= CLOCK_TOLERANCE_SECONDS + _DRIFT * abs(passed):
        held = before.held + passed
        certain = wall if held >= CLOCK_SETTLED_SECONDS else before.certain + passed
        return before._replace(wall=wall, counted=counted, certain=certain, held=held, jump=0.0)
    return before._replace(
        wall=wall,
        counted=counted,
        certain=before.certain + passed,
        held=0.0,
        # Whenever it was set since the last look: times from then on are of this clock.
        begun=wall - passed,
        jump=jump,
        jumped=jump > 0,
        shifts=_shifted(before, before.wall + passed, jump),
    )


def _decided(own: Clock, known: Sequence[Clock]) -> Clock:
    """With the jump that a restart seemed to show, unless another machine explains that by now."""
    if own.unsure is None:
        return own
    jump, boot, counted = own.unsure
    if own.held < CLOCK_SETTLED_SECONDS and not own.jump:
        return own
    goes_on = any(each.boot == boot and each.counted != counted for each in known)
    return own._replace(unsure=None, jump=own.jump or (0.0 if goes_on else jump))


def _earlier_start(known: Sequence[Clock], now: Clock) -> Clock | None:
    mine = [each for each in known if each.machine in ("", now.machine) or not now.machine]
    last = mine[-1] if mine else None
    return next((each for each in reversed(mine) if not _behind(each, now)), last)


def _behind(before: Clock, now: Clock) -> float:
    return min(0.0, now.wall - now.counted - before.wall + CLOCK_TOLERANCE_SECONDS)


def _after_start(before: Clock, now: Clock) -> Clock:
    """The first look in another start of the machine: it was off, nobody knows for how long."""
    behind = _behind(before, now)
    certain = before.certain
    if not behind and before.machine == now.machine != "":
        asked = min(before.counted, now.counted) >= _YOUNG_SECONDS
        if asked and (not before.jumped or before.held >= CLOCK_SETTLED_SECONDS):
            # Two starts, and the later one's clock bears out what the earlier one's had shown.
            certain = max(certain, before.wall)
    unsure = Unsure(behind, before.boot, before.counted) if behind else None
    return now._replace(certain=certain, shifts=before.shifts, unsure=unsure)


def _shifted(before: Clock, until: float, jump: float) -> tuple[Shift, ...]:
    moved = (Shift(start, end, by + jump) for start, end, by in before.shifts)
    kept = [each for each in moved if abs(each.by) > CLOCK_TOLERANCE_SECONDS]
    return (*kept, Shift(before.begun, until, jump))[-_MOST_SHIFTS:]
