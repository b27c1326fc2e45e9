"""Bodies and queries of the operator API: what is read from them, and what their error messages say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distributor_node.services.api.errors import HttpError
from distributor_node.services.api.operator import schemas
from distributor_node.shared.domain.objects import ObjectId
from distributor_node.shared.domain.operator_state import WarmingScope

FIVE, SEVEN = ObjectId("5"), ObjectId("7")
BUCKETS = "a list of bucket ids, or no such field for all of the worker"


@pytest.mark.parametrize(
    ("parse", "body", "value"),
    [
        (schemas.parse_empty, {}, None),
        (schemas.parse_worker, {"workerId": 0}, (0, False)),
        (schemas.parse_worker, {"workerId": 2**63 - 1, "check": True}, (2**63 - 1, True)),
        (schemas.parse_buckets, {"buckets": ["0:1", "2:3", "0:1"]}, (frozenset({"0:1", "2:3"}), False)),
        (schemas.parse_buckets, {}, (None, False)),
        (schemas.parse_buckets, {"buckets": None, "check": True}, (None, True)),
        (schemas.parse_toggle, {"on": False}, False),
        (schemas.parse_ids, {"ids": ["7", "5", "7"]}, (SEVEN, FIVE)),
        (schemas.parse_ids, {"ids": ["5"] * 1000}, (FIVE,)),
        (schemas.parse_purge, {"ids": ["5"]}, (FIVE,)),
        (schemas.parse_purge, {"all": True}, None),
        (schemas.parse_warming_scope, {"ids": ["5"]}, WarmingScope(object_ids=(FIVE,))),
        (schemas.parse_warming_scope, {"bucket": "0:1"}, WarmingScope(bucket_id="0:1")),
        (schemas.parse_warming_scope, {"all": True}, WarmingScope()),
        (schemas.parse_page, {}, (100, "")),
        (schemas.parse_page, {"limit": "1000", "after": "5"}, (1000, "5")),
    ],
)
def test_what_is_read(parse: Callable[[Any], Any], body: Any, value: Any) -> None:
    assert parse(body) == value


@pytest.mark.parametrize(
    ("parse", "body", "message"),
    [
        (schemas.parse_empty, {"on": True}, 'body: expected no fields, got "on"'),
        (schemas.parse_empty, [5], "body: expected a JSON object, got [5]"),
        (schemas.parse_worker, {}, f"workerId: expected a whole number from 0 to {2**63 - 1}, got nothing"),
        (
            schemas.parse_worker,
            {"workerId": True},
            f"workerId: expected a whole number from 0 to {2**63 - 1}, got true",
        ),
        (
            schemas.parse_worker,
            {"workerId": 1.0},
            f"workerId: expected a whole number from 0 to {2**63 - 1}, got 1.0",
        ),
        (
            schemas.parse_worker,
            {"workerId": -1},
            f"workerId: expected a whole number from 0 to {2**63 - 1}, got -1",
        ),
        (
            schemas.parse_worker,
            {"workerId": 1, "x": 2},
            'body: expected only the fields workerId, check, got "x"',
        ),
        (
            schemas.parse_buckets,
            {"check": 1},
            "check: expected true to refuse what the catalog does not have, or false, got 1",
        ),
        (schemas.parse_buckets, {"buckets": []}, f"buckets: expected {BUCKETS}, got []"),
        (schemas.parse_buckets, {"buckets": "0:1"}, f'buckets: expected {BUCKETS}, got "0:1"'),
        (schemas.parse_buckets, {"buckets": ["0:1", "0-1"]}, 'buckets[1]: expected family:index, got "0-1"'),
        (schemas.parse_toggle, {"on": "true"}, 'on: expected true or false, got "true"'),
        (schemas.parse_ids, {"ids": []}, "ids: expected a list of 1 to 1000 object ids, got []"),
        (
            schemas.parse_ids,
            {"ids": ["5"] * 1001},
            "ids: expected a list of 1 to 1000 object ids, got a list of 1001",
        ),
        (schemas.parse_ids, {"ids": ["5", "a/.."]}, 'ids[1]: expected an object id, got "a/.."'),
        (schemas.parse_ids, {"ids": [5]}, "ids[0]: expected an object id, got 5"),
        (schemas.parse_ids, {"ids": ["." + "/" * 200]}, f'ids[0]: expected an object id, got ".{"/" * 58}…'),
        (schemas.parse_purge, {}, "body: expected exactly one of ids, all, got []"),
        (
            schemas.parse_purge,
            {"all": True, "ids": ["5"]},
            'body: expected exactly one of ids, all, got ["all", "ids"]',
        ),
        (schemas.parse_purge, {"all": False}, "all: expected true, got false"),
        (schemas.parse_purge, {"all": 1}, "all: expected true, got 1"),
        (schemas.parse_purge, {"bucket": "0:1"}, 'body: expected exactly one of ids, all, got ["bucket"]'),
        (schemas.parse_warming_scope, {"bucket": 5}, "bucket: expected family:index, got 5"),
        (schemas.parse_warming_scope, None, "body: expected exactly one of ids, bucket, all, got null"),
        (schemas.parse_page, {"limit": "0"}, 'limit: expected a whole number from 1 to 1000, got "0"'),
        (schemas.parse_page, {"limit": "+5"}, 'limit: expected a whole number from 1 to 1000, got "+5"'),
        (schemas.parse_page, {"after": "../x"}, 'after: expected an object id, got "../x"'),
        (schemas.parse_page, {"page": "2"}, 'query: expected limit or after, got "page"'),
    ],
)
def test_messages_name_field_expected_and_got(parse: Callable[[Any], Any], body: Any, message: str) -> None:
    with pytest.raises(HttpError) as caught:
        parse(body)
    assert (caught.value.status, caught.value.message, caught.value.kind) == (
        400,
        message,
        "malformed_request",
    )
