"""What the tests share: a small supernet, a bundle of it, and the command line as a function."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

# One thread per worker: two workers with two threads each on two cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from hypothesis import HealthCheck, settings

from hydradeploy.backends import PRECISION_NAMES
from hydradeploy.bundle import Bundle
from hydradeploy.data.samples import synthetic
from hydradeploy.spec import Geometry, Preprocessing, Spec
from hydradeploy.supernet.model import Supernet
from hydradeploy.supernet.store import save

torch.set_num_threads(1)
settings.register_profile(
    "default",
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # Whether a change passes must not depend on what is drawn that day; at a desk each run draws other cases.
    derandomize="CI" in os.environ,
)
settings.load_profile("default")

REQUIRED = set(filter(None, os.environ.get("HYDRADEPLOY_REQUIRE", "").split(",")))


def missing(what: str, reason: str) -> None:
    """Skip visibly, or fail where HYDRADEPLOY_REQUIRE names it."""
    if what in REQUIRED:
        pytest.fail(f"{what} is required here: {reason}")
    pytest.skip(f"{what}: {reason}")


def require(package: str) -> None:
    """Skip or fail unless a package is installed."""
    if find_spec(package) is None:
        missing(package, "not installed")


def geometry(**changes: object) -> Geometry:
    """A small supernet's geometry: 6 heads of 8, trained from 2 on."""
    values: dict[str, object] = {
        "image_size": 32,
        "patch_size": 8,
        "channels": 3,
        "head_dim": 8,
        "heads": 6,
        "trained_heads": (2, 3, 4, 5, 6),
        "depth": 2,
        "mlp_ratio": 4.0,
        "classes": 10,
        "eps": 1e-6,
    }
    return Geometry(**(values | changes))  # type: ignore[arg-type]


def deit_b_geometry(**changes: object) -> Geometry:
    """The paper's supernet: DeiT-B, heads 3 to 12."""
    sizes = {"image_size": 224, "patch_size": 16, "head_dim": 64, "heads": 12, "depth": 12, "classes": 1000}
    return geometry(**(sizes | {"trained_heads": tuple(range(3, 13))} | changes))


def spec(shape: Geometry | None = None, **changes: object) -> Spec:
    """A spec around a geometry."""
    shape = shape or geometry()
    values: dict[str, object] = {
        "mean": (0.5,) * shape.channels,
        "std": (0.25,) * shape.channels,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
    }
    return Spec(geometry=shape, preprocessing=Preprocessing(**(values | changes)))  # type: ignore[arg-type]


def supernet(shape: Geometry | None = None, seed: int = 0) -> Supernet:
    """A supernet whose every tensor is random, norms and biases too, so that a mix-up of any shows."""
    generator = torch.Generator().manual_seed(seed)
    model = Supernet(shape or geometry()).initialise(generator).eval()
    # Wide layers add up more terms; with weights as large as the small ones' they would amplify rounding from block to
    # block until no two runtimes agree.
    spread = min(0.2, 2 / (model.geometry.head_dim * model.geometry.heads) ** 0.5)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    return model


def write_supernet(path: Path, shape: Geometry | None = None, seed: int = 0) -> Path:
    """A supernet file."""
    model = supernet(shape, seed)
    save(path, spec(model.geometry), model.state_dict())
    return path


@pytest.fixture(scope="session")
def supernet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet file; do not write to it."""
    return write_supernet(tmp_path_factory.mktemp("supernet") / "supernet.safetensors")


@pytest.fixture(scope="session")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory, supernet_file: Path) -> Path:
    """A bundle in fp32 and fp16; do not write to it."""
    require("onnxruntime")
    from hydradeploy import export

    path = tmp_path_factory.mktemp("exported") / "bundle"
    export(supernet_file, path, precisions=("fp32", "fp16"))
    return path


def write_images(path: Path, of: Spec | None = None, count: int = 16) -> Path:
    """An .npz file of images to calibrate with."""
    np.savez(path, images=synthetic(of or spec(), count, seed=1).images)
    return path


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory, supernet_file: Path) -> Bundle:
    """h03, h04 and h06 in every precision, h04 with uint8 images too; do not write to it."""
    require("onnxruntime")
    from hydradeploy import export

    path = tmp_path_factory.mktemp("everything")
    data, bundle = write_images(path / "images.npz"), path / "bundle"
    export(supernet_file, bundle, heads=(3, 4, 6), precisions=PRECISION_NAMES, data=data)
    return export(supernet_file, bundle, heads=(4,), precisions=PRECISION_NAMES, data=data, input="uint8")


@pytest.fixture(scope="session")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp32 and fp16 of grey samples, where fp16 overflows on what is white; do not write to it."""
    require("onnxruntime")
    from hydradeploy import export

    path, model = tmp_path_factory.mktemp("overflowing"), supernet()
    with torch.no_grad():
        model.patch_embed.proj.weight[0] = 300.0
    save(path / "supernet.safetensors", spec(model.geometry), model.state_dict())
    grey = np.random.default_rng(0).integers(126, 130, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(path / "grey.npz", images=grey)
    options = {"heads": (2,), "precisions": ("fp32", "fp16"), "data": path / "grey.npz"}
    export(path / "supernet.safetensors", path / "bundle", **options)  # type: ignore[arg-type]
    return path / "bundle"


@pytest.fixture(scope="session")
def deit_b_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet file of DeiT-B's size, heads 3 to 12."""
    return write_supernet(tmp_path_factory.mktemp("deit_b") / "supernet.safetensors", deit_b_geometry())


@pytest.fixture(scope="session")
def deit_b_bundle(tmp_path_factory: pytest.TempPathFactory, deit_b_file: Path) -> Path:
    """All ten subnets of it in fp32; do not write to it."""
    require("onnxruntime")
    from hydradeploy import export

    path = tmp_path_factory.mktemp("deit_b") / "bundle"
    export(deit_b_file, path)
    return path


@pytest.fixture(scope="session")
def deit_b_everything(tmp_path_factory: pytest.TempPathFactory, deit_b_file: Path) -> Bundle:
    """All ten subnets of it in every precision; do not write to it."""
    require("onnxruntime")
    from hydradeploy import export

    path = tmp_path_factory.mktemp("deit_b_everything")
    data = write_images(path / "images.npz", spec(deit_b_geometry()), count=4)
    return export(deit_b_file, path / "bundle", precisions=PRECISION_NAMES, data=data)


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten classes of noisy patterns, 8 by 8: 160 images to train on, 45 held out, 40 to test; do not write to it."""
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (10, 8, 8))
    arrays = {}
    for split, count in (("train", 160), ("val", 45), ("test", 40)):
        labels = np.arange(count) % 10
        noisy = patterns[labels] + generator.normal(0, 20, (count, 8, 8))
        arrays |= {f"{split}_images": np.clip(noisy, 0, 255).astype(np.uint8), f"{split}_labels": labels}
    path = tmp_path_factory.mktemp("blobs") / "blobs.npz"
    np.savez(path, **arrays)
    return str(path)


@pytest.fixture
def bundle(tmp_path: Path, shared_bundle: Path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(shared_bundle, tmp_path / "bundle"))


def rot(path: Path, at: int) -> None:
    """Change a byte without a trace in the file's size, time and inode, as a failing disk does."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at % before.st_size)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image file of 60 by 40 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    return path


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("export", "--heads", 3)` runs the command line in this process."""
    from hydradeploy.cli import main

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hydradeploy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return call
