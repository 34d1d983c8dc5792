"""The files beside the weights: config, generation config, remote code, tokenizer, processor.

Each is what transformers' own `save_pretrained` of that object writes, rendered into memory.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from stillframe.errors import UnsupportedModel
from stillframe.records import InlineFile
from stillframe.wrappers import unsharded_classes


def render_config(
    model: PreTrainedModel, dtype: torch.dtype, quantization: Mapping[str, object] | None = None
) -> tuple[InlineFile, ...]:
    """config.json, generation_config.json where the model generates, and the model's own code where it is remote code.

    `dtype` is what the weights have in the files, and `quantization` says how those are quantized that are. The files
    are those that `save_pretrained` of the unsharded model writes, and the model's own config does not change. Raises
    UnsupportedModel if one cannot be saved.
    """

    def save(directory: str) -> None:
        with unsharded_classes(model):
            config = copy.deepcopy(model.config)
            config.dtype = str(dtype).removeprefix("torch.")
            config.architectures = [type(model).__name__]
            if quantization is not None:
                config.quantization_config = dict(quantization)
            if model.is_remote_code():
                remote_config: Any = config  # annotated as a dict, but transformers passes the config itself
                custom_object_save(model, directory, config=remote_config)
            config.save_pretrained(directory)
            if model.can_generate():
                model.generation_config.save_pretrained(directory)

    return rendered(save, f"the config of {type(model).__name__}")


def render_companion(companion: Any) -> tuple[InlineFile, ...]:
    """The files that `save_pretrained` of a tokenizer or processor writes. Raises UnsupportedModel if it fails."""
    return rendered(lambda directory: companion.save_pretrained(directory), f"the {type(companion).__name__}")


def rendered(save: Callable[[str], Any], what: str) -> tuple[InlineFile, ...]:
    """The files that `save` puts into the directory that it is given. Raises UnsupportedModel, naming `what`."""
    with tempfile.TemporaryDirectory(prefix="stillframe-") as directory:
        try:
            save(directory)
        except Exception as error:
            raise UnsupportedModel(f"{what} cannot be saved: {type(error).__name__}: {error}") from error
        root = Path(directory)
        return tuple(
            InlineFile(name=str(path.relative_to(root)), content=path.read_bytes())
            for path in sorted(root.rglob("*"))
            if path.is_file()
        )
