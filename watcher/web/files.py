"""The files of the page, read with this module: the store's owner may be unable to read them."""

from pathlib import Path
from string import Template

_FOLDER = Path(__file__).parent


def _served(name: str, kind: str) -> tuple[bytes, str]:
    return (_FOLDER / name).read_bytes(), kind


PAGE = Template((_FOLDER / "page.html").read_text(encoding="utf-8"))
#: By path: what a file holds, and its type.
SERVED = {
    "/page.js": _served("page.js", "text/javascript; charset=utf-8"),
    "/page.css": _served("page.css", "text/css; charset=utf-8"),
    "/icon.svg": _served("icon.svg", "image/svg+xml"),
}
