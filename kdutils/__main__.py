"""The command line: python -m kdutils COMMAND, each a function here; `--help` lists them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError as error:  # most often the environment that `make setup` made is not the active one
    sys.exit(
        f"error: {sys.executable} has no {error.name}; type: . .venv/bin/activate (make setup makes that environment)"
    )

from kdutils import __version__
from kdutils.cache import disk_error
from kdutils.lab.export import SUFFIX, export_student
from kdutils.lab.predict import classify, find_student, load_student, prediction_lines, read_pictures
from kdutils.lab.study import entries_of, run_study
from kdutils.lab.sweeps import grid_sweep, run_sweep
from kdutils.models import pretraining_facts, read_header
from kdutils.pretraining import Pretraining, default_recipe, pretrain_on_folder
from kdutils.report import batch as pipeline
from kdutils.report.latex import REPORT, LatexMissing
from kdutils.report.readme import PLACEHOLDER, stamp
from kdutils.results.sweeps import read_sweep, sweep_table
from kdutils.results.tables import text_table
from kdutils.settings import (
    ARCHITECTURES,
    Settings,
    UserError,
    checked,
    load_settings,
    pick_device,
    pick_precision,
    project_path,
    shown_path,
)

EXAMPLES = {
    "": """
  python -m kdutils run --profile demo                 the four notebooks on generated images, in minutes
  python -m kdutils results --profile demo             what they found
  python -m kdutils predict --profile demo cat.png     what a student of theirs takes a picture for
  python -m kdutils COMMAND --help                     more of each command""",
    "run": """
  python -m kdutils run --profile demo
  python -m kdutils run --profile demo -p epochs 3 -p seeds "[0, 1]"
  python -m kdutils run --profile cifar10-standin -p data folder:data/cifar10-jpeg -p weights weights --report""",
    "report": """
  python -m kdutils report --profile demo              typeset what the last run found: runs/demo/report.pdf
  python -m kdutils report --pdf-only --out report     typeset report/generated again""",
    "results": """
  python -m kdutils results --profile demo             the tables of runs/demo
  python -m kdutils results --committed                those of the report in this repository""",
    "predict": """
  python -m kdutils predict --profile demo cat.png dog.jpg
  python -m kdutils predict --profile demo --arm kd --teachers resnet18 --seed 1 *.png
  python -m kdutils predict --profile demo --json cat.png > cat.json""",
    "export": """
  python -m kdutils export --profile demo              runs/demo/export/kd_mean_prob-resnet50-resnet18-seed0.onnx
  python -m kdutils export --profile demo --format torchscript --arm scratch --out models

