"""Qwen2-VL's processor without its video half, which needs torchvision."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin


class ImageTextProcessor(Qwen2VLProcessor):
    """Tokenizer, chat template and PIL image processor of the Qwen2-VL family.

    The same code prepares images with and without torchvision, so both give the same pixels.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def load(cls, name: str | Path) -> "ImageTextProcessor":
        """Load from a local folder or a hub name; raises OSError if it is neither."""
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)
        processor = cls(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        # Older repositories keep the chat template in a file of its own.
        if processor.chat_template is None:
            processor.chat_template = cls.get_processor_dict(name)[0].get("chat_template")
        return processor
