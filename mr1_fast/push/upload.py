"""Uploading final/ of a run to the Hugging Face Hub, and the check before training that it can be.

Requests are huggingface_hub's, which repeats those that fail for a passing reason. The upload at
the end of a run is a process of its own, the command `python -m mr1_fast.push`, which is ended if
it takes too long: whatever happens to it, the run is complete and can be pushed again.
"""

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from ..command_line import parse_train_config
from ..errors import UserError
from ..files import write_text
from .card import CARD, write_card
from .usage import THIS_MODEL

ANSWER_SECONDS = 60.0
"""Seconds that the Hub has for an answer, and for taking each part of what is sent."""

CHECK_SECONDS = 120.0
"""Seconds that the check before training may take in all."""

START_SECONDS, BYTES_PER_SECOND = 300.0, 2**20
"""The upload at the end of a run may take START_SECONDS, and the time that its bytes take at
BYTES_PER_SECOND. The command by itself has no such limit."""

_OF_OLDER_WEIGHTS = ["*.safetensors", "*.safetensors.index.json", "*adapter_config.json"]
"""Files of an earlier push that would be loaded with those of this one. Its history keeps them."""


def require_repository(name: str) -> None:
    """Create the repository `name` on the Hub unless it exists, and check that it can be written.

    Raises UserError, which names push_to_hub and the way out, where an upload would fail now.
    """
    then = "or leave push_to_hub out"
    failures: list[Exception] = []

    def check() -> None:
        try:
            _repository(name, then)
        except Exception as error:
            failures.append(error)

    # huggingface_hub asks without end while another operation on the repository is in progress.
    thread = threading.Thread(target=check, daemon=True)
    thread.start()
    thread.join(CHECK_SECONDS)
    if failures:
        raise failures[0]
    if thread.is_alive():
        raise UserError(
            f"push_to_hub is {name}, but the Hub took more than {CHECK_SECONDS:g} s for the check: "
            f"try again later, {then}."
        )


def push_run(run: Path, name: str | None = None) -> str:
    """Upload final/ of the run in folder `run` to `name`, in one commit; returns its address.

    `name` is by default the run's push_to_hub. A run without a model card gets one first. Raises
    UserError where anything of this fails; the run stays as it is.
    """
    final = run / "final"
    if not final.is_dir():
        raise UserError(f"{final} does not exist: name the folder of a finished run.")
    config = parse_train_config(["--config", str(run / "config.yaml")])
    name = name or config.push_to_hub
    if name is None:
        raise UserError(f"push_to_hub of {run} is not set: add a name, as OWNER/NAME.")
    if not (final / CARD).exists():
        write_card(run, config)

    then = f"then run `{push_command(run)}`; the run is complete"
    repository = _repository(name, then)
    card = (final / CARD).read_text(encoding="utf-8")
    write_text(final / CARD, card.replace(THIS_MODEL, repository))
    with _one_sentence(name, then):
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=final,
            commit_message="Upload a model trained with mr1_fast",
            ignore_patterns=["*.partial"],
            delete_patterns=_OF_OLDER_WEIGHTS,
        )
    return f"{HfApi().endpoint}/{repository}"


def push_in_time(run: Path) -> str:
    """Push a run by a process of its own, in bounded time; returns what to say of it.

    Raises nothing: a failure is a sentence that names the command by which to push again.
    """
    size = sum(path.stat().st_size for path in (run / "final").rglob("*") if path.is_file())
    seconds = START_SECONDS + size / BYTES_PER_SECOND
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mr1_fast.push", str(run)],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        reason = f"error: the upload took more than {seconds:.0f} s"
    else:
        if done.returncode == 0:
            return done.stdout.strip()
        reason = (done.stderr.strip().splitlines() or [f"error: exit status {done.returncode}"])[-1]
    if push_command(run) in reason:
        return reason
    return f"{reason}: run `{push_command(run)}`; the run is complete."


def push_command(run: Path) -> str:
    """Return the command that uploads the run in folder `run`."""
    return f"python -m mr1_fast.push {shlex.quote(str(run))}"


def _repository(name: str, then: str) -> str:
    """Return OWNER/NAME of a repository that exists and can be written; creates it if need be."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"push_to_hub is {name}, but a name on the Hub is OWNER/NAME, of letters, digits, "
            "'-', '_' and '.' (no '--' or '..'), in at most 96 characters: choose another."
        ) from error
    with _one_sentence(name, then):
        api = HfApi()
        api.whoami()
        found = api.create_repo(name, exist_ok=True).repo_id
        # A repository that exists counts as created even if it is someone else's.
        api.auth_check(found, write=True)
    return found


@contextmanager
def _one_sentence(name: str, then: str) -> Iterator[None]:
    """Bound the time of each answer, and turn whatever huggingface_hub raises into a UserError."""
    session = get_session()
    usual, session.timeout = session.timeout, ANSWER_SECONDS
    try:
        yield
    except Exception as error:  # of the connection, of HTTP, of JSON that is none, of files
        reason, way_out = _reason(error)
        raise UserError(f"push_to_hub is {name}, but {reason}: {way_out}, {then}.") from error
    finally:
        session.timeout = usual


def _reason(error: Exception) -> tuple[str, str]:
    """What went wrong, and the way out."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the Hub", "log in with `hf auth login`"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off", "unset HF_HUB_OFFLINE"
    error = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    words = _words(error)
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({words})", "check the network"
    match error.response.status_code:
        case 401:
            return f"the Hub does not accept the token ({words})", "log in with `hf auth login`"
        case 403:
            return (
                f"the token may not write there ({words})",
                "choose another name or log in with a token that may, by `hf auth login`",
            )
        case status:
            return f"the Hub answered {status} ({words})", "try again later"


def _words(error: Exception) -> str:
    """What an error says, in at most 200 characters and without the token."""
    text = " ".join(str(error).split())
    with suppress(Exception):
        if token := get_token():
            text = text.replace(token, "…")
    return f"{type(error).__name__}: {text[:200]}"
