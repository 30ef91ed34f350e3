"""TRL's GRPOTrainer with our loss, compared with TRL's own on the same model, text and vision."""

import functools
import warnings

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer

from mr1_fast import integrations
from mr1_fast.integrations.loss_options import AVERAGES
from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.tiny import family_processor, tiny_processor

from ..data.models import small_text_model, tiny_policy
from ..data.trl import (
    COMPLETION,
    PROMPT,
    B,
    assert_same,
    batch,
    image_prompts,
    make_trainer,
    run,
    set_up,
    text_prompts,
)

LOSS_TYPES = list(AVERAGES)


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """kind → (TRL's trainer, ours, prompts): both have the same weights, and another reference.

    The kind is a family, or "text" for a small Qwen2; where it sees, prompts have images.
    """
    made = {}

    def get(kind: str):
        if kind in made:
            return made[kind]
        processor = tiny_processor() if kind == "text" else family_processor(FAMILIES[kind])
        tokenizer, sees = processor.tokenizer, processor.image_processor and kind != "text"
        model = (
            small_text_model(len(tokenizer)) if kind == "text" else tiny_policy(family=kind).model
        )
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        options = {"beta": 0.1, "temperature": 0.7}
        pair = [
            make_trainer(
                cls, str(folder), processor if sees else tokenizer, folder / "runs", **options
            )
            for cls in (GRPOTrainer, FusedGRPOTrainer)
        ]
        made[kind] = (*pair, image_prompts(processor) if sees else text_prompts())
        return made[kind]

    return get


CASES = {
    "on policy": ({}, {}),
    "on policy, beta 0": ({"token_advantages": True}, {"beta": 0.0}),
    "off policy": (
        {"off_policy": True, "zero_variance": False},
        {"epsilon_low": 0.3, "epsilon_high": 0.5},
    ),
    "tools, accumulation, bias-corrected KL": (
        {"off_policy": True, "tools": True},
        {"current_gradient_accumulation_steps": 3, "args.use_bias_correction_kl": True},
    ),
    "importance weights per token": (
        {"off_policy": True, "is_width": COMPLETION},
        {"use_vllm": True},
    ),
    "importance weights per sequence": (
        {"is_width": 1, "token_advantages": True},
        {"use_vllm": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradients_and_metrics_are_trls(loss_type, level, case, trainers):
    plain, fused, prompts = trainers("text")
    switches, settings = CASES[case]
    inputs = batch(3, prompts, **switches)
    if loss_type == "cispo" and "epsilon_high" in settings:
        settings = settings | {"epsilon_high": 5.0}
    settings = settings | {"loss_type": loss_type, "importance_sampling_level": level}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        results = run(fused, inputs, **settings)
    assert fused.fused
    assert_same(results, run(plain, inputs, **settings))


@pytest.mark.parametrize("loss_type", [t for t in LOSS_TYPES if t not in ("cispo", "sapo")])
def test_two_sided_clip(loss_type, trainers):
    plain, fused, prompts = trainers("text")
    inputs = batch(4, prompts, off_policy=True, zero_variance=False)
    settings = {"loss_type": loss_type, "args.delta": 1.4}
    assert_same(run(fused, inputs, **settings), run(plain, inputs, **settings))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_with_images(loss_type, trainers):
    plain, fused, prompts = trainers("qwen2_vl")
    inputs = batch(5, prompts, off_policy=True, zero_variance=False)
    assert_same(run(fused, inputs, loss_type=loss_type), run(plain, inputs, loss_type=loss_type))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, trainers):
    plain, fused, prompts = trainers(family)
    assert ("pixel_values" in prompts) == (FAMILIES[family].vision is not None)
    inputs = batch(15, prompts, off_policy=True, zero_variance=False)
    ours = run(fused, inputs)
    assert fused.fused and len(ours[1]) == len([*fused.model.parameters()])
    assert_same(ours, run(plain, inputs))


def test_in_evaluation(trainers):
    plain, fused, prompts = trainers("text")
    inputs = batch(6, prompts)
    values = []
    for trainer in (fused, plain):
        set_up(trainer, current_gradient_accumulation_steps=4)
        trainer.model.eval()
        with torch.no_grad():
            values.append(trainer._compute_loss(trainer.model, inputs).item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_nothing_to_learn_from(trainers):
    _, fused, prompts = trainers("text")
    loss, gradients, _ = run(fused, batch(7, prompts, lengths=(0,) * B))
    assert loss == 0 and gradients
    assert all((g == 0).all() for g in gradients.values())


def test_only_rows_with_loss_reach_the_lm_head(trainers):
    from torch.utils._python_dispatch import TorchDispatchMode

    _, fused, prompts = trainers("text")
    inputs = batch(8, prompts)
    v = fused.model.config.vocab_size
    projected, others = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            output = function(*arguments, **keywords or {})
            if "linear_grpo_loss" in str(function):
                projected.append(arguments[0].shape[0])
            elif isinstance(output, torch.Tensor) and output.ndim > 1 and output.shape[-1] == v:
                others.append(function)
            return output

    with Watch():
        run(fused, inputs)
    assert projected == [inputs["completion_mask"].sum()] and not others


FALLBACKS = {
    "vespo": {"loss_type": "vespo"},
    "entropy bonus": {
        "_entropy_bonus_enabled": True,
        "entropy_coef": 0.3,
        "use_adaptive_entropy": False,
    },
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.1},
}


def assert_trls_own(plain, fused, inputs: dict, because: str, **settings) -> None:
    """TRL's numbers, and one warning for two losses."""
    integrations.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(fused, inputs, **settings) for _ in range(2)]
        assert not fused.fused
    said = [str(each.message) for each in caught if "TRL's own loss" in str(each.message)]
    assert len(said) == 1 and because in said[0]
    assert_same(results[1], run(plain, inputs, **settings))


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_not_ours_is_trls_with_one_warning(case, trainers):
    plain, fused, prompts = trainers("text")
    inputs = batch(9, prompts, off_policy=True, zero_variance=False)
    assert_trls_own(plain, fused, inputs, case.split()[0], **FALLBACKS[case])


def test_a_formula_of_trl_that_we_do_not_know_takes_over(trainers, monkeypatch):
    plain, fused, prompts = trainers("text")
    inputs = batch(10, prompts)  # on policy: the value of the loss is hardly anything
    known = GRPOTrainer._compute_loss
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda *arguments: 3 * known(*arguments))
    with pytest.warns(UserWarning, match="this TRL computes something else"):
        results = run(fused, inputs)
    assert not fused.fused
    fused._disagrees = None
    loss, gradients, _ = run(plain, inputs)
    torch.testing.assert_close(results[0], loss)
    torch.testing.assert_close(results[1], gradients, rtol=1e-4, atol=1e-6)


