"""Writes a trained student as ONNX or TorchScript, which need nothing of this project, and checks the file."""

import importlib
import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdutils.cache import write_atomically
from kdutils.models import MEAN, STD, SmallCNN, normalise
from kdutils.settings import UserError
from kdutils.training import predict

SUFFIX = {"onnx": ".onnx", "torchscript": ".pt"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
METADATA = "metadata.json"  # the file inside a TorchScript archive
TOLERANCE = 1e-3  # of logits: other libraries sum in another order


class Classifier(nn.Module):
    """A student that normalises its input itself: uint8 [N, 3, 32, 32] (RGB, 0 to 255) to logits float32 [N, C]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: SmallCNN):
        super().__init__()
        self.network = network
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, 255 * torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network((pixels.float() - self.mean) / self.std)


def export_student(network: SmallCNN, metadata: dict[str, str], form: str, path: Path) -> float:
    """Write a student, its normalisation and the metadata to `path` as `onnx` or `torchscript`.

    Reads the file again and returns the largest difference between its logits and the student's own on random
    pictures. Raises `UserError` where a package is missing, or where the logits differ (then nothing is written).
    """
    write = {"onnx": _write_onnx, "torchscript": _write_torchscript}[form]
    pictures = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = predict(network, normalise(pictures))
    classifier = Classifier(network).to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    found: list[float] = []

    def write_and_check(temporary: Path) -> None:
        logits = write(classifier, pictures, metadata, temporary)
        # also with another batch size than the file was made with
        found.extend(float((logits(pictures[:n]) - expected[:n]).abs().max()) for n in (1, len(pictures)))
        if not max(found) <= TOLERANCE:
            raise UserError(
                f"export: the logits of the {form} file differ from the student's by {max(found):.2g}, so it was "
                f"deleted; try --format {'torchscript' if form == 'onnx' else 'onnx'}"
            )

    write_atomically(path, write_and_check)
    return max(found)


def _write_torchscript(
    classifier: Classifier, pictures: Tensor, metadata: dict[str, str], path: Path
) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch recommends its successor
        traced = torch.jit.trace(classifier, pictures)
        torch.jit.save(traced, str(path), _extra_files={METADATA: json.dumps(metadata)})
        return torch.inference_mode()(torch.jit.load(str(path)))


def _write_onnx(
    classifier: Classifier, pictures: Tensor, metadata: dict[str, str], path: Path
) -> Callable[[Tensor], Tensor]:
    try:
        onnx, _, onnxruntime = (importlib.import_module(name) for name in ONNX_PACKAGES)
    except ImportError as error:
        raise UserError(
            f"export: ONNX needs packages that are not installed ({error}); pip install {' '.join(ONNX_PACKAGES)}"
        ) from error
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits"]}
    dynamo = inspect.signature(torch.onnx.export).parameters.get("dynamo")
    if dynamo is not None and dynamo.default:
        batch = torch.export.Dim("N")
        options: dict[str, Any] = {"dynamic_shapes": ({0: batch},), "external_data": False, "verbose": False}
    else:  # torch before 2.9
        options = {"dynamic_axes": {"pixels": {0: "N"}, "logits": {0: "N"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they concern torch's internals
        torch.onnx.export(classifier, (pictures,), str(path), **names, **options)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
