"""The choice against a brute force that judges every limit of every candidate in words of its own."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import permutations
from statistics import mean, stdev

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import t as student

from hydradeploy.selector.budget import PREFERENCES, Budget
from hydradeploy.selector.choose import Rules, choose, dominated, judged, meets, significantly_less
from hydradeploy.selector.judge import Candidate, checks, combined, hopeless, possible
from hydradeploy.selector.regime import callers
from hydradeploy.stats.latency import bounds
from hydradeploy.stats.proportions import wilson
from tests.selector.build import accuracy, artifact, candidate, declared, failed, latencies, limit, share

MS = 1e-3

# -- the brute force ------------------------------------------------------------------------------------------------


def latency_status(one: Candidate, wanted, confidence: float) -> str:
    samples = one.cell.latency_s
    if wanted.percentile >= confidence and all(value > wanted.limit_s for value in samples):
        return "missed"
    found = bounds(samples, one.cell.process, wanted.percentile, confidence)
    # The chance that so many independent samples all miss the slowest share must be small enough to begin with.
    carried = wanted.percentile**found.n <= (1 - confidence) * (1 + 1e-9)
    if carried and found.upper is not None and found.upper <= wanted.limit_s:
        return "met"
    if found.lower is not None and found.lower > wanted.limit_s:
        return "missed"
    return "open"


def throughput_status(one: Candidate, wanted: float, confidence: float) -> str:
    by_process: dict[int, list[float]] = {}
    for value, number in zip(one.cell.latency_s, one.cell.process, strict=True):
        by_process.setdefault(number, []).append(value)
    means = [mean(samples) for samples in by_process.values()]
    if len(means) < 2:
        return "open"
    half = student.ppf(confidence, len(means) - 1) * stdev(means) / math.sqrt(len(means))
    longest = one.cell.batch / wanted
    if mean(means) + half <= longest:
        return "met"
    return "missed" if mean(means) - half > longest else "open"


def statuses(one: Candidate, budget: Budget) -> list[str]:
    found = [latency_status(one, wanted, budget.confidence) for wanted in budget.latency]
    if budget.throughput_per_s is not None:
        found.append(throughput_status(one, budget.throughput_per_s, budget.confidence))
    for amount, most in (
        (one.cell.memory_bytes, budget.memory_bytes),
        (one.cell.energy_j, budget.energy_j),
        (one.artifact.size_bytes, budget.size_bytes),
    ):
        if most is not None:
            found.append("met" if amount is not None and amount <= most else "missed")
    if budget.min_top1 is not None:
        row = one.accuracy
        low, high = (0.0, 0.0) if row is None else wilson(row.correct, row.n, budget.confidence)
        if row is None or high < budget.min_top1:
            found.append("missed")
        else:
            found.append("met" if low >= budget.min_top1 else "open")
    return found


def usable(one: Candidate, budget: Budget, rules: Rules) -> bool:
    if one.cell.error is not None:
        return False
    for flag in one.cell.flags:
        if rules.strict or (flag in ("throttled", "contended", "graph-failed") and flag not in rules.accept):
            return False
    by_accuracy = rules.prefer == "accuracy" and not rules.larger_is_better
    return one.accuracy is not None or not (by_accuracy or budget.min_top1 is not None)


def unflagged(one: Candidate) -> Candidate:
    return replace(one, cell=msgspec.structs.replace(one.cell, flags=()))


def only_disturbed(one: Candidate, budget: Budget, rules: Rules) -> bool:
    """Refused by its flags alone, and no call that could be as fast as ever, no memory, size or accuracy says that it
    would miss undisturbed too."""
    if usable(one, budget, rules) or not usable(unflagged(one), budget, rules):
        return False
    slowed = {"throttled", "graph-failed"} & set(one.cell.flags)
    for wanted in budget.latency:
        if wanted.percentile >= budget.confidence and min(one.cell.latency_s) > wanted.limit_s and not slowed:
            return False
    if budget.throughput_per_s is not None and not slowed:
        images = one.cell.batch * callers(one.cell.regime)
        if images / min(one.cell.latency_s) < budget.throughput_per_s:
            return False
    unmoved = Budget(
        memory_bytes=budget.memory_bytes,
        energy_j=budget.energy_j if one.cell.energy_j is None else None,
        size_bytes=budget.size_bytes,
        min_top1=budget.min_top1,
        confidence=budget.confidence,
    )
    return "missed" not in statuses(one, unmoved)


def order(one: Candidate, budget: Budget, rules: Rules) -> tuple[float, float, float]:
    samples = sorted(one.cell.latency_s)
    level = budget.latency[0].percentile if budget.latency else 0.95
    rank = next(i for i in range(1, len(samples) + 1) if i >= level * len(samples) - 1e-7)
    by_accuracy = math.inf if one.accuracy is None else -one.accuracy.top1
    if rules.larger_is_better:
        by_accuracy = -one.artifact.heads
    first = {
        "accuracy": by_accuracy,
        "latency": samples[rank - 1],
        "energy": math.inf if one.cell.energy_j is None else one.cell.energy_j,
        "memory": math.inf if one.cell.memory_bytes is None else one.cell.memory_bytes,
        "size": one.artifact.size_bytes,
    }[rules.prefer]
    return first, by_accuracy, average(one)


def average(one: Candidate) -> float:
    return sum(one.cell.latency_s) / len(one.cell.latency_s)


def less_often_right(one: Candidate, other: Candidate) -> bool | None:
    a, b = one.accuracy, other.accuracy
    if a is None or b is None or a.right is None or b.right is None:
        return None
    if (a.data_sha256, a.n) != (b.data_sha256, b.n):
        return None
    pairs = list(zip(bits(a.right, a.n), bits(b.right, b.n), strict=True))
    first, second = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    return first < second and binomtest(first, first + second, 0.5).pvalue < 0.05


def bits(packed: bytes, n: int) -> list[bool]:
    return [bool(packed[i // 8] >> (7 - i % 8) & 1) for i in range(n)]


# -- small random worlds --------------------------------------------------------------------------------------------

LEVELS_MS = (4, 5, 6, 8, 12)
# Off the grid of what is measured, so that no rounding decides.
LIMITS_MS = (3.9, 4.7, 5.3, 6.6, 8.9, 14.1)


@st.composite
def samples(draw) -> list[list[float]]:
    level = draw(st.sampled_from(LEVELS_MS)) * MS
    processes = draw(st.integers(1, 6))
    spread = draw(st.sampled_from((0.0, 0.0, 0.03, 0.2)))
    found = latencies(
        *(level * (1 + spread * draw(st.sampled_from((-1, 0, 1)))) for _ in range(processes)),
        n=draw(st.sampled_from((3, 12, 25))),
        jitter=draw(st.sampled_from((0.0, 0.02, 0.5))),
        seed=draw(st.integers(0, 3)),
    )
    if draw(st.booleans()):
        found[-1][-1] *= 3  # one slow call
    return found


@st.composite
def candidates(draw) -> Candidate:
    heads = draw(st.integers(2, 4))
    size = draw(st.sampled_from((None, 2**20)))
    of = artifact(heads, **({} if size is None else {"size_bytes": size}))
    row = draw(
        st.one_of(
            st.builds(lambda k, seed: accuracy(of, share(k, 60, seed=seed)), st.sampled_from((20, 40, 50, 52)), SEED),
            st.builds(lambda k: accuracy(of, share(k, 60), data_sha256="other"), st.sampled_from((40, 55))),
            st.builds(lambda k: declared(of, k, 60), st.sampled_from((40, 50))),
            st.none(),
        )
    )
    if draw(st.integers(0, 9)) == 0:
        return Candidate(failed(of), of, row)
    changes = {
        "memory_bytes": draw(st.sampled_from((None, 10, 20, 20, 30))),
        "energy_j": draw(st.sampled_from((None, 0.1, 0.2, 0.2))),
        "flags": draw(st.sampled_from(((), (), (), ("noisy",), ("graph-failed",), ("contended", "throttled")))),
        "batch": draw(st.sampled_from((1, 1, 4))),
    }
    return replace(candidate(heads, draw(samples()), size_bytes=size, **changes), accuracy=row)


SEED = st.integers(0, 1)
WORLDS = st.lists(candidates(), min_size=1, max_size=8)
BUDGETS = st.builds(
    Budget,
    latency=st.lists(
        st.builds(lambda p, ms: limit(p, ms * MS), st.sampled_from((50, 75, 90, 95, 99)), st.sampled_from(LIMITS_MS)),
        max_size=3,
    ).map(tuple),
    memory_bytes=st.sampled_from((None, None, None, 5.0, 20.0, 25.0)),
    energy_j=st.sampled_from((None, None, None, 0.1, 0.15)),
    size_bytes=st.sampled_from((None, None, None, 2.0**20, 3.0 * 2**20)),
    throughput_per_s=st.sampled_from((None, None, 61.7, 113.3, 203.1, 317.9)),
    min_top1=st.sampled_from((None, None, 0.5, 0.6, 0.75, 0.99)),
    confidence=st.sampled_from((0.5, 0.8, 0.95)),
)
RULES = st.builds(
    Rules,
    prefer=st.sampled_from(PREFERENCES),
    accept=st.sampled_from(((), (), ("throttled",), ("throttled", "contended"))),
    strict=st.sampled_from((False, False, False, True)),
    larger_is_better=st.booleans(),
)


@settings(max_examples=120)
@given(WORLDS, BUDGETS, RULES)
def test_the_choice_is_that_of_the_brute_force(world, budget, rules):
    eligible = [one for one in world if usable(one, budget, rules)]
    meeting = [one for one in eligible if set(statuses(one, budget)) <= {"met"}]
    ranked = sorted(meeting, key=lambda one: order(one, budget, rules))
    still_open = [one for one in eligible if "missed" not in statuses(one, budget) and "open" in statuses(one, budget)]
    disturbed = [one for one in world if only_disturbed(one, budget, rules)]
    choice = choose(world, budget, rules)
    if ranked:
        assert choice.verdict == "pass"
        assert choice.pick is ranked[0]
        assert choice.runner_up is (ranked[1] if len(ranked) > 1 else None)
        assert choice.nearest is None
        faster = [one for one in meeting if average(one) < average(ranked[0])]
        comparable = [one for one in faster if less_often_right(one, ranked[0]) is False]
        assert choice.cheaper is min(comparable, key=average, default=None)
        return
    assert choice.verdict == ("inconclusive" if still_open or disturbed else "infeasible")
    assert choice.pick is None
    assert choice.runner_up is None
    assert choice.cheaper is None
    flagged = [one for one in world if one.cell.error is None and usable(unflagged(one), budget, rules)]
    near = still_open or disturbed or eligible or flagged
    if not near:
        assert choice.nearest is None
    else:
        assert any(choice.nearest is one for one in near)


@settings(max_examples=150)
@given(candidates().filter(lambda one: one.cell.error is None), BUDGETS)
def test_cheap_tests_agree_with_the_judgement_and_every_limit_is_judged_once(one, budget):
    found = list(checks(one, budget))
    expected = statuses(one, budget)
    assert sorted(check.status for check in found) == sorted(expected)
    assert combined(found) == ("missed" if "missed" in expected else "open" if "open" in expected else "met")
    if combined(found) == "met":
        assert possible(one, budget)
    else:
        assert not meets(one, budget)
    if combined(found) != "missed":
        assert not hopeless(one, budget)
    for check in found:
        assert check.more is None or (check.status == "open" and check.more > 0)


@settings(max_examples=50)
@given(WORLDS, candidates(), BUDGETS, RULES)
def test_another_candidate_never_spoils_a_pick(world, another, budget, rules):
    before, after = choose(world, budget, rules), choose([*world, another], budget, rules)
    if before.verdict == "pass":
        assert after.verdict == "pass"
        assert any(after.pick is one for one in (before.pick, another))
    if before.verdict == "inconclusive":
        assert after.verdict != "infeasible"


TIGHTER = st.sampled_from(
    ("latency", "memory_bytes", "energy_j", "size_bytes", "throughput_per_s", "min_top1", "another limit")
)


@settings(max_examples=60)
@given(WORLDS, BUDGETS, RULES, TIGHTER, st.sampled_from((0.5, 0.8, 0.97)))
def test_a_tighter_limit_never_gives_a_pick_where_there_was_none(world, budget, rules, what, factor):
    if what == "latency":
        latency = tuple(limit(100 * one.percentile, one.limit_s * factor) for one in budget.latency)
        tight = msgspec.structs.replace(budget, latency=latency)
    elif what == "another limit":
        tight = msgspec.structs.replace(budget, latency=(*budget.latency, limit(90, 6 * MS * factor)))
    else:
        value = getattr(budget, what)
        loosest = 0.0 if what in ("throughput_per_s", "min_top1") else 1e12
        harder = 1 / factor if what in ("throughput_per_s", "min_top1") else factor
        tight = msgspec.structs.replace(budget, **{what: loosest if value is None else value * harder})
    before, after = choose(world, budget, rules), choose(world, tight, rules)
    if before.verdict == "infeasible":
        assert after.verdict == "infeasible"
    if before.verdict == "inconclusive":
        assert after.verdict != "pass"


@settings(max_examples=50)
@given(st.data(), WORLDS, BUDGETS, RULES)
def test_the_order_of_candidates_does_not_matter(data, world, budget, rules):
    one, other = choose(world, budget, rules), choose(data.draw(st.permutations(world)), budget, rules)
    assert one.verdict == other.verdict
    if one.pick is not None:
        # Exact ties go to the first.
        assert order(one.pick, budget, rules) == order(other.pick, budget, rules)


# -- single facts ---------------------------------------------------------------------------------------------------


def test_of_all_orders_the_same_is_picked():
    world = [candidate(k, latencies(*(k * MS,) * 5), share(100 + 10 * k)) for k in range(2, 6)]
    for shuffled in permutations(world):
        choice = choose(shuffled, Budget(latency=(limit(95, 4.2 * MS),)))
        assert (choice.pick, choice.runner_up) == (world[2], world[1])
        # 20 of 200 images are too many to be chance.
        assert choice.cheaper is None


def test_preferences_pick_different_cells_of_one_world():
    by = {
        "accuracy": candidate(5, latencies(*(9 * MS,) * 5), share(190), memory_bytes=90, energy_j=9.0, size_bytes=90),
        "latency": candidate(4, latencies(*(1 * MS,) * 5), share(100), memory_bytes=80, energy_j=8.0, size_bytes=80),
        "energy": candidate(3, latencies(*(8 * MS,) * 5), share(100), memory_bytes=85, energy_j=1.0, size_bytes=85),
        "memory": candidate(2, latencies(*(7 * MS,) * 5), share(100), memory_bytes=10, energy_j=7.0, size_bytes=70),
        "size": candidate(6, latencies(*(6 * MS,) * 5), share(100), memory_bytes=60, energy_j=6.0, size_bytes=10),
    }
    for prefer, wanted in by.items():
        assert choose(list(by.values()), Budget(), Rules(prefer=prefer)).pick is wanted
    larger = Rules(larger_is_better=True)
    assert choose(list(by.values()), Budget(), larger).pick is by["size"]


def test_equally_accurate_ones_go_to_the_fastest():
    slow = candidate(3, latencies(*(5 * MS,) * 5), share(150))
    fast = candidate(2, latencies(*(4 * MS,) * 5), share(150, seed=1))
    assert choose([slow, fast], Budget(latency=(limit(95, 9 * MS),))).pick is fast


def test_cheaper_is_faster_and_not_significantly_less_accurate():
    best = candidate(5, latencies(*(5 * MS,) * 5), share(190))
    close = candidate(4, latencies(*(4 * MS,) * 5), share(187))
    far = candidate(3, latencies(*(3 * MS,) * 5), share(120))
    unlike = candidate(2, latencies(*(2 * MS,) * 5), share(187, 210))
    choice = choose([far, unlike, close, best], Budget(latency=(limit(95, 9 * MS),)))
    assert choice.pick is best
    assert choice.cheaper is close
    p_value = binomtest(0, 190 - 187, 0.5).pvalue
    assert p_value > 0.05 > binomtest(0, 190 - 120, 0.5).pvalue
    heavy = candidate(4, latencies(*(4 * MS,) * 5), share(187), memory_bytes=2**40)
    within = Budget(latency=(limit(95, 9 * MS),), memory_bytes=2.0**39)
    assert choose([far, heavy, best], within).cheaper is None
    # Faster on average and never over the limit, but no two processes alike.
    unsteady = candidate(4, latencies(2 * MS, 3 * MS, 4 * MS, 5 * MS, 6 * MS), share(187))
    assert choose([far, unsteady, best], Budget(latency=(limit(95, 9 * MS),))).cheaper is None


def test_a_declared_accuracy_is_never_called_comparable():
    of = artifact(2)
    best = candidate(5, latencies(*(5 * MS,) * 5), share(190))
    told = replace(candidate(2, latencies(*(2 * MS,) * 5)), accuracy=declared(of, 189, 200))
    assert choose([told, best], Budget(latency=(limit(95, 9 * MS),))).cheaper is None
    assert significantly_less(told.accuracy, best.accuracy) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=70))
def test_significantly_less_is_the_exact_test_on_the_images_they_differ_in(pairs):
    one, other = accuracy(artifact(2), [a for a, _ in pairs]), accuracy(artifact(3), [b for _, b in pairs])
    first, second = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    less = first < second and binomtest(first, first + second, 0.5).pvalue < 0.05
    assert significantly_less(one, other) is bool(less)
    assert not (significantly_less(one, other) and significantly_less(other, one))


def test_significance_starts_at_six_images_that_differ():
    for differ, less in ((5, False), (6, True)):
        one, other = accuracy(artifact(2), share(150 - differ)), accuracy(artifact(3), share(150))
        assert significantly_less(one, other) is less
        assert significantly_less(other, one) is False


@pytest.mark.parametrize("change", [{"data_sha256": "else"}, {"right": None}])
def test_accuracies_on_other_images_are_not_compared(change):
    one, other = accuracy(artifact(2), share(10)), accuracy(artifact(3), share(190))
    assert significantly_less(one, other) is True
    assert significantly_less(msgspec.structs.replace(one, **change), other) is None
    assert significantly_less(one, msgspec.structs.replace(other, **change)) is None
    assert significantly_less(None, other) is None
    assert significantly_less(accuracy(artifact(2), share(10, 199)), other) is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5) | st.none()), max_size=9), st.sampled_from((0.5, 0.95)))
def test_dominated_is_what_another_beats_in_one_and_equals_in_the_other(figures, level):
    world = [
        candidate(2, [[ms * MS] * 19 + [9 * MS]], None if right is None else share(right, 5)) for ms, right in figures
    ]
    world.append(Candidate(failed(artifact(9)), artifact(9), accuracy(artifact(9), [True] * 5)))

    def beats(one: Candidate, other: Candidate) -> bool:
        if one.accuracy is None or other.accuracy is None or one.cell.error or other.cell.error:
            return False
        ranks = sorted(one.cell.latency_s), sorted(other.cell.latency_s)
        a, b = (ordered[math.ceil(len(ordered) * level - 1e-9) - 1] for ordered in ranks)
        no_worse = a <= b and one.accuracy.top1 >= other.accuracy.top1
        return no_worse and (a < b or one.accuracy.top1 > other.accuracy.top1)

    found = dominated(world, level)
    assert set(found) == {i for i, other in enumerate(world) if any(beats(one, other) for one in world)}
    for i, by in found.items():
        assert beats(by, world[i])
        assert not any(beats(one, by) for one in world)


def test_missing_samples_are_inconclusive_and_missed_limits_infeasible():
    few = candidate(2, latencies(*(4 * MS,) * 5, n=1), share(150))
    over = candidate(2, latencies(*(7 * MS,) * 5), share(150))
    budget = Budget(latency=(limit(95, 6 * MS),))
    assert choose([few], budget).verdict == "inconclusive"
    assert choose([over], budget).verdict == "infeasible"
    choice = choose([over, few], budget)
    assert (choice.verdict, choice.nearest) == ("inconclusive", few)
    # No number of samples makes it smaller.
    assert choose([few], msgspec.structs.replace(budget, size_bytes=1.0)).verdict == "infeasible"


@pytest.mark.parametrize(("percent", "n"), [(95, 5), (95, 11), (99, 5), (99, 40), (99.9, 40)])
def test_no_limit_is_met_by_fewer_samples_than_independent_ones_would_take(percent, n):
    """However far it is: what their logarithms say of the tail is no measurement of it."""
    few = candidate(2, latencies(*(4 * MS,) * 5, n=n), share(150))
    assert (few.bounds(percent / 100, 0.95).upper, few.bounds(percent / 100, 0.95).assumes) == (None, None)
    budget = Budget(latency=(limit(percent, 4000 * MS),))
    (check,) = judged(few, budget, Rules())
    assert check.status == "open"
    assert "even were they independent" in check.text
    assert choose([few], budget).verdict == "inconclusive"


def test_dependent_samples_meet_a_limit_that_log_normal_latencies_meet():
    thrice = [[value for value in chain for _ in range(3)] for chain in latencies(*(4 * MS,) * 5, n=10)]
    few = candidate(2, thrice, share(150))
    found = few.bounds(0.95, 0.95)
    assert found.assumes == "log-normal latencies"
    assert found.upper > max(few.cell.latency_s)
    budget = Budget(latency=(limit(95, found.upper),))
    (check,) = judged(few, budget, Rules())
    assert check.status == "met"
    assert possible(few, budget)
    choice = choose([few], budget)
    assert (choice.verdict, choice.pick) == ("pass", few)
    below = Budget(latency=(limit(95, math.nextafter(found.upper, 0)),))
    assert choose([few], below).verdict == "inconclusive"


def test_more_samples_are_enough_when_they_are_taken():
    few = candidate(2, latencies(*(4 * MS,) * 5, n=5), share(150))
    # Above all calls, below what their logarithms bound it by.
    budget = Budget(latency=(limit(95, 4.045 * MS),))
    (check,) = judged(few, budget, Rules())
    assert check.more == 59 - 25
    for more, verdict in ((check.more - 5, "inconclusive"), (check.more + 1, "pass")):
        again = candidate(2, latencies(*(4 * MS,) * 5, n=(25 + more) // 5), share(150))
        assert choose([again], budget).verdict == verdict


@pytest.mark.parametrize(
    ("over", "status", "more"), [(3, "met", False), (45, "open", True), (49, "open", True), (50, "open", False)]
)
def test_how_many_more_samples_is_said_at_once_however_close_the_limit(over, status, more):
    calls = [20 * MS] * over + [10 * MS] * (1000 - over)
    shuffled = [calls[(i * 617) % 1000] for i in range(1000)]
    one = candidate(2, [shuffled[i::5] for i in range(5)], share(150))
    started = time.perf_counter()
    (check,) = judged(one, Budget(latency=(limit(95, 15 * MS),)), Rules())
    assert time.perf_counter() - started < 1
    assert check.status == status
    assert (check.more is not None) is more
    if check.more is not None:
        # With that share of slow calls among them the exact test passes.
        total = 1000 + check.more
        assert binomtest(round(total * over / 1000), total, 0.05, "less").pvalue < 0.06
        assert binomtest(round(total / 2 * over / 1000), total // 2, 0.05, "less").pvalue > 0.05


def test_a_limit_is_met_by_calls_that_take_just_as_long():
    exact = candidate(2, [[4 * MS] * 40] * 5, share(150))
    assert choose([exact], Budget(latency=(limit(95, 4 * MS),))).verdict == "pass"
    assert choose([exact], Budget(latency=(limit(95, math.nextafter(4 * MS, 0)),))).verdict == "infeasible"
    # One call just at the limit and all others over it, of a single process, prove nothing.
    few = candidate(2, [[4 * MS, 5 * MS, 5 * MS]], share(150))
    assert choose([few], Budget(latency=(limit(95, 4 * MS),))).verdict == "inconclusive"


def test_one_process_cannot_vouch_for_the_next():
    alone = candidate(2, latencies(4 * MS, n=500), share(150))
    choice = choose([alone], Budget(latency=(limit(95, 6 * MS),)))
    assert choice.verdict == "inconclusive"
    (check,) = judged(alone, Budget(latency=(limit(95, 6 * MS),)), Rules())
    assert "one process" in check.text


def test_an_accuracy_just_not_proven_is_open_and_a_low_one_missed():
    one = candidate(2, right=share(160))
    low, high = one.accuracy.lower, one.accuracy.upper
    assert choose([one], Budget(min_top1=low)).verdict == "pass"
    assert choose([one], Budget(min_top1=low + 1e-6)).verdict == "inconclusive"
    assert choose([one], Budget(min_top1=high)).verdict == "inconclusive"
    assert choose([one], Budget(min_top1=high + 1e-6)).verdict == "infeasible"


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99, 0.999])
def test_a_floor_of_accuracy_holds_with_the_confidence_asked_for(confidence):
    one = candidate(2, right=share(160))
    low, high = wilson(160, 200, confidence)
    assert (low < one.accuracy.lower) == (confidence > 0.95)
    for floor, verdict in ((low, "pass"), (low + 1e-6, "inconclusive"), (high, "inconclusive"), (0.999, "infeasible")):
        assert choose([one], Budget(min_top1=floor, confidence=confidence)).verdict == verdict


@pytest.mark.parametrize(
    ("field", "value"), [("memory_bytes", 1000), ("energy_j", 0.25), ("size_bytes", 1000), ("size_bytes", 0)]
)
def test_amounts_are_met_at_their_limit_and_missed_where_not_measured(field, value):
    own = {} if field == "size_bytes" else {field: value}
    one = candidate(2, right=share(160), size_bytes=value if field == "size_bytes" else None, **own)
    assert choose([one], Budget(**{field: float(value)})).verdict == "pass"
    assert choose([one], Budget(**{field: value - 1e-6})).verdict == "infeasible"
    if own:
        unknown = candidate(2, right=share(160), **{field: None})
        assert choose([unknown], Budget(**{field: 1e9})).verdict == "infeasible"


@pytest.mark.parametrize(
    ("flags", "accept", "strict", "taken"),
    [
        ((), (), True, True),
        (("floating-clocks", "noisy"), (), False, True),
        (("noisy",), (), True, False),
        (("noisy",), ("noisy",), True, False),
        (("throttled",), (), False, False),
        (("contended",), ("throttled",), False, False),
        (("throttled",), ("throttled",), False, True),
        (("graph-failed",), ("throttled", "contended"), False, False),
        (("graph-failed",), ("graph-failed",), False, True),
        (("throttled", "contended"), ("throttled",), False, False),
        (("throttled", "contended"), ("contended", "throttled"), False, True),
    ],
)
def test_flags_refuse_unless_accepted_and_strict_takes_none(flags, accept, strict, taken):
    one = candidate(2, right=share(160), flags=flags)
    rules = Rules(accept=accept, strict=strict)
    choice = choose([one], Budget(size_bytes=1e12), rules)
    assert (choice.pick is one) is taken
    (check, *_) = judged(one, Budget(size_bytes=1e12), rules)
    assert (check.limit != "measurement") is taken


def test_the_refusal_of_a_flagged_cell_names_what_would_take_it():
    one = candidate(2, right=share(160), flags=("throttled", "noisy", "contended"))
    (check,) = judged(one, Budget(), Rules())
    named = check.text.partition("--accept ")[2].partition(" ")[0].split(",")
    assert choose([one], Budget(size_bytes=1e12), Rules(accept=tuple(named))).pick is one


def test_a_failed_cell_is_never_picked_and_says_why():
    broken = Candidate(failed(artifact(2), "out of memory"), artifact(2), accuracy(artifact(2), share(190)))
    rules = Rules(prefer="size", accept=("throttled", "contended"), larger_is_better=True)
    assert choose([broken], Budget(size_bytes=1e12), rules).verdict == "infeasible"
    (check,) = judged(broken, Budget(), rules)
    assert "out of memory" in check.text


def test_throughput_counts_images_not_calls():
    one = candidate(2, latencies(*(10 * MS,) * 5), share(150), batch=4)
    assert choose([one], Budget(throughput_per_s=350.0)).verdict == "pass"
    assert choose([one], Budget(throughput_per_s=450.0)).verdict == "infeasible"
    unsteady = candidate(2, latencies(8 * MS, 9 * MS, 10 * MS, 11 * MS, 12 * MS), share(150), batch=4)
    assert choose([unsteady], Budget(throughput_per_s=400.0)).verdict == "inconclusive"
    alone = candidate(2, latencies(10 * MS), share(150), batch=4)
    assert choose([alone], Budget(throughput_per_s=1.0)).verdict == "inconclusive"


def test_no_candidates_are_infeasible():
    choice = choose([], Budget(latency=(limit(95, 1.0),)))
    assert (choice.verdict, choice.nearest) == ("infeasible", None)


def test_the_nearest_of_slow_ones_is_the_fastest():
    world = [candidate(k, latencies(*(k * 10 * MS,) * 5), share(100 + k)) for k in (4, 2, 3)]
    assert choose(world, Budget(latency=(limit(95, 5 * MS),))).nearest is world[1]
    light = candidate(5, latencies(*(11 * MS,) * 5), share(100), memory_bytes=100)
    heavy = candidate(6, latencies(*(4 * MS,) * 5), share(100), memory_bytes=1000)
    # 11 % over one limit is nearer than ten times another.
    assert choose([heavy, light], Budget(latency=(limit(95, 10 * MS),), memory_bytes=100.0)).nearest is light
