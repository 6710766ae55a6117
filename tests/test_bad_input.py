"""Bad input, all kinds of it: one line that names the input, the rule and the remedy, before anything is trained."""

import ast
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import pytest
import torch
from papermill.translators import PythonTranslator
from PIL import Image
from safetensors.torch import save_file

from kdutils import cache as runs
from kdutils import pretraining, students, teachers
from kdutils.__main__ import main
from kdutils.cache import Cached, read_cached, write_cached
from kdutils.data.images import load_data
from kdutils.lab.sweeps import read_sweep
from kdutils.losses import cross_entropy
from kdutils.models import load_backbone
from kdutils.report import batch as pipeline
from kdutils.report import latex as report
from kdutils.results.tables import record
from kdutils.settings import ROOT, UserError, load_settings, notebook_settings
from kdutils.students import Method, train_students
from kdutils.teachers import check_space


def run(*parameters):
    """The command line with these parameters of the tiny profile."""

    def call(w):
        try:
            w.command("run", "--profile", w.profile(), *parameters)
        finally:
            assert not (w.tmp / "runs").exists()

    return call


def profile(text):
    """A profile of that text (bytes, or lines added to the tiny one's)."""

    def call(w):
        path = w.tmp / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        load_settings(str(path))

    return call


def folder(change):
    """A folder of images, ten classes with two images each, after that change to it."""

    def call(w):
        root = w.tmp / "mine"
        for part in ("train", "test"):
            for number in range(10):
                (root / part / f"class{number}").mkdir(parents=True)
                for i in range(2):
                    Image.new("RGB", (32, 32), (number, i, 0)).save(root / part / f"class{number}" / f"{i}.png")
        change(root)
        load_data(
            w.settings(
                data=f"folder:{root}", train_size=10, val_size=10, test_size=10, batch_size=5, teacher_batch_size=5
            )
        )

    return call


def image(fill):
    """The same with one image file filled so (or made by calling `fill` with its path)."""

    def change(root):
        path = root / "train" / "class3" / "1.png"
        path.unlink()
        path.write_bytes(fill) if isinstance(fill, bytes) else fill(path)

    return folder(change)


def png(width, height):
    """A PNG of a few bytes that claims to be so large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def weights(write, name="resnet18.pth"):
    """A ResNet-18 out of a file that `write` has written (or with that content)."""

    def call(w):
        path = w.tmp / "weights" / name
        path.parent.mkdir()
        path.write_bytes(write) if isinstance(write, bytes) else write(path)
        load_backbone("resnet18", str(path.parent))

    return call


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def cache(write):
    """A teacher's kept logits out of a file that `write` has written."""

    def call(w):
        path = w.tmp / "kept" / "resnet18-logits.safetensors"
        path.parent.mkdir()
        write(path)
        read_cached(path)

    return call


def crafted(path):
    """Its checksum fits, but it is none of this project's cached results."""
    runs.write_tensors(path, {}, {"about": "[" * 9000, "checksum": runs._checksum({}, "[" * 9000)})


def found(w, **changes):
    """A run folder whose notebooks were run, changed so: a file's content by its name, None removes it."""
    settings = w.settings()
    rows = [{"task": str(task), "arm": f"arm{task}", "teachers": "", "labels": 40, "epochs": 2, "seed": 0,
             "split": "test", "metric": metric, "value": "0.5"} for task in (1, 2, 3, 4) for metric in ("accuracy", "nll")]  # fmt: skip
    record(settings, "01", rows, {"data": {}, "weights": {}}, [], {})
    (settings.run_folder / "notebooks").mkdir()
    (settings.run_folder / "notebooks" / pipeline.EXECUTED_WITH).write_text(settings.digest())
    for name, content in changes.items():
        path = settings.run_folder / name.replace("_", ".")
        path.write_text(content(path.read_text()))
    return settings


def notebook(w, *cells, name="a.ipynb"):
    path = w.tmp / name
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


def failed(w):
    output = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="by 0", traceback=[])
    cell = nbformat.v4.new_code_cell("1 / 0", execution_count=1, outputs=[output])
    report.export_notebooks([notebook(w, cell)], w.tmp / "out")


