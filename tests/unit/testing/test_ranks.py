"""The rank launcher: real processes that return, raise, hang, die, and leave things behind."""

from __future__ import annotations

import atexit
import os
import select
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from stillframe.testing import RankFailed, Ranks, hold_at, leftovers, reached, run_process, run_ranks


def sum_of_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return dist.get_rank(), total.item()


@pytest.mark.parametrize("world_size", [1, 3])
def test_results_come_back_by_rank_from_one_process_group(world_size: int) -> None:
    total = float(sum(range(world_size)) + 10 * world_size)
    assert run_ranks(world_size, sum_of_ranks, 10) == [(rank, total) for rank in range(world_size)]


def where_am_i() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "threads": torch.get_num_threads(),
        "distributed": dist.is_initialized(),
        "value": os.environ["STILLFRAME_TEST_VALUE"],
        "dir": str(Path.cwd()),
        "torch was there": "torch" in sys.modules,
    }


def test_run_process_is_fresh_and_takes_over_environment_and_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("first", "second"):
        monkeypatch.setenv("STILLFRAME_TEST_VALUE", value)
        seen = run_process(where_am_i)
        assert seen.pop("pid") != os.getpid()
        assert seen == {
            "threads": 1,
            "distributed": False,
            "value": value,
            "dir": str(tmp_path),
            "torch was there": True,
        }


def torchrun_variables() -> list[str]:
    return [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]


def test_ranks_see_the_variables_that_torchrun_sets() -> None:
    assert run_ranks(2, torchrun_variables) == [["0", "2", "0", "2"], ["1", "2", "1", "2"]]
    assert "RANK" not in os.environ


def fail_on(bad_rank: int) -> None:
    print("about to work")
    if dist.get_rank() == bad_rank:
        raise LookupError("nothing in the box")
    dist.barrier()


def test_an_exception_names_the_rank_and_carries_traceback_output_and_the_exception() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(3, fail_on, 1)
    failure = next(failure for failure in caught.value.failures if failure.rank == 1)
    assert isinstance(failure.error, LookupError)
    assert failure.reason == "LookupError: nothing in the box"
    assert "in fail_on" in failure.traceback
    assert failure.output == "about to work"
    assert "--- rank 1: LookupError: nothing in the box" in str(caught.value)


def wait_forever_unless(bad_rank: int) -> None:
    if dist.get_rank() == bad_rank:
        sys.exit(3)
    threading.Event().wait()


def test_the_others_are_given_up_soon_after_one_failed_with_their_stacks() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, wait_forever_unless, 0)
    assert [failure.rank for failure in caught.value.failures] == [0, 1]
    assert caught.value.failures[0].reason == "SystemExit: 3"
    assert "still running 3 s after another rank failed" in caught.value.failures[1].reason
    assert "in wait_forever_unless" in caught.value.failures[1].traceback


def test_who_is_late_is_named_with_the_stack() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, wait_forever_unless, 5, timeout_s=1.0)
    assert [failure.reason for failure in caught.value.failures] == ["late: still running after 1 s"] * 2
    assert "in wait_forever_unless" in str(caught.value)


def return_early_but_for_one(hung_rank: int) -> int:
    if dist.get_rank() == hung_rank:
        threading.Event().wait()
    return dist.get_rank()


def test_ranks_that_only_wait_for_a_late_one_are_not_blamed() -> None:
    with Ranks(3, return_early_but_for_one, 1, timeout_s=1.0) as ranks:
        outcomes = ranks.outcomes()
    assert [outcome.value for outcome in outcomes] == [0, None, 2]
    assert [outcome.failure is None for outcome in outcomes] == [True, False, True]


def return_first_or_watch_the_first() -> bool:
    first_pid = torch.tensor(os.getpid())
    dist.broadcast(first_pid, src=0)
    if dist.get_rank() == 0:
        return True
    descriptor = os.pidfd_open(int(first_pid))
    try:
        ended, _, _ = select.select([descriptor], [], [], 0.5)
    finally:
        os.close(descriptor)
    return not ended


def test_a_rank_stays_until_the_others_are_done_too() -> None:
    assert run_ranks(2, return_first_or_watch_the_first) == [True, True]


def stop_oneself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_stopped_process_is_ended_too() -> None:
    with pytest.raises(RankFailed, match="gave no stack within 2 s"):
        run_process(stop_oneself, timeout_s=0.5)


def die_of(signum: signal.Signals) -> None:
    print("last words")
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_death_by_a_signal_is_reported_as_such(signum: signal.Signals) -> None:
    with pytest.raises(RankFailed) as caught:
        run_process(die_of, signum)
    (failure,) = caught.value.failures
    assert failure.reason == f"killed by {signum.name}"
    assert failure.output.startswith("last words")


def leave_without_a_word() -> None:
    os._exit(0)


def test_a_process_that_leaves_no_result_has_failed() -> None:
    with pytest.raises(RankFailed, match="rank 0: ended with exit code 0"):
        run_process(leave_without_a_word)


def warn() -> str:
    warnings.warn("careful", FutureWarning, stacklevel=1)
    return "went on"


