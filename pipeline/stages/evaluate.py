"""Stage `evaluate`: the trained policy against the reference model, with the same held-out prompts and random numbers.

All rewards of params.yaml are measured, not only the trained one.
"""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.load import load_params
from pipeline.config.schema import VERIFIABLE, Params, classifier_rewards
from pipeline.data.prompts import Prompt, read_prompts
from pipeline.diagnosis.bootstrap import interval
from pipeline.diagnosis.curve import curve_rows
from pipeline.diagnosis.pass_at_k import measured_k, pass_at_k
from pipeline.diagnosis.text import ending_shares, text_statistics
from pipeline.distributed.device import configure_torch, device_errors
from pipeline.errors import UserError, run_stage
from pipeline.file_io import finite_or_none, folder_digests, read_jsonl, sha256, write_json, write_jsonl
from pipeline.models.load import end_of_text_ids, load_layout, load_policy, load_tokenizer
from pipeline.models.rollout import (
    Completion,
    completion_limits,
    completion_texts,
    longest_sequence,
    read_completions,
)
from pipeline.models.sampling import Rollout, pad_prompts, sample
from pipeline.models.scoring import score_microbatched
from pipeline.models.stop_strings import Stopped, stop_check
from pipeline.models.tokenization import encode_prompt
from pipeline.models.verification import Layout
from pipeline.paths import CHECKPOINT, CLASSIFIERS, HELDOUT_PROMPTS, INDEPENDENT, POLICY, RUN_FILES
from pipeline.rewards.batch import Reward, RewardBatch
from pipeline.rewards.build import build_reward, check_rows
from pipeline.rewards.classifier import Cuts, folder_of, stored_classifiers
from pipeline.rewards.columns import check_columns
from pipeline.rl.metrics import text_cost
from pipeline.rl.seeding import draw_uniforms, generator
from pipeline.rl.terms import contributions
from pipeline.runs.progress import progress

PROMPT_BATCH = 32  # prompts sampled at once
NAMES = ("checkpoint", "policy")  # in metrics.json: the reference model and the trained policy


def main() -> None:
    params = load_params()
    prompts = read_prompts(HELDOUT_PROMPTS) if HELDOUT_PROMPTS.exists() else []
    if not prompts:
        raise UserError(f"{HELDOUT_PROMPTS} holds no prompts; run `dvc repro`, which makes it")
    if params.evaluate.prompts:
        prompts = prompts[: params.evaluate.prompts]
    if not RUN_FILES.heldout.exists():
        raise UserError(f"{RUN_FILES.heldout}: no such file; run `dvc repro train`")
    heldout = read_jsonl(RUN_FILES.heldout)
    device = configure_torch(params.train.device, params.train.threads, params.train.arithmetic)
    with device_errors([f"evaluate.samples_per_prompt below {params.evaluate.samples_per_prompt}", "a smaller model"]):
        stored = stored_classifiers(CLASSIFIERS, INDEPENDENT)
        tables = measured_rewards(params, prompts, stored)
        cuts = {name: Cuts() for name in tables}
        rewards = {
            name: build_reward(name, table, CHECKPOINT / "encoder", device, stored, cuts[name])
            for name, table in tables.items()
        }
        metrics, rows = evaluate(params, prompts, device, rewards)
        measured = {name: reward for name, reward in rewards.items() if name in metrics}
        curve = curve_rows(
            heldout, heldout_scores(heldout, prompts, params.reward, measured), params.reward, partial(draw, params)
        )
    for name, counted in cuts.items():
        if counted.cut:
            print(counted.note(name), file=sys.stderr)
    if depends_on(load_params()) != depends_on(params):  # DVC would record the new values
        raise UserError("params.yaml changed while the policy was evaluated; repeat the command")
    write_jsonl(RUN_FILES.completions, rows)
    write_json(RUN_FILES.metrics, metrics)
    write_jsonl(RUN_FILES.curve, curve)
    write_json(RUN_FILES.measured, [evaluation_identity(params)])  # a list: `dvc metrics show` leaves it out
    trained = metrics[params.reward]
    low, mean, high = (trained["difference"][key] for key in ("low", "mean", "high"))
    sure = "one prompt, no interval" if low is None else f"95% interval {low:+.4f} to {high:+.4f}"
    print(f"held-out {params.reward}: {mean:+.4f} ({sure}) over the reference model")


