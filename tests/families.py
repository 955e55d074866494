"""Tiny random models of every family that minipeft is tested on, built from their configs.

    model = FAMILIES["gpt2"]()                 # eval mode, float32, the same weights at every call
    out = model(**inputs("gpt2"))              # inputs for it; no dropout anywhere
    FAMILIES["gpt2"].kind                      # "decoder", "encoder" or "encoder-decoder"

Sizes: 2 layers, width 32, 4 heads of 8 (2 key/value heads where the family can), feed-forward 48,
100 tokens. Encoders carry a classification head with 3 labels, the others a language-model head.
All weights are redrawn, biases and norms too, large enough for attention to be far from uniform.
"""

import os
from dataclasses import dataclass

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCAB, WIDTH, INNER, HEADS, KV_HEADS, LAYERS, LABELS = 100, 32, 48, 4, 2, 2, 3

USUAL = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = dict(USUAL, num_key_value_heads=KV_HEADS)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
FALCON = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, ffn_hidden_size=INNER, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA = dict(
    head_dim=16, query_pre_attn_scalar=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
)  # fmt: skip
T5 = dict(
    vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=INNER, num_layers=LAYERS, num_heads=HEADS,
    dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`: call it for a model."""

    kind: str  # "decoder", "encoder", "encoder-decoder"
    model_class: str  # names in transformers
    config_class: str
    settings: dict

    def config(self):
        import transformers

        return getattr(transformers, self.config_class)(**self.settings)

    def __call__(self, seed: int = 0):
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model_class)(self.config())
            model.eval()
            with torch.no_grad():
                norms = {id(m.weight) for m in model.modules() if "norm" in type(m).__name__.lower()}
                for p in model.parameters():  # tied ones come once
                    p.normal_(mean=1.0 if id(p) in norms else 0.0, std=0.25 if p.dim() > 1 else 0.1)
        return model


def _decoder(name: str, settings: dict, **more) -> Family:
    return Family("decoder", f"{name}ForCausalLM", f"{name}Config", dict(settings, **more))


FAMILIES: dict[str, Family] = {
    "llama": _decoder("Llama", GROUPED),
    "qwen2": _decoder("Qwen2", GROUPED),
    "qwen3": _decoder("Qwen3", GROUPED, head_dim=16),  # heads wider than hidden_size / num_heads
    "mistral": _decoder("Mistral", GROUPED, sliding_window=4),
    "gemma": _decoder("Gemma", GROUPED, head_dim=16),
    "gemma2": _decoder("Gemma2", GROUPED, **GEMMA),
    "gemma3": Family("decoder", "Gemma3ForCausalLM", "Gemma3TextConfig", dict(GROUPED, **GEMMA)),
    "phi": _decoder("Phi", GROUPED),
    "phi3": _decoder("Phi3", GROUPED),
    "gpt2": Family(
        "decoder", "GPT2LMHeadModel", "GPT2Config",
        dict(vocab_size=VOCAB, n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=HEADS, n_positions=64,
             resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    "gpt_neox": _decoder("GPTNeoX", USUAL),
    "opt": Family(
        "decoder", "OPTForCausalLM", "OPTConfig",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
             max_position_embeddings=64, word_embed_proj_dim=WIDTH, dropout=0.0,
             pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
    "bloom": _decoder(
        "Bloom",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS, pad_token_id=0),
    ),
    "falcon": _decoder("Falcon", FALCON, multi_query=True),  # as Falcon-7B: one key/value head
    "falcon_new": _decoder(  # as Falcon-40B: groups of query heads
        "Falcon", FALCON, new_decoder_architecture=True, num_kv_heads=KV_HEADS
    ),
    "falcon_alibi": _decoder(  # as Falcon-RW
        "Falcon", FALCON, multi_query=False, alibi=True, parallel_attn=False, bias=True
    ),
    "bert": Family(
        "encoder", "BertForSequenceClassification", "BertConfig", dict(USUAL, **NO_DROPOUT, num_labels=LABELS)
    ),
    "roberta": Family(
        "encoder", "RobertaForSequenceClassification", "RobertaConfig", dict(USUAL, **NO_DROPOUT, num_labels=LABELS)
    ),
    "distilbert": Family(
        "encoder", "DistilBertForSequenceClassification", "DistilBertConfig",
        dict(vocab_size=VOCAB, dim=WIDTH, hidden_dim=INNER, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=64,
             dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=LABELS, pad_token_id=0),
    ),
    "t5": Family("encoder-decoder", "T5ForConditionalGeneration", "T5Config", T5),
    "t5_gated": Family(
        "encoder-decoder", "T5ForConditionalGeneration", "T5Config",
        dict(T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, num_decoder_layers=3),
    ),
}  # fmt: skip


def inputs(family: str, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for `FAMILIES[family]()`: `input_ids` and `attention_mask` (batch, length), the last row padded
    on the right by 2 if there are at least two rows; an encoder-decoder gets `decoder_input_ids` (batch, 5) too."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=draw)
    mask = torch.ones_like(ids)
    if batch > 1 and length > 3:
        mask[-1, -2:] = 0
        ids[-1, -2:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[family].kind == "encoder-decoder":
        found["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 5), generator=draw)
    return found
