"""The same seed on the same machine gives the same bytes, in whatever place, locale, hash seed and order of files."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages import evaluate, train
from tests.faults import rounds
from tests.project import Project, copy_of_project
from tests.small import OUTPUTS, run

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

# What another terminal, account or machine of the same kind has otherwise. The first holds what docs/ENVIRONMENT.md
# says is neutralised or without effect on results.
SURROUNDINGS = [
    dict(setting.split("=", 1) for setting in text.split())
    for text in (
        """
        PYTHONHASHSEED=1 TZ=Pacific/Kiritimati LC_ALL=C LANG=C COLUMNS=40 NO_COLOR=1 PYTHONOPTIMIZE=1
        MPLBACKEND=module://matplotlib_inline.backend_inline MATPLOTLIBRC=/nonexistent/matplotlibrc
        MPLCONFIGDIR=/proc/nowhere MLFLOW_ENABLE_ASYNC_LOGGING=true MLFLOW_LOGGING_LEVEL=nonsense
        MLFLOW_RUN_ID=00000000000000000000000000000000
        MLFLOW_TRUNCATE_LONG_VALUES=false MLFLOW_DISABLE_TELEMETRY=false http_proxy=http://127.0.0.1:9
        OMP_NUM_THREADS=3 MKL_NUM_THREADS=5 OMP_SCHEDULE=dynamic TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
        PYTORCH_ENABLE_MPS_FALLBACK=1 CUBLAS_WORKSPACE_CONFIG=:16:8 TRANSFORMERS_VERBOSITY=debug TRANSFORMERS_OFFLINE=1
        HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=0 TOKENIZERS_PARALLELISM=true LOCAL_RANK=3 WORLD_SIZE=1 RANK=0
        ACCELERATE_MIXED_PRECISION=fp16 GIT_DIR=/nonexistent GIT_PAGER=false GIT_EXTERNAL_DIFF=false
        """,
        "PYTHONHASHSEED=4294967295 LC_ALL=tr_TR.UTF-8 PYTHONUTF8=1 USER=somebody HOME=/nonexistent",
        "PYTHONIOENCODING=latin-1 OMP_NUM_THREADS=7 MKL_NUM_THREADS=7 TOKENIZERS_PARALLELISM=true",
        "PYTHONOPTIMIZE=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 MPLBACKEND=pdf TZ=UTC",
    )
]

NUMBERS = ("completions.jsonl", "metrics.json")


def elsewhere(original: Project, base: Path) -> Project:
    """The project's files in another place, written in another order and at another time."""
    made = copy_of_project(base)
    files = [path for path in original.root.rglob("*") if path.is_file()]
    random.Random(1).shuffle(files)
    shutil.rmtree(made.root)
    for path in files:
        target = made.root / path.relative_to(original.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        os.utime(target, (1, 1))
    return made


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(rounds(len(SURROUNDINGS), 1)))
def test_every_stage_gives_the_same_bytes_anywhere(small: Project, small_run: Any, tmp_path: Path, number: int) -> None:
    first, _ = small_run
    assert {"data/policy/model.safetensors", "reports/train/history.csv", "reports/page/report.html"} <= first.keys()
    other = elsewhere(small, tmp_path / f"place {number} ünï 'quoted'")
    for folder in OUTPUTS:
        shutil.rmtree(other.root / folder)
    shutil.rmtree(other.root / ".checkpoints")
    (other.root / "mlflow.db").unlink()
    (tmp_path / "tmp").mkdir()
    old = os.umask([0o077, 0o000, 0o027, 0o022][number])
    try:
        again = run(other, **SURROUNDINGS[number], TMPDIR=str(tmp_path / "tmp"))
    finally:
        os.umask(old)
    assert again.keys() == first.keys()
    assert [name for name in first if again[name] != first[name]] == []
    assert not [name for name in again if str(tmp_path).encode() in again[name]], "a path of the machine"


def test_another_seed_evaluates_with_other_numbers(here: Project) -> None:
    """Of one policy; tests/test_train.py trains with another seed."""
    here.edit(evaluate__prompts=2)
    train.main()
    found = []
    for seed in (0, 1):
        here.edit(seed=seed)
        evaluate.main()
        found.append([(here.root / f"reports/evaluate/{name}").read_bytes() for name in NUMBERS])
    assert all(first != other for first, other in zip(*found, strict=True))
