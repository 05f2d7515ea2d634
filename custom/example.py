"""An example of a reward of your own: `dvc exp run -S reward=questions`."""


def questions(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for a completion that asks something, 0 for one that does not."""
    return [float("?" in completion) for completion in completions]
