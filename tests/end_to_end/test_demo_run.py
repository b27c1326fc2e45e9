"""`make run`: the demo node, on either catalog."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.servers.redis_server import free_port


@pytest.mark.parametrize("catalog", ["manifest", "joystream"])
def test_a_demo_node_answers_as_it_says(tmp_path: Path, catalog: str) -> None:
    arguments = ["--catalog", catalog, "--port", str(free_port()), "--data", str(tmp_path)]
    demo = subprocess.Popen(
        [sys.executable, "-m", "distributor_node.services.demo_run", *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert demo.stdout is not None
        said: list[str] = []
        for line in demo.stdout:  # ends with the process, at the latest
            said.append(line)
            if line.strip().startswith("curl -sD - -o /dev/null http"):
                break
        url = said[-1].split()[-1]
        with urlopen(url, timeout=20) as answer:
            assert (answer.status, answer.headers["X-Cache"]) == (200, "miss")
            assert answer.headers["Content-Type"].startswith("image/")
            assert len(answer.read()) == int(answer.headers["Content-Length"])
        assert any("Demo squid" in line for line in said) == (catalog == "joystream")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(30) == 0
    finally:
        demo.kill()
        demo.wait(10)
        if demo.stdout is not None:
            demo.stdout.close()
