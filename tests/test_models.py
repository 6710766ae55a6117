"""kdutils.models: the student's size, ResNets cut in two without changing what they compute, weights read safely."""

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
from conftest import message_of
from safetensors.torch import save_file
from torch import nn
from torchsummary import summary
from torchvision import models as zoo

from kdutils.models import (
    MEAN,
    STD,
    FewPixelsConv2d,
    Resize,
    SmallCNN,
    architecture,
    backbone_source,
    cut,
    fold_batch_norms,
    layer_table,
    load_backbone,
    normalise,
    read_state,
    seeded,
    with_state,
)

ARCHES = ("resnet18", "resnet50")
TRAINED = ("last_layer", "last_block", "all")


def randomise_norms(model, seed=0):
    """Give every BatchNorm statistics and weights of its own; fresh ones are the identity and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
                module.weight.uniform_(0.5, 1.0, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
    return model


@cache
def made(arch):
    return randomise_norms(seeded(1, getattr(zoo, arch))).eval()


def images(count=2, size=32):
    pixels = torch.randint(
        0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return normalise(pixels)


def close(found, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def test_the_student_has_268650_parameters():
    assert sum(p.numel() for p in SmallCNN().parameters()) == 268_650
    assert SmallCNN()(images()).shape == (2, 10) and SmallCNN(7)(images()).shape == (2, 7)


def test_normalised_pixels():
    pixels = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    found = normalise(pixels)
    expected = torch.stack([(pixels[:, c] / 255.0 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert normalise(pixels.contiguous(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_seeded_weights_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    one, again, other = (seeded(seed, nn.Linear, 4, 3).weight for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("size", [32, 64, 33])
def test_resize_is_bilinear_and_leaves_its_own_size_alone(size):
    x = images()
    found = Resize(size)(x)
    assert found.shape == (2, 3, size, size)
    if size == 32:
        assert torch.equal(found, x)
    else:
        expected = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_resize_has_three_modes(mode):
    x = images()
    found = Resize(64, mode)(x)
    assert found.shape == (2, 3, 64, 64) and torch.equal(Resize(32, mode)(x), x)
    twice = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(found, twice) == (mode == "nearest")
    # each mode keeps a plain colour, and a slope but for its ends (nearest: in steps)
    slope = torch.arange(32.0).expand(1, 3, 32, 32)
    torch.testing.assert_close(Resize(64, mode)(torch.full_like(x, 0.7)), torch.full((2, 3, 64, 64), 0.7))
    expected = (torch.arange(64.0) + 0.5) / 2 - 0.5
    expected = (expected.round() if mode == "nearest" else expected).expand(1, 3, 64, 64)
    tolerance = 0.1 if mode == "bicubic" else 1e-4
    torch.testing.assert_close(Resize(64, mode)(slope)[..., 4:-4], expected[..., 4:-4], rtol=0, atol=tolerance)
    others = [Resize(64, other)(x) for other in ("bilinear", "bicubic", "nearest") if other != mode]
    assert all((found - other).abs().max() > 0.1 for other in others)


@torch.no_grad()
def test_a_cut_network_resizes_as_it_is_told():
    for mode in ("bilinear", "bicubic", "nearest"):
        prefix, suffix = cut(made("resnet18"), "last_block", 48, 10, 0, resize=mode)
        large = F.interpolate(images(), (48, 48), mode=mode)
        torch.testing.assert_close(suffix.eval()(prefix(images())), suffix(prefix(large)))


@pytest.mark.parametrize("trainable", TRAINED)
def test_a_standardised_last_layer_is_given_features_of_mean_0_and_variance_1(trainable):
    model = copy.deepcopy(made("resnet18"))
    prefix, suffix = cut(model, trainable, 32, 10, seed=0, standardize=True)
    assert list(suffix._modules)[-2:] == ["standardize", "fc"] and (len(suffix) == 2) == (trainable == "last_layer")
    assert list(suffix.standardize.parameters()) == [] and not any("standardize" in name for name in prefix._modules)
    plain = cut(model, trainable, 32, 10, seed=0)[1]
    assert sum(p.numel() for p in suffix.parameters()) == sum(p.numel() for p in plain.parameters())
    assert torch.equal(suffix.fc.weight, plain.fc.weight)
    given = []
    for module in (suffix.standardize, suffix.fc):
        module.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    suffix.train()(prefix(images(30)))
    torch.testing.assert_close(given[1].mean(dim=0), torch.zeros(512), rtol=0, atol=1e-3)
    variance = given[0].var(dim=0, correction=0)  # some are 0 behind a ReLU, and stay 0
    expected = variance / (variance + suffix.standardize.eps)
    torch.testing.assert_close(given[1].var(dim=0, correction=0), expected, rtol=0.01, atol=0.01)
    assert expected.max() > 0.99


@pytest.mark.parametrize("trainable", TRAINED)
@torch.no_grad()
def test_cut_and_whole_network_agree_with_a_standardised_last_layer(trainable):
    model, x = made("resnet18"), images()
    prefix, suffix = cut(model, trainable, 32, 10, seed=3, standardize=True)
    generator = torch.Generator().manual_seed(5)
    suffix.standardize.running_mean.normal_(0, 0.5, generator=generator)
    suffix.standardize.running_var.uniform_(0.2, 2, generator=generator)
    whole = copy.copy(model)
    whole._modules = {**model._modules, "fc": nn.Identity()}
    norm = suffix.standardize
    features = (whole(x) - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    expected = features @ suffix.fc.weight.T + suffix.fc.bias
    close(suffix.eval()(prefix(x)), expected, 1e-4)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("trainable", TRAINED)
@torch.no_grad()
def test_cut_and_whole_network_agree(arch, trainable):
    model, x = made(arch), images()
    prefix, suffix = cut(model, trainable, 64, 10, seed=3)
    whole = copy.copy(model)
    whole._modules = {**model._modules, "fc": suffix.fc}
    expected = whole(F.interpolate(x, (64, 64), mode="bilinear", align_corners=False))
    close(suffix.eval()(prefix(x)), expected, 1e-5)
    folded = fold_batch_norms(copy.deepcopy(prefix))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    close(suffix(folded(x)), expected, 1e-4)


@torch.no_grad()
def test_the_norms_of_this_test_are_not_the_identity():
    """Leaving out one fold must be seen, or the test above shows nothing."""
    prefix = cut(made("resnet18"), "last_layer", 64, 10, 0)[0]
    broken = copy.deepcopy(prefix)
    broken.bn1 = nn.Identity()
    assert (broken(images()) - prefix(images())).abs().max() > 0.02 * prefix(images()).abs().max()


@pytest.mark.parametrize("arch, trainable, trained", [
    ("resnet50", "last_layer", 20_490), ("resnet18", "last_block", 8_393_728 + 5_130), ("resnet18", "all", 11_181_642),
])  # fmt: skip
def test_what_is_trained(arch, trainable, trained):
    prefix, suffix = cut(made(arch), trainable, 64, 10, seed=0)
    assert sum(p.numel() for p in suffix.parameters()) == trained
    assert all(p.requires_grad for p in suffix.parameters()) and not any(p.requires_grad for p in prefix.parameters())
    assert len(prefix) > 0 or trainable == "all"


def test_the_frozen_prefix_stays_as_it_is():
    model = copy.deepcopy(made("resnet18"))
    prefix, suffix = cut(model, "last_block", 32, 10, seed=0)
    before = copy.deepcopy(prefix.state_dict())
    suffix.train()
    assert not any(module.training for module in prefix.modules())
    suffix(prefix(images())).square().mean().backward()
    assert all(p.grad is None for p in prefix.parameters()) and all(p.grad is not None for p in suffix.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in prefix.state_dict().items())


def test_the_new_last_layer_is_seeded():
    one, again, other = (cut(made("resnet18"), "last_layer", 32, 10, seed)[1].fc.weight for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (10, 512)


@pytest.mark.parametrize("size, kernel, stride, padding", [
    (4, 3, 1, 1), (4, 3, 2, 1), (2, 3, 1, 1), (1, 3, 2, 1), (3, 2, 1, 0), (4, 1, 1, 0), (4, 1, 2, 0), (3, 1, 1, 1),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_few_pixels_are_convolved_as_any_others(size, kernel, stride, padding, bias):
    def outcome(kind):
        generator = torch.Generator().manual_seed(0)
        conv = seeded(0, lambda: kind(5, 7, kernel, stride, padding, bias=bias)).double()
        x = torch.randn(16, 5, size, size, dtype=torch.float64, generator=generator, requires_grad=True)
        out = conv(x)
        (out * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum().backward()
        return out, x.grad, conv.weight.grad

    for found, expected in zip(outcome(FewPixelsConv2d), outcome(nn.Conv2d), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changes, size, count", [({}, 5, 16), ({"groups": 4}, 2, 16), ({"dilation": 2}, 4, 16), ({}, 4, 15)]
)
def test_other_convolutions_are_left_to_torch(monkeypatch, changes, size, count):
    monkeypatch.setattr("kdutils.models._ByOutputPixel", None)  # would fail
    conv = FewPixelsConv2d(4, 4, 3, padding=2, **changes)
    assert torch.equal(conv(x := torch.ones(count, 4, size, size)), nn.Conv2d.forward(conv, x))


def test_few_pixels_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert FewPixelsConv2d(4, 4, 3, bias=False)(torch.ones(16, 4, 3, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", TRAINED)
@torch.no_grad()
def test_a_cut_network_is_that_of_torchvision_at_few_pixels(trainable):
    expected = seeded(1, zoo.resnet50).eval()
    randomise_norms(expected)
    several = images(size=64).repeat(8, 1, 1, 1)  # of fewer, torch's own convolutions are used
    expected = expected(several)
    prefix, suffix = cut(copy.deepcopy(made("resnet50")), trainable, 64, 1000, seed=0)
    suffix.fc.load_state_dict(made("resnet50").fc.state_dict())
    assert any(type(m) is FewPixelsConv2d for m in [*prefix.modules(), *suffix.modules()])
    close(suffix.eval()(prefix(several)), expected, 1e-4)


def test_an_architecture_alone():
    assert architecture("resnet18", 64, 10).eval()(images()).shape == (2, 10)


@pytest.fixture
def weights(tmp_path):
    """A folder with resnet18's state dict as .safetensors (with a header)."""
    header = {"description": "random weights of a test", "standin": "true"}
    save_file(made("resnet18").state_dict(), tmp_path / "resnet18.safetensors", metadata=header)
    return tmp_path


