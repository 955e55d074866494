"""Statements about combining adapters; the oracle is Hugging Face PEFT's add_weighted_adapter."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minipeft as mp
from minipeft import arithmetic

from .families import FAMILIES, inputs
from .test_lora import logits_of, random_state


def with_adapters(ranks=(3, 3), alphas=(6, 5), targets="all-linear", family="llama"):
    model = FAMILIES[family]().double()
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        random_state(mp.attach(model, mp.LoRA(rank=r, alpha=alpha, targets=targets), "ab"[i]), seed=i)
    return model


def change(model, name):
    return {path: piece.delta() for path, piece in mp.adapters(model)[name].pieces().items()}


def close(a, b, tolerance=1e-10):
    return all(torch.linalg.norm(a[p] - b[p]) <= tolerance * torch.linalg.norm(b[p]) for p in b) and a.keys() == b.keys()


def of_peft(model, family, how, weights, tmp_path, **options):
    """The same combination made by PEFT from the same adapters: ΔW by path."""
    from peft import PeftModel
    for name in "ab":
        mp.save_adapter(model, tmp_path / name, name)
    base = FAMILIES[family]().double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, tmp_path / "a", "a")
        theirs.load_adapter(tmp_path / "b", "b")
        theirs.add_weighted_adapter(["a", "b"], list(weights), "c", combination_type=how, **options)
    return {path: theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("c")
            for path in mp.adapters(model)["a"].pieces()}


@pytest.mark.parametrize("ours,theirs,options", [
    ("cat", "cat", {}), ("svd", "svd", {"rank": 4}), ("linear", "linear", {}),
    ("ties", "ties_svd", {"rank": 5, "density": 0.3})])
def test_a_combination_is_that_of_peft(ours, theirs, options, tmp_path):
    model, weights = with_adapters(), (0.7, 0.5)
    mp.combine(model, dict(zip("ab", weights, strict=True)), "c", ours, **options)
    their_options = {{"rank": "svd_rank"}.get(k, k): v for k, v in options.items()}
    wanted = of_peft(model, "llama", theirs, weights, tmp_path, **their_options)
    found = change(model, "c")
    assert close(found, {p: w.to(found[p].dtype) for p, w in wanted.items()},
                 1e-6 if ours == "linear" else 1e-9)          # whose roots PEFT takes in float32


def test_cat_is_the_weighted_sum_also_of_different_ranks_and_places_and_negative_weights():
    model = with_adapters(ranks=(2, 5))
    random_state(mp.attach(model, mp.LoRA(rank=1, targets=("q_proj",)), "c"), seed=9)
    mp.combine(model, {"a": 1.5, "b": -0.5, "c": 2.0}, "sum")
    a, b, c = (change(model, n) for n in "abc")
    wanted = {p: 1.5 * a[p] - 0.5 * b[p] + (2.0 * c[p] if p in c else 0) for p in a}
    assert close(change(model, "sum"), wanted) and mp.adapters(model)["sum"].method.rank == 8
    assert model.minipeft.active == ("sum",)


def test_the_model_computes_what_its_sum_says():
    model = with_adapters()
    mp.activate(model, ("a", "b"))
    both = logits_of(model, "llama")                # both at once: each adds its own change to the same outputs
    mp.combine(model, {"a": 1.0, "b": 1.0}, "sum")
    assert torch.allclose(logits_of(model, "llama"), both, rtol=1e-9, atol=1e-9)
    mp.activate(model, None)
    assert not torch.allclose(both, logits_of(model, "llama"))


def test_svd_of_enough_rank_is_exact_and_of_less_the_best_there_is():
    model = with_adapters(ranks=(2, 2))
    a, b = change(model, "a"), change(model, "b")
    mp.combine(model, {"a": 1.0, "b": 1.0}, "exact", "svd", rank=4)
    assert close(change(model, "exact"), {p: a[p] + b[p] for p in a}, 1e-9)
    mp.reduce_rank(model, "exact", 3, "three")
    for path, delta in change(model, "three").items():
        whole = a[path] + b[path]
        lost = torch.linalg.svdvals(whole)[3:].square().sum().sqrt()
        assert torch.linalg.matrix_rank(delta) == 3 and abs(torch.linalg.norm(whole - delta) - lost) < 1e-9 * torch.linalg.norm(whole)


def test_dare_keeps_the_mean_and_draws_from_its_seed():
    model = with_adapters(ranks=(1, 1))
    full = min(mp.adapters(model)["a"].pieces()["model.layers.0.self_attn.q_proj"].delta().shape)
    made = []
    for i in range(60):
        mp.combine(model, {"a": 1.0, "b": 1.0}, f"d{i}", "dare", rank=full, density=0.5, seed=i)
        made.append(change(model, f"d{i}")["model.layers.0.self_attn.q_proj"])
        mp.detach(model, f"d{i}")
    a, b = (change(model, n)["model.layers.0.self_attn.q_proj"] for n in "ab")
    mean = torch.stack(made).mean(0)
    assert torch.linalg.norm(mean - a - b) < 0.35 * torch.linalg.norm(a + b)      # 1/√60 of one draw's error
    assert torch.linalg.norm(made[0] - a - b) > 0.5 * torch.linalg.norm(a + b) and not torch.equal(made[0], made[1])
    mp.combine(model, {"a": 1.0, "b": 1.0}, "again", "dare", rank=full, density=0.5, seed=0)
    assert torch.equal(change(model, "again")["model.layers.0.self_attn.q_proj"], made[0])
    mp.combine(model, {"a": 1.0, "b": 1.0}, "all", "dare", rank=full, density=1.0)
    assert torch.allclose(change(model, "all")["model.layers.0.self_attn.q_proj"], a + b)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
def test_trimming_keeps_the_largest(rows, columns, density, seed):
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    kept = arithmetic.trimmed(delta, density)
    many = int(density * delta.numel())
    assert (kept != 0).sum() == many and torch.equal(kept[kept != 0], delta[kept != 0])
    if 0 < many < delta.numel():
        assert kept[kept != 0].abs().min() >= delta[kept == 0].abs().max()


def test_a_combination_is_saved_and_opens_in_peft(tmp_path):
    from peft import PeftModel
    model = with_adapters(ranks=(2, 3))
    mp.combine(model, {"a": 0.3, "b": 0.6}, "sum")
    mp.save_adapter(model, tmp_path, "sum")
    theirs = PeftModel.from_pretrained(FAMILIES["llama"]().double(), tmp_path)
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(**inputs("llama")).logits, logits_of(model, "llama"), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong,error,says", [
    (dict(how="mean"), ValueError, "how is 'mean'; accepted are 'cat'"),
    (dict(weights={}), ValueError, "weights is {}"),
    (dict(weights={"a": float("nan")}), ValueError, "the weight of 'a' is nan"),
    (dict(weights={"a": -1.0, "b": 1.0}, how="linear"), ValueError, "not below 0"),
    (dict(weights={"A": 1.0}), ValueError, "no adapter is called 'A'"),
    (dict(density=0.0, how="ties"), ValueError, "density is 0.0"),
    (dict(rank=0, how="svd"), ValueError, "rank is 0"),
    (dict(rank=3), ValueError, "rank is 3 with how='cat'"),
    (dict(how="linear"), ValueError, "the ranks are {'a': 2, 'b': 3}"),
    (dict(name="a"), ValueError, "attached already"),
])
def test_what_cannot_be_combined_is_refused_and_nothing_changes(wrong, error, says):
    model = with_adapters(ranks=(2, 3))
    before = logits_of(model, "llama")
    with pytest.raises(error, match=says):
        mp.combine(model, **{"weights": {"a": 1.0, "b": 1.0}, "name": "new"} | wrong)
    assert list(mp.adapters(model)) == ["a", "b"] and torch.equal(logits_of(model, "llama"), before)


@pytest.mark.parametrize("verb", [lambda m: mp.combine(m, {"a": 1.0, "b": 1.0}, "new"), lambda m: mp.average_adapters(m, ["a", "b"], "new")])
def test_beside_a_merged_adapter_nothing_is_attached(verb):
    model = FAMILIES["llama"]()
    method = mp.LoRA(2) if "combine" in verb.__code__.co_names else mp.BottleneckAdapter(4)
    for name in "ab":
        mp.attach(model, method, name)
    mp.attach(model, mp.LoRA(1), "merged into it")
    mp.activate(model, "merged into it")
    mp.merge(model, "merged into it")
    with pytest.raises(ValueError, match="'merged into it' is merged into the base; unmerge it first"):
        verb(model)
    assert list(mp.adapters(model)) == ["a", "b", "merged into it"] and model.minipeft.active == ("merged into it",)


def test_other_methods_and_own_heads_are_refused():
    model = with_adapters()
    mp.attach(model, mp.DoRA(targets=("q_proj",)), "d")
    with pytest.raises(TypeError, match="adapter 'd' is DoRA; only LoRA"):
        mp.combine(model, {"a": 1.0, "d": 1.0}, "new")
    from transformers import LlamaForSequenceClassification
    config = FAMILIES["llama"]().config
    classifier = LlamaForSequenceClassification(config)
    mp.attach(classifier, mp.LoRA(rank=2), "a")
    with pytest.raises(ValueError, match="an output head of its own"):
        mp.combine(classifier, {"a": 1.0}, "new")
