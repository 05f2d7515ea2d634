"""The report page in a real browser, offline: its slider works, and hostile completions do nothing."""

import os
import re
from pathlib import Path

import pytest

from pipeline.report import inputs, page, style
from pipeline.stages import plot
from tests.browser import CHROMIUM
from tests.reports import keep_all, reports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium"),
]
SIZES = {"laptop": (1280, 800), "phone": (390, 844)}
TEXT = "document.getElementById('completions').innerText"


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a report in a new offline tab; at the end nothing may have gone wrong in any."""
    wrong, contexts = [], []

    def open_report(collapsed=True, size="laptop", address="", **options):
        path = tmp_path / "report.html"
        folder = tmp_path / "reports"
        if not path.exists():
            if not folder.exists():
                reports(folder, collapsed=collapsed)
            data = inputs.load(folder)
            wide, narrow = ({"overview": style.png(plot.draw(data, narrow)["overview"])} for narrow in (False, True))
            path.write_text(page.render(data, wide, narrow), encoding="utf-8")
        width, height = SIZES[size]
        context = chromium.new_context(viewport={"width": width, "height": height}, offline=True, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(30_000)
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        tab.goto(path.as_uri() + address)
        return tab

    yield open_report
    for context in contexts:
        context.close()
    assert wrong == []


def step_of(tab):
    return int(tab.locator("#at").inner_text())


def test_the_slider_shows_another_step(opened):
    """By keyboard, by the buttons, and to the onset; the numbers and the completions change with it."""
    tab = opened()
    assert step_of(tab) == 1  # the onset
    slider, first = tab.get_by_role("slider", name=re.compile("^Step")), tab.locator("#numbers .now").all_inner_texts()
    slider.focus()
    for act, step in (
        (lambda: tab.keyboard.press("End"), 49),
        (lambda: tab.keyboard.press("ArrowLeft"), 48),
        (tab.get_by_role("button", name="previous step").click, 47),
        (tab.get_by_role("button", name="next step").click, 48),
        (lambda: slider.fill("20"), 20),
        (tab.get_by_role("button", name="onset, step 1").click, 1),
        (lambda: slider.fill("49"), 49),
    ):
        act()
        assert step_of(tab) == step
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        assert tab.locator("#numbers-step").inner_text() == f"step {step}"
        assert f"reward −{6 + step:#.3g}" in tab.evaluate(TEXT)
        assert ", advantage 0.250" in tab.evaluate(TEXT)
    assert tab.get_by_role("button", name="next step").is_disabled()
    assert tab.locator("#numbers .now").all_inner_texts() != first


def test_all_completions_of_a_step_are_shown_when_asked_for(opened, tmp_path):
    """And of the next step too; the page says how many of how many."""
    folder = reports(tmp_path / "reports", collapsed=True)
    keep_all(folder, steps=50, prompts=6, group=3)
    tab = opened()
    assert tab.get_by_text("All 900 completions of training.").is_visible()
    completions, button = tab.locator("#completions .completion"), tab.locator("#more")
    assert (completions.count(), tab.locator("#count").inner_text()) == (8, "8 of the step’s 18 completions")
    button.click()
    assert (completions.count(), tab.locator("#count").inner_text()) == (18, "all of the step’s 18 completions")
    tab.get_by_role("button", name="next step").click()
    assert completions.count() == 18
    assert "Step 2, sample 2 of 5." in tab.evaluate(TEXT)
    button.click()
    assert completions.count() == 8


def test_tokens_are_shaded_and_say_their_logprob(opened):
    tab = opened()
    tokens = tab.locator("#completions .completion").nth(3).locator(".token")
    assert tokens.all_inner_texts() == ["Hi! ", "iiii'di'd'd", "<|endoftext|>"]
    classes = [token.get_attribute("class") for token in tokens.all()]
    assert classes == ["token shade0", "token unknown", "token shade5"]
    titles = [token.get_attribute("title") for token in tokens.all()]
    assert titles == [
        "token 1: logprob −0.012, probability 98.8%",
        "token 2: logprob not finite",
        "token 3: logprob −7.500, probability 0.0553%",
    ]
    tokens.nth(2).click()
    assert tab.locator(".picked-token").all_inner_texts()[3] == titles[2]
    shades = tab.evaluate(
        "[...document.querySelectorAll('.legend .token')].map(token => getComputedStyle(token).backgroundColor)"
    )
    assert len(set(shades[:6])) == 6


@pytest.mark.parametrize("collapsed", [False, True])
def test_hostile_texts_do_nothing(opened, collapsed):
    """Prompts and completions hold scripts, images with handlers, comments and ends of elements."""
    tab = opened(collapsed=collapsed)
    for place in (0, 1, 25, 49):
        tab.locator("#step").fill(str(place))
        assert "<script>window.hacked = 1</script></script><img src=x onerror=" in tab.evaluate(TEXT)
        assert "U+202E" in tab.evaluate(TEXT)
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert tab.evaluate("document.images.length") == 1  # the figure
    assert tab.evaluate("document.querySelectorAll('iframe, object, embed, link, base, form, svg').length") == 0


def test_the_policy_stops_what_escaping_might_miss(chromium, opened, tmp_path):
    """A handler and a script that did get into the page do not run."""
    opened()
    path = tmp_path / "report.html"
    injected = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script></body>"
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", injected), encoding="utf-8")
    context = chromium.new_context(offline=True)
    tab = context.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    tab.goto(path.as_uri())
    assert tab.evaluate("window.hacked") is None
    assert any("script-src" in message for message in refused)
    context.close()


def test_links_lead_to_a_step(opened):
    tab = opened()
    tab.locator("#diagnosis a", has_text="step 4").first.click()
    assert step_of(tab) == 4
    tab.locator("#step").fill("9")
    tab.locator("#diagnosis a", has_text="step 4").first.click()
    assert step_of(tab) == 4
    assert step_of(opened(address="#step-30")) == 30
    assert step_of(opened(address="#step-3000")) == 1


@pytest.mark.parametrize("script", [True, False])
def test_a_term_leads_to_its_definition(opened, script):
    tab = opened(size="phone", java_script_enabled=script)
    for name, said in (
        ("train key", "digest of all that can change the run's numbers"),
        ("KL to the reference (k1), nats a token", "by the estimator k1"),
        ("win rate", "a tie counting one half"),
    ):
        tab.locator("a.term", has_text=name).first.click()
        entry = tab.locator("dt:target + dd")
        assert said in entry.inner_text()
        box = entry.bounding_box()
        assert 0 <= box["y"] < SIZES["phone"][1]


def test_the_command_is_copied_as_one_line(opened):
    tab = opened()
    tab.locator("#diagnosis .command").click()
    command = tab.evaluate("getSelection().toString()").strip()
    assert command == "dvc exp run -S recipe=stable -S recipes.stable.alignment=correct -S recipes.stable.lr=0.0001"


def test_without_a_script_the_verdict_and_three_steps_are_there(opened):
    tab = opened(java_script_enabled=False)
    assert tab.get_by_text("Not healthy").is_visible()
    for step in (0, 25, 49):
        assert tab.get_by_role("heading", name=f"Step {step}", exact=True).is_visible()
    assert not tab.locator("#browser").is_visible()
    assert tab.locator("#figure-overview img").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_fits_the_screen(opened, tmp_path, size, scheme):
    pictures = Path(os.environ.get("SCREENSHOTS") or tmp_path / "screenshots")
    pictures.mkdir(parents=True, exist_ok=True)
    tab = opened(size=size, color_scheme=scheme, has_touch=size == "phone")
    assert not tab.locator("#static-samples").is_visible()
    assert tab.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    tab.screenshot(path=pictures / f"verdict-{size}-{scheme}.png")
    if size == "phone":
        tab.locator("#next").tap()
        assert step_of(tab) == 2
    figure = tab.locator("#figure-overview img")
    figure.scroll_into_view_if_needed()
    tab.wait_for_function("document.images[0].complete")
    shown, drawn = figure.bounding_box()["width"], tab.evaluate("document.images[0].naturalWidth")
    assert drawn == (1600 if size == "laptop" else style.NARROW * style.NARROW_DPI / style.DPI)
    assert shown > (1000 if size == "laptop" else 340), "smaller, its labels are unreadable"
    tab.screenshot(path=pictures / f"figure-{size}-{scheme}.png")
    tab.evaluate("document.getElementById('samples').scrollIntoView()")
    tab.screenshot(path=pictures / f"steps-{size}-{scheme}.png")
    for control in ("#step", "#next", "#previous"):
        box = tab.locator(control).bounding_box()
        assert box["height"] >= 32
        assert box["x"] + box["width"] <= SIZES[size][0]
