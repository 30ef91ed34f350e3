"""TRL's GRPOTrainer with our loss against TRL's own, on one model, text and vision."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction as TRLFunction
from trl.trainer import utils as trl_utils

from mr1_fast import integrations
from mr1_fast.integrations import trl as ours
from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer
from mr1_fast.model.tiny import tiny_processor

from .models import tiny_policy

LOSS_TYPES = list(ours.AVERAGES)
PROMPT, COMPLETION, B = 7, 6, 6


def text_model(vocabulary: int, **settings):
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"tie_word_embeddings": True, **settings},
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def reward(completion_ids, **kwargs):
    return [float(len(set(ids)) + ids[0] % 3) for ids in completion_ids]


def make(cls, model, processor, folder, **settings):
    defaults = {"max_completion_length": COMPLETION, "num_generations": 4, "per_device_train_batch_size": 4}
    defaults |= {"bf16": False, "per_device_eval_batch_size": 4, "save_strategy": "no"}
    config = GRPOConfig(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **defaults | settings,
    )
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in ("how many", "items")] * 4})
    given = {"train_dataset": data, "eval_dataset": data.select([0, 1]), "processing_class": processor}
    return cls(model, reward_funcs=reward, args=config, **given)


def pictures(processor) -> dict:
    """Prompts of unequal lengths with 0 to 3 images, as GRPOTrainer hands them to the model."""
    from PIL import Image

    sizes, texts = [(56, 56), (84, 56), (56, 112)], ["how many items", "count", "how many of the items are there"]
    counts = [1, 2, 0, 1, 3, 1]
    images = [Image.effect_noise(sizes[i % 3], 40 + 10 * i).convert("RGB") for i in range(sum(counts))]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    prompts = [f"<|im_start|>user\n{picture * n}{texts[i % 3]}<|im_end|>\n" for i, n in enumerate(counts)]
    inputs = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
    keys = torch.zeros(B, COMPLETION, dtype=torch.int64)
    return {
        "prompt_ids": inputs["input_ids"],
        "prompt_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"],
        "image_grid_thw": inputs["image_grid_thw"],
        "mm_token_type_ids": torch.cat([inputs["mm_token_type_ids"], keys], 1),
        "num_images": counts,
    }


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """kind → (TRL's trainer, ours, the prompts): the same weights, the reference's differing from them."""
    processor = tiny_processor()
    made = {}

    def get(kind: str):
        if kind in made:
            return made[kind]
        model = text_model(len(processor.tokenizer)) if kind == "text" else tiny_policy().model
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        processing = processor.tokenizer if kind == "text" else processor
        pair = [
            make(cls, str(folder), processing, folder / "runs", beta=0.1) for cls in (GRPOTrainer, FusedGRPOTrainer)
        ]
        if kind == "text":
            mask = (torch.arange(PROMPT) >= torch.tensor([0, 2, 5, 0, 6, 1])[:, None]).long()
            ids = torch.randint(3, 300, (B, PROMPT), generator=torch.Generator().manual_seed(1))
            prompts = {"prompt_ids": torch.where(mask == 1, ids, 0), "prompt_mask": mask}
        else:
            prompts = pictures(processor)
        made[kind] = (*pair, prompts)
        return made[kind]

    return get


def batch(seed: int, prompts: dict, lengths=(6, 0, 3, 6, 1, 4), **switches) -> dict:
    """A batch of `_compute_loss`: two groups, the second without variance, one completion empty."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return scale * torch.randn(shape, generator=generator)

    mask = (torch.arange(COMPLETION) < torch.tensor(lengths)[:, None]).long()
    inputs = prompts | {
        "completion_ids": torch.where(mask == 1, torch.randint(3, 300, mask.shape, generator=generator), 0),
        "completion_mask": mask,
        "advantages": torch.cat([draw(3), torch.zeros(3)]) if switches.get("zero_variance", True) else draw(B),
        "num_items_in_batch": mask.sum() + 5,
        "ref_per_token_logps": (draw(B, COMPLETION) - 6) * mask,
    }
    if switches.get("off_policy"):
        inputs["old_per_token_logps"] = (draw(B, COMPLETION) - 6) * mask
    if switches.get("tools"):
        inputs["tool_mask"] = torch.randint(0, 2, mask.shape, generator=generator)
    if switches.get("token_advantages"):
        inputs["advantages"] = draw(B, COMPLETION)
    if width := switches.get("is_width"):
        inputs["importance_sampling_ratio"] = draw(B, width, scale=0.3).exp()
    return inputs


def settings_of(trainer, **settings):
    """Set what GRPOTrainer reads in `_compute_loss`; names with a dot are of its arguments."""
    defaults = {
        "loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.1, "use_vllm": False,
        "epsilon_low": 0.2, "epsilon_high": 0.2, "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "_entropy_bonus_enabled": False,
        "vllm_importance_sampling_correction": True, "args.delta": None, "args.use_bias_correction_kl": False,
    }  # fmt: skip
    for name, value in (defaults | settings).items():
        holder = trainer.args if name.startswith("args.") else trainer
        setattr(holder, name.removeprefix("args."), value)
    trainer._metrics["train"].clear()


def run(trainer, inputs: dict, **settings):
    settings_of(trainer, **settings)
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, {name: value[-1] for name, value in trainer._metrics["train"].items()}


def assert_same(ours_run, their_run, tolerance: float = 1e-5):
    (loss, gradients, metrics), (their_loss, their_gradients, their_metrics) = ours_run, their_run
    assert gradients.keys() == their_gradients.keys() and metrics.keys() == their_metrics.keys()
    # Its terms are of the size of the advantages and cancel: on policy, they leave nothing.
    assert abs(loss - their_loss) <= tolerance * max(0.05, abs(their_loss)), (loss, their_loss)
    largest = max(g.abs().max() for g in their_gradients.values())
    assert largest > 1e-4, "nothing is compared"
    for name, right in their_gradients.items():
        # What is 0 but for rounding, as the gradient of a key's bias, is compared with the largest gradient of all.
        scale = max(right.abs().max(), 1e-2 * largest)
        assert (gradients[name] - right).abs().max() <= tolerance * scale, name
    for name, right in their_metrics.items():
        assert metrics[name] == pytest.approx(right, rel=1e-4, abs=1e-5, nan_ok=True), name


CASES = {
    "on policy": ({}, {}),
    "on policy, beta 0": ({"token_advantages": True}, {"beta": 0.0}),
    "off policy": ({"off_policy": True, "zero_variance": False}, {"epsilon_low": 0.3, "epsilon_high": 0.5}),
    "tools, accumulation, bias-corrected KL": (
        {"off_policy": True, "tools": True},
        {"current_gradient_accumulation_steps": 3, "args.use_bias_correction_kl": True},
    ),
    "importance weights per token": ({"off_policy": True, "is_width": COMPLETION}, {"use_vllm": True}),
    "importance weights per sequence": ({"is_width": 1, "token_advantages": True}, {"use_vllm": True}),
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
    plain, fused, prompts = trainers("vision")
    inputs = batch(5, prompts, off_policy=True, zero_variance=False)
    assert_same(run(fused, inputs, loss_type=loss_type), run(plain, inputs, loss_type=loss_type))


def test_in_evaluation(trainers):
    plain, fused, prompts = trainers("text")
    inputs = batch(6, prompts)
    values = []
    for trainer in (fused, plain):
        settings_of(trainer, current_gradient_accumulation_steps=4)
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
    "entropy bonus": {"_entropy_bonus_enabled": True, "entropy_coef": 0.3, "use_adaptive_entropy": False},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.1},
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_is_not_ours_is_trls_with_one_warning(case, trainers):
    plain, fused, prompts = trainers("text")
    inputs = batch(9, prompts, off_policy=True, zero_variance=False)
    integrations.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [run(fused, inputs, **FALLBACKS[case]) for _ in range(2)]
        assert not fused.fused
    said = [str(each.message) for each in caught if "TRL's own loss" in str(each.message)]
    assert len(said) == 1 and case.split()[0] in said[0]
    assert_same(results[1], run(plain, inputs, **FALLBACKS[case]))


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


def test_a_subclass_that_scores_tokens_itself_keeps_its_scores(trainers, monkeypatch):
    """On TRL's trainer the same mixin gives the same numbers."""
    plain, fused, prompts = trainers("text")

    class Halved:
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            logp, entropy, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            return logp / 2, entropy, aux_loss

    inputs = batch(13, prompts, off_policy=True)
    for trainer in (plain, fused):
        monkeypatch.setattr(trainer, "__class__", type("Own", (Halved, type(trainer)), {}))
    integrations.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="a subclass scores tokens itself"):
        results = run(fused, inputs)
    assert_same(results, run(plain, inputs))


