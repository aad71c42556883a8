"""Keep the demo checkpoint of `w2vc/assets/demo`: pack finished runs into it, measure it, and write its model card.

python tools/demo_card.py pack runs/demo_pretrain             # weights in fp16, and curves
python tools/demo_card.py pack runs/demo_ctc ctc              # likewise keyword, speaker, frame
python tools/demo_card.py curves runs/collapse collapse       # curves alone
python tools/demo_card.py measure ctc --sets builtin          # neither espeak-ng nor a network is needed
python tools/demo_card.py measure --write                     # all figures, and the card
python tools/demo_card.py card                                # the card again, from figures.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from w2vc import load_demo
from w2vc.config import Wav2Vec2ConformerConfig
from w2vc.data.audio import Wav2Vec2FeatureExtractor
from w2vc.data.corpus import load_speech
from w2vc.evaluation.reports import Measure, evaluate, model_class
from w2vc.files.pretrained import demo_folder, save_head
from w2vc.text.tokenizer import Wav2Vec2Processor
from w2vc.training.demo import demo_curves, demo_figures
from w2vc.training.monitoring import read_metrics
from w2vc.training.recipes import Recipe

DEMO = demo_folder().parent
VOICES, MORE_VOICES = "built-in, 8 unseen voices", "synthetic, 8 unseen voices"
PEOPLE = "people: unseen English prompts"
TRIALS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {  # head -> title -> set, filter
    "pretrained": {VOICES: ("builtin", {}), MORE_VOICES: ("synthetic", {}), PEOPLE: ("asterisk-en", {})},
    "ctc": {VOICES: ("builtin", {}), MORE_VOICES: ("synthetic", {}), PEOPLE: ("asterisk-en", {})},
    "keyword": {VOICES: ("builtin", {"kind": "keyword"}), MORE_VOICES: ("synthetic", {"kind": "keyword"})},
    "speaker": {VOICES: ("builtin", {"kind": ["sentence", "digits"]}), MORE_VOICES: ("synthetic", {})},
    "frame": {VOICES: ("builtin-mixes", {}), MORE_VOICES: ("synthetic-mixes", {})},
}
Goals = dict[tuple[str, str], dict[str, float]]
GOALS: Goals = {  # head, figure -> set -> what we had set ourselves: at least, or, if negative, at most
    ("pretrained", "contrastive accuracy"): {VOICES: 0.55, MORE_VOICES: 0.55},
    ("pretrained", "codes in use"): {VOICES: 0.65, MORE_VOICES: 0.65},
    ("pretrained", "twins"): {VOICES: -0.03, MORE_VOICES: -0.03},
    ("pretrained", "I(code; phone) / H(phone)"): {VOICES: 0.42, MORE_VOICES: 0.42},
    ("pretrained", "phone probe"): {VOICES: 0.55, MORE_VOICES: 0.55},
    ("ctc", "CER"): {VOICES: -0.06, MORE_VOICES: -0.06, PEOPLE: -0.35},
    ("ctc", "CER digits"): {VOICES: -0.02, MORE_VOICES: -0.02},
    ("keyword", "accuracy"): {VOICES: 0.95, MORE_VOICES: 0.95},
    ("speaker", "EER"): {VOICES: -0.08, MORE_VOICES: -0.08},
}


def pack_run(run: Path, head: str | None = None, demo: Path = DEMO) -> None:
    """Put a finished run into the package: weights in fp16 (of a frozen encoder's head the head alone), and curves."""
    source = run / ("best" if (run / "best" / "config.json").exists() else "last")  # without a validation set
    model = model_class(source).from_pretrained(source, dtype=torch.float16)
    folder = demo / (head or "pretrained")
    if head in {None, "ctc"}:
        model.save_pretrained(folder)
    else:
        save_head(model, folder, encoder="../pretrained")
    processor = Wav2Vec2Processor if head == "ctc" else Wav2Vec2FeatureExtractor
    processor.from_pretrained(source).save_pretrained(folder)
    pack_curves(run, head or "pretraining", demo)


def pack_curves(run: Path, name: str, demo: Path = DEMO, lines: int = 50) -> None:
    """Put a run's records into the package: of each kind the first 8 and, spread evenly up to the last, `lines` more."""
    records = read_metrics(run)
    left_out = {"samples", "gradients", "clipped", "skipped", "dropped", "waiting", "audio"}
    kept: list[dict[str, Any]] = []
    for kind in sorted({record["kind"] for record in records}):
        these = [record for record in records if record["kind"] == kind]
        every = -(-len(these) // lines)
        kept += [record for i, record in enumerate(these) if i < 8 or (len(these) - 1 - i) % every == 0]
    text = "".join(json.dumps({k: v for k, v in r.items() if k not in left_out}) + "\n" for r in kept)
    (demo / "curves").mkdir(parents=True, exist_ok=True)
    (demo / "curves" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def measure_demo(
    heads: Iterable[str] = tuple(TRIALS),
    *,
    sets: Iterable[str] | None = None,
    draws: int = 1000,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure the checkpoint on speech that it never heard.

    Args:
        heads: keys of `TRIALS`.
        sets: only these sets of `load_speech`; None: all.
        draws: of the bootstrap.
        progress: show bars.

    Returns:
        head -> title of the set -> `Report.to_dict()` without its details.
    """
    wanted = None if sets is None else set(sets)
    found: dict[str, Any] = {}
    for head in heads:
        for title, (name, only) in TRIALS[head].items():
            if wanted is not None and name not in wanted:
                continue
            options: dict[str, Any] = {"draws": draws, "progress": progress}
            if head == "pretrained":
                options["recipe"] = Recipe.load("demo_pretrain")
                if name != "asterisk-en":  # phones are known
                    options["probe_speech"] = load_speech("builtin", "train")
            folder = demo_folder(None if head == "pretrained" else head)
            report = evaluate(
                folder, load_speech(name, "test").filter(**only), dtype=torch.float32, **options
            ).to_dict()
            del report["details"]
            found.setdefault(head, {})[title] = report
    return found


def goals_met(figures: dict[str, Any]) -> dict[tuple[str, str, str], bool]:
    """Say of every goal whether the figures reach it: head, figure, set -> met; sets that were not measured are left out."""
    found = {}
    for (head, name), bounds in GOALS.items():
        for title, bound in bounds.items():
            if (report := figures.get(head, {}).get(title)) is not None:
                value = report["measures"][name]["value"]
                found[head, name, title] = value >= bound if bound > 0 else value <= -bound
    return found


def goal_table(figures: dict[str, Any]) -> str:
    """The goals, what was reached, and whether that is enough, as a table of Markdown."""
    rows = ["| what we had set ourselves | goal | set | reached | |", "| --- | --- | --- | --- | --- |"]
    for (head, name, title), met in goals_met(figures).items():
        bound, value = GOALS[head, name][title], figures[head][title]["measures"][name]["value"]
        goal = f"at {'least' if bound > 0 else 'most'} {100 * abs(bound):.0f} %"
        rows.append(
            f"| `{head}/` {name} | {goal} | {title} | {100 * value:.1f} % | {'met' if met else '**missed**'} |"
        )
    return "\n".join(rows)


def figure_tables(figures: dict[str, Any]) -> str:
    """All figures, a table of Markdown for each head."""
    rows: list[str] = []
    for head, sets in figures.items():
        rows += [
            f"### `{head}/`",
            "",
            "| set | figure | value | 95 % interval | |",
            "| --- | --- | --- | --- | --- |",
        ]
        for title, report in sets.items():
            for name, found in report["measures"].items():
                numbers = [
                    math.nan if found[key] is None else float(found[key]) for key in ("value", "low", "high")
                ]
                measure = Measure(numbers[0], numbers[1], numbers[2], found["note"], found["percent"])
                value, interval = measure.texts()
                rows.append(f"| {title} | {name} | {value} | {interval} | {measure.note} |")
        rows.append("")
    return "\n".join(rows)


def model_card(figures: dict[str, Any]) -> str:
    """Fill the figures into the text of `demo_card.md`."""
    few, scratch = (
        min(r["cer"] for r in demo_curves(f"labels_15min{end}", "valid")) for end in ("", "_scratch")
    )
    comparison = (
        "### What pre-training is worth\n\nCTC with a quarter of an hour of labels (recipe `demo_few_labels`, 800 steps): character error rate on the dev voices of `synthetic` "
        f"{100 * few:.1f} % from the pre-trained weights, {100 * scratch:.1f} % from random ones.\n"
    )
    return Path(__file__).with_suffix(".md").read_text(encoding="utf-8").format(
        millions=load_demo().num_parameters() / 1e6,
        choices=Wav2Vec2ConformerConfig.from_pretrained(demo_folder()).num_negatives + 1,
        about="utterances of voices that no training set has, and English prompts that were kept apart",
        tables=figure_tables(figures), comparison=comparison, goals=goal_table(figures),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pack = commands.add_parser("pack", help="put a finished run into the package")
    pack.add_argument("run", type=Path)
    pack.add_argument("head", nargs="?", choices=["ctc", "keyword", "speaker", "frame"])
    curves = commands.add_parser("curves", help="put only the curves of a run into the package")
    curves.add_argument("run", type=Path)
    curves.add_argument("name")
    measure = commands.add_parser(
        "measure", help="measure the checkpoint on speech that was in no training set"
    )
    measure.add_argument("heads", nargs="*", choices=[*TRIALS, []], default=[])
    measure.add_argument("--sets", help="only these, such as builtin,builtin-mixes")
    measure.add_argument("--write", action="store_true", help="write figures.json and the card")
    commands.add_parser("card", help="write the card from figures.json")
    given = parser.parse_args(arguments)
    if given.command == "pack":
        pack_run(given.run, given.head)
    elif given.command == "curves":
        pack_curves(given.run, given.name)
    elif given.command == "measure":
        if given.write and (given.heads or given.sets):
            parser.error("--write needs all heads and all sets: the card has them all")
        sets = given.sets.split(",") if given.sets else None
        figures = measure_demo(given.heads or tuple(TRIALS), sets=sets, progress=True)
        print(figure_tables(figures))
        if given.write:
            (DEMO / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    if given.command == "card" or (given.command == "measure" and given.write):
        (DEMO / "README.md").write_text(model_card(demo_figures()), encoding="utf-8")


if __name__ == "__main__":
    main()
