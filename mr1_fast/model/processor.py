"""Processors of images and text, and of text alone, and their files."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from ..hub import model_folder
from .families import FAMILIES

PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", "additional_chat_templates/*"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "generation_config.json"),
)
"""Patterns of a model's files, its weights and config.json apart: whichever of them it has."""


class ImageTextProcessor(Qwen2VLProcessor):
    """Tokenizer, chat template and PIL image processor of a model that reads images.

    It is right for Qwen3-VL, too, whose own processor differs from Qwen2-VL's in videos alone: its
    patches and limits are settings of the same image processor.

    The same code prepares images with and without torchvision, so both give the same pixels. It is
    never named in a file: what it saves is for transformers' own processor, and loads as either.
    """

    source: str | None = None
    """Folder of the files that it was loaded from."""

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
        tokenizer = _load_tokenizer(name)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name, trust_remote_code=False)
        processor = cls(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        # Older repositories keep the chat template in a file of its own.
        if processor.chat_template is None:
            processor.chat_template = cls.get_processor_dict(name)[0].get("chat_template")
        processor.source = str(model_folder(str(name), PROCESSOR_FILES))
        return processor

    def save_pretrained(self, folder: str | Path, family: str) -> None:
        """Write the files of transformers' own processor of a family, as its models on the hub have
        them: tokenizer, chat template, and preprocessor_config.json."""
        stock = FAMILIES[family].vision.processor
        self.tokenizer._set_processor_class(stock)
        self.tokenizer.save_pretrained(folder)
        values = {**self.image_processor.to_dict(), "processor_class": stock}
        text = json.dumps(values, indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(text + "\n")


class TextProcessor:
    """Tokenizer and chat template of a model of text alone; it is used as ImageTextProcessor is."""

    image_processor = image_token = image_token_id = video_token = video_token_id = None
    source: str | None = None
    """Folder of the files that it was loaded from."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, name: str | Path) -> "TextProcessor":
        """Load from a local folder or a hub name; raises OSError if it is neither."""
        processor = cls(_load_tokenizer(name))
        processor.source = str(model_folder(str(name), PROCESSOR_FILES))
        return processor

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that writes messages."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, messages: list[dict], **arguments) -> str:
        """Write messages whose contents are lists of parts, which are texts; without a gap."""
        joined = [
            {**message, "content": "".join(part["text"] for part in message["content"])}
            for message in messages
        ]
        return self.tokenizer.apply_chat_template(joined, **arguments)

    def save_pretrained(self, folder: str | Path, family: str) -> None:
        """Write the tokenizer's files and the chat template."""
        self.tokenizer.save_pretrained(folder)


Processor = ImageTextProcessor | TextProcessor
"""What turns text and images into a model's inputs."""


def load_processor(name: str | Path, family: str) -> Processor:
    """Load the processor of a model of a family; raises OSError if there is none of that name."""
    has_images = FAMILIES[family].vision is not None
    return (ImageTextProcessor if has_images else TextProcessor).load(name)


def _load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer; code that its folder brings along is neither run nor asked about."""
    return AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)


def save_source(processor: Processor, folder: Path, family: str) -> None:
    """Write the files that a processor was loaded from, byte for byte, where there are any.

    Files of earlier versions of this package name a class that only it has; in their place, and
    for a processor made in memory, the files of `save_pretrained` are written.
    """
    source = processor.source
    if source is None or _names_own_class(Path(source)):
        processor.save_pretrained(folder, family)
        return
    for pattern in PROCESSOR_FILES:
        for path in Path(source).glob(pattern):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _names_own_class(folder: Path) -> bool:
    """Whether the files are those of a version of this package that wrote its own class's name."""
    files = (folder / name for name in ("processor_config.json", "tokenizer_config.json"))
    found = (json.loads(file.read_text("utf-8")) for file in files if file.is_file())
    return any(each.get("processor_class") == ImageTextProcessor.__name__ for each in found)
