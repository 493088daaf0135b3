"""`profile --host`: the bundle goes to the device, is profiled there, and the profile comes back."""

from __future__ import annotations

import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import msgspec

from hydradeploy import measurements
from hydradeploy.bundle import Bundle, FileRecord, open_bundle
from hydradeploy.errors import (
    EXIT_CODES,
    EnvironmentFailed,
    ExitCode,
    HydraError,
    IntegrityError,
    MissingError,
    environment,
)
from hydradeploy.files import inside, try_writing, write_atomically
from hydradeploy.measurements import Cell, Profile, Stored, add_profile, read_profiles
from hydradeploy.remote.channel import (
    Alive,
    Bring,
    Channel,
    Done,
    Drop,
    Ended,
    Failed,
    Hangup,
    Hello,
    Here,
    Keep,
    Line,
    Message,
    Missing,
    Put,
    Run,
    Stop,
    Take,
    Want,
)
from hydradeploy.remote.contents import begins_with, chunks, contents, place_of
from hydradeploy.remote.program import START, Wheel, bootstrap, find
from hydradeploy.remote.ssh import Connection, Session, connected
from hydradeploy.remote.there import hello
from hydradeploy.spec import Record, decode
from hydradeploy.units import show_bytes

UNFINISHED = "unfinished"
_ALIVE_EVERY_S = 5.0
_AGAIN = "run it again; what has arrived there is kept"
_RESUME = "what was measured is kept there; go on with --resume"
_COMES = "what was measured is kept there and comes back with the next run"

_Kind = TypeVar("_Kind", bound=Record)
Say = Callable[[str], None]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Remote:
    """A device: `host` is `user@host`, `ssh://user@host:port` or a name of ~/.ssh/config, `ssh` the command to reach it
    with, `program` the `hydradeploy` there, `bootstrap` what to install there first."""

    host: str
    ssh: str | None = None
    program: str | None = None
    bootstrap: Wheel | None = None


@dataclass(frozen=True)
class Copied:
    """What went to the device."""

    files: int
    size_bytes: int


@dataclass(frozen=True)
class Brought:
    """The profile's file here, the cells measured this time, why some were not, a line each, and what was copied."""

    stored: Stored
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]
    copied: Copied


class _Answer(msgspec.Struct, frozen=True):
    """What `hydradeploy profile --json` says."""

    profile: str
    cells: tuple[Cell, ...]
    left_out: tuple[str, ...]


