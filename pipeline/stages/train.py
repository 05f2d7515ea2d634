"""Stage `train`: REINFORCE. Sample, compute rewards, subtract the baseline, step.

Left out: a value network and a replay buffer. Each batch is sampled from the policy that it updates, and used for one
update, or for several with importance weights (`epochs`).
"""

import dataclasses
import sys
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.arithmetic.bfloat16 import bfloat16_note, uses_bfloat16
from pipeline.arithmetic.environment import Arithmetic
from pipeline.config.load import load_params
from pipeline.config.schema import SELECTORS, Params
from pipeline.diagnosis.calibration import null_statistics
from pipeline.diagnosis.verdict import TITLES, Finding, confirmed_healthy_steps, findings
from pipeline.distributed import launch
from pipeline.distributed.device import arithmetic_in_effect, configure_torch, device_errors, gpu_description
from pipeline.distributed.dist_context import DistContext
from pipeline.distributed.weights import (
    load_optimizer_state,
    load_weights,
    optimizer_state,
    state_bytes,
    trained_weights,
)
from pipeline.errors import UserError, run_stage
from pipeline.file_io import (
    atomic_folder,
    folder_digests,
    sha256,
    to_json,
    write_csv,
    write_json,
    write_jsonl,
)
from pipeline.models.load import load_layout
from pipeline.models.memory import memory_settings
from pipeline.paths import BEST, CHECKPOINT, CLASSIFIERS, HEALTHY, HELDOUT_PROMPTS, POLICY, RUN_FILES, TRAIN_PROMPTS
from pipeline.rewards.classifier import Cuts
from pipeline.rewards.columns import searches_patterns
from pipeline.rewards.custom_files import custom_digests
from pipeline.rewards.turns import settings_of_training
from pipeline.rl.calibrate import calibrate
from pipeline.rl.context import TrainContext, build_context, gather_full_policy, initial_policy, sync_rollout_model
from pipeline.rl.heldout import best_report, best_step, candidate_steps, measure, needed_candidates
from pipeline.rl.optimizer import make_optimizer
from pipeline.rl.samples import StepSamples, sample_columns
from pipeline.rl.state import TrainState
from pipeline.rl.train_step import train_step
from pipeline.runs import checkpoints, provenance, sample_files, workspace
from pipeline.runs.background import BackgroundWriter
from pipeline.runs.dvc_git import check_experiment_folder
from pipeline.runs.follower import follower
from pipeline.runs.history import history_file
from pipeline.runs.host_memory import fits
from pipeline.runs.policy_files import save_policy
from pipeline.runs.progress import progress
from pipeline.runs.signals import caught_signals

IN_FOLDER = Path(".locks/train")
NO_PORTABLE = (
    "train.arithmetic = portable needs Linux on an x86-64 CPU with AVX2 and FMA: this run is native, its bytes are "
    "those of this type of device"
)
NATIVE_GPU = "train.arithmetic = portable is for CPUs: this run is native, its bytes are those of this type of GPU"
UNDO = "undo that and repeat the command, which then only writes the result; to train with the change, just repeat it"


def main() -> None:
    check_experiment_folder()  # `check` has done so, unless DVC took the result of `check` from its run cache
    params = load_params()
    launch.relaunch_with_accelerate("pipeline.stages.train", workspace.root())
    if not TRAIN_PROMPTS.exists() or not (CHECKPOINT / "manifest.json").exists():
        raise UserError(f"{TRAIN_PROMPTS} or {CHECKPOINT} is missing; run `dvc repro`, which makes them first")
    if params.selected_classifiers and not (CLASSIFIERS / "manifest.json").exists():
        raise UserError(f"{CLASSIFIERS} is missing; run `dvc repro`, which makes it first")
    if params.evaluate.every and not HELDOUT_PROMPTS.exists():
        raise UserError(f"{HELDOUT_PROMPTS} is missing; run `dvc repro`, which makes it first")
    if params.train.keep_samples == "all":
        sample_files.check_pyarrow()
    device = configure_torch(params.train.device, params.train.threads, params.train.arithmetic)
    identity = run_identity(params, device)
    for note in arithmetic_notes(params, identity["arithmetic"], device):
        print(f"note: {note}", file=sys.stderr)
    folder = workspace.resume_folder(identity["train_key"])
    processes = launch.init_process_group(device, params.train.prompts_per_step)
    with ExitStack() as locks:
        if processes.is_main_process:
            locks.enter_context(checkpoints.exclusive_lock(folder, "this very run"))
            # an earlier `train` that outlived its `dvc` must not write among the outputs of this one
            locks.enter_context(checkpoints.exclusive_lock(IN_FOLDER, "in this folder"))
            discard_states(folder, identity, params)
        processes.barrier()
        with device_errors(memory_settings(params)):
            train(params, identity, folder, device, processes)
    launch.destroy_process_group(processes)


