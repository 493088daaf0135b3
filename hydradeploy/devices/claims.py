"""Names that one process holds and every other on this machine sees held, for what a driver does not tell.

Sockets of Linux without a file (unix(7), abstract): the kernel gives the name up with the process, however that ends.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from hydradeploy.errors import MissingError


@contextmanager
def claimed(name: str) -> Iterator[None]:
    """Hold the name while the block runs; raises MissingError where another process does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        try:
            held.bind(_address(name))
        except OSError as error:
            raise MissingError(f"another process holds {name}", hint="let it end first") from error
        yield


def is_claimed(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect(_address(name))
        except OSError:
            return False
        return True


def _address(name: str) -> bytes:
    return b"\0" + f"hydradeploy: {name}".encode()[:100]
