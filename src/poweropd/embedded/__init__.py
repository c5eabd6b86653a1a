"""The tiny teacher and student shipped with poweropd, and the task they were trained on.

Two `Qwen3ForCausalLM` models of a few hundred thousand parameters add up six to eight digits,
step by step (`task.py`). They are what `poweropd demo` and the tests train on; both were made
from scratch by `python tools/build_embedded.py`.

    AutoModelForCausalLM.from_pretrained(poweropd.embedded.path("student"))
"""

from pathlib import Path

NAMES = ("teacher", "student")
# The student ends its turns with the first, the teacher with the last.
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def path(name: str) -> Path:
    """The model directory of the embedded "teacher" or "student".

    Raises ValueError for any other name.
    """
    if name not in NAMES:
        raise ValueError(f"the embedded models are {' and '.join(NAMES)}; got {name!r}")
    return Path(__file__).parent / name
