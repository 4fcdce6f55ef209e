"""Every call that changes a file, on real files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import IS_ROOT, NOBODY, needs_root
from tests.support.driving import once
from watcher.state import fs


@pytest.fixture
def path(folder: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}"))


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The disk is full behind so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---------------------------------------------------------------- looking


@pytest.mark.parametrize("kind", ["symlink", "fifo", "socket", "folder"])
def test_only_regular_files_are_read_and_no_link_is_followed(
    folder: int, path: Path, kind: str
) -> None:
    (path / "real").write_text("secret")
    match kind:
        case "symlink":
            (path / "x").symlink_to("real")
        case "fifo":
            os.mkfifo(path / "x")
        case "folder":
            (path / "x").mkdir()
        case _:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(f"/proc/self/fd/{folder}/x")
    with pytest.raises(OSError):
        fs.read_small("x", folder, 100)


def test_reading_ends_at_the_limit_and_keeps_the_time_of_access(folder: int, path: Path) -> None:
    (path / "x").write_bytes(b"0123456789")
    os.utime(path / "x", (1, 2))
    assert fs.read_small("x", folder, 4) == b"0123"
    assert (path / "x").stat().st_atime == 1


def test_a_file_of_ours_that_is_too_large_is_not_read(folder: int, path: Path) -> None:
    """Not even its beginning, which may make sense by itself."""
    (path / "x").write_bytes(b"0123456789")
    assert fs.read_ours("x", folder, 10) == b"0123456789"
    with pytest.raises(OSError, match="10 bytes is too much"):
        fs.read_ours("x", folder, 9)


def test_no_descriptor_is_left_open(folder: int, path: Path) -> None:
    os.mkfifo(path / "fifo")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        fs.read_small("fifo", folder, 1)
    with pytest.raises(OSError):
        fs.create("no/such", folder, b"x")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_linked_folder_is_refused_below_another(folder: int, path: Path) -> None:
    (path / "real").mkdir()
    (path / "link").symlink_to("real")
    with pytest.raises(OSError), fs.opened_folder("link", folder):
        pass
    with fs.opened_folder("link", folder, follow=True) as fd:
        assert os.fstat(fd).st_ino == (path / "real").stat().st_ino


# ---------------------------------------------------------------- making


def test_create_never_overwrites_and_never_follows(folder: int, path: Path) -> None:
    (path / "there").write_text("old")
    (path / "link").symlink_to("elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            fs.create(name, folder, b"new")
    assert (path / "there").read_text() == "old"
    assert not (path / "elsewhere").exists()


def test_modes_do_not_depend_on_the_umask(folder: int, path: Path) -> None:
    before = os.umask(0o077)
    try:
        fs.create("file", folder, b"")
        fs.ensure_folder("sub", folder)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((path / "sub").stat().st_mode) == 0o755


@needs_root
def test_files_created_by_root_belong_to_the_owner_of_the_folder(folder: int, path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)
    fs.create("file", folder, b"x")
    fs.ensure_folder("sub", folder)
    fs.append("log", folder, b"x\n")
    fs.save("state", folder, b"x")
    with fs.locked("lock", folder):
        pass
    for each in path.iterdir():
        assert (each.stat().st_uid, each.stat().st_gid) == (NOBODY, NOBODY), each.name


def test_an_existing_folder_stays_as_it_is(folder: int, path: Path) -> None:
    (path / "sub").mkdir(mode=0o700)
    fs.ensure_folder("sub", folder)
    assert stat.S_IMODE((path / "sub").stat().st_mode) == 0o700


def test_save_replaces_in_one_step_and_leaves_nothing_beside(folder: int, path: Path) -> None:
    fs.save("state", folder, b"one")
    inode = (path / "state").stat().st_ino
    fs.save("state", folder, b"two")
    assert (path / "state").read_bytes() == b"two"
    assert (path / "state").stat().st_ino != inode
    assert os.listdir(path) == ["state"]


def test_add_puts_a_new_file_over_nothing(folder: int, path: Path) -> None:
    fs.add("unit", folder, b"one")
    with pytest.raises(FileExistsError):
        fs.add("unit", folder, b"two")
    assert (path / "unit").read_bytes() == b"one"
    assert os.listdir(path) == ["unit"]


def test_a_full_disk_leaves_the_old_state_whole(folder: int, path: Path) -> None:
    fs.save("state", folder, b"old")
    with small_files(1000), pytest.raises(OSError):
        fs.save("state", folder, b"n" * 5000)
    assert (path / "state").read_bytes() == b"old"
    assert os.listdir(path) == ["state"]


def test_a_full_disk_leaves_no_half_file(folder: int, path: Path) -> None:
    with small_files(1000), pytest.raises(OSError):
        fs.create("x", folder, b"n" * 5000)
    assert os.listdir(path) == []


def test_many_files_are_each_on_the_disk_and_need_few_descriptors(
    folder: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        fs.create_all({f"n{number}": b"%d" % number for number in range(300)}, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sorted(synced) == sorted(each.stat().st_ino for each in path.iterdir())
    assert {each.name: each.read_bytes() for each in path.iterdir()} == {
        f"n{number}": b"%d" % number for number in range(300)
    }


def test_of_files_that_are_made_together_none_is_left_half(folder: int, path: Path) -> None:
    (path / "taken").write_bytes(b"of somebody")
    with pytest.raises(FileExistsError):
        fs.create_all({"first": b"1", "taken": b"2", "last": b"3"}, folder)
    assert [each.name for each in path.iterdir()] == ["taken"]
    assert (path / "taken").read_bytes() == b"of somebody"


def test_of_many_files_that_find_no_room_none_is_left_beside(
    folder: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hundreds are new then, and the others as they were."""
    before = {f"{number:03}": b"old" for number in range(250)}
    fs.save_all(before, folder)
    made, create = [], os.open

    def opened(name: str, flags: int, *more: Any, **where: Any) -> int:
        if flags & os.O_CREAT:
            made.append(name)
            if len(made) > 150:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return create(name, flags, *more, **where)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        fs.save_all(dict.fromkeys(before, b"new"), folder)
    assert sorted(os.listdir(path)) == sorted(before)
    assert [(path / name).read_bytes() for name in sorted(before)] == [b"new"] * 100 + [
        b"old"
    ] * 150


