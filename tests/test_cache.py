"""kdutils.cache: results are made once and trusted only while they fit; results.csv has one order."""

import errno
import json
import multiprocessing
import os
import shlex
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import message_of
from things_to_do import wait_for

from kdutils.cache import Checkpoint, cache_path, cached, check_writable, lock, resumable, write_atomically, write_text
from kdutils.results.record import RESULT_COLUMNS, provenance, record, rerun_command, results_checksum
from kdutils.settings import ROOT, load_settings

TENSORS = {"a": torch.arange(6, dtype=torch.float16).reshape(2, 3), "b": torch.tensor([True, False])}
FACTS = {"history": {"val_accuracy": [0.25, 0.5]}, "name": "é"}


class Maker:
    """Makes the cached result above and counts how often it was asked to."""

    calls = 0

    def __call__(self):
        self.calls += 1
        return dict(TENSORS), FACTS


@pytest.fixture
def make():
    return Maker()


def same(found):
    alike = [found.tensors[n].dtype == t.dtype and torch.equal(found.tensors[n], t) for n, t in TENSORS.items()]
    return found.facts == FACTS and found.tensors.keys() == TENSORS.keys() and all(alike)


def test_made_once_and_loaded_afterwards_whatever_the_order_of_the_key(tmp_path, make):
    keys = {"seed": 0, "data": "d"}, {"data": "d", "seed": 0}
    first, second = (cached(tmp_path / "new", "x", key, make) for key in keys)
    assert make.calls == 1 and same(first) and same(second) and first[2:] == second[2:]


@pytest.mark.parametrize("key", [{"seed": 1}, {"seed": 0, "more": None}, {}, {"seed": 0.5}, {"seed": "0"}])
def test_another_key_is_another_file_and_the_first_is_kept(tmp_path, make, key):
    cached(tmp_path, "x", {"seed": 0}, make)
    (first,) = tmp_path.iterdir()
    before = first.read_bytes()
    cached(tmp_path, "x", key, make)
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 2 and first.read_bytes() == before


def test_a_file_under_anothers_name_is_not_believed(tmp_path, make, capsys):
    for seed in (0, 1):
        cached(tmp_path, "x", {"seed": seed}, make)
    first, second = (cache_path(tmp_path, "x", {"seed": seed}) for seed in (0, 1))
    second.write_bytes(first.read_bytes())
    cached(tmp_path, "x", {"seed": 1}, make)
    assert make.calls == 3 and f"{second.name}: was made under other settings" in capsys.readouterr().out


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path, make, capsys):
    """Byte by byte through the whole file: what is loaded is what was made, or it is made again, with a line."""
    cached(tmp_path, "x", {"seed": 0}, make)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    trusted = []
    for at in range(len(good)):
        calls = make.calls
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x04]) + good[at + 1 :])
        try:
            found = cached(tmp_path, "x", {"seed": 0}, make)
        except Exception as error:
            trusted.append((at, repr(error)))
            continue
        if not same(found):
            trusted.append((at, "loaded as something else"))
        said = capsys.readouterr().out
        assert (path.name in said and "made again" in said) == (make.calls > calls)
    assert trusted == []
    assert make.calls > 1


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, -1])
def test_a_truncated_file_is_made_again_with_a_line(tmp_path, make, capsys, size):
    cached(tmp_path, "x", {"seed": 0}, make)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:size])
    for _ in range(2):  # the second time it is mended
        assert same(cached(tmp_path, "x", {"seed": 0}, make)) and make.calls == 2
    out = capsys.readouterr().out
    assert path.name in out and "made again" in out and out.count("\n") == 1


def test_a_failing_make_leaves_nothing(tmp_path):
    def make():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "x", {}, make)
    assert list(tmp_path.rglob("*")) == []


