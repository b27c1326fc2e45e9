"""The supervisor sees a worker that hangs, says where it hangs, and replaces it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from distributor_node.services.api.supervisor import HEARTBEAT_INTERVAL, STACK_SIGNAL, HeartbeatReader
from tests.chaos.watchers import process_tree
from tests.end_to_end.client import get
from tests.end_to_end.stack import Stack
from tests.waiting import eventually

HANGING = """
import asyncio, sys, time
from distributor_node.services.api.worker import send_heartbeat

async def main():
    beating = asyncio.create_task(send_heartbeat(int(sys.argv[1])))
    await asyncio.sleep(1)
    hangs_here()

def hangs_here():
    time.sleep(3600)

asyncio.run(main())
"""


async def test_silence_is_noticed_and_the_stack_of_the_loop_is_read() -> None:
    async with HeartbeatReader() as heartbeat:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HANGING, str(heartbeat.write_end), pass_fds=(heartbeat.write_end,)
        )
        try:
            heartbeat.close_write_end()
            async with asyncio.timeout(60):
                await heartbeat.wait_silent(4 * HEARTBEAT_INTERVAL)
            process.send_signal(STACK_SIGNAL)
            assert "in hangs_here" in await heartbeat.read_stack()
            assert process.returncode is None
        finally:
            process.kill()
            await process.wait()


async def test_a_worker_that_beats_is_never_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    interval = HEARTBEAT_INTERVAL / 5
    monkeypatch.setattr("distributor_node.services.api.supervisor.HEARTBEAT_INTERVAL", interval)
    async with HeartbeatReader() as heartbeat:
        waiting = asyncio.create_task(heartbeat.wait_silent(4 * interval))
        for _ in range(10):
            os.write(heartbeat.write_end, b".")
            await asyncio.sleep(interval)
        assert not waiting.done()
        heartbeat.close_write_end()  # the worker has ended: its exit code says so
        await asyncio.wait({waiting}, timeout=5 * interval)
        assert not waiting.done()
        waiting.cancel()


@pytest.mark.servers
async def test_a_stopped_worker_is_replaced_and_signals_reach_all_workers(
    tmp_path: Path, redis_url: str, amqp_url: str
) -> None:
    stack = Stack(tmp_path, redis_url, amqp_url, f"hung-{uuid.uuid4().hex[:8]}")
    stack.write_manifest([], [])
    stack.volume.mkdir()
    try:
        supervisor = stack.add(
            "api", DISTRIBUTOR_PUBLIC_API__WORKERS="2", DISTRIBUTOR_PUBLIC_API__HANG_TIMEOUT="3"
        )
        assert supervisor.process is not None
        await eventually(lambda: events_of(supervisor.log, "server_listening") == 2, 90)
        first, second = process_tree(supervisor.process.pid)[1:]
        os.kill(first, signal.SIGSTOP)
        await eventually(lambda: '"event": "worker_hung"' in supervisor.tail(), 60)

        def replaced() -> bool:
            assert supervisor.process is not None
            workers = process_tree(supervisor.process.pid)[1:]
            return len(workers) == 2 and first not in workers and second in workers

        await eventually(replaced, 60)
        events = [json.loads(line) for line in supervisor.log.read_text().splitlines() if line[:1] == "{"]
        hung = next(event for event in events if event["event"] == "worker_hung")
        assert (hung["process"], hung["level"]) == (first, "error")
        await eventually(lambda: events_of(supervisor.log, "server_listening") == 3, 60)
        metrics = (await get(f"{supervisor.health_url}/metrics")).body.decode()
        assert "distributor_api_workers_hung_total 1.0" in metrics

        supervisor.send(signal.SIGHUP)
        await eventually(lambda: events_of(supervisor.log, "manifest_reloaded") == 2, 30)
        await eventually(lambda: events_of(supervisor.log, "certificates_read") == 2, 30)
        supervisor.send(signal.SIGUSR1)
        await eventually(lambda: events_of(supervisor.log, "signal_ignored") == 1, 30)
        supervisor.send(signal.SIGQUIT)
        assert await asyncio.to_thread(supervisor.process.wait, 60) == 0
    finally:
        stack.kill_all()


def events_of(log: Path, event: str) -> int:
    return log.read_text().count(f'"event": "{event}"')
