"""A step's row of history.csv, from all that the step has computed."""

from dataclasses import dataclass

from torch import Tensor

from pipeline.models.scoring import Scores
from pipeline.rl.advantages import group_mean, log_ratios
from pipeline.rl.batch import Groups, rollout_metrics, text_costs
from pipeline.rl.context import TrainContext
from pipeline.rl.metrics import (
    HISTORY_COLUMNS,
    largest_gap,
    nonfinite_share,
    policy_metrics,
    reference_metrics,
    reward_metrics,
    update_metrics,
)
from pipeline.rl.update import BackwardResult


@dataclass(frozen=True)
class StepTensors:
    """Results of a step. B prompts, G samples of each, N = B * G completions of up to T tokens."""

    groups: Groups  # that the step learned from
    rewards: Tensor  # [B, G] plain rewards of the groups that were drawn first, before resampling: the metrics' reward
    baseline: Tensor  # [B, G], in units of the reward
    advantages: Tensor  # [B, G]
    gradient: BackwardResult
    ref_rows: Tensor  # [n] which of the N the reference has scored
    ref_scores: Scores  # [n, T]
    probe_rows: Tensor  # [m] which of the N were scored again after the update
    logprobs_after: Tensor  # [m, T] of the policy after the update

    def ref_log_ratios(self) -> Tensor:
        """[n] log pi(y | x) - log pi_ref(y | x), nats."""
        mask = self.groups.rollout.completion_mask[self.ref_rows]
        return log_ratios(self.gradient.logprobs[self.ref_rows], self.ref_scores.logprobs, mask)


def history_row(tensors: StepTensors, told: dict[str, float], context: TrainContext) -> dict[str, float]:
    """All columns of history.csv. told: the columns that are not computed from tensors."""
    rollout, logprobs, after = tensors.groups.rollout, tensors.gradient.logprobs, tensors.logprobs_after
    mask, ref_rows, probe_rows = rollout.completion_mask, tensors.ref_rows, tensors.probe_rows
    normalized = context.reward.combine == "normalized"  # then tensors.baseline is that of the signal
    baseline = group_mean(tensors.groups.rewards) if normalized else tensors.baseline
    group_size = context.params.train.samples_per_prompt
    metrics = {
        **reward_metrics(tensors.rewards, baseline, tensors.advantages),
        **policy_metrics(logprobs, tensors.gradient.entropy, mask),
        **reference_metrics(logprobs[ref_rows], tensors.ref_scores.logprobs, mask[ref_rows], group_size),
        **update_metrics(logprobs[probe_rows], after, mask[probe_rows], group_size),
        **rollout_metrics(rollout, context),
        **text_costs(rollout.take(ref_rows), tensors.ref_scores, context),
        "nonfinite_logprobs": nonfinite_share(logprobs[mask], after[mask[probe_rows]]),
        "loss": tensors.gradient.loss,
        "grad_snr": tensors.gradient.snr,
        "logprob_gap": largest_gap(rollout.sampler_logprobs, tensors.gradient.loss_logprobs, mask),
        "truncation_gap": largest_gap(rollout.sampler_logprobs, rollout.logprobs, mask),
        **told,
    }
    return {column: metrics[column] for column in HISTORY_COLUMNS}
