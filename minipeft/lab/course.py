"""The chapters of the course, and which of them are here."""

from __future__ import annotations

import json
from pathlib import Path

CHAPTERS = (  # name, what it teaches, the socket it uses
    ("00_start_here", "the map of the course", "all three"),
    ("01_full_fine_tuning", "every weight moves: the baseline, its memory, what it forgets", "none"),
    ("02_soft_prompts", "prompt tuning, P-tuning", "embedding"),
    ("03_prefixes", "prefix tuning, P-tuning v2", "key/value"),
    ("04_adapters", "bottleneck adapters", "module"),
    ("05_lora", "LoRA", "module"),
    ("06_dora_and_ia3", "DoRA, (IA)³", "module"),
    ("07_nf4", "four bits a number, by quantiles", "none"),
    ("08_cuda_kernel", "the same as a GPU kernel, on a GPU or in an emulator", "none"),
    ("09_qlora", "LoRA beside a four-bit base, LoftQ", "module"),
    ("10_merge_and_serve", "latency, merging, many adapters on one base", "all three"),
    ("11_hybrids", "several methods on one model", "all three"),
    ("12_choosing", "one fair comparison, and how to choose", "all three"),
    ("13_fact_check", "claims about PEFT, tested", "all three"),
)


def notebooks_folder() -> Path:
    """The folder with the notebooks: in the package, or in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "_notebooks"
    return inside if inside.exists() else package.parent / "notebooks"


def chapters() -> list[dict]:
    """One row a chapter: its name, what it teaches, its socket, its exercises, whether it is here.

    What is here is read from the folder of notebooks, the number of exercises from the checks, and
    the minutes from data/results/notebooks.json (None where nothing was measured).
    """
    from minipeft.checks import exercises
    from minipeft.data import data_folder

    path = data_folder() / "results" / "notebooks.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    counts: dict[str, int] = {}
    for exercise in exercises().values():
        number = exercise.chapter[2:4]                  # "ch05_lora" -> "05"
        counts[number] = counts.get(number, 0) + 1
    rows = []
    for name, what, socket in CHAPTERS:
        here = (notebooks_folder() / f"{name}.ipynb").exists()
        rows.append({
            "chapter": name,
            "what": what,
            "socket": socket,
            "here": here,
            "exercises": counts.get(name[:2]) if here else None,
            "minutes, cpu": measured.get(name, {}).get("cpu", {}).get("minutes"),
            "minutes, gpu": measured.get(name, {}).get("gpu", {}).get("minutes"),
        })
    return rows
