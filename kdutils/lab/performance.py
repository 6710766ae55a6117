"""What a benchmark found, where and how, as text: for the terminal, and as docs/performance.md."""

import contextlib
import csv
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kdutils.cache import write_text
from kdutils.data.views import view_table
from kdutils.settings import ARCHITECTURES, ROOT, Settings, UserError, shown_path

PAGE = ROOT / "docs" / "performance.md"
NOTES = ("<!-- notes:begin -->", "<!-- notes:end -->")
DISTILLED = 5  # arms of the four notebooks beside the one from scratch
SIDES = ("ours", "reference", "limit")
HEAD = ("What", "Ours (s)", "Reference (s)", "Speed-up", "Limit (s)", "Of the limit", "Peak (MB)", "Steps timed")

# What is aimed at: (key of a row, or of a ratio; what is compared; on a 2-core CPU; on one data-centre GPU)
TARGETS = (
    ("student_ce", "at least", 5, 10),
    ("student_kd", "at least", 50, 50),
    ("student_kd_shared", "at least", 10, 10),
    ("resnet50_fit", "at least", 20, 20),
    ("resnet18_fit", "at least", 2.5, 2.5),
    ("resnet50_forward", "at least", 2, 2),
    ("resnet18_forward", "at least", 2, 2),
    ("distillation_over_cross_entropy", "at most", 1.05, 1.05),
    ("student_over_bare_step", "at most", 1.15, 1.3),
    ("five_seeds_over_one", "at most", 5.0, 1.5),
    ("end_to_end_minutes", "at most", 30, 3),
)
RATIO_NAMES = {
    "distillation_over_cross_entropy": "Distillation epoch over cross-entropy epoch",
    "student_over_bare_step": "Student epoch over the bare step",
    "five_seeds_over_one": "Five seeds of one arm over one seed",
    "end_to_end_minutes": "The four notebooks end to end, minutes",
}


def machine(settings: Settings) -> dict[str, Any]:
    """What the times were measured on: processor, cores, GPU if one is used, torch, precision, threads."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return {
        "cpu": cpu, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None, "device": settings.device,
        "precision": settings.precision, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def conditions(settings: Settings, repetitions: int, seconds: float, steps: int, block: int) -> list[str]:
    """What the table's head says: how often, how long and in what portions is measured."""
    return [
        "Images: generated (shapes10). ResNets: random weights. Speed depends on neither.",
        f"Median of {repetitions} alternating repetitions, in seconds. What would take more than "
        f"{seconds:g} s each is timed for {steps} steps, or fewer where a step takes long, and scaled.",
        f"Ours: {settings.precision}, channels-last. Reference: float32, DataLoader with a worker on every core, "
        "teachers run in every step. Limit: forward, backward and optimiser on one resident batch, in our precision; "
        "of the forward passes, the networks alone.",
        "Of the limit: limit / ours. Peak: of ours; "
        + ("on the GPU." if settings.device == "cuda" else "of the whole process, the benchmark's own data included."),
        f"Batches: {settings.batch_size} (student), {settings.teacher_batch_size} (ResNets), {block} "
        f"(forward passes). Views: {len(view_table(**settings.views))}.",
    ]  # fmt: skip


