"""One step of REINFORCE, formula by formula. B prompts x, G completions y of each, N = B * G."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config.schema import Params, SamplingParams
from pipeline.data.prompts import Prompt
from pipeline.models.host import on_cpu
from pipeline.models.sampling import Rollout
from pipeline.rl.advantages import (
    BASELINES,
    adaptive_kl_coef,
    advantages,
    log_ratios,
    next_running_mean,
    overlong_penalties,
    reward_scale,
    with_kl_penalty,
)
from pipeline.rl.batch import Groups, reward_batch, sample_batch, score_batch
from pipeline.rl.context import TrainContext, sync_rollout_model
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.micro_batch import Batch
from pipeline.rl.optimizer import learning_rate
from pipeline.rl.resample import replace_flat_groups
from pipeline.rl.samples import StepSamples, first_samples
from pipeline.rl.seeding import draw_probe_prompts, draw_prompts, draw_uniforms
from pipeline.rl.state import TrainState
from pipeline.rl.step_metrics import StepTensors, history_row
from pipeline.rl.terms import signals, term_rows
from pipeline.rl.update import make_loss_mask, update_policy
from pipeline.timing import Stopwatch, timing_row


def train_step(
    state: TrainState, context: TrainContext, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> StepSamples:
    """Appends the step's row, first samples and timings to `state`; returns all of its samples."""
    params, recipe, sizes, step = context.params, context.params.selected_recipe, context.params.train, state.step
    group_size, watch = sizes.samples_per_prompt, Stopwatch()

    # rollout: y ~ pi(. | x)
    indices = draw_prompts(params.seed, step, sizes.prompts_per_step, len(context.prompts), recipe.prompt_sampling)
    prompts = [context.prompts[i] for i in indices]
    uniforms = draw_uniforms(params.seed, step, "sample", len(prompts) * group_size, sizes.max_tokens)
    rollout = sample_batch(prompts, context, context.rollout_model, uniforms)
    watch.lap("sample")

    # rewards: r(x, y), or the sum of its normalised terms, in units of their spread before training
    drawn = Groups(indices, prompts, rollout, *reward_batch(prompts, rollout, context, step))
    groups, resampled = replace_flat_groups(drawn, context, step)
    rollout, mask = groups.rollout, groups.rollout.completion_mask
    scale = reward_scale(state.calibration) if recipe.scale_rewards == "calibration" else 1.0
    rewards = with_overlong_penalty(learned_rewards(groups, context), rollout, params) / scale
    watch.lap("reward")

    # reference logprobs: log pi_ref(y | x), of all completions if there is a KL term, else of some to measure the KL
    probe_rows = draw_probe_rows(params, step, context.device)
    ref_rows = probe_rows if recipe.kl == "none" else torch.arange(len(mask), device=context.device)
    with context.reference() as reference:
        ref_scores = score_batch(reference, rollout.take(ref_rows), context)

    # KL penalty in the reward: r - kl_coef * (log pi(y | x) - log pi_ref(y | x))
    logprobs = rollout.sampler_logprobs if recipe.loss_distribution == "sampler" else rollout.logprobs
    kl_coef = recipe.kl_coef
    if recipe.kl_target > 0 and recipe.kl != "none":
        kl = log_ratios(logprobs, ref_scores.logprobs, mask).mean().item()
        kl_coef = adaptive_kl_coef(kl_coef, kl, recipe.kl_target)
    if recipe.kl == "reward_k1":
        rewards = with_kl_penalty(rewards, logprobs, ref_scores.logprobs, mask, kl_coef)

    # baseline b and advantages: A = r - b
    inputs = baseline_inputs(state, context, groups.prompts, kl_coef, scale)
    baseline = BASELINES[recipe.baseline](rewards, inputs)
    advantage = advantages(rewards, baseline, recipe.advantage_norm)
    watch.lap("reference")

    # update: ascend sum_it w_it A_i grad log pi(y_it | x_i, y_i<t), less the recipe's other terms
    loss_mask = make_loss_mask(rollout, group_size, recipe.padding)
    normalizers = LossNormalizers(len(loss_mask), int(loss_mask.sum()), sizes.max_tokens)
    ref_logprobs = None if recipe.kl == "none" else ref_scores.logprobs
    batch = Batch(rollout, advantage.flatten(), loss_mask, ref_logprobs, normalizers, kl_coef)
    lr = learning_rate(step, sizes.steps, recipe, context.rollout_model.config.get_text_config().hidden_size)
    # settings that change only memory and time
    layout = sizes.micro_batch, group_size, context.processes, sizes.gradient_checkpointing, context.layout.packing
    gradient, updated = update_policy(batch, policy, optimizer, recipe, lr, *layout)
    sync_rollout_model(context, policy)
    watch.lap("update")

    # metrics, including how far the update moved the policy
    after = score_batch(context.rollout_model, rollout.take(probe_rows), context).logprobs
    scores = gradient, ref_rows, ref_scores, probe_rows, after
    tensors = on_cpu(StepTensors(groups, drawn.rewards, baseline * scale, advantage, *scores))
    watch.lap("rescore")
    state.rows.append(history_row(tensors, {**updated, "step": step, "lr": lr, "kl_coef": kl_coef}, context))
    samples = StepSamples(
        step, tensors.groups, tensors.advantages, tensors.gradient.logprobs, tensors.ref_rows, tensors.ref_log_ratios()
    )
    state.samples += first_samples(samples, context)
    state.terms += term_rows(step, drawn.terms.cpu(), context.reward.weights, context.reward.combine)

    # state that the next step needs
    state.stopped = bool(updated["nonfinite"]) and sizes.on_nonfinite == "stop"
    if recipe.baseline == "running":
        state.running_mean = next_running_mean(state.running_mean, rewards, recipe.baseline_decay)
    watch.lap("diagnostics")
    greedy = len(prompts) if recipe.baseline == "greedy" else 0
    state.timings.append(timing_row(watch.seconds, len(loss_mask) + resampled + greedy, context.device))
    return samples


