"""Endpoints of storage nodes, as their operators publish them: anybody's text until it is checked here."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from shared.domain.addresses import is_public
from shared.domain.errors import InvalidInput
from shared.domain.source_urls import parse_source_url

_MAX_LENGTH = 1024
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".intranet", ".corp")


def api_base(endpoint: str, *, refuse_private: bool) -> str:
    """The base of a storage node's API, with `/` at its end; InvalidInput for an endpoint that must not be asked.

    Only http and https, no credentials, query or fragment. With `refuse_private`, neither addresses that are not
    public (however they are written) nor names that only a local network knows. What a public name resolves to is
    looked at when a source is connected to.
    """
    if len(endpoint) > _MAX_LENGTH:
        raise InvalidInput("endpoint too long")
    parse_source_url(endpoint)
    parts = urlsplit(endpoint)
    if parts.query or "?" in endpoint:
        raise InvalidInput("endpoint with a query")
    if refuse_private and is_private(parts.hostname or ""):
        raise InvalidInput("endpoint at a private address")
    return f"{endpoint.rstrip('/')}/api/v1/"


def is_private(host: str) -> bool:
    """True for an address that is not public, and for names that are resolved by the local network alone."""
    name = host.rstrip(".").lower()
    try:
        return not is_public(name)
    except ValueError:
        return _is_private_name(name)


def _is_private_name(name: str) -> bool:
    try:
        # `127.1`, `0x7f000001`, `2130706433`: resolvers take them for addresses. No name is looked up here.
        packed = socket.inet_aton(name)
    except OSError:
        return "." not in name or name.endswith(_PRIVATE_NAMES)
    return not is_public(socket.inet_ntoa(packed))
