"""The page as it is without its script: what a look has found, in words, as HTML."""

import html
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import orjson

from watcher.errors import WatchError
from watcher.ollama import names
from watcher.show.text import count, part_of, short_digests, size
from watcher.state import event_log
from watcher.system import advice
from watcher.web.looks import Document, Lately, Looks

_DOWNLOADS, _FILES, _MOST = 50, 10, 25  #: so many are listed; the last one of all else
#: Where something stands in the page.
_PLACES = (
    *("store", "asof", "around", "verdict", "downloads", "findings", "queue", "quarantine"),
    *("start", "space", "events"),
)
#: The findings on downloads that their articles leave out.
_BESIDE = ("download_stale", "download_at_risk")
#: How good the news is, by the worst finding.
_TONES = {"error": "bad", "warning": "warning"}
_EVENT_TONES = {
    each.value: each.tone.name.lower()
    for each in event_log.EventType
    if each.tone is not event_log.Tone.PLAIN
}


def of(looks: Looks) -> dict[str, str]:
    """What stands in the page, by the name of its place: HTML."""
    shown = dict.fromkeys((*_PLACES, "tone"), "")
    shown["tones"] = _text(orjson.dumps(_EVENT_TONES).decode())
    try:
        now = looks.now.get().documents
        shown |= _now(now["status"], now["audit"])
    except WatchError as error:
        shown |= {"verdict": _failed(error), "tone": "bad"}
    sections: tuple[tuple[str, Lately, str, Callable[[Any], Iterator[str]]], ...] = (
        ("queue", looks.queue, "queue", _queue),
        ("quarantine", looks.now, "quarantine", _quarantine),
        ("space", looks.space, "df", _space),
        ("events", looks.events, "log", _events),
    )
    for place, source, command, draw in sections:
        try:
            shown[place] = "".join(draw(source.get().documents[command]))
        except WatchError as error:
            shown[place] = _failed(error)
    return shown


def _now(status: Document, audit: Document) -> dict[str, str]:
    findings = {each["severity"] for each in audit["findings"]}
    verdict = audit["verdict"]
    return {
        "store": _text(status["store"]),
        "asof": _when(status["time"]),
        "around": _text("; ".join(_around(status, audit))),
        "findings": "".join(_findings(audit["findings"])),
        "tone": next((tone for worst, tone in _TONES.items() if worst in findings), "good"),
        "verdict": _sentence(verdict["text"], verdict["command"]),
        "downloads": "".join(_downloads(status, audit)),
        "start": "".join(_start(audit["forecast"], _seen(status["unseen"]))),
    }


def _seen(unseen: list[Any]) -> str:
    """What ends a sentence about all of a store, if not all of it was seen."""
    return ", as far as visible" if unseen else ""


def _unseen(unseen: list[Document]) -> Iterator[str]:
    for each in unseen[:_MOST]:
        yield f"<p>Not inspected: {_text(each['path'])}: {_text(each['why'])}.</p>"
    yield _more(len(unseen) - _MOST)


def _around(status: Document, audit: Document) -> Iterator[str]:
    """What runs on the store, and what of it is not seen."""
    servers = (
        f"pid {each['pid']}{'' if each['serves_this_store'] else ' (possibly of this store)'}"
        for each in audit["servers"]
    )
    yield f"server: {', '.join(servers) or 'not running'}"
    daemon = status["daemon"]
    yield "daemon: not running" if daemon is None else f"daemon: pid {daemon['pid']}"
    view = audit["visibility"]
    if view["visibility"] != "full":
        yield f"not all processes are visible: {view['why']}"


def _findings(findings: list[Document]) -> Iterator[str]:
    """What is not said with a download."""
    others = [
        each
        for each in findings
        if each["kind"] in _BESIDE or not each["kind"].startswith("download_")
    ]
    notices = [each for each in others if each["severity"] == "info"]
    yield from _messages([each for each in others if each["severity"] != "info"])
    if notices:
        listed = "".join(_messages(notices))
        yield f"<details><summary>{count(len(notices), 'notice')}</summary>{listed}</details>"
    if not others:
        yield "<p>None.</p>"


def _messages(findings: list[Document]) -> Iterator[str]:
    for each in findings[:_MOST]:
        yield _sentence(f"{each['message']}.", each["command"])
    yield _more(len(findings) - _MOST)


def _downloads(status: Document, audit: Document) -> Iterator[str]:
    helps = {_key(each): each["advice"] for each in audit["downloads"]}
    if not status["downloads"]:
        yield f"<p>No unfinished downloads{_seen(status['unseen'])}.</p>"
    yield from _unseen(status["unseen"])
    for each in status["downloads"][:_DOWNLOADS]:
        total, present = each["total_bytes"], each["present_bytes"]
        words = [f"{part_of(present, total) if total else size(present)} on disk"]
        if each["per_second_bytes"] is not None:
            words.append(f"at {size(each['per_second_bytes'])}/s")
        if each["left_seconds"] is not None:
            words.append(f"{advice.duration(each['left_seconds'])} left")
        words += [f"written by {by['process']} ({by['pid']})" for by in each["writers"]]
        yield f"<article><h3>{_who(each)}</h3>"
        if total:
            yield f'<progress max="{total}" value="{present}">{present} of {total}</progress>'
        yield f"<p>{_text(', '.join(words))}.</p>"
        yield _sentence(f"{each['words']}: {each['because']}.", helps.get(_key(each), ""))
        yield "</article>"
    yield _more(len(status["downloads"]) - _DOWNLOADS)


