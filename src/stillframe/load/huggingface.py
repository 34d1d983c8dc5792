"""Loading a Hugging Face directory into a model that exists, sharded or not: `stillframe.load_hf`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from stillframe.errors import ModelMismatch, OptionError, UnsupportedModel
from stillframe.layout.adapters import is_peft_model
from stillframe.layout.placement import Holding
from stillframe.layout.renaming import KeyMapping
from stillframe.layout.runs import Runs
from stillframe.layout.runtime import unwrapped
from stillframe.load.computing import Filler
from stillframe.load.dequantizing import find_quantized
from stillframe.load.directory import WeightFile, weights_in
from stillframe.load.folder import Folder, listed, open_folder
from stillframe.load.keys import load_keys
from stillframe.load.local import LocalMemory, cut_runs, local_part, local_runs, own_holdings, own_rank
from stillframe.load.matching import Match, Target, match
from stillframe.load.reading import Reader
from stillframe.load.relay import Relay
from stillframe.load.replicas import Alike, AllRanks, share_out
from stillframe.load.stages import OtherStages, without_unexpected
from stillframe.load.verifying import verify_tensors
from stillframe.options import key_rules
from stillframe.ties import tied_elsewhere
from stillframe.wrappers import unwrapped_module, without_wrappers

_COMPARED_ELEMENTS = 1 << 22


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
            loading = _plan(opened, Path(directory), model, key_mapping)
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
    return loading.report(found)


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
            loading = _plan(opened, directory, model, key_mapping, broadcast=True)
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
    return loading.report(loading.found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loading:
    """What this rank is about to load.

    `work`: the targets of which it holds a part that it reads for itself, and the runs of that. `alike`: what it reads
    together with others. `tied`: the targets that it compares where files have them under several names.
    """

    directory: Path
    model_name: str
    files: Sequence[WeightFile]
    found: Match
    reader: Filler
    held: Mapping[str, Holding]
    work: Sequence[tuple[Target, Runs]]
    alike: Sequence[Alike]
    tied: Sequence[Target]

    def refuse(self, found: Match, *, strict: bool) -> None:
        """Raise ModelMismatch for what `found` says that does not fit."""
        if differences := found.differences(strict=strict):
            raise ModelMismatch(f"{self.directory} does not fit {self.model_name}: {differences}")

    def check(self, *, verify: bool) -> None:
        """What can be told of the files' content before the model is changed."""
        if verify:
            read = [runs for _, runs in self.work] + [runs for one in self.alike for runs in one.read_by(own_rank())]
            needed = set[str]().union(*map(self.reader.stored_names, read))
            verify_tensors(self.directory, self.files, needed)
        for target in self.tied:
            _check_ties(self.directory, self.reader, target, self.held[target.name])

    def fill(self) -> None:
        """Read into place what this rank reads for itself; what is read together must be there already."""
        for target, runs in self.work:
            _fill(self.reader, target.tensor, runs)
        for target in self.found.targets:
            target.tensor._is_hf_initialized = True  # type: ignore[attr-defined]

    def report(self, found: Match) -> LoadReport:
        """What was done, with the unexpected keys of `found`."""
        return LoadReport(bytes_read=self.reader.bytes_read, missing=self.found.missing, unexpected=found.unexpected)


def _plan(
    opened: ExitStack,
    directory: Path,
    model: nn.Module,
    key_mapping: Mapping[str, str] | None,
    *,
    broadcast: bool = False,
) -> _Loading:
    """Find what to load from where. Files are open as long as `opened` is."""
    rules = key_rules(key_mapping)
    inner = unwrapped_module(model)
    if rules is None and is_peft_model(inner):
        raise _carrying_adapters(inner)
    inner = _loadable(unwrapped(inner, any_module=rules is not None))
    mapping = None if rules is None else KeyMapping(rules=rules)
    place = opened.enter_context(open_folder(directory))
    files = opened.enter_context(weights_in(place))
    with without_wrappers(inner):
        found, reader = _match(place, files, inner, mapping)
    holdings = own_holdings(any_mesh=not broadcast)
    # A buffer, too, is held by every rank: each must get its values.
    held = {t.name: holdings.of(t.name, t.tensor, is_parameter=True) for t in found.targets}
    work = [(target, local_runs(target.runs, held[target.name])) for target in found.targets]
    work = sorted((pair for pair in work if len(pair[1])), key=lambda pair: reader.position(pair[1]))
    alike: dict[tuple[int, ...], list[tuple[Target, Runs]]] = {}
    for target, runs in work if broadcast else ():
        if len(replicas := held[target.name].replicas) > 1:
            alike.setdefault(replicas, []).append((target, runs))
    others_turns = {
        target.name
        for replicas, parts in alike.items()
        for number, (target, _) in enumerate(parts)
        if replicas[number % len(replicas)] != own_rank()
    }
    shared = {target.name for parts in alike.values() for target, _ in parts}
    return _Loading(
        directory=directory,
        model_name=type(inner).__name__,
        files=files,
        found=found,
        reader=reader,
        held=held,
        work=[(target, runs) for target, runs in work if target.name not in shared],
        alike=[share_out(replicas, parts, reader) for replicas, parts in sorted(alike.items())],
        tied=[target for target in found.targets if target.name not in others_turns],
    )


