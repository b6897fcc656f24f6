"""The page in a browser: it is silent, asks for nothing, fits, and runs nothing foreign."""

from contextlib import contextmanager

import pytest
from support.report_runs import save_eval, save_run

from siftune.report import show
from siftune.report.evals import Answer
from siftune.report.page import make_page

pytestmark = pytest.mark.browser
ATTACK = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'


@contextmanager
def opened(browser, path, width=1280, scheme="light"):
    """Open a page; what it says on the console, and what it asks for, must be nothing."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.absolute().as_uri())
    yield page
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return make_page(list(map(str, runs.values()))).write(tmp_path_factory.mktemp("page") / "report.html")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_has_the_system_s_colours(browser, report, width, scheme):
    with opened(browser, report, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        right = "[...document.querySelectorAll('caption')].map(caption => caption.getBoundingClientRect().right)"
        assert 0 < page.evaluate(f"Math.max(...{right})") <= width  # of tables that scroll, too
        figures = page.locator("figure svg:visible")
        assert figures.count() == page.locator("figure").count() > 10
        for box in (figures.nth(i).bounding_box() for i in range(figures.count())):
            assert 200 < box["width"] <= width - 16
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every(c => c < 64)")
        assert dark == (scheme == "dark")


def test_paper_is_light(browser, report):
    with opened(browser, report, scheme="dark") as page:
        styles = "['.chart text', 'body'].map(name => getComputedStyle(document.querySelector(name)))"
        colours = f"{styles}.map(style => style.fill + style.color)"
        on_screen = page.evaluate(colours)
        page.emulate_media(media="print", color_scheme="dark")
        on_paper = page.evaluate(colours)
        page.emulate_media(media="print", color_scheme="light")
        assert page.evaluate(colours) == on_paper != on_screen


def test_paper_holds_all_of_it(browser, report):
    """A4 between its margins: two figures beside each other, tables whole, and nothing folded."""
    with opened(browser, report, width=688) as page:
        hidden = page.locator("details table").first
        assert not hidden.is_visible()
        page.emulate_media(media="print")
        assert hidden.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 688
        for table in page.locator("table").all():
            box = table.bounding_box()
            assert box["x"] + box["width"] <= 688
            assert table.evaluate("one => getComputedStyle(one).display") == "table"
        first, second = (page.locator("#training figure").nth(i).bounding_box() for i in range(2))
        assert first["y"] == second["y"]


@pytest.mark.parametrize("width", [390, 1280])
def test_five_answers_are_open_and_the_others_on_request(browser, report, width):
    with opened(browser, report, width) as page:
        table = page.locator("#results table.cards").last
        shown = "rows => rows.filter(row => row.checkVisibility()).length"
        rows = table.locator("tbody tr")
        assert rows.evaluate_all(shown) == 5
        page.get_by_text("15 more rows").click()
        assert rows.evaluate_all(shown) == 20


def test_figures_tell_what_is_under_the_pointer(browser, report):
    with opened(browser, report) as page:
        page.locator("figure", has_text="Training loss").locator(".hit:visible").first.hover()
        assert "dense: " in page.locator("#tip").inner_text()
        page.mouse.move(1, 1)
        assert page.locator("#tip").is_hidden()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A run whose name, settings, rows and answers are an attack."""
    folder = tmp_path_factory.mktemp("untrusted") / "<img src=x onerror=alert(1)>"
    run = save_run(folder, "gast", steps=6, model=ATTACK, train=ATTACK, eval=ATTACK)
    save_eval(run, answers=(Answer(ATTACK, ATTACK, ATTACK, ATTACK, False, True),))
    return run


def test_a_script_in_a_row_stays_text(browser, attacked, tmp_path):
    path = show(attacked).write(tmp_path / "report.html")
    with opened(browser, path, 390) as page:
        assert page.title() != "owned"
        assert page.locator("img").count() == 0
        assert page.locator("script:not([type])").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        shown = page.locator(".cards td bdi").all_inner_texts()
        assert shown.count(ATTACK) == 4


def test_a_script_that_gets_in_does_not_run(browser, attacked, tmp_path):
    """Were anything not escaped, the page's policy would still keep it from running."""
    page = show(attacked)
    path = tmp_path / "report.html"
    path.write_text(page.html.replace("</main>", "<script>document.title='owned'</script></main>"), encoding="utf-8")
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(path.as_uri())
    assert tab.title() != "owned"
    context.close()


def test_a_notebook_s_frame_shows_it(browser, runs, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><body>{show(runs['gast'])._repr_html_()}</body>", encoding="utf-8")
    context = browser.new_context()
    tab = context.new_page()
    tab.goto(path.as_uri())
    assert "held-out rows" in tab.frame_locator("iframe").locator("h1").inner_text()
    context.close()
