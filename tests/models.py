"""Policies small enough to check by hand: tiny random GPT-NeoX models, tables, and all that they can say."""

import itertools
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from pipeline.config.load import load_params
from pipeline.config.schema import Recipe
from pipeline.models.sampling import Rollout

EOS = 0
PARAMS = load_params(Path(__file__).resolve().parents[1] / "params.yaml")


def recipe(name: str, **changes: object) -> Recipe:
    """A recipe of the project's params.yaml with some keys changed; the result is validated."""
    return Recipe.model_validate({**PARAMS.recipes[name].model_dump(), **changes})


def tiny_neox(
    vocabulary: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64, eos_logit: float = 0.0, hidden: int = 16
) -> PreTrainedModel:
    """A random GPT-NeoX of two layers; `eos_logit` is added to the logit of EOS, to have completions end early."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * hidden, max_position_embeddings=64, initializer_range=0.3, bos_token_id=EOS,
        eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]  # its `to` is wrapped without types
    with torch.no_grad():
        # what the last layer norm puts out sums to zero before its bias, so that this adds a constant to one logit
        model.gpt_neox.final_layer_norm.bias.fill_(1)
        head = model.get_output_embeddings().weight
        head -= head.mean(1, keepdim=True)
        head[EOS] += eos_logit / hidden
    return model


def tiny_gpt2(vocabulary: int = 7) -> PreTrainedModel:
    """Like `tiny_neox`, with learned absolute positions: rotary ones do not notice where a sequence begins."""
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).double().eval()


def token_lists(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens other than EOS, one list a length."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocabulary, (length,), generator=draw).tolist() for length in lengths]


def uniform(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_completions(vocabulary: int, limit: int) -> tuple[Tensor, Tensor]:
    """Every completion of at most `limit` tokens: ids [K, T] filled with EOS, lengths [K] up to and including EOS."""
    rows = {}
    for tokens in itertools.product(range(vocabulary), repeat=limit):
        length = tokens.index(EOS) + 1 if EOS in tokens else limit
        rows[tokens[:length]] = length
    ids = [list(tokens) + [EOS] * (limit - length) for tokens, length in rows.items()]
    return torch.tensor(ids), torch.tensor(list(rows.values()))


def mask_of(lengths: Tensor, columns: int) -> Tensor:
    return torch.arange(columns) < lengths[:, None]


def tabular_rows(table: Tensor, completions: Tensor) -> Tensor:
    """[K, T, V] what a policy that is a table of logits [T, V ** (T - 1), V], one row a prefix, says at each place."""
    vocabulary = table.shape[-1]
    prefix, columns = torch.zeros(len(completions), dtype=torch.long), []
    for t, tokens in enumerate(completions.T):
        columns.append(table[t, prefix].log_softmax(-1))
        prefix = prefix * vocabulary + tokens
    return torch.stack(columns, 1)


def plain_logits(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """[T + 1, V] one sequence at a time, no padding, no mask, no cache: entry t predicts completion token t."""
    return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :]


def plain_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float = 1) -> Tensor:
    """[T] log pi(y_t | x, y_<t) by the definition."""
    table = (plain_logits(model, prompt, completion)[:-1] / temperature).log_softmax(-1)
    return torch.stack([row[token] for row, token in zip(table, completion, strict=True)])


def rollout_of(
    prompts: list[list[int]], completions: list[list[int]], wider: int = 0, longer: int = 0, filler: int = EOS
) -> Rollout:
    """A rollout of given tokens, a prompt for each completion; the sampler's logprobs are not known.

    wider, longer: more columns of padding before the prompts and behind the completions. filler: what stands in it.
    """
    width, columns = max(map(len, prompts)) + wider, max(map(len, completions)) + longer
    ids = torch.tensor([[filler] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    tokens = torch.tensor([c + [filler] * (columns - len(c)) for c in completions])
    unknown = torch.full(tokens.shape, torch.nan, dtype=torch.float64)
    return Rollout(ids, mask, tokens, torch.tensor(list(map(len, completions))), unknown, unknown)


def gradient(model: torch.nn.Module) -> Tensor:
    """All gradients as one vector; a parameter without one has none to give."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def difference(measured: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((measured - truth).norm() / truth.norm()).item()
