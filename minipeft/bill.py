"""What fine-tuning costs: parameters counted, bytes predicted before anything is allocated.

    total = weights + adapter + gradients + optimizer + activations + logits + temporary

weights      the frozen (or, in full fine-tuning, trained) base, its buffers included
adapter      the trained pieces; float32 at least, also beside a 16-bit base
gradients    one number a trained parameter, in its dtype
optimizer    its states (table below), in the parameter's dtype; no master copy of the weights is kept
activations  what autograd keeps of the forward pass until the backward pass has used it
logits       what the output head and the cross-entropy add to that
temporary    the most that is held for a moment beside all that: a gradient on its way back, a product

optimizer    states a parameter
sgd          0
momentum     1
adam, adamw  2
adamw8bit    2 of one byte, and a float32 scale per 256; tensors below 4096 numbers stay in float32
             (Dettmers et al. 2021, arXiv:2110.02861, as in bitsandbytes). "paged_adamw8bit": the
             same, and it may lie in the CPU's memory

The first four lines are exact. The last three are measured, not estimated: the model is built from
its config with fake tensors, which have shapes and no memory, and one pass runs forward and backward
while every tensor's birth and death is counted. Blocks are alike, so three and four of them are run
and the line through the two results gives the rest.

What was found beside real runs (float32 on a CPU, tests/test_bill.py): within 1 % of the bytes that
torch's profiler counts for one pass. A process grows by that, within 15 %, where its allocator gives
freed memory back at once, and by up to a third more where it keeps it, as glibc's does by default.
All rows are as long as `seq`; shorter ones take less. On a GPU the attention kernel is another one and the
CUDA context takes some hundred MB more: that is not in the bill.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import html
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from . import anatomy, packing, sockets
from .quant.linear4bit import Linear4bit, quantize
from .training import CrossEntropy

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16,
          "float16": torch.float16, "autocast": torch.float32}
STATES = {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2, "adamw8bit": 2, "paged_adamw8bit": 2}
LINES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary")


# ---------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Count:
    """Numbers trained and numbers in all, of one method or one kind of module."""

    name: str
    trainable: int
    total: int


@dataclass(frozen=True)
class ParameterReport:
    """How many numbers are trained, of how many.

    trainable, total   over base and adapters; a tied weight counts once
    methods            one `Count` per adapter, and one for the base
    modules            one `Count` per module that holds parameters, by path; an adapter's numbers
                       count at the base's module that they are plugged into
    """

    trainable: int
    total: int
    methods: tuple[Count, ...]
    modules: tuple[Count, ...]

    @property
    def percent(self) -> float:
        """100 · trainable / total; 0 for a model without parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells: methods, then the modules that train, equal ones of all blocks in one row."""
        def cells(name, count_trainable, count_total):
            percent = 100 * count_trainable / count_total if count_total else 0.0
            return name, f"{count_trainable:,}", f"{count_total:,}", f"{percent:.3f}"

        kinds: dict[str, list[Count]] = {}
        for module in self.modules:
            if module.trainable:
                kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module.name), []).append(module)
        found = [("", "trainable", "total", "%")]
        found += [cells(m.name, m.trainable, m.total) for m in self.methods]
        found.append(cells("all", self.trainable, self.total))
        for kind, members in kinds.items():
            name = kind if len(members) == 1 else f"{kind} ×{len(members)}"
            found.append(cells(name, sum(m.trainable for m in members), sum(m.total for m in members)))
        return found

    def __str__(self) -> str:
        return _text_table(self.rows(), rules=(1, 1 + len(self.methods), 2 + len(self.methods)))

    def _repr_html_(self) -> str:
        return _html_table(self.rows(), bold=(1 + len(self.methods),))


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count what is trained and what is there, with or without adapters.

    `str(report)` is a table. `report.trainable`, `.total`, `.percent`, `.methods`, `.modules`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted is a torch.nn.Module")
    trainable, total = Counter(), Counter()          # by module path
    base = list(sockets.base_parameters(model).items())
    for name, p in base:
        path = name.rpartition(".")[0]
        trainable[path] += p.numel() * p.requires_grad
        total[path] += p.numel()
    for path, module in anatomy.base_modules(model).items():
        if isinstance(module, Linear4bit):           # its codes stand for so many numbers, none of them trained
            total[path] += module.in_features * module.out_features
    methods = [Count("base", sum(trainable.values()), sum(total.values()))]
    for adapter_name, adapter in sockets.adapters(model).items():
        own, seen = list(adapter.parameters()), set()
        for path, piece in adapter.pieces().items():
            for p in set(piece.parameters()) - seen:             # what layers share counts at the first
                seen.add(p)
                trainable[path] += p.numel() * p.requires_grad
                total[path] += p.numel()
        kind = type(adapter.method).__name__
        methods.append(Count(f"{kind} {adapter_name!r}", sum(p.numel() for p in own if p.requires_grad),
                             sum(p.numel() for p in own)))
    return ParameterReport(
        trainable=sum(trainable.values()),
        total=sum(total.values()),
        methods=tuple(methods),
        modules=tuple(Count(path, trainable[path], total[path]) for path in total),
    )


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MemoryBill:
    """Predicted bytes of one training step, line by line.

    weights … temporary   as in this module's docstring, in bytes
    peak                  bytes at the highest moment of a step that is one pass: gradients appear
                          while activations go, so it lies below `total` where both are large.
                          Where gradients add up over several passes, `total` is reached.
    parameters, trainable numbers, not bytes
    assumed               what the bill is for, in words
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    temporary: int
    peak: int
    parameters: int
    trainable: int
    assumed: str

    @property
    def total(self) -> int:
        """The sum of the lines, in bytes."""
        return sum(getattr(self, line) for line in LINES)

    def fits(self, available: float) -> bool:
        """Whether `total` fits into so many bytes: `bill.fits(24e9)` for a 24 GB card."""
        if isinstance(available, bool) or not isinstance(available, int | float) or not available > 0:
            raise ValueError(f"available is {available!r}; accepted is a number of bytes above 0")
        return self.total <= available

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells, in GB (10⁹ bytes), or in MB where the total is below 1 GB."""
        scale, unit = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        sizes = {line: getattr(self, line) for line in (*LINES, "total")} | {"peak of a single pass": self.peak}
        return [("", unit, "%")] + [(name, f"{size / scale:,.3f}", f"{100 * size / self.total:.1f}")
                                    for name, size in sizes.items()]

    def __str__(self) -> str:
        n = 1 + len(LINES)
        return _text_table(self.rows(), rules=(1, n, n + 1)) + "\n" + self.assumed

    def _repr_html_(self) -> str:
        return _html_table(self.rows(), bold=(1 + len(LINES),)) + f"<p>{html.escape(self.assumed)}</p>"


def memory_bill(
    model_or_config,
    method,
    *,
    batch: int,
    seq: int,
    optimizer: str = "adamw",
    dtype: str | torch.dtype = "float32",
    quantized: bool | None = None,
    logit_positions: int | None = None,
    gradient_checkpointing: bool = False,
) -> MemoryBill:
    """Predict the memory of one training step, without allocating the model.

    model_or_config  a transformers model, or a config alone (a 70B Llama on a laptop). A model gives
                     its class and its config; its weights are not touched and its adapters do not
                     count. A config alone is taken for a language model, and for a classifier where
                     it is an encoder's
    method           a method's settings, such as mp.LoRA(); None or "full" for full fine-tuning
    batch, seq       examples and tokens read in one pass (mp.fit cuts a batch into passes of `max_tokens`;
                     the last token of an answer is predicted and not read)
    optimizer        "sgd", "momentum", "adam", "adamw", "adamw8bit", "paged_adamw8bit"; its update is taken
                     to be fused, as in mp.fit, so that it makes no temporary copies
    dtype            of the base and its activations: "float32", "bfloat16", "float16", "float64".
                     "autocast": float32 weights, matrix products in bfloat16; autograd then keeps a
                     bfloat16 copy of every frozen weight that a gradient passes through; attention in float32,
                     as mp.fit computes it on a CPU
    quantized        NF4 with double quantisation, 4.127 bits a number, for the linear layers that
                     mp.quantize takes; the rest in `dtype`, in which the layers also compute. None: as
                     the model is
    logit_positions  positions per example whose next token is a target; None for all `seq`
    gradient_checkpointing  keep the blocks' inputs only, and run each block again in the backward pass

    Raises `TypeError` for another kind of model or method, `ValueError` for another value.
    """
    batch, seq = _whole("batch", batch), _whole("seq", seq)
    targets = seq if logit_positions is None else _whole("logit_positions", logit_positions)
    if targets > seq:
        raise ValueError(f"logit_positions is {targets}; accepted is a whole number from 1 to seq, {seq}")
    dtype_name = str(dtype).removeprefix("torch.")
    _known("dtype", dtype_name, DTYPES)
    _known("optimizer", optimizer, STATES)
    full = method is None or method == "full"
    if not full and (isinstance(method, type) or not hasattr(method, "pieces")):
        raise TypeError(f"method is {method!r}; accepted are a method's settings, such as mp.LoRA(), "
                        'or "full" or None for full fine-tuning')
    if full and quantized:
        raise ValueError("quantized is True with full fine-tuning; 4-bit codes have no gradient. "
                         "Name a method such as mp.LoRA()")
    config, model_class = _config_and_class(model_or_config)
    if quantized is None:
        modules = model_or_config.modules() if isinstance(model_or_config, nn.Module) else ()
        quantized = not full and any(isinstance(m, Linear4bit) for m in modules)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    taken = getattr(method, "length", 0)                         # positions of a prompt or prefix
    if limit and seq + taken > limit:
        raise ValueError(f"seq is {seq}{f' and the method takes {taken} more' if taken else ''}; "
                         f"{type(config).__name__} says max_position_embeddings {limit}")

    model = _fake_model(config, model_class, DTYPES[dtype_name])
    if anatomy.anatomy(model).head is None:
        raise TypeError(f"model_or_config is a {model_class.__name__}, a body without a head; accepted is a model "
                        "with one, such as mp.load_base(name, num_labels=2) gives")
    fake = next(model.parameters()).fake_mode
    if quantized:
        with fake:
            quantize(model)
    base, buffers = list(model.parameters()), list(model.buffers())
    if not full:
        with fake:                       # there is no tokenizer here, and the start weighs nothing
            sockets.attach(model, replace(method, init="random", text=None) if hasattr(method, "text") else method)
    if gradient_checkpointing:
        _recompute_blocks(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype_name == "autocast"), packing.switched(model, seq):
        activations, logits, highest = _measure(model, batch, seq, targets)

    trained = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in base}
    weights = _bytes(base) + _bytes(buffers)
    adapter = _bytes(p for p in model.parameters() if id(p) not in own)
    gradients = _bytes(trained)
    states = sum(_state_bytes(optimizer, p) for p in trained)

    temporary = highest[0] - activations - logits     # all is kept still, no gradient is there yet
    if len(highest) > 1:
        temporary = max(temporary, highest[-1] - gradients)  # nothing is kept any more
    standing = weights + adapter + states
    words = "full fine-tuning" if full else repr(method)
    at = "" if model.get_output_embeddings() is None else f", targets at {targets} each"
    return MemoryBill(
        weights=weights, adapter=adapter, gradients=gradients, optimizer=states,
        activations=activations, logits=logits, temporary=temporary,
        peak=standing + max(highest),
        parameters=parameter_report(model).total,
        trainable=sum(p.numel() for p in trained),
        assumed=f"{model_class.__name__}, {words}: one pass of {batch} × {seq} tokens{at}; "
                f"{optimizer}, {dtype_name}{', NF4 base' if quantized else ''}"
                f"{', gradient checkpointing' if gradient_checkpointing else ''}; no master weights",
    )


def _whole(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; accepted is a whole number from 1")
    return value


def _known(name: str, value, accepted) -> None:
    if value not in accepted:
        near = difflib.get_close_matches(str(value), accepted, n=1, cutoff=0.3)
        raise ValueError(f"{name} is {value!r}; " + (f"did you mean {near[0]!r}? " if near else "")
                         + f"accepted are {', '.join(map(repr, accepted))}")


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)


def _state_bytes(optimizer: str, p: Tensor) -> int:
    n = p.numel()
    if optimizer.endswith("adamw8bit"):
        return 2 * (n + 4 * -(-n // 256)) if n >= 4096 else 2 * 4 * n
    return STATES[optimizer] * p.nbytes


# ---------------------------------------------------------------------------------------------
# A model without memory
# ---------------------------------------------------------------------------------------------

def _config_and_class(model_or_config):
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if isinstance(model_or_config, transformers.PreTrainedModel):
        return copy.deepcopy(model_or_config.config), type(model_or_config)
    if not isinstance(model_or_config, transformers.PreTrainedConfig):
        raise TypeError(f"model_or_config is a {type(model_or_config).__name__}; accepted is a transformers "
                        "model or a transformers config")
    config = copy.deepcopy(model_or_config)
    if config.is_encoder_decoder:
        table = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    elif type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        table = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    else:
        table = auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in table:
        raise TypeError(f"model_or_config is a {type(config).__name__}, for which transformers has neither a "
                        "language model nor a text classifier; give a model instead")
    return config, table[type(config)]


def _fake_model(config, model_class, dtype: torch.dtype) -> nn.Module:
    """The model with tensors that have a shape, a dtype and no memory.

    They say that they are on the CPU, so that the CPU's attention kernel is chosen, and mix with
    real tensors: token ids and masks stay real, because transformers looks at their values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return model_class(config).train()
    finally:
        torch.set_default_dtype(before)


