"""Calls that come at odd times or in odd places."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import stillframe
from stillframe.errors import SaveFailed, StillframeError
from stillframe.frames import Part, What
from stillframe.snapshot.arena import Arena
from stillframe.testing import run_process
from stillframe.testing.models import tiny_qwen3
from tests.multirank.exports import digests, filled


def _weights(directory: Path) -> str:
    return digests(directory)["model.safetensors"]


def _save_from_a_signal_handler(run_dir: Path) -> None:
    model = tiny_qwen3()
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        refused: list[SaveFailed] = []

        def handler(number: int, frame: object) -> None:
            with pytest.raises(SaveFailed, match="another save is being called right now") as caught:
                ckpt.save_hf(2)
            refused.append(caught.value)

        signal.signal(signal.SIGUSR1, handler)
        # The snapshot looks at the tensors' modules: a hook there is in the middle of the call.
        original = ckpt._live_frames().take

        def interrupted(what: What, *, train_state: bytes) -> tuple[Part, ...]:
            os.kill(os.getpid(), signal.SIGUSR1)
            return original(what, train_state=train_state)

        ckpt._live_frames().take = interrupted  # type: ignore[method-assign]
        ckpt.save_hf(1)
        assert len(refused) == 1
    assert sorted(path.name for path in run_dir.iterdir()) == ["hf-1", "hf-latest", "run.json"]


def test_a_save_from_a_signal_handler_in_the_middle_of_another_is_refused(tmp_path: Path) -> None:
    run_process(_save_from_a_signal_handler, tmp_path)


def _fail_to_plan_anew_once(run_dir: Path) -> None:
    model = tiny_qwen3(tied=False)
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        ckpt.save_hf(1)
        head = model.lm_head
        with torch.device("meta"):
            model.lm_head = nn.Linear(56, 388)  # no values yet: cannot be saved
        with pytest.raises(SaveFailed, match="no values yet") as caught:
            ckpt.save_hf(2)
        assert (caught.value.step, caught.value.rank) == (2, 0)
        model.lm_head = head
        ckpt.save_hf(3)
    assert _weights(run_dir / "hf-1") == _weights(run_dir / "hf-3")


def test_a_model_that_cannot_be_planned_for_a_while_is_saved_later(tmp_path: Path) -> None:
    run_process(_fail_to_plan_anew_once, tmp_path)


def _no_memory_for_a_while(run_dir: Path) -> None:
    model = tiny_qwen3(tied=False)
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        head = model.lm_head
        with pytest.raises(
            StillframeError,
            match=r"cannot allocate 70368744177664 bytes .* are available (on this host|within the memory)",
        ):
            Arena(1 << 46)
        model.lm_head = nn.Linear(56, 4000)
        ckpt._live_frames()._free_arena()  # what a plan does before it asks for a larger one
        model.lm_head = head
        ckpt.save_hf(1)
    model.save_pretrained(run_dir / "reference")
    assert _weights(run_dir / "hf-1") == _weights(run_dir / "reference")


def test_after_a_lack_of_memory_the_old_plan_is_made_again(tmp_path: Path) -> None:
    run_process(_no_memory_for_a_while, tmp_path)


def _in_inference_mode(run_dir: Path) -> None:
    model = tiny_qwen3()
    with torch.inference_mode(), stillframe.Checkpointer(run_dir, model=model) as ckpt:
        ckpt.save_hf(1)
        model.register_buffer("more", torch.ones(3))
        ckpt.save_hf(2)
    filled(model, 1.0)
    assert "model.safetensors" in digests(run_dir / "hf-2")


def test_constructing_and_saving_in_inference_mode(tmp_path: Path) -> None:
    run_process(_in_inference_mode, tmp_path)


def _moved_weights(run_dir: Path) -> None:
    import gc
    import weakref

    model = tiny_qwen3()
    with stillframe.Checkpointer(run_dir, model=model) as ckpt:
        ckpt.save_hf(1)
        old = weakref.ref(model.model.norm.weight.untyped_storage())
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        gc.collect()
        assert old() is None


def test_weights_that_moved_are_let_go(tmp_path: Path) -> None:
    run_process(_moved_weights, tmp_path)


EXIT = """
import sys
import torch
import stillframe
from stillframe.testing.models import tiny_qwen3

ckpt = stillframe.Checkpointer(sys.argv[1], model=tiny_qwen3())
future = ckpt.async_save_hf(1)
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("", 0, "was not closed before the interpreter ended"),
        ("sys.exit(3)", 3, "was not closed before the interpreter ended"),
        ("raise RuntimeError('training failed')", 1, "training failed"),
    ],
)
def test_an_interpreter_that_ends_without_close(end: str, status: int, said: str, tmp_path: Path) -> None:
    code = textwrap.dedent(EXIT.format(end=end))
    finished = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == status, finished.stderr
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr or "RuntimeError: training failed" in finished.stderr
    if status != 1:
        assert (tmp_path / "hf-1" / "stillframe.json").exists()


FREED_AT_EXIT = """
import sys
import time
import torch
import stillframe
from stillframe.snapshot.arena import Arena
from stillframe.testing.models import tiny_qwen3

close, freeing = Arena.close, []

def slowly(arena):
    freeing.append(arena)
    numbers = torch.rand(200, 200)
    end = time.monotonic() + 0.7
    while time.monotonic() < end:  # inside of torch most of the time, as a large arena's freeing is
        numbers = torch.tanh(numbers @ numbers)
    close(arena)

try:
    with stillframe.Checkpointer(sys.argv[1], model=tiny_qwen3()):
        Arena.close = slowly
        raise RuntimeError("training failed")
except RuntimeError:
    while not freeing:
        pass
"""


def test_a_process_that_ends_while_the_arena_is_freed_ends_with_its_own_status(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", FREED_AT_EXIT, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (finished.returncode, finished.stderr) == (0, "")


LET_GO = """
import gc, sys
import stillframe
from stillframe.testing.models import tiny_qwen3

def main():
    ckpt = stillframe.Checkpointer(sys.argv[1], model=tiny_qwen3())
    for step in (1, 2):
        ckpt.async_save_hf(step)

main()
gc.collect()
"""


def test_a_checkpointer_that_its_function_let_go_still_publishes_its_last_save(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", LET_GO, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "was not closed before the interpreter ended" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (tmp_path / "hf-2" / "stillframe.json").exists()
