"""A device: an sshd on loopback as the current user, with keys, configuration, home directory and PATH of its own."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from getpass import getuser
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import missing
from tests.processes import alive

ROOT = Path(__file__).parents[2]
MARK = "HYDRADEPLOY_TEST_DEVICE"
# A machine that does something else as well may need minutes for what takes seconds.
PATIENCE_S = 120.0


@dataclass
class Device:
    """`name` is its name in the configuration `config`, `home` its home directory, `bin` first in its PATH."""

    root: Path
    sshd: str
    name: str = "orin"
    port: int = 0
    mark: str = field(default_factory=lambda: uuid4().hex)
    environment: dict[str, str] = field(default_factory=dict)
    shell: str | None = None
    _server: subprocess.Popen[bytes] | None = None
    _started: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for directory in (self.home, self.bin, self.root / "tmp"):
            directory.mkdir()
        for key in ("host", "user"):
            self.new_key(key)
        shutil.copy(self.root / "user.pub", self.root / "authorized_keys")
        self.install()
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.trust()
        self.config.write_text(
            f"Host {self.name}\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getuser()}\n"
            f"Host *\n  IdentityFile {self.root}/user\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.root}/known_hosts\n  GlobalKnownHostsFile none\n"
        )

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def ssh(self) -> str:
        return shlex.join(["ssh", "-F", str(self.config)])

    @property
    def place(self) -> Path:
        """That of the one bundle that was copied."""
        (found,) = [path for path in (self.home / ".cache/hydradeploy/remote").iterdir() if (path / "lock").exists()]
        return found

    def new_key(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.root / name], check=True)

    def trust(self) -> None:
        """Its host key is known here."""
        (self.root / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {(self.root / 'host.pub').read_text()}")

    def install(self, script: str | None = None) -> None:
        """A `hydradeploy` in its PATH: the one of these tests, or a script of sh."""
        if script is None:
            here, python = shlex.quote(str(ROOT)), shlex.quote(sys.executable)
            script = f'PYTHONPATH={here} exec {python} -m hydradeploy "$@"'
        (self.bin / "hydradeploy").write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / "hydradeploy").chmod(0o755)

    def start(self) -> None:
        variables = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "TMPDIR": str(self.root / "tmp"),
            "ORT_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
        } | self.environment
        lines = [
            f"ListenAddress 127.0.0.1:{self.port}",
            f"HostKey {self.root}/host",
            f"AuthorizedKeysFile {self.root}/authorized_keys",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "SetEnv " + " ".join(f'{name}="{value}"' for name, value in variables.items()),
        ]
        if self.shell is not None:
            lines.append(f'ForceCommand exec {self.shell} -c "$SSH_ORIGINAL_COMMAND"')
        (self.root / "sshd_config").write_text("\n".join(lines) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        with open(self.root / "log", "wb") as log:
            self._server = subprocess.Popen([self.sshd, "-D", "-e", "-f", self.root / "sshd_config"], stderr=log)
        until = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            assert self._server.poll() is None, (self.root / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)

    def profile(self, bundle: Path, profiles: Path, *more: object) -> subprocess.Popen[str]:
        """`hydradeploy profile --host` here, of a small part of the bundle."""
        chosen = ("--heads", "2", "--precision", "fp32", "--threads", "1", "--device", "cpu")
        return self.command("profile", "--host", self.name, "--bundle", bundle, "--profiles", profiles, *chosen, *more)

    def command(self, *arguments: object) -> subprocess.Popen[str]:
        run = subprocess.Popen(
            [sys.executable, "-m", "hydradeploy", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HYDRADEPLOY_SSH": self.ssh},
            start_new_session=True,
        )
        self._started.append(run)
        return run

    def processes(self) -> dict[int, str]:
        """Those that are alive of all that were started over ssh, by what they were started with."""
        return alive(MARK, self.mark)

    def sessions(self) -> list[int]:
        """The sshd processes that serve connections."""
        assert self._server is not None
        found, waiting = [], [self._server.pid]
        while waiting:
            for path in Path("/proc").glob("[0-9]*/stat"):
                with suppress(OSError):
                    name, _, rest = path.read_text().rpartition(")")
                    if int(rest.split()[1]) == waiting[0] and "(sshd" in name:
                        found.append(int(path.parent.name))
                        waiting.append(found[-1])
            waiting.pop(0)
        return found

    def drop(self) -> None:
        """Every connection, at once, without a word."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_nobody(self, but: str = "") -> None:
        """Until everything that was started over ssh has ended, except one program."""
        until = time.monotonic() + 60
        while left := [command for command in self.processes().values() if command.strip() != but]:
            assert time.monotonic() < until, left
            time.sleep(0.05)

    def stop(self) -> None:
        for run in self._started:
            if run.poll() is None:
                run.kill()
            run.communicate()
        if self._server is not None:
            self.drop()
            self._server.kill()
            self._server.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def stopped(tmp_path: Path) -> Iterator[Device]:
    """A device that is not running yet."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if sshd is None or shutil.which("ssh") is None:
        missing("sshd", "no OpenSSH server and client here (apt-get install openssh-server)")
    (tmp_path / "device").mkdir()
    found = Device(tmp_path / "device", str(sshd))
    yield found
    found.stop()


@pytest.fixture
def device(stopped: Device) -> Device:
    stopped.start()
    return stopped
