"""What comes out of the cache is whole and of the key asked for, whatever happened to it and to who wrote it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from hydradeploy.engines.cache import Cache, Key, carry_over, roots, user_root
from hydradeploy.errors import EnvironmentFailed, IntegrityError
from tests.conftest import missing

KEY = Key(
    kind="tensorrt",
    graph_sha256="1" * 64,
    sha256="2" * 64,
    version="10.3.0",
    cuda_runtime="12.6",
    cuda_driver="12.6",
    gpu="Orin",
    compute_capability="8.7",
    sm_count=16,
    flags={"workspace_bytes": "1073741824", "tf32": "off"},
)
OTHERS = {
    "kind": "tensorrt-rtx",
    "graph_sha256": "3" * 64,
    "sha256": "3" * 64,
    "version": "10.7.0",
    "cuda_runtime": "12.7",
    "cuda_driver": None,
    "gpu": "Orin NX",
    "compute_capability": "8.6",
    "sm_count": 8,
    "flags": {"workspace_bytes": "1", "tf32": "off"},
}
PLAN = os.urandom(10_000)


def quiet(text: str) -> None:
    raise AssertionError(f"nobody is to be waited for: {text}")


def kept(root: Path, plan: bytes = PLAN, key: Key = KEY) -> Cache:
    cache = Cache(root)
    with cache.lock(key, quiet):
        cache.store(key, plan, artifact="h06-fp32")
    return cache


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_plan_comes_back_as_it_was_and_is_replaced_whole(tmp_path):
    cache = kept(tmp_path / "engines")
    assert cache.find(KEY) == PLAN
    kept(cache.root, b"newer")
    assert cache.find(KEY) == b"newer"
    assert files(cache.root) == [f"{KEY.fingerprint}/engine.json", f"{KEY.fingerprint}/plan"]
    record = json.loads((cache.root / KEY.fingerprint / "engine.json").read_text())
    assert (record["schema"], record["artifact"], record["key"]["gpu"]) == (1, "h06-fp32", "Orin")


def test_nothing_is_found_where_nothing_is(tmp_path):
    assert Cache(tmp_path / "absent").find(KEY) is None
    assert Cache(tmp_path / "absent").records() == {}
    assert not (tmp_path / "absent").exists()


def test_every_field_has_another_value_here():
    assert set(OTHERS) == set(Key.__struct_fields__)


@pytest.mark.parametrize("field", OTHERS)
def test_a_plan_is_for_its_key_alone(tmp_path, field):
    """Each field counts: of another GPU, version, graph, weights or flags nothing is found."""
    cache = kept(tmp_path)
    other = replace(KEY, **{field: OTHERS[field]})
    assert other.fingerprint != KEY.fingerprint
    assert cache.find(other) is None
    (told,) = other.differences(KEY)
    assert " here / " in told


def test_the_order_of_flags_does_not_count(tmp_path):
    turned = replace(KEY, flags=dict(reversed(KEY.flags.items())))
    assert kept(tmp_path).find(turned) == PLAN


@pytest.mark.parametrize("field", OTHERS)
def test_a_plan_moved_under_another_key_is_refused_with_what_differs(tmp_path, field):
    cache = kept(tmp_path)
    other = replace(KEY, **{field: OTHERS[field]})
    (tmp_path / KEY.fingerprint).rename(tmp_path / other.fingerprint)
    with pytest.raises(IntegrityError) as refused:
        cache.find(other)
    assert other.differences(KEY)[0] in refused.value.message


def test_differences_name_the_field_and_both_values():
    orin, nano = KEY, replace(KEY, gpu="Orin Nano", sm_count=8, sha256="f" * 64)
    assert orin.differences(nano) == (
        f"weights: {'2' * 12} here / {'f' * 12} there",
        "GPU: Orin here / Orin Nano there",
        "SM count: 16 here / 8 there",
    )
    assert orin.differences(orin) == ()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    # Two bytes: a record without its last newline is whole.
    path.write_bytes(path.read_bytes()[:-2])


def link(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


DAMAGE = {
    "a bit of the plan": ("plan", flip),
    "a truncated plan": ("plan", cut),
    "an empty plan": ("plan", lambda path: path.write_bytes(b"")),
    "no plan": ("plan", Path.unlink),
    "a plan that leads out": ("plan", link),
    "a directory for a plan": ("plan", lambda path: (path.unlink(), path.mkdir())),
    "a truncated record": ("engine.json", cut),
    "an empty record": ("engine.json", lambda path: path.write_bytes(b"")),
    "no record": ("engine.json", Path.unlink),
    "a record that leads out": ("engine.json", link),
    "a record that is none": ("engine.json", lambda path: path.write_text('{"schema": 1}')),
    "a record of later": ("engine.json", lambda path: path.write_text('{"schema": 2}')),
    "a record of bytes": ("engine.json", lambda path: path.write_bytes(os.urandom(100))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused_by_name_and_can_be_replaced(tmp_path, damage):
    cache = kept(tmp_path / "engines")
    name, change = DAMAGE[damage]
    change(cache.root / KEY.fingerprint / name)
    with pytest.raises(IntegrityError) as refused:
        cache.find(KEY)
    assert str(cache.root / KEY.fingerprint) in refused.value.message
    assert kept(cache.root, b"again").find(KEY) == b"again"


def test_every_byte_of_a_record_counts_or_does_no_harm(tmp_path):
    """Whatever byte is changed: the right plan, or a refusal; never another answer."""
    cache = kept(tmp_path, b"plan")
    path = tmp_path / KEY.fingerprint / "engine.json"
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert cache.find(KEY) == b"plan"
        except IntegrityError:
            continue


def test_a_plan_in_the_place_of_a_link_is_replaced_and_what_it_led_to_stays(tmp_path):
    cache = kept(tmp_path / "elsewhere")
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / KEY.fingerprint).symlink_to(cache.root / KEY.fingerprint)
    with pytest.raises(IntegrityError):
        Cache(tmp_path / "engines").find(KEY)
    assert kept(tmp_path / "engines", b"own").find(KEY) == b"own"
    assert cache.find(KEY) == PLAN


def test_timings_are_of_a_gpu_and_versions_whatever_is_built(tmp_path):
    cache = Cache(tmp_path / "engines")
    assert cache.timing_cache(KEY) == b""
    with cache.timing(KEY, quiet) as timings:
        assert timings.data == b""
        timings.data = b"first"
    same = replace(KEY, graph_sha256="7" * 64, sha256="7" * 64, flags={})
    with cache.timing(same, quiet) as timings:
        assert timings.data == b"first"
        timings.data += b" second"
    assert cache.timing_cache(KEY) == b"first second"
    for field in set(OTHERS) - {"graph_sha256", "sha256", "flags"}:
        assert cache.timing_cache(replace(KEY, **{field: OTHERS[field]})) == b""


def test_a_build_that_fails_leaves_the_timings_as_they_were(tmp_path):
    cache = Cache(tmp_path)
    with cache.timing(KEY, quiet) as timings:
        timings.data = b"good"

    def fails() -> None:
        with cache.timing(KEY, quiet) as timings:
            timings.data = b"half"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert cache.timing_cache(KEY) == b"good"


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
def test_damaged_timings_are_as_good_as_none(tmp_path, damage):
    cache = Cache(tmp_path)
    with cache.timing(KEY, quiet) as timings:
        timings.data = b"timings"
    damage(tmp_path / KEY.timing)
    assert cache.timing_cache(KEY) == b""


def process(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A process that says something and waits for its stdin to end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


WRITER = """
import sys
from pathlib import Path
from hydradeploy import files
from hydradeploy.engines.cache import Cache
from tests.engines.test_cache import KEY, quiet

