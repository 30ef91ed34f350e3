"""How much of a run its evaluations are, by the answers that they sample."""

from ..config import TrainConfig


def describe_evaluations(config: TrainConfig, items: int) -> str:
    """Say how many evaluations of `items` held-out items a run makes; "" for none.

    The share of the sampled tokens follows from the settings, with answers as long as completions:
    before and after training each item is answered greedily and by sampling, on the way greedily.
    Groups that are refilled are further completions, of which nobody knows how many there will be.
    """
    if not items or not config.eval_samples:
        return ""
    on_the_way = 0
    if config.eval_every:
        on_the_way = (config.steps - 1) // config.eval_every + config.keep_best
    answers = items * (4 + on_the_way)
    kinds = "before and after training" + f", {on_the_way} on the way" * bool(on_the_way)
    text = f"{2 + on_the_way} evaluations of {items:,} items ({kinds}): {answers:,} answers"
    if config.algo == "sft":
        return text

    completions = config.steps * config.prompts_per_step * config.num_generations
    share = answers / (answers + completions)
    least, most = ("at least ", "at most ") if config.skip_equal_groups == "refill" else ("", "")
    return (
        f"{text} beside {least}{completions:,} completions of training, {most}{share:.0%} of the "
        "sampled tokens if they are equally long"
    )
