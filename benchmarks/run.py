"""Measure rows: a fresh process for each side, repetitions in turn, medians, and outputs that are compared.

    python -m benchmarks utterance mixed-8 --against transformers --threads 1 --json docs/benchmarks/cpu.json

A side's time is processor time on one thread of a CPU, which other programs hardly disturb, and wall time elsewhere. Its
memory is what a call needs above what was held when all was built.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import gc
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.rows import ROWS, Row, Setting, Work

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"plain": "w2vc, plain", "fast": "w2vc, `speed_up`", "peer": "peer", "parent": "parent"}

# ---------------------------------------------------------------- one process: clock, memory, operations


def wait(device: str) -> None:
    """Let a GPU finish what it was given, so that a clock may be read."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Run a call once: seconds of wall time, and of processor time over all threads."""
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    told = call() or {}
    wait(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return float(told.get("seconds", wall)), float(told.get("cpu", cpu))


@torch.no_grad()
def product_rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a matrix product of the usual size: the roof for everything made of products."""
    a, b = torch.rand(512, 1024, device=device).to(dtype), torch.rand(1024, 4096, device=device).to(dtype)
    n = 50 if device == "cuda" else 1
    seconds = min(timed(lambda: [a @ b for _ in range(n)] and None, device)[0] for _ in range(3))
    return 2 * n * 512 * 1024 * 4096 / seconds


def count_flops(call: Callable[[], Any]) -> tuple[Any, int]:
    """Run something and count the operations of its products, convolutions and attention."""

    def attention(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **options: Any) -> int:
        return 5 * attention(q, k, v) // 2  # five products, the scores once more among them

    aten = torch.ops.aten  # torch's own counter leaves out the kernels of the CPU
    fused = {aten._scaled_dot_product_flash_attention_for_cpu: attention, aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        result = call()
    return result, int(counter.get_total_flops())


def status(key: str) -> int:
    """A line of this process's own record, in bytes (Linux)."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def memory_now(device: str) -> int:
    """Bytes that this process holds; from now on, `memory_peak` counts anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed goes back to the system, or nobody could see it used again
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def memory_peak(device: str) -> int:
    """The most bytes that this process held since `memory_now`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def limit_memory(gigabytes: float, device: str) -> None:
    """Let this process hold at most so much more than now; what asks for more fails with an error, not with a crash."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)
        )
    else:
        import resource

        resource.setrlimit(
            resource.RLIMIT_DATA, (status("VmData") + int(gigabytes * 1e9), resource.RLIM_INFINITY)
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory did not suffice."""
    words = ("can't allocate memory", "out of memory", "cannot allocate", "alloc_cpu", "could not create a")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def fastest_mode(work: Work, device: str) -> tuple[str, dict[str, Any]]:
    """Try every mode of a side twice, and choose the fastest; a mode that fails is written down."""
    tried: dict[str, Any] = {}
    for mode in work.modes if len(work.modes) > 1 else ():
        try:
            work.switch(mode)
            if "compiled" in mode or device != "cpu":
                work.call()
            tried[mode] = min(timed(work.call, device)[0] for _ in range(2))
        except Exception as error:  # whatever a compiler says, the other modes remain
            tried[mode] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
    usable = {mode: seconds for mode, seconds in tried.items() if isinstance(seconds, float)}
    best = min(usable, key=usable.__getitem__) if usable else work.modes[0]
    work.switch(best)
    return best, tried


def serve(name: str, side: str, s: Setting, send: Callable[..., None]) -> None:
    """Build one side of a row, keep its outputs, choose a mode; then run once for each line on standard input."""
    work = ROWS[name].make("fast" if side == "parent" else side, s)
    if side in {"plain", "peer"}:
        limit_memory(s.limit, s.device)
    count_flops(lambda: None)  # what the counter imports is not the work's
    start = memory_now(s.device)
    outputs, flops = count_flops(work.check or work.call)
    torch.save(
        {key: x.detach().cpu() for key, x in outputs.items() if isinstance(x, Tensor)},
        Path(s.folder) / f"{side}.pt",
    )
    del outputs
    mode, tried = fastest_mode(work, s.device)
    if "compiled" in mode:
        start = memory_now(s.device)  # what the compiler itself holds is not the model's
    send(mode=mode, tried=tried, flops=flops, about=work.about)
    for i, _ in enumerate(sys.stdin):
        roof = product_rate(work.dtype, s.device)
        if i == 0:  # what is given back to the system costs time to get again: once, for the memory
            memory_now(s.device)
        seconds, cpu = timed(work.call, s.device)
        send(seconds=seconds, cpu=cpu, memory=max(0, memory_peak(s.device) - start), roof=roof)


def child(text: str) -> None:
    """What a child process does: talk in lines of JSON over what was standard output; all else goes to standard error."""
    spec = json.loads(text)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    s = Setting(**spec["setting"])
    torch.set_num_threads(s.threads)
    sys.stdin.readline()  # "build"
    try:
        serve(spec["row"], spec["side"], s, send)
    except Exception as error:
        send(error=f"{type(error).__name__}: {error}"[:300], memory=is_out_of_memory(error))


# ---------------------------------------------------------------- the other process: turns, medians, verdicts


class Child:
    """One side of a row in a fresh process of its own."""

    def __init__(self, row: str, side: str, s: Setting, parent: str) -> None:
        spec = json.dumps({"row": row, "side": side, "setting": asdict(s)})
        paths = [parent if side == "parent" else str(ROOT), *filter(None, sys.path)]
        env = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(s.threads), "HF_HUB_OFFLINE": "1"}
        code = f"import sys, w2vc; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.run import child; child(sys.argv[1])"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=os.environ | env | {"TRANSFORMERS_VERBOSITY": "error"},
        )  # fmt: skip

    def ask(self) -> dict[str, Any]:
        """Let the child go on, and wait for its figures; RuntimeError or MemoryError if it cannot deliver."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended already
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            raise (MemoryError if code == -9 else RuntimeError)(
                f"ended with code {code}: {self.errors.read().strip()[-200:]}"
            )
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise (MemoryError if message["memory"] else RuntimeError)(message["error"])
        return message

    def close(self) -> None:
        """End the child."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest max|a - b| / max|b| over the outputs; ValueError if they differ in name or shape."""
    if {name: x.shape for name, x in ours.items()} != {name: x.shape for name, x in theirs.items()}:
        raise ValueError("the two sides have outputs of other names or shapes")
    worst = 0.0
    for name in theirs:
        a, b = ours[name].double(), theirs[name].double()
        gap = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        worst = max(worst, gap) if math.isfinite(gap) else math.inf
    return worst


