"""Artefacts of a run: made once, written atomically, loaded again only while what they depend on is unchanged."""

import contextlib
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import os
import platform
import re
import shlex
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdutils.settings import ROOT, Settings, UserError, checked, default_of, read_profile, shown_path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

FORMAT = 2  # raise it when an artefact's content changes its meaning: older ones are then made again
# what the system says of a disk that is full, read-only or somebody else's
DISK_ERRORS = {
    errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM
}  # fmt: skip
RESULT_COLUMNS = ("task", "arm", "teachers", "labels", "epochs", "seed", "split", "metric", "value")


class Artefact(NamedTuple):
    """What a computation left: tensors by name, plain facts, the fingerprint of what it depends on, its seconds."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    fingerprint: str
    seconds: float


def fingerprint(key: Mapping[str, Any]) -> str:
    """A checksum of everything an artefact depends on."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:16]


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def artefact_path(folder: Path, name: str, key: Mapping[str, Any]) -> Path:
    """Where the artefact of that name and key lies: other settings give another file, and both are kept."""
    return folder / f"{name}-{fingerprint(key)}.safetensors"


def artefact(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
) -> Artefact:
    """Load the artefact `name` if it was made under the same `key` and is undamaged; else make and write it.

    `make` returns tensors and plain (JSON) facts. A damaged file is made again, with a line that says so. Where two
    processes want the same artefact, one makes it, and the other waits and loads it.
    """
    path = artefact_path(folder, name, key)
    if isinstance(found := _trusted(path, key), Artefact):
        return found
    with lock(path):
        if isinstance(found := _trusted(path, key), Artefact):  # made by another process meanwhile
            return found
        if found:
            print(f"{shown_path(path)}: {found}; made again")
        _remove_cut_off(folder, path.stem)
        start = time.perf_counter()
        tensors, facts = make()
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        made = Artefact(tensors, facts, fingerprint(key), time.perf_counter() - start)
        write_artefact(path, key, made)
    return made


def _trusted(path: Path, key: Mapping[str, Any]) -> Artefact | str:
    """The artefact in a file, or the reason why it must be made (empty where there is none yet)."""
    if not path.exists():
        return ""
    loaded = _load(path)
    if isinstance(loaded, str):
        return loaded
    return loaded[1] if loaded[1].fingerprint == fingerprint(key) else "was made under other settings"


def resumable(
    folder: Path,
    name: str,
    key: Mapping[str, Any],
    make: Callable[[Path], tuple[dict[str, Tensor], dict[str, Any]]],
) -> Artefact:
    """An artefact whose making may be cut: `make` is given a checkpoint's path to go on from; it is removed after."""
    checkpoint = artefact_path(folder, name, key).with_suffix(".checkpoint")
    made = artefact(folder, name, key, functools.partial(make, checkpoint))
    checkpoint.unlink(missing_ok=True)
    return made


def write_artefact(path: Path, key: Mapping[str, Any], made: Artefact) -> Path:
    """Write an artefact to a file of any name; returns its path."""
    about = json.dumps({"key": dict(key), "facts": made.facts, "seconds": made.seconds}, sort_keys=True)
    header = {"fingerprint": made.fingerprint, "about": about, "checksum": _checksum(made.tensors, about)}
    return write_tensors(path, made.tensors, header)


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


def read_artefact(path: Path) -> tuple[dict[str, Any], Artefact]:
    """An artefact, and the key it was made under, from a file of any name. Raises `UserError` for a damaged file."""
    loaded = _load(path)
    if not isinstance(loaded, tuple):
        raise UserError(f"weights: {shown_path(path)} {loaded}; get it again")
    return loaded


