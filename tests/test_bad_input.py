"""Bad input, all kinds of it: one line that names the input, the rule and the remedy, before anything is trained."""

import ast
import functools
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
from kdutils import students, teachers
from kdutils.__main__ import main
from kdutils.cache import Cached, read_cached, write_cached
from kdutils.data.images import load_data
from kdutils.losses import cross_entropy
from kdutils.report import batch as pipeline
from kdutils.report.latex import export_notebooks
from kdutils.report.readme import update_readme
from kdutils.report.show import show_table
from kdutils.results.record import record
from kdutils.results.sweeps import read_sweep
from kdutils.settings import ROOT, UserError, load_settings, notebook_settings
from kdutils.students import Method, train_students
from kdutils.teachers import check_space, check_weights
from kdutils.weights import load_pretrained


def command(name, *arguments):
    """A command with the tiny profile."""
    return lambda w: w.command(name, "--profile", w.profile(), *arguments)


def run(*parameters):
    """The command `run` with these parameters of the tiny profile; it makes nothing at all."""

    def call(w):
        try:
            command("run", *parameters)(w)
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


def folder(change, **settings):
    """A folder of images, ten classes with two images each, after that change to it."""

    def call(w):
        root = w.tmp / "mine"
        for part in ("train", "test"):
            for number in range(10):
                (root / part / f"class{number}").mkdir(parents=True)
                for i in range(2):
                    Image.new("RGB", (32, 32), (number, i, 0)).save(root / part / f"class{number}" / f"{i}.png")
        change(root)
        sizes = {"train_size": 10, "batch_size": 5, "teacher_batch_size": 5, **settings}
        load_data(w.settings(data=f"folder:{root}", **sizes))

    return call


def image(fill):
    """The same with one image file filled so (or made by calling `fill` with its path)."""

    def change(root):
        path = root / "train" / "class3" / "1.png"
        path.unlink()
        path.write_bytes(fill) if isinstance(fill, bytes) else fill(path)

    return folder(change)


def unlabelled(make, size=1):
    """The same with a folder `unlabelled`, which `make` fills, and so many images asked of it."""

    def change(root):
        (root / "unlabelled").mkdir()
        make(root / "unlabelled")

    return folder(change, unlabelled_size=size, test_size=20)


def some_of_the_test(unlabelled):
    """Two of the test images, and another."""
    for number in range(2):
        shutil.copy(unlabelled.parent / "test" / "class3" / f"{number}.png", unlabelled / f"{number}.png")
    Image.new("RGB", (32, 32), (200, 0, 0)).save(unlabelled / "other.png")


def png(width, height):
    """A PNG of a few bytes that claims to be so large."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def weights(content, name="resnet18.pth"):
    """A ResNet-18 out of a file with that content (bytes, or what torch saves)."""

    def call(w):
        path = w.tmp / "weights" / name
        path.parent.mkdir()
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        load_pretrained("resnet18", str(path.parent))

    return call


def teachers_of(name, **record):
    """The check of a teacher of that name."""

    def call(w):
        for key, value in record.items():
            record[key] = w.weights if value == "FOLDER" else value
        settings = w.settings(teachers=[{"name": name, **record}, "resnet18"])
        check_weights(settings.teachers[0], load_data(settings), settings)

    return call


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def cache(write):
    """A cached result out of a file that `write` has written."""

    def call(w):
        path = w.tmp / "kept" / "x.safetensors"
        path.parent.mkdir()
        write(path)
        read_cached(path)

    return call


def crafted(path):
    """Its checksum fits, but it is none of this project's cached results."""
    runs.write_tensors(path, {}, {"about": "[" * 9000, "checksum": runs._checksum({}, "[" * 9000)})


def found(w, **changes):
    """A run folder whose notebooks were run, changed so: what is made of a file's text, by its name."""
    settings = w.settings()
    row = {"teachers": "", "labels": 40, "epochs": 2, "seed": 0, "split": "test", "metric": "accuracy", "value": "0.5"}
    rows = [{"task": task, "arm": f"arm{task}", **row} for task in "1234"]
    record(settings, "01", rows, {"data": {}, "weights": {}}, [], {})
    (settings.run_folder / "notebooks").mkdir()
    (settings.run_folder / "notebooks" / pipeline.EXECUTED_WITH).write_text(settings.digest())
    for name, change in changes.items():
        path = settings.run_folder / name.replace("_", ".")
        path.write_text(change(path.read_text()))
    return settings


