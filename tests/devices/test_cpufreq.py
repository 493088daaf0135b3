"""Clocks of the processor: read, told to be pinned or floating, pinned and put back on every way out."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from hydradeploy.devices.linux import Linux
from hydradeploy.devices.reading import Tree
from hydradeploy.errors import EnvironmentFailed, MissingError
from tests.devices.trees import below, tree

CPUS = "sys/devices/system/cpu"


def policy(
    directory: str, low: object, high: object, now: object = 1000000, governor: str = "schedutil", **more
) -> dict:
    names = {"scaling_min_freq": low, "scaling_max_freq": high, "scaling_cur_freq": now, "scaling_governor": governor}
    return below(f"{CPUS}/{directory}", {**names, **more})


X86 = policy("cpufreq/policy0", 800000, 4200000, 1200345) | policy("cpufreq/policy1", 800000, 4200000, 4100000)
BIG_LITTLE = (
    policy("cpufreq/policy0", 408000, 1800000, 1800000)
    | policy("cpufreq/policy10", 408000, 2256000, 600000, "performance")
    | policy("cpufreq/policy4", 2256000, 2256000, 2256000)
)


def linux(root: Path, files) -> Linux:
    return Linux(Tree(tree(root, files)))


def content(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text().strip() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "clocks", "governor"),
    [
        (X86, {"policy0": 1.200345e9, "policy1": 4.1e9}, "schedutil"),
        (BIG_LITTLE, {"policy0": 1.8e9, "policy4": 2.256e9, "policy10": 0.6e9}, "performance+schedutil"),
        (policy("cpu0/cpufreq", 1, 2) | policy("cpu1/cpufreq", 1, 2, 7), {"cpu0": 1e9, "cpu1": 7e3}, "schedutil"),
        (X86 | policy("cpu0/cpufreq", 1, 2, governor="other"), {"policy0": 1.200345e9, "policy1": 4.1e9}, "schedutil"),
        (X86 | {f"{CPUS}/cpufreq/policy1/scaling_cur_freq": "<unknown>\n"}, {"policy0": 1.200345e9}, "schedutil"),
        (X86 | {f"{CPUS}/cpufreq/policy1/scaling_cur_freq": "0\n"}, {"policy0": 1.200345e9}, "schedutil"),
        ({f"{CPUS}/cpufreq/boost": "1\n"}, {}, None),
    ],
)
def test_there_is_a_clock_per_policy_or_else_per_core(tmp_path, files, clocks, governor):
    found = linux(tmp_path, files)
    gauges = found.gauges()
    assert {name: hz for name, hz in gauges.items() if name.startswith("clock_hz.")} == {
        f"clock_hz.{name}": pytest.approx(hz) for name, hz in clocks.items()
    }
    assert found.conditions({}).governor == governor


@pytest.mark.parametrize(
    ("files", "clocks", "pinned"),
    [
        (X86, "floating", {}),
        (BIG_LITTLE, "floating", {"policy4": 2.256e9}),
        (policy("cpufreq/policy0", 5, 5) | policy("cpufreq/policy4", 7, 7), "pinned", {"policy0": 5e3, "policy4": 7e3}),
        (policy("cpufreq/policy0", 5, "") | policy("cpufreq/policy4", 7, 7), "pinned", {"policy4": 7e3}),
        (policy("cpufreq/policy0", "", ""), None, {}),
        ({}, None, {}),
    ],
)
def test_clocks_are_pinned_where_the_lowest_of_every_policy_is_the_highest(tmp_path, files, clocks, pinned):
    found = linux(tmp_path, files)
    assert found.conditions({}).clocks == clocks
    gauges = {name.partition(".")[2]: hz for name, hz in found.gauges().items() if name.startswith("pinned_hz.")}
    assert gauges == pinned


@pytest.mark.parametrize(
    ("more", "held"),
    [
        ({f"{CPUS}/cpufreq/policy2/base_frequency": "2100000\n"}, 2.1e9),
        ({f"{CPUS}/cpu2/acpi_cppc/nominal_freq": "2400\n"}, 2.4e9),
        ({f"{CPUS}/cpu2/acpi_cppc/nominal_freq": "0\n"}, 4.2e9),
        ({f"{CPUS}/cpufreq/policy2/base_frequency": "4500000\n"}, 4.2e9),
        ({}, 4.2e9),
    ],
)
def test_a_clock_pinned_to_turbo_is_held_to_the_base_clock(tmp_path, more, held):
    files = policy("cpufreq/policy2", 4200000, 4200000) | more
    assert linux(tmp_path, files).gauges()["pinned_hz.policy2"] == held


def test_a_device_that_lowers_its_limits_is_still_held_to_what_it_was_pinned_to(tmp_path):
    found = linux(tmp_path, policy("cpufreq/policy0", 2000000, 2000000))
    assert found.gauges()["pinned_hz.policy0"] == 2e9
    tree(tmp_path, policy("cpufreq/policy0", 1500000, 1500000, 1500000))
    gauges = found.gauges()
    assert (gauges["pinned_hz.policy0"], gauges["clock_hz.policy0"]) == (2e9, 1.5e9)


@pytest.mark.parametrize("files", [X86, BIG_LITTLE, policy("cpu0/cpufreq", 1, 2)])
def test_pinned_clocks_are_put_back(tmp_path, files):
    found = linux(tmp_path, files)
    before = content(tmp_path)
    assert not any(name == "pinned_hz.policy0" for name in found.gauges())
    with found.lock_clocks():
        assert found.clocks() == "pinned"
        assert found.conditions({}).governor == "performance"
        assert {name.partition(".")[2] for name in found.gauges() if name.startswith("pinned_hz.")} == {
            name.partition(".")[2] for name in found.gauges() if name.startswith("clock_hz.")
        }
    assert content(tmp_path) == before
    assert found.clocks() == "floating"
    assert not any(name == "pinned_hz.policy0" for name in found.gauges())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_pinned_clocks_are_put_back_when_the_block_is_left_by_an_error(tmp_path, error):
    found = linux(tmp_path, X86)
    before = content(tmp_path)

    def leave() -> None:
        with found.lock_clocks():
            assert found.clocks() == "pinned"
            raise error

    with pytest.raises(error):
        leave()
    assert content(tmp_path) == before


def failing(monkeypatch: pytest.MonkeyPatch, write_number: int, error: OSError) -> None:
    """That one of all writes fails, counted from 0."""
    write, numbers = Path.write_text, count()

    def fail(self, *rest, **named):
        if next(numbers) == write_number:
            raise error
        return write(self, *rest, **named)

    monkeypatch.setattr(Path, "write_text", fail)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_pinning_that_fails_half_way_puts_back_what_it_changed(tmp_path, monkeypatch, after):
    """The refused write itself is not undone: the file still says what it said."""
    found = linux(tmp_path, X86)
    before = content(tmp_path)
    failing(monkeypatch, after, PermissionError(13, "Permission denied"))
    with (
        pytest.raises(MissingError, match=r"cannot be pinned: /sys/.*: Permission denied") as raised,
        found.lock_clocks(),
    ):
        pytest.fail("the block must not run")
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("run as root (sudo), or ")
    assert content(tmp_path) == before


def test_a_clock_that_cannot_be_put_back_is_told_with_the_command_that_does_it(tmp_path, monkeypatch):
    found = linux(tmp_path, X86)
    before = content(tmp_path)
    failing(monkeypatch, 5, OSError(16, "Device or resource busy"))
    with pytest.raises(EnvironmentFailed, match="busy") as raised, found.lock_clocks():
        pass
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("echo ")
    # The second of four that were to be put back, and no reason to leave out the others.
    stays = f"{CPUS}/cpufreq/policy1/scaling_governor"
    assert content(tmp_path) == {**before, stays: "performance"}


def test_what_cannot_be_read_is_not_changed(tmp_path):
    found = linux(tmp_path, {name: text for name, text in X86.items() if "policy1/scaling_min" not in name})
    before = content(tmp_path)
    with pytest.raises(MissingError, match="policy1/scaling_min_freq: what is there now cannot be read"):
        found.lock_clocks().__enter__()
    assert content(tmp_path) == before


def test_without_clocks_there_is_nothing_to_pin_and_a_hint(tmp_path):
    with pytest.raises(MissingError, match="no cpufreq below /sys/devices/system/cpu") as raised:
        Linux(Tree(tmp_path)).lock_clocks().__enter__()
    assert raised.value.hint is not None
