"""Artefacts of a run: made once, written atomically, loaded again only while what they depend on is unchanged."""

import contextlib
import csv
import functools
import hashlib
import io
import json
import os
import platform
import shlex
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdutils.settings import ROOT, Settings, UserError, checked, default_of, read_profile, shown_path

FORMAT = 2  # raise it when an artefact's content changes its meaning: older ones are then made again
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
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
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

    `make` returns tensors and plain (JSON) facts. A damaged file is made again, with a line that says so.
    """
    path = artefact_path(folder, name, key)
    if path.exists():
        loaded = _load(path)
        if isinstance(loaded, tuple) and loaded[1].fingerprint == fingerprint(key):
            return loaded[1]
        reason = loaded if isinstance(loaded, str) else "was made under other settings"
        print(f"{shown_path(path)}: {reason}; made again")
    start = time.perf_counter()
    tensors, facts = make()
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    made = Artefact(tensors, facts, fingerprint(key), time.perf_counter() - start)
    write_artefact(path, key, made)
    return made


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
        raise UserError(f"{shown_path(path)}: {loaded}; get it again")
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
    about = json.loads(header["about"])
    return about["key"], Artefact(tensors, about["facts"], fingerprint(about["key"]), about["seconds"])


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    return hashlib.sha256(f"{tensor_checksum(tensors)} {about}".encode()).hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step."""
    descriptor, name = _temporary_file(path.parent, path.stem, "runs_dir")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary_file(folder: Path, stem: str, setting: str) -> tuple[int, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=folder, prefix=f".{stem}.", suffix=".tmp")
    except OSError as error:
        raise UserError(
            f"{setting}: cannot write to {shown_path(folder)} ({error.strerror}); free space, or choose another"
        ) from error


def check_writable(folder: Path, setting: str) -> None:
    """Raise `UserError` for a folder that nothing can be written to, before there is anything to write."""
    descriptor, name = _temporary_file(folder, "try", setting)
    os.close(descriptor)
    os.unlink(name)


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
    made_of = {"settings": settings.digest(), **made_of}
    mine = {"made_of": made_of, "rows": list(rows), "facts": dict(facts), "timings": list(timings)}
    write_text(folder / "found" / f"{notebook}.json", json.dumps(mine, indent=1))
    found = []
    for path in sorted((folder / "found").glob("*.json")):
        entry = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name, checksum in entry["made_of"].items() if made_of.get(name, checksum) != checksum]
        if differing:
            print(f"results.csv: leaves out {path.stem}, which last ran with other {', '.join(differing[:3])}")
        else:
            found.append(entry)
    all_rows = [row for entry in found for row in entry["rows"]]
    write_text(folder / "results.csv", _as_csv(RESULT_COLUMNS, [[row[c] for c in RESULT_COLUMNS] for row in all_rows]))
    all_timings = {stage: seconds for entry in found for stage, seconds in entry["timings"]}
    write_text(
        folder / "timings.csv", _as_csv(("stage", "seconds"), [(s, f"{t:.3f}") for s, t in all_timings.items()])
    )
    merged: dict[str, Any] = provenance(settings)
    for entry in found:
        merged |= entry["facts"]
    write_text(folder / "provenance.json", json.dumps(merged, indent=1) + "\n")
    return folder / "results.csv"


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
