"""Adapters: what PEFT, or transformers of a model that carries PEFT's adapters, saves instead of the model.

There is no table of methods here. PEFT's own selection (`get_peft_model_state_dict`) is run on a state dict whose
values are the names of the tensors: what comes out says which tensor each key is. What is beside the weights is
rendered by PEFT too. PEFT is never imported unless the program has done so already, as one with a PeftModel has.

Sources: peft `peft_model.py` (`PeftModel.save_pretrained`), `utils/save_and_load.py`; transformers `modeling_utils.py`
(`save_pretrained`, where `_hf_peft_config_loaded`) and `integrations/peft.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from stillframe.errors import UnsupportedModel
from stillframe.layout.casting import Cast, cast_keys
from stillframe.layout.companions import rendered
from stillframe.layout.files import file_keys, lay_out_files
from stillframe.layout.huggingface import HuggingFacePlan, sketch_of, without_collections
from stillframe.layout.keys import Key, KeyMap
from stillframe.layout.placement import Holdings
from stillframe.layout.runs import Runs
from stillframe.layout.runtime import without_tied
from stillframe.layout.shares import rank_share
from stillframe.layout.stages import Stages, merged
from stillframe.names import is_unicode
from stillframe.records import InlineFile
from stillframe.wrappers import unsharded_classes, without_wrappers

_STEM = "adapter_model"
_DEFAULT = "default"  # the adapter that PEFT saves into the directory itself, any other one into a folder of its name
_PREFIX = "base_model.model."  # what transformers puts before its names, so that PEFT knows them


def is_peft_model(module: nn.Module) -> bool:
    """Whether `module` is one of PEFT's models around another one. Where there is one, PEFT has been imported."""
    cls = getattr(sys.modules.get("peft"), "PeftModel", None)
    return cls is not None and isinstance(module, cls)


