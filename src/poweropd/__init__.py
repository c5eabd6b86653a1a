"""On-policy distillation of language models with bounded token rewards (arXiv:2606.17199).

`from poweropd import Config, Trainer` loads them on first use; `import poweropd.rewards` alone
loads torch and nothing else.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {"Config": "config", "Trainer": "training.trainer", "evaluate": "evaluation.api"}
__all__ = ["Config", "Trainer", "__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{_HOMES[name]}"))[name]
