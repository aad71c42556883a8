"""Threads, seeds, reasons to skip, and the summary line with the largest parity difference."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "docs")]  # helpers; book.py

import pytest
import torch

import helpers

started = time.time()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; its CPU sibling runs"))
        if "network" in item.keywords and os.environ.get("HF_HUB_OFFLINE") == "1":
            item.add_marker(pytest.mark.skip(reason="needs the hub (set HF_HUB_OFFLINE=0)"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run by make test-all"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--autoplay-policy=no-user-gesture-required"""  # players play without a click


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium for the tests of a module; without one they are skipped, or fail where one is required."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        if os.environ.get("W2VC_REQUIRE_BROWSER") == "1":
            pytest.fail("W2VC_REQUIRE_BROWSER=1, but there is no Chromium on the PATH")
        pytest.skip("no Chromium on the PATH: pages were checked as text, chapters ran without JupyterLab")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=chromium, args=FLAGS.split())
        yield chrome
        chrome.close()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect what a worker of pytest-xdist compared."""
    helpers.remember(getattr(node, "workeroutput", {}).get("worst", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["worst"] = helpers.worst


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if helpers.worst:
        name, gap = max(helpers.worst.items(), key=lambda pair: pair[1])
        terminalreporter.write_line(
            f"parity: {len(helpers.worst)} quantities compared, largest relative difference {gap:.1e} ({name})"
        )
    terminalreporter.write_line(f"run time of the tests: {time.time() - started:.0f} s")
