"""Many adapters, one base: every row of a batch through its own adapter, all rows computed together
(the gathered products of Punica, Chen et al. 2023, arXiv:2310.18547; the scale of S-LoRA, Sheng et al. 2023,
arXiv:2311.03285).

    y_i' = y_i + s_i B_i A_i x_i       LoRA of row i, ranks filled up with zeros to the largest
    y_i' = l_i ∘ y_i                   (IA)³ of row i
    e_i' = [padding; P_i; e_i]         soft prompt of row i, whatever its length

    shelf = mp.Serve(model, limit=200)
    shelf.load("french", "adapters/french")
    mp.generate(model, tokenizer, prompts, adapters=["french", None, …])

The frozen module multiplies all rows by W at once, as always. Beside it, the A of the batch's adapters are
stacked, (U, r, in), and one batched product serves every row; nothing runs adapter after adapter. An adapter on
the shelf is only its tensors: it is not plugged into the model, so that loading the hundredth costs what loading
the first did, and choosing another one costs a look into a table.

An adapter is never changed once it is loaded. Loading under a name that is taken puts another one in its place; who
holds the old one, goes on with it to the end of the answer. So no answer mixes two versions, and reading needs no lock.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from . import anatomy, checkpoint, sockets
from .methods.ia3 import RescaleInput, RescaleOutput
from .methods.lora import LowRank
from .methods.prompt_tuning import Prompt
from .sockets import Adapter

HOLDER = "serve"  # the name of the adapter that keeps the sockets open
_writing = threading.Lock()  # held while a table is replaced by a new one, for microseconds


class Serve:
    """A shelf of adapters for one model: LoRA, (IA)³ and soft prompts, hundreds of them.

    limit  how many it holds, None for any number. One more, and the one that was not asked for the longest goes

    The model's linear modules get an open socket each, once; `mp.detach(model, "serve")` takes them out again.
    Rows that no adapter of the shelf is for are not touched, whatever is active: they are the base's.
    """

    def __init__(self, model: nn.Module, limit: int | None = None):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit is {limit!r}; accepted is a whole number from 1, or None")
        if shelf_of(model) is not None:
            raise ValueError(f"this {type(model).__name__} has a shelf already; mp.detach(model, {HOLDER!r}) takes it out")
        sockets.check_new_name(model, HOLDER)
        self.model, self.limit = model, limit
        self.loaded: dict[str, Adapter] = {}                     # never changed, only replaced
        self.asked: dict[str, int] = {}                          # name -> when it was last asked for
        self.spare: dict[str, tuple] = {}                        # path -> the last batch's stacks, to be written over
        before = sockets.active_names(model)
        sockets.plug(model, Adapter(HOLDER, self, [("module", path, Open()) for path, module
                                    in anatomy.base_modules(model).items() if anatomy.is_linear(module)]))
        sockets.activate(model, before)

    @property
    def names(self) -> tuple[str, ...]:
        """What is on the shelf."""
        return tuple(self.loaded)

    def load(self, name: str, folder: str | os.PathLike) -> None:
        """Read a checkpoint, ours or PEFT's, and put it on the shelf; what had this name before is replaced.

        Errors are `mp.load_adapter`'s, and `TypeError` for a method that cannot be served row by row. The shelf
        is then as it was. Answers that are being made are not disturbed in either case.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name is {name!r}; accepted is a non-empty string")
        if name in sockets.adapters(self.model):
            raise ValueError(f"an adapter called {name!r} is attached to the model; choose another name")
        folder = Path(folder).expanduser()
        adapter = self._read(name, folder)
        if not gathers(adapter):
            raise TypeError(f"{folder}: this is {adapter.method}" + (" with an output head of its own" if any(
                isinstance(p, sockets.OwnHead) for p in adapter.by_path.values()) else "")
                + "; accepted on a shelf are LoRA, IA3 and PromptTuning, which can differ from row to row")
        for piece in adapter.by_path.values():
            if isinstance(piece, LowRank):
                A, B = (factor.detach() for factor in piece.factors())
                piece.never_changes = A, B.T.contiguous()        # A (r, in) and Bᵀ (r, out), as they are stacked
                if len(A) == len(piece.A):                       # not PiSSA's, of twice the rank
                    piece.B.data = piece.never_changes[1].T      # not twice in memory
        with _writing:
            table = self.loaded | {name: adapter.requires_grad_(False).eval()}
            self.asked[name] = time.perf_counter_ns()
            while self.limit is not None and len(table) > self.limit:
                oldest = min(table.keys() - {name}, key=lambda n: self.asked.get(n, 0))
                del table[oldest]
                self.asked.pop(oldest, None)
            self.loaded = table

    def unload(self, name: str) -> None:
        """Take an adapter off the shelf. `ValueError` if it is not there."""
        with _writing:
            if name not in self.loaded:
                raise unknown(self.model, name)
            self.loaded = {n: a for n, a in self.loaded.items() if n != name}
            self.asked.pop(name, None)

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[Rows]:
        """Within it, and in this thread, the rows of each batch go through the adapters of these names.

            with shelf.rows(["french", None]) as rows:
                logits = model(**rows.inputs(input_ids, attention_mask)).logits

        Of the i-th row everything comes from the adapter that had this name when the block was entered.
        """
        if shelf_of(self.model) is not self:
            raise ValueError("this shelf was taken out of the model; mp.Serve(model) puts a new one in")
        found = find(self.model, names)
        for i, name in enumerate(names):
            if i not in found:
                raise ValueError(f"row {i} asks for {name!r}, which cannot differ from row to row, or a merged "
                                 "base; accepted are LoRA, IA3 and PromptTuning, and None for the base as it was")
        rows = Rows(self.model, [found[i] for i in range(len(names))])
        with sockets.instead(self.model, rows):
            yield rows
        rows.give_back()
        if rows.prompts and not rows.were_read:
            raise RuntimeError(f"rows {sorted(rows.prompts)} have a soft prompt, which comes in through "
                               "model(**rows.inputs(input_ids, attention_mask)); the model was called without it")

    def _read(self, name: str, folder: Path) -> Adapter:
        """The adapter, from a private copy of the files: what their writer does meanwhile does not reach it."""
        for _ in range(3):
            files = checkpoint.files_in(folder)
            before = [_state(file) for file in files]
            with tempfile.TemporaryDirectory() as private:
                copies = [Path(shutil.copyfile(file, Path(private, file.name))) for file in files]
                if [_state(file) for file in files] != before:
                    continue
                try:
                    return checkpoint.read(self.model, *copies, name)
                except ValueError as error:
                    raise ValueError(f"{folder}: {error}") from None
        raise ValueError(f"{folder}: its files change while they are read; load it again when they are written")

    def __getstate__(self) -> dict:
        """Copied or pickled, without the last batch."""
        return vars(self) | {"spare": {}}

    def __repr__(self) -> str:
        return f"Serve({len(self.loaded)} adapters, limit {self.limit})"


