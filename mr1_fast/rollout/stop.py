"""Texts that end a completion."""

from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=2)
def pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token by itself, which takes a large vocabulary some tenths of a second."""
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


class StopTexts:
    """Finds the first token with which a completion contains one of `texts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]):
        self.tokenizer, self.texts = tokenizer, texts
        # Only a token in which a text may end needs a look at what stands before it. A token may hold a part of a
        # character's bytes, which decodes to "\ufffd".
        lasts = {text[-1] for text in texts}
        known = pieces(tokenizer) if texts else []
        self.endings = {
            i for i, piece in enumerate(known) if lasts & set(piece) or "\ufffd" in piece
        }
        self.window = 4 * max((len(text.encode()) for text in texts), default=0)
        """Tokens that surely hold the longest text: one has a byte at least, but for a few that decode to nothing."""

    def ends(self, tokens: np.ndarray) -> bool:
        """Whether the last of `tokens` completes one of the texts."""
        if not self.texts or int(tokens[-1]) not in self.endings:
            return False
        tail = self.tokenizer.decode(tokens[-self.window :])
        return any(text in tail for text in self.texts)
