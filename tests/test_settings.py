"""kdutils.settings: every parameter checked once, with one clear line for what is not valid."""

import dataclasses
import json
import math
import re
import typing

import hypothesis
import pytest
import torch
import yaml
from conftest import A_TEACHER, message_of
from hypothesis import strategies as st

from kdutils.data.views import view_table
from kdutils.settings import (
    MACHINE,
    PROFILES,
    ROOT,
    Settings,
    TeacherSettings,
    UserError,
    checked,
    default_of,
    load_settings,
    notebook_settings,
    pick_precision,
)

NAMES = [field.name for field in dataclasses.fields(Settings)]
TEXTS = {name for name, kind in typing.get_type_hints(Settings).items() if kind in (str, str | None)}
OTHER = {  # another possible value of every setting, in the tiny profile
    "profile": "demo", "data": "cifar10", "data_name": "my images", "train_size": 41, "val_size": 11, "test_size": 11,
    "split_seed": 1, "unlabelled_size": 30, "unlabelled_epochs": 5, "unlabelled_views": 1, "max_shift": 2, "shift_step": 2, "seeds": [0], "epochs": 3, "batch_size": 11,
    "optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.1, "weight_decay": 0.0, "label_smoothing": 0.0,
    "temperature": 1.0, "alpha": 0.5, "kd_label_smoothing": 0.1, "weights": "imagenet", "teacher_size": 64,
    "teacher_resize": "nearest", "teacher_seeds": [1], "teacher_views": 1, "teacher_batch_size": 10,
    "teacher_optimizer": "adam", "teacher_schedule": "constant", "teacher_label_smoothing": 0.1,
    "teachers": [], "backbones": [A_TEACHER], "teacher_trainable": "last_block", "teacher_epochs": 2,
    "teacher_learning_rate": 0.1, "teacher_weight_decay": 0.1, "teacher_last_layer_factor": 0.5,
    "teacher_standardize": True, "teacher_folds": 2,
    "data_dir": "elsewhere", "runs_dir": "elsewhere", "device": "mps", "precision": "bfloat16", "threads": 1,
    "feature_memory_gb": 1.0, "study": ["controls"],
}  # fmt: skip


@pytest.mark.parametrize("profile", sorted({"demo", "cifar10"} | {path.stem for path in PROFILES.glob("*.yaml")}))
def test_every_profile_loads(profile):
    settings = load_settings(profile)
    assert settings.run_folder == ROOT / "runs" / profile
    assert settings.device in ("cpu", "cuda", "mps") and settings.precision in ("float32", "bfloat16")


def test_the_default_profile_names_every_setting_and_the_defaults_it_leaves_as_they_are():
    text = (PROFILES / "cifar10.yaml").read_text(encoding="utf-8")
    left = yaml.safe_load("\n".join(re.findall(r"^# ([a-z]\w*: .*)$", text, flags=re.MULTILINE)))
    assert yaml.safe_load(text).keys() | left.keys() == {*NAMES} - {"profile"}
    assert {name: default_of(name) for name in left} == left


@pytest.mark.parametrize("profile", ["demmo", "", None, 3, "nowhere.yaml", "Makefile", "notebooks/profiles"])
def test_an_unknown_profile_is_named_with_those_there_are(profile):
    message = message_of(load_settings, profile)
    assert message.startswith(f"profile: {profile!r} does not exist; use cifar10, ")


@pytest.mark.parametrize("name, hint", [
    ("temprature", "did you mean 'temperature'?"), ("Alpha", "did you mean 'alpha'?"),
    ("epoch", "did you mean 'epochs'?"), ("zzzzzz", f"the settings are: {', '.join(NAMES)}"),
])  # fmt: skip
def test_an_unknown_setting_brings_a_suggestion_or_the_list(tiny, name, hint):
    assert message_of(tiny, **{name: 1}).endswith(f"there is no setting '{name}'; {hint}")


ABOVE_0, FRACTION, COUNT = "a finite number above 0", "a number from 0 to 1", "a whole number, 1 or more"
LIST = "a list of one or more different whole numbers, such as [0, 1, 2]"
EACH = "each a name or a record, such as [resnet50, {name: resnet18, trainable: last_block, epochs: 10}]"
TWO, OR_NONE = f"a list of two CNNs, {EACH}", f"a list of CNNs, {EACH}, or [] for none"


