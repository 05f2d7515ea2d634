"""The filter against the notebook's own expression, every bad input, and OASST1 through the real `datasets` code."""

import csv
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.config.schema import PromptSet
from pipeline.errors import UserError
from pipeline.stages import prepare
from tests import repositories
from tests.error_lines import check_line
from tests.faults import fault, rounds
from tests.hub import Hub
from tests.project import PINNED, ROOT, Project

OASST1 = "OpenAssistant/oasst1"
FIRST_FIVE = [  # printed by the notebook
    "Now explain it to a dog",
    "Is SEO relevant in 2023?",
    "Don't care, didn't ask!",
    "I'm sorry",
    "No I just wanted to thank you.",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "lang", "x", ""]), inner),
    max_leaves=6,
)
NOTEBOOK = {"language": "en", "min_characters": 1, "max_characters": 31, "first_character": "upper"}
RULES = PromptSet(source="data/local/set", **NOTEBOOK)


def notebook_keeps(row: dict[str, Any]) -> bool:
    """The notebook's condition, word for word."""

    def is_capitalized(s: str) -> bool:
        return s[:1].isupper() and s[1:] == s[1:].lower()

    return 0 < len(row["text"]) < 32 and row["lang"] == "en" and is_capitalized(row["text"][0])


def outputs(root: Path) -> dict[str, bytes]:
    """What the stage wrote, remains of unfinished files included."""
    folders = (root / "data/prompts", root / "reports")
    return {str(path.relative_to(root)): path.read_bytes() for folder in folders for path in folder.rglob("*")}


