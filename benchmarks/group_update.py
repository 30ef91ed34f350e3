"""Updates of one group of given completions for bench_train_step.py: ours, repeated prompts, TRL.

The models have random weights and the shape of Qwen2-VL-2B, or are narrower and shallower. Each
case computes reference log-probs, the GRPO loss on policy, and the gradient of every parameter.
"""

from functools import partial

import torch
from measure import Case
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from trl_step import trl_update

from mr1_fast.config import ModelConfig, TrainConfig
from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.load import make_policy
from mr1_fast.model.policy import Policy
from mr1_fast.model.reference import Reference
from mr1_fast.model.tiny import tiny_processor
from mr1_fast.plan.out_of_memory import PACK_TOKENS, MemoryLimits
from mr1_fast.run import Run
from mr1_fast.stages import add_logprobs, grpo_batch_loss, pack_rollout
from mr1_fast.types import Prompt, Rollout

BETA = 0.04
IMAGE_SHARE = 15 / 16
"""The share of a prompt's tokens that are image tokens."""
WHOLE = 10**9
"""Tokens of a micro-batch: so many that no case splits a group."""
CONFIG = TrainConfig()


def make_model(width: int, layers: int, vocabulary: int) -> Qwen2VLForConditionalGeneration:
    """A model like Qwen2-VL-2B, whose width is 1536; others keep its proportions and head sizes."""
    token_ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 35 // 6,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    heads = max(1, width * 16 // 1536)
    vision = dict(
        depth=layers, embed_dim=80 * heads, hidden_size=width, num_heads=heads, mlp_ratio=4
    )
    ids = {name: vocabulary - 1 - i for i, name in enumerate(token_ids)}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    )


