"""The access log: lines that tools can read, whatever clients send, and files that are moved away."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from distributor_node.services.api import access_log as module
from distributor_node.services.api.access_log import AccessLog
from distributor_node.services.api.clients import ClientAddresses

COMBINED = re.compile(
    r'(?P<client>\S+) - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "(?P<line>[^"]*)" '
    r'(?P<status>\d{3}) (?P<bytes>\d+) "(?P<referer>[^"]*)" "(?P<agent>[^"]*)"'
)
NOW = 1_795_988_717.9


def make(path: Path, *trusted: str) -> AccessLog:
    return AccessLog(path, ClientAddresses(trusted))


def head(*lines: bytes) -> bytes:
    return b"\r\n".join((b"GET /api/v1/assets/7 HTTP/1.1", b"Host: node", *lines, b"", b""))


async def written(log: AccessLog, path: Path) -> list[re.Match[str]]:
    await log.flush()
    lines = path.read_text("ascii").splitlines()
    return [match for line in lines if (match := COMBINED.fullmatch(line))] if lines else []


async def test_a_line_has_the_fields_of_the_combined_format(tmp_path: Path) -> None:
    log = make(path := tmp_path / "access.log")
    log.add_head(head(b"User-Agent: Mozilla/5.0 (X11)", b"referer:https://x/"), "203.0.113.7", 206, 100, NOW)
    (line,) = await written(log, path)
    assert line.groupdict() == {
        "client": "203.0.113.7",
        "line": "GET /api/v1/assets/7 HTTP/1.1",
        "status": "206",
        "bytes": "100",
        "referer": "https://x/",
        "agent": "Mozilla/5.0 (X11)",
    }
    await log.close()


async def test_what_is_absent_is_a_hyphen(tmp_path: Path) -> None:
    log = make(path := tmp_path / "access.log")
    log.add_head(head(), "", 200, 0, NOW)
    (line,) = await written(log, path)
    assert (line["client"], line["referer"], line["agent"]) == ("-", "-", "-")
    await log.close()


@pytest.mark.parametrize("agent", [b'a"b', b"a\\b", b"a\tb", b"a\xffb", b'" 200 0 "-" "'])
async def test_no_byte_of_a_client_ends_a_field(tmp_path: Path, agent: bytes) -> None:
    log = make(path := tmp_path / "access.log")
    log.add_head(head(b"User-Agent: " + agent), "203.0.113.7", 200, 1, NOW)
    (line,) = await written(log, path)
    assert re.search(r"\\x[0-9A-F]{2}", line["agent"])
    await log.close()


async def test_behind_a_trusted_proxy_the_client_is_the_one_that_it_names(tmp_path: Path) -> None:
    log = make(path := tmp_path / "access.log", "10.0.0.0/8")
    forwarded = head(b"X-Forwarded-For: 6.6.6.6, 2001:db8::7")
    log.add_head(forwarded, "10.1.2.3", 200, 1, NOW)
    log.add_head(forwarded, "192.0.2.1", 200, 1, NOW)
    assert [line["client"] for line in await written(log, path)] == ["2001:db8::7", "192.0.2.1"]
    await log.close()


async def test_a_file_that_was_moved_away_is_opened_again(tmp_path: Path) -> None:
    log = make(path := tmp_path / "access.log")
    for status in (200, 206):
        log.add_head(head(), "192.0.2.1", status, 1, NOW)
        assert [line["status"] for line in await written(log, path)] == [str(status)]
        path.rename(tmp_path / "access.log.1")
    await log.close()
    assert not path.exists()


async def test_lines_are_kept_until_the_file_can_be_opened(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    log = make(path := folder / "access.log")
    log.add_head(head(), "192.0.2.1", 200, 1, NOW)
    await log.flush()
    log.add_head(head(), "192.0.2.1", 404, 1, NOW)
    folder.mkdir()
    assert [line["status"] for line in await written(log, path)] == ["200", "404"]
    await log.close()


async def test_a_pipe_that_is_not_read_holds_nothing_up_and_loses_no_line(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "access.log")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    log = make(path)
    agent = b"User-Agent: " + b"a" * 900
    for number in range(200):
        log.add_head(head(agent), "192.0.2.1", 200 + number, 1, NOW)
    received = bytearray()
    async with asyncio.timeout(60):
        while received.count(b"\n") < 200:
            await log.flush()
            received += os.read(reader, 1 << 20)
    lines = [COMBINED.fullmatch(line) for line in received.decode("ascii").splitlines()]
    assert [int(line["status"]) for line in lines if line] == list(range(200, 400))
    await log.close()
    os.close(reader)


async def test_memory_is_bounded_while_the_disk_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_BUFFERED", 10_000)
    log = make(path := tmp_path / "logs" / "access.log")
    for _ in range(1_000):
        log.add_head(head(), "192.0.2.1", 200, 1, NOW)
    await log.flush()
    path.parent.mkdir()
    assert 50 < len(await written(log, path)) < 200
    await log.close()
