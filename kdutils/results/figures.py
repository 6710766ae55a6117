"""Pictures for notebooks and report: functions from data to a matplotlib `Figure`, 6.3 inches wide at most.

None is registered with pyplot, so nothing is shown unless it is displayed, and then once. Colours are those
of Okabe and Ito, which colour-blind readers can tell apart; markers, line styles and hatches differ too.
Save with the figure's own dpi (matplotlib's default): images in a PDF are sampled at it.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdutils.data.images import Split
from kdutils.results import metrics

WIDTH = 6.3  # inches: the report's text width
HALF = 3.05  # of figures that stand side by side there
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7, "lines.linewidth": 1.3, "lines.markersize": 4, "grid.color": "0.88",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.dpi": 200, "figure.constrained_layout.use": True,
}  # fmt: skip
# Read when a figure is saved, hence not part of STYLE: fonts as TrueType, so that text in the PDF stays text.
matplotlib.rcParams["pdf.fonttype"] = 42


def _styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under STYLE, whatever the reader's own settings are, and leave those as they were."""

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            figure = function(*args, **kwargs)
            # Ticks are made when a figure is first drawn, with the settings of that moment.
            figure.draw_without_rendering()
        return figure

    return draw


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of this size in inches with one pair of axes."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _look(number: int) -> dict[str, Any]:
    """Colour and marker of the classifier of a number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def _by_group(frame: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """Means of the groups of a frame, in order of appearance, of fractions in per cent, with their 95 % intervals over
    seeds: columns mean, low, high, n; the groups are the index."""
    found = {name: metrics.mean_interval(100 * values) for name, values in frame.groupby(by, sort=False)[value]}
    return pd.DataFrame(list(found.values()), index=list(found), columns=metrics.Difference._fields)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of rows that stand at 0, 1, ... from the top, with a grid for their values."""
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)


# --- images ---


@_styled
def image_grid(split: Split, classes: Sequence[str], per_class: int = 8, seed: int = 0) -> Figure:
    """One row per class with its name: `per_class` images of each, chosen at random by `seed`.

    split: `images` uint8 [N, 3, H, W] and `labels` int64 [N]. The row of a class with fewer images ends blank.
    """
    generator = torch.Generator().manual_seed(seed)
    shown = torch.full((len(classes), per_class, *split.images.shape[1:]), 255, dtype=torch.uint8)
    for label, row in enumerate(shown):
        members = (split.labels.cpu() == label).nonzero().flatten()
        chosen = members[torch.randperm(len(members), generator=generator)[:per_class]]
        row[: len(chosen)] = split.images[chosen.to(split.images.device)].cpu()
    figure, axes, (height, _) = _mosaic(shown.flatten(0, 1), per_class, left=0.85)
    axes.set_yticks([height * (row + 0.5) for row in range(len(classes))], classes)
    axes.tick_params(length=0)
    return figure


