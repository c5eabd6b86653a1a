"""TRL: its `DistillationTrainer` with a reward, and our heads, which hold no logits.

    trainer = PowerOPDTrainer(reward={"name": "power", "alpha": 5}, model=..., teacher_model=...)

takes everything that TRL's own class takes. From the command line, with all of TRL's arguments:

    accelerate launch -m poweropd.integrations.trl --reward '{"name": "power", "alpha": 5}' ...
"""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from poweropd.errors import UsageError, one_line
from poweropd.integrations.core import (
    DEFAULT,
    Advantages,
    check_temperature,
    reward_metrics,
    reward_of,
)
from poweropd.integrations.peers import PROBE_STUDENT, PROBE_TEACHER, Peer, Probe
from poweropd.kernels import Head, PairStatistics, TeacherHead, full_vocab_loss, sampled_loss
from poweropd.kernels.head import head_options
from poweropd.rewards import Reward

TESTED = "1.16.0"
try:
    from trl import DistillationTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer
except ImportError as error:
    raise UsageError(
        f"trl: {one_line(str(error))}; poweropd was tested with trl {TESTED}: install that, or a "
        "newer poweropd"
    ) from error

RewardSpec = Reward | dict[str, Any] | str
Count = Tensor | int | None
DEFAULT_REWARD = json.dumps(DEFAULT)
#: What TRL's losses return: the loss, the sum of the student's entropies, and the tokens of both.
LossParts = tuple[Tensor, Tensor, Tensor]


class TRL(Peer):
    """TRL, as far as this adapter depends on it."""

    distribution = "trl"
    tested = TESTED
    flag = "from poweropd.integrations.trl import PowerOPDTrainer"

    def check(self) -> None:
        """Raises UsageError unless the trainer's methods are what this adapter overrides."""
        self.check_parameters(
            DistillationTrainer._compute_loss,
            ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
        )
        self.check_parameters(
            DistillationTrainer._get_last_hidden_state,
            ["self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"],
        )
        self.check_parameters(
            ServerDistillationTrainer._get_teacher_token_logprobs_from_server,
            ["self", "inputs", "aligned_prompt_length"],
        )

    def probe(self) -> Probe:
        """Runs the loss of the trainer's heads on two tokens; its gradient by ln p is -r."""
        self.check()
        reward = reward_of({"name": "power", "alpha": 5.0})
        logits = torch.tensor(PROBE_STUDENT)
        # Two ids, of which the first has the wanted probability: a head without hidden states.
        hidden = torch.stack([logits, torch.log1p(-logits.exp())], 1).requires_grad_()
        teacher = torch.stack([torch.tensor(PROBE_TEACHER), torch.zeros(2)], 1)
        teacher[:, 1] = torch.log1p(-teacher[:, 0].exp())
        loss, _, _ = sampled(
            Tokens(hidden, Head(torch.eye(2)), torch.zeros(2, dtype=torch.int64)),
            TeacherHead(teacher, Head(torch.eye(2))),
            reward,
            1.0,
        )
        (gradient,) = torch.autograd.grad(loss, hidden)
        one_minus_p = 1 - logits.exp()
        return Probe(
            tuple((-gradient[:, 0] / one_minus_p).tolist()), "the heads of PowerOPDTrainer"
        )


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of a batch, as the student's head sees them."""

    hidden: Tensor  # [N, H]
    head: Head
    targets: Tensor  # [N] int64


def sampled(
    tokens: Tokens, teacher: TeacherHead | Tensor, reward: Reward, token_weight: float | Tensor
) -> tuple[Tensor, PairStatistics, Tensor]:
    """Returns the loss -w sum r(t, p) ln p, statistics, and rewards [N].

    teacher: its head, or the log-probs [N] that a server gave.
    """
    of, rewards = Advantages(reward), torch.zeros(len(tokens.targets), device=tokens.hidden.device)
    scored = teacher if isinstance(teacher, Tensor) else None

    def coefficient(chunk: PairStatistics, rows: slice) -> Tensor:
        log_probs = chunk.teacher_log_probs if scored is None else scored[rows]
        rewards[rows] = of(log_probs, chunk.log_probs, torch.ones_like(log_probs))
        return token_weight * rewards[rows]

    head = None if isinstance(teacher, Tensor) else teacher
    loss, statistics = sampled_loss(tokens.hidden, tokens.head, tokens.targets, coefficient, head)
    return loss, statistics, rewards


