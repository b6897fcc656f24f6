"""A few run folders, written once, and a browser where there is one."""

import os
import shutil

import pytest
from support.report_runs import save_eval, save_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Name -> folder of a run: dense, ist and gast, of which all were measured on the same rows."""
    folder = tmp_path_factory.mktemp("runs")
    methods = ("dense", "ist", "gast")
    made = {method: save_run(folder / method, method, seed=seed) for seed, method in enumerate(methods)}
    for number, run in enumerate(made.values()):
        save_eval(run, tuned=0.5 + number / 10)
    return made


def missing_browser():
    """Why there is no browser; None where there is one."""
    try:
        import playwright  # noqa: F401
    except ModuleNotFoundError:
        return "the package playwright is not installed"
    return None if CHROMIUM else "there is no Chromium on the PATH"


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; without one a test is skipped, but for the machine where everything must hold."""
    reason = missing_browser()
    if reason is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()
