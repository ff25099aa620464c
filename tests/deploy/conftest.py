"""What the tests of bundles share: training a model with content takes seconds."""

from pathlib import Path

import pytest

from tests.deploy.published import train_and_publish
from tests.distributed import run_distributed


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoints/` and `bundle/`; tests change copies of it."""
    folder = tmp_path_factory.mktemp("published")
    run_distributed(train_and_publish, 1, folder)
    return folder
