"""Makes the second embedded model and its problems: sums of two numbers below 100, of which it solves about half.

    python data/pocket/make_math.py      # a minute, on one core whatever the machine has

All 10,000 problems `a+b=` are split by the seed into three sets that share none: those that the model learns from,
those that reinforcement learning trains on (`prompts/train.jsonl`), and held-out ones
(`prompts/validation.jsonl`). The model is a GPT-NeoX over bytes, with EOS as token 0. It learns answers by AdamW
at a constant rate and ends at the first check at which it solves ENOUGH of the problems to train on, with
completions sampled at temperature 1.
"""

import argparse
import json
from pathlib import Path

import torch
from make import train_tokenizer, write_checkpoint  # beside this file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent.parent / "pocket-math"
TRAIN, HELDOUT = 512, 256  # problems
ENOUGH, EVERY = 0.45, 50  # share of problems solved; steps between checks
WINDOW = 64  # tokens of context

Problem = tuple[str, str]  # question and answer


def problems(seed: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """To learn from, to train on and held out, in random order."""
    every = [(f"{a}+{b}=", str(a + b)) for a in range(100) for b in range(100)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [every[i] for i in order]
    return mixed[TRAIN + HELDOUT :], mixed[:TRAIN], mixed[TRAIN : TRAIN + HELDOUT]


def encoded(tokenizer: PreTrainedTokenizerFast, chosen: list[Problem]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, T], padded with EOS, and the mask of what is learned: the answer and the EOS behind it."""
    rows = [(tokenizer(question)["input_ids"], tokenizer(answer)["input_ids"]) for question, answer in chosen]
    width = max(len(question) + len(answer) for question, answer in rows) + 1
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (question, answer) in enumerate(rows):
        end = len(question) + len(answer)
        ids[row, :end] = torch.tensor(question + answer)
        mask[row, len(question) : end + 1] = True
    return ids, mask


@torch.no_grad()
def solved(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, chosen: list[Problem], seed: int) -> float:
    """Share of problems whose sampled completion is the answer and then EOS. The model is causal: answers of all
    lengths are sampled from the same padded rows."""
    ids, mask = encoded(tokenizer, chosen)
    generator = torch.Generator().manual_seed(seed)
    probabilities = model(ids[:, :-1]).logits.float().softmax(-1)
    # sampled token by token, an answer is right where each of its tokens is drawn given the right ones before
    drawn = torch.multinomial(probabilities.flatten(0, 1), 1, generator=generator).view(len(ids), -1)
    return ((drawn == ids[:, 1:]) | ~mask[:, 1:]).all(1).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # more of them round otherwise
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer([], 257)  # a token a byte, and EOS
    learned, train, heldout = problems(args.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=4,
            intermediate_size=4 * args.hidden, max_position_embeddings=WINDOW, bos_token_id=0, eos_token_id=0,
            attention_dropout=0.0, hidden_dropout=0.0,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    ids, mask = encoded(tokenizer, learned)
    generator, step, share, curve = torch.Generator().manual_seed(args.seed), 0, 0.0, []
    while share < ENOUGH:
        for _ in range(EVERY):
            rows = torch.randint(len(ids), (args.batch,), generator=generator)
            logits, wanted = model(ids[rows, :-1]).logits, mask[rows, 1:]
            loss = torch.nn.functional.cross_entropy(logits[wanted], ids[rows, 1:][wanted])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        step += EVERY
        share = solved(model, tokenizer, train, step)
        curve.append([step, round(loss.item(), 4), round(share, 4)])
        print(f"step {step}: loss {loss.item():.3f}, solved {share:.1%}", flush=True)
    write_checkpoint(model, tokenizer, args.out / "checkpoint")
    (args.out / "prompts").mkdir(exist_ok=True)
    for name, chosen in (("train", train), ("validation", heldout)):
        lines = (json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in chosen)
        (args.out / f"prompts/{name}.jsonl").write_text("".join(lines))
    figures = {"steps": step, "solved": {name: solved(model, tokenizer, chosen, 0) for name, chosen in (
        ("train", train), ("heldout", heldout))}, "curve": curve}  # fmt: skip
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures["solved"])


if __name__ == "__main__":
    main()
