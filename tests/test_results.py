"""kdutils.results: what networks cost is measured once for each way to build them."""

from functools import partial

import pytest

from kdutils import metrics
from kdutils.models import SmallCNN, architecture
from kdutils.results import model_costs
from kdutils.students import describe_builder

built = []


class Counted(SmallCNN):
    """A student that tells when it is built."""

    def __init__(self, num_classes, wider=False):
        super().__init__(num_classes)
        built.append((num_classes, wider))


def test_what_networks_cost(tiny, toy_data):
    costs = model_costs({"Small CNN": SmallCNN, "for seven": partial(SmallCNN, 7)}, toy_data, tiny(), repeats=1)
    assert costs["label"].tolist() == ["Small CNN", "for seven"]
    assert costs["parameters"].tolist() == [268_650, 268_650 - 3 * 129]
    assert costs["megabytes"].tolist() == pytest.approx([1.0746, 1.073052])
    expected = [metrics.multiply_adds(SmallCNN(classes), (3, 32, 32)) for classes in (10, 7)]
    assert costs["multiply_adds"].tolist() == expected and expected[0] - expected[1] == 3 * 128
    assert (costs[["latency", "latency_batched"]] > 0).all(axis=None)


def test_costs_are_measured_once_and_no_network_is_built_again(tiny, toy_data):
    built.clear()
    entries = {"ten": partial(Counted, 10), "seven": partial(Counted, 7)}
    first = model_costs(entries, toy_data, tiny(), repeats=1)
    assert built == [(10, False), (7, False)]
    again = model_costs(entries, toy_data, tiny(), repeats=1)
    assert again[first.columns].equals(first) and len(built) == 2
    model_costs({"ten": partial(Counted, 11)}, toy_data, tiny(), repeats=1)
    model_costs({"ten": partial(Counted, 10, wider=True)}, toy_data, tiny(), repeats=1)
    assert built[2:] == [(11, False), (10, True)]


def other(num_classes):
    return SmallCNN(num_classes)


def test_a_builder_is_known_by_its_code_and_arguments():
    same = [partial(architecture, "resnet18", 32, 10), partial(partial(architecture, "resnet18", 32), 10)]
    different = [
        same[0], partial(architecture, "resnet50", 32, 10), partial(architecture, "resnet18", 64, 10), SmallCNN,
        partial(SmallCNN, 7), partial(SmallCNN, num_classes=7), partial(other, 7), Counted,
    ]  # fmt: skip
    assert describe_builder(same[0]) == describe_builder(same[1])
    found = [describe_builder(build) for build in different]
    assert all(one != another for i, one in enumerate(found) for another in found[:i])
