"""PowerOPD's rewards inside other trainers: one small adapter for each.

`core` turns two models' log-probabilities into per-token advantages; `peers` knows each trainer's
versions and checks the functions that an adapter touches. Importing this imports no trainer.
"""