A file takes pixels, uint8 [N, 3, 32, 32] (RGB, 0 to 255), and gives logits, float32 [N, classes]. Its metadata hold
"classes", a JSON list of names (ONNX: the model's properties; TorchScript: the extra file metadata.json).""",
    "sweep": """
  python -m kdutils sweep report/sweeps/cifar10-standin/resnet18-size.yaml --profile cifar10-standin
  python -m kdutils sweep --profile demo --grid temperature=1,4 --grid alpha=0.5,0.9 --workers 2""",
    "study": """
  python -m kdutils study --profile cifar10-standin -p study '["controls", "losses"]' --workers 2

Afterwards, `python -m kdutils run` with the same -p study shows what was trained (--report: in the report, too).""",
    "bench": """
  python -m kdutils bench --profile demo --quick       only see whether it works
  python -m kdutils bench --page                       ten minutes; writes docs/performance.md""",
    "pretrain": """
  python -m kdutils pretrain data/tiny-imagenet-40 --arch resnet18 --epochs 20     makes weights/resnet18.safetensors
  python -m kdutils pretrain data/tiny-imagenet-40 --arch resnet18 --epochs 10 --init weights/resnet18.safetensors \\
      --out weights/more""",
    "stamp": """
  python -m kdutils stamp https://github.com/OWNER/REPO --ref main

The ref must hold the stamped notebooks: with the default, a tag of this version, stamp, commit, tag and push.""",
}
PROFILE_HELP = "a name in notebooks/profiles, or a .yaml file (default: %(default)s)"
SPELT = {"teacher_size": "--size", "split_seed": "--seed"}  # options of `pretrain` that are checked as settings


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
    except OSError as error:
        if (reason := disk_error(error)) is None:
            raise
        where = f"{shown_path(error.filename)}: " if error.filename else ""
        print(f"error: {where}{reason}; free space, or give another folder (runs_dir, --out); what was finished is "
              "kept, and the same command goes on from there", file=sys.stderr)  # fmt: skip
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kdutils", description="Knowledge distillation in four notebooks: run them, make the report.",
        **_by_example(""),
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, function, text in (
        ("run", _run, "run the four notebooks through papermill"),
        ("report", _report, "export what the notebooks show, and typeset the PDF"),
        ("results", _results, "print the tables of a run"),
        ("predict", _predict, "classify pictures with a trained student"),
        ("export", _export, "write a trained student as ONNX or TorchScript, and check it"),
        ("sweep", _sweep, "try out settings on validation images"),
        ("study", _study, "train the study's arms: controls, other losses, other budgets"),
        ("bench", _bench, "measure the speed against the plain way and against the bare step; about ten minutes"),
    ):
        command = commands.add_parser(name, help=text, description=text, **_by_example(name))
        command.set_defaults(command=function)
        command.add_argument("--profile", default="cifar10", help=PROFILE_HELP)
        command.add_argument(
            "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
            help="set a parameter; may be given many times",
        )  # fmt: skip
        if name == "sweep":
            _add_sweep(command)
        if name in ("sweep", "study"):
            text = "processes that share the cores (default: 1, with all of them)"
            command.add_argument("--workers", metavar="N", help=text)
            command.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask cluster that shares the run folder")
        if name == "bench":
            command.add_argument("--quick", action="store_true", help="only see whether it works: few, small timings")
            command.add_argument("--page", action="store_true", help="write docs/performance.md, too")
        if name in ("predict", "export"):
            command.add_argument("--arm", default="kd_mean_prob", help="how it was trained (default: %(default)s)")
            command.add_argument("--teachers", metavar="A+B", help="by whom, if by several: resnet50+resnet18")
            command.add_argument("--seed", type=int, help="which of its seeds (default: the lowest)")
        if name == "predict":
            command.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a file of any size and mode")
            command.add_argument("--top", type=int, default=3, metavar="N", help="show so many classes (default: 3)")
            command.add_argument("--json", action="store_true", help="all probabilities, for programs")
        if name == "export":
            command.add_argument("--format", choices=SUFFIX, default="onnx", help="default: %(default)s")
            command.add_argument("--out", metavar="FOLDER", help="where to write (default: export in the run's folder)")
        if name == "results":
            command.add_argument("--committed", action="store_true", help="of the report in this repository instead")
        if name == "run":
            command.add_argument("--report", action="store_true", help="make the report, too")
        if name in ("run", "report"):
            command.add_argument("--out", metavar="FOLDER", help="where the report goes (default: the run's folder)")
        if name == "report":
            command.add_argument("--pdf-only", action="store_true", help="typeset what FOLDER/generated holds")
    _add_pretrain(commands)
    text = "write the repository's address into the Colab badges and set-up cells"
    command = commands.add_parser("stamp", help=text, description=text, **_by_example("stamp"))
    command.set_defaults(command=_stamp)
    command.add_argument("address", metavar="ADDRESS", help=f"such as {PLACEHOLDER}")
    what = "tag, branch or commit that Colab opens and fetches (default: %(default)s)"
    command.add_argument("--ref", default=f"v{__version__}", help=what)
    return parser


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", nargs="?", metavar="FILE", help="what to try: a .yaml file, as in report/sweeps")
    command.add_argument(
        "--grid", action="append", default=[], metavar="NAME=V1,V2,...",
        help="in place of FILE; may be given many times: all combinations are tried. Besides settings: teachers "
        "(resnet18, resnet50, resnet50+resnet18), rule (how two are combined), seeds",
    )  # fmt: skip
    command.add_argument("--what", help="with --grid: kd (the default), scratch, resnet18 or resnet50")
    command.add_argument("--out", metavar="FOLDER", help="where to write (default: beside FILE, or the run's sweeps)")


