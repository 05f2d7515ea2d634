"""The thresholds of the verdict. Limits from chance come on top (`calibration.py`)."""

from dataclasses import dataclass

LARGE_UPDATE = 0.015  # nats a token of one update's KL, where Spinning Up's PPO stops: 1.5 times its target_kl of 0.01


@dataclass(frozen=True)
class Thresholds:
    """Effect sizes: what chance does not explain must also be bad. docs/DETECTOR.md has what each was chosen from."""

    patience: int = 2  # steps in a row before a sign counts: one batch may stray
    misaligned: float = 6.0  # nats; half precision rounds by up to 3.6, the shifted objective is off by 10 and more
    no_signal: float = 0.95  # share of prompts without any spread of reward, mean over all steps so far
    no_signal_steps: int = 10  # before this is said: a rare reward may still be found
    empty: float = 0.5  # share of completions
    repeated: float = 0.5  # share of 3-grams
    distinct: float = 0.5  # of the reference's share of different completions
    distinct_pairs: float = 0.4  # of the reference's share of different token pairs; of held-out completions alone
    entropy: float = 0.2  # of the reference's
    unlikely: float = 2.0  # nats a token below the reference's own texts
    # of the way from the reference's own texts to the same with their tokens shuffled
    broken: float = 0.85  # bits a byte, by themselves
    costly: float = 0.5  # bits a byte, together with
    atypical: float = 0.15  # log-probability plus entropy
    reward: float = 0.5  # of the spread of rewards within a prompt
    certain: float = 0.9  # where chance alone could reach any share, this one counts all the same


THRESHOLDS = Thresholds()
