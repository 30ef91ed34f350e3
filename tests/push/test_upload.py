"""Uploads to a Hub on this machine: what arrives, what stays, and every way in which it fails."""

import json
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from mr1_fast.errors import UserError
from mr1_fast.push import __main__ as command
from mr1_fast.push import upload
from mr1_fast.push.upload import push_in_time, push_run, require_repository
from mr1_fast.push.usage import THIS_MODEL

from ..data.hub_server import TOKEN, Failure
from ..data.runs import run
from .conftest import made_run


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run with a card, whose push_to_hub is me/model."""
    made_run(tmp_path / "run", push_to_hub="me/model")
    (tmp_path / "run" / "final" / "README.md").write_text(f"# {THIS_MODEL}\n")
    return tmp_path / "run"


@pytest.fixture
def patient(monkeypatch):
    """Let huggingface_hub wait between its tries without spending the time; collects the waits."""
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    return waits


def contents(folder):
    """Every file below a folder, by its path there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def published(run, name="me/model"):
    """The files of a run's final/ as the Hub gets them: the card with the repository's name."""
    files = contents(run / "final")
    return files | {"README.md": files["README.md"].replace(THIS_MODEL.encode(), name.encode())}


def test_the_hub_gets_final_and_nothing_else(hub, finished):
    (finished / "final" / "README.md").unlink()
    before = contents(finished)
    assert push_run(finished) == f"{hub.address}/me/model"
    assert hub.files("me/model") == published(finished)
    assert {"README.md", "training.png", "adapter/adapter_config.json"} < hub.files(
        "me/model"
    ).keys()
    assert len(hub.repos["me/model"]) == 2, "created, then one commit"
    after = contents(finished)
    assert after.keys() - before.keys() == {"final/README.md", "final/training.png"}
    assert before.items() <= after.items()


def test_the_card_names_the_repository_and_edits_stay(hub, finished):
    before = contents(finished)
    push_run(finished, "model")  # without an owner
    push_run(finished, "me/second")
    assert hub.files("me/model")["README.md"] == b"# me/model\n"
    assert hub.files("me/second")["README.md"] == b"# me/second\n"
    assert contents(finished) == before
    (finished / "final" / "README.md").write_text("By hand.\n")
    push_run(finished)
    assert hub.files("me/model")["README.md"] == b"By hand.\n"


@pytest.mark.parametrize(
    "base, shown", [("/home/alice/my-qwen", "my-qwen"), ("Qwen/Qwen2-VL-2B", "Qwen/Qwen2-VL-2B")]
)
def test_an_adapter_is_sent_with_the_public_name_of_its_model(hub, finished, base, shown):
    path = finished / "final" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": base, "r": 8}))
    before = contents(finished)
    push_run(finished)
    sent = json.loads(hub.files("me/model")["adapter/adapter_config.json"])
    assert sent == {"base_model_name_or_path": shown, "r": 8}
    assert contents(finished) == before
    assert len(hub.repos["me/model"]) == 2, "created, then one commit"
    path.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        push_run(finished)


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, finished):
    earlier = {"model-00001-of-00002.safetensors": b"old", "model.safetensors": b"old"}
    hub.repos["me/model"] = [{**earlier, "notes.txt": b"mine", "q4.gguf": b"mine"}]
    push_run(finished)
    mine = {"notes.txt": b"mine", "q4.gguf": b"mine"}
    assert hub.files("me/model") == {**published(finished), **mine}
    assert hub.repos["me/model"][0].items() >= earlier.items(), "the history keeps them"


@pytest.mark.parametrize(
    "route, failure",
    [
        ("put", Failure(status=500, times=2)),
        ("put", Failure(how="close", times=3)),
        ("batch", Failure(status=503, times=2)),
        ("preupload", Failure(how="close", times=1)),
    ],
)
def test_a_failure_that_passes_is_tried_again(hub, finished, patient, route, failure):
    hub.failures[route] = failure
    push_run(finished)
    assert hub.files("me/model") == published(finished)
    assert failure.times == 0 and patient


@pytest.mark.parametrize(
    "route, failure, said",
    [
        ("whoami", Failure(status=401), "the Hub does not accept the token .*: log in with"),
        ("create", Failure(status=500), r"the Hub answered 500 \(.*: try again later"),
        ("yaml", Failure(how="close"), "the Hub cannot be reached"),
        ("preupload", Failure(status=403), "the token may not write there .*: choose another name"),
        ("batch", Failure(status=500), "the Hub answered 500"),
        ("put", Failure(status=403), "the token may not write there"),
        ("put", Failure(status=500), "the Hub answered 500"),
        ("put", Failure(how="close"), "the Hub cannot be reached"),
        ("put", Failure(how="hang"), "the Hub cannot be reached"),
        ("commit", Failure(status=409), "the Hub answered 409"),
        ("commit", Failure(how="hang"), "the Hub cannot be reached"),
        ("tree", Failure(status=200), "the Hub cannot be reached"),  # an answer of another form
    ],
)
def test_an_upload_that_fails_loses_nothing(
    hub, finished, patient, monkeypatch, route, failure, said
):
    monkeypatch.setattr(upload, "ANSWER_SECONDS", 0.2)
    before = contents(finished)
    hub.failures[route] = failure
    again = "NAME" if failure.status == 403 else "me/model"
    then = (
        rf"{said}.*, then run `python -m mr1_fast\.push {finished} {again}`; the run is complete\.$"
    )
    with pytest.raises(UserError, match=f"^push_to_hub is me/model, but {then}"):
        push_run(finished)
    assert hub.repos.get("me/model", [{}]) == [{}], "no commit"
    assert contents(finished) == before
    assert sum(patient) < 60

    hub.failures.clear()
    push_run(finished)
    assert hub.files("me/model") == published(finished)


