"""The trainer's configuration: a TOML file as frozen dataclasses, every key validated here.

The dataclasses below are the reference of the keys: section by section, with their rules and defaults. A key that is
not there, a value that its rule refuses or a combination that means nothing is an `OptionError` that names the key,
where it came from, the value and what is legal. Relative paths are relative to the directory the command runs in.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from stillframe.errors import OptionError
from stillframe.notice import BUDGET_S
from stillframe.train import rules
from stillframe.train.rules import Rule

Table = dict[str, Any]
Section = TypeVar("Section")


def key(rule: Rule, default: Any = dataclasses.MISSING, *, name: str | None = None) -> Any:
    """A field of a section: its rule, its default unless it must be given, its name in the file if that is another."""
    return dataclasses.field(default=default, metadata={"rule": rule, "name": name})


def key_name(field: dataclasses.Field[Any]) -> str:
    """What the field is called in the file."""
    return field.metadata.get("name") or field.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """[model] What is trained: a Transformers directory (`path`), or a fresh model from a `[model.config]` table.

    `tokenizer` is a directory; it defaults to `path`. `dtype` is that of the parameters, the optimizer's state and,
    without `export.save_dtype`, the exported weights; computing in bfloat16 is `training.compute_dtype`.
    """

    path: str | None = key(rules.text, None)
    config: Mapping[str, Any] | None = key(rules.table, None)
    tokenizer: str | None = key(rules.text, None)
    dtype: str = key(rules.one_of("float32", "bfloat16"), "float32")
    activation_checkpointing: bool = key(rules.boolean, False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """[data] JSON Lines files of documents (`{"text": ...}` or `{"messages": [...]}`), packed in `seq_len` tokens."""

    files: tuple[str, ...] = key(rules.list_of(rules.text, of_what="paths", at_least=1))
    seq_len: int = key(rules.integer(at_least=2))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """[training] How long, how much at once, and where. Exactly one of `total_steps` and `epochs` is given.

    `compute_dtype` defaults to `model.dtype`. One optimizer step takes `micro_batch_size` sequences per rank,
    `gradient_accumulation_steps` times.
    """

    total_steps: int | None = key(rules.integer(at_least=1), None)
    epochs: int | None = key(rules.integer(at_least=1), None)
    micro_batch_size: int = key(rules.integer(at_least=1), 1)
    gradient_accumulation_steps: int = key(rules.integer(at_least=1), 1)
    compute_dtype: str | None = key(rules.one_of("float32", "bfloat16"), None)
    device: str = key(rules.one_of("auto", "cpu", "cuda"), "auto")
    log_interval: int = key(rules.integer(at_least=1), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """[optimizer] AdamW; the rate rises linearly for `warmup_steps` and falls as a cosine to `lr * min_lr_ratio`.

    `max_grad_norm = inf` leaves gradients unclipped.
    """

    lr: float = key(rules.number(above=0), 3e-4)
    min_lr_ratio: float = key(rules.number(at_least=0, at_most=1), 0.1)
    warmup_steps: int = key(rules.integer(at_least=0), 0)
    betas: tuple[float, float] = key(rules.pair(rules.number(at_least=0, below=1)), (0.9, 0.95))
    eps: float = key(rules.number(above=0), 1e-8)
    weight_decay: float = key(rules.number(at_least=0), 0.1)
    max_grad_norm: float = key(rules.number(above=0, or_inf=True), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """[export] Hugging Face checkpoints `hf-<step>` in the run directory.

    Without `hf_interval` there is one, at the end; with it, one at each multiple and one at the last step. Without
    `hf_max_keep`, or with -1, all are kept. With `async_hf_export = false` training waits for each. `save_dtype` casts
    or quantizes the weights in the export, as the Checkpointer's option does, but for those that `keep_in_fp32` and
    `keep_in_bf16` name, by regular expressions. `layout` and `file_naming` are the Checkpointer's, too. `on_failure`
    says what a failed export leads to; with "continue" at most `max_failures` in a row.
    """

    hf_interval: int | None = key(rules.integer(at_least=1), None)
    hf_max_keep: int | None = key(rules.integer(at_least=1, or_minus_one=True), None)
    async_hf_export: bool = key(rules.boolean, True)
    max_shard_size: str | int = key(rules.size, "50GB")
    save_dtype: str | None = key(rules.one_of("bfloat16", "fp8"), None)
    keep_in_fp32: tuple[str, ...] = key(rules.list_of(rules.pattern, of_what="regular expressions"), ())
    keep_in_bf16: tuple[str, ...] = key(rules.list_of(rules.pattern, of_what="regular expressions"), ())
    layout: Literal["transformers", "hub"] = key(rules.one_of("transformers", "hub"), "transformers")
    file_naming: Literal["standard", "per_rank"] = key(rules.one_of("standard", "per_rank"), "standard")
    on_failure: Literal["raise", "abort", "continue"] = key(rules.one_of("raise", "abort", "continue"), "raise")
    max_failures: int = key(rules.integer(at_least=1), 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint] What a run needs to go on: checkpoints `checkpoint-<step>` and snapshots `snapshot-<step>`.

    A checkpoint is saved at each multiple of `checkpoint_interval` and at the last step; with -1 at the last step only,
    without the key never. `checkpoint_maxkeep`: that many are kept, the newest; all without it, or with -1. A snapshot
    is saved at each multiple of `snapshot_interval` that saves no checkpoint; one is kept.

    With `async_checkpoint = false` training waits for each. With `publish_together` an export and a checkpoint of one
    step appear as one, `step-<step>/`. `save_frozen = false` leaves out parameters that are not trained. `on_failure`
    and `max_failures` are as for exports; the two are counted apart.

    With `preemption`, SIGTERM or SIGUSR1 on any rank makes the next step boundary the last one: a snapshot is saved if
    the run has any, else a checkpoint if it has, and the training ends with status 143, within `preemption_budget_s` of
    the signal.
    """

    checkpoint_interval: int | None = key(rules.integer(at_least=1, or_minus_one=True), None)
    checkpoint_maxkeep: int | None = key(rules.integer(at_least=1, or_minus_one=True), None)
    snapshot_interval: int | None = key(rules.integer(at_least=1), None)
    async_checkpoint: bool = key(rules.boolean, True)
    publish_together: bool = key(rules.boolean, False)
    save_frozen: bool = key(rules.boolean, True)
    preemption: bool = key(rules.boolean, True)
    preemption_budget_s: float = key(rules.number(above=0, at_most=86400), BUDGET_S)
    on_failure: Literal["raise", "abort", "continue"] = key(rules.one_of("raise", "abort", "continue"), "raise")
    max_failures: int = key(rules.integer(at_least=1), 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterConfig:
    """[writer] What the processes that write may take of their host: the fields of `stillframe.WriterLimits`."""

    nice: int = key(rules.integer(at_least=0, at_most=19), 0)
    io_class: Literal["best-effort", "idle"] | None = key(rules.one_of("best-effort", "idle"), None)
    export_slots: int | None = key(rules.integer(at_least=1, at_most=1024), None)
    checkpoint_slots: int | None = key(rules.integer(at_least=1, at_most=1024), None)
    bytes_per_s_max: float | None = key(rules.number(at_least=1, at_most=2**59), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeConfig:
    """[resume] Where a run goes on from, and with what.

    `auto`: from the newest checkpoint or snapshot in `run_dir`; without it, a `run_dir` that holds any is refused.
    `from`: a checkpoint's directory, from which this run starts while `run_dir` has nothing of its own to resume from.
    `fallback`: where the newest is damaged, go back to the next older one that is good, rather than end with an error.

    The `load_` keys say what is taken from there; a run's own checkpoints are always loaded whole. What is not loaded
    begins anew: the optimizer's state; the schedule, over the remaining steps; the position in the data; the random
    state of each rank.
    """

    auto: bool = key(rules.boolean, True)
    from_dir: str | None = key(rules.text, None, name="from")
    fallback: bool = key(rules.boolean, False)
    load_optimizer: bool = key(rules.boolean, True)
    load_schedule: bool = key(rules.boolean, True)
    load_dataset: bool = key(rules.boolean, True)
    load_rng: bool = key(rules.boolean, True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The whole file. `hooks` are `"module:name"` of `stillframe.train.hooks.Hook` classes, called in this order."""

    run_dir: str = key(rules.text)
    seed: int = key(rules.integer(at_least=0, at_most=2**63 - 1), 0)
    hooks: tuple[str, ...] = key(rules.list_of(rules.text, of_what="'module:name' strings"), ())
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    export: ExportConfig
    checkpoint: CheckpointConfig
    writer: WriterConfig
    resume: ResumeConfig


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "training": TrainingConfig,
    "optimizer": OptimizerConfig,
    "export": ExportConfig,
    "checkpoint": CheckpointConfig,
    "writer": WriterConfig,
    "resume": ResumeConfig,
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read the TOML file at `path`, apply `overrides` ("section.key=value", in order), validate all of it.

    Raises `OptionError`: the file cannot be read or is no TOML; a key is unknown, missing or illegal.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"the configuration {path} is not UTF-8 text") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"the configuration {path} is not valid TOML: {error}") from error
    origins = {name: f"--set {override!r}" for override in overrides for name in [_apply_override(table, override)]}
    return parse_config(table, source=str(path), origins=origins)


def _apply_override(table: Table, override: str) -> str:
    """Set one "section.key=value" in `table`; the value is TOML, or else a bare string. Returns the dotted key."""
    name, equals, value_text = override.partition("=")
    name = name.strip()
    parts = name.split(".")
    if not equals or not all(parts):
        raise OptionError(f"--set {override!r}: expected KEY=VALUE, such as training.total_steps=100")
    try:
        value: object = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text.strip()
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise OptionError(f"--set {override!r}: {part!r} is a value, not a table")
        table = inner
    table[parts[-1]] = value
    return name


def parse_config(table: Table, *, source: str, origins: dict[str, str] | None = None) -> TrainConfig:
    """Validate a table as TOML gives it. `source` names the file in errors, `origins` overrides it per dotted key."""
    origins = origins or {}
    table = dict(table)
    sections = {name: table.pop(name, {}) for name in SECTIONS}
    for name, inner in sections.items():
        if not isinstance(inner, dict):
            raise OptionError(f"{source}: {name} = {inner!r}: must be a table, [{name}]")
    parsed: Table = {
        name: _parse_section(kind, sections[name], name, source, origins) for name, kind in SECTIONS.items()
    }
    top = _parse_values(TrainConfig, table, "", source, origins)
    config = TrainConfig(**top, **parsed)
    _check_together(config, source)
    return config


def _parse_section(kind: type[Section], table: Table, prefix: str, source: str, origins: dict[str, str]) -> Section:
    return kind(**_parse_values(kind, table, f"{prefix}.", source, origins))


def _parse_values(kind: type, table: Table, prefix: str, source: str, origins: dict[str, str]) -> Table:
    """The values of one section, each through its rule; refuses unknown keys, and missing ones without default."""
    fields = {key_name(field): field for field in dataclasses.fields(kind) if "rule" in field.metadata}
    known = [*fields, *(f"[{name}]" for name in SECTIONS)] if not prefix else list(fields)
    values = {}
    for name, value in table.items():
        where = f"{origins.get(prefix + name, source)}: {prefix}{name}"
        if name not in fields:
            raise OptionError(f"{where}: unknown key; known here: {', '.join(known)}")
        try:
            values[fields[name].name] = fields[name].metadata["rule"](value)
        except rules.Illegal as error:
            raise OptionError(f"{where} = {value!r}: must be {error}") from error
    for name, field in fields.items():
        if field.name not in values and field.default is dataclasses.MISSING:
            raise OptionError(f"{source}: {prefix}{name} is missing")
    return values


def _check_together(config: TrainConfig, source: str) -> None:
    """What no single key can say."""
    model, training, optimizer = config.model, config.training, config.optimizer
    if (model.path is None) == (model.config is None):
        raise OptionError(f"{source}: give exactly one of model.path and a [model.config] table")
    if model.config is not None and "model_type" not in model.config:
        raise OptionError(f"{source}: model.config.model_type is missing, such as 'qwen3_moe'")
    if model.config is not None and model.tokenizer is None:
        raise OptionError(f"{source}: model.tokenizer is missing; a model from a [model.config] table brings none")
    if (training.total_steps is None) == (training.epochs is None):
        raise OptionError(f"{source}: give exactly one of training.total_steps and training.epochs")
    if training.total_steps is not None and optimizer.warmup_steps > training.total_steps:
        raise OptionError(
            f"{source}: optimizer.warmup_steps = {optimizer.warmup_steps}: "
            f"must be at most training.total_steps = {training.total_steps}"
        )
    if model.dtype == "bfloat16" and training.compute_dtype == "float32":
        raise OptionError(f"{source}: training.compute_dtype = 'float32' needs model.dtype = 'float32'")
    _check_saves(config, source)
    for hook in config.hooks:
        module, colon, name = hook.partition(":")
        if not (module and colon and name):
            raise OptionError(f"{source}: hooks: {hook!r} must be 'module:name'")


def _check_saves(config: TrainConfig, source: str) -> None:
    """Refuse what is set and would have no effect."""
    checkpoint, export = config.checkpoint, config.export
    if export.keep_in_fp32 and export.save_dtype is None:
        raise OptionError(f"{source}: export.keep_in_fp32 means nothing without export.save_dtype")
    if export.keep_in_bf16 and export.save_dtype != "fp8":
        raise OptionError(f"{source}: export.keep_in_bf16 means nothing without export.save_dtype = 'fp8'")
    needing = {
        "checkpoint_maxkeep": checkpoint.checkpoint_maxkeep is not None,
        "publish_together": checkpoint.publish_together,
    }
    for name, is_set in needing.items():
        if is_set and checkpoint.checkpoint_interval is None:
            raise OptionError(f"{source}: checkpoint.{name} means nothing without checkpoint.checkpoint_interval")
    for field in dataclasses.fields(ResumeConfig):
        is_off = field.name.startswith("load_") and not getattr(config.resume, field.name)
        if is_off and config.resume.from_dir is None:
            raise OptionError(f"{source}: resume.{field.name} = false means nothing without resume.from")


def as_record(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON takes it, by dotted keys ("model.config" is one); for checkpoints, and to compare."""
    record: dict[str, Any] = {}
    for section, part in [("", config), *((f"{name}.", getattr(config, name)) for name in SECTIONS)]:
        for field in dataclasses.fields(part):
            if "rule" in field.metadata:
                record[section + key_name(field)] = _plain(getattr(part, field.name))
    return record


def _plain(value: Any) -> Any:
    """Lists for tuples, and text for the infinity and the times that TOML has and JSON has not."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool | int | str) or value is None or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
