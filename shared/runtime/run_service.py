"""Runs a service: event loop, signals, resources, shutdown deadline, exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import uvloop

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.observability.logging import change_log_level, configure_logging
from distributor_node.shared.runtime import systemd
from distributor_node.shared.runtime.process import VERSION, raise_descriptor_limit
from distributor_node.shared.settings.load import load_settings
from distributor_node.shared.settings.model import Settings
from distributor_node.shared.waiting import cancel_and_wait

CLEAN, FAILED, MISCONFIGURED = 0, 1, 2  # exit codes
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_IGNORED = (signal.SIGUSR1, signal.SIGUSR2)
_CLEANUP_GRACE = 5.0  # seconds after the deadline before the process is killed

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ServiceScope:
    """What a service's main gets."""

    stop_requested: asyncio.Event  # set by the first SIGTERM, SIGINT or SIGQUIT, or by the service itself
    resources: AsyncExitStack  # closed in reverse order after main has ended, within the deadline
    reloads: list[Callable[[], Awaitable[None]]] = field(default_factory=list)
    """Called in this order at a SIGHUP. Each logs what it has done, and raises nothing."""


ServiceMain = Callable[[ServiceScope], Awaitable[None]]
"""Opens what it needs, works until `stop_requested` is set, shuts down gracefully and returns."""


def run_service(
    main: ServiceMain, *, name: str, settings: Settings, shutdown_deadline: float | None = None
) -> int:
    """Run `main` on uvloop until it returns, and return the exit code. `name` is on every line of the log.

    `shutdown_deadline`: seconds, by default those of the settings.

    Exit codes: 0 after a clean end, 1 after an error or a missed deadline, 2 after a ConfigurationError. How it stops:

    1. The first SIGTERM, SIGINT or SIGQUIT sets `stop_requested`.
    2. Main and the closing of its resources have `shutdown_deadline` seconds. Then they are cancelled.
    3. 5 s later a watchdog thread kills the process, in case the event loop or a thread is blocked. The watchdog also
       starts if main requests the stop, returns or fails by itself.

    A second signal kills the process at once. SIGHUP reads the log level again, from the settings' file and
    the environment, and calls `ServiceScope.reloads`. SIGUSR1 and SIGUSR2 are logged, and have no other effect.
    """
    process = {"service": name, "node": settings.id, "version": VERSION}
    configure_logging(settings.log.level, settings.log.format, process=process)
    deadline = settings.shutdown_deadline if shutdown_deadline is None else shutdown_deadline
    run = _Run(main, name, deadline, settings.file)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run.run())
    finally:
        run.cancel_watchdog()


