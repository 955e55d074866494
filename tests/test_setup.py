"""The set-up files agree with each other, and the make targets do what they say."""

import ast
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
EVERYTHING = PROJECT["dependencies"] + [one for extra in EXTRAS.values() for one in extra]
COURSE = ("notebooks", "test")  # the extras that everybody installs; the others are for one make target each
PIP_ROUTE = 'pip install -c constraints.txt -e ".[notebooks,test]"'


def name_of(requirement: str) -> str:
    return canonicalize_name(Requirement(requirement).name)


def pins() -> dict[str, str]:
    """{package: version} of constraints.txt."""
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def make_targets() -> set[str]:
    phony = re.search(r"^\.PHONY: (.*)$", (REPO / "Makefile").read_text(), re.M).group(1)
    return set(phony.split())


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["make", *arguments], cwd=REPO, text=True, capture_output=True, timeout=600,
        env={**outer_environment(), **environment},
    )


def outer_environment() -> dict[str, str]:
    """The environment without what an outer `make test` leaves in it for inner makes."""
    return {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}


# --- the three lists of dependencies -----------------------------------------

def test_conda_and_pyproject_name_the_same_dependencies():
    conda = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    (by_pip,) = [one["pip"] for one in conda if isinstance(one, dict)]
    options = [one for one in by_pip if one.startswith("-")]
    requirements = [one for one in by_pip if not one.startswith("-")]
    assert sorted(requirements) == sorted(PROJECT["dependencies"] + [one for extra in COURSE for one in EXTRAS[extra]])
    assert options == ["--constraint constraints.txt", f"--editable .[{','.join(COURSE)}]"]


def test_conda_brings_a_python_that_the_package_accepts():
    conda = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    (python,) = [one for one in conda if isinstance(one, str) and one.startswith("python>")]
    assert python.removeprefix("python").split(",")[0] == PROJECT["requires-python"]


def test_the_readme_and_make_install_the_same():
    readme = (REPO / "README.md").read_text()
    assert PIP_ROUTE in readme and "conda env create -f environment.yml" in readme
    recipe = (REPO / "Makefile").read_text()
    assert 'install --constraint constraints.txt --editable ".[notebooks,test]"' in recipe
    assert set(EXTRAS) == {*COURSE, "browser"} and 'constraint constraints.txt --editable ".[browser]"' in recipe


def test_the_constraints_pin_every_dependency_inside_its_range():
    pinned = pins()
    for requirement in map(Requirement, EVERYTHING):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name}"
        assert version in requirement.specifier, f"{requirement} does not admit {version}"


def test_the_constraints_pin_whatever_the_dependencies_bring_along():
    pinned, seen, unpinned = pins(), set(), set()
    waiting = [Requirement(one) for one in EVERYTHING]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        # torch itself pins the exact versions of its CUDA libraries and triton.
        if name not in pinned and not name.startswith(("nvidia-", "cuda-", "triton")):
            unpinned.add(name)
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # belongs to another platform
        for one in map(Requirement, further):
            extras = requirement.extras or {""}
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(one)
    assert len(seen) > len(EVERYTHING)
    assert not unpinned


def test_the_constraints_are_dated_exact_and_fit_every_machine():
    text = (REPO / "constraints.txt").read_text()
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", text.splitlines()[0])
    for line in text.splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line), line


def imports_of(file: Path) -> set[str]:
    """Top-level names of the modules that a Python file imports, inside functions too."""
    found = set()
    # Notebook sources have lines for the shell ("!pip …") and for Jupyter ("%magic").
    code = re.sub(r"^(\s*)[!%].*", r"\1pass", file.read_text(), flags=re.M)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("minipeft", PROJECT["dependencies"]), ("tests", EVERYTHING), ("notebooks", EVERYTHING)],
)
def test_every_import_is_a_declared_dependency(folder, allowed):
    # "google": google.colab exists on Colab only, where the code asks for it. "bitsandbytes": only for its
    # 8-bit optimizers on a GPU, with an error that says what to install where it is not there.
    known = {name_of(one) for one in allowed} | {"minipeft", "tests", "notebooks", "google", "bitsandbytes"}
    packages = importlib.metadata.packages_distributions()
    files = [f for f in (REPO / folder).rglob("*.py") if "__pycache__" not in f.parts]
    assert files
    local = {f.stem for f in files} | {f.parent.name for f in files}
    for file in files:
        for module in imports_of(file) - local:
            owners = {canonicalize_name(one) for one in packages.get(module, [module])}
            assert owners & known, f"{file.relative_to(REPO)} imports {module}"


