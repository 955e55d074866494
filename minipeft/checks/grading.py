"""Grade students' notebooks: `python -m minipeft.checks grade FILE_OR_FOLDER … --out grades`.

For every exercise of a notebook's chapter, the student's answer runs in a fresh process (`desk.py`) with a time
and a memory limit. This process, which never runs a student's code, draws the cases from a fresh seed, sends
the inputs over, gets plain numbers back and compares. Printing "passed", patching the checks, or writing to the
channel therefore gains nothing: whatever comes back must be the right answer to inputs drawn a moment ago.

What stays possible. Checks that look at live objects (gradients, which parameters train, a module) make their
observation beside the student's code: whoever patches PyTorch well enough to report the right observation without
the work, or hides that an argument was changed, passes. An answer may call this package, as in the notebook;
a note says where one uses the checks' own code. And the process runs under your account: the audit hook stops
accidents and simple attempts to start processes, to reach the network or other files, not an expert. Grade
strangers' work in a container or under an account of its own. Memory is limited on Linux only.

In the folder `out`: exercises.jsonl, a line as soon as an exercise is judged (a second run goes on from there);
grades.json, exercises.csv and points.csv (one row a notebook), written anew after each notebook.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pickle
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from minipeft.checks import desk, exercises
from minipeft.checks.frame import Attempt, Case, Exercise

LARGEST = 50 * 2**20  # bytes of a notebook
LONGEST = 400  # letters of a reason
PATIENCE = 5  # how many times its processor time an answer may take on the clock, for it may not run alone
PASSED_ON = re.compile("PATH|HOME|LANG|LC_.*|LD_LIBRARY_PATH|CXX|VIRTUAL_ENV|XDG_CACHE_HOME|MINIPEFT_.*")
OWN_CODE = re.compile(r"\b(?:checks?|ch\d\d_\w+)\._\w+|minipeft\.checks(?:\.| import [\w ,()]*)\b(?:frame|desk|grading)\b"
                      r"|minipeft\.checks\.ch\d\d_\w+\s+(?:import|as)\b|\.cases\s*\(")


@dataclass
class Grade:
    """One exercise of one notebook. `points` of `of`; `note`: something for a person to look at."""

    file: str
    sha256: str
    chapter: str
    exercise: str
    status: str  # a Check's, or "unreadable" for a whole notebook
    points: int
    of: int
    why: str = ""
    likely: str = ""
    case: str = ""
    seed: int | None = None
    seconds: float = 0.0
    note: str = ""
    limits: str = ""  # part of what makes an earlier grade count


# ---------------------------------------------------------------------------- reading


class Unreadable(Exception):
    """This file cannot be graded, and the message says why."""


def read_cells(path: Path) -> tuple[list[str], str]:
    """The sources of a notebook's code cells, and the number of its chapter, "05". Nothing is run or parsed as Python."""
    try:
        if not path.is_file():
            raise Unreadable("it is not an ordinary file")
        if path.stat().st_size > LARGEST:
            raise Unreadable(f"it has {path.stat().st_size / 2**20:,.0f} MB; {LARGEST // 2**20} at most")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"it is not JSON: {error}" if isinstance(error, (ValueError, RecursionError)) else f"{error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise Unreadable("it is not a notebook: it has no list of cells")
    cells = [_source(cell) for cell in content["cells"] if isinstance(cell, dict) and cell.get("cell_type") == "code"]
    settings = content.get("metadata")
    settings = settings.get("minipeft") if isinstance(settings, dict) else None
    named = str(settings.get("notebook", "")) if isinstance(settings, dict) else ""
    imported = next(filter(None, (re.search(r"minipeft\.checks(?: import |\.)ch(\d\d)", cell) for cell in cells)), None)
    found = re.match(r"(\d\d)_", named) or imported or re.search(r"(?<!\d)(\d\d)_", path.name)
    if not found:
        raise Unreadable("it belongs to no chapter of this course: it imports no chapter's checks")
    return cells, found[1]


