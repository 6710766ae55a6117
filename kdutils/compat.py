"""Makes `import torchvision` work beside a CPU-only torch.

The torchvision wheels of the package index are built for CUDA. Their compiled operators (nms, roi_align, ...)
cannot be loaded where torch came without CUDA; torchvision skips them in silence, then registers shape rules
for them and fails: "operator torchvision::nms does not exist". Nothing in this project uses those operators,
so that one registration module is replaced by an empty one. A torchvision that imports is never touched.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

MISSING_OPERATORS = "operator torchvision::nms does not exist"
REGISTRATIONS = "torchvision._meta_registrations"


def ensure_torchvision() -> ModuleType:
    """Import torchvision and return it, curing the one failure described above.

    Raises ImportError where the same failure meets a torch with CUDA or ROCm: there the two packages do not match,
    and the remedy is to install a matching pair. Any other error passes through unchanged.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if str(error) != MISSING_OPERATORS:
            raise
        torch = importlib.import_module("torch")
        if torch.version.cuda is not None or torch.version.hip is not None:
            raise ImportError(
                f"torchvision does not fit torch {torch.__version__} (its operators cannot be loaded); "
                "install a matching pair: pip install --force-reinstall torch torchvision"
            ) from error
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    sys.modules[REGISTRATIONS] = ModuleType(REGISTRATIONS, "Left empty by kdutils.compat.")
    return importlib.import_module("torchvision")
