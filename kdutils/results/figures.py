"""Pictures for notebooks and report: functions from data to a matplotlib `Figure`, 6.3 inches wide at most.

None is registered with pyplot, so nothing is shown unless it is displayed, and then once. Colours are those
of Okabe and Ito, which colour-blind readers can tell apart; markers, line styles and hatches differ too.
Save with the figure's own dpi (matplotlib's default): images in a PDF are sampled at it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter
from torch import Tensor

from kdutils.data.images import Split
from kdutils.results import metrics

WIDTH = 6.3  # inches: the report's text width
HALF = 3.05  # of figures that stand side by side there
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
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


def _intervals(groups: Iterable[Iterable[float]]) -> pd.DataFrame:
    """Means of groups of fractions in per cent, with 95 % intervals over seeds: columns mean, low, high."""
    found = [metrics.mean_interval(100 * float(value) for value in values) for values in groups]
    return pd.DataFrame(found, columns=metrics.Difference._fields)


def _by_group(frame: pd.DataFrame, by: str, value: str) -> pd.DataFrame:
    """`_intervals` of the groups of a frame, in order of appearance, with the groups as the index."""
    groups = dict(list(frame.groupby(by, sort=False)[value]))
    return _intervals(groups.values()).set_axis(list(groups))


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


def _show_image(axes: Axes, image: Tensor, title: str, fontsize: float) -> None:
    """An image uint8 [3, H, W] without axes."""
    axes.imshow(image.cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=fontsize, pad=2)


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
        _show_image(picture, image, classes[label], fontsize=8)
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
                    _band(axes, epochs, values.min(axis=0), values.max(axis=0), look["color"])
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    if len(histories) > 1:
        entries = [Line2D([], [], **_look(number), label=label) for number, label in enumerate(histories)]
    entries += [Line2D([], [], color="0.3", linestyle="--", label="training")]
    entries += [Line2D([], [], color="0.3", linestyle="-", label="validation")]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)))
    return figure


def _band(axes: Axes, xs: Any, low: Any, high: Any, colour: str) -> None:
    axes.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)


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
    texts = [[f"{share:.0f}" for share in row] for row in percent]
    _heat_map(axes, percent, texts, "share of the true class (%)", limits=(0, 100), shrink=0.85)
    axes.set(xlabel="predicted class", ylabel="true class", aspect="equal")
    axes.invert_yaxis()
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    return figure


@_styled
def setting_map(
    frame: pd.DataFrame, rows: str = "temperature", columns: str = "alpha", value: str = "val_accuracy"
) -> Figure:
    """Mean validation accuracy (%) of every combination of two settings as a heat map, with its number, the
    standard deviation over the trial's folds and seeds beneath it, and a frame around the highest mean.

    frame: a row per trained student with the columns named by `rows`, `columns` and `value` (a fraction). Rows
    without a value of either are left out, and combinations that were not tried stay blank.
    """
    groups = frame.groupby([rows, columns])[value]
    means, deviations = 100 * groups.mean().unstack(), 100 * groups.std().unstack()
    figure, axes = _panel(min(WIDTH, 1.5 + 0.78 * means.shape[1]), 0.9 + 0.5 * means.shape[0])
    pairs = zip(means.to_numpy(), deviations.to_numpy())
    texts = [[f"{m:.1f}" + (f"\n±{sd:.1f}" if np.isfinite(sd) else "") for m, sd in zip(*pair)] for pair in pairs]
    _heat_map(axes, means.to_numpy(), texts, "validation accuracy (%)")
    row, column = np.unravel_index(np.nanargmax(means), means.shape)
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2))
    symbols = {"alpha": "$\\alpha$: weight of the soft term", "temperature": "temperature $T$"}
    axes.set_xticks(range(means.shape[1]), [f"{number:g}" for number in means.columns])
    axes.set_yticks(range(means.shape[0]), [f"{number:g}" for number in means.index])
    axes.set(xlabel=symbols.get(columns, columns), ylabel=symbols.get(rows, rows))
    return figure


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    texts: Sequence[Sequence[str]],
    name: str,
    limits: tuple[float, float] | None = None,
    shrink: float = 1.0,
) -> None:
    """Cells of values [R, C] in shades of blue between the limits (default: the values'), the first row below, with
    texts, and a colour bar; cells that are nan stay blank."""
    low, high = limits or (np.nanmin(values), np.nanmax(values))
    edges = [np.arange(count + 1) - 0.5 for count in values.shape]
    picture = axes.pcolormesh(
        edges[1], edges[0], values, cmap="Blues", vmin=low, vmax=high, edgecolors="white", linewidth=0.4
    )
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value > (low + high) / 2 + 1e-9 else "black"
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=7, color=colour)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(picture, ax=axes, label=name, shrink=shrink).outline.set_visible(False)


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
        _write(axes, f"{mean:.1f}", (mean, row + 0.12), (0, -4), va="top")
    _name_rows(axes, frame.drop_duplicates("arm")["label"].tolist())
    axes.set(ylim=(len(found) - 0.3, -0.6), xlabel="accuracy (%)")
    figure.legend(loc="outside lower right", ncols=3)
    return figure


def _write(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], va: str) -> None:
    """A number above or below a point, `offset` points away."""
    axes.annotate(text, place, xytext=offset, textcoords="offset points", ha="center", va=va, fontsize=7)


@_styled
def accuracy_against_cost(frame: pd.DataFrame) -> Figure:
    """Accuracy (%) against what a model costs: its parameters, and its latency per image (both axes log).

    frame: a row per model with columns label, accuracy (a fraction), parameters, latency (seconds per image),
    and, to draw intervals, low and high (fractions; nan for none).
    """
    figure = Figure(figsize=(WIDTH, 2.5))
    panels = figure.subplots(1, 2, sharey=True)
    percent = 100 * frame.reindex(columns=["accuracy", "low", "high"]).astype(float)
    costs = {"parameters": frame["parameters"], "latency per image (ms)": 1000 * frame["latency"]}
    for axes, (name, cost) in zip(panels, costs.items()):
        for number, (x, (accuracy, low, high)) in enumerate(zip(cost, percent.values.tolist())):
            axes.plot(x, accuracy, **_look(number), markersize=5)
            axes.vlines(x, low, high, color=_look(number)["color"], linewidth=1)
        middle, span = math.sqrt(cost.min() * cost.max()), max(cost.max() / cost.min(), 10)
        axes.set(xscale="log", xlim=(middle / span**0.65, middle * span**0.65), xlabel=name)
        axes.margins(y=0.12)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid()
    panels[0].set_ylabel("accuracy (%)")
    for axes, cost in zip(panels, costs.values()):
        _name_points(axes, cost.to_numpy(dtype=float), percent["accuracy"].to_numpy(), frame["label"].tolist())
    return figure


def _name_points(axes: Axes, xs: np.ndarray, ys: np.ndarray, names: Sequence[str]) -> None:
    """Names beside points, towards the middle of the axes, moved up or down so that no two overlap."""
    low, high = axes.get_ylim()
    heights = _apart((ys - low) / (high - low), least=0.068)  # a line of text in that figure
    middle = math.sqrt(math.prod(axes.get_xlim()))
    arrow = {"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 2}
    for x, y, height, name in zip(xs, ys, heights, names):
        offset, side = (12, "left") if x <= middle else (-12, "right")
        at: dict[str, Any] = {"xytext": (offset, height), "textcoords": ("offset points", "axes fraction"), "ha": side}
        axes.annotate(name, (x, y), **at, va="center", fontsize=7, arrowprops=arrow)


def _apart(heights: np.ndarray, least: float) -> np.ndarray:
    """Heights [n] in [0, 1], pushed apart, in their order and within [0, 1], until they lie `least` apart."""
    order = np.argsort(heights, kind="stable")
    placed = heights[order]
    for _ in range(500):
        push = np.clip(least - np.diff(placed), 0, None) / 2
        if (push <= 5e-7).all():
            break
        placed[:-1] -= push
        placed[1:] += push
        placed = placed.clip(least / 2, 1 - least / 2)
    return placed[np.argsort(order)]


# --- where a gain comes from ---


@_styled
def reliability_diagram(tables: Mapping[str, Sequence[pd.DataFrame]]) -> Figure:
    """Accuracy against confidence (%), a line a model with a 95 % band over seeds, above the share of the images
    in each bin. Only bins in which every seed has images are drawn.

    tables: {label: tables of its seeds, each as of `metrics.reliability`}.
    """
    figure = Figure(figsize=(HALF, 3.1))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    for number, (label, seeds) in enumerate(tables.items()):
        look = {**_look(number), "linestyle": LINES[number % 4]}
        names = ("images", "confidence", "accuracy")
        images, confidence, accuracy = (np.array([table[name] for table in seeds], dtype=float) for name in names)
        drawn = (images > 0).all(axis=0)
        xs, found = 100 * confidence[:, drawn].mean(axis=0), _intervals(accuracy[:, drawn].T)
        upper.plot(xs, found["mean"], **look, label=label)
        if found["low"].notna().any():
            _band(upper, xs, found["low"], found["high"], look["color"])
        middles = 50 * (seeds[0]["low"] + seeds[0]["high"])
        shares = 100 * (images / images.sum(axis=1, keepdims=True)).mean(axis=0)
        lower.plot(middles, shares, **look, markersize=3)
    dotted = {"color": "0.6", "linewidth": 0.9, "linestyle": ":"}
    upper.plot([0, 100], [0, 100], **dotted, zorder=1.5, label="as confident as right")
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    lower.set(ylim=(0, None), xlabel="confidence (%)", ylabel="images (%)")
    for axes in (upper, lower):
        axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_styled
def gain_against_teacher(frame: pd.DataFrame) -> Figure:
    """A student's gain (points over the student from scratch) against its teacher's accuracy (%): a point per
    teacher, named, with the intervals of both where they are given.

    frame: a row per teacher with columns label, accuracy (a fraction), gain, low, high (points; nan for no
    interval) and, for the teacher's own interval, accuracy_low and accuracy_high (fractions).
    """
    figure, axes = _panel(HALF, 2.7)
    axes.axhline(0, color="0.45", linewidth=0.9)
    for number, row in enumerate(frame.to_dict("records")):
        look, accuracy = _look(number), 100 * row["accuracy"]
        own = [100 * row.get(name, math.nan) for name in ("accuracy_low", "accuracy_high")]
        axes.plot([accuracy] * 2, [row["low"], row["high"]], color=look["color"])
        axes.plot(own, [row["gain"]] * 2, color=look["color"])
        axes.plot(accuracy, row["gain"], **look, linestyle="", markersize=6, label=row["label"])
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel="test accuracy of the teacher (%)", ylabel="gain of the student (points)")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_styled
def class_gain(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Difference of the accuracies on each class (points) with its 95 % interval over seeds, one or more arms.

    tables: {label of the arm: table as of `metrics.per_class_difference`, of the same classes in all}.
    """
    classes = next(iter(tables.values()))["class"].tolist()
    figure, axes = _panel(WIDTH, 0.8 + (0.16 + 0.13 * len(tables)) * len(classes))
    axes.axvline(0, color="0.45", linewidth=0.9)
    for number, (label, table) in enumerate(tables.items()):
        places = np.arange(len(classes)) + 0.8 * ((number + 0.5) / len(tables) - 0.5)
        look = _look(number)
        axes.hlines(places, 100 * table["low"], 100 * table["high"], color=look["color"], linewidth=1.2)
        axes.plot(100 * table["mean"], places, **look, linestyle="", markersize=4.5, label=label)
    for place in range(1, len(classes)):
        axes.axhline(place - 0.5, color="0.9", linewidth=0.6)
    _name_rows(axes, classes)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlabel="difference of accuracies (points)")
    figure.legend(loc="outside lower right", ncols=min(3, len(tables)))
    return figure


