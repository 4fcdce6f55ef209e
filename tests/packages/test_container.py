"""The image: its recipe, as far as that can be checked without the base image, else built."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from tests.doc_tables import ROOT
from watcher.cli import program

from .container import RECIPE, copy_sources, instructions, of

BASE = "docker.io/library/python:3.13-slim"


def test_the_image_is_labeled_and_runs_as_nobody_of_the_host() -> None:
    assert {name for name, _ in instructions()} <= {
        *("FROM", "COPY", "RUN", "LABEL", "ENV", "USER", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
    }
    assert {each.partition(" ")[0] for each in of("FROM")} == {BASE}
    (labels,) = of("LABEL")
    named = dict(each.split("=", 1) for each in shlex.split(labels))
    wanted = ("title", "description", "licenses")
    assert {*named} == {f"org.opencontainers.image.{each}" for each in wanted}
    (user,) = of("USER")
    assert "0" not in user.split(":")


def test_its_commands_are_those_of_the_program() -> None:
    (check,) = of("HEALTHCHECK")
    name, *words = json.loads(check.partition(" CMD ")[2])
    assert [json.loads(each) for each in of("ENTRYPOINT")] == [[name]] == [["ollama-watch"]]
    assert words[1:] == ["status", "--health"]
    for line in (words, *map(json.loads, of("CMD"))):
        at = program.make_context(name, list(line), resilient_parsing=True)
        inner, command, rest = program.resolve_command(at, [*at._protected_args, *at.args])
        assert command is not None, inner
        command.make_context(inner or "", rest, parent=click.Context(program))


@pytest.mark.slow("it downloads all that the program needs")
def test_its_steps_work_without_the_base_image(tmp_path: Path) -> None:
    (step,) = of("RUN")
    copy_sources(tmp_path)
    here = step.replace("/opt/", f"{tmp_path}/opt/").replace(" /src", f" {tmp_path}/src")
    subprocess.run(["sh", "-euc", here], check=True, capture_output=True)
    program = tmp_path / "opt/ollama-watch/bin/ollama-watch"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ollama-watch")


@pytest.mark.slow("it builds an image")
def test_it_builds_where_the_base_image_is() -> None:
    engine = next(filter(shutil.which, ("podman", "buildah")), None)
    if engine is None:
        pytest.skip("needs podman or buildah")
    known = [engine, "inspect", "--type", "image", BASE]
    if subprocess.run(known, capture_output=True, check=False).returncode:
        pytest.skip(f"needs the image {BASE}")
    built = [
        engine,
        "build",
        "--format",
        "docker",
        "--pull=never",
        "-t",
        "localhost/ollama-watch-test",
    ]
    subprocess.run([*built, "-f", RECIPE, ROOT], check=True, capture_output=True)
    subprocess.run([engine, "rmi", "localhost/ollama-watch-test"], check=True, capture_output=True)
