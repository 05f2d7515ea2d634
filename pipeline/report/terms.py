"""The terms of a page: each use is a link to the term's definition, which stands at the page's end."""

import re

from markupsafe import Markup

from pipeline.report.text import visible
from pipeline.rl.metrics import METRICS

# Terms that are no column of history.csv. docs/METRICS.md defines the numbers of the evaluation in the same words.
WORDS = {
    "reference model": "the model before training; the batch of step 0 is sampled from it",
    "trained policy": "the model after the last update, in data/policy",
    "held-out": "of prompts that training never uses",
    "held-out gain": "mean over prompts and samples of R(policy) − R(reference), paired by prompt and sample",
    "win rate": "share of pairs in which the policy's reward is higher, a tie counting one half",
    "pass@k": "chance that at least one of k completions of a prompt is right, estimated from all of its samples",
    "95% interval": "2.5% and 97.5% quantile of the mean over bootstrap resamples of whole prompts",
    "reward": "the number that training maximises, of one completion; each kind of reward has its own unit",
    "term": "one of the rewards that a sum adds up, each times its weight",
    "share of the signal": "what a term has of the variance, within a prompt, of what training learns from; the shares "
    "add up to 100%, and that of a term which works against the others may be below 0",
    "advantage": "what a completion's log-probability is weighted by in the loss: reward minus baseline, normalised "
    "where the recipe says so",
    "logprob": "natural logarithm of the probability that a model gives a token, in nats",
    "recipe": "the algorithm and its settings, a table of params.yaml",
    "seed": "what all random numbers of the run are derived from",
    "arithmetic": "portable: kernels that give the same bytes on every x86-64 CPU with AVX2; native: the fastest ones "
    "of one type of device",
    "onset": "the step from which a finding holds: the number of updates before it",
    "threshold": "the limit beyond which a value is a sign of collapse: fixed, or how far a batch of the reference "
    "model may stray by chance",
    "train key": "digest of all that can change the run's numbers: code, parameters, prompts and model; equal keys, "
    "equal runs",
    "code digest": "digest of the code that training depends on, and of the versions of its libraries",
}
OTHER_NAMES = {"train_key": "train key", "code": "code digest", "arithmetic": "arithmetic"}  # in run.json


class Terms:
    """Makes the links of one page, and knows which terms it used."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def link(self, term: str, text: str | None = None) -> Markup:
        """A use of a term, in other words where `text` gives them. KeyError: the term has no definition."""
        title, _, _ = title_and_meaning(term)
        self.used.add(term)
        return Markup('<a class="term" href="#{}">{}</a>').format(anchor(term), title if text is None else text)

    def link_known(self, name: str) -> Markup:
        """Link a name that comes from a file, by its title if it is a column. A name that is no term stays as it is."""
        if name in METRICS:
            return self.link(name)
        return self.link(OTHER_NAMES[name], name) if name in OTHER_NAMES else visible(name)

    def entries(self) -> list[tuple[str, str, str, str]]:
        """(anchor, title, column or nothing, definition) of the terms used so far, by title."""
        found = [(anchor(term), *title_and_meaning(term)) for term in self.used]
        return sorted(found, key=lambda entry: entry[1].casefold())


def title_and_meaning(term: str) -> tuple[str, str, str]:
    """(title, column or nothing, definition)."""
    if term in METRICS:
        return METRICS[term].title, term, METRICS[term].meaning
    return term, "", WORDS[term]


def anchor(term: str) -> str:
    return f"term-{re.sub(r'[^a-z0-9]+', '-', term.lower())}"
