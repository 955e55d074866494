"""The machinery of the notebooks: one source, two versions, and a runner that is not easily pleased."""

import importlib.util
import json
import sys
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("notebook_tools", REPO / "notebooks" / "tools.py")
tools = sys.modules["notebook_tools"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tools)

HEADER = """\
# ---
# jupyter:
#   minipeft:
#     records: [answer]
# ---

# %% [markdown]
# # A tiny chapter
#
# [Colab](https://colab.research.google.com/github/{{repository}}/blob/main/notebooks/07_tiny.ipynb)
"""
EXERCISE = '''
# %% [markdown]
# ## Exercise

# %%
from minipeft.checks import ch01_full as check


def labels(prompt_ids: list[int], completion_ids: list[int]) -> list[int]:
    """-100 for the prompt, then the completion."""
    ### BEGIN SOLUTION
    masked = [-100] * len(prompt_ids)  # the secret
    return masked + completion_ids
    ### END SOLUTION


check.completion_only_labels(labels)

# %% [markdown]
# <details>
# <summary>Hint</summary>
#
# Lists are joined with `+`.
#
# </details>

# %% [markdown]
# ## After it
'''
RECORD = """
# %%
from minipeft.lab import record

record(answer=42)
"""


def make(folder: Path, source: str, name: str = "07_tiny") -> tools.Course:
    (folder / "notebooks" / "source").mkdir(parents=True, exist_ok=True)
    (folder / "notebooks" / "source" / f"{name}.py").write_text(source, encoding="utf-8")
    (folder / "pyproject.toml").write_text('[tool.minipeft]\nrepository = "someone/course"\n')
    return tools.Course(folder)


def cells(course, version="student", name="07_tiny"):
    return tools.read(course.built(name, version)).cells


# ---------------------------------------------------------------------------- building


@pytest.mark.parametrize(
    "code, line, message",
    [
        ("### BEGIN SOLUTION\nx = 1", 2, "has no ### END SOLUTION"),
        ("### BEGIN SOLUTION\nx = 1\n# %%\n### END SOLUTION", 2, "has no ### END SOLUTION in its cell"),
        ("x = 1\n### END SOLUTION", 3, "without a ### BEGIN SOLUTION"),
        ("### BEGIN SOLUTION\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION", 3, "inside the solution opened at line 2"),
        ("### BEGIN SOLUTION\n\n### END SOLUTION", 4, "is empty"),
        ("if True:\n    ### BEGIN SOLUTION\n    x = 1\n### END SOLUTION", 5, "is indented by 0"),
        ("## BEGIN SOLUTION\nx = 1\n### END SOLUTION", 2, "is not a marker"),
        ("### BEGIN SOLUTIONS\nx = 1\n### END SOLUTION", 2, "is not a marker"),
        ("### begin solution\nx = 1\n### END SOLUTION", 2, "is not a marker"),
        ("# %% [markdown]\n# ### BEGIN SOLUTION", 3, "in a markdown cell"),
    ],
)
def test_unmatched_markers_are_refused_with_file_and_line(tmp_path, code, line, message):
    course = make(tmp_path, f"# %%\n{code}\n")
    with pytest.raises(tools.NotebookError, match=message) as caught:
        tools.build(course)
    assert f"07_tiny.py:{line}: " in str(caught.value)
    assert not course.built("07_tiny", "student").exists()


def test_the_student_gets_a_stub_and_the_solution_folded_after_the_hint(tmp_path):
    course = make(tmp_path, HEADER + EXERCISE)
    tools.build(course)
    student, solution = cells(course), cells(course, "solutions")
    code = next(c.source for c in student if "def labels" in c.source)
    assert '    """-100 for the prompt, then the completion."""\n    ...  # your code here\n\n\ncheck.' in code
    assert not any("the secret" in c.source for c in student if c.cell_type == "code")
    assert not any("SOLUTION" in c.source for c in [*student, *solution])
    kinds = [c.source.split("\n")[1] if c.source.startswith("<details>") else "" for c in student]
    assert kinds[-3:] == ["<summary>Hint</summary>", "<summary>Solution</summary>", ""]
    folded = student[-2].source
    assert "def labels(prompt_ids: list[int], completion_ids: list[int]) -> list[int]:\n    masked = " in folded
    assert "return masked + completion_ids" in folded and '"""' not in folded
    assert not any("<summary>Solution" in c.source for c in solution)
    assert next(c.source for c in solution if "def labels" in c.source).count("the secret") == 1
    compile(code, "student", "exec")


