"""A model's plain forward pass of one sequence is the truth: layouts that agree with it, and models refused."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.errors import UserError
from pipeline.models import packing, verification
from pipeline.models.adapters import add_lora
from pipeline.models.load import check_saving, init_policy, load_policy, special_ids
from pipeline.models.sampling import pad_prompts, sample
from pipeline.models.scoring import score
from pipeline.models.verification import SAMPLED, Layout, choose_layout, probe_prompts
from tests import families
from tests.models import EOS, plain_logprobs, token_lists, uniform

VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0,
    "bos_token_id": 0, "initializer_range": 0.3, "max_position_embeddings": 128,
}  # fmt: skip
KV = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
PROMPTS, LIMITS = token_lists([3, 5, 12, 20], VOCABULARY), [20] * 4
PACKED, ROWS = Layout(), Layout(packing=False)

# of a kind: transformers' class of the model, without the ending of its name, and its configuration
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "window": ("Mistral", {**KV, "head_dim": 8, "sliding_window": 16}),
    "long_window": ("Mistral", {**KV, "head_dim": 8, "sliding_window": 64}),
    "local": ("GPTNeo", {
        **{k: v for k, v in SIZES.items() if "num" not in k}, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "chunked": ("Llama4", {
        **KV, "intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 16,
        "pad_token_id": 0}),
    "alibi": ("Mpt", {
        "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "initializer_range": 0.3}),
    "alibi_by_mask": ("Bloom", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "positions": ("Roberta", {**SIZES, "vocab_size": 2000, "intermediate_size": 48, "is_decoder": True}),
    "convolution": ("Lfm2", {**KV, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "recurrent": ("Mamba", {
        "vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
        "initializer_range": 0.3}),
    "experts": ("Mixtral", {**KV, "num_local_experts": 4, "sliding_window": None}),
    "dropout": ("OPT", {
        "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.3, "dropout": 0.1,
        "attention_dropout": 0.1}),
    "not_causal": ("Bert", {**SIZES, "intermediate_size": 48}),
}  # fmt: skip


def make(name: str, **settings: Any) -> PreTrainedModel:
    """A random model of this class, with attention written out."""
    config = getattr(transformers, f"{name}TextConfig" if name == "Llama4" else f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, f"{name}LMHeadModel" if name == "Bert" else f"{name}ForCausalLM")(config)
    made.set_attn_implementation("eager")
    return made.eval()


def model(kind: str) -> PreTrainedModel:
    name, settings = MODELS[kind]
    return make(name, **settings)


def choose(policy: PreTrainedModel, **how: Any) -> Layout:
    return choose_layout(policy, PROMPTS, LIMITS, "models.mine", **how)[0]


EXPECTED = {
    "window": ROWS, "long_window": PACKED, "local": ROWS, "chunked": ROWS, "alibi": ROWS, "alibi_by_mask": ROWS,
    "positions": Layout("equal_lengths", False), "convolution": Layout("equal_lengths", False),
    "recurrent": Layout("no_cache", False), "experts": PACKED, "dropout": PACKED,
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_layout_chosen_computes_each_sequence_as_if_alone(kind: str) -> None:
    """The truth is the definition, one sequence at a time, and its gradient by autograd. In float32: some models
    compute in no other precision, and a fault moves these numbers by 0.1 and more."""
    policy = model(kind)
    layout = choose(policy, gradient_checkpointing=kind == "dropout")
    assert layout == EXPECTED[kind]
    ids, mask = pad_prompts(PROMPTS, EOS, torch.device("cpu"))
    rollout = sample(policy, ids, mask, torch.tensor(LIMITS), uniform(8, 20), [EOS, 1], layout=layout.sampling)
    scores = score(policy, rollout.prompt_ids, rollout.prompt_mask, rollout.completions, lengths=rollout.lengths,
                   packing=layout.packing)  # fmt: skip
    truths = []
    for i, length in enumerate(rollout.lengths.tolist()):
        truth = plain_logprobs(policy, PROMPTS[i // 2], rollout.completions[i, :length].tolist())
        for found in (rollout.logprobs, scores.logprobs):
            torch.testing.assert_close(found[i, :length].detach(), truth.detach(), rtol=0, atol=1e-4)
        truths.append(truth.square().sum())
    names, parameters = zip(*((n, p) for n, p in policy.named_parameters() if p.requires_grad), strict=True)
    expected = torch.autograd.grad(torch.stack(truths).sum(), parameters, allow_unused=True)
    measured = torch.autograd.grad(scores.logprobs.square().sum(), parameters, allow_unused=True)
    for name, one, truth in zip(names, measured, expected, strict=True):
        if truth is not None:
            torch.testing.assert_close(one, truth, rtol=1e-3, atol=1e-3, msg=name)


def test_completions_of_the_comparison_do_not_end_and_hold_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plain = [], verification._plain
    monkeypatch.setattr(verification, "_plain", lambda policy, rollout: seen.append(rollout) or plain(policy, rollout))
    likely = list(range(5, 25))  # half of the vocabulary
    assert choose(model("long_window"), eos=[*likely, VOCABULARY + 5], special=[30, 31, 5, VOCABULARY + 6]) == PACKED
    sampled = seen[0].completions[seen[0].completion_mask]
    assert not torch.isin(sampled, torch.tensor(likely)).any()
    assert seen[0].lengths.tolist() == [20] * 8
    for token in (30, 31):  # a quarter of 160 tokens, the two of them
        assert 15 <= (sampled == token).sum() <= 25


def test_a_padding_token_inside_a_completion_is_compared(tmp_path: Path) -> None:
    """RoBERTa counts positions by the tokens that are no padding. With a cache, each call sees a single token, and it
    counts otherwise."""
    policy = model("positions")
    policy.save_pretrained(tmp_path)
    assert policy.config.pad_token_id == 1
    assert choose(policy, special=special_ids(tmp_path, SimpleNamespace())) == Layout("no_cache", False)


def test_a_model_that_looks_ahead_is_refused() -> None:
    message = r"models\.mine: bert cannot be trained: .* no causal LM \(is it `is_decoder`\?\)"
    with pytest.raises(UserError, match=message):
        choose(model("not_causal"))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_that_is_none_is_named(window: int) -> None:
    """A row of which everything is masked attends to everything."""
    policy = make("Mistral", **KV, head_dim=8, sliding_window=window)
    with pytest.raises(UserError, match=rf"depend on the tokens that follow, .* \(sliding_window is {window}\)$"):
        choose(policy)


def test_positions_that_change_with_the_length_are_named() -> None:
    """longrope has other frequencies for a sequence beyond the original context, for its first tokens too."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}  # fmt: skip
    sizes = KV | {"original_max_position_embeddings": 16, "pad_token_id": 0}
    policy = make("Phi3", **sizes, sliding_window=None, rope_parameters=rope)
    with pytest.raises(UserError, match=r"its positions change for sequences beyond 16 tokens \(longrope\)\)$"):
        choose_layout(policy, token_lists([3, 5, 6, 7], VOCABULARY), LIMITS, "models.mine")


