"""What the demo shows: teachers that know something, and a student that learns it from unlabelled images."""

import pytest

from kdutils.data.images import load_data
from kdutils.results.metrics import accuracy
from kdutils.settings import load_settings
from kdutils.students import named_method, train_students
from kdutils.teachers import fine_tune

# one seed, one view, fewer images: a smaller run of the demo's path
SMALLER = {
    "seeds": [0], "teacher_seeds": [0], "teacher_views": 1, "unlabelled_views": 1, "unlabelled_size": 2000,
    "val_size": 300, "test_size": 800,
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    settings = load_settings("demo", **SMALLER, runs_dir=str(tmp_path_factory.mktemp("runs")))
    dataset, longer = load_data(settings), settings.for_unlabelled
    teachers = [fine_tune(teacher, dataset, settings) for teacher in settings.teachers]
    from_both = named_method("kd", longer, teachers)
    students = {
        "scratch": train_students(named_method("scratch", settings), dataset, settings),
        "equal steps": train_students(named_method("scratch", settings), dataset, settings.for_equal_steps),
        "unlabelled": train_students(from_both, dataset, longer, train=dataset.with_unlabelled),
    }
    runs = {teacher.label: teacher.runs for teacher in teachers} | students
    return {name: 100 * accuracy(run.logits["test"], dataset.test.labels) for name, (run,) in runs.items()}


def test_both_teachers_are_ten_points_above_the_best_student_from_scratch(found):
    best = max(found["scratch"], found["equal steps"])
    assert min(found["tf_efficientnet_lite2"], found["tf_efficientnet_lite0"]) >= best + 10


def test_unlabelled_images_raise_the_student_of_both_by_eight_points_in_equal_steps(found):
    assert found["unlabelled"] >= found["equal steps"] + 8
