"""Every entry of Transformers' conversion mappings: the same bytes as `save_pretrained`, and back again.

An entry, a model type or a class name, says how the names and tensors of such models differ from those in files. For
each a small model is built that the entry applies to, and laid out by stillframe and saved by Transformers as it comes
from its config, as it comes back from `from_pretrained`, and as one that was loaded from files of the original form,
in which every conversion of the entry has a part. What cannot be walked so is listed below, with the reason, and the
test fails for what is listed wrongly, too.
"""

from __future__ import annotations

import re
import shutil
from collections import ChainMap, defaultdict
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, conversion_mapping
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
)
from transformers.utils import logging as transformers_logging

import stillframe
from stillframe.errors import ModelMismatch
from stillframe.layout.huggingface import plan_huggingface
from stillframe.layout.keys import save_keys
from stillframe.layout.runtime import runtime_tensors
from stillframe.snapshot.arena import Arena
from stillframe.snapshot.copy import Snapshotter
from tests.models.tiny_models import classes_of_type, fill, model_class, tiny_model

ENTRIES = sorted(conversion_mapping._build_checkpoint_conversion_mapping())

LOADING_ONLY = {"legacy": "names of old files, for all models; a save does not go back to them"}

NO_MODEL = {
    "MtpModel": "no model of its own: made of another model's layers, loaded with that model, never saved",
    "PPChart2TableModel": "no class has this name; the type pp_chart2table is built of GotOcr2's classes",
    "mlcd_vision": "neither a type nor a class has this name; MLCD's is mlcd_vision_model",
    "xCLIPTextModel": "no class has this name; X-CLIP's is XCLIPTextModel",
    "xCLIPVisionModel": "no class has this name; X-CLIP's is XCLIPVisionModel",
}
NOT_LOOKED_UP = {
    "mlcd": "its configuration says mlcd_vision_model",
    "qwen2_5_omni_thinker": "its two classes have entries of their own, which go before",
    "qwen3_omni_moe_thinker": "its two classes have entries of their own, which go before",
}
NEEDS_PACKAGE = {"timm_wrapper": "timm"}

# A save computes new values, and a load computes them back; the pattern is the first such key.
COMPUTES = {
    "gradium_phonon_tts": r"flow_lm\.transformer\.layers\.0\.self_attn\.in_proj\.weight",
    "inkling2": r"model\.llm\.layers\.0\.mlp\.experts\.w13_weight",
    "inkling2_text": r"model\.llm\.layers\.0\.mlp\.experts\.w13_weight",
    "inkling_mm_model": r"model\.llm\.layers\.0\.mlp\.w13_dn\.weight",
    "kimi_k25": r"vision_tower\.encoder\.blocks\.0\.wqkv\.bias",
    "mistral_large4": r"vision_encoder\.transformer\.layers\.0\.attention\.wk\.weight",
    "step3p5_vision": r"transformer\.resblocks\.0\.attn\.in_proj_bias",
    "step3p7": r"vision_model\.transformer\.resblocks\.0\.attn\.in_proj_bias",
}
LISTS: tuple[Mapping[str, str], ...] = (LOADING_ONLY, NO_MODEL, NOT_LOOKED_UP, NEEDS_PACKAGE)
LEFT_OUT = dict(ChainMap(*map(dict, LISTS)))
WALKED = [entry for entry in ENTRIES if entry not in LEFT_OUT]

# In the small model, no renaming of the entry, or not each of its converters, has anything to do.
IDLE = {
    "Dinov2Model": "its converters are for use_swiglu_ffn, with which the backbone is walked",
    "Dinov2WithRegistersModel": "its converters are for use_swiglu_ffn, with which the backbone is walked",
    "Tipsv2VisionModel": "its converters are for use_swiglu_ffn, with which the backbone is walked",
    "Dots3NoteForConditionalGeneration": "its model's entry does all of it",
    "Qwen2VLModel": "takes off a prefix that names have in the model around it",
    "Qwen2_5_VLModel": "takes off a prefix that names have in the model around it",
    "ViTMAEForPreTraining": "its model's entry does all of it",
    "glm5_next": "its text model's entry, which is the same, does all of it",
    "inkling2_text": "one of its converters is for the scales of quantized experts",
    "kimi_k25": "its text model's entry does what its experts' converters would",
    "maskformer": "its decoder's entry does all of it",
    "nemo_speechlm": "its text model's entry does what its converters would",
}

