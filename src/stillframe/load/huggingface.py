"""Loading a Hugging Face directory into a model that exists, sharded or not: `stillframe.load_hf`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from stillframe.errors import OptionError
from stillframe.load.matching import Match
from stillframe.load.plan import HuggingFaceLoad, plan_load
from stillframe.load.relay import Relay
from stillframe.load.replicas import AllRanks
from stillframe.load.stages import OtherStages, without_unexpected


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did on this rank.

    `bytes_read`: tensor data that this rank read, headers not counted. `missing`: tensors of the model that kept the
    values they had; of a stage of a pipeline, its own. `unexpected`: keys of the files that were not used, by any
    stage. Both are empty after a strict load.
    """

    bytes_read: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_hf(
    directory: str | os.PathLike[str],
    model: nn.Module,
    *,
    strict: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    verify: bool = False,
    pipeline: bool = False,
    broadcast: bool = False,
    timeout_s: float = 1800.0,
) -> LoadReport:
    """Load the weights of a Hugging Face directory into `model`, in place; blocks until they are there.

    `directory` holds `model.safetensors`, or an index and its shards, in any form that Transformers loads for this
    model: written by stillframe, by `save_pretrained`, or from the Hub; experts fused or apart. `model` is a
    Transformers model: plain, wrapped in DistributedDataParallel, or sharded by `fully_shard` or as DTensors in any way
    that stillframe can save. Neither number nor kind of ranks need be those of the save.

    `key_mapping` is the one that the export was made with, as the Checkpointer takes it: from the module's names, or
    the keys that Transformers gives them, to those of the files. With one, {} included, `model` may be any module. What
    was renamed is read in the forms in which this model has it or would itself be saved, and in no other.

    Each rank reads only the bytes that it holds (of a transposed tensor, such as the experts of Qwen3-VL-MoE in the
    Hub's layout: the matrices that it holds any part of; of one whose values a conversion computes: all keys that are
    converted together). Extra memory is 16 MiB, plus one such matrix, plus on the host the keys of one conversion and
    what it makes of them, plus a copy of a tensor whose memory is not contiguous; of fp8 5 MiB more, the scales of one
    weight, and that matrix in float32.
    There is no communication (without `pipeline` and `broadcast`): every rank calls this, each for itself, and an error
    on one rank is not known to the others.

    Values are bit-identical where dtypes agree. Floating-point numbers of 16 bits and more are cast to the model's
    dtype as `Tensor.copy_` does. Weights in fp8 with a scale for each block (config.json: `quantization_config`, of any
    `weight_block_size`) are multiplied by their scales in float32, and that is cast; of the scales, too, each rank
    reads what it needs. Any other difference of dtypes is refused. Tied weights may be stored under any or all of their
    names. How the model is saved later does not depend on what was loaded, other than with `from_pretrained`.

    A model on the meta device needs memory first: `model.to_empty(device=...)` and `model.tie_weights()`. After the
    load, `model.init_weights()` initialises what no file holds, such as rotary frequencies, and nothing else: what was
    loaded is marked (`_is_hf_initialized`) as `from_pretrained` marks it.

    `verify`: first compare every tensor of the files that this rank needs any part of with the checksum that it was
    published with; the tensor is read whole for that, so a rank reads more than it holds. Needs `stillframe.json`.

    `pipeline`: `model` is this rank's stage of a pipeline, a part of the model that the files hold; every rank calls
    this with its own. Once each has checked its part, and before any writes to its model, they tell each other through
    the store of the default process group what they do not take; this blocks until all have, for at most `timeout_s`
    seconds. A key is unexpected if no stage takes it, and what one rank fails with by then, or misses, is raised on
    all. A weight that is tied to one of another stage is loaded from where that one is, too. `key_mapping` may be
    another one on each rank.

    `broadcast`: what several ranks hold alike (all of a model in DDP, each shard of HSDP, norms on a part of a mesh) is
    read by one of them, each rank its fair share, and handed on from rank to rank, over the host (gloo), in buckets of
    32 MiB at most: turn it on where the file system is slower than the network. Every rank calls this together with
    the others, from equal directories. They tell each other before any writes to its model, and again at the end, how
    it goes: what one fails with, at any time, is raised on all, with its number; no wait, such as that for another
    rank's verifying, or reading of a bucket, is longer than `timeout_s`. Extra memory on the host is three buckets.
    What one conversion computes one rank reads and computes for all. Meshes must be parts of one that spans the job.
    Not with `pipeline`.

    Raises OptionError for a bad `key_mapping`, NotACheckpoint or CorruptCheckpoint for the directory, UnsupportedModel
    or UnsupportedPlacement for the model, ModelMismatch with all missing and unexpected keys, wrong shapes and dtypes
    at once; with `pipeline` or `broadcast` LoadError, if a rank does not come in time or sees other files. All of these
    come before anything is written to the model. `strict=False` allows missing and unexpected keys. LoadError or
    CorruptCheckpoint while reading (an I/O error, a file cut short meanwhile) leaves the model partly loaded, and
    without `broadcast` is not known to the other ranks.
    """
    for name, value in (("pipeline", pipeline), ("broadcast", broadcast)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, not {value!r}")
    if pipeline and broadcast:
        raise OptionError("broadcast is not for the stages of a pipeline; leave out one of pipeline and broadcast")
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 < timeout_s < 10**7:
        raise OptionError(f"timeout_s must be a number of seconds above 0 and below 10^7, not {timeout_s!r}")
    if broadcast:
        return _load_together(Path(directory), model, key_mapping, strict=strict, verify=verify, timeout_s=timeout_s)
    others = OtherStages(directory=Path(directory), timeout_s=timeout_s) if pipeline else None
    with ExitStack() as opened:
        try:
            loading = plan_load(opened, Path(directory), model, key_mapping)
            own = loading.found if others is None else without_unexpected(loading.found)
            if not own.differences(strict=strict):
                loading.check(verify=verify)
        except Exception as error:
            if others is not None:
                others.fail(error)
            raise
        found = loading.found if others is None else others.agree(loading.found, loading.files)
        loading.refuse(found, strict=strict)
        loading.fill()
    return _report(loading, found)


def _load_together(
    directory: Path,
    model: nn.Module,
    key_mapping: Mapping[str, str] | None,
    *,
    strict: bool,
    verify: bool,
    timeout_s: float,
) -> LoadReport:
    """`load_hf` with `broadcast`."""
    everybody = AllRanks(directory=directory, timeout_s=timeout_s)
    with ExitStack() as opened:
        try:
            loading = plan_load(opened, directory, model, key_mapping, broadcast=True)
            loading.refuse(loading.found, strict=strict)
            loading.check(verify=verify)
        except Exception as error:
            everybody.fail(error)
            raise
        is_shared = everybody.agree(loading.alike, loading.files)
        try:
            relay = Relay(loading.reader, timeout_s=timeout_s)
            if not is_shared or relay.fill(loading.alike):
                loading.fill()
        except Exception as error:
            everybody.fail(error)
            raise
        everybody.finish()
    return _report(loading, loading.found)


def _report(loading: HuggingFaceLoad, found: Match) -> LoadReport:
    read_bytes, missing = loading.reader.bytes_read, loading.found.missing
    return LoadReport(bytes_read=read_bytes, missing=missing, unexpected=found.unexpected)
