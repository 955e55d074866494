"""Batch generation, each row with the adapter that it asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from . import serve, sockets

SLICES, FEW = 16, 32        # of the output head; rows up to which it is multiplied in slices
LARGE = 1 << 22             # numbers of a head for which that pays


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompts: Sequence[str], adapters: Sequence[str | None] | None = None,
             max_new_tokens: int = 64, *, batch_size: int = 64, progress: bool = False, **options) -> list[str]:
    """The model's continuation of each prompt, as text, greedy unless `options` say otherwise.

    adapters  one name per prompt, of an adapter that is attached or on the model's shelf (`mp.Serve`), None in it
              for the bare base; without it, what is active acts on all. Rows with LoRA, (IA)³, soft prompts or
              nothing are computed together, and several threads may ask for such at once. Other methods are
              activated one after the other, for the whole model.
    options   go to transformers' `generate` (do_sample, temperature, num_beams, …).
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string; accepted is a list of strings")
    prompts = list(prompts)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; accepted is a whole number from 1")
    if adapters is None:
        return _generate(model, tokenizer, prompts, None, max_new_tokens, batch_size, progress, options)
    adapters = list(adapters)
    if len(adapters) != len(prompts):
        raise ValueError(f"adapters names {len(adapters)} rows, prompts has {len(prompts)}; one per prompt is needed")
    found = serve.find(model, adapters)                          # row -> adapter, as it is at this moment
    answers: list[str] = [""] * len(prompts)

    def answer(rows, together):
        made = _generate(model, tokenizer, [prompts[i] for i in rows], together, max_new_tokens, batch_size, progress, options)
        for i, text in zip(rows, made, strict=True):
            answers[i] = text

    if found:
        answer(list(found), list(found.values()))
    for name in dict.fromkeys(n for i, n in enumerate(adapters) if i not in found):
        with sockets.active(model, name):
            answer([i for i, n in enumerate(adapters) if n == name and i not in found], None)
    return answers


def _generate(model, tokenizer, prompts, adapters, max_new_tokens, batch_size, progress, options) -> list[str]:
    """Rows of similar length go together, padded on the left, where an encoder reads them on the right, as in training: it
    may count positions from the first column. The order of the prompts is kept.

    adapters  one `Adapter` or None per prompt; without it, what is active acts on all
    """
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
    if was_training:
        model.eval()
    options = {"do_sample": False, "pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id} | options
    try:
        with _head_in_slices(model), tqdm(total=len(ids), desc="generate", unit="answer", disable=not progress) as bar:
            for at in range(0, len(order), batch_size):
                chunk = order[at:at + batch_size]
                longest = max(len(ids[i]) for i in chunk)
                padding = {i: [pad] * (longest - len(ids[i])) for i in chunk}
                right = model.config.is_encoder_decoder
                batch = torch.tensor([ids[i] + padding[i] if right else padding[i] + ids[i] for i in chunk], device=device)
                places = torch.arange(longest, device=device)
                lengths = torch.tensor([[len(ids[i])] for i in chunk], device=device)
                seen = (places < lengths if right else places >= longest - lengths).long()         # (B, T)
                rows = None if adapters is None else serve.Rows(model, [adapters[i] for i in chunk])
                with sockets.instead(model, rows) if rows else contextlib.nullcontext():
                    inputs = rows.inputs(batch, seen) if rows else {"input_ids": batch, "attention_mask": seen}
                    out = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
                if rows:
                    rows.give_back()
                # of embeddings transformers gives back only what is new
                new = out if model.config.is_encoder_decoder or "inputs_embeds" in inputs else out[:, longest:]
                for i, text in zip(chunk, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                    answers[i] = text
                bar.update(len(chunk))
    finally:
        if was_training:
            model.train()
    return answers


@contextlib.contextmanager
def _head_in_slices(model: nn.Module) -> Iterator[None]:
    """Within it, the output head multiplies a few rows slice by slice, one batched product, on a CPU: as one product
    the BLAS gives them to one core alone, and of an answer's token that is a third."""
    head = model.get_output_embeddings()
    if not (type(head) is nn.Linear and head.bias is None and head.weight.device.type == "cpu" and head.weight.numel() >= LARGE
            and head.out_features % SLICES == 0 and "forward" not in vars(head)):          # another thread's answer
        yield
        return
    head.forward = partial(_sliced, head)
    try:
        yield
    finally:
        vars(head).pop("forward", None)


def _sliced(head: nn.Linear, x: Tensor) -> Tensor:
    """x (…, in) -> (…, out)."""
    rows, W = x.reshape(1, -1, x.shape[-1]), head.weight         # (1, n, in), (out, in)
    n, out = rows.shape[1], len(W)
    if not 0 < n <= FEW or x.dtype != W.dtype or torch.is_autocast_enabled("cpu"):
        return nn.Linear.forward(head, x)
    slices = W.view(SLICES, out // SLICES, -1).mT                # (S, in, out/S)
    y = torch.bmm(rows.expand(SLICES, -1, -1), slices)           # (S, n, out/S)
    return y.transpose(0, 1).reshape(*x.shape[:-1], out)
