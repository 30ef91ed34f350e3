"""The paper's comparison of methods, and its ablations: `python -m mr1_fast.experiment`."""
