"""All completions of a run (`train.keep_samples: all`) in Parquet: one file per step, and at the end one of the whole
run.

The files of the steps lie beside the resume states, which hold their digests instead of their content. No more than one
row group is in memory at once.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.file_io import atomic_path, sha256, write_json
from pipeline.paths import RUN_FILES
from pipeline.runs.checkpoints import delete_checkpoints, sample_file, step_of

ROW_GROUP_TOKENS = 2**20  # a row group has whole steps, and ends with the step that reaches this many
TEXT_AND_NUMBERS = (
    "step", "prompt_index", "group", "sample", "prompt", "completion", "terms.key_value.key", "ending",
    "tokens.list.element", "pieces.list.element",
)  # fmt: skip
FLOATS = ("reward", "terms.key_value.value", "advantage", "ref_log_ratio", "token_logprobs.list.element")
# A checksum of each page, so that a reader notices damage. Floats hardly repeat, so a dictionary of them is larger than
# the floats. Their signs and exponents do repeat, and compress once they stand together.
FORMAT: dict[str, Any] = {
    "compression": "zstd",
    "write_page_checksum": True,
    "use_dictionary": list(TEXT_AND_NUMBERS),
    "column_encoding": dict.fromkeys(FLOATS, "BYTE_STREAM_SPLIT"),
}


def check_pyarrow() -> None:
    """Raises UserError where pyarrow is missing: a machine that only trains needs it for this alone."""
    _pyarrow()


def write_step(folder: Path, step: int, columns: dict[str, list[Any]]) -> str:
    """Write the file of a step; returns its sha256. columns: as in `schema`."""
    arrow, parquet = _pyarrow()
    buffer = io.BytesIO()
    parquet.write_table(arrow.table(columns, schema()), buffer, **FORMAT)
    with atomic_path(sample_file(folder, step)) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def first_damaged(folder: Path, digests: list[str]) -> int | None:
    """The first step whose file is gone or has another digest."""
    paths = [(step, sample_file(folder, step)) for step in range(len(digests))]
    return next((step for step, path in paths if not path.exists() or sha256(path) != digests[step]), None)


def write_kept(target: Path, folder: Path, digests: list[str], completions: int) -> None:
    """Write into the folder `target` the completions of all steps and a note of them; without files only a note.

    digests: of the files of the steps in `folder`; completions: how many were sampled. If a file is damaged, deletes
    the states after its step, so that training makes it again, and raises UserError.
    """
    told: dict[str, Any] = {"keep_samples": "all" if digests else "some", "completions": completions}
    if digests:
        path = target / RUN_FILES.all_samples.name
        _merge(path, folder, digests)
        told["sha256"] = sha256(path)
    write_json(target / RUN_FILES.kept.name, told)


def _merge(target: Path, folder: Path, digests: list[str]) -> None:
    arrow, parquet = _pyarrow()
    with target.open("wb") as file, parquet.ParquetWriter(file, schema(), **FORMAT) as writer:
        steps, tokens = [], 0
        for step, digest in enumerate(digests):
            content = _intact(folder, sample_file(folder, step), digest)
            steps.append(parquet.read_table(io.BytesIO(content)))
            tokens += len(arrow.compute.list_flatten(steps[-1]["tokens"]))
            if tokens >= ROW_GROUP_TOKENS or step == len(digests) - 1:
                table = arrow.concat_tables(steps)
                writer.write_table(table, row_group_size=len(table))
                steps, tokens = [], 0


def _intact(folder: Path, path: Path, digest: str) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        left = delete_checkpoints(folder, step_of(path) + 1)
        raise UserError(f"{path}, completions of the run, is damaged; the same command trains again from step {left}")
    return content


def schema() -> Any:
    """The columns of all.parquet; docs/EXPERIMENTS.md says what they mean."""
    arrow, _ = _pyarrow()
    text = arrow.string()
    return arrow.schema([
        ("step", arrow.int32()), ("prompt_index", arrow.int32()), ("group", arrow.int32()), ("sample", arrow.int32()),
        ("prompt", text), ("completion", text), ("reward", arrow.float64()),
        ("terms", arrow.map_(text, arrow.float64())), ("advantage", arrow.float64()),
        ("ending", text), ("ref_log_ratio", arrow.float32()), ("tokens", arrow.list_(arrow.int32())),
        ("pieces", arrow.list_(text)), ("token_logprobs", arrow.list_(arrow.float32())),
    ])  # fmt: skip


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "train.keep_samples: all needs pyarrow, which is not installed: `pip install pyarrow`, or set it to some"
        ) from None
    return pyarrow, pyarrow.parquet
