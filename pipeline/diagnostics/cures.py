"""What to change for each kind of collapse, with its reason and source. docs/DETECTOR.md says which were tried."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.diagnostics.calibration import Spread
from pipeline.diagnostics.verdict import CAUSES, Finding, Kind
from pipeline.params import Params, Recipe

Changes = dict[str, Any]  # keys of params.yaml, or of a recipe in it

KL_PER_SPREAD = 0.1  # reward spread within a prompt that a nat of a completion's log-ratio costs


@dataclass(frozen=True)
class Cure:
    changes: Changes  # by the key of params.yaml
    reason: str
    source: str


def cure(kind: Kind, params: Params, spreads: dict[str, Spread]) -> Cure:
    """The change to try against one kind of collapse; without changes where the recipe has no key that would help."""
    recipe: Recipe = params.selected("recipe")
    train, where = params.train, f"recipes.{params.recipe}"
    match kind:
        case "numeric":
            changes: Changes = {"lr": shorter(recipe.lr, 10)}
            changes |= {"max_grad_norm": 1.0} if recipe.max_grad_norm == 0 else {}
            changes |= {"precision": "float32"} if recipe.precision != "float32" else {}
            reason = "numbers overflow where updates are too large; clipping bounds the gradient"
            source = "Pascanu et al. 2013 (arXiv 1211.5063)"
        case "misaligned":
            changes = {"alignment": "correct"} if recipe.alignment != "correct" else {}
            reason = "the loss must score the tokens that were sampled, each given those before it: anything else is no policy gradient"
            source = "docs/THEORY.md; Williams 1992"
        case "starved":
            more: Changes = {"train.samples_per_prompt": 4 * train.samples_per_prompt}
            reason = (
                "equal rewards leave no difference to learn from; more samples a prompt find the rare one that scores"
            )
            return Cure(more, reason, "DAPO (arXiv 2503.14476)")
        case "step-size":
            changes = smaller_steps(recipe)
            reason = "updates that change the policy too much at once take it where its own samples no longer tell the way back"
            source = "docs/COLLAPSE.md; Schulman et al. 2015 (arXiv 1502.05477)"
        case "empty" if recipe.special_tokens == "keep":
            changes = {"special_tokens": "strip"} | leash(recipe, spreads)
            reason = "the reward reads end-of-text tokens as text and pays for silence; the KL term keeps what is left from narrowing to one text"
            source = "docs/COLLAPSE.md"
        case "gibberish" if recipe.baseline == "none":
            changes = {"baseline": "rloo"} | leash(recipe, spreads)
            reason = "without a baseline rewards of one sign push all probabilities one way"
            source = "docs/COLLAPSE.md; Ahmadian et al. 2024 (arXiv 2402.14740)"
        case _:
            changes = leash(recipe, spreads)
            reason = "a KL term makes leaving the checkpoint's language cost reward"
            source = "docs/COLLAPSE.md; Ziegler et al. 2019 (arXiv 1909.08593)"
    return Cure({f"{where}.{key}": value for key, value in changes.items()}, reason, source)


def leash(recipe: Recipe, spreads: dict[str, Spread]) -> Changes:
    """A KL term in the units of the reward; where the recipe has one that did not hold, three times as much of it and
    smaller steps."""
    if recipe.kl == "none" or recipe.kl_coef == 0:
        spread = spreads.get("reward_std_within")
        per_nat = KL_PER_SPREAD * spread.mean if spread and spread.mean > 0 else KL_PER_SPREAD
        return {"kl": "reward_k1", "kl_coef": rounded(per_nat)}
    return {"kl_coef": rounded(3 * recipe.kl_coef), **smaller_steps(recipe)}


def smaller_steps(recipe: Recipe) -> Changes:
    return {"lr": shorter(recipe.lr, 3)} | ({"warmup_steps": 10} if recipe.warmup_steps < 10 else {})


def shorter(lr: float, factor: float) -> float:
    return rounded(lr / factor)


def rounded(value: float) -> float:
    """To one significant digit: a suggestion claims no more."""
    return float(f"{value:.0e}")


def treated(found: Sequence[Finding]) -> list[Finding]:
    """The findings to act on: the causes, and what came first; later ones follow from it."""
    others = [finding.onset for finding in found if finding.kind not in CAUSES]
    return [finding for finding in found if finding.kind in CAUSES or finding.onset == min(others)]