class _Rewarded(DistillationTrainer):
    """What the trainers with a local and with a served teacher share."""

    def __init__(
        self,
        *args: Any,
        reward: RewardSpec = DEFAULT_REWARD,
        train_stop: bool = False,
        **kwargs: Any,
    ) -> None:
        TRL().check()
        self.reward, self.train_stop = reward_of(reward), train_stop
        Advantages(self.reward)  # refuses what a part of a step cannot have
        super().__init__(*args, **kwargs)
        check_sampling(self)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples as TRL does, and leaves the stop token of a completion out of the loss."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if not self.train_stop:
            ids, mask = output["completion_ids"], output["completion_mask"]
            positions = torch.arange(ids.size(1), device=ids.device)
            stops = torch.isin(ids, torch.tensor(self.eos_token_ids, device=ids.device))
            is_end = stops & (positions == mask.sum(1, keepdim=True) - 1)
            output["tool_mask"] = output.get("tool_mask", mask) * ~is_end
            trained = loss_mask(output).sum()
            output["num_items_in_batch"] = self.accelerator.gather(trained).sum()
        return output

    def _tokens(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tokens:
        """Returns the trained tokens of a batch; the gradient flows into their hidden states."""
        mask, hidden = loss_mask(inputs), self._hidden_states(model, inputs)
        head = head_of(model, self.temperature)
        return Tokens(hidden[mask], head, inputs["completion_ids"][mask])

    def _hidden_states(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the states [B, C, H] that predict the completions."""
        return self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{key: inputs[key] for key in IMAGE_INPUTS if key in inputs},
        )

    def _reported(self, loss: Tensor, statistics: PairStatistics, rewards: Tensor) -> LossParts:
        """Logs the rewards of this process's tokens, and returns what TRL expects."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in reward_metrics(rewards).items():
            metrics[f"reward/{name}"].append(value)
        return loss, statistics.entropy.sum(), torch.tensor(len(rewards), device=loss.device)


#: What TRL's batches may hold for models that read images.
IMAGE_INPUTS = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


class PowerOPDTrainer(_Rewarded):
    """TRL's DistillationTrainer that learns from a bounded reward of the teacher's probabilities.

    The student samples, and learns from the reward of each sampled token (three head matmuls) or,
    with `full_vocabulary`, from its exact expectation over the next token (four). `beta` of the
    configuration plays no part. Everything else is TRL's.

    Args:
        reward: a reward of `poweropd.rewards`, or what a recipe has at `reward`; by default
            PowerOPD's at alpha 5.
        train_stop: whether the token that ends a completion is trained. The paper leaves it out,
            since a student and a teacher often end their turns with different tokens.
        full_vocabulary: whether to take the expectation.
        args, kwargs: as TRL's class takes them.

    Raises UsageError if completions are sampled in a way that the loss does not know (top_p,
    top_k, min_p, a repetition penalty), or the installed TRL is not what this was written for.
    """

    def __init__(self, *args: Any, full_vocabulary: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.full_vocabulary = full_vocabulary

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Count
    ) -> LossParts:
        tokens = self._tokens(unwrapped_student, inputs)
        self.teacher_model.eval()
        teacher_model = self.accelerator.unwrap_model(self.teacher_model)
        with torch.no_grad():
            teacher_hidden = self._forward_redirection(
                self.teacher_model, teacher_model, self._hidden_states, teacher_model, inputs
            ).to(tokens.hidden.device)[loss_mask(inputs)]
        head = head_of(teacher_model, self.temperature)
        weight = token_weight(tokens, num_items_in_batch)
        reward = self.reward.at(self.state.global_step)
        if not self.full_vocabulary:
            teacher = TeacherHead(teacher_hidden, head)
            return self._reported(*sampled(tokens, teacher, reward, weight))
        loss, statistics = full_vocab_loss(
            tokens.hidden,
            tokens.head,
            tokens.targets,
            TeacherHead(teacher_hidden, head, reward=reward),
            weight,
            divergence=reward.divergence,
        )
        rewards = reward(statistics.teacher_log_probs, statistics.log_probs)
        return self._reported(loss, statistics, rewards)


class PowerOPDServerTrainer(_Rewarded, ServerDistillationTrainer):
    """The same with a teacher behind a vLLM server, as TRL's ServerDistillationTrainer has it.

    A server gives the log-probs of the sampled tokens, so the objective is the sampled one.
    """

    compute_loss = DistillationTrainer.compute_loss

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_temperature("trl: temperature", self.temperature)

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Count
    ) -> LossParts:
        tokens = self._tokens(unwrapped_student, inputs)
        scored = self._teacher_log_probs(inputs)[loss_mask(inputs)]
        weight = token_weight(tokens, num_items_in_batch)
        reward = self.reward.at(self.state.global_step)
        return self._reported(*sampled(tokens, scored, reward, weight))

    def _teacher_log_probs(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the server's log-probs of the completions, [B, C]; 0 at padding."""
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        prompts = inputs["prompt_ids"]
        labels = ids.masked_fill(mask == 0, -100)
        found = self._get_teacher_token_logprobs_from_server(
            {
                "input_ids": torch.cat([prompts, ids], dim=1),
                "attention_mask": torch.cat([inputs["prompt_mask"], mask], dim=1),
                "labels": torch.cat([torch.full_like(prompts, -100), labels], dim=1),
                "prompt_attention_mask": inputs["prompt_mask"],
            },
            prompts.size(1),
        )["actual_logprobs"]
        scored = torch.zeros(ids.shape, device=ids.device)
        scored[:, : found.size(1)] = found
        return scored


def loss_mask(inputs: dict[str, Tensor]) -> Tensor:
    """Returns which tokens of the completions [B, C] the student wrote itself, as bools."""
    mask = inputs["completion_mask"] != 0
    return mask & (inputs["tool_mask"] != 0) if "tool_mask" in inputs else mask


def token_weight(tokens: Tokens, num_items_in_batch: Count) -> Tensor | float:
    """Returns 1 / N, with the N that TRL counts over a whole step, or else that of this batch."""
    own = max(1, len(tokens.targets))
    return 1.0 / (own if num_items_in_batch is None else num_items_in_batch)


def head_of(model: Any, temperature: float) -> Head:
    """Returns the head of a transformers model; a sharded one is gathered."""
    embeddings = model.get_output_embeddings()
    weight, bias = (
        part.full_tensor() if isinstance(part, torch.distributed.tensor.DTensor) else part
        for part in (embeddings.weight, embeddings.bias)
    )
    options = head_options(model.config.get_text_config().to_dict())
    return replace(Head(weight, **options), bias=bias, temperature=temperature)


def check_sampling(trainer: DistillationTrainer) -> None:
    """Raises UsageError if completions come from another distribution than the loss computes."""
    plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    for name, expected in plain.items():
        if (got := vars(trainer)[name]) not in (expected, None):
            raise UsageError(
                f"trl: {name}: expected {expected}, got {got}: the reward compares the "
                "probabilities that completions were sampled with"
            )


@dataclass
class RewardArguments:
    """The arguments of the command line beside TRL's own."""

    reward: str = field(
        default=DEFAULT_REWARD,
        metadata={"help": "The reward, as JSON, such as {'name': 'power', 'alpha': 5}."},
    )
    full_vocabulary: bool = field(
        default=False,
        metadata={"help": "Whether to take the reward's expectation over the whole vocabulary."},
    )
    train_stop: bool = field(
        default=False, metadata={"help": "Whether to train the token that ends a completion."}
    )


def run_trl_script() -> None:
    """Runs TRL's own distillation script with our trainer in it."""
    import trl
    from trl import DatasetMixtureConfig, DistillationConfig, ModelConfig, ScriptArguments
    from trl.scripts import distillation

    parser = trl.TrlParser(
        (RewardArguments, ScriptArguments, DistillationConfig, ModelConfig, DatasetMixtureConfig)
    )
    own, script, training, model, dataset = parser.parse_args_and_config()

    def trainer(*args: Any, **kwargs: Any) -> PowerOPDTrainer:
        return PowerOPDTrainer(*args, **vars(own), **kwargs)

    trl.DistillationTrainer = trainer  # where the script looks for it
    distillation.main(script, training, model, dataset)


if __name__ == "__main__":
    run_trl_script()
