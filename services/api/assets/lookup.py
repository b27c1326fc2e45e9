"""Asking the catalog: what it says of an object, or the answer that this ends in."""

from __future__ import annotations

import structlog

from services.api.assets.timing import phase
from services.api.context import ApiContext
from services.api.errors import RETRY_LATER, HttpError
from shared.domain.errors import CatalogUnavailable
from shared.domain.objects import MediaObject, ObjectId

logger = structlog.get_logger()


async def look_up(context: ApiContext, object_id: ObjectId) -> MediaObject:
    """An object that exists, is ours, and has been uploaded; HttpError 404, 421 or 503 for any other."""
    try:
        with phase("catalog"):
            media_object = await context.catalog.look_up(object_id)
    except CatalogUnavailable as error:
        logger.warning("catalog_unavailable", object_id=object_id, reason=str(error))
        raise HttpError(
            503,
            "The catalog is out of reach, and the object is not cached",
            "catalog_unavailable",
            RETRY_LATER,
        ) from error
    if media_object is None:
        raise HttpError(404, "Data object does not exist", "does_not_exist")
    if not context.assignment.current.covers(media_object):
        raise HttpError(421, "Data object not served by this node", "not_served")
    if not media_object.accepted:
        raise HttpError(404, "Data object has not been uploaded yet", "not_uploaded")
    return media_object
