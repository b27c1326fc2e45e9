"""Which client a request is from."""

from __future__ import annotations

import pytest

from distributor_node.services.api.clients import ClientAddresses

PROXIES = ("10.0.0.0/8", "192.0.2.1", "2001:db8:ffff::/48")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("198.51.100.7", [], "198.51.100.7"),
        ("198.51.100.7", ["203.0.113.5"], "198.51.100.7"),  # no proxy of ours: not believed
        ("10.0.0.1", ["203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", ["6.6.6.6, 203.0.113.5"], "203.0.113.5"),  # what the client wrote itself
        ("10.0.0.1", ["6.6.6.6", "203.0.113.5, 10.2.3.4"], "203.0.113.5"),  # two proxies, two lines
        ("192.0.2.1", ["203.0.113.5:4711"], "203.0.113.5"),
        ("10.0.0.1", ["[2001:db8:1:2:3::4]:4711"], "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::9", [], "2001:db8:1:2::/64"),
        ("::ffff:10.0.0.1", ["::ffff:203.0.113.5"], "203.0.113.5"),
        ("10.0.0.1", ["unknown"], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.5, nonsense, 10.0.0.2"], "10.0.0.2"),
        ("10.0.0.1", [""], "10.0.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("", ["203.0.113.5"], "203.0.113.5"),  # a Unix socket
        ("", [], "unknown"),
        ("10.0.0.1", [",".join(["203.0.113.5"] * 1000 + ["10.0.0.2"] * 40)], "10.0.0.2"),
    ],
)
def test_the_client_is_the_first_address_that_is_no_trusted_proxy(
    peer: str, forwarded_for: list[str], client: str
) -> None:
    assert ClientAddresses(PROXIES).client_of(peer, forwarded_for) == client


def test_without_trusted_proxies_the_peer_is_the_client() -> None:
    assert ClientAddresses(()).client_of("10.0.0.1", ["203.0.113.5"]) == "10.0.0.1"
    assert ClientAddresses(()).client_of("", ["203.0.113.5"]) == "unknown"
