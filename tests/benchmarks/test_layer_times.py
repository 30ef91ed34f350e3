"""Every way to compute a layer gives the same, and is timed beside its matrix products."""

from argparse import Namespace

import pytest
import torch
from layer_counts import Setting
from layer_parts import QUICK_WORK, TEXT, TRAINING, VISION, real_part
from layer_times import LIMIT, TIMED, prepare, print_timed, products_case, time_setting
from layer_variants import ADDED, FORWARD, RECOMPUTED, STORED, VARIANTS, Way, pieces, run_pass

ARGUMENTS = Namespace(device="cpu", quick=True, rounds=1)


def tiny(kind: str, training: str = "all weights"):
    torch.manual_seed(0)
    return real_part("tiny", kind, training, "cpu", torch.float32, QUICK_WORK)


def passes(part, way: Way, *names: str) -> list[torch.Tensor]:
    """The output, the input's gradient and all weights' gradients after some passes."""
    gradient = torch.randn(part.x.shape, generator=torch.Generator().manual_seed(1))
    part.layer.zero_grad(set_to_none=True)
    for name in names:
        outputs, received = run_pass(name, way, pieces(way, part.x), gradient)
    return [sum(outputs).detach(), *received[:1], *(p.grad.clone() for p in part.trained)]


@pytest.mark.parametrize("kind", [TEXT, VISION])
def test_recomputation_changes_nothing_and_gradients_are_added(kind):
    part = tiny(kind)
    way = VARIANTS["transformers"](part)
    stored, recomputed, twice = (
        passes(part, way, *names) for names in ([STORED], [RECOMPUTED], [STORED, ADDED])
    )
    assert len(stored) > 10 and all(map(torch.equal, stored, recomputed))
    for one, two in zip(stored[2:], twice[2:], strict=True):
        torch.testing.assert_close(two, 2 * one)
    with torch.no_grad():
        (output,), received = run_pass(FORWARD, way, pieces(way, part.x), part.x)
    assert torch.equal(output, stored[0]) and received == []


def test_a_variant_may_keep_hidden_states_as_a_sum():
    part = tiny(TEXT)

    def call(residual, update):
        (out,) = VARIANTS["transformers"](part).call(residual + update)
        return residual, out - residual

    split, whole = (
        passes(part, way, RECOMPUTED)
        for way in (Way(call, pieces=2), VARIANTS["transformers"](part))
    )
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b)


def test_a_variant_that_differs_shows_and_one_that_fails_is_left_out(monkeypatch):
    def wrong(part):
        return Way(lambda x: (part.call(part.layer, x) * 1.5,))

    def broken(part):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(VARIANTS, "wrong", wrong)
    monkeypatch.setitem(VARIANTS, "broken", broken)
    skipped = {}
    found = prepare(tiny(VISION), ["transformers", "wrong", "broken"], skipped)
    assert set(found.off["transformers"].values()) == {0.0}
    assert found.off["wrong"] == pytest.approx(dict.fromkeys(("output", "input", "weights"), 0.5))
    assert skipped == {"broken": "RuntimeError: no such kernel"}


@pytest.mark.parametrize("training", TRAINING)
def test_a_layer_is_timed_beside_its_products(training, capsys):
    result = time_setting(Setting("tiny", training, TEXT), ARGUMENTS, ["transformers"])
    rows = {row["variant"]: row["passes"] for row in result["rows"]}
    assert list(rows) == ["transformers", LIMIT]
    for name in TIMED:
        ours, limit = rows["transformers"][name], rows[LIMIT][name]
        assert ours["of_products"] == limit["median"] / ours["median"] and limit["mfu"] > 0
    print_timed(result)
    assert "| transformers |" in capsys.readouterr().out


@pytest.mark.parametrize("training", ["LoRA", "LoRA on 4 bits"])
def test_adapters_alone_are_trained_and_get_gradients(training):
    part = tiny(TEXT, training)
    names = [name for name, p in part.layer.named_parameters() if p.requires_grad]
    assert len(names) == 14 and all("lora_" in name for name in names)
    gradients = passes(part, VARIANTS["transformers"](part), RECOMPUTED)[2:]
    assert all(gradient.norm() > 0 for gradient in gradients)
    in_4_bits = {p.dtype for p in part.layer.parameters() if not p.requires_grad}
    assert (torch.uint8 in in_4_bits) == (training == "LoRA on 4 bits")


def test_products_alone_are_those_of_the_pass():
    from count_kernels import Product

    products = [Product(3, 5, 7, torch.float32), Product(3, 5, 7, torch.float32, 2, (True, True))]
    out, gradients = products_case(products, "cpu", torch.float32).call()
    assert out.shape == (3, 7) and gradients == []
