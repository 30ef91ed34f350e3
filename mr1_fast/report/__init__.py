"""The HTML page about a training run, and what it shares with the report of an experiment."""
