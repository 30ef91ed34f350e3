"""The trainer's objectives: every combination of settings is TRL's to rounding, or is refused.

The batch of a step comes from TRL's own scoring of given completions, and its loss from TRL's own
`_compute_loss`; ours are `group_advantages`, `pack_rollout` and `grpo_batch_loss`. Both compute on
the same hidden states and head, in fp64.
"""

from functools import cache
from itertools import combinations, product
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOTrainer

from mr1_fast.advantages import group_advantages
from mr1_fast.config import ObjectiveConfig, TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.kernels.grpo.reference import token_logprobs_ref
from mr1_fast.model.tiny import tiny_processor
from mr1_fast.stages import grpo_batch_loss, pack_rollout
from mr1_fast.types import Prompt, Rollout

from .data.models import given_policy, small_text_model
from .data.trl import make_trainer, set_up

LENGTHS = (6, 3, 1, 5, 2, 6, 4, 6)
"""Tokens of each completion; the first and the last are cut, the others end with EOS."""
GROUPS, SIZE, MOST = 2, 4, 6
FEW = 12
"""Tokens of a pack, with which groups are split over packs."""
D, V, EOS = 8, 40, 4
BETA, TEMPERATURE, ENTROPY = 0.3, 0.7, 0.02
MASKED_AND_ENTROPY = ((False, 0.0), (True, 0.0), (True, ENTROPY))
TRL_SCALES = {"group-std": "group", "batch-std": "batch", "group-mean": "none"}
CHOICES = {
    name: get_args(get_args(get_type_hints(ObjectiveConfig)[name])[0])
    for name in ("loss_type", "surrogate", "ratio", "advantage")
}
OBJECTIVES = list(
    product(CHOICES["loss_type"], CHOICES["surrogate"], CHOICES["ratio"], (None, 1.5))
)


def is_trls(loss_type: str, surrogate: str, ratio: str, delta: float | None) -> bool:
    """Whether TRL has this objective: one loss_type of its names average and surrogate at once.

    luspo is said there to need ratios per sequence.
    """
    if surrogate == "cispo":
        return loss_type == "dapo" and delta is None
    if surrogate == "sapo":
        return loss_type == "grpo" and delta is None
    return loss_type != "luspo" or ratio == "sequence"


