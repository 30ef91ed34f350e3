"""The stages of a step: sampling, scoring, packing, log-probabilities, the loss and the update.

`train.py` calls them in this order.
"""

from functools import partial
from types import SimpleNamespace

import torch

from .advantages import equal_groups
from .config import TrainConfig
from .divergence import named
from .loss import GRPOLoss, linear_grpo_loss, spread, token_weights
from .metrics import Largest, Mean, RowMetric
from .model.forward import lm_head_weight
from .model.policy import Policy
from .optim import BatchLoss, update
from .packing import MicroBatches
from .plan.out_of_memory import PACK_TOKENS, ROLLOUT_CACHE
from .rewards import Scores, score
from .rewards.overlong import overlong_rewards
from .rollout.engine import Engine, fitting
from .rollout.sampling import Sampling
from .run import Run
from .seeds import derive_seed
from .segments import cumulative
from .tasks import get_task
from .types import Example, PackedBatch, Prompt, Rollout
from .whole_step import selected

GAP = ("rollout_gap_mean", "rollout_gap_max")
"""Metrics of |log π − log π_rollout|, by which rollout and training differ at the same weights."""


def score_rollout(run: Run, rollout: Rollout, step: int) -> Scores:
    """Reward the completions of a step, as configured.

    No function is called without completions, of which a process has none in a round of few
    prompts.
    """
    config = run.config
    if not rollout.examples:
        names = [*config.reward_weights, *["overlong"] * bool(config.overlong_penalty)]
        return Scores(torch.zeros(0, rollout.num_generations), {name: [] for name in names}, [])
    scores = score(
        rollout.texts,
        rollout.examples,
        config.reward_weights,
        accuracy=get_task(config.task).judge(config.judge, training=True),
        seconds=config.reward_seconds,
        completion_ids=[ids.tolist() for ids in rollout.completions],
        trainer_state=SimpleNamespace(global_step=step, max_steps=config.steps),
    )
    if config.overlong_penalty:
        lengths = list(map(len, rollout.completions))
        penalties = overlong_rewards(lengths, config.max_new_tokens, config.overlong_penalty)
        scores = scores.with_part("overlong", penalties)
    return scores


def sample(
    run: Run,
    examples: list[Example],
    step: int,
    prompts: list[Prompt] | None = None,
    round_: int = 0,
) -> Rollout:
    """Sample G completions of each of this process's examples, in a smaller KV cache if memory runs
    out.

    The same step and round always give the same completions, whatever the size of the cache; only a
    step that replaces groups has rounds after the first, which is 0. `prompts` are the examples as
    `run.policy.encode` gives them, where they have been encoded.
    """
    config, policy = run.config, run.policy
    # The next step's prompts do not begin beside the last samples of this one, as an evaluation's
    # batches do: this step's update changes the weights, and their keys would be of the old ones.
    prompts = policy.encode.many(examples) if prompts is None else prompts
    draw = ("rollout", step, round_) if round_ else ("rollout", step)
    places = run.world.places(len(examples))

    def generate(cache_tokens: int) -> Rollout:
        engine = Engine(policy.model, policy.processor, policy.encode, policy.layers)
        return engine.generate(
            examples,
            config.num_generations,
            Sampling.of(config),
            seed=derive_seed(config.seed, *draw),
            prompts=prompts,
            cache_tokens=cache_tokens,
            prefill_tokens=run.limits.amounts[PACK_TOKENS],
            places=places,
        )

    with run.sharding.whole_weights(), named(f"in step {step}"):
        if not examples:  # a round of few further prompts leaves some processes without one
            return Rollout([], [], [], [], [], [], config.num_generations)
        needed = fitting(prompts, config.num_generations, config).tokens
        return run.limits.attempt(ROLLOUT_CACHE, generate, needed)