@_styled
def agreement_bars(frame: pd.DataFrame) -> Figure:
    """Agreement of student and teacher (%) on all test images, on those that the teacher classifies right and on
    its errors: a bar per arm, the mean over seeds with its 95 % interval.

    frame: a row per arm, seed and part with columns label, part and agreement (a fraction); arms and parts are
    drawn in the order of the frame.
    """
    parts, groups = frame["part"].unique().tolist(), frame.groupby("label", sort=False)
    figure, axes = _panel(HALF, 2.7)
    width = 0.8 / len(groups)
    for number, (label, of_label) in enumerate(groups):
        found = _by_group(of_label, "part", "agreement").reindex(parts)
        places = np.arange(len(parts)) + width * (number + 0.5) - 0.4
        colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
        bars = axes.bar(places, found["mean"], 0.92 * width, color=colour, alpha=0.75, hatch=hatch, label=label)
        for bar in bars:
            bar.set(edgecolor="black", linewidth=0.5)
        axes.vlines(places, found["low"], found["high"], color="black", linewidth=1.2)
        for place, mean, top in zip(places, found["mean"], found["high"].fillna(found["mean"])):
            _write(axes, f"{mean:.0f}", (place, top), (0, 2), va="bottom")
    axes.set_xticks(range(len(parts)), parts)
    axes.set(ylabel="same prediction (%)", ylim=(0, 108), yticks=range(0, 101, 20))
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=min(3, len(groups)))
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


