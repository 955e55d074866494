"""Three sockets on a frozen transformer: the only file that knows hooks.

    embedding    e      -> [P; e]                  token embeddings in, a longer sequence out
    key/value    (K, V) -> ([P_K; K], [P_V; V])    in an attention layer
    module       (x, y) -> y'                      what went into a frozen module, what came out,
                                                   what should come out

A *piece* is a plain `nn.Module` with one of these three signatures. A *method* is a frozen
dataclass of settings; `method.pieces(model)` yields `(socket, path, piece)` and so says which piece
goes where. `attach` plugs them in. An `Adapter` is what one `attach` made: the pieces, by path.

The base model is never renamed, wrapped or replaced: pieces live beside it, under `model.minipeft`.
They move, train and appear in `model.parameters()` with the model, but `model.state_dict()` stays
the base's own, key for key. `detach` of the last adapter gives back the model as it was, to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from . import anatomy

HOME = "minipeft"  # the name under which the adapters stand on the model
WRAPPED = "minipeft_"  # prefix of the names of wrapped attention functions
FOLDS = {"weight": "merged", "bias": "merged_bias"}  # what a piece can be folded into, and by which method


class Adapter(nn.Module):
    """The pieces of one method on one model.

    Parameter names are the base's module path and the paper's symbol, for example
    `model.layers.0.self_attn.q_proj.A`. `method` is the frozen dataclass of settings.
    """

    def __init__(self, name: str, method, sites: list[tuple[str, str, nn.Module]]):
        super().__init__()
        self.name, self.method = name, method
        self.sites = [(socket, path) for socket, path, _ in sites]
        self.has_run: set[str] = set()
        for _, path, piece in sites:
            *parents, leaf = path.split(".")
            place = self
            for part in parents:  # the path of the base, as a tree of empty modules
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place._modules[part]
            place.add_module(leaf, piece)

    def pieces(self) -> dict[str, nn.Module]:
        """The pieces by the path of the base's module that each is plugged into."""
        return {path: self.get_submodule(path) for _, path in self.sites}

    def idle(self) -> list[str]:
        """Paths of the pieces that have never run since they were plugged in."""
        return [path for _, path in self.sites if path not in self.has_run]

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.method}, {len(self.sites)} pieces"


class Adapters(nn.Module):
    """Everything minipeft keeps on one model, registered on it as `model.minipeft`."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.originals: dict[str, Tensor] = {}  # weights and biases as they were before a merge
        self.trained_before = {n: p.requires_grad for n, p in model.named_parameters()}
        self.plugs: dict[str, ModulePlug] = {}
        self.attention: list[tuple] = []  # (config, the attention function it named before)
        self.handles: list = []
        # model.state_dict() is the base's own: drop what stands below this module.
        self.register_state_dict_post_hook(_drop_own_keys)
        self.register_load_state_dict_post_hook(_forgive_own_keys)

    def live(self) -> tuple[str, ...]:
        """The adapters that act on a forward pass: active, and not folded into the weights."""
        return tuple(n for n in self.active if n not in self.merged)


def _drop_own_keys(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        del state_dict[key]


def _forgive_own_keys(module, incompatible):
    own = f"{HOME}."
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if not k.startswith(own)]


# ---------------------------------------------------------------------------------------------
# The public verbs
# ---------------------------------------------------------------------------------------------

def attach(model: nn.Module, method, name: str = "default") -> Adapter:
    """Freeze the base, plug `method` in, make it active beside what is active already.

    Attaching a second method makes a hybrid: both act. `activate` chooses otherwise.
    On a classification model each adapter also gets, and trains, its own copy of the output head.
    Raises before anything is changed: `ValueError` for a bad name or for targets that the model
    does not have, `TypeError` for something that is not a method.
    """
    if not hasattr(method, "pieces"):
        raise TypeError(f"method is {method!r}; accepted is a method's settings, such as mp.LoRA()")
    check_new_name(model, name)
    heads = [("module", path, OwnHead(model.get_submodule(path))) for path in own_heads(model)]
    sites = [site for site in method.pieces(model)   # what is trained whole needs nothing else
             if not any(f"{site[1]}.".startswith(f"{path}.") for _, path, _ in heads)]
    if heads and not sites:
        raise ValueError(f"{method} means only the output head {heads[0][1]!r}, which every adapter trains whole")
    adapter = Adapter(name, method, [*sites, *heads])
    plug(model, adapter)
    return adapter


def plug(model: nn.Module, adapter: Adapter) -> None:
    """Plug a finished adapter in, under its name: what `attach` and `load_adapter` end with."""
    adapter.train(model.training)
    name = adapter.name
    home = getattr(model, HOME, None)
    if home is None:
        home = Adapters(model)
        model.requires_grad_(False)
        model.add_module(HOME, home)
        home.handles += [
            model.register_forward_pre_hook(RootPlug(home), with_kwargs=True),
            model.register_forward_hook(IdleReport(home)),
        ]
    pieces = adapter.pieces()
    for socket, path in adapter.sites:
        if socket == "module":
            if path not in home.plugs:
                home.plugs[path] = ModulePlug(home, path, model.get_submodule(path))
            home.plugs[path].pieces[name] = pieces[path]
        elif socket == "key/value":
            _plug_attention(home, name, model.get_submodule(path), path, pieces[path])
    home.add_module(name, adapter)
    home.active += (name,)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out. After the last one the model is bit-identical to before."""
    home, adapter = _home(model), the_adapter(model, name)
    if name in home.merged:
        unmerge(model, name)
    for socket, path in adapter.sites:
        if socket == "module":
            plug = home.plugs[path]
            del plug.pieces[name]
            if not plug.pieces:
                for handle in plug.handles:
                    handle.remove()
                del home.plugs[path]
        elif socket == "key/value":
            _unplug_attention(home, name, model.get_submodule(path))
    home.active = tuple(n for n in home.active if n != name)
    del home._modules[name]
    if not home._modules:
        for handle in home.handles:
            handle.remove()
        del model._modules[HOME]
        for n, p in model.named_parameters():
            p.requires_grad_(home.trained_before.get(n, p.requires_grad))


