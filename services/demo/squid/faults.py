"""How the squid misbehaves, all of it off by default."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from distributor_node.services.demo.squid.sdl import GENERATIONS

NULLABLE = frozenset({"type", "operatorMetadata", "nodeEndpoint", "squidStatus"})
_NUMBERS = {"latency": 0, "status": 100, "huge": 0, "spare": 0, "outage_seconds": 0}
_LISTS = frozenset({"missing_bags", "missing_objects", "missing_buckets", "nulls", "operations"})


@dataclass(frozen=True, slots=True, kw_only=True)
class SquidFaults:
    """What to do to answers. Times in seconds, sizes in bytes; ValueError for a value that makes no sense."""

    latency: float = 0.0  # before the answer
    hang: bool = False  # accept the question, never answer
    errors: bool = False  # GraphQL errors in a 200 answer, no data
    errors_beside_data: bool = False  # GraphQL errors in a 200 answer, with all the data
    status: int | None = None  # answer with this status and a short text
    redirect_to: str | None = None  # answer 302 with this Location
    garbage: bool = False  # 200 with what is no JSON
    huge: int = 0  # so many bytes of padding in the answer
    missing_objects: tuple[str, ...] = ()  # not in lists, and null when asked for
    missing_bags: tuple[str, ...] = ()  # not in the list of bags' objects
    missing_buckets: tuple[str, ...] = ()  # not in the lists of buckets
    empty_lists: bool = False
    nulls: tuple[str, ...] = ()  # fields that are null wherever they occur: see NULLABLE
    schema: str = "current"  # the generation of the server: see GENERATIONS
    outage_seconds: float = (
        0.0  # by PUT /faults: refuse connections for so long, then be back with the other faults
    )
    operations: tuple[str, ...] = ()  # the faults are for questions of these names only; none: for all
    spare: int = 0  # the first so many questions of those are answered well

    def __post_init__(self) -> None:
        for name, least in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name == "status":
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
            raise ValueError(f"nulls knows {', '.join(sorted(NULLABLE))}, not {', '.join(sorted(unknown))}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: object) -> SquidFaults:
        """What is left out is off. Raises ValueError."""
        if not isinstance(document, dict):
            raise ValueError("faults are an object")
        if unknown := set(document) - {item.name for item in fields(cls)}:
            raise ValueError(f"there is no fault {', '.join(sorted(map(str, unknown)))}")
        values: dict[str, Any] = {}
        for name, value in document.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)
