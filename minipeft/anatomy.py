"""Where is what in a transformer: embedding, blocks, attention, feed-forward, projections, head.

Nothing here knows an architecture by name, with one exception below. A part is recognised by its role:

    block          an item of a ModuleList that holds an attention
    attention      linears called q…, k…, v… (apart or fused), and the one after them that gives back
                   the hidden width: o
    feed-forward   among the block's other linears, hidden -> inner (up, gate) and inner -> hidden (down)

Three things differ between families, and no method should have to care. GPT-2 stores weights as (in, out),
all others as (out, in). OPT and BERT keep the feed-forward's two matrices in no module of their own. And some
fuse q, k, v into one matrix. With H query heads, G key/value heads and heads of width d, its output rows are

    consecutive   q (H d) | k (G d) | v (G d)               c_attn, qkv_proj, Wqkv: GPT-2, Phi-3, MPT
    grouped       G times  q (H/G d) | k (d) | v (d)        query_key_value: GPT-NeoX, BLOOM, Falcon

The name tells the two apart; nothing in the shapes does. GPTBigCode says in an attribute that it is grouped.
CodeGen says nothing: 4 times q | v | k, known by the name of its class. Attention that makes keys and values in
two steps (DeepSeek: kv_a_proj_with_mqa, kv_b_proj) has no such rows, and none are given.
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

Parts = dict[str, list[range]]  # {"q": [range(0, 32)], "k": …}: the output rows that make each part


@dataclass(frozen=True)
class Projection:
    """One linear module of a block.

    `role` is "q", "k", "v", "o", fused "qkv" or "kv"; "up", "gate", "down", or fused "gate_up".
    `transposed`: the weight is stored (in, out), as GPT-2 does. `parts` divides the output rows.
    """

    path: str
    role: str
    in_features: int
    out_features: int
    transposed: bool
    parts: Parts

    def rows(self, part: str) -> torch.Tensor:
        """The output rows that make `part`: LongTensor (rows of the part,), on the CPU. KeyError if none do."""
        if part not in self.parts:
            has = ", ".join(self.parts) or "unknown, for it fits no layout of fused q, k, v"
            raise KeyError(f"{self.path} has no part {part!r} (parts: {has})")
        return torch.cat([torch.arange(r.start, r.stop, device="cpu") for r in self.parts[part]])


def _part(self, name: str) -> tuple[Projection, torch.Tensor]:
    """("q", "k", "v", "o"; "up", "gate", "down") -> (the projection that computes it, its output rows there)."""
    for p in self.projections:
        if name in p.parts or (not p.parts and name in p.role):
            return p, p.rows(name)
    raise KeyError(f"no {name!r} in this {type(self).__name__}: {', '.join(p.path for p in self.projections)}")


@dataclass(frozen=True)
class Attention:
    """One attention. `path` is the smallest module that holds its projections; `kind` is "self" or "cross"."""

    path: str
    kind: str
    projections: tuple[Projection, ...]
    num_heads: int  # H, of queries
    num_kv_heads: int  # G, of keys and values
    head_dim: int  # d
    part = _part


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward. `path` is None where its linears have no module of their own (OPT, BERT).

    `activation` is the class name of the nonlinearity, None where it is not a module.
    """

    path: str | None
    projections: tuple[Projection, ...]
    activation: str | None
    part = _part


@dataclass(frozen=True)
class Block:
    """One layer. `side`: "encoder" (sees both ways) or "decoder" (sees what came before).

    `feed_forward` is None where there is not exactly one (a mixture of experts).
    """

    path: str
    side: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        found = tuple(p for attention in self.attentions for p in attention.projections)
        return found + (self.feed_forward.projections if self.feed_forward else ())


@dataclass(frozen=True)
class Anatomy:
    """A whole model. `head` is the language-model or classification head, None on a bare base model."""

    embedding: str
    head: str | None
    blocks: tuple[Block, ...]
    hidden_size: int

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    @property
    def encoder(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.side == "encoder")

    @property
    def decoder(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.side == "decoder")


# ---------------------------------------------------------------- linear modules

