"""`profile` with children that are none: what is measured in which order, what is kept, and what it is worth."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from hydradeploy import export, open_bundle
from hydradeploy.devices.reading import Reading
from hydradeploy.errors import EnvironmentFailed, IntegrityError, MissingError, UsageError
from hydradeploy.measurements import read_profile, read_profiles
from hydradeploy.profiler.child import Request
from hydradeploy.profiler.presets import PRESETS
from hydradeploy.stats.latency import bounds
from tests.conftest import missing
from tests.profiler.virtual import CONDITIONS, DEVICE, LAWS, Here, Launch, Law, largest_file, profile

NAMES = [f"h{heads:02d}-{precision}" for heads in range(2, 7) for precision in ("fp32", "fp16")]
QUICK = PRESETS["quick"]


def files(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


@pytest.mark.parametrize("preset", ["quick", "standard", "gate"])
def test_every_artifact_gets_its_rounds_of_samples(shared_bundle, tmp_path, preset):
    """A call takes a 64th of a second, so counts decide and not seconds."""
    how, launch = PRESETS[preset], Launch()
    done = profile(shared_bundle, tmp_path, preset=preset, launch=launch, here=Here())
    assert sorted(cell.artifact for cell in done.cells) == sorted(NAMES)
    for cell in done.cells:
        first = cell.process.count(0)
        later = math.ceil((how.samples - first) / (how.rounds - 1))
        assert first == max(how.sampling.samples, math.ceil(64 * how.sampling.seconds))
        assert cell.process == tuple(n for n in range(how.rounds) for _ in range(later if n else first))
        assert how.samples <= len(cell.latency_s) < how.samples + how.rounds
        assert cell.load_s == (0.125,) * how.rounds
        assert cell.first_s == (1 / 64,) * how.rounds
    assert done.stored.profile.cells == done.cells == read_profile(done.stored.path).profile.cells


def test_an_unknown_preset_names_those_there_are(shared_bundle, tmp_path):
    launch = Launch()
    with pytest.raises(UsageError, match="no preset 'gentle'") as refused:
        profile(shared_bundle, tmp_path, preset="gentle", launch=launch, here=Here())
    assert refused.value.hint == "one of quick, standard, gate, sustained"
    assert launch.requests == []


def test_rounds_go_forwards_and_backwards_in_turn(shared_bundle, tmp_path):
    launch = Launch()
    profile(shared_bundle, tmp_path, heads=(2, 4, 6), precisions=("fp32",), threads=(1, 2), launch=launch, here=Here())
    forwards = [(f"h{heads:02d}-fp32", threads) for heads in (2, 4, 6) for threads in (1, 2)]
    rounds = [forwards, forwards[::-1], forwards, forwards[::-1], forwards]
    assert [(request.artifact, request.threads) for request in launch.requests] == list(chain(*rounds))


def test_samples_are_those_of_the_children_in_the_order_they_ran(shared_bundle, tmp_path):
    """Every call of every child takes a time of its own, so a mix-up of any shows."""
    ticks = count(1)
    launch = Launch(lambda request: (next(ticks) / 4096 for _ in count()))
    done = profile(shared_bundle, tmp_path, heads=(2, 3), launch=launch, here=Here())
    for cell in done.cells:
        answers = [a for r, a in zip(launch.requests, launch.answers, strict=True) if r.artifact == cell.artifact]
        assert cell.latency_s == tuple(value for answer in answers for value in answer.latency_s)
        assert cell.process == tuple(number for number, a in enumerate(answers) for _ in a.latency_s)
        assert cell.first_s == tuple(answer.first_s for answer in answers)
        assert cell.evidence["warmup"] == tuple(answer.warmup for answer in answers)
        assert list(cell.latency_s) == sorted(set(cell.latency_s)), "in order, and none twice"


def test_a_request_is_what_the_bundle_says_of_the_artifact(shared_bundle, tmp_path):
    launch = Launch()
    profile(shared_bundle, tmp_path, heads=(3,), precisions=("fp16",), threads=(2,), launch=launch, here=Here())
    opened = open_bundle(shared_bundle)
    artifact = opened.artifact("h03-fp16")
    for request in launch.requests:
        assert Path(request.bundle).samefile(shared_bundle)
        assert (request.artifact, request.graph_sha256) == ("h03-fp16", artifact.graph_sha256)
        assert (request.backend, request.compute_type, request.settings) == ("onnxruntime", "fp16", {})
        assert (request.threads, request.device) == (2, "cpu")
        assert msgspec.structs.replace(request.sampling, samples=QUICK.sampling.samples) == QUICK.sampling


def test_the_children_find_their_files_where_the_bundle_is_named_by_a_relative_path(
    shared_bundle, tmp_path, monkeypatch
):
    monkeypatch.chdir(shared_bundle.parent)
    launch = Launch()
    profile(Path(shared_bundle.name), tmp_path, heads=(2,), launch=launch, here=Here())
    for request in launch.requests:
        assert all(Path(path).is_absolute() for path in (request.bundle, request.batches))


@pytest.mark.parametrize(("batch", "shape"), [(1, (16, 1)), (3, (6, 3)), (40, (2, 40)), ("dynamic", (16, 1))])
def test_inputs_are_sixteen_real_images_or_more_in_batches_of_the_artifact(supernet_file, tmp_path, batch, shape):
    export(supernet_file, tmp_path / "bundle", heads=(2,), batch=batch)
    seen = []

    def look(request: Request) -> Iterator[float]:
        seen.append(np.load(request.batches))
        return repeat(1 / 64)

    done = profile(tmp_path / "bundle", tmp_path / "profiles", launch=Launch(look), here=Here())
    for batches in seen:
        assert batches.shape == (*shape, 32, 32, 3)
        assert batches.dtype == np.uint8
        flat = batches.reshape(-1, 3 * 32 * 32)
        assert len(np.unique(flat[:16], axis=0)) == 16
        assert not np.array_equal(batches[0], batches[1])
    assert done.cells[0].batch == shape[1]


def test_inputs_are_the_golden_images_and_their_mirror_images(shared_bundle, tmp_path):
    seen = []

    def look(request: Request) -> Iterator[float]:
        seen.append(np.load(request.batches)[:, 0])
        return repeat(1 / 64)

    profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(look), here=Here())
    images = open_bundle(shared_bundle).golden().images
    real = {image.tobytes() for image in images} | {image[:, ::-1].tobytes() for image in images}
    assert {image.tobytes() for image in seen[0]} <= real
    assert images[0].tobytes() in {image.tobytes() for image in seen[0]}


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt(), MissingError("gone")])
def test_the_images_to_measure_with_are_gone_afterwards(shared_bundle, tmp_path, failure):
    seen = []
    before = set(os.listdir("/proc/self/fd"))

    def look(request: Request) -> Iterator[float]:
        seen.append(Path(request.batches))
        assert seen[-1].exists()
        if failure is not None:
            raise failure
        return repeat(1 / 64)

    expected = nullcontext() if failure is None else pytest.raises(type(failure))
    with expected:
        profile(shared_bundle, tmp_path / "profiles", heads=(2,), launch=Launch(look), here=Here())
    assert seen
    assert set(os.listdir("/proc/self/fd")) == before, "they are in memory, and their files are closed"
    if failure is not None:
        assert files(tmp_path / "profiles") == []


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"heads": (4,)}, ["h04-fp16", "h04-fp32"]),
        ({"precisions": ["fp16"]}, [f"h0{heads}-fp16" for heads in range(2, 7)]),
        ({"heads": (6, 2), "precisions": ["fp32"]}, ["h02-fp32", "h06-fp32"]),
        ({}, sorted(NAMES)),
    ],
)
def test_heads_and_precisions_choose(shared_bundle, tmp_path, chosen, expected):
    launch = Launch()
    done = profile(shared_bundle, tmp_path, launch=launch, here=Here(), **chosen)
    assert sorted(cell.artifact for cell in done.cells) == expected
    assert sorted(set(launch.names)) == expected


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ({"heads": (7,)}, "no artifact of 7 heads$"),
        ({"heads": (2, 9, 8)}, "no artifact of 8 heads and 9 heads$"),
        ({"precisions": ["int8"]}, "no artifact of int8$"),
        ({"precisions": ["fp32", "int4"]}, "no artifact of int4$"),
        ({"heads": (1,), "precisions": ["fp32"]}, "no artifact of 1 heads"),
        ({"precisions": [""]}, "no artifact of "),
    ],
)
def test_what_the_bundle_has_not_is_refused_by_name(shared_bundle, tmp_path, chosen, named):
    launch = Launch()
    with pytest.raises(UsageError, match=named) as refused:
        profile(shared_bundle, tmp_path / "profiles", launch=launch, here=Here(), **chosen)
    assert all(name in str(refused.value.hint) for name in NAMES)
    assert launch.requests == []
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize("threads", [(), (0,), (2, 0), (-1,)])
def test_thread_counts_below_one_are_refused(shared_bundle, tmp_path, threads):
    launch = Launch()
    with pytest.raises(UsageError, match="threads must be 1 to"):
        profile(shared_bundle, tmp_path, threads=threads, launch=launch, here=Here())
    assert launch.requests == []


@pytest.mark.parametrize(("threads", "expected"), [(None, {3}), ((1,), {1}), ((4, 1, 4), {1, 4})])
def test_every_thread_count_is_a_cell_and_the_cores_one_may_use_are_the_default(
    shared_bundle, tmp_path, threads, expected
):
    launch = Launch()
    done = profile(shared_bundle, tmp_path, heads=(2,), threads=threads, launch=launch, here=Here())
    assert sorted((cell.artifact, cell.threads) for cell in done.cells) == sorted(
        (name, number) for name in ("h02-fp32", "h02-fp16") for number in expected
    )
    assert {request.threads for request in launch.requests} == expected
    assert len(launch.requests) == QUICK.rounds * len(done.cells)


def test_progress_counts_every_child_once(shared_bundle, tmp_path):
    told = []
    profile(
        shared_bundle,
        tmp_path,
        heads=(2, 3),
        launch=Launch(),
        here=Here(),
        report=lambda what, done, total: told.append((what, done, total)),
    )
    assert told == [("measuring", done, 20) for done in range(21)]


def failing(name: str, after: int = 0) -> Launch:
    """Children of one artifact die after so many of them have answered."""
    answered = []

    def die(request: Request) -> Iterator[float]:
        if request.artifact == name:
            if len(answered) == after:
                raise MissingError(f"{name}: the measuring process ended with signal 9: it said nothing")
            answered.append(request)
        return repeat(1 / 64)

    return Launch(die)


@pytest.mark.parametrize("after", [0, 2])
def test_a_child_that_fails_is_the_error_of_its_cell_and_the_others_go_on(shared_bundle, tmp_path, after):
    launch = failing("h03-fp32", after)
    done = profile(shared_bundle, tmp_path, launch=launch, here=Here())
    stored = read_profile(done.stored.path).profile
    assert len(stored.cells) == 10
    for cell in stored.cells:
        if cell.artifact == "h03-fp32":
            assert cell.error == "h03-fp32: the measuring process ended with signal 9: it said nothing"
            assert len(cell.latency_s) == (16 + 21 if after else 0)
        else:
            assert cell.error is None
            assert len(cell.latency_s) == QUICK.samples
    assert launch.names.count("h03-fp32") == after + 1, "it is not tried again"


def test_where_every_cell_fails_there_is_no_profile(shared_bundle, tmp_path):
    def die(request: Request) -> Iterator[float]:
        raise MissingError(f"{request.artifact}: no memory")

    with pytest.raises(MissingError, match="no cell could be measured: h02-fp"):
        profile(shared_bundle, tmp_path, launch=Launch(die), here=Here())
    assert files(tmp_path) == []


def test_where_every_cell_fails_what_was_measured_before_stays(shared_bundle, tmp_path):
    before = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    content = before.path.read_bytes()

    def die(request: Request) -> Iterator[float]:
        raise MissingError(f"{request.artifact}: no memory")

    with pytest.raises(MissingError, match="no cell could be measured"):
        profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(die), here=Here())
    assert before.path.read_bytes() == content
    assert files(tmp_path) == [before.path.name]


def test_a_second_run_replaces_its_own_cells_and_keeps_the_others(shared_bundle, tmp_path):
    chosen = {"precisions": ["fp32"], "here": Here()}
    first = profile(shared_bundle, tmp_path, heads=(2, 3), threads=(1, 2), launch=Launch(), **chosen)
    fast = Launch(lambda _: repeat(1 / 128))
    second = profile(shared_bundle, tmp_path, heads=(3, 4), threads=(2,), launch=fast, **chosen)
    assert second.stored.path == first.stored.path
    assert files(tmp_path) == [first.stored.path.name]
    stored = read_profile(first.stored.path).profile
    latency = {(cell.artifact, cell.threads): set(cell.latency_s) for cell in stored.cells}
    assert latency == {
        ("h02-fp32", 1): {1 / 64},
        ("h02-fp32", 2): {1 / 64},
        ("h03-fp32", 1): {1 / 64},
        ("h03-fp32", 2): {1 / 128},
        ("h04-fp32", 2): {1 / 128},
    }
    assert len(stored.cells) == 5
    assert {cell.artifact for cell in second.cells} == {"h03-fp32", "h04-fp32"}


def test_the_cells_of_another_bundle_stay_apart(shared_bundle, supernet_file, tmp_path):
    """Graphs of another batch size have the same names and other hashes."""
    export(supernet_file, tmp_path / "other", heads=(2,), batch=2)
    first = profile(shared_bundle, tmp_path / "p", heads=(2,), precisions=["fp32"], launch=Launch(), here=Here())
    second = profile(tmp_path / "other", tmp_path / "p", launch=Launch(), here=Here())
    assert second.stored.path == first.stored.path
    assert [(cell.artifact, cell.batch) for cell in second.stored.profile.cells] == [("h02-fp32", 1), ("h02-fp32", 2)]


@pytest.mark.parametrize(
    "other",
    [
        Here().changed(affinity="0"),
        Here().changed(governor="powersave"),
        Here().changed(power_mode="15W"),
        Here().changed(quota_cores=1.5),
        Here().changed(os="Linux 6.2"),
        Here(msgspec.structs.replace(DEVICE, memory_bytes=8 << 30)),
        Here(msgspec.structs.replace(DEVICE, name="Toy Board 4")),
    ],
    ids=["affinity", "governor", "power mode", "quota", "kernel", "memory", "name"],
)
def test_another_device_or_other_conditions_are_another_file(shared_bundle, tmp_path, other):
    first = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    content = first.path.read_bytes()
    slow = Launch(lambda _: repeat(1 / 32))
    second = profile(shared_bundle, tmp_path, heads=(2,), launch=slow, here=other).stored
    assert second.path != first.path
    assert first.path.read_bytes() == content
    assert {set(cell.latency_s) == {1 / 32} for cell in second.profile.cells} == {True}
    assert len(read_profiles(tmp_path)) == 2
    again = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=other).stored
    assert again.path == second.path, "and it finds its own file again"
    assert len(files(tmp_path)) == 2


def test_memory_that_the_kernel_counts_a_little_otherwise_after_a_boot_is_the_same_device(shared_bundle, tmp_path):
    first = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    booted = Here(msgspec.structs.replace(DEVICE, memory_bytes=DEVICE.memory_bytes - 40960))
    second = profile(shared_bundle, tmp_path, heads=(3,), launch=Launch(), here=booted).stored
    assert second.path == first.path
    assert len(second.profile.cells) == 4


def test_who_it_was_and_under_which_conditions_is_on_record(shared_bundle, tmp_path):
    from importlib.metadata import version

    stored = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    again = read_profile(stored.path).profile
    assert again.device == DEVICE
    assert again.conditions.software["onnxruntime"] == version("onnxruntime")
    assert msgspec.structs.replace(again.conditions, software={}) == CONDITIONS
    for cell in again.cells:
        assert (cell.backend, cell.processor, cell.regime, cell.input) == ("onnxruntime", "cpu", "saturated", "float32")
        assert cell.compute_type == cell.artifact.split("-")[1]
        assert cell.graph_sha256 == open_bundle(shared_bundle).artifact(cell.artifact).graph_sha256
        assert cell.measured_at.endswith("+00:00")


def test_the_load_before_each_child_is_evidence(shared_bundle, tmp_path):
    """The machine's load rises by a quarter with each look at it."""
    done = profile(shared_bundle, tmp_path, heads=(2,), precisions=["fp32"], launch=Launch(), here=Here())
    assert done.cells[0].evidence["load_average"] == (0.25, 0.5, 0.75, 1.0, 1.25)


