"""Pretrained SimCLR and MAE encoders, pretraining of one's own, and measurements that can be trusted.

The names below are imported when they are first used, so that `import vision_ssl` takes no time.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare as compare
    from .data import ImageSet as ImageSet
    from .data import Preprocess as Preprocess
    from .data import open_images as open_images
    from .features import Features as Features
    from .features import extract as extract
    from .finetuning import finetune as finetune
    from .probe import evaluate as evaluate
    from .recipes import MAE as MAE
    from .recipes import SimCLR as SimCLR
    from .registry import list_models as list_models
    from .report import Report as Report
    from .restore import load as load

__version__ = "0.1.0"

_EXPORTS = {
    "MAE": "recipes",
    "SimCLR": "recipes",
    "load": "restore",
    "list_models": "registry",
    "extract": "features",
    "Features": "features",
    "evaluate": "probe",
    "compare": "comparison",
    "finetune": "finetuning",
    "Report": "report",
    "open_images": "data",
    "ImageSet": "data",
    "Preprocess": "data",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _EXPORTS.keys())


# Who works with timm finds our small-stem ResNets there once both packages are imported, timm first. Without
# timm in the process, importing it for that alone would cost everybody seconds.
if "timm" in sys.modules:
    import_module(".encoders", __name__)