def notebook(*outputs, **of_cell):
    """The export of a notebook with one cell that has these outputs."""

    def call(w):
        cell = nbformat.v4.new_code_cell("1 / 0", outputs=list(outputs), **of_cell)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), w.tmp / "a.ipynb")
        export_notebooks([w.tmp / "a.ipynb"], w.tmp / "out")

    return call


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
    w.patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3e7))
    (w.tmp / "weights").mkdir()
    for arch in ("resnet18", "resnet50"):
        (w.tmp / "weights" / f"{arch}.pth").touch()
    settings = w.settings(weights=str(w.tmp / "weights"), teacher_size=512)
    check_space(load_data(settings), settings, settings.teachers)


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


def eleventh(part):
    (part / "class10").mkdir()
    Image.new("RGB", (32, 32)).save(part / "class10" / "0.png")


FAILED = nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="by 0", traceback=[])
EXPLOSIVE = functools.reduce(lambda items, _: [items] * 10, range(12), ["x"])  # a few lines that stand for 10^12 items
HEADER = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()


@pytest.fixture
def w(tmp_path, tiny_profile, tiny, capsys, monkeypatch, weights_folder):
    """What a row of the table works with."""

    def command(*arguments):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err + out
        raise UserError(err.removeprefix("error: ").removesuffix("\n"))

    for module in (students, teachers):
        monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("something was trained"))
    tools = {"profile": tiny_profile, "settings": tiny, "command": command, "patch": monkeypatch}
    return SimpleNamespace(tmp=tmp_path, weights=weights_folder, **tools)


ABOVE_0, FRACTION, COUNT = "a finite number above 0", "a number from 0 to 1", "a whole number, 1 or more"
SEEDS = "a list of one or more different whole numbers, such as [0, 1, 2]"
NAMES = "a list of different names, or [] for none"

# what it is: a setting, a value that it cannot have, and the rule
VALUES = {
    "a temperature of 0": ("temperature", "0", ABOVE_0),
    "a negative temperature": ("temperature", "-1", ABOVE_0),
    "no number": ("temperature", "nan", ABOVE_0),
    "a word for a number": ("temperature", "hot", ABOVE_0),
    "alpha above 1": ("alpha", "1.5", FRACTION),
    "alpha below 0": ("alpha", "-0.1", FRACTION),
    "no seeds": ("seeds", "[]", SEEDS),
    "a seed twice": ("seeds", "[0, 0]", SEEDS),
    "seeds that are none": ("seeds", "abc", SEEDS),
    "a list in a list of groups": ("study", '[["controls"]]', NAMES),
    "half an epoch": ("epochs", "2.5", COUNT),
    "an empty value": ("epochs", "", COUNT),
    "a call in place of a number": ("epochs", "__import__('os').abort()", COUNT),
    "unknown data": ("data", "mnist", "'cifar10', 'shapes10' or 'folder:PATH'"),
    "an unknown device": ("device", "abacus", "one of 'auto', 'cpu', 'cuda', 'mps'"),
}

# what it is: a profile's text, and why it is no YAML
NO_YAML = {
    "a name twice in a profile": ("epochs: 3\nepochs: 4\n", "'epochs' is given twice in line 2, column 1: epochs: 4 ^"),
    "no YAML": ("epochs: [3\n", "..."),
    "no text": (b"epochs: \xff\n", "..."),
    "a list for a name": ("? [1, 2]\n: 3\n", "..."),
    "an object of Python in a profile": ("epochs: !!python/object/apply:os.abort []\n", "..."),
    "a thirteenth month": ("epochs: 2020-13-01\n", "month must be in 1..12"),
    "brackets without end": ("seeds: " + "[" * 800, "it is nested too deeply"),
}

UNKNOWN, TOO_LARGE = "unknown format", "too many pixels"
FLOATS = "floating-point pixels of unknown range; save it with 8 bits per channel"
# what it is: the content of an image file (or what makes it), and why it cannot be read
IMAGES = {
    "an empty file": (b"", UNKNOWN),
    "text called an image": (b"no image at all", UNKNOWN),
    "half an image": (png(32, 32)[:40], UNKNOWN),
    "an image of 10,000 megapixels": (png(100_000, 100_000), TOO_LARGE),
    "an image of fractions": (lambda path: Image.fromarray(np.ones((32, 32), np.float32)).save(path, "TIFF"), FLOATS),
}