class Group:
    """A policy that differs from its reference, a prompt with an image, and scored completions."""

    def __init__(
        self, policy: Policy, reference: Reference, prompt_tokens: int, lengths: list[int]
    ):
        self.policy, self.reference, self.device = policy, reference, policy.device
        self.model, self.reference_model = policy.model, reference.policy.model
        generator = torch.Generator().manual_seed(0)
        self.prompt = self._prompt(prompt_tokens, generator)
        self.completions = [torch.randint(0, 1000, (n,), generator=generator) for n in lengths]
        # Not centred: on policy, the terms of the loss would cancel, and nothing would be left to
        # compare.
        self.advantages = torch.randn(len(lengths), generator=generator)

    @classmethod
    def random(
        cls, model_size: dict, device: str, prompt_tokens: int, lengths: list[int]
    ) -> "Group":
        torch.manual_seed(0)
        model = make_model(**model_size).to(torch.bfloat16 if device == "cuda" else torch.float32)
        # For the cases that run the model's own forward; our loop has its own recomputation.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        policy = make_policy(model, tiny_processor(), ModelConfig(device=device, recompute="all"))
        reference = Reference(policy)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.mul_(1.2)
        return cls(policy, reference, prompt_tokens, lengths)

    def other(self, prompt_tokens: int, lengths: list[int]) -> "Group":
        """A group of other sizes with the same models."""
        return Group(self.policy, self.reference, prompt_tokens, lengths)

    def _prompt(self, tokens: int, generator: torch.Generator) -> Prompt:
        config = self.model.config
        image = int(tokens * IMAGE_SHARE)
        rows = max(n for n in range(1, int(image**0.5) + 1) if image % n == 0)
        grid = torch.tensor([[1, 2 * rows, 2 * image // rows]])
        ids = torch.randint(0, 1000, (tokens,), generator=generator)
        start = (tokens - image) // 2
        ids[start - 1] = config.vision_start_token_id
        ids[start : start + image] = config.image_token_id
        ids[start + image] = config.vision_end_token_id
        kinds = (ids == config.image_token_id).long()
        positions, _ = self.model.model.get_rope_index(
            input_ids=ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid
        )
        pixels = torch.randn(4 * image, 3 * 2 * 14 * 14, generator=generator)
        return Prompt(ids, positions[:, 0], int(positions.max()) + 1, pixels, grid, image)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens of the repeated form."""
        return sum(len(self.prompt.input_ids) + len(ids) for ids in self.completions)

    def padded(self) -> dict[str, Tensor]:
        """transformers' inputs with one row per completion, as R1-V and TRL make them."""
        count, start = len(self.completions), len(self.prompt.input_ids)
        ones = [torch.ones_like(ids) for ids in self.completions]
        completions, mask = (
            nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (self.completions, ones)
        )
        input_ids = torch.cat([self.prompt.input_ids.expand(count, -1), completions], dim=1)
        prompt_mask = torch.ones(count, start, dtype=torch.int64)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.cat([prompt_mask, mask], dim=1),
            "mm_token_type_ids": (input_ids == self.model.config.image_token_id).long(),
            "pixel_values": self.prompt.pixel_values.to(self.model.dtype).repeat(count, 1),
            "image_grid_thw": self.prompt.image_grid_thw.repeat(count, 1),
        }
        return {name: values.to(self.device) for name, values in inputs.items()}

    def differentiated(self, compute_loss, packed: bool) -> Case:
        """A case of `compute_loss()` and every gradient, with packed attention or plain SDPA."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]

        def restore():
            self.model.zero_grad(set_to_none=True)
            for model in (self.model, self.reference_model):
                if packed:
                    use_packed_attention(model)
                else:
                    model.set_attn_implementation("sdpa")

        def call():
            loss = compute_loss()
            loss.backward()
            return loss.detach(), [p.grad for p in parameters]

        return Case(call, restore)


# --- updates --------------------------------------------------------------------------------------


def packed(group: Group, repeated: bool) -> Case:
    """A case of our stages; `repeated` gives every completion a prompt and an image of its own."""
    count = len(group.completions)
    prompts, size = ([group.prompt] * count, 1) if repeated else ([group.prompt], count)
    limits = MemoryLimits(print, lambda: "", {PACK_TOKENS: WHOLE})
    run = Run(CONFIG, group.policy, limits, reference=group.reference)

    def compute_loss():
        logprobs = [torch.zeros(len(ids)) for ids in group.completions]
        rollout = Rollout([], prompts, group.completions, [], [], logprobs, size)
        batches = pack_rollout(rollout, group.advantages.view(-1, size), WHOLE, CONFIG)
        add_logprobs(run, batches)
        (batch,) = batches
        return grpo_batch_loss(group.policy, batch.to(group.device), BETA, CONFIG)[0]

    return group.differentiated(compute_loss, packed=True)


def padded(group: Group) -> Case:
    """A case of R1-V's update, but without the prompt's logits, which R1-V makes too."""
    inputs = group.padded()
    start = len(group.prompt.input_ids)
    targets, mask = inputs["input_ids"][:, start:], inputs["attention_mask"][:, start:]
    advantages = group.advantages.to(group.device)[:, None]

    def logprobs(model) -> Tensor:
        output = model(**inputs, logits_to_keep=targets.shape[1] + 1, use_cache=False)
        pairs = zip(output.logits[:, :-1], targets, strict=True)
        rows = [row.log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in pairs]
        return torch.stack(rows)

    def compute_loss():
        with torch.no_grad():
            reference = logprobs(group.reference_model)
        logp = logprobs(group.model)
        kl = torch.exp(reference - logp) - (reference - logp) - 1
        per_token = -(torch.exp(logp - logp.detach()) * advantages - BETA * kl)
        return ((per_token * mask).sum(1) / mask.sum(1)).mean()

    return group.differentiated(compute_loss, packed=False)


def trl(group: Group, fused: bool = False) -> Case:
    """A case of TRL's reference log-probs and loss on these completions; `fused`: with our loss."""
    compute_loss = trl_update(
        group.model,
        group.reference_model,
        group.policy.processor,
        group.padded(),
        len(group.prompt.input_ids),
        group.advantages,
        BETA,
        fused,
    )
    return group.differentiated(compute_loss, packed=False)


CASES = {
    "ours": partial(packed, repeated=False),
    "repeated, packed, our loss": partial(packed, repeated=True),
    "repeated, padded (R1-V)": padded,
    "TRL GRPOTrainer": trl,
    "TRL GRPOTrainer with our loss": partial(trl, fused=True),
}
