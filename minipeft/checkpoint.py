"""Adapters on disk, in Hugging Face PEFT's format: PEFT opens ours, and its own open here.

A checkpoint is a folder with two files:

    adapter_config.json          the settings, under PEFT's names
    adapter_model.safetensors    the trained tensors, by keys made of the modules' paths:

        LoRA        base_model.model.<path>.lora_A.weight (r, in) and .lora_B.weight (out, r)
        DoRA        the same, and base_model.model.<path>.lora_magnitude_vector (out,)
        (IA)³       base_model.model.<path>.ia3_l (out, 1); (1, in) where the input is rescaled
        own head    base_model.model.<path>.weight and .bias, among PEFT's `modules_to_save`
        prompts     prompt_embeddings (length, d); of a prefix (length, 2 layers × key/value heads × head width),
                    layer after layer, keys before values. Own heads are base_model.<path>.… here

P-tuning and the reparameterised prefix are written folded, as PEFT does. The network that made them stays beside
them in a third file, adapter_encoder.safetensors, so that training can go on; PEFT does not look at it.

PEFT has no bottleneck adapters and no BitFit. They are stored in the same two files, with a `peft_type` of our
own ("MINIPEFT_BOTTLENECK", "MINIPEFT_BITFIT"), the method's settings as fields and the pieces' own names as keys:
base_model.model.<path>.down.weight (m, d) and so on.

Adapters that act together are a folder of such folders: hybrids.py. A further method is one more entry of FORMATS.
Pickles are never read: unpickling runs code. Reading checks everything first and touches the model last, so an error
leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import anatomy, sockets
from .methods.adapters import BottleneckAdapter
from .methods.bitfit import BitFit
from .methods.dora import DoRA
from .methods.ia3 import IA3, RescaleInput
from .methods.lora import LoRA, LowRank
from .methods.p_tuning import PTuning
from .methods.prefix_tuning import PrefixTuning
from .methods.prompt_tuning import PromptTuning
from .sockets import Adapter, OwnHead

CONFIG, TENSORS, ENCODER = "adapter_config.json", "adapter_model.safetensors", "adapter_encoder.safetensors"
NEXT_ENCODER = "adapter_encoder.next.safetensors"  # there while a save is under way, or was cut off
EMBEDDINGS = "prompt_embeddings"
PREFIX = "base_model.model."  # PEFT wraps a model twice, and its keys say so


@dataclass(frozen=True)
class Format:
    """How PEFT writes one method down.

    fixed      fields that always have this value
    reads      names of the other fields that mean something to `settings`
    fields     (method, model, its pieces by path) -> the fields beside the fixed ones
    settings   (fields, model, paths that are trained whole, shapes of the tensors) -> the method's settings. It
               must refuse sizes that the tensors do not have: the pieces are built next
    tensors    (module's path, piece) -> key in the file and what stands there. Loading writes into these
               tensors, so they are the piece's parameters or views of them
    pack       for prompts, instead of `tensors`: (pieces, the file's fields) -> key and tensor, made of all pieces
    fill       the way back: (pieces, fields, tensors of the file) -> None
    loads      the method that a file is loaded as, where it is another: what is left of it when folded
    """

    method: type
    peft_type: str
    fixed: dict
    reads: tuple[str, ...]
    fields: Callable[[object, nn.Module, dict], dict]
    settings: Callable[[dict, nn.Module, list[str], dict], dict]
    tensors: Callable[[str, nn.Module], dict[str, Tensor]] | None = None
    pack: Callable[[list, dict], dict[str, Tensor]] | None = None
    fill: Callable[[list, dict, dict[str, Tensor]], None] | None = None
    loads: type | None = None


# ----------------------------------------------------------------------------------- LoRA and DoRA

def _lora_fields(lora: LoRA, model: nn.Module, pieces: dict) -> dict:
    """PiSSA is written as what it has become: a LoRA of twice the rank on the unchanged base (see `_lora_tensors`)."""
    pissa = lora.init == "pissa"
    alpha = lora.alpha * (1 if not pissa else math.sqrt(2) if lora.rslora else 2)  # keeps the scale
    return {"r": lora.rank * (1 + pissa), "lora_alpha": alpha, "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora, "init_lora_weights": lora.init if lora.init == "gaussian" else True,
            "target_modules": _shortest(model, list(pieces))}


def _lora_tensors(path: str, piece: LowRank) -> dict[str, Tensor]:
    A, B = piece.factors()
    found = {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    return found | ({f"{PREFIX}{path}.lora_magnitude_vector": piece.m} if hasattr(piece, "m") else {})


def _lora_settings(config: dict, model: nn.Module, whole: list[str], shapes: dict) -> dict:
    paths = _targeted(model, config, whole)
    init = config.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal", "eva"):  # after training these are plain LoRA
        raise ValueError(f"init_lora_weights is {init!r}, which changes more than A and B when it starts; accepted are "
                         "true, false, 'gaussian', 'orthogonal' and 'eva' (PEFT can convert while it saves: "
                         "path_initial_model_for_weight_conversion)")
    rank = _same_for_all("r", config.get("r", 8), config.get("rank_pattern"), paths)
    alpha = _same_for_all("lora_alpha", config.get("lora_alpha", 8), config.get("alpha_pattern"), paths)
    rows = {shape[0]: key for key, shape in shapes.items()
            if key.endswith(".lora_A.weight") and len(shape) == 2 and all(shape)}
    if not rows:
        raise ValueError(f"{TENSORS} has no lora_A.weight (r, in)")
    for found, key in rows.items():
        if found != rank:
            raise ValueError(f"r is {rank!r}, but {key} has {found} rows")
    return {"targets": _shortest(model, paths), "rank": rank, "alpha": alpha, "dropout": config.get("lora_dropout", 0.0),
            "init": "gaussian" if init == "gaussian" else "kaiming", "rslora": config.get("use_rslora", False)}


def _same_for_all(field: str, usual, pattern: dict | None, paths: list[str]):
    """The one value that a field has on all modules; PEFT can give some of them another, we cannot."""
    if not isinstance(pattern or {}, dict):
        raise ValueError(f"the pattern for {field} is {pattern!r}; accepted is a table of module names and values")
    values = {path: next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path)),
                         usual) for path in paths}
    one, first = next(iter(values.items()))
    for path, value in values.items():
        if value != first:
            raise ValueError(f"{field} is {first!r} for {one} and {value!r} for {path}; accepted is one for all "
                             "modules")
    return first


# ------------------------------------------------------------------------------------------ (IA)³

def _ia3_fields(ia3: IA3, model: nn.Module, pieces: dict) -> dict:
    kinds = [[path for path, piece in pieces.items() if isinstance(piece, RescaleInput) == inner]
             for inner in (False, True)]
    outputs, inputs = (_shortest(model, paths) if paths else [] for paths in kinds)
    if isinstance(outputs, str) or isinstance(inputs, str):  # no suffixes mean just these: whole paths do
        outputs, inputs = kinds
    return {"target_modules": sorted([*outputs, *inputs]), "feedforward_modules": sorted(inputs)}


def _ia3_settings(config: dict, model: nn.Module, whole: list[str], shapes: dict) -> dict:
    paths, inner = _targeted(model, config, whole), config.get("feedforward_modules") or []
    inner = [path for path in paths if inner and _means("feedforward_modules", inner, path)]
    return {"targets": _shortest(model, paths), "feed_forward": _shortest(model, inner) if inner else ()}


def _ia3_tensors(path: str, piece: nn.Module) -> dict[str, Tensor]:
    """Where one matrix makes q, k and v, PEFT rescales all three: for q by the ones that our vector leaves out."""
    return {f"{PREFIX}{path}.ia3_l": piece.l[None] if isinstance(piece, RescaleInput) else piece.whole()[:, None]}


# ---------------------------------------------------- what PEFT does not have, under our own names

def _own_fields(method, model: nn.Module, pieces: dict) -> dict:
    return asdict(method)


def _own_settings(method: type):
    def settings(config: dict, model: nn.Module, whole: list[str], shapes: dict) -> dict:
        for key, shape in shapes.items():
            if key.endswith(".down.weight") and config.get("bottleneck") not in (None, *shape[:1]):
                raise ValueError(f"bottleneck is {config['bottleneck']!r}, but {key} has {shape[0]} rows")
        return {f.name: config[f.name] for f in fields(method) if f.name in config}
    return settings


def _own_tensors(path: str, piece: nn.Module) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.{name}": p for name, p in piece.named_parameters()}


def _own(method: type, peft_type: str) -> Format:
    return Format(method, peft_type, {}, tuple(f.name for f in fields(method)), _own_fields, _own_settings(method),
                  _own_tensors)


# --------------------------------------------------------------------- soft prompts and prefixes

_SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_PROMPT = (*_SIZES, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
_ENCODER = (*_SIZES, "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout")
_PREFIX = (*_SIZES, "prefix_projection", "encoder_hidden_size", "init_weights")


def _prompt_fields(method: PromptTuning, model: nn.Module, pieces: dict) -> dict:
    text = model.config.get_text_config()                        # PEFT wants heads and layers, and does not use them
    _, embedding = sockets.embedding_site(model)
    return {"num_virtual_tokens": method.length, "token_dim": embedding.weight.shape[1],
            "num_transformer_submodules": 1, "num_attention_heads": getattr(text, "num_attention_heads", 1),
            "num_layers": getattr(text, "num_hidden_layers", 1), "prompt_tuning_init": "RANDOM"}


def _p_tuning_fields(method: PTuning, model: nn.Module, pieces: dict) -> dict:
    fields = _prompt_fields(method, model, pieces)
    del fields["prompt_tuning_init"]
    return fields | {"encoder_reparameterization_type": method.encoder.upper(),
                     "encoder_hidden_size": method.hidden or fields["token_dim"]}


def _prefix_fields(method: PrefixTuning, model: nn.Module, pieces: dict) -> dict:
    sites = sockets.attention_sites(model)
    heads, width = next(iter(sites.values()))
    return {"num_virtual_tokens": method.length, "token_dim": heads * width, "num_attention_heads": heads,
            "num_layers": len(sites), "num_transformer_submodules": 1, "prefix_projection": False,
            "encoder_hidden_size": heads * width}


def _prompt_settings(config: dict, model: nn.Module, whole: list[str], shapes: dict) -> dict:
    shape = shapes.get(EMBEDDINGS)
    if shape is None:
        raise ValueError(f"{TENSORS} has no {EMBEDDINGS} (length, …)")
    length = config.get("num_virtual_tokens")
    rows = [length * n for n in (1, 2) if isinstance(length, int)]  # 2: PEFT keeps an unused half for decoders
    if len(shape) != 2 or shape[0] not in rows:
        raise ValueError(f"num_virtual_tokens is {length!r}, but {EMBEDDINGS} is {shape}")
    return {"length": length}


def _prefix_settings(config: dict, model: nn.Module, whole: list[str], shapes: dict) -> dict:
    return _prompt_settings(config, model, whole, shapes) | {"reparameterize": False}


def _pack_prompt(pieces: list, config: dict) -> dict[str, Tensor]:
    twice = config.get("num_transformer_submodules") == 2
    return {EMBEDDINGS: torch.cat([pieces[0].P] * (1 + twice))}


def _fill_prompt(pieces: list, config: dict, tensors: dict) -> None:
    pieces[0].P.copy_(tensors[EMBEDDINGS][:pieces[0].length])


def _pack_prefix(pieces: list, config: dict) -> dict[str, Tensor]:
    flat = [t.permute(1, 0, 2).flatten(1) for piece in pieces for t in (piece.K, piece.V)]  # (length, G d) each
    return {EMBEDDINGS: torch.cat(flat, dim=1)}


def _fill_prefix(pieces: list, config: dict, tensors: dict) -> None:
    G, length, d = pieces[0].K.shape
    layers = tensors[EMBEDDINGS].view(length, len(pieces), 2, G, d).permute(1, 2, 3, 0, 4)  # (L, 2, G, length, d)
    for i, piece in enumerate(pieces):
        # written by PEFT for an encoder-decoder: its layer i uses what stands at 2i (it cuts a doubled list)
        K, V = layers[2 * i % len(pieces) if config.get("num_transformer_submodules") == 2 else i]
        piece.K.copy_(K)
        piece.V.copy_(V)


_LORA = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")
FORMATS = (
    Format(LoRA, "LORA", {"bias": "none", "use_dora": False}, _LORA, _lora_fields, _lora_settings, _lora_tensors),
    Format(DoRA, "LORA", {"bias": "none", "use_dora": True}, _LORA, _lora_fields, _lora_settings, _lora_tensors),
    Format(IA3, "IA3", {"init_ia3_weights": True}, ("feedforward_modules",), _ia3_fields, _ia3_settings, _ia3_tensors),
    Format(PromptTuning, "PROMPT_TUNING", {}, _PROMPT, _prompt_fields, _prompt_settings,
           pack=_pack_prompt, fill=_fill_prompt),
    Format(PTuning, "P_TUNING", {}, _ENCODER, _p_tuning_fields, _prompt_settings,
           pack=_pack_prompt, fill=_fill_prompt, loads=PromptTuning),
    Format(PrefixTuning, "PREFIX_TUNING", {}, _PREFIX, _prefix_fields, _prefix_settings,
           pack=_pack_prefix, fill=_fill_prefix),
    _own(BottleneckAdapter, "MINIPEFT_BOTTLENECK"),
    _own(BitFit, "MINIPEFT_BITFIT"),
)

# Fields that change nothing here: where it came from, how PEFT started it, defaults that are never empty.
_NOTES = ("peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type",
          "fan_in_fan_out", "peft_type", "eva_config", "loftq_config", "megatron_core", "qalora_group_size")
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


# ------------------------------------------------------------------------------------------- save

def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | Sequence[str] = "default") -> None:
    """Write the adapter `name` as a PEFT checkpoint: `adapter_config.json` and `adapter_model.safetensors`.

    A list of names is written as a hybrid: `hybrid.json`, and each part as a checkpoint in a folder below.

    `folder` and its parents are made where they are missing; an older checkpoint in it is replaced
    when the new files are complete, so that whatever interrupts the save, one of the two is whole.
    The base's name is recorded unless it is a path of this machine.
    Raises `ValueError` for an unknown adapter, `TypeError` for a method that has no format,
    `FileExistsError` where `folder` is a file, or one kind of checkpoint would be laid upon the other.
    """
    folder = Path(folder).expanduser()
    from . import hybrids

    if not isinstance(name, str) and isinstance(name, Sequence):
        return hybrids.save_parts(model, folder, name)
    if (folder / hybrids.MANIFEST).exists():
        raise FileExistsError(f"{folder} holds a hybrid; the checkpoint of one adapter needs a folder of its own")
    adapter = sockets.the_adapter(model, name)
    config, folded = _config(model, adapter), sockets.folded_adapter(adapter)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    tensors = {key: p.detach().cpu().contiguous() for key, p in _tensors(folded, config).items()}
    metadata = {"format": "pt", "sha256": _digest(tensors)}
    make_folder(folder)
    if (folder / CONFIG).is_file():
        before = (folder / CONFIG).read_bytes()
        if before != text.encode():  # two files cannot change at once: what changes first carries the other
            metadata |= {"replaces": hashlib.sha256(before).hexdigest(), CONFIG: text}
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as making:
        save_file(tensors, Path(making, TENSORS), metadata)
        Path(making, CONFIG).write_text(text, encoding="utf-8")
        moves = [(TENSORS, TENSORS), (CONFIG, CONFIG)]
        if folded is not adapter:                # the network says beside which tensors it is of use: first beside the old
            moves = [(ENCODER, NEXT_ENCODER), *moves]  # one, in whose place it comes when the tensors are there
            network = {key: p.detach().cpu().contiguous() for key, p in _network(adapter).items()}
            save_file(network, Path(making, ENCODER), {"format": "pt", "made": metadata["sha256"],
                      "sha256": _digest(network), "settings": json.dumps(asdict(adapter.method))})
        for file, _ in moves:
            with open(Path(making, file), "rb") as written:
                os.fsync(written.fileno())
        for file, place in moves:
            os.replace(Path(making, file), folder / place)
    if folded is not adapter:
        os.replace(folder / NEXT_ENCODER, folder / ENCODER)
    else:
        for file in (ENCODER, NEXT_ENCODER):
            (folder / file).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """The folder and its parents; `FileExistsError` where one of them is a file."""
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise FileExistsError(f"{place} is a file; a checkpoint is a folder")
    folder.mkdir(parents=True, exist_ok=True)


def format_of(adapter: Adapter) -> Format:
    for entry in FORMATS:
        if type(adapter.method) is entry.method:
            return entry
    raise TypeError(f"adapter {adapter.name!r} is {type(adapter.method).__name__}, which has no checkpoint format; "
                    f"those that have: {', '.join(entry.method.__name__ for entry in FORMATS)}")


def _tensors(adapter: Adapter, config: dict) -> dict[str, Tensor]:
    """Key in the file -> the parameter itself, or what is made of it."""
    entry, found = format_of(adapter), _head_tensors(adapter)
    if entry.pack is not None:
        return found | entry.pack(_plain(adapter), config)
    for path, piece in adapter.pieces().items():
        if not isinstance(piece, OwnHead):
            found |= entry.tensors(path, piece)
    return found


def _head_tensors(adapter: Adapter) -> dict[str, Tensor]:
    prefix = PREFIX if format_of(adapter).pack is None else "base_model."  # prompts are not wrapped twice
    return {prefix + path + name.removeprefix("copy"): p for path, piece in adapter.pieces().items()
            if isinstance(piece, OwnHead) for name, p in piece.named_parameters()}


def _plain(adapter: Adapter) -> list[nn.Module]:
    """The method's own pieces."""
    return [piece for piece in adapter.pieces().values() if not isinstance(piece, OwnHead)]


def _network(adapter: Adapter) -> dict[str, nn.Parameter]:
    """What makes the prompt or prefix, by the base's paths: every trained parameter but the heads."""
    heads = {id(p) for p in _head_tensors(adapter).values()}
    return {name: p for name, p in adapter.named_parameters() if id(p) not in heads}


def _digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for key, t in sorted(tensors.items()):
        digest.update(f"{key} {t.dtype} {tuple(t.shape)} ".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _config(model: nn.Module, adapter: Adapter) -> dict:
    entry, pieces = format_of(adapter), adapter.pieces()
    whole = sorted(path for path, piece in pieces.items() if isinstance(piece, OwnHead))
    plugged = {path: piece for path, piece in pieces.items() if path not in whole}
    config = {
        "peft_type": entry.peft_type,
        "task_type": _task(model, whole),
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "base_model_name_or_path": _base_name(model),
        "inference_mode": True,
        "modules_to_save": whole or None,
        "fan_in_fan_out": any(anatomy.is_transposed(model.get_submodule(path)) for path in plugged),
        **entry.fixed,
        **entry.fields(adapter.method, model, plugged),
    }
    if entry.pack is not None:
        del config["fan_in_fan_out"]
    return config


def _task(model: nn.Module, whole: list[str]) -> str | None:
    """PEFT's task type, where it has one that fits; it decides which wrapper PEFT takes."""
    if not hasattr(model, "can_generate"):
        return None
    if model.get_output_embeddings() is not None:
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM" if model.can_generate() else None
    heads = sockets.own_heads(model)
    if not heads:
        return "FEATURE_EXTRACTION"
    return "SEQ_CLS" if whole == sorted(heads) and "SequenceClassification" in type(model).__name__ else None


def _base_name(model: nn.Module) -> str | None:
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    local = name and (name[0] == "~" or PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute())
    return None if local else name


def _shortest(model: nn.Module, paths: list[str]) -> list[str] | str:
    """The shortest suffixes that mean exactly these modules, to PEFT and to `LoRA.targets`."""
    ends_in: dict[str, set] = {}
    for path in anatomy.base_modules(model):
        for suffix in _suffixes(path):
            ends_in.setdefault(suffix, set()).add(path)
    wanted, found = set(paths), set()
    for path in paths:
        exact = [s for s in _suffixes(path) if ends_in[s] <= wanted and s not in ("attention", "all-linear")]
        if not exact:  # another module's path ends in the whole of this one
            return f"({'|'.join(map(re.escape, paths))})"
        found.add(exact[0])
    return sorted(found)


def _suffixes(path: str) -> list[str]:
    """a.b.c -> c, b.c, a.b.c"""
    names = path.split(".")
    return [".".join(names[i:]) for i in reversed(range(len(names)))]


# ------------------------------------------------------------------------------------------- load

def load_adapter(model: nn.Module, folder: str | os.PathLike,
                 name: str | Sequence[str] = "default") -> Adapter | dict[str, Adapter]:
    """Attach the adapter that a checkpoint holds, ours or PEFT's, and activate it alone.

    The parts of a hybrid are attached under the names that they had, or under those of a list, and activated
    together; what was frozen is frozen again. The result is then {name: adapter}.

    The pieces are at least float32, whatever the file's floating-point type is.
    Raises `FileNotFoundError` for a missing folder or file, `ValueError` that names what does not
    fit: damaged files, settings that have no meaning here, missing or surplus keys, shapes, a file
    outside the folder. Nothing has been changed then. Warns if the base has another name.
    """
    folder = Path(folder).expanduser()
    from . import hybrids

    for merged in sockets.merged_names(model):
        raise ValueError(f"adapter {merged!r} is merged into the base; unmerge it first")
    if (folder / hybrids.MANIFEST).is_file():
        if isinstance(name, str) and name != "default":
            raise ValueError(f"name is {name!r}, but {folder} holds a hybrid; accepted is a list of names")
        return hybrids.load_parts(model, folder, None if isinstance(name, str) else name)
    sockets.check_new_name(model, name)
    files = files_in(folder)
    try:
        adapter = read(model, *files, name)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    sockets.plug(model, adapter)
    sockets.activate(model, name)
    return adapter


def files_in(folder: Path) -> tuple[Path, Path]:
    """A checkpoint's settings and its tensors. `FileNotFoundError` if there is none, `ValueError` if it leads elsewhere."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}; accepted is a local folder with {CONFIG} and {TENSORS} "
                                "(huggingface_hub.snapshot_download fetches one from the Hub)")
    return _inside(folder, CONFIG), _inside(folder, TENSORS)


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a folder, if it really lies there. (The Hub's cache links snapshots/<x>/file to blobs/.)"""
    path, root = folder / name, folder.resolve()
    for parent in root.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            root = parent.parent
    if not path.resolve().is_relative_to(root):
        raise ValueError(f"{path} leads outside its folder, to {path.resolve()}; copy the file if you trust it")
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        why = f"; {pickles[0]} is there, but of tensors only safetensors is read, for a pickle can run code: " \
              "load it in PEFT and save it again" if pickles and name == TENSORS else ""
        raise FileNotFoundError(f"no file {name} in {folder}{why}")
    return path


def read(model: nn.Module, config_file: Path, tensors_file: Path, name: str) -> Adapter:
    """The checkpoint as an adapter that is not plugged in yet."""
    raw = config_file.read_bytes()
    with _opened(tensors_file) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
        metadata = file.metadata() or {}
        if metadata.get("replaces") == hashlib.sha256(raw).hexdigest():  # a save was cut off between the two files
            raw = metadata[CONFIG].encode()
        config = _parsed(raw)
        try:
            entry, whole = _format_for(config), _trained_whole(model, config)
            method = (entry.loads or entry.method)(**entry.settings(config, model, whole, shapes))
            pieces = list(method.pieces(model))
        except (ValueError, TypeError, OverflowError, re.error) as error:
            raise ValueError(f"{CONFIG}: {error}{_made_for(config, model)}") from None
        heads = [("module", path, OwnHead(model.get_submodule(path))) for path in whole]
        adapter = Adapter(name, method, [*pieces, *heads])
        parameters = _tensors(adapter, config)
        _compare(model, config, parameters, slices, file)
        tensors = {key: file.get_tensor(key) for key in shapes}
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors):
        raise ValueError(f"{TENSORS} is corrupted: its bytes are not those that were saved")
    with torch.no_grad():
        if entry.fill is not None:
            parameters = _head_tensors(adapter)
            entry.fill(_plain(adapter), config, tensors)
        for key, p in parameters.items():
            p.copy_(tensors[key])
    _compare_names(model, config)
    if entry.pack is not None:
        for name in (NEXT_ENCODER, ENCODER):     # of a save that was cut off, one or the other belongs to the tensors
            if (tensors_file.parent / name).is_file():
                found = _with_network(model, adapter, entry, _inside(tensors_file.parent, name), _digest(tensors))
                if found is not None:
                    return found
        if (tensors_file.parent / ENCODER).is_file():
            warnings.warn(f"{ENCODER} belongs to other tensors than {TENSORS}; the adapter is loaded without it, folded",
                          stacklevel=4)
    return adapter


def _with_network(model: nn.Module, folded: Adapter, entry: Format, file: Path, made: str) -> Adapter | None:
    """The adapter as it was trained, with the network of `file`; None if that made other tensors than these."""
    with _opened(file) as opened:
        metadata, tensors = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
    if metadata.get("made") != made:
        return None
    try:
        method = entry.method(**json.loads(metadata.get("settings", "")))
        heads = [(*site, piece) for site, piece in zip(folded.sites, folded.pieces().values(), strict=True)
                 if isinstance(piece, OwnHead)]
        adapter = Adapter(folded.name, method, [*method.pieces(model), *heads])
    except (ValueError, TypeError) as error:
        raise ValueError(f"the settings in {file.name} cannot be used: {error}") from None
    parameters = _network(adapter)
    if metadata.get("sha256") != _digest(tensors) or \
            {k: p.shape for k, p in parameters.items()} != {k: t.shape for k, t in tensors.items()}:
        raise ValueError(f"{file.name} is corrupted, or its tensors are not those of {method}")
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(tensors[key])
    return adapter


@contextlib.contextmanager
def _opened(path: Path):
    """safetensors' reader, with its errors put into words."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} ({path.stat().st_size} bytes) is empty, truncated, corrupted or not a "
                         f"safetensors file: {error}") from None


def _parsed(raw: bytes) -> dict:
    try:
        config = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}; accepted is a table of settings")
    return config


def _format_for(config: dict) -> Format:
    """The entry of FORMATS that reads this config; every field must be one that it knows, or be empty."""
    kind, known = config.get("peft_type"), sorted({entry.peft_type for entry in FORMATS})
    entries = [entry for entry in FORMATS if entry.peft_type == kind]
    if not entries:
        near = difflib.get_close_matches(str(kind), known, n=1)
        raise ValueError(f"peft_type is {kind!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                         + f" (accepted: {', '.join(known)})")

    def differs(entry):
        return [field for field, value in entry.fixed.items() if config.get(field, value) not in (value, None)]

    entry = min(entries, key=lambda entry: len(differs(entry)))  # LoRA and DoRA share a type
    for field in differs(entry):
        raise ValueError(f"{field} is {config[field]!r}; accepted is {json.dumps(entry.fixed[field])}")
    known = {*_NOTES, *_WHERE, *entry.fixed, *entry.reads}
    for field, value in config.items():
        if field not in known and value not in (None, False, "none", [], {}):
            raise ValueError(f"{field} is {value!r}, which minipeft cannot represent; accepted is null")
    return entry


def _trained_whole(model: nn.Module, config: dict) -> list[str]:
    """PEFT's rule: `modules_to_save` means every module whose path ends in one of these strings."""
    names = config.get("modules_to_save") or []
    if isinstance(names, str) or not all(isinstance(n, str) and n for n in names):
        raise ValueError(f"modules_to_save is {names!r}; accepted is a list of names")
    if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        names = [*names, "classifier", "score"]
    heads = sockets.own_heads(model)
    found = [path for path in anatomy.base_modules(model) if path.endswith(tuple(names))] if names else []
    for path in found:
        if path not in heads:
            raise ValueError(f"modules_to_save is {names!r}, so {path} is trained whole; accepted is only a "
                             f"classification head ({', '.join(heads) or 'this model has none'})")
    return found


def _targeted(model: nn.Module, config: dict, heads: list[str]) -> list[str]:
    """The paths that `target_modules` and the fields beside it mean, by PEFT's rule."""
    targets, paths = config.get("target_modules"), anatomy.base_modules(model)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = anatomy.match(model, "all-linear")
    else:
        found = [path for path in paths if _means("target_modules", targets, path)]
    if config.get("exclude_modules"):
        found = [path for path in found if not _means("exclude_modules", config["exclude_modules"], path)]
    found = [path for path in found if not any(f"{path}.".startswith(f"{head}.") for head in heads)]
    layers = config.get("layers_to_transform")
    if layers not in (None, []):
        layers = [layers] if isinstance(layers, int) else layers
        patterns = config.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            numbers = {path: re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for path in found}
            if any(numbers.values()):
                break
        found = [path for path in found if numbers[path] and int(numbers[path][1]) in layers]
    if not found:
        linear = dict.fromkeys(p.rpartition(".")[2] for p in paths if anatomy.is_linear(paths[p]))
        raise ValueError(f"target_modules is {targets!r}, which means no module of this {type(model).__name__} "
                         f"(modules: {', '.join(linear)})")
    for path in found:
        if not anatomy.is_linear(paths[path]):
            raise ValueError(f"target_modules is {targets!r}, which means {path}, a "
                             f"{type(paths[path]).__name__}; accepted are linear modules")
    return found


def _means(field: str, rule, path: str) -> bool:
    """A string is a regular expression for the whole path; a list holds paths and suffixes of paths."""
    if isinstance(rule, str) and rule:
        return re.fullmatch(rule, path) is not None
    if not isinstance(rule, list) or not rule or not all(isinstance(r, str) and r for r in rule):
        raise ValueError(f"{field} is {rule!r}; accepted is a list of names, or a regular expression")
    return any(path == r or path.endswith(f".{r}") for r in rule)


def _compare(model: nn.Module, config: dict, parameters: dict, slices: dict, file) -> None:
    """Refuse keys, shapes and types that are not those of the parameters; the base's own weights may be there too."""
    both = [key for key in parameters if key in slices]
    found = {key: tuple(s.get_shape()) for key, s in slices.items()}
    problems = {
        "missing": [key for key in parameters if key not in slices],
        "surplus": [key for key in slices if key not in parameters and not _base_weight(model, key, file)],
        "of another shape": [f"{key} is {found[key]}, expected {tuple(parameters[key].shape)}"
                             for key in both if found[key] != tuple(parameters[key].shape)],
        "not floating-point": [f"{key} is {slices[key].get_dtype()}" for key in both
                               if slices[key].get_dtype() not in ("F64", "F32", "F16", "BF16")],
    }
    said = [f"{len(them)} {'are' if len(them) > 1 else 'is'} {problem} "
            f"({'; '.join(them[:3])}{'; …' if len(them) > 3 else ''})" for problem, them in problems.items() if them]
    if said:
        raise ValueError(f"the tensors of {TENSORS} do not fit this {type(model).__name__}: {', '.join(said)}"
                         f"{_made_for(config, model)}")


def _base_weight(model: nn.Module, key: str, file) -> bool:
    """Whether this is a weight of the base, unchanged: PEFT stores those of adapted output heads too."""
    try:
        weight = model.get_parameter(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    except AttributeError:
        return False
    stored = file.get_tensor(key)
    return stored.shape == weight.shape and torch.equal(stored.to(weight), weight)


def _made_for(config: dict, model: nn.Module) -> str:
    """What the checkpoint says about the model it was made on, where that is another one than this."""
    recorded = config.get("auto_mapping")
    kind = recorded.get("base_model_class") if isinstance(recorded, dict) else None
    base = config.get("base_model_name_or_path")
    said = [str(thing) for thing in (kind, base) if thing and thing not in (type(model).__name__, _base_name(model))]
    return f". It was made for {' '.join(said)}; this is {type(model).__name__} {_base_name(model) or ''}".rstrip() \
        if said else ""


def _compare_names(model: nn.Module, config: dict) -> None:
    """Everything fits, but an adapter is of use only on the weights that it was trained beside."""
    theirs, ours = config.get("base_model_name_or_path"), _base_name(model)
    if isinstance(theirs, str) and theirs and ours:
        if theirs.replace("\\", "/").rstrip("/").split("/")[-1].lower() != ours.rstrip("/").split("/")[-1].lower():
            warnings.warn(f"this adapter was trained on {theirs!r} and is loaded into {ours!r}; all shapes agree, "
                          "but it only works beside the weights that it was trained with", stacklevel=4)
