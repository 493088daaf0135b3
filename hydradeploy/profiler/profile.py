"""`profile`: measure artifacts on this device, in rounds of fresh processes, and keep what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from hydradeploy.backends import Backend, usable
from hydradeploy.backends.ways import ALL, Way, Ways, named, ways
from hydradeploy.bundle import Artifact, Bundle, open_bundle
from hydradeploy.devices import Machine, machine
from hydradeploy.engines.building import build_missing, label
from hydradeploy.engines.plans import KINDS, EngineOptions
from hydradeploy.errors import InvalidError, MissingError, UsageError, environment
from hydradeploy.files import try_writing
from hydradeploy.measurements import Cell, Device, Profile, Stored, add_profile, place_of, read_profiles
from hydradeploy.processes import check_threads
from hydradeploy.profiler import journal as journals
from hydradeploy.profiler.cells import cells_of
from hydradeploy.profiler.child import spawn
from hydradeploy.profiler.energy import window_s
from hydradeploy.profiler.inputs import batches
from hydradeploy.profiler.monitor import INTERVAL_S, watching
from hydradeploy.profiler.monitor import Watch as Monitor
from hydradeploy.profiler.plan import Job, Plan, batch_of, call_s, chosen, jobs_of, plan_of, scaled, sentence
from hydradeploy.profiler.presets import Preset, Target, metered, preset_of
from hydradeploy.profiler.rounds import Clock, Launch, Report, Rounds, Unwatched, Watch, Watching
from hydradeploy.profiler.sampling import Sampling
from hydradeploy.stats.basics import median
from hydradeploy.units import show_percent, show_seconds

_PROBE = Sampling(warmup=1, warmup_s=0.0, samples=3, seconds=0.0, at_most=3)
_PROBE_PATIENCE_S = 600.0


@dataclass(frozen=True)
class Order:
    """What is to be measured, and how much of it. None is all of the bundle, and what this machine has.

    `backends` None is the first usable one, `all` among them is every usable one; `compute_types` None is the default
    of each artifact. `settings` are values to try, for the backends that have them. `threads` None is one per usable
    core, and on a GPU it is one whatever is given. `pace_hz` calls on a schedule, `concurrency` from so many callers at
    once. `target` is the percentile that the samples are to carry, `max_time_s` what they are cut to.
    """

    device: str | None = None
    backends: Sequence[str] | None = None
    compute_types: Sequence[str] | None = None
    settings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    heads: Sequence[int] | None = None
    precisions: Sequence[str] | None = None
    threads: Sequence[int] | None = None
    preset: str = "quick"
    pace_hz: float | None = None
    concurrency: int = 1
    target: Target = field(default_factory=Target)
    max_time_s: float | None = None


@dataclass(frozen=True)
class Profiled:
    """The profile's file, the cells measured this time, and why some were not, a line each."""

    stored: Stored
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Setting:
    """An order, looked up: what there is to measure and on what."""

    bundle: Bundle
    ways: Ways
    here: Machine
    threads: Sequence[int]
    preset: Preset

    def metered(self, interval_s: float) -> _Setting:
        """Where there is a meter, which is read so often, with processes that call for as long as it takes."""
        if self.here.meter() is None:
            return self
        return replace(self, preset=metered(self.preset, window_s(interval_s)))

    def jobs(self, files: Mapping[int, str]) -> list[Job]:
        return jobs_of(self.bundle, self.ways.found, self.threads, files, self.preset, self.here.kind)

    def inputs(self) -> AbstractContextManager[Mapping[int, str]]:
        return batches(self.bundle, {batch_of(way.artifact) for way in self.ways.found})


