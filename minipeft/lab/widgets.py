"""Things to move: a slider over ranks, one over block sizes, parts to put in order. Where no kernel runs, each has a static form."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from minipeft.lab.pages import MUTED, marked
from minipeft.lab.plots import COLOURS, Drawing, new_figure, png, style
from minipeft.lab.quizzes import GREEN, LETTERS, RED, with_widget

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


# ---------------------------------------------------------------------------- block sizes


class BlockSlider:
    """What NF4's block size buys and costs for one weight. `block_slider()` makes one."""

    def __init__(self, W: torch.Tensor, sizes: tuple[int, ...], what: str):
        from minipeft.quant import nf4

        self.sizes, self.what = sizes, what
        self.once, self.twice = ({B: nf4.quantize(W, B, double_quant=double) for B in sizes} for double in (False, True))
        self.errors = {B: ((nf4.dequantize(q) - W).norm() / W.norm()).item() for B, q in self.twice.items()}
        self.shares = {B: _scaled(W, B) for B in sizes}  # x/s of some of its numbers

    def bits(self, size: int, double: bool = True) -> float:
        """Bits a weight: 4, and its share of the scales."""
        return (self.twice if double else self.once)[size].bits

    def figure(self, size: int) -> Drawing:
        """Two panels for one block size: what is left of 16 levels, error against bits."""
        figure, (left, right) = new_figure(2, width=8.6, height=3.3)
        with style():
            self._levels(left, size)
            left.set(xlabel="x / s, with the 16 levels", title=f"blocks of {size}")
            bits, errors = [self.bits(B) for B in self.sizes], [100 * self.errors[B] for B in self.sizes]
            right.plot(bits, errors, "o-", color=COLOURS["grey"], markersize=4)
            right.plot(self.bits(size), 100 * self.errors[size], "o", markersize=10, color=COLOURS["blue"])
            right.set(xlabel="bits a weight, scales included", ylabel="error, % of ‖W‖", ylim=(0, 1.15 * max(errors)))
            right.set_title(f"{self.bits(size):.3f} bits, error {self.errors[size]:.2%}")
        return figure

    def _levels(self, axes, size: int) -> None:
        from minipeft.quant.nf4 import CODEBOOK

        axes.hist(self.shares[size].tolist(), bins=101, range=(-1, 1), density=True, color="#d0d7de")
        for level in CODEBOOK.tolist():
            axes.axvline(level, color=COLOURS["blue"], linewidth=0.8)
        axes.set(xlim=(-1.03, 1.03), yticks=[])

    def panels(self) -> Drawing:
        """The static form: x/s and the levels at every other block size, each with its bits and its error."""
        sizes = self.sizes[1::2] or self.sizes                    # 64, 256, 1024, 4096 of all eight
        figure, axes = new_figure(len(sizes), width=2.6 * len(sizes), height=2.9)
        with style():
            for place, B in zip([axes] if len(sizes) == 1 else axes, sizes, strict=True):
                self._levels(place, B)
                place.set_title(f"blocks of {B}\n{self.bits(B):.3f} bits a weight\nerror {self.errors[B]:.1%}", fontsize=10)
            figure.supxlabel(f"x / s, with the 16 levels ({self.what})", fontsize=10)
        return figure

    def widget(self):
        """The live form: a slider over the block sizes, and the picture for it."""
        from ipywidgets import Image, SelectionSlider, VBox

        start = 64 if 64 in self.sizes else self.sizes[0]
        picture = Image(value=png(self.figure(start)), format="png")
        slider = SelectionSlider(options=self.sizes, value=start, description="block", continuous_update=False)

        def moved(change):
            picture.value = png(self.figure(change["new"]))

        slider.observe(moved, names="value")
        return VBox([slider, picture])

    def __repr__(self) -> str:
        lines = [f"NF4 with double quantisation, {self.what}"]
        lines += [f"  blocks of {B:4}: {self.bits(B):.3f} bits a weight ({self.bits(B, False):.3f} with float32 scales), error {self.errors[B]:.2%}"
                  for B in self.sizes]  # fmt: skip
        return "\n".join(lines)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return with_widget({"text/plain": repr(self), "image/png": png(self.panels())}, self.widget)


