"""Pictures for notebooks and report: functions from data to a matplotlib `Figure`, 6.3 inches wide at most.

None is registered with pyplot, so nothing is shown unless it is displayed, and then once. Colours are those
of Okabe and Ito, told apart by colour-blind readers; markers and line styles tell the same in grey.
Save with the figure's own dpi (matplotlib's default): images in a PDF are sampled at it.
"""

import functools
import math
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from kdutils.results import metrics

WIDTH = 6.3  # inches: the report's text width
HALF = 3.05  # of figures that stand side by side there
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[Any, Any] = {
    "font.size": 8.5, "axes.titlesize": 9, "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.7, "lines.linewidth": 1.3, "lines.markersize": 4, "grid.color": "0.88",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "figure.dpi": 200, "figure.constrained_layout.use": True,
}  # fmt: skip
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
            axes.text(
                pitch[1] * (number % columns) + 1,
                pitch[0] * (number // columns) + 1,
                str(number),
                fontsize=6,
                va="top",
                color="black",
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
            )
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
            mosaic[top : top + height, left : left + width] = image.permute(1, 2, 0)
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
    grid = figure.subplots(count, 1 + len(temperatures), squeeze=False, width_ratios=[1.0] + [1.15] * len(temperatures))
    places = np.arange(len(classes))
    for row, (image, scores, label) in enumerate(zip(images.cpu(), logits.cpu().double(), labels.tolist())):
        picture, *panels = grid[row]
        picture.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        picture.set_title(classes[label], fontsize=8, pad=2)
        picture.axis("off")
        for axes, temperature in zip(panels, temperatures):
            percent = 100 * (scores / temperature).softmax(dim=0).numpy()
            axes.barh(
                places, percent, height=0.75, color=[COLOURS[0] if place == label else "0.72" for place in places]
            )
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
                axes.plot(
                    epochs,
                    values.mean(axis=0),
                    line,
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    markevery=(number * every // max(1, len(histories)), every),
                    markerfacecolor=colour if part == "val" else "white",
                )
                if len(seeds) > 1:
                    axes.fill_between(
                        epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0
                    )
    for axes, name in zip(panels, ("loss (nats)", "accuracy (%)")):
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
    entries = (
        [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], label=label)
            for i, label in enumerate(histories)
        ]
        if len(histories) > 1
        else []
    )
    entries += [
        Line2D([], [], color="0.3", linestyle="--", label="training"),
        Line2D([], [], color="0.3", linestyle="-", label="validation"),
    ]
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

    sns.heatmap(
        percent,
        ax=axes,
        vmin=0,
        vmax=100,
        cmap="Blues",
        annot=True,
        fmt=".0f",
        square=True,
        annot_kws={"fontsize": 7},
        linewidths=0.4,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.85},
    )
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
        axes.plot(
            values,
            np.full(n, row - 0.2),
            "o",
            markersize=4,
            markerfacecolor="none",
            markeredgecolor=COLOURS[0],
            label="one seed",
        )
        if n > 1:
            axes.plot([low, high], [row + 0.12] * 2, "-", color=COLOURS[1], linewidth=1.6, label="95 % interval")
        axes.plot(mean, row + 0.12, "D", markersize=5, color=COLOURS[1], label="mean")
        axes.annotate(
            f"{mean:.1f}",
            (mean, row + 0.12),
            xytext=(0, -4),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
        )
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
    figure = Figure(figsize=(WIDTH, 2.5))
    panels = figure.subplots(1, 2, sharey=True)
    accuracies = 100 * frame["accuracy"].to_numpy(dtype=float)
    for axes, column, unit, name in (
        (panels[0], "parameters", 1, "parameters"),
        (panels[1], "latency", 1000, "latency per image (ms)"),
    ):
        costs = unit * frame[column].to_numpy(dtype=float)
        for number, (cost, accuracy) in enumerate(zip(costs, accuracies)):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(cost, accuracy, MARKERS[number % len(MARKERS)], color=colour, markersize=5)
            if "low" in frame and np.isfinite(frame["low"].iloc[number]):
                axes.plot(
                    [cost] * 2,
                    [100 * frame["low"].iloc[number], 100 * frame["high"].iloc[number]],
                    color=colour,
                    linewidth=1,
                )
        axes.set_xscale("log")
        middle = math.sqrt(costs.min() * costs.max())
        span = max(costs.max() / costs.min(), 10)
        axes.set_xlim(middle / span**0.65, middle * span**0.65)
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
    heights = _apart((ys - low) / (high - low), least=0.17 / axes.figure.get_figheight())
    middle = math.sqrt(math.prod(axes.get_xlim()))
    for x, y, height, name in zip(xs, ys, heights, names):
        right = x <= middle
        axes.annotate(
            name,
            (x, y),
            xytext=(12 if right else -12, height),
            fontsize=7,
            va="center",
            textcoords=("offset points", "axes fraction"),
            ha="left" if right else "right",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.5", "shrinkA": 0, "shrinkB": 2},
        )


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


