"""Files and folders of rows: which split they hold, and the paper's training sets as downloaded."""

import datasets
import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples

from ...data.pictures import (
    ROW,
    colour,
    contents,
    encoded,
    picture,
    table,
    write_lines,
)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_folder_with_a_split_each(form, tmp_path):
    for name, size in (("train", 3), ("my_test2", 2)):
        path = tmp_path / f"{name}.{form}"
        table(size).to_parquet(path) if form == "parquet" else write_lines(path, [ROW] * size)
    assert [
        len(load_examples("counting", str(tmp_path), split, 0)) for split in ("train", "test")
    ] == [3, 2]
    with pytest.raises(UserError, match="for validation"):
        load_examples("counting", str(tmp_path), "validation", 0)


# The paper's training sets, as `push_to_hub` laid them out and as `hf download` leaves them.

TRAINING_SETS = {
    "leonardPKU/clevr_cogen_a_train": (
        ("image", "problem", "solution"),
        [
            "CLEVR_trainA_00000{}_{}.png",
            "How many items are there in the image?",
            "<answer> {} </answer>",
        ],
    ),
    "MMInstruction/Clevr_CoGenT_TrainA_R1": (
        ("image", "thinking", "problem", "solution"),
        [
            "CLEVR_trainA_00000{}_{}.png",
            "<think>\nA red cube.\n\nSo there are {}.\n</think>",
            "What number of items are there?",
            "<answer> {} </answer>",
        ],
    ),
    "leonardPKU/GEOQA_R1V_Train_8K": (
        ("image", "problem", "solution"),
        [
            None,
            "As shown in the figure, angle 1 = {}.0, then angle 2 is equal to ()",
            "<answer> {}° </answer>",
        ],
    ),
}


def downloaded(folder, name, in_cache, size=5, shards=2):
    """Write the data set `name` with `size` rows, as `--local-dir` or the Hub's cache lays it out.

    In the cache, files are links to blobs.
    """
    columns, (file_name, *texts) = TRAINING_SETS[name]
    features = {
        column: datasets.Image() if column == "image" else datasets.Value("string")
        for column in columns
    }
    rows = [
        {
            "image": {
                "bytes": encoded(picture(index)),
                "path": file_name and file_name.format(index, index),
            }
        }
        | {column: text.format(index) for column, text in zip(columns[1:], texts, strict=True)}
        for index in range(size)
    ]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    for path in (folder / "data", folder / "blobs"):
        path.mkdir(parents=True)
    for shard in range(shards):
        path = folder / "data" / f"train-{shard:05}-of-{shards:05}.parquet"
        made.shard(shards, shard).to_parquet(path)
        if in_cache:
            path.rename(folder / "blobs" / f"{shard}a0")
            path.symlink_to(f"../blobs/{shard}a0")
    described = "".join(
        f"  - name: {column}\n    dtype: {'image' if column == 'image' else 'string'}\n"
        for column in columns
    )
    (folder / "README.md").write_text(
        f"---\ndataset_info:\n  features:\n{described}  splits:\n  - name: train\n"
        "    num_bytes: 9999.0\n"
        f"    num_examples: {size}\n  download_size: 9999\n  dataset_size: 9999.0\n"
        "configs:\n- config_name: default\n"
        "  data_files:\n  - split: train\n    path: data/train-*\n---\n"
    )
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")
    if not in_cache:
        notes = folder / ".cache" / "huggingface" / "download" / "data"
        notes.mkdir(parents=True)
        (notes / f"train-00000-of-{shards:05}.parquet.metadata").write_text(
            "commit\netag\n1738800000.0\n"
        )
    return folder


@pytest.mark.parametrize("in_cache", [False, True], ids=["local-dir", "cache"])
@pytest.mark.parametrize("name", TRAINING_SETS)
def test_the_papers_training_sets_as_downloaded(name, in_cache, tmp_path):
    folder = downloaded(tmp_path / "set", name, in_cache)
    examples = load_examples("counting", str(folder), "train", 0)
    columns, (file_name, *texts) = TRAINING_SETS[name]
    assert len(examples) == 5
    for index, example in enumerate(examples.all(9)):
        assert example.problem == texts[-2].format(index)
        assert example.solution == (f"{index}°" if "GEOQA" in name else f"{index}")
        assert example.thinking == (
            f"A red cube.\n\nSo there are {index}." if "thinking" in columns else ""
        )
        assert example.key == (file_name.format(index, index) if file_name else f"row {index + 1}")
        assert [(image.mode, image.getpixel((3, 3))) for image in example.images] == [
            ("RGB", colour(index))
        ]
    if "thinking" in columns:
        examples.require_thinking()
    else:
        with pytest.raises(
            UserError, match=r"no column 'thinking' \(found: image, problem, solution\)"
        ):
            examples.require_thinking()
    shard = load_examples(
        "counting", str(folder / "data" / "train-00001-of-00002.parquet"), "train", 0
    )
    assert contents(shard.all(9)) == [
        (*item[:-1], item[-1] if file_name else f"row {row}")
        for row, item in enumerate(contents(examples.all(9))[3:], 1)
    ]
    with pytest.raises(UserError, match="has only the split train: for test, pass other data"):
        load_examples("counting", str(folder), "test", 0)


def test_a_download_that_lacks_a_shard_is_told(tmp_path):
    folder = downloaded(tmp_path / "set", "leonardPKU/clevr_cogen_a_train", in_cache=False)
    (folder / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(
        UserError,
        match=r"set does not hold the rows that its README.md counts: download the rest, or",
    ):
        load_examples("counting", str(folder), "train", 0)
