"""Build, run and check the notebooks.

    python notebooks/tools.py build                 source/*.py -> student and solution notebooks
    python notebooks/tools.py check                 markers, stale builds, long cells, stray paths
    python notebooks/tools.py run 05                one notebook, headless, with an HTML to look at
    python notebooks/tools.py test                  every notebook, both versions, smoke profile
    python notebooks/tools.py results               every solution notebook, cpu profile, measured
    python notebooks/tools.py keep 05               what the last run of one measured, into data/results
    python notebooks/tools.py badges owner/name     where the course is published, into badges and set-up cells

There is one source for each notebook, `notebooks/source/NN_name.py`, in jupytext's percent
format. What authors write there is described in `notebooks/README.md`.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import difflib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("student", "solutions")
PROFILES = ("smoke", "cpu", "gpu")
STUB = "...  # your code here"
QUIZ = "lab.quiz("
MARKER = re.compile(r"#\s*(begin|end)\s+solutions?\b", re.IGNORECASE)
CELL = re.compile(r"^# %%")
HINT = re.compile(r"\s*<details>\s*<summary>\s*Hint", re.IGNORECASE)
HEADING = re.compile(r"^#{1,4}\s+(.+)$", re.MULTILINE)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|tmp|var/folders|home/\w+|Users/\w+)/[\w./-]+")
CHECK_MIME = "application/vnd.minipeft.check+json"  # how an exercise check reports its status
# owner/name as on GitHub; neither part is "." or ".."
REPOSITORY = re.compile(r"[A-Za-z0-9][\w-]{0,38}/(?!\.{1,2}$)[\w.-]{1,100}", re.ASCII)
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"

# A set-up cell installs minipeft without its dependencies, then completes them around torch and numpy.
ON_COLAB = ('if "google.colab" in sys.modules', "--no-deps", "git+https://github.com/", "colab.complete()")
LONGEST_CELL = 20  # lines of code
LONGEST_SETUP = 15
FEWEST_CELLS, MOST_CELLS = 15, 60
SHORTEST_RUN = 0.3  # seconds; a notebook that "ran" faster did nothing
SECONDS_ALLOWED = {"smoke": 600, "cpu": 3600, "gpu": 3600}


class NotebookError(Exception):
    """Something is wrong with a notebook; the message says where and what is expected."""


# ---------------------------------------------------------------------------- the course on disk


@dataclass(frozen=True)
class Course:
    """The folders of a course. Tests make small ones of their own."""

    root: Path = ROOT

    @property
    def folder(self) -> Path:
        return self.root / "notebooks"

    @property
    def sources(self) -> list[Path]:
        return sorted((self.folder / "source").glob("[0-9][0-9]_*.py"))

    def built(self, name: str, version: str) -> Path:
        return (self.folder if version == "student" else self.folder / "solutions") / f"{name}.ipynb"

    def find(self, wanted: str) -> str:
        """The name of the one notebook that `wanted` means: `05`, `5`, `05_lora` or `lora`."""
        names = [path.stem for path in self.sources]
        short = wanted.zfill(2) if wanted.isdigit() else wanted
        found = [n for n in names if n == short or n.split("_")[0] == short or n.split("_", 1)[1] == short]
        if len(found) == 1:
            return found[0]
        near = difflib.get_close_matches(wanted, names, 1, 0.3)
        did_you_mean = f"; did you mean {near[0]!r}?" if near else ""
        what = f"{len(found)} notebooks are called" if found else "no notebook is called"
        raise NotebookError(f"{what} {wanted!r}{did_you_mean} (notebooks: {', '.join(names) or 'none'})")

    def repository(self) -> str:
        """`owner/name` from `[tool.minipeft] repository` in pyproject.toml: the one place it is set."""
        path = self.root / "pyproject.toml"
        settings = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        value = settings.get("tool", {}).get("minipeft", {}).get("repository")
        if not (isinstance(value, str) and REPOSITORY.fullmatch(value)):
            raise NotebookError(
                f'pyproject.toml: [tool.minipeft] repository is {value!r}; expected "owner/name", '
                "which fills {{repository}} in the notebooks"
            )
        return value


# ---------------------------------------------------------------------------- source -> notebook


def check_markers(text: str, path: Path) -> None:
    """Refuse solution markers that are misspelt, nested, unmatched, empty or split over cells."""
    opened: tuple[int, str] | None = None  # line number and indent of the BEGIN we are in
    kept = 0  # lines of code since that BEGIN
    markdown = False
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{path}:{number}"
        if CELL.match(line):
            if opened:
                raise NotebookError(f"{path}:{opened[0]}: ### BEGIN SOLUTION has no ### END SOLUTION in its cell")
            markdown = "[markdown]" in line
        if not MARKER.search(line):
            kept += bool(line.strip())
            continue
        exact = re.fullmatch(r"(\s*)### (BEGIN|END) SOLUTION\s*", line)
        if markdown:
            raise NotebookError(f"{where}: a solution marker in a markdown cell; markers belong in code cells")
        if not exact:
            raise NotebookError(
                f"{where}: {line.strip()!r} is not a marker; write '### BEGIN SOLUTION' or '### END SOLUTION' on its own line"
            )
        indent, word = exact.groups()
        if word == "BEGIN":
            if opened:
                raise NotebookError(f"{where}: ### BEGIN SOLUTION inside the solution opened at line {opened[0]}")
            opened, kept = (number, indent), 0
        else:
            if not opened:
                raise NotebookError(f"{where}: ### END SOLUTION without a ### BEGIN SOLUTION before it in its cell")
            if indent != opened[1]:
                raise NotebookError(
                    f"{where}: ### END SOLUTION is indented by {len(indent)}, its BEGIN (line {opened[0]}) by {len(opened[1])}"
                )
            if not kept:
                raise NotebookError(f"{where}: the solution opened at line {opened[0]} is empty")
            opened = None
    if opened:
        raise NotebookError(f"{path}:{opened[0]}: ### BEGIN SOLUTION has no ### END SOLUTION in its cell")


def with_stub(code: str) -> str:
    """The student's version of a cell: each marked solution becomes one stub line."""
    lines, inside = [], False
    for line in code.splitlines():
        if line.strip() == "### BEGIN SOLUTION":
            lines.append(line.replace("### BEGIN SOLUTION", STUB).rstrip())
            inside = True
        elif line.strip() == "### END SOLUTION":
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def with_solution(code: str) -> str:
    """The solution's version of a cell: the same code without the marker lines."""
    return "\n".join(line for line in code.splitlines() if not MARKER.search(line))


