"""How many bytes of tensors exist at once while a model is written."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mr1_fast.model import save as saving


@contextmanager
def most_bytes(monkeypatch) -> Iterator[list[int]]:
    """Watch the tensors that are made in this context, whenever a file of weights is written.

    The one number of the list that it yields is the most bytes of them that existed at once.
    """
    most, write = [0], saving.save_file
    gc.collect()
    before = living_bytes().keys()

    def watched(*args, **kwargs):
        new = {place: size for place, size in living_bytes().items() if place not in before}
        most[0] = max(most[0], sum(new.values()))
        return write(*args, **kwargs)

    monkeypatch.setattr(saving, "save_file", watched)
    gc.freeze()  # what exists by now is no longer among gc's objects
    try:
        yield most
    finally:
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # conftest.py's again


def living_bytes() -> dict[int, int]:
    """The bytes of the tensors that gc knows, by their places: what shares memory counts once."""
    # Not those of a compiler, without data, that a test before this one may have left.
    kinds = (torch.Tensor, torch.nn.Parameter)
    found = (each for each in gc.get_objects() if type(each) in kinds)
    return {tensor.data_ptr(): tensor.nbytes for tensor in found if tensor.device.type == "cpu"}