class RemoteError(HydraError):
    """An error of the device's own, with its exit code."""

    def __init__(self, message: str, code: int, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = ExitCode(code) if code in EXIT_CODES else ExitCode.BUG


def profile(
    remote: Remote,
    bundle: Path,
    profiles: Path,
    arguments: Sequence[str] = (),
    *,
    resume: bool = False,
    report: Report = lambda what, done, total: None,
    say: Say = lambda text: None,
) -> Brought:
    """Copy to the device what it lacks of the bundle, run `hydradeploy profile` with the arguments there, and add what
    it measured to the profiles here.

    What the profile there says goes to `say`. Ctrl-C here is Ctrl-C there; the journal of a run that ends early comes
    back too, and `resume` goes on with the one there, else with that one.

    Raises what `profile` raises there, with its message, hint and exit code; UsageError (no bundle, no such host name,
    another run works with the bundle there), MissingError (no ssh here, no `hydradeploy` of this version there),
    IntegrityError (damaged bundle or profile), EnvironmentFailed (connection, host key, disk here or there).
    """
    opened = open_bundle(bundle)
    read_profiles(profiles)  # a damaged one would keep what is measured from being merged
    with environment(f"writing into {profiles}"):
        profiles.mkdir(parents=True, exist_ok=True)
        try_writing(profiles)
    with _conversation(remote, say) as there:
        copied, known = there.copy(opened, report)
        unfinished = profiles / UNFINISHED / f"{_slug(remote.host)}-{place_of(bundle)}"
        if resume and not known:
            there.give(unfinished)
        code, out = there.run((*arguments, *(["--resume"] if resume else [])))
        brought = there.bring(profiles, unfinished)
        if code != 0:
            there.drop()
            raise there.error(code)
        answer = _decoded(out, _Answer, remote.host)
        name = Path(answer.profile).name
        if name not in brought:
            raise IntegrityError(f"{remote.host}: {answer.profile} did not come back", hint="run it again")
        stored = add_profile(profiles, msgspec.structs.replace(brought[name], cells=answer.cells))
        there.drop()
    shutil.rmtree(unfinished, ignore_errors=True)
    with suppress(OSError):  # those of others
        unfinished.parent.rmdir()
    return Brought(stored, answer.cells, answer.left_out, copied)


def plan(
    remote: Remote,
    bundle: Path,
    arguments: Sequence[str] = (),
    *,
    report: Report = lambda what, done, total: None,
    say: Say = lambda text: None,
) -> bytes:
    """The JSON document of `hydradeploy profile --dry-run` there; raises what `profile` raises."""
    opened = open_bundle(bundle)
    with _conversation(remote, say) as there:
        there.copy(opened, report)
        code, out = there.run((*arguments, "--dry-run"))
        if code != 0:
            raise there.error(code)
    return out


@contextmanager
def _conversation(remote: Remote, say: Say) -> Iterator[_Conversation]:
    """With the device's end of it, which is of this version."""
    with connected(remote.host, remote.ssh) as connection:
        program = find(connection, remote.program) if remote.bootstrap is None else None
        if remote.bootstrap is not None:
            program = bootstrap(connection, remote.bootstrap, say)
        assert program is not None
        session = connection.start(START, program)
        try:
            there = _Conversation(connection, session, program, say)
            with there.kept_alive():
                yield there
        except Hangup as hangup:
            raise there.hung_up() from hangup
        finally:
            session.close()


class _Conversation:
    """Over one session."""

    def __init__(self, connection: Connection, session: Session, program: str, say: Say) -> None:
        assert session.process.stdin is not None
        assert session.process.stdout is not None
        self._connection, self._session, self._program, self._say = connection, session, program, say
        self._channel = Channel(session.process.stdout.fileno(), session.process.stdin.fileno())
        self._hint = _AGAIN
        self._error: list[str] = []
        self._interrupted = False

    def hung_up(self) -> HydraError:
        """Why the other end is gone."""
        process = self._session.process
        self._session.close()
        host, said = self._connection.host, self._session.last_words()
        if process.returncode == 255:
            return self._connection.lost(self._hint)
        if process.returncode == 0:
            return EnvironmentFailed(f"{host}: has not heard of us for too long and gave up", hint=self._hint)
        if "No such command" in said:
            return MissingError(
                f"{host}: {self._program} is too old to be used from here",
                hint="install the one that is here there too",
            )
        for line in said.splitlines():
            self._say(line)
        return RemoteError(
            f"{host}: {self._program} ended with exit {process.returncode}", ExitCode.BUG, hint=self._hint
        )

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Greet, and say so often that somebody is here that the other end never takes us for gone."""
        self._greet()
        over = threading.Event()

        def tell() -> None:
            with suppress(Hangup):
                while not over.wait(_ALIVE_EVERY_S):
                    self._channel.send(Alive())

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join(timeout=1.0)  # before the pipe is closed that it writes to

    def _greet(self) -> None:
        theirs, ours = _formats(self._channel.greeted()), _formats(hello())
        if theirs != ours:
            raise MissingError(
                f"{self._connection.host}: {self._program} reads and writes other formats "
                f"(there {theirs}, here {ours})",
                hint="install the one that is here there too, or let --bootstrap WHEEL do it",
            )

    def copy(self, bundle: Bundle, report: Report) -> tuple[Copied, tuple[str, ...]]:
        """Send what the device lacks; what went, and the journals there."""
        files = contents(bundle)
        self._send(Want(place=place_of(bundle.path), files=files))
        missing = self._check(self._heard(), Missing)
        total = sum(record.size_bytes for record in _by_hash(files, missing).values())
        done = sent = 0
        for name, record in _by_hash(files, missing).items():
            path, part = inside(bundle.path, name), missing.contents[record.sha256]
            begun = 0 < part.size_bytes <= record.size_bytes and begins_with(path, part.size_bytes, part.sha256)
            offset = part.size_bytes if begun else 0
            done += offset
            put = Put(sha256=record.sha256, offset=offset, size_bytes=record.size_bytes - offset)

            def told(pieces: Iterator[bytes]) -> Iterator[bytes]:
                nonlocal done, sent
                for piece in pieces:
                    report("copying, KiB", done >> 10, total >> 10)
                    yield piece
                    done, sent = done + len(piece), sent + len(piece)

            self._send(put, told(chunks(path, offset, put.size_bytes)))
        self._send(Take())
        self._check(self._heard(), Done)
        copied = Copied(len(missing.contents), sent)
        if copied.files:
            what = f"copied {copied.files} of {len(files)} files, {show_bytes(sent)}"
        else:
            what = f"nothing to copy, all {len(files)} files are there"
        self._say(f"{self._connection.host}: {what}")
        return copied, missing.journals

    def give(self, unfinished: Path) -> None:
        """Send journals that came back earlier."""
        for path in sorted(unfinished.glob("*.jsonl")):
            with environment(f"reading {path}"):
                data = path.read_bytes()
            self._send(Keep(name=path.name, size_bytes=len(data)), [data])

    def run(self, arguments: Sequence[str]) -> tuple[int, bytes]:
        """Profile; the exit code and what it answered. On Ctrl-C it is told so, and ends by itself."""
        self._hint = _RESUME
        self._send(Run(arguments=tuple(arguments)))
        with _first_interrupt(lambda: self._channel.send(Stop())) as interrupted:
            code, out = self._ended()
        self._hint = _COMES if code == 0 else _RESUME
        self._interrupted = bool(interrupted) and code != 0
        return code, out

    def bring(self, profiles: Path, unfinished: Path) -> dict[str, Profile]:
        """Fetch what is there: journals, and profiles by their names, of which cells that are newer than ours are
        added to ours."""
        self._send(Bring())
        found: dict[str, Profile] = {}
        while isinstance(here := self._heard(), Here):
            data = b"".join(self._channel.payload(here.size_bytes))
            if here.name.endswith(".jsonl"):
                with environment(f"writing into {unfinished}"):
                    unfinished.mkdir(parents=True, exist_ok=True)
                    write_atomically(inside(unfinished, here.name), data)
            else:
                where = f"{self._connection.host}: {here.name}"
                found[here.name] = decode(data, Profile, where, measurements.SCHEMA)
                _add_newer(profiles, found[here.name])
        self._check(here, Done)
        return found

    def drop(self) -> None:
        """Have profiles removed there that are kept here now; where the other end is gone they come once more."""
        with suppress(Hangup):
            self._send(Drop())
            self._check(self._heard(), Done)

    def error(self, code: int) -> BaseException:
        """What the profile there ended with: its error, or our Ctrl-C."""
        if self._interrupted:
            return KeyboardInterrupt()
        text = "\n".join(self._error)
        match = re.fullmatch(r"error: (?P<message>.*?)(?:\nhint: (?P<hint>.*))?", text, re.DOTALL)
        if match is not None:
            return RemoteError(match["message"], code, hint=match["hint"])
        how = "was interrupted there" if code == ExitCode.INTERRUPTED else f"ended with exit {code} there"
        return RemoteError(f"{self._connection.host}: the profile {how}", code)

    def _ended(self) -> tuple[int, bytes]:
        while isinstance(heard := self._heard(), Line):
            # The last words are an error's, which is raised here.
            if self._error or heard.text.startswith("error: "):
                self._error.append(heard.text)
            elif heard.text != "interrupted":
                self._say(heard.text)
        ended = self._check(heard, Ended)
        return ended.code, b"".join(self._channel.payload(ended.size_bytes))

    def _send(self, message: Message, pieces: Iterable[bytes] = ()) -> None:
        """Send; where the other end is gone, it may have said why."""
        try:
            self._channel.send(message, pieces)
        except Hangup:
            self._heard()
            raise

    def _heard(self) -> Message:
        heard = self._channel.receive()
        if isinstance(heard, Failed):
            raise RemoteError(f"{self._connection.host}: {heard.message}", heard.code, hint=heard.hint)
        return heard

    def _check(self, heard: Message, kind: type[_Kind]) -> _Kind:
        if not isinstance(heard, kind):
            raise IntegrityError(f"{self._connection.host}: said {type(heard).__name__} out of turn")
        return heard


@contextmanager
def _first_interrupt(tell: Callable[[], None]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM, where they would raise here, tell, once, instead; the next one raises. The list is empty
    until then."""
    told: list[int] = []
    answers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell has Ctrl-C ignored in the background, and that stays so.
    raising = {number: answer for number, answer in answers.items() if callable(answer)}

    def put_back() -> None:
        for number, answer in raising.items():
            signal.signal(number, answer)

    def first(number: int, frame: FrameType | None) -> None:
        put_back()
        told.append(number)
        with suppress(Hangup):
            tell()

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    for number in raising:
        signal.signal(number, first)
    try:
        yield told
    finally:
        put_back()


def _by_hash(files: Mapping[str, FileRecord], missing: Missing) -> dict[str, FileRecord]:
    """Of each content that is missing, one file that has it."""
    names = {record.sha256: name for name, record in files.items()}
    return {names[sha256]: files[names[sha256]] for sha256 in missing.contents}


def _add_newer(profiles: Path, there: Profile) -> None:
    """Add the cells that are newer than those here: what an earlier run measured that did not get to tell."""
    ours: dict[object, str] = {}
    for stored in read_profiles(profiles):
        mine = stored.profile
        if not mine.device.differences(there.device) and not mine.conditions.differences(there.conditions):
            ours |= {cell.key: cell.measured_at for cell in mine.cells}
    newer = tuple(cell for cell in there.cells if cell.measured_at > ours.get(cell.key, ""))
    if newer:
        add_profile(profiles, msgspec.structs.replace(there, cells=newer))


def _slug(host: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", host.removeprefix("ssh://")).strip("-.")


def _formats(said: Hello) -> str:
    return ", ".join(f"{name} {number}" for name, number in [("protocol", said.protocol), *said.schemas.items()])


def _decoded(out: bytes, kind: type[_Answer], host: str) -> _Answer:
    try:
        return msgspec.json.decode(out, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{host}: its answer cannot be read ({error})") from error