def activate(model: nn.Module, names: str | list[str] | tuple[str, ...] | None) -> None:
    """Make exactly these adapters act: one name, several in this order, or None for the bare base."""
    if names is None and not hasattr(model, HOME):
        return
    home = _home(model)
    wanted = () if names is None else (names,) if isinstance(names, str) else tuple(names)
    for n in wanted:
        the_adapter(model, n)
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"names is {list(wanted)}: each adapter can act only once")
    left = [n for n in home.merged if n not in wanted]
    if left:
        raise ValueError(f"adapter {left[0]!r} is merged into the base; unmerge it first")
    home.active = wanted


@contextlib.contextmanager
def active(model: nn.Module, names) -> Iterator[nn.Module]:
    """`with active(model, names):` as `activate`, and afterwards as it was before."""
    before = tuple(_home(model).active) if hasattr(model, HOME) else None
    activate(model, names)
    try:
        yield model
    finally:
        if before is not None:
            activate(model, before)


def merge(model: nn.Module, name: str = "default") -> None:
    """Fold an adapter into the base: W <- piece.merged(W), b <- piece.merged_bias(b). No piece runs afterwards.

    The weights as they were are kept, so that `unmerge` gives them back to the bit.
    Raises `TypeError` where the method's pieces cannot be folded, before anything is changed.
    """
    home, adapter = _home(model), the_adapter(model, name)
    if name in home.merged:
        raise ValueError(f"adapter {name!r} is merged already")
    if name not in home.active:
        raise ValueError(f"adapter {name!r} is not active; activate it before merging")
    owners: dict[Tensor, list[str]] = {}
    for path, module in anatomy.base_modules(model).items():
        if isinstance(getattr(module, "weight", None), Tensor):
            owners.setdefault(module.weight, []).append(path)
    for path, piece in adapter.pieces().items():
        if isinstance(piece, OwnHead):
            continue
        if not any(hasattr(piece, fold) for fold in FOLDS.values()):
            raise TypeError(
                f"{type(adapter.method).__name__} cannot be merged: {type(piece).__name__} at "
                f"{path!r} is not a change of a weight (LoRA, DoRA and (IA)³ are)"
            )
        if not hasattr(piece, "merged"):
            continue
        weight = model.get_submodule(path).weight
        if not weight.is_floating_point():
            raise TypeError(f"{path!r} holds {weight.dtype} codes; an adapter can be merged into a "
                            "floating-point weight only")
        twins = [twin for twin in owners[weight] if twin != path]
        if twins:
            raise ValueError(f"{path!r} shares its weight with {twins[0]!r}; merging would change both")
    _refold(model, home, adapter, (*home.merged, name))


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Take a merged adapter out of the weights again, to the bit (from the kept originals)."""
    home, adapter = _home(model), the_adapter(model, name)
    if name not in home.merged:
        raise ValueError(f"adapter {name!r} is not merged (merged: {list(home.merged) or 'none'})")
    _refold(model, home, adapter, tuple(n for n in home.merged if n != name))


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on this model by name, in the order in which they came; empty without any."""
    home = getattr(model, HOME, None)
    return dict(home.named_children()) if home is not None else {}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name, without any adapter's."""
    return {n: p for n, p in model.named_parameters() if not n.startswith(HOME + ".")}


