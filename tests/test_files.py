"""Files that are whole or not there: atomic writes, staged directories, names that leave, locks."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydradeploy.errors import EnvironmentFailed, IntegrityError
from hydradeploy.files import (
    CHUNK,
    inside,
    locked,
    moved_aside,
    recover,
    sha256_bytes,
    sha256_file,
    staged,
    write_atomically,
)

NAMES = ("bundle", "bundle[1]", "with space", "b*")


def start(code, *arguments):
    """A Python process that runs `code` with `arguments`, its output piped."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )


def finish(code, *arguments):
    """Run `code` in a process of its own and return what it printed."""
    process = start(code, *arguments)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return out.strip()


def directory(path, content="old"):
    """A directory with one file that says what it is."""
    path.mkdir()
    (path / "content").write_text(content)
    return path


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_the_hash_of_a_file_is_hashlibs(tmp_path, size):
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest() == sha256_bytes(data)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_a_written_file_holds_the_last_bytes_written(tmp_path, first, last):
    path = tmp_path / "file"
    write_atomically(path, first)
    write_atomically(path, last)
    assert path.read_bytes() == last
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_into_a_directory_that_is_gone_raises_and_makes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "gone" / "file", b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("data", ["text", None, 7])
def test_a_write_of_what_is_no_bytes_keeps_the_old_file(tmp_path, data):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        write_atomically(path, data)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_over_a_directory_fails_and_leaves_no_temporary_file(tmp_path):
    directory(tmp_path / "taken")
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "taken", b"new")
    assert os.listdir(tmp_path) == ["taken"]
    assert (tmp_path / "taken" / "content").read_text() == "old"


def test_a_write_that_meets_a_limit_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    out = finish(
        """
        import resource, sys
        from pathlib import Path
        from hydradeploy.errors import HydraError, environment
        from hydradeploy.files import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            with environment("writing"):
                write_atomically(Path(sys.argv[1]), bytes(5000))
        except HydraError as error:
            print(error.exit_code.value, error.message, error.hint)
        """,
        path,
    )
    assert out.startswith("12 file too large while writing")
    assert "ulimit" in out
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664), (0, 0o666)])
def test_a_written_file_has_the_mode_of_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("name", ["a", "a/b", "./a", "a..b", "...", "..a", "weird name\n", "absent/file"])
def test_a_name_below_the_directory_is_that_path(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", "..", "../a", "a/../../b", "a/..", "/", "/etc/passwd", "a\0b", "\0"])
def test_a_name_that_leaves_the_directory_is_refused(tmp_path, name):
    with pytest.raises(IntegrityError) as refused:
        inside(tmp_path, name)
    assert str(tmp_path) in refused.value.message


@pytest.mark.parametrize("target", ["/etc/passwd", "/", "../outside", "../../outside", "../root-sibling/file"])
def test_a_symbolic_link_out_of_the_directory_is_refused(tmp_path, target):
    root = directory(tmp_path / "root")
    directory(tmp_path / "outside")
    directory(tmp_path / "root-sibling")
    (root / "link").symlink_to(target)
    with pytest.raises(IntegrityError, match="symbolic link"):
        inside(root, "link")


def test_a_file_behind_a_linked_directory_out_of_the_directory_is_refused(tmp_path):
    root, _ = directory(tmp_path / "root"), directory(tmp_path / "outside")
    (root / "sub").symlink_to("../outside")
    with pytest.raises(IntegrityError, match="symbolic link"):
        inside(root, "sub/content")


def test_a_symbolic_link_within_the_directory_is_allowed(tmp_path):
    root = directory(tmp_path / "root")
    (root / "link").symlink_to("content")
    assert inside(root, "link").read_text() == "old"


def test_a_directory_that_is_itself_a_symbolic_link_is_allowed(tmp_path):
    directory(tmp_path / "real")
    (tmp_path / "root").symlink_to("real")
    assert inside(tmp_path / "root", "content").read_text() == "old"


def test_a_symbolic_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(IntegrityError):
        inside(tmp_path, "loop")


@pytest.mark.parametrize("name", NAMES)
def test_a_staged_directory_takes_its_place_when_there_was_none(tmp_path, name):
    with staged(tmp_path / name) as stage:
        (stage / "content").write_text("new")
        assert not (tmp_path / name).exists()
    assert (tmp_path / name / "content").read_text() == "new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_a_staged_directory_replaces_the_old_one_whole(tmp_path, name):
    target = directory(tmp_path / name)
    with staged(target) as stage:
        (stage / "other").write_text("new")
        assert (target / "content").read_text() == "old"
    assert os.listdir(target) == ["other"]
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_an_error_keeps_the_old_directory_and_removes_the_stage(tmp_path, error):
    target = directory(tmp_path / "bundle")

    def write():
        with staged(target) as stage:
            (stage / "content").write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_system_error_while_staging_says_what_was_written(tmp_path):
    target = directory(tmp_path / "bundle")
    with pytest.raises(EnvironmentFailed, match=r"no space left on device while writing .*bundle"), staged(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_staging_where_there_is_no_directory_is_an_environment_failure(tmp_path):
    with pytest.raises(EnvironmentFailed, match="no such file or directory"), staged(tmp_path / "gone" / "bundle"):
        pytest.fail("the block must not be entered")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_killed_writer_left_staged_is_removed(tmp_path, name):
    process = start(
        """
        import sys, time
        from pathlib import Path
        from hydradeploy.files import staged
        with staged(Path(sys.argv[1])) as stage:
            (stage / "content").write_text("half")
            print("staged", flush=True)
            time.sleep(60)
        """,
        tmp_path / name,
    )
    assert process.stdout.readline() == "staged\n"
    process.kill()
    process.communicate()
    assert len(os.listdir(tmp_path)) == 1
    with staged(tmp_path / name) as stage:
        (stage / "content").write_text("new")
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name / "content").read_text() == "new"


def test_the_stage_of_another_target_is_left_alone(tmp_path):
    with staged(tmp_path / "one") as first:
        with staged(tmp_path / "two"):
            pass
        assert first.is_dir()
        (first / "content").write_text("new")
    assert (tmp_path / "one" / "content").read_text() == "new"


def test_a_staged_directory_has_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "bundle"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "bundle").stat().st_mode & 0o777 == 0o750


