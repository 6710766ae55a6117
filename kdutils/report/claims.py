"""Claims: the report's sentences about results. Each has one wording for every outcome, and the results choose it.

A claim compares two arms by the paired differences of their seeds. So the same report is true of other data, other
weights and a single seed, and a report that lacks an arm it speaks of cannot be made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from kdutils.data.images import Dataset
from kdutils.results import metrics
from kdutils.results.metrics import Difference
from kdutils.results.tables import (
    LONG,
    at_budget,
    bootstrap_text,
    column,
    signed,
    teacher_words,
    trained_part,
    with_teachers,
)
from kdutils.settings import ARCHITECTURES, Settings, UserError
from kdutils.students import StudentRun
from kdutils.teachers import Teacher

CORE = "core"  # the group of claims whose arms the four notebooks train; all other groups may be absent
BOTH = "resnet50+resnet18"
ACCURACY = "the student's test accuracy"


class Measure(NamedTuple):
    """How a metric of results.csv is spoken of: by which factor and in which unit, what difference is called none."""

    factor: float
    unit: str
    decimals: int
    margin: float
    lower_is_better: bool


MEASURES = {
    "accuracy": Measure(100, "points", 2, 1.0, False),
    "ece": Measure(100, "points", 2, 1.0, True),
    "nll": Measure(1, "nats", 3, 0.0, True),
}  # fmt: skip


class Claim(NamedTuple):
    """One statement: the arm `a` against the arm `b`, and what to say of each outcome.

    An arm is named `arm`, `arm/teachers` or, at another budget than the settings', `arm/teachers@long` (the longest
    that the student from scratch had) and `arm/teachers@extra` (a row of the task `extra`); `x - y` is a difference of
    two, seed by seed. Teachers are named as in results.csv, or by their part: `better` and `lesser` by their students'
    accuracy on validation images, `stronger` and `weaker` by their own; `*` makes a sentence of each that is there, or
    one of both where the same is to be said of them.
    `smoothed` and `plain` are the student from scratch with and without label smoothing, whichever of them is the arm
    `scratch`. `share` names an arm, and `{share}` is how far it goes from `b` to `a`.
    """

    name: str
    a: str
    b: str
    say: Mapping[str, str]
    group: str = CORE
    metric: str = "accuracy"
    share: str = ""


def _effect(subject: str, what: str = ACCURACY, lower_is_better: bool = False) -> dict[str, str]:
    helps, hurts = ("lowers", "raises") if lower_is_better else ("raises", "lowers")
    return {
        "helps": f"{subject} {helps} {what}{{little}} {{numbers}}.",
        "hurts": f"{subject} {hurts} {what}{{little}} {{numbers}}.",
        "equivalent": f"{subject} makes no difference larger than a point to {what} {{numbers}}.",
        "not separable": f"{subject} makes no difference to {what} that these seeds can tell from chance {{numbers}}.",
        "too few seeds": f"{subject} was run with too few seeds to tell what it does to {what} {{numbers}}.",
    }


def _compared(a: str, b: str) -> dict[str, str]:
    return {
        "helps": f"{a} gives a higher test accuracy than {b}{{little}} {{numbers}}.",
        "hurts": f"{a} gives a lower test accuracy than {b}{{little}} {{numbers}}.",
        "equivalent": f"between {a} and {b} there is no difference larger than a point {{numbers}}.",
        "not separable": f"these seeds cannot tell {a} from {b} {{numbers}}.",
        "too few seeds": f"there are too few seeds to tell {a} from {b} {{numbers}}.",
    }


def _answered(**wordings: str) -> dict[str, str]:
    return {name.replace("_", " "): text for name, text in wordings.items()}


CLAIMS = (
    Claim("kd-resnet50", "kd/resnet50", "scratch", _effect("distillation from ResNet-50")),
    Claim("kd-resnet18", "kd/resnet18", "scratch", _effect("distillation from ResNet-18")),
    Claim("two-teachers", f"kd_mean_prob/{BOTH}", "scratch",
          _effect("distillation from both teachers, by the mean of their probabilities,")),
    Claim("two-mean-logit", f"kd_mean_logit/{BOTH}", "scratch",
          _effect("distillation from both teachers, by the mean of their logits,")),
    Claim("two-confidence", f"kd_confidence/{BOTH}", "scratch",
          _effect("distillation from both teachers, weighted by their confidence,")),
    Claim("two-better", f"kd_mean_prob/{BOTH}", "kd/better", _answered(
        helps="two teachers teach more than the better one alone, {b}{little} {numbers}.",
        hurts="two teachers teach less than the better one alone, {b}{little} {numbers}.",
        equivalent="adding the other teacher to the better one, {b}, makes no difference larger than a point "
                   "{numbers}.",
        not_separable="these seeds cannot tell two teachers from the better one alone, {b} {numbers}.",
        too_few_seeds="there are too few seeds to tell two teachers from the better one alone, {b} {numbers}.")),
    Claim("two-lesser", f"kd_mean_prob/{BOTH}", "kd/lesser",
          _compared("distillation from both", "distillation from {b} alone")),
    Claim("beyond-smoothing", "kd/better", "smoothed", _answered(
        helps="the better teacher, {a}, gives the student more than label smoothing does{little} {numbers}.",
        hurts="the better teacher, {a}, gives the student less than label smoothing does{little} {numbers}.",
        equivalent="between the better teacher, {a}, and label smoothing there is no difference larger than a point "
                   "{numbers}.",
        not_separable="these seeds cannot tell what the better teacher, {a}, gives from what label smoothing gives "
                      "{numbers}.",
        too_few_seeds="there are too few seeds to tell the better teacher, {a}, from label smoothing {numbers}."),
        "smoothing"),
    Claim("stronger-teacher", "kd/stronger", "kd/weaker", _answered(
        helps="the more accurate teacher, {a}, is also the better one to learn from, both at the same temperature and "
              "weight{little} {numbers}.",
        hurts="the more accurate teacher, {a}, is not the better one to learn from: its student is worse than that of "
              "{b}{little} {numbers}.",
        equivalent="the more accurate teacher, {a}, and the other, {b}, are equally good to learn from, to within a "
                   "point {numbers}.",
        not_separable="whether the more accurate teacher, {a}, or the other, {b}, is the better one to learn from, "
                      "these seeds cannot tell {numbers}.",
        too_few_seeds="there are too few seeds to tell whether the more accurate teacher, {a}, or the other, {b}, is "
                      "the better one to learn from {numbers}.")),
    Claim("logit-prob", f"kd_mean_logit/{BOTH}", f"kd_mean_prob/{BOTH}",
          _compared("the mean of logits", "the mean of probabilities")),
    Claim("confidence-prob", f"kd_confidence/{BOTH}", f"kd_mean_prob/{BOTH}",
          _compared("weighting by confidence", "the mean of probabilities")),
    Claim("nll", "kd/*", "scratch", _effect("distillation from {a}", "the student's test NLL", True), metric="nll"),
    Claim("nll-two", f"kd_mean_prob/{BOTH}", "scratch",
          _effect("distillation from both", "the student's test NLL", True), metric="nll"),
    Claim("ece", "kd/*", "scratch", _effect("distillation from {a}", "the student's calibration error", True),
          metric="ece"),
    Claim("ece-two", f"kd_mean_prob/{BOTH}", "scratch",
          _effect("distillation from both", "the student's calibration error", True), metric="ece"),

    Claim("smoothing", "smoothed", "plain", _effect("label smoothing"), "controls"),
    Claim("beyond-plain", "kd/*", "plain",
          _effect("against the student from scratch without label smoothing, distillation from {a}"), "controls"),
    Claim("shuffled", "kd/*", "kd_shuffled/*", _answered(
        helps="what {a} says of the single image is worth something to the student: its soft labels teach more than "
              "the same labels shuffled within each class{little} {numbers}.",
        hurts="what {a} says of the single image does harm: its soft labels teach less than the same labels shuffled "
              "within each class{little} {numbers}.",
        equivalent="what {a} says of the single image is worth no more than a point: shuffling its soft labels within "
                   "each class makes no larger difference {numbers}.",
        not_separable="whether what {a} says of the single image counts, beyond what it says of the class, these "
                      "seeds cannot tell {numbers}.",
        too_few_seeds="there are too few seeds to tell the soft labels of {a} from the same labels shuffled within "
                      "each class {numbers}."), "controls"),
    Claim("shuffled-plain", "kd_shuffled/*", "plain",
          _effect("against the same student from scratch, distillation from the shuffled soft labels of {a}"),
          "controls"),

    Claim("memory", "kd_out_of_fold/*", "kd/*",
          _compared("distillation from {a} with soft labels of held-out images",
                    "that with soft labels of its own training images"), "memory"),
    Claim("memory-scratch", "kd_out_of_fold/*", "scratch",
          _effect("distillation from {a} with soft labels of held-out images"), "memory"),

    Claim("self", "kd_self/*", "scratch", _effect("distillation from {a}, trained from scratch,"), "self"),
    Claim("self-better", "kd/better", "kd_self/*",
          _compared("distillation from the better teacher, {a},", "distillation from such a student"), "self"),
    Claim("self-lesser", "kd/lesser", "kd_self/*",
          _compared("distillation from the other teacher, {a},", "distillation from such a student"), "self"),

    Claim("earlier-recipe", "scratch", "scratch_earlier_recipe",
          _effect("the recipe of this report, in place of the earlier submission's,"), "earlier"),
    Claim("earlier-total", "kd_warm_start/*", "scratch_earlier_recipe",
          _effect("the earlier submission's whole procedure, with {a} as the teacher of the second half,"), "earlier"),
    Claim("earlier-longer", "earlier_recipe_longer", "scratch_earlier_recipe",
          _effect("training as long again with the same recipe and no teacher"), "earlier"),
    Claim("earlier-distilled", "kd_warm_start/*", "earlier_recipe_longer", _answered(
        helps="distillation from {a} accounts for a part of the earlier submission's gain that more epochs do not give"
              "{little} {numbers}.",
        hurts="distillation from {a} took away from what as many more epochs give{little} {numbers}.",
        equivalent="distillation from {a} accounts for no more than a point of the earlier submission's gain "
                   "{numbers}.",
        not_separable="whether distillation from {a} added anything to what as many more epochs give, these seeds "
                      "cannot tell {numbers}.",
        too_few_seeds="there are too few seeds to tell distillation from {a} from as many more epochs {numbers}."),
        "earlier"),

    Claim("tuned", "kd_tuned/*", "kd/*",
          _compared("distillation from {a}, tuned for it,", "that with the common temperature and weight"), "losses"),
    Claim("tuned-scratch", "kd_tuned/*", "scratch",
          _effect("with temperature and weight tuned for it, distillation from {a}"), "losses"),
    Claim("tuned-stronger", "kd_tuned/stronger", "kd_tuned/weaker",
          _compared("distillation from the more accurate teacher, {a}, tuned for it,",
                    "that from the other, {b}, tuned for it"), "losses"),
    Claim("dkd", "dkd/*", "kd_tuned/*",
          _compared("distillation from {a} by DKD", "that by the loss of Hinton et al. tuned alike"), "losses"),
    Claim("dist", "dist/*", "kd_tuned/*",
          _compared("distillation from {a} by DIST", "that by the loss of Hinton et al. tuned alike"), "losses"),
    Claim("standardized", "kd_standardized/*", "kd_tuned/*",
          _compared("distillation from {a} with standardised logits", "that with the logits as they are"),
          "losses"),
    Claim("dkd-common", "dkd/*", "kd/*",
          _compared("DKD", "the loss of Hinton et al. with the common temperature and weight"), "losses"),
    Claim("dist-common", "dist/*", "kd/*",
          _compared("DIST", "the loss of Hinton et al. with the common temperature and weight"), "losses"),
    Claim("standardized-common", "kd_standardized/*", "kd/*",
          _compared("distillation by standardised logits",
                    "that by the logits as they are with the common temperature and weight"), "losses"),

    Claim("longer-scratch", "scratch@long", "scratch", _effect("training from scratch for {long} epochs"), "budget"),
    Claim("longer-kd", "kd/*@long", "scratch@long",
          _effect("when both are trained for {long} epochs, distillation from {a}"), "budget"),
    Claim("longer-better", "kd/better@long", "scratch",
          _effect("distillation from {a} for {long} epochs, in place of {epochs} from scratch,"), "budget"),
    Claim("longer-two", f"kd_mean_prob/{BOTH}@long", "scratch@long",
          _effect("when both are trained for {long} epochs, distillation from both teachers"), "budget"),
    Claim("longer-two-better", f"kd_mean_prob/{BOTH}@long", "kd/better@long",
          _compared("{long} epochs of distillation from both teachers", "as many from {b} alone"),
          "budget"),
    Claim("gain-longer", "kd/*@long - scratch@long", "kd/* - scratch", _answered(
        helps="with {a} the gain is larger at {long} epochs than at {epochs}{little} {numbers}.",
        hurts="with {a} the gain is smaller at {long} epochs than at {epochs}{little} {numbers}.",
        equivalent="with {a} the gain at {long} epochs is that at {epochs}, to within a point {numbers}.",
        not_separable="whether with {a} the gain changes between {epochs} and {long} epochs, these seeds cannot tell "
                      "{numbers}.",
        too_few_seeds="there are too few seeds to tell whether with {a} the gain changes between {epochs} and {long} "
                      "epochs {numbers}."), "budget"),

    Claim("freeze-resnet50", "freeze_last_block/resnet50", "freeze_last_layer/resnet50",
          _effect("training ResNet-50's last block, and not its last layer alone,", "its test accuracy"), "freeze"),
    Claim("freeze-resnet18", "freeze_last_block/resnet18", "freeze_last_layer/resnet18",
          _effect("training ResNet-18's last block, and not its last layer alone,", "its test accuracy"), "freeze"),

    Claim("unlabelled", "kd_unlabelled/*", "scratch",
          _effect("distillation from {a} on labelled and unlabelled images, in place of {epochs} epochs from scratch "
                  "on the labelled ones,"), "unlabelled"),
    Claim("unlabelled-kd", "kd_unlabelled/*", "kd/*@extra", _answered(
        helps="that is more than distillation from {b} on the labelled images alone gives in as many steps"
              "{little} {numbers}.",
        hurts="that is less than distillation from {b} on the labelled images alone gives in as many steps"
              "{little} {numbers}.",
        equivalent="against distillation from {b} on the labelled images alone, in as many steps, there is no "
                   "difference larger than a point {numbers}.",
        not_separable="these seeds cannot tell it from distillation from {b} on the labelled images alone, in as many "
                      "steps {numbers}.",
        too_few_seeds="there are too few seeds to tell it from distillation from {b} on the labelled images alone, in "
                      "as many steps {numbers}."), "unlabelled"),
    Claim("all-labels", "scratch_all_labels", "scratch@extra", _answered(
        helps="having all the labels raises the accuracy of the student from scratch{little} {numbers}; distillation "
              "from {c} without them covers {share} of that distance.",
        hurts="having all the labels lowers the accuracy of the student from scratch{little} {numbers}, so there is "
              "no distance that distillation from {c} could cover.",
        equivalent="having all the labels makes no difference larger than a point to the student from scratch "
                   "{numbers}, so there is no distance to speak of that distillation from {c} could cover.",
        not_separable="what having all the labels does to the student from scratch, these seeds cannot tell from "
                      "chance {numbers}, nor therefore how much of it distillation from {c} makes up for.",
        too_few_seeds="there are too few seeds to tell what having all the labels does to the student from scratch "
                      "{numbers}, and how much of it distillation from {c} makes up for."),
        "unlabelled", share="kd_unlabelled/*"),
)  # fmt: skip
PRIMARY = {  # the claims that are tests, whatever comes out, and how a table calls their comparisons
    "kd-resnet50": "ResNet-50 − scratch",
    "two-teachers": "both − scratch",
    "two-better": "both − the better one, {b}",
    "beyond-smoothing": "the better one, {a} − {smoothed}",
}
STUDY = ("controls", "memory", "self", "earlier", "losses", "budget")  # the groups of the report's section on controls


def claim_values(results: pd.DataFrame, provenance: Mapping[str, Any]) -> dict[str, str]:
    """What report.tex reads of the claims: key -> text, from the rows of results.csv and the provenance.

    - `claim/<name>`: the claim's sentence, or sentences; `short/<name>`: the same without the numbers
    - `group/<name>`: there for every group of claims that can be made, and `group/study` for any of `STUDY`
    - `better/words`: the single teacher whose students have the higher accuracy on validation images
    - `words/smoothed`: which student is the control with label smoothing; `words/primary`: how many comparisons are
      primary; `words/exploratory`: how many others the sentences speak of

    A group other than the core is left out when none of the arms is there that only it speaks of. Raises `UserError`
    naming the claim when an arm of it is missing otherwise, and when no outcome fits its numbers.
    """
    rows = _Rows(results, provenance.get("settings", {}))
    groups = {CORE: None} | {claim.group: None for claim in CLAIMS if rows.has_any_of(claim.group)}
    adjusted, told = _adjusted(rows), [claim for claim in CLAIMS if claim.group in groups]
    by_teacher = {claim.name: _by_teacher(claim, rows) for claim in told}
    values = {}
    for name, claims in by_teacher.items():
        values[f"claim/{name}"] = _sentences(claims, rows, adjusted)
        values[f"short/{name}"] = _sentences(claims, rows, adjusted, short=True)
    values |= {f"group/{group}": "yes" for group in groups}
    if groups.keys() & set(STUDY):
        values["group/study"] = "yes"
    with_it = f"which is trained with label smoothing {rows.smoothing:g}"
    values["words/smoothed"] = f"the student from scratch, {with_it}" if rows.smoothing else "a student of its own"
    values["words/primary"] = ("No", "One", "Two", "Three", "Four")[len(_primary(rows))]
    compared = {(one.metric, *_pair(one.a, one.b, rows)) for claims in by_teacher.values() for one in claims}
    values["words/exploratory"] = str(len(compared - {("accuracy", *pair) for pair in adjusted}))
    return values | {"better/words": teacher_words(rows.roles["better"])}


def primary_table(
    arms: Iterable[Sequence[StudentRun]], dataset: Dataset, settings: Settings, teachers: Sequence[Teacher]
) -> pd.DataFrame:
    """The primary comparisons, a line each: difference of test accuracy in points, its 95 % intervals over seeds, over
    the teachers' runs (`metrics.clustered_difference`: students of one run count as one) and over test images, the
    p-value of the paired t-test over seeds and that after Holm's correction.

    arms: the trained students, all seeds of each, the core's at least. Raises `UserError` for one that is missing.
    """
    runs_of_teachers = min(len(teacher.runs) for teacher in teachers)
    trained = {"/".join(filter(None, (runs[0].arm, "+".join(runs[0].teachers)))): runs for runs in arms}
    rows = _Rows(pd.DataFrame([
        {"task": "4", "arm": run.arm, "teachers": "+".join(run.teachers), "epochs": settings.epochs, "seed": run.seed,
         "split": part, "metric": "accuracy", "value": accuracy}
        for runs in trained.values() for part in ("val", "test")
        for run, accuracy in zip(runs, column(runs, dataset, part, "accuracy"), strict=True)
    ]), settings.identity())  # fmt: skip
    lines = []
    adjusted = _adjusted(rows)
    for claim in _primary(rows):
        a, b = (rows.by_seed(side, claim) for side in (claim.a, claim.b))
        found, runs = compare(a, b), [trained[rows.resolved(side)] for side in (claim.a, claim.b)]
        seeds = [seed for seed in a if seed in b]
        by_run = metrics.clustered_difference(
            [a[seed] for seed in seeds], [b[seed] for seed in seeds], [seed % runs_of_teachers for seed in seeds]
        )
        words = PRIMARY[claim.name].format(
            a=_taught_by(claim.a, rows), b=_taught_by(claim.b, rows),
            smoothed="scratch (label smoothing)" if rows.smoothing else "label smoothing",
        )  # fmt: skip
        lines.append({
            "Comparison": words[:1].upper() + words[1:], "Difference": signed(found.mean),
            "Over seeds": _interval(found), "Over teacher runs": _interval(by_run),
            "Over images": bootstrap_text(runs[0], runs[1], dataset), "n": found.n,
            "p": _probability(_p_value(claim, rows)), "p (Holm)": _probability(adjusted[_pair(claim.a, claim.b, rows)]),
        })  # fmt: skip
    return pd.DataFrame(lines)


def _interval(difference: Difference) -> str:
    return f"[{signed(difference.low)}, {signed(difference.high)}]" if difference.n > 1 else "–"


def _primary(rows: _Rows) -> list[Claim]:
    return [claim for claim in CLAIMS if claim.name in PRIMARY and rows.has_any_of(claim.group)]


def _pair(a: str, b: str, rows: _Rows) -> tuple[tuple[str, ...], ...]:
    """Which runs two sides of a claim compare, however it names them."""
    return tuple(tuple("/".join(rows.named(term)) for term in side.split(" - ")) for side in (a, b))


def _adjusted(rows: _Rows) -> dict[tuple, float]:
    """The adjusted p-values of the primary comparisons, by their pair; two that compare the same arms count once."""
    p_values = {_pair(claim.a, claim.b, rows): _p_value(claim, rows) for claim in _primary(rows)}
    return dict(zip(p_values, metrics.holm(list(p_values.values()))))


def _p_value(claim: Claim, rows: _Rows) -> float:
    a, b = (rows.by_seed(side, claim) for side in (claim.a, claim.b))
    seeds = [seed for seed in a if seed in b]
    return metrics.paired_p_value([a[seed] for seed in seeds], [b[seed] for seed in seeds]) if seeds else math.nan


def _probability(p: float) -> str:
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def compare(a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Paired difference a - b of two arms' values by seed, over the seeds that both have.

    Raises ValueError when they have none, and for values that are not numbers.
    """
    seeds = [seed for seed in a if seed in b]
    if not all(math.isfinite(a[seed] - b[seed]) for seed in seeds):
        raise ValueError("a value is not a number")
    return metrics.paired_difference([a[seed] for seed in seeds], [b[seed] for seed in seeds])


