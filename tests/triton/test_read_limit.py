"""The kernel of the read limit reads every word once: it is a limit only if none is left out."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from read_triton import BLOCK, BLOCKS, read

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_every_word_is_read_also_in_a_part_of_the_last_block():
    size = 2 * BLOCK * BLOCKS + BLOCK + 7
    words = torch.randint(-(2**31), 2**31, (size,), dtype=torch.int32, device=DEVICE)
    parts = read(words).cpu().numpy()
    assert len(parts) == 3
    assert np.bitwise_xor.reduce(parts) == np.bitwise_xor.reduce(words.cpu().numpy())
