"""Stage `train`: REINFORCE. Sample, score, compare with the baseline, step.

Left out of what the field's trainers have: a value network and a replay buffer. Each batch is sampled from the policy
that it updates, and used for one update, or for several where the recipe weighs them by importance (`epochs`).
"""

import dataclasses
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.diagnostics.calibration import untouched
from pipeline.diagnostics.metrics import (
    HISTORY_COLUMNS,
    largest_gap,
    nonfinite_share,
    policy_metrics,
    reference_metrics,
    reward_metrics,
    update_metrics,
)
from pipeline.diagnostics.verdict import TITLES, findings, judged
from pipeline.errors import UserError, run_stage
from pipeline.experience.batch import (
    reward_batch,
    rollout_metrics,
    sample_batch,
    sample_rows,
    score_batch,
)
from pipeline.experience.calibrate import calibrate
from pipeline.experience.setting import CHECKPOINT, PROMPTS, Setting, catch_up, first_policy, in_one_piece, set_stage
from pipeline.io import checkpoints, launch, provenance, tracking
from pipeline.io.artifacts import (
    atomic_folder,
    folder_digests,
    sha256,
    to_json,
    write_csv,
    write_json,
    write_jsonl,
)
from pipeline.io.ends import keep_token_ids
from pipeline.io.history import Progress, history_file
from pipeline.io.runtime import draw_prompts, draw_rescored, set_up, uniforms
from pipeline.io.signals import caught_signals
from pipeline.io.stopwatch import Stopwatch, timing_row
from pipeline.io.workspace import is_committed, root
from pipeline.params import SELECTORS, Params, load
from pipeline.policy.load import end_of_text_ids, load_layout
from pipeline.policy.weights import optimizer_state, put_optimizer_state, put_weights, trained_weights
from pipeline.reinforce.advantages import (
    BASELINES,
    adapted_kl_coef,
    advantages,
    next_running_mean,
    with_kl_penalty,
)
from pipeline.reinforce.loss import BatchSize
from pipeline.reinforce.optim import learning_rate, make_optimizer
from pipeline.reinforce.processes import Processes
from pipeline.reinforce.step import Batch, loss_mask, update_on

POLICY, HEALTHY, REPORTS = Path("data/policy"), Path("data/healthy"), Path("reports/train")
IN_FOLDER = Path(".locks/train")
UNDO = "undo that and repeat the command, which only writes the result; or, for what is there now, just repeat it"


def main() -> None:
    params = load()
    launch.relaunch("pipeline.train")
    if not PROMPTS.exists() or not (CHECKPOINT / "manifest.json").exists():
        raise UserError(f"{PROMPTS} or {CHECKPOINT} is missing; run `dvc repro`, which makes them first")
    device = set_up(params.train.device, params.train.threads)
    identity = run_identity(params, device)
    folder = root() / ".checkpoints" / identity["train_key"]
    processes = launch.join(device, params.train.prompts_per_step)
    with ExitStack() as locks:
        if processes.writes:
            locks.enter_context(checkpoints.exclusive(folder, "this very run"))
            # a trainer that outlived its dvc must not write its outputs between those of other parameters
            locks.enter_context(checkpoints.exclusive(IN_FOLDER, "in this folder"))
            forget_what_is_committed(folder, identity, params)
        processes.wait()
        train(params, identity, folder, device, processes)
    launch.leave(processes)


def forget_what_is_committed(folder: Path, identity: dict[str, Any], params: Params) -> None:
    """Where DVC has the very result of the finished states, it wants it made anew: `dvc repro -f`."""
    state = checkpoints.load(folder)
    if state is None:
        return
    run = Progress(**state["run"])
    if finished(run, params) and is_committed(to_json(recorded(identity, run))):
        checkpoints.forget(folder)


def recorded(identity: dict[str, Any], run: Progress) -> dict[str, Any]:
    """run.json: what the result depends on, and how many processes made it, on which its last digits depend."""
    return {**identity, "processes": run.processes}