def sum_up(side: dict[str, Any], answers: Sequence[Mapping[str, float]], roof: float, clock: str) -> None:
    """Condense the repetitions of one side: median and interquartile range, which a disturbance does not move."""
    samples = [a[clock] for a in answers]
    low, middle, high = (
        statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    )
    side |= {
        "seconds": middle,
        "spread": high - low,
        "samples": samples,
        "wall": statistics.median(a["seconds"] for a in answers),
    }
    side |= {"memory": int(max(a["memory"] for a in answers)), "share": side["flops"] / middle / roof}


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """Fill in the ratios and the verdict of a row; sides whose outputs differ get no ratio."""
    goal, fast, peer = row["goal"], row["fast"], row.get("peer")
    row |= {"ratios": {}, "memories": {}, "met": None, "note": ""}
    if not (row["difference"] or 0.0) <= row["tolerance"]:
        gap = f"the outputs differ by {row['difference']:.1e}, allowed is {row['tolerance']:.0e}"
        return row | {"met": False, "note": f"no ratio: {gap}"}
    for name in ("plain", "fast", "parent") if peer and not peer["failed"] else ():
        if (side := row.get(name)) and not side["failed"]:
            row["ratios"][name] = peer["seconds"] / side["seconds"]
            row["memories"][name] = side["memory"] / max(peer["memory"], 1)
    ratios, memories = row["ratios"], row["memories"]
    held = fast["memory"] / 1e9 if "memory" in fast else None
    at_least = {"ratio": ratios.get("fast"), "plain_ratio": ratios.get("plain"), "share": fast.get("share")}
    at_most = {"memory": memories.get("fast"), "plain_memory": memories.get("plain"), "gigabytes": held}
    asked = [got and got >= goal[name] for name, got in at_least.items() if goal[name] is not None]
    asked += [got and got <= goal[name] for name, got in at_most.items() if goal[name] is not None]
    if fast["failed"] or False in asked:
        row["met"] = False
    elif asked and None not in asked:
        row["met"] = True
    return row


def measure(
    row: Row, s: Setting, *, against: bool = True, parent: str = "", repeats: int | None = None
) -> dict[str, Any]:
    """Measure one row: its sides take turns, so that a disturbance hits all, and share the fastest product rate seen."""
    sides = [*row.sides, *["peer"] * (against or row.peer == "torch"), *["parent"] * bool(parent)]
    known = {name: getattr(row, name) for name in ("name", "title", "tolerance")}
    done: dict[str, Any] = known | dict.fromkeys(("plain", "fast", "peer", "parent", "difference"))
    done |= {"goal": asdict(row.goal), "about": {}, "day": time.strftime("%Y-%m-%d")}
    clock = "cpu" if s.device == "cpu" and s.threads == 1 else "seconds"
    with tempfile.TemporaryDirectory(prefix="w2vc-bench-") as folder, contextlib.ExitStack() as stack:
        s = replace(s, folder=folder)
        children = {name: Child(row.name, name, s, parent) for name in sides}
        answers: dict[str, list[Any]] = {name: [] for name in sides}
        for each in children.values():
            stack.callback(each.close)
        for turn in range(1 + (repeats or (row.repeats if s.size == "full" else 2))):
            for name, each in children.items():
                side = done[name] = done[name] or {"failed": ""}
                try:
                    told = each.ask() if not side["failed"] else {}
                except (RuntimeError, MemoryError) as error:
                    does_not_fit = f"does not fit (more than {s.limit:g} GB)"
                    side["failed"] = does_not_fit if isinstance(error, MemoryError) else f"failed: {error}"
                    continue
                if turn == 0 and told:
                    done["about"] |= told.pop("about")
                    side |= told
                elif told:
                    answers[name].append(told)
        going = [name for name in sides if not done[name]["failed"]]
        roof = max((a["roof"] for name in going for a in answers[name]), default=0.0)
        done["about"]["product rate, GFLOP/s"] = roof / 1e9
        for name in going:
            sum_up(done[name], answers[name], roof, clock)
        if "peer" in going and len(going) > 1 and math.isfinite(row.tolerance):
            outputs = {name: torch.load(Path(folder) / f"{name}.pt") for name in going}
            theirs = outputs.pop("peer")
            done["difference"] = max(difference(mine, theirs) for mine in outputs.values())
    return rounded(judge(done))


