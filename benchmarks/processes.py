"""Processes of one run: on free ports, with logs in its folder, killed at its end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

_STOP_SECONDS = 15.0


class OwnProcess:
    """A process in a session of its own. The kernel kills it if this one dies (PR_SET_PDEATHSIG, by setpriv)."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._command = ["setpriv", "--pdeathsig", "KILL", "--", *command]
        self._environment = {**os.environ, **(environment or {})}
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    def wait_listening(self, port: int, seconds: float = 30.0) -> Self:
        """Return when the port takes connections; RuntimeError with the log's end if it does not in time."""
        deadline = time.monotonic() + seconds
        while not _listens(port):
            self.check(deadline)
            time.sleep(0.01)
        return self

    def check(self, deadline: float) -> None:
        """RuntimeError if the process has ended, or the (monotonic) deadline has passed."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"{self.name} ended:\n{self.tail()}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{self.name} is not ready in time:\n{self.tail()}")

    def stop(self) -> None:
        """SIGTERM to the process and its children; SIGKILL if that is not heard."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(_STOP_SECONDS)

    def kill(self) -> None:
        """SIGKILL to the process and its children."""
        if self._process is not None:
            process, self._process = self._process, None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_STOP_SECONDS)

    def log_text(self) -> str:
        """All that it has written so far."""
        return self._log.read_text(errors="replace")

    def tail(self) -> str:
        return self.log_text()[-3000:]


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