def trainable_like(module: nn.Module) -> dict:
    """`device` and `dtype` for a piece beside this module: never less than float32."""
    weight = next(iter(module.parameters()))
    wide = weight.dtype in (torch.float32, torch.float64)
    return {"device": weight.device, "dtype": weight.dtype if wide else torch.float32}


@contextlib.contextmanager
def only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within it, the output head sees only the hidden states at `positions`, a bool (B, T).

    The model then returns logits (N, vocabulary), N = positions.sum(), instead of (B, T, vocabulary).
    """
    def select(module, args):
        h = args[0]                             # (B, P + T, d): a soft prompt makes it longer
        return (h[:, h.shape[1] - positions.shape[1]:][positions], *args[1:])  # (N, d)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------
# Names, and the weights under a merge
# ---------------------------------------------------------------------------------------------

def _home(model) -> Adapters:
    home = getattr(model, HOME, None)
    if home is None:
        raise ValueError(f"no adapter is attached to this {type(model).__name__}; mp.attach attaches one")
    return home


def the_adapter(model: nn.Module, name: str) -> Adapter:
    """The adapter of this name; `ValueError` with the nearest name if there is none."""
    known = _home(model)._modules
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"no adapter is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                         + f" (attached: {', '.join(known)})")
    return known[name]


def check_new_name(model: nn.Module, name: str) -> None:
    """`ValueError` unless an adapter may be plugged in under this name."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"name is {name!r}; accepted is a non-empty string without a dot")
    home = getattr(model, HOME, None)
    if home is not None and name in home._modules:
        raise ValueError(f"an adapter called {name!r} is attached already; detach it or choose another name "
                         f"(attached: {', '.join(home._modules)})")
    if hasattr(Adapters, name) or (home is not None and hasattr(home, name)):
        raise ValueError(f"name is {name!r}, which a module uses for itself; choose another")


@torch.no_grad()
def _refold(model, home: Adapters, adapter: Adapter, merged: tuple[str, ...]) -> None:
    """Set the weights below `adapter` to the original with every adapter of `merged` folded in, in order.

    All new weights are made before the first is written: an error leaves the model as it was.
    """
    all_pieces = {name: home._modules[name].pieces() for name in merged}
    folded = {}
    for path, own in adapter.pieces().items():
        if isinstance(own, OwnHead):             # acts through its hook, merged or not
            continue
        module = model.get_submodule(path)
        for parameter, fold in FOLDS.items():
            if not hasattr(own, fold) or getattr(module, parameter, None) is None:
                continue
            key = f"{path}.{parameter}"
            W = home.originals.get(key, getattr(module, parameter)).detach()
            original = W.clone()
            turned = parameter == "weight" and anatomy.is_transposed(module)
            here = [piece for name in merged if hasattr(piece := all_pieces[name].get(path), fold)]
            for piece in here:
                W = getattr(piece, fold)(W.T if turned else W)  # (out, in), or a bias (out,)
                W = W.T if turned else W
            folded[key] = (original if here else None, W)
    for key, (original, W) in folded.items():
        model.get_parameter(key).copy_(W)
        if original is not None:
            home.originals[key] = original
        else:
            home.originals.pop(key, None)
    home.merged = merged


# ---------------------------------------------------------------------------------------------
# The module socket
# ---------------------------------------------------------------------------------------------

