"""Decoding of chunked bodies (RFC 9112 section 7.1)."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distributor_node.shared.adapters.sources.connections import ChunkedDecoder
from distributor_node.shared.adapters.sources.network import ExcessiveEvents


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=20),
    st.sampled_from([b"", b";name=value", b" ; a", b";" + b"x" * 300]),
    st.sampled_from([b"", b"Trailer: 1\r\n"]),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n"]),
    st.integers(1, 400),
)
def test_content_is_the_same_however_it_arrives(
    chunks: list[bytes], extension: bytes, trailer: bytes, rest: bytes, step: int
) -> None:
    wire = b"".join(b"%X%b\r\n%b\r\n" % (len(chunk), extension, chunk) for chunk in chunks)
    wire += b"0\r\n" + trailer + b"\r\n" + rest
    decoder, content = ChunkedDecoder(), b""
    position = 0
    while not decoder.complete:
        content += decoder.feed(wire[position : position + step])
        position += step
    assert content == b"".join(chunks)
    assert decoder.rest + wire[position:] == rest


@pytest.mark.parametrize(
    "wire",
    [b"0x5\r\nhello", b" 5\r\nhello", b"-5\r\n", b"\r\n", b"5\r\nhelloX\r\n", b"5_0\r\n", b"1" * 5000],
)
def test_malformed_chunks(wire: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError, match="chunked body"):
        ChunkedDecoder().feed(wire)


@pytest.mark.parametrize("wire", [b"1\r\nx\r\n", b"10\r\n0123456789abcdef\r\n"])
def test_a_body_in_tiny_chunks_is_refused_early(wire: bytes) -> None:
    with pytest.raises(ExcessiveEvents, match="64 bytes or more per chunk"):
        ChunkedDecoder().feed(wire * 100_000)


def test_trailers_without_end_are_refused() -> None:
    with pytest.raises(ExcessiveEvents):
        ChunkedDecoder().feed(b"0\r\n" + b"a:b\r\n" * 100_000)
