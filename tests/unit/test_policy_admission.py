"""Second-hit admission, views of several requests, and both in the simulator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distributor_node.shared.domain.eviction import Gdsf, Lru, PolicyEntry
from distributor_node.shared.domain.eviction.simulator import Request, Rules, Simulation
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.space import (
    AdmissionQuestion,
    SecondHitAdmission,
    ViewCoalescer,
    footprint,
)

MIB = 1024**2
VIDEO, OTHER = ObjectId("video"), ObjectId("other")
NOW = 1_700_000_000.0


def test_requests_within_five_minutes_are_one_view() -> None:
    views = ViewCoalescer()
    assert [views.begins_view(VIDEO, NOW + at) for at in (0, 10, 299, 300, 301, 599, 600)] == [
        True, False, False, True, False, False, True,
    ]  # fmt: skip
    assert views.begins_view(OTHER, NOW)


def test_a_clock_set_far_back_starts_a_view_but_a_late_report_does_not() -> None:
    views = ViewCoalescer()
    assert views.begins_view(VIDEO, NOW)
    assert not views.begins_view(VIDEO, NOW - 1)
    assert views.begins_view(VIDEO, NOW - 300)


def test_the_oldest_views_are_forgotten_first() -> None:
    views = ViewCoalescer(max_entries=2)
    for name in ("a", "b", "c"):
        views.begins_view(ObjectId(name), NOW)
    assert not views.begins_view(ObjectId("c"), NOW + 1)
    assert not views.begins_view(ObjectId("b"), NOW + 1)
    assert views.begins_view(ObjectId("a"), NOW + 1)


ALL = AdmissionQuestion(9 * MIB, 0, low_watermark=1000, window=3600)
"""Every object needs a second view within an hour."""
FULL, ROOM = 1001, 1000


def admits(
    admission: SecondHitAdmission, name: str, at: float, taken: int = FULL, size: int = 9 * MIB
) -> bool:
    question = replace(ALL, size=size)
    return admission.admits(ObjectId(name), question, NOW + at, taken=taken, mean=0.0)


def test_large_objects_are_admitted_on_their_second_hit() -> None:
    admission = SecondHitAdmission()
    assert not admits(admission, "video", 0)
    assert not admits(admission, "video", 60), "the same view"
    assert admits(admission, "video", 400)
    assert admits(admission, "other", 0, size=0), "not large"


@pytest.mark.parametrize(("mean", "above"), [(0.0, MIB), (MIB / 2, MIB), (3e6, 6_000_000)])
def test_the_threshold_may_follow_the_mean_view(mean: float, above: int) -> None:
    for size, admitted in ((above, True), (above + 1, False)):
        question = replace(ALL, above=None, size=size)
        assert SecondHitAdmission().admits(VIDEO, question, NOW, taken=FULL, mean=mean) == admitted
        assert question.settled == (size <= MIB)


def test_a_first_view_is_forgotten_after_the_window() -> None:
    admission = SecondHitAdmission()
    assert not admits(admission, "video", 0)
    assert not admits(admission, "video", 3601), "a first view again"
    assert admits(admission, "video", 7201)


def test_without_pressure_everything_is_admitted_and_first_views_are_remembered() -> None:
    admission = SecondHitAdmission()
    assert admits(admission, "video", 0, ROOM)
    assert admits(admission, "video", 500)


def test_remembered_first_views_are_bounded_and_the_latest_kept() -> None:
    admission = SecondHitAdmission(max_entries=100)
    for number in range(1000):
        admits(admission, str(number), number / 1000)
        assert len(admission) <= 100
    assert all(admits(admission, str(number), 400) for number in range(900, 1000))
    assert not admits(admission, "899", 400)


def simulation(limit: int, *, admission: AdmissionQuestion | None = None) -> Simulation:
    return Simulation(Lru(), Rules.of(limit, 1.0, 1.0), admission)


def view(at: float, name: str, size: int, sent: int | None = None, *, joined: float | None = None) -> Request:
    began = None if joined is None else NOW + joined
    return Request(NOW + at, ObjectId(name), size, size if sent is None else sent, began)


def test_what_a_simulation_counts() -> None:
    trial = simulation(10 * MIB)
    seen = [
        trial.process(view(0, "a", 4 * MIB, MIB)),
        trial.process(view(1, "a", 4 * MIB, MIB)),
        trial.process(view(2, "b", 4 * MIB)),
        trial.process(view(300, "c", 4 * MIB)),
        trial.process(view(301, "b", 4 * MIB)),
        trial.process(view(302, "huge", 11 * MIB, 100)),
    ]
    assert seen == [False, True, False, False, True, False]
    outcome = trial.outcome
    assert (outcome.requests, outcome.hits, outcome.evicted, outcome.proxied) == (6, 2, 1, 1)
    assert outcome.bytes_sent == 14 * MIB + 100
    assert outcome.bytes_hit == 5 * MIB
    assert outcome.bytes_from_sources == 12 * MIB + 100
    assert outcome.bytes_written == 12 * MIB
    assert outcome.object_hit_ratio == 2 / 6


def test_a_just_accessed_object_is_kept_and_the_new_one_proxied() -> None:
    trial = simulation(5 * MIB)
    trial.process(view(0, "a", 4 * MIB))
    assert not trial.process(view(60, "b", 4 * MIB))
    assert trial.process(view(61, "a", 4 * MIB))
    assert trial.outcome.proxied == 1


def test_a_large_object_evicts_thousands_of_small_ones() -> None:
    """More than a policy names at once."""
    trial = simulation(footprint(1000) * 3000)
    for number in range(3000):
        trial.process(view(number / 1000, f"small-{number}", 1000))
    assert not trial.process(view(1000, "large", footprint(1000) * 2500))
    assert (trial.outcome.evicted, trial.outcome.proxied) == (2501, 0)
    assert trial.process(view(1001, "large", footprint(1000) * 2500))


def test_joining_a_fetch_is_no_hit() -> None:
    trial = simulation(5 * MIB)
    trial.process(view(0, "a", MIB))
    assert not trial.process(view(1, "a", MIB, joined=0))
    assert trial.process(view(2, "a", MIB))
    assert trial.process(view(5, "a", MIB, joined=4)), "that fetch would be none of this cache's"
    assert trial.outcome.bytes_from_sources == MIB


def test_a_304_is_no_view_and_fetches_nothing() -> None:
    policy = Gdsf()
    trial = Simulation(policy, Rules.of(50 * MIB))
    unchanged = Request(NOW, VIDEO, MIB, 0, not_modified=True)
    assert not trial.process(unchanged)
    assert VIDEO not in policy
    assert not trial.process(view(1, "video", MIB))
    assert trial.process(unchanged._replace(at=NOW + 1000))
    priority = 0.4 * (1 + 1 / 28)  # w(1) × (1 / MiB + 1 / c0) × MiB
    entry = policy.get(VIDEO)
    assert entry is not None
    assert entry.priority == pytest.approx(priority)
    assert entry == PolicyEntry(VIDEO, MIB, 1, NOW + 1, entry.priority)
    assert (trial.outcome.requests, trial.outcome.hits, trial.outcome.bytes_from_sources) == (3, 1, MIB)


def test_admission_counts_only_when_the_cache_is_full() -> None:
    trial = simulation(5 * MIB, admission=AdmissionQuestion(0, 0, 5 * MIB))
    for at, name in ((0, "a"), (1, "b"), (2000, "c"), (2001, "c"), (2400, "c")):
        trial.process(view(at, name, 2 * MIB))
    assert trial.outcome.proxied == 2
    assert trial.outcome.evicted == 1


def test_gdsf_keeps_thumbnails_where_lru_loses_them() -> None:
    limit = footprint(100 * MIB)
    ratios = {}
    for name, policy in (("gdsf", Gdsf()), ("lru", Lru())):
        trial = Simulation(policy, Rules.of(limit, 1.0, 1.0))
        for number in range(200):
            at = number * 1000.0
            trial.process(view(at, f"thumbnail-{number % 10}", 20_000))
            trial.process(view(at + 500, f"video-{number}", 60 * MIB))
        ratios[name] = trial.outcome.object_hit_ratio
    assert ratios["gdsf"] > 0.4
    assert ratios["lru"] < 0.1


def test_a_view_counts_once_however_many_ranges_it_takes() -> None:
    policy = Gdsf()
    trial = Simulation(policy, Rules.of(100 * MIB))
    for number in range(20):
        trial.process(view(number * 10, "video", 40 * MIB, MIB))
    entry = policy.get(VIDEO)
    assert isinstance(entry, PolicyEntry)
    assert entry.frequency == 1


def test_the_simulator_evicts_nothing_for_an_object_that_will_not_fit() -> None:
    """As in the node: what is idle stays where it is, because it would go for nothing."""
    simulation = Simulation(Lru(), Rules.of(100 * MIB))
    images = [ObjectId(f"image-{number}") for number in range(20)]
    for image in images:
        simulation.process(Request(NOW, image, MIB, MIB))
    for at, name in ((1000, "film"), (1010, "other")):  # too fresh to go
        simulation.process(Request(NOW + at, ObjectId(name), 30 * MIB, 30 * MIB))
    simulation.process(Request(NOW + 1020, ObjectId("large"), 60 * MIB, 60 * MIB))
    assert (simulation.outcome.evicted, simulation.outcome.proxied) == (0, 1)
    simulation.process(Request(NOW + 2000, ObjectId("large"), 60 * MIB, 60 * MIB))
    assert simulation.outcome.evicted
    assert simulation.outcome.proxied == 1
