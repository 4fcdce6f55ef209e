"""How commands are found: help, words that are no command, options, completion, manual pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.conftest import Run, environment
from tests.support import man_pages
from tests.support.command_line import understand
from tests.support.driving import content
from tests.support.notation import Store
from watcher import cli
from watcher.commands.declare import Command, Group
from watcher.state.event_log import EventType

#: What no help, and no look at the settings, may load.
HEAVY = ("watcher.model", "watcher.observe", "watcher.state", "watcher.show", "watcher.pull")
#: Whatever removes something.
DELETING = {"clean", "reset", "purge", "rm", "uninstall"}


def every(at: click.Context | None = None) -> Iterator[tuple[list[str], click.Command]]:
    """The words of each command, and the command."""
    at = at or click.Context(cli.program, info_name="ollama-watch")
    group = at.command
    assert isinstance(group, Group)
    for name in group.list_commands(at):
        command = group.get_command(at, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=at)
        yield inner.command_path.split()[1:], command
        if isinstance(command, Group):
            yield from every(inner)


ALL = {" ".join(words): command for words, command in every()}


def test_help_lists_every_command_under_what_it_is_for(run: Run) -> None:
    told = run("--help").stdout.decode()
    sections = {title: told.index(f"\n{title}:\n") for title in cli.COMMANDS}
    assert list(sections.values()) == sorted(sections.values())
    for title, names in cli.COMMANDS.items():
        section = told[sections[title] :].split("\n\n")[0]
        assert re.findall(r"^  (\w+)  ", section, re.MULTILINE) == list(names)


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("name", ["", *ALL])
def test_help_fits_the_terminal_and_has_examples(run: Run, name: str, columns: int) -> None:
    done = run(*name.split(), "--help", env={"COLUMNS": str(columns)})
    told = done.stdout.decode()
    assert done.returncode == 0
    assert max(map(len, told.splitlines())) <= columns
    assert "\nExamples:\n  ollama-watch " in told
    assert "\nRead on:\n" in told
    assert "Option" in told


@pytest.mark.parametrize("name", ALL)
def test_examples_are_understood(name: str) -> None:
    command = ALL[name]
    assert isinstance(command, Command | Group)
    for example in command.examples:
        understand(example)


@pytest.mark.parametrize("name", [name for name in ALL if not isinstance(ALL[name], Group)])
def test_options_of_every_command_are_taken_after_its_name(name: str) -> None:
    assert {option for each in ALL[name].params for option in each.opts} >= {
        *("--store", "--config", "-v", "--verbose", "-q", "--quiet", "--json", "--no-color"),
    }


def test_an_option_means_the_same_before_and_after_the_name(run: Run, models: Store) -> None:
    models.broken("0:1 -:1")
    store, settings = ("--store", str(models.path)), models.path.parent / "settings.toml"
    settings.write_text("repair = false\n")
    before = run(*store, "--json", "audit")
    for words in (
        ("audit", "--json", *store),
        ("audit", f"--store={models.path}", "--json"),
        ("--json", "audit", *store),
    ):
        after = run(*words)
        assert after.returncode == before.returncode
        told, same = (json.loads(each.stdout) for each in (after, before))
        assert told["store"]["path"] == same["store"]["path"]
        assert len(told["downloads"]) == len(same["downloads"]) == 1
    queue = [run(*store, "queue", "--json", "ls"), run("queue", "ls", "--json", *store)]
    assert [json.loads(each.stdout)["store"] for each in queue] == [str(models.path)] * 2
    shown = json.loads(run("config", "show", "--json", "--config", str(settings)).stdout)
    assert {each["key"]: each["value"] for each in shown["settings"]}["repair"] is False
    for words in (("-v", "audit", "-q"), ("audit", "-v", "-q"), ("-q", "audit", "-v")):
        assert run(*store, *words).returncode == 2


def test_stores_before_and_after_the_name_add_up(run: Run, models: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    done = run("--store", str(models.path), "audit", "--json", "--store", str(other.path))
    found = [json.loads(line)["store"]["path"] for line in done.stdout.splitlines()]
    assert found == [str(models.path), str(other.path)]


# ---------------------------------------------------------------- words that are no command


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("resume", ["repair"]), ("fix", ["repair"]), ("list", ["status", "df"]),
        ("ls", ["status", "df"]), ("prune", ["clean --dry-run"]), ("gc", ["clean --dry-run"]),
        ("rm", ["clean --dry-run"]), ("doctor", ["audit"]), ("check", ["audit"]),
        ("download", ["pull --help"]), ("download m", ["pull m"]), ("fix m", ["repair m"]),
        ("audti", ["audit"]), ("RESUME", ["repair"]), ("queue list", ["queue ls"]),
        ("queue remove m", ["queue rm m"]), ("xyzzy", []),
    ],
)  # fmt: skip
def test_a_word_leads_to_the_command_that_is_meant(run: Run, word: str, meant: list[str]) -> None:
    done = run(*word.split())
    told = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b"")
    hints = [line.partition("-m watcher ")[2] or line.partition("ollama-watch ")[2]
             for line in told.splitlines() if line.startswith("  -> ")]  # fmt: skip
    assert hints == meant
    assert re.search(r"Try '.* --help' for help", told)


@pytest.mark.parametrize("words", ["check", "prune", "quarantine list", "quarantine purge nothing"])
def test_a_printed_command_works_on_the_same_store(run: Run, models: Store, words: str) -> None:
    models.model()
    told = run("--store", str(models.path), *words.split()).stderr.decode()
    (command,) = re.findall(r"^  -> (.*)$", told, re.MULTILINE)
    assert f"--store {models.path}" in command
    pasted = subprocess.run(["sh", "-c", command], env=environment(models.path.parent), check=False)
    assert pasted.returncode == 0


@pytest.mark.parametrize(
    "word",
    [
        "clan", "clear", "cleen", "clone", "learn", "lean", "rest", "reset-all", "restart",
        "preset", "reload", "resent", "plan", "close", "queue rn", "queue arm", "queue r",
        "service install-all", "service uninstal", "quarantine urge", "quarantine page",
    ],
)  # fmt: skip
def test_no_word_leads_by_likeness_to_what_deletes(run: Run, word: str) -> None:
    told = run(*word.split()).stderr.decode()
    hints = [line for line in told.splitlines() if line.startswith("  -> ")]
    hinted = {word for line in hints for word in line.split()}
    assert not hinted & DELETING


def test_only_words_for_deleting_lead_to_what_deletes() -> None:
    means_deleting = {"prune", "gc", "rm", "remove", "delete", "cleanup"}
    for group in (cli.program, *ALL.values()):
        near = group._near if isinstance(group, Group) else {}
        for word, meant in near.items():
            assert word in means_deleting or not DELETING & {*meant}, word


def test_help_is_help(run: Run) -> None:
    assert run("help").stdout == run("--help").stdout
    assert run("help", "clean").stdout == run("clean", "--help").stdout
    assert run("help", "queue", "add").stdout == run("queue", "add", "--help").stdout
    assert run("help", "nothing").returncode == 2


# ---------------------------------------------------------------- what is loaded


def test_help_loads_nothing_of_the_rooms(tmp_path: Path) -> None:
    assert_light(tmp_path, [[*name.split(), "--help"] for name in ("", *ALL)])


def test_a_look_at_the_settings_loads_nothing_of_the_rooms(tmp_path: Path) -> None:
    assert_light(tmp_path, [["config", "show"], ["config", "check"]])


#: Forks for each command, from a Python that has loaded what each of them loads first.
LOADED = """
import json, os, sys
from watcher import cli
for words in json.load(sys.stdin):
    if os.fork() == 0:
        code = cli.main(words)
        sys.stdout.flush()
        print(*words, code, *sys.modules, file=sys.stderr, flush=True)
        os._exit(0)
    os.wait()
