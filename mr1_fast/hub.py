"""Reading data sets and models from the Hugging Face Hub, or from the local cache without it.

While the Hub does not answer, `datasets` and `transformers` repeat each request for half a minute
or more. The Hub is therefore asked once, with a short time limit, and if no answer comes the
library is told to look only in its local cache.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import huggingface_hub.constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from .errors import UserError

HUB_TIMEOUT = 5.0
"""Seconds that the Hub has to answer before it counts as out of reach."""


def model_access(name: str) -> AbstractContextManager[None]:
    """Return a context in which transformers can read the model `name`, a folder or a hub name.

    Within it transformers reads only its local cache if the Hub does not answer. A name that the
    Hub does not know is left to transformers, which reports it in its own words.
    """
    if os.path.isdir(name):
        return nullcontext()
    return _cache_only_without_hub(
        huggingface_hub.HfApi().model_info, name, huggingface_hub.constants
    )


def model_folder(name: str, patterns: Sequence[str]) -> Path:
    """Return the folder that holds a model's files of these names.

    That is its own, or for a name on the Hub the one in the local cache, into which the files are
    downloaded where the Hub answers.
    """
    if os.path.isdir(name):
        return Path(name)
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))


def hub_splits(name: str, config: str | None = None) -> dict[str, Sequence]:
    """Load a data set from the Hub, or from the local cache while the Hub is out of reach.

    `config` is its configuration, if it has several. Returns the rows of each split. Raises
    UserError, within seconds even without a network, for a name that the Hub does not know or for
    data that cannot be loaded.
    """
    import datasets  # takes seconds to import, and runs on drawn data never need it

    unknown = (
        f"{name} is neither a local path nor a data set that the Hugging Face Hub shows to you: "
        "pass a local file or folder as data, correct the name, or log in with `hf auth login`."
    )
    ask = huggingface_hub.HfApi().dataset_info
    with _cache_only_without_hub(ask, name, datasets.config, unknown):
        return load_splits(name, name, config)


def load_splits(source: str, *args: str | None, **kwargs: str) -> dict[str, Sequence]:
    """Call `datasets.load_dataset(*args, **kwargs)` and return the rows of every split.

    Raises UserError with one sentence about `source` for each of the many ways in which this fails.
    """
    import datasets

    with _one_sentence(source):
        return datasets.load_dataset(*args, **kwargs)


def files_to_load(source: str, *args: str | None, **kwargs: str) -> tuple[str, list[Path]]:
    """Return which local files `load_splits` with the same arguments reads, and in which format.

    There are none where the cache of `datasets` has their rows already. The format is the name of
    the reader, such as "Parquet", whatever the files are called.
    """
    import datasets

    with _one_sentence(source):
        builder = datasets.load_dataset_builder(*args, **kwargs)
    files = {str(file) for each in (builder.config.data_files or {}).values() for file in each}
    if os.path.isdir(builder.cache_dir):
        files = set()
    return type(builder).__name__, [Path(file) for file in sorted(files) if os.path.isfile(file)]


def split_files(source: str, folder: str, config: str | None = None) -> dict[str, list[Path]]:
    """Return the files of every split of a local folder, as `datasets` finds them.

    Raises UserError with one sentence about `source` where it finds none.
    """
    import datasets

    with _one_sentence(source):
        files = datasets.load_dataset_builder(folder, config).config.data_files
    return {str(split): [Path(file) for file in files[split]] for split in files or ()}


@contextmanager
def _one_sentence(source: str) -> Iterator[None]:
    """Turn whatever `datasets` raises about `source` into a UserError."""
    try:
        yield
    except ConnectionError as error:
        raise UserError(
            f"{source} is neither a local path nor in the local cache, and the Hugging Face Hub "
            "could not be reached: pass a local folder as data (made elsewhere by "
            f"`hf download {source} --repo-type dataset --local-dir …`)."
        ) from error
    except Exception as error:
        raise UserError(_loading_fault(source, error)) from error


def _loading_fault(source: str, error: Exception) -> str:
    """Say in one sentence why `datasets` could not load `source`, and what to do."""
    import datasets

    is_empty = isinstance(error, datasets.data_files.EmptyDatasetError)
    if is_empty or "corresponds to no data" in str(error):
        return f"{source} is empty: give a folder or file that holds rows of data."

    # Raised, for example, for a download of 27 files that stopped halfway.
    if isinstance(error, datasets.exceptions.SplitsVerificationError):
        return (
            f"{source} does not hold the rows that its README.md counts: download the rest, or "
            "pass a file as data."
        )

    configurations = re.search(r"[Aa]vailable[^\[\]]*:\s*\[([^\]]*)\]", str(error))
    if configurations:
        names = configurations[1].replace("'", "")
        wanted = "several configurations" if "is missing" in str(error) else "no such configuration"
        return f"{source} has {wanted}: name one of {names} with --data-config."

    cause = error.__cause__ or error
    reason = " ".join(str(cause).split())[:300]
    return f"{source} could not be loaded ({type(cause).__name__}: {reason}): check the data."


@contextmanager
def _cache_only_without_hub(
    ask: Callable[..., object], name: str, settings: ModuleType, unknown: str | None = None
) -> Iterator[None]:
    """Let a library read only its local cache within this context if the Hub does not answer.

    `ask(name, timeout=seconds)` is the question put to the Hub, and `settings` is the module whose
    HF_HUB_OFFLINE the library obeys; it is restored at the end. If the Hub answers that it does not
    know `name`, UserError is raised with the message `unknown`; without one the context goes on.
    """
    was_offline = settings.HF_HUB_OFFLINE
    try:
        ask(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        if unknown is not None:
            raise UserError(unknown) from error
    except Exception:  # no network, no answer in time, a failing server, or offline mode
        settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        settings.HF_HUB_OFFLINE = was_offline
