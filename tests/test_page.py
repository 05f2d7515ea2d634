"""The report page: the verdict, what was run, the data of its browser; nothing in a completion becomes a part of it."""

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.report import browser, figures, inputs, labels, page, samples, text
from pipeline.report.terms import Terms
from pipeline.rl.metrics import METRICS
from tests.html import Elements, words_of
from tests.project import ROOT
from tests.reports import COLUMNS, FOREIGN, reports


@pytest.fixture(scope="module", params=["healthy", "collapsed"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    data = inputs.load(reports(tmp_path_factory.mktemp("page") / "reports", collapsed=request.param == "collapsed"))
    return page.render(data, *2 * [dict.fromkeys(page.CAPTIONS, b"\x89PNG")])


only_healthy, only_collapsed = (
    pytest.mark.parametrize("report", [kind], indirect=True) for kind in ("healthy", "collapsed")
)


# --- untrusted text


def test_completions_are_escaped(report: str) -> None:
    parsed = Elements(report)
    assert [tag for tag, _ in parsed.found].count("script") == 2
    assert {"img"} == {tag for tag, attributes in parsed.found if "src" in attributes}
    assert not [name for _, attributes in parsed.found for name in attributes if name.startswith("on")]
    assert not parsed.comments
    assert "&lt;script&gt;window.hacked = 1&lt;/script&gt;" in report
    assert "&amp;amp;" in report
    assert not [character for character in report if ord(character) < 32 and character not in "\n\t"]
    for hidden, shown in (("\u202e", "U+202E"), ("\u2028", "U+2028")):
        assert hidden not in report
        assert shown in report
    assert "(empty)" in report
    assert FOREIGN in report


def test_the_policy_allows_our_script_and_style_by_their_digest_alone(report: str) -> None:
    parsed = Elements(report)
    (policy,) = [str(names["content"]) for tag, names in parsed.found if tag == "meta" and "http-equiv" in names]
    style, data, script = parsed.raw
    assert "unsafe" not in policy
    for source, content in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{source} 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")
    assert json.loads(data)["steps"]


def test_the_script_never_makes_html_of_a_text() -> None:
    script = (ROOT / "pipeline/report/browser.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(|setTimeout", script)
    assert not re.search(r"</script|<!--|https?:|import\s*\(|fetch\(", script)


def test_data_cannot_leave_its_script_element(report: str) -> None:
    data = Elements(report).raw[1]
    assert not set("<>&\u2028\u2029") & set(data)
    first = json.loads(data)["steps"][0]["prompts"][0]
    shown = "".join(first["prompt"])
    assert shown.startswith("<script>window.hacked = 1</script></script><img src=x onerror='window.hacked = 1'><!-- ")
    assert first["prompt"][1::2] == ["↵", "→", "U+202E", "U+0000", "U+001B", "U+2028", "··"]


def test_json_in_the_page_is_what_it_was() -> None:
    value = ["</script>", "<!--<script>", "a & b", "\u2028\u2029", '"\\"', "ü👩‍💻"]
    inside = samples.script_json(value)
    assert json.loads(inside) == value
    assert not set("<>&\u2028\u2029") & set(inside)


def test_nothing_in_a_text_hides_and_a_token_keeps_its_spaces() -> None:
    for string, shown in (
        ("", "(empty)"), ("   ", "···"), (" a b ", "·a b·"), ("a\nb", "a↵\nb"), ("\0", "U+0000"), ("\ud800", "U+D800"),
    ):  # fmt: skip
        assert re.sub(r"<[^>]+>", "", text.visible(string)) == "".join(text.parts(string)) == shown
    for piece, parts in (
        (" the", [" the"]), ("\n", ["", "↵", "\n"]), ("", ["", "(empty)"]), ("a\u200bb", ["a", "U+200B", "b"]),
    ):  # fmt: skip
        assert text.parts(piece, ends=False) == parts


# --- the verdict


@only_healthy
def test_a_healthy_run_says_so_and_shows_numbers_to_check(report: str, tmp_path: Path) -> None:
    said = words_of(report)
    assert "Healthy No sign of collapse. Held-out embedding reward" in said
    assert "Nothing crossed a threshold in 50 steps." in said
    history = inputs.load(reports(tmp_path / "reports")).history
    first, last = (labels.measured(history["entropy"].iloc[row], "entropy") for row in (0, -1))
    assert f"entropy of the policy, nats a token entropy {first} {last}" in said
    for absent in ("Not healthy", "cure", "to-onset", "data/healthy"):
        assert absent not in report.split("<script")[0].split("</style>")[1]


@only_collapsed
def test_a_collapsed_run_says_what_when_why_and_the_cure(report: str) -> None:
    said = words_of(report)
    assert "Not healthy Misaligned objective from step 1 One text for all from step 4" in said
    assert "logprob_gap 8.70 step 1 above 0.500 –" in said
    assert "distinct_completions 6.2% step 6 below 50.0% 97.0% ± 1.2%" in said
    assert "step 6, reward −11.5" in said
    assert "dvc exp run -S recipe=stable -S recipes.stable.alignment=correct -S recipes.stable.lr=0.0001" in said
    assert "recipes.stable.lr=0.0001 for: One text for all Smaller steps. docs/COLLAPSE.md" in said
    assert "holds the reference model" in said
    assert '<a href="#step-6">' in report
    assert '<button id="to-onset" type="button">onset, step 1</button>' in report


def test_the_verdict_comes_first(report: str) -> None:
    ids = [names["id"] for tag, names in Elements(report).found if tag == "section"]
    assert ids == ["diagnosis", "parameters", "samples", "figures", "held-out", "examples", "prompts", "terms"]


def test_every_key_number_is_a_column() -> None:
    assert set(browser.NUMBERS) <= set(COLUMNS)


def test_a_value_says_its_unit() -> None:
    for value, metric, said in (
        (0.0625, "empty_share", "6.2%"), (-3.14159, "entropy", "−3.14"), (None, "entropy", "undefined"),
        (math.nan, "empty_share", "undefined"), (math.inf, "grad_norm", "undefined"), (2.0, "a_new_one", "2.00"),
    ):  # fmt: skip
        assert labels.measured(value, metric) == said


# --- the browser's data


def browser_data(data: inputs.Inputs, limit: int = samples.LIMIT) -> dict[str, Any]:
    return browser.browser_data(data, samples.shown_samples(data, limit).prompts)


def test_the_browser_has_every_step_with_its_tokens(tmp_path: Path) -> None:
    data = browser_data(inputs.load(reports(tmp_path / "reports", steps=3, collapsed=True)))
    assert data["onset"] == 1
    assert [step["step"] for step in data["steps"]] == [0, 1, 2]
    first = data["steps"][2]["prompts"]
    assert [len(prompt["completions"]) for prompt in first] == [2] * 4
    hostile, plain = first[1]["completions"]
    assert first[1]["prompt"] == ["Prompt number 1, what now?"]
    assert plain["pieces"] == ["Hi! ", "iiii'di'd'd", "<|endoftext|>"]
    assert plain["logprobs"] == [-0.012, None, -7.5]
    assert (plain["reward"], plain["advantage"]) == ("−8.00", "0.250")
    assert "text" not in hostile
    assert "text" not in plain


def test_what_the_reward_read_is_shown_where_the_tokens_do_not_say_it(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=1))
    for completion, shown in (("Hi! <|endoftext|>", False), ("Hi! ", False), ("Hi!", True), ("", True)):
        row = data.samples[1] | {"completion": completion, "pieces": ["Hi", "! ", "<|endoftext|>"]}
        (prompt,) = browser_data(data._replace(samples=[row]))["steps"][0]["prompts"]
        assert ("text" in prompt["completions"][0]) == shown
    cut = data.samples[1] | {"completion": "Hi", "pieces": ["Hi", "!"], "ended": False}
    (prompt,) = browser_data(data._replace(samples=[cut]))["steps"][0]["prompts"]
    assert prompt["completions"][0]["text"] == ["Hi"]


def test_a_step_without_samples_and_an_onset_outside_the_run(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=2))
    data.diagnosis["onset"] = 7
    steps = browser_data(data._replace(samples=data.samples[:8]))
    assert steps["onset"] is None
    assert [len(step["prompts"]) for step in steps["steps"]] == [4, 0]


