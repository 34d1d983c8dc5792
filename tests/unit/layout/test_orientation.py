"""The Hub's orientation, found in Transformers' own conversions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Qwen3VLMoeConfig
from transformers.core_model_loading import revert_weight_conversion

import stillframe
from stillframe.errors import OptionError, UnsupportedModel
from stillframe.layout.keys import save_keys
from stillframe.layout.orientation import hub_orientation, order_of_dims
from stillframe.layout.runtime import runtime_tensors
from stillframe.testing.models import tiny_qwen3_moe, tiny_qwen3_vl_moe


def saved(model: PreTrainedModel, run_dir: Path, layout: str) -> Path:
    with stillframe.Checkpointer(run_dir, model=model, layout=layout, max_shard_size="50KB") as ckpt:
        return ckpt.save_hf(1)


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in directory.glob("*.safetensors") for key, value in load_file(path).items()}


def test_the_experts_are_transposed_and_a_load_gives_the_model_back(tmp_path: Path) -> None:
    model = tiny_qwen3_vl_moe()
    hub_dir, default_dir = (saved(model, tmp_path / name, name) for name in ("hub", "transformers"))
    hub, default = tensors_in(hub_dir), tensors_in(default_dir)
    experts = {name for name in default if ".mlp.experts." in name}
    assert {hub[name].shape for name in experts} == {(4, 56, 48), (4, 24, 56)}
    for name, tensor in default.items():
        assert torch.equal(hub[name], tensor.transpose(1, 2) if name in experts else tensor), name
    assert hub.keys() == default.keys()
    index = "model.safetensors.index.json"
    assert (hub_dir / index).read_bytes() == (default_dir / index).read_bytes()
    again = type(model).from_pretrained(hub_dir)
    other = tiny_qwen3_vl_moe(seed=5)
    stillframe.load_hf(hub_dir, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        assert torch.equal(other.state_dict()[name], tensor), name
    # A model that was loaded knows the conversions that it was loaded with; they are what is used, and stay.
    assert tensors_in(saved(again, tmp_path / "again", "hub")).keys() == hub.keys()
    for path in (tmp_path / "again" / "hf-1").glob("*.safetensors"):
        assert path.read_bytes() == (hub_dir / path.name).read_bytes()
    again.save_pretrained(tmp_path / "reference", max_shard_size="50KB")
    for path in (tmp_path / "reference").glob("*.safetensors"):
        assert path.read_bytes() == (default_dir / path.name).read_bytes()


def test_a_model_is_as_before_afterwards() -> None:
    model = tiny_qwen3_vl_moe()
    tensors = runtime_tensors(model)
    before = revert_weight_conversion(model, dict(tensors))
    with hub_orientation(model):
        assert "_weight_conversions" in vars(model)
    assert "_weight_conversions" not in vars(model)
    after = revert_weight_conversion(model, dict(tensors))
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}


def test_a_model_without_such_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"layout='hub' means nothing for Qwen3MoeForCausalLM.* leave it out"):
        stillframe.Checkpointer(tmp_path, model=tiny_qwen3_moe(), layout="hub")
    with pytest.raises(UnsupportedModel, match="layout='hub' means nothing for Linear"):
        stillframe.Checkpointer(tmp_path, model=torch.nn.Linear(2, 2), key_mapping={}, layout="hub")
    assert list(tmp_path.iterdir()) == []


def test_a_square_weight_is_refused_for_no_load_could_tell_that_it_was_transposed() -> None:
    config: Qwen3VLMoeConfig = tiny_qwen3_vl_moe().config
    config.text_config.moe_intermediate_size = config.text_config.hidden_size
    with torch.device("meta"):
        model = type(tiny_qwen3_vl_moe())(config)
    with pytest.raises(UnsupportedModel, match=r"would transpose model\..*down_proj, of shape \(4, 56, 56\)"):
        save_keys(model, runtime_tensors(model), hub_layout=True)


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="layout must be 'transformers' or 'hub', not 'vllm'"):
        stillframe.Checkpointer(tmp_path, model=tiny_qwen3_moe(), layout="vllm")
    with pytest.raises(OptionError, match="layout='hub' has no effect with hf_export=False"):
        stillframe.Checkpointer(tmp_path, model=tiny_qwen3_moe(), layout="hub", hf_export=False)


def test_an_order_of_dimensions_is_told_from_everything_else() -> None:
    source = torch.empty(2, 3, 4, device="meta")
    assert order_of_dims(source.transpose(1, 2), source) == (0, 2, 1)
    assert order_of_dims(source.permute(2, 0, 1), source) == (2, 0, 1)
    assert order_of_dims(source, source) == (0, 1, 2)
    for other in (source[:1].mT, source[:, 1:].mT, source.mT[:, :2], source.view(6, 4).t(), source.view(4, 3, 2).mT):
        assert order_of_dims(other, source) is None
    assert order_of_dims(source.mT.view(torch.int32), source) is None
    assert order_of_dims(source.mT.mT.mT, source.mT) is None
    single = torch.empty(2, 1, 4, device="meta")
    assert order_of_dims(single.mT, single) is None
