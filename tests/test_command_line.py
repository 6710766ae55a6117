"""python -m kdutils: help without delay; what is wrong is told in one line on stderr, with exit status 1."""

import json
import shlex
import subprocess
import sys

import pytest

import kdutils
from kdutils.__main__ import COMMANDS, main, parser
from kdutils.lab.export import SUFFIX
from kdutils.report import batch
from kdutils.results.record import record
from kdutils.settings import ROOT, load_settings

SLOW = {"torch", "torchvision", "numpy", "pandas", "matplotlib", "seaborn", "IPython", "papermill", "nbconvert"}


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_version_and_mistakes_import_nothing_slow():
    """All in one fresh interpreter: what any of them imports is found at the end."""
    calls = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["predcit"], ["run", "--epohcs", "3"],
             ["run", "--profile", "demo", "-p", "epohcs", "3"], ["run", "--profile", "demmo"], ["bench", "--out", "x"]]  # fmt: skip
    code = """
import contextlib, io, json, sys
import kdutils, kdutils.__main__
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for call in json.loads(sys.argv[1]):
        with contextlib.suppress(SystemExit):
            assert kdutils.__main__.main(call) == 1
print(json.dumps(sorted(sys.modules)))
"""
    found = python(code, json.dumps(calls))
    assert found.returncode == 0, found.stderr
    assert SLOW & set(json.loads(found.stdout)) == set()


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"kdutils {kdutils.__version__}\n"


def test_every_public_name_is_there_and_none_is_of_the_lab():
    assert set(kdutils.__all__) <= set(dir(kdutils)) and len(kdutils.__all__) >= 20
    for name in kdutils.__all__:
        found = getattr(kdutils, name)
        assert found.__name__ == name and not found.__module__.startswith("kdutils.lab")
    with pytest.raises(AttributeError, match="kdutils.*no_such_name"):
        kdutils.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        from kdutils import no_such_name  # noqa: F401


@pytest.mark.parametrize("command", ["run", "report", "results", "export"])
def test_every_command_checks_its_profile_and_parameters(error_of, command):
    assert "'demmo' does not exist" in error_of([command, "--profile", "demmo"])
    assert "did you mean 'epochs'?" in error_of([command, "--profile", "demo", "-p", "epohcs", "3"])


@pytest.mark.parametrize("arguments", [
    [], ["train"], ["run", "--epochs", "3"], ["run", "-p", "epochs"], ["run", "demo"], ["predict"],
    ["export", "--format", "pickle"],
])  # fmt: skip
def test_an_unknown_command_or_option_is_a_matter_of_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: python -m kdutils" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
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
            parser().parse_args(words)
            assert command in ("", words[0])


def test_every_format_of_a_student_can_be_asked_for():
    for name in SUFFIX:
        assert parser().parse_args(["export", "--format", name]).format == name


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
    assert any(line[:2] == ["kd", "–"] and line[-1] == "+12.50" for line in lines)
    assert ["student,", "scratch", "2", "2:00", "min"] in lines and ["sum", "3", "2:03", "min"] in lines


def test_the_committed_results_need_no_run(capsys, tiny_profile, tmp_path):
    assert main(["results", "--profile", tiny_profile(), "--committed"]) == 0
    assert "Student from scratch" in capsys.readouterr().out and not (tmp_path / "runs").exists()


def test_run_hands_on_what_was_given(monkeypatch, tiny_profile, capsys):
    asked = []

    def run(profile, parameters):
        asked.append((profile, dict(parameters)))
        settings = load_settings(profile, **parameters)
        record(settings, "01_small_cnn", rows(settings), {}, [], {})
        return settings

    monkeypatch.setattr(batch, "run", run)
    profile = tiny_profile()
    assert main(["run", "--profile", profile, "-p", "epochs", "3", "-p", "seeds", "[0, 1]"]) == 0
    assert asked == [(profile, {"epochs": "3", "seeds": "[0, 1]"})]
    assert "Student from scratch" in capsys.readouterr().out


def raising(error):
    def run(profile, parameters):
        raise error

    return run


def test_an_interruption_says_how_to_resume(monkeypatch, capsys):
    monkeypatch.setattr(batch, "run", raising(KeyboardInterrupt()))
    assert main(["run", "--profile", "demo"]) == 130
    assert "repeat the command to resume" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, error_of):
    monkeypatch.setattr(batch, "run", raising(OSError(28, "No space left on device", str(ROOT / "runs" / "x"))))
    assert error_of(["run", "--profile", "demo"]).startswith("error: runs/x: No space left on device; free space or ")


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("no disk"), ModuleNotFoundError("x", name="kdutils.x")])
def test_an_error_of_the_program_is_not_hidden(monkeypatch, error):
    monkeypatch.setattr(batch, "run", raising(error))
    with pytest.raises(type(error)):
        main(["run", "--profile", "demo"])


def test_a_pdf_of_a_profile_is_that_profiles(monkeypatch, tmp_path):
    typeset = []
    monkeypatch.setattr(batch, "typeset", lambda generated, pdf: typeset.append((generated, pdf)) or pdf)
    assert main(["report", "--pdf-only", "--profile", "demo"]) == 0
    assert main(["report", "--pdf-only", "--profile", "demo", "--out", str(tmp_path)]) == 0
    assert typeset == [(folder / "generated", folder / "report.pdf") for folder in (ROOT / "runs" / "demo", tmp_path)]


@pytest.mark.parametrize("package", ["torch", "yaml"])
def test_without_the_environment_one_line_says_how_to_get_it(package):
    code = f"import runpy, sys; sys.modules['{package}'] = None; runpy.run_module('kdutils', run_name='__main__')"
    run = python(code, "results", "--profile", "demo")
    assert run.returncode == 1 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert f"has no {package}; type: . .venv/bin/activate" in run.stderr


def test_relative_paths_are_the_projects_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings("notebooks/profiles/demo.yaml").run_folder == ROOT / "runs" / "demo"
