"""kdutils.students: methods are paired by seed, and no student is stale."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import fake_teacher, message_of
from test_identity import PLAIN, define

from kdutils.data.images import Split
from kdutils.losses import class_mean, combine_teachers, cross_entropy, distillation_loss, kd_loss
from kdutils.models import SmallCNN, normalise
from kdutils.students import Method, fit_arguments, fit_student, train_students
from kdutils.teachers import soft_labels
from kdutils.training import draw, fit, predict

SCRATCH = Method("scratch", cross_entropy)


def distilled(*teachers, alpha=0.9, **named):
    return Method("kd", partial(distillation_loss, temperature=4.0, alpha=alpha), teachers, **named)


def students_files(settings):
    """The trained students' files, without those of their logits."""
    files = (settings.run_folder / "students").iterdir()
    return {path.name: path.stat().st_mtime_ns for path in files if "-logits-" not in path.name}


def same_run(one, other):
    same_state = all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    return one.history == other.history and same_state


def test_methods_with_one_seed_start_alike_and_see_the_same(tiny, toy_data):
    """Distilling with alpha 0 is training from scratch: same weights, same order, same views, hence same student."""
    scratch = train_students(SCRATCH, toy_data, tiny())
    for one, other in zip(scratch, train_students(distilled(fake_teacher(toy_data), alpha=0.0), toy_data, tiny())):
        assert one.seed == other.seed
        torch.testing.assert_close(one.history["train_loss"], other.history["train_loss"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.state, other.state, rtol=1e-3, atol=1e-4)
    assert not torch.equal(scratch[0].state["conv1.weight"], scratch[1].state["conv1.weight"])


def test_a_student_learns_from_the_teachers_opinion_of_the_same_view(tiny, toy_data):
    """With a vanishing rate, the epoch's loss is that of the initial weights over the (index, view) pairs drawn."""
    settings = tiny(seeds=[0], max_shift=0, epochs=1, schedule="constant", optimizer="adam", learning_rate=1e-30)
    teacher = fake_teacher(toy_data)
    (student,) = train_students(distilled(teacher, alpha=1.0), toy_data, settings)
    order, view = draw(0, 0, 40, 2)
    model = student.network()
    pixels = normalise(toy_data.train.images[order])
    pixels = torch.where(view[:, None, None, None] == 1, pixels.flip(-1), pixels)
    expected = kd_loss(model(pixels), soft_labels(teacher, toy_data.train.images, 2)[0, order, view].float(), 4.0)
    assert student.history["train_loss"][0] == pytest.approx(expected.item(), rel=1e-4)


def test_a_student_is_trained_once_and_another_seed_leaves_it_as_it_is(tiny, toy_data, capsys):
    (first,) = train_students(SCRATCH, toy_data, tiny(seeds=[0]))
    kept = students_files(tiny())
    assert len(kept) == 1 and "epoch" in capsys.readouterr().out
    (again,) = train_students(SCRATCH, toy_data, tiny(seeds=[0]))
    assert students_files(tiny()) == kept and same_run(first, again) and first.seconds == again.seconds
    assert "epoch" not in capsys.readouterr().out
    _, third = train_students(SCRATCH, toy_data, tiny(seeds=[1, 0]))
    assert kept.items() < students_files(tiny()).items() and same_run(first, third)


def test_seeds_side_by_side_are_those_trained_one_after_the_other(tiny, toy_data, tmp_path):
    """To the last digit, with as many threads each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    in_order = train_students(SCRATCH, toy_data, tiny(seeds=[0, 1, 2]))
    try:
        torch.set_num_threads(3)
        at_once = train_students(SCRATCH, toy_data, tiny(seeds=[0, 1, 2], runs_dir=str(tmp_path / "other")))
    finally:
        torch.set_num_threads(threads)
    assert [run.seed for run in at_once] == [0, 1, 2] and all(map(same_run, in_order, at_once))
    assert all(torch.equal(one.logits["test"], other.logits["test"]) for one, other in zip(in_order, at_once))


def test_a_students_logits_are_its_networks_and_other_test_images_train_nothing(tiny, toy_data):
    settings = tiny(seeds=[3])
    mirrored = toy_data.test._replace(images=toy_data.test.images.flip(-1))
    checksums = {**toy_data.part_checksums, "test": "d"}
    other = toy_data._replace(test=mirrored, checksum="other", part_checksums=checksums)
    for data in (toy_data, other):
        (student,) = train_students(SCRATCH, data, settings)
        for part in ("train", "val", "test"):
            expected = student.network()(normalise(getattr(data, part).images))
            torch.testing.assert_close(student.logits[part], expected, rtol=1e-4, atol=1e-4)
    assert len(students_files(settings)) == 1


@pytest.mark.parametrize("change, is_anew", [
    ({"epochs": 3}, True), ({"learning_rate": 0.001}, True), ({"schedule": "cosine"}, True), ({"max_shift": 2}, True),
    ({"batch_size": 20}, True), ({"temperature": 2.0}, False), ({"alpha": 0.1}, False), ({"test_size": 11}, False),
    ({"threads": 1}, False), ({"teacher_epochs": 7}, False), ({"data_name": "other"}, False),
])  # fmt: skip
def test_what_a_student_depends_on_trains_it_anew_and_nothing_else(tiny, toy_data, change, is_anew):
    train_students(SCRATCH, toy_data, tiny(seeds=[0]))
    kept = students_files(tiny())
    train_students(SCRATCH, toy_data, tiny(seeds=[0], **change))
    found = students_files(tiny())
    assert kept.items() <= found.items() and len(found) == 1 + is_anew


def test_a_changed_loss_is_trained_anew(tiny, toy_data, tmp_path):
    settings = tiny(seeds=[0])
    (first,) = train_students(Method("mine", define(tmp_path, PLAIN)), toy_data, settings)
    changed = define(tmp_path, PLAIN.replace("weight *", "0.5 * weight *"))
    (second,) = train_students(Method("mine", changed), toy_data, settings)
    assert len(students_files(settings)) == 2 and not same_run(first, second)
    (bound,) = train_students(Method("mine", partial(changed, weight=3.0)), toy_data, settings)
    assert len(students_files(settings)) == 3 and not same_run(second, bound)


def test_other_data_other_teachers_and_another_combine_train_anew(tiny, toy_data):
    settings, teacher = tiny(seeds=[0]), fake_teacher(toy_data)
    train_students(distilled(teacher), toy_data, settings)
    other = toy_data._replace(checksum="other", part_checksums={**toy_data.part_checksums, "train": "other"})
    train_students(distilled(teacher), other, settings)
    run = dataclasses.replace(teacher.runs[0], fingerprint="fine-tuned otherwise")
    train_students(distilled(dataclasses.replace(teacher, runs=[run])), toy_data, settings)
    train_students(distilled(teacher, combine=partial(class_mean, temperature=4.0)), toy_data, settings)
    assert len(students_files(settings)) == 4


def test_students_take_turns_with_a_teachers_runs(toy_data):
    teacher = fake_teacher(toy_data, seeds=(0, 1))
    assert [teacher.run_for(seed).seed for seed in range(5)] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("rule", ["mean_prob", "mean_logit", "confidence"])
def test_two_teachers_of_one_opinion_are_one_teacher(tiny, toy_data, rule):
    settings, teacher = tiny(seeds=[0]), fake_teacher(toy_data)
    combine = partial(combine_teachers, rule=rule, temperature=4.0)
    (alone,) = train_students(distilled(teacher), toy_data, settings)
    (both,) = train_students(distilled(teacher, teacher, combine=combine), toy_data, settings)
    assert both.teachers == ("resnet50", "resnet50")
    torch.testing.assert_close(both.history["train_loss"], alone.history["train_loss"], rtol=1e-3, atol=1e-4)


def test_a_teacher_of_other_views_is_refused(tiny, toy_data):
    """Its third view is none of the student's: what it says of one would be taken for what it says of another."""
    method = Method("kd", partial(distillation_loss, temperature=4.0, alpha=0.5), (fake_teacher(toy_data),))
    fit_arguments(method, toy_data, tiny(max_shift=0), 0)  # the first two are the same for all
    message = message_of(train_students, method, toy_data, tiny(max_shift=2, shift_step=2))
    assert message.startswith("method kd: resnet50 and the student number different views; use the same max_shift")


@pytest.fixture
def more_data(toy_data):
    """The toy data with 60 images more, whose labels are hidden."""
    again = [Split(toy_data.train.images.flip(-1), toy_data.train.labels), Split(*(x[:20] for x in toy_data.train))]
    images, labels = map(torch.cat, zip(*again))
    return toy_data._replace(unlabelled=Split(images, torch.full_like(labels, -1)), hidden_labels=labels)


def test_images_without_a_label_are_trained_on_by_their_soft_labels(tiny, more_data):
    settings, method = tiny(seeds=[0]), distilled(fake_teacher(more_data), alpha=0.5)
    more = more_data.with_unlabelled
    (alone,), (taught,) = (train_students(method, more_data, settings, train) for train in (None, more))
    assert not same_run(alone, taught) and len(students_files(settings)) == 2
    assert fit_student(method, more_data, settings, 0, more).fingerprint == taught.fingerprint
    (untaught,) = train_students(SCRATCH, more_data, settings, more_data.unlabelled)
    assert untaught.history["train_loss"] == [0.0, 0.0] == untaught.history["train_accuracy"]


def test_an_image_without_a_label_counts_with_its_soft_term_alone(tiny, more_data):
    """At full weight, whatever alpha is; its hidden label plays no part."""
    teacher = fake_teacher(more_data)
    train = more_data.with_unlabelled
    arguments = fit_arguments(distilled(teacher, alpha=0.3), more_data, tiny(), 0, train)
    index, view = torch.tensor([40, 57, 99]), torch.tensor([0, 3, 17])
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    soft = soft_labels(teacher, train.images, 18)[0, index, view].float()
    torch.testing.assert_close(arguments["loss"](logits, index, view), kd_loss(logits, soft, 4.0))
    with_labels = fit_arguments(distilled(teacher, alpha=0.3), more_data, tiny(), 0, more_data.all_labelled)
    assert with_labels["loss"](logits, index, view) != arguments["loss"](logits, index, view)


def test_all_methods_take_the_same_number_of_steps(tiny, more_data, monkeypatch):
    """Of 4 an epoch: an epoch of the 100 images is a sample of 40."""
    made = []
    monkeypatch.setattr(
        "kdutils.training.predict", lambda *given, **named: made.append("epoch") or predict(*given, **named)
    )

    def counted(*given, **named):
        made.append("step")
        return cross_entropy(given[0], given[-1])

    settings = tiny(seeds=[0], unlabelled_epochs=3).for_unlabelled
    images = (None, more_data.with_unlabelled, more_data.all_labelled)
    for train in images:
        arguments = fit_arguments(SCRATCH, more_data, settings, 0, train)
        fit(
            SmallCNN(10),
            **{**arguments, "loss": lambda logits, index, view: counted(logits, arguments["labels"][index])},
        )
        assert made == 3 * [*4 * ["step"], "epoch"]
        made.clear()


def test_students_of_unlabelled_images_have_their_epochs_views_and_keys(tiny, more_data):
    """They learn from the very teacher of the others, whose views begin with theirs."""
    settings = tiny(seeds=[0], epochs=1, unlabelled_epochs=3, unlabelled_views=2)
    method, more = distilled(fake_teacher(more_data)), more_data.with_unlabelled
    arguments = fit_arguments(method, more_data, settings.for_unlabelled, 0, more)
    assert (arguments["num_views"], arguments["recipe"].epochs, arguments["epoch_size"]) == (2, 3, 40)
    found = [
        fit_student(method, more_data, dataclasses.replace(settings, **change).for_unlabelled, 0, train)
        for train in (more, None)
        for change in ({}, {"unlabelled_views": 3}, {"unlabelled_epochs": 2}, {"epochs": 9}, {"unlabelled_size": 3})
    ]
    assert len({one.fingerprint for one in found}) == 6 == len(students_files(settings))
    assert found[0].fingerprint == found[3].fingerprint == found[4].fingerprint
    smaller = more_data._replace(train=more_data.train.at(slice(30)))  # the same images, in shorter epochs
    assert fit_student(method, smaller, settings.for_unlabelled, 0, more).fingerprint not in {
        one.fingerprint for one in found
    }


def test_who_does_not_use_unlabelled_images_does_not_depend_on_them(tiny, toy_data, more_data):
    settings = tiny(seeds=[0])
    (first,) = train_students(SCRATCH, toy_data, settings)
    sums = {**more_data.part_checksums, "unlabelled": "d"}
    (second,) = train_students(SCRATCH, more_data._replace(part_checksums=sums), settings)
    assert first.fingerprint == second.fingerprint and len(students_files(settings)) == 1


def test_a_student_of_unlabelled_images_is_found_and_made_again_the_same(tiny, more_data, tmp_path):
    method, more = distilled(fake_teacher(more_data)), more_data.with_unlabelled
    settings = tiny(seeds=[0], unlabelled_epochs=2).for_unlabelled
    (made,), (loaded,) = (train_students(method, more_data, settings, more) for _ in range(2))
    elsewhere = dataclasses.replace(settings, runs_dir=str(tmp_path / "other"))
    (again,) = train_students(method, more_data, elsewhere, more)
    assert len(students_files(settings)) == len(students_files(elsewhere)) == 1
    assert same_run(made, loaded) and same_run(made, again)
    (long,) = train_students(method, more_data, dataclasses.replace(settings, epochs=4), more)
    assert len(long.history["train_loss"]) == 4 and not same_run(made, long)


def test_class_means_teach_what_a_class_looks_like(tiny, toy_data):
    """The control `class_mean` is a `combine` for one teacher: the same target for all images of a class."""
    method = distilled(fake_teacher(toy_data), alpha=1.0, combine=partial(class_mean, temperature=4.0))
    arguments = fit_arguments(method, toy_data, tiny(seeds=[0]), 0)
    index, logits = torch.arange(40), torch.zeros(40, 10)
    views = [torch.full((40,), view) for view in (0, 5)]
    losses = [arguments["loss"](logits[:10], index[:10], view[:10]) for view in views]
    assert losses[0] == losses[1] == arguments["loss"](logits[:10], index[10:20], views[0][:10])


def test_two_teachers_need_combine_and_combine_needs_teachers(toy_data):
    one, other = fake_teacher(toy_data), fake_teacher(toy_data, "resnet18")
    assert "two or more teachers need `combine`" in message_of(Method, "kd", distillation_loss, (one, other))
    assert "`combine` needs teachers" in message_of(Method, "kd", distillation_loss, (), kd_loss)


@pytest.mark.parametrize("loss, teachers", [
    (distillation_loss, 0), (partial(cross_entropy, label_smoothing=0.1), 1), (partial(kd_loss, temperature=4.0), 1),
    (partial(distillation_loss, temperature=4.0), 1),
])  # fmt: skip
def test_a_loss_that_cannot_be_called_is_refused_at_once(toy_data, loss, teachers):
    message = message_of(Method, "mine", loss, (fake_teacher(toy_data),) * teachers)
    assert message.startswith("method mine: ") and "partial" in message


def test_the_order_in_which_things_are_made_does_not_matter(tiny, toy_data, tmp_path):
    """With a teacher before without or after, seeds in either order, made in one run folder or loaded in it."""
    methods = {"scratch": SCRATCH, "kd": distilled(fake_teacher(toy_data, "resnet18", (0, 1)))}

    def made(folder, steps):
        found = {}
        for name, seeds in steps:
            torch.manual_seed(len(found))
            runs = train_students(methods[name], toy_data, tiny(seeds=seeds, runs_dir=str(tmp_path / folder)))
            found |= {(name, run.seed): run for run in runs}
        return found

    one = made("one", [("scratch", [0, 1]), ("kd", [0, 1])])
    other = made("other", [("kd", [1]), ("scratch", [1, 0]), ("kd", [0])])
    again = made("one", [("kd", [0, 1]), ("scratch", [0, 1])])
    for key, run in one.items():
        for another in (other[key], again[key]):
            assert run.fingerprint == another.fingerprint and same_run(run, another)
            assert all(torch.equal(run.logits[part], another.logits[part]) for part in run.logits)
