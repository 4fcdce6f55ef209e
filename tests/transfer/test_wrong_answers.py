"""What a registry may answer in place of a range: nothing of it gets in, and it is quoted."""

from __future__ import annotations

import pytest

from watcher.demo.registry import Fault
from watcher.model import MIB
from watcher.ollama import ranges
from watcher.transfer import values as transfer
from watcher.transfer.values import Cause

from .driven import Here, wait_for, with_options

LOGIN = "<html><title>Hotel</title><body>Please   log in to our <b>network</b></body></html>"
#: From the second piece on; the first byte is asked for to find the address.
WRONG = [
    pytest.param(Fault("ignore_range"), "whole file", id="range ignored"),
    pytest.param(Fault("other_range"), "in place of", id="another range"),
    pytest.param(Fault("wrong_total"), "12,000,001 bytes, where the manifest", id="another total"),
    pytest.param(Fault("gzip"), "encoding (gzip)", id="gzip"),
    pytest.param(Fault("page", status=200, body=LOGIN), "Hotel Please log in", id="login page"),
    pytest.param(Fault("page", status=206, body=LOGIN), "without its place", id="206 of a page"),
    pytest.param(Fault("page", status=416, body="too far"), "416: too far", id="416"),
    pytest.param(Fault("page", status=502), "502: 502 Bad Gateway", id="error page"),
    pytest.param(Fault("page", status=204, body=""), "204", id="nothing"),
    pytest.param(Fault("endless", status=200, body=LOGIN), "Hotel", id="endless page"),
    pytest.param(Fault("endless", status=500, body="oh"), "500: ohoh", id="endless error"),
]


@pytest.mark.parametrize(("fault", "words"), WRONG)
def test_nothing_wrong_gets_in_and_the_error_has_its_first_words(
    here: Here, fault: Fault, words: str
) -> None:
    fault.begin = 1
    here.registry.add_fault(fault)
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=2))
    assert words in str(caught.value)
    assert caught.value.next_step
    claimed = here.believed()
    # Of the first piece, which alone is right, what had arrived when the others had no try left.
    assert not ranges.difference(claimed, ((0, 2 * MIB),))
    assert here.written() == ranges.size(claimed)
    here.check_right(claimed)
    here.registry.clear_faults()
    here.pull()


@pytest.mark.parametrize(("fault", "words"), WRONG)
def test_one_wrong_answer_costs_its_words_and_a_wait(here: Here, fault: Fault, words: str) -> None:
    fault.begin, fault.times = 1, 3
    here.registry.add_fault(fault)
    here.pull()
    assert any(words in each.reason for each in here.waits())


@pytest.mark.parametrize("status", [200, 500])
def test_of_an_endless_error_no_more_is_read_than_its_words(here: Here, status: int) -> None:
    here.registry.add_fault(Fault("endless", status=status, body="x" * 1000, begin=1, times=1))
    here.fetch(with_options(connections=1))
    # What the two kernels had in their buffers, and not what this loop would have gone on to read.
    assert here.registry.sent - here.served < 16 * MIB


def test_bytes_beyond_the_range_are_not_written(here: Here) -> None:
    here.registry.add_fault(Fault("endless", status=206, begin=1, times=2, body="no layer"))
    here.pull()


def test_a_manifest_that_is_a_login_page_is_none(here: Here) -> None:
    here.registry.add_fault(Fault("page", on="manifest", status=200, body=LOGIN))
    with pytest.raises(transfer.TransferError) as caught:
        here.fetch(with_options(tries=2))
    assert caught.value.cause is Cause.WRONG_ANSWER
    assert "Hotel Please log in" in str(caught.value)
    assert not here.registry.stats()["bytes"]


def test_a_wrong_total_at_the_address_ends_before_any_byte_of_the_layer(here: Here) -> None:
    here.registry.add_fault(Fault("wrong_total", digest=here.model.digests[0]))
    with pytest.raises(transfer.TransferError, match="12,000,001 bytes"):
        here.fetch(with_options(tries=2))
    assert here.believed() == ()


def test_a_page_in_the_middle_of_an_answer_that_was_right_is_found_by_the_hash(here: Here) -> None:
    # Nothing but the hash can tell: the head was right, and so is the length.
    content = here.registry.content(here.model.digests[0])
    content._zeros = ((5 * MIB, 5 * MIB + 3000),)
    with pytest.raises(transfer.TransferError, match="serves other bytes than its") as caught:
        here.fetch()
    assert caught.value.cause is Cause.MISMATCH
    content._zeros = ()
    here.pull()
    wait_for(lambda: True)


def test_a_byte_that_was_flipped_on_its_way_costs_the_layer_once(here: Here) -> None:
    here.registry.add_fault(Fault("flip", begin=2 * MIB, after=1000, times=1))
    here.pull()
    assert here.served == 2 * here.size + 1
    assert "checksum mismatch: 12.0 MB from the registry must be downloaded again" in here.notices()


def test_a_line_that_damages_each_answer_is_told_from_a_registry_that_is_wrong(here: Here) -> None:
    here.registry.add_fault(Fault("flip", begin=2 * MIB, end=2 * MIB + 1, after=1000))
    with pytest.raises(transfer.TransferError, match="damaged on its way, twice") as caught:
        here.fetch()
    assert caught.value.cause is Cause.MISMATCH
    assert here.served == 2 * here.size + 1