class ModulePlug:
    """A forward hook on one module: y' = piece(x, y), for every adapter that is live, in order.

    Pieces that have a `before` also change what goes into the module: x' = piece.before(x).
    """

    def __init__(self, home: Adapters, path: str, module: nn.Module):
        self.home, self.path, self.pieces = home, path, {}
        self.handles = [module.register_forward_pre_hook(self.before),
                        module.register_forward_hook(self, with_kwargs=True)]

    def names(self) -> list[str]:
        return [n for n in self.home.active if n in self.pieces
                and (n not in self.home.merged or isinstance(self.pieces[n], OwnHead))]

    def before(self, module, args):
        for n in self.names():
            if hasattr(self.pieces[n], "before"):
                args = (self.pieces[n].before(args[0]), *args[1:])
        return args

    def __call__(self, module, args, kwargs, output):
        names = self.names()
        if not names:
            return None
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        y = output[0] if isinstance(output, tuple) else output
        if len(module._forward_hooks) > 1:      # someone else looks at y: pieces may change theirs
            y = y.clone()
        for n in names:
            y = self.pieces[n](x, y)
            self.home._modules[n].has_run.add(self.path)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class OwnHead(nn.Module):
    """y' = head(x), with the adapter's own trained copy of a classification head; y is not used.

    `copy` has the head's parameters by the head's names, at least in float32.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        # a copy of the head alone: of its hooks, which may lead to other adapters, it gets none
        instead = {id(m._forward_hooks): OrderedDict() for m in head.modules()}
        for p in head.parameters():                              # not by Module.to, which fake tensors refuse
            instead[id(p)] = nn.Parameter(p.detach().to(**trainable_like(head), copy=True))
        self.copy = copy.deepcopy(head, instead)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.copy(x.to(next(self.copy.parameters()).dtype)).to(y.dtype)


def own_heads(model: nn.Module) -> list[str]:
    """The paths of a classification head, which has nothing to start from, so that each task must train it.

    Models with a vocabulary to predict have none. What stands beside the base and is called after the
    head belongs to it (DistilBERT: `pre_classifier` and `classifier`), as in Hugging Face PEFT.
    """
    if getattr(model, "get_output_embeddings", lambda: model)() is not None:
        return []
    head = anatomy.anatomy(model).head
    return [name for name, _ in model.named_children() if head is not None and name.endswith(head)]


class IdleReport:
    """After the model's first forward pass: say which pieces never ran, instead of ignoring them."""

    def __init__(self, home: Adapters):
        self.home, self.told = home, set()

    def __call__(self, model, args, output):
        for name in self.home.live():
            if name in self.told:
                continue
            self.told.add(name)
            idle = self.home._modules[name].idle()
            if idle:
                some = ", ".join(idle[:4]) + (", …" if len(idle) > 4 else "")
                warnings.warn(
                    f"adapter {name!r}: {len(idle)} of {len(self.home._modules[name].sites)} pieces "
                    f"did not run in this forward pass ({some}). The model goes past the forward of "
                    "these modules, so what is trained there has no effect.", stacklevel=2)


# ---------------------------------------------------------------------------------------------
# The key/value socket
# ---------------------------------------------------------------------------------------------

def _plug_attention(home: Adapters, name: str, module: nn.Module, path: str, piece: nn.Module) -> None:
    """Let `piece` lengthen the keys and values of this attention layer.

    transformers looks its attention function up by name; every layer of the model is given the name
    of a wrapper around the one that it used, which leaves layers without pieces as they were.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    config = getattr(module, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    if implementation is None:
        raise TypeError(f"{path!r} ({type(module).__name__}) does not look its attention function up "
                        "through transformers' AttentionInterface, so it has no key/value socket")
    if not implementation.startswith(WRAPPED):
        AttentionInterface.register(
            WRAPPED + implementation, partial(attention_with_prefix, implementation=implementation))
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(
                WRAPPED + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
        config._attn_implementation = WRAPPED + implementation
        home.attention.append((config, implementation))
    if not hasattr(module, "minipeft_plug"):
        module.minipeft_plug = KeyValuePlug(home, path)
    module.minipeft_plug.pieces[name] = piece


def _unplug_attention(home: Adapters, name: str, module: nn.Module) -> None:
    del module.minipeft_plug.pieces[name]
    if not module.minipeft_plug.pieces:
        del module.minipeft_plug
    others = any(s == "key/value" for a in home._modules.values() if a.name != name for s, _ in a.sites)
    if not others:
        for config, implementation in home.attention:
            config._attn_implementation = implementation
        home.attention.clear()


class KeyValuePlug:
    """The key/value pieces of one attention layer; stands on it as a plain attribute."""

    def __init__(self, home: Adapters, path: str):
        self.home, self.path, self.pieces = home, path, {}


def attention_with_prefix(module, query, key, value, attention_mask, *, implementation, **kwargs):
    """softmax(q [P_K; K]ᵀ) [P_V; V], through the attention function that the model used before.

    Called by transformers with q (B, H, T, d), k and v (B, H_kv, S, d), all after RoPE.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plug = getattr(module, "minipeft_plug", None)
    for name in [n for n in plug.home.live() if n in plug.pieces] if plug else ():
        T, S = query.shape[2], key.shape[2]
        key, value = plug.pieces[name](key, value)         # (B, H_kv, P + S, d)
        P = key.shape[2] - S
        if attention_mask is not None:                     # (B, 1, T, S): the prefix is visible to all
            seen = attention_mask[..., -S:]
            shape = (*seen.shape[:-1], P)
            front = seen.new_ones(shape) if seen.dtype == torch.bool else seen.new_zeros(shape)
            attention_mask = torch.cat([front, seen], dim=-1)
        elif T > 1 and kwargs.get("is_causal", getattr(module, "is_causal", True)):
            # query t sees the prefix and the tokens up to itself
            see = torch.ones(T, P + S, dtype=torch.bool, device=key.device)
            attention_mask = see.tril(P + S - T)[None, None]
        plug.home._modules[name].has_run.add(plug.path)
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


