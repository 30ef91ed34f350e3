"""The picture of a model card: reward and β over the steps of the run."""

import io

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..report.svg import LIGHT

_PANELS = {"reward": "mean reward of the completions", "beta": "KL weight β"}
_SFT_PANELS = {"loss": "loss, nats per token"}


def panels(columns: dict[str, np.ndarray]) -> dict[str, str]:
    """Return what a run's picture shows: titles, by the names of the metrics in `read_metrics`.

    A β of 0 throughout is left out, and so is what has no finite value.
    """
    wanted = _PANELS if "reward" in columns else _SFT_PANELS
    found = {name: columns[name] for name in wanted if name in columns}
    if "beta" in found and not found["beta"].any():
        del found["beta"]
    return {name: wanted[name] for name, values in found.items() if np.isfinite(values).any()}


def training_picture(columns: dict[str, np.ndarray]) -> bytes:
    """Draw the panels of a run's metrics, of which there is at least one, as a PNG file."""
    shown = panels(columns)
    with matplotlib.rc_context({"font.size": 10, "text.parse_math": False}):
        figure = Figure(figsize=(4.5 * len(shown), 2.8))
        # Fixed margins: a layout that matplotlib finds takes twice the time of the drawing.
        figure.subplots_adjust(left=0.13 / len(shown), right=0.98, bottom=0.18, top=0.9)
        for (name, title), axes in zip(
            shown.items(), np.atleast_1d(figure.subplots(1, len(shown))), strict=True
        ):
            _draw(axes, columns["step"], columns[name], smooth=name != "beta")
            axes.set_title(title, loc="left", fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: bool) -> None:
    """Draw a line over the steps; a long one that is to be smooth, with its moving average."""
    look = {"color": LIGHT["--line0"], "linewidth": 2}
    if smooth and len(steps) > 20:
        axes.plot(steps, values, color=LIGHT["--line0"], linewidth=0.7, alpha=0.4)
        window = max(5, len(steps) // 20)
        values = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], values, **look)
    else:
        axes.plot(steps, values, marker="o" if len(steps) <= 20 else "", markersize=4, **look)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.8, color=LIGHT["--grid"])