class _Rows:
    """Test results by the names that claims use, and who plays which part."""

    def __init__(self, results: pd.DataFrame, settings: Mapping[str, Any]):
        self.epochs, self.smoothing = settings.get("epochs"), settings.get("label_smoothing", 0)
        self.arms = {"smoothed": "label_smoothing", "plain": "scratch"}
        if self.smoothing:
            self.arms = {"smoothed": "scratch", "plain": "no_label_smoothing"}
        self.teachers = {f"{trained_part(arch, settings)}/{arch}" for arch in ARCHITECTURES}
        at = {which: at_budget(results, which, self.epochs) for which in ("", LONG, "extra")}
        self.long = max(at[LONG].epochs, default=None)
        self.values: dict[tuple, dict[int, float]] = {}
        columns = ["arm", "teachers", "metric", "seed", "value"]
        for which, rows in at.items():
            for arm, teachers, metric, seed, value in rows[rows.split == "test"][columns].values.tolist():
                if seed in (values := self.values.setdefault((which, arm, teachers, metric), {})):
                    raise UserError(
                        f"claims: results.csv has two rows of {arm} {teachers}, seed {seed}, {metric}; keep one"
                    )
                values[seed] = value
        val = with_teachers(at[""], settings)
        val = val[(val.split == "val") & (val.metric == "accuracy")]
        self.roles = _roles(val[val.arm == "kd"], ("better", "lesser"))
        self.roles |= _roles(val[val.arm == "teacher"], ("stronger", "weaker"))

    def named(self, reference: str) -> tuple[str, str, str]:
        """Budget, arm and teachers of a reference, as in results.csv."""
        name, _, at = reference.partition("@")
        arm, _, teachers = name.partition("/")
        return at, self.arms.get(arm, arm), self.roles.get(teachers, teachers)

    def resolved(self, reference: str) -> str:
        return "/".join(filter(None, self.named(reference)[1:]))

    def teachers_of(self, reference: str) -> list[str]:
        """The teachers of all arms that the reference names, in the assignment's order."""
        at, arm, teachers = self.named(reference)
        found = {key[2] for key in self.values if key[:2] == (at, arm) and teachers in ("*", key[2])}
        return sorted(found, key=lambda names: (names.count("+"), *map(_place, names.split("+"))))

    def has_any_of(self, group: str) -> bool:
        """Whether there is any of the arms that only this group speaks of, or there are none such."""
        core, own = (
            {self.named(term): term for claim in CLAIMS if claim.group == name for term in _terms(claim)}
            for name in (CORE, group)
        )
        terms = {own[name] for name in own.keys() - core.keys()} - self.teachers
        return not terms or any(self.teachers_of(term) for term in terms)

    def by_seed(self, expression: str, claim: Claim) -> dict[int, float]:
        """The metric of an arm by seed, in its unit; of a difference of two arms, that of their common seeds."""
        if " - " in expression:
            a, b = (self.by_seed(term, claim) for term in expression.split(" - "))
            return {seed: a[seed] - b[seed] for seed in a if seed in b}
        values = self.values.get((*self.named(expression), claim.metric))
        if values is None:
            raise UserError(_lacking(claim, "".join([self.resolved(expression), *expression.partition("@")[1:]])))
        return {seed: MEASURES[claim.metric].factor * value for seed, value in values.items()}