@pytest.mark.parametrize("name, value, rule", [
    *[("temperature", value, ABOVE_0) for value in (
        0, -1, math.nan, math.inf, -math.inf, "0", "nan", "inf", "hot", "", [4.0], True, "{[]: 1}")],
    pytest.param("temperature", 10**400, ABOVE_0, id="temperature-too-large-for-a-float"),
    *[("alpha", value, FRACTION) for value in (-0.1, 1.1, "1.1", math.nan, "half", [0.5], True)],
    *[("seeds", value, LIST) for value in (
        [], [0, 0], "abc", [-1], 3, "3", [0.5], ["0"], [True], "[]", "[0, 0]", "[0, 1", 2**31, [2**31], {0, 1})],
    *[("teacher_seeds", value, LIST) for value in ([], [1, 1])],
    *[("study", value, "a list of different names, or [] for none") for value in ("x", [3], [["a"]], ["a", "a"], [""])],
    *[("epochs", value, COUNT) for value in (0, -3, 2.5, "many", "2.5", True, math.inf, [3])],
    *[("unlabelled_size", value, "a whole number, 0 or more") for value in (-1, 0.5, "all")],
    ("unlabelled_epochs", 0, COUNT), ("unlabelled_views", 0, COUNT),
    *[(f"{part}_size", value, "a whole number, 10 or more") for part, value in (("train", 9), ("val", 0), ("test", -1))],
    ("batch_size", 1, "a whole number, 2 or more"), ("shift_step", 0, COUNT), ("threads", 0, COUNT),
    *[("split_seed", value, "a whole number from 0 to 2147483647") for value in (-1, 2**31)],
    *[("max_shift", value, "a whole number from 0 to 15") for value in (16, -1)],
    ("learning_rate", 0, ABOVE_0), ("learning_rate", "fast", ABOVE_0), ("feature_memory_gb", 0, ABOVE_0),
    ("weight_decay", -1e-9, "a finite number, 0 or above"), ("teacher_size", 31, "a whole number from 32 to 512"),
    ("label_smoothing", 1.0, "a number from 0 to below 1"), ("kd_label_smoothing", -0.1, "a number from 0 to below 1"),
    ("optimizer", "Adam", "one of 'adam', 'adamw', 'sgd'"), ("schedule", "onecycle", "one of 'constant', 'cosine', 'one_cycle'"),
    ("teacher_trainable", "all", "one of 'last_layer', 'last_block'"),
    *[("data", value, "'cifar10', 'shapes10' or 'folder:PATH'") for value in ("mnist", "folder:", "folder: ", 3, "")],
    *[(name, value, "a text that is not empty") for name, value in (("data_name", " "), ("weights", ""), ("data_dir", ""))],
    ("device", "tpu", "one of 'auto', 'cpu', 'cuda', 'mps'"), ("precision", "float16", "one of 'auto', 'float32', 'bfloat16'"),
    *[("teacher_resize", value, "one of 'bilinear', 'bicubic', 'nearest'") for value in ("lanczos", 2)],
    *[("teacher_standardize", value, "true or false") for value in (1, "1", "yes", 0.0, [True])],
    *[("teacher_last_layer_factor", value, ABOVE_0) for value in (0, -1.0, math.inf, "low", True)],
    *[("teachers", value, TWO) for value in (
        [], ["resnet18"], ["a", "b", "c"], "resnet18", 3, [3, 4], [{"label": "a"}, "b"], [{"name": 18}, "b"], "[a, b", {"a": 1})],
    *[("backbones", value, OR_NONE) for value in ("resnet18", [[]], [None])],
])  # fmt: skip
def test_an_impossible_value_is_named_with_the_rule(tiny, tmp_path, name, value, rule):
    message = message_of(tiny, **{name: value})
    assert message.startswith(f"{name}: {repr(value)[:20]}") and message.endswith(f" is not valid; use {rule}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name, given, expected", [
    ("seeds", "[0, 1]", [0, 1]), ("seeds", (3, 4), [3, 4]), ("epochs", "3", 3), ("threads", "2", 2),
    ("learning_rate", "1e-3", 0.001), ("learning_rate", 1, 1.0), ("temperature", "4", 4.0), ("temperature", 4, 4.0),
    ("alpha", 0, 0.0), ("alpha", "1", 1.0), ("weight_decay", 0, 0.0), ("feature_memory_gb", "2", 2.0),
    ("teacher_standardize", "true", True), ("teacher_standardize", "False", False),
    ("teacher_last_layer_factor", "0.1", 0.1), ("teacher_last_layer_factor", 2, 2.0),
    ("data_name", "2024", "2024"), ("data_name", "[1]", "[1]"), ("data_dir", "2024", "2024"),
    ("runs_dir", "1e3", "1e3"), ("data", "shapes10", "shapes10"), ("data_name", "None", "None"),
])  # fmt: skip
def test_values_arrive_as_text_or_as_numbers_and_mean_the_same(tiny, name, given, expected):
    """papermill's -p and YAML deliver lists, whole numbers and 1e-3 as text; a text setting keeps its text."""
    found = getattr(tiny(**{name: given}), name)
    assert found == expected and type(found) is type(expected)


