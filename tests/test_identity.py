"""kdutils.cache: the identity of a loss, so that a student is trained again when its loss changes."""

import importlib.util
import itertools
from functools import partial

import pytest
import torch
from torch import nn

from kdutils.cache import describe
from kdutils.losses import class_mean, combine_teachers, cross_entropy, distillation_loss, kd_loss
from kdutils.settings import UserError

modules = itertools.count()


def define(folder, source):
    """A function `loss` in a file of its own, as in a notebook's cell."""
    path = folder / f"cell_{next(modules)}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loss


PLAIN = "import torch.nn.functional as F\n\ndef loss(s, y, weight=1.0):\n    return weight * F.cross_entropy(s, y)\n"


def identity(function):
    """What tells this loss from others; None if it is refused."""
    try:
        return describe(function)
    except UserError:
        return None


@pytest.mark.parametrize("other, same", [
    (PLAIN.replace("    return", '    """A docstring."""\n    return'), True),
    (PLAIN.replace("    return weight * F", "    # why\n\n    return  weight*F"), True),
    (PLAIN.replace("weight * F", "2 * weight * F"), False),
    (PLAIN.replace("weight=1.0", "weight=2.0"), False),
    (PLAIN.replace("(s, y)\n", "(s, y.clamp(min=0))\n"), False),
], ids=["docstring", "comment and spaces", "code", "default", "call"])  # fmt: skip
def test_the_code_of_a_loss_is_its_identity_and_words_about_it_are_not(tmp_path, other, same):
    assert other != PLAIN
    assert (describe(define(tmp_path, PLAIN)) == describe(define(tmp_path, other))) == same


BOUND = {
    "number": ({"weight": 1.0}, {"weight": 2.0}),
    "nearly the same": ({"weight": 0.1}, {"weight": 0.1 + 1e-12}),
    "none": ({}, {"weight": 2.0}),
    "tensor": ({"weight": torch.tensor([0.500001])}, {"weight": torch.tensor([0.500002])}),
    "long tensor": ({"weight": torch.zeros(2000)}, {"weight": torch.arange(2000).eq(999).float()}),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_another_bound_value_is_another_identity(tmp_path, name):
    function = define(tmp_path, PLAIN)
    one, other = (identity(partial(function, **named)) for named in BOUND[name])
    assert one is None or one != other


def test_binding_in_steps_is_binding_at_once():
    at_once = partial(distillation_loss, temperature=2.0, alpha=0.5)
    in_steps = partial(partial(distillation_loss, temperature=9.0, alpha=0.5), temperature=2.0)
    assert describe(at_once) == describe(in_steps) != describe(partial(distillation_loss, temperature=9.0, alpha=0.5))


AROUND = {
    "global": "T = 4.0\ndef loss(s, t, y):\n    return T * (s - t).sum()\n",
    "default": "T = 4.0\ndef loss(s, t, y, weight=T):\n    return weight * (s - t).sum()\n",
    "helper": "def scaled(x):\n    return x * 4.0\ndef loss(s, t, y):\n    return scaled(s - t).sum()\n",
    "helper's global": "T = 4.0\ndef scaled(x):\n    return x * T\ndef loss(s, t, y):\n    return scaled(s - t).sum()\n",
    "object": "from types import SimpleNamespace\nhere = SimpleNamespace(T=4.0)\n"
              "def loss(s, t, y):\n    return here.T * (s - t).sum()\n",
    "inside a comprehension": "T = 4.0\ndef loss(s, t, y):\n    return sum(T * (a - b).sum() for a, b in zip(s, t))\n",
}  # fmt: skip


@pytest.mark.parametrize("name", AROUND)
def test_what_a_loss_uses_from_around_it_is_refused_or_counts(tmp_path, name):
    """A notebook has `T = 4.0` in the cell above the loss: changing it must never load the old students."""
    one, other = (identity(define(tmp_path, AROUND[name].replace("4.0", value))) for value in ("4.0", "8.0"))
    assert one is None or one != other


@pytest.mark.parametrize("around", ["mean = 1.0", "mean = object()", "y = object()", "s = 3"])
def test_a_name_that_a_loss_does_not_use_is_no_part_of_it(tmp_path, around):
    """A notebook may have a variable `mean`; `x.mean()` has nothing to do with it."""
    source = "def loss(s, y):\n    return s.mean()\n"
    assert describe(define(tmp_path, source)) == describe(define(tmp_path, f"{around}\n{source}"))


@pytest.mark.parametrize("source", [
    "from torch import exp\ndef loss(s, y):\n    return exp(s).mean()\n",
    "from math import log\ndef loss(s, y):\n    return s.mean() * log(2)\n",
    "import torch.nn.functional as F\nfrom torch.nn.functional import kl_div\ndef loss(s, t, y):\n    return kl_div(s, t)\n",
    "def loss(s, y, depth=2):\n    return s.mean() if depth == 0 else loss(s, y, depth - 1)\n",
    "import torch\n@torch.no_grad()\ndef loss(s, y):\n    return s.mean()\n",
], ids=["torch", "math", "functional", "recursive", "decorated"])  # fmt: skip
def test_usual_ways_to_write_a_loss_are_accepted_or_refused_in_words(tmp_path, source):
    function = define(tmp_path, source)
    assert identity(function) == identity(function)  # UserError at most


def closure(temperature):
    def loss(s, t, y):
        return kd_loss(s, t, temperature)

    return loss


class Scaled:
    def __call__(self, s, y):
        return cross_entropy(s, y)


named_lambda = lambda s, y: cross_entropy(s, y)  # noqa: E731


@pytest.mark.parametrize("function", [
    named_lambda, lambda s, y: 0, closure(2.0), partial(closure(2.0)), Scaled().__call__, Scaled(), Scaled,
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss, torch.add, len, partial(kd_loss, 1), None,
    eval("lambda s, y: s.sum()"), partial(named_lambda),
], ids=lambda function: type(function).__name__)  # fmt: skip
def test_a_loss_must_be_a_plain_function(function):
    with pytest.raises(UserError) as caught:
        describe(function)
    assert str(caught.value).startswith("loss: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("function", [
    cross_entropy, kd_loss, distillation_loss, partial(combine_teachers, rule="mean_prob", temperature=4.0),
    partial(class_mean, temperature=4.0), partial(cross_entropy, label_smoothing=0.1),
])  # fmt: skip
def test_the_losses_of_the_package_can_be_used(function):
    assert identity(function) is not None and identity(function) == identity(function)
