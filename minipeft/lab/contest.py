"""The course's one comparison, read from data/results/comparison.json and drawn. notebooks/compare.py measures it.

Nothing here is measured or typed: where a figure is not there yet, what is shown says which command measures it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from minipeft.lab.pages import Page, table
from minipeft.lab.plots import COLOURS, SOCKET_COLOURS, Drawing, new_figure, style

COMMAND = "make results"
SOCKET = {"prompt tuning": "embedding", "P-tuning": "embedding", "prefix tuning": "key/value", "P-tuning v2": "key/value"}
SCORE = {"cards": "mean of format, facts, recall", "sentiment": "share of texts right, mean of four domains"}
FORGOTTEN = {"cards": "loss on plain English, more", "sentiment": "old skill lost, points"}
QUESTIONS = {  # name: (axis, logarithmic, title)
    "rates": ("learning rate", True, "LoRA and full fine-tuning at many rates"),
    "ranks": ("rank", True, "LoRA's rank, with α = 2r"),
    "lengths": ("soft tokens", True, "the length of a soft prompt"),
    "starts": ("", False, "the start alone drawn anew"),
    "sizes": ("texts to learn from", True, "how many texts, at the same number of steps"),
}


def comparison() -> dict:
    """data/results/comparison.json; {} where nothing has been measured."""
    from minipeft.data import data_folder

    path = data_folder() / "results" / "comparison.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def not_there(what: str) -> Page:
    """What is shown in place of a figure that has not been measured."""
    text = f"{what}: not measured yet. `{COMMAND}` measures it (hours on two cores; it goes on where it was stopped)."
    return Page(f"<p>{text.replace('`', '')}</p>", text)


def stamp(results: Mapping) -> str:
    """When, on what and by which command: under every table and figure."""
    dates, versions = results["dates"], results["versions"]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    more = f"; {results['missing runs']} runs still missing" if results["missing runs"] else ""
    return f"{results['command']}, {when}, {'; '.join(results['devices'])}; torch {versions['torch']}, minipeft {versions['minipeft']}{more}"


def rows(task: str, results: Mapping | None = None) -> dict[str, dict]:
    """method -> its row on "cards" or "sentiment", those with a score alone."""
    if task not in SCORE:
        raise ValueError(f"no task is called {task!r} (tasks: {', '.join(SCORE)})")
    results = comparison() if results is None else results
    return {row["method"]: row for row in results.get(task, ()) if row.get("score") is not None}


def latency(task: str, results: Mapping | None = None) -> dict[str, dict]:
    """name -> its latency row; merged ones are called "LoRA, merged"."""
    results = comparison() if results is None else results
    return {row["model"]: row for row in results.get("latency", {}).get(task, {}).get("rows", ())}


def comparison_table(task: str, results: Mapping | None = None) -> Page:
    """One row a method: score with spread, what trains, file, time, memory, latency apart and merged, forgetting."""
    results = comparison() if results is None else results
    found, slow = rows(task, results), latency(task, results)
    if not found:
        return not_there(f"the comparison on {task}")
    lines = []
    for name, r in found.items():
        speed = slow.get({"rsLoRA": "LoRA", "PiSSA": "LoRA", "LoftQ": "QLoRA"}.get(name, name), {})
        merged = slow.get({"rsLoRA": "LoRA", "PiSSA": "LoRA"}.get(name, name) + ", merged", {})
        line = {"method": name, "score": r["score"], "±": r.get("spread")}
        if task == "cards":
            line |= {k: r[k] for k in ("format", "facts", "recall")}
        forgotten = r.get("forgetting")
        line |= {"of full": r.get("of full"), "trained": r["trained"], "%": r.get("percent"), "rate": r.get("rate"), "file MB": r.get("file MB"), "seconds": r.get("seconds"),
                 "peak GiB": r.get("peak GiB"), "latency / base": speed.get("forward / base"), "merged": merged.get("forward / base"),
                 FORGOTTEN[task]: 100 * forgotten if forgotten is not None and task == "sentiment" else forgotten}
        if r.get("diverged"):
            line["runs that diverged"] = r["diverged"]
        lines.append(line)
    return table(lines, f"{SCORE[task]}. {stamp(results)}")


def comparison_figure(task: str = "cards", results: Mapping | None = None) -> Drawing | Page:
    """Scores as dots with their range over seeds, coloured by socket; the line is full fine-tuning."""
    results = comparison() if results is None else results
    found = rows(task, results)
    if not found:
        return not_there(f"the comparison on {task}")
    figure, ax = new_figure(width=8.4, height=1.3 + 0.34 * len(found))
    with style():
        for y, (name, r) in enumerate(found.items()):
            none = r["trained"] == 0 or name in ("frozen base", "hard prompt", "full fine-tuning")
            colour = COLOURS["grey"] if none else SOCKET_COLOURS[SOCKET.get(name, "module")]
            ax.plot([r["lowest"] if r["lowest"] is not None else r["score"], r["highest"] if r["highest"] is not None else r["score"]], [y, y], color=colour, linewidth=4, alpha=0.35)
            ax.plot(r["score"], y, "o", color=colour, markersize=8)
            ax.annotate(f"{r['trained']:,}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=COLOURS["black"])
        if full := found.get("full fine-tuning"):
            ax.axvline(full["score"], color=COLOURS["grey"], linestyle="--", linewidth=1.2)
        if task == "sentiment":
            ax.axvline(next(iter(found.values()))["commoner"], color=COLOURS["vermilion"], linestyle=":", linewidth=1.2)
        ax.set_yticks(range(len(found)), list(found))
        ax.set(ylim=(len(found) - 0.4, -1.1), xlim=(0 if task == "cards" else min(0.45, min(r["score"] if r["lowest"] is None else r["lowest"] for r in found.values()) - 0.02), 1), xlabel=SCORE[task])
        ax.text(1.01, -0.9, "numbers trained", transform=ax.get_yaxis_transform(), fontsize=9, va="center")
        for socket, colour in SOCKET_COLOURS.items():
            ax.plot([], [], "o", color=colour, label=socket)
        ax.plot([], [], "o", color=COLOURS["grey"], label="no piece")
        figure.legend(loc="outside upper center", ncols=4, fontsize=9)
        figure.text(0.01, 0.002, stamp(results), fontsize=7, color=COLOURS["grey"])
    return figure


def sweep_figure(task: str, results: Mapping | None = None) -> Drawing | Page:
    """The sweeps: the validation loss of every method against its rate; a ring on the one that was taken."""
    results = comparison() if results is None else results
    found = {r["method"]: r for r in results.get(task, ()) if r.get("rates")}
    if not found:
        return not_there(f"the sweeps on {task}")
    figure, ax = new_figure(width=8.6, height=4.2)
    with style():
        import matplotlib

        colours = matplotlib.colormaps["tab20"]
        for i, (name, r) in enumerate(found.items()):
            points = sorted((float(rate), loss) for rate, loss in r["rates"].items() if loss is not None)
            if not points:
                continue
            ax.plot(*zip(*points, strict=True), "o-", markersize=4, linewidth=1.4, color=colours(i), label=name)
            taken = [p for p in points if p[0] == r.get("rate")]
            ax.plot([p[0] for p in taken], [p[1] for p in taken], "o", markersize=10, markerfacecolor="none", color=colours(i))
        ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="loss, validation")
        figure.legend(loc="outside right center", fontsize=9)
        figure.text(0.01, 0.002, stamp(results), fontsize=7, color=COLOURS["grey"])
    return figure


def question_figure(name: str, results: Mapping | None = None) -> Drawing | Page:
    """One of the further questions: mean, and least to most over the seeds."""
    if name not in QUESTIONS:
        raise ValueError(f"no question is called {name!r} (questions: {', '.join(QUESTIONS)})")
    results = comparison() if results is None else results
    points = results.get("questions", {}).get(name)
    if not points:
        return not_there(f"the question of {name}")
    label, log, title = QUESTIONS[name]
    series: dict[str, list] = {}
    for key, point in points.items():
        group, _, value = key.rpartition(": ")
        series.setdefault(group, []).append((float(value) if log else value, point["score"]))
    times = {task: sorted((int(row["model"].removeprefix("prompt of ")), row["forward / base"]) for row in table["rows"]
                          if row["model"].startswith("prompt of ")) for task, table in results.get("latency", {}).items()}
    times = times if name == "lengths" and any(times.values()) else {}
    figure, axes = new_figure(2 if times else 1, width=9.4 if times else 7.2, height=3.8)
    ax = axes[0] if times else axes
    with style():
        for i, (group, found) in enumerate(series.items()):
            colour = list(COLOURS.values())[i % 6]
            found = sorted(found) if log else found
            xs = [v for v, _ in found] if log else range(len(found))
            middle = [s["mean"] for _, s in found]
            ax.errorbar(xs, middle, yerr=[[m - s["low"] for m, (_, s) in zip(middle, found, strict=True)], [s["high"] - m for m, (_, s) in zip(middle, found, strict=True)]],
                        fmt="o-" if log else "o", capsize=3, color=colour, label=group or None)
            if not log:
                ax.set_xticks(range(len(found)), [v.replace(", ", ",\n").replace(" ", "\n", 1) for v, _ in found], fontsize=9)
        if log:
            ax.set_xscale("log")
        ax.set(xlabel=label, ylabel="score", title=title)
        if any(series):
            ax.legend(fontsize=9)
        if times:
            for task, colour in (("cards", "blue"), ("sentiment", "orange")):
                if times.get(task):
                    axes[1].plot(*zip(*times[task], strict=True), "o-", color=COLOURS[colour], label=task)
            axes[1].axhline(1, color=COLOURS["grey"], linewidth=1)
            axes[1].set(xlabel="soft tokens", ylabel="time of a pass, 1 = the base", title="what the length costs (64 tokens of text)")
            axes[1].legend(fontsize=9)
        figure.text(0.01, 0.002, stamp(results), fontsize=7, color=COLOURS["grey"])
    return figure
