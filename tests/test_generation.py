"""`mp.generate`: the output head in slices gives what it gives whole. (Rows with adapters of their own: test_serve.py.)"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minipeft as mp
from minipeft import generation

from .families import FAMILIES


@pytest.fixture
def large():
    """A head as large as that of a real model, on a small one, and the shapes of what it multiplies."""
    model = FAMILIES["llama"]().eval()
    head = nn.Linear(32, generation.LARGE // 32, bias=False).requires_grad_(False)
    model.set_output_embeddings(head)
    return model, head


@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 1, 32), (32, 32), (5, 7, 32), (0, 1, 32), (32,)])
def test_the_head_in_slices_gives_what_it_gives_whole(large, shape):
    model, head = large
    x = torch.randn(shape)
    with generation._head_in_slices(model):
        assert "forward" in vars(head)
        y = head(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = head(x)
    assert y.shape == (*shape[:-1], generation.LARGE // 32) and "forward" not in vars(head)
    assert torch.allclose(y, F.linear(x, head.weight), rtol=1e-5, atol=1e-5)
    assert low.dtype == torch.bfloat16


def test_answers_are_those_of_the_whole_head_and_nothing_stays_behind(large, monkeypatch):
    model, head = large
    used, real = [], generation._sliced
    monkeypatch.setattr(generation, "_sliced", lambda head, x: used.append(x.shape) or real(head, x))
    ids = torch.tensor([[5, 6, 7]])

    def answer():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)

    with torch.no_grad():
        model.get_input_embeddings().weight = nn.Parameter(torch.randn(generation.LARGE // 32, 32))
        whole = answer()
        with pytest.raises(ZeroDivisionError), generation._head_in_slices(model), generation._head_in_slices(model):
            assert torch.equal(answer(), whole) and len(used) == 6
            1 / 0
    assert "forward" not in vars(head)


def test_small_heads_heads_with_a_bias_and_trained_ones_are_left_alone(large):
    model, head = large
    for other in (nn.Linear(32, 100, bias=False), nn.Linear(32, generation.LARGE // 32), nn.Linear(32, generation.LARGE // 32 + 1, bias=False)):
        model.set_output_embeddings(other)
        with generation._head_in_slices(model):
            assert "forward" not in vars(other)
    assert len(mp.generate(FAMILIES["llama"](), Bytes(), ["a", "b"], max_new_tokens=2)) == 2


@pytest.mark.parametrize("size", [0, -1, True, 2.0])
def test_a_batch_size_that_is_no_positive_number_is_refused(size):
    with pytest.raises(ValueError, match="batch_size is .*; accepted is a whole number from 1"):
        mp.generate(FAMILIES["llama"](), Bytes(), ["a"], batch_size=size)


class Bytes:
    """Enough of a tokenizer for a model of 100 tokens."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, text):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    def batch_decode(self, ids, **options):
        return [" ".join(map(str, row.tolist())) for row in ids]