def _by_example(name: str) -> dict[str, Any]:
    return {"epilog": f"examples:{EXAMPLES[name]}", "formatter_class": argparse.RawDescriptionHelpFormatter}


def _add_pretrain(commands: argparse._SubParsersAction) -> None:
    text = "pre-train a ResNet on an image folder, for where ImageNet's weights cannot be had"
    command = commands.add_parser("pretrain", help=text, description=text, **_by_example("pretrain"))
    command.set_defaults(command=_pretrain)
    command.add_argument("images", metavar="PATH", help="images in PATH/train/<class>/* and PATH/val/<class>/*")
    command.add_argument("--arch", choices=ARCHITECTURES, required=True)
    command.add_argument("--epochs", required=True)
    seen = "that the network sees (default: 64)"
    command.add_argument("--size", dest="teacher_size", metavar="PIXELS", default=64, help=seen)
    command.add_argument("--batch-size", help="images a step (default: 128, on CUDA 1024)")
    command.add_argument("--learning-rate", help="at its peak (default: by batch size, lower with --init)")
    command.add_argument("--schedule", default="one_cycle", help="one_cycle (the default), cosine or constant")
    command.add_argument("--init", metavar="FILE", help="begin with these weights")
    command.add_argument("--out", metavar="FOLDER", default="weights", help="where to write (default: weights)")
    command.add_argument("--name", default="", help="what the report calls the images (default: the folder's name)")
    command.add_argument("--seed", dest="split_seed", metavar="SEED", default=0)
    command.add_argument("--device", default="auto")
    command.add_argument("--precision", default="auto", help="float32 or bfloat16 (default: what is faster here)")
    command.add_argument("--threads", help="CPU threads (default: all cores)")


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
    if options.out and not options.report:
        raise UserError("--out: says where the report goes; add --report")
    settings = pipeline.run(options.profile, _parameters(options))
    if options.report:
        _make_report(settings, options)
    else:
        print(text_table(pipeline.results_frame(settings.run_folder)))


def _report(options: argparse.Namespace) -> None:
    if options.pdf_only:
        folder = project_path(options.out) if options.out else _run_folder(options)
        print(f"report: {shown_path(pipeline.typeset(folder / 'generated', folder / 'report.pdf'))}")
        return
    _make_report(_settings(options), options)


def _make_report(settings: Settings, options: argparse.Namespace) -> None:
    out = project_path(options.out) if options.out else settings.run_folder
    generated = pipeline.export(settings, out)
    print(text_table(pipeline.results_frame(settings.run_folder)))
    try:
        print(f"report: {shown_path(pipeline.typeset(generated, out / 'report.pdf'))}")
    except LatexMissing as error:  # all but the PDF is there, and the message says how to get it
        print(f"report: {error}")


def _run_folder(options: argparse.Namespace) -> Path:
    # nothing is trained, so a profile's weights may be absent
    return load_settings(options.profile, **_parameters(options) | {"weights": "imagenet"}).run_folder


def _results(options: argparse.Namespace) -> None:
    folder = _run_folder(options)
    print(pipeline.shown_tables(REPORT / "generated" if options.committed else folder))


def _predict(options: argparse.Namespace) -> None:
    if options.top < 1:
        raise UserError(f"--top: {options.top} will not do; it must be at least 1")
    student = find_student(_run_folder(options), options.arm, options.teachers, options.seed)
    probabilities = classify(load_student(student), read_pictures(options.images))
    if options.json:
        found = [
            {"image": str(path), "probabilities": dict(zip(student.classes, row))}
            for path, row in zip(options.images, probabilities.tolist())
        ]
        print(json.dumps({"student": student.words, "predictions": found}, indent=1))
        return
    print(student.words)
    for path, row in zip(options.images, probabilities):
        print(path, *prediction_lines(row, student.classes, options.top), sep="\n  ")


