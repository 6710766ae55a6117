"""The whole path, tiny: four notebooks through papermill, run again, changed, broken, reported."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest

from kdutils.__main__ import main
from kdutils.report import batch as pipeline
from kdutils.report import latex as report
from kdutils.results.tables import RESULT_COLUMNS, of_the_tasks, read_results
from kdutils.settings import PROFILES, ROOT, UserError, load_settings, read_profile

TINY = {
    "train_size": 100, "val_size": 50, "test_size": 100, "max_shift": 0, "shift_step": 1, "seeds": [0, 1],
    "epochs": 2, "batch_size": 20, "teacher_size": 32, "teacher_seeds": [0, 1], "teacher_batch_size": 20,
    "resnet50_epochs": 1, "resnet18_epochs": 1, "generated_images": 100, "generated_epochs": 1,
}  # fmt: skip
STUDENTS = {
    ("1", "scratch", ""), ("3", "kd", "resnet50"), ("3", "kd", "resnet18"),
    *(("4", f"kd_{rule}", "resnet50+resnet18") for rule in ("mean_prob", "mean_logit", "confidence")),
}  # fmt: skip
TEACHERS = {("2", "last_layer", "resnet50"), ("2", "last_block", "resnet18")}


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return {**TINY, "runs_dir": str(tmp_path_factory.mktemp("runs"))}


@pytest.fixture(scope="module")
def settings(parameters):
    return pipeline.run("demo", parameters)


def cached_results(settings):
    return {path: path.stat().st_mtime_ns for path in settings.run_folder.rglob("*.safetensors")}


def test_results_hold_every_arm_and_seed(settings):
    results = pd.read_csv(settings.run_folder / "results.csv", keep_default_na=False, dtype={"task": str})
    assert tuple(results.columns) == RESULT_COLUMNS
    accuracy = results[(results.metric == "accuracy") & (results.split == "test")]
    assert set(accuracy[["task", "arm", "teachers"]].itertuples(index=False, name=None)) == STUDENTS | TEACHERS
    assert (accuracy.groupby(["task", "arm", "teachers"]).seed.apply(list).map(sorted) == [[0, 1]] * 8).all()
    assert results.loc[results.metric == "accuracy", "value"].between(0, 1).all()
    assert not results.duplicated(list(RESULT_COLUMNS[:-1])).any()
    assert set(results.labels) == {100}


def test_executed_notebooks_are_complete_and_clean(settings):
    for name in pipeline.NOTEBOOKS:
        notebook = nbformat.read(settings.run_folder / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            for output in cell.get("outputs", []):
                assert output.output_type != "error"
                assert "\x1b" not in output.get("text", "")
                assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_running_again_changes_nothing(settings, parameters):
    folder = settings.run_folder
    before, results = cached_results(settings), (folder / "results.csv").read_bytes()
    pipeline.run("demo", parameters)
    assert cached_results(settings) == before
    assert (folder / "results.csv").read_bytes() == results


def test_a_notebook_alone_recomputes_only_what_depends_on_the_parameter(settings, tmp_path):
    mine = tmp_path / "runs"
    shutil.copytree(settings.run_folder.parent, mine, copy_function=shutil.copy2)
    copied = load_settings("demo", **TINY, runs_dir=str(mine))
    before = cached_results(copied)
    given = [word for name, value in {**TINY, "temperature": 2, "runs_dir": mine}.items()
             for word in ("-p", name, str(value))]  # fmt: skip
    subprocess.run(
        [sys.executable, "-m", "papermill", "03_one_teacher.ipynb", str(tmp_path / "out.ipynb"), "-k", "python3",
         "-p", "profile", "demo", *given],
        cwd=ROOT / "notebooks", check=True, capture_output=True,
    )  # fmt: skip
    after = cached_results(copied)
    assert before.items() <= after.items()
    new = {path.name.split("-")[0] + "-" + path.name.split("-")[1] for path in after.keys() - before.keys()}
    assert new == {"kd-resnet50", "kd-resnet18"}
    # the other notebooks' rows were made at another temperature
    arms = set(pd.read_csv(copied.run_folder / "results.csv").arm)
    assert arms == {"kd"}


def test_the_report_is_built(settings, parameters, tmp_path, monkeypatch):
    if shutil.which("latexmk") is None:
        pytest.skip("latexmk is not installed")
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    assert main(["report", "--profile", "demo", *words, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    for name in ("macros.tex", "results.csv", "provenance.json", "timings.csv"):
        assert (tmp_path / "generated" / name).is_file()
    if shutil.which("pdftotext"):
        page = subprocess.run(
            ["pdftotext", "-l", "1", str(tmp_path / "report.pdf"), "-"], capture_output=True, text=True, check=True
        ).stdout
        assert "Generated data, demonstration" in " ".join(page.split())
        assert "Stand-in weights" in " ".join(page.split())
    macros = tmp_path / "generated" / "macros.tex"
    text = macros.read_text(encoding="utf-8")
    macros.write_text("of an earlier version", encoding="utf-8")
    assert main(["report", "--pdf-only", "--out", str(tmp_path)]) == 0
    assert macros.read_text(encoding="utf-8") == text


def test_a_report_of_other_settings_is_refused(settings, parameters, tmp_path):
    other = load_settings("demo", **{**parameters, "alpha": 0.25})
    with pytest.raises(UserError, match="last run with other settings"):
        pipeline.export(other, tmp_path)


def test_the_study_shows_its_arms(settings, parameters, monkeypatch):
    monkeypatch.setattr(pipeline, "NOTEBOOKS", ())
    studied = pipeline.run("demo", {**parameters, "study": ["controls", "memory", "self", "losses"]})
    results = pd.read_csv(studied.run_folder / "results.csv", keep_default_na=False, dtype={"task": str})
    arms = {
        "no_label_smoothing": "1",
        "kd_shuffled": "3",
        "kd_out_of_fold": "3",
        "kd_self": "3",
        "kd_tuned": "3",
        "dkd": "3",
        "dist": "3",
        "kd_standardized": "3",
    }
    assert dict(results[["arm", "task"]].itertuples(index=False, name=None)) == arms
    notebook = nbformat.read(studied.run_folder / "notebooks" / "study.ipynb", as_version=4)
    about = [output.get("metadata", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [one["kdutils"]["name"] for one in about if "kdutils" in one] == ["comparison-study", "gain-self"]


def test_a_failing_notebook_stops_the_run_and_is_named(tmp_path, monkeypatch):
    """The failure: the first notebook's training diverges at an absurd learning rate."""
    monkeypatch.setattr(pipeline, "NOTEBOOKS", pipeline.NOTEBOOKS[:1])
    bad = {**TINY, "runs_dir": str(tmp_path), "learning_rate": 1e30, "weight_decay": 0.0, "optimizer": "sgd"}
    with pytest.raises(
        UserError, match=r"01_small_cnn stopped in cell \d+: scratch, seed 0: .* lower the learning rate"
    ):
        pipeline.run("demo", bad)
    assert (tmp_path / "demo" / "notebooks" / "01_small_cnn.ipynb").is_file()


