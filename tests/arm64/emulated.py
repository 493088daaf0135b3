"""An aarch64 Debian on this machine: debootstrap makes it, qemu runs its programs, namespaces take it away again.

Nothing has to be unmounted: every mount belongs to a mount namespace and every process to a process namespace that end
with the one command run in them, however that ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

QEMU = "qemu-aarch64-static"
PACKAGES = {"debootstrap": "debootstrap", QEMU: "qemu-user-static", "unshare": "util-linux", "setpriv": "util-linux"}
RELEASE = "bookworm"  # Python 3.11
MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
HANDLERS = Path("/proc/sys/fs/binfmt_misc")
HANDLER = "hydradeploy-aarch64"
# An ELF file of 64 bits, little-endian, executable or shared, for machine 183. F opens the interpreter at once, so that
# it is found from within another root.
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

# Close to Orin's cores: Armv8.2 with products of int8, without bf16, i8mm, SVE and SME.
PROCESSOR = "cortex-a76"
# Thor's have bf16, i8mm and SVE2, and no SME either. With SME int8dyn comes out wrong, and `verify` says so: KleidiAI's
# kernel in ONNX Runtime 1.32 is to blame, or how qemu 7.2 emulates it.
WIDER = "max,sme=off"
# qemu's user mode shows /proc/cpuinfo of the machine below; programs in here run on another processor.
CPUINFO = """processor\t: {}
BogoMIPS\t: 100.00
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

"""

ENTER = """
set -eu
root=$1 work=$2 cpuinfo=$3 cpu=$4
shift 4
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --bind "$cpuinfo" "$root/proc/cpuinfo"
mount -t sysfs -o ro sysfs "$root/sys"
for place in dev tmp root; do mount -t tmpfs tmpfs "$root/$place"; done
for name in null zero full random urandom; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
ln -s /proc/self/fd "$root/dev/fd"
mkdir -m 1777 "$root/dev/shm"
mount --bind "$work" "$root/srv"
hostname emulated
exec chroot "$root" /usr/bin/env -i --chdir=/srv QEMU_CPU="$cpu" \\
    HOME=/root LANG=C.UTF-8 PATH=/srv/venv/bin:/usr/bin:/bin "$@"
"""

# The first process of the namespace ends with unshare, that with us, and the kernel then ends all the others.
APART = ("setpriv", "--pdeathsig=KILL", "nice", "unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL")
NO_NETWORK = ("--net", "--ipc", "--uts")


def why_not() -> str | None:
    """What is missing here to emulate an aarch64 Debian; None for nothing."""
    if os.geteuid() != 0:
        return "takes root, to mount and to change the root directory"
    packages = sorted({package for command, package in PACKAGES.items() if shutil.which(command) is None})
    if packages:
        return f"not installed: {', '.join(packages)} (apt-get install {' '.join(packages)})"
    if "binfmt_misc" not in Path("/proc/filesystems").read_text():
        return "this kernel has no binfmt_misc (modprobe binfmt_misc)"
    return None


def foreign_handlers() -> list[Path]:
    """Who runs aarch64 programs in any root already."""
    entries = [path for path in HANDLERS.glob("*") if path.name not in ("register", "status")]
    told = {path: path.read_text() for path in entries}
    machine = "magic 7f454c460201010000000000000000000200b700"
    return [
        path for path, text in told.items() if text.startswith("enabled") and machine in text and "F" in _flags(text)
    ]


def _flags(text: str) -> str:
    return next((line.partition(":")[2] for line in text.splitlines() if line.startswith("flags:")), "")


@contextmanager
def handler() -> Iterator[None]:
    """Have the kernel run aarch64 programs through qemu, and no longer afterwards, unless it did so before."""
    mounted = (HANDLERS / "register").exists()
    if not mounted:
        shown(["mount", "-t", "binfmt_misc", "binfmt_misc", str(HANDLERS)])
    try:
        if (HANDLERS / HANDLER).exists():  # of a run that was killed
            (HANDLERS / HANDLER).write_text("-1")
        if foreign_handlers():
            yield
            return
        (HANDLERS / "register").write_text(f":{HANDLER}:M::{MAGIC}:{MASK}:{shutil.which(QEMU)}:F")
        try:
            yield
        finally:
            (HANDLERS / HANDLER).write_text("-1")
    finally:
        if not mounted:
            shown(["umount", str(HANDLERS)])


def shown(command: Sequence[str], codes: Sequence[int] = (0,), timeout_s: float = 1800) -> str:
    """Run a command to its end; what it wrote to stdout. Whatever it says is shown where it fails."""
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    told = f"$ {' '.join(command)}\nexit {ran.returncode}\n--- stdout\n{ran.stdout}\n--- stderr\n{ran.stderr}"
    assert ran.returncode in codes, told
    return ran.stdout


def system(where: Path) -> Path:
    """The root directory of an aarch64 Debian with Python below `where`, made when it is not there yet."""
    root, staged = where / f"root-{RELEASE}", where / "staged"
    if root.exists():
        return root
    shutil.rmtree(staged, ignore_errors=True)
    where.mkdir(parents=True, exist_ok=True)
    chosen = ("--arch=arm64", "--variant=minbase", "--include=python3,python3-venv")
    shown(["nice", "debootstrap", "--foreign", *chosen, RELEASE, str(staged), MIRROR])
    shown([*APART, "chroot", str(staged), "/debootstrap/debootstrap", "--second-stage"])
    staged.rename(root)
    return root


def entered(root: Path, work: Path, *command: str, processor: str = PROCESSOR) -> list[str]:
    """The command that runs a command in the system, with `work` as its /srv, without a network."""
    cpuinfo = work.parent / "cpuinfo"
    cpuinfo.write_text("".join(CPUINFO.format(number) for number in range(os.cpu_count() or 1)))
    return [*APART, *NO_NETWORK, "sh", "-c", ENTER, "enter", str(root), str(work), str(cpuinfo), processor, *command]