def test_a_target_that_is_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    directory(tmp_path / "elsewhere" / "real")
    (tmp_path / "bundle").symlink_to("elsewhere/real")
    with staged(tmp_path / "bundle") as stage:
        (stage / "content").write_text("new")
    assert (tmp_path / "bundle").is_symlink()
    assert (tmp_path / "elsewhere" / "real" / "content").read_text() == "new"
    assert os.listdir(tmp_path / "elsewhere") == ["real"]


def test_a_directory_moved_aside_is_put_back(tmp_path):
    directory(tmp_path / ".bundle.old")
    assert moved_aside(tmp_path / "bundle")
    recover(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "content").read_text() == "old"
    assert not moved_aside(tmp_path / "bundle")
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_directory_moved_aside_whose_successor_is_there_is_removed(tmp_path):
    directory(tmp_path / ".bundle.old")
    directory(tmp_path / "bundle", "new")
    assert not moved_aside(tmp_path / "bundle")
    recover(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_recovering_what_was_never_moved_aside_does_nothing(tmp_path):
    directory(tmp_path / "bundle")
    recover(tmp_path / "bundle")
    recover(tmp_path / "absent")
    assert (tmp_path / "bundle" / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


def test_the_next_writer_recovers_first(tmp_path):
    directory(tmp_path / ".bundle.old")
    with locked(tmp_path / "bundle", print):
        assert (tmp_path / "bundle" / "content").read_text() == "old"
    assert (tmp_path / "bundle" / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


class Library:
    """A C library whose renameat2 fails with an error number."""

    def __init__(self, code):
        self.code = code

    def renameat2(self, *_):
        ctypes.set_errno(self.code)
        return -1


@pytest.mark.parametrize(
    "library",
    [object(), Library(errno.EINVAL), Library(errno.ENOSYS), Library(errno.ENOTSUP)],
    ids=["no function", "EINVAL", "ENOSYS", "ENOTSUP"],
)
def test_without_an_exchange_in_one_step_two_renames_replace_the_directory(tmp_path, monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    target = directory(tmp_path / "bundle")
    with staged(target) as stage:
        (stage / "content").write_text("new")
    assert (target / "content").read_text() == "new"
    assert os.listdir(tmp_path) == ["bundle"]


def test_an_exchange_that_fails_for_another_reason_keeps_the_old_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library(errno.EACCES))
    target = directory(tmp_path / "bundle")
    with pytest.raises(EnvironmentFailed, match="permission denied") as failed, staged(target):
        pass
    assert failed.value.hint
    assert (target / "content").read_text() == "old"
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path, renames):
    directory(tmp_path / "bundle")
    process = start(
        """
        import ctypes, os, signal, sys
        from pathlib import Path
        from hydradeploy.files import staged
        ctypes.CDLL = lambda *_, **__: None
        rename, left = os.rename, [int(sys.argv[2])]
        def dying(*arguments):
            rename(*arguments)
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
        os.rename = dying
        with staged(Path(sys.argv[1])) as stage:
            (stage / "content").write_text("new")
        """,
        tmp_path / "bundle",
        renames,
    )
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert moved_aside(tmp_path / "bundle") == (renames == 1)
    recover(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "content").read_text() == ("old" if renames == 1 else "new")


HOLDER = """
    import sys
    from pathlib import Path
    from hydradeploy.files import locked
    with locked(Path(sys.argv[1]), lambda text: print("waiting", text, flush=True)):
        print("locked", flush=True)
        sys.stdin.readline() if sys.argv[2] == "stay" else None
    """


def holder(target, how="stay"):
    """A process that takes the lock; it lets go when its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(target), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / "bundle", lambda _: pytest.fail("nobody else has it")):
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_a_lock_makes_the_directory_it_lies_in(tmp_path):
    with locked(tmp_path / "new" / "bundle", lambda _: None):
        assert (tmp_path / "new").is_dir()


def test_an_error_in_the_block_lets_go_of_the_lock(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "bundle", lambda _: None):
        raise RuntimeError
    with locked(tmp_path / "bundle", lambda _: pytest.fail("it was not let go")):
        pass


def test_a_lock_that_cannot_be_made_is_an_environment_failure(tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(EnvironmentFailed, match="locking"), locked(tmp_path / "file" / "bundle", lambda _: None):
        pytest.fail("the block must not be entered")


def test_a_second_process_is_told_and_waits_until_the_first_lets_go(tmp_path):
    target = tmp_path / "bundle"
    with locked(target, lambda _: pytest.fail("nobody else has it")):
        second = holder(target, "leave")
        assert second.stdout.readline() == f"waiting another process is writing {target}; waiting for it\n"
        assert second.poll() is None
    out, _ = second.communicate(timeout=30)
    assert out == "locked\n"
    assert second.returncode == 0


def test_a_killed_holder_leaves_the_lock_free(tmp_path):
    first = holder(tmp_path / "bundle")
    assert first.stdout.readline() == "locked\n"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    with locked(tmp_path / "bundle", lambda _: pytest.fail("the lock outlived its process")):
        pass


def test_whoever_waits_on_a_killed_holder_gets_the_lock(tmp_path):
    target, told = tmp_path / "bundle", threading.Event()
    first = holder(target)
    assert first.stdout.readline() == "locked\n"
    got = threading.Event()

    def wait():
        with locked(target, lambda _: told.set()):
            got.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert told.wait(30)
    assert not got.is_set()
    first.kill()
    first.communicate(timeout=30)
    waiter.join(30)
    assert got.is_set()


def test_a_link_and_what_it_points_to_share_one_lock(tmp_path):
    directory(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with locked(tmp_path / "link", lambda _: None):
        second = holder(tmp_path / "real", "leave")
        assert second.stdout.readline().startswith("waiting")
    second.communicate(timeout=30)


def test_only_one_of_many_threads_holds_the_lock_at_a_time(tmp_path):
    inside_now, most, barrier = [], [], threading.Barrier(4)

    def work():
        barrier.wait()
        for _ in range(20):
            with locked(tmp_path / "bundle", lambda _: None):
                inside_now.append(1)
                most.append(len(inside_now))
                inside_now.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(most) == 1
    assert len(most) == 80
    assert os.listdir(tmp_path) == []
