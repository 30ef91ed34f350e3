"""The Hugging Face Hub: data sets by name or from files, and models, with an answer soon where it is out of reach."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import huggingface_hub.constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from .errors import UserError

HUB_TIMEOUT = 5.0
"""Seconds that the Hugging Face Hub has to answer before it counts as out of reach, for data and models."""


def hub_splits(name: str) -> dict[str, Sequence]:
    """Rows by split of a data set on the Hub, or of its copy in the local cache while the Hub is out of reach.

    Raises UserError with the way out, soon, also without a network.
    """
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a local path nor a data set that the Hugging Face Hub shows to you: pass a local file "
            "or folder as data, correct the name, or log in with `hf auth login`."
        ) from error
    except Exception:  # no network, no answer in time, a failing server, or offline mode
        # The cache is still worth a look. Online, `datasets` would retry each request for half a minute or more.
        datasets.config.HF_HUB_OFFLINE = True
    try:
        return load_splits(name, name)
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def load_splits(source: str, *args: str, **kwargs: str) -> dict[str, Sequence]:
    """`datasets.load_dataset` of every split, with its many kinds of failure told in one sentence about `source`."""
    import datasets

    try:
        return datasets.load_dataset(*args, **kwargs)
    except ConnectionError as error:
        raise UserError(
            f"{source} is neither a local path nor in the local cache, and the Hugging Face Hub could not be reached: "
            f"pass a local folder as data (made elsewhere by `hf download {source} --repo-type dataset --local-dir …`)."
        ) from error
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(
            error, datasets.data_files.EmptyDatasetError
        ) or "corresponds to no data" in str(error):
            raise UserError(
                f"{source} is empty: give a folder or file that holds rows of data."
            ) from error
        if isinstance(
            error, datasets.exceptions.SplitsVerificationError
        ):  # a download of 27 files, say, that stopped
            raise UserError(
                f"{source} does not hold the rows that its README.md counts: download the rest, or pass a file as data."
            ) from error
        reason = " ".join(str(cause).split())[:300]
        raise UserError(
            f"{source} could not be loaded ({type(cause).__name__}: {reason}): check the data."
        ) from error


@contextmanager
def cache_only_without_hub(name: str) -> Iterator[None]:
    """Read only the local cache while the hub does not answer: transformers would retry each file for half a minute."""
    constants = huggingface_hub.constants
    was_offline = constants.HF_HUB_OFFLINE
    try:
        if not os.path.isdir(name):
            huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError):
        pass  # transformers says it in its own words
    except Exception:  # no network, no answer in time, a failing server, or offline mode
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
