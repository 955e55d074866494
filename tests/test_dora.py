"""Statements about DoRA; what it computes is compared with Hugging Face PEFT."""

import warnings

import pytest
import torch
from torch import nn

import minipeft as mp
from minipeft import anatomy
from minipeft.methods.dora import Decomposed

from .families import FAMILIES, inputs
from .test_adapters import loss_of
from .test_lora import SEVERAL, bytes_of, distance, logits_of, random_state, train


def piece_on(linear: nn.Module, **settings) -> Decomposed:
    return random_state(Decomposed(mp.DoRA(**settings), linear), size=0.5)


@pytest.mark.parametrize("family", SEVERAL)
def test_dora_is_the_identity_before_training(family):
    model = FAMILIES[family]()
    before = logits_of(model, family)
    mp.attach(model, mp.DoRA(targets="all-linear"))
    assert torch.equal(logits_of(model, family), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "t5"])
def test_training_changes_the_adapter_and_no_byte_of_the_base(family):
    model = FAMILIES[family]()
    before, start = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, mp.DoRA(rank=2, targets="all-linear"))
    first = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    train(model, family)
    assert bytes_of(model.state_dict()) == before
    assert not any(torch.equal(p, first[n]) for n, p in adapter.named_parameters())
    mp.detach(model)
    assert torch.equal(logits_of(model, family), start)


def test_exactly_a_b_and_m_train_and_their_number_is_the_closed_formula():
    model, dora = FAMILIES["phi3"](), mp.DoRA(rank=3, targets="all-linear")
    paths = anatomy.match(model, "all-linear")
    mp.attach(model, dora, "mine")
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"minipeft.mine.{path}.{symbol}" for path in paths for symbol in ("A", "B", "m")}
    shapes = [anatomy.linear_shape(model.get_submodule(path)) for path in paths]
    assert sum(trained.values()) == sum(3 * (i + o) + o for o, i in shapes)
    assert sum(trained.values()) == sum(dora.parameter_count(*shape) for shape in shapes)


@pytest.mark.parametrize("size", [1e-4, 0.3, 30.0])
def test_the_norm_by_one_thin_product_is_the_norm(size):
    torch.manual_seed(0)
    W = torch.nn.Linear(300, 200)
    piece = random_state(Decomposed(mp.DoRA(rank=4), W), size=size)
    V = W.weight.double() + piece.scale * piece.B.double() @ piece.A.double()
    exact = torch.linalg.vector_norm(V, dim=1)
    assert ((piece.norm().double() - exact) / exact).abs().max() < 2e-6     # float32, any size of the change
    with torch.no_grad():                                   # the worst case: V is a hundredth of W
        B, S, At = torch.linalg.svd(torch.randn(200, 4) @ torch.randn(4, 300), full_matrices=False)
        W.weight.copy_((B[:, :4] * S[:4]) @ At[:4])
        piece.B.copy_(-0.99 * B[:, :4] * S[:4] / piece.scale)
        piece.A.copy_(At[:4])
    exact = torch.linalg.vector_norm(W.weight.double() + piece.scale * piece.B.double() @ piece.A.double(), dim=1)
    assert ((piece.norm().double() - exact) / exact).abs().max() < 0.02


def test_the_norm_notices_when_the_base_changes():
    linear = nn.Linear(5, 6)
    piece = piece_on(linear, rank=2)

    def exact():
        return torch.linalg.vector_norm(linear.weight.to(piece.A.dtype) + piece.delta(), dim=1)

    changes = [lambda: linear.weight.mul_(3), lambda: linear.load_state_dict(nn.Linear(5, 6).state_dict()),
               lambda: linear.weight.set_(torch.randn(6, 5)), linear.double, linear.float,
               lambda: setattr(linear, "weight", nn.Parameter(torch.randn(6, 5)))]
    assert torch.allclose(piece.norm(), exact(), rtol=1e-5)
    for change in changes:
        with torch.no_grad():
            change()
        assert torch.allclose(piece.norm(), exact(), rtol=1e-5)


