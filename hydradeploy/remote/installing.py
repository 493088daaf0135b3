"""Runs on a device that has nothing but Python: makes an environment with the wheel that comes on stdin.

    ~/.cache/hydradeploy/remote/
      venv            a symbolic link to the environment to use
      venv-DIGEST/    of a wheel, its extras and a version of Python; `ready` in it is written last

Sent as text and run by `python3 -c WHEEL-NAME SHA256 EXTRAS`: it imports nothing of this package, and every Python from
3.6 on can read it, to say that it is too old.
"""

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys

OLDEST = (3, 10)
MISSING, ENVIRONMENT = 8, 12


def main(name: str, sha256: str, extras: str) -> None:
    """Make the environment unless it is there, and tell the path of its `hydradeploy`."""
    if sys.version_info < OLDEST:
        fail(MISSING, f"python3 there is {sys.version.split()[0]}, it takes 3.10 or newer")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = os.path.join(cache, "hydradeploy", "remote")
    os.makedirs(root, exist_ok=True)
    with open(os.path.join(root, "venv.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = sys.stdin.buffer.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            fail(ENVIRONMENT, "the wheel did not arrive whole", "run it again")
        # TensorRT of a JetPack belongs to the system's Python, and may come after the first environment.
        shared = importlib.util.find_spec("tensorrt") is not None
        what = f"{sha256} {extras} {sys.version} {sys.executable} {shared}"
        place = os.path.join(root, "venv-" + hashlib.sha256(what.encode()).hexdigest()[:12])
        if not os.path.exists(os.path.join(place, "ready")):
            install(root, place, name, data, extras, shared)
        point(root, place)
    print("hydradeploy-found " + os.path.join(root, "venv", "bin", "hydradeploy"))


def install(root: str, place: str, name: str, data: bytes, extras: str, shared: bool) -> None:
    """A fresh environment with the wheel in it; `shared`, it sees the system's packages."""
    shutil.rmtree(place, ignore_errors=True)
    see = ["--system-site-packages"] if shared else []
    run(
        [sys.executable, "-m", "venv", *see, place],
        MISSING,
        "python3 there cannot make environments",
        "on Debian and Ubuntu: sudo apt-get install python3-venv",
    )
    file = os.path.join(place, name)
    with open(file, "wb") as wheel:
        wheel.write(data)
    python = os.path.join(place, "bin", "python")
    run(
        [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", f"{file}[{extras}]"],
        ENVIRONMENT,
        "pip could not install it there",
        "it takes what it needs from the package index that the device is set up for",
    )
    with open(os.path.join(place, "ready"), "w") as ready:
        ready.write(extras)


def point(root: str, place: str) -> None:
    """Let `venv` be that one, and remove those before, except where a run goes on in one."""
    link = os.path.join(root, "venv")
    if os.path.realpath(link) != os.path.realpath(place):
        fresh = link + ".new"
        if os.path.lexists(fresh):
            os.unlink(fresh)
        os.symlink(os.path.basename(place), fresh)
        os.replace(fresh, link)
    for other in os.listdir(root):
        if other.startswith("venv-") and other != os.path.basename(place) and not in_use(os.path.join(root, other)):
            shutil.rmtree(os.path.join(root, other), ignore_errors=True)


def in_use(place: str) -> bool:
    """Whether a run holds the lock on its `ready`, as `there.py` does."""
    try:
        with open(os.path.join(place, "ready")) as ready:
            fcntl.flock(ready, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def run(command: list, code: int, message: str, hint: str) -> None:  # type: ignore[type-arg]  # list[str] is 3.9's
    """Run a command; where it fails, end with its last words."""
    # Not in the home directory: with `-m`, a file there would stand in for a module of that name.
    done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")]
        fail(code, f"{message}: {(errors or lines or ['it said nothing'])[-1].strip()}", hint)


def fail(code: int, message: str, hint: str = "") -> None:
    """End with an error in the words of the command line."""
    sys.stderr.write(f"error: {message}\n" + (f"hint: {hint}\n" if hint else ""))
    sys.exit(code)


if __name__ == "__main__":
    try:
        main(*sys.argv[-3:])
    except OSError as error:
        fail(ENVIRONMENT, f"{error.strerror}: {error.filename}".lower() if error.filename else str(error))