def test_a_failing_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "results.csv"
    write_text(path, "old")

    def write(temporary):
        temporary.write_text("half of the n")
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, tiny):
    (tmp_path / "file").touch()
    message = message_of(record, tiny(runs_dir=str(tmp_path / "file")), "01", [], {}, [], {})
    assert message.startswith("runs_dir: ") and str(tmp_path / "file") in message and "choose another" in message


def rows(task, arm, seed=0):
    fixed = {"task": str(task), "arm": arm, "teachers": "", "labels": 40, "epochs": 2, "seed": seed, "split": "test"}
    return [{**fixed, "metric": "nll", "value": "2.000000"}, {**fixed, "metric": "accuracy", "value": "0.500000"}]


def test_results_have_the_exact_columns(tiny):
    path = record(tiny(), "01_small_cnn", rows(1, "scratch"), {"data": {"name": "d"}}, [("stage", 1.23456)], {})
    names = "task,arm,teachers,labels,epochs,seed,split,metric,value"
    assert RESULT_COLUMNS == tuple(names.split(","))
    values = "1,scratch,,40,2,0,test,nll,2.000000", "1,scratch,,40,2,0,test,accuracy,0.500000"
    assert path.read_bytes().decode() == "\n".join([names, *values, ""])
    assert (path.parent / "timings.csv").read_text() == "stage,seconds\nstage,1.235\n"
    found = json.loads((path.parent / "provenance.json").read_text())["results"]
    assert found == results_checksum(path.read_text()) != results_checksum(path.read_text() + "\n")


def test_results_are_the_same_bytes_whatever_ran_first(tiny, tmp_path):
    found = {"01_small_cnn": rows(1, "scratch"), "03_one_teacher": rows(3, "kd"), "04_two_teachers": rows(4, "kd_mean")}
    contents = []
    for number, order in enumerate([list(found), list(found)[::-1], [*found, "01_small_cnn"]]):
        settings = tiny(runs_dir=str(tmp_path / f"runs{number}"))
        for name in order:
            facts = {"data": {"name": "d"}} | ({"weights": {}} if name != "01_small_cnn" else {})
            path = record(settings, name, found[name], facts, [(name, 1.0)], {})
        contents.append((path.read_bytes(), (path.parent / "provenance.json").read_bytes()))
    assert contents[0] == contents[1] == contents[2]


def test_what_ran_under_other_settings_is_left_out(tiny, capsys):
    record(tiny(), "01_small_cnn", rows(1, "scratch"), {}, [("old", 1.0)], {})
    path = record(tiny(epochs=3), "03_one_teacher", rows(3, "kd"), {}, [("new", 1.0)], {})
    assert "01_small_cnn" in capsys.readouterr().out
    assert "kd" in path.read_text() and "scratch" not in path.read_text()
    assert "old" not in (path.parent / "timings.csv").read_text()
    path = record(tiny(epochs=3), "01_small_cnn", rows(1, "scratch"), {}, [], {})
    assert path.read_text().count("scratch") == 2 and path.read_text().count("kd") == 2


@pytest.mark.parametrize("before, now, kept", [
    ({"data": "a"}, {"data": "b"}, False), ({"data": "a", "scratch, seed 0": "x"}, {"data": "a", "scratch, seed 0": "y"}, False),
    ({"data": "a"}, {"data": "a", "resnet50 weights": "w"}, True), ({"data": "a", "kd, seed 0": "x"}, {"data": "a"}, True),
])  # fmt: skip
def test_rows_made_of_other_things_are_left_out(tiny, capsys, before, now, kept):
    record(tiny(), "01_small_cnn", rows(1, "scratch"), {}, [], before)
    path = record(tiny(), "03_one_teacher", rows(3, "kd"), {}, [], now)
    assert ("scratch" in path.read_text(), "kd" in path.read_text()) == (kept, True)
    assert ("01_small_cnn" in capsys.readouterr().out) == (not kept)


def test_rows_are_kept_when_only_the_machine_changes(tiny):
    record(tiny(), "01_small_cnn", rows(1, "scratch"), {}, [], {})
    path = record(tiny(threads=1), "03_one_teacher", rows(3, "kd"), {}, [], {})
    assert "scratch" in path.read_text() and "kd" in path.read_text()


