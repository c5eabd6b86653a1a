"""Stop tokens: which ids end a completion, and how the terminal one is trained.

A base student and a chat teacher often end a turn with different tokens, so what happens at a
completion's last token is part of the method. The last valid token of a completion is called
*terminal* if it is a stop id of either model.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from poweropd.errors import UsageError

if TYPE_CHECKING:  # so that targets need torch alone, and the names of the policies nothing
    from torch import Tensor
    from transformers import GenerationConfig
    from transformers import PreTrainedTokenizerBase as Tokenizer

# A chat turn rendered around this text shows which special token the template ends it with.
_MARKER = "the turn"


class Targets(NamedTuple):
    """What each model is scored on, [B, T] each; ids are meaningless where `loss_mask` is 0."""

    student_targets: "Tensor"
    teacher_targets: "Tensor"
    loss_mask: "Tensor"


class Policy(NamedTuple):
    """Whether the terminal token is trained, and who is scored on the teacher's stop there."""

    trained: bool = True
    student_replaced: bool = False
    teacher_replaced: bool = False


POLICIES = {
    "raw": Policy(),
    "mask": Policy(trained=False),
    "canonical": Policy(student_replaced=True, teacher_replaced=True),
    "cross": Policy(teacher_replaced=True),
    "semantic": Policy(),
}


def targets(
    completion_ids: "Tensor",
    completion_mask: "Tensor",
    student_stop_ids: Sequence[int],
    teacher_stop_ids: Sequence[int],
    policy: str = "mask",
) -> Targets:
    """Returns the targets of both models and the loss mask of right-padded completions [B, T].

    - `raw`: every token, the terminal one included, is scored as sampled.
    - `mask`: the terminal stop is left out of the loss (the paper's choice).
    - `canonical`: the terminal stop becomes the teacher's stop for both models.
    - `cross`: the student is scored on the stop it sampled, the teacher on its own stop.
    - `semantic`: targets as in `raw`; for both models the objective sums the probabilities of all
      stop ids into one action (arXiv:2609.20511).

    The teacher's own stop is `teacher_stop_ids[0]`. Stops inside a completion are ordinary
    tokens. Ids alone decide, so the number of trained tokens is known before any forward.
    """
    if policy not in POLICIES:
        raise ValueError(f"stop policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    if not teacher_stop_ids:
        raise ValueError("teacher_stop_ids: expected at least one stop id, got none")
    chosen, mask = POLICIES[policy], completion_mask.bool()
    stops = completion_ids.new_tensor(sorted({*student_stop_ids, *teacher_stop_ids}))
    terminal = _terminal(completion_ids, mask, stops)
    replaced = completion_ids.masked_fill(terminal, teacher_stop_ids[0])
    return Targets(
        replaced if chosen.student_replaced else completion_ids,
        replaced if chosen.teacher_replaced else completion_ids,
        mask if chosen.trained else mask & ~terminal,
    )


def _terminal(ids: "Tensor", mask: "Tensor", stops: "Tensor") -> "Tensor":
    """Returns [B, T] bool: the last valid position of each completion, if it holds a stop id."""
    import torch

    positions = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(mask, positions, -1).amax(1, keepdim=True) if ids.shape[1] else mask.long()
    return (positions == last) & torch.isin(ids, stops)


def stop_ids(tokenizer: "Tokenizer", generation_config: "GenerationConfig") -> list[int]:
    """Returns the ids that end a turn of a model, the one it was trained to end with first.

    They come, in this order, from the generation config, the tokenizer's end-of-sequence token
    and the chat template (the special token right after an assistant's turn).
    """
    configured = generation_config.eos_token_id
    found = [*configured] if isinstance(configured, list) else [configured]
    found += [tokenizer.eos_token_id, *_template_stops(tokenizer)]
    ids = list(dict.fromkeys(i for i in found if i is not None))
    if not ids:
        raise UsageError(
            f"{tokenizer.name_or_path}: no stop token found in the generation config, the "
            "tokenizer or the chat template; set eos_token in its tokenizer_config.json"
        )
    return ids


def _template_stops(tokenizer: "Tokenizer") -> list[int]:
    """Returns the special token right after an assistant's turn; [] if the template shows none."""
    for text in _rendered_turns(tokenizer) if tokenizer.chat_template else ():
        before, found, after = text.rpartition(_MARKER)
        if before and found:
            ids = tokenizer(after, add_special_tokens=False)["input_ids"]
            return ids[:1] if ids and ids[0] in special_ids(tokenizer) else []
    return []


def special_ids(tokenizer: "Tokenizer") -> set[int]:
    """Returns the ids of all special tokens, those that have no role such as eos included."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}


def _rendered_turns(tokenizer: "Tokenizer") -> Iterator[str]:
    """Yields an assistant's turn in each form that the chat template takes.

    Some templates insist on a system turn, and some on contents in parts.
    """
    import jinja2

    turns = (("system", "."), ("user", "?"), ("assistant", _MARKER))
    for first in (1, 0):
        for in_parts in (False, True):
            try:
                yield str(
                    tokenizer.apply_chat_template(
                        [
                            {
                                "role": role,
                                "content": [{"type": "text", "text": text}] if in_parts else text,
                            }
                            for role, text in turns[first:]
                        ],
                        tokenize=False,
                    )
                )
            except (TypeError, jinja2.TemplateError):  # it refuses this form
                continue


def shared_stops(
    student: Sequence[int],
    teacher: Sequence[int],
    unshared: Collection[int],
    policy: str,
    tokenizer: "Tokenizer",
) -> tuple[list[int], list[int]]:
    """Returns the stop ids of both models, less those that are not the same token to both.

    A teacher without any counts as one with the student's. Raises UsageError if the student could
    never stop, or if the policy is about a stop of the teacher that the student does not have.
    `tokenizer` is the student's.
    """
    own, other = ([i for i in ids if i not in unshared] for ids in (student, teacher))
    if not own:
        raise UsageError(
            f"the student ends a turn with {tokenizer.convert_ids_to_tokens(student[0])} (id "
            f"{student[0]}), which is not that token to the teacher, so that it cannot be trained "
            "to end a turn: give both models the tokenizer files of one of them"
        )
    if teacher[0] in unshared and POLICIES[policy].teacher_replaced:
        raise UsageError(
            f"objective.stop: {policy} scores the teacher's own stop token, id {teacher[0]}, which "
            "is not the same token to the student: set objective.stop=mask"
        )
    return own, other or own


def difference(
    student: Sequence[int], teacher: Sequence[int], policy: str, tokenizer: "Tokenizer"
) -> str | None:
    """Returns a notice for a user whose models end their turns differently, else None."""
    if student[0] == teacher[0] and set(student) == set(teacher):
        return None
    own, other = (
        " or ".join(tokenizer.convert_ids_to_tokens(i) or f"id {i}" for i in ids)
        for ids in (student, teacher)
    )
    return (
        f"the student ends a turn with {own}, the teacher with {other} (the first is its own): "
        f"rollouts stop at any of these, and objective.stop={policy} decides how the last token "
        "is trained"
    )
