"""Every parameter of a run: read from a profile, overridden by name, validated once; device and precision."""

import ast
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import reprlib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "notebooks" / "profiles"
ARCHITECTURES = ("resnet50", "resnet18")
# of arms beyond the four tasks' own
STUDY_GROUPS = ("freeze", "controls", "memory", "self", "losses", "earlier", "budget", "unlabelled")


class UserError(Exception):
    """Something the user gave cannot be used. The message is one line: what, the rule, the remedy."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in a notebook instead of a traceback
        return [f"UserError: {self}"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a setting may be: a sentence for the error message, and the test behind it."""

    text: str
    accepts: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _at_least(low: int) -> Rule:
    return Rule(f"a whole number, at least {low}", lambda value: _is_int(value) and value >= low)


def _one_of(*names: str) -> Rule:
    listed = ", ".join(f"'{name}'" for name in names)
    return Rule(f"one of {listed}", lambda value: isinstance(value, str) and value in names)


def _is_seeds(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(_is_int(seed) and 0 <= seed < 2**31 for seed in value)
        and len(set(value)) == len(value)
    )


def _is_groups(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and all(isinstance(group, str) and group in STUDY_GROUPS for group in value)
        and len(set(value)) == len(value)
    )


_POSITIVE = Rule("a finite number above 0", lambda value: _is_number(value) and value > 0)
_NOT_NEGATIVE = Rule("a finite number, 0 or above", lambda value: _is_number(value) and value >= 0)
_FRACTION = Rule("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_SMOOTHING = Rule("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_TEXT = Rule("a text that is not empty", lambda value: isinstance(value, str) and value.strip() != "")
_SEEDS = Rule("a list of one or more different whole numbers, such as [0, 1, 2]", _is_seeds)
_GROUPS = Rule(f"a list of different names among {', '.join(STUDY_GROUPS)}, or [] for none", _is_groups)
_OPTIMIZER = _one_of("adam", "adamw", "sgd")
_SCHEDULE = _one_of("constant", "cosine", "one_cycle")
_TRAINABLE = _one_of("last_layer", "last_block")
_YES_OR_NO = Rule("true or false", lambda value: isinstance(value, bool))


def _optional(rule: Rule) -> Rule:
    return Rule(f"None or {rule.text}", lambda value: value is None or rule.accepts(value))


def _is_data(value: Any) -> bool:
    return isinstance(value, str) and (
        value in ("cifar10", "shapes10") or value.startswith("folder:") and value.removeprefix("folder:").strip() != ""
    )


def _setting(rule: Rule, default: Any = dataclasses.MISSING, machine: bool = False) -> Any:
    """A field with its rule. `machine` settings say where and how to compute, not what: no part of an identity."""
    return dataclasses.field(default=default, metadata={"rule": rule, "machine": machine})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All parameters of a run; `load_settings` makes it, complete and valid."""

    profile: str = _setting(_TEXT, machine=True)
    # Data
    data: str = _setting(Rule("'cifar10', 'shapes10' or 'folder:PATH'", _is_data))
    data_name: str | None = _setting(_optional(_TEXT), default=None)
    train_size: int = _setting(_at_least(10))
    val_size: int = _setting(_at_least(10))
    test_size: int = _setting(_at_least(10))
    split_seed: int = _setting(Rule("a whole number from 0 to 2147483647", lambda v: _is_int(v) and 0 <= v < 2**31))
    # Views: flips x shifts by multiples of shift_step up to max_shift pixels
    max_shift: int = _setting(Rule("a whole number from 0 to 15", lambda v: _is_int(v) and 0 <= v <= 15))
    shift_step: int = _setting(_at_least(1))
    # The student
    seeds: list[int] = _setting(_SEEDS)
    epochs: int = _setting(_at_least(1))
    batch_size: int = _setting(_at_least(2))
    optimizer: str = _setting(_OPTIMIZER)
    schedule: str = _setting(_SCHEDULE)
    learning_rate: float = _setting(_POSITIVE)
    weight_decay: float = _setting(_NOT_NEGATIVE)
    label_smoothing: float = _setting(_SMOOTHING)
    # Distillation
    temperature: float = _setting(_POSITIVE)
    alpha: float = _setting(_FRACTION)
    kd_label_smoothing: float = _setting(_SMOOTHING)
    # Teachers
    weights: str = _setting(_TEXT)
    teacher_size: int = _setting(Rule("a whole number from 32 to 512", lambda v: _is_int(v) and 32 <= v <= 512))
    teacher_resize: str = _setting(_one_of("bilinear", "bicubic", "nearest"), default="bilinear")
    teacher_seeds: list[int] = _setting(_SEEDS)
    teacher_views: int = _setting(_at_least(1))
    teacher_batch_size: int = _setting(_at_least(2))
    teacher_optimizer: str = _setting(_OPTIMIZER)
    teacher_schedule: str = _setting(_SCHEDULE)
    teacher_label_smoothing: float = _setting(_SMOOTHING)
    resnet50_trainable: str = _setting(_TRAINABLE)
    resnet50_epochs: int = _setting(_at_least(1))
    resnet50_learning_rate: float = _setting(_POSITIVE)
    resnet50_weight_decay: float = _setting(_NOT_NEGATIVE)
    resnet50_last_layer_factor: float = _setting(_POSITIVE, default=1.0)  # its learning rate, in terms of the block's
    resnet50_standardize: bool = _setting(_YES_OR_NO, default=False)  # the features that the last layer is given
    resnet18_trainable: str = _setting(_TRAINABLE)
    resnet18_epochs: int = _setting(_at_least(1))
    resnet18_learning_rate: float = _setting(_POSITIVE)
    resnet18_weight_decay: float = _setting(_NOT_NEGATIVE)
    resnet18_last_layer_factor: float = _setting(_POSITIVE, default=1.0)  # its learning rate, in terms of the block's
    resnet18_standardize: bool = _setting(_YES_OR_NO, default=False)  # the features that the last layer is given
    # Pre-training on the spot, for weights = generated
    generated_images: int = _setting(_at_least(100), default=4000)
    generated_epochs: int = _setting(_at_least(1), default=3)
    # How a teacher's suffix is fitted: with fewer views than teacher_views, if their features take more than this
    feature_memory_gb: float = _setting(_POSITIVE, default=4.0)
    # Groups of further arms, trained by notebooks/study.ipynb; none: the four tasks' own alone
    study: list[str] = _setting(_GROUPS, default=())
    # The machine
    data_dir: str = _setting(_TEXT, default="data", machine=True)
    runs_dir: str = _setting(_TEXT, default="runs", machine=True)
    device: str = _setting(_one_of("auto", "cpu", "cuda", "mps"), default="auto", machine=True)
    precision: str = _setting(_one_of("auto", "float32", "bfloat16"), default="auto")
    threads: int | None = _setting(_optional(_at_least(1)), default=None, machine=True)

    @property
    def run_folder(self) -> Path:
        """Where every cached result of this profile's runs lies."""
        return project_path(self.runs_dir) / Path(self.profile).stem

    @property
    def views(self) -> dict[str, int]:
        """The enumerated views, for `kdutils.data.views.make_views` and for fingerprints."""
        return {"max_shift": self.max_shift, "shift_step": self.shift_step}

    def of_teacher(self, arch: str, name: str) -> Any:
        """A teacher's own setting, for example `of_teacher("resnet50", "epochs")`."""
        return getattr(self, f"{arch}_{name}")

    def identity(self) -> dict[str, Any]:
        """The settings that results depend on (all but where and how fast things are computed)."""
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["machine"]}
        return kept | {"study": list(self.study)}

    def digest(self) -> str:
        """A short checksum of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


_REPR = reprlib.Repr()  # a few kilobytes of YAML can stand for more text than there is memory
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def _short(value: Any) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:
        return "a number of thousands of digits"


_FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
_TEXTS = {name for name, kind in typing.get_type_hints(Settings).items() if kind in (str, str | None)}
_FLOATS = {name for name, kind in typing.get_type_hints(Settings).items() if kind is float}


def default_of(name: str) -> Any:
    """The value of a setting that a profile leaves out (`dataclasses.MISSING` if it must not)."""
    default = _FIELDS[name].default
    return list(default) if isinstance(default, tuple) else default


def project_path(path: str | Path) -> Path:
    """A path as the settings mean it: absolute, or relative to the project's folder, wherever one works from."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"path: {path} names a user who is not known here; write the folder out") from error
    return path if path.is_absolute() else ROOT / path


