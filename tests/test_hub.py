"""The Hugging Face Hub: soon answered or soon given up, with its local cache in its place.

A server on this machine stands in for the Hub, so that the tests hold with and without a network.
"""

import http.server
import json
import shutil
import threading
import time

import datasets
import pytest
from huggingface_hub import constants

from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.hub import model_access
from mr1_fast.merge.command import merge_adapter
from mr1_fast.merge.settings import MergeConfig
from mr1_fast.model.load import load_pretrained, make_policy
from mr1_fast.model.save import save_pretrained
from mr1_fast.tasks.data import DataOptions, load_examples

from .data.pictures import table


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def hub(request, monkeypatch):
    """Run a Hub that never answers ("silent"), or one that knows no name ("not found")."""
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
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("mr1_fast.hub.HUB_TIMEOUT", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
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
    options = DataOptions(config="hard")
    with pytest.raises(
        UserError, match=r"owner/set has no such configuration: .* default with --d"
    ):
        load_examples("counting", "owner/set", "train", 0, options=options)


@pytest.mark.parametrize("hub", ["not found"], indirect=True)
@pytest.mark.parametrize("name", ["owner/set", "a name with spaces"])
def test_a_name_that_the_hub_does_not_know(name, hub):
    with pytest.raises(
        UserError, match=f"{name} is neither a local path nor a data set that the Hugging Face Hub"
    ):
        load_examples("counting", name, "train", 0)


@pytest.mark.parametrize("hub", ["silent"], indirect=True)
def test_a_model_is_sought_in_the_cache_while_the_hub_is_out_of_reach(hub):
    start = time.perf_counter()
    with model_access("owner/model"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="owner/model cannot be loaded; it is no local folder"):
        load_pretrained(ModelConfig(model="owner/model", device="cpu"))
    assert time.perf_counter() - start < 5
    assert not constants.HF_HUB_OFFLINE, "also after an error"


@pytest.mark.parametrize("hub", ["silent"], indirect=True)
def test_a_model_in_the_cache_is_loaded_saved_and_merged_without_the_hub(
    hub, tiny_folder, tmp_path, monkeypatch
):
    pytest.importorskip("peft")
    repository = tmp_path / "cache" / "models--owner--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_folder, snapshot)
    (snapshot / "video_preprocessor_config.json").write_text("{ }")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    config = ModelConfig(model="owner/model", device="cpu", lora=True, recompute="none")
    policy = make_policy(*load_pretrained(config), config)
    save_pretrained(policy, tmp_path / "final", "both")
    merge_adapter(MergeConfig(str(tmp_path / "final" / "adapter"), str(tmp_path / "merged")))
    for path in snapshot.iterdir():
        for folder in ("final", "merged"):
            if path.suffix != ".safetensors" and path.name != "config.json":
                assert (tmp_path / folder / path.name).read_bytes() == path.read_bytes()
    written = json.loads((tmp_path / "final" / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "owner/model"
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("hub", ["not found"], indirect=True)
def test_a_model_that_the_hub_does_not_know_is_left_to_transformers(hub):
    with model_access("owner/model"):
        assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("hub", ["silent"], indirect=True)
def test_the_hub_is_not_asked_about_a_folder(hub, tmp_path):
    with model_access(str(tmp_path)):
        assert not constants.HF_HUB_OFFLINE
