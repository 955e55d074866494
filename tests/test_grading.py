"""The grader: thirty notebooks of chapter 5, honest and hostile, and what each of them is given for it.

The hostile ones spoil one exercise, `lora-forward` of 2 points, and solve the other four: they must lose these 2
points, for the reason told, and nothing else; nor may any other notebook, nor the grader.
"""

import csv
import json
import math
import os
import sys
import textwrap
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from minipeft.checks import __main__ as command
from minipeft.checks import desk, exercises, frame, grading
from tests.test_checks import RIGHT, WRONG

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="grading needs fork")
ROOT = Path(__file__).resolve().parent.parent
ALL = sum(e.points for e in exercises("ch05_lora").values())
FORWARD = exercises()["lora-forward"].points
RIGHT_LINE = "return x @ W.T + alpha / rank * (x @ A.T) @ B.T"
SEEN = {"data": {frame.CHECK_MIME: {"exercise": "lora-forward", "status": "passed", "points": 99}}, "metadata": {}, "output_type": "display_data"}


def notebook(version="solutions"):
    folder = ROOT / "notebooks" / (version if version == "solutions" else "")
    return json.loads((folder / "05_lora.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def changed(old, new, version="solutions"):
    """The notebook with `old` in one of its code cells replaced by `new`."""
    made = notebook(version)
    [cell] = [c for c in made["cells"] if c["cell_type"] == "code" and old in source(c)]
    cell["source"] = source(cell).replace(old, new)
    return made


def code(text):
    return {"cell_type": "code", "source": textwrap.dedent(text).splitlines(keepends=True), "metadata": {}, "outputs": [], "execution_count": 1}


def forward(body):
    """The solved notebook with this body in `lora_forward`."""
    return changed(RIGHT_LINE, textwrap.indent(textwrap.dedent(body).strip(), "    ").lstrip())


def with_cells(made, *texts, before="def lora_forward"):
    at = next(i for i, c in enumerate(made["cells"]) if before in source(c) and c["cell_type"] == "code")
    made["cells"][at:at] = [code(text) for text in texts]
    return made


def printing_passed():
    made = forward('print("lora-forward: passed  (2 points)")')
    [cell] = [c for c in made["cells"] if c["cell_type"] == "code" and "def lora_forward" in source(c)]
    cell["outputs"] = [SEEN]
    return made


# name -> (notebook, words in the reason)
HOSTILE = {
    "prints that it passed": (printing_passed(), "returned nothing"),
    "loops for ever": (forward("while True: pass"), "took longer than 2 s"),
    "loops for ever in what the answer needs": (
        with_cells(forward("return x @ W.T * ready"), "ready = 0\nwhile True:\n    ready = 1\n"), "took longer than 2 s"),
    "sleeps for ever": (forward("import time\nwhile True: time.sleep(1)"), "took longer than"),
    "asks for all memory at once": (forward("return torch.ones(2**40)"), "alloc"),
    "eats memory bite by bite": (forward("eaten = []\nwhile True: eaten.append(bytearray(2**26))"), "MemoryError"),
    "is a fork bomb": (forward("import os\nwhile True: os.fork()"), "PermissionError: os.fork is not allowed"),
    "leaves a process behind": (forward('import subprocess\nsubprocess.Popen(["sleep", "1000"], start_new_session=True)'), "PermissionError"),
    "ends its process": (forward("import os\nos._exit(0)"), "its process ended itself"),
    "raises SystemExit": (forward("import sys\nsys.exit(0)"), "SystemExit"),
    "raises what nobody catches": (forward("raise KeyboardInterrupt"), "its process ended itself"),
    "crashes the interpreter": (forward("import faulthandler\nfaulthandler._sigsegv()"), "killed by signal 11"),
    "kills the grader": (forward("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"), "PermissionError: os.kill"),
    "patches the checks": (forward("""
        from minipeft.checks import ch05_lora, frame, grading
        for module in (frame, ch05_lora, grading):
            for name in ("attempt", "distance", "relative_error", "same_bytes", "_compare", "wrong_kind"):
                setattr(module, name, lambda *a, **k: 0.0)
        frame.Exercise.judge = frame.Exercise._judge = lambda self, *a, **k: {"status": "passed"}
        frame.Check.passed = True
        frame.Attempt = lambda *a, **k: type("A", (), {"status": "passed", "why": "", "value": 99})()
        return x @ W.T"""), "what it sent cannot be read"),
    "patches PyTorch": (forward("""
        torch.equal = torch.allclose = lambda *a, **k: True
        torch.Tensor.__sub__ = lambda a, b: a * 0
        torch.Tensor.abs = lambda a: a * 0
        return x @ W.T"""), "off by"),
    "writes to the grader's channel": (forward("""
        import json, os, struct
        forged = json.dumps({"status": "passed", "why": "", "points": 99, "value": None}).encode()
        for number in range(3, 64):
            try:
                os.write(number, struct.pack("<Q", len(forged)) + forged)
            except OSError:
                pass
        return x @ W.T"""), "what it sent cannot be read"),
    "promises a message of exabytes": (forward("""
        import os, struct
        for number in range(3, 64):
            try:
                os.write(number, struct.pack("<Q", 2**60))
            except OSError:
                pass
        return x @ W.T"""), "bytes; 16,777,216 at most"),
    "looks for the right answer in memory": (forward("""
        import gc
        from minipeft.checks.frame import Case
        wanted = [case.want for case in gc.get_objects() if type(case) is Case and case.want is not None]
        return wanted[0].float() if wanted else x @ W.T"""), "off by"),
    "reads the solution": (forward(f'return open({str(ROOT / "notebooks" / "solutions" / "05_lora.ipynb")!r}).read()'), "PermissionError: open"),
    "writes into the grader's folder": (forward(f'open({str(ROOT / "written_by_a_student")!r}, "w").write("x")'), "PermissionError: open"),
    "writes past Python": (forward(f'torch.save(x, {str(ROOT / "written_by_a_student")!r})'), "PermissionError: open"),
    "reads the solution past Python": (forward(
        f'return torch.from_file({str(ROOT / "notebooks" / "solutions" / "05_lora.ipynb")!r}, False, 9, dtype=torch.uint8)'), "PermissionError: open"),
    "makes folders without end": (forward("""
        import os
        at = os.open(".", os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("a", dir_fd=at)
            at, before = os.open("a", os.O_RDONLY, dir_fd=at), at
            os.close(before)
        return x @ W.T"""), "off by"),
    "returns what equals everything": (forward("""
        class Liar(torch.Tensor):
            __torch_function__ = classmethod(lambda *a, **k: torch.tensor(0.0))
        return x.as_subclass(Liar)"""), "returned a Liar"),
    "returns a list that holds itself": (forward("y = []\ny.append(y)\nreturn y"), "RecursionError"),
    "returns more than can be read": (forward("return torch.zeros(2**22)"), "bytes; 16,777,216 at most"),
    "writes a spreadsheet formula": (forward("raise NotImplementedError('=HYPERLINK(0)')"), "=HYPERLINK(0)"),
}  # fmt: skip

FILES = {
    "malformed": "{\"cells\": [{\"cell_type\": \"code\", ",
    "empty": "",
    "a list": "[]",
    "nested too deeply": "[" * 200_000,
    "not text": b"\xff\xfe\x00PK\x03\x04",
    "without cells": json.dumps({"cells": {"a": 1}, "metadata": {"minipeft": 3}}),
    "strange cells": json.dumps({"cells": [None, 3, {"cell_type": "code", "source": {"a": 1}}, {"cell_type": "code"}], "metadata": []}),
}

RENAMED = changed("check.lora_forward(lora_forward)", "def mine(*args): return lora_forward(*args)\n\n_ = check.lora_forward(mine)")
HONEST = {
    "solved": (notebook(), ALL),
    "unsolved": (notebook("student"), 0),
    "with a helper and a constant in cells of their own": (
        with_cells(forward("return plain(x, W) + HALF * 2 * alpha / rank * (x @ A.T) @ B.T"),
                   "%matplotlib inline\nHALF, other = 0.5, 2", "def plain(x, W):\n    return np.float32(1) * (x @ W.T)", "import numpy as np"), ALL),
    "with the function under another name": (RENAMED, ALL),
    "with help and magics beside it": (changed(RIGHT_LINE, RIGHT_LINE + "\n\ntorch.einsum?\n?torch\nseen = !ls\nbest = %timeit -o 1\n%time"), ALL),
    "without the check's call": (changed("\ncheck.lora_forward(lora_forward)", ""), ALL),
    "not Python in one cell": (forward("return x @@ W"), ALL - FORWARD),
    "with a raise for a stub": (forward("raise NotImplementedError"), ALL - FORWARD),
    "scaled by alpha": (forward("return x @ W.T + alpha * (x @ A.T) @ B.T"), ALL - FORWARD),
}  # fmt: skip


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def graded(tmp_path_factory, monkeypatch_module):
    """All of them, graded in one go: (file's stem -> exercise -> grade, the folder with the results)."""
    folder = tmp_path_factory.mktemp("class")
    for name, (made, _) in (HOSTILE | HONEST).items():
        (folder / f"{name}.ipynb").write_text(json.dumps(made))
    for name, content in FILES.items():
        (folder / f"05_{name}.ipynb").write_bytes(content if isinstance(content, bytes) else content.encode())
    with (folder / "05_huge.ipynb").open("wb") as huge:
        huge.truncate(2**33)  # takes no room on the disk
    os.mkfifo(folder / "05_fifo.ipynb")
    out = folder / "out"
    monkeypatch_module.setattr(grading, "PATIENCE", 10)  # the tests run beside others
    assert command.main(["grade", str(folder), "--out", str(out), "--time-limit", "2", "--memory-limit", "500"]) == 0
    found = {}
    for grade in json.loads((out / "grades.json").read_text()):
        found.setdefault(Path(grade["file"]).stem, {})[grade["exercise"]] = grade
    return found, out


def test_thirty_notebooks_are_graded_ten_of_them_hostile(graded):
    found, _ = graded
    assert len(HOSTILE) >= 10 and len(found) == len(HOSTILE) + len(HONEST) + len(FILES) + 2 >= 30


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_notebook_loses_its_own_points_and_no_others(graded, name):
    grades = dict(graded[0][name])
    spoiled = grades.pop("lora-forward")
    assert spoiled["points"] == 0 and HOSTILE[name][1] in spoiled["why"], spoiled
    assert spoiled["status"] == ("not attempted" if name in ("prints that it passed", "writes a spreadsheet formula") else "failed")
    if "in what the answer needs" not in name:
        assert {g["status"] for g in grades.values()} == {"passed"} and len(grades) == 4, grades
    assert all(g["seconds"] < 25 for g in [spoiled, *grades.values()])


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_notebook_gets_its_points(graded, name):
    grades = graded[0][name].values()
    assert sum(g["points"] for g in grades) == HONEST[name][1] and sum(g["of"] for g in grades) == ALL, list(grades)
    if name == "unsolved":
        assert {g["status"] for g in grades} == {"not attempted"}


def test_reasons_are_those_of_the_check_in_the_notebook(graded):
    found, _ = graded
    assert found["scaled by alpha"]["lora-forward"]["likely"] == "scaled by alpha, not by alpha / rank"
    assert "invalid syntax" in found["not Python in one cell"]["lora-forward"]["why"]
    assert found["raises SystemExit"]["lora-forward"]["why"] == "raised SystemExit: 0 (line 6 of your function)"
    seeds = [g["seed"] for grades in found.values() for g in grades.values() if g["seed"] is not None]
    assert len(set(seeds)) == len(seeds) > 100


@pytest.mark.parametrize(
    "name, words",
    [
        ("05_malformed", "it is not JSON"),
        ("05_empty", "it is not JSON"),
        ("05_a list", "it is not a notebook"),
        ("05_nested too deeply", "it is not JSON"),
        ("05_not text", "it is not JSON"),
        ("05_without cells", "it has no list of cells"),
        ("05_huge", "8,192 MB; 50 at most"),
        ("05_fifo", "not an ordinary file"),
    ],
)
def test_what_is_no_notebook_gets_nothing_and_the_reason(graded, name, words):
    [grade] = graded[0][name].values()
    assert grade["status"] == "unreadable" and words in grade["why"] and (grade["points"], grade["of"]) == (0, ALL)


def test_a_notebook_of_strange_cells_is_not_attempted(graded):
    assert {g["status"] for g in graded[0]["05_strange cells"].values()} == {"not attempted"}


def test_nothing_that_a_student_started_or_wrote_is_left(graded):
    assert not (ROOT / "written_by_a_student").exists()
    mine = psutil.Process().children(recursive=True)
    assert not [p for p in mine if any("minipeft.checks import desk" in word for word in p.cmdline())]


def test_the_tables_hold_every_grade_and_no_formula(graded):
    found, out = graded
    with (out / "exercises.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (out / "points.csv").open(newline="") as file:
        points = {Path(row["file"]).stem: row for row in csv.DictReader(file)}
    assert len(rows) == sum(map(len, found.values())) and set(points) == set(found)
    assert [r["why"] for r in rows if "HYPERLINK" in r["why"]] == ["'=HYPERLINK(0)"]
    assert not [value for row in rows for value in row.values() if value[:1] in tuple("=+@-")]
    assert (points["solved"]["points"], points["solved"]["of"], points["solved"]["not passed"]) == (str(ALL), str(ALL), "")
    assert points["scaled by alpha"]["not passed"] == "lora-forward: failed"
    assert "uses the checks' own code" in points["patches the checks"]["note"] and not points["solved"]["note"]


@pytest.fixture(scope="module")
def room():
    """One for several tests: to start one takes seconds."""
    with grading.Room() as room:
        yield room


def test_a_second_run_goes_on_where_the_first_was_interrupted(tmp_path, monkeypatch, room):
    path, out = tmp_path / "05_lora.ipynb", tmp_path / "out"
    path.write_text(json.dumps(notebook()))
    seat, seats = room.seat, []

    def interrupted():
        if len(seats) == 2:
            raise KeyboardInterrupt
        seats.append(1)
        return seat()

    monkeypatch.setattr(grading, "Room", lambda: nullcontext(room))
    monkeypatch.setattr(room, "seat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        grading.grade([path], out)
    journal = out / "exercises.jsonl"
    judged = [json.loads(line)["seed"] for line in journal.read_text().splitlines()]
    assert len(judged) == 2
    with journal.open("ab") as file:
        file.write('{"file": "cut ö'.encode()[:-1])              # in the middle of a letter, and of a line
    monkeypatch.setattr(room, "seat", lambda: seats.append(1) or seat())
    grades = grading.grade([path], out)
    assert [g.seed for g in grades[:2]] == judged and sum(g.points for g in grades) == ALL and len(seats) == 5
    grading.grade([path], out)
    assert len(seats) == 5
    path.write_text(json.dumps(forward("return x @ W.T")))  # handed in again
    assert sum(g.points for g in grading.grade([path], out)) == ALL - FORWARD and len(seats) == 10


def test_what_could_not_be_judged_is_judged_again(tmp_path, monkeypatch, room):
    path, out = tmp_path / "05_lora.ipynb", tmp_path / "out"
    path.write_text(json.dumps(notebook()))
    monkeypatch.setattr(grading, "Room", lambda: nullcontext(room))
    with monkeypatch.context() as patch:
        patch.setattr(grading, "_judge", lambda room, grade, task: setattr(grade, "status", "not checked"))
        assert {g.status for g in grading.grade([path], out)} == {"not checked"}
    assert {g.status for g in grading.grade([path], out)} == {"passed"}
    assert len((out / "exercises.jsonl").read_text().splitlines()) == 2 * len(exercises("ch05_lora"))


@pytest.mark.skipif(sys.platform != "linux", reason="a file's name may be any bytes on Linux")
def test_a_file_whose_name_is_no_utf8_is_graded_like_any_other(tmp_path, monkeypatch, room):
    monkeypatch.setattr(grading, "Room", lambda: nullcontext(room))
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller_05_lora.ipynb"))
    file.write_text(json.dumps(notebook("student")))
    (tmp_path / "zz_05_lora.ipynb").write_text(json.dumps(notebook("student")))
    grades = grading.grade([tmp_path], tmp_path / "out")
    assert len(grades) == 2 * len(exercises("ch05_lora")) and any("M\\xfcller_05" in g.file for g in grades)
    assert "M\\\\xfcller" in (tmp_path / "out" / "grades.json").read_text(encoding="utf-8")


def test_a_note_is_made_where_an_answer_uses_the_checks_and_in_no_time():
    for text in ("from minipeft.checks.ch05_lora import _delta", "import minipeft.checks.ch05_lora as c", "from minipeft.checks import frame, desk",
                 "check._init_reason(1)", "minipeft.checks.grading"):
        assert grading.OWN_CODE.search(text), text
    assert not grading.OWN_CODE.search("from minipeft.checks import ch05_lora as check\ncheck.lora_forward(f)")
    began = time.perf_counter()
    grading.OWN_CODE.findall("minipeft.checks import " * 200_000)
    assert time.perf_counter() - began < 5


def test_limits_above_what_the_grader_itself_was_given_are_lowered(monkeypatch):
    found = {}
    monkeypatch.setattr(desk.resource, "getrlimit", lambda limit: (5, 5))
    monkeypatch.setattr(desk.resource, "setrlimit", lambda limit, both: found.update({limit: both}))
    desk._limit(10, 500)
    assert found and all(both[0] == both[1] <= 5 for both in found.values())


@pytest.mark.parametrize("limit", ["inf", "nan", "0"])
def test_a_limit_that_is_none_is_refused(limit, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["grade", str(tmp_path), "--time-limit", limit])
    assert "numbers above zero" in capsys.readouterr().err


def test_a_path_that_does_not_exist_and_a_file_for_a_folder_are_refused(tmp_path, capsys):
    assert command.main(["grade", str(tmp_path / "clas"), "--out", str(tmp_path / "out")]) == 2
    assert "no file or folder" in capsys.readouterr().err and not (tmp_path / "out").exists()
    (tmp_path / "05_lora.ipynb").write_text("{}")
    (tmp_path / "out").write_text("")
    assert command.main(["grade", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is a file; the grades need a folder" in capsys.readouterr().err


def test_without_a_notebook_the_command_says_so(tmp_path, capsys):
    assert command.main(["grade", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no notebook" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------- the processes


def _escape(returned, after, before, file):
    """Runs beside the answer, where the fence lets a compiler through: a grandchild in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(file).write_text(str(os.getpid()))
            time.sleep(1000)
        os._exit(0)
    while not Path(file).exists() or not Path(file).read_text():
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are found on Linux")
def test_a_process_that_hides_in_another_session_is_killed_with_the_answer(tmp_path, room):
    file = tmp_path / "number"
    task = {"cells": ["def pack(): return 'text'"], "chapter": "ch07_nf4", "name": "pack", "folder": str(tmp_path), "closed": [],
            "seconds": 20, "megabytes": 500}  # fmt: skip
    with grading.Student(room, task) as student:
        assert student.attempt(frame.Case({}, observe=partial(_escape, file=str(file)))).status == "returned"
        assert psutil.pid_exists(int(file.read_text()))
    with grading.Student(room, task) as student:  # the host has buried the last one before it starts the next
        student.attempt(frame.Case({}))
        assert not psutil.pid_exists(int(file.read_text()))


def test_a_killed_host_costs_one_answer_and_is_replaced(tmp_path, room):
    task = {"cells": ["def pack(): return 1"], "chapter": "ch07_nf4", "name": "pack", "folder": str(tmp_path), "closed": [],
            "seconds": 20, "megabytes": 500}  # fmt: skip
    for expected in ("failed", "returned"):
        with grading.Student(room, task) as student:
            assert student.attempt(frame.Case({})).value == 1
            if expected == "failed":
                room.host.kill()
                room.host.wait()
                time.sleep(0.5)
            assert student.attempt(frame.Case({})).status == expected


# ---------------------------------------------------------------------------- finding the answer


def found(*cells, name="pack"):
    return desk.find_answer([textwrap.dedent(cell) for cell in cells], "ch07_nf4", name)


def test_only_what_the_answer_needs_is_run():
    answer = found("1 / 0\nimport math, nowhere", "model = 1 / 0\nscale = 2\ntable = {}\ntable[1] = 5\nclass K: pass\nK.v = 7",
                   "def helper(): return table[1] + K.v\ndef pack(model): return model * scale * math.pi + helper()\ncheck.pack(pack)", "scale = 3")  # fmt: skip
    assert answer(1) == 2 * math.pi + 12


def test_the_last_call_counts_and_later_cells_do_not():
    assert found("def pack(): return 1\ncheck.pack(pack)", "def pack(): return 2\ncheck.pack(pack)", "def pack(): return 3")() == 2
    assert found("print(check.pack(lambda: 4))", "other.pack(5)")() == 4


def test_magics_are_passed_over_and_a_modulo_is_not_taken_for_one():
    assert found("%%time\n!ls\ndef pack():\n    %pdb\n    return 1\ncheck.pack(pack)")() == 1
    assert found("def pack():\n    return (7\n        % 4)\ncheck.pack(pack)")() == 3


def test_no_answer_and_no_python_are_told_apart():
    with pytest.raises(desk.NoAnswer):
        found("x = 1", "def pack(: pass".replace("pack", "park"))
    with pytest.raises(SyntaxError):
        found("def pack(:")


# ---------------------------------------------------------------------------- plain data


def as_sent(attempted):
    """An attempt after its way through the channel."""
    message = json.loads(json.dumps({"status": attempted.status, "why": attempted.why, "value": desk.to_plain(attempted.value)}))
    return frame.Attempt(desk.from_plain(message["value"]), message["status"], message["why"])


@pytest.mark.parametrize("id", sorted(RIGHT))
def test_an_answer_that_was_sent_is_judged_as_one_that_was_not(id):
    exercise = exercises()[id]
    assert exercise.judge(lambda case: as_sent(frame.attempt(RIGHT[id][0], case))).status == "passed"
    for answer in WRONG[id][:1]:
        here = exercise(answer, seed=5)
        assert not here and exercise.judge(lambda case, answer=answer: as_sent(frame.attempt(answer, case)), seed=5) == here


def test_plain_data_comes_back_to_the_bit():
    nan = torch.tensor([math.nan, -0.0, math.inf])
    value = {"a": (nan, nan.bfloat16(), torch.empty(0, 3), torch.tensor(True)), 2: [{1, "x"}, None, -(2**70), math.inf], None: "é"}
    back = desk.from_plain(json.loads(json.dumps(desk.to_plain(value))))
    assert frame.same_bytes(back["a"], value["a"]) and [t.shape for t in back["a"]] == [t.shape for t in value["a"]]
    assert (back[2], back[None]) == (value[2], "é")


@pytest.mark.parametrize(
    "forged",
    [
        [1], {"tensor": "", "dtype": "float32", "shape": [2**40]}, {"tensor": "AAAA", "dtype": "float32", "shape": [-1]},
        {"tensor": "AAAA", "dtype": "object", "shape": [3]}, {"set": [{"list": []}]}, {"list": list(range(10_001))},
        {"dict": [[i, 0] for i in range(10_001)]}, {"eval": "1"}, {"list": [1], "set": [1]}, {},
    ],
)  # fmt: skip
def test_forged_data_is_an_error_and_no_more(forged):
    with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)):
        desk.from_plain(forged)


def test_every_solution_passes_in_the_grader_and_no_stub_does(tmp_path, monkeypatch, room):
    monkeypatch.setattr(grading, "Room", lambda: nullcontext(room))
    stubs = sorted((ROOT / "notebooks").glob("*.ipynb"))[::4]
    grades = grading.grade([ROOT / "notebooks" / "solutions", *stubs], tmp_path, seconds=30)
    solved = [g for g in grades if "solutions" in Path(g.file).parts]
    assert {g.exercise for g in solved} == {id for id, e in exercises().items() if e.chapter in {g.chapter for g in solved}}
    assert not [g for g in solved if g.status != "passed" and (g.status, g.exercise[-5:]) != ("not checked", "-body")]
    assert {g.status for g in grades[len(solved):]} == {"not attempted"}
