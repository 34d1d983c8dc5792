"""Whole runs in one process: what is exported when, what hooks see, what is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillframe.errors import OptionError
from stillframe.testing import RankFailed, run_ranks
from stillframe.train import loop
from stillframe.train.hooks import Hook, load_hooks
from stillframe.train.loop import train
from stillframe.train.saves import Kind, Saves
from tests.unit.train import material


class Recorder(Hook):
    """Notes every call, and for exports what is there at that moment."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def after_train_step(self, step: int) -> None:
        assert step == self.trainer.step
        self.calls.append(("step", step))

    def after_hf_export(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
        names = {entry.name for entry in path.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
        self.calls.append(("export", path.name, step, epoch, total_step, total_epoch))

    def exports(self) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == "export"]


def published(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir() if path.is_dir()}


@pytest.mark.parametrize(
    ("export", "steps"),
    [
        ({}, [5]),
        ({"hf_interval": 2}, [2, 4, 5]),
        ({"hf_interval": 5}, [5]),
        ({"hf_interval": 2, "hf_max_keep": 2}, [4, 5]),
        ({"hf_interval": 2, "async_hf_export": False}, [2, 4, 5]),
    ],
)
def test_exports_are_at_multiples_and_at_the_last_step(
    tmp_path: Path, export: dict[str, Any], steps: list[int]
) -> None:
    recorder = Recorder()
    train(material.config(tmp_path, export=export, training={"total_steps": 5}), [recorder])
    assert published(tmp_path / "run") == {f"hf-{step}" for step in steps} | {"hf-latest"}
    assert (tmp_path / "run" / "hf-latest").readlink() == Path("hf-5")
    made = [2, 4, 5] if export.get("hf_interval") == 2 else [5]
    assert [call[2] for call in recorder.exports()] == made
    assert [call for call in recorder.calls if call[0] == "step"] == [("step", step) for step in range(1, 6)]


def test_synchronous_exports_are_delivered_before_the_next_step(tmp_path: Path) -> None:
    recorder = Recorder()
    export = {"hf_interval": 1, "async_hf_export": False}
    train(material.config(tmp_path, export=export, training={"total_steps": 3}), [recorder])
    assert [call[0] for call in recorder.calls] == ["step", "export"] * 3


def test_hooks_get_the_export_s_own_step_and_epoch(tmp_path: Path) -> None:
    table = material.table(tmp_path, training={"epochs": 2, "micro_batch_size": 8}, export={"hf_interval": 5})
    table["data"]["seq_len"] = 64
    del table["training"]["total_steps"]
    recorder = Recorder()
    train(material.parse_config(table, source="test"), [recorder])
    data = recorder.trainer.data
    total = recorder.trainer.total_steps
    assert (total - 1) * data.tokens_per_step < 2 * data.tokens_per_epoch <= total * data.tokens_per_step
    assert total > 10
    expected = [*range(5, total, 5), total]
    epochs = {s: (s - 1) * data.tokens_per_step // data.tokens_per_epoch + 1 for s in expected}
    assert recorder.exports() == [("export", f"hf-{s}", s, epochs[s], total, 2) for s in expected]
    assert {epoch for _, _, _, epoch, _, _ in recorder.exports()} == {1, 2}


def test_export_is_the_model_at_its_step(tmp_path: Path) -> None:
    class Keeper(Hook):
        def __init__(self) -> None:
            self.weights: dict[int, dict[str, torch.Tensor]] = {}

        def after_train_step(self, step: int) -> None:
            self.weights[step] = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}

    keeper = Keeper()
    train(material.config(tmp_path, export={"hf_interval": 1}, model={"config": material.QWEN3_MOE}), [keeper])
    for step, weights in keeper.weights.items():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"hf-{step}").state_dict()
        assert exported.keys() == weights.keys()
        assert all(torch.equal(exported[name], weight) for name, weight in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "hf-latest")
    assert tokenizer.chat_template == material.MARKED_TEMPLATE


