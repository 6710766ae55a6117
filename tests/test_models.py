"""kdutils.models: the student's size; CNNs of many kinds cut into two parts that compute the same."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import message_of, random_network
from torch import nn
from torchsummary import summary

from kdutils import layer_table
from kdutils.models import MEAN, STD, Resize, SmallCNN, cut, depthwise_in_float32, fold_batch_norms, normalise
from kdutils.weights import head_of

TRAINED = ("last_layer", "last_block", "all")
FAMILIES = {  # a network of each family: torchvision's and timm's ResNet and EfficientNet, one with norms of its own, and another
    "resnet18": 224, "resnetaa50d": 224, "efficientnet_b0": 224, "tf_efficientnet_b0": 224, "tf_efficientnet_lite0": 224,
    "mobilenetv3_small_100": 224,
}  # fmt: skip


def pixels(count=2, size=32):
    """Float [B, 3, H, W] from 0 to 255."""
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).float()


def close(found, expected, tolerance):
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def test_the_student_has_268650_parameters():
    assert sum(p.numel() for p in SmallCNN().parameters()) == 268_650
    assert SmallCNN()(pixels()).shape == (2, 10) and SmallCNN(7)(pixels()).shape == (2, 7)


def test_normalised_pixels():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = normalise(x)
    expected = torch.stack([(x[:, c] / 255.0 - MEAN[c]) / STD[c] for c in range(3)], dim=1)
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
    x, found = normalise(pixels()), Resize(64, mode)(normalise(pixels()))
    assert found.shape == (2, 3, 64, 64) and torch.equal(Resize(32, mode)(x), x)
    others = [Resize(64, other)(x) for other in ("bilinear", "bicubic", "nearest") if other != mode]
    assert all((found - other).abs().max() > 0.1 for other in others)
    slope = torch.arange(32.0).expand(1, 3, 32, 32)  # stays one but for its ends (nearest: in steps)
    expected = (torch.arange(64.0) + 0.5) / 2 - 0.5
    expected = (expected.round() if mode == "nearest" else expected)[4:-4].expand(1, 3, 64, 56)
    torch.testing.assert_close(Resize(64, mode)(slope)[..., 4:-4], expected, rtol=0, atol=tolerance)
    assert torch.equal(cut(random_network(), "resnet18", "last_block", 64, 10, 0, resize=mode)[0].resize(x), found)


@pytest.mark.parametrize("trainable", TRAINED)
def test_a_standardised_last_layer_is_given_features_of_mean_0_and_variance_1(trainable):
    network = copy.deepcopy(random_network())
    frozen, trained = cut(network, "resnet18", trainable, 32, 10, seed=0, standardize=True)
    plain = cut(network, "resnet18", trainable, 32, 10, seed=0)[1]
    assert [p.shape for p in trained.parameters()] == [p.shape for p in plain.parameters()]
    assert (len(trained) == 2) == (trainable == "last_layer") and torch.equal(trained.fc.weight, plain.fc.weight)
    given = []
    trained.standardize.register_forward_hook(lambda module, inputs, output: given.extend((*inputs, output)))
    trained.train()(frozen(pixels(30)))
    before, after = given
    assert after.mean(dim=0).abs().max() < 1e-3
    variance = before.var(dim=0, correction=0)  # some are 0 behind a ReLU, and stay 0
    expected = variance / (variance + trained.standardize.eps)
    torch.testing.assert_close(after.var(dim=0, correction=0), expected, rtol=0.01, atol=0.01)
    assert expected.max() > 0.99


def with_the_networks_own_head(network, name, trainable, size):
    """Both parts of a cut whose new last layer is the network's old one."""
    frozen, trained = cut(network, name, trainable, size, 1000, seed=3)
    trained.fc.load_state_dict(network.get_submodule(head_of(network, name)).state_dict())
    return frozen, trained.eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_both_parts_and_the_whole_network_agree(name):
    """At the network's own size and at another; the frozen part folded, too, as it runs."""
    network, x = random_network(name), pixels()
    for size in (FAMILIES[name], 96):
        for trainable in TRAINED:
            if trainable == "last_block" and name == "mobilenetv3_small_100":
                message = message_of(cut, network, name, trainable, size, 10, 0)
                assert f"the last block of {name} is not known" in message and "trainable: last_layer" in message
                continue
            frozen, trained = with_the_networks_own_head(network, name, trainable, size)
            config = getattr(network, "pretrained_cfg", {"mean": MEAN, "std": STD})
            mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
            expected = network(F.interpolate((x / 255 - mean) / std, (size, size), mode="bilinear"))
            close(trained(frozen(x)), expected, 1e-4)
            if not hasattr(frozen, "body"):
                folded = fold_batch_norms(copy.deepcopy(frozen))
                left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
                assert left <= (name == "resnetaa50d")  # behind a stem of three convolutions one stays
                close(trained(folded(x)), expected, 1e-4)


