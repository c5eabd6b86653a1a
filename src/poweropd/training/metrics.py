"""What a step reports: numbers of its completions, its trained tokens, and its sampler."""

import logging
import math
from collections.abc import Collection, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from poweropd.config import Config
from poweropd.config.fields import ScheduleConfig
from poweropd.config.rollouts import RolloutConfig
from poweropd.data.rollout import Rollout, TurnCounts
from poweropd.runs.bins import FAR
from poweropd.runs.metrics import StepMetrics
from poweropd.teachers.base import TeacherScorer
from poweropd.teachers.mixture import MixedTeacher
from poweropd.training.grades.feedback import Feedback
from poweropd.training.grades.task_reward import TaskRewards
from poweropd.training.update import UpdateOutcome

logger = logging.getLogger("poweropd")

FIRST_STEPS = 3  # after which a run is judged
NEARLY_ALL = 0.99
EMPTY = "every completion is empty or a single stop token, which objective.stop=mask leaves out"
KEYS = 2**31  # more samples than a prompt has: prompt * KEYS + sample is one number for both
# Mean |ln p_student - ln p_sampler| of a step's tokens above which a run is warned.
SAMPLER_TOLERANCE = 0.05


def token_metrics(outcome: UpdateOutcome | None, domains: Sequence[str] = ()) -> StepMetrics:
    """Returns what a step reports of its trained tokens; None for a number that is not finite.

    domains: see `teacher_metrics`.
    """
    if outcome is None:
        return {"num_tokens": 0}
    record = outcome.record
    ratios = record.log_ratios
    log_ratios = distribution(ratios)
    metrics = {
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        **{f"reward/{key}": value for key, value in distribution(record.rewards).items()},
        "reward/zero_fraction": (record.rewards == 0).double().mean().item(),
        **{f"log_ratio/{key}": log_ratios[key] for key in ("mean", "min", "max")},
        "log_ratio/far_fraction": (ratios.abs() >= FAR).double().mean().item(),
        "reverse_kl": -log_ratios["mean"],
        "entropy": record.entropy.double().mean().item(),
        "select/fraction": outcome.selected_fraction,
    }
    if not record.tail.isnan().any():
        tails = {"tail/student": record.tail, "tail/teacher": record.teacher_tail}
        metrics |= {key: values.double().mean().item() for key, values in tails.items()}
    finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    return {"num_tokens": outcome.num_tokens, **finite, **teacher_metrics(outcome, domains)}


def teacher_metrics(outcome: UpdateOutcome, domains: Sequence[str]) -> dict[str, float]:
    """Returns tokens, mean reward and reverse KL of each of several teachers, by its name.

    domains: of the step's prompts, in their order; empty names if there is one teacher. A teacher
    without a trained token in this step has 0 tokens and no means.
    """
    metrics: dict[str, float] = {}
    if not any(domains):
        return metrics
    record = outcome.record
    names = sorted(set(domains))
    numbers = torch.tensor([names.index(domain) for domain in domains])
    owner = numbers[record.prompt_indices.long()]
    ratios = record.log_ratios
    for number, name in enumerate(names):
        own = owner == number
        metrics[f"teacher/{name}/tokens"] = int(own.sum())
        means = {"reward": record.rewards[own], "reverse_kl": -ratios[own]}
        for key, values in means.items():
            mean = values.double().mean().item()  # NaN of no tokens
            if math.isfinite(mean):
                metrics[f"teacher/{name}/{key}"] = mean
    return metrics


def mixture_metrics(teacher: TeacherScorer) -> dict[str, float]:
    """Returns the part that each teacher of a mixture has in the step's tokens; all call it."""
    if not isinstance(teacher, MixedTeacher):
        return {}
    total = torch.stack(gather_object([teacher.shares])).sum(0)
    shares = (total / total.sum()).tolist() if total.sum() else []
    return {
        f"teacher/{name}/share": share
        for name, share in zip(teacher.teachers, shares, strict=False)
    }


def sampler_metrics(
    outcome: UpdateOutcome | None,
    rollout: RolloutConfig,
    given: Collection[tuple[int, int]] = (),
) -> dict[str, float]:
    """Says how far the sampler is from the student, where its log-probs are known.

    The effective sample size, (sum w)^2 / (N sum w^2), is a share of the N tokens; it is left out
    where nothing is weighted. given: the keys of completions from a file, which no engine sampled;
    the mean of their weights stands apart.
    """
    if outcome is None:
        return {}
    record = outcome.record
    ratios, weights = record.sampler_log_ratios.double(), record.weights.double()
    owners = record.prompt_indices.long() * KEYS + record.sample_indices.long()
    from_file = torch.isin(owners, torch.tensor([p * KEYS + s for p, s in given]).long())
    metrics: dict[str, float] = {}
    if from_file.any():
        metrics["off_policy/mean_weight"] = weights[from_file].mean().item()
    sampled = ratios[~ratios.isnan() & ~from_file]
    if len(sampled):
        metrics["sampler/mean_abs_difference"] = sampled.abs().mean().item()
    weighted = rollout.correction != "none" or rollout.weights_off_policy
    if weighted and not ratios.isnan().all():
        size = weights.sum() ** 2 / (len(weights) * weights.square().sum())
        metrics["sampler/effective_sample_size"] = size.item()
    return metrics


def warn_of_sampler(metrics: StepMetrics) -> None:
    """Warns if a step's sampler is far from the student."""
    difference = metrics.get("sampler/mean_abs_difference", 0.0)
    if difference > SAMPLER_TOLERANCE:
        logger.warning(
            "the sampler's log-probs differ from the student's by %.3f on average (more than "
            "%g): completions are not quite the student's own; see rollout.correction",
            difference,
            SAMPLER_TOLERANCE,
        )


