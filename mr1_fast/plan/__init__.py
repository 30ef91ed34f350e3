"""The memory plan: will a run fit on a card, and what to change if it does not.

plan.py is read first. There is a file for each phase: rollout.py, reference.py and update.py, and
resident.py for what stays on the device between them. What layers allocate is not computed by
formulas: layers.py runs them without data and counts.
"""
