"""The order of the house: who imports whom, who changes files, and what deciding may touch."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import watcher

HOUSE = Path(watcher.__file__).parent

#: A module imports only what stands above it, or beside it in its own package.
ORDER = (
    "__init__", "redact", "model", "states", "errors", "ranges", "names", "gojson", "sidecars",
    "manifests", "environment", "advice", "privileges", "stopping", "flocks", "files", "folders",
    "ours", "checks", "config", "units", "memory", "kept", "records", "events", "ollama",
    "registry", "world",
    "observe", "history", "decide", "journal", "act", "cycle", "notify", "proofs", "pull",
    "file_events", "wakes", "listener", "metrics", "daemon", "show", "commands", "cli", "__main__",
)  # fmt: skip
WHY = (
    "Data goes one way, observe -> decide -> act -> learn -> show. Move what is shared up,"
    " or hand it in."
)

CHANGING = frozenset(
    {"unlink", "remove", "rename", "renames", "replace", "link", "symlink", "mkdir", "makedirs"}
    | {"rmdir", "removedirs", "truncate", "ftruncate", "utime", "chmod", "fchmod", "lchmod"}
    | {"chown", "fchown", "lchown", "mknod", "mkfifo", "write", "writev", "pwrite", "pwritev"}
    | {"sendfile", "copy_file_range", "setxattr", "removexattr", "posix_fallocate"}
)
PATHLIB_CHANGING = frozenset(
    {"write_text", "write_bytes", "touch", "hardlink_to", "symlink_to", "rmdir", "unlink"}
)
WRITING_FLAGS = frozenset({"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND", "O_TMPFILE"})
#: Where a call that could change a file goes to a stream, to the null device or to a watch.
ALLOWED = {
    ("daemon.py", "import ctypes"): "malloc_trim, which gives memory back",
    ("__main__.py", "os.write"): "to stderr",
    ("privileges.py", "import ctypes"): "capabilities, which are no files",
    ("commands/rights.py", "open for writing"): "a pipe",
    ("pull/starter.py", "open for writing"): "a pipe",
    ("commands/daemon.py", "os.write"): "to stdout and stderr",
    ("commands/queue.py", "os.write"): "to stdout",
    ("commands/pull.py", "os.write"): "the terminal's cursor, at a second ctrl-C",
    ("cli.py", "os.open for writing"): "the null device, after a broken pipe",
    ("cli.py", "open for writing"): "the null device, for a stream that was closed",
    ("commands/demo.py", ".write_text"): "pictures, where the user wants them",
}
#: What would make a decision depend on anything but the evidence.
IMPURE = frozenset(
    {"os", "io", "time", "pathlib", "shutil", "subprocess", "socket", "http", "tempfile"}
    | {"random", "secrets", "threading", "asyncio", "psutil", "fcntl", "sys", "glob", "urllib"}
    | {
        "watcher.state.fs",
        "watcher.state.memory.load",
        "watcher.ollama",
        "watcher.observe",
        "watcher.observe.host",
    }
)


def modules() -> list[Path]:
    return sorted(path for path in HOUSE.rglob("*.py") if "__pycache__" not in path.parts)


def is_demo(path: Path) -> bool:
    return path.relative_to(HOUSE).parts[0] == "demo"


def dotted(path: Path) -> str:
    parts = ("watcher", *path.relative_to(HOUSE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imports(path: Path) -> Iterator[str]:
    """The dotted names that a module imports anywhere in it, functions included."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides what is imported"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def of_ours(path: Path) -> set[str]:
    """The modules of ours that a module imports, without the names in them."""
    known = {dotted(each) for each in modules()}
    found: set[str] = set()
    for name in imports(path):
        if name.split(".")[0] == "watcher":
            steps = list(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))
            found.add(max((step for step in steps if step in known), default="watcher", key=len))
    return found - {"watcher"}


