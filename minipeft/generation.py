"""Batch generation, each row with the adapter that it asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from . import sockets


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompts: Sequence[str], adapters: Sequence[str | None] | None = None,
             max_new_tokens: int = 64, *, batch_size: int = 64, progress: bool = False, **options) -> list[str]:
    """The model's continuation of each prompt, as text, greedy unless `options` say otherwise.

    adapters  one name per prompt, None in it for the bare base; without it, what is active acts on
              all. Rows with the same adapter are computed together.
    options   go to transformers' `generate` (do_sample, temperature, num_beams, …).
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; accepted is a list of strings")
    prompts = list(prompts)
    if adapters is None:
        return _generate(model, tokenizer, prompts, max_new_tokens, batch_size, progress, options)
    adapters = list(adapters)
    if len(adapters) != len(prompts):
        raise ValueError(f"adapters names {len(adapters)} rows, prompts has {len(prompts)}; one per prompt is needed")
    answers: list[str] = [""] * len(prompts)
    for name in dict.fromkeys(adapters):
        rows = [i for i, n in enumerate(adapters) if n == name]
        with sockets.active(model, name):
            made = _generate(model, tokenizer, [prompts[i] for i in rows], max_new_tokens, batch_size, progress, options)
        for i, text in zip(rows, made, strict=True):
            answers[i] = text
    return answers


def _generate(model, tokenizer, prompts, max_new_tokens, batch_size, progress, options) -> list[str]:
    """Rows of similar length go together, padded on the left; the order of the prompts is kept."""
    from tqdm.auto import tqdm

    device = next(model.parameters()).device
    ids = [tokenizer(p)["input_ids"] for p in prompts]
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"prompt {i} is {prompts[i]!r}, which has no token")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    options = {"do_sample": False, "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id} | options
    try:
        with tqdm(total=len(ids), desc="generate", unit="answer", disable=not progress) as bar:
            for at in range(0, len(order), batch_size):
                chunk = order[at:at + batch_size]
                longest = max(len(ids[i]) for i in chunk)
                batch = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in chunk], device=device)
                seen = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in chunk], device=device)
                out = model.generate(input_ids=batch, attention_mask=seen, max_new_tokens=max_new_tokens, **options)
                new = out if model.config.is_encoder_decoder else out[:, longest:]
                for i, text in zip(chunk, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    answers[i] = text
                bar.update(len(chunk))
    finally:
        model.train(was_training)
    return answers
