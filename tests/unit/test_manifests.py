"""Manifests: as leniently as the server reads them, and no more."""

from __future__ import annotations

import json

import pytest

from tests.support.notation import digest_of, manifest_bytes
from watcher.ollama import manifests

A, B = digest_of("a"), digest_of("b")


def named(raw: bytes) -> set[str]:
    return set(manifests.parse(raw).named)


def test_layers_and_config_are_named() -> None:
    document = json.loads(manifest_bytes({A: 5}))
    document["config"] = {"mediaType": "x", "digest": f"sha256:{B}", "size": 7}
    found, faults = manifests.parse(json.dumps(document).encode())
    assert (found, faults) == ({A: (5, True), B: (7, True)}, ())


def test_both_spellings_that_can_be_loaded_are_named() -> None:
    assert named(manifest_bytes({f"sha256:{A}": 1, f"sha256-{B}": 1})) == {A, B}


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b"null",
        b'{"layers":null}',
        b'{"layers":[]}',
        b'{"config":null}',
        b'{"config":{}}',
        b'{"schemaVersion":2,"mediaType":"x","layers":null,"config":{"digest":""}}',
        b'{"unknown":{"deep":[1,2,{"x":null}]}}',
    ],
)
def test_a_manifest_without_layers_parses_and_names_no_blob(raw: bytes) -> None:
    assert named(raw) == set()


def test_bytes_behind_the_json_and_other_cases_of_keys_are_accepted() -> None:
    raw = manifest_bytes({A: 5}).replace(b"layers", b"LAYERS").replace(b"digest", b"Digest")
    assert named(raw + b"\n}}garbage\0") == {A}


@pytest.mark.parametrize(
    ("key", "again"),
    [
        (b'"size":', b'"size":9,"size":'),
        (b'"digest":', b'"digest":"sha256:%b","digest":' % B.encode()),
        (b'"layers":', b'"layers":[{"digest":"sha256:%b"}],"layers":' % B.encode()),
        (b'"size":5', b'"size":5,"size":null'),
        (b'"size":5', b'"s\\u0069ze":5,"Size":9'),
    ],
)
def test_of_keys_that_come_twice_the_last_counts_however_it_is_read(
    key: bytes, again: bytes
) -> None:
    reference = '{"mediaType":"x","digest":"sha256:%s","size":5}'
    document = '{"schemaVersion":2,"mediaType":"x","config":%s,"layers":[%s]}'
    usual = (document % (reference % B, reference % A)).encode()
    raw = usual.replace(key, again)
    assert raw != usual
    # With something behind it a manifest is read as the server does, step by step.
    assert manifests.parse(raw) == manifests.parse(raw + b"x")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"{",
        manifest_bytes({A: 5})[:-9],
        manifest_bytes({A: 2**63}),
        manifest_bytes({A: -(2**63) - 1}),
        b'{"layers":{}}',
        b'{"layers":[1]}',
        b'{"layers":["x"]}',
        b'{"layers":[{"digest":1}]}',
        b'{"layers":[{"size":1.0}]}',
        b'{"layers":[{"size":"1"}]}',
        b'{"layers":[{"size":99999999999999999999}]}',
        b'{"layers":[{"from":1}]}',
        b'{"config":[]}',
        b'{"schemaVersion":"2"}',
        b'{"schemaVersion":2.5}',
        b'{"mediaType":1}',
        b"\xef\xbb\xbf" + manifest_bytes({A: 5}),
        b"[" * 20_000,
    ],
)
def test_a_manifest_that_the_server_rejects_does_not_parse(raw: bytes) -> None:
    with pytest.raises(ValueError):
        manifests.parse(raw)


def test_ten_thousand_layers() -> None:
    layers = {digest_of(str(at)): at for at in range(10_000)}
    assert named(manifest_bytes(layers)) == set(layers)


@pytest.mark.parametrize(
    "digest",
    [r"sha256:", rf"sha256:{A[:-1]}", rf"sha256:{A}0", rf"sha512:{A}", rf"{A}",
     rf"sha256:../{A}", r"\ud800", r"\u0000", r"\n", "\N{GRINNING FACE}"],
)  # fmt: skip
def test_an_invalid_digest_is_reported_and_names_no_blob(digest: str) -> None:
    raw = b'{"layers":[{"digest":"%s","size":1}]}' % digest.encode()
    found, (fault,) = manifests.parse(raw)
    assert not found
    assert fault.isprintable()


def test_a_negative_size_is_reported() -> None:
    assert manifests.parse(manifest_bytes({A: -1})).faults
    assert not manifests.parse(manifest_bytes({A: 0})).faults


def test_a_digest_protects_a_blob_only_as_sha256_with_a_colon() -> None:
    found, _ = manifests.parse(manifest_bytes({f"sha256:{A}": 1, f"sha256-{B}": 2}))
    assert found == {A: (1, True), B: (2, False)}
