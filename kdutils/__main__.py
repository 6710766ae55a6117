"""The command line: `python -m kdutils COMMAND`. Each command is a function here; `--help` lists them.

Nothing slow is imported here: every command imports what it needs, so that `--help` answers at once.
"""

import argparse
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdutils import __version__

ACTIVATE = f"{sys.executable} has no %s; type: . .venv/bin/activate (make setup makes that environment)"
try:
    from kdutils import settings as parameters
    from kdutils.settings import Settings, UserError, checked, load_settings, project_path, shown_path
except ModuleNotFoundError as error:
    sys.exit(f"error: {ACTIVATE % error.name}")

ABOUT = """Knowledge distillation in four notebooks: run them, make the report.

python -m kdutils run --profile demo                 the four notebooks on generated images, in minutes
python -m kdutils results --profile demo             their results
python -m kdutils predict --profile demo cat.png     the class of a picture, by a student of theirs
python -m kdutils COMMAND --help                     more of each command"""


Option = tuple[tuple[str, ...], dict[str, Any]]
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], None], tuple[Option, ...]]] = {}


def option(*names: str, **how: Any) -> Option:
    """An option or argument of a command: what `add_argument` takes."""
    return names, how


def command(*options: Option) -> Callable:
    """Make the decorated function a command: its name and, as help and examples, its docstring are the command's."""

    def register(function: Callable[[argparse.Namespace], None]) -> Callable:
        COMMANDS[function.__name__] = function, options
        return function

    return register


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""

    def taught_by(text: str) -> dict[str, Any]:
        about, _, examples = inspect.cleandoc(text).partition("\n\n")
        layout = argparse.RawDescriptionHelpFormatter
        return {
            "description": about,
            "epilog": "examples:\n" + textwrap.indent(examples, "  "),
            "formatter_class": layout,
        }

    whole = argparse.ArgumentParser(prog="python -m kdutils", **taught_by(ABOUT))
    whole.add_argument("--version", action="version", version=f"kdutils {__version__}")
    commands = whole.add_subparsers(required=True, metavar="command")
    for name, (function, options) in COMMANDS.items():
        text = taught_by(function.__doc__ or "")
        one = commands.add_parser(name, help=text["description"], **text)
        one.set_defaults(function=function)
        for names, how in options:
            one.add_argument(*names, **how)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (1: something the user can correct, told in one line)."""
    options = parser().parse_args(arguments)
    try:
        options.function(options)
        return 0
    except KeyboardInterrupt:
        print("interrupted; finished results are kept: repeat the command to resume", file=sys.stderr)
        return 130
    except UserError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        message = ACTIVATE % error.name
    except OSError as error:
        from kdutils.cache import disk_error

        if (reason := disk_error(error)) is None:
            raise
        where = f"{shown_path(error.filename)}: " if error.filename else ""
        remedy = "free space or choose another folder (runs_dir, --out)"
        message = f"{where}{reason}; {remedy}; finished results are kept: repeat the command to resume"
    print(f"error: {message}", file=sys.stderr)
    return 1


PROFILE = (
    option("--profile", default="cifar10", help="a name in notebooks/profiles, or a .yaml file (default: cifar10)"),
    option("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
           help="set a parameter; repeat it for more"),
)  # fmt: skip
WORKERS = (
    option("--workers", metavar="N", help="processes that share the cores (default: 1, which uses all of them)"),
    option("--scheduler", metavar="ADDRESS", help="address of a Dask cluster that shares the run folder"),
)
STUDENT = (
    option("--arm", default="kd_mean_prob", help="method of the student (default: %(default)s)"),
    option("--teachers", metavar="A+B", help="its teachers, where several students differ in them: Lite2+Lite0"),
    option("--seed", type=int, help="its seed (default: the lowest)"),
)
REPORT_FOLDER = option("--out", metavar="FOLDER", help="where the report goes (default: the run's folder)")


def _parameters(options: argparse.Namespace) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in options.parameter:
        if name in given:
            raise UserError(f"-p {name}: given twice ({given[name]!r} and {value!r}); keep one")
        if name == "profile":
            raise UserError("-p profile: the profile is not a parameter; use --profile")
        given[name] = value
    parameters.check_names(given)
    return given


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings(options.profile, **_parameters(options))


def _folder(given: str | None, default: Path) -> Path:
    return project_path(given) if given else default


def _workers(options: argparse.Namespace) -> int:
    if options.workers and options.scheduler:
        raise UserError("--workers: the cluster at --scheduler has its own; leave one of the two out")
    return checked("threads", options.workers or 1, "--workers")


@command(*PROFILE, option("--report", action="store_true", help="make the report, too"), REPORT_FOLDER)
def run(options: argparse.Namespace) -> None:
    """Run the four notebooks through papermill

    python -m kdutils run --profile demo
    python -m kdutils run --profile demo -p epochs 3 -p seeds "[0, 1]"
    python -m kdutils run --profile cifar10-lite --report
    """
    if options.out and not options.report:
        raise UserError("--out: it names the folder of the report, but no report is made; add --report")
    settings = _settings(options)
    from kdutils.lab.study import check_groups
    from kdutils.report import batch

    check_groups(settings)
    settings = batch.run(options.profile, _parameters(options))
    if options.report:
        _make_report(settings, options)
    else:
        _print_outcome(settings)


@command(*PROFILE, REPORT_FOLDER, option("--pdf-only", action="store_true", help="typeset what FOLDER/generated holds"))
def report(options: argparse.Namespace) -> None:
    """Export what the notebooks show, and typeset the PDF

    python -m kdutils report --profile demo              typeset the results of the last run: runs/demo/report.pdf
    python -m kdutils report --pdf-only --out report     typeset report/generated again
    """
    if not options.pdf_only:
        _make_report(_settings(options), options)
        return
    folder = project_path(options.out) if options.out else _settings(options).run_folder
    from kdutils.report import batch

    print(f"report: {shown_path(batch.typeset(folder / 'generated', folder / 'report.pdf'))}")


def _make_report(settings: Settings, options: argparse.Namespace) -> None:
    from kdutils.report import batch
    from kdutils.report.latex import LatexMissing

    out = _folder(options.out, settings.run_folder)
    generated = batch.export(settings, out)
    try:
        where = shown_path(batch.typeset(generated, out / "report.pdf"))
    except LatexMissing as error:  # all but the PDF is there, and the message says how to get it
        where = str(error)
    _print_outcome(settings)
    print(f"report: {where}")


def _print_outcome(settings: Settings) -> None:
    """The table of results, and under it what came out, in words."""
    from kdutils.results.record import read_provenance, read_results
    from kdutils.results.tables import outcome, results_table, text_table

    found = read_results(settings.run_folder), read_provenance(settings.run_folder)
    print(text_table(results_table(found[0])), "\n".join(outcome(*found)), sep="\n\n")


@command(*PROFILE, option("--committed", action="store_true", help="of the report in this repository instead"))
def results(options: argparse.Namespace) -> None:
    """Print the tables of a run

    python -m kdutils results --profile demo             the tables of runs/demo
    python -m kdutils results --committed                those of the report in this repository
    """
    folder = _settings(options).run_folder
    from kdutils.report import batch
    from kdutils.report.latex import REPORT

    print(batch.shown_tables(REPORT / "generated" if options.committed else folder))


@command(
    *PROFILE,
    *STUDENT,
    option("images", nargs="+", type=Path, metavar="IMAGE", help="an image file of any size"),
    option("--top", type=int, default=3, metavar="N", help="how many classes to show (default: 3)"),
    option("--json", action="store_true", help="all probabilities, for programs"),
)
def predict(options: argparse.Namespace) -> None:
    """Classify pictures with a trained student

    python -m kdutils predict --profile demo cat.png dog.jpg
    python -m kdutils predict --profile demo --arm kd --teachers tf_efficientnet_lite0 --seed 1 *.png
    python -m kdutils predict --profile demo --json cat.png > cat.json
    """
    if options.top < 1:
        raise UserError(f"--top: {options.top} is not valid; use a whole number, 1 or more")
    folder = _settings(options).run_folder
    from kdutils.lab import predict as lab

    student = lab.find_student(folder, options.arm, options.teachers, options.seed)
    probabilities = lab.classify(lab.load_student(student), lab.read_pictures(options.images))
    if options.json:
        found = [
            {"image": str(path), "probabilities": dict(zip(student.classes, row))}
            for path, row in zip(options.images, probabilities.tolist())
        ]
        print(json.dumps({"student": student.words, "predictions": found}, indent=1))
        return
    print(student.words)
    for path, row in zip(options.images, probabilities):
        print(path, *lab.prediction_lines(row, student.classes, options.top), sep="\n  ")


@command(
    *PROFILE,
    *STUDENT,
    option("--format", choices=("onnx", "torchscript"), default="onnx", help="default: %(default)s"),
    option("--out", metavar="FOLDER", help="where to write (default: export in the run's folder)"),
)
def export(options: argparse.Namespace) -> None:
    """Write a trained student as ONNX or TorchScript, and check it

    python -m kdutils export --profile demo              writes into runs/demo/export
    python -m kdutils export --profile demo --format torchscript --arm scratch --out models

    A file takes pixels, uint8 [N, 3, 32, 32] (RGB, 0 to 255), and gives logits, float32 [N, classes]. Its metadata hold
    "classes", a JSON list of names (ONNX: the model's properties; TorchScript: the extra file metadata.json).
    """
    folder = _settings(options).run_folder
    from kdutils.lab.export import SUFFIX, export_student
    from kdutils.lab.predict import find_student, load_student

    student = find_student(folder, options.arm, options.teachers, options.seed)
    path = _folder(options.out, folder / "export") / f"{student.name}{SUFFIX[options.format]}"
    about = {
        "classes": json.dumps(student.classes), "student": student.words, "fingerprint": student.fingerprint,
        "input": "pixels: uint8 [N, 3, 32, 32], RGB, 0 to 255", "output": "logits: float32 [N, classes]",
    }  # fmt: skip
    difference = export_student(load_student(student), about, options.format, path)
    print(f"{shown_path(path)}: {student.words}")
    print(f"takes {about['input']}; gives {about['output']}")
    print(f"checked: on random pictures its logits are within {difference:.1g} of the student's")


@command(
    *PROFILE,
    option("file", nargs="?", metavar="FILE", help="what to try: a .yaml file, as in report/sweeps"),
    option("--grid", action="append", default=[], metavar="NAME=V1,V2,...",
           help="in place of FILE; repeat it to try all combinations. Besides settings: teachers (Lite0, or "
                "Lite2+Lite0), rule (how two are combined), seeds"),
    option("--what", help="with --grid: kd (the default), scratch, or teacher"),
    option("--out", metavar="FOLDER", help="where to write (default: beside FILE, or the run's sweeps)"),
    *WORKERS,
)  # fmt: skip
def sweep(options: argparse.Namespace) -> None:
    """Try out settings on validation images

    python -m kdutils sweep report/sweeps/cifar10-lite/lite0-size.yaml --profile cifar10-lite
    python -m kdutils sweep --profile demo --grid temperature=1,4 --grid alpha=0.5,0.9 --workers 2
    """
    if bool(options.file) == bool(options.grid):
        raise UserError("sweep: give either FILE or --grid NAME=V1,V2,... (one or more)")
    if options.file and options.what:
        raise UserError("--what: FILE says what to try; leave one of the two out")
    workers, settings = _workers(options), _settings(options)
    from kdutils.lab import sweeps
    from kdutils.results.sweeps import read_sweep, sweep_table

    if options.file:
        path = project_path(options.file)
        plan, folder = read_sweep(path), path.parent
    else:
        plan = sweeps.grid_sweep(options.what or "kd", options.grid, settings.seeds, settings.teachers[-1].label)
        folder = settings.run_folder / "sweeps"
    out = _folder(options.out, folder) / f"{plan.name}.csv"
    frame = sweeps.run_sweep(plan, options.profile, _parameters(options), out, workers, options.scheduler)
    print(sweep_table(frame).to_string(index=False))
    print(f"rows: {shown_path(out)}")


@command(*PROFILE, *WORKERS)
def study(options: argparse.Namespace) -> None:
    """Train the study's students: controls, other losses, longer training

    python -m kdutils study --profile cifar10-lite -p study '["controls", "losses"]' --workers 2

    Afterwards, `python -m kdutils run` with the same -p study shows the results (--report: in the report, too).
    """
    workers, settings = _workers(options), _settings(options)
    from kdutils.lab.study import check_groups, entries_of, run_study

    check_groups(settings)
    run_study(options.profile, _parameters(options), workers, options.scheduler)
    print(f"trained: {', '.join(entries_of(settings))}; in {shown_path(settings.run_folder)}")


@command(
    *PROFILE,
    option("--quick", action="store_true", help="only see whether it works: few, small timings"),
    option("--page", action="store_true", help="write docs/performance.md, too"),
)
def bench(options: argparse.Namespace) -> None:
    """Measure the speed against the plain way and against the bare step; about ten minutes

    python -m kdutils bench --profile demo --quick       only see whether it works
    python -m kdutils bench --page                       ten minutes; writes docs/performance.md
    """
    settings = _settings(options)
    from kdutils.lab import bench as lab
    from kdutils.lab import performance

    if options.page:
        performance.read_notes(performance.PAGE)  # a page without its marks is told before the measurements
    found = lab.run(settings, quick=options.quick)
    if options.page:
        print(f"page: {shown_path(performance.write_page(found, performance.PAGE))}")


@command(
    option("address", metavar="ADDRESS", help="such as https://github.com/OWNER/REPO"),
    option("--ref", default=f"v{__version__}", help="tag, branch or commit that Colab opens (default: %(default)s)"),
)
def stamp(options: argparse.Namespace) -> None:
    """Write the repository's address into the Colab badges and set-up cells

    python -m kdutils stamp https://github.com/OWNER/REPO --ref main

    The ref must hold the stamped notebooks: with the default, a tag of this version, stamp, commit, tag and push.
    """
    from kdutils.report import readme

    changed = readme.stamp(options.address, options.ref)
    print(f"{options.address} at {options.ref}: {len(changed)} files changed", *map(shown_path, changed), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
