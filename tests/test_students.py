"""kdutils.students and kdutils.teachers: paired arms, nothing stale, and logits that the uncut network confirms."""

import dataclasses
import importlib.util
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import message_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision import models as zoo

from kdutils import teachers
from kdutils.cache import describe
from kdutils.data.images import Split, load_data
from kdutils.data.views import make_views, view_pixels
from kdutils.losses import combine_teachers, cross_entropy, distillation_loss, kd_loss
from kdutils.models import MEAN, STD, normalise, seeded
from kdutils.settings import UserError
from kdutils.students import Method, train_students
from kdutils.teachers import Teacher, TeacherRun, fine_tune, save_logits, try_fine_tuning
from kdutils.training import draw

modules = itertools.count()


def define(folder, source):
    """A function `loss` in a file of its own, as in a notebook's cell."""
    path = folder / f"cell_{next(modules)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loss


PLAIN = "import torch.nn.functional as F\n\ndef loss(s, y, weight=1.0):\n    return weight * F.cross_entropy(s, y)\n"


def identity(function):
    """What tells this loss from others; None if it is refused."""
    try:
        return describe(function)
    except UserError:
        return None


@pytest.mark.parametrize("other", [
    'import torch.nn.functional as F\n\ndef loss(s, y, weight=1.0):\n    """A docstring."""\n'
    "    return weight * F.cross_entropy(s, y)\n",
    "import torch.nn.functional as F\n# a comment\ndef loss(s, y, weight=1.0):\n    # why\n\n"
    "    return  weight*F.cross_entropy( s,y )\n",
], ids=["docstring", "comments and spaces"])  # fmt: skip
def test_words_about_a_loss_are_no_part_of_its_identity(tmp_path, other):
    assert describe(define(tmp_path, PLAIN)) == describe(define(tmp_path, other))


@pytest.mark.parametrize("other", [
    PLAIN.replace("weight * F", "2 * weight * F"), PLAIN.replace("weight=1.0", "weight=2.0"),
    PLAIN.replace("(s, y)\n", "(s, y.clamp(min=0))\n"),
], ids=["code", "default", "call"])  # fmt: skip
def test_another_code_is_another_identity(tmp_path, other):
    assert describe(define(tmp_path, PLAIN)) != describe(define(tmp_path, other))


