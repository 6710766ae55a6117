"""predict and export: they find what a run trained, classify pictures with it and write it out, and train nothing."""

import dataclasses
import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import message_of
from PIL import Image

from kdutils.__main__ import main
from kdutils.lab.predict import find_student, load_student, read_pictures, trained_students
from kdutils.losses import cross_entropy
from kdutils.models import normalise
from kdutils.results.record import finish, student_rows
from kdutils.settings import load_settings
from kdutils.students import Method, train_students


@pytest.fixture
def run(tiny_profile, toy_data, monkeypatch):
    """A profile whose run folder holds two trained students; from here on, training fails."""
    profile = tiny_profile()
    settings = load_settings(profile)
    students = train_students(Method("scratch", partial(cross_entropy, label_smoothing=0.1)), toy_data, settings)
    rows = student_rows(1, students, toy_data, settings)
    finish(settings, "01_small_cnn", rows, toy_data, students=[students])
    monkeypatch.setattr("kdutils.training.fit", None)
    return profile, settings, students


@pytest.fixture
def picture(tmp_path):
    """Writes a picture of random pixels; returns its path."""

    def write(name, mode="RGB", size=(50, 40)):
        shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
        path = tmp_path / name
        Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
        return path

    return write


def more_students(settings, toy_data, students, *kinds):
    """Record arms (name, teachers) as if they had been trained."""
    others = [[dataclasses.replace(s, arm=arm, teachers=teachers) for s in students] for arm, teachers in kinds]
    finish(settings, "03_one_teacher", [], toy_data, students=others)


def test_the_student_found_is_the_one_that_was_trained(run, toy_data):
    _, settings, students = run
    found = trained_students(settings.run_folder)
    assert [(s.arm, s.teachers, s.seed, s.classes) for s in found] == [
        ("scratch", (), n, toy_data.classes) for n in (0, 1)
    ]
    for trained, student in zip(found, students):
        x = normalise(toy_data.test.images)
        assert torch.equal(load_student(trained)(x), student.network()(x))
        right = (student.logits["test"].argmax(dim=1) == toy_data.test.labels).float().mean()
        assert trained.accuracy == pytest.approx(right.item())


def test_the_choice_among_students(run, toy_data):
    _, settings, students = run
    both = ("resnet50", "resnet18")
    more_students(settings, toy_data, students, *(("kd", (one,)) for one in both), ("kd_mean_prob", both))
    folder = settings.run_folder
    assert find_student(folder, "scratch", seed=1).seed == 1
    assert find_student(folder, "kd_mean_prob").seed == 0
    assert find_student(folder, "kd_mean_prob", "resnet18+resnet50").teachers == ("resnet50", "resnet18")
    assert find_student(folder, "kd", "resnet18").teachers == ("resnet18",)
    assert "--arm kd --teachers resnet18 or --arm kd --teachers resnet50" in message_of(find_student, folder, "kd")
    message = message_of(find_student, folder, "scratch", seed=7)
    assert "none for --arm scratch --seed 7" in message and "seed 0, 1" in message
    assert "--arm scratch" in message_of(find_student, folder, "no_such_arm")


def test_students_of_other_settings_are_not_mixed_in(run, toy_data, tiny):
    _, settings, students = run
    more_students(tiny(alpha=0.25), toy_data, students, ("kd", ("resnet50",)))
    assert {student.arm for student in trained_students(settings.run_folder)} == {"kd"}


