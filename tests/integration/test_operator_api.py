"""The operator API over the memory store: authentication, commands, persistence."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from distributor_node.services.api.dashboard.feed import CHECK_INTERVAL, Feed
from distributor_node.services.api.dashboard.server import DashboardServer
from distributor_node.services.api.health import HealthChecks
from distributor_node.services.api.operator import commands as commands_module
from distributor_node.services.api.operator import explain as explain_module
from distributor_node.services.api.operator import warming as warming_module
from distributor_node.services.api.operator.app import operator_api
from distributor_node.services.api.operator.commands import MAX_PINS, OperatorCommands
from distributor_node.services.api.operator.explain import ObjectExplainer
from distributor_node.services.api.status import UsageReader
from distributor_node.services.command_line.top import screen
from distributor_node.shared.adapters.state_common import StateTimeouts
from distributor_node.shared.adapters.state_redis import RedisStateStore
from distributor_node.shared.adapters.volume.operator_state_file import (
    NAME,
    read_operator_state,
    write_operator_state,
)
from distributor_node.shared.domain.errors import CatalogUnavailable
from distributor_node.shared.domain.objects import Assignment, MediaObject, ObjectId, StoredRecord
from distributor_node.shared.domain.operator_state import (
    OperatorState,
    OperatorStateSnapshot,
    WarmingScope,
    decode_snapshot,
    encode_snapshot,
)
from distributor_node.shared.ports.state_store import Granted
from distributor_node.shared.runtime.operator_state import OperatorStateWatcher
from distributor_node.shared.runtime.process_reports import RemovedObject, ReportContent
from distributor_node.shared.settings.model import DashboardSettings, Settings
from distributor_node.shared.waiting import background
from tests.end_to_end.client import Answer, exchange
from tests.end_to_end.operator_client import OperatorClient, command, distributor
from tests.integration.assets_harness import AssetsHarness, assets_harness
from tests.servers.api_fixture import FakeAssets, RunningApi, running_api
from tests.servers.operator_token import SECRET, sign
from tests.servers.redis_server import RedisServer
from tests.waiting import eventually

PINNED = OperatorStateSnapshot(
    OperatorState(version=3, stopped=True, shutdowns=2), frozenset({ObjectId("1")})
)


@asynccontextmanager
async def operated(tmp_path: Path, **changes: Any) -> AsyncIterator[tuple[RunningApi, OperatorClient]]:
    settings = {"port": 0, "secret": SECRET}
    async with (
        running_api(tmp_path, FakeAssets(), operator_api=settings, **changes) as api,
        operator_api(api.context, "here", shared_port=False) as port,
    ):
        assert port is not None
        await api.context.operator_state.load()
        yield api, OperatorClient(port)


async def raw(port: int, request: bytes) -> Answer:
    async with asyncio.timeout(60):
        return await exchange("127.0.0.1", port, request)


async def test_all_rejections_look_the_same(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        used = sign("/api/v1/orders")
        assert (await operator.ask("GET", "orders", token=used)).status == 200
        tokens = ["", "x", used, sign("/api/v1/orders", iat=1), sign("/api/v1/orders", {"a": 1})]
        answers = [await operator.ask("GET", "orders", token=token) for token in tokens]
        seen = {(answer.status, answer.body, answer.headers["www-authenticate"]) for answer in answers}
        assert len(seen) == 1
        [(status, body, _)] = seen
        assert status == 401
        assert json.loads(body) == {"type": "not_authorised", "message": "Not authorised"}
        assert "access-control-allow-origin" not in answers[0].headers


async def test_the_memory_store_rejects_tokens_from_before_its_start(tmp_path: Path) -> None:
    """It may have been used before the store was started, which is not recorded."""
    async with operated(tmp_path) as (_, operator):
        earlier = sign("/api/v1/orders", iat=int(time.time()) - 60)
        assert (await operator.ask("GET", "orders", token=earlier)).status == 401


async def test_a_request_that_is_too_large_is_refused(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        answer = await operator.ask("POST", "purge", {"ids": ["1" * 128] * 200})
        assert answer.status in (413, 431)
        head = b"POST /api/v1/purge HTTP/1.1\r\nHost: n\r\nContent-Length: 1000000\r\n\r\n"
        assert (await raw(operator.port, head)).status == 413


@pytest.mark.servers
async def test_without_the_state_store_there_is_no_operator_state(
    tmp_path: Path, own_redis: RedisServer
) -> None:
    servers = {"state_store": {"url": own_redis.url}, "job_queue": {"url": "amqp://127.0.0.1:1"}}
    async with operated(tmp_path, **servers) as (_, operator):
        own_redis.kill()
        answer = await operator.ask("POST", "stop-api")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")


async def test_everything_is_a_conflict_once_the_node_shuts_down(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        assert (await operator.command("shutdown"))["shuttingDown"]
        bodies: dict[str, Any] = {
            "shutdown": None,
            "stop-api": None,
            "start-api": None,
            "set-worker": {"workerId": 1},
            "set-buckets": {},
            "reset-assignment": None,
            "drain": {"on": True},
            "pin": {"ids": ["1"]},
            "unpin": {"ids": ["1"]},
            "purge": {"ids": ["1"]},
            "warm": {"all": True},
        }
        answers = {path: await operator.ask("POST", path, body) for path, body in bodies.items()}
        assert {path: answer.status for path, answer in answers.items()} == dict.fromkeys(bodies, 409)
        assert {answer.json()["type"] for answer in answers.values()} == {"shutting_down"}


async def test_two_orders_at_once_both_count(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        await asyncio.gather(
            operator.command("set-worker", {"workerId": 7}),
            operator.command("drain", {"on": True}),
            operator.command("stop-api"),
        )
        orders = await operator.query("orders")
        assert (orders["workerId"], orders["draining"], orders["stopped"]) == (7, True, True)


async def test_status_and_page_say_that_the_node_drains_and_is_stopped(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        feed = feed_of(api)

        async def status() -> dict[str, Any]:
            answer: dict[str, Any] = json.loads((await api.get("/api/v1/status")).partition(b"\r\n\r\n")[2])
            return answer

        assert (await status())["draining"] is False
        shown = await feed.snapshot()
        assert (shown["notices"], components(shown)["Public port"]) == ([], "works")
        await operator.command("drain", {"on": True})
        await operator.command("stop-api")
        assert (await status())["draining"] is True
        shown = await feed.snapshot()
        [notice] = shown["notices"]
        assert notice["name"] == "draining"
        assert components(shown)["Public port"] == "stopped by an operator"
        server = DashboardServer(DashboardSettings(port=0), feed, api.context.state, lambda: None)
        async with background(server.run(), name="dashboard"):
            await eventually(lambda: server.port is not None)
            done = await distributor("status", "--url", f"http://127.0.0.1:{server.port}")
        assert f"note   {notice['words']}\n" in done.stdout
        written = StringIO()
        Console(width=200, file=written).print(screen(shown, 200))
        assert notice["words"] in written.getvalue()
        await operator.command("drain", {"on": False})
        await operator.command("start-api")
        shown = await feed.snapshot()
        assert (shown["notices"], components(shown)["Public port"]) == ([], "works")
        await feed.close()


async def test_a_page_that_was_not_open_shows_no_state_of_long_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with operated(tmp_path) as (api, _):
        feed, known = feed_of(api), api.context.catalog.bucket_ids

        async def bucket_ids(worker_id: int | None = None) -> list[str]:
            raise CatalogUnavailable("away")

        for catalog_down in (True, False, True):
            monkeypatch.setattr(api.context.catalog, "bucket_ids", bucket_ids if catalog_down else known)
            expected = "unavailable" if catalog_down else "works"
            assert components(await feed.snapshot())["Catalog (manifest)"] == expected
            feed._checked_at -= 2 * CHECK_INTERVAL  # so much time passes
        await feed.close()


def feed_of(api: RunningApi) -> Feed:
    """The page's, as of a process whose public port is open."""
    context, usage = api.context, UsageReader(api.context)
    explainer = ObjectExplainer(context.state, context.volume, context.settings.evictor)
    return Feed(context, usage, HealthChecks(context, usage, lambda: True), explainer)