def test_a_hub_that_refuses_the_connection(hub, finished, patient, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"the Hub cannot be reached .*: check the network, then"):
        push_run(finished)


@pytest.mark.parametrize(
    "name, said",
    [
        ("a b", "a b, but a name on the Hub is OWNER/NAME"),
        ("a/b/c", "choose another"),
        ("someone/model", "the token may not write there .*no right to create"),
        ("me/locked", "the token may not write there .*: choose another name or log in"),
    ],
)
def test_a_name_that_cannot_be_pushed_to(hub, name, said):
    hub.repos["me/locked"] = [{}]
    hub.read_only.add("me/locked")
    with pytest.raises(UserError, match=f"^push_to_hub is .*{said}"):
        require_repository(name)


def test_a_repository_is_created_once(hub):
    require_repository("me/model")
    require_repository("me/model")
    require_repository("model")
    assert hub.repos == {"me/model": [{}]}


def test_no_token_and_a_wrong_one(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(
        UserError, match=r"does not accept the token .*: log in with `hf auth login`"
    ):
        require_repository("me/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        UserError, match="there is no token for the Hub: log in with `hf auth login`"
    ):
        require_repository("me/model")
    assert hub.asked == ["whoami"] and not hub.repos


def test_a_hub_that_is_switched_off(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub is switched off: unset HF_HUB_OFFLINE, or leave"):
        require_repository("me/model")


@pytest.mark.parametrize(
    "failure",
    [
        Failure(how="hang"),
        Failure(
            status=409,
            message="Cannot create repo: another conflicting operation is in progress",
        ),
    ],
)
def test_the_check_ends(hub, monkeypatch, failure):
    monkeypatch.setattr(upload, "CHECK_SECONDS", 0.3)
    hub.failures["create"] = failure
    with pytest.raises(
        UserError, match=r"more than 0.3 s for the check: try again later, or leave"
    ):
        require_repository("me/model")
    hub.failures.clear()


def test_what_the_hub_says_is_short_and_has_no_token(hub):
    hub.failures["whoami"] = Failure(status=500, message=f"{TOKEN} \x1b[31m\n" + "long " * 999)
    with pytest.raises(UserError) as raised:
        require_repository("me/model")
    said = str(raised.value)
    assert TOKEN not in said and "\x1b" not in said and "\n" not in said and len(said) < 500


def test_the_command(hub, finished, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["push", str(finished), "me/other"])
    command.main()
    assert capsys.readouterr().out == (f"uploaded {finished}/final to {hub.address}/me/other\n")
    assert hub.files("me/other") == published(finished, "me/other")
    with pytest.raises(UserError, match="nowhere/final does not exist: name the folder of a fin"):
        push_run(tmp_path / "nowhere")
    made_run(tmp_path / "unnamed")
    with pytest.raises(UserError, match=r"push_to_hub of .*unnamed is not set: add a name"):
        push_run(tmp_path / "unnamed")


def test_an_upload_in_a_process_of_its_own_ends_in_time(hub, finished, monkeypatch):
    hub.failures["commit"] = Failure(how="hang")
    monkeypatch.setattr(upload, "START_SECONDS", 1.0)
    begun = time.monotonic()
    said = push_in_time(finished)
    assert time.monotonic() - begun < 15
    assert said.endswith(
        f"more than 1 s: run `python -m mr1_fast.push {finished}`; the run is complete."
    )


def test_a_run_is_pushed_at_its_end(hub, run_args, tmp_path, capsys):
    folder = tmp_path / "run"
    run(run_args(folder, push_to_hub="me/model", steps=1, eval_samples=2, save_every=0))
    said = capsys.readouterr().out
    assert f"uploading {folder}/final to me/model …" in said
    assert f"uploaded {folder}/final to {hub.address}/me/model" in said
    assert hub.files("me/model") == published(folder)
    assert "model.safetensors" in hub.files("me/model")
    for path, content in contents(tmp_path).items():
        assert TOKEN.encode() not in content, path


def test_an_upload_that_fails_does_not_fail_the_run(hub, finished):
    hub.failures["commit"] = Failure(status=403)
    said = push_in_time(finished)
    assert said.startswith("error: push_to_hub is me/model, but the token may not write there")
    assert said.endswith(
        f"then run `python -m mr1_fast.push {finished} NAME`; the run is complete."
    )
    assert TOKEN not in said and "\n" not in said
    hub.failures.clear()
    push_run(finished)
    assert hub.files("me/model") == published(finished)


def test_a_run_that_could_not_be_pushed_does_not_begin(hub, run_args, tmp_path):
    hub.failures["auth"] = Failure(status=403)
    with pytest.raises(UserError, match="the token may not write there"):
        run(run_args(tmp_path / "run", push_to_hub="me/model"))
    assert not (tmp_path / "run").exists()
