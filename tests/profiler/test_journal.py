"""The journal of a run: what is in it after any end, and which journals are refused."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.errors import EnvironmentFailed, ForeignError, HydraError, IntegrityError, UsageError
from hydradeploy.profiler.journal import Entry, Header, Seen, journal_of, opened, read
from hydradeploy.profiler.presets import PRESETS, Target
from hydradeploy.profiler.sampling import Measured
from tests.conftest import missing
from tests.profiler.virtual import CONDITIONS, DEVICE, largest_file

CELLS = tuple(f"h{heads:02d}-fp32 {heads:064x} onnxruntime batch 1 threads 2" for heads in (2, 3, 4))
HEADER = Header(device=DEVICE, conditions=CONDITIONS, preset=PRESETS["quick"], target=Target(), cells=CELLS)
MEASURED = Measured(
    load_s=0.25, first_s=0.5, prepare_s=0.0, warmup=3, latency_s=(0.125, 0.25), memory_bytes=1 << 20, facts={}
)


def entry(number: int = 0, cell: int = 0, **changes: object) -> Entry:
    values: dict[str, object] = {"round": number, "cell": cell, "wall_s": 1.5, "measured": MEASURED}
    return Entry(**(values | changes))  # type: ignore[arg-type]


def written(path: Path, entries: Sequence[Entry], header: Header = HEADER) -> bytes:
    """A journal of a run that was cut short."""
    with opened(path, header, resume=False, force=True) as journal:
        for found in entries:
            journal.add(found)
    return path.read_bytes()


def resumed(path: Path, header: Header = HEADER) -> tuple[Entry, ...]:
    with opened(path, header, resume=True, force=False) as journal:
        return journal.entries


def opens(path: Path, *, resume: bool = False, force: bool = False) -> None:
    with opened(path, HEADER, resume=resume, force=force):
        pass


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy.jsonl"


texts = st.text(max_size=40)
seconds = st.floats(0, 1e6)
numbers = st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False), max_size=3)
answers = st.builds(
    Measured,
    load_s=seconds,
    first_s=seconds,
    prepare_s=seconds,
    warmup=st.integers(0, 1000),
    steady=st.none() | st.booleans(),
    latency_s=st.lists(st.floats(1e-9, 1e6), min_size=1, max_size=5).map(tuple),
    started_s=seconds,
    ended_s=seconds,
    unkept=st.integers(0, 1000),
    unkept_s=seconds,
    switch_s=st.lists(seconds, max_size=3).map(tuple),
    settled_from=st.none() | st.just(0),
    memory_bytes=st.none() | st.integers(0, 1 << 60),
    facts=st.dictionaries(texts, texts, max_size=2),
)
places = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), unique=True, max_size=6)


@st.composite
def entry_lists(draw: st.DrawFn) -> list[Entry]:
    shared = {"wall_s": seconds, "unwatched": st.none() | texts}
    seen = st.builds(Seen, evidence=numbers, energy_j=st.none() | seconds, unmetered=st.none() | texts)
    good = st.fixed_dictionaries(shared | {"measured": answers, "seen": st.dictionaries(texts, seen, max_size=2)})
    bad = st.fixed_dictionaries(shared | {"error": texts})
    return [Entry(round=number, cell=cell, **draw(good | bad)) for number, cell in draw(places)]


@given(entry_lists())
def test_what_is_written_is_read_by_whoever_looks_and_by_whoever_goes_on(tmp_path, entries):
    path = tmp_path / "toy.jsonl"
    written(path, entries)
    assert read(path) == (HEADER, tuple(entries))
    assert resumed(path) == tuple(entries)
    assert HEADER.total == 15


def test_a_journal_is_a_line_of_json_per_finished_round_below_one_of_the_run(path):
    first, *lines = written(path, [entry(0, 0), entry(0, 1)]).splitlines()
    assert msgspec.json.decode(first)["device"]["name"] == DEVICE.name
    assert [msgspec.json.decode(line)["cell"] for line in lines] == [0, 1]


def test_each_entry_is_there_as_soon_as_it_is_added(path):
    with opened(path, HEADER, resume=False, force=False) as journal:
        assert journal.entries == ()
        for number in range(3):
            journal.add(entry(number))
            assert len(read(path)[1]) == number + 1


def test_a_journal_cut_anywhere_has_the_entries_before_the_cut_or_is_no_journal(path):
    entries = [entry(0, 0), entry(0, 1, measured=None, error="it said nothing"), entry(0, 2)]
    data = written(path, entries)
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 4
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = sum(end <= cut for end in ends)
        if whole:
            assert read(path) == (HEADER, tuple(entries[: whole - 1]))
            assert resumed(path) == tuple(entries[: whole - 1])
            assert path.read_bytes() == data[: ends[whole - 1]], "what is torn is gone before anything is added"
        else:
            with pytest.raises(IntegrityError, match=r"toy\.jsonl: not even its first line is whole"):
                read(path)
            with pytest.raises(UsageError, match=r"toy\.jsonl: nothing to resume"):
                resumed(path)


@pytest.mark.parametrize("left", [b"", b'{"schema":1,"dev', b"\0\0\0"])
def test_a_run_killed_before_its_first_line_was_whole_is_no_run(path, left):
    path.write_bytes(left)
    with opened(path, HEADER, resume=False, force=False) as journal:
        journal.add(entry())
    assert read(path) == (HEADER, (entry(),))


def test_what_is_added_after_a_torn_line_is_on_a_line_of_its_own(path):
    data = written(path, [entry(0, 0), entry(0, 1)])
    path.write_bytes(data[:-20])
    with opened(path, HEADER, resume=True, force=False) as journal:
        assert journal.entries == (entry(0, 0),)
        journal.add(entry(0, 1))
        journal.add(entry(0, 2))
    assert read(path)[1] == (entry(0, 0), entry(0, 1), entry(0, 2))


GARBAGE = [
    b"",
    b"garbage",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"\0" * 20,
    b'{"a":' * 100_000,
    b"[" * 100_000,
    b'{"round":0,"cell":1,"wall_s":1.0}',
    b'{"round":0,"cell":1,"wall_s":1.0,"error":"x","more":1}',
    b'{"round":"0","cell":1,"wall_s":1.0,"error":"x"}',
    b'{"round":0,"cell":1,"wall_s":-1.0,"error":"x"}',
    b'{"round":0,"cell":1,"wall_s":1.0,"error":"x"}{"round":0,"cell":2,"wall_s":1.0,"error":"x"}',
    b'\r{"round":0,"cell":9,"wall_s":1.0,"error":"x"}',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_a_middle_line_is_refused_with_file_and_line_and_left_as_it_is(path, garbage):
    lines = written(path, [entry(0, 0), entry(0, 1), entry(0, 2)]).splitlines(keepends=True)
    lines[2] = garbage + b"\n"
    path.write_bytes(b"".join(lines))
    for look in (read, resumed):
        with pytest.raises(IntegrityError, match=r"toy\.jsonl, line 3: ") as refused:
            look(path)
        assert "--force" in str(refused.value.hint)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_the_first_line_is_refused_with_file_and_line(path, garbage):
    lines = written(path, [entry()]).splitlines(keepends=True)
    path.write_bytes(garbage + b"\n" + lines[1])
    for look in (read, resumed):
        with pytest.raises(IntegrityError, match=r"toy\.jsonl, line 1: ") as error:
            look(path)
        assert error.value.hint == "begin anew with --force"
    with opened(path, HEADER, resume=False, force=True) as journal:
        assert journal.entries == ()
    assert read(path) == (HEADER, ())


def test_a_journal_of_another_version_is_refused_with_both(path):
    written(path, [], msgspec.structs.replace(HEADER, schema=9))
    with pytest.raises(IntegrityError, match="schema 9, this version reads 4"):
        resumed(path)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (entry(0, 0), "round 0 of cell 0 is double"),
        (entry(0, 3), "round 0 of cell 3 is none of this run"),
        (entry(5, 0), "round 5 of cell 0 is none of this run"),
        (entry(-1, 0), "round -1 of cell 0 is none of this run"),
        (entry(0, -1), "round 0 of cell -1 is none of this run"),
    ],
)
def test_entries_that_are_double_or_of_no_cell_are_refused(path, added, said):
    written(path, [entry(0, 0), added, entry(0, 2)])
    with pytest.raises(IntegrityError, match=f"line 3: {said}"):
        resumed(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"latency_s": []},
        {"latency_s": [0.0]},
        {"latency_s": [0.1, -0.1]},
        {"latency_s": [None]},
        {"load_s": -1.0},
        {"first_s": -1.0},
        {"switch_s": [-1.0]},
        {"memory_bytes": -1},
        {"settled_from": 2},
        {"settled_from": -1},
    ],
    ids=str,
)
def test_a_measurement_that_no_profile_could_hold_is_refused(path, changes):
    """So that a run of hours does not end with it."""
    lines = written(path, [entry(0, 0), entry(0, 1)]).splitlines(keepends=True)
    found = msgspec.json.decode(lines[1])
    found["measured"] |= changes
    path.write_bytes(lines[0] + msgspec.json.encode(found) + b"\n" + lines[2])
    with pytest.raises(IntegrityError, match="line 2: "):
        resumed(path)


def test_an_energy_that_no_profile_could_hold_is_refused(path):
    lines = written(path, [entry(0, 0), entry(0, 1)]).splitlines(keepends=True)
    found = msgspec.json.decode(lines[1]) | {"seen": {"saturated": {"energy_j": -1.0}}}
    path.write_bytes(lines[0] + msgspec.json.encode(found) + b"\n" + lines[2])
    with pytest.raises(IntegrityError, match=r"line 2: energy_j must be .* `\$.seen\[...\]`"):
        resumed(path)


@given(st.data())
def test_no_damage_of_any_byte_is_anything_but_a_refusal_that_names_the_file(tmp_path, data):
    """Or it does not show: a digit that is another digit."""
    path = tmp_path / "toy.jsonl"
    whole = bytearray(written(path, [entry(0, 0), entry(0, 1, measured=None, error="gone"), entry(1, 1)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    refusals = []
    try:
        resumed(path)
    except HydraError as error:
        refusals.append(error.message)
    assert all("toy.jsonl" in message for message in refusals)


def test_an_earlier_run_is_not_lost_unless_asked_for(path):
    data = written(path, [entry(0, 0)])
    with pytest.raises(UsageError, match=r"toy\.jsonl: an earlier run was cut short") as refused:
        opens(path)
    assert refused.value.hint == "go on with --resume, or begin anew with --force"
    assert path.read_bytes() == data
    with opened(path, HEADER, resume=False, force=True) as journal:
        assert journal.entries == ()
        assert read(path) == (HEADER, ())


def test_force_begins_anew_where_the_journal_is_damaged(path):
    path.write_bytes(b"garbage\n")
    written(path, [entry(0, 0)])
    assert resumed(path) == (entry(0, 0),)


def test_nothing_to_resume_is_refused_and_leaves_nothing(path):
    with pytest.raises(UsageError, match=r"toy\.jsonl: nothing to resume") as refused:
        resumed(path)
    assert refused.value.hint == "measure without --resume"
    assert not path.exists()


def test_a_journal_is_beside_its_profile():
    assert journal_of(Path("profiles/toy-board-1.5.json")) == Path("profiles/toy-board-1.5.jsonl")


@pytest.mark.parametrize(
    ("now", "kind", "named"),
    [
        ({"device": msgspec.structs.replace(DEVICE, name="Toy Board 4")}, ForeignError, "name: Toy Board 3, Toy Boar"),
        ({"device": msgspec.structs.replace(DEVICE, cores=8)}, ForeignError, "cores: 4, 8"),
        ({"conditions": msgspec.structs.replace(CONDITIONS, power_mode="15W")}, ForeignError, "power_mode: none, 15W"),
        ({"conditions": msgspec.structs.replace(CONDITIONS, clocks="pinned")}, ForeignError, "clocks: none, pinned"),
        ({"preset": PRESETS["gate"]}, UsageError, "of another run: preset differ"),
        ({"target": Target(0.99)}, UsageError, "of another run: target differ"),
        ({"cells": CELLS[:2]}, UsageError, "of another run: cells differ"),
        ({"cells": CELLS[::-1], "target": Target(0.99)}, UsageError, "of another run: target, cells differ"),
    ],
)
def test_another_run_is_refused_by_name_and_the_journal_stays(path, now, kind, named):
    data = written(path, [entry(0, 0)]) + b'{"torn'
    path.write_bytes(data)
    with pytest.raises(kind, match=named):
        resumed(path, msgspec.structs.replace(HEADER, **now))
    assert path.read_bytes() == data


def test_memory_that_the_kernel_counts_a_little_otherwise_is_the_same_device(path):
    written(path, [entry(0, 0)])
    booted = msgspec.structs.replace(DEVICE, memory_bytes=DEVICE.memory_bytes - 40960)
    assert resumed(path, msgspec.structs.replace(HEADER, device=booted)) == (entry(0, 0),)


OTHER = """
    import sys
    from pathlib import Path
    from hydradeploy.profiler.journal import opened, read

    path = Path(sys.argv[1])
    with opened(path, read(path)[0], resume=True, force=False) as journal:
        print("open", flush=True)
        sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that has the journal open."""
    written(path, [])
    command = [sys.executable, "-c", textwrap.dedent(OTHER), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_whatever_it_asks_for_until_the_first_has_ended(path):
    with another_process(path):
        data = path.read_bytes()
        for asked in ({}, {"resume": True}, {"force": True}):
            with pytest.raises(UsageError, match=r"toy\.jsonl: another process is measuring") as refused:
                opens(path, **asked)
            assert "wait for it" in str(refused.value.hint)
        assert path.read_bytes() == data
    assert resumed(path) == ()


def test_a_journal_removed_by_its_run_while_another_waits_at_it_is_not_written_to(path, monkeypatch):
    """Its run ends between the moment at which the other opens the file and the one at which it locks it."""
    written(path, [entry()])
    truly = os.open

    def late(name: object, flags: int, *mode: int) -> int:
        descriptor = truly(name, flags, *mode)  # type: ignore[arg-type]
        if Path(os.fsdecode(name)) == path and not late.done:  # type: ignore[call-overload,attr-defined]
            late.done = True  # type: ignore[attr-defined]
            path.unlink()
        return descriptor

    late.done = False  # type: ignore[attr-defined]
    monkeypatch.setattr(os, "open", late)
    with opened(path, HEADER, resume=False, force=False) as journal:
        journal.add(entry(0, 2))
    assert read(path)[1] == (entry(0, 2),)
    late.done = False  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="nothing to resume"):
        resumed(path)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_an_entry_that_finds_no_room_leaves_the_journal_as_it_was_and_later_ones_fit_again(path, room):
    with opened(path, HEADER, resume=False, force=False) as journal:
        journal.add(entry(0, 0))
        data = path.read_bytes()
        with largest_file(len(data) + room):
            for _ in range(2):
                with pytest.raises(EnvironmentFailed, match=r"file too large while writing .*toy\.jsonl"):
                    journal.add(entry(0, 1))
                assert path.read_bytes() == data
        journal.add(entry(0, 2))
    assert read(path)[1] == (entry(0, 0), entry(0, 2))


def test_a_first_line_that_finds_no_room_leaves_no_journal(path):
    with largest_file(100), pytest.raises(EnvironmentFailed, match="file too large"):
        written(path, [])
    assert not path.exists()


DISK = """
    import sys
    from pathlib import Path
    from hydradeploy.errors import HydraError
    from hydradeploy.profiler.journal import Entry, opened, read

    header, path = read(Path(sys.argv[1]))[0], Path(sys.argv[2])
    before = path.read_bytes() if path.exists() else b""
    try:
        with opened(path, header, resume=path.exists(), force=False) as journal:
            for number in range(header.preset.rounds):
                for cell in range(len(header.cells)):
                    before = path.read_bytes()
                    journal.add(Entry(round=number, cell=cell, wall_s=1.0, error="x" * 3000))
    except HydraError as error:
        print(error.exit_code.value, error.message, "|", error.hint)
    print(path.read_bytes() == before, len(read(path)[1]))