def test_the_data_of_a_run_of_the_usual_size_stay_small(tmp_path: Path) -> None:
    """50 steps of 8 completions with 20 tokens."""
    data = inputs.load(reports(tmp_path / "reports"))
    tokens = {"tokens": [7] * 20, "pieces": [" token"] * 20, "token_logprobs": [-1.2345678901] * 20}
    rows = [row | tokens for row in data.samples]
    assert len(rows) == 400
    assert len(samples.script_json(browser_data(data._replace(samples=rows)))) < 300_000


# --- the rest of the page


def test_the_page_needs_nothing_else(report: str) -> None:
    sources = [
        str(value)
        for _, names in Elements(report).found
        for name, value in names.items()
        if name in ("src", "srcset", "href")
    ]
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#step-", "#term-")) for source in sources)
    assert "url(" not in report
    assert "http" not in report.replace("http-equiv", "")


def test_every_term_leads_to_its_definition(report: str) -> None:
    """Each link's target is there once and says something; the terms that nobody uses are left out."""
    links = re.findall(r'<a class="term" href="#([^"]*)">([^<]+)</a>', report)
    entries = re.findall(r'<dt id="([^"]*)">([^<]+).*?</dt><dd>([^<]+)</dd>', report)
    assert all(text.strip() for link in links for text in link)
    assert {target for target, _ in links} == {anchor for anchor, _, _ in entries}
    assert len({anchor for anchor, _, _ in entries}) == len(entries) > 20
    assert report.count("</details>", report.index('id="terms"')) == 0  # a target in a closed fold is not shown


