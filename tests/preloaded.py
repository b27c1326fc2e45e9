"""Processes of the command line that are forked from one which has imported what they need, and so start sooner.

The tests start more than a thousand processes, and most of the CPU time that each needs to be ready is that
of the same imports. Nothing of ours is opened or decided at import, with one exception: where prometheus-client keeps
its metrics. So this is for services of one process, and an API with several workers is executed.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

_PRELOADED = [
    "anyio._backends._asyncio",
    "distributor_node.services.api.service",
    "distributor_node.services.api.worker",
    "distributor_node.services.command_line.main",
    "distributor_node.services.evictor.main",
    "distributor_node.services.fetcher.main",
    "distributor_node.services.standalone.main",
    "distributor_node.shared.adapters.catalogs.joystream",
    "distributor_node.shared.adapters.catalogs.manifest",
    "distributor_node.shared.adapters.catalogs.origin",
]

_POLL_INTERVAL = 0.02  # seconds
_lock = threading.Lock()
"""The exit code is read from a pipe, once. To start a process reads those of all that have ended."""

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_PRELOADED)


class PreloadedProcess:
    """`distributor …` in a session of its own. The methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
        folder: Path | None = None,
        standard_input: Path = Path(os.devnull),
    ) -> None:
        """`log`: where its output is appended. It is there from the beginning. `errors`: likewise for standard error;
        None: it goes to `log`. `folder`: its working directory.
        """
        log.touch()
        files = str(standard_input), str(log), str(errors or log)
        self._process = _forks.Process(
            target=_run,
            args=(list(arguments), dict(environment), files, str(folder or Path.cwd())),
            daemon=True,
        )
        with _lock:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.returncode: int | None = None  # as of the last `poll` or `wait`; negative: a signal

    def poll(self) -> int | None:
        with _lock:
            self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("distributor", timeout or 0.0)
            time.sleep(_POLL_INTERVAL)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # the fork server has reaped it, and tells so a moment later
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_preloaded(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    standard_input: str = "",
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """Run `distributor …` to its end, as subprocess.run does. `timeout`: in seconds; it is killed then."""
    with TemporaryDirectory() as place:
        given, output, errors = (Path(place) / name for name in ("input", "output", "errors"))
        given.write_text(standard_input)
        process = PreloadedProcess(arguments, environment, output, errors, folder, given)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(
            ["distributor", *arguments], code, output.read_text(), errors.read_text()
        )


def _run(arguments: list[str], environment: dict[str, str], files: tuple[str, str, str], folder: str) -> None:
    """The life of the forked process. Ends by SystemExit. `files`: standard input, standard output, standard error."""
    os.setsid()
    os.chdir(folder)
    for standard, path in enumerate(files):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT if standard else os.O_RDONLY, 0o644)
        os.dup2(file, standard)
        os.close(file)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()  # otherwise all processes would choose alike
    sys.argv = ["distributor", *arguments]
    from distributor_node.services.command_line.main import main

    main()
