"""foreground.py COMMAND…: run a command so that Ctrl-C reaches it alone.

Under `make`, Ctrl-C goes to make as well, which then reports a failure although the command stopped cleanly.
On a terminal the command therefore gets a process group of its own, in the foreground. Elsewhere nothing is changed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def owns_terminal() -> bool:
    """Whether this process group is what the terminal on stdin listens to."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def run_in_foreground(command: list[str]) -> int:
    """Run `command` as the terminal's foreground process group; its exit code, or 128 + signal."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # taking the terminal back is done from the background
    with subprocess.Popen(command, process_group=0) as child:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda received, _frame: child.send_signal(received))
        os.tcsetpgrp(0, child.pid)
        code = child.wait()
    os.tcsetpgrp(0, os.getpgrp())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if owns_terminal():
        sys.exit(run_in_foreground(sys.argv[1:]))
    os.execvp(sys.argv[1], sys.argv[1:])
