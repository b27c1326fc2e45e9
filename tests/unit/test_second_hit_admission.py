"""Large objects are fetched on their second view, while the cache is under pressure."""

from __future__ import annotations

import time
from typing import Any

from distributor_node.services.api.assets.handler import AdmissionControl
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_memory import MemoryStateStore
from distributor_node.shared.domain.errors import StateStoreUnavailable
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import Usage
from distributor_node.shared.ports.state_store import IndexEntry
from distributor_node.shared.settings.model import Settings

LIMIT = 1_000_000
ONE, TWO = ObjectId("one"), ObjectId("two")


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def settings(**admission: Any) -> Settings:
    return Settings.model_validate(
        {
            "storage": {"limit": LIMIT},
            "catalog": {"kind": "manifest", "manifest": "none.yaml"},
            "admission": admission,
        }
    )


async def filled(used: int) -> MemoryStateStore:
    state = MemoryStateStore(LIMIT, StateTimeouts(), time.time)
    term = await state.lead("test", 60)
    assert term is not None
    await state.adopt(term, IndexEntry(ObjectId("there"), used, 1, 1.0))
    return state


async def test_off_by_default() -> None:
    admission = AdmissionControl(settings(), await filled(LIMIT))
    assert await admission.admits(ONE, 10**12)


async def test_a_second_hit_admits_under_pressure() -> None:
    clock = Clock()
    admission = AdmissionControl(settings(above_size=1000, window=3600), await filled(LIMIT), clock)
    assert await admission.admits(TWO, 1000)
    assert await admission.admits(TWO, None)
    assert not await admission.admits(ONE, 1001)
    clock.now += 60
    assert not await admission.admits(ONE, 1001)  # the same view
    clock.now += 300
    assert await admission.admits(ONE, 1001)
    assert not await admission.admits(TWO, 1001)
    clock.now += 4000
    assert not await admission.admits(TWO, 1001)


async def test_with_room_left_everything_is_admitted() -> None:
    clock = Clock()
    admission = AdmissionControl(settings(above_size=1000), await filled(10_000), clock)
    assert await admission.admits(ONE, 1001)


class UnreachableStore(MemoryStateStore):
    async def usage(self) -> Usage:
        raise StateStoreUnavailable("away")


async def test_with_unknown_usage_everything_is_admitted() -> None:
    admission = AdmissionControl(
        settings(above_size=1000), UnreachableStore(LIMIT, StateTimeouts(), time.time)
    )
    assert await admission.admits(ONE, 1001)
