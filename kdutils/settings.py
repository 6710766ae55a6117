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
# The teachers: torchvision ResNets, each with settings of its own. CONTRIBUTING.md says what another one needs.
ARCHITECTURES = ("resnet50", "resnet18")
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
TrainedPart = Annotated[str, _one_of("last_layer", "last_block")]
YesOrNo = Annotated[bool, Rule("true or false", lambda value: isinstance(value, bool))]


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
    # Teachers
    weights: Text
    teacher_size: Annotated[int, _whole(32, 512)]
    teacher_resize: Annotated[str, _one_of("bilinear", "bicubic", "nearest")] = "bilinear"
    teacher_seeds: Seeds
    teacher_views: Count
    teacher_batch_size: BatchSize
    teacher_optimizer: Optimizer
    teacher_schedule: Schedule
    teacher_label_smoothing: Smoothing
    resnet50_trainable: TrainedPart
    resnet50_epochs: Count
    resnet50_learning_rate: Positive
    resnet50_weight_decay: NotNegative
    resnet50_last_layer_factor: Positive = 1.0  # the last layer's learning rate as a multiple of the block's
    resnet50_standardize: YesOrNo = False  # standardise the features that the last layer gets
    resnet18_trainable: TrainedPart
    resnet18_epochs: Count
    resnet18_learning_rate: Positive
    resnet18_weight_decay: NotNegative
    resnet18_last_layer_factor: Positive = 1.0  # as above
    resnet18_standardize: YesOrNo = False
    # Pre-training on the spot, for weights = generated
    generated_images: Annotated[int, _whole(100)] = 4000
    generated_epochs: Count = 3
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
        """These settings with the epochs and the views of the methods with unlabelled images, and of their controls."""
        return _ForUnlabelled(**vars(self) | {"epochs": self.unlabelled_epochs})

    def of_teacher(self, arch: str, name: str) -> Any:
        """A teacher's own setting, for example `of_teacher("resnet50", "epochs")`."""
        return getattr(self, f"{arch}_{name}")

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on: all but `MACHINE`."""
        return {name: getattr(self, name) for name in _FIELDS if name not in MACHINE} | {"study": list(self.study)}

    def digest(self) -> str:
        """A short checksum of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


class _ForUnlabelled(Settings):
    """`Settings.for_unlabelled`: `dataclasses.replace` keeps what is different here."""

    @property
    def views(self) -> dict[str, int]:
        there = 2 * (2 * self.max_shift // self.shift_step + 1) ** 2  # as `view_table` says
        all_views = super().views  # nothing is cut: the very views, and keys, of all other methods
        return all_views | {"num_views": self.unlabelled_views} if self.unlabelled_views < there else all_views


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_TYPES = typing.get_type_hints(Settings)
_RULES: dict[str, Rule] = {
    name: kind.__metadata__[0] for name, kind in typing.get_type_hints(Settings, include_extras=True).items()
}


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
    settings = Settings(**{name: checked(name, value) for name, value in values.items()})
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
            near = difflib.get_close_matches(str(name), _FIELDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the settings are: {', '.join(_FIELDS)}"
            raise UserError(f"{where}: there is no setting {str(name)!r:.80}; {hint}")


def checked(name: str, value: Any, spelt: str | None = None) -> Any:
    """The value of a setting in its own type; text becomes a number or a list where the setting is one.

    Raises `UserError` for a value that is not valid; its message calls the setting `spelt`, if given.
    """
    kind, rule, found = _TYPES[name], _RULES[name], value
    # papermill's -p delivers lists, and YAML delivers 1e-3, as text
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        if isinstance(value, str) and kind not in (str, str | None):
            found = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        if kind is float and _is_int(found):
            found = float(found)
    if isinstance(found, tuple):
        found = list(found)
    may_be_none = isinstance(None, typing.get_args(kind))
    if not (rule.accepts(found) or found is None and may_be_none):
        raise UserError(f"{spelt or name}: {_short(value)} is not valid; use {rule.text}")
    if name == "weights" and found not in ("imagenet", "generated", "none"):
        return _normal_path(found)
    if name == "data" and found.startswith("folder:"):
        return "folder:" + _normal_path(found.removeprefix("folder:"))
    return found


_REPR = reprlib.Repr()  # a few kilobytes of YAML can stand for more text than there is memory
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def _short(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _check_together(settings: Settings) -> None:
    if settings.max_shift % settings.shift_step:
        raise UserError(
            f"shift_step: {settings.shift_step} does not divide max_shift = {settings.max_shift}; "
            "choose a step that does, so that the unshifted image is one of the views"
        )
    for name in ("batch_size", "teacher_batch_size"):
        if (size := getattr(settings, name)) > settings.train_size:
            raise UserError(f"{name}: {size} is more than train_size = {settings.train_size}; choose a smaller one")


def default_of(name: str) -> Any:
    """The value of a setting that a profile leaves out (`dataclasses.MISSING` if it must not)."""
    default = _FIELDS[name].default
    return list(default) if isinstance(default, tuple) else default


def logits_file(weights: str, arch: str) -> Path | None:
    """The file with a fine-tuned teacher's logits that a `weights` folder may hold in place of weights."""
    path = project_path(weights) / f"{arch}-logits.safetensors"
    return path if weights not in ("imagenet", "generated", "none") and path.is_file() else None


def weights_file(folder: Path, arch: str) -> Path:
    """The file with `arch`'s pre-trained weights in `folder`. Raises `UserError` when there is none."""
    for suffix in (".safetensors", ".pth", ".pt"):
        if (path := folder / f"{arch}{suffix}").is_file():
            return path
    lacks = f"holds no {arch}.safetensors and no {arch}.pth" if folder.is_dir() else "is not a folder"
    raise UserError(
        f"weights: {shown_path(folder)} {lacks}; use 'imagenet', 'generated', 'none', or a folder with the state dicts "
        "of torchvision's resnet50 and resnet18 as resnet50.safetensors and resnet18.safetensors (or .pth)"
    )


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
