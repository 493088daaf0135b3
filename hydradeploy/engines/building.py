"""Many engines, built in a process of their own.

A builder takes gigabytes of memory, keeps some of the GPU's until its process ends, and has been seen to crash it. So
the process that asks stays small and whole; it tells of progress, also where the builder says nothing for minutes.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import msgspec

from hydradeploy.bundle import Artifact, Batch, Bundle
from hydradeploy.engines import plans
from hydradeploy.engines.plans import DEFAULTS, EngineOptions, Subject
from hydradeploy.errors import ForeignError, HydraError, IntegrityError, MissingError
from hydradeploy.processes import die_with, fresh, signal_name
from hydradeploy.spec import Record
from hydradeploy.stored import image_shape

Report = Callable[[str, int, int], None]

_TICK_S = 1.0
# How often a lone build says how far it is.
_LINE_S = 10.0

_log = logging.getLogger(__name__)

# Among engines of as many heads the narrowest first: it is the one that meets a deadline.
_NARROW = ("int8", "fp16", "bf16", "tf32", "fp32")


class Wanted(Record, frozen=True, kw_only=True):
    """An artifact to build an engine of, whose graph is in `file`; a `plans.Subject`."""

    name: str
    compute_type: str
    file: str
    batch: Batch
    image_shape: tuple[int, int, int]
    sha256: str
    graph_sha256: str

    @property
    def graph(self) -> Path:
        return Path(self.file)

    @property
    def label(self) -> str:
        return label(self.name, self.compute_type)


class _Order(Record, frozen=True, kw_only=True):
    """What the building process is asked."""

    kind: str
    bundle: str
    wanted: tuple[Wanted, ...]
    options: EngineOptions


class _Word(Record, frozen=True, kw_only=True):
    """A line of what it says: of the artifact at that place, or of itself. `code` is that of an error."""

    at: int
    stage: str | None = None
    fraction: float | None = None
    said: str | None = None
    done: bool = False
    code: int | None = None
    message: str = ""
    hint: str | None = None


@dataclass(frozen=True)
class Engines:
    """By `label`, what has an engine now and why others have none; and the artifacts that have no graph for it."""

    ready: tuple[str, ...]
    failed: dict[str, str]
    left_out: tuple[str, ...]


def label(name: str, compute_type: str) -> str:
    """What to call an artifact's engine: tf32 is the only type that is not the artifact's own."""
    return f"{name} in tf32" if compute_type == "tf32" else name


def in_order(wanted: Iterable[tuple[Artifact, str]]) -> list[tuple[Artifact, str]]:
    """Most likely picks first: the most heads, as `pick` prefers accuracy; among them the narrowest type."""

    def place(one: tuple[Artifact, str]) -> tuple[int, int]:
        artifact, kind = one
        return -artifact.heads, _NARROW.index(kind) if kind in _NARROW else len(_NARROW)

    return sorted(wanted, key=place)


def build_missing(
    kind: str,
    bundle: Bundle,
    wanted: Sequence[tuple[Artifact, str]],
    options: EngineOptions = DEFAULTS,
    *,
    report: Report = lambda what, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Engines:
    """See to it that each artifact has an engine of that kind for this machine in the compute type beside it, the most
    likely picks first.

    Where a graph cannot be built, the others go on. Raises what `plans.plan` does of everything else; engines that are
    ready by then stay.
    """
    waiting = [_wanted(bundle, *one) for one in in_order(wanted) if "trt" in one[0].graphs]
    left_out = tuple(artifact.name for artifact, _ in wanted if "trt" not in artifact.graphs)
    failed: dict[str, str] = {}
    ready: list[str] = []
    total = len(waiting)
    while waiting:
        order = _Order(kind=kind, bundle=str(bundle.path.resolve()), wanted=tuple(waiting), options=options)
        count = _one_process(order, total, ready, failed, report, say)
        del waiting[:count]
    return Engines(tuple(ready), failed, left_out)


def plan_of(
    kind: str, model: Subject, bundle: Path, compute_type: str, *, say: Callable[[str], None] = _log.warning
) -> bytes:
    """The plan of one artifact in one compute type, as `plans.plan` has it, built in a process of its own."""
    find = EngineOptions(tf32=plans.in_tf32(compute_type), build=False)
    try:
        return plans.plan(kind, model, bundle, find)
    except (MissingError, ForeignError, IntegrityError):
        if model.graph is None or model.sha256 is None or model.graph_sha256 is None:
            raise
    wanted = Wanted(
        name=model.name,
        compute_type=compute_type,
        file=str(model.graph.resolve()),
        batch=model.batch,
        image_shape=model.image_shape,
        sha256=model.sha256,
        graph_sha256=model.graph_sha256,
    )
    order = _Order(kind=kind, bundle=str(bundle.resolve()), wanted=(wanted,), options=DEFAULTS)
    failed: dict[str, str] = {}
    _one_process(order, 1, [], failed, _now_and_then(say), say)
    if failed:
        raise MissingError(failed[wanted.label])
    return plans.plan(kind, model, bundle, find)


def _now_and_then(say: Callable[[str], None]) -> Report:
    last = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_S:
            last = time.monotonic()
            say(f"{what} {done}/{total}" if total else what)

    return report


def _wanted(bundle: Bundle, artifact: Artifact, compute_type: str) -> Wanted:
    return Wanted(
        name=artifact.name,
        compute_type=compute_type,
        file=str(bundle.graph(artifact, "trt").resolve()),
        batch=artifact.batch,
        image_shape=image_shape(bundle.spec.geometry, artifact.input),
        sha256=artifact.sha256,
        graph_sha256=artifact.graph_sha256,
    )


def _one_process(
    order: _Order, total: int, ready: list[str], failed: dict[str, str], report: Report, say: Callable[[str], None]
) -> int:
    """Build with one process for as long as it lives; how many artifacts are dealt with then, which is one at least."""
    dealt, before, doing = 0, total - len(order.wanted), ""
    command, env = fresh(__name__, str(os.getpid()))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=env,
            start_new_session=True,  # a Ctrl-C on the terminal is for us, who kill it then
        )
        try:
            for word in _words(process, msgspec.json.encode(order)):
                name = order.wanted[dealt].label if dealt < len(order.wanted) else ""
                what = f"engine {name} ({before + dealt + 1} of {total})"
                if word is None:
                    if name:
                        report(doing or what, 0, 0)
                    continue
                if word.said is not None:
                    say(word.said)
                elif word.code is not None:
                    error = _error(word.code, word.message, word.hint)
                    if not isinstance(error, MissingError) or word.at < 0:
                        raise error
                    failed[name] = error.message
                    dealt += 1
                elif word.done:
                    ready.append(name)
                    dealt += 1
                else:
                    share = None if word.fraction is None else round(100 * word.fraction)
                    doing = f"{what}: {word.stage}" if word.stage else what
                    report(doing, share or 0, 0 if share is None else 100)
                    continue
                doing = ""
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if dealt < len(order.wanted):
            failed[order.wanted[dealt].label] = f"its builder {_ended(code)}: {_last_words(errors)}"
            dealt += 1
    return dealt


def _words(process: subprocess.Popen[bytes], order: bytes) -> Iterator[_Word | None]:
    """What it says, line by line, and None each second in which it says nothing; until it says no more."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(order + b"\n")
        process.stdin.flush()
    heard = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_TICK_S):
                yield None
                continue
            more = os.read(process.stdout.fileno(), 1 << 16)
            if not more:
                return
            *lines, heard = (heard + more).split(b"\n")
            for line in lines:
                yield msgspec.json.decode(line, type=_Word)