class Step:
    """A step's completions with hidden states (N, D) of their tokens, and a head (V, D)."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)

        def normal(*shape, scale=1.0):
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.completions = [torch.randint(5, V, (n,), generator=generator) for n in LENGTHS]
        for ids in self.completions[1:-1]:
            ids[-1] = EOS
        self.rewards = torch.tensor([[0.0, 0.5, 1.0, 2.0], [0.0, 1.0, 0.0, 1.25]])
        self.hidden = normal(sum(LENGTHS), D).requires_grad_()
        self.head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
        self.head.weight.data = normal(V, D)
        logits = self.head(self.hidden).detach()
        logp, _ = token_logprobs_ref(logits, torch.cat(self.completions), TEMPERATURE)
        # Apart for whole completions, so that ratios of sequences are clipped, too: for either sign
        # of the advantage some are too small, some too large, and some neither.
        apart = torch.tensor([-0.9, 0.6, -0.4, 0.7, -0.6, -0.6, -0.1, 0.2], dtype=torch.float64)
        apart = apart.repeat_interleave(torch.tensor(LENGTHS))
        self.rows = {
            "old_logp": logp + apart + normal(len(logp), scale=0.3),
            "ref_logp": logp + normal(len(logp), scale=0.4),
            "is_weights": torch.rand(len(logp), generator=generator, dtype=torch.float64) * 2,
        }

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all rows (N, …) as (B·G, MOST, …), with zeros behind each completion."""
        return torch.nn.utils.rnn.pad_sequence(values.split(LENGTHS), batch_first=True)

    # --- what `_compute_loss` of TRL and `grpo_batch_loss` ask of a model ---

    def trls_logps(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Log-probabilities and entropies of some completions, (…, MOST)."""
        logits = self.head(self.padded(self.hidden)[indices])
        ids = self.padded(torch.cat(self.completions))[indices]
        logp, entropy = token_logprobs_ref(logits.flatten(0, 1), ids.flatten(), TEMPERATURE)
        return logp.view_as(ids), entropy.view_as(ids), None

    @property
    def policy(self) -> SimpleNamespace:
        return given_policy(self.hidden, self.head, LENGTHS)

    def gradients(self, loss: torch.Tensor) -> list[torch.Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.head.weight))]


@pytest.fixture(scope="module")
def step():
    return Step()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory, step):
    """TRL's trainer, which takes the step's completions and rewards for its own."""
    tokenizer, folder = tiny_processor().tokenizer, tmp_path_factory.mktemp("trl")
    small_text_model(len(tokenizer)).save_pretrained(folder)
    trainer = make_trainer(
        GRPOTrainer,
        str(folder),
        tokenizer,
        folder / "runs",
        max_completion_length=MOST,
        num_generations=SIZE,
        per_device_train_batch_size=GROUPS * SIZE,
    )
    completions = [ids.tolist() for ids in step.completions]
    prompts, texts = [[5]] * len(completions), [""] * len(completions)
    trainer.eos_token_ids = [EOS]
    trainer._generate = lambda _: (prompts, completions, None, texts, None, {}, None, None)
    trainer._calculate_rewards = lambda *_: step.rewards.view(-1, 1)
    return trainer


@pytest.fixture(scope="module")
def scored(trainer):
    """(advantage, mask_truncated) → the inputs of `_compute_loss`, made by TRL."""

    @cache
    def make(advantage: str, mask_truncated: bool) -> dict:
        trainer.scale_rewards = TRL_SCALES[advantage]
        trainer.mask_truncated_completions = mask_truncated
        trainer.beta, trainer.use_vllm = 0.0, False  # no log-probabilities: they are given
        trainer.model.train()
        return trainer._generate_and_score_completions([{"prompt": "x"}] * GROUPS * SIZE)

    return make


def trls(trainer, step: Step, scored: dict, config: TrainConfig, beta: float, weighed: bool):
    """TRL's loss and gradients. bnpo's micro-batches are the groups, the others' the whole step."""
    surrogate, clips = config.surrogate, config.surrogate == "clip"
    micro_batches = torch.arange(GROUPS * SIZE)[None]
    if config.loss_type == "bnpo":
        micro_batches = micro_batches.view(GROUPS, SIZE)
    rows = {name: step.padded(values) for name, values in step.rows.items()}
    inputs = scored | {"old_per_token_logps": rows["old_logp"]}
    inputs |= {"ref_per_token_logps": rows["ref_logp"]}
    inputs |= {"importance_sampling_ratio": rows["is_weights"]}
    set_up(
        trainer,
        loss_type=config.loss_type if clips else surrogate,
        importance_sampling_level=config.ratio,
        beta=beta,
        use_vllm=weighed,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high + (surrogate == "cispo"),
        current_gradient_accumulation_steps=len(micro_batches),
        _entropy_bonus_enabled=config.entropy_coefficient > 0,
        entropy_coef=config.entropy_coefficient,
        use_adaptive_entropy=False,
        **{"args.delta": config.clip_delta},
    )
    loss = 0.0
    for part in micro_batches:
        indices = part.tolist()
        trainer._get_per_token_logps_and_entropies = lambda *_, i=indices, **__: step.trls_logps(i)
        sliced = {k: v[indices] if v.ndim else v for k, v in inputs.items()}
        loss = loss + trainer._compute_loss(trainer.model, sliced)
    return step.gradients(loss)


def rollout_of(step: Step) -> Rollout:
    prompts = [Prompt(torch.tensor([5]), torch.zeros(3, 1).long(), 1) for _ in range(GROUPS)]
    reasons = ["eos" if ids[-1] == EOS else "length" for ids in step.completions]
    sampled = [torch.zeros(len(ids)) for ids in step.completions]
    return Rollout([], prompts, step.completions, [], reasons, sampled, SIZE)


def packed(step: Step, config: TrainConfig, beta: float, weighed: bool, tokens_per_pack: int):
    """The trainer's packs, with the log-probabilities that `add_logprobs` puts on their rows."""
    advantages = group_advantages(step.rewards, config.advantage)
    batches = pack_rollout(rollout_of(step), advantages, tokens_per_pack, config)
    unused = {"ref_logp": beta == 0, "is_weights": not weighed}
    batches.add_row_data({k: v for k, v in step.rows.items() if not unused.get(k)})
    return batches


def ours(step: Step, *arguments, tokens_per_pack: int = FEW):
    """The trainer's loss and gradients, summed over its packs; and the share of clipped tokens."""
    config, beta, _ = arguments
    batches = packed(step, *arguments, tokens_per_pack)
    losses = [grpo_batch_loss(step.policy, batch, beta, config) for batch in batches]
    assert tokens_per_pack > FEW or len(batches) > GROUPS  # a group is split over packs
    clipped = torch.cat([metrics["clip_fraction"].values for _, metrics in losses])
    return step.gradients(sum(loss for loss, _ in losses)), clipped.double().mean()


def settings_of(loss_type: str, surrogate: str, ratio: str, delta: float | None) -> dict:
    clip_high = 0.4 if surrogate == "cispo" else 0.28
    names = dict(loss_type=loss_type, surrogate=surrogate, ratio=ratio, clip_delta=delta)
    return names | dict(clip_high=clip_high, max_new_tokens=MOST, temperature=TEMPERATURE)


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], what: tuple) -> None:
    """Assert that losses and gradients are equal; advantages and weights are fp32 in both.

    A loss is a sum of terms of both signs, which are of the size of the advantages.
    """
    for left, right in zip(found, expected, strict=True):
        scale = right.abs().max() if right.ndim else max(0.05, right.abs())
        assert scale > 1e-3, "nothing is compared"
        assert (left - right).abs().max() <= 1e-6 * scale, what


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_an_objective_is_trls_or_refused(objective, trainer, step, scored):
    settings = settings_of(*objective)
    if not is_trls(*objective):
        with pytest.raises(UserError, match=r"^[^.]+( = \d\.\d+)?[^.]*\.$"):  # one sentence
            TrainConfig(**settings).check()
        return
    others = product(CHOICES["advantage"], (0.0, BETA), (False, True), MASKED_AND_ENTROPY)
    for advantage, beta, weighed, (masked, entropy) in others:
        config = TrainConfig(
            **settings, advantage=advantage, mask_truncated=masked, entropy_coefficient=entropy
        )
        if entropy and config.loss_type == "bnpo":
            continue  # TRL's mean of the entropy is one of micro-batches then
        config.check()
        expected = trls(trainer, step, scored(advantage, masked), config, beta, weighed)
        found, clipped = ours(step, config, beta, weighed)
        assert_equal(found, expected, (advantage, beta, weighed, masked, entropy))
        assert clipped > 0.1 or config.surrogate == "sapo"