def components(snapshot: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["words"] for one in snapshot["components"]}


async def test_the_file_on_the_volume_is_what_an_empty_store_begins_with(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    write_operator_state(root, PINNED)
    async with operated(tmp_path) as (api, operator):
        assert api.context.operator_state.current.stopped
        assert not api.context.operator_state.shutting_down
        assert await api.context.state.pinned() == {ObjectId("1")}
        assert (await operator.ask("POST", "stop-api")).status == 409
        await operator.command("start-api")
        assert await api.context.state.pinned() == {ObjectId("1")}


async def test_a_reader_follows_the_file_while_the_store_is_down(tmp_path: Path) -> None:
    write_operator_state(tmp_path, PINNED)
    down = RedisStateStore(
        f"unix://{tmp_path}/none.sock", "test:", 1000, StateTimeouts(operation_timeout=0.3)
    )
    watcher = OperatorStateWatcher(down, tmp_path, Assignment())
    await watcher.load()
    assert watcher.current == PINNED.state
    assert not watcher.shutting_down
    await down.close()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 1}',
        b"[" * 100_000,
        b"\xff",
        b'{"version":1,"orders":{"stopped":"yes"},"pinned":[]}',
    ],
)
def test_a_broken_file_is_ignored(tmp_path: Path, text: bytes) -> None:
    (tmp_path / NAME).write_bytes(text)
    assert read_operator_state(tmp_path) is None