DAMAGED = "cannot be read (...); use an undamaged file"
MORE, NO_STATE = "holds more than tensors; save model.state_dict()", "is not a state dict; save model.state_dict()"
# what it is: the name of a file of weights, its content, and what is wrong with it
WEIGHTS = {
    "a header of a terabyte": ("resnet18.safetensors", struct.pack("<Q", 2**40) + b"{}", DAMAGED),
    "a header of nonsense": ("resnet18.safetensors", struct.pack("<Q", 9) + b"{" * 9, DAMAGED),
    "a header that points outside": ("resnet18.safetensors", struct.pack("<Q", len(HEADER)) + HEADER, DAMAGED),
    "no weights in a file": ("resnet18.pth", b"", "cannot be read (the file is truncated); use an undamaged file"),
    "code in place of weights": ("resnet18.pth", pickle.dumps(Evil(), 2), MORE),
    "code among the weights": ("resnet18.pth", {"conv1.weight": Evil()}, MORE),
    "a whole checkpoint": ("resnet18.pth", {"epoch": 3}, NO_STATE),
    "numbers for names": ("resnet18.pth", {1: torch.zeros(1)}, NO_STATE),
}


def folder_of(name):
    return f"use 'imagenet', 'none', or a folder with the state dict of {name} as {name}.safetensors (or .pth)"


NO_MEMORY = {
    "no memory": MemoryError(),
    "no memory, by torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 GB"),
    "no memory on the GPU": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
}

