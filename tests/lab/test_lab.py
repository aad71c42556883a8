"""The chapters as a reader meets them: opened in a real JupyterLab, in a real browser, and run from top to bottom.

`make test` opens three chapters, `make test-all` all of them. One server and one page serve all; a picture of each chapter lies
in _build/lab/ afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

import book

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "_build" / "lab"
ALWAYS = {"00_start", "model/attention", "explore/codevectors"}
CHAPTER_SECONDS = 600  # a chapter takes under 20 alone; this only ends one that hangs
pytestmark = pytest.mark.browser

SETTINGS = {
    # All cells are in the page, not only those in view.
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    # Nothing pops up, nothing is asked of the network.
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the chapters to write into, and folders of its own for all that JupyterLab keeps."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def server(desk: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "runtime"}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JUPYTERLAB_SETTINGS_DIR": str(desk / "settings")}
    env |= {f"JUPYTER_{name}": str(desk / place) for name, place in places.items()}
    env |= {"JUPYTERLAB_WORKSPACES_DIR": str(desk / "workspaces"), "IPYTHONDIR": str(desk / "ipython")}
    trust = [sys.executable, "-m", "jupyter", "trust", *map(str, sorted((desk / "nbs").rglob("*.ipynb")))]
    subprocess.run(trust, env=env, check=True, capture_output=True)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--expose-app-in-browser", "--allow-root"]
    command += [
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=t",
    ]
    command += [f"--ServerApp.root_dir={desk / 'nbs'}", "--LabApp.extension_manager=readonly"]
    with (desk / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=desk, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):  # five minutes; this only ends one that hangs
            assert process.poll() is None, (desk / "server.log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{address}/api/status?token=t", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail("JupyterLab did not start: " + (desk / "server.log").read_text()[-3000:])
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def lab(browser: Any, server: str) -> Iterator[Any]:
    """JupyterLab in one page; `lab.problems` collects what goes wrong in it."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.problems = []
    tab.on("pageerror", lambda error: tab.problems.append(f"error: {error}"))
    tab.on(
        "request",
        lambda r: (
            None
            if r.url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))
            else tab.problems.append(f"request: {r.url}")
        ),
    )
    tab.goto(f"{server}/lab?token=t&reset", wait_until="load")
    tab.wait_for_function("window.jupyterapp !== undefined", timeout=120_000)
    tab.evaluate(
        "async () => { await jupyterapp.restored; await jupyterapp.commands.execute('application:close-all'); }"
    )
    tab.evaluate(
        "async () => { if (jupyterapp.shell.leftCollapsed === false) jupyterapp.shell.collapseLeft(); }"
    )
    yield tab
    tab.close()


OPEN_AND_RUN = """([path, seconds]) => Promise.race([(async () => {
  const app = jupyterapp;
  const panel = await app.commands.execute("docmanager:open", {path, factory: "Notebook"});
  await panel.context.ready;
  await panel.revealed;
  await panel.sessionContext.ready;
  app.shell.activateById(panel.id);
  const ok = await app.commands.execute("notebook:run-all-cells");
  await app.commands.execute("docmanager:save");
  return ok;
})(), new Promise((_, fail) => setTimeout(() => fail(new Error(path + " did not end in " + seconds + " s")), 1000 * seconds))])"""
CLOSE = """async () => {
  const panel = jupyterapp.shell.currentWidget;
  await panel.sessionContext.shutdown();
  panel.context.model.dirty = false;
  panel.close();
}"""


def run_chapter(lab: Any, desk: Path, name: str) -> nbformat.NotebookNode:
    """Open one chapter, run all of its cells, save it, and read what was saved."""
    path = f"{name}.ipynb"
    before = nbformat.read(desk / "nbs" / path, as_version=4)
    for cell in before.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(before, desk / "nbs" / path)  # what is saved later was made by this run
    assert lab.evaluate(OPEN_AND_RUN, [path, CHAPTER_SECONDS]), f"{name}: a cell raised\n{errors(desk, path)}"
    return nbformat.read(desk / "nbs" / path, as_version=4)


def errors(desk: Path, path: str) -> str:
    cells = nbformat.read(desk / "nbs" / path, as_version=4).cells
    found = [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    return "\n".join(f"{o.ename}: {o.evalue}" for o in found) or "(nothing was saved)"


def made_up(desk: Path, name: str, *sources: str) -> None:
    """Write a notebook of our own beside the chapters."""
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=spec), desk / "nbs" / f"{name}.ipynb")


def panel(lab: Any) -> Any:
    return lab.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


LOOK = """(e) => [e.innerText, ...[...e.querySelectorAll('canvas')].map((c) => c.toDataURL()),
  ...[...e.querySelectorAll('img')].filter((i) => i.offsetParent).map((i) => i.src)].join()"""