_LINEAR = "nn.Linear, Conv1D and modules with in_features and out_features like them (4-bit linears)"


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D: a linear layer whose weight is (in, out)."""
    return hasattr(module, "nf") and hasattr(module, "nx")


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, Conv1D and whatever has `in_features` and `out_features` (4-bit linears)."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return is_transposed(module) or all(isinstance(size, int) for size in sizes)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features), also where the weight is stored transposed or packed. TypeError if not linear."""
    if not is_linear(module):
        raise TypeError(f"{type(module).__name__} is not linear; accepted are {_LINEAR}")
    return (module.nf, module.nx) if is_transposed(module) else (module.out_features, module.in_features)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight W (out, in) of a linear module: a view of it, or floats made from its codes (4-bit linears)."""
    if hasattr(module, "dequantize"):
        return module.dequantize()
    return module.weight.T if is_transposed(module) else module.weight


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of the base, without what is plugged in under `minipeft`: that is not even walked through."""
    seen = {model}
    below = (child.named_modules(seen, name) for name, child in model.named_children() if name != "minipeft")
    return {"": model} | {path: m for modules in below for path, m in modules}


def _inside(path: str, *scopes: str) -> bool:
    return any(path == scope or path.startswith(scope + ".") for scope in scopes)


def _split(path: str) -> tuple[str, str]:
    """(path of the parent, own name)."""
    parent, _, name = path.rpartition(".")
    return parent, name


# ---------------------------------------------------------------- the anatomy


def anatomy(model: nn.Module) -> Anatomy:
    """Find the parts of a transformers model, on any device, the meta device included.

    Raises ValueError if it has no attention that can be recognised.
    """
    modules = base_modules(model)
    blocks: list[Block] = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and not _inside(path, *(block.path for block in blocks)):
            found = (_block(dict(m.named_modules(prefix=f"{path}.{i}")), model.config) for i, m in enumerate(module))
            blocks += [block for block in found if block]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be recognised: "
            "no list of blocks with linear modules called q…, k…, v… (q_proj, query, c_attn, query_key_value)"
        )
    embedding = model.get_input_embeddings()
    return Anatomy(
        embedding=next(path for path, m in modules.items() if m is embedding),
        head=output_head(model),
        blocks=tuple(blocks),
        hidden_size=blocks[0].attentions[0].projections[0].in_features,
    )


