"""URLs of sources, and which IP addresses are public."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin, urlsplit

from distributor_node.shared.domain.errors import InvalidInput
from distributor_node.shared.domain.objects import source_name

# RFC 3986 section 2: printable ASCII without some characters. All others must be percent-encoded.
_URL_TEXT = re.compile(r"[!#-;=?-\[\]_a-z~]+", re.ASCII)
_MAX_LENGTH = (
    6144  # a path of 1,024 bytes, each of them percent-encoded, its query, and what stands before them
)
_MAX_REDIRECT_LENGTH = 8192  # signed URLs of object storage are long


def parse_source_url(text: str, max_length: int = _MAX_LENGTH) -> str:
    """Check an absolute http(s) URL with a host, without credentials and fragment. Raises InvalidInput.

    Credentials are rejected because URLs appear in logs, and because the HTTP client would send them.
    """
    if len(text) > max_length or not _URL_TEXT.fullmatch(text):
        raise InvalidInput(
            f"URL: expected at most {max_length} characters, none of which has to be percent-encoded"
        )
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise InvalidInput(f"URL: expected http:// or https:// and a host, got scheme {parts.scheme!r}")
    if "@" in parts.netloc:
        raise InvalidInput("URL: expected none with credentials")
    if "#" in text:
        raise InvalidInput("URL: expected none with a fragment")
    return text


def redirect_target(url: str, location: str, *, to_other_hosts: bool = True) -> str:
    """Return the URL that a redirect of `url` leads to, checked like a source's URL, its fragment dropped.

    Raises InvalidInput, also for a target on another host if these are not allowed.
    """
    try:
        target = urljoin(url, location).partition("#")[0]
    except ValueError as error:
        raise InvalidInput(f"Location: {error}") from error
    if not location:
        raise InvalidInput("Location: expected a URL, got none")
    parse_source_url(target, _MAX_REDIRECT_LENGTH)
    if not to_other_hosts and urlsplit(target).hostname != urlsplit(url).hostname:
        raise InvalidInput("Location: expected the same host, got another one")
    return target


def names_host(text: str, *schemes: str) -> bool:
    """Whether the text is a URL with one of these schemes, a host, and no invalid port."""
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
    """Return the base, ending in `/`, of the storage node API that an object's URL (`BASE/files/ID`) belongs to.

    For other URLs, it is the root of the host.
    """
    base = url.removesuffix(f"files/{object_id}")
    if base != url and base.endswith("/"):
        return base
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}/"


def distinct_hosts(bases: Iterable[str]) -> Sequence[str]:
    """Return the first base URL of each host and port, in the given order."""
    by_host: dict[str, str] = {}
    for base in bases:
        by_host.setdefault(source_name(base), base)
    return tuple(by_host.values())


# Public IP addresses: not those of a private network, also not wrapped in another address.

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
# RFC 8215: NAT64 prefixes of a local network. RFC 4291 section 2.5.5.1: IPv4-compatible addresses, deprecated.
_NON_PUBLIC = (IPv6Network("64:ff9b:1::/48"), IPv6Network("::/96"))


def is_public(text: str) -> bool:
    """Whether the text is a global unicast address. An IPv4 address wrapped in an IPv6 address must be one too.

    A zone (`%eth0`) is ignored. Raises ValueError for text that is not an address.
    """
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