def evaluate(
    params: Params, prompts: list[Prompt], device: torch.device, rewards: dict[str, Reward]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """metrics.json and the rows of completions.jsonl, without rewards that raise and are neither the trained nor the
    independent one."""
    group = params.evaluate.samples_per_prompt
    tokenizer = load_tokenizer(POLICY)
    ids = [encode_prompt(tokenizer, prompt.content, params.selected_model.chat) for prompt in prompts]
    longest = longest_sequence(list(map(len, ids)), params.train.max_tokens, params.selected_recipe.length_limit)
    layout = load_layout(CHECKPOINT / "layout.json", longest)
    eos = end_of_text_ids(CHECKPOINT / "policy", tokenizer)
    stopped = stop_check(tokenizer, params.selected_recipe.stop_strings)
    # one model at a time, to need no more memory than training
    rollouts = {"policy": sample_all(params, ids, load_policy(POLICY, device), eos, layout, "policy", stopped)}
    if not all(torch.isfinite(rollout.logprobs[rollout.completion_mask]).all() for rollout in rollouts["policy"]):
        print("warning: the policy's log-probabilities are not finite; its texts mean nothing", file=sys.stderr)
    reference = load_policy(CHECKPOINT / "policy", device)
    rollouts["checkpoint"] = sample_all(params, ids, reference, eos, layout, "reference", stopped)
    texts: dict[str, list[str]] = {}
    metrics: dict[str, Any] = {"text": {}, "ref_logprob_per_token": {}}
    for name in NAMES:
        texts[name], metrics["text"][name], metrics["ref_logprob_per_token"][name] = measure(
            params, rollouts[name], reference, tokenizer, eos, layout.packing
        )
    repeated = [prompt for prompt in prompts for _ in range(group)]
    tokens = {name: [ids for rollout in rollouts[name] for ids in rollout.token_lists()] for name in NAMES}
    scores: dict[str, Tensor] = {}  # [2, B, G]: checkpoint, policy
    for name, reward in rewards.items():
        try:
            before, after = (reward.score(RewardBatch(repeated, texts[which], tokens[which])) for which in NAMES)
        except UserError as error:
            leave_out(name, error, params)
            continue
        both = torch.tensor([before.rewards, after.rewards], dtype=torch.float64)
        scores[name] = both.view(2, len(prompts), group)
        metrics[name] = compare(scores[name], params)
        if isinstance(params.rewards[name], VERIFIABLE):
            metrics[name]["pass_at"] = compare_solved(scores[name], params)
        if reward.weights:
            terms = torch.tensor([before.terms, after.terms], dtype=torch.float64).view(2, -1, len(prompts), group)
            metrics[name]["terms"] = compare_terms(terms, reward.weights, params)
    rows = [
        {
            "prompt": prompt.text, "sample": g, **{name: texts[name][b * group + g] for name in NAMES},
            "rewards": {key: both[:, b, g].tolist() for key, both in scores.items()},
        }
        for b, prompt in enumerate(prompts) for g in range(group)
    ]  # fmt: skip
    return metrics, rows


def measured_rewards(params: Params, prompts: list[Prompt], classifiers: dict[str, Path]) -> dict[str, Any]:
    """The tables of the trained and the independent reward, and of every other reward whose columns these prompts have
    and whose classifiers are stored."""
    found: dict[str, Any] = {}
    for name, table in params.rewards.items():
        try:
            check_columns(name, table, params.selected_prompt_set, f"prompt_sets.{params.prompts}")
            check_rows(name, table, prompts)
            for asked in classifier_rewards(table):
                folder_of(name, asked, classifiers)
            found[name] = table
        except UserError as error:
            leave_out(name, error, params)
    return found


def leave_out(name: str, error: UserError, params: Params) -> None:
    """Raise the error of the trained or the independent reward. For any other reward, only print a note."""
    if name in params.asked_rewards:
        raise error
    print(f"note: not measured: {error}", file=sys.stderr)


def depends_on(params: Params) -> tuple[Any, ...]:
    """The parameters that this stage depends on, as dvc.yaml lists them."""
    p, sizes = params, measured_params(params)
    return (
        sizes, p.model, p.selected_model, p.prompts, p.selected_prompt_set, p.selected_recipe, p.recipe, p.reward,
        p.rewards, p.seed, p.train,
    )  # fmt: skip


def measured_params(params: Params) -> dict[str, Any]:
    """The keys of `evaluate` that the measurement depends on. The others are for the held-out curve, which training
    measures, and for the verdict (`independent`)."""
    return params.evaluate.model_dump(include={"prompts", "samples_per_prompt", "bootstrap"})


def evaluation_identity(params: Params) -> dict[str, Any]:
    """What was evaluated and how, and the digests of the results. Only evaluations with the same prompts and parameters
    are comparable."""
    files = (RUN_FILES.completions, RUN_FILES.metrics, RUN_FILES.curve, RUN_FILES.heldout)
    told = {"policy": folder_digests(POLICY), "prompts": sha256(HELDOUT_PROMPTS), "params": measured_params(params)}
    return told | {file.name: sha256(file) for file in files}


def sample_all(
    params: Params,
    prompts: list[list[int]],
    policy: PreTrainedModel,
    eos: tuple[int, ...],
    layout: Layout,
    name: str,
    stopped: Stopped | None,
) -> list[Rollout]:
    """Sample completions for the prompts (token ids), PROMPT_BATCH prompts at a time. The progress bar shows `name`."""
    recipe, group, size = params.selected_recipe, params.evaluate.samples_per_prompt, params.train.max_tokens
    device, rollouts = policy.device, []
    for start in progress(range(0, len(prompts), PROMPT_BATCH), f"sampling from the {name}, in batches"):
        ids = prompts[start : start + PROMPT_BATCH]
        # each prompt has its own random numbers: the same for both models, whatever the other prompts
        noise = torch.cat([draw_uniforms(params.seed, start + b, "evaluate", group, size) for b in range(len(ids))])
        limits = completion_limits([len(p) for p in ids], size, recipe.length_limit).to(device)
        rollouts.append(
            sample(
                policy,
                *pad_prompts(ids, eos[0], device),
                limits,
                noise.to(device),
                eos,
                recipe.sampling_params,
                layout.sampling,
                stopped,
            )
        )
    return rollouts


def measure(
    params: Params,
    rollouts: list[Rollout],
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos: tuple[int, ...],
    packing: bool,
) -> tuple[list[str], dict[str, float | None], float]:
    """Texts [B * G] as the reward reads them, their statistics, and their mean log-probability per token under the
    reference model, in nats. The statistics include the texts' cost under the reference model."""
    recipe, group = params.selected_recipe, params.evaluate.samples_per_prompt
    texts: list[str] = []
    plain: list[str] = []  # without special tokens
    said: list[str] = []  # like `plain`, with the stop string that ends a text
    read: list[Completion] = []
    nats, counted = 0.0, 0
    logprobs: list[Tensor] = []  # of the tokens of `said`
    entropy: list[Tensor] = []
    for rollout in rollouts:
        texts += completion_texts(rollout, tokenizer, recipe.special_tokens, group, eos, recipe.stop_strings)
        plain += completion_texts(rollout, tokenizer, "strip", group, eos, recipe.stop_strings)
        said += completion_texts(rollout, tokenizer, "strip", group, eos)
        read += read_completions(rollout, tokenizer, eos, recipe.stop_strings)
        scores = score_microbatched(reference, rollout, params.train.micro_batch, recipe.temperature, packing)
        nats += scores.logprobs[rollout.completion_mask].double().sum().item()
        mask = rollout.text_mask(eos)
        logprobs.append(scores.logprobs[mask])
        entropy.append(scores.entropy[mask])
        counted += int(rollout.lengths.sum())
    statistics: dict[str, float] = text_statistics(plain, [completion.tokens for completion in read], group)
    statistics |= {"completion_tokens": counted / len(texts), **ending_shares([one.ending for one in read])}
    statistics |= text_cost(torch.cat(logprobs), torch.cat(entropy), said)
    return texts, {key: finite_or_none(value) for key, value in statistics.items()}, nats / counted


def heldout_scores(
    heldout: list[dict[str, Any]], prompts: list[Prompt], trained: str, rewards: dict[str, Reward]
) -> dict[str, Tensor]:
    """Rewards [steps, prompts] of the completions that training sampled on the first held-out prompts. Training has
    already computed the trained reward."""
    steps = list(dict.fromkeys(row["step"] for row in heldout))
    scores: dict[str, list[float]] = {name: [] for name in rewards} if steps else {}
    for step in steps:
        rows = [row for row in heldout if row["step"] == step]
        for name, values in scores.items():
            completions, ids = ([row[key] for row in rows] for key in ("completion", "completion_ids"))
            asked = RewardBatch(prompts[: len(rows)], completions, ids)
            values += [row["reward"] for row in rows] if name == trained else rewards[name](asked)
    return {name: torch.tensor(v, dtype=torch.float64).view(len(steps), -1) for name, v in scores.items()}


def draw(params: Params, prompts: int) -> Tensor:
    """[resamples, prompts]: which prompts each resample of the bootstrap holds."""
    drawn = generator(params.seed, 0, "bootstrap")
    return torch.randint(prompts, (params.evaluate.bootstrap, prompts), generator=drawn)


def compare(rewards: Tensor, params: Params) -> dict[str, Any]:
    """Means with 95% intervals of both models and of the paired difference. The bootstrap resamples prompts.

    rewards [2, B, G]: reference, policy. win_rate: share of pairs in which the policy's reward is higher, ties count
    half.
    """
    wins = (rewards[1] > rewards[0]).double() + 0.5 * (rewards[1] == rewards[0]).double()
    return intervals(rewards.mean(2), params) | {"win_rate": wins.mean().item()}


def compare_solved(rewards: Tensor, params: Params) -> dict[str, Any]:
    """pass@k of both models and of the paired difference, by k. rewards [2, B, G]: 0 or 1."""
    right, samples = rewards.sum(2).long(), rewards.shape[2]
    return {str(k): intervals(pass_at_k(right, samples, k), params) for k in measured_k(samples)}


def compare_terms(terms: Tensor, weights: Mapping[str, float], params: Params) -> dict[str, Any]:
    """What each term adds to a sum, in the form of `compare`: the means add up to the reward's. `unweighted`: the mean
    of the term's own value, over the completions for which it has one.

    terms [2, K, B, G]: reference, policy; NaN where a term has no value.
    """
    added = torch.stack([contributions(own, weights) for own in terms])
    return {
        name: {
            "weight": weight,
            "unweighted": {who: finite_or_none(own[k].nanmean().item()) for who, own in zip(NAMES, terms, strict=True)},
            **intervals(added[:, k].mean(2), params),
        }
        for k, (name, weight) in enumerate(weights.items())
    }


def intervals(values: Tensor, params: Params) -> dict[str, Any]:
    """Means and mean difference, with intervals, of the reference's and the policy's values [2, B], one per prompt."""
    checkpoint, policy = values
    pairs = {"checkpoint": checkpoint, "policy": policy, "difference": policy - checkpoint}
    indices = draw(params, len(checkpoint))
    return {name: interval(of_prompts, indices) for name, of_prompts in pairs.items()}


if __name__ == "__main__":
    run_stage(main)