def test_it_is_said_what_is_slower_and_why() -> None:
    _, how = choose_layout(model("window"), PROMPTS, LIMITS, "models.mine")
    assert how.startswith("samples left-padded prompts, scores a sequence a row (slower) (sliding_window is 16); ")


def wrong_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows whose completions stand a position too late."""
    append = packing._Row._append
    monkeypatch.setattr(packing._Row, "_append", lambda self, tokens, position, *rest: append(
        self, tokens, position + (position > 0), *rest))  # fmt: skip


def test_a_mistake_in_scoring_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_positions(monkeypatch)
    assert choose(model("experts")) == ROWS
    monkeypatch.setattr("pipeline.models.scoring.pad_right", packing.pack)
    with pytest.raises(UserError, match=r"mixtral cannot be scored: log-probabilities scored differ .* nats \(allowed"):
        choose(model("experts"))


def test_a_mistake_in_the_gradient_alone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scored = verification._scored

    def halved(*arguments: Any) -> Any:
        found = scored(*arguments)
        return verification._Pass(found.logprobs, [*found.gradient[:-1], found.gradient[-1] / 2])

    monkeypatch.setattr(verification, "_scored", halved)
    with pytest.raises(UserError, match=r"the gradient differs from that of its own forward pass by \d"):
        choose(model("experts"))


@pytest.mark.parametrize("adapters", [False, True])
def test_the_precision_and_the_adapters_of_the_run_are_compared_too(
    adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = model("long_window")
    if adapters:
        add_lora(policy, 2, 4.0, torch.Generator().manual_seed(0))
    assert choose(policy, bfloat16=True) == PACKED
    assert any(p.dtype == torch.bfloat16 for p in policy.parameters()) == adapters
    policy, bf16_copy = model("long_window"), verification.bf16_copy

    def doubled(policy: PreTrainedModel) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            output = bf16_copy(policy)(**inputs)
            output.logits = 3 * output.logits
            return output

        return call

    monkeypatch.setattr(verification, "bf16_copy", doubled)
    with pytest.raises(UserError, match=r"cannot be trained in bfloat16: .* precision: float32 would do"):
        choose(policy, bfloat16=True)


def test_adapters_that_peft_refuses_are_one_line() -> None:
    with pytest.raises(UserError, match=r"train\.lora_rank = 2: .*Mamba.*; 0 trains all weights"):
        add_lora(model("recurrent"), 2, 4.0, torch.Generator().manual_seed(0))


def test_adapters_that_load_otherwise_than_they_were_saved_are_refused(tmp_path: Path) -> None:
    """transformers 5.23 renames parts of Laguna as it loads them, those of adapters beside them wrongly."""
    for kind in ("laguna", "llama"):
        families.save(kind, tmp_path / kind)
    laguna, llama = (
        init_policy(tmp_path / kind, torch.device("cpu"), lora_rank=2, generator=torch.Generator().manual_seed(0))
        for kind in ("laguna", "llama")
    )
    check_saving(llama, "models.mine")
    llama.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(llama(ids).logits, load_policy(tmp_path / "adapter", torch.device("cpu"))(ids).logits)
    with pytest.raises(UserError, match=r"mine: .* laguna's adapters as it saves them; .* 0 trains all weights$"):
        check_saving(laguna, "models.mine")
    laguna.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"loads only a part of its adapter: model\.\S+ is not what was saved$"):
        load_policy(tmp_path / "adapter", torch.device("cpu"))


def test_a_policy_that_is_saved_as_no_causal_lm_is_refused(tmp_path: Path) -> None:
    """A text model out of Emu3 has a configuration that transformers makes no causal LM of."""
    families.save("emu3", tmp_path)
    policy = load_policy(tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=r"mine: emu3\S* cannot be trained: transformers saves it as no causal LM"):
        check_saving(policy, "models.mine")
    policy.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_machine_without_memory_says_nothing_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(verification, "score", full)
    with pytest.raises(torch.OutOfMemoryError):
        choose(model("experts"))


@pytest.mark.parametrize("option", ["output_router_logits", "output_attentions", "output_hidden_states", "return_dict"])
def test_what_a_configuration_changes_in_the_output_is_turned_off(tmp_path: Path, option: str) -> None:
    policy = model("experts")
    setattr(policy.config, option, option != "return_dict")
    policy.save_pretrained(tmp_path)
    assert choose(load_policy(tmp_path, torch.device("cpu"))) == PACKED


def test_probes_are_as_long_as_the_run_s_sequences() -> None:
    prompts = token_lists([7, 2, 9, 30, 4, 5], VOCABULARY)
    made, limits = probe_prompts(prompts, [20] * 6)
    assert [prompts[1], prompts[3]] == [made[0], made[-1]]
    assert limits == [20] * 4
    made, limits = probe_prompts(prompts, [1000] * 6)
    assert made[0] == prompts[1]
    assert len(made[-1]) + limits[-1] == 30 + 1000
    assert limits == [SAMPLED] * 4
    made, limits = probe_prompts([[5], *prompts[:3], [6]], [20, 13, 18, 11, 20])  # of a total length
    assert sorted(map(len, made)) == [1, 1, 7, 9], "of different lengths, though each sequence is as long"
    prompts = token_lists([1, 2, 3, 4, 5, 6, 7, 8], VOCABULARY)
    assert prompts[1] in probe_prompts(prompts, [9, 60, 9, 9, 9, 9, 9, 9])[0], "that of the longest sequence is there"
    assert probe_prompts([[5, 6]], [100]) == ([[5, 6] + [5, 6] * 18], [SAMPLED])


def test_a_model_loads_as_transformers_loads_it(tmp_path: Path) -> None:
    """`eager` attention, as training has it on a CPU, gives what the default one does."""
    model("window").save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.tensor(token_lists([40], VOCABULARY))
    with torch.no_grad():
        torch.testing.assert_close(load_policy(tmp_path, torch.device("cpu"))(ids).logits, plain(ids).logits)
