"""The anatomy of 21 families, checked against the models themselves: their weights, caches and gradients."""

import dataclasses

import pytest
import torch
from torch import nn

from minipeft.anatomy import anatomy, is_linear, is_transposed, linear_shape, match

from .families import FAMILIES, GROUPED, HEADS, INNER, KV_HEADS, USUAL, WIDTH, inputs

APART, GATED = "q k v o", "gate up down"
EXPECTED = {  # embedding, head, roles in attention, module of the feed-forward and roles in it, key/value heads
    "llama": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "qwen2": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "qwen3": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "mistral": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "gemma": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "gemma2": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "gemma3": ("model.embed_tokens", "lm_head", APART, "mlp", GATED, KV_HEADS),
    "phi": ("model.embed_tokens", "lm_head", APART, "mlp", "up down", KV_HEADS),
    "phi3": ("model.embed_tokens", "lm_head", "qkv o", "mlp", "gate_up down", KV_HEADS),
    "gpt2": ("transformer.wte", "lm_head", "qkv o", "mlp", "up down", HEADS),
    "gpt_neox": ("gpt_neox.embed_in", "lm_head", "qkv o", "mlp", "up down", HEADS),
    "opt": ("model.decoder.embed_tokens", "lm_head", APART, None, "up down", HEADS),
    "bloom": ("transformer.word_embeddings", "lm_head", "qkv o", "mlp", "up down", HEADS),
    "falcon": ("transformer.word_embeddings", "lm_head", "qkv o", "mlp", "up down", 1),
    "falcon_new": ("transformer.word_embeddings", "lm_head", "qkv o", "mlp", "up down", KV_HEADS),
    "falcon_alibi": ("transformer.word_embeddings", "lm_head", "qkv o", "mlp", "up down", HEADS),
    "bert": ("bert.embeddings.word_embeddings", "classifier", APART, None, "up down", HEADS),
    "roberta": ("roberta.embeddings.word_embeddings", "classifier", APART, None, "up down", HEADS),
    "distilbert": ("distilbert.embeddings.word_embeddings", "classifier", APART, "ffn", "up down", HEADS),
    "t5": ("shared", "lm_head", APART, "DenseReluDense", "up down", HEADS),
    "t5_gated": ("shared", "lm_head", APART, "DenseReluDense", GATED, HEADS),
}
WIDE_HEADS = {"qwen3", "gemma", "gemma2", "gemma3"}  # 16 a head, the others 8


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return FAMILIES[family]().double()


# ---------------------------------------------------------------- what is where


def test_every_part_is_found_and_has_its_role(family, model):
    embedding, head, attention_roles, home, feed_forward_roles, kv_heads = EXPECTED[family]
    found = anatomy(model)
    assert (found.embedding, found.head, found.hidden_size) == (embedding, head, WIDTH)
    kind = FAMILIES[family].kind
    deep = 3 if family == "t5_gated" else 2
    assert len(found.encoder) == (0 if kind == "decoder" else 2)
    assert len(found.decoder) == (0 if kind == "encoder" else deep)
    assert found.num_layers == len(found.encoder) + len(found.decoder)
    for block in found.blocks:
        cross = kind == "encoder-decoder" and block.side == "decoder"
        assert [a.kind for a in block.attentions] == (["self", "cross"] if cross else ["self"])
        for attention in block.attentions:
            assert sorted(p.role for p in attention.projections) == sorted(attention_roles.split())
            assert (attention.num_heads, attention.num_kv_heads) == (HEADS, kv_heads)
            assert attention.head_dim == (16 if family in WIDE_HEADS else 8)
        feed_forward = block.feed_forward
        assert (feed_forward.path or "").rpartition(".")[2] == (home or "")
        assert [p.role for p in feed_forward.projections] == feed_forward_roles.split()
        inner = 4 * WIDTH if family == "bloom" else INNER
        assert feed_forward.part("down")[0].in_features == inner == len(feed_forward.part("up")[1])
        assert feed_forward.activation is not None


def test_shapes_are_those_of_the_stored_weights(family, model):
    for block in anatomy(model).blocks:
        for p in block.projections:
            module = model.get_submodule(p.path)
            stored = (p.in_features, p.out_features) if p.transposed else (p.out_features, p.in_features)
            assert tuple(module.weight.shape) == stored
            assert linear_shape(module) == (p.out_features, p.in_features)
            assert p.transposed == is_transposed(module) == (family == "gpt2")
            rows = torch.cat([p.rows(part) for part in p.parts])  # each output row in exactly one part
            assert torch.equal(rows.sort().values, torch.arange(p.out_features))


