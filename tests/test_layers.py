"""What the contract on imports (setup.cfg) can't say: who changes files, and what is pure."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import watcher

HOUSE = Path(watcher.__file__).parent

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
    ("service/daemon.py", "import ctypes"): "malloc_trim, which gives memory back",
    ("transfer/client.py", "import ctypes"): "a reference, which changes no file",
    ("__main__.py", "os.write"): "to stderr",
    ("system/privileges.py", "import ctypes"): "capabilities, which are no files",
    ("commands/rights.py", "open for writing"): "a pipe",
    ("system/leash.py", "open for writing"): "a pipe",
    ("pull/queue_process.py", "os.write"): "a pipe",
    ("commands/daemon.py", "os.write"): "to stdout and stderr",
    ("commands/queueing.py", "os.write"): "to stdout",
    ("commands/pulling.py", "os.write"): "the terminal's cursor, at a second ctrl-C",
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
        "watcher.state.registry_cache",
        "watcher.state.hashes.keep",
        "watcher.state.memory.load",
    }
    | {"watcher.ollama.server", "watcher.ollama.pull_stream", "watcher.observe"}
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
            case ast.Attribute(value=ast.Name(id="fs")):
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


def test_only_state_fs_changes_files() -> None:
    for path in modules():
        here = path.relative_to(HOUSE).as_posix()
        if is_demo(path) or here == "state/fs.py":
            continue
        tree = ast.parse(path.read_bytes())
        for line, call in (*changing_calls(tree), *aliases(tree)):
            assert (here, call) in ALLOWED, (
                f"watcher/{here}:{line}: {call}. Every call that changes a file is in state/fs.py:"
                " by descriptor, durable, never over an existing name"
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
