"""Students that a run trained: found in its folder without training anything, and asked about pictures."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdutils import training
from kdutils.cache import read_cached
from kdutils.data.images import read_image
from kdutils.models import SmallCNN, normalise
from kdutils.settings import UserError, shown_path
from kdutils.students import student_network

RECORDED = re.compile(r"(?P<arm>\S+)(?P<teachers>( \S+)*), seed (?P<seed>\d+)")  # as `results.finish` names students
BAR = 40  # characters for certainty


class Trained(NamedTuple):
    """A student as the notebooks recorded it. `accuracy`: on the run's test images, a fraction; None: not recorded."""

    arm: str
    teachers: tuple[str, ...]
    seed: int
    fingerprint: str
    path: Path
    classes: list[str]
    data: str
    accuracy: float | None

    @property
    def name(self) -> str:
        """The name of the student's cached result, without its fingerprint."""
        return "-".join([self.arm, *self.teachers, f"seed{self.seed}"])

    @property
    def words(self) -> str:
        """The student in a line for people."""
        teachers = f" from {' and '.join(self.teachers)}" if self.teachers else ""
        right = f"; {self.accuracy:.1%} of the test images right" if self.accuracy is not None else ""
        return f"{self.arm}{teachers}, seed {self.seed}: {self.data}{right}"


def trained_students(folder: Path) -> list[Trained]:
    """The students of the last run in a run folder: those its notebooks recorded under one set of settings.

    Raises `UserError` where no notebook has run.
    """
    paths = sorted((folder / "found").glob("*.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    entries = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    entries = [entry for entry in entries if entry["made_of"]["settings"] == entries[0]["made_of"]["settings"]]
    found: dict[str, Trained] = {}
    for entry in entries:
        data = entry["facts"]["data"]
        for name, fingerprint in entry["made_of"].items():
            if name in found or not (match := RECORDED.fullmatch(name)):
                continue
            student = Trained(
                match["arm"], tuple(match["teachers"].split()), int(match["seed"]), fingerprint, Path(),
                data["classes"], data["name"], None,
            )  # fmt: skip
            found[name] = student._replace(
                path=folder / "students" / f"{student.name}-{fingerprint}.safetensors",
                accuracy=_accuracy(student, (e["rows"] for e in entries if e["made_of"].get(name) == fingerprint)),
            )
    if not found:
        raise UserError(
            f"student: {shown_path(folder)} holds none; train some first: python -m kdutils run --profile {folder.name}"
        )
    return list(found.values())


def _accuracy(student: Trained, rows_of_notebooks: Iterable[list[dict]]) -> float | None:
    wanted = {"arm": student.arm, "teachers": "+".join(student.teachers), "seed": student.seed}
    wanted |= {"split": "test", "metric": "accuracy"}
    rows = (row for rows in rows_of_notebooks for row in rows)
    return next((float(row["value"]) for row in rows if wanted.items() <= row.items()), None)


def find_student(folder: Path, arm: str, teachers: str | None = None, seed: int | None = None) -> Trained:
    """The trained student of an arm; `teachers` (joined by +) and `seed` only where there are several.

    Raises `UserError` that lists what there is, where nothing or more than one kind fits.
    """
    students = trained_students(folder)
    wanted = None if teachers is None else sorted(filter(None, teachers.split("+")))
    fitting = [
        student for student in students
        if student.arm == arm and wanted in (None, sorted(student.teachers)) and seed in (None, student.seed)
    ]  # fmt: skip
    if not fitting:
        options = {"arm": arm, "teachers": teachers, "seed": seed}
        asked = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
        seeds = ", ".join(str(number) for number in sorted({student.seed for student in students}))
        raise UserError(
            f"student: {shown_path(folder)} holds none for {asked}; there are {_listed(students)}, with seeds {seeds}"
        )
    if len({student.teachers for student in fitting}) > 1:
        raise UserError(f"student: '{arm}' was trained by several teachers; choose {_listed(fitting)}")
    return min(fitting, key=lambda student: student.seed)


def _listed(students: Sequence[Trained]) -> str:
    teachers = {(s.arm, s.teachers): f" --teachers {'+'.join(s.teachers)}" if s.teachers else "" for s in students}
    return " or ".join(sorted(f"--arm {arm}{text}" for (arm, _), text in teachers.items()))


def load_student(student: Trained) -> SmallCNN:
    """The network of a trained student. Raises `UserError` where its file is gone, damaged or of another network."""
    if not student.path.is_file():
        raise UserError(f"student: {shown_path(student.path)} is gone; run the notebooks again (python -m kdutils run)")
    try:
        return student_network(read_cached(student.path)[1].tensors)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"student: {shown_path(student.path)} does not fit the present SmallCNN; run the notebooks again"
        ) from error


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """Image files of any size and mode as uint8 [N, 3, 32, 32], resized as the images of a data folder are.

    Raises `UserError` naming the first that is no readable image.
    """
    for path in paths:
        if not path.is_file():
            what = "is a folder; name the images in it" if path.is_dir() else "is not there; check the path"
            raise UserError(f"image: {path} {what}")
    return torch.from_numpy(np.stack([read_image(path) for path in paths])).permute(0, 3, 1, 2).contiguous()


def classify(network: SmallCNN, pictures: Tensor) -> Tensor:
    """Probabilities float32 [N, C] of pictures uint8 [N, 3, 32, 32]."""
    return training.predict(network, normalise(pictures)).softmax(dim=1)


def prediction_lines(probabilities: Tensor, classes: Sequence[str], top: int) -> list[str]:
    """The `top` classes of one picture's probabilities [C], the likeliest first: name, per cent and a bar."""
    width = max(map(len, classes))
    values, order = probabilities.sort(descending=True)
    return [
        f"{classes[number]:<{width}}  {value:6.1%}  {'#' * round(BAR * value)}".rstrip()
        for value, number in list(zip(values.tolist(), order.tolist()))[:top]
    ]
