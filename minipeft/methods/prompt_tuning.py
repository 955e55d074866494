"""Prompt tuning (Lester, Al-Rfou & Constant 2021, arXiv:2104.08691, section 2).

    e' = [P; e]          P (length, d) trained, e (T, d) the embeddings of the text

`length` vectors that belong to no word are put before the embeddings of the text. They are trained;
every weight of the model is frozen. Attention then lets the text read them, in each layer.
The sequence, the attention mask and the labels grow by `length` positions, without a loss on them.

Parameters: length × d, with d the width of the embedding.

Plugged into the embedding socket: e (B, T, d) -> (B, length + T, d).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base import token_ids
from ..sockets import check_length, embedding_site, trainable_like

INITS = ("random", "vocab", "text")


@dataclass(frozen=True)
class PromptTuning:
    """Settings of prompt tuning.

    length  how many vectors, a positive integer
    init    "random": normal, with the standard deviation of the vocabulary's vectors.
            "vocab": the vectors of `length` tokens, drawn at random, different ones as long as there are any.
            "text": the vectors of the tokens of `text`
    text    a string of exactly `length` tokens (special tokens are not added), or their ids.
            PEFT repeats or cuts a text that does not fit; `(ids * length)[:length]` does the same
    """

    length: int
    init: str = "random"
    text: str | tuple[int, ...] | None = None

    def __post_init__(self):
        check_count("length", self.length)
        check_init(self, INITS)

    def parameter_count(self, width: int) -> int:
        """Trained numbers: length × d."""
        return self.length * width

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        check_length(model, self.length)
        path, embedding = embedding_site(model)
        yield "embedding", path, Prompt(_start(self, model, embedding), **trainable_like(embedding))


class Prompt(nn.Module):
    """[P; e] for one batch. e (B, T, d)."""

    def __init__(self, P: Tensor, device=None, dtype=None):
        super().__init__()
        self.length = len(P)
        self.P = nn.Parameter(P.to(device=device, dtype=dtype))

    def forward(self, e: Tensor) -> Tensor:
        return torch.cat([self.P.to(e.dtype).expand(len(e), -1, -1), e], dim=1)  # (B, length + T, d)


@torch.no_grad()
def _start(prompt: PromptTuning, model: nn.Module, embedding: nn.Module) -> Tensor:
    """The vectors to start from, (length, d), as the embedding gives them: Gemma's are scaled by it."""
    words, device = embedding.weight.shape[0], embedding.weight.device
    if prompt.init == "text":
        ids = token_ids(model, prompt.text, prompt.length, words)
    elif prompt.init == "vocab":
        ids = torch.randperm(words)[torch.arange(prompt.length) % words]
    else:
        spread = embedding(torch.arange(0, words, max(1, words // 1024), device=device)).float().std(unbiased=False)
        return torch.randn(prompt.length, embedding.weight.shape[1], device=device) * spread
    return embedding(ids.to(device)).clone()


def check_count(name: str, value) -> None:
    """`ValueError` unless it is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; accepted is a whole number from 1")


def check_init(method, inits: Sequence[str]) -> None:
    """`ValueError` unless `init` is known, and `text` is there exactly where it is used; a list becomes a tuple."""
    if method.init not in inits:
        raise ValueError(f"init is {method.init!r}; accepted are {', '.join(map(repr, inits))}")
    text = method.text
    if (method.init == "text") != (text is not None):
        raise ValueError(f"init is {method.init!r} and text is {text!r}; a text is needed with init='text', "
                         "and has no meaning otherwise")
    if text is None:
        return
    if not isinstance(text, str):
        if not isinstance(text, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in text):
            raise ValueError(f"text is {text!r}; accepted is a string, or a list of token ids")
        object.__setattr__(method, "text", tuple(text))
    if not text:
        raise ValueError(f"text is {text!r}; accepted is a text of {method.length} tokens")
