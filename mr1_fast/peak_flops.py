"""The peak FLOP/s of graphics cards, by which model FLOP utilisation (MFU) is measured.

A peak is that of dense products of 16-bit matrices on tensor cores with sums in fp32, at the boost
clock, as NVIDIA publishes it; figures "with sparsity" are twice as high. A GeForce card sums in
fp32 at half of its rate for sums in fp16, which its "AI TOPS" advertise, and a card may run above
or below its boost clock, so an MFU compares runs on the same card best.

A card is known by the whole name that torch.cuda.get_device_name gives: a laptop's card, a part of
a card (MIG) or a variant for one market has another name and another peak.
"""

TERA = 1e12

BF16_AND_FP16 = {
    # White papers: NVIDIA Ampere GA102, V2 (3070, 3080, 3090), and NVIDIA Ada, V2.02 (3080 Ti and
    # 3090 Ti). The other GeForce cards by the formula that gives the figures of all white papers:
    # tensor cores · 128 FLOP · boost clock, with NVIDIA's numbers of cores and clocks.
    # A 3080 with 12 GB, whose peak is 61.3, has the same name as that with 10 GB.
    "GeForce RTX 3060": 25.5,
    "GeForce RTX 3060 Ti": 32.4,
    "GeForce RTX 3070": 40.6,
    "GeForce RTX 3070 Ti": 43.5,
    "GeForce RTX 3080": 59.5,
    "GeForce RTX 3080 Ti": 68.2,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 3090 Ti": 80.0,
    # White paper: NVIDIA Ada, V2.02 (4080, 4090).
    "GeForce RTX 4060": 30.2,
    "GeForce RTX 4060 Ti": 44.1,
    "GeForce RTX 4070": 58.3,
    "GeForce RTX 4070 SUPER": 71.0,
    "GeForce RTX 4070 Ti": 80.2,
    "GeForce RTX 4070 Ti SUPER": 88.2,
    "GeForce RTX 4080": 97.5,
    "GeForce RTX 4080 SUPER": 104.4,
    "GeForce RTX 4090": 165.2,
    # White paper: NVIDIA RTX Blackwell, V1.1 (5080, 5090).
    "GeForce RTX 5070": 61.7,
    "GeForce RTX 5070 Ti": 87.9,
    "GeForce RTX 5080": 112.6,
    "GeForce RTX 5090": 209.5,
    # Workstations. White papers: NVIDIA Ampere GA102, V2, and NVIDIA Ada for professionals, V1.1.
    "RTX A6000": 154.8,
    "RTX 6000 Ada Generation": 364.2,
    # Servers: the data sheet of each.
    "A10": 125.0,
    "A40": 149.7,
    "A100-PCIE-40GB": 312.0,
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100 80GB HBM3": 989.4,  # the module SXM5
    "H200": 989.4,
    "H200 NVL": 835.5,
    "B200": 2250.0,
}
"""TFLOP/s of cards whose tensor cores compute bf16 as fast as fp16."""

FP16_ALONE = {
    # Their data sheets.
    "T4": 65.0,
    "V100-PCIE-16GB": 112.0,
    "V100-PCIE-32GB": 112.0,
    "V100-SXM2-16GB": 125.0,
    "V100-SXM2-32GB": 125.0,
}
"""TFLOP/s of cards whose tensor cores compute fp16 alone."""


def peak_flops(card: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a card in `bfloat16` or `float16`, or None where it is not known.

    `card` is the name by torch.cuda.get_device_name, `dtype` that of the weights. Products of fp32
    matrices have no peak here: which units compute them depends on torch's settings.
    """
    name = card.removeprefix("NVIDIA ").removeprefix("Tesla ")
    tables = {"bfloat16": BF16_AND_FP16, "float16": BF16_AND_FP16 | FP16_ALONE}
    peak = tables.get(dtype, {}).get(name)
    return None if peak is None else peak * TERA


def describe_peak(card: str, dtype: str) -> str:
    """Say in one sentence what the peak of a card in a dtype is, or that no MFU can be reported."""
    peak = peak_flops(card, dtype)
    if peak is None:
        return f"MFU is not reported: the peak of {card} in {dtype} is not in peak_flops.py."
    return f"MFU is a share of {peak / TERA:g} TFLOP/s, the peak of {card} in {dtype}."
