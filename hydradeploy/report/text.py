"""Lines and table rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hydradeploy.measurements import show_settings, show_way
from hydradeploy.selector.answer import Answer, Picked, Rejected
from hydradeploy.selector.budget import percentile_name
from hydradeploy.selector.regime import SATURATED
from hydradeploy.units import show_at_most, show_bytes, show_confidence, show_percent, show_seconds

DEVICE_HEADER = ("device", "verdict", "artifact", "p50", "at most", "top-1", "profile")


def answer_lines(answer: Answer, *, explain: bool = False) -> Iterator[str]:
    """The answer in one line, then what belongs to it; with `explain`, and where not even one came near, why
    each other cell was refused."""
    if answer.pick is not None:
        yield sentence(answer.pick)
    elif answer.verdict == "infeasible":
        yield f"nothing meets the budget on {answer.device}"
    else:
        more = "" if answer.more_samples is None else f": about {answer.more_samples} more samples of it would tell"
        yield f"inconclusive on {answer.device}, {answer.nearest and answer.nearest.artifact} may meet the budget{more}"
    if answer.nearest is not None:
        here = (answer.nearest.artifact, _way(answer.nearest))
        reasons = [r.reason for r in answer.rejected if (r.artifact, _way(r)) == here]
        yield f"nearest: {answer.nearest.artifact} ({_way(answer.nearest)}): {reasons[0]}"
    for knob in answer.knobs:
        yield f"would do: {knob}"
    if answer.cheaper is not None:
        yield f"faster and not significantly less accurate: {sentence(answer.cheaper)}"
    for note in answer.notes:
        yield f"note: {note}"
    if explain and answer.runner_up is not None:
        yield f"next: {sentence(answer.runner_up)}"
    if explain or (answer.pick is None and answer.nearest is None):
        for cell in answer.rejected:
            yield f"refused: {cell.artifact} ({_way(cell)}): {cell.reason}"


def sentence(cell: Picked) -> str:
    """A cell with its evidence."""
    latency, accuracy = cell.latency_s, cell.accuracy
    assumed = f"assuming {latency.assumes}, " if latency.assumes else ""
    regime = () if cell.regime == SATURATED else (cell.regime,)
    how = ", ".join((_way(cell), *regime, *cell.flags))
    parts = [
        f"{cell.artifact} ({how}): {_latency(cell)} ({assumed}{latency.n} samples worth {latency.n_effective:.0f})"
    ]
    if accuracy is not None:
        interval = f"{show_percent(accuracy.lower)} .. {show_percent(accuracy.upper)}"
        declared = ", declared" if accuracy.source == "declared" else ""
        images = f"{accuracy.n} images of {accuracy.dataset}{declared}"
        parts.append(f"top-1 {show_percent(accuracy.top1)} ({interval}, {images})")
    if cell.memory_bytes is not None:
        parts.append(f"memory {show_bytes(cell.memory_bytes)}")
    if cell.energy_j is not None:
        parts.append(f"{cell.energy_j:.3g} J per image")
    return ", ".join([*parts, f"size {show_bytes(cell.size_bytes)}"])


def device_row(answer: Answer) -> tuple[str, ...]:
    """One profile's answer below DEVICE_HEADER; its file tells one device under several conditions apart."""
    first = (answer.device + (" (this one)" if answer.device_here else ""), answer.verdict)
    last = Path(answer.profile).name
    cell = answer.pick
    if cell is None:
        return (*first, "", "", "", "", last)
    p50, upper = cell.latency_s.p50, cell.latency_s.upper
    shown = "n/a" if p50 is None else show_seconds(p50), "n/a" if upper is None else show_at_most(upper)
    top1 = "" if cell.accuracy is None else show_percent(cell.accuracy.top1)
    return (*first, f"{cell.artifact} ({_way(cell)})", *shown, top1, last)


def _way(cell: Picked | Rejected) -> str:
    settings = show_settings(cell.settings)
    return show_way(cell.artifact, cell.backend, cell.compute_type, settings, cell.threads, cell.batch)


def _latency(cell: Picked) -> str:
    latency = cell.latency_s
    name = percentile_name(latency.percentile)
    if latency.upper is None:
        return f"{name} not known"
    return f"{name} at most {show_at_most(latency.upper)} with {show_confidence(latency.confidence)} confidence"