def saved_adapters(module: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that a save of `module` consists of; none if it is no model with adapters.

    All of a PeftModel, the active ones of a transformers model (`add_adapter`). Raises UnsupportedModel if a
    transformers model says that it has adapters and does not.
    """
    if is_peft_model(module):
        peft_model: Any = module
        return tuple(peft_model.peft_config)
    if not getattr(module, "_hf_peft_config_loaded", False):
        return ()
    try:
        active: list[str] = module.active_adapters()  # type: ignore[operator]  # of transformers' PeftAdapterMixin
    except Exception as error:
        raise UnsupportedModel(
            f"{type(module).__name__} says that it carries PEFT adapters, but has none: {type(error).__name__}: {error}"
        ) from error
    return tuple(active)


def plan_adapters(
    model: nn.Module,
    *,
    max_shard_bytes: int,
    rank: int,
    world_size: int,
    plan_id: int,
    cast: Cast | None = None,
    stages: Stages | None = None,
) -> HuggingFacePlan:
    """Lay the adapters of `model` out as `save_pretrained` does, and find this rank's share; the plan has no tensor of
    the model but those.

    `cast` and `stages` (of what `describing.describe_adapters` describes) are as in `plan_huggingface`. PEFT may look
    at the base model's config, where that was loaded from, to see whether embeddings were resized; otherwise there is
    no communication, and no data is read. Raises LayoutError naming the adapter or tensor.
    """
    with without_wrappers(model), without_collections():
        selection, tensors = selected_tensors(model)
        parameters = {id(p): p.numel() for p in model.parameters()}
        total_parameters = sum(parameters.values())
        if stages is not None:
            selection, tensors = _selection_of_all(stages), stages.completed(tensors)
            parameters = {id(tensors[name]): math.prod(m.shape) for name, m in stages.items() if m.is_parameter}
            total_parameters = sum(parameters.values()) + stages.uncounted
        if not tensors:
            raise UnsupportedModel(
                f"{type(model).__name__}: its adapters have no tensors, so there is nothing to export"
            )
        sources = tuple(tensors)
        files, index = _files(model, selection, tensors, max_shard_bytes, total_parameters)
        if cast is not None:
            files = [
                (n, cast_keys(model, tensors, KeyMap(sources=sources, keys=tuple(k)), cast, parameters.keys()).keys)
                for n, k in files
            ]
        held = Holdings(rank=rank, world_size=world_size, stages=stages)
        holdings = {name: held.of(name, t, is_parameter=id(t) in parameters) for name, t in tensors.items()}
        layout, items = lay_out_files(
            files,
            sources,
            holdings,
            source_dtypes=[tensor.dtype for tensor in tensors.values()],
            world_size=world_size,
            inline_files=index,
            held_back=tuple(_config_name(model, adapter) for adapter in selection),
        )
        keys = [key for _, of_file in files for key in of_file]
        layout = replace(layout, sketch=sketch_of(tensors, holdings, keys))
        return HuggingFacePlan(
            layout=layout,
            share=rank_share(layout, items, sources, holdings, rank=rank, plan_id=plan_id),
            tensors=tensors,
            config_dtype=None,
            items=items,
            sources=sources,
            holdings=holdings,
        )


def render_adapters(model: nn.Module) -> tuple[InlineFile, ...]:
    """What `save_pretrained` of the unsharded `model` writes beside the adapters' weights: their configs; of a
    PeftModel also its README.md, of a transformers model its generation_config.json.

    The model and its configs do not change. PEFT writes sets, such as a config's `target_modules`, in an order that
    differs from process to process; it is that of this one. Raises UnsupportedModel if a file cannot be rendered.
    """
    with without_wrappers(model), unsharded_classes(model):
        save = _save_beside_peft if is_peft_model(model) else _save_beside_transformers
        files = rendered(lambda directory: save(model, directory), f"the adapters of {type(model).__name__}")
    return tuple(file for file in files if not file.name.endswith(".safetensors"))


def selected_tensors(model: nn.Module) -> tuple[dict[str, dict[str, str]], dict[str, torch.Tensor]]:
    """Of each adapter that is saved: key -> name of the tensor that it is, in PEFT's order; and these tensors. For
    inside of `without_wrappers`. Raises LayoutError naming the adapter or tensor."""
    state = model.state_dict(keep_vars=True)
    with unsharded_classes(model):
        selection = _selection(model, state)
    tensors = {name: state[name] for name in dict.fromkeys(n for keys in selection.values() for n in keys.values())}
    _refuse_unready(model, tensors)
    return selection, tensors


def _selection_of_all(stages: Stages) -> dict[str, dict[str, str]]:
    """What the stages of a pipeline selected, together."""
    parts = [extra["adapters"] for extra in stages.extras]
    return {
        adapter: {
            key: next(part[adapter][key] for part in parts if key in part.get(adapter, ()))
            for key in merged([list(part.get(adapter, ())) for part in parts])
        }
        for adapter in merged([list(part) for part in parts])
    }


def _selection(model: nn.Module, state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    names = saved_adapters(model)
    if is_peft_model(model):
        return {name: _keys_of(model, name, state) for name in names}
    if len(names) != 1:
        raise UnsupportedModel(
            f"{type(model).__name__} has {len(names)} active adapters, {', '.join(names)}, and transformers saves one; "
            "choose it with set_adapter, or make a PeftModel, which saves all"
        )
    keys = {_PREFIX + key: name for key, name in _keys_of(model, names[0], state).items()}
    for ignored in getattr(model, "_keys_to_ignore_on_save", None) or ():
        keys.pop(ignored, None)
    kept = without_tied(model, {key: state[name] for key, name in keys.items()})
    return {names[0]: {key: keys[key] for key in kept}}


def _keys_of(model: nn.Module, adapter: str, state: Mapping[str, Any]) -> dict[str, str]:
    """PEFT's own selection, on names instead of tensors: it then cannot gather, copy or compute anything unnoticed."""
    from_peft: Any = sys.modules["peft"]
    config: Any = model.peft_config[adapter]  # type: ignore[index]  # a PeftModel's, or PeftAdapterMixin's
    kind = getattr(config.peft_type, "value", config.peft_type)
    not_selected = UnsupportedModel(
        f"{type(model).__name__}: of its adapter {adapter!r} PEFT saves values that it computes ({kind}), not tensors "
        "of the model; save it with PEFT itself"
    )
    if config.is_prompt_learning:
        raise not_selected
    names = {name: name for name in state}
    try:
        keys: dict[str, str] = from_peft.get_peft_model_state_dict(model, state_dict=names, adapter_name=adapter)
    except (TypeError, AttributeError) as error:  # what a computation does that gets a name for a tensor
        raise not_selected from error
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__}: PEFT does not say which tensors its adapter {adapter!r} has: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not all(isinstance(name, str) and isinstance(state.get(name), torch.Tensor) for name in keys.values()):
        raise not_selected
    return keys