def test_a_machine_that_tells_no_load_is_measured_without(shared_bundle, tmp_path):
    class Silent(Here):
        def read(self, at_s: float, ours: object = ()) -> Reading:
            return Reading(at_s=at_s, gauges={}, counters={})

    done = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Silent())
    assert "load_average" not in done.cells[0].evidence
    assert done.cells[0].error is None


def test_memory_is_the_most_that_any_child_took(shared_bundle, tmp_path):
    taken = iter([10, 30, None, 20, 5])

    def launch(request: Request, **_: object) -> object:
        return msgspec.structs.replace(Launch()(request), memory_bytes=next(taken))

    done = profile(shared_bundle, tmp_path, heads=(2,), precisions=["fp32"], launch=launch, here=Here())
    assert done.cells[0].memory_bytes == 30


def test_memory_that_no_child_could_tell_is_not_measured(shared_bundle, tmp_path):
    def launch(request: Request, **_: object) -> object:
        return msgspec.structs.replace(Launch()(request), memory_bytes=None)

    done = profile(shared_bundle, tmp_path, heads=(2,), launch=launch, here=Here())
    assert {cell.memory_bytes for cell in done.cells} == {None}


def test_a_damaged_bundle_is_refused_before_anything_is_measured(bundle, tmp_path):
    (bundle / "h04-fp32.onnx").write_bytes(b"not a graph")
    launch = Launch()
    with pytest.raises(IntegrityError, match=r"h04-fp32\.onnx"):
        profile(bundle, tmp_path, launch=launch, here=Here())
    assert launch.requests == []