def _normal_path(text: str) -> str:
    """One spelling for each path: './weights' and '/where/the/project/is/weights' are 'weights'."""
    return shown_path(os.path.normpath(project_path(text.strip())))


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 seed, 5 seeds."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown_path(path: str | Path) -> str:
    """A path for messages and provenance: relative to the project's folder when it lies inside it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_profile(profile: str) -> dict[str, Any]:
    """The settings in `notebooks/profiles/<profile>.yaml`, or in the YAML file of that path."""
    known = sorted(path.stem for path in PROFILES.glob("*.yaml"))
    if not isinstance(profile, str) or not profile:
        raise UserError(f"profile: {profile!r} is no name; use one of {', '.join(known)}, or the path of a .yaml file")
    path = PROFILES / f"{profile}.yaml" if profile in known else project_path(profile)
    if path.suffix != ".yaml" or not path.is_file():
        raise UserError(f"profile: there is no {profile!r}; use one of {', '.join(known)}, or the path of a .yaml file")
    return read_yaml(path, "profile")


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """A YAML file of named values. Raises `UserError` for one that is missing, no YAML, or names a value twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"{what}: {shown_path(path)} cannot be read ({error.strerror}); give a .yaml file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last two: numbers, dates and nests of no sense
        reason = " ".join(str(error).split()).replace('in "<unicode string>", line', "in line")
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else reason
        raise UserError(f"{what}: {shown_path(path)} is not valid YAML ({reason}); mend that line") from error
    if not isinstance(values, dict):
        raise UserError(f"{what}: {shown_path(path)} must hold lines of 'name: value'")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML as `safe_load` reads it, but a key given twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [(key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for at, (key, mark) in enumerate(keys):
            if key in [earlier for earlier, _ in keys[:at]]:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", mark)
        return super().construct_mapping(node, deep)


def check_names(names: Any, where: str = "parameter") -> None:
    """Raise `UserError` for a name that is no setting, suggesting the nearest one."""
    import difflib

    for name in names:
        if name not in _FIELDS:
            near = difflib.get_close_matches(str(name), _FIELDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the settings are: {', '.join(_FIELDS)}"
            raise UserError(f"{where}: there is no setting {str(name)!r:.80}; {hint}")


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
    for name, field in _FIELDS.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"profile '{profile}': '{name}' is missing; add a line '{name}: ...' (see demo.yaml)")
            continue
        values[name] = checked(name, values[name])
    settings = Settings(**values)
    _check_together(settings)
    return dataclasses.replace(
        settings,
        device=(device := pick_device(settings.device)),
        precision=pick_precision(settings.precision, device),
    )


def checked(name: str, value: Any, spelt: str | None = None) -> Any:
    """The value of a setting in its own type (text read as a number or list where one is due).

    Raises `UserError` if it is unfit, which calls the setting `spelt`, if given.
    """
    rule = _FIELDS[name].metadata["rule"]
    found = value
    # papermill's -p delivers lists, and YAML delivers 1e-3, as text
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError, OverflowError):
        if isinstance(value, str) and name not in _TEXTS:
            found = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        if name in _FLOATS and _is_int(found):
            found = float(found)
    if isinstance(found, tuple):
        found = list(found)
    if not rule.accepts(found):
        raise UserError(f"{spelt or name}: {_short(value)} will not do; it must be {rule.text}")
    if name == "weights" and found not in ("imagenet", "generated", "none"):
        return _normal_path(found)
    if name == "data" and found.startswith("folder:"):
        return "folder:" + _normal_path(found.removeprefix("folder:"))
    return found


def _check_together(settings: Settings) -> None:
    if settings.max_shift % settings.shift_step:
        raise UserError(
            f"shift_step: {settings.shift_step} does not divide max_shift = {settings.max_shift}; "
            "choose a step that does, so that the unshifted image is one of the views"
        )
    if settings.batch_size > settings.train_size or settings.teacher_batch_size > settings.train_size:
        raise UserError(
            f"batch_size: no batch of {max(settings.batch_size, settings.teacher_batch_size)} fits into "
            f"train_size = {settings.train_size}; lower batch_size and teacher_batch_size"
        )
    if settings.weights not in ("imagenet", "generated", "none"):
        folder = project_path(settings.weights)
        if not folder.is_dir():
            raise UserError(
                f"weights: there is no folder {shown_path(folder)}; give 'imagenet', 'generated', 'none', or a folder "
                "with resnet50.safetensors and resnet18.safetensors (or .pth)"
            )
        for arch in ARCHITECTURES:
            if logits_file(settings.weights, arch) is None:
                weights_file(folder, arch)


def logits_file(weights: str, arch: str) -> Path | None:
    """The file with a fine-tuned teacher's logits that a `weights` folder may hold in place of weights."""
    path = project_path(weights) / f"{arch}-logits.safetensors"
    return path if weights not in ("imagenet", "generated", "none") and path.is_file() else None


def weights_file(folder: Path, arch: str) -> Path:
    """The file with `arch`'s pre-trained weights in `folder`; `UserError` when there is none."""
    for suffix in (".safetensors", ".pth", ".pt"):
        if (path := folder / f"{arch}{suffix}").is_file():
            return path
    raise UserError(
        f"weights: {shown_path(folder)} holds no {arch}.safetensors and no {arch}.pth; "
        f"put a torchvision {arch} state dict of that name there"
    )


def pick_device(device: str) -> str:
    """The device that a setting names; `auto`: CUDA, Apple's GPU or the CPU, the first that is there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"device: '{device}' was asked for, but torch finds none here; use 'auto' or 'cpu'")
    return device


def pick_precision(precision: str, device: str) -> str:
    """bfloat16 autocast where the processor computes in it; elsewhere it is emulated, and many times slower."""
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device == "cpu":
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.12 and later
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
        return "bfloat16" if fast else "float32"
    return "float32"


def notebook_settings(namespace: Mapping[str, Any]) -> Settings:
    """The settings a notebook was given: call it with `globals()` after the parameters cell.

    Reads the names of settings from the namespace. A name in the last cell that begins with `# Parameters` (the
    notebook's own, or the one papermill adds) that is no setting is an error, so a typing mistake cannot pass
    silently.
    """
    cells = [source.strip() for source in namespace.get("In", ()) if source.lstrip().startswith("# Parameters")]
    # by first line, the notebook's own cell and papermill's; the last of each: an earlier one may have been mended
    for source in {source.partition("\n")[0]: source for source in cells}.values():
        names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
        check_names([name.id for name in names if isinstance(name.ctx, ast.Store)])
    given = {name: namespace[name] for name in _FIELDS if name in namespace}
    settings = load_settings(given.pop("profile", None) or "cifar10", **given)
    apply_threads(settings)
    return settings


def apply_threads(settings: Settings) -> None:
    """Set torch's number of CPU threads, where the settings name one."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
