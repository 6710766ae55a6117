"""Every parameter of a run: read from a profile, overridden by name, validated once; device and precision."""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "notebooks" / "profiles"
MACHINE = ("profile", "data_dir", "runs_dir", "device", "threads")  # where and how to compute, not what


class UserError(Exception):
    """The user gave something that cannot be used. The message is one line: the input, the rule, the remedy."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in a notebook instead of a traceback
        return [f"UserError: {self}"]


class Rule(NamedTuple):
    """The valid values of a setting: in words, for the error message, and as a test."""

    text: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(low: int, high: float = math.inf) -> Rule:
    text = f"a whole number, {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    return Rule(text, lambda value: _is_int(value) and low <= value <= high)


def _number(text: str, fits: Callable[[float], bool]) -> Rule:
    return Rule(text, lambda value: isinstance(value, float) and math.isfinite(value) and fits(value))


def _one_of(*names: str) -> Rule:
    return Rule(f"one of {', '.join(map(repr, names))}", lambda value: isinstance(value, str) and value in names)


def _different(item: Rule, at_least: int, text: str) -> Rule:
    def accepts(value: Any) -> bool:
        return isinstance(value, list) and all(map(item.accepts, value)) and at_least <= len(value) == len(set(value))

    return Rule(text, accepts)


_SEED = _whole(0, 2**31 - 1)
_TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and value.strip() != "")
_DATA = Rule(
    "'cifar10', 'shapes10' or 'folder:PATH'",
    lambda value: (
        isinstance(value, str) and re.fullmatch(r"cifar10|shapes10|folder:.*\S.*", value, re.DOTALL) is not None
    ),
)

_LABEL = Rule(
    "a text of 80 characters at most, without '+' and ','",
    lambda value: (
        isinstance(value, str)
        and value.strip() != ""
        and value.isprintable()
        and len(value) <= 80
        and not {*value} & {*"+,"}
    ),
)


def _are_teachers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(entry, (TeacherSettings, str)) or isinstance(entry, dict) and isinstance(entry.get("name"), str)
        for entry in value
    )


_RECORDS = "each a name or a record, such as [resnet50, {name: resnet18, trainable: last_block, epochs: 10}]"
_TEACHERS = Rule(f"a list of CNNs, {_RECORDS}, or [] for none", _are_teachers)
_TWO_TEACHERS = Rule(f"a list of two CNNs, {_RECORDS}", lambda value: _are_teachers(value) and len(value) == 2)

Text = Annotated[str, _TEXT]
Count = Annotated[int, _whole(1)]
BatchSize = Annotated[int, _whole(2)]
PartSize = Annotated[int, _whole(10)]
Positive = Annotated[float, _number("a finite number above 0", lambda value: value > 0)]
NotNegative = Annotated[float, _number("a finite number, 0 or above", lambda value: value >= 0)]
Fraction = Annotated[float, _number("a number from 0 to 1", lambda value: 0 <= value <= 1)]
Smoothing = Annotated[float, _number("a number from 0 to below 1", lambda value: 0 <= value < 1)]
Seeds = Annotated[list[int], _different(_SEED, 1, "a list of one or more different whole numbers, such as [0, 1, 2]")]
Names = Annotated[Sequence[str], _different(_TEXT, 0, "a list of different names, or [] for none")]
Optimizer = Annotated[str, _one_of("adam", "adamw", "sgd")]
Schedule = Annotated[str, _one_of("constant", "cosine", "one_cycle")]
Resizing = Annotated[str, _one_of("bilinear", "bicubic", "nearest")]
ImageSize = Annotated[int, _whole(32, 512)]
TrainedPart = Annotated[str, _one_of("last_layer", "last_block")]
Folds = Annotated[int, _whole(1, 10)]
YesOrNo = Annotated[bool, Rule("true or false", lambda value: isinstance(value, bool))]
Label = Annotated[str, _LABEL]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherSettings:
    """One teacher: a pretrained CNN, and how it is fine-tuned.

    name: a classifier of torchvision or timm; label: what tables and results.csv call the teacher.
    """

    name: Text
    label: Label
    weights: Text
    trainable: TrainedPart
    size: ImageSize
    resize: Resizing
    views: Count
    epochs: Count
    batch_size: BatchSize
    optimizer: Optimizer
    schedule: Schedule
    learning_rate: Positive
    weight_decay: NotNegative
    label_smoothing: Smoothing
    last_layer_factor: Positive
    standardize: YesOrNo
    folds: Folds


Teachers = Annotated[Sequence[TeacherSettings], _TEACHERS]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All parameters of a run. `load_settings` makes it, complete and valid."""

    profile: Text
    # Data
    data: Annotated[str, _DATA]
    data_name: Annotated[str | None, _TEXT] = None
    train_size: PartSize
    val_size: PartSize
    test_size: PartSize
    split_seed: Annotated[int, _SEED]
    unlabelled_size: Annotated[int | None, _whole(0)] = None  # None: all there are
    # Views: flips x shifts by multiples of shift_step up to max_shift pixels
    max_shift: Annotated[int, _whole(0, 15)]
    shift_step: Count
    # The student
    seeds: Seeds
    epochs: Count
    batch_size: BatchSize
    optimizer: Optimizer
    schedule: Schedule
    learning_rate: Positive
    weight_decay: NotNegative
    label_smoothing: Smoothing
    # Methods with unlabelled images, and their controls: passes over as many images as are labelled; views of each
    unlabelled_epochs: Count
    unlabelled_views: Count
    # Distillation
    temperature: Positive
    alpha: Fraction
    kd_label_smoothing: Smoothing
    # Teachers; each record may say for itself what the settings `teacher_*` and `weights` say for all
    teachers: Annotated[Sequence[TeacherSettings], _TWO_TEACHERS]
    backbones: Teachers = ()  # more of them, for the study's group of this name
    teacher_seeds: Seeds
    weights: Text = "imagenet"
    teacher_trainable: TrainedPart = "last_layer"
    teacher_size: ImageSize
    teacher_resize: Resizing = "bilinear"
    teacher_views: Count
    teacher_epochs: Count
    teacher_batch_size: BatchSize
    teacher_optimizer: Optimizer
    teacher_schedule: Schedule
    teacher_learning_rate: Positive
    teacher_weight_decay: NotNegative
    teacher_label_smoothing: Smoothing
    teacher_last_layer_factor: Positive = 1.0  # the last layer's learning rate as a multiple of the block's
    teacher_standardize: YesOrNo = False  # standardise the features that the last layer gets
    teacher_folds: Folds = 1  # 2 or more: cross-fitting, so that no image is labelled by a network that trained on it
    # A teacher is fitted on fewer than teacher_views views if their features take more than this
    feature_memory_gb: Positive = 4.0
    # Groups of the study, trained by notebooks/beyond/study.ipynb; none: only the four tasks
    study: Names = ()
    # The machine
    data_dir: Text = "data"
    runs_dir: Text = "runs"
    device: Annotated[str, _one_of("auto", "cpu", "cuda", "mps")] = "auto"
    precision: Annotated[str, _one_of("auto", "float32", "bfloat16")] = "auto"
    threads: Annotated[int | None, _whole(1)] = None

    @property
    def run_folder(self) -> Path:
        """The folder of all cached results of this profile's runs."""
        return project_path(self.runs_dir) / Path(self.profile).stem

    @property
    def views(self) -> dict[str, int]:
        """The enumerated views, for `kdutils.data.views.make_views` and for fingerprints."""
        return {"max_shift": self.max_shift, "shift_step": self.shift_step}

    @property
    def for_unlabelled(self) -> "Settings":
        """These settings with the epochs and the views of the methods with unlabelled images."""
        return _ForUnlabelled(**vars(self) | {"epochs": self.unlabelled_epochs})

    @property
    def for_equal_steps(self) -> "Settings":
        """These settings with as many steps as `for_unlabelled`: for controls, which see all views."""
        return dataclasses.replace(self, epochs=self.unlabelled_epochs)

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on: all but `MACHINE`."""
        values = dataclasses.asdict(self) | {"study": list(self.study)}
        return {name: value for name, value in values.items() if name not in MACHINE}

    def digest(self) -> str:
        """A short checksum of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def teacher(self, label: str) -> TeacherSettings:
        """The teacher of this label, of `teachers` or `backbones`. Raises `UserError` where there is none."""
        known = {teacher.label: teacher for teacher in (*self.teachers, *self.backbones)}
        if label not in known:
            raise UserError(f"teacher: {label!r} is not among the settings' teachers; use one of {', '.join(known)}")
        return known[label]


