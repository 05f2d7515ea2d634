"""Nothing from outside is run, leaves its folder or becomes a part of a page; no process listens beyond loopback."""

import ipaddress
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import model_files
from pipeline.errors import UserError, one_line, run_stage
from pipeline.report import cure_page, inputs, page
from pipeline.stages import prepare
from tests.browser import CHROMIUM, FLAGS
from tests.error_lines import check_line
from tests.faults import fault, first, rounds
from tests.html import Elements
from tests.project import ROOT
from tests.reports import reports
from tests.small import HOOK

# --- pages: whatever a text holds, the page has the same elements

PIECES = [
    "<script>window.hacked = 1</script>", "</script>", "</style>", "</title>", "<!--", "-->", "<![CDATA[", "]]>",
    "<svg/onload=",
    "<img src=x onerror=window.hacked=1>", '"><b onmouseover="window.hacked=1">',
    "' autofocus onfocus='window.hacked=1",
    "{{ 7 * 7 }}", "{% raw %}", "${window.hacked=1}", "javascript:window.hacked=1", "&lt;", "&#x3c;script&#x3e;",
    "\\u003cscript\\u003e",
    "<base href=//x>", "<meta http-equiv=refresh content=0>", "<iframe srcdoc='<script>top.hacked=1</script>'>", "\0",
    "\x1b[2J", "\x7f",
    "\u2028", "\u2029", "\u202e", "\u2066", "\u200b", "\ufeff", "\ufffe", "\ud800", "\udfff", "\U000e0041", "`", "\\",
    "\r\n", "\t", " ",
    "مرحبا", "👩‍💻", "ﷺ", "\u0301" * 20, "-S reward=x; rm -rf /",
]  # fmt: skip
HOSTILE = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(codec=None), max_size=6), min_size=1, max_size=5
).map("".join)
SHOWN = ("prompt", "completion", "checkpoint", "policy", "headline", "summary", "title", "reason", "source", "command")


