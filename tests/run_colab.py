"""Notebooks as Colab runs them: one .ipynb in an empty folder, beside a torch and a transformers that are there already.

    make test-colab

The stand-in for a Colab machine is a virtual environment that borrows this environment's packages, all but minipeft
and what Colab lacks, from a folder that pip may not change. `google.colab` is an empty module, loaded before the first
cell. The set-up cells run as they are; git takes the repository that they name from a copy of this checkout. What else
they want, pip gets from the package index. One thing is not as on Colab: hatchling, which builds the wheel, is borrowed.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))
WHOLE = ("00_start_here", "05_lora")  # run to their end; of the others, the set-up cell
LACKING = ("minipeft", "gguf", "ninja")  # Colab's list of packages has none of them
SECONDS = 900
COUNTED = ("torch", "numpy", "transformers", "tokenizers", "huggingface-hub", "matplotlib", "ipywidgets")
LOOK = f"""
import json, sys
from importlib import metadata
found = {{"versions": {{name: metadata.version(name) for name in {COUNTED}}}}}
found["path"] = [p for p in sys.path if p]
for name in ("torch", "numpy", "minipeft", "gguf"):
    if name in sys.modules or name == "torch":
        found[name] = __import__(name).__file__
print(json.dumps(found))
"""


class Colab:
    """A machine like Colab's: its Python, its packages, its variables, and the repository that it can reach."""

    def __init__(self, folder: Path):
        self.folder, self.packages = folder, folder / "packages"
        self._lend()
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = folder.glob("venv/lib/python*/site-packages")
        (self.site / "lent.pth").write_text(f"{self.packages}\n")
        (self.site / "google" / "colab").mkdir(parents=True)
        (self.site / "google" / "colab" / "__init__.py").write_text("")
        startup = folder / "ipython" / "profile_default" / "startup"
        startup.mkdir(parents=True)
        (startup / "colab.py").write_text("import google.colab\n")
        settings = tomllib.loads((REPO / "pyproject.toml").read_text())
        published = f"https://github.com/{settings['tool']['minipeft']['repository']}"
        drop = ("PYTHONPATH", "PYTHONHOME", "MINIPEFT_RECORD", "VIRTUAL_ENV")
        self.environment = {k: v for k, v in os.environ.items() if k not in drop} | {
            "MINIPEFT_PROFILE": "smoke",
            "IPYTHONDIR": str(folder / "ipython"),
            "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say: build with the hatchling that is here
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            # git: wherever the published address is asked for, take the copy
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{self._publish()}.insteadOf",
            "GIT_CONFIG_VALUE_0": published,
            "GIT_TERMINAL_PROMPT": "0",
        }

    def _lend(self) -> None:
        """Links to every installed package but those that Colab lacks."""
        kept_back = set()
        for name in LACKING:
            try:
                files = metadata.distribution(name).files or []
            except metadata.PackageNotFoundError:
                continue
            kept_back |= {file.parts[0] for file in files}
        self.packages.mkdir()
        for place in [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]:
            for path in place.iterdir():
                link = self.packages / path.name
                if path.name not in kept_back and path.suffix != ".pth" and not link.exists():
                    link.symlink_to(path)

    def _publish(self) -> Path:
        """A git repository with this checkout's files as they are now, committed or not."""
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, text=True, capture_output=True)
        if listed.returncode:
            pytest.skip("not a git checkout")
        copy = self.folder / "published"
        for name in listed.stdout.splitlines():
            if (REPO / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPO / name, copy / name)
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "as it is"]):
            subprocess.run(["git", *command], cwd=copy, check=True, capture_output=True)
        return copy

    def forget(self) -> None:
        """The next notebook finds a machine without minipeft, as a new Colab session is."""
        for path in self.site.glob("minipeft*"):
            shutil.rmtree(path)

    def installed(self) -> set[str]:
        """What pip has put beside the lent packages: {"gguf", …}."""
        return {path.name.split("-")[0] for path in self.site.glob("*.dist-info")}

    def ask(self, code: str) -> dict:
        answer = subprocess.run([self.python, "-c", code], env=self.environment, cwd=self.folder, text=True, capture_output=True)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout.splitlines()[-1])

    def run(self, path: Path, folder: Path, only_set_up: bool) -> tuple[nbformat.NotebookNode, dict]:
        """Run a notebook alone in an empty folder: it, with its outputs, and what its kernel found at the end."""
        folder.mkdir()
        shutil.copy(path, folder)
        notebook = nbformat.read(folder / path.name, as_version=4)
        if only_set_up:
            (last,) = [i for i, cell in enumerate(notebook.cells) if "setup" in cell.metadata.get("tags", [])]
            del notebook.cells[last + 1 :]
        notebook.cells.append(nbformat.v4.new_code_cell(LOOK, metadata={"tags": ["look"]}))
        python = str(self.python)

        class ItsPython(AsyncKernelManager):
            @property
            def kernel_spec(self):
                return KernelSpec(argv=[python, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")

        began = time.monotonic()
        client = NotebookClient(
            notebook, kernel_manager_class=ItsPython, kernel_name="python3", startup_timeout=180, store_widget_state=False,
            resources={"metadata": {"path": str(folder)}},
            timeout_func=lambda cell: max(1, int(began + SECONDS - time.monotonic())),
        )  # fmt: skip
        client.execute(env=self.environment)
        return notebook, json.loads(notebook.cells.pop().outputs[-1].text)


@pytest.fixture(scope="session")
def colab(tmp_path_factory) -> Colab:
    if shutil.which("git") is None:
        pytest.skip("git is not here; on Colab it is")
    if sys.platform == "win32":
        pytest.skip("the stand-in for Colab is made of links")
    asyncio.set_event_loop_policy(None)
    return Colab(tmp_path_factory.mktemp("colab"))


def outputs(notebook, kind=None):
    return [o for cell in notebook.cells for o in cell.get("outputs", []) if kind in (None, o.output_type)]


def printed(notebook) -> str:
    return "".join(o.text for o in outputs(notebook, "stream"))


def is_from(colab: Colab, found: dict, before: dict) -> None:
    """torch and numpy are the lent ones, in the versions they had; minipeft is the installed one."""
    assert found["versions"] == before["versions"] and found["torch"] == before["torch"]
    assert Path(found["numpy"]).is_relative_to(colab.packages) and Path(found["torch"]).is_relative_to(colab.packages)
    assert Path(found["minipeft"]).is_relative_to(colab.site)
    assert not any(Path(p) == REPO for p in found["path"])
    assert colab.installed() <= set(LACKING)


@pytest.mark.parametrize("name", sorted((p.stem for p in NOTEBOOKS), key=lambda n: (n not in WHOLE, n)))
def test_a_notebook_opens_alone(colab, tmp_path, name):
    (path,) = [p for p in NOTEBOOKS if p.stem == name]
    colab.forget()
    before = colab.ask(LOOK)
    assert "minipeft" not in colab.installed() and "minipeft" not in before
    notebook, found = colab.run(path, tmp_path / "empty", only_set_up=name not in WHOLE)
    is_from(colab, found, before)
    assert colab.installed() == set(LACKING)  # gguf and ninja too: nothing of minipeft's is missing
    assert f"torch {before['versions']['torch']}" in printed(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    unexpected = [o for cell in code if "raises-exception" not in cell.metadata.get("tags", [])
                  for o in cell.outputs if o.output_type == "error"]  # fmt: skip
    assert not unexpected
    if name in WHOLE:
        shown = [o.data for o in outputs(notebook) if "data" in o]
        widgets = [data for data in shown if "application/vnd.jupyter.widget-view+json" in data]
        assert widgets and not any("text/html" in data for data in widgets)  # Colab would show both
        assert len(code) > 15 and any("image/png" in data for data in shown)


def test_the_stand_in_does_not_lend_this_checkout(colab, tmp_path):
    colab.forget()
    answer = subprocess.run([colab.python, "-c", "import minipeft"], cwd=tmp_path, env=colab.environment, text=True, capture_output=True)
    assert answer.returncode and "No module named 'minipeft'" in answer.stderr


def package(folder: Path, name: str, version: str, needs: str = "") -> None:
    """A package of one module: installed, or a wheel in a folder called "offered"."""
    needs = f"Requires-Dist: {needs}\n" if needs else ""
    files = {
        f"{name}.py": f"version = '{version}'\n",
        f"{name}-{version}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}",
        f"{name}-{version}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}-{version}.dist-info/top_level.txt": f"{name}\n",
    }
    files[f"{name}-{version}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in files)
    if folder.name == "offered":
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)
    else:
        for path, text in files.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)


def test_the_real_pip_renews_what_is_too_old_but_nothing_that_is_loaded_and_never_numpy(colab, tmp_path):
    offered = tmp_path / "offered"
    for name in ("toy_old", "toy_loaded"):
        package(colab.packages, name, "1.0")
        package(offered, name, "2.0")
    package(offered, "toy_lower", "1.5")
    package(offered, "toy_new", "1.0", needs="toy_lower")
    package(offered, "toy_greedy", "1.0", needs="numpy>=99")
    code = f"""
import json, os, sys
os.environ |= {{"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": {str(offered)!r}}}
sys.path.append({str(colab.folder / "published")!r})
import toy_loaded
from minipeft import colab
said = []
colab._say = said.append
colab.needs = lambda: {{"toy-old": "2.0", "toy-loaded": "2.0", "toy-new": "1.0", "numpy": "1.0"}}
installed = colab.complete()
import toy_old
colab.needs = lambda: {{"toy-greedy": "1.0"}}
try:
    colab.complete()
    refused = ""
except RuntimeError as error:
    refused = str(error)
print(json.dumps({{"installed": installed, "said": said, "versions": [toy_old.version, toy_loaded.version], "refused": refused}}))
"""
    before = colab.ask(LOOK)["versions"]
    found = colab.ask(code)
    assert found["installed"] == ["toy-old 2.0", "toy-new 1.0"] and found["versions"] == ["2.0", "1.0"]
    assert any("toy-loaded 1.0" in line and "restart the session" in line for line in found["said"])
    assert "toy-greedy" in found["refused"] and "numpy" in found["refused"]
    assert colab.ask(LOOK)["versions"] == before
    assert {"toy_old", "toy_new", "toy_lower"} <= colab.installed() and "toy_loaded" not in colab.installed()
    for path in colab.site.glob("toy_*"):  # the notebooks of this worker find the machine as it was
        shutil.rmtree(path) if path.is_dir() else path.unlink()
