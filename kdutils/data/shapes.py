"""Images of shapes, drawn from scratch: a ten-class data set that needs no download.

Every image holds one figure of random colour, place, size, rotation and aspect on a shaded background, with
line strokes and blobs behind and in front of it and pixel noise over all. A figure is an implicit function
f(x, y) that is <= 0 inside; it is sampled on a grid finer than the pixels and averaged (anti-aliasing).

No class is another one turned or mirrored. The constants below set how hard the images are: with these, a CNN of two
convolutions trained on 2,000 images gets about 70 % right.

Lengths below are fractions of the image's width and colours lie in [0, 1], unless said otherwise.
"""

import contextlib
import math

import torch

SIZE_RANGE = (0.27, 0.38)  # scale of the figure: its radius, roughly
ASPECT = 0.1  # the figure is stretched by a factor within exp(+-ASPECT)
PLACE = 0.08  # its centre is at most this far from the image's, along each axis
ROTATION = 0.6  # it is turned by at most this angle (radians), either way
MIN_CONTRAST = 0.4  # least RGB distance between the figure and any shade of the background
SHADING = 0.25  # greatest change of a background colour channel from the centre to a corner
STROKES_BEHIND, STROKES_IN_FRONT = 2, 2
BLOBS_BEHIND, BLOBS_IN_FRONT = 2, 1
CLUTTER = 0.5  # each of those strokes and blobs is there with this probability
STROKE_WIDTH = (0.01, 0.045)  # half the width
STROKE_LENGTH = (0.1, 0.45)  # half the length
BLOB_RADIUS = (0.03, 0.1)
NOISE = (0.0, 0.1)  # standard deviation of the pixel noise; drawn once per image
SUPERSAMPLING = 3  # samples per pixel along each axis
BLOCK = 256  # images drawn at once, about; part of what a seed means


def _disc(x, y, radius=0.85):
    return x * x + y * y - radius * radius


def _box(x, y, half_width, half_height):
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _convex(x, y, vertices):
    """Convex polygon (vertices anticlockwise): the greatest of its half planes."""
    planes = []
    for (x0, y0), (x1, y1) in zip(vertices, vertices[1:] + vertices[:1]):
        length = math.hypot(x1 - x0, y1 - y0)
        planes.append(((y1 - y0) * (x - x0) - (x1 - x0) * (y - y0)) / length)
    return _intersection(*planes)


def _regular(x, y, corners, circumradius):
    turns = [math.pi / 2 + 2 * math.pi * k / corners for k in range(corners)]
    return _convex(x, y, [(circumradius * math.cos(t), circumradius * math.sin(t)) for t in turns])


def _star(x, y, tips, outer, inner):
    """Star polygon. The plane is folded into one half tip, whose edge runs from radius `outer` to `inner`."""
    step = math.pi / tips
    angle = ((torch.atan2(x, y) % (2 * step)) - step).abs()
    radius = torch.hypot(x, y)
    x, y = radius * angle.cos(), radius * angle.sin()
    tip_x, tip_y = outer * math.cos(step), outer * math.sin(step)
    return tip_y * (x - inner) - (tip_x - inner) * y


def _union(*parts):
    return _fold(torch.minimum, parts)


def _intersection(*parts):
    return _fold(torch.maximum, parts)


def _fold(operation, parts):
    total = parts[0]
    for part in parts[1:]:
        total = operation(total, part)
    return total


def _heart(x, y):
    """Two discs and the triangle below them, which meets their outer edges."""
    lobes = _disc(x.abs() - 0.47, y - 0.35, 0.55)
    return _union(lobes, _convex(x, y, [(-0.86, -0.04), (0, -1.0), (0.86, -0.04), (0, 0.4)]))


