"""The whole model, where a rank has one stage of a pipeline: what its modules are, without data.

What transformers decides by looking at modules (which conversions the parts of a composed model bring along, which
weights are of linear layers) a stage cannot tell, for it lacks the modules of the others.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from copy import deepcopy

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from stillframe.errors import UnsupportedModel

_log = logging.getLogger("stillframe")


def whole_model(stage: nn.Module) -> nn.Module:
    """A model on the meta device of the class and config of `stage`, with the conversions that it was loaded with;
    `stage` itself where it is no PreTrainedModel, whose modules mean nothing to a save.

    Where its class cannot be made from a config, `stage` stands for it; where it lacks what matters, the ranks disagree
    and are refused.
    """
    if not isinstance(stage, PreTrainedModel):
        return stage
    cls = type(stage).__mro__[2] if isinstance(stage, FSDPModule) else type(stage)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            whole: PreTrainedModel = cls(deepcopy(stage.config))
    except Exception as error:  # noqa: BLE001  # constructors raise anything
        _log.warning("%s cannot be made from its config (%s: %s)", cls.__name__, type(error).__name__, error)
        return stage
    if (conversions := stage.__dict__.get("_weight_conversions")) is not None:
        whole.__dict__["_weight_conversions"] = conversions
    return whole


def tensors_of_whole(whole: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of what `whole_model` made, by all of their names. Raises UnsupportedModel if the stages' tensors,
    `names`, are not among them."""
    tensors: dict[str, torch.Tensor] = whole.state_dict(keep_vars=True)
    if unknown := sorted(set(names) - tensors.keys()):
        raise UnsupportedModel(
            f"{unknown[0]} is in a stage of the pipeline, and not in a {type(whole).__name__} of its config, which has "
            "to tell which weights save_dtype='fp8' quantizes; give each stage the config of the whole model"
        )
    return tensors
