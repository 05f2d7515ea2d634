"""Stage `check`: the whole of params.yaml is valid. The other stages read only what they depend on, so that a key that
none of them knows (`-S +rewrad=length`) would change nothing and go unnoticed."""

from pipeline.errors import run_stage
from pipeline.params import SELECTORS, load


def main() -> None:
    params = load()
    print(", ".join(f"{name} {getattr(params, name)}" for name in SELECTORS), f"seed {params.seed}", sep=", ")


if __name__ == "__main__":
    run_stage(main)