def test_every_linear_of_a_block_has_a_role_and_each_only_one(model):
    found = anatomy(model)
    paths = [p.path for block in found.blocks for p in block.projections]
    scopes = tuple(block.path + "." for block in found.blocks)
    linears = [path for path, m in model.named_modules() if is_linear(m) and path.startswith(scopes)]
    assert sorted(paths) == sorted(linears)


def test_attention_and_feed_forward_paths_hold_their_projections(model):
    for block in anatomy(model).blocks:
        for part in (*block.attentions, block.feed_forward):
            assert all(p.path.startswith((part.path or block.path) + ".") for p in part.projections)
            assert part.path != block.path


def test_the_meta_device_gives_the_same_anatomy(family, model):
    import transformers

    with torch.device("meta"):
        empty = getattr(transformers, FAMILIES[family].model_class)(FAMILIES[family].config())
        projection, rows = anatomy(empty).blocks[0].attentions[0].part("k")
    assert anatomy(empty) == anatomy(model)
    assert rows.device.type == "cpu" and rows.max() < projection.out_features


# ---------------------------------------------------------------- which rows are q, k, v


def influence(model, family: str, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """How strongly each output row of q, k, v at the **first** position moves what attention gives at the **last**.

    Runs the model with what q, k, v projections give replaced by noise, and differentiates what goes
    into o. Returns {attention path: {projection path: (out_features,)}}.
    """
    noise, context, hooks = {}, {}, []

    def replace(path):
        def hook(module, args, output):
            noise[path] = torch.randn_like(output).requires_grad_()
            return noise[path]

        return hook

    def keep(path):
        return lambda module, args: context.update({path: args[0]})

    attentions = [a for block in anatomy(model).blocks for a in block.attentions]
    for attention in attentions:
        for p in attention.projections:
            module = model.get_submodule(p.path)
            if p.role == "o":
                hooks.append(module.register_forward_pre_hook(keep(attention.path)))
            else:
                hooks.append(module.register_forward_hook(replace(p.path)))
    torch.manual_seed(0)
    given = inputs(family, batch=1, length=length)
    if "decoder_input_ids" in given:
        given["decoder_input_ids"] = given["decoder_input_ids"][:, :length]
    try:
        model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for attention in attentions:
        last = context[attention.path].reshape(length, -1)[-1]  # (H·d,)
        paths = [p.path for p in attention.projections if p.role != "o"]
        grads = torch.autograd.grad((last * torch.randn_like(last)).sum(), [noise[p] for p in paths])
        found[attention.path] = {p: g.reshape(length, -1)[0].abs() for p, g in zip(paths, grads)}
    return found


def test_q_k_and_v_rows_are_those_the_attention_uses(family, model):
    """A position alone attends to itself with weight 1: only its v counts. From another position only k and v
    are read, never q. So gradients tell the three apart, whatever the layout of a fused projection."""
    alone, other = influence(model, family, length=1), influence(model, family, length=2)
    for block in anatomy(model).blocks:
        for attention in block.attentions:
            for part in "qkv":
                projection, rows = attention.part(part)
                heads = attention.num_heads if part == "q" else attention.num_kv_heads
                assert len(rows) == heads * attention.head_dim
                reads_alone = alone[attention.path][projection.path][rows] > 1e-12
                reads_other = other[attention.path][projection.path][rows] > 1e-12
                assert reads_alone.all() if part == "v" else not reads_alone.any()
                assert not reads_other.any() if part == "q" else reads_other.all()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "t5"])
