"""Several adapters that act together, on disk as one folder. `mp.save_adapter(model, folder, ["lora", "prompt"])` writes

    hybrid.json     the parts in the order in which they act: name, folder, whether it is frozen, SHA-256 of its files
    lora/           each part a checkpoint of its own, as checkpoint.py writes it: PEFT and minipeft open it alone
    prompt/

A hybrid is not a method: it is two or more of them attached to one model, each unchanged. So nothing here knows any
method, and whatever can be saved can be a part.

A folder holds one save or the other, never half of one. New parts get folders that did not exist; `hybrid.json` is
replaced when all are complete, and only then are the old parts removed. What a killed save leaves behind is named by
no `hybrid.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from . import checkpoint, sockets
from .checkpoint import CONFIG, ENCODER, NEXT_ENCODER, TENSORS

MANIFEST = "hybrid.json"


def save_parts(model: nn.Module, folder: Path, names: Sequence[str]) -> None:
    """Write these adapters as one folder; see `mp.save_adapter`."""
    check_names(names)
    adapters = [sockets.the_adapter(model, name) for name in names]
    if (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} holds the checkpoint of one adapter; a hybrid needs a folder of its own")
    checkpoint.make_folder(folder)
    before = _parts_in(folder)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as making:
        for i, name in enumerate(names):
            checkpoint.save_adapter(model, Path(making, str(i)), name)
        parts = []
        try:
            for i, adapter in enumerate(adapters):
                digests = _digests(Path(making, str(i)))
                place = _free(folder, adapter.name)
                parts.append({"name": adapter.name, "folder": place.name, "sha256": digests,
                              "frozen": not any(p.requires_grad for p in adapter.parameters())})
                os.replace(Path(making, str(i)), place)
            with open(Path(making, MANIFEST), "w", encoding="utf-8") as file:
                json.dump({"parts": parts, "sha256": _digest(parts)}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(Path(making, MANIFEST), folder / MANIFEST)
        except BaseException:
            if _parts_in(folder) != parts:
                _remove(folder, parts)
            raise
    _remove(folder, before)


def load_parts(model: nn.Module, folder: Path, names: Sequence[str] | None = None) -> dict[str, sockets.Adapter]:
    """Attach the parts of a folder, by their own names or by others, and activate them alone; see `mp.load_adapter`."""
    parts = _manifest(folder)
    names = [part["name"] for part in parts] if names is None else list(names)
    check_names(names)
    if len(names) != len(parts):
        raise ValueError(f"name is {names}; {folder} holds {len(parts)} adapters "
                         f"({', '.join(part['name'] for part in parts)}), each needs one")
    for name in names:
        sockets.check_new_name(model, name)
    adapters = {}
    for part, name in zip(parts, names, strict=True):
        place = folder / part["folder"]
        try:
            files = checkpoint.files_in(place)
            if _digests(place) != part["sha256"]:
                raise ValueError("its files are not those that were saved; a part that was changed on purpose is "
                                 "loaded from its own folder")
            adapters[name] = checkpoint.read(model, *files, name)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        adapters[name].requires_grad_(not part["frozen"])
    for adapter in adapters.values():
        sockets.plug(model, adapter)
    sockets.activate(model, names)
    return adapters


def check_names(names: Sequence[str]) -> None:
    """`ValueError` unless it is a list of different names."""
    if not names or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise ValueError(f"name is {list(names)}; accepted is a name, or a list of different names")


def _manifest(folder: Path) -> list[dict]:
    """The parts that hybrid.json names, if it is whole."""
    try:
        read = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = read["sha256"] == _digest(read["parts"])
        folders = [part["folder"] for part in read["parts"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}") from None
    if not whole:
        raise ValueError(f"{folder / MANIFEST} is damaged or was changed: it is not what was saved")
    for place in folders:                                        # what is read and removed lies in this folder
        if not isinstance(place, str) or place in ("", ".", "..") or Path(place).name != place:
            raise ValueError(f"{folder / MANIFEST} names the folder {place!r}; accepted is one beside it")
    return read["parts"]


def _parts_in(folder: Path) -> list[dict]:
    """The parts of the save that lies there; none if there is none, or a damaged one."""
    with contextlib.suppress(ValueError, FileNotFoundError):
        return _manifest(folder)
    return []


def _digest(parts: list[dict]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(place: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files."""
    return {name: hashlib.sha256((place / name).read_bytes()).hexdigest()
            for name in (CONFIG, TENSORS, ENCODER) if (place / name).is_file()}


def _free(folder: Path, name: str) -> Path:
    """A folder for this adapter that does not exist yet: its name, or with a number behind it."""
    plain = re.sub(r"[^\w-]", "_", name)[:100]
    return next(place for end in itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
                if not os.path.lexists(place := folder / f"{plain}{end}"))


def _remove(folder: Path, parts: list[dict]) -> None:
    """The parts' own files, and their folders where nothing else lies in them."""
    for part in parts:
        place = folder / part["folder"]
        for name in (CONFIG, TENSORS, ENCODER, NEXT_ENCODER):
            (place / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.rmdir()