def prompts(root: Path, split: str = "train") -> list[str]:
    lines = (root / f"data/prompts/{split}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["prompt"] for line in lines]


def remove_outputs(root: Path) -> None:
    for folder in ("data/prompts", "reports"):
        shutil.rmtree(root / folder, ignore_errors=True)


def counts(root: Path) -> Any:
    return json.loads((root / "reports/prepare.json").read_text())


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_train(root: Path, *rows: Any) -> None:
    write_jsonl(root / "data/local/set/train.jsonl", list(rows))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to call the stage in: data/local/set is selected, its train file is for the test to write."""
    yaml = YAML()
    tree = yaml.load(ROOT / "params.yaml")
    tree["prompts"] = "mine"
    tree["prompt_sets"]["mine"] = {"source": "data/local/set", **NOTEBOOK}
    yaml.dump(tree, tmp_path / "params.yaml")
    (tmp_path / "data/local/set").mkdir(parents=True)
    write_jsonl(tmp_path / "data/local/set/validation.jsonl", [{"text": "Held out", "lang": "en"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(root: Path, **settings: Any) -> None:
    yaml = YAML()
    tree = yaml.load(root / "params.yaml")
    tree["prompt_sets"]["mine"].update(settings)
    yaml.dump(tree, root / "params.yaml")


# --- the filter --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lang", "reason"),
    [
        ("A", "en", None),
        ("A" * 31, "en", None),
        ("Ö" * 31, "en", None),  # characters, not bytes
        ("Éa", "en", None),
        ("A" * 32, "en", "too_long"),
        ("", "en", "too_short"),
        ("a", "en", "first_character"),
        ("1st", "en", "first_character"),
        (" A", "en", "first_character"),
        ("ßa", "en", "first_character"),
        ("Hola", "es", "language"),
        ("", "es", "language"),  # the first rule that a row breaks is the one that is counted
        ("a" * 99, "en", "too_long"),
    ],
)
def test_each_rule_drops_what_it_should(text: str, lang: str, reason: str | None) -> None:
    kept, found = prepare.select([("row 1", {"text": text, "lang": lang})], RULES)
    assert [row["prompt"] for row in kept] == ([] if reason else [text])
    assert {name: count for name, count in found["dropped"].items() if count} == ({reason: 1} if reason else {})


@settings(deadline=None)
@given(st.lists(st.fixed_dictionaries({"text": st.text(max_size=40), "lang": st.sampled_from(["en", "de"])})))
def test_keeps_what_the_notebook_keeps_in_its_order(rows: list[dict[str, Any]]) -> None:
    kept, found = prepare.select([(f"row {number}", row) for number, row in enumerate(rows)], RULES)
    assert [row["prompt"] for row in kept] == [row["text"] for row in rows if notebook_keeps(row)]
    assert found["read"] == len(rows) == found["kept"] + sum(found["dropped"].values())
    assert found["duplicates"] == found["kept"] - found["distinct"]


def test_pocket_set_as_the_notebook_would_filter_it(place: Path) -> None:
    shutil.copytree(ROOT / "data/pocket/prompts", place / "data/pocket/prompts")
    change(place, source="data/pocket/prompts")
    prepare.main()
    rows = {
        split: [json.loads(line) for line in (ROOT / f"data/pocket/prompts/{split}.jsonl").read_bytes().splitlines()]
        for split in ("train", "validation")
    }
    train = [row["text"] for row in rows["train"] if notebook_keeps(row)]
    heldout = [row["text"] for row in rows["validation"] if notebook_keeps(row)]
    assert prompts(place) == train
    assert len(train) >= 300
    assert prompts(place, "heldout") == [text for text in heldout if text not in train]
    assert len(prompts(place, "heldout")) >= 200
    assert counts(place)["heldout"]["dropped"]["leaked"] == sum(text in train for text in heldout) > 0
    assert counts(place)["train"]["duplicates"] == len(train) - len(set(train)) > 0
    dropped = counts(place)["train"]["dropped"]
    assert all(dropped[reason] for reason in ("language", "too_short", "too_long", "first_character"))


def test_the_settings_of_a_set_change_its_filter() -> None:
    rows = [("row", {"text": text, "lang": lang}) for text, lang in (
        ("Twice", "en"), ("Once", "en"), ("Twice", "en"), ("Twice", "en"), ("hallo", "de"), ("ja", "de"))]  # fmt: skip
    kept, found = prepare.select(rows, RULES)
    assert [row["prompt"] for row in kept] == ["Twice", "Once", "Twice", "Twice"]
    assert (found["read"], found["kept"], found["distinct"], found["duplicates"]) == (6, 4, 2, 2)
    kept, found = prepare.select(rows, RULES.model_copy(update={"deduplicate": True}))
    assert [row["prompt"] for row in kept] == ["Twice", "Once"]
    assert found["duplicates"] == found["dropped"]["duplicate"] == 2
    german = {"language": "de", "first_character": "any", "min_characters": 3}
    assert [row["prompt"] for row in prepare.select(rows, RULES.model_copy(update=german))[0]] == ["hallo"]


# --- local files -------------------------------------------------------------------------------------------------


def test_a_csv_file_of_texts_is_taken_whole_and_drops_are_said_aloud(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a spreadsheet writes it: a BOM, quoted commas and line breaks, CRLF. No rule of the notebook's applies
    unasked."""
    folder = place / "data/local/set"
    texts = ["lower case, with a comma", 'two\nlines and "quotes"', "x" * 500, "Ü"]
    for name, rows in (("train", texts), ("validation", ["held out", "Ü"])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file).writerows([["id", "text"], *([n, text] for n, text in enumerate(rows))])
    (folder / "validation.jsonl").unlink()
    yaml = YAML()
    tree = yaml.load(place / "params.yaml")
    tree["prompt_sets"]["mine"] = {"source": "data/local/set"}
    yaml.dump(tree, place / "params.yaml")
    prepare.main()
    lines = (place / "data/prompts/train.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == texts
    assert capsys.readouterr().out.splitlines() == [
        "4 prompts to train on, of 4 rows",
        "1 prompts held out, of 2 rows (dropped: leaked 1)",
    ]
    for content, message in (
        (b"text,x\na,b,c\n", "train.csv line 2: has 3 cells, the header 2; quote what holds a comma"),
        (b"words\na\n", "train.csv: column 'text' is missing (there are: words)"),
        (b"text,text\na,b\n", "there are 2 columns 'text'; keep one"),
        (b"text\n\xff\n", "not a CSV file in UTF-8"),
        (b'text\n"a\n', "not a CSV file in UTF-8"),
    ):
        (folder / "train.csv").write_bytes(content)
        with pytest.raises(UserError, match=re.escape(message)):
            prepare.main()


def test_jsonl_gzip_and_parquet_give_the_same_bytes(place: Path) -> None:
    rows = [
        {"message_id": "1", "text": "Line\u2028separator", "lang": "en"},
        {"message_id": None, "text": "Ünïcode \U0001f40d", "lang": "en"},
        {"message_id": "3", "text": "No", "lang": "de"},
    ]
    folder, found = place / "data/local/set", []
    for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
        for path in folder.glob("train*"):
            path.unlink()
        raw = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # a BOM, blank lines
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
        else:
            (folder / f"train{suffix}").write_bytes(gzip.compress(raw.encode()) if "gz" in suffix else raw.encode())
        prepare.main()
        found.append(outputs(place))
    assert found[0] == found[1] == found[2]
    assert found[0]["data/prompts/train.jsonl"].decode().split("\n") == [
        '{"prompt": "Line\u2028separator", "message_id": "1"}',
        '{"prompt": "Ünïcode \U0001f40d", "message_id": null}',
        "",
    ]


def refused() -> str:
    """The line with which the stage refuses what it was given."""
    with pytest.raises(UserError) as error:
        prepare.main()
    return check_line(str(error.value))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "Hi", "lang": "en"', "train.jsonl line 2: malformed JSON at column 28"),
        (b"not json", "train.jsonl line 2: malformed JSON at column 1"),
        (b"[" * 100_000, "train.jsonl line 2: malformed JSON"),
        (b"9" * 5000, "train.jsonl line 2: malformed JSON"),
        (b'["Hi", "en"]', "train.jsonl line 2: a row should be an object with text and lang, not a list"),
        (b'"Hi"', "train.jsonl line 2: a row should be an object with text and lang, not a string"),
        (b'{"lang": "en"}', "train.jsonl line 2: column 'text' is missing (there are: lang)"),
        (b'{"text": "Hi", "language": "en"}', "train.jsonl line 2: column 'lang' is missing"),
        (b"{}", "train.jsonl line 2: column 'text' is missing (there are: none)"),
        (
            b'{"text": 7, "lang": "en"}',
            "train.jsonl line 2: text should be a string or a list of messages, not the number 7",
        ),
        (
            b'{"text": null, "lang": "en"}',
            "train.jsonl line 2: text should be a string or a list of messages, not null",
        ),
        (b'{"text": "Hi", "lang": ["en"]}', "train.jsonl line 2: lang should be a string, not a list"),
        (b'{"text": "Hi \\ud83d", "lang": "en"}', "train.jsonl line 2: text holds half of a surrogate pair"),
        (b'{"text": "Hi \xff", "lang": "en"}', "train.jsonl line 2: not UTF-8 at byte 14"),
        (b'{"text": "Hi \xed\xa0\xbd", "lang": "en"}', "train.jsonl line 2: not UTF-8 at byte 14"),
        (b'{"text": "Hi", "text": "Ho", "lang": "en"}', "train.jsonl line 2: malformed JSON: 'text' stands twice"),
        (b'{"text": "Hi", "lang": "en", "message_id": 5}', "train.jsonl line 2: message_id should be a string"),
        (b'{"text": NaN, "lang": "en"}', "train.jsonl line 2: text should be a string, a number, a list or an object"),
        (b'{"text": "Hi\0", "lang": "en"}', "train.jsonl line 2: malformed JSON at column 13"),
        (b'{"text": "Hi", "lang": "en"}{}', "train.jsonl line 2: malformed JSON at column 29"),
        (b'{"text": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "train.jsonl line 2: malformed JSON"),
        (b'{"' + b"a" * 3_000_000 + b'": 1}', "train.jsonl line 2: column 'text' is missing (there are: aaaa"),
        (b'{"\\u001b[31m\\u202e": 1}', "train.jsonl line 2: column 'text' is missing (there are: \\x1b[31m\\u202e)"),
        (
            b'{"text": ' + b"9" * 4000 + b', "lang": "en"}',
            "train.jsonl line 2: text should be a string or a list of messages, not the number 99",
        ),
        ('{"text": "Hi", "lang": "en"}'.encode("utf-16"), "train.jsonl line 2: not UTF-8 at byte 1"),
    ],
    ids=lambda value: str(value[:30]),
)
def test_a_bad_line_is_named(place: Path, line: bytes, message: str) -> None:
    (place / "data/local/set/train.jsonl").write_bytes(b'{"text": "Good", "lang": "en"}\n' + line + b"\n")
    with fault("malformed row of a message file"):
        assert message in refused()
        assert not outputs(place)


@pytest.mark.faults
@settings(max_examples=rounds(1000, 40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=JSON | st.fixed_dictionaries({"text": JSON, "lang": JSON, "message_id": JSON}))
def test_any_row_is_a_message_or_refused(place: Path, row: Any) -> None:
    """Against the schema, said a second time: two strings that UTF-8 can hold, a message_id that is one or null."""

    def text(value: Any) -> bool:
        return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)

    right = isinstance(row, dict) and text(row.get("text")) and text(row.get("lang"))
    right = right and (row.get("message_id") is None or text(row["message_id"]))
    write_train(place, {"text": "Good", "lang": "en"}, row)
    remove_outputs(place)
    with fault("row of random types and text"):
        if right:
            prepare.main()
            assert counts(place)["train"]["read"] == 2
        else:
            assert "train.jsonl line 2: " in refused()
            assert not outputs(place)


TEXTS = [f"Message number {number}" for number in range(40)]


def write_texts(path: Path) -> None:
    """TEXTS in a file of the kind that its name says; nothing but its checksums would notice a changed letter."""
    if path.suffix == ".parquet":
        table = pyarrow.table({"text": TEXTS, "lang": ["en"] * len(TEXTS)})
        pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    else:
        raw = "".join(json.dumps({"text": text, "lang": "en", "message_id": None}) + "\n" for text in TEXTS).encode()
        path.write_bytes(gzip.compress(raw, mtime=0) if path.suffix == ".gz" else raw)


@pytest.mark.faults
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_damaged_file_is_refused_or_does_no_harm(place: Path, suffix: str) -> None:
    """Bytes flipped, cut off, cut out or doubled. Gzip and Parquet have checksums, so that what is taken is what was
    written; of plain lines, the ones that are valid JSON count as they are."""
    path = place / f"data/local/set/train{suffix}"
    write_texts(path)
    whole, draw = path.read_bytes(), random.Random(0)
    for number in range(rounds(400, 25)):
        damaged, at = bytearray(whole), draw.randrange(len(whole))
        match draw.choice(["flip", "flip", "flip", "cut off", "cut out", "double"]) if number else "other letter":
            case "other letter":
                damaged = bytearray(whole.replace(b"Message number 20", b"Massage number 20"))
            case "flip":
                damaged[at] ^= draw.randrange(1, 256)
            case "cut off":
                del damaged[at:]
            case "cut out":
                del damaged[at : at + draw.randrange(1, 50)]
            case "double":
                damaged[at:at] = damaged[at : at + draw.randrange(1, 50)]
        path.write_bytes(damaged)
        remove_outputs(place)
        with fault(f"damaged message file ({suffix[1:]})"):
            line = None
            try:
                prepare.main()
            except UserError as error:
                line = check_line(str(error))
            if line:
                assert str(path.relative_to(place)) in line
                assert not outputs(place)
            elif suffix != ".jsonl":
                assert prompts(place) == TEXTS
            else:
                rows = [json.loads(line) for line in damaged.split(b"\n") if line.strip()]
                assert prompts(place) == [row["text"] for row in rows if notebook_keeps(row)]


def parquet(**columns: Any) -> Callable[[Path], None]:
    """Writes a table in the place of train.jsonl."""

    def write(folder: Path) -> None:
        (folder / "train.jsonl").unlink()
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "train.parquet")

    return write


