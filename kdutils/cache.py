"""Cached results: made once, written atomically, and loaded again only while what they depend on is unchanged.

`cached` loads or makes one; `resumable` hands its maker a `Checkpoint` besides. Below them: what a result depends on
(`fingerprint`, `describe`), its file, locks between processes, checkpoints, and errors of disk, memory and network.

After a kill, finished results are there, whole; the next holder of the lock removes half-written files; a training
resumes from its checkpoint, a file beside its result (`training._State` says what it holds, `Checkpoint.is_due` when it
is saved).

A key covers settings, data, weights and, for students, the code of their network and loss. It does not cover the code
of anything else that computes, such as training, views, the cut of a teacher or its loss: raise `FORMAT` if what they
compute changes. Names and words in keys stay: a change trains everybody's networks anew.
"""

import ast
import contextlib
import dis
import errno
import functools
import glob
import hashlib
import inspect
import io
import json
import os
import re
import socket
import tempfile
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdutils.progress import tell
from kdutils.settings import UserError, shown_path

History = dict[str, list[float]]  # one value per epoch
Made = tuple[dict[str, Tensor], dict[str, Any]]  # what a maker returns: tensors, and plain (JSON) facts
FORMAT = 2  # raise it when a cached result's content changes its meaning: older ones are then made again
CHECKPOINT_FORMAT = 1  # raise it when what `fit` saves changes: older checkpoints are then not used
# seconds between checkpoints, at least: within an epoch; at its end, so that a short epoch is not repeated
CHECKPOINT_EVERY, CHECKPOINT_AT_END = 15.0, 1.0
RESUME = "finished results are kept: repeat the command to resume"


class Cached(NamedTuple):
    """A cached result: tensors by name, plain facts, the fingerprint of what it depends on, the seconds it took."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    fingerprint: str
    seconds: float


def cached(folder: Path, name: str, key: Mapping[str, Any], make: Callable[[], Made]) -> Cached:
    """Load the cached result `name` if it was made under the same `key` and is undamaged; else make and write it.

    A damaged file is made again, with a line that says so. If two processes want the same cached result, one makes it;
    the other waits and loads it.
    """
    path = cache_path(folder, name, key)
    if isinstance(found := _load(path, key), Cached):
        return found
    with lock(path):
        if isinstance(found := _load(path, key), Cached):  # made by another process meanwhile
            return found
        if found:
            print(f"{shown_path(path)}: {found}; made again")
        remove_cut_off(folder, path.stem)
        start = time.perf_counter()
        tensors, facts = make()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        made = Cached(tensors, facts, fingerprint(key), time.perf_counter() - start)
        write_cached(path, key, made)
    return made


def resumable(folder: Path, name: str, key: Mapping[str, Any], make: Callable[["Checkpoint"], Made]) -> Cached:
    """A cached result whose making can be resumed: `make` is given a checkpoint, which is removed afterwards."""
    path = cache_path(folder, name, key).with_suffix(".checkpoint")
    made = cached(folder, name, key, lambda: make(Checkpoint(path)))
    path.unlink(missing_ok=True)
    return made


def cache_path(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """Where the cached result of that name and key lies: other settings give another file, and both are kept."""
    return folder / f"{name}-{fingerprint(key)}.safetensors"


# Identity


def fingerprint(key: Mapping[str, Any]) -> str:
    """A checksum of everything a cached result depends on: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:16]


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(function: Callable, within: tuple[Callable, ...] = ()) -> dict:
    """A function's identity for fingerprints: its code without docstring and comments, its defaults, what is bound to
    it by `functools.partial`, and the functions and plain values from around it that it uses (`within`: its callers).

    Raises `UserError` for what could change unnoticed: a lambda, a closure, anything bound or used that is neither a
    plain value nor a function.
    """
    bound: dict[str, str] = {}
    while isinstance(function, functools.partial):
        if function.args:
            raise UserError("loss: bind its parameters by name, as in partial(distillation_loss, temperature=4.0)")
        bound = {name: _plain(name, value) for name, value in function.keywords.items()} | bound
        function = function.func
    if not inspect.isfunction(function) or function.__name__ == "<lambda>" or function.__closure__:
        raise UserError(f"loss: {function!r} is not a plain function; define it with `def`, outside other functions")
    parameters = inspect.signature(function).parameters.values()
    with_default = [p for p in parameters if p.default is not p.empty and p.name not in bound]
    defaults = {p.name: _plain(p.name, p.default) for p in with_default}
    around: dict[str, object] = {}
    for name in _globals_used(function.__code__) & function.__globals__.keys():
        value = function.__globals__[name]
        module = getattr(value, "__module__", None) or ""
        if inspect.ismodule(value) or inspect.isbuiltin(value) or module.partition(".")[0] == "torch":
            continue
        if not any(value is caller for caller in (*within, function)):
            around[name] = describe(value, (*within, function)) if inspect.isfunction(value) else _plain(name, value)
    return {"name": function.__qualname__, "code": source_of(function), "bound": defaults | bound, "around": around}


