"""kdutils.parallel: every job is done once, wherever it runs and whatever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import message_of
from things_to_do import about_the_process, die, divide, fail_at_first, lines, make_after_go, refuse, square, wait_for

from kdutils import parallel
from kdutils.parallel import check_stopped, run_jobs, side_by_side

NOBODY = "tcp://127.0.0.1:9"


def jobs_that_fail_once(folder, **how):
    return {name: partial(fail_at_first, folder, name, failure) for name, failure in how.items()}


# In threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def meet(barrier, number):
    """The number, once another job has come this far, too."""
    barrier.wait(timeout=10)
    return number, torch.get_num_threads()


def test_jobs_run_side_by_side_share_the_threads_and_come_in_order(two_threads):
    barrier = threading.Barrier(2)
    assert side_by_side([partial(meet, barrier, number) for number in range(4)], "cpu") == [(n, 1) for n in range(4)]
    assert torch.get_num_threads() == 2
    assert side_by_side([torch.get_num_threads], "cpu") == [2]  # alone, it has them all
    assert side_by_side([], "cpu") == []


def test_on_a_gpu_they_run_one_after_the_other_in_this_thread(two_threads):
    here = threading.get_ident()
    assert side_by_side([threading.get_ident] * 3, "cuda") == [here] * 3


def train_until_stopped(started, steps):
    started.set()
    while True:
        check_stopped()
        steps.append(1)
        time.sleep(0.001)


def fail_after(started):
    started.wait(timeout=10)
    refuse()


def test_the_first_failure_stops_the_others_and_is_the_one_that_is_raised(two_threads):
    started, steps, never = threading.Event(), [], []
    jobs = [partial(train_until_stopped, started, steps), partial(fail_after, started), partial(never.append, 1)]
    assert message_of(side_by_side, jobs, "cpu") == "learning_rate: too high"
    assert not never and torch.get_num_threads() == 2
    check_stopped()  # what comes after is not stopped


def test_an_interrupted_program_waits_for_no_training(two_threads, monkeypatch):
    started, steps = threading.Event(), []

    def interrupt(*arguments, **named):
        started.wait(timeout=10)
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel.concurrent.futures, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        side_by_side([partial(train_until_stopped, started, steps)] * 2, "cpu")
    count = len(steps)
    time.sleep(0.05)
    assert len(steps) == count  # both have ended


# In processes


def test_results_come_by_name_in_the_order_of_the_jobs():
    jobs = {str(number): partial(square, number) for number in (3, 1, 2)}
    assert list(run_jobs(jobs).items()) == [("3", 9), ("1", 1), ("2", 4)]
    assert run_jobs({}, 1) == run_jobs({}, 2) == {}


def test_processes_are_others_quiet_and_share_the_threads(monkeypatch, tmp_path):
    monkeypatch.setenv("KDUTILS_PROGRESS", str(tmp_path / "progress"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    found = run_jobs({name: about_the_process for name in "cab"}, 2)
    assert list(found) == ["c", "a", "b"] and {(threads, log) for _, threads, log in found.values()} == {(3, None)}
    processes = {process for process, _, _ in found.values()}
    assert len(processes) <= 2 and os.getpid() not in processes
    for process in processes:  # nothing is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_a_failed_job_is_named_and_tried_once_more_after_the_others(tmp_path, capsys):
    jobs = jobs_that_fail_once(tmp_path, a=None, b=refuse, c=divide, d=None)
    assert run_jobs(jobs) == {name: name for name in jobs}
    assert lines(tmp_path) == ["a", "d", "b", "c"]
    out = capsys.readouterr().out
    assert "b: failed: learning_rate: too high; it is tried again later" in out
    assert "c: failed: ZeroDivisionError: division by zero; it is tried again later" in out


def test_a_process_that_dies_fails_its_own_job_alone(tmp_path, capsys):
    jobs = jobs_that_fail_once(tmp_path, a=None, b=die, c=refuse, d=None)
    assert run_jobs(jobs, 2) == {name: name for name in jobs}
    assert sorted(lines(tmp_path)) == ["a", "b", "c", "d"] and sorted(lines(tmp_path)[2:]) == ["b", "c"]
    out = capsys.readouterr().out
    assert "b: failed: its process ended with status -9; it is tried again later" in out and out.count("failed") == 2


def test_processes_end_with_the_one_that_started_them(tmp_path):
    psutil = pytest.importorskip("psutil")
    jobs = f"{{str(n): partial(make_after_go, Path({str(tmp_path)!r}), n) for n in range(4)}}"
    code = f"from functools import partial\nfrom pathlib import Path\nfrom things_to_do import *\nrun_jobs({jobs}, 2)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", f"from kdutils.parallel import run_jobs\n{code}"], env=environment)
    wait_for(lambda: len(lines(tmp_path, "begun")) == 2)
    processes = [psutil.Process(int(line.split()[2])) for line in lines(tmp_path, "begun")]
    parent.kill()
    parent.wait()
    (tmp_path / "go").touch()
    assert psutil.wait_procs(processes, timeout=60)[1] == [] and len(lines(tmp_path, "begun")) == 2


def test_what_fails_twice_is_named_and_the_others_are_done(tmp_path):
    jobs = {"bad": refuse, **jobs_that_fail_once(tmp_path, a=None, b=None), "worse": divide}
    message = message_of(run_jobs, jobs, title="sweep")
    assert message.startswith("sweep: 2 of 4 failed twice (bad: learning_rate: too high; worse: ZeroDivisionError: ")
    assert lines(tmp_path) == ["a", "b"]


def test_no_process_at_all_is_refused():
    assert message_of(run_jobs, {}, 0) == "workers: 0 is not valid; use a whole number, 1 or more"


@pytest.mark.parametrize("address", [NOBODY, "nonsense://here"])
def test_a_cluster_that_does_not_answer_is_named(address):
    pytest.importorskip("distributed", reason="the optional package distributed is not installed")
    assert address in message_of(run_jobs, {"a": int}, scheduler=address)


def test_without_dask_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "pip install distributed" in message_of(run_jobs, {"a": int}, scheduler=NOBODY)


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed", reason="the optional package distributed is not installed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as found:
        yield found.scheduler_address


def test_a_job_that_fails_on_the_cluster_is_tried_once_more(cluster, tmp_path, capsys):
    assert run_jobs(jobs_that_fail_once(tmp_path, a=None, b=refuse), scheduler=cluster) == {"a": "a", "b": "b"}
    assert "b: failed: learning_rate: too high" in capsys.readouterr().out
    assert "bad: learning_rate" in message_of(run_jobs, {"bad": refuse}, scheduler=cluster)


def test_a_lost_worker_costs_no_job_and_none_is_done_twice(cluster, tmp_path):
    jobs = {str(number): partial(make_after_go, tmp_path, number) for number in range(8)}
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run_jobs, jobs, scheduler=cluster)
        wait_for(lambda: len(lines(tmp_path, "begun")) == 2)
        _, lost, process = lines(tmp_path, "begun")[0].split()
        os.kill(int(process), signal.SIGKILL)
        (tmp_path / "go").touch()
        assert running.result(timeout=120) == {str(number): number for number in range(8)}
    assert sorted(lines(tmp_path, "made")) == [f"made {number}" for number in range(8)]
    assert len(lines(tmp_path, f"begun {lost} ")) == 2  # it was given to another worker
