"""The embedded pair: its task, its files, and what the two models can do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from poweropd import embedded
from poweropd.embedded import task

EVALUATION_START = ["6+8+7+9+7+3+3", "9+9+9+5+4+3+3"]
WORKED = "3+8=11+9=20\n\\boxed{20}"

SPLITS: tuple[task.Split, ...] = ("train", "development", "evaluation")


# --- the task -----------------------------------------------------------------------------------


def test_splits_are_disjoint_even_up_to_the_order_of_terms():
    sums = {
        split: {tuple(sorted(problem.terms)) for problem in task.problems(split, 2000)}
        for split in SPLITS
    }
    assert not sums["train"] & sums["development"]
    assert not sums["train"] & sums["evaluation"]
    assert not sums["development"] & sums["evaluation"]


@pytest.mark.parametrize("split", SPLITS)
def test_problems_are_reproducible_distinct_and_of_their_split(split):
    found = task.problems(split, 300, seed=3)
    assert found == task.problems(split, 300, seed=3)
    assert found[:10] == task.problems(split, 10, seed=3)
    assert found != task.problems(split, 300, seed=4)
    assert len({problem.id for problem in found}) == len(found) == 300
    assert all(task.split_of(problem.terms) == split for problem in found)
    assert all(int(problem.answer) == sum(problem.terms) for problem in found)


def test_problems_stay_the_same_in_every_version():
    """Results on the evaluation split compare across versions only while it does not move."""
    assert [problem.problem for problem in task.problems("evaluation", 2)] == EVALUATION_START


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of train, development, evaluation"):
        task.problems("test", 1)


def test_worked_solution_is_correct():
    problem = task.ToyProblem("x", "3+8+9", "20")
    assert task.worked_solution(problem) == WORKED
    for problem in task.problems("train", 200):
        assert task.is_correct(problem, task.worked_solution(problem))


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        ("\\boxed{20}", True),
        ("\\boxed{ 20 }", True),
        ("3+8=11\n\\boxed{19} no, \\boxed{20}", True),
        ("\\boxed{20} no, \\boxed{19}", False),
        ("\\boxed{19}", False),
        ("\\boxed{200}", False),
        ("\\boxed{020}", False),
        ("\\boxed{}", False),
        ("\\boxed{20", False),
        ("boxed{20}", False),
        ("20", False),
        ("", False),
    ],
)
def test_only_the_last_box_counts_and_only_exactly(completion, correct):
    assert task.is_correct(task.ToyProblem("x", "3+8+9", "20"), completion) is correct


def test_the_task_needs_neither_torch_nor_transformers():
    code = (
        "import sys; import poweropd.embedded.task, poweropd.embedded as e; e.path('student');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the files ----------------------------------------------------------------------------------


def test_both_models_together_are_small():
    files = [file for name in embedded.NAMES for file in embedded.path(name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 4_000_000


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="teacher and student"):
        embedded.path("assistant")


def test_they_end_turns_as_a_base_and_a_chat_model_do():
    for name, stop in [("teacher", "<|im_end|>"), ("student", "<|endoftext|>")]:
        model, tokenizer = load(embedded.path(name))
        assert isinstance(model, Qwen3ForCausalLM)
        assert model.dtype == torch.float32
        assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == stop
        assert tokenizer.eos_token == stop
        assert tokenizer.pad_token == "<|endoftext|>"
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_they_share_a_vocabulary_and_qwen_turns():
    (_, teacher), (_, student) = (load(embedded.path(name)) for name in embedded.NAMES)
    assert teacher.get_vocab() == student.get_vocab()
    turns = [{"role": "user", "content": "1+2"}]
    for tokenizer in (teacher, student):
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert text == "<|im_start|>user\n1+2<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == 11
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(tokenizer("\\boxed{3}<|im_end|>")["input_ids"]) == (
            "\\boxed{3}<|im_end|>"
        )


# --- what they can do ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "temperature", "least", "most"),
    [("teacher", 0.6, 0.98, 1.0), ("teacher", 1.0, 0.97, 1.0), ("student", 0.6, 0.5, 0.8)],
)
def test_the_teacher_is_right_and_the_student_has_room_to_gain(name, temperature, least, most):
    assert least <= accuracy(name, temperature, task.problems("development", 192)) <= most


def load(directory: Path):
    """A model directory as a user loads it."""
    return (
        AutoModelForCausalLM.from_pretrained(directory),
        AutoTokenizer.from_pretrained(directory),
    )


def accuracy(name: str, temperature: float, problems: list[task.ToyProblem]) -> float:
    """The share of problems solved when sampling from the whole distribution."""
    model, tokenizer = load(embedded.path(name))
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.problem}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for problem in problems
    ]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    ids = model.generate(
        **batch, max_new_tokens=96, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
    )
    completions = tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(map(task.is_correct, problems, completions)) / len(problems)
