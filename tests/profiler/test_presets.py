"""How many samples the first round of a run makes the later ones take, and which runs there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hydradeploy.errors import UsageError
from hydradeploy.profiler.presets import (
    PRESETS,
    Pilot,
    Preset,
    Target,
    metered,
    preset_of,
    regimes,
    samples_after,
    with_samples,
)
from hydradeploy.profiler.sampling import Measured, Sampling
from hydradeploy.stats.latency import MOST_DEPENDENCE, n_effective
from hydradeploy.stats.order import allowed_misses, samples_needed

SHORT = ["quick", "standard", "gate"]
P95 = Target()


def pilot(call_s: float, count: int, overhead_s: float = 1.0, values: Sequence[float] | None = None) -> Pilot:
    """A first round of so many calls, one after the other; `values` are what they took, and are not in the sums."""
    measured = Measured(
        load_s=0.1,
        first_s=0.1,
        prepare_s=0.0,
        warmup=1,
        latency_s=tuple(values or [call_s] * count),
        started_s=5.0,
        ended_s=5.0 + count * call_s,
        memory_bytes=None,
        facts={},
    )
    return Pilot(measured, overhead_s + count * call_s)


def first_round(preset: Preset, call_s: float, overhead_s: float = 1.0) -> Pilot:
    """A first round as that preset has it."""
    how = preset.sampling
    return pilot(call_s, max(how.samples, min(how.at_most, math.ceil(how.seconds / call_s))), overhead_s)


def takes_s(preset: Preset, found: Pilot, samples: int) -> float:
    """Seconds of a later process: it samples for the least time too, where it may take so many."""
    how = with_samples(preset.sampling, samples)
    return found.overhead_s + max(samples * found.call_s, min(how.seconds, how.at_most * found.call_s))


def unlimited(preset: Preset) -> Preset:
    return msgspec.structs.replace(preset, wall_s=None)


class Run(NamedTuple):
    """A run after its first round: what it may take, what cells of unlimited runs take, and what these do."""

    preset: Preset
    target: Target
    pilots: list[Pilot]
    wanted: list[int]

    @property
    def least(self) -> list[int]:
        return [self.preset.sampling.samples] * len(self.pilots)

    def counts(self, wall_s: float | None = None) -> list[int]:
        preset = self.preset if wall_s is None else msgspec.structs.replace(self.preset, wall_s=wall_s)
        return samples_after(preset, self.target, self.pilots)

    def lasts_s(self, counts: Sequence[int]) -> float:
        """Seconds of a whole run."""
        later = sum(takes_s(self.preset, p, count) for p, count in zip(self.pilots, counts, strict=True))
        return (self.preset.rounds - 1) * later + sum(p.wall_s for p in self.pilots)


targets = st.builds(Target, st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]), st.sampled_from([0.8, 0.95, 0.99]))
# The log of seconds, because models of all sizes are to be among them.
cells = st.lists(st.tuples(st.floats(-11.5, 3.0).map(math.exp), st.floats(0.0, 3.0)), min_size=1, max_size=8)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """With a time from less than the least takes up to more than all of it."""
    preset, target = PRESETS[draw(st.sampled_from(SHORT))], draw(targets)
    pilots = [first_round(preset, call_s, overhead_s) for call_s, overhead_s in draw(cells)]
    run = Run(unlimited(preset), target, pilots, samples_after(unlimited(preset), target, pilots))
    shortest, longest = run.lasts_s(run.least), run.lasts_s(run.wanted)
    wall_s = max(0.0, shortest + draw(st.floats(-0.1, 1.1)) * (longest - shortest))
    return run._replace(preset=msgspec.structs.replace(preset, wall_s=wall_s))


@given(runs())
def test_counts_lie_between_the_least_and_what_is_wanted(run):
    assert all(least <= count <= most for least, count, most in zip(run.least, run.counts(), run.wanted, strict=True))


@given(runs())
def test_a_run_stays_within_its_time_wherever_the_least_does(run):
    counts = run.counts()
    if run.lasts_s(run.least) > run.preset.wall_s * (1 + 1e-9):
        assert counts == run.least
    else:
        assert run.lasts_s(counts) <= run.preset.wall_s * (1 + 1e-9)


@given(runs())
def test_time_that_is_left_is_used(run):
    """Two calls more for each who did not get all would overrun it."""
    counts = run.counts()
    more = [min(most, count + 2) for count, most in zip(counts, run.wanted, strict=True)]
    assert counts == run.wanted or run.lasts_s(more) > run.preset.wall_s * (1 - 1e-9)


@given(runs(), st.floats(1, 3))
def test_more_time_never_means_fewer_samples(run, factor):
    longer = run.counts(factor * run.preset.wall_s)
    assert all(one <= other for one, other in zip(run.counts(), longer, strict=True))


@given(runs())
@example(Run(PRESETS["quick"], P95, [pilot(1 / 49, 6)], [24]))
@example(Run(PRESETS["quick"], Target(0.99), [pilot(17.77407414411791, 12)], [116]))
def test_with_all_the_time_in_the_world_every_cell_gets_what_it_wants(run):
    assert run.counts(1e12) == run.wanted


@given(runs())
def test_what_is_cheap_gets_all_before_what_is_dear_gets_more_than_it(run):
    counts = run.counts()
    for cheap, count, most in zip(run.pilots, counts, run.wanted, strict=True):
        if count < most:
            for dear, other, least in zip(run.pilots, counts, run.least, strict=True):
                assert other == least or other * dear.call_s <= (count + 1) * cheap.call_s * (1 + 1e-9)


def test_a_hand_computed_share_of_time():
    """Both want 60 calls in each of the three later rounds. What is no sampling takes 4 * 4 s and 4 * 6 s, the first
    samples 0.5 s and 5 s. What is left of 106.1 s is 20.2 s a round: 3 s for the cheap one's 60 calls of 50 ms, so
    17.2 s for 34 calls of the dear one."""
    preset = Preset(
        rounds=4,
        sampling=Sampling(warmup=1, warmup_s=0.0, samples=10, seconds=0.0, at_most=10),
        samples=190,
        misses=0,
        dependent=False,
        wall_s=16.0 + 24.0 + 0.5 + 5.0 + 3 * 20.2,
    )
    pilots = [pilot(0.05, 10, overhead_s=4.0), pilot(0.5, 10, overhead_s=6.0)]
    assert samples_after(preset, P95, pilots) == [60, 34]
    assert samples_after(unlimited(preset), P95, pilots) == [60, 60]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("target", [Target(0.99, 0.95), Target(0.999, 0.95), Target(0.99, 0.999)])
def test_all_rounds_together_carry_the_percentile_asked_for(name, target):
    """Calls of a tenth of a millisecond: there is time for all of them."""
    preset = unlimited(PRESETS[name])
    found = first_round(preset, 1e-4)
    count = samples_after(preset, target, [found])[0]
    total = len(found.measured.latency_s) + (preset.rounds - 1) * count
    misses = allowed_misses(total, target.level, target.confidence)
    assert misses is not None
    assert misses >= preset.misses
    assert total >= samples_needed(target.level, target.confidence, preset.misses)


@given(st.sampled_from(SHORT), st.integers(2, 19))
def test_p95_takes_what_the_preset_names_and_no_round_more(name, count):
    preset = unlimited(PRESETS[name])
    found = pilot(0.02, count)
    each = samples_after(preset, P95, [found])[0]
    later = preset.rounds - 1
    assert count + later * each >= preset.samples
    assert each == preset.sampling.samples or count + later * (each - 1) < preset.samples


def chained(n: int, phi: float) -> list[float]:
    generator, z, values = np.random.default_rng(0), 0.0, []
    for noise in generator.standard_normal(n):
        z = phi * z + (1 - phi**2) ** 0.5 * noise
        values.append(0.02 * math.exp(0.1 * z))
    return values


@pytest.mark.parametrize(("name", "raised"), [("quick", False), ("standard", True), ("gate", True)])
def test_dependent_calls_ask_for_more_where_the_preset_accounts_for_them(name, raised):
    preset, target = unlimited(PRESETS[name]), Target(0.99, 0.95)
    loose, chain = chained(200, 0.0), chained(200, 0.9)
    worth = len(chain) / n_effective([chain], 0.99)
    assert worth > 3
    free, bound = (samples_after(preset, target, [pilot(0.02, 200, values=values)])[0] for values in (loose, chain))
    if not raised:
        assert free == bound
        return
    needed = samples_needed(0.99, 0.95, preset.misses) * min(MOST_DEPENDENCE, worth)
    assert 200 + (preset.rounds - 1) * bound >= needed > 200 + (preset.rounds - 1) * (bound - 1)
    assert bound > 2 * free


def test_dependence_is_believed_up_to_what_a_bound_can_make_of_it():
    preset, target = unlimited(PRESETS["gate"]), Target(0.99, 0.95)
    drifting = [0.02 + i / 1e5 for i in range(1000)]
    count = samples_after(preset, target, [pilot(0.02, 1000, values=drifting)])[0]
    assert count == math.ceil((MOST_DEPENDENCE * samples_needed(0.99, 0.95, 10) - 1000) / 9)


@given(runs())
def test_a_cell_whose_first_process_failed_gets_the_least_and_takes_nothing_from_the_others(run):
    found = samples_after(run.preset, run.target, [None, *run.pilots])
    assert found == [run.preset.sampling.samples, *run.counts()]


@pytest.mark.parametrize("name", PRESETS)
def test_where_every_first_process_failed_all_get_the_least(name):
    preset = PRESETS[name]
    assert samples_after(preset, P95, [None, None]) == [preset.sampling.samples] * 2


def test_a_pilot_whose_clock_stood_still_gets_what_it_wants():
    assert samples_after(PRESETS["quick"], P95, [pilot(0.0, 12)]) == [22]


def test_what_a_process_takes_beyond_sampling_is_never_negative():
    found = pilot(0.5, 10)
    assert found.call_s == pytest.approx(0.5)
    assert found.overhead_s == pytest.approx(1.0)
    assert Pilot(found.measured, 4.0).overhead_s == 0.0


def test_what_a_process_calls_for_a_meter_is_no_overhead_and_no_process_takes_less():
    """Ten samples of 5 s and calls for 3 s more; of less time than a meter takes, all of it gives samples."""
    found = Pilot(msgspec.structs.replace(pilot(0.5, 10).measured, unkept=6, unkept_s=3.0), 9.0)
    assert found.overhead_s == pytest.approx(1.0)
    preset = metered(PRESETS["quick"], 30.0)
    assert found.process_s(preset.sampling, 20) == pytest.approx(31.0)
    assert found.process_s(preset.sampling, 80) == pytest.approx(41.0)
    short = msgspec.structs.replace(preset, wall_s=1.0, samples=500)
    assert samples_after(short, P95, [found]) == [60]


def test_a_schedule_takes_its_period_for_each_sample():
    measured = msgspec.structs.replace(pilot(0.002, 60).measured, started_s=1.0, ended_s=1.0 + 59 / 30 + 0.002)
    assert Pilot(measured, 4.0).call_s == pytest.approx(1 / 30, rel=0.02)


def test_more_samples_than_a_process_takes_at_most_are_taken_all_the_same():
    how = PRESETS["quick"].sampling
    assert with_samples(how, 500) == msgspec.structs.replace(how, samples=500, at_most=500)
    assert with_samples(how, 20) == msgspec.structs.replace(how, samples=20)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_fresh_processes_enough(name):
    """Five at least where figures are compared; three of one that takes minutes each."""
    preset = PRESETS[name]
    assert preset.rounds >= (3 if preset.sampling.sustain else 5)
    assert preset.rounds * preset.sampling.samples <= preset.samples


def test_presets_of_more_care_ask_for_no_less():
    careful = [PRESETS[name] for name in SHORT]
    for one, other in pairwise(careful):
        assert one.samples <= other.samples
        assert one.misses <= other.misses
        assert one.rounds <= other.rounds
        assert one.dependent <= other.dependent
        assert one.wall_s < other.wall_s


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gentle", {}, "no preset 'gentle'"),
        ("", {}, "no preset ''"),
        ("quick", {"pace_hz": 30.0, "concurrency": 2}, "calls on a schedule come from one caller"),
        ("quick", {"concurrency": 0}, "concurrency must be at least 1"),
        ("quick", {"concurrency": -3}, "concurrency must be at least 1"),
        ("quick", {"pace_hz": 0.0}, "a schedule of 0 calls a second has none"),
        ("sustained", {"wall_s": 60.0}, "a sustained run takes the time it takes"),
        ("sustained", {"pace_hz": 30.0}, "a sustained run calls back to back"),
        ("sustained", {"concurrency": 2}, "a sustained run calls back to back"),
    ],
)
def test_what_does_not_go_together_is_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        preset_of(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("quick", {}, ("saturated",)),
        ("gate", {"wall_s": 5.0}, ("saturated",)),
        ("standard", {"pace_hz": 30.0}, ("paced-30hz",)),
        ("standard", {"pace_hz": 29.97}, ("paced-29.97hz",)),
        ("quick", {"concurrency": 4}, ("concurrent-4",)),
        ("sustained", {}, ("burst", "sustained")),
    ],
)
def test_how_calls_arrive_names_the_regimes(name, options, expected):
    preset = preset_of(name, **options)
    assert regimes(preset.sampling) == expected
    assert (preset.sampling.pace_hz, preset.sampling.concurrency) == (
        options.get("pace_hz"),
        options.get("concurrency", 1),
    )
    assert preset.wall_s == options.get("wall_s", PRESETS[name].wall_s)


@pytest.mark.parametrize("value", [-1.0, 0.0, 0.49, 0.9991, 1.0, 95.0, float("nan"), float("inf")])
def test_percentiles_and_confidences_out_of_reach_are_refused(value):
    for wanted in ({"level": value}, {"confidence": value}):
        with pytest.raises(UsageError, match="is not possible") as refused:
            Target(**wanted)
        assert refused.value.hint is not None
        assert "50% to 99.9%" in refused.value.hint


@pytest.mark.parametrize("value", [0.5, 0.95, 0.999])
def test_percentiles_and_confidences_within_reach_are_taken(value):
    assert Target(value, value) == Target(level=value, confidence=value)
