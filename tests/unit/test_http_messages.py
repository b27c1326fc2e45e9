"""Requests to sources as bytes, and the heads of their responses."""

from __future__ import annotations

import h11
import httpx
import pytest

from distributor_node.shared.adapters.sources.connections import ResponseHead, encode_request, parse_head

OK = b"HTTP/1.1 200 OK\r\n"
VALID = [
    OK + b"Content-Length: 5\r\nContent-Type:video/mp4 \r\n\r\n",
    b"HTTP/1.1 200\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 206 Partial Content\nContent-Length: 5\nX: y\n\n",
    b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n",
    OK + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\n",
    OK + b"Content-Length: 5, 5\r\n\r\n",
    OK + b"Connection: Keep-Alive, CLOSE\r\nContent-Length: 5\r\n\r\n",
    OK + b"Transfer-Encoding: Chunked\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    OK + b"X-Folded: one\r\n  two\r\n\tthree\r\nContent-Length: 0\r\n\r\n",
    OK + b"X-Empty:\r\nX-Spaces: a b\t c\r\nX-Text: \xe4\xf6\r\nContent-Length: 1\r\n\r\n",
    OK + b"\r\n",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n",
    b'HTTP/1.1 304 Not Modified\r\nETag: "a"\r\n\r\n',
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 12\r\n\r\n",
]
INVALID = [
    b"rubbish\r\n\r\n",
    b"HTTP/1.1 20 OK\r\n\r\n",
    b"HTTP/1.1 2000 OK\r\n\r\n",
    b"HTTP/1.1  200 OK\r\n\r\n",
    b"HTTP/2.0 200 OK\r\n\r\n",
    b"\r\nHTTP/1.1 200 OK\r\n\r\n",
    OK + b" X: continues nothing\r\n\r\n",
    OK + b"Content-Length : 5\r\n\r\n",
    OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
    OK + b"Content-Length: 5, 6\r\n\r\n",
    OK + b"Content-Length: -5\r\n\r\n",
    OK + b"Content-Length: +5\r\n\r\n",
    OK + b"Content-Length: 0x5\r\n\r\n",
    OK + b"Content-Length:\r\n\r\n",
    OK + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    OK + b"Transfer-Encoding: gzip\r\n\r\n",
    OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    OK + b"no colon\r\n\r\n",
    OK + b": no name\r\n\r\n",
    OK + b"X y: space in the name\r\n\r\n",
    OK + b"X: nul \0\r\n\r\n",
    OK + b"X: bare \r return\r\n\r\n",
]


def by_h11(data: bytes, method: str) -> ResponseHead:
    """What h11 reads, which was used before."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(data)
    response = connection.next_event()
    assert isinstance(response, h11.Response)
    framing, arguments = h11._connection._body_framing(method.encode(), response)
    length = arguments[0] if framing == "content-length" else None
    keep_alive = h11._connection._keep_alive(response) and framing != "http/1.0"
    return ResponseHead(
        response.status_code, response.headers.raw_items(), length, framing == "chunked", keep_alive
    )


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("data", VALID)
def test_heads_are_read_as_h11_reads_them(data: bytes, method: str) -> None:
    expected, found = by_h11(data, method), parse_head(data, method)
    assert [(name, value.lower()) for name, value in found.headers] == [
        (name, value.lower()) for name, value in expected.headers
    ]
    assert (found.status, found.length, found.chunked, found.keep_alive) == (
        expected.status,
        expected.length,
        expected.chunked,
        expected.keep_alive,
    )


@pytest.mark.parametrize("data", INVALID)
def test_other_heads_are_refused(data: bytes) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        parse_head(data, "GET")


def test_a_response_to_no_upgrade_has_no_body() -> None:
    head = parse_head(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "GET")
    assert (head.status, head.length, head.keep_alive) == (101, 0, False)


def test_a_request() -> None:
    request = httpx.Request("GET", "http://a.example:8080/x y?z=ä", headers={"Range": "bytes=0-1"})
    assert encode_request(request, b"") == (
        b"GET /x%20y?z=%C3%A4 HTTP/1.1\r\nHost: a.example:8080\r\nRange: bytes=0-1\r\n\r\n"
    )


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nX: y", "a\rb", "a\0b"])
def test_a_header_cannot_become_two(value: str) -> None:
    with pytest.raises(httpx.LocalProtocolError):
        encode_request(httpx.Request("GET", "http://a/", headers={"If-Range": value}), b"")
