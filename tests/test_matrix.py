"""One matrix: model families × the methods that PEFT has too. A pair computes the same here and there, or is in `NOT`.

The models are made from their configs: tiny, random, float64. An adapter at a random state is saved here and opened
in PEFT, saved there and opened here: three times the same logits, and the same gradients (of (IA)³: in test_ia3.py). On an
encoder-decoder PEFT cannot compute our prefixes, so that a prefix starts there. A pair in `NOT` must end with the error
that stands beside it, so that an entry that has become wrong fails.
"""

import copy
import functools
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file

import minipeft as mp
from minipeft.anatomy import anatomy

from .families import FAMILIES, HEADS, INNER, LABELS, LAYERS, VOCAB, WIDTH, Family, inputs
from .test_adapters import loss_of
from .test_anatomy import influence
from .test_lora import random_state

peft = pytest.importorskip("peft")

MORE = {  # beside those of families.py; the names are transformers' model types, with a variant behind a colon
    "decoder": ("olmo2", "granite", "starcoder2", "cohere", "stablelm", "glm", "nemotron", "persimmon", "smollm3",
                "helium", "gptj", "codegen", "gpt_bigcode", "gpt_bigcode:heads", "gpt_neo", "mpt", "xglm", "biogpt",
                "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "recurrent_gemma", "mamba", "rwkv"),
    "encoder": ("electra", "albert", "deberta", "deberta-v2", "modernbert", "mpnet", "camembert", "xlm-roberta"),
    "encoder-decoder": ("bart", "mbart", "pegasus", "m2m_100", "marian", "longt5"),
}  # fmt: skip
KIND = {family: kind for kind, families in MORE.items() for family in families} | {f: FAMILIES[f].kind for f in FAMILIES}
TASKS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}
METHODS = {
    "LoRA": mp.LoRA(rank=3, alpha=7, targets="all-linear"),
    "DoRA": mp.DoRA(rank=3, alpha=7, targets="all-linear"),
    "(IA)³": mp.IA3(),
    "prompt": mp.PromptTuning(3),
    "P-tuning": mp.PTuning(3, hidden=5),
    "prefix": mp.PrefixTuning(3, hidden=5),
}