class Halved:
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        logp, entropy, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return logp / 2, entropy, aux_loss


class Penalised:
    """The loss has the gradient of TRL's by the log-probs, and another one by the weights."""

    def _compute_loss(self, model, inputs):
        penalty = sum(weight.square().sum() for weight in model.parameters())
        return super()._compute_loss(model, inputs) + 0.01 * penalty


@pytest.mark.parametrize(
    ("mixin", "bases", "because"),
    [
        (Halved, (Halved, FusedGRPOTrainer), "a subclass scores tokens itself"),
        (Halved, (FusedGRPOTrainer, Halved, GRPOTrainer), "a parent class scores tokens itself"),
        (Penalised, (FusedGRPOTrainer, Penalised, GRPOTrainer), "a parent class computes the loss"),
    ],
)
def test_a_class_with_its_own_scores_or_loss_keeps_them(
    mixin, bases, because, trainers, monkeypatch
):
    """On TRL's trainer the same mixin gives the same numbers."""
    plain, fused, prompts = trainers("text")
    inputs = batch(13, prompts, off_policy=True)
    monkeypatch.setattr(plain, "__class__", type("Own", (mixin, GRPOTrainer), {}))
    monkeypatch.setattr(fused, "__class__", type("Own", bases, {}))
    assert_trls_own(plain, fused, inputs, because)


def test_a_subclass_that_adds_to_the_fused_loss_has_both(trainers, monkeypatch):
    plain, fused, prompts = trainers("text")
    inputs = batch(13, prompts, off_policy=True)
    for trainer in (plain, fused):
        monkeypatch.setattr(trainer, "__class__", type("Own", (Penalised, type(trainer)), {}))
    assert_same(run(fused, inputs), run(plain, inputs))
    assert fused.fused


def test_a_bf16_body_with_an_fp32_head(trainers):
    """TRL projects in the dtype of the hidden states."""
    plain, fused, prompts = trainers("text")
    inputs = batch(14, prompts)
    with torch.autocast("cpu", torch.bfloat16):  # hidden states in bf16
        losses = [run(trainer, inputs)[0] for trainer in (fused, plain)]
    assert fused.fused
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-4)


def test_where_trls_kl_overflows_ours_is_bounded(trainers):
    """TRL's exp(ref − logp) of a log-ratio of 100 makes the loss inf; ours bounds it at ±20."""
    plain, fused, prompts = trainers("text")
    inputs = batch(11, prompts)
    inputs["ref_per_token_logps"] = (
        inputs["ref_per_token_logps"] + 100.0 * inputs["completion_mask"]
    )
    loss, gradients, _ = run(fused, inputs)
    assert fused.fused
    theirs = run(plain, inputs)
    assert not theirs[0].isfinite() and not all(g.isfinite().all() for g in theirs[1].values())
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_a_scaled_head_is_left_to_trl(tmp_path):
    processor = tiny_processor()
    small_text_model(len(processor.tokenizer), logit_scale=0.5).save_pretrained(tmp_path)
    plain, fused = (
        make_trainer(cls, str(tmp_path), processor.tokenizer, tmp_path / "runs", beta=0.1)
        for cls in (GRPOTrainer, FusedGRPOTrainer)
    )
    mask = torch.ones(B, PROMPT, dtype=torch.int64)
    inputs = batch(12, {"prompt_ids": mask * 5, "prompt_mask": mask}, off_policy=True)
    assert_trls_own(plain, fused, inputs, "has logit_scale")


def test_a_head_that_another_process_refuses_is_trls_here_too(trainers, monkeypatch):
    _, fused, _ = trainers("text")
    model = small_text_model(97)
    model.forward = functools.partial(model.forward)  # as TRL puts one of its own there
    before = vars(model).get("forward")
    monkeypatch.setattr(fused.accelerator, "reduce", lambda refused, how: refused + 1)
    try:
        fused.fuse_head(model)
        assert not fused.fused and "in another process" in fused._no_head
    finally:
        fused._no_head = None
    assert vars(model).get("forward") is before


def test_a_bad_schedule_is_refused_before_training(trainers):
    _, fused, _ = trainers("text")
    with pytest.raises(ValueError, match="beta_min"):
        DynamicKLCallback(fused, beta_min=0.2, beta_max=0.1)


def test_an_untested_version_gives_one_warning(monkeypatch):
    integrations.warn_once.cache_clear()
    monkeypatch.setattr(integrations, "version", lambda package: "9.1")
    with pytest.warns(
        UserWarning, match=r"trl 9\.1 is installed, mr1_fast was tested with trl>=1\.16,<1\.17"
    ) as said:
        for _ in range(2):
            integrations.check_version("trl")
    assert len(said) == 1
