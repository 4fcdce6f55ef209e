"""``python -m watcher``, and the program that is installed: `cli.main`, once it is loaded."""

import contextlib
import gc
import os
import signal
import sys

_FAILED, _INTERRUPTED = 4, 130  #: those of `errors.Exit`, which is not loaded yet


def main() -> int:
    """Run the command line. An error while it is loaded is one line, too."""
    # Looking for cycles every 700 allocations costs a tenth of an audit, and of the loading.
    gc.set_threshold(50_000)
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if mine:
        signal.signal(signal.SIGINT, _end)
    try:
        from watcher import cli
    except (ImportError, MemoryError, OSError) as error:
        why = str(error) or "there is not enough memory"
        step = "raise the limits of this process, or install it again"
        _complain(f"ollama-watch can't be loaded: {why}\n  {step}")
        return _FAILED
    if mine:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return cli.main()
    except KeyboardInterrupt:
        _complain("ollama-watch: interrupted")
        return _INTERRUPTED
    finally:
        if mine:
            signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    """End at once: nothing was begun, or all is done."""
    _complain("ollama-watch: interrupted")
    os._exit(_INTERRUPTED)


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode(errors="backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