# what it is: the call, and its message; TMP is the test's folder, ... stands for words of other programs and long lists
BAD = {
    **{what: (run("-p", name, value), f"{name}: {value!r} is not valid; use {rule}")
       for what, (name, value, rule) in VALUES.items()},
    **{what: (profile(text), f"profile: TMP/mine.yaml is not valid YAML ({why}); correct that line")
       for what, (text, why) in NO_YAML.items()},
    **{what: (image(fill), f"data: TMP/mine/train/class3/1.png cannot be read as an image ({why}); fix or remove it")
       for what, (fill, why) in IMAGES.items()},
    **{what: (weights(content, name), f"weights: TMP/weights/{name} {why}")
       for what, (name, content, why) in WEIGHTS.items()},
    **{what: (no_memory(error), "scratch, seed 0: memory ran out; lower batch_size; ...") for what, error in NO_MEMORY.items()},
    "an unknown parameter": (run("-p", "temprature", "3"),
        "parameter: there is no setting 'temprature'; did you mean 'temperature'?"),
    "a name like none": (run("-p", "zzzzzz", "3"),
        "parameter: there is no setting 'zzzzzz'; the settings are: profile, data, ..."),
    "a group of the study that is none": (run("-p", "study", '["contrls"]'), "study: ...'contrls'...controls...losses..."),
    "a study of a group that is none": (command("study", "-p", "study", '["contrls"]'), "study: ...'contrls'...controls...losses..."),
    "a study of no groups": (command("study"), "study: ...controls..."),
    "a number of 5000 digits": (run("-p", "epochs", "9" * 5000), f"epochs: '9...' is not valid; use {COUNT}"),
    "a step that misses the image": (run("-p", "shift_step", "2"),
        "shift_step: 2 does not divide max_shift = 1; choose a step that does, so that the unshifted image is "
        "one of the views"),
    "a batch above all images": (run("-p", "batch_size", "41"),
        "batch_size: 41 is more than train_size = 40; choose a smaller one"),
    "more images than there are": (run("-p", "train_size", "100000"),
        "data: shapes10 has 12000 images for train, 100010 were asked for; lower train_size or val_size"),
    "more test images than there are": (run("-p", "test_size", "100000"),
        "data: shapes10 has 10000 images for test, 100000 were asked for; lower test_size"),
    "no folder of data": (run("-p", "data", "folder:no/such/place"),
        "data: there is no folder no/such/place/train; it must hold one folder of images per class"),
    "the original's name": (run("-p", "data_name", "CIFAR-10"),
        "data_name: 'CIFAR-10' names the original images (data = cifar10); give another, for example 'CIFAR-10, "
        "JPEG re-encoding'"),
    "no folder of weights": (command("run", "-p", "weights", "no/such/place"), f"weights: no/such/place is not a folder; {folder_of('resnet50')}"),
    "a parameter twice": (run("-p", "epochs", "1", "-p", "epochs", "2"),
        "-p epochs: given twice ('1' and '2'); keep one"),
    "the profile as a parameter": (run("-p", "profile", "demo"), "-p profile: the profile is not a parameter; use --profile"),
    "a report's place without a report": (run("--out", "x"),
        "--out: it names the folder of the report, but no report is made; add --report"),
    # profiles
    "an unknown profile": (lambda w: w.command("run", "--profile", "demmo"),
        "profile: 'demmo' does not exist; use cifar10, ..., or the path of a .yaml file"),
    "a folder as profile": (lambda w: w.command("report", "--profile", "notebooks/profiles"),
        "profile: 'notebooks/profiles' does not exist; use cifar10, ..., or the path of a .yaml file"),
    "an empty profile": (profile(""), "profile: TMP/mine.yaml holds no settings; write lines of 'name: value'"),
    "a list as profile": (profile("- epochs\n"), "profile: TMP/mine.yaml holds no settings; write lines of 'name: value'"),
    "a number for a name": (profile("1: 2\n"),
        "profile 'TMP/mine.yaml': there is no setting '1'; the settings are: profile, data, ..."),
    "an unknown setting in a profile": (profile("temprature: 3\n"),
        "profile 'TMP/mine.yaml': there is no setting 'temprature'; did you mean 'temperature'?"),
    "an incomplete profile": (lambda w: load_settings(w.profile(temperature=None)),
        "profile 'TMP/tiny.yaml': 'temperature' is missing; add a line 'temperature: ...' (see cifar10.yaml)"),
    "a profile that explodes": (lambda w: load_settings(w.profile(seeds=EXPLOSIVE)),
        "seeds: ... is not valid; use " + SEEDS),
    # folders and images
    "no test images": (folder(lambda root: (root / "test").rename(root / "tests")),
        "data: there is no folder TMP/mine/test; it must hold one folder of images per class"),
    "no class folders": (folder(lambda root: [path.rename(root / path.name) for path in (root / "train").iterdir()]),
        "data: TMP/mine/train holds no class folders; it must hold one folder of images per class"),
    "other classes for testing": (folder(lambda root: (root / "test" / "class3").rename(root / "test" / "cat")),
        "data: train and test of TMP/mine must hold the same class folders; only one of them has cat, class3"),
    **{f"{count} classes": (folder(lambda root, change=change: [change(root / part) for part in ("train", "test")]),
        f"data: TMP/mine/train holds {count} class folders; it must hold 10")
       for count, change in ((11, eleventh), (9, lambda part: shutil.rmtree(part / "class9")))},
    "an empty class folder": (folder(lambda root: [path.unlink() for path in (root / "test" / "class4").iterdir()]),
        "data: the class folder TMP/mine/test/class4 holds no images; add some or remove it"),
    "a link to nowhere": (image(lambda path: path.symlink_to("nowhere.png")),
        "data: TMP/mine/train/class3/1.png cannot be read (No such file or directory); fix or remove it"),
    **{f"a {what} called an image": (image(make),
        "data: TMP/mine/train/class3/1.png has the name of an image, but is not a file; fix or remove it")
       for what, make in (("folder", lambda path: path.mkdir()), ("pipe", lambda path: os.mkfifo(path)))},
    "more unlabelled images than are left": (folder(lambda root: None, unlabelled_size=1),
        "unlabelled_size: 1 is more than the 0 training images that the split leaves; lower it"),
    "more unlabelled images than are drawn": (run("-p", "unlabelled_size", "20001"),
        "data: shapes10 has 20000 images for unlabelled, 20001 were asked for; lower unlabelled_size"),
    "more unlabelled images than there are": (unlabelled(some_of_the_test, size=9),
        "unlabelled_size: 9 is more than the 3 unlabelled images of the data; lower it"),
    "no unlabelled images in their folder": (unlabelled(lambda path: (path / "trip").mkdir()),
        "data: the folder TMP/mine/unlabelled holds no images; add some or remove it"),
    "half an unlabelled image": (unlabelled(lambda path: (path / "x.png").write_bytes(png(32, 32)[:40])),
        f"data: TMP/mine/unlabelled/x.png cannot be read as an image ({UNKNOWN}); fix or remove it"),
    "unlabelled images that are tested": (unlabelled(some_of_the_test, size=3),
        "data: 2 of the 3 unlabelled images are test images, too (equal pixels), for example "
        "TMP/mine/unlabelled/...png; remove them from one of the two, or use unlabelled_size = 0"),
    # weights
    "another network's weights": (weights({"conv1.weight": torch.zeros(1)}),
        "weights: this is not the state dict of resnet18 (size mismatch for conv1.weight: ...); use one that is"),
    "weights of an unknown name": (weights(b"", "model.pth"),
        f"weights: TMP/weights holds no resnet18.safetensors and no resnet18.pth; {folder_of('resnet18')}"),
    # teachers
    "one teacher": (run("-p", "teachers", "[resnet18]"), "teachers: '[resnet18]' is not valid; use a list of two CNNs, ..."),
    "two teachers of one name": (run("-p", "teachers", "[resnet18, resnet18]"),
        "teachers: two of them are called 'resnet18'; give each a label of its own in its record"),
    "a name twice in a record": (run("-p", "teachers", "[{name: a, name: b}, c]"), "teachers: '[{name...' is not valid; use a list of two CNNs, ..."),
    "an object of Python in a record": (run("-p", "teachers", "[!!python/object/apply:os.abort [], a]"), "teachers: ... is not valid; use ..."),
    "an unknown key of a record": (run("-p", "teachers", "[{name: resnet18, epoch: 3}, a]"),
        "teachers: 'resnet18': there is no setting 'epoch' of a teacher; did you mean 'epochs'?"),
    "a setting of an earlier version": (run("-p", "resnet50_epochs", "3"),
        "parameter: there is no setting 'resnet50_epochs'; write it into the teacher's record: teachers: [{name: resnet50, epochs: ...}, ...]"),
    "generated weights of an earlier version": (command("run", "-p", "weights", "generated"),
        f"weights: generated is not a folder; {folder_of('resnet50')}"),
    **{f"{what}": (teachers_of(name, **record), message) for what, name, record, message in (
        ("an unknown network", "resnet180", {}, "teachers: neither torchvision nor timm has a network called 'resnet180'; did you mean '...'?"),
        ("a network without a last linear layer", "squeezenet1_0", {}, "teachers: the last layer of squeezenet1_0 is not one linear layer ..."),
        ("a last block that is not known", "mobilenetv3_small_100", {"weights": "FOLDER", "trainable": "last_block"},
         "teachers: the last block of mobilenetv3_small_100 is not known (it is that of ResNets and EfficientNets); use trainable: last_layer"),
        ("a transformer of another size", "vit_tiny_patch16_224", {"size": 64},
         "teachers: vit_tiny_patch16_224 cannot take images of 64 pixels (...224...); set its size to what the network expects"),
    )},
    # caches and disks
    "a cut cache": (cache(lambda path: path.write_bytes(b"\x10")),
        "weights: TMP/kept/x.safetensors cannot be read (...); get it again"),
    "a cache of another program": (cache(lambda path: save_file({"a": torch.zeros(1)}, path)),
        "weights: TMP/kept/x.safetensors is damaged (its checksum does not fit); get it again"),
    "a crafted cache": (cache(crafted),
        "weights: TMP/kept/x.safetensors holds no cached result of this project; get it again"),
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
        "runs_dir: the features of resnet50 and resnet18 need 0.05 GB, but TMP/runs/tiny has 0.03 GB left; "
        "free space, choose another folder, or lower teacher_size or teacher_views"),
    # papermill calls
    "a typing mistake in a notebook": (lambda w: notebook_settings(
        {"In": ["# Parameters\ntemprature = 3"], "profile": w.profile(), "temprature": 3}),
        "parameter: there is no setting 'temprature'; did you mean 'temperature'?"),
    "an impossible value in a notebook": (lambda w: notebook_settings(
        {"In": ["# Parameters\nalpha = 3"], "profile": w.profile(), "alpha": 3}),
        "alpha: 3 is not valid; use a number from 0 to 1"),
    "a parameter that is a program": (lambda w: pipeline.run(w.profile(), {"x = 1\nimport os\nos.abort()\ny": 3}),
        "parameter: there is no setting 'x = 1\\nimport os\\nos.abort()\\ny'; the settings are: profile, data, ..."),
    "a profile that is a program": (lambda w: pipeline.run('demo"\nimport os\nos.abort()\n"', {}),
        "profile: 'demo\"\\nimport os\\nos.abort()\\n\"' does not exist; use cifar10, ..., or the path of ..."),
    "a kernel that dies": (lost_kernel,
        "01_small_cnn lost its Python kernel (Kernel died); if memory ran out, lower teacher_size, teacher_views "
        "or feature_memory_gb (what had run: TMP/runs/tiny/notebooks/01_small_cnn.ipynb)"),
    # reports
    **{f"{name} without a run": (command(name),
        "results: there is no TMP/runs/tiny/results.csv; run the notebooks first (python -m kdutils run, with the same profile)")
       for name in ("report", "results")},
    "a PDF of nothing": (lambda w: w.command("report", "--pdf-only", "--out", str(w.tmp)),
        "report: TMP/generated holds nothing to typeset; run `make report` first"),
    "a report of other settings": (lambda w: (found(w), w.command("report", "--profile", w.profile(), "-p", "alpha", "0.25")),
        "report: TMP/runs/tiny was last run with other settings; run it again with these, or report with: python "
        "-m kdutils report --profile TMP/tiny.yaml"),
    "results changed by hand": (lambda w: pipeline.export(found(w, results_csv=lambda text: text.replace("0.5", "0.9")), w.tmp),
        "report: TMP/runs/tiny/results.csv changed after the last run (its checksum differs); run the "
        "notebooks again: python -m kdutils run --profile TMP/tiny.yaml"),
    "a cut provenance": (lambda w: pipeline.export(found(w, provenance_json=lambda text: text[:50]), w.tmp),
        "report: TMP/runs/tiny/provenance.json is missing or damaged; run the notebooks again (python -m kdutils "
        "run)"),
    "notebooks that are gone": (lambda w: pipeline.export(found(w), w.tmp),
        "report: TMP/runs/tiny/notebooks/01_small_cnn.ipynb, "
        "TMP/runs/tiny/notebooks/02_two_big_cnns.ipynb, TMP/runs/tiny/notebooks/03_one_teacher.ipynb, "
        "TMP/runs/tiny/notebooks/04_two_teachers.ipynb missing; run the notebooks again: python -m kdutils run --profile TMP/tiny.yaml"),
    "a notebook that failed": (notebook(FAILED, execution_count=1),
        "notebook: TMP/a.ipynb, cell 1 failed (ZeroDivisionError: by 0); fix it and run it again"),
    "a notebook that was not run": (notebook(),
        "notebook: TMP/a.ipynb, cell 1 has not been run; run the notebook to its end first"),
    "a figure's name with a space": (lambda w: show_table(None, "my table", "caption"),
        "name: 'my table' is not valid; use only a-z, 0-9 and -, such as curves-scratch"),
    "a README without marks": (lambda w: update_readme(a_path(w.tmp / "README.md"), {}),
        "README: TMP/README.md needs one line <!-- results:begin --> and, after it, one line <!-- results:end -->"),
    # the other commands
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


@pytest.mark.parametrize("arguments, what", [
    (["run", "--profile", "demo", "-p", "alpha", "1.5"], "alpha above 1"),
    (["report", "--profile", "demmo"], "an unknown profile"),
    (["bench", "--profile", "demo", "-p", "epohcs", "3"], "a bench of nothing"),
])  # fmt: skip
def test_the_command_line_says_the_same_with_exit_status_1(tmp_path, arguments, what):
    """As a process of its own, from any folder: nothing but that line, and nothing left behind."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdutils", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert (ran.returncode, ran.stdout) == (1, "") and matches(ran.stderr, f"error: {BAD[what][1]}\n", tmp_path)
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
    for path in (ROOT / "kdutils").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called, named = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads")
                assert "shell" not in named, (path, called)
                assert called != "torch.load" or named["weights_only"] == "True"
                assert called != "yaml.load" or named["Loader"] == "_UniqueKeyLoader"
