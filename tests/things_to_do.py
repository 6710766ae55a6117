"""What test_parallel.py has done in worker processes, which import it from here (and nothing slow with it)."""

import os
import signal
import time

import torch

from kdutils.cache import cached
from kdutils.settings import UserError


def square(number):
    return number**2


def about_the_process():
    return os.getpid(), torch.get_num_threads(), os.environ.get("KDUTILS_PROGRESS")


def log(folder, line):
    with (folder / "log").open("a") as file:
        file.write(f"{line}\n")


def lines(folder, start=""):
    path = folder / "log"
    return [line for line in path.read_text().splitlines() if line.startswith(start)] if path.exists() else []


def fail_at_first(folder, name, how=None):
    marker = folder / f"{name}-failed"
    if how is not None and not marker.exists():
        marker.touch()
        how()
    log(folder, name)
    return name


def refuse():
    raise UserError("learning_rate: too high")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def divide():
    return 1 / 0


def make_after_go(folder, number):
    """A cached result, as in earnest; made only when the test has killed whom it wants to kill."""
    log(folder, f"begun {number} {os.getpid()}")
    wait_for(lambda: (folder / "go").exists())

    def make():
        log(folder, f"made {number}")
        return {"value": torch.tensor([number])}, {"number": number}

    return cached(folder / "cached", f"job{number}", {"number": number}, make).facts["number"]


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
