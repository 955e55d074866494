"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022, arXiv:2205.05638,
section 3.3).

    softmax(q (l_k ∘ k)ᵀ / √d) (l_v ∘ v)        in every attention
    W_down (l_ff ∘ σ(W_up x))                   in every feed-forward

The base is frozen; the three vectors l are trained, one number for each entry of k, v and the inner activation.
They start at 1, so that nothing changes. Parameters of a block: the widths of k, of v and of the inner
activation added up, with no matrix among them.

Plugged into the module socket: (x, y) -> l ∘ y on the projections that make k and v, which scales their bias
too; x -> l ∘ x in front of the feed-forward's last linear. Where one matrix makes q, k and v, the l of k and v
are one vector, and q stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import anatomy
from ..sockets import trainable_like


@dataclass(frozen=True)
class IA3:
    """Settings of (IA)³.

    targets       which linear modules: name suffixes, "attention", "all-linear" or a regular expression. None, the
                  paper's choice: what makes keys and values in every attention, and every feed-forward's last linear
    feed_forward  which of them are rescaled where their input comes in, instead of where their output goes out: name
                  suffixes or a regular expression. None: every feed-forward's last linear among them
    """

    targets: tuple[str, ...] | str | None = None
    feed_forward: tuple[str, ...] | str | None = None

    def __post_init__(self):
        for name in ("targets", "feed_forward"):
            value = getattr(self, name)
            if isinstance(value, list | set | frozenset):
                value = tuple(sorted(value))
                object.__setattr__(self, name, value)
            names = (value,) if isinstance(value, str) else value
            if value is not None and not (isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)):
                raise ValueError(f"{name} is {value!r}; accepted are name suffixes, a regular expression, or None")
        if self.targets is None and self.feed_forward is not None:
            raise ValueError(f"feed_forward is {self.feed_forward!r} but targets is None, which finds both by their "
                             "role; name the targets as well")
        if self.targets == ():
            raise ValueError("targets is (); accepted are name suffixes, a regular expression, or None")

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        blocks = anatomy.anatomy(model).blocks
        downs = [b.feed_forward.part("down")[0].path for b in blocks if b.feed_forward]
        rows: dict[str, Tensor | None] = {}      # path -> its output rows that are rescaled, None for all
        if self.targets is None:
            for block in blocks:
                for attention in block.attentions:
                    for part in "kv":
                        projection, own = attention.part(part)
                        rows[projection.path] = torch.cat([rows.get(projection.path, own[:0]), own])
            rows = {path: None if len(own) == anatomy.linear_shape(model.get_submodule(path))[0] else own
                    for path, own in rows.items()} | dict.fromkeys(downs)
        else:
            rows = dict.fromkeys(anatomy.match(model, self.targets))
            if self.feed_forward is not None:
                downs = anatomy.match(model, self.feed_forward) if self.feed_forward else []
                for path in downs:
                    if path not in rows:
                        raise ValueError(f"feed_forward is {self.feed_forward!r}, which means {path}; accepted are "
                                         f"only modules among the targets, {self.targets!r}")
        for path in sorted(rows, key=list(anatomy.base_modules(model)).index):
            module = model.get_submodule(path)
            kind = RescaleInput if path in downs else RescaleOutput
            yield "module", path, kind(module, rows[path])


class RescaleOutput(nn.Module):
    """y' = l ∘ y on one module; where only some `rows` are rescaled, the others stay. y (…, out), l (rows,)."""

    def __init__(self, module: nn.Module, rows: Tensor | None = None):
        super().__init__()
        like, self.out_features = trainable_like(module), anatomy.linear_shape(module)[0]
        self.register_buffer("rows", None if rows is None else rows.to(like["device"]))
        self.l = nn.Parameter(torch.ones(self.out_features if rows is None else len(rows), **like))

    def whole(self) -> Tensor:
        """The factor of every output, (out,): l, and 1 where nothing is rescaled."""
        return self.l if self.rows is None else self.l.new_ones(self.out_features).index_copy(0, self.rows, self.l)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (y * self.whole()).to(y.dtype)

    def merged(self, W: Tensor) -> Tensor:
        """diag(l) W for a frozen weight W (out, in)."""
        return (self.whole()[:, None] * W).to(W.dtype)

    def merged_bias(self, b: Tensor) -> Tensor:
        """l ∘ b for a frozen bias b (out,): what goes out is rescaled whole."""
        return (self.whole() * b).to(b.dtype)


class RescaleInput(nn.Module):
    """The module gets l ∘ x instead of x (…, in). l (in,)."""

    def __init__(self, module: nn.Module, rows: None = None):
        super().__init__()
        self.l = nn.Parameter(torch.ones(anatomy.linear_shape(module)[1], **trainable_like(module)))

    def before(self, x: Tensor) -> Tensor:
        return (x * self.l).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, W: Tensor) -> Tensor:
        """W diag(l) for a frozen weight W (out, in)."""
        return (W * self.l).to(W.dtype)
