"""Rollout engines: how the student samples completions."""
