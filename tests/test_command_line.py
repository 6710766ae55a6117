"""python -m kdutils: what is wrong is told in one line on stderr, with exit status 1, before anything is trained."""

import os
import shlex
import subprocess
import sys

import pytest

from kdutils import pipeline
from kdutils.__main__ import EXAMPLES, _parser, main
from kdutils.runs import record
from kdutils.settings import ROOT, UserError, load_settings


@pytest.mark.parametrize("parameters, fragments", [
    (["temprature", "3"], ["temprature", "did you mean 'temperature'?"]),
    (["temperature", "0"], ["temperature: '0'", "above 0"]),
    (["temperature", "-1"], ["temperature: '-1'", "above 0"]),
    (["temperature", "nan"], ["temperature: 'nan'", "finite"]),
    (["temperature", "hot"], ["temperature: 'hot'", "finite number above 0"]),
    (["alpha", "1.5"], ["alpha: '1.5'", "from 0 to 1"]),
    (["alpha", "-0.1"], ["alpha: '-0.1'", "from 0 to 1"]),
    (["seeds", "[]"], ["seeds: '[]'", "one or more different whole numbers"]),
    (["seeds", "[0, 0]"], ["seeds: '[0, 0]'", "different"]),
    (["seeds", "abc"], ["seeds: 'abc'", "[0, 1, 2]"]),
    (["epochs", "many"], ["epochs: 'many'", "a whole number"]),
    (["epochs", ""], ["epochs: ''", "a whole number"]),
    (["shift_step", "2"], ["shift_step: 2", "max_shift = 1"]),
    (["batch_size", "41"], ["batch_size", "train_size = 40"]),
    (["train_size", "100000"], ["shapes10", "12000"]),
    (["test_size", "100000"], ["shapes10", "10000"]),
    (["data", "mnist"], ["data: 'mnist'", "folder:PATH"]),
    (["data", "folder:no/such/place"], ["data: ", "no/such/place/train"]),
    (["data_name", "CIFAR-10"], ["data_name: 'CIFAR-10'"]),
    (["weights", "no/such/place"], ["weights: ", "no/such/place"]),
    (["device", "abacus"], ["device: 'abacus'", "'cpu'"]),
    (["epochs", "1", "-p", "epochs", "2"], ["epochs: given twice ('1' and '2')", "keep one"]),
    (["epochs", "1", "-p", "epochs", "1"], ["epochs: given twice"]),
    (["profile", "demo"], ["--profile"]),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_trained(error_of, tmp_path, tiny_profile, parameters, fragments):
    message = error_of(["run", "--profile", tiny_profile(), "-p", *parameters])
    assert all(fragment in message for fragment in fragments), message
    assert not list((tmp_path / "runs").rglob("*"))


@pytest.mark.parametrize("command", ["run", "report", "results", "export"])
def test_every_command_checks_its_profile_and_parameters(error_of, command):
    assert "there is no 'demmo'" in error_of([command, "--profile", "demmo"])
    assert "did you mean 'epochs'?" in error_of([command, "--profile", "demo", "-p", "epohcs", "3"])


@pytest.mark.parametrize("command", ["report", "results"])
def test_without_a_run_there_is_nothing_to_show(error_of, tiny_profile, tmp_path, command):
    message = error_of([command, "--profile", tiny_profile()])
    assert "results.csv" in message and "run the notebooks first" in message
    assert not (tmp_path / "runs").exists()


def test_there_is_nothing_to_typeset_in_an_empty_folder(error_of, tmp_path):
    message = error_of(["report", "--pdf-only", "--out", str(tmp_path)])
    assert str(tmp_path / "generated") in message and "make report" in message


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
    better = [{**row, "task": "4", "arm": "kd", "value": f"{float(row['value']) + 0.125:.6f}"} for row in rows(settings)]
    times = [("student, scratch, seed 0", 61.0), ("student, scratch, seed 1", 59.5), ("features", 3.0)]
    record(settings, "01_small_cnn", rows(settings) + better, {"data": toy_data.facts}, times, {})
    assert main(["results", "--profile", tiny_profile()]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "`" not in out and "toy: 40 training" in " ".join(out.split())
    lines = [line.split() for line in out.splitlines()]
    assert ["1", "Student", "from", "scratch", "–", "37.50", "±", "17.68", "2", "0.375", "0.375"] in lines
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


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def run(profile, parameters):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(ZeroDivisionError):
        main(["run", "--profile", "demo"])


def test_it_works_from_any_folder(tmp_path):
    """As a process of its own: the profile is found, the error is one line, and there is no traceback."""
    result = subprocess.run(
        [sys.executable, "-m", "kdutils", "run", "--profile", "demo", "-p", "alpha", "7"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: alpha: '7'") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_relative_paths_are_the_projects_wherever_one_stands(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    assert load_settings("notebooks/profiles/demo.yaml").run_folder == ROOT / "runs" / "demo"
    (tmp_path / "weights-here").mkdir()
    with pytest.raises(UserError, match="there is no folder weights-here"):
        tiny(weights="weights-here")
