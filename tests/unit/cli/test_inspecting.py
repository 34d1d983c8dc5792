"""`stillframe inspect`: what it says of exports and checkpoints, of stillframe and of others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import stillframe
from stillframe.cli import main as cli
from stillframe.testing import models
from tests.unit.load.distcp_directories import save


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    model = models.tiny_qwen3()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stillframe.Checkpointer(
        directory, model=model, optimizer=optimizer, publish_together=True, save_dtype="bfloat16", keep_in_fp32="norm"
    ) as ckpt:
        ckpt.save_hf(1, metrics={"loss": 1.5})
        ckpt.save_both(3)
    return directory


def inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["inspect", *arguments]) == 0
    return capsys.readouterr().out


def test_an_export(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    model = models.tiny_qwen3()
    kept = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    cast = sum(p.numel() for p in model.parameters()) - kept
    first, origin, files, versions, metrics, total, *dtypes = inspect(capsys, str(run_dir / "hf-1")).splitlines()
    assert first == str(run_dir / "hf-1")
    assert re.fullmatch(r"  hf of step 1, published 2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} by 1 rank", origin)
    assert re.fullmatch(r"  3 files, \d+\.\d kB", files)
    assert f"torch {torch.__version__}" in versions
    assert metrics == "  loss=1.5"
    assert total.startswith(f"  35 tensors, {cast + kept:,} elements, ")
    assert [line.partition(" elements")[0] for line in dtypes] == [f"    bfloat16: {cast:,}", f"    float32: {kept:,}"]


def test_both_parts_of_a_step(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    text = inspect(capsys, str(run_dir / "step-3"))
    firsts = [part.splitlines()[0] for part in text.split("\n\n")]
    assert firsts == [str(run_dir / "step-3/hf"), str(run_dir / "step-3/checkpoint")]
    assert inspect(capsys, str(run_dir / "step-3/checkpoint")) in text


def test_a_line_for_each_tensor(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    lines = inspect(capsys, str(run_dir / "hf-1"), "--tensors").splitlines()
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = "x".join(map(str, models.tiny_qwen3().get_parameter(name).shape))
    (line,) = [line for line in lines if line.split()[0] == name]
    assert re.fullmatch(rf"  {name} +bfloat16 {shape}, \d+\.\d kB, model\.safetensors", line)


def test_for_programs(capsys: pytest.CaptureFixture[str], run_dir: Path) -> None:
    export, checkpoint = json.loads(inspect(capsys, str(run_dir / "step-3"), "--json"))
    assert (export["format"], checkpoint["format"]) == ("hf", "checkpoint")
    assert export["path"] == str(run_dir / "step-3/hf")
    norm = next(tensor for tensor in export["tensors"] if tensor["name"] == "model.norm.weight")
    size = models.tiny_qwen3().get_parameter("model.norm.weight").numel()
    assert norm == {
        "name": "model.norm.weight",
        "dtype": "float32",
        "shape": [size],
        "size_bytes": 4 * size,
        "pieces": 1,
        "files": ["model.safetensors"],
    }
    assert {tensor["name"] for tensor in checkpoint["tensors"]} == {
        f"model.{name}" for name in models.tiny_qwen3().state_dict()
    }


def test_directories_that_others_wrote(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models.tiny_qwen3().save_pretrained(tmp_path / "hf")
    save(tmp_path / "dcp", {"one": torch.zeros(3, 4), "scalar": torch.tensor(1)})
    for name, tensors in (("hf", 35), ("dcp", 2)):
        lines = inspect(capsys, str(tmp_path / name)).splitlines()
        assert lines[1] == "  not written by stillframe: no stillframe.json"
        assert lines[2].startswith(f"  {tensors} tensors, ")
    assert "scalar  int64 scalar, 8 B" in inspect(capsys, str(tmp_path / "dcp"), "--tensors")


def test_a_damaged_header_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    models.tiny_qwen3().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "announce a header" in capsys.readouterr().err
