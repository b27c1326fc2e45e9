"""`distributor operator`: commands to a running node."""

from __future__ import annotations

import json
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlencode, urlsplit

import typer

from distributor_node.services.command_line.top import check_url
from distributor_node.shared.domain.errors import ConfigurationError, in_words

if TYPE_CHECKING:
    from distributor_node.shared.settings.peers import PeerSettings

_CONFIG = "distributor.config"
# Limits of one request: the token in its head contains the body too, and a head has at most 16 KiB.
_IDS_BATCH = 200
_MAX_BODY = 6000
_POLL_INTERVAL = 0.5  # seconds between two queries of the progress
_TIMEOUT = 60.0  # seconds, of one request
_MOST_NAMED = 10  # objects that are named in a message
_PINS_PER_PAGE = 500  # those that are not here are looked up in the catalog

app = typer.Typer(
    help="Control a running node through its operator API.\n\n"
    "The secret is read from DISTRIBUTOR_OPERATOR_API__SECRET, from --secret-file, or from the settings file of"
    " --config. It is never an argument, because other users can see those.",
    no_args_is_help=True,
)


def check_ids(ids: list[str] | None) -> list[str] | None:
    """Return the ids. Raises ConfigurationError for an empty one, such as a variable that is not set."""
    if ids is not None and "" in ids:
        raise ConfigurationError(f'ids[{ids.index("")}]: expected an object id, got ""')
    return ids


Ids = Annotated[
    list[str] | None,
    typer.Argument(
        callback=check_ids,
        metavar="ID…",
        help="Object ids, not percent-encoded: 'films/my film.mp4'. `-` reads them from standard input.",
    ),
]
All = Annotated[bool, typer.Option("--all", help="All objects.")]
Fleet = Annotated[
    bool,
    typer.Option("--fleet", help="At all nodes of the fleet (needs --config), with a result for each."),
]

Force = Annotated[
    bool, typer.Option("--force", help="Also if the catalog has no such bucket, or no bucket of the worker.")
]


@app.callback()
def options(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(
            callback=check_url,
            help="URL of the operator API. [default: http://127.0.0.1:3335, or as in the settings]",
        ),
    ] = None,
    secret_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File that contains only the secret.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The node's settings file, for its secret and its port."),
    ] = None,
) -> None:
    """Set the node's URL and secret."""
    context.obj = lambda: _client(url, secret_file, config)
    context.meta[_CONFIG] = config


def _fleet_clients(context: typer.Context) -> list[OperatorClient]:
    """One client for each node of the fleet that the settings name."""
    from distributor_node.shared.settings import load_settings

    config: Path | None = context.meta.get(_CONFIG)
    if config is None:
        raise typer.BadParameter("--fleet: expected --config with the settings of one node of the fleet")
    settings = load_settings(config)
    urls = settings.peers.operator_urls or tuple(
        f"http://{_host_of(url)}:{settings.operator_api.port}" for url in _members(settings.peers)
    )
    if not urls:
        raise typer.BadParameter(f"--fleet: expected peers.urls or peers.dns in {config}")
    if len(set(urls)) < len(urls):
        raise typer.BadParameter(
            "--fleet: expected a URL for each node, got one for several on the same host; set peers.operator_urls"
        )
    client: OperatorClient = context.obj()
    return [client.at(url) for url in urls]


def _members(peers: PeerSettings) -> list[str]:
    """The base URLs of all nodes."""
    import socket

    if peers.dns is None:
        return list(peers.urls)
    host, _, port = peers.dns.rpartition(":")
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)}
    except OSError as error:
        raise typer.BadParameter(f"peers.dns: {host} cannot be resolved: {error.strerror}") from error
    return [
        f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        for address in sorted(found)
    ]


def _host_of(url: str) -> str:
    host = urlsplit(url).hostname or ""
    return f"[{host}]" if ":" in host else host


