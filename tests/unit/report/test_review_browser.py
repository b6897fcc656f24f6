"""Review in a browser: decisions by mouse and keyboard, corrected rows, storage, both files, and a training by them."""

import csv
import json
from contextlib import contextmanager

import pytest
from support.commands import siftune
from support.sifted_pools import save_pool, save_sifting
from support.visited import visits

from siftune.data.decisions import Decision, decisions_csv, read_decisions
from siftune.report.page import make_page

pytestmark = pytest.mark.browser
ATTACK = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
TRAIN = ("--template", "none", "--max-length", "64", "--rank", "2", "--batch-size", "4", "--lr", "1e-2")


@contextmanager
def browsing(browser, **options):
    """Pages of one profile, which share what a browser stores; they must be silent and ask for nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
    said = []

    def opened(path, width=1280):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.absolute().as_uri())
        return page

    yield opened
    context.close()
    assert said == []


def download(page, button, folder):
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def row_at(page, number):
    return page.locator(".review li").nth(number)


def state(page, number):
    """The decision that a row shows. `inner_text` is empty for rows outside of the window, which are not laid out."""
    return row_at(page, number).locator(".state").text_content().strip()[2:]


def lines_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def save_list(path, rows):
    lines = [Decision(place, False, [7.0], "s", prompt, completion, "loss 7.0") for place, prompt, completion in rows]
    path.write_text(decisions_csv(lines, with_reason=True), encoding="utf-8")
    return path


def test_a_training_follows_the_decisions_of_a_page(browser, base, tmp_path, capsys):
    """Ten rows of a sifted pool are decided on, and one is corrected; the run has exactly the rows of the page."""
    pool = tmp_path / "pool.jsonl"
    sums = [{"prompt": f"{i}+{i}?", "completion": str(i + i), "source": "sums"} for i in range(20, 32)]
    words = [{"prompt": f"say {i}", "completion": "hello", "source": "words"} for i in range(24)]
    pool.write_text("".join(json.dumps(row) + "\n" for row in (*words, *sums)))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"prompt": f"{i}+{i}?", "completion": str(i + i)}) + "\n" for i in range(12)))
    common = ["--model", base, "--train", pool, *TRAIN]
    siftune(capsys, "sift", *common, "--target", few, "--steps", "2", "--out", tmp_path / "sifted")
    siftune(capsys, "report", tmp_path / "sifted", "--out", tmp_path / "page.html")
    before = read_decisions(str(tmp_path / "sifted" / "scores.csv")).selected
    with browsing(browser) as opened:
        page = opened(tmp_path / "page.html")
        page.locator(".review select").select_option(label="all rows (36)")
        places = [page.locator(".review .place").nth(number).get_attribute("title") for number in range(36)]
        assert {*places} == {*before}
        for number in range(5):  # by mouse: keep, drop, keep, drop, drop and undo
            row_at(page, number).get_by_role("button", name="Keep" if number in (0, 2) else "Drop").click()
        row_at(page, 4).get_by_role("button", name="Drop").click()
        for key in ("n", "d", "k", "d", "k"):  # to row 5, and from there on
            page.keyboard.press(key)
        page.keyboard.press("ArrowDown")  # from row 9 to row 10
        page.keyboard.press("p")
        page.keyboard.press("d")
        page.keyboard.press("c")  # row 10
        page.keyboard.type("corrected d k")
        page.keyboard.press("Escape")
        decided = {0: True, 1: False, 2: True, 3: False, 5: False, 6: True, 7: False, 8: True, 9: False, 10: False}
        wanted = {place: decided.get(number, before[place]) for number, place in enumerate(places)}
        assert page.locator(".count").inner_text().startswith("10 of 36 decided, ")
        page.reload()
        page.locator(".review select").select_option(label="all rows (36)")
        assert [state(page, number) for number in range(11)] == [
            "corrected" if number == 10 else "selected" if wanted[place] else "left out"
            for number, place in enumerate(places[:11])
        ]
        decisions = download(page, "Save decisions.csv", tmp_path)
        corrected = download(page, "Save corrected.jsonl", tmp_path)
    assert read_decisions(str(decisions)).selected == wanted
    (row,) = [json.loads(line) for line in corrected.read_text().splitlines()]
    original = json.loads(pool.read_text().splitlines()[int(places[10].rpartition(":")[2]) - 1])
    assert row == {**original, "completion": "corrected d k"}
    count = sum(wanted.values()) + 1
    files = ["--train", pool, corrected, "--drop-rows", decisions]
    steps = ["--steps", -(-count // 4) + 1]  # one pass, and a part of the second
    with visits() as trained:
        siftune(capsys, "train", "--model", base, *files, *TRAIN, *steps, "--out", tmp_path / "run")
    selected = {place for place, selected in wanted.items() if selected}
    assert {visit.place for visit in trained} == {*selected, f"{corrected}:1"}
    siftune(capsys, "report", tmp_path / "run", "--out", tmp_path / "run.html")
    copied = tmp_path / "run" / "drop_rows.csv"
    assert copied.read_text() == decisions.read_text()
    assert f"<code>{copied}</code> excludes: {36 - sum(wanted.values())} rows" in (tmp_path / "run.html").read_text()


def test_without_a_decision_the_file_says_what_the_list_says(browser, tmp_path):
    """Of a small pool, it has the same lines; of a large one, it leaves out the same rows."""
    for count in (60, 3000):
        folder = save_sifting(tmp_path / f"sifted{count}", save_pool(tmp_path / f"pool{count}.jsonl", count))
        path = make_page([str(folder)]).write(tmp_path / f"page{count}.html")
        with browsing(browser) as opened:
            saved = download(opened(path), "Save decisions.csv", tmp_path)
        text = (folder / "scores.csv").read_text(encoding="utf-8")
        if count == 60:
            assert sorted(saved.read_text(encoding="utf-8").splitlines()) == sorted(text.splitlines())
        decisions, before = (read_decisions(str(file)).selected for file in (saved, folder / "scores.csv"))
        assert decisions.items() <= before.items()
        assert all(before[place] for place in before.keys() - decisions.keys())


def test_a_corrected_row_is_left_out_until_it_is_decided_otherwise(browser, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 + 2?", "completion": " 5\\n"}\n{"prompt": "3?", "completion": "4"}\n')
    page_file = make_page(
        [str(save_list(tmp_path / "s.csv", [(f"{rows}:1", "2 + 2?", " 5\n"), (f"{rows}:2", "3?", "4")]))]
    )
    page_file.write(tmp_path / "page.html")
    with browsing(browser) as opened:
        page = opened(tmp_path / "page.html")
        row, save = row_at(page, 0), page.get_by_role("button", name="Save corrected.jsonl")
        assert save.is_disabled()
        row.get_by_role("button", name="Keep").click()
        assert state(page, 0) == "selected"
        row.get_by_role("button", name="Correct").click()
        assert state(page, 0) == "selected"  # nothing has changed yet
        row.locator("textarea").fill("4")
        assert (state(page, 0), row.locator(".correction").inner_text().strip()) == ("corrected", "4")
        assert "1 corrected" in page.locator(".count").inner_text()
        saved = download(page, "Save corrected.jsonl", tmp_path)
        assert json.loads(saved.read_text()) == {
            "prompt": "2 + 2?",
            "completion": " 4\n",
        }  # white space around it stays
        assert lines_of(download(page, "Save decisions.csv", tmp_path))[0]["selected"] == "no"
        row.locator("textarea").fill("  ")
        assert (state(page, 0), save.is_disabled()) == ("left out", True)  # no empty completion
        row.locator("textarea").fill("4")
        row.get_by_role("button", name="Keep").click()
        assert (state(page, 0), save.is_disabled()) == ("selected", True)
        page.keyboard.press("p")
        page.keyboard.press("c")
        page.keyboard.press("Escape")
        assert state(page, 0) == "corrected"  # the text is still there
        page.keyboard.press("u")
        assert (state(page, 0), page.locator(".count").inner_text()) == (
            "left out", "0 of 2 decided, 2 of 2 left out, 0 corrected"
        )  # fmt: skip


def test_keys_first_lead_to_the_rows_and_leave_other_fields_alone(browser, tmp_path):
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "pool.jsonl", 200))
    make_page([str(folder)]).write(tmp_path / "page.html")
    with browsing(browser) as opened:
        page = opened(tmp_path / "page.html")
        for key in ("ArrowDown", "Control+d", "d"):
            page.keyboard.press(key)
        assert page.locator(".count").inner_text().startswith("0 of 200")
        assert page.locator("li[aria-current]").evaluate("one => one === document.activeElement")
        first = page.locator("li[aria-current] .place").inner_text()
        page.keyboard.press("d")
        assert page.locator(".count").inner_text().startswith("1 of 200")
        assert page.locator("li[aria-current] .place").inner_text() != first
        page.locator(".review select").focus()
        page.keyboard.press("d")
        assert page.locator(".count").inner_text().startswith("1 of 200")
        page.locator(".review select").select_option("decided")
        assert page.locator(".review li:visible").count() == 1
        assert page.locator("li[aria-current] .place").inner_text() == first


def test_decisions_are_those_of_the_list(browser, tmp_path):
    """Another page of the same list has them, and a list with another content has none."""
    rows = [(f"/gone.jsonl:{number}", "x", "y") for number in (1, 2)]
    for name, lines in (("one", rows), ("same", rows), ("other", rows[:1])):
        make_page([str(save_list(tmp_path / f"{name}.csv", lines))]).write(tmp_path / f"{name}.html")
    with browsing(browser) as opened:
        row_at(opened(tmp_path / "one.html"), 0).get_by_role("button", name="Keep").click()
        assert state(opened(tmp_path / "same.html"), 0) == "selected"
        assert state(opened(tmp_path / "other.html"), 0) == "left out"


@pytest.mark.parametrize(
    "stored", ["[[0,", '{"a": 1}', "[[7, {}], 3]", '[[0, {"completion": "z"}]]', '[[0, {"selected": 1}]]']
)
def test_what_a_browser_stores_may_be_damaged(browser, tmp_path, stored):
    path = save_list(tmp_path / "s.csv", [("/gone.jsonl:1", "x", "y")])
    make_page([str(path)]).write(tmp_path / "page.html")
    with browsing(browser) as opened:
        page = opened(tmp_path / "page.html")
        row_at(page, 0).get_by_role("button", name="Keep").click()
        page.evaluate("text => localStorage.setItem(Object.keys(localStorage)[0], text)", stored)
        page.reload()
        assert state(page, 0) == "left out"
        assert page.locator(".count").inner_text() == "0 of 1 decided, 1 of 1 left out, 0 corrected"


def test_a_frame_without_storage_says_so(browser, tmp_path):
    html = make_page([str(save_list(tmp_path / "s.csv", [("/gone.jsonl:1", "x", "y")]))])._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html><body>{html}</body>", encoding="utf-8")
    with browsing(browser) as opened:
        page = opened(tmp_path / "notebook.html")
        frame = page.frame_locator("iframe")
        assert frame.get_by_text("does not store decisions").is_visible()
        frame.get_by_role("button", name="Keep").click()
        with page.expect_download() as waiting:
            frame.get_by_role("button", name="Save decisions.csv").click()
        waiting.value.save_as(tmp_path / "decisions.csv")
    assert lines_of(tmp_path / "decisions.csv")[0]["selected"] == "yes"


def test_rows_stay_text(browser, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": ATTACK, "completion": ATTACK}) + "\n")
    path = save_list(tmp_path / f"{'<img src=x>'}.csv", [(f"{rows}:1", ATTACK, ATTACK)])
    make_page([str(path)]).write(tmp_path / "page.html")
    with browsing(browser) as opened:
        page = opened(tmp_path / "page.html", 390)
        row = row_at(page, 0)
        row.get_by_role("button", name="Correct").click()
        row.locator("textarea").fill(f"{ATTACK}</script>")
        page.reload()
        assert row.locator("bdi").all_inner_texts() == [ATTACK, ATTACK, f"{ATTACK}</script>"]
        assert page.title() != "owned"
        assert page.locator("img").count() == 0
        assert page.locator("script:not([type])").count() == 1
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1280])
def test_a_thousand_rows_fit(browser, tmp_path, width):
    folder = save_sifting(tmp_path / "sifted", save_pool(tmp_path / "pool.jsonl", 1000, long=200))
    make_page([str(folder)]).write(tmp_path / "page.html")
    with browsing(browser, color_scheme="dark") as opened:
        page = opened(tmp_path / "page.html", width)
        page.locator(".review select").select_option(label="all rows (1,000)")
        assert page.locator(".review li:not([hidden])").count() == 1000
        page.keyboard.press("n")
        # more rows than are drawn, and no frame between the keys, as on a busy machine
        page.evaluate("""() => {
            const key = () => new KeyboardEvent("keydown", { key: "n", bubbles: true });
            for (let row = 0; row < 100; row++) document.body.dispatchEvent(key());
        }""")
        page.evaluate("""async () => {
            for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame);
        }""")
        current, bar = (page.locator(name).bounding_box() for name in ("li[aria-current]", ".bar"))
        assert bar["y"] + bar["height"] <= current["y"] + 1  # the bar does not hide the row
        assert current["y"] + current["height"] <= 900
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for button in row_at(page, 21).get_by_role("button").all():
            assert button.bounding_box()["height"] >= (40 if width == 390 else 24)