def with_texts(run: inputs.Inputs, text: Callable[[], str]) -> inputs.Inputs:
    """The run with other texts wherever a page shows one that comes from data, a model or params.yaml."""

    def replaced(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: replaced(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [replaced(inner, key) for inner in value]
        return text() if key in SHOWN or key == "pieces" or key.endswith((".target", ".source")) else value

    new = {field: replaced(getattr(run, field)) for field in ("samples", "completions", "diagnosis", "run")}
    return run._replace(**new)


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> inputs.Inputs:
    return inputs.load(reports(tmp_path_factory.mktemp("collapsed") / "reports", collapsed=True, steps=2))


def pages(run: inputs.Inputs) -> list[str]:
    return [page.render(run, *2 * [{"overview": b"\x89PNG"}]), cure_page.render(run, run, *2 * [b"\x89PNG"], "cure-0")]


Skeleton = list[tuple[str, tuple[str, ...]]]


def skeleton(html: str) -> Skeleton:
    """Elements and the names of their attributes, without the marks that texts have around odd characters."""
    found = Elements(html)
    assert not found.comments
    return [(tag, tuple(names)) for tag, names in found.found if names.get("class") not in ("mark", "empty")]


@pytest.fixture(scope="module")
def plain(collapsed: inputs.Inputs) -> list[Skeleton]:
    return [skeleton(html) for html in pages(with_texts(collapsed, lambda: "plain"))]


@pytest.mark.faults
@settings(max_examples=rounds(150, 15), deadline=None)
@given(data=st.data())
def test_no_text_changes_the_elements_of_a_page(
    collapsed: inputs.Inputs, plain: list[Skeleton], data: st.DataObject
) -> None:
    drawn = data.draw(st.lists(HOSTILE, min_size=1, max_size=6))
    queue = iter(drawn * 10_000)
    with fault("hostile text in a page"):
        # a command breaks at each ` -S `, the only element that a text's words decide on
        for html, expected in zip(
            pages(with_texts(collapsed, lambda: next(queue).replace("-S", ""))), plain, strict=True
        ):
            html.encode()  # no half of a surrogate pair
            assert skeleton(html) == expected
            assert not [
                c for c in html if (ord(c) < 32 and c not in "\n\t") or c in "\x7f\u2028\u2029\u202e\u2066\u200b\ufeff"
            ]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium")
@pytest.mark.parametrize("pieces", first(1, [PIECES[::8], [piece for i, piece in enumerate(PIECES) if i % 8]]))
def test_hostile_texts_do_nothing_in_a_real_browser(
    collapsed: inputs.Inputs, tmp_path: Path, pieces: list[str]
) -> None:
    """Each of PIECES, in every place, on both pages; an empty list of what went wrong at the end of each."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_context(offline=True).new_page()
        wrong: list[str] = []
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        for piece in pieces:
            for number, html in enumerate(pages(with_texts(collapsed, lambda piece=piece: f"a{piece}b"))):
                with fault("hostile text in a browser"):
                    path = tmp_path / "page.html"
                    path.write_text(html.replace("iVBORw==", "R0lGODlhAQABAAAAACw="), encoding="utf-8")
                    tab.goto(path.as_uri())
                    assert tab.evaluate("window.hacked") is None
                    assert tab.evaluate("document.querySelectorAll('script').length") == (2 if number == 0 else 0)
                    odd = "document.querySelectorAll('iframe, object, embed, link, base, form, svg, b').length"
                    assert tab.evaluate(odd) == 0
                    assert wrong == []
        browser.close()


def test_params_are_shown_with_what_hides(collapsed: inputs.Inputs) -> None:
    run = collapsed.run | {"params": collapsed.run["params"] | {"reward.target": "a\u202eb\0"}}
    html = page.render(collapsed._replace(run=run), {}, {})
    assert "\u202e" not in html
    assert "\0" not in html
    assert 'a<span class="mark">U+202E</span>b<span class="mark">U+0000</span>' in html


# --- the terminal


@pytest.mark.faults
@settings(max_examples=rounds(2000, 100), deadline=None)
@given(HOSTILE)
def test_an_error_is_one_printable_line(text: str) -> None:
    with fault("hostile text in an error"):
        assert check_line(str(UserError(text))) == one_line(text)
    assert len(str(UserError(text * 1000))) <= 1000


def test_what_a_terminal_cannot_show_ends_no_stage() -> None:
    """A Latin-1 terminal, and a completion in another script."""
    code = "from pipeline.errors import run_stage; run_stage(lambda: print('Größe 你好'))"
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "Größe \\u4f60\\u597d\n".encode("latin-1"))
    assert run_stage.__doc__


def test_a_stage_asked_for_help_or_given_arguments_does_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        pytest.fail("the stage runs")

    main.__module__ = "pipeline.stages.prepare"
    for option in ("-h", "--help"):
        monkeypatch.setattr(sys, "argv", ["prepare", option])
        run_stage(main)
        assert capsys.readouterr().out.strip() == (prepare.__doc__ or "").strip()
    monkeypatch.setattr(sys, "argv", ["train", "--seed", "7"])
    with pytest.raises(SystemExit) as end:
        run_stage(main)
    assert end.value.code == 1
    assert check_line(capsys.readouterr().err.removeprefix("error: ").strip()).startswith("--seed 7: no arguments are")
    done = []
    run_stage(lambda: done.append(sys.argv), arguments=True)
    assert done


# --- names that would leave their folder

SHARDS = ["../secret", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\0b.safetensors", "x.bin", "x.pkl",
    "model.py",
          "\u202ex.safetensors/..", "C:\\x", "../model.safetensors", "x" * 300]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize("shard", SHARDS, ids=ascii)
def test_an_index_cannot_name_what_is_no_shard_of_its_folder(tmp_path: Path, shard: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("secret")
    (source / "config.json").write_text("{}")
    for name in ("x.bin", "x.pkl", "model.py"):
        (source / name).write_text("import os")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
    with fault("name that leaves its folder"):
        with pytest.raises(UserError, match=r"^models\.mine: model\.safetensors\.index\.json "):
            model_files.store(source, tmp_path / "target", "models.mine")
        assert not list((tmp_path / "target").iterdir())


@pytest.mark.faults
@pytest.mark.parametrize("prompt", ["\udcff", ""], ids=ascii)
def test_prompts_that_are_no_text_are_one_line(prompt: str) -> None:
    """Bytes that are no UTF-8 come from a shell as halves of surrogate pairs."""
    from pipeline.__main__ import build_parser
    from pipeline.commands import generate

    with fault("argument that is no text"), pytest.raises(UserError, match="should be text in UTF-8, and not empty"):
        generate.main(build_parser().parse_args(["generate", "Hi", prompt]))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "9" * 5000, "٣", "1 2", "a", "", "0.0.0.0:80"])
def test_the_ui_takes_a_port_and_nothing_else(port: str) -> None:
    from pipeline.commands import ui

    with pytest.raises(UserError, match="should be one port number"):
        ui.port_number(port)


# --- what the stages do, by Python's own audit hooks


def is_local(address: str) -> bool:
    """('127.0.0.1', 80), a path of a local socket, or nothing."""
    host = re.search(r"""\(b?['"]([^'"]*)['"], \d+""", address)
    if host is None:
        return "," not in address
    return host[1] == "localhost" or ipaddress.ip_address(host[1]).is_loopback


def test_the_check_of_addresses_notices() -> None:
    assert is_local("('127.0.0.1', 80)")
    assert is_local("('::1', 80, 0, 0)")
    assert is_local("'/run/x.sock'")
    assert not is_local("('0.0.0.0', 80)")
    assert not is_local("('::', 80, 0, 0)")
    assert not is_local("('10.2.3.4', 80)")


def test_the_hook_notices(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "bad.py").write_text(
        "import os, pickle, socket, subprocess\npickle.loads(b'cos\\ngetpid\\n.')\nos.system('true')\n"
        "socket.socket().bind(('0.0.0.0', 0))\nsubprocess.run('true', shell=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "AUDIT": str(tmp_path)}
    subprocess.run([sys.executable, tmp_path / "bad.py"], env=environment, check=True)
    (log,) = tmp_path.glob("*.audit")
    seen = dict(map(json.loads, log.read_text().splitlines()))
    assert {"pickle.find_class", "os.system", "socket.bind", "subprocess.Popen"} <= seen.keys()
    assert not is_local(seen["socket.bind"][1])
    assert Path(seen["subprocess.Popen"][0].strip("'")).name == "sh"


@pytest.mark.slow
def test_no_stage_unpickles_runs_a_shell_or_leaves_loopback(small_run: Any) -> None:
    """All stages in turn, MLflow included. Truth from the interpreter: every import, thread and library is seen."""
    _, seen = small_run
    assert any(event == "subprocess.Popen" for event, _ in seen["track"]), "the hook sees: track asks git"
    for stage, events in seen.items():
        for event, arguments in events:
            assert event not in ("pickle.find_class", "os.system", "open", "urllib.Request"), (stage, event, arguments)
            if event in ("socket.bind", "socket.connect"):
                assert is_local(arguments[1]), (stage, event, arguments)
            if event == "socket.getaddrinfo":
                assert re.search("localhost|127.0.0.1|::1|None", arguments[0]), (stage, event, arguments)
            if event == "subprocess.Popen":
                assert arguments[1].startswith(("[", "(")), (stage, arguments)
                assert Path(arguments[0].strip("'")).name in PROGRAMS, (stage, arguments)


PROGRAMS = {"git", "uname", Path(sys.executable).name}


# --- what is installed


def test_the_audit_claims_nothing_that_it_could_not_look_up() -> None:
    """Without --strict pip-audit says "No known vulnerabilities found" where its database was not there to ask."""
    recipe = re.search(r"^audit:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    assert re.search(r'/pip-audit" --strict ', recipe[1])
    assert "-r constraints.txt" in recipe[1]
    assert "|| true" not in recipe[1]