def _client(url: str | None, secret_file: Path | None, config: Path | None) -> OperatorClient:
    import os

    secret, known_url = os.environ.get("DISTRIBUTOR_OPERATOR_API__SECRET", ""), "http://127.0.0.1:3335"
    if config is not None:
        from distributor_node.shared.settings import load_settings

        settings = load_settings(config).operator_api
        secret = settings.secret.get_secret_value() if settings.secret is not None else secret
        host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104
        known_url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    if secret_file is not None:
        try:
            secret = secret_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise typer.BadParameter(f"{secret_file} cannot be read: {error.strerror}") from error
    if not secret and config is not None:
        raise typer.BadParameter(
            f"no secret: {config} has no operator_api.secret, so this node takes no orders"
        )
    if not secret:
        raise typer.BadParameter(
            "no secret: set DISTRIBUTOR_OPERATOR_API__SECRET, or use --secret-file or --config"
        )
    return OperatorClient(url or known_url, secret)


@app.command("stop-api")
def stop_api(context: typer.Context) -> None:
    """Close the public port of every process."""
    _run(context, lambda client: client.command("stop-api"))


@app.command("start-api")
def start_api(context: typer.Context) -> None:
    """Open the public port again."""
    _run(context, lambda client: client.command("start-api"))


@app.command()
def shutdown(context: typer.Context) -> None:
    """Shut down every API process, with exit code 0."""
    _run(context, lambda client: client.command("shutdown"))


@app.command("set-worker")
def set_worker(
    context: typer.Context, worker_id: Annotated[int, typer.Argument(min=0)], force: Force = False
) -> None:
    """Serve the buckets of this worker. What is not in them is removed. reset-assignment undoes it."""
    _assign(context, "set-worker", {"workerId": worker_id}, force=force)


@app.command("set-buckets")
def set_buckets(
    context: typer.Context,
    buckets: Annotated[list[str] | None, typer.Argument(metavar="BUCKET…", help="Such as 0:1 0:2.")] = None,
    all_of_worker: Annotated[bool, typer.Option("--all", help="All buckets of the worker.")] = False,
    force: Force = False,
) -> None:
    """Serve these buckets, or all buckets of the worker. What is not in them is removed. reset-assignment undoes it."""
    if bool(buckets) == all_of_worker:
        raise typer.BadParameter("expected bucket ids, or --all")
    _assign(context, "set-buckets", {"buckets": buckets} if buckets else {}, force=force)


@app.command("reset-assignment")
def reset_assignment(context: typer.Context) -> None:
    """Serve what the settings say again, instead of what set-buckets and set-worker have set."""
    _run(context, lambda client: client.command("reset-assignment"))


def _assign(context: typer.Context, name: str, body: dict[str, Any], *, force: bool) -> None:
    def execute(client: OperatorClient) -> dict[str, Any]:
        try:
            response = client.command(name, body if force else {**body, "check": True})
        except OperatorError as error:
            if error.kind in ("unknown_bucket", "unknown_worker"):
                raise OperatorError(f"{error}. --force sets it all the same") from error
            raise
        if not force and not response["checked"]:
            print(
                "distributor: the catalog could not be asked whether it has such buckets: set without a check",
                file=sys.stderr,
            )
        return response

    _run(context, execute)


@app.command()
def drain(
    context: typer.Context,
    on: Annotated[bool, typer.Option("--on/--off", help="Start or end draining.")] = True,
) -> None:
    """Serve cached objects, and start no new fetches."""
    _run(context, lambda client: client.command("drain", {"on": on}))


@app.command()
def purge(context: typer.Context, ids: Ids = None, all_objects: All = False, fleet: Fleet = False) -> None:
    """Remove objects, including pinned ones. Responses under way are completed. Says what each was found to be."""
    if all_objects and not ids:
        _run(context, lambda client: client.command("purge", {"all": True}), fleet=fleet)
    else:
        _for_ids(context, "purge", ids, all_objects, fleet=fleet)


@app.command()
def pin(context: typer.Context, ids: Ids = None, fleet: Fleet = False) -> None:
    """Never evict these objects, also when they are fetched later. Says of each whether it is here or known."""
    _for_ids(context, "pin", ids, fleet=fleet)


@app.command()
def unpin(context: typer.Context, ids: Ids = None, fleet: Fleet = False) -> None:
    """Let these objects be evicted again. Says of each whether it was pinned."""
    _for_ids(context, "unpin", ids, fleet=fleet)