def lost_kernel(w):
    w.patch.setattr(papermill, "execute_notebook", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("Kernel died")))
    pipeline.run(w.profile(), {})


def full_disk(write):
    """No file may grow beyond a kilobyte: what a full disk is to whoever writes."""

    def call(w):
        resource = pytest.importorskip("resource")
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            write(w)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return call


def no_room(w):
    w.patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3e8))
    (w.tmp / "weights").mkdir()
    for arch in ("resnet18", "resnet50"):
        (w.tmp / "weights" / f"{arch}.pth").touch()
    settings = w.settings(weights=str(w.tmp / "weights"), teacher_size=512)
    check_space(load_data(settings), settings)


def no_memory(error):
    def call(w):
        def fit(*_, **__):
            raise error

        w.patch.setattr(students, "fit", fit)
        settings = w.settings()
        train_students(Method("scratch", cross_entropy), load_data(settings), settings)

    return call


def a_path(path):
    path.write_text("nothing: here\n")
    return path


def explosive():
    """A few lines that stand for 10^12 items."""
    items = ["x"]
    for _ in range(12):
        items = [items] * 10
    return items


def eleventh(part):
    (part / "class10").mkdir()
    Image.new("RGB", (32, 32)).save(part / "class10" / "0.png")


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
OUTSIDE = struct.pack("<Q", len(HEADER)) + HEADER


@pytest.fixture
def w(tmp_path, tiny_profile, tiny, capsys, monkeypatch):
    """What a row of the table works with."""

    def command(*arguments):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err + out
        raise UserError(err.removeprefix("error: ").removesuffix("\n"))

    for module in (students, teachers, pretraining):
        monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("something was trained"))
    return SimpleNamespace(tmp=tmp_path, profile=tiny_profile, settings=tiny, command=command, patch=monkeypatch)


