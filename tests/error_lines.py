"""What a user's mistake says."""


def check_line(line: str) -> str:
    """One line in the user's terms: no line break, no control character, none of the validator's words."""
    assert line.isprintable(), line
    for word in (
        "pydantic",
        "Traceback",
        "ValidationError",
        "model_",
        "Input ",
        "discriminator",
        "tuple",
        "regex",
        "^[",
    ):
        assert word not in line, line
    assert len(line) <= 1000
    return line