def test_none_keeps_the_profiles_value(tiny):
    assert tiny(temperature=None, seeds=None) == tiny()


def test_a_bad_value_in_the_profile_is_refused_too(tiny_profile):
    assert message_of(load_settings, tiny_profile(alpha=2)).startswith("alpha: 2")


@pytest.mark.parametrize("max_shift, shift_step", [(4, 3), (1, 2), (3, 2)])
def test_a_step_must_divide_the_greatest_shift(tiny, max_shift, shift_step):
    message = message_of(tiny, max_shift=max_shift, shift_step=shift_step)
    assert message.startswith(f"shift_step: {shift_step} does not divide max_shift = {max_shift}; ")


@pytest.mark.parametrize("name", ["batch_size", "teacher_batch_size"])
def test_a_batch_must_fit_into_the_training_images(tiny, name):
    assert message_of(tiny, **{name: 41}).startswith(f"{name}: 41 is more than train_size = 40; ")


@pytest.mark.parametrize("views, expected", [(1, 1), (2, 2), (17, 17), (18, None), (500, None)])
def test_settings_for_unlabelled_images_have_their_epochs_and_views_and_keep_them(tiny, views, expected):
    """As many views as there are is no cut: the keys of trainings with the same settings are then the same."""
    settings = tiny(max_shift=3, shift_step=3, epochs=3, unlabelled_epochs=7, unlabelled_views=views)
    found = dataclasses.replace(settings.for_unlabelled, seeds=[5])
    assert settings.epochs == 3 and settings.views == {"max_shift": 3, "shift_step": 3}
    assert found.views == settings.views | ({} if expected is None else {"num_views": expected})
    assert found.identity() == dataclasses.replace(settings, epochs=7, seeds=[5]).identity()
    assert settings.for_unlabelled.for_unlabelled == settings.for_unlabelled != settings
    assert len(view_table(**found.views)) == (expected or 18)


def test_a_home_folder_that_is_nobodys_is_no_traceback(tiny):
    assert "~nobody-of-that-name" in message_of(tiny, weights="~nobody-of-that-name/weights")


# --- teachers ---


def test_what_a_record_leaves_out_the_settings_of_all_teachers_say(tiny):
    own = {"name": "resnet18", "label": "R18", "weights": "./here", "size": 64, "epochs": 7, "standardize": True}
    given = {"teacher_epochs": 3, "teacher_size": 48, "teacher_resize": "nearest", "teacher_trainable": "last_block"}
    settings = tiny(
        teachers=["tf_efficientnet_lite0", own], backbones=[{"name": "resnet18", "label": "again"}], **given
    )
    first, second = settings.teachers
    for name, value in given.items():
        assert getattr(first, name.removeprefix("teacher_")) == value == getattr(settings, name)
    assert (first.name, first.label, first.weights) == ("tf_efficientnet_lite0", "tf_efficientnet_lite0", "none")
    changed = own | {"weights": "here", "views": 2, "trainable": "last_block", "resize": "nearest"}
    assert {name: getattr(second, name) for name in changed} == changed
    assert [settings.teacher(label) for label in ("R18", "again")] == [second, *settings.backbones]
    assert "use one of tf_efficientnet_lite0, R18, again" in message_of(settings.teacher, "resnet18")


def test_every_setting_of_a_record_has_one_for_all_teachers():
    own = {field.name for field in dataclasses.fields(TeacherSettings)} - {"name", "label", "weights"}
    assert {f"teacher_{name}" for name in own} | {"teacher_seeds"} == {n for n in NAMES if n.startswith("teacher_")}


