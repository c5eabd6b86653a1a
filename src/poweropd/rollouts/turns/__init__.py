"""Completions of several turns: tools and environments that answer the student.

The table of the forms in which models write tool calls is here, free of heavy imports.
"""

#: Value of `rollout.tool_format` -> the function that reads calls in it, as "module:function".
TOOL_FORMATS = {
    name: f"poweropd.rollouts.turns.calls:read_{name}"
    for name in ("hermes", "qwen3_coder", "llama3", "mistral", "deepseek")
}
AUTO_FORMAT = "auto"  # the one in which the chat template writes calls itself
