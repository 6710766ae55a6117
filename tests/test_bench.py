"""kdutils.bench and kdutils.reference: both do the same work, and every number gets where it belongs. No time is
asserted."""

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
from kdutils.lab import bench, performance
from kdutils.lab import tutorial as reference
from kdutils.models import SmallCNN, seeded
from kdutils.settings import load_settings

FIELDS = {
    "key", "name", "ours_s", "reference_s", "speedup", "limit_s", "of_limit", "device", "peak_mb", "steps", "spread",
    "note",
}  # fmt: skip
RACED = ["student_ce", "student_kd", "resnet50_fit", "resnet18_fit", "resnet50_forward", "resnet18_forward"]
SHARED = ["student_kd_shared", "resnet50_fit_shared", "resnet18_fit_shared"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Tiny, with data that is not there."""
    folder = tmp_path_factory.mktemp("bench")
    given = {"runs_dir": str(folder / "runs"), "weights": "imagenet", "data": f"folder:{folder / 'nowhere'}"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **given}))
    return load_settings(str(folder / "tiny.yaml"))


@pytest.fixture(scope="module")
def found(settings):
    """A quick benchmark's findings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "QUICK", bench.QUICK._replace(image_counts=(20, 60), held_out=20))
        return bench.run(settings, quick=True)


def test_the_reference_imports_nothing_from_this_project():
    imported = set()
    for node in ast.walk(ast.parse(Path(reference.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
    assert {name.partition(".")[0] for name in imported} == {
        "os", "random", "sys", "collections", "numpy", "torch", "PIL", "torchvision",
    }  # fmt: skip


@pytest.mark.parametrize("max_shift, shift_step", [(0, 1), (1, 1), (3, 3), (4, 4)])
def test_the_reference_draws_the_very_views_all_about_equally_often(max_shift, shift_step):
    image = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    viewed = make_views(image, max_shift, shift_step)
    number = len(viewed.table)
    views = view_pixels(viewed, torch.zeros(number, dtype=torch.int64), torch.arange(number))
    ours = {view.contiguous().numpy().tobytes() for view in views}
    assert len(ours) == number
    augmented = reference.transform(max_shift, shift_step)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reference.MEAN, reference.STD))
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    random.seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [((augmented(picture) * std + mean) * 255).round().to(torch.uint8) for _ in range(100 * number)]
    counts = Counter(view.contiguous().numpy().tobytes() for view in drawn)
    assert set(counts) == ours
    assert all(50 < count < 160 for count in counts.values())  # five standard deviations about 100


def test_the_reference_is_the_same_student():
    ours, plain = seeded(0, SmallCNN), reference.Student()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), plain(x), atol=1e-6)


def test_what_is_frozen_stays_as_it_is_in_the_reference():
    generator = torch.Generator().manual_seed(0)
    model = bench.random_resnet("resnet18", torch.randn(8, 3, 32, 32, generator=generator))
    tuned = reference.freeze_for_fine_tuning(reference.resnet("resnet18", model), "last_block")
    batch = torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)
    how = {"optimizer": "adamw", "schedule": "constant", "learning_rate": 0.01, "weight_decay": 0.01}
    reference.train(tuned, [batch], lambda *given: reference.cross_entropy_loss(*given, 0.0), "cpu", epochs=1, **how)
    changed = {name for name, tensor in tuned.state_dict().items() if not torch.equal(tensor, model[name])}
    assert {name.partition(".")[0] for name in changed} == {"layer4", "fc"}
    assert any("running_mean" in name for name in changed)


def test_a_quick_benchmark_measures_every_row(found, settings):
    path = Path(settings.runs_dir) / "bench" / "bench.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert [p.name for p in Path(settings.runs_dir).iterdir()] == ["bench"]  # everything else was temporary
    rows = {row["key"]: row for row in found["rows"]}
    assert sorted(rows) == sorted([*RACED, *SHARED, "seeds"])
    for key, row in rows.items():
        assert FIELDS <= row.keys() and row["device"] == "cpu" and row["ours_s"] > 0
        assert row["spread"]["ours"][0] <= row["ours_s"] <= row["spread"]["ours"][1]
        if key != "seeds":
            assert row["speedup"] == pytest.approx(row["reference_s"] / row["ours_s"])
        if key in RACED:
            assert row["of_limit"] == pytest.approx(row["limit_s"] / row["ours_s"])
            assert all(1 <= row["steps"][name] <= row["whole"][name] for name in row["steps"])
    for key in SHARED:
        assert rows[key]["ours_s"] > rows[key.removesuffix("_shared")]["ours_s"]


def test_both_compute_the_same(found):
    names = [check["name"] for check in found["checks"]]
    assert len(names) == 4 and {"student, cross-entropy", "student, distillation"} < set(names)
    for check in found["checks"]:
        assert check["ours"] == pytest.approx(
            check["reference"], rel=1e-4 if check["name"] == "student, cross-entropy" else 5e-3
        )
    accuracy = found["accuracy"]
    assert len(accuracy["ours"]) == len(accuracy["reference"]) > 0
    assert all(0 <= value <= 1 for value in accuracy["ours"] + accuracy["reference"])


def test_a_reference_that_computes_something_else_is_refused(settings, tmp_path, monkeypatch):
    plan = bench.QUICK._replace(held_out=20)
    plain = reference.cross_entropy_loss
    monkeypatch.setattr(reference, "cross_entropy_loss", lambda *given, **named: 1.01 * plain(*given, **named))
    message = message_of(bench.check_first_steps, bench._prepare(settings, plan, tmp_path))
    assert message.startswith("bench: ResNet-50, last layer: our first loss is ")


