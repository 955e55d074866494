"""The archive for a class: every notebook, nothing of any solution."""

import importlib
import re
import sys
import zipfile

import nbformat
import pytest

from minipeft.checks import exercises
from tests.test_notebooks import EXERCISE, HEADER, make, tools

sys.path.insert(0, str(tools.ROOT / "notebooks"))
classroom = importlib.import_module("classroom")   # a script, which finds its neighbours beside it
sys.path.pop(0)


def solutions(source):
    """The lines between the markers of one source, each as it stands there."""
    blocks = re.findall(r"### BEGIN SOLUTION\n(.*?)### END SOLUTION", source.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    return blocks


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The archive of the real course: name -> text."""
    root = tmp_path_factory.mktemp("course")
    for name in ("notebooks", "data", "pyproject.toml"):
        (root / name).symlink_to(tools.ROOT / name)
    with zipfile.ZipFile(classroom.classroom(tools.Course(root))) as packed:
        return {name.removeprefix("minipeft-classroom/"): packed.read(name).decode() for name in packed.namelist()}


def test_the_archive_holds_every_notebook_the_data_cards_and_a_first_page(archive):
    assert {f"notebooks/{path.stem}.ipynb" for path in tools.Course().sources} | {"README.md", "data/drug_cards.md"} <= set(archive)
    assert {name.split("/")[0] for name in archive} == {"README.md", "notebooks", "data"}
    assert tools.Course().repository() in archive["README.md"]


@pytest.mark.parametrize("source", tools.Course().sources, ids=lambda path: path.stem)
def test_no_solution_is_in_it(archive, source):
    text = archive[f"notebooks/{source.stem}.ipynb"]
    notebook = nbformat.reads(text, as_version=4)
    assert "folded-solution" not in text and "<summary>Solution" not in text and "SOLUTION" not in text
    for block in solutions(source):
        assert not any(block.strip() in cell.source for cell in notebook.cells), block
    stubs = [cell.source for cell in notebook.cells if "exercise" in cell.metadata.get("tags", [])]
    assert stubs and all("...  # your code here" in stub for stub in stubs)
    assert not any(cell.get("outputs") for cell in notebook.cells)


def test_a_small_course_is_packed_to_the_same_bytes_each_time(tmp_path):
    course = make(tmp_path, HEADER + EXERCISE)
    tools.build(course)
    first = classroom.classroom(course).read_bytes()
    assert classroom.classroom(course).read_bytes() == first
    with zipfile.ZipFile(classroom.classroom(course)) as packed:
        assert "the secret" not in "".join(packed.read(name).decode() for name in packed.namelist())


def test_without_a_source_there_is_no_archive(tmp_path):
    with pytest.raises(classroom.NotebookError, match="no notebook sources"):
        classroom.classroom(tools.Course(tmp_path))


def test_the_teachers_table_has_every_chapter_with_its_exercises_minutes_and_points():
    rows = dict(re.findall(r"^\| (\d\d_\w+) \| (.*) \|$", (tools.ROOT / "TEACHING.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(rows) == {path.stem for path in tools.Course().sources}
    for path in tools.Course().sources:
        text = path.read_text(encoding="utf-8")
        minutes = sum(int(m) for m in re.findall(r"^# #+ Exercise.*?(\d+) minutes", text, re.MULTILINE))
        own = [e for e in exercises().values() if e.chapter.startswith(f"ch{path.stem[:2]}_")]
        *shown, hours = rows[path.stem].split(" | ")
        assert list(map(int, shown)) == [len(own), minutes, sum(e.points for e in own)], path.stem
        cells = re.split(r"^# %%", text, flags=re.MULTILINE)[1:]
        prose = re.sub(r"<details>.*?</details>", "", "".join(c for c in cells if c.startswith(" [markdown]")), flags=re.DOTALL)
        code = [line for c in cells if not c.startswith(" [markdown]") for line in c.splitlines()[1:] if line.strip(" #")]
        assert abs((minutes + len(re.findall(r"\w+", prose)) / 100 + len(code) / 10) / 60 - float(hours)) <= 0.5, path.stem
