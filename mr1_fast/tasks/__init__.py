"""Tasks: what is asked, how it is drawn or loaded, and when an output counts as right. One file per task."""
