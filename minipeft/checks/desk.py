"""Where an answer runs while it is graded: in a process that holds no right answer.

`host` is a process that has imported PyTorch and this package and nothing else; it forks one process for each
exercise of each student. In there, `sit` takes the answer out of the notebook's code cells, runs it on what
the grader sends, and sends back what it returned, as JSON. Right answers, mistakes, seeds and the verdict stay
with the grader (`grading.py`), so there is nothing here that says "passed" and could be made to lie.

Linux and macOS only (fork). The memory limit and the burial of runaway grandchildren need Linux.
"""

from __future__ import annotations

import ast
import base64
import ctypes
import dis
import json
import math
import numbers
import os
import pickle
import re
import resource
import signal
import socket
import struct
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import psutil
import torch
from torch import nn

from minipeft.checks.frame import Attempt, Case, attempt

MOST_BYTES = 2**24  # of one message; the largest honest one has about 2**17
MOST_ENTRIES = 10_000  # of a list, set or dict in it
DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


# ---------------------------------------------------------------------------- the answer in the notebook


class NoAnswer(Exception):
    """There is no answer to this exercise in the notebook."""


def find_answer(cells: list[str], chapter: str, name: str) -> Any:
    """What the last `check.name(...)` of these code cells is given, or else the function called `name`.

    Only the statements are run that bind a name which the answer needs, or which such a statement needs: its
    imports, helpers and constants, and no training. Raises `NoAnswer`, or whatever these statements raise.
    """
    statements, unreadable = [], None
    for number, cell in enumerate(cells, start=1):
        try:
            parts = [part for statement in _parsed(cell) for part in _single_imports(statement)]
            statements += [(s, compile(ast.Module([s], []), f"<code cell {number}>", "exec")) for s in parts]
        except (SyntaxError, ValueError, RecursionError) as error:
            unreadable = error if re.search(rf"\.{name}\s*\(|def {name}\b", cell) else unreadable
    found = [(i, a) for i, (s, _) in enumerate(statements) if (a := _given_to_check(s, chapter, name)) is not None]
    if not found and unreadable:
        raise unreadable
    if not found and any(name in _bound(s, code) for s, code in statements):
        found = [(len(statements) - 1, ast.Name(name, ast.Load()))]
    if not found:
        raise NoAnswer
    end, given = found[-1]
    expression = compile(ast.fix_missing_locations(ast.Expression(given)), "<the check's call>", "eval")
    space = {"__name__": "__main__", "display": lambda *shown, **how: None}
    for code in _needed(statements[: end + 1], _names(expression)):
        exec(code, space)
    return eval(expression, space)


def _parsed(cell: str) -> list[ast.stmt]:
    try:
        return ast.parse(cell).body
    except SyntaxError:  # %magic, !shell, x = %magic, and help?
        return ast.parse(re.sub(r"^([ \t]*)(?:[!%?].*|[\w., ]+=\s*[!%].*|[\w.]+\?{1,2}\s*)$", r"\1pass", cell, flags=re.MULTILINE)).body


def _single_imports(statement: ast.stmt) -> list[ast.stmt]:
    """`import a, b` as two statements, so that one can be left out."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [statement]
    fields = {"module": statement.module, "level": statement.level} if isinstance(statement, ast.ImportFrom) else {}
    return [ast.copy_location(type(statement)(names=[alias], **fields), statement) for alias in statement.names]


def _given_to_check(statement: ast.stmt, chapter: str, name: str) -> ast.expr | None:
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name and node.args:
            if isinstance(node.func.value, ast.Name) and node.func.value.id in ("check", "checks", chapter):
                return node.args[0]
    return None


def _needed(statements: list[tuple[ast.stmt, types.CodeType]], names: set[str]) -> list[types.CodeType]:
    """The statements, in order, that bind one of `names` or a name that a statement so found uses."""
    names, kept = set(names), {i for i, (s, _) in enumerate(statements) if isinstance(s, ast.ImportFrom) and s.names[0].name == "*"}
    while True:
        more = {i for i, (s, code) in enumerate(statements) if i not in kept and _bound(s, code) & names}
        if not more:
            return [statements[i][1] for i in sorted(kept)]
        kept |= more
        names |= set().union(*(_names(statements[i][1]) for i in more))


def _bound(statement: ast.stmt, code: types.CodeType) -> set[str]:
    """The names that a statement binds, or of which it sets an attribute or an entry."""
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    while any(isinstance(t, (ast.Attribute, ast.Subscript)) for t in targets):
        targets = [t.value if isinstance(t, (ast.Attribute, ast.Subscript)) else t for t in targets]
    return {t.id for t in targets if isinstance(t, ast.Name)} | {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}


def _names(code: types.CodeType) -> set[str]:
    """The global names that this code and the functions in it read."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
    return own.union(*(_names(const) for const in code.co_consts if isinstance(const, types.CodeType)))


