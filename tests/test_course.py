"""The course's table of chapters and the charts that chapters share."""

import pytest
from matplotlib.colors import to_hex

from minipeft import bill, lab
from minipeft.lab import charts, course


def test_every_notebook_is_a_chapter_and_a_chapter_without_one_says_so():
    rows = {row["chapter"]: row for row in lab.chapters()}
    files = {path.stem for path in course.notebooks_folder().glob("[0-9][0-9]_*.ipynb")}
    assert {name for name, row in rows.items() if row["here"]} == files
    assert list(rows) == sorted(rows)


def test_a_chapter_that_is_not_here_shows_no_exercises(tmp_path, monkeypatch):
    monkeypatch.setattr(course, "notebooks_folder", lambda: tmp_path)
    (tmp_path / "05_lora.ipynb").write_text("{}")
    rows = {row["chapter"]: row for row in lab.chapters()}
    assert rows["05_lora"]["here"] and rows["05_lora"]["exercises"] >= 2
    assert not rows["00_start_here"]["here"] and rows["00_start_here"]["exercises"] is None


def a_bill(**lines):
    return bill.MemoryBill(**{line: 0 for line in bill.LINES} | lines, peak=0, parameters=0, trainable=0, assumed="")


def test_the_bars_of_a_bill_are_its_lines_in_gigabytes():
    figure = lab.bill_figure({"one": a_bill(weights=3 * 10**9, optimizer=6 * 10**9, logits=10**9, temporary=10**9)})
    bars = {to_hex(bar.get_facecolor()): bar.get_width() for bar in figure.axes[0].patches if bar.get_width()}
    colour = {part: to_hex(shade) for part, shade in charts.STACK.items()}
    assert bars == pytest.approx({colour["weights"]: 3, colour["optimizer"]: 6, colour["the rest"]: 2})
    assert [text.get_text() for text in figure.axes[0].texts] == ["11"]
    with pytest.raises(ValueError, match="no line 'wieghts'"):
        lab.bill_figure({"one": {"wieghts": 1}})


def test_a_heat_map_writes_each_value_at_its_place_and_leaves_a_missing_one_blank():
    figure = lab.heat_map([[0.5, None, 1.0], [0.25, 0.75, 0.1]], ["a", "b"], ["x", "y", "z"])
    assert {text.get_position(): text.get_text() for text in figure.axes[0].texts} == {
        (0, 0): "50%", (2, 0): "100%", (0, 1): "25%", (1, 1): "75%", (2, 1): "10%"}  # fmt: skip
    with pytest.raises(ValueError, match="2 rows of .*expected 2 of 2"):
        lab.heat_map([[1, 2], [1]], ["a", "b"], ["x", "y"])
