"""kdutils.lab.bench and kdutils.lab.tutorial: both ways compute the same, and every time gets where it belongs. No
test asserts a time."""

import ast
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, message_of
from PIL import Image

from kdutils.__main__ import main
from kdutils.data.views import make_views, view_pixels
from kdutils.lab import bench, performance, tutorial
from kdutils.models import SmallCNN
from kdutils.settings import load_settings
from kdutils.students import fit_arguments
from kdutils.teachers import FineTuning
from kdutils.weights import seeded

RACED = ["student_ce", "student_kd", "resnet50_fit", "resnet50_forward", "resnet18_fit", "resnet18_forward"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Tiny, with data that is not there."""
    folder = tmp_path_factory.mktemp("bench")
    given = {"runs_dir": str(folder / "runs"), "weights": "imagenet", "data": f"folder:{folder / 'nowhere'}"}
    given["teachers"] = ["tf_efficientnet_lite2", {"name": "tf_efficientnet_lite0", "standardize": True, "size": 64}]
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **given}))
    return load_settings(str(folder / "tiny.yaml"))


@pytest.fixture(scope="module")
def found(settings):
    """A quick benchmark's findings."""
    return bench.run(settings, quick=True)


def test_the_tutorial_imports_nothing_from_this_project():
    nodes = list(ast.walk(ast.parse(Path(tutorial.__file__).read_text())))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {"." * node.level + node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {"os", "random", "sys", "collections", "numpy", "torch", "PIL", "torchvision"}
    assert {name.partition(".")[0] for name in imported} == allowed


@pytest.mark.parametrize("max_shift, shift_step", [(0, 1), (1, 1), (3, 3)])
def test_the_tutorial_draws_our_views_all_about_equally_often(max_shift, shift_step):
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    viewed = make_views(image, max_shift, shift_step)
    number = len(viewed.table)
    views = view_pixels(viewed, torch.zeros(number, dtype=torch.int64), torch.arange(number))
    ours = {view.contiguous().numpy().tobytes() for view in views}
    assert len(ours) == number
    augmented = tutorial.transform(max_shift, shift_step)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tutorial.MEAN, tutorial.STD))
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [((augmented(picture) * std + mean) * 255).round().to(torch.uint8) for _ in range(100 * number)]
    counts = Counter(view.contiguous().numpy().tobytes() for view in drawn)
    assert set(counts) == ours
    assert all(50 < count < 160 for count in counts.values())  # five standard deviations about 100


@pytest.fixture(scope="module")
def work(settings, tmp_path_factory):
    return bench.prepare(settings, bench.QUICK, tmp_path_factory.mktemp("work"))


def same_batch(work, arguments, images):
    """The batch that `fit` begins with, as the tutorial's transform makes it of the same pixels."""
    index, view = bench._first_batch(arguments)
    pixels = view_pixels(make_views(images, **work.settings.views), index, view).permute(0, 2, 3, 1).numpy()
    as_it_is = tutorial.transform(augment=False)
    return index, view, torch.stack([as_it_is(Image.fromarray(picture)) for picture in pixels])


@pytest.mark.parametrize("name", ["scratch", "kd"])
def test_the_students_first_step_has_the_tutorials_loss(work, name):
    method, data = work.method(name, 20), work.dataset(20)
    arguments = fit_arguments(method, data, work.settings, seed=0)
    index, view, x = same_batch(work, arguments, data.train.images)
    model, plain = seeded(0, SmallCNN), tutorial.Student()
    plain.load_state_dict(model.state_dict())
    ours = arguments["loss"](model(arguments["inputs"](index, view)), index, view)
    # the tutorial's teachers say of these images what ours are recorded to say
    teachers = [lambda _, soft=teacher.soft_labels: soft[index, view].float() for teacher in method.teachers]
    how = {"teachers": teachers} if teachers else {}
    theirs = work.plain_loss(name)(plain, x, data.train.labels[index], **how)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


@pytest.mark.parametrize("arch", ["resnet50", "resnet18"])
def test_a_teachers_first_step_has_the_tutorials_loss(work, arch):
    data = work.dataset(20)
    tuning = FineTuning(arch, data, work.settings)
    trained, arguments = tuning.cut(0)[1], tuning.fit_arguments(seed=0)
    index, view, x = same_batch(work, arguments, data.train.images)
    plain = tutorial.resnet(arch, work.states[arch] | trained.state_dict())
    for part in tutorial.freeze_for_fine_tuning(plain, tuning.trainable).children():
        part.train(any(parameter.requires_grad for parameter in part.parameters()))
    ours = arguments["loss"](trained.train()(arguments["inputs"](index, view)), index, view)
    theirs = work.plain_loss("teacher")(plain, x, data.train.labels[index])
    assert ours.item() == pytest.approx(theirs.item(), rel=5e-3)  # features are kept in float16


