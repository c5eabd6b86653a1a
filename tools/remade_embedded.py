"""Makes the embedded pair over in other tokenizers: `python tools/remade_embedded.py --out DIR`.

The embedded models read a token for each character, and one for `\\boxed` and the names of roles.
With `merged` they read a digit together with the sign in front of it, such as `+4`, as one token;
with `spelled` they read nothing but characters. Almost every token has another id. New tokens start
from the mean of their characters, and some steps on what the models were built from teach the use
of all tokens.
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
#: Name -> the tokens beside characters, and the pattern of a token.
TOKENIZERS = {
    "merged": ([*MERGED, *original.WORDS], "[+=][1-9]|" + original.PATTERN),
    "spelled": (["\n"], r"[\s\S]"),
}
STEPS, BATCH_SIZE, LEARNING_RATE, SEED = 400, 64, 1e-3, 9


def make_tokenizer(kind: str, stop: str) -> PreTrainedTokenizerFast:
    """Returns one of `TOKENIZERS` with the embedded pair's template; `stop` ends a sequence."""
    return original.make_tokenizer(stop, *TOKENIZERS[kind])


def remade(
    name: str, kind: str, folder: Path, steps: int = STEPS, batch_size: int = BATCH_SIZE
) -> Path:
    """Saves the embedded "teacher" or "student" in another tokenizer."""
    recipe = replace(
        original.RECIPES[name],
        steps=steps,
        batch_size=batch_size,
        learning_rate=LEARNING_RATE,
        seed=SEED,
    )
    tokenizer = make_tokenizer(kind, recipe.stop)
    model = Qwen3ForCausalLM.from_pretrained(embedded.path(name))
    renumber(model, original.make_tokenizer(recipe.stop).get_vocab(), tokenizer.get_vocab())
    lessons = original.make_examples(recipe, tokenizer)
    original.teach(model.train(), recipe, lessons).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def renumber(model: Qwen3ForCausalLM, old: dict[str, int], new: dict[str, int]) -> None:
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
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="merged")
    parser.add_argument("--only", choices=original.RECIPES, help="make one of the two")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of each model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems = task.problems("development", 512)
    for name in [arguments.only] if arguments.only else original.RECIPES:
        folder = remade(name, arguments.tokenizer, arguments.out / name, arguments.steps)
        model = Qwen3ForCausalLM.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        for temperature in (0.0, 1.0):
            accuracy, length = original.measure(model, tokenizer, problems, temperature)
            print(f"{name} at {temperature}: accuracy {accuracy:.3f}, {length:.1f} tokens")


if __name__ == "__main__":
    main()