def test_a_solution_outside_a_function_and_two_in_one_function_are_folded_whole(tmp_path):
    code = """
    ### BEGIN SOLUTION
    x = 1
    ### END SOLUTION
    def f(n):
        'doc'
        given = n
        ### BEGIN SOLUTION
        a = given
        ### END SOLUTION
        b = 2
        ### BEGIN SOLUTION
        return a + b
        ### END SOLUTION
    """
    text = tools.folded_solution(tools.textwrap.dedent(code).strip())
    shown = text.split("```python\n")[1].split("\n```")[0]
    assert shown == "x = 1\n\n\ndef f(n):\n    given = n\n    a = given\n    b = 2\n    return a + b"


def test_two_builds_give_the_same_bytes_and_an_inserted_cell_moves_no_other_id(tmp_path):
    first, second = make(tmp_path / "a", HEADER + EXERCISE), make(tmp_path / "b", HEADER + EXERCISE)
    for course in (first, second):
        tools.build(course)
    for version in tools.VERSIONS:
        assert first.built("07_tiny", version).read_bytes() == second.built("07_tiny", version).read_bytes()
    before = [c.id for c in cells(first)]
    assert len(set(before)) == len(before)
    tools.build(make(tmp_path / "a", HEADER + "\n# %%\nnew = 1\n" + EXERCISE))
    assert [i for i in (c.id for c in cells(first)) if i in before] == before


def test_the_source_of_a_quiz_is_folded_for_it_holds_the_answers(tmp_path):
    course = make(tmp_path, HEADER + '\n# %%\nlab.quiz([])\n\n# %%\nprint("lab.quiz is not called")\n')
    tools.build(course)
    quiz, other = cells(course)[-2:]
    assert quiz.metadata.jupyter.source_hidden and quiz.metadata.cellView == "form" and quiz.source == "# @title Quiz\nlab.quiz([])"
    assert "jupyter" not in other.metadata and other.source.startswith("print")
    path = course.built("07_tiny", "student")
    notebook = tools.read(path)
    del notebook.cells[-2].metadata["jupyter"]
    tools.write(notebook, path)
    assert problems(course).count("stale or missing") == 1


def test_outputs_survive_a_rebuild_where_the_cell_is_unchanged(tmp_path):
    course = make(tmp_path, HEADER + "\n# %%\nprint(1)\n\n# %%\nprint(2)\n")
    tools.build(course)
    path = course.built("07_tiny", "student")
    notebook = tools.read(path)
    for cell in notebook.cells[1:]:
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="kept\n")], 1
    tools.write(notebook, path)
    make(tmp_path, HEADER + "\n# %%\nprint(1)\n\n# %%\nprint(3)\n")
    tools.build(course)
    assert [len(c.outputs) for c in cells(course)[1:]] == [1, 0]
    assert [c.execution_count for c in cells(course)[1:]] == [1, None]


def test_the_repository_comes_from_one_setting(tmp_path):
    course = make(tmp_path, HEADER)
    tools.build(course)
    assert "github/someone/course/blob" in cells(course)[0].source
    (tmp_path / "pyproject.toml").write_text("")
    with pytest.raises(tools.NotebookError, match=r"\[tool.minipeft\] repository is None"):
        tools.build(course)


def test_badges_stamps_the_one_setting_into_badge_and_set_up_cell_and_keeps_the_rest(tmp_path, capsys):
    setup = '\n# %% tags=["setup"]\nimport sys\nprint("git+https://github.com/{{repository}}")\n\n# %%\nprint(2)\n'
    course = make(tmp_path, HEADER + setup)
    settings = '# where\n[project]\nrepository = "not this"\n[tool.minipeft]\n# why\nrepository = "a/b"  # old\n[tool.x]\nrepository = "nor this"\n'
    (tmp_path / "pyproject.toml").write_text(settings)
    tools.build(course)
    notebook = tools.read(course.built("07_tiny", "student"))
    notebook.cells[2].outputs, notebook.cells[2].execution_count = [nbformat.v4.new_output("stream", text="2\n")], 1
    tools.write(notebook, course.built("07_tiny", "student"))
    assert tools.main(["badges", "Some-one/course.2"], course) == 0
    assert "Some-one/course.2: pyproject.toml and 2 notebooks" in capsys.readouterr().out
    assert (tmp_path / "pyproject.toml").read_text() == settings.replace("a/b", "Some-one/course.2")
    for version in tools.VERSIONS:
        badge, stamped, _ = cells(course, version)
        assert "/github/Some-one/course.2/blob/main/notebooks/07_tiny.ipynb" in badge.source
        assert "git+https://github.com/Some-one/course.2" in stamped.source
    assert cells(course)[2].outputs[0].text == "2\n"  # what was measured stays


