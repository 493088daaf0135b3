"""What the tests of backends share: a bundle in every precision and with both kinds of input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hydradeploy import export
from hydradeploy.backends import PRECISION_NAMES
from hydradeploy.bundle import Bundle
from tests.conftest import require


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory, supernet_file: Path) -> Bundle:
    """h03 and h04 in every precision, h04 with uint8 images too; do not write to it."""
    require("onnxruntime")
    path = tmp_path_factory.mktemp("everything")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(path / "images.npz", images=images)
    data = path / "images.npz"
    export(supernet_file, path / "bundle", heads=(3, 4), precisions=PRECISION_NAMES, data=data)
    return export(supernet_file, path / "bundle", heads=(4,), precisions=PRECISION_NAMES, data=data, input="uint8")
