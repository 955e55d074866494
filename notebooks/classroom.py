"""Pack what a class gets: `make classroom`, or `python notebooks/classroom.py` -> build/minipeft-classroom.zip.

The student notebooks without outputs and without the folded solutions, the cards that describe the data, and
a page that says how to begin. The same notebooks give the same bytes. TEACHING.md says what to do with it.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import nbformat
from tools import Course, NotebookError, build_one

FIRST_PAGE = """# A course on parameter-efficient fine-tuning

The notebooks are numbered. Begin with `notebooks/00_start_here.ipynb`.

1. Python 3.11 or newer. No GPU is needed.
2. `pip install "minipeft[notebooks] @ git+https://github.com/{repository}"`, in an environment of its own.
   The base models are fetched when a notebook first needs them.
3. `jupyter lab`, and open a notebook. Or upload it to Colab: the set-up cell installs what is missing.

Write your answer where a cell says `...  # your code here`, and run the cell: it checks itself, with new numbers
each time. *not attempted* means that there is nothing to check yet. Hints are folded below the exercise.
The rest of a notebook runs whether you have solved the exercise or not.

Hand in the `.ipynb` under the name it has. Keep the line that begins with `check.` in each exercise: that is how
your answer is found. It is run again, with other numbers and without the rest of the notebook, so it may use
your own imports, functions and constants from earlier cells, but nothing that takes long.
What each data set holds, and under which licence, stands in `data/`.
"""


def student_notebook(course: Course, source: Path) -> str:
    """The text of the student's notebook, as a class gets it."""
    notebook = build_one(course, source, "student")
    notebook.cells = [cell for cell in notebook.cells if "folded-solution" not in cell.metadata.get("tags", [])]
    return nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


def classroom(course: Course) -> Path:
    """Write the archive. Returns its path."""
    if not course.sources:
        raise NotebookError(f"no notebook sources in {course.folder / 'source'}")
    files = {"README.md": FIRST_PAGE.format(repository=course.repository())}
    files |= {f"notebooks/{source.stem}.ipynb": student_notebook(course, source) for source in course.sources}
    files |= {f"data/{card.name}": card.read_text(encoding="utf-8") for card in sorted((course.root / "data").glob("*.md"))}
    path = course.root / "build" / "minipeft-classroom.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            entry = zipfile.ZipInfo(f"minipeft-classroom/{name}")  # dated 1980: the same bytes each time
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, text)
    return path


if __name__ == "__main__":
    course = Course()
    try:
        written = classroom(course)
    except NotebookError as error:
        sys.exit(f"error: {error}")
    print(f"{written.relative_to(course.root)}: {len(course.sources)} notebooks, {written.stat().st_size / 2**20:.1f} MB, no solutions")
