"""kdutils.students: methods are paired by seed, and no student is stale."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import fake_teacher, message_of
from test_identity import PLAIN, define

from kdutils.data.images import Split
from kdutils.losses import class_mean, combine_teachers, cross_entropy, distillation_loss, kd_loss
from kdutils.models import normalise
from kdutils.students import Method, fit_arguments, fit_student, train_students
from kdutils.teachers import soft_labels
from kdutils.training import draw


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
    teacher = fake_teacher(toy_data)
    arm = Method("kd", partial(distillation_loss, temperature=4.0, alpha=1.0), (teacher,))
    (student,) = train_students(arm, toy_data, settings)
    order, view = draw(0, 0, 40, 2)
    model = student.network()
    pixels = normalise(toy_data.train.images[order])
    pixels = torch.where(view[:, None, None, None] == 1, pixels.flip(-1), pixels)
    expected = kd_loss(model(pixels), soft_labels(teacher, toy_data.train.images, 2)[0, order, view].float(), 4.0)
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


def test_two_teachers_need_combine_and_combine_needs_teachers(toy_data):
    one, other = fake_teacher(toy_data), fake_teacher(toy_data, "resnet18")
    assert "two or more teachers need `combine`" in message_of(Method, "kd", distillation_loss, (one, other))
    assert "`combine` needs teachers" in message_of(Method, "kd", distillation_loss, (), kd_loss)


def test_images_without_a_label_are_trained_on_by_their_soft_labels(tiny, toy_data):
    settings = tiny(seeds=[0])
    both = Split(torch.cat([toy_data.train.images, toy_data.test.images]),
                 torch.cat([toy_data.train.labels, torch.full((10,), -1)]))  # fmt: skip
    method = Method("kd", partial(distillation_loss, temperature=4.0, alpha=0.5), (fake_teacher(toy_data),))
    (alone,), (more,) = train_students(method, toy_data, settings), train_students(method, toy_data, settings, both)
    assert not same_runs([alone], [more]) and len(students_files(settings)) == 2
    scratch = Method("scratch", cross_entropy)
    unlabelled = both._replace(labels=torch.full((50,), -1))
    (untaught,) = train_students(scratch, toy_data, settings, unlabelled)
    assert untaught.history["train_loss"] == [0.0, 0.0] == untaught.history["train_accuracy"]
    assert fit_student(method, toy_data, settings, 0, both).fingerprint == more.fingerprint


def test_class_means_teach_what_a_class_looks_like(tiny, toy_data):
    """The control `class_mean` is a `combine` for one teacher: the same target for all images of a class."""
    settings, teacher = tiny(seeds=[0]), fake_teacher(toy_data)
    distil = partial(distillation_loss, temperature=4.0, alpha=1.0)
    method = Method("kd_class_mean", distil, (teacher,), partial(class_mean, temperature=4.0))
    arguments = fit_arguments(method, toy_data, settings, 0)
    index, logits = torch.arange(40), torch.zeros(40, 10)
    views = [torch.full((40,), view) for view in (0, 5)]
    losses = [arguments["loss"](logits[:10], index[:10], view[:10]) for view in views]
    assert losses[0] == losses[1] == arguments["loss"](logits[:10], index[10:20], views[0][:10])


@pytest.mark.parametrize("loss, teachers", [(distillation_loss, 0), (cross_entropy, 1), (partial(kd_loss, temperature=4.0), 1),
                                            (partial(distillation_loss, temperature=4.0), 1)])  # fmt: skip
def test_a_loss_that_cannot_be_called_is_refused_at_once(toy_data, loss, teachers):
    if loss is cross_entropy:
        loss = partial(cross_entropy, label_smoothing=0.1)
    message = message_of(Method, "mine", loss, (fake_teacher(toy_data),) * teachers)
    assert message.startswith("method mine: ") and "partial" in message


def test_the_order_in_which_things_are_made_does_not_matter(tiny, toy_data, tmp_path):
    """Students before teachers or after, seeds in either order, made in one run folder or loaded in it."""

    def made(folder, steps):
        settings = tiny(seeds=[0, 1], runs_dir=str(tmp_path / folder))
        found = {}
        for step, seeds in steps:
            used = dataclasses.replace(settings, seeds=seeds)
            torch.manual_seed(len(found))
            torch.rand(len(found))
            arm = Method("scratch", cross_entropy)
            if step == "kd":
                distil = partial(distillation_loss, temperature=4.0, alpha=0.9)
                arm = Method("kd", distil, (fake_teacher(toy_data, "resnet18", (0, 1)),))
            found |= {(step, run.seed): run for run in train_students(arm, toy_data, used)}
        return found

    one = made("one", [("scratch", [0, 1]), ("kd", [0, 1])])
    other = made("other", [("kd", [1]), ("scratch", [1, 0]), ("kd", [0])])
    again = made("one", [("kd", [0, 1]), ("scratch", [0, 1])])
    for key, run in one.items():
        for another in (other[key], again[key]):
            assert run.fingerprint == another.fingerprint and same_runs([run], [another])
            assert all(torch.equal(run.logits[part], another.logits[part]) for part in run.logits)