cache, step = Cache(Path(sys.argv[1])), sys.argv[2]
def stop(*_):
    print("there", flush=True)
    sys.stdin.read()
with cache.lock(KEY, quiet):
    if step == "building":
        stop()
    if step == "staged":
        files._sync = stop
    if step == "exchanged":
        take_place = files._take_place
        files._take_place = lambda *places: (take_place(*places), stop())
    cache.store(KEY, b"newer")
"""


@pytest.mark.parametrize("step", ["building", "staged", "exchanged"])
@pytest.mark.parametrize("before", [True, False])
def test_a_killed_builder_blocks_nobody_and_leaves_nothing_to_be_loaded_that_is_not_whole(tmp_path, step, before):
    root = tmp_path / "engines"
    if before:
        kept(root)
    with process(WRITER, root, step) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"there\n"
        writer.send_signal(signal.SIGKILL)
    cache = Cache(root)
    assert cache.find(KEY) == (b"newer" if step == "exchanged" else PLAN if before else None)
    assert len(cache.records()) == (before or step == "exchanged")
    assert kept(root, b"third").find(KEY) == b"third"
    assert files(root) == [f"{KEY.fingerprint}/engine.json", f"{KEY.fingerprint}/plan"]


def test_who_comes_second_is_told_and_waits(tmp_path):
    told: list[str] = []
    with process(WRITER, tmp_path, "building") as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        writer.stdout.readline()

        def waiting(text: str) -> None:
            told.append(text)
            writer.stdin.close()

        cache = Cache(tmp_path)
        with cache.lock(KEY, waiting):
            assert cache.find(KEY) == b"newer"
    assert len(told) == 1
    assert KEY.fingerprint in told[0]


FULL = """
import os, sys
from pathlib import Path
from hydradeploy.engines.cache import Cache
from hydradeploy.errors import HydraError
from tests.engines.test_cache import KEY, quiet

