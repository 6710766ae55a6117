"""Pictures for notebooks and report: functions from data to a matplotlib `Figure`, 6.3 inches wide at most.

None is registered with pyplot, so nothing is shown unless it is displayed, and then once. Colours are those
of Okabe and Ito, told apart by colour-blind readers; markers and line styles tell the same in grey.
Save with the figure's own dpi (matplotlib's default): images in a PDF are sampled at it.
"""
import functools
import math

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from kdutils import metrics

WIDTH = 6.3    # inches: the report's text width
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7, "lines.linewidth": 1.3, "lines.markersize": 4, "grid.color": "0.88",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.dpi": 200, "figure.constrained_layout.use": True,
}
# Read when a figure is saved, hence not part of STYLE: fonts as TrueType, so that text in the PDF stays text.
matplotlib.rcParams["pdf.fonttype"] = 42


def _styled(function):
    """Draw under STYLE, whatever the reader's own settings are, and leave those as they were."""
    @functools.wraps(function)
    def draw(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            figure = function(*args, **kwargs)
            # Ticks are made when a figure is first drawn, with the settings of that moment.
            figure.draw_without_rendering()
        return figure
    return draw


# --- images ---

@_styled
def image_grid(split, classes, per_class=8, seed=0):
    """One row per class with its name: `per_class` images of each, chosen at random by `seed`.

    split: anything with `images` uint8 [N, 3, H, W] and `labels` int64 [N]. A class with fewer images than
    that leaves the rest of its row blank.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = split.labels.cpu()
    rows = []
    for label in range(len(classes)):
        members = (labels == label).nonzero().flatten()
        chosen = members[torch.randperm(len(members), generator=generator)[:per_class]]
        rows.append(split.images[chosen.to(split.images.device)].cpu())
    mosaic, pitch = _mosaic(rows, per_class)
    figure, axes = _mosaic_axes(mosaic, left=0.85)
    axes.set_yticks([pitch[0] * (row + 0.5) for row in range(len(rows))], classes)
    axes.tick_params(length=0)
    return figure


@_styled
def views_grid(images, columns=9):
    """Views uint8 [V, 3, H, W] in reading order, `columns` to a row; with 12 columns or fewer, numbered."""
    columns = min(columns, len(images))
    mosaic, pitch = _mosaic(list(images.cpu().split(columns)), columns)
    figure, axes = _mosaic_axes(mosaic, left=0)
    axes.set_yticks([])
    if columns <= 12:
        for number in range(len(images)):
            axes.text(pitch[1] * (number % columns) + 1, pitch[0] * (number // columns) + 1, str(number),
                      fontsize=6, va="top", color="black",
                      bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})
    return figure


def _mosaic(rows, columns):
    """Rows of images, each uint8 [n, 3, H, W] with n <= columns, as one image [H', W', 3] with white gaps,
    and the (vertical, horizontal) distance from one image to the next in pixels."""
    height, width = next(row.shape[2:] for row in rows)
    gap = max(1, round(width / 16))
    mosaic = torch.full((len(rows) * (height + gap), columns * (width + gap), 3), 255, dtype=torch.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            mosaic[top:top + height, left:left + width] = image.permute(1, 2, 0)
    return mosaic[:-gap, :-gap].numpy(), (height + gap, width + gap)


def _mosaic_axes(mosaic, left):
    """Figure of full width with the mosaic in it; `left` inches beside it are kept for names."""
    figure = Figure(figsize=(WIDTH, (WIDTH - left) * mosaic.shape[0] / mosaic.shape[1] + 0.05))
    axes = figure.add_subplot()
    # The mosaic's own corner is (0, 0), so that positions are counts of pixels.
    axes.imshow(mosaic, interpolation="nearest", extent=(0, mosaic.shape[1], mosaic.shape[0], 0))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    return figure, axes


@_styled
def soft_labels(images, logits, labels, classes, temperatures):
    """What a teacher says of a few images: a row each, with the image and its class probabilities (%)
    softened at each temperature, the true class in blue.

    images uint8 [n, 3, H, W], logits [n, C], labels int64 [n].
    """
    count, height = len(images), 0.3 + 0.1 * len(classes)
    figure = Figure(figsize=(WIDTH, count * height + 0.35))
    grid = figure.subplots(count, 1 + len(temperatures), squeeze=False,
                           width_ratios=[1.0] + [1.15] * len(temperatures))
    places = np.arange(len(classes))
    for row, (image, scores, label) in enumerate(zip(images.cpu(), logits.cpu().double(), labels.tolist())):
        picture, *panels = grid[row]
        picture.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set_title(classes[label], fontsize=8, pad=2)
        picture.axis("off")
        for axes, temperature in zip(panels, temperatures):
            percent = 100 * (scores / temperature).softmax(dim=0).numpy()
            axes.barh(places, percent, height=0.75,
                      color=[COLOURS[0] if place == label else "0.72" for place in places])
            axes.set(xlim=(0, 100), ylim=(len(classes) - 0.4, -0.6))
            axes.set_xticks([0, 50, 100])
            axes.grid(axis="x")
            axes.set_yticks(places, classes if axes is panels[0] else [])
            axes.tick_params(axis="y", length=0, labelsize=7)
            axes.tick_params(axis="x", length=2, labelbottom=row == count - 1)
            if row == 0:
                axes.set_title(f"T = {temperature:g}", pad=3)
            if row == count - 1:
                axes.set_xlabel("probability (%)")
    return figure


# --- training ---

@_styled
def learning_curves(histories):
    """Loss and accuracy (%) by epoch: training dashed, validation solid; the mean over seeds in a band from
    the least to the greatest of them.

    histories: {label: histories of its seeds, all of as many epochs}.
    """
    figure = Figure(figsize=(WIDTH, 2.6))
    panels = figure.subplots(1, 2)
    for number, seeds in enumerate(histories.values()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for axes, quantity, unit in zip(panels, ("loss", "accuracy"), (1, 100)):
            for part, line in (("train", "--"), ("val", "-")):
                values = unit * np.array([history[f"{part}_{quantity}"] for history in seeds])
                epochs = np.arange(1, values.shape[1] + 1)
                every = max(1, len(epochs) // 6)
                axes.plot(epochs, values.mean(axis=0), line, color=colour, marker=marker, markersize=3.5,
                          markevery=(number * every // max(1, len(histories)), every),
                          markerfacecolor=colour if part == "val" else "white")
                if len(seeds) > 1:
                    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour,
                                      alpha=0.18, linewidth=0)
    for axes, name in zip(panels, ("loss (nats)", "accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    entries = [Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=label)
               for i, label in enumerate(histories)] if len(histories) > 1 else []
    entries += [Line2D([], [], color="0.3", linestyle=line, label=name)
                for name, line in (("training", "--"), ("validation", "-"))]
    figure.legend(handles=entries, loc="outside lower center", ncols=min(4, len(entries)))
    return figure


# --- results ---

@_styled
def confusion(matrix, classes):
    """Confusion matrix (counts [C, C], rows = true class) as a heat map of each row's shares in %.

    A class without images has an empty row.
    """
    counts = np.asarray(matrix, dtype=float)
    images = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    figure = Figure(figsize=(5.2, 4.5))
    axes = figure.add_subplot()
    import seaborn as sns  # slow to import, and only this picture needs it

    sns.heatmap(percent, ax=axes, vmin=0, vmax=100, cmap="Blues", annot=True, fmt=".0f", square=True,
                annot_kws={"fontsize": 7}, linewidths=0.4, xticklabels=classes, yticklabels=classes,
                cbar_kws={"label": "share of the true class (%)", "shrink": 0.85})
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.tick_params(length=0)
    axes.set_xticklabels(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticklabels(axes.get_yticklabels(), rotation=0)
    return figure


@_styled
def arm_comparison(frame):
    """Accuracy (%) of each arm, in the order of the frame: a dot per seed, and the mean with its 95 %
    interval (Student t over seeds; none for a single seed).

    frame: columns arm, label (how the arm is called here), seed, accuracy (a fraction).
    """
    arms = list(dict.fromkeys(frame["arm"]))
    figure = Figure(figsize=(WIDTH, 0.75 + 0.3 * len(arms)))
    axes = figure.add_subplot()
    for row, arm in enumerate(arms):
        values = 100 * frame.loc[frame["arm"] == arm, "accuracy"].to_numpy(dtype=float)
        mean, low, high, n = metrics.mean_interval(values)
        axes.plot(values, np.full(n, row - 0.2), "o", markersize=4, markerfacecolor="none",
                  markeredgecolor=COLOURS[0], label="one seed")
        if n > 1:
            axes.plot([low, high], [row + 0.12] * 2, "-", color=COLOURS[1], linewidth=1.6,
                      label="95 % interval")
        axes.plot(mean, row + 0.12, "D", markersize=5, color=COLOURS[1], label="mean")
        axes.annotate(f"{mean:.1f}", (mean, row + 0.12), xytext=(0, -4), textcoords="offset points",
                      ha="center", va="top", fontsize=7)
    labels = frame.drop_duplicates("arm").set_index("arm")["label"]
    axes.set_yticks(range(len(arms)), [labels[arm] for arm in arms])
    axes.set(ylim=(len(arms) - 0.3, -0.6), xlabel="accuracy (%)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    entries = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.legend(entries.values(), entries.keys(), loc="outside lower right", ncols=3)
    return figure


@_styled
def accuracy_against_cost(frame):
    """Accuracy (%) against what a model costs: its parameters, and its latency per image (both axes log).

    frame: a row per model with columns label, accuracy (a fraction), parameters, latency (seconds per image),
    and, to draw intervals, low and high (fractions; nan for none).
    """
    figure = Figure(figsize=(WIDTH, 3.4))
    panels = figure.subplots(1, 2, sharey=True)
    accuracies = 100 * frame["accuracy"].to_numpy(dtype=float)
    for axes, column, unit, name in ((panels[0], "parameters", 1, "parameters"),
                                     (panels[1], "latency", 1000, "latency per image (ms)")):
        costs = unit * frame[column].to_numpy(dtype=float)
        for number, (cost, accuracy) in enumerate(zip(costs, accuracies)):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(cost, accuracy, MARKERS[number % len(MARKERS)], color=colour, markersize=5)
            if "low" in frame and np.isfinite(frame["low"].iloc[number]):
                axes.plot([cost] * 2, [100 * frame["low"].iloc[number], 100 * frame["high"].iloc[number]],
                          color=colour, linewidth=1)
        axes.set_xscale("log")
        middle = math.sqrt(costs.min() * costs.max())
        span = max(costs.max() / costs.min(), 10)
        axes.set_xlim(middle / span ** 0.65, middle * span ** 0.65)
        axes.margins(y=0.12)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(name)
        axes.grid()
    panels[0].set_ylabel("accuracy (%)")
    for axes, column, unit in ((panels[0], "parameters", 1), (panels[1], "latency", 1000)):
        _name_points(axes, unit * frame[column].to_numpy(dtype=float), accuracies, frame["label"])
    return figure


def _name_points(axes, xs, ys, names):
    """Names beside points, towards the middle of the axes, moved up or down so that no two overlap."""
    low, high = axes.get_ylim()
    heights = _apart((ys - low) / (high - low), least=0.052)
    middle = math.sqrt(math.prod(axes.get_xlim()))
    for x, y, height, name in zip(xs, ys, heights, names):
        right = x <= middle
        axes.annotate(name, (x, y), xytext=(12 if right else -12, height), fontsize=7, va="center",
                      textcoords=("offset points", "axes fraction"), ha="left" if right else "right",
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5",
                                  "shrinkA": 0, "shrinkB": 2})


def _apart(heights, least):
    """Heights [n] in [0, 1], pushed apart, in their order and within [0, 1], until they lie `least` apart."""
    heights = np.asarray(heights, dtype=float)
    order = np.argsort(heights, kind="stable")
    placed = heights[order]
    for _ in range(500):
        short = least - np.diff(placed)
        if (short <= 1e-6).all():
            break
        push = np.clip(short, 0, None) / 2
        placed[:-1] -= push
        placed[1:] += push
        placed = placed.clip(least / 2, 1 - least / 2)
    moved = np.empty_like(placed)
    moved[order] = placed
    return moved