def folded_solution(code: str) -> str:
    """Markdown with the marked solutions of a cell, folded.

    A solution inside a function is shown with the function's signature, so that it can be copied.
    """
    lines = code.splitlines()
    begins = [i for i, line in enumerate(lines) if line.strip() == "### BEGIN SOLUTION"]
    ends = [i for i, line in enumerate(lines) if line.strip() == "### END SOLUTION"]
    try:
        functions = [n for n in ast.parse(code).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    except SyntaxError:  # a cell with a %magic
        functions = []
    shown: dict[tuple[int, int], list[str]] = {}
    for begin, end in zip(begins, ends, strict=True):
        around = next((f for f in functions if f.lineno - 1 <= begin and end <= _last_line(f, lines)), None)
        if around is None:
            shown[begin, end] = textwrap.dedent("\n".join(lines[begin + 1 : end])).splitlines()
        else:
            first = min(node.lineno for node in [around, *around.decorator_list]) - 1
            inside = [b for b in zip(begins, ends, strict=True) if first <= b[0] <= _last_line(around, lines)]
            body = around.body
            has_docstring = isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant)
            signature_ends = min(body[0].lineno - 1, inside[0][0])
            body_begins = body[0].end_lineno if has_docstring else signature_ends
            rest = lines[body_begins : inside[-1][1]]
            shown[first, inside[-1][1]] = lines[first:signature_ends] + [x for x in rest if not MARKER.search(x)]
    text = "\n\n\n".join("\n".join(block).strip("\n") for block in shown.values())
    return f"<details>\n<summary>Solution</summary>\n\n```python\n{text}\n```\n\n</details>"


def _last_line(node: ast.stmt, lines: list[str]) -> int:
    """Index of the last line of `node`, trailing comments at its own indent (END markers) included."""
    last = node.end_lineno - 1
    while last + 1 < len(lines) and (not lines[last + 1].strip() or lines[last + 1].startswith((" ", "\t"))):
        last += 1
    return last


