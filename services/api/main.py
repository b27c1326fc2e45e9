"""`run`: the API as one process, or as several that share the port.

Imports are late here: the process that starts the workers must choose multiprocess metrics before anything imports
prometheus_client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import structlog

from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime.run_service import ServiceScope, run_service
from distributor_node.shared.settings.model import Settings

MISCONFIGURED = 2
"""Exit code when settings that looked right cannot work: a taken port, a manifest that is none. Do not restart."""

SHUTDOWN_ORDERED = 3
"""Exit code of a worker that ended because an operator has ordered the whole node to; the supervisor then ends too,
with code 0."""

logger = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serve until a signal; the exit code."""
    if settings.public_api.workers > 1:
        from distributor_node.services.api.supervisor import run_supervisor  # noqa: PLC0415

        return run_supervisor(settings)
    return run_worker(settings, shared_port=False)


def run_worker(settings: Settings, *, shared_port: bool) -> int:
    """Serve in this process. `shared_port`: as one of the supervisor's workers."""
    from distributor_node.services.api.service import run_api  # noqa: PLC0415

    operator_shutdown = False

    async def main(scope: ServiceScope) -> None:
        nonlocal operator_shutdown
        operator_shutdown = await run_api(scope, settings, shared_port=shared_port)

    code = run_checked(main, "api", settings.shutdown_deadline, settings)
    return SHUTDOWN_ORDERED if code == 0 and operator_shutdown and shared_port else code


def run_checked(
    main: Callable[[ServiceScope], Awaitable[None]], name: str, shutdown_deadline: float, settings: Settings
) -> int:
    """`run_service`, with an exit code (and a log line without traceback) for a ConfigurationError."""
    misconfigured = False

    async def checked(scope: ServiceScope) -> None:
        nonlocal misconfigured
        try:
            await main(scope)
        except ConfigurationError as error:
            misconfigured = True
            logger.error("settings_rejected", service=name, reason=str(error))

    code = run_service(checked, name=name, shutdown_deadline=shutdown_deadline, log=settings.log)
    return MISCONFIGURED if misconfigured else code