cache = Cache(Path(sys.argv[1]))
try:
    with cache.lock(KEY, quiet), cache.timing(KEY, quiet) as timings:
        cache.store(KEY, b"%s" % (sys.argv[2][:1].encode() * int(sys.argv[2][1:])))
        timings.data = b"t" * int(sys.argv[3])
except HydraError as error:
    print(error.message)
    sys.exit(int(error.exit_code))
"""


def test_a_full_disk_is_an_environment_failure_and_leaves_what_was_there(tmp_path):
    """On a file system that holds one plan: the second fails, the first and its timings are as they were."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "full.py").write_text(FULL)
    run = f"{sys.executable} {tmp_path}/full.py {tmp_path}/disk/engines"
    script = f"""
        mount -t tmpfs -o size=200k tmpfs {tmp_path}/disk || exit 77
        {run} a50000 1000; echo "code $?"
        cd {tmp_path}/disk; find . -type f | sort | xargs sha256sum > {tmp_path}/before
        {run} b500000 1000; echo "code $?"
        find . -type f | sort | xargs sha256sum > {tmp_path}/after
        {run} c50000 500000; echo "code $?"
        find . -type f | sort | xargs sha256sum > {tmp_path}/timings
    """
    root = Path(__file__).parents[2]
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    env = os.environ | {"PYTHONPATH": str(root)}
    ran = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, env=env)
    if ran.returncode == 77 or "unshare failed" in ran.stderr or "Operation not permitted" in ran.stderr:
        missing("mount", f"this kernel lets us mount no small disk ({ran.stderr.strip()})")
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("code")] == ["code 0", "code 12", "code 12"], ran.stdout
    assert "no space left" in lines[1]
    before, after, timings = ((tmp_path / name).read_text() for name in ("before", "after", "timings"))
    assert before.count("\n") == 3
    assert after == before
    # The plan fitted, the timings did not: those from before are there.
    line = next(line for line in before.splitlines() if "timing-" in line)
    assert line in timings
    assert timings.count("\n") == 3
    assert timings != before


def test_a_full_disk_in_this_process(tmp_path, monkeypatch):
    """Also where no small disk can be mounted."""
    import errno

    cache = kept(tmp_path / "engines")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFailed), cache.lock(KEY, quiet):
        cache.store(KEY, b"newer")
    monkeypatch.undo()
    assert cache.find(KEY) == PLAN
    assert files(cache.root) == [f"{KEY.fingerprint}/engine.json", f"{KEY.fingerprint}/plan"]


def test_engines_of_a_bundle_that_can_be_written_to_are_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_root() == tmp_path / "cache" / "hydradeploy" / "engines"
    assert roots(tmp_path) == (tmp_path / "engines", user_root())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert roots(tmp_path) == (user_root(), tmp_path / "engines")


def test_engines_go_along_with_what_is_still_in_the_bundle(tmp_path):
    old, gone, other = tmp_path / "old", replace(KEY, sha256="9" * 64), replace(KEY, gpu="Thor")
    for key in (KEY, gone, other):
        kept(old, key=key)
    with Cache(old).timing(KEY, quiet) as timings:
        timings.data = b"timings"
    damaged = replace(KEY, gpu="damaged")
    kept(old, key=damaged)
    cut(old / damaged.fingerprint / "engine.json")
    (old / ".left.staged-over").mkdir()
    carry_over(old, tmp_path / "new", {KEY.sha256})
    new = Cache(tmp_path / "new")
    assert new.find(KEY) == new.find(other) == PLAN
    assert new.timing_cache(KEY) == b"timings"
    assert sorted(entry.name for entry in new.root.iterdir()) == sorted(
        [KEY.fingerprint, other.fingerprint, KEY.timing]
    )
    assert Cache(old).find(gone) == PLAN


def test_no_directory_is_made_for_no_engine(tmp_path):
    kept(tmp_path / "old")
    carry_over(tmp_path / "old", tmp_path / "new", ())
    assert not (tmp_path / "new").exists()
