"""One coordinator for the tests of files and batches that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.coordinator.jobs.world import Site, start_site


@pytest.fixture(scope="session")
def shared_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = {"max_upload_bytes": 4 << 20, "body_idle_timeout_s": 1.0}
    with start_site(tmp_path_factory.mktemp("batches"), limits=limits) as site:
        yield site
