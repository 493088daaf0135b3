"""The device's end, spoken to directly: copies that break off, and an end that falls silent."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hydradeploy import open_bundle
from hydradeploy.bundle import FileRecord
from hydradeploy.engines.cache import Cache, Key
from hydradeploy.errors import IntegrityError
from hydradeploy.files import sha256_bytes
from hydradeploy.remote import installing
from hydradeploy.remote.channel import (
    Alive,
    Channel,
    Done,
    Ended,
    Failed,
    Hangup,
    Line,
    Message,
    Missing,
    Part,
    Put,
    Run,
    Take,
    Want,
)
from hydradeploy.remote.contents import contents
from hydradeploy.remote.ssh import line_of
from tests.conftest import rot

ROOT = Path(__file__).parents[2]
NAME = "bundle-12345678"
# As the installed program has it: no module of the working directory.
THERE = """
import sys
sys.path = list(filter(None, sys.path))
from hydradeploy.remote.there import main
sys.prefix = sys.argv[2]
sys.exit(main(float(sys.argv[1])))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hydradeploy" / "remote" / NAME


@contextmanager
def there(
    home: Path | None = None, silence_s: float = 60.0, environment: Path = Path(sys.prefix)
) -> Iterator[tuple[Channel, subprocess.Popen[bytes]]]:
    """A conversation, greeted; `home` is where it starts, `environment` the one that it runs in."""
    command = [sys.executable, "-c", THERE, str(silence_s), str(environment)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=home, env=env) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        channel = Channel(process.stdout.fileno(), process.stdin.fileno(), silence_s=60.0)
        channel.greeted()
        yield channel, process


def wanted(channel: Channel, files: dict[str, FileRecord]) -> Missing:
    channel.send(Want(place=NAME, files=files))
    missing = channel.receive()
    assert isinstance(missing, Missing), missing
    return missing


def put(channel: Channel, path: Path, offset: int = 0, *, data: bytes | None = None) -> None:
    whole = path.read_bytes()
    message = Put(sha256=sha256_bytes(whole), offset=offset, size_bytes=len(whole) - offset)
    channel.send(message, [whole[offset:] if data is None else data])


def take(channel: Channel) -> Message:
    channel.send(Take())
    return channel.receive()


def copy(bundle: Path, files: dict[str, FileRecord]) -> None:
    with there() as (channel, _):
        missing = wanted(channel, files)
        for name, record in files.items():
            if record.sha256 in missing.contents:
                put(channel, bundle / name)
        assert take(channel) == Done()


def rest_of(channel: Channel) -> Iterator[Message]:
    with suppress(Hangup):
        while True:
            yield channel.receive()


