"""Profiles on disk: what is written is read, what is damaged is refused, what was not measured again is kept."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydradeploy.errors import IntegrityError, UsageError
from hydradeploy.measurements import (
    Cell,
    Conditions,
    Device,
    Profile,
    add_profile,
    read_profile,
    read_profiles,
    show_settings,
)

DEVICE = Device(
    kind="cpu",
    name="Toy Board 3",
    architecture="aarch64",
    instruction_set="aarch64-asimd",
    cores=4,
    memory_bytes=4 << 30,
)
CONDITIONS = Conditions(
    power_mode=None,
    governor="schedutil",
    affinity="0-3",
    quota_cores=None,
    clocks=None,
    os="Linux 6.1",
    software={"onnxruntime": "1.30.0"},
)


def cell(**changes: object) -> Cell:
    values: dict[str, object] = {
        "artifact": "h03-fp32",
        "graph_sha256": "0" * 64,
        "backend": "onnxruntime",
        "processor": "cpu",
        "compute_type": "fp32",
        "input": "float32",
        "batch": 1,
        "threads": 2,
        "regime": "saturated",
        "measured_at": "2026-01-02T03:04:05+00:00",
        "latency_s": (0.02, 0.01, 0.03),
        "process": (0, 0, 1),
        "load_s": (0.5, 0.25),
        "first_s": (0.125, 0.0625),
        "memory_bytes": 1 << 20,
        "evidence": {"load_average": (0.5, 0.75)},
    }
    return Cell(**(values | changes))  # type: ignore[arg-type]


def profile(*cells: Cell, device: Device = DEVICE, conditions: Conditions = CONDITIONS) -> Profile:
    return Profile(device=device, conditions=conditions, cells=cells or (cell(),))


def other(**changes: object) -> Conditions:
    return msgspec.structs.replace(CONDITIONS, **changes)


text = st.text(max_size=20)
positive = st.floats(min_value=5e-324, max_value=1e308)
finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def cells(draw) -> Cell:
    latency_s = tuple(draw(st.lists(positive, max_size=20)))
    size = len(latency_s)
    names = ("artifact", "graph_sha256", "backend", "processor", "compute_type", "input", "regime", "measured_at")
    return Cell(
        **{name: draw(text) for name in names},
        settings=draw(st.dictionaries(text, text, max_size=2)),
        batch=draw(st.integers(1, 1 << 40)),
        threads=draw(st.integers(1, 1 << 40)),
        latency_s=latency_s,
        process=tuple(draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))),
        load_s=tuple(draw(st.lists(positive, max_size=5))),
        first_s=tuple(draw(st.lists(positive, max_size=5))),
        memory_bytes=draw(st.none() | st.integers(0, 1 << 50)),
        switch_s=tuple(draw(st.lists(positive, max_size=5))),
        energy_j=draw(st.none() | positive),
        meter=draw(st.none() | text),
        flags=tuple(draw(st.lists(text, max_size=3))),
        remarks=tuple(draw(st.lists(text, max_size=3))),
        missing=draw(st.dictionaries(text, text, max_size=3)),
        evidence=draw(st.dictionaries(text, st.lists(finite, max_size=3).map(tuple), max_size=3)),
        error=draw(text if not latency_s else st.none() | text),
    )


@given(st.lists(cells(), max_size=4, unique_by=lambda found: found.key))
@settings(max_examples=60)
def test_what_is_written_is_what_is_read_to_the_last_bit(tmp_path_factory, found):
    directory = tmp_path_factory.mktemp("profiles")
    made = Profile(device=DEVICE, conditions=CONDITIONS, cells=tuple(found))
    stored = add_profile(directory, made)
    assert stored.profile == made
    assert read_profile(stored.path) == stored
    assert read_profiles(directory) == (stored,)
    assert os.listdir(directory) == [stored.path.name]


def test_settings_are_the_same_in_whatever_order_they_are_given():
    settings = {"hint": "throughput", "arena": "off"}
    assert cell(settings=settings).key == cell(settings=dict(reversed(settings.items()))).key
    assert show_settings(settings) == "arena=off, hint=throughput"
    assert show_settings({}) == ""


def test_a_directory_that_is_not_there_is_made(tmp_path):
    stored = add_profile(tmp_path / "a" / "b", profile())
    assert stored.path.parent == tmp_path / "a" / "b"
    assert read_profile(stored.path).profile == profile()


KEY = (
    *("artifact", "graph_sha256", "backend", "processor", "compute_type", "settings", "input"),
    *("batch", "threads", "regime"),
)


@pytest.mark.parametrize("field", [f.name for f in msgspec.structs.fields(Cell)])
def test_a_cell_is_the_same_measurement_where_nothing_of_its_key_differs(tmp_path, field):
    first = cell()
    values = {"batch": 7, "threads": 7, "latency_s": (1.0, 2.0, 3.0), "process": (5, 6, 7), "load_s": (), "first_s": ()}
    values |= {"memory_bytes": None, "energy_j": 1.0, "flags": ("noisy",), "evidence": {}, "switch_s": (0.5,)}
    values |= {"remarks": ("noisy: by 30%",), "missing": {"energy": "no meter"}, "settings": {"hint": "throughput"}}
    second = cell(**{field: values.get(field, "another")})
    assert (first.key == second.key) == (field not in KEY)
    add_profile(tmp_path, profile(first))
    found = add_profile(tmp_path, profile(second)).profile.cells
    if field == "error":
        second = first  # a failure is no measurement of the same
    assert found == ((first, second) if field in KEY else (second,))


@given(st.lists(st.integers(0, 9), max_size=8, unique=True), st.lists(st.integers(0, 9), max_size=8, unique=True))
@settings(max_examples=40)
def test_cells_replace_those_of_the_same_key_and_no_others(tmp_path_factory, first, second):
    directory = tmp_path_factory.mktemp("profiles")
    old = [cell(threads=n + 1, latency_s=(1.0,), process=(0,)) for n in first]
    new = [cell(threads=n + 1, latency_s=(2.0,), process=(0,)) for n in second]
    made = [Profile(device=DEVICE, conditions=CONDITIONS, cells=tuple(found)) for found in (old, new)]
    path = add_profile(directory, made[0]).path
    stored = add_profile(directory, made[1])
    assert stored.path == path
    assert stored == read_profile(path)
    assert {c.threads - 1: c.latency_s[0] for c in stored.profile.cells} == dict.fromkeys(first, 1.0) | dict.fromkeys(
        second, 2.0
    )
    assert len(stored.profile.cells) == len({*first, *second})


def test_a_failed_measurement_replaces_a_failed_one_and_never_a_measured_one(tmp_path):
    failed = cell(latency_s=(), process=(), load_s=(), first_s=(), memory_bytes=None, error="it said nothing")
    again = msgspec.structs.replace(failed, error="it said nothing again")
    (tmp_path / "failed").mkdir()
    add_profile(tmp_path / "failed", profile(failed))
    assert add_profile(tmp_path / "failed", profile(again)).profile.cells == (again,)
    measured = add_profile(tmp_path, profile(cell())).profile.cells
    assert add_profile(tmp_path, profile(failed)).profile.cells == measured


@pytest.mark.parametrize(
    ("device", "conditions", "name"),
    [
        ({}, {}, "toy-board-3-4c-schedutil-onnxruntime-1.30.0.json"),
        ({}, {"power_mode": "MAXN SUPER"}, "toy-board-3-4c-maxn-super-onnxruntime-1.30.0.json"),
        ({}, {"governor": None}, "toy-board-3-4c-default-onnxruntime-1.30.0.json"),
        ({}, {"governor": "performance+powersave"}, "toy-board-3-4c-performance+powersave-onnxruntime-1.30.0.json"),
        ({}, {"software": {}}, "toy-board-3-4c-schedutil.json"),
        ({}, {"software": {"b": "2+cu12", "a": "1"}}, "toy-board-3-4c-schedutil-a-1-b-2+cu12.json"),
        ({"name": "AMD EPYC(tm) 7B13 @ 2.45GHz"}, {}, "amd-epyc-tm-7b13-2.45ghz-4c-schedutil-onnxruntime-1.30.0.json"),
        ({"name": "../../etc/passwd"}, {}, "..-..-etc-passwd-4c-schedutil-onnxruntime-1.30.0.json"),
        ({"name": "a/b\\c\0d\ne:f*?"}, {}, "a-b-c-d-e-f-4c-schedutil-onnxruntime-1.30.0.json"),
        ({"name": "模型"}, {}, "4c-schedutil-onnxruntime-1.30.0.json"),
    ],
)
def test_a_file_is_named_by_device_mode_and_stack(tmp_path, device, conditions, name):
    made = profile(device=msgspec.structs.replace(DEVICE, **device), conditions=other(**conditions))
    directory = tmp_path / "profiles"
    assert add_profile(directory, made).path == directory / name
    assert os.listdir(tmp_path) == ["profiles"]
    assert os.listdir(directory) == [name]
    assert read_profiles(directory)[0].profile == made


@given(st.text(), st.none() | st.text(), st.dictionaries(st.text(), st.text(), max_size=3))
@settings(max_examples=60)
def test_whatever_a_device_calls_itself_its_file_is_a_plain_name_in_the_directory(
    tmp_path_factory, name, mode, software
):
    directory = tmp_path_factory.mktemp("profiles")
    made = profile(
        device=msgspec.structs.replace(DEVICE, name=name[:60]),
        conditions=other(power_mode=mode and mode[:20], software={k[:10]: v[:10] for k, v in software.items()}),
    )
    path = add_profile(directory, made).path
    assert path.parent == directory
    assert re.fullmatch(r"[a-z0-9.+-]+\.json", path.name)
    assert read_profiles(directory)[0].profile == made
    assert add_profile(directory, made).path == path


def test_profiles_of_the_same_name_under_other_conditions_are_numbered_and_found_again(tmp_path):
    made = [profile(conditions=other(affinity=affinity)) for affinity in ("0-3", "0", "1")]
    paths = [add_profile(tmp_path, one).path for one in made]
    assert [path.name.removeprefix("toy-board-3-4c-schedutil-onnxruntime-1.30.0") for path in paths] == [
        ".json",
        "-2.json",
        "-3.json",
    ]
    before = [path.read_bytes() for path in paths]
    assert [add_profile(tmp_path, one).path for one in reversed(made)] == paths[::-1]
    assert [path.read_bytes() for path in paths] == before
    paths[1].unlink()
    # What is beyond the gap is still found.
    assert add_profile(tmp_path, made[2]).path == paths[2]
    assert add_profile(tmp_path, made[1]).path == paths[1]


def test_a_damaged_file_in_the_way_is_refused_and_not_stepped_over(tmp_path):
    path = add_profile(tmp_path, profile()).path
    path.write_text("{}")
    with pytest.raises(IntegrityError, match=path.name):
        add_profile(tmp_path, profile(conditions=other(affinity="0")))
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_text() == "{}"


WRITER = """
import sys, msgspec
from pathlib import Path
from hydradeploy.measurements import Profile, add_profile
add_profile(Path(sys.argv[1]), msgspec.json.decode(sys.stdin.buffer.read(), type=Profile))
"""


def test_two_writers_at_once_both_end_up_in_the_file(tmp_path):
    made = [profile(cell(threads=number)) for number in (1, 2, 3)]
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE) for _ in made]
    for writer, one in zip(writers, made, strict=True):
        writer.stdin.write(msgspec.json.encode(one))
        writer.stdin.close()
    assert [writer.wait(30) for writer in writers] == [0, 0, 0]
    (stored,) = read_profiles(tmp_path)
    assert sorted(found.threads for found in stored.profile.cells) == [1, 2, 3]
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ()),
        ({"memory_bytes": round((4 << 30) * 0.951)}, ()),
        ({"memory_bytes": round((4 << 30) * 1.049)}, ()),
        ({"memory_bytes": round((4 << 30) * 0.949)}, (f"memory_bytes: {4 << 30}, {round((4 << 30) * 0.949)}",)),
        ({"memory_bytes": 0}, (f"memory_bytes: {4 << 30}, 0",)),
        ({"name": "Toy Board 4"}, ("name: Toy Board 3, Toy Board 4",)),
        ({"kind": "jetson"}, ("kind: cpu, jetson",)),
        ({"architecture": "x86_64"}, ("architecture: aarch64, x86_64",)),
        ({"instruction_set": "aarch64-i8mm"}, ("instruction_set: aarch64-asimd, aarch64-i8mm",)),
        ({"cores": 8, "name": "x"}, ("name: Toy Board 3, x", "cores: 4, 8")),
    ],
)
def test_what_tells_devices_apart_is_named(changes, told):
    assert DEVICE.differences(msgspec.structs.replace(DEVICE, **changes)) == told


def test_memory_is_alike_in_both_directions():
    less = msgspec.structs.replace(DEVICE, memory_bytes=round((4 << 30) * 0.951))
    assert DEVICE.differences(less) == less.differences(DEVICE) == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ()),
        ({"governor": None}, ("governor: schedutil, none",)),
        ({"power_mode": "15W"}, ("power_mode: none, 15W",)),
        ({"affinity": "0"}, ("affinity: 0-3, 0",)),
        ({"quota_cores": 1.5}, ("quota_cores: none, 1.5",)),
        ({"os": "Linux 6.2"}, ("os: Linux 6.1, Linux 6.2",)),
        ({"software": {}}, ("software: onnxruntime 1.30.0, none",)),
        ({"software": {"b": "2", "a": "1"}}, ("software: onnxruntime 1.30.0, a 1 b 2",)),
    ],
)
def test_what_tells_conditions_apart_is_named(changes, told):
    assert CONDITIONS.differences(other(**changes)) == told


def test_profiles_are_read_newest_first_by_their_newest_cell(tmp_path):
    days = {"0": ("2026-01-01", "2026-01-09"), "1": ("2026-01-05", "2026-01-04"), "2": ("2025-12-31", "2026-01-10")}
    for affinity, (first, second) in days.items():
        measured = [cell(threads=n, measured_at=f"{day}T00:00:00+00:00") for n, day in enumerate((first, second), 1)]
        add_profile(tmp_path, profile(*measured, conditions=other(affinity=affinity)))
    assert [stored.profile.conditions.affinity for stored in read_profiles(tmp_path)] == ["2", "0", "1"]


def test_where_there_is_no_directory_or_nothing_in_it_there_is_no_profile(tmp_path):
    assert read_profiles(tmp_path) == read_profiles(tmp_path / "gone") == ()
    (tmp_path / "README.md").write_text("no profile")
    assert read_profiles(tmp_path) == ()


def test_a_profile_that_is_not_there_is_a_usage_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.json: no such profile") as refused:
        read_profile(tmp_path / "gone.json")
    assert refused.value.exit_code == 2
    assert "hydradeploy profile" in str(refused.value.hint)


def test_a_directory_in_the_place_of_a_profile_is_refused(tmp_path):
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IntegrityError, match=r"x\.json: cannot be read \(Is a directory\)"):
        read_profiles(tmp_path)


def test_a_truncated_profile_is_refused_wherever_it_was_cut(tmp_path):
    path = add_profile(tmp_path, profile(cell(), cell(threads=9))).path
    whole = path.read_bytes().rstrip()
    cuts = [*range(0, len(whole), 50), len(whole) - 1]
    assert len(cuts) > 20
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(IntegrityError, match=re.escape(str(path))) as refused:
            read_profile(path)
        assert refused.value.exit_code == 10
    path.write_bytes(whole)
    assert len(read_profile(path).profile.cells) == 2


def edit(change: Callable[[dict], object]) -> bytes:
    """The JSON of a profile after a change in it."""
    document = json.loads(msgspec.json.encode(profile()))
    change(document)
    return json.dumps(document).encode()


def put(*keys: str | int, value: object) -> Callable[[dict], object]:
    def change(document: dict) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


def gone(*keys: str | int) -> Callable[[dict], object]:
    def change(document: dict) -> None:
        for key in keys[:-1]:
            document = document[key]
        del document[keys[-1]]

    return change


CELL = ("cells", 0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (put("schema", value=1), "schema 1, this version reads 3"),
        (put("schema", value=0), "schema 0, this version reads 3"),
        (put("schema", value="1"), r"\$\.schema"),
        (gone("schema"), "schema"),
        (put("colour", value="red"), "colour"),
        (put("device", "colour", value="red"), r"colour.*\$\.device"),
        (put("conditions", "colour", value="red"), r"colour.*\$\.conditions"),
        (put(*CELL, "colour", value="red"), r"colour.*\$\.cells\[0\]"),
        (gone("device"), "device"),
        (gone("cells"), "cells"),
        (gone("device", "cores"), r"cores.*\$\.device"),
        (gone(*CELL, "artifact"), r"artifact.*\$\.cells\[0\]"),
        (put("device", "cores", value="4"), r"\$\.device\.cores"),
        (put("device", "cores", value=4.5), r"\$\.device\.cores"),
        (put("device", "name", value=None), r"\$\.device\.name"),
        (put("conditions", "software", value=[]), r"\$\.conditions\.software"),
        (put("conditions", "software", value={"a": 1}), r"\$\.conditions\.software"),
        (put(*CELL, "latency_s", value="0.1"), r"\$\.cells\[0\]\.latency_s"),
        (put(*CELL, "latency_s", value=["0.1"]), r"\$\.cells\[0\]\.latency_s\[0\]"),
        (put(*CELL, "latency_s", value=[None, 1, 1]), r"\$\.cells\[0\]\.latency_s\[0\]"),
        (put(*CELL, "latency_s", value=[0.1, 0.2]), "2 samples of 3 processes"),
        (put(*CELL, "process", value=[0, 0]), "3 samples of 2 processes"),
        (put(*CELL, "process", value=[0, 0.5, 1]), r"\$\.cells\[0\]\.process\[1\]"),
        (put(*CELL, "latency_s", value=[0.1, -0.2, 0.1]), "latency_s must be positive and finite"),
        (put(*CELL, "latency_s", value=[0.1, 0, 0.1]), "latency_s must be positive and finite"),
        (put(*CELL, "latency_s", value=[0.1, math.nan, 0.1]), "cannot be read"),
        (put(*CELL, "latency_s", value=[0.1, math.inf, 0.1]), "cannot be read"),
        (lambda d: d["cells"][0].update(latency_s=[], process=[]), "neither samples nor an error"),
        (put("cells", value={}), r"\$\.cells"),
        (lambda d: d["cells"].append(None), r"\$\.cells\[1\]"),
    ],
)
def test_a_profile_that_says_what_it_cannot_is_refused_with_the_place(tmp_path, change, told):
    path = tmp_path / "x.json"
    path.write_bytes(edit(lambda document: None))
    read_profile(path)
    path.write_bytes(edit(change))
    with pytest.raises(IntegrityError, match=told) as refused:
        read_profile(path)
    assert str(path) in refused.value.message


@pytest.mark.parametrize("value", ["1e999", "-1e-999", "0.0", "-0.0", "1e-400"])
def test_a_latency_that_a_float_cannot_hold_is_refused(tmp_path, value):
    path = tmp_path / "x.json"
    path.write_text(msgspec.json.encode(profile()).decode().replace("0.02", value))
    with pytest.raises(IntegrityError, match=r"x\.json"):
        read_profile(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_cell_of_impossible_latencies_is_not_made(value, place):
    latency_s = [0.1, 0.2, 0.3]
    latency_s[place] = value
    with pytest.raises(ValueError, match="latency_s must be positive and finite"):
        cell(latency_s=tuple(latency_s))


@pytest.mark.parametrize("field", ["load_s", "first_s", "switch_s", "energy_j"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf])
def test_a_cell_with_a_time_or_an_energy_that_is_none_is_refused(field, value):
    with pytest.raises(
        ValueError, match="h03-fp32: load_s, first_s, switch_s and energy_j must be finite and not negative"
    ):
        cell(**{field: value if field == "energy_j" else (0.5, value)})
    with pytest.raises(ValueError, match="energy_j"):
        cell(latency_s=(), process=(), error="gone", **{field: value if field == "energy_j" else (value,)})


@pytest.mark.parametrize(
    "changes", [{"batch": 0}, {"batch": -1}, {"threads": 0}, {"threads": -4}, {"memory_bytes": -1}]
)
def test_a_cell_with_a_count_that_is_none_is_refused(changes):
    with pytest.raises(ValueError, match="batch and threads must be at least 1, memory_bytes not negative"):
        cell(**changes)


def test_nothing_is_a_time_an_energy_and_a_memory():
    nothing = cell(load_s=(0.0, 0.0), first_s=(0.0,), energy_j=0.0, memory_bytes=0, batch=1, threads=1)
    assert (nothing.load_s, nothing.energy_j, nothing.memory_bytes) == ((0.0, 0.0), 0.0, 0)


def test_a_cell_needs_samples_or_an_error():
    with pytest.raises(ValueError, match="h03-fp32: neither samples nor an error"):
        cell(latency_s=(), process=())
    assert cell(latency_s=(), process=(), error="gone").error == "gone"


def test_a_profile_was_measured_when_its_newest_cell_was():
    times = ["2026-01-02T00:00:00+00:00", "2026-03-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"]
    assert profile(*(cell(threads=n, measured_at=t) for n, t in enumerate(times, 1))).measured_at == times[1]
    assert Profile(device=DEVICE, conditions=CONDITIONS, cells=()).measured_at == ""


def test_a_file_is_one_json_document_that_ends_with_a_line(tmp_path):
    path = add_profile(tmp_path, profile()).path
    assert json.loads(path.read_text())["cells"][0]["latency_s"] == [0.02, 0.01, 0.03]
    assert path.read_bytes().endswith(b"}\n")
