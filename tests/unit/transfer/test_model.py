"""A transfer where what it needs is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PULL = """
import sys
sys.modules["pycurl"] = None
from watcher.ollama import names
from watcher.transfer.model import Transfer
from watcher.transfer.values import Options, Order, TransferError
try:
    Transfer(Order(sys.argv[1], names.to_model("llama3"), ""), Options(), print).run()
except TransferError as error:
    print(error.cause, error)
"""


def test_without_libcurl_it_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PULL, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("unavailable pycurl can't be loaded"), done.stderr
    assert "python3-pycurl" in done.stdout


def test_nothing_of_it_is_loaded_by_who_only_names_it() -> None:
    code = "import sys, watcher.transfer.model; print('pycurl' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
