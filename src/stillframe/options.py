"""Every option of a Checkpointer: what is legal is said here, and checked nowhere else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from stillframe.errors import OptionError
from stillframe.limits import WriterLimits
from stillframe.policies import (
    FailureAction,
    FailurePolicies,
    KeepAll,
    KeepLast,
    OnFailure,
    Retention,
    RetentionPolicy,
)

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointerOptions:
    """Validated on construction; raises OptionError naming the option, its value and what is legal.

    run_dir: where checkpoints appear; created if missing.
    max_shard_size: largest weights file, in bytes or as text such as "5GB" (decimal units, as in transformers). A
        single storage block beyond it gets a file of its own.
    save_dtype: "bfloat16" saves floating-point parameters so, cast in the snapshot; None saves what there is. Buffers,
        and modules that transformers keeps in float32, keep their dtype. "fp8" saves the weights of linear layers and
        experts as float8_e4m3fn with a scale for each block of 128 x 128, everything else as "bfloat16" does.
    keep_in_fp32: regular expressions; parameters whose key or name in the model matches one are not cast.
    keep_in_bf16: likewise, with save_dtype="fp8"; these are saved in bfloat16.
    key_mapping: regular expressions -> what replaces their matches in the keys of exports, which else are those that
        transformers writes; the longest match wins. With one, {} included, any nn.Module can be exported, under its own
        names but for what is replaced; without, PreTrainedModels only.
    layout: "transformers" writes the files that `save_pretrained` writes; "hub" gives weights the orientation that they
        have in the model's checkpoints on the Hub, and that serving engines expect, where transformers saves another
        one (the experts of Qwen3-VL-MoE). Refused for models without such weights.
    file_naming: "standard" names the weights files of exports as transformers does; several ranks write parts of one.
        With "per_rank" each rank has files of its own, `<prefix>-<4 digits>-save_rank<r>.safetensors`, for file systems
        on which many clients must not write one file. A tensor that no rank holds whole then travels to one of them.
    hf_export: whether exports are planned at all. False: none can be saved, and any nn.Module can be checkpointed.
    hf_max_keep: how many exports are kept, the newest by publication; None and -1 keep all.
    keep_hf: a rule for the same, instead of a number: see `stillframe.policies`.
    checkpoint_maxkeep, keep_checkpoints: likewise for checkpoints to resume from. Of snapshots the newest is kept.
    pipeline: whether the model of each rank is a stage of a pipeline: a module of the whole model's class and names
        that lacks what other stages have. False: all ranks must have the same names.
    publish_together: an export and a checkpoint that are saved by one call become one directory `step-<N>`, or neither
        is published. It is kept as long as one of the two rules keeps it.
    on_failure: what a save that failed in the background leads to: "raise" (in the next call), "abort" (the process
        ends at once), "continue" (training goes on, for 3 failures in a row), or a `stillframe.policies.OnFailure` with
        another number. What waits for a save itself (`save`, a future's `result`) raises in any case.
    on_export_failure: likewise for exports, where it is to differ; exports and checkpoints are counted apart.
    save_frozen: False leaves parameters that need no gradient out of checkpoints; to resume then takes a model that
        has them already.
    writer_limits: what the writers may take of their host, a `stillframe.WriterLimits`; by default what they can.
    save_timeout_s: bound on each wait of a save (for the other ranks' calls, the writing, the verdict), and on the
        constructor's wait for the other ranks.
    store_host: address on which rank 0 listens for the others; only needed where they cannot reach it by MASTER_ADDR
        or by its host's name.
    """

    run_dir: Path
    max_shard_size: int | str = "50GB"
    save_dtype: str | None = None
    keep_in_fp32: tuple[str, ...] = ()
    keep_in_bf16: tuple[str, ...] = ()
    key_mapping: Mapping[str, str] | None = None
    layout: str = "transformers"
    file_naming: str = "standard"
    hf_export: bool = True
    hf_max_keep: int | None = None
    keep_hf: RetentionPolicy | None = None
    checkpoint_maxkeep: int | None = None
    keep_checkpoints: RetentionPolicy | None = None
    pipeline: bool = False
    publish_together: bool = False
    on_failure: str | OnFailure = "raise"
    on_export_failure: str | OnFailure | None = None
    save_frozen: bool = True
    writer_limits: WriterLimits = field(default_factory=WriterLimits)
    save_timeout_s: float = 7200.0
    store_host: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.run_dir, Path):
            raise OptionError(f"run_dir must be a path, not {self.run_dir!r}")
        _ = self.max_shard_bytes
        if self.save_dtype not in (None, "bfloat16", "fp8"):
            raise OptionError(f"save_dtype must be None (as it is), 'bfloat16' or 'fp8', not {self.save_dtype!r}")
        for name in ("keep_in_fp32", "keep_in_bf16"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise OptionError(f"{name} has {pattern!r}, which is no regular expression: {error}") from error
        if self.keep_in_fp32 and self.save_dtype is None:
            raise OptionError("keep_in_fp32 has no effect without save_dtype; set both or neither")
        if self.keep_in_bf16 and self.save_dtype != "fp8":
            raise OptionError("keep_in_bf16 has no effect without save_dtype='fp8'; set both or neither")
        if key_rules(self.key_mapping) is not None and self.hf_export is False:
            raise OptionError("key_mapping has no effect with hf_export=False: it names the keys of exports")
        if self.layout not in ("transformers", "hub"):
            raise OptionError(f"layout must be 'transformers' or 'hub', not {self.layout!r}")
        if self.layout == "hub" and self.hf_export is False:
            raise OptionError("layout='hub' has no effect with hf_export=False: it is one of exports")
        if self.file_naming not in ("standard", "per_rank"):
            raise OptionError(f"file_naming must be 'standard' or 'per_rank', not {self.file_naming!r}")
        if self.file_naming == "per_rank" and self.hf_export is False:
            raise OptionError("file_naming='per_rank' has no effect with hf_export=False: it names files of exports")
        if self.file_naming == "per_rank" and self.save_dtype == "fp8":
            raise OptionError("file_naming='per_rank' does not go with save_dtype='fp8' yet; leave one of them out")
        for name in ("hf_export", "pipeline", "publish_together", "save_frozen"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.publish_together and not self.hf_export:
            raise OptionError("publish_together has no effect with hf_export=False: there is no export to publish")
        if not isinstance(self.writer_limits, WriterLimits):
            raise OptionError(f"writer_limits must be a stillframe.WriterLimits, not {self.writer_limits!r}")
        _ = self.retention, self.failure_policies
        timeout_s = self.save_timeout_s
        if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 < timeout_s < 10**7:
            raise OptionError(f"save_timeout_s must be a number of seconds above 0 and below 10^7, not {timeout_s!r}")
        if self.store_host is not None and not isinstance(self.store_host, str):
            raise OptionError(f"store_host must be None or an address, not {self.store_host!r}")

    @property
    def retention(self) -> Retention:
        """What is kept, as rules."""
        return Retention(
            checkpoints=self._rule("checkpoint_maxkeep", "keep_checkpoints"),
            exports=self._rule("hf_max_keep", "keep_hf"),
        )

    @property
    def failure_policies(self) -> FailurePolicies:
        """What failures lead to, of exports and of all else."""
        checkpoints = self._on_failure("on_failure")
        return FailurePolicies(
            checkpoints=checkpoints,
            exports=checkpoints if self.on_export_failure is None else self._on_failure("on_export_failure"),
        )

    def _on_failure(self, name: str) -> OnFailure:
        value = getattr(self, name)
        if isinstance(value, OnFailure):
            return value
        if value not in get_args(FailureAction):
            raise OptionError(f"{name} must be 'raise', 'abort', 'continue' or an OnFailure, not {value!r}")
        return OnFailure(value)

    def _rule(self, number_name: str, policy_name: str) -> RetentionPolicy:
        number, policy = getattr(self, number_name), getattr(self, policy_name)
        if number is not None and (type(number) is not int or number < -1 or number == 0):
            raise OptionError(
                f"{number_name} must be None or -1 (keep all) or at least 1, not {number!r}: the newest always stays, "
                "and 1 keeps it alone"
            )
        if policy is None:
            return KeepAll() if number in (None, -1) else KeepLast(number)
        if not isinstance(policy, RetentionPolicy):
            raise OptionError(f"{policy_name} must be None or a rule of stillframe.policies, not {policy!r}")
        if number is not None:
            raise OptionError(
                f"{number_name}={number!r} and {policy_name} are two ways to say what is kept; set one, and put rules "
                "together with |"
            )
        return policy

    @property
    def max_shard_bytes(self) -> int:
        size = self.max_shard_size
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
        if isinstance(size, str):
            match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]B)\s*", size, re.IGNORECASE | re.ASCII)
            size_bytes = float(match[1]) * _UNITS[match[2].upper()] if match else 0.0
            if 1 <= size_bytes < math.inf:
                return int(size_bytes)
        raise OptionError(
            f"max_shard_size must be a positive number of bytes or text such as '500MB' or '5GB', not {size!r}"
        )


def key_rules(key_mapping: Mapping[str, str] | None) -> tuple[tuple[re.Pattern[str], str], ...] | None:
    """`key_mapping` as compiled rules, in its order; None for None. Raises OptionError."""
    if key_mapping is None:
        return None
    if not isinstance(key_mapping, Mapping):
        raise OptionError(f"key_mapping must be None or map regular expressions to replacements, not {key_mapping!r}")
    rules = []
    for pattern, replacement in key_mapping.items():
        if not isinstance(pattern, str) or not isinstance(replacement, str):
            raise OptionError(f"key_mapping maps text to text, not {pattern!r} to {replacement!r}")
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")  # refuses a group that the pattern does not have
        except (re.error, IndexError) as error:
            raise OptionError(f"key_mapping has {pattern!r}: {replacement!r}, which re.sub refuses: {error}") from error
        rules.append((compiled, replacement))
    return tuple(rules)


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """`metrics` as plain numbers, tensors of one element included. Raises OptionError."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise OptionError(f"metrics must be a dict of numbers, not {metrics!r:.60}")
    checked = {}
    for name, value in (metrics or {}).items():
        try:
            checked[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(f"metrics: {name!r} must be a number, not {value!r:.60}") from error
        if not isinstance(name, str):
            raise OptionError(f"metrics: {name!r} must be text")
    return checked


def run_directory(run_dir: str | os.PathLike[str]) -> Path:
    """`run_dir` as an absolute path: a later chdir of the training script does not move the run. Raises OptionError."""
    try:
        text = os.fspath(run_dir)
    except TypeError as error:
        raise OptionError(f"run_dir must be a path, not {run_dir!r}") from error
    if not isinstance(text, str) or not text or "\0" in text:
        raise OptionError(f"run_dir must be a non-empty path, not {run_dir!r}")
    return Path(text).absolute()
