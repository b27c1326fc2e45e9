"""What an operator has ordered while the node runs: it stands above the settings, and outlives every process."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import Any

from shared.domain.errors import InvalidInput
from shared.domain.objects import Duty, ObjectId, parse_bucket_id

LARGEST_WORKER_ID = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Orders:
    """`version` changes with every change and is given by the state store (0: nothing was ever ordered).

    `worker_id` and `buckets` are the operator's only if `worker_ordered` and `buckets_ordered`; `buckets` None: all of
    the worker. `shutdowns` counts the orders to shut down: a process ends when it rises.
    """

    version: int = 0
    stopped: bool = False
    draining: bool = False
    worker_ordered: bool = False
    worker_id: int | None = None
    buckets_ordered: bool = False
    buckets: frozenset[str] | None = None
    shutdowns: int = 0

    def duty(self, configured: Duty) -> Duty:
        """The duty in force: what was ordered, else what is configured. All of a worker whom nobody has named is no
        duty: then the buckets are as configured."""
        worker_id = self.worker_id if self.worker_ordered else configured.worker_id
        if not self.buckets_ordered or (self.buckets is None and worker_id is None):
            return Duty(configured.bucket_ids, worker_id)
        return Duty(self.buckets, worker_id)


def encode_orders(orders: Orders) -> str:
    """JSON, without the version: that is the store's."""
    said: dict[str, Any] = {field.name: getattr(orders, field.name) for field in fields(Orders)}
    del said["version"]
    said["buckets"] = None if orders.buckets is None else sorted(orders.buckets)
    return json.dumps(said)


def decode_orders(text: str | bytes, version: int) -> Orders:
    """Read what `encode_orders` wrote; InvalidInput for anything else. Fields of later versions are passed over."""
    try:
        said = json.loads(text)
        known = {field.name: said[field.name] for field in fields(Orders) if field.name in said}
        buckets = known.get("buckets")
        orders = Orders(**{**known, "version": version})
        if buckets is not None:
            orders = replace(orders, buckets=frozenset(parse_bucket_id(bucket) for bucket in buckets))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"unreadable orders: {type(error).__name__}") from error
    flags = (orders.stopped, orders.draining, orders.worker_ordered, orders.buckets_ordered)
    numbers = (orders.shutdowns, 0 if orders.worker_id is None else orders.worker_id)
    if not all(type(flag) is bool for flag in flags) or not all(
        type(number) is int and 0 <= number <= LARGEST_WORKER_ID for number in numbers
    ):
        raise InvalidInput("unreadable orders: a field of the wrong type")
    return orders


@dataclass(frozen=True, slots=True)
class KeptOrders:
    """The copy on the volume: orders, and the pinned objects that belong to them."""

    orders: Orders
    pinned: frozenset[ObjectId] = frozenset()


def encode_kept(kept: KeptOrders) -> str:
    """The text of the file."""
    body = {
        "version": kept.orders.version,
        "orders": json.loads(encode_orders(kept.orders)),
        "pinned": sorted(kept.pinned),
    }
    return json.dumps(body, indent=1) + "\n"


def decode_kept(text: str | bytes) -> KeptOrders:
    """Read the file; InvalidInput if it is none of ours."""
    try:
        body = json.loads(text)
        pinned = frozenset(ObjectId.parse(object_id) for object_id in body["pinned"])
        return KeptOrders(decode_orders(json.dumps(body["orders"]), int(body["version"])), pinned)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"unreadable orders: {type(error).__name__}") from error
