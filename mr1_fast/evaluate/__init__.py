"""The command `python -m mr1_fast.evaluate`, and the evaluations around a training run."""
