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
    group_mean,
    log_ratios,
    next_running_mean,
    overlong_penalties,
    reward_scale,
    with_kl_penalty,
)
from pipeline.rl.batch import Groups, reward_batch, rollout_metrics, sample_batch, score_batch, text_costs
from pipeline.rl.context import TrainContext, sync_rollout_model
from pipeline.rl.loss import LossNormalizers
from pipeline.rl.metrics import (
    HISTORY_COLUMNS,
    largest_gap,
    nonfinite_share,
    policy_metrics,
    reference_metrics,
    reward_metrics,
    update_metrics,
)
from pipeline.rl.micro_batch import Batch
from pipeline.rl.optimizer import learning_rate
from pipeline.rl.resample import replace_flat_groups
from pipeline.rl.samples import StepSamples, first_samples
from pipeline.rl.seeding import draw_probe_prompts, draw_prompts, draw_uniforms
from pipeline.rl.state import TrainState
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

    # rewards: r(x, y), or the sum of its normalised terms, and in units of their spread before training
    reward, normalized = context.reward, context.reward.combine == "normalized"
    groups = Groups(indices, prompts, rollout, *reward_batch(prompts, rollout, context, step))
    drawn, sampled = groups, groups.rewards.numel()  # what metrics call the reward, whatever is learned from
    if recipe.resample_rounds > 0:
        groups, more = replace_flat_groups(groups, context, step)
        sampled += more
    prompts, rollout, rewards, terms = groups.prompts, groups.rollout, groups.rewards, groups.terms
    mask = rollout.completion_mask
    signal = signals(terms, reward.weights, reward.combine).sum(0) if normalized else rewards
    scale = reward_scale(state.calibration) if recipe.scale_rewards == "calibration" else 1.0
    scaled_rewards = with_overlong_penalty(signal, rollout, params) / scale
    watch.lap("reward")

    # reference logprobs: log pi_ref(y | x), of all completions for a KL term, else of some, to measure the distance
    probe_rows = draw_probe_rows(params, step, context.device)
    ref_rows = probe_rows if recipe.kl == "none" else torch.arange(len(mask), device=context.device)
    with context.reference() as reference:
        ref_scores = score_batch(reference, rollout.take(ref_rows), context)
    ref_logprobs = ref_scores.logprobs

    # KL penalty in the reward: r - kl_coef * (log pi(y | x) - log pi_ref(y | x))
    policy_logprobs = rollout.sampler_logprobs if recipe.loss_distribution == "sampler" else rollout.logprobs
    kl_coef = recipe.kl_coef
    if recipe.kl_target > 0 and recipe.kl != "none":
        kl = log_ratios(policy_logprobs, ref_logprobs, mask).mean().item()
        kl_coef = adaptive_kl_coef(kl_coef, kl, recipe.kl_target)
    rewards_with_kl = scaled_rewards
    if recipe.kl == "reward_k1":
        rewards_with_kl = with_kl_penalty(scaled_rewards, policy_logprobs, ref_logprobs, mask, kl_coef)

    # baseline b and advantages: A = r - b
    inputs = baseline_inputs(state, context, prompts, kl_coef, scale)
    baseline = BASELINES[recipe.baseline](rewards_with_kl, inputs)
    advantage = advantages(rewards_with_kl, baseline, recipe.advantage_norm)
    watch.lap("reference")

    # update: ascend sum_it w_it A_i grad log pi(y_it | x_i, y_i<t), less the recipe's other terms
    loss_mask = make_loss_mask(rollout, group_size, recipe.padding)
    batch = Batch(
        rollout,
        advantage.flatten(),
        loss_mask,
        None if recipe.kl == "none" else ref_logprobs,
        LossNormalizers(len(loss_mask), int(loss_mask.sum()), sizes.max_tokens),
        kl_coef,
    )
    lr = learning_rate(step, sizes.steps, recipe, context.rollout_model.config.get_text_config().hidden_size)
    gradient, updated = update_policy(
        batch,
        policy,
        optimizer,
        recipe,
        lr,
        sizes.micro_batch,
        group_size,
        context.processes,
        sizes.gradient_checkpointing,
        context.layout.packing,
    )
    sync_rollout_model(context, policy)
    watch.lap("update")

    # metrics, also of how far the update moved the policy
    after = score_batch(context.rollout_model, rollout.take(probe_rows), context).logprobs
    groups, gradient, ref_scores = on_cpu(groups), on_cpu(gradient), on_cpu(ref_scores)
    rollout, rewards, advantage, after = groups.rollout, groups.rewards, advantage.cpu(), after.cpu()
    mask = rollout.completion_mask
    ref_rows, probe_rows, ref_logprobs = ref_rows.cpu(), probe_rows.cpu(), ref_scores.logprobs
    watch.lap("rescore")
    shown_baseline = group_mean(rewards) if normalized else (baseline * scale).cpu()  # in the units of the reward
    metrics = {
        **reward_metrics(drawn.rewards.cpu(), shown_baseline, advantage),
        **policy_metrics(gradient.logprobs, gradient.entropy, mask),
        **reference_metrics(gradient.logprobs[ref_rows], ref_logprobs, mask[ref_rows], group_size),
        **update_metrics(gradient.logprobs[probe_rows], after, mask[probe_rows], group_size),
        **rollout_metrics(rollout, context),
        **text_costs(rollout.take(ref_rows), ref_scores, context),
        "nonfinite_logprobs": nonfinite_share(gradient.logprobs[mask], after[mask[probe_rows]]),
        **updated, "step": step, "loss": gradient.loss, "grad_snr": gradient.snr, "lr": lr, "kl_coef": kl_coef,
        "logprob_gap": largest_gap(rollout.sampler_logprobs, gradient.loss_logprobs, mask),
        "truncation_gap": largest_gap(rollout.sampler_logprobs, rollout.logprobs, mask),
    }  # fmt: skip
    state.rows.append({column: metrics[column] for column in HISTORY_COLUMNS})
    ref_log_ratios = log_ratios(gradient.logprobs[ref_rows], ref_logprobs, mask[ref_rows])
    samples = StepSamples(step, groups, advantage, gradient.logprobs, ref_rows, ref_log_ratios)
    state.samples += first_samples(samples, context)
    state.terms += term_rows(step, drawn.terms.cpu(), reward.weights, reward.combine)

    # what the next step needs of this one
    state.stopped = bool(updated["nonfinite"]) and sizes.on_nonfinite == "stop"
    if recipe.baseline == "running":
        state.running_mean = next_running_mean(state.running_mean, rewards_with_kl, recipe.baseline_decay)
    watch.lap("diagnostics")
    sampled += len(prompts) if recipe.baseline == "greedy" else 0
    state.timings.append(timing_row(watch.seconds, sampled, context.device))
    return samples


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
    if recipe.kl == "reward_k1":  # the samples are penalised, by both: else it would stay in every advantage
        with context.reference() as reference:
            ref_logprobs = score_batch(reference, rollout, context).logprobs
        rewards = with_kl_penalty(rewards, rollout.logprobs, ref_logprobs, rollout.completion_mask, kl_coef)
    return rewards.squeeze(1)


def with_overlong_penalty(rewards: Tensor, rollout: Rollout, params: Params) -> Tensor:
    """Rewards [B, G] less what the recipe takes from completions that come near the limit."""
    buffer, penalty = params.selected_recipe.overlong_buffer, params.selected_recipe.overlong_penalty
    if buffer == 0:
        return rewards
    return rewards - overlong_penalties(rollout.lengths, params.train.max_tokens, buffer, penalty).view_as(rewards)


def draw_probe_rows(params: Params, step: int, device: torch.device) -> Tensor:
    """Indices of the completions that are scored again after the update: all of each of the chosen prompts."""
    sizes = params.train
    chosen = draw_probe_prompts(params.seed, step, sizes.prompts_per_step, sizes.kl_probe_prompts)
    group_size = sizes.samples_per_prompt
    return torch.tensor([row for b in chosen for row in range(b * group_size, (b + 1) * group_size)], device=device)
