"""`add_head` on other families of transformers: the model's own logits, or a refusal."""

import collections
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mr1_fast.integrations import warn_once
from mr1_fast.integrations.head import HeadError, add_head, in_dtype_of

from ..data.causal_models import names, tiny_model

IDS = torch.tensor([[5, 9, 11, 40, 77], [60, 13, 4, 8, 33]])
EXACT = [
    ("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("opt", "OPTForCausalLM"),
    ("phi", "PhiForCausalLM"), ("mamba", "MambaForCausalLM"), ("mixtral", "MixtralForCausalLM"),
    ("gemma3_text", "Gemma3ForCausalLM"), ("olmo2", "Olmo2ForCausalLM"),
    ("bloom", "BloomForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"),
    ("granite", "GraniteForCausalLM"),
]  # fmt: skip
REFUSED = {
    ("bert", "BertLMHeadModel"): "changes its last hidden states before its LM head",
    ("roberta", "RobertaForCausalLM"): "changes its last hidden states before its LM head",
    ("modernbert-decoder", "ModernBertDecoderForCausalLM"): "changes its last hidden states",
    ("inkling_text", "InklingForCausalLM"): "changes its last hidden states",
    ("rembert", "RemBertForCausalLM"): "changes its last hidden states",
    ("llama4_text", "Llama4ForCausalLM"): "cannot be tried on a batch of token ids",
    ("mllama", "MllamaForCausalLM"): "cannot be tried on a batch of token ids",
    ("gemma2", "Gemma2ForCausalLM"): "final_logit_softcapping",
    ("cohere", "CohereForCausalLM"): "logit_scale",
    ("minicpm3", "MiniCPM3ForCausalLM"): "logits_scaling",
}


def made(model_type: str, name: str) -> torch.nn.Module:
    """A tiny model; the test is skipped where this version of transformers lacks it."""
    if (model_type, name) not in names():
        pytest.skip(f"this transformers has no {name}")
    model = tiny_model(model_type, name)
    assert model is not None
    return model


def project(hidden, weight, bias):
    return torch.nn.functional.linear(hidden, *in_dtype_of(hidden, weight, bias))


@torch.no_grad()
def head_gives_the_logits(model: torch.nn.Module) -> bool:
    expected = model(input_ids=IDS, use_cache=False).logits.float()
    found = model(input_ids=IDS, head=project).float()
    largest = expected.abs().max()
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    return found.shape == expected.shape and bool(
        (found - expected).abs().max() <= tolerance * largest
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("model_type", "name"), EXACT)
def test_a_plain_head_gives_the_models_logits(model_type, name, dtype):
    model = made(model_type, name).to(dtype)
    add_head(model)
    assert head_gives_the_logits(model)


@pytest.mark.parametrize(("model_type", "name"), REFUSED)
def test_a_head_with_more_to_it_is_refused_and_the_model_stays_as_it_was(model_type, name):
    model = made(model_type, name)
    before = model(input_ids=IDS, use_cache=False).logits
    with pytest.raises(HeadError, match=REFUSED[model_type, name]):
        add_head(model)
    assert "forward" not in vars(model) | vars(model.get_output_embeddings())
    assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.thorough
def test_no_model_of_transformers_is_silently_wrong():
    outcomes, wrong = collections.Counter(), []
    for model_type, name in names():
        model = tiny_model(model_type, name)
        if model is None:
            outcomes["not made"] += 1
            continue
        try:
            add_head(model)
        except HeadError:
            outcomes["refused"] += 1
            continue
        outcomes["exact"] += 1
        if not head_gives_the_logits(model):
            wrong.append(name)
    print(dict(outcomes))
    assert not wrong and outcomes["exact"] > 120 and outcomes["refused"] > 20


# --- what the trial leaves behind: nothing --------------------------------------------------------


def llama(**settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Counted(torch.nn.Module):
    """A layer with what a forward changes: a buffer, an attribute, random numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.calls = torch.nn.BatchNorm1d(32), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden):
        """Count the call."""
        self.calls += 1
        self.seen += 1
        self.last = hidden
        return self.norm(hidden.transpose(1, 2)).transpose(1, 2) + 0 * torch.rand(())


@pytest.mark.parametrize("training", [True, False])
def test_the_trial_leaves_no_trace(training):
    model = llama(attention_dropout=0.5)
    model.model.norm = torch.nn.Sequential(model.model.norm, Counted())
    model.train(training)
    model.model.layers[0].eval()  # as with frozen layers
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    modes = [module.training for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = {name: value.data_ptr() for name, value in model.state_dict().items()}
    rng, python_rng = torch.get_rng_state(), random.getstate()
    add_head(model)

    assert [module.training for module in model.modules()] == modes
    for module, before in zip(model.modules(), keys, strict=True):
        assert set(vars(module)) - {"forward"} == before - {"forward"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]) and value.data_ptr() == addresses[name]
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate() == python_rng
    assert not calls and model.model.norm[1].calls == 0
    assert (model.lm_head.weight.grad == 1).all()
    model.eval()(input_ids=IDS[:, :3])
    assert len(calls) == 2 and model.model.norm[1].calls == 1  # the hooks are still there


@pytest.mark.parametrize("change", ["scaled", "capped", "masked", "cut", "shifted"])
def test_a_change_of_the_logits_is_seen_whatever_the_weights(change):
    class Changed(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            z = output.logits
            output.logits = {
                "scaled": lambda: z * 1.001,
                "capped": lambda: 50 * torch.tanh(z / 50),
                "masked": lambda: z.index_fill(-1, torch.tensor([7]), -1e9),
                "cut": lambda: z[..., :60],
                "shifted": lambda: z + 1,
            }[change]()
            return output

    model = Changed(llama().config)
    torch.nn.init.zeros_(model.lm_head.weight)  # its own logits would hide a scale and a cap
    with pytest.raises(HeadError, match="changes its logits after its LM head"):
        add_head(model)


def test_weights_of_two_dtypes_are_tried_under_autocast():
    model = llama().bfloat16()
    model.lm_head.float()
    model.model.layers[0].mlp.float()
    add_head(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert head_gives_the_logits(model)


def test_a_model_on_meta_is_taken_with_a_warning():
    warn_once.cache_clear()
    with torch.device("meta"):
        model = llama()
    with pytest.warns(UserWarning, match="could not try LlamaForCausalLM"):
        add_head(model)
    model.to_empty(device="cpu")
    model.load_state_dict(llama().state_dict())
    model.model.rotary_emb = llama().model.rotary_emb
    assert head_gives_the_logits(model)
