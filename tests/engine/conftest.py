"""What two pools hand over, see tests/kvtransfer/world.py."""

import pytest

from tests.kvtransfer.world import Build


@pytest.fixture(scope="session")
def build() -> type[Build]:
    return Build