@_styled
def disagreement_gallery(
    split: Split,
    classes: Sequence[str],
    right_a: Any,
    right_b: Any,
    names: tuple[str, str],
    columns: int = 8,
    rows: int = 2,
) -> Figure:
    """Test images that most seeds of one arm classify right and most seeds of the other wrong, and the other way
    round: above those that only the first gets right, below those that only the second does.

    split: `images` uint8 [N, 3, H, W] and `labels` int64 [N]; right_a, right_b: bool [S, N], a row a seed; names:
    how the two arms are called. Shown are the images with the greatest difference of seeds, in their order in
    the data where these are equal; each title is the true class, each heading how many images there are.
    """
    shares = [torch.as_tensor(right).cpu().double().mean(dim=0) for right in (right_a, right_b)]
    figure = Figure(figsize=(WIDTH, 2 * (0.3 + rows * (WIDTH / columns + 0.08))))
    halves = figure.subfigures(2, 1, squeeze=False).flat
    for part, first, second, (one, other) in zip(halves, shares, shares[::-1], (names, names[::-1])):
        chosen = ((first > 0.5) & (second < 0.5)).nonzero().flatten()
        order = (second - first)[chosen].argsort(stable=True)
        part.suptitle(f"right: {one}, wrong: {other} ({len(chosen):,} of {len(first):,} images)", fontsize=9)
        panels = list(part.subplots(rows, columns, squeeze=False).flat)
        for axes in panels:
            axes.axis("off")
        for axes, number in zip(panels, chosen[order].tolist()):
            _show_image(axes, split.images[number], classes[int(split.labels[number])], fontsize=7)
    return figure