def _source(cell: dict) -> str:
    source = cell.get("source", "")
    return "".join(map(str, source)) if isinstance(source, list) else str(source)


def notebooks_in(paths: Iterable[str | Path]) -> list[Path]:
    """The given files, and all notebooks in the given folders."""
    found = []
    for path in map(Path, paths):
        if not os.path.lexists(path):
            raise ValueError(f"there is no file or folder {str(path)!r}")
        inside = sorted(path.rglob("*.ipynb")) if path.is_dir() else [path]
        found += [p for p in inside if ".ipynb_checkpoints" not in p.parts]
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------- the processes


class Room:
    """The process from which the students' processes are forked, and a folder for what these write."""

    def __enter__(self) -> Room:
        self.folder = Path(tempfile.mkdtemp()).resolve()
        self._open()
        return self

    def __exit__(self, *_) -> None:
        self._close()
        remove(self.folder)

    def _open(self) -> None:
        self.control, theirs = socket.socketpair()
        package = str(Path(desk.__file__).parents[2])
        environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)} | {
            "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "MINIPEFT_PROFILE": "smoke"}  # fmt: skip
        command = [sys.executable, "-P", "-c", f"from minipeft.checks import desk; desk.host({theirs.fileno()})"]
        self.host = subprocess.Popen(command, env=environment, cwd=self.folder, pass_fds=[theirs.fileno()],
                                     stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        theirs.close()

    def _close(self) -> None:
        self.control.close()
        self.host.kill()
        self.host.wait()

    def seat(self) -> tuple[socket.socket, int]:
        """A socket to a fresh process, and its number. If the host has been killed, there is a new one."""
        for _ in range(2):
            ours, theirs = socket.socketpair()
            with suppress(OSError), theirs:
                socket.send_fds(self.control, [b"."], [theirs.fileno()])
            if (number := self._told(600)) is not None:
                return ours, number
            ours.close()
            self._close()
            self._open()
        raise RuntimeError("the process in which answers run does not start")

    def clear(self, number: int, patience: float) -> int | None:
        """End a process and what it has started. Its exit status if it ended by itself within `patience` seconds."""
        status = self._told(patience)
        if status is None:
            with suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
            if self._told(60) is None:  # the host is gone, or stuck
                self._close()
                self._open()
        return status

    def _told(self, seconds: float) -> int | None:
        """The next number from the host."""
        if not select.select([self.control], [], [], seconds)[0]:
            return None
        with suppress(OSError):
            if len(number := self.control.recv(8, socket.MSG_WAITALL)) == 8:
                return struct.unpack("<q", number)[0]
        return None


def remove(folder: Path) -> None:
    """The folder and what is in it, however deep somebody has made it."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        subprocess.run(["rm", "-rf", "--", folder], stderr=subprocess.DEVNULL)


class Student:
    """One answer of one notebook, in a process of its own from the first case on. A context manager."""

    def __init__(self, room: Room, task: dict):
        self.room, self.task, self.channel = room, task, None
        self.over: Attempt | None = None  # how it ended, if it has
        self.started = time.monotonic()

    def __enter__(self) -> Student:
        return self

    def __exit__(self, *_) -> None:
        self._leave(0.0)

    def attempt(self, case: Case) -> Attempt:
        """What the answer makes of `case`, as `frame.attempt` would tell it."""
        question = pickle.dumps((case.given, case.observe, case.may_change))
        try:
            if self.channel is None and self.over is None:
                self.channel, self.number = self.room.seat()
                self.started = time.monotonic()
                found = self._ask(pickle.dumps(self.task))
                self.over = None if found.status == "returned" else found
            return self.over or self._ask(question)
        except TimeoutError:
            why = f"took longer than {PATIENCE * self.task['seconds']:g} s"
        except (EOFError, OSError):
            status = self._leave(1.0)
            if status in (-signal.SIGXCPU, -signal.SIGKILL):
                why = f"took longer than {self.task['seconds']:g} s of processor time"
            else:
                why = f"its process was killed by signal {-status}" if status and status < 0 else "its process ended itself"
        except Exception as error:
            why = f"what it sent cannot be read: {type(error).__name__}: {error}"
        self._leave(0.0)
        self.over = Attempt(status="failed", why=why)
        return self.over

    def _ask(self, question: bytes) -> Attempt:
        def left() -> float:
            if (seconds := self.started + PATIENCE * self.task["seconds"] - time.monotonic()) <= 0:
                raise TimeoutError
            return seconds

        self.channel.settimeout(left())
        desk.send(self.channel, question)
        message = json.loads(desk.receive(self.channel, left))
        found = Attempt(desk.from_plain(message.get("value")), message["status"], str(message["why"]))
        if found.status not in ("returned", "nothing", "not attempted", "not checked", "failed"):
            raise ValueError(f"the status {found.status!r}")
        return found

    def _leave(self, patience: float) -> int | None:
        if self.channel is None:
            return None
        status = self.room.clear(self.number, patience)
        self.channel.close()
        self.channel = None
        return status


# ---------------------------------------------------------------------------- grading


def grade(paths: Iterable[str | Path], out: str | Path, *, seconds: float = 10.0, megabytes: int = 2048) -> list[Grade]:
    """Grade these notebooks, and those in these folders. Writes to the folder `out`; returns all grades.

    seconds    of processor time for one exercise, its helpers and imports included; five times that on the clock
    megabytes  that one answer may map beyond what PyTorch itself takes (Linux)

    Raises ValueError if there is no notebook. Whatever is wrong with a notebook is in its grades.
    """
    files = notebooks_in(paths)
    if not files:
        raise ValueError(f"no notebook (*.ipynb) in {', '.join(map(str, paths)) or 'nothing'}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{str(out)!r} is a file; the grades need a folder")
    out.mkdir(parents=True, exist_ok=True)
    journal = out / "exercises.jsonl"
    limits, earlier = f"{seconds:g} s, {megabytes} MB", _earlier(journal)
    plans = [_plan(file, limits) for file in tqdm(files, desc="reading", leave=False)]
    made = [out / name for name in ("exercises.jsonl", "grades.json", "exercises.csv", "points.csv")]
    closed = [os.path.realpath(p) for p in [*files, *made, *_solutions()]]
    grades: list[Grade] = []
    with Room() as room, journal.open("a", encoding="utf-8") as lines, tqdm(total=sum(map(len, plans)), unit="exercise") as bar:
        if journal.stat().st_size and not journal.read_bytes().endswith(b"\n"):
            lines.write("\n")                                    # the last line was cut off
        for plan in plans:
            for skeleton, name, cells in plan:
                bar.set_postfix_str(f"{Path(skeleton.file).name} {skeleton.exercise}")
                found = earlier.get(_key(skeleton))
                if found is None:
                    found = skeleton
                    if skeleton.status != "unreadable":
                        task = {"cells": cells, "chapter": skeleton.chapter, "name": name, "closed": closed,
                                "seconds": seconds, "megabytes": megabytes}  # fmt: skip
                        _judge(room, found, task)
                    lines.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")
                    lines.flush()
                grades.append(found)
                bar.update()
            _write(out, grades)
    return grades


def _solutions() -> list[Path]:
    """Where this course keeps solutions: beside the package, in a checkout or in a wheel."""
    package = Path(desk.__file__).parents[1]
    return [package.parent / "notebooks", package.parent / "tests", package / "_notebooks"]


def _plan(file: Path, limits: str) -> list[tuple[Grade, str, list[str]]]:
    """A grade to be filled in for each exercise of the notebook's chapter, with the check's name and the code cells."""
    cells, trouble, number, content = [], "", "", b""
    try:
        cells, number = read_cells(file)
        content = file.read_bytes()
    except (Unreadable, OSError) as error:
        trouble = str(error)
        number = found[1] if (found := re.search(r"(?<!\d)(\d\d)_", file.name)) else ""
    known = [(id, e) for id, e in exercises().items() if number and e.chapter.startswith(f"ch{number}_")]
    named = os.fsencode(file).decode("utf-8", "backslashreplace")    # a name may be no UTF-8, and goes into files that are
    blank = {"file": named, "sha256": hashlib.sha256(content).hexdigest(), "limits": limits, "points": 0}
    if trouble or not known:
        reason = (trouble or f"no chapter {number} has exercises")[:LONGEST]
        chapter = known[0][1].chapter if known else ""
        return [(Grade(**blank, chapter=chapter, exercise="", status="unreadable", of=sum(e.points for _, e in known), why=reason), "", [])]
    note = ", ".join(sorted({found for cell in cells for found in OWN_CODE.findall(cell)}))
    note = f"uses the checks' own code: {note}"[:LONGEST] if note else ""
    return [(Grade(**blank, chapter=e.chapter, exercise=id, status="", of=e.points, note=note), _name_in_module(e), cells) for id, e in known]


def _name_in_module(exercise: Exercise) -> str:
    """What the notebook calls the check: `lora_forward` in `check.lora_forward(...)`."""
    return next(name for name, value in vars(sys.modules[exercise.__module__]).items() if value is exercise)


def _judge(room: Room, grade: Grade, task: dict) -> None:
    """Fill in the grade of one exercise."""
    folder = tempfile.mkdtemp(dir=room.folder)
    try:
        with Student(room, task | {"folder": folder}) as student:
            try:
                check = exercises()[grade.exercise].judge(student.attempt)
                grade.status, grade.seed = check.status, check.seed
                grade.points = check.points if check.passed else 0
                grade.why, grade.likely, grade.case = (_readable(text) for text in (check.why, check.likely, check.case))
            except Exception as error:  # one answer must not stop the others' grades
                grade.status, grade.why = "broken", _readable(f"the grader could not judge it: {type(error).__name__}: {error}")
            grade.seconds = round(time.monotonic() - student.started, 2)
    finally:
        remove(Path(folder))


def _readable(text: str) -> str:
    """One line of printable letters, not too long: it may come from a student's exception."""
    return "".join(c if c.isprintable() else " " for c in text[: 4 * LONGEST]).strip()[:LONGEST]


def _key(grade: Grade) -> tuple:
    return grade.file, grade.sha256, grade.exercise, grade.limits


def _earlier(journal: Path) -> dict[tuple, Grade]:
    """What an interrupted run has already judged. A line that was cut off counts for nothing, nor does what could not be
    judged then: a compiler that was missing may be there now."""
    found = {}
    for line in journal.read_bytes().decode("utf-8", "replace").split("\n") if journal.exists() else []:
        with suppress(ValueError, TypeError):
            grade = Grade(**json.loads(line))
            if grade.status not in ("not checked", "broken"):
                found[_key(grade)] = grade
    return found


def _write(out: Path, grades: list[Grade]) -> None:
    """grades.json, exercises.csv and points.csv, each replaced whole."""
    rows = [asdict(grade) for grade in grades]
    for row in rows:
        del row["sha256"], row["limits"]
    table: dict[str, dict] = {}
    for g in grades:
        row = table.setdefault(g.file, {"file": g.file, "chapter": g.chapter, "points": 0, "of": 0, "not passed": "", "note": g.note})
        row["points"], row["of"] = row["points"] + g.points, row["of"] + g.of
        if g.status != "passed":
            row["not passed"] += f"{'; ' * bool(row['not passed'])}{g.exercise + ': ' if g.exercise else ''}{g.status}"
    with _replaced(out / "grades.json") as file:
        json.dump(rows, file, indent=1, ensure_ascii=False)
    for name, lines in (("exercises.csv", rows), ("points.csv", list(table.values()))):
        with _replaced(out / name) as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in line.items()} for line in lines)


def _cell(value):
    """A text that a spreadsheet does not take for a formula."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


@contextmanager
def _replaced(path: Path) -> Iterator:
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8", newline="") as file:
        yield file
    os.replace(new, path)
