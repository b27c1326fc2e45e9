"""Connections to public addresses only, whatever a source's name resolves to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpcore

from shared.adapters.sources.network import SourceNetwork, SourceStream
from shared.domain.addresses import is_public


class PublicNetwork(SourceNetwork):
    """The address of the far end decides, once connected and before anything is sent: what a resolver says may be
    another thing the next moment, and one name may have addresses of both kinds."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> SourceStream:
        """As any network of ours does; the library's ConnectError for an address that is not public."""
        stream = await super().connect_tcp(host, port, timeout, local_address, socket_options)
        address = stream.get_extra_info("server_addr")
        if not isinstance(address, tuple) or not is_public(str(address[0])):
            await stream.aclose()
            raise httpcore.ConnectError("at a private address")
        return stream