def test_a_bf16_body_with_an_fp32_head(trainers):
    """TRL projects in the dtype of the hidden states."""
    plain, fused, prompts = trainers("text")
    inputs = batch(14, prompts)
    with torch.autocast("cpu", torch.bfloat16):  # hidden states in bf16
        losses = [run(trainer, inputs)[0] for trainer in (fused, plain)]
    assert fused.fused
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-4)


def test_where_trls_kl_overflows_ours_is_bounded(trainers):
    """TRL: exp(ref − logp) of a log-ratio of 100 is inf, its loss with it. Here the log-ratio is held at ±20."""
    plain, fused, prompts = trainers("text")
    inputs = batch(11, prompts)
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + 100.0 * inputs["completion_mask"]
    loss, gradients, _ = run(fused, inputs)
    assert fused.fused
    theirs = run(plain, inputs)
    assert not theirs[0].isfinite() and not all(g.isfinite().all() for g in theirs[1].values())
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


RUNS = {
    "lora": {"peft": ["q_proj", "v_proj"], "beta": 0.1},
    "lora, trained head": {"peft": ["q_proj"], "modules_to_save": ["lm_head"], "tie_word_embeddings": False},
    "checkpointing, evaluation": {
        "gradient_checkpointing": True,
        "beta": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    },
    "autocast": {"bf16": True, "beta": 0.1, "learning_rate": 1e-3},
    "fp32 head of a bf16 model": {"cast_lm_head_to_fp32": True, "dtype": torch.bfloat16, "learning_rate": 1e-3},
    "untied head, per sequence": {"tie_word_embeddings": False, "importance_sampling_level": "sequence"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "beta": 0.1},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == "compiled")) for c in RUNS])