def test_cached_keys_have_the_key_value_heads_of_the_anatomy(family):
    model = FAMILIES[family]()
    cache = model(**inputs(family), use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    for block, layer in zip(anatomy(model).decoder, cache.layers, strict=True):
        attention = block.attentions[0]
        assert layer.keys.shape[1] == attention.num_kv_heads and layer.keys.shape[3] == attention.head_dim


@pytest.mark.parametrize("family", [f for f, e in EXPECTED.items() if "gate" in e[4]])
def test_the_inner_activation_is_linear_in_up_and_not_in_gate(family):
    model = FAMILIES[family]().double()
    feed_forward = anatomy(model).blocks[0].feed_forward
    down = feed_forward.part("down")[0]

    def inner(part: str | None) -> torch.Tensor:
        """What goes into `down` when the rows of `part` are negated."""
        seen = {}
        keep = lambda module, args: seen.update(x=args[0])  # noqa: E731
        hooks = [model.get_submodule(down.path).register_forward_pre_hook(keep)]
        if part:
            projection, rows = feed_forward.part(part)
            sign = torch.ones(projection.out_features, dtype=torch.float64)
            sign[rows] = -1
            hooks.append(model.get_submodule(projection.path).register_forward_hook(lambda m, a, y: y * sign))
        model(**inputs(family))
        for hook in hooks:
            hook.remove()
        return seen["x"]

    plain = inner(None)
    assert torch.equal(inner("up"), -plain)
    assert (inner("gate") + plain).abs().max() > 0.1 * plain.abs().max()


def test_a_fused_width_that_fits_no_layout_is_not_guessed():
    model = FAMILIES["gpt_neox"]()
    model.gpt_neox.layers[0].attention.query_key_value = nn.Linear(WIDTH, 3 * WIDTH + 8)
    attention = anatomy(model).blocks[0].attentions[0]
    with pytest.raises(KeyError, match="fits no layout"):
        attention.part("k")


# ---------------------------------------------------------------- beyond the list


def test_cross_attention_of_a_gpt2_that_reads_an_encoder():
    from transformers import GPT2LMHeadModel

    config = FAMILIES["gpt2"].config()
    config.add_cross_attention = True
    own, cross = anatomy(GPT2LMHeadModel(config)).blocks[1].attentions
    assert (own.kind, [p.role for p in own.projections]) == ("self", ["qkv", "o"])
    assert (cross.kind, sorted(p.role for p in cross.projections)) == ("cross", ["kv", "o", "q"])
    assert torch.equal(cross.part("v")[1], torch.arange(WIDTH, 2 * WIDTH))


def test_bert_made_a_decoder_is_one():
    from transformers import BertConfig, BertLMHeadModel

    found = anatomy(BertLMHeadModel(BertConfig(**USUAL, is_decoder=True, add_cross_attention=True)))
    assert found.head == "cls.predictions.decoder"
    assert not found.encoder
    assert [a.path.rpartition(".")[2] for a in found.blocks[0].attentions] == ["attention", "crossattention"]


@pytest.mark.parametrize(
    "name, config, head, side",
    [
        ("LlamaModel", GROUPED, None, "decoder"),
        ("LlamaForSequenceClassification", GROUPED, "score", "decoder"),
        ("BertModel", USUAL, None, "encoder"),
        ("BertForMaskedLM", USUAL, "cls.predictions.decoder", "encoder"),
        ("BloomModel", {"vocab_size": 100, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS}, None, "decoder"),
        ("ModernBertForMaskedLM", dict(USUAL, cls_token_id=1, sep_token_id=2), "decoder", "encoder"),
    ],
)
def test_other_heads_and_bare_models(name, config, head, side):
    import transformers

    model_class = getattr(transformers, name)
    found = anatomy(model_class(model_class.config_class(**config)))
    assert found.head == head
    assert [block.side for block in found.blocks] == [side, side]


def test_a_model_without_attention_is_refused_by_name():
    from transformers import MambaConfig, MambaModel

    with pytest.raises(ValueError, match="MambaModel has no attention"):
        anatomy(MambaModel(MambaConfig(vocab_size=100, hidden_size=WIDTH, num_hidden_layers=1)))


def test_what_is_plugged_in_is_not_part_of_the_base():
    model = FAMILIES["llama"]()
    before = anatomy(model), match(model, "all-linear"), match(model, ["q_proj"]), match(model, ".*q_proj")
    piece = nn.Module()
    piece.q_proj = nn.Linear(4, 4)
    model.minipeft = nn.ModuleDict({"default": nn.ModuleList([piece, nn.Linear(4, 4)])})
    assert (anatomy(model), match(model, "all-linear"), match(model, ["q_proj"]), match(model, ".*q_proj")) == before


class Packed(nn.Module):
    """As a 4-bit linear: no nn.Linear, and a weight that does not show its shape."""

    in_features, out_features = WIDTH, INNER

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(WIDTH * INNER // 2, 1, dtype=torch.uint8))


def test_linear_modules_are_known_by_their_sizes():
    from transformers.pytorch_utils import Conv1D

    assert linear_shape(nn.Linear(3, 5)) == linear_shape(Conv1D(5, 3)) == (5, 3)
    assert (is_transposed(nn.Linear(3, 5)), is_transposed(Conv1D(5, 3))) == (False, True)
    assert linear_shape(Packed()) == (INNER, WIDTH)
    assert not any(is_linear(m) for m in (nn.Embedding(3, 5), nn.LayerNorm(3), nn.Conv1d(3, 5, 1), nn.Dropout()))
    with pytest.raises(TypeError, match="Embedding is not linear"):
        linear_shape(nn.Embedding(3, 5))


def test_packed_and_bitsandbytes_linears_keep_their_place():
    bnb = pytest.importorskip("bitsandbytes")
    model = FAMILIES["llama"]()
    before = anatomy(model)
    model.model.layers[0].mlp.up_proj = Packed()
    model.model.layers[1].mlp.up_proj = bnb.nn.Linear4bit(WIDTH, INNER, bias=False)
    assert anatomy(model) == before


# ---------------------------------------------------------------- targets


def test_a_suffix_matches_whole_names_between_dots():
    model = FAMILIES["opt"]()
    every = [f"model.decoder.layers.{i}.self_attn.out_proj" for i in range(2)]
    assert match(model, ["out_proj"]) == match(model, ("self_attn.out_proj",)) == match(model, "out_proj") == every
    assert match(model, every[1]) == every[1:]
    assert match(model, ["lm_head"]) == ["lm_head"]
    for part_of_a_name in ("proj", "attn.out_proj", "_proj"):
        with pytest.raises(ValueError, match="no module of this model ends in"):
            match(model, [part_of_a_name])


def test_matches_come_in_the_order_of_the_model_and_once():
    model = FAMILIES["llama"]()
    names = [path.rpartition(".")[2] for path in match(model, ("down_proj", "q_proj", "self_attn.q_proj"))]
    assert names == ["q_proj", "down_proj"] * 2


def test_attention_means_every_projection_of_every_attention(family, model):
    per_attention = len(EXPECTED[family][2].split())
    attentions = sum(len(block.attentions) for block in anatomy(model).blocks)
    found = match(model, "attention")
    assert len(found) == per_attention * attentions
    assert match(model, ["attention", found[0]]) == found


def test_all_linear_means_what_it_means_in_peft(family):
    from peft import LoraConfig, LoraModel

    model = FAMILIES[family]()
    task = {"encoder": "SEQ_CLS", "decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}[FAMILIES[family].kind]
    ours = match(model, "all-linear")
    theirs = LoraModel(model, LoraConfig(task_type=task, target_modules="all-linear"), "default").targeted_module_names
    # of a classifier made of several modules peft leaves out none; we leave the whole head out
    theirs = [path for path in theirs if not path.startswith("classifier.")]
    assert sorted(ours) == sorted(theirs)


def test_a_regular_expression_must_match_the_whole_path():
    model = FAMILIES["llama"]()
    assert match(model, r".*layers\.1\..*(q|v)_proj") == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]
    assert match(model, r".*self_attn.*") == match(model, "attention")  # modules that are not linear are passed over
    with pytest.raises(ValueError, match="matches the whole"):
        match(model, r"(q|v)_proj")


@pytest.mark.parametrize(
    "targets, says",
    [
        (["query_proj"], r"ends in 'query_proj'; did you mean 'q_proj'\? \(modules: q_proj, k_proj, v_proj, o_proj,"),
        (["self_attn.qproj"], r"did you mean 'self_attn.q_proj'\?"),
        (["q_proj", "nothing_like_it"], r"ends in 'nothing_like_it' \(modules: q_proj"),
        ("all_linear", r"did you mean 'all-linear'\?"),
        ("al-linear", r"did you mean 'all-linear'\?"),
        (["self_attn"], r"'self_attn' means model.layers.0.self_attn, a LlamaAttention; accepted are nn.Linear, Conv1D"),
        (["embed_tokens"], r"model.embed_tokens, a Embedding"),
        (r".*self_attn", r"model.layers.0.self_attn, a LlamaAttention"),
        (r"*q_proj", r"'\*q_proj' is no regular expression: nothing to repeat"),
        ([], r"targets is \[\]; accepted are module-name suffixes"),
        ("", r"targets is ''; accepted are"),
        (None, r"targets is None; accepted are"),
        (["q_proj", 3], r"targets holds 3; accepted are"),
    ],
)
def test_targets_that_mean_nothing_are_refused_with_what_is_accepted(targets, says):
    with pytest.raises(ValueError, match=says):
        match(FAMILIES["llama"](), targets)


def test_targets_work_on_any_module_not_only_on_transformers():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert match(model, "all-linear") == ["0", "2"] and match(model, ["2"]) == ["2"]


# ---------------------------------------------------------------- the tiny models themselves


def test_tiny_models_are_the_same_at_every_call_and_have_no_dropout(family, model):
    given = inputs(family)
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(FAMILIES[family]().double().train()(**given).logits, expected)
    assert expected.dtype == torch.float64 and expected.isfinite().all()


def test_an_anatomy_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        anatomy(FAMILIES["llama"]()).head = None
