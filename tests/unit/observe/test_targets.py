"""What a model or a digest of the command line means, and what is said where it means nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.notation import Store, digest_of
from tests.support.runs import one_run, rules
from watcher.errors import Exit, TargetError
from watcher.observe import targets
from watcher.observe.host import Host
from watcher.state import fs, memory


def alike(store: Store, *names: str) -> list[str]:
    """Orphans whose digests begin with the same four digits."""
    digests = [f"abcd{digest_of(name)[4:]}" for name in names]
    for digest in digests:
        (store.blobs / f"sha256-{digest}").write_bytes(b"x")
    return digests


def refused(store: Store, text: str) -> tuple[str, str]:
    """What is said of words that mean nothing, or too much."""
    with pytest.raises(TargetError) as told:
        targets.find([Host(str(store.path))], [text])
    assert told.value.exit_code is Exit.USAGE
    return told.value.message, told.value.next_step


@pytest.mark.parametrize(
    "text",
    ["llama3", "LLAMA3:latest", "library/llama3", "registry.ollama.ai/library/llama3:latest"],
)
def test_a_model_is_meant_as_people_write_it(models: Store, text: str) -> None:
    digest = models.model("llama3/latest")
    found = targets.find([Host(str(models.path))], [text])
    assert found == targets.Targets(frozenset({"llama3:latest"}), frozenset({digest}))


@pytest.mark.parametrize("text", ["{}", "sha256:{}", "sha256-{}", "sha256-{}-partial", "{:.12}"])
def test_a_digest_is_meant_by_its_name_and_by_its_beginning(models: Store, text: str) -> None:
    models.model()
    digest = models.broken("0:1")
    for digits in (digest, digest.upper()):
        found = targets.find([Host(str(models.path))], [text.format(digits)])
        assert found == targets.Targets(frozenset(), frozenset({digest}))


def test_nothing_named_means_all() -> None:
    assert targets.find([Host("/nowhere")], []) is None


def test_a_model_that_only_the_memory_gives_a_download(models: Store) -> None:
    digest = models.broken("0:1")
    one_run(models.host(), rules(repair=False))
    with fs.opened_folder(str(models.path)) as store:
        known = memory.load(store)
        record = replace(known.downloads[digest], models=("qwen:4b",))
        memory.save(store, replace(known, downloads={digest: record}))
    found = targets.find([Host(str(models.path))], ["qwen:4b"])
    assert found is not None
    assert found.digests == {digest}


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("lama3", "did you mean llama3:8b, llama3:latest?"),
        ("llama3:70b", "did you mean llama3:8b, llama3:latest?"),
        ("qwen:z", "did you mean qwen:4b-instruct-q8_0?"),
        ("zzzz-no-such", "it has llama3:8b, llama3:latest, qwen:4b-instruct-q8_0"),
    ],
)
def test_an_unknown_model_is_reported_with_the_nearest(models: Store, text: str, near: str) -> None:
    for name in ("llama3/latest", "llama3/8b", "qwen/4b-instruct-q8_0"):
        models.model(name)
    message, next_step = refused(models, text)
    assert message == f"neither a model nor a digest of this store: {text}"
    assert sorted(next_step.strip("?").split(", ")) == sorted(near.strip("?").split(", "))


def test_an_unknown_digest_is_reported_with_the_nearest(models: Store) -> None:
    digest = models.broken("0:1")
    slip = f"{digest[:5]}{int(digest[5] == '0')}{digest[6:12]}"
    assert refused(models, slip)[1] == f"did you mean sha256-{digest[:12]}?"


def test_a_store_without_models_explains_how_its_downloads_are_named(models: Store) -> None:
    assert "`repair MODEL`" in refused(models, "llama3")[1]


def test_fewer_than_four_digits_are_no_digest(models: Store) -> None:
    (digest,) = alike(models, "one")
    assert "neither a model nor a digest" in refused(models, digest[:3])[0]


def test_the_beginning_of_several_digests_is_reported_with_them(models: Store) -> None:
    digests = alike(models, "one", "two")
    message, next_step = refused(models, "abcd")
    assert "is the beginning of 2 digests" in message
    assert all(f"sha256-{digest[:20]}…" in message for digest in digests)
    assert " more" not in message
    assert next_step == "give more of its digits"
    alike(models, *"345678")
    assert refused(models, "abcd")[0].endswith(" and 3 more")
