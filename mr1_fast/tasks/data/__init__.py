"""Where examples come from: drawn by a task, or loaded from data as people have it.

There is one class for each source, and both have the same methods. What `take` returns depends on
the arguments alone. So a run that resumes at step n asks for step n, and needs no saved state.
"""

from .drawn import DrawnExamples
from .examples import configured_examples, load_examples
from .loaded import LoadedExamples
from .options import DataOptions
from .paper_sets import TEST_SETS

__all__ = [
    "TEST_SETS",
    "DataOptions",
    "DrawnExamples",
    "LoadedExamples",
    "configured_examples",
    "load_examples",
]
