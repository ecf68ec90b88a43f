"""One coordinator for the tests of a folder that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.coordinator.jobs.world import Site, start_site


@pytest.fixture(scope="session")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For documents."""
    with start_site(tmp_path_factory.mktemp("jobs")) as site:
        yield site


@pytest.fixture
def site(shared_site: Site) -> Site:
    shared_site.open_gate()
    return shared_site
