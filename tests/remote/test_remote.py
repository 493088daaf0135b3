"""`profile --host` against a real sshd: what goes there, what comes back, and what is left when it ends early."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from hydradeploy import export, open_bundle
from hydradeploy.bundle import MANIFEST
from hydradeploy.engines.cache import Cache, Key
from hydradeploy.measurements import Cell, Profile, read_profile
from hydradeploy.profiler.journal import read
from hydradeploy.profiler.presets import PRESETS
from hydradeploy.units import show_bytes
from tests.remote.conftest import PATIENCE_S, Device

ROUNDS = PRESETS["quick"].rounds


def ended(run: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a run that ends with this exit code and without a traceback."""
    out, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == code, out + err
    assert "Traceback" not in err
    return out, err


def refused(run: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """Error and hint, which are all that it says."""
    out, err = ended(run, code)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2, err
    return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


def copied(device: Device, bundle: Path, *more: object) -> str:
    """What is said of the copying in a run that ends right after it."""
    run = device.profile(bundle, device.root / "profiles", "--preset", "gentle", *more)
    err = ended(run, 2)[1].splitlines()
    assert err[-2] == "error: no preset 'gentle'"
    return err[-3]


def only(profiles: Path) -> Profile:
    """The one profile of a directory in which nothing else is."""
    (name,) = os.listdir(profiles)
    return read_profile(profiles / name).profile


def wait_for(device: Device, run: subprocess.Popen[str], kept: int) -> None:
    """Until so many measurements are kept there."""
    until = time.monotonic() + PATIENCE_S
    while True:
        journals = list((device.home / ".cache").glob("hydradeploy/remote/*/profiles/*.jsonl"))
        if journals and b"\n" in (data := journals[0].read_bytes()) and data.count(b"\n") > kept:
            return
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_bundle_goes_there_and_the_profile_comes_back(device: Device, bundle, tmp_path):
    """And a second time, when all is there already, nothing goes; its cell takes the place of the first one's."""
    profiles = tmp_path / "profiles"
    first, err = ended(device.profile(bundle, profiles, "--json"))
    found = json.loads(first)
    manifest = open_bundle(bundle).manifest
    size = sum(record.size_bytes for record in manifest.files.values()) + (bundle / MANIFEST).stat().st_size
    assert found["host"] == "orin"
    assert found["copied"] == {"files": len(manifest.files) + 1, "size_bytes": size}
    assert f"orin: copied {len(manifest.files) + 1} of {len(manifest.files) + 1} files" in err
    assert f"measuring 0/{ROUNDS}" in err, "what the profile there says is heard here"
    there = open_bundle(device.place / "bundle", "always").manifest
    assert there == manifest
    assert Path(found["profile"]).parent == profiles
    (cell,) = only(profiles).cells
    assert (cell.artifact, cell.threads) == ("h02-fp32", 1)
    assert sorted(set(cell.process)) == list(range(ROUNDS))
    assert [cell] == msgspec.convert(found["cells"], list[Cell])
    device.wait_for_nobody()
    before = (device.place / "bundle").stat()
    second, err = ended(device.profile(bundle, profiles))
    assert f"orin: nothing to copy, all {len(manifest.files) + 1} files are there" in err
    assert (device.place / "bundle").stat().st_ino == before.st_ino
    assert "1 cell measured" in second
    (again,) = only(profiles).cells
    assert again.measured_at > cell.measured_at
    assert sorted(os.listdir(device.place)) == ["bundle", "lock", "profiles"]
    assert os.listdir(device.place / "profiles") == []
    assert os.listdir(device.root / "tmp") == []


def test_only_what_has_changed_goes_and_engines_stay_where_they_were_built(
    device: Device, bundle, supernet_file, tmp_path
):
    """An engine built ahead of time goes there too, one of a GPU does not; one that was built there survives."""
    old = open_bundle(bundle).manifest
    artifact = next(artifact for artifact in old.artifacts if artifact.name == "h03-fp32")
    ahead = Key(kind="tensorrt-rtx", graph_sha256=artifact.graph_sha256, sha256=artifact.sha256, version="1.7")
    ours = msgspec.structs.replace(ahead, kind="tensorrt", gpu="A big one", sm_count=132)
    theirs = msgspec.structs.replace(ours, gpu="A small one", sm_count=16)
    copied(device, bundle)
    Cache(device.place / "bundle" / "engines").store(theirs, b"built there")
    Cache(bundle / "engines").store(ahead, b"for anybody")
    Cache(bundle / "engines").store(ours, b"for us alone")
    export(supernet_file, bundle, heads=(3,), precisions=("bf16",))
    new = open_bundle(bundle).manifest
    changed = {record.sha256: record.size_bytes for name, record in new.files.items() if old.files.get(name) != record}
    assert 0 < len(changed) < len(new.files) / 2
    engine = bundle / "engines" / ahead.fingerprint
    extra = [bundle / MANIFEST, *engine.iterdir()]
    found = json.loads(ended(device.profile(bundle, tmp_path / "profiles", "--json"))[0])
    assert found["copied"]["files"] == len(changed) + len(extra)
    assert found["copied"]["size_bytes"] == sum(changed.values()) + sum(path.stat().st_size for path in extra)
    assert open_bundle(device.place / "bundle", "always").manifest == new
    engines = Cache(device.place / "bundle" / "engines")
    assert (engines.find(ahead), engines.find(theirs), engines.find(ours)) == (b"for anybody", b"built there", None)


def test_a_file_that_was_damaged_there_goes_again(device: Device, bundle, tmp_path):
    """Of the same size and time, so that only its hash tells."""
    copied(device, bundle)
    victim = device.place / "bundle" / "h03-fp32.onnx"
    data, times = victim.read_bytes(), victim.stat()
    victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copied(device, bundle) == f"orin: copied 1 of 24 files, {show_bytes(len(data))}"
    open_bundle(device.place / "bundle", "always")


def test_two_bundles_of_one_name_lie_apart_there(device: Device, bundle, tmp_path):
    other = Path(shutil.copytree(bundle, tmp_path / "other" / "bundle"))
    for path in (bundle, other):
        copied(device, path)
    assert len(list((device.home / ".cache/hydradeploy/remote").glob("bundle-*"))) == 2


def test_what_was_measured_there_and_did_not_get_to_tell_comes_with_the_next(device: Device, bundle, tmp_path):
    """Once: into another directory a third one brings its own alone."""
    ended(device.profile(bundle, tmp_path / "first"))
    (untold,) = only(tmp_path / "first").cells
    (path,) = (tmp_path / "first").glob("*.json")
    path.rename(device.place / "profiles" / path.name)
    ended(device.profile(bundle, tmp_path / "second", "--precision", "fp16"))
    cells = {cell.artifact: cell for cell in only(tmp_path / "second").cells}
    assert cells["h02-fp32"] == untold
    assert set(cells) == {"h02-fp32", "h02-fp16"}
    ended(device.profile(bundle, tmp_path / "third", "--precision", "fp16"))
    assert [cell.artifact for cell in only(tmp_path / "third").cells] == ["h02-fp16"]


def test_a_plan_is_made_there_and_told_here(device: Device, bundle, tmp_path):
    found = json.loads(ended(device.profile(bundle, tmp_path / "profiles", "--dry-run", "--json"))[0])
    assert [cell["artifact"] for cell in found["cells"]] == ["h02-fp32"]
    assert "h02-fp32" in ended(device.profile(bundle, tmp_path / "profiles", "--dry-run"))[0]
    assert not (tmp_path / "profiles").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--heads", "7"), 2, "no artifact of 7 heads"),
        (("--preset", "gentle"), 2, "no preset 'gentle'"),
        (("--setting", "hats=on", "--setting", "spinning=off,on"), 2, "hats"),
        (("--device", "jetson"), 8, "jetson"),
        (("--resume",), 2, "nothing to resume"),
    ],
)
def test_errors_of_the_profile_there_come_through_as_they_are(device: Device, bundle, tmp_path, options, code, said):
    _, err = ended(device.profile(bundle, tmp_path / "profiles", *options), code)
    assert f"{device.name}: copied" in err
    error = err[err.index("error: ") :]
    assert said in error.splitlines()[0]
    local = device.command(
        "profile",
        "--bundle",
        device.place / "bundle",
        "--profiles",
        device.place / "profiles",
        "--heads",
        2,
        "--precision",
        "fp32",
        *options,
    )
    assert ended(local, code)[1].endswith(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--host", "-oProxyCommand=touch pwned"), "is no host"),
        (("--host", ""), "is no host"),
        (("--ssh", "ssh '"), "--ssh"),
        (("--ssh", ""), "--ssh names no command"),
        (("--threads", "two"), "'two' is not a list of counts"),
        (("--bootstrap", "torch-2.0-py3-none-any.whl"), "is no wheel of hydradeploy 0.1.0"),
        (("--bootstrap", "hydradeploy-0.0.9-py3-none-any.whl"), "is no wheel of hydradeploy 0.1.0"),
        (
            ("--bootstrap", "gone/hydradeploy-0.1.0-py3-none-any.whl[ort]"),
            "gone/hydradeploy-0.1.0-py3-none-any.whl: no such",
        ),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_asked(stopped: Device, bundle, tmp_path, options, said):
    error, _ = refused(stopped.profile(bundle, tmp_path / "profiles", *options), 2)
    assert said in error
    assert not (stopped.home / ".cache").exists()


def test_options_about_another_device_need_one(bundle, cli):
    for options in (("--bootstrap", "x.whl"), ("--host-program", "x"), ("--ssh", "ssh -v")):
        ran = cli("profile", "--bundle", bundle, *options)
        assert (ran.code, ran.err.splitlines()[1]) == (2, "hint: name it with --host")


def test_a_host_key_that_is_not_known_is_never_accepted(device: Device, bundle, tmp_path):
    (device.root / "known_hosts").write_text("")
    error, hint = refused(device.profile(bundle, tmp_path / "profiles"), 12)
    assert error == "orin: its host key is not known here"
    assert hint.startswith(f"run {device.ssh} orin once and compare the fingerprint")
    device.config.write_text(device.config.read_text() + "  StrictHostKeyChecking no\n")
    refused(device.profile(bundle, tmp_path / "profiles"), 12)
    assert (device.root / "known_hosts").read_text() == ""
    assert not (device.home / ".cache").exists()


def test_a_host_key_that_has_changed_is_told(device: Device, bundle, tmp_path):
    key = (device.root / "user.pub").read_text()
    (device.root / "known_hosts").write_text(f"[127.0.0.1]:{device.port} {key}")
    error, hint = refused(device.profile(bundle, tmp_path / "profiles"), 12)
    assert error == "orin: its host key is not the one that is known here"
    assert "ssh-keygen -R" in hint
    assert not (device.home / ".cache").exists()


def test_a_user_whose_key_is_not_allowed(device: Device, bundle, tmp_path):
    device.new_key("user")
    error, hint = refused(device.profile(bundle, tmp_path / "profiles"), 12)
    assert "Permission denied" in error
    assert hint.endswith("without asking: with a key (ssh-copy-id)")


def test_a_port_that_nobody_listens_on(stopped: Device, bundle, tmp_path):
    error, hint = refused(stopped.profile(bundle, tmp_path / "profiles"), 12)
    assert error == f"orin: connect to host 127.0.0.1 port {stopped.port}: Connection refused"
    assert hint == f"{stopped.ssh} orin must work first"


def test_a_name_that_is_nobodys(stopped: Device, bundle, tmp_path):
    error, _ = refused(stopped.profile(bundle, tmp_path / "profiles", "--host", "nobody.invalid"), 12)
    assert error.startswith("nobody.invalid: Could not resolve hostname nobody.invalid")


def test_a_port_can_be_in_the_name_of_the_host(device: Device, bundle, tmp_path):
    name = f"ssh://127.0.0.1:{device.port}"
    assert copied(device, bundle, "--host", name).startswith(f"{name}: copied")


def test_no_ssh_here(stopped: Device, bundle, tmp_path):
    error, _ = refused(stopped.profile(bundle, tmp_path / "profiles", "--ssh", "sssh"), 8)
    assert error == "there is no sssh on this machine"


def test_without_hydradeploy_there_nothing_is_put_there(device: Device, bundle, tmp_path):
    (device.bin / "hydradeploy").unlink()
    error, hint = refused(device.profile(bundle, tmp_path / "profiles"), 8)
    assert error == "orin: no hydradeploy there"
    assert "--bootstrap" in hint
    assert list(device.home.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo hydradeploy 0.0.1", "is 0.0.1, and here is 0.1.0"),
        ("exit 1", "does not run, and here is 0.1.0"),
        (
            'if test $1 = --version; then echo hydradeploy 0.1.0; else echo "error: No such command" >&2; exit 2; fi',
            "is too old",
        ),
        ("if test $1 = --version; then echo hydradeploy 0.1.0; else kill -9 $$; fi", "the program there was killed"),
    ],
)
def test_a_hydradeploy_that_is_not_this_one(device: Device, bundle, tmp_path, script, said):
    device.install(script)
    error, _ = refused(device.profile(bundle, tmp_path / "profiles"), 12 if "killed" in said else 8)
    assert error.startswith("orin: ")
    assert said in error


