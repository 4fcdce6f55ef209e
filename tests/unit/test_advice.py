"""Printed commands are taken by a shell for the very words that they were made of."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import some
from watcher.model import Caller, Evidence, Place, Server, ServerState, View, Visibility
from watcher.system import advice

MEMBER = Caller(uid=1000, program=("ollama-watch",), program_of_root=("/opt/bin/ollama-watch",))
ROOT = MEMBER._replace(uid=0)
NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0")
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF),
    min_size=1,
    max_size=20,
)


def seen(caller: Caller = MEMBER, **place: object) -> Evidence:
    where = Place("/a store/m", "--store")._replace(**place)  # type: ignore[arg-type]
    return Evidence(where, 0.0, View(Visibility.FULL), caller=caller)


@pytest.mark.parametrize("shell", ["bash", "sh"])
@settings(max_examples=some(100))
@given(words=st.lists(NAMES, min_size=1, max_size=5))
def test_a_shell_reads_the_words_back(shell: str, words: list[str]) -> None:
    if any(word.endswith("\n") and not word.isprintable() for word in words):
        shell = "bash"
    shown = advice.line("printf", "%s\\0", *words)
    assert "\n" not in shown
    assert shown.isprintable()
    read = subprocess.run([shell, "-c", shown], capture_output=True, check=True).stdout
    assert read == b"".join(os.fsencode(word) + b"\0" for word in words)


def test_a_command_names_the_store_and_the_settings_file() -> None:
    at = MEMBER._replace(config="/etc/my own.toml")
    assert advice.watch(seen(at), "clean") == (
        "ollama-watch --config '/etc/my own.toml' --store '/a store/m' clean"
    )


@pytest.mark.parametrize("by", sorted(advice.FOUND_AGAIN))
def test_a_store_that_a_bare_call_finds_is_not_named(by: str) -> None:
    assert advice.watch(seen(found_by=by), "clean") == "ollama-watch clean"


@pytest.mark.parametrize("by", ["--store", "OLLAMA_MODELS", "OLLAMA_WATCH_STORE", "anything else"])
def test_a_store_that_another_shell_would_not_find_is_named(by: str) -> None:
    assert "--store" in advice.watch(seen(found_by=by), "clean")


def test_sudo_is_there_where_it_helps_and_never_for_root() -> None:
    sudo = "sudo /opt/bin/ollama-watch --store '/a store/m' clean"
    assert advice.watch(seen(writable=False), "clean") == sudo
    assert advice.watch(seen(), "clean", owner=7) == sudo
    assert advice.watch(seen(), "clean", owner=1000) == sudo.replace("sudo /opt/bin/", "")
    assert advice.watch(seen(writable=False), "audit") == sudo.replace(
        "sudo /opt/bin/", ""
    ).replace("clean", "audit")
    assert advice.watch(seen(), "audit", root=True) == sudo.replace("clean", "audit")
    # Not even root writes to what is mounted read-only.
    assert "sudo" not in advice.watch(seen(writable=False, read_only=True), "clean")
    for each in (seen(ROOT, writable=False), seen(ROOT)):
        assert "sudo" not in advice.watch(each, "clean", owner=7, root=True)
        assert "sudo" not in advice.shell(each, "chown", "7", "x")
    assert advice.shell(seen(), "chmod", "u+r", "x", owner=1000) == "chmod u+r x"
    assert advice.shell(seen(), "chmod", "u+r", "x", owner=0) == "sudo chmod u+r x"


def test_sudo_names_the_store_that_only_this_user_finds() -> None:
    assert "--store" in advice.watch(seen(found_by="the home folder"), "audit", root=True)


def test_a_pull_goes_to_the_server_of_the_store() -> None:
    def served(*urls: str) -> Evidence:
        servers = (Server(1, "o", 0.0, ServerState.ANSWERING, ours=True, url=url) for url in urls)
        return Evidence(Place("/m", ""), 0.0, View(Visibility.FULL), servers=tuple(servers))

    assert advice.pull(served(), "llama3", by_server=True) == "ollama pull llama3"
    assert advice.pull(served("http://127.0.0.1:11434"), "a", by_server=True) == "ollama pull a"
    there = advice.pull(served("http://127.0.0.1:5"), "a", by_server=True)
    assert there == "OLLAMA_HOST=http://127.0.0.1:5 ollama pull a"
    local = advice.pull(served(), "localhost:5000/me/a:b", by_server=True)
    assert local == "ollama pull --insecure localhost:5000/me/a:b"


def test_the_program_is_called_as_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ollama-watch"
    program.touch(0o755)
    # As in a process of its own, whatever commands other tests have run in this one.
    monkeypatch.setattr(advice, "_introduced", [])
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", f"/nothing:{folder}")
    assert advice.caller().program == ("ollama-watch",)
    assert advice.caller().program_of_root == (str(program),)
    # Another program of that name comes first.
    other = tmp_path / "other"
    other.mkdir()
    (other / "ollama-watch").touch(0o755)
    monkeypatch.setenv("PATH", f"{other}:{folder}")
    assert advice.caller().program == (str(program),)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (22, "22 s"),
        (3599, "1 h"),
        (3480, "58 min"),
        (60, "1 min"),
        (7200, "2 h"),
        (86400, "24 h"),
        (2 * 86400, "2 days"),
        (12 * 86400, "12 days"),
        (-1, "0 s"),
    ],
)
def test_durations_as_people_read_them(seconds: float, words: str) -> None:
    assert advice.duration(seconds) == words