def test_the_file_is_replaced_in_one_step_and_reads_back(tmp_path: Path) -> None:
    write_operator_state(tmp_path, OperatorStateSnapshot(OperatorState(version=1)))
    assignment = OperatorState(
        version=9, buckets_ordered=True, buckets=frozenset({"0:1", "0:2"}), worker_ordered=True
    )
    write_operator_state(
        tmp_path, OperatorStateSnapshot(assignment, frozenset({ObjectId("b"), ObjectId("a")}))
    )
    assert read_operator_state(tmp_path) == OperatorStateSnapshot(
        assignment, frozenset({ObjectId("b"), ObjectId("a")})
    )
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    assert decode_snapshot(encode_snapshot(PINNED)) == PINNED


def test_without_operator_state_the_settings_apply() -> None:
    configured = Settings(
        buckets=["1:1"], worker_id=3, catalog={"kind": "joystream"}, storage={"path": "unused"}
    ).assignment
    assert OperatorState().assignment(configured) == configured == Assignment(frozenset({"1:1"}), 3)
    assert OperatorState(worker_ordered=True, worker_id=7).assignment(configured) == Assignment(
        frozenset({"1:1"}), 7
    )
    assert OperatorState(buckets_ordered=True).assignment(configured) == Assignment(None, 3)


def test_all_buckets_of_an_unnamed_worker_are_not_everything() -> None:
    configured = Assignment(frozenset({"1:1"}))
    ordered = OperatorState(buckets_ordered=True)
    assert ordered.assignment(configured) == configured
    assert replace(ordered, worker_ordered=True, worker_id=7).assignment(configured) == Assignment(None, 7)
    assert ordered.assignment(Assignment()) == Assignment()


async def test_back_to_all_of_the_worker_needs_a_worker(tmp_path: Path) -> None:
    async with operated(tmp_path, buckets=["0:1"]) as (_, operator):
        answer = await operator.ask("POST", "set-buckets", {})
        assert (answer.status, answer.json()["type"]) == (409, "no_worker")
        assert (await operator.query("orders"))["buckets"] == ["0:1"]
        await operator.command("set-worker", {"workerId": 7})
        assert (await operator.command("set-buckets", {}))["buckets"] is None


