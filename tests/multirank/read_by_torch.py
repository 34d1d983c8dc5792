"""Read checkpoints with nothing but torch (and transformers, to make a model): run as a program of its own.

    python read_by_torch.py DIRECTORY...

Each directory has a `checkpoint/`, what must be in it as `expected.pt` (flat), and the model's `config.json`. Prints
what was read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key
        else:
            assert found[key] == value, key


def load(into: dict[str, Any], directory: Path) -> None:
    dcp.load(into, storage_reader=dcp.FileSystemReader(directory), no_dist=True)


def read(directory: Path) -> None:
    expected = torch.load(directory / "expected.pt", weights_only=True)
    checkpoint = directory / "checkpoint"

    flat = {k: torch.full_like(v, 7) if isinstance(v, torch.Tensor) else None for k, v in expected.items()}
    load(flat, checkpoint)
    assert_same(flat, expected)

    dcp_to_torch_save(checkpoint, directory / "converted.pt")
    converted = torch.load(directory / "converted.pt", weights_only=True)
    assert_same(flatten_state_dict(converted)[0], expected)

    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    load(state, checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"]), name
        for part, value in optimizer.state[parameter].items():
            assert torch.equal(value, expected[f"optimizer.state.{name}.{part}"]), (name, part)
    assert optimizer.param_groups[0]["lr"] == expected["optimizer.param_groups.0.lr"] == 1e-3


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        read(Path(argument))
        print(f"read {Path(argument).name}")
    assert not any(name.startswith("stillframe") for name in sys.modules)
