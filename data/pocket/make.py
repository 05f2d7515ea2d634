"""Makes the pocket checkpoint: a GPT-NeoX language model of OASST1 English, small enough to commit.

    python data/pocket/make.py                                     # messages from OpenAssistant/oasst1
    python data/pocket/make.py --train train.jsonl.gz --validation validation.jsonl.gz
    python data/pocket/make.py --keep 16,64,256                    # only models/local/pocket-step16, -step64, -step256

A document is a run of consecutive messages in dataset order, joined by a blank line, closed by EOS. Runs
end at the first message that brings them to RUN_CHARACTERS: were single messages documents, the many short
ones would teach the model to stop at once. Matrices are trained by Muon, the rest by AdamW, with the learning
rate constant and then falling linearly to zero (warm-up, stable, decay; Hägele et al., arXiv 2405.18392).

The quality figure is bits per byte on the validation split, each document scored by itself:

    bpb = sum_t -log2 p(token_t | earlier tokens of its document) / number of UTF-8 bytes       (EOS included)

Resumable: the state is saved beside the output every SAVE_SECONDS; the same command goes on from there.
"""

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
REVISION = "fdf72ae0827c1cda404aff25b6603abec9e3399b"  # of OpenAssistant/oasst1, as in params.yaml
RUN_CHARACTERS = 1500  # about 450 tokens: most documents fit one window
WINDOW = 512  # tokens of context
BATCH = 16  # windows per optimizer step
SAVE_SECONDS = 120
KEPT = "models/local/pocket-step"  # where local models lie, and their names without the step
CURVE_DOCUMENTS = 8  # every so many-th validation document makes the curve, all of them the final figure


def read_messages(source: str, split: str) -> list[str]:
    """English texts in dataset order, from a JSONL file (may be gzipped) or from a hub dataset."""
    if Path(source).exists():
        opener = gzip.open if source.endswith(".gz") else open
        with opener(source, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        from datasets import load_dataset

        rows = load_dataset(source, split=split, revision=REVISION)
    return [row["text"] for row in rows if row["lang"] == "en" and row["text"].strip()]


def documents(messages: list[str]) -> list[str]:
    """Runs of consecutive messages of at least RUN_CHARACTERS characters, joined by a blank line."""
    runs: list[str] = []
    run: list[str] = []
    for message in messages:
        run.append(message.strip())
        if sum(map(len, run)) >= RUN_CHARACTERS:
            runs.append("\n\n".join(run))
            run = []
    return runs + (["\n\n".join(run)] if run else [])


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with EOS as token 0, Pythia's arrangement."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, clean_up_tokenization_spaces=False
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Tensor]:
    """One int64 tensor per document, EOS first and last: the first predicts, the last is predicted."""
    backend = tokenizer.backend_tokenizer
    eos = tokenizer.eos_token_id
    return [torch.tensor([eos, *encoding.ids, eos]) for encoding in backend.encode_batch(texts)]


@torch.no_grad()
def bits_per_byte(model: GPTNeoXForCausalLM, encoded: list[Tensor], texts: list[str]) -> float:
    """Windows overlap by half: after the first, only the second half of a window is scored."""
    model.eval()
    device = next(model.parameters()).device
    nats, half = 0.0, WINDOW // 2
    for ids in encoded:
        scored = 1  # position of the first token not scored yet
        for start in range(0, max(1, len(ids) - 1 - half), half):
            window = ids[start : start + WINDOW + 1].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(window[None, :-1]).logits[0].float()
            fresh = slice(scored - 1 - start, None)
            nats += torch.nn.functional.cross_entropy(logits[fresh], window[1:][fresh], reduction="sum").item()
            scored = start + len(window)
    model.train()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def batches(encoded: list[Tensor], tokens: int, generator: torch.Generator):
    """Documents in a new order each epoch, laid end to end and cut into BATCH windows. Yields ids [BATCH, WINDOW +
    1]."""
    need = BATCH * (WINDOW + 1)
    done = 0
    rest = torch.empty(0, dtype=torch.long)
    while done < tokens:
        order = torch.randperm(len(encoded), generator=generator).tolist()
        # the closing EOS of one document is the opening EOS of the next
        stream = torch.cat([rest, *[encoded[i][:-1] for i in order]])
        usable = len(stream) // need * need
        rest = stream[usable:]
        rows = stream[:usable].view(-1, BATCH, WINDOW + 1)
        for row in rows:
            yield row
            done += BATCH * WINDOW
            if done >= tokens:
                return


