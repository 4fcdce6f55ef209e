"""Each error of the server is told apart by what helps against it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from watcher.pull.failures import Asked, Cause, of_error

TRUTH = Path(__file__).parents[2] / "fidelity" / "truth"
#: As ``server/download.go``, ``server/images.go`` and Go's ``net`` and ``os`` word them.
TOLD = {
    Cause.NO_MODEL: (
        "pull model manifest: file does not exist",
        'pull model manifest: 404: {"errors":[{"code":"MANIFEST_UNKNOWN"}]}',
        "model 'nothing' not found",
        "pull model manifest: 410: ",
        "the server answers 404",
    ),
    Cause.NO_PERMISSION: (
        "pull model manifest: unauthorized: access denied",
        "pull model manifest: 401: ",
        "pull model manifest: 403: forbidden",
        "you need to be signed in to use this model",
        'realm host "" does not match original host "x.ai"',
        "401: ",
    ),
    Cause.STORE: (
        "open /m/blobs/sha256-3102-partial-0: permission denied",
        "mkdir /m/blobs: permission denied: ensure path elements are traversable",
        "stat /m/blobs/sha256-3102: not a directory",
        "open /m/manifests/x/library/m/1b: is a directory",
        "rename /m/blobs/sha256-31-partial /m/blobs/sha256-31: permission denied",
    ),
    Cause.DISK_FULL: (
        "write /m/blobs/sha256-3102-partial: no space left on device",
        "max retries exceeded: write /m/blobs/sha256-3102-partial: disk quota exceeded",
        "open /m/blobs/sha256-31-partial-0: no space left on device",
    ),
    Cause.READ_ONLY: (
        "mkdir /m/manifests/registry.ollama.ai: read-only file system",
        "max retries exceeded: open models/blobs/sha256-31-partial-0: read-only file system",
    ),
    Cause.FILE_TOO_LARGE: (
        "max retries exceeded: write /m/blobs/sha256-3102-partial: file too large",
        'write /it\'s: a "path"/blobs/sha256-3102-partial: file too large',
        "file too large",
        "write: file too large",
    ),
    Cause.NOT_PERMITTED: (
        "open /m/blobs/sha256-3102-partial: operation not permitted",
        "rename /m/blobs/sha256-31-partial /m/blobs/sha256-31: operation not permitted",
    ),
    Cause.DISK_FAILS: (
        "max retries exceeded: write /m/blobs/sha256-3102-partial: input/output error",
        "open /m/blobs/sha256-31-partial-4: structure needs cleaning",
        "open /m/blobs/sha256-31-partial: stale NFS file handle",
        "mkdir /m/manifests: transport endpoint is not connected",
    ),
    Cause.FILE_SYSTEM: (
        "max retries exceeded: write /m/blobs/sha256-3102-partial: invalid argument",
        "open /m/blobs/sha256-31-partial: file name too long",
    ),
    Cause.OLD_SERVER: (
        'pull model manifest: 412: {"errors":[{"message":"newer version, see 500: x"}]}',
        "max retries exceeded: status 412",
    ),
    Cause.REFUSED: (
        "pull model manifest: 400: bad request",
        "pull model manifest: 400: too many requests of 429: forbidden",
        "402: pay",
        "unexpected status code 302",
    ),
    Cause.LEGAL: ("pull model manifest: 451: ", "451: not here"),
    Cause.REALM: (
        'pull model manifest: realm host "auth.x" does not match original host "x.ai"',
        'realm host "auth.x:5" does not match original host "x.ai"',
    ),
    Cause.WRONG_LENGTH: (
        "x.ai announces 5,000,000 bytes of layer sha256-3102, but has 3, as its manifest says",
    ),
    Cause.NO_LAYER: (
        "file does not exist",
        "max retries exceeded: status 404",
        "410: ",
        "410: gone, said 404",
        "max retries exceeded: status 410",
    ),
    Cause.DAMAGED: ("416: ", "max retries exceeded: status 416"),
    Cause.BAD_ADDRESS: (
        'pull model manifest: Get "ftp://x/token": unsupported protocol scheme "ftp"',
        "http: no Location header in response",
        "maximum redirects exceeded (10) for directURL",
        'pull model manifest: Get "http://x/v2/": stopped after 10 redirects',
        'Get "https://x/": http: malformed HTTP response "\\x15"',
    ),
    Cause.PORTAL: (
        "pull model manifest: invalid character '<' looking for beginning of value",
        "pull model manifest: 511: <html>",
    ),
    Cause.PROXY: (
        'pull model manifest: Get "https://x.ai/v2/": Proxy Authentication Required',
        "pull model manifest: 407: <html>",
        'Get "https://x.ai/v2/": Forbidden',
    ),
    Cause.BAD_MANIFEST: (
        (
            "pull model manifest: json: cannot unmarshal string into Go struct field"
            " Layer.layers.size of type int64"
        ),
        "pull model manifest: invalid character 'x' looking for beginning of value",
        "pull model manifest: unexpected end of JSON input",
        "library/demo: digest is empty",
        "invalid digest format",
        "max retries exceeded: size mismatch",
    ),
    Cause.SERVER_KEY: (
        "pull model manifest: open /root/.ollama/id_ed25519: permission denied",
        "pull model manifest: open /usr/share/ollama/.ollama/id_ed25519: no such file or directory",
        "pull model manifest: ssh: no key found",
    ),
    Cause.BAD_NAME: ("invalid model name", "unqualified name: x/y/z/"),
    Cause.UNSUPPORTED: ("this model requires MLX support, but the MLX runtime is not available",),
    Cause.INSECURE: (
        'Get "https://localhost:5000/v2/": http: server gave HTTP response to HTTPS client',
    ),
    Cause.CERTIFICATE: (
        "tls: failed to verify certificate: x509: certificate signed by unknown authority",
    ),
    Cause.NO_NETWORK: (
        'manifest: Get "https://x.ai/v2/": dial tcp: lookup registry.ollama.ai: no such host',
        "pull model manifest: Get https://x/: dial tcp 1.2.3.4:443: connect: connection refused",
        "dial tcp 1.2.3.4:443: connect: network is unreachable",
        "dial tcp 1.2.3.4:443: i/o timeout",
        "dial tcp 1.2.3.4:443: connect: operation not permitted",
        'pull model manifest: Get "https://x/v2/": dial tcp [::1]:443: connect: permission denied',
        "dial tcp 1.2.3.4:443: connect: invalid argument",
        "net/http: TLS handshake timeout",
        'proxyconnect tcp: dial tcp 10.0.0.1:3128: connect: no route to host"',
    ),
    Cause.OVERLOADED: (
        "pull model manifest: 429: too many requests",
        "pull model manifest: 503: <html>Service Unavailable</html>",
        "pull model manifest: 502: ",
        "unexpected status code 500",
        "500: internal",
    ),
    Cause.RESETS: (
        "max retries exceeded: read tcp 1.0.0.1:500->1.0.0.1:443: connection reset by peer",
        "max retries exceeded: unexpected EOF",
        "max retries exceeded: EOF",
        'manifest: Get "http://localhost:5/v2/": read tcp 1->2: connection reset by peer',
        "context deadline exceeded",
        "stream error: stream ID 7; INTERNAL_ERROR; received from peer",
        "write tcp 1->2: write: broken pipe",
    ),
    Cause.OTHER_BYTES: (
        "checksum mismatch: the registry serves other bytes than its manifest names: they came …",
    ),
    Cause.MISMATCH: (
        "digest mismatch, file must be downloaded again: want sha256:31, got sha256:ae",
    ),
    Cause.BLOCKED: (
        "EOF",
        "remove /m/blobs/sha256-31-partial-1: no such file or directory",
        "open /m/blobs/sha256-31-partial-1: no such file or directory",
        "invalid character 'x' looking for beginning of value",
        "json: cannot unmarshal string into Go struct field blobDownloadPart.Size of type int64",
    ),
    Cause.CANCELLED: ("context canceled",),
    Cause.UNKNOWN: ("", "something new", "open /m/blobs/x: too many open files"),
}


@pytest.mark.parametrize(
    ("cause", "text"), [(cause, text) for cause, texts in TOLD.items() for text in texts]
)
def test_what_the_server_says(cause: Cause, text: str) -> None:
    assert of_error(text) is cause


def recorded() -> set[str]:
    """Every error that a real server has streamed."""

    def errors(found: Any) -> list[str]:
        if isinstance(found, str):
            return [found.removeprefix("error: ")] if found.startswith("error: ") else []
        inside = found.values() if isinstance(found, dict) else found
        return [
            each for one in inside if isinstance(one, dict | list | str) for each in errors(one)
        ]

    return {each for path in TRUTH.glob("*.json") for each in errors(json.loads(path.read_text()))}


def test_each_recorded_error_has_a_cause() -> None:
    found = {text: of_error(text) for text in recorded()}
    assert set(found.values()) == {Cause.RESETS, Cause.BLOCKED, Cause.MISMATCH}


@pytest.mark.parametrize("cause", Cause)
def test_each_cause_has_a_step(cause: Cause) -> None:
    assert cause.step
    assert len(cause.step) < 80


def test_what_no_retry_cures_is_distinguished_from_what_passes() -> None:
    soon = {each for each in Cause if each.passes}
    assert soon == {
        Cause.NO_NETWORK,
        Cause.OVERLOADED,
        Cause.RESETS,
        Cause.MISMATCH,
        Cause.BLOCKED,
        Cause.CANCELLED,
        Cause.SERVER_GONE,
        Cause.SILENCE,
        Cause.FAULT,
        Cause.UNKNOWN,
    }
    hourly = {each for each in Cause if each.hourly}
    assert hourly == {Cause.PORTAL, Cause.PROXY, Cause.BAD_MANIFEST}


def test_a_model_of_any_name_changes_nothing() -> None:
    """Names and digests are quoted in errors, and may look like a status."""
    assert of_error("digest mismatch, file must be downloaded again: want sha256:429 500") is (
        Cause.MISMATCH
    )
    assert of_error("open /m/500/blobs/sha256-31-partial-1: no such file or directory") is (
        Cause.BLOCKED
    )
    assert of_error(
        "max retries exceeded: read tcp 10.0.0.1:500->10.0.0.2:443: connection reset"
    ) is (Cause.RESETS)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("r refers to an unsupported protocol: ftp", Cause.BAD_ADDRESS),
        ("r refers to http, which is not encrypted", Cause.BAD_ADDRESS),
        ("localhost:5000 answers 451 for layer sha256-310123456789", Cause.LEGAL),
        ("localhost:5000 answered 404 for layer sha256-310123456789", Cause.NO_LAYER),
        ("localhost:5000 answered 410 for layer sha256-310123456789", Cause.NO_LAYER),
        ("localhost:5000 answered 401 for layer sha256-310123456789", Cause.NO_PERMISSION),
        ("localhost:5000 answered 416 for layer sha256-310123456789", Cause.DAMAGED),
        ("x.ai answered with a web page for layer sha256-310123456789", Cause.PORTAL),
        ("certificate.ai answers with a web page for layer sha256-31012345", Cause.PORTAL),
        ("10 GB are missing, and the disk has 1 GB free", Cause.DISK_FULL),
        (
            "a layer has 5.0 GB, more than this file system lets a file have",
            Cause.FILE_TOO_LARGE,
        ),
        ("a layer has 5.0 GB, and LimitFSIZE of the server 4.0 GB", Cause.FILE_TOO_LARGE),
        ("the file system of the store is mounted read-only", Cause.READ_ONLY),
        ("the server at http://127.0.0.1:11434: Connection refused", Cause.SERVER_GONE),
        ("nothing came for 30 s", Cause.SILENCE),
        ("no bytes for 30 s", Cause.SILENCE),
        ("40.0 MB were lost with a broken connection", Cause.RESETS),
        ("a broken connection lost 40.0 MB", Cause.RESETS),
        ("10 GB to download, but the disk has only 1 GB free", Cause.DISK_FULL),
        ("a layer has 5.0 GB, more than this file system allows for a file", Cause.FILE_TOO_LARGE),
        ("the file system at /mnt/x is mounted read-only", Cause.READ_ONLY),
        ("its manifest is invalid: it names no layer", Cause.BAD_MANIFEST),
    ],
)
def test_what_we_say_ourselves_is_understood_in_a_record(text: str, cause: Cause) -> None:
    assert of_error(text) is cause


def test_commands_are_quoted_on_the_store_and_for_this_user() -> None:
    asked = Asked("me/m:1b", "http://127.0.0.1:5", "/a b's $x", "--store", ("--verify",))
    told = {cause: cause.command(asked) for cause in Cause}
    for command in filter(None, told.values()):
        assert "watcher" not in command or "--store '/a b'\"'\"'s $x'" in command
        assert command.startswith("sudo ") is ("dmesg" in command and os.getuid() != 0) or (
            os.getuid() and any(each in command for each in ("repair", "reset", "verify", "lsattr"))
        )
    assert told[Cause.STORE].endswith("audit")
    again = "pull --verify --host http://127.0.0.1:5 me/m:1b"
    assert told[Cause.INTERRUPTED].endswith(again)
    assert told[Cause.INSECURE].endswith(again.replace("--verify", "--verify --insecure"))


@pytest.mark.parametrize("cause", Cause)
def test_what_is_no_server_of_this_machine_gets_no_command_for_it(cause: Cause) -> None:
    told = cause.command(Asked("m", "http://10.0.0.1:5", "/m", "--store"))
    assert not told or " pull " in told or told.endswith("ollama signin")


@pytest.mark.parametrize("cause", Cause)
def test_what_is_not_the_servers_store_is_not_looked_at_for_it(cause: Cause) -> None:
    told = cause.command(Asked("m", "", "/m", "--store", is_its=False))
    assert "/m" not in told or " pull " in told


def test_only_the_registry_of_accounts_is_signed_in_to() -> None:
    command = Cause.NO_PERMISSION.command
    assert command(Asked("me/m:1b")) == "ollama signin"
    url = "http://127.0.0.1:5"
    assert command(Asked("me/m", url)) == f"OLLAMA_HOST={url} ollama signin"
    assert command(Asked("hf.co/me/m")) == ""
