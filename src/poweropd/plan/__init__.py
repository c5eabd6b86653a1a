"""The plan of a run before any weight is loaded: checks, FLOPs, memory, time, GPU-hours."""
