"""Makes the embedded pair from scratch: `python tools/build_embedded.py [--out DIR]`.

Both models see only problems of the train split. The teacher learns exemplary work and ends a
turn with `<|im_end|>`, as a chat model does; the student learns a mixture of good and bad habits
and ends with `<|endoftext|>`, as a base model does. Seeds are fixed and one thread computes, so
the same machine and torch give the same weights.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from poweropd import embedded
from poweropd.embedded import END_OF_TEXT, TURN_END, TURN_START, task

SPECIAL = [END_OF_TEXT, TURN_START, TURN_END]
WORDS = ["user", "assistant", "system", "\\boxed", "\n"]  # each is one token, as is any character
PATTERN = r"system|user|assistant|\\boxed|[\s\S]"  # of a token
UNKNOWN = "?"  # the token for characters outside printable ASCII

# The template writes Qwen's turns. Qwen3's templates know `enable_thinking`; these models never
# think, so it changes nothing here.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

Example = tuple[list[int], list[int]]  # prompt ids, completion ids


@dataclass(frozen=True)
class Recipe:
    """How one model is made: its size, its training, and the token that ends its turns."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    steps: int
    stop: str
    completion: Callable[[random.Random, task.ToyProblem], str]
    seed: int
    learning_rate: float
    batch_size: int = 64
    warmup_steps: int = 50


# --- What the models are taught -----------------------------------------------------------------


def exemplary(rng: random.Random, problem: task.ToyProblem) -> str:
    """Returns what the teacher is taught: always good work."""
    return task.worked_solution(problem)


DIRECT, VERBOSE = 0.25, 0.4  # shares of the mixture; the rest is good work
WRONG_DIRECT = 0.5
SLIP = 0.15  # chance that an addition of verbose work is wrong


def mixed(rng: random.Random, problem: task.ToyProblem) -> str:
    """Returns what the student is taught: bare answers, wordy work with errors, some good work."""
    kind = rng.random()
    if kind < DIRECT:
        wrong = rng.random() < WRONG_DIRECT
        return f"\\boxed{{{slipped(rng, int(problem.answer)) if wrong else problem.answer}}}"
    return verbose(rng, problem) if kind < DIRECT + VERBOSE else task.worked_solution(problem)


def verbose(rng: random.Random, problem: task.ToyProblem) -> str:
    """Writes each addition on a line of its own; some are wrong, and the work goes on from them."""
    total, *rest = problem.terms
    lines = []
    for term in rest:
        after = total + term
        if rng.random() < SLIP:
            after = slipped(rng, after)
        lines.append(f"{total}+{term}={after}\n")
        total = after
    return "".join(lines) + f"\\boxed{{{total}}}"


def slipped(rng: random.Random, number: int) -> int:
    """Returns a number that is off by one, or that has lost a carry."""
    return abs(number + rng.choice([-10, -1, 1]))


# --- Tokenizer and models -----------------------------------------------------------------------


def make_tokenizer(
    stop: str, words: Sequence[str] = WORDS, pattern: str = PATTERN
) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of words and characters with Qwen's template; `stop` ends a sequence."""
    tokens = [*SPECIAL, *words, *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[TURN_START, TURN_END],
        eos_token=stop,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Returns a freshly initialised float32 Qwen3 of the recipe's size."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=recipe.hidden_size // 4,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode_prompt(tokenizer: PreTrainedTokenizerFast, problem: task.ToyProblem) -> list[int]:
    """Returns the ids of the problem as the user's turn, up to the assistant's turn."""
    turns = [{"role": "user", "content": problem.problem}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- Training -----------------------------------------------------------------------------------


def train(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Trains a fresh model."""
    lessons = make_examples(recipe, tokenizer)
    return teach(make_model(recipe, tokenizer).train(), recipe, lessons)


def teach(model: Qwen3ForCausalLM, recipe: Recipe, lessons: list[Example]) -> Qwen3ForCausalLM:
    """Trains once on all lessons, with a cosine learning rate after a linear warm-up."""
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    started = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, recipe)
        first = step * recipe.batch_size
        loss = supervised_loss(model, lessons[first : first + recipe.batch_size])
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.perf_counter() - started
            print(f"  step {step + 1}/{recipe.steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)
    return model.eval()


def make_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    """Returns all examples of a training, each of which is seen once."""
    rng = random.Random(recipe.seed)
    examples = []
    for problem in task.problems("train", recipe.steps * recipe.batch_size, seed=recipe.seed):
        completion = recipe.completion(rng, problem) + recipe.stop
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        examples.append((encode_prompt(tokenizer, problem), ids))
    return examples


def schedule(step: int, recipe: Recipe) -> float:
    """Returns the factor of the learning rate at a step: a linear rise, then a cosine to 5%."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return warmup * (0.525 + 0.475 * math.cos(math.pi * step / recipe.steps))


def supervised_loss(model: Qwen3ForCausalLM, examples: list[Example]) -> torch.Tensor:
    """Returns the mean cross-entropy of completion tokens; right padding needs no mask."""
    width = max(len(prompt) + len(completion) for prompt, completion in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)  # B, T
    taught = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(examples):
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        taught[row, len(prompt) : end] = True
    hidden_states = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden_states[taught[:, 1:]])  # N, V
    return cross_entropy(logits, ids[:, 1:][taught[:, 1:]])


# --- Measuring ----------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[task.ToyProblem],
    temperature: float,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns accuracy and mean completion length in tokens with stop; temperature 0 is greedy."""
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    correct = length = 0
    for first in range(0, len(problems), 256):
        chunk = problems[first : first + 256]
        prompts = [encode_prompt(tokenizer, problem) for problem in chunk]
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
        settings = sampling if temperature > 0 else {"do_sample": False}
        ids = model.generate(**batch, max_new_tokens=96, **settings)
        completions = ids[:, batch["input_ids"].shape[1] :]
        length += int((completions != tokenizer.pad_token_id).sum())
        length += len(chunk) * (tokenizer.eos_token_id == tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        correct += sum(map(task.is_correct, chunk, texts))
    return correct / len(problems), length / len(problems)


# --- The pair -----------------------------------------------------------------------------------

RECIPES = {
    "teacher": Recipe(
        hidden_size=128,
        intermediate_size=320,
        num_layers=3,
        steps=600,
        stop=TURN_END,
        completion=exemplary,
        seed=0,
        learning_rate=3e-3,
    ),
    "student": Recipe(
        hidden_size=64,
        intermediate_size=192,
        num_layers=3,
        steps=350,
        stop=END_OF_TEXT,
        completion=mixed,
        seed=1,
        learning_rate=4e-3,
    ),
}


def build(name: str, directory: Path) -> None:
    """Trains one model of the pair, saves it and prints what it can do."""
    recipe = RECIPES[name]
    tokenizer = make_tokenizer(recipe.stop)
    print(f"{name}: {recipe.steps} steps of {recipe.batch_size} examples", flush=True)
    model = train(recipe, tokenizer)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors makes it private
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"  {model.num_parameters():,} parameters, {size:,} bytes in {directory}")
    problems = task.problems("development", 512)
    for temperature in (0.0, 0.6, 1.0):
        accuracy, length = measure(model, tokenizer, problems, temperature)
        print(f"  temperature {temperature}: accuracy {accuracy:.3f}, {length:.1f} tokens")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded teacher and student.")
    parser.add_argument(
        "--out", type=Path, default=Path(embedded.__file__).parent, help="parent directory"
    )
    parser.add_argument("--only", choices=sorted(RECIPES), help="build one of the two")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else RECIPES:
        build(name, arguments.out / name)


if __name__ == "__main__":
    main()
