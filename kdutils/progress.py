"""Progress: a live bar for people, plain lines for files, and one live line per stage for a batch run in a terminal."""

import io
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from kdutils.settings import Settings

# How many methods each notebook trains students with that none before it has: for `epochs`, and for `unlabelled_epochs`
STUDENTS = {"01_small_cnn": (1, 0), "02_two_big_cnns": (0, 0), "03_one_teacher": (2, 3), "04_two_teachers": (3, 1)}
_LINE = re.compile(r"(?P<stage>.+?): (epoch (?P<epoch>\d+)/\d+, (?P<whole>loss )?|\d+/\d+, ).*s left")


class Batch:
    """Turns the progress lines of a batch run's notebooks into a terminal's text: `text` does one line.

    Trainings that run side by side, the seeds of a method, share a line: that of the one which told something last.

    width: the terminal's columns; a line that would be wider goes without the time left. That time counts every student
    of the notebooks to come, and is too long where some are trained already.
    """

    def __init__(self, notebooks: Sequence[str], settings: Settings, width: int):
        self.width, self.stage = width, ""
        self.teachers = tuple(teacher.label for teacher in (*settings.teachers, *settings.backbones))
        unlabelled = 0 if settings.unlabelled_size == 0 else settings.unlabelled_epochs
        # epochs of students by notebook, less those seen; None: unknown
        self.due: dict[str, int | None] = dict.fromkeys(notebooks)
        for name in self.due.keys() & STUDENTS.keys():
            usual, more = STUDENTS[name]
            self.due[name] = len(settings.seeds) * (usual * settings.epochs + more * unlabelled)
        self.seconds: list[float] = []  # that the students' last epochs took, less what ran beside them
        self.told = 0  # how many epochs of students
        self.last: dict[str, tuple[int, float, int]] = {}  # by training: its last epoch, its time, and `told` then

    def begin(self, notebook: str) -> None:
        """A notebook begins: all before it are done."""
        names = list(self.due)
        for name in names[: names.index(notebook)]:
            del self.due[name]

    def text(self, line: str, now: float | None = None) -> str:
        """What to write for a line of the log. It replaces the line before it if that was of the same stage."""
        found = _LINE.fullmatch(line)
        if not found:
            before, self.stage = "\n" if self.stage else "", ""
            return f"{before}{line}\n"
        if found["whole"]:
            self._learn(found["stage"], int(found["epoch"]), time.monotonic() if now is None else now)
        stage = re.sub(r", seed \d+$", "", found["stage"])
        before = "\n" if self.stage not in ("", stage) else "\r\x1b[K"
        self.stage = stage
        whole = f"  {self.left()}{line}"
        return before + (whole if len(whole) < self.width else f"  {line}"[: self.width - 1])

    def end(self) -> str:
        """What to write when a notebook is done."""
        before, self.stage = "\n" if self.stage else "", ""
        return before

    def left(self) -> str:
        """The minutes that the students to come may take, once an epoch was timed, and what else is to come."""
        counts = [count for count in self.due.values() if count is not None]
        if not self.seconds or not counts:
            return ""
        minutes = math.ceil(max(0, sum(counts)) * statistics.fmean(self.seconds) / 60)
        others = " + teachers" if "02_two_big_cnns" in self.due else ""
        others += " + study" if None in self.due.values() else ""
        return f"[all: {minutes} min{others}] "

    def _learn(self, stage: str, epoch: int, now: float) -> None:
        if stage.startswith(self.teachers):
            return
        current = next(iter(self.due))
        due = self.due[current]
        before = 0 if stage in self.last else epoch - 1  # of a training that was cut
        self.due[current] = None if due is None else due - 1 - before
        self.told += 1
        last, since, told = self.last.get(stage, (0, 0.0, 0))
        if stage in self.last and last == epoch - 1:
            self.seconds = [*self.seconds[-20:], (now - since) / (self.told - told)]
        self.last[stage] = epoch, now, self.told


class TrainingProgress:
    """Shows a training's progress: a bar for people; for files and batch runs a plain line an epoch, and one a minute
    in long epochs. A context manager: leaving it closes the bar."""

    bar: tqdm | None = None

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> "TrainingProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, epochs: int, steps: int, done: float = 0.0) -> None:
        """The training begins. steps: of an epoch; done: epochs that an earlier run has done."""
        self.epochs, self.steps, self.done = epochs, steps, done
        self.start = self.shown = time.monotonic()
        if _is_watched():
            # n counts epochs, by steps
            form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} epochs [{elapsed}<{remaining}{postfix}]"
            self.bar = _bar(desc=self.name, total=epochs, initial=done, bar_format=form)

    def step(self, epoch: int, step: int) -> None:
        """A step is done, the last of its epoch excepted. epoch: counted from 0; step: from 1."""
        if self.bar is not None:
            self.bar.update(1 / self.steps)
        elif time.monotonic() - self.shown > 60:
            self._line(f"epoch {epoch + 1}/{self.epochs}, step {step:,} of {self.steps:,}", epoch + step / self.steps)

    def epoch(self, history: dict[str, list[float]]) -> None:
        """An epoch is done; `history` ends with its `train_loss` and `val_accuracy`."""
        done, loss, accuracy = len(history["train_loss"]), history["train_loss"][-1], history["val_accuracy"][-1]
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, val {accuracy:.1%}", refresh=False)
            self.bar.update(done - self.bar.n)  # exactly, whatever the steps' fractions came to
        else:
            self._line(f"epoch {done}/{self.epochs}, loss {loss:.3f}, val {accuracy:.1%}", done)

    def _line(self, text: str, done: float) -> None:
        self.shown = time.monotonic()
        left = (self.shown - self.start) / (done - self.done) * (self.epochs - done)
        tell(f"{self.name}: {text}, {left:.0f} s left")


def progress_lines(items, name: str) -> Iterator:
    """Go through `items` (a sequence) with a bar, or with a plain line about every ten seconds."""
    if _is_watched():
        yield from _bar(items, desc=name)
        return
    start = shown = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > 10:
            left = (now - start) / done * (len(items) - done)
            tell(f"{name}: {done}/{len(items)}, {left:.0f} s left")
            shown = now


def tell(text: str) -> None:
    """Print a line where somebody looks: in the log of a batch run if there is one."""
    if "KDUTILS_PROGRESS" in os.environ:
        with open(os.environ["KDUTILS_PROGRESS"], "a", encoding="utf-8") as log:
            print(text, file=log)
    else:
        print(text, flush=True)


def _is_watched() -> bool:
    """Whether somebody sees a live bar: in a terminal, or in a notebook that can ask for input (papermill's cannot)."""
    if "KDUTILS_PROGRESS" in os.environ:  # a batch run reads plain lines
        return False
    if _in_notebook():
        from IPython import get_ipython

        return getattr(get_ipython().kernel, "_allow_stdin", True)
    return sys.stderr.isatty()


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules and type(sys.stdout).__module__.startswith("ipykernel")


def _bar(items=None, **options: Any) -> tqdm:
    """A live bar that stays when it is done, in a terminal or in a notebook's cell."""
    if _in_notebook():
        return _CellBar(items, file=io.StringIO(), ncols=100, mininterval=0.5, ascii=False, **options)
    return tqdm(items, file=sys.stdout, dynamic_ncols=True, **options)


class _CellBar(tqdm):
    """A bar that is one output of a notebook's cell, rewritten in place: a saved file holds its last state."""

    output = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        shown = {"text/plain": str(self) if msg is None else msg}
        if self.output is None:
            self.output = display(shown, raw=True, display_id=True)
        else:
            self.output.update(shown, raw=True)
