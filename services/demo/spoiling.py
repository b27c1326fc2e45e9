"""Makes a right answer wrong: its status, its headers, its bytes, as the knobs say. No I/O."""

from __future__ import annotations

import gzip
from email.utils import formatdate
from http import HTTPStatus

from services.demo.answers import Answer, error_answer
from services.demo.knobs import Behaviour
from services.demo.objects import BytesContent

_WRONG = bytes(value ^ 0xFF for value in range(256))
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def spoiled(answer: Answer, behaviour: Behaviour) -> Answer:
    """The answer after the knobs that change what it says; the bytes are changed by `body_piece`."""
    if behaviour.redirect_to is not None:
        return Answer(behaviour.status or 302, (("Location", behaviour.redirect_to),))
    if behaviour.status is not None:
        return error_answer(behaviour.status, "scripted", "the demo storage node was told to fail")
    if behaviour.ignore_range and answer.status == 206:
        kept = tuple(pair for pair in answer.headers if pair[0] != "Content-Range")
        answer = Answer(200, kept, answer.content, 0, answer.content.size)
    if behaviour.gzip and answer.length:
        packed = gzip.compress(answer.content.read(answer.offset, answer.length), compresslevel=1, mtime=0)
        headers = (*answer.headers, ("Content-Encoding", "gzip"))
        answer = Answer(answer.status, headers, BytesContent(packed), 0, len(packed))
    return answer


def render_head(answer: Answer, behaviour: Behaviour, keep_alive: bool) -> bytes:
    """The status line and headers, ready to send."""
    headers = {"Date": formatdate(usegmt=True), **dict(answer.headers)}
    delimited = not (behaviour.omit_content_length or behaviour.endless_body)
    if delimited and answer.status not in (204, 304):
        headers["Content-Length"] = str(max(0, answer.length + behaviour.content_length_delta))
    headers["Connection"] = "keep-alive" if keep_alive else "close"
    for name, value in behaviour.headers:
        for known in [known for known in headers if known.lower() == name.lower()]:
            del headers[known]
        if value is not None:
            headers[name] = value
    lines = [f"HTTP/1.1 {answer.status} {_PHRASES.get(answer.status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def body_piece(answer: Answer, behaviour: Behaviour, position: int, size: int) -> bytes:
    """Bytes of the body, right or wrong; zeros beyond its right end."""
    right = min(size, max(0, answer.length - position))
    start = answer.offset + position
    piece = answer.content.read(start, right) if right else b""
    if behaviour.flip_bytes_from is not None and start + len(piece) > behaviour.flip_bytes_from:
        good = max(0, behaviour.flip_bytes_from - start)
        piece = piece[:good] + piece[good:].translate(_WRONG)
    if behaviour.flip_byte_at is not None and 0 <= (at := behaviour.flip_byte_at - start) < len(piece):
        piece = piece[:at] + bytes([piece[at] ^ 0xFF]) + piece[at + 1 :]
    return piece + bytes(size - len(piece)) if len(piece) < size else piece
