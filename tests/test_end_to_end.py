"""The whole path, tiny: four notebooks through papermill, run again, changed, broken, reported."""

import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from kdutils.__main__ import main
from kdutils.report import batch
from kdutils.report.latex import REPORT, write_macros
from kdutils.results.record import RESULT_COLUMNS, read_provenance, read_results, results_checksum
from kdutils.results.tables import of_the_tasks, outcome
from kdutils.settings import ROOT, UserError, load_settings, read_profile

TINY = {
    "train_size": 100, "val_size": 50, "test_size": 100, "unlabelled_size": 60, "max_shift": 0, "shift_step": 1,
    "seeds": [0, 1], "epochs": 2, "unlabelled_epochs": 3, "batch_size": 20, "teacher_size": 32, "teacher_seeds": [0, 1],
    "teacher_batch_size": 20, "teacher_epochs": 1,
}  # fmt: skip
A, B = "tf_efficientnet_lite2", "tf_efficientnet_lite0"
ARMS = {  # but for the student of the better teacher with unlabelled images
    ("1", "scratch", "", 2), ("2", "last_layer", A, 1), ("2", "last_layer", B, 1), ("3", "kd", A, 2), ("3", "kd", B, 2),
    ("3", "scratch_equal_steps", "", 3), ("3", "scratch_all_labels", "", 3), ("4", "ensemble", f"{A}+{B}", 0),
    *(("4", f"kd_{rule}", f"{A}+{B}", 2) for rule in ("mean_prob", "mean_logit", "confidence")),
    ("4", "kd_mean_prob_unlabelled", f"{A}+{B}", 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    return {**TINY, "runs_dir": str(tmp_path_factory.mktemp("runs"))}


@pytest.fixture(scope="module")
def settings(parameters):
    return batch.run("demo", parameters)


def cached_results(settings):
    return {path: path.stat().st_mtime_ns for path in settings.run_folder.rglob("*.safetensors")}


def test_results_hold_every_arm_and_seed(settings):
    results = read_results(settings.run_folder)
    assert tuple(results.columns) == RESULT_COLUMNS
    accuracy = results[(results.metric == "accuracy") & (results.split == "test")]
    names = ["task", "arm", "teachers", "epochs"]
    better = read_provenance(settings.run_folder)["better_teacher"]
    expected = ARMS | {("3", "kd_unlabelled", better, 3)}
    assert set(accuracy[names].itertuples(index=False, name=None)) == expected
    assert (accuracy.groupby(names).seed.apply(list).map(sorted) == [[0, 1]] * len(expected)).all()
    assert of_the_tasks(results, settings.epochs).equals(results)
    assert results.loc[results.metric == "accuracy", "value"].between(0, 1).all()
    assert not results.duplicated(list(RESULT_COLUMNS[:-1])).any()
    assert set(results[results.arm != "scratch_all_labels"].labels) == {100}
    assert set(results[results.arm == "scratch_all_labels"].labels) == {160}


def test_executed_notebooks_are_complete_and_clean(settings):
    for name in batch.NOTEBOOKS:
        notebook = nbformat.read(settings.run_folder / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            assert output.output_type != "error" and "\x1b" not in output.get("text", "")
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_running_again_changes_nothing(settings, parameters, monkeypatch):
    """With the two notebooks that between them need all that is cached."""
    monkeypatch.setattr(batch, "NOTEBOOKS", ("02_two_big_cnns", "04_two_teachers"))
    folder = settings.run_folder
    before, results = cached_results(settings), (folder / "results.csv").read_bytes()
    batch.run("demo", parameters)
    assert cached_results(settings) == before
    assert (folder / "results.csv").read_bytes() == results


def papermill(notebook, out, parameters, cwd=ROOT):
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", str(notebook), str(out), "-k", "python3", "-p", "profile", "demo"]
    return subprocess.run([*command, *given], cwd=cwd, capture_output=True, text=True)


def test_a_notebook_alone_recomputes_only_what_depends_on_the_parameter(settings, tmp_path):
    mine = tmp_path / "runs"
    shutil.copytree(settings.run_folder.parent, mine, copy_function=shutil.copy2)
    copied = load_settings("demo", **TINY, runs_dir=str(mine))
    before = cached_results(copied)
    given = TINY | {"temperature": 2, "runs_dir": mine}
    done = papermill("03_one_teacher.ipynb", tmp_path / "out.ipynb", given, ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    after = cached_results(copied)
    assert before.items() <= after.items()
    new = {"-".join(path.name.split("-")[:2]) for path in after.keys() - before.keys()}
    better = read_provenance(copied.run_folder)["better_teacher"]
    assert new == {f"kd-{A}", f"kd-{B}", f"kd_unlabelled-{better}"}
    # the other notebooks' rows were made at another temperature
    arms = {"kd", "kd_unlabelled", "scratch_equal_steps", "scratch_all_labels"}
    assert set(read_results(copied.run_folder).arm) == arms


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_the_report_is_built(settings, parameters, tmp_path, capsys):
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    assert main(["report", "--profile", "demo", *words, "--out", str(tmp_path)]) == 0
    *_, said = capsys.readouterr().out.partition("\n\n")
    found = outcome(read_results(settings.run_folder), read_provenance(settings.run_folder))
    assert said == "\n".join([*found, f"report: {tmp_path / 'report.pdf'}", ""])
    assert found[1].startswith("From scratch ") and "with 60 unlabelled images: " in found[1]
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    for name in ("macros.tex", "results.csv", "provenance.json", "timings.csv"):
        assert (tmp_path / "generated" / name).is_file()
    if shutil.which("pdftotext"):
        page = subprocess.check_output(["pdftotext", "-l", "1", str(tmp_path / "report.pdf"), "-"], text=True)
        for notice in (
            "Generated data, demonstration",
            "Fewer than three seeds",
            *["it cannot teach it"] * bool(found[2:]),
        ):
            assert notice in " ".join(page.split())
    macros = tmp_path / "generated" / "macros.tex"
    text = macros.read_text(encoding="utf-8")
    macros.write_text("of an earlier version", encoding="utf-8")
    assert main(["report", "--pdf-only", "--out", str(tmp_path)]) == 0
    assert macros.read_text(encoding="utf-8") == text


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_a_report_without_unlabelled_images_is_built(settings, tmp_path):
    """Made of the run's own: its rows and tables of students with unlabelled images are taken away."""
    generated = batch.export(settings, tmp_path)
    results, provenance = read_results(generated), read_provenance(generated)
    results = results[~results.arm.str.contains("unlabelled|equal_steps|all_labels")]
    results.to_csv(generated / "results.csv", index=False)
    provenance["data"]["unlabelled"] = 0
    (generated / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    for path in generated.glob("0*.tex"):
        path.write_text(path.read_text(encoding="utf-8").replace("{comparison-unlabelled", "{gone"), encoding="utf-8")
    assert batch.typeset(generated, tmp_path / "report.pdf").is_file()


def test_a_report_of_other_settings_is_refused(settings, parameters, tmp_path):
    other = load_settings("demo", **{**parameters, "alpha": 0.25})
    with pytest.raises(UserError, match="last run with other settings"):
        batch.export(other, tmp_path)


def test_the_study_shows_its_arms(settings, parameters, monkeypatch):
    monkeypatch.setattr(batch, "NOTEBOOKS", ())
    studied = batch.run("demo", {**parameters, "study": ["controls", "losses"]})
    found = dict(read_results(studied.run_folder)[["arm", "task"]].itertuples(index=False, name=None))
    expected = {
        "no_label_smoothing": "1",
        "kd_class_mean": "3",
        "dkd": "3",
        "dist": "3",
        "kd_standardized": "3",
    }
    assert found.items() >= expected.items()
    notebook = nbformat.read(studied.run_folder / "notebooks" / "study.ipynb", as_version=4)
    about = [output.get("metadata", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [one["kdutils"]["name"] for one in about if "kdutils" in one] == ["comparison-study"]


def test_a_failing_notebook_stops_the_run_and_is_named(tmp_path, monkeypatch):
    """The failure: the first notebook's training diverges at an absurd learning rate."""
    monkeypatch.setattr(batch, "NOTEBOOKS", batch.NOTEBOOKS[:1])
    bad = {**TINY, "runs_dir": str(tmp_path), "learning_rate": 1e30, "weight_decay": 0.0, "optimizer": "sgd"}
    with pytest.raises(UserError, match=r"01_small_cnn stopped in cell \d+: scratch, seed 0: .* lower the learning"):
        batch.run("demo", bad)
    assert (tmp_path / "demo" / "notebooks" / "01_small_cnn.ipynb").is_file()


def test_an_unknown_parameter_stops_papermill_before_anything_is_trained(tmp_path):
    done = papermill("notebooks/01_small_cnn.ipynb", tmp_path / "out.ipynb", {"runs_dir": tmp_path, "epoch": 3})
    assert done.returncode != 0
    assert "there is no setting 'epoch'; did you mean 'epochs'?" in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_profiles_differ_only_where_they_must():
    given, lite = read_profile("cifar10"), read_profile("cifar10-lite")
    assert {"data", "teachers"} <= {name for name in lite if lite[name] != given.get(name)}
    assert set(given) <= set(lite)


def test_the_committed_report_and_readme_match_their_rows(tmp_path):
    """README's tables and pictures, and the prose's numbers, all come from the committed rows and notebooks."""
    generated, readme = REPORT / "generated", tmp_path / "README.md"
    shutil.copy(ROOT / "README.md", readme)
    batch.renew_readme(readme, generated, sorted((REPORT / "notebooks").glob("*.ipynb")))
    text = readme.read_text(encoding="utf-8")
    assert text == (ROOT / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"docs/pictures/[a-z0-9-]+\.png", text))
    assert shown == {f"docs/pictures/{path.name}" for path in (ROOT / "docs" / "pictures").iterdir()}
    made = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("docs/pictures/*")}
    assert shown - made <= {"docs/pictures/jupyterlab.png"} and len(made) >= 2  # a screenshot is no figure
    for picture in made:
        assert (tmp_path / picture).read_bytes() == (ROOT / picture).read_bytes(), picture
    results, provenance = read_results(generated), json.loads((generated / "provenance.json").read_text())
    assert provenance["results"] == results_checksum((generated / "results.csv").read_text(encoding="utf-8"))
    assert of_the_tasks(results, provenance["settings"]["epochs"]).groupby(["arm", "teachers"]).ngroups == len(ARMS) + 1
    write_macros(batch.macros(results, provenance), tmp_path)
    assert (tmp_path / "macros.tex").read_bytes() == (generated / "macros.tex").read_bytes()
