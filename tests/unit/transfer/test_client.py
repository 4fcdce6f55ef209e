"""One answer as libcurl hands it over."""

from __future__ import annotations

from watcher.transfer.client import Request, _Exchange


def test_as_many_headers_as_libcurl_takes_cost_no_minute() -> None:
    found = _Exchange(None, Request(""))
    for line in (b"HTTP/1.1 100 Continue", b"Old: 1", b"HTTP/1.1 206 Partial Content"):
        found.take_header(line + b"\r\n")
    for number in range(100_000):
        found.take_header(b"%x:\r\n" % number)
    found.take_header(b"Content-Length: 1\r\n")
    assert (found.head.status, found.head.headers["content-length"]) == (206, "1")
    assert "old" not in found.head.headers
