"""The student's log-probs of spans, where the teacher has another tokenizer."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from poweropd.data.batch import Batch
from poweropd.data.rollout import span_totals
from poweropd.kernels import Head, score_tokens
from poweropd.objectives.base import TokenRecord


@dataclass(frozen=True)
class SpanScores:
    """What is known of the span of each of N tokens before the pass that makes the gradient."""

    sizes: Tensor  # [N] float32, trained tokens of the span
    log_probs: Tensor  # [N] float32, the student's ln p of the span; NaN for a span of one token

    @classmethod
    def of(cls, hidden_states: Tensor, head: Head, batch: Batch) -> Self:
        """Scores a batch in spans, for a head matmul over the tokens of longer spans.

        The log-prob of a token that is a span by itself is left to the pass that makes the
        gradient.
        """
        assert batch.spans is not None
        sizes = span_totals(torch.ones_like(batch.task_reward), batch.spans)
        log_probs, longer = torch.full_like(sizes, torch.nan), (sizes > 1).nonzero().squeeze(1)
        if len(longer):
            states, targets = hidden_states.index_select(0, longer), batch.student.targets[longer]
            own = score_tokens(states.detach(), head, targets, entropy=False).log_probs
            log_probs[longer] = span_totals(own, batch.spans[longer])
        return cls(sizes, log_probs)

    def of_spans(self, log_probs: Tensor, tokens: slice = slice(None)) -> Tensor:
        """Returns the log-probs of the spans of some tokens, given those of the tokens, [n]."""
        return log_probs.where(self.sizes[tokens] == 1, self.log_probs[tokens])

    def recorded(self, record: TokenRecord) -> TokenRecord:
        """Returns the record of tokens as that of their spans."""
        log_probs = self.of_spans(record.student_log_probs)
        return replace(record, student_log_probs=log_probs, span_sizes=self.sizes)
