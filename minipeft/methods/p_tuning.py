"""P-tuning (Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 2.2).

    e' = [f(E); e]       E (length, d) and f trained, e (T, d) the embeddings of the text

A soft prompt whose vectors are not trained directly: they come out of a small network f, so that
they move together. As in Hugging Face PEFT they all stand in front and the model is frozen; the paper
also puts them between the words of a template, and tunes the model as well. Two networks, with h = hidden:

    mlp     f(E) = W₃ relu(W₂ relu(W₁ E))            d -> h -> h -> d
    lstm    f(E) = W₂ relu(W₁ LSTM(E))               d -> 2h (two layers, both ways) -> 2h -> d

After training f is needed no more: `mp.fold` keeps f(E), which is an ordinary soft prompt.

Parameters: length × d for E, and those of f:

    mlp     h (d + h + d) + 2h + d
    lstm    8h (d + 4h + 4) + 2h (2h + d) + 2h + d

Plugged into the embedding socket: e (B, T, d) -> (B, length + T, d).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sockets import check_length, embedding_site, trainable_like
from .prompt_tuning import Prompt, PromptTuning, check_count

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True)
class PTuning:
    """Settings of P-tuning.

    length   how many vectors, a positive integer
    encoder  f: "mlp" or "lstm"
    hidden   h, the width inside f; None takes the width of the embedding, as PEFT does
    """

    length: int
    encoder: str = "mlp"
    hidden: int | None = None

    def __post_init__(self):
        check_count("length", self.length)
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder is {self.encoder!r}; accepted are {', '.join(map(repr, ENCODERS))}")
        if self.hidden is not None:
            check_count("hidden", self.hidden)

    def parameter_count(self, width: int) -> int:
        """Trained numbers, with d = width; the formula is this module's."""
        d, h = width, self.hidden or width
        if self.encoder == "mlp":
            return self.length * d + h * (d + h + d) + 2 * h + d
        return self.length * d + 8 * h * (d + 4 * h + 4) + 2 * h * (2 * h + d) + 2 * h + d

    def folded(self) -> PromptTuning:
        """What is left when f has done its work."""
        return PromptTuning(self.length)

    def pieces(self, model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        check_length(model, self.length)
        path, embedding = embedding_site(model)
        yield "embedding", path, EncodedPrompt(self, embedding.weight.shape[1], **trainable_like(embedding))


class EncodedPrompt(nn.Module):
    """[f(E); e] for one batch. e (B, T, d)."""

    def __init__(self, method: PTuning, width: int, device=None, dtype=None):
        super().__init__()
        self.length = method.length
        d, h, there = width, method.hidden or width, {"device": device, "dtype": dtype}
        self.E = nn.Parameter(torch.randn(method.length, d, **there))
        if method.encoder == "lstm":
            self.lstm = nn.LSTM(d, h, num_layers=2, bidirectional=True, batch_first=True, **there)
            sizes = [2 * h, 2 * h, d]
        else:
            self.lstm, sizes = None, [d, h, h, d]
        layers = []
        for i, o in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(i, o, **there), nn.ReLU()]
        self.mlp = nn.Sequential(*layers[:-1])

    def prompt(self) -> Tensor:
        """f(E), (length, d)."""
        x = self.E if self.lstm is None else self.lstm(self.E[None])[0][0]   # (length, d or 2h)
        return self.mlp(x)

    def forward(self, e: Tensor) -> Tensor:
        return torch.cat([self.prompt().to(e.dtype).expand(len(e), -1, -1), e], dim=1)  # (B, length + T, d)

    @torch.no_grad()
    def folded(self) -> Prompt:
        """The soft prompt that f(E) is now."""
        return Prompt(self.prompt().clone())