def test_steps_of_training_are_trls(case, tmp_path):
    """Same rollouts, rewards, losses, metrics, weights; every second step is off policy."""
    settings = dict(RUNS[case])
    processor = tiny_processor()
    dtype, tied = settings.pop("dtype", torch.float32), settings.pop("tie_word_embeddings", True)
    text_model(len(processor.tokenizer), tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path)
    targets, saved, runs = settings.pop("peft", None), settings.pop("modules_to_save", None), []
    for cls in (FusedGRPOTrainer, GRPOTrainer):
        torch._dynamo.reset()
        model = str(tmp_path)
        if targets or dtype != torch.float32:
            model = Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        if targets:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=saved))
        options = {"gradient_checkpointing": False, "max_steps": 4, "learning_rate": 1e-2, "num_iterations": 2}
        trainer = make(cls, model, processor.tokenizer, tmp_path / "runs", **options | settings)
        assert getattr(trainer, "fused", True), trainer._why_not_fused()
        trainer.train()
        runs.append((trainer.state.log_history, {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}))
    (logged, weights), (right_logged, right_weights) = runs
    exact = dtype == torch.float32 and not settings.get("bf16")
    tolerance = {"rel": 1e-3, "abs": 1e-5} if exact else {"rel": 0.03, "abs": 0.03}
    steps = [entry for entry in right_logged if "grad_norm" in entry]
    assert len(steps) == 4 and abs(steps[1]["loss"]) > 1e-3 and steps[-1]["grad_norm"] > 1e-3
    for mine, theirs in zip(logged, right_logged, strict=True):
        assert mine.keys() == theirs.keys()
        for name in [
            name for name in mine if "runtime" not in name and "per_second" not in name and "time" not in name
        ]:
            assert mine[name] == pytest.approx(theirs[name], nan_ok=True, **tolerance), name
    for name, right in right_weights.items():
        assert torch.allclose(weights[name], right, rtol=0.02, atol=5e-3), name


def test_a_scaled_head_is_left_to_trl(tmp_path):
    processor = tiny_processor()
    text_model(len(processor.tokenizer), logit_scale=0.5).save_pretrained(tmp_path)
    plain, fused = (
        make(cls, str(tmp_path), processor.tokenizer, tmp_path / "runs", beta=0.1)
        for cls in (GRPOTrainer, FusedGRPOTrainer)
    )
    mask = torch.ones(B, PROMPT, dtype=torch.int64)
    inputs = batch(12, {"prompt_ids": mask * 5, "prompt_mask": mask}, off_policy=True)
    integrations.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="has logit_scale"):
        results = run(fused, inputs)
    assert_same(results, run(plain, inputs))


