"""An example of a reward of your own: `dvc exp run -S reward=questions`.

It is called with all completions of a batch at once, and a prompt for each. Other files of this folder can be imported:
`from custom import another`, or `import another`.
"""


def questions(prompts: list[str], completions: list[str]) -> list[float]:
    """1 for a completion that asks something, 0 for one that does not."""
    return [float("?" in completion) for completion in completions]
