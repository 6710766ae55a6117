"""A batch run's progress in a terminal: one live line for each stage, and how long the whole may still take."""

import math
import re
import statistics
import time
from collections.abc import Sequence

from kdutils.settings import ARCHITECTURES, Settings

# how many arms each notebook trains that none before it has
STUDENTS = {"01_small_cnn": 1, "02_fine_tuned_resnets": 0, "03_one_teacher": 2, "04_two_teachers": 3}
_LINE = re.compile(r"(?P<stage>.+?): (epoch (?P<epoch>\d+)/\d+, (?P<whole>loss )?|\d+/\d+, ).*s left")


class Batch:
    """What the progress lines of a batch run's notebooks amount to: `text` makes a terminal's text of each.

    width: the terminal's columns. The time left counts every student that the notebooks to come would train; those that
    are trained already take none, so it may be too long. A line too wide for it goes without.
    """

    def __init__(self, notebooks: Sequence[str], settings: Settings, width: int):
        self.width, self.stage = width, ""
        arms = {name: STUDENTS.get(name) for name in notebooks}
        self.due = {name: None if n is None else n * len(settings.seeds) * settings.epochs for name, n in arms.items()}
        self.seconds: list[float] = []  # of the students' last epochs
        self.last = ("", 0, 0.0)

    def begin(self, notebook: str) -> None:
        """Say that a notebook begins, and that all before it are done."""
        names = list(self.due)
        for name in names[: names.index(notebook)]:
            del self.due[name]

    def text(self, line: str, now: float | None = None) -> str:
        """What to write for a line of the log: over the line before it, if that was of the same stage."""
        found = _LINE.fullmatch(line)
        if not found:
            before, self.stage = "\n" if self.stage else "", ""
            return f"{before}{line}\n"
        if found["whole"]:
            self._learn(found["stage"], int(found["epoch"]), time.monotonic() if now is None else now)
        before = "\n" if self.stage not in ("", found["stage"]) else "\r\x1b[K"
        self.stage = found["stage"]
        whole = f"  {self.left()}{line}"
        return before + (whole if len(whole) < self.width else f"  {line}"[: self.width - 1])

    def end(self) -> str:
        """What to write when a notebook is done."""
        before, self.stage = "\n" if self.stage else "", ""
        return before

    def left(self) -> str:
        """What all students that may be due still take, once an epoch was timed, and what else is to come."""
        counts = [count for count in self.due.values() if count is not None]
        if not self.seconds or not counts:
            return ""
        minutes = math.ceil(max(0, sum(counts)) * statistics.fmean(self.seconds) / 60)
        others = " + ResNets" if "02_fine_tuned_resnets" in self.due else ""
        others += " + study" if None in self.due.values() else ""
        return f"[all: {minutes} min{others}] "

    def _learn(self, stage: str, epoch: int, now: float) -> None:
        if stage.startswith(ARCHITECTURES):
            return
        current = next(iter(self.due))
        due = self.due[current]
        before = 0 if self.last[0] == stage else epoch - 1  # of a training that was cut
        self.due[current] = None if due is None else due - 1 - before
        if self.last[:2] == (stage, epoch - 1):
            self.seconds = [*self.seconds[-20:], now - self.last[2]]
        self.last = stage, epoch, now
