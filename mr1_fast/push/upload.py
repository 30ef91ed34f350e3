"""Uploading final/ of a run to the Hugging Face Hub, and the check before training that it can be.

Requests are huggingface_hub's, which repeats those that fail for a passing reason. The upload at
the end of a run is a process of its own, the command `python -m mr1_fast.push`, which is ended if
it takes too long: whatever happens to it, the run is complete and can be pushed again.
"""

import json
import shlex
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import (
    DEFAULT_IGNORE_PATTERNS,
    filter_repo_objects,
    validate_repo_id,
)

from ..command_line import parse_train_config
from ..errors import UserError
from ..model.saved_adapter import ADAPTER_CONFIG, read_config
from ..processes import module_process
from .card import CARD, write_card
from .public import public_name
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
    failures: list[Exception] = []

    then = "or leave push_to_hub out"

    def check() -> None:
        try:
            _repository(name, lambda _: then)
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

    `name` is by default the run's push_to_hub. A run without a model card gets one first. The card
    is sent with the name of its repository, and an adapter with the public name of its model; on
    disk both stay as they are. Raises UserError where anything of this fails.
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

    def then(again: str) -> str:
        return f"then run `{push_command(run)} {again}`; the run is complete"

    repository, api = _repository(name, then), HfApi()
    paths = [path.relative_to(final).as_posix() for path in final.rglob("*") if path.is_file()]
    ignored = [*DEFAULT_IGNORE_PATTERNS, "*.partial"]
    sent = {
        path: _published(final / path, repository)
        for path in sorted(filter_repo_objects(paths, ignore_patterns=ignored))
    }
    with _one_sentence(name, then):
        older = filter_repo_objects(
            api.list_repo_files(repository), allow_patterns=_OF_OLDER_WEIGHTS
        )
        # Not upload_folder, which may take several commits and sends files as they are.
        api.create_commit(
            repository,
            [
                *(CommitOperationDelete(path) for path in older if path not in sent),
                *(CommitOperationAdd(path, content) for path, content in sent.items()),
            ],
            commit_message="Upload a model trained with mr1_fast",
        )
    return f"{api.endpoint}/{repository}"


def _published(path: Path, repository: str) -> Path | bytes:
    """Return what is sent in the place of a file of final/: the file, or its bytes for the Hub."""
    if path.name == CARD:
        return path.read_text(encoding="utf-8").replace(THIS_MODEL, repository).encode()
    if path.name == ADAPTER_CONFIG:
        settings = read_config(path.parent)
        if isinstance(base := settings.get("base_model_name_or_path"), str):
            settings["base_model_name_or_path"] = public_name(base)
            return json.dumps(settings, indent=2).encode()
    return path


def push_in_time(run: Path) -> str:
    """Push a run by a process of its own, in bounded time; returns what to say of it.

    Raises nothing: a failure is a sentence that names the command by which to push again.
    """
    size = sum(path.stat().st_size for path in (run / "final").rglob("*") if path.is_file())
    seconds = START_SECONDS + size / BYTES_PER_SECOND
    command, environment = module_process("mr1_fast.push", str(run))
    try:
        done = subprocess.run(
            command,
            env=environment | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
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


def _repository(name: str, then: Callable[[str], str]) -> str:
    """Return OWNER/NAME of a repository that exists and can be written; creates it if need be.

    then: as for _one_sentence.
    """
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
def _one_sentence(name: str, then: Callable[[str], str]) -> Iterator[None]:
    """Bound the time of each answer, and turn whatever huggingface_hub raises into a UserError.

    then: what to do after that, given the name to push to; that is NAME if `name` was refused.
    """
    session = get_session()
    usual, session.timeout = session.timeout, ANSWER_SECONDS
    try:
        yield
    except Exception as error:  # of the connection, of HTTP, of JSON that is none, of files
        reason, way_out = _reason(error)
        again = then("NAME" if "another name" in way_out else name)
        raise UserError(f"push_to_hub is {name}, but {reason}: {way_out}, {again}.") from error
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