@pytest.mark.parametrize("overrides", [
    {}, {"epochs": 3, "seeds": [0]}, {"temperature": 2.5, "data_name": "it's mine; really"},
    {"weights": "none", "teacher_epochs": 3}, {"teachers": ["resnet18", {"name": "resnet50", "label": "R50"}]},
    {"learning_rate": 1e-5, "alpha": 0},
])  # fmt: skip
def test_the_command_of_a_run_runs_it_again(overrides):
    settings = load_settings("demo", **overrides)
    words = shlex.split(rerun_command(settings))
    assert words[:6] == ["python", "-m", "kdutils", "run", "--profile", "demo"]
    given = words[6:]
    assert given[::3] == ["-p"] * (len(given) // 3)
    again = load_settings("demo", **dict(zip(given[1::3], given[2::3], strict=True)))
    assert again.identity() == settings.identity()
    # what the machine chose is named too, so that another one computes in the same precision
    assert set(given[1::3]) - {"precision"} == {
        name for name, value in overrides.items() if value != getattr(load_settings("demo"), name)
    }


def test_numbers_that_yaml_reads_as_text_are_no_parameters_of_the_command(tiny_profile):
    settings = load_settings(tiny_profile(learning_rate="3e-3", temperature=4))
    assert " -p " not in rerun_command(settings)


@pytest.mark.parametrize("overrides", [
    {}, {"data": f"folder:{ROOT}/data/mine"}, {"profile": f"{ROOT}/notebooks/profiles/demo.yaml"},
], ids=["profile", "data", "profile-path"])  # fmt: skip
def test_provenance_holds_no_absolute_path(tmp_path, overrides):
    """Also when folders inside the project were given by their whole path."""
    settings = load_settings(**{"profile": "demo", "runs_dir": str(tmp_path), **overrides})
    found = provenance(settings)
    text = json.dumps(found)
    assert json.loads(text) == found and str(ROOT) not in text and str(tmp_path) not in text


def test_provenance_says_what_the_numbers_depend_on(tiny):
    found = provenance(tiny(epochs=3))
    assert found["settings"]["epochs"] == 3 and "runs_dir" not in found["settings"]
    assert (found["device"], found["precision"]) == ("cpu", "float32")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "commit", "command"} <= set(found)


# Checkpoints, two at once, and disks


def test_a_checkpoint_is_handed_to_the_maker_and_removed_afterwards(tmp_path):
    def interrupted(checkpoint):
        assert checkpoint.load() is None
        checkpoint.save({"epoch": 3, "sum": torch.ones(2)})
        raise KeyboardInterrupt

    def resumed(checkpoint):
        state = checkpoint.load()
        return {"sum": state["sum"]}, {"epoch": state["epoch"]}

    with pytest.raises(KeyboardInterrupt):
        resumable(tmp_path, "x", {}, interrupted)
    assert [path.suffix for path in tmp_path.iterdir()] == [".checkpoint"]
    found = resumable(tmp_path, "x", {}, resumed)
    assert found.facts == {"epoch": 3} and torch.equal(found.tensors["sum"], torch.ones(2))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_a_checkpoint_of_another_version_is_not_used(tmp_path, monkeypatch, capsys):
    Checkpoint(tmp_path / "x").save({"epoch": 3})
    monkeypatch.setattr("kdutils.cache.CHECKPOINT_FORMAT", 0)
    assert Checkpoint(tmp_path / "x").load() is None
    assert "x: was written by another version; this training starts anew" in capsys.readouterr().out


def test_without_a_path_there_is_no_checkpoint(monkeypatch):
    monkeypatch.setattr("kdutils.cache.CHECKPOINT_AT_END", 0.0)
    assert Checkpoint(None).load() is None and not Checkpoint(None).is_due(end_of_epoch=True)


