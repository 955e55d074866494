"""Where is what in a transformer: embedding, blocks, attention, feed-forward, projections, head.

Nothing here knows an architecture by name. A part is recognised by its role:

    block          an item of a ModuleList that holds an attention
    attention      linears called q…, k…, v… (apart or fused), and the one after them that gives back
                   the hidden width: o
    feed-forward   the block's other linears: hidden -> inner (up, gate) and inner -> hidden (down)

Three things differ between families, and LoRA, (IA)³ and adapters must not care. GPT-2 stores weights as
(in, out), all others as (out, in). Some fuse q, k, v into one matrix; its output rows divide, for H query
heads, G key/value heads and heads of width d, as

    consecutive   q (H·d) | k (G·d) | v (G·d)                       c_attn, qkv_proj, Wqkv: GPT-2, Phi-3, MPT
    grouped       G times: q (H/G·d) | k (d) | v (d)                query_key_value: GPT-NeoX, BLOOM, Falcon

and some keep the feed-forward's two matrices in no module of their own (OPT, BERT).
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

Parts = tuple[tuple[str, tuple[range, ...]], ...]  # (("q", (range(0, 32),)), ("k", …), …)


@dataclass(frozen=True)
class Projection:
    """One linear module of a block.

    `role` is "q", "k", "v", "o", fused "qkv" or "kv"; "up", "gate", "down", or fused "gate_up".
    `transposed`: the weight is stored (in, out), as GPT-2 does. `parts` says which output rows do what.
    """

    path: str
    role: str
    in_features: int
    out_features: int
    transposed: bool
    parts: Parts

    def rows(self, part: str) -> torch.Tensor:
        """The output rows that make `part`, LongTensor (rows of the part,), on the CPU."""
        names = [name for name, _ in self.parts]
        if part not in names:
            has = ", ".join(names) or "none known: its width fits no layout of fused q, k, v"
            raise KeyError(f"{self.path} has no part {part!r} (parts: {has})")
        return torch.cat([torch.arange(r.start, r.stop) for r in self.parts[names.index(part)][1]])


@dataclass(frozen=True)
class Attention:
    """One attention. `path` is the module that holds its projections; `kind` is "self" or "cross"."""

    path: str
    kind: str
    projections: tuple[Projection, ...]
    num_heads: int  # H, of queries
    num_kv_heads: int  # G, of keys and values
    head_dim: int  # d

    def part(self, name: str) -> tuple[Projection, torch.Tensor]:
        """("q" | "k" | "v" | "o") -> (the projection that computes it, its output rows there)."""
        return _part(self, name)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward. `path` is None where its linears have no module of their own (OPT, BERT).

    `activation` is the class name of the nonlinearity, None where it is no module.
    """

    path: str | None
    projections: tuple[Projection, ...]
    activation: str | None

    def part(self, name: str) -> tuple[Projection, torch.Tensor]:
        """("up" | "gate" | "down") -> (the projection that computes it, its output rows there)."""
        return _part(self, name)


@dataclass(frozen=True)
class Block:
    """One layer. `side` is "encoder" (sees both ways) or "decoder" (sees what came before).

    `feed_forward` is None where there is not exactly one (a mixture of experts).
    """

    path: str
    side: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        found = tuple(p for a in self.attentions for p in a.projections)
        return found + (self.feed_forward.projections if self.feed_forward else ())


@dataclass(frozen=True)
class Anatomy:
    """A whole model. `head` is the language-model or classification head, None on a bare base model."""

    embedding: str | None
    head: str | None
    blocks: tuple[Block, ...]
    hidden_size: int

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def encoder(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if b.side == "encoder")

    @property
    def decoder(self) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if b.side == "decoder")