def profile(
    bundle: Path,
    profiles: Path,
    order: Order = Order(),
    *,
    lock_clocks: bool = False,
    resume: bool = False,
    force: bool = False,
    build: bool = True,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
    launch: Launch = spawn,
    here: Machine | None = None,
    watch: Watching | None = None,
    clock: Clock = time.perf_counter,
) -> Profiled:
    """Measure artifacts on this device and keep every sample in its profile, with the conditions and what they did.

    What a backend does not run is left out, unless its precision or compute type was asked for by name. A cell whose
    process fails keeps the reason and the others go on. What has been measured is in a journal beside the profile;
    `resume` goes on with it after whatever cut the run short, `force` begins anew. `lock_clocks` pins the clocks
    meanwhile. Engines that are missing are built first, unless not `build`.

    Raises UsageError (no bundle, nothing chosen, no such setting, a run that was cut short and neither `resume` nor
    `force`, or both), ForeignError (device or conditions have changed, only engines of another GPU
    or version), IntegrityError (damaged bundle, profile or journal),
    MissingError (no backend, none that runs what was asked for, no such device, clocks that cannot be pinned, every
    cell failed), EnvironmentFailed (disk).
    """
    if resume and force:
        raise UsageError("--resume goes on and --force begins anew", hint="choose one")
    setting = _setting(bundle, order, here)
    known = read_profiles(profiles)  # a damaged file would keep what is measured from being merged
    with environment(f"writing into {profiles}"):
        profiles.mkdir(parents=True, exist_ok=True)
        try_writing(profiles)
    setting = _with_engines(setting, EngineOptions(build=build), report, say)
    if watch is None:
        watch = _watching(setting.here.kind, lock_clocks) if here is None else lambda: nullcontext(Unwatched())
    preset = setting.preset  # without what depends on how fast the sensors are today
    with setting.inputs() as files, watch() as watcher:
        _tell_cost(watcher, say)
        if watcher.why_not is None:
            setting = setting.metered(watcher.interval_s)
        device, began = setting.here.identity(), setting.here.conditions(_software())
        jobs = setting.jobs(files)
        for line in setting.ways.left_out:
            say(line)
        say(sentence(_plan(setting, order, jobs, known, device)))
        header = journals.Header(
            device=device,
            conditions=began,
            preset=preset,
            target=order.target,
            cells=tuple(job.key for job in jobs),
        )
        with _journal(profiles, header, resume, force, say) as journal:
            rounds = Rounds(
                jobs, setting.preset, order.target, setting.here, launch, watcher, began, report, say, clock
            )
            measured = rounds.measure(journal)
            cells = tuple(
                cell
                for job, entries in zip(jobs, measured, strict=True)
                for cell in cells_of(job, entries, setting.here, device, began)
            )
            if all(not cell.latency_s for cell in cells):
                journal.remove()
                raise MissingError(f"no cell could be measured: {cells[0].error}")
            stored = add_profile(profiles, Profile(device=device, conditions=began, cells=cells))
            journal.remove()
    return Profiled(stored, cells, setting.ways.left_out)


def plan(
    bundle: Path,
    profiles: Path,
    order: Order = Order(),
    *,
    launch: Launch = spawn,
    here: Machine | None = None,
) -> Plan:
    """What `profile` would measure, and how long it should take: by earlier profiles of this device, else per backend
    and compute type by one short measurement of the smallest artifact and the MACs of the others.

    Raises what `profile` raises.
    """
    setting = _setting(bundle, order, here).metered(INTERVAL_S)
    with setting.inputs() as files:
        jobs = setting.jobs(files)
        found = _plan(setting, order, jobs, read_profiles(profiles), setting.here.identity())
        if found.expected_s is None and not setting.preset.sampling.sustain:
            found = plan_of(order.preset, setting.preset, order.target, jobs, _probed(jobs, launch))
        return msgspec.structs.replace(found, left_out=setting.ways.left_out)


def _probed(jobs: Sequence[Job], launch: Launch) -> list[float]:
    """What a call of each should take."""

    def kind(job: Job) -> tuple[str, str]:
        return job.request.backend, job.request.compute_type

    probes: dict[tuple[str, str], tuple[Artifact, float]] = {}
    for job in sorted(jobs, key=lambda job: job.artifact.macs):
        if kind(job) not in probes:
            probe = msgspec.structs.replace(job.request, sampling=_PROBE, other=None)
            measured = launch(probe, patience_s=_PROBE_PATIENCE_S)
            probes[kind(job)] = job.artifact, median(measured.latency_s)
    return [scaled(job, *probes[kind(job)]) for job in jobs]


def check_clean(cells: Sequence[Cell]) -> None:
    """Raise InvalidError where a cell has a flag or could not be measured."""
    # An error names the artifact already.
    told = [
        f"{cell.artifact}: {', '.join(cell.flags) or (cell.error or '').removeprefix(f'{cell.artifact}: ')}"
        for cell in cells
        if cell.flags or cell.error
    ]
    if told:
        raise InvalidError(
            f"{len(told)} of {len(cells)} measurements are not clean: {'; '.join(told)}",
            hint="they are kept; hydradeploy doctor says what to put right, then measure again",
        )


