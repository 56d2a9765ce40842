"""The page in headless Chromium: figures, themes, widths, search, hover, print, and no script error.

Marked `browser`: it needs Chromium or Chrome on the PATH (Debian: `apt-get install chromium`; or name an executable in
the variable CHROMIUM) and `pip install playwright`, which drives it and downloads none. Without them the tests fail.
Screenshots lie in `runs/screenshots/`.
"""

import os
import shutil
from pathlib import Path

import pytest
from random_results import FIGURES, made, random_document, random_results
from test_page import alignment, sampled

from promot_jax.report.page import page, serve

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[3]
WIDTHS = {"phone": 360, "desktop": 1280}
THEMES = ("light", "dark")
WILD = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u2028 ' \" & {{x}} ${y}"


@pytest.fixture(name="chromium", scope="module")
def _chromium():
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert found, "No Chromium on the PATH: apt-get install chromium, or name one in the variable CHROMIUM."
    with sync_playwright() as playwright:
        # The sandbox refuses to run as root, which is who tests are in a container.
        browser = playwright.chromium.launch(executable_path=found, chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(name="report", scope="module")
def _report(tmp_path_factory):
    """The page of random results of many methods, two tasks, hundreds of samples, and wild strings."""
    methods = ("pretrained", "prompt_tuning", "finetune", "promot", "joint", "promot_1shot", "l2sp")
    data = sampled(random_document(methods=methods), samples=30)
    data["methods"]["promot"][0]["samples"][0] |= {"input": WILD, "output": WILD * 3, "task": "t" * 300}
    data["cells"] = [{"method": "kl", "seed": 0, "state": "missing"}]
    other = random_document(seeds=1)
    for runs in other["methods"].values():
        runs[0]["target"]["task"] = "en_fr"
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render({"sentiment": made(data), "en_fr": made(other)}, [alignment()]), "utf-8")
    return path


