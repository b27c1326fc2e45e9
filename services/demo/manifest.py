"""Writes the demo's manifest: the objects of the media directory and the generated ones, with sizes and hashes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import base58
from blake3 import blake3

from distributor_node.services.demo.objects import MIB, Content, DemoObject, demo_objects

DEMO_DIRECTORY = Path(__file__).resolve().parents[2] / "deploy" / "demo"
DEFAULT_BASE_URL = "http://127.0.0.1:3390/api/v1/files/"
# Multihash prefix: 0x1e is BLAKE3, 0x20 the length of the digest.
_BLAKE3_256 = b"\x1e\x20"
# By (seed, size in bytes): so that a manifest is written without hashing a gigabyte. A test computes the first again.
GENERATED_HASHES = {
    (64, 64 * MIB): "gW9rQQ6MVabYN2EXArhYyxN8ycrWdPo2UrLrvFooXcaMRB",
    (1024, 1024 * MIB): "gW1aQumZE23ujB1qBoHu4vWmQakejKvLtD6kfvLBe7N7Fi",
    (900, 65_536): "gVxQ55HsuEyFzc6c6XeKJJ8R7Hxc2gTyfAnthuzJsaVEW6",
    (901, 65_536): "gW6pzUyb9F6eiE35eFHgRpu7MBuS5Rbgg9y3bCkWzBw6R6",
}


def content_hash(content: Content) -> str:
    """Return the hash in the catalog's format: base58btc of multihash(blake3-256)."""
    hasher = blake3()
    for offset in range(0, content.size, MIB):
        hasher.update(content.read(offset, MIB))
    return base58.b58encode(_BLAKE3_256 + hasher.digest()).decode("ascii")


def manifest_text(objects: Iterable[DemoObject], *base_urls: str) -> str:
    """Return the manifest as YAML. The URLs of an object are the bases, each followed by its id."""
    bases = ", ".join(f'"{base.rstrip("/")}/"' for base in base_urls)
    lines = [
        "# Written by `python -m distributor_node.services.demo.manifest`.",
        "version: 1",
        f"base_urls: [{bases}]",
        "objects:",
    ]
    for item in objects:
        lines += [f'  - id: "{item.object_id}"', f"    size: {item.size}", f'    hash: "{known_hash(item)}"']
        lines += [f"    media_type: {item.media_type}", f'    bucket: "{item.bucket}"']
        if not item.held:
            lines.append("    accepted: false")
        lines.append(f'    name: "{item.name}"')
    return "\n".join(lines) + "\n"


def known_hash(item: DemoObject) -> str:
    """Return the hash of an object from the table, or compute it."""
    seed = getattr(item.content, "seed", None)
    known = None if seed is None else GENERATED_HASHES.get((seed, item.size))
    return known or content_hash(item.content)


def write_manifest(target: Path, objects: Iterable[DemoObject], *base_urls: str) -> None:
    """Write the manifest atomically. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(target.name + ".new")
    draft.write_text(manifest_text(objects, *base_urls), encoding="utf-8")
    draft.replace(target)


def main(arguments: list[str] | None = None) -> None:
    """Run the command `python -m distributor_node.services.demo.manifest`."""
    parser = argparse.ArgumentParser(
        prog="distributor_node.services.demo.manifest", description="Write the demo's manifest."
    )
    parser.add_argument(
        "--media", type=Path, default=DEMO_DIRECTORY / "media", help="directory of <id>-<name>.<ext>"
    )
    parser.add_argument(
        "--base-url", default=DEFAULT_BASE_URL, help="object URL without the id (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="file to write; standard output without it")
    options = parser.parse_args(arguments)
    objects = demo_objects(options.media)
    if options.output is None:
        sys.stdout.write(manifest_text(objects, options.base_url))
    else:
        write_manifest(options.output, objects, options.base_url)


if __name__ == "__main__":
    main()
