"""`reinforce cure`: what its page says of two made-up runs, what the command refuses, and one real cure in a clone."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands import cure
from pipeline.config.load import load_params
from pipeline.errors import UserError
from pipeline.report import cure_figure, cure_page, inputs, page, style
from pipeline.runs.dvc_queue import params_with
from tests.clones import tiny
from tests.html import Elements, words_of
from tests.project import ROOT, Project
from tests.reports import reports

KIND = {"kind": "gibberish", "title": "Gibberish", "onset": 7}
FURTHER = {"recipes.stable.kl_target": 2.0, "recipes.stable.lr": 3e-5}


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    return inputs.load(reports(tmp_path_factory.mktemp("collapsed") / "reports", collapsed=True))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    return inputs.load(reports(tmp_path_factory.mktemp("healthy") / "reports"))


def with_findings(
    run: inputs.Inputs, *findings: dict[str, Any], changes: dict[str, Any] | None = None
) -> inputs.Inputs:
    """The run with the collapsed run's findings of these kinds, or others altogether."""
    first = run.diagnosis["findings"][0]
    found = [first | {"changes": changes or {}} | finding for finding in findings]
    remedy = {"changes": changes, "command": "not this one"} if changes else None
    verdict = {"verdict": found[0]["kind"], "onset": found[0]["onset"], "findings": found, "cure": remedy}
    return run._replace(diagnosis=run.diagnosis | verdict)


def rendered(before: inputs.Inputs, after: inputs.Inputs) -> str:
    return cure_page.render(before, after, b"\x89PNG", b"\x89PNG narrow", "cure-12345678")


# --- the answer


def test_gone(collapsed: inputs.Inputs, healthy: inputs.Inputs) -> None:
    answer = cure_page.answer(collapsed, healthy)
    without = "Without it: Misaligned objective from step 1 on, One text for all from step 4 on."
    assert answer == ("The collapse is gone", f"Healthy in all 50 steps. {without}")


def test_gone_for_a_reward_that_no_held_out_prompt_confirms(collapsed: inputs.Inputs, healthy: inputs.Inputs) -> None:
    worse = healthy.rewards["embedding"] | {"difference": {"mean": -1.0, "low": -1.5, "high": -0.5}}
    answer = cure_page.answer(collapsed, healthy._replace(rewards=healthy.rewards | {"embedding": worse}))
    assert answer.title == "The collapse is gone"
    assert answer.text.endswith("But its held-out reward is below the reference model's.")


def test_not_gone_names_what_is_left_and_what_is_gone(collapsed: inputs.Inputs) -> None:
    answer = cure_page.answer(
        collapsed, with_findings(collapsed, {"kind": "mode", "title": "One text", "onset": 9}, KIND)
    )
    assert answer.title == "Not gone"
    assert answer.text.startswith(
        "With the change: One text from step 9 on, Gibberish from step 7 on. Without it: Misaligned"
    )
    assert answer.text.endswith("Gone: Misaligned objective.")


def test_another_kind(collapsed: inputs.Inputs) -> None:
    answer = cure_page.answer(collapsed, with_findings(collapsed, KIND))
    assert answer.title == "Another kind of collapse"
    assert answer.text.startswith("With the change: Gibberish from step 7 on. Without it: ")


# --- the page


def test_the_answer_comes_first_and_both_runs_stand_side_by_side(
    collapsed: inputs.Inputs, healthy: inputs.Inputs
) -> None:
    html = rendered(collapsed, healthy)
    said = words_of(html)
    assert re.search(r"</style>\s*</head>\s*<body>\s*<header>\s*<h1>The collapse is gone</h1>", html)
    for expected in (
        "without the change Not healthy Misaligned objective from step 1",
        "with the change Healthy No sign of collapse. Held-out reward, over the reference model: +1.20",
        "recipes.stable.alignment=correct for: Misaligned objective It is no gradient. Williams",
        "dvc exp run --temp --name cure-12345678 -S model=pocket ",
        "dvc exp apply cure-12345678",
        collapsed.run["train_key"],
    ):
        assert expected in said
    assert "The next thing to try" not in said


def test_a_further_cure_keeps_the_first_changes(collapsed: inputs.Inputs) -> None:
    said = words_of(rendered(collapsed, with_findings(collapsed, KIND, changes=FURTHER)))
    assert "The next thing to try" in said
    command = (
        "-S seed=3 -S ++recipes.stable.alignment=correct -S ++recipes.stable.lr=3e-05 -S ++recipes.stable.kl_target=2.0"
    )
    assert command in said
    assert "not this one" not in said


