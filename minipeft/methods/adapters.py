"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751, section 2.1 and figure 2).

    f(h) = W_up σ(W_down h + b_down) + b_up,    h' = h + f(h)

W_down (m, d) squeezes the d numbers of a hidden state into m, σ bends them, W_up (d, m) widens them again.
The base is frozen; both matrices and biases are trained. (Houlsby et al. train the base's norms, too.)
Parameters: 2 m d + m + d for each adapter.
They start at N(0, init_std²), cut off at two deviations, and zero biases. The skip h + … then makes an adapter
nearly the identity: it adds about init_std² √(m d / 2) times the size of h, 1 % at m = 64, d = 300.

    placement    where it stands in a block                              source
    "houlsby"    after each attention and after the feed-forward         Houlsby et al. 2019
    "pfeiffer"   after the feed-forward only                             Pfeiffer et al. 2021, arXiv:2005.00247
    "parallel"   beside the feed-forward: y' = y + s f(x), x its input   He et al. 2022, arXiv:2110.04366, table 6

"After" means: on what the sub-layer's last linear returns, before the residual is added and before any norm
or dropout that the model puts between the two.

Plugged into the module socket: (x, y) -> y + s f(y), beside the feed-forward (x, y) -> y + s f(x).
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import anatomy, sockets
from ..sockets import trainable_like

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True)
class BottleneckAdapter:
    """Settings of bottleneck adapters.

    bottleneck    m, a positive integer
    placement     "houlsby", "pfeiffer" or "parallel"
    activation    σ: "relu" or "gelu"
    scale         s; He et al. take 4 beside the feed-forward. Above 0
    layer_norm    normalise what goes into W_down (Bapna & Firat 2019, arXiv:1909.08478): 2 d numbers more
    init_std      deviation of both matrices at the start; with 0 only the last bias ever learns
    skip_layers   leave the first so many blocks without adapters (AdapterDrop, Rücklé et al. 2021,
                  arXiv:2010.11918); of an encoder-decoder, the first of each side
    """

    bottleneck: int = 64
    placement: str = "houlsby"
    activation: str = "relu"
    scale: float = 1.0
    layer_norm: bool = False
    init_std: float = 0.01
    skip_layers: int = 0

    def __post_init__(self):
        for name, low in (("bottleneck", 1), ("skip_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} is {value!r}; accepted is a whole number from {low}")
        for name, accepted in (("placement", PLACEMENTS), ("activation", tuple(ACTIVATIONS))):
            value = getattr(self, name)
            if value not in accepted:
                near = difflib.get_close_matches(str(value), accepted, n=1)
                raise ValueError(f"{name} is {value!r}; " + (f"did you mean {near[0]!r}? " if near else "")
                                 + f"accepted are {', '.join(map(repr, accepted))}")
        for name, ok, accepted in (("scale", lambda v: 0 < v < math.inf, "a number above 0"),
                                   ("init_std", lambda v: 0 <= v < math.inf, "a number from 0")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not ok(value):
                raise ValueError(f"{name} is {value!r}; accepted is {accepted}")
        if not isinstance(self.layer_norm, bool):
            raise ValueError(f"layer_norm is {self.layer_norm!r}; accepted are True and False")

    def parameter_count(self, d: int) -> int:
        """Trained numbers of one adapter on hidden states of width d: 2 m d + m + d, with the norm 2 d more."""
        return 2 * self.bottleneck * d + self.bottleneck + d + 2 * d * self.layer_norm

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        parts = anatomy.anatomy(model)
        for side in (parts.encoder, parts.decoder):
            if side and self.skip_layers >= len(side):
                raise ValueError(f"skip_layers is {self.skip_layers}; accepted is a whole number below {len(side)}, the "
                                 f"number of {side[0].side} blocks")
            for block in side[self.skip_layers:]:
                yield from self._in_block(model, block)

    def _in_block(self, model: nn.Module, block: anatomy.Block) -> Iterator[tuple[str, str, nn.Module]]:
        if block.feed_forward is None:
            raise ValueError(f"{block.path} has not exactly one feed-forward, so there is no place for an adapter")
        if self.placement == "houlsby":
            for attention in block.attentions:
                yield self._on(model, attention.part("o")[0])
        down = block.feed_forward.part("down")[0]
        if self.placement != "parallel":
            yield self._on(model, down)
            return
        # the feed-forward's input is what its first linear gets, its output what its last one gives
        entry = Entry()
        yield "module", block.feed_forward.projections[0].path, entry
        yield self._on(model, down, entry)

    def _on(self, model, projection: anatomy.Projection, entry: Entry | None = None):
        like = trainable_like(model.get_submodule(projection.path))
        return "module", projection.path, Bottleneck(self, projection.out_features, entry, **like)


class Bottleneck(nn.Module):
    """y' = y + s f(y) on one module; with `entry` y' = y + s f(x), x what came in there. y (…, d)."""

    def __init__(self, settings: BottleneckAdapter, d: int, entry: Entry | None = None, device=None, dtype=None):
        super().__init__()
        self.scale, self.entry = settings.scale, (entry,)  # in a tuple: it is a piece of its own
        self.norm = nn.LayerNorm(d, device=device, dtype=dtype) if settings.layer_norm else None
        self.down = nn.Linear(d, settings.bottleneck, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[settings.activation]()
        self.up = nn.Linear(settings.bottleneck, d, device=device, dtype=dtype)
        with torch.no_grad():
            for linear in (self.down, self.up):                  # 0.9545 of a normal lies within two deviations
                linear.weight.uniform_(-0.9545, 0.9545).erfinv_().mul_(math.sqrt(2) * settings.init_std)
                linear.bias.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = y if self.entry[0] is None else self.entry[0].take()
        h = h.to(self.down.weight.dtype)                         # (…, d)
        if self.norm is not None:
            h = self.norm(h)
        h = self.activation(self.down(h))                        # (…, m)
        return y + (self.scale * self.up(h)).to(y.dtype)         # (…, d)


class Entry(nn.Module):
    """Stands at the feed-forward's first linear and keeps its input for the adapter at the last one.

    One input for each thread: passes may run side by side.
    """

    def __init__(self):
        super().__init__()
        self.inputs = {}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.inputs[threading.get_ident()] = x
        return y

    def take(self) -> Tensor:
        return self.inputs.pop(threading.get_ident())


@torch.no_grad()
def average_adapters(model: nn.Module, names: Sequence[str], name: str) -> sockets.Adapter:
    """A new adapter called `name`, each weight the mean of those of the bottleneck adapters `names`; it acts alone.

    Weights are averaged, not outputs: it costs as much as one adapter (Chronopoulou et al. 2023,
    arXiv:2302.07027). Raises `ValueError` for fewer than two names, unknown ones, or other settings than the
    first's; `TypeError` for another method. Nothing has been changed then.
    """
    if isinstance(names, str) or len(set(names)) < 2:
        raise ValueError(f"names is {names!r}; accepted are at least two different adapters")
    chosen = [sockets.the_adapter(model, n) for n in names]
    sockets.check_nothing_merged(model)
    method = chosen[0].method
    for adapter in chosen:
        if not isinstance(adapter.method, BottleneckAdapter):
            raise TypeError(f"adapter {adapter.name!r} is {type(adapter.method).__name__}; "
                            "only bottleneck adapters can be averaged")
        if adapter.method != method:
            raise ValueError(f"adapter {adapter.name!r} is {adapter.method}, {chosen[0].name!r} is {method}; "
                             "only adapters of the same settings can be averaged")
    mean = sockets.attach(model, method, name)
    for parameter, p in mean.named_parameters():
        p.copy_(sum(adapter.get_parameter(parameter) for adapter in chosen) / len(chosen))
    sockets.activate(model, name)
    return mean
