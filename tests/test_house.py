"""The house itself: exports in sync, lint, types, the import graph, light imports, and a wheel that works elsewhere."""

from __future__ import annotations

import ast
import filecmp
import importlib
import importlib.metadata
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import w2vc

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "w2vc").with_suffix("").parts)
    for path in (ROOT / "w2vc").rglob("*.py")
    if not path.name.startswith("_")
)
# From the ground up: a module imports what stands before it, or beside it in its own package.
FLOORS = [
    "files.atomic", "files.hub", "config", "exercises", "model.features", "checks", "files.pretrained", "model", "data", "text.tokenizer", "data.batches", "text", "skeleton",
    "files", "evaluation.measures", "training", "evaluation", "explore", "cli",
]  # fmt: skip


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
    for path in (target / "w2vc").rglob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    # Run here, not only in the editable install: the copy must not import the original.
    for command in (
        ["nbdev-export"],
        ["ruff", "check", "-q", "--fix", "--select", "I", "w2vc"],
        ["ruff", "format", "-q", "w2vc"],
        ["nbdev-clean"],
    ):
        out = run(BIN / command[0], *command[1:], cwd=target)
        assert out.returncode == 0, out.stderr
    return target


def test_package_is_what_the_chapters_export(copy: Path) -> None:
    here, there = (
        {p.relative_to(root).as_posix() for p in (root / "w2vc").rglob("*.py")} for root in (ROOT, copy)
    )
    assert here == there, f"stale or missing modules: {here ^ there}; run make export"
    changed = [name for name in sorted(here) if not filecmp.cmp(ROOT / name, copy / name, shallow=False)]
    assert not changed, f"edited by hand, or not exported: {changed}; edit the chapter and run make export"


def test_notebooks_are_clean(copy: Path) -> None:
    dirty = [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "nbs").rglob("*.ipynb")
        if "checkpoints" not in p.as_posix() and p.read_bytes() != (copy / p.relative_to(ROOT)).read_bytes()
    ]
    assert not dirty, f"run nbdev-clean: {dirty}"


def test_ruff() -> None:
    out = run(BIN / "ruff", "check")
    assert out.returncode == 0, out.stdout
    out = run(BIN / "ruff", "format", "--check", "w2vc", "tests", "docs", "tools", "benchmarks")
    assert out.returncode == 0, out.stdout


def test_mypy() -> None:
    out = run(BIN / "mypy")
    assert out.returncode == 0, out.stdout


def test_version_is_the_same_everywhere() -> None:
    assert w2vc.__version__ == project()["version"] == importlib.metadata.version("w2vc")
    assert f"## {w2vc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def project() -> dict[str, Any]:
    """The metadata of the package."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def needs(extras: str) -> list[Requirement]:
    """What the package and some of its extras need, with the extras that an extra names."""
    optional, found, todo = project()["optional-dependencies"], project()["dependencies"], extras.split(",")
    while todo:
        for text in optional[todo.pop()]:
            requirement = Requirement(text)
            if requirement.name == "w2vc":
                todo += requirement.extras
            else:
                found = [*found, text]
    return [Requirement(text) for text in found]


def test_metadata_can_be_read_without_running_anything() -> None:
    known = project()
    assert {"version", "readme", "license", "dependencies", "optional-dependencies", "scripts"} <= set(known)
    assert "dynamic" not in known
    assert not (ROOT / "setup.py").exists(), "one place for metadata"
    assert not (ROOT / "settings.ini").exists(), "one place for metadata"
    parts = "audio,viz,hub,data,synth,human,train,eval,cli"
    assert {str(need) for need in needs("all")} == {str(need) for need in needs(parts)}
    assert {str(need) for need in needs("dev")} >= {str(need) for need in needs("all,onnx,lab,site,test")}


def test_colab_keeps_what_it_has_installed() -> None:
    """What a chapter's first cell installs there adds packages and replaces none, but OmegaConf for the library's recipes."""
    import colab

    lines = (ROOT / "tests" / "fixtures" / "colab-versions.txt").read_text(encoding="utf-8").splitlines()
    there = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert len(there) > 20
    assert there["ipython"] == "7.34.0"
    for kind, replaced in (("spine", set()), ("library", {"omegaconf"})):
        found = {canonicalize_name(need.name): need for need in needs(colab.EXTRAS[kind])}
        too_old = {
            name for name, need in found.items() if name in there and there[name] not in need.specifier
        }
        assert too_old == replaced, f"{kind}: {too_old} would be replaced"
    assert "2.3.0" not in Requirement("omegaconf>=2.4").specifier, "a bound above is noticed"


def test_each_module_says_what_its_chapter_promises() -> None:
    """The summary of a module is the promise under the title of its chapter: help(), the API pages and llms.txt say the same."""
    import book

    for module, name in book.modules().items():
        promise = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", book.heading(name)[1])
        assert (importlib.import_module(f"w2vc.{module}").__doc__ or "").strip() == promise, module


def test_forkers_have_a_workflow() -> None:
    import yaml

    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert {system.partition("-")[0] for system in matrix["os"]} == {"ubuntu", "macos"}
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert project()["requires-python"] == f">={matrix['python'][0]}"
    assert any("make test-code" in step.get("run", "") for step in job["steps"])


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / "w2vc" / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            up = ["w2vc", *module.split(".")][: -node.level] if node.level else []
            name = ".".join([*up, *([node.module] if node.module else [])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.removeprefix("w2vc.") for name in found if name.startswith("w2vc.")} & set(MODULES)


def floor(module: str) -> int:
    return max((len(name), i) for i, name in enumerate(FLOORS) if f"{module}.".startswith(f"{name}."))[1]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    for other in imports_of(module):
        assert floor(other) <= floor(module), f"{module} imports {other}, which stands above it"
        plain = module.startswith("model.") and module != "model.fast"
        assert not (plain and other == "model.fast"), "the plain model knows nothing of its fast forms"


def test_modules_do_not_import_each_other_in_circles() -> None:
    from graphlib import TopologicalSorter

    order = list(TopologicalSorter({module: imports_of(module) for module in MODULES}).static_order())
    assert len(order) == len(MODULES)


def test_public_things_are_documented() -> None:
    for name in MODULES:
        module = importlib.import_module(f"w2vc.{name}")
        assert module.__doc__, name
        for symbol in module.__all__:
            thing = getattr(module, symbol)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert inspect.getdoc(thing), f"{name}.{symbol} has no docstring"
            forward = vars(thing).get("forward") if inspect.isclass(thing) else None
            if forward is not None:
                assert "[" in (forward.__doc__ or ""), f"{name}.{symbol}.forward does not say its shapes"


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
