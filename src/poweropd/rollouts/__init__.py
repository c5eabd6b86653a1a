"""Rollout engines sample the student's completions. Their table is here, free of heavy imports."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineFacts:
    """What is known of an engine before its module is imported."""

    engine: str  # "module:class", whose `build` makes an engine for a run
    concurrent: bool = False  # it may sample while the student is trained
    checked: bool = False  # its rollouts come from outside this process and are checked
    verified: bool = False  # its weights are a copy, which is compared with the student
    renumbered: bool = False  # it knows the ids that the models share alone, without gaps


ENGINES = {
    "transformers": EngineFacts("poweropd.rollouts.transformers:TransformersEngine"),
    "vllm": EngineFacts("poweropd.rollouts.vllm:VllmEngine", verified=True, renumbered=True),
    "vllm_server": EngineFacts(
        "poweropd.rollouts.vllm_server:VllmServerEngine",
        concurrent=True,
        checked=True,
        verified=True,
        renumbered=True,
    ),
}


#: Value of `rollout.staleness` -> when a step's completions are sampled, as "module:class".
SCHEDULES = {
    0: "poweropd.rollouts.prefetch:OnTime",
    **dict.fromkeys(range(1, 5), "poweropd.rollouts.prefetch:Ahead"),
}


def staleness_problem(staleness: int, engine: str, concurrent: bool | None = None) -> str | None:
    """Returns why an engine cannot sample `staleness` steps ahead; None if it can.

    `concurrent` is what the engine says of itself. Without it `ENGINES` says it, and a user's own
    engine may pass until it is built.
    """
    if concurrent is None:
        concurrent = engine not in ENGINES or ENGINES[engine].concurrent
    if not staleness or concurrent:
        return None
    return (
        f"rollout.staleness: {staleness} needs an engine that samples while the student is "
        f"trained, such as vllm_server; {engine} does not"
    )
