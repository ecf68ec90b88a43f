"""What the routes of documents, files and batches share: lists with cursors, numbers of a query."""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from coordinator.auth import SCOPE_TENANT
from coordinator.errors import invalid_value

T = TypeVar("T")


class Page(Protocol[T]):
    """Reads a page: how many of a tenant's, behind which id, and whether there are more."""

    def __call__(
        self, tenant: str, after: str | None, limit: int, *, is_ascending: bool
    ) -> Awaitable[tuple[list[T], bool]]: ...


def tenant_of(request: Request) -> str:
    """The name of whoever asks."""
    name: str = request.scope[SCOPE_TENANT].name
    return name


async def listed(
    request: Request,
    page: Page[T],
    describe: Callable[[T], dict[str, Any]],
    default: int,
    most: int,
) -> Response:
    """One page of a list, in OpenAI's shape, as the query asks for it.

    Args:
        request: whose query has ``limit``, ``order`` and ``after``.
        page: reads it.
        describe: one of them, as callers see it.
        default: how many are on a page if the caller does not say.
        most: how many are on a page at most.

    Raises:
        RequestError: the query is wrong, or what ``page`` raises.
    """
    query = request.query_params
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid_value("order", "order is asc or desc")
    limit = _limit(query.get("limit"), default, most)
    found, has_more = await page(
        tenant_of(request), query.get("after"), limit, is_ascending=order == "asc"
    )
    data = [describe(one) for one in found]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": has_more,
        }
    )


def read_number(given: str | None, param: str, most: float) -> float:
    """A number from a query that is 0 if it is not given; too large a one is taken for the largest.

    Raises:
        RequestError: it is none, or below 0.
    """
    try:
        value = float(0 if given is None else given)
    except ValueError as error:
        raise invalid_value(param, f"{param} must be a number") from error
    if not value >= 0:  # nor is nan
        raise invalid_value(param, f"{param} must be at least 0")
    return min(value, most)


def _limit(given: str | None, default: int, most: int) -> int:
    """How much of a list is wanted; too much is taken for the most there is."""
    if given is None:
        return default
    if not given.isascii() or not given.isdigit() or int(given[:9]) < 1:
        raise invalid_value("limit", f"limit is a number between 1 and {most}")
    return min(int(given[:9]), most)