"""


def assert_light(home: Path, commands: list[list[str]]) -> None:
    """These commands load nothing heavy."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADED],
        input=json.dumps(commands).encode(),
        env=environment(home),
        capture_output=True,
        check=True,
    )
    told = [line.split() for line in done.stderr.decode().splitlines()]
    assert [line[: len(words) + 1] for line, words in zip(told, commands, strict=True)] == [
        [*words, "0"] for words in commands
    ]
    for line in told:
        assert not {*line} & {*HEAVY}, line


# ---------------------------------------------------------------- completion


def completed(run: Run, line: str, **env: str) -> set[str]:
    """What bash is given for the last word of a line."""
    words = line.split(" ")
    given = {"_OLLAMA_WATCH_COMPLETE": "bash_complete", "COMP_WORDS": line}
    done = run(env={**given, "COMP_CWORD": str(len(words) - 1), **env})
    assert (done.returncode, done.stderr) == (0, b"")
    return {each.partition(",")[2] for each in done.stdout.decode().splitlines() if each}


def test_commands_and_options_are_completed(run: Run) -> None:
    assert completed(run, "ollama-watch re") == {"repair", "reset"}
    assert completed(run, "ollama-watch queue r") == {"rm", "run", "resume"}
    assert {"--dry-run", "--store", "--json"} <= completed(run, "ollama-watch clean --")
    assert completed(run, "ollama-watch audit --fail-on w") == {"warning"}


