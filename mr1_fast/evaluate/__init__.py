"""The command `python -m mr1_fast.evaluate`, and the evaluations before and after a training run."""
