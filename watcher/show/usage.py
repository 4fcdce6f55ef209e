"""What uses the space, as a table for people; its rows add up to the total."""

from collections.abc import Iterator

from watcher.decide import conditions
from watcher.decide.findings import is_blind
from watcher.model import Condition, Evidence, Sizes, Space, Use, UseKind
from watcher.show.text import Line, Part, Span, Table, count, name, size
from watcher.system import advice

_SHOWN_MODELS = 20  #: so many models are shown one by one, the largest ones
_WORDS = {
    UseKind.SHARED: "layers of several models",
    UseKind.OTHER_STORE: "blobs of another store in the same folder",
    UseKind.ORPHAN: "orphaned blobs",
    UseKind.TEMPORARY: "temporary files of ollama create",
    UseKind.FOREIGN: "foreign files",
    UseKind.QUARANTINE: "quarantine",
    UseKind.OURS: "state and logs of ollama-watch",
    UseKind.MANIFESTS: "manifests",
    UseKind.FOLDERS: "folders of the store",
}
#: What does not belong to a finished model.
_WASTE = {
    UseKind.PARTIAL: "unfinished downloads",
    UseKind.ORPHAN: "orphaned blobs",
    UseKind.TEMPORARY: "temporary files",
}


def table(
    seen: Evidence, space: Space, uses: tuple[Use, ...], total: Sizes, *, verbose: bool
) -> Iterator[Part]:
    """The uses, the largest first; `verbose`: every model, not only the largest."""
    yield _verdict(seen, uses, total)
    yield Line(name(seen.place.path), style="bold")
    lines: list[tuple[Sizes, str | Span]] = [*_lines(uses, None if verbose else _SHOWN_MODELS)]
    lines.append((total, Span(f"total: {total.allocated} bytes on disk", "bold")))
    rows = [
        (size(each.allocated), size(each.apparent), size(each.freed), what) for each, what in lines
    ]
    yield ""
    yield Table(rows, ("on disk", "apparent", "freed", ""), frozenset(range(3)))
    if is_blind(seen) and any(use.kind is UseKind.ORPHAN for use in uses):
        yield "unreadable manifests may name the orphans: run `ollama-watch audit`"
    for each in space.linked:
        yield f"{each}/ is a link; df counts its target, du does not follow it"


def _verdict(seen: Evidence, uses: tuple[Use, ...], total: Sizes) -> Line:
    place = seen.place
    waste = {
        word: sum(use.sizes.allocated for use in uses if use.kind is kind)
        for kind, word in _WASTE.items()
    }
    parts = [f"{size(taken)} of {word}" for word, taken in waste.items() if taken]
    free = f"{size(place.free_bytes)} free ({place.file_system or 'unknown file system'})"
    text = f"{size(total.allocated)} on disk, {free}"
    if not parts:
        return Line(f"{text}.")
    goes = any(waste[_WASTE[kind]] for kind in (UseKind.ORPHAN, UseKind.TEMPORARY))
    words = ("clean", "--dry-run") if goes and not is_blind(seen) else ("audit",)
    return Line(f"{text}; {', '.join(parts)}.", run=advice.watch(seen, *words))


def _lines(uses: tuple[Use, ...], most: int | None) -> list[tuple[Sizes, str]]:
    """Uses that take room, those of all but `most` models together in one line."""
    taking = [use for use in uses if use.sizes.allocated or use.sizes.apparent]
    models = [use for use in taking if use.kind is UseKind.MODEL]
    others = [use for use in taking if use.kind is not UseKind.MODEL]
    shown, smaller = models[:most], [] if most is None else models[most:]
    lines = [(use.sizes, words(use)) for use in (*shown, *others)]
    if smaller:
        together = Sizes(*map(sum, zip(*(use.sizes for use in smaller), strict=True)))
        lines.append((together, f"{count(len(smaller), 'smaller model')}: use -v for all"))
    return sorted(lines, key=lambda line: -line[0].allocated)


def words(use: Use) -> str:
    if use.kind is UseKind.MODEL:
        return name(use.name)
    if use.kind is UseKind.PARTIAL:
        return f"unfinished downloads: {conditions.row(Condition(use.name)).words}"
    return _WORDS[use.kind]
