"""README's pictures and its tables that are written: as they would be written now."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("minipeft_pictures", ROOT / "notebooks" / "pictures.py")
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.fixture
def readme(tmp_path):
    file = tmp_path / "README.md"
    file.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    return file


def test_readme_shows_what_the_results_say(readme, tmp_path):
    before = readme.read_text(encoding="utf-8")
    pictures.write_readme(tmp_path)
    assert readme.read_text(encoding="utf-8") == before, "make pictures"


def test_a_figure_that_is_not_measured_is_put_right(readme, tmp_path):
    right = readme.read_text(encoding="utf-8")
    row = next(line for line in right.splitlines() if line.startswith("| `05_lora` |"))
    readme.write_text(right.replace(row, row.rsplit("|", 5)[0] + "| 0.1 | 0.1 | 0.1 | never |"), encoding="utf-8")
    pictures.write_readme(tmp_path)
    assert readme.read_text(encoding="utf-8") == right


@pytest.mark.parametrize("spoilt", ["<!-- end of chapters -->", "<!-- comparison: written by `make pictures` -->"])
def test_marks_that_are_missing_are_named(readme, tmp_path, spoilt):
    text = readme.read_text(encoding="utf-8").replace(spoilt + "\n", "")
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="needs one line"):
        pictures.write_readme(tmp_path)
    assert readme.read_text(encoding="utf-8") == text


def test_every_picture_that_readme_shows_is_there():
    shown = [line.split("](")[1].split(")")[0] for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("![")]
    assert shown and all((ROOT / file).is_file() and (ROOT / file).stat().st_size < 400_000 for file in shown), shown