def arithmetic_notes(params: Params, arithmetic: Arithmetic, device: torch.device) -> list[str]:
    """Notes on a run's arithmetic to print before it starts, one line each."""
    bfloat16 = bfloat16_note(arithmetic) if device.type == "cpu" and uses_bfloat16(params) else None
    native = NO_PORTABLE if device.type == "cpu" else NATIVE_GPU
    portable = native if arithmetic != params.train.arithmetic else None
    return [note for note in (portable, bfloat16) if note]


def discard_states(folder: Path, identity: dict[str, Any], params: Params) -> None:
    """Delete the saved states of a finished run that DVC has committed: the stage runs again because of `-f`.
    Otherwise, if the completions of a step are damaged, delete the states after that step: training samples them
    again."""
    state = checkpoints.load(folder)
    if state is None:
        return
    run = TrainState(**state["run"])
    if is_finished(run, params) and workspace.is_committed(to_json(run_record(identity, run))):
        checkpoints.delete_checkpoints(folder)
    elif (step := sample_files.first_damaged(folder, run.sample_files)) is not None:
        left = checkpoints.delete_checkpoints(folder, step + 1)
        path = checkpoints.sample_file(folder, step)
        print(f"warning: {path} is damaged (its checksum differs); going back to step {left}", file=sys.stderr)


def run_record(identity: dict[str, Any], run: TrainState) -> dict[str, Any]:
    """The content of run.json: what the result depends on. The number of processes changes the last digits of the
    result, and so does the type of GPU, if there is one."""
    return {**identity, "processes": run.processes} | ({"gpus": run.gpus} if run.gpus else {})


def run_identity(params: Params, device: torch.device) -> dict[str, Any]:
    """Everything that the result depends on, and its digest, the train_key."""
    tables = {name: params.selected(name).model_dump() for name in SELECTORS}
    chosen = {name: getattr(params, name) for name in SELECTORS} | {"seed": params.seed}
    selected = {name: params.selected(name) for name in SELECTORS}
    classifiers = {f"classifiers.{name}": table for name, table in params.selected_classifiers.items()}
    digests = provenance.params_digests(chosen, {**selected, "train": params.train}, classifiers)
    used = {
        "peft": params.train.lora_rank,
        "pyarrow": params.train.keep_samples == "all",
        "regex": searches_patterns(params.selected_reward),
    }
    libraries = provenance.library_versions(*(name for name in used if used[name]))
    parts = {
        "code": provenance.digest([provenance.code_digest("pipeline.stages.train"), libraries]),
        "custom": provenance.digest(custom_digests([params.selected_reward])),
        "prompts": sha256(TRAIN_PROMPTS),
        "checkpoint": sha256(CHECKPOINT / "manifest.json"),
        "layout": asdict(load_layout(CHECKPOINT / "layout.json")),
        "params": provenance.chosen_params(params),
        "device": device.type,
        "arithmetic": arithmetic_in_effect(params.train.arithmetic, device),
        **digests,
    }
    if params.selected_classifiers:
        parts["classifiers"] = sha256(CLASSIFIERS / "manifest.json")
    if params.evaluate.every:  # if it is 0, nothing is measured on held-out prompts
        parts["curve"] = {"every": params.evaluate.every, "prompts": params.evaluate.curve_prompts}
        parts["heldout_prompts"] = sha256(HELDOUT_PROMPTS)
    # the tables too, since different tables may look alike when flattened. Leave out which values are written and which
    # are defaults
    told = {name: value for name, value in parts.items() if name != "written_params"}
    return {"train_key": provenance.digest([told, tables]), **parts}


def raise_if_inputs_changed(identity: dict[str, Any], device: torch.device) -> None:
    """Raises UserError if inputs changed during training: DVC would take the result for that of the new inputs."""
    try:
        now = run_identity(load_params(), device)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} was removed while this run trained; {UNDO}") from None
    names = {
        "code": "pipeline/",
        "custom": "custom/",
        "prompts": TRAIN_PROMPTS,
        "heldout_prompts": HELDOUT_PROMPTS,
        "checkpoint": CHECKPOINT,
        "layout": CHECKPOINT,
        "classifiers": CLASSIFIERS,
    }
    if now["train_key"] != identity["train_key"]:
        changed = [str(name) for part, name in names.items() if now.get(part) != identity.get(part)] or ["params.yaml"]
        raise UserError(f"{', '.join(changed)} changed while this run trained; {UNDO}")


