"""The house itself: exports in sync, lint, types, the import graph, light imports, and a wheel that works elsewhere."""

from __future__ import annotations

import ast
import configparser
import filecmp
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import w2vc

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CHAPTERS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
CORE = {
    "features", "masking", "negatives", "quantizer", "positions", "attention", "convolution", "conformer",
    "pretrained", "checks", "model", "pretraining", "ctc", "classification", "speaker",
}  # fmt: skip
LEAVES = {"viz", "explore", "codevectors", "tracing", "faults", "views", "exercises", "benchmark", "cli"}


def module_numbers() -> dict[str, int]:
    """Module name -> number of the chapter that exports it."""
    numbers = {}
    for path in CHAPTERS:
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        if found := re.match(r"#\|\s*default_exp\s+(\w+)", first):
            numbers[found[1]] = int(path.name[:2])
    return numbers


NUMBERS = module_numbers()


def run(
    *command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def tracked() -> list[str]:
    """Files that git tracks or would track, as a fresh clone would have them."""
    out = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if out.returncode:
        pytest.skip("not a git checkout: there is no list of the project's files")
    return [name for name in out.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, exported and cleaned anew."""
    target = tmp_path_factory.mktemp("copy")
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    for path in (target / "w2vc").glob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    # Run here, not only in the editable install: the copy must not import the original.
    for command in (["nbdev-export"], ["ruff", "check", "-q", "--fix", "--select", "I", "w2vc"], ["ruff", "format", "-q", "w2vc"], ["nbdev-clean"]):
        out = run(BIN / command[0], *command[1:], cwd=target)
        assert out.returncode == 0, out.stderr
    return target


def test_package_is_what_the_chapters_export(copy: Path) -> None:
    here = {p.name for p in (ROOT / "w2vc").glob("*.py")}
    there = {p.name for p in (copy / "w2vc").glob("*.py")}
    assert here == there, f"stale or missing modules: {here ^ there}; run make export"
    changed = [
        name
        for name in sorted(here)
        if not filecmp.cmp(ROOT / "w2vc" / name, copy / "w2vc" / name, shallow=False)
    ]
    assert not changed, f"edited by hand, or not exported: {changed}; edit the chapter and run make export"


def test_notebooks_are_clean(copy: Path) -> None:
    dirty = [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if "checkpoints" not in p.as_posix() and p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()
    ]
    assert not dirty, f"run nbdev-clean: {dirty}"


def test_ruff() -> None:
    out = run(BIN / "ruff", "check", "w2vc", "nbs", "tests", "docs", "setup.py")
    assert out.returncode == 0, out.stdout
    out = run(BIN / "ruff", "format", "--check", "w2vc", "tests", "docs", "setup.py")
    assert out.returncode == 0, out.stdout


def test_mypy() -> None:
    out = run(BIN / "mypy")
    assert out.returncode == 0, out.stdout


def test_version_is_the_same_everywhere() -> None:
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert w2vc.__version__ == settings["DEFAULT"]["version"] == importlib.metadata.version("w2vc")
    assert f"## {w2vc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def imports_of(path: Path) -> set[str]:
    """Modules of the package that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("w2vc"):
            found.add((node.module or "").partition(".")[2])
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("w2vc.")}
    return found - {""}


@pytest.mark.parametrize("module", sorted(NUMBERS))
def test_imports_point_downward(module: str) -> None:
    for other in imports_of(ROOT / "w2vc" / f"{module}.py"):
        drawn = other == "viz" and module in LEAVES  # pictures come last in the book, but explorers draw, too
        job = (
            other == "fast" and module not in CORE
        )  # told late in the book, used wherever a model does a job
        assert drawn or job or NUMBERS[other] < NUMBERS[module], (
            f"{module} (chapter {NUMBERS[module]}) imports {other} ({NUMBERS[other]})"
        )
        assert other not in LEAVES or module in LEAVES, f"{module} imports the leaf {other}"


def test_public_names_are_unique_and_documented() -> None:
    owner: dict[str, str] = {}
    for name in NUMBERS:
        module = importlib.import_module(f"w2vc.{name}")
        assert module.__doc__, name
        for symbol in module.__all__:
            assert symbol not in owner, f"{symbol} is exported by {owner[symbol]} and {name}"
            owner[symbol] = name
            thing = getattr(module, symbol)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{name}.{symbol} has no docstring"
            forward = vars(thing).get("forward") if inspect.isclass(thing) else None
            if forward is not None:
                doc = forward.__doc__ or ""
                assert "[" in doc, f"{name}.{symbol}.forward does not say its shapes"


def test_everything_in_all_is_importable() -> None:
    for name in w2vc.__all__:
        assert getattr(w2vc, name) is not None


def test_import_is_light() -> None:
    heavy = [
        "soundfile",
        "soxr",
        "datasets",
        "matplotlib",
        "IPython",
        "huggingface_hub",
        "transformers",
        "scipy",
        "av",
        "pandas",
        "torch._dynamo",  # two seconds
    ]
    code = f"import sys, w2vc; print([m for m in {heavy!r} if m in sys.modules])"
    out = run(sys.executable, "-c", code)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_built_wheel_works_outside_the_repository(copy: Path, tmp_path: Path) -> None:
    # sdist first, then the wheel from the sdist: what an index would serve.
    out = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", cwd=copy)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    wheel = next((tmp_path / "dist").glob("*.whl"))
    site = tmp_path / "site"
    out = run(
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr
    code = (
        "import w2vc, pathlib; print(pathlib.Path(w2vc.__file__).parent.parent)\n"
        "u = w2vc.load_speech()[0]; print(len(u.audio) > 0, bool(u.text), bool(u.phones))\n"
        "m = w2vc.Wav2Vec2ConformerModel(w2vc.Wav2Vec2ConformerConfig.tiny()); print(m.num_parameters() > 0)"
    )
    out = run(sys.executable, "-c", code, cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert out.stdout.split() == [str(site), "True", "True", "True", "True"], out.stdout + out.stderr
    command = (site / "bin" / "w2vc") if os.name == "posix" else (site / "Scripts" / "w2vc.exe")
    out = run(command, "--help", cwd=tmp_path, env={"PYTHONPATH": str(site)})
    assert out.returncode == 0, out.stderr
    assert "transcribe" in out.stdout


def test_nothing_names_a_machine() -> None:
    """No absolute path of anybody's machine stands in a tracked text file."""
    pattern = re.compile(r"/(?:work|root|home/\w+|Users/\w+)/\w")
    found = []
    for name in tracked():
        path = ROOT / name
        if (
            path.suffix in {".py", ".ipynb", ".md", ".toml", ".ini", ".txt", ".json"}
            and path != Path(__file__).resolve()
        ):
            found += [f"{name}: {m.group(0)}" for m in pattern.finditer(path.read_text(encoding="utf-8"))][:1]
    assert not found, found
