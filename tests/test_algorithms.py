"""The algorithms' recipes, and what DAPO adds: groups without a spread are drawn anew, long completions penalised."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.data.prompts import Prompt
from pipeline.file_io import read_csv, read_jsonl
from pipeline.models.sampling import Rollout
from pipeline.rl import resample
from pipeline.rl.advantages import overlong_penalties
from pipeline.rl.batch import Groups
from pipeline.rl.resample import joined, replace_flat_groups
from pipeline.stages import train
from tests.models import PARAMS, rollout_of
from tests.project import Project
from tests.training import forget, history

pytestmark = pytest.mark.numeric

FLAT, SPREAD = [1.0, 1.0], [0.0, 1.0]


def groups(names: str, rewards: list[list[float]], tokens: int = 1) -> Groups:
    """Two completions of each prompt: tokens 1 and 2 of prompt a, 3 and 4 of b, and so on, `tokens` times."""
    first = [2 * "abcdefgh".index(name) + 1 for name in names]
    completions = [[token + g] * tokens for token in first for g in (0, 1)]
    prompts = [[first[i // 2]] * (i // 2 + 1) for i in range(len(completions))]
    texts = [f"{name}{g}" for name in names for g in (0, 1)]
    return Groups(
        first,
        [Prompt(name) for name in names],
        rollout_of(prompts, completions),
        texts,
        torch.tensor(rewards),
        torch.tensor([rewards]),
    )


def replaced(monkeypatch: pytest.MonkeyPatch, rounds: int, processes: int, *draws: Groups) -> tuple[Groups, int]:
    """A batch of the groups a, b and c, of which b alone has a spread; and what each round asks for and is given."""
    asked: list[tuple[int, int]] = []

    def draw(count: int, attempt: int, *_: Any) -> Groups:
        asked.append((count, attempt))
        return draws[attempt]

    monkeypatch.setattr(resample, "draw_groups", draw)
    params = SimpleNamespace(selected_recipe=SimpleNamespace(resample_rounds=rounds))
    context = SimpleNamespace(params=params, eos=(0,), processes=SimpleNamespace(world_size=processes))
    found = replace_flat_groups(groups("abc", [FLAT, SPREAD, FLAT]), context, step=0)  # type: ignore[arg-type]
    assert asked == [(max(len(each.prompts), processes), i) for i, each in enumerate(draws)]
    return found


def seen(found: Groups) -> tuple[str, list[list[float]], list[str], list[list[int]], list[int]]:
    prompts = "".join(prompt.text for prompt in found.prompts)
    assert found.indices == ["abcdefgh".index(name) * 2 + 1 for name in prompts]  # as `groups` numbers them
    assert found.terms.tolist() == [found.rewards.tolist()]
    widths = found.rollout.prompt_mask.sum(1).tolist()
    return prompts, found.rewards.tolist(), found.completions, found.rollout.token_lists(), widths


def test_flat_groups_are_replaced_in_order_until_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = groups("de", [FLAT, SPREAD], tokens=2), groups("f", [[2.0, 3.0]])
    found, sampled = replaced(monkeypatch, 5, 1, first, second)
    prompts, rewards, texts, tokens, widths = seen(found)
    assert prompts == "ebf"  # e stands where a was; c waits for the second round
    assert rewards == [SPREAD, SPREAD, [2.0, 3.0]]
    assert texts == ["e0", "e1", "b0", "b1", "f0", "f1"]
    assert tokens == [[9, 9], [10, 10], [3], [4], [11], [12]]
    assert widths == [2, 2, 2, 2, 1, 1]
    assert sampled == 6  # the flat ones too


def test_what_is_flat_after_the_last_round_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    found, sampled = replaced(monkeypatch, 1, 1, groups("de", [FLAT, FLAT]))
    assert (seen(found)[0], sampled) == ("abc", 4)


def test_prompts_that_only_processes_need_are_counted_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found, sampled = replaced(monkeypatch, 1, 3, groups("def", [FLAT, SPREAD, SPREAD]))
    assert (seen(found)[0], sampled) == ("ebc", 6)  # f is the third of two


def test_rollouts_are_joined_as_if_they_had_been_padded_together() -> None:
    prompts, completions = [[1, 2, 3], [4]], [[5], [6, 7, 8]]
    apart = [rollout_of([p], [c], filler=9) for p, c in zip(prompts, completions, strict=True)]
    one, whole = joined(*apart, filler=9), rollout_of(prompts, completions, filler=9)
    for name in ("prompt_ids", "prompt_mask", "completions", "lengths"):
        assert torch.equal(getattr(one, name), getattr(whole, name)), name
    numbers = [torch.rand(1, part.completions.shape[1]) for part in apart]
    one = joined(*(Rollout(*(vars(part) | {"sampler_logprobs": n, "logprobs": n}).values())
                   for part, n in zip(apart, numbers, strict=True)), filler=9)  # fmt: skip
    assert one.logprobs.tolist() == [[*numbers[0][0].tolist(), 0.0, 0.0], numbers[1][0].tolist()]


def one_in_two(here: Project) -> None:
    """A reward of 0 or 1 that gives some groups a spread and others none."""
    here.edit(rewards__even={"kind": "format", "pattern": r"(?s)(..)*"}, reward="even", train__steps=3)
    here.edit(recipes__stable__kl="none", recipes__stable__scale_rewards="none", train__samples_per_prompt=2)


def test_a_run_learns_from_redrawn_groups_and_reports_the_first(here: Project) -> None:
    one_in_two(here)
    train.main()
    plain = history(here)
    forget(here)
    here.edit(recipes__stable__resample_rounds=20)
    train.main()
    resampled = history(here)
    (timings,) = here.root.glob(".checkpoints/*/timings.csv")
    drawn = [int(row["samples"]) for row in read_csv(timings)]
    assert plain[0]["zero_spread_share"] > 0
    for name in ("reward_mean", "zero_spread_share", "reward_std_within"):
        assert resampled[0][name] == plain[0][name], name
    # a pair of 0 and 1 has the leave-one-out advantages -1 and 1
    assert plain[0]["advantage_std"] < resampled[0]["advantage_std"] == pytest.approx(1.0)
    assert all(count > 6 and count % 2 == 0 for count, row in zip(drawn, resampled, strict=True)
               if row["zero_spread_share"] > 0)  # fmt: skip


def test_the_overlong_penalty_is_that_of_dapo_s_equation_13() -> None:
    """|y| of 20 tokens at most, the last 5 being the buffer: 0, then (15 - |y|) / 5, at the limit -1."""
    found = -overlong_penalties(torch.tensor([1, 14, 15, 16, 18, 20]), 20, 5, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, -0.2, -0.6, -1.0], dtype=torch.float64))
    assert overlong_penalties(torch.tensor([20, 10]), 20, 20, 0.5).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("baseline", ["none", "greedy"])
def test_an_overlong_penalty_is_in_the_advantages_and_not_in_the_reward(here: Project, baseline: str) -> None:
    """With a buffer as long as the limit each token costs a sixth of the penalty."""
    here.edit(train__steps=1, recipes__stable__kl="none", recipes__stable__scale_rewards="none")
    here.edit(recipes__stable__baseline=baseline)
    train.main()
    (plain,) = history(here)
    forget(here)
    here.edit(recipes__stable__overlong_buffer=6, recipes__stable__overlong_penalty=3.0)
    train.main()
    (penalised,) = history(here)
    assert penalised["reward_mean"] == plain["reward_mean"]
    assert penalised["completion_tokens"] == plain["completion_tokens"]
    if baseline == "none":
        rows = read_jsonl(here.root / "reports/train/samples.jsonl")
        truth = [row["reward"] - 3 * len(row["tokens"]) / 6 for row in rows]
        assert [row["advantage"] for row in rows] == pytest.approx(truth)
    else:  # of the greedy completions, which are not on record: their lengths count
        assert plain["baseline"] - 3.0 <= penalised["baseline"] < plain["baseline"]


# --- the recipes: what one differs from another by, besides its learning rate, is its idea

IDEAS: dict[tuple[str, str], dict[str, object]] = {
    ("reinforce", "reinforce_running_mean"): {"baseline": "running"},
    ("reinforce", "rloo"): {"baseline": "rloo"},
    ("reinforce", "remax"): {"baseline": "greedy"},
    ("rloo", "dr_grpo"): {"baseline": "group", "aggregation": "constant_length"},
    ("dr_grpo", "grpo"): {"advantage_norm": "group", "aggregation": "sequence_mean"},
    ("rloo", "ppo_clip"): {"importance": "token", "clip_range": 0.2, "epochs": 4},
    ("grpo", "dapo"): {
        "aggregation": "token_mean", "importance": "token", "clip_range": 0.2, "clip_range_high": 0.28, "epochs": 4,
        "overlong_buffer": 4, "resample_rounds": 3,
    },
}  # fmt: skip


@pytest.mark.parametrize(("start", "other"), IDEAS)
def test_a_recipe_differs_from_another_by_its_idea(start: str, other: str) -> None:
    before, after = (PARAMS.recipes[name].model_dump() for name in (start, other))
    assert {key: value for key, value in after.items() if value != before[key] and key != "lr"} == IDEAS[start, other]


def test_what_a_recipe_leaves_out_is_stable_without_its_terms() -> None:
    """Of all keys that `stable` writes, those that are not its own choice are the defaults."""
    stable, plain = (PARAMS.recipes[name].model_dump() for name in ("stable", "reinforce"))
    own = {"baseline", "scale_rewards", "kl", "kl_coef", "kl_target", "lr_base_width"}
    assert {key for key, value in stable.items() if plain[key] != value} == own


@pytest.mark.parametrize("name", sorted({name for pair in IDEAS for name in pair}))
def test_every_algorithm_trains(here: Project, name: str) -> None:
    here.edit(recipe=name, train__steps=2)
    train.main()
    assert [row["nonfinite"] for row in history(here)] == [0.0, 0.0]
