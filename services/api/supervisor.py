"""Several API processes on one port: starts them, replaces those that die, ends them together.

Each worker is a fresh interpreter (services/api/worker.py), in a session of its own, so that a Ctrl-C reaches the
supervisor alone. It reads its settings from its standard input; the end of that pipe tells it that the supervisor
is gone, however that died.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from pydantic import SecretStr

from distributor_node.services.api.listen import ListenAddress, bind
from distributor_node.services.api.main import MISCONFIGURED, SHUTDOWN_ORDERED, run_checked
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.multiprocess import forget_process, prepare_multiprocess
from distributor_node.shared.runtime.run_service import ServiceScope
from distributor_node.shared.settings.model import Settings

_MIN_RESTART_DELAY, _MAX_RESTART_DELAY = 0.5, 10.0
_STABLE_AFTER = 30.0
_SHUTDOWN_MARGIN = 5.0
PORT_RETRY_INTERVAL = 0.25
"""Seconds between two looks at a port that a predecessor's workers are leaving."""

logger = structlog.get_logger()


def run_supervisor(settings: Settings) -> int:
    """Run `public_api.workers` workers until a signal; 0 if all of them ended in good order."""
    prepare_multiprocess(settings.metrics.multiprocess_dir)

    async def main(scope: ServiceScope) -> None:
        await supervise(scope.stop_requested, settings)

    return run_checked(main, "api-supervisor", settings.shutdown_deadline + _SHUTDOWN_MARGIN, settings)


async def supervise(stop_requested: asyncio.Event, settings: Settings) -> None:
    """Keep the workers running. ConfigurationError if the port is taken, or a worker says its settings cannot work."""
    with ExitStack() as ports:
        public, operator = settings.public_api, settings.operator_api
        timeout = settings.shutdown_deadline + _SHUTDOWN_MARGIN
        reserved = await reserve_port(ListenAddress(public.host, public.port), timeout, stop_requested)
        port = ports.enter_context(reserved).getsockname()[1]
        operator_port = operator.port
        if operator.secret is not None:
            address = ListenAddress(operator.host, operator.port, setting="operator_api")
            reserved = await reserve_port(address, timeout, stop_requested)
            operator_port = ports.enter_context(reserved).getsockname()[1]
        settings_json = worker_settings(settings, port, operator_port)
        workers = [
            Worker(number, settings_json, settings.shutdown_deadline)
            for number in range(1, public.workers + 1)
        ]
        logger.info("workers_starting", workers=len(workers), port=port)
        tasks = [
            asyncio.create_task(worker.keep_running(stop_requested), name=f"api-worker-{worker.number}")
            for worker in workers
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def reserve_port(
    address: ListenAddress, timeout: float, stop_requested: asyncio.Event
) -> socket.socket:
    """Bound but not listening: keeps the port ours while no worker has it, and gets no connections.

    Workers of a supervisor that was killed a moment ago may be ending their answers still: they are waited for, so many
    seconds. Anybody else who has the port is a ConfigurationError at once.
    """
    deadline, port, logged = time.monotonic() + timeout, None, False
    while port is None:
        try:
            port = _exclusive_port(address)
        except ConfigurationError:
            if stop_requested.is_set() or time.monotonic() >= deadline or not _held_by_own_workers(address):
                raise
            if not logged:
                logged = True
                logger.warning("waiting_for_port", setting=f"{address.setting}.port", port=address.port)
            await asyncio.sleep(PORT_RETRY_INTERVAL)
    return bind(replace(address, port=port, shared=True))


def _exclusive_port(address: ListenAddress) -> int:
    """The port, if nobody has it. Without SO_REUSEPORT: with it, a foreign process of the same user could share it
    unnoticed."""
    with bind(address) as probe:
        port: int = probe.getsockname()[1]
    return port


def _held_by_own_workers(address: ListenAddress) -> bool:
    """Whether who has the port shares it with this user, as workers do."""
    try:
        bind(replace(address, shared=True)).close()
    except ConfigurationError:
        return False
    return True


class Worker:
    """One worker, and its successors. `settings_json`: its settings; `deadline`: seconds that it may take to end."""

    def __init__(self, number: int, settings_json: bytes, deadline: float) -> None:
        self.number = number
        self._settings_json = settings_json
        self._deadline = deadline
        self._restart_delay = _MIN_RESTART_DELAY

    async def keep_running(self, stop_requested: asyncio.Event) -> None:
        """Until stop is requested; RuntimeError if the worker then does not end in good order."""
        stop = asyncio.create_task(stop_requested.wait(), name=f"api-worker-{self.number}-stop")
        try:
            while not stop.done():
                started = time.monotonic()
                process = await self._start()
                try:
                    await self._run(process, stop)
                finally:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                    forget_process(process.pid)
                if process.returncode == SHUTDOWN_ORDERED:
                    stop_requested.set()
                    return
                if not stop.done():
                    await self._delay_restart(process, time.monotonic() - started, stop)
        finally:
            stop.cancel()

    async def _start(self) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "distributor_node.services.api.worker",
            stdin=PIPE,
            start_new_session=True,
        )
        if process.stdin is None:
            raise RuntimeError("a worker without a standard input")
        process.stdin.write(self._settings_json)
        logger.info("worker_started", worker=self.number, process=process.pid)
        return process

    async def _run(self, process: Process, stop: asyncio.Task[bool]) -> None:
        ended = asyncio.create_task(process.wait(), name=f"api-worker-{self.number}-process")
        await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            return
        process.send_signal(signal.SIGTERM)
        await asyncio.wait({ended}, timeout=self._deadline + _SHUTDOWN_MARGIN / 2)
        if not ended.done():
            process.kill()
        # Ended by the signal itself: it had not begun to serve.
        if await ended not in (0, SHUTDOWN_ORDERED, -signal.SIGTERM):
            raise RuntimeError(f"worker {self.number} ended with {process.returncode}")

    async def _delay_restart(self, process: Process, uptime: float, stop: asyncio.Task[bool]) -> None:
        if process.returncode == MISCONFIGURED:
            raise ConfigurationError(f"worker {self.number} cannot start with these settings")
        self._restart_delay = (
            _MIN_RESTART_DELAY if uptime > _STABLE_AFTER else min(self._restart_delay * 2, _MAX_RESTART_DELAY)
        )
        logger.error("worker_died", worker=self.number, code=process.returncode, pause=self._restart_delay)
        await asyncio.wait({stop}, timeout=self._restart_delay)


def worker_settings(settings: Settings, port: int, operator_port: int) -> bytes:
    """One line of JSON, secrets in clear: it goes through a pipe, never through arguments or the environment."""
    fields = settings.model_dump()
    fields["public_api"]["port"] = port
    fields["operator_api"]["port"] = operator_port
    return json.dumps(fields, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a setting of type {type(value).__name__} cannot be handed to a worker")