def test_predict_shows_the_most_probable_classes(run, picture, capsys):
    profile, _, students = run
    paths = [picture("colour.png"), picture("grey.jpg", "L"), picture("clear.png", "RGBA", (32, 32))]
    assert main(["predict", "--profile", profile, "--arm", "scratch", "--top", "2", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("scratch, seed 0") and "toy" in lines[0]
    assert [lines[i] for i in (1, 4, 7)] == [str(path) for path in paths] and len(lines) == 10
    expected = students[0].network()(normalise(read_pictures(paths))).softmax(dim=1)
    for row, at in zip(expected, (2, 5, 8)):
        name, per_cent = lines[at].split()[:2]
        assert name == f"class{int(row.argmax())}" and float(per_cent[:-1]) == pytest.approx(
            100 * row.max().item(), abs=0.06
        )


def test_predict_as_json_holds_every_probability(run, picture, capsys):
    profile, _, _ = run
    assert main(["predict", "--profile", profile, "--arm", "scratch", "--json", str(picture("a.png"))]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    assert len(found["probabilities"]) == 10 and sum(found["probabilities"].values()) == pytest.approx(1)


def test_what_cannot_be_classified_is_named(run, picture, error_of, tmp_path):
    profile, settings, _ = run
    text = tmp_path / "text.png"
    text.write_text("no picture")
    ask = ["predict", "--profile", profile, "--arm", "scratch"]
    assert "nowhere.png does not exist" in error_of([*ask, "nowhere.png"])
    assert "is a folder" in error_of([*ask, str(tmp_path)])
    assert "text.png cannot be read as an image" in error_of([*ask, str(picture("a.png")), str(text)])
    assert "--top: 0" in error_of([*ask, "--top", "0", str(text)])
    assert "none for --arm kd_mean_prob" in error_of(["predict", "--profile", profile, str(text)])
    shutil.rmtree(settings.run_folder / "students")
    assert "is missing; run the notebooks again" in error_of([*ask, str(picture("a.png"))])


@pytest.mark.parametrize("command", [["predict", "a.png"], ["export"]])
def test_without_a_run_there_is_no_student(error_of, tiny_profile, command):
    assert "run python -m kdutils run --profile" in error_of([*command, "--profile", tiny_profile()])


def test_another_network_is_told_from_the_present_one(run, monkeypatch):
    _, settings, _ = run
    monkeypatch.setattr("kdutils.students.SmallCNN", lambda classes: torch.nn.Linear(3, classes))
    assert "does not fit today's SmallCNN" in message_of(load_student, find_student(settings.run_folder, "scratch"))


def test_torchscript_gives_the_same_logits_and_carries_the_classes(run, toy_data, capsys, tmp_path):
    profile, _, students = run
    given = ["--profile", profile, "--arm", "scratch", "--format", "torchscript", "--out", str(tmp_path)]
    assert main(["export", *given]) == 0
    assert "scratch-seed0.pt" in capsys.readouterr().out
    extra = {"metadata.json": ""}
    module = torch.jit.load(str(tmp_path / "scratch-seed0.pt"), _extra_files=extra)
    logits = module(toy_data.test.images)
    assert torch.allclose(logits, students[0].network()(normalise(toy_data.test.images)), atol=1e-4)
    assert json.loads(json.loads(extra["metadata.json"])["classes"]) == toy_data.classes


def test_onnx_gives_the_same_logits_and_carries_the_classes(run, toy_data):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    profile, settings, students = run
    assert main(["export", "--profile", profile, "--arm", "scratch"]) == 0
    session = runtime.InferenceSession(str(settings.run_folder / "export" / "scratch-seed0.onnx"))
    (logits,) = session.run(None, {"pixels": toy_data.test.images.numpy()})
    expected = students[0].network()(normalise(toy_data.test.images)).detach()
    assert np.allclose(logits, expected.numpy(), atol=1e-4)
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == toy_data.classes and "uint8" in properties["input"]


def test_onnx_without_its_packages_says_what_to_install(run, error_of, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = error_of(["export", "--profile", run[0], "--arm", "scratch", "--out", str(tmp_path / "out")])
    assert "pip install onnx onnxscript onnxruntime" in message and not list((tmp_path / "out").iterdir())


def test_a_file_that_answers_otherwise_is_not_kept(run, error_of, monkeypatch):
    profile, settings, _ = run
    monkeypatch.setattr("kdutils.lab.export.MEAN", (0.0, 0.0, 0.0))
    message = error_of(["export", "--profile", profile, "--arm", "scratch", "--format", "torchscript"])
    assert "was deleted" in message and not list((settings.run_folder / "export").iterdir())
