"""The finite set of augmented views of an image: flips x shifts. (index, view) names one network input exactly."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ViewedImages(NamedTuple):
    """Padded images, and the windows on them: pixels uint8 [N, H+2m, W+2m, 3], `view_table` [V, 3], the margin m."""

    padded: Tensor
    table: Tensor
    margin: int


def view_table(max_shift: int, shift_step: int, num_views: int | None = None) -> Tensor:
    """All views as int64 [V, 3]: (window moved down, moved right, then mirrored 0/1), smallest shifts first.

    V = 2 (2 max_shift / shift_step + 1)^2; with `num_views`, the first so many. Row 0 is the image itself, row 1 its
    mirror image. `shift_step` must divide `max_shift`. The order is part of every cached result: it stays.
    """
    shifts = range(-max_shift, max_shift + 1, shift_step)
    rows = [(down, right, flip) for down in shifts for right in shifts for flip in (0, 1)]
    rows.sort(key=lambda row: (row[0] ** 2 + row[1] ** 2, row))
    return torch.tensor(rows[:num_views], dtype=torch.int64)


def make_views(images: Tensor, max_shift: int, shift_step: int, num_views: int | None = None) -> ViewedImages:
    """Pad images uint8 [N, 3, H, W] for `view_pixels`, which cuts the views of `view_table`; on their device."""
    # reflection is not implemented for uint8; float16 holds 0..255 exactly
    padded = F.pad(images.half(), (max_shift,) * 4, mode="reflect") if max_shift else images
    pixels_last = padded.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return ViewedImages(pixels_last, view_table(max_shift, shift_step, num_views).to(images.device), max_shift)


def view_pixels(viewed: ViewedImages, index: Tensor, view: Tensor) -> Tensor:
    """The pixels uint8 [B, 3, H, W] of views `view` [B] of the images `index` [B] (laid out channels-last)."""
    padded, table, margin = viewed
    size = padded.shape[1] - 2 * margin
    down, right, flip = table[view].unbind(dim=1)
    along = torch.arange(size, device=padded.device)
    rows = margin + down[:, None] + along
    columns = margin + right[:, None] + torch.where(flip[:, None] == 1, size - 1 - along, along)
    pixels = padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)