def pack_rollout(
    rollout: Rollout, advantages: torch.Tensor, tokens_per_pack: int, config: TrainConfig
) -> MicroBatches | None:
    """Pack this process's groups; each row gets its advantage, its weights and its sampled
    log-probability.

    `advantages` is (B, G); each pack has at most `tokens_per_pack` tokens. Means are those of the
    whole rollout. None where no row of it counts: no group has a signal, or all completions are cut
    and `mask_truncated` is set.
    """
    if not rollout.prompts:
        return None
    bounds = cumulative(list(map(len, rollout.completions)))
    rows = row_weights(rollout, bounds, config)
    if not rows["token_weights"].any():
        return None
    rows["advantages"] = spread(advantages.flatten(), bounds)
    rows["rollout_logp"] = torch.cat(rollout.logprobs)

    mine = [prompt is not None for prompt in rollout.prompts]
    if not all(mine):
        group_rows = spread(torch.tensor(mine), bounds[:: rollout.num_generations])
        rows = {name: values[group_rows] for name, values in rows.items()}
        rollout = selected(rollout, [index for index, is_mine in enumerate(mine) if is_mine])
    batches = MicroBatches(rollout.prompts, rollout.completions, tokens_per_pack)
    batches.add_row_data(rows)
    return batches


def row_weights(
    rollout: Rollout, bounds: torch.Tensor, config: TrainConfig
) -> dict[str, torch.Tensor]:
    """Return the weights (N,) of all rows of a step, whose completions have these `bounds` (S+1,).

    They are `token_weights`, and with an entropy in the loss `entropy_weights`, which make the mean
    entropy of the rows that count. All averages are those of the whole step, so that the loss does
    not depend on its packs.

    bnpo is TRL's with one prompt's group as micro-batch (per_device_train_batch_size = G): the mean
    over groups of the mean over a group's tokens. With `mask_truncated` a cut completion has no
    tokens that count, but it still is a sequence of the means over sequences, as in TRL.
    """
    counts = rollout.finished if config.mask_truncated else [True] * len(rollout.completions)
    mask = spread(torch.tensor(counts), bounds)
    loss_type, averaged = config.loss_type, bounds
    if loss_type == "bnpo":
        size = len(rollout.completions) // len(rollout.prompts)
        loss_type, averaged = "grpo", bounds[::size]
    weights = {
        "token_weights": token_weights(
            averaged,
            loss_type,
            num_tokens=mask.sum(),
            max_completion_length=config.max_new_tokens,
            mask=mask,
        )
    }
    if config.entropy_coefficient:
        mean = token_weights(bounds, "dapo", num_tokens=mask.sum(), mask=mask)
        weights["entropy_weights"] = config.entropy_coefficient * mean
    return weights


@torch.no_grad()
def add_logprobs(run: Run, batches: MicroBatches | None) -> None:
    """Put the reference's log-probabilities on the rows, in smaller packs if memory runs out.

    With `--importance-cap`, also the policy's own ones and the importance weights that follow.
    Several updates per batch (μ > 1) need old log-probabilities; they are the rollout's, which cost
    no forward pass, unless `needs_own_logprobs`.
    """
    if batches is None:
        return
    config, policy = run.config, run.policy

    def compute(tokens_per_pack: int) -> None:
        batches.repack(tokens_per_pack)
        found: list[dict[str, torch.Tensor]] = [{} for _ in batches]
        if run.reference is not None:
            reference = run.reference.logprobs(batches, config.temperature)
            for values, logp in zip(found, reference, strict=True):
                values["ref_logp"] = logp
        if config.needs_own_logprobs:
            own = policy.logprobs_by_pack(batches, config.temperature, run.sharding)
            for values, logp in zip(found, own, strict=True):
                values["old_logp"] = logp
        for batch, values in zip(batches, found, strict=True):
            if config.updates_per_batch > 1:
                values.setdefault("old_logp", batch.row_data["rollout_logp"])
            if config.importance_cap:
                sampled = batch.row_data["rollout_logp"].to(policy.device)
                ratio = (values["old_logp"] - sampled).exp()
                values["is_weights"] = ratio.clamp(max=config.importance_cap)

        # All or none: an attempt that runs out of memory leaves nothing behind.
        for batch, values in zip(batches, found, strict=True):
            batch.row_data |= values

    run.limits.attempt(PACK_TOKENS, compute)


def update_policy(run: Run, batches: MicroBatches | None, step: int) -> dict[str, float]:
    """Take μ optimizer steps on the batches, each with its own β; returns the last one's metrics.

    The gap between rollout and training is that of the first: afterwards, the weights are no longer
    the rollout's. Without batches there is no update, and nothing to measure: `skipped` is 1.
    """
    if batches is None:
        last = (step + 1) * run.config.updates_per_batch - 1
        return {"beta": run.schedule(last), "skipped": 1.0}
    first: dict[str, float] = {}
    for inner in range(run.config.updates_per_batch):
        optimizer_step = step * run.config.updates_per_batch + inner
        beta = run.schedule(optimizer_step)
        batch_loss = partial(grpo_batch_loss, beta=beta, config=run.config)
        metrics = {"beta": beta, **learn(run, batches, batch_loss, optimizer_step)}
        if "kl" in metrics:
            run.schedule.observe_kl(metrics["kl"])
        first = first or metrics
    return {**metrics, **{name: first[name] for name in GAP}}


