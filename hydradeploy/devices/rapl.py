"""Energy of the processor's packages, as Intel's and AMD's RAPL counts it. Linux shows it to root only, by default."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from hydradeploy.devices.reading import Tree

_POWERCAP = "sys/class/powercap"


class Domain(NamedTuple):
    """A package: its cores and graphics, not the memory. `range_uj` is the last value before the counter wraps."""

    name: str
    file: Path
    range_uj: int | None


def advance_uj(before: int, after: int, range_uj: int) -> int:
    """How far a counter went that wrapped at most once. At 300 W one of 262 kJ wraps every quarter of an hour."""
    return after - before if after >= before else after - before + range_uj + 1


@dataclass
class Rapl:
    """The counters of all packages as one, which never goes back while this object reads them."""

    tree: Tree
    _last_uj: dict[Path, int] = field(default_factory=dict)
    _total_uj: int = 0

    def energy_j(self) -> float | None:
        """Joules since some moment of the past; None unless every package answers."""
        values = {domain: self.tree.number(domain.file) for domain in self._packages}
        if not values or not all(value and domain.range_uj for domain, value in values.items()):
            return None
        for domain, value in values.items():
            now = value or 0
            self._total_uj += advance_uj(self._last_uj.get(domain.file, 0), now, domain.range_uj or 0)
            self._last_uj[domain.file] = now
        return self._total_uj / 1e6

    def meter(self) -> str | None:
        """`RAPL package-0, package-1 (without memory)`; None where they cannot be read."""
        if self.energy_j() is None:
            return None
        return f"RAPL {', '.join(domain.name for domain in self._packages)} (without memory)"

    def why_not(self) -> str | None:
        """Why there is no energy; None where there is."""
        if self.energy_j() is not None:
            return None
        if not self._packages:
            return self._why_no_package()
        for domain in self._packages:
            path = self.tree.shown(domain.file)
            problem = self.tree.problems.get(path)
            if problem == "no permission":
                return f"{path}: no permission; run as root, or open it with sudo chmod a+r {path}"
            if problem:
                return f"{path}: {problem}"
            if not self.tree.number(domain.file):
                return f"{path}: it counts nothing, as in a virtual machine"
            if not domain.range_uj:
                return f"{path}: where it wraps is unknown, for max_energy_range_uj cannot be read"
        return None

    def _why_no_package(self) -> str:
        listed = [path.name for path in self.tree.glob(f"{_POWERCAP}/intel-rapl:*")]
        if not listed:
            return f"no RAPL below /{_POWERCAP}, as on ARM, in most virtual machines and in containers"
        return f"/{_POWERCAP} has no package among {', '.join(listed)} that tells its name; a container may mask them"

    @cached_property
    def _packages(self) -> tuple[Domain, ...]:
        """Domains like intel-rapl:0; intel-rapl:0:1 is a part of one, and psys has all of them in it."""
        found = []
        for directory in self.tree.glob(f"{_POWERCAP}/intel-rapl:*"):
            name = self.tree.text(directory / "name")
            if name and name.startswith("package") and directory.name.count(":") == 1:
                range_uj = self.tree.number(directory / "max_energy_range_uj")
                found.append(Domain(name, directory / "energy_uj", range_uj))
        return tuple(found)
