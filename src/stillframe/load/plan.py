"""What one load of a Hugging Face directory does on a rank: found out before the model is changed, then done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from stillframe.errors import ModelMismatch, UnsupportedModel
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
from stillframe.load.replicas import Alike, share_out
from stillframe.load.verifying import verify_tensors
from stillframe.options import key_rules
from stillframe.ties import tied_elsewhere
from stillframe.wrappers import unwrapped_module, without_wrappers

_COMPARED_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceLoad:
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


def plan_load(
    opened: ExitStack,
    directory: Path,
    model: nn.Module,
    key_mapping: Mapping[str, str] | None,
    *,
    broadcast: bool = False,
) -> HuggingFaceLoad:
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
    return HuggingFaceLoad(
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
