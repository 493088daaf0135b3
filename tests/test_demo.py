"""The demo: the whole flow, with a training cut short."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.conftest import Cli, require


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run for all tests of this module, with what it said."""
    require("sklearn")
    require("matplotlib")
    from hydradeploy.demo import demo

    said: list[str] = []
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, epochs=1, say=said.append), said


def test_it_ends_with_a_pick_that_the_command_line_gives_again(ran, cli: Cli):
    out, done, said = ran
    answer = json.loads(done.pick_file.read_text())
    command = [line for line in said if line.startswith("> hydradeploy pick")][-1].split()[2:]
    again = cli(*command, "--bundle", out / "bundle", "--profiles", out / "profiles", "--json")
    assert json.loads(again.out) == answer
    assert again.code == {"pass": 0, "infeasible": 3, "inconclusive": 4}[answer["verdict"]]


def test_three_budgets_rise_and_each_has_an_answer(ran):
    limits = [answer.budget.latency[0].limit_s for answer in ran[1].answers]
    assert len(limits) == 3
    assert limits == sorted(limits)


def test_every_subnet_is_evaluated_and_measured(ran):
    out, _, said = ran
    rows = json.loads((out / "bundle" / "accuracy.json").read_text())["rows"]
    assert [row["artifact"] for row in rows] == [f"h{k:02d}-fp32" for k in range(3, 13)]
    assert all(row["n"] == 360 for row in rows)
    (profile,) = (out / "profiles").glob("*.json")
    assert len(json.loads(profile.read_text())["cells"]) == 10
    assert sum(line.strip().startswith("h") and "top-1" in line for line in said) >= 10


def test_the_picture_is_one(ran):
    with Image.open(ran[1].picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20


def test_a_directory_with_something_in_it_is_not_overwritten(cli: Cli, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    ran = cli("demo", "--out", tmp_path)
    assert ran.code == 2
    assert "is not empty" in ran.err
    assert "--force" in ran.err
    assert (tmp_path / "mine.txt").read_text() == "precious"