def build_one(course: Course, path: Path, version: str) -> nbformat.NotebookNode:
    """The notebook of one source file, without outputs. The same source gives the same bytes."""
    text = path.read_text(encoding="utf-8")
    check_markers(text, path)
    if "{{repository}}" in text:
        text = text.replace("{{repository}}", course.repository())
    try:
        source = jupytext.reads(text, fmt="py:percent")
    except Exception as error:
        raise NotebookError(f"{path}: jupytext cannot read it: {error}") from error

    name = path.stem
    cells: list[nbformat.NotebookNode] = []
    waiting: str | None = None  # a folded solution, to be put after the exercise and its hint
    for cell in source.cells:
        if waiting and not (cell.cell_type == "markdown" and HINT.match(cell.source)):
            cells.append(nbformat.v4.new_markdown_cell(waiting, metadata={"tags": ["folded-solution"]}))
            waiting = None
        tags = list(cell.metadata.get("tags", []))
        code = cell.source
        if cell.cell_type == "code" and MARKER.search(code):
            tags.append("exercise")
            if version == "student":
                waiting = folded_solution(code)
                code = with_stub(code)
            else:
                code = with_solution(code)
        new = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}.get(cell.cell_type)
        if new is None:
            raise NotebookError(f"{path}: a {cell.cell_type} cell; only code and markdown cells are used")
        metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code" and QUIZ in code:            # it holds the answers: folded in JupyterLab and on Colab
            code = f"# @title Quiz\n{code}"
            metadata |= {"jupyter": {"source_hidden": True}, "cellView": "form"}
        cells.append(new(code, metadata=metadata))
    if waiting:
        cells.append(nbformat.v4.new_markdown_cell(waiting, metadata={"tags": ["folded-solution"]}))

    seen: Counter[str] = Counter()
    for cell in cells:  # an id hangs on the name and the text alone, so inserting a cell moves no other id
        text_of_cell = f"{cell.cell_type}\n{cell.source}"
        seen[text_of_cell] += 1
        key = f"{name}\n{seen[text_of_cell]}\n{text_of_cell}"
        cell.id = hashlib.sha256(key.encode()).hexdigest()[:12]
    settings = {"notebook": name, "version": version, "records": _records(source, path)}
    return nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "minipeft": settings,
        },
    )


def _records(source: nbformat.NotebookNode, path: Path) -> list[str]:
    """`minipeft: {records: [...]}` of the source's header: the figures this notebook must record."""
    settings = source.metadata.get("minipeft", {})
    for key in settings:
        if key != "records":
            raise NotebookError(f"{path}: unknown setting {key!r} under 'minipeft' in the header; accepted: 'records'")
    records = settings.get("records", [])
    if not (isinstance(records, list) and all(isinstance(r, str) for r in records)):
        raise NotebookError(f"{path}: 'records' is {records!r}; expected a list of names")
    return list(records)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(notebook, indent=1).rstrip("\n") + "\n", encoding="utf-8")


def keep_outputs(new: nbformat.NotebookNode, old: nbformat.NotebookNode) -> None:
    """Carry the outputs of unchanged code cells over into a fresh build."""
    old_cells = {cell.get("id"): cell for cell in old.cells if cell.cell_type == "code"}
    for cell in new.cells:
        before = old_cells.get(cell.id)
        if cell.cell_type == "code" and before is not None and before.source == cell.source:
            cell.outputs = before.outputs
            cell.execution_count = before.execution_count


def build(course: Course) -> list[Path]:
    """Build every notebook in both versions. Returns the files written."""
    written = []
    for path in course.sources:
        for version in VERSIONS:
            notebook = build_one(course, path, version)
            target = course.built(path.stem, version)
            if target.exists():
                keep_outputs(notebook, read(target))
            write(notebook, target)
            written.append(target)
    return written


