"""Rollout engines: how the student samples completions."""

#: Names of the engines; `factory.MAKERS` has what makes each.
ENGINES = ("transformers", "vllm", "vllm_server")
