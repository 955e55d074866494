"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190, section 4.2), P-tuning v2 (Liu et al. 2021, 2110.07602).

    attention(q, [P_K; K], [P_V; V])     in every layer, P_K and P_V (G, length, d) trained

Every layer's attention sees `length` more positions, whose keys and values are trained; the model is
frozen. No token is there: nothing is computed at these positions, they are only looked at. Tokens
stand after them, at positions length, length + 1, …

Trained directly, small learning rates crawl and large ones jump. Prefix tuning therefore lets a
network make all layers' keys and values from one table, with D = G d and hidden = h:

    [P_K; P_V] of layer l  =  W_l tanh(W E) ,     E (length, D),  W (h, D),  W_l (2D, h)

After training the network is needed no more: `mp.fold` keeps what it gives. P-tuning v2 goes without
it (`reparameterize=False`), and is the same method from then on.

Parameters, with L layers:   2 L D length    directly
                             length D + h (D + 1) + 2 L D (h + 1)   with the network

Plugged into the key/value socket: (K, V) (B, G, S, d) -> (B, G, length + S, d), for the self-attention
of every layer; of an encoder-decoder, of every layer of the decoder, as in Hugging Face PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base import token_ids
from ..sockets import attention_sites, check_length, keys_and_values, trainable_like
from .prompt_tuning import check_count, check_init

INITS = ("random", "text")


@dataclass(frozen=True)
class PrefixTuning:
    """Settings of prefix tuning.

    length          how many positions, a positive integer
    reparameterize  True: through the network, as in prefix tuning. False: directly, P-tuning v2
    hidden          h, the width inside the network; None takes D, as PEFT does
    init            "random", or "text": the keys and values that the model itself computes for `text`;
                    only with reparameterize=False, since no setting of the network gives them
    text            a string of exactly `length` tokens (special tokens are not added), or their ids
    """

    length: int
    reparameterize: bool = True
    hidden: int | None = None
    init: str = "random"
    text: str | tuple[int, ...] | None = None

    def __post_init__(self):
        check_count("length", self.length)
        if not isinstance(self.reparameterize, bool):
            raise ValueError(f"reparameterize is {self.reparameterize!r}; accepted are True and False")
        if self.hidden is not None:
            check_count("hidden", self.hidden)
            if not self.reparameterize:
                raise ValueError(f"hidden is {self.hidden} but reparameterize is False: there is no network to be wide")
        check_init(self, INITS)
        if self.init == "text" and self.reparameterize:
            raise ValueError("init is 'text' but reparameterize is True: the network cannot be set to given keys "
                             "and values; accepted is reparameterize=False")

    def parameter_count(self, layers: int, kv_width: int) -> int:
        """Trained numbers: kv_width is D = key/value heads × their width."""
        n, D = self.length, kv_width
        if not self.reparameterize:
            return 2 * layers * D * n
        h = self.hidden or D
        return n * D + h * (D + 1) + 2 * layers * D * (h + 1)

    def folded(self) -> PrefixTuning:
        """What is left when the network has done its work."""
        return PrefixTuning(self.length, reparameterize=False)

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        check_length(model, self.length)
        sites = attention_sites(model)                           # path -> (G, d)
        if self.init == "text":
            ids = token_ids(model, self.text, self.length, model.get_input_embeddings().weight.shape[0])
            for path, (K, V) in keys_and_values(model, ids).items():
                yield "key/value", path, Prefix(K, V, **trainable_like(model.get_submodule(path)))
            return
        trunk = None
        for path, (G, d) in sites.items():
            there = trainable_like(model.get_submodule(path))
            if not self.reparameterize:
                K, V = (torch.randn(G, self.length, d, **there) * 0.02 for _ in "KV")
                yield "key/value", path, Prefix(K, V, **there)
                continue
            trunk = trunk or Trunk(self.length, G * d, self.hidden or G * d, **there)
            yield "key/value", path, MadePrefix(trunk, G, d, **there)


class Prefix(nn.Module):
    """[P_K; K], [P_V; V] in one layer. P_K and P_V (G, length, d)."""

    def __init__(self, K: Tensor, V: Tensor, device=None, dtype=None):
        super().__init__()
        self.length = K.shape[1]
        self.K = nn.Parameter(K.to(device=device, dtype=dtype))
        self.V = nn.Parameter(V.to(device=device, dtype=dtype))

    def prefix(self) -> tuple[Tensor, Tensor]:
        """(P_K, P_V), each (G, length, d)."""
        return self.K, self.V

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, G, S, d) -> (B, G, length + S, d)."""
        K, V = self.prefix()
        B = len(key)
        return (torch.cat([K.to(key.dtype).expand(B, -1, -1, -1), key], dim=2),
                torch.cat([V.to(value.dtype).expand(B, -1, -1, -1), value], dim=2))


class Trunk(nn.Module):
    """tanh(W E): what the layers share. E (length, D) -> (length, h)."""

    def __init__(self, length: int, width: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.E = nn.Parameter(torch.randn(length, width, device=device, dtype=dtype))
        self.W = nn.Linear(width, hidden, device=device, dtype=dtype)

    def forward(self) -> Tensor:
        return torch.tanh(self.W(self.E))


class MadePrefix(Prefix):
    """A layer's prefix, made by the network: W_l tanh(W E), split into keys and values."""

    def __init__(self, trunk: Trunk, heads: int, head_dim: int, device=None, dtype=None):
        nn.Module.__init__(self)
        self.trunk, self.heads, self.length = trunk, heads, len(trunk.E)
        self.W = nn.Linear(trunk.W.out_features, 2 * heads * head_dim, device=device, dtype=dtype)

    def prefix(self) -> tuple[Tensor, Tensor]:
        x = self.W(self.trunk())                                 # (length, 2 G d)
        K, V = x.view(self.length, 2, self.heads, -1).permute(1, 2, 0, 3)  # each (G, length, d)
        return K, V

    @torch.no_grad()
    def folded(self) -> Prefix:
        """The keys and values that the network gives now."""
        K, V = self.prefix()
        return Prefix(K.contiguous(), V.contiguous())
