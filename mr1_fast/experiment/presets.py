"""The presets: each is a scale (model, tasks, budget) together with a study (what varies)."""

from ..errors import UserError
from ..profiles import BUILT_IN
from .scales import SCALES, Scale
from .studies import STUDIES, Study


def find_preset(name: str) -> tuple[Scale, Study]:
    """The scale and the study of a preset; UserError lists the known ones."""
    presets = known_presets()
    if name not in presets:
        raise UserError(
            f"preset is {name!r}, but the presets are {', '.join(presets)}: choose one of them."
        )
    return presets[name]


def known_presets() -> dict[str, tuple[Scale, Study]]:
    """Name → scale and study of every preset.

    The comparison of methods has the name of its scale; the others are `<scale>_<study>`.
    """
    return {
        scale_name if study_name == "method" else f"{scale_name}_{study_name}": (scale, study)
        for scale_name, scale in SCALES.items()
        for study_name, study in STUDIES.items()
        if scale.model in BUILT_IN or not study.drawn
    }
