"""Each error of the server is told apart by what helps against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from watcher.pull.causes import Cause, of_error

TRUTH = Path(__file__).parents[2] / "fidelity" / "truth"
#: As ``server/download.go``, ``server/images.go`` and Go's ``net`` and ``os`` word them.
TOLD = {
    Cause.NO_MODEL: (
        "pull model manifest: file does not exist",
        'pull model manifest: 404: {"errors":[{"code":"MANIFEST_UNKNOWN"}]}',
        "model 'nothing' not found",
    ),
    Cause.NO_PERMISSION: (
        "pull model manifest: unauthorized: access denied",
        "pull model manifest: 401: ",
        "pull model manifest: 403: forbidden",
        "you need to be signed in to use this model",
    ),
    Cause.STORE: (
        "open /m/blobs/sha256-3102-partial-0: permission denied",
        "mkdir /m/manifests/registry.ollama.ai: read-only file system",
        "rename /m/blobs/sha256-31-partial /m/blobs/sha256-31: permission denied",
    ),
    Cause.DISK_FULL: (
        "write /m/blobs/sha256-3102-partial: no space left on device",
        "max retries exceeded: write /m/blobs/sha256-3102-partial: disk quota exceeded",
        "open /m/blobs/sha256-31-partial-0: no space left on device",
    ),
    Cause.INSECURE: (
        "tls: failed to verify certificate: x509: certificate signed by unknown authority",
        'Get "https://localhost:5000/v2/": http: server gave HTTP response to HTTPS client',
    ),
    Cause.NO_NETWORK: (
        'manifest: Get "https://x.ai/v2/": dial tcp: lookup registry.ollama.ai: no such host',
        "pull model manifest: Get https://x/: dial tcp 1.2.3.4:443: connect: connection refused",
        "dial tcp 1.2.3.4:443: connect: network is unreachable",
        "dial tcp 1.2.3.4:443: i/o timeout",
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
    Cause.UNKNOWN: ("", "something new", "maximum redirects exceeded (10) for directURL"),
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
