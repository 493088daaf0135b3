"""Energy of packages from RAPL: which domains count, wraps, and why there is none."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.devices.rapl import Rapl, advance_uj
from hydradeploy.devices.reading import Tree
from tests.devices.trees import below, refuse, tree

POWERCAP = "sys/class/powercap"
RANGE = 262143328850


def domain(number: str, name: str, energy_uj: object, range_uj: object = RANGE) -> dict[str, str]:
    files = {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": range_uj}
    return below(f"{POWERCAP}/intel-rapl:{number}", files)


def rapl(root: Path, files) -> Rapl:
    return Rapl(Tree(tree(root, files)))


TWO = domain("0", "package-0", 5_000_000) | domain("1", "package-1", 7_000_000)


def test_packages_are_added_up_without_their_parts_the_memory_or_the_whole_board(tmp_path):
    files = TWO | domain("0:0", "core", 1_000_000) | domain("0:1", "dram", 1_000_000) | domain("2", "psys", 90_000_000)
    files |= domain("0:2", "package-of-a-part", 1_000_000) | {f"{POWERCAP}/intel-rapl-mmio:0/name": "package-0\n"}
    found = rapl(tmp_path, files)
    assert found.energy_j() == 12.0
    assert found.meter() == "RAPL package-0, package-1 (without memory)"
    assert found.why_not() is None


@given(st.lists(st.integers(0, 300), min_size=1), st.integers(300, 1000), st.integers(0, 1300))
def test_a_counter_that_wraps_adds_up_to_what_it_counted(steps, last, start):
    """`last` is its largest value; no step wraps it twice."""
    value, total = start % (last + 1), 0
    for step in steps:
        after = (value + step) % (last + 1)
        total += advance_uj(value, after, last)
        value = after
    assert total == sum(steps)


def test_energy_goes_on_where_a_package_wraps(tmp_path):
    found = rapl(tmp_path, domain("0", "package-0", RANGE - 1_000_000) | domain("1", "package-1", 1_000_000))
    before = found.energy_j()
    tree(tmp_path, domain("0", "package-0", 1_999_999) | domain("1", "package-1", 2_000_000))
    after = found.energy_j()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(4.0)


def test_a_reading_that_fails_is_none_and_the_next_one_catches_up(tmp_path, monkeypatch):
    found = rapl(tmp_path, TWO)
    assert found.energy_j() == 12.0
    with monkeypatch.context() as patch:
        refuse(patch, tmp_path / f"{POWERCAP}/intel-rapl:1/energy_uj", errno.EIO)
        tree(tmp_path, domain("0", "package-0", 6_000_000))
        assert found.energy_j() is None
    tree(tmp_path, domain("1", "package-1", 9_000_000))
    assert found.energy_j() == 15.0


def test_without_permission_the_reason_names_the_file_and_what_opens_it(tmp_path, monkeypatch):
    found = rapl(tmp_path, TWO)
    refuse(monkeypatch, tmp_path / f"{POWERCAP}/intel-rapl:0/energy_uj", errno.EACCES)
    path = f"/{POWERCAP}/intel-rapl:0/energy_uj"
    assert (found.energy_j(), found.meter()) == (None, None)
    assert found.why_not() == f"{path}: no permission; run as root, or open it with sudo chmod a+r {path}"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no RAPL below /sys/class/powercap, as on ARM, in most virtual machines and in containers"),
        (domain("0", "psys", 1), "/sys/class/powercap has no package among intel-rapl:0 that tells its name"),
        ({f"{POWERCAP}/intel-rapl:0/enabled": "1"}, "has no package among intel-rapl:0 .* a container may mask them"),
        (domain("0", "package-0", 0), "energy_uj: it counts nothing, as in a virtual machine"),
        (domain("0", "package-0", "much"), "energy_uj: it counts nothing, as in a virtual machine"),
        (domain("0", "package-0", 5, ""), "energy_uj: where it wraps is unknown"),
        (TWO | domain("1", "package-1", 5, "many"), "intel-rapl:1/energy_uj: where it wraps is unknown"),
    ],
)
def test_where_there_is_no_energy_the_reason_is_told(tmp_path, files, reason):
    found = rapl(tmp_path, files)
    assert (found.energy_j(), found.meter()) == (None, None)
    assert re.search(reason, found.why_not() or "")


def test_a_package_whose_range_has_no_file_gives_no_energy(tmp_path):
    found = rapl(tmp_path, TWO)
    (tmp_path / f"{POWERCAP}/intel-rapl:1/max_energy_range_uj").unlink()
    assert found.energy_j() is None
    assert (found.why_not() or "").endswith("max_energy_range_uj cannot be read")


def test_a_directory_in_the_place_of_a_counter_is_a_reason_too(tmp_path):
    found = rapl(tmp_path, domain("1", "package-1", 5) | below(f"{POWERCAP}/intel-rapl:0", {"name": "package-0"}))
    (tmp_path / f"{POWERCAP}/intel-rapl:0/energy_uj").mkdir()
    assert (found.why_not() or "").startswith(f"/{POWERCAP}/intel-rapl:0/energy_uj: ")