async def test_a_node_configured_for_everything_returns_to_that(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        await operator.command("set-buckets", {"buckets": ["5:5"]})
        assert (await operator.command("set-buckets", {}))["buckets"] is None


async def test_with_buckets_and_worker_the_buckets_decide_until_reset(tmp_path: Path) -> None:
    async with operated(tmp_path, buckets=["0:1"], worker_id=3) as (_, operator):
        shown = await operator.query("orders")
        assert (shown["workerId"], shown["buckets"]) == (3, ["0:1"])
        shown = await operator.command("set-buckets", {})
        assert (shown["workerId"], shown["buckets"]) == (3, None)


async def test_buckets_that_do_not_exist_are_refused_if_the_operator_wants_to_know(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        body = {"buckets": ["0:1", "5:5"], "check": True}
        answer = await operator.ask("POST", "set-buckets", body)
        assert (answer.status, answer.json()) == (
            409,
            {"type": "unknown_bucket", "message": "buckets: expected buckets of the catalog (0:1), got 5:5"},
        )
        assert (await operator.query("orders"))["buckets"] is None
        answer = await operator.ask("POST", "set-worker", {"workerId": 7, "check": True})
        assert (answer.status, answer.json()["type"]) == (409, "unknown_worker")
        assert answer.json()["message"].endswith(
            "a worker with buckets in the catalog, got 7, which has none"
        )
        shown = await operator.command("set-buckets", {"buckets": ["0:1"], "check": True})
        assert (shown["buckets"], shown["checked"]) == (["0:1"], True)
        shown = await operator.command("set-buckets", {**body, "check": False})
        assert (shown["buckets"], shown["checked"]) == (["0:1", "5:5"], False)
        await operator.command("set-worker", {"workerId": 7})
        answer = await operator.ask("POST", "set-buckets", {"check": True})
        assert (answer.status, answer.json()["type"]) == (409, "unknown_worker")


async def test_buckets_are_set_although_the_catalog_does_not_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands_module, "_BUCKETS_TIMEOUT", 0.1)
    async with operated(tmp_path) as (api, operator):
        never = asyncio.Event()

        async def bucket_ids(worker_id: int | None = None) -> tuple[str, ...]:
            await never.wait()
            return ()

        monkeypatch.setattr(api.context.catalog, "bucket_ids", bucket_ids)
        shown = await operator.command("set-buckets", {"buckets": ["5:5"], "check": True})
        assert (shown["buckets"], shown["checked"]) == (["5:5"], False)


async def test_the_assignment_of_the_settings_comes_back(tmp_path: Path) -> None:
    async with operated(tmp_path, buckets=["0:1"], worker_id=3) as (_, operator):
        await operator.command("set-buckets", {"buckets": ["5:5"]})
        await operator.command("set-worker", {"workerId": 7})
        await operator.command("drain", {"on": True})
        shown = await operator.command("reset-assignment")
        assert (shown["workerId"], shown["buckets"], shown["draining"]) == (3, ["0:1"], True)


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=000010000000", "limit=%D9%A1", "limit="])
async def test_a_page_has_a_thousand_entries_at_most(tmp_path: Path, query: str) -> None:
    async with operated(tmp_path) as (_, operator):
        assert (await operator.ask("GET", f"cache?{query}")).status == 400


async def test_one_object_is_explained_to_the_operator_alone(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        await api.context.state.change_pins(pin=[ObjectId("7")])
        explained = await operator.query("cache/7")
        assert (explained["id"], explained["state"], explained["pinned"]) == ("7", "not_uploaded", True)
        assert explained["words"] == [
            "It is not here, and is not being fetched.",
            "An operator has pinned it, so it is never evicted to make room.",
            "The catalog says that it has not been uploaded yet.",
        ]
        nowhere = await operator.query("cache/nowhere")
        assert (nowhere["state"], nowhere["words"][-1]) == (
            "unknown",
            "The catalog says that it does not exist.",
        )
        await api.context.state.change_pins(pin=[ObjectId("nowhere")])
        pins = (await operator.query("pins"))["pins"]
        assert [(one["id"], one["state"]) for one in pins] == [("7", "not_uploaded"), ("nowhere", "unknown")]
        assert (await operator.query("cache/a/b%20c"))["id"] == ObjectId.parse_path("a/b%20c")
        assert (await operator.ask("GET", "cache/7", token="x")).status == 401
        for malformed in ("", "..", "a%00b", "a%2Fb", "x" * 1025):
            answer = await operator.ask("GET", f"cache/{malformed}")
            assert (answer.status, answer.json()["type"]) == (400, "malformed_request"), malformed


async def test_one_warming_at_a_time(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        state = api.context.state
        assert await state.start_warming(WarmingScope()) is not None
        assert await state.lease_warming("another process", 60) is not None
        answer = await operator.ask("POST", "warm", {"all": True})
        assert (answer.status, answer.json()["type"]) == (409, "already_warming")


@pytest.mark.parametrize(
    ("text", "path", "query"),
    [
        ("films/my film.mp4", "films/my film.mp4", ""),
        ("films/café+(1)~'@,;=:&!$*.mp4", "films/café+(1)~'@,;=:&!$*.mp4", ""),
        ("my%20film.mp4", "my%20film.mp4", ""),
        ('100% [new] "a" | b\\c.mp4', '100% [new] "a" | b\\c.mp4', ""),
        ("5", "5", ""),
        ("film.mp4?v=2&w=%20", "film.mp4", "v=2&w=%20"),
    ],
)
async def test_the_command_takes_ids_as_people_write_them(
    tmp_path: Path, text: str, path: str, query: str
) -> None:
    """Not percent-encoded: what is, is another id. A query is taken as it stands."""
    object_id = ObjectId.parse_text(path, query)
    async with operated(tmp_path) as (_, operator):
        pinned = await command(operator, "pin", text)
        assert [one["id"] for one in json.loads(pinned.stdout)["objects"]] == [object_id]
        explained = await command(operator, "explain", text)
        assert explained.returncode == 0, explained
        assert json.loads(explained.stdout)["id"] == object_id
        assert json.loads(explained.stdout)["pinned"] is True


async def test_the_removal_of_an_object_is_explained(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        removed = RemovedObject(id="8", at=time.time(), bytes=5000, reason="purged")
        evictor = {
            "kind": "evictor",
            "host": "node",
            "process": 1,
            "started": 0,
            "interval": 60,
            "leads": True,
        }
        content = ReportContent(**evictor, removed=[removed])
        await api.context.state.report_process("evictor-1", content.model_dump_json(), 60)
        words = (await operator.query("cache/8"))["words"]
        assert words[1:] == [
            "It was removed 0 s ago: an operator purged it.",
            "The catalog says that it does not exist.",
        ]


async def test_a_catalog_that_does_not_reply_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain_module, "CATALOG_TIMEOUT", 0.1)
    async with operated(tmp_path) as (api, operator):
        never = asyncio.Event()

        async def look_up(object_id: ObjectId) -> None:
            await never.wait()

        monkeypatch.setattr(api.context.catalog, "look_up", look_up)
        told = await operator.query("cache/8")
        assert told["words"][-1] == "The catalog cannot be asked at the moment: no reply within 0.1 s."
        assert told["state"] == "unchecked"


async def test_listings_name_the_path_that_an_id_is_the_digest_of(tmp_path: Path) -> None:
    path = "films/my%20film.mp4?v=1"
    async with operated(tmp_path) as (api, operator):
        state, volume = api.context.state, api.context.volume
        term = await state.lead("evictor", 60.0)
        assert term is not None
        await state.set_reconciled(term)
        ids = [ObjectId.parse_path("films/my%20film.mp4", "v=1"), ObjectId("plain")]
        leases = []
        for object_id in ids:
            record = StoredRecord(object_id, 4, None, None, "video/mp4", 1_700_000_000, name=path)
            partial = volume.open_partial_for_writing(record)
            granted = await state.begin(object_id, 4, "worker")
            assert isinstance(granted, Granted)
            partial.write(0, b"film")
            leases.append((partial, record, granted.lease))
        downloads = (await operator.query("downloads"))["downloads"]
        assert {one["id"]: one["path"] for one in downloads} == {ids[0]: path, "plain": None}
        explained = await operator.query(f"cache/{ids[0]}")
        assert (explained["path"], explained["fetch"]["path"]) == (path, path)
        for partial, record, lease in leases:
            partial.mark_verified()
            partial.publish(record)
            partial.close()
            assert await state.commit(lease, time.time())
        cached = (await operator.query("cache"))["objects"]
        assert {one["id"]: one["path"] for one in cached} == {ids[0]: path, "plain": None}
        assert (await operator.query(f"cache/{ids[0]}"))["path"] == path
        absent = ObjectId.parse_path("absent.mp4", "v=2")
        digests = [str(ids[0]), "plain", str(absent)]  # a digest alone does not tell its path
        for name in ("unpin", "purge", "pin"):
            changed = (await operator.command(name, {"ids": digests}))["objects"]
            assert {one["id"]: one["path"] for one in changed} == {ids[0]: path, "plain": None, absent: None}
        listed = (await operator.query("pins"))["pins"]
        assert {one["id"]: one["path"] for one in listed} == {ids[0]: path, "plain": None, absent: None}
        pinned = (await operator.command("pin", {"ids": [absent.path, "films/my film.mp4?v=1"]}))["objects"]
        assert {one["id"]: one["path"] for one in pinned} == {ids[0]: path, absent: absent.path}
        removed = RemovedObject(id=absent, path=absent.path, at=time.time(), bytes=5000, reason="purged")
        content = ReportContent(
            kind="evictor", host="h", process=1, started=1.0, interval=5.0, removed=[removed]
        )
        await state.report_process("evictor", content.model_dump_json(), 60.0)
        assert (await operator.query(f"cache/{absent}"))["path"] == absent.path


async def test_a_remembered_failure_is_explained_with_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with operated(tmp_path) as (api, operator):
        known = MediaObject(ObjectId("8"), 1000, sources=("http://127.0.0.1:9/8",))

        async def look_up(object_id: ObjectId) -> MediaObject:
            return known

        monkeypatch.setattr(api.context.catalog, "look_up", look_up)
        words = (await operator.query("cache/8"))["words"]
        assert words[-1] == "The catalog knows it, at 1 source: the first request fetches it."
        await api.context.state.record_failure(known.object_id, "502 from the source", 600.0)
        words = (await operator.query("cache/8"))["words"]
        assert words[-2] == "The last fetch failed: 502 from the source. It may be fetched again in 10 min."
        assert re.search(
            r"The failure is remembered until \d\d:\d\d:\d\d UTC, and until then requests are", words[-1]
        )
        known = replace(known, not_stored="Cache-Control: no-store")
        words = (await operator.query("cache/8"))["words"]
        assert (
            words[-1] == "Its origin forbids to store it (Cache-Control: no-store), so it is always proxied."
        )


ORIGIN = {"kind": "origin", "origin": "http://127.0.0.1:9/{id}"}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(["--all"], "all"), (["--bucket", "0:1"], "bucket"), (["--all", "--no-wait"], "all")],
)
async def test_a_catalog_that_cannot_list_needs_ids_to_warm(
    tmp_path: Path, arguments: list[str], field: str
) -> None:
    async with operated(tmp_path, catalog=ORIGIN) as (_, operator):
        done = await command(operator, "warm", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        expected = "expected ids, since the catalog of this node cannot list its objects"
        assert f"409 {field}: {expected}, got {field}\n" in done.stderr
        assert (await operator.query("warm"))["state"] == "none"


async def test_a_command_says_which_objects_it_has_not_warmed(tmp_path: Path) -> None:
    async with operated(tmp_path) as (_, operator):
        done = await command(operator, "warm", *(f"gone{number}" for number in range(13)))
        assert done.returncode == 1
        assert (
            "not fetched: 13 of 13 objects (unknown 13): gone0 (the catalog does not know it), gone1 ("
            in done.stderr
        )
        assert "gone9 (the catalog does not know it), and 3 more\n" in done.stderr
        assert json.loads(done.stdout)["skippedFor"] == {"unknown": 13}


def lists(api: RunningApi, monkeypatch: pytest.MonkeyPatch, *objects: MediaObject) -> None:
    """Have the catalog list these objects. Another look-up of one fails."""

    async def list_objects(assignment: Assignment) -> AsyncIterator[Sequence[MediaObject]]:
        yield objects

    async def look_up(object_id: ObjectId) -> None:
        raise CatalogUnavailable("the squid is away")

    monkeypatch.setattr(api.context.catalog, "list_objects", list_objects)
    monkeypatch.setattr(api.context.catalog, "look_up", look_up)


async def test_a_failed_fetch_is_an_error_of_a_warming_of_all_and_what_cannot_be_cached_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming_module, "_LISTING_RETRY_DELAY", 0.0)
    large = [MediaObject(ObjectId(f"large{number}"), 2**50) for number in range(11)]
    async with operated(tmp_path) as (api, operator):
        lists(api, monkeypatch, *large)
        done = await command(operator, "warm", "--all")
        assert done.returncode == 0
        assert "distributor: not fetched: 11 of 11 objects (too_large 11): large0 (" in done.stderr
        lists(api, monkeypatch, *large, MediaObject(ObjectId("8"), 1000))
        done = await command(operator, "warm", "--all")
        assert done.returncode == 1
        assert "distributor: not fetched: 12 of 12 objects (failed 1, too_large 11): large0 (" in done.stderr
        assert "8 (could not be fetched), and 2 more\n" in done.stderr
        assert json.loads(done.stdout)["failed"] == 1


async def test_a_warming_says_that_it_waits_for_the_end_of_draining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming_module, "_LISTING_RETRY_DELAY", 0.0)
    async with operated(tmp_path) as (api, operator):
        lists(api, monkeypatch, MediaObject(ObjectId("8"), 1000))
        await operator.command("drain", {"on": True})
        warming = asyncio.create_task(command(operator, "warm", "--all"))

        async def waits() -> bool:
            return str((await operator.query("warm"))["reason"]).startswith("the node drains")

        await eventually(waits)
        await asyncio.sleep(1.0)  # two polls of the command
        await operator.command("drain", {"on": False})
        done = await warming
        assert (
            done.stderr.count("distributor: the warming waits: the node drains, until `drain --off`\n") == 1
        )
        assert (await operator.query("warm"))["reason"] == ""


