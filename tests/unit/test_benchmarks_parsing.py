"""Input of the benchmarks: the output of wrk, /proc, response heads, versions."""

from __future__ import annotations

import os

import pytest

from benchmarks.accounting import ProcessStat, cost_of, parse_stat, peak_rss_of, process_tree
from benchmarks.client import parse_head
from benchmarks.load import parse_result
from benchmarks.machine import parse_version

WRK_OUTPUT = (
    "Running 1s test @ http://127.0.0.1:8080/\n  1 threads and 64 connections\nRequests/sec:   2000.00\n"
    'BENCHMARK {"microseconds": 2000000, "requests": 4000, "bytes": 8000000, "p50": 1500, "p99": 20000, '
    '"longest": 30000, "socket_errors": 1, "status_errors": 2}\n'
)


def test_wrk_figures_have_their_units() -> None:
    result = parse_result(WRK_OUTPUT)
    assert (result.requests_per_second, result.megabytes_per_second) == (2000.0, 4.0)
    assert (result.p50, result.p99, result.longest, result.errors) == (1.5, 20.0, 30.0, 3)


def test_wrk_without_figures_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="unable to connect"):
        parse_result("unable to connect to 127.0.0.1:1")


def test_a_process_name_may_contain_anything() -> None:
    fields = ["S", "7", *["0"] * 9, "150", "50", *["0"] * 8, "3", "0"]
    stat = parse_stat(f"42 (a) name (of) S 1) {' '.join(fields)}")
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert stat == ProcessStat(42, 7, 200 / ticks, 3 * page)


def test_a_process_tree_is_all_descendants() -> None:
    processes = [
        ProcessStat(pid, parent, 1.0, 10) for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 9))
    ]
    assert {each.pid for each in process_tree(1, processes)} == {1, 2, 3, 4}
    assert {each.pid for each in process_tree(2, processes)} == {2, 3}
    assert process_tree(77, processes) == []


def test_this_process_costs_something() -> None:
    cost = cost_of([os.getpid()])
    assert cost.cpu_seconds > 0
    assert cost.rss_bytes > 1e6


def test_memory_that_was_given_back_counts_in_the_peak() -> None:
    size = 64 * 2**20
    block = b"x" * size
    held = cost_of([os.getpid()]).rss_bytes
    del block
    assert held > size
    assert peak_rss_of([os.getpid()]) >= held


def test_heads_are_read_without_case() -> None:
    head = parse_head(b'HTTP/1.1 206 Partial Content\r\nContent-Length: 5\r\nETag: "a:b"')
    assert head.status == 206
    assert head.headers == {"content-length": "5", "etag": '"a:b"'}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.22.1", "1.22.1"),
        ("wrk debian/4.1.0-3+b2 [epoll] Copyright (C) 2012 Will Glozer", "4.1.0"),
        ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0", "7.0.15"),
        ("nothing", "?"),
    ],
)
def test_versions_are_found(text: str, version: str) -> None:
    assert parse_version(text) == version
