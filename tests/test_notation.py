"""The notation shows what it made."""

from __future__ import annotations

import pytest

from .support.notation import MB, Store


@pytest.mark.parametrize(
    "parts", ["0:2 -:3 {}:1", "1:2 E:0 3:3", "-:2 -:0 -:1", "2:- 3:- 0:-", "100:3 -1:0 x:2"]
)
def test_a_store_is_shown_in_the_notation_that_made_it(models: Store, parts: str) -> None:
    assert models.shown(models.broken(parts)) == parts


def test_a_store_of_real_part_sizes_costs_only_what_is_present(models: Store) -> None:
    digest = models.broken("0:2 0:1 0:0")
    status = (models.blobs / f"sha256-{digest}-partial").stat()
    assert status.st_size == 300 * MB
    assert status.st_blocks * 512 < 4 * MB
