"""Files and folders of rows: which split they hold, and the paper's training sets as downloaded."""

import json
import os
from itertools import pairwise

import datasets
import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import DataOptions, load_examples

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


def solutions(path, wanted="train", **options):
    options = DataOptions(**options)
    return [
        item.solution
        for item in load_examples("free", str(path), wanted, 0, options=options).all(99)
    ]


def text_row(solution):
    return {"problem": "?", "solution": solution}


MIXED = [text_row(value) for value in (3, "145°", 2.5, "B", "2020-01-02", "None")]


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv"])
def test_no_format_guesses_types(name, in_folder, tmp_path):
    if name.endswith("sv"):
        separator = "\t" if name.endswith("tsv") else ","
        lines = [list(MIXED[0])] + [list(map(str, row.values())) for row in MIXED]
        text = "".join(separator.join(line) + "\n" for line in lines)
    else:
        text = json.dumps(MIXED) if name.endswith("json") else "\n".join(map(json.dumps, MIXED))
    (tmp_path / name).write_text(text, encoding="utf-8")
    expected = ["3", "145°", "2.5", "B", "2020-01-02", "None"]
    assert solutions(tmp_path if in_folder else tmp_path / name) == expected


def test_a_single_file_is_taken_as_a_whole_whatever_its_name(tmp_path):
    for name in ("val.jsonl", "test.csv", "rows.json"):
        path = tmp_path / name
        path.write_text("problem,solution\n?,1\n" if "csv" in name else json.dumps(text_row("1")))
        for split in ("train", "validation", "test"):
            assert solutions(path, split) == ["1"]
        assert solutions(path, "test", held_out=True) == ["1"]
        with pytest.raises(UserError, match=f"{name} has only the split .*: for test, pass other"):
            solutions(path, "test", held_out=True, trained="train")


FOLDERS = {
    "train and val": (["train.jsonl", "val.jsonl"], {"train": 0, "validation": 1, "test": None}),
    "no word is train": (["rows.json", "my_eval.json"], {"train": 0, "test": 1}),
    "words of the Hub": (["training.csv", "dev.csv"], {"train": 0, "validation": 1}),
    "of two formats": (["train.jsonl", "test.csv"], {"train": 0, "test": 1}),
    "in folders": (["train/a.jsonl", "dev/a.jsonl"], {"train": 0, "validation": 1}),
    "below data": (["data/train.csv", "data/test.csv"], {"train": 0, "test": 1}),
    "beside descriptions": (
        ["data/train.csv", "data/test.csv", "dataset_infos.json", ".cache/train.json"],
        {"train": 0, "test": 1},
    ),
}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        lines = ["problem,solution", *(f"{row['problem']},{row['solution']}" for row in rows)]
        path.write_text("\n".join(lines))
    else:
        write_lines(path, rows)


@pytest.mark.parametrize("names, splits", FOLDERS.values(), ids=FOLDERS)
def test_files_of_a_folder_belong_to_the_split_that_their_names_mention(names, splits, tmp_path):
    for index, name in enumerate(names):
        write_rows(tmp_path / name, [text_row(index)])
    for split, index in splits.items():
        if index is not None:
            assert solutions(tmp_path, split) == [str(index)]
            continue
        with pytest.raises(UserError, match=f"has only the splits train, validation: for {split}"):
            solutions(tmp_path, split)


def test_shards_are_read_together_but_not_other_files_of_a_split(tmp_path):
    for index in range(2):
        write_lines(tmp_path / f"train-0000{index}-of-00002.jsonl", [text_row(index)])
    assert solutions(tmp_path) == ["0", "1"]
    write_lines(tmp_path / "train_small.jsonl", [text_row(2)])
    with pytest.raises(
        UserError, match=r"holds train-.*, train_small.jsonl, not exactly one for tr"
    ):
        solutions(tmp_path)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
@pytest.mark.parametrize("folders", [[""], ["train/", "test/"]], ids=["flat", "by split"])
def test_an_imagefolder(folders, form, tmp_path):
    for index, folder in enumerate(folders):
        (tmp_path / folder / "images").mkdir(parents=True)
        picture(index).save(tmp_path / folder / "images" / "0.png")
        row = text_row("007") | {"file_name": "images/0.png"}
        text = json.dumps(row)
        if form == "csv":
            text = ",".join(row) + "\n" + ",".join(row.values())
        (tmp_path / folder / f"metadata.{form}").write_text(text)
    for index, split in enumerate(("train", "test")[: len(folders)]):
        (item,) = load_examples("free", str(tmp_path), split, 0).all(9)
        assert item.images[0].getpixel((0, 0)) == colour(index) and item.solution == "007"


def test_saved_splits(tmp_path):
    made = {"train": table(3), "testmini": table(2), "val": table(1)}
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "all"))
    assert len(solutions(tmp_path / "all")) == 3
    assert len(solutions(tmp_path / "all", split="testmini")) == 2
    assert len(solutions(tmp_path / "all", "test", held_out=True, trained="train")) == 1
    with pytest.raises(UserError, match=r"splits train, testmini, val: for test, .*--eval-split"):
        solutions(tmp_path / "all", "test")
    made["val"].save_to_disk(str(tmp_path / "one"))
    assert len(solutions(tmp_path / "one", "test", held_out=True)) == 1
    with pytest.raises(UserError, match="one has only the split train: for test"):
        solutions(tmp_path / "one", "test", held_out=True, trained="train")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state.json is damaged \(.*\): save the data set again"):
        solutions(tmp_path / "one")


