"""The origin catalog copes with servers as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from services.demo.knobs import Behaviour, Match
from services.demo.objects import bytes_object
from services.demo.storage_node import StorageNode
from shared.adapters.catalogs.origin import OriginCatalog
from shared.domain.errors import CatalogUnavailable, ConfigurationError
from shared.domain.objects import ObjectId

ONE = ObjectId("1")
HEAD, GET = Match(method="HEAD"), Match(method="GET")


@pytest.fixture
async def node() -> AsyncIterator[StorageNode]:
    async with StorageNode(
        [bytes_object("1", b"a" * 1000, "image/png"), bytes_object("0", b"")]
    ).run() as node:
        yield node


@pytest.fixture
async def catalog(node: StorageNode) -> AsyncIterator[OriginCatalog]:
    catalog = OriginCatalog(node.object_url("{id}"), timeout=0.5)
    await catalog.open()
    yield catalog
    await catalog.close()


@pytest.mark.parametrize("status", [400, 401, 403, 405, 501])
async def test_a_server_without_head_is_asked_for_one_byte(
    node: StorageNode, catalog: OriginCatalog, status: int
) -> None:
    node.knobs.add(Behaviour(status=status), HEAD)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert (found.size, found.media_type) == (1000, "image/png")
    assert node.requests.of("1", "GET")[0].range == "bytes=0-0"


@pytest.mark.parametrize(
    "behaviour", [Behaviour(omit_content_length=True), Behaviour(headers=(("Content-Encoding", "gzip"),))]
)
async def test_a_head_that_hides_the_length_is_followed_by_one_byte(
    node: StorageNode, catalog: OriginCatalog, behaviour: Behaviour
) -> None:
    node.knobs.add(behaviour, HEAD)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size == 1000


async def test_a_server_without_ranges_tells_the_size_all_the_same(
    node: StorageNode, catalog: OriginCatalog
) -> None:
    node.knobs.add(Behaviour(status=405), HEAD)
    node.knobs.add(Behaviour(ignore_range=True), GET)
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size == 1000


async def test_a_size_that_nobody_tells_is_unknown(node: StorageNode, catalog: OriginCatalog) -> None:
    node.knobs.add(Behaviour(omit_content_length=True, ignore_range=True))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.size is None


@pytest.mark.parametrize("status", [404, 410])
@pytest.mark.parametrize("method", [HEAD, GET])
async def test_absent(node: StorageNode, catalog: OriginCatalog, status: int, method: Match) -> None:
    node.knobs.add(Behaviour(status=status), method)
    node.knobs.add(Behaviour(status=405), HEAD)
    assert await catalog.look_up(ONE) is None


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour(status=500),
        Behaviour(status=503),
        Behaviour(status=403),
        Behaviour(status=429),
        Behaviour(hang_before_headers=True),
        Behaviour(redirect_to="http://elsewhere.example/1"),
        Behaviour(redirect_to="//127.0.0.1:9/1"),
        Behaviour(redirect_to="/api/v1/files/1"),
        Behaviour(redirect_to="file:///etc/passwd"),
        Behaviour(redirect_to="http://[/"),
        Behaviour(redirect_to=""),
    ],
)
async def test_no_usable_answer(node: StorageNode, catalog: OriginCatalog, behaviour: Behaviour) -> None:
    node.knobs.add(behaviour)
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)


async def test_no_server(node: StorageNode) -> None:
    catalog = OriginCatalog("http://127.0.0.1:1/{id}", timeout=1)
    await catalog.open()
    with pytest.raises(CatalogUnavailable):
        await catalog.look_up(ONE)
    await catalog.close()


async def test_a_redirect_within_the_origin_is_followed_and_remembered(
    node: StorageNode, catalog: OriginCatalog
) -> None:
    node.knobs.add(Behaviour(redirect_to="/api/v1/files/1"), Match(object_id="77"))
    found = await catalog.look_up(ObjectId("77"))
    assert found is not None
    assert found.size == 1000
    assert found.sources == (node.object_url("1"),)


@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ((("ETag", '"strong"'), ("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT")), '"strong"'),
        ((("ETag", 'W/"weak"'),), 'W/"weak"'),
        ((("Last-Modified", "Sun, 06 Nov 1994 08:49:37 GMT"),), "Sun, 06 Nov 1994 08:49:37 GMT"),
        ((), None),
    ],
)
async def test_the_validator(
    node: StorageNode, catalog: OriginCatalog, headers: tuple[tuple[str, str], ...], validator: str | None
) -> None:
    node.knobs.add(Behaviour(headers=headers))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.validator == validator
    assert found.content_hash is None


async def test_a_malformed_media_type_is_left_out(node: StorageNode, catalog: OriginCatalog) -> None:
    node.knobs.add(Behaviour(headers=(("Content-Type", "nonsense"),)))
    found = await catalog.look_up(ONE)
    assert found is not None
    assert found.media_type is None


@pytest.mark.parametrize("template", ["http://a/", "ftp://a/{id}", "http://u:p@a/{id}", "http://a/{id} "])
async def test_a_template_that_gives_no_urls_stops_the_start(template: str) -> None:
    with pytest.raises(ConfigurationError, match=r"catalog\.origin"):
        await OriginCatalog(template, timeout=1).open()
