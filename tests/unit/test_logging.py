"""Logs: one line an event, alike for structlog and the standard library, without secrets."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from distributor_node.shared.observability.logging import configure_logging, redact_text


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Where the logs go during one test; logging is put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_has_time_level_name_and_fields(stream: io.StringIO) -> None:
    structlog.get_logger("tests.logging").info("object_cached", object_id="7", size=12)
    (line,) = lines(stream)
    assert line["event"] == "object_cached"
    assert line["level"] == "info"
    assert line["logger"] == "tests.logging"
    assert line["object_id"] == "7"
    assert line["size"] == 12
    assert line["timestamp"].endswith("Z")


def test_every_line_says_which_process_has_written_it(stream: io.StringIO) -> None:
    configure_logging("info", "json", stream, {"service": "api", "node": "media-1", "version": "1.2.3"})
    structlog.get_logger().info("one")
    logging.getLogger("sanic.root").warning("two")
    structlog.get_logger().info("three", version="of the operator state")
    seen = [(line["service"], line["node"], line["version"]) for line in lines(stream)]
    assert seen == [("api", "media-1", "1.2.3")] * 2 + [("api", "media-1", "of the operator state")]


def test_the_request_id_of_the_context_is_on_every_line(stream: io.StringIO) -> None:
    with structlog.contextvars.bound_contextvars(request_id="r-1"):
        structlog.get_logger().info("one")
        logging.getLogger("sanic.root").warning("two")
    assert [line["request_id"] for line in lines(stream)] == ["r-1", "r-1"]


def test_the_standard_library_agrees(stream: io.StringIO) -> None:
    logging.getLogger("aio_pika.robust").warning("lost %s", "connection", extra={"attempt": 2})
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("lost connection", "warning", "aio_pika.robust")
    assert line["attempt"] == 2


def test_a_traceback_is_a_field_of_one_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("torn")
    except ValueError:
        structlog.get_logger().exception("fetch_failed")
    (line,) = lines(stream)
    assert "Traceback" in line["exception"]
    assert line["exception"].endswith("ValueError: torn")


def test_less_severe_events_and_chatty_libraries_are_left_out(stream: io.StringIO) -> None:
    structlog.get_logger().debug("detail")
    logging.getLogger("httpx").info("HTTP Request: GET http://source.example/")
    logging.getLogger("sanic.access").info("")
    assert lines(stream) == []


def test_warnings_are_logged(stream: io.StringIO) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    (line,) = lines(stream)
    assert line["logger"] == "py.warnings"


def test_no_secret_is_logged(stream: io.StringIO) -> None:
    logger = structlog.get_logger()
    logger.info("connecting", url="amqp://node:hunter2@queue.example:5672/", password="hunter2")
    logger.info("refused", error=OSError("redis://:hunter2@store.example/0 refused"))
    try:
        raise OSError("cannot reach redis://node:hunter2@store.example/0")
    except OSError:
        logger.exception("store_lost", header="Bearer hunter2.x.y")
    assert "hunter2" not in stream.getvalue()
    assert "queue.example:5672" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://source.example/a@b", "https://source.example/a@b"),
        ("http://u@source.example/", "http://***@source.example/"),
        ("rediss://u:p@h:1/0", "rediss://***@h:1/0"),
        ("Authorization: bearer abc.def", "Authorization: bearer ***"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    assert redact_text(text) == redacted


def test_console_form_is_for_people(stream: io.StringIO) -> None:
    console = io.StringIO()
    configure_logging("info", "console", console)
    structlog.get_logger().warning("storage_nearly_full", used=95)
    assert "storage_nearly_full" in console.getvalue()
    assert "used=95" in console.getvalue()
    assert not stream.getvalue()