class _ForUnlabelled(Settings):
    """`Settings.for_unlabelled`: `dataclasses.replace` keeps what is different here."""

    @property
    def views(self) -> dict[str, int]:
        there = 2 * (2 * self.max_shift // self.shift_step + 1) ** 2  # as `view_table` says
        all_views = super().views  # nothing is cut: the very views, and keys, of all other methods
        return all_views | {"num_views": self.unlabelled_views} if self.unlabelled_views < there else all_views


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_KINDS = typing.get_type_hints(Settings, include_extras=True)
_KINDS_OF_A_TEACHER = typing.get_type_hints(TeacherSettings, include_extras=True)


def load_settings(profile: str, **overrides: Any) -> Settings:
    """The profile's settings with `overrides` (`None` keeps the profile's value), checked.

    Raises `UserError` naming the setting, its rule and what to do.
    """
    from_profile = read_profile(profile)
    check_names(from_profile, where=f"profile '{profile}'")
    check_names(overrides)
    values = from_profile | {name: value for name, value in overrides.items() if value is not None}
    values["profile"] = profile
    if values.get("data") != from_profile.get("data") and overrides.get("data_name") is None:
        values["data_name"] = None  # the profile's name is that of the profile's data
    missing = [name for name, field in _FIELDS.items() if name not in values and field.default is dataclasses.MISSING]
    if missing:
        name = missing[0]
        raise UserError(f"profile '{profile}': '{name}' is missing; add a line '{name}: ...' (see cifar10.yaml)")
    values = {name: checked(name, value) for name, value in values.items()}
    for name in ("teachers", "backbones"):
        values[name] = [_complete(name, entry, values) for entry in values.get(name, ())]
    settings = Settings(**values)
    _check_effect(settings, [name for name, value in overrides.items() if value is not None])
    _check_together(settings)
    device = pick_device(settings.device)
    return dataclasses.replace(settings, device=device, precision=pick_precision(settings.precision, device))


def notebook_settings(namespace: Mapping[str, Any]) -> Settings:
    """The settings a notebook was given: call it with `globals()` after the parameters cell.

    Reads the names of settings from the namespace. A name in the last cell that begins with `# Parameters` (the
    notebook's own, or the one papermill adds) that is no setting is an error: a typing mistake does not pass
    unnoticed.
    """
    cells = [source.strip() for source in namespace.get("In", ()) if source.lstrip().startswith("# Parameters")]
    # the notebook's own cell and papermill's differ in their first line; of each the last counts: it may be corrected
    for source in {source.partition("\n")[0]: source for source in cells}.values():
        names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        check_names(name.id for name in names if isinstance(name.ctx, ast.Store))
    given = {name: namespace[name] for name in _FIELDS if name in namespace}
    settings = load_settings(given.pop("profile", None) or "cifar10", **given)
    apply_threads(settings)
    return settings


def read_profile(profile: str) -> dict[str, Any]:
    """The settings in `notebooks/profiles/<profile>.yaml`, or in the YAML file of that path."""
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    path = PROFILES / f"{profile}.yaml" if profile in known else project_path(str(profile))
    if path.suffix != ".yaml" or not path.is_file():
        raise UserError(f"profile: {profile!r} does not exist; use {', '.join(known)}, or the path of a .yaml file")
    return read_yaml(path, "profile")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file of named values. Raises `UserError` for one that is missing, no YAML, or names a value twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"{what}: {shown_path(path)} cannot be read ({error.strerror}); give a .yaml file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: impossible numbers and dates
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason
        raise UserError(f"{what}: {shown_path(path)} is not valid YAML ({reason}); correct that line") from error
    if not isinstance(values, dict):
        raise UserError(f"{what}: {shown_path(path)} holds no settings; write lines of 'name: value'")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def check_names(names: Iterable[Any], where: str = "parameter") -> None:
    """Raise `UserError` for a name that is no setting, suggesting the nearest one."""
    for name in names:
        if name not in _FIELDS:
            raise UserError(f"{where}: there is no setting {str(name)!r:.80}; {_hint(str(name))}")


def _hint(name: str) -> str:
    arch, _, key = name.partition("_")
    if key in _KINDS_OF_A_TEACHER and arch.startswith("resnet"):  # a setting of version 0.2
        return f"write it into the teacher's record: teachers: [{{name: {arch}, {key}: ...}}, ...]"
    near = difflib.get_close_matches(name, _FIELDS, n=1)
    return f"did you mean '{near[0]}'?" if near else f"the settings are: {', '.join(_FIELDS)}"


def _complete(setting: str, entry: Any, values: Mapping[str, Any]) -> TeacherSettings:
    """A teacher's settings: what its record leaves out comes from `teacher_*` and `weights`."""
    if isinstance(entry, TeacherSettings):
        return entry
    record = {"name": entry} if isinstance(entry, str) else entry
    where = f"{setting}: {_short(record.get('label', record['name']))}"
    for key in record:
        if key not in _KINDS_OF_A_TEACHER:
            near = difflib.get_close_matches(str(key), _KINDS_OF_A_TEACHER, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"a record has: {', '.join(_KINDS_OF_A_TEACHER)}"
            raise UserError(f"{where}: there is no setting {str(key)!r:.80} of a teacher; {hint}")
    complete: dict[str, Any] = {"name": record["name"], "label": record["name"]}
    complete["weights"] = values.get("weights", default_of("weights"))
    for key in _KINDS_OF_A_TEACHER.keys() - complete.keys():
        name = f"teacher_{key}"
        complete[key] = values[name] if name in values else default_of(name)
    given = {key: value for key, value in record.items() if value is not None}
    for key, value in (complete | given).items():
        complete[key] = _valid(_KINDS_OF_A_TEACHER[key], value, f"{where}: {key}")
    complete["weights"] = _normal_weights(complete["weights"])
    return TeacherSettings(**complete)


def checked(name: str, value: Any, spelt: str | None = None) -> Any:
    """The value of a setting in its own type; text becomes a number or a list where the setting is one.

    Raises `UserError` for a value that is not valid; its message calls the setting `spelt`, if given.
    """
    found = _valid(_KINDS[name], value, spelt or name)
    if name == "weights":
        return _normal_weights(found)
    if name == "data" and found.startswith("folder:"):
        return "folder:" + _normal_path(found.removeprefix("folder:"))
    return found


def _valid(kind: Any, value: Any, spelt: str) -> Any:
    rule, kind, found = kind.__metadata__[0], typing.get_args(kind)[0], value
    # papermill's -p delivers lists, and YAML delivers 1e-3, as text
    unreadable = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError, yaml.YAMLError)
    with contextlib.suppress(*unreadable):
        if isinstance(value, str) and rule in (_TEACHERS, _TWO_TEACHERS):
            found = yaml.load(value, Loader=_UniqueKeyLoader)
        elif isinstance(value, str) and kind not in (str, str | None):
            found = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        if kind is float and _is_int(found):
            found = float(found)
    if isinstance(found, tuple):
        found = list(found)
    may_be_none = isinstance(None, typing.get_args(kind))
    if not (rule.accepts(found) or found is None and may_be_none):
        raise UserError(f"{spelt}: {_short(value)} is not valid; use {rule.text}")
    return found


def _normal_weights(weights: str) -> str:
    return weights if weights in ("imagenet", "none") else _normal_path(weights)


_REPR = reprlib.Repr()  # a few kilobytes of YAML can stand for more text than there is memory
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def _short(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _check_effect(settings: Settings, given: Iterable[str]) -> None:
    """Raise `UserError` for a setting `teacher_*` that was given, but that the record of every teacher overrules."""
    for name in given:
        key = name.removeprefix("teacher_")
        teachers = (*settings.teachers, *settings.backbones)
        if name == f"teacher_{key}" and key in _KINDS_OF_A_TEACHER:
            if all(getattr(teacher, key) != getattr(settings, name) for teacher in teachers):
                raise UserError(f"{name}: every teacher's record says its own {key}; change it in 'teachers'")


def _check_together(settings: Settings) -> None:
    if settings.max_shift % settings.shift_step:
        raise UserError(
            f"shift_step: {settings.shift_step} does not divide max_shift = {settings.max_shift}; "
            "choose a step that does, so that the unshifted image is one of the views"
        )
    teachers = (*settings.teachers, *settings.backbones)
    sizes = {"batch_size": settings.batch_size, "teacher_batch_size": settings.teacher_batch_size}
    sizes |= {f"teachers: {teacher.label}: batch_size": teacher.batch_size for teacher in teachers}
    for name, size in sizes.items():
        if size > settings.train_size:
            raise UserError(f"{name}: {size} is more than train_size = {settings.train_size}; choose a smaller one")
    for teacher in teachers:
        count = settings.train_size - math.ceil(settings.train_size / teacher.folds)
        if teacher.folds > 1 and teacher.batch_size > count:
            raise UserError(
                f"teachers: {teacher.label}: batch_size: {teacher.batch_size} is more than the {count} images that a "
                "fold trains on; choose a smaller one"
            )
    labels = [teacher.label for teacher in teachers]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"teachers: two of them are called {twice[0]!r}; give each a label of its own in its record")


def default_of(name: str) -> Any:
    """The value of a setting that a profile leaves out (`dataclasses.MISSING` if it must not)."""
    default = _FIELDS[name].default
    return list(default) if isinstance(default, tuple) else default


def project_path(path: str | Path) -> Path:
    """A path as the settings mean it: absolute, or relative to the project's folder, not to the current one."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"path: {path} names an unknown user; write the whole path") from error
    return path if path.is_absolute() else ROOT / path


def shown_path(path: str | Path) -> str:
    """A path for messages and provenance: relative to the project's folder when it lies inside it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _normal_path(text: str) -> str:
    """One spelling for each path: './weights' and '/where/the/project/is/weights' are 'weights'."""
    return shown_path(os.path.normpath(project_path(text.strip())))


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 5 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pick_device(device: str) -> str:
    """The device that a setting names; `auto`: CUDA, Apple's GPU or the CPU, the first that is there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_there in there.items() if is_there)
    if not there[device]:
        raise UserError(f"device: torch finds no '{device}' here; use 'auto' or 'cpu'")
    return device


def pick_precision(precision: str, device: str) -> str:
    """bfloat16 autocast where the processor computes in it; elsewhere it is emulated, and many times slower."""
    import torch

    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
    fast = device == "cpu" and (capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False))
    return "bfloat16" if fast else "float32"


def apply_threads(settings: Settings) -> None:
    """Set torch's number of CPU threads, where the settings name one."""
    import torch

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