def _state(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Open(nn.Module):
    """A piece that does nothing, and so keeps a socket open for `sockets.instead`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


# ---------------------------------------------------------------------------------------------
# Which adapter is meant
# ---------------------------------------------------------------------------------------------

def shelf_of(model: nn.Module) -> Serve | None:
    """The shelf of this model, if it has one."""
    holder = sockets.adapters(model).get(HOLDER)
    return holder.method if holder is not None and isinstance(holder.method, Serve) else None


def gathers(adapter: Adapter) -> bool:
    """Whether rows with this adapter can be computed together with rows of others."""
    return all(type(piece) in (LowRank, RescaleOutput, RescaleInput, Prompt) for piece in adapter.by_path.values())


def find(model: nn.Module, names: Sequence[Hashable]) -> dict[int, Adapter | None]:
    """Row -> its adapter, from the shelf or attached, None for the base. Rows that cannot be gathered are left out.

    `ValueError` for a name that is nowhere. All rows are looked up in one state of the shelf.
    """
    shelf, attached = shelf_of(model), _attached(model)
    loaded = shelf.loaded if shelf is not None else {}
    whole = not sockets.merged_names(model)                      # else the base is not the base: activation says so
    found = {}
    for row, name in enumerate(names):
        if name is None:
            if whole:
                found[row] = None
        elif name in loaded:
            if name in attached:
                raise ValueError(f"{name!r} is on the shelf and attached to the model; unload or detach one of them")
            found[row] = loaded[name]
            shelf.asked[name] = time.perf_counter_ns()
        elif name in attached:
            if whole and gathers(attached[name]):
                found[row] = attached[name]
        elif isinstance(name, str):
            raise unknown(model, name)
    return found


def _attached(model: nn.Module) -> dict[str, Adapter]:
    return {name: a for name, a in sockets.adapters(model).items() if not isinstance(a.method, Serve)}


def unknown(model: nn.Module, name: str) -> ValueError:
    """The error for a name that is neither on the shelf nor attached."""
    shelf = shelf_of(model)
    known = [*(shelf.names if shelf else ()), *_attached(model)]
    near = difflib.get_close_matches(str(name), known, n=1)
    return ValueError(f"no adapter is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
                      + f" (loaded or attached: {', '.join(known[:8]) or 'none'}{', …' if len(known) > 8 else ''})")


# ---------------------------------------------------------------------------------------------
# One batch
# ---------------------------------------------------------------------------------------------

class Rows:
    """The adapters of a batch, row by row: path -> the piece that acts there, made when it is first asked for.

    Belongs to one thread. A batch may have n rows, or k n where beams repeat each row k times.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter | None]):
        self.model, self.adapters, self.pieces, self.were_read = model, list(adapters), {}, False
        shelf = shelf_of(model)
        self.spare = shelf.spare if shelf is not None else {}
        self.prompts = {row: piece.P for row, adapter in enumerate(adapters) if adapter is not None
                        for piece in adapter.by_path.values() if isinstance(piece, Prompt)}

    def get(self, path: str):
        """The one piece that all rows share, several gathered into one, or None if no row has any here."""
        if path not in self.pieces:
            rows = [adapter.by_path.get(path) if adapter is not None else None for adapter in self.adapters]
            self.pieces[path] = rows[0] if len(set(rows)) == 1 else Gathered(rows, self.spare.pop(path, None))
        return self.pieces[path]

    def give_back(self) -> None:
        """Leave the stacks to the next batch: filling fresh memory takes several times as long, and where the next batch
        has the same adapter at the same place, there is nothing to fill.

        Not where gradients were kept, for a backward pass still reads the stacks. Used again, these rows stack anew.
        """
        self.spare |= {path: (*piece.stack[:2], [weakref.ref(p) for p in piece.groups]) for path, piece in self.pieces.items()
                       if isinstance(piece, Gathered) and piece.stack is not None and not piece.with_gradients}
        self.pieces = {}

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """What the model is called with, to read (B, T) ids: themselves, or [padding; P_i; e_i] if a row has a prompt.

        Padding comes first, so that a prompt stands right before its text, and the text's columns stay the last T. An
        encoder of an encoder-decoder may count its positions from the first column: there padding comes last.
        """
        self.were_read = True
        _check_batch(len(input_ids), len(self.adapters))
        if not self.prompts:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        e = sockets.embedding_site(self.model)[1](input_ids)     # (B, T, d)
        longest = max(map(len, self.prompts.values()))
        if self.model.config.is_encoder_decoder:
            T, begins = e.shape[1], attention_mask.int().argmax(dim=1).tolist()
            mask = nn.functional.pad(attention_mask, (0, longest))         # (B, T + P)
            e = nn.functional.pad(e, (0, 0, 0, longest))                   # (B, T + P, d)
            for row, P in self.prompts.items():
                begin, end = begins[row], begins[row] + len(P)
                e[row, end:T + len(P)], mask[row, end:T + len(P)] = e[row, begin:T].clone(), mask[row, begin:T].clone()
                e[row, begin:end], mask[row, begin:end] = P.to(e.dtype), 1
            end = mask.shape[1] - int(mask.any(dim=0).flip(0).int().argmax())  # columns behind it are padding in all rows
            return {"inputs_embeds": e[:, :end], "attention_mask": mask[:, :end]}
        e = nn.functional.pad(e, (0, 0, longest, 0))             # (B, P + T, d)
        mask = nn.functional.pad(attention_mask, (longest, 0))   # (B, P + T), zeros in front
        for row, P in self.prompts.items():
            end = longest + int(attention_mask[row].int().argmax())    # where the row's text begins
            e[row, end - len(P):end] = P.to(e.dtype)
            mask[row, end - len(P):end] = 1
        first = int(mask.any(dim=0).int().argmax())              # columns that are padding in all rows
        return {"inputs_embeds": e[:, first:], "attention_mask": mask[:, first:]}


