"""Build the distribution from settings.ini, the one place for metadata."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

extras = {
    key.removesuffix("_requirements"): shlex.split(cfg[key]) for key in cfg if key.endswith("_requirements")
}
extras["all"] = sorted(
    {
        need
        for name in ("audio", "viz", "hub", "data", "synth", "human", "train", "eval", "cli")
        for need in extras[name]
    }
)
extras["dev"] = sorted({need for needs in list(extras.values()) for need in needs})

setup(
    version=cfg["version"],
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["w2vc", "w2vc.*"]),
    package_data={"w2vc": ["py.typed", "assets/**/*"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={"nbdev": ["w2vc = w2vc._modidx:d"], "console_scripts": ["w2vc = w2vc.cli:main"]},
)
