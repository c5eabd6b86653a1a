"""Makes the stand-in of docs/own-task.md: `python tools/tickets.py [--out tickets]`, in a minute.

It writes 300 support tickets with their categories, tickets.jsonl, and schools two tiny models on
other tickets of the same kind: the teacher names the category almost always, after a short reason;
the student often names a wrong one, or leaves out the reason. Seeds are fixed.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from build_embedded import CHAT_TEMPLATE, Example, supervised_loss
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from poweropd.embedded import END_OF_TEXT, TURN_END, TURN_START

#: The system turn, also in recipes/own-task.yaml.
SYSTEM = "Name the category of the ticket: billing, delivery, account, defect or praise."
COUNT = 300
VOCABULARY = 640

# Category -> what the teacher says of it, and what customers write.
CATEGORIES: dict[str, tuple[str, list[str]]] = {
    "billing": (
        "The customer asks about money",
        [
            "I was charged twice for the {thing}",
            "the invoice of my {thing} shows a wrong amount",
            "my card was declined when I paid for the {thing}",
            "please send me a receipt for the {thing} I bought {when}",
            "why did the price of the {thing} go up {when}",
        ],
    ),
    "delivery": (
        "The customer waits for a parcel",
        [
            "my {thing} has not arrived yet",
            "the parcel with the {thing} was left at a neighbour {when}",
            "tracking of my {thing} has shown nothing since {when}",
            "can you send the {thing} to another address",
            "the courier came {when} without the {thing}",
        ],
    ),
    "account": (
        "The customer cannot use the account",
        [
            "I cannot log in to see my {thing} order",
            "I forgot my password {when} and want to order a {thing}",
            "please change the email address under which I bought the {thing}",
            "delete my profile, I bought the {thing} as a guest {when}",
            "the code to confirm my login never comes, I only want my {thing}",
        ],
    ),
    "defect": (
        "The customer has a broken thing",
        [
            "the {thing} stopped working {when}",
            "my {thing} makes a strange noise",
            "there is a crack in the {thing}",
            "the {thing} does not switch on since {when}",
            "a part of the {thing} fell off {when}",
        ],
    ),
    "praise": (
        "The customer is happy",
        [
            "the {thing} is the best I ever had",
            "thank you for the quick help with my {thing} {when}",
            "my family loves the {thing}",
            "great service, the {thing} came {when} as promised",
            "I will buy another {thing}, well done",
        ],
    ),
}
THINGS = ["kettle", "lamp", "bicycle", "tent", "radio", "chair", "blender", "camera", "heater"]
TIMES = ["yesterday", "last week", "on Monday", "two days ago", "this morning", "in June"]
OPENINGS = ["Hello, ", "Hi, ", "Good morning, ", "Dear team, ", ""]
ENDINGS = [".", ". Please help.", ". Thanks.", ". It is urgent.", ". Greetings."]
#: How often the student is taught something else than the teacher.
WRONG, BARE = 0.35, 0.5


@dataclass(frozen=True)
class Ticket:
    """What a customer writes, and the category that it belongs to."""

    text: str
    category: str

    def answered(self, category: str) -> str:
        """Returns a completion: the reason and the answer."""
        return f"{CATEGORIES[category][0]}.\nAnswer: {category}"


def tickets(count: int, seed: int) -> list[Ticket]:
    """Returns so many different tickets; another seed gives others, of which some are the same."""
    rng = random.Random(seed)
    found: dict[str, Ticket] = {}
    while len(found) < count:
        category = rng.choice(list(CATEGORIES))
        written = rng.choice(CATEGORIES[category][1])
        body = written.format(thing=rng.choice(THINGS), when=rng.choice(TIMES))
        text = rng.choice(OPENINGS) + body + rng.choice(ENDINGS)
        found[text] = Ticket(text[0].upper() + text[1:], category)
    return list(found.values())


def exemplary(rng: random.Random, ticket: Ticket) -> str:
    """Returns what the teacher is taught."""
    return ticket.answered(ticket.category)


def sloppy(rng: random.Random, ticket: Ticket) -> str:
    """Returns what the student is taught: now and then a wrong category, or no reason."""
    wrong = rng.random() < WRONG
    category = rng.choice(list(CATEGORIES)) if wrong else ticket.category
    return category if rng.random() < BARE else ticket.answered(category)


@dataclass(frozen=True)
class School:
    """How one of the two models is made."""

    hidden_size: int
    steps: int
    completion: Callable[[random.Random, Ticket], str]
    seed: int
    learning_rate: float = 4e-3
    batch_size: int = 32


SCHOOLS = {
    "teacher": School(hidden_size=96, steps=100, completion=exemplary, seed=1),
    "student": School(hidden_size=64, steps=110, completion=sloppy, seed=2),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level tokenizer that knows the words of the tickets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{t.text}\n{t.answered(t.category)}" for t in tickets(2_000, seed=0)]
    tokenizer.train_from_iterator([*texts, f"system\n{SYSTEM}\nuser\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[TURN_START, TURN_END],
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_config(name: str, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Returns the config of one of the two models."""
    of = SCHOOLS[name]
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=of.hidden_size,
        intermediate_size=3 * of.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def school(name: str, tokenizer: PreTrainedTokenizerFast, known: set[str]) -> Qwen3ForCausalLM:
    """Returns a model trained on tickets that are not among the known ones."""
    of = SCHOOLS[name]
    torch.manual_seed(of.seed)
    model = Qwen3ForCausalLM(make_config(name, tokenizer)).train()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    lessons = make_lessons(of, tokenizer, known)
    optimizer = torch.optim.AdamW(model.parameters(), of.learning_rate)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, of.learning_rate, of.steps)
    for step in range(of.steps):
        loss = supervised_loss(model, [next(lessons) for _ in range(of.batch_size)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if (step + 1) % 50 == 0:
            print(f"{name}: step {step + 1}/{of.steps}, loss {loss:.3f}", flush=True)
    return model.eval()


def make_lessons(
    of: School, tokenizer: PreTrainedTokenizerFast, known: set[str]
) -> Iterator[Example]:
    """Yields prompts with the completions that a model is taught, as token ids."""
    rng = random.Random(of.seed)
    for ticket in tickets(of.steps * of.batch_size // 2, seed=of.seed) * 3:
        if ticket.text in known:
            continue
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ticket.text}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        completion = of.completion(rng, ticket) + TURN_END
        yield (
            tokenizer(prompt, add_special_tokens=False)["input_ids"],
            tokenizer(completion, add_special_tokens=False)["input_ids"],
        )


def main() -> None:
    """Writes the tickets and both models."""
    parser = argparse.ArgumentParser(description="Make the stand-in of docs/own-task.md.")
    parser.add_argument("--out", type=Path, default=Path("tickets"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    own = tickets(COUNT, seed=7)
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"ticket": t.text, "category": t.category}) + "\n" for t in own]
    (out / "tickets.jsonl").write_text("".join(lines), encoding="utf-8")
    tokenizer = make_tokenizer()
    for name in SCHOOLS:
        school(name, tokenizer, {ticket.text for ticket in own}).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    print(f"{COUNT} tickets, a teacher and a student: {out}")


if __name__ == "__main__":
    main()
