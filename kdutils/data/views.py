"""The finite set of augmented views of an image: flips x shifts. (index, view) names one network input exactly."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdutils.cache import fingerprint, tensor_checksum


class ViewedImages(NamedTuple):
    """Images ready to be looked at: reflect-padded pixels [N, H+2m, W+2m, 3] uint8, the views' table [V, 3], m."""

    padded: Tensor
    table: Tensor
    margin: int


class Pool(NamedTuple):
    """Images to train on: `pixels(index [B], view [B])` are uint8 [B, 3, H, W] for any of N images and V views.

    labels: int64 [N], -1 where there is none; fingerprint: a checksum of all of it.
    """

    name: str
    labels: Tensor
    num_views: int
    pixels: Callable[[Tensor, Tensor], Tensor]
    fingerprint: str


def view_table(max_shift: int, shift_step: int) -> Tensor:
    """All views as int64 [V, 3]: (shift down, shift right, flipped 0/1), mildest first; V = 2 (2m/s + 1)^2.

    Row 0 is the image itself, row 1 its mirror image.
    """
    shifts = range(-max_shift, max_shift + 1, shift_step)
    rows = [(down, right, flip) for down in shifts for right in shifts for flip in (0, 1)]
    rows.sort(key=lambda row: (row[0] ** 2 + row[1] ** 2, row))
    return torch.tensor(rows, dtype=torch.int64)


def make_views(images: Tensor, max_shift: int, shift_step: int) -> ViewedImages:
    """Prepare images uint8 [N, 3, H, W] for `view_pixels`; stays on their device."""
    # reflection is not implemented for uint8; float16 holds 0..255 exactly
    padded = F.pad(images.half(), (max_shift,) * 4, mode="reflect") if max_shift else images
    pixels_last = padded.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return ViewedImages(pixels_last, view_table(max_shift, shift_step).to(images.device), max_shift)


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


def pool_of_views(name: str, images: Tensor, labels: Tensor, max_shift: int, shift_step: int) -> Pool:
    """Images uint8 [N, 3, H, W] in all their views."""
    viewed = make_views(images, max_shift, shift_step)
    checksum = tensor_checksum({"images": images, "labels": labels, "table": viewed.table})
    return Pool(name, labels, len(viewed.table), partial(view_pixels, viewed), fingerprint({"views": checksum}))


def pool_of_draws(name: str, draws: Tensor, labels: Tensor) -> Pool:
    """Images whose V views were drawn before: uint8 [N, V, H, W, 3]."""

    def pixels(index: Tensor, view: Tensor) -> Tensor:
        return draws[index, view].permute(0, 3, 1, 2)

    checksum = tensor_checksum({"draws": draws, "labels": labels})
    return Pool(name, labels, draws.shape[1], pixels, fingerprint({"draws": checksum}))


NUM_CROPS = 2**61  # 20 bits each for a crop's size and place, one for its flip


def crop_pixels(images: Tensor, index: Tensor, crop: Tensor, size: int) -> Tensor:
    """Square crops of 40 to 100 % of an image's area, flipped or not, resized to `size`: float [B, 3, size, size].

    images: uint8 [N, 3, H, W]; index: int64 [B]; crop: int64 [B], 0 to NUM_CROPS - 1, names a crop exactly. Values
    stay within 0..255; bilinear, so meant for images at most about one and a half times as large as the crops.
    """
    fractions = [((crop >> shift) & 0xFFFFF).float() / 0xFFFFF for shift in (1, 21, 41)]
    side = (0.4 + 0.6 * fractions[0]).sqrt()
    right, down = ((1 - side) * (2 * fraction - 1) for fraction in fractions[1:])
    flip = 1.0 - 2.0 * (crop & 1)
    zero = torch.zeros_like(side)
    where = torch.stack([torch.stack([side * flip, zero, right], 1), torch.stack([zero, side, down], 1)], 1)
    grid = F.affine_grid(where, [len(index), images.shape[1], size, size], align_corners=False)
    pixels = F.grid_sample(images[index].float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return pixels.contiguous(memory_format=torch.channels_last)