def _globals_used(code: types.CodeType) -> set[str]:
    """Names that a function reads from around it, comprehensions within included (attributes are not among them)."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_globals_used(inner) for inner in code.co_consts if inspect.iscode(inner)))


def _plain(name: str, value: object) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise UserError(f"loss: it uses {name} = {value!r:.60}; use numbers and text only, or make it an argument")


def source_of(defined: Callable) -> str:
    """The code of a function or class without its docstrings and comments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(defined)))
    except (OSError, TypeError, SyntaxError) as error:
        raise UserError(f"loss: cannot read the source of {defined!r}; define it in a file or in a cell") from error
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


# Files


def write_cached(path: Path, key: Mapping[str, Any], made: Cached) -> Path:
    """Write a cached result to a file of any name; returns its path."""
    about = json.dumps({"key": dict(key), "facts": made.facts, "seconds": made.seconds}, sort_keys=True)
    header = {"fingerprint": made.fingerprint, "about": about, "checksum": _checksum(made.tensors, about)}
    return write_tensors(path, made.tensors, header)


def read_cached(path: Path) -> tuple[dict[str, Any], Cached]:
    """A cached result and its key, from a file of any name. Raises `UserError` for a damaged file."""
    loaded = _read(path)
    if isinstance(loaded, str):
        raise UserError(f"weights: {shown_path(path)} {loaded}; get it again")
    return loaded


def _load(path: Path, key: Mapping[str, Any]) -> Cached | str:
    """The cached result in a file, or the reason why it must be made (empty if there is none yet)."""
    if not path.exists():
        return ""
    loaded = _read(path)
    if isinstance(loaded, str):
        return loaded
    return loaded[1] if loaded[1].fingerprint == fingerprint(key) else "was made under other settings"


def _read(path: Path) -> tuple[dict[str, Any], Cached] | str:
    """The key and the cached result in a file, or the reason why it cannot be trusted."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({error})"
    if header.get("checksum") != _checksum(tensors, header.get("about", "")):
        return "is damaged (its checksum does not fit)"
    try:
        about = json.loads(header["about"])
        return about["key"], Cached(tensors, about["facts"], fingerprint(about["key"]), about["seconds"])
    except (ValueError, KeyError, TypeError, RecursionError):  # by another program: the checksum fits
        return "holds no cached result of this project"


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    return hashlib.sha256(f"{tensor_checksum(tensors)} {about}".encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write a .safetensors file atomically: the same content gives the same bytes. Returns its path."""

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, metadata=dict(header))
        with temporary.open("r+b") as file:  # as it comes, the file's header is in another order every time
            size = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(size))
            ordered = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
            if len(ordered) <= size:  # it has to fit where it was
                file.seek(8)
                file.write(ordered.ljust(size))

    write_atomically(path, write)
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises `UserError` for a disk that is full or read-only; `path` is then as it was.
    """
    with _writing_to(path.parent, "runs_dir"):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if (reason := disk_error(error)) is None:
            raise
        raise UserError(
            f"runs_dir: cannot write {shown_path(path)} ({reason}); free space, or choose another; {RESUME}"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_cut_off(folder: Path, *stems: str) -> None:
    """Remove the half-written files of killed processes. Only for the holder of the lock on what is written there."""
    for stem in stems:
        for cut_off in folder.glob(f".{glob.escape(stem)}.*.tmp"):
            cut_off.unlink(missing_ok=True)


def check_writable(folder: Path, setting: str) -> None:
    """Raise `UserError` for a folder that cannot be written to, before there is anything to write."""
    with _writing_to(folder, setting):
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def _writing_to(folder: Path, setting: str) -> Iterator[None]:
    """Make the folder; what fails inside is told to the user."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"{setting}: cannot write to {shown_path(folder)} ({error.strerror}); free space, or choose another"
        ) from error


