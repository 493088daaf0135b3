"""Commands of the workstation on a device, which has not all of their packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hydradeploy.errors import MissingError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra to install where a workstation command meets a device's installation."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("hydradeploy"):
            raise
        raise MissingError(
            f"the package {error.name} is not installed; this command belongs on a workstation",
            hint=f"pip install 'hydradeploy[{name}]'",
        ) from error