def optimizers(model: GPTNeoXForCausalLM, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.gpt_neox.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def learning_rate(progress: float, warmup: float = 0.02, decay: float = 0.4) -> float:
    """Factor on the peak rate at `progress` in [0, 1]."""
    return min(1.0, (progress + 1e-3) / warmup, max(0.0, 1 - progress) / decay)


def write_checkpoint(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """float16, as Pythia ships."""
    folder.mkdir(parents=True, exist_ok=True)
    half = GPTNeoXForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config.eos_token_id = half.generation_config.bos_token_id = 0
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def step_numbers(text: str) -> list[int]:
    """'16,64' -> [16, 64], ascending and from 1 on."""
    numbers = sorted({int(number) for number in text.split(",")})
    if numbers[0] < 1:
        raise ValueError(text)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="OpenAssistant/oasst1", help="a JSONL file or a hub dataset")
    parser.add_argument("--validation", default="OpenAssistant/oasst1", help="a JSONL file or a hub dataset")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--state", type=Path, default=Path(__file__).parent / "make-state.pt")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=float, default=10.5e6, help="tokens to train on")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop here, resumably")
    parser.add_argument(
        "--keep", type=step_numbers, default=[], metavar="N,M", help=f"write {KEPT}N after N steps; end after the last"
    )
    args = parser.parse_args()

    names = ("vocabulary", "hidden", "layers", "heads", "tokens", "lr", "muon_lr", "seed")
    arguments = {name: getattr(args, name) for name in names}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_texts = documents(read_messages(args.train, "train"))
    validation_texts = documents(read_messages(args.validation, "validation"))
    tokenizer = train_tokenizer(train_texts, args.vocabulary)
    encoded = token_stream(tokenizer, train_texts)
    held_out = token_stream(tokenizer, validation_texts)
    print(f"{len(encoded)} documents, {sum(map(len, encoded))} tokens, "
          f"{sum(len(t.encode()) for t in train_texts) / sum(map(len, encoded)):.2f} bytes a token",
          flush=True)  # fmt: skip

    torch.manual_seed(args.seed)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=args.vocabulary,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.hidden,
            max_position_embeddings=WINDOW,
            bos_token_id=0,
            eos_token_id=0,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
    ).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    opts = optimizers(model, args.lr, args.muon_lr)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]

    first, seconds, curve = 0, 0.0, []
    if args.state.exists():
        state = torch.load(args.state, weights_only=True, map_location=device)
        if state["arguments"] != arguments:
            parser.error(
                f"{args.state} is of a run with other arguments: {state['arguments']}; delete it to begin anew"
            )
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first, seconds, curve = state["step"], state["seconds"], state["curve"]
    steps = math.ceil(args.tokens / (BATCH * WINDOW))
    kept = {step: Path(__file__).parents[2] / f"{KEPT}{step}" for step in args.keep}
    missing = [step for step, folder in kept.items() if not folder.exists()]
    if kept and not (missing and first < missing[0] and missing[-1] <= steps):
        parser.error(f"--keep: {missing or 'nothing'} is missing, and training goes on from step {first} to {steps}")

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
        state |= {"step": step, "seconds": seconds, "curve": curve, "arguments": arguments}
        torch.save(state, args.state.with_suffix(".tmp"))
        args.state.with_suffix(".tmp").replace(args.state)

    forward = torch.compile(model) if device.type == "cuda" else model
    began = saved_at = time.time()
    for step, ids in enumerate(batches(encoded, int(args.tokens), torch.Generator().manual_seed(args.seed))):
        if step < first:
            continue
        tick = time.time()
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * learning_rate(step / steps)
        ids = ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = forward(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        seconds += time.time() - tick
        if step % 20 == 0:
            print(f"step {step}/{steps} loss {loss.item():.4f} {seconds / (step + 1):.3f} s a step", flush=True)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            bpb = bits_per_byte(model, held_out[::CURVE_DOCUMENTS], validation_texts[::CURVE_DOCUMENTS])
            curve.append(
                {"tokens": (step + 1) * BATCH * WINDOW, "seconds": round(seconds), "bits_per_byte": round(bpb, 4)}
            )
            print(f"step {step + 1} validation {bpb:.4f} bits a byte on a sample", flush=True)
        if step + 1 in missing:
            write_checkpoint(model, tokenizer, kept[step + 1])
            bpb = bits_per_byte(model, held_out[::CURVE_DOCUMENTS], validation_texts[::CURVE_DOCUMENTS])
            print(f"kept {kept[step + 1].name}: validation {bpb:.4f} bits a byte on a sample", flush=True)
            if step + 1 == missing[-1]:
                save(step + 1)
                return
        if time.time() - saved_at > SAVE_SECONDS:
            save(step + 1)
            saved_at = time.time()
        if time.time() - began > 60 * args.minutes:
            save(step + 1)
            print("stopped at the time limit; the same command goes on", flush=True)
            return
    bpb = bits_per_byte(model, held_out, validation_texts)
    print(f"validation, all documents: {bpb:.4f} bits a byte", flush=True)
    figures = {
        "bits_per_byte": round(bpb, 4),
        "documents": len(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "arguments": arguments,
        "curve_documents": len(held_out[::CURVE_DOCUMENTS]),
        "curve": curve,
    }
    write_checkpoint(model, tokenizer, args.out)
    (args.out.parent / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    args.state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
