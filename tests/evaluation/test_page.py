"""The HTML report: it says what the report says, shows every judgement, and what a model wrote stays text."""

import shutil
from html import unescape

import pytest
from playwright.sync_api import expect, sync_playwright

from app.evaluation.judged import Judgement
from app.evaluation.page import render_page
from tests.evaluation.made_report import made_report

KEY = b"k" * 32
PAYLOAD = "well</pre><script>document.title = 'run'</script><img src=x onerror=\"document.title='run'\">"


@pytest.fixture
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("no `chromium` on this machine: run `make browser` as root, or install Debian's package chromium")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_the_page_says_every_rule_and_every_reason_of_the_report():
    report, judgements = made_report(KEY)
    page = unescape(render_page(report, judgements))
    for words in (report["signature"], report["model_digest"], *report["reasons"], "prompts 3", "request number 11"):
        assert words in page
    for rule in report["rules"]:
        assert rule["name"] in page
        assert rule["reason"] in page
    for metric in report["metrics"]:
        assert metric["name"] in page


def test_the_report_opens_in_a_browser_filters_its_judgements_and_runs_nothing_that_a_model_wrote(browser, tmp_path):
    report, judgements = made_report(KEY, said=[PAYLOAD])
    path = tmp_path / "report.html"
    path.write_text(render_page(report, judgements))
    page = browser.new_page()
    asked, faults = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(path.as_uri())
    assert page.title() == f"HOLD: {report['model_id']}"
    expect(page.locator("h1")).to_contain_text("HOLD new")
    shown = page.locator("details.judgement:visible")
    for only, count in (("all", 12), ("won", 8), ("lost", 2), ("tied", 1), ("undecided", 1)):
        page.get_by_label(only, exact=True).check()
        expect(shown).to_have_count(count)
    assert page.locator("svg circle").count() == 12
    page.get_by_label("won", exact=True).check()
    shown.first.locator("summary").click()
    expect(shown.first.locator("pre").nth(1)).to_have_text(PAYLOAD)
    row = page.locator("tr", has_text="win_rate").filter(has=page.locator(".bar"))
    expect(row.locator("td.n").nth(0)).to_have_text("8")
    assert (page.title(), faults, asked) == (f"HOLD: {report['model_id']}", [], [path.as_uri()])


def test_a_judges_words_stand_game_by_game_and_categories_are_counted_apart():
    report, _ = made_report(KEY)
    judgements = [
        Judgement("arena_hard", "candidate", "base", "math", 1, "q", "a", "b", ("first [[A>B]]", "second [[B>A]]")),
        Judgement("arena_hard", "candidate", "base", "math", 0, "q", "a", "b", ("x", "y")),
        Judgement("arena_hard", "candidate", "base", "code", -1, "q", "a", "b", ("x", "y")),
        Judgement("arena_hard", "candidate", "base", "code", None, "q", "a", "b", ("(no reply: timeout)", "y")),
    ]
    page = unescape(render_page(report, judgements))
    for words in (
        "1 wins, 1 ties, 0 losses",
        "0 wins, 0 ties, 1 losses",
        "game 2",
        "second [[B>A]]",
        "(no reply: timeout)",
    ):
        assert words in page
    assert ">0.75<" in page