def test_save_does_not_write_through_a_link(folder: int, path: Path) -> None:
    (path / "target").write_text("mine")
    (path / "state").symlink_to("target")
    fs.save("state", folder, b"new")
    assert (path / "target").read_text() == "mine"
    assert (path / "state").read_bytes() == b"new"


# ---------------------------------------------------------------- logs


def test_append_gives_the_size_and_adds_a_line(folder: int, path: Path) -> None:
    assert fs.append("log", folder, b"one\n") == 4
    assert fs.append("log", folder, b"two\n") == 8
    assert (path / "log").read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("left", [b"one\n", b"", b"one\ntwo\n"])
@pytest.mark.parametrize("half", [b"h", b'{"half', b"h" * 5000, b"h" * 900_000])
def test_a_half_line_of_a_kill_is_cut_off(
    folder: int, path: Path, left: bytes, half: bytes
) -> None:
    (path / "log").write_bytes(left + half)
    fs.append("log", folder, b"next\n")
    assert (path / "log").read_bytes() == left + b"next\n"


def test_a_line_that_does_not_fit_is_taken_back(folder: int, path: Path) -> None:
    fs.append("log", folder, b"whole\n")
    with small_files(1000), pytest.raises(OSError):
        fs.append("log", folder, b"n" * 5000 + b"\n")
    assert (path / "log").read_bytes() == b"whole\n"


def _append_for_ever(folder: int, line: bytes) -> None:
    while True:
        fs.append("log", folder, line)


@needs_root
def test_a_line_that_a_full_disk_cuts_is_taken_back(folder: int, path: Path) -> None:
    (path / "disk").mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path / "disk")], check=True
    )
    try:
        with fs.opened_folder("disk", folder) as disk:
            line = b"x" * 999 + b"\n"
            with pytest.raises(OSError) as caught:
                _append_for_ever(disk, line)
            assert caught.value.errno == errno.ENOSPC
            written = (path / "disk" / "log").read_bytes()
            assert written
            assert set(written.splitlines()) == {line[:-1]}
            assert written.endswith(b"\n")
    finally:
        subprocess.run(["umount", str(path / "disk")], check=True)


def test_a_log_that_is_a_link_is_not_written_through(folder: int, path: Path) -> None:
    (path / "target").write_text("mine")
    (path / "log").symlink_to("target")
    with pytest.raises(OSError):
        fs.append("log", folder, b"line\n")
    assert (path / "target").read_text() == "mine"