def test_a_race_scales_what_it_timed_in_part(monkeypatch):
    monkeypatch.setattr(bench, "_seconds", lambda work, device: work())
    sides = {
        "ours": bench.Side(10, lambda steps: lambda: 0.1 * steps),  # an epoch within the two seconds
        "reference": bench.Side(10, lambda steps: lambda: 0.5 * steps),  # four steps are
        "limit": bench.Side(100, lambda steps: lambda: 0.025 * steps),  # no more steps than the plan's
    }
    row = {}
    plan = bench.FULL._replace(repetitions=3, seconds=2.0)
    assert len(list(bench.race(row, lambda: sides, plan, "cpu"))) == 4
    assert row["steps"] == {"ours": 10, "reference": 4, "limit": 20}
    assert (row["ours_s"], row["reference_s"], row["limit_s"]) == pytest.approx((1.0, 5.0, 2.5))
    assert (row["speedup"], row["of_limit"]) == pytest.approx((5.0, 2.5))
    assert row["times"]["reference"] == pytest.approx([5.0] * 3)


def test_a_growth_is_the_slope_of_a_line():
    found = {}
    works = {size: (lambda size=size: 3.0 + 2.0 * size) for size in (1, 5, 20)}
    assert len(list(bench.growth(found, works, 2, "s each"))) == 3
    assert found["slope_s"] == pytest.approx(2.0) and found["slope_spread"] == pytest.approx([2.0, 2.0])
    assert found["seconds"]["5"] == pytest.approx([13.0] * 3)


def test_the_whole_is_read_from_the_last_run_under_the_same_conditions(tmp_path, tiny):
    keys = [
        "student_ce",
        "student_kd",
        *(f"{a}_{what}" for a in ("resnet50", "resnet18") for what in ("forward", "fit")),
    ]
    rows = [{"key": key, "ours_s": seconds} for key, seconds in zip(keys, (1, 2, 100, 10, 50, 5), strict=True)]
    settings = tiny(
        seeds=[0, 1], epochs=3, teacher_seeds=[0], teacher_views=2, resnet50_epochs=4, resnet18_epochs=6,
        train_size=40, val_size=10, test_size=10,
    )  # fmt: skip
    added_up = performance.end_to_end(tmp_path, settings, rows)
    assert added_up["seconds"] == pytest.approx(2 * 3 * (1 + 5 * 2) + 2.5 * (100 + 50) + 4 * 10 + 6 * 5)
    assert "added up from the rows" in added_up["source"]
    about = {"device": "cpu", "precision": "float32", "threads": torch.get_num_threads()}
    (tmp_path / "provenance.json").write_text(json.dumps(about))
    (tmp_path / "timings.csv").write_text(
        'stage,seconds\n"student, scratch, seed 0",5.0\nresnet50: features of every view,100.0\n'
        '"resnet50: fine-tuning, seed 0",90.0\n"resnet50: fine-tuning, seed 1",2.0\n'
    )
    whole = performance.end_to_end(tmp_path, settings, rows)
    assert whole["seconds"] == pytest.approx(5 + 100 + 2) and "4 stages of the last run" in whole["source"]
    assert performance.end_to_end(tmp_path, tiny(precision="bfloat16"), rows)["source"] != whole["source"]
    (tmp_path / "provenance.json").write_text(json.dumps(about | {"threads": about["threads"] + 1}))
    assert performance.end_to_end(tmp_path, settings, rows) == added_up


def test_the_page_shows_every_row_and_target_and_keeps_the_notes(found, tmp_path):
    page = tmp_path / "docs" / "performance.md"
    performance.write_page(found, page)
    first = page.read_text()
    for row in found["rows"]:
        assert f"| {row['name']} |" in first
    assert "no CUDA machine was at hand" in first and found["machine"]["cpu"] in first and "added up" in first
    assert len(performance.TARGETS) == sum("at least" in line or "at most" in line for line in first.splitlines())
    page.write_text(first.replace(performance.NOTES[0], f"{performance.NOTES[0]}\n- torch.compile: slower"))
    performance.write_page(found, page)
    assert page.read_text().count("- torch.compile: slower") == 1
    again = page.read_text()
    assert performance.write_page(found, page).read_text() == again
    page.write_text(again.replace(performance.NOTES[1], ""))
    assert "must hold" in message_of(performance.write_page, found, page)


def test_a_gpu_fills_the_other_column(found):
    on_gpu = {**found, "machine": {**found["machine"], "device": "cuda", "gpu": "a GPU"}}
    text = performance.performance_page(on_gpu, "")
    line = next(line for line in text.splitlines() if line.startswith("| Student epoch over the bare step"))
    cells = line.strip("| ").split(" | ")
    assert cells[2] == "open" and cells[4].rpartition(", ")[2] in ("met", "missed")
    assert "The CPU column is open" in text


def test_the_command(settings, found, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(bench, "run", lambda settings, quick: given.append((settings, quick)) or found)
    monkeypatch.setattr(performance, "PAGE", tmp_path / "performance.md")
    profile = tmp_path / "tiny.yaml"
    profile.write_text(yaml.safe_dump({**TINY, "weights": "no/such/folder"}))
    assert main(["bench", "--profile", str(profile), "-p", "epochs", "3", "--quick"]) == 0
    assert given[0][1] is True and given[0][0].epochs == 3 and not (tmp_path / "performance.md").exists()
    assert main(["bench", "--profile", str(profile), "--page"]) == 0
    assert given[1][1] is False and (tmp_path / "performance.md").is_file()