def test_one_that_reads_other_formats_is_refused_before_anything_goes(device: Device, bundle, tmp_path):
    patch = "import hydradeploy.measurements as m; m.SCHEMA = 99; from hydradeploy.cli import main; main()"
    device.install(f'exec {sys.executable} -c "{patch}" "$@"')
    error, _ = refused(device.profile(bundle, tmp_path / "profiles"), 8)
    assert "reads and writes other formats (there protocol 1, bundle 1, profile 99" in error
    assert not (device.home / ".cache").exists()


@pytest.mark.parametrize("name", ["~", "-it's a $(touch pwned)`;ü", '!q"\\q\\'])
def test_a_program_of_any_name_is_found_there(device: Device, bundle, tmp_path, name):
    place = device.home / name
    place.mkdir()
    (device.bin / "hydradeploy").rename(place / "hydradeploy")
    for program in (place / "hydradeploy", f"~/{name}/hydradeploy"):
        copied(device, bundle, "--host-program", program)
    error, _ = refused(device.profile(bundle, tmp_path / "profiles", "--host-program", f"~/{name}/gone"), 8)
    assert error == f"orin: ~/{name}/gone is not there"
    assert not list(tmp_path.rglob("pwned"))


def test_one_in_the_users_own_directory_is_found(device: Device, bundle, tmp_path):
    """Of another version is the one in the PATH."""
    (device.home / ".local").mkdir()
    device.bin.rename(device.home / ".local/bin")
    device.bin.mkdir()
    device.install("echo hydradeploy 0.0.1")
    copied(device, bundle)


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
def test_any_login_shell_will_do(stopped: Device, bundle, tmp_path, shell):
    """Also one that has something to say first, and a name in the bundle's path that shells would take amiss."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    odd = bundle.rename(tmp_path / "it's a $(touch pwned) bundle; -x")
    wrapper = stopped.root / "shell"
    wrapper.write_text(f'#!/bin/sh\necho "Welcome back!"\nexec {shutil.which(shell)} "$@"\n')
    wrapper.chmod(0o755)
    stopped.shell = str(wrapper)
    (stopped.home / "a b").mkdir()
    (stopped.bin / "hydradeploy").rename(stopped.home / "a b" / "it's")
    stopped.start()
    copied(stopped, odd, "--host-program", "~/a b/it's")
    assert stopped.place.name.startswith("it-s-a---touch-pwned--bundle---x-")
    assert not list(tmp_path.rglob("pwned"))


def test_a_connection_that_drops_loses_nothing_that_was_measured(device: Device, bundle, tmp_path):
    profiles = tmp_path / "profiles"
    run = device.profile(bundle, profiles)
    wait_for(device, run, 2)
    device.drop()
    out, err = ended(run, 12)
    assert out == ""
    assert err.splitlines()[-2:] == [
        "error: orin: the connection was lost",
        "hint: what was measured is kept there; go on with --resume",
    ]
    assert err.count("error:") == err.count("hint:") == 1
    device.wait_for_nobody()
    (journal,) = (device.place / "profiles").glob("*.jsonl")
    kept = len(read(journal)[1])
    assert kept >= 2
    assert not list(profiles.glob("*.json"))
    refusal = ended(device.profile(bundle, profiles), 2)[1]
    assert "an earlier run was cut short" in refusal
    _, err = ended(device.profile(bundle, profiles, "--resume"))
    assert f"measuring {kept}/{ROUNDS}" in err
    (cell,) = only(profiles).cells
    assert sorted(set(cell.process)) == list(range(ROUNDS))


THROTTLE = """
import os, select, socket, sys, time
peer = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while True:
    for source in select.select([0, peer], [], [])[0]:
        data = os.read(0, 4096) if source == 0 else peer.recv(4096)
        if not data:
            sys.exit()
        if source == 0:
            peer.sendall(data)
            time.sleep(len(data) / 400_000)
        else:
            os.write(1, data)