def end_to_end(folder: Path, settings: Settings, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of the four notebooks: in the last run of that folder, from its timings.csv, or, where there is none on
    this device in this precision with as many threads, added up from the benchmark's own rows.

    A teacher's first fine-tuning computed features that `features of every view` counts, too: it counts here for what
    it took beyond them.
    """
    path = folder / "timings.csv"
    about = json.loads((folder / "provenance.json").read_text(encoding="utf-8")) if path.is_file() else {}
    here = {"device": settings.device, "precision": settings.precision, "threads": torch.get_num_threads()}
    if {name: about.get(name) for name in here} != here:  # a run elsewhere says nothing here
        source = "added up from the rows above (epochs, forward passes), so without what the notebooks do besides"
        return {"seconds": _added_up(rows, settings), "source": source}
    with path.open(encoding="utf-8", newline="") as file:
        seconds = {line["stage"]: float(line["seconds"]) for line in csv.DictReader(file)}
    total = sum(seconds.values())
    for arch in ARCHITECTURES:
        features = seconds.get(f"{arch}: features of every view", 0.0)
        fits = [value for stage, value in seconds.items() if stage.startswith(f"{arch}: fine-tuning")]
        total -= min(features, max(fits, default=0.0))
    return {"seconds": total, "source": f"{len(seconds)} stages of the last run ({shown_path(path)})"}


def _added_up(rows: Sequence[Mapping[str, Any]], settings: Settings) -> float:
    """Seconds of the core arms' epochs and of the teachers' passes, all by their rows' time for `train_size` images."""
    takes = {row["key"]: row["ours_s"] for row in rows}
    epochs = len(settings.seeds) * settings.epochs
    total = epochs * (takes["student_ce"] + DISTILLED * takes["student_kd"])
    for arch in ARCHITECTURES:
        passes = settings.teacher_views + (settings.val_size + settings.test_size) / settings.train_size
        fits = len(settings.teacher_seeds) * settings.of_teacher(arch, "epochs")
        total += passes * takes[f"{arch}_forward"] + fits * takes[f"{arch}_fit"]
    return total


def _number(value: float | None, digits: str = ".3g") -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else format(value, digits)


def _cells(row: Mapping[str, Any]) -> list[str]:
    def seconds(name: str) -> str:
        spread = row["spread"].get(name)
        return _number(row[f"{name}_s"]) + (f" ({_number(spread[0])}–{_number(spread[1])})" if spread else "")

    speedup = "–" if row["speedup"] is None else f"{_number(row['speedup'])}x"
    steps = " / ".join(str(row["steps"][name]) for name in SIDES if name in row["steps"])
    return [row["name"], seconds("ours"), seconds("reference"), speedup, seconds("limit"),
            _number(row["of_limit"], ".2f"), _number(row["peak_mb"]), steps]  # fmt: skip


def _about_machine(found: Mapping[str, Any]) -> str:
    gpu = f"{found['machine']['gpu']}, " if found["machine"]["gpu"] else ""
    text = "{cpu}, {cores} cores, {threads} threads; torch {torch}; device {device}, {precision}"
    return f"{gpu}{text.format(**found['machine'])}; profile {found['profile']}"


def _findings(found: Mapping[str, Any]) -> list[str]:
    """Losses, accuracy, ratios, slopes and the whole, a line each."""
    lines = [f"First loss, {c['name']}: ours {c['ours']:.5f}, reference {c['reference']:.5f}" for c in found["checks"]]
    accuracy, whole = found["accuracy"], found["end_to_end"]
    shown = {name: ", ".join(f"{value:.1%}" for value in accuracy[name]) for name in ("ours", "reference")}
    lines.append(
        f"Accuracy on held-out images after {accuracy['epochs']} epoch(s), by seed: ours {shown['ours']}; reference "
        f"{shown['reference']}"
    )
    lines += [f"{RATIO_NAMES[key]}: {value:.2f}" for key, value in found["ratios"].items()]
    for name, one in found["growth"].items():
        scale = 1000 if name == "training images" else 1
        points = [f"{float(n) * scale:,.0f}: {_number(seconds[0])} s" for n, seconds in one["seconds"].items()]
        spread = " to ".join(map(_number, one["slope_spread"]))
        lines.append(f"Growth with {name}: {_number(one['slope_s'])} ({spread}) {one['per']} [{'; '.join(points)}]")
    return [*lines, f"End to end: {whole['seconds'] / 60:.1f} minutes, {whole['source']}"]


def _target_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Targets beside what was measured: a column for a CPU, one for a GPU, of which this run fills one."""
    rows = {row["key"]: row for row in found["rows"]}
    on_gpu = found["machine"]["device"] == "cuda"
    lines = []
    for key, kind, cpu, gpu in TARGETS:
        name, value, unit = RATIO_NAMES.get(key, key), found["ratios"].get(key), ""
        if key in rows:
            name, value, unit = f"{rows[key]['name']}: speed-up", rows[key]["speedup"], "x"
        shown, target = "not measured", gpu if on_gpu else cpu
        if value is not None:
            met = value >= target if kind == "at least" else value <= target
            shown = f"{_number(value)}{unit}, {'met' if met else 'missed'}"
        measured = ["open", shown] if on_gpu else [shown, "open"]
        lines.append([name, f"{kind} {cpu}{unit}", measured[0], f"{kind} {gpu}{unit}", measured[1]])
    return lines


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    width = max(len(line[0]) for line in lines)
    padded = [[line[0].ljust(width), *line[1:]] for line in lines]
    return pd.DataFrame(padded, columns=list(head)).to_string(index=False).split("\n")


def summary(found: Mapping[str, Any], table: Callable[..., list[str]] = _aligned) -> list[str]:
    """What was measured, and what was aimed at, as the terminal shows it."""
    quick = ["A quick run, to see that everything works: its numbers say little.", ""] if found["quick"] else []
    left_open = "The GPU column is open: no CUDA machine was at hand."
    if found["machine"]["device"] == "cuda":
        left_open = "The CPU column is open: this run used the GPU."
    return [
        *quick, _about_machine(found) + ".", "",
        "## Measured", "", *(f"- {condition}" for condition in found["conditions"]), "",
        *table(HEAD, [_cells(row) for row in found["rows"]]), "", "Steps timed: ours / reference / limit.", "",
        *(f"- {row['name']}: {row['note']}" for row in found["rows"] if row["note"]), "",
        "## Targets", "",
        *table(("What", "2-core CPU", "measured", "one data-centre GPU", "measured"), _target_lines(found)),
        "", left_open, "",
        "## Same losses, accuracy, growth", "", *(f"- {line}" for line in _findings(found)),
    ]  # fmt: skip


def performance_page(found: Mapping[str, Any], notes: str) -> str:
    """docs/performance.md: the same in Markdown, and `notes`, the hand-written part, between its marks."""
    command = f"python -m kdutils bench --profile {found['profile']} --page"
    made_by = f"Made by `{command}` from `bench.json`; only the last section is written by hand."
    lines = ["# Performance", "", made_by, "", *summary(found, _markdown), ""]
    lines += ["## What was tried and did not pay", "", NOTES[0], notes.strip("\n"), NOTES[1], ""]
    return "\n".join(lines)


def read_notes(page: Path) -> str:
    """The hand-written part of an existing page; empty without one. Raises `UserError` if its marks are lost."""
    if not page.is_file():
        return ""
    text = page.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in NOTES):
        raise UserError(f"{shown_path(page)}: must hold {' and '.join(NOTES)} once each; put them around what to keep")
    return text.partition(NOTES[0])[2].partition(NOTES[1])[0].strip("\n")


def write_page(found: Mapping[str, Any], page: Path) -> Path:
    """Write the page anew, with the hand-written part of the one that is there."""
    write_text(page, performance_page(found, read_notes(page)))
    return page
