"""kdutils.views: (index, view) and (index, crop) name one picture exactly; each is recomputed here in another way."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils.data.views import NUM_CROPS, crop_pixels, make_views, view_pixels, view_table
from kdutils.training import draw

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
    assert (len(view_table(4, 1)), len(view_table(4, 4)), len(view_table(3, 3)), len(view_table(0, 1))) == (
        162,
        18,
        18,
        2,
    )


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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_of_any_size_of_image_recomputed(data):
    step, times = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    margin = step * times
    size = data.draw(st.integers(margin + 1, 20))  # reflection needs more pixels than it adds
    images = random_images(2, size)
    table = view_table(margin, step).tolist()
    view, index = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, 1))
    (found,) = view_pixels(make_views(images, margin, step), torch.tensor([index]), torch.tensor([view]))
    assert torch.equal(found, reference(images[index], margin, *table[view]))
    flipped = table.index([table[view][0], table[view][1], 1 - table[view][2]])
    assert torch.equal(
        view_pixels(make_views(images, margin, step), torch.tensor([index]), torch.tensor([flipped]))[0], found.flip(-1)
    )


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
    assert viewed.padded.dtype == torch.uint8 and viewed.padded.shape == (
        3,
        size + 2 * max_shift,
        size + 2 * max_shift,
        3,
    )


TOP = 2**20 - 1


def crop_number(size, right, down, flip=0):
    """The number of a crop: its size and place as fractions of what is possible."""
    size, right, down = (round(fraction * TOP) for fraction in (size, right, down))
    return torch.tensor([flip + (size << 1) + (right << 21) + (down << 41)])


def ramps(size=40):
    """One image: red rises by 6 a column, green by 6 a row."""
    ramp = (6 * torch.arange(size)).to(torch.uint8)
    channels = (ramp, ramp[:, None], torch.zeros_like(ramp))
    return torch.stack([channel.expand(size, size) for channel in channels])[None]


def some_crops(count):
    index, crop = draw(0, 0, count, NUM_CROPS)
    return index % 3, crop


def test_the_largest_crop_number():
    assert crop_number(1, 1, 1, flip=1).item() == NUM_CROPS - 1


def test_a_crop_depends_on_its_own_pair_alone():
    images, (index, crop) = random_images(size=40), some_crops(6)
    together = crop_pixels(images, index, crop, 32)
    assert torch.equal(crop_pixels(images, index, crop, 32), together)
    alone = torch.cat([crop_pixels(images, index[i : i + 1], crop[i : i + 1], 32) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-3)
    assert all((one - other).abs().max() > 10 for one, other in zip(together, together[1:]))


def test_the_flipped_crop_is_the_mirror_image():
    images, (index, crop) = random_images(size=40), some_crops(20)
    one, other = (crop_pixels(images, index, number, 32) for number in (crop, crop ^ 1))
    torch.testing.assert_close(other, one.flip(-1), rtol=0, atol=0.05)
    assert (other - one).abs().max() > 10


@pytest.mark.parametrize("place", [(0, 0), (1, 0), (0.3, 0.8)])
@pytest.mark.parametrize("size", [24, 32, 40, 64])
def test_the_largest_crop_is_the_whole_image_resized(size, place):
    images = random_images(size=40)
    found = crop_pixels(images, torch.arange(3), crop_number(1, *place).expand(3), size)
    expected = F.interpolate(images.float(), (size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    if size == 40:
        torch.testing.assert_close(found, images.float(), rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("right, down", [(0, 0), (1, 1), (0.5, 0.5), (0.2, 0.9), (1, 0)])
def test_a_crop_is_a_square_of_its_area_at_its_place_within_the_image(size, right, down):
    pixels = crop_pixels(ramps(), torch.tensor([0]), crop_number(size, right, down), 32)[0].numpy()
    side = 40 * np.sqrt(0.4 + 0.6 * size)
    for channel, axis, place in ((0, 0, right), (1, 1, down)):
        along = pixels[channel].mean(axis=axis)
        expected = (40 - side) * place + side * (np.arange(32) + 0.5) / 32 - 0.5  # columns or rows of the image
        np.testing.assert_allclose(along, 6 * expected.clip(0, 39), atol=0.05)
        assert np.ptp(pixels[channel], axis=axis).max() < 0.05


def test_crops_are_40_to_100_percent_of_the_area_and_all_there_is_of_them():
    crop = draw(1, 0, 600, NUM_CROPS)[1]
    pixels = crop_pixels(ramps(), torch.zeros_like(crop), crop, 32)
    across, down = pixels[:, 0, 16], pixels[:, 1, :, 16]
    sides = [(ramp[:, 27] - ramp[:, 4]).abs() / 23 * 32 / 6 for ramp in (across, down)]  # the edges may be clipped
    torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-2)
    area = (sides[0] / 40) ** 2
    assert area.min() > 0.399 and area.max() < 1.001
    assert area.min() < 0.42 and area.max() > 0.98 and 0.67 < area.mean() < 0.73
    flipped = (across[:, 0] > across[:, -1]).float().mean()
    assert 0.42 < flipped < 0.58


@pytest.mark.parametrize("crop", [0, 1, NUM_CROPS - 1, NUM_CROPS - 2, TOP << 21, TOP << 41])
def test_crops_hold_no_values_but_the_images(crop):
    images = 255 * (random_images(size=40) > 127).to(torch.uint8)
    pixels = crop_pixels(images, torch.arange(3), torch.tensor([crop] * 3), 32)
    assert pixels.min() >= 0 and pixels.max() <= 255.001
    plain = torch.full((1, 3, 40, 40), 200, dtype=torch.uint8)  # nothing from outside the image gets in
    pixels = crop_pixels(plain, torch.tensor([0]), torch.tensor([crop]), 32)
    torch.testing.assert_close(pixels, torch.full((1, 3, 32, 32), 200.0), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [16, 32, 33])
def test_type_shape_and_layout_of_crops(size):
    index, crop = some_crops(5)
    pixels = crop_pixels(random_images(size=40), index, crop, size)
    assert pixels.shape == (5, 3, size, size) and pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)
