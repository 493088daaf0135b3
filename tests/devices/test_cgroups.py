"""Quotas of control groups and how often they struck: version 1, version 2, both at once, a namespace of their own."""

from __future__ import annotations

import pytest

from hydradeploy.devices.cgroups import cpu_groups, memory_left_bytes, quota_cores, throttled
from hydradeploy.devices.reading import Tree
from tests.devices.trees import below, tree

TOP = "sys/fs/cgroup"


def own(*lines: str) -> dict[str, str]:
    return {"proc/self/cgroup": "".join(f"{line}\n" for line in lines)}


def limit(directory: str, quota: int, period: int = 100000) -> dict[str, str]:
    return below(directory, {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": period})


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        # Version 1, mounted under either name, and linked.
        (own("4:cpu,cpuacct:/a") | limit(f"{TOP}/cpu,cpuacct/a", 300000), 3.0),
        (own("4:cpuacct,cpu:/a") | limit(f"{TOP}/cpu,cpuacct/a", 300000), 3.0),
        (own("4:cpuacct,cpu:/a") | limit(f"{TOP}/cpuacct,cpu/a", 300000), 3.0),
        (own("4:cpu:/a") | limit(f"{TOP}/cpu/a", 300000), 3.0),
        # Both versions at once: version 2 is below `unified` and has no processor to grant.
        (own("4:cpu:/a", "0::/b") | limit(f"{TOP}/cpu/a", 300000) | {f"{TOP}/unified/b/cgroup.procs": ""}, 3.0),
        (own("4:memory:/a", "0::/b") | {f"{TOP}/unified/b/cpu.max": "50000 100000\n"}, 0.5),
        (own("0::/b") | {f"{TOP}/unified/b/cpu.max": "50000 100000\n", f"{TOP}/b/cpu.max": "1 100000\n"}, 0.5),
        # A container sees the path its host gave it, and has its limit at the root.
        (own("0::/docker/123") | {f"{TOP}/cpu.max": "200000 100000\n"}, 2.0),
        (own("4:cpu,cpuacct:/docker/123") | limit(f"{TOP}/cpu,cpuacct", 200000), 2.0),
        (own("0::/../other") | {f"{TOP}/cpu.max": "200000 100000\n", f"{TOP}/other/cpu.max": "1 100000\n"}, 2.0),
        # What is no line of such a file.
        (own("", "4", "4:cpu", "::", "x::/", "cpu:/", "0::/a") | {f"{TOP}/a/cpu.max": "100000 100000\n"}, 1.0),
        (own("4:cpu") | limit(f"{TOP}/cpu", 100000), None),
        (own("0::/a\0b") | {f"{TOP}/cpu.max": "100000 100000\n"}, 1.0),
        (own("0::/" + "a" * 5000) | {f"{TOP}/cpu.max": "100000 100000\n"}, 1.0),
    ],
)
def test_the_quota_is_found_however_control_groups_are_mounted(tmp_path, files, quota):
    found = Tree(tree(tmp_path, files))
    assert quota_cores(found, cpu_groups(found)) == quota


def test_a_link_from_the_short_name_to_the_long_one_counts_once(tmp_path):
    files = own("4:cpu,cpuacct:/a") | below(f"{TOP}/cpu,cpuacct/a", {"cpu.stat": "nr_periods 9\nnr_throttled 3"})
    found = Tree(tree(tmp_path, files))
    (tmp_path / TOP / "cpu").symlink_to("cpu,cpuacct")
    assert throttled(found, cpu_groups(found)) == {"cgroup_throttled": 3.0}


@pytest.mark.parametrize(
    ("files", "events", "seconds"),
    [
        (own("0::/a/b") | below(f"{TOP}/a/b", {"cpu.stat": "nr_throttled 3\nthrottled_usec 1500000"}), 3, 1.5),
        (own("4:cpu:/a") | below(f"{TOP}/cpu/a", {"cpu.stat": "nr_throttled 3\nthrottled_time 1500000000"}), 3, 1.5),
        (
            own("0::/a/b")
            | below(f"{TOP}/a/b", {"cpu.stat": "nr_throttled 3\nthrottled_usec 1500000"})
            | below(f"{TOP}/a", {"cpu.stat": "nr_throttled 4\nthrottled_usec 250000"})
            | below(TOP, {"cpu.stat": "usage_usec 7"}),
            7,
            1.75,
        ),
        (
            own("4:cpu:/a", "0::/b")
            | below(f"{TOP}/cpu/a", {"cpu.stat": "nr_throttled 3\nthrottled_time 1000000000"})
            | below(f"{TOP}/unified/b", {"cpu.stat": "usage_usec 5\nuser_usec 4"}),
            3,
            1.0,
        ),
        (own("0::/") | below(TOP, {"cpu.stat": "nr_throttled 0\nthrottled_usec 0"}), 0, 0.0),
    ],
)
def test_throttling_by_quota_is_added_up_to_the_root(tmp_path, files, events, seconds):
    found = Tree(tree(tmp_path, files))
    assert throttled(found, cpu_groups(found)) == {"cgroup_throttled": events, "cgroup_throttled_s": seconds}


@pytest.mark.parametrize("text", [None, "", "usage_usec 5\n", "nr_throttled\n", "nr_throttled many\n"])
def test_a_group_that_does_not_count_gives_nothing(tmp_path, text):
    files = own("0::/") if text is None else own("0::/") | {f"{TOP}/cpu.stat": text}
    found = Tree(tree(tmp_path, files))
    assert throttled(found, cpu_groups(found)) == {}


def room(directory: str, most: object, used: int, cache: int | None = None) -> dict[str, str]:
    stat = {} if cache is None else {"memory.stat": f"anon 1\ninactive_file {cache}"}
    return below(directory, {"memory.max": most, "memory.current": used} | stat)


def room_1(directory: str, most: int, used: int, cache: int) -> dict[str, str]:
    stat = f"inactive_file 5\ntotal_inactive_file {cache}"
    return below(directory, {"memory.limit_in_bytes": most, "memory.usage_in_bytes": used, "memory.stat": stat})


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (own("0::/") | room(TOP, 1000, 600, 150), 550),
        (own("0::/") | room(TOP, 1000, 600), 400),
        (own("0::/") | room(TOP, 1000, 1200, 100), 0),
        (own("0::/") | room(TOP, "max", 600, 150), None),
        (own("0::/") | {f"{TOP}/memory.max": "1000\n"}, None),
        (own("0::/a/b") | room(f"{TOP}/a/b", "max", 1) | room(f"{TOP}/a", 1000, 700), 300),
        (own("0::/a/b") | room(f"{TOP}/a/b", 500, 100) | room(f"{TOP}/a", 1000, 900), 100),
        (own("0::/docker/123") | room(TOP, 1000, 600), 400),
        (own("4:memory:/a", "0::/") | room_1(f"{TOP}/memory/a", 1000, 600, 150), 550),
        (own("4:memory:/docker/123") | room_1(f"{TOP}/memory", 1000, 600, 150), 550),
        (own("4:memory:/") | room_1(f"{TOP}/memory", 9223372036854771712, 600, 0), 9223372036854771112),
        (own("4:cpu:/a", "3:memory:/b") | room_1(f"{TOP}/memory/a", 1000, 600, 0), None),
        (own(), None),
        ({}, None),
    ],
)
def test_the_memory_that_is_left_is_what_the_tightest_group_leaves(tmp_path, files, left):
    """What it can give up at once, pages of files that nobody has used lately, is no use of it."""
    assert memory_left_bytes(Tree(tree(tmp_path, files))) == left
