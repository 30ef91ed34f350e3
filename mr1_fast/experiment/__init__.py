"""The paper's comparison and its ablations, from one command to one report."""