def test_every_column_name_that_is_shown_is_a_link(report: str) -> None:
    cells = re.findall(r"<td>(.*?)</td>", report.partition('<section id="terms">')[0])
    named = {column: cell for cell in cells for column in COLUMNS if re.search(rf"<code>{column}</code>", cell)}
    assert named.keys() >= {"distinct_2", "empty_share", "completion_tokens", "ref_logprob"}
    for column, cell in named.items():
        target = re.match(r'<a class="term" href="#([^"]*)">', cell)
        assert target, cell
        assert f'<dt id="{target[1]}">' in report
        assert re.search(rf'<dt id="{target[1]}">[^<]* <small><code>{column}</code>', report)
        assert METRICS[column].meaning in html.unescape(report)


def test_a_term_without_a_definition_is_an_error() -> None:
    with pytest.raises(KeyError, match="KL to nobody"):
        Terms().link("KL to nobody")
    assert Terms().link_known("<b>") == "&lt;b&gt;"


def test_the_terms_of_a_figure_are_the_columns_that_it_draws(tmp_path: Path) -> None:
    """It can be drawn from them alone, and not without any of them."""
    data = inputs.load(reports(tmp_path / "reports"))
    run, held_out = data.run, data.rewards[data.trained]
    for name, function, more in (
        ("overview", figures.overview, [held_out]), ("reward", figures.reward, [held_out]),
        ("variance", figures.variance, []), ("collapse", figures.collapse, []),
    ):  # fmt: skip
        drawn = list(page.DRAWN[name])
        if name == "overview":  # which reads the spread, and does not draw it
            drawn += ["reward_std_within", "reward_std_between"]
        function(data.history[["step", *drawn]], *more, run)
        for column in drawn:
            with pytest.raises(KeyError, match=column):
                function(data.history[["step", *drawn]].drop(columns=column), *more, run)


def test_whether_it_learned_stands_beside_the_verdict(report: str) -> None:
    """On held-out prompts: the first and the last training batch are of different ones."""
    beginning = words_of(report[: report.index('id="parameters"')])
    gain = "+1.20 (1.06 to 1.34)" if "Healthy No sign" in beginning else "−5.40 (−5.54 to −5.26)"
    said = f"Held-out embedding reward over the reference model: {gain} 95% interval, 40 held-out prompts × 2 samples"
    assert said in beginning
    assert words_of(report).count("40 held-out prompts × 2 samples") >= 3  # wherever intervals are shown


@only_healthy
def test_the_page_says_what_was_run(report: str) -> None:
    for said in ("stable", "seed 3", "0b5d4045c3f466fa", "recipe.lr", "0.0001", "train.dropped.language", "80"):
        assert said in report
    said = words_of(report)
    assert "dvc exp run -S model=pocket -S prompts=pocket -S reward=embedding" in said
    assert "-S &#39;++rewards.embedding.target=&#34;Hi there!&#34;&#39;" in report
    assert "-S ++recipes.stable.lr=0.0001" in said
    assert "-S ++evaluate.prompts=0" in said
    assert "evaluate.prompts" in report[report.index("<h3>Parameters</h3>") :]
    assert "dvc repro plot" in said
    assert "Seed 3 draws everything" in said
    assert report.count('class="pair"') == page.EXAMPLES + 3 * page.SAMPLES
    steps = [int(step) for step in re.findall(r"<h3 id=\"step-\d+\">Step (\d+)</h3>", report)]
    assert steps == [0, 25, 49]


def test_a_command_is_quoted_and_the_policy_that_was_kept_is_named(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", collapsed=True, steps=9))
    data.diagnosis["healthy_step"] = 5
    data.run["params"]["prompts"] = "mine; rm x"
    made = page.render(data, {}, {})
    assert "The policy after 5 updates was kept: data/healthy ." in words_of(made)
    assert "-S &#39;prompts=&#34;mine; rm x&#34;&#39;" in made


def test_the_page_tells_of_the_terms_of_a_sum(tmp_path: Path) -> None:
    data = inputs.load(reports(tmp_path / "reports", steps=9, terms=True))
    made = page.render(data, *2 * [dict.fromkeys(page.CAPTIONS, b"\x89PNG")])
    said = words_of(made)
    assert "`near` carries 96% of the signal. A weight of 0.1 would do. To try it dvc exp run" in said
    assert "`words_2` is dead." in said
    table = words_of(made[made.index('id="reward-terms"') : made.index('id="held-out"')])
    assert (
        "near 0.02 95.5% → 95.5% −4.00 → 0.00 0.0400 → 0.120 3.00 → 3.00 0.0600 → 0.0600 −6.50 −6.60 to −6.40" in table
    )
    assert "reward −6.00 (near −7.00, length nothing, words_2 1.00), advantage 0.250" in said
    assert (
        "near −7.00, length nothing"
        in json.loads(Elements(made).raw[1])["steps"][0]["prompts"][0]["completions"][0]["reward"]
    )
    assert 'id="reward-terms"' not in page.render(inputs.load(reports(tmp_path / "plain", steps=2)), {}, {})


def test_examples_follow_a_rule() -> None:
    rows = [{"prompt": i, "sample": sample} for i in range(30) for sample in range(2)]
    chosen = page.examples(rows)
    assert [row["prompt"] for row in chosen] == [i * 30 // 12 for i in range(12)]
    assert {row["sample"] for row in chosen} == {0}
    assert page.examples(rows[:6]) == [rows[0], rows[2], rows[4]]
