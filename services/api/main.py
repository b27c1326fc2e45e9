"""Entry point of the API service: one process, or a supervisor with several workers that share the port.

Imports are late: the supervisor must choose multiprocess metrics before anything imports prometheus_client.
"""

from __future__ import annotations

from distributor_node.shared.runtime.run_service import ServiceScope, run_service
from distributor_node.shared.runtime.systemd import PUBLIC_SOCKET, activated_socket
from distributor_node.shared.settings.model import Settings


def run(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code."""
    if settings.public_api.workers > 1:
        from distributor_node.services.api.supervisor import run_supervisor  # noqa: PLC0415

        return run_supervisor(settings)
    from distributor_node.services.api.service import run_api  # noqa: PLC0415

    async def main(scope: ServiceScope) -> None:
        await run_api(scope, settings, listener=activated_socket(PUBLIC_SOCKET))

    return run_service(main, name="api", settings=settings)
