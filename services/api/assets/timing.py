"""How long the phases of one GET take, for the metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from sanic import Request

from services.api.exchange import request_record
from services.api.headers import CacheResult
from shared.observability.metrics import PHASE, TIME_TO_FIRST_BYTE


def observe_first_byte(request: Request, result: CacheResult) -> None:
    """The first byte of the body is about to leave."""
    TIME_TO_FIRST_BYTE.labels(cache=result).observe(perf_counter() - request_record(request).started)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Measure one phase: catalog, claim, publish. Failures take time too."""
    started = perf_counter()
    try:
        yield
    finally:
        PHASE.labels(phase=name).observe(perf_counter() - started)
