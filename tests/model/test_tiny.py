"""The built-in models: their tokenizers, and what each sees of a drawn image."""

import hashlib

import pytest

from mr1_fast.model.families import FAMILIES
from mr1_fast.model.prompt import PromptWriter
from mr1_fast.model.tiny import BUILT_IN_MODELS, tiny_processor
from mr1_fast.profiles import BUILT_IN, BUILT_IN_TEXT
from mr1_fast.tasks import get_task


def test_the_names_are_those_of_the_settings():
    assert tuple(BUILT_IN_MODELS) == BUILT_IN
    without = [name for name, model in BUILT_IN_MODELS.items() if model.family.vision is None]
    assert tuple(without) == BUILT_IN_TEXT
    families = {model.family.model_type for model in BUILT_IN_MODELS.values()}
    assert families == FAMILIES.keys() - {"qwen2"}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in BUILT_IN_TEXT])
def test_the_tokenizer_of_models_with_images_stays_as_it_is(name):
    # Supervised starts, and the figures that are recorded of them, depend on every token.
    text = tiny_processor(name).tokenizer.backend_tokenizer.to_str()
    assert hashlib.sha256(text.encode()).hexdigest().startswith("0328027ed64e9caa")


def test_the_tokenizer_of_text_has_the_words_of_arithmetic_alone():
    tokens = tiny_processor("tiny-text").tokenizer.get_vocab()
    assert {"What", "Ġis", "ĠÃĹ"} <= tokens.keys() and "Ġimage" not in tokens


@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2_5vl", "tiny-qwen3vl"])
@pytest.mark.parametrize("difficulty", [1, 2])
def test_each_cell_of_counting_is_one_image_token(name, difficulty):
    image = get_task("counting").draw("train", 0, 0, difficulty).images[0]
    assert PromptWriter(tiny_processor(name)).sizes.num_tokens(image.size) == (difficulty + 2) ** 2