class _Run:
    def __init__(
        self, main: ServiceMain, name: str, shutdown_deadline: float, settings_file: Path | None
    ) -> None:
        self._settings_file = settings_file
        self._reload: asyncio.Task[None] | None = None
        self._main, self._name, self._shutdown_deadline = main, name, shutdown_deadline
        self._signals = 0
        self._watchdog: threading.Timer | None = None

    async def run(self) -> int:
        scope = ServiceScope(asyncio.Event(), AsyncExitStack())
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_log_loop_error)
        for number in _STOPS:
            loop.add_signal_handler(number, self._on_signal, number, scope.stop_requested)
        loop.add_signal_handler(signal.SIGHUP, self._on_reload, scope)
        for number in _IGNORED:
            loop.add_signal_handler(number, self._ignore, number)
        logger.info("service_started", service=self._name, process=os.getpid())
        work = asyncio.create_task(self._work(scope), name=f"{self._name}-main")
        stop = asyncio.create_task(scope.stop_requested.wait(), name=f"{self._name}-stop")
        try:
            async with systemd.watchdog():
                await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            systemd.notify(systemd.STOPPING)
            self._start_watchdog()
            if not work.done():
                await asyncio.wait({work}, timeout=self._shutdown_deadline)
            return await self._finish(work)
        finally:
            stop.cancel()
            if self._reload is not None:
                await cancel_and_wait(self._reload)
            for number in (*_STOPS, *_IGNORED, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def cancel_watchdog(self) -> None:
        """The event loop has ended: the watchdog is not needed any more."""
        if self._watchdog is not None:
            self._watchdog.cancel()

    async def _work(self, scope: ServiceScope) -> None:
        async with scope.resources:
            try:
                raise_descriptor_limit()
                await self._main(scope)
            finally:
                self._start_watchdog()  # closing the resources has the same deadline

    async def _finish(self, work: asyncio.Task[None]) -> int:
        if not work.done():
            logger.error("shutdown_deadline_exceeded", service=self._name, seconds=self._shutdown_deadline)
            work.cancel()
            await asyncio.wait({work}, timeout=_CLEANUP_GRACE)
            return FAILED
        if work.cancelled():
            logger.error("service_cancelled", service=self._name)
            return FAILED
        error = work.exception()
        rejected = _find_configuration_error(error)
        if rejected is not None:
            logger.error("settings_rejected", service=self._name, reason=str(rejected))
            return MISCONFIGURED
        if error is not None:
            logger.error("service_failed", service=self._name, exc_info=error)
            return FAILED
        logger.info("service_stopped", service=self._name)
        return CLEAN

    def _on_signal(self, number: signal.Signals, stop_requested: asyncio.Event) -> None:
        self._signals += 1
        if self._signals > 1:
            logger.warning("killed_by_second_signal", service=self._name, signal=number.name)
            os._exit(128 + number)
        logger.info(
            "shutdown_requested", service=self._name, signal=number.name, deadline=self._shutdown_deadline
        )
        stop_requested.set()
        self._start_watchdog()

    def _ignore(self, number: signal.Signals) -> None:
        logger.info("signal_ignored", service=self._name, signal=number.name)

    def _on_reload(self, scope: ServiceScope) -> None:
        """Reload in a task. A SIGHUP during a reload is answered by another one after it."""
        self._reload = asyncio.create_task(self._run_reload(scope, self._reload), name="reload")

    async def _run_reload(self, scope: ServiceScope, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await asyncio.wait({previous})
        logger.info("reload_started", service=self._name)
        try:
            read = await asyncio.to_thread(load_settings, self._settings_file)
        except ConfigurationError as error:
            logger.error("settings_rejected", service=self._name, reason=str(error))
        else:
            change_log_level(read.log.level)
            logger.info("log_level_read", level=read.log.level)
        for reload in scope.reloads:
            await reload()
        logger.info("reload_ended", service=self._name)

    def _start_watchdog(self) -> None:
        """Kill the process after the deadline, even if the event loop is blocked."""
        if self._watchdog is None:
            self._watchdog = threading.Timer(self._shutdown_deadline + _CLEANUP_GRACE, os._exit, (FAILED,))
            self._watchdog.daemon = True
            self._watchdog.start()


def _find_configuration_error(error: BaseException | None) -> ConfigurationError | None:
    """Return the ConfigurationError that ended main, also from inside a TaskGroup. None if anything else failed too."""
    if isinstance(error, BaseExceptionGroup):
        inner = [_find_configuration_error(one) for one in error.exceptions]
        return inner[0] if all(one is not None for one in inner) else None
    return error if isinstance(error, ConfigurationError) else None


def _log_loop_error(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    logger.error(
        "unhandled_loop_error", message=context.get("message", ""), exc_info=context.get("exception")
    )


async def run_until(stop_requested: asyncio.Event, serving: Coroutine[Any, Any, None], name: str) -> None:
    """Run `serving` until `stop_requested`, then cancel it and wait for its end. Raises the error it ended with."""
    task = asyncio.create_task(serving, name=f"{name}-serve")
    stop = asyncio.create_task(stop_requested.wait(), name=f"{name}-stop")
    try:
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel_and_wait(task, stop)
    if not task.cancelled():
        task.result()
