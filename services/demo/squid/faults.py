"""Fault injection for the test squid. By default there is no fault."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from distributor_node.services.demo.squid.sdl import GENERATIONS

NULLABLE = frozenset({"type", "operatorMetadata", "nodeEndpoint", "squidStatus"})
_NUMBERS = {"latency": 0, "status": 100, "huge": 0, "spare": 0, "outage_seconds": 0, "page_limit": 1}
_LISTS = frozenset({"poison", "missing_bags", "missing_objects", "missing_buckets", "nulls", "operations"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SquidFaults:
    """The faults of responses. Times in seconds, sizes in bytes. Raises ValueError for an invalid value."""

    latency: float = 0.0  # before the response
    hang: bool = False  # accept the query, never respond
    errors: bool = False  # a 200 with GraphQL errors, without data
    errors_beside_data: bool = False  # a 200 with GraphQL errors and all data
    status: int | None = None  # respond with this status and a short text
    redirect_to: str | None = None  # respond 302 with this Location
    garbage: bool = False  # a 200 without valid JSON
    huge: int = 0  # so many bytes of padding in the response
    missing_objects: tuple[str, ...] = ()  # not in lists, and null in queries for them
    poison: tuple[str, ...] = ()  # objects that make each query for them fail
    missing_bags: tuple[str, ...] = ()  # not in the lists of objects
    missing_buckets: tuple[str, ...] = ()  # not in the lists of buckets
    empty_lists: bool = False
    page_limit: int | None = None  # no list of objects is longer, whatever a query asks for
    ignore_id_gt: bool = False
    nulls: tuple[str, ...] = ()  # fields that are null everywhere: see NULLABLE
    schema: str = "current"  # generation of the squid: see GENERATIONS
    outage_seconds: float = (
        0.0  # with PUT /faults: refuse connections for so long, then apply the other faults
    )
    operations: tuple[str, ...] = ()  # names of the queries with faults; empty: all
    spare: int = 0  # so many of those queries succeed before the faults begin

    def __post_init__(self) -> None:
        for name, least in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in ("status", "page_limit"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
        for name in _LISTS:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name} must be a list of text, got {value!r}")
        if self.schema not in GENERATIONS:
            raise ValueError(f"schema must be one of {', '.join(GENERATIONS)}, got {self.schema!r}")
        if unknown := set(self.nulls) - NULLABLE:
            raise ValueError(
                f"nulls: expected {', '.join(sorted(NULLABLE))}, got {', '.join(sorted(unknown))}"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> SquidFaults:
        """Parse a document. Fields that are not set are off. Raises ValueError."""
        if not isinstance(document, dict):
            raise ValueError("faults: expected an object")
        if unknown := set(document) - {item.name for item in fields(cls)}:
            raise ValueError(f"faults: there is no {', '.join(sorted(map(str, unknown)))}")
        values: dict[str, Any] = {}
        for name, value in document.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)
