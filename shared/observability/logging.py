"""Logs: one event per line, with its fields, from structlog and the standard library's loggers alike.

Each line has `timestamp` (ISO 8601, UTC), `level`, `logger`, `event`, what names the process (`service`, `node`,
`version`), and what is bound to the context (such as `request_id`, by `structlog.contextvars.bind_contextvars`). Errors
have `exception`, with the traceback.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from math import inf
from time import monotonic
from typing import Any, Literal, TextIO

import structlog
from structlog.types import Processor

_CREDENTIALS_IN_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]{1,20}://)[^/\s@'\"]+@", re.IGNORECASE)
_BEARER = re.compile(r"(?P<word>\bbearer\s+)[A-Za-z0-9._~+/=-]+", re.IGNORECASE)
_SECRET_FIELD = re.compile(r"(password|passwd|secret|authorization|cookie|api_?key)", re.IGNORECASE)
REDACTED = "***"

# Lowest levels of libraries that are useful to an operator (httpx logs every request at INFO).
_LIBRARY_LEVELS: Mapping[str, int] = {
    "aio_pika": logging.WARNING,
    "aiormq": logging.CRITICAL,  # it repeats with tracebacks what the job queue logs once
    "asyncio": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "opentelemetry.exporter": logging.CRITICAL,  # it repeats for each batch what the tracer logs once
    "sanic.access": logging.WARNING,
}


def configure_logging(
    level: Literal["debug", "info", "warning", "error"] = "info",
    form: Literal["json", "console"] = "json",
    stream: TextIO | None = None,
    process: Mapping[str, str] | None = None,
) -> None:
    """Send all logs of this process to `stream` (default: stderr). Call it once per process, before the first event.

    `process`: fields of every line for log collectors; people at a terminal know them, and are spared.
    Sanic must be created with `configure_logging=False`.
    """
    stream = sys.stderr if stream is None else stream
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # texts from outside may hold lone surrogates
    threshold = getattr(logging, level.upper())
    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[*common, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # loggers of modules are made before the configuration
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.ExtraAdder()],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                redact_secrets,
                *_renderers(form, process or {}, colors=stream.isatty()),
            ],
        )
    )
    _configure_standard_library(handler, threshold)


def change_log_level(level: str) -> None:
    """Log from this level on. `configure_logging` has been called."""
    threshold = getattr(logging, level.upper())
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(threshold))
    _set_threshold(threshold)


def redact_secrets(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove credentials from URLs, bearer tokens from texts, and the values of fields with the name of a secret."""
    for name, value in event.items():
        if _SECRET_FIELD.search(name):
            event[name] = REDACTED
        elif isinstance(value, str):
            event[name] = redact_text(value)
        elif isinstance(value, BaseException):
            event[name] = redact_text(f"{type(value).__name__}: {value}")
    return event


def redact_text(text: str) -> str:
    """Return the text without users and passwords of URLs, and without bearer tokens."""
    text = _CREDENTIALS_IN_URL.sub(rf"\g<scheme>{REDACTED}@", text)
    return _BEARER.sub(rf"\g<word>{REDACTED}", text)


def _renderers(
    form: Literal["json", "console"], process: Mapping[str, str], *, colors: bool
) -> list[Processor]:
    if form == "console":
        return [structlog.dev.ConsoleRenderer(colors=colors)]

    def name_process(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for name, value in process.items():
            event.setdefault(name, value)
        return event

    return [name_process, structlog.processors.JSONRenderer(default=str)]


def _configure_standard_library(handler: logging.Handler, threshold: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in ("sanic.root", "sanic.error", "sanic.access", "sanic.server", "sanic.websockets"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
    _set_threshold(threshold)
    logging.captureWarnings(True)


def _set_threshold(threshold: int) -> None:
    logging.getLogger().setLevel(threshold)
    for name, least in _LIBRARY_LEVELS.items():
        logging.getLogger(name).setLevel(max(least, threshold))


class OutageLog:
    """Logs an outage once when it begins and once when it ends, however many calls fail in between."""

    def __init__(self, logger: Any, *, down: str, up: str) -> None:
        """`down` and `up`: the names of the two log events."""
        self._logger, self._down, self._up = logger, down, up
        self.is_down = False

    def failed(self, reason: object, **fields: Any) -> None:
        """A call failed: log `down` if the last one succeeded."""
        if not self.is_down:
            self._logger.warning(self._down, reason=str(reason), **fields)
        self.is_down = True

    def succeeded(self, **fields: Any) -> None:
        """A call succeeded: log `up` if the last one failed."""
        if self.is_down:
            self._logger.info(self._up, **fields)
        self.is_down = False


class OncePerKey:
    """Which of many equal events to log: the first of each key, and one more after REPEAT_AFTER seconds."""

    REPEAT_AFTER = 600.0
    MAX_KEYS = 1000

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        """`clock`: in seconds."""
        self._clock = clock
        self._logged: OrderedDict[str, float] = OrderedDict()

    def is_due(self, key: str) -> bool:
        """Whether to log an event of this key now. Of more than MAX_KEYS keys, the oldest are forgotten."""
        now = self._clock()
        if now - self._logged.get(key, -inf) < self.REPEAT_AFTER:
            return False
        self._logged[key] = now
        self._logged.move_to_end(key)
        if len(self._logged) > self.MAX_KEYS:
            self._logged.popitem(last=False)
        return True
