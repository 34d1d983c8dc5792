"""The configuration: every key has a legal and an illegal value here, and every error names its key."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stillframe.errors import OptionError
from stillframe.train.config import SECTIONS, TrainConfig, as_record, key_name, load_config, parse_config

MINIMAL = """
run_dir = "runs/a"
[model]
path = "models/a"
[data]
files = ["a.jsonl"]
seq_len = 128
[training]
total_steps = 10
"""

# Key, a legal value, and values that are not.
KEYS: list[tuple[str, object, list[object]]] = [
    ("run_dir", "runs/b", ["", 1, ["runs"]]),
    ("seed", 5, [-1, 1.5, "5", True]),
    ("hooks", ["a.b:C"], ["a:B", ["a"], [":B"], ["a:"], [1]]),
    ("model.path", "models/b", ["", 3]),
    ("model.config", {"model_type": "qwen3"}, ["qwen3", {}]),
    ("model.tokenizer", "tokenizers/a", ["", 3]),
    ("model.dtype", "bfloat16", ["float64", "bf16", 16]),
    ("model.activation_checkpointing", True, ["yes", 1]),
    ("data.files", ["a", "b"], [[], "a", [1], [""]]),
    ("data.seq_len", 2, [1, 0, "128", 128.0]),
    ("training.total_steps", 1, [0, -1, 1.0]),
    ("training.epochs", 2, [0, -1, 1.5]),
    ("training.micro_batch_size", 4, [0, "4"]),
    ("training.gradient_accumulation_steps", 4, [0, True]),
    ("training.compute_dtype", "bfloat16", ["float16", "half"]),
    ("training.device", "cuda", ["gpu", "cuda:0"]),
    ("training.log_interval", 10, [0, -1]),
    ("optimizer.lr", 1e-3, [0, -1.0, float("inf"), float("nan"), "1e-3", True]),
    ("optimizer.min_lr_ratio", 1, [-0.1, 1.1, float("nan")]),
    ("optimizer.warmup_steps", 10, [-1, 0.5, 11]),
    ("optimizer.betas", [0.9, 0.999], [0.9, [0.9], [0.9, 1.0], [0.9, 0.99, 0.9], ["a", "b"]]),
    ("optimizer.eps", 1e-6, [0, -1e-8]),
    ("optimizer.weight_decay", 0, [-0.1, float("inf")]),
    ("optimizer.max_grad_norm", float("inf"), [0, -1, float("nan")]),
    ("export.hf_interval", 10, [0, -1, "10"]),
    ("export.hf_max_keep", -1, [0, -2, "all"]),
    ("export.async_hf_export", False, ["no", 0]),
    ("export.max_shard_size", "5GB", ["5GiB", "big", 0, -1, "0GB", True]),
    ("export.save_dtype", "bfloat16", ["fp16", "float8_e4m3fn", 8]),
    ("export.keep_in_fp32", ["norm"], ["norm", [1], ["("]]),
    ("export.keep_in_bf16", ["visual", "down_proj$"], ["visual", [None], ["*"]]),
    ("export.layout", "hub", ["Hub", None, 1]),
    ("export.file_naming", "per_rank", ["rank", True]),
    ("writer.nice", 5, [-1, 20, "5"]),
    ("writer.io_class", "idle", ["realtime", 3]),
    ("writer.export_slots", 2, [0, "2"]),
    ("writer.checkpoint_slots", 1, [0, True]),
    ("writer.bytes_per_s_max", 5e8, [0, -1, "1GB"]),
    ("checkpoint.checkpoint_interval", -1, [0, -2, 1.5, "10"]),
    ("checkpoint.checkpoint_maxkeep", 3, [0, -2, True]),
    ("checkpoint.snapshot_interval", 10, [0, -1, "10"]),
    ("checkpoint.async_checkpoint", False, ["no", 0]),
    ("checkpoint.publish_together", True, ["yes", 1]),
    ("checkpoint.save_frozen", False, ["no", 0]),
    ("checkpoint.on_failure", "continue", ["ignore", 1]),
    ("checkpoint.max_failures", 1, [0, "3"]),
    ("checkpoint.preemption", False, [0, "no"]),
    ("checkpoint.preemption_budget_s", 280, [0, -1, float("inf"), "25"]),
    ("export.on_failure", "abort", ["", None]),
    ("export.max_failures", 10, [0, True]),
    ("resume.auto", False, ["no", 0]),
    ("resume.from", "runs/a/checkpoint-10", ["", 10, True]),
    ("resume.fallback", True, ["yes", 1]),
    ("resume.load_optimizer", False, ["no", 0]),
    ("resume.load_schedule", False, ["no", 0]),
    ("resume.load_dataset", False, ["no", 0]),
    ("resume.load_rng", False, ["no", 0]),
]


def minimal() -> dict[str, Any]:
    return tomllib.loads(MINIMAL)


def with_value(key: str, value: object) -> dict[str, Any]:
    table = minimal()
    section, _, name = key.rpartition(".")
    inner = table.setdefault(section, {}) if section else table
    if key == "model.config":  # a fresh model instead of one from a directory
        del inner["path"]
        inner["tokenizer"] = "tokenizers/a"
    if section == "export":
        inner["save_dtype"] = "fp8"
    if section == "checkpoint":
        inner["checkpoint_interval"] = 10
    if section == "resume":
        inner["from"] = "runs/a/checkpoint-10"
    if key == "training.epochs":
        del inner["total_steps"]
    inner[name] = value
    return table


def test_every_key_is_tested() -> None:
    keys = {field.name for field in dataclasses.fields(TrainConfig)} - set(SECTIONS)
    keys |= {f"{name}.{key_name(field)}" for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)}
    assert keys == {key for key, _, _ in KEYS}


def test_every_key_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "trainer.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(documented) == sorted(key.rpartition(".")[2] for key, _, _ in KEYS)


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, value, _ in KEYS])
def test_legal_value_arrives(key: str, value: object) -> None:
    config: Any = parse_config(with_value(key, value), source="a.toml")
    record = as_record(config)
    for part in key.split("."):
        config = getattr(config, "from_dir" if part == "from" else part)
    assert config == (tuple(value) if isinstance(value, list) else value)
    assert record[key] == ("inf" if value == float("inf") else value)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record.keys() == {key for key, _, _ in KEYS}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, _, illegal in KEYS for value in illegal])
def test_illegal_value_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"^a\.toml: {re.escape(key)}\b") as caught:
        parse_config(with_value(key, value), source="a.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["surprise", "model.surprise", "data.epochs", "training.lr", "export.hf_intervall"])
def test_unknown_key_is_refused_with_the_known_ones(key: str) -> None:
    with pytest.raises(OptionError, match=rf"^a\.toml: {re.escape(key)}: unknown key; known here: .+"):
        parse_config(with_value(key, 1), source="a.toml")


@pytest.mark.parametrize(
    ("key", "dtype"), [("keep_in_fp32", None), ("keep_in_bf16", None), ("keep_in_bf16", "bfloat16")]
)
def test_a_list_of_what_is_not_cast_needs_a_cast(key: str, dtype: str | None) -> None:
    export = {key: ["norm"], **({} if dtype is None else {"save_dtype": dtype})}
    with pytest.raises(OptionError, match=rf"^a\.toml: export\.{key} means nothing without export\.save_dtype"):
        parse_config({**minimal(), "export": export}, source="a.toml")


@pytest.mark.parametrize("key", ["run_dir", "data.files", "data.seq_len"])
def test_missing_key_is_named(key: str) -> None:
    table = minimal()
    section, _, name = key.rpartition(".")
    del (table[section] if section else table)[name]
    with pytest.raises(OptionError, match=rf"^a\.toml: {re.escape(key)} is missing"):
        parse_config(table, source="a.toml")


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"path": None}, "exactly one of model.path"),
        ("model", {"config": {"model_type": "qwen3"}}, "exactly one of model.path"),
        ("model", {"path": None, "config": {"model_type": "qwen3"}}, "model.tokenizer is missing"),
        ("training", {"total_steps": None}, "exactly one of training.total_steps and training.epochs"),
        ("training", {"epochs": 1}, "exactly one of training.total_steps and training.epochs"),
        ("training", {"compute_dtype": "float32"}, "'float32' needs model.dtype = 'float32'"),
        ("optimizer", {"warmup_steps": 11}, "at most training.total_steps = 10"),
        ("checkpoint", {"checkpoint_maxkeep": 3}, "checkpoint_maxkeep means nothing without checkpoint.checkpoint_int"),
        ("checkpoint", {"publish_together": True}, "publish_together means nothing without checkpoint.checkpoint_int"),
        ("resume", {"load_rng": False}, "resume.load_rng = false means nothing without resume.from"),
    ],
)
def test_contradictions_are_refused(section: str, changes: dict[str, object], message: str) -> None:
    table = minimal()
    table["model"]["dtype"] = "bfloat16"
    inner = table.setdefault(section, {})
    inner.update(changes)
    table[section] = {name: value for name, value in inner.items() if value is not None}
    with pytest.raises(OptionError, match=re.escape(message)):
        parse_config(table, source="a.toml")


def test_section_that_is_a_value_is_refused() -> None:
    with pytest.raises(OptionError, match=r"^a\.toml: data = 3: must be a table, \[data\]"):
        parse_config(minimal() | {"data": 3}, source="a.toml")


def test_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    overrides = ["training.total_steps=3", "optimizer.lr = 1e-5", "run_dir=runs/bare words", 'data.files=["x", "y"]']
    config = load_config(path, [*overrides, "training.total_steps=4", "model.tokenizer=tokenizers/t"])
    assert config.training.total_steps == 4
    assert config.optimizer.lr == 1e-5
    assert config.run_dir == "runs/bare words"
    assert config.data.files == ("x", "y")
    assert config.model.tokenizer == "tokenizers/t"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.total_steps=0", "--set 'training.total_steps=0': training.total_steps = 0: must be an integer"),
        ("training.steps=1", "--set 'training.steps=1': training.steps: unknown key"),
        ("training.total_steps", "--set 'training.total_steps': expected KEY=VALUE"),
        ("=1", "--set '=1': expected KEY=VALUE"),
        ("run_dir.x=1", "--set 'run_dir.x=1': 'run_dir' is a value, not a table"),
    ],
)
def test_bad_override_is_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration .*a.toml: No such file"),
        (b"run_dir = \n", r"a.toml is not valid TOML: .*line 1"),
        (b"\xff\xfe", "a.toml is not UTF-8"),
    ],
)
def test_bad_file_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        load_config(path)
