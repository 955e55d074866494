"""Two figures that several chapters share: memory bills as bars, and a matrix of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minipeft.lab.plots import COLOURS, Drawing, new_figure, style

# The lines of a bill in the order in which they are stacked, and their colours.
STACK = {
    "weights": COLOURS["grey"],
    "adapter": COLOURS["blue"],
    "gradients": COLOURS["orange"],
    "optimizer": COLOURS["vermilion"],
    "activations": COLOURS["green"],
    "the rest": COLOURS["sky"],  # logits and temporary
}


def bill_figure(bills: Mapping[str, object], marks: Mapping[str, float] | None = None) -> Drawing:
    """Stacked bars, one a bill, in GB (MB where all are small).

    bills   name -> what `mp.memory_bill` returned, or a dict of line -> bytes
    marks   name -> bytes, drawn as a dashed line: what a card or this machine has
    """
    lines = {name: _lines(bill) for name, bill in bills.items()}
    totals = {name: sum(parts.values()) for name, parts in lines.items()}
    scale, unit = (1e9, "GB") if max(totals.values()) >= 1e9 else (1e6, "MB")
    marks = marks or {}
    figure, axes = new_figure(width=8.6, height=1.5 + 0.48 * len(bills) + 0.2 * bool(marks))
    with style():
        for place, (name, parts) in enumerate(lines.items()):
            left = 0.0
            for part, size in parts.items():
                axes.barh(place, size / scale, left=left / scale, height=0.6, color=STACK[part])
                left += size
            axes.annotate(f"{left / scale:,.{0 if left / scale >= 10 else 2}f}", (left / scale, place), xytext=(5, 0),
                          textcoords="offset points", va="center", zorder=3,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        for name, size in marks.items():
            axes.axvline(size / scale, color=COLOURS["black"], linestyle="--", linewidth=1.2)
            axes.text(size / scale, -0.62, f" {name}", fontsize=9, va="bottom")
        axes.set_yticks(range(len(lines)), list(lines))
        axes.set(xlabel=unit, ylim=(len(lines) - 0.5, -0.62 - 0.35 * bool(marks)))
        axes.set_xlim(0, 1.12 * max([*totals.values(), *marks.values()]) / scale)
        axes.grid(axis="y", visible=False)
        used = [part for part in STACK if any(parts.get(part) for parts in lines.values())]
        handles = [axes.barh(0, 0, color=STACK[part], label=part) for part in used]
        figure.legend(handles, used, loc="outside upper center", ncols=len(used), fontsize=9.5, handlelength=1.1, columnspacing=1.2)
    return figure


def _lines(bill) -> dict[str, float]:
    if isinstance(bill, Mapping):
        if unknown := sorted(set(bill) - set(STACK)):
            raise ValueError(f"a bill has no line {unknown[0]!r} (lines: {', '.join(STACK)})")
        return {part: bill.get(part, 0) for part in STACK}
    parts = {part: getattr(bill, part) for part in STACK if part != "the rest"}
    return parts | {"the rest": bill.logits + bill.temporary}


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    row_label: str = "",
    column_label: str = "",
    low: float | None = None,
    high: float | None = None,
    form: str = ".0%",
) -> Drawing:
    """A matrix of scores, each cell with its value; `low` and `high` are the ends of the colour scale.

    values   len(rows) lists of len(columns) numbers; a None is left blank
    form     how a value is written, as in `format(value, form)`
    """
    if len(values) != len(rows) or any(len(line) != len(columns) for line in values):
        raise ValueError(
            f"values has {len(values)} rows of {sorted({len(line) for line in values})}; expected {len(rows)} of {len(columns)}"
        )
    known = [v for line in values for v in line if v is not None]
    low, high = (min(known) if low is None else low), (max(known) if high is None else high)
    figure, axes = new_figure(width=2.6 + 1.05 * len(columns), height=1.3 + 0.52 * len(rows))
    with style():
        axes.imshow([[float("nan") if v is None else v for v in line] for line in values],
                    cmap="YlGnBu", vmin=low, vmax=high, aspect="auto")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                if value is not None:
                    dark = high > low and (value - low) / (high - low) > 0.6
                    axes.text(j, i, format(value, form), ha="center", va="center", color="white" if dark else COLOURS["black"])
        axes.set_xticks(range(len(columns)), list(columns))
        axes.set_yticks(range(len(rows)), list(rows))
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("top")
        axes.set(xlabel=column_label, ylabel=row_label)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure
