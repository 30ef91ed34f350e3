"""The text of a prompt as the chat template writes it, and its token ids.

Only the chat template writes control tokens such as `<|im_end|>` or `<|image_pad|>`. Where a user's
text has the same characters, they are text: while the chat template runs, a mark that no data can
guess stands for them, so that its own control tokens are told from theirs.
"""

import re
from functools import cached_property
from uuid import uuid4

from tokenizers import AddedToken, Tokenizer

from .processor import Processor

_MARK = f"\ue000{uuid4().hex}"
"""What the marks begin with; it differs from process to process and is never seen by a model."""
_TAG = re.compile(r"</?\w+>")
_ROLE = re.compile(r"^(\s*\w+(:|\n|$))?\s*")
"""The name of who speaks, which is no part of what is said: `assistant` and a line break."""


class PromptText:
    """Writes messages with a model's chat template, and turns the result into token ids.

    Its methods may be called from several threads.
    """

    def __init__(self, processor: Processor):
        tokenizer = processor.tokenizer
        self.processor = processor
        vision = {processor.image_token, processor.video_token} - {None}
        special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special} | vision
        self.control_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
        self.marks = {token: f"{_MARK}-{i}\ue001" for i, token in enumerate(sorted(special))}
        # The longest comes first: one token may begin with another.
        longest_first = sorted(special, key=len, reverse=True)
        self.control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

        self.literal = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        """A copy of the tokenizer that reads control tokens as the characters they consist of."""
        self.literal.no_padding()
        self.literal.no_truncation()
        self.literal.add_special_tokens([AddedToken(t, normalized=False) for t in vision])
        self.literal.encode_special_tokens = True

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text in which nothing is a control token."""
        return self.literal.encode(text, add_special_tokens=False).ids

    def written(self, messages: list[dict]) -> str:
        """Return the prompt up to where the assistant answers, with marks in the users' texts."""
        hidden = [
            {**message, "content": [self._hidden(part) for part in message["content"]]}
            for message in messages
        ]
        return self.processor.apply_chat_template(
            hidden, tokenize=False, add_generation_prompt=True
        )

    @cached_property
    def opening(self) -> str:
        """What the template writes of every answer itself, such as `<think>` and a line break.

        It follows the last control token of a prompt and the name of the role; "" where the
        template writes no control token before an answer. Here, other tokens that were added to the
        tokenizer are control tokens, too, unless they are tags: some models have such for roles.
        """
        question = f"{_MARK}-question\ue001"
        content = [{"type": "text", "text": question}]
        written = self.written([{"role": "user", "content": content}])
        rest = written.rpartition(question)[2]
        added = map(str, self.processor.tokenizer.added_tokens_decoder.values())
        ends = [
            rest.rindex(token) + len(token)
            for token in {*self.marks, *added}
            if token in rest and not _TAG.fullmatch(token)
        ]
        return _ROLE.sub("", rest[max(ends) :]) if ends else ""

    def shown(self, written: str) -> str:
        """Return a written prompt with the characters for which its marks stand."""
        if _MARK in written:
            for token, mark in self.marks.items():
                written = written.replace(mark, token)
        return written

    def ids(self, written: str, image_tokens: list[int]) -> list[int]:
        """Return the token ids of a written prompt, in which image i has image_tokens[i] tokens.

        Raises ValueError where the prompt has another number of images.
        """
        ids: list[int] = []
        counts = iter(image_tokens)
        pieces = self.control.split(written)
        images = pieces[1::2].count(self.processor.image_token)
        if images != len(image_tokens):
            raise ValueError(f"the chat template wrote {images} images, not {len(image_tokens)}")
        for index, piece in enumerate(pieces):
            if index % 2 == 0:
                ids += self.text_ids(self.shown(piece)) if piece else []
            else:
                repeats = next(counts) if piece == self.processor.image_token else 1
                ids += [self.control_ids[piece]] * repeats
        return ids

    def _hidden(self, part: dict) -> dict:
        """Return a part of a message with marks for the control tokens in its text."""
        if part["type"] != "text":
            return part
        return {**part, "text": self.control.sub(lambda m: self.marks[m[0]], part["text"])}