@torch.no_grad()
def test_an_activation_lost_in_folding_would_be_seen():
    network, x = random_network("tf_efficientnet_lite0"), pixels()
    frozen, trained = with_the_networks_own_head(network, "tf_efficientnet_lite0", "last_block", 96)
    folded = fold_batch_norms(copy.deepcopy(frozen))
    folded.blocks4[0].bn1 = nn.Identity()  # timm's norm: the activation is in it
    expected = trained(frozen(x))
    assert (trained(folded(x)) - expected).abs().max() > 0.01 * expected.abs().max()


def test_the_frozen_part_begins_with_the_networks_own_normalisation():
    frozen = cut(random_network("tf_efficientnet_lite0"), "tf_efficientnet_lite0", "last_block", 32, 10, 0)[0]
    assert frozen[0](torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1)).flatten().tolist() == [-1, 0, 1]
    x = pixels()
    torch.testing.assert_close(cut(random_network(), "resnet18", "last_block", 32, 10, 0)[0][0](x), normalise(x))


@pytest.mark.parametrize("name, first", [
    ("resnet18", "layer4"), ("resnetaa50d", "layer4"), ("efficientnet_b0", "features6"), ("tf_efficientnet_lite0", "blocks5"),
])  # fmt: skip
def test_the_last_block_is_what_works_at_the_coarsest_resolution(name, first):
    frozen, trained = cut(random_network(name), name, "last_block", 64, 10, 0)
    assert next(trained.named_children())[0] == first and list(trained.named_children())[-1][0] == "fc"
    assert frozen(pixels()).shape[-2:] == (4, 4)


@pytest.mark.parametrize("name, trainable, count", [
    ("tf_efficientnet_lite0", "last_layer", 12_810), ("resnet18", "last_block", 8_393_728 + 5_130), ("resnet18", "all", 11_181_642),
])  # fmt: skip
def test_what_is_trained(name, trainable, count):
    frozen, trained = cut(random_network(name), name, trainable, 64, 10, seed=0)
    assert sum(p.numel() for p in trained.parameters()) == count
    assert all(p.requires_grad for p in trained.parameters()) and not any(p.requires_grad for p in frozen.parameters())
    if trainable == "all":
        assert len(frozen) == 0 and trained.eval()(pixels()).shape == (2, 10)


def test_the_frozen_part_stays_as_it_is():
    frozen, trained = cut(copy.deepcopy(random_network()), "resnet18", "last_block", 32, 10, seed=0)
    before = copy.deepcopy(frozen.state_dict())
    trained.train()
    assert not any(module.training for module in frozen.modules())
    trained(frozen(pixels())).square().mean().backward()
    assert all(p.grad is None for p in frozen.parameters()) and all(p.grad is not None for p in trained.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.state_dict().items())


def test_the_new_last_layer_is_seeded_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    one, again, other = (
        cut(random_network(), "resnet18", "last_layer", 32, 10, seed)[1].fc.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (10, 512)
    assert torch.equal(torch.get_rng_state(), before)


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