"""


def test_a_full_or_read_only_disk_leaves_the_journal_as_it_was(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.py").write_text(textwrap.dedent(DISK))
    written(tmp_path / "header.jsonl", [])
    run = f"{sys.executable} {tmp_path}/run.py {tmp_path}/header.jsonl {tmp_path}/disk/toy.jsonl"
    script = f"""
        mount -t tmpfs -o size=20k tmpfs {tmp_path}/disk || exit 77
        {run}
        mount -o remount,ro {tmp_path}/disk
        {run}
    """
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, env=environment)
    if ran.returncode == 77 or "unshare failed" in ran.stderr or "Operation not permitted" in ran.stderr:
        missing("mount", f"this kernel lets us mount no small disk ({ran.stderr.strip()})")
    full, kept, read_only, kept_then = ran.stdout.splitlines()
    assert full.startswith("12 no space left on device while writing "), ran.stdout + ran.stderr
    assert "toy.jsonl | free some space" in full
    assert kept == kept_then == "True 6"
    assert read_only.startswith("12 read-only file system while opening ")


def test_a_directory_in_the_place_of_the_journal_is_an_environment_failure(path):
    path.mkdir()
    for asked in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(EnvironmentFailed, match="is a directory while opening"):
            opens(path, **asked)


def test_a_directory_that_is_not_there_is_an_environment_failure(tmp_path):
    with pytest.raises(EnvironmentFailed, match="no such file or directory while opening"):
        written(tmp_path / "gone" / "toy.jsonl", [])


def test_removing_a_journal_that_somebody_removed_is_no_error(path):
    with opened(path, HEADER, resume=False, force=False) as journal:
        path.unlink()
        journal.remove()
        journal.remove()
    assert not path.exists()
