"""A comparison as people read it."""

from __future__ import annotations

from hydradeploy.report.compare import HEADER, lines, markdown, rows, summary
from hydradeploy.selector.compare import Comparison, compared, parse_rule
from tests.selector.build import artifact, conditions, failed
from tests.selector.test_compare import MS, measured, stored

RULES = [parse_rule(text) for text in ("p95:+5%", "memory:+10%")]


def comparison() -> Comparison:
    old, new = (conditions(software={"onnxruntime": version}) for version in ("1.0", "2.0"))
    before = [measured(3), measured(4), measured(5, memory_bytes=None), measured(6)]
    after = [
        measured(3, 20 * MS, memory_bytes=30 * 2**20),
        measured(4, 5 * MS, graph_sha256="f" * 64),
        measured(5, 10 * MS),
        failed(artifact(6), "killed | by signal 9"),
    ]
    return compared(stored(*before, name="a.json", under=old), stored(*after, name="b.json", under=new), RULES)


def test_rows_have_figures_with_units_and_the_change_with_its_interval():
    found = {(row[0].split()[0], row[1]): dict(zip(HEADER, row, strict=True)) for row in rows(comparison())}
    slower = found["h03-fp32", "p95"]
    assert slower["before"].startswith("10.1 ms")
    assert slower["after"].startswith("20.3 ms")
    assert (slower["change"], slower["allowed"], slower["verdict"]) == ("+100.0%", "+5.0%", "regression")
    low, high = slower["interval"].split(" .. ")
    assert 95 < float(low.strip("+%")) < 100 < float(high.strip("+%")) < 105
    assert found["h04-fp32", "p95"]["change"] == "-50.0%"
    assert found["h04-fp32", "p95"]["verdict"] == "improved"
    memory = found["h03-fp32", "memory"]
    assert (memory["before"], memory["change"], memory["interval"]) == ("30.0 MiB", "+0.0%", "")
    unknown = found["h05-fp32", "memory"]
    assert (unknown["before"], unknown["change"], unknown["verdict"]) == ("n/a", "", "inconclusive")


def test_lines_say_what_rows_leave_out_and_end_with_the_answer():
    told = list(lines(comparison()))
    assert told == [
        "software differs (before, after): onnxruntime: 1.0, 2.0",
        "the graph is another one: h04-fp32 (onnxruntime, 1 thread)",
        "h05-fp32 (onnxruntime, 1 thread): memory: before: memory was not measured",
        "h06-fp32 (onnxruntime, 1 thread): not compared: after: killed | by signal 9",
        "regression on Imaginary CPU 9000: 1 over the limit and not by chance, 1 inconclusive, 1 better than before,"
        " 3 within the limit, 1 not compared",
    ]
    assert summary(comparison()) == told[-1]


def test_markdown_is_a_table_that_nothing_in_it_breaks():
    text = markdown(comparison())
    head, blank, *rest = text.splitlines()
    assert head == f"**{summary(comparison())}**"
    assert blank == ""
    table = [line for line in rest if line.startswith("|")]
    assert len(table) == 2 + 6
    assert {line.count("|") for line in table} == {len(HEADER) + 1}
    assert sum("**regression**" in line for line in table) == 1
    assert "- h06-fp32 (onnxruntime, 1 thread): not compared: after: killed \\| by signal 9" in rest
    assert "Before: `a.json`, after: `b.json`." in text


def test_an_answer_without_remarks_has_no_list():
    text = markdown(compared(stored(measured()), stored(measured()), RULES))
    assert "\n- " not in text
    assert text.startswith("**ok on Imaginary CPU 9000: 2 within the limit**\n")