def test_only_the_changes_of_the_cure_are_shown(collapsed: inputs.Inputs) -> None:
    later = collapsed.diagnosis["findings"][1] | {"changes": {"recipes.stable.lr": 0.5, "recipes.stable.kl": "x"}}
    findings = [*collapsed.diagnosis["findings"], later]
    shown = cure_page.treated(collapsed.diagnosis | {"findings": findings})
    assert [finding["changes"] for finding in shown] == [
        {"recipes.stable.alignment": "correct"},
        {"recipes.stable.lr": 0.0001},
    ]


def test_completions_are_those_of_the_same_prompt_and_sample(collapsed: inputs.Inputs, healthy: inputs.Inputs) -> None:
    after = healthy._replace(completions=healthy.completions[:0:-1])  # in another order, without the first
    shown = cure_page.beside(collapsed, after)
    assert len(shown) == page.EXAMPLES
    names = ["reference model", "without the change", "with the change"]
    for prompt, sides in shown:
        assert [name for name, _, _ in sides] == names
        number = int(re.findall(r"\d+", prompt)[0])
        assert sides[0][2] in (f"Text {number}.", collapsed.completions[6]["checkpoint"])
        assert [text for _, _, text in sides[1:]] == ["Hi! iiii'di'd'd", "Hi! How can I help you?"]
        assert [reward for _, reward, _ in sides] == [-6.2, -11.6, -5.0]


def test_a_reference_score_that_the_change_moves_is_said(collapsed: inputs.Inputs, healthy: inputs.Inputs) -> None:
    note = "The change also alters how texts are sampled or read"
    assert note not in rendered(collapsed, healthy)
    moved = healthy.rewards["length"] | {"checkpoint": {"mean": -15.0, "low": -16.0, "high": -14.0}}
    html = rendered(collapsed, healthy._replace(rewards=healthy.rewards | {"length": moved}))
    assert note in html
    assert "with the change −15.0" in words_of(html)


