"""The squid's data: the demo's objects in bags, and the buckets that store and distribute them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distributor_node.services.demo.objects import DemoObject


@dataclass(frozen=True, slots=True)
class StorageBucket:
    """A bucket of storage nodes."""

    bucket_id: str
    endpoint: str | None  # as its operator published it; None: not published
    active: bool = True


@dataclass(frozen=True, slots=True)
class Bag:
    """Objects that are stored and distributed together, in one distribution bucket."""

    bag_id: str
    bucket_id: str
    objects: tuple[DemoObject, ...]


@dataclass(frozen=True, slots=True)
class SquidData:
    """All data. Every storage bucket has every bag."""

    bags: Mapping[str, Bag]
    storage: tuple[StorageBucket, ...]
    workers: Mapping[str, tuple[int, ...]]  # active workers, by distribution bucket
    invited: Mapping[str, tuple[int, ...]]  # workers that have not accepted yet
    bag_by_object: Mapping[str, Bag]
    objects: Mapping[str, DemoObject]

    def bag_of(self, object_id: str) -> Bag | None:
        return self.bag_by_object.get(object_id)

    def ids_of_bags(self, bag_ids: Iterable[str]) -> list[str]:
        bags = (self.bags[bag_id] for bag_id in dict.fromkeys(bag_ids) if bag_id in self.bags)
        return [item.object_id for bag in bags for item in bag.objects]

    def bags_of(self, bucket_id: str) -> list[Bag]:
        return [bag for bag in self.bags.values() if bag.bucket_id == bucket_id]


def make_squid_data(
    objects: Iterable[DemoObject],
    nodes: Sequence[str | StorageBucket],
    buckets: Iterable[str] = (),
    workers: Mapping[int, Sequence[str]] | None = None,
    bags_per_bucket: int = 1,
) -> SquidData:
    """Make the data from objects.

    `nodes`: endpoints (without `api/v1`), or whole buckets. `buckets`: in addition to those of the objects. `workers`:
    the distribution buckets that each worker operates. A bag's name is `dynamic:channel:` with the bucket's number and
    its own.
    """
    in_buckets: dict[str, list[DemoObject]] = {bucket_id: [] for bucket_id in buckets}
    for item in objects:
        in_buckets.setdefault(item.bucket, []).append(item)
    bags: dict[str, Bag] = {}
    for bucket_id, held in in_buckets.items():
        for number in range(bags_per_bucket):
            bag_id = f"dynamic:channel:{bucket_id.replace(':', '0')}{number}"
            bags[bag_id] = Bag(bag_id, bucket_id, tuple(held[number::bags_per_bucket]))
    operated = {
        bucket_id: tuple(worker for worker, operated in (workers or {}).items() if bucket_id in operated)
        for bucket_id in in_buckets
    }
    storage = tuple(
        node if isinstance(node, StorageBucket) else StorageBucket(str(number), node)
        for number, node in enumerate(nodes)
    )
    # Each bucket has an invited worker, which nodes must not treat as active.
    invited = dict.fromkeys(in_buckets, (990,))
    bag_by_object = {item.object_id: bag for bag in bags.values() for item in bag.objects}
    by_id = {item.object_id: item for bag in bags.values() for item in bag.objects}
    return SquidData(bags, storage, operated, invited, bag_by_object, by_id)
