"""The answer on stdout, words beside it on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

import msgspec


def say(text: str) -> None:
    """A line on stderr. Where its reader has left, or its disk is full, the work goes on in silence."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: TextIO) -> None:
    """Send to nowhere what is still to be written, and keep Python from complaining about it on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_json(value: object) -> None:
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:  # of the name of a file, which need not be text
        text = msgspec.json.encode(_encodable(msgspec.to_builtins(value, str_keys=True)))
    print(text.decode())


def _encodable(value: object) -> object:
    """The same with bytes that are no text replaced."""
    if isinstance(value, str):
        return os.fsencode(value).decode(errors="replace")
    if isinstance(value, list | tuple):
        return [_encodable(one) for one in value]
    if isinstance(value, dict):
        return {_encodable(name): _encodable(one) for name, one in value.items()}
    return value


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Names of files and data sets may look like rich's markup or its emoji, [old] and :cat:.
    console = Console(markup=False, emoji=False)
    # However narrow the terminal, no name and no figure is cut.
    unlimited = console.options.update(max_width=sys.maxsize)
    widest = max(console.width, console.measure(table, options=unlimited).maximum)
    console.size = widest, console.height  # both, for a dumb terminal is else taken for 80 wide
    console.print(table)
