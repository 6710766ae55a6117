"""python -m kdutils: what is wrong is told in one line on stderr, with exit status 1, before anything is trained."""

import shlex
import subprocess
import sys

import pytest

from kdutils.__main__ import EXAMPLES, _parser, main
from kdutils.report import batch as pipeline
from kdutils.results.tables import record
from kdutils.settings import ROOT, UserError, load_settings


@pytest.mark.parametrize("command", ["run", "report", "results", "export"])
def test_every_command_checks_its_profile_and_parameters(error_of, command):
    assert "there is no 'demmo'" in error_of([command, "--profile", "demmo"])
    assert "did you mean 'epochs'?" in error_of([command, "--profile", "demo", "-p", "epohcs", "3"])


@pytest.mark.parametrize("arguments", [
    [], ["train"], ["run", "--epochs", "3"], ["run", "-p", "epochs"], ["run", "demo"], ["predict"],
    ["export", "--format", "pickle"],
    ["pretrain", "x", "--epochs", "1"], ["pretrain", "x", "--arch", "resnet18"],
    ["pretrain", "x", "--epochs", "1", "--arch", "vgg16"],
])  # fmt: skip
def test_an_unknown_command_or_option_is_a_matter_of_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m kdutils" in capsys.readouterr().err


@pytest.mark.parametrize("command", list(EXAMPLES))
def test_help_teaches_by_examples_that_are_right(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([*filter(None, [command]), "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out.replace("\\\n", " ").replace("COMMAND --help", "")
    examples = [line.split("   ")[0] for line in shown.splitlines() if line.startswith("  python -m kdutils ")]
    assert examples
    for example in examples:
        words = shlex.split(example.partition(" > ")[0], comments=True)[3:]
        if words:
            _parser().parse_args(words)
            assert command in ("", words[0])


def rows(settings):
    fixed = {"task": "1", "arm": "scratch", "teachers": "", "labels": 40, "epochs": 2}
    return [{**fixed, "seed": seed, "split": part, "metric": metric, "value": f"{0.25 + seed / 4:.6f}"}
            for seed in settings.seeds for part in ("train", "val", "test")
            for metric in ("accuracy", "nll", "ece")]  # fmt: skip


def test_results_prints_the_tables_of_a_run(capsys, tiny_profile, toy_data):
    settings = load_settings(tiny_profile())
    better = [
        {**row, "task": "4", "arm": "kd", "value": f"{float(row['value']) + 0.125:.6f}"} for row in rows(settings)
    ]
    times = [("student, scratch, seed 0", 61.0), ("student, scratch, seed 1", 59.5), ("features", 3.0)]
    record(settings, "01_small_cnn", rows(settings) + better, {"data": toy_data.facts}, times, {})
    assert main(["results", "--profile", tiny_profile()]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "`" not in out and "toy: 40 training" in " ".join(out.split())
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "Student", "from", "scratch", "–", "37.50", "±", "17.68", "2", "0.375", "37.5"] in lines
    assert ["kd", "–", "+12.50", "+12.50", "to", "+12.50"] in lines
    assert ["student,", "scratch", "2", "2:00", "min"] in lines and ["total", "3", "2:03", "min"] in lines


def test_the_committed_results_need_no_run(capsys, tiny_profile, tmp_path):
    assert main(["results", "--profile", tiny_profile(), "--committed"]) == 0
    assert "Student from scratch" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_run_hands_on_what_was_given(monkeypatch, tiny_profile):
    asked = []

    def run(profile, parameters):
        asked.append((profile, dict(parameters)))
        settings = load_settings(profile, **parameters)
        record(settings, "01_small_cnn", rows(settings), {}, [], {})
        return settings

    monkeypatch.setattr(pipeline, "run", run)
    profile = tiny_profile()
    assert main(["run", "--profile", profile, "-p", "epochs", "3", "-p", "seeds", "[0, 1]"]) == 0
    assert asked == [(profile, {"epochs": "3", "seeds": "[0, 1]"})]


def test_stopping_says_that_nothing_is_lost(monkeypatch, capsys):
    def run(profile, parameters):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", run)
    assert main(["run", "--profile", "demo"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_pdf_of_a_profile_is_that_profiles(monkeypatch, tmp_path):
    typeset = []
    monkeypatch.setattr(pipeline, "typeset", lambda generated, pdf: typeset.append((generated, pdf)) or pdf)
    assert main(["report", "--pdf-only", "--profile", "demo"]) == 0
    assert main(["report", "--pdf-only", "--profile", "demo", "--out", str(tmp_path)]) == 0
    assert typeset == [(folder / "generated", folder / "report.pdf") for folder in (ROOT / "runs" / "demo", tmp_path)]


def test_without_the_environment_one_line_says_how_to_get_it():
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('kdutils', run_name='__main__')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "has no torch; type: . .venv/bin/activate" in run.stderr


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def run(profile, parameters):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["run", "--profile", "demo"])


def test_relative_paths_are_the_projects_wherever_one_stands(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    assert load_settings("notebooks/profiles/demo.yaml").run_folder == ROOT / "runs" / "demo"
    (tmp_path / "weights-here").mkdir()
    with pytest.raises(UserError, match="there is no folder weights-here"):
        tiny(weights="weights-here")