def test_a_split_with_a_name_of_its_own(tmp_path):
    (tmp_path / "data").mkdir()
    for name, size in (("testmini", 2), ("test", 4)):
        table(size).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"has only the splits .*testmini.*: for train.*--data-split"
    ):
        solutions(tmp_path)
    assert len(solutions(tmp_path, "testmini")) == 2
    options = DataOptions(split="testmini")
    assert len(load_examples("free", str(tmp_path), "train", 0, options=options)) == 2


def with_configurations(folder, suffix):
    """A data set with two configurations, one of which has two files."""
    for index, name in enumerate(("easy_a", "easy_b", "hard")):
        rows = datasets.Dataset.from_list([text_row(f"00{index}")])
        if suffix == "parquet":
            rows.to_parquet(folder / f"{name}.parquet")
        else:
            write_rows(folder / f"{name}.{suffix}", rows.to_list())
    files = {"easy": [f"easy_a.{suffix}", f"easy_b.{suffix}"], "hard": [f"hard.{suffix}"]}
    described = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: dev\n    path:\n"
        + "".join(f"    - {path}\n" for path in paths)
        for name, paths in files.items()
    )
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:\n{described}---\n# Data\n")
    return folder


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_configurations(suffix, tmp_path):
    folder = with_configurations(tmp_path, suffix)
    for config, expected in (("easy", ["000", "001"]), ("hard", ["002"])):
        assert solutions(folder, config=config, split="dev") == expected
        assert solutions(folder, "validation", config=config) == expected
    with pytest.raises(UserError, match="has several configurations: name one of easy, hard with"):
        solutions(folder)
    with pytest.raises(
        UserError, match="no such configuration: name one of easy, hard with --data-c"
    ):
        solutions(folder, config="soft")
    with pytest.raises(UserError, match=r"has only the split dev: for train, .*--data-split"):
        solutions(folder, config="easy")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_held_out_data_need_not_have_the_configuration_of_the_training_data(suffix, tmp_path):
    rows = datasets.Dataset.from_list([text_row("1")])
    if suffix == "parquet":
        rows.to_parquet(tmp_path / "test.parquet")
    else:
        write_lines(tmp_path / "test.jsonl", rows.to_list())
    assert solutions(tmp_path, "test", config="hard", held_out=True) == ["1"]
    with pytest.raises(UserError, match=r"configuration.* --data-config"):
        solutions(tmp_path, "test", config="hard")


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


@pytest.mark.parametrize("name", ["/" + "x" * 300 + ".jsonl", "~no-such-user/rows.jsonl"])
def test_a_path_that_cannot_be_is_missing(name):
    with pytest.raises(UserError, match=r"(rows|x)\.jsonl is missing"):
        load_examples("counting", name, "train", 0)


OUTSIDE = [
    "/etc/passwd",
    "../secret.jsonl",
    "a/../../secret.jsonl",
    "~/x.jsonl",
    "http://x/a.jsonl",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "configuration",
    [
        "data_files: {}",
        "data_files: [{}]",
        "data_files: [{{split: train, path: {}}}]",
        "data_dir: {}",
    ],
)
def test_a_readme_names_no_files_outside(name, configuration, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(tmp_path / "secret.jsonl", [ROW])
    write_lines(folder / "train.jsonl", [ROW])
    head = f"configs:\n- config_name: default\n  {configuration.format(name)}\n"
    (folder / "README.md").write_text(f"---\n{head}---\n")
    with pytest.raises(UserError, match=r"README.md names .*, which is outside its folder"):
        solutions(folder)


def test_a_readme_that_is_hard_to_read(tmp_path):
    write_lines(tmp_path / "train.jsonl", [text_row("3")])
    names = [chr(97 + level) for level in range(9)]
    bomb = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in pairwise(names))
    for head, message in (
        (f"a: &a [x]\n{bomb}configs: *i\n", "aliases without an end"),
        (f"a: &a [x]\n{bomb}dataset_info: *i\n", "aliases without an end"),
        ("configs: &a [*a]\n", "aliases without an end"),
        (f"configs: {'[' * 5000}\n", "is no YAML"),
        ("configs: !!python/object/apply:os.system [true]\n", "is no YAML"),
        ("configs: {a: b: c}\n", "is no YAML"),
    ):
        (tmp_path / "README.md").write_text(f"---\n{head}---\n")
        with pytest.raises(UserError, match=message) as raised:
            solutions(tmp_path)
        assert len(str(raised.value)) < 500
    with open(tmp_path / "README.md", "wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(UserError, match=r"README.md has more than 4,194,304 characters"):
        solutions(tmp_path)
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    assert len(solutions(tmp_path)) == 1
