"""The paper's claim, tested: from the cells of experiments to every number of the documentation."""