@pytest.fixture(name="opened")
def _opened(chromium, report):
    """Opens the page at a width and in a theme; at the end nothing was reported or asked for over the network."""
    complaints, contexts = [], []

    def opened(width=1280, theme="light", address=None):
        context = chromium.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=theme,
            has_touch=width < 500,
            offline=address is None,
            reduced_motion="reduce",
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        if address is None:  # a page that is served may close on its way
            tab.on(
                "request", lambda request: complaints.extend([] if request.url == report.as_uri() else [request.url])
            )
        tab.goto(address or report.as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_at_every_width_and_theme(opened, width, theme):
    tab = opened(WIDTHS[width], theme)
    folder = ROOT / "runs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    tab.screenshot(path=folder / f"report_{width}_{theme}.png", full_page=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert tab.eval_on_selector_all("#task-0 figure", "all => all.map(one => one.dataset.chart)") == FIGURES
    for box in tab.eval_on_selector_all(
        "main > section > div figure svg.chart[role=img]",
        "all => all.map(one => [one.getBoundingClientRect().width, one.querySelectorAll('.point').length])",
    ):
        assert box[0] > 200 and box[1] > 0
    # Text stands out from what is behind it: WCAG's contrast of at least 4.5 to 1.
    for selector in (
        "body",
        "h1",
        ".facts dt",
        "caption",
        "nav a",
        "td .up, td .down",
        ".interval",
        ".badge",
        ".count",
        "th",
    ):
        assert contrast(tab, selector) >= 4.5, selector


@pytest.mark.parametrize("width", WIDTHS.values())
def test_tables_that_scroll_say_so_and_keep_their_captions_in_view(opened, width):
    tab = opened(width)
    tab.wait_for_function("document.querySelectorAll('.scroll.wide, .scroll.fits').length > 0")
    state = "[box.scrollWidth > box.clientWidth, getComputedStyle(box.nextElementSibling).display !== 'none']"
    shown = "all.filter(box => box.checkVisibility())"
    boxes = tab.eval_on_selector_all("main .scroll", f"all => {shown}.map(box => {state})")
    assert all(wide == hint for wide, hint in boxes) and any(wide for wide, _ in boxes)
    caption = tab.locator(".scroll.wide caption span").first
    before = caption.bounding_box()
    tab.locator(".scroll.wide").first.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
    after = caption.bounding_box()
    assert after["x"] >= 0 and after["x"] + after["width"] <= width and after["height"] == before["height"]


def test_no_word_of_a_table_is_broken(opened):
    """Numbers of shots and names of methods stand whole on their lines."""
    tab = opened(WIDTHS["phone"])
    lines = "all => all.map(one => one.getClientRects().length)"
    assert set(tab.eval_on_selector_all("thead .whole, .facts .whole", lines)) == {1}
    heights = "all => all.map(one => one.getBoundingClientRect().height / parseFloat(getComputedStyle(one).lineHeight))"
    assert max(tab.eval_on_selector_all("thead .whole", heights)) < 1.5


def contrast(tab, selector):
    """Contrast between an element's colour and the first opaque background behind it."""
    return tab.eval_on_selector(
        selector,
        """node => {
            const parse = (text) => text.match(/[\\d.]+/g).map(Number);
            let behind = node;
            while (parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
            const light = (text) => parse(text).slice(0, 3).map((c) => c / 255)
                .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
                .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
            const both = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(light);
            return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        }""",
    )


def test_theme_can_be_chosen(opened):
    tab = opened(theme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(paper)
    tab.click("#theme")
    dark = tab.evaluate(paper)
    tab.click("#theme")
    assert tab.evaluate(paper) == light != dark == opened(theme="dark").evaluate(paper)


@pytest.mark.parametrize("width", WIDTHS.values())
def test_values_show_on_hover_and_touch(opened, width):
    tab = opened(width)
    point = tab.locator("#task-0 figure[data-chart=icl] .point").last
    point.scroll_into_view_if_needed()
    tip = tab.locator("#tip")
    assert tip.is_hidden()
    tab.wait_for_timeout(300)  # scrolling is over, which hides values
    if width < 500:
        point.tap(force=True)
    else:
        point.hover(force=True)
    assert tip.is_visible() and tip.inner_text() == point.get_attribute("data-tip")
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    tab.mouse.wheel(0, 400)
    tip.wait_for(state="hidden")


def test_line_stands_out_when_its_legend_is_chosen(opened):
    tab = opened()
    figure = tab.locator("#task-0 figure[data-chart=icl]")
    faint = "all => all.filter(one => getComputedStyle(one).opacity < 0.5).length"
    assert figure.locator(".series").evaluate_all(faint) == 0
    figure.locator(".legend li", has_text="ProMoT + 1-shot").click()
    tab.mouse.move(1, 1)
    assert figure.locator(".series").evaluate_all(faint) == figure.locator(".series").count() - 1
    figure.locator(".legend li", has_text="ProMoT + 1-shot").click()
    tab.mouse.move(1, 1)
    assert figure.locator(".series").evaluate_all(faint) == 0


def test_samples_can_be_searched(opened):
    tab = opened()
    form, shown = tab.locator("#samples form"), tab.locator("#samples .item:visible")
    assert (
        shown.count() == 20 and "of 24" in form.locator(".count").inner_text()
    )  # 4 tasks x 30 x 2 seeds, and one more
    tab.click("#samples .more")
    assert shown.count() == 40
    form.locator("[name=search]").fill("CAPITAL promot 7")
    assert shown.count() == 6  # 7, 17 and 27 of each seed
    form.locator("[name=seed]").select_option("1")
    assert shown.count() == 3 and all("seed 1" in text for text in shown.all_inner_texts())
    form.locator("[name=search]").fill("nothing has these words")
    assert shown.count() == 0
    form.locator("[name=search]").press("Enter")  # asks for nothing
    tab.reload()
    assert form.locator("[name=search]").input_value() == "nothing has these words"
    form.locator("[name=search]").fill("alert(2)")
    form.locator("[name=seed]").select_option("*")
    assert shown.count() == 1 and "<img src=x onerror=alert(2)>" in shown.inner_text()


def test_runs_can_be_browsed(opened):
    tab = opened()
    shown = tab.locator("#runs .item:visible")
    tab.locator("#runs [name=method]").select_option("ProMoT")
    assert shown.count() == 3  # two seeds of one task, one of the other
    shown.first.locator("summary").first.click()
    assert shown.first.locator("svg").count() >= 2
    shown.first.locator("summary", has_text="Settings").click()
    assert "learning_rate" in shown.first.inner_text()


def test_keyboard_reaches_everything_that_can_be_used(opened):
    tab = opened()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    without_name = "all => all.filter(one => !(one.labels?.length || one.ariaLabel || one.textContent.trim())).length"
    assert tab.eval_on_selector_all("button, select, input, summary, [tabindex]", without_name) == 0
    assert tab.eval_on_selector_all("table", "all => all.filter(one => !one.caption || !one.tHead).length") == 0


def test_page_prints(opened, tmp_path):
    tab = opened(theme="dark")
    tab.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    tab.emulate_media(media="print")
    assert tab.locator("#samples form").is_hidden() and tab.locator("#theme").is_hidden()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_paper_has_all_that_a_click_would_show(opened):
    tab = opened()
    tab.select_option("#samples [name=seed]", "1")
    shown = "#samples .item:not([hidden])", "details[open]"
    before = [tab.locator(one).count() for one in shown]
    assert before[0] == 20
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator(shown[0]).count() == tab.locator("#samples .item[data-seed='1']").count() > 20
    assert tab.locator("details:not([open])").count() == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert [tab.locator(one).count() for one in shown] == before


def test_page_without_scripts_shows_everything(chromium, report):
    context = chromium.new_context(java_script_enabled=False, viewport={"width": 360, "height": 800})
    tab = context.new_page()
    tab.goto(report.as_uri())
    assert tab.locator("#samples .item").count() > 200 and tab.locator("#samples .item").last.is_visible()
    assert tab.locator("#samples form").is_hidden()
    context.close()


def test_served_page_opens_and_comes_again(opened, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    from promot_jax import files

    monkeypatch.setattr(serve, "REFRESH", 1)
    files.write(random_results(seeds=1, methods=("pretrained",)), tmp_path / "results.json")
    with serve.serving(tmp_path, 0) as address:
        tab = opened(address=address)
        assert tab.locator("#runs .item").count() == 1
        files.write(random_results(seeds=1), tmp_path / "results.json")
        expect(tab.locator("#runs .item")).to_have_count(3, timeout=20_000)
