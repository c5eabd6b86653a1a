"""Warnings about a run that trains without learning anything."""

from collections.abc import Sequence

from poweropd.config import Config
from poweropd.training.metrics import Metrics

FIRST_STEPS = 3  # after which a run is judged
NEARLY_ALL = 0.99


def of_first_steps(rows: Sequence[Metrics], config: Config) -> list[str]:
    """Returns what a user should know after the first steps, given their metrics."""
    trained = [row for row in rows if row.get("num_tokens")]
    if not trained:
        return [
            "nothing was trained in the first steps: every completion is empty or a single stop "
            "token, which objective.stop=mask leaves out: look at the first prompt above (does the "
            "model's turn begin where it ends?), or set objective.stop=raw"
        ]
    found = []
    zero = _mean(trained, "reward/zero_fraction")
    if zero >= NEARLY_ALL:
        found.append(f"{zero:.0%} of tokens have reward 0 {_remedy(config)}")
    if all(row.get("grad_norm") == 0 for row in trained):
        found.append(
            "every gradient of the first steps is 0: the student does not change; is the teacher "
            "the same model as the student, or its reward 0 everywhere?"
        )
    truncated = _mean(trained, "completions/truncated_fraction")
    if truncated >= NEARLY_ALL:
        found.append(
            f"{truncated:.0%} of completions ran into rollout.max_new_tokens="
            f"{config.rollout.max_new_tokens} without a stop token: raise it, or check that the "
            "student knows when to stop"
        )
    return found


def _remedy(config: Config) -> str:
    parameters = config.reward.model_dump()
    if config.reward.name == "power":
        return f"at alpha {parameters['alpha']:g}: lower reward.alpha"
    return f"under {config.reward.name}: is the teacher the same model as the student?"


def _mean(rows: Sequence[Metrics], key: str) -> float:
    values = [value for row in rows if (value := row.get(key)) is not None]
    return sum(values) / len(values) if values else 0.0