# ---------------------------------------------------------------- linear modules


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, Conv1D and whatever has `in_features` and `out_features` (4-bit ones)."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return is_transposed(module) or all(isinstance(s, int) for s in sizes)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), also where the weight is stored transposed or packed."""
    if not is_linear(module):
        raise TypeError(f"{type(module).__name__} is not linear; accepted are nn.Linear, Conv1D and 4-bit linears")
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of the base, without what is plugged in under `minipeft`."""
    return {path: m for path, m in model.named_modules() if path.split(".")[0] != "minipeft"}


def _inside(path: str, scope: str) -> bool:
    return path == scope or path.startswith(scope + ".") or not scope


# ---------------------------------------------------------------- the anatomy


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a transformers model, on any device, the meta device included.

    Raises ValueError if the model has no attention that can be recognised.
    """
    modules = _modules(model)
    blocks: list[Block] = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and not any(_inside(path, b.path) for b in blocks):
            blocks += filter(None, (_block(model, modules, f"{path}.{i}") for i in range(len(module))))
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be recognised: "
            "no list of blocks with linear modules called q…, k…, v… (q_proj, query, c_attn, query_key_value)"
        )
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    attention = blocks[0].attentions[0]
    return Anatomy(
        embedding=next((path for path, m in modules.items() if m is embedding), None),
        head=_head(model, modules),
        blocks=tuple(blocks),
        hidden_size=attention.projections[0].in_features,
    )