def _ended(code: int) -> str:
    return f"ended with exit {code}" if code >= 0 else f"ended with {signal_name(-code)}"


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(max(0, errors.seek(0, os.SEEK_END) - (1 << 12)))
    return (errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]


def _error(code: int, message: str, hint: str | None) -> HydraError:
    kinds = {kind.exit_code: kind for kind in HydraError.__subclasses__()}
    return next(kind for number, kind in kinds.items() if number == code)(message, hint=hint)


def main() -> int:
    """The building process: an order as a line of JSON on stdin, a line of JSON per word on stdout."""
    # Whatever a builder prints goes to stderr.
    stdout = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    die_with(int(sys.argv[1]))
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Order)

    def tell(word: _Word) -> None:
        stdout.write(msgspec.json.encode(word) + b"\n")

    _work(order, tell)
    return 0


def _work(order: _Order, tell: Callable[[_Word], None]) -> None:
    try:
        shop = plans.workshop(order.kind)
    except HydraError as error:
        tell(_Word(at=-1, code=int(error.exit_code), message=error.message, hint=error.hint))
        return
    for at, wanted in enumerate(order.wanted):

        def progress(stage: str, fraction: float | None, at: int = at) -> None:
            tell(_Word(at=at, stage=stage, fraction=fraction))

        def say(text: str, at: int = at) -> None:
            tell(_Word(at=at, said=text))

        options = replace(order.options, tf32=plans.in_tf32(wanted.compute_type))
        try:
            plans.plan(order.kind, wanted, Path(order.bundle), options, progress, say=say, shop=shop)
        except HydraError as error:
            # Nothing was there and none may be built: that is for all of them, not this one alone.
            whole = isinstance(error, MissingError) and not order.options.build
            tell(_Word(at=-1 if whole else at, code=int(error.exit_code), message=error.message, hint=error.hint))
        else:
            tell(_Word(at=at, done=True))
