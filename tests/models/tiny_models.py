"""Which class stands for an entry of Transformers' conversion mappings, and a small model of it.

Entries are model types or names of classes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel

from tests.models.tiny_configs import tiny_config

_CLASS_OF_TYPE = {  # where the first class for the configuration is not the one to build, or is for another one
    "pp_chart2table": "GotOcr2ForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "t5gemma2_encoder": "T5Gemma2Encoder",
}
_MODULE_OF_CLASS = {  # of those that are not exported
    "MaskFormerDetrDecoder": "maskformer.modeling_maskformer",
    "T5Gemma2Encoder": "t5gemma2.modeling_t5gemma2",
    "UnlimitedOcrSamVisionEncoder": "unlimited_ocr.modeling_unlimited_ocr",
    "UnlimitedOcrVisionEncoder": "unlimited_ocr.modeling_unlimited_ocr",
}


def model_class(entry: str) -> type[PreTrainedModel] | None:
    """The class of that name, or the one with the most in it of that type; None where there is none."""
    if entry in CONFIG_MAPPING and entry not in _CLASS_OF_TYPE:
        classes = classes_of_type(entry)
        for head in ("For(CausalLM|ConditionalGeneration)$", "For", "Model$"):
            for cls in classes:
                if re.search(head, cls.__name__):
                    return cls
        return None
    name = _CLASS_OF_TYPE.get(entry, entry)
    module = transformers
    if name in _MODULE_OF_CLASS:
        module = importlib.import_module(f"transformers.models.{_MODULE_OF_CLASS[name]}")
    found: type[PreTrainedModel] | None = getattr(module, name, None)
    return found


def classes_of_type(model_type: str) -> list[type[PreTrainedModel]]:
    """The models that are made of that type's configuration, in the order in which their modules define them."""
    config_class = CONFIG_MAPPING[model_type]
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    return [
        value
        for info in pkgutil.iter_modules(package.__path__)
        if info.name.startswith("modeling_")
        for value in vars(importlib.import_module(f"{package.__name__}.{info.name}")).values()
        if isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.config_class is config_class
        and "PreTrained" not in value.__name__
    ]


def tiny_model(entry: str, *, seed: int) -> PreTrainedModel:
    """A model on the CPU whose every tensor, norms, biases and buffers included, has random values."""
    cls = model_class(entry)
    assert cls is not None, f"there is no model for {entry}"
    assert cls.config_class is not None, f"{cls.__name__} is no model to build"
    # Not CONFIG_MAPPING.get, which knows only what was loaded already.
    config_class = CONFIG_MAPPING[entry] if entry in CONFIG_MAPPING else cls.config_class  # noqa: SIM401
    model = cls(tiny_config(config_class, cls.__name__))
    fill(model, seed=seed)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, *, seed: int) -> None:
    """Other values for everything that can be saved of `model`, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.copy_(torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))
        else:
            most = 2 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
            tensor.copy_(torch.randint(0, most, tensor.shape, generator=generator))