@app.command()
def warm(
    context: typer.Context,
    ids: Ids = None,
    bucket: Annotated[str | None, typer.Option(help="All objects of one bucket, such as 0:1.")] = None,
    all_objects: All = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the progress until the end.")] = True,
    fleet: Fleet = False,
) -> None:
    """Fetch objects before they are requested, while there is space. Ctrl-C ends only the progress display.

    With --wait the exit code is 1 if a fetch failed, or if an object that was named is not here afterwards.
    """
    scopes: list[dict[str, Any]] = []
    if [bool(ids), bucket is not None, all_objects].count(True) != 1:
        raise typer.BadParameter("expected object ids, or --bucket, or --all")
    if ids:
        scopes = [{"ids": batch} for batch in _batches(ids)]
        if len(scopes) > 1 and not wait:
            raise typer.BadParameter(
                "too many ids for one request: omit --no-wait, and they are warmed in batches"
            )
    else:
        scopes = [{"all": True} if bucket is None else {"bucket": bucket}]

    def execute(client: OperatorClient) -> dict[str, Any]:
        progress: dict[str, Any] = {}
        for scope in scopes:
            before, progress = progress, client.command("warm", scope)
            if wait:
                progress = _added(before, _watch(client))
            if progress["state"] == "finished" and progress["reason"]:
                raise OperatorError(f"the warming has ended early: {progress['reason']}")
        missing = _not_warmed(progress)
        # A cache that is full, and what can never be in it, are a normal end of a bucket. A failed fetch is none.
        if missing and (ids or progress["failed"]):
            raise PartialSuccess(missing, progress)
        if missing:
            print(f"distributor: {missing}", file=sys.stderr)
        return progress

    _run(context, execute, fleet=fleet)


_HERE = ("stored", "kept_by_peer")  # reasons to skip an object that is where it should be
_REASONS = {
    "unknown": "the catalog does not know it",
    "malformed": "this catalog has no such ids",
    "unassigned": "not served by this node",
    "not_uploaded": "not uploaded yet",
    "too_large": "larger than storage.max_cached_item or the cache, or of unknown size",
    "no_room": "no room below the low watermark",
    "failed": "could not be fetched",
}


def _not_warmed(progress: Mapping[str, Any]) -> str:
    """Say how many objects were not fetched and why: by reason, then the first ones by name. Empty: none."""
    from distributor_node.shared.settings.sizes import plural

    reasons = Counter(progress["skippedFor"], failed=progress["failed"])
    missing = {name: reasons[name] for name in sorted(reasons) if name not in _HERE and reasons[name]}
    count = sum(missing.values())
    if not count:
        return ""
    by_reason = ", ".join(f"{name} {number}" for name, number in missing.items())
    said = f"not fetched: {count} of {plural(progress['total'], 'object')} ({by_reason})"
    named = progress.get("notWarmed", ())  # without it: a node of an earlier version
    listed = ", ".join(f"{one['id']} ({_REASONS.get(one['reason'], one['reason'])})" for one in named)
    more = f", and {count - len(named)} more" if listed and count > len(named) else ""
    return f"{said}: {listed}{more}" if listed else said