def _roles(rows: pd.DataFrame, names: tuple[str, str]) -> dict[str, str]:
    """The two teachers in the order of their accuracies; where these are equal, in the assignment's."""
    means = rows.groupby("teachers").value.mean()
    ordered = sorted(means.index, key=lambda arch: (-means[arch], _place(arch)))
    return dict(zip(names, ordered)) if len(ordered) > 1 else {}


def _place(arch: str) -> int:
    return ARCHITECTURES.index(arch) if arch in ARCHITECTURES else len(ARCHITECTURES)


def _lacking(claim: Claim, reference: str) -> str:
    return (
        f"claim {claim.name}: results.csv has no test {claim.metric} of the arm {reference}; run the notebook that "
        "trains it"
    )


def _terms(claim: Claim) -> list[str]:
    return [term for side in (claim.a, claim.b, claim.share) if side for term in side.split(" - ")]


def _by_teacher(claim: Claim, rows: _Rows) -> list[Claim]:
    """The claim once for each teacher that its `*` stands for."""
    # the teachers that count are those of the arm that only this group speaks of
    starred = min((term for term in _terms(claim) if "*" in term), key=lambda term: term == "kd/*", default="")
    teachers = rows.teachers_of(starred) if starred else [""]
    if not teachers:
        raise UserError(_lacking(claim, starred.replace("/*", "")))
    sides = {name: getattr(claim, name) for name in ("a", "b", "share")}
    return [claim._replace(**{name: side.replace("*", by) for name, side in sides.items()}) for by in teachers]


