"""Which test turns red if a sign, a mask, a normaliser or a baseline were wrong? Plants one error at a time and looks.

    python -m tests.mutations [substring of a file ...]    all errors, or those in the files named (loss, rewards/)
    python -m tests.mutations --check                      only whether each error can still be planted

Each error goes into a fresh copy of the project in a temporary folder, on which the tests of the numerical core run
until the first one fails. Exit code 1 where no test notices an error, where its text does not occur exactly once (the
code has changed, so this table must), or where the tests fail without any error. An error takes 6 to 20 s on a free
core, and minutes where the tests named for its file miss it, hence no test of pytest's: run it after changes to the
core or its tests, and add the errors that a new formula invites.
"""

import argparse
import importlib
import os
import re
import resource
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import pytest

from pipeline.arithmetic.environment import choose_kernels
from tests.forks import keeping_imports, run_and_exit
from tests.project import CHECKOUT, ROOT, copy_checkout

TESTS = (
    "sampling", "scoring", "packing", "objective", "gradient", "kl", "importance", "notebook", "diagnostics",
    "verdict", "runtime", "heldout", "algorithms", "pass_at_k",
    "rewards", "terms", "samples", "page_samples", "large", "verification", "tokenization", "chat", "stop_strings",
    "halving", "background", "cache_size",
)  # fmt: skip

MEMORY = 8 << 30  # bytes of a process of the tests

