"""kdutils.models: the student's size, ResNets cut into two parts that compute the same, weights read safely."""

import copy
import http.client
import pickle
import re
import urllib.error
import urllib.request
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import message_of, random_resnet
from safetensors.torch import save_file
from torch import nn
from torchsummary import summary
from torchvision import models as zoo

from kdutils import layer_table
from kdutils.models import (
    MEAN,
    STD,
    Resize,
    SmallCNN,
    backbone_source,
    cut,
    depthwise_in_float32,
    fold_batch_norms,
    load_backbone,
    normalise,
    read_state,
    with_state,
)

ARCHES = ("resnet18", "resnet50")
TRAINED = ("last_layer", "last_block", "all")


made = cache(random_resnet)


def images(count=2, size=32):
    generator = torch.Generator().manual_seed(0)
    return normalise(torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8))


def close(found, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def test_the_student_has_268650_parameters():
    assert sum(p.numel() for p in SmallCNN().parameters()) == 268_650
    assert SmallCNN()(images()).shape == (2, 10) and SmallCNN(7)(images()).shape == (2, 7)


def test_normalised_pixels():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = normalise(pixels)
    expected = torch.stack([(pixels[:, c] / 255.0 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_tables_say_what_torchsummary_prints(capsys):
    summary(SmallCNN(), (3, 32, 32), device="cpu")
    printed = capsys.readouterr().out
    layers, memory = layer_table(SmallCNN(), (3, 32, 32))
    rows = re.findall(r"^ +(\w+-\d+) +(\[[^\]]*\]) +([\d,]+)$", printed, re.MULTILINE)
    assert [tuple(row) for row in layers[["Layer", "Output shape", "Parameters"]].to_numpy()[:-1]] == rows
    total = re.search(r"Total params: ([\d,]+)", printed)[1]
    assert layers.iloc[-1].tolist() == ["Total", "", total] and total == "268,650"
    megabytes = re.findall(r"\(MB\): ([\d.]+)", printed)
    assert len(megabytes) == 4 and memory["MB"].tolist() == megabytes


@pytest.mark.parametrize("mode, tolerance", [("bilinear", 1e-4), ("bicubic", 0.1), ("nearest", 1e-4)])
def test_resize_has_three_modes_and_leaves_its_own_size_alone(mode, tolerance):
    x, found = images(), Resize(64, mode)(images())
    assert found.shape == (2, 3, 64, 64) and torch.equal(Resize(32, mode)(x), x)
    others = [Resize(64, other)(x) for other in ("bilinear", "bicubic", "nearest") if other != mode]
    assert all((found - other).abs().max() > 0.1 for other in others)
    slope = torch.arange(32.0).expand(1, 3, 32, 32)  # stays one but for its ends (nearest: in steps)
    expected = (torch.arange(64.0) + 0.5) / 2 - 0.5
    expected = (expected.round() if mode == "nearest" else expected)[4:-4].expand(1, 3, 64, 56)
    torch.testing.assert_close(Resize(64, mode)(slope)[..., 4:-4], expected, rtol=0, atol=tolerance)
    assert torch.equal(cut(made("resnet18"), "last_block", 64, 10, 0, resize=mode)[0].resize(x), found)


@pytest.mark.parametrize("trainable", TRAINED)
def test_a_standardised_last_layer_is_given_features_of_mean_0_and_variance_1(trainable):
    frozen, trained = cut(copy.deepcopy(made("resnet18")), trainable, 32, 10, seed=0, standardize=True)
    plain = cut(made("resnet18"), trainable, 32, 10, seed=0)[1]
    assert [p.shape for p in trained.parameters()] == [p.shape for p in plain.parameters()]
    assert (len(trained) == 2) == (trainable == "last_layer") and torch.equal(trained.fc.weight, plain.fc.weight)
    given = []
    trained.standardize.register_forward_hook(lambda module, inputs, output: given.extend((*inputs, output)))
    trained.train()(frozen(images(30)))
    before, after = given
    assert after.mean(dim=0).abs().max() < 1e-3
    variance = before.var(dim=0, correction=0)  # some are 0 behind a ReLU, and stay 0
    expected = variance / (variance + trained.standardize.eps)
    torch.testing.assert_close(after.var(dim=0, correction=0), expected, rtol=0.01, atol=0.01)
    assert expected.max() > 0.99


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("trainable", TRAINED)
@torch.no_grad()
def test_both_parts_and_the_whole_network_agree(arch, trainable, standardize):
    model, x = made(arch), images()
    frozen, trained = cut(model, trainable, 48, 10, seed=3, standardize=standardize)
    whole = copy.copy(model)
    whole._modules = {**model._modules, "fc": nn.Identity()}
    features = whole(F.interpolate(x, (48, 48), mode="bilinear", align_corners=False))
    if standardize:
        norm, generator = trained.standardize, torch.Generator().manual_seed(5)
        norm.running_mean.normal_(0, 0.5, generator=generator)
        norm.running_var.uniform_(0.2, 2, generator=generator)
        features = (features - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    expected = features @ trained.fc.weight.T + trained.fc.bias
    close(trained.eval()(frozen(x)), expected, 1e-4)
    folded = fold_batch_norms(copy.deepcopy(frozen))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    close(trained(folded(x)), expected, 1e-4)


@pytest.mark.parametrize("arch, trainable, count", [
    ("resnet50", "last_layer", 20_490), ("resnet18", "last_block", 8_393_728 + 5_130), ("resnet18", "all", 11_181_642),
])  # fmt: skip
def test_what_is_trained(arch, trainable, count):
    frozen, trained = cut(made(arch), trainable, 64, 10, seed=0)
    assert sum(p.numel() for p in trained.parameters()) == count
    assert all(p.requires_grad for p in trained.parameters()) and not any(p.requires_grad for p in frozen.parameters())
    if trainable == "all":
        assert len(frozen) == 0 and trained.eval()(images()).shape == (2, 10)


def test_the_frozen_part_stays_as_it_is():
    frozen, trained = cut(copy.deepcopy(made("resnet18")), "last_block", 32, 10, seed=0)
    before = copy.deepcopy(frozen.state_dict())
    trained.train()
    assert not any(module.training for module in frozen.modules())
    trained(frozen(images())).square().mean().backward()
    assert all(p.grad is None for p in frozen.parameters()) and all(p.grad is not None for p in trained.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_the_new_last_layer_is_seeded_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    one, again, other = (cut(made("resnet18"), "last_layer", 32, 10, seed)[1].fc.weight for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (10, 512)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def weights(tmp_path):
    """A folder with resnet18's state dict as .safetensors (with a header)."""
    header = {"description": "random weights of a test", "standin": "true"}
    save_file(made("resnet18").state_dict(), tmp_path / "resnet18.safetensors", metadata=header)
    return tmp_path


@pytest.mark.parametrize("form, is_standin, words", [
    ("safetensors", True, "random weights of a test"), ("pth", False, "resnet18.pth"),
])  # fmt: skip
def test_weights_of_a_folder(weights, form, is_standin, words):
    if form == "pth":
        (weights / "resnet18.safetensors").unlink()
        torch.save(made("resnet18").state_dict(), weights / "resnet18.pth")
    found, expected = load_backbone("resnet18", str(weights)).state_dict(), made("resnet18").state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in found if not name.startswith("fc."))
    source = backbone_source("resnet18", str(weights))
    assert source.is_standin == is_standin and words in source.description


@pytest.mark.parametrize("width", [None, 10, 200])
def test_a_last_layer_of_any_width_is_dropped_and_half_precision_becomes_float32(width):
    state = {name: tensor.half() for name, tensor in made("resnet18").state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    if width:
        state |= {"fc.weight": torch.zeros(width, 512), "fc.bias": torch.zeros(width)}
    model = with_state("resnet18", state)
    assert torch.equal(model.conv1.weight, state["conv1.weight"].float()) and model.fc.weight.abs().sum() > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("arch, of, change, fragment", [
    ("resnet18", "resnet50", lambda state: state, "resnet18"),
    ("resnet50", "resnet18", lambda state: state, "resnet50"),
    ("resnet18", "resnet18", lambda state: {f"module.{n}": t for n, t in state.items()}, "conv1.weight"),
    ("resnet18", "resnet18", lambda state: {}, "conv1.weight"),
    ("resnet18", "resnet18", lambda state: {n: state[n] for n in state if n != "layer1.0.bn1.bias"}, "1.0.bn1.bias"),
    ("resnet18", "resnet18", lambda state: {**state, "layer9.x": torch.zeros(1)}, "layer9.x"),
])  # fmt: skip
def test_weights_of_another_network_are_named(arch, of, change, fragment):
    message = message_of(with_state, arch, change(made(of).state_dict()))
    assert message.startswith("weights: ") and arch in message and fragment in message


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
    one, other = (load_backbone("resnet18", "none") for _ in range(2))
    assert torch.equal(one.conv1.weight, other.conv1.weight)
    assert "not pretrained" in backbone_source("resnet18", "none").description


@pytest.mark.parametrize("error", [
    urllib.error.URLError("Name or service not known"), TimeoutError("timed out"), ConnectionResetError("reset"),
    http.client.IncompleteRead(b"half"),
], ids=lambda error: type(error).__name__)  # fmt: skip
@pytest.mark.parametrize("arch", ARCHES)
def test_imagenet_weights_without_a_network(tmp_path, monkeypatch, arch, error):
    def urlopen(*_, **__):
        raise error

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for module in (urllib.request, torch.hub):
        monkeypatch.setattr(module, "urlopen", urlopen)
    message = message_of(load_backbone, arch, "imagenet")
    assert message.startswith("weights: ") and "cannot be downloaded" in message
    assert f"https://download.pytorch.org/models/{arch}-" in message and f"{arch}.pth" in message
    assert "generated" in message


@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_a_damaged_download_of_earlier_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / zoo.ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert message_of(load_backbone, "resnet18", "imagenet").startswith("weights: ")


class PaddedConv(nn.Conv2d):
    """A convolution which pads by its own rule, as those of networks converted from TensorFlow do."""

    def forward(self, x):
        return self._conv_forward(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def depthwise(kind=nn.Conv2d, kernel=5, stride=1):
    torch.manual_seed(kernel)
    return nn.Sequential(kind(8, 8, kernel, stride, padding=kernel // 2, groups=8), nn.BatchNorm2d(8))


def values_and_gradients(network, x, *, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = network(x)
    y.float().square().sum().backward()
    return y, x.grad, *(parameter.grad for parameter in network.parameters())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("kind", "kernel", "stride"), [(nn.Conv2d, 3, 1), (nn.Conv2d, 5, 1), (PaddedConv, 5, 2)])
def test_a_depthwise_convolution_in_float32_gives_the_same_numbers(kind, kernel, stride, autocast):
    network, x = depthwise(kind, kernel, stride), torch.randn(4, 8, 8, 8)
    expected = values_and_gradients(copy.deepcopy(network), x, autocast=False)
    got = values_and_gradients(depthwise_in_float32(network), x, autocast=autocast)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_depthwise_convolution_in_float32_gives_bfloat16_for_bfloat16():
    conv, x = depthwise()[0], torch.randn(4, 8, 8, 8).bfloat16()
    expected = conv(x.float()).bfloat16()
    network = depthwise_in_float32(conv)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), expected)


def test_depthwise_in_float32_keeps_the_state_dict_and_other_convolutions():
    network = nn.Sequential(depthwise(PaddedConv), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=4))
    names, kinds = list(network.state_dict()), [type(module) for module in network.modules()]
    assert depthwise_in_float32(depthwise_in_float32(network)) is network
    assert list(network.state_dict()) == names
    changed = [module for module, kind in zip(network.modules(), kinds, strict=True) if type(module) is not kind]
    assert changed == [network[0][0]] and isinstance(changed[0], PaddedConv)
    x = torch.randn(2, 8, 8, 8)
    assert torch.equal(copy.deepcopy(network)(x), network(x))