def set_repository(course: Course, repository: str) -> None:
    """Write `owner/name` into `[tool.minipeft] repository` of pyproject.toml, and change nothing else there."""
    if not REPOSITORY.fullmatch(repository):
        found = re.fullmatch(r"(?:https?://|git@)?(?:www\.)?github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
        did_you_mean = f"; did you mean {found[1]!r}?" if found and REPOSITORY.fullmatch(found[1]) else ""
        raise NotebookError(f"the repository is {repository!r}; expected owner/name as on GitHub{did_you_mean}")
    path = course.root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(r'(^\[tool\.minipeft\]\n(?:(?!\[).*\n)*?repository *= *)"[^"\n]*"', re.MULTILINE)
    new, count = pattern.subn(lambda found: f'{found[1]}"{repository}"', text)
    if count != 1:
        raise NotebookError(f'{path}: has no line repository = "owner/name" under [tool.minipeft]')
    path.write_text(new, encoding="utf-8")


# ---------------------------------------------------------------------------- looking for trouble


def is_stale(course: Course, path: Path, version: str) -> bool:
    """Whether the built notebook's cells differ from its source (outputs do not count)."""
    target = course.built(path.stem, version)
    if not target.exists():
        return True

    def essence(notebook):
        cells = [(c.cell_type, c.source, sorted(c.metadata.get("tags", [])), c.metadata.get("jupyter")) for c in notebook.cells]
        return cells, notebook.metadata.get("minipeft")

    return essence(read(target)) != essence(build_one(course, path, version))


def lines_of_code(code: str) -> int:
    """Lines that are neither blank nor only a comment."""
    return sum(1 for line in code.splitlines() if line.strip() and not line.strip().startswith("#"))


def check(course: Course) -> tuple[list[str], list[str]]:
    """All errors and all warnings about the sources and the built notebooks."""
    errors, warnings = [], []
    for path in course.sources:
        name = path.stem
        try:
            student = build_one(course, path, "student")
        except NotebookError as error:
            errors.append(str(error))
            continue
        for version in VERSIONS:
            target = course.built(name, version)
            if is_stale(course, path, version):
                errors.append(f"{target}: stale or missing; run: make notebooks")
            if target.exists():
                errors += [f"{target}: {problem}" for problem in _outputs_to_object_to(read(target))]
        written = sum("folded-solution" not in cell.metadata.get("tags", []) for cell in student.cells)
        if not FEWEST_CELLS <= written <= MOST_CELLS:
            errors.append(f"{path}: {written} cells; a notebook has {FEWEST_CELLS} to {MOST_CELLS}")
        if not (student.cells and student.cells[0].cell_type == "markdown" and student.cells[0].source.startswith("# ")):
            errors.append(f"{path}: the first cell is not a markdown cell with the title ('# …')")
        badges = re.findall(r"colab\.research\.google\.com/github/[^)\s\"]+", "\n".join(c.source for c in student.cells))
        for badge in badges:
            if not badge.endswith(f"/notebooks/{name}.ipynb"):
                errors.append(f"{path}: the Colab badge opens {badge.rsplit('/', 1)[-1]!r}, not '{name}.ipynb'")
        for cell in student.cells:
            if "setup" in cell.metadata.get("tags", []) and not all(part in cell.source for part in ON_COLAB):
                errors.append(f"{path}: the set-up cell does not prepare Colab; it needs {' and '.join(ON_COLAB)}")
        if not badges:
            warnings.append(f"{path}: no Colab badge")
        warnings += [f"{path}: {problem}" for problem in _cells_to_object_to(student)]
    for built in sorted([*course.folder.glob("*.ipynb"), *(course.folder / "solutions").glob("*.ipynb")]):
        if built.stem not in {path.stem for path in course.sources}:
            errors.append(f"{built}: has no source notebooks/source/{built.stem}.py")
    return errors, warnings


def _cells_to_object_to(student: nbformat.NotebookNode) -> list[str]:
    problems = []
    for index, cell in enumerate(student.cells, start=1):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        length = lines_of_code(cell.source)
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        if not length:
            problems.append(f"cell {index} is an empty code cell")
        if "setup" in tags and length > LONGEST_SETUP:
            problems.append(f"cell {index}, the set-up cell, has {length} lines of code; at most {LONGEST_SETUP}")
        exempt = {"setup", "figure", "solution"} & set(tags) or QUIZ in cell.source  # questions are text
        if length > LONGEST_CELL and not exempt:
            problems.append(f"cell {index} has {length} lines of code ({first!r} …); at most {LONGEST_CELL}")
        if "exercise" in tags and not re.search(r"\bcheck", cell.source):
            problems.append(f"cell {index} is an exercise without its check in the same cell ({first!r} …)")
    return problems


def _outputs_to_object_to(notebook: nbformat.NotebookNode) -> list[str]:
    """Committed outputs may hold no unexpected error and no path of somebody's machine."""
    problems = []
    for index, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
                problems.append(f"cell {index} has an error among its saved outputs: {output.ename}: {output.evalue}")
            for text in _texts(output):
                if found := MACHINE_PATH.search(text):
                    problems.append(f"cell {index} has a path of this machine among its saved outputs: {found[0]}")
    return problems


def _texts(output: nbformat.NotebookNode) -> list[str]:
    if output.output_type == "stream":
        return [output.text]
    if output.output_type == "error":
        return ["\n".join(output.traceback)]
    return [text for mime, text in output.data.items() if mime.startswith("text/") and isinstance(text, str)]


# ---------------------------------------------------------------------------- running


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels in the Python that runs this script, whatever kernelspecs are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


@dataclass
class Run:
    """What happened when a notebook was executed. `entry()` is its line in the manifest."""

    name: str
    version: str
    profile: str
    required: list[str]  # the figures it must record
    cells: int = 0  # code cells in the notebook
    executed: int = 0  # code cells that have run
    outputs: int = 0
    seconds: float = 0.0  # from the first cell on, without the kernel's start
    peak_memory: int = 0  # bytes, the kernel and its children together
    recorded: dict = field(default_factory=dict)
    checks: list = field(default_factory=list)
    source_hash: str = ""
    errors: list[str] = field(default_factory=list)
    failure: str = ""  # the failing cell and its traceback, to print
    html: Path | None = None

    def entry(self) -> dict:
        return {
            "notebook": self.name,
            "version": self.version,
            "profile": self.profile,
            "minutes": round(self.seconds / 60, 2),
            "peak_memory_gib": round(self.peak_memory / 2**30, 2),
            "code_cells": self.cells,
            "code_cells_executed": self.executed,
            "checks": {c["exercise"]: c["status"] for c in self.checks},
            "errors": self.errors,
            "source_hash": self.source_hash,
            **provenance(),
        }


def provenance() -> dict:
    """Date, machine in words, and versions: what every measured figure carries. No host name, no path."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from minipeft.lab import machine

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("minipeft", "torch", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": machine().summary,
        "versions": versions,
    }


def source_hash(course: Course, name: str) -> str:
    return hashlib.sha256((course.folder / "source" / f"{name}.py").read_bytes()).hexdigest()[:16]


class Watch:
    """Shows progress over cells and samples the memory of the kernel's process tree."""

    def __init__(self, label: str, cells: int, quiet: bool):
        from tqdm import tqdm

        self.label, self.quiet, self.begun = label, quiet, time.monotonic()
        self.heading, self.peak, self.pid, self.done = "", 0, None, False
        self.bar = tqdm(
            total=cells,
            desc=label,
            unit="cell",
            leave=False,
            disable=True if quiet else None,  # None: only on a terminal
            bar_format="{desc} {bar:20} {n_fmt}/{total_fmt} {elapsed} {postfix}",
        )
        self.cells = cells
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.done = True
        self.thread.join()
        self.bar.close()

    def start(self, heading: str, number: int) -> None:
        new, self.heading = heading != self.heading, heading
        self.bar.set_postfix_str(heading[:50])
        if self.bar.disable and not self.quiet and new:
            minutes, seconds = divmod(int(time.monotonic() - self.begun), 60)
            print(f"{self.label}  cell {number}/{self.cells}  {minutes}:{seconds:02d}  {heading}", flush=True)

    def _sample(self) -> None:
        import psutil

        while not self.done:
            if self.pid is not None:
                total = 0
                try:
                    kernel = psutil.Process(self.pid)
                    for process in [kernel, *kernel.children(recursive=True)]:
                        try:
                            total += process.memory_info().rss
                        except psutil.Error:
                            continue
                except psutil.Error:
                    pass
                self.peak = max(self.peak, total)
            self.bar.refresh()
            time.sleep(0.25)


def run(
    course: Course,
    name: str,
    version: str = "student",
    profile: str = "smoke",
    *,
    save: bool = False,
    quiet: bool = False,
    threads: int | None = None,
    seconds_allowed: float | None = None,
) -> Run:
    """Execute one built notebook in a fresh kernel and an empty folder; judge whether it really ran.

    `threads`: of each kernel's matrix products; None leaves them all cores. Always writes
    build/html/NN_name.html and the manifest entry, also when a cell fails.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    path = course.built(name, version)
    if not path.exists():
        raise NotebookError(f"{path}: not built yet; run: make notebooks")
    notebook = read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    allowed = seconds_allowed or SECONDS_ALLOWED[profile]
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    result = Run(name, version, profile, list(notebook.metadata.get("minipeft", {}).get("records", [])))
    result.source_hash = source_hash(course, name)

    headings, heading = {}, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := HEADING.findall(cell.source)):
            heading = found[-1].strip()
        headings[cell.id] = heading

    with tempfile.TemporaryDirectory(prefix="minipeft-") as scratch:
        empty, record, log = Path(scratch, "empty"), Path(scratch, "record.jsonl"), Path(scratch, "kernel.log")
        empty.mkdir()
        here = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = os.environ | {
            "MINIPEFT_PROFILE": profile,
            "MINIPEFT_RECORD": str(record),
            "PYTHONPATH": here,
            "IPYTHONDIR": str(Path(scratch, "ipython")),  # no start-up files, no history
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        if threads:
            env["OMP_NUM_THREADS"] = str(threads)
        begun = time.monotonic()
        with Watch(f"{name} ({version}, {profile})", len(code_cells), quiet) as watch:

            def cell_starts(cell, cell_index):
                watch.pid = getattr(client.km.provisioner, "pid", None)
                watch.start(headings[cell.id], result.executed + 1)

            def cell_done(cell, cell_index, execute_reply):
                result.executed += 1
                watch.bar.update()

            client = NotebookClient(
                notebook,
                kernel_manager_class=ThisInterpreter,
                kernel_name="python3",
                startup_timeout=180,
                resources={"metadata": {"path": str(empty)}},
                store_widget_state=False,
                timeout_func=lambda cell: max(1, int(begun + allowed - time.monotonic())),
                on_cell_execute=cell_starts,
                on_cell_executed=cell_done,
            )
            started = begun
            try:
                with log.open("w") as kernel_log, client.setup_kernel(env=env, stderr=kernel_log):
                    started = time.monotonic()
                    for index, cell in enumerate(notebook.cells):
                        client.execute_cell(cell, index)
            except CellExecutionError as error:
                result.failure = str(error)  # `faults` adds the line for the manifest
            except CellTimeoutError:
                result.errors.append(f"took longer than {allowed:.0f} s, in {watch.heading!r}")
            except DeadKernelError:
                result.errors.append(f"the kernel died in {watch.heading!r} (out of memory?)")
                result.failure = log.read_text(errors="replace")[-3000:]
            except RuntimeError as error:
                result.errors.append(f"the kernel did not start: {error}")
        result.seconds = time.monotonic() - started
        result.peak_memory = watch.peak
        if record.exists():
            for line in record.read_text(encoding="utf-8").splitlines():
                result.recorded.update(json.loads(line))

    for cell in notebook.cells:
        clean(cell)
    result.cells = len(code_cells)
    result.outputs = sum(len(cell.outputs) for cell in code_cells)
    result.checks = [
        output.data[CHECK_MIME]
        for cell in code_cells
        for output in cell.outputs
        if CHECK_MIME in output.get("data", {})
    ]
    result.errors += faults(notebook, result)
    write_manifest(course, result)
    result.html = _write_html(course, notebook, result)
    if save and not result.errors:
        write(notebook, path)
    return result


def clean(cell: nbformat.NotebookNode) -> None:
    """Drop what cannot be read back: live widgets, where a static fallback stands beside them."""
    if cell.cell_type != "code":
        return
    cell.metadata.pop("execution", None)
    kept = []
    for output in cell.outputs:
        data = output.get("data", {})
        if WIDGET_MIME in data:
            del data[WIDGET_MIME]
            if not any(mime.startswith(("text/html", "text/markdown", "image/")) for mime in data):
                continue
        kept.append(output)
    cell.outputs = kept


def faults(notebook: nbformat.NotebookNode, result: Run) -> list[str]:
    """Why this notebook counts as failed; empty if it really ran and did what it must."""
    found = []
    headline = ""
    for index, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "markdown" and (found_heading := HEADING.findall(cell.source)):
            headline = found_heading[-1].strip()
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        raised = [o for o in cell.outputs if o.output_type == "error"]
        if raised and "raises-exception" not in tags:
            found.append(f"cell {index} ({headline}) raised {raised[0].ename}: {raised[0].evalue}")
        if not raised and "raises-exception" in tags and cell.execution_count is not None:
            found.append(f"cell {index} ({headline}) should raise an exception and did not")
        if cell.execution_count is None:
            if not found and not result.errors:  # after the first failure, the count below says it
                found.append(f"cell {index} ({headline}) has no execution count: it did not run")
        elif "exercise" in tags and not raised:
            found += [f"cell {index} ({headline}): {problem}" for problem in _exercise_faults(cell, result.version)]
    if result.executed != result.cells:
        found.append(f"{result.executed} of {result.cells} code cells ran")
    if not result.cells:
        found.append("it has no code cell")
    elif not found:
        if result.seconds < SHORTEST_RUN:
            found.append(f"it ran in {result.seconds:.3f} s; nothing real is that fast")
        if not result.outputs:
            found.append("no cell has any output")
    missing = [key for key in result.required if key not in result.recorded]
    if missing:
        found.append(f"it did not record {', '.join(missing)} (recorded: {', '.join(result.recorded) or 'nothing'})")
    return found


def _exercise_faults(cell: nbformat.NotebookNode, version: str) -> list[str]:
    """A stub must be *not attempted* in every check of its cell, a solution *passed* (or *not checked*, for want of a compiler)."""
    expected = "not attempted" if version == "student" else "passed"
    checks = [o.data[CHECK_MIME] for o in cell.outputs if CHECK_MIME in o.get("data", {})]
    if not checks:
        return ["an exercise, but no check was shown in its cell"]
    return [
        f"exercise {c['exercise']} is {c['status']!r}, expected {expected!r}: {c['why']}"
        for c in checks
        if c["status"] != expected and (version, c["status"]) != ("solutions", "not checked")
    ]


def _write_html(course: Course, notebook: nbformat.NotebookNode, result: Run) -> Path:
    from nbconvert import HTMLExporter

    folder = course.root / "build" / "html"
    path = (folder if result.version == "student" else folder / "solutions") / f"{result.name}.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    html, _ = HTMLExporter().from_notebook_node(
        notebook, resources={"metadata": {"name": result.name, "path": str(course.folder)}}
    )
    path.write_text(html, encoding="utf-8")
    return path


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_manifest(course: Course, run: Run) -> None:
    name = f"{run.name}.{run.version}.{run.profile}.json"
    _write_json(course.root / "build" / "manifest" / name, run.entry() | {"figures": run.recorded})


def run_unless_stale(course: Course, name: str, version: str, profile: str, **how) -> Run:
    if is_stale(course, course.folder / "source" / f"{name}.py", version):
        return Run(name, version, profile, [], errors=["stale or not built; run: make notebooks"])
    return run(course, name, version, profile, **how)


def test(course: Course, names: list[str]) -> list[Run]:
    """Run both versions of each in the smoke profile, as many side by side as there are cores, one thread each:
    these runs are mostly Python and small models. A kernel may take 4 GiB."""
    import psutil

    side_by_side = max(1, min(os.cpu_count() or 1, psutil.virtual_memory().total // 2**32))

    def one(job: tuple[str, str]) -> Run:
        result = run_unless_stale(course, *job, "smoke", quiet=True, threads=1)
        report(result)
        return result

    with ThreadPoolExecutor(side_by_side) as pool:
        return list(pool.map(one, [(name, version) for name in names for version in VERSIONS]))


def results(course: Course, names: list[str], profile: str) -> list[Run]:
    """Run the solutions and write what was measured to data/results/."""
    runs = []
    for name in names:
        runs.append(run_unless_stale(course, name, "solutions", profile))
        report(runs[-1])
        if not runs[-1].errors:
            keep(course, name, profile)
    return runs


def keep(course: Course, name: str, profile: str) -> Path:
    """Write what the newest run of this notebook in this profile has measured to data/results/, from its manifest."""
    found = [course.root / "build" / "manifest" / f"{name}.{version}.{profile}.json" for version in VERSIONS]
    found = sorted((path for path in found if path.exists()), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NotebookError(f"{name} has not been run in the {profile} profile here; run it first: make run NB={name[:2]}")
    entry = json.loads(found[-1].read_text(encoding="utf-8"))
    if entry["errors"]:
        raise NotebookError(f"the last run of {name} failed: {entry['errors'][0]}")
    if entry["source_hash"] != source_hash(course, name):
        raise NotebookError(f"{name} has been changed since its last run ({entry['date']}); run it again: make run NB={name[:2]}")
    version, figures = entry.pop("version"), entry.pop("figures")
    entry["command"] = f"python notebooks/tools.py run {name[:2]}{' --solutions' * (version == 'solutions')} --profile {profile}"
    entry = {k: v for k, v in entry.items() if k not in ("notebook", "errors", "profile")}
    folder = course.root / "data" / "results"
    table = json.loads((folder / "notebooks.json").read_text(encoding="utf-8")) if (folder / "notebooks.json").exists() else {}
    table.setdefault(name, {})[profile] = entry
    _write_json(folder / "notebooks.json", table)
    path = folder / f"{name}{'' if profile == 'cpu' else '.' + profile}.json"
    if figures:
        about = {k: entry[k] for k in ("command", "date", "device", "versions", "source_hash")}
        _write_json(path, {"notebook": name, "profile": profile, **about, "figures": figures})
    return path


# ---------------------------------------------------------------------------- the command line


def report(result: Run) -> None:
    """One line, and on a failure the reasons."""
    verdict = "FAILED" if result.errors else "passed"
    print(
        f"{verdict}  {result.name:28} {result.version:9} {result.profile:5} "
        f"{result.seconds / 60:6.2f} min  {result.peak_memory / 2**30:5.2f} GiB",
        flush=True,
    )
    for error in result.errors:
        print(f"        {error}", flush=True)
    if result.failure:
        failure = result.failure if sys.stdout.isatty() else re.sub(r"\x1b\[[0-9;]*m", "", result.failure)
        print("\n" + textwrap.indent(failure.strip(), "    ") + "\n", flush=True)


def main(argv: list[str] | None = None, course: Course | None = None) -> int:
    course = course or Course()
    parser = argparse.ArgumentParser(prog="notebooks/tools.py", description="Build, run and check the notebooks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="source/*.py to student and solution notebooks")
    commands.add_parser("check", help="markers, stale builds, long cells, stray paths")
    one = commands.add_parser("run", help="run one notebook headless, write an HTML of it")
    one.add_argument("notebook", help="for example 05, 05_lora or lora")
    one.add_argument("--solutions", action="store_true", help="the version with the exercises solved")
    one.add_argument("--profile", choices=PROFILES, help="default: MINIPEFT_PROFILE, else gpu or cpu as there is")
    one.add_argument("--save", action="store_true", help="store the outputs in the .ipynb")
    every = commands.add_parser("test", help="run every notebook in both versions, smoke profile")
    every.add_argument("notebooks", nargs="*", help="only these")
    measured = commands.add_parser("results", help="run every solution notebook and write data/results")
    measured.add_argument("notebooks", nargs="*", help="only these")
    measured.add_argument("--profile", choices=PROFILES, default="cpu")
    kept = commands.add_parser("keep", help="write data/results from the last run of each, without running it again")
    kept.add_argument("notebooks", nargs="+")
    kept.add_argument("--profile", choices=PROFILES, default="cpu")
    badges = commands.add_parser("badges", help="set where the course is published, and build")
    badges.add_argument("repository", help="owner/name as on GitHub")
    args = parser.parse_args(argv)
    try:
        return _do(args, course)
    except NotebookError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _do(args: argparse.Namespace, course: Course) -> int:
    if args.command == "badges":
        set_repository(course, args.repository)
        written = build(course)
        print(f"{args.repository}: pyproject.toml and {len(written)} notebooks; commit them together")
        return 0
    if args.command == "build":
        for path in build(course):
            print(path.relative_to(course.root))
        return 0
    if args.command == "check":
        errors, warnings = check(course)
        for line in [*(f"error: {e}" for e in errors), *(f"warning: {w}" for w in warnings)]:
            print(line)
        print(f"{len(course.sources)} notebooks, {len(errors)} errors, {len(warnings)} warnings")
        return 1 if errors else 0
    if args.command == "run":
        version = "solutions" if args.solutions else "student"
        name = course.find(args.notebook)
        if is_stale(course, course.folder / "source" / f"{name}.py", version):
            print(f"warning: {name} is stale; run: make notebooks", file=sys.stderr)
        result = run(course, name, version, args.profile or default_profile(), save=args.save)
        report(result)
        print(f"look at it: {result.html.relative_to(course.root)}")
        return 1 if result.errors else 0

    names = [course.find(n) for n in args.notebooks] or [path.stem for path in course.sources]
    if args.command == "keep":
        for name in names:
            print(keep(course, name, args.profile).relative_to(course.root))
        return 0
    if args.command == "results":
        runs = results(course, names, args.profile)
    else:
        runs = test(course, names)
    failed = sum(bool(r.errors) for r in runs)
    print(f"{len(runs) - failed} passed, {failed} failed")
    return 1 if failed or not runs else 0


def default_profile() -> str:
    if os.environ.get("MINIPEFT_PROFILE"):
        return os.environ["MINIPEFT_PROFILE"]
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    sys.exit(main())