class Gathered:
    """One piece made of the rows' pieces at one module. x (n, …, in), y (n, …, out)."""

    def __init__(self, rows: list[nn.Module | None], spare: tuple | None = None):
        self.n, self.spare, self.with_gradients = len(rows), spare or (None, None, ()), False
        self.inner = _factors([p.l if isinstance(p, RescaleInput) else None for p in rows])
        self.outer = _factors([p.whole() if isinstance(p, RescaleOutput) else None for p in rows])
        groups: dict[LowRank, list[int]] = {}                    # adapter's piece -> its rows, most often one
        for row, piece in enumerate(rows):
            if isinstance(piece, LowRank):
                groups.setdefault(piece, []).append(row)
        self.groups, self.stack = groups, None

    def before(self, x: Tensor) -> Tensor:
        _check_batch(x.shape[0], self.n)
        return x if self.inner is None else _rescaled(x, self.inner)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if self.groups:
            y = self._add_low_rank(x, y)
        return y if self.outer is None else _rescaled(y, self.outer)

    def _add_low_rank(self, x: Tensor, y: Tensor) -> Tensor:
        if self.stack is None:
            self._gather(y)
        self.with_gradients |= torch.is_grad_enabled()
        A, Bt, s = self.stack                                    # (U, r, in), (U, r, out), (U, 1, 1)
        U, (n, out) = len(A), (self.n, y.shape[-1])
        x, Y = x.to(y.dtype).reshape(n, -1, x.shape[-1]), y.reshape(n, -1, out)  # Y is y itself
        if self.take is not None:
            x = x[self.take]                                     # (U m, T, in): m rows for each adapter
        h = A @ x.reshape(U, -1, x.shape[-1]).mT                 # (U, r, m T), with the short side r not contiguous
        h = h.mul_(s).mT
        if self.take is None:
            Y.view(U, -1, out).baddbmm_(h, Bt)
        else:
            Y.index_add_(0, self.rows, torch.bmm(h, Bt).view(len(x), -1, out)[self.back])
        return Y.view(y.shape)

    @torch.no_grad()
    def _gather(self, y: Tensor) -> None:
        """Stack the factors of the adapters, and note which rows are whose."""
        factors = [getattr(piece, "never_changes", None) or (piece.factors()[0], piece.factors()[1].T) for piece in self.groups]
        r, s = max(len(A) for A, _ in factors), [piece.scale for piece in self.groups]
        *memory, before = self.spare                             # … of these pieces, those that are still alive
        there = [hasattr(piece, "never_changes") and was() is piece for piece, was in zip(self.groups, before)]
        there += [False] * (len(factors) - len(there))
        A, Bt = (_stacked([M if (M.dtype, M.device) == (y.dtype, y.device) and len(M) == r else _to_rank(M.to(y), r) for M in side], old, there)
                 for side, old in zip(zip(*factors, strict=True), memory, strict=True))
        self.stack = A, Bt, torch.tensor(s, dtype=y.dtype, device=y.device)[:, None, None]
        m = max(map(len, self.groups.values()))
        take = [row for rows in self.groups.values() for row in rows + rows[:1] * (m - len(rows))]  # filled up to m
        if take == list(range(self.n)):
            self.take = None                                     # the rows stand as they are stacked
            return
        rows = [row for rows in self.groups.values() for row in rows]
        back = [u * m + j for u, rows in enumerate(self.groups.values()) for j in range(len(rows))]
        self.take, self.rows, self.back = (torch.tensor(t, device=y.device) for t in (take, rows, back))