def run_identity(params: Params, device: torch.device) -> dict[str, Any]:
    """What the result depends on, and its digest, the train_key."""
    tables = {name: params.selected(name).model_dump() for name in SELECTORS}
    chosen = {name: getattr(params, name) for name in SELECTORS} | {"seed": params.seed}
    digests = provenance.params_digests(
        chosen, {**{name: params.selected(name) for name in SELECTORS}, "train": params.train}
    )
    parts = {
        "code": provenance.digest(
            [
                provenance.code_digest("pipeline.train"),
                provenance.library_versions(*["peft"] if params.train.lora_rank else []),
            ]
        ),
        "custom": provenance.digest(folder_digests(Path("custom"))),
        "prompts": sha256(PROMPTS),
        "checkpoint": sha256(CHECKPOINT / "manifest.json"),
        "layout": asdict(load_layout(CHECKPOINT / "layout.json")),
        "params": chosen | provenance.flatten({**tables, "train": params.train.model_dump()}),
        "device": device.type,
        **digests,
    }
    # the tables once more as they are: flattening shows them to people and may blur a difference
    return {"train_key": provenance.digest([parts, tables]), **parts}


def still(identity: dict[str, Any], device: torch.device) -> None:
    """Raises UserError where what the run depends on was changed while it trained: DVC would record, once the stage has
    ended, that its result is of what is there now."""
    try:
        now = run_identity(load(), device)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} was removed while this run trained; {UNDO}") from None
    names = {
        "code": "pipeline/", "custom": "custom/", "prompts": PROMPTS, "checkpoint": CHECKPOINT, "layout": CHECKPOINT
    }  # fmt: skip
    if now["train_key"] != identity["train_key"]:
        changed = [str(name) for part, name in names.items() if now[part] != identity[part]] or ["params.yaml"]
        raise UserError(f"{', '.join(changed)} changed while this run trained; {UNDO}")


def train(
    params: Params, identity: dict[str, Any], folder: Path, device: torch.device, processes: Processes
) -> None:  # fmt: skip
    """The loop. Writes the stage's outputs when it ends; saves a resume state every `checkpoint_every` steps."""
    setting, policy = set_stage(params, device, processes)
    optimizer = make_optimizer(policy.parameters(), params.selected("recipe"))
    run = resume(folder, policy, optimizer)
    agree(identity["train_key"], run.step, processes, device)
    catch_up(setting, policy)
    run.calibration = run.calibration or calibrate(setting)
    if run.processes[-1:] != [processes.record] and not finished(run, params):
        run.processes.append(processes.record)
    tracker: tracking.Live | tracking.Nowhere = tracking.Nowhere()
    if processes.writes:
        tracker = tracking.live(
            identity["train_key"], identity["params"], {name: identity[name] for name in provenance.DIGESTS}
        )
    try:
        loop(run, setting, policy, optimizer, tracker, folder)
        still(identity, device)
        saved = in_one_piece(policy, processes)
        if processes.writes:
            write_outputs(run, identity, setting, saved, folder)
    except BaseException as error:
        tracker.close("KILLED" if isinstance(error, SystemExit) else "FAILED")
        raise
    tracker.close("FINISHED")


