"""kdutils.compat: torchvision becomes importable beside a CPU-only torch, and nothing else is hidden."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kdutils import compat

ROOT = Path(__file__).resolve().parent.parent


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("before", ["", "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"])
def test_torchvision_works_after_kdutils(before):
    """In a fresh interpreter, also when an import of torchvision has already failed there."""
    result = run_python(
        before
        + """
import kdutils.compat, sys
package = kdutils.compat.ensure_torchvision()
import torch, torchvision
assert package is torchvision is kdutils.compat.ensure_torchvision()
from torchvision import models, transforms
from torchvision.datasets import CIFAR10
assert transforms.Normalize([0.5] * 3, [0.5] * 3)(torch.zeros(3, 4, 4)).min() == -1
assert transforms.Resize(8, antialias=True)(torch.zeros(3, 4, 4)).shape == (3, 8, 8)
assert models.resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
"""
    )
    assert result.returncode == 0, result.stderr


def fake_import(monkeypatch, *outcomes):
    """Let each import of torchvision have the next of the outcomes: an exception to raise, or a module."""
    real, names = importlib.import_module, []

    def import_module(name):
        if name != "torchvision":
            return real(name)
        names.append(name)
        outcome = outcomes[len(names) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(compat.importlib, "import_module", import_module)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return names


def test_a_healthy_install_is_left_alone(monkeypatch):
    module = ModuleType("torchvision")
    names = fake_import(monkeypatch, module)
    before = dict(sys.modules)
    assert compat.ensure_torchvision() is module
    assert names == ["torchvision"] and sys.modules == before


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'torchvision'"),
        RuntimeError("operator torchvision::roi_align does not exist"),
        RuntimeError("Detected that PyTorch and torchvision were compiled with different CUDA major versions."),
    ],
)
def test_other_errors_pass_through(monkeypatch, error):
    names = fake_import(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        compat.ensure_torchvision()
    assert caught.value is error and names == ["torchvision"]


def test_cpu_only_torch_is_cured_once(monkeypatch):
    module = ModuleType("torchvision")
    fake_import(monkeypatch, RuntimeError(compat.MISSING_OPERATORS), module)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    sys.modules["torchvision.leftover"] = ModuleType("torchvision.leftover")
    sys.modules["torchvision_of_another_name"] = ModuleType("torchvision_of_another_name")
    assert compat.ensure_torchvision() is module
    assert "torchvision.leftover" not in sys.modules and "torchvision_of_another_name" in sys.modules
    assert compat.REGISTRATIONS in sys.modules


@pytest.mark.parametrize("build", ["cuda", "hip"])
def test_a_gpu_torch_gets_a_clear_message(monkeypatch, build):
    fake_import(monkeypatch, RuntimeError(compat.MISSING_OPERATORS))
    monkeypatch.setattr(torch.version, build, "13.0")
    with pytest.raises(ImportError, match="does not fit torch .*pip install"):
        compat.ensure_torchvision()
