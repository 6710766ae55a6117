"""The command line: python -m kdutils run | report | results."""

import argparse
import sys
from collections.abc import Sequence

from kdutils import pipeline
from kdutils.report import REPORT, LatexMissing
from kdutils.settings import Settings, UserError, load_settings, project_path, shown_path

EXAMPLES = """examples:
  python -m kdutils run --profile demo                      the four notebooks on generated images, in minutes
  python -m kdutils run --profile demo -p epochs 3 -p seeds "[0, 1]"
  python -m kdutils run --profile cifar10-standin -p data folder:data/cifar10-jpeg -p weights weights
  python -m kdutils report --profile demo                   typeset what the last run found
  python -m kdutils results --profile demo                  print its table
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (1: something the user can mend, told in one line)."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdutils", description="Knowledge distillation in four notebooks: run them, make the report.",
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, text in (
        ("run", _run, "run the four notebooks through papermill"),
        ("report", _report, "export what the notebooks show, and typeset the PDF"),
        ("results", _results, "print a run's results table"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("--profile", default="cifar10", help="a name in notebooks/profiles, or a .yaml file")
        command.add_argument(
            "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
            help="set a parameter; may be given many times",
        )  # fmt: skip
        if name == "report":
            command.add_argument("--out", metavar="FOLDER", help="where to write (default: the run's folder)")
            command.add_argument("--pdf-only", action="store_true", help="typeset what FOLDER/generated holds")
    return parser


def _parameters(options: argparse.Namespace) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in options.parameter:
        if name in given:
            raise UserError(f"-p {name}: given twice ({given[name]!r} and {value!r}); keep one")
        if name == "profile":
            raise UserError("-p profile: name the profile with --profile")
        given[name] = value
    return given


def _settings(options: argparse.Namespace) -> Settings:
    return load_settings(options.profile, **_parameters(options))


def _run(options: argparse.Namespace) -> None:
    pipeline.run(options.profile, _parameters(options))


def _report(options: argparse.Namespace) -> None:
    out = project_path(options.out) if options.out else None
    if options.pdf_only:
        folder = out or REPORT
        print(f"report: {shown_path(pipeline.typeset(folder / 'generated', folder / 'report.pdf'))}")
        return
    settings = _settings(options)
    out = out or settings.run_folder
    generated = pipeline.export(settings, out)
    print(pipeline.results_frame(settings.run_folder).to_string(index=False))
    try:
        print(f"report: {shown_path(pipeline.typeset(generated, out / 'report.pdf'))}")
    except LatexMissing as error:  # all but the PDF is there, and the message says how to get it
        print(f"report: {error}")


def _results(options: argparse.Namespace) -> None:
    print(pipeline.results_frame(_settings(options).run_folder).to_string(index=False))


if __name__ == "__main__":
    sys.exit(main())