def loop(
    run: Progress, setting: Setting, policy: PreTrainedModel, optimizer: torch.optim.Optimizer,
    tracker: tracking.Live | tracking.Nowhere, folder: Path,
) -> None:  # fmt: skip
    """Steps until the last one, a non-finite number, a collapse where that is to end the run, or a signal, which ends
    the process after the step in progress. Of several processes one writes."""
    steps, every, processes = setting.params.train.steps, setting.params.train.checkpoint_every, setting.processes
    for step in range(run.step):  # of the run that this one resumes; what the tracker has, it leaves out
        tracker.log(step, run.points(step), int(run.timings[step]["timestamp_ms"]))
    spreads = untouched(run.calibration, setting.params.train.prompts_per_step)
    announced = {finding.kind for finding in findings(run.rows, spreads, steps)}
    bar = tqdm(total=steps, initial=run.step, disable=None if processes.writes else True, unit="step")
    history = history_file(REPORTS / "history.csv", run.rows) if processes.writes else nullcontext()
    with bar, caught_signals() as signals, history as record:
        while not finished(run, setting.params):
            train_step(run, setting, policy, optimizer)
            found = findings(run.rows, spreads, steps)
            run.stopped = run.stopped or bool(found and setting.params.train.on_collapse == "stop")
            if record is not None:
                record(run.rows[-1])
                tqdm.write(run.progress_line())
                for finding in found:
                    if finding.kind not in announced:
                        tqdm.write(f"Diagnosis: {TITLES[finding.kind].lower()} from step {finding.onset} on")
                    announced.add(finding.kind)
            tracker.log(run.step - 1, run.points(-1), int(run.timings[-1]["timestamp_ms"]))
            bar.update()
            signal = processes.largest(signals[0] if signals else 0, setting.device)
            if run.step % every == 0 or run.step == steps or run.stopped or signal:
                keep(folder, run, policy, optimizer, processes, judged=judged(found, run.step), every=every)
                tracker.flush()
            if signal and run.step < steps:
                if processes.writes:
                    print(f"stopped by a signal after step {run.step - 1}; the same command goes on", file=sys.stderr)
                processes.wait()  # a launcher ends the others as soon as one has gone
                sys.exit(128 + signal)


def finished(run: Progress, params: Params) -> bool:
    return run.step >= params.train.steps or run.stopped


