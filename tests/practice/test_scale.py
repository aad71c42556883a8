"""The cost model of the scale chapter: its parts are what they claim to be, it follows what is counted and known, its settings start what they say."""

from __future__ import annotations

import ast
import json
import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import w2vc
from w2vc import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel
from w2vc.training.recipes import Recipe

CHAPTER = Path(__file__).parents[2] / "nbs" / "practice" / "scale.ipynb"
PURE = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom


def definitions() -> SimpleNamespace:
    """What the chapter defines: its cells that hold imports, functions and classes alone."""
    found: dict[str, Any] = {"__name__": __name__}
    for cell in json.loads(CHAPTER.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and all(isinstance(node, PURE) for node in ast.parse(source).body):
            exec(source, found)
    return SimpleNamespace(**found)


S = definitions()
CALM: dict[str, Any] = {
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "conformer_conv_dropout": 0.0,
    "feat_proj_dropout": 0.0, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip


def test_a_line_is_found() -> None:
    assert S.fit_line([1, 2, 5], [2.5, 3.0, 4.5]) == pytest.approx((2.0, 0.5))
    assert S.fit_line([1, 2], [1.0, 3.0]) == pytest.approx((0.0, 2.0))  # no negative start


def test_saved_bytes_count_each_storage_once_and_no_parameter() -> None:
    layer = torch.nn.Linear(4, 3)
    assert S.saved_bytes(layer, torch.randn(5, 4)) == 5 * 4 * 4  # its input; the weight is a parameter
    twice = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Sigmoid())
    assert S.saved_bytes(twice, torch.randn(10, requires_grad=True)) == 2 * 10 * 4  # the outputs


@pytest.mark.parametrize(
    "options", [{}, {"hidden_size": 128, "intermediate_size": 256}, {"feat_extract_norm": "layer"}]
)
def test_activations_by_formula_are_those_counted(options: dict[str, Any]) -> None:
    config = Wav2Vec2ConformerConfig.tiny(**CALM, **options)
    counted = S.saved_bytes(Wav2Vec2ConformerModel(config).train(), torch.randn(2, 32000))
    assert S.activation_bytes(config, 4.0) == pytest.approx(counted, rel=0.25)


def test_checkpointing_and_shards_save_what_they_should() -> None:
    config = Wav2Vec2ConformerConfig.large()
    assert S.activation_bytes(config, 60, checkpointing=True) < 0.5 * S.activation_bytes(config, 60)
    whole, part = (S.memory_per_device(config, 1000, 10, half=False, shards=n) for n in (1, 8))
    assert [whole[k] for k in ("weights", "gradients", "optimiser")] == [4000, 4000, 8000]
    assert [part[k] for k in ("weights", "gradients", "optimiser")] == [500, 500, 1000]
    assert whole["activations"] == part["activations"]


def test_the_ring() -> None:
    cluster = S.Cluster(link=100.0, network=10.0, latency=0.0)
    assert S.all_reduce_seconds(1000, 1, cluster) == 0
    assert S.all_reduce_seconds(1000, 2, cluster) == pytest.approx(10.0)
    assert S.all_reduce_seconds(1000, 16, cluster) == pytest.approx(
        2 * 15 / 16 * 100
    )  # the slowest link counts
    assert S.all_reduce_seconds(1000, 8, cluster, sharded=True) == pytest.approx(
        1.5 * S.all_reduce_seconds(1000, 8, cluster)
    )


@pytest.mark.parametrize(("name", "processes"), [("librispeech_base", 8), ("librivox_large", 16)])
def test_plans_of_the_recipes(name: str, processes: int) -> None:
    recipe = Recipe.load(name)
    free = S.Cluster(
        overhead=0.0, latency=0.0, network=math.inf, link=math.inf, loading=math.inf, disk=math.inf
    )
    for row in S.scaling_plan(recipe, processes, free):
        assert row.efficiency == pytest.approx(1.0)  # nothing is lost where nothing costs
        assert row.micro_batches * row.devices == processes * recipe.run.accumulate
    real = S.scaling_plan(recipe, processes)
    assert [a.days > b.days for a, b in pairwise(real)] == [True] * (len(real) - 1)
    assert all(0.3 < row.efficiency <= 1.0 + 1e-9 for row in real)
    heard = real[3].audio * real[3].days * 86400
    expected = recipe.run.steps * recipe.run.accumulate * processes * recipe.data.batch_seconds
    assert heard == pytest.approx(expected)


def test_what_breaks_is_named() -> None:
    recipe = Recipe.load("librivox_large")
    limits = {
        "memory": S.Cluster(memory=1e9), "network": S.Cluster(network=1e8), "loading": S.Cluster(loading=1.0),
        "saving": S.Cluster(disk=1e5), "overhead": S.Cluster(overhead=1e3), "compute": S.Cluster(network=1e15),
    }  # fmt: skip
    for limit, cluster in limits.items():
        (row,) = S.scaling_plan(recipe, 16, cluster, devices=(64,))
        assert row.limit == limit


@pytest.mark.parametrize("name", ["cpu_2", "cpu_2_fsdp", "ddp_8", "ddp_64", "ddp_128", "fsdp_8"])
def test_accelerate_reads_the_settings(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = Path(w2vc.__file__).parent / "assets" / "scale" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == int(name.split("_")[1])
    kind = "FSDP" if "fsdp" in name else "MULTI_GPU"
    assert config.distributed_type == kind
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    )
    assert args.num_processes == config.num_processes
    assert (args.use_fsdp if kind == "FSDP" else args.multi_gpu) is True
    if kind == "FSDP":
        assert (args.fsdp_version, args.fsdp_reshard_after_forward) == (2, True)
