"""Clocks of the processor: what they are, whether they are pinned, and pinning them. A policy is cores of one clock."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hydradeploy.devices.reading import Tree
from hydradeploy.errors import EnvironmentFailed, MissingError

_CPUS = "sys/devices/system/cpu"
_UNPINNED = "leave pinning out: the clocks are recorded and the cells say that they float"


def policies(tree: Tree) -> tuple[Path, ...]:
    """One directory per clock, or per core where the kernel has no directories of policies."""
    return tuple(tree.glob(f"{_CPUS}/cpufreq/policy[0-9]*") or tree.glob(f"{_CPUS}/cpu[0-9]*/cpufreq"))


def name_of(policy: Path) -> str:
    """`policy4`, or `cpu4`."""
    return policy.parent.name if policy.name == "cpufreq" else policy.name


def governor(tree: Tree, of: Sequence[Path]) -> str | None:
    """What sets the clocks, `performance+powersave` where policies differ; None where nothing tells."""
    return "+".join(sorted({name for policy in of if (name := tree.text(policy / "scaling_governor"))})) or None


def clocks_hz(tree: Tree, of: Sequence[Path]) -> dict[str, float]:
    """The present clock by policy."""
    found = {name_of(policy): tree.number(policy / "scaling_cur_freq") for policy in of}
    return {name: khz * 1e3 for name, khz in found.items() if khz}


def pinned_hz(tree: Tree, of: Sequence[Path]) -> dict[str, float]:
    """What those policies hold that are pinned: their one clock, or the base clock where that one is a turbo's.

    No processor promises its turbo clock, least of all on all cores at once.
    """
    pinned_to = {name: high for name, (low, high) in _limits_hz(tree, of).items() if low == high}
    base = {name_of(policy): _base_hz(tree, policy) for policy in of}
    return {name: min(hz, base[name] or hz) for name, hz in pinned_to.items()}


def state(tree: Tree, of: Sequence[Path]) -> str | None:
    """`pinned` where the lowest clock of every policy is its highest, else `floating`; None where nothing tells."""
    limits = _limits_hz(tree, of)
    if not limits:
        return None
    return "pinned" if all(low == high for low, high in limits.values()) else "floating"


@contextmanager
def pinned(tree: Tree, of: Sequence[Path]) -> Iterator[None]:
    """Every policy at its highest clock while the block runs; then, however it ends, what was there before.

    Raises MissingError where there is nothing to pin or no right to, EnvironmentFailed where a file that was changed
    cannot be put back.
    """
    files = [(policy, tree.text(policy / "scaling_max_freq")) for policy in of]
    wanted = [(policy, highest) for policy, highest in files if highest]
    if not wanted:
        raise MissingError(f"the clocks of this processor cannot be pinned: no cpufreq below /{_CPUS}", hint=_UNPINNED)
    with ExitStack() as undo:
        for policy, highest in wanted:
            _set(tree, policy / "scaling_governor", "performance", undo)
            _set(tree, policy / "scaling_min_freq", highest, undo)
        yield


def _limits_hz(tree: Tree, of: Sequence[Path]) -> dict[str, tuple[float, float]]:
    found = {}
    for policy in of:
        low, high = (tree.number(policy / f"scaling_{end}_freq") for end in ("min", "max"))
        if low and high:
            found[name_of(policy)] = (low * 1e3, high * 1e3)
    return found


def _base_hz(tree: Tree, policy: Path) -> float | None:
    """The highest clock without turbo, of intel_pstate or ACPI.

    In docs.kernel.org: admin-guide/pm/intel_pstate.html, admin-guide/acpi/cppc_sysfs.html.
    """
    cpu = name_of(policy).replace("policy", "cpu")  # the first of its cores
    khz, mhz = tree.number(policy / "base_frequency"), tree.number(f"{_CPUS}/{cpu}/acpi_cppc/nominal_freq")
    return khz * 1e3 if khz else mhz * 1e6 if mhz else None


def _set(tree: Tree, file: Path, value: str, undo: ExitStack) -> None:
    before = tree.text(file)
    if before == value:
        return
    try:
        if before is None:
            raise OSError(errno.ENODATA, "what is there now cannot be read")
        undo.callback(_put_back, tree, file, before)
        file.write_text(value, encoding="ascii")
    except OSError as error:
        rights = error.errno in (errno.EACCES, errno.EPERM)
        raise MissingError(
            f"the clocks of this processor cannot be pinned: {tree.shown(file)}: {error.strerror}",
            hint="run as root (sudo), or " + _UNPINNED if rights else _UNPINNED,
        ) from error


def _put_back(tree: Tree, file: Path, value: str) -> None:
    """Nothing is written to a file that still says this: what could not be changed cannot be put back either."""
    if tree.text(file) == value:
        return
    try:
        file.write_text(value, encoding="ascii")
    except OSError as error:
        raise EnvironmentFailed(
            f"{tree.shown(file)} cannot be put back to {value} ({error.strerror})",
            hint=f"echo {value} | sudo tee {tree.shown(file)}",
        ) from error