# The sizes of families.py, under every name that a config may have for them.
SIZES = {name: size for size, names in [
    (WIDTH, "hidden_size d_model n_embd embedding_size lru_width"),
    (INNER, "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff moe_intermediate_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (64, "max_position_embeddings n_positions max_seq_len context_length"),
    (8, "head_dim d_kv v_head_dim qk_nope_head_dim"),
    (4, "num_experts num_local_experts rotary_dim state_size time_step_rank qk_rope_head_dim"),
    (16, "q_lora_rank kv_lora_rank"),
    (2, "num_key_value_heads num_experts_per_tok type_vocab_size eos_token_id decoder_start_token_id forced_eos_token_id"),
    (1, "bos_token_id n_group topk_group first_k_dense_replace"),
    (0, "pad_token_id num_nextn_predict_layers"),
    (0.0, "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_pdrop embd_pdrop "
          "attn_pdrop dropout activation_dropout dropout_rate classifier_dropout classifier_dropout_prob "
          "summary_last_dropout encoder_layerdrop decoder_layerdrop layerdrop"),
    (VOCAB, "vocab_size"), (LABELS, "num_labels"), ([[["global", "local"], 1]], "attention_types"),
] for name in names.split()}  # fmt: skip
SPECIAL = {
    "gpt_bigcode": dict(num_key_value_heads=1),
    "gpt_bigcode:heads": dict(num_key_value_heads=HEADS, multi_query=False),  # q, k, v of a head side by side
    "recurrent_gemma": dict(num_hidden_layers=3),            # recurrent, recurrent, attention
    "deepseek_v3": dict(num_key_value_heads=HEADS, head_dim=4),
    "mpnet": dict(pad_token_id=1, bos_token_id=0),           # its code says so, whatever its config says
    "rwkv": dict(use_cache=False),                           # it writes its state in place: no way back through it
}
SINGLE = ("xglm", "codegen", "gptj")                         # they compute attention in float32 whatever they are given

INTERFACE = "^refused: .* does not look its attention function up .* so it has no key/value socket$"
ATTENTION = "^refused: .* has no attention that can be recognised"
POSITIONS = "^refused: .* counts positions by itself, so the text cannot be moved behind a prefix$"
WINDOW = "^the logits differ"                                # PEFT's prefix slides out of the window: test_parity.py
NOT: dict[tuple[str, str], str] = {
    **{(family, "prefix"): INTERFACE for family in  # attention of their own
       ("gptj", "codegen", "gpt_neo", "mpt", "xglm", "deberta-v2", "mpnet", "bloom", "falcon", "falcon_new",
        "falcon_alibi")},
    **{(family, method): ATTENTION for family in ("mamba", "rwkv", "deberta") for method in ("(IA)³", "prefix")},
    **{(family, "prefix"): POSITIONS for family in ("bart", "mbart", "pegasus", "m2m_100", "marian")},
    **{("mamba", method): "^PEFT: .* is incompatible with Mamba-based models" for method in ("LoRA", "DoRA")},
    ("deepseek_v3", "(IA)³"): "^refused: .*kv_a_proj_with_mqa has no part 'k'",
    ("deepseek_v3", "prefix"): "^refused: .*; how wide a prefix must be is not known there$",
    ("recurrent_gemma", "prefix"): "^PEFT: IndexError",       # its cache has no place for layers without attention
    ("deepseek_v3", "LoRA"): "^refused: .* target_parameters is",   # PEFT takes its mlp.down_proj for the experts' too
    ("deepseek_v3", "DoRA"): "^PEFT: ValueError: lora.ParamWrapper does not work with use_dora=True",
    **{(family, "prefix"): "^PEFT: .*Model does not support past key values" for family in
       ("albert", "modernbert", "distilbert")},
    **{(family, "prefix"): WINDOW for family in ("mistral", "gemma2", "gemma3")},
    ("t5_gated", "prefix"): "^PEFT: IndexError",              # where the decoder has more layers than the encoder
}

PAIRS = [(family, method) for family in KIND for method in METHODS
         if family not in FAMILIES or method in ("prompt", "P-tuning", "prefix")]  # else: test_parity, _dora, _ia3


def generated(family: str) -> Family:
    """A row as those of families.py, its config made of `SIZES`."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as auto

    classes = {"decoder": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
               "encoder": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
               "encoder-decoder": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}[KIND[family]]
    name = family.partition(":")[0]
    usual = CONFIG_MAPPING[name]()
    sizes = {field: size for field, size in SIZES.items() if hasattr(usual, field)} | SPECIAL.get(family, {})
    return Family(KIND[family], classes[name], type(usual).__name__,
                  sizes | {"experts_implementation": "eager"})  # the others know no float64


@functools.lru_cache(1)                                      # the pairs come family by family
def _base(family: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The bare model and its logits."""
    model = (FAMILIES.get(family) or generated(family))().to(torch.float32 if family in SINGLE else torch.float64)
    return model, logits_of(copy.deepcopy(model), family).detach()


def model_of(family: str) -> torch.nn.Module:
    return copy.deepcopy(_base(family)[0])


def logits_of(model, family: str) -> torch.Tensor:
    """Of two texts, one of them padded; 0 at the padding, where families compute what they like."""
    like = {"decoder": "llama", "encoder": "bert", "encoder-decoder": "t5"}[KIND[family]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = model(**inputs(like)).logits
    if KIND[family] == "decoder":
        mask = inputs(like)["attention_mask"]
        logits = logits * torch.nn.functional.pad(mask, (logits.shape[1] - mask.shape[1], 0), value=1)[..., None]
    return logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item() if a.shape == b.shape else float("inf")


class PeftFails(Exception):
    """What PEFT raised, with its class's name in front."""


def in_peft(family: str, folder=None):
    """PEFT's model with what is in a folder, put in again in our precision, or with a new random prefix."""
    dtype = _base(family)[0].dtype
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if folder is None:
                theirs = peft.get_peft_model(model_of(family), peft.PrefixTuningConfig(
                    task_type=TASKS[KIND[family]], num_virtual_tokens=3)).to(dtype).eval()
                random_state(theirs.prompt_encoder)
            else:
                theirs = peft.PeftModel.from_pretrained(model_of(family), folder).to(dtype).eval()
                peft.set_peft_model_state_dict(theirs, load_file(folder / "adapter_model.safetensors"))
        for name, p in theirs.named_parameters():
            p.requires_grad_(re.search("lora_|ia3_|prompt_encoder|modules_to_save", name) is not None)
        return theirs, logits_of(theirs, family)
    except Exception as error:  # whatever it may be
        raise PeftFails(f"{type(error).__name__}: {error}") from None


def gradients(logits, module, save, folder) -> dict[str, torch.Tensor]:
    """The gradients under the keys of a file: they are put where the weights were, and saved."""
    loss_of(logits).backward()
    for p in module.parameters():
        if p.requires_grad:
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
    save(folder)
    return load_file(folder / "adapter_model.safetensors")


def outcome(family: str, method: str, folder) -> str:
    """"equal", or who raised what, or what differs."""
    limit = 1e-4 if family in SINGLE else 1e-9
    from_peft = method == "prefix" and KIND[family] == "encoder-decoder"
    base, ours = _base(family)[1], None
    try:
        if not from_peft:
            model = model_of(family)
            random_state(mp.attach(model, METHODS[method]))
            ours = logits_of(model, family).detach()
            mp.save_adapter(model, folder / "ours")
        theirs, expected = in_peft(family, None if from_peft else folder / "ours")
        theirs.save_pretrained(folder / "theirs")
        again = model_of(family)
        adapter = mp.load_adapter(again, folder / "theirs")
    except PeftFails as error:
        return f"PEFT: {error}"
    except (ValueError, TypeError, KeyError) as error:
        return f"refused: {error}"
    loaded = logits_of(again, family)
    if not distance(expected[:, -base.shape[1]:], base) > 1e-3:
        return "it has no effect"
    for logits in (loaded, ours)[:1 if from_peft else 2]:
        if not distance(logits, expected) < limit:
            return f"the logits differ by {distance(logits, expected):.0e}"
    if from_peft or method == "(IA)³":                       # of a fused q, k, v, PEFT trains what scales q too
        return "equal"
    found = gradients(loaded, adapter, lambda there: mp.save_adapter(again, there), folder / "gradients")
    wanted = gradients(expected, theirs, theirs.save_pretrained, folder / "their gradients")
    if found.keys() != wanted.keys():
        return f"other tensors are trained: {sorted(found.keys() ^ wanted.keys())}"
    largest = max(t.abs().max() for t in wanted.values())
    worst = max((found[key] - wanted[key]).abs().max() / largest for key in wanted)
    return "equal" if worst < limit else f"the gradients differ by {worst:.0e}"


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_it_computes_what_peft_computes_or_is_named_with_the_reason(family, method, tmp_path):
    found = outcome(family, method, tmp_path)
    assert re.search(NOT.get((family, method), "^equal$"), found), found


@pytest.mark.parametrize("family", ["codegen", "gpt_bigcode", "gpt_bigcode:heads", "mpt", "persimmon", "modernbert"])
def test_the_rows_of_one_matrix_for_q_k_v_are_those_the_attention_uses(family):
    """As in test_anatomy.py: alone, a position reads v only; from another position, k and v are read."""
    model, like = model_of(family).double(), "bert" if KIND[family] == "encoder" else "llama"
    alone, other = influence(model, like, length=1), influence(model, like, length=2)
    for attention in (a for block in anatomy(model).blocks for a in block.attentions):
        fused, _ = attention.part("q")
        read_alone, read = (found[attention.path][fused.path] > 1e-12 for found in (alone, other))
        for part, expected in {"q": (False, False), "k": (False, True), "v": (True, True)}.items():
            rows = attention.part(part)[1]
            assert (read_alone[rows].unique().tolist(), read[rows].unique().tolist()) == tuple([e] for e in expected)
