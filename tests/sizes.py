"""How much of what is drawn or searched a run tests: a third in ``make test``, else all."""

from hypothesis import settings

QUICK = "same"  # the profile that is loaded by default, see conftest.py


def some_of(count: int) -> int:
    """So many examples, seeds or histories of ``count``."""
    return -(-count // 3) if settings.get_current_profile_name() == QUICK else count
