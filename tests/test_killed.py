"""Killed anywhere, a run goes on and ends in the same bytes; two runs at once make everything once. `make soak`: more."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

import pytest
import yaml
from conftest import TINY

from kdutils.settings import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", params=[5, pytest.param(200, marks=pytest.mark.soak)])
def runs(request, tmp_path_factory, weights_folder):
    """The folder that one_run.py has filled, after so many kills."""
    if not hasattr(os, "fork"):
        pytest.skip("its runs are forks")
    folder = tmp_path_factory.mktemp("lives")
    profile = folder / "tiny.yaml"
    changes = {"weights": weights_folder, "max_shift": 0, "teachers": ["resnet18", "resnet50"], "teacher_seeds": [0, 1]}
    profile.write_text(yaml.safe_dump(TINY | changes))
    command = [sys.executable, ROOT / "tests" / "one_run.py", profile, str(request.param), "1", folder]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    counts = json.loads((folder / "counts.json").read_text())
    print(counts)
    assert sum(counts["deaths"]) >= request.param and counts["events"] > 100
    return folder


def found(folder):
    """What a run found, but for the times it took; without the commit, as somebody may commit meanwhile."""
    provenance = json.loads((folder / "provenance.json").read_text())
    return {"results.csv": (folder / "results.csv").read_bytes(), "provenance": provenance | {"commit": None}}


def leftovers(folder):
    """But for the lock of a cached result whose maker died after all was done: it is nobody's, and in nobody's way."""
    return [path.name for path in folder.rglob("*") if path.suffix in (".tmp", ".checkpoint", ".views")]


def test_killed_at_random_moments_it_ends_in_the_same_bytes(runs):
    whole = found(runs / "whole" / "tiny")
    assert {line.split(",")[1] for line in whole["results.csv"].decode().splitlines()} >= {
        "scratch",
        "kd",
        "last_layer",
    }
    rounds = sorted(runs.glob("round*"))
    assert rounds
    for folder in rounds:
        assert found(folder / "tiny") == whole and leftovers(folder) == []


def test_two_at_once_make_everything_once(runs):
    said = "".join((runs / f"pair{number}.log").read_text() for number in range(2))
    made = [line.split(": ")[0] for line in said.splitlines() if ": epoch 1/" in line]
    names = ["kd resnet18", "resnet18, last_layer", "scratch"]
    assert sorted(made) == [f"{name}, seed {seed}" for name in names for seed in (0, 1)]
    assert "damaged" not in said and leftovers(runs / "pair") == []
    assert found(runs / "pair" / "tiny") == found(runs / "whole" / "tiny")


@pytest.mark.soak
def test_the_command_itself_killed_at_random_moments(tmp_path):
    """`python -m kdutils run --report`: it alone is killed, and its kernel lives on for a moment; or both, at once."""
    psutil = pytest.importorskip("psutil")
    from test_end_to_end import TINY as SMALL

    def command(name):
        given = [
            word for key, value in {**SMALL, "runs_dir": tmp_path / name}.items() for word in ("-p", key, str(value))
        ]
        return [sys.executable, "-m", "kdutils", "run", "--profile", "demo", *given, "--report"]

    quiet = {"stdout": subprocess.DEVNULL, "cwd": tmp_path, "env": ENVIRONMENT}
    begun = time.monotonic()
    subprocess.run(command("whole"), check=True, **quiet)
    whole, chance, deaths, orphans = time.monotonic() - begun, random.Random(2), [], []
    while sum(deaths) < 20:
        deaths.append(0)
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        while True:
            process = psutil.Popen(command("killed"), **quiet)
            try:
                after = chance.uniform(0, whole / 2) if sum(deaths) < 20 else None
                assert process.wait(after) == 0
                break
            except psutil.TimeoutExpired:
                kernels = process.children(recursive=True)
                process.kill()
                for kernel in kernels if chance.random() < 0.5 else []:
                    kernel.kill()
                process.wait()
                orphans += kernels
                deaths[-1] += 1
                print(f"killed after {after:.1f} of {whole:.1f} s", flush=True)
        one, other = (tmp_path / folder / "demo" for folder in ("whole", "killed"))
        assert found(other) == found(one) and (other / "report.pdf").exists() == (one / "report.pdf").exists()
    assert psutil.wait_procs(orphans, timeout=60)[1] == []  # a kernel whose run was killed ends by itself