def hold(path, pipe):
    """In a process of its own: hold the lock of `path` until told to let go, or killed."""
    with lock(path):
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `x` in the test's folder, and the pipe that tells it to let go."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "x", there))
    process.start()
    assert here.recv() == "held"
    yield process, here
    process.kill()
    process.join()


@pytest.mark.parametrize("end", ["it lets go", "it is killed"])
def test_who_comes_second_is_told_who_is_at_work_and_waits(tmp_path, holder, capsys, end):
    process, pipe = holder
    order = []

    def second():
        with lock(tmp_path / "x"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    while not (said := capsys.readouterr().out):
        thread.join(0.05)
    assert said.count("\n") == 1 and str(tmp_path / "x") in said and "waiting for process" in said
    assert f"process {process.pid} on {socket.gethostname()} (since " in said
    order.append("first")
    pipe.send("go") if end == "it lets go" else process.kill()
    thread.join()
    assert order == ["first", "second"] and list(tmp_path.iterdir()) == []


def test_who_waited_loads_what_the_other_made(tmp_path, make, monkeypatch):
    """Threads, each with a lock of its own: the maker, slow until the others wait, is asked once."""
    told = []
    monkeypatch.setattr("kdutils.cache.tell", told.append)

    def slow():
        wait_for(lambda: len(told) == 3)
        return make()

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: cached(tmp_path, "x", {}, slow), range(4)))
    assert make.calls == 1 and len(found) == 4 and all(map(same, found)) and len(list(tmp_path.iterdir())) == 1
    assert len(told) == 3 and all("waiting for " in line for line in told)


def test_in_a_batch_waiting_is_told_in_its_log(tmp_path, holder, monkeypatch, capsys):
    monkeypatch.setenv("KDUTILS_PROGRESS", str(tmp_path / "log"))
    thread = threading.Thread(target=lambda: lock(tmp_path / "x").__enter__())
    thread.start()
    while not (tmp_path / "log").exists():
        thread.join(0.05)
    holder[1].send("go")
    thread.join()
    assert "waiting for process" in (tmp_path / "log").read_text() and capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_where_there_are_no_locks_there_is_a_warning_and_the_work_goes_on(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="no locks here .*two runs at once may make the same twice"):
        assert same(cached(tmp_path, "x", {}, Maker()))
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_half_written_goes_when_it_is_made_again(tmp_path, tiny):
    (tmp_path / ".x-0.abc.tmp").write_text("of another cached result, which may be at work")
    cut_off = tmp_path / f".{cache_path(tmp_path, 'x', {}).stem}.abc.tmp"
    cut_off.write_text("half")
    cached(tmp_path, "x", {}, Maker())
    assert not cut_off.exists() and (tmp_path / ".x-0.abc.tmp").exists()
    folder = tiny().run_folder
    (folder / "found").mkdir(parents=True)
    for name in ("results", "found/01"):
        path = folder / name
        path.with_name(f".{path.name}.abc.tmp").write_text("half")
    record(tiny(), "01", [], {}, [], {})
    check_writable(folder, "runs_dir")
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace("0.500000", "0.900000"), lambda text: "[]"],
                         ids=["cut", "changed", "something else"])  # fmt: skip
def test_a_damaged_record_is_left_out_with_a_line(tiny, capsys, damage):
    record(tiny(), "01_small_cnn", rows(1, "scratch"), {}, [], {})
    path = tiny().run_folder / "found" / "01_small_cnn.json"
    path.write_text(damage(path.read_text()))
    results = record(tiny(), "03_one_teacher", rows(3, "kd"), {}, [], {})
    assert "scratch" not in results.read_text() and results.read_text().count("kd") == 2
    said = capsys.readouterr().out
    assert "leaves out 01_small_cnn" in said and "damaged; run that notebook again" in said
    record(tiny(), "01_small_cnn", rows(1, "scratch"), {}, [], {})
    assert results.read_text().count("scratch") == 2
