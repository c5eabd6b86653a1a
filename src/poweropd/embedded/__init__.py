"""The tiny teacher and student that come with poweropd, and the task they were trained on.

Two `Qwen3ForCausalLM` models of a few hundred thousand parameters add up six to eight digits,
step by step (`task.py`). `poweropd demo` and the tests train on them;
`python tools/build_embedded.py` made both from scratch.

    AutoModelForCausalLM.from_pretrained(poweropd.embedded.path("student"))
"""

from pathlib import Path

NAMES = ("teacher", "student")
#: The names of embedded models and problems begin so, as in embedded:student.
EMBEDDED_PREFIX = "embedded:"
# The student ends its turns with END_OF_TEXT, the teacher with TURN_END.
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def path(name: str) -> Path:
    """Returns the directory of the embedded "teacher" or "student"; ValueError for other names."""
    if name not in NAMES:
        raise ValueError(f"the embedded models are {' and '.join(NAMES)}; got {name!r}")
    return Path(__file__).parent / name