@_styled
def views_grid(images: Tensor, columns: int = 9) -> Figure:
    """Views uint8 [V, 3, H, W] in reading order, `columns` to a row; with 12 columns or fewer, numbered."""
    columns = min(columns, len(images))
    figure, axes, (height, width) = _mosaic(images.cpu(), columns, left=0)
    axes.set_yticks([])
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for number in range(len(images) if columns <= 12 else 0):
        place = width * (number % columns) + 1, height * (number // columns) + 1
        axes.text(*place, str(number), fontsize=6, va="top", color="black", bbox=box)
    return figure


def _mosaic(images: Tensor, columns: int, left: float) -> tuple[Figure, Axes, tuple[int, int]]:
    """A figure of full width with images uint8 [n, 3, H, W] in rows, white gaps between them, and `left` inches beside
    them for names; its axes, which count pixels; the (vertical, horizontal) distance between images."""
    number, channels, height, width = images.shape
    gap, rows = max(1, round(width / 16)), math.ceil(number / columns)
    height, width = height + gap, width + gap
    tiles = torch.full((rows * columns, channels, height, width), 255, dtype=torch.uint8)
    tiles[:number, :, :-gap, :-gap] = images
    in_rows = tiles.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    picture = in_rows.reshape(rows * height, columns * width, channels)[:-gap, :-gap]
    down, across = picture.shape[:2]
    figure, axes = _panel(WIDTH, (WIDTH - left) * down / across + 0.05)
    axes.imshow(picture.numpy(), interpolation="nearest", extent=(0, across, down, 0))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure, axes, (height, width)


@_styled
def soft_labels(
    images: Tensor, logits: Tensor, labels: Tensor, classes: Sequence[str], temperatures: Sequence[float]
) -> Figure:
    """What a teacher predicts for a few images: a row each, with the image and its class probabilities (%)
    softened at each temperature, the true class in blue.

    images uint8 [n, 3, H, W], logits [n, C], labels int64 [n].
    """
    count = len(images)
    figure = Figure(figsize=(WIDTH, count * (0.3 + 0.1 * len(classes)) + 0.35))
    grid = figure.subplots(count, 1 + len(temperatures), squeeze=False, width_ratios=[1.0] + [1.15] * len(temperatures))
    for (picture, *panels), image, scores, label in zip(grid, images, logits.cpu().double(), labels.tolist()):
        picture.imshow(image.cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set_title(classes[label], fontsize=8, pad=2)
        picture.axis("off")
        colours = [COLOURS[0] if place == label else "0.72" for place in range(len(classes))]
        for axes, temperature in zip(panels, temperatures):
            percent = 100 * (scores / temperature).softmax(dim=0).numpy()
            axes.barh(range(len(classes)), percent, height=0.75, color=colours)
            axes.set(xlim=(0, 100), ylim=(len(classes) - 0.4, -0.6), xticks=[0, 50, 100])
            _name_rows(axes, classes)
            axes.tick_params(axis="y", labelsize=7, labelleft=axes is panels[0])
            axes.tick_params(axis="x", length=2, labelbottom=picture is grid[-1][0])
    for top, bottom, temperature in zip(grid[0][1:], grid[-1][1:], temperatures):
        top.set_title(f"T = {temperature:g}", pad=3)
        bottom.set_xlabel("probability (%)")
    return figure


# --- training ---


@_styled
def learning_curves(histories: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Figure:
    """Loss and accuracy (%) by epoch: training dashed, validation solid; the mean over seeds, in a band from
    the least to the greatest of them.

    histories: {label: histories of its seeds, all of as many epochs}.
    """
    figure = Figure(figsize=(WIDTH, 2.6))
    entries = []
    for axes, quantity, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), ("loss (nats)", "accuracy (%)")):
        for number, seeds in enumerate(histories.values()):
            look = _look(number)
            for part, line, face in (("train", "--", "white"), ("val", "-", look["color"])):
                values = np.array([history[f"{part}_{quantity}"] for history in seeds])
                values = values * (100 if quantity == "accuracy" else 1)
                epochs = np.arange(1, values.shape[1] + 1)
                every = max(1, len(epochs) // 6)
                marked = (number * every // len(histories), every)
                marks = {"markersize": 3.5, "markevery": marked, "markerfacecolor": face}
                axes.plot(epochs, values.mean(axis=0), line, **look, **marks)
                if len(seeds) > 1:
                    band = {"color": look["color"], "alpha": 0.18, "linewidth": 0}
                    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), **band)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    if len(histories) > 1:
        entries = [Line2D([], [], **_look(number), label=label) for number, label in enumerate(histories)]
    entries += [Line2D([], [], color="0.3", linestyle="--", label="training")]
    entries += [Line2D([], [], color="0.3", linestyle="-", label="validation")]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)))
    return figure


# --- results ---


@_styled
def confusion(matrix: Any, classes: Sequence[str]) -> Figure:
    """Confusion matrix (counts [C, C], rows = true class) as a heat map of each row's shares in %.

    A class without images has an empty row.
    """
    counts = np.asarray(matrix, dtype=float)
    images = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    figure, axes = _panel(5.2, 4.5)
    shares = pd.DataFrame(percent, list(classes), list(classes))
    _heat_map(axes, shares, True, "share of the true class (%)", vmin=0, vmax=100, fmt=".0f", square=True)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticklabels(classes, rotation=45, ha="right", rotation_mode="anchor")
    return figure


