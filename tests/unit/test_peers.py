"""Rendezvous hashing, the order of peers, their liveness, hot objects, signatures, and the settings of a fleet."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distributor_node.shared.adapters.peers import CopyOffers, Peers
from distributor_node.shared.adapters.sources.connections import SourceLimits
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.objects import ContentHash, ObjectId, StoredRecord
from distributor_node.shared.domain.peers import (
    HOP,
    HOP_COPY,
    HOP_TOLERANCE,
    FleetRules,
    HotObjects,
    PeerLiveness,
    PeerRequest,
    PeerUse,
    Ring,
    peer_requests,
    sign_hop,
    verify_hop,
)
from distributor_node.shared.settings.peers import PeerSettings
from tests.waiting import eventually

OBJECTS = [str(number) for number in range(2000)]
A, B, C, D = (f"http://cell-{letter}:3334" for letter in "abcd")
NAMES = st.lists(st.integers(0, 99), min_size=2, max_size=12, unique=True).map(
    lambda numbers: [f"http://node-{number}" for number in numbers]
)


def equal(*names: str) -> Ring:
    return Ring(dict.fromkeys(names, 1.0))


@given(NAMES, st.text(min_size=1, max_size=30))
def test_without_one_node_the_order_of_the_others_stays(names: list[str], object_id: str) -> None:
    ranked = equal(*names).ranked(object_id)
    assert sorted(ranked) == sorted(names)
    assert ranked[0] == equal(*names).home(object_id)
    for gone in names:
        left = equal(*(name for name in names if name != gone)).ranked(object_id)
        assert left == tuple(name for name in ranked if name != gone)


@given(NAMES, st.integers(0, 11))
def test_a_node_that_leaves_moves_its_own_objects_only(names: list[str], number: int) -> None:
    gone = names[number % len(names)]
    before, after = equal(*names), equal(*(name for name in names if name != gone))
    for object_id in OBJECTS[:100]:
        home = before.home(object_id)
        assert after.home(object_id) == home or home == gone


@pytest.mark.parametrize("count", [1, 3, 7, 15])
def test_a_node_that_joins_takes_its_share_from_all(count: int) -> None:
    names = [f"http://node-{number}" for number in range(count)]
    before, after = equal(*names), equal(*names, "http://new")
    moved = Counter(before.home(one) for one in OBJECTS if after.home(one) != before.home(one))
    assert all(after.home(one) in (before.home(one), "http://new") for one in OBJECTS)
    share = len(OBJECTS) / (count + 1)
    assert 0.7 * share < sum(moved.values()) < 1.3 * share
    assert set(moved) == set(names)


def test_the_order_of_the_list_does_not_matter_and_the_hash_is_the_same_in_every_version() -> None:
    """Nodes of different versions must agree on homes: these are literal values."""
    assert equal(C, A, B).ranked("7") == equal(A, B, C).ranked("7")
    assert [equal(A, B, C).home(str(number))[-6] for number in range(12)] == list("ccbbbccbcaac")


def test_objects_are_spread_by_weight() -> None:
    homes = Counter(Ring({A: 1.0, B: 2.0, C: 5.0}).home(one) for one in OBJECTS)
    for name, weight in ((A, 1), (B, 2), (C, 5)):
        assert homes[name] == pytest.approx(len(OBJECTS) * weight / 8, rel=0.2)


def test_a_heavier_node_only_gains_objects() -> None:
    before, after = Ring({A: 1.0, B: 1.0, C: 1.0}), Ring({A: 1.0, B: 1.0, C: 1.5})
    assert all(after.home(one) in (before.home(one), C) for one in OBJECTS)


@pytest.mark.parametrize(
    ("own", "ranked", "former", "use", "expected"),
    [
        (A, (A, B, C), None, PeerUse.FETCH, []),
        (A, (A, B, C), B, PeerUse.FETCH, [(B, True)]),
        (A, (B, C, A), None, PeerUse.FETCH, [(B, False), (C, True)]),
        (A, (B, A, C), None, PeerUse.FETCH, [(B, False)]),
        (A, (B, C, A), C, PeerUse.FETCH, [(B, False), (C, True)]),
        (A, (B, A, C), C, PeerUse.FETCH, [(B, False), (C, True)]),
        (A, (B, C, A), D, PeerUse.FETCH, [(B, False), (C, True)]),
        (A, (B, C, A), None, PeerUse.CACHED, []),
        (A, (A, B, C), B, PeerUse.CACHED, [(B, True)]),
        (A, (B, C, A), C, PeerUse.NONE, []),
        (A, (A,), None, PeerUse.FETCH, []),
        (A, (B, A, C), C, PeerUse.COPY, [(B, True)]),
        (A, (A, B, C), B, PeerUse.COPY, []),
    ],
)
def test_which_peers_are_asked(
    own: str, ranked: tuple[str, ...], former: str | None, use: PeerUse, expected: list[tuple[str, bool]]
) -> None:
    assert peer_requests(own, ranked, former, use) == tuple(PeerRequest(*each) for each in expected)


@given(
    NAMES.flatmap(lambda names: st.tuples(st.permutations(names), st.sampled_from(names))),
    st.sampled_from(PeerUse),
    st.integers(0, 11),
)
def test_on_behalf_of_a_peer_no_node_is_asked_to_fetch(
    fleet: tuple[list[str], str], use: PeerUse, former: int
) -> None:
    """So a request passes two nodes at most, whatever each of them takes for the members."""
    ranked, own = fleet
    requests = peer_requests(own, ranked, ranked[former % len(ranked)], use)
    fetching = [request for request in requests if not request.only_if_cached]
    assert len(fetching) <= (1 if use is PeerUse.FETCH else 0)
    assert own not in {request.base for request in requests}
    assert len({request.base for request in requests}) == len(requests) <= 3


# Liveness


def run(peer: PeerLiveness, probes: str, at: float = 0.0) -> str:
    """`+` an answered probe, `-` a failed one, one each second. Returns `1` or `0` after each: alive or not."""
    states = ""
    for number, probe in enumerate(probes):
        peer.record_probe(probe == "+", at + number)
        states += "1" if peer.live else "0"
    return states


def test_one_lost_probe_changes_nothing() -> None:
    assert run(PeerLiveness(), "+-+--+--+") == "111111111"


def test_three_failures_and_three_answers() -> None:
    assert run(PeerLiveness(), "---++-+++") == "110000001"


def test_a_flapping_peer_stays_away_longer_each_time() -> None:
    peer, away = PeerLiveness(), []
    for begin in range(0, 500, 100):
        run(peer, "---", begin)
        answers = 0
        while not peer.live:
            answers += 1
            peer.record_probe(True, begin + 3 + answers)
        away.append(answers)
    assert away == [3, 6, 12, 24, 48]
    run(peer, "---", 510)
    assert run(peer, "+" * 200, 513).index("1") == 95  # no longer than this


def test_after_a_calm_time_a_peer_returns_fast_again() -> None:
    peer = PeerLiveness()
    run(peer, "---+++---++++++")
    assert peer.live
    peer.record_probe(True, 5000)
    assert run(peer, "---+++", 5001) == "110001"


# Hot objects


def test_an_object_is_hot_from_so_many_views_and_cools_down() -> None:
    hot = HotObjects(4.0, 60.0)
    assert [hot.count("1", 10, 1.0, 1, 3, 0.0) for _ in range(4)] == [False, False, False, True]
    assert not hot.count("2", 10, 1.0, 1, 3, 0.0)
    assert not hot.count("1", 10, 1.0, 1, 3, 240.0)  # 4 views have become a quarter of one


def test_ranges_count_as_their_share_of_a_view() -> None:
    hot = HotObjects(4.0, 60.0)
    assert [hot.count("1", 10, 0.5, 1, 3, 0.0) for _ in range(8)] == [False] * 7 + [True]


def test_nodes_far_down_the_order_keep_only_what_is_much_hotter() -> None:
    hot = HotObjects(4.0, 60.0)
    assert [hot.count("1", 10, 1.0, 3, 9, 0.0) for _ in range(16)] == [False] * 15 + [True]


def test_an_object_is_not_hot_that_is_a_small_part_of_what_is_passed_on() -> None:
    """On a busy node many objects have some views a minute. To keep them all would be to keep everything twice."""
    hot = HotObjects(4.0, 60.0)
    for number in range(1000):
        hot.count(f"other-{number}", 10, 1.0, 1, 3, 0.0)
    assert not any(hot.count("1", 10, 1.0, 1, 3, 0.0) for _ in range(33))
    assert any(hot.count("1", 10, 1.0, 1, 3, 0.0) for _ in range(3))
    for number in range(1000):
        hot.count(f"large-{number}", 10_000, 1.0, 1, 3, 0.0)
    assert not hot.count("1", 10, 1.0, 1, 3, 0.0)


# Signatures

SECRET, PATH = b"the-secret-of-the-fleet", "/api/v1/assets/7"


def signed(target: str = A, hop: str = HOP, at: float = 1000.0) -> str:
    return sign_hop(SECRET, target, PATH, hop, at)


def kind(value: str | None, own: str = A, hop: str = HOP, now: float = 1000.0, path: str = PATH) -> str:
    return verify_hop(SECRET, own, path, hop, value, now)


def former(path: str = PATH, at: int = 1000) -> str:
    """As the release before signs."""
    mac = hmac.new(SECRET, f"{path}\n{at}".encode(), hashlib.sha256)
    return f"{at}:{mac.hexdigest()}"


def test_a_signed_request_is_a_peers() -> None:
    value = signed(at=1000.9)
    assert kind(value, now=1000.0 + HOP_TOLERANCE) == "peer"
    assert kind(value, now=1000.0 - HOP_TOLERANCE) == "peer"
    assert kind(signed(hop=HOP_COPY), hop=HOP_COPY) == "peer"


@pytest.mark.parametrize(
    ("path", "now", "changed"),
    [
        ("/api/v1/assets/8", 1000.0, lambda value: value),
        (PATH, 1001.0 + HOP_TOLERANCE, lambda value: value),
        (PATH, 999.0 - HOP_TOLERANCE, lambda value: value),
        (PATH, 1000.0, lambda value: value.replace("1000:", "1001:")),
        (PATH, 1000.0, lambda value: value[:-1]),
        (PATH, 1000.0, lambda value: value.upper()),
        (PATH, 1000.0, lambda _: "1000:"),
        (PATH, 1000.0, lambda _: "2:1000:"),
        (PATH, 1000.0, lambda _: "2:١٠٠٠:é"),
        (PATH, 1000.0, lambda _: "١٠٠٠:é"),
        (PATH, 1000.0, lambda _: "9" * 5000),
        (PATH, 1000.0, lambda _: None),
    ],
)
@pytest.mark.parametrize("sign", [signed, former])
def test_any_other_is_a_strangers(
    path: str, now: float, changed: Callable[[str], str | None], sign: Callable[[], str]
) -> None:
    assert kind(sign()) == "peer"
    assert kind(changed(sign()), now=now, path=path) == "stranger"
    assert verify_hop(b"another-secret-of-a-fleet", A, PATH, HOP, sign(), 1000.0) == "stranger"


def test_a_request_that_is_repeated_at_another_node_is_a_strangers() -> None:
    assert kind(signed(target=A), own=B) == "stranger"


def test_a_request_for_an_object_cannot_be_made_an_offer() -> None:
    assert kind(signed(), hop=HOP_COPY) == "stranger"
    assert kind(former(), hop=HOP_COPY) == "stranger"


def test_a_signature_cannot_be_taken_for_one_of_the_former_release() -> None:
    """Else a request could be repeated at another node without its form."""
    value = signed(target=A)
    _, _, without_form = value.partition(":")
    assert kind(without_form, own=B) == kind(without_form, own=A) == "stranger"


def test_without_a_secret_each_request_is_a_peers() -> None:
    assert verify_hop(None, A, PATH, HOP, None, 0.0) == "peer"


# What this node asks for, with a clock


def fleet(own: str = A, *, handover: float = 100.0, now: list[float], **more: Any) -> Peers:
    rules = FleetRules(own=own, urls=(A, B, C), handover=handover, **more)
    return Peers(rules, SourceLimits(), lambda url: url.startswith(D), clock=lambda: now[0])


def homed(name: str, *names: str) -> list[ObjectId]:
    ring = equal(*names)
    return [ObjectId.parse(one) for one in OBJECTS if ring.home(one) == name]


def test_small_objects_and_own_ones_are_kept_and_large_ones_once_they_are_hot() -> None:
    peers = fleet(now=[0.0], keep_below=100, hot_views=2)
    peers._set_members((A, B, C))
    (own, *_), (other, *_) = homed(A, A, B, C), homed(B, A, B, C)
    assert peers.keeps(own, 10**9, 1.0)
    assert peers.keeps(other, 100, 1.0)
    assert not peers.keeps(other, 101, 1.0)
    assert peers.keeps(other, 101, 1.0)
    assert not peers.keeps(homed(C, A, B, C)[0], None, 1.0)


def test_after_a_node_has_joined_the_former_home_is_asked_for_a_while() -> None:
    now = [0.0]
    peers = fleet(D, now=now)
    peers._set_members((A, B, C, D))
    taken = next(one for one in homed(D, A, B, C, D) if equal(A, B, C).home(one) == B)
    (hop,) = peers.hops(taken, PeerUse.CACHED)
    assert (hop.url, hop.only_if_cached) == (f"{B}/api/v1/assets/{taken}", True)
    assert hop.headers == {"X-Distributor-Hop": "1", "Cache-Control": "only-if-cached"}
    now[0] = 101.0
    assert not peers.hops(taken, PeerUse.FETCH)


def test_a_peer_that_failed_lately_is_not_asked() -> None:
    peers = fleet(now=[0.0])
    peers._set_members((A, D))
    assert not peers.hops(homed(D, A, D)[0], PeerUse.FETCH)


def test_a_second_home_that_failed_lately_is_not_asked_either() -> None:
    peers = fleet(now=[0.0])
    peers._set_members((A, B, D))
    ring = equal(A, B, D)
    item = next(ObjectId.parse(one) for one in OBJECTS if ring.ranked(one) == (B, D, A))
    assert [hop.url for hop in peers.hops(item, PeerUse.FETCH)] == [f"{B}/api/v1/assets/{item}"]


def test_the_next_in_rank_acts_as_home_while_the_home_fails() -> None:
    peers = fleet(now=[0.0], keep_below=0)
    peers._set_members((A, B, D))
    for own_next in homed(D, A, B, D)[:50]:
        second = equal(A, B, D).ranked(own_next)[1]
        assert peers.is_home(own_next) is peers.keeps(own_next, 10**9, 0.0) is (second == A)
        fetching = [hop.url for hop in peers.hops(own_next, PeerUse.FETCH) if not hop.only_if_cached]
        assert fetching == ([] if second == A else [f"{B}/api/v1/assets/{own_next}"])


async def offered(
    peers: Peers, now: list[float], sizes: dict[ObjectId, int], *steps: Callable[[CopyOffers], None]
) -> list[tuple[str, ObjectId]]:
    """Which offers were made, to whom, after these steps."""
    made: list[tuple[str, ObjectId]] = []

    async def offer(peer: str, object_id: ObjectId) -> bool:
        made.append((peer, object_id))
        return False

    peers.offer = offer  # type: ignore[method-assign]

    def record_of(object_id: ObjectId) -> StoredRecord | None:
        size, content = sizes.get(object_id), ContentHash("sha256", bytes(32))
        return None if size is None else StoredRecord(object_id, size, None, content, None, 0)

    offers = CopyOffers(peers, peers._rules, record_of, clock=lambda: now[0])
    for step in steps:
        step(offers)
        await offers.send()
    return made


async def test_the_home_offers_large_objects_from_their_second_view_on() -> None:
    now = [0.0]
    peers = fleet(now=now, keep_below=100, copies=2, copy_after=300.0, copy_rate=10**9)
    peers._set_members((A, B, C))
    large, small, first_view = homed(A, A, B, C)[:3]
    others = homed(B, A, B, C)[:5]
    sizes = {large: 101, small: 100, first_view: 101, **dict.fromkeys(others, 101)}
    views = [large, small, first_view, *others]

    def later(offers: CopyOffers) -> None:
        now[0] = 300.0
        offers.note_views([first_view, large])

    made = await offered(
        peers,
        now,
        sizes,
        lambda offers: offers.note_fetch(first_view),
        lambda offers: offers.note_views(views),
        later,
    )
    second = {one: equal(A, B, C).ranked(one)[1] for one in (large, first_view)}
    assert made == [(second[large], large), (second[first_view], first_view)]


async def test_after_a_change_of_the_members_objects_are_offered_to_their_new_second_home() -> None:
    now = [0.0]
    peers = fleet(now=now, keep_below=100, copies=2, copy_rate=10**9)
    peers._set_members((A, B, C))
    item = next(one for one in homed(A, A, B, C) if equal(A, B, C).ranked(one)[1] == B)

    def view(offers: CopyOffers) -> None:
        offers.note_views([item])

    def leave(offers: CopyOffers) -> None:
        for _ in range(3):
            peers._liveness[B].record_probe(False, 0.0)
        peers._rebuild()
        offers.note_views([item])

    assert await offered(peers, now, {item: 101}, view, view, leave) == [(B, item), (C, item)]


def test_an_offer_makes_a_node_without_copies_fetch_nothing() -> None:
    peers = fleet(now=[0.0])
    peers._set_members((A, B))
    hop = peers._hop(PeerRequest(B, only_if_cached=True), homed(A, A, B)[0], HOP_COPY)
    assert hop.headers == {"X-Distributor-Hop": "copy", "Cache-Control": "only-if-cached"}


async def test_an_object_that_is_still_being_fetched_is_offered_with_the_next_view() -> None:
    now = [0.0]
    peers = fleet(now=now, keep_below=100, copies=2, copy_after=0.0, copy_rate=10**9)
    peers._set_members((A, B, C))
    item = homed(A, A, B, C)[0]
    sizes: dict[ObjectId, int] = {}

    def view(offers: CopyOffers) -> None:
        offers.note_views([item])

    def stored(offers: CopyOffers) -> None:
        sizes[item] = 101
        offers.note_views([item])

    assert len(await offered(peers, now, sizes, view, stored)) == 1


async def test_with_one_copy_nothing_is_offered() -> None:
    now = [0.0]
    peers = fleet(now=now, keep_below=100)
    peers._set_members((A, B, C))
    item = homed(A, A, B, C)[0]
    assert not await offered(peers, now, {item: 101}, lambda offers: offers.note_views([item]))
    assert not any(peers.is_second_home(one, 101) for one in homed(B, A, B, C))


def test_an_id_that_stands_for_a_path_is_asked_for_by_its_path() -> None:
    peers = fleet(now=[0.0])
    peers._set_members((A, B))
    paths = (ObjectId.parse_path(f"a/b%20{number}") for number in range(100))
    named = next(one for one in paths if not peers.is_home(one))
    assert peers.hops(named, PeerUse.FETCH)[0].url == f"{B}/api/v1/assets/{named.path}"
    assert not peers.hops(ObjectId.parse(str(named)), PeerUse.FETCH)


async def test_each_address_of_a_name_is_a_node() -> None:
    rules = FleetRules(own="http://127.0.0.1:3334", dns="localhost:3334")
    peers = Peers(rules, SourceLimits(), lambda _: False)
    await peers._resolve("localhost:3334")
    assert peers.alive == peers.known <= {"http://[::1]:3334"}
    peers = Peers(replace(rules, own="http://127.0.0.9:3334"), SourceLimits(), lambda _: False)
    await peers._resolve("localhost:3334")
    assert "http://127.0.0.1:3334" in peers.alive
    before = peers.alive
    await peers._resolve("no-such-name.invalid:3334")
    assert peers.alive == before


async def test_the_addresses_of_a_name_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [
        ["127.0.0.1", "127.0.0.2"],
        ["127.0.0.1", "127.0.0.2", "127.0.0.3"],
        ["127.0.0.1", "127.0.0.3"],
    ]

    async def look_up(*_: object, **__: object) -> list[tuple[Any, ...]]:
        found = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 3334)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    rules = FleetRules(
        own="http://127.0.0.1:3334", dns="cells:3334", refresh_interval=0.02, probe_interval=3600
    )
    async with Peers(rules, SourceLimits(), lambda _: False) as peers:
        assert peers.alive == {"http://127.0.0.2:3334"}
        await eventually(lambda: peers.known == {"http://127.0.0.3:3334"})


# Settings


def test_a_fleet_is_off_by_default() -> None:
    assert PeerSettings().rules is None


def test_urls_lose_the_slash_at_their_end_and_duplicates() -> None:
    rules = PeerSettings(urls=(f"{A}/", A, B), own_url=f"{A}/", weights={f"{B}/": 2.0}).rules
    assert rules is not None
    assert (rules.urls, rules.own, rules.weights) == ((A, B), A, {B: 2.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"urls": (A, B)}, "own_url: expected the base URL of this node, got nothing"),
        ({"urls": (A, B), "own_url": C}, f"own_url: expected one of peers.urls, got {C}"),
        ({"urls": (A,), "dns": "cells:3334", "own_url": A}, "expected one of them, got both"),
        ({"urls": ("cell-a:3334",), "own_url": A}, "expected http:// or https://"),
        ({"urls": (f"{A}?x",), "own_url": A}, "without a query"),
        ({"dns": "cells"}, "dns"),
        ({"weights": {A: 0.0}}, "weights"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match="(?s)" + message.replace("?", r"\?")):
        PeerSettings(**values)


async def test_a_short_secret_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"short\n")
    peers = Peers(FleetRules(own=A), SourceLimits(), lambda _: False, file)
    with pytest.raises(ConfigurationError, match=r"at least 16 bytes in .*, got 5"):
        await peers.open()
