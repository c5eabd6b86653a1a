"""Exports of the student, as a Hugging Face directory: rehearsed, and verified before they count.

A directory that cannot be loaded again, or holds another model than the student, is worse than
none. So what an export needs beside weights is written once before the first step, and each export
is loaded again and compared with the student on a few tokens.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from poweropd.config.sections import ModelConfig
from poweropd.data.prompts import Prompt
from poweropd.data.rollout import Example, Request, make_example
from poweropd.errors import RunError, UsageError
from poweropd.models import loading
from poweropd.models.devices import name_of
from poweropd.models.language_model import Student, Teacher
from poweropd.teachers.base import score
from poweropd.teachers.local import LocalTeacher

# Mean absolute difference of log-probs, nats per token, between the student and its export.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-1}
PROBE_TOKENS = 16


def rehearse(student: Student, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> None:
    """Writes what an export holds beside weights; raises UsageError if that cannot be written."""
    student.stop_at(stop_ids)
    with tempfile.TemporaryDirectory() as folder:
        try:
            student.causal_lm.config.save_pretrained(folder)
            student.causal_lm.generation_config.save_pretrained(folder)
            save_tokenizer(tokenizer, Path(folder))
        except (ValueError, TypeError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"model.student: it could be trained, but not saved ({reason}): mend the config, "
                "generation_config.json or tokenizer of the student"
            ) from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer; raises RunError if its library cannot write the file."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises the bare class
            raise
        raise RunError(
            f"{folder}: cannot write the tokenizer ({error}): free some space"
        ) from error


def make_probe(prompt_ids: list[int], student: Student) -> Example:
    """Makes an example of fixed tokens, spread over the vocabulary, behind a prompt."""
    prompt = Prompt(0, prompt_ids[-PROBE_TOKENS:], prompt_ids[-PROBE_TOKENS:])
    kept = student.kept_ids()
    tokens = [kept[i] for i in torch.linspace(0, len(kept) - 1, PROBE_TOKENS).long().tolist()]
    rollout = Request(prompt, 0, 0, seed=0).rollout(tokens, [], stopped=False)
    example = make_example(rollout, (), (0,), "raw")
    assert example is not None  # every token of it counts
    return example


def verify(
    folder: Path,
    student: Student,
    config: ModelConfig,
    probes: Sequence[Example],
    log_probs: Sequence[Sequence[float]],
) -> None:
    """Loads an export again, on the CPU, and raises RunError if it is not the student."""
    try:
        loaded = loading.load_model(str(folder), config.dtype, config.trust_remote_code)
    except UsageError as error:
        raise _refused(folder, f"cannot be loaded again ({error})") from error
    sizes = (student.vocab_size, student.compute_dtype, student.masked_ids)
    exported = Teacher(loaded, *sizes)
    differences = [
        (example.teacher_log_probs - torch.tensor(own)).abs()
        for example, own in zip(
            score(LocalTeacher(exported, loading.UNLIMITED), probes), log_probs, strict=True
        )
        if example.teacher_log_probs is not None
    ]
    difference = torch.cat(differences).mean().item()
    tolerance = TOLERANCES[name_of(student.compute_dtype)]
    if not difference <= tolerance:
        raise _refused(
            folder,
            f"gives log-probs that differ by {difference:.3g} nats per token from the student's "
            f"(allowed: {tolerance:g})",
        )


def _refused(folder: Path, problem: str) -> RunError:
    return RunError(
        f"{folder.name.removeprefix('.tmp-')}: the exported student {problem}: it is not kept, and "
        "nothing is lost, for the checkpoint is whole; try other model.lora.target_modules, or "
        "other versions of transformers and peft"
    )
