"""The table of integers with which the host tells the device what a decode step computes."""

from typing import Generic, NamedTuple, TypeVar

MOST_SAMPLES = 256
"""Most samples that are decoded at once, where memory allows: rows of the largest table."""

T = TypeVar("T")


class Columns(NamedTuple, Generic[T]):
    """The columns of a table (R, 8) int32, in order; its row r is one running sample.

    On the device, `Columns(*table.unbind(1))` gives them their names.
    """

    token: T
    """The token to go on from, or −1 for the one drawn in row `source` of the step before."""
    source: T
    """The sample's row in the step before."""
    position: T
    """The token's position, the same in all three axes of M-RoPE."""
    prefix_start: T
    """Where the keys and values of the sample's prompt begin in the pool."""
    prefix_len: T
    """Tokens of the prompt."""
    own_start: T
    """Where the keys and values of the sample's own tokens begin in the pool."""
    own_len: T
    """Own tokens with keys and values after this step: all, up to the one to go on from."""
    span: T
    """The number of the sample's span; the number after the last one for a row without a sample."""


SPAN_COLUMNS = slice(Columns._fields.index("prefix_start"), Columns._fields.index("own_len") + 1)
"""The columns that attention takes: `spans` of kernels/decode."""
