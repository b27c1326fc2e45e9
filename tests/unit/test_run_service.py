"""A service starts, shuts down on the first signal, ends at once on the second, and keeps its deadline."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import asyncio, sys, time
from distributor_node.shared.domain.errors import ConfigurationError
from distributor_node.shared.runtime import ServiceScope, run_service
from distributor_node.shared.settings.model import Settings

async def main(scope):
    scope.resources.push_async_callback(closing)
    print("open", flush=True)
{body}

async def closing():
    print("closed", flush=True)

settings = Settings(id="here", shutdown_deadline=0.3, catalog={{"manifest": "objects.yaml"}})
sys.exit(run_service(main, name="sample", settings=settings))
"""


@contextmanager
def service(body: str, script: str = SCRIPT) -> Iterator[subprocess.Popen[bytes]]:
    script = script.format(body="\n".join("    " + line for line in body.splitlines()))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[bytes]) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, what was printed, what was logged."""
    printed, logged = process.communicate(timeout=40)
    return process.returncode, printed.decode(), [json.loads(line) for line in logged.splitlines()]


def test_the_first_signal_shuts_down_gracefully() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with service("await scope.stop_requested.wait()\nprint('drained', flush=True)") as process:
            process.send_signal(number)
            code, printed, log = end(process)
        assert (code, printed) == (0, "drained\nclosed\n")
        assert [line["event"] for line in log] == ["service_started", "shutdown_requested", "service_stopped"]


def test_main_may_return_by_itself() -> None:
    with service("return") as process:
        code, printed, _ = end(process)
    assert (code, printed) == (0, "closed\n")


def test_an_error_is_logged_and_resources_are_closed() -> None:
    with service("raise OSError('torn')") as process:
        code, printed, log = end(process)
    assert (code, printed) == (1, "closed\n")
    assert log[-1]["event"] == "service_failed"
    assert "OSError: torn" in log[-1]["exception"]


def test_refused_settings_are_a_message_and_exit_code_2() -> None:
    with service("raise ConfigurationError('storage.path: not writable')") as process:
        code, _, log = end(process)
    assert code == 2
    assert log[-1]["reason"] == "storage.path: not writable"
    assert "exception" not in log[-1]


def test_a_task_past_the_deadline_is_cancelled() -> None:
    with service("await asyncio.Event().wait()") as process:
        process.send_signal(signal.SIGTERM)
        code, printed, log = end(process)
    assert (code, printed) == (1, "closed\n")
    assert log[-1]["event"] == "shutdown_deadline_exceeded"


def test_the_second_signal_kills_immediately() -> None:
    body = "await scope.stop_requested.wait()\nprint('stopping', flush=True)\nawait asyncio.Event().wait()"
    with service(body) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGINT)
        code, printed, _ = end(process)
    assert (code, printed) == (128 + signal.SIGINT, "")


def test_a_hanging_loop_is_terminated_from_outside() -> None:
    body = (
        "sys.modules['distributor_node.shared.runtime.run_service']._CLEANUP_GRACE = 0.2\n"
        "await scope.stop_requested.wait()\n"
        "time.sleep(3600)"
    )
    with service(body) as process:
        process.send_signal(signal.SIGTERM)
        code, _, _ = end(process)
    assert code == 1


@pytest.mark.parametrize("ending", ["return", "raise OSError('torn')", "scope.stop_requested.set()"])
def test_a_hanging_thread_does_not_delay_any_shutdown(ending: str) -> None:
    body = (
        "sys.modules['distributor_node.shared.runtime.run_service']._CLEANUP_GRACE = 0.2\n"
        "asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)\n"
        f"{ending}"
    )
    with service(body) as process:
        code, _, _ = end(process)
    assert code == 1


def test_sigquit_drains_too() -> None:
    with service("await scope.stop_requested.wait()\nprint('drained', flush=True)") as process:
        process.send_signal(signal.SIGQUIT)
        code, printed, _ = end(process)
    assert (code, printed) == (0, "drained\nclosed\n")


def test_signals_without_a_meaning_are_logged_and_ignored() -> None:
    with service("await scope.stop_requested.wait()") as process:
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
            assert process.stderr is not None
            while b"signal_ignored" not in process.stderr.readline():
                pass
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0


def test_sighup_reads_the_log_level_again_and_what_the_service_reloads(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("catalog: {manifest: objects.yaml}\nlog: {level: warning}\n")
    body = """
import structlog
logger = structlog.get_logger()
async def reload():
    logger.debug("sample_reloaded")
scope.reloads.append(reload)
await scope.stop_requested.wait()
"""
    script = SCRIPT.replace(
        'Settings(id="here", shutdown_deadline=0.3, catalog={{"manifest": "objects.yaml"}})',
        f"load_settings(Path({str(settings)!r}))",
    ).replace(".model import Settings", ".load import load_settings\nfrom pathlib import Path")
    with service(body, script) as process:
        assert process.stderr is not None
        settings.write_text("log: {level: nonsense}\n")
        process.send_signal(signal.SIGHUP)
        assert b"settings_rejected" in process.stderr.readline()
        settings.write_text("catalog: {manifest: objects.yaml}\nlog: {level: debug}\n")
        process.send_signal(signal.SIGHUP)
        said = [json.loads(process.stderr.readline())["event"] for _ in range(3)]
        assert said == ["log_level_read", "sample_reloaded", "reload_ended"]
        process.send_signal(signal.SIGTERM)
        assert end(process)[0] == 0