_FIGURES = {
    "circle": _disc,
    "triangle": lambda x, y: _regular(x, y, 3, 1.15),
    "square": lambda x, y: _box(x, y, 0.75, 0.75),
    "hourglass": lambda x, y: _intersection(x.abs() - 0.7 * y.abs() - 0.12, y.abs() - 0.9),
    "star": lambda x, y: _star(x, y, 5, 1.15, 0.5),
    "ring": lambda x, y: _intersection(_disc(x, y, 0.95), -_disc(x, y, 0.5)),
    "crescent": lambda x, y: _intersection(_disc(x, y, 1.0), -_disc(x - 0.5, y, 0.8)),
    "cross": lambda x, y: _union(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
    "heart": _heart,
    "semicircle": lambda x, y: _intersection(_disc(x, y + 0.4, 1.05), -(y + 0.4)),
}

SHAPES10 = tuple(_FIGURES)


def draw(class_names, count, seed, size=32):
    """Draw `count` images of the named shapes, with as many of each as possible, in shuffled order.

    Image number i depends on `class_names`, `seed`, `size` and i alone: not on `count`, nor on the number
    of threads. (Another kind of processor may round one value in a million differently, by 1.) Numbers of images per
    class differ by one at most.

    class_names: distinct names from `SHAPES10`; label k is the k-th of them.
    Returns (images uint8 [count, 3, size, size], labels int64 [count]), on the CPU.
    Raises ValueError for an unknown or repeated name, no names, or a count or size that is not possible.
    """
    class_names = list(class_names)
    unknown = [name for name in class_names if name not in _FIGURES]
    if unknown:
        raise ValueError(f"no such shape: {', '.join(map(str, unknown))}; there are {', '.join(_FIGURES)}")
    if not class_names or len(set(class_names)) < len(class_names):
        raise ValueError("class_names must be one or more distinct names")
    if count < 0 or size < 4:
        raise ValueError(f"count must be >= 0 and size >= 4, not {count} and {size}")

    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    rounds = max(1, BLOCK // len(class_names))
    block = rounds * len(class_names)
    with _one_thread():
        for number, start in enumerate(range(0, count, block)):
            stop = min(start + block, count)
            # A block is always drawn whole, so that its random numbers do not depend on `count`.
            block_images, block_labels = _draw_block(class_names, rounds, _block_seed(seed, number), size)
            images[start:stop] = block_images[: stop - start]
            labels[start:stop] = block_labels[: stop - start]
    return images, labels


@contextlib.contextmanager
def _one_thread():
    """The steps are too small to share out: on a busy machine, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _block_seed(seed, number):
    """Mix both numbers into 32 bits (torch's CPU generator ignores the rest), as splitmix64 does."""
    value = (seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xD1B54A32D192ED03) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value >> 32


def _draw_block(class_names, rounds, seed, size):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.rand(rounds, len(class_names), generator=generator).argsort(dim=1).flatten()
    count = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale = uniform(*SIZE_RANGE, 1, 1)
    centre = uniform(0.5 - PLACE, 0.5 + PLACE, 2, 1)
    angle = uniform(-ROTATION, ROTATION, 1, 1)
    stretch = uniform(-ASPECT, ASPECT, 1, 1).exp()
    corner = uniform(0, 1, 3)
    opposite = (corner + 2 * uniform(-SHADING, SHADING, 3)).clamp(0, 1)
    background, shade = (corner + opposite) / 2, (opposite - corner) / 2
    shade_angle = uniform(0, 2 * math.pi, 1, 1)
    colour = _visible_colour(uniform(0, 1, 8, 3), background, shade)
    behind = _clutter(uniform, STROKES_BEHIND, BLOBS_BEHIND)
    front = _clutter(uniform, STROKES_IN_FRONT, BLOBS_IN_FRONT)
    noise = uniform(*NOISE, 1, 1, 1) * torch.randn(count, 3, size, size, generator=generator)

    x, y = _pixel_centres(size)
    along = _turned(x - 0.5, y - 0.5, shade_angle)[0] * math.sqrt(2)  # within [-1, 1]
    images = background[:, :, None, None] + shade[:, :, None, None] * along[:, None]
    for cover, tint in behind:
        _paint(images, cover(x, y, size), tint)
    _paint(images, _figure_cover(class_names, labels, centre, scale, angle, stretch, size), colour)
    for cover, tint in front:
        _paint(images, cover(x, y, size), tint)
    images += noise
    return images.mul_(255).round_().clamp_(0, 255).to(torch.uint8), labels


def _pixel_centres(size):
    """x [1, size] and y [size, 1], in (0, 1), kept apart as long as possible to save work."""
    ticks = (torch.arange(size) + 0.5) / size
    return ticks[None, :], ticks[:, None]


def _turned(x, y, angle):
    """x [B or 1, 1, W] and y [B or 1, H, 1] in axes turned by angle [B, 1, 1]: two [B, H, W]."""
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin


def _visible_colour(candidates, background, shade):
    """The first candidate [B, K, 3] that is far enough from every shade of the background; a corner of the
    colour cube if none is."""
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).expand(len(candidates), 8, 3)
    candidates = torch.cat([candidates, corners], dim=1)
    offset = candidates - background[:, None]
    length = (shade * shade).sum(1).clamp(min=1e-12)
    nearest = ((offset * shade[:, None]).sum(2) / length[:, None]).clamp(-1, 1)
    distance = (offset - nearest[:, :, None] * shade[:, None]).norm(dim=2)
    first = (distance >= MIN_CONTRAST).float().argmax(dim=1)
    return candidates[torch.arange(len(candidates)), first]


def _figure_cover(class_names, labels, centre, scale, angle, stretch, size):
    """Share of each pixel that the figure covers: [B, size, size] in [0, 1]."""
    x, y = _pixel_centres(size * SUPERSAMPLING)
    x, y = (x - centre[:, :1]) / scale, (y - centre[:, 1:]) / scale
    cover = torch.empty(len(labels), size, size)
    for label, name in enumerate(class_names):
        chosen = (labels == label).nonzero().flatten()
        u, v = _turned(x[chosen], y[chosen], angle[chosen])
        inside = _FIGURES[name](u.mul_(stretch[chosen]), v.div_(-stretch[chosen])) <= 0  # y upwards
        cover[chosen] = torch.nn.functional.avg_pool2d(inside.float(), SUPERSAMPLING)
    return cover


def _clutter(uniform, strokes, blobs):
    """Pairs (function from pixel centres to the share of each pixel covered [B, H, W], colour [B, 3])."""
    return [_stroke(uniform) for _ in range(strokes)] + [_blob(uniform) for _ in range(blobs)]


def _stroke(uniform):
    middle, direction = uniform(0, 1, 2, 1), uniform(0, math.pi, 1, 1)
    half_length, half_width = uniform(*STROKE_LENGTH, 1, 1), uniform(*STROKE_WIDTH, 1, 1)
    present, tint = uniform(0, 1, 1, 1) < CLUTTER, uniform(0, 1, 3)

    def cover(x, y, size):
        along, across = _turned(x - middle[:, :1], y - middle[:, 1:], direction)
        distance = torch.hypot((along.abs() - half_length).clamp(min=0), across)
        return ((half_width - distance) * size + 0.5).clamp(0, 1) * present

    return cover, tint


def _blob(uniform):
    centre, radius = uniform(0, 1, 2, 1), uniform(*BLOB_RADIUS, 1, 1)
    present, tint = uniform(0, 1, 1, 1) < CLUTTER, uniform(0, 1, 3)

    def cover(x, y, size):
        distance = ((x - centre[:, :1]).square() + (y - centre[:, 1:]).square()).sqrt()
        return ((radius - distance) * size + 0.5).clamp(0, 1) * present

    return cover, tint


def _paint(images, cover, tint):
    """Lay a colour [B, 3] over images [B, 3, H, W], in place, where `cover` [B, H, W] says."""
    images.lerp_(tint[:, :, None, None].expand_as(images), cover[:, None].expand_as(images))
