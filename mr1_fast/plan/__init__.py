"""The memory plan: will a run fit on a card, and what to change where it does not."""