# --- the make targets --------------------------------------------------------

def test_every_make_command_in_the_readme_exists():
    commands = re.findall(r"`make ([a-z-]+)|^\s*make ([a-z-]+)", (REPO / "README.md").read_text(), re.M)
    named = {one or other for one, other in commands}
    assert {"lab", "test"} <= named
    assert named <= make_targets()


def test_help_names_every_target_and_is_what_make_alone_prints():
    answer = make()
    assert answer.returncode == 0
    assert set(re.findall(r"^make ([a-z-]+)", answer.stdout, re.M)) == make_targets() - {"help"}
    assert make("help").stdout == answer.stdout


def test_ci_runs_the_tests_and_then_the_notebooks():
    script = REPO / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make test", "make test-notebooks"]


def pretend(folder: Path, name: str, script: str) -> None:
    """An executable called `name` in `folder`."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_the_first_python_that_is_new_enough_makes_the_environment(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    pretend(bin, "python3", "exit 1")  # too old, or without venv
    pretend(bin, "python3.13", "exit 127")  # a shim of a version that is not installed
    pretend(bin, "python3.12", f'[ "$2" = venv ] && set -- "$@" --without-pip; exec "{sys.executable}" "$@"')
    venv = tmp_path / "venv"
    answer = make(f"VENV={venv}", "environment", PATH=f"{bin}:/usr/bin:/bin")
    assert answer.returncode == 0, answer.stderr
    assert f"Creating {venv}" in answer.stdout
    prefix = subprocess.check_output([venv / "bin" / "python", "-c", "import sys; print(sys.prefix)"], text=True)
    assert Path(prefix.strip()).resolve() == venv.resolve()


def test_without_a_new_python_make_says_what_is_needed(tmp_path):
    venv = tmp_path / "venv"
    answer = make(f"VENV={venv}", "PYTHONS=no-such-python", "lab")
    assert answer.returncode != 0
    assert "Python 3.11 or newer" in answer.stderr and "no-such-python" in answer.stderr
    assert not venv.exists()


def ready() -> list[str]:
    """Arguments that make `make` use the running environment as it is, installing nothing."""
    if not Path(sys.prefix, "bin", "python").exists():
        pytest.skip("this Python has no bin/python that make could use")
    return ["-o", f"{sys.prefix}/installed", f"VENV={sys.prefix}"]


def test_run_without_a_notebook_asks_for_one():
    answer = make(*ready(), "run")
    assert answer.returncode != 0
    assert "make run NB=05" in answer.stderr


def test_badges_without_a_repository_asks_for_one():
    answer = make(*ready(), "badges")
    assert answer.returncode != 0
    assert "make badges REPO=owner/name" in answer.stderr


def test_badges_hands_over_whatever_is_named_without_a_shell_reading_it(tmp_path):
    (tmp_path / "bin").mkdir()
    pretend(tmp_path / "bin", "python", 'printf "%s\\n" "$@"')
    answer = make("-o", f"{tmp_path}/installed", f"VENV={tmp_path}", "badges", "REPO=a/b'; echo $$PATH; echo '")
    assert answer.stdout.splitlines()[-3:] == ["notebooks/tools.py", "badges", "a/b'; echo $PATH; echo '"]


def status_of(address: str) -> int:
    """The HTTP status of an address; the server may take some seconds to listen."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"nothing listens at {address}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere JupyterLab opens a browser")
def test_lab_without_a_display_prints_an_address_that_opens_the_course(tmp_path):
    environment = {k: v for k, v in outer_environment().items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    lab = subprocess.Popen(
        ["make", *ready(), "lab"], cwd=REPO, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )
    too_long = threading.Timer(300, os.killpg, (lab.pid, signal.SIGKILL))
    too_long.start()
    try:
        printed, address = [], None
        for line in lab.stdout:
            printed.append(line)
            address = re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab/tree/\S+\?token=\w+", line)
            if address:
                break
        assert address, "".join(printed)
        assert any("No display" in line for line in printed)
        address = address.group(0)
        assert "/lab/tree/notebooks/00_start_here.ipynb?" in address
        file = address.replace("/lab/tree/", "/api/contents/").replace("?", "?content=0&")
        for page in (address, file):
            assert status_of(page) == 200
    finally:
        too_long.cancel()
        os.killpg(lab.pid, signal.SIGKILL)
        lab.wait()
