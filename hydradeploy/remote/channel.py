"""What the two ends say to each other: a message is a line of JSON, and some are followed by so many bytes."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterable, Iterator

import msgspec

from hydradeploy.bundle import FileRecord
from hydradeploy.errors import IntegrityError
from hydradeploy.files import CHUNK
from hydradeploy.spec import Record

PROTOCOL = 1
# Precedes the first line; before it a login shell may have printed anything.
GREETING = b"hydradeploy-there "


class Hello(Record, frozen=True, kw_only=True, tag="hello"):
    """The device's first word. `schemas` are the versions of the formats that it reads and writes."""

    protocol: int
    version: str
    schemas: dict[str, int]


class Want(Record, frozen=True, kw_only=True, tag="want"):
    """The bundle that is to be in `place`, by the names of its files."""

    place: str
    files: dict[str, FileRecord]


class Part(Record, frozen=True, kw_only=True):
    """The beginning of a file that did not arrive whole."""

    size_bytes: int
    sha256: str


class Missing(Record, frozen=True, kw_only=True, tag="missing"):
    """The SHA-256 of what is to be sent, with what is there of it; `journals` are of runs that were cut short."""

    contents: dict[str, Part]
    journals: tuple[str, ...]


class Put(Record, frozen=True, kw_only=True, tag="put"):
    """What is missing of a content from `offset` on; its bytes follow."""

    sha256: str
    offset: int
    size_bytes: int


class Take(Record, frozen=True, kw_only=True, tag="take"):
    """Nothing is missing now."""


class Keep(Record, frozen=True, kw_only=True, tag="keep"):
    """A journal to go on with; its bytes follow."""

    name: str
    size_bytes: int


class Run(Record, frozen=True, kw_only=True, tag="run"):
    """Profile what is in the place."""

    arguments: tuple[str, ...]


class Alive(Record, frozen=True, kw_only=True, tag="alive"):
    """Says nothing, often: who is silent is gone."""


class Stop(Record, frozen=True, kw_only=True, tag="stop"):
    """As Ctrl-C."""


class Done(Record, frozen=True, kw_only=True, tag="done"):
    """What was asked last is done."""


class Line(Record, frozen=True, kw_only=True, tag="line"):
    """A line that the profile wrote to stderr."""

    text: str


class Ended(Record, frozen=True, kw_only=True, tag="ended"):
    """The profile ended; what it wrote to stdout follows."""

    code: int
    size_bytes: int


class Bring(Record, frozen=True, kw_only=True, tag="bring"):
    """Send profiles and journals."""


class Here(Record, frozen=True, kw_only=True, tag="here"):
    """A profile or a journal; its bytes follow."""

    name: str
    size_bytes: int


class Drop(Record, frozen=True, kw_only=True, tag="drop"):
    """The profiles that came are kept here, and need not come again."""


class Failed(Record, frozen=True, kw_only=True, tag="failed"):
    """The last word: an error with its exit code."""

    code: int
    message: str
    hint: str | None


Message = (
    Hello | Want | Missing | Put | Take | Keep | Run | Alive | Stop | Done | Line | Ended | Bring | Here | Drop | Failed
)
_DECODER: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


class Hangup(Exception):
    """The other end is gone."""


class Channel:
    """Both directions, over two file descriptors. Any thread may send, one receives.

    An end that hears nothing for `silence_s` takes the other for gone; None is patience without end.
    """

    def __init__(self, source: int, sink: int, silence_s: float | None = None) -> None:
        self.source = source
        self._sink = sink
        self._silence_s = silence_s
        self._heard = bytearray()
        self._sending = threading.Lock()
        self._cut_short = False

    def send(self, message: Message, chunks: Iterable[bytes] = ()) -> None:
        """Send a message and the bytes that follow it; raises Hangup, also after one that was not sent whole."""
        with self._sending:
            if self._cut_short:
                raise Hangup
            self._cut_short = True
            self._write(msgspec.json.encode(message) + b"\n")
            for chunk in chunks:
                self._write(chunk)
            self._cut_short = False

    def greet(self, message: Hello) -> None:
        self._write(b"\n" + GREETING + msgspec.json.encode(message) + b"\n")

    def greeted(self) -> Hello:
        """The other end's first word; raises Hangup where it ends without."""
        while not (line := self._line()).startswith(GREETING):
            pass
        found = _decoded(line[len(GREETING) :])
        assert isinstance(found, Hello)
        return found

    def receive(self) -> Message:
        """The next message, of those that say something; raises Hangup."""
        while isinstance(found := _decoded(self._line()), Alive):
            pass
        return found

    def waiting(self) -> Iterator[Message]:
        """Read what is there, without waiting for more than there is; the messages that it completes."""
        self._read()
        while b"\n" in self._heard:
            yield _decoded(self._line())

    def payload(self, size_bytes: int) -> Iterator[bytes]:
        """The bytes that follow a message."""
        while size_bytes:
            if not self._heard:
                self._read()
            chunk = bytes(self._heard[:size_bytes])
            del self._heard[: len(chunk)]
            size_bytes -= len(chunk)
            yield chunk

    def _line(self) -> bytes:
        while (end := self._heard.find(b"\n")) < 0:
            self._read()
        line = bytes(self._heard[:end])
        del self._heard[: end + 1]
        return line

    def _read(self) -> None:
        if self._silence_s is not None and not select.select([self.source], [], [], self._silence_s)[0]:
            raise Hangup
        try:
            data = os.read(self.source, CHUNK)
        except OSError as error:
            raise Hangup from error
        if not data:
            raise Hangup
        self._heard += data

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._sink, view) :]
        except OSError as error:
            raise Hangup from error


def _decoded(line: bytes) -> Message:
    try:
        return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"what the other end says cannot be read ({error})") from error
