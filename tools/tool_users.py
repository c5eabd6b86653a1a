"""Makes a pair that adds up with a calculator: `python tools/tool_users.py --out DIR`.

Its task is that of the embedded pair. The teacher always calls the tool and repeats its answer. The
student was taught to guess, and to leave a number out of the call, as often as to do it well.
tests/test_turns_tools.py trains the student, which makes its calls itself (docs/rollouts.md).
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import build_embedded as original
import torch
from transformers import PreTrainedTokenizerFast

from poweropd.embedded import TURN_END, task
from poweropd.rollouts.turns.calculator import calculate
from poweropd.rollouts.turns.tools import tool_schemas

TOOL = "poweropd.rollouts.turns.calculator:calculate"
SCHEMAS = tool_schemas([TOOL])
CALL = ["<tool_call>", "</tool_call>", "calculate", "arguments", "expression", "name", "tool"]
PATTERN = r"</?tool_call>|calculate|arguments|expression|name|tool|" + original.PATTERN

# The calls are written in the form of Hermes and Qwen; of a tool the models read the name alone.
CHAT_TEMPLATE = (
    "{%- if tools -%}{{ '<|im_start|>system\n' }}"
    "{%- for tool in tools -%}{{ tool.function.name + '\n' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{ '<tool_call>\n' + {'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson + '\n</tool_call>' }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

GUESS, FORGETFUL = 0.4, 0.3  # shares of the student's lessons; the rest is good work
STEPS = {"teacher": 500, "student": 400}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the embedded pair's tokenizer, with a token for each word of a call."""
    tokenizer = original.make_tokenizer(TURN_END, [*original.WORDS, *CALL], PATTERN)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def lesson(
    tokenizer: PreTrainedTokenizerFast, problem: task.ToyProblem, expression: str | None, said: str
) -> original.Example:
    """Returns a conversation that ends with `said` in a box, after a call if there is one."""
    turns: list[dict[str, object]] = [{"role": "user", "content": problem.problem}]
    prompt = tokenizer.apply_chat_template(
        turns, tools=SCHEMAS, tokenize=False, add_generation_prompt=True
    )
    if expression is not None:
        function = {"name": "calculate", "arguments": {"expression": expression}}
        turns.append({"role": "assistant", "content": "", "tool_calls": [{"function": function}]})
        turns.append({"role": "tool", "content": calculate(expression)})
    turns.append({"role": "assistant", "content": f"\\boxed{{{said}}}"})
    text = tokenizer.apply_chat_template(turns, tools=SCHEMAS, tokenize=False).removesuffix("\n")
    ids = [tokenizer(part)["input_ids"] for part in (prompt, text.removeprefix(prompt))]
    return ids[0], ids[1]


def good(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, problem: task.ToyProblem
) -> original.Example:
    """Returns what the teacher is taught."""
    return lesson(tokenizer, problem, problem.problem, problem.answer)


def mixed(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, problem: task.ToyProblem
) -> original.Example:
    """Returns what the student is taught: guesses, calls without the last number, good work."""
    kind = rng.random()
    if kind < GUESS:
        guess = original.slipped(rng, int(problem.answer))
        return lesson(tokenizer, problem, None, str(guess))
    if kind < GUESS + FORGETFUL:
        shorter = problem.problem.rpartition("+")[0]
        return lesson(tokenizer, problem, shorter, calculate(shorter))
    return good(tokenizer, rng, problem)


def make(name: str, folder: Path, steps: int, batch_size: int = 64) -> Path:
    """Saves the "teacher" or the "student"."""
    recipe = replace(original.RECIPES[name], steps=steps, batch_size=batch_size, stop=TURN_END)
    tokenizer, rng = make_tokenizer(), random.Random(recipe.seed)
    teach = {"teacher": good, "student": mixed}[name]
    problems = task.problems("train", steps * batch_size, seed=recipe.seed)
    lessons = [teach(tokenizer, rng, problem) for problem in problems]
    model = original.make_model(recipe, tokenizer).train()
    model = original.teach(model, recipe, lessons)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Make a pair that uses a calculator.")
    parser.add_argument("--out", type=Path, required=True, help="parent directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, steps in STEPS.items():
        print(make(name, arguments.out / name, steps))


if __name__ == "__main__":
    main()