# With every conversion together the prefix of a part comes twice, as in no file that there ever was.
PREFIXED_TWICE = {
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files do not outlive the test: together they would be hundreds of megabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it reports in many ways that tiny models are odd
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()
    transformers_logging.set_verbosity(before)


def saved(model: PreTrainedModel, directory: Path) -> dict[str, bytes]:
    """The weights and index that Transformers writes, in several files."""
    model.save_pretrained(directory, max_shard_size=_shard_bytes(model))
    return {path.name: path.read_bytes() for path in directory.iterdir() if "safetensors" in path.name}


def laid_out(model: PreTrainedModel, world_size: int) -> dict[str, bytes]:
    """The same files put together from the arenas of all ranks, each of which holds the whole model."""
    files: dict[str, bytearray] = {}
    given: dict[str, int] = {}
    for rank in range(world_size):
        plan = plan_huggingface(model, max_shard_bytes=_shard_bytes(model), rank=rank, world_size=world_size, plan_id=1)
        share = plan.share
        arena = Arena(share.plan.arena_bytes)
        assert plan.conversion is not None
        snapshotter = Snapshotter(
            plan.tensors,
            share.copies,
            share.envelopes,
            arena,
            gathers=plan.gathers,
            compute=plan.conversion.compute,
        )
        snapshotter.lay_envelopes()
        snapshotter.copy()
        memory = arena.bytes.numpy().tobytes()
        arena.close()
        for file in share.plan.files:
            content = files.setdefault(file.name, bytearray(b"?" * file.size_bytes))
            for extent in file.extents:
                begin, end = extent.arena_offset, extent.arena_offset + extent.length_bytes
                content[extent.file_offset : extent.file_offset + extent.length_bytes] = memory[begin:end]
                given[file.name] = given.get(file.name, 0) + extent.length_bytes
    assert given == {name: len(content) for name, content in files.items()}
    return {name: bytes(c) for name, c in files.items()} | {f.name: f.content for f in plan.layout.inline_files}


def _shard_bytes(model: PreTrainedModel) -> int:
    return int(sum(tensor.nbytes for tensor in model.state_dict().values())) // 4


def assert_same_files(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []  # contents are too long to be shown


def values(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of what is saved of `model`, by its names in the model."""
    return {name: tensor.detach().clone() for name, tensor in runtime_tensors(model).items()}


def assert_loads(directory: Path, model: PreTrainedModel) -> None:
    """That `directory` gives `model`, after other values, the ones that it has."""
    expected = values(model)
    fill(model, seed=1)
    stillframe.load_hf(directory, model)
    found = values(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def conversions(
    model: PreTrainedModel, entry: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[WeightTransform], list[WeightTransform]]:
    """All conversions that Transformers looks up for `model`, and those of them that are `entry`'s."""
    look_up: Callable[[str], list[WeightTransform] | None] = conversion_mapping.get_checkpoint_conversion_mapping
    looked_up: dict[str, list[WeightTransform]] = defaultdict(list)

    def recorded(name: str) -> list[WeightTransform] | None:
        found = look_up(name)
        looked_up[name].extend(found or ())
        return found

    with monkeypatch.context() as patch:
        patch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", recorded)
        return get_model_conversion_mapping(model, add_legacy=False), looked_up[entry]


def is_idle(model: PreTrainedModel, everything: list[WeightTransform], own: list[WeightTransform]) -> bool:
    """Whether a save leaves all of `own` unused, or one that converts; by names alone, as a save finds out."""
    reverse = {id(transform): transform.reverse_transform() for transform in reversed(everything)}
    converters = [transform for transform in reverse.values() if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in reverse.values() if isinstance(transform, WeightRenaming)]
    for name in runtime_tensors(model):
        apply_renamings(apply_converters(name, converters)[0], renamings)
    used = {id(transform): reverse[id(transform)].was_used() for transform in own}
    return not any(used.values()) or not all(used[id(t)] for t in own if isinstance(t, WeightConverter))


@pytest.mark.parametrize("entry", WALKED)
def test_a_mapping_gives_the_bytes_of_save_pretrained_and_back(
    entry: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(entry, seed=0)
    everything, own = conversions(model, entry, monkeypatch)
    assert own, f"{entry} does not apply to {type(model).__name__}"
    assert is_idle(model, everything, own) == (entry in IDLE)
    computed = [key.name for key in save_keys(model, runtime_tensors(model)).keys if key.made_of]
    assert bool(computed) == (entry in COMPUTES)
    assert not computed or re.fullmatch(COMPUTES[entry], computed[0])
    as_from_config(model, directory / "config")
    as_reloaded(model, directory / "config", directory / "reloaded")
    as_from_original(model, directory / "original")


def as_from_config(model: PreTrainedModel, directory: Path) -> None:
    expected = saved(model, directory)
    assert len(expected) > 2
    assert_same_files(laid_out(model, world_size=1), expected)
    assert_same_files(laid_out(model, world_size=3), expected)
    assert_loads(directory, model)


def as_reloaded(model: PreTrainedModel, source: Path, directory: Path) -> None:
    """In half precision, too: what Transformers keeps in float32 then comes first in the files."""
    config = type(model.config).from_pretrained(source)
    reloaded = type(model).from_pretrained(source, config=config, dtype=torch.bfloat16)
    expected = saved(reloaded, directory)
    assert_same_files(laid_out(reloaded, world_size=1), expected)
    assert_loads(directory, reloaded)


def as_from_original(model: PreTrainedModel, directory: Path) -> None:
    """A model remembers the conversions that it was loaded with: here all, even those that a save else leaves out."""
    everything = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = everything  # type: ignore[assignment]  # as from_pretrained does
    expected = saved(model, directory)
    assert_same_files(laid_out(model, world_size=1), expected)
    del model._weight_conversions
    if type(model).__name__ in PREFIXED_TWICE:
        with pytest.raises(ModelMismatch):
            stillframe.load_hf(directory, model)
    else:
        assert_loads(directory, model)


@pytest.mark.parametrize("entry", NO_MODEL)
def test_there_is_no_model_for(entry: str) -> None:
    assert model_class(entry) is None


@pytest.mark.parametrize("entry", NOT_LOOKED_UP)
def test_no_model_is_converted_by(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = classes_of_type(entry)
    assert classes
    for cls in classes:
        assert conversions(tiny_model(cls.__name__, seed=0), entry, monkeypatch)[1] == []


@pytest.mark.parametrize(("entry", "package"), NEEDS_PACKAGE.items())
def test_a_model_needs_a_package_that_is_not_there(entry: str, package: str) -> None:
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(ImportError, match=package):
        tiny_model(entry, seed=0)


def test_names_of_old_files_are_kept_when_such_files_were_loaded(directory: Path) -> None:
    """The entry `legacy`: a norm's `gamma` and `beta`."""
    source = tiny_model("BertModel", seed=0)
    source.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    save_file({re.sub(r"LayerNorm\.\w+$", lambda found: old[found[0]], n): t for n, t in tensors.items()}, path)
    model = type(source).from_pretrained(directory)
    expected = saved(model, directory / "again")
    assert b"LayerNorm.gamma" in b"".join(expected.values())
    assert_same_files(laid_out(model, world_size=2), expected)
    for form in (directory, directory / "again"):
        assert_loads(form, source)
        assert_loads(form, model)


def test_what_is_left_out_is_in_the_registry_once() -> None:
    assert set(ENTRIES) >= LEFT_OUT.keys() | IDLE.keys() | COMPUTES.keys()
    assert len(LEFT_OUT) == sum(map(len, LISTS))
