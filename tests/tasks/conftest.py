import datasets
import pytest

from mr1_fast.tasks import DRAWN_TASKS, get_task
from mr1_fast.tasks.split import SPLITS


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` prepares out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", params=DRAWN_TASKS)
def drawn(request):
    """Return each split's first items at difficulty 1; there are fewer figures that differ."""
    task, count = get_task(request.param), 1000 if request.param == "figures" else 2000
    return {split: [task.draw(split, 0, index) for index in range(count)] for split in SPLITS}