# what it is: the call, and its message; TMP is the test's folder, ... stands for words of other programs and long lists
BAD = {
    "an unknown parameter": (run("-p", "temprature", "3"),
        "parameter: there is no setting 'temprature'; did you mean 'temperature'?"),
    "a name like none": (run("-p", "zzzzzz", "3"),
        "parameter: there is no setting 'zzzzzz'; the settings are: profile, data, ..."),
    "a temperature of 0": (run("-p", "temperature", "0"),
        "temperature: '0' will not do; it must be a finite number above 0"),
    "a negative temperature": (run("-p", "temperature", "-1"),
        "temperature: '-1' will not do; it must be a finite number above 0"),
    "no number": (run("-p", "temperature", "nan"),
        "temperature: 'nan' will not do; it must be a finite number above 0"),
    "a word for a number": (run("-p", "temperature", "hot"),
        "temperature: 'hot' will not do; it must be a finite number above 0"),
    "alpha above 1": (run("-p", "alpha", "1.5"), "alpha: '1.5' will not do; it must be a number from 0 to 1"),
    "alpha below 0": (run("-p", "alpha", "-0.1"), "alpha: '-0.1' will not do; it must be a number from 0 to 1"),
    "no seeds": (run("-p", "seeds", "[]"),
        "seeds: '[]' will not do; it must be a list of one or more different whole numbers, such as [0, 1, 2]"),
    "a seed twice": (run("-p", "seeds", "[0, 0]"),
        "seeds: '[0, 0]' will not do; it must be a list of one or more different whole numbers, such as [0, 1, 2]"),
    "seeds that are none": (run("-p", "seeds", "abc"),
        "seeds: 'abc' will not do; it must be a list of one or more different whole numbers, such as [0, 1, 2]"),
    "a group of the study that is none": (run("-p", "study", '["contrls"]'),
        "study: '[\"contrls\"]' will not do; it must be a list of different names among freeze, controls, memory, self, losses, "
        "earlier, budget, unlabelled, or [] for none"),
    "a list in a list of groups": (run("-p", "study", '[["controls"]]'),
        "study: '[[\"controls\"]]' will not do; it must be a list of different names among freeze, controls, memory, self, losses, "
        "earlier, budget, unlabelled, or [] for none"),
    "a study of no groups": (lambda w: w.command("study", "--profile", w.profile()),
        "study: no group is named; give -p study '[\"controls\"]', of freeze, controls, memory, self, losses, earlier, budget, "
        "unlabelled"),
    "half an epoch": (run("-p", "epochs", "2.5"), "epochs: '2.5' will not do; it must be a whole number, at least 1"),
    "an empty value": (run("-p", "epochs", ""), "epochs: '' will not do; it must be a whole number, at least 1"),
    "a call in place of a number": (run("-p", "epochs", "__import__('os').abort()"),
        "epochs: \"__import__('os').abort()\" will not do; it must be a whole number, at least 1"),
    "a number of 5000 digits": (run("-p", "epochs", "9" * 5000),
        "epochs: '9...' will not do; it must be a whole number, at least 1"),
    "a step that misses the image": (run("-p", "shift_step", "2"),
        "shift_step: 2 does not divide max_shift = 1; choose a step that does, so that the unshifted image is "
        "one of the views"),
    "a batch above all images": (run("-p", "batch_size", "41"),
        "batch_size: no batch of 41 fits into train_size = 40; lower batch_size and teacher_batch_size"),
    "more images than there are": (run("-p", "train_size", "100000"),
        "data: shapes10 has 12000 images for train, 100010 were asked for; lower train_size or val_size"),
    "more test images than there are": (run("-p", "test_size", "100000"),
        "data: shapes10 has 10000 images for test, 100000 were asked for; lower test_size"),
    "unknown data": (run("-p", "data", "mnist"),
        "data: 'mnist' will not do; it must be 'cifar10', 'shapes10' or 'folder:PATH'"),
    "no folder of data": (run("-p", "data", "folder:no/such/place"),
        "data: there is no folder no/such/place/train; it must hold one folder of images a class"),
    "the original's name": (run("-p", "data_name", "CIFAR-10"),
        "data_name: 'CIFAR-10' names the original images (data = cifar10); give another, for example 'CIFAR-10, "
        "JPEG re-encoding'"),
    "no folder of weights": (run("-p", "weights", "no/such/place"),
        "weights: there is no folder no/such/place; give 'imagenet', 'generated', 'none', or a folder with "
        "resnet50.safetensors and resnet18.safetensors (or .pth)"),
    "an unknown device": (run("-p", "device", "abacus"),
        "device: 'abacus' will not do; it must be one of 'auto', 'cpu', 'cuda', 'mps'"),
    "a parameter twice": (run("-p", "epochs", "1", "-p", "epochs", "2"),
        "-p epochs: given twice ('1' and '2'); keep one"),
    "the profile as a parameter": (run("-p", "profile", "demo"), "-p profile: name the profile with --profile"),
    "a report's place without a report": (run("--out", "x"), "--out: says where the report goes; add --report"),
    # profiles
    "an unknown profile": (lambda w: w.command("run", "--profile", "demmo"),
        "profile: there is no 'demmo'; use one of cifar10, cifar10-standin, demo, or the path of a .yaml file"),
    "a folder as profile": (lambda w: w.command("report", "--profile", "notebooks/profiles"),
        "profile: there is no 'notebooks/profiles'; use one of cifar10, cifar10-standin, demo, or the path of a "
        ".yaml file"),
    "a name twice in a profile": (profile("epochs: 3\nepochs: 4\n"),
        "profile: TMP/mine.yaml is not valid YAML ('epochs' stands twice in line 2, column 1: epochs: 4 ^); mend "
        "that line"),
    "no YAML": (profile("epochs: [3\n"), "profile: TMP/mine.yaml is not valid YAML (...); mend that line"),
    "no text": (profile(b"epochs: \xff\n"), "profile: TMP/mine.yaml is not valid YAML (...); mend that line"),
    "an empty profile": (profile(""), "profile: TMP/mine.yaml must hold lines of 'name: value'"),
    "a list as profile": (profile("- epochs\n"), "profile: TMP/mine.yaml must hold lines of 'name: value'"),
    "a list for a name": (profile("? [1, 2]\n: 3\n"), "profile: TMP/mine.yaml is not valid YAML (...); mend that line"),
    "a number for a name": (profile("1: 2\n"),
        "profile 'TMP/mine.yaml': there is no setting '1'; the settings are: profile, data, ..."),
    "an unknown setting in a profile": (profile("temprature: 3\n"),
        "profile 'TMP/mine.yaml': there is no setting 'temprature'; did you mean 'temperature'?"),
    "an incomplete profile": (lambda w: load_settings(w.profile(temperature=None)),
        "profile 'TMP/tiny.yaml': 'temperature' is missing; add a line 'temperature: ...' (see demo.yaml)"),
    "an object of Python in a profile": (profile("epochs: !!python/object/apply:os.abort []\n"),
        "profile: TMP/mine.yaml is not valid YAML (...); mend that line"),
    "a thirteenth month": (profile("epochs: 2020-13-01\n"),
        "profile: TMP/mine.yaml is not valid YAML (month must be in 1..12); mend that line"),
    "brackets without end": (profile("seeds: " + "[" * 800),
        "profile: TMP/mine.yaml is not valid YAML (it is nested too deeply); mend that line"),
    "a profile that explodes": (lambda w: load_settings(w.profile(seeds=explosive())),
        "seeds: ... will not do; it must be a list of one or more different whole numbers, such as [0, 1, 2]"),
    # folders and images
    "no test images": (folder(lambda root: (root / "test").rename(root / "tests")),
        "data: there is no folder TMP/mine/test; it must hold one folder of images a class"),
    "no class folders": (folder(lambda root: [path.rename(root / path.name) for path in (root / "train").iterdir()]),
        "data: TMP/mine/train holds no class folders; it must hold one folder of images a class"),
    "other classes for testing": (folder(lambda root: (root / "test" / "class3").rename(root / "test" / "cat")),
        "data: train and test of TMP/mine must hold the same class folders; only one has cat, class3"),
    "eleven classes": (folder(lambda root: [eleventh(root / part) for part in ("train", "test")]),
        "data: TMP/mine/train holds 11 class folders; it must be 10"),
    "nine classes": (folder(lambda root: [shutil.rmtree(root / part / "class9") for part in ("train", "test")]),
        "data: TMP/mine/train holds 9 class folders; it must be 10"),
    "an empty class folder": (folder(lambda root: [path.unlink() for path in (root / "test" / "class4").iterdir()]),
        "data: the class folder TMP/mine/test/class4 holds no images; add some or remove it"),
    "an empty file": (image(b""),
        "data: TMP/mine/train/class3/1.png cannot be read as an image (its content is of no kind that is known "
        "here); mend or remove it"),
    "text called an image": (image(b"no image at all"),
        "data: TMP/mine/train/class3/1.png cannot be read as an image (its content is of no kind that is known "
        "here); mend or remove it"),
    "half an image": (image(png(32, 32)[:40]),
        "data: TMP/mine/train/class3/1.png cannot be read as an image (its content is of no kind that is known "
        "here); mend or remove it"),
    "an image of 10,000 megapixels": (image(png(100_000, 100_000)),
        "data: TMP/mine/train/class3/1.png cannot be read as an image (it has far too many pixels); mend or "
        "remove it"),
    "an image of fractions": (image(lambda path: Image.fromarray(np.ones((32, 32), np.float32)).save(path, "TIFF")),
        "data: TMP/mine/train/class3/1.png cannot be read as an image (its pixels are numbers with a fraction, "
        "of no known range: save it with 8 bits a channel); mend or remove it"),
    "a link to nowhere": (image(lambda path: path.symlink_to("nowhere.png")),
        "data: TMP/mine/train/class3/1.png cannot be read (No such file or directory); mend or remove it"),
    "a folder called an image": (image(lambda path: path.mkdir()),
        "data: TMP/mine/train/class3/1.png is called an image, but is no file; mend or remove it"),
    "a pipe called an image": (image(lambda path: os.mkfifo(path)),
        "data: TMP/mine/train/class3/1.png is called an image, but is no file; mend or remove it"),
    # weights
    "a header of a terabyte": (weights(struct.pack("<Q", 2**40) + b"{}", "resnet18.safetensors"),
        "weights: TMP/weights/resnet18.safetensors cannot be read (...); give an undamaged file"),
    "a header of nonsense": (weights(struct.pack("<Q", 9) + b"{" * 9, "resnet18.safetensors"),
        "weights: TMP/weights/resnet18.safetensors cannot be read (...); give an undamaged file"),
    "a header that points outside": (weights(OUTSIDE, "resnet18.safetensors"),
        "weights: TMP/weights/resnet18.safetensors cannot be read (...); give an undamaged file"),
    "code in place of weights": (weights(lambda path: path.write_bytes(pickle.dumps(Evil(), 2))),
        "weights: TMP/weights/resnet18.pth holds more than tensors; save a plain state dict"),
    "code among the weights": (weights(lambda path: torch.save({"conv1.weight": Evil()}, path)),
        "weights: TMP/weights/resnet18.pth holds more than tensors; save a plain state dict"),
    "a whole checkpoint": (weights(lambda path: torch.save({"epoch": 3}, path)),
        "weights: TMP/weights/resnet18.pth is no state dict; save model.state_dict()"),
    "numbers for names": (weights(lambda path: torch.save({1: torch.zeros(1)}, path)),
        "weights: TMP/weights/resnet18.pth is no state dict; save model.state_dict()"),
    "no weights in a file": (weights(b""),
        "weights: TMP/weights/resnet18.pth cannot be read (it ends too early); give an undamaged file"),
    "another network's weights": (weights(lambda path: torch.save({"conv1.weight": torch.zeros(1)}, path)),
        "weights: these are not a torchvision resnet18's (size mismatch for conv1.weight: ...); give its state dict"),
    "weights of an unknown name": (lambda w: (
        (w.tmp / "weights").mkdir(), a_path(w.tmp / "weights" / "model.pth"), w.settings(weights=str(w.tmp / "weights"))),
        "weights: TMP/weights holds no resnet50.safetensors and no resnet50.pth; put a torchvision resnet50 "
        "state dict of that name there"),
    # caches and disks
    "a cut cache": (cache(lambda path: path.write_bytes(b"\x10")),
        "weights: TMP/kept/resnet18-logits.safetensors cannot be read (...); get it again"),
    "a cache of another program": (cache(lambda path: save_file({"a": torch.zeros(1)}, path)),
        "weights: TMP/kept/resnet18-logits.safetensors is damaged (its checksum does not fit); get it again"),
    "a crafted cache": (cache(crafted),
        "weights: TMP/kept/resnet18-logits.safetensors holds no cached result of this project; get it again"),
    "a file in place of the run folder": (lambda w: load_data(w.settings(runs_dir=str(a_path(w.tmp / "file")))),
        "runs_dir: cannot write to TMP/file (...); free space, or choose another"),
    "a full disk": (full_disk(lambda w: record(w.settings(), "01", [], {"text": "x" * 5000}, [], {})),
        "runs_dir: cannot write TMP/runs/tiny/found/01.json (...); free space, or choose another; finished "
        "results are kept: repeat the command to resume"),
    "a full disk, for tensors": (full_disk(lambda w: write_cached(
        w.tmp / "x.safetensors", {}, Cached({"a": torch.zeros(9000)}, {}, "", 0.0))),
        "runs_dir: cannot write TMP/x.safetensors (...); free space, or choose another; finished results are "
        "kept: repeat the command to resume"),
    "no room for the features": (no_room,
        "runs_dir: the features of resnet50 and resnet18 will take 0.39 GB, but TMP/runs/tiny has 0.30 GB left; "
        "free space, choose another, or lower teacher_size or max_shift"),
    "no memory": (no_memory(MemoryError()),
        "scratch, seed 0: memory ran out; lower batch_size; finished results are kept: repeat the command to resume"),
    "no memory, by torch": (no_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 GB")),
        "scratch, seed 0: memory ran out; lower batch_size; finished results are kept: repeat the command to resume"),
    "no memory on the GPU": (no_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")),
        "scratch, seed 0: memory ran out; lower batch_size; finished results are kept: repeat the command to resume"),
    # papermill calls
    "a typing mistake in a notebook": (lambda w: notebook_settings(
        {"In": ["# Parameters\ntemprature = 3"], "profile": w.profile(), "temprature": 3}),
        "parameter: there is no setting 'temprature'; did you mean 'temperature'?"),
    "an impossible value in a notebook": (lambda w: notebook_settings(
        {"In": ["# Parameters\nalpha = 3"], "profile": w.profile(), "alpha": 3}),
        "alpha: 3 will not do; it must be a number from 0 to 1"),
    "a parameter that is a program": (lambda w: pipeline.run(w.profile(), {"x = 1\nimport os\nos.abort()\ny": 3}),
        "parameter: there is no setting 'x = 1\\nimport os\\nos.abort()\\ny'; the settings are: profile, data, ..."),
    "a profile that is a program": (lambda w: pipeline.run('demo"\nimport os\nos.abort()\n"', {}),
        "profile: there is no 'demo\"\\nimport os\\nos.abort()\\n\"'; use one of cifar10, cifar10-standin, demo, or "
        "the path of a .yaml file"),
    "a kernel that dies": (lost_kernel,
        "01_small_cnn lost its Python kernel (Kernel died); if memory ran out, lower teacher_size, teacher_views "
        "or feature_memory_gb (what had run: TMP/runs/tiny/notebooks/01_small_cnn.ipynb)"),
    # reports
    "a report without a run": (lambda w: w.command("report", "--profile", w.profile()),
        "results: there is no TMP/runs/tiny/results.csv; run the notebooks first (python -m kdutils run, with the same profile)"),
    "results without a run": (lambda w: w.command("results", "--profile", w.profile()),
        "results: there is no TMP/runs/tiny/results.csv; run the notebooks first (python -m kdutils run, with the same profile)"),
    "a PDF of nothing": (lambda w: w.command("report", "--pdf-only", "--out", str(w.tmp)),
        "report: TMP/generated holds nothing to typeset; run `make report` first"),
    "a report of other settings": (lambda w: (found(w), w.command("report", "--profile", w.profile(), "-p", "alpha", "0.25")),
        "report: TMP/runs/tiny was last run with other settings; run it again with these, or report with: python "
        "-m kdutils report --profile TMP/tiny.yaml"),
    "results changed by hand": (lambda w: pipeline.export(found(w, results_csv=lambda text: text.replace("0.5", "0.9")), w.tmp),
        "report: TMP/runs/tiny/results.csv is not as the last run wrote it (its checksum does not fit); run the "
        "notebooks again: python -m kdutils run --profile TMP/tiny.yaml"),
    "a cut provenance": (lambda w: pipeline.export(found(w, provenance_json=lambda text: text[:50]), w.tmp),
        "report: TMP/runs/tiny/provenance.json is missing or damaged; run the notebooks again (python -m kdutils "
        "run)"),
    "notebooks that are gone": (lambda w: pipeline.export(found(w), w.tmp),
        "report: TMP/runs/tiny/notebooks/01_small_cnn.ipynb, "
        "TMP/runs/tiny/notebooks/02_fine_tuned_resnets.ipynb, TMP/runs/tiny/notebooks/03_one_teacher.ipynb, "
        "TMP/runs/tiny/notebooks/04_two_teachers.ipynb not there; run the notebooks first (python -m kdutils run, with the same profile)"),
    "a notebook that failed": (failed,
        "notebook: TMP/a.ipynb, cell 1 failed (ZeroDivisionError: by 0); mend it and run it again"),
    "a notebook that was not run": (lambda w: report.export_notebooks(
        [notebook(w, nbformat.v4.new_code_cell("later()"))], w.tmp / "out"),
        "notebook: TMP/a.ipynb, cell 1 has not been run; run the notebook to its end first"),
    "a figure's name with a space": (lambda w: report.show_table(None, "my table", "caption"),
        "name: 'my table' cannot name a figure or table; a name is made of a-z, 0-9 and -, such as curves-scratch"),
    "a README without marks": (lambda w: report.update_readme(a_path(w.tmp / "README.md"), {}),
        "README: TMP/README.md needs one line <!-- results:begin --> and, after it, one line <!-- results:end -->"),
    # the other commands
    "no images to pre-train on": (lambda w: w.command("pretrain", "no/such/place", "--arch", "resnet18", "--epochs", "1"),
        "data: there is no folder no/such/place/train; it must hold one folder of images a class"),
    "no epochs to pre-train": (lambda w: w.command("pretrain", "x", "--arch", "resnet18", "--epochs", "0"),
        "--epochs: '0' will not do; it must be a whole number, at least 1"),
    "no weights to begin with": (lambda w: w.command(
        "pretrain", "x", "--arch", "resnet18", "--epochs", "1", "--init", "no/such.pth"),
        "--init: there is no file no/such.pth; give a ResNet's .safetensors or .pth"),
    "no sweep": (lambda w: read_sweep(w.tmp / "none.yaml"),
        "sweep: TMP/none.yaml cannot be read (No such file or directory); give a .yaml file"),
    "a sweep of nothing": (lambda w: read_sweep(a_path(w.tmp / "a.yaml")), "sweep: TMP/a.yaml needs 'title', a text"),
    "a bench of nothing": (lambda w: w.command("bench", "--profile", "demo", "-p", "epohcs", "3"),
        "parameter: there is no setting 'epohcs'; did you mean 'epochs'?"),
}  # fmt: skip