BOUND = {
    "number": ({"weight": 1.0}, {"weight": 2.0}),
    "nearly the same": ({"weight": 0.1}, {"weight": 0.1 + 1e-12}),
    "none": ({}, {"weight": 2.0}),
    "tensor": ({"weight": torch.tensor([0.500001])}, {"weight": torch.tensor([0.500002])}),
    "long tensor": ({"weight": torch.zeros(2000)}, {"weight": torch.zeros(2000).index_fill(0, torch.tensor(999), 1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_another_bound_value_is_another_identity(tmp_path, name):
    function = define(tmp_path, PLAIN)
    one, other = (identity(partial(function, **named)) for named in BOUND[name])
    assert one is None or one != other


def test_binding_in_steps_is_binding_at_once():
    at_once = partial(distillation_loss, temperature=2.0, alpha=0.5)
    in_steps = partial(partial(distillation_loss, temperature=9.0, alpha=0.5), temperature=2.0)
    assert describe(at_once) == describe(in_steps) != describe(partial(distillation_loss, temperature=9.0, alpha=0.5))


AROUND = {
    "global": "T = 4.0\ndef loss(s, t, y):\n    return T * (s - t).sum()\n",
    "default": "T = 4.0\ndef loss(s, t, y, weight=T):\n    return weight * (s - t).sum()\n",
    "helper": "def scaled(x):\n    return x * 4.0\ndef loss(s, t, y):\n    return scaled(s - t).sum()\n",
    "helper's global": "T = 4.0\ndef scaled(x):\n    return x * T\ndef loss(s, t, y):\n    return scaled(s - t).sum()\n",
    "object": "from types import SimpleNamespace\nhere = SimpleNamespace(T=4.0)\n"
              "def loss(s, t, y):\n    return here.T * (s - t).sum()\n",
    "inside a comprehension": "T = 4.0\ndef loss(s, t, y):\n    return sum(T * (a - b).sum() for a, b in zip(s, t))\n",
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_what_a_loss_uses_from_around_it_is_refused_or_counts(tmp_path, name):
    """A notebook's `T = 4.0` in the cell above the loss: changing it must never load the old students."""
    one, other = (identity(define(tmp_path, AROUND[name].replace("4.0", value))) for value in ("4.0", "8.0"))
    assert one is None or one != other


@pytest.mark.parametrize("around", ["mean = 1.0", "mean = object()", "y = object()", "s = 3"])
def test_a_name_that_a_loss_does_not_use_is_no_part_of_it(tmp_path, around):
    """A notebook may have a variable `mean`; `x.mean()` has nothing to do with it."""
    source = "def loss(s, y):\n    return s.mean()\n"
    assert describe(define(tmp_path, source)) == describe(define(tmp_path, f"{around}\n{source}"))


@pytest.mark.parametrize("source", [
    "from torch import exp\ndef loss(s, y):\n    return exp(s).mean()\n",
    "from math import log\ndef loss(s, y):\n    return s.mean() * log(2)\n",
    "import torch.nn.functional as F\nfrom torch.nn.functional import kl_div\ndef loss(s, t, y):\n    return kl_div(s, t)\n",
    "def loss(s, y, depth=2):\n    return s.mean() if depth == 0 else loss(s, y, depth - 1)\n",
    "import torch\n@torch.no_grad()\ndef loss(s, y):\n    return s.mean()\n",
], ids=["torch", "math", "functional", "recursive", "decorated"])  # fmt: skip
def test_usual_ways_to_write_a_loss_are_accepted_or_refused_in_words(tmp_path, source):
    function = define(tmp_path, source)
    assert identity(function) == identity(function)  # UserError at most


def closure(temperature):
    def loss(s, t, y):
        return kd_loss(s, t, temperature)

    return loss


class Scaled:
    factor = 1.0

    def loss(self, s, y):
        return self.factor * cross_entropy(s, y)

    def __call__(self, s, y):
        return self.loss(s, y)


named_lambda = lambda s, y: cross_entropy(s, y)  # noqa: E731


@pytest.mark.parametrize("function", [
    named_lambda, lambda s, y: 0, closure(2.0), partial(closure(2.0)), Scaled().loss, Scaled(), Scaled,
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss, torch.add, len, partial(kd_loss, 1), None,
    eval("lambda s, y: s.sum()"), partial(named_lambda),
], ids=lambda function: type(function).__name__)  # fmt: skip
def test_a_loss_must_be_a_plain_function(function):
    with pytest.raises(UserError) as caught:
        describe(function)
    assert str(caught.value).startswith("loss: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [
    cross_entropy, kd_loss, distillation_loss, partial(combine_teachers, rule="mean_prob", temperature=4.0),
    partial(cross_entropy, label_smoothing=0.1),
])  # fmt: skip
def test_the_losses_of_the_package_can_be_used(function):
    assert describe(function) == describe(function)


def fake_teacher(data, arch="resnet50", seeds=(0,), num_views=18):
    """A teacher with random opinions, one per run."""

    def run(seed):
        generator = torch.Generator().manual_seed(seed + 100 * len(arch))
        logits = 3 * torch.randn(len(data.train.labels), num_views, 10, generator=generator)
        return TeacherRun(arch, "last_layer", seed, {}, {}, logits.half(), 0.0, f"{arch} {seed}")

    return Teacher(arch, "last_layer", [run(seed) for seed in seeds], "a fake", True, "x", 1, 1, 1, 0.0)


def students_files(settings):
    """The trained students' files, without those of their logits."""
    files = (settings.run_folder / "students").iterdir()
    return {path.name: path.stat().st_mtime_ns for path in files if "-logits-" not in path.name}


def same_runs(one, other):
    return all(a.history == b.history and all(torch.equal(a.state[name], b.state[name]) for name in a.state)
               for a, b in zip(one, other, strict=True))  # fmt: skip


def test_arms_with_one_seed_start_alike_and_see_the_same(tiny, toy_data):
    """Distilling with alpha 0 is training from scratch: same weights, same order, same views, hence same student."""
    settings = tiny()
    scratch = train_students(Method("scratch", cross_entropy), toy_data, settings)
    distil = partial(distillation_loss, temperature=4.0, alpha=0.0)
    distilled = train_students(Method("kd", distil, (fake_teacher(toy_data),)), toy_data, settings)
    for one, other in zip(scratch, distilled, strict=True):
        assert one.seed == other.seed
        torch.testing.assert_close(one.history["train_loss"], other.history["train_loss"], rtol=1e-4, atol=1e-5)
        for name, tensor in one.state.items():
            torch.testing.assert_close(tensor, other.state[name], rtol=1e-3, atol=1e-4)
    assert not torch.equal(scratch[0].state["conv1.weight"], scratch[1].state["conv1.weight"])


def test_a_student_learns_from_the_teachers_opinion_of_the_same_view(tiny, toy_data):
    """With a vanishing rate, the epoch's loss is that of the initial weights over the (index, view) pairs drawn."""
    settings = tiny(seeds=[0], max_shift=0, epochs=1, schedule="constant", optimizer="adam", learning_rate=1e-30)
    teacher = fake_teacher(toy_data, num_views=2)
    arm = Method("kd", partial(distillation_loss, temperature=4.0, alpha=1.0), (teacher,))
    (student,) = train_students(arm, toy_data, settings)
    order, view = draw(0, 0, 40, 2)
    model = student.network()
    pixels = normalise(toy_data.train.images[order])
    pixels = torch.where(view[:, None, None, None] == 1, pixels.flip(-1), pixels)
    expected = kd_loss(model(pixels), teacher.runs[0].view_logits[order, view].float(), 4.0)
    assert student.history["train_loss"][0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_is_trained_once_and_loaded_afterwards(tiny, toy_data, capsys):
    settings = tiny()
    arm = Method("scratch", partial(cross_entropy, label_smoothing=0.1))
    first = train_students(arm, toy_data, settings)
    files = students_files(settings)
    assert len(files) == 2 and "epoch" in capsys.readouterr().out
    second = train_students(arm, toy_data, settings)
    assert students_files(settings) == files and same_runs(first, second) and "epoch" not in capsys.readouterr().out
    assert [run.seconds for run in first] == [run.seconds for run in second]


def test_a_students_logits_are_its_networks(tiny, toy_data):
    (student,) = train_students(Method("scratch", cross_entropy), toy_data, tiny(seeds=[3]))
    for part in ("train", "val", "test"):
        expected = student.network()(normalise(getattr(toy_data, part).images))
        torch.testing.assert_close(student.logits[part], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [
    {"epochs": 3}, {"learning_rate": 0.001}, {"schedule": "cosine"}, {"max_shift": 2}, {"batch_size": 20},
])  # fmt: skip
def test_what_a_student_depends_on_trains_it_anew(tiny, toy_data, change):
    arm = Method("scratch", cross_entropy)
    before = tiny(seeds=[0])
    train_students(arm, toy_data, before)
    kept = students_files(before)
    train_students(arm, toy_data, tiny(seeds=[0], **change))
    assert len(students_files(before)) == 2 and kept.items() <= students_files(before).items()


@pytest.mark.parametrize("change", [{"temperature": 2.0}, {"alpha": 0.1}, {"test_size": 11}, {"threads": 1},
                                    {"resnet18_epochs": 7}, {"data_name": "other"}])  # fmt: skip
def test_what_a_student_does_not_depend_on_loads_it(tiny, toy_data, change):
    arm = Method("scratch", cross_entropy)
    train_students(arm, toy_data, tiny(seeds=[0]))
    kept = students_files(tiny())
    train_students(arm, toy_data, tiny(seeds=[0], **change))
    assert students_files(tiny()) == kept


def test_another_seed_leaves_the_others_as_they_are(tiny, toy_data):
    arm = Method("scratch", cross_entropy)
    first = train_students(arm, toy_data, tiny(seeds=[0]))
    kept = students_files(tiny())
    both = train_students(arm, toy_data, tiny(seeds=[1, 0]))
    assert kept.items() < students_files(tiny()).items() and same_runs(first, both[1:])


def test_a_changed_loss_is_trained_anew(tiny, toy_data, tmp_path):
    settings = tiny(seeds=[0])
    first = train_students(Method("mine", define(tmp_path, PLAIN)), toy_data, settings)
    changed = define(tmp_path, PLAIN.replace("weight *", "0.5 * weight *"))
    second = train_students(Method("mine", changed), toy_data, settings)
    assert len(students_files(settings)) == 2 and not same_runs(first, second)
    bound = train_students(Method("mine", partial(changed, weight=3.0)), toy_data, settings)
    assert len(students_files(settings)) == 3 and not same_runs(second, bound)


def test_other_data_and_other_teachers_train_anew(tiny, toy_data):
    settings = tiny(seeds=[0])
    arm = Method("kd", partial(kd_loss_with_labels, temperature=4.0), (fake_teacher(toy_data),))
    train_students(arm, toy_data, settings)
    other = toy_data._replace(checksum="other", part_checksums={**toy_data.part_checksums, "train": "other"})
    train_students(arm, other, settings)
    teacher = fake_teacher(toy_data)
    run = dataclasses.replace(teacher.runs[0], fingerprint="fine-tuned otherwise")
    train_students(dataclasses.replace(arm, teachers=(dataclasses.replace(teacher, runs=[run]),)), toy_data, settings)
    assert len(students_files(settings)) == 3


def test_other_test_images_train_nothing_but_are_looked_at(tiny, toy_data):
    arm, settings = Method("scratch", cross_entropy), tiny(seeds=[0])
    train_students(arm, toy_data, settings)
    kept = students_files(settings)
    images = toy_data.test._replace(images=toy_data.test.images.flip(-1))
    other = toy_data._replace(test=images, checksum="other", part_checksums={**toy_data.part_checksums, "test": "d"})
    (student,) = train_students(arm, other, settings)
    assert students_files(settings) == kept
    expected = student.network()(normalise(images.images))
    torch.testing.assert_close(student.logits["test"], expected, rtol=1e-4, atol=1e-4)


def kd_loss_with_labels(student_logits, teacher_logits, labels, temperature):
    return kd_loss(student_logits, teacher_logits, temperature)


def test_students_take_turns_with_a_teachers_runs(toy_data):
    teacher = fake_teacher(toy_data, seeds=(0, 1))
    assert [teacher.run_for(seed).seed for seed in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("rule", ["mean_prob", "mean_logit", "confidence"])
def test_two_teachers_of_one_opinion_are_one_teacher(tiny, toy_data, rule):
    settings = tiny(seeds=[0])
    teacher = fake_teacher(toy_data)
    distil = partial(distillation_loss, temperature=4.0, alpha=0.9)
    combine = partial(combine_teachers, rule=rule, temperature=4.0)
    alone = train_students(Method("kd", distil, (teacher,)), toy_data, settings)[0]
    both = train_students(Method("kd2", distil, (teacher, teacher), combine), toy_data, settings)[0]
    assert both.teachers == ("resnet50", "resnet50")
    torch.testing.assert_close(both.history["train_loss"], alone.history["train_loss"], rtol=1e-3, atol=1e-4)


def test_combine_goes_with_two_teachers_and_only_then(toy_data):
    one, other = fake_teacher(toy_data), fake_teacher(toy_data, "resnet18")
    for several, combine in (((one, other), None), ((one,), kd_loss), ((), kd_loss)):
        with pytest.raises(UserError, match="arm kd: give `combine` with two or more teachers"):
            Method("kd", distillation_loss, several, combine)


@pytest.mark.parametrize("loss, teachers", [(distillation_loss, 0), (cross_entropy, 1), (partial(kd_loss, temperature=4.0), 1),
                                            (partial(distillation_loss, temperature=4.0), 1)])  # fmt: skip
def test_a_loss_that_cannot_be_called_is_refused_at_once(toy_data, loss, teachers):
    if loss is cross_entropy:
        loss = partial(cross_entropy, label_smoothing=0.1)
    with pytest.raises(UserError) as caught:
        Method("mine", loss, (fake_teacher(toy_data),) * teachers)
    message = str(caught.value)
    assert message.startswith("arm mine: ") and "partial" in message and "\n" not in message


# Teachers


def random_resnet18(seed=0):
    """With norms that are not the identity, so that folding them is part of what is tested."""
    model = seeded(seed, zoo.resnet18)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


@pytest.fixture
def teacher_settings(tiny, tmp_path):
    """Tiny settings with a folder of random weights; resnet50's is there in name only, nothing here opens it."""
    folder = tmp_path / "weights"
    folder.mkdir()
    state = random_resnet18().state_dict()
    save_file(state, folder / "resnet18.safetensors", metadata={"description": "random", "standin": "true"})
    (folder / "resnet50.safetensors").touch()
    common = {"weights": str(folder), "max_shift": 0, "teacher_size": 40, "teacher_seeds": [0, 1]}
    return lambda **overrides: tiny(**{**common, **overrides})


def files_of(settings, pattern="**/*"):
    return {
        path: path.stat().st_mtime_ns for path in (settings.run_folder / "teachers").glob(pattern) if path.is_file()
    }


def whole_network(settings, seed):
    """The uncut network, put together from the pre-trained weights and the stored suffix."""
    model = random_resnet18()
    (path,) = (settings.run_folder / "teachers").glob(f"resnet18-last_block-seed{seed}-*.safetensors")
    with safe_open(path, framework="pt") as file:
        suffix = {name: file.get_tensor(name) for name in file.keys()}
    assert all(name.startswith(("layer4.", "fc.")) for name in suffix)
    model.fc = nn.Linear(512, 10)
    model.load_state_dict({**{k: v for k, v in model.state_dict().items() if k not in suffix}, **suffix})
    return model.eval()


def test_stored_logits_are_those_of_the_whole_network(teacher_settings, toy_data):
    settings = teacher_settings()
    teacher = fine_tune("resnet18", toy_data, settings)
    assert (teacher.description, teacher.is_standin, teacher.trainable) == ("random", True, "last_block")
    assert teacher.parameters_trained == 8_393_728 + 5_130 and teacher.parameters_total == 11_181_642
    assert [run.seed for run in teacher.runs] == [0, 1]
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    viewed = make_views(toy_data.train.images, 0, 1)
    for run in teacher.runs:
        model = whole_network(settings, run.seed)

        @torch.no_grad()
        def logits(pixels, model=model):
            x = F.interpolate((pixels.float() / 255 - mean) / std, (40, 40), mode="bilinear", align_corners=False)
            return model(x)

        assert run.view_logits.shape == (40, 2, 10) and run.view_logits.dtype == torch.float16
        index = torch.arange(40)
        for view in range(2):
            expected = logits(view_pixels(viewed, index, torch.full((40,), view)))
            torch.testing.assert_close(run.view_logits[:, view].float(), expected, rtol=5e-3, atol=5e-3)
        assert torch.equal(run.logits["train"], run.view_logits[:, 0].float())
        for part in ("val", "test"):
            torch.testing.assert_close(run.logits[part], logits(getattr(toy_data, part).images), rtol=5e-3, atol=5e-3)
    one, other = teacher.runs
    assert (one.view_logits.float() - other.view_logits.float()).abs().max() > 0.1


def test_only_what_depends_on_a_setting_is_computed_again(teacher_settings, toy_data):
    settings = teacher_settings(teacher_seeds=[0])
    (first,) = fine_tune("resnet18", toy_data, settings).runs
    files = files_of(settings)
    features = files_of(settings, "resnet18-last_block-features/*")
    assert len(features) == 4 and len(files) == 6  # features of 2 train views, val, test; the suffix; its logits

    for change in (
        {"temperature": 2.0},
        {"alpha": 0.5, "epochs": 5, "seeds": [4], "resnet50_epochs": 3, "test_size": 11},
    ):
        (again,) = fine_tune("resnet18", toy_data, teacher_settings(teacher_seeds=[0], **change)).runs
        assert files_of(settings) == files, change
        assert again.fingerprint == first.fingerprint and torch.equal(again.view_logits, first.view_logits)

    settings = teacher_settings(teacher_seeds=[0], resnet18_learning_rate=0.01)
    (other,) = fine_tune("resnet18", toy_data, settings).runs
    assert other.fingerprint != first.fingerprint and files.items() < files_of(settings).items()
    assert files_of(settings, "resnet18-last_block-features/*") == features and len(files_of(settings)) == 8
    assert not torch.equal(other.view_logits, first.view_logits)


def test_a_memory_budget_lowers_the_number_of_views_and_says_so(teacher_settings, toy_data, capsys):
    teacher = fine_tune("resnet18", toy_data, teacher_settings(teacher_seeds=[0], feature_memory_gb=1e-9))
    assert teacher.views_trained == 1 and "feature_memory_gb" in capsys.readouterr().out
    assert teacher.runs[0].view_logits.shape == (40, 2, 10)  # students see them all the same
    assert fine_tune("resnet18", toy_data, teacher_settings(teacher_seeds=[0])).views_trained == 2


def test_without_pre_training_the_whole_network_is_trained(tiny, toy_data):
    teacher = fine_tune("resnet18", toy_data, tiny(max_shift=0))
    assert teacher.trainable == "all" and teacher.parameters_trained == teacher.parameters_total
    assert teacher.runs[0].view_logits.shape == (40, 2, 10) and "no pre-training" in teacher.description


def test_fine_tuning_leaves_the_pre_trained_weights_alone(teacher_settings, toy_data):
    """Both seeds start from the same block: a suffix trained in place would hand its weights on to the next."""
    both = fine_tune("resnet18", toy_data, teacher_settings(teacher_seeds=[0, 1]))
    alone = fine_tune("resnet18", toy_data, teacher_settings(teacher_seeds=[1], runs_dir=str(
        teacher_settings().run_folder / "elsewhere")))  # fmt: skip
    assert torch.equal(both.runs[1].view_logits, alone.runs[0].view_logits)


def test_a_teacher_for_generated_data(tiny, monkeypatch):
    """The path of the demo: images drawn here, ResNets pre-trained here on other shapes."""
    settings = tiny(weights="generated", generated_images=100, generated_epochs=1, max_shift=0)
    teacher = fine_tune("resnet18", load_data(settings), settings)
    assert teacher.is_standin and "generated images" in teacher.description and teacher.trainable == "last_block"
    monkeypatch.setattr(teachers, "cut", never)
    same_teacher(fine_tune("resnet18", load_data(settings), settings), teacher)


FAST = {"resnet18_trainable": "last_layer", "teacher_size": 32, "teacher_seeds": [0]}


def never(*_, **__):
    raise AssertionError("was not to be called")


def same_teacher(one, other):
    """All but what was measured by the clock."""
    assert one.facts == other.facts and len(one.runs) == len(other.runs)
    for a, b in zip(one.runs, other.runs):
        for name in ("arch", "trainable", "seed", "history", "fingerprint"):
            assert getattr(a, name) == getattr(b, name)
        assert torch.equal(a.view_logits, b.view_logits) and a.view_logits.dtype == b.view_logits.dtype
        assert all(torch.equal(a.logits[part], b.logits[part]) for part in ("train", "val", "test"))


def test_a_teacher_is_loaded_again_without_building_a_network(teacher_settings, toy_data, monkeypatch):
    first = fine_tune("resnet18", toy_data, teacher_settings(**{**FAST, "teacher_seeds": [0, 1]}))
    for name in ("load_backbone", "cut", "fit"):
        monkeypatch.setattr(teachers, name, never)
    monkeypatch.setattr(zoo, "resnet18", never)
    same_teacher(fine_tune("resnet18", toy_data, teacher_settings(**{**FAST, "teacher_seeds": [0, 1]})), first)


@pytest.mark.parametrize("block, files", [(7, 2 * 6 + 2 + 2), (40, 4)])
def test_features_in_blocks_are_the_features(teacher_settings, toy_data, monkeypatch, block, files):
    settings = teacher_settings(**FAST)
    (whole,) = fine_tune("resnet18", toy_data, settings).runs
    monkeypatch.setattr(teachers, "BLOCK", block)
    settings = teacher_settings(**FAST, runs_dir=str(settings.run_folder / "elsewhere"))
    (run,) = fine_tune("resnet18", toy_data, settings).runs
    assert len(files_of(settings, "resnet18-last_layer-features/*")) == files
    torch.testing.assert_close(run.view_logits.float(), whole.view_logits.float(), rtol=5e-3, atol=5e-3)
    for part in ("train", "val", "test"):
        torch.testing.assert_close(run.logits[part], whole.logits[part], rtol=5e-3, atol=5e-3)


def test_another_split_finds_the_features_of_blocks_that_stayed_together(teacher_settings, toy_data, monkeypatch):
    """The first block of the training images changes places with the validation images, the others are rotated."""
    monkeypatch.setattr(teachers, "BLOCK", 10)
    still = {**FAST, "resnet18_learning_rate": 1e-30}  # the suffix stays as the seed made it
    settings = teacher_settings(**still)
    (first,) = fine_tune("resnet18", toy_data, settings).runs
    before = files_of(settings, "resnet18-last_layer-features/*")
    assert len(before) == 2 * 4 + 1 + 1

    (images, labels), val = toy_data.train, toy_data.val
    order = torch.cat([torch.arange(20, 40), torch.arange(10, 20)])
    changed = toy_data._replace(
        train=Split(torch.cat([val.images, images[order]]), torch.cat([val.labels, labels[order]])),
        val=Split(images[:10], labels[:10]),
        checksum="other", part_checksums={"train": "d", "val": "e", "test": "c"},
    )  # fmt: skip
    (other,) = fine_tune("resnet18", changed, settings).runs
    after = files_of(settings, "resnet18-last_layer-features/*")
    assert before.items() < after.items() and len(after) == len(before) + 1  # the validation images' mirror images
    assert torch.equal(other.view_logits[10:], first.view_logits[order])
    assert torch.equal(other.view_logits[:10, 0].float(), first.logits["val"])
    assert torch.equal(other.logits["val"], first.view_logits[:10, 0].float())
    assert torch.equal(other.logits["test"], first.logits["test"])


def test_another_way_to_resize_computes_the_features_again(teacher_settings, toy_data):
    changes = {**FAST, "teacher_size": 40}
    settings = {mode: teacher_settings(**changes, teacher_resize=mode) for mode in ("bilinear", "nearest")}
    (one,) = fine_tune("resnet18", toy_data, settings["bilinear"]).runs
    features = files_of(settings["bilinear"], "resnet18-last_layer-features/*")
    (other,) = fine_tune("resnet18", toy_data, settings["nearest"]).runs
    assert len(files_of(settings["nearest"], "resnet18-last_layer-features/*")) == 2 * len(features) == 8
    assert other.fingerprint != one.fingerprint and not torch.equal(other.view_logits, one.view_logits)
    (again,) = fine_tune("resnet18", toy_data, settings["bilinear"]).runs
    assert again.fingerprint == one.fingerprint and torch.equal(again.view_logits, one.view_logits)


def test_what_only_the_last_layer_is_about_leaves_the_features_as_they_are(teacher_settings, toy_data):
    settings = teacher_settings(**FAST)
    runs = fine_tune("resnet18", toy_data, settings).runs
    features = files_of(settings, "resnet18-last_layer-features/*")
    for change in ({"resnet18_standardize": True}, {"resnet18_last_layer_factor": 0.1}):
        runs += fine_tune("resnet18", toy_data, teacher_settings(**FAST, **change)).runs
    assert len({run.fingerprint for run in runs}) == 3
    assert not any(torch.equal(one.view_logits, other.view_logits) for one, other in itertools.combinations(runs, 2))
    assert files_of(settings, "resnet18-last_layer-features/*") == features
    files = files_of(settings)
    for change in ({"resnet50_standardize": True}, {"resnet50_last_layer_factor": 0.1}):
        (again,) = fine_tune("resnet18", toy_data, teacher_settings(**FAST, **change)).runs
        assert files_of(settings) == files and again.fingerprint == runs[0].fingerprint


def test_a_seed_can_be_tried_alone_without_the_test_images(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings(**FAST)
    found = try_fine_tuning("resnet18", toy_data, settings, 3)
    assert found.tensors == {} and found.facts["trained_views"] == 2
    assert len(files_of(settings, "resnet18-last_layer-features/*")) == 3  # 2 views of the training images, validation
    assert len(files_of(settings)) == 4 and not files_of(settings, "*-logits-*")
    (run,) = fine_tune("resnet18", toy_data, teacher_settings(**{**FAST, "teacher_seeds": [3]})).runs
    assert run.history == found.facts["history"]
    monkeypatch.setattr(teachers, "fit", never)
    assert try_fine_tuning("resnet18", toy_data, settings, 3).facts == found.facts


@pytest.fixture
def kept(teacher_settings, toy_data, tmp_path, monkeypatch):
    """A teacher, and tiny settings whose `weights` folder holds its logits alone; no network can be built."""
    folder = tmp_path / "logits"
    folder.mkdir()
    (folder / "resnet50.safetensors").touch()
    teacher = fine_tune("resnet18", toy_data, teacher_settings(**FAST))
    path = save_logits("resnet18", toy_data, teacher_settings(**{**FAST, "teacher_seeds": [0, 1]}), folder)
    assert path == folder / "resnet18-logits.safetensors"
    for name in ("load_backbone", "cut", "fit"):
        monkeypatch.setattr(teachers, name, never)
    common = {**FAST, "weights": str(folder), "runs_dir": str(tmp_path / "elsewhere")}
    return teacher, path, lambda **overrides: teacher_settings(**{**common, **overrides})


def test_kept_logits_are_the_teacher(kept, toy_data, tmp_path):
    teacher, path, settings = kept
    same_teacher(fine_tune("resnet18", toy_data, settings()), teacher)
    same_teacher(fine_tune("resnet18", toy_data, settings(temperature=2.0, seeds=[5], resnet50_epochs=9)), teacher)
    assert teacher.runs[0].seed == 0 and len(teacher.runs) == 1
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))


def test_kept_logits_do_for_nothing_they_were_not_made_for(kept, toy_data):
    _, path, settings = kept
    for change, name in (
        ({"max_shift": 1}, "views"), ({"resnet18_epochs": 2}, "recipe"), ({"resnet18_learning_rate": 0.1}, "recipe"),
        ({"teacher_batch_size": 10}, "recipe"), ({"teacher_seeds": [1]}, "teacher_seeds"), ({"teacher_seeds": [0, 1]}, "teacher_seeds"),
        ({"teacher_size": 64}, "teacher_size"), ({"teacher_resize": "nearest"}, "teacher_resize"),
        ({"resnet18_trainable": "last_block"}, "trainable"), ({"teacher_label_smoothing": 0.1}, "teacher_label_smoothing"),
        ({"resnet18_standardize": True}, "standardize"), ({"resnet18_last_layer_factor": 0.5}, "last_layer_factor"),
    ):  # fmt: skip
        message = message_of(fine_tune, "resnet18", toy_data, settings(**change))
        assert message.startswith("weights: ") and str(path) in message, message
        assert f"with {name} = " in message, (change, message)
    for part in ("train", "val", "test"):
        other = toy_data._replace(checksum="other", part_checksums={**toy_data.part_checksums, part: "d"})
        message = message_of(fine_tune, "resnet18", other, settings())
        assert "with data (checksum) = 'toy'" in message and "'other'" in message


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1],
                                    lambda content: content[:-1] + bytes([content[-1] ^ 1])])  # fmt: skip
def test_damaged_logits_are_named(kept, toy_data, damage):
    _, path, settings = kept
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in message_of(fine_tune, "resnet18", toy_data, settings())


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_weights_that_give_no_finite_features_are_named(teacher_settings, toy_data, tmp_path, value):
    state = random_resnet18().state_dict()
    state["layer3.0.conv1.weight"][0] = value
    state["layer3.1.bn2.weight"] *= value
    save_file(state, tmp_path / "weights" / "resnet18.safetensors")
    message = message_of(fine_tune, "resnet18", toy_data, teacher_settings(**FAST))
    assert message.startswith("weights: ") and "resnet18" in message and "not finite" in message


def test_logits_too_large_to_be_kept_are_named(teacher_settings, toy_data, monkeypatch):
    monkeypatch.setattr(teachers, "predict", lambda suffix, x, *_, **__: torch.full((len(x), 10), 1e5))
    message = message_of(fine_tune, "resnet18", toy_data, teacher_settings(**FAST))
    assert "resnet18-last_layer, seed 0" in message and "lower resnet18_learning_rate" in message


@pytest.mark.parametrize("name, what, setting", [
    ("fit", "resnet18, last_layer, seed 0", "teacher_batch_size or feature_memory_gb"),
    ("normalise", "features", "teacher_size"), ("predict", "logits", "teacher_size"),
])  # fmt: skip
def test_where_memory_runs_out_the_setting_to_lower_is_named(
    teacher_settings, toy_data, monkeypatch, name, what, setting
):
    def out_of_memory(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(teachers, name, out_of_memory)
        message = message_of(fine_tune, "resnet18", toy_data, teacher_settings(**FAST))
    assert what in message and f"memory ran out; lower {setting}; finished results are kept" in message
    assert len(fine_tune("resnet18", toy_data, teacher_settings(**FAST)).runs) == 1


def test_another_error_of_the_program_is_not_taken_for_memory(teacher_settings, toy_data, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(teachers, "fit", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        fine_tune("resnet18", toy_data, teacher_settings(**FAST))


def test_a_pass_over_all_views_goes_on_at_the_view_where_it_was_cut(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings(**FAST)
    whole = fine_tune("resnet18", toy_data, teacher_settings(**FAST, runs_dir=str(settings.run_folder / "elsewhere")))
    real, calls = teachers.predict, []

    def cut(*arguments, **named):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(teachers, "predict", cut)
    with pytest.raises(KeyboardInterrupt):
        fine_tune("resnet18", toy_data, settings)
    same_teacher(fine_tune("resnet18", toy_data, settings), whole)
    assert len(calls) == 5  # val, test and two views, one of them begun twice
    assert not list(settings.run_folder.rglob("*.views")) and not list(settings.run_folder.rglob("*.lock"))


def test_there_must_be_room_for_the_features_that_are_missing(teacher_settings, toy_data, monkeypatch):
    settings = teacher_settings(**FAST, teacher_views=1)
    monkeypatch.setattr(teachers.shutil, "disk_usage", lambda _: SimpleNamespace(free=512 * 2 * 100 - 1))  # 100 images
    message = message_of(teachers.check_space, toy_data, settings, ["resnet18"])
    assert message.startswith("runs_dir: ") and str(settings.run_folder) in message and "free space" in message
    teachers.FineTuning("resnet18", toy_data, settings).features("val", 0)
    teachers.check_space(toy_data, settings, ["resnet18"])  # there are fewer to come


def test_the_order_in_which_things_are_made_does_not_matter(teacher_settings, toy_data, tmp_path):
    """Students before teachers or after, seeds in either order, made in one run folder or loaded in it."""

    def made(folder, steps):
        settings = teacher_settings(**FAST, seeds=[0, 1], runs_dir=str(tmp_path / folder))
        found = {}
        for step, seeds in steps:
            used = dataclasses.replace(settings, seeds=seeds)
            torch.manual_seed(len(found))
            torch.rand(len(found))
            arm = Method("scratch", cross_entropy)
            if step == "kd":
                distil = partial(distillation_loss, temperature=4.0, alpha=0.9)
                arm = Method("kd", distil, (fine_tune("resnet18", toy_data, used),))
            found |= {(step, run.seed): run for run in train_students(arm, toy_data, used)}
        return found

    one = made("one", [("scratch", [0, 1]), ("kd", [0, 1])])
    other = made("other", [("kd", [1]), ("scratch", [1, 0]), ("kd", [0])])
    again = made("one", [("kd", [0, 1]), ("scratch", [0, 1])])
    for key, run in one.items():
        for another in (other[key], again[key]):
            assert run.fingerprint == another.fingerprint and same_runs([run], [another])
            assert all(torch.equal(run.logits[part], another.logits[part]) for part in run.logits)