def _recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing, under the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


# ---------------------------------------------------------------------------------------------
# One pass, counted
# ---------------------------------------------------------------------------------------------

class Live(TorchDispatchMode):
    """Within it: the bytes of the tensors made and still alive, and the most there ever were.

    Works on fake tensors and on real ones. What a kernel allocates and frees inside is not seen.
    """

    def __init__(self, known: nn.Module):
        """`known`: the parameters and buffers of this model were there before and do not count."""
        super().__init__()
        self.now = self.peak = self.births = 0
        self.known = {t.untyped_storage()._cdata for t in (*known.parameters(), *known.buffers())}
        self.alive: dict[int, tuple[int, int]] = {}   # storage (views count once) -> (birth, bytes)
        self.peaks: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive and key not in self.known:
            self.births += 1
            self.alive[key] = self.births, size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.now -= self.alive.pop(key)[1]

    def since(self, birth: int) -> int:
        """Bytes of what was made after the first `birth` tensors, and is alive."""
        return sum(size for when, size in self.alive.values() if when > birth)

    def mark(self, stretch: str) -> None:
        """End a stretch of time: its highest point goes into `peaks`, and the next one begins."""
        self.peaks[stretch] = self.peak
        self.peak = self.now


def _measure(model: nn.Module, batch: int, seq: int, targets: int) -> tuple[int, int, list[int]]:
    """(bytes that the backbone keeps, bytes that head and loss keep, highest points of a pass).

    The first of the highest points lies before the last block's gradient is through, the last one
    after the first block's began. From block to block between them memory rises or falls steadily,
    so that blocks left out cannot hold another highest point.
    """
    lists: dict[str, nn.ModuleList] = {}              # by path; an encoder-decoder has two
    for block in anatomy.anatomy(model).blocks:
        path = block.path.rpartition(".")[0]
        lists[path] = model.get_submodule(path)
    long = {path: blocks for path, blocks in lists.items() if len(blocks) > 4 and _alike(model, path)}

    def run(deeper: str | None) -> dict[str, int]:
        with contextlib.ExitStack() as stack:
            for path, blocks in long.items():
                stack.enter_context(_shortened(model, path, blocks, 4 if path == deeper else 3))
            return _one_pass(model, batch, seq, targets, list(lists))

    short = run(None)
    found = {stage: size for stage, size in short.items() if stage.removeprefix("within ") not in long}
    for path, blocks in long.items():
        deeper = run(path)
        for stage in found:
            found[stage] += (len(blocks) - 3) * (deeper[stage] - short[stage])
    return found.pop("kept by the backbone"), found.pop("kept by head and loss"), list(found.values())