def test_a_copy_that_breaks_off_goes_on_where_it_was(shared_bundle, bundle, place):
    """The bundle that is there stays until the new one is whole; nothing that has arrived is asked for again."""
    old = contents(open_bundle(shared_bundle))
    copy(shared_bundle, old)
    weights, notes = bundle / "supernet-fp32.weights", bundle / "golden.npz"
    weights.write_bytes(weights.read_bytes()[::-1])
    notes.write_bytes(notes.read_bytes() + b"more")
    files = old | {
        path.name: FileRecord(sha256=sha256_bytes(path.read_bytes()), size_bytes=path.stat().st_size)
        for path in (weights, notes)
    }
    new = files[weights.name].sha256
    half = weights.read_bytes()[: weights.stat().st_size // 2]
    with there() as (channel, process):
        assert set(wanted(channel, files).contents) == {new, files[notes.name].sha256}
        put(channel, notes)
        put(channel, weights, data=half)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert contents(open_bundle(place / "bundle", "always")) == old
    with there() as (channel, _):
        missing = wanted(channel, files)
        assert missing.contents == {new: Part(size_bytes=len(half), sha256=sha256_bytes(half))}
        assert isinstance(take(channel), Failed)
    assert contents(open_bundle(place / "bundle", "always")) == old
    with there() as (channel, _):
        wanted(channel, files)
        put(channel, weights, len(half))
        assert take(channel) == Done()
    assert (place / "bundle" / weights.name).read_bytes() == weights.read_bytes()
    assert (place / "bundle" / notes.name).read_bytes() == notes.read_bytes()
    assert not (place / "incoming").exists()


def test_what_arrives_otherwise_than_announced_is_thrown_away(shared_bundle, place):
    files = contents(open_bundle(shared_bundle))
    path = shared_bundle / "h03-fp32.onnx"
    with there() as (channel, process):
        wanted(channel, files)
        put(channel, path, data=bytes(path.stat().st_size))
        failed = channel.receive()
        assert isinstance(failed, Failed)
        assert (failed.code, process.wait(timeout=60)) == (10, 10)
        assert "arrived with another sha256" in failed.message
    assert list((place / "incoming").iterdir()) == []
    assert not (place / "bundle").exists()


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", ""])
def test_no_name_leads_out_of_its_place(shared_bundle, tmp_path, place, name):
    path = shared_bundle / "h03-fp32.onnx"
    record = contents(open_bundle(shared_bundle))[path.name]
    with there() as (channel, _):
        wanted(channel, {name: record})
        put(channel, path)
        failed = take(channel)
        assert isinstance(failed, Failed)
        assert failed.code == 10
    with there() as (channel, _):
        channel.send(Want(place=name, files={}))
        assert isinstance(channel.receive(), Failed)
    assert not list(tmp_path.rglob("outside"))


def test_an_engine_that_is_damaged_here_does_not_go(bundle):
    """Its bytes are not those that its record announces, so that it would keep everything else from arriving."""
    opened, cache = open_bundle(bundle), Cache(bundle / "engines")
    artifact = opened.artifact("h03-fp32")
    keys = [
        Key(kind="tensorrt-rtx", graph_sha256=artifact.graph_sha256, sha256=artifact.sha256, version=version)
        for version in ("1.5", "1.6", "1.7")
    ]
    for key in keys:
        cache.store(key, b"for anybody")
    plans = [f"engines/{key.fingerprint}/plan" for key in keys]
    assert set(plans) <= contents(opened).keys()
    rot(bundle / plans[0], 3)
    (bundle / plans[1]).unlink()
    assert contents(opened).keys() & {*plans} == {plans[2]}


def test_no_file_of_the_home_directory_stands_in_for_a_module(shared_bundle, place, tmp_path, monkeypatch):
    """Commands over ssh start there, and people keep scripts there."""
    files = contents(open_bundle(shared_bundle))
    copy(shared_bundle, files)
    for name in ("signal", "random", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    with there(tmp_path) as (channel, _):
        wanted(channel, files)
        assert take(channel) == Done()
        channel.send(Run(arguments=("--heads=2", "--precision=fp32", "--threads=1", "--device=cpu", "--dry-run")))
        said = [channel.receive()]
        while isinstance(said[-1], Line):
            said.append(channel.receive())
    assert isinstance(said[-1], Ended), said
    assert said[-1].code == 0, said


def test_an_environment_that_somebody_runs_in_is_not_removed_for_another(tmp_path):
    old, new = tmp_path / "venv-1", tmp_path / "venv-2"
    for environment in (old, new):
        environment.mkdir()
        (environment / "ready").write_text("ort")
    with there(environment=old):
        installing.point(str(tmp_path), str(new))
        assert (tmp_path / "venv").resolve() == new
        assert (old / "ready").exists()
    installing.point(str(tmp_path), str(new))
    assert sorted(os.listdir(tmp_path)) == ["venv", "venv-2"]


def test_who_falls_silent_is_taken_for_gone_and_the_profile_ends(shared_bundle, place):
    """As when a cable is pulled: nothing closes. Who says that he is there is waited for."""
    files = contents(open_bundle(shared_bundle))
    copy(shared_bundle, files)
    with there(silence_s=2.0) as (channel, process):
        wanted(channel, files)
        assert take(channel) == Done()
        channel.send(Run(arguments=("--heads=2", "--precision=fp32", "--threads=1", "--device=cpu", "--preset=gate")))
        silent = threading.Event()

        def tell() -> None:
            while not silent.wait(0.2):
                channel.send(Alive())

        teller = threading.Thread(target=tell)
        teller.start()
        try:
            said = [channel.receive()]
            while isinstance(said[-1], Line) and "measuring 0/" not in said[-1].text:
                said.append(channel.receive())
        finally:
            silent.set()
            teller.join()
        assert isinstance(said[-1], Line), said
        assert process.wait(timeout=60) == 0
        assert not any(isinstance(heard, Ended) for heard in rest_of(channel))


def test_a_script_that_a_shell_would_read_otherwise_is_refused():
    for script in ("echo 'a'", "a\nb", "echo a!b", "printf a\\\\b"):
        with pytest.raises(ValueError, match="not to be quoted"):
            line_of(script)
    ran = subprocess.run(line_of('printf %b "$1"', "it's\n-n ü\\0"), shell=True, capture_output=True)
    assert ran.stdout == "it's\n-n ü\\0".encode()


def test_noise_that_is_no_message_is_an_error_of_its_own():
    source, sink = os.pipe()
    os.write(sink, b"Segmentation fault\n")
    channel = Channel(source, sink)
    with pytest.raises(IntegrityError, match="cannot be read"):
        channel.receive()
    os.close(source)
    os.close(sink)
