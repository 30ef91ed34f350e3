"""Settings of the rewards."""

from dataclasses import dataclass, field

from ..errors import UserError


@dataclass
class RewardConfig:
    """What is rewarded: accuracy + format_weight · format + the extra rewards + overlong."""

    format_weight: float = 1.0
    """Weight α of the format reward; the accuracy reward has weight 1."""
    extra_rewards: dict[str, float] = field(default_factory=dict)
    """Weights of further rewards, for example '{"brief": 0.1}': by registered name, as
    package.module:function, or as file.py:function."""
    overlong_penalty: float | None = None
    """Share of --max-new-tokens at its end over which a completion's reward falls from 0 by up to 1
    (DAPO's soft punishment has 0.2); 0 is off. By default that of --algo."""
    plugin: str | None = None
    """Python file that registers your own rewards with @reward."""
    reward_seconds: float = 300.0
    """How long a reward function may take for the completions of one step, in seconds."""

    def check_rewards(self) -> None:
        """Raise UserError for rewards that do not exist."""
        if self.overlong_penalty and "overlong" in self.extra_rewards:
            raise UserError(
                "extra_rewards has overlong, which is the name of the overlong penalty: choose "
                "another name, or pass --overlong-penalty 0."
            )