def _sentences(claims: Sequence[Claim], rows: _Rows, p_values: Mapping[tuple, float], short: bool = False) -> str:
    """What to say of a claim, by teacher; p_values: the adjusted ones, by pair. Short: without the numbers."""
    found = [_wording(claim, rows, p_values) for claim in claims]
    wording, words = found[0]
    besides = {text.format(**more | {"a": "", "numbers": ""}) for text, more in found}
    if len(found) == 2 and len(besides) == 1:
        numbers = "; ".join(f"{more['a']}: {more['numbers']}" for _, more in found)
        found = [(wording, words | {"a": "either ResNet", "numbers": numbers})]
    texts = [wording.replace(" {numbers}", "" if short else " ({numbers})").format(**words) for wording, words in found]
    return " ".join(text[:1].upper() + text[1:] for text in texts)


def _wording(claim: Claim, rows: _Rows, p_values: Mapping[tuple, float]) -> tuple[str, dict[str, Any]]:
    """How to say a claim without `*`, and the words to put in."""
    a, b, share = claim.a, claim.b, claim.share
    measure = MEASURES[claim.metric]
    values = [rows.by_seed(side, claim) for side in (a, b)]
    adjusted = p_values.get(_pair(a, b, rows), math.nan) if claim.metric == "accuracy" else math.nan
    try:
        found = compare(*values)
        outcome = metrics.outcome(_flipped(found) if measure.lower_is_better else found, measure.margin, adjusted)
    except ValueError as error:
        raise UserError(f"claim {claim.name}: no wording fits ({error}); look at {a} and {b} in results.csv") from error
    shown = math.nan if outcome == "equivalent" else adjusted  # a p-value is about a difference from zero
    return claim.say[outcome], {
        "a": _taught_by(a, rows), "b": _taught_by(b, rows), "c": _taught_by(share, rows) if share else "",
        "numbers": _numbers(found, measure, shown), "epochs": rows.epochs, "long": rows.long,
        "little": ", by less than a point" if _is_little(found, measure.margin) else "",
        "share": _share(share, values, claim, rows) if share else "",
    }  # fmt: skip


def _flipped(difference: Difference) -> Difference:
    return Difference(-difference.mean, -difference.high, -difference.low, difference.n)


def _is_little(difference: Difference, margin: float) -> bool:
    return max(abs(difference.low), abs(difference.high)) < margin


def _taught_by(expression: str, rows: _Rows) -> str:
    return teacher_words(rows.named(expression.split(" - ")[0])[2]).replace(" + ", " and ")


def _numbers(difference: Difference, measure: Measure, adjusted: float) -> str:
    mean, low, high = (signed(value, measure.decimals) for value in difference[:3])
    if difference.n < 2:
        return f"{mean} {measure.unit}, one seed"
    primary = "" if math.isnan(adjusted) else f", Holm-adjusted p {'= ' * (adjusted >= 0.001)}{_probability(adjusted)}"
    return f"{mean} {measure.unit}, 95 % CI [{low}, {high}], n = {difference.n}{primary}"


def _share(expression: str, values: list[dict[int, float]], claim: Claim, rows: _Rows) -> str:
    goal, start = values
    distance = compare(goal, start).mean
    covered = compare(rows.by_seed(expression, claim), start).mean
    return f"{100 * covered / distance:.0f} %" if distance else "an unknown part"
