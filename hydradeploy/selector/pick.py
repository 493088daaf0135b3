"""`pick`: the most accurate subnet that meets a budget on a device, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydradeploy.bundle import AccuracyRow, Bundle, open_bundle, read_accuracy
from hydradeploy.errors import ExitCode, ForeignError, HydraError, InvalidError, UsageError
from hydradeploy.measurements import Stored, read_profile, read_profiles
from hydradeploy.selector.advice import knobs, notes
from hydradeploy.selector.answer import Answer, Picked, picked, rejected
from hydradeploy.selector.budget import PREFERENCES, Budget, Preference
from hydradeploy.selector.choose import Rules, choose, judged
from hydradeploy.selector.join import Here, candidates, check_measured, profile_of, regimes_of, rows_of
from hydradeploy.selector.judge import FLAGS, Candidate
from hydradeploy.selector.regime import SATURATED, is_regime, pace_hz


@dataclass(frozen=True)
class Request:
    """What is asked of a bundle, whatever the device. `prefer` None is accuracy, or latency where the budget is only a
    floor of accuracy; `dataset` None is the one evaluated last; `regime` is how calls arrive."""

    budget: Budget
    prefer: Preference | None = None
    accept: tuple[str, ...] = ()
    strict: bool = False
    assume_larger_is_better: bool = False
    dataset: str | None = None
    regime: str = SATURATED

    @property
    def rules(self) -> Rules:
        prefer = self.prefer or ("latency" if self.budget.only_a_floor else "accuracy")
        return Rules(prefer, self.accept, self.strict, self.assume_larger_is_better)


def pick(bundle: Path, profiles: Path, request: Request, *, profile: Path | None = None) -> Answer:
    """The best measured cell of a bundle that meets the budget, from the newest profile of this device that measured
    its graphs in the regime.

    `profile` names one, which may be of another device: that is planning. Raises UsageError (no bundle, no budget, no
    such profile), ForeignError (no profile of this device or of these graphs), IntegrityError (a damaged file).
    """
    _check(request)
    opened = open_bundle(bundle, "manifest")
    here, artifacts = Here(), opened.manifest.artifacts
    rows = rows_of(read_accuracy(opened), artifacts, request.dataset)
    named = None if profile is None else (read_profile(profile), ())
    stored, others = named or profile_of(profiles, here, artifacts, request.regime)
    found = _found(opened, rows, stored, request)
    if (refusal := _refusal(opened, stored, found, request)) is not None:
        raise refusal
    return _answer(opened, rows, stored, found, request, here, others)


def pick_all(bundle: Path, profiles: Path, request: Request) -> tuple[Answer, ...]:
    """One answer per profile that measured graphs of the bundle in the regime, newest first.

    A profile without a cell that could be picked has no pick. Raises what `pick` raises where that is so of all of
    them, and ForeignError where no profile measured any.
    """
    _check(request)
    opened = open_bundle(bundle, "manifest")
    rows = rows_of(read_accuracy(opened), opened.manifest.artifacts, request.dataset)
    here, artifacts = Here(), opened.manifest.artifacts
    measured = [stored for stored in read_profiles(profiles) if regimes_of(stored.profile, artifacts)]
    if not measured:
        raise ForeignError(
            f"{profiles}: no profile of the graphs in {bundle}", hint="measure this bundle: hydradeploy profile"
        )
    asked = [stored for stored in measured if request.regime in regimes_of(stored.profile, artifacts)]
    # Where none has that regime the newest says which ones there are.
    found = [(stored, _found(opened, rows, stored, request)) for stored in asked or measured[:1]]
    first, *others = [_refusal(opened, stored, own, request) for stored, own in found]
    if first is not None and None not in others:
        raise first
    return tuple(_answer(opened, rows, stored, own, request, here, ()) for stored, own in found)


def exit_code(answers: Sequence[Answer]) -> ExitCode:
    """0 where every answer is a pick; else 4 where one is inconclusive, 3 where one is infeasible."""
    verdicts = {answer.verdict for answer in answers}
    if "inconclusive" in verdicts:
        return ExitCode.INCONCLUSIVE
    return ExitCode.INFEASIBLE if "infeasible" in verdicts else ExitCode.OK


def _check(request: Request) -> None:
    if request.prefer is not None and request.prefer not in PREFERENCES:
        raise UsageError(f"cannot prefer {request.prefer!r}", hint=f"one of {', '.join(PREFERENCES)}")
    if request.budget == Budget(confidence=request.budget.confidence) and request.prefer is None:
        raise UsageError("no budget given", hint="for example hydradeploy pick --latency 20ms")
    if request.budget.min_top1 is not None and request.budget.min_top1 > 1:
        raise UsageError(f"a top-1 of {100 * request.budget.min_top1:g}% is out of reach", hint="at most 100%")
    unknown = [flag for flag in request.accept if flag not in FLAGS]
    if unknown:
        raise UsageError(f"no flag {unknown[0]!r} to accept", hint=f"one or more of {','.join(FLAGS)}")
    if not is_regime(request.regime):
        raise UsageError(
            f"no regime {request.regime!r}", hint="saturated, burst, sustained, or such as paced-30hz and concurrent-4"
        )
    if request.budget.throughput_per_s is not None and pace_hz(request.regime) is not None:
        raise UsageError(
            f"the throughput of {request.regime} is its schedule's", hint="--regime saturated or concurrent-4"
        )
    if not 0.5 <= request.budget.confidence <= 0.999:
        raise UsageError(f"confidence {request.budget.confidence} is not possible", hint="from 50% to 99.9%")


def _found(bundle: Bundle, rows: Sequence[AccuracyRow], stored: Stored, request: Request) -> tuple[Candidate, ...]:
    artifacts = bundle.manifest.artifacts
    check_measured(stored, artifacts, request.regime, bundle.path)
    return candidates(artifacts, rows, stored.profile, request.regime)


def _refusal(bundle: Bundle, stored: Stored, found: Sequence[Candidate], request: Request) -> HydraError | None:
    """Why none of them could be picked whatever the budget; None where one could."""
    rules = request.rules
    if rules.needs_accuracy(request.budget) and all(candidate.accuracy is None for candidate in found):
        return UsageError(
            f"{bundle.path}: no accuracy of these artifacts is known" + _other_weights(bundle),
            hint="hydradeploy evaluate --data D; or order by size with pick --assume-larger-is-better",
        )
    if rules.strict and all(candidate.cell.flags or candidate.cell.error for candidate in found):
        flags = sorted({flag for candidate in found for flag in candidate.cell.flags})
        return InvalidError(
            f"{stored.path}: no clean measurement of these artifacts ({', '.join(flags) or 'every cell failed'})",
            hint="measure again undisturbed, or pick without --strict",
        )
    return None


def _answer(
    bundle: Bundle,
    rows: Sequence[AccuracyRow],
    stored: Stored,
    found: Sequence[Candidate],
    request: Request,
    here: Here,
    others: Sequence[Stored],
) -> Answer:
    artifacts = bundle.manifest.artifacts
    now = here.conditions(stored.profile.device)
    budget, rules = request.budget, request.rules
    choice = choose(found, budget, rules)
    level = budget.level
    shown = {name: _shown(getattr(choice, name), budget, level) for name in ("pick", "runner_up", "cheaper", "nearest")}
    judgements = [(candidate, judged(candidate, budget, rules)) for candidate in found if candidate is not choice.pick]
    nearest = next((checks for candidate, checks in judgements if candidate is choice.nearest), [])
    more = max((check.more for check in nearest if check.more is not None), default=None)
    elsewhere = (
        [] if choice.pick else [(other, candidates(artifacts, rows, other.profile, request.regime)) for other in others]
    )
    return Answer(
        verdict=choice.verdict,
        device_here=now is not None,
        profile=str(stored.path),
        device=stored.profile.device.name,
        budget=budget,
        prefer=rules.prefer,
        more_samples=more if choice.verdict == "inconclusive" else None,
        knobs=() if choice.pick is not None else tuple(knobs(found, budget, rules, elsewhere)),
        notes=tuple(notes(found, choice, stored, now, budget, rules)),
        rejected=tuple(r for candidate, checks in judgements if (r := rejected(candidate, checks)) is not None),
        **shown,
    )


def _shown(candidate: Candidate | None, budget: Budget, level: float) -> Picked | None:
    return None if candidate is None else picked(candidate, budget, level)


def _other_weights(bundle: Bundle) -> str:
    known = {artifact.sha256 for artifact in bundle.manifest.artifacts}
    others = [row for row in read_accuracy(bundle) if row.sha256 not in known]
    return f": accuracy.json has {len(others)} rows, all of other weights" if others else ""
