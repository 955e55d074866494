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
import math
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain

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
        self.by_path = {path: piece for _, path, piece in sites}
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
        return dict(self.by_path)

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
        self.instead: dict[int, Mapping[str, nn.Module]] = {}  # thread -> what acts there instead, see `instead`
        self.originals: dict[str, Tensor] = {}  # weights and biases as they were before a merge
        self.trained_before = {n: p.requires_grad for n, p in model.named_parameters()}
        self.plugs: dict[str, ModulePlug] = {}
        self.attention: list[tuple] = []  # (config, the attention function it named before)
        self.prompts: PromptPlug | None = None
        self.handles: list = []
        # model.state_dict() is the base's own: drop what stands below this module.
        self.register_state_dict_post_hook(_drop_own_keys)
        self.register_load_state_dict_post_hook(_forgive_own_keys)

    def __setstate__(self, state: dict) -> None:
        """Copied or unpickled; in another process transformers does not know the wrapped attention yet."""
        super().__setstate__(state)
        for _, implementation in self.attention:
            register_attention(implementation)

    def lengths(self) -> tuple[int, int]:
        """Positions that the live soft prompts take, and those that the live key/value prefixes take."""
        found = {"embedding": 0, "key/value": 0}
        for name in self.live():
            adapter = self._modules[name]
            socket, path = adapter.sites[0]                      # a method uses one socket, and heads come last
            if socket in found:
                found[socket] += adapter.get_submodule(path).length
        return found["embedding"], found["key/value"]

    def prepend(self, e: Tensor) -> Tensor:
        """[P; e] with the soft prompts of all live adapters, the first attached in front. e (B, T, d)."""
        for name in reversed(self.live()):
            adapter = self._modules[name]
            socket, path = adapter.sites[0]
            if socket == "embedding":
                e = adapter.get_submodule(path)(e)               # (B, P + T, d)
                adapter.has_run.add(path)
        return e

    def live(self) -> tuple[str, ...]:
        """The adapters that act on a forward pass of this thread: active, and not folded into the weights."""
        if threading.get_ident() in self.instead:
            return ()
        return tuple(n for n in self.active if n not in self.merged)


def _drop_own_keys(module, state_dict, prefix, local_metadata):
    for key in [k for k in state_dict if k.startswith(prefix)]:
        del state_dict[key]


def _forgive_own_keys(module, incompatible):
    own = f".{HOME}."                            # in front of it, the model's own place in what it may be a part of
    incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if own not in f".{k}"]


# ---------------------------------------------------------------------------------------------
# The public verbs
# ---------------------------------------------------------------------------------------------

def attach(model: nn.Module, method, name: str = "default") -> Adapter:
    """Freeze the base, plug `method` in, make it active beside what is active already.

    Attaching a second method makes a hybrid: both act, and both are trained. `activate` chooses otherwise, and
    `mp.adapters(model)[name].requires_grad_(False)` freezes one, which acts on while another learns beside it.
    On a classification model each adapter also gets, and trains, its own copy of the output head; of several
    active ones the last one's head answers.
    Raises before anything is changed: `ValueError` for a bad name or for targets that the model
    does not have, `TypeError` for something that is not a method.
    """
    if not hasattr(method, "pieces") or isinstance(method, type):
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
    name, pieces = adapter.name, adapter.pieces()
    for socket, path in adapter.sites:
        if socket == "key/value":
            _check_attention(model.get_submodule(path), path)
    home = getattr(model, HOME, None)
    if home is None:
        home = Adapters(model)
        model.requires_grad_(False)
        model.add_module(HOME, home)
        home.handles += [
            model.register_forward_pre_hook(RootPlug(home), with_kwargs=True),
            model.register_forward_hook(IdleReport(home)),
        ]
    for socket, path in adapter.sites:
        if socket == "module":
            here = home.plugs.setdefault(path, ModulePlug(home, path))
            here.pieces[name] = pieces[path]
            here.settle(model)
        elif socket == "key/value":
            _plug_attention(home, name, model, path, pieces[path])
        elif home.prompts is None:
            home.prompts = PromptPlug(home, model)
    home.add_module(name, adapter)
    home.active += (name,)


