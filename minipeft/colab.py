"""On Colab, where torch, numpy and transformers are installed already: the rest, and nothing twice.

A notebook's set-up cell installs minipeft with `pip install --no-deps`, then calls `complete()`. pip may
bring what is missing, and a newer version of what is too old. It may not touch torch and numpy, nor
anything that this session has loaded: their files would change under a running kernel, and the session
would have to be restarted.

This module needs Python's own library only, because it runs before anything else is known to be there.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

UNTOUCHED = ("torch", "numpy")  # whatever happens: other packages there are compiled against them
RELEASE = re.compile(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+[\w.]+)?")  # what pip takes; a system's packages have others


def complete() -> list[str]:
    """Install what minipeft needs and this machine lacks, beside what is there: what was installed, as `name version`.

    What is too old and cannot be replaced now is named on stderr, with what to do about it.
    Raises `RuntimeError`, with what pip said, where pip fails.
    """
    kept = _in_use()
    wanted = {}
    for name, least in needs().items():
        have = _version(name)
        if have is not None and _numbers(have) >= _numbers(least):
            continue
        if have is not None and name in kept:
            _say(_too_old(name, have, least))
        else:
            wanted[name] = f"{name}>={least}"
    if wanted:
        _install(list(wanted.values()), [f"{name}=={version}" for name, version in kept.items()])
    installed = [f"{name} {_version(name)}" for name in wanted]
    if installed:
        _say(f"installed {', '.join(installed)}")
    return installed


def needs() -> dict[str, str]:
    """{package: least version}: minipeft's dependencies, as its own metadata names them."""
    lines = [line for line in metadata.requires("minipeft") or [] if "extra ==" not in line]
    return dict(re.fullmatch(r"([\w.-]+)>=([\d.]+)", line).groups() for line in lines)


def _in_use() -> dict[str, str]:
    """{package: version} of what has to stay as it is: torch, numpy, and the owners of every loaded module."""
    owners = metadata.packages_distributions()
    loaded = {owner for module in _loaded() for owner in owners.get(module, ())}
    names = {_plain(name) for name in (*UNTOUCHED, *loaded)} - {"minipeft"}
    versions = {name: _version(name) for name in sorted(names)}
    return {name: version for name, version in versions.items() if version and RELEASE.fullmatch(version)}


def _loaded() -> list[str]:
    return list(sys.modules)


def _install(wanted: list[str], kept: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "kept.txt")
        constraints.write_text("\n".join(kept) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "--constraint", str(constraints), *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"could not install {', '.join(wanted)}, which minipeft needs. pip said:\n\n{(done.stdout + done.stderr).strip()[-3000:]}\n\n"
            "If it could not reach the package index, run this cell again. If it names a package that has to stay as "
            "it is, restart the session (Runtime > Restart session) and run this cell first."
        )
    importlib.invalidate_caches()


def _too_old(name: str, have: str, least: str) -> str:
    line = f"this session has {name} {have}; the course is tested from {least} on. It goes on with what is there; if a cell fails, "
    if name in UNTOUCHED:
        return line + "choose the newest runtime version (Runtime > Change runtime type) and run this cell again"
    return line + f"restart the session (Runtime > Restart session) and run this cell before anything else loads {name}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """`2.11.0+cu128` -> (2, 11): the numbers of the release, without zeros at its end."""
    release = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release)


def _plain(name: str) -> str:
    """A package's name as the index spells it: `huggingface_hub` -> `huggingface-hub`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _say(line: str) -> None:
    print(f"minipeft: {line}", file=sys.stderr, flush=True)
