"""The least that any audit must do: list and stat blobs/, read the manifests, compare digests.

The measure of an audit's speed. It imports nothing of the project and keeps nothing.
"""

from __future__ import annotations

import os
import sys

import orjson


def main(store: str) -> None:
    """Print how many blobs are named by a manifest, and the bytes of all."""
    named: set[str] = set()
    for folder, _, tags in os.walk(os.path.join(store, "manifests")):
        for tag in tags:
            with open(os.path.join(folder, tag), "rb") as file:
                manifest = orjson.loads(file.read())
            named.add(manifest["config"]["digest"])
            named.update(layer["digest"] for layer in manifest["layers"])
    found = size = 0
    with os.scandir(os.path.join(store, "blobs")) as listing:
        for item in listing:
            size += item.stat(follow_symlinks=False).st_size
            found += item.name.replace("-", ":", 1) in named
    sys.stdout.write(f"{found} {size}\n")


if __name__ == "__main__":
    main(sys.argv[1])
