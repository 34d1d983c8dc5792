"""The training loop, from the configuration to the last save; read `Trainer.run` first."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillframe.checkpointer import Checkpointer
from stillframe.errors import OptionError
from stillframe.limits import WriterLimits
from stillframe.policies import OnFailure
from stillframe.preemption import Preemption
from stillframe.train import model as models
from stillframe.train import optim, parallel, resuming
from stillframe.train.config import TrainConfig, as_record
from stillframe.train.data import IGNORED, Batch, PackedBatches
from stillframe.train.documents import read_corpus
from stillframe.train.hooks import Hook, load_hooks
from stillframe.train.parallel import Ranks
from stillframe.train.progress import Progress, StepMetrics
from stillframe.train.saves import Saves
from stillframe.train.state import TrainState


def train(config: TrainConfig, hooks: Sequence[Hook] = ()) -> bool:
    """Train as `config` says, with the hooks that it names and then `hooks`. Collective over the launcher's ranks.

    Goes on from the newest checkpoint or snapshot in the run directory, where there is one and `resume.auto` is on. On
    return every save is published and its hooks have run; False: the run was preempted before its last step, and is
    to be started again. Raises `OptionError` for a configuration or data that cannot be trained on, other
    `StillframeError`s as `Checkpointer` and `load_hf` do, and what hooks raise. It does not wait then for other ranks
    or for what is in flight; the launcher is to end the other ranks.
    """
    was_initialized = dist.is_initialized()
    ranks = parallel.start_ranks(config.training.device)
    is_complete = Trainer(config, ranks, [*load_hooks(config.hooks), *hooks]).run()
    if ranks.is_distributed and not was_initialized:
        dist.destroy_process_group()
    return is_complete


class Trainer:
    """One run, as hooks see it: its parts, and how far it is.

    `step` is the number of optimizer steps taken, `epoch` that of the last one's first token; `checkpointer` is there
    while it runs, `total_steps` once it is known where the run starts.
    """

    checkpointer: Checkpointer
    total_steps: int

    def __init__(self, config: TrainConfig, ranks: Ranks, hooks: Sequence[Hook] = ()) -> None:
        self.config = config
        self.ranks = ranks
        self.hooks = list(hooks)
        self.run_dir = Path(config.run_dir)
        self.step = 0
        self.epoch = 1
        self.consumed_samples = 0
        self.consumed_tokens = 0
        self.schedule_begin = 0
        self._time_before_s = 0.0
        self.compute_dtype: torch.dtype = getattr(torch, config.training.compute_dtype or config.model.dtype)

        resuming.require_startable(self.run_dir, config.resume)
        self.tokenizer = models.load_tokenizer(config.model)
        self.data = PackedBatches(
            read_corpus(config.data.files, self.tokenizer),
            seq_len=config.data.seq_len,
            micro_batch_size=config.training.micro_batch_size,
            gradient_accumulation_steps=config.training.gradient_accumulation_steps,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=config.seed,
        )
        self._set_length()
        self.model: PreTrainedModel = models.build_model(
            config.model,
            vocab_size=len(self.tokenizer),
            seed=config.seed,
            compute_dtype=self.compute_dtype,
            ranks=ranks,
        )
        self.aux_loss_coef = _aux_loss_coef(self.model)
        self.optimizer = optim.build_optimizer(self.model, config.optimizer)
        parallel.seed_own_numbers(ranks, seed=config.seed, step=0)
        self._started_s = time.perf_counter()

    def run(self) -> bool:
        """Take all steps that are left, and all saves; False if the run was preempted before. Collective."""
        export, checkpoint = self.config.export, self.config.checkpoint
        self.checkpointer = Checkpointer(
            self.run_dir,
            model=self.model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizer,
            dataloader=self.data,
            max_shard_size=export.max_shard_size,
            save_dtype=export.save_dtype,
            keep_in_fp32=export.keep_in_fp32,
            keep_in_bf16=export.keep_in_bf16,
            layout=export.layout,
            file_naming=export.file_naming,
            hf_max_keep=export.hf_max_keep,
            checkpoint_maxkeep=checkpoint.checkpoint_maxkeep,
            publish_together=checkpoint.publish_together,
            save_frozen=checkpoint.save_frozen,
            writer_limits=WriterLimits(**asdict(self.config.writer)),
            on_failure=OnFailure(checkpoint.on_failure, checkpoint.max_failures),
            on_export_failure=OnFailure(export.on_failure, export.max_failures),
        )
        with self.checkpointer:
            resumption = resuming.resume(self)
            self._set_length()
            with Progress(self.run_dir, rank=self.ranks.rank, total_steps=self.total_steps) as progress:
                progress.say(self._headline())
                for line in resuming.recovered(self.checkpointer):
                    progress.say(line)
                if resumption is not None:
                    resumption.tell(progress)
                for hook in self.hooks:
                    hook.connect(self)
                saves = Saves(
                    self.checkpointer,
                    self.config,
                    self.hooks,
                    progress,
                    total_steps=self.total_steps,
                    total_epochs=self._last_epoch(),
                    overwrite=resumption is not None,
                )
                if resumption is not None and resumption.lacks_export and "hf" in saves.due(self.step):
                    saves.launch(("hf",), self.step, self.epoch, {})
                if self.step >= self.total_steps:
                    progress.say(f"step {self.step} of {self.total_steps}: nothing is left to train")
                with self._preemption(saves) as preemption:
                    self._take_steps(saves, progress, preemption)
                    saves.deliver_all(self.step)
        return self.step >= self.total_steps

    def _preemption(self, saves: Saves) -> AbstractContextManager[Preemption | None]:
        """Only for a run that can be gone on with, and on the main thread, as Python has no signals elsewhere."""
        checkpoint = self.config.checkpoint
        is_main = threading.current_thread() is threading.main_thread()
        if not checkpoint.preemption or saves.at_preemption is None or not is_main:
            return nullcontext()
        return Preemption(self.checkpointer, budget_s=checkpoint.preemption_budget_s)

    def _take_steps(self, saves: Saves, progress: Progress, preemption: Preemption | None) -> None:
        """All steps that are left, or as many as there is time for."""
        self._started_s = time.perf_counter()
        log = _Window(self)
        first_step = self.step + 1
        for step in range(first_step, self.total_steps + 1):
            self.checkpointer.check()
            batches = self.data.batches()
            # One small reduction serves two questions: how to scale the loss, and whether every rank knows of a
            # publication, so that its hooks run at the same step on all of them.
            own_label_tokens = sum(batch.label_tokens for batch in batches)
            label_tokens, settled = self.ranks.sum(own_label_tokens, saves.is_settled())
            if settled == self.ranks.world_size:
                saves.deliver(step - 1)
            saving = saves.in_flight()
            started_s = time.perf_counter()
            loss, grad_norm = self.train_step(step, batches, label_tokens)
            self._count(step)
            log.add(loss, label_tokens, time.perf_counter() - started_s, saving)
            if step % self.config.training.log_interval == 0 or step == self.total_steps:
                progress.step(log.close(step, grad_norm, saves.in_flight()))
            for hook in self.hooks:
                hook.after_train_step(step)
            if step == first_step:
                saves.prepare()  # now that the optimizer has its state
            if preemption is not None and step < self.total_steps and preemption.due(step):
                name = saves.save_to_go_on(step, self.epoch, self.state().as_record())
                said = f"preempted by {preemption.why} after step {step} of {self.total_steps}"
                how = "without a save of it" if name is None else f"{name} is saved, and the same command goes on there"
                progress.say(f"{said}: {how}")
                return
            if kinds := saves.due(step):
                saves.launch(kinds, step, self.epoch, self.state().as_record())

    def _count(self, step: int) -> None:
        """`step` is taken."""
        self.step = step
        self.epoch = self.data.epoch_ahead()
        self.data.advance()
        self.consumed_samples += self.data.sequences_per_step
        self.consumed_tokens += self.data.tokens_per_step

    def state(self) -> TrainState:
        """How far the run is now, as checkpoints keep it."""
        return TrainState(
            step=self.step,
            epoch=self.epoch,
            consumed_samples=self.consumed_samples,
            consumed_tokens=self.consumed_tokens,
            train_time_s=self._time_before_s + time.perf_counter() - self._started_s,
            schedule_begin=self.schedule_begin,
            config=as_record(self.config),
        )

    def load_state(self, state: TrainState) -> None:
        """Go on as counted there; the position in the data is the data's own."""
        self.step = state.step
        self.epoch = state.epoch
        self.consumed_samples = state.consumed_samples
        self.consumed_tokens = state.consumed_tokens
        self.schedule_begin = state.schedule_begin
        self._time_before_s = state.train_time_s

    def _set_length(self) -> None:
        """`total_steps`, from where the run and its data are now; refuses a schedule shorter than its warm-up."""
        training, warmup_steps = self.config.training, self.config.optimizer.warmup_steps
        self.total_steps = training.total_steps or self.step + self.data.steps_for(training.epochs or 1)
        schedule_steps = self.total_steps - self.schedule_begin
        if self.step < self.total_steps and warmup_steps > schedule_steps:
            whose = f"training.epochs = {training.epochs}" if self.schedule_begin == 0 else "the schedule that is left"
            raise OptionError(
                f"optimizer.warmup_steps = {warmup_steps}: must be at most the {schedule_steps} steps of {whose}"
            )

    def _last_epoch(self) -> int:
        left = self.total_steps - self.step
        return self.data.epoch_ahead(left - 1) if left > 0 else self.epoch

    def train_step(self, step: int, batches: Sequence[Batch], label_tokens: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on `batches`; `label_tokens` counts those of all ranks. Collective.

        Returns this rank's part of the loss, a sum over its label tokens, and the gradients' norm before clipping, both
        on the device. The gradient is that of the mean loss per label token over all ranks and micro-batches, however
        unevenly those hold them, plus the mean of the auxiliary losses, where the model's configuration has them.
        """
        # FSDP averages gradients over the ranks, so a sum over all tokens needs the world size back.
        scale = self.ranks.world_size / max(1, label_tokens)
        loss_sum = torch.zeros((), device=self.ranks.device)
        for micro_step, batch in enumerate(batches):
            parallel.set_gradient_sync(self.model, last_micro_step=micro_step == len(batches) - 1)
            token_loss, aux_loss = self.loss(batch)
            (token_loss * scale + aux_loss / len(batches)).backward()  # type: ignore[no-untyped-call]
            loss_sum += token_loss.detach()
        grad_norm = optim.clip_gradients(self.model, self.config.optimizer.max_grad_norm)
        begin = self.schedule_begin
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(step - begin, self.total_steps - begin, self.config.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_sum, grad_norm

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The cross entropy summed over the batch's label tokens, and the weighted auxiliary (router) loss, or 0."""
        device = self.ranks.device
        with parallel.autocast(self.ranks, self.compute_dtype):
            output = self.model(
                input_ids=batch.input_ids.to(device),
                position_ids=batch.position_ids.to(device),
                use_cache=False,
            )
        labels = batch.labels.to(device).flatten()
        logits = output.logits.flatten(0, 1).float()
        token_loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        aux_loss = output.get("aux_loss")
        if aux_loss is None:
            return token_loss, torch.zeros_like(token_loss)
        return token_loss, self.aux_loss_coef * aux_loss

    def _headline(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{type(self.model).__name__.removeprefix('FSDP')}, {parameters / 1e6:.1f} million parameters, "
            f"{str(self.compute_dtype).removeprefix('torch.')}, on {self.ranks.world_size} x {self.ranks.device.type}; "
            f"{self.data.tokens_per_epoch:,} tokens an epoch, {self.data.tokens_per_step:,} a step, "
            f"{self.total_steps} steps"
        )


class _Window:
    """What happened since the last logged step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clear()

    def _clear(self) -> None:
        self._loss_sum = torch.zeros((), device=self._trainer.ranks.device)
        self._label_tokens = 0.0
        self._steps = 0
        self._steps_s = 0.0
        self._saving: str | None = None
        self._started_s = time.perf_counter()

    def add(self, loss: Tensor, label_tokens: float, step_s: float, saving: str | None) -> None:
        """A step was taken; `saving` is the save that was in flight when it began."""
        self._saving = saving or self._saving
        self._loss_sum += loss
        self._label_tokens += label_tokens
        self._steps += 1
        self._steps_s += step_s

    def close(self, step: int, grad_norm: Tensor, saving: str | None) -> StepMetrics:
        """The metrics of the window, and a new window; `saving` is the save in flight now. Collective; waits for the
        device."""
        trainer = self._trainer
        if saving is None and self._saving is not None:
            saving = f"{self._saving.partition(':')[0]}: over meanwhile"
        synced_s = time.perf_counter()
        (loss_sum,) = trainer.ranks.sum(self._loss_sum.item())
        now_s = time.perf_counter()
        metrics = StepMetrics(
            step=step,
            epoch=trainer.epoch,
            loss=loss_sum / max(1, self._label_tokens),
            learning_rate=trainer.optimizer.param_groups[0]["lr"],
            grad_norm=grad_norm.item(),
            tokens_per_s=self._steps * trainer.data.tokens_per_step / (now_s - self._started_s),
            # What the device still had queued belongs to the steps too.
            step_s=(self._steps_s + now_s - synced_s) / self._steps,
            saving=saving,
        )
        self._clear()
        return metrics


def _aux_loss_coef(model: PreTrainedModel) -> float:
    """The weight of the router's auxiliary loss, which Transformers adds only to a loss that it computes itself."""
    return float(getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0))
