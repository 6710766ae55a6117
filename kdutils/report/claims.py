"""Claims: the report's sentences about differences. Their wording follows from the results.

A claim compares two methods by the differences of their test accuracies, paired by seed. It has three wordings: raises,
lowers, no clear difference. With fewer than three seeds it gives the difference alone. So the same report is true of
other data, other teachers and a single seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kdutils.data.images import Dataset
from kdutils.results import metrics
from kdutils.results.metrics import Difference
from kdutils.results.record import column
from kdutils.results.tables import LONG, at_epochs, bootstrap_text, interval_text, roles, signed, teacher_words
from kdutils.settings import Settings, UserError
from kdutils.students import StudentRun
from kdutils.teachers import Teacher, better_teacher

CORE = "core"  # the group of claims about the methods of the four notebooks
STUDY = ("controls", "losses", "epochs")  # the groups of the report's section on controls
ACCURACY = "the student's test accuracy"
FEW_SEEDS = "Fewer than three seeds: differences are given as they are, without intervals, and nothing is claimed."


class Claim(NamedTuple):
    """One comparison: the method `a` against the method `b`, and what its sentence calls them.

    A method is named `arm` or `arm/role`, the roles of teachers being those of `results.tables.roles`; `@long` after it
    means the students with the most epochs. `*` makes a sentence for each teacher. `{a}` and `{b}` in the words are the
    teachers of `a` and `b`. A sentence that does not say against what is about the student from scratch.
    """

    name: str
    a: str
    b: str
    subject: str
    against: str = ""


CLAIMS = {
    CORE: (
        Claim("kd-*", "kd/*", "scratch", "distillation from {a}"),
        Claim("two-teachers", "kd_mean_prob/both", "scratch", "distillation from both teachers"),
        Claim("two-better", "kd_mean_prob/both", "kd/better", "a second teacher", "distillation from {b} alone"),
        Claim("better-teacher", "kd/better", "kd/lesser", "learning from the more accurate teacher, {a},",
              "learning from {b}"),
    ),
    "unlabelled": (
        Claim("unlabelled", "kd_unlabelled/better", "scratch_equal_steps",
              "distillation from {a} with unlabelled images", "as many steps from scratch"),
        Claim("two-unlabelled", "kd_mean_prob_unlabelled/both", "kd_unlabelled/better",
              "a second teacher, with unlabelled images,", "{b} alone"),
        Claim("all-labels", "kd_unlabelled/better", "scratch_all_labels",
              "distillation from {a} with unlabelled images", "training from scratch with the labels of all of them"),
    ),
    "controls": (
        Claim("smoothing", "scratch", "no_label_smoothing", "label smoothing", "training without it"),
        Claim("beyond-plain", "kd/*", "no_label_smoothing", "distillation from {a}", "training without smoothing"),
        Claim("class-mean", "kd/*", "kd_class_mean/*", "distillation from {a}", "its soft labels averaged by class"),
    ),
    "losses": (
        Claim("dkd", "dkd/*", "kd/*", "DKD from {a}", "the loss of Hinton et al."),
        Claim("dist", "dist/*", "kd/*", "DIST from {a}", "the loss of Hinton et al."),
        Claim("standardized", "kd_standardized/*", "kd/*", "standardising {a}'s logits", "the loss of Hinton et al."),
    ),
    "epochs": (
        Claim("longer-kd", "kd/*@long", "scratch@long", "distillation from {a} for {long}", "as many from scratch"),
        Claim("longer-better", "kd/better@long", "scratch", "distillation from {a} for {long}",
              "{epochs} from scratch"),
    ),
}  # fmt: skip
PRIMARY = (  # the comparisons named in advance, those that could be made: what a table calls them, and the two methods
    ("{a} − scratch", "kd/better", "scratch"),
    ("both − {b}", "kd_mean_prob/both", "kd/better"),
    ("{a}, unlabelled images too − scratch, equal steps", "kd_unlabelled/better", "scratch_equal_steps"),
    ("both − {b}, unlabelled images too", "kd_mean_prob_unlabelled/both", "kd_unlabelled/better"),
    ("{a}, unlabelled images too − scratch, all labels", "kd_unlabelled/better", "scratch_all_labels"),
)


def claim_values(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """What report.tex reads of the claims: key -> text, from the rows of results.csv and the provenance.

    - `claim/<name>`: the claim's sentence, of all its teachers; `short/<name>`: the same without interval and p-value.
      In the name `kd-*` the star stands for `first` or `second`, so that each teacher has its own: `claim/kd-first`
    - `group/<name>`: there if any claim of that group could be made; `group/study`: of any of `STUDY`
    - `group/smoothing`: there if the student from scratch has label smoothing
    - `notice/seeds`: empty, or that there are too few seeds to claim anything

    A claim is left out where one of its two methods is not there; one of the core raises `UserError` that names it.
    """
    rows = _Rows(results, provenance)
    p_values = _holm(rows)
    values = {"notice/seeds": ""}
    if rows.smoothing:
        values["group/smoothing"] = "yes"
    for group, claims in CLAIMS.items():
        for claim, teacher in [(one, teacher) for one in claims for teacher in rows.teachers_of(one.a)]:
            name, a, b = (text.replace("*", teacher) for text in claim[:3])  # a role
            if group != CORE and not (rows.has(a) and rows.has(b)):
                continue
            found = rows.difference(a, b)
            sentence, short = _sentence(claim, rows, a, b, found, p_values)
            for key, text in ((f"claim/{name}", sentence), (f"short/{name}", short)):
                values[key] = f"{values[key]} {text}" if key in values else text
            values[f"group/{group}"] = "yes"
            if found.n < metrics.MIN_SEEDS:
                values["notice/seeds"] = FEW_SEEDS
    return values | ({"group/study": "yes"} if any(f"group/{group}" in values for group in STUDY) else {})


def _sentence(
    claim: Claim, rows: _Rows, a: str, b: str, found: Difference, p_values: Mapping[tuple, float]
) -> tuple[str, str]:
    """What a claim says of the difference of `a` and `b`, with and without interval and p-value."""
    p_value = p_values.get((rows.key(a), rows.key(b)), math.nan)
    outcome, points = metrics.verdict(found, p_value), f"{signed(found.mean)} points"
    size = f"{abs(found.mean):.2f} points"
    said = {
        "higher": f"raises {ACCURACY} by {size}",
        "lower": f"lowers {ACCURACY} by {size}",
        "no clear difference": f"makes no clear difference to {ACCURACY}",
        "": f"changes {ACCURACY} by {points}",
    }[outcome]
    against = f" compared with {claim.against}" if claim.against else ""
    text = f"{claim.subject} {said}{against}".format(a=rows.taught_by(a), b=rows.taught_by(b), **rows.words)
    text = text[:1].upper() + text[1:]
    if not outcome:
        return f"{text}.", f"{text}."
    numbers = [points] if outcome == "no clear difference" else []
    numbers += [f"95 % CI {interval_text(found)}", f"n = {found.n}"]
    if not math.isnan(p_value):
        numbers.append(f"Holm-adjusted p {'= ' * (p_value >= 0.001)}{_probability(p_value)}")
    return f"{text} ({', '.join(numbers)}).", f"{text}."


def primary_table(
    arms: Iterable[Sequence[StudentRun]], dataset: Dataset, settings: Settings, teachers: Sequence[Teacher]
) -> pd.DataFrame:
    """The primary comparisons, a line each: difference of test accuracy in points; its 95 % intervals over seeds and
    over test images; the p-value of the paired t-test over seeds, as it is and after Holm's correction.

    arms: the trained students, all seeds of each; teachers: the two. Comparisons of arms that are not there are left
    out.
    """
    trained = {(runs[0].arm, "+".join(runs[0].teachers)): runs for runs in arms}
    rows = _Rows(pd.DataFrame([
        {"task": "4", "arm": arm, "teachers": names, "epochs": settings.epochs, "seed": run.seed, "split": "test",
         "metric": "accuracy", "value": accuracy}
        for (arm, names), runs in trained.items()
        for run, accuracy in zip(runs, column(runs, dataset, "test", "accuracy"), strict=True)
    ]), {"settings": settings.identity(), "better_teacher": better_teacher(teachers).label})  # fmt: skip
    lines, p_values = [], _holm(rows)
    for words, a, b in rows.primary:
        found = rows.difference(a, b)
        runs_a, runs_b = (trained[rows.key(side)[1:]] for side in (a, b))
        words = words.format(a=rows.taught_by(a), b=rows.taught_by(b))
        lines.append({
            "Comparison": words[:1].upper() + words[1:], "Difference": signed(found.mean),
            "Over seeds": interval_text(found), "Over images": bootstrap_text(runs_a, runs_b, dataset), "n": found.n,
            "p": _probability(metrics.paired_p_value(*rows.pairs(a, b))),
            "p (Holm)": _probability(p_values[rows.key(a), rows.key(b)]),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _probability(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _holm(rows: _Rows) -> dict[tuple, float]:
    """The adjusted p-values of the primary comparisons, by their two methods; the same two under other names count
    once."""
    found = {(rows.key(a), rows.key(b)): metrics.paired_p_value(*rows.pairs(a, b)) for _, a, b in rows.primary}
    return dict(zip(found, metrics.holm(list(found.values()))))


class _Rows:
    """Test accuracies by method and seed, and the role of each teacher."""

    def __init__(self, results: pd.DataFrame, provenance: Mapping[str, Any]):
        settings, self.roles = provenance.get("settings", {}), roles(provenance)
        self.smoothing, epochs = settings.get("label_smoothing", 0), settings.get("epochs")
        self.accuracies: dict[tuple[str, str, str], dict[int, float]] = {}
        self.words = {"epochs": f"{epochs} epochs"}
        results = results[results.metric == "accuracy"]
        for which in ("", LONG):
            rows = at_epochs(results, which, epochs)
            if which == LONG:
                self.words[LONG] = f"{rows.epochs.max()} epochs"
            columns = rows[rows.split == "test"][["arm", "teachers", "seed", "value"]]
            for arm, teachers, seed, value in columns.itertuples(index=False):
                if seed in (of_method := self.accuracies.setdefault((which, arm, teachers), {})):
                    raise UserError(
                        f"results.csv: {arm}/{teachers}, seed {seed}, has two test accuracies; keep one row"
                    )
                of_method[seed] = 100 * value
        self.primary = [one for one in PRIMARY if self.has(one[1]) and self.has(one[2])]

    def key(self, method: str) -> tuple[str, str, str]:
        """(which epochs, arm, teachers as in results.csv) of a method."""
        name, _, which = method.partition("@")
        arm, _, teachers = name.partition("/")
        return which, arm, self.roles.get(teachers, teachers)

    def teachers_of(self, method: str) -> list[str]:
        """The roles that the method's `*` stands for: the teachers that have students; [""] for a method without."""
        if "*" not in method:
            return [""]
        return [role for role in ("first", "second") if self.has(method.replace("*", role))]

    def has(self, method: str) -> bool:
        return self.key(method) in self.accuracies

    def taught_by(self, method: str) -> str:
        return teacher_words(self.key(method)[2])

    def pairs(self, a: str, b: str) -> tuple[list[float], list[float]]:
        """Test accuracies of two methods, in per cent, of the seeds that both have."""
        for method in (a, b):
            if not self.has(method):
                name = "/".join(filter(None, self.key(method)[1:]))
                raise UserError(f"results.csv: there is no test accuracy of {name}; run the notebook that trains it")
        of_a, of_b = self.accuracies[self.key(a)], self.accuracies[self.key(b)]
        seeds = [seed for seed in of_a if seed in of_b]
        if not seeds or any(math.isnan(of_a[seed] - of_b[seed]) for seed in seeds):
            raise UserError(f"results.csv: {a} and {b} need numbers of the same seeds; run their notebooks again")
        return [of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds]

    def difference(self, a: str, b: str) -> Difference:
        """Paired difference of the test accuracies of two methods, in points."""
        return metrics.paired_difference(*self.pairs(a, b))
