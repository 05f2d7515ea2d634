"""Random numbers that belong to (seed, step, purpose) and to nothing else; the optimizer's rate and its refusals."""

import copy
import os
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from pipeline.distributed.device import configure_torch, device_errors
from pipeline.errors import UserError
from pipeline.models.memory import memory_settings
from pipeline.rl.optimizer import learning_rate, make_optimizer, optimizer_step
from pipeline.rl.seeding import draw_probe_prompts, draw_prompts, draw_uniforms, generator
from tests.models import PARAMS, recipe

# --- random numbers


def test_no_draw_depends_on_another() -> None:
    first = draw_uniforms(3, 5, "sample", 4, 6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        torch.rand(7)
        draw_uniforms(3, 4, "sample", 100, 100)
        draw_prompts(3, 5, 8, 50, "replacement")
        draw_prompts(3, 5, 8, 50, "shuffled")
        state = torch.get_rng_state()
        again = draw_uniforms(3, 5, "sample", 4, 6)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.dtype == torch.float64
    assert 0 <= first.min() < first.max() < 1


def test_seed_step_and_purpose_each_matter() -> None:
    keys = [(seed, step, purpose) for seed in (0, 1, 11) for step in (0, 1, 11) for purpose in ("prompts", "sample")]
    draws = {torch.randint(2**62, (1,), generator=generator(*key)).item() for key in keys}
    assert len(draws) == len(keys)


def test_the_largest_seed_is_taken() -> None:
    assert draw_uniforms(2**63 - 1, 10**6, "sample", 1, 1).shape == (1, 1)


# --- prompts


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 9))
def test_shuffled_prompts_come_once_an_epoch(seed: int, available: int, count: int) -> None:
    steps = -(-3 * available // count)
    row = [i for step in range(steps) for i in draw_prompts(seed, step, count, available, "shuffled")]
    for epoch in range(3):
        assert sorted(row[epoch * available : (epoch + 1) * available]) == list(range(available))


def test_epochs_and_seeds_have_other_orders() -> None:
    orders = [tuple(draw_prompts(seed, epoch, 50, 50, "shuffled")) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("draw", ["shuffled", "replacement"])
def test_prompts_of_a_step_depend_on_the_step_alone(draw: str) -> None:
    """Whoever goes on from step 7 draws what an uninterrupted run would have drawn."""
    forwards = [draw_prompts(2, step, 5, 12, draw) for step in range(10)]
    backwards = [draw_prompts(2, step, 5, 12, draw) for step in reversed(range(10))]
    assert forwards == backwards[::-1]
    assert len(set(map(tuple, forwards))) > 1


def test_prompts_with_replacement_are_uniform_and_repeat() -> None:
    row = [i for step in range(300) for i in draw_prompts(0, step, 10, 6, "replacement")]
    counts = Counter(row)
    assert sorted(counts) == list(range(6))
    assert all(abs(n - 500) < 5 * (3000 * (1 / 6) * (5 / 6)) ** 0.5 for n in counts.values())
    assert any(len(set(draw_prompts(0, step, 4, 6, "replacement"))) < 4 for step in range(50))


# --- device and threads


@pytest.fixture
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("restored")
def test_set_up_fixes_threads_and_asks_for_deterministic_kernels() -> None:
    assert configure_torch("cpu", 1).type == "cpu"
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("restored")
def test_a_device_that_is_not_there_is_refused() -> None:
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert configure_torch("auto", 1).type == "cpu"
        with pytest.raises(UserError, match=r"train\.device = cuda.*auto or cpu"):
            configure_torch("cuda", 1)


@pytest.mark.parametrize(
    "said",
    ["[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
     "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)  # fmt: skip
def test_too_little_memory_is_one_line_that_names_what_lowers_it(said: str) -> None:
    line = r"^out of memory: .*; less is needed with any of: a; b \(docs/SCALE.md\)$"
    with pytest.raises(UserError, match=line), device_errors(["a", "b"]):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="a bug of ours"), device_errors(["a"]):
        raise RuntimeError("a bug of ours")


def test_settings_that_are_in_use_are_no_advice() -> None:
    sizes = PARAMS.train.model_copy(update={"gradient_checkpointing": True, "lora_rank": 4, "micro_batch": 1})
    params = PARAMS.model_copy(update={"train": sizes, "recipe": "notebook"})
    assert memory_settings(params) == ["recipes.notebook.precision: bfloat16", "train.max_tokens below 20"]


def test_threads_that_would_stop_the_machine_are_refused() -> None:
    most = 8 * (os.cpu_count() or 1)
    with pytest.raises(UserError, match=f"^train.threads = {most + 1}: this machine has .* cores; at most {most} are"):
        configure_torch("cpu", most + 1)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 200), st.data())
def test_some_of_the_prompts_are_rescored(step: int, prompts: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, prompts))
    chosen = draw_probe_prompts(3, step, prompts, count)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(prompts))
    assert len(chosen) == count