def test_the_page_needs_nothing_else_and_hostile_texts_stay_texts(collapsed: inputs.Inputs) -> None:
    html = rendered(collapsed, with_findings(collapsed, KIND, changes=FURTHER))
    parsed = Elements(html)
    tags = [tag for tag, _ in parsed.found]
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "svg"} & set(tags)
    assert tags.count("img") == 1
    assert {names["href"][:6] for tag, names in parsed.found if tag == "a" and names["href"]} == {"#term-"}
    assert not [name for _, names in parsed.found for name in names if name.startswith("on")]
    assert not parsed.comments
    assert "&lt;script&gt;window.hacked = 1&lt;/script&gt;" in html
    assert "\u202e" not in html
    assert "\u2028" not in html
    assert "http" not in html.replace("http-equiv", "")
    (policy,) = [str(names["content"]) for tag, names in parsed.found if tag == "meta" and "http-equiv" in names]
    digest = base64.b64encode(hashlib.sha256(parsed.raw[0].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_the_figure_is_the_same_again_and_marks_both_onsets(collapsed: inputs.Inputs, healthy: inputs.Inputs) -> None:
    first, again = (style.png(cure_figure.overlay(collapsed, healthy)) for _ in range(2))
    assert first == again
    both = cure_figure.overlay(collapsed, with_findings(collapsed, KIND))
    for panel in both.axes[:5]:
        upright = {line.get_xdata()[0] for line in panel.lines if len(set(line.get_xdata())) == 1}  # type: ignore[index]
        assert {1, 7} <= upright


# --- the command


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An up-to-date project whose run has collapsed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cure, "dvc", lambda *arguments: "{}")
    return reports(tmp_path / "reports", collapsed=True, steps=3)


def edit(folder: Path, **values: Any) -> None:
    path = folder / "diagnosis.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_without_a_run_there_is_nothing_to_cure_yet(project: Project) -> None:
    assert project.refuse("cure") == "error: reports/diagnosis.json: no such file; run `dvc repro` first"


def test_a_healthy_run_has_nothing_to_cure(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(workspace, verdict="healthy", findings=[], headline="No sign of collapse in 3 steps.", cure=None)
    cure.main()
    said = capsys.readouterr().out
    assert said.startswith(
        "nothing to cure in this folder: No sign of collapse in 3 steps. `dvc exp apply NAME` brings"
    )
    assert not (workspace / "cure.html").exists()


def test_a_collapse_without_a_known_change_says_so(workspace: Path) -> None:
    edit(workspace, cure=None)
    with pytest.raises(UserError, match=r"misaligned: no change of params\.yaml is known to cure it"):
        cure.main()


def test_a_run_of_other_parameters_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cure, "dvc", lambda *arguments: '{"train": [{"changed deps": {}}], "diagnose": []}')
    with pytest.raises(UserError, match=r"other code, data or parameters \(train, diagnose\); run `dvc repro`"):
        cure.main()


def test_a_failing_dvc_is_one_line(workspace: Path) -> None:
    with pytest.raises(UserError, match=r"^`git for-each-ref` failed: fatal: not a git repository"):
        cure.main()
    subprocess.run(["git", "init", "-q"], check=True)
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    with pytest.raises(UserError, match="`dvc exp run` failed with exit code"):
        cure.main()
    Path("custom").mkdir()
    shutil.copy(ROOT / "custom/example.py", "custom")
    with pytest.raises(UserError, match=r"custom/example.py is not tracked by git.*`git add custom/example.py`"):
        cure.main()


def test_the_name_is_of_the_training_the_evaluation_and_the_changes(collapsed: inputs.Inputs) -> None:
    name = cure.experiment_name(collapsed)
    assert re.fullmatch("cure-[0-9a-f]{16}", name)
    assert cure.experiment_name(collapsed._replace(history=collapsed.history[:3])) == name
    others = [
        collapsed._replace(run=collapsed.run | {"train_key": "f" * 64}),
        collapsed._replace(rewards=collapsed.rewards | {"length": collapsed.rewards["words"]}),
        collapsed._replace(diagnosis=collapsed.diagnosis | {"cure": {"changes": FURTHER, "command": ""}}),
    ]
    assert len({name, *map(cure.experiment_name, others)}) == 4


def answer_of(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.endswith("Both runs side by side: reports/cure.html")]
    return line


@pytest.mark.slow
def test_a_real_cure_leaves_the_workspace_alone_and_trains_once(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tiny(tmp_path, finished)  # `dvc exp run` has left params.yaml modified

    def files() -> dict[str, bytes]:
        watched = [path for path in (clone.root / "reports").rglob("*") if path.is_file() and path.name != "cure.html"]
        watched += [clone.root / name for name in ("params.yaml", "dvc.lock", "dvc.yaml")]
        return {str(path): path.read_bytes() for path in watched}

    before, status = files(), clone("git", "status", "--porcelain")
    said = clone("python", "-m", "pipeline", "cure")
    assert clone.ran(said)[-5:] == ["train", "evaluate", "diagnose", "plot", "track"]
    # in a folder of its own, which is deleted: what it trained stays in MLflow and in `dvc exp show`
    assert len(set(clone.runs())) == len(clone.runs()) == 2
    assert re.search(r"\bcure-[0-9a-f]{16}\b", clone("dvc", "exp", "show", "--md"))
    answer = answer_of(said)
    assert "Misaligned objective from step 0 on" in answer.partition("Without it: ")[2]
    assert "Misaligned" not in answer.partition("Without it: ")[0]
    html = clone.read("reports/cure.html")
    assert f"<h1>{answer.partition(':')[0]}</h1>" in html
    assert "recipes.notebook.alignment=correct" in html
    assert (files(), clone("git", "status", "--porcelain")) == (before, status)

    clone.commit()  # the same experiment is found from another commit too
    again = clone("python", "-m", "pipeline", "cure")
    assert clone.ran(again) == []
    assert answer_of(again) == answer
    assert clone.read("reports/cure.html") == html
    (remove,) = re.findall("has been tried: `([^`]+)` makes it anew", again)
    clone("bash", "-c", remove)
    assert "/cure-" not in clone("git", "for-each-ref", "refs/exps"), "so that the same command tries it"

    told = load_params(clone.root / "params.yaml")
    clone.edit(train={"steps": 4})
    assert "run `dvc repro`" in clone("python", "-m", "pipeline", "cure", fails=True)

    # the report's command makes the run again all the same
    printed = [re.sub("<.*?>", "", each) for each in re.findall(r'class="command">(.*?)</pre>', html, re.DOTALL)]
    (original,) = [
        each for each in map(unescape, printed) if each.startswith("dvc exp run -S ") and "alignment=shifted" in each
    ]
    monkeypatch.chdir(clone.root)
    _, _, _, *options = shlex.split(original)
    assert set(options[::2]) == {"-S"}
    assert params_with(options[1::2]) == told
