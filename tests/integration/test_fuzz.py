"""A short run of the differential fuzzer, and that it can find something. `make fuzz` runs 5,000 mutations."""

from __future__ import annotations

import shutil

import pytest

from tests.fuzz import Meaning, main


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here (Debian: nginx-light)")
def test_no_mutation_means_something_else_than_to_nginx() -> None:
    assert main(["--mutations", "100", "--seed", "7"]) == 0


def test_a_request_that_only_one_server_finds_is_a_difference() -> None:
    both = Meaning((200, 200), ended=False)
    assert both.agrees_with(Meaning((200, 400), ended=True))  # refused, and the connection ended
    assert both.agrees_with(Meaning((200,), ended=True))
    assert not both.agrees_with(Meaning((200, 200, 200), ended=False))
    assert not both.agrees_with(Meaning((404, 200), ended=False))
    assert not Meaning((200, 200), ended=False).agrees_with(Meaning((200,), ended=False))