# ---------------------------------------------------------------------------------------------
# The embedding socket, and what a longer sequence means for the rest of the inputs
# ---------------------------------------------------------------------------------------------

class RootPlug:
    """A hook before the model's forward: e -> [P; e], and positions that count what was prepended.

    A soft prompt of P vectors also lengthens the attention mask (by ones) and the labels (by -100).
    A key/value prefix of P positions stays inside the attention layers; tokens then stand at
    positions P, P + 1, …, as in Hugging Face PEFT, which keeps the prefix in the cache.
    """

    def __init__(self, home: Adapters):
        self.home = home

    def __call__(self, model, args, kwargs):
        prompts, prefix = [], 0
        for name in self.home.live():
            adapter = self.home._modules[name]
            for (socket, path), piece in zip(adapter.sites, adapter.pieces().values(), strict=True):
                if socket == "embedding":
                    prompts.append(piece)
                    adapter.has_run.add(path)
            lengths = {p.length for (s, _), p in zip(adapter.sites, adapter.pieces().values(), strict=True)
                       if s == "key/value"}
            prefix += max(lengths, default=0)
        if not prompts and not prefix:
            return None

        accepted = inspect.signature(model.forward).parameters
        kwargs = dict(zip(accepted, args, strict=False)) | kwargs
        ids, e = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        B, T = ids.shape if e is None else e.shape[:2]
        device = (ids if e is None else e).device
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        P = sum(piece.length for piece in prompts)

        if prompts and past == 0:
            if e is None:
                e = model.get_input_embeddings()(ids)            # (B, T, d)
            for piece in reversed(prompts):
                e = piece(e)                                     # (B, P + T, d)
            kwargs["input_ids"], kwargs["inputs_embeds"] = None, e
            if kwargs.get("labels") is not None and kwargs["labels"].dim() == 2:
                ignored = kwargs["labels"].new_full((B, P), -100)
                kwargs["labels"] = torch.cat([ignored, kwargs["labels"]], dim=1)
            if kwargs.get("token_type_ids") is not None:
                kwargs["token_type_ids"] = nn.functional.pad(kwargs["token_type_ids"], (P, 0))
        if P and kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = nn.functional.pad(kwargs["attention_mask"], (P, 0), value=1)

        positions = kwargs.get("position_ids")
        if positions is not None:                                # (B, T)
            positions = positions + P + prefix
            if P and past == 0:
                front = torch.arange(prefix, prefix + P, device=device).expand(positions.shape[0], P)
                positions = torch.cat([front, positions], dim=1)
            kwargs["position_ids"] = positions
        elif prefix and "position_ids" in accepted and not _encodes(model):
            length = T + (P if past == 0 else 0)
            kwargs["position_ids"] = torch.arange(past + prefix, past + prefix + length, device=device)[None]
        return (), kwargs


def _encodes(model) -> bool:
    """Whether every token sees all others, as in BERT."""
    return not getattr(model.config, "is_decoder", False) and not model.can_generate()