@pytest.mark.parametrize("name", ["purge", "pin", "unpin", "warm", "explain"])
async def test_an_empty_id_is_an_error_before_any_is_sent(tmp_path: Path, name: str) -> None:
    async with operated(tmp_path) as (api, operator):
        given = [""] if name == "explain" else ["7", ""]
        done = await command(operator, name, *given)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.splitlines()[-1] == f'ids[{len(given) - 1}]: expected an object id, got ""'
        assert not await api.context.state.pinned()


async def test_a_bucket_that_does_not_exist_is_not_warmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with operated(tmp_path) as (api, operator):

        async def bucket_ids(worker_id: int | None = None) -> Sequence[str]:
            return ["0:1", "0:2"]

        monkeypatch.setattr(api.context.catalog, "bucket_ids", bucket_ids)
        done = await command(operator, "warm", "--bucket", "9:9")
        assert (done.returncode, done.stdout) == (1, "")
        assert "409 bucket: expected a bucket of the catalog (0:1, 0:2), got 9:9\n" in done.stderr
        assert (await operator.query("warm"))["state"] == "none"
        assert (await command(operator, "warm", "--bucket", "0:1", "--no-wait")).returncode == 0


async def test_a_warming_that_has_ended_early_is_an_error_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming_module, "_LISTING_RETRY_DELAY", 0.0)
    async with operated(tmp_path) as (api, operator):

        def list_objects(assignment: Assignment) -> AsyncIterator[list[MediaObject]]:
            raise CatalogUnavailable("the squid is away")

        monkeypatch.setattr(api.context.catalog, "list_objects", list_objects)
        done = await command(operator, "warm", "--all")
        assert (done.returncode, done.stdout) == (1, "")
        assert "distributor: the warming has ended early: the squid is away\n" in done.stderr