def test_what_is_frozen_stays_as_it_is_in_the_tutorial(work):
    state = work.states["resnet18"]
    tuned = tutorial.freeze_for_fine_tuning(tutorial.resnet("resnet18", state), "last_block")
    batch = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    how = {"optimizer": "adamw", "schedule": "constant", "learning_rate": 0.01, "weight_decay": 0.01}
    tutorial.train(tuned, [batch], lambda *given: tutorial.cross_entropy_loss(*given, 0.0), "cpu", epochs=1, **how)
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, state[name])}
    assert {name.partition(".")[0] for name in changed} == {"layer4", "fc"}
    assert any("running_mean" in name for name in changed)


def test_a_quick_benchmark_measures_every_row(found, settings):
    path = Path(settings.runs_dir) / "bench" / "bench.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert [p.name for p in Path(settings.runs_dir).iterdir()] == ["bench"]  # everything else was temporary
    rows = {row["key"]: row for row in found["rows"]}
    assert list(rows) == [*RACED, "seeds", "notebooks"]
    for key in RACED:
        seconds, steps = rows[key]["seconds"], rows[key]["steps"]
        assert {"ours", "tutorial", "limit"} <= seconds.keys() == steps.keys()
        assert all(0 < least <= median <= most for median, least, most in seconds.values())
        assert all(1 <= timed <= whole for timed, whole in steps.values())
    assert rows["notebooks"]["seconds"].keys() == {"ours", "tutorial"}


def test_a_race_scales_what_it_timed_in_part(monkeypatch):
    monkeypatch.setattr(bench, "_seconds", lambda work, device: work())
    sides = {
        "ours": bench.Side(10, lambda steps: lambda: 0.1 * steps),  # an epoch within the two seconds
        "tutorial": bench.Side(10, lambda steps: lambda: 0.5 * steps),  # four steps are
        "limit": bench.Side(100, lambda steps: lambda: 0.025 * steps),  # no more steps than the plan's
    }
    row = bench.race(sides, bench.FULL._replace(repetitions=3, seconds=2.0), "cpu")
    assert row["steps"] == {"ours": [10, 10], "tutorial": [4, 10], "limit": [20, 100]}
    assert [row["seconds"][side][0] for side in sides] == pytest.approx([1.0, 5.0, 2.5])
    assert row["times"]["tutorial"] == pytest.approx([5.0] * 3)
    assert performance.ratio_of(row, "limit") == pytest.approx(0.4)


def test_the_notebooks_are_added_up(tiny):
    settings = tiny(
        **{"seeds": [0, 1], "epochs": 3, "teacher_seeds": [0, 1]},
        teachers=[{"name": "resnet50", "epochs": 4}, {"name": "resnet18", "epochs": 6}],
        **{"train_size": 40, "val_size": 10, "test_size": 10, "max_shift": 0},
    )
    medians = {
        "student_ce": {"ours": 1, "tutorial": 2},
        "student_kd": {"ours": 3, "tutorial": 20},
        "resnet50_fit": {"ours": 10, "tutorial": 100},
        "resnet50_forward": {"ours": 8, "tutorial": 9, "frozen": 7},
        "resnet18_fit": {"ours": 5, "tutorial": 50},
        "resnet18_forward": {"ours": 4, "tutorial": 5, "frozen": 2},
    }
    total = bench.notebooks_seconds(settings, medians)
    # students; fine-tunings; passes over two views and half as many images to score
    assert total["ours"] == pytest.approx(6 * (1 + 5 * 3) + 2 * (4 * 10 + 6 * 5) + 2.5 * (7 + 2 * 1 + 2 + 2 * 2))
    assert total["tutorial"] == pytest.approx(6 * (2 * 2 + 4 * 20) + 2 * (4 * 100 + 6 * 50) + 0.5 * 2 * (9 + 5))


def test_the_page_shows_every_row_and_keeps_the_notes(found, tmp_path):
    page = tmp_path / "docs" / "performance.md"
    performance.write_page(found, page)
    first = page.read_text()
    assert all(f"| {row['name']} " in first for row in found["rows"]) and found["machine"]["processor"] in first
    page.write_text(first.replace(performance.NOTES[0], f"{performance.NOTES[0]}\n- torch.compile: slower"))
    again = performance.write_page(found, page).read_text()
    assert again.count("- torch.compile: slower") == 1
    assert performance.write_page(found, page).read_text() == again
    page.write_text(again.replace(performance.NOTES[1], ""))
    message = message_of(performance.write_page, found, page)
    assert message.startswith(f"{page}: ") and performance.NOTES[1] in message


def test_the_command(found, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(bench, "run", lambda settings, quick: given.append((settings, quick)) or found)
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    profile = tmp_path / "tiny.yaml"
    profile.write_text(yaml.safe_dump({**TINY, "weights": "no/such/folder"}))  # none are needed
    assert main(["bench", "--profile", str(profile), "-p", "epochs", "3", "--quick"]) == 0
    assert given[0][1] is True and given[0][0].epochs == 3 and not (tmp_path / "performance.md").exists()
    assert main(["bench", "--profile", str(profile), "--page"]) == 0
    assert given[1][1] is False and (tmp_path / "performance.md").is_file()
