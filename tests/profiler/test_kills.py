"""Real runs of the command line, ended by force at any moment: what is left can be read, and the run goes on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from hydradeploy.measurements import Cell, Profile, read_profile
from hydradeploy.profiler.journal import read
from hydradeploy.profiler.presets import PRESETS
from tests.processes import alive

ROUNDS = PRESETS["quick"].rounds
MARK = "HYDRADEPLOY_TEST_RUN"
# A machine that does something else as well may need minutes for what takes seconds.
PATIENCE_S = 120.0


@dataclass
class Runs:
    """Runs of `profile` one after the other, with one directory for profiles and one for what is temporary."""

    bundle: Path
    root: Path
    heads: str
    mark: str = field(default_factory=lambda: uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.temporary.mkdir(parents=True)

    @property
    def profiles(self) -> Path:
        return self.root / "profiles"

    @property
    def temporary(self) -> Path:
        return self.root / "temporary"

    def start(self, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hydradeploy", "profile", "--bundle", self.bundle, "--profiles", self.profiles]
        chosen = ["--heads", self.heads, "--precision", "fp32", "--threads", "1", "--device", "cpu"]
        run = subprocess.Popen(
            [str(word) for word in (*command, *chosen, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Else ONNX Runtime leaves files of its own there, from 1.32 on.
            env=os.environ | {"TMPDIR": str(self.temporary), MARK: self.mark, "ORT_DISABLE_TELEMETRY": "1"},
            start_new_session=True,
        )
        self.started.append(run)
        return run

    def journals(self) -> list[Path]:
        return list(self.profiles.glob("*.jsonl"))

    def kept(self) -> int:
        """How many measurements are in the journal; none where a kill came before its first line was whole."""
        found = self.journals()
        return len(read(found[0])[1]) if found and b"\n" in found[0].read_bytes() else 0

    def wait_for(self, run: subprocess.Popen[str], kept: int) -> None:
        """Until so many measurements are kept."""
        until = time.monotonic() + PATIENCE_S
        while self.kept() < kept:
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < until
            time.sleep(0.02)

    def goes_on(self) -> subprocess.Popen[str]:
        """What a user does next."""
        begun = any(b"\n" in path.read_bytes() for path in self.journals())
        return self.start("--resume") if begun else self.start()

    def complete(self) -> tuple[Cell, ...]:
        """Go on to the end; the cells of the profile."""
        out, err = (run := self.goes_on()).communicate(timeout=PATIENCE_S)
        assert run.returncode == 0, out + err
        self.check_left()
        assert self.journals() == []
        return self.profile().cells

    def profile(self) -> Profile:
        (path,) = self.profiles.glob("*.json")
        return read_profile(path).profile

    def processes(self) -> dict[int, str]:
        """Those that are alive of all that these runs have started, by what they were started with."""
        return alive(MARK, self.mark)

    def check_left(self) -> None:
        """Nothing of a run that has ended is there but its journal or its profile, and both can be read."""
        ended = time.monotonic()
        while left := self.processes():
            assert time.monotonic() - ended < 2, left
            time.sleep(0.02)
        assert os.listdir(self.temporary) == []
        for path in self.profiles.glob("*.json"):
            read_profile(path)
        assert len(self.journals()) <= 1
        assert self.kept() >= 0

    def begin_anew(self) -> None:
        for path in self.profiles.iterdir():
            path.unlink()


@pytest.fixture
def runs(shared_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Runs of these heads."""
    found = Runs(shared_bundle, tmp_path, request.param)
    yield found
    for run in found.started:
        if run.poll() is None:
            run.kill()
        run.communicate()


def check_whole(cells: tuple[Cell, ...], heads: str) -> None:
    """The cells of a run that was not cut short: each artifact once, with samples of every round."""
    assert [cell.artifact for cell in cells] == [f"h{int(count):02d}-fp32" for count in heads.split(",")]
    for cell in cells:
        assert cell.error is None
        assert sorted(set(cell.process)) == list(range(ROUNDS))
        assert len(cell.load_s) == len(cell.first_s) == ROUNDS
        assert len(cell.latency_s) >= PRESETS["quick"].samples


