"""Knowledge distillation from pretrained networks into a small CNN: the helper package of the four notebooks.

`from kdutils import NAME` gives each public name. Its module is imported when the name is first used, so that
`import kdutils` and `python -m kdutils --help` take no time (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_MODULE_OF = {
    name: module
    for module, names in {
        "settings": "UserError load_settings notebook_settings",
        "data.images": "load_data",
        "data.views": "make_views view_pixels",
        "models": "SmallCNN normalise",
        "losses": "combine_teachers cross_entropy dist_loss distillation_loss dkd_loss kd_loss",
        "training": "Recipe fit predict",
        "teachers": "Teacher ensemble fine_tune",
        "students": "Method named_method train_students",
        "results.tables": "layer_table",
        "report.show": "show_figure show_table",
    }.items()
    for name in names.split()
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kdutils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kdutils.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
