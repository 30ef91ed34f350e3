"""Examples from every source: repeatable by their arguments, complete, and with one clear sentence for every fault."""

import http.server
import json
import shutil
import threading
import time

import datasets
import huggingface_hub.constants
import pytest
from PIL import Image

from mr1_fast.errors import UserError
from mr1_fast.tasks import counting, geometry
from mr1_fast.tasks.data import DrawnExamples, LoadedExamples, load_examples

from ..data.pictures import colour, contents, encoded, picture, write_lines

ROW = {"image": "1.png", "problem": "?", "solution": "1"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def table(size=5, **columns):
    """A data set in R1-V's columns with embedded images."""
    rows = {
        "image": [{"bytes": encoded(picture(index)), "path": None} for index in range(size)],
        "problem": [f"How many? {index}" for index in range(size)],
        "solution": [f"<answer> {index} </answer>" for index in range(size)],
    }
    made = datasets.Dataset.from_dict(
        {name: cells for name, cells in (rows | columns).items() if cells is not None}
    )
    return made.cast_column("image", datasets.Image())


def folder_of_lines(folder, **columns):
    """A folder with three image files and a list of JSON lines that names them."""
    folder.mkdir()
    for index in range(3):
        picture(index).save(folder / f"{index}.png")
    write_lines(
        folder / "train.jsonl", [ROW | {"image": f"{index}.png"} | columns for index in range(3)]
    )
    return folder


@pytest.mark.parametrize("limit", [None, 7])
def test_drawn_examples_depend_on_the_arguments_alone(limit):
    first, second = (DrawnExamples(counting, "train", 5, limit=limit) for _ in range(2))
    first.take(0, 4), first.take(1, 4)
    assert contents(first.take(2, 4)) == contents(second.take(2, 4))
    assert contents(first.all(5)) == contents(second.all(5))
    assert contents(first.take(2, 4)) != contents(
        DrawnExamples(counting, "train", 6, limit=limit).take(2, 4)
    )
    assert contents(first.all(5)) != contents(
        DrawnExamples(counting, "test", 5, limit=limit).all(5)
    )


def test_drawn_steps_follow_each_other():
    examples = DrawnExamples(geometry, "train", 0, difficulty=2)
    assert contents(examples.take(0, 3) + examples.take(1, 3)) == contents(examples.all(6))
    with pytest.raises(TypeError, match="no length"):
        len(examples)


def test_limited_drawn_examples_come_once_per_epoch_in_a_new_order():
    examples = DrawnExamples(counting, "train", 0, limit=6)
    items = contents(examples.all(100))
    assert len(examples) == len(items) == 6
    epochs = [
        contents(examples.take(2 * epoch, 3) + examples.take(2 * epoch + 1, 3))
        for epoch in range(4)
    ]
    assert all(sorted(epoch) == sorted(items) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (
        contents(examples.take(0, 4) + examples.take(1, 4)) == epochs[0] + epochs[1][:2]
    )  # across two epochs


def test_load_examples_draws():
    examples = load_examples("geometry", "drawn", "test", 3, difficulty=2, limit=9)
    assert contents(examples.all(99)) == contents(DrawnExamples(geometry, "test", 3, 2, 9).all(9))
    examples.require_thinking()
    assert all(example.thinking for example in examples.all(9))


@pytest.mark.parametrize("form", ["file", "folder", "saved", "list"])
def test_embedded_images_load(form, tmp_path):
    rows, path = table(), tmp_path / "data"
    path.mkdir()
    if form == "list":
        rows = rows.map(lambda row: {"images": [row["image"]] * 2}, remove_columns="image")
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    rows.save_to_disk(str(path)) if form == "saved" else rows.to_parquet(path / "rows.parquet")
    examples = load_examples(
        "counting", str(path / "rows.parquet" if form == "file" else path), "train", 0
    )
    assert len(examples) == 5
    for index, example in enumerate(examples.all(9)):
        assert example.problem == f"How many? {index}" and example.solution == str(index)
        assert [image.mode for image in example.images] == ["RGB"] * (2 if form == "list" else 1)
        assert all(image.getpixel((3, 3)) == colour(index) for image in example.images)
    assert contents(examples.take(3, 4)) == contents(
        load_examples("counting", str(path), "train", 0).take(3, 4)
    )


def test_loaded_examples_come_once_per_epoch_in_a_new_order(tmp_path):
    table(10).to_parquet(tmp_path / "rows.parquet")
    examples = load_examples("counting", str(tmp_path), "train", 0, limit=8)
    epochs = [[example.solution for example in examples.take(step, 8)] for step in range(3)]
    assert all(sorted(epoch) == list("01234567") for epoch in epochs) and epochs[0] != epochs[1]
    other = load_examples("counting", str(tmp_path), "train", 1, limit=8)
    assert [[example.solution for example in other.take(step, 8)] for step in range(3)] != epochs


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


@pytest.mark.parametrize("as_folder", [True, False])
def test_json_lines_beside_image_files(as_folder, tmp_path):
    folder = folder_of_lines(
        tmp_path / "set", problem="<image>How many?", solution=3, thinking="<think> 1+2 </think>"
    )
    examples = load_examples(
        "counting", str(folder if as_folder else folder / "train.jsonl"), "train", 0
    )
    examples.require_thinking()
    second = examples.all(3)[1]
    assert (second.problem, second.solution, second.thinking) == ("How many?", "3", "1+2")
    assert second.key == "1.png" and second.images[0].getpixel((0, 0)) == colour(1)


def test_image_root_and_every_kind_of_cell(tmp_path):
    picture(1).save(tmp_path / "1.png")
    cells = [
        "1.png",
        encoded(picture(1)),
        {"bytes": encoded(picture(1)), "path": None},
        {"path": "1.png"},
        picture(1),
    ]
    rows = [ROW | {"image": cell} for cell in [*cells, cells, None]]
    examples = LoadedExamples(rows, "rows", 0, image_root=tmp_path).all(9)
    assert [len(example.images) for example in examples] == [1, 1, 1, 1, 1, 5, 0]
    assert {image.getpixel((5, 5)) for example in examples for image in example.images} == {
        colour(1)
    }


def test_transparency_turns_white_and_rotation_is_applied(tmp_path):
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    turned, exif = Image.new("RGB", (56, 28)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned.save(tmp_path / "turned.jpg", exif=exif)
    rows = [ROW | {"image": cell} for cell in (encoded(clear), str(tmp_path / "turned.jpg"))]
    first, second = LoadedExamples(rows, "rows", 0).all(2)
    assert first.images[0].getpixel((0, 0)) == (255, 255, 255)
    assert second.images[0].size == (28, 56)


def test_a_whole_number_that_a_table_made_a_fraction(tmp_path):
    table(2, solution=[3.0, 2.5]).to_parquet(tmp_path / "rows.parquet")
    assert [
        item.solution for item in load_examples("counting", str(tmp_path), "train", 0).all(2)
    ] == ["3", "2.5"]


def test_rows_in_the_columns_of_a_test_set_are_not_for_training(tmp_path):
    path = write_lines(
        tmp_path / "rows.jsonl", [{"image_path": None, "question": "?", "ground_truth": 4}]
    )
    assert load_examples("counting", path, "test", 0).all(1)[0].solution == "4"
    with pytest.raises(UserError, match="only the split test: for train, pass other data"):
        load_examples("counting", path, "train", 0)


def test_many_rows_are_not_decoded_before_they_are_taken():
    rows = [ROW | {"image": encoded(picture(2))}] + [ROW | {"image": "nowhere.png"}] * 69_999
    examples = LoadedExamples(rows, "rows", 0)
    assert len(examples) == 70_000 and len(examples.all(1)) == 1
    with pytest.raises(UserError, match=r"nowhere.png \(row 2 of rows\) is missing"):
        examples.all(2)


BROKEN = encoded(Image.effect_noise((64, 64), 50))[:900]
FAULTS = {
    "not JSON": ("rows.jsonl", b'{"a": 1}\n\n{"a": \n', "line 3 of .*rows.jsonl is not JSON"),
    "not text": ("rows.jsonl", b'{"a": 1}\n\xff\xfe\n', "line 2 of .*rows.jsonl is not JSON"),
    "not an object": ("rows.jsonl", b"[1, 2]\n", "line 1 of .*rows.jsonl is not a JSON object"),
    "empty list": ("rows.jsonl", b"", "rows.jsonl is empty: give data with at least one row"),
    "empty folder": (".", None, "set is empty: give a folder or file that holds rows"),
    "no rows": (
        "rows.parquet",
        table(0),
        "parquet is empty: give a folder or file that holds rows",
    ),
    "unknown format": (
        "rows.xlsx",
        b"?",
        "rows.xlsx has an unknown format: give one of .jsonl, .parquet",
    ),
    "broken table": ("rows.parquet", b"?", "rows.parquet could not be loaded"),
    "no such file": ("x.jsonl", None, "x.jsonl is missing: check the path"),
    "no image column": (
        "rows.jsonl",
        [{"img": "1.png"}],
        r"no column 'image' or .* \(found: img\): rename the column",
    ),
    "no solution": (
        "rows.parquet",
        table(solution=None),
        r"no column 'solution' or .* \(found: image, problem\)",
    ),
    "empty cell": (
        "rows.jsonl",
        [ROW | {"problem": None}],
        "row 1 of .* has no 'problem': fill it in",
    ),
    "missing image": (
        "rows.jsonl",
        [ROW],
        r"image file .*1.png \(row 1 of .*rows.jsonl\) is missing.*image_root",
    ),
    "number as image": (
        "rows.jsonl",
        [ROW | {"image": 7}],
        "the image in row 1 of .* cannot be decoded",
    ),
    "no content": (
        "rows.jsonl",
        [ROW | {"image": {}}],
        "the image in row 1 of .* is neither a path nor encoded",
    ),
    "broken image": (
        "rows.parquet",
        table(1, image=[{"bytes": BROKEN}]),
        "image in row 1 of .* cannot be decoded",
    ),
}


@pytest.mark.parametrize("name, content, message", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_in_one_sentence(name, content, message, tmp_path):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        write_lines(path, content)
    elif content is not None:
        content.to_parquet(path)
    with pytest.raises(UserError, match=message) as raised:
        load_examples("counting", str(path), "train", 0).all(1)
    assert "\n" not in str(raised.value)


def test_a_broken_image_file_is_named(tmp_path):
    folder = folder_of_lines(tmp_path / "set")
    (folder / "1.png").write_bytes(BROKEN)
    examples = load_examples("counting", str(folder), "train", 0)
    examples.all(1)
    with pytest.raises(UserError, match=r"image file .*1.png \(row 2 of .*\) cannot be decoded"):
        examples.all(2)


def test_supervised_training_needs_thinking(tmp_path):
    table().to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        UserError, match=r"no column 'thinking' \(found: image, problem, solution\): add it"
    ):
        load_examples("counting", str(tmp_path), "train", 0).require_thinking()
    table(thinking=["1", "2", " ", "4", "5"]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"row 3 of .* has no 'thinking'"):
        load_examples("counting", str(tmp_path), "train", 0).require_thinking()
    load_examples("counting", str(tmp_path), "train", 0, limit=2).require_thinking()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("chess", "drawn", "train", 0), "the known tasks are counting, geometry"),
        (("counting", "drawn", "val", 0), "'val', but the splits are train, validation, test"),
        (("counting", "drawn", "train", 0, 0), "difficulty is 0"),
        (("counting", "drawn", "train", 0, 1, 0), "limit is 0: set it to 1 or more"),
        (
            ("geometry", "geoqa", "test", 0),
            "needs image_root: the folder with geoqa_test_prompts.jsonl",
        ),
        (
            ("geometry", "geoqa", "test", 0, 1, None, "/nowhere"),
            "/nowhere/geoqa_test_prompts.jsonl is missing: put R1-V's list of geoqa there .from https://github.com/.*eval",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        load_examples(*arguments)


# The Hub. A server on this machine stands in for it, so that the tests hold with and without a network.


@pytest.fixture
def hub(request, monkeypatch):
    """A Hub that never answers ("silent"), or that answers as the real one does about a name it does not know."""
    done = threading.Event()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            done.wait(60 if request.param == "silent" else 0)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        log_message = print  # not on stderr

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}"
    )
    monkeypatch.setattr("mr1_fast.hub.HUB_TIMEOUT", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield
    done.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("hub", ["silent"], indirect=True)
def test_a_hub_out_of_reach_fails_soon_and_says_how_to_go_on(hub):
    start = time.perf_counter()
    with pytest.raises(
        UserError, match=r"owner/set is neither a local path nor in the local cache.*--local-dir"
    ):
        load_examples("counting", "owner/set", "train", 0)
    assert time.perf_counter() - start < 5
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("hub", ["silent"], indirect=True)
def test_a_hub_out_of_reach_leaves_the_cache(hub, tmp_path):
    table(4).to_parquet(tmp_path / "rows.parquet")
    datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "made")
    )
    info = next((tmp_path / "made").rglob("dataset_info.json"))
    target = datasets.config.HF_DATASETS_CACHE / "owner___set" / "default" / "0.0.0" / "hash"
    shutil.copytree(info.parent, target)  # as it lies there after loading owner/set
    for file in target.glob("*.arrow"):
        file.rename(target / file.name.replace("parquet", "set"))
    described = json.loads(info.read_text()) | {"config_name": "default", "dataset_name": "set"}
    (target / "dataset_info.json").write_text(json.dumps(described))
    assert len(load_examples("counting", "owner/set", "train", 0).all(9)) == 4


@pytest.mark.parametrize("hub", ["not found"], indirect=True)
@pytest.mark.parametrize("name", ["owner/set", "a name with spaces"])
def test_a_name_that_the_hub_does_not_know(name, hub):
    with pytest.raises(
        UserError, match=f"{name} is neither a local path nor a data set that the Hugging Face Hub"
    ):
        load_examples("counting", name, "train", 0)
