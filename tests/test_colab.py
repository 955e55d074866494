"""On Colab minipeft completes what is there. pip is a stand-in here; tests/run_colab.py runs the real one."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from minipeft import colab

REPO = Path(__file__).resolve().parents[1]
# What a Colab image of June 2026 had of minipeft's dependencies (googlecolab/backend-info, pip-freeze.gpu.txt).
COLAB = {
    "torch": "2.11.0+cu128", "numpy": "2.0.2", "transformers": "5.9.0", "tokenizers": "0.22.2", "huggingface-hub": "1.17.0",
    "safetensors": "0.7.0", "filelock": "3.29.0", "psutil": "5.9.5", "tqdm": "4.67.3", "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1", "ipython": "7.34.0", "pyyaml": "6.0.3",
}  # fmt: skip
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


class Machine:
    """What is installed, which modules are loaded, and a pip that does as told. `calls`: (packages, constraints)."""

    def __init__(self, monkeypatch, installed, loaded=()):
        self.installed, self.calls, self.says, self.code = dict(installed), [], "", 0
        extras = [f"{one}; extra == '{extra}'" for extra, all in PROJECT["optional-dependencies"].items() for one in all]
        monkeypatch.setattr(colab.metadata, "requires", lambda name: PROJECT["dependencies"] + extras)
        monkeypatch.setattr(colab.metadata, "version", self.version)
        monkeypatch.setattr(colab.metadata, "packages_distributions", lambda: {name: [name] for name in self.installed})
        monkeypatch.setattr(colab, "_loaded", lambda: list(loaded))
        monkeypatch.setattr(colab.subprocess, "run", self.pip)

    def version(self, name):
        if name not in self.installed:
            raise metadata.PackageNotFoundError(name)
        return self.installed[name]

    def pip(self, command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "install"] and "--upgrade" not in command
        file = command.index("--constraint") + 1
        wanted = [name.split(">=") for name in command[file + 1 :]]
        self.calls.append(({name for name, _ in wanted}, set(Path(command[file]).read_text().split())))
        if not self.code:
            self.installed.update({name: f"{least}.1" for name, least in wanted})
        return subprocess.CompletedProcess(command, self.code, stdout=self.says, stderr="")


def test_what_colab_lacks_is_installed_and_torch_numpy_and_what_is_loaded_are_held(monkeypatch, capsys):
    machine = Machine(monkeypatch, COLAB, loaded=["psutil", "ipython"])
    assert colab.complete() == ["transformers 5.15.1", "gguf 0.10.1", "ninja 1.11.1"]
    held = {f"{name}=={COLAB[name]}" for name in ("torch", "numpy", "psutil", "ipython")}
    assert machine.calls == [({"gguf", "ninja", "transformers"}, held)]
    assert capsys.readouterr().err == "minipeft: installed transformers 5.15.1, gguf 0.10.1, ninja 1.11.1\n"


def test_where_nothing_is_missing_pip_is_not_called(monkeypatch, capsys):
    machine = Machine(monkeypatch, COLAB | {"transformers": "5.15", "gguf": "0.10.0", "ninja": "1.13.0"})
    assert colab.complete() == [] and machine.calls == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, have, loaded, advice",
    [
        ("torch", "2.9.1+cu126", [], "choose the newest runtime version"),
        ("numpy", "1.25.2", [], "choose the newest runtime version"),
        ("transformers", "5.14.9", ["transformers"], "restart the session"),
    ],
)
def test_what_is_too_old_and_must_stay_is_named_with_what_to_do(monkeypatch, capsys, name, have, loaded, advice):
    machine = Machine(monkeypatch, COLAB | {"transformers": "5.15.0", "gguf": "1", "ninja": "2"} | {name: have}, loaded)
    assert colab.complete() == [] and machine.calls == []
    said = capsys.readouterr().err
    assert f"{name} {have}; the course is tested from {colab.needs()[name]} on" in said and advice in said


def test_when_pip_fails_its_words_and_what_to_do_are_told(monkeypatch):
    machine = Machine(monkeypatch, COLAB)
    machine.code, machine.says = 1, "ERROR: the index is closed on Sundays"
    with pytest.raises(RuntimeError, match="(?s)could not install .*gguf>=0.10.*closed on Sundays.*restart the session"):
        colab.complete()


def test_versions_are_compared_by_their_numbers():
    order = ["0.4.3", "1.9", "1.26", "2.0.2", "2.9.1+cu126", "2.11", "2.11.1rc1", "5.9.0", "5.15"]
    assert sorted(order[::-1], key=colab._numbers) == order
    assert colab._numbers("2.11.0+cu128") == colab._numbers("2.11") and colab._numbers("26.10.post1") == (26, 10)


def test_a_version_that_pip_cannot_read_is_no_constraint(monkeypatch):
    Machine(monkeypatch, COLAB | {"apt": "0.1.43ubuntu1", "dated": "2026.6.1.17.39.59"}, loaded=["apt", "dated"])
    assert colab._in_use() == {"torch": "2.11.0+cu128", "numpy": "2.0.2", "dated": "2026.6.1.17.39.59"}


def test_every_dependency_is_a_name_and_a_least_version(monkeypatch):
    Machine(monkeypatch, COLAB)
    needs = colab.needs()
    assert [f"{name}>={least}" for name, least in needs.items()] == PROJECT["dependencies"]
    assert all(colab._plain(name) == name for name in needs)


def test_it_runs_before_anything_else_is_installed():
    code = "import sys; from minipeft import colab; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], cwd=REPO, text=True, capture_output=True, check=True)
    assert answer.stdout == "[]\n"
