"""Combinations of settings that are valid alone but not together."""

from poweropd.config import sections

#: Whether a combination is there, and what the user is told of it, with the key in front.
Rule = tuple[bool, str]


def needs_local_teacher(
    objective: sections.ObjectiveConfig, rollout: sections.RolloutConfig
) -> str | None:
    """Returns the setting that needs the teacher's hidden states, as "objective.kind=full_vocab".

    It is None if the teacher's log-probs of the sampled tokens are enough, which servers give too.
    """
    needs = {
        "objective.kind=full_vocab": objective.kind == "full_vocab",
        "objective.baseline=value": objective.baseline == "value",
        "objective.stop=semantic": objective.stop == "semantic",
        "rollout.score=truncated": rollout.truncates_scores,
    }
    return next((setting for setting, holds in needs.items() if holds), None)


def combinations(
    objective: sections.ObjectiveConfig,
    rollout: sections.RolloutConfig,
    reward: sections.RewardConfig,
    teacher: sections.AnyTeacher,
) -> list[Rule]:
    """Returns a rule for every combination that cannot be run."""
    select = objective.select
    full_vocab, truncated = objective.kind == "full_vocab", rollout.score == "truncated"
    return [
        (
            full_vocab and reward.create().needs_statistics,
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
        (
            rollout.staleness > 0 and rollout.engine in ("transformers", "vllm"),
            f"rollout.staleness: {rollout.staleness} needs an engine that samples while the "
            f"student is trained, such as vllm_server; {rollout.engine} does not",
        ),
        *_of_teacher(teacher, needs_local_teacher(objective, rollout)),
    ]


def _of_teacher(teacher: sections.AnyTeacher, need: str | None) -> list[Rule]:
    """Returns the rules for a teacher whose hidden states the setting `need` needs."""
    if need is None:
        return []
    # A teacher that reads along with the update has no scoring phase, which these two belong to.
    scoring_only = [
        (key, is_set)
        for one in teacher.by_domain.values()
        for key, is_set in (
            ("offload", one.offload),
            ("measure_quantization", one.measure_quantization),
        )
    ]
    return [
        (
            teacher.place != "in process",
            f"teacher: {need} needs the teacher's hidden states, so a single "
            "teacher in this process (teacher.model without servers and by)",
        ),
        *(
            (
                is_set,
                f"teacher.{key}: it cannot go with {need}, which reads the teacher "
                "during the update",
            )
            for key, is_set in scoring_only
        ),
    ]