def moved(lab: Any, control: Any) -> bool:
    """Press arrow keys on something to play with, and tell whether the output around it shows something else."""
    around = control.locator(
        "xpath=ancestor::*[contains(concat(' ', @class, ' '), ' jp-OutputArea-output ')][1]"
    )
    control.scroll_into_view_if_needed()
    before = around.evaluate(LOOK)
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowDown"):  # one of these is not yet at the end
        control.press(key)
        for _ in range(10):
            if around.evaluate(LOOK) != before:
                return True
            lab.wait_for_timeout(50)
    return False


def show_the_last(shown: Any) -> str | None:
    """Scroll to the last explorer, or picture, or output: whatever the chapter has; returns its kind, None for nothing."""
    kinds = {
        "explorer": ".w2vc-explorer",
        "picture": ".jp-OutputArea-output img",
        "output": ".jp-OutputArea-output",
    }
    for kind, selector in kinds.items():
        there = shown.locator(f"{selector}:visible")
        if there.count():
            there.last.scroll_into_view_if_needed()
            return kind
    return None


def chapter_parameters() -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(name, id=name, marks=() if name in ALWAYS else slow) for name in book.chapters()]


@pytest.mark.parametrize("name", chapter_parameters())
def test_runs_in_jupyterlab(name: str, lab: Any, desk: Path) -> None:
    lab.problems.clear()
    nb = run_chapter(lab, desk, name)
    try:
        code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
        assert all(c.execution_count for c in code), "every cell ran"
        assert not [o for c in code for o in c.outputs if o.output_type == "error"]
        shown = panel(lab)
        pictures = shown.locator(".jp-OutputArea-output img")
        stored = sum(
            "<img" in "".join(o.get("data", {}).get("text/html", "")) for c in code for o in c.outputs
        )
        assert pictures.count() >= stored, "the page shows every picture that was stored"
        broken = "(all) => all.filter((i) => i.complete && i.naturalWidth === 0).map((i) => i.alt)"
        assert pictures.evaluate_all(broken) == []
        explorers = shown.locator(".w2vc-explorer")
        for explorer in explorers.all():
            explorer.scroll_into_view_if_needed()
            explorer.locator("xpath=self::*[@data-ready='yes']").wait_for(timeout=60_000)
            stops = explorer.locator(
                "[tabindex='0']:visible, select:visible, input[type=range]:visible"
            ).all()
            assert not stops or any(moved(lab, stop) for stop in stops), "it answers to no arrow key"
        sliders = shown.locator(".jp-OutputArea-output input[type=range]:visible").all()
        for k, slider in enumerate(sliders):
            assert moved(lab, slider), f"slider {k} changes nothing"
        show_the_last(shown)
        lab.screenshot(path=SHOTS / f"{name}.png")
        assert not lab.problems, lab.problems
    finally:
        lab.evaluate(CLOSE)


def test_a_failing_cell_is_noticed(lab: Any, desk: Path) -> None:
    """The test above can fail: a chapter whose second cell raises."""
    made_up(desk, "99_wrong", "x = 0", "1 / x", "x")
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_chapter(lab, desk, "99_wrong")
    lab.evaluate(CLOSE)


def test_a_slider_that_does_nothing_is_noticed(lab: Any, desk: Path) -> None:
    # JupyterLab's own short-cuts would swallow the arrow keys; the attribute, on what has the focus, keeps them away.
    page = '<div><input type="range" max="9" value="4" data-lm-suppress-shortcuts="true"{}><p>4</p></div>'
    live = page.format(' oninput="this.nextElementSibling.textContent = this.value"')
    source = f"from IPython.display import HTML, display\ndisplay(HTML({page.format('')!r}), HTML({live!r}))"
    made_up(desk, "99_sliders", source)
    run_chapter(lab, desk, "99_sliders")
    dead, works = panel(lab).locator("input[type=range]").all()
    assert not moved(lab, dead)
    assert moved(lab, works)
    lab.evaluate(CLOSE)


def test_a_chapter_is_shown_whatever_it_has(lab: Any, desk: Path) -> None:
    """Not every chapter has pictures: nothing waits for one that never comes."""
    picture = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
    drawn = f'from IPython.display import HTML\nHTML(\'<img alt="a dot" width=9 height=9 src="{picture}">\')'
    for name, source, kind in (
        ("99_silent", "x = 0", None),
        ("99_words", "1 + 1", "output"),
        ("99_drawn", drawn, "picture"),
    ):
        made_up(desk, name, source)
        run_chapter(lab, desk, name)
        assert show_the_last(panel(lab)) == kind
        lab.evaluate(CLOSE)
