"""Independent jobs: in threads or processes of this machine, or on a Dask cluster.

`side_by_side` runs any functions in threads. `run_jobs` wants jobs that can be pickled: `functools.partial` of a
module's function and plain arguments. They return something small and keep the rest as cached results, so that a job
that is repeated resumes.
"""

import concurrent.futures
import contextlib
import contextvars
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from kdutils.progress import progress_lines
from kdutils.settings import UserError

Jobs = Mapping[str, Callable[[], Any]]
Outcome = tuple[Any, str | None]  # a result, or the reason why there is none
Outcomes = Generator[tuple[str, Outcome], None, None]  # by the names of the jobs, in the order in which they end
Result = TypeVar("Result")

_stop = threading.Event()


class Stopped(Exception):
    """A job beside this one failed, or somebody interrupted the program."""


def check_stopped() -> None:
    """Raise `Stopped` where a job that runs side by side with others has to end; a training asks at every step."""
    if _stop.is_set():
        raise Stopped


def side_by_side(jobs: Sequence[Callable[[], Result]], device: str) -> list[Result]:
    """The results of the jobs, in their order. On a CPU as many run at once as torch has threads, which they share;
    else one after the other.

    Threads are enough: torch lets others run while it computes. A small network gains more from a second training than
    from a second thread. Numbers are those of the same jobs in order, with as many threads each. The first failure
    stops the others at their next step, and is raised.
    """
    threads = torch.get_num_threads()
    workers = min(len(jobs), threads) if device == "cpu" else 1
    if workers < 2:
        return [job() for job in jobs]

    def run(job: Callable[[], Result]) -> Result:
        check_stopped()
        torch.set_num_threads(threads // workers)  # holds for this thread and, on some platforms, for all
        return job()

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        # the context tells a notebook which cell prints
        futures = [pool.submit(contextvars.copy_context().run, run, job) for job in jobs]
        try:
            concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        finally:
            _stop.set()
            pool.shutdown(wait=True)
            _stop.clear()
            torch.set_num_threads(threads)
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, Stopped):
            raise error
    return [future.result() for future in futures]


def run_jobs(jobs: Jobs, workers: int = 1, scheduler: str | None = None, title: str = "jobs") -> dict[str, Any]:
    """The results of all jobs by name, in the order of the jobs.

    workers: 1 for this process; more for as many processes, which share torch's threads. scheduler: the address of a
    Dask cluster that runs the jobs instead; its machines share the run folder with this one and have this project
    installed. A job that fails, or whose process dies, is named and tried once more after the others.

    Raises `UserError` for a cluster that cannot be used and, at the end, for jobs that failed twice.
    """
    if scheduler is None and workers < 1:
        raise UserError(f"workers: {workers} is not valid; use a whole number, 1 or more")
    results: dict[str, Any] = {}
    left = dict(jobs)
    for next_step in ("it is tried again later", "this was the second time"):
        reasons: dict[str, str] = {}
        with contextlib.closing(_outcomes(left, workers, scheduler)) as outcomes:
            for _, (name, (result, reason)) in zip(progress_lines(range(len(left)), title), outcomes):
                if reason is None:
                    results[name] = result
                else:
                    reasons[name] = reason
                    print(f"{name}: failed: {reason}; {next_step}")
        left = {name: jobs[name] for name in reasons}
        if not left:
            return {name: results[name] for name in jobs}
    failed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UserError(f"{title}: {len(left)} of {len(jobs)} failed twice ({failed}); the others are done and kept")


def check_cluster(scheduler: str) -> None:
    """Raise `UserError` unless a Dask cluster can be used at this address."""
    _client(scheduler).close()


def _outcomes(jobs: Jobs, workers: int, scheduler: str | None) -> Outcomes:
    if scheduler:
        return _on_cluster(jobs, scheduler)
    return _in_processes(jobs, workers) if workers > 1 else ((name, _attempt(job)) for name, job in jobs.items())


def _attempt(job: Callable[[], Any]) -> Outcome:
    try:
        return job(), None
    except UserError as error:
        return None, str(error)
    except Exception as error:
        traceback.print_exc()
        return None, _one_line(error)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _in_processes(jobs: Jobs, workers: int) -> Outcomes:
    """In processes that do one job after another. One that dies fails its own job alone, and another replaces it.

    A pool of `concurrent.futures` or joblib would fail every unfinished job, and outlive this process if it is killed.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads as they are
    threads = max(1, torch.get_num_threads() // workers)
    waiting = list(jobs.items())[::-1]
    idle: list[tuple[Connection, BaseProcess]] = []
    busy: dict[Connection, tuple[str, BaseProcess]] = {}

    def start() -> tuple[Connection, BaseProcess]:
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        process.start()
        theirs.close()  # the process has the only one now: when it dies, the pipe ends
        return mine, process

    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                pipe, process = idle.pop() if idle else start()
                name, job = waiting.pop()
                busy[pipe] = name, process
                with contextlib.suppress(BrokenPipeError):  # it died: the end of its pipe is read below
                    pipe.send(job)
            ready: list[Any] = wait(list(busy))
            for pipe in ready:
                name, process = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                    idle.append((pipe, process))
                except (EOFError, ConnectionResetError):
                    process.join()
                    outcome = None, f"its process ended with status {process.exitcode}"
                yield name, outcome
    finally:
        for _, process in [*idle, *busy.values()]:
            process.terminate()
            process.join()


def _serve(pipe: Connection, threads: int) -> None:
    """The life of a worker process. It prints no progress. When its parent is gone, it ends after the current job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that one is told, and ends this one
    os.environ.pop("KDUTILS_PROGRESS", None)
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_attempt(pipe.recv()))


def _on_cluster(jobs: Jobs, address: str) -> Outcomes:
    """On a Dask cluster, which gives the job of a lost worker to another one."""
    with _client(address) as client:
        from distributed import as_completed

        names = {client.submit(_attempt, job, pure=False): name for name, job in jobs.items()}
        for future in as_completed(list(names), loop=client.loop):
            name = names.pop(future)
            try:
                outcome = future.result()
            except Exception as error:  # a job that several workers died of, or that they cannot load
                outcome = None, _one_line(error)
            future.release()  # else it would be repeated if the worker that holds its result were lost
            yield name, outcome


def _client(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "scheduler: the package 'distributed' is not installed; a Dask cluster needs it; "
            "type: pip install distributed"
        ) from error
    try:
        return Client(address, timeout="5s", set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"scheduler: no Dask scheduler answers at {address!r} ({type(error).__name__}); "
            "give the address that `dask scheduler` prints, such as tcp://HOST:8786"
        ) from error
