"""Statements about LoftQ. Oracle: the alternation of Hugging Face PEFT, whose code asks for a GPU and is
given the CPU here; it knows neither the scale of LoRA (so alpha = rank) nor double quantisation."""

import warnings

import pytest
import torch

import minipeft as mp
from minipeft import anatomy
from minipeft.quant import loftq, nf4

from .families import FAMILIES
from .test_linear4bit import in_bitsandbytes, wide
from .test_lora import bytes_of, distance, logits_of


def weight(rows=96, columns=130, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw) * (1 + torch.rand(rows, 1, generator=draw))


@pytest.fixture
def cpu_for_cuda(monkeypatch):
    to = torch.Tensor.to

    def instead(self, *args, **kwargs):
        args = ["cpu" if str(a).startswith("cuda") else a for a in args]
        return to(self, *args, **{k: "cpu" if str(v).startswith("cuda") else v for k, v in kwargs.items()})

    monkeypatch.setattr(torch.Tensor, "to", instead)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_the_alternation_is_that_of_peft(iterations, cpu_for_cuda):
    utils = pytest.importorskip("peft.utils.loftq_utils")
    pytest.importorskip("bitsandbytes")
    W, lora = weight(), mp.LoRA(rank=6, alpha=6)
    Q, A, B, residuals = loftq.alternate(W, lora, iterations, double_quant=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, their_A, their_B = utils.loftq_init(W, num_bits=4, reduced_rank=6, num_iter=iterations)
    assert torch.equal(nf4.dequantize(Q), theirs)
    assert distance(B @ A, their_B[:, :6] @ their_A[:6]) < 1e-4 and len(residuals) == iterations + 1


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("lora", [mp.LoRA(rank=4, alpha=4), mp.LoRA(rank=8, alpha=32), mp.LoRA(rank=3, alpha=1, rslora=True)])
def test_the_residual_falls_at_each_iteration_and_is_that_of_what_is_returned(lora, double_quant):
    W = weight()
    Q, A, B, residuals = loftq.alternate(W, lora, 4, double_quant=double_quant)
    assert all(later < earlier for earlier, later in zip(residuals, residuals[1:-1], strict=False))
    assert (A.shape, B.shape) == ((lora.rank, 130), (96, lora.rank))
    W64 = W.double()
    measured = (W64 - nf4.dequantize(Q).double() - lora.scale * B.double() @ A.double()).norm() / W64.norm()
    assert min(residuals) == pytest.approx(measured.item(), rel=1e-4)
    plain = (nf4.dequantize(nf4.quantize(W, double_quant=double_quant)).double() - W64).norm() / W64.norm()
    assert residuals[0] == pytest.approx(plain.item(), rel=1e-4) and min(residuals) < 0.95 * residuals[0]


def test_with_full_rank_nothing_is_lost():
    _, _, _, residuals = loftq.alternate(weight(20, 33), mp.LoRA(rank=40, alpha=1), 1)
    assert residuals[-1] < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_iteration_leaves_the_base_as_quantize_makes_it_and_starts_nearer_to_the_full_model(family):
    full = logits_of(FAMILIES[family](), family)
    plain, model = mp.quantize(FAMILIES[family]()), FAMILIES[family]()
    residuals = mp.quantize_loftq(model, mp.LoRA(rank=8, targets="all-linear"))
    assert list(residuals) == anatomy.match(model, "all-linear")
    assert all(after < before for before, after in residuals.values())
    error = (logits_of(model, family) - full).norm()
    assert error < 0.8 * (logits_of(plain, family) - full).norm()
    mp.detach(model)
    assert bytes_of(model.state_dict()) == bytes_of(plain.state_dict())


def test_more_iterations_fit_the_codes_to_the_adapter():
    model, plain = FAMILIES["llama"](), mp.quantize(FAMILIES["llama"]())
    residuals = mp.quantize_loftq(model, mp.LoRA(rank=4, targets="attention"), "mine", iterations=5)
    assert sum(min(r) for r in residuals.values()) < sum(r[1] for r in residuals.values())
    mp.detach(model, "mine")
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, plain.state_dict()[name])}
    assert changed and all("self_attn" in name for name in changed)


def test_an_adapter_started_by_loftq_is_loaded_by_peft_on_bitsandbytes_layers(tmp_path):
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    model = wide("llama")
    mp.quantize_loftq(model, mp.LoRA(rank=4, targets="all-linear"))
    mp.save_adapter(model, tmp_path)
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(in_bitsandbytes(wide("llama")), tmp_path).eval()
        assert distance(logits_of(model), logits_of(theirs)) < 2e-5
    again = mp.quantize(wide("llama"))
    mp.load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize(("lora", "settings", "error", "says"), [
    (mp.DoRA(), {}, TypeError, "lora is DoRA"),
    (mp.LoRA(init="pissa"), {}, ValueError, "init is 'pissa'"),
    (mp.LoRA(), {"iterations": 0}, ValueError, "iterations is 0; accepted is a whole number from 1"),
    (mp.LoRA(), {"name": "a.b"}, ValueError, "without a dot"),
    (mp.LoRA(), {"skip": ("v_proj",)}, ValueError, "v_proj is a target of the LoRA, but is not quantised"),
    (mp.LoRA(targets="query"), {}, ValueError, "no module of this model ends in 'query'"),
])
def test_what_loftq_cannot_start_is_refused_and_nothing_has_changed(lora, settings, error, says):
    model = wide("llama")
    before = bytes_of(model.state_dict())
    with pytest.raises(error, match=says):
        mp.quantize_loftq(model, lora, **settings)
    assert bytes_of(model.state_dict()) == before and not mp.adapters(model)