def matches(message, expected, folder):
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, message.replace(str(folder), "TMP")) is not None


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_in_one_line_before_anything_is_trained(w, what):
    call, expected = BAD[what]
    with pytest.raises(UserError) as caught:
        call(w)
    assert matches(str(caught.value), expected, w.tmp), str(caught.value)
    assert not list((w.tmp / "runs").rglob("*seed*"))


def test_the_table_is_long_and_every_message_is_one_line():
    assert len(BAD) >= 40 and not any("\n" in expected for _, expected in BAD.values())


IN_A_SHELL = [
    (["run", "--profile", "demo", "-p", "alpha", "1.5"], "alpha above 1"),
    (["report", "--profile", "demmo"], "an unknown profile"),
    (["bench", "--profile", "demo", "-p", "epohcs", "3"], "a bench of nothing"),
]


def test_the_command_line_says_the_same_with_exit_status_1(tmp_path):
    """As processes of their own, from any folder: nothing but that line, and nothing left behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-m", "kdutils", *arguments], cwd=tmp_path, env=environment, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for arguments, _ in IN_A_SHELL
    ]  # fmt: skip
    for process, (_, what) in zip(processes, IN_A_SHELL):
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "") and matches(err, f"error: {BAD[what][1]}\n", tmp_path), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [
    '"; import os; os.abort() #', "'''\nimport os\nos.abort()\n'''", "\\", "a\nb", "{x}", "$(abort)", "None", ["0", "1"],
])  # fmt: skip
def test_what_papermill_is_given_arrives_as_data(value):
    """The cell that it adds holds assignments of literals alone, which give back the very values."""
    tree = ast.parse(PythonTranslator.codify({"data_name": value, "epochs": 3}))
    assert all(isinstance(node, ast.Assign) for node in tree.body)
    assert [ast.literal_eval(node.value) for node in tree.body] == [value, 3]


def test_nothing_is_handed_to_a_shell_or_run_as_code():
    """Nor read as a pickle: there is no call in the package that could."""
    for path in (ROOT / "kdutils").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads")
                assert "shell" not in named, (path, called)
                assert called != "torch.load" or named["weights_only"] == "True"
                assert called != "yaml.load" or named["Loader"] == "_UniqueKeyLoader"