def _loadable(model: nn.Module) -> nn.Module:
    """`model`, if it is of a kind whose weights can be replaced."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModel(f"{type(model).__name__} is quantized; load the weights before it is quantized")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _carrying_adapters(model)
    return model


def _carrying_adapters(model: nn.Module) -> UnsupportedModel:
    return UnsupportedModel(f"{type(model).__name__} carries PEFT adapters; load the weights before adding them")


def _match(
    place: Folder, files: Sequence[WeightFile], model: nn.Module, mapping: KeyMapping | None
) -> tuple[Match, Filler]:
    state = model.state_dict(keep_vars=True)  # also shards what an evaluation left gathered by FSDP
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UnsupportedModel(f"{type(model).__name__}: not tensors, so not in safetensors files: {listed(strange)}")
    empty = [name for name, tensor in state.items() if local_part(tensor).device.type == "meta"]
    if empty:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(empty)} tensors are on the meta device and cannot take values: "
            f"{listed(empty)}. First call model.to_empty(device=...) and model.tie_weights(), and model.init_weights() "
            "after the load"
        )
    quantized = find_quantized(place, {tensor.name: tensor for file in files for tensor in file.tensors})
    stored = quantized.as_floats
    elsewhere = tied_elsewhere(model, state)
    tied = {
        other: torch.empty(state[name].shape, dtype=state[name].dtype, device="meta")
        for name, other in elsewhere.items()
    }
    keys = load_keys(model, {**state, **tied}, stored, mapping)
    keys = replace(
        keys,
        unexpected={**keys.unexpected, **{key: (key,) for key in quantized.unpaired}},
        unfit={**keys.unfit, **quantized.unfit},
    )
    found = match(model, state, keys, stored, elsewhere)
    return found, Filler(Reader(files, keys.sources, scales=quantized.scales), keys)


@torch.no_grad()
def _fill(reader: Filler, tensor: torch.Tensor, runs: Runs) -> None:
    memory = LocalMemory(tensor)
    reader.fill(memory.flat, runs)
    memory.settle()


def _check_ties(directory: Path, reader: Filler, target: Target, held: Holding) -> None:
    """Refuse a tied tensor that the files hold under several names with different values: which one is meant?"""
    for other, runs in target.same_as.items():
        pairs = zip(_pieces(target, target.runs, held), _pieces(target, runs, held), strict=True)
        for (size, one), (_, two) in pairs:
            values = torch.empty(2, size, dtype=target.tensor.dtype, device="cpu")
            reader.fill(values[0], one)
            reader.fill(values[1], two)
            if not torch.equal(values[0].view(torch.uint8), values[1].view(torch.uint8)):
                raise ModelMismatch(
                    f"{directory}: {target.name} and {other} are one tensor in the model but have different values in "
                    "the files; the model that was saved did not tie them (config.json: tie_word_embeddings)"
                )


def _pieces(target: Target, runs: Runs, held: Holding) -> Iterator[tuple[int, Runs]]:
    """The local part of `runs` cut into pieces of bounded size: `(elements, runs over the piece)`."""
    local = local_runs(runs, held)
    elements = local_part(target.tensor).numel()
    for low in range(0, elements, _COMPARED_ELEMENTS):
        size = min(_COMPARED_ELEMENTS, elements - low)
        yield size, cut_runs(local, low, size)
