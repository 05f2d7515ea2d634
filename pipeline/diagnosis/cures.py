"""What to change for each kind of collapse, with its reason and source."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import Params, Recipe
from pipeline.diagnosis.calibration import Spread
from pipeline.diagnosis.verdict import CAUSES, Finding

Changes = dict[str, Any]  # keys of params.yaml, or of a recipe in it

KL_PER_SPREAD = 0.2  # reward spread within a prompt that a nat of a completion's log-ratio costs: as in `stable`
KL_TARGET = 6.0  # nats of a completion, above which it costs more: as there
LARGEST_LR = 1e-4  # 14 of 16 runs of SmolLM2 kept their text with it (docs/REAL_MODELS.md)
FEWEST_TOKENS = 2  # of a completion


@dataclass(frozen=True)
class Cure:
    changes: Changes  # by the key of params.yaml
    reason: str
    source: str


def cure(finding: Finding, params: Params, spreads: dict[str, Spread]) -> Cure:
    """The change to try against one finding; without changes where the recipe has no key that would help."""
    recipe: Recipe = params.selected_recipe
    train, where = params.train, f"recipes.{params.recipe}"
    slower = smaller_steps(recipe, train.steps)
    match finding.kind:
        case "numeric" if finding.onset == 0:
            changes: Changes = {"advantage_norm": "batch"} if recipe.advantage_norm == "none" else slower
            reason = "numbers overflow before any update: rewards of this size have to be scaled down"
            source = "docs/THEORY.md"
        case "numeric":
            changes = smaller_steps(recipe, train.steps, divisor=10)
            changes |= {"precision": "float32"} if recipe.precision != "float32" else {}
            reason = "numbers overflow where updates are too large; clipping bounds the gradient"
            source = "Pascanu et al. 2013 (arXiv 1211.5063)"
        case "misaligned":
            changes = {"alignment": "correct"} if recipe.alignment != "correct" else {}
            reason = (
                "the loss must score the tokens that were sampled, each given those before it: anything else is "
                "no policy gradient"
            )
            source = "docs/THEORY.md; Williams 1992"
        case "starved":
            more: Changes = {"train.samples_per_prompt": 4 * train.samples_per_prompt}
            reason = (
                "equal rewards leave no difference to learn from; more samples a prompt may find the rare one "
                "that scores"
            )
            return Cure(more, reason, "DAPO (arXiv 2503.14476)")
        case "step-size" | "gibberish" if recipe.entropy_coef > 0:
            changes = {"entropy_coef": 0.0}
            reason = "the entropy bonus pays for noise"
            source = "docs/THEORY.md"
        case "step-size":
            changes = slower
            reason = (
                "updates that change the policy too much at once take it where its own samples no longer tell "
                "the way back"
            )
            source = "docs/COLLAPSE.md; Schulman et al. 2015 (arXiv 1502.05477)"
        case "empty" | "hacking" if finding.passes("empty_share") and recipe.special_tokens == "keep":
            changes = add_kl_and_slow_down(recipe, spreads, slower)
            reason = (
                "the reward reads end-of-text tokens as text and pays for silence; without them, a KL term and "
                "smaller steps keep the policy from narrowing to one text"
            )
            source = "docs/COLLAPSE.md"
        case "gibberish" if recipe.baseline == "none":
            changes = {"baseline": "rloo"} | add_kl_and_slow_down(recipe, spreads, slower)
            reason = (
                "without a baseline rewards of one sign push all probabilities one way; a KL term and smaller "
                "steps hold what the mended gradient could still break"
            )
            source = "docs/COLLAPSE.md; Ahmadian et al. 2024 (arXiv 2402.14740)"
        case "over-optimised":
            lower: Changes = {"kl_target": rounded(recipe.kl_target / 3)}
            changes = lower if kl_is_limited(recipe) else add_kl_and_slow_down(recipe, spreads, slower)
            reason = (
                "the trained reward is a stand-in, and pays for more than was meant; a KL term ends the run nearer to "
                "the reference, as an earlier step does"
            )
            source = "Gao et al. 2022 (arXiv 2210.10760)"
        case _:
            changes = add_kl_and_slow_down(recipe, spreads, slower)
            reason = "a KL term makes leaving the reference's language cost reward; smaller steps leave it time to act"
            source = "docs/COLLAPSE.md; Ziegler et al. 2019 (arXiv 1909.08593)"
    return Cure({f"{where}.{key}": value for key, value in changes.items()}, reason, source)


def add_kl_and_slow_down(recipe: Recipe, spreads: dict[str, Spread], slower: Changes) -> Changes:
    """Smaller steps and a KL term in the units of the reward, scaled where the recipe scales it. Where the recipe has
    a term, smaller steps and a target, and a larger coefficient only where it is weak beside the reward's spread: on a
    real model that, or a lower target, cost more of the gain (docs/REAL_MODELS.md). With them the gradient of the
    objective, where the recipe has another one: SmolLM2 collapsed again after the KL term alone."""
    slower = true_gradient(recipe) | room_for_text(recipe, spreads) | slower
    # of normalised terms another one is learnt from than the reward's
    own = spreads.get("signal_std_within", spreads.get("reward_std_within"))
    spread = own if recipe.scale_rewards == "none" else None
    per_nat = KL_PER_SPREAD * spread.mean if spread and spread.mean > 0 else KL_PER_SPREAD
    coefficient: Changes = {"kl_coef": rounded(per_nat, 2)}
    if recipe.kl == "none" or recipe.kl_coef == 0:
        return {"kl": "reward_k1", **coefficient, "kl_target": KL_TARGET, **slower}
    weak = coefficient if recipe.kl_coef < per_nat / 2 else {}
    target: Changes = {} if kl_is_limited(recipe) else {"kl_target": KL_TARGET}
    return weak | target | slower


def true_gradient(recipe: Recipe) -> Changes:
    """What lets the loss score the sampled tokens and no others, and the reward read the text alone (THEORY.md)."""
    changes: Changes = {}
    if recipe.alignment != "correct":
        changes["alignment"] = "correct"
    if recipe.padding != "masked":
        changes["padding"] = "masked"
    if recipe.special_tokens == "keep":
        changes["special_tokens"] = "strip"
    if (recipe.top_k > 0 or recipe.top_p < 1) and recipe.loss_distribution == "full" and not recipe.kl.endswith("k3"):
        changes["loss_distribution"] = "sampler"  # k3 is biased with it
    return changes


def room_for_text(recipe: Recipe, spreads: dict[str, Spread]) -> Changes:
    """Limits that do not count the prompt, where prompts leave hardly a token to learn."""
    tokens = spreads.get("completion_tokens")
    short = recipe.length_limit == "total" and tokens is not None and tokens.mean < FEWEST_TOKENS
    return {"length_limit": "completion"} if short else {}


def kl_is_limited(recipe: Recipe) -> bool:
    """Whether the recipe has a KL term with a target."""
    return recipe.kl != "none" and recipe.kl_coef > 0 and recipe.kl_target > 0


def smaller_steps(recipe: Recipe, steps: int, divisor: float = 3) -> Changes:
    """At most the rate over the divisor; clipping and a warm-up of up to a fifth of the run where there is none."""
    changes: Changes = {"lr": rounded(min(recipe.lr / divisor, LARGEST_LR))}
    if recipe.max_grad_norm == 0:
        changes["max_grad_norm"] = 1.0
    if recipe.warmup_steps < (warmup := min(10, steps // 5)):
        changes["warmup_steps"] = warmup
    return changes


def rounded(value: float, digits: int = 1) -> float:
    """To so many significant digits. A suggestion claims no more than one; but a KL coefficient of 0.14 that became 0.1
    let the notebook's run fall apart."""
    return float(f"{value:.{digits - 1}e}")


def root_causes(found: Sequence[Finding]) -> list[Finding]:
    """The findings to act on, the causes first, then what came first; later ones follow from it."""
    causes = [finding for finding in found if finding.kind in CAUSES]
    others = [finding for finding in found if finding.kind not in CAUSES]
    return causes + [finding for finding in others if finding.onset == others[0].onset]
