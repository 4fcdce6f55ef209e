"""Settings: what is accepted, what is refused and how it is named, and who wins."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Run
from watcher import config
from watcher.config import Settings
from watcher.errors import Exit, SettingsError
from watcher.observe import place


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("2h", 7200),
        ("7d", 604800),
        ("1w", 604800),
        ("1.5h", 5400),
        (" 5 M ", 300),
        ("12", 12),
        (12, 12),
        (0.5, 0.5),
        (0, 0),
    ],
)
def test_durations(value: object, seconds: float) -> None:
    assert config.duration(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "-5s",
        "5 parsecs",
        "1d2h",
        "1e3",
        "5s5",
        True,
        None,
        [],
        -1,
        float("nan"),
        float("inf"),
        "9" * 400 + "d",
        10**400,
    ],
    ids=lambda value: repr(value)[:20],
)
def test_invalid_durations(value: object) -> None:
    with pytest.raises(ValueError):
        config.duration(value)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("50GB", 50 * 10**9),
        ("10 MiB", 10 << 20),
        ("5k", 5000),
        ("5ki", 5120),
        ("1.5TB", 15 * 10**11),
        ("7", 7),
        ("7b", 7),
        (7, 7),
        (0, 0),
    ],
)
def test_sizes(value: object, size: int) -> None:
    assert config.size(value) == size


@pytest.mark.parametrize(
    "value",
    ["", "x", "-5", "5XB", "5i", True, None, 1.5, -1, "9" * 400 + "TB"],
    ids=lambda value: repr(value)[:20],
)
def test_invalid_sizes(value: object) -> None:
    with pytest.raises(ValueError):
        config.size(value)


@pytest.mark.parametrize("word", ["true", "YES", " on ", "1", True])
def test_words_for_true(word: object) -> None:
    assert config.boolean(word) is True


@pytest.mark.parametrize("word", ["false", "No", "off", "0", False])
def test_words_for_false(word: object) -> None:
    assert config.boolean(word) is False


@pytest.mark.parametrize("word", ["", "maybe", 1, None])
def test_words_for_neither(word: object) -> None:
    with pytest.raises(ValueError):
        config.boolean(word)


@pytest.fixture(autouse=True)
def _no_system_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "SYSTEM_FILE", tmp_path / "system.toml")


def test_nothing_set_is_the_default() -> None:
    assert config.load(None, {"PATH": "x"}) == Settings()


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('stale_after = "3d"\nclean = true\nstore = ["/a", "/b"]\nlog_keep = "2w"\n')
    found = config.load(file, {"OLLAMA_WATCH_STALE_AFTER": "5d"})
    assert (found.stale_after, found.clean, found.stores) == (5 * 86400, True, ("/a", "/b"))
    assert found.stores_by == str(file)
    assert found.log_keep_days == 14


def test_a_named_file_is_read_in_place_of_the_systems(tmp_path: Path) -> None:
    (tmp_path / "system.toml").write_text("clean = true\n")
    (tmp_path / "mine.toml").write_text("")
    assert config.load(None, {}).clean
    assert not config.load(tmp_path / "mine.toml", {}).clean


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('stale_after = "soon"', ("stale_after", "'soon'")),
        ("stale_afer = 3", ("stale_afer", "stale_after")),
        ("clean = 3", ("clean", "3")),
        ('log_max_size = "5XB"', ("log_max_size", "'5XB'")),
        ("store = 3", ("store", "3")),
        ('store = ""', ("store", "''")),
        ("stale_after = inf", ("stale_after", "inf")),
        ("[clean]", ("clean",)),
        ("clean =", ()),
    ],
)
def test_a_bad_setting_is_named_with_its_file_key_and_value(
    tmp_path: Path, text: str, named: tuple[str, ...]
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        config.load(file, {})
    assert caught.value.exit_code is Exit.USAGE
    for word in (str(file), *named):
        assert word in str(caught.value)


def test_a_bad_variable_is_named() -> None:
    for key, value in (("OLLAMA_WATCH_CLEAN", "perhaps"), ("OLLAMA_WATCH_CLAEN", "1")):
        with pytest.raises(SettingsError, match=key):
            config.load(None, {key: value})


@pytest.mark.parametrize("make", ["absent", "folder", "latin-1", "nul"])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, make: str) -> None:
    file = tmp_path / "settings.toml"
    if make == "folder":
        file.mkdir()
    elif make != "absent":
        file.write_bytes(b"# \xe9\n" if make == "latin-1" else b"clean = true\0\n")
    with pytest.raises(SettingsError, match=r"settings\.toml"):
        config.load(file, {})


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("127.3.2.1:1", ("127.3.2.1", 1)),
        ("localhost:65535", ("127.0.0.1", 65535)),
        ("[::1]:9464", ("::1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("[::]:9464", ("::", 9464)),
        ("", None),
    ],
)
def test_addresses(value: str, address: tuple[str, int] | None) -> None:
    assert config.address(value) == address


@pytest.mark.parametrize(
    "value",
    [
        "example.org:9464",
        "localhost.example.org:9464",
        ":9464",
        "9464",
        9464,
        "127.0.0.1",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:9464/x",
        "127.0.0.1:٩٤٦٤",
        "127.1:9464",
        "::1:9464",
        "[127.0.0.1]:9464",
        "999.0.0.1:9464",
        " ",
        None,
        True,
    ],
)
def test_invalid_addresses(value: object) -> None:
    with pytest.raises(ValueError, match="an address and a port"):
        config.address(value)


@pytest.mark.parametrize("value", ["/x.prom", "/var/lib/node exporter/ollama-watch.prom", ""])
def test_paths_of_textfiles(value: str) -> None:
    assert config.metrics_file(value) == value


@pytest.mark.parametrize(
    "value", ["x.prom", "/x.txt", "/.prom", "/x/.prom", "/x.prom/", "/\0.prom", 5, None, True]
)
def test_invalid_paths_of_textfiles(value: object) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        config.metrics_file(value)


def test_the_settings_of_metrics(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('metrics_file = "/a/b.prom"\nmetrics_listen = "127.0.0.1:9464"\n')
    found = config.load(file, {})
    assert found.metrics_file == "/a/b.prom"
    assert found.metrics_listen == ("127.0.0.1", 9464)
    off = {"OLLAMA_WATCH_METRICS_FILE": "", "OLLAMA_WATCH_METRICS_LISTEN": ""}
    assert config.load(file, off) == Settings()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "[::]"])
def test_other_machines_read_the_metrics_only_if_that_is_allowed(tmp_path: Path, host: str) -> None:
    file = tmp_path / "x.toml"
    file.write_text(f'metrics_listen = "{host}:1"\n')
    with pytest.raises(SettingsError, match=re.escape(f"{file}: metrics_listen = '{host}:1'")):
        config.load(file, {})
    with pytest.raises(SettingsError, match=r"OLLAMA_WATCH_METRICS_LISTEN = '0\.0\.0\.0:1'"):
        config.load(None, {"OLLAMA_WATCH_METRICS_LISTEN": "0.0.0.0:1"})
    allowed = {"OLLAMA_WATCH_METRICS_ALLOW_REMOTE": "true"}
    assert config.load(file, allowed).metrics_listen == (host.strip("[]"), 1)


def test_every_default_is_that_of_the_settings() -> None:
    fields = {
        key.name: key.metadata["read"](key.metadata["default"]) for key in config.KEYS.values()
    }
    assert replace(Settings(), **fields) == Settings()
    assert len(fields) == len(config.KEYS)


def test_what_is_given_is_reported_with_its_source(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('clean = true\nlog_keep = "2w"\n')
    environment = {"OLLAMA_WATCH_CLEAN": "no", "OLLAMA_WATCH_STORE": "/a"}
    assert config.given(file, environment) == {
        "clean": ("no", "OLLAMA_WATCH_CLEAN"),
        "log_keep": ("2w", str(file)),
        "store": ("/a", "OLLAMA_WATCH_STORE"),
    }
    assert config.given(None, {}) == {}


def test_a_bad_value_is_reported_though_a_later_one_would_win(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("clean = 3\n")
    with pytest.raises(SettingsError, match="clean"):
        config.load(file, {"OLLAMA_WATCH_CLEAN": "no"})


# ---------------------------------------------------------------- the example, and the commands

EXAMPLE = Path(__file__).parents[2] / "ollama-watch.example.toml"


def test_the_example_has_every_key_once_with_its_default(tmp_path: Path) -> None:
    assert config.load(EXAMPLE, {}) == Settings(), "as it is it must change nothing"
    lines = re.findall(r"^#(\w+ = .*)$", EXAMPLE.read_text(), re.MULTILINE)
    shown = tomllib.loads("\n".join(lines))
    usual = {key: known.metadata["default"] for key, known in config.KEYS.items()}
    assert shown == {"store": place.SERVICE_STORE, **usual}
    assert list(shown) == ["store", *config.KEYS]
    (tmp_path / "all.toml").write_text("\n".join(lines))
    path = tmp_path / "all.toml"
    assert config.load(path, {}) == Settings((place.SERVICE_STORE,), str(path))


def test_show_reports_each_value_and_its_source(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('clean = true\nstore = ["/a", "/b c"]\n')
    command = ["--config", str(file), "config", "show"]
    done = run(*command, env={"OLLAMA_WATCH_REPAIR": "off"})
    assert done.returncode == 0
    rows = [re.split(r"  +", line) for line in done.stdout.decode().splitlines()]
    assert rows == [
        ["store", "/a, /b c", str(file)],
        ["stale_after", "7d", "default"],
        ["repair", "false", "OLLAMA_WATCH_REPAIR"],
        ["fetch", "false", "default"],
        ["clean", "true", str(file)],
        ["queue", "false", "default"],
        ["connections", "8-16", "default"],
        ["rate", "0", "default"],
        ["mirrors", "(none)", "default"],
        ["writers_visible", "false", "default"],
        ["quarantine_keep", "30d", "default"],
        ["quarantine_max_size", "200GB", "default"],
        ["log_max_size", "10MB", "default"],
        ["log_keep", "90d", "default"],
        ["metrics_file", "(none)", "default"],
        ["metrics_listen", "(none)", "default"],
        ["metrics_allow_remote", "false", "default"],
        ["web_listen", "(none)", "default"],
    ]
    env = {"OLLAMA_WATCH_MIRRORS": "http://a http://b:5000"}
    found = json.loads(run("--store", "/x", *command, "--json", env=env).stdout)
    mirrors = ["http://a", "http://b:5000"]
    assert {"key": "mirrors", "value": mirrors, "source": next(iter(env))} in found["settings"]
    assert found["schema"] == "ollama-watch/config/1"
    assert found["settings"][0] == {"key": "store", "value": ["/x"], "source": "--store"}
    assert found["settings"][4] == {"key": "clean", "value": True, "source": str(file)}


@pytest.mark.parametrize(
    ("value", "rate"),
    [
        ("5MB/s", 5_000_000),
        ("1 MiB/s", 1 << 20),
        ("20MB", 20_000_000),
        (5000, 5000),
        ("0", 0),
        (0, 0),
    ],
)
def test_rates(value: object, rate: int) -> None:
    assert config.rate(value) == rate


@pytest.mark.parametrize(
    "value", ["", "fast", "5MB/m", "5Mbit/s", "999", "0.5KB/s", -1, True, None]
)
def test_invalid_rates(value: object) -> None:
    with pytest.raises(ValueError, match="expected a rate such as 5MB/s"):
        config.rate(value)


def test_no_connection_is_given_up_before_it_can_bring_anything() -> None:
    assert config.stall("1s") == 1.0
    for value in ("0s", "0", "0.5s"):
        with pytest.raises(ValueError, match="at least 1s"):
            config.stall(value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("", ()),
        ([], ()),
        (["http://registry.lan:5000/"], ("http://registry.lan:5000",)),
        ("https://a http://[::1]:5000", ("https://a", "http://[::1]:5000")),
        (["https://a/mirror"], ("https://a/mirror",)),
    ],
)
def test_mirrors(value: object, found: tuple[str, ...]) -> None:
    assert config.mirrors(value) == found


@pytest.mark.parametrize(
    "value",
    [
        None,
        5,
        "registry.lan",
        ["registry.lan:5000"],
        ["ftp://a"],
        ["http://me:secret@a"],
        [5],
        ["http://a?x=1"],
        ["http://a b"],
        ["http://"],
    ],
)
def test_invalid_mirrors(value: object) -> None:
    with pytest.raises(ValueError, match="expected a list of addresses"):
        config.mirrors(value)


def test_show_reports_a_store_that_nobody_has_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "none.toml").touch()
    command = ["--config", str(tmp_path / "none.toml"), "config", "show"]
    assert json.loads(run(*command, "--json").stdout)["settings"][0]["value"] is None
    assert run(*command).stdout.decode().splitlines()[0].split() == [
        "store", "(found", "automatically)", "default",
    ]  # fmt: skip


def test_check_reports_a_bad_one_and_exits_with_2(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('stale_after = "3d"\n')
    done = run("--config", str(file), "config", "check")
    assert (done.returncode, done.stdout.decode()) == (0, f"{file}: valid\n")
    assert run("-q", "--config", str(file), "config", "check").stdout == b""
    as_json = json.loads(run("--config", str(file), "--json", "config", "check").stdout)
    assert as_json == {"schema": "ollama-watch/config-check/1", "file": str(file), "sound": True}
    for text, env, named in (
        ('stale_after = "soon"\n', {}, "stale_after"),
        ("x = 1\n", {}, "x"),
        ("", {"OLLAMA_WATCH_CLEAN": "perhaps"}, "OLLAMA_WATCH_CLEAN"),
    ):
        file.write_text(text)
        done = run("--config", str(file), "config", "check", env=env)
        assert done.returncode == 2
        assert named in done.stderr.decode()
