"""The paper's data in the layouts in which it is published: two test sets, and three training sets of the Hub."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples
from mr1_fast.tasks.paper_sets import TEST_SETS

from ..data.pictures import colour, contents, encoded, picture, write_lines

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name, size, first", [("superclevr200", 200, "4"), ("geoqa", 754, "140°")])
def test_the_papers_test_sets_keep_every_record(name, size, first, tmp_path):
    listed = SHARED / TEST_SETS[name]
    if not listed.exists():
        pytest.skip(f"{listed} is not here")
    shutil.copy(listed, tmp_path)
    records = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    for index, record in enumerate(records[:3]):
        path = tmp_path / record["image_path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    for examples in (
        load_examples("counting", name, "test", 0, image_root=str(tmp_path)),
        load_examples("counting", str(listed), "test", 0, image_root=str(tmp_path)),
        load_examples("counting", str(tmp_path / listed.name), "test", 0),
    ):
        assert len(examples) == size
        for index, example in enumerate(examples.all(3)):
            assert (
                example.key == records[index]["image_path"]
                and example.problem == records[index]["question"]
            )
            assert example.solution == str(records[index]["ground_truth"])
            assert example.images[0].getpixel((0, 0)) == colour(index)
        assert examples.all(1)[0].solution == first
        with pytest.raises(
            UserError, match=r"image file .*png \(row 4 of .*\) is missing.*image_root"
        ):
            examples.all(4)
    for row in records:  # every record, with one image for all
        row["image_path"] = records[0]["image_path"]
    everything = load_examples(
        "counting", write_lines(tmp_path / "all.jsonl", records), "test", 0
    ).all(size)
    assert [example.solution for example in everything] == [
        str(row["ground_truth"]) for row in records
    ]


UNPACKED = {
    "a clone of R1-V": ("superclevr200", "", "prompts", "images"),
    "SuperCLEVR's archive": ("superclevr200", "", "", "images"),
    "SuperCLEVR's images": ("superclevr200", "images", "images", ""),
    "SuperCLEVR's images elsewhere": ("superclevr200", "images", "prompts", ""),
    "a clone of R1-V with Geo170K": ("geoqa", "", "prompts", "Geo170K/images/test"),
    "Geo170K's archive": ("geoqa", "geo", "geo", "images/test"),
    "Geo170K's archive elsewhere": ("geoqa", "geo", "prompts", "images/test"),
}


@pytest.mark.parametrize("name, root, list_in, images_in", UNPACKED.values(), ids=UNPACKED)
def test_image_root_may_be_what_the_archive_of_a_test_set_unpacks_to(
    name, root, list_in, images_in, tmp_path
):
    listed, root = tmp_path / list_in / TEST_SETS[name], tmp_path / root
    for folder in (listed.parent, root / images_in):
        folder.mkdir(parents=True, exist_ok=True)
    if name == "geoqa":
        paths = [f"./Geo170K/images/test/{index}.png" for index in range(3)]
    else:
        paths = [f"./images/superCLEVR_new_02500{index}.png" for index in range(3)]
    write_lines(
        listed, [{"image_path": path, "question": "?", "ground_truth": 4} for path in paths]
    )
    for index, path in enumerate(paths[:2]):
        picture(index).save(root / images_in / Path(path).name)
    source = name if listed.parent in (root, root / "prompts") else str(listed)
    examples = load_examples("counting", source, "test", 0, image_root=str(root))
    assert [(item.key, item.images[0].getpixel((0, 0))) for item in examples.all(2)] == [
        (paths[0], colour(0)),
        (paths[1], colour(1)),
    ]
    missing = root / images_in / Path(paths[2]).name
    with pytest.raises(
        UserError,
        match=rf"image file {missing} \(row 3 of .*\) is missing.*folder that holds {paths[2]}",
    ):
        examples.all(3)


def test_only_the_first_folder_of_a_test_set_is_left_out(tmp_path):
    """Another folder's `0.png` is another image."""
    picture(0).save(tmp_path / "0.png")
    write_lines(
        tmp_path / "test.jsonl",
        [{"image_path": "Geo170K/0.png", "question": "?", "ground_truth": 4}],
    )
    with pytest.raises(UserError, match=f"image file {tmp_path}/Geo170K/0.png .* is missing"):
        load_examples("geometry", str(tmp_path / "test.jsonl"), "test", 0).all(1)
    write_lines(
        tmp_path / TEST_SETS["geoqa"],
        [{"image_path": "other/0.png", "question": "?", "ground_truth": 4}],
    )
    with pytest.raises(UserError, match=f"image file {tmp_path}/other/0.png .* is missing"):
        load_examples("geometry", "geoqa", "test", 0, image_root=str(tmp_path)).all(1)


# The paper's training sets, as `push_to_hub` laid them out on the Hub and `hf download` leaves them.

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
    """The data set `name` with `size` rows: by `--local-dir`, or links to blobs as in the Hub's own cache."""
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
        f"---\ndataset_info:\n  features:\n{described}  splits:\n  - name: train\n    num_bytes: 9999.0\n"
        f"    num_examples: {size}\n  download_size: 9999\n  dataset_size: 9999.0\nconfigs:\n- config_name: default\n"
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
