"""The paper's two test sets in the layouts in which they are published."""

import json
import shutil
from pathlib import Path

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data import load_examples
from mr1_fast.tasks.data.paper_sets import TEST_SETS

from ...data.pictures import colour, picture, write_lines

SHARED = Path(__file__).parents[3] / "shared" / "data"


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