def _key(download: Document) -> tuple[Any, ...]:
    return download["digest"], download["transfer"], download["ours"]


def _start(forecast: Document | None, seen: str) -> Iterator[str]:
    if forecast is None:
        yield "<p>Not known.</p>"
        return
    if forecast["start_fails"]:
        yield "<p>The server can't start.</p>"
    if forecast["pruning_off"]:
        yield "<p>It keeps every file: pruning is off.</p>"
    deletes, later = forecast["deletes"], forecast["later"]
    if deletes:
        files = f"It deletes {count(len(deletes), 'file')}, freeing {size(forecast['bytes'])}:"
        yield f"<p>{_text(files)}</p>{_list(map(_text, deletes[:_FILES]))}"
        yield _more(len(deletes) - _FILES)
    if later:
        what = count(len(later), "more file" if deletes else "file")
        freed = size(sum(each["bytes"] for each in later))
        yield f"<p>It deletes {_text(what)} ({_text(freed)}) from {_when(later[0]['at'])} on.</p>"
    if not (deletes or later or forecast["start_fails"] or forecast["pruning_off"]):
        yield f"<p>It deletes nothing{seen}.</p>"
    if forecast["why"]:
        yield _list(map(_text, forecast["why"][:_FILES]))


def _space(df: Document) -> Iterator[str]:
    uses = [each for each in df["uses"] if each["sizes"]["allocated_bytes"]]
    total, free = (
        size(each) for each in (df["total"]["allocated_bytes"], df["store"]["free_bytes"])
    )
    at = _when(df["time"])
    yield f"<p>{_text(total)} on disk{_seen(df['unlisted'])}, {_text(free)} free, at {at}.</p>"
    rows = (
        (_text(each["words"]), _size(each["sizes"]["allocated_bytes"])) for each in uses[:_MOST]
    )
    yield _table(("what", "on disk"), rows)
    yield _more(len(uses) - _MOST)


def _events(lines: bytes) -> Iterator[str]:
    found = [each for line in lines.splitlines() if (each := event_log.parse(line)) is not None]
    if not found:
        yield "<p>No events.</p>"
        return
    yield _list(
        f"{_when(event_log.rfc3339(each.at))} {_text(each.event_type)}: {_text(each.message)}"
        for each in reversed(found[-_MOST:])
    )
    yield _more(len(found) - _MOST)


def _queue(queue: Document) -> Iterator[str]:
    if not queue["items"]:
        yield "<p>The queue is empty.</p>"
        return
    if queue["paused"]:
        yield "<p>The queue is paused.</p>"
    rows = (
        (
            str(each["position"]),
            _text(each["model"]),
            _text(each["state"]),
            _when(each["done_by"]) if each["done_by"] else "",
        )
        for each in queue["items"][:_MOST]
    )
    yield _table(("#", "model", "state", "done by"), rows)
    yield _more(len(queue["items"]) - _MOST)


def _quarantine(quarantine: Document) -> Iterator[str]:
    kept = quarantine["kept"]
    yield from _unseen(quarantine["unseen"])
    if not (kept or quarantine["unseen"]):
        yield "<p>The quarantine is empty.</p>"
    if not kept:
        return
    rows = (
        (
            _whole(each["label"]),
            _size(each["size_bytes"]),
            "yes" if each["replaced"] else "no",
        )
        for each in kept[:_MOST]
    )
    yield _table(("label", "size", "replaced by a valid blob"), rows)
    yield _more(len(kept) - _MOST)


# ---------------------------------------------------------------- pieces


def _text(text: str) -> str:
    return _whole(short_digests(text))


def _whole(text: str) -> str:
    """A text or a name of a document, safe to show, with digests in full."""
    plain = text if text.isprintable() else names.printable(names.from_exact(text))
    return html.escape(plain)


def _who(download: Document) -> str:
    return _text(", ".join(download["models"]) or download["digest"].replace(":", "-"))


def _sentence(text: str, command: str) -> str:
    run = f" Run: <code>{_whole(command)}</code>" if command else ""
    return f"<p>{_text(text)}{run}</p>"


def _failed(error: WatchError) -> str:
    return _sentence(f"{error.message}.", error.command)


def _when(at: str) -> str:
    clock = event_log.clock(datetime.fromisoformat(at).timestamp(), time.time())
    return f'<time datetime="{_text(at)}">{_text(clock)}</time>'


def _size(number: int) -> str:
    return _text(size(number))


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{each}</li>' for each in items)}</ul>"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(f"<tr>{''.join(f'<td>{each}</td>' for each in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _more(number: int) -> str:
    return f"<p>and {number:,} more</p>" if number > 0 else ""