def _alike(model: nn.Module, path: str) -> bool:
    """Whether the blocks after the first have the same parameters, the pieces plugged into them too."""
    shapes: dict[str, Counter] = {}
    prefix = f"{path}."
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        name = name.removeprefix(f"{sockets.HOME}.default.")
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            shapes.setdefault(index, Counter())[rest, p.shape] += 1
    return all(shapes[index] == shapes["1"] for index in shapes if index != "0")


@contextlib.contextmanager
def _shortened(model: nn.Module, path: str, blocks: nn.ModuleList, depth: int) -> Iterator[None]:
    parent, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    setattr(parent, name, blocks[:depth])
    try:
        yield
    finally:
        setattr(parent, name, blocks)


def _one_pass(model: nn.Module, batch: int, seq: int, targets: int, lists: list[str]) -> dict[str, int]:
    """Forward and backward as mp.fit does them, and the bytes alive by stage; see `_measure`."""
    live, handles, births = Live(known=model), contextlib.ExitStack(), []

    def when_gradient_comes(hidden, *stretches: str) -> None:
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda g: [live.mark(stretch) for stretch in stretches] and None)

    def watch(path: str) -> None:
        blocks = model.get_submodule(path)
        before, within = f"before {path}", f"within {path}"
        middle = len(blocks) > 2

        def first(module, args, out):
            when_gradient_comes(out[0] if isinstance(out, tuple) else out, within)

        def last(module, args, kwargs):
            x = args[0] if args else kwargs.get("hidden_states")
            when_gradient_comes(x, *((before,) if middle else (before, within)))

        handles.callback(blocks[-1].register_forward_pre_hook(last, with_kwargs=True).remove)
        if middle:
            handles.callback(blocks[0].register_forward_hook(first).remove)

    def at_head(module, args):                                   # as sockets.only_at, with fixed shapes
        births.append(live.births)
        h = args[0].reshape(batch, -1, args[0].shape[-1])        # (B, T, d), also where all rows lie in one
        rows = torch.arange(batch).repeat_interleave(targets)    # (N,), N = B × targets
        columns = torch.arange(h.shape[1] - targets, h.shape[1]).repeat(batch)
        return (h[rows, columns], *args[1:])                     # (N, d)

    token = 1 if model.config.get_text_config().pad_token_id == 0 else 0
    ids = torch.full((batch, seq), token)                        # (B, T)
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0 if batch > 1 and seq > 1 else 1             # a real batch is padded
    inputs = {"input_ids": ids}
    head = model.get_output_embeddings()
    if head is None:
        inputs |= {"attention_mask": mask}
    elif model.config.is_encoder_decoder:
        inputs |= {"attention_mask": mask, "decoder_input_ids": ids[:, :targets], "use_cache": False}
    else:
        inputs |= {"use_cache": False}                           # padded on the right: no mask
    try:
        for path in lists:
            watch(path)
        if head is not None:
            handles.callback(head.register_forward_pre_hook(at_head).remove)
        with live, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="adapter .* did not run")  # those of the left-out blocks
            logits = model(**inputs).logits                      # (N, V), or (B, classes)
            if head is None:
                births.append(live.births)
            goal = ids.new_zeros(len(logits))
            loss = CrossEntropy.apply(logits.float() if logits.dtype.itemsize < 4 else logits, goal)
            del logits
            at_loss = live.since(births[0])
            kept = {"kept by the backbone": live.now - at_loss, "kept by head and loss": at_loss}
            loss.backward()
            live.mark("after")
    finally:
        handles.close()
    model.zero_grad(set_to_none=True)
    return kept | live.peaks


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------

def _text_table(rows: list[tuple[str, ...]], rules: tuple[int, ...]) -> str:
    """Columns in line, the first to the left, with a rule before the rows numbered in `rules`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        if i in rules:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        lines.append("  ".join(cell.rjust(w) if j else cell.ljust(w)
                               for j, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip())
    return "\n".join(lines)


def _html_table(rows: list[tuple[str, ...]], bold: tuple[int, ...]) -> str:
    def line(i, row):
        tag = "th" if i == 0 or i in bold else "td"
        cells = "".join(f'<{tag} style="text-align:{"right" if j else "left"}">{html.escape(cell)}</{tag}>'
                        for j, cell in enumerate(row))
        return f"<tr>{cells}</tr>"

    return "<table>" + "".join(line(i, row) for i, row in enumerate(rows)) + "</table>"
