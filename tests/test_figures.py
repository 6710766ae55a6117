"""The pictures of what a gain is made of: they show the numbers they are given, with intervals where there are seeds."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

matplotlib.use("agg")

from kdutils.data.images import Split
from kdutils.results import figures, metrics


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


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


def test_a_reliability_diagram_has_the_bins_that_every_seed_fills():
    table = pd.DataFrame({
        "low": [0, 0.5], "high": [0.5, 1], "confidence": [np.nan, 0.8], "accuracy": [np.nan, 0.6], "images": [0, 10],
    })  # fmt: skip
    other = table.assign(confidence=[0.4, 0.9], accuracy=[0.3, 0.7], images=[5, 5])
    upper, lower = figures.reliability_diagram({"scratch": [table, other]}).axes
    [(x, y)] = points(upper, "o")
    assert (x, y) == pytest.approx((85, 65))
    band = upper.collections[0].get_paths()[0].vertices
    expected = metrics.mean_interval([60, 70])
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx(expected[1:3])
    assert points(lower, "o") == [pytest.approx((25, 25)), pytest.approx((75, 75))]
    single = figures.reliability_diagram({"scratch": [other]}).axes[0]
    assert len(points(single, "o")) == 2 and not single.collections


def test_a_map_of_settings_has_means_spreads_and_the_best():
    frame = pd.DataFrame({
        "temperature": [1, 1, 4, 4], "alpha": [0.5, 0.5, 0.5, 0.9], "val_accuracy": [0.70, 0.72, 0.705, 0.74],
    })  # fmt: skip
    axes = figures.setting_map(frame).axes[0]
    assert texts(axes) == ["71.0\n±1.4", "70.5", "74.0"]  # nothing was tried at temperature 1 with 0.9
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.5", "0.9"]
    [frame_of_best] = axes.patches
    assert frame_of_best.get_xy() == (0.5, 0.5)  # the second column, the second row


def test_gains_lie_over_their_teachers_with_both_intervals():
    frame = pd.DataFrame({
        "label": ["weak", "strong"], "accuracy": [0.7, 0.8], "gain": [-0.5, 1.5], "low": [-1, np.nan], "high": [0, np.nan],
        "accuracy_low": [0.69, np.nan], "accuracy_high": [0.71, np.nan],
    })  # fmt: skip
    figure = figures.gain_against_teacher(frame)
    axes = figure.axes[0]
    assert points(axes, "o") == [pytest.approx((70, -0.5))] and points(axes, "s") == [pytest.approx((80, 1.5))]
    assert any(np.allclose(line.get_xydata(), [(70, -1), (70, 0)]) for line in axes.lines)
    assert legend_of(figure) == ["weak", "strong"]
    assert figures.gain_against_teacher(frame.drop(columns=["accuracy_low", "accuracy_high"])).axes


def test_gains_by_class_are_in_points():
    table = pd.DataFrame(
        {"class": ["cat", "dog"], "mean": [0.02, -0.01], "low": [0.01, np.nan], "high": [0.03, np.nan]}
    )
    figure = figures.class_gain({"one": table, "two": table})
    axes = figure.axes[0]
    for marker in "os":
        assert [x for x, _ in points(axes, marker)] == pytest.approx([2, -1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"] and axes.yaxis_inverted()
    assert axes.collections[0].get_segments()[0][:, 0] == pytest.approx([1, 3])
    assert legend_of(figure) == ["one", "two"]


def test_agreement_has_a_bar_for_each_arm_and_part():
    frame = pd.DataFrame({
        "label": ["scratch"] * 4 + ["kd"] * 2, "part": ["all", "all", "wrong", "wrong", "all", "wrong"],
        "agreement": [0.7, 0.8, 0.3, 0.3, 0.9, 0.5],
    })  # fmt: skip
    figure = figures.agreement_bars(frame)
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([75, 30, 90, 50])
    assert texts(figure.axes[0]) == ["75", "30", "90", "50"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["all", "wrong"]
    assert len({bar.get_hatch() for bar in figure.axes[0].patches}) == 2  # told apart in grey


def test_budgets_have_a_line_for_each_arm_and_an_interval_for_each_point():
    frame = pd.DataFrame({
        "label": ["scratch"] * 4 + ["kd"], "epochs": [30, 30, 100, 100, 30], "seed": [0, 1, 0, 1, 0],
        "accuracy": [0.69, 0.70, 0.71, 0.72, 0.72],
    })  # fmt: skip
    axes = figures.accuracy_against_epochs(frame).axes[0]
    assert [y for _, y in points(axes, "o")] == pytest.approx([69.5, 71.5])
    assert [y for _, y in points(axes, "s")] == pytest.approx([72])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["30", "100"]
    first = axes.collections[0].get_segments()[0][:, 1]
    assert first == pytest.approx(metrics.mean_interval([69, 70])[1:3])


def test_the_gallery_shows_what_one_arm_gets_right_and_the_other_wrong():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 4, 4)
    split = Split(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    #                     only a  only a, surer  only b  both  neither  half of the seeds
    right_a = np.array([[1, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]], dtype=bool)
    right_b = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]], dtype=bool)
    figure = figures.disagreement_gallery(
        split, ["cat", "dog", "eel"], right_a, right_b, ("kd", "scratch"), columns=2, rows=1
    )
    above, below = figure.subfigs
    assert above._suptitle.get_text() == "right: kd, wrong: scratch (2 of 6 images)"
    assert below._suptitle.get_text() == "right: scratch, wrong: kd (1 of 6 images)"
    shown = [
        (axes.get_title(), int(axes.images[0].get_array().max()))
        for part in (above, below)
        for axes in part.axes
        if axes.images
    ]
    assert shown == [("dog", 1), ("cat", 0), ("eel", 2)]
