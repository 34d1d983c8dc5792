"""A hook for comparison: at the last step, gather the whole model the plain way and save it with `save_pretrained`.

Nothing of stillframe has a hand in it: torch gathers the weights, Transformers writes them. That gather is what
stillframe's exports do without; here it makes the files that they must be identical to.
"""

from __future__ import annotations

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from stillframe.train.hooks import Hook


class SaveReference(Hook):
    def after_train_step(self, step: int) -> None:
        trainer = self.trainer
        if step != trainer.total_steps:
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(trainer.model, options=options)
        if trainer.ranks.rank == 0:
            unsharded = AutoModelForCausalLM.from_config(trainer.model.config, dtype=torch.float32)
            unsharded.load_state_dict(weights)
            reference_dir = trainer.run_dir.parent / "reference"
            unsharded.save_pretrained(reference_dir, max_shard_size=trainer.config.export.max_shard_size)
            trainer.tokenizer.save_pretrained(reference_dir)
