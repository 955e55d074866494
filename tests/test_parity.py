"""The oracle of LoRA is Hugging Face PEFT: the same numbers, forwards and backwards, in float64.

The adapter is at a random state, far from the initial one (B = 0 makes a broken LoRA look right). The weights
are carried over by checkpoint. Largest difference, relative to the largest value: below 1e-9, usually 1e-15.
"""

import warnings

import pytest
import torch
from safetensors.torch import load_file

import minipeft as mp
from minipeft.methods.lora import LowRank

from .families import FAMILIES, inputs

peft = pytest.importorskip("peft")


def random_state(adapter: torch.nn.Module, seed: int = 1) -> None:
    draw = torch.Generator().manual_seed(seed)
    for p in adapter.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.3)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(5)
    return (logits * torch.randn(logits.shape, generator=draw, dtype=logits.dtype)).sum()


@pytest.mark.parametrize(("targets", "rslora"), [("all-linear", False), ("attention", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_computes_what_peft_computes(family, targets, rslora, tmp_path):
    model, x = FAMILIES[family]().double(), inputs(family)
    base_logits = model(**x).logits
    adapter = mp.attach(model, mp.LoRA(rank=3, alpha=7, targets=targets, rslora=rslora))
    random_state(adapter)
    mp.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path, is_trainable=True).eval()

    logits, expected = model(**x).logits, theirs(**x).logits
    assert distance(logits, expected) < 1e-9
    assert distance(base_logits, expected) > 1e-2  # the adapter does something

    loss_of(logits).backward()
    loss_of(expected).backward()
    gradients = {}
    for path, piece in adapter.pieces().items():
        for name, p in piece.named_parameters():
            key = {"A": ".lora_A.default.weight", "B": ".lora_B.default.weight"}.get(
                name, name.replace("copy.", ".modules_to_save.default."))
            gradients["base_model.model." + path + key] = p.grad
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert distance(gradients[name], gradient) < 1e-9, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox", "roberta", "t5"])
def test_merging_gives_the_weights_that_peft_merges_to(family, tmp_path):
    model = FAMILIES[family]().double()
    random_state(mp.attach(model, mp.LoRA(rank=3, alpha=7, targets="all-linear")))
    mp.save_adapter(model, tmp_path)
    mp.merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path).merge_and_unload()
    wanted, untouched = theirs.state_dict(), FAMILIES[family]().double().state_dict()
    assert model.state_dict().keys() == wanted.keys()
    changed = 0
    for name, weight in model.state_dict().items():
        if "classifier" in name:  # PEFT writes the adapter's own head over the base's; ours stays in the adapter
            continue
        assert distance(weight, wanted[name]) < 1e-12, name
        changed += not torch.equal(weight, untouched[name])
    assert changed == sum(isinstance(piece, LowRank) for piece in mp.adapters(model)["default"]
                          .pieces().values())


# ---------------------------------------------------------------- soft prompts and prefixes

TASKS = {"decoder": "CAUSAL_LM", "encoder": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM"}
PREFIXED = ["llama", "qwen2", "qwen3", "gemma", "gpt2", "opt", "bert", "roberta", "phi3", "gpt_neox"]
PROMPTED = [*PREFIXED, "gemma2", "gemma3", "mistral", "bloom", "falcon", "falcon_alibi", "t5"]


def theirs_from(family, tmp_path):
    """PEFT opens the folder; then its own loader puts the tensors in again, in float64, and they can be trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family]().double(), tmp_path).double().eval()
    peft.set_peft_model_state_dict(theirs, load_file(tmp_path / "adapter_model.safetensors"))
    theirs.prompt_encoder.requires_grad_(True)
    return theirs


def twenty(model, family):
    """20 greedy tokens after two rows without padding: PEFT places padded rows elsewhere, see below."""
    model.generation_config.eos_token_id = None
    ids = inputs(family, batch=2)["input_ids"][:, :4]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    return out[:, -20:]


@pytest.mark.parametrize(("family", "method"), [
    *((f, mp.PromptTuning(3)) for f in PROMPTED), *((f, mp.PrefixTuning(3, reparameterize=False)) for f in PREFIXED)])
def test_prompts_and_prefixes_compute_what_peft_computes(family, method, tmp_path):
    model, x = FAMILIES[family]().double(), inputs(family)
    with torch.no_grad():
        base = model(**x).logits
    adapter = mp.attach(model, method)
    random_state(adapter)
    mp.save_adapter(model, tmp_path)
    theirs = theirs_from(family, tmp_path)

    logits, expected = model(**x).logits, theirs(**x).logits
    assert distance(logits, expected) < 1e-9
    assert distance(expected[:, -base.shape[1]:], base) > 1e-2

    loss_of(logits).backward()
    loss_of(expected).backward()
    table = next(p.grad for n, p in theirs.named_parameters() if "prompt_encoder" in n)
    pieces = [piece for piece in adapter.pieces().values() if not isinstance(piece, mp.sockets.OwnHead)]
    if isinstance(method, mp.PromptTuning):
        mine = pieces[0].P.grad
    else:
        mine = torch.cat([p.grad.permute(1, 0, 2).flatten(1) for piece in pieces for p in (piece.K, piece.V)], dim=1)
    assert distance(mine, table) < 1e-9
    if FAMILIES[family].kind != "encoder":
        assert torch.equal(twenty(model, family), twenty(theirs, family))


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_p_tuning_computes_what_peft_computes(family, encoder, tmp_path):
    model, x = FAMILIES[family]().double(), inputs(family)
    adapter = mp.attach(model, mp.PTuning(3, encoder=encoder, hidden=5))
    random_state(adapter)
    theirs = peft.get_peft_model(FAMILIES[family]().double(), peft.PromptEncoderConfig(
        task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3, encoder_hidden_size=5,
        encoder_reparameterization_type=encoder.upper())).double().eval()
    piece, their = next(iter(adapter.pieces().values())), theirs.prompt_encoder["default"]
    names = {name: name.replace("mlp.", "mlp_head.").replace("lstm.", "lstm_head.").replace("E", "embedding.weight")
             if name != "E" else "embedding.weight" for name, _ in piece.named_parameters()}
    for name, p in piece.named_parameters():
        their.get_parameter(names[name]).data.copy_(p)
    for name, p in adapter.named_parameters():
        if ".copy." in name:
            theirs.get_parameter("base_model." + name.replace("copy.", "modules_to_save.default.")).data.copy_(p)
    logits, expected = model(**x).logits, theirs(**x).logits
    assert distance(logits, expected) < 1e-9
    loss_of(logits).backward()
    loss_of(expected).backward()
    for name, p in piece.named_parameters():
        assert distance(p.grad, their.get_parameter(names[name]).grad) < 1e-9, name

    mp.save_adapter(model, tmp_path / "ours")
    with torch.no_grad():
        assert distance(theirs_from(family, tmp_path / "ours")(**x).logits, logits) < 1e-9
        theirs.save_pretrained(tmp_path / "theirs")
        again = FAMILIES[family]().double()
        assert mp.load_adapter(again, tmp_path / "theirs").method == mp.PromptTuning(3)
        assert distance(again(**x).logits, expected) < 1e-9


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_prefixes_of_peft_open_here_and_reparameterised_ones_of_ours_open_there(family, projected, tmp_path):
    theirs = peft.get_peft_model(FAMILIES[family]().double(), peft.PrefixTuningConfig(
        task_type=TASKS[FAMILIES[family].kind], num_virtual_tokens=3, prefix_projection=projected,
        encoder_hidden_size=7)).double().eval()
    random_state(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path / "theirs")
    model, x = FAMILIES[family]().double(), inputs(family)
    with torch.no_grad():
        mp.load_adapter(model, tmp_path / "theirs")
        assert distance(model(**x).logits, theirs(**x).logits) < 1e-9
        if projected:
            model = FAMILIES[family]().double()
            random_state(mp.attach(model, mp.PrefixTuning(3, hidden=7)))
            mp.save_adapter(model, tmp_path / "ours")
            assert distance(theirs_from(family, tmp_path / "ours")(**x).logits, model(**x).logits) < 1e-9


def test_a_prompt_of_peft_for_an_encoder_decoder_opens_here(tmp_path):
    theirs = peft.get_peft_model(FAMILIES["t5"]().double(), peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).double().eval()  # 6 vectors, of which 3 are used
    random_state(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path)
    model, x = FAMILIES["t5"]().double(), inputs("t5")
    with torch.no_grad():
        assert mp.load_adapter(model, tmp_path).method == mp.PromptTuning(3)
        assert distance(model(**x).logits, theirs(**x).logits) < 1e-9


def test_on_an_encoder_decoder_peft_gives_layer_i_the_prefix_of_layer_2i(tmp_path):
    """It doubles the list of keys and values, for two submodules, and cuts it into fours, one a layer, of which the
    first two are used. What it saved computes the same here; what differs from layer to layer, it cannot compute."""
    theirs = peft.get_peft_model(FAMILIES["t5"]().double(), peft.PrefixTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)).double().eval()
    random_state(theirs.prompt_encoder)
    theirs.save_pretrained(tmp_path)
    model, x = FAMILIES["t5"]().double(), inputs("t5")
    adapter = mp.load_adapter(model, tmp_path)
    first, second = adapter.pieces().values()
    assert torch.equal(first.K, second.K) and torch.equal(first.V, second.V)
    with torch.no_grad():
        assert distance(model(**x).logits, theirs(**x).logits) < 1e-9
    assert torch.equal(twenty(model, "t5"), twenty(theirs, "t5"))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_in_a_sliding_window_peft_loses_the_prefix_and_ours_stays_in_sight(family, tmp_path):
    """In PEFT's cache the prefix is a piece of text, and the window (4 tokens here) slides past it."""
    model = FAMILIES[family]().double()
    random_state(mp.attach(model, mp.PrefixTuning(3, reparameterize=False)))
    mp.save_adapter(model, tmp_path)
    theirs, ids = theirs_from(family, tmp_path), inputs(family)["input_ids"][:1]
    with torch.no_grad():
        mine, expected = model(input_ids=ids).logits, theirs(input_ids=ids).logits
        assert distance(mine[:, :1], expected[:, :1]) < 1e-9     # 3 + 1 tokens are within the window
        assert distance(mine[:, 3:], expected[:, 3:]) > 1e-2
