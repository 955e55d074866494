"""The wheel carries all the package needs, and works far from the checkout."""

import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Where the wheel puts the folders of the checkout.
PLACES = {"data": "minipeft/_data", "kernels": "minipeft/_kernels", "notebooks": "minipeft/_notebooks"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built by pip as anyone would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", folder, REPO],
        check=True,
    )
    (file,) = folder.glob("minipeft-*.whl")
    return file


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """The Python of a clean environment that has the wheel, and this environment's torch.

    A path in a .pth file lends the packages installed here, and not what their own .pth files
    add, which is how an editable install of minipeft would come in.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    return python


def ask(python: Path, folder: Path, code: str) -> dict:
    """What `code`, run in `folder`, prints as JSON on its last line."""
    answer = subprocess.run([python, "-I", "-c", code], cwd=folder, text=True, capture_output=True, timeout=600)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.splitlines()[-1])


def tracked(*patterns: str) -> list[str]:
    answer = subprocess.run(["git", "ls-files", "--", *patterns], cwd=REPO, text=True, capture_output=True)
    if answer.returncode != 0:
        pytest.skip("not a git checkout")
    return answer.stdout.splitlines()


def test_the_wheel_carries_data_kernels_and_notebooks_byte_for_byte(wheel):
    files = tracked("data", "kernels", ":(glob)notebooks/*.ipynb")
    assert {file.split("/")[0] for file in files} == set(PLACES)
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        for file in files:
            folder, rest = file.split("/", 1)
            place = f"{PLACES[folder]}/{rest}"
            assert place in inside
            assert archive.read(place) == (REPO / file).read_bytes(), file


def test_the_wheel_carries_the_whole_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert set(tracked("minipeft")) <= inside
    assert {name.split("/")[0] for name in inside} == {"minipeft", "minipeft-0.1.0.dist-info"}
    assert "minipeft-0.1.0.dist-info/licenses/LICENSE" in inside
    notebooks = [name for name in inside if name.startswith("minipeft/_notebooks/")]
    assert all(re.fullmatch(r"minipeft/_notebooks/[^/]+\.ipynb", name) for name in notebooks), notebooks


def test_the_installed_wheel_works_from_an_empty_folder(elsewhere, tmp_path):
    found = ask(elsewhere, tmp_path, """
import json
from pathlib import Path
import minipeft as mp
import minipeft.data
folder = mp.data.data_folder()
print(json.dumps({
    "package": mp.__file__,
    "data": str(folder),
    "files": sorted(str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()),
    "cards": len(mp.load_data("drug_cards")),
    "rank": mp.LoRA().rank,
}))
""")
    package = Path(found["package"]).parent
    assert elsewhere.parent.parent in package.parents, "minipeft came from the checkout, not from the wheel"
    assert Path(found["data"]) == package / "_data"
    assert set(found["files"]) >= {file.removeprefix("data/") for file in tracked("data")}
    assert found["cards"] > 1000
    assert found["rank"] == 8
    assert not list(tmp_path.iterdir())


def test_the_installed_wheel_builds_its_kernels_and_runs_its_emulator(elsewhere, tmp_path):
    if not (shutil.which("g++") and shutil.which("c++")):
        pytest.skip("no C++ compiler here (on Debian and Ubuntu: the package g++)")
    found = ask(elsewhere, tmp_path, """
import json
import torch
from minipeft.quant import emulator, kernels, nf4
x = torch.ones(64)
emulator.run("__global__ void twice(float* x) { x[threadIdx.x] *= 2; }", "twice", 1, 64, [x])
print(json.dumps({
    "sources": str(kernels.source_folder()), "package": kernels.__file__, "built": kernels.build(), "why": kernels._failed,
    "used": nf4.compiled(x, "nf4") is kernels, "sum": nf4.dequantize(nf4.quantize(x)).sum().item(),
}))
""")
    assert Path(found["sources"]) == Path(found["package"]).parents[1] / "_kernels"
    assert found["built"] and found["used"] and found["sum"] == 128.0, found["why"]
    assert not list(tmp_path.iterdir())
