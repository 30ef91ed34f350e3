"""The results that OThink-MR1 (arXiv 2503.16081) publishes, which reports show beside their own."""

NAMES = {"counting": "VC", "geometry": "GR"}
"""The paper's abbreviations of the two tasks: visual counting and geometry reasoning."""

ORDER = ("base", "grpo", "sft", "sft-answer", "sft-solution", "grpo-d")
"""The order of the rows in the paper's tables."""

SFT = ("sft-answer", "sft")
"""The variants that may stand for the paper's SFT.

The answers of SFT in the paper's figures are bare, so it is the one that imitates answers alone.
Earlier versions had one SFT, named `sft`."""

JUDGE = "r1v"
"""The judge by which the paper counts: that of R1-V, on which it builds."""

ACCURACY = {
    "2B": {
        "base": {"counting": 42.50, "geometry": 15.52},
        "grpo": {"counting": 64.50, "geometry": 30.24},
        "sft": {"counting": 68.50, "geometry": 32.49},
        "grpo-d": {"counting": 76.50, "geometry": 34.35},
    },
    "7B": {
        "base": {"counting": 76.00, "geometry": 33.16},
        "grpo": {"counting": 76.50, "geometry": 42.04},
        "sft": {"counting": 74.50, "geometry": 43.50},
        "grpo-d": {"counting": 78.00, "geometry": 45.49},
    },
}
"""Size of Qwen2-VL-Instruct → method → task: greedy accuracy in %, trained and tested on it."""

CROSS_TASK = {
    "2B": {
        ("geometry", "counting"): {
            "grpo-d": {"base": 63.53, "sft": 61.63},
            "sft": {"base": 1.18},
        },
        ("counting", "geometry"): {
            "grpo-d": {"base": 4.25, "sft": 368.99},
            "sft": {"base": -77.77},
        },
    },
}
"""Size → (trained on, tested on) → method → what it is compared with: relative change in %.

The change is that of greedy accuracy. That of SFT from the base model on counting is not published:
it follows from the two of GRPO-D."""


def method(variant: str) -> str:
    """The paper's name of the method that a variant is."""
    return "sft" if variant in SFT else variant
