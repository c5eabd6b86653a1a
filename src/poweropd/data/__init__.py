"""Prompts, completions, and their packing into micro-batches."""
