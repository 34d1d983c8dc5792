"""What a checkpoint says of the run beside the tensors: how far it is, and with which configuration it came there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillframe.errors import LoadError

_NOT_COMPARED = ("run_dir", "resume.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """The state after `step`, totals since the run's first step, however often it was resumed. JSON, rank 0's.

    `epoch` is that of the last step's first token. A sample is a sequence. `train_time_s` is what training and saving
    took, without the starts. The learning rate's schedule began after `schedule_begin`, 0 unless it was begun anew.
    `config` has every key of the configuration, dotted.
    """

    step: int
    epoch: int
    consumed_samples: int
    consumed_tokens: int
    train_time_s: float
    schedule_begin: int
    config: Mapping[str, Any]

    def as_record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, path: str) -> TrainState:
        """Raises LoadError for a record that the trainer did not write; `path` is the checkpoint's, for the message."""
        kinds: dict[str, type] = dict.fromkeys(
            ("step", "epoch", "consumed_samples", "consumed_tokens", "schedule_begin"), int
        )
        kinds |= {"train_time_s": float, "config": dict}
        for name, kind in kinds.items():
            if not isinstance(record.get(name), kind):
                raise LoadError(
                    f"{path}: its train state has no {name} that the trainer could go on with, but "
                    f"{record.get(name)!r}; was it saved by another program than `stillframe train`?"
                )
        return cls(**{name: record[name] for name in kinds})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose value is another now, with both; without those that say where a run is, not what it does."""
    names = sorted(name for name in before.keys() | now.keys() if not name.startswith(_NOT_COMPARED))
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    ]
