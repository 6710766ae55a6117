"""kdutils.data.views: (index, view) names one picture exactly; every picture is recomputed here in another way."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils.data.views import make_views, view_pixels, view_table

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
def test_the_table_holds_every_flip_and_shift_once_the_mildest_first(max_shift, shift_step):
    table = view_table(max_shift, shift_step)
    rows, shifts = table.tolist(), range(-max_shift, max_shift + 1, shift_step)
    assert len(rows) == 2 * (2 * max_shift // shift_step + 1) ** 2
    assert {tuple(row) for row in rows} == {(d, r, f) for d in shifts for r in shifts for f in (0, 1)}
    assert rows[:2] == [[0, 0, 0], [0, 0, 1]]
    distance = (table[:, :2] ** 2).sum(dim=1)
    assert torch.equal(distance, distance.sort().values)


def test_the_sizes_named_in_the_documentation():
    assert [len(view_table(*grid)) for grid in ((4, 1), (4, 4), (3, 3), (0, 1))] == [162, 18, 18, 2]


@pytest.mark.parametrize("max_shift, shift_step", GRIDS)
def test_every_view_of_every_image_recomputed(max_shift, shift_step):
    images = random_images()
    table = view_table(max_shift, shift_step).tolist()
    index = torch.arange(len(images)).repeat_interleave(len(table))
    view = torch.arange(len(table)).repeat(len(images))
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(1))
    pixels = view_pixels(make_views(images, max_shift, shift_step), index[order], view[order])
    for picture, i, v in zip(pixels, index[order].tolist(), view[order].tolist(), strict=True):
        assert torch.equal(picture, reference(images[i], max_shift, *table[v])), (i, table[v])
        if v < 2:
            assert torch.equal(picture, images[i].flip(-1) if v == 1 else images[i])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_of_any_size_of_image_recomputed(data):
    step, times = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    margin = step * times
    size = data.draw(st.integers(margin + 1, 20))  # reflection needs more pixels than it adds
    images = random_images(2, size)
    table = view_table(margin, step).tolist()
    view, index = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, 1))
    down, right, flip = table[view]
    both = torch.tensor([view, table.index([down, right, 1 - flip])])
    found, mirrored = view_pixels(make_views(images, margin, step), torch.tensor([index, index]), both)
    assert torch.equal(found, reference(images[index], margin, down, right, flip))
    assert torch.equal(mirrored, found.flip(-1))


def test_a_picture_depends_on_its_own_pair_alone():
    """Equal in every bit in any batch: views are copied, not computed."""
    viewed = make_views(random_images(), 4, 4)
    index, view = torch.tensor([2, 0, 2, 1]), torch.tensor([17, 3, 3, 9])
    together = view_pixels(viewed, index, view)
    alone = torch.cat([view_pixels(viewed, index[i : i + 1], view[i : i + 1]) for i in range(4)])
    assert torch.equal(together, alone) and len(view_pixels(viewed, index[:0], view[:0])) == 0


@pytest.mark.parametrize("margin, size", [(0, 32), (4, 32), (3, 8)])
def test_types_shapes_and_layout(margin, size):
    viewed = make_views(random_images(size=size), margin, 1)
    pixels = view_pixels(viewed, torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert pixels.shape == (2, 3, size, size) and pixels.dtype == torch.uint8
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert viewed.padded.dtype == torch.uint8
    assert viewed.padded.shape == (3, size + 2 * margin, size + 2 * margin, 3)


@pytest.mark.parametrize("max_shift, shift_step, num_views", [(3, 3, 1), (3, 3, 7), (2, 1, 18), (1, 1, 99)])
def test_the_first_views_are_numbered_as_among_all(max_shift, shift_step, num_views):
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    some, every = make_views(images, max_shift, shift_step, num_views), make_views(images, max_shift, shift_step)
    assert len(some.table) == min(num_views, len(every.table))
    index, view = torch.tensor([0, 1]), torch.tensor([0, len(some.table) - 1])
    assert torch.equal(view_pixels(some, index, view), view_pixels(every, index, view))
