"""Makes the second embedded model and its problems: sums of two numbers below 100, of which it solves about half.

    python data/pocket/make_math.py      # ten minutes, on one core whatever the machine has

The model learns from answers of which half are wrong: they repeat the first number. So it knows the sum and says it
half of the time, as a language model does that has read right and wrong texts, and reinforcement learning has
something to find on every problem. That makes the problems a sanity check of algorithms (arXiv 2510.26788): the
untouched model solves each of them between a fifth and four fifths of the time, and a right algorithm gets near to
solving all of them always.

The pairs of numbers are split by the seed into three sets that share none, in either order: those that the model learns
from, those that reinforcement learning trains on (`prompts/train.jsonl`), and held-out ones
(`prompts/validation.jsonl`). The model is a GPT-NeoX over bytes, with EOS as token 0, trained by AdamW.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from make import train_tokenizer, write_checkpoint  # beside this file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent.parent / "pocket-math"
PAIRS = {"train": 300, "heldout": 150}  # set aside
PROBLEMS = {"train": 512, "heldout": 256}  # of these, the first ones that are solved neither too seldom nor too often
PERFECTIBLE = (0.2, 0.8)  # share of the time that the untouched model solves a problem of reinforcement learning
WINDOW = 64  # tokens of context
WARMUP, EVERY = 20, 100  # steps; steps between lines of the curve

Problem = tuple[int, int]


def problems(seed: int) -> dict[str, list[Problem]]:
    """To learn from, to train on and held out, in random order; a pair of numbers in both orders in one of them."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = {**PAIRS, "learned": len(pairs) - sum(PAIRS.values())}
    mixed, found = iter([pairs[i] for i in order]), {}
    for name, size in sizes.items():
        found[name] = [each for a, b in (next(mixed) for _ in range(size)) for each in dict.fromkeys([(a, b), (b, a)])]
    return found


def texts(chosen: list[Problem], wrong: bool = False) -> list[tuple[str, str]]:
    """Questions and their answers, right or wrong ones."""
    return [(f"{a}+{b}=", str(a if wrong else a + b)) for a, b in chosen]


def encoded(tokenizer: PreTrainedTokenizerFast, chosen: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, T], padded with EOS, and the mask of what is learned: the answer and the EOS behind it."""
    rows = [(tokenizer(question)["input_ids"], tokenizer(answer)["input_ids"]) for question, answer in chosen]
    width = len("99+99=") + len("198") + 1
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        mask[row, len(question) : end + 1] = True
    return ids, mask


@torch.no_grad()
def solved(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, chosen: list[Problem]) -> torch.Tensor:
    """[n] the chance that a completion sampled at temperature 1 is the answer and then EOS."""
    ids, mask = encoded(tokenizer, texts(chosen))
    logprobs = model(ids[:, :-1]).logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return logprobs.masked_fill(~mask[:, 1:], 0).sum(1).exp()


def perfectible(chosen: list[Problem], chances: torch.Tensor, count: int) -> list[int]:
    """The places of the first problems whose chances lie within PERFECTIBLE. ValueError: there are too few."""
    low, high = PERFECTIBLE
    found = [i for i, chance in enumerate(chances.tolist()) if low <= chance <= high]
    if len(found) < count:
        raise ValueError(f"{len(found)} of {len(chosen)} problems are solved between {low:.0%} and {high:.0%}")
    return found[:count]


def rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine to zero."""
    return peak * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more of them round otherwise
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([], 257)  # a token a byte, and EOS
    sets = problems(args.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=4,
            intermediate_size=4 * args.hidden, max_position_embeddings=WINDOW, bos_token_id=0, eos_token_id=0,
            attention_dropout=0.0, hidden_dropout=0.0,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    both = [encoded(tokenizer, texts(sets["learned"], wrong)) for wrong in (False, True)]
    ids, mask = (torch.stack(parts) for parts in zip(*both, strict=True))  # [right or wrong, n, T]
    generator, curve = torch.Generator().manual_seed(args.seed), []
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = rate(step, args.steps, args.lr)
        rows = torch.randint(ids.shape[1], (args.batch,), generator=generator)
        wrong = torch.randint(2, (args.batch,), generator=generator)
        inputs, wanted, said = ids[wrong, rows, :-1], ids[wrong, rows, 1:], mask[wrong, rows, 1:]
        loss = torch.nn.functional.cross_entropy(model(inputs).logits[said], wanted[said])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            share = solved(model, tokenizer, sets["train"]).mean().item()
            curve.append([step + 1, round(loss.item(), 4), round(share, 4)])
            print(f"step {step + 1}: loss {loss.item():.3f}, solved {share:.1%}", flush=True)
    write_checkpoint(model, tokenizer, args.out / "checkpoint")
    (args.out / "prompts").mkdir(exist_ok=True)
    shares = {}
    for name, file in (("train", "train"), ("heldout", "validation")):
        chances = solved(model, tokenizer, sets[name])
        kept = perfectible(sets[name], chances, PROBLEMS[name])
        shares[name] = round(chances[kept].mean().item(), 4)
        rows = [{"question": q, "answer": a} for q, a in texts([sets[name][i] for i in kept])]
        (args.out / f"prompts/{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = {"steps": args.steps, "solved": shares, "curve": curve}
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(shares)


if __name__ == "__main__":
    main()
