"""kdutils.teachers: nothing stale, and logits that the uncut network confirms."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import fake_teacher, message_of, random_network
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kdutils import teachers
from kdutils.data.images import Split, load_data
from kdutils.data.views import make_views, view_pixels
from kdutils.models import MEAN, STD
from kdutils.teachers import better_teacher, check_weights, fine_tune, soft_labels, try_fine_tuning

near = partial(torch.testing.assert_close, rtol=5e-3, atol=5e-3)  # for half precision in other batches
LITE0 = "tf_efficientnet_lite0"


@pytest.fixture
def teacher_settings(tiny, weights_folder):
    """Tiny settings: a ResNet-18 with random weights, beside another CNN that must change nothing of it. One seed
    trains the last layer alone, on images of 32 pixels: that is fast. Keywords change its record, and `all_of` all."""

    def load(all_of=None, **record):
        common = {"weights": weights_folder, "max_shift": 0, "teachers": [{"name": "resnet18", **record}, LITE0]}
        return tiny(**{**common, **(all_of or {})})

    return load


LAST_BLOCK = {"trainable": "last_block"}


def tuned(settings, data):
    """A fine-tuned teacher, and its soft labels [S, N, V, C] of the training images."""
    teacher = fine_tune(settings.teachers[0], data, settings)
    return teacher, soft_labels(teacher, data.train.images, 2)


def files_of(settings, pattern="**/*"):
    """The teachers' files and their times."""
    files = [path for path in (settings.run_folder / "teachers").glob(pattern) if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def features_of(settings):
    return files_of(settings, "resnet18-*-features/*")


def never(*_, **__):
    raise AssertionError("was not to be called")


def same_teacher(one, other):
    """All but what was measured by the clock."""
    (one, soft), (other, others) = one, other
    assert one.facts == other.facts and torch.equal(soft, others) and soft.dtype == others.dtype
    for a, b in zip(one.runs, other.runs, strict=True):
        for name in ("label", "trainable", "seed", "history", "fingerprint"):
            assert getattr(a, name) == getattr(b, name)
        assert all(torch.equal(a.logits[part], b.logits[part]) for part in ("train", "val", "test"))


def whole_network(settings, seed):
    """The uncut network, put together from the pretrained weights and the kept trained part."""
    model = copy.deepcopy(random_network())
    model.fc = nn.Linear(512, 10)
    (path,) = (settings.run_folder / "teachers").glob(f"resnet18-last_block-seed{seed}-*.safetensors")
    with safe_open(path, framework="pt") as file:
        trained = {name: file.get_tensor(name) for name in file.keys()}
    assert all(name.startswith(("layer4.", "fc.")) for name in trained)
    model.load_state_dict({**model.state_dict(), **trained})
    return model.eval()


def test_kept_logits_of_every_seed_and_view_are_those_of_the_whole_network(teacher_settings, toy_data):
    settings = teacher_settings({"teacher_seeds": [0, 1]}, **LAST_BLOCK, size=40)
    teacher, soft = tuned(settings, toy_data)
    assert (teacher.description, teacher.is_standin, teacher.trainable) == ("random", True, "last_block")
    assert teacher.parameters_trained == 8_393_728 + 5_130 and teacher.parameters_total == 11_181_642
    assert [run.seed for run in teacher.runs] == [0, 1]
    assert soft.shape == (2, 40, 2, 10) and soft.dtype == torch.float16
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    viewed, index = make_views(toy_data.train.images, 0, 1), torch.arange(40)
    for number, run in enumerate(teacher.runs):
        model = whole_network(settings, run.seed)

        @torch.no_grad()
        def logits(pixels, model=model):
            x = F.interpolate((pixels.float() / 255 - mean) / std, (40, 40), mode="bilinear", align_corners=False)
            return model(x)

        for view in range(2):
            near(soft[number, :, view].float(), logits(view_pixels(viewed, index, torch.full((40,), view))))
        assert torch.equal(run.logits["train"], soft[number, :, 0].float())
        for part in ("val", "test"):
            near(run.logits[part], logits(getattr(toy_data, part).images))
    assert (soft[0].float() - soft[1].float()).abs().max() > 0.1


def test_only_what_depends_on_a_setting_is_computed_again(teacher_settings, toy_data):
    settings = teacher_settings()
    first, soft = tuned(settings, toy_data)
    # features of 2 training views and validation; the trained part; logits of those and of the test images
    assert len(features_of(settings)) == 3 and len(files_of(settings)) == 3 + 1 + 4

    fingerprints = {first.runs[0].fingerprint}
    for of_all, record, new in (
        ({"temperature": 2.0}, {}, 0),
        ({"alpha": 0.5, "epochs": 5, "seeds": [4], "test_size": 11}, {"label": "R18"}, 0),
        ({"teacher_standardize": True}, {"standardize": False}, 0),
        ({}, {"learning_rate": 0.01}, 1 + 4),
        ({}, {"standardize": True}, 1 + 4),
        ({}, {"last_layer_factor": 0.1}, 1 + 4),
        ({}, {"folds": 2}, 2 + 4),
        ({"teacher_size": 40}, {}, 3 + 1 + 4),
        ({}, {"size": 40, "resize": "nearest"}, 3 + 1 + 4),
    ):
        before = files_of(settings)
        other, others = tuned(teacher_settings(of_all, **record), toy_data)
        after = files_of(settings)
        assert before.items() <= after.items() and len(after) == len(before) + new, record
        assert (other.runs[0].fingerprint not in fingerprints) == bool(new), record
        assert torch.equal(others, soft) == (not new), record
        fingerprints.add(other.runs[0].fingerprint)


def test_too_little_memory_lowers_the_number_of_views_and_says_so(teacher_settings, toy_data, capsys):
    teacher, soft = tuned(teacher_settings({"feature_memory_gb": 1e-9}), toy_data)
    assert teacher.views_trained == 1 and "feature_memory_gb" in capsys.readouterr().out
    assert soft.shape == (1, 40, 2, 10)  # students see them all the same
    assert fine_tune("resnet18", toy_data, teacher_settings()).views_trained == 2


def test_without_pretrained_weights_the_whole_network_is_trained(tiny, toy_data):
    teacher, soft = tuned(tiny(max_shift=0, teachers=["resnet18", "resnet50"]), toy_data)
    assert teacher.trainable == "all" and teacher.parameters_trained == teacher.parameters_total
    assert soft.shape == (1, 40, 2, 10) and "not pretrained" in teacher.description


def test_a_seed_leaves_the_pretrained_weights_alone(teacher_settings, toy_data, tmp_path):
    """Both seeds start from the same block: training it in place would hand its weights on to the next."""
    both = tuned(teacher_settings({"teacher_seeds": [0, 1]}, **LAST_BLOCK), toy_data)[1]
    elsewhere = {"teacher_seeds": [1], "runs_dir": str(tmp_path / "elsewhere")}
    alone = tuned(teacher_settings(elsewhere, **LAST_BLOCK), toy_data)[1]
    assert torch.equal(both[1], alone[0])


@pytest.mark.parametrize("record, description, last", [
    ({"name": LITE0, "weights": "imagenet", "trainable": "last_block"}, "ImageNet-1k (efficientnet-lite0-", "blocks5"),
    ({"name": "mobilenetv3_small_100", "standardize": True}, "random", "standardize"),
    ({"name": "resnet18", "label": "a/b: ü"}, "random", "fc"),
])  # fmt: skip
def test_teachers_of_many_families(teacher_settings, tiny, record, description, last):
    """On the path of the demo: images are drawn here. A second time all is found."""
    settings = teacher_settings({"teachers": [record, "resnet50"]})
    data = load_data(settings)
    check_weights(settings.teachers[0], data, settings)
    teacher, soft = first = tuned(settings, data)
    assert teacher.label == record.get("label", record["name"]) and teacher.facts["settings"]["name"] == record["name"]
    assert description in teacher.description and teacher.is_standin == (description == "random")
    assert soft.shape == (1, 40, 2, 10) and len(soft.unique()) > 50
    names = {name.partition(".")[0] for name in teachers.FineTuning(teacher.label, data, settings).trained(0).tensors}
    assert last in names and "fc" in names
    same_teacher(tuned(settings, load_data(settings)), first)


def test_a_transformer_of_one_image_size_names_it(teacher_settings, toy_data, tmp_path):
    for weights in ("none", "imagenet"):
        record = {"name": "vit_tiny_patch16_224", "weights": weights, "size": 64, "label": "ViT"}
        settings = teacher_settings({"teachers": [record, LITE0]})
        message = message_of(check_weights, settings.teachers[0], toy_data, settings)
        assert message.startswith("teachers: ViT cannot take images of 64 pixels (") and "224" in message
    assert not (tmp_path / "runs").exists()


def test_the_better_teacher_has_the_higher_last_validation_accuracy_over_its_runs(toy_data):
    def teacher(label, *accuracies):
        made = fake_teacher(toy_data, label, seeds=range(len(accuracies)))
        histories = [{"val_accuracy": [0.9, accuracy]} for accuracy in accuracies]
        return dataclasses.replace(
            made, runs=[dataclasses.replace(run, history=history) for run, history in zip(made.runs, histories)]
        )

    one, other = teacher("a", 0.5, 0.7), teacher("b", 0.61, 0.61)
    assert better_teacher([one, other]) is other is better_teacher([other, one])


def test_a_teacher_is_loaded_again_without_its_weights(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings({"teacher_seeds": [0, 1]})
    work = teachers.FineTuning("resnet18", toy_data, settings)
    assert not work.is_made()
    first = tuned(settings, toy_data)
    assert work.is_made()
    for name in ("load_pretrained", "fit", "predict"):
        monkeypatch.setattr(teachers, name, never)
    check_weights(settings.teachers[0], toy_data, settings)
    same_teacher(tuned(settings, toy_data), first)
    with pytest.raises(AssertionError, match="was not to be called"):
        check_weights(teacher_settings(epochs=2).teachers[0], toy_data, settings)


def test_a_teacher_labels_any_images_in_any_view(teacher_settings, toy_data):
    """The same function serves every image: what it says of one does not depend on the set the image is in."""
    teacher, soft = tuned(teacher_settings(), toy_data)
    near(teacher.logits(toy_data.train.images[:10].flip(-1).contiguous())[0], soft[0, :10, 1])
    run = teacher.runs[0]
    found = teacher.logits(torch.cat([toy_data.test.images, toy_data.train.images[5:9]]))[0].float()
    near(found, torch.cat([run.logits["test"], run.logits["train"][5:9]]))


def test_features_in_blocks_are_the_features(teacher_settings, toy_data, tmp_path, monkeypatch):
    whole, all_at_once = tuned(teacher_settings(), toy_data)
    monkeypatch.setattr(teachers, "BLOCK", 7)
    settings = teacher_settings({"runs_dir": str(tmp_path / "elsewhere")})
    teacher, in_blocks = tuned(settings, toy_data)
    assert len(features_of(settings)) == 2 * 6 + 2
    near(in_blocks.float(), all_at_once.float())
    for part in ("train", "val", "test"):
        near(teacher.runs[0].logits[part], whole.runs[0].logits[part])


def test_another_split_finds_the_features_of_blocks_that_stayed_together(teacher_settings, toy_data, monkeypatch):
    """The first block of the training images changes places with the validation images, the others are rotated."""
    monkeypatch.setattr(teachers, "BLOCK", 10)
    settings = teacher_settings(learning_rate=1e-30)  # the trained part stays as the seed made it
    first, soft = tuned(settings, toy_data)
    before = features_of(settings)
    assert len(before) == 2 * 4 + 1

    (images, labels), val = toy_data.train, toy_data.val
    order = torch.cat([torch.arange(20, 40), torch.arange(10, 20)])
    train = Split(torch.cat([val.images, images[order]]), torch.cat([val.labels, labels[order]]))
    parts = {"train": train, "val": Split(images[:10], labels[:10])}
    changed = toy_data._replace(**parts, checksum="other", part_checksums={"train": "d", "val": "e", "test": "c"})
    other, others = tuned(settings, changed)
    after = features_of(settings)
    assert before.items() < after.items() and len(after) == len(before) + 1  # the validation images' mirror images
    near(others[0, 10:], soft[0, order])
    near(others[0, :10, 0].float(), first.runs[0].logits["val"])
    near(other.runs[0].logits["val"], soft[0, :10, 0].float())
    near(other.runs[0].logits["test"], first.runs[0].logits["test"])


def test_a_seed_can_be_tried_alone_without_the_test_images(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings()
    found = try_fine_tuning(settings.teachers[0], toy_data, settings, 3)
    assert found.tensors == {} and found.facts["trained_views"] == 2
    assert len(features_of(settings)) == 3  # 2 views of the training images, validation
    assert len(files_of(settings)) == 4 and not files_of(settings, "*-logits/*")
    (run,) = fine_tune("resnet18", toy_data, teacher_settings({"teacher_seeds": [3]})).runs
    assert run.history == found.facts["history"]
    monkeypatch.setattr(teachers, "fit", never)
    assert try_fine_tuning(settings.teachers[0], toy_data, settings, 3).facts == found.facts


def test_a_cross_fitted_teacher_says_of_a_training_image_what_a_network_says_that_never_saw_it(
    teacher_settings, toy_data
):
    settings = teacher_settings({"teacher_seeds": [0, 1]}, folds=2, epochs=3, learning_rate=0.01)
    teacher, soft = tuned(settings, toy_data)
    labels = toy_data.train.labels.clone()
    labels[1::2] = labels[1::2].roll(2)  # what the network of fold 0 does not see differs: it trains on 1, 3, 5, ...
    checksums = {**toy_data.part_checksums, "train": "other labels"}
    other = toy_data._replace(train=toy_data.train._replace(labels=labels), part_checksums=checksums)
    others = tuned(settings, other)[1]
    assert soft.shape == others.shape == (2, 40, 2, 10)
    assert torch.equal(soft[:, 1::2], others[:, 1::2])  # said by the network of 0, 2, 4, ...
    assert (soft[:, ::2] != others[:, ::2]).any(-1).all()
    of_test = teacher.logits(toy_data.test.images)
    networks = teachers.FineTuning("resnet18", toy_data, settings)
    assert [run.seed for run in teacher.runs] == [0, 1] and len(networks.networks) == 4 and of_test.shape == (2, 10, 10)
    assert [len(run.history["val_accuracy"]) for run in teacher.runs] == [3, 3]


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_weights_that_give_no_finite_features_are_named(teacher_settings, toy_data, tmp_path, value):
    state = copy.deepcopy(random_network().state_dict())
    state["layer3.0.conv1.weight"][0] = value
    state["layer3.1.bn2.weight"] *= value
    save_file(state, tmp_path / "resnet18.safetensors")
    message = message_of(fine_tune, "resnet18", toy_data, teacher_settings(weights=str(tmp_path)))
    assert message.startswith("weights: ") and "resnet18" in message and "not finite" in message


def test_logits_too_large_to_be_kept_are_named(teacher_settings, toy_data, monkeypatch):
    monkeypatch.setattr(teachers, "predict", lambda suffix, x, *_, **__: torch.full((len(x), 10), 1e5))
    message = message_of(fine_tune, "resnet18", toy_data, teacher_settings())
    assert "resnet18-last_layer, seed 0" in message and "lower its learning_rate" in message


def raising(error):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.parametrize("name, what, setting", [
    ("fit", "resnet18, last_layer, seed 0", "teacher_batch_size or feature_memory_gb"),
    ("view_pixels", "features", "teacher_size"), ("predict", "logits", "teacher_size"),
])  # fmt: skip
def test_where_memory_runs_out_the_setting_to_lower_is_named(
    teacher_settings, toy_data, monkeypatch, name, what, setting
):
    with monkeypatch.context() as patched:
        patched.setattr(teachers, name, raising(torch.cuda.OutOfMemoryError("CUDA out of memory")))
        message = message_of(fine_tune, "resnet18", toy_data, teacher_settings())
    assert what in message and f"memory ran out; lower {setting}; finished results are kept" in message
    assert len(fine_tune("resnet18", toy_data, teacher_settings()).runs) == 1


def test_another_error_of_the_program_is_not_taken_for_memory(teacher_settings, toy_data, monkeypatch):
    monkeypatch.setattr(teachers, "fit", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"):
        fine_tune("resnet18", toy_data, teacher_settings())


def test_labelling_resumes_at_the_view_where_it_was_interrupted(teacher_settings, toy_data, tmp_path, monkeypatch):
    settings = teacher_settings()
    whole = tuned(teacher_settings({"runs_dir": str(tmp_path / "elsewhere")}), toy_data)
    real, calls = teachers.predict, []

    def interrupted(*arguments, **named):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(teachers, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(settings, toy_data)
    same_teacher(tuned(settings, toy_data), whole)
    assert len(calls) == 5  # train, val and test as they are, and the mirror images, begun twice
    assert not list(settings.run_folder.rglob("*.lock"))


def test_there_must_be_room_for_the_features_that_are_missing(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings(views=1)
    needed = 512 * 2 * (40 + 10)  # of the training and validation images
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    message = message_of(teachers.check_space, toy_data, settings, settings.teachers[:1])
    assert message.startswith("runs_dir: ") and str(settings.run_folder) in message and "free space" in message
    teachers.FineTuning("resnet18", toy_data, settings).features(toy_data.val.images)
    teachers.check_space(toy_data, settings, settings.teachers[:1])  # there are fewer to come
