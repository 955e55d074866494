"""Small pieces of a notebook page: tables, hints, the box of measured minutes, recorded figures."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Iterable, Mapping

MUTED = "color:#57606a"
BOX = "border-left:4px solid #0072B2;padding:.4em .9em;margin:.6em 0;max-width:46em"


class Page:
    """A piece of HTML with a plain-text form. Shown as HTML where the reader's front end can."""

    def __init__(self, markup: str, text: str):
        self.markup, self.text = markup, text

    def _repr_html_(self) -> str:
        return self.markup

    def __repr__(self) -> str:
        return self.text


def hint(text: str) -> Page:
    """A folded hint. Use it where the hint is computed; otherwise write `<details>` in markdown."""
    markup = f"<details><summary>Hint</summary><p>{marked(text)}</p></details>"
    return Page(markup, f"Hint: {text}")


def marked(text: str) -> str:
    """Escape `text` for HTML; words in backticks become code. `$…$` stays for MathJax."""
    parts = html.escape(text, quote=False).split("`")
    if len(parts) % 2 == 0:  # an odd number of backticks: leave them as they are
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def table(rows: Iterable[Mapping], caption: str = "") -> Page:
    """A table of `rows`, dicts of column name to value; a missing value is shown as a dash.

    Counts get thousands separators, other numbers four significant digits.
    """
    rows = [dict(row) for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    right = [
        all(isinstance(row.get(column), (int, float, type(None))) for row in rows) and bool(rows) for column in columns
    ]
    align = ["text-align:right" if r else "text-align:left" for r in right]
    head = "".join(f'<th style="{a}">{marked(str(c))}</th>' for a, c in zip(align, columns, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td style="{a}">{marked(v)}</td>' for a, v in zip(align, row, strict=True)) + "</tr>"
        for row in cells
    )
    title = f"<caption>{marked(caption)}</caption>" if caption else ""
    markup = f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    widths = [max(len(str(c)), *(len(row[i]) for row in cells), 0) for i, c in enumerate(columns)]

    def line(values):
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    text = "\n".join([line([str(c) for c in columns]), *(line(row) for row in cells)])
    return Page(markup, f"{caption}\n{text}" if caption else text)


def _shown(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0 or 1e-4 <= abs(value) < 1e4:
            return f"{value:.4g}"
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.3g}"
    return str(value)


def record(**figures) -> None:
    """Keep measured figures: `record(trained_percent=0.36, exact=0.94)`.

    The headless runner collects them, and fails the notebook if one named in its header is missing.
    Values are numbers, strings, booleans, lists and dicts of these; tensors and numpy numbers are
    converted. A figure that is not finite is a ValueError. In a session of your own nothing is written.
    """
    plain = {name: _plain(value, name) for name, value in figures.items()}
    path = os.environ.get("MINIPEFT_RECORD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")


def _plain(value, name: str):
    if hasattr(value, "tolist"):  # a tensor, a numpy array or a numpy number
        value = (value.detach() if hasattr(value, "detach") else value).tolist()
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the figure {name!r} is {value}; only finite numbers are recorded")
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, name) for inner in value]
    raise TypeError(f"the figure {name!r} is a {type(value).__name__}; accepted: numbers, strings, lists and dicts")


def runtime_box(notebook: str) -> Page:
    """Measured minutes and peak memory of a notebook such as `"05_lora"`, per profile.

    Read from data/results/notebooks.json, which `make results-chapters` writes; a profile that has not been
    measured says so.
    """
    from minipeft.data import data_folder

    path = data_folder() / "results" / "notebooks.json"
    measured = json.loads(path.read_text(encoding="utf-8")).get(notebook, {}) if path.exists() else {}
    lines = []
    for profile in ("cpu", "gpu"):
        entry = measured.get(profile)
        if entry is None:
            lines.append((profile, "not measured yet"))
        else:
            minutes, gib = entry["minutes"], entry["peak_memory_gib"]
            lines.append(
                (profile, f"{minutes:.1f} minutes, {gib:.1f} GiB at its peak ({entry['device']}; {entry['date']})")
            )
    rows = "".join(f"<div><b>{profile}</b>: {html.escape(what)}</div>" for profile, what in lines)
    markup = f'<div style="{BOX}"><div style="{MUTED}">Time and memory of this notebook</div>{rows}</div>'
    text = "Time and memory of this notebook\n" + "\n".join(f"  {profile}: {what}" for profile, what in lines)
    return Page(markup, text)