def test_teachers_arrive_as_text(tiny):
    text = "[resnet50, {name: resnet18, label: R18, learning_rate: 1e-3, epochs: '3', standardize: true}]"
    first, second = tiny(teachers=text).teachers
    assert (first.label, second.label, second.epochs, second.standardize) == ("resnet50", "R18", 3, True)
    assert second.learning_rate == 0.001 and tiny(teachers=("resnet50", second)).teachers[1] == second


@pytest.mark.parametrize("second, message", [
    ({"name": "a"}, "teachers: two of them are called 'a'; give each a label of its own in its record"),
    ({"name": "b", "label": "a"}, "teachers: two of them are called 'a'; give each a label of its own in its record"),
    ({"name": "b", "epoch": 3}, "teachers: 'b': there is no setting 'epoch' of a teacher; did you mean 'epochs'?"),
    ({"name": "b", 3: 4}, "teachers: 'b': there is no setting '3' of a teacher; a record has: name, label, ..."),
    ({"name": "b", "label": "B", "alpha": 3}, "teachers: 'B': there is no setting 'alpha' of a teacher; ..."),
    ({"name": "b", "epochs": 0}, "teachers: 'b': epochs: 0 is not valid; use a whole number, 1 or more"),
    ({"name": "b", "trainable": "all"}, "teachers: 'b': trainable: 'all' is not valid; use one of 'last_layer', 'last_block'"),
    ({"name": " "}, "teachers: ' ': name: ' ' is not valid; use a text that is not empty"),
    ({"name": "b", "batch_size": 41}, "teachers: b: batch_size: 41 is more than train_size = 40; choose a smaller one"),
    ({"name": "b", "batch_size": 21, "folds": 2},
     "teachers: b: batch_size: 21 is more than the 20 images that a fold trains on; choose a smaller one"),
    *[({"name": "b", "label": label}, "teachers: ...: label: ... is not valid; use a text of 80 characters at most, without '+' and ','")
      for label in ("a+b", "a,b", "a\nb", "\0", " ", "x" * 81, 3, ["a"])],
], ids=str)  # fmt: skip
def test_an_unfit_record_is_named_with_the_rule(tiny, second, message):
    pattern = ".*".join(re.escape(part) for part in message.split("..."))
    assert re.fullmatch(pattern, message_of(tiny, teachers=["a", second]))


@pytest.mark.parametrize("name, shown", [
    ("resnet50_epochs", "{name: resnet50, epochs: ...}"), ("resnet18_trainable", "{name: resnet18, trainable: ...}"),
])  # fmt: skip
def test_a_setting_of_an_earlier_version_is_shown_as_a_record(tiny, tiny_profile, name, shown):
    for message in (message_of(tiny, **{name: 3}), message_of(load_settings, tiny_profile(**{name: 3}))):
        assert message.endswith(f"no setting '{name}'; write it into the teacher's record: teachers: [{shown}, ...]")


# --- the machine ---


@pytest.mark.parametrize("there, expected", [
    ((), "cpu"), (("mps",), "mps"), (("cuda",), "cuda"), (("cuda", "mps"), "cuda"),
])  # fmt: skip
def test_the_fastest_device_that_is_there_is_taken(tiny, monkeypatch, there, expected):
    for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda name=name: name in there)
    assert tiny(device="auto").device == expected and tiny(device="cpu").device == "cpu"
    for absent in {"cuda", "mps"} - {*there}:
        assert f"device: torch finds no '{absent}' here; use 'auto' or 'cpu'" == message_of(tiny, device=absent)


@pytest.mark.parametrize("device, has, expected", [
    ("cpu", {}, "float32"), ("cpu", {"avx512_bf16": False}, "float32"), ("cpu", {"avx512_bf16": True}, "bfloat16"),
    ("cpu", {"amx_bf16": True}, "bfloat16"), ("cpu", None, "float32"), ("cuda", True, "bfloat16"),
    ("cuda", False, "float32"), ("mps", {}, "float32"),
])  # fmt: skip
def test_half_precision_is_taken_where_the_processor_computes_in_it(monkeypatch, device, has, expected):
    if has is None:  # an older torch, which does not say
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert pick_precision("auto", device) == expected
    assert [pick_precision(asked, device) for asked in ("float32", "bfloat16")] == ["float32", "bfloat16"]


