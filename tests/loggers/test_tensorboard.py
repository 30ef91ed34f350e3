"""What TensorBoard's own reader finds."""

import pytest

from ..data.logged import HOSTILE, log_steps, metrics_of

event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_scalars_samples_and_pictures_of_a_resumed_run(tmp_path):
    log_steps(tmp_path / "run", "tensorboard", 0, 3, evaluate=[0, 2, 3])
    log_steps(tmp_path / "run", "tensorboard", 2, 4, evaluate=[3, 4])
    events = event.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in metrics_of(0):
        logged = [(item.step, item.value) for item in events.Scalars(name)]
        assert logged == [(step, metrics_of(step)[name]) for step in range(4)]

    assert [item.step for item in events.Scalars("held_out_accuracy")] == [0, 2, 3, 4]

    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "reward 1" in text
    # Lines that are indented by four spaces are shown as they are.
    assert all(f"\n    {line}" in text.replace("completion: ", "") for line in HOSTILE.split("\n"))

    images = events.Images("samples/prompt 2")
    assert [image.step for image in images] == [0, 1, 2, 3]
    assert (images[0].width, images[0].height) == (84, 84)
