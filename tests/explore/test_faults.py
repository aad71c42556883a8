"""The break-it lab lives in its chapter, which asserts what each fault does; here: the tests that it names exist, and fail."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import book

TESTS = Path(__file__).parents[1]
FAULT = r'^@fault\(.*?"(\S+\.py::\w+)"\)[^\n]*\ndef (\w+)'
NAMED = {name: test for test, name in re.findall(FAULT, book.code("explore/faults"), re.S | re.M)}


def test_each_fault_names_a_test_that_exists() -> None:
    assert len(NAMED) == 14
    for name in NAMED.values():
        file, test = name.split("::")
        assert re.search(rf"^def {test}\(", (TESTS / file).read_text(), re.M), name


LAB = """
import contextlib, io, sys, nbformat, pytest

for cell in nbformat.read("nbs/explore/faults.ipynb", as_version=4).cells:
    if cell.source.startswith("#| lab"):
        exec(cell.source)


class Count:
    failed = passed = 0

    def pytest_runtest_logreport(self, report):
        self.failed += report.failed


for fault in FAULTS.values():
    count = Count()
    with broken(fault.name), contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "-x", "-p", "no:cacheprovider", sys.argv[1] + "/" + fault.test], plugins=[count])
    for name in [name for name in sys.modules if "test_" in name]:
        del sys.modules[name]  # they hold what they imported while it was broken
    print(fault.name, count.failed)
"""


@pytest.mark.slow
def test_the_test_named_for_each_fault_fails() -> None:
    pytest.importorskip("transformers")
    out = subprocess.run(
        [sys.executable, "-c", LAB, str(TESTS)], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    failed = dict(line.split() for line in io.StringIO(out.stdout) if len(line.split()) == 2)
    assert {name: failed.get(name) for name in NAMED} == dict.fromkeys(NAMED, "1"), (
        out.stdout + out.stderr[-2000:]
    )
