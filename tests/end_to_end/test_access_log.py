"""The access log of a whole node, with all its ways to answer, read as tools read it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from distributor_node.services.demo.objects import MIB, generated_object
from tests.end_to_end.client import exchange, get
from tests.end_to_end.conftest import Harness
from tests.unit.test_access_log import COMBINED
from tests.waiting import eventually

BODY = 2 * MIB


async def test_every_response_is_one_line_of_the_access_log(alone: Harness, tmp_path: Path) -> None:
    alone.publish([generated_object("1", BODY), generated_object("2", 1000)])
    log = tmp_path / "access.log"
    node = alone.stack.add(
        "standalone", DISTRIBUTOR_LOG__ACCESS="combined", DISTRIBUTOR_LOG__ACCESS_FILE=str(log)
    )
    await node.healthy()
    agent = {"User-Agent": 'Mozilla/5.0 "quoted"', "Referer": "https://page.example/"}
    await get(alone.stack.url("1"))
    await alone.stack.until_hit("1")

    def recorded() -> list[str]:
        """Lines of the requests below: those that filled the cache name no agent, and none of them is a 400."""
        lines = log.read_text("ascii").splitlines() if log.exists() else []
        return [line for line in lines if "quoted" in line or '" 400 ' in line]

    await get(alone.stack.url("1"), agent)
    await get(alone.stack.url("1"), {**agent, "Range": "bytes=0-99"})
    await get(alone.stack.url("1"), agent, method="HEAD")
    await get(alone.stack.url("unknown"), agent)
    await get(alone.stack.url("2"), agent)
    host, port = "127.0.0.1", int(alone.stack.url("1").split(":")[2].split("/")[0])
    await exchange(host, port, b"GET /\xff\x01 HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: len(recorded()) >= 6)
    lines = recorded()
    found = [COMBINED.fullmatch(line) for line in lines]
    assert len(found) == 6
    assert all(found), lines
    seen = [(match["status"], match["bytes"]) for match in found if match]
    assert seen[:3] == [("200", str(BODY)), ("206", "100"), ("200", "0")]
    assert seen[3][0] == "404"
    assert seen[4] == ("200", "1000")
    assert seen[5][0] == "400"
    assert {match["referer"] for match in found[:5] if match} == {"https://page.example/"}
    assert {match["agent"] for match in found[:5] if match} == {"Mozilla/5.0 \\x22quoted\\x22"}
    assert "request_answered" not in alone.stack.logs()
    if shutil.which("goaccess") is None:
        pytest.skip("the log was checked by its format alone: goaccess is not installed")
    report = tmp_path / "report.json"
    command = ["goaccess", str(log), "--log-format=COMBINED", "--no-global-config", "-o", str(report)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    general = json.loads(report.read_text())["general"]
    assert (general["failed_requests"], general["valid_requests"]) == (0, general["total_requests"])
    assert general["total_requests"] >= 6