def _check_batch(rows: int, adapters: int) -> None:
    """`ValueError` unless a batch of so many rows has as many as there are adapters, or a multiple of it."""
    if rows % adapters:
        raise ValueError(f"the batch has {rows} rows, and adapters are named for {adapters}; accepted are as many rows, or a "
                         "multiple where beams repeat each")


def _stacked(tensors: list[Tensor], memory: Tensor | None, there: list[bool]) -> Tensor:
    """torch.stack, into this memory if that fits; `there` says which of them it holds already."""
    one, shape = tensors[0], (len(tensors), *tensors[0].shape)
    if memory is None or (memory.shape, memory.dtype, memory.device) != (shape, one.dtype, one.device) \
            or memory.is_inference() and not torch.is_inference_mode_enabled():
        return torch.stack(tensors)
    if not any(there):
        return torch.stack(tensors, out=memory)
    for i, tensor in enumerate(tensors):
        if not there[i]:
            memory[i].copy_(tensor)
    return memory


def _to_rank(M: Tensor, r: int) -> Tensor:
    """M (r', …) with rows of zeros added up to r: they add nothing to B A."""
    return M if len(M) == r else nn.functional.pad(M, (0, 0, 0, r - len(M)))


@torch.no_grad()
def _factors(rows: list[Tensor | None]) -> Tensor | None:
    """The rows' (IA)³ vectors as one table (n, 1, width), 1 where a row has none; None without any."""
    one = next((l for l in rows if l is not None), None)
    return None if one is None else torch.stack([torch.ones_like(one) if l is None else l for l in rows])[:, None]


def _rescaled(x: Tensor, factors: Tensor) -> Tensor:
    """l_i ∘ x_i in every row. x (n, …, width)."""
    return (x.reshape(len(factors), -1, x.shape[-1]) * factors.to(x.device)).to(x.dtype).view(x.shape)
