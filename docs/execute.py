"""Execute one chapter in a kernel of its own, and say how long it took.

python docs/execute.py nbs/model/masking.ipynb --out _build/executed/model/masking.ipynb
python docs/execute.py nbs/model/masking.ipynb --inplace

The executed copy serves the tests and the site alike. Beside it lies NAME.json with the seconds and the peak memory
of the kernel. A chapter that fails leaves no copy, so that make tries again, and its name and failing cell on the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from tqdm import tqdm

import book

CELL_TIMEOUT = 180  # seconds; a chapter as a whole stays under 60, this only ends a cell that hangs


def position(path: Path) -> str:
    """Where this notebook stands in the book: '[ 3/46]'."""
    names = book.chapters()
    name = (
        path.resolve().relative_to(book.NBS).with_suffix("").as_posix()
        if path.resolve().is_relative_to(book.NBS)
        else ""
    )
    return f"[{names.index(name) + 1:2}/{len(names)}]" if name in names else "[ - ]"


def execute(path: Path) -> tuple[nbformat.NotebookNode, dict[str, float]]:
    """Run every cell of `path` in a fresh kernel; returns the executed notebook and its cost."""
    nb = nbformat.read(path, as_version=4)
    # One thread a kernel: two chapters run side by side, and outputs do not depend on the number of cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONHASHSEED", "0")
    bar = tqdm(
        total=sum(c.cell_type == "code" for c in nb.cells),
        desc=f"{position(path)} {path.stem}",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with tempfile.TemporaryDirectory(prefix="w2vc-") as folder:
        km = AsyncKernelManager(kernel_name="python3")
        if os.name == "posix":  # sockets in a folder of our own: two kernels never fight for a port
            km.transport, km.ip = "ipc", str(Path(folder) / "kernel")
        client = NotebookClient(
            nb,
            km=km,
            timeout=CELL_TIMEOUT,
            startup_timeout=120,
            resources={"metadata": {"path": str(path.resolve().parent)}},
            on_cell_complete=lambda **_: bar.update(),
        )
        client.owns_km = True  # so that the client ends the kernel too
        start = time.perf_counter()
        try:
            client.execute()
        finally:
            bar.close()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # kB on Linux, bytes on macOS
    return nb, {
        "seconds": round(seconds, 1),
        "megabytes": round(peak / (1024 * (1024 if sys.platform == "darwin" else 1))),
    }


def write_notebook(nb: nbformat.NotebookNode, path: Path) -> None:
    """Write beside `path` first, then rename: a killed run leaves no half-written notebook."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    nbformat.write(nb, partial)
    partial.replace(path)


def main() -> int:
    """Execute one notebook named on the command line; the exit code is 1 if a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="where the executed copy goes")
    parser.add_argument("--inplace", action="store_true", help="store the outputs in the notebook itself")
    args = parser.parse_args()
    if bool(args.out) == args.inplace:
        parser.error("say either --out FILE or --inplace")
    label = f"{position(args.notebook)} {args.notebook.parent.name}/{args.notebook.stem}"
    try:
        nb, cost = execute(args.notebook)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{label}  FAILED\n{error}", file=sys.stderr)
        return 1
    except Exception as error:  # a kernel that died says so in one line, with the chapter's name
        print(f"{label}  FAILED: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    out = args.notebook if args.inplace else args.out
    write_notebook(nb, out)
    if not args.inplace:
        out.with_suffix(".json").write_text(json.dumps(cost))
    print(f"{label:<36} {cost['seconds']:5.1f} s {cost['megabytes']:6d} MB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