def output_head(model: nn.Module) -> str | None:
    """The path of the head: the output embedding; else the last part beside the base that has a linear (a classifier)."""
    modules = base_modules(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is not None:
        return next(path for path, m in modules.items() if m is output)
    base = getattr(model, "base_model", model)  # transformers: the model itself where there is nothing beside it
    beside = [] if base is model else [name for name, child in model.named_children() if child is not base]
    heads = [name for name in beside if any(is_linear(m) for path, m in modules.items() if _inside(path, name))]
    return heads[-1] if heads else None


def _block(modules: dict[str, nn.Module], config) -> Block | None:
    """The block whose modules these are (path -> module, the block first), or None if it has no attention."""
    path = next(iter(modules))
    holders = dict.fromkeys(_split(p)[0] for p, m in modules.items() if is_linear(m) and _role(p) in ("q", "qkv"))
    attentions = tuple(_attention(modules, holder, config, i) for i, holder in enumerate(holders))
    if not attentions:
        return None
    # BLOOM, MPT and LongT5 do not say whether they look ahead; of those that do not, only decoders keep a cache,
    # and of an encoder-decoder, only the decoder has two attentions
    causal = [m.is_causal for p, m in modules.items() if _inside(p, attentions[0].path) and hasattr(m, "is_causal")]
    alone = hasattr(config, "use_cache") and not getattr(config, "is_encoder_decoder", False)
    decoder = len(attentions) > 1 or (causal[0] if causal else alone)
    rest = {p: m for p, m in modules.items() if not _inside(p, *(a.path for a in attentions))}
    feed_forward = _feed_forward(rest, hidden=attentions[0].projections[0].in_features)
    return Block(path, "decoder" if decoder else "encoder", attentions, feed_forward)


_WORDS = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v"}
_QKV, _KV = re.compile(r"(q|query)_?(k|key)_?(v|value)|c_attn"), re.compile(r"(k|key)_?(v|value)")


def _role(path: str) -> str | None:
    """What a linear's name says: "q", "k", "v", "qkv", "kv"; "?" if it is about them (pos_key_proj); or None."""
    name = _split(path)[1].lower().removeprefix("w")  # wq, Wqkv
    if _QKV.match(name) or _KV.match(name):
        return "qkv" if _QKV.match(name) else "kv"
    words = name.split("_")
    return _WORDS.get(words[0], "?" if any(word in _WORDS for word in words) else None)


def _attention(modules: dict[str, nn.Module], holder: str, config, index: int) -> Attention:
    """The attention of a block whose q, k, v (or fused) are children of `holder`."""
    block = next(iter(modules))
    shapes = {path: linear_shape(m) for path, m in modules.items() if is_linear(m)}
    roles = {path: _role(path) for path in shapes if _split(path)[0] == holder and _role(path) not in (None, "?")}
    if "q" in roles.values():  # GPT-2's cross-attention: q_attn is q, and c_attn is k and v
        roles = {path: "kv" if role == "qkv" else role for path, role in roles.items()}
    hidden = shapes[next(iter(roles))][1]

    path, output = holder, []
    while path != block:  # BERT: q, k, v are in attention.self, o is in attention.output
        output = [p for p, shape in shapes.items() if _inside(p, path) and _role(p) is None and shape[0] == hidden]
        if output:
            roles[output[-1]] = "o"
            break
        path = _split(path)[0]
    path = path if output else holder

    width = {role: shapes[p] for p, role in roles.items()}
    config = next((m.config for p, m in modules.items() if _inside(p, path) and hasattr(m, "config")), config)
    H = getattr(modules[holder], "num_heads", None) or config.get_text_config().num_attention_heads
    d = (width["o"][1] if "o" in width else width["q"][0]) // H  # o takes H heads of width d
    kv = width["qkv"][0] - H * d if "qkv" in width else width["kv"][0] if "kv" in width else 2 * width["k"][0]
    G = kv // (2 * d)
    parts = {p: _divide(modules[holder], p, role, shapes[p][0], H, G, d) for p, role in roles.items()}
    if len({*roles.values()}) < len(roles):  # keys and values in two steps: neither has rows of its own
        parts = {p: found if roles[p] == "o" else {} for p, found in parts.items()}
    projections = tuple(_projection(p, role, modules[p], parts[p]) for p, role in roles.items())
    cross = index > 0 or "cross" in path[len(block) :].lower()
    return Attention(path, "cross" if cross else "self", projections, H, G, d)


def _divide(attention: nn.Module, path: str, role: str, total: int, H: int, G: int, d: int) -> Parts:
    """How a projection's output rows divide; {} where H, G and d do not account for all `total` of a fused one."""
    if role not in ("qkv", "kv"):
        return {role: [range(total)]}
    heads = {"q": H, "k": G, "v": G}
    if G < 1 or H % G or total != sum(heads[part] for part in role) * d:
        return {}
    order, groups = role, 1
    if "key_value" in _split(path)[1] or getattr(attention, "multi_query", True) is False:
        groups = G
    elif type(attention).__name__ == "CodeGenAttention":
        order, groups = "qvk", 4
    parts: Parts = {part: [] for part in role}
    start = 0
    for _ in range(groups):
        for part in order:
            stop = start + heads[part] // groups * d
            parts[part].append(range(start, stop))
            start = stop
    return parts


def _feed_forward(modules: dict[str, nn.Module], hidden: int) -> FeedForward | None:
    """The feed-forward among a block's modules outside attention."""
    block = next(iter(modules))
    shapes = {path: linear_shape(m) for path, m in modules.items() if is_linear(m)}
    back = [path for path, shape in shapes.items() if shape[0] == hidden]
    for down in sorted(back, key=lambda path: shapes[path][1] == hidden):  # square ones last
        inner = shapes[down][1]
        ups = [p for p in shapes if p != down and shapes[p] in ((inner, hidden), (2 * inner, hidden))]
        if len(ups) in (1, 2):
            break
    else:
        return None
    # the gate is what goes through the activation: the one called so, or the first (T5: wi_0, wi_1)
    gate = next((p for p in ups if "gate" in _split(p)[1]), ups[0]) if len(ups) == 2 else None
    projections = []
    for path in (*ups, down):
        role = "down" if path == down else "gate" if path == gate else "up"
        parts = {role: [range(shapes[path][0])]}
        if role == "up" and shapes[path][0] == 2 * inner:
            role, parts = "gate_up", {"gate": [range(inner)], "up": [range(inner, 2 * inner)]}
        projections.append(_projection(path, role, modules[path], parts))
    common = ".".join(os.path.commonprefix([path.split(".") for path in (down, *ups)]))
    plain = (m for path, m in modules.items() if _inside(path, common) and not is_linear(m))
    plain = (type(m).__name__ for m in plain if not [*m.children(), *m.parameters()])
    activation = next((name for name in plain if not re.search("Dropout|Identity|Norm|Embedding", name)), None)
    return FeedForward(common if common != block else None, tuple(projections), activation)


def _projection(path: str, role: str, module: nn.Module, parts: Parts) -> Projection:
    out_features, in_features = linear_shape(module)
    return Projection(path, role, in_features, out_features, is_transposed(module), parts)


# ---------------------------------------------------------------- targets

_TARGETS = 'module-name suffixes such as ("q_proj", "v_proj"), "attention", "all-linear" or a regular expression'


def match(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The paths of the linear modules that `targets` means, in the model's order.

    - "attention": every projection of every attention;
    - "all-linear": every linear module but the output head, as in Hugging Face PEFT;
    - another string: a suffix if it has only letters, digits, `_` and `.`, else a regular expression that
      must match a whole path, as in Hugging Face PEFT;
    - a list or tuple of suffixes, made of whole names between dots: "q_proj", "self_attn.q_proj".

    Raises ValueError if any of them means no module, or a module that is not linear.
    """
    if not targets or not isinstance(targets, str | list | tuple | set | frozenset):
        raise ValueError(f"targets is {targets!r}; accepted are {_TARGETS}")
    modules = base_modules(model)
    wanted: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets:
        if not isinstance(target, str) or not target:
            raise ValueError(f"targets holds {target!r}; accepted are {_TARGETS}")
        if target == "attention":
            wanted.update(p.path for block in anatomy(model).blocks for a in block.attentions for p in a.projections)
        elif target == "all-linear":
            head = output_head(model)
            wanted.update(path for path, m in modules.items() if is_linear(m) and not (head and _inside(path, head)))
        elif isinstance(targets, str) and not re.fullmatch(r"[\w.]+", target):
            wanted.update(_by_expression(modules, target))
        else:
            wanted.update(_by_suffix(modules, target))
    return [path for path in modules if path in wanted]


def _by_suffix(modules: dict[str, nn.Module], suffix: str) -> list[str]:
    found = [path for path in modules if path == suffix or path.endswith("." + suffix)]
    if not found:
        raise ValueError(f"no module of this model ends in {suffix!r}" + _nearest(modules, suffix))
    for path in found:
        _must_be_linear(path, modules[path], suffix)
    return found


def _by_expression(modules: dict[str, nn.Module], expression: str) -> list[str]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"{expression!r} is no regular expression: {error}; accepted are {_TARGETS}") from None
    found = [path for path in modules if pattern.fullmatch(path)]
    if not found:
        raise ValueError(f"no module's path matches the whole of {expression!r}" + _nearest(modules, expression))
    linear = [path for path in found if is_linear(modules[path])]
    if not linear:
        _must_be_linear(found[0], modules[found[0]], expression)
    return linear


def _must_be_linear(path: str, module: nn.Module, target: str) -> None:
    if not is_linear(module):
        raise ValueError(f"target {target!r} means {path}, a {type(module).__name__}; accepted are {_LINEAR}")


def _nearest(modules: dict[str, nn.Module], wanted: str) -> str:
    """What to say next: the nearest suffix of as many names as `wanted` has, and the names of all linears."""
    linears = [path.split(".") for path, m in modules.items() if is_linear(m)]
    suffixes = dict.fromkeys(".".join(names[-1 - wanted.count(".") :]) for names in linears)
    near = difflib.get_close_matches(wanted, [*suffixes, "attention", "all-linear"], n=1, cutoff=0.5)
    names = ", ".join(dict.fromkeys(names[-1] for names in linears)) or "none is linear"
    return (f"; did you mean {near[0]!r}?" if near else "") + f" (modules: {names})"
