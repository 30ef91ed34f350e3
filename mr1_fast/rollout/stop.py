"""Texts that end a completion."""

from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=2)
def pieces(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode each token by itself; with a large vocabulary, this takes some tenths of a second."""
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


class StopTexts:
    """Finds the first token with which a completion contains one of `texts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str]):
        self.tokenizer, self.texts = tokenizer, texts
        lasts = {text[-1] for text in texts}
        known = pieces(tokenizer) if texts else []
        self.endings = {
            i for i, piece in enumerate(known) if lasts & set(piece) or "\ufffd" in piece
        }
        """Tokens in which a text may end; only with these, the tokens before need to be decoded.

        A token with a part of a character's bytes decodes to "\ufffd", and may end in any
        character.
        """
        self.window = 4 * max((len(text.encode()) for text in texts), default=0)
        """Last tokens that surely hold the longest text: nearly every token has a byte at least."""

    def ends(self, tokens: np.ndarray) -> bool:
        """Tell whether the last of `tokens` completes one of the texts."""
        if not self.texts or int(tokens[-1]) not in self.endings:
            return False
        tail = self.tokenizer.decode(tokens[-self.window :])
        return any(text in tail for text in self.texts)