def test_rows_have_the_length_m_and_directions_of_their_own():
    linear = nn.Linear(7, 6).double()
    piece = piece_on(linear, rank=2)
    W = piece.merged(linear.weight)
    assert torch.allclose(torch.linalg.vector_norm(W, dim=1), piece.m.abs())
    x = torch.randn(3, 7, dtype=torch.float64)
    assert torch.allclose(piece(x, linear(x)), x @ W.T + linear.bias)
    with torch.no_grad():
        piece.m.mul_(2)
    assert torch.allclose(piece.merged(linear.weight), 2 * W)


@pytest.mark.parametrize("magnitude", ["any", "zero in a row"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out"), [(5, 9), (9, 5)])
def test_gradients_are_those_of_the_formula_whichever_of_z_and_y_is_kept(d_in, d_out, bias, magnitude):
    linear = random_state(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64), size=0.5)
    piece = piece_on(linear, rank=2)
    x, g = (torch.randn(2, 3, d, dtype=torch.float64, requires_grad=d == d_in) for d in (d_in, d_out))
    if magnitude != "any":
        with torch.no_grad():
            piece.m[1] = 0
    learned = [x, *piece.parameters(), *([linear.bias] if bias else [])]
    y = piece(x, linear(x))
    V = linear.weight.detach() + piece.delta()
    wanted = x @ (piece.m / piece.norm() * V.T) + (linear.bias if bias else 0)
    assert distance(y, wanted) < 1e-12
    for got, want in zip(torch.autograd.grad(y, learned, g), torch.autograd.grad(wanted, learned, g), strict=True):
        assert want.abs().max() > 1e-3 and distance(got, want) < 1e-10


@pytest.mark.parametrize("second", [mp.LoRA, mp.DoRA])
def test_a_second_adapter_on_top_does_not_overwrite_what_is_kept(second):
    model, given = FAMILIES["gpt2"]().double(), inputs("gpt2")
    adapter = random_state(mp.attach(model, mp.DoRA(rank=2, targets="all-linear")), size=0.3)
    random_state(mp.attach(model, second(rank=2, targets="all-linear"), "top"), size=0.3)

    def loss():
        return model(**given).logits.square().mean()
    loss().backward()
    for path in ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"):
        m, around = adapter.get_submodule(path).m, []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                m[0] += step
                around.append(loss().item())
            m[0] += 1e-5
        slope = m.grad[0].item()
        assert abs(slope) > 1e-6 and slope == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-4)


def test_a_row_of_zeros_stays_zero_and_gives_no_nan():
    linear = nn.Linear(5, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    piece, x = Decomposed(mp.DoRA(), linear), torch.randn(4, 5)
    y = linear(x)
    out = piece(x, y.clone())
    out.sum().backward()
    assert torch.equal(out, y) and all(p.grad.isfinite().all() for p in piece.parameters())
    assert piece.merged(linear.weight).isfinite().all()


def test_dropout_acts_on_what_goes_into_v_in_training_only():
    torch.manual_seed(0)
    linear = nn.Linear(50, 6)
    piece, x = piece_on(linear, rank=2, dropout=0.4), torch.randn(8, 50)
    c = piece.m / piece.norm()
    V = linear.weight + piece.delta()
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.4)
    torch.manual_seed(3)
    wanted = linear(x) + c * (dropped @ V.T) - dropped @ linear.weight.T
    assert torch.allclose(piece(x, linear(x)), wanted, atol=1e-5)
    piece.eval()
    assert torch.allclose(piece(x, linear(x)), c * (x @ V.T) + linear.bias, atol=1e-5)


def test_dropout_is_handled_as_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = FAMILIES["gpt2"]().double()
    random_state(mp.attach(model, mp.DoRA(rank=2, dropout=0.3, targets=("c_attn",))))
    mp.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES["gpt2"]().double(), tmp_path, is_trainable=True)
    logits = []
    for one in (model, theirs):
        one.train()
        torch.manual_seed(7)
        logits.append(one(**inputs("gpt2")).logits)
    assert distance(*logits) < 1e-9 and distance(logits[0], model.eval()(**inputs("gpt2")).logits) > 1e-3


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "roberta", "t5"])
def test_merged_computes_the_same_and_unmerging_gives_the_bytes_back(family):
    model = FAMILIES[family]()
    before, base = bytes_of(model.state_dict()), logits_of(model, family)
    random_state(mp.attach(model, mp.DoRA(rank=2, targets="all-linear")), size=0.3)
    live = logits_of(model, family)
    assert distance(live, base) > 1e-2
    mp.merge(model)
    assert bytes_of(model.state_dict()) != before and distance(logits_of(model, family), live) < 1e-4
    mp.unmerge(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, family), live)