async def test_pins_are_bounded(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        await api.context.state.change_pins(pin=[ObjectId(f"{number}") for number in range(MAX_PINS)])
        assert (await operator.ask("POST", "pin", {"ids": ["7"]})).status == 200
        answer = await operator.ask("POST", "pin", {"ids": ["7", "one-more"]})
        assert (answer.status, answer.json()["type"]) == (400, "too_many_pins")
        assert len(await api.context.state.pinned()) == MAX_PINS


def commands_of(harness: AssetsHarness) -> OperatorCommands:
    context = harness.context
    return OperatorCommands(context.state, context.operator_state, context.catalog, context.volume)


async def test_orders_say_what_each_object_was_found_to_be(tmp_path: Path) -> None:
    states = {
        ObjectId("1"): "stored",
        ObjectId("2"): "fetching",
        ObjectId("3"): "partial",
        ObjectId("4"): "absent",
        ObjectId("5"): "not_uploaded",
        ObjectId("6"): "unknown",
        ObjectId("impossible"): "unknown",
    }
    async with assets_harness(tmp_path) as harness:
        for name in ("1", "2", "3", "4"):
            harness.add(name, 1000)
        harness.store("1")
        await harness.begin("2", 500)
        parked = await harness.begin("3", 500)
        await harness.context.state.park(parked.lease)
        harness.add("5", 1000, accepted=False)
        harness.catalog.impossible = {"impossible"}
        commands = commands_of(harness)
        pinned = await commands.pin(list(states))
        assert (pinned["changed"], pinned["pinned"]) == (7, 7)
        assert pinned["objects"] == [
            {"id": name, "path": None, "state": state, "changed": True} for name, state in states.items()
        ]
        again = await commands.pin([ObjectId("6"), ObjectId("7")])
        assert (again["changed"], again["pinned"]) == (1, 8)
        assert [one["changed"] for one in again["objects"]] == [False, True]
        unpinned = await commands.unpin([ObjectId("8"), ObjectId("1")])
        assert [(one["state"], one["changed"]) for one in unpinned["objects"]] == [
            ("unknown", False),
            ("stored", True),
        ]
        purged = await commands.purge(list(states))
        assert purged["purging"] == 7
        assert purged["objects"] == [
            {"id": name, "path": None, "state": state} for name, state in states.items()
        ]


async def test_pins_are_listed_also_of_objects_that_are_not_here(tmp_path: Path) -> None:
    async with operated(tmp_path) as (api, operator):
        record = StoredRecord(ObjectId("here"), 3, None, None, "text/plain", 0)
        file = api.context.volume.open_partial_for_writing(record)
        file.write(0, b"abc")
        file.mark_verified()
        file.publish(record)
        file.close()
        await operator.command("pin", {"ids": ["nowhere", "7", "here"]})
        assert await operator.query("pins?limit=2") == {
            "pins": [
                {"id": "7", "path": None, "state": "not_uploaded"},
                {"id": "here", "path": None, "state": "stored"},
            ],
            "next": "here",
            "total": 3,
        }
        assert await operator.query("pins?limit=2&after=here") == {
            "pins": [{"id": "nowhere", "path": None, "state": "unknown"}],
            "next": None,
            "total": 3,
        }
        assert (await operator.ask("GET", "pins?limit=0")).status == 400
        listed = await command(operator, "pins", "--not-stored")
        assert [json.loads(line)["id"] for line in listed.stdout.splitlines()] == ["7", "nowhere"]
        assert len((await command(operator, "pins")).stdout.splitlines()) == 3


async def test_a_lookup_that_fails_does_not_hide_that_the_order_was_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with assets_harness(tmp_path) as harness:
        harness.add("1", 1000)
        look_up = harness.catalog.look_up

        async def fail_for_two(object_id: ObjectId) -> MediaObject | None:
            if object_id == "2":
                raise RuntimeError("a mistake")
            return await look_up(object_id)

        monkeypatch.setattr(harness.catalog, "look_up", fail_for_two)
        pinned = await commands_of(harness).pin([ObjectId("1"), ObjectId("2")])
        assert [(one["state"], one["changed"]) for one in pinned["objects"]] == [
            ("absent", True),
            ("unchecked", True),
        ]


async def test_orders_need_no_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands_module, "_LOOKUP_TIMEOUT", 0.2)
    async with assets_harness(tmp_path) as harness:
        harness.add("1", 1000)
        harness.catalog.down = True
        pinned = await commands_of(harness).pin([ObjectId("1")])
        assert (pinned["changed"], pinned["objects"][0]["state"]) == (1, "unchecked")
        harness.catalog.down, harness.catalog.delay = False, 3600
        purged = await commands_of(harness).purge([ObjectId("1")])
        assert purged == {"purging": 1, "objects": [{"id": "1", "path": None, "state": "unchecked"}]}
        assert [one.object_id for one in await harness.context.state.pending_purges(10)] == ["1"]