@_styled
def setting_map(frame: pd.DataFrame) -> Figure:
    """Mean validation accuracy (%) of every combination of temperature and alpha as a heat map, with its number, the
    standard deviation over the trial's folds and seeds beneath it, and a frame around the highest mean.

    frame: a row per trained student with the columns temperature, alpha and val_accuracy (a fraction). Rows without a
    temperature or an alpha are left out, and combinations that were not tried stay blank.
    """
    groups = frame.groupby(["temperature", "alpha"]).val_accuracy
    means, deviations = 100 * groups.mean().unstack(), 100 * groups.std().unstack()
    figure, axes = _panel(min(WIDTH, 1.5 + 0.78 * means.shape[1]), 0.9 + 0.5 * means.shape[0])
    pairs = zip(means.to_numpy(), deviations.to_numpy())
    texts = [[f"{m:.1f}" + (f"\n±{sd:.1f}" if np.isfinite(sd) else "") for m, sd in zip(*pair)] for pair in pairs]
    _heat_map(axes, means, texts, "validation accuracy (%)", fmt="")
    row, column = divmod(int(np.nanargmax(means)), means.shape[1])
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2, clip_on=False))
    axes.set_xticklabels([f"{number:g}" for number in means.columns])
    axes.set_yticklabels([f"{number:g}" for number in means.index])
    axes.set(xlabel="$\\alpha$: weight of the soft term", ylabel="temperature $T$")
    axes.invert_yaxis()
    return figure


def _heat_map(axes: Axes, values: pd.DataFrame, texts: Any, name: str, **more: Any) -> None:
    """Cells in shades of blue, with texts (True: the values) and a colour bar; those that are nan stay blank.

    more: what else `seaborn.heatmap` takes.
    """
    import seaborn  # slow to import, and few pictures need it

    bar = {"label": name, "shrink": 0.85}
    look: dict[str, Any] = {"cmap": "Blues", "linewidths": 0.4, "annot_kws": {"fontsize": 7}, "cbar_kws": bar}
    seaborn.heatmap(values, ax=axes, annot=texts, **look, **more)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", labelrotation=0)


@_styled
def arm_comparison(frame: pd.DataFrame) -> Figure:
    """Accuracy (%) of each arm, in the order of the frame: a dot per seed, and the mean with its 95 %
    interval (Student t over three or more seeds).

    frame: columns arm, label (how the arm is called here), seed, accuracy (a fraction).
    """
    found = _by_group(frame, "arm", "accuracy")
    figure, axes = _panel(WIDTH, 0.75 + 0.3 * len(found))
    rows = np.arange(len(found))
    places = frame["arm"].map(dict(zip(found.index, rows - 0.2)))
    axes.plot(
        100 * frame["accuracy"], places, "o", markerfacecolor="none", markeredgecolor=COLOURS[0], label="one seed"
    )
    if found["low"].notna().any():
        axes.hlines(rows + 0.12, found["low"], found["high"], color=COLOURS[1], linewidth=1.6, label="95 % interval")
    axes.plot(found["mean"], rows + 0.12, "D", markersize=5, color=COLOURS[1], label="mean")
    for row, mean in zip(rows, found["mean"]):
        axes.text(mean, row + 0.28, f"{mean:.1f}", ha="center", va="top", fontsize=7)
    _name_rows(axes, frame.drop_duplicates("arm")["label"].tolist())
    axes.set(ylim=(len(found) - 0.3, -0.6), xlabel="accuracy (%)")
    figure.legend(loc="outside lower right", ncols=3)
    return figure


@_styled
def accuracy_against_epochs(frame: pd.DataFrame) -> Figure:
    """Accuracy (%) against the number of epochs, a line per arm: means with their 95 % intervals over seeds.

    frame: columns label (the arm), epochs, seed and accuracy (a fraction).
    """
    figure, axes = _panel(HALF, 3.1)
    numbers, groups = sorted(set(frame["epochs"])), frame.groupby("label", sort=False)
    for number, (label, of_label) in enumerate(groups):
        look, found = _look(number), _by_group(of_label, "epochs", "accuracy").sort_index()
        places = [numbers.index(epochs) + 0.06 * (number - (len(groups) - 1) / 2) for epochs in found.index]
        axes.vlines(places, found["low"], found["high"], color=look["color"], linewidth=1.4)
        axes.plot(places, found["mean"], **look, markersize=5, linestyle=LINES[number % 4], label=label)
    axes.set_xticks(range(len(numbers)), [f"{epochs:,}" for epochs in numbers])
    axes.set(xlabel="epochs", ylabel="accuracy (%)", xlim=(-0.4, len(numbers) - 0.6))
    axes.grid(axis="y")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center")
    return figure