def _load(path: Path) -> tuple[dict[str, Any], Artefact] | str:
    """The key and the artefact in a file, or the reason why it cannot be trusted."""
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
        return about["key"], Artefact(tensors, about["facts"], fingerprint(about["key"]), about["seconds"])
    except (ValueError, KeyError, TypeError, RecursionError):  # by another program: the checksum fits
        return "holds no artefact of this project"


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    return hashlib.sha256(f"{tensor_checksum(tensors)} {about}".encode()).hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Raises `UserError` for a disk that is full or that must not be written to; `path` is then as it was.
    """
    descriptor, name = _temporary_file(path.parent, path.stem, "runs_dir")
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
            f"runs_dir: cannot write {shown_path(path)} ({reason}); free space, or choose another; what was finished "
            "is kept, and the same command goes on from there"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_cut_off(folder: Path, *stems: str) -> None:
    """Remove what processes that were killed left half-written; only under the lock of those that write there."""
    for stem in stems:
        for cut_off in folder.glob(f".{glob.escape(stem)}.*.tmp"):
            cut_off.unlink(missing_ok=True)


def disk_error(error: Exception) -> str | None:
    """What the system says, where an error comes from a disk that is full or that must not be written to."""
    said = re.search(r"os error (\d+)|code: (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    number = int(said[1] or said[2]) if said else getattr(error, "errno", None)
    return os.strerror(number) if number in DISK_ERRORS else None


def _temporary_file(folder: Path, stem: str, setting: str) -> tuple[int, str]:
    with _writing_to(folder, setting):
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".tmp")


@contextlib.contextmanager
def _writing_to(folder: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{setting}: cannot write to {shown_path(folder)} ({error.strerror}); free space, or choose another"
        ) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold what is written to `path` for this process alone; wait, with a line that names the holder, where another
    holds it: a second notebook, a batch, a machine that shares the folder.

    A process that is killed lets go. Where the file system knows no locks there is a warning in place of one: files
    are put in place whole, so the worst is that two make the same.
    """
    file = path.with_name(f"{path.name}.lock")
    descriptor = _locked(file, path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file; then it stays, and does no harm
            file.unlink()
        with contextlib.suppress(OSError):
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # also where a child process has inherited it
        os.close(descriptor)


def _locked(file: Path, path: Path) -> int:
    told, tries = False, 0
    while True:
        with _writing_to(file.parent, "runs_dir"):
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_to_lock(descriptor):
            holder = os.read(descriptor, 200).decode(errors="replace")
            os.close(descriptor)
            tries += 1
            if not told and (holder or tries > 5):  # it has a moment to write who it is
                tell(f"{shown_path(path)}: waiting for {holder or 'another process'}, which is at work on it")
                told = True
            time.sleep(0.1)
        elif not _is_there(descriptor, file):  # removed by the process that held it
            os.close(descriptor)
        else:
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            with contextlib.suppress(OSError):  # a full disk is told by what is written next
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} (since {since})".encode())
            return descriptor


def _try_to_lock(descriptor: int) -> bool:
    """Whether this process has the lock now; also where there are none."""
    try:
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(descriptor, 1000, os.SEEK_SET)  # behind the holder's name, which others read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            os.lseek(descriptor, 0, os.SEEK_SET)
            return False
        warnings.warn(f"no locks here ({error.strerror}): two runs at once may make the same twice", stacklevel=2)
    return True


def _is_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except OSError:
        return False


def tell(text: str) -> None:
    """Print a line where somebody looks: through the log of a batch run, where there is one."""
    if "KDUTILS_PROGRESS" in os.environ:
        with open(os.environ["KDUTILS_PROGRESS"], "a", encoding="utf-8") as log:
            print(text, file=log)
    else:
        print(text, flush=True)


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
        raise UserError(
            f"{what}: memory ran out; lower {settings}; what was finished is kept, and the same command goes on from "
            "there"
        ) from error


def check_writable(folder: Path, setting: str) -> None:
    """Raise `UserError` for a folder that nothing can be written to, before there is anything to write."""
    descriptor, _ = _temporary_file(folder, "try", setting)
    os.close(descriptor)
    _remove_cut_off(folder, "try")  # also those of processes that were killed at this point


