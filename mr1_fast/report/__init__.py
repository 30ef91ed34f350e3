"""The HTML page about a run: `python -m mr1_fast.report`."""