@pytest.mark.parametrize(
    "repository, hint",
    [("", ""), ("name", ""), ("a/b/c", ""), ("_a/b", ""), ("a.b/c", ""), ("a/..", ""), ("a b/c", ""), ('a/b"\nx = "1', ""), ("ä/b", ""),
     ("https://github.com/some-one/course", "; did you mean 'some-one/course'?"),
     ("git@github.com:some-one/course.git", "; did you mean 'some-one/course'?")],
)  # fmt: skip
def test_badges_refuses_what_is_no_repository_and_changes_nothing(tmp_path, capsys, repository, hint):
    course = make(tmp_path, HEADER)
    before = (tmp_path / "pyproject.toml").read_bytes()
    assert tools.main(["badges", repository], course) == 1
    assert f"the repository is {repository!r}; expected owner/name as on GitHub{hint}\n" in capsys.readouterr().err
    assert (tmp_path / "pyproject.toml").read_bytes() == before and not course.built("07_tiny", "student").exists()


def test_badges_needs_the_setting_that_it_sets(tmp_path, capsys):
    course = make(tmp_path, HEADER)
    (tmp_path / "pyproject.toml").write_text('[project]\nrepository = "a/b"\n')
    assert tools.main(["badges", "c/d"], course) == 1
    assert "has no line repository" in capsys.readouterr().err


# ---------------------------------------------------------------------------- checking


def problems(course, kind=0):
    return "\n".join(tools.check(course)[kind])


def test_a_stale_build_is_found(tmp_path):
    course = make(tmp_path, HEADER + EXERCISE)
    assert problems(course).count("stale or missing") == 2
    tools.build(course)
    assert "stale or missing" not in problems(course)
    make(tmp_path, HEADER + EXERCISE.replace("the secret", "another"))
    assert problems(course).count("stale or missing") == 2
    assert tools.main(["check"], course) == 1


def test_long_cells_wrong_badges_and_strange_files_are_found(tmp_path):
    long = "\n# %%\n" + "\n".join(f"x{i} = {i}" for i in range(21)) + "\n"
    source = HEADER.replace("07_tiny.ipynb", "06_other.ipynb") + long + long.replace("%%", '%% tags=["figure"]')
    course = make(tmp_path, source + "\n# %%\n### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n")
    tools.build(course)
    (tmp_path / "notebooks" / "09_gone.ipynb").write_text("{}")
    errors, warnings = problems(course), problems(course, 1)
    assert ": 4 cells; a notebook has 15 to 60" in errors  # the folded solution is not counted
    assert "the Colab badge opens '06_other.ipynb'" in errors
    assert "09_gone.ipynb: has no source" in errors
    assert warnings.count("has 21 lines of code") == 1
    assert "an exercise without its check" in warnings


def test_a_set_up_cell_without_its_lines_for_colab_is_found(tmp_path):
    lines = ["import subprocess, sys", 'if "google.colab" in sys.modules:',
             '    subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "git+https://github.com/{{repository}}"], check=True)',
             "    from minipeft import colab; colab.complete()"]  # fmt: skip
    for left_out in (None, 2, 3):
        code = "\n".join(line for i, line in enumerate(lines) if i != left_out)
        course = make(tmp_path, HEADER + f'\n# %% tags=["setup"]\n{code}\n')
        assert ("does not prepare Colab" in problems(course)) == (left_out is not None)


@pytest.mark.parametrize(
    "output, message",
    [
        (nbformat.v4.new_output("stream", text="saved in /home/anna/x/y.json\n"), "path of this machine"),
        (nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[]), "KeyError"),
    ],
)
def test_saved_outputs_hold_no_error_and_no_path_of_a_machine(tmp_path, output, message):
    course = make(tmp_path, HEADER + "\n# %%\nprint(1)\n")
    tools.build(course)
    notebook = tools.read(course.built("07_tiny", "student"))
    notebook.cells[1].outputs = [output]
    tools.write(notebook, course.built("07_tiny", "student"))
    assert message in problems(course)