def test_a_16_bit_base_keeps_small_changes_of_the_magnitude():
    model = FAMILIES["llama"]().bfloat16()
    base = model(**inputs("llama")).logits
    adapter = mp.attach(model, mp.DoRA(targets=("down_proj",)))
    out = model(**inputs("llama")).logits
    assert out.dtype == torch.bfloat16 and distance(out.float(), base.float()) < 0.02
    out.float().square().sum().backward()
    assert {p.dtype for p in adapter.parameters()} == {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    linear = nn.Linear(5, 6, bias=False).bfloat16()
    piece, x = Decomposed(mp.DoRA(), linear), torch.eye(5).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        piece.m.mul_(1.003)                                 # bfloat16 knows 1 and 1.0078
        y = linear(x)
        assert not torch.equal(piece(x, y.clone()), y)


def test_a_copy_of_the_model_looks_at_its_own_weights():
    import copy
    model = FAMILIES["llama"]()
    random_state(mp.attach(model, mp.DoRA()))
    twin = copy.deepcopy(model)
    path = "model.layers.0.self_attn.q_proj"
    assert mp.adapters(twin)["default"].pieces()[path].module[0] is twin.get_submodule(path)


KEYS = {"A": ".lora_A.default.weight", "B": ".lora_B.default.weight", "m": ".lora_magnitude_vector.default.weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_computes_what_peft_computes(family, tmp_path):
    equals_peft(family, mp.DoRA(rank=3, alpha=7, targets="all-linear"), KEYS, tmp_path)


def equals_peft(family, method, keys, folder):
    """Same logits and gradients in float64 at a random state, weights carried over by checkpoint, there and back."""
    peft = pytest.importorskip("peft")
    model, x = FAMILIES[family]().double(), inputs(family)
    base = logits_of(model, family)
    adapter = random_state(mp.attach(model, method))
    mp.save_adapter(model, folder / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), folder / "ours", is_trainable=True).eval()
        theirs.save_pretrained(folder / "theirs")
    logits, expected = model(**x).logits, theirs(**x).logits
    assert distance(logits, expected) < 1e-9 and distance(base, expected) > 1e-2
    loss_of(logits).backward()
    loss_of(expected).backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for path, piece in adapter.pieces().items():
        for name, p in piece.named_parameters():
            key = keys.get(name, name.replace("copy.", ".modules_to_save.default."))
            gradient = wanted.pop("base_model.model." + path + key)
            rows = getattr(piece, "rows", None)             # (IA)³ leaves q alone where one matrix makes q, k, v
            gradient = gradient.flatten()[rows] if rows is not None else gradient.view(p.shape)
            assert distance(p.grad, gradient) < 1e-9, (path, name)
    assert not wanted
    back = FAMILIES[family]().double()
    mp.load_adapter(back, folder / "theirs")
    assert distance(logits_of(back, family), expected.detach()) < 1e-9


def test_the_norm_is_made_again_when_a_or_b_has_changed_and_only_then():
    piece = piece_on(nn.Linear(5, 6), rank=2)

    def exact():
        return torch.linalg.vector_norm(piece.module[0].weight.to(piece.A.dtype) + piece.delta(), dim=1)

    first = piece.norm()
    assert piece.norm() is first and torch.allclose(first, exact())
    for p in (piece.A, piece.B):
        p.data.mul_(1.5)                                    # not counted in p._version
        assert piece.norm() is not first and torch.allclose(piece.norm(), exact())
        first = piece.norm()
    piece.m.data.mul_(2)
    assert piece.norm() is first and torch.allclose(first, exact())
