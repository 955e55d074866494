"""The pictures of README, and two of its tables: `make pictures`, and at the end of `make results`.

Drawn and written from data/results: the comparison (comparison.json), and the minutes and memory of each chapter
(notebooks.json). What has not been measured is left out, in README as well.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
FOLDER = Path("data") / "pictures"
TASKS = {"cards": "SmolLM2 learns drug cards", "sentiment": "MiniLM learns to tell positive from negative texts in four domains"}


def draw(root: Path = ROOT) -> list[Path]:
    """Write the pictures; the files."""
    from minipeft.lab import contest, plots

    drawings = {"three_sockets": plots.three_sockets_figure()} | {
        f"comparison_{task}": contest.comparison_figure(task) for task in TASKS}
    written = []
    for name, drawing in drawings.items():
        if isinstance(drawing, plots.Drawing):
            file = root / FOLDER / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(plots.png(drawing))
            written.append(file)
    return written


def chapters(before: str) -> str:
    """The table of the chapters, with what is known of their runs; chapters and what they are about stay as they are."""
    runs = json.loads((ROOT / "data" / "results" / "notebooks.json").read_text(encoding="utf-8"))
    lines = ["| chapter | you will | minutes, cpu | peak, GiB | minutes, gpu | run on |", "|---|---|---|---|---|---|"]
    for row in before.splitlines():
        if found := re.match(r"\| `(\w+)` \| (.+?) \|", row):
            name, about = found.groups()
            cpu, gpu = (runs.get(name, {}).get(profile, {}) for profile in ("cpu", "gpu"))
            lines.append(f"| `{name}` | {about} | {told(cpu.get('minutes'), '.1f')} | {told(cpu.get('peak_memory_gib'), '.1f')} | "
                         f"{told(gpu.get('minutes'), '.1f')} | {cpu.get('date', '')} |")
    whole = sum(run["cpu"]["minutes"] for run in runs.values() if "cpu" in run)
    devices = sorted({run["cpu"]["device"] for run in runs.values() if "cpu" in run})
    return "\n".join(lines) + f"\n\nIn the cpu profile together {whole:.0f} minutes. {'; '.join(devices)}."


def comparison(before: str) -> str:
    """The table and the picture of each task."""
    from minipeft.lab import contest

    parts = []
    for task, title in TASKS.items():
        found, slow = contest.rows(task), contest.latency(task)
        if not found:
            continue
        lines = ["| | score | of full fine-tuning | trained | file, MB | training, s | peak, GiB | latency, of the base | merged | forgetting |",
                 "|---|---|---|---|---|---|---|---|---|---|"]
        for name, r in found.items():
            twin = {"rsLoRA": "LoRA", "PiSSA": "LoRA", "LoftQ": "QLoRA"}.get(name, name)
            times = [slow.get(f"{twin}{end}", {}).get("forward / base") for end in ("", ", merged")]
            spread = f" ± {r['spread']:.3f}" if r.get("spread") is not None else ""
            forgotten = r.get("forgetting")
            if forgotten is not None and task == "sentiment":
                forgotten *= 100                                 # a share, told in points
            cells = [name, f"{r['score']:.3f}{spread}", told(r.get("of full"), ".2f"), f"{r['trained']:,}", told(r.get("file MB"), ".3g"),
                     told(r.get("seconds"), ".0f"), told(r.get("peak GiB"), ".2f"), *(told(t, ".2f") for t in times), told(forgotten, ".1f" if task == "sentiment" else ".3f")]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"**{title}.** Score: {contest.SCORE[task]}; forgetting: {contest.FORGOTTEN[task]}. {contest.stamp(contest.comparison())}.\n\n"
                     f"![The scores as a picture]({(FOLDER / f'comparison_{task}.png').as_posix()})\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def told(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


PARTS = {"chapters": chapters, "comparison": comparison}


def write_readme(root: Path = ROOT) -> None:
    """Write the parts anew. `ValueError` where the marks of one are not there, once each and in order."""
    path = root / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}: written by `make pictures` -->\n", f"<!-- end of {name} -->\n"
        if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
            raise ValueError(f"{path} needs one line {begin.strip()!r} and after it one line {end.strip()!r}")
        before, rest = text.split(begin)
        middle, after = rest.split(end)
        text = before + begin + part(middle).strip("\n") + "\n" + end + after
    path.write_text(text, encoding="utf-8")


def main() -> None:
    for file in draw():
        print(file.relative_to(ROOT))
    write_readme()
    print("README.md")


if __name__ == "__main__":
    main()
