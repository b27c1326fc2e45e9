"""The origin catalog with servers that omit, refuse or redirect."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from distributor_node.services.demo.faults import Fault, Match
from distributor_node.services.demo.objects import bytes_object
from distributor_node.services.demo.storage_node import StorageNode
from distributor_node.shared.adapters.catalogs.cached import CachedCatalog, CacheLimits
from distributor_node.shared.adapters.catalogs.origin import OriginCatalog
from distributor_node.shared.domain.conditionals import NO_VALIDATORS, Validators
from distributor_node.shared.domain.errors import CatalogUnavailable, ConfigurationError, ObjectUnavailable
from distributor_node.shared.domain.objects import ObjectId

ONE = ObjectId("1")
HEAD, GET = Match(method="HEAD"), Match(method="GET")


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    async with StorageNode(
        [bytes_object("1", b"a" * 1000, "image/png"), bytes_object("0", b""), bytes_object("2", b"b")]
    ).run() as node:
        yield node


@pytest.fixture
async def catalog(node: StorageNode) -> AsyncIterator[OriginCatalog]:
    catalog = OriginCatalog(node.object_url("{id}"), timeout=20)
    await catalog.open()
    yield catalog
    await catalog.close()


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
async def test_a_server_without_head_is_requested_for_one_byte(
    node: StorageNode, catalog: OriginCatalog, status: int
) -> None:
    node.faults.add(Fault(status=status), HEAD)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert (found.size, found.media_type) == (1000, "image/png")
    assert node.requests.of("1", "GET")[0].range == "bytes=0-0"


@pytest.mark.parametrize(
    "fault", [Fault(omit_content_length=True), Fault(headers=(("Content-Encoding", "gzip"),))]
)
async def test_a_head_response_without_length_is_followed_by_a_one_byte_range(
    node: StorageNode, catalog: OriginCatalog, fault: Fault
) -> None:
    node.faults.add(fault, HEAD)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size == 1000


async def test_a_server_without_ranges_still_reports_the_size(
    node: StorageNode, catalog: OriginCatalog
) -> None:
    node.faults.add(Fault(status=405), HEAD)
    node.faults.add(Fault(ignore_range=True), GET)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size == 1000


async def test_a_size_not_reported_anywhere_is_unknown(node: StorageNode, catalog: OriginCatalog) -> None:
    node.faults.add(Fault(omit_content_length=True, ignore_range=True))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size is None


@pytest.mark.parametrize("status", [401, 403, 451])
async def test_a_refusal_is_an_answer_about_one_object(
    node: StorageNode, catalog: OriginCatalog, status: int
) -> None:
    cached = CachedCatalog(catalog, CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=4, wait=1))
    node.faults.add(Fault(status=status), Match(object_id="1"))
    assert await cached.look_up(ONE) is None
    assert await cached.look_up(ObjectId("2")) is not None


@pytest.mark.parametrize("fault", [Fault(status=500), Fault(status=400), Fault(redirect_to="ftp://x/")])
async def test_a_failure_of_one_object_does_not_pause_the_catalog(
    node: StorageNode, catalog: OriginCatalog, fault: Fault
) -> None:
    cached = CachedCatalog(catalog, CacheLimits(positive_ttl=60, negative_ttl=60, max_in_flight=4, wait=1))
    node.faults.add(fault, Match(object_id="1"))
    with pytest.raises(ObjectUnavailable):
        await cached.look_up(ONE)
    assert await cached.look_up(ObjectId("2")) is not None


@pytest.mark.parametrize("stated", [0, 1000])
async def test_a_size_of_zero_is_confirmed_by_a_get(
    node: StorageNode, catalog: OriginCatalog, stated: int
) -> None:
    """Some servers state a length of 0 in each response to HEAD."""
    node.faults.add(Fault(headers=(("Content-Length", str(stated)),)), HEAD)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size == 1000
    assert len(node.requests.of("1", "GET")) == (stated == 0)


async def test_an_empty_object(node: StorageNode, catalog: OriginCatalog) -> None:
    found = await catalog.look_up(ObjectId("0"))
    assert found is not None
    assert found.size == 0


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("method", [HEAD, GET])
async def test_absent(node: StorageNode, catalog: OriginCatalog, status: int, method: Match) -> None:
    node.faults.add(Fault(status=status), method)
    node.faults.add(Fault(status=405), HEAD)
    assert await catalog.look_up(ONE) is None


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500),
        Fault(status=503),
        Fault(status=429),
        Fault(redirect_to="http://elsewhere.example/1"),
        Fault(redirect_to="//127.0.0.1:9/1"),
        Fault(redirect_to="http://u:p@127.0.0.1/1"),
        Fault(redirect_to="/api/v1/files/1"),
        Fault(redirect_to="file:///etc/passwd"),
        Fault(redirect_to="http://[/"),
        Fault(redirect_to=""),
    ],
)
async def test_no_usable_answer(node: StorageNode, catalog: OriginCatalog, fault: Fault) -> None:
    node.faults.add(fault)
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)


async def test_no_answer_in_time(node: StorageNode) -> None:
    node.faults.add(Fault(hang_before_headers=True))
    catalog = OriginCatalog(node.object_url("{id}"), timeout=0.3)
    await catalog.open()
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)
    await catalog.close()


async def test_no_server(node: StorageNode) -> None:
    catalog = OriginCatalog("http://127.0.0.1:1/{id}", timeout=1)
    await catalog.open()
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)
    await catalog.close()


async def test_a_redirect_is_followed_and_its_target_is_not_remembered(
    node: StorageNode, catalog: OriginCatalog
) -> None:
    """A signed URL may be valid for seconds."""
    target = node.object_url("1").replace("127.0.0.1", "localhost")
    node.faults.add(Fault(redirect_to=f"{target}?signature=1"), Match(object_id="77"))
    found = await catalog.look_up(ObjectId("77"))
    assert found is not None
    assert found.size == 1000
    assert found.sources == (node.object_url("77"),)


async def test_redirects_to_other_hosts_can_be_forbidden(node: StorageNode) -> None:
    catalog = OriginCatalog(node.object_url("{id}"), timeout=2, follow_to_other_hosts=False)
    await catalog.open()
    target = node.object_url("1")
    node.faults.add(Fault(redirect_to=target.replace("127.0.0.1", "localhost")), Match(object_id="77"))
    node.faults.add(Fault(redirect_to=target), Match(object_id="78"))
    with pytest.raises(ObjectUnavailable, match="same host"):
        await catalog.look_up(ObjectId("77"))
    assert await catalog.look_up(ObjectId("78")) is not None
    await catalog.close()


@pytest.mark.parametrize(
    ("headers", "validators"),
    [
        (
            (("ETag", '"strong"'), ("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")),
            Validators('"strong"', 784111777),
        ),
        ((("ETag", 'W/"weak"'),), Validators('W/"weak"')),
        ((("ETag", "unquoted"),), NO_VALIDATORS),
        ((("ETag", f'"{"x" * 300}"'),), NO_VALIDATORS),
        ((("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT"),), Validators(None, 784111777)),
        ((), NO_VALIDATORS),
    ],
)
async def test_the_validators_are_those_of_the_origin(
    node: StorageNode, catalog: OriginCatalog, headers: tuple[tuple[str, str], ...], validators: Validators
) -> None:
    node.faults.add(Fault(headers=headers))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.validators == validators
    assert found.etag == validators.etag
    assert found.content_hash is None


async def test_a_malformed_media_type_is_left_out(node: StorageNode, catalog: OriginCatalog) -> None:
    node.faults.add(Fault(headers=(("Content-Type", "nonsense"),)))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.media_type is None


@pytest.mark.parametrize("template", ["http://a/", "ftp://a/{id}", "http://u:p@a/{id}", "http://a/{id} "])
async def test_a_template_without_urls_stops_the_start(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"catalog\.origin"):
        await OriginCatalog(template, timeout=1).open()
