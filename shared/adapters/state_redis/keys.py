"""The names of all keys. A prefix with a hash tag, such as `{node-1}:`, keeps them on one shard of a proxy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keys:
    """
    objects   HASH    object id → packed record (records.py)
    fetches   HASH    object id → packed fetch (records.lua)
    usage     HASH    used, reserved (bytes), serial (tokens, generations), accounted (run id of the server)
    wishes    HASH    object id → bytes wanted and until when
    leader    STRING  "token holder", runs out
    policy    HASH    inflation, position
    accesses  STREAM  batches of accesses, bounded
    failure:… STRING  reason, one per object, runs out
    orders    HASH    version, orders (JSON), what the operator has ordered
    pins      SET     objects that are never evicted to make room
    purges    HASH    object id → serial of the request
    warming   HASH    serial, warming (JSON), holder and until when (POSIX milliseconds)
    ticket:…  STRING  used once, runs out
    """

    prefix: str

    def all_for(self, object_id: str) -> tuple[str, ...]:
        """What each script is given as KEYS, in the order that records.lua expects."""
        prefix = self.prefix
        return (
            f"{prefix}objects",
            f"{prefix}fetches",
            f"{prefix}usage",
            f"{prefix}wishes",
            f"{prefix}leader",
            self.policy,
            self.accesses,
            f"{prefix}failure:{object_id}",
            self.operator_state,
            self.pins,
            self.purges,
            self.warming,
        )

    @property
    def objects(self) -> str:
        return f"{self.prefix}objects"

    @property
    def policy(self) -> str:
        return f"{self.prefix}policy"

    @property
    def accesses(self) -> str:
        return f"{self.prefix}accesses"

    @property
    def operator_state(self) -> str:
        return f"{self.prefix}orders"

    @property
    def pins(self) -> str:
        return f"{self.prefix}pins"

    @property
    def purges(self) -> str:
        return f"{self.prefix}purges"

    @property
    def warming(self) -> str:
        return f"{self.prefix}warming"

    def token_id(self, name: str) -> str:
        return f"{self.prefix}ticket:{name}"

    @property
    def channel(self) -> str:
        return f"{self.prefix}announcements"
