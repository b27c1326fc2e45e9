"""The simulation of fleets: what its figures must be like, whatever they are."""

from __future__ import annotations

from benchmarks.fleet import Case, Counts, run

VIEWS = 3000


def simulated(nodes: int, mode: str, event: str = "", share: float = 0.2) -> tuple[Counts, float]:
    _, counts, busiest = run(Case(nodes, mode, VIEWS, share, event))
    return counts, busiest


def test_one_home_for_each_object_needs_less_of_the_sources_than_nodes_apart() -> None:
    apart, _ = simulated(4, "apart")
    home, _ = simulated(4, "home")
    assert home.from_sources < 0.9 * apart.from_sources
    assert apart.between == 0
    # Three of four requests come to another node than the home.
    assert 0.6 < home.between / home.sent < 0.85


def test_a_hot_object_does_not_make_its_home_busier() -> None:
    _, alone = simulated(4, "home", "hot")
    _, shared = simulated(4, "fleet", "hot")
    assert shared < 1.4 < alone


def test_a_second_copy_is_not_lost_with_a_node() -> None:
    one, _ = simulated(4, "fleet", "fail", share=1.0)
    two, _ = simulated(4, "copies", "fail", share=1.0)
    assert two.lost / two.had < one.lost / one.had
