"""Statements about (IA)³. The oracle is Hugging Face PEFT."""

import pytest
import torch

import minipeft as mp
from minipeft import anatomy
from minipeft.methods.ia3 import RescaleInput

from .families import FAMILIES
from .test_dora import equals_peft
from .test_lora import bytes_of, distance, logits_of, random_state, train


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_computes_what_peft_computes(family, tmp_path):
    equals_peft(family, mp.IA3(), {"l": ".ia3_l.default"}, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "bert", "t5", "gpt_neox"])
def test_pefts_own_choice_of_modules_opens_here_and_computes_the_same(family, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as INNER
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS
    theirs = peft.get_peft_model(FAMILIES[family]().double(), peft.IA3Config(
        task_type="SEQ_CLS" if family == "bert" else None)).eval()
    random_state(theirs.base_model)  # the base too; it is put back below
    with torch.no_grad():
        for name, p in FAMILIES[family]().double().named_parameters():
            for mine, q in theirs.base_model.model.named_parameters():
                if mine.replace(".base_layer", "").replace(".original_module", "") == name:
                    q.copy_(p)
    theirs.save_pretrained(tmp_path)
    model = FAMILIES[family]().double()
    adapter = mp.load_adapter(model, tmp_path)
    assert distance(logits_of(model, family), logits_of(theirs, family)) < 1e-9
    ours = {path: type(piece) for _, path, piece in mp.IA3().pieces(FAMILIES[family]())}
    found = {path: type(piece) for path, piece in adapter.pieces().items() if path in ours}
    kind = model.config.model_type
    if family in ("llama", "t5", "gpt2", "gpt_neox"):       # the paper's places; Gemma's q and BERT's o are PEFT's own
        assert found == ours and len(ours) == len(adapter.pieces())
    elif family == "bert":
        assert found == ours and any("attention.output" in path for path in adapter.pieces())
    else:
        assert "q_proj" in TARGETS[kind] and "k_proj" not in TARGETS[kind] and INNER[kind] == ["down_proj"]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "falcon", "roberta", "t5_gated"])
def test_ia3_is_the_identity_before_training_and_leaves_the_base_alone_in_it(family):
    model = FAMILIES[family]()
    bytes_before, before = bytes_of(model.state_dict()), logits_of(model, family)
    adapter = mp.attach(model, mp.IA3())
    assert torch.equal(logits_of(model, family), before)
    train(model, family)
    assert bytes_of(model.state_dict()) == bytes_before
    assert all((piece.l != 1).any() for piece in adapter.pieces().values() if hasattr(piece, "l"))
    mp.detach(model)
    assert torch.equal(logits_of(model, family), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "falcon", "falcon_new", "t5_gated"])
def test_the_vectors_are_as_wide_as_keys_values_and_the_inner_activation(family):
    model = FAMILIES[family]()
    mp.attach(model, mp.IA3(), "mine")
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(".l") for n in trained)
    blocks = anatomy.anatomy(model).blocks
    assert sum(trained.values()) == sum(
        sum(2 * a.num_kv_heads * a.head_dim for a in b.attentions) + b.feed_forward.part("down")[0].in_features
        for b in blocks)
    if family == "llama":
        assert sum(trained.values()) == 2 * (16 + 16 + 48)
    if family == "gpt2":
        assert sum(trained.values()) == 2 * (32 + 32 + 48)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "falcon_new", "opt", "bert", "t5"])
def test_merged_computes_the_same_and_unmerging_gives_the_bytes_back(family):
    model = FAMILIES[family]().double()
    before, base = bytes_of(model.state_dict()), logits_of(model, family)
    random_state(mp.attach(model, mp.IA3()))
    live = logits_of(model, family)
    assert distance(live, base) > 1e-2
    mp.merge(model)
    assert bytes_of(model.state_dict()) != before and distance(logits_of(model, family), live) < 1e-12
    mp.unmerge(model)
    assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, family), live)


def test_where_one_matrix_makes_q_k_v_the_queries_stay_to_the_bit():
    for family in ("gpt2", "falcon_new", "phi3"):
        model = FAMILIES[family]()
        adapter = random_state(mp.attach(model, mp.IA3()))
        for attention in (a for b in anatomy.anatomy(model).blocks for a in b.attentions):
            fused, q = attention.part("q")
            assert (adapter.pieces()[fused.path].whole()[q] == 1).all()
            x = torch.randn(2, 3, 32)
            changed = model.get_submodule(fused.path)(x)
            with mp.active(model, None):
                plain = model.get_submodule(fused.path)(x)
            assert torch.equal(changed[..., q], plain[..., q])
            for part in "kv":
                assert not torch.isclose(changed[..., attention.part(part)[1]], plain[..., attention.part(part)[1]]).any()


def test_lora_and_ia3_merge_and_unmerge_at_one_place_in_the_order_in_which_they_act():
    for order in ("ab", "ba"):
        model = FAMILIES["opt"]().double()
        before = bytes_of(model.state_dict())
        random_state(mp.attach(model, mp.LoRA(rank=2, targets="all-linear"), "a"), 1)
        random_state(mp.attach(model, mp.IA3(), "b"), 2)
        mp.activate(model, list(order))
        live = logits_of(model, "opt")
        if order == "ba":                                   # a live LoRA gets l ∘ x and adds to l ∘ y, a merged one would not
            for name, other in ("ab", "ba"):
                with pytest.raises(ValueError, match=f"'{other}' and '{name}' both act on"):
                    mp.merge(model, name)
            assert bytes_of(model.state_dict()) == before and torch.equal(logits_of(model, "opt"), live)
            continue
        for name in order:
            mp.merge(model, name)
        assert distance(logits_of(model, "opt"), live) < 1e-12
        for name in order:
            mp.unmerge(model, name)
        assert bytes_of(model.state_dict()) == before
        assert torch.equal(logits_of(model, "opt"), live)


def test_named_targets_are_rescaled_whole_and_inputs_only_where_asked():
    model = FAMILIES["gpt2"]()
    adapter = mp.attach(model, mp.IA3(targets=["c_attn", "mlp.c_proj"]))
    assert adapter.get_parameter("transformer.h.0.attn.c_attn.l").shape == (96,)
    assert isinstance(adapter.pieces()["transformer.h.0.mlp.c_proj"], RescaleInput)
    mp.detach(model)
    adapter = mp.attach(model, mp.IA3(targets=["c_attn", "mlp.c_proj"], feed_forward=()))
    assert not any(isinstance(piece, RescaleInput) for piece in adapter.pieces().values())
    mp.detach(model)
    for settings, words in [({"targets": ()}, r"targets is \(\)"), ({"targets": 3}, "targets is 3"),
                            ({"feed_forward": ("c_proj",)}, "but targets is None"),
                            ({"targets": ("c_attn",), "feed_forward": ("mlp.c_proj",)}, "only modules among the targets")]:
        with pytest.raises(ValueError, match=words):
            mp.attach(model, mp.IA3(**settings))
        assert not hasattr(model, "minipeft")
