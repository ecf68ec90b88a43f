"""Whose turn it is: one queue for each tenant, served in turn. Pure.

A tenant that asks for much waits behind itself, and takes only its part of the places.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Items of tenants.

    Args:
        max_items: that wait at one time; each is there once.
        max_tenant_items: of one tenant, at the moment.
    """

    def __init__(self, max_items: int, max_tenant_items: Callable[[], int]) -> None:
        self._max_items = max_items
        self._max_tenant_items = max_tenant_items
        # Items as keys: thousands may wait, and any of them may leave.
        self._waiting: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def put(self, tenant: str, item: T) -> bool:
        """Behind the tenant's others; False when there is no place for it."""
        mine = self._waiting.get(tenant)
        num_mine = 0 if mine is None else len(mine)
        if self._num_items >= self._max_items or num_mine >= self._max_tenant_items():
            return False
        self._waiting.setdefault(tenant, OrderedDict())[item] = None
        self._num_items += 1
        return True

    def take(self) -> T | None:
        """The first of the tenant whose turn it is, which is then the last to have one again."""
        if not self._waiting:
            return None
        tenant, items = self._waiting.popitem(last=False)
        item, _ = items.popitem(last=False)
        if items:
            self._waiting[tenant] = items
        self._num_items -= 1
        return item

    def remove(self, tenant: str, item: T) -> None:
        """It is not wanted any more. Does nothing if it has been taken."""
        items = self._waiting.get(tenant)
        if items is not None and item in items:
            del items[item]
            self._num_items -= 1
            if not items:
                del self._waiting[tenant]
