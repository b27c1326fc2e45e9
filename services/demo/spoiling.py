"""Makes a right answer wrong: its status, its headers, its bytes, as the faults say. No I/O."""

from __future__ import annotations

import gzip
from email.utils import formatdate
from http import HTTPStatus

from services.demo.answers import Response, error_response
from services.demo.knobs import Fault
from services.demo.objects import BytesContent

_WRONG = bytes(value ^ 0xFF for value in range(256))
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def corrupted(response: Response, fault: Fault) -> Response:
    """The answer after the faults that change what it says; the bytes are changed by `body_chunk`."""
    if fault.redirect_to is not None:
        return Response(fault.status or 302, (("Location", fault.redirect_to),))
    if fault.status is not None:
        return error_response(fault.status, "scripted", "the demo storage node was told to fail")
    if fault.ignore_range and response.status == 206:
        kept = tuple(pair for pair in response.headers if pair[0] != "Content-Range")
        response = Response(200, kept, response.content, 0, response.content.size)
    if fault.gzip and response.length:
        packed = gzip.compress(
            response.content.read(response.offset, response.length), compresslevel=1, mtime=0
        )
        headers = (*response.headers, ("Content-Encoding", "gzip"))
        response = Response(response.status, headers, BytesContent(packed), 0, len(packed))
    return response


def render_head(response: Response, fault: Fault, keep_alive: bool) -> bytes:
    """The status line and headers, ready to send."""
    headers = {"Date": formatdate(usegmt=True), **dict(response.headers)}
    delimited = not (fault.omit_content_length or fault.endless_body)
    if delimited and response.status not in (204, 304):
        headers["Content-Length"] = str(max(0, response.length + fault.content_length_delta))
    headers["Connection"] = "keep-alive" if keep_alive else "close"
    for name, value in fault.headers:
        for known in [known for known in headers if known.lower() == name.lower()]:
            del headers[known]
        if value is not None:
            headers[name] = value
    lines = [f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def body_chunk(response: Response, fault: Fault, position: int, size: int) -> bytes:
    """Bytes of the body, right or wrong; zeros beyond its right end."""
    right = min(size, max(0, response.length - position))
    start = response.offset + position
    piece = response.content.read(start, right) if right else b""
    if fault.flip_bytes_from is not None and start + len(piece) > fault.flip_bytes_from:
        good = max(0, fault.flip_bytes_from - start)
        piece = piece[:good] + piece[good:].translate(_WRONG)
    if fault.flip_byte_at is not None and 0 <= (at := fault.flip_byte_at - start) < len(piece):
        piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
    return piece + bytes(size - len(piece)) if len(piece) < size else piece