def _added(before: Mapping[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """Return the progress of several warmings, one after another, as that of one."""
    if not before:
        return last
    counts = {name: before[name] + last[name] for name in ("total", "done", "skipped", "failed")}
    named = [*before.get("notWarmed", ()), *last.get("notWarmed", ())][:_MOST_NAMED]
    reasons = Counter(before["skippedFor"]) + Counter(last["skippedFor"])
    return {**last, **counts, "skippedFor": dict(reasons), "notWarmed": named}


@app.command("warming")
def warming(context: typer.Context) -> None:
    """Show the progress of the latest warming, until its end."""
    _run(context, _watch)


@app.command()
def cache(
    context: typer.Context,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Objects per request.")] = 1000,
    after: Annotated[str, typer.Option(help="Start after this object id.")] = "",
) -> None:
    """List the cached objects, as one JSON object per line, sorted by id."""
    _run(context, lambda client: _print_pages(client.pages("cache", "objects", limit, after)))


@app.command()
def pins(
    context: typer.Context,
    not_stored: Annotated[
        bool, typer.Option("--not-stored", help="Only those that are not stored here.")
    ] = False,
) -> None:
    """List the pinned objects, here or not, as one JSON object per line, sorted by id."""

    def list_all(client: OperatorClient) -> None:
        found = client.pages("pins", "pins", _PINS_PER_PAGE)
        _print_pages(one for one in found if not (not_stored and one["state"] == "stored"))

    _run(context, list_all)


def _print_pages(entries: Iterable[dict[str, Any]]) -> None:
    for entry in entries:
        print(json.dumps(entry))


@app.command()
def explain(
    context: typer.Context,
    object_id: Annotated[str, typer.Argument(metavar="ID", help="Object id, not percent-encoded.")],
) -> None:
    """Show what the node knows of one object, and how many bytes would be evicted before it."""
    check_ids([object_id])
    _run(context, lambda client: client.query(f"cache/{_encoded(object_id)}"))


def _encoded(object_id: str) -> str:
    """Return the id for a URL, with its query. Raises OperatorError if it is malformed."""
    from distributor_node.shared.domain.errors import InvalidInput
    from distributor_node.shared.domain.objects import ObjectId

    try:
        return (
            object_id if ObjectId.is_plain(object_id) else ObjectId.parse_text(*object_id.split("?", 1)).path
        )
    except InvalidInput as error:
        raise OperatorError(str(error)) from error


@app.command()
def downloads(context: typer.Context) -> None:
    """List the fetches under way, as one JSON object per line."""

    def list_all(client: OperatorClient) -> None:
        for entry in client.query("downloads")["downloads"]:
            print(json.dumps(entry))

    _run(context, list_all)


@app.command()
def orders(context: typer.Context) -> None:
    """Show the operator state: what operators have set."""
    _run(context, lambda client: client.query("orders"))


def _for_ids(
    context: typer.Context,
    name: str,
    ids: Sequence[str] | None,
    all_objects: bool = False,
    *,
    fleet: bool = False,
) -> None:
    if not ids or all_objects:
        raise typer.BadParameter(
            "expected object ids" + (", or --all without ids" if name == "purge" else "")
        )

    batches = list(_batches(ids)) if fleet else _batches(ids)

    def execute(client: OperatorClient) -> dict[str, Any]:
        response: dict[str, Any] = {}
        for batch in batches:
            result = client.command(name, {"ids": batch})
            for key in ("changed", "purging", "objects"):
                if key in response:
                    result[key] = response[key] + result[key]
            response = result
        return response

    _run(context, execute, fleet=fleet)


def _batches(ids: Sequence[str]) -> Iterator[list[str]]:
    """Yield as many ids at a time as one request can contain."""
    found = (line.strip() for line in sys.stdin) if list(ids) == ["-"] else iter(ids)
    named = filter(None, found)
    while batch := list(islice(named, _IDS_BATCH)):
        while batch:
            part: list[str] = []
            while batch and len(json.dumps([*part, batch[0]])) <= _MAX_BODY:
                part.append(batch.pop(0))
            if not part:
                raise typer.BadParameter("expected object ids of at most 128 characters")
            yield part


def _watch(client: OperatorClient) -> dict[str, Any]:
    """Show a progress bar until the warming ends, and return its last state."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task, told = bar.add_task("waiting", total=None, counts=""), ""
        while True:
            found = client.query("warm")
            if found["reason"] not in ("", told) and found["state"] != "finished":
                told = found["reason"]
                # Above the bar. Where the bar is not shown, as in a log, this is all that is said before the end.
                bar.console.print(
                    f"distributor: the warming waits: {told}", markup=False, highlight=False, soft_wrap=True
                )
            bar.update(
                task,
                description=found["state"],
                total=found["total"] or None,
                completed=found["done"] + found["skipped"] + found["failed"],
                counts=f"{found['done']} done, {found['skipped']} skipped, {found['failed']} failed",
            )
            if found["state"] in ("finished", "none"):
                return found
            time.sleep(_POLL_INTERVAL)


def _run(
    context: typer.Context, ask: Callable[[OperatorClient], dict[str, Any] | None], *, fleet: bool = False
) -> None:
    """Send a request and print its response. If the node rejects it, print the reason and exit with code 1.

    `fleet`: send it to all nodes. Prints a line for each, and exits with code 1 if any of them has failed.
    """
    if fleet:
        _run_at_all(_fleet_clients(context), ask)
        return
    client = context.obj()
    try:
        response = ask(client)
    except OperatorError as error:
        print(f"distributor: {error}", file=sys.stderr)
        if isinstance(error, PartialSuccess):
            print(json.dumps(error.result))
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if response is not None:
        print(json.dumps(response))


def _run_at_all(
    clients: Sequence[OperatorClient], ask: Callable[[OperatorClient], dict[str, Any] | None]
) -> None:
    failed = False
    for client in clients:
        try:
            print(json.dumps({"node": client.url, "result": ask(client)}))
        except OperatorError as error:
            failed = True
            result = {"result": error.result} if isinstance(error, PartialSuccess) else {}
            print(json.dumps({"node": client.url, **result, "error": str(error)}))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


class OperatorError(Exception):
    """The node rejected the request, or cannot be reached. The message says why."""

    def __init__(self, message: str, kind: str = "") -> None:
        """`kind`: the `type` of the node's response, such as `unknown_bucket`."""
        super().__init__(message)
        self.kind = kind


class PartialSuccess(OperatorError):
    """The command has been carried out for a part of what was named."""

    def __init__(self, message: str, result: Mapping[str, Any]) -> None:
        """`result`: what is printed of a success."""
        super().__init__(message)
        self.result = result


class OperatorClient:
    """`url`: of the operator API, such as http://127.0.0.1:3335."""

    def __init__(self, url: str, secret: str) -> None:
        self.url, self._secret = url.rstrip("/"), secret

    def at(self, url: str) -> OperatorClient:
        """Return a client of another node with the same secret."""
        return OperatorClient(url, self._secret)

    def command(self, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a POST and return the JSON of the response. Raises OperatorError."""
        return self._request("POST", f"/api/v1/{name}", {} if body is None else body)

    def query(self, name: str, **parameters: str | int) -> dict[str, Any]:
        """Send a GET and return the JSON of the response. Raises OperatorError."""
        query_string = f"?{urlencode(parameters)}" if parameters else ""
        return self._request("GET", f"/api/v1/{name}{query_string}", None)

    def pages(self, name: str, field: str, limit: int, after: str = "") -> Iterator[dict[str, Any]]:
        """Yield the entries of all pages, from the one behind `after`. `limit`: entries per request. OperatorError."""
        behind: str | None = after
        while behind is not None:
            page = self.query(name, limit=limit, **({"after": behind} if behind else {}))
            yield from page[field]
            behind = page["next"]

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        import httpx
        import jwt

        claims = {
            "iat": int(time.time()),
            # Two equal requests within a second must not have the same token.
            "jti": uuid.uuid4().hex,
            "reqUrl": path,
            "reqBody": {} if body is None else body,
        }
        with warnings.catch_warnings():
            # The node takes secrets of 16 characters, and warns of less than 32 bytes.
            warnings.simplefilter("ignore", jwt.warnings.InsecureKeyLengthWarning)
            token = jwt.encode(claims, self._secret, algorithm="HS256")
        headers = {"Authorization": f"bearer {token}"}
        content = None if body is None else json.dumps(body)
        try:
            response = httpx.request(
                method, self.url + path, headers=headers, content=content, timeout=_TIMEOUT, trust_env=False
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OperatorError(f"{self.url} cannot be reached: {in_words(error)}") from error
        try:
            result = response.json()
        except ValueError as error:
            raise OperatorError(
                f"{self.url} is not an operator API: it responded {response.status_code} without JSON"
            ) from error
        if not response.is_success or not isinstance(result, dict):
            rejection = result if isinstance(result, dict) else {}
            raise OperatorError(
                f"{response.status_code} {rejection.get('message', '')}", rejection.get("type", "")
            )
        return result
