"""Pictures with a slider. Where no kernel runs, the same picture for a few settings side by side."""

from __future__ import annotations

import torch

from minipeft.lab.plots import COLOURS, Drawing, new_figure, png, style
from minipeft.lab.quizzes import with_widget

RANKS = (1, 2, 4, 8, 16, 32, 64)


class RankSlider:
    """What LoRA's rank buys and costs for one weight. `rank_slider()` makes one."""

    def __init__(self, shape: tuple[int, int], spectrum: torch.Tensor, ranks: tuple[int, ...], what: str):
        self.shape = shape  # (out, in)
        self.spectrum = spectrum  # ΔW's singular values, falling
        self.ranks = ranks
        self.what = what

    def count(self, rank: int) -> int:
        """Numbers that LoRA trains at this rank: r (in + out)."""
        return rank * sum(self.shape)

    def kept(self, rank: int) -> float:
        """The share of ‖ΔW‖² that the best update of this rank keeps (Eckart and Young 1936)."""
        energy = self.spectrum.square()
        return (energy[:rank].sum() / energy.sum()).item()

    def figure(self, rank: int) -> Drawing:
        """Two panels for one rank: numbers trained, singular values kept."""
        figure, (left, right) = new_figure(2, width=8.6, height=3.3)
        with style():
            ranks = range(1, max(self.ranks) + 1)
            left.plot(ranks, [self.count(r) for r in ranks], color=COLOURS["grey"])
            left.plot(rank, self.count(rank), "o", markersize=9, color=COLOURS["blue"])
            full = self.shape[0] * self.shape[1]
            left.axhline(full, color=COLOURS["vermilion"], linestyle="--", linewidth=1.3)
            left.text(max(self.ranks), full, "all of W", ha="right", va="bottom", color=COLOURS["vermilion"])
            left.set(xlabel="rank r", ylabel="numbers trained", ylim=(0, 1.15 * max(full, self.count(max(self.ranks)))))
            left.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            left.set_title(f"r = {rank}: {self.count(rank):,} of {full:,} ({self.count(rank) / full:.1%})")
            self._spectrum(right, rank)
            right.set(xlabel="singular value number", ylabel="singular value")
            right.set_title(f"kept: {self.kept(rank):.1%} of ‖ΔW‖², {self.what}")
        return figure

    def _spectrum(self, axes, rank: int) -> None:
        shown = min(len(self.spectrum), 2 * max(self.ranks))
        values = self.spectrum[:shown].tolist()
        axes.stairs(values, [i + 0.5 for i in range(shown + 1)], fill=True, color="#d0d7de")
        axes.stairs(values[:rank], [i + 0.5 for i in range(min(rank, shown) + 1)], fill=True, color=COLOURS["blue"])

    def panels(self) -> Drawing:
        """The static form: the spectrum at four ranks, each with what it costs and keeps."""
        step = (len(self.ranks) - 1) / 3
        ranks = sorted({self.ranks[round(i * step)] for i in range(4)})
        figure, axes = new_figure(len(ranks), width=2.6 * len(ranks), height=2.9)
        with style():
            for place, rank in zip([axes] if len(ranks) == 1 else axes, ranks, strict=True):
                self._spectrum(place, rank)
                place.set_title(f"r = {rank}\n{self.count(rank):,} trained\n{self.kept(rank):.0%} of ‖ΔW‖² kept", fontsize=10)
                place.label_outer()
            figure.supxlabel(f"singular value number ({self.what})", fontsize=10)
        return figure

    def widget(self):
        """The live form: a slider over the ranks, and the picture for it."""
        from ipywidgets import Image, SelectionSlider, VBox

        start = self.ranks[len(self.ranks) // 2]
        picture = Image(value=png(self.figure(start)), format="png")
        slider = SelectionSlider(options=self.ranks, value=start, description="rank", continuous_update=False)

        def moved(change):
            picture.value = png(self.figure(change["new"]))

        slider.observe(moved, names="value")
        return VBox([slider, picture])

    def __repr__(self) -> str:
        lines = [f"LoRA on a weight of {self.shape[0]} × {self.shape[1]}, {self.what}"]
        lines += [f"  r = {r:3}: {self.count(r):>12,} trained, {self.kept(r):6.1%} of ‖ΔW‖² kept" for r in self.ranks]
        return "\n".join(lines)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return with_widget({"text/plain": repr(self), "image/png": png(self.panels())}, self.widget)


def rank_slider(delta: torch.Tensor | None = None, *, shape: tuple[int, int] = (576, 576), ranks=RANKS) -> RankSlider:
    """Move the rank of LoRA and see what it trains and how much of an update it can hold.

    delta   the update ΔW (out, in) to look at, for example a fine-tuned weight minus the base's;
            without it, a made-up one of `shape` whose singular values fall off as 1/i, and the
            picture says so
    ranks   the ranks on the slider

    ValueError where `delta` is no matrix, or a rank exceeds its smaller side.
    """
    if delta is not None and delta.dim() != 2:
        raise ValueError(f"delta has shape {tuple(delta.shape)}; expected a matrix (out, in)")
    shape = tuple(shape if delta is None else delta.shape)
    ranks = tuple(sorted({int(r) for r in ranks}))
    if not ranks or ranks[0] < 1 or ranks[-1] > min(shape):
        raise ValueError(f"ranks are {ranks}; accepted for a weight of {shape}: 1 to {min(shape)}")
    if delta is None:
        return RankSlider(shape, 1 / torch.arange(1, min(shape) + 1), ranks, "a made-up ΔW")
    return RankSlider(shape, torch.linalg.svdvals(delta.detach().to("cpu", torch.float64)), ranks, "the ΔW given")
