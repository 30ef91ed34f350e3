"""Segments of a few groups, and which tokens see which."""

import torch

from mr1_fast.packing import pack
from mr1_fast.segments import Segments
from mr1_fast.types import Prompt


def segments_of(groups: list[tuple[int, tuple[int, ...]]]) -> tuple[Segments, torch.Tensor]:
    """Make segments of groups, each given by its (prompt length, completion lengths).

    Returns them with a mask (T, T) bool of which token sees which, found by naming the tokens.
    """
    prompts = [
        Prompt(torch.zeros(n, dtype=torch.int64), torch.zeros(3, n, dtype=torch.int64), n)
        for n, _ in groups
    ]
    completions = [torch.zeros(n, dtype=torch.int64) for _, lengths in groups for n in lengths]
    segments = pack(prompts, completions, list(range(len(completions)))).segments
    names = []  # (group, completion or −1 for the prompt, position)
    for group, (length, lengths) in enumerate(groups):
        names += [(group, -1, i) for i in range(length)]
        names += [(group, c, length + i) for c, n in enumerate(lengths) for i in range(n - 1)]
    sees = [[q[0] == k[0] and k[1] in (-1, q[1]) and k[2] <= q[2] for k in names] for q in names]
    return segments, torch.tensor(sees)


SHAPES = {
    "groups of several lengths": [(3, (4, 1, 3)), (1, (2, 0, 6)), (5, (3, 3, 3))],
    "prompts alone": [(3, (1, 0, 1)), (4, (1, 1, 0))],
    "one of each": [(2, (5,))],
}
