"""Our command line as a process that is killed at a chosen changing call.

    python -m tests.machine.us AT WORD...

With AT 0, or more calls than are made, it comes to its end. The guard waits for no server: in a
history nobody begins a pull just then, which `tests/repair/test_races.py` is about.
"""

from __future__ import annotations

import sys

from tests.support.breaking import break_files
from watcher import cli
from watcher.decide import safety

if __name__ == "__main__":
    safety.GUARD_SECONDS = 0.0
    with open("/dev/null", "wb") as nowhere:
        break_files({"at": int(sys.argv[1]), "how": "kill"}, nowhere.fileno())
        sys.exit(cli.main(sys.argv[2:]))