@pytest.mark.parametrize(("prompts", "share", "count"), [(16, 0.125, 2), (4, 0.125, 1), (1, 1.0, 1), (10, 0.25, 2)])
def test_a_share_of_the_prompts_is_at_least_one(prompts: int, share: float, count: int) -> None:
    train = PARAMS.train.model_copy(update={"prompts_per_step": prompts, "kl_probe_fraction": share})
    assert train.kl_probe_prompts == count


def test_every_prompt_s_turn_to_be_rescored_comes() -> None:
    seen = Counter(place for step in range(400) for place in draw_probe_prompts(0, step, 8, 1))
    assert chisquare([seen[place] for place in range(8)]).pvalue > 0.001


# --- optimizer


def ones(grad: float) -> torch.nn.Linear:
    model = torch.nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1)
    model.weight.grad = torch.full_like(model.weight, grad)
    return model


def test_warm_up_is_linear_and_then_constant() -> None:
    warm = recipe("stable", lr=0.4, lr_base_width=0, warmup_steps=3)
    assert [learning_rate(step, 6, warm, 8) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    cold = recipe("stable", lr=0.4, lr_base_width=0, warmup_steps=0)
    assert [learning_rate(step, 2, cold, 8) for step in range(2)] == [0.4, 0.4]
    assert [learning_rate(step, 2, warm, 8) for step in range(2)] == [0.1, 0.2]  # ends before it has warmed up


def test_wider_models_get_a_lower_rate() -> None:
    """As in muP: Adam moves what a unit of a wide layer computes by as much as that of a narrow one."""
    scaled = recipe("stable", lr=0.4, lr_base_width=256, warmup_steps=0)
    assert [learning_rate(0, 2, scaled, width) for width in (64, 256, 512)] == pytest.approx([1.6, 0.4, 0.2])
    moved = {}
    for width in (8, 512):
        layer, x = torch.nn.Linear(width, 1, bias=False), torch.ones(width)
        before = layer(x).item()
        optimizer = make_optimizer(layer.parameters(), scaled)
        layer(x).sum().backward()
        optimizer_step(layer, optimizer, 0.0, learning_rate(0, 2, scaled, width), 0.0)
        moved[width] = before - layer(x).item()
    assert moved[8] == pytest.approx(moved[512], rel=1e-3) == pytest.approx(0.4 * 256, rel=1e-3)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_rate_decays_as_transformers_schedules_do(decay: str, warmup: int) -> None:
    """Their warm-up starts at zero, one step before ours; after it the two are the same."""
    chosen, steps = recipe("stable", lr=0.4, lr_base_width=0, warmup_steps=warmup, lr_decay=decay), 12
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
    schedules = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    schedule, truth = schedules[decay](optimizer, warmup, steps), []
    for _ in range(steps):
        truth.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    measured = [learning_rate(step, steps, chosen, 8) for step in range(steps)]
    assert measured[warmup:] == pytest.approx(truth[warmup:], rel=1e-9)
    assert measured[:warmup] == pytest.approx([0.4 * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert schedule.get_last_lr()[0] == pytest.approx(learning_rate(steps, steps, chosen, 8), abs=1e-12) == 0


@pytest.mark.parametrize(("limit", "moves"), [(0.0, 3.0), (100.0, 3.0), (1.0, 1 / 2**0.5)])
def test_sgd_steps_along_the_clipped_gradient(limit: float, moves: float) -> None:
    """Two weights with gradient 3: norm 3 sqrt 2; clipped to 1, each moves by 1 / sqrt 2."""
    model = ones(3.0)
    sgd = recipe("stable", optimizer="sgd", lr=1.0, lr_base_width=0, warmup_steps=1, max_grad_norm=limit)
    done = optimizer_step(model, make_optimizer(model.parameters(), sgd), limit, learning_rate(0, 2, sgd, 8), 0.0)
    assert done.grad_norm == pytest.approx(3 * 2**0.5)
    assert done.update_norm_ratio == pytest.approx(moves / 2, rel=1e-5)  # both weights are 1
    assert not done.skipped
    assert model.weight.flatten().tolist() == pytest.approx([1 - moves / 2] * 2, rel=1e-5)  # half the rate: warm-up


@pytest.mark.numeric
@pytest.mark.parametrize(("chunk", "steps"), [(1, 6), (100, 4), (2**26, 1)])  # bytes; of 60, 12, 3600, 1200, 16, 8
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_parameters_that_step_in_chunks_step_as_all_at_once(
    optimizer: str, chunk: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own optimizer over all of them gives the same bytes, and the change is that of one long vector. One
    parameter takes no part, as of a model's part that the loss does not use."""
    monkeypatch.setattr("pipeline.rl.optimizer.CHUNK_BYTES", chunk)
    chosen = recipe("stable", optimizer=optimizer, lr=0.1)
    torch.manual_seed(0)
    ours = torch.nn.ModuleList([torch.nn.Linear(5, 3), torch.nn.Linear(3, 300), torch.nn.Linear(2, 2)])
    truth = copy.deepcopy(ours)
    mine, theirs = make_optimizer(ours.parameters(), chosen), make_optimizer(truth.parameters(), chosen)
    calls: list[None] = []
    mine.register_step_post_hook(lambda *_: calls.append(None))
    for _ in range(3):
        before = [p.detach().clone() for p in truth.parameters()]
        for p, q in list(zip(ours.parameters(), truth.parameters(), strict=True))[:-1]:
            p.grad = q.grad = torch.randn_like(p)
        theirs.step()
        done = optimizer_step(ours, mine, 0.0, chosen.lr, 0.0)
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), truth.parameters(), strict=True))
        change = torch.cat([(p - was).flatten() for p, was in zip(truth.parameters(), before, strict=True)])
        whole = torch.cat([was.flatten() for was in before])
        assert done.update_norm_ratio == pytest.approx(
            (change.double().norm() / whole.double().norm()).item(), rel=1e-6
        )
        assert all(p.grad is None for p in ours.parameters())  # nothing is held while the next batch is sampled
    assert len(calls) == 3 * steps


@pytest.mark.parametrize(("grad", "loss"), [(torch.nan, 0.0), (torch.inf, 0.0), (1.0, torch.nan), (1.0, torch.inf)])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_is_not_finite_is_withheld(grad: float, loss: float, optimizer: str) -> None:
    chosen = recipe("stable", optimizer=optimizer)
    model = ones(grad)
    made = make_optimizer(model.parameters(), chosen)
    done = optimizer_step(model, made, chosen.max_grad_norm, chosen.lr, loss)
    assert (done.skipped, done.update_norm_ratio) == (True, 0.0)
    assert model.weight.flatten().tolist() == [1, 1]
    assert not made.state  # Adam's moments are as clean as before
    assert all(p.grad is None for p in model.parameters())


def test_adam_s_first_step_is_the_rate_and_its_eps_is_the_recipe_s() -> None:
    """m / (sqrt(v) + eps) is g / (|g| + eps) at first: the sign of g, unless eps is of g's size."""
    for eps, expected in ((1e-8, 1.0), (1.0, 2 / (2 + 1))):
        chosen = recipe("stable", lr=0.5, warmup_steps=0, max_grad_norm=0.0, adam_eps=eps)
        model = ones(2.0)
        optimizer_step(model, make_optimizer(model.parameters(), chosen), 0.0, 0.5, 0.0)
        assert model.weight.flatten().tolist() == pytest.approx([1 - 0.5 * expected] * 2)