"""


def test_a_connection_that_drops_while_the_bundle_is_copied_loses_nothing_that_arrived(
    device: Device, bundle, tmp_path
):
    """Over a slow line."""
    (tmp_path / "throttle.py").write_text(THROTTLE)
    fast = device.config.read_text()
    device.config.write_text(f"ProxyCommand {sys.executable} {tmp_path}/throttle.py {device.port}\n{fast}")
    run = device.profile(bundle, tmp_path / "profiles")
    remote = device.home / ".cache/hydradeploy/remote"
    until = time.monotonic() + PATIENCE_S
    while sum(path.stat().st_size for path in remote.glob("*/incoming/*")) < 200_000:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    device.drop()
    err = ended(run, 12)[1].splitlines()
    assert err[-2:] == ["error: orin: the connection was lost", "hint: run it again; what has arrived there is kept"]
    device.wait_for_nobody()
    assert not (device.place / "bundle").exists()
    arrived = sum(path.stat().st_size for path in (device.place / "incoming").iterdir())
    assert arrived >= 200_000
    device.config.write_text(fast)
    found = json.loads(ended(device.profile(bundle, tmp_path / "profiles", "--json"))[0])
    manifest = open_bundle(device.place / "bundle", "always").manifest
    size = sum(record.size_bytes for record in manifest.files.values()) + (bundle / MANIFEST).stat().st_size
    assert found["copied"]["size_bytes"] == size - arrived


def test_this_end_may_be_suspended_for_too_long(device: Device, bundle, tmp_path):
    patient = "from hydradeploy.remote.there import main; raise SystemExit(main(6.0))"
    device.install(
        f'if test $1 = there; then exec {sys.executable} -c "{patient}"; fi; exec {sys.executable} -m hydradeploy "$@"'
    )
    run = device.profile(bundle, tmp_path / "profiles", "--preset", "gate")
    wait_for(device, run, 0)
    run.send_signal(signal.SIGSTOP)
    device.wait_for_nobody(but="cat")  # the connection stands
    run.send_signal(signal.SIGCONT)
    err = ended(run, 12)[1]
    assert "error: orin: has not heard of us for too long and gave up\nhint: what was measured is kept there" in err


def test_an_account_that_runs_no_commands_says_so_itself(stopped: Device, bundle, tmp_path):
    (stopped.root / "shell").write_text("#!/bin/sh\necho This account is currently not available.\n")
    (stopped.root / "shell").chmod(0o755)
    stopped.shell = str(stopped.root / "shell")
    stopped.start()
    error, _ = refused(stopped.profile(bundle, tmp_path / "profiles"), 12)
    assert error == "orin: This account is currently not available."


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGTERM in the background"])
def test_an_interrupt_here_ends_the_profile_there_and_brings_its_journal(device: Device, bundle, tmp_path, how):
    """With which it goes on even where the device has lost everything since."""
    profiles = tmp_path / "profiles"
    if how == "SIGTERM in the background":  # where a script's shell has Ctrl-C ignored
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        run = device.profile(bundle, profiles)
        signal.signal(signal.SIGINT, before)
    else:
        run = device.profile(bundle, profiles)
    wait_for(device, run, 1)
    os.killpg(run.pid, signal.SIGINT) if how == "Ctrl-C" else run.send_signal(signal.SIGTERM)
    out, err = ended(run, 130)
    assert out == ""
    (journal,) = (device.place / "profiles").glob("*.jsonl")
    kept = len(read(journal)[1])
    assert kept >= 1
    assert err.splitlines()[-2:] == [
        f"{journal}: {kept} of {ROUNDS} measurements are kept; go on with --resume",
        "interrupted",
    ]
    device.wait_for_nobody()
    (copy,) = (profiles / "unfinished").glob("*/*.jsonl")
    assert copy.parent.name == f"orin-{device.place.name}"
    assert copy.read_bytes() == journal.read_bytes()
    shutil.rmtree(device.home / ".cache")
    _, err = ended(device.profile(bundle, profiles, "--resume"))
    assert f"measuring {kept}/{ROUNDS}" in err
    assert sorted(set(only(profiles).cells[0].process)) == list(range(ROUNDS))


def test_when_this_end_is_killed_nothing_goes_on_there(device: Device, bundle, tmp_path):
    run = device.profile(bundle, tmp_path / "profiles")
    wait_for(device, run, 1)
    run.kill()
    run.communicate()
    device.wait_for_nobody()
    ended(device.profile(bundle, tmp_path / "profiles", "--resume"))


def test_a_profile_that_is_killed_there_can_go_on(device: Device, bundle, tmp_path):
    run = device.profile(bundle, tmp_path / "profiles")
    wait_for(device, run, 1)
    # The first: what it starts has its command line too, until that is another program.
    profiling = min(pid for pid, command in device.processes().items() if "-c " in command and " profile " in command)
    os.kill(profiling, signal.SIGKILL)
    _, err = ended(run, 12)
    assert "error: orin: the profile there was killed by SIGKILL\nhint: what was measured is kept there" in err
    device.wait_for_nobody()
    ended(device.profile(bundle, tmp_path / "profiles", "--resume"))


def test_a_second_run_of_the_same_bundle_is_refused(device: Device, bundle, tmp_path):
    first = device.profile(bundle, tmp_path / "profiles")
    wait_for(device, first, 1)
    error, hint = refused(device.profile(bundle, tmp_path / "profiles"), 2)
    assert error.endswith("another run works with it")
    assert hint.startswith("wait for it")
    ended(first)


def test_a_disk_that_is_full_there(device: Device, bundle, tmp_path):
    """One of 600 KiB, of which the bundle takes more."""
    place = device.home / ".cache"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", place], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        error, hint = ended(device.profile(bundle, tmp_path / "profiles"), 12)[1].splitlines()[-2:]
        assert error.startswith("error: orin: no space left on device while writing")
        assert hint.startswith("hint: free some space")
        device.wait_for_nobody()
        assert not (device.place / "bundle").exists()
        subprocess.run(["mount", "-o", "remount,size=8m", place], check=True)
        found = json.loads(ended(device.profile(bundle, tmp_path / "profiles", "--json"))[0])
        assert 0 < found["copied"]["size_bytes"] < 600_000, "what had arrived was kept"
        open_bundle(device.place / "bundle", "always")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_file_that_is_too_large_there_keeps_the_bundle_as_it_was(device: Device, bundle, supernet_file, tmp_path):
    """No file may be larger than 100 KiB."""
    copied(device, bundle)
    before = open_bundle(device.place / "bundle").manifest
    export(supernet_file, bundle, heads=(3,), precisions=("bf16",))
    device.install(f'ulimit -f 200; exec {sys.executable} -m hydradeploy "$@"')
    error, hint = ended(device.profile(bundle, tmp_path / "profiles"), 12)[1].splitlines()[-2:]
    assert error.startswith("error: orin: file too large while writing")
    assert hint.startswith("hint: the file is larger than")
    device.wait_for_nobody()
    assert open_bundle(device.place / "bundle", "always").manifest == before
    device.install()
    copied(device, bundle)
    assert open_bundle(device.place / "bundle", "always").manifest == open_bundle(bundle).manifest