def _append_many(path: str, letter: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    for _ in range(50):
        fs.append("log", fd, letter.encode() * 3000 + b"\n")


def test_lines_of_several_processes_do_not_mix(folder: int, path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(str(path), each)) for each in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    lines = (path / "log").read_bytes().splitlines()
    assert len(lines) == 100
    assert all(len(line) == 3000 and len(set(line)) == 1 for line in lines)


# ---------------------------------------------------------------- moving


@pytest.mark.parametrize("how", ["renameat2", "no renameat2", "a file system without it"])
def test_move_never_replaces(
    folder: int, path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "no renameat2":
        monkeypatch.setattr(fs, "_renameat2", None)
    elif how != "renameat2":

        def refuse(*_: object) -> int:
            import ctypes

            ctypes.set_errno(errno.EINVAL)
            return -1

        monkeypatch.setattr(fs, "_renameat2", refuse)
    (path / "a").write_text("a")
    (path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        fs.move("a", folder, "b", folder)
    assert ((path / "a").read_text(), (path / "b").read_text()) == ("a", "b")
    fs.move("a", folder, "c", folder)
    assert sorted(os.listdir(path)) == ["b", "c"]
    with pytest.raises(FileNotFoundError):
        fs.move("a", folder, "d", folder)


def test_a_link_itself_is_moved_linked_and_removed(folder: int, path: Path) -> None:
    (path / "target").write_text("mine")
    (path / "link").symlink_to("target")
    fs.move("link", folder, "moved", folder)
    fs.second_name("moved", folder, "second", folder)
    assert (path / "second").is_symlink()
    fs.remove("moved", folder)
    fs.remove("second", folder)
    assert (path / "target").read_text() == "mine"


def test_a_second_name_never_replaces(folder: int, path: Path) -> None:
    (path / "a").write_text("a")
    (path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        fs.second_name("a", folder, "b", folder)


def test_names_of_any_bytes_can_be_moved(folder: int, path: Path) -> None:
    for raw in (b"\xff\xfe", b"new\nline", b"x" * 255):
        name = os.fsdecode(raw)
        fs.create(name, folder, b"")
        fs.move(name, folder, "moved", folder)
        fs.remove("moved", folder)
    assert os.listdir(path) == []


# ---------------------------------------------------------------- locks


def test_a_lock_is_held_by_one_and_names_its_owner(folder: int) -> None:
    with fs.locked("lock", folder):
        with pytest.raises(fs.BusyError) as caught, fs.locked("lock", folder):
            pass
        assert caught.value.owner.startswith(f"pid {os.getpid()} since ")
    with fs.locked("lock", folder):
        pass


def test_a_lock_that_loses_its_name_before_it_is_held_is_taken_anew(
    folder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes next would find another file, and both would hold the lock."""
    real, removed = fs._wait_for, once(lambda: fs.remove("lock", folder))

    def wait(*given: Any) -> None:
        removed()
        real(*given)

    monkeypatch.setattr(fs, "_wait_for", wait)
    with fs.locked("lock", folder) as held:
        assert fs.is_named(held, "lock", folder)


def test_a_file_with_a_second_name_is_not_written_to(folder: int, path: Path) -> None:
    (path / "somebody").write_text("else's")
    for name in ("lock", "log"):
        os.link(path / "somebody", path / name)
    with pytest.raises(OSError, match="second name"), fs.locked("lock", folder):
        pass
    with pytest.raises(OSError, match="second name"):
        fs.append("log", folder, b"a line\n")
    assert (path / "somebody").read_text() == "else's"


def test_a_full_disk_keeps_nobody_from_the_lock(folder: int) -> None:
    with small_files(0), fs.locked("lock", folder):
        pass


@pytest.mark.skipif(IS_ROOT, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_is_an_oserror(folder: int, path: Path) -> None:
    path.chmod(0o555)
    with pytest.raises(PermissionError):
        fs.create("x", folder, b"")


def test_root_writes_no_output_over_a_file_of_two_names(folder: int, tmp_path: Path) -> None:
    (tmp_path / "first").write_text("kept")
    if os.geteuid() != 0:
        pytest.skip("an ordinary user may do so")
    os.link(tmp_path / "first", "picture", dst_dir_fd=folder)
    with pytest.raises(OSError, match="a second name"):
        fs.open_output("picture", folder)
    assert (tmp_path / "first").read_text() == "kept"