@pytest.mark.parametrize("runs", ["2"], indirect=True)
def test_a_run_that_is_killed_again_and_again_goes_on_to_the_end(runs: Runs):
    """At moments of every kind: before anything is there, and while each of the processes is measuring."""
    generator, kept = random.Random(1), 0
    for wanted in range(5):
        run = runs.goes_on()
        if wanted:
            runs.wait_for(run, wanted)
        time.sleep(generator.uniform(0.0, 0.3))
        run.kill()
        run.wait()
        runs.check_left()
        assert runs.kept() >= max(kept, wanted), "what was kept once stays"
        kept = runs.kept()
    check_whole(runs.complete(), runs.heads)


@pytest.mark.slow
@pytest.mark.parametrize("runs", ["2,4"], indirect=True)
def test_two_hundred_kills_at_random_moments(runs: Runs):
    """A run that was killed goes on; one that got to its end is compared with one that was never killed."""
    began = time.monotonic()
    whole = runs.complete()
    lasts_s = time.monotonic() - began
    check_whole(whole, runs.heads)
    runs.begin_anew()
    generator, kills, ends, kept = random.Random(2), 0, 0, 0
    while kills < 200:
        run = runs.goes_on()
        # Most runs go on from somewhere, so that the later moments of one are reached too.
        with suppress(subprocess.TimeoutExpired):
            run.communicate(timeout=generator.uniform(0.0, 0.6 * lasts_s))
        if run.poll() is None:
            kills += 1
            run.kill()
            run.communicate()
        runs.check_left()
        assert run.returncode in (0, -signal.SIGKILL), run.communicate()
        if runs.journals():
            assert runs.kept() >= kept
            kept = runs.kept()
        elif list(runs.profiles.glob("*.json")):
            assert {cell.key for cell in runs.profile().cells} == {cell.key for cell in whole}
            check_whole(runs.profile().cells, runs.heads)
            ends, kept = ends + 1, 0
            runs.begin_anew()
    cells = runs.complete()
    assert {cell.key for cell in cells} == {cell.key for cell in whole}
    check_whole(cells, runs.heads)
    assert ends > 5, "runs got to their end too"


@pytest.mark.parametrize("runs", ["2"], indirect=True)
def test_a_run_that_is_interrupted_or_told_to_end_goes_on(runs: Runs):
    """By Ctrl-C, which goes to all processes of the terminal, by the same signal to it alone, and by SIGTERM."""
    for kept, (number, to_group) in enumerate([(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)]):
        run = runs.goes_on()
        runs.wait_for(run, kept + 1)
        os.killpg(run.pid, number) if to_group else run.send_signal(number)
        out, err = run.communicate(timeout=PATIENCE_S)
        runs.check_left()
        assert out == ""
        assert "Traceback" not in err
        assert runs.kept() > kept
        assert run.returncode == 130, err
        said = f"{runs.journals()[0]}: {runs.kept()} of {ROUNDS} measurements are kept; go on with --resume"
        assert err.splitlines()[-2:] == [said, "interrupted"]
    check_whole(runs.complete(), runs.heads)


@pytest.mark.parametrize("runs", ["2"], indirect=True)
def test_a_second_run_beside_the_first_is_refused_and_disturbs_nothing(runs: Runs):
    first = runs.start()
    runs.wait_for(first, 1)
    for more in ((), ("--force",)):
        second = runs.start(*more)
        out, err = second.communicate(timeout=PATIENCE_S)
        if first.poll() is None:  # else a machine this busy let it end meanwhile
            assert second.returncode == 2, out + err
            assert ".jsonl: another process is measuring\nhint: wait for it" in err
    out, err = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 0, out + err
    check_whole(runs.profile().cells, runs.heads)
