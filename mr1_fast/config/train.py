"""All settings of a training run, and what follows from several of them."""

from dataclasses import dataclass

from ..errors import UserError
from ..kl_schedule import AccuracyKL, DynamicKL, KLSchedule, TargetKL
from .algorithm import AlgorithmConfig
from .bounds import check_values
from .model import ModelConfig
from .objective import ALGORITHMS, KLConfig, ObjectiveConfig
from .optimizer import OptimizerConfig
from .reward import RewardConfig
from .run import RunConfig
from .sampling import Sampling
from .task import TaskConfig


@dataclass
class TrainConfig(
    RunConfig,
    OptimizerConfig,
    KLConfig,
    ObjectiveConfig,
    AlgorithmConfig,
    RewardConfig,
    Sampling,
    TaskConfig,
    ModelConfig,
):
    """Post-train a vision-language model with GRPO-D, one of its relatives, or supervised
    fine-tuning."""

    def __post_init__(self):
        super().__post_init__()
        for name, value in ALGORITHMS.get(self.algo, {}).items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, which are the t of the β schedule."""
        return self.steps * self.updates_per_batch

    def kl_schedule(self) -> KLSchedule:
        """β as a function of the optimizer step, as it is before the first one."""
        if self.beta_shape == "constant":
            return DynamicKL(self.beta, self.beta, self.optimizer_steps())
        if self.beta_shape == "accuracy":
            return AccuracyKL(self.beta_min, self.beta_max)
        if self.beta_shape == "target-kl":
            return TargetKL(self.beta_min, self.beta_max, self.target_kl)
        return DynamicKL(
            self.beta_min,
            self.beta_max,
            self.optimizer_steps(),
            self.explore_fraction,
            self.beta_shape,
        )

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward, by the name that it is registered under."""
        return {"accuracy": 1.0, "format": self.format_weight, **self.extra_rewards}

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term, for which a reference model must be kept."""
        return self.algo != "sft" and self.kl_schedule().beta_max > 0

    @property
    def needs_own_logprobs(self) -> bool:
        """Whether the policy's log-probabilities are computed before the update.

        Importance weights are made of them. The clip of a ratio per sequence is so narrow that the
        rollout's rounding would already be outside of it (3e-4 in GSPO).
        """
        clips_sequences = self.ratio == "sequence" and self.updates_per_batch > 1
        return self.algo != "sft" and (bool(self.importance_cap) or clips_sequences)

    @property
    def in_one_pass(self) -> bool:
        """Whether loss and gradient come out of one pass over the logits."""
        return self.algo == "sft" or (self.ratio == "token" and not self.entropy_coefficient)

    @property
    def needs_thinking(self) -> bool:
        """Whether worked solutions are imitated."""
        return self.algo == "sft" and self.sft_target == "solution"

    def check(self) -> None:
        """Raise UserError for values with which no run is possible."""
        check_values(self)
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}, but must be greater than 0.")
        if self.algo != "sft" and self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}, "
                "but a group needs at least 2 completions."
            )
        self.check_sampling()
        self.check_rewards()
        self.check_objective()
        self.check_run()
        self._check_save()
        self.check_dtype(self.dtype)
        if 0 < self.importance_cap < 1:
            raise UserError(
                f"importance_cap is {self.importance_cap}, but must be 0 (off) or at least 1."
            )
        if self.load_in_4bit and not self.lora:
            raise UserError(
                "load_in_4bit is true, but 4-bit weights cannot be trained themselves: add --lora."
            )
        if self.offload_checkpoints and self.recompute == "none":
            raise UserError(
                "offload_checkpoints is true, but with recompute none no layer's input is stored "
                "to be offloaded: pass --recompute auto or all."
            )
        longest = self.max_prompt_tokens + self.max_new_tokens
        if self.tokens_per_microbatch != "auto" and longest > self.tokens_per_microbatch:
            raise UserError(
                f"tokens_per_microbatch is {self.tokens_per_microbatch}, but one sequence may have "
                f"max_prompt_tokens + max_new_tokens = {longest} tokens: raise the first or lower "
                "the others."
            )
        try:
            self.kl_schedule()
        except ValueError as error:
            raise UserError(f"the KL schedule is impossible: {error}.") from error

    def check_prompts(self, processes: int) -> None:
        """Raise UserError where one of several processes would have no prompt in a step."""
        if self.prompts_per_step < processes:
            raise UserError(
                f"prompts_per_step is {self.prompts_per_step}, but there are {processes} "
                "processes, each of which needs a prompt: raise --prompts-per-step or lower "
                "--nproc-per-node."
            )

    def check_dtype(self, dtype: str) -> None:
        """Raise UserError for weights in `dtype`, such as float16, that cannot be trained.

        What `auto` means is known on the machine alone, so a run checks it once more.
        """
        if dtype == "float16" and not self.lora:
            chosen = "float16" if self.dtype == dtype else f"{self.dtype}, here float16"
            raise UserError(
                f"dtype is {chosen}, in which small updates of the weights would be lost: add "
                "--lora, whose adapters are float32, or pass --dtype float32."
            )

    def _check_save(self) -> None:
        """Raise UserError for a final/ that cannot be written without loss, or has no adapter."""
        if self.save in ("adapter", "both") and not self.lora:
            raise UserError(
                f"save is {self.save}, but without adapters all weights are trained: add --lora, "
                "or leave --save out."
            )
        if self.save in ("merged", "both") and self.load_in_4bit:
            raise UserError(
                f"save is {self.save}, but merging into 4-bit weights would lose precision: leave "
                "--save out, and merge the adapter into the 16-bit model afterwards, with "
                "`python -m mr1_fast.merge FINAL --output FOLDER`."
            )


def check_sharding(config: TrainConfig) -> None:
    """Raise UserError for settings that several processes under `--sharding full` exclude."""
    if config.sharding != "full":
        return
    if config.load_in_4bit:
        raise UserError(
            "--sharding full cuts weights between processes, but weights in 4 bits cannot be cut: "
            "pass --sharding none or optimizer with --load-in-4bit."
        )
    if config.needs_reference and not config.lora and config.reference != "resident":
        raise UserError(
            f"reference is {config.reference}, but with --sharding full the reference is in parts "
            "on all processes, as the policy is: pass --reference resident."
        )