@contextlib.contextmanager
def network_timeout(seconds: float = 30.0) -> Iterator[None]:
    """Let downloads inside give up when nothing arrives for so long, instead of waiting for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def record(
    settings: Settings,
    notebook: str,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, Any],
    timings: Iterable[tuple[str, float]],
    made_of: Mapping[str, str],
) -> Path:
    """Write what a notebook found, and make `results.csv`, `provenance.json` and `timings.csv` anew.

    They hold what all notebooks found under the present settings. `made_of` names what the rows depend on besides
    (data, weights, trained networks) by checksum; what another notebook found of other such things is left out.
    Returns the path of `results.csv`.
    """
    folder = settings.run_folder
    with lock(folder / "results.csv"):
        return _record(settings, notebook, rows, facts, timings, {"settings": settings.digest(), **made_of})


def _record(settings, notebook, rows, facts, timings, made_of) -> Path:
    folder = settings.run_folder
    _remove_cut_off(folder, "results", "timings", "provenance")
    _remove_cut_off(folder / "found", notebook)
    mine = {"made_of": made_of, "rows": list(rows), "facts": dict(facts), "timings": list(timings)}
    write_text(folder / "found" / f"{notebook}.json", json.dumps({**mine, "checksum": _json_checksum(mine)}, indent=1))
    found = []
    for path in sorted((folder / "found").glob("*.json")):
        entry = _read_found(path)
        if entry is None:
            print(f"results.csv: leaves out {path.stem}, as {shown_path(path)} is damaged; run that notebook again")
            continue
        differing = [name for name, checksum in entry["made_of"].items() if made_of.get(name, checksum) != checksum]
        if differing:
            print(f"results.csv: leaves out {path.stem}, which last ran with other {', '.join(differing[:3])}")
        else:
            found.append(entry)
    all_rows = [row for entry in found for row in entry["rows"]]
    results = _as_csv(RESULT_COLUMNS, [[row[c] for c in RESULT_COLUMNS] for row in all_rows])
    write_text(folder / "results.csv", results)
    all_timings = {stage: seconds for entry in found for stage, seconds in entry["timings"]}
    write_text(folder / "timings.csv", _as_csv(("stage", "seconds"), [(s, f"{t:.3f}") for s, t in all_timings.items()]))
    merged: dict[str, Any] = provenance(settings)
    for entry in found:
        merged |= entry["facts"]
    merged["results"] = results_checksum(results)
    write_text(folder / "provenance.json", json.dumps(merged, indent=1) + "\n")
    return folder / "results.csv"


def results_checksum(text: str) -> str:
    """What `provenance.json` says of the `results.csv` beside it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_found(path: Path) -> dict[str, Any] | None:
    """What a notebook found, or None for a damaged file."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        return entry if entry.pop("checksum", None) == _json_checksum(entry) else None
    except (ValueError, AttributeError, TypeError, RecursionError):  # no JSON, or that of something else
        return None


def _json_checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _as_csv(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(lines)
    return text.getvalue()


def provenance(settings: Settings) -> dict[str, Any]:
    """What a run's numbers depend on besides data and weights: settings, versions, device, commit, command."""
    packages = ("torch", "torchvision", "numpy", "pandas", "papermill", "nbconvert")
    return {
        "settings": settings.identity(),
        "device": settings.device,
        "precision": settings.precision,
        "threads": settings.threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
        "commit": _commit(),
        "command": rerun_command(settings),
    }


def rerun_command(settings: Settings) -> str:
    """The command that runs the same again, with paths relative to the project's folder."""
    profile = read_profile(settings.profile)
    words = ["python", "-m", "kdutils", "run", "--profile", shown_path(settings.profile)]
    for name, value in settings.identity().items():
        if value is not None and value != (checked(name, profile[name]) if name in profile else default_of(name)):
            words += ["-p", name, value if isinstance(value, str) else json.dumps(value)]
    if settings.threads is not None:  # sums are rounded in another order by another number of threads
        words += ["-p", "threads", str(settings.threads)]
    return shlex.join(words)


def _commit() -> str:
    """The commit of the project's checkout, `-dirty` when the code differs from it; 'unknown' outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=10)
    try:
        commit = run([*git, "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        changed = run([*git, "status", "--porcelain", "--", "kdutils", "notebooks"]).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")