def column_twice(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    table = pyarrow.Table.from_arrays([pyarrow.array(["en"])] * 3, ["text", "text", "lang"])
    pyarrow.parquet.write_table(table, folder / "train.parquet")


# texts that Python cannot read
NO_UTF8 = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
YEAR_1000000 = pyarrow.array([2**45], pyarrow.timestamp("s"))
ENDLESS_TIME = pyarrow.array([2**62], pyarrow.duration("s"))
TWO_FIELDS_OF_A_NAME = pyarrow.StructArray.from_arrays([pyarrow.array([1])] * 2, ["a", "a"])


def link_to_itself(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to("train.jsonl")


def pipe(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    os.mkfifo(folder / "train.jsonl")


def cut_gzip(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Hi", "lang": "en"}\n' * 1000)[:-20])


@pytest.mark.faults
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "prompt_sets.mine.source = 'data/local/set': no such directory"),
        (pipe, "should hold one of train.jsonl, train.jsonl.gz, train.csv, train.parquet; it holds none"),
        (link_to_itself, "should hold one of train.jsonl, train.jsonl.gz, train.csv, train.parquet; it holds none"),
        (lambda folder: (folder / "validation.jsonl").unlink(),
         "should hold one of validation.jsonl, validation.jsonl.gz, validation.csv, validation.parquet"),
        (lambda folder: (folder / "train.parquet").touch(),
         "should hold one of train.jsonl, train.jsonl.gz, train.csv, train.parquet; it holds 2"),
        (cut_gzip, "set/train.jsonl.gz: not a whole gzip file"),
        (lambda folder: (folder / "train.jsonl").rename(folder / "train.jsonl.gz"), "not a whole gzip file"),
        (lambda folder: (folder / "train.jsonl").rename(folder / "train.parquet"), "not a readable Parquet file"),
        (lambda folder: write_jsonl(
            folder / "train.jsonl", [{"text": "hi", "lang": "en"}, {"text": "Hi", "lang": "de"}]),
         "set/train.jsonl: none of its 2 rows is left as a prompt (dropped: language 1, first_character 1)"),
        (lambda folder: (folder / "train.jsonl").write_text(""),
         "set/train.jsonl: none of its 0 rows is left as a prompt; it should hold rows"),
        (lambda folder: shutil.copy(folder / "train.jsonl", folder / "validation.jsonl"),
         "set/validation.jsonl: none of its 1 rows is left as a prompt (dropped: leaked 1)"),
        (parquet(lang=["en"]), "train.parquet: column 'text' is missing (there are: lang)"),
        (parquet(text=["Hi", None], lang=["en", "en"]), "train.parquet row 2: text should be a string or a list"),
        (parquet(text=[1], lang=["en"]), "train.parquet row 1: text should be a string or a list"),
        (parquet(text=[b"Hi"], lang=["en"]), "train.parquet row 1: text should be a string, a number, a list"),
        (parquet(text=[], lang=[]), "train.parquet: none of its 0 rows is left as a prompt"),
        (parquet(text=NO_UTF8, lang=["en"]), "train.parquet row 1: text cannot be read: 'utf-8' codec"),
        (parquet(text=YEAR_1000000, lang=["en"]), "train.parquet row 1: text cannot be read: date value"),
        (parquet(text=ENDLESS_TIME, lang=["en"]), "train.parquet row 1: text cannot be read: Python int"),
        (parquet(text=TWO_FIELDS_OF_A_NAME, lang=["en"]), "train.parquet row 1: text cannot be read: "),
        (column_twice, "train.parquet: there are 2 columns 'text'; keep one"),
    ],
)  # fmt: skip
def test_bad_folders_leave_earlier_outputs_alone(place: Path, spoil: Callable[[Path], None], message: str) -> None:
    folder = place / "data/local/set"
    write_train(place, {"text": "Good", "lang": "en"})
    prepare.main()
    before = outputs(place)
    with fault("bad folder of messages"):
        spoil(folder)
        assert message in refused()
        assert outputs(place) == before


@pytest.mark.faults
@pytest.mark.parametrize(("source", "message"), [
    *((source, "should lie in data/pocket/prompts/ or data/pocket-math/prompts/ or data/local/")
      for source in ("data/other", "data/local/../other", ".", "/tmp", "data/local/link")),
    *((source, "no such directory")
      for source in ("data/local/a\0b", "data/local/" + "a" * 300, "data/local/" + "a/" * 4000, "data/local/loop")),
], ids=lambda text: text[:30])  # fmt: skip
def test_a_folder_that_is_not_of_the_project_is_refused(place: Path, source: str, message: str) -> None:
    """Where DVC would notice no edit, or where no file system has one."""
    (place / "data/other").mkdir()
    (place / "data/local/link").symlink_to(place / "data/other")
    (place / "data/local/loop").symlink_to("loop")
    change(place, source=source)
    with fault("folder outside the project"):
        assert message in refused()


# --- as a user runs it -------------------------------------------------------------------------------------------


def imported(project: Project) -> set[str]:
    """The packages that the stage has imported when it is done."""
    code = "import sys; from pipeline.stages import prepare; prepare.main(); print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=project.environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


def test_an_error_is_one_line_and_two_runs_are_alike(project: Project) -> None:
    first = project.run("prepare")
    assert (first.returncode, first.stderr) == (0, "")
    before = outputs(project.root)
    assert sorted(before) == ["data/prompts/heldout.jsonl", "data/prompts/train.jsonl", "reports/prepare.json"]
    heavy = {"torch", "datasets", "transformers", "huggingface_hub", "pyarrow", "pandas", "mlflow"}
    assert not imported(project) & heavy  # it runs the stage again
    assert outputs(project.root) == before
    (project.root / "data/pocket/prompts/validation.jsonl").write_text("{\n")
    line = project.refuse("prepare")
    assert line.startswith("error: data/pocket/prompts/validation.jsonl line 1: malformed JSON at column")
    assert outputs(project.root) == before


@pytest.mark.shared
def test_real_oasst1_gives_the_notebooks_prompts(real_texts: dict[str, list[str]]) -> None:
    rows = [(f"row {number}", {"text": text, "lang": "en"}) for number, text in enumerate(real_texts["train"])]
    kept, found = prepare.select(rows, RULES)
    assert (found["kept"], found["distinct"], found["duplicates"]) == (2054, 1814, 240)
    assert [row["prompt"] for row in kept[:5]] == FIRST_FIVE


@pytest.mark.slow
def test_oasst1_through_the_hub_then_offline(project: Project, hub: Hub, oasst1: Path) -> None:
    hub.add("datasets", OASST1, PINNED, oasst1)
    project.use(hub)
    project.edit(prompts="oasst1")
    result = project.run("prepare")
    assert result.returncode == 0, result.stderr
    texts = repositories.english(oasst1)
    expected = [text for text in texts["train"] if notebook_keeps({"text": text, "lang": "en"})]
    assert prompts(project.root) == expected
    if len(texts["train"]) == 39283:  # the real texts
        assert len(expected) == 2054
        assert expected[:5] == FIRST_FIVE
    dropped = counts(project.root)["train"]["dropped"]
    assert dropped["language"] == counts(project.root)["train"]["read"] - len(texts["train"]) > 0

    before = outputs(project.root)
    hub.requests.clear()
    assert project.run("prepare", HF_HUB_OFFLINE="1").returncode == 0
    assert outputs(project.root) == before
    assert not hub.requests

    # `datasets` itself would take the revision that it has for the one that was asked for.
    project.edit(prompt_sets__oasst1__revision="a" * 40)
    assert "not in the local cache, and HF_HUB_OFFLINE" in project.refuse("prepare", HF_HUB_OFFLINE="1")
    assert "no such revision" in project.refuse("prepare")
    assert outputs(project.root) == before

    project.edit(prompt_sets__oasst1__revision=PINNED)
    assert not imported(project) & {"torch", "transformers", "mlflow"}


@pytest.mark.slow
def test_mistakes_with_a_hub_dataset_are_one_line(project: Project, hub: Hub, tmp_path: Path) -> None:
    for name, content, splits in (
        ("train-only", {"text": "Hi", "lang": "en"}, ("train",)), ("wrong", {"prompt": "Hi"}, ("train", "validation")),
    ):  # fmt: skip
        (tmp_path / name / "data").mkdir(parents=True)
        for split in splits:
            write_jsonl(tmp_path / f"{name}/data/{split}.jsonl", [content])
        hub.add("datasets", f"some/{name}", PINNED, tmp_path / name)
    project.use(hub)
    project.edit(prompts="oasst1")
    for repo, revision, message in [
        (OASST1, "main", "prompt_sets.oasst1.revision = 'main': pin a full commit"),
        ("some/nothing", PINNED, f"some/nothing@{PINNED} cannot be read: DatasetNotFoundError: Dataset 'some/nothing'"),
        ("some/train-only", PINNED, "has no validation split (there are: train)"),
        ("some/wrong", PINNED, "column 'text' is missing (there are: "),
        ("data/pocket", PINNED, "is a path here: name a directory with source, not repo"),
    ]:
        project.edit(prompt_sets__oasst1__repo=repo, prompt_sets__oasst1__revision=revision)
        assert message in project.refuse("prepare")
        assert not outputs(project.root)


CONFIGURATIONS = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: socratic
  data_files:
  - {split: train, path: socratic/train-*}
---
"""


def layouts(folder: Path) -> dict[str, tuple[Path, dict[str, Any], dict[str, Any]]]:
    """By repository: its files in its own layout, the keys of a prompt set, and the first row that should come of
    it."""
    question, answer = "Natalia sold 48 clips. How many are 2?", "She sold 48/2.\n#### 24"
    review = {"text": "A fine film.", "label": 1}
    said = [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "La"}]
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k/main/train": [{"question": question, "answer": answer}],
        "gsm8k/main/test": [{"question": "2 + 2?", "answer": "#### 4"}],
        "gsm8k/socratic/train": [{"question": "Why?", "answer": "#### 0"}],
        "imdb/plain_text/train": [review], "imdb/plain_text/test": [{"text": "No.", "label": 0}],
        "imdb/plain_text/unsupervised": [{"text": "Unsure.", "label": -1}],
        "preferences/data/train_prefs": [{"chosen": said, "rejected": said, "score_chosen": 8.5}],
        "preferences/data/test_prefs": [
            {"chosen": [{"role": "user", "content": "Hum"}], "rejected": said, "score_chosen": 1.0}
        ],
    }  # fmt: skip
    for name, content in rows.items():
        path = folder / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    (folder / "gsm8k/README.md").write_text(CONFIGURATIONS)
    template = "Question: {question}\nAnswer:"
    return {
        "openai/gsm8k": (
            folder / "gsm8k",
            {"config": "main", "heldout_split": "test", "prompt_template": template, "columns": ["answer"]},
            {"prompt": f"Question: {question}\nAnswer:", "message_id": None, "columns": {"answer": answer}},
        ),
        "stanfordnlp/imdb": (
            folder / "imdb", {"heldout_split": "test", "columns": ["label"]},
            {"prompt": "A fine film.", "message_id": None, "columns": {"label": 1}},
        ),
        "some/preferences": (
            folder / "preferences",
            {"train_split": "train_prefs", "heldout_split": "test_prefs", "prompt_column": "chosen"},
            {"prompt": "Sing", "messages": said[:1], "message_id": None},
        ),
    }  # fmt: skip


@pytest.mark.slow
def test_sets_in_their_own_layouts_through_the_hub(project: Project, hub: Hub, tmp_path: Path) -> None:
    project.use(hub)
    for repo, (folder, keys, first) in layouts(tmp_path / "sets").items():
        hub.add("datasets", repo, PINNED, folder)
        project.edit(prompts="theirs", prompt_sets__theirs={"repo": repo, "revision": PINNED, **keys})
        done = project.run("prepare")
        assert done.returncode == 0, done.stderr
        lines = (project.root / "data/prompts/train.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [first]
    project.edit(prompt_sets__theirs={"repo": "openai/gsm8k", "revision": PINNED, "prompt_column": "question"})
    assert "Config name is missing" in (said := project.refuse("prepare"))
    assert "main" in said
    project.edit(prompt_sets__theirs__config="secondary")
    assert "secondary" in (said := project.refuse("prepare"))
    assert "socratic" in said


@pytest.mark.slow
@pytest.mark.exhaustive  # half a minute, since `datasets` tries again; test_cache.py has a model's
def test_an_unreachable_hub_is_one_line_and_says_what_needs_none(project: Project) -> None:
    project.edit(prompts="oasst1")
    line = project.refuse("prepare")
    assert "the hub at http://127.0.0.1:9 cannot be reached" in line
    assert "HF_ENDPOINT, or choose `prompts: pocket`" in line
    assert not outputs(project.root)