def train(params: Params, identity: dict[str, Any], folder: Path, device: torch.device, processes: DistContext) -> None:
    """Train from the newest resume state in `folder`, or from the start, and write the stage's outputs."""
    context, policy = build_context(params, device, processes)
    optimizer = make_optimizer(policy.parameters(), params.selected_recipe)
    run = resume(folder, policy, optimizer)
    check_ranks_in_sync(identity["train_key"], run.step, processes)
    sync_rollout_model(context, policy)
    if not run.calibration:
        batches = progress(range(params.train.calibration_batches), "calibration", processes.is_main_process)
        run.calibration = calibrate(context, batches)
    if not is_finished(run, params):
        run.note_change(processes.description, gpu_description(device))
    if run.step and processes.is_main_process:  # a kill may have come between writing the state and these files
        write_progress(folder, run)
    with follower(folder, run_record(identity, run)) if processes.is_main_process else nullcontext():
        loop(run, context, policy, optimizer, folder)
        note_cuts(context)
        raise_if_inputs_changed(identity, device)
        saved = gather_full_policy(policy, processes)
        if processes.is_main_process:
            write_outputs(run, identity, context, saved, folder)


def loop(
    run: TrainState, context: TrainContext, policy: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path
) -> None:
    """Run steps until the last one, a non-finite number, a collapse if `on_collapse` is stop, or a signal, which ends
    the process after the current step. A resume state is written every `checkpoint_every` steps and after the last
    step, all of them before this function returns."""
    steps, every, processes = context.params.train.steps, context.params.train.checkpoint_every, context.processes
    spreads = null_statistics(run.calibration, context.params.train.prompts_per_step)
    found = findings(run.rows, spreads, steps)
    announced = {finding.kind for finding in found}
    bar = tqdm(total=steps, initial=run.step, disable=None if processes.is_main_process else True, unit="step")
    history = history_file(RUN_FILES.history, run.rows) if processes.is_main_process else nullcontext()
    with bar, caught_signals() as signals, history as record, BackgroundWriter() as writer:
        measure_heldout(run, context, found)  # step 0: the weights are still the reference's
        while not is_finished(run, context.params):
            keep_samples(train_step(run, context, policy, optimizer), run, context, folder)
            found = findings(run.rows, spreads, steps)
            run.stopped = run.stopped or bool(found and context.params.train.on_collapse == "stop")
            if record is not None:
                record(run.rows[-1])
                tqdm.write(run.progress_line(steps))
                for finding in found:
                    if finding.kind not in announced:
                        tqdm.write(f"Diagnosis: {TITLES[finding.kind].lower()} from step {finding.onset} on")
                    announced.add(finding.kind)
            candidate = measure_heldout(run, context, found)
            bar.update()
            signal = processes.all_reduce_max(signals[0] if signals else 0)
            writer.raise_if_failed()
            due = run.step % every == 0 or run.step == steps or run.stopped or bool(signal)
            if due or candidate:
                save_checkpoint(folder, run, policy, optimizer, context, found, writer, candidate, due)
            if signal and run.step < steps:
                writer.wait()
                if processes.is_main_process:
                    print(
                        f"stopped by a signal after step {run.step - 1}; when DVC has ended, the same command goes on; "
                        f"until then git shows {RUN_FILES.history.parent} as deleted",
                        file=sys.stderr,
                    )
                processes.barrier()  # a launcher ends the other processes as soon as one has ended
                sys.exit(128 + signal)


def keep_samples(samples: StepSamples, run: TrainState, context: TrainContext, folder: Path) -> None:
    """If all completions are kept, rank 0 writes those of the step beside the resume states."""
    if context.params.train.keep_samples == "all" and context.processes.is_main_process:
        columns = sample_columns(samples, context)
        run.sample_files.append(sample_files.write_step(folder, samples.step, columns))


def note_cuts(context: TrainContext) -> None:
    """Collective call: print how many inputs of classifiers were cut since this process started."""
    inputs, cut = (int(context.processes.all_reduce_sum(count)) for count in (context.cuts.inputs, context.cuts.cut))
    if cut and context.processes.is_main_process:
        print(Cuts(inputs, cut).note(context.params.reward), file=sys.stderr)


