"""The training step on real ranks: any way to split one global batch gives the same losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from stillframe.errors import OptionError
from stillframe.testing import models, run_ranks
from stillframe.train import parallel
from stillframe.train.loop import Trainer
from tests.unit.train import material

Sections = dict[str, dict[str, Any]]


@dataclass
class Trained:
    """What some steps of one rank came to: `first_grads` and `weights` are whole tensors, the same on all ranks."""

    initial_weights: dict[str, torch.Tensor]
    first_grads: dict[str, torch.Tensor]
    own_label_tokens: list[int]
    losses: list[float]
    grad_norms: list[float]
    parameter_dtypes: set[torch.dtype]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def take_steps(work_dir: Path, sections: Sections, steps: int) -> Trained:
    ranks = parallel.start_ranks("cpu")
    trainer = Trainer(material.config(work_dir, **sections), ranks)
    options = StateDictOptions(full_state_dict=True)
    initial_weights = {name: t.clone() for name, t in get_model_state_dict(trainer.model, options=options).items()}
    grads: list[dict[str, torch.Tensor]] = []

    def keep_grads(*_: object) -> None:
        grads.append({name: whole(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.optimizer.register_step_pre_hook(keep_grads)
    losses, norms, own_label_tokens = [], [], []
    for step in range(1, steps + 1):
        batches = trainer.data.batches()
        own_label_tokens.append(sum(batch.label_tokens for batch in batches))
        (label_tokens,) = ranks.sum(own_label_tokens[-1])
        loss_sum, grad_norm = trainer.train_step(step, batches, label_tokens)
        trainer.data.advance()
        losses.append(ranks.sum(loss_sum.item())[0] / label_tokens)
        norms.append(grad_norm.item())
    dtypes = {parameter.dtype for parameter in trainer.model.parameters()}
    return Trained(initial_weights, grads[0], own_label_tokens, losses, norms, dtypes)


UNCLIPPED = {"optimizer": {"max_grad_norm": float("inf")}}
MOE = {"model": {"config": material.QWEN3_MOE}}


def assert_same_training(actual: Trained, expected: Trained) -> None:
    assert actual.losses == pytest.approx(expected.losses, rel=1e-4)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
    assert actual.first_grads.keys() == expected.first_grads.keys()
    for name, grad in expected.first_grads.items():
        torch.testing.assert_close(
            actual.first_grads[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("model", [{}, MOE], ids=["tied dense", "mixture of experts"])
def test_ranks_and_accumulation_equal_one_large_batch(tmp_path: Path, model: Sections) -> None:
    expected = take_steps(tmp_path, UNCLIPPED | model | {"training": {"micro_batch_size": 4}}, 4)
    for world_size, micro, accumulation in [(2, 1, 2), (2, 2, 1), (1, 2, 2)]:
        training = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
        results = run_ranks(world_size, take_steps, tmp_path, UNCLIPPED | model | {"training": training}, 4)
        for result in results:
            assert_same_training(result, expected)
        parts = [result.own_label_tokens for result in results]
        assert [sum(step) for step in zip(*parts, strict=True)] == expected.own_label_tokens
        if world_size > 1:
            assert parts[0] != parts[1]  # chats and texts: an average of averages would show


def test_fresh_weights_are_the_same_at_any_number_of_ranks(tmp_path: Path) -> None:
    alone = take_steps(tmp_path, MOE, 1).initial_weights
    for world_size in (2, 3):
        for result in run_ranks(world_size, take_steps, tmp_path, MOE, 1):
            assert result.initial_weights.keys() == alone.keys()
            assert all(torch.equal(result.initial_weights[name], weight) for name, weight in alone.items())
    seeded = material.table(tmp_path, **MOE) | {"seed": 1}
    other = Trainer(material.parse_config(seeded, source="test"), parallel.start_ranks("cpu")).model.state_dict()
    assert not torch.equal(other["lm_head.weight"], alone["lm_head.weight"])


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters(tmp_path: Path) -> None:
    expected = take_steps(tmp_path, MOE | {"training": {"micro_batch_size": 2}}, 3)
    bfloat16 = MOE | {"training": {"compute_dtype": "bfloat16"}}
    results = [*run_ranks(2, take_steps, tmp_path, bfloat16, 3)]
    results.append(take_steps(tmp_path, MOE | {"training": {"compute_dtype": "bfloat16", "micro_batch_size": 2}}, 3))
    for result in results:
        assert result.losses != expected.losses
        assert result.losses == pytest.approx(expected.losses, rel=2e-2)
        assert result.parameter_dtypes == {torch.float32}


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    checkpointed = {"model": {"activation_checkpointing": True}}
    expected = run_ranks(2, take_steps, tmp_path, UNCLIPPED, 2)
    for result, plain in zip(run_ranks(2, take_steps, tmp_path, UNCLIPPED | checkpointed, 2), expected, strict=True):
        assert_same_training(result, plain)


def start_from_directory(work_dir: Path, model_dir: Path) -> Trained:
    model = {"path": str(model_dir), "config": None}
    table = material.table(work_dir, model=model)
    del table["model"]["config"]
    trainer = Trainer(material.parse_config(table, source="test"), parallel.start_ranks("cpu"))
    options = StateDictOptions(full_state_dict=True)
    weights = {name: t.clone() for name, t in get_model_state_dict(trainer.model, options=options).items()}
    batches = trainer.data.batches()
    loss_sum, grad_norm = trainer.train_step(1, batches, batches[0].label_tokens)
    return Trained(weights, {}, [], [loss_sum.item()], [grad_norm.item()], set())


@pytest.mark.parametrize("model", [{}, MOE], ids=["tied dense", "mixture of experts"])
def test_starting_from_a_directory_loads_its_weights(tmp_path: Path, model: Sections) -> None:
    trainer = Trainer(material.config(tmp_path, **model), parallel.start_ranks("cpu"))
    trainer.model.save_pretrained(tmp_path / "model")
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    batches = trainer.data.batches()
    loss_sum, grad_norm = trainer.train_step(1, batches, batches[0].label_tokens)

    alone = start_from_directory(tmp_path, tmp_path / "model")
    assert alone.losses == pytest.approx([loss_sum.item()], rel=1e-6)
    assert alone.grad_norms == pytest.approx([grad_norm.item()], rel=1e-6)
    assert all(torch.equal(alone.initial_weights[name], weight) for name, weight in weights.items())
    for result in run_ranks(2, start_from_directory, tmp_path, tmp_path / "model"):
        assert result.initial_weights.keys() == weights.keys()
        assert all(torch.equal(result.initial_weights[name], weight) for name, weight in weights.items())


def test_loss_is_that_of_transformers_with_and_without_router_loss(tmp_path: Path) -> None:
    router = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    for fields in ({}, router):
        trainer = Trainer(
            material.config(tmp_path, model={"config": material.QWEN3_MOE | fields}, training={"micro_batch_size": 3}),
            parallel.start_ranks("cpu"),
        )
        (batch,) = trainer.data.batches()
        with torch.no_grad():
            token_loss, aux_loss = trainer.loss(batch)
            theirs = trainer.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                labels=batch.labels,
                shift_labels=batch.labels,
                use_cache=False,
            ).loss
        torch.testing.assert_close(token_loss / batch.label_tokens + aux_loss, theirs)
        assert (aux_loss > 0) == bool(fields)


def test_router_losses_are_averaged_over_micro_batches(tmp_path: Path) -> None:
    router = {"output_router_logits": True, "router_aux_loss_coef": 10.0}
    training = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    sections = UNCLIPPED | {"model": {"config": material.QWEN3_MOE | router}, "training": training}
    trainer = Trainer(material.config(tmp_path, **sections), parallel.start_ranks("cpu"))
    batches = trainer.data.batches()
    parts = [trainer.loss(batch) for batch in batches]
    label_tokens = sum(batch.label_tokens for batch in batches)
    whole_loss = sum(token_loss for token_loss, _ in parts) / label_tokens + sum(aux for _, aux in parts) / 2
    whole_loss.backward()
    expected = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    actual = take_steps(tmp_path, sections, 1).first_grads
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make_model", [None, models.tiny_qwen3_vl_moe], ids=["text", "vision and text"])
def test_documents_in_one_sequence_do_not_see_each_other(
    tmp_path: Path, make_model: Callable[[], PreTrainedModel] | None
) -> None:
    table = material.table(tmp_path, data={"seq_len": 128})
    if make_model is not None:
        make_model().save_pretrained(tmp_path / "model")
        models.tiny_tokenizer().save_pretrained(tmp_path / "model")
        table["model"] = {"path": str(tmp_path / "model")}
    trainer = Trainer(material.parse_config(table, source="test"), parallel.start_ranks("cpu"))
    trainer.model.eval()
    (batch,) = trainer.data.batches()
    starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2
    second = starts[1]

    def logits(input_ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            output = trainer.model(input_ids=input_ids, position_ids=batch.position_ids, use_cache=False)
        return output.logits[0]

    before = logits(batch.input_ids)
    changed = batch.input_ids.clone()
    changed[0, :second] = (changed[0, :second] + 1) % 256
    after = logits(changed)
    assert torch.equal(before[second:], after[second:])
    assert not torch.equal(before[:second], after[:second])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"config": material.QWEN3 | {"hidden_sise": 8}}}, "model.config.hidden_sise: .* 'hidden_size'"),
        ({"model": {"config": material.QWEN3 | {"hidden_size": "8"}}}, r"\[model.config\]: Transformers refuses it"),
        ({"model": {"config": material.QWEN3 | {"vocab_size": 256}}}, "vocabulary of 256 is smaller .* 257"),
        ({"model": {"config": {"model_type": "qwen3000"}}}, r"\[model.config\]: .*qwen3000"),
        ({"model": {"config": {"model_type": "vit"}}}, "model_type 'vit' has no causal language model"),
        ({"model": {"tokenizer": "absent"}}, "model.tokenizer = 'absent': no such directory"),
        ({"model": {"tokenizer": "."}}, "model.tokenizer: no tokenizer can be loaded from ."),
        ({"data": {"files": ["absent.jsonl"]}}, "cannot read absent.jsonl"),
        ({"training": {"device": "cuda"}}, "1 ranks on this host, but 0 CUDA devices"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: Sections, message: str
) -> None:
    if "device" in sections.get("training", {}) and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    config = material.config(tmp_path, **sections)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(OptionError, match=message):
        Trainer(config, parallel.start_ranks(config.training.device))


def test_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    table = material.table(tmp_path, optimizer={"warmup_steps": 10_000}, training={"epochs": 1})
    del table["training"]["total_steps"]
    with pytest.raises(
        OptionError, match=r"optimizer.warmup_steps = 10000: must be at most the \d+ steps of .*epochs = 1"
    ):
        Trainer(material.parse_config(table, source="test"), parallel.start_ranks("cpu"))


def test_parameters_can_be_bfloat16(tmp_path: Path) -> None:
    bfloat16 = {"model": {"config": material.QWEN3_MOE, "dtype": "bfloat16"}, "training": {"micro_batch_size": 2}}
    alone = take_steps(tmp_path, bfloat16, 2)
    both = run_ranks(2, take_steps, tmp_path, bfloat16 | {"training": {}}, 2)
    for result in [alone, *both]:
        assert result.parameter_dtypes == {torch.bfloat16}
        assert result.losses == pytest.approx(alone.losses, rel=2e-2)