# --- where a gain comes from ---


@_styled
def reliability_diagram(tables):
    """Accuracy against confidence (%), a line a model with a 95 % band over seeds, above the share of the images
    in each bin. Only bins in which every seed has images are drawn.

    tables: {label: tables of its seeds, each as of `metrics.reliability`}.
    """
    figure = Figure(figsize=(HALF, 3.1))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    upper.plot([0, 100], [0, 100], color="0.6", linewidth=0.9, linestyle=":")
    for number, (label, seeds) in enumerate(tables.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        line = ("-", "--", "-.", ":")[number % 4]
        images, confidence, accuracy = (
            np.array([table[name] for table in seeds], dtype=float) for name in ("images", "confidence", "accuracy")
        )
        drawn = (images > 0).all(axis=0)
        xs = 100 * confidence[:, drawn].mean(axis=0)
        intervals = [metrics.mean_interval(100 * values) for values in accuracy[:, drawn].T]
        upper.plot(xs, [found.mean for found in intervals], line, marker=marker, color=colour, label=label)
        if len(seeds) > 1:
            upper.fill_between(
                xs,
                [found.low for found in intervals],
                [found.high for found in intervals],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        middles = 50 * (seeds[0]["low"] + seeds[0]["high"]).to_numpy()
        shares = 100 * (images / images.sum(axis=1, keepdims=True)).mean(axis=0)
        lower.plot(middles, shares, line, marker=marker, markersize=3, color=colour)
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="accuracy (%)")
    lower.set(ylim=(0, None), xlabel="confidence (%)", ylabel="images (%)")
    for axes in (upper, lower):
        axes.grid()
    handles, labels = upper.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.6", linewidth=0.9, linestyle=":"))
    figure.legend(handles, [*labels, "as confident as right"], loc="outside lower center", ncols=2)
    return figure


@_styled
def setting_map(frame, rows="temperature", columns="alpha", value="val_accuracy"):
    """Mean validation accuracy (%) of every combination of two settings as a heat map, with its number, the
    standard deviation over the trial's folds and seeds beneath it, and a frame around the highest mean.

    frame: a row per trained student with the columns named by `rows`, `columns` and `value` (a fraction), as of
    `sweeps.settings_of_trials`; without a value of either a row is left out, and of a combination that was not
    tried the cell stays blank.
    """
    groups = frame.groupby([rows, columns])[value]
    means, deviations = 100 * groups.mean().unstack(), 100 * groups.std().unstack()
    figure = Figure(figsize=(min(WIDTH, 1.5 + 0.78 * means.shape[1]), 0.9 + 0.5 * means.shape[0]))
    axes = figure.add_subplot()
    picture = axes.imshow(means, cmap="Blues", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), mean in np.ndenumerate(means.to_numpy()):
        if np.isfinite(mean):
            deviation = deviations.iloc[row, column]
            text = f"{mean:.1f}" + (f"\n±{deviation:.1f}" if np.isfinite(deviation) else "")
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white" if mean > middle + 1e-9 else "black",
            )
    best = np.unravel_index(np.nanargmax(means), means.shape)
    axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2))
    symbols = {"alpha": "$\\alpha$: weight of the soft term", "temperature": "temperature $T$"}
    axes.set_xticks(range(means.shape[1]), [f"{number:g}" for number in means.columns])
    axes.set_yticks(range(means.shape[0]), [f"{number:g}" for number in means.index])
    axes.set(xlabel=symbols.get(columns, columns), ylabel=symbols.get(rows, rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, label="validation accuracy (%)").outline.set_visible(False)
    return figure


@_styled
def gain_against_teacher(frame):
    """A student's gain (points over the student from scratch) against its teacher's accuracy (%): a point per
    teacher, named, with the intervals of both where they are given.

    frame: a row per teacher with columns label, accuracy (a fraction), gain, low, high (points; nan for no
    interval) and, for the teacher's own interval, accuracy_low and accuracy_high (fractions).
    """
    figure = Figure(figsize=(HALF, 2.7))
    axes = figure.add_subplot()
    axes.axhline(0, color="0.45", linewidth=0.9)
    for number, (_, row) in enumerate(frame.iterrows()):
        colour, accuracy = COLOURS[number % len(COLOURS)], 100 * row["accuracy"]
        axes.plot([accuracy] * 2, [row["low"], row["high"]], color=colour)
        if "accuracy_low" in frame:
            axes.plot([100 * row["accuracy_low"], 100 * row["accuracy_high"]], [row["gain"]] * 2, color=colour)
        axes.plot(accuracy, row["gain"], MARKERS[number % len(MARKERS)], color=colour, markersize=6, label=row["label"])
    axes.margins(x=0.12, y=0.12)
    axes.set(xlabel="test accuracy of the teacher (%)", ylabel="gain of the student (points)")
    axes.grid()
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@_styled
def class_gain(tables):
    """Difference of the accuracies on each class (points) with its 95 % interval over seeds, one or more arms.

    tables: {label of the arm: table as of `metrics.per_class_difference`, of the same classes in all}.
    """
    classes = next(iter(tables.values()))["class"].tolist()
    figure = Figure(figsize=(WIDTH, 0.8 + (0.16 + 0.13 * len(tables)) * len(classes)))
    axes = figure.add_subplot()
    axes.axvline(0, color="0.45", linewidth=0.9)
    for number, (label, table) in enumerate(tables.items()):
        places = np.arange(len(classes)) + 0.8 * ((number + 0.5) / len(tables) - 0.5)
        colour = COLOURS[number % len(COLOURS)]
        axes.hlines(places, 100 * table["low"], 100 * table["high"], color=colour, linewidth=1.2)
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(100 * table["mean"], places, marker, color=colour, markersize=4.5, label=label)
    for place in range(1, len(classes)):
        axes.axhline(place - 0.5, color="0.9", linewidth=0.6)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(ylim=(len(classes) - 0.5, -0.5), xlabel="difference of accuracies (points)")
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower right", ncols=min(3, len(tables)))
    return figure


@_styled
def agreement_bars(frame):
    """Agreement of student and teacher (%) on all test images, on those that the teacher classifies right and on
    its errors: a bar per arm, the mean over seeds with its 95 % interval.

    frame: a row per arm, seed and part with columns label, part and agreement (a fraction); arms and parts are
    drawn in the order of the frame.
    """
    labels, parts = (list(dict.fromkeys(frame[name])) for name in ("label", "part"))
    figure = Figure(figsize=(HALF, 2.7))
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for number, label in enumerate(labels):
        chosen = frame[frame["label"] == label]
        places = np.arange(len(parts)) + width * (number + 0.5) - 0.4
        found = [metrics.mean_interval(100 * chosen.loc[chosen["part"] == part, "agreement"]) for part in parts]
        means = [each.mean for each in found]
        axes.bar(
            places,
            means,
            0.92 * width,
            color=COLOURS[number % len(COLOURS)],
            alpha=0.75,
            edgecolor="black",
            linewidth=0.5,
            hatch=HATCHES[number % len(HATCHES)],
            label=label,
        )
        axes.vlines(places, [each.low for each in found], [each.high for each in found], color="black", linewidth=1.2)
        for place, each in zip(places, found):
            axes.annotate(
                f"{each.mean:.0f}",
                (place, each.high if each.n > 1 else each.mean),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
            )
    axes.set_xticks(range(len(parts)), parts)
    axes.set(ylabel="same prediction (%)", ylim=(0, 108), yticks=range(0, 101, 20))
    axes.grid(axis="y")
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside lower center", ncols=min(3, len(labels)))
    return figure


@_styled
def accuracy_against_epochs(frame):
    """Accuracy (%) against the number of epochs, a line per arm: means with their 95 % intervals over seeds.

    frame: columns label (the arm), epochs, seed and accuracy (a fraction).
    """
    figure = Figure(figsize=(HALF, 3.1))
    axes = figure.add_subplot()
    budgets = sorted(set(frame["epochs"]))
    labels = list(dict.fromkeys(frame["label"]))
    for number, label in enumerate(labels):
        chosen = frame[frame["label"] == label]
        colour, shift = COLOURS[number % len(COLOURS)], 0.06 * (number - (len(labels) - 1) / 2)
        tried = [epochs for epochs in budgets if epochs in set(chosen["epochs"])]
        found = [metrics.mean_interval(100 * chosen.loc[chosen["epochs"] == epochs, "accuracy"]) for epochs in tried]
        places = [budgets.index(epochs) + shift for epochs in tried]
        axes.vlines(places, [each.low for each in found], [each.high for each in found], color=colour, linewidth=1.4)
        axes.plot(
            places,
            [each.mean for each in found],
            marker=MARKERS[number % len(MARKERS)],
            markersize=5,
            linestyle=("-", "--", "-.", ":")[number % 4],
            color=colour,
            label=label,
        )
    axes.set_xticks(range(len(budgets)), [f"{epochs:,}" for epochs in budgets])
    axes.set(xlabel="epochs", ylabel="accuracy (%)", xlim=(-0.4, len(budgets) - 0.6))
    axes.grid(axis="y")
    axes.margins(y=0.1)
    figure.legend(loc="outside lower center")
    return figure


@_styled
def disagreement_gallery(split, classes, right_a, right_b, names, columns=8, rows=2):
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
            axes.imshow(split.images[number].cpu().permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(classes[int(split.labels[number])], fontsize=7, pad=2)
    return figure
