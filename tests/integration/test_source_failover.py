"""The failover reader returns exactly the bytes of the object, whatever single sources do."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distributor_node.services.demo.faults import Fault, Match, Rule
from distributor_node.services.demo.objects import DemoObject, GeneratedContent, bytes_object, origin_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.sources import SourceClient, SourceLimits
from distributor_node.shared.adapters.sources.client import SourceObservation
from distributor_node.shared.adapters.sources.failover import FailoverReader
from distributor_node.shared.adapters.sources.health import SourceHealthRegistry
from distributor_node.shared.domain.conditionals import Validators
from distributor_node.shared.domain.errors import (
    AllSourcesFailed,
    SourceRefused,
    SourceTooSlow,
    SourceUnreachable,
    SourceWrong,
)
from distributor_node.shared.domain.objects import ContentHash, MediaObject, ObjectId
from tests.servers.unresponsive_server import unresponsive_server
from tests.waiting import eventually

SIZE = 100_000
DATA = GeneratedContent(7, SIZE).read(0, SIZE)
HASH = ContentHash("sha256", hashlib.sha256(DATA).digest())
LIMITS = SourceLimits(connect_timeout=2, first_byte_timeout=1, stall_timeout=1, minimum_rate=1)
GONE = "http://127.0.0.1:1/api/v1/files/7"


@dataclass(frozen=True, slots=True)
class Harness:
    """Three storage nodes that hold the object, and a failover reader that reads from them."""

    nodes: Sequence[StorageNode]
    failover_reader: FailoverReader

    @property
    def sources(self) -> list[str]:
        return [node.object_url("7") for node in self.nodes]

    async def read(
        self,
        *,
        first: int = 0,
        last: int | None = None,
        size: int | None = SIZE,
        sources: Sequence[str] | None = None,
        into: bytearray | None = None,
        hashed: bool = True,
    ) -> tuple[bytes, list[str]]:
        """The bytes (as they come: `into`), and the sources that gave them, each change once."""
        received, given = bytearray() if into is None else into, list[str]()
        wanted = MediaObject(ObjectId.parse("7"), size, HASH if hashed else None)
        chosen = self.sources if sources is None else sources
        async with aclosing(self.failover_reader.stream(wanted, first, last, chosen)) as pieces:
            async for piece in pieces:
                assert piece.offset == first + len(received)
                received += piece.data
                if not given or given[-1] != piece.source:
                    given.append(piece.source)
        return bytes(received), given


async def build(stack: AsyncExitStack) -> Harness:
    nodes = [await stack.enter_async_context(StorageNode([bytes_object("7", DATA)]).run()) for _ in range(3)]
    client = await stack.enter_async_context(SourceClient(LIMITS))
    return Harness(nodes, FailoverReader(client, SourceHealthRegistry()))


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    async with AsyncExitStack() as stack:
        yield await build(stack)


async def test_the_first_source_gives_all(harness: Harness) -> None:
    assert await harness.read() == (DATA, harness.sources[:1])
    assert len(harness.nodes[1].requests) == 0


@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 99), (99_999, None), (50_000, None), (0, 99_998)])
async def test_a_range(harness: Harness, first: int, last: int | None) -> None:
    end = SIZE if last is None else last + 1
    assert (await harness.read(first=first, last=last))[0] == DATA[first:end]


@pytest.mark.parametrize(
    ("trouble", "given_before"),
    [
        (Fault(cut_after=40_000), True),
        (Fault(hang_after=40_000), True),
        (Fault(hang_before_headers=True), False),
        (Fault(status=500), False),
        (Fault(status=404), False),
        (Fault(redirect_to="http://127.0.0.1:1/"), False),
        (Fault(content_length_delta=7), False),
        (Fault(content_length_delta=7, body_delta=7), False),
        (Fault(omit_content_length=True, body_delta=-7), True),
        (Fault(gzip=True), False),
    ],
    ids=str,
)
async def test_a_failing_source_is_replaced_at_the_same_byte(
    harness: Harness, trouble: Fault, given_before: bool
) -> None:
    harness.nodes[0].faults.add(trouble)
    data, given = await harness.read()
    assert data == DATA
    assert given[-1] == harness.sources[1]
    assert (given[0] == harness.sources[0]) == given_before
    asked = harness.nodes[1].requests[0].range
    assert (asked is not None) == given_before


async def test_an_unreachable_source_is_replaced_and_asked_last_the_next_time(harness: Harness) -> None:
    sources = [GONE, *harness.sources]
    assert await harness.read(sources=sources) == (DATA, harness.sources[:1])
    assert await harness.read(sources=sources) == (DATA, harness.sources[:1])


async def test_too_many_bytes_never_make_a_complete_object(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(omit_content_length=True, body_delta=9))
    received = bytearray()
    with pytest.raises(AllSourcesFailed) as caught:
        await harness.read(into=received)
    assert len(received) < SIZE
    assert all(isinstance(error, SourceWrong) for error in caught.value.errors.values())


async def test_the_only_source_gets_a_second_attempt_after_an_abort(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=40_000), Match(first=1))
    assert (await harness.read(sources=harness.sources[:1]))[0] == DATA
    assert len(harness.nodes[0].requests) == 2


async def test_all_fail_after_at_most_two_turns_each(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(status=503))
    with pytest.raises(AllSourcesFailed) as caught:
        await harness.read(sources=[*harness.sources, GONE])
    assert [len(node.requests) for node in harness.nodes] == [2, 2, 2]
    kinds = [type(error) for error in caught.value.errors.values()]
    assert kinds == [SourceRefused, SourceRefused, SourceRefused, SourceUnreachable]
    assert not caught.value.too_slow


async def test_all_too_slow_says_so(harness: Harness) -> None:
    for node in harness.nodes:
        node.faults.add(Fault(hang_before_headers=True))
    with pytest.raises(AllSourcesFailed) as caught:
        await harness.read()
    assert caught.value.too_slow
    assert {type(error) for error in caught.value.errors.values()} == {SourceTooSlow}
    assert [len(node.requests) for node in harness.nodes] == [1, 1, 1]


async def test_a_source_with_connect_timeout_costs_that_time_once(harness: Harness) -> None:
    seen: list[SourceObservation] = []
    limits = SourceLimits(connect_timeout=0.2)
    with unresponsive_server() as (_, port):
        async with SourceClient(limits, seen.append) as client:
            stranded = Harness(harness.nodes, FailoverReader(client, SourceHealthRegistry()))
            with pytest.raises(AllSourcesFailed) as caught:
                await stranded.read(sources=[f"http://127.0.0.1:{port}/7", GONE])
    assert [type(error) for error in caught.value.errors.values()] == [SourceUnreachable] * 2
    assert [observed.source == "127.0.0.1:1" for observed in seen] == [False, True, True]


async def test_no_sources_at_all(harness: Harness) -> None:
    with pytest.raises(AllSourcesFailed, match="the object has no source") as caught:
        await harness.read(sources=[])
    assert not caught.value.too_slow


async def test_an_empty_object_needs_no_source(harness: Harness) -> None:
    assert await harness.read(size=0, sources=[]) == (b"", [])


@pytest.mark.parametrize(("first", "last"), [(0, None), (40_000, None), (0, 9), (99_990, 200_000)])
async def test_unknown_size(harness: Harness, first: int, last: int | None) -> None:
    end = SIZE if last is None else last + 1
    assert (await harness.read(size=None, first=first, last=last))[0] == DATA[first:end]


async def test_unknown_size_switches_once_a_source_has_reported_it(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=40_000))
    assert await harness.read(size=None) == (DATA, harness.sources[:2])


async def test_unknown_size_that_no_source_reports_is_not_switched(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(omit_content_length=True, hang_after=40_000))
    with pytest.raises(AllSourcesFailed):
        await harness.read(size=None)
    assert len(harness.nodes[1].requests) == 0


async def test_on_source_tells_of_each_source_before_its_bytes(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(cut_after=40_000))
    told: list[tuple[str, int]] = []
    wanted = MediaObject(ObjectId.parse("7"), SIZE, HASH)
    stream = harness.failover_reader.stream(
        wanted, 0, None, harness.sources, lambda url, answer: told.append((url, answer.first))
    )
    async with aclosing(stream) as pieces:
        async for piece in pieces:
            assert piece.source == told[-1][0]
    assert [url for url, _ in told] == harness.sources[:2]
    assert told[0][1] == 0 < told[1][1]


async def test_leaving_early_closes_the_connection(harness: Harness) -> None:
    harness.nodes[0].faults.add(Fault(bytes_per_second=50_000))
    wanted = MediaObject(ObjectId.parse("7"), SIZE, HASH)
    async with aclosing(harness.failover_reader.stream(wanted, 0, None, harness.sources)) as pieces:
        await anext(pieces)
    await harness.nodes[0].requests.wait_for(lambda log: log[0].aborted)


faults = st.one_of(
    st.just(Fault()),
    st.builds(Fault, cut_after=st.integers(0, SIZE), cut_by_reset=st.booleans()),
    st.builds(Fault, status=st.sampled_from([404, 416, 500, 503])),
    st.builds(Fault, ignore_range=st.booleans(), cut_after=st.integers(0, SIZE)),
    st.builds(Fault, omit_content_length=st.just(True), cut_after=st.integers(0, SIZE)),
    st.builds(Fault, omit_content_length=st.just(True), body_delta=st.integers(-50, 50)),
    st.builds(Fault, content_length_delta=st.integers(-9, 9), body_delta=st.integers(-9, 9)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    scripts=st.lists(st.lists(faults, max_size=3), min_size=3, max_size=3),
    first=st.integers(0, SIZE - 1),
    length=st.integers(1, SIZE),
)
def test_no_wrong_byte_in_any_interleaving(scripts: list[list[Fault]], first: int, length: int) -> None:
    """Each node misbehaves in some ways and then behaves: what comes out is right up to where it ends, and a stream
    that ends without an error is whole."""
    last = min(first + length, SIZE) - 1

    async def play() -> None:
        async with AsyncExitStack() as stack:
            harness = await build(stack)
            for node, script in zip(harness.nodes, scripts, strict=True):
                node.faults.replace(Rule(what, Match(nth=turn)) for turn, what in enumerate(script, 1))
            received = bytearray()
            whole = True
            try:
                await harness.read(first=first, last=last, into=received)
            except AllSourcesFailed:
                whole = False
            expected = DATA[first : last + 1]
            assert received == expected if whole else expected.startswith(received)

    asyncio.run(play())


# Without a content hash, bytes of two versions are never joined.

OLD, NEW = GeneratedContent(1, SIZE).read(0, SIZE), GeneratedContent(2, SIZE).read(0, SIZE)
CUT = 30_000


def put(harness: Harness, *versions: DemoObject) -> list[str]:
    """Let the first nodes hold these; the URLs of those."""
    for node, version in zip(harness.nodes, versions, strict=False):
        node.objects["7"] = version
    return harness.sources[: len(versions)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (('"v1"', 1000), ('"v2"', 1000)),
        (('W/"v1"', 1000), ('W/"v2"', 2000)),
        (('W/"v1"', 1000), ('W/"v1"', 1000)),
        (("", 1000), ("", 2000)),
        (("", 1000), ("", 1000)),
        (("", None), ("", None)),
        (("", None), ('"v2"', 2000)),
        (('"v1"', 1000), ("", None)),
    ],
)
async def test_a_replaced_object_is_never_joined_to_the_old_one(
    harness: Harness, old: tuple[str, int | None], new: tuple[str, int | None]
) -> None:
    sources = put(harness, origin_object("7", OLD, *old))
    (node, *_) = harness.nodes
    node.replacements["7"] = origin_object("7", NEW, *new)
    node.faults.add(Fault(cut_after=CUT, replaces_object=True), Match(first=1))
    received = bytearray()
    with pytest.raises(AllSourcesFailed):
        await harness.read(sources=sources, into=received, hashed=False)
    assert received == OLD[: len(received)]


async def test_an_unchanged_object_with_a_strong_tag_is_continued(harness: Harness) -> None:
    sources = put(harness, origin_object("7", OLD, '"v1"'))
    harness.nodes[0].faults.add(Fault(cut_after=CUT), Match(first=1))
    assert (await harness.read(sources=sources, hashed=False))[0] == OLD
    resumed = harness.nodes[0].requests[1]
    assert resumed.headers["if-range"] == '"v1"'
    assert resumed.status == 206


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
async def test_an_unchanged_object_without_a_strong_tag_is_not_continued(harness: Harness, etag: str) -> None:
    """Without a validator it cannot be told from a changed one."""
    sources = put(harness, origin_object("7", OLD, etag, 1000))
    harness.nodes[0].faults.add(Fault(cut_after=CUT), Match(first=1))
    received = bytearray()
    with pytest.raises(AllSourcesFailed):
        await harness.read(sources=sources, into=received, hashed=False)
    assert len(harness.nodes[0].requests) == 1


@pytest.mark.parametrize(
    ("first", "second"), [('"a"', '"b"'), ('"a"', ""), ("", '"b"'), ("", ""), ('W/"a"', 'W/"a"')]
)
async def test_mirrors_are_joined_only_by_one_strong_tag(harness: Harness, first: str, second: str) -> None:
    sources = put(harness, origin_object("7", OLD, first), origin_object("7", NEW, second))
    for node in harness.nodes[:2]:
        node.faults.add(Fault(cut_after=CUT), Match(first=1))
    received = bytearray()
    with suppress(AllSourcesFailed):
        await harness.read(sources=sources, into=received, hashed=False)
    assert received in (OLD[: len(received)], NEW[: len(received)])
    assert len(received) in (CUT, SIZE)


async def test_mirrors_with_one_strong_tag_are_joined(harness: Harness) -> None:
    sources = put(harness, origin_object("7", OLD, '"a"'), origin_object("7", OLD, '"a"'))
    for node in harness.nodes[:2]:
        node.faults.add(Fault(cut_after=CUT), Match(first=1))
    received, given = await harness.read(sources=sources, hashed=False)
    assert received == OLD
    assert len(given) > 1


async def test_a_mirror_that_failed_before_its_first_byte_decides_nothing(harness: Harness) -> None:
    sources = put(harness, origin_object("7", OLD, '"a"'), origin_object("7", NEW, '"b"'))
    harness.nodes[0].faults.add(Fault(cut_after=0))
    assert (await harness.read(sources=sources, hashed=False))[0] == NEW


async def test_another_version_than_the_catalogs_is_evidence_against_it(harness: Harness) -> None:
    put(harness, origin_object("7", NEW, '"v2"'))
    wanted = MediaObject(ObjectId.parse("7"), SIZE, validators=Validators('"v1"'))
    stream = harness.failover_reader.stream(wanted, 0, None, harness.sources[:1])
    with pytest.raises(AllSourcesFailed) as failure:
        await anext(stream)
    assert failure.value.contradicts_catalog
    assert not failure.value.contradicts_size


@pytest.mark.parametrize(
    ("fault", "contradicts", "of_size"),
    [
        (Fault(status=404), True, False),
        (Fault(status=403), True, False),
        (Fault(status=451), True, False),
        (Fault(content_length_delta=5, body_delta=5), True, True),
        (Fault(status=500), False, False),
        (Fault(cut_after=0), False, False),
    ],
)
async def test_what_contradicts_the_catalog(
    harness: Harness, fault: Fault, *, contradicts: bool, of_size: bool
) -> None:
    for node in harness.nodes:
        node.faults.add(fault)
    with pytest.raises(AllSourcesFailed) as failure:
        await harness.read(hashed=False)
    assert (failure.value.contradicts_catalog, failure.value.contradicts_size) == (contradicts, of_size)


async def test_that_an_object_is_empty_is_confirmed_by_a_source(harness: Harness) -> None:
    with pytest.raises(AllSourcesFailed) as failure:
        await harness.read(size=0, hashed=False)
    assert failure.value.contradicts_size
    put(harness, origin_object("7", b""))
    assert (await harness.read(size=0, sources=harness.sources[:1], hashed=False))[0] == b""


class TestRates:
    """Two sources that send the object right, at different rates."""

    async def test_a_slow_source_is_replaced_at_the_same_byte(self, harness: Harness) -> None:
        """At its own rate it would take more than a minute."""
        harness.nodes[0].faults.add(Fault(bytes_per_second=1_500))
        received, given = await harness.read(sources=harness.sources[:2])
        assert received == DATA
        assert given == harness.sources[:2]
        [request] = harness.nodes[1].requests
        assert request.range is not None
        assert not request.range.startswith("bytes=0-")
        # The next object is asked of the other one first.
        received, given = await harness.read(sources=harness.sources[:2])
        assert given == [harness.sources[1]]

    async def test_where_all_are_slow_each_has_two_turns_at_most(self, harness: Harness) -> None:
        for node in harness.nodes[:2]:
            node.faults.add(Fault(bytes_per_second=12_000))
        received, given = await harness.read(sources=harness.sources[:2])
        assert received == DATA
        assert len(given) <= 4

    async def test_a_slow_source_is_asked_again_when_the_fast_one_fails(self, harness: Harness) -> None:
        harness.nodes[0].faults.add(Fault(bytes_per_second=8_000))
        harness.nodes[1].faults.add(Fault(cut_after=10_000))
        received, given = await harness.read(sources=harness.sources[:2])
        assert received == DATA
        assert given[:2] == harness.sources[:2]

    async def test_a_single_source_is_left_alone(self, harness: Harness) -> None:
        harness.nodes[0].faults.add(Fault(bytes_per_second=20_000))
        received, given = await harness.read(sources=harness.sources[:1])
        assert (received, given) == (DATA, harness.sources[:1])
        assert len(harness.nodes[0].requests) == 1


class TestPauses:
    """A reader that does not read for a while."""

    async def read_with_a_pause(self, harness: Harness, seconds: float) -> tuple[bytes, list[str]]:
        wanted = MediaObject(ObjectId.parse("7"), SIZE, HASH)
        received, given = bytearray(), list[str]()
        async with aclosing(harness.failover_reader.stream(wanted, 0, None, harness.sources)) as pieces:
            async for piece in pieces:
                if not received:
                    await asyncio.sleep(seconds)
                received += piece.data
                given.append(piece.source)
        return bytes(received), list(dict.fromkeys(given))

    @pytest.mark.parametrize("reset", [True, False])
    async def test_a_source_that_closes_during_one_is_asked_again(
        self, harness: Harness, reset: bool
    ) -> None:
        harness.nodes[0].faults.add(
            Fault(bytes_per_second=100_000, cut_after=50_000, cut_by_reset=reset), Match(first=1)
        )
        assert await self.read_with_a_pause(harness, 0.8) == (DATA, harness.sources[:1])
        first, second = harness.nodes[0].requests
        assert first.range is None
        assert second.range is not None
        assert not harness.failover_reader.health.is_penalised(harness.sources[0])

    async def test_one_that_closes_while_it_is_read_is_blamed(self, harness: Harness) -> None:
        harness.nodes[0].faults.add(Fault(bytes_per_second=1_000_000, cut_after=50_000))
        assert await self.read_with_a_pause(harness, 0.0) == (DATA, harness.sources[:2])
        assert harness.failover_reader.health.is_penalised(harness.sources[0])

    @pytest.mark.parametrize("late_by", [0.0, 0.0025])
    async def test_what_was_buffered_in_a_pause_is_no_rate(self, harness: Harness, late_by: float) -> None:
        """`late_by`: seconds between any two looks at the clock, as in a process that waits for a CPU."""
        node, looks = harness.nodes[0], count()
        node.faults.add(Fault(bytes_per_second=40_000))

        def clock() -> float:
            return time.monotonic() + next(looks) * late_by

        wanted = MediaObject(ObjectId.parse("7"), SIZE, HASH)
        async with SourceClient(LIMITS) as client:
            reader = FailoverReader(client, SourceHealthRegistry(), clock)
            async with aclosing(reader.stream(wanted, 0, None, harness.sources[:1])) as pieces:
                async for piece in pieces:
                    if piece.offset == 0:
                        await eventually(lambda: node.requests[0].bytes_sent >= 32_000)
        rate = reader.health.rate_of(harness.sources[0])
        assert rate is not None
        assert rate <= 50_000
