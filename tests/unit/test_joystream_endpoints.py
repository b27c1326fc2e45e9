"""Endpoints published on the network: which ones may be used, and where their API is."""

from __future__ import annotations

import pytest

from distributor_node.shared.adapters.catalogs.joystream.answers import api_base, is_private
from distributor_node.shared.domain.errors import InvalidInput


@pytest.mark.parametrize(
    ("endpoint", "base"),
    [
        ("https://storage.example", "https://storage.example/api/v1/"),
        ("https://storage.example/", "https://storage.example/api/v1/"),
        ("http://storage.example:3333/storage/", "http://storage.example:3333/storage/api/v1/"),
        ("https://storage.example//", "https://storage.example/api/v1/"),
        ("http://8.8.8.8:3333", "http://8.8.8.8:3333/api/v1/"),
        ("http://[2606:4700::1111]/", "http://[2606:4700::1111]/api/v1/"),
    ],
)
def test_the_base_is_the_endpoint_and_api_v1(endpoint: str, base: str) -> None:
    assert api_base(endpoint, refuse_private=True) == base


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "storage.example",
        "//storage.example/",
        "ftp://storage.example/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://user:secret@storage.example/",
        "https://storage.example/#fragment",
        "https://storage.example/?query",
        "https://storage.example/?",
        "https://storage.example/a b",
        "https://storage.example/\r\nX: y",
        "https://ex\u00e4mple/",
        "https://storage.example:99999/",
        "https://storage.example:0/",
        "https://",
        "https://[::1/",
        "https://storage.example/" + "a" * 1024,
    ],
)
def test_requests_that_are_never_sent(endpoint: str) -> None:
    with pytest.raises(InvalidInput):
        api_base(endpoint, refuse_private=False)


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "127.1", "0x7f000001", "2130706433", "017700000001", "0x7f.1", "[::1]",
    "[::]", "[fe80::1]", "[fec0::1]", "[::127.0.0.1]", "[64:ff9b::a00:1]", "[64:ff9b:1::1]", "[fc00::1]",
    "[::ffff:127.0.0.1]", "[::ffff:a00:1]", "[2002:7f00:1::]", "[ff02::1]", "localhost", "LOCALHOST",
    "localhost.", "a.localhost", "redis", "printer.local", "metadata.google.internal", "nas.lan",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_private_hosts_are_refused_on_request(host: str) -> None:
    with pytest.raises(InvalidInput):
        api_base(f"http://{host}:3333/", refuse_private=True)
    assert api_base(f"http://{host}:3333/", refuse_private=False) == f"http://{host}:3333/api/v1/"


@pytest.mark.parametrize(
    "host",
    [
        "8.8.8.8",
        "storage.example.org",
        "2606:4700::1111",
        "64:ff9b::808:808",
        "::ffff:8.8.8.8",
        "1e100.net",
        "134744072",
    ],
)
def test_public_hosts_are_not(host: str) -> None:
    assert not is_private(host)