def learned_rewards(groups: Groups, context: TrainContext) -> Tensor:
    """[B, G] What the policy learns from: the rewards, or the sum of their terms, each term normalised in its group."""
    reward = context.reward
    if reward.combine != "normalized":
        return groups.rewards
    return signals(groups.terms, reward.weights, reward.combine).sum(0)


def baseline_inputs(
    state: TrainState, context: TrainContext, prompts: list[Prompt], kl_coef: float, scale: float
) -> Tensor | None:
    """What the recipe's baseline needs beyond the batch's own rewards, for prompts [B], in units of `scale`: the
    running mean of earlier rewards, or the rewards [B] of a greedy completion of each prompt."""
    recipe = context.params.selected_recipe
    if recipe.baseline == "running" and state.running_mean is not None:
        return torch.tensor(state.running_mean, dtype=torch.float64, device=context.device)
    if recipe.baseline != "greedy":
        return None
    uniforms = torch.zeros(len(prompts), context.params.train.max_tokens, dtype=torch.float64)
    rollout = sample_batch(
        prompts, context, context.rollout_model, uniforms, SamplingParams(recipe.temperature, top_k=1)
    )
    rewards = reward_batch(prompts, rollout, context, state.step)[1]  # [B, 1]
    rewards = with_overlong_penalty(rewards, rollout, context.params) / scale
    if recipe.kl == "reward_k1":  # as the samples' rewards: else the penalty would stay in every advantage
        with context.reference() as reference:
            ref_logprobs = score_batch(reference, rollout, context).logprobs
        rewards = with_kl_penalty(rewards, rollout.logprobs, ref_logprobs, rollout.completion_mask, kl_coef)
    return rewards.squeeze(1)


def with_overlong_penalty(rewards: Tensor, rollout: Rollout, params: Params) -> Tensor:
    """Rewards [B, G] minus the recipe's penalty for completions near the limit."""
    buffer, penalty = params.selected_recipe.overlong_buffer, params.selected_recipe.overlong_penalty
    if buffer == 0:
        return rewards
    return rewards - overlong_penalties(rollout.lengths, params.train.max_tokens, buffer, penalty).view_as(rewards)


def draw_probe_rows(params: Params, step: int, device: torch.device) -> Tensor:
    """Indices of the completions that are scored again after the update: all completions of the chosen prompts."""
    sizes = params.train
    chosen = draw_probe_prompts(params.seed, step, sizes.prompts_per_step, sizes.kl_probe_prompts)
    group_size = sizes.samples_per_prompt
    return torch.tensor([row for b in chosen for row in range(b * group_size, (b + 1) * group_size)], device=device)
