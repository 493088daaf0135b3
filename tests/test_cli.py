"""The command line as a whole: help, errors, exit codes, start-up, streams."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hydradeploy import errors
from hydradeploy.engines.cudart import why_no_driver
from hydradeploy.errors import EXIT_CODES, ExitCode
from tests.conftest import Cli

COMMANDS = (
    "demo",
    "train",
    "import",
    "export",
    "evaluate",
    "doctor",
    "profile",
    "compare",
    "pick",
    "verify",
    "pack",
    "run",
)
ROOT = Path(__file__).parents[1]


def spawn(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hydradeploy", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_every_option_explained(cli: Cli, command):
    ran = cli(command, "--help")
    assert ran.code == 0
    assert f"hydradeploy {command}" in ran.out
    options = [line.split() for line in ran.out.splitlines() if line.strip().startswith("--")]
    assert all(len(words) > 2 for words in options if words[0] != "--force")
    assert "--json" in ran.out


def test_help_lists_every_command_and_the_exit_codes(cli: Cli):
    ran = cli("--help")
    for command in COMMANDS:
        assert f"  {command} " in ran.out
    for code, text in EXIT_CODES.items():
        assert f"{code.value:>4}  {text}" in ran.out
    assert set(EXIT_CODES) == set(ExitCode)


def test_no_arguments_is_help(cli: Cli):
    ran = cli()
    assert "Commands:" in ran.out
    assert ran.code == 0


def test_version(cli: Cli):
    from importlib.metadata import version

    assert cli("--version").out == f"hydradeploy {version('hydradeploy')}\n"


@pytest.mark.parametrize(
    "arguments",
    [("exprot",), ("export", "--hats", "3"), ("import",), ("pack",), ("run",), ("export", "--heads"), ("--colour",)],
)
def test_a_wrong_command_line_is_one_error_and_one_hint(cli: Cli, arguments):
    ran = cli(*arguments)
    assert ran.code == 2
    lines = ran.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: hydradeploy ")
    assert lines[1].endswith("--help")
    assert ran.out == ""


@pytest.mark.parametrize("start", [["-m", "hydradeploy"], [str(ROOT / "cli.py")]])
def test_module_and_checkout_launcher_start_the_same_command_line(start):
    ran = subprocess.run([sys.executable, *start, "--version"], capture_output=True, text=True)
    assert ran.returncode == 0
    assert ran.stdout.startswith("hydradeploy ")


def test_the_demo_overwrites_nothing_without_being_told(cli: Cli, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    ran = cli("demo", "--out", tmp_path)
    assert ran.code == 2
    assert "is not empty" in ran.err
    assert "--force" in ran.err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("hydradeploy")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert ran.stdout.startswith("hydradeploy ")


def test_a_checkout_that_is_not_installed_says_how_to_install_it(cli: Cli, monkeypatch):
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    ran = cli("--version")
    assert ran.code == ExitCode.MISSING
    assert ran.err.splitlines() == [
        "error: the package hydradeploy is not installed, so its version cannot be told",
        "hint: pip install -e . in a checkout",
    ]


def test_a_bug_shows_its_traceback_and_exits_1(cli: Cli, monkeypatch, shared_bundle):
    import hydradeploy.runtime.verify as module

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("for the test")

    monkeypatch.setattr(module, "verify", broken)
    ran = cli("verify", "--bundle", shared_bundle)
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "ZeroDivisionError: for the test" in ran.err
    assert "bug in hydradeploy" in ran.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 12, "out of memory"),
        (PermissionError(13, "Permission denied", "/x"), 12, "permission denied: /x"),
        (errors.MissingError("no such sensor", hint="buy one"), 8, "error: no such sensor\nhint: buy one"),
    ],
)
def test_every_way_out_has_its_code_and_no_traceback(cli: Cli, monkeypatch, shared_bundle, error, code, text):
    import hydradeploy.runtime.verify as module

    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module, "verify", failing)
    ran = cli("verify", "--bundle", shared_bundle)
    assert ran.code == code
    assert text in ran.err
    assert "Traceback" not in ran.err


def test_a_reader_that_leaves_early_is_no_error(shared_bundle):
    command = f"{sys.executable} -m hydradeploy verify --bundle {shared_bundle} | true; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ran.stdout == "0\n"
    assert ran.stderr == ""


def test_output_that_cannot_be_written_is_an_environment_failure(shared_bundle):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "hydradeploy", "verify", "--bundle", str(shared_bundle)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 12
    assert "error: no space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize(("command", "code"), [("verify", 0), ("pick --latency 1s", 7)])
def test_closed_streams_are_no_error(shared_bundle, tmp_path, closed, command, code):
    line = f"{sys.executable} -m hydradeploy {command} --bundle {shared_bundle}"
    ran = subprocess.run(["bash", "-c", f"{line} {closed}"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("artifact", "code", "lines"), [(None, 0, 6), ("h99-fp32", 2, 0)])
def test_a_log_that_cannot_be_written_ends_nothing(shared_bundle, image, artifact, code, lines):
    """Where it has something to say that is no error, and an error."""
    named = [] if artifact is None else ["--artifact", artifact]
    command = [sys.executable, "-m", "hydradeploy", "run", str(image), "--bundle", str(shared_bundle), *named]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (code, lines)


def test_progress_without_stderr_goes_nowhere(supernet_file, tmp_path):
    line = f"{sys.executable} -m hydradeploy export --supernet {supernet_file} --bundle b --heads 2 --json 2>&-"
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["bundle"] == "b"


@pytest.mark.parametrize("stderr", ["> >(true)", ">/dev/full"])
@pytest.mark.parametrize(("heads", "code"), [(2, 0), (99, 2)])
def test_work_goes_on_where_nobody_hears_of_its_progress(supernet_file, tmp_path, stderr, heads, code):
    """A log that has no reader or no room any more is no reason to stop half-way, and least of all with exit code 0."""
    line = f"{sys.executable} -m hydradeploy export --supernet {supernet_file} --bundle b --heads {heads} --json"
    ran = subprocess.run(["bash", "-c", f"{line} 2{stderr}"], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == code
    assert (tmp_path / "b" / "manifest.json").exists() == bool(ran.stdout) == (code == 0)


def test_a_file_whose_name_is_no_text_is_named(shared_bundle, image, tmp_path):
    named = os.fsencode(tmp_path) + b"/\xff.png"
    shutil.copy(os.fsencode(image), named)
    command = [sys.executable, "-m", "hydradeploy", "run", named, "--bundle", str(shared_bundle)]
    plain = subprocess.run(command, capture_output=True)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith(named + b"\n")
    document = json.loads(subprocess.run([*command, "--json"], capture_output=True).stdout)
    assert [Path(entry["image"]).name for entry in document["images"]] == ["\ufffd.png"]


def test_what_a_stream_has_no_letter_for_is_escaped(shared_bundle, image, tmp_path):
    named = tmp_path / "\u56fe\U0001f642\xe9.png"
    shutil.copy(image, named)
    command = [sys.executable, "-m", "hydradeploy", "run", str(named), "--bundle", str(shared_bundle)]
    for options in ([], ["--json"]):
        ran = subprocess.run(
            [*command, *options], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"}
        )
        assert ran.returncode == 0, ran.stderr
        assert rb"\u56fe\ud83d\ude42" + b"\xe9.png" in ran.stdout
    assert json.loads(ran.stdout.decode("latin-1"))["images"][0]["image"] == str(named)


@pytest.mark.parametrize("columns", ["1", "40", "500"])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_is_cut_at_no_width(monkeypatch, capsys, columns, terminal):
    from hydradeploy.cli.output import print_table

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    rows = [("h06-fp32 " * 20, "1.23 ms", "99.5%"), ("h03-fp16", "1.0 .. 2.0 " * 30, "")]
    print_table(("artifact", "a title that is long", "top-1"), rows)
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(part.strip() in out for row in rows for part in row)


MARKED = "val[old]/:cat:[/b]"


def test_a_name_that_looks_like_markup_is_shown_as_it_is(capsys):
    from hydradeploy.cli.output import print_table

    print_table(("artifact", "data"), [("h06-fp32", MARKED)])
    assert MARKED in capsys.readouterr().out


def test_a_bar_tells_a_name_that_looks_like_markup_as_it_is(monkeypatch):
    from hydradeploy.cli.progress import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"COLUMNS": "200", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress() as report:
        report(f"evaluating on {MARKED}", 1, 2)
        report.say(f"left out: {MARKED}")
    assert f"evaluating on {MARKED}" in sys.stderr.getvalue()
    assert f"left out: {MARKED}" in sys.stderr.getvalue()


def test_the_options_of_a_run_are_the_same_tables_in_json(cli: Cli):
    start = ("train", "--data", "digits", "--epochs", 3, "--show-config")
    document = json.loads(cli(*start, "--json").out)
    assert (document["preset"], document["recipe"]["epochs"]) == ("digits", 3)
    tables = {line.strip("[]").partition(".")[0] for line in cli(*start).out.splitlines() if line.startswith("[")}
    assert tables == set(document) - {"preset"}


def test_no_colour_and_no_bar_where_there_is_no_terminal(supernet_file, tmp_path):
    ran = spawn("export", "--supernet", str(supernet_file), "--bundle", str(tmp_path / "b"), "--heads", "2")
    assert ran.returncode == 0
    assert "\x1b" not in ran.stdout + ran.stderr
    assert "checking parity 0/1" in ran.stderr


def test_a_terminal_gets_a_bar_with_time_left(supernet_file, tmp_path):
    import pty

    leader, follower = pty.openpty()
    command = ["export", "--supernet", str(supernet_file), "--bundle", str(tmp_path / "b"), "--heads", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "hydradeploy", *command],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env=os.environ | {"TERM": "xterm-256color"},
    )
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:
        pass
    assert child.wait() == 0
    assert b"checking parity" in shown
    assert b"\x1b[" in shown
    assert b":" in shown


def imported(*arguments: object) -> set[str]:
    """The modules that a command of its own process ends with."""
    code = (
        "import sys; sys.argv = ['hydradeploy', *sys.argv[1:]]\n"
        "from hydradeploy.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr
    return set(ran.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["export", "--help"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    heavy = {"torch", "onnx", "onnxruntime", "openvino", "pydantic", "matplotlib", "PIL", "rich"}
    assert not heavy & imported(*arguments)


@pytest.mark.parametrize("options", [["--show-config"], ["--lr", "0"]])
def test_options_of_a_training_are_looked_at_before_torch_is_imported(options):
    found = imported("train", "--data", "digits", *options)
    assert "hydradeploy.training.config" in found
    assert "torch" not in found


@pytest.mark.skipif(why_no_driver() is None, reason="torch is asked for a GPU where there is a driver")
@pytest.mark.parametrize("command", ["profile", "doctor"])
def test_where_no_gpu_can_be_nobody_waits_for_torch(command, shared_bundle, tmp_path):
    options = ["--dry-run", "--bundle", shared_bundle] if command == "profile" else []
    found = imported(command, *options, "--profiles", tmp_path)
    assert "hydradeploy.backends.torch_cuda" in found
    assert "torch" not in found


def test_importing_the_package_imports_nothing_heavy_and_public_names_work():
    code = (
        "import sys, hydradeploy\n"
        "assert not {'numpy', 'torch', 'msgspec'} & set(sys.modules), 'heavy'\n"
        "for name in hydradeploy.__all__: getattr(hydradeploy, name)\n"
        "print('fine')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "fine\n", ran.stderr


def test_there_is_no_other_public_name():
    import hydradeploy

    assert dir(hydradeploy) == hydradeploy.__all__
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        hydradeploy.exprot  # noqa: B018