@torch.no_grad()
def test_weights_of_a_folder(weights):
    source = backbone_source("resnet18", str(weights))
    assert (source.description, source.is_standin) == ("random weights of a test", True)
    prefix = cut(load_backbone("resnet18", str(weights)), "last_layer", 32, 10, 0)[0]
    torch.testing.assert_close(prefix(images()), cut(made("resnet18"), "last_layer", 32, 10, 0)[0](images()))


@torch.no_grad()
def test_pth_and_safetensors_are_the_same_network(weights):
    one = load_backbone("resnet18", str(weights))
    (weights / "resnet18.safetensors").unlink()
    torch.save(made("resnet18").state_dict(), weights / "resnet18.pth")
    other = load_backbone("resnet18", str(weights))
    source = backbone_source("resnet18", str(weights))
    assert not source.is_standin and "resnet18.pth" in source.description
    one, other = one.state_dict(), other.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("fc."))


@pytest.mark.parametrize("width", [None, 10, 200])
def test_a_last_layer_of_any_width_is_dropped(width):
    state = {name: tensor for name, tensor in made("resnet18").state_dict().items() if not name.startswith("fc.")}
    if width:
        state |= {"fc.weight": torch.zeros(width, 512), "fc.bias": torch.zeros(width)}
    model = with_state("resnet18", state)
    assert torch.equal(model.conv1.weight, made("resnet18").conv1.weight) and model.fc.weight.abs().sum() > 0


