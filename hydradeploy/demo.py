"""`demo`: the whole flow on bundled data, on this machine.

Trains a small supernet on scikit-learn's digits, exports its ten subnets, evaluates and measures them, picks one for
each of three budgets, and draws accuracy against latency.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hydradeploy.bundle import open_bundle, read_accuracy
from hydradeploy.errors import UsageError, environment
from hydradeploy.evaluator.evaluate import evaluate
from hydradeploy.exporter.export import export
from hydradeploy.files import write_atomically
from hydradeploy.measurements import read_profile
from hydradeploy.profiler.profile import Order, profile
from hydradeploy.report.cells import remark_lines
from hydradeploy.report.picture import draw
from hydradeploy.report.text import answer_lines
from hydradeploy.selector.answer import Answer
from hydradeploy.selector.budget import DEFAULT_LEVEL, Budget, LatencyLimit
from hydradeploy.selector.choose import dominated
from hydradeploy.selector.join import candidates
from hydradeploy.selector.judge import INVALID_FLAGS, Candidate
from hydradeploy.selector.pick import Request, pick
from hydradeploy.training.presets import preset_for
from hydradeploy.training.train import train
from hydradeploy.units import show_percent, show_seconds

DATA = "digits"

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Demo:
    """The files it wrote and the answers for the three budgets, the tightest first."""

    pick_file: Path
    picture: Path
    answers: tuple[Answer, ...]


def demo(
    out: Path,
    *,
    epochs: int | None = None,
    force: bool = False,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Demo:
    """Run the whole flow below `out`, saying what each step does and finds.

    `epochs` shortens the training. Raises UsageError where `out` holds something and `force` is not given, and what
    the steps raise.
    """
    if not force and out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", hint="run it again with --force, or name another with --out")
    with environment(f"making {out}"):
        out.mkdir(parents=True, exist_ok=True)
    supernet, bundle, profiles = out / "supernet.safetensors", out / "bundle", out / "profiles"
    preset = preset_for(DATA)
    if epochs is not None:
        preset = msgspec.structs.replace(preset, recipe=msgspec.structs.replace(preset.recipe, epochs=epochs))

    say(f"> hydradeploy train --data {DATA}")
    trained = train(DATA, supernet, preset, force=force, report=report)
    say(f"  {trained.seconds:.0f} s")
    say(f"> hydradeploy export --data {DATA}")
    written = export(supernet, bundle, data=DATA, force=force, report=report)
    say(f"  {len(written.manifest.artifacts)} subnets over one weights file")
    say(f"> hydradeploy evaluate --data {DATA}")
    evaluate(bundle, DATA, report=report)
    say("> hydradeploy profile --threads 1")  # so small a model only waits for a second one
    measured = profile(bundle, profiles, Order(threads=(1,)), force=force, report=report)
    opened = open_bundle(bundle, "manifest")
    found = candidates(opened.manifest.artifacts, read_accuracy(opened), read_profile(measured.stored.path).profile)
    for line in _table(found):
        say(f"  {line}")
    # Whoever looks at a demo has other programs open: that is said, and no reason to end without a pick.
    accept = tuple(flag for flag in INVALID_FLAGS if any(flag in cell.flags for cell in measured.cells))
    for line in remark_lines(measured.cells):
        if line.startswith(accept):
            say(f"  {line}")
    answers = []
    for limit_s in budgets(found):
        budget = Budget(latency=(LatencyLimit(percentile=DEFAULT_LEVEL, limit_s=limit_s),))
        accepting = f" --accept {','.join(accept)}" if accept else ""
        say(f"> hydradeploy pick --latency {show_seconds(limit_s).replace(' ', '')}{accepting}")
        answers.append(pick(bundle, profiles, Request(budget, accept=accept)))
        for line in answer_lines(answers[-1]):
            say(f"  {line}")
    pick_file, picture = out / "pick.json", out / "accuracy-latency.png"
    with environment(f"writing {pick_file}"):
        write_atomically(pick_file, msgspec.json.encode(answers[-1]) + b"\n")
    draw(found, answers, picture, f"HydraViT on {DATA}, measured on {measured.stored.profile.device.name}")
    return Demo(pick_file, picture, tuple(answers))


def budgets(found: tuple[Candidate, ...]) -> tuple[float, ...]:
    """Three budgets in seconds, two digits each: what the least demanding, the middle and the most demanding cell need.

    By their bounds; where noise leaves a cell none, by half as much again as was observed.
    """
    needs = sorted(
        c.bounds(DEFAULT_LEVEL, 0.95).upper or 1.5 * c.estimate_s(DEFAULT_LEVEL) for c in found if c.cell.latency_s
    )
    return tuple(_rounded_up(needs[place]) for place in (0, len(needs) // 2, -1))


def _rounded_up(seconds: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return float(f"{math.ceil(seconds / unit) * unit:.6g}")


def _table(found: tuple[Candidate, ...]) -> list[str]:
    beaten = dominated(found)
    lines = []
    for place, candidate in enumerate(found):
        if candidate.accuracy is None or not candidate.cell.latency_s:
            continue
        latency = show_seconds(candidate.estimate_s(DEFAULT_LEVEL))
        line = f"{candidate.artifact.name}: top-1 {show_percent(candidate.accuracy.top1)}, p95 {latency}"
        if place in beaten:
            line += f", dominated by {beaten[place].artifact.name}"
        lines.append(line)
    return lines
