"""`distributor replay`: its options, and the replay request that they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.domain.eviction import POLICY_NAMES, MissCost

if TYPE_CHECKING:
    from distributor_node.services.replay.run import OwnNode
    from distributor_node.shared.domain.eviction.simulator import WindowRules

_SIZES = ["1%", "5%", "10%", "25%"]
_POLICIES: list[str] = list(POLICY_NAMES)
_MISS_COSTS = ["auto"]
_SECOND_VIEWS = ["auto"]

Logs = Annotated[
    list[Path],
    typer.Argument(
        metavar="LOG…",
        help="Access logs: ours (JSON lines), Caddy's JSON, common or combined, CSV; traces: libCacheSim's CSV and"
        " oracleGeneral, webcachesim's; plain, gzip, bzip2 or xz.",
    ),
]
Sizes = Annotated[
    list[str],
    typer.Option(
        "--size", help="Cache size to try, such as 500G, or 5% of all objects in the logs; repeatable."
    ),
]
Policies = Annotated[
    list[str], typer.Option("--policy", help=f"Policy to try ({', '.join(POLICY_NAMES)}); repeatable.")
]
MissCosts = Annotated[
    list[str],
    typer.Option(
        "--miss-cost",
        help="c0 of gdsf to try: cost of a miss besides its bytes: auto, 30x (the mean of a view), or 64M; repeatable.",
    ),
]
SecondViews = Annotated[
    list[str],
    typer.Option(
        "--second-view-above",
        help="Size above which objects are cached on their second view, 'auto' or 'off'; repeatable.",
    ),
]
Compared = Annotated[
    str,
    typer.Option(
        "--compare",
        help="Other policies to try: sieve, s3-fifo, arc, w-tinylfu, gdsf-1998, gdsf-64m; separated by commas.",
    ),
]
SizesFile = Annotated[
    Path | None, typer.Option("--sizes", metavar="MANIFEST", help="Manifest with the sizes of the objects.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The node's settings (the environment overrides them): try them too, and use their rules for every trial.",
    ),
]
Sample = Annotated[float, typer.Option("--sample", help="Share of the objects to replay, such as 0.1.")]
Window = Annotated[
    str,
    typer.Option(
        "--window",
        help="How far a fetch of a large object runs ahead of its furthest viewer, tried beside whole objects: a size,"
        " or 'off'.",
    ),
]
WindowAbove = Annotated[
    str, typer.Option("--window-above", help="Size above which objects are fetched with a window.")
]
PathPrefix = Annotated[
    str | None,
    typer.Option(
        "--path-prefix",
        metavar="PREFIX",
        help="What is in front of the objects' paths in common, combined and Caddy's logs, such as / or /media/;"
        " without it, all up to /assets/.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.svg", help="Write the chart to this file.")
]


def replay(  # noqa: PLR0913, PLR0917 - an argument for each option of the command
    logs: Logs,
    size: Sizes = _SIZES,
    policy: Policies = _POLICIES,
    miss_cost: MissCosts = _MISS_COSTS,
    second_view_above: SecondViews = _SECOND_VIEWS,
    sizes: SizesFile = None,
    sample: Sample = 1.0,
    picture: Picture = None,
    config: ConfigFile = None,
    compare: Compared = "",
    window: Window = "8M",
    window_above: WindowAbove = "16M",
    path_prefix: PathPrefix = None,
    as_json: AsJson = False,
) -> None:
    """Try policies, cache sizes and settings on your own access logs."""
    from rich.console import Console

    from distributor_node.services.replay.run import ReplayRequest
    from distributor_node.services.replay.run import replay as run_replay
    from distributor_node.services.replay.scenarios import Setting, settings_to_try

    unknown = set(policy) - set(POLICY_NAMES)
    if unknown:
        raise ConfigurationError(
            f"policy: expected {', '.join(POLICY_NAMES)}, got {', '.join(sorted(unknown))}"
        )
    thresholds = _admission_sizes(second_view_above)
    settings = settings_to_try(policy, _miss_costs(miss_cost), thresholds)
    settings += [Setting(name) for name in _compared(compare)]
    own = _own_node(config) if config is not None else None
    window_tried = _window(window, window_above)
    request = ReplayRequest(
        logs, size, settings, sizes, sample, picture, own, window_tried, as_json, path_prefix
    )
    print(run_replay(request, Console(stderr=True)), end="")


def _own_node(config: Path) -> OwnNode:
    from distributor_node.services.replay.run import OwnNode
    from distributor_node.services.replay.scenarios import NodeRules, Setting
    from distributor_node.shared.domain.eviction.simulator import WindowRules
    from distributor_node.shared.settings import load_settings

    settings = load_settings(config)
    storage, evictor, admission, fetch = (
        settings.storage,
        settings.evictor,
        settings.admission,
        settings.fetch,
    )
    rules = NodeRules(
        evictor.min_idle,
        storage.max_cached_item,
        storage.high_watermark,
        storage.low_watermark,
        admission.window,
    )
    cost = evictor.cost_per_miss if evictor.policy == "gdsf" else None
    window = None if fetch.window is None else WindowRules(fetch.window, fetch.window_above)
    return OwnNode(Setting(evictor.policy, cost, admission.above_size, window), storage.limit, rules)


def _compared(text: str) -> list[str]:
    from distributor_node.services.replay.comparison import OTHER_POLICIES

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in OTHER_POLICIES]
    if unknown:
        raise ConfigurationError(f"compare: expected {', '.join(OTHER_POLICIES)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(names))


def _admission_sizes(texts: list[str]) -> list[int | Literal["auto"]]:
    from distributor_node.shared.settings.sizes import parse_admission_size

    try:
        found = [parse_admission_size(text) for text in texts]
    except ValueError as error:
        raise ConfigurationError(f"second-view-above: {error}") from error
    return [above for above in found if above is not None]


def _miss_costs(texts: list[str]) -> list[MissCost]:
    from distributor_node.shared.settings.sizes import parse_miss_cost

    try:
        return [parse_miss_cost(text) for text in texts]
    except ValueError as error:
        raise ConfigurationError(f"miss-cost: {error}") from error


def _window(ahead: str, above: str) -> WindowRules | None:
    from distributor_node.shared.domain.eviction.simulator import WindowRules

    if ahead.strip().lower() == "off":
        return None
    return WindowRules(_size("window", ahead), _size("window-above", above))


def _size(option: str, text: str) -> int:
    from distributor_node.shared.settings.sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigurationError(f"{option}: {error}") from error