def test_warning_filters_are_taken_over() -> None:
    with pytest.raises(RankFailed, match="FutureWarning: careful"):
        run_process(warn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CAREFUL", FutureWarning, module=__name__)
        assert run_process(warn) == "went on"


def raise_in_thread() -> str:
    thread = threading.Thread(target=lambda: {}["lost"], name="courier")
    thread.start()
    thread.join()
    return "noticed nothing"


class RaisesWhenCollected:
    def __del__(self) -> None:
        raise OSError("while collected")


def raise_in_del() -> str:
    del [RaisesWhenCollected()][0]
    return "noticed nothing"


def test_exceptions_that_nobody_can_catch_fail_the_rank() -> None:
    with pytest.raises(RankFailed, match=r"(?s)an exception that nothing handled.*'courier'.*KeyError: 'lost'"):
        run_process(raise_in_thread)
    with pytest.raises(RankFailed, match=r"(?s)an exception that nothing handled.*while collected"):
        run_process(raise_in_del)


def end_with_a_thread_and_an_exit_function(path: Path) -> None:
    going_on = threading.Event()
    threading.Thread(target=lambda: (going_on.wait(), path.write_text("thread "))).start()
    atexit.register(lambda: path.write_text(path.read_text() + "exit function"))
    going_on.set()


def test_threads_end_and_exit_functions_run_as_in_any_program(tmp_path: Path) -> None:
    run_process(end_with_a_thread_and_an_exit_function, tmp_path / "said")
    assert (tmp_path / "said").read_text() == "thread exit function"


def start_sleeper(new_session: bool) -> int:
    return subprocess.Popen(["sleep", "1000"], start_new_session=new_session).pid


@pytest.mark.parametrize("new_session", [False, True])
def test_programs_that_a_rank_started_do_not_outlive_the_call(
    new_session: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillframe.testing.ranks._LEFTOVERS_WAIT_S", 0.1)
    with pytest.raises(RuntimeError, match=r"these it left still ran: process (\d+) \(sleep 1000\)") as caught:
        run_process(start_sleeper, new_session)
    pid = int(str(caught.value).partition("process ")[2].split()[0])
    assert _gone(pid)


def announce_and_hold(path: Path) -> str:
    reached("begun")
    for number in range(2):
        hold_at(f"held {number}")
        path.write_text(f"passed {number}")
    return "done"


def test_ranks_are_watched_held_and_released(tmp_path: Path) -> None:
    path = tmp_path / "progress"
    with Ranks(1, announce_and_hold, path, backend=None) as ranks:
        ranks.wait_reached("held 0", rank=0)
        ranks.wait_reached("begun", rank=0)
        assert not path.exists()
        ranks.release(0)
        ranks.wait_reached("held 1", rank=0)
        assert path.read_text() == "passed 0"
        ranks.release(0)
        assert ranks.join() == ["done"]


def hold_both() -> str:
    hold_at("point")
    dist.destroy_process_group()
    return "went on"


def test_a_held_rank_can_be_killed_and_the_others_go_on() -> None:
    with Ranks(2, hold_both) as ranks:
        for rank in range(2):
            ranks.wait_reached("point", rank=rank)
        ranks.send_signal(1, signal.SIGKILL)
        assert _gone(ranks.pids[1])
        ranks.release(0)
        first, second = ranks.outcomes()
    assert (first.value, first.failure) == ("went on", None)
    assert second.value is None
    assert second.failure is not None
    assert second.failure.reason == "killed by SIGKILL"


def test_waiting_for_a_point_that_is_never_reached_fails_at_once() -> None:
    with pytest.raises(RankFailed, match="ended without reaching 'elsewhere'"), Ranks(1, os.getpid) as ranks:
        ranks.wait_reached("elsewhere", rank=0)


def test_leaving_the_handle_kills_what_runs() -> None:
    with Ranks(2, wait_forever_unless, 5) as ranks:
        pids = ranks.pids
    assert all(_gone(pid) for pid in pids)


_LAUNCHER_THAT_IS_KILLED = """
import os, signal
from pathlib import Path
from stillframe.testing import Ranks
from tests.unit.testing.test_ranks import wait_forever_unless

if __name__ == "__main__":
    with Ranks(2, wait_forever_unless, 5) as ranks:
        print(*ranks.pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_die_with_a_launcher_that_is_killed(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    launcher = subprocess.run(
        [sys.executable, "-c", _LAUNCHER_THAT_IS_KILLED],
        cwd=pytestconfig.rootpath,
        env={**os.environ, "TMPDIR": str(tmp_path)},  # nobody is left to remove its scratch directory
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert launcher.returncode == -signal.SIGKILL, launcher.stderr
    sessions = {int(pid) for pid in launcher.stdout.split()}
    assert len(sessions) == 2
    assert leftovers.wait_until_gone("no launch id", sessions, timeout_s=30) == []


def test_what_cannot_travel_is_refused_in_the_caller() -> None:
    with pytest.raises(TypeError, match=r"<lambda>.*Define the function at the top level of an importable module"):
        run_ranks(2, lambda: None)
    with pytest.raises(ValueError, match="world_size is 0"):
        run_ranks(0, os.getpid)


def return_something_local() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_fails_the_rank() -> None:
    with pytest.raises(RankFailed, match="return_something_local"):
        run_process(return_something_local)


def test_reached_outside_a_launched_process_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"only in a process that stillframe\.testing started"):
        reached("nowhere")


def _gone(pid: int) -> bool:
    """Whether a process is gone, or a zombie that init has yet to reap."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True
