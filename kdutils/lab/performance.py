"""What a benchmark found, and where, as text: for the terminal, and as docs/performance.md."""

import contextlib
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kdutils.cache import write_text
from kdutils.data.views import view_table
from kdutils.settings import ROOT, Settings, UserError, shown_path

PAGE = ROOT / "docs" / "performance.md"
NOTES = ("<!-- notes:begin -->", "<!-- notes:end -->")
HEAD = ("What", "Ours (s)", "Tutorial's way (s)", "Speed-up", "Limit (s)", "Of the limit")


def machine(settings: Settings) -> dict[str, Any]:
    """What the times were measured on: processor, cores, GPU if one is used, torch, precision, threads."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return {
        "processor": f"{cpu} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "device": settings.device,
        "precision": settings.precision,
        "torch": torch.__version__,
    }


def conditions(settings: Settings, repetitions: int, seconds: float, steps: int) -> list[str]:
    """How the times in the table were measured, a sentence or two each."""
    return [
        "Images are generated (shapes10), weights of the ResNets random. Speed depends on neither.",
        f"Median (least to most) of {repetitions} alternating repetitions. What takes more than {seconds:g} s is timed "
        f"for at most {steps} steps, and scaled.",
        f"Ours: {settings.precision}, channels-last; epochs read features and soft labels that are there already. "
        "Tutorial's way: float32, a DataLoader with a worker on every core, teachers run in every step. Limit: forward "
        "pass, backward pass and optimiser on one batch, in our precision; of forward passes, the networks alone.",
        "The four notebooks are added up from the rows above them, with the passes that make features and soft labels.",
        f"Batches: {settings.batch_size} (student), {settings.teacher_batch_size} (ResNets). "
        f"Views: {len(view_table(**settings.views))}.",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    def seconds(side: str) -> str:
        median, *spread = row["seconds"].get(side) or [None]
        shown = f" ({' to '.join(map(_number, spread))})" if spread else ""
        return "–" if median is None else f"{_number(median)}{shown}"

    def ratio(side: str, digits: str) -> str:
        return format(row["seconds"][side][0] / row["seconds"]["ours"][0], digits) if side in row["seconds"] else "–"

    speedup, of_limit = ratio("tutorial", ".3g"), ratio("limit", ".2f")
    return [row["name"], seconds("ours"), seconds("tutorial"), speedup, seconds("limit"), of_limit]


def ratio_of(row: Mapping[str, Any], side: str) -> float:
    """How many times as long ours takes as another side: the median over the repetitions."""
    times = row["times"]
    return statistics.median(ours / other for ours, other in zip(times["ours"], times[side], strict=True))


def _ratios(found: Mapping[str, Any]) -> list[str]:
    rows = {row["key"]: row for row in found["rows"]}
    return [
        f"A distillation epoch takes {ratio_of(rows['student_kd'], 'cross_entropy'):.2f} times a cross-entropy epoch.",
        f"All seeds of a method take {ratio_of(rows['seeds'], 'one_seed'):.2f} times one seed, files included.",
    ]


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, in columns that a terminal shows as such, too."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in padded]


def summary(found: Mapping[str, Any]) -> list[str]:
    """What was measured, as Markdown lines."""
    about = found["machine"]
    gpu = f"{about['gpu']}, " if about["gpu"] else ""
    text = "{processor}, {cores} cores, {threads} threads; torch {torch}; device {device}, {precision}"
    quick = ["A quick run, to see that everything works: its numbers say little.", ""] if found["quick"] else []
    return [
        *quick,
        f"{gpu}{text.format(**about)}; profile {found['profile']}.",
        "",
        *_table([HEAD, *(_cells(row) for row in found["rows"])]),
        "",
        *(f"- {line}" for line in [*_ratios(found), *found["conditions"]]),
    ]


def read_notes(page: Path) -> str:
    """The hand-written part of an existing page; empty without one. Raises `UserError` if its marks are lost."""
    if not page.is_file():
        return ""
    text = page.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in NOTES):
        raise UserError(
            f"{shown_path(page)}: its notes have no begin or no end; put one {' and one '.join(NOTES)} around them"
        )
    return text.partition(NOTES[0])[2].partition(NOTES[1])[0].strip("\n")


def write_page(found: Mapping[str, Any], page: Path) -> Path:
    """Write the page anew; its hand-written notes stay."""
    command = f"python -m kdutils bench --profile {found['profile']} --page"
    lines = ["# Performance", "", f"Made by `{command}`; only the last section is written by hand.", ""]
    lines += [*summary(found), "", "## What was tried and did not pay", "", NOTES[0], read_notes(page), NOTES[1], ""]
    write_text(page, "\n".join(lines))
    return page
