"""Threads, seeds, reasons to skip, and the summary line with the largest parity difference."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors: a second thread only waits
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.insert(0, str(Path(__file__).parent))

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if helpers.worst:
        name, gap = max(helpers.worst.items(), key=lambda pair: pair[1])
        terminalreporter.write_line(
            f"parity: {len(helpers.worst)} quantities compared, largest relative difference {gap:.1e} ({name})"
        )
    terminalreporter.write_line(f"run time of the tests: {time.time() - started:.0f} s")