def _scaled(W: torch.Tensor, size: int, most: int = 2**17) -> torch.Tensor:
    """x/s of W's first numbers, cut into blocks of `size` that are full."""
    blocks = W.flatten()[: max(most // size, 1) * size]
    blocks = blocks[: len(blocks) // size * size].view(-1, size)
    return (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten()


def block_slider(W: torch.Tensor | None = None, *, sizes=None) -> BlockSlider:
    """Move the block size of NF4 and see the bits a weight costs and the error that is left.

    W      a weight of any shape; without it, 2¹⁸ numbers drawn from a normal distribution, and the picture says so
    sizes  the block sizes on the slider, of those that NF4 takes (the default: all)

    ValueError where a size is not one of NF4's, or larger than the weight.
    """
    from minipeft.quant.nf4 import BLOCK_SIZES, check_block_size

    what = "normal numbers" if W is None else "the weight given"
    W = torch.randn(2**18, generator=torch.Generator().manual_seed(0)) if W is None else W.detach().to("cpu", torch.float32)
    sizes = tuple(sorted(set([B for B in BLOCK_SIZES if W.numel() >= B] if sizes is None else sizes)))
    for B in sizes:
        check_block_size(B)
    if not sizes or sizes[-1] > W.numel():
        raise ValueError(f"block sizes are {sizes}; accepted for a weight of {W.numel():,} numbers: those up to that")
    return BlockSlider(W, sizes, what)


# ---------------------------------------------------------------------------- parts to put in order


class Ordering:
    """Parts to put in their order, some of which do not belong. `ordering()` makes one."""

    def __init__(self, question: str, parts: dict[str, str], decoys: dict[str, str]):
        self.question = question
        self.parts = parts  # part -> why it stands there, in the right order
        self.decoys = decoys  # part -> why it does not belong
        self.offered = [*parts, *decoys]
        random.Random(question).shuffle(self.offered)  # always the same for a question, and no hint

    def drawing(self, number: int) -> str:
        """The first `number` parts as boxes, the first on top, each with its reason beside it."""
        box = "border:1px solid #8c959f;border-radius:5px;padding:.15em .8em;min-width:15em;text-align:center"
        rows = [
            f'<div style="display:flex;align-items:center;gap:1em"><div style="{box}">{marked(part)}</div>'
            f'<div style="{MUTED}">{marked(why)}</div></div>'
            for part, why in list(self.parts.items())[:number]
        ]
        return '<div style="margin-left:8em;line-height:1">↓</div>'.join(rows)

    def answer(self, part: str, placed: int) -> tuple[bool, str]:
        """Whether `part` comes after the `placed` first ones, and why, or why not."""
        order = list(self.parts)
        if part in self.decoys:
            return False, self.decoys[part]
        if part == order[placed]:
            return True, self.parts[part]
        return False, "It belongs, but something else comes first." if part in order[placed:] else "It stands there already."

    def __repr__(self) -> str:
        return "\n".join([self.question, *(f"   {letter}. {part}" for letter, part in zip(LETTERS, self.offered, strict=False))])

    def page(self) -> str:
        """The static form: the parts in no order, the drawing and what does not belong folded."""
        style = 'type="A" style="list-style-type:upper-alpha"'
        offered = "".join(f"<li>{marked(part)}</li>" for part in self.offered)
        surplus = "".join(f"<li>{marked(part)}: {marked(why)}</li>" for part, why in self.decoys.items())
        surplus = f"<p>Not part of it:</p><ul>{surplus}</ul>" if surplus else ""
        folded = f"<details><summary>Answer</summary>{self.drawing(len(self.parts))}{surplus}</details>"
        return f"<div><p><b>{marked(self.question)}</b></p><ol {style}>{offered}</ol>{folded}</div>"

    def widget(self):
        """The live form: click the parts one after the other; what is right joins the drawing."""
        from ipywidgets import Button, HBox, HTMLMath, Layout, VBox

        drawing, verdict = HTMLMath(), HTMLMath()
        placed, missed, rows = [], [], []
        for letter, part in zip(LETTERS, self.offered, strict=False):
            button = Button(description=letter, tooltip=f"Part {letter} is next", layout=Layout(width="3em", min_width="3em"))

            def clicked(pressed, part=part):
                right, why = self.answer(part, len(placed))
                (placed if right else missed).append(part)
                pressed.disabled = right
                colour, word = (GREEN, "Right.") if right else (RED, "Not this one.")
                verdict.value = f'<span style="color:{colour}"><b>{word}</b></span> {marked(why)}'
                drawing.value = self.drawing(len(placed))
                if len(placed) == len(self.parts):
                    verdict.value = f'<span style="color:{GREEN}"><b>Done</b></span>, with {len(missed)} wrong on the way.'
                    for row in rows:
                        row.children[0].disabled = True

            button.on_click(clicked)
            rows.append(HBox([button, HTMLMath(marked(part))], layout=Layout(align_items="center")))
        return VBox([HTMLMath(f"<b>{marked(self.question)}</b>"), *rows, verdict, drawing])

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        return with_widget({"text/plain": repr(self), "text/html": self.page()}, self.widget)


def ordering(question: str, parts: Mapping[str, str], decoys: Mapping[str, str] | None = None) -> Ordering:
    """An architecture to be drawn: put its parts in order.

    parts    part -> why it stands there, in the right order; `code` in backticks and $formulas$ are shown as such
    decoys   part -> why it does not belong

    ValueError for fewer than two parts, a part without a reason, one that is also a decoy, or too many of them.
    """
    parts, decoys = dict(parts), dict(decoys or {})
    if len(parts) < 2 or len(parts) + len(decoys) > len(LETTERS):
        raise ValueError(f"{len(parts)} parts and {len(decoys)} decoys; accepted: at least 2 parts, at most {len(LETTERS)} in all")
    for part, why in [*parts.items(), *decoys.items()]:
        if not (isinstance(why, str) and why.strip()):
            raise ValueError(f"the part {part!r} has no reason")
    if both := sorted(set(parts) & set(decoys)):
        raise ValueError(f"{both[0]!r} is both a part and a decoy")
    return Ordering(question, parts, decoys)