@pytest.mark.parametrize("damage", [b"", b"{", b"{}", b"\xff\xfe", b'{"schema": 3}', b"[]"])
def test_a_damaged_profile_is_refused_and_left_as_it_is(shared_bundle, tmp_path, damage):
    stored = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    stored.path.write_bytes(damage)
    with pytest.raises(IntegrityError, match=re.escape(stored.path.name)):
        profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here())
    assert stored.path.read_bytes() == damage
    assert files(tmp_path) == [stored.path.name]


def test_a_profile_that_cannot_be_written_to_its_end_leaves_the_one_before(shared_bundle, tmp_path):
    before = profile(shared_bundle, tmp_path, heads=(2,), launch=Launch(), here=Here()).stored
    content = before.path.read_bytes()
    left = iter(range(QUICK.rounds - 1, -1, -1))

    with ExitStack() as stack:

        def launch(request: Request, **_: object) -> object:
            answer = Launch()(request)
            if next(left) == 0:
                stack.enter_context(largest_file(len(content) // 2))
            return answer

        with pytest.raises(EnvironmentFailed, match=r"file too large while writing .*\.jsonl"):
            profile(shared_bundle, tmp_path, heads=(3,), precisions=["fp32"], launch=launch, here=Here())
    assert before.path.read_bytes() == content
    assert files(tmp_path) == [before.path.name, f"{before.path.name}l"]
    again = Launch()
    chosen = {"heads": (3,), "precisions": ["fp32"]}
    done = profile(shared_bundle, tmp_path, **chosen, resume=True, launch=again, here=Here())
    assert len(again.requests) == 1, "what was measured while there was room is kept"
    assert len(done.cells[0].latency_s) == QUICK.samples
    assert files(tmp_path) == [before.path.name]


DISKS = """
    import sys
    from pathlib import Path
    from hydradeploy import profile
    from hydradeploy.errors import HydraError
    from hydradeploy.profiler.profile import Order
    from hydradeploy.profiler.sampling import Measured
    from tests.profiler.virtual import Here

    def launch(request, **_):
        print("measured", flush=True)
        latency_s = tuple(0.01 + i / 1e7 for i in range(int(sys.argv[3])))
        return Measured(load_s=0.1, first_s=0.1, prepare_s=0.0, warmup=1, latency_s=latency_s, memory_bytes=1, facts={})

    try:
        order = Order(heads=(2,), precisions=("fp32",))
        profile(Path(sys.argv[1]), Path(sys.argv[2]), order, launch=launch, here=Here())
    except HydraError as error:
        print(error.exit_code.value, error.message, "; hint:", error.hint)
"""


def test_a_full_or_read_only_disk_is_an_environment_failure_and_keeps_the_old_profile(shared_bundle, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.py").write_text(textwrap.dedent(DISKS))
    run = f"{sys.executable} {tmp_path}/run.py {shared_bundle} {tmp_path}/disk/profiles"
    script = f"""
        mount -t tmpfs -o size=100k tmpfs {tmp_path}/disk || exit 77
        {run} 20 && sha256sum {tmp_path}/disk/profiles/*
        echo full; {run} 5000
        ls -A {tmp_path}/disk/profiles && sha256sum {tmp_path}/disk/profiles/*
        mount -o remount,ro {tmp_path}/disk
        echo read-only; {run} 20
        sha256sum {tmp_path}/disk/profiles/*
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    ran = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True)
    if ran.returncode == 77 or "unshare failed" in ran.stderr or "Operation not permitted" in ran.stderr:
        missing("mount", f"this kernel lets us mount no small disk ({ran.stderr.strip()})")
    whole, full, read_only = re.split(r"^(?:full|read-only)$", ran.stdout, flags=re.MULTILINE)
    kept = whole.splitlines()[-1]
    assert kept.endswith(".json"), ran.stdout + ran.stderr
    assert whole.count("measured") == QUICK.rounds
    assert re.search(r"12 no space left on device while writing .*\.jsonl", full)
    assert "nothing that was there before is lost" in full
    assert kept in full.splitlines(), "the same file"
    assert "12 read-only file system while writing into" in read_only
    assert "measured" not in read_only, "nothing is measured that cannot be kept"
    assert kept in read_only.splitlines()


def test_a_file_in_the_place_of_the_directory_stays_what_it_is(shared_bundle, tmp_path):
    (tmp_path / "profiles").write_text("mine")
    with pytest.raises(UsageError, match="this is a file, profiles lie in a directory"):
        profile(shared_bundle, tmp_path / "profiles", heads=(2,), launch=Launch(), here=Here())
    assert (tmp_path / "profiles").read_text() == "mine"


@dataclass
class Counted:
    """Cells, those with a bound for p95 at 95 % confidence, those of them that are right; all samples of all cells."""

    runs: int = 0
    given: int = 0
    right: int = 0
    samples: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"right in {self.right} of {self.given} of {self.runs}"


def counted(law: Law, bundle: Path, directory: Path, calls: int) -> Counted:
    """Ten artifacts per call, each process of each drawn apart; what counts is what is in the file."""
    number, found = count(), Counted()
    launch = Launch(lambda _: law.sample(next(number)))
    for _ in range(calls):
        done = profile(bundle, directory, preset="standard", launch=launch, here=Here())
        for cell in read_profile(done.stored.path).profile.cells:
            upper = bounds(cell.latency_s, cell.process, 0.95, 0.95).upper
            found.runs += 1
            found.samples += cell.latency_s
            if upper is not None:
                found.given += 1
                found.right += upper >= law.quantile(0.95)
    return found


def test_the_median_of_each_cell_is_that_of_the_distribution_within_a_hundredth(shared_bundle, tmp_path):
    """Where a thousand samples tell it that well: calls are independent and differ by 5 %."""
    law, number = LAWS[0], count()
    launch = Launch(lambda _: law.sample(next(number)))
    for cell in profile(shared_bundle, tmp_path, preset="standard", launch=launch, here=Here()).cells:
        assert median(cell.latency_s) == pytest.approx(law.median, rel=0.01)
        assert bounds(cell.latency_s, cell.process, 0.5, 0.95).estimate == pytest.approx(law.median, rel=0.01)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_bounds_of_profiles_hold_with_their_confidence(shared_bundle, tmp_path, law):
    """So few right ones of so many are a thing of one in a thousand where each is right with the confidence."""
    found = counted(law, shared_bundle, tmp_path, 3)
    assert found.runs == 30
    assert found.given > 0.9 * found.runs, str(found)
    assert binom.cdf(found.right, found.given, 0.95) > 1e-3, str(found)
    assert median(found.samples) == pytest.approx(law.median, rel=0.01), "also where processes differ"


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_bounds_of_thousands_of_profiles_hold_with_their_confidence(shared_bundle, tmp_path, law, record_property):
    found = counted(law, shared_bundle, tmp_path, 200)
    record_property("counted", str(found))
    assert found.runs == 2000
    assert found.given > 0.9 * found.runs, str(found)
    assert binom.cdf(found.right, found.given, 0.95) > 1e-3, str(found)
    assert median(found.samples) == pytest.approx(law.median, rel=0.01)
