"""The pictures show the numbers they are given, with intervals where there are three seeds."""

import matplotlib
import pandas as pd
import pytest
import torch

matplotlib.use("agg")

from kdutils.data.images import Split
from kdutils.results import figures, metrics


def texts(labels):
    return [label.get_text() for label in labels]


def legend_of(figure):
    return texts(text for legend in figure.legends for text in legend.get_texts())


def points(axes, marker):
    """The (x, y) of every marker of a kind."""
    return [
        tuple(map(float, point)) for line in axes.lines if line.get_marker() == marker for point in line.get_xydata()
    ]


def test_every_picture_fits_the_page_and_is_not_shown_by_itself():
    import matplotlib.pyplot as plt

    frame = pd.DataFrame({"label": ["a", "b"], "epochs": 30, "seed": 0, "accuracy": [0.6, 0.7]})
    figure = figures.accuracy_against_epochs(frame)
    assert figure.get_figwidth() <= figures.WIDTH and not plt.get_fignums()


def test_images_stand_in_a_row_for_each_class():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 4, 4)
    axes = figures.image_grid(Split(images, torch.tensor([0, 1, 0, 0, 0, 0])), ["cat", "dog"], per_class=3).axes[0]
    shown = axes.images[0].get_array()[::5, ::5, 0]  # a pixel of each; the gaps are one pixel wide
    assert texts(axes.get_yticklabels()) == ["cat", "dog"] and shown[1].tolist() == [1, 255, 255]
    assert len(set(shown[0].tolist())) == 3 and set(shown[0].tolist()) < {0, 2, 3, 4, 5}


def test_a_confusion_matrix_is_in_per_cent_of_the_true_class():
    axes = figures.confusion([[3, 1, 0], [0, 0, 0], [0, 2, 0]], ["cat", "dog", "eel"]).axes[0]
    assert texts(axes.texts) == ["75", "25", "0", "0", "100", "0"] and axes.yaxis_inverted()
    assert texts(axes.get_yticklabels()) == texts(axes.get_xticklabels()) == ["cat", "dog", "eel"]


def test_a_map_of_settings_has_means_spreads_and_the_best():
    settings = {"temperature": [1, 1, 4, 4], "alpha": [0.5, 0.5, 0.5, 0.9]}
    axes = figures.setting_map(pd.DataFrame({**settings, "val_accuracy": [0.70, 0.72, 0.705, 0.74]})).axes[0]
    assert texts(axes.texts) == ["71.0\n±1.4", "70.5", "74.0"]  # nothing was tried at temperature 1 with 0.9
    assert texts(axes.get_xticklabels()) == ["0.5", "0.9"]
    [frame_of_best] = axes.patches
    assert frame_of_best.get_xy() == (1, 1)  # the second column, the second row


def test_every_seed_of_an_arm_and_its_mean_are_shown():
    frame = pd.DataFrame({"arm": list("xxxy"), "label": ["kd"] * 3 + ["one"], "accuracy": [0.70, 0.71, 0.75, 0.6]})
    figure = figures.arm_comparison(frame)
    axes = figure.axes[0]
    assert [x for x, _ in points(axes, "o")] == pytest.approx([70, 71, 75, 60])
    assert [x for x, _ in points(axes, "D")] == pytest.approx([72, 60]) and texts(axes.texts) == ["72.0", "60.0"]
    first = axes.collections[0].get_segments()[0][:, 0]
    assert first == pytest.approx(metrics.mean_interval([70, 71, 75])[1:3])
    assert texts(axes.get_yticklabels()) == ["kd", "one"] and "95 % interval" in legend_of(figure)
    assert "95 % interval" not in legend_of(figures.arm_comparison(frame[frame.arm == "y"]))


def test_epochs_have_a_line_for_each_arm_and_an_interval_for_each_point():
    named = {"label": ["scratch"] * 6 + ["kd"], "epochs": [30] * 3 + [100] * 3 + [30]}
    accuracy = [0.69, 0.70, 0.71, 0.71, 0.72, 0.73, 0.72]
    axes = figures.accuracy_against_epochs(pd.DataFrame({**named, "accuracy": accuracy})).axes[0]
    assert [y for _, y in points(axes, "o")] == pytest.approx([70, 72])
    assert [y for _, y in points(axes, "s")] == pytest.approx([72])
    assert texts(axes.get_xticklabels()) == ["30", "100"]
    first = axes.collections[0].get_segments()[0][:, 1]
    assert first == pytest.approx(metrics.mean_interval([69, 70, 71])[1:3])