@pytest.mark.parametrize("name", NAMES)
def test_the_identity_is_what_results_depend_on(tiny, name):
    """Not where and how fast they are computed. A new setting needs a line in OTHER."""
    settings = tiny()
    other = dataclasses.replace(settings, **{name: OTHER[name]})
    assert other != settings
    assert (other.identity() == settings.identity()) == (other.digest() == settings.digest()) == (name in MACHINE)


@pytest.mark.parametrize("one, other", [
    ({"temperature": 4}, {"temperature": "4.0"}), ({"alpha": 1}, {"alpha": 1.0}), ({"seeds": (0, 1)}, {"seeds": "[0, 1]"}),
    *[({name: f"{prefix}here"}, {name: prefix + path}) for name, prefix in (("data", "folder:"), ("weights", ""))
      for path in ("./here", "here/", f"{ROOT}/here")],
])  # fmt: skip
def test_the_same_value_written_otherwise_is_the_same_run(tiny, one, other):
    assert tiny(**one).digest() == tiny(**other).digest()


def test_a_notebooks_names_are_read(tiny_profile):
    cell = "# Parameters\nprofile = ...\nepochs = 7\nseeds = None"
    namespace = {"In": ["", cell, "colour = 3"], "profile": tiny_profile(), "epochs": 7, "seeds": None, "colour": 3}
    settings = notebook_settings(namespace)
    assert (settings.epochs, settings.seeds) == (7, [0, 1])
    assert notebook_settings({}).profile == "cifar10"  # without IPython, too


MISTAKE = "# Parameters of this notebook\ntemprature = 3"


@pytest.mark.parametrize("cells, is_mistaken", [
    (["# Parameters\ntemprature = 3"], True),
    (["# Parameters of this notebook; None takes the profile's value\nepochs = None\ntemprature = 3  # soft"], True),
    (["\n# Parameters\ntemprature: float = 3"], True),
    (["# Parameters\nepochs, temprature = 3, 4"], True),
    ([MISTAKE, "# Parameters\nepochs = 3"], True),  # the notebook's own cell, and papermill's below it
    ([MISTAKE, MISTAKE.replace("temprature", "temperature")], False),  # Jupyter's history keeps a corrected cell
    (["temprature = 3", "x = 1  # Parameters"], False),  # other cells may use any name
])  # fmt: skip
def test_a_typing_mistake_in_a_parameters_cell_is_refused(tiny_profile, cells, is_mistaken):
    namespace = {"In": ["", "# Parameters\nepochs = 3", *cells], "profile": tiny_profile(), "temprature": 3}
    if is_mistaken:
        assert "did you mean 'temperature'?" in message_of(notebook_settings, namespace)
    else:
        assert notebook_settings(namespace).temperature == 4.0


def test_a_notebook_shows_the_message_and_no_traceback():
    assert UserError("alpha: 2 is not valid")._render_traceback_() == ["UserError: alpha: 2 is not valid"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(st.sampled_from(NAMES), plain)
def test_any_value_of_any_setting_is_taken_or_named_in_one_line(name, value):
    """And what is taken is taken as it is: its text, and it itself once more, are the same value."""
    try:
        found = checked(name, value)
    except UserError as error:
        message = str(error)
        assert message.startswith((f"{name}: ", "path: ")) and "\n" not in message and len(message) < 500
        return
    assert checked(name, found) == found
    if name not in {*TEXTS, "teachers", "backbones"} and value is not None:
        assert checked(name, str(found)) == found and checked(name, json.dumps(found, ensure_ascii=False)) == found


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_file_is_a_profile_or_named_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="replace"))
    message = message_of(load_settings, str(path))
    assert message.startswith("profile") and "any.yaml" in message


def test_a_setting_of_teachers_that_every_record_overrules_is_told(tiny):
    records = [{"name": "resnet18", "epochs": 3}, {"name": "resnet50", "epochs": 4}]
    message = message_of(tiny, teachers=records, teacher_epochs=5)
    assert message == "teacher_epochs: every teacher's record says its own epochs; change it in 'teachers'"
    assert [teacher.epochs for teacher in tiny(teachers=[records[0], "resnet50"], teacher_epochs=5).teachers] == [3, 5]
    assert tiny(teachers=records, teacher_epochs=4).teacher_epochs == 4
