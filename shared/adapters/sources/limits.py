"""How long a source may take, and how many answers are read at once."""

from __future__ import annotations

from dataclasses import dataclass

from shared.domain.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class SourceLimits:
    """Times in seconds of waiting for the source, `minimum_rate` in bytes a second.

    `connect_timeout` is for TCP and again for TLS, `first_byte_timeout` from the request to the end of the headers.
    A source that gives fewer than `minimum_rate * stall_timeout` bytes within any `stall_timeout` is too slow.
    `refuse_private`: one at an address that is not public counts as unreachable.
    """

    connect_timeout: float = 3.0
    first_byte_timeout: float = 5.0
    stall_timeout: float = 10.0
    minimum_rate: int = 8 * 1024
    max_connections: int = 200
    refuse_private: bool = False

    @property
    def minimum_bytes(self) -> int:
        """What must arrive within `stall_timeout`."""
        return int(self.minimum_rate * self.stall_timeout)

    def __post_init__(self) -> None:
        if min(self.connect_timeout, self.first_byte_timeout, self.stall_timeout) <= 0:
            raise ConfigurationError("a source's time limits must be above 0")
        if self.minimum_rate < 0 or self.max_connections < 1:
            raise ConfigurationError(
                "a source's minimum rate must not be negative, nor its connections below 1"
            )
