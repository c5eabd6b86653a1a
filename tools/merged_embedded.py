"""Makes the embedded pair over in another tokenizer: `python tools/merged_embedded.py --out DIR`.

The embedded models read a token for each character. Here each reads a digit together with the sign
in front of it, such as `+4`, as one token, and almost every token has another id. New tokens start
from the mean of their characters, and some steps on what the model was built from teach it to use
them.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import build_embedded as original
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from poweropd import embedded
from poweropd.embedded import task

MERGED = [sign + digit for sign in "+=" for digit in "123456789"]
PATTERN = "[+=][1-9]|" + original.PATTERN
STEPS, LEARNING_RATE, SEED = 400, 1e-3, 9


def merged_tokenizer(stop: str) -> PreTrainedTokenizerFast:
    """Returns the embedded pair's tokenizer with merged tokens; `stop` ends a sequence."""
    return original.make_tokenizer(stop, [*MERGED, *original.WORDS], PATTERN)


def made_over(name: str, folder: Path, steps: int = STEPS) -> Path:
    """Saves the embedded "teacher" or "student" in the other tokenizer."""
    own = original.RECIPES[name]
    recipe = replace(own, steps=steps, learning_rate=LEARNING_RATE, seed=SEED)
    tokenizer = merged_tokenizer(recipe.stop)
    model = Qwen3ForCausalLM.from_pretrained(embedded.path(name))
    widen(model, original.make_tokenizer(recipe.stop).get_vocab(), tokenizer.get_vocab())
    original.teach(model.train(), recipe, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def widen(model: Qwen3ForCausalLM, old: dict[str, int], new: dict[str, int]) -> None:
    """Gives a model the ids of another tokenizer; a new token is the mean of its characters."""
    table = model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(len(new), mean_resizing=False)
    for token, index in new.items():
        parts = [old[token]] if token in old else [old[letter] for letter in token]
        model.get_input_embeddings().weight[index] = table[parts].mean(0)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Make the embedded pair over.")
    parser.add_argument("--out", type=Path, required=True, help="parent directory")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = task.problems("development", 512)
    for name in original.RECIPES:
        folder = made_over(name, arguments.out / name, arguments.steps)
        model = Qwen3ForCausalLM.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        for temperature in (0.0, 1.0):
            accuracy, length = original.measure(model, tokenizer, problems, temperature)
            print(f"{name} at {temperature}: accuracy {accuracy:.3f}, {length:.1f} tokens")


if __name__ == "__main__":
    main()
