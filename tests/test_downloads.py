"""CIFAR-10 and torchvision's ImageNet weights by download, from a server on this machine: found, damaged, cut off."""

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from conftest import message_of
from served.sitecustomize import download_from

from kdutils import weights
from kdutils.__main__ import main
from kdutils.cache import lock, network_timeout
from kdutils.compat import ensure_torchvision
from kdutils.data import images
from kdutils.data.images import load_data
from kdutils.results.record import read_provenance, read_results
from kdutils.settings import ROOT, read_profile
from kdutils.weights import load_pretrained, seeded, weights_source

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
TRAIN = [f"data_batch_{number}" for number in range(1, 6)]
EACH = 40  # images in each of the six batches
ARCHIVE, FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` (by name) on a port of its own; `fault` says what goes wrong, `asked` lists what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.fault, self.over = {}, [], None, threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def close(self):
        self.over.set()
        self.shutdown()
        self.server_close()


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, server = self.path.lstrip("/"), self.server
        server.asked.append(name)
        content = None if server.fault == "404" else server.files.get(name)
        if content is None:
            return self.send_error(404)
        if server.fault == "another file":
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = content[: len(content) // 2] if server.fault in ("breaks off", "stalls") else content
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(ConnectionError):  # torchvision looks where an address leads, and reads no further
            self.wfile.write(part)
            self.wfile.flush()
            if server.fault == "stalls":
                server.over.wait()

    def log_message(self, *_):
        pass


FAULTS = {
    "404": "HTTP Error 404: Not Found",
    "breaks off": "cut off or altered",
    "stalls": "timed out",
    "another file": "cut off or altered",
}


def cifar10_archive():
    """The archive, in the layout of the original, and what torchvision has to know of it."""
    numbers = np.random.default_rng(0)
    files = {}
    for name in [*TRAIN, "test_batch"]:
        data = numbers.integers(0, 256, (EACH, 3 * 32 * 32), dtype=np.uint8)
        files[name] = pickle.dumps({"data": data, "labels": [i % 10 for i in range(EACH)]}, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES}, protocol=2)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    facts = {
        "tgz_md5": hashlib.md5(archive.getvalue()).hexdigest(),
        "train_list": [[name, md5[name]] for name in TRAIN],
        "test_list": [["test_batch", md5["test_batch"]]],
        "meta": meta,
    }
    return archive.getvalue(), facts


def weights_file(arch):
    """A state dict with random weights, named as torchvision names its own: with the start of its SHA-256."""
    content = io.BytesIO()
    torch.save(seeded(1, ensure_torchvision().models.get_model, arch).state_dict(), content)
    return f"{arch}-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth", content.getvalue()


@pytest.fixture(scope="module")
def cifar10():
    return cifar10_archive()


@pytest.fixture(scope="module")
def resnet18():
    return weights_file("resnet18")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server that torchvision's downloads go to, whatever proxy there is."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    server = Server()
    for module in (images, weights):
        monkeypatch.setattr(
            module, "network_timeout", lambda: network_timeout(1.0 if server.fault == "stalls" else 30.0)
        )
    yield server
    server.close()


@pytest.fixture
def load_cifar10(server, cifar10, monkeypatch, tmp_path, tiny):
    server.files[ARCHIVE], facts = cifar10
    download_from({"url": server.url(ARCHIVE), **facts}, {}, monkeypatch.setattr)
    return lambda: load_data(tiny(data="cifar10", data_dir=str(tmp_path / "data")))


@pytest.fixture
def load_resnet18(server, resnet18, monkeypatch):
    name, content = resnet18
    server.files[name] = content
    download_from({}, {"resnet18": server.url(name)}, monkeypatch.setattr)
    return lambda: load_pretrained("resnet18", "imagenet")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def test_cifar10_is_downloaded_once(server, load_cifar10, tmp_path, capsys):
    first = load_cifar10()
    assert first.is_cifar10 and first.name == "CIFAR-10" and first.classes == CLASSES
    assert first.train.labels.bincount().tolist() == [4] * 10
    asked = len(server.asked)
    assert asked and set(server.asked) == {ARCHIVE}
    batch = pickle.loads((tmp_path / "data" / FOLDER / "test_batch").read_bytes())["data"].reshape(-1, 3, 32, 32)
    assert all((batch == image.numpy()).all(axis=(1, 2, 3)).sum() == 1 for image in first.test.images)
    server.close()
    assert load_cifar10().checksum == first.checksum
    (tmp_path / "data" / ARCHIVE).unlink()  # it is not needed any more
    assert load_cifar10().checksum == first.checksum
    assert len(server.asked) == asked and capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [empty, cut, alter])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_of_cifar10_is_told_and_unpacked_again(server, load_cifar10, tmp_path, capsys, name, damage):
    first = load_cifar10()
    path = tmp_path / "data" / FOLDER / name
    damage(path)
    server.fault = "404"  # the archive is there
    assert load_cifar10().checksum == first.checksum
    told = f"data: {path} is cut off or damaged (its checksum does not match); unpacked again\n"
    assert capsys.readouterr().out == told
    assert load_cifar10().checksum == first.checksum and capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [empty, cut, alter])
def test_a_damaged_archive_of_cifar10_is_told_and_downloaded_again(load_cifar10, tmp_path, capsys, damage):
    first = load_cifar10()
    shutil.rmtree(tmp_path / "data" / FOLDER)
    path = tmp_path / "data" / ARCHIVE
    damage(path)
    assert load_cifar10().checksum == first.checksum
    told = f"data: {path} is cut off or damaged (its checksum does not match); downloaded again\n"
    assert capsys.readouterr().out == told


def test_a_file_of_cifar10_that_was_removed_is_unpacked_again(server, load_cifar10, tmp_path):
    first = load_cifar10()
    for name in ("data_batch_5", "batches.meta"):  # as after a kill while the archive was unpacked
        (tmp_path / "data" / FOLDER / name).unlink()
        server.fault = "404"
        assert load_cifar10().checksum == first.checksum


@pytest.mark.parametrize("fault", FAULTS)
def test_cifar10_from_a_server_that_fails(server, load_cifar10, tmp_path, fault):
    server.fault = fault
    for _ in range(2):  # what is there of the first try does not count as whole in the second
        message = message_of(load_cifar10)
        assert message.startswith("data: CIFAR-10 ") and FAULTS[fault] in message and "run again" in message
        assert str(tmp_path / "data") in message and ARCHIVE in message and "shapes10" in message
        assert not (tmp_path / "data" / FOLDER).exists()
    server.fault = None
    assert load_cifar10().is_cifar10


def test_cifar10_into_a_folder_that_cannot_be_written_to(load_cifar10, tmp_path):
    (tmp_path / "data").write_text("a file")
    assert message_of(load_cifar10).startswith("data_dir: cannot write to ")


def test_two_runs_download_cifar10_once(server, load_cifar10, tmp_path, capfd):
    """The second waits at the lock; then all is there."""
    with lock(tmp_path / "data" / ARCHIVE):
        second = threading.Thread(target=load_cifar10)
        second.start()
        while "waiting for" not in "".join(capfd.readouterr()):
            second.join(0.01)
            assert second.is_alive()
        with tarfile.open(fileobj=io.BytesIO(server.files[ARCHIVE])) as tar:
            tar.extractall(tmp_path / "data")
        (tmp_path / "data" / ARCHIVE).write_bytes(server.files[ARCHIVE])
    second.join()
    assert not server.asked and load_cifar10().is_cifar10


def same(model, content):
    served = torch.load(io.BytesIO(content), weights_only=True)
    return all(torch.equal(tensor, served[name]) for name, tensor in model.state_dict().items() if "fc" not in name)


def checkpoints(tmp_path):
    return [path.name for path in (tmp_path / "torch" / "hub" / "checkpoints").iterdir()]


def test_imagenet_weights_are_downloaded_once(server, load_resnet18, resnet18, tmp_path, capsys):
    name, content = resnet18
    assert same(load_resnet18(), content)
    assert server.asked == [name] == checkpoints(tmp_path)
    path = tmp_path / "torch" / "hub" / "checkpoints" / name
    assert capsys.readouterr().out == f"weights: downloading {server.url(name)} to {path}\n"
    server.close()
    assert same(load_resnet18(), content) and capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", [empty, cut, alter])
def test_damaged_imagenet_weights_are_told_and_downloaded_again(
    server, load_resnet18, resnet18, tmp_path, capsys, damage
):
    name, content = resnet18
    path = tmp_path / "torch" / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    damage(path)
    assert same(load_resnet18(), content) and server.asked == [name] == checkpoints(tmp_path)
    assert capsys.readouterr().out.startswith(
        f"weights: {path} is damaged (its checksum does not match); downloaded again\n"
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_imagenet_weights_from_a_server_that_fails(server, load_resnet18, resnet18, tmp_path, fault):
    name, content = resnet18
    server.fault = fault
    message = message_of(load_resnet18)
    assert message.startswith("weights: the ImageNet weights of resnet18 ") and FAULTS[fault] in message
    assert "run again" in message and server.url(name) in message and "FOLDER/resnet18.pth" in message
    assert checkpoints(tmp_path) == []
    server.fault = None
    assert same(load_resnet18(), content)


def test_without_a_server(server, load_cifar10, load_resnet18):
    server.close()
    for load in (load_cifar10, load_resnet18):
        assert "cannot be downloaded" in message_of(load) and "refused" in message_of(load)


def test_a_network_that_torchvision_has_no_imagenet_weights_of():
    message = message_of(weights_source, "vit_h_14", "imagenet")
    assert message.startswith("weights: torchvision has no weights of vit_h_14 ")


TOY = {
    "train_size": 120, "val_size": 40, "test_size": 40, "max_shift": 0, "shift_step": 1, "seeds": [0], "epochs": 1,
    "unlabelled_epochs": 1, "batch_size": 20, "teacher_size": 32, "teacher_seeds": [0], "teacher_batch_size": 20,
    "device": "cpu", "precision": "float32", "threads": 1,
    "teachers": [{**one, "epochs": 1} for one in read_profile("cifar10")["teachers"]],
}  # fmt: skip


def test_profile_cifar10_from_its_downloads_to_the_report(server, cifar10, resnet18, monkeypatch, tmp_path):
    """The batch run downloads; the notebooks, each in a process of its own, find what is there."""
    server.files[ARCHIVE], facts = cifar10
    files = {"resnet18": resnet18, "resnet50": weights_file("resnet50")}
    server.files |= dict(files.values())
    served = {
        "cifar10": {"url": server.url(ARCHIVE), **facts},
        "weights": {network: server.url(name) for network, (name, _) in files.items()},
    }
    download_from(**served, replace=monkeypatch.setattr)
    (tmp_path / "served.json").write_text(json.dumps(served))
    monkeypatch.setenv("SERVED_DOWNLOADS", str(tmp_path / "served.json"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "served"), str(ROOT)]))
    parameters = {**TOY, "data_dir": str(tmp_path / "data"), "runs_dir": str(tmp_path / "runs")}
    words = ["--profile", "cifar10", *(word for pair in parameters.items() for word in ("-p", pair[0], str(pair[1])))]
    assert main(["run", *words]) == 0
    assert sorted(set(server.asked)) == sorted(server.files)
    assert all(server.asked.count(name) == 1 for name, _ in files.values())
    assert server.asked.count(ARCHIVE) == 2  # torchvision asks first where the address leads
    folder = tmp_path / "runs" / "cifar10"
    results, provenance = read_results(folder), read_provenance(folder)
    assert set(results.task) == {"1", "2", "3", "4"} and provenance["data"]["is_cifar10"]
    known = {facts["checksum"]: facts["is_standin"] for facts in provenance["weights"].values()}
    assert known == {name.rpartition("-")[2].removesuffix(".pth"): False for name, _ in files.values()}
    if shutil.which("latexmk"):
        assert main(["report", *words, "--out", str(tmp_path)]) == 0
        assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
