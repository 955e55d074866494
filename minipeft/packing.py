"""The rows of a pass behind one another in one sequence, so that nothing is padding.

    row 1: a b c d          (2, 4) with a padded position
    row 2: e f g ·      →   a b c d e f g        (1, 7), positions 0 1 2 3 0 1 2

Every layer of a decoder works on one position at a time, but for attention. There the sequence is
split into its rows, each attends to itself, and the results are joined again. The lengths of the rows
travel to the attention function among the model's keyword arguments, as transformers lets them. A
model that loses them on the way still computes the same: from positions that start again transformers
makes a mask which keeps the rows apart.

It pays on a CPU, where time goes with the positions. On a GPU a pass of this size waits for kernels to
be launched, and a kernel for each row would be slower than padding.

Under autocast attention is computed in float32 on a CPU, of any model that looks its attention function up:
PyTorch's kernel for bfloat16 takes two to three times as long there at these lengths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import sockets

NAME = "packed_rows"


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              row_lengths: list[int] | None = None, **settings) -> tuple[Tensor, None]:
    """Causal attention within each row of query, key and value (1, H, N, d), N = sum of `row_lengths`; without
    lengths, the model's own of (B, H, T, d)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return attention(module, query.float(), key.float(), value.float(), attention_mask, row_lengths, **settings)
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    rows = zip(*(t.split(row_lengths, dim=2) for t in (query, key, value)), strict=True)  # (1, H, n, d) each
    return torch.cat([sdpa_attention_forward(module, *row, None, **settings)[0] for row in rows], dim=1), None


def inputs(sequences: list[list[int]]) -> dict:
    """What to call a decoder with: the token ids of all rows as (1, N), their positions and lengths."""
    lengths = [len(s) for s in sequences]
    return {"input_ids": torch.tensor([[i for s in sequences for i in s]]),                # (1, N)
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],          # (1, N)
            "row_lengths": lengths, "use_cache": False}


@contextlib.contextmanager
def one_sequence(model: nn.Module, longest: int) -> Iterator[bool]:
    """Within it the model may be called with `inputs`, where rows then stay apart; yields whether they do.

    longest: tokens of the longest row. Generation and padded batches work as before within it.
    """
    inside = model.config._attn_implementation == NAME           # an evaluation while training
    with switched(model, longest) as possible:
        yield possible and (inside or _same(model))


@contextlib.contextmanager
def switched(model: nn.Module, longest: int) -> Iterator[bool]:
    """`one_sequence` by what the config says alone: no pass is run to see it."""
    before = model.config._attn_implementation
    wrapped = sockets.WRAPPED if before.startswith(sockets.WRAPPED) else ""          # around it, by a prefix
    if (before.removeprefix(wrapped) not in ("sdpa", NAME) or model.config.is_encoder_decoder
            or next(model.parameters()).device.type != "cpu"):
        yield False
        return
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    sockets.register_attention(NAME)
    model.config._attn_implementation = wrapped + NAME
    try:
        yield _can(model, longest)
    finally:
        model.config._attn_implementation = before


def _can(model: nn.Module, longest: int) -> bool:
    config = model.config.get_text_config()
    windows = [w for name in ("sliding_window", "attention_chunk_size")
               if isinstance(w := getattr(config, name, None), int)]
    return (model.get_output_embeddings() is not None
            and not sockets.added_length(model)             # a prompt or prefix stands before every row of a batch
            and all(longest <= w for w in windows))         # attention over less than the row


@torch.no_grad()
def _same(model: nn.Module) -> bool:
    """Whether the second of two equal rows comes out as the first: not so where a convolution or a recurrence runs
    on from row to row, where positions that start again are not taken, or where the rows' lengths are refused."""
    training = model.training
    model.eval()
    try:
        logits = model(**inputs([[1, 2, 3], [1, 2, 3]])).logits                        # (1, 6, V)
        first, second = logits[0].split(3)                                             # (3, V) each
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    finally:
        model.train(training)
    return bool((first - second).abs().max() <= torch.finfo(first.dtype).eps ** 0.5 * first.abs().max())