# ---------------------------------------------------------------------------- plain data


def to_plain(value: Any) -> Any:
    """`value` for JSON. What is neither a number, a text, a tensor nor a container of these keeps only its type's name."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (torch.Tensor, nn.Parameter):
        if value.layout != torch.strided or value.device.type != "cpu":
            return {"other": f"tensor ({value.layout}, {value.device})"}
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": base64.b64encode(raw).decode(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    for kind, types_ in (("list", list), ("tuple", tuple), ("set", (set, frozenset))):
        if isinstance(value, types_):
            return {kind: [to_plain(part) for part in value]}
    if isinstance(value, Mapping):
        return {"dict": [[to_plain(key), to_plain(part)] for key, part in value.items()]}
    for number, made in ((numbers.Integral, int), (numbers.Real, float)):
        if isinstance(value, number):
            return made(value)
    return {"other": type(value).__name__}


def from_plain(plain: Any) -> Any:
    """The inverse of `to_plain`. The text may come from anybody: a ValueError or the like is all it can cause."""
    if not isinstance(plain, dict):
        if plain is None or isinstance(plain, (bool, int, float, str)):
            return plain
        raise ValueError("a bare list")
    if "tensor" in plain:
        dtype, shape, raw = DTYPES[plain["dtype"]], [int(n) for n in plain["shape"]], base64.b64decode(plain["tensor"])
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError("a tensor whose bytes do not fit its shape")
        return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)
    [(kind, content)] = plain.items()
    if kind == "other":
        return type(str(content)[:80], (), {})()
    if len(content) > MOST_ENTRIES:
        raise ValueError(f"a {kind} of {len(content):,} entries; {MOST_ENTRIES:,} at most")
    if kind == "dict":
        return {from_plain(key): from_plain(part) for key, part in content}
    return {"list": list, "tuple": tuple, "set": set}[kind](map(from_plain, content))


def send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(struct.pack("<Q", len(data)) + data)


def receive(channel: socket.socket, wait: Callable[[], float | None] = lambda: None) -> bytes:
    """One message. `wait()` is how many seconds are left. Raises EOFError, TimeoutError, ValueError if it is too long."""

    def take(count: int) -> bytes:
        parts = []
        while count:
            channel.settimeout(wait())
            part = channel.recv(min(count, 2**20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    (length,) = struct.unpack("<Q", take(8))
    if length > MOST_BYTES:
        raise ValueError(f"{length:,} bytes; {MOST_BYTES:,} at most")
    return take(length)


# ---------------------------------------------------------------------------- the processes


def host(descriptor: int) -> None:
    """Fork a process for each socket that comes over the control socket; report its number, then how it ended."""
    from minipeft.checks import exercises

    control = socket.socket(fileno=descriptor)
    _linux_prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans of a student's process come here
    _linux_prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nothing outlives the grader
    exercises()
    import_module("transformers.models.llama.modeling_llama")  # a check gives such a model; a second for each fork
    torch.set_num_threads(1)  # a fork keeps none of its parent's threads
    while True:
        message, descriptors, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if not (number := os.fork()):
            control.close()
            try:
                sit(socket.socket(fileno=descriptors[0]))
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.sendall(struct.pack("<q", number))
        _, status = os.waitpid(number, 0)
        control.sendall(struct.pack("<q", os.waitstatus_to_exitcode(status)))
        _bury()


def _bury() -> None:
    """Kill whatever the last process has left behind, whichever group or session it has gone to."""
    with suppress(ChildProcessError):
        while True:
            for left in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    left.kill()
            os.waitpid(-1, os.WNOHANG)


def _linux_prctl(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def sit(channel: socket.socket) -> None:
    """Find the answer, then answer case after case until the grader hangs up."""
    os.setsid()
    _linux_prctl(1, signal.SIGKILL)
    task = pickle.loads(receive(channel))  # from the grader, and no student's code has run here yet
    os.chdir(task["folder"])
    os.environ["TMPDIR"] = task["folder"]
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    _limit(task["seconds"], task["megabytes"])
    torch.manual_seed(int.from_bytes(os.urandom(7), "big"))
    down: list[bool] = []  # the fence lets a check's own compiler through
    sys.addaudithook(_fence(task["folder"], task["closed"], down))
    for module, name, place, mode in FILES_PAST_PYTHON:
        module = import_module(module)
        setattr(module, name, _audited(getattr(module, name), place, mode))

    def tell(found: Attempt) -> None:
        try:
            message = json.dumps({"status": found.status, "why": found.why, "value": to_plain(found.value)})
        except Exception as error:  # an object that breaks when it is looked at, a list that holds itself
            message = json.dumps({"status": "failed", "why": f"what it returned cannot be read: {type(error).__name__}: {error}"})
        send(channel, message.encode())

    try:
        answer = find_answer(task["cells"], task["chapter"], task["name"])
    except NoAnswer:
        return tell(Attempt(status="not attempted", why="there is no answer in this notebook"))
    except SyntaxError as error:
        return tell(Attempt(status="failed", why=f"its cell is not Python: {error.msg}, line {error.lineno}"))
    except BaseException as error:
        return tell(Attempt(status="failed", why=f"what the answer needs raised {type(error).__name__}: {error}"))
    tell(Attempt())
    while True:
        given, observe, may_change = pickle.loads(receive(channel))

        def observed(returned, after, before, observe=observe):
            if type(returned) is not str:
                return observe(returned, after, before)
            down.append(True)  # the body of a kernel: text, which the check compiles
            try:
                return observe(returned, after, before)
            finally:
                down.clear()

        tell(attempt(answer, Case(given, may_change=may_change, observe=observed if observe else None)))


def _limit(seconds: float, megabytes: int) -> None:
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 2**26, resource.RLIMIT_CPU: math.ceil(seconds)}
    with suppress(OSError), open("/proc/self/statm") as file:  # what PyTorch alone maps is not counted
        limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + megabytes * 2**20
    for limit, most in limits.items():
        hard = resource.getrlimit(limit)[1]                      # no limit may be raised above what this process was given
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))


NEVER = ("os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill", "subprocess.", "pty.", "socket.", "ctypes.", "resource.")
LOOKS = {"os.listdir", "os.scandir"}
CHANGES = {f"os.{name}" for name in ("remove", "rename", "rmdir", "mkdir", "link", "symlink", "chmod", "chown", "truncate", "utime")}


# What opens files past Python, so that no audit event is raised: (module, function, place of the file's name, mode)
FILES_PAST_PYTHON = (("torch", "save", 1, "w"), ("torch", "from_file", 0, "r"), ("safetensors.torch", "save_file", 1, "w"))


def _audited(function: Callable, place: int, mode: str) -> Callable:
    """The function, announced to the audit hook as an opened file."""
    def call(*args, **named):
        for path in (*args[place:place + 1], *(named.get(name) for name in ("f", "filename"))):
            if isinstance(path, (str, bytes, os.PathLike)):
                sys.audit("open", path, mode, None)
        return function(*args, **named)

    return call


def _fence(own: str, closed: list[str], down: list[bool]) -> Callable[[str, tuple], None]:
    """An audit hook (PEP 578): no processes, no connections, no file changed outside `own`, nothing read of `closed`.

    It stops accidents and first ideas. Python cannot imprison Python: see `grading.py`.
    """
    real, path_of, writing = os.path.realpath, os.fsdecode, os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def within(path: Any, folders: list[str]) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        place = real(path_of(path))
        return any(place == folder or place.startswith(folder + os.sep) for folder in folders)

    def look(event: str, args: tuple) -> None:
        if down:
            return
        allowed = not event.startswith(NEVER)
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            changes = args[2] & writing if isinstance(args[2], int) else set(args[1] or "") & set("wax+")
            allowed = within(args[0], [own, os.devnull]) if changes else not within(args[0], [*closed, "/proc"])
        elif event in CHANGES:
            allowed = all(within(path, [own]) for path in args if isinstance(path, (str, bytes, os.PathLike)))
        elif event in LOOKS:
            allowed = not within(args[0] or ".", [*closed, "/proc"])
        if not allowed:
            raise PermissionError(f"{event} is not allowed while an answer is graded: {str(args)[:80]}")

    return look
