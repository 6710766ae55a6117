"""The pictures show the numbers they are given, with intervals where there are three seeds."""

import matplotlib
import numpy as np
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


def test_a_reliability_diagram_has_the_bins_that_every_seed_fills():
    empty = {"confidence": [np.nan, 0.8], "accuracy": [np.nan, 0.6], "images": [0, 10]}
    table = pd.DataFrame({"low": [0, 0.5], "high": [0.5, 1], **empty})
    other = table.assign(confidence=[0.4, 0.9], accuracy=[0.3, 0.7], images=[5, 5])
    upper, lower = figures.reliability_diagram({"scratch": [table, other, other]}).axes
    assert points(upper, "o") == [pytest.approx((260 / 3, 200 / 3))]
    band = upper.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(metrics.mean_interval([60, 70, 70])[1:3])
    assert points(lower, "o") == [pytest.approx((25, 100 / 3)), pytest.approx((75, 200 / 3))]
    two = figures.reliability_diagram({"scratch": [other, other]}).axes[0]
    assert len(points(two, "o")) == 2 and not two.collections


def test_a_map_of_settings_has_means_spreads_and_the_best():
    settings = {"temperature": [1, 1, 4, 4], "alpha": [0.5, 0.5, 0.5, 0.9]}
    axes = figures.setting_map(pd.DataFrame({**settings, "val_accuracy": [0.70, 0.72, 0.705, 0.74]})).axes[0]
    assert texts(axes.texts) == ["71.0\n±1.4", "70.5", "74.0"]  # nothing was tried at temperature 1 with 0.9
    assert texts(axes.get_xticklabels()) == ["0.5", "0.9"]
    [frame_of_best] = axes.patches
    assert frame_of_best.get_xy() == (0.5, 0.5)  # the second column, the second row


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


def test_gains_lie_over_their_teachers_with_both_intervals():
    gain = {"gain": [-0.5, 1.5], "low": [-1, np.nan], "high": [0, np.nan]}
    own = {"accuracy_low": [0.69, np.nan], "accuracy_high": [0.71, np.nan]}
    frame = pd.DataFrame({"label": ["weak", "strong"], "accuracy": [0.7, 0.8], **gain, **own})
    figure = figures.gain_against_teacher(frame)
    axes = figure.axes[0]
    assert points(axes, "o") == [pytest.approx((70, -0.5))] and points(axes, "s") == [pytest.approx((80, 1.5))]
    for interval in ([(70, -1), (70, 0)], [(69, -0.5), (71, -0.5)]):
        assert any(np.allclose(line.get_xydata(), interval) for line in axes.lines)
    assert legend_of(figure) == ["weak", "strong"]
    assert figures.gain_against_teacher(frame.drop(columns=list(own))).axes


def test_gains_by_class_are_in_points():
    interval = {"low": [0.01, np.nan], "high": [0.03, np.nan]}
    table = pd.DataFrame({"class": ["cat", "dog"], "mean": [0.02, -0.01], **interval})
    figure = figures.class_gain({"one": table, "two": table})
    axes = figure.axes[0]
    for marker in "os":
        assert [x for x, _ in points(axes, marker)] == pytest.approx([2, -1])
    assert texts(axes.get_yticklabels()) == ["cat", "dog"] and axes.yaxis_inverted()
    assert axes.collections[0].get_segments()[0][:, 0] == pytest.approx([1, 3])
    assert legend_of(figure) == ["one", "two"]


def test_agreement_has_a_bar_for_each_arm_and_part():
    named = {"label": ["scratch"] * 4 + ["kd"] * 2, "part": ["all", "all", "wrong", "wrong", "all", "wrong"]}
    axes = figures.agreement_bars(pd.DataFrame({**named, "agreement": [0.7, 0.8, 0.3, 0.3, 0.9, 0.5]})).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([75, 30, 90, 50])
    assert texts(axes.texts) == ["75", "30", "90", "50"] and texts(axes.get_xticklabels()) == ["all", "wrong"]
    assert len({bar.get_hatch() for bar in axes.patches}) == 2  # told apart in grey


def test_epochs_have_a_line_for_each_arm_and_an_interval_for_each_point():
    named = {"label": ["scratch"] * 6 + ["kd"], "epochs": [30] * 3 + [100] * 3 + [30]}
    accuracy = [0.69, 0.70, 0.71, 0.71, 0.72, 0.73, 0.72]
    axes = figures.accuracy_against_epochs(pd.DataFrame({**named, "accuracy": accuracy})).axes[0]
    assert [y for _, y in points(axes, "o")] == pytest.approx([70, 72])
    assert [y for _, y in points(axes, "s")] == pytest.approx([72])
    assert texts(axes.get_xticklabels()) == ["30", "100"]
    first = axes.collections[0].get_segments()[0][:, 1]
    assert first == pytest.approx(metrics.mean_interval([69, 70, 71])[1:3])


def test_the_gallery_shows_what_one_arm_gets_right_and_the_other_wrong():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 4, 4)
    split = Split(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    #                     only a  only a, surer  only b  both  neither  half of the seeds
    right_a = np.array([[1, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]], dtype=bool)
    right_b = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=bool)
    names = ("kd", "scratch")
    figure = figures.disagreement_gallery(split, ["cat", "dog", "eel"], right_a, right_b, names, columns=2, rows=1)
    above, below = figure.subfigs
    assert above._suptitle.get_text() == "right: kd, wrong: scratch (2 of 6 images)"
    assert below._suptitle.get_text() == "right: scratch, wrong: kd (1 of 6 images)"
    panels = [axes for part in (above, below) for axes in part.axes if axes.images]
    shown = [(axes.get_title(), int(axes.images[0].get_array().max())) for axes in panels]
    assert shown == [("dog", 1), ("cat", 0), ("eel", 2)]
