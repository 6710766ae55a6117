"""kdutils.data.shapes: a seed and an index name one image; every figure can be seen and told from the others."""

import math

import pytest
import torch

from kdutils.data import shapes
from kdutils.data.shapes import SHAPES10, draw


@pytest.fixture
def plain(monkeypatch):
    """Images of one figure in one colour on another, without noise, shading or clutter."""
    monkeypatch.setattr(shapes, "NOISE", (0.0, 0.0))
    monkeypatch.setattr(shapes, "SHADING", 0.0)
    monkeypatch.setattr(shapes, "CLUTTER", 0.0)


@pytest.mark.parametrize("names, count, size", [(SHAPES10, 257, 32), (["star", "heart"], 3, 48), (SHAPES10, 0, 32)])
def test_types_sizes_and_balance(names, count, size):
    images, labels = draw(names, count, seed=3, size=size)
    assert images.shape == (count, 3, size, size) and images.dtype == torch.uint8
    assert labels.shape == (count,) and labels.dtype == torch.int64
    counts = torch.bincount(labels, minlength=len(names))
    assert len(counts) == len(names) and counts.max() - counts.min() <= 1
    if count > 20:  # in no order
        assert not torch.equal(labels, labels.sort().values) and not torch.equal(labels[:10], labels[10:20])


def test_an_image_depends_on_seed_and_index_alone():
    """Equal in every bit, as images are drawn in blocks of one size, in one thread."""
    images, labels = draw(SHAPES10, 300, seed=7)
    fewer_images, fewer_labels = draw(SHAPES10, 13, seed=7)
    assert torch.equal(images[:13], fewer_images) and torch.equal(labels[:13], fewer_labels)
    other, _ = draw(SHAPES10, 300, seed=8)
    assert (images != other).flatten(1).any(dim=1).all()


def test_threads_and_the_global_random_state_neither_matter_nor_change():
    threads = torch.get_num_threads()
    try:
        drawn = []
        for number in (1, 2):
            torch.set_num_threads(number)
            before = torch.get_rng_state()
            drawn.append(draw(SHAPES10, 20, seed=11)[0])
            assert torch.get_num_threads() == number and torch.equal(before, torch.get_rng_state())
            torch.rand(1)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*drawn)


def test_no_two_images_are_alike_within_and_across_blocks_and_seeds():
    images = torch.cat([draw(SHAPES10, 300, seed)[0] for seed in range(3)])
    assert len({image.numpy().tobytes() for image in images}) == 900


def test_every_figure_is_visible(plain):
    images, labels = draw(SHAPES10, 400, seed=1)
    images = images.float() / 255
    background = images[:, :, 0, 0, None, None]  # no figure reaches this corner
    distance = (images - background).norm(dim=1).flatten(1)
    assert distance.max(dim=1).values.min() >= shapes.MIN_CONTRAST - 0.02
    covered = (distance > 0.1).float().mean(dim=1)
    for label, name in enumerate(SHAPES10):
        of_class = covered[labels == label]
        assert 0.03 < of_class.min() and of_class.max() < 0.6, name


def test_the_background_never_takes_on_the_figures_colour():
    generator = torch.Generator().manual_seed(0)
    corner, opposite = torch.rand(2, 500, 3, generator=generator)
    middle, shade = (corner + opposite) / 2, (opposite - corner) / 2
    # no candidate is right: the first ones are the background's own shades
    candidates = torch.stack([corner, middle, opposite], dim=1)
    colours = shapes._visible_colour(candidates, middle, shade)
    for step in torch.linspace(-1, 1, 21):
        assert ((colours - middle - step * shade).norm(dim=1) >= shapes.MIN_CONTRAST - 1e-5).all()


@pytest.mark.parametrize("name, area", [
    ("circle", math.pi * 0.85**2), ("triangle", 3 * 3**0.5 / 4 * 1.15**2), ("square", 1.5**2),
    ("ring", math.pi * (0.95**2 - 0.5**2)), ("star", 5 * 1.15 * 0.5 * math.sin(math.pi / 5)),
    ("cross", 2 * 1.9 * 0.64 - 0.64**2),
])  # fmt: skip
def test_figures_have_the_areas_geometry_gives_them(name, area):
    ticks = (torch.arange(600) + 0.5) / 200 - 1.5
    inside = shapes._FIGURES[name](ticks[None, :].expand(600, 600), ticks[:, None].expand(600, 600)) <= 0
    assert inside.double().mean().item() * 9 == pytest.approx(area, rel=0.02)


def test_no_figure_looks_like_another_one_turned():
    ticks = torch.linspace(-1.3, 1.3, 40)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    angles = torch.linspace(0, 2 * torch.pi, 61)[:-1, None, None]
    turned_x, turned_y = x * angles.cos() + y * angles.sin(), y * angles.cos() - x * angles.sin()
    all_turned = {name: shapes._FIGURES[name](turned_x, turned_y) <= 0 for name in SHAPES10}
    for position, name in enumerate(SHAPES10):
        figure = shapes._FIGURES[name](x, y) <= 0
        for other in SHAPES10[position + 1 :]:
            turned = all_turned[other]
            overlap = (figure & turned).sum((1, 2)) / (figure | turned).sum((1, 2))
            assert overlap.max() < 0.92, (name, other)


def test_clutter_and_noise_change_the_images(plain, monkeypatch):
    clean = draw(SHAPES10, 10, seed=2)[0]
    monkeypatch.setattr(shapes, "CLUTTER", 1.0)
    cluttered = draw(SHAPES10, 10, seed=2)[0]
    assert (clean != cluttered).any(dim=1).float().mean((1, 2)).min() > 0.02
    assert (clean == cluttered).all(dim=1).float().mean((1, 2)).min() > 0.02
    monkeypatch.setattr(shapes, "NOISE", (0.1, 0.1))
    noisy = draw(SHAPES10, 10, seed=2)[0]
    assert (noisy != cluttered).float().mean() > 0.7


def test_edges_are_anti_aliased(plain):
    image = draw(["circle"], 1, seed=0)[0][0]
    assert len(image.flatten(1).unique(dim=1).T) > 4  # shades between the two colours


@pytest.mark.parametrize("names, count, size, part", [
    (["circle", "blancmange"], 4, 32, "blancmange"), (["circle", "circle"], 4, 32, "distinct"),
    ([], 4, 32, "one or more"), (["circle"], -1, 32, "count"), (["circle"], 4, 0, "size"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_said(names, count, size, part):
    with pytest.raises(ValueError, match=part):
        draw(names, count, seed=0, size=size)
