"""An example of a reward of your own: `dvc exp run -S reward=questions`.

It is called with all completions of a batch at once, and a prompt for each. `mark` comes from its table in params.yaml:
`-S rewards.questions.params.mark=!` changes it. Other files of this folder can be imported: `from custom import
another`, or `import another`.
"""


def questions(prompts: list[str], completions: list[str], mark: str = "?") -> list[float]:
    """1 for a completion that has the mark, 0 for one that does not."""
    return [float(mark in completion) for completion in completions]
