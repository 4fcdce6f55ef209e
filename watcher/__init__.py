"""ollama-watch: watches, reports and repairs the downloads of an Ollama model store.

For programs: `ModelDownloadManager` and `StoreFiles`, of `watcher.pull.manager`.
"""

# Not from typing: what comes while that loads would end in a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from watcher.pull.manager import ModelDownloadManager, StoreFiles

__version__ = "0.1.0"
__all__ = ["ModelDownloadManager", "StoreFiles", "__version__"]


def __getattr__(name: str) -> object:
    # Only who asks for it pays for what it loads.
    if name in ("ModelDownloadManager", "StoreFiles"):
        from watcher.pull import manager

        return getattr(manager, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