def detach(model: nn.Module, name: str = "default") -> None:
    """Take an adapter out. After the last one the model is bit-identical to before."""
    home, adapter = _home(model), the_adapter(model, name)
    if name in home.merged:
        unmerge(model, name)
    for socket, path in adapter.sites:
        if socket == "module":
            here = home.plugs[path]
            del here.pieces[name]
            here.settle(model)
            if not here.pieces:
                del home.plugs[path]
        elif socket == "key/value":
            _unplug_attention(home, name, model.get_submodule(path))
        elif not _others_in(home, name, "embedding"):
            home.prompts.remove()
            home.prompts = None
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
        if before is not None and hasattr(model, HOME):
            activate(model, [n for n in before if n in _home(model)._modules])     # one may have been detached


@contextlib.contextmanager
def instead(model: nn.Module, pieces: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Within it, and in this thread alone, these pieces act in the module sockets instead of what is active.

    pieces  path -> piece, asked at each call with `get`. Nothing is plugged in for it: a piece acts at a path
            at which some attached adapter has one

    Forward passes in other threads go on with what acts there.
    """
    home = getattr(model, HOME, None)
    if home is None:
        yield model
        return
    check_nothing_merged(model)
    thread = threading.get_ident()
    before = home.instead.get(thread)
    home.instead[thread] = pieces
    try:
        yield model
    finally:
        del home.instead[thread]
        if before is not None:
            home.instead[thread] = before


def merge(model: nn.Module, name: str = "default", *, requantize: bool = False) -> dict[str, float]:
    """Fold an adapter into the base: W <- piece.merged(W), b <- piece.merged_bias(b). No piece runs afterwards.

    The weights as they were are kept, so that `unmerge` gives them back to the bit.

    requantize  what becomes of 4-bit weights. False: they are dequantised and keep the merged weight in full
                precision, which takes 8 times the memory and changes no logits. True: it is rounded to
                4 bits again, which loses a part of what the adapter learnt

    Returns the measured loss of rounding, ‖stored - merged‖ / ‖merged - base‖ by path, for every weight that
    was requantised or has 16 bits, and warns with the mean: from 1 on, rounding moves the weight as far as the
    adapter did. In float32 nothing is told: there it is 1e-7 of the weight.
    Raises `TypeError` where the method's pieces cannot be folded, and `ValueError` where another adapter that acts
    on the same module would then do something else, both before anything is changed.
    """
    home, adapter = _home(model), the_adapter(model, name)
    if name in home.merged:
        raise ValueError(f"adapter {name!r} is merged already")
    if name not in home.active:
        raise ValueError(f"adapter {name!r} is not active; activate it before merging")
    owners: dict[Tensor, list[str]] = {}
    for path, module in anatomy.base_modules(model).items():
        if isinstance(module._parameters.get("weight"), Tensor):
            owners.setdefault(module.weight, []).append(path)
    for path, piece in adapter.pieces().items():
        if isinstance(piece, OwnHead):
            continue
        if not any(hasattr(piece, fold) for fold in FOLDS.values()):
            raise TypeError(
                f"{type(adapter.method).__name__} cannot be merged: {type(piece).__name__} at "
                f"{path!r} is not a change of a weight (LoRA, DoRA and (IA)³ are)"
            )
        module = model.get_submodule(path)
        if not hasattr(piece, "merged") or hasattr(module, "requantized"):
            continue
        weight = module.weight
        if not weight.is_floating_point():
            raise TypeError(f"{path!r} holds {weight.dtype} codes; an adapter can be merged into a "
                            "floating-point weight only")
        twins = [twin for twin in owners[weight] if twin != path]
        if twins:
            raise ValueError(f"{path!r} shares its weight with {twins[0]!r}; merging would change both")
    _check_company(home, name)
    lost = _refold(model, home, adapter, (*home.merged, name), requantize)
    if lost:
        again = requantize and hasattr(model.get_submodule(next(iter(lost))), "requantized")
        warnings.warn(f"adapter {name!r} was merged into {len(lost)} weights of {4 if again else 16} bits; rounding moved "
                      f"them by {100 * sum(lost.values()) / len(lost):.0f} % of what the adapter changed (mean over the "
                      "weights)" + (". requantize=False keeps full precision" if again else ""), stacklevel=2)
    return lost


def unmerge(model: nn.Module, name: str = "default") -> None:
    """Take a merged adapter out of the weights again, to the bit (from the kept originals)."""
    home, adapter = _home(model), the_adapter(model, name)
    if name not in home.merged:
        raise ValueError(f"adapter {name!r} is not merged (merged: {list(home.merged) or 'none'})")
    _refold(model, home, adapter, tuple(n for n in home.merged if n != name))


def fold(model: nn.Module, name: str = "default") -> Adapter:
    """Replace pieces that are made by a network with what the network gives: the same logits, fewer parameters.

    A folded `PTuning` is a `PromptTuning`, a folded `PrefixTuning` one with reparameterize=False; they train
    on as such. Returns the new `Adapter`. Raises `TypeError` for a method that has no network to fold.
    """
    home, adapter = _home(model), the_adapter(model, name)
    folded = folded_adapter(adapter)
    if folded is adapter:
        raise TypeError(f"adapter {name!r} is {adapter.method}, which has no network to fold away "
                        "(PTuning and PrefixTuning with reparameterize=True have)")
    active, order = home.active, list(home._modules)
    if not any(p.requires_grad for p in adapter.parameters()):
        folded.requires_grad_(False)                             # frozen beside one that learns
    detach(model, name)
    plug(model, folded)
    home = _home(model)
    for n in order:                                              # at its old place among the others
        home._modules[n] = home._modules.pop(n)
    home.active = active
    return folded


def folded_adapter(adapter: Adapter) -> Adapter:
    """The adapter with its networks folded away, not plugged in; itself if it has none."""
    sites = [(socket, path, piece) for (socket, path), piece
             in zip(adapter.sites, adapter.pieces().values(), strict=True)]
    if not any(hasattr(piece, "folded") for *_, piece in sites):
        return adapter
    return Adapter(adapter.name, adapter.method.folded(),
                   [(socket, path, piece.folded() if hasattr(piece, "folded") else piece)
                    for socket, path, piece in sites])


def active_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are active, in order."""
    return tuple(getattr(model, HOME).active) if hasattr(model, HOME) else ()


def merged_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are merged into the base, in order."""
    return tuple(getattr(model, HOME).merged) if hasattr(model, HOME) else ()


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on this model by name, in the order in which they came; empty without any."""
    home = getattr(model, HOME, None)
    return dict(home.named_children()) if home is not None else {}


def live_pieces(model: nn.Module) -> list[nn.Module]:
    """The pieces that act at present."""
    home = getattr(model, HOME, None)
    return [piece for name in home.live() for piece in home._modules[name].pieces().values()] if home is not None else []


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by name, without any adapter's."""
    return {n: p for n, p in model.named_parameters() if not n.startswith(HOME + ".")}


def trainable_like(module: nn.Module) -> dict:
    """`device` and `dtype` for a piece beside this module: never less than float32."""
    tensor = next(chain(module.parameters(), module.buffers()))  # a 4-bit linear may have no parameter
    dtype = getattr(module, "dtype", tensor.dtype)
    wide = dtype in (torch.float32, torch.float64)
    return {"device": tensor.device, "dtype": dtype if wide else torch.float32}


@contextlib.contextmanager
def only_at(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within it, the output head sees only the hidden states at `positions`, a bool (B, T).

    The model then returns logits (N, vocabulary), N = positions.sum(), instead of (B, T, vocabulary).
    """
    this_thread = threading.get_ident()         # others may be in a forward pass of their own

    def select(module, args):
        if threading.get_ident() != this_thread:
            return None
        h = args[0]                             # (B, P + T, d): a soft prompt makes it longer
        return (h[:, h.shape[1] - positions.shape[1]:][positions], *args[1:])  # (N, d)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def cast_once(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, frozen linear modules hold a copy of their weight in `dtype`, which they compute with under autocast.

    Autocast itself casts a frozen weight in every pass, and each pass keeps a copy of its own for the way back.
    The numbers are the same. None: nothing is done. Weights are taken to stay as they are within it.
    """
    from transformers.pytorch_utils import Conv1D

    cast = []
    try:
        for module in anatomy.base_modules(model).values():
            own, W = vars(module), getattr(module, "weight", None)
            if (dtype and isinstance(module, nn.Linear | Conv1D) and W.dtype == torch.float32 and not W.requires_grad
                    and "forward" not in own):                   # not twice: an evaluation while training
                twin = copy.copy(module)                         # its bias, no hooks: they are called around `forward`
                twin._parameters = module._parameters | {"weight": nn.Parameter(W.to(dtype), requires_grad=False)}
                module.forward = partial(_forward_of, module, twin)
                cast.append(module)
        yield
    finally:
        for module in cast:
            del module.forward


def _forward_of(module: nn.Module, twin: nn.Module, x: Tensor) -> Tensor:
    chosen = twin if torch.is_autocast_enabled(x.device.type) else module
    return type(chosen).forward(chosen, x)


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
    if hasattr(home if home is not None else Adapters(nn.Module()), name):
        raise ValueError(f"name is {name!r}, which a module uses for itself; choose another")


def check_nothing_merged(model: nn.Module) -> None:
    """`ValueError` where an adapter is merged into the base, which then is not the base."""
    for name in merged_names(model):
        raise ValueError(f"adapter {name!r} is merged into the base; unmerge it first")


def _check_company(home: Adapters, name: str) -> None:
    """`ValueError` where folding this adapter in first changes what another live one does at the same module.

    It does not where both only add to y; where both only scale x; where x is scaled for the folded weight as it was
    for the piece; and where the other comes later, works on y and does not look at the weight.
    """
    pieces = {n: home._modules[n].pieces() for n in home.live()}
    for path, own in pieces[name].items():
        for n in home.live():
            other = pieces[n].get(path)
            if other is None or n == name or isinstance(own, OwnHead) or isinstance(other, OwnHead):
                continue
            later = home.active.index(n) > home.active.index(name) and not getattr(other, "reads_weight", False)
            scaled = hasattr(own, "before"), hasattr(other, "before")
            added = getattr(own, "only_adds", False) and getattr(other, "only_adds", False)
            if not (added or all(scaled) or (not scaled[0] and (scaled[1] or later))):
                raise ValueError(f"adapters {n!r} and {name!r} both act on {path!r}, where {type(other).__name__} would no "
                                 f"longer do the same with {name!r} folded into the weight; merge or deactivate {n!r} first")


@torch.no_grad()
def _refold(model, home: Adapters, adapter: Adapter, merged: tuple[str, ...],
            requantize: bool | None = None) -> dict[str, float]:
    """Set the weights below `adapter` to the original with every adapter of `merged` folded in, in order.

    All new weights are made before the first is written: an error leaves the model as it was. A weight that was
    in 4 bits returns to them if `requantize`, by default if it is in them now; see `merge` for the result.
    """
    all_pieces = {name: home._modules[name].pieces() for name in merged}
    folded, lost = {}, {}
    for path, own in adapter.pieces().items():
        if isinstance(own, OwnHead):             # acts through its hook, merged or not
            continue
        module = model.get_submodule(path)
        for parameter, fold in FOLDS.items():
            if not hasattr(own, fold) or getattr(module, parameter, None) is None:
                continue
            key = f"{path}.{parameter}"
            codes = parameter == "weight" and hasattr(module, "requantized")  # a 4-bit linear
            original = home.originals.get(key)
            if original is None:
                original = module.q if codes else getattr(module, parameter).detach().clone()
            original = original.to(next(chain(module.parameters(), module.buffers())).device)  # the model may have moved
            before = module.dequantize(original) if codes else original
            W = before.to(torch.promote_types(before.dtype, torch.float32))  # rounded once, when all are folded in
            turned = parameter == "weight" and anatomy.is_transposed(module)
            here = [piece for name in merged if hasattr(piece := all_pieces[name].get(path), fold)]
            for piece in here:
                W = getattr(piece, fold)(W.T if turned else W)  # (out, in), or a bias (out,)
                W = W.T if turned else W
            if not here:
                W = original
            else:
                again = codes and (module.merged is None if requantize is None else requantize)
                exact, W = W, module.requantized(W) if again else W.to(before.dtype)
                if parameter == "weight" and (again or W.dtype != exact.dtype):
                    error, change = ((t - exact).norm() for t in (module.dequantize(W) if again else W, before))
                    lost[path] = (error / change).item() if error else 0.0
            folded[key] = (original if here else None, W, codes)
    for key, (original, W, codes) in folded.items():
        path, _, parameter = key.rpartition(".")
        if codes:
            model.get_submodule(path).store(W)
        else:
            model.get_parameter(key).copy_(W)
        if original is not None:
            home.originals[key] = original
        else:
            home.originals.pop(key, None)
    home.merged = merged
    for path in adapter.pieces():
        home.plugs[path].settle(model)
    return lost


# ---------------------------------------------------------------------------------------------
# The module socket
# ---------------------------------------------------------------------------------------------

class ModulePlug:
    """A forward hook on one module: y' = piece(x, y), for every adapter that is live, in order.

    Pieces that have a `before` also change what goes into the module: x' = piece.before(x).
    """

    def __init__(self, home: Adapters, path: str):
        self.home, self.path, self.pieces, self.handles = home, path, {}, []

    def settle(self, model: nn.Module) -> None:
        """Hook the module while a piece here is not folded into its weight: a merged model is not slowed down."""
        wanted = any(n not in self.home.merged or isinstance(p, OwnHead) for n, p in self.pieces.items())
        if wanted and not self.handles:
            module = model.get_submodule(self.path)
            self.handles = [module.register_forward_pre_hook(self.before),
                            module.register_forward_hook(self, with_kwargs=True)]
        elif not wanted:
            for handle in self.handles:
                handle.remove()
            self.handles = []

    def acting(self) -> list[tuple[str | None, nn.Module]]:
        """The pieces that act in this thread, in order, each with the name of its adapter."""
        instead = self.home.instead.get(threading.get_ident())
        if instead is not None:
            piece = instead.get(self.path)
            return [] if piece is None else [(None, piece)]
        return [(n, self.pieces[n]) for n in self.home.active if n in self.pieces
                and (n not in self.home.merged or isinstance(self.pieces[n], OwnHead))]

    def before(self, module, args):
        for _, piece in self.acting():
            if hasattr(piece, "before"):
                args = (piece.before(args[0]), *args[1:])
        return args

    def __call__(self, module, args, kwargs, output):
        acting = self.acting()
        if not acting:
            return None
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        y = output[0] if isinstance(output, tuple) else output
        if len(module._forward_hooks) > 1:      # someone else looks at y: pieces may change theirs
            y = y.clone()
        for n, piece in acting:
            y = piece(x, y)
            if getattr(piece, "keeps_output", False) and piece is not acting[-1][1]:
                y = y.clone()                   # the next piece may write into what this one keeps
            if n is not None:
                self.home._modules[n].has_run.add(self.path)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class OwnHead(nn.Module):
    """y' = head(x), with the adapter's own trained copy of a classification head; y is not used.

    `copy` has the head's parameters by the head's names, at least in float32.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        # a copy of the head alone: of its hooks, which may lead to other adapters, it gets none
        instead = {id(hooks): OrderedDict() for m in head.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)}
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
    head = anatomy.output_head(model)
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

def attention_sites(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Where prefixes go: path of the module that computes attention -> (key/value heads G, head width d).

    The self-attention of every layer; of an encoder-decoder, of the decoder's layers alone.
    """
    found = anatomy.anatomy(model)
    blocks, sites = found.blocks, {}
    if getattr(model.config, "is_encoder_decoder", False):
        blocks = found.decoder
        for path, module in model.get_decoder().named_modules():
            if "Position" in type(module).__name__:                  # BART; T5 adds a bias for distances instead
                raise TypeError(f"{path!r} ({type(module).__name__}) of the decoder counts positions by itself, so the "
                                "text cannot be moved behind a prefix")
    for block in blocks:
        for attention in block.attentions:
            if attention.kind == "self":
                path = attention.projections[0].path.rpartition(".")[0]  # BERT: attention.self
                _check_attention(model.get_submodule(path), path)
                if not all(p.parts for p in attention.projections):      # then G and d are a guess
                    raise TypeError(f"{path!r} makes queries, keys and values in several steps, or fused in an unknown "
                                    "order; how wide a prefix must be is not known there")
                sites[path] = attention.num_kv_heads, attention.head_dim
    return sites


def _check_attention(module: nn.Module, path: str) -> None:
    named = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if named is None or not hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise TypeError(f"{path!r} ({type(module).__name__}) does not look its attention function up "
                        "through transformers' AttentionInterface, so it has no key/value socket")
    if "flash" in named or "flex" in named:
        raise TypeError(f"{path!r} computes attention by {named.removeprefix(WRAPPED)!r}, whose mask has no room for a prefix; accepted are "
                        "'sdpa' and 'eager': load the model with attn_implementation='sdpa'")


def _plug_attention(home: Adapters, name: str, model: nn.Module, path: str, piece: nn.Module) -> None:
    """Let `piece` lengthen the keys and values of this attention layer.

    transformers looks its attention function up by name; every layer of the model is given the name
    of a wrapper around the one that it used, which leaves layers without pieces as they were.
    """
    module = model.get_submodule(path)
    config = module.config
    implementation = config._attn_implementation
    if not implementation.startswith(WRAPPED):
        register_attention(implementation)
        config._attn_implementation = WRAPPED + implementation
        home.attention.append((config, implementation))
    if not hasattr(module, "minipeft_plug"):
        stack = path.partition(".")[0]                           # T5: encoder or decoder
        biased = [m for p, m in anatomy.base_modules(model).items()
                  if hasattr(m, "relative_attention_bias") and p.partition(".")[0] == stack]
        module.minipeft_plug = KeyValuePlug(home, path, (biased or [module])[0])
    module.minipeft_plug.pieces[name] = piece


def register_attention(implementation: str) -> None:
    """Make the wrapper around this attention function known to transformers, in this process."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(WRAPPED + implementation, partial(attention_with_prefix, implementation=implementation))
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(WRAPPED + implementation, ALL_MASK_ATTENTION_FUNCTIONS[implementation])


def _unplug_attention(home: Adapters, name: str, module: nn.Module) -> None:
    del module.minipeft_plug.pieces[name]
    if not module.minipeft_plug.pieces:
        del module.minipeft_plug
    if not _others_in(home, name, "key/value"):
        for config, implementation in home.attention:
            config._attn_implementation = implementation
        home.attention.clear()


def _others_in(home: Adapters, name: str, socket: str) -> bool:
    """Whether an adapter other than `name` has a piece in this socket."""
    return any(s == socket for a in home._modules.values() if a.name != name for s, _ in a.sites)


class KeyValuePlug:
    """The key/value pieces of one attention layer; stands on it as a plain attribute."""

    def __init__(self, home: Adapters, path: str, first: nn.Module):
        self.home, self.path, self.pieces = home, path, {}
        self.first = first                                 # the layer that knows T5's position bias, else itself


def attention_with_prefix(module, query, key, value, attention_mask, *, implementation, **kwargs):
    """softmax(q [P_K; K]ᵀ) [P_V; V], through the attention function that the model used before.

    Called by transformers with q (B, H, T, d), k and v (B, G, S, d), all after RoPE.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plug = getattr(module, "minipeft_plug", None)
    S = key.shape[2]
    for name in [n for n in plug.home.live() if n in plug.pieces] if plug else ():
        key, value = plug.pieces[name](key, value)         # (B, G, P + S, d)
        plug.home._modules[name].has_run.add(plug.path)
    T, P = query.shape[2], key.shape[2] - S
    if P:
        causal = kwargs.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        if attention_mask is not None:                     # (B, 1, T, S): the prefix is visible to all
            seen = attention_mask[..., -S:]
            shape = (*seen.shape[:-1], P)
            front = seen.new_ones(shape) if seen.dtype == torch.bool else seen.new_zeros(shape)
            attention_mask = torch.cat([front, seen], dim=-1)
        elif T > 1 and causal:                             # query t sees the prefix and the tokens up to itself
            see = torch.ones(T, P + S, dtype=torch.bool, device=key.device)
            attention_mask = see.tril(P + S - T)[None, None]
        if kwargs.get("position_bias") is not None:        # T5 adds a number for the distance of query and key
            kwargs["position_bias"] = _longer_bias(plug, kwargs["position_bias"], P, S, T)
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)
    return attend(module, query, key, value, attention_mask, **kwargs)


def _longer_bias(plug: KeyValuePlug, bias: Tensor, P: int, S: int, T: int) -> Tensor:
    """T5's bias (1, H, T, S), with the distances to the prefix in front: (1, H, T, P + S).

    Only the first layer can compute it; the others are handed what the first one used.
    """
    front = plug.first.compute_bias(T, P + S, device=bias.device, past_seen_tokens=P + S - T)[..., :P]
    return torch.cat([front.to(bias.dtype), bias], dim=-1)


def keys_and_values(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every layer's attention computes for these tokens: path -> K, V, each (G, length, d), after RoPE.

    ids (length,). Of the bare base, in evaluation mode. An encoder-decoder reads them on both sides.
    """
    name = "keys and values"
    recorder = Adapter(name, None, [("key/value", path, Recorder()) for path in attention_sites(model)])
    home, training = getattr(model, HOME, None), model.training
    before, merged = (home.active, home.merged) if home else ((), ())
    ids = ids.to(next(model.parameters()).device)[None]
    inputs = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    plug(model, recorder)
    try:
        activate(model, [*merged, name])
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, **inputs)
        return {path: piece.seen for path, piece in recorder.pieces().items()}
    finally:
        model.train(training)
        getattr(model, HOME).active = (*before, name)
        detach(model, name)


class Recorder(nn.Module):
    """A key/value piece that adds nothing and remembers what passed."""

    length = 0

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = key[0].clone(), value[0].clone()       # (G, S, d)
        return key, value


# ---------------------------------------------------------------------------------------------
# The embedding socket, and what a longer sequence means for the rest of the inputs
# ---------------------------------------------------------------------------------------------

def embedding_site(model: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the token embedding that soft prompts extend: an encoder-decoder's encoder's."""
    embedding = _reader(model).get_input_embeddings()
    return next((path, m) for path, m in anatomy.base_modules(model).items() if m is embedding)


def _reader(model: nn.Module) -> nn.Module:
    """The part that reads the input: the encoder of an encoder-decoder, else the whole model."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def position_limit(model: nn.Module) -> float:
    """How many positions the model has for tokens, infinity where nothing says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return limit - table.padding_idx - 1                 # RoBERTa begins to count behind its padding
    return limit


def check_length(model: nn.Module, length: int) -> None:
    """`ValueError` unless a prompt or prefix of this length leaves the model a position for the text."""
    limit = position_limit(model)
    if length >= limit:
        raise ValueError(f"length is {length}; {type(model).__name__} has {limit} positions, and at least one "
                         "must be left for the text")


def added_length(model: nn.Module) -> int:
    """Positions that the live soft prompts and prefixes take."""
    home = getattr(model, HOME, None)
    return sum(home.lengths()) if home is not None else 0


class PromptPlug:
    """A hook on the token embedding: e -> [P; e], when RootPlug has put room in front of the ids.

    On an encoder-decoder there is a RootPlug on the encoder too: `generate` calls the encoder by itself.
    """

    def __init__(self, home: Adapters, model: nn.Module):
        self.home, self.room = home, {}                          # thread -> positions: passes may run side by side
        reader = _reader(model)
        self.handles = [reader.get_input_embeddings().register_forward_hook(self),
                        reader.register_forward_hook(self.forget, always_call=True)]
        if reader is not model:
            self.handles.append(reader.register_forward_pre_hook(RootPlug(home, encoder=True), with_kwargs=True))

    def __call__(self, module, args, output):
        room = self.room.pop(threading.get_ident(), 0)
        return self.home.prepend(output[:, room:]) if room else None

    def forget(self, module, args, output):
        self.room.pop(threading.get_ident(), None)               # also after an error on the way

    def remove(self):
        for handle in self.handles:
            handle.remove()


class RootPlug:
    """A hook before the model's forward: room for e -> [P; e], and positions that count what was prepended.

    A soft prompt of P vectors also lengthens the attention mask (by ones) and the labels (by -100). The
    token ids are lengthened by one that stands for nothing, so that what a model reads from them (where
    padding is, which token is the last) stays true; PromptPlug puts the vectors in their place.
    A key/value prefix of P positions stays inside the attention layers; tokens then stand at
    positions P, P + 1, …, as in Hugging Face PEFT, which keeps the prefix in the cache.
    """

    def __init__(self, home: Adapters, encoder: bool = False):
        self.home, self.encoder = home, encoder

    def __call__(self, model, args, kwargs):
        P, prefix = self.home.lengths()
        if not P and not prefix:
            return None
        accepted = inspect.signature(model.forward).parameters
        kwargs = dict(zip(accepted, args, strict=False)) | kwargs
        if getattr(model.config, "is_encoder_decoder", False) and not self.encoder:
            if P and kwargs.get("attention_mask") is not None:   # the encoder's, read again by cross-attention
                kwargs["attention_mask"] = nn.functional.pad(kwargs["attention_mask"], (P, 0), value=1)
            return (), kwargs

        ids, e = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        B, T = ids.shape if e is None else e.shape[:2]
        device = (ids if e is None else e).device
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if P and mask is not None and not (self.encoder and mask.shape[1] == P + T):
            kwargs["attention_mask"] = mask = nn.functional.pad(mask, (P, 0), value=1)

        if P and past == 0:
            if e is None:
                kwargs["input_ids"] = ids = torch.cat([ids.new_full((B, P), _nothing(model)), ids], dim=1)
                self.home.prompts.room[threading.get_ident()] = P
            else:
                kwargs["inputs_embeds"] = self.home.prepend(e)
            T += P
            labels = kwargs.get("labels")
            if labels is not None and labels.shape == (B, T - P) and not labels.is_floating_point():
                kwargs["labels"] = nn.functional.pad(labels, (P, 0), value=-100)
            if kwargs.get("token_type_ids") is not None:
                kwargs["token_type_ids"] = nn.functional.pad(kwargs["token_type_ids"], (P, 0))

        if positions is not None:                                # (B, T)
            positions = positions + P + prefix
            if P and past == 0:
                front = torch.arange(prefix, prefix + P, device=device).expand(positions.shape[0], P)
                positions = torch.cat([front, positions], dim=1)
            kwargs["position_ids"] = positions
        elif prefix and "position_ids" in accepted:
            kwargs["position_ids"] = _positions(model, ids, mask, past, T, device, prefix)
        return (), kwargs


def _nothing(model: nn.Module) -> int:
    """A token id that means neither padding nor an end."""
    text = model.config.get_text_config()
    pad, end = (getattr(text, f"{name}_token_id", None) for name in ("pad", "eos"))
    return next(i for i in range(text.vocab_size) if i not in (pad, *(end if isinstance(end, list) else [end])))


def _positions(model: nn.Module, ids, mask, past: int, T: int, device, start: int) -> Tensor:
    """The positions that the model gives to its input, but from `start` instead of 0: (B, T) or (1, T).

    Most count 0, 1, 2, … RoBERTa counts the ids that are no padding, OPT the ones of the mask.
    """
    for module in anatomy.base_modules(model).values():
        if ids is not None and hasattr(module, "create_position_ids_from_input_ids"):
            return module.create_position_ids_from_input_ids(ids, module.padding_idx, start)
        if isinstance(module, nn.Embedding) and mask is not None and hasattr(module, "offset"):
            return ((mask.cumsum(1) + start) * mask - 1)[:, past:].long()
    return torch.arange(start + past, start + past + T, device=device)[None]
