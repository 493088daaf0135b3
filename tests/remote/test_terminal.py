"""`profile --host` on a terminal: ssh may ask, and Ctrl-C is a key."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

from tests.remote.conftest import PATIENCE_S, Device

PASSPHRASE = "correct horse"
# The terminal becomes that of the process, as a login makes it.
START = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A run whose stdin, stdout and stderr are a terminal; `seen` is all that it has shown."""

    def __init__(self, device: Device, *arguments: object) -> None:
        self._keyboard, screen = pty.openpty()
        command = [sys.executable, "-c", START, sys.executable, "-m", "hydradeploy", *map(str, arguments)]
        environment = os.environ | {"HYDRADEPLOY_SSH": device.ssh, "TERM": "xterm"}
        self.run = subprocess.Popen(
            command, stdin=screen, stdout=screen, stderr=screen, start_new_session=True, env=environment
        )
        os.close(screen)
        self.seen = ""

    def until(self, text: str | None) -> None:
        """Read until it has shown a text, or with None has ended."""
        ends = time.monotonic() + PATIENCE_S
        while text is None or text not in self.seen:
            assert time.monotonic() < ends, self.seen
            if select.select([self._keyboard], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._keyboard, 1 << 16).decode(errors="replace")
                except OSError:  # nobody has the screen open any more
                    break
        assert text is None or text in self.seen, self.seen

    def type(self, text: str) -> None:
        os.write(self._keyboard, text.encode())

    def close(self) -> int:
        self.until(None)
        os.close(self._keyboard)
        return self.run.wait(timeout=PATIENCE_S)


def test_ssh_asks_there_and_ctrl_c_ends_the_profile_on_the_device(device: Device, bundle: Path, tmp_path: Path):
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", PASSPHRASE, "-f", device.root / "user"], check=True)
    chosen = ("--heads", "2", "--precision", "fp32", "--threads", "1", "--device", "cpu")
    where = ("--host", device.name, "--bundle", bundle, "--profiles", tmp_path / "profiles")
    terminal = Terminal(device, "profile", *where, *chosen)
    terminal.until("Enter passphrase for key")
    terminal.type(f"{PASSPHRASE}\n")
    terminal.until("measuring 0/")
    assert terminal.seen.count("Enter passphrase") == 1, "one connection, one question"
    terminal.type("\x03")
    assert terminal.close() == 130, terminal.seen
    assert "interrupted" in terminal.seen
    assert "Traceback" not in terminal.seen
    device.wait_for_nobody()


def test_ctrl_c_at_the_question_ends_it(device: Device, bundle: Path, tmp_path: Path):
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", PASSPHRASE, "-f", device.root / "user"], check=True)
    terminal = Terminal(device, "profile", "--host", device.name, "--bundle", bundle, "--profiles", tmp_path / "p")
    terminal.until("Enter passphrase for key")
    terminal.type("\x03")
    assert terminal.close() == 130, terminal.seen
    assert "Traceback" not in terminal.seen


def test_a_key_that_is_not_known_is_not_asked_about(device: Device, bundle: Path, tmp_path: Path):
    (device.root / "known_hosts").write_text("")
    terminal = Terminal(device, "profile", "--host", device.name, "--bundle", bundle, "--profiles", tmp_path / "p")
    assert terminal.close() == 12, terminal.seen
    assert "its host key is not known here" in terminal.seen
    assert "continue connecting" not in terminal.seen
