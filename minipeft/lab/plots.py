"""Figures: one quiet style, the three sockets, and the live curve of a training run."""

from __future__ import annotations

import io
import time

from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#24292f",
    "grey": "#8c959f",
}
SOCKET_COLOURS = {"embedding": COLOURS["orange"], "key/value": COLOURS["green"], "module": COLOURS["blue"]}

_STYLE = {
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["grey"],
    "axes.labelcolor": COLOURS["black"],
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "axes.axisbelow": True,
    "xtick.color": COLOURS["black"],
    "ytick.color": COLOURS["black"],
    "lines.linewidth": 2,
    "legend.frameon": False,
    "mathtext.fontset": "cm",
}


def style():
    """The course's matplotlib style, as a context: `with lab.style(): ...`."""
    import matplotlib.pyplot as plt
    from matplotlib import cycler

    cycle = [COLOURS[name] for name in ("blue", "orange", "green", "vermilion", "purple", "sky")]
    return plt.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=cycle)})


class Drawing(Figure):
    """A figure outside pyplot's list: nothing is shown twice or kept open, and a notebook shows it as a value."""

    def _repr_png_(self) -> bytes:
        return png(self)


def new_figure(columns: int = 1, *, width: float = 6.4, height: float = 3.4) -> tuple:
    """A drawing and its axes, `columns` of them side by side."""
    with style():
        figure = Drawing(figsize=(width, height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        axes = figure.subplots(1, columns)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


# ---------------------------------------------------------------------------- the live curve


class LiveCurve:
    """The loss of a training run, drawn while it runs. `live_curve()` makes one."""

    def __init__(self, every: float = 1.0):
        self.every = every
        self.runs: list[list[dict]] = []
        self.figure, self._axes = new_figure()
        self._handle = None  # where the figure is shown
        self._drawn_at = -every
        self._cost = 0.0  # seconds that drawing took the last time
        self._waiting = False  # whether there are points not yet drawn

    def __call__(self, entry: dict) -> None:
        """Take one history entry of `mp.fit`: step, loss, and what else it has."""
        if not self.runs or entry["step"] <= self.runs[-1][-1]["step"]:
            self.runs.append([])  # the steps begin again: another run, another line
        self.runs[-1].append(dict(entry))
        self._waiting = True
        if time.monotonic() - self._drawn_at >= max(self.every, 50 * self._cost):
            self.draw()  # at most a fiftieth of the training's time

    def draw(self) -> None:
        """Draw all points so far; in a notebook, in the place where the figure already is."""
        axes, began = self._axes, time.monotonic()
        with style():
            axes.clear()
            for number, run in enumerate(self.runs, start=1):
                self._line(run, f"run {number}" if len(self.runs) > 1 else None)
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
            axes.set_ylim(bottom=0)
            if self.runs:
                if len(self.runs) > 1 or any("eval_loss" in entry for entry in self.runs[-1]):
                    axes.legend(loc="upper right")
                axes.set_title(caption(self.runs[-1][-1]), fontsize=10, color=COLOURS["black"])
        self._waiting = False
        self._show()
        self._drawn_at = time.monotonic()
        self._cost = self._drawn_at - began

    def _line(self, run: list[dict], label: str | None) -> None:
        points = [(e["step"], e["loss"]) for e in run if e.get("loss") is not None]
        colour = COLOURS["black"]
        if points:
            steps, losses = zip(*points, strict=True)
            (thin,) = self._axes.plot(steps, losses, linewidth=0.9, alpha=0.35)
            colour = thin.get_color()
            self._axes.plot(steps, smooth(losses), color=colour, label=label or "training, smoothed")
        held_out = [(e["step"], e["eval_loss"]) for e in run if e.get("eval_loss") is not None]
        if held_out:
            steps, losses = zip(*held_out, strict=True)
            self._axes.plot(
                steps, losses, "o", color=colour, markeredgecolor=COLOURS["black"], label="held out" if label is None else None
            )

    def _show(self) -> None:
        from minipeft.lab.quizzes import in_kernel

        if not in_kernel():
            return
        from IPython import get_ipython
        from IPython.display import Image, display

        image = Image(data=png(self.figure), format="png")
        if self._handle is None:
            self._handle = display(image, display_id=True)
            get_ipython().events.register("post_run_cell", self._finish)
        else:
            self._handle.update(image)

    def _finish(self, *_) -> None:
        """At the end of the cell: the last points, which the once-a-second rule had held back."""
        from IPython import get_ipython

        get_ipython().events.unregister("post_run_cell", self._finish)
        if self._waiting:
            self.draw()
        self._handle = None  # a later cell that uses this curve again shows it there


def live_curve() -> LiveCurve:
    """A loss curve to hand to training: `mp.fit(..., watch=lab.live_curve())`.

    Redrawn in place at most once a second, more rarely where drawing is slow, and once more at the end of the cell. Without a notebook
    it only keeps the points; `curve.draw()` and `curve.figure` give the figure.
    """
    return LiveCurve()


def smooth(values, weight: float = 0.8) -> list[float]:
    """Exponential moving average without the bias of its start."""
    total = mass = 0.0
    out = []
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        out.append(total / mass)
    return out


def caption(entry: dict) -> str:
    """`step 120 · loss 0.412 · rate 8.1e-04 · 3,210 tokens/s · 1.31 GiB`, of what the entry has."""
    shown = [f"step {entry['step']:,}"]
    for key, text in (
        ("loss", "loss {:.3f}"),
        ("eval_loss", "held out {:.3f}"),
        ("lr", "rate {:.1e}"),
        ("tokens_per_s", "{:,.0f} tokens/s"),
    ):
        if entry.get(key) is not None:
            shown.append(text.format(entry[key]))
    if entry.get("memory"):
        shown.append(f"{entry['memory'] / 2**30:.2f} GiB")
    return " · ".join(shown)


# ---------------------------------------------------------------------------- the three sockets


def three_sockets_figure() -> Drawing:
    """The map of the course: a frozen transformer and the three places where a method plugs in."""
    with style():
        figure = Drawing(figsize=(10.4, 6.1))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 104), ylim=(0, 61))
        axes.axis("off")
        _frozen_transformer(axes)
        _socket(axes, "module", 47.0, 41.5, r"$(x,\, y) \;\to\; y'$",
                "what went into a frozen module,\nwhat came out, what should come out",
                r"LoRA:  $y' = y + (\alpha / r)\, B A\, x$", "bottleneck adapters, LoRA, DoRA, (IA)³", _sketch_module)
        _socket(axes, "key/value", 47.0, 22.0, r"$(K,\, V) \;\to\; ([P_K;\, K\,],\; [P_V;\, V\,])$",
                "keys and values that no token wrote,\nin every attention layer",
                r"$\mathrm{softmax}\,(\,q\,[P_K;\, K\,]^\top)\;[P_V;\, V\,]$", "prefix tuning, P-tuning v2", _sketch_key_value)
        _socket(axes, "embedding", 47.0, 2.5, r"$e \;\to\; [P;\, e\,]$",
                "token embeddings in,\na longer sequence out",
                r"$[\,p_1, \ldots, p_m,\; e_1, \ldots, e_n]$", "prompt tuning, P-tuning", _sketch_embedding)
    return figure


