"""Tied weights of which a part of a model has one name only: the output layer in the last stage of a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn


def tied_elsewhere(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Those of `names`, of the tensors that `model` has, which Transformers ties to a tensor that it does not have, and
    that tensor's name: the one under which the whole model saves it. Empty where `model` is whole.

    `model` is of the class of the whole model, and keeps what that says of its ties.
    """
    ties: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: ties[name] for name in names if name in ties and ties[name] not in names}
