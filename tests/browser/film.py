"""Small films that a browser makes for itself, so that no encoder has to be installed: VP8 key frames in a WebM file.

A lossy WebP image is one VP8 key frame (RFC 9649 section 2.5), and any canvas can be read as one.
"""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Sequence

from tests.browser.chromium import Browser

WIDTH, HEIGHT = 320, 240
FRAMES_PER_SECOND = 10
_PICTURES = 20  # that differ; a film shows them again and again
_PAINT = """
(() => {
  const canvas = document.createElement("canvas");
  canvas.width = %d; canvas.height = %d;
  const context = canvas.getContext("2d", {alpha: false});
  const paint = (number) => {
    for (let x = 0; x < canvas.width; x += 4) for (let y = 0; y < canvas.height; y += 4) {
      context.fillStyle = `hsl(${(number * 36 + x + y) %% 360} 60%% ${20 + 60 * Math.random()}%%)`;
      context.fillRect(x, y, 4, 4);
    }
    return canvas.toDataURL("image/webp", 0.5).split(",")[1];
  };
  return Array.from({length: %d}, (_, number) => paint(number));
})()
"""


async def make_frames(browser: Browser) -> list[bytes]:
    """Paint pictures of noise in the browser. Returns VP8 key frames."""
    images = await browser.evaluate(_PAINT % (WIDTH, HEIGHT, _PICTURES))
    return [_key_frame(base64.b64decode(image)) for image in images]


def _key_frame(webp: bytes) -> bytes:
    """The VP8 chunk of a WebP file."""
    assert (webp[:4], webp[8:12]) == (b"RIFF", b"WEBP"), webp[:16]
    at = 12
    while at < len(webp):
        name, size = struct.unpack_from("<4sI", webp, at)
        if name == b"VP8 ":
            return webp[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    raise AssertionError(f"expected a lossy WebP image, got chunks from {webp[12:16]!r} on")


def film(frames: Sequence[bytes], seconds: int, seed: int) -> bytes:
    """A WebM file of one video track. Its end is not needed to begin. `seed`: films of different seeds differ."""
    head = _element(
        0x1A45DFA3,
        _number(0x4286, 1), _number(0x42F7, 1), _number(0x42F2, 4), _number(0x42F3, 8),
        _element(0x4282, b"webm"), _number(0x4287, 2), _number(0x4285, 2),
    )  # fmt: skip
    info = _element(
        0x1549A966,
        _number(0x2AD7B1, 1_000_000),  # times in milliseconds
        _element(0x4489, struct.pack(">d", seconds * 1000.0)),
        _element(0x4D80, b"tests"), _element(0x5741, b"tests"),
    )  # fmt: skip
    video = _element(0xE0, _number(0xB0, WIDTH), _number(0xBA, HEIGHT))
    track = _element(
        0xAE, _number(0xD7, 1), _number(0x73C5, 1), _number(0x83, 1), _element(0x86, b"V_VP8"), video
    )
    unused = _element(0xEC, random.Random(seed).randbytes(32))
    clusters = [_cluster(frames, second, seed) for second in range(seconds)]
    return head + _element(0x18538067, info, _element(0x1654AE6B, track), unused, *clusters)


def _cluster(frames: Sequence[bytes], second: int, seed: int) -> bytes:
    """One second of the film."""
    first = second * FRAMES_PER_SECOND + seed
    blocks = [
        # Track 1, milliseconds since the cluster's begin, a key frame.
        _element(0xA3, struct.pack(">BhB", 0x81, number * 1000 // FRAMES_PER_SECOND, 0x80)
                 + frames[(first + number) % len(frames)])
        for number in range(FRAMES_PER_SECOND)
    ]  # fmt: skip
    return _element(0x1F43B675, _number(0xE7, second * 1000), *blocks)


def _number(name: int, value: int) -> bytes:
    return _element(name, value.to_bytes(max(1, (value.bit_length() + 7) // 8), "big"))


def _element(name: int, *content: bytes) -> bytes:
    """An EBML element (RFC 8794), its size in eight bytes."""
    body = b"".join(content)
    return (
        name.to_bytes((name.bit_length() + 7) // 8, "big") + (len(body) | 1 << 56).to_bytes(8, "big") + body
    )
