"""A training that ends by Ctrl-C or an exception, with a save in flight, ends at once and leaves only its writer."""

from __future__ import annotations

import select
import signal
from pathlib import Path

import pytest

from tests.multirank.test_failures import names, training

IN_FLIGHT = """
stop_writer()
ckpt.async_save_hf(1)
wait_until_asked()
"""

ENDS = {
    "Ctrl-C": ("with ckpt:\n    os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    "exception": ("with ckpt, stillframe.Preemption(ckpt):\n    raise ValueError('loss is nan')", 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_process_ends_without_its_writer_which_finishes_and_ends_too(tmp_path: Path, end: str) -> None:
    """Had it waited for the writer, which is stopped, it would not have ended before the launcher's deadline."""
    code, status = ENDS[end]
    receipt = tmp_path / "run/.hf-1.incomplete/.stillframe/receipt-00000.json"
    with training(IN_FLIGHT + code, tmp_path / "run", tmp_path / "log") as ended:
        assert ended.status == status, ended.said
        assert not receipt.exists()
        # Gone with the process are its threads, its sockets and its end of the arena; all that is left is the writer.
        assert ended.writer_pidfd is not None
        signal.pidfd_send_signal(ended.writer_pidfd, signal.SIGCONT)
        assert select.select([ended.writer_pidfd], [], [], 60)[0], "the writer did not end"
    assert receipt.exists()
    assert names(tmp_path / "run") == [".hf-1.incomplete"]
