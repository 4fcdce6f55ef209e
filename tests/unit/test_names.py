"""File and model names, as the server spells them."""

from __future__ import annotations

import os

import pytest

from watcher.ollama import names
from watcher.ollama.names import Role

D = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("name", "role", "number"),
    [
        (f"sha256-{D}", Role.BLOB, None),
        (f"sha256-{D.upper()}", Role.BLOB, None),
        (f"sha256-{D}-partial", Role.DATA, None),
        (f"sha256-{D}-partial-0", Role.SIDECAR, 0),
        (f"sha256-{D}-partial-335", Role.SIDECAR, 335),
        (f"sha256-{D}-partial-00", Role.SIDECAR, None),
        (f"sha256-{D}-partial-", Role.SIDECAR, None),
        (f"sha256-{D}-partial--1", Role.SIDECAR, None),
        (f"sha256-{D}-partial-٣", Role.SIDECAR, None),
        (f"sha256-{D}-partial-0.tmp", Role.SIDECAR, None),
        (f"sha256-{D}-partial-{'9' * 150}", Role.SIDECAR, None),
        (f"sha256-{D}-partial-x\ny", Role.SIDECAR, None),
        (f"sha256-{D}.tmp", Role.TRANSFER, None),
        (f"sha256:{D}", Role.OLD, None),
        ("sha256:", Role.OLD, None),
        ("sha256-123456789", Role.UPLOAD, None),
        ("split-copy123", Role.CREATE, None),
        ("projector-metadata1", Role.CREATE, None),
        ("compat-tensors77", Role.CREATE, None),
        ("COPY42", Role.CREATE, None),
        ("Q4_K_M3141592", Role.CREATE, None),
        ("F16123", Role.CREATE, None),
        (f"sha256-{D[:-1]}", Role.FOREIGN, None),
        (f"sha256-{D}0", Role.FOREIGN, None),
        (f"sha256-{D}\n", Role.FOREIGN, None),
        (f"sha256-{D}-partial\n", Role.FOREIGN, None),
        (f"SHA256-{D}", Role.FOREIGN, None),
        (f"sha256-{'g' * 64}", Role.FOREIGN, None),
        (f"xsha256-{D}", Role.FOREIGN, None),
        (".DS_Store", Role.FOREIGN, None),
        ("README.md", Role.FOREIGN, None),
        ("", Role.FOREIGN, None),
        ("x" * 255, Role.FOREIGN, None),
        (os.fsdecode(b"\xff\xfe"), Role.FOREIGN, None),
        ("COPY", Role.FOREIGN, None),
        ("Q4_K_M", Role.FOREIGN, None),
    ],
)
def test_a_name_is_recognized_by_its_spelling(name: str, role: Role, number: int | None) -> None:
    parsed = names.parse_blob(name)
    assert (parsed.role, parsed.number) == (role, number)


def test_the_digest_is_kept_as_it_is_spelled() -> None:
    assert names.parse_blob(f"sha256-{D.upper()}-partial-3").digest == D.upper()


def test_file_names_and_back() -> None:
    assert names.parse_blob(names.blob(D)) == (Role.BLOB, D, None)
    assert names.parse_blob(names.data(D)) == (Role.DATA, D, None)
    assert names.parse_blob(names.transfer(D)) == (Role.TRANSFER, D, None)
    assert names.parse_blob(names.sidecar(D, 12)) == (Role.SIDECAR, D, 12)
    assert names.short(D) == "sha256-0123456789ab"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("registry.ollama.ai/library/llama3/latest", "llama3:latest"),
        ("registry.ollama.ai/library/llama3/8b-q4_K_M", "llama3:8b-q4_K_M"),
        ("Registry.Ollama.AI/Library/llama3/latest", "llama3:latest"),
        ("registry.ollama.ai/me/mine/latest", "me/mine:latest"),
        ("hf.co/bartowski/Llama-3.2-1B-GGUF/Q4_K_M", "hf.co/bartowski/Llama-3.2-1B-GGUF:Q4_K_M"),
        ("localhost:5000/library/a/b", "localhost:5000/library/a:b"),
    ],
)
def test_models_are_shown_as_ollama_list_does(path: str, shown: str) -> None:
    model = names.model_from_path(tuple(path.split("/")))
    assert model is not None
    assert model.shown == shown
    assert model.path == path


@pytest.mark.parametrize(
    "path",
    ["a/b/c", "a/b/c/d/e", "a/b/c/.DS_Store", "a/b//d", "a/b/c/d\n", "a/b.c/m/t", "a/b/c/é",
     f"a/b/c/{'t' * 81}", "a/b/c/ "],
)  # fmt: skip
def test_paths_that_are_no_model(path: str) -> None:
    assert names.model_from_path(tuple(path.split("/"))) is None


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("llama3", "registry.ollama.ai/library/llama3/latest"),
        ("llama3:8b", "registry.ollama.ai/library/llama3/8b"),
        ("me/mine", "registry.ollama.ai/me/mine/latest"),
        ("hf.co/org/repo:Q4_K_M", "hf.co/org/repo/Q4_K_M"),
        ("https://hf.co/org/repo", "hf.co/org/repo/latest"),
        ("localhost:5000/me/m", "localhost:5000/me/m/latest"),
        ("localhost:5000/me/m:t", "localhost:5000/me/m/t"),
    ],
)
def test_models_as_people_write_them(text: str, path: str) -> None:
    model = names.parse_model(text)
    assert model is not None
    assert model.path == path


@pytest.mark.parametrize("text", ["", ":", "a/b/c/d", "a//b", "m:", "m\n", "../x", "a b", "/m"])
def test_an_invalid_model_name_does_not_parse(text: str) -> None:
    assert names.parse_model(text) is None


@pytest.mark.parametrize("path", ["registry.ollama.ai/library/a/b", "h.x:1/n/m/t", "r/me/m/t"])
def test_a_shown_model_name_parses_back(path: str) -> None:
    model = names.model_from_path(tuple(path.split("/")))
    assert model is not None
    assert names.parse_model(model.shown) == model


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name", "plain name"),
        ("a\nb", r"a\x0ab"),
        ("\x1b[31m", r"\x1b[31m"),
        (os.fsdecode(b"a\xffb"), r"a\xffb"),
        ("a\\b", r"a\x5cb"),
        ("é", "é"),
    ],
)
def test_printable_names_hide_nothing_and_do_nothing(name: str, shown: str) -> None:
    assert names.printable(name) == shown


def test_any_text_can_be_made_printable() -> None:
    # A lone surrogate comes out of "\ud800" in someone's JSON, not only out of a file name.
    for char in map(chr, (*range(0x300), *range(0xD7F0, 0xE010), 0x10FFFF)):
        shown = names.printable(char)
        assert shown.isprintable()
        shown.encode()


def test_log_names_are_safe_and_never_alike() -> None:
    texts = ["llama3:latest", "me/llama3:latest", "a%2Fb", "a/b", "..", ".hidden", "é", "A", "a@b"]
    made = [names.file_safe(text) for text in texts]
    assert len(set(made)) == len(texts)
    assert all("/" not in each and not each.startswith(".") and each.isascii() for each in made)