def test_the_batch_tells_all_objectives_apart(step):
    accepted = [objective for objective in OBJECTIVES if is_trls(*objective)]
    assert (len(OBJECTIVES), len(accepted)) == (60, 22)
    gradients = []
    for objective in accepted:
        config = TrainConfig(**settings_of(*objective), mask_truncated=True)
        (_, gradient, _), _ = ours(step, config, BETA, True, tokens_per_pack=1000)
        gradients.append(gradient.flatten())
    for first, second in combinations(gradients, 2):
        assert (first - second).abs().max() > 1e-3 * second.abs().max()


def test_bnpo_with_an_entropy_takes_its_mean_over_all_tokens(step):
    config = TrainConfig(**settings_of("bnpo", "clip", "token", None), entropy_coefficient=ENTROPY)
    plain = TrainConfig(**settings_of("bnpo", "clip", "token", None))
    with_entropy, _ = ours(step, config, 0.0, False)
    without, _ = ours(step, plain, 0.0, False)
    logits = step.head(step.hidden)
    _, entropy = token_logprobs_ref(logits, torch.cat(step.completions), TEMPERATURE)
    expected = step.gradients(ENTROPY * entropy.mean())
    assert_equal([a - b for a, b in zip(without, with_entropy, strict=True)], expected, ())


@pytest.mark.parametrize("advantage", TRL_SCALES)
def test_advantages_are_trls(advantage, step, scored):
    found = group_advantages(step.rewards, advantage).flatten()
    torch.testing.assert_close(found, scored(advantage, False)["advantages"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if is_trls(*o)], ids=str)
def test_packs_do_not_change_the_loss(objective, step):
    config = TrainConfig(**settings_of(*objective), mask_truncated=True, entropy_coefficient=0.1)
    in_one, _ = ours(step, config, BETA, True, tokens_per_pack=1000)
    assert_equal(ours(step, config, BETA, True)[0], in_one, ())
    batches = packed(step, config, BETA, True, 1000)
    assert len(batches) == 1
    batches.repack(FEW)
    expected = packed(step, config, BETA, True, FEW)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.row_data.keys() == other.row_data.keys()
        assert all(torch.equal(batch.row_data[k], v) for k, v in other.row_data.items())