def _setting(bundle: Path, order: Order, here: Machine | None) -> _Setting:
    preset = preset_of(order.preset, pace_hz=order.pace_hz, concurrency=order.concurrency, wall_s=order.max_time_s)
    for count in (0,) if order.threads == () else order.threads or ():
        check_threads(count)
    runners = _runners(order, here)
    here = here or machine(order.device, runners[0].processor)
    opened = open_bundle(bundle)
    found = ways(
        opened,
        chosen(opened, order.heads, order.precisions),
        _computing_on(here, runners, every=order.backends is None or ALL not in order.backends),
        precisions=order.precisions,
        compute_types=order.compute_types,
        settings=order.settings,
    )
    return _Setting(opened, found, here, sorted(set(order.threads or (here.cores(),))), preset)


def _runners(order: Order, here: Machine | None) -> tuple[Backend, ...]:
    """The backends asked for; else the first usable one that computes on the GPU, where the processor is not asked for
    and there is one, else the first usable one."""
    if order.backends is not None:
        return named(order.backends)
    found = named((ALL,))
    wanted = "cpu" if (here.kind if here else order.device) == "cpu" else "cuda"
    return tuple([runner for runner in found if runner.processor == wanted] or found)[:1]


def _with_engines(setting: _Setting, options: EngineOptions, report: Report, say: Callable[[str], None]) -> _Setting:
    """See to the engines before anything is timed, and leave out what none can be built of."""
    ways = setting.ways
    for kind in KINDS:
        wanted = {_engine(way): (way.artifact, way.compute_type) for way in ways.found if way.runner.name == kind}
        if not wanted:
            continue
        failed = build_missing(kind, setting.bundle, list(wanted.values()), options, report=report, say=say).failed
        found = tuple(way for way in ways.found if way.runner.name != kind or _engine(way) not in failed)
        lines = tuple(f"left out: {name}: no engine of {kind}: {reason}" for name, reason in failed.items())
        ways = Ways(found, (*ways.left_out, *lines))
    if not ways.found:
        raise MissingError("; ".join(ways.left_out))
    return replace(setting, ways=ways)


def _engine(way: Way) -> str:
    return label(way.artifact.name, way.compute_type)


def _computing_on(here: Machine, runners: Sequence[Backend], *, every: bool) -> list[Backend]:
    """The backends that compute on this device; raises MissingError where none does, or not every one."""
    fitting = [runner for runner in runners if runner.processor in here.processors]
    if not fitting or (every and len(fitting) < len(runners)):
        others = ", ".join(f"{r.name} does on {r.processor}" for r in runners if r not in fitting)
        raise MissingError(
            f"not every backend computes on {here.kind}: {others}"
            if fitting
            else f"no backend here computes on {here.kind}: {others}",
            hint="measure the processor with --device cpu",
        )
    return fitting


def _software() -> dict[str, str]:
    return {name: version for found in usable() for name, version in found.software().items()}


def _watching(kind: str, lock_clocks: bool) -> Watching:
    return lambda: watching(kind, lock_clocks=lock_clocks)


def _plan(setting: _Setting, order: Order, jobs: Sequence[Job], known: Sequence[Stored], device: Device) -> Plan:
    cells = [cell for s in reversed(known) if not s.profile.device.differences(device) for cell in s.profile.cells]
    calls = [call_s(job, cells) for job in jobs]
    return plan_of(order.preset, setting.preset, order.target, jobs, calls)


@contextmanager
def _journal(
    profiles: Path, header: journals.Header, resume: bool, force: bool, say: Callable[[str], None]
) -> Iterator[journals.Journal]:
    """The run's journal. What is in it stays whatever ends the run; one without entries goes."""
    path = journals.journal_of(place_of(profiles, header.device, header.conditions))
    if resume and not path.exists():
        # Its name tells the conditions: under others it is another one, and says what has changed.
        path = max(profiles.glob("*.jsonl"), key=lambda other: other.stat().st_mtime, default=path)
    with journals.opened(path, header, resume=resume, force=force) as journal:
        try:
            yield journal
        except BaseException:
            if path.exists():
                kept = len(journals.read(path)[1])
                if kept:
                    say(f"{path}: {kept} of {header.total} measurements are kept; go on with --resume")
                else:
                    journal.remove()
            raise


def _tell_cost(watcher: Watch, say: Callable[[str], None]) -> None:
    if not isinstance(watcher, Monitor):
        return
    if watcher.cost is None:
        say(f"conditions are not watched: {watcher.why_not}")
        return
    share = show_percent(watcher.cost.share)
    where = "the only core" if watcher.core is None else f"core {watcher.core}"
    say(f"sensors: read every {show_seconds(watcher.interval_s)} on {where}, which takes {share} of it")