def grpo_batch_loss(
    policy: Policy, batch: PackedBatch, beta: float, config: TrainConfig
) -> tuple[torch.Tensor, dict[str, RowMetric]]:
    """Compute the GRPO loss of one batch, a 0-d tensor, and what its rows tell for the metrics.

    Logits exist for a chunk of rows at a time.
    """
    rows = batch.row_data
    result = linear_grpo_loss(
        policy.hidden(batch),
        lm_head_weight(policy.model),
        batch.targets,
        rows["advantages"],
        rows["token_weights"],
        beta=beta,
        old_logp=rows.get("old_logp"),
        ref_logp=rows.get("ref_logp"),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        delta=config.clip_delta,
        temperature=config.temperature,
        surrogate=config.surrogate,
        ratio_level=config.ratio,
        cu_seqlens=batch.loss_cu_seqlens if config.ratio == "sequence" else None,
        is_weights=rows.get("is_weights"),
        entropy_weights=rows.get("entropy_weights"),
    )
    counts = rows["token_weights"] != 0  # not those of completions that --mask-truncated leaves out
    gap = (result.logp - rows["rollout_logp"]).abs()
    metrics: dict[str, RowMetric] = {
        "entropy": Mean(result.entropy[counts]),
        "clip_fraction": Mean(result.clipped[counts]),
        "rollout_gap_mean": Mean(gap),
        "rollout_gap_max": Largest(gap),
    }
    if "ref_logp" in rows:  # without a reference the KL is unknown, and a 0 would be a claim
        metrics["kl"] = Mean(result.kl[counts])
        metrics["kl_limited"] = Mean(result.kl_limited[counts])
        metrics["kl_pull"] = Mean(beta * kl_derivative(result, rows["ref_logp"])[counts].abs())
        metrics["reward_pull"] = Mean(rows["advantages"][counts].abs())
    return result.loss, metrics


def kl_derivative(result: GRPOLoss, ref_logp: torch.Tensor) -> torch.Tensor:
    """Return the derivative (N,) of k3 by each token's log π, which is 1 − π_ref/π.

    With d = log π_ref − log π it is −(k3 + d), and 0 where |d| is above the limit of the loss.
    """
    return torch.where(result.kl_limited, 0.0, result.logp - ref_logp - result.kl)


def rollout_metrics(rollout: Rollout, scores: Scores) -> dict[str, float]:
    """Average over the completions of a step.

    `zero_variance` is the share of groups without a learning signal, and
    `completion_length_p90` the length that 90% of the completions do not exceed.
    """
    count = len(rollout.completions)
    rewards = scores.total
    lengths = torch.tensor([len(ids) for ids in rollout.completions], dtype=torch.float64)
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    p10, p50, p90 = lengths.quantile(shares).tolist()
    return {
        "reward": rewards.mean().item(),
        "reward_min": rewards.min().item(),
        "reward_max": rewards.max().item(),
        **scores.means(),
        "zero_variance": equal_groups(rewards).float().mean().item(),
        "completion_length": lengths.mean().item(),
        "completion_length_p10": p10,
        "completion_length_p50": p50,
        "completion_length_p90": p90,
        "finished": sum(rollout.finished) / count,
    }


def learn(
    run: Run, batches: MicroBatches, batch_loss: BatchLoss, optimizer_step: int
) -> dict[str, float]:
    """Take one optimizer step on the batches.

    If memory runs out, layers are recomputed that were not (`--recompute auto`), and if that is not
    enough, packs get smaller.
    """
    config = run.config

    def attempt(tokens_per_pack: int) -> dict[str, float]:
        batches.repack(tokens_per_pack)
        return update(
            run.policy,
            run.optimizer,
            batches,
            batch_loss,
            optimizer_step,
            config.optimizer_steps(),
            config,
            run.loss_scale,
            run.sharding,
        )

    return run.limits.attempt(PACK_TOKENS, attempt, relief=run.recompute_all)