@pytest.mark.parametrize("cls", [GRPOTrainer, FusedGRPOTrainer])
@pytest.mark.parametrize("lora", [False, True])
def test_the_schedule_reaches_a_trainer_that_began_at_beta_0(cls, lora, tmp_path):
    processor = tiny_processor()
    model = text_model(len(processor.tokenizer))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), "own")
    start = copy.deepcopy(model)
    options = {"max_steps": 10, "learning_rate": 1e-2, "steps_per_generation": 2, "num_iterations": 2}
    trainer = make(cls, model, processor.tokenizer, tmp_path, **options)
    assert trainer.beta == 0 and trainer.ref_model is None
    trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.0, beta_max=0.02))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "beta" in entry]
    betas = [0.01, 0.01 * 2 / 3, 0.01 / 3, 0.0, *(0.02 * k / 7 for k in range(1, 7))]  # w = 3 of t = 10 steps
    assert [entry["beta"] for entry in logged] == pytest.approx(betas, abs=1e-12)
    assert all("kl" in entry for entry in logged) and logged[-1]["kl"] > 1e-3

    # The reference is the model as it was.
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        if lora:
            trainer.model.set_adapter("ref")
        reference = trainer.model if lora else trainer.ref_model
        arguments = (ids, torch.ones_like(ids), 4)
        logp, *_ = trainer._get_per_token_logps_and_entropies(reference, *arguments)
        expected = start(input_ids=ids).logits[:, -5:-1].log_softmax(-1).gather(-1, ids[:, -4:, None])[..., 0]
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)


def test_a_bad_schedule_is_refused_before_training(trainers):
    _, fused, _ = trainers("text")
    with pytest.raises(ValueError, match="beta_min"):
        DynamicKLCallback(fused, beta_min=0.2, beta_max=0.1)


def test_an_untested_version_gives_one_warning(monkeypatch):
    integrations.warn_once.cache_clear()
    monkeypatch.setattr(integrations, "version", lambda package: "9.1")
    with pytest.warns(UserWarning, match=r"trl 9\.1 is installed, mr1_fast was tested with trl>=1\.16,<1\.17") as said:
        for _ in range(2):
            integrations.check_version("trl")
    assert len(said) == 1


# --- the functions ------------------------------------------------------------------------------------------------


def leaf(*shape, seed: int = 0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


@pytest.mark.parametrize("cut", ["whole", "slice", "rows"])
@pytest.mark.parametrize("k", [None, 3])
def test_selective_log_softmax_is_trls(k, cut):
    logits = leaf(3, 5, 131)
    view = {"whole": logits, "slice": logits[:, :-1], "rows": logits.reshape(-1, 131)}[cut]
    shape = view.shape[:-1] + ((k,) if k else ())
    index = torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(1))
    row_mask = torch.arange(view[..., 0].numel()).view(view.shape[:-1]) % 3 > 0
    row_mask = row_mask if k is None else row_mask.unsqueeze(-1).expand(index.shape)  # as TRL takes it
    for options in ({}, {"temperature": 0.6}, {"row_mask": row_mask}):
        results = []
        for function in (ours.selective_log_softmax, trl_utils.selective_log_softmax):
            value = function(view, index, **options)
            factors = torch.arange(1.0, value.numel() + 1).view(value.shape)
            results.append((value, *torch.autograd.grad((factors * value).sum(), logits, retain_graph=True)))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", ["whole", "slice"])
def test_entropy_is_trls(cut):
    logits = leaf(3, 5, 131)
    view = logits if cut == "whole" else logits[:, 1:-1]
    index = torch.zeros(view.shape[:-1], dtype=torch.int64)
    results = []
    for module in (ours, trl_utils):
        entropy = module.entropy_from_logits(view, chunk_size=4)
        both = module.selective_log_softmax_and_entropy(view, index, True, 0.8, index == 0)
        total = entropy.square().sum() + sum(each.sum() for each in both)
        results.append((entropy, *both, *torch.autograd.grad(total, logits)))
        assert not module.selective_log_softmax_and_entropy(view, index, False)[1].requires_grad
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_autograd_function_is_trls(scale, with_bias):
    # Logits near 0: TRL's entropy, log Z − E[z], loses digits where those are large.
    leaves = [leaf(11, 8), (0.1 * leaf(131, 8, seed=1)).detach().requires_grad_()]
    leaves.append(leaf(131, seed=2) if with_bias else None)
    targets = torch.randint(0, 131, (11,), generator=torch.Generator().manual_seed(3))
    results = []
    for function in (ours.ChunkedLogProbFunction, TRLFunction):
        logp, entropy, *rest = function.apply(*leaves, targets, 0.7, 64, None, scale, ("log_probs", "entropy"))
        assert rest == [None] * 3
        total = (logp * targets).sum() + entropy.square().sum()
        results.append((logp, entropy, *torch.autograd.grad(total, [each for each in leaves if each is not None])))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_further_outputs_are_trls_own():
    arguments = (leaf(5, 8), leaf(131, 8, seed=1), None, torch.arange(5), 0.7, 64, 30.0)
    integrations.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="is_top1"):
        results = ours.ChunkedLogProbFunction.apply(*arguments)
    for mine, theirs in zip(results, TRLFunction.apply(*arguments), strict=True):
        assert torch.equal(mine, theirs)