def grade_metrics(task_rewards: TaskRewards | None, feedback: Feedback | None) -> dict[str, float]:
    """Returns what graders said of the step's completions, over all processes."""
    metrics: dict[str, float] = {}
    if task_rewards is not None:
        found = gather_object(task_rewards.collected)
        metrics["task_reward/mean"] = sum(found) / len(found)
    if feedback is not None and (grades := gather_object(feedback.grades)):
        metrics["feedback/mean_grade"] = sum(grades) / len(grades)
        left_out = sum(gather_object([feedback.left_out]))
        metrics["feedback/left_out_fraction"] = left_out / len(grades)
    return metrics


def schedule_metrics(rollout: RolloutConfig, step: int) -> dict[str, float]:
    """Returns the values at step `step`, from 0, of what a schedule of the rollout moves."""
    values = {
        "max_new_tokens": rollout.max_new_tokens_at(step),
        "temperature": rollout.temperature_at(step),
    }
    scheduled = {key for key, value in rollout if isinstance(value, ScheduleConfig)}
    return {f"rollout/{key}": value for key, value in values.items() if key in scheduled}


def distribution(values: Tensor) -> dict[str, float]:
    """Returns mean, population std, min, max, 5% and 95% quantiles of [N] values, N >= 1."""
    values = values.double()
    low, high = torch.quantile(values, torch.tensor([0.05, 0.95], dtype=values.dtype)).tolist()
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "min": values.min().item(),
        "max": values.max().item(),
        "p05": low,
        "p95": high,
    }


def gathered_completions(
    rollouts: Sequence[Rollout],
) -> tuple[dict[str, float], int, set[tuple[int, int]]]:
    """Returns metrics of a step's completions over all processes, sampled tokens, and given keys.

    Completions that a file gives are in no metric but their share.
    """
    found = [(r.off_policy, r.key, len(r.completion_ids), r.stopped, r.turns) for r in rollouts]
    every = gather_object(found)
    given = {key for off_policy, key, *_ in every if off_policy}
    ends = [end for off_policy, _, *end in every if not off_policy]
    metrics = completion_metrics(*zip(*ends, strict=True)) if ends else {}
    if given:
        metrics["off_policy/share"] = len(given) / len(every)
    return metrics, sum(n for n, *_ in ends), given


def completion_metrics(
    lengths: Sequence[int], stopped: Sequence[bool], turns: Sequence[TurnCounts | None] = ()
) -> dict[str, float]:
    """Returns the mean length of completions, in tokens, how many stopped, and their turns."""
    count = len(lengths)
    if not count:
        return {}
    return {
        "completions/mean_length": sum(lengths) / count,
        "completions/truncated_fraction": sum(not s for s in stopped) / count,
        "completions/stop_fraction": sum(stopped) / count,
        **turn_metrics(turns),
    }


def turn_metrics(turns: Sequence[TurnCounts | None]) -> dict[str, float]:
    """Returns the mean turns and tool calls of completions, and which share of the calls failed.

    It is {} where nobody answers the student; without a call there is no share.
    """
    counts = [one for one in turns if one is not None]
    if not counts:
        return {}
    calls = sum(one.tool_calls for one in counts)
    metrics = {
        "completions/mean_turns": sum(one.turns for one in counts) / len(counts),
        "completions/mean_tool_calls": calls / len(counts),
    }
    if calls:
        failed = sum(one.tool_errors for one in counts)
        metrics["completions/tool_error_fraction"] = failed / calls
    return metrics


def hints(rows: Sequence[StepMetrics], config: Config) -> list[str]:
    """Returns what a user should know after the first steps, given their metrics."""
    trained = [row for row in rows if row.get("num_tokens")]
    if not trained:
        return [
            f"nothing was trained in the first steps: {EMPTY}: look at the first prompt above "
            "(does the model's turn begin where it ends?), or set objective.stop=raw"
        ]
    found = []
    zero = _mean_of(trained, "reward/zero_fraction")
    if zero >= NEARLY_ALL:
        found.append(f"{zero:.0%} of tokens have reward 0 {_reward_remedy(config)}")
    if all(row.get("grad_norm") == 0 for row in trained):
        found.append(
            "every gradient of the first steps is 0: the student does not change; is the teacher "
            "the same model as the student, or its reward 0 everywhere?"
        )
    truncated = _mean_of(trained, "completions/truncated_fraction")
    if truncated >= NEARLY_ALL:
        found.append(
            f"{truncated:.0%} of completions ran into rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens_at(0)} without a stop token: raise it, or check that "
            "the student knows when to stop"
        )
    return found


def halted(rows: Sequence[StepMetrics]) -> list[str]:
    """Returns what a user should know where steps have begun to train nothing."""
    before, *last = [row.get("num_tokens") for row in rows[-FIRST_STEPS - 1 :]]
    if not before or any(last) or len(last) < FIRST_STEPS:
        return []
    return [
        f"the last {FIRST_STEPS} steps trained nothing: {EMPTY}. This student stops at once and "
        "cannot learn to go on: begin anew with objective.stop=raw (or semantic, if the two models "
        "end with different tokens)"
    ]


def _reward_remedy(config: Config) -> str:
    parameters = config.reward.model_dump()
    if config.reward.name == "power":
        return f"at alpha {parameters['alpha']:g}: lower reward.alpha"
    return f"under {config.reward.name}: is the teacher the same model as the student?"


def _mean_of(rows: Sequence[StepMetrics], key: str) -> float:
    values = [value for row in rows if (value := row.get(key)) is not None]
    return sum(values) / len(values) if values else 0.0