def _export(options: argparse.Namespace) -> None:
    folder = _run_folder(options)
    student = find_student(folder, options.arm, options.teachers, options.seed)
    out = project_path(options.out) if options.out else folder / "export"
    path = out / f"{student.name}{SUFFIX[options.format]}"
    about = {
        "classes": json.dumps(student.classes), "student": student.words, "fingerprint": student.fingerprint,
        "input": "pixels: uint8 [N, 3, 32, 32], RGB, 0 to 255", "output": "logits: float32 [N, classes]",
    }  # fmt: skip
    difference = export_student(load_student(student), about, options.format, path)
    print(f"{shown_path(path)}: {student.words}")
    print(f"takes {about['input']}; gives {about['output']}")
    print(f"checked: on random pictures its logits are within {difference:.1g} of the student's")


def _sweep(options: argparse.Namespace) -> None:
    if bool(options.file) == bool(options.grid):
        raise UserError("sweep: give either FILE or --grid NAME=V1,V2,... (one or more)")
    if options.file and options.what:
        raise UserError("--what: FILE says it; leave it out, or give --grid in place of FILE")
    workers, settings = _workers(options), _settings(options)
    if options.file:
        path = project_path(options.file)
        sweep, folder = read_sweep(path), path.parent
    else:
        sweep, folder = grid_sweep(options.what or "kd", options.grid, settings.seeds), settings.run_folder / "sweeps"
    out = (project_path(options.out) if options.out else folder) / f"{sweep.name}.csv"
    frame = run_sweep(sweep, options.profile, _parameters(options), out, workers, options.scheduler)
    print(sweep_table(frame).to_string(index=False))
    print(f"rows: {shown_path(out)}")


def _workers(options: argparse.Namespace) -> int:
    if options.workers and options.scheduler:
        raise UserError("--workers: the cluster at --scheduler has its own; leave one of the two out")
    return checked("threads", options.workers or 1, "--workers")


def _study(options: argparse.Namespace) -> None:
    settings = run_study(options.profile, _parameters(options), _workers(options), options.scheduler)
    print(f"trained: {', '.join(entries_of(settings.study))}; in {shown_path(settings.run_folder)}")


def _bench(options: argparse.Namespace) -> None:
    from kdutils.lab import bench, performance

    # neither data nor weights are read, so a profile's weights may be absent
    settings = load_settings(options.profile, **_parameters(options) | {"weights": "imagenet"})
    if options.page:
        performance.read_notes(performance.PAGE)  # its marks may be lost: better told before than after
    found = bench.run(settings, quick=options.quick)
    if options.page:
        print(f"page: {shown_path(performance.write_page(found, performance.PAGE))}")


def _pretrain(options: argparse.Namespace) -> None:
    device = pick_device(checked("device", options.device))
    # a GPU computes a small batch faster than Python can ask for the next
    options.batch_size = options.batch_size or (1024 if device == "cuda" else 128)
    names = ("epochs", "teacher_size", "batch_size", "schedule", "split_seed", "precision", "threads")
    given = {
        name: checked(name, getattr(options, name), SPELT.get(name, f"--{name}".replace("_", "-"))) for name in names
    }
    rate = options.learning_rate and checked("learning_rate", options.learning_rate)
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    recipe = default_recipe(given["epochs"], given["batch_size"], rate, given["schedule"], bool(options.init))
    precision = pick_precision(given["precision"], device)
    how = Pretraining(options.arch, given["teacher_size"], recipe, given["split_seed"], precision, device)
    init = project_path(options.init) if options.init else None
    print(f"{how.arch} at {how.size} px on {device} in {precision}; {recipe}", flush=True)
    path = pretrain_on_folder(
        project_path(options.images), how, project_path(options.out), init=init, name=options.name
    )
    header = read_header(path)
    accuracy = pretraining_facts(header)["val_accuracy"]
    print(f"{shown_path(path)}: {header['description']}; {accuracy:.1%} of the validation images right")


def _stamp(options: argparse.Namespace) -> None:
    changed = stamp(options.address, options.ref)
    print(f"{options.address} at {options.ref}: {len(changed)} files changed", *map(shown_path, changed), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