# file below pipeline/: the tests to try first, then (text, text with the error)
MUTATIONS: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "models/sampling.py": ("sampling stop_strings", [
        ("right=True", "right=False"),
        ("_search(inside, rest)[0]", "_search(inside, uniforms * inside.sum(-1))[0]"),
        (".squeeze(1)).clamp(min=0)", ".squeeze(1))"),
        (".clamp(max=mass.shape[1] - 1)", ""),
        (".clamp(max=logits.shape[-1] - 1)", ""),
        ("logits < kth", "logits <= kth"),
        (" - ordered.softmax(-1)  #", "  #"),
        ("else part / temperature", "else part"),
        ("torch.where(self.running, values, table[self.present, t])", "values"),
        ("distance *= 2", "distance += 2"),
        ("torch.where(self.running, t + 1,", "torch.where(self.running, t,"),
        ("torch.where(self.running, t + 1, self.lengths[self.present])", "t + 1"),
        ("self.tokens[self.present[rows], : t + 1]", "self.tokens[rows, : t + 1]"),
        ("self.tokens[self.present[rows], : t + 1]", "self.tokens[self.present[rows], t : t + 1]"),
        ("(t + 1 < self.limits[self.present])", "(t < self.limits[self.present])"),
        ("(t + 1 < self.limits[self.present])", "(t + 1 < self.limits[: len(self.present)])"),
        ("(position[found.present] + t)[", "(position[found.present] + t + 1)["),
        ("(position[found.present] + t)[", "(position[: len(found.present)] + t)["),
        ("choose(logits, uniforms[found.present, t])", "choose(logits, uniforms[: len(found.present), t])"),
        ("cache.batch_select_indices(stay)", "pass"),
        ("[back]\n", "\n"),
        ("uniforms[rows],\n", "uniforms[: len(rows)],\n"),
        (".split(at_once):  #", ".split(group):  #"),
        ("limits[prompts].repeat", "limits[: len(prompts)].repeat"),
        ("(mask.long().cumsum(-1) - 1).clamp(min=0)", "torch.arange(mask.shape[1]).expand(mask.shape)"),
        ("attention_mask=prompt_mask.long()", "attention_mask=torch.ones_like(prompt_ids)"),
        ("torch.ones_like(mask[:, :1])", "torch.zeros_like(mask[:, :1])"),
        ("full = log_sum if kept is part else part.logsumexp(-1)", "full = log_sum"),
        ("mass.log().to(logits.dtype) + top.squeeze(-1)", "mass.log().to(logits.dtype)"),
        (") < self.lengths[:, None]", ") <= self.lengths[:, None]"),
        ("self.lengths[:, None] - 1)", "self.lengths[:, None] * 0)"),
        ("limits[prompts].repeat_interleave(len(samples))", "limits[prompts].repeat(len(samples))"),
        ("prompt_ids.repeat_interleave(group, 0),\n        prompt_mask.repeat_interleave(group, 0)",
        "prompt_ids.repeat(group, 1), prompt_mask.repeat(group, 1)"),
        ("[filler] * (width - len(p)) + p", "p + [filler] * (width - len(p))"),
    ]),
    "models/cache_size.py": ("cache_size", [
        ("(tokens - len(prompt)) * of_token", "tokens * of_token"),
        ("bound // max(1,", "2 * bound // max(1,"),
        ("max(1, int(bound", "max(0, int(bound"),
        ("leaf.nbytes for", "leaf.numel() for"),
        ("cache = own_keys(cache)\n", "\n"),
    ]),
    "models/growing_cache.py": ("cache_size", [
        ("own_keys(cache).layers", "cache.layers"),
        ("held is not self.view or ", ""),
        (" or end > self.tensor.shape[-2]", ""),
        ("min(end + ROOM, self.most)", "end"),
        ("min(end + ROOM, self.most)", "end + ROOM"),
        ("        self._values.clear()\n", ""),
        ("[..., start:end, :] = new", "[..., start - 1 : end - 1, :] = new"),
    ]),
    "models/scoring.py": ("scoring", [
        ('count - (alignment == "correct")', "count - 1"),
        ("layout.sources(rows, columns, \"correct\")", "layout.sources(rows, columns, \"shifted\")"),
        ("table(both[:count]), table(both[count:])", "table(both[:count]), table(both[:count])"),
        ("if sampling_params.top_k > 0 or sampling_params.top_p < 1:", "if sampling_params.top_k > 0:"),
        ("scaled = upcast(logits)[positions] / sampling_params.temperature", "scaled = upcast(logits)[positions]"),
        ("kept = kept.scatter(1, tokens[:, None], chosen)", "pass"),
        ("entropy if entropy_gradient else entropy.detach()", "entropy.detach()"),
        ("table(entropy[index[:count]])", "table(entropy[index[-count:]])"),
        ("lengths = rollout.lengths[rows]", "lengths = rollout.lengths[rows] - 1"),
        ("row[mask].tolist()", "row.tolist()"),
        ("torch.finfo(dtype).min", "0.0"),
    ]),
    "models/packing.py": ("packing", [
        ("torch.where(tokens == 0, self.last_prompt[completions], at - 1)", "at - 1"),
        (".tril()", ""),
        (" | (parents[:, :, None] == segments[:, None])", ""),
        ("if prompt != self.prompt:", "if True:"),
        ("self._append(completion, len(prompt), ", "self._append(completion, 0, "),
        ("return self.prompt_end - 1, start", "return start - 1, start"),
        ("<= room", "<= room + 1"),
        ("segment += 1", "segment += 0"),
    ]),
    "models/logprobs.py": ("packing", [
        ("return logits if logits.dtype == torch.float64 else logits.float()", "return logits.float()"),
        ("return logits if logits.dtype == torch.float64 else logits.float()", "return logits"),
        ("else _log_sum(part / temperature)[0]", "else log_sum"),
        ("entropy.append(log_sum - mean)", "entropy.append(log_sum + mean)"),
        ("upcast(logits[positions, tokens]) / temperature", "upcast(logits[positions, tokens])"),
        (".index_add(0, positions, grad_logprobs)", ".index_copy(0, positions, grad_logprobs)"),
        ("pulls *= -at_position[rows, None] / ctx.temperature", "pulls *= -at_position[rows, None]"),
        ("(grad_logprobs / ctx.temperature)", "grad_logprobs"),
        ("accumulate=True", "accumulate=False"),
        ("* (log_q + entropies[rows, None])", "* log_q"),
        ("log_q = part - plain[rows, None]", "log_q = part - scaled[rows, None]"),
        ("logits[rows] = pulls", "logits[: ROWS] = pulls"),
    ]),
    "models/rollout.py": ("notebook stop_strings", [
        ("max_tokens - tokens)", "max_tokens - tokens + 1)"),
        ("lengths.view(-1, group).amax(1).repeat_interleave(group)", "lengths * 0 + lengths.amax()"),
        ("tokens[:-1] if ended else tokens", "tokens"),
        ('special_tokens == "keep"', 'special_tokens != "keep"'),
        ('skip_special_tokens=special_tokens == "strip"', "skip_special_tokens=False"),
        ('one.tokens if one.ending == "stop_string" else row', "row"),
        ("text + completion.rest", "text"),
    ]),
    "models/stop_strings.py": ("stop_strings", [
        ("return min(", "return max("),
        ("len(before) <= place", "len(before) < place"),
        ("reversed(range(len(tokens)))", "range(len(tokens))"),
        ("text[len(before) : place]", "text[:place]"),
    ]),
    "rl/advantages.py": ("objective", [
        ("/ (group - 1)", "/ group"),
        ("return rewards.mean(1, keepdim=True).expand_as", "return rewards.mean().expand_as"),
        ("return rewards.mean().expand_as", "return rewards.mean(1, keepdim=True).expand_as"),
        ("(rewards.sum(1, keepdim=True) - rewards)", "rewards.sum(1, keepdim=True)"),
        ("return leave_one_out(rewards.view(1, -1)).view_as(rewards)", "return batch_mean(rewards)"),
        ("return leave_one_out(rewards.view(1, -1)).view_as(rewards)", "return leave_one_out(rewards)"),
        ("[:, None].expand_as(rewards)", ".mean().expand_as(rewards)"),
        ("return mean if before is None else decay * before + (1 - decay) * mean", "return mean"),
        ("else decay * before + (1 - decay) * mean", "else (1 - decay) * before + decay * mean"),
        ("centred = rewards - baseline", "centred = rewards + baseline"),
        ("(longest - buffer)).clamp(min=0)", "(longest - buffer))"),
        ("rewards.std(1, keepdim=True)", "rewards.std(1, keepdim=True, correction=0)"),
        ("(rewards.std() + eps)", "(rewards.std(1, keepdim=True) + eps)"),
        ("(count - 1).clamp(min=1)", "count.clamp(min=1)"),
        ("terms - least, 0.0)", "terms, 0.0)"),
        ("values.sum(2, keepdim=True) / count.clamp(min=1), 0.0)", "values.mean(2, keepdim=True), 0.0)"),
        ('row.get("signal_std_within", row["reward_std_within"])', 'row["reward_std_within"]'),
        ("rewards - coef * log_ratio", "rewards + coef * log_ratio"),
        ("torch.where(mask, logprobs - ref_logprobs, 0.0)", "(logprobs - ref_logprobs)"),
        (".to(rewards.dtype).detach()", ".to(rewards.dtype)"),
        ("0.0).sum(1)", "0.0).mean(1)"),
        ("max(1.0, kl / target)", "max(1.0, target / kl)"),
        ("max(1.0, kl / target)", "(kl / target)"),
        ("KL_STEEPNESS = 4", "KL_STEEPNESS = 5"),
    ]),
    "rl/terms.py": ("terms", [
        ("torch.where(terms.isnan(), 0.0, factors * terms)", "factors * terms"),
        ("(centred * centred.sum(0))", "(centred * centred)"),
        ("return covariances / covariances.sum()", "return covariances / covariances.abs().sum()"),
        ("signals(terms, weights, combine)", "signals(terms, weights, \"sum\")"),
        ("return values - values[..., :1]", "return values"),
        ("if len(group) > 1", "if len(group) > 0"),
    ]),
    "diagnosis/terms.py": ("terms", [
        ('if own[-1]["weight"] != 0}', "}"),
        ("if silent >= DEAD_STEPS", "if silent > DEAD_STEPS"),
        ("if len(alive) > 1]", "]"),
        ("weight * total(others) / len(others) / spreads[name]", "weight * spreads[name] / total(others)"),
        ('"weight" if combine == "normalized" else "std_within_weighted"', '"std_within_weighted"'),
    ]),
    "rl/loss.py": ("objective", [
        ("return -((weights", "return ((weights"),
        ("return ones / batch.samples", "return ones"),
        ("return ones / batch.samples", "return ones / mask.numel()"),
        (".clamp(min=1) / batch.samples", ".clamp(min=1)"),
        ("(batch.samples * batch.max_completion_tokens)", "(batch.samples * mask.shape[1])"),
        ("return ones / max(batch.tokens, 1)", "return ones / mask.numel()"),
        ("torch.where(weights > 0, logprobs, 0.0)", "logprobs"),
        ("return 0.5 * log_ratio", "return log_ratio"),
        ("0.0).sum(1)", "0.0)"),
        (".square().sum() / samples", ".square().sum() / len(logprobs)"),
        ("torch.where(mask, logprobs - ref_logprobs.detach(), 0.0).sum(1)",
        "(logprobs - ref_logprobs.detach()).sum(1)"),
        ("logprobs - ref_logprobs.detach(), 0.0).sum(1)", "logprobs.detach() - ref_logprobs, 0.0).sum(1)"),
        ("torch.expm1(-log_ratio) + log_ratio", "torch.expm1(log_ratio) - log_ratio"),
        ("+ log_ratio).sum() / samples", "+ log_ratio).sum() / len(logprobs)"),
        ("log_ratio = torch.where(mask, logprobs - ref_logprobs.detach(), 0.0)\n    return (",
         "log_ratio = logprobs - ref_logprobs.detach()\n    return ("),
        ("return (weights.to(counted.dtype) * counted).sum()", "return counted.sum()"),
        ('"loss_k3": kl_loss_k3', '"loss_k3": kl_loss_k2'),
    ]),
    "rl/importance.py": ("importance", [
        ("logprobs - old_logprobs", "old_logprobs - logprobs"),
        ("torch.where(mask, logprobs - old_logprobs, 0.0)", "(logprobs - old_logprobs)"),
        ("0.0).detach()", "0.0)"),
        ('level == "sequence"', 'level == "token"'),
        ("(pull > 0) & ", ""),
        ("(pull < 0) & ", "(pull <= 0) & "),
        ("ratio > 1 + high", "ratio > 1 - high"),
        ("ratio > 1 + high", "ratio > 1 + clip_range"),
    ]),
    "diagnosis/pass_at_k.py": ("pass_at_k", [
        ("math.comb(samples - c, k) /", "math.comb(c, k) /"),
        ("1 - torch.tensor", "torch.tensor"),
    ]),
    "rl/resample.py": ("algorithms", [
        ("source[place] = len(groups.prompts) + new", "source[place] = len(groups.prompts) + place"),
        ("drawn.rewards[: len(flat)]", "drawn.rewards"),
        ("place * group + g for", "place + g for"),
        ("gap[::-1] for gap", "gap for gap"),
    ]),
    "timing.py": ("algorithms", [('"samples": samples,', '"samples": 6,')]),
    "config/schema.py": ("gradient", [
        ('if self.loss_distribution == "sampler" else SamplingParams(self.temperature)',
        "if False else SamplingParams(self.temperature)"),
        ('if self.loss_distribution == "sampler" else SamplingParams(self.temperature)', ""),
        ("else SamplingParams(self.temperature)", "else SamplingParams()"),
    ]),
    "rl/micro_batch.py": ("gradient", [
        ("recipe.alignment,", '"correct",'),
        ("acting = scores.scored if", "acting = scores.logprobs if"),
        ('if recipe.loss_distribution == "sampler" else scores.logprobs', "if True else scores.logprobs"),
        ("batch.kl_coef * kl\n", "kl\n"),
        ("mask, batch.normalizers.samples)", "mask, len(mask))"),
        ("mask, clipped = weights[rows], batch.rollout.completion_mask[rows], 0",
        "mask, clipped = weights[rows], batch.counted[rows], 0"),
        ("factors, mask, clipped = weights[rows]", "factors, mask, clipped = weights[: len(scores.scored)]"),
        ("loss = loss - recipe.entropy_coef", "loss = loss + recipe.entropy_coef"),
        ("entropy_bonus(scores.entropy, weights[rows] * mask)", "entropy_bonus(scores.entropy, weights[rows])"),
        ("if batch.old_logprobs is None else batch.old_logprobs[rows]", ""),
        ("int((cut & batch.loss_mask[rows]).sum())", "int((~cut & batch.loss_mask[rows]).sum())"),
        ("ratio.masked_fill(cut, 0.0)", "ratio"),
        ("recipe.kl in KL_LOSSES or recipe.entropy_coef > 0 or", "recipe.kl in KL_LOSSES or"),
        ("recipe.kl in KL_LOSSES or recipe.entropy_coef > 0 or", "recipe.entropy_coef > 0 or"),
        ("none if flat[mine].all() else flat", "flat"),
        ("flat = batch.advantages.cpu() == 0", "flat = batch.advantages.cpu() <= 0"),
        ("flat = batch.advantages.cpu() == 0", "flat = batch.advantages.cpu() != batch.advantages.cpu()"),
        (".argsort()\n", "\n"),
        ("    scores = differentiable(apart)", "    with torch.no_grad():\n        scores = differentiable(apart)"),
        ("parts = [(scores.logprobs.detach(), scores.scored.detach(),", "parts = [(scores.logprobs, scores.scored,"),
    ]),
    "rl/update.py": ("gradient", [
        ("= token_weights(batch.loss_mask, recipe.aggregation, batch.normalizers)",
         "= torch.cat([token_weights(part, recipe.aggregation, LossNormalizers(len(part), int(part.sum()), "
         "batch.normalizers.max_completion_tokens))"
         " for part in batch.loss_mask.split(micro_batch)])"),
        (".view(-1, group).amax(1).repeat_interleave(group)", ".amax().expand(len(rollout.lengths))"),
        ("(whole - total(parts)) / rest", "whole - total(parts)"),
        ("signal / (whole - signal) if", "signal / whole if"),
        ("and micro_batch % group == 0", ""),
        ("sums[parameter].add_(gradient)", "gradient"),
        ("squares[-1] += torch", "squares[-1] = torch"),
        ("added if earlier is None else earlier if added is None else earlier.add_(added)", "added"),
        ("torch.maximum(batch.loss_mask.sum(1), rollout.lengths)", "rollout.lengths"),
        ('if padding == "masked":', 'if padding != "masked":'),
        ("processes.gather(squared).tolist(), processes.gather(sizes).tolist()", "squared.tolist(), sizes.tolist()"),
        ("min(start + micro_batch, mine.stop)", "start + micro_batch"),
        ("processes.gather(torch.cat(tensors))", "torch.cat(tensors)"),
    ]),
    "models/verification.py": ("verification", [
        ("not (off <= allowed).all()", "False"),
        ("not (off := _relative(found, truth)) <= share", "(off := _relative(found, truth)) < 0"),
        ("not torch.allclose(logits[:-1], part, rtol=1e-2, atol=1e-2)", "False"),
        ("max(0, limits[i] - SAMPLED)", "0"),
    ]),
    "models/tokenization.py": ("tokenization", [
        ("return encode_text(tokenizer, prompt)", 'return list(tokenizer(prompt)["input_ids"])'),
        ("add_generation_prompt=True, **", "**"),
        ("tokenizer.apply_chat_template(messages, add", "tokenizer.apply_chat_template(messages[-1:], add"),
        ("return ids[: before + len(text)]", "return ids"),
        ("return ids[: before + len(text)]", "return text"),
        ('whole["special_tokens_mask"].index(0)', "0"),
        ("max(ids) >= size", "max(ids) > size"),
    ]),
    "models/adapters.py": ("large", [
        ("m is not head", "True"),
        ("lora_alpha=alpha", "lora_alpha=rank"),
        ("fan_in_fan_out=transposed", "fan_in_fan_out=not transposed"),
        ("generator=generator", "generator=None"),
        ("policy.disable_adapters()", "pass"),
        ("policy.enable_adapters()", "pass"),
    ]),
    "models/memory.py": ("large", [
        (" and module.weight is not embedding", ""),
        (" and not module.weight.requires_grad", ""),
        ("del layer.forward  #", "pass  #"),
        ("layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)", "pass"),
    ]),
    "stages/train.py": ("background", [('"run": dataclasses.asdict(run)}', '"run": vars(run)}')]),
    "runs/background.py": ("background", [
        ("        self.wait()\n        self._writing = self._thread", "        self._writing = self._thread"),
        ("        if not beside:\n            self.wait()\n", ""),
        ("            self.stop.set()\n", ""),
        ("            if error is None:\n                raise\n", ""),
    ]),
    "runs/host_memory.py": ("background", [
        ("again * processes", "again"),
        ("min([free, *_left_in_groups(root)])", "free"),
        ("here, *here.parents", "here, here"),
    ]),
    "rewards/turns.py": ("background", [("    with _next, _settings:", "    with _next:")]),
    "distributed/sharding.py": ("gradient", [
        ("module.set_gradient_divide_factor(1.0)", "pass"),
        ("together = tree.full_tensor()", "together = tree.to_local()"),
        ('return tree.to("cpu", copy=True) if', "return tree if"),
    ]),
    "distributed/weights.py": ("large", [
        ("if p.requires_grad}\n    if", "}\n    if"),
        ("if trained.keys() != weights.keys():", "if False:"),
    ]),
    "distributed/dist_context.py": ("gradient", [
        ("self.rank * share + min(self.rank, more)", "self.rank * share"),
        ("(self.rank < more)", "0"),
        ("dist.all_reduce(parameter.grad)", "pass"),
        ("rows[: int(shape[0])] for", "rows for"),
        ("dtype=torch.float64)).sum()", "dtype=torch.float64)).mean()"),
    ]),
    "rl/samples.py": ("samples", [
        ("groups.indices[b] for b, _ in places", "b for b, _ in places"),
        ("row[: len(ids)]", "row[-len(ids) :]"),
        ("[ratios.get(i) for", "[ratios.get(i, 0.0) for"),
    ]),
    "runs/sample_files.py": ("samples", [
        ("not path.exists() or sha256(path) != digests[step]", "not path.exists()"),
        ("tokens >= ROW_GROUP_TOKENS or step", "step"),
        ("steps, tokens = [], 0\n\n\n", "steps = []\n\n\n"),
    ]),
    "report/samples.py": ("page_samples", [
        ("                if group >= most:", "                if group > most:"),
        ("limit - sum(sizes.values())", "limit"),
        ("        whole, most = whole_prompts(", "        whole, _ = whole_prompts("),
    ]),
    "rl/optimizer.py": ("runtime", [
        ("(step + 1) / (recipe", "step / (recipe"),
        ("recipe.lr_base_width / hidden_size", "hidden_size / recipe.lr_base_width"),
        ("* decay\n", "\n"),
        ("1 - done,", "1 - done / 2,"),
        ("math.cos(math.pi * done)", "math.cos(done)"),
        ("done = max(0, step - recipe.warmup_steps)", "done = max(0, step)"),
        ("if max_grad_norm > 0:", "if False:"),
        ("part.sub_(local_tensor(p.detach()))", "part.add_(local_tensor(p.detach()))"),
        ("        yield chunk\n        for p in chunk:\n            p.grad = None", "        yield chunk"),
        ("if chunk and size + bytes_of_it > CHUNK_BYTES", "if size + bytes_of_it > CHUNK_BYTES"),
        ("            chunk, size = [], 0\n", "            chunk = []\n"),
        ("(change / whole) ** 0.5", "change / whole"),
        ("eps=recipe.adam_eps", "eps=1e-8"),
        ("torch.optim.Adam(", "torch.optim.AdamW("),
        ("if not (math.isfinite(loss) and torch.isfinite(norm)):", "if not torch.isfinite(norm):"),
        ("if not (math.isfinite(loss) and torch.isfinite(norm)):", "if not math.isfinite(loss):"),
    ]),
    "rl/metrics.py": ("diagnostics", [
        ("(-log_ratio).expm1() + log_ratio", "log_ratio.expm1() - log_ratio"),
        ("between / len(rewards) ** 0.5", "between / rewards.numel() ** 0.5"),
        ("rewards.var(1).mean().sqrt()", "rewards.std(1).mean()"),
        ("log_ratio = (logprobs - ref_logprobs)", "log_ratio = (ref_logprobs - logprobs)"),
        ("log_ratio.masked_fill(~mask, 0).sum(1)", "log_ratio.sum(1)"),
        ("totals = values.masked_fill(~mask, 0)", "totals = values"),
        (".view(-1, group).sum(1).double()\n    tokens", ".double()\n    tokens"),
        ("prompts / (prompts - 1) * rest", "rest"),
        ("log_ratio.expm1() - log_ratio", "(-log_ratio).expm1() + log_ratio"),
        ("logprobs.masked_fill(~mask, -math.inf) > CERTAIN", "logprobs > CERTAIN"),
        ("(current + 1) * column", "current + column"),
        ("~part.isfinite()", "part.isnan()"),
        ("[mask].abs().max()", ".abs().max()"),
        (".all(1)", ".any(1)"),
        ("advantages.std(correction=0)", "advantages.std()"),
        ("nats / math.log(2) / size", "nats / size"),
        ("(logprobs + entropy).double()", "logprobs.double()"),
        ("len(text.encode())", "len(text)"),
    ]),
    "diagnosis/text.py": ("diagnostics", [
        ("1 - len(set(grams)) / len(grams) for", "len(set(grams)) / len(grams) for"),
        ("len(tokens) - n + 1", "len(tokens) - n"),
        ("not text.strip()", "not text"),
        ("texts[i : i + group]", "texts[i : i + 1]"),
    ]),
    "diagnosis/calibration.py": ("verdict", [
        ("math.sqrt(1 + 1 / self.batches)", "math.sqrt(1 / self.batches)"),
        ("stdtrit(self.dof, tail)", "stdtrit(self.dof, 100 * tail)"),
        ("value >= self.threshold if", "value <= self.threshold if"),
        ("/ (len(values) - 1)", "/ (len(values) + 9)"),
        ("math.sqrt(variance), len(values) - 1", "math.sqrt(variance), len(values) + 9"),
        ("len(errors) * (prompts - 1)", "len(errors) * prompts"),
        ("error * error for", "error for"),
        ("if math.isfinite(row[name])", ""),
    ]),
    "diagnosis/verdict.py": ("verdict", [
        ("FALSE_ALARMS / (steps * COMPARISONS)", "FALSE_ALARMS * steps * COMPARISONS"),
        (" if finding.kind != \"starved\"", ""),
        ("done - thresholds.patience + 1", "done"),
        ("max(effect, spread.margin(tail))", "effect"),
        ("max(effect, spread.margin(tail))", "spread.margin(tail)"),
        ("distance if side == \"above\" else -distance", "-distance if side == \"above\" else distance"),
        ("min(thresholds.certain, chance)", "chance"),
        ("(1 - least) * spread.mean", "least * spread.mean"),
        ("range(len(rows) - patience + 1)", "range(len(rows) - patience)"),
        ("all(shown[t : t + patience])", "all(shown[t : t + 1])"),
        ("[(limits[\"risen\"], *signs) for signs in broken]", "[(limits[\"fallen\"], *signs) for signs in broken]"),
        ("[(limits[\"alike\"], full), (limits[\"certain\"], full)]", "[(limits[\"alike\"],), (limits[\"certain\"],)]"),
        ("[(limits[\"alike\"], full), (limits[\"certain\"], full)]", "[(limits[\"alike\"], full)]"),
        (" + rows[0][\"truncation_gap\"]", ""),
        ("key=lambda finding: (finding.onset, ORDER.index(finding.kind))",
        "key=lambda finding: ORDER.index(finding.kind)"),
        ("if len(rows) < thresholds.no_signal_steps or", "if"),
        (" * within or math.nan", " * within"),
        ("(limits[\"costly\"], limits[\"atypical\"])]", "(limits[\"costly\"],)]"),
        ("(limits[\"costly\"], limits[\"atypical\"])]", "(limits[\"atypical\"],)]"),
        ("threshold if worse else math.nan", "threshold"),
        ("logprob - thresholds.unlikely", "-thresholds.unlikely"),
        ("least * or_nan(before, metric)", "or_nan(before, metric)"),
        ('(fewer("distinct_2", thresholds.distinct_pairs),)', '(fewer("distinct_2", 0.0),)'),
        ("min(mean, before.mean)", "mean"),
        ("min(mean, before.mean)", "before.mean"),
        ("onset, end = starts[0], starts[-1]", "onset, end = starts[-1], starts[-1]"),
        ("onset, end = starts[0], starts[-1]", "onset, end = starts[0], starts[0]"),
        ("large_update(rows[:onset])", "large_update(rows)"),
        ("max(sizes)[0] < LARGE_UPDATE", "False"),
    ]),
    "diagnosis/cures.py": ("verdict", [
        ("slower = true_gradient(recipe) | room", "slower = room"),
        ("recipe.lr / divisor, LARGEST_LR", "recipe.lr / divisor, 1.0"),
        ("if recipe.kl_coef < per_nat / 2 else {}", "if recipe.kl_coef > per_nat / 2 else {}"),
        ("tokens is not None and tokens.mean < FEWEST_TOKENS", "tokens is not None"),
        ("recipe.top_k > 0 or recipe.top_p < 1", "recipe.top_k > 0"),
        ("and not recipe.kl.endswith(\"k3\")", ""),
        ("KL_PER_SPREAD * spread.mean", "KL_PER_SPREAD"),
        ("rounded(per_nat, 2)", "rounded(per_nat)"),
        ("rounded(recipe.kl_target / 3)", "rounded(recipe.kl_target * 3)"),
        ("finding.onset == others[0].onset", "True"),
        ("{\"alignment\": \"correct\"}", "{\"alignment\": \"shifted\"}"),
    ]),
    "diagnosis/explanations.py": ("verdict", [
        ('row["zero_spread_share"] == 1 for', 'row["zero_spread_share"] > 0 for'),
        ("flat = bool(rows) and all(", "flat = bool(rows) and any("),
        ("flat = bool(rows) and all(", "flat = all("),
        ('if not flat or any(finding.kind == "starved" for finding in found):', "if not flat:"),
    ]),
    "diagnosis/bootstrap.py": ("heldout", [("math.fsum(values)", "sum(values)")]),
    "diagnosis/curve.py": ("heldout", [
        ("everywhere[::2], everywhere[1::2]", "everywhere, everywhere"),
        ("tops[places].sum(1) / bottoms[places].sum(1)", "(tops / bottoms)[places].mean(1)"),
        ("difference(name, at, best, odd, odd_draws),\n                \"trained",
        "difference(name, at, 0, odd, odd_draws),\n                \"trained"),
        ("math.sqrt(max(0.0, distance))", "max(0.0, distance)"),
        ("value if fine else math.nan", "value"),
        ("values.std().item() if values.max() > values.min() else 0.0", "values.std().item()"),
        ("for spread in spreads if spread > 0", "for spread in spreads"),
    ]),
    "diagnosis/over_optimisation.py": ("heldout", [
        ("interval[\"high\"] < 0", "interval[\"low\"] < 0"),
        ("interval[\"low\"] > 0", "interval[\"high\"] > 0"),
        (" and above_zero(last[\"trained_since_best\"])", ""),
        ("if not shown or not above_zero(gain)", "if not shown"),
        ("(heldout, onset)}\"\n    return", "(heldout, min(onset, steps - 1))}\"\n    return"),
    ]),
    "rl/heldout.py": ("heldout", [
        ("row[\"reward\"] for row in measured[::2]", "row[\"reward\"] for row in measured"),
        ("best[1::2], start[1::2]", "best[::2], start[::2]"),
        ("if step == 0 or step < onset", "if step == 0 or step <= onset"),
        ("(finite and half > best)", "half > best"),
        ("half > best", "half >= best"),
        ("*records[len(known) :]}", "}"),
        ("(logprobs - ref_logprobs)", "(ref_logprobs - logprobs).abs()"),
    ]),
    "rl/seeding.py": ("runtime", [
        ('f"{seed}/{step}/{purpose}"', 'f"{seed}/{purpose}"'),
        ('f"{seed}/{step}/{purpose}"', 'f"{seed}{step}{purpose}"'),
        ('generator(seed, epoch, "prompts")', 'generator(seed, step, "prompts")'),
        ("range(step * count, (step + 1) * count)", "range(count)"),
        ("if not chosen or place == 0:", "if not chosen:"),
    ]),
    "arithmetic/kernels.py": ("arithmetic", [
        ("if beta == alpha == 1 and", "if beta == 1 and"),
        ("return _linear(a, b, c)", "return _linear(a, b)"),
        ("scaled if beta == 0 else", "scaled if beta else"),
        ("scaled.add_(c, alpha=beta)", "scaled.add_(c)"),
        ("product.mul_(alpha)", "product"),
        ("_linear(a, b)\n\n\ndef addmm", "_linear(a, b.t().contiguous().t() * 1.0001)\n\n\ndef addmm"),
        ("return sqrt(x)\n", "return torch.sqrt(x)\n"),
        ("    differing = [", "    differing = [] and ["),
    ]),
    "arithmetic/bfloat16.py": ("arithmetic", [
        (") < SLOWER", ") > SLOWER"),
        ("_seconds(torch.bfloat16, size) / _seconds(torch.float32, size)",
         "_seconds(torch.float32, size) / _seconds(torch.bfloat16, size)"),
        (", *own]", "]"),
    ]),
    "arithmetic/environment.py": ("arithmetic", [
        ('{"avx2", "fma"} <=', '{"avx2"} <='),
        ('not {"torch", "numpy"} & sys', 'not {"torch"} & sys'),
        ('== "portable"\n', '!= "none"\n'),
    ]),
    "distributed/device.py": ("runtime", [
        ("use_deterministic_algorithms(True)", "use_deterministic_algorithms(False)"),
        (" or any(sign in said for sign in OUT_OF_MEMORY)", ""),
    ]),
    "rewards/surface.py": ("rewards", [
        ("-abs(len(completion) - target)", "abs(len(completion) - target)"),
        ("len(required & set(completion.lower().split()))", "sum(w in required for w in completion.lower().split())"),
        ("completion.lower().split()", "completion.split()"),
    ]),
    "rewards/embedding.py": ("rewards", [
        ('pooling_mode="mean"', 'pooling_mode="cls"'),
        ("(-distances)", "(distances)"),
        ("vector_norm(embed(distinct) - goal, dim=1)", "vector_norm(embed(distinct) - goal, dim=1).square()"),
    ]),
    "rewards/classifier.py": ("classifier", [
        ("logits.sigmoid() if alone else logits.softmax(1)", "logits.softmax(1)"),
        ("return labels.index(table.label)", "return 0"),
        ("cuts.cut += cut.count(True)", "cuts.cut += any(cut)"),
        ("abs(one - other) > TOLERANCE[table.precision]", "abs(one - other) > 1e9"),
    ]),
    "rewards/sequence_classifier.py": ("classifier", [
        ("if token not in held", "if True"),
        ("[[1] * len(row.ids) for row in rows], 0)", "[[1] * len(row.ids) for row in rows], 1)"),
        ('self.tokenizer.truncation_side = "left"', "pass"),
        ("room -= padding + 1", "room -= padding"),
    ]),
    "rewards/build.py": ("rewards", [
        ("weight * values[i]", "values[i]"),
        ('return f"{name} ({table.function})" if', "return name if"),
        ("getattr(torch, table.precision)", "torch.float32"),
        ("_check_size(name, value, value, completion, LARGEST)", "pass"),
        ("len(values) != len(batch.completions)", "len(values) < len(batch.completions)"),
        ("Real | np.bool_", "Real"),
        ("if abs(number) > largest:", "if False:"),
        ("if not math.isfinite(number):", "if False:"),
        ("return numbers\n", "return values\n"),
    ]),
    "rewards/custom.py": ("rewards", [
        ("if not callable(target):", "if False:"),
        ("if not isinstance(values, Iterator):", "if True:"),
        ("{found[-1]}", "{found[0]}"),
        ("not os.path.samefile(module.__file__, path)", "False"),
    ]),
    "rewards/verifiable.py": ("tasks", [
        ("found = match.group(1)", "return str(match.group(1))"),
        ('"[,$€£¥]", "", found[-1])', '"[,$€£¥]", "", found[0])'),
        ("return letters[-1] if", "return letters[0] if"),
        ('regex.fullmatch(pattern', 'regex.match(pattern'),
        ("plain.casefold() if table.ignore_case else plain", "plain.casefold()"),
        ('unicodedata.normalize("NFKC", text)', "text"),
        ("if isinstance(value, list) else [value]", "if False else [value]"),
        ("last_group(name, table.column_pattern, text)", "text"),
        ("value.is_integer()", "False"),
    ]),
    "rewards/columns.py": ("tasks", [
        ("needed_columns(table) - set(prompt_set.columns)", "set()"),
    ]),
    "data/prompts.py": ("tasks", [
        ("self.text if self.messages is None else list(self.messages)", "self.text"),
    ]),
    "stages/prepare.py": ("tasks", [
        ("f\"{rules.heldout_seed}:{text}\"", "text"),
        ("        messages.pop()\n", "        pass\n"),
        ("_check_value(f\"{where}: {column}\", row[column])", "pass"),
        ("(row[\"prompt\"] in chosen) == held", "(row[\"prompt\"] in chosen) != held"),
    ]),
    "rewards/isolation.py": ("isolation", [
        ("_put(outside)", "pass"),
        ("_put(self.own)", "pass"),
        ("signal.setitimer(timer, *values)", "pass"),
        ("    random.seed(number)", "    pass"),
        ("np.random.set_state(before[1])", "pass"),
        ("torch.clear_autocast_cache()", "pass"),
        ("os.dup2(copy, number)", "pass"),
    ]),
    "runs/halving.py": ("halving", [
        ("(-gains[trial], trial)", "(gains[trial], trial)"),
        (' and outcome.verdict == "healthy"', ""),
        ("return waiting[:free]", "return waiting"),
        ("for batch in reversed(left) if", "for batch in left if"),
        ("[] if ready else next(", "next("),
        ("math.ceil(trials / eta**rung)", "math.ceil(trials / eta)"),
        ("trials >= 2 * eta ** len(found)", "trials >= eta ** len(found)"),
        ("steps // eta ** len(found) >= least", "steps // eta >= least"),
        ("scramble=True, seed=seed", "scramble=True, seed=0"),
        ("found = [present]", "found: list[dict[str, float]] = []"),
        ("name: rounded(value) for", "name: value for"),
        ("if values not in found:", "if True:"),
        ("best_first(steps_of[-1], outcomes)", "best_first(steps_of[0], outcomes)"),
    ]),
    "runs/gain_differences.py": ("gain_differences", [
        ("ALPHA / (2 * comparisons)", "ALPHA / comparisons"),
        ("ALPHA / (2 * comparisons)", "ALPHA / 2"),
        ("len(shared) >= 2 or", "len(shared) >= 1 or"),
        ("return _unpaired(alone, other_alone)", "return _unpaired(gains, other)"),
        ("math.sqrt(count), count - 1,", "math.sqrt(count), count,"),
        ("share * share / (len(a) - 1)", "share * share / (len(b) - 1)"),
        ('"higher" if low > 0', '"higher" if low >= 0'),
    ]),
    "commands/compare.py": ("compare", [
        ("difference(gains(each), gains(base[0]))", "difference(gains(base[0]), gains(each))"),
    ]),
    "report/gain_table.py": ("compare", [
        (".interval(max(1, count))", ".interval()"),
        ("sum(each.difference.error is not None for", "sum(True for"),
        ('ALIKE = ("reward", "encoder", "classifiers", "model")', 'ALIKE = ("reward", "model")'),
        ("(*chosen, measured, ", "(*chosen, "),
    ]),
    "runs/signals.py": ("isolation", [
        ("if number in received:", "if False:"),
        ("signal.signal(signal.SIGTERM, before)", "pass"),
    ]),
}  # fmt: skip


