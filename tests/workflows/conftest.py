"""What several files of training tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from specmpc_cli.engine.world_model import MODEL_SIZES
from specmpc_cli.workflows.train_log import Watcher
from tests.workflows.pointmass_training import STEPS, TINY, begin


@pytest.fixture(scope="module")
def tiny_models() -> Iterator[None]:
    """Size 1 is tiny here: what is tested does not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_SIZES, 1, TINY)
        yield


@pytest.fixture(scope="module")
def straight(tiny_models: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    root = tmp_path_factory.mktemp("straight")
    begin(root).run(STEPS, Watcher())
    return root
