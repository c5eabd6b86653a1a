"""How benchmarks are sampled and lm-eval is asked, with the defaults of recipes and commands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BATCH_SIZE = 64  # completions at once: 4,096 tokens of each must fit beside the model


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation; the defaults are the paper's, temperature 0.6 and n = 8."""

    n: int = 8  # completions for each problem
    max_new_tokens: int = 4096
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    seed: int = 0
    chat: Mapping[str, object] | None = field(default_factory=lambda: {"enable_thinking": False})
    system: str | None = None
    tools: list[dict[str, object]] | None = None  # JSON schemas, for the chat template
    instruction: str | None = None  # appended to each problem, after a line break
    grader: str = "math"  # a name of poweropd.grading.graders, or package.module:function
    group_size: int = 1024  # completions sampled together; part of what makes a run repeatable


@dataclass(frozen=True)
class HarnessSettings:
    """What lm-eval is asked for.

    folder: a folder with YAML files of tasks of one's own.
    limit: problems of each task. unsafe: the user's consent to running code that the model wrote.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    chat_template: bool = True
    thinking: bool = False
    system: str | None = None
    seed: int = 0
    unsafe: bool = False


@dataclass(frozen=True)
class DivergenceSettings:
    """How completions are sampled to compare a student with its teacher, of all tokens there are.

    Temperature 1 draws the contexts that training sees, and is what a sampled estimate needs.
    """

    n: int = 1  # completions for each prompt
    max_new_tokens: int = 1024
    temperature: float = 1.0
    seed: int = 0
    group_size: int = 128  # completions sampled and scored together