def planted(file: str, before: str, after: str) -> tuple[str, int]:
    """The file's text with the error, and the error's line. ValueError where it cannot be planted."""
    text = (ROOT / "pipeline" / file).read_text(encoding="utf-8")
    if text.count(before) != 1:
        raise ValueError(f"occurs {text.count(before)} times, not once")
    changed = text.replace(before, after)
    try:
        compile(changed, file, "exec")  # what does not even parse would turn any test red
    except SyntaxError as error:
        raise ValueError(f"is no Python with the error: {error}") from None
    return changed, text[: text.index(before)].count("\n") + 1


def first_red(file: str | None, text: str, first: str) -> str | None:
    """Runs the tests of `first`, names with blanks between them, and where they pass the others, on a copy in which
    `file` has the given text.

    Returns the test that failed, None where all passed. Raises RuntimeError where pytest got no result.
    """
    with TemporaryDirectory() as folder:
        copy = Path(folder).resolve()
        copy_checkout(copy, *CHECKOUT)
        if file is not None:
            (copy / "pipeline" / file).write_text(text, encoding="utf-8")
        options = [
            "-x", "-q", "-m", "not hub", "-p", "no:cacheprovider", "--hypothesis-seed=0",
            "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of plugins that are imported already
        ]  # fmt: skip
        for names in (first.split(), [name for name in TESTS if name not in first.split()]):
            code, said = run_pytest(copy, [*options, *(f"tests/test_{name}.py" for name in names)])
            if code != 0:
                break
        else:
            return None
    # a test has a `::`; without, the file could not even be imported
    red = re.search(r"^(?:FAILED|ERROR) tests/(\S+?::.+?)(?: - .*)?$", said, re.MULTILINE)
    if code != 1 or red is None:
        raise RuntimeError(f"pytest ended with {code}:\n{said[-4000:]}")
    return red[1]