def rounded(value: Any) -> Any:
    """Keep four digits of every figure: more would be noise. What is not finite becomes None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- files and tables


def cell(side: Mapping[str, Any] | None) -> str:
    """One side's time, median ± half the interquartile range, or why there is none."""
    if not side or side["failed"]:
        return side["failed"] if side else "–"
    times = side["seconds"], side["spread"] / 2
    return " ± ".join(f"{x:.2f} s" if x >= 1 else f"{1000 * x:.3g} ms" for x in times)


def size(side: Mapping[str, Any] | None) -> str:
    """One side's memory."""
    if not side or side["failed"]:
        return "–"
    return f"{side['memory'] / 1e9:.2f} GB" if side["memory"] >= 1e8 else f"{side['memory'] / 1e6:.3g} MB"


def write_table(report: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """Write rows of a report (all of them, or those named) as a table in Markdown."""
    rows = [row for row in report["rows"] if names is None or row["name"] in names]
    sides = [side for side in SIDES if side != "parent" or any(row["parent"] for row in rows)]
    ours = [side for side in sides if side != "peer"]
    head = ["work", *(SIDES[side] for side in sides), f"peer over: {', '.join(SIDES[side] for side in ours)}",
            "memory, in the same order", "goal", "met"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        ratios = ", ".join(f"{row['ratios'][side]:.3g}x" if side in row["ratios"] else "–" for side in ours)
        met = {True: "yes", False: "no", None: "–"}[row["met"]] + (f": {row['note']}" if row["note"] else "")
        memory = ", ".join(size(row[side]) for side in sides)
        cells = [row["title"], *(cell(row[side]) for side in sides), ratios, memory, row["goal"]["text"], met]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def describe_machine(s: Setting) -> dict[str, Any]:
    """On what the figures were measured."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    found = re.search(r"model name\s*: (.*)", info)
    machine = {"cpu": found[1] if found else platform.processor(), "threads": s.threads, "device": s.device}
    machine |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return machine | ({"gpu": torch.cuda.get_device_name(0)} if s.device == "cuda" else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Rows: " + ", ".join(ROWS))
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help="rows to measure; all of this device by default"
    )
    parser.add_argument("--against", choices=["transformers"], help="measure it in the same run")
    parser.add_argument(
        "--parent", default="", help="folder of an older version, to be measured beside this one"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--limit", type=float, default=12.0, help="gigabytes that the peer and the plain forms may take"
    )
    parser.add_argument("--json", type=Path, help="file of the figures; rows that it has already are kept")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    chosen = parser.parse_args(arguments)
    for name in chosen.rows:
        if name not in ROWS:
            parser.error(
                f"there is no row {name!r}; the nearest is {difflib.get_close_matches(name, ROWS, 1, 0)[0]!r}"
            )
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    s = Setting(chosen.device, chosen.threads, "tiny" if chosen.tiny else "full", limit=chosen.limit)
    old = (
        json.loads(chosen.json.read_text())
        if chosen.json and chosen.json.is_file()
        else {"rows": [], "growth": {}}
    )
    report = old | {"machine": describe_machine(s)}
    for name in chosen.rows or [name for name, row in ROWS.items() if row.device == s.device]:
        done = measure(
            ROWS[name],
            s,
            against=bool(chosen.against),
            parent=os.path.abspath(chosen.parent) if chosen.parent else "",
        )
        print(
            name,
            *(f"{side} {cell(done[side])}" for side in SIDES if done[side]),
            done["note"],
            sep="  ",
            file=sys.stderr,
        )
        order = [*ROWS, *(row["name"] for row in old["rows"])]
        report["rows"] = sorted(
            [*(r for r in report["rows"] if r["name"] != name), done], key=lambda r: order.index(r["name"])
        )
        if chosen.json:
            draft = chosen.json.with_suffix(".part")  # whole, or not at all
            draft.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
            draft.replace(chosen.json)
    print(write_table(report, chosen.rows or None))
