"""Encoded prompts of an experiment's items, which every cell of a process answers again.

A cell of the tiny scale spends a third of its evaluation on drawing patches of the same images, on
the same tokens and on their positions. Pixels are kept compressed, without loss: drawn images
become 40 times smaller, and are faster unpacked than cut into patches anew.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..model.families import base_model
from ..model.policy import Policy
from ..types import Example, Prompt

MOST_PIXELS = 1 << 20
"""Bytes of a prompt's patches, beyond which it is not kept: photos hardly become smaller."""
MOST_KEPT = 256 << 20
"""Bytes of all compressed patches, after which no further prompt is kept."""


class KeptPrompts:
    """The prompts that were encoded so far."""

    def __init__(self) -> None:
        self.prompts: dict[tuple[str, int], Packed] = {}
        """(what encodes, item) → its prompt."""
        self.size = 0

    def of(self, policy: Policy) -> Policy:
        """Return the policy with an encoder that takes prompts from here, and adds what is new."""
        return replace(policy, encode=KeepingEncoder(self, policy))


class KeepingEncoder:
    """Encodes examples as the policy's encoder does, each once."""

    def __init__(self, kept: KeptPrompts, policy: Policy):
        self.kept, self.encode, self.key = kept, policy.encode, _key(policy)

    def many(self, examples: Sequence[Example]) -> list[Prompt]:
        """Encode examples one after the other; the tensors are on the CPU."""
        return [self(example) for example in examples]

    def __call__(self, example: Example) -> Prompt:
        """Encode one example; the tensors are on the CPU."""
        key = self.key, id(example)
        if found := self.kept.prompts.get(key):
            return found.prompt()
        prompt = self.encode(example)
        if self.kept.size < MOST_KEPT and _is_small(prompt.pixel_values):
            self.kept.prompts[key] = packed = Packed.of(example, prompt)
            self.kept.size += len(packed.pixels)
        return prompt


class Packed(NamedTuple):
    """A prompt with compressed pixels, if it has any."""

    example: Example
    """What it was encoded from, whose id no other object gets meanwhile."""
    without_pixels: Prompt
    pixels: bytes
    shape: torch.Size | None

    @classmethod
    def of(cls, example: Example, prompt: Prompt) -> "Packed":
        """Compress the pixels of a prompt."""
        pixels = prompt.pixel_values
        if pixels is None:
            return cls(example, prompt, b"", None)
        packed = zlib.compress(pixels.contiguous().numpy().data, level=1)
        return cls(example, replace(prompt, pixel_values=None), packed, pixels.shape)

    def prompt(self) -> Prompt:
        """Return the prompt as it was."""
        if self.shape is None:
            return self.without_pixels
        values = bytearray(zlib.decompress(self.pixels))
        pixels = torch.frombuffer(values, dtype=torch.float32).view(self.shape)
        return replace(self.without_pixels, pixel_values=pixels)


def _is_small(pixels: torch.Tensor | None) -> bool:
    """Return whether the pixels of a prompt are worth compressing."""
    return pixels is None or (pixels.dtype == torch.float32 and pixels.nbytes <= MOST_PIXELS)


def _key(policy: Policy) -> str:
    """Return a hash of all that a prompt depends on besides its example."""
    encode, processor = policy.encode, policy.processor
    images = processor.image_processor
    parts = (
        base_model(policy.model).config.model_type,
        (encode.max_prompt_tokens, encode.max_pixels, encode.shrink_images, encode.prompt_format),
        processor.tokenizer.backend_tokenizer.to_str(),
        processor.chat_template,
        images and images.to_dict(),
    )
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()