def test_half_precision_weights_become_float32():
    model = with_state("resnet18", copy.deepcopy(made("resnet18")).half().state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def renamed(state, change):
    return {change(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("arch, state, fragment", [
    ("resnet18", lambda: made("resnet50").state_dict(), "resnet18"),
    ("resnet50", lambda: made("resnet18").state_dict(), "resnet50"),
    ("resnet18", lambda: renamed(made("resnet18").state_dict(), "module.{}".format), "conv1.weight"),
    ("resnet18", lambda: {}, "conv1.weight"),
    ("resnet18", lambda: {n: t for n, t in made("resnet18").state_dict().items() if n != "layer2.0.bn1.bias"},
     "layer2.0.bn1.bias"),
    ("resnet18", lambda: {**made("resnet18").state_dict(), "layer9.x": torch.zeros(1)}, "layer9.x"),
])  # fmt: skip
def test_weights_of_another_network_are_named(arch, state, fragment):
    message = message_of(with_state, arch, state())
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
    assert message.startswith("weights: ") and "resnet18.pth" in message and "plain state dict" in message
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
    assert "no state dict" in message and "model.state_dict()" in message


def test_no_weights_is_the_same_random_network_every_time():
    one, other = (load_backbone("resnet18", "none") for _ in range(2))
    assert torch.equal(one.conv1.weight, other.conv1.weight)
    assert "no pre-training" in backbone_source("resnet18", "none").description


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
