"""JSON as Go's decoder reads it into a struct."""

from __future__ import annotations

import pytest

from watcher.ollama import gojson


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", ()),
        (b" \r\n\t{} ", ()),
        (b"null", None),
        (b"[]", []),
        (b'{"a":1}\n{"b":2}', (("a", 1),)),
        (b'{"a":1}garbage', (("a", 1),)),
        (b'{"a":1}\0\0\0', (("a", 1),)),
        (b'{"a":"\xff"}', (("a", "\N{REPLACEMENT CHARACTER}"),)),
    ],
)
def test_the_first_value_counts_and_the_rest_does_not(raw: bytes, value: object) -> None:
    assert gojson.first_value(raw) == value


@pytest.mark.parametrize(
    "raw",
    [b"", b" \n", b"\0", b"\xef\xbb\xbf{}", b"{", b'{"a":', b'{"a":1,}', b"{'a':1}", b"NaN",
     b'{"a":NaN}', b'{"a":Infinity}', b'{"a":01}', b'{"a":+1}', b'{"a":"\n"}', b"\xff{}",
     b"// x\n{}"],
)  # fmt: skip
def test_json_that_go_refuses_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        gojson.first_value(raw)


@pytest.mark.parametrize("deep", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [11_000, 1_000_000])
def test_deep_nesting_is_an_error_and_no_crash(deep: bytes, depth: int) -> None:
    with pytest.raises(ValueError):
        gojson.first_value(deep * depth)


def number(raw: bytes) -> int:
    value = gojson.fields(gojson.first_value(raw), "it", {"size": int})
    found = value.get("size", 0)
    assert isinstance(found, int)
    return found


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"{}", 0),
        (b'{"Size":null}', 0),
        (b'{"size":5}', 5),
        (b'{"SIZE":5}', 5),
        (b'{"Size":-0}', 0),
        (b'{"Size":9223372036854775807}', 2**63 - 1),
        (b'{"Size":-9223372036854775808}', -(2**63)),
        (b'{"Size":1,"Size":2}', 2),
        (b'{"Size":1,"size":2}', 2),
        (b'{"size":1,"Size":2}', 2),
        (b'{"Size":1,"size":2,"Size":3}', 3),
        (b'{"Size":7,"size":null}', 7),
        (b'{"Size":7,"Size":null}', 7),
    ],
)
def test_integers_as_go_takes_them(raw: bytes, value: int) -> None:
    assert number(raw) == value


@pytest.mark.parametrize(
    "text",
    ["1.0", "1e3", "true", '"1"', "[]", "{}", "9223372036854775808", "-9223372036854775809",
     "1e400", "9" * 5000, "18446744073709551616"],
)  # fmt: skip
@pytest.mark.parametrize("behind", ["", "x"])
def test_integers_that_go_refuses(text: str, behind: str) -> None:
    with pytest.raises(ValueError):
        number(f'{{"Size":{text}}}{behind}'.encode())


def text(raw: bytes) -> dict[str, str]:
    return gojson.fields(gojson.first_value(raw), "it", {"digest": str})


@pytest.mark.parametrize("value", ["1", "true", "[]", "{}", "1.5"])
@pytest.mark.parametrize("behind", ["", ',"digest":"a"'])
def test_strings_that_are_none(value: str, behind: str) -> None:
    with pytest.raises(ValueError, match=r"^Digest is no string$"):
        text(f'{{"Digest":{value}{behind}}}'.encode())


def test_null_and_unknown_keys_set_no_field() -> None:
    assert text(b'{"Digest":null,"x":1}') == {}
    assert text(b'{"DIGEST":"a","digest":null}') == {"digest": "a"}


@pytest.mark.parametrize("value", [b"[]", b'"x"', b"1", b"true"])
def test_only_an_object_or_null_has_fields(value: bytes) -> None:
    with pytest.raises(ValueError, match=r"^it is no object$"):
        text(value)
    assert text(b"null") == {}
