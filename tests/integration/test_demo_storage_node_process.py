"""The demo storage node as a process: port, manifest, speed of a long response, shutdown."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import httpx
import yaml


async def test_the_process_prints_its_port_writes_a_manifest_and_stops_on_sigterm(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.yaml"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "distributor_node.services.demo.storage_node", "--port", "0", "--print-port",
        "--write-manifest", str(manifest), "--node-url", "http://127.0.0.1:1",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            port = int(await process.stdout.readline())
        listed = yaml.safe_load(manifest.read_text())
        assert listed["base_urls"] == [f"http://127.0.0.1:{port}/api/v1/files/"]
        async with httpx.AsyncClient(timeout=20) as client:
            wanted = {"Range": "bytes=1000000000-1000000099"}
            answer = await client.get(listed["base_urls"][0] + "1024", headers=wanted)
            assert (answer.status_code, len(answer.content)) == (206, 100)
            assert (await client.get(f"http://127.0.0.1:{port}/requests")).json()["requests"][0][
                "bytes_sent"
            ] == 100
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            _, log = await process.communicate()
        assert process.returncode == 0, log.decode()
        assert b"storage_node_stopped" in log
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