# Locks


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process at a time write to `path`: a notebook, a batch run, a machine that shares the folder.

    Who comes second waits, and a line names the holder. A process that is killed lets go. Where the file system has no
    locks, a warning says so and the work goes on: files are put in place whole, so at worst two make the same.
    """
    file = path.with_name(f"{path.name}.lock")
    with _writing_to(file.parent, "runs_dir"):
        file.touch()
    held = FileLock(file, fallback_to_soft=False)  # a soft lock would outlive a process that is killed
    _acquire(held, file, path)
    try:
        yield
    finally:  # removed while it is held: who waits for it then takes a new file
        with contextlib.suppress(OSError):  # Windows removes no open file; it stays and does no harm
            file.unlink()
        held.release()


def _acquire(held: BaseFileLock, file: Path, path: Path) -> None:
    """Take a lock, after a wait if need be, and write this process's name into its file."""
    try:
        try:
            held.acquire(timeout=0)
        except Timeout:
            tell(f"{shown_path(path)}: waiting for {_holder(file)}, which is at work on it")
            held.acquire()
    except OSError as error:
        warnings.warn(f"no locks here ({error.strerror}): two runs at once may make the same twice", stacklevel=4)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk is told by what is written next
        file.write_text(f"process {os.getpid()} on {socket.gethostname()} (since {since})", encoding="utf-8")


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError):  # removed just now, or on Windows, where nobody reads a locked file
        return file.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"


# Checkpoints


class Checkpoint:
    """The file from which an interrupted training resumes: plain values, tensors and state dicts, by name.

    Without a path there is none: nothing is loaded, and nothing is ever due.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.last, self.cost = time.monotonic(), 0.0  # when the last one was written, and how long that took

    def load(self) -> dict[str, Any] | None:
        """What was saved last, on the CPU; None if there is nothing, or, with a line, nothing that can be used."""
        if self.path is None or not self.path.exists():
            return None
        content = self.path.read_bytes()
        problem = "is damaged (its checksum does not fit)"
        if hashlib.sha256(content[32:]).digest() == content[:32]:  # torch.load does not check what it reads
            state = torch.load(io.BytesIO(content[32:]), map_location="cpu", weights_only=True)
            if isinstance(state, dict) and state.pop("format", None) == CHECKPOINT_FORMAT:
                return state
            problem = "was written by another version"
        print(f"{shown_path(self.path)}: {problem}; this training starts anew")
        return None

    def is_due(self, end_of_epoch: bool) -> bool:
        """Whether it is time to save: rarely within an epoch, soon at its end.

        Writing takes a sixtieth of the time at most.
        """
        every = max(CHECKPOINT_AT_END if end_of_epoch else CHECKPOINT_EVERY, 4 * CHECKPOINT_EVERY * self.cost)
        return self.path is not None and time.monotonic() - self.last >= every

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what was saved. Raises `UserError` where the disk refuses; the old one is then kept."""
        assert self.path is not None  # without a path nothing is due
        start = time.monotonic()
        content = io.BytesIO()
        torch.save({**state, "format": CHECKPOINT_FORMAT}, content)
        checksum = hashlib.sha256(content.getbuffer()).digest()

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(checksum)
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())  # after a power cut the old one or the new one is there, whole

        write_atomically(self.path, write)
        self.last = time.monotonic()
        self.cost = self.last - start


# Errors


def disk_error(error: Exception) -> str | None:
    """The system's message if an error comes from a disk that is full, read-only or somebody else's; else None."""
    said = re.search(r"os error (\d+)|code: (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(said[1] or said[2]) if said else getattr(error, "errno", None)
    known = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM")
    return os.strerror(number) if number and errno.errorcode.get(number) in known else None


@contextlib.contextmanager
def lower_if_out_of_memory(what: str, settings: str) -> Iterator[None]:
    """Turn running out of memory inside into a `UserError` that names the settings to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for CUDA; the CPU's allocator and Apple's GPU raise RuntimeError
        said = re.search("out of memory|not enough memory|can't allocate memory", str(error))
        if not said and not isinstance(error, MemoryError):
            raise
        raise UserError(f"{what}: memory ran out; lower {settings}; {RESUME}") from error


@contextlib.contextmanager
def network_timeout(seconds: float = 30.0) -> Iterator[None]:
    """Let downloads inside fail when nothing arrives for this long, instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


DOWNLOAD_ERRORS = (OSError, RuntimeError, HTTPException)  # RuntimeError: a checksum that torch or torchvision refuses


def download_reason(error: Exception) -> str:
    """Why a download failed, in one line."""
    if isinstance(error, RuntimeError):  # a connection that breaks off ends a file early, without an error of its own
        return "what arrived is cut off or altered: its checksum does not match"
    return " ".join(str(error).split())[:160]
