"""`distributor top` and `distributor status`: what the node's page shows, in a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distributor_node.shared.domain.errors import ConfigurationError, in_words

if TYPE_CHECKING:
    import httpx
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_TIMEOUT = 15.0  # seconds without an event; there is one each second
_COMPLETE_WAIT = 10.0
_RETRY_INTERVAL = 1.0
_BAR_WIDTH = 40
_MAX_ROWS = 12
_NARROW = 100  # columns of a terminal below which texts are shorter
_GAP = 2  # between the columns of a table
_SHORTEST = 12  # columns that a text keeps when it is cut
UNHEALTHY, UNREACHABLE = 1, 3
"""Exit codes: something does not work; the page cannot be read."""


def check_url(url: str | None) -> str | None:
    """Return the value of --url. Raises ConfigurationError without a scheme, which the HTTP client names otherwise."""
    if url is None or url.lower().startswith(("http://", "https://")):
        return url
    raise ConfigurationError(f"--url: expected a URL with http:// or https://, got {url}")


Url = Annotated[
    str | None,
    typer.Option(
        callback=check_url,
        help="URL of the node's page. [default: http://127.0.0.1:3336, or as in the settings]",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The node's settings file, for the page's port and password."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class PageUnreachable(Exception):
    """The message says why."""


def top(
    url: Url = None,
    config: Config = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print it once, when all processes have reported, and exit.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what the node does at the moment, until Ctrl-C. It reads the node's page, and changes nothing.

    With `dashboard.password` set, the password is read from DISTRIBUTOR_DASHBOARD__PASSWORD or the settings file.
    """
    page = Page.of(url, config)
    try:
        if once:
            snapshot = page.complete_snapshot()
            _print(snapshot, as_json=as_json)
        elif as_json:
            for snapshot in page.snapshots():
                print(json.dumps(snapshot), flush=True)
        else:
            _follow(page)
    except PageUnreachable as error:
        print(f"distributor: {error}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    except (KeyboardInterrupt, BrokenPipeError):
        return


def status(url: Url = None, config: Config = None, as_json: AsJson = False) -> None:
    """Print whether everything works, and what does not. Exit code 1 if something does not, 3 if the node is silent."""
    try:
        snapshot = Page.of(url, config).snapshot()
    except PageUnreachable as error:
        print(f"distributor: {error}", file=sys.stderr)
        sys.exit(UNREACHABLE)
    lines = [*snapshot["components"], *snapshot["processes"]]
    if as_json:
        print(json.dumps({"ok": all(line["ok"] for line in lines), "notices": _notices(snapshot),
                          "components": snapshot["components"], "processes": snapshot["processes"]}))  # fmt: skip
    else:
        for notice in _notices(snapshot):
            print(f"note   {notice['words']}")
        for line in lines:
            name = f"{line['kind']} {line['name']}" if "kind" in line else line["name"]
            print(
                f"{'ok   ' if line['ok'] else 'WRONG'}  {name}: {line['words']}{_since(line, snapshot['at'])}"
            )
    sys.exit(0 if all(line["ok"] for line in lines) else UNHEALTHY)


def _notices(snapshot: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What an operator has set that is no fault. A node of an earlier version does not tell."""
    notices: Sequence[Mapping[str, str]] = snapshot.get("notices", ())
    return notices


def _since(line: Mapping[str, Any], now: float) -> str:
    return "" if line["since"] is None else f", for {duration(max(0.0, now - line['since']))}"


class Page:
    """The node's page, read by a program."""

    def __init__(self, url: str, user: str, password: str | None) -> None:
        self._url, self._auth = url.rstrip("/"), None if password is None else (user, password)

    @classmethod
    def of(cls, url: str | None, config: Path | None) -> Page:
        """Where the settings say that it is, unless `url` does."""
        from distributor_node.shared.settings.model import DashboardSettings

        settings = DashboardSettings()
        if config is not None:
            from distributor_node.shared.settings import load_settings

            settings = load_settings(config).dashboard
        environment = os.environ
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        port = environment.get("DISTRIBUTOR_DASHBOARD__PORT", settings.port)
        password = environment.get("DISTRIBUTOR_DASHBOARD__PASSWORD")
        if password is None and settings.password is not None:
            password = settings.password.get_secret_value()
        user = environment.get("DISTRIBUTOR_DASHBOARD__USER", settings.user)
        return cls(url or f"http://{f'[{host}]' if ':' in host else host}:{port}", user, password)

    def snapshot(self) -> dict[str, Any]:
        """One snapshot, at once. Raises PageUnreachable."""
        with self._get("/snapshot.json") as response:
            response.read()
            found: dict[str, Any] = response.json()
            return found

    def snapshots(self) -> Iterator[dict[str, Any]]:
        """A snapshot each second. Raises PageUnreachable when they end."""
        with self._get("/events") as response:
            event = ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data" and event == "snapshot":
                    yield json.loads(value)
        raise PageUnreachable(f"{self._url} has ended the stream")

    def complete_snapshot(self) -> dict[str, Any]:
        """The first snapshot for which all processes report what only they know, or the one after ten seconds."""
        deadline = time.monotonic() + _COMPLETE_WAIT
        for number, snapshot in enumerate(self.snapshots()):
            # Rates need two snapshots.
            if (number and snapshot["complete"]) or time.monotonic() > deadline:
                return snapshot
        raise PageUnreachable(f"{self._url} has ended the stream")

    @contextmanager
    def _get(self, path: str) -> Iterator[httpx.Response]:
        import httpx

        try:
            with httpx.stream(
                "GET", self._url + path, auth=self._auth, timeout=_TIMEOUT, trust_env=False
            ) as response:
                if response.status_code == httpx.codes.UNAUTHORIZED:
                    raise PageUnreachable(
                        f"{self._url} asks for a password: set DISTRIBUTOR_DASHBOARD__PASSWORD"
                    )
                if not response.is_success:
                    raise PageUnreachable(
                        f"{self._url} is not the page of a node: it answered {response.status_code}"
                    )
                yield response
        except httpx.ConnectError as error:
            raise PageUnreachable(
                f"{self._url} cannot be read: {in_words(error)}. Does the node run? --url or --config says where"
            ) from error
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise PageUnreachable(f"{self._url} cannot be read: {in_words(error)}") from error


def _print(snapshot: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(snapshot, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(screen(snapshot, console.width))


def _follow(page: Page) -> None:
    """Draw each snapshot over the last one. A node that is restarted is waited for once it was there."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    first = next(iter(page.snapshots()))
    console = Console(highlight=False)
    with Live(
        screen(first, console.width),
        console=console,
        screen=True,
        auto_refresh=False,
        vertical_overflow="crop",
    ) as live:
        while True:
            try:
                for snapshot in page.snapshots():
                    live.update(screen(snapshot, console.width), refresh=True)
            except PageUnreachable as error:
                live.update(Text(f"{error}; trying again", style="red"), refresh=True)
                time.sleep(_RETRY_INTERVAL)


# The screen


def screen(snapshot: Mapping[str, Any], width: int) -> RenderableType:
    """Lay the snapshot out for a terminal of `width` columns. All texts of it are shown as they are, without markup."""
    from rich.console import Group
    from rich.padding import Padding

    width -= 2  # the padding
    sections = [
        *_head(snapshot),
        *_volume(snapshot["volume"], width),
        *_downloads(snapshot["downloads"], snapshot["queue"], width),
        *_sources(snapshot["sources"], width),
        *_removed(snapshot["volume"]["removed"], snapshot["at"], width),
    ]
    return Padding(Group(*sections), (0, 1))


def _head(snapshot: Mapping[str, Any]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    node, lines = snapshot["node"], [*snapshot["components"], *snapshot["processes"]]
    wrong = [line for line in lines if not line["ok"]]
    noted = ", ".join(notice["name"] for notice in _notices(snapshot))
    good = Text(noted, "yellow") if noted else Text("everything works", "green")
    state = Text(f"{len(wrong)} wrong", "bold red") if wrong else good
    title = Table.grid(expand=True)
    title.add_column()
    title.add_column(justify="right")
    name = Text.assemble(
        (node["id"], "bold"), (f"  distributor node {node['version']}, {node['environment']}", "dim")
    )
    title.add_row(name, state)
    shown: list[RenderableType] = [title]
    for period, said in snapshot["totals"].items():
        shown.append(Text.assemble((f"last {period:<7}", "dim"), _sentence(said)))
    shown.append(Text(""))
    working = [line["name"] for line in snapshot["components"] if line["ok"]]
    shown.append(Text.assemble(("● ", "green"), " · ".join(working)))
    shown += [Text(f"▲ {notice['words']}", "yellow") for notice in _notices(snapshot)]
    for line in wrong:
        words = (
            f"{line.get('kind', '')} {line['name']}: {line['words']}{_since(line, snapshot['at'])}".strip()
        )
        shown.append(Text.assemble(("■ ", "red"), (words, "red")))
    return shown


def _sentence(said: Mapping[str, float]) -> str:
    from distributor_node.shared.settings.sizes import plural

    requests = said["hit"] + said["pending"] + said["miss"]
    if not requests:
        return "no requests"
    served = size(said["local"] + said["external"])
    asked = plural(requests, "request")
    return f"served {served}, fetched {size(said['fetched'])}: {said['hit']:.0f} of {asked} from disk"


def _volume(volume: Mapping[str, Any], width: int) -> list[RenderableType]:
    from rich.text import Text

    from distributor_node.shared.settings.sizes import plural

    limit = max(1, volume["limit"])
    used, reserved = (round(_BAR_WIDTH * volume[name] / limit) for name in ("used", "reserved"))
    bar = Text.assemble(
        ("█" * used, "blue"), ("▒" * reserved, "blue"), ("░" * max(0, _BAR_WIDTH - used - reserved), "dim")
    )
    objects = f"{size(volume['used'])} in {plural(volume['objects'], 'object')}"
    parked = volume.get("parked")  # a node of an earlier version does not tell
    partial = (
        f", {plural(parked['objects'], 'partial object')} with {size(parked['held'])}"
        if parked and parked["objects"]
        else ""
    )
    words = f"{objects}, {size(volume['reserved'])} reserved, of {size(limit)}{partial}"
    place = "\n" if bar.cell_len + _GAP + len(words) > width else " " * _GAP
    return [_heading("Volume"), bar.append(place + words, "default")]


def _downloads(
    downloads: Sequence[Mapping[str, Any]], queue: Mapping[str, Any], width: int
) -> list[RenderableType]:
    from rich.text import Text

    paused = f"{queue['paused']} paused, " if queue.get("paused") else ""
    heading = _heading(f"Downloads: {queue['downloads']} running, {paused}{queue['waiting']} waiting")
    waiting = queue.get("next", ())
    if not downloads and not waiting:
        return [heading, Text("none", "dim")]
    narrow = width < _NARROW
    columns = (
        _Column("object", cut=True),
        _Column("progress"),
        _Column("on disk"),
        _Column("rate"),
        _Column("left", leave_out=2),
        _Column("viewers", leave_out=1),
        _Column("source", leave_out=3, cut=True),
    )
    rows: list[tuple[str | Text, ...]] = [_download(one, narrow=narrow) for one in downloads[:_MAX_ROWS]]
    rows += [
        (one["id"], "", "", f"waiting {duration(one['age'])}", "", str(one["viewers"]), "")
        for one in waiting[: _MAX_ROWS - len(rows)]
    ]
    return [heading, _table(width, columns, rows)]


def _download(one: Mapping[str, Any], *, narrow: bool) -> tuple[str | Text, ...]:
    # A node of an earlier version does not tell phase or pause.
    if one.get("phase") == "parked":
        rate, left = "interrupted", None
    elif one.get("paused"):
        rate, left = "paused", None
    else:
        rate, left = "" if one["rate"] is None else f"{size(one['rate'])}/s", one["secondsLeft"]
    total, held = one["size"], on_disk(one)
    arrived = f"{100 * held // total} %" if narrow and total else size(held)
    switched = f" (after {', '.join(one['sources'][:-1])})" if one["sources"][:-1] else ""
    return (
        one.get("path") or one["id"],
        progress(one, 12 if narrow else 24),
        f"{arrived} of {size(total) if total else '?'}",
        rate,
        "" if left is None else duration(left),
        str(len(one["viewers"]) + one["moreViewers"]),
        (one["source"] or "none") + switched,
    )


def on_disk(download: Mapping[str, Any]) -> int:
    """Bytes of all extents."""
    return sum(end - first for first, end in download["extents"])


def progress(download: Mapping[str, Any], width: int) -> Text:
    """A bar of the extents, with a dot where viewers are."""
    from rich.text import Text

    total = download["size"] or max((end for _, end in download["extents"]), default=1)
    cells = ["░"] * width
    for first, end in download["extents"]:
        for place in range(width * first // total, min(width, -(-width * end // total))):
            cells[place] = "█"
    for viewer in download["viewers"]:
        cells[min(width - 1, width * viewer["at"] // total)] = "●"
    text = Text()
    for cell in cells:
        text.append(cell, {"█": "blue", "●": "bold yellow"}.get(cell, "dim"))
    return text


def _sources(sources: Sequence[Mapping[str, Any]], width: int) -> list[RenderableType]:
    from rich.text import Text

    if not sources:
        return []
    rows: list[tuple[str | Text, ...]] = []
    narrow = width < _NARROW
    for one in sources[:_MAX_ROWS]:
        if one["penaltyLeft"] > 0:
            state = Text(f"asked last for {duration(one['penaltyLeft'])}", "red")
        else:
            state = Text("answers", "green")
        first_bytes = one["firstBytes"]
        mean = f"{1000 * sum(first_bytes) / len(first_bytes):.0f} ms" if first_bytes else ""
        if mean and not one["requests"] and not narrow:
            mean += ", of probes"
        counts = {"": sum(one["failures"].values())} if narrow else one["failures"]
        failures = ", ".join(f"{count:.0f} {reason}".strip() for reason, count in counts.items() if count)
        rows.append((str(one["rank"]), one["name"], state, mean, size(one["bytes"]), failures or "none"))
    columns = (
        _Column("rank", leave_out=1),
        _Column("source", cut=True),
        _Column("state"),
        _Column("first byte"),
        _Column("received"),
        _Column("failures", cut=True),
    )
    return [_heading("Sources"), _table(width, columns, rows)]


def _removed(removed: Sequence[Mapping[str, Any]], now: float, width: int) -> list[RenderableType]:
    if not removed:
        return []
    rows = [
        (
            f"{duration(max(0.0, now - one['at']))} ago",
            one.get("path") or one["id"],
            size(one.get("size", one["bytes"])),
            one["words"],
        )
        for one in reversed(removed[-5:])
    ]
    columns = (
        _Column("removed"),
        _Column("object", cut=True),
        _Column("size"),
        _Column("reason", cut=True),
    )
    return [_heading("Removed last"), _table(width, columns, rows)]


def _heading(words: str) -> RenderableType:
    from rich.text import Text

    return Text(f"\n{words}", "bold")


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table, and what becomes of it where the table is too wide."""

    name: str
    cut: bool = False  # its texts are cut
    leave_out: int = 0  # it is left out, the highest number first; 0: never


def _table(width: int, columns: Sequence[_Column], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Return a table of at most `width` columns of the terminal, if that is possible."""
    from rich.table import Table
    from rich.text import Text

    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    wanted = [
        max(len(column.name), *(row[place].cell_len for row in cells)) for place, column in enumerate(columns)
    ]
    shown = list(range(len(columns)))

    def excess() -> int:
        least = (min(wanted[one], _SHORTEST) if columns[one].cut else wanted[one] for one in shown)
        return sum(least) + _GAP * (len(shown) - 1) - width

    for place in sorted(shown, key=lambda one: -columns[one].leave_out):
        if excess() > 0 and columns[place].leave_out:
            shown.remove(place)
    room = width - _GAP * (len(shown) - 1) - sum(wanted[one] for one in shown if not columns[one].cut)
    flexible = sorted((one for one in shown if columns[one].cut), key=wanted.__getitem__)
    for left, place in zip(range(len(flexible), 0, -1), flexible, strict=True):
        wanted[place] = min(wanted[place], max(_SHORTEST, room // left))
        room -= wanted[place]
    table = Table(box=None, padding=(0, _GAP, 0, 0), header_style="dim", pad_edge=False)
    for place in shown:
        table.add_column(columns[place].name, no_wrap=True, overflow="ellipsis", width=wanted[place])
    for row in cells:
        table.add_row(*(row[place] for place in shown))
    return table


def size(count: float) -> str:
    """As the page writes it."""
    from distributor_node.shared.settings.sizes import size_in_words

    return size_in_words(count)


def duration(seconds: float) -> str:
    """As the page writes it."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