def measure_heldout(run: TrainState, context: TrainContext, found: list[Finding]) -> bool:
    """Collective call: measure the held-out rewards if they are due: every `evaluate.every` steps, before the first
    step and after the last. Returns whether the current weights may become data/best."""
    every, step = context.params.evaluate.every, run.step
    if not every or (step % every and not is_finished(run, context.params)):
        return False
    if run.heldout and run.heldout[-1]["step"] == step:  # already measured: the resume state has it
        return False
    rows = measure(context, step)
    run.heldout += rows
    if context.processes.is_main_process:
        mean = sum(row["reward"] for row in rows) / len(rows)
        tqdm.write(f"Held-out reward after {step} steps: {mean:.4f}")
    return step in candidate_steps(run.heldout, found, step)


def is_finished(run: TrainState, params: Params) -> bool:
    return run.step >= params.train.steps or run.stopped


def resume(folder: Path, policy: PreTrainedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    state = checkpoints.load(folder)
    if state is None:
        return TrainState()
    load_weights(policy, state["policy"])
    load_optimizer_state(optimizer, state["optimizer"])
    return TrainState(**state["run"])


def check_ranks_in_sync(train_key: str, step: int, processes: DistContext) -> None:
    """Raises UserError unless all processes are at the same step of the same run: they need one shared folder."""
    mine = torch.tensor([[int(train_key[:15], 16), step]])
    first, *others = processes.gather(mine).tolist()
    for rank, other in enumerate(others, 1):
        if other != first:
            here, there = (f"step {done} of run {key:015x}" for key, done in (first, other))
            raise UserError(
                f"process 0 would train from {here}, process {rank} from {there}; all of them need one folder"
            )


def save_checkpoint(
    folder: Path,
    run: TrainState,
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    context: TrainContext,
    found: list[Finding],
    writer: BackgroundWriter,
    candidate: bool,
    due: bool,
) -> None:
    """Collective call: copy what training changes; rank 0 writes the copy while the next steps run. It writes the
    weights if they are a `candidate` for data/best, and the resume state if it is `due`. Without memory for a copy, the
    steps wait."""
    here, size = context.processes.is_main_process, state_bytes(policy, optimizer)
    writer.wait()  # until the previous state is written: there is memory for one copy
    context.processes.barrier()  # others wait here, for hours if need be; NCCL would give up after ten minutes
    copy = here and fits(size, context.processes.world_size)
    weights = trained_weights(policy, here, copy)
    moments = optimizer_state(optimizer, here, copy) if due else {}
    if not here:
        return
    if not copy:
        writer.note_once(f"no memory for a copy of the state ({size / 1e9:.1f} GB): steps wait while it is written")
    state = {"policy": weights, "optimizer": moments, "run": dataclasses.asdict(run)} if due else None
    judged = confirmed_healthy_steps(found, run.step)
    at = checkpoints.candidate(folder, run.step) if candidate else None
    writer.submit(partial(write_checkpoint, folder, context, at, weights, state, judged, writer.stop), copy)


def write_checkpoint(
    folder: Path,
    context: TrainContext,
    candidate: Path | None,
    weights: dict[str, Any],
    state: dict[str, Any] | None,
    judged: int,
    stop: threading.Event,
) -> None:
    """Write the weights to the file `candidate` if there is one, then the state, if there is one, and the progress.
    Keep the last state that is known to be healthy, and the candidates that a remaining state may need."""
    if candidate:
        checkpoints.write(candidate, {"policy": weights}, stop)
    if state is None:
        return
    sizes, run = context.params.train, TrainState(**state["run"])
    checkpoints.save(folder, run.step, state, judged, sizes.checkpoint_every, stop)
    spreads, states = null_statistics(run.calibration, sizes.prompts_per_step), checkpoints.saved_steps(folder)
    checkpoints.keep_candidates(folder, needed_candidates(run.heldout, run.rows, states, spreads, sizes.steps))
    write_progress(folder, run)


def write_progress(folder: Path, run: TrainState) -> None:
    """Write the steps' metrics and timings for MLflow: the follower and `track` read them."""
    with settings_of_training():
        write_csv(folder / "history.csv", run.rows)
        write_jsonl(folder / "terms.jsonl", run.terms)
        write_csv(folder / "timings.csv", [{"step": step, **timing} for step, timing in enumerate(run.timings)])


def restore_before_collapse(policy: PreTrainedModel, context: TrainContext, folder: Path, onset: int) -> int:
    """Restore the last weights from before the collapse and return their step. Raises UserError if their state is
    damaged; the same command then trains from before it."""
    path = checkpoints.last_before(folder, onset, context.params.train.checkpoint_every)
    state = restore(policy, context, folder, path, "the policy before the collapse")
    return len(state["run"]["rows"]) if state else 0


def restore(
    policy: PreTrainedModel, context: TrainContext, folder: Path, path: Path | None, what: str
) -> dict[str, Any] | None:
    """Load the weights of a file and return its content; without a path, load the weights from before the first update.
    If the file is damaged or gone, delete the states from its step on, so that training makes it again, and raise
    UserError."""
    if path is None:
        load_weights(policy, trained_weights(initial_policy(context.params, context.device, policy.device)))
        return None
    if (state := checkpoints.read(path) if path.exists() else None) is None:
        left = checkpoints.delete_checkpoints(folder, checkpoints.step_of(path))
        raise UserError(f"{path}, {what}, is damaged; the same command trains again from step {left}")
    load_weights(policy, state["policy"])
    return state


def write_outputs(
    run: TrainState, identity: dict[str, Any], context: TrainContext, policy: PreTrainedModel, folder: Path
) -> None:
    """Write the last policy to data/policy, the last saved policy before a collapse to data/healthy, the best policy by
    the held-out curve to data/best, all completions, and the reports. A folder gets only a note if there is no
    collapse, no better policy than the last one, or only some completions are kept."""
    sizes, tokenizer = context.params.train, context.tokenizer
    found = findings(run.rows, null_statistics(run.calibration, sizes.prompts_per_step), sizes.steps)
    folders = [atomic_folder(path) for path in (POLICY, HEALTHY, BEST, RUN_FILES.kept.parent)]
    with folders[0] as target, folders[1] as beside, folders[2] as best, folders[3] as kept:
        save_policy(policy, tokenizer, target)
        step = run.step
        if found:
            step = restore_before_collapse(policy, context, folder, found[0].onset)
            save_policy(policy, tokenizer, beside)
        write_json(beside / "healthy.json", {"step": step, "weights": (HEALTHY if found else POLICY).as_posix()})
        write_best(run, context, policy, folder, found, best)
        completions = run.step * sizes.prompts_per_step * sizes.samples_per_prompt
        sample_files.write_kept(kept, folder, run.sample_files, completions)
    # again: git may have replaced the growing file by an older one
    write_csv(RUN_FILES.history, run.rows)
    write_csv(RUN_FILES.calibration, run.calibration)
    write_jsonl(RUN_FILES.samples, run.samples)
    write_jsonl(RUN_FILES.terms, run.terms)
    write_jsonl(RUN_FILES.heldout, run.heldout)
    write_json(RUN_FILES.summary, run.summary() | {"digests": [output_digests(identity)]})
    write_json(RUN_FILES.run, run_record(identity, run))


def write_best(
    run: TrainState, context: TrainContext, policy: PreTrainedModel, folder: Path, found: list[Finding], target: Path
) -> None:
    """Write the best policy by the held-out curve and best.json; only best.json if the last policy is the best or none
    was measured."""
    if not run.heldout:
        write_json(target / "best.json", {"step": None, "weights": None, "why": "evaluate.every is 0: off"})
        return
    step = best_step(run.heldout, found)
    if step < run.step:
        restore(policy, context, folder, checkpoints.candidate(folder, step) if step else None, "the best policy")
        save_policy(policy, context.tokenizer, target)
    told = {"step": step, "weights": (BEST if step < run.step else POLICY).as_posix(), "reward": context.params.reward}
    write_json(target / "best.json", told | best_report(run.heldout, step, context.params.seed))


def output_digests(identity: dict[str, Any]) -> dict[str, str]:
    """The digests of a run and its outputs. summary.json, which is in git, holds them, and readers of the outputs
    compare them. They are in a list there, since `dvc metrics show` leaves lists out."""
    own = {name: identity[name] for name in ("train_key", *provenance.DIGESTS, "written_params") if name in identity}
    written = (
        RUN_FILES.calibration, RUN_FILES.history, RUN_FILES.samples, RUN_FILES.terms, RUN_FILES.heldout, RUN_FILES.kept,
        RUN_FILES.healthy, RUN_FILES.best,
    )  # fmt: skip
    files = {file.name: sha256(file) for file in written}
    return {**own, **files, "policy": provenance.digest(folder_digests(POLICY))}


if __name__ == "__main__":
    run_stage(main)
