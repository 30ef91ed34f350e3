"""The table of peaks by card."""

import pytest

from mr1_fast.peak_flops import BF16_AND_FP16, describe_peak, peak_flops

GEFORCE = {
    "RTX 3060": (112, 1777),
    "RTX 3060 Ti": (152, 1665),
    "RTX 3070": (184, 1725),
    "RTX 3070 Ti": (192, 1770),
    "RTX 3080": (272, 1710),
    "RTX 3080 Ti": (320, 1665),
    "RTX 3090": (328, 1695),
    "RTX 3090 Ti": (336, 1860),
    "RTX 4060": (96, 2460),
    "RTX 4060 Ti": (136, 2535),
    "RTX 4070": (184, 2475),
    "RTX 4070 SUPER": (224, 2475),
    "RTX 4070 Ti": (240, 2610),
    "RTX 4070 Ti SUPER": (264, 2610),
    "RTX 4080": (304, 2505),
    "RTX 4080 SUPER": (320, 2550),
    "RTX 4090": (512, 2520),
    "RTX 5070": (192, 2512),
    "RTX 5070 Ti": (280, 2452),
    "RTX 5080": (336, 2617),
    "RTX 5090": (680, 2407),
}
"""Tensor cores and boost clock in MHz of each desktop card, from NVIDIA's specifications."""
SERVERS = {
    "V100-SXM2-32GB": (640, 1530, 128),
    "T4": (320, 1590, 128),
    "A100-SXM4-80GB": (432, 1410, 512),
    "RTX A6000": (336, 1800, 256),
    "A10": (288, 1695, 256),
    "A40": (336, 1740, 256),
    "L4": (232, 2040, 256),
    "RTX 6000 Ada Generation": (568, 2505, 256),
    "H100 PCIe": (456, 1620, 1024),
    "H100 80GB HBM3": (528, 1830, 1024),
}
"""The same of other cards, and the FLOP of a tensor core in a cycle."""


def test_geforce_figures_follow_from_cores_and_clock():
    peaks = {name: peak for name, peak in BF16_AND_FP16.items() if name.startswith("GeForce ")}
    expected = {f"GeForce {name}": cores * 128e-6 * mhz for name, (cores, mhz) in GEFORCE.items()}
    assert peaks == pytest.approx(expected, rel=3e-3)


def test_figures_of_other_cards_follow_from_cores_and_clock():
    for name, (cores, mhz, flop) in SERVERS.items():
        assert peak_flops(name, "float16") == pytest.approx(cores * flop * mhz * 1e6, rel=3e-3)


@pytest.mark.parametrize(
    "name, dtype, tera",
    [
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("GeForce RTX 3090", "bfloat16", 71.0),  # as older drivers say it
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("Tesla T4", "float16", 65.0),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
    ],
)
def test_a_card_is_found_by_the_name_that_its_driver_gives(name, dtype, tera):
    assert peak_flops(name, dtype) == pytest.approx(tera * 1e12)
    assert describe_peak(name, dtype) == (
        f"MFU is a share of {tera:g} TFLOP/s, the peak of {name} in {dtype}."
    )


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA A100-SXM-64GB", "bfloat16"),
        ("AMD Instinct MI300X", "bfloat16"),
        ("Tesla T4", "bfloat16"),  # its tensor cores know no bf16
        ("NVIDIA GeForce RTX 4090", "float32"),
    ],
)
def test_no_peak_is_guessed(name, dtype):
    assert peak_flops(name, dtype) is None
    assert describe_peak(name, dtype) == (
        f"MFU is not reported: the peak of {name} in {dtype} is not in peak_flops.py."
    )
