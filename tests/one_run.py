"""A tiny run from images to results.csv, as a program whose runs are killed: `one_run.py PROFILE KILLS SEED FOLDER`.

Runs it once to its end in FOLDER/whole, then again and again in FOLDER/round1, ..., each time from where a SIGKILL left
it, until there were KILLS of them: at a random event (a training step, or anything done to a file), or after a random
time. Then two at once in FOLDER/pair. Counts go to FOLDER/counts.json, what the two printed to FOLDER/pair<n>.log.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from kdutils import cache
from kdutils.data.images import load_data
from kdutils.losses import cross_entropy, distillation_loss
from kdutils.results.record import finish, student_rows, teacher_rows
from kdutils.settings import load_settings
from kdutils.students import Method, train_students
from kdutils.teachers import fine_tune

torch.set_num_threads(1)  # lives are forks, which other threads do not survive


def run(profile, **overrides):
    """Teacher, students with and without it, and three records, as notebooks 01 to 03 make them."""
    settings = load_settings(profile, **overrides)
    dataset = load_data(settings)
    scratch = train_students(Method("scratch", cross_entropy), dataset, settings)
    finish(settings, "01", student_rows(1, scratch, dataset, settings), dataset, [], [scratch])
    teacher = fine_tune("resnet18", dataset, settings)
    finish(settings, "02", teacher_rows(2, teacher, dataset, settings), dataset, [teacher])
    distil = partial(distillation_loss, temperature=settings.temperature, alpha=settings.alpha)
    students = train_students(Method("kd", distil, (teacher,)), dataset, settings)
    finish(settings, "03", student_rows(3, students, dataset, settings), dataset, [teacher], [scratch, students])


def start(profile, folder, until=None, log=os.devnull):
    """A run in a process of its own, killed at event number `until`: its id, and where it will write its events."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def event(*_):
            nonlocal count
            count += 1
            if count == until:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(name, arguments):
            if name.startswith(("os.", "fcntl.", "shutil.")) or (name == "open" and str(folder) in str(arguments[0])):
                event()

        sys.addaudithook(audit)
        register_optimizer_step_post_hook(event)
        cache.CHECKPOINT_EVERY = cache.CHECKPOINT_AT_END = 0.0
        sys.stdout = open(log, "w", buffering=1)
        try:
            run(profile, runs_dir=str(folder))
            os.write(write, str(count).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    return child, read


def end(child, read, seconds=None):
    """Wait for the end of a run, killed after `seconds`; the number of its events, or None if it was killed."""
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # it may be over: then its answer is there
    status = os.waitpid(child, 0)[1]
    answer = os.read(read, 100)
    os.close(read)
    if not answer and not os.WIFSIGNALED(status):
        raise SystemExit("a life failed; see above")
    return int(answer) if answer else None


def lives(profile, kills, seed, folder):
    """Kill runs so many times; the events of a whole one, and the kills of each."""
    chance = random.Random(seed)
    begun = time.monotonic()
    events = end(*start(profile, folder / "whole"))
    whole = time.monotonic() - begun
    deaths = []
    while sum(deaths) < kills:
        deaths.append(0)
        place = folder / f"round{len(deaths)}"
        while True:
            at_event = sum(deaths) % 3 < 2 and sum(deaths) < kills
            until = chance.randint(1, events // 3) if at_event else None
            seconds = chance.uniform(0, whole / 2) if not at_event and sum(deaths) < kills else None
            if end(*start(profile, place, until), seconds) is not None:
                break
            deaths[-1] += 1
    return {"events": events, "deaths": deaths}


if __name__ == "__main__":
    profile, kills, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    (folder / "counts.json").write_text(json.dumps(lives(profile, kills, seed, folder)))
    for both in [start(profile, folder / "pair", log=folder / f"pair{number}.log") for number in range(2)]:
        end(*both)