def test_the_committed_notebooks_are_fresh():
    errors, _ = tools.check(tools.Course())
    assert not errors, "\n".join(errors)


# ---------------------------------------------------------------------------- running


def ran(source_cells, **changes):
    """A notebook as it stands after a run, and the run's record of it."""
    notebook = nbformat.v4.new_notebook(cells=source_cells)
    result = tools.Run("07_tiny", "student", "smoke", required=[], cells=len(source_cells), executed=len(source_cells))
    result.seconds, result.outputs = 5.0, 1
    for name, value in changes.items():
        setattr(result, name, value)
    return tools.faults(notebook, result)


def done(count=1, tags=(), outputs=()):
    cell = nbformat.v4.new_code_cell("1", execution_count=count, metadata={"tags": list(tags)})
    cell.outputs = list(outputs)
    return cell


def checked(status):
    data = {tools.CHECK_MIME: {"exercise": "x", "status": status, "why": "", "points": 1}}
    return nbformat.v4.new_output("display_data", data=data)


RAISED = nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[])


def test_a_notebook_that_ran_has_no_faults():
    assert ran([done(), done(2, ["exercise"], [checked("not attempted")])]) == []
    assert ran([done(1, ["raises-exception"], [RAISED])]) == []
    assert ran([done(1, ["exercise"], [checked("not checked")])], version="solutions") == []


@pytest.mark.parametrize(
    "cells, changes, message",
    [
        ([done(), done(None)], {}, "did not run"),
        ([done()], {"executed": 0}, "0 of 1 code cells ran"),
        ([done()], {"seconds": 0.0}, "nothing real is that fast"),
        ([done()], {"outputs": 0}, "no cell has any output"),
        ([done()], {"required": ["exact"], "recorded": {"loss": 1}}, "did not record exact"),
        ([], {}, "no code cell"),
        ([done(1, [], [RAISED])], {}, "raised KeyError"),
        ([done(1, ["raises-exception"])], {}, "should raise"),
        ([done(1, ["exercise"])], {}, "no check was shown"),
        ([done(1, ["exercise"], [checked("passed")])], {}, "is 'passed', expected 'not attempted'"),
        ([done(1, ["exercise"], [checked("not attempted")])], {"version": "solutions"}, "expected 'passed'"),
        ([done(1, ["exercise"], [checked("not checked")])], {}, "is 'not checked', expected 'not attempted'"),
        ([done(1, ["exercise"], [checked("broken")])], {"version": "solutions"}, "is 'broken'"),
    ],
)
def test_a_notebook_that_did_not_really_run_is_failed(cells, changes, message):
    assert any(message in fault for fault in ran(cells, **changes))


def test_live_widgets_give_way_to_their_static_form():
    def shown(**data):
        return nbformat.v4.new_output("display_data", data={tools.WIDGET_MIME: {"model_id": "1"}, "text/plain": "x"} | data)

    cell = done(1, [], [shown(), shown(**{"text/html": "<p>"})])
    tools.clean(cell)
    assert [set(o.data) for o in cell.outputs] == [{"text/plain", "text/html"}]


def test_both_versions_run_headless_and_the_solution_passes_where_the_stub_does_not(tmp_path, capsys):
    course = make(tmp_path, HEADER + EXERCISE + RECORD)
    assert tools.main(["build"], course) == 0
    assert tools.main(["test"], course) == 0
    out = capsys.readouterr().out
    assert out.count("passed  07_tiny") == 2 and "2 passed, 0 failed" in out
    manifest = tmp_path / "build" / "manifest"
    student = json.loads((manifest / "07_tiny.student.smoke.json").read_text())
    solution = json.loads((manifest / "07_tiny.solutions.smoke.json").read_text())
    assert student["checks"] == {"completion-only-labels": "not attempted"}
    assert solution["checks"] == {"completion-only-labels": "passed"}
    assert solution["figures"] == {"answer": 42} and solution["code_cells"] == solution["code_cells_executed"] == 2
    assert solution["peak_memory_gib"] > 0.05 and solution["device"] and solution["versions"]["torch"]
    html = (tmp_path / "build" / "html" / "solutions" / "07_tiny.html").read_text()
    assert "completion-only-labels: passed" in html