def test_metrics_file_has_every_logged_step_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"total_steps": 7, "log_interval": 3}
    train(material.config(tmp_path, export={"hf_interval": 4}, training=training))
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == [3, 6, 7]
    for event in steps:
        assert event.keys() == {
            *("event", "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_s", "step_s", "saving")
        }
        assert 0 < event["loss"] < 7
    exports = [event for event in events if event["event"] == "hf_export"]
    assert [event["step"] for event in exports] == [4, 7]
    for event in exports:
        assert event["staged_bytes"] > 0
        assert event["wait_s"] <= event["stall_s"] <= event["published_s"]
        assert event["seen_at_step"] >= event["step"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 3/7", "step 6/7", "step 7/7"]
    assert [line.split(":")[0] for line in lines if line.startswith("hf-")] == ["hf-4 published", "hf-7 published"]


def test_loss_of_a_log_line_is_the_mean_over_its_steps(tmp_path: Path) -> None:
    def losses(name: str, log_interval: int) -> list[float]:
        table = material.table(tmp_path, training={"total_steps": 6, "log_interval": log_interval})
        train(material.parse_config(table | {"run_dir": str(tmp_path / name)}, source="test"))
        events = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [event["loss"] for event in events if event["event"] == "step"]

    class Counts(Hook):
        """Of each step, how many label tokens it has: what is next after a step is that of the next one."""

        def __init__(self) -> None:
            self.label_tokens: dict[int, int] = {}

        def connect(self, trainer: loop.Trainer) -> None:
            super().connect(trainer)
            self.after_train_step(0)

        def after_train_step(self, step: int) -> None:
            self.label_tokens[step + 1] = sum(batch.label_tokens for batch in self.trainer.data.batches())

    counts = Counts()
    train(material.config(tmp_path, training={"total_steps": 6}), [counts])
    label_tokens = counts.label_tokens
    each, threes = losses("each", 1), losses("threes", 3)
    for window, mean in zip([(1, 2, 3), (4, 5, 6)], threes, strict=True):
        total = sum(label_tokens[step] for step in window)
        assert mean == pytest.approx(sum(each[step - 1] * label_tokens[step] for step in window) / total, rel=1e-5)


class RaisesAfterExport(Hook):
    def after_hf_export(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
        raise RuntimeError(f"the hook of {path.name} failed")


def test_what_a_hook_raises_ends_the_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the hook of hf-1 failed"):
        train(material.config(tmp_path, export={"hf_interval": 1}), [RaisesAfterExport()])
    assert (tmp_path / "run" / "hf-1").is_dir()


def test_hooks_are_found_by_name() -> None:
    (hook,) = load_hooks([f"{__name__}:Recorder"])
    assert type(hook).__name__ == "Recorder"
    with pytest.raises(OptionError, match="no module 'absent_module'"):
        load_hooks(["absent_module:Hook"])
    with pytest.raises(OptionError, match=r"no module 'absent\.module'"):
        load_hooks(["absent.module:Hook"])
    for name in ("Path", "absent", "published"):
        with pytest.raises(OptionError, match=f"'{__name__}:{name}' is no class derived from"):
            load_hooks([f"{__name__}:{name}"])


def test_a_hook_s_own_missing_import_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_hooks(["needs_more:Hook"])


class LateOnRankOne(Saves):
    """On rank 1, publications become known two steps later than they do."""

    def launch(self, kinds: Sequence[Kind], step: int, epoch: int, train_state: Mapping[str, Any]) -> None:
        super().launch(kinds, step, epoch, train_state)
        self.questions = 0

    def is_settled(self) -> bool:
        if not super().is_settled():
            return False
        self.questions += 1
        return dist.get_rank() == 0 or self.questions > 2


def train_and_tell(work_dir: Path) -> list[tuple[Any, ...]]:
    """Hooks with a collective in them: all ranks must call them at the same step."""
    loop.Saves = LateOnRankOne  # type: ignore[misc]

    class Sums(Recorder):
        def after_hf_export(self, path: Path, step: int, epoch: int, total_step: int, total_epoch: int) -> None:
            super().after_hf_export(path, step, epoch, total_step, total_epoch)
            self.calls.append(("sum", self.trainer.step, *self.trainer.ranks.sum(self.trainer.step)))

    sums = Sums()
    train(material.config(work_dir, export={"hf_interval": 5}, training={"total_steps": 14}), [sums])
    return sums.calls


def test_all_ranks_call_hooks_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(2, train_and_tell, tmp_path, timeout_s=60)
    assert first == second
    sums = [call for call in first if call[0] == "sum"]
    assert all(total == 2 * step for _, step, total in sums)
    steps = [step for _, step, _ in sums]
    assert len(steps) == 3
    assert 5 + 2 <= steps[0] <= 10  # not before rank 1 knew, and with the next export at the latest
    assert steps[2] == 14


def train_with_failing_rank(work_dir: Path) -> None:
    class Fails(Hook):
        def after_train_step(self, step: int) -> None:
            if step == 3 and self.trainer.ranks.rank == 1:
                raise RuntimeError("rank 1 has had enough")

    train(material.config(work_dir, export={"hf_interval": 2}, training={"total_steps": 10**6}), [Fails()])


def test_an_exception_on_one_rank_ends_it_at_once(tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, train_with_failing_rank, tmp_path, timeout_s=60)
    reasons = {failure.rank: failure.reason for failure in caught.value.failures}
    assert reasons[1] == "RuntimeError: rank 1 has had enough"