def _head(model: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    """The output embedding; else the last part outside the base model that has a linear (a classifier)."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return next((path for path, m in modules.items() if m is output), None)
    base = getattr(model, "base_model", model)
    outside = [name for name, child in model.named_children() if child is not base and name in modules]
    heads = [name for name in outside if any(is_linear(m) for m in modules[name].modules())]
    return heads[-1] if heads and base is not model else None


_QKV, _KV = re.compile(r"w?(q|query)_?(k|key)_?(v|value)|c_attn"), re.compile(r"w?(k|key)_?(v|value)")
_WORDS = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "wq": "q", "wk": "k", "wv": "v"}


def _role(path: str) -> str | None:
    """What the name says: "q", "k", "v", "qkv", "kv"; "?" for others about them (pos_key_proj); else None."""
    name = path.rpartition(".")[2].lower()
    if _QKV.match(name) or _KV.match(name):
        return "qkv" if _QKV.match(name) else "kv"
    words = name.split("_")
    return _WORDS.get(words[0]) or ("?" if any(w in _WORDS for w in words) else None)


def _block(model: nn.Module, modules: dict[str, nn.Module], path: str) -> Block | None:
    linears = {p: m for p, m in modules.items() if _inside(p, path) and is_linear(m)}
    holders = dict.fromkeys(p.rpartition(".")[0] for p in linears if _role(p) in ("q", "qkv"))  # in order, once
    attentions: list[Attention] = []
    for holder in holders:
        attentions.append(_attention(model, modules, linears, path, holder, first=not attentions))
    if not attentions:
        return None
    rest = {p: m for p, m in linears.items() if not any(_inside(p, a.path) for a in attentions)}
    config = getattr(model, "config", None)
    causal = [modules[p].is_causal for p in modules if _inside(p, holder) and hasattr(modules[p], "is_causal")]
    # BLOOM and MPT do not say whether they look ahead; of those that do not, only decoders keep a cache
    sees_back = causal[0] if causal else hasattr(config, "use_cache")
    side = "decoder" if sees_back or any(a.kind == "cross" for a in attentions) else "encoder"
    return Block(path, side, tuple(attentions), _feed_forward(modules, rest, path, attentions))


def _attention(model, modules, linears, block: str, holder: str, first: bool) -> Attention:
    named = [(p, _role(p)) for p in linears if p.rpartition(".")[0] == holder]
    named = [(p, role) for p, role in named if role in ("q", "k", "v", "qkv", "kv")]
    if "q" in [role for _, role in named]:  # GPT-2's cross-attention calls k and v c_attn, beside q_attn
        named = [(p, "kv" if role == "qkv" else role) for p, role in named]
    hidden = linear_shape(linears[named[0][0]])[1]
    scope, output = holder, []
    while len(scope) > len(block):  # BERT: q, k, v in attention.self, o in attention.output
        output = [p for p in linears if _inside(p, scope) and not _role(p) and linear_shape(linears[p])[0] == hidden]
        if output:
            break
        scope = scope.rpartition(".")[0]
    if output:
        named.append((output[-1], "o"))
    path = scope if output else holder

    shapes = {role: linear_shape(linears[p]) for p, role in named}
    config = next((m.config for p, m in modules.items() if _inside(p, path) and hasattr(m, "config")), model.config)
    H = getattr(modules[holder], "num_heads", None) or config.get_text_config().num_attention_heads
    d = (shapes["o"][1] if "o" in shapes else shapes["q"][0]) // H  # o takes H heads of width d
    if "qkv" in shapes:
        G = (shapes["qkv"][0] // d - H) // 2
    else:
        G = (shapes["k"][0] if "k" in shapes else shapes["kv"][0] // 2) // d
    projections = []
    for p, role in named:
        grouped = "key_value" in p.rpartition(".")[2]
        projections.append(_projection(p, role, linears[p], _fused_rows(role, H, G, d, grouped, shapes[role][0])))
    cross = not first or "cross" in path[len(block) :].lower()
    return Attention(path, "cross" if cross else "self", tuple(projections), H, G, d)


def _fused_rows(role: str, H: int, G: int, d: int, grouped: bool, total: int) -> Parts:
    """The output rows of a fused projection; () if H, G and d do not account for all of them."""
    if role not in ("qkv", "kv"):
        return ((role, (range(total),)),)
    groups = G if grouped else 1
    if G < 1 or H % G or total != ((H if role == "qkv" else 0) + 2 * G) * d:
        return ()
    found: dict[str, list[range]] = {part: [] for part in role}
    start = 0
    for _ in range(groups):
        for part in role:
            stop = start + (H if part == "q" else G) // groups * d
            found[part].append(range(start, stop))
            start = stop
    return tuple((part, tuple(ranges)) for part, ranges in found.items())


def _feed_forward(modules, rest: dict[str, nn.Module], block: str, attentions: list[Attention]) -> FeedForward | None:
    hidden = attentions[0].projections[0].in_features
    shapes = {p: linear_shape(m) for p, m in rest.items()}
    back = [p for p, shape in shapes.items() if shape[0] == hidden]
    down = next((p for p in reversed(back) if shapes[p][1] != hidden), back[-1] if back else None)
    if down is None:
        return None
    inner = shapes[down][1]
    ups = [p for p, shape in shapes.items() if p != down and shape in ((inner, hidden), (2 * inner, hidden))]
    if len(ups) not in (1, 2):
        return None
    # the gate goes through the activation; it says so in its name or comes first (T5: wi_0, wi_1)
    gate = next((p for p in ups if "gate" in p.rpartition(".")[2]), ups[0]) if len(ups) == 2 else None
    halves = (("gate", (range(inner),)), ("up", (range(inner, 2 * inner),)))
    projections = []
    for p in [*ups, down]:
        role = "down" if p == down else "gate" if p == gate else "up"
        if role == "up" and shapes[p][0] == 2 * inner:
            projections.append(_projection(p, "gate_up", rest[p], halves))
        else:
            projections.append(_projection(p, role, rest[p], ((role, (range(shapes[p][0]),)),)))

    common = os.path.commonprefix([p.split(".") for p in (down, *ups)])  # the names they begin with
    path = ".".join(common) if ".".join(common) != block else None
    leaves = [
        type(m).__name__
        for p, m in modules.items()
        if _inside(p, path or block) and not any(_inside(p, a.path) for a in attentions)
        if not any(True for _ in m.children()) and not any(True for _ in m.parameters())
    ]
    quiet = ("Dropout", "Identity", "Norm", "Embedding")
    activation = next((name for name in leaves if not any(word in name for word in quiet)), None)
    return FeedForward(path, tuple(projections), activation)


def _projection(path: str, role: str, module: nn.Module, parts: Parts) -> Projection:
    out_features, in_features = linear_shape(module)
    return Projection(path, role, in_features, out_features, is_transposed(module), parts)


def _part(where: Attention | FeedForward, name: str) -> tuple[Projection, torch.Tensor]:
    for p in where.projections:
        if name in (part for part, _ in p.parts) or (not p.parts and name in p.role):
            return p, p.rows(name)
    roles = ", ".join(p.role for p in where.projections)
    raise KeyError(f"no {name!r} in the {type(where).__name__.lower()} {where.path} (it has {roles})")


# ---------------------------------------------------------------- targets


def match(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The paths of the linear modules that `targets` means, in the model's order.

    - a list or tuple of suffixes, whole names between dots: "q_proj" or "self_attn.q_proj";
    - "attention": every projection of every attention;
    - "all-linear": every linear module except the output head, as in Hugging Face PEFT;
    - any other string: if it has only letters, digits, `_` and `.`, one suffix; otherwise a regular
      expression that must match the whole path, as in Hugging Face PEFT.

    Raises ValueError if a suffix or expression matches nothing or only what is not linear.
    """
    modules = _modules(model)
    linears = [path for path, m in modules.items() if is_linear(m)]
    if targets == "attention":
        wanted = {p.path for b in anatomy(model).blocks for a in b.attentions for p in a.projections}
    elif targets == "all-linear":
        head = _head(model, modules)
        wanted = {path for path in linears if head is None or not _inside(path, head)}
    elif isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        wanted = set(_by_expression(modules, targets))
    else:
        suffixes = [targets] if isinstance(targets, str) else list(targets)
        if not suffixes or not all(isinstance(s, str) and s for s in suffixes):
            raise ValueError(f"targets is {targets!r}; accepted are {_ACCEPTED}")
        wanted = {path for suffix in suffixes for path in _by_suffix(modules, suffix)}
    found = [path for path in linears if path in wanted]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear module for targets={targets!r}")
    return found


_ACCEPTED = 'module-name suffixes such as ("q_proj", "v_proj"), "attention", "all-linear", or a regular expression'


def _by_suffix(modules: dict[str, nn.Module], suffix: str) -> list[str]:
    found = [path for path in modules if path == suffix or path.endswith("." + suffix)]
    if not found:
        raise ValueError(f"no module of this model ends in {suffix!r}; " + _nearest(modules, suffix))
    for path in found:
        _must_be_linear(path, modules[path], suffix)
    return found


def _by_expression(modules: dict[str, nn.Module], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"targets {expression!r} is no regular expression: {error}; accepted are {_ACCEPTED}") from None
    found = [path for path in modules if pattern.fullmatch(path)]
    if not found:
        raise ValueError(
            f"no module path of this model matches the whole of the regular expression {expression!r}; "
            + _nearest(modules, expression)
        )
    linear = [path for path in found if is_linear(modules[path])]
    if not linear:
        _must_be_linear(found[0], modules[found[0]], expression)
    return linear


def _must_be_linear(path: str, module: nn.Module, target: str) -> None:
    if not is_linear(module):
        raise ValueError(
            f"target {target!r} means {path or 'the model itself'}, a {type(module).__name__}; "
            "accepted are linear modules (nn.Linear, Conv1D, 4-bit linears)"
        )


def _nearest(modules: dict[str, nn.Module], wanted: str) -> str:
    """"did you mean 'q_proj'? (modules: q_proj, k_proj, …)", compared over as many names as were given."""
    linears = [path.split(".") for path, m in modules.items() if is_linear(m)]
    suffixes = dict.fromkeys(".".join(names[-1 - wanted.count(".") :]) for names in linears)
    near = difflib.get_close_matches(wanted, [*suffixes, "attention", "all-linear"], n=1, cutoff=0.5)
    names = ", ".join(dict.fromkeys(names[-1] for names in linears)) or "no linear ones"
    return (f"did you mean {near[0]!r}? " if near else "") + f"(modules: {names})"
