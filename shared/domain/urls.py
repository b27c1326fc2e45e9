"""URLs that objects are read from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import source_name

# RFC 3986 section 2: a URL is printable ASCII without these; anything else must be percent-encoded.
_URL_TEXT = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.ASCII)
_MAX_LENGTH = 2048


def parse_source_url(text: str) -> str:
    """Check an absolute http(s) URL with a host, without credentials or fragment; raise InvalidInput otherwise.

    Credentials are refused because the URL is shown in logs, and because a client would send them.
    """
    if len(text) > _MAX_LENGTH or not _URL_TEXT.fullmatch(text):
        raise InvalidInput("malformed URL: too long, or it has characters that must be percent-encoded")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"malformed URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise InvalidInput("malformed URL: want http:// or https:// and a host")
    if "@" in parts.netloc:
        raise InvalidInput("malformed URL: it must not carry credentials")
    if "#" in text:
        raise InvalidInput("malformed URL: it must not have a fragment")
    return text


def names_host(text: str, *schemes: str) -> bool:
    """Whether it is a URL of one of these schemes, with a host (and a port that can be one, if any)."""
    try:
        parts = urlsplit(text)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def url_without_credentials(url: str) -> str:
    """Return the URL without user and password, query and fragment: fit to be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def url_origin(url: str) -> str:
    """Return scheme, host and port of a URL, such as `https://media.example:8443`, without credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def api_base_of(url: str, object_id: str) -> str:
    """The base, `/` at its end, of the storage node API that an object's URL belongs to (`BASE/files/ID`); for any
    other URL the root of its host."""
    base = url.removesuffix(f"files/{object_id}")
    if base != url and base.endswith("/"):
        return base
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/"


def distinct_hosts(bases: Iterable[str]) -> Sequence[str]:
    """The first base URL of each host and port, in their order."""
    by_host: dict[str, str] = {}
    for base in bases:
        by_host.setdefault(source_name(base), base)
    return tuple(by_host.values())


# Which IP addresses are public: neither a network's own, nor a way around that.

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address, reached by a NAT64
# RFC 8215: such prefixes of a network's own. RFC 4291 section 2.5.5.1: IPv4 addresses once written as IPv6 ones.
_NON_PUBLIC = (IPv6Network("64:ff9b:1::/48"), IPv6Network("::/96"))


def is_public(text: str) -> bool:
    """True for a global unicast address, and where an IPv4 address is wrapped in it, only if that is one too.
    ValueError for what is no address; a zone (`%eth0`) is passed over."""
    return _is_public(ip_address(text.partition("%")[0]))


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if not address.is_global or address.is_multicast:
        return (
            isinstance(address, IPv6Address)
            and address.ipv4_mapped is not None
            and _is_public(address.ipv4_mapped)
        )
    if isinstance(address, IPv4Address):
        return True
    if address.is_site_local or any(address in network for network in _NON_PUBLIC):
        return False
    wrapped = address.sixtofour
    if address in _NAT64:
        wrapped = IPv4Address(address.packed[-4:])
    return wrapped is None or _is_public(wrapped)
