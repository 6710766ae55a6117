"""kdutils.views: (index, view) names one picture exactly; every picture is recomputed here in another way."""

import numpy as np
import pytest
import torch

from kdutils.views import make_views, view_pixels, view_table

GRIDS = [(0, 1), (1, 1), (4, 1), (4, 4), (3, 3), (4, 2), (15, 5)]


def random_images(count=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def reference(image, margin, down, right, flip):
    """One view of one image [3, H, W], with numpy: reflect-pad, mirror the shifted cut-out."""
    padded = np.pad(image.numpy(), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    height, width = image.shape[1:]
    cut = padded[:, margin + down : margin + down + height, margin + right : margin + right + width]
    return torch.from_numpy((cut[:, :, ::-1] if flip else cut).copy())


@pytest.mark.parametrize("max_shift, shift_step", GRIDS)
def test_the_table_holds_every_flip_and_shift_once(max_shift, shift_step):
    table = view_table(max_shift, shift_step).tolist()
    shifts = range(-max_shift, max_shift + 1, shift_step)
    assert len(table) == 2 * (2 * max_shift // shift_step + 1) ** 2
    assert {tuple(row) for row in table} == {(d, r, f) for d in shifts for r in shifts for f in (0, 1)}
    assert table[:2] == [[0, 0, 0], [0, 0, 1]]


def test_the_sizes_named_in_the_documentation():
    assert (len(view_table(4, 1)), len(view_table(4, 4)), len(view_table(3, 3)), len(view_table(0, 1))) == (162, 18, 18, 2)


def test_the_mildest_views_come_first():
    distance = (view_table(4, 2)[:, :2] ** 2).sum(dim=1)
    assert torch.equal(distance, distance.sort().values)


@pytest.mark.parametrize("max_shift, shift_step", GRIDS)
def test_view_0_is_the_image_and_view_1_its_mirror_image(max_shift, shift_step):
    images = random_images()
    viewed, index = make_views(images, max_shift, shift_step), torch.arange(3)
    assert torch.equal(view_pixels(viewed, index, torch.zeros(3, dtype=torch.int64)), images)
    assert torch.equal(view_pixels(viewed, index, torch.ones(3, dtype=torch.int64)), images.flip(-1))


@pytest.mark.parametrize("max_shift, shift_step", GRIDS)
def test_every_view_of_every_image_recomputed(max_shift, shift_step):
    images = random_images()
    viewed = make_views(images, max_shift, shift_step)
    table = view_table(max_shift, shift_step).tolist()
    index = torch.arange(len(images)).repeat_interleave(len(table))
    view = torch.arange(len(table)).repeat(len(images))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
    pixels = view_pixels(viewed, index[order], view[order])
    for picture, i, v in zip(pixels, index[order].tolist(), view[order].tolist(), strict=True):
        assert torch.equal(picture, reference(images[i], max_shift, *table[v])), (i, table[v])


def test_a_picture_depends_on_its_own_pair_alone():
    viewed = make_views(random_images(), 4, 4)
    index, view = torch.tensor([2, 0, 2, 1]), torch.tensor([17, 3, 3, 9])
    together = view_pixels(viewed, index, view)
    alone = torch.cat([view_pixels(viewed, index[i : i + 1], view[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone) and len(view_pixels(viewed, index[:0], view[:0])) == 0


@pytest.mark.parametrize("max_shift, size", [(0, 32), (4, 32), (3, 8)])
def test_types_shapes_and_layout(max_shift, size):
    viewed = make_views(random_images(size=size), max_shift, 1)
    pixels = view_pixels(viewed, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert pixels.shape == (2, 3, size, size) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert viewed.padded.dtype == torch.uint8 and viewed.padded.shape == (3, size + 2 * max_shift, size + 2 * max_shift, 3)
