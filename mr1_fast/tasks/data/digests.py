"""Identifying the content of rows, so that what has not changed is not checked again."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def digest_of(*values: Any) -> str:
    """Return 16 hexadecimal digits that depend on the values, of whatever kinds rows have.

    >>> digest_of({"a": [1, "x"]}) == digest_of({"a": [1, "x"]}) != digest_of({"a": ["1", "x"]})
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    left = [values]  # and no recursion, which data could make too deep
    while left:
        value = left.pop()
        digest.update(type(value).__name__.encode())
        parts = _parts(value)
        if parts is None:
            content = value if isinstance(value, bytes) else repr(value).encode(errors="replace")
            digest.update(b"%d " % len(content) + content)
        else:
            digest.update(b"%d " % len(parts))
            left += parts
    return digest.hexdigest()


def _parts(value: Any) -> Sequence | None:
    """Return what a container or an image consists of; None for any other value."""
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    return value if isinstance(value, (list, tuple)) else None
