"""How data is read: what the settings say about its columns, configuration and splits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...config import TaskConfig


@dataclass(frozen=True)
class DataOptions:
    """How loaded data is read, beside its name and the split that is wanted."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The column that holds each of images, problem, solution and thinking, where its name is not
    recognised; `reward_model.ground_truth` reaches into an object."""
    config: str | None = None
    """The configuration of a data set that has several."""
    split: str | None = None
    """The name that the data has for the wanted split, such as testmini."""
    allow_urls: bool = False
    """Whether images may be downloaded."""
    held_out: bool = False
    """Whether a run evaluates these data: the validation split stands in for a missing test
    split."""
    trained: str | None = None
    """The split of the same data that the run trains on, which cannot be held out; None if other
    data are held out."""

    @classmethod
    def of(cls, config: TaskConfig) -> "DataOptions":
        """Return the options of the data that a run is trained on."""
        return cls(config.columns, config.data_config, config.data_split, config.allow_urls)

    @property
    def lenient(self) -> bool:
        """Whether `columns` and `config`, which describe the training data, may not fit."""
        return self.held_out and self.trained is None


DEFAULTS = DataOptions()
"""The options of data in a layout and with splits that are recognised."""