def test_models_digests_and_labels_are_completed(run: Run, models: Store) -> None:
    models.model("here/latest")
    digest = models.orphan()
    kept = models.path / ".ollama-watch/quarantine"
    kept.mkdir(parents=True)
    (kept / f"1-sha256-{digest}").write_text("x")
    where = f"--store {models.path}"
    assert completed(run, f"ollama-watch {where} verify he") == {"here:latest"}
    assert completed(run, f"ollama-watch clean {where} HE") == {"here:latest"}
    short = f"sha256-{digest[:12]}"
    assert short in completed(run, f"ollama-watch {where} repair sha256-{digest[:4]}")
    assert completed(run, f"ollama-watch {where} quarantine restore 1") == {f"1-sha256-{digest}"}
    assert run("--store", str(models.path), "queue", "add", "queued").returncode == 0
    assert completed(run, f"ollama-watch {where} queue rm q") == {"queued:latest"}


def test_types_of_events_are_completed(run: Run) -> None:
    assert completed(run, "ollama-watch log --type download_r") == {
        *("download_resumed", "download_repaired", "download_reset"),
    }
    assert completed(run, "ollama-watch log --type ") == set(map(str, EventType))


def test_completion_of_what_can_not_be_read_is_empty_and_silent(run: Run, tmp_path: Path) -> None:
    assert completed(run, f"ollama-watch --store {tmp_path}/none repair x") == set()
    assert completed(run, "ollama-watch repair x", OLLAMA_WATCH_CLEAN="perhaps") == set()


# ---------------------------------------------------------------- one mistake, one code


@pytest.mark.parametrize(
    "words",
    [
        "repair --offline nothing", "clean nothing", "verify nothing", "log nothing",
        "reset -y --offline nothing", "queue rm nothing", "queue move nothing 1",
        "queue pause nothing", "queue resume nothing", "quarantine restore nothing",
        "quarantine restore -n nothing", "quarantine purge -y nothing",
    ],
)  # fmt: skip
@pytest.mark.parametrize("stores", [1, 2])
def test_an_unknown_model_or_label_is_exit_2(
    run: Run, models: Store, tmp_path: Path, words: str, stores: int
) -> None:
    models.model("here/latest")
    paths = [models.path] if stores == 1 else [models.path, Store(tmp_path / "other").path]
    where = [word for path in paths for word in ("--store", str(path))]
    before = content(models.blobs), content(models.manifests)
    done = run(*where, *words.split())
    assert done.returncode == 2, done.stderr
    assert stores == 2 or b"nothing" in done.stderr
    assert (content(models.blobs), content(models.manifests)) == before


def test_a_label_of_one_store_is_known_to_all(run: Run, models: Store, tmp_path: Path) -> None:
    digest = models.orphan()
    kept = models.path / ".ollama-watch/quarantine"
    kept.mkdir(parents=True)
    os.rename(models.blobs / f"sha256-{digest}", kept / f"1-sha256-{digest}")
    where = ["--store", str(Store(tmp_path / "other").path), "--store", str(models.path)]
    done = run(*where, "quarantine", "purge", "--yes", f"1-sha256-{digest}")
    assert done.returncode == 0, done.stderr
    assert not any(kept.iterdir())


# ---------------------------------------------------------------- manual pages


def test_the_manual_pages_are_those_of_the_commands() -> None:
    """After a change: ``python -m tests.support.man_pages``."""
    assert {path.name: path.read_text() for path in man_pages.FOLDER.iterdir()} == man_pages.pages()
    assert {f"ollama-watch-{name.replace(' ', '-')}.1" for name in ALL} < {*man_pages.pages()}