def train_step(
    run: Progress, setting: Setting, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> None:  # fmt: skip
    """One step of REINFORCE on B prompts with G samples each; appends its row, samples and timings to `run`."""
    params, step, watch = setting.params, run.step, Stopwatch()
    recipe, group, micro_batch = params.selected("recipe"), params.train.samples_per_prompt, params.train.micro_batch
    drawn = draw_prompts(params.seed, step, params.train.prompts_per_step, len(setting.prompts), recipe.draw)
    noise = uniforms(params.seed, step, "sample", len(drawn) * group, params.train.max_tokens)
    prompts = [setting.prompts[i] for i in drawn]
    rollout = sample_batch(prompts, setting, setting.acting, noise, recipe.top_k, recipe.top_p)
    watch.lap("sample")

    completions, rewards = reward_batch(prompts, rollout, setting)
    watch.lap("reward")

    mask, rescored = rollout.completion_mask, rescored_rows(params, step, setting.device)
    # the KL term needs all completions; without one, a share of the prompts tells how far the policy has gone
    measured_rows = rescored if recipe.kl == "none" else torch.arange(len(mask), device=setting.device)
    with setting.reference() as reference:
        ref_logprobs = score_batch(reference, rollout.take(measured_rows), setting).logprobs
    penalised, kl_coef = rewards, recipe.kl_coef if run.kl_coef is None else run.kl_coef
    acting = rollout.sampler_logprobs if recipe.scoring == "sampler" else rollout.logprobs
    if recipe.kl == "reward_k1":
        penalised = with_kl_penalty(rewards, acting, ref_logprobs, mask, kl_coef)
    baseline = BASELINES[recipe.baseline](penalised, outside_baseline(run, setting, prompts, kl_coef))
    advantage = advantages(penalised, baseline, recipe.advantage_norm)
    watch.lap("reference")

    counted = loss_mask(rollout, group, recipe.padding)
    size = BatchSize(len(counted), int(counted.sum()), params.train.max_tokens)
    batch = Batch(
        rollout, advantage.flatten(), counted, None if recipe.kl == "none" else ref_logprobs, size, kl_coef
    )  # fmt: skip
    lr = learning_rate(step, params.train.steps, recipe)
    gradient, updated = update_on(
        batch, policy, optimizer, recipe, lr, micro_batch, group, setting.processes, params.train.gradient_checkpointing,
        setting.layout.packing,
    )  # fmt: skip
    catch_up(setting, policy)
    watch.lap("update")

    after = score_batch(setting.acting, rollout.take(rescored), setting).logprobs
    watch.lap("rescore")

    measured = {
        **reward_metrics(rewards, baseline, advantage),
        **policy_metrics(gradient.logprobs, gradient.entropy, mask),
        **reference_metrics(gradient.logprobs[measured_rows], ref_logprobs, mask[measured_rows], group),
        **update_metrics(gradient.logprobs[rescored], after, mask[rescored], group),
        **rollout_metrics(rollout, setting),
        "nonfinite_logprobs": nonfinite_share(gradient.logprobs[mask], after[mask[rescored]]),
        **updated, "step": step, "loss": gradient.loss, "grad_snr": gradient.snr, "lr": lr, "kl_coef": kl_coef,
        "logprob_gap": largest_gap(rollout.sampler_logprobs, gradient.scored, mask),
        "truncation_gap": largest_gap(rollout.sampler_logprobs, rollout.logprobs, mask),
    }  # fmt: skip
    run.rows.append({column: measured[column] for column in HISTORY_COLUMNS})
    run.samples += sample_rows(step, prompts, completions, rewards, advantage, rollout, gradient.logprobs, setting)
    run.stopped = bool(updated["nonfinite"]) and params.train.on_nonfinite == "stop"
    if recipe.baseline == "running":
        run.running_mean = next_running_mean(run.running_mean, penalised, recipe.baseline_decay)
    if recipe.kl_target > 0:
        kl = torch.where(mask, acting - ref_logprobs, 0.0).sum(1).mean().item()
        run.kl_coef = adapted_kl_coef(kl_coef, kl, recipe.kl_target)
    watch.lap("diagnostics")
    run.timings.append(timing_row(watch.seconds, rewards.numel(), setting.device))


def outside_baseline(run: Progress, setting: Setting, prompts: list[str], kl_coef: float) -> Tensor | None:
    """What the recipe's baseline needs to know beyond the batch's own rewards; prompts [B]."""
    recipe = setting.params.selected("recipe")
    if recipe.baseline == "running" and run.running_mean is not None:
        return torch.tensor(run.running_mean, dtype=torch.float64, device=setting.device)
    if recipe.baseline != "greedy":
        return None
    noise = torch.zeros(len(prompts), setting.params.train.max_tokens, dtype=torch.float64)
    rollout = sample_batch(prompts, setting, setting.acting, noise, top_k=1, top_p=1.0)
    rewards = reward_batch(prompts, rollout, setting)[1]  # [B, 1]
    if recipe.kl == "reward_k1":  # what the samples are judged by; the penalty would else stay in every advantage
        with setting.reference() as reference:
            ref_logprobs = score_batch(reference, rollout, setting).logprobs
        mask = rollout.completion_mask
        rewards = with_kl_penalty(rewards, rollout.logprobs, ref_logprobs, mask, kl_coef)
    return rewards.squeeze(1)


def rescored_rows(params: Params, step: int, device: torch.device) -> Tensor:
    """Indices of the completions that are scored again: all of each of the chosen prompts."""
    sizes = params.train
    chosen = draw_rescored(params.seed, step, sizes.prompts_per_step, sizes.rescored_prompts)
    group = sizes.samples_per_prompt
    return torch.tensor([row for b in chosen for row in range(b * group, (b + 1) * group)], device=device)


def resume(folder: Path, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Progress:
    state = checkpoints.load(folder)
    if state is None:
        return Progress()
    put_weights(policy, state["policy"])
    put_optimizer_state(optimizer, state["optimizer"])
    return Progress(**state["run"])


def agree(train_key: str, step: int, processes: Processes, device: torch.device) -> None:
    """Raises UserError where the processes are not at the same step of the same run, as without a common folder."""
    mine = torch.tensor([[int(train_key[:15], 16), step]], device=device)
    first, *others = processes.gather(mine).tolist()
    for rank, other in enumerate(others, 1):
        if other != first:
            here, there = (f"step {done} of run {key:015x}" for key, done in (first, other))
            raise UserError(
                f"process 0 would train from {here}, process {rank} from {there}; all of them need one folder"
            )


def keep(
    folder: Path, run: Progress, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, processes: Processes,
    judged: int, every: int,
) -> None:  # fmt: skip
    """Saves the resume state, and the timings beside it for `track`; one process of several does. The policies after fewer
    than `judged` updates are known to be healthy: the last of them is kept too."""
    here = processes.writes
    weights = {"policy": trained_weights(policy, here), "optimizer": optimizer_state(optimizer, here)}
    if not here:
        return
    checkpoints.save(folder, run.step, {**weights, "run": dataclasses.asdict(run)}, judged, every)
    write_csv(folder / "timings.csv", [{"step": step, **timing} for step, timing in enumerate(run.timings)])


def load_healthy(policy: PreTrainedModel, setting: Setting, folder: Path, onset: int) -> int:
    """Puts the last policy before the onset in the place of the present one; gives its step. Raises UserError where its
    state is damaged, after which the same command trains anew."""
    path = checkpoints.healthy(folder, onset, setting.params.train.checkpoint_every)
    if path is None:
        put_weights(policy, trained_weights(first_policy(setting.params, setting.device, policy.device)))
        return 0
    if (state := checkpoints.read(path)) is None:
        checkpoints.forget(folder)
        raise UserError(f"{path} is damaged, the policy before the collapse; the same command trains anew, from zero")
    put_weights(policy, state["policy"])
    return len(state["run"]["rows"])


def write_outputs(
    run: Progress, identity: dict[str, Any], setting: Setting, policy: PreTrainedModel, folder: Path
) -> None:  # fmt: skip
    """data/policy is the last policy, its numbers finite; data/healthy the last one before a collapse, at the steps that
    were saved, and only a note where there was none."""
    sizes, tokenizer = setting.params.train, setting.tokenizer
    found = findings(run.rows, untouched(run.calibration, sizes.prompts_per_step), sizes.steps)
    with atomic_folder(POLICY) as target, atomic_folder(HEALTHY) as beside:
        save_policy(policy, tokenizer, target)
        step = run.step
        if found:
            step = load_healthy(policy, setting, folder, found[0].onset)
            save_policy(policy, tokenizer, beside)
        write_json(beside / "healthy.json", {"step": step, "weights": (HEALTHY if found else POLICY).as_posix()})
    # once more: git may have put an older one in the place of the growing one
    write_csv(REPORTS / "history.csv", run.rows)
    write_csv(REPORTS / "calibration.csv", run.calibration)
    write_jsonl(REPORTS / "samples.jsonl", run.samples)
    write_json(REPORTS / "summary.json", run.summary() | {"digests": [output_digests(identity)]})
    write_json(REPORTS / "run.json", recorded(identity, run))


def save_policy(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Weights or adapter, tokenizer, and the checkpoint's own say on how it is decoded, which training does not touch."""
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    checkpoint = CHECKPOINT / "policy"
    keep_token_ids(checkpoint, folder, end_of_text_ids(checkpoint, tokenizer))


def output_digests(identity: dict[str, Any]) -> dict[str, str]:
    """Of which run the outputs are, and what each holds: summary.json is in git, and whatever reads the files checks them.
    It keeps them in a list, which `dvc metrics show` leaves out."""
    own = {name: identity[name] for name in ("train_key", *provenance.DIGESTS, "written_params")}
    files = {name: sha256(REPORTS / name) for name in ("calibration.csv", "history.csv", "samples.jsonl")}
    files["healthy.json"] = sha256(HEALTHY / "healthy.json")
    return {**own, **files, "policy": provenance.digest(folder_digests(POLICY))}


if __name__ == "__main__":
    run_stage(main)