def _files(
    model: nn.Module,
    selection: Mapping[str, Mapping[str, str]],
    tensors: Mapping[str, torch.Tensor],
    max_shard_bytes: int,
    total_parameters: int,
) -> tuple[list[tuple[str, Sequence[Key]]], tuple[InlineFile, ...]]:
    """The keys of each file, by its name; PEFT makes one file of an adapter, transformers maybe several."""
    source_of = {name: number for number, name in enumerate(tensors)}
    keys_of = {
        adapter: [_key(key, tensors[name], source_of[name], block) for block, (key, name) in enumerate(keys.items())]
        for adapter, keys in selection.items()
    }
    if not is_peft_model(model):
        (keys,) = keys_of.values()
        return file_keys(keys, max_shard_bytes, stem=_STEM, total_parameters=total_parameters)
    return [(_folder(adapter) + f"{_STEM}.safetensors", keys) for adapter, keys in keys_of.items()], ()


def _key(name: str, tensor: torch.Tensor, source: int, block: int) -> Key:
    size = tensor.numel()
    return Key(
        name=name,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        runs=Runs.of([(0, source, 0, size)] if size else []),
        block=block if size else -1,
        block_bytes=size * tensor.dtype.itemsize,
    )


def _folder(adapter: str) -> str:
    if adapter == _DEFAULT:
        return ""
    if "/" in adapter or "\0" in adapter or not is_unicode(adapter):  # torch itself allows no dot in it
        raise UnsupportedModel(f"the adapter {adapter!r} has no name that a folder can have; rename it")
    return f"{adapter}/"


def _config_name(model: nn.Module, adapter: str) -> str:
    return (_folder(adapter) if is_peft_model(model) else "") + "adapter_config.json"


def _refuse_unready(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    unready = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if unready:
        raise UnsupportedModel(
            f"{type(model).__name__}: {len(unready)} tensors of its adapters have no values yet (meta device), such as "
            f"{unready[0]}"
        )


def _save_beside_peft(model: Any, directory: str) -> None:
    """PEFT's own save, of tensors without elements; their file is not used."""
    names = {name: config.base_model_name_or_path for name, config in model.peft_config.items()}
    state = {name: torch.empty(0) for name in model.state_dict()}
    try:
        # Which embeddings are saved was decided with the plan: to ask again might ask the Hub again.
        model.save_pretrained(directory, state_dict=state, save_embedding_layers=False)
    finally:
        for name, base_model in names.items():
            model.peft_config[name].base_model_name_or_path = base_model  # which a save fills in


def _save_beside_transformers(model: Any, directory: str) -> None:
    assert isinstance(model, PreTrainedModel), "only PEFT's and transformers' models have adapters"
    if model.is_remote_code():
        remote_config: Any = model.config
        custom_object_save(model, directory, config=remote_config)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)
    (adapter,) = saved_adapters(model)
    peft_config: Any = model.peft_config
    peft_config[adapter].save_pretrained(directory)
