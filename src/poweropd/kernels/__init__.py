"""LM heads that never hold the logits of all tokens.

`reference.py` is the oracle: the same functions in a few lines of plain torch. Modules load on
first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from poweropd.kernels.baseline import ValueBaseline
    from poweropd.kernels.chunked import linear_log_prob, linear_policy_gradient
    from poweropd.kernels.full_vocab import linear_full_vocab
    from poweropd.kernels.head import Head
    from poweropd.kernels.softmax import TokenStatistics
    from poweropd.kernels.support import Support

_HOMES = {
    "Head": "head",
    "Support": "support",
    "TokenStatistics": "softmax",
    "ValueBaseline": "baseline",
    "linear_full_vocab": "full_vocab",
    "linear_log_prob": "chunked",
    "linear_policy_gradient": "chunked",
}
__all__ = [
    "Head",
    "Support",
    "TokenStatistics",
    "ValueBaseline",
    "linear_full_vocab",
    "linear_log_prob",
    "linear_policy_gradient",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return vars(importlib.import_module(f"{__name__}.{_HOMES[name]}"))[name]