def test_an_unknown_parameter_stops_papermill_before_anything_is_trained(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / "01_small_cnn.ipynb"), str(tmp_path / "out.ipynb"),
         "-k", "python3", "-p", "profile", "demo", "-p", "runs_dir", str(tmp_path), "-p", "epoch", "3"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no setting 'epoch'; did you mean 'epochs'?" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_profiles_differ_only_where_they_must():
    given, standin = read_profile("cifar10"), read_profile("cifar10-standin")
    assert {"data", "weights"} <= {name for name in standin if standin[name] != given.get(name)}
    assert set(given) <= set(standin)
    assert {path.stem for path in PROFILES.glob("*.yaml")} == {"demo", "cifar10", "cifar10-standin"}


def test_the_readmes_pictures_are_those_of_the_committed_notebooks(tmp_path):
    """Each is there and is the figure of its name; a screenshot alone is no figure."""
    shutil.copy(ROOT / "README.md", tmp_path)
    shown = set(re.findall(r"docs/pictures/[a-z0-9-]+\.png", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert shown == {f"docs/pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}
    report.update_pictures(tmp_path / "README.md", sorted((report.REPORT / "notebooks").glob("*.ipynb")))
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("docs/pictures/*")}
    assert shown - made <= {"docs/pictures/jupyterlab.png"} and len(made) >= 4
    for picture in made:
        assert (tmp_path / picture).read_bytes() == (ROOT / picture).read_bytes(), picture


def test_the_committed_report_matches_its_rows():
    """README's table, the macros and the prose's numbers all come from the committed results.csv."""
    generated = report.REPORT / "generated"
    results, readme = read_results(generated), (ROOT / "README.md").read_text(encoding="utf-8")
    of_tasks = of_the_tasks(results, json.loads((generated / "provenance.json").read_text())["settings"]["epochs"])
    assert of_tasks.groupby(["arm", "teachers"]).ngroups == 8
    for rows in (results, of_tasks):
        assert report.markdown_table(report.results_table(rows)) in readme