def _box(axes, x, y, width, height, text="", *, face="#eef1f4", edge="#c4ccd4", size=11.0, line=1.0, radius=0.9, **kwargs):
    from matplotlib.patches import FancyBboxPatch

    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={radius}", facecolor=face, edgecolor=edge, linewidth=line
    )
    axes.add_patch(shape)
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, **kwargs)


def _arrow(axes, x, y0, y1):
    axes.annotate(
        "", (x, y1), (x, y0), arrowprops={"arrowstyle": "-|>", "color": COLOURS["grey"], "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    )


def _frozen_transformer(axes) -> None:
    """The left half: embedding, one block with its attention and feed-forward, head, all grey: frozen."""
    middle = 18.0
    axes.text(middle, 1.4, "tokens", ha="center", va="center", color=COLOURS["black"])
    _arrow(axes, middle, 2.8, 5.0)
    _box(axes, 7, 5.0, 22, 5.0, "token embedding")
    _arrow(axes, middle, 10.0, 17.0)
    _box(axes, 3, 16.6, 30, 32.0, face="white", edge="#aeb7c0", line=1.2)
    axes.text(4.3, 46.6, "every block", fontsize=9.5, color="#57606a", va="center")

    _box(axes, 7, 19.0, 22, 12.6)
    axes.text(8.2, 30.0, "attention", fontsize=9.5, color="#57606a", va="center")
    for x, name in ((8.4, "q"), (13.7, "k"), (19.0, "v")):
        _box(axes, x, 20.2, 4.4, 3.4, f"$W_{name}$", face="white", size=11.5)
    _box(axes, 8.4, 25.0, 15.0, 3.4, r"$\mathrm{softmax}\,(qK^\top)\,V$", face="white", size=11.5)
    _box(axes, 24.3, 25.0, 3.9, 3.4, "$W_o$", face="white", size=11.5)

    _arrow(axes, middle, 31.6, 34.4)
    _box(axes, 7, 34.4, 22, 9.6)
    axes.text(8.2, 42.4, "feed-forward", fontsize=9.5, color="#57606a", va="center")
    _box(axes, 8.4, 36.4, 8.6, 3.6, r"$W_\mathrm{up}$", face="white", size=11.5)
    _box(axes, 19.0, 36.4, 9.2, 3.6, r"$W_\mathrm{down}$", face="white", size=11.5)

    _arrow(axes, middle, 44.0, 51.6)
    _box(axes, 7, 51.6, 22, 5.0, "head")
    _arrow(axes, middle, 56.6, 59.6)
    axes.text(30.4, 54.1, "grey: frozen\ncolour: trained", fontsize=9.5, color="#57606a", va="center", linespacing=1.5)


# Where each socket sits on the drawing of the transformer; the first number is where its wire turns up.
_PLUGS = {
    "module": (37.5, [(28.2, 38.2), (28.2, 26.7)]),
    "key/value": (42.5, [(21.2, 25.0)]),
    "embedding": (42.5, [(18.0, 13.3)]),
}


def _socket(axes, name, x, y, formula, says, example, methods, sketch) -> None:
    """One panel of the right half, with a wire to its place in the transformer."""
    colour, height, width = SOCKET_COLOURS[name], 16.0, 55.0
    _box(axes, x, y, width, height, face="white", edge=colour, line=1.6)
    axes.text(x + 2, y + height - 2.6, f"{name} socket", fontsize=12.5, weight="bold", color=colour, va="center")
    axes.text(x + width - 2, y + height - 2.6, formula, fontsize=14.5, ha="right", va="center")
    axes.text(x + 2, y + 9.0, says, fontsize=10.5, va="center", color=COLOURS["black"], linespacing=1.35)
    axes.text(x + 2, y + 5.0, example, fontsize=12, va="center")
    axes.text(x + 2, y + 1.9, methods, fontsize=10, va="center", color="#57606a")
    sketch(axes, x + width - 20.5, y + 2.0, colour)
    bend, places = _PLUGS[name]
    for px, py in places:
        middle = y + height / 2
        axes.plot([px, bend, bend, x], [py, py, middle, middle], color=colour, linewidth=1.8, solid_joinstyle="round", zorder=3)
        axes.plot(px, py, "o", color=colour, markersize=9, markeredgecolor="white", zorder=4)


def _squares(axes, x, y, ours: str, theirs: str, colour: str) -> None:
    """Three trained positions in the socket's colour, then the frozen model's own in grey."""
    for i in range(7):
        trained = i < 3
        text = f"${ours}_{i + 1}$" if trained else f"${theirs}_{i - 2}$"
        face = colour if trained else "#eef1f4"
        ink = "white" if trained and colour != COLOURS["orange"] else COLOURS["black"]
        _box(axes, x + 2.65 * i, y, 2.3, 2.6, text, face=face, edge=face if trained else "#c4ccd4", size=10, color=ink, radius=0.4)


def _sketch_embedding(axes, x, y, colour) -> None:
    _squares(axes, x, y + 2.6, "p", "e", colour)


def _sketch_key_value(axes, x, y, colour) -> None:
    _squares(axes, x, y + 4.2, "p", "k", colour)
    _squares(axes, x, y + 0.6, "p", "v", colour)


def _sketch_module(axes, x, y, colour) -> None:
    from matplotlib.patches import Polygon

    def wire(*points):
        axes.plot(*zip(*points, strict=True), color=COLOURS["grey"], linewidth=1.3, zorder=1)

    axes.text(x + 0.2, y + 4.3, "$x$", fontsize=12, ha="center", va="center")
    axes.text(x + 18.6, y + 4.3, "$y'$", fontsize=12, ha="center", va="center")
    wire((x + 1.4, y + 4.3), (x + 2.6, y + 4.3), (x + 2.6, y + 7.0), (x + 15.2, y + 7.0), (x + 15.2, y + 5.2))
    wire((x + 2.6, y + 4.3), (x + 2.6, y + 1.6), (x + 15.2, y + 1.6), (x + 15.2, y + 3.4))
    wire((x + 16.1, y + 4.3), (x + 17.5, y + 4.3))
    axes.text(x + 14.2, y + 7.9, "$y$", fontsize=12, ha="center", va="center")
    axes.text(x + 15.2, y + 4.25, "+", fontsize=11, ha="center", va="center",
              bbox={"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": COLOURS["grey"]})
    _box(axes, x + 4.4, y + 5.4, 8.8, 3.2, "$W$", size=11)
    for corners, name, at in (
        ([(4.4, 0), (8.4, 0.9), (8.4, 2.3), (4.4, 3.2)], "A", 6.1),
        ([(9.2, 0.9), (13.2, 0), (13.2, 3.2), (9.2, 2.3)], "B", 11.5),
    ):
        axes.add_patch(Polygon([(x + a, y + b) for a, b in corners], facecolor=colour, edgecolor=colour, zorder=2))
        axes.text(x + at, y + 1.6, f"${name}$", fontsize=11, ha="center", va="center", color="white", zorder=3)