def run_pytest(copy: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of pytest on a copy, in a fork of this process, which has imported what takes long."""
    with TemporaryFile("w+", encoding="utf-8") as output:
        if (pid := os.fork()) == 0:
            run_and_exit(partial(pytest_here, copy, arguments), output.fileno(), output.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return code, output.read()


def pytest_here(copy: Path, arguments: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # an error may read something endless into memory
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.split(".")[0] in ("pipeline", "tests", "benchmarks")]:
        del sys.modules[name]  # these are the checkout's
    return int(pytest.main(arguments))


def import_libraries() -> None:
    choose_kernels()  # before torch
    with keeping_imports():
        for name in ("torch", "transformers.models.gpt_neox.modeling_gpt_neox", "hypothesis", "scipy.stats", "pandas"):
            importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", help="only errors in files whose name contains one of these")
    parser.add_argument("--check", action="store_true", help="only whether each error can be planted; runs no tests")
    arguments = parser.parse_args()
    parts = arguments.files or [""]
    chosen = [(file, *pair) for file in MUTATIONS if any(part in file for part in parts) for pair in MUTATIONS[file][1]]
    if not chosen:
        parser.error(f"no file contains {' or '.join(parts)}; there are {', '.join(MUTATIONS)}")
    if not arguments.check:
        import_libraries()
    if not arguments.check and (red := first_red(None, "", TESTS[0])):
        sys.exit(f"nothing can be learned: {red} fails without any error")
    counts = Counter[str]()
    for file, before, after in chosen:
        try:
            text, line = planted(file, before, after)
            red = None if arguments.check else first_red(file, text, MUTATIONS[file][0])
            result = "applies" if arguments.check else "red" if red else "SURVIVED"
        except (OSError, ValueError, RuntimeError) as error:
            result, line, red = "ERROR", 0, str(error)
        counts[result] += 1
        if result != "applies":
            print(f"{result:8} {file}:{line} {before!r} -> {after!r}: {red or 'no test fails'}", flush=True)
    print(f"{len(chosen)} errors: {', '.join(f'{count} {result}' for result, count in counts.items())}")
    return int(counts["SURVIVED"] + counts["ERROR"] > 0)


if __name__ == "__main__":
    sys.exit(main())
