"""Settings of a recipe that are right each, and wrong together."""

from typing import TYPE_CHECKING

from poweropd.rollouts import staleness_problem

if TYPE_CHECKING:
    from poweropd.config import Config


def of(config: "Config") -> list[tuple[bool, str]]:
    """Settings that cannot go together: whether they are there, and what the user is told."""
    objective, rollout, select = config.objective, config.rollout, config.objective.select
    full_vocab, truncated = objective.kind == "full_vocab", rollout.score == "truncated"
    stale = staleness_problem(rollout.staleness, rollout.engine)
    return [
        (
            full_vocab and config.reward.create().needs_statistics,
            "objective.kind: full_vocab needs a pointwise reward, got zscore",
        ),
        (
            full_vocab and objective.baseline != "none",
            "objective.baseline: value needs objective.kind=sampled; full_vocab has no "
            "sampling noise that a baseline could take away",
        ),
        (
            not full_vocab and objective.top_k is not None,
            f"objective.top_k: {objective.top_k} needs objective.kind=full_vocab; to sample "
            "from the most probable ids set rollout.top_k",
        ),
        (
            select is not None and select.name == "random" and select.beta != 1.0,
            "objective.select.beta: it belongs to dial, and random has none",
        ),
        (
            full_vocab and rollout.correction != "none",
            "rollout.correction: truncated needs objective.kind=sampled; full_vocab does not "
            "depend on how a token was sampled",
        ),
        (
            truncated and objective.stop == "cross",
            "rollout.score: truncated cannot go with objective.stop=cross, which scores the "
            "teacher on an id that may be outside the student's support",
        ),
        (
            truncated and rollout.temperature == 0,
            "rollout.score: truncated needs rollout.temperature > 0, for the support of "
            "greedy sampling is a single id",
        ),
        (stale is not None, stale or ""),
        *_of_teachers(config),
    ]


def _of_teachers(config: "Config") -> list[tuple[bool, str]]:
    needs, alone = config.needs_local_teacher, config.has_one_local_teacher
    return [
        (
            needs is not None and not alone,
            f"teacher: {needs} needs the teacher's hidden states, so a single "
            "teacher in this process (teacher.model without servers and by)",
        ),
        *(
            (
                needs is not None and alone and is_set,
                f"teacher.{key}: it cannot go with {needs}, which reads the teacher "
                "during the update",
            )
            for teacher in config.teachers.values()
            for key, is_set in teacher.scoring_only.items()
        ),
    ]
