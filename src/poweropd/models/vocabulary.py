"""The vocabulary that student and teachers share: which ids are the same token to all of them.

The teacher scores the ids that the student sampled. Tokenizers of one family often differ by added
tokens alone, such as `<think>`: ids that are not the same token to both are then in no softmax.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poweropd.errors import UsageError

SHOWN_IDS = 5  # that a message names


@dataclass(frozen=True)
class Vocabulary:
    """The ids over which models are compared: those below `size` that are not `masked`."""

    size: int
    masked: tuple[int, ...] = ()

    @classmethod
    def shared(
        cls, rows: int, tokenizer: PreTrainedTokenizerBase, unshared: Collection[int]
    ) -> "Vocabulary":
        """Returns the vocabulary of models whose heads have `rows` ids, less the unshared ones.

        Where all tokenizers are the same, ids without a token stay: they are padding.
        """
        if not unshared:
            return cls(rows)
        last = max({*tokenizer.get_vocab().values()} - {*unshared})
        return cls(rows, tuple(sorted(unshared))).cut(last + 1)

    def cut(self, size: int) -> "Vocabulary":
        """Returns it with at most so many ids."""
        size = min(self.size, size)
        return Vocabulary(size, tuple(i for i in self.masked if i < size))


def head_rows(*models: PreTrainedModel) -> int:
    """Returns how many ids all heads have; ids past them are left out of each softmax."""
    return min(m.get_output_embeddings().weight.shape[0] for m in models)


def unshared_ids(
    student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Returns the ids that are not the same token to both tokenizers, in order.

    Raises UsageError if any of these is more than an added token.
    """
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if student == teacher:
        return []
    own, other = _differing(student, teacher), _differing(teacher, student)
    inherent = sorted(
        ({*own} - {*student_tokenizer.added_tokens_decoder})
        | ({*other} - {*teacher_tokenizer.added_tokens_decoder})
    )
    if not inherent:
        return sorted({*own, *other})
    raise UsageError(
        "student and teacher must share one vocabulary, but for added tokens: the student has "
        f"{len(student)} tokens, the teacher {len(teacher)}; {len(inherent)} ids differ that are "
        f"no added tokens: {_named(inherent, own, other)}; in training, teacher.align=spans "
        "compares such models on their text"
    )


def _differing(vocab: Mapping[str, int], other: Mapping[str, int]) -> dict[int, str]:
    """Returns id -> token of what the other vocabulary does not have under that id."""
    return {i: token for token, i in vocab.items() if other.get(token) != i}


def _named(ids: Sequence[int], own: Mapping[int, str], other: Mapping[int, str]) -> str:
    """Returns ids with what they are to the student and to the teacher, for a message."""
    shown = ", ".join(f"{i} ({own.get(i)!r} / {other.get(i)!r})" for i in ids[:SHOWN_IDS])
    return f"{shown}{', ...' if len(ids) > SHOWN_IDS else ''}"


def unshared_notice(
    unshared: Sequence[int],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Returns how the two tokenizers differ, for a user."""
    student, teacher = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    names = _named(unshared, _differing(student, teacher), _differing(teacher, student))
    return (
        f"student and teacher share all but {len(unshared)} added tokens, which are not sampled "
        f"and take no part in training: {names}"
    )