def test_a_failing_notebook_is_shown_its_html_written_and_its_results_not_kept(tmp_path, capsys):
    code = "\n# %%\nimport os\nprint(os.environ['MINIPEFT_PROFILE'], os.listdir())\n\n# %% [markdown]\n# ## Here\n\n# %%\n1 / 0\n\n# %%\n2\n"
    course = make(tmp_path, HEADER + code)
    tools.build(course)
    before = course.built("07_tiny", "student").read_bytes()
    assert tools.main(["run", "7", "--profile", "smoke", "--save"], course) == 1
    out = capsys.readouterr().out
    assert "cell 4 (Here) raised ZeroDivisionError" in out and "1 / 0" in out
    assert "2 of 3 code cells ran" in out and "did not record answer" in out
    assert "\x1b[" not in out  # no colours into a file
    html = (tmp_path / "build" / "html" / "07_tiny.html").read_text()
    assert "ZeroDivisionError" in html and "smoke []" in html
    assert course.built("07_tiny", "student").read_bytes() == before


def test_a_notebook_that_takes_too_long_is_stopped(tmp_path):
    course = make(tmp_path, "# %%\nprint(1)\n\n# %%\nimport time\ntime.sleep(600)\n")
    tools.build(course)
    result = tools.run(course, "07_tiny", profile="smoke", quiet=True, seconds_allowed=6)
    assert result.seconds < 300 and any("took longer than 6 s" in error for error in result.errors)


def test_results_are_written_with_date_machine_and_versions(tmp_path, monkeypatch):
    def fake(course, name, version, profile, **_):
        run = tools.Run(name, version, profile, [], cells=3, executed=3, seconds=90, peak_memory=2**30, recorded={"a": 1},
                        source_hash=tools.source_hash(course, name))
        tools.write_manifest(course, run)
        return run

    monkeypatch.setattr(tools, "run", fake)
    course = make(tmp_path, HEADER)
    tools.build(course)
    assert tools.main(["results"], course) == 0
    entry = json.loads((tmp_path / "data" / "results" / "notebooks.json").read_text())["07_tiny"]["cpu"]
    assert entry["minutes"] == 1.5 and entry["peak_memory_gib"] == 1.0
    assert {"date", "device", "versions", "command", "source_hash"} <= set(entry)
    figures = json.loads((tmp_path / "data" / "results" / "07_tiny.json").read_text())
    assert figures["figures"] == {"a": 1} and figures["profile"] == "cpu"
    assert str(tmp_path) not in json.dumps([entry, figures])


def test_what_a_run_measured_is_kept_afterwards_unless_it_failed_or_the_notebook_has_changed(tmp_path, capsys):
    course = make(tmp_path, HEADER)
    tools.build(course)

    def ran(version, value, **fields):
        tools.write_manifest(course, tools.Run("07_tiny", version, "cpu", [], recorded={"a": value}, **fields))

    assert tools.main(["keep", "07"], course) == 1 and "has not been run in the cpu profile" in capsys.readouterr().err
    here = tools.source_hash(course, "07_tiny")
    ran("solutions", 1, source_hash=here)
    ran("student", 2, source_hash=here)
    assert tools.main(["keep", "07"], course) == 0
    figures = json.loads((tmp_path / "data" / "results" / "07_tiny.json").read_text())
    assert figures["figures"] == {"a": 2} and figures["command"] == "python notebooks/tools.py run 07 --profile cpu"
    ran("student", 3, source_hash=here, errors=["it broke"])
    assert tools.main(["keep", "07"], course) == 1 and "it broke" in capsys.readouterr().err
    ran("student", 4, source_hash="another")
    assert tools.main(["keep", "07"], course) == 1 and "has been changed since" in capsys.readouterr().err
    assert json.loads((tmp_path / "data" / "results" / "07_tiny.json").read_text()) == figures


def test_a_notebook_is_found_by_number_or_name_and_a_wrong_one_is_refused_with_the_nearest(tmp_path, capsys):
    course = make(tmp_path, HEADER, "05_lora")
    assert {course.find(wanted) for wanted in ("5", "05", "lora", "05_lora")} == {"05_lora"}
    assert tools.main(["run", "05_lore"], course) == 1
    assert "did you mean '05_lora'?" in capsys.readouterr().err
    assert tools.main(["test"], tools.Course(tmp_path / "nothing")) == 1  # no notebook is not a pass