def room(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_its_place_in_the_house() -> None:
    rooms = {room(dotted(path)) for path in modules() if not is_demo(path)}
    assert rooms <= set(ORDER), f"give {rooms - set(ORDER)} a place in ORDER, and say why there"


@pytest.mark.parametrize("path", [path for path in modules() if not is_demo(path)], ids=dotted)
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    own = room(dotted(path))
    for imported in of_ours(path):
        if room(imported) == "demo":
            continue
        if own == "__init__" and imported == "watcher.pull.manager":
            continue  # what programs import by the package's name, loaded once it is asked for
        below = ORDER.index(room(imported)) > ORDER.index(own)
        assert not below, f"{dotted(path)} imports {imported}, which stands below it. {WHY}"


def test_no_circle_of_imports() -> None:
    graph = {dotted(path): of_ours(path) for path in modules()}
    without: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join((*above, module))}. {WHY}"
        if module not in without:
            for imported in graph.get(module, ()):
                visit(imported, (*above, module))
            without.add(module)

    for module in graph:
        visit(module, ())


def test_the_demo_and_the_package_know_nothing_of_each_other() -> None:
    for path in modules():
        for imported in of_ours(path):
            if is_demo(path):
                assert room(imported) == "demo", (
                    f"{dotted(path)} imports {imported}: the demo's server must be written from the"
                    " facts alone, so that a misreading of ours can't cancel itself out"
                )
            elif room(imported) == "demo":
                assert dotted(path) == "watcher.commands.demo", (
                    f"{dotted(path)} imports {imported}: only commands/demo.py plays the demo"
                )


def changing_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        match node.func:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in CHANGING:
                yield node.lineno, f"os.{name}"
            case ast.Attribute(value=ast.Name(id="os"), attr="open"):
                names = {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}
                if names & WRITING_FLAGS:
                    yield node.lineno, "os.open for writing"
            case ast.Name(id="open"):
                modes = [
                    each.value
                    for each in (*node.args[1:2], *(k.value for k in node.keywords))
                    if isinstance(each, ast.Constant)
                ]
                if any(isinstance(mode, str) and set(mode) & set("wax+") <= set("wax+")
                       and set(mode) & set("wax+") and set(mode) <= set("rwaxbt+")
                       for mode in modes):  # fmt: skip
                    yield node.lineno, "open for writing"
            case ast.Attribute(value=ast.Name(id="files")):
                continue
            case ast.Attribute(attr=name) if name in PATHLIB_CHANGING:
                yield node.lineno, f".{name}"


def aliases(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Other ways to those calls: names of os taken out of it, and modules that change files."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for name in node.names:
                if name.name in CHANGING | {"open"}:
                    yield node.lineno, f"from os import {name.name}"
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name in ("shutil", "ctypes", "tempfile") or (
                    name.name == "os" and name.asname
                ):
                    yield node.lineno, f"import {name.name}"


def test_only_files_py_changes_files() -> None:
    for path in modules():
        here = path.relative_to(HOUSE).as_posix()
        if is_demo(path) or here == "files.py":
            continue
        tree = ast.parse(path.read_bytes())
        for line, call in (*changing_calls(tree), *aliases(tree)):
            assert (here, call) in ALLOWED, (
                f"watcher/{here}:{line}: {call}. Every call that changes a file is in files.py: by"
                " descriptor, durable, never over an existing name"
            )


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("os.unlink('x')", "os.unlink"),
        ("os.open('x', os.O_RDWR | os.O_CREAT)", "os.open for writing"),
        ("open('x', 'ab')", "open for writing"),
        ("open('x', mode='w')", "open for writing"),
        ("Path('x').write_text('')", ".write_text"),
    ],
)
def test_such_a_call_would_be_found(source: str, call: str) -> None:
    assert [found for _, found in changing_calls(ast.parse(source))] == [call]


def test_reading_is_not_taken_for_writing() -> None:
    calm = "open('x'); open('x', 'rb'); open('x', encoding='ascii'); os.open('x', os.O_RDONLY)"
    assert not list(changing_calls(ast.parse(calm)))


def test_deciding_does_no_io_and_asks_no_clock() -> None:
    for path in (HOUSE / "decide").glob("*.py"):
        asked = [
            node.attr
            for node in ast.walk(ast.parse(path.read_bytes()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("datetime", "date")
            and node.attr in ("now", "today", "utcnow")
        ]
        assert not asked, f"{dotted(path)} asks the clock; the time is in the evidence"
        for name in imports(path):
            steps = set(itertools.accumulate(name.split("."), lambda a, b: f"{a}.{b}"))
            assert not steps & IMPURE, (
                f"{dotted(path)} imports {name}: what is decided must follow from the evidence"
                " alone, so that it can be printed, tested and planned again"
            )
