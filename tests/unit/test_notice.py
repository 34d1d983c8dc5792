"""Noticing a signal: who else had an eye on it is not forgotten, children are not taken for the process itself."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from typing import Any

import pytest

from stillframe.errors import OptionError
from stillframe.notice import ECHO_S, PREEMPTED_STATUS, SIGNALS, Notice
from stillframe.testing import RankFailed, run_process


class Received:
    """What was noticed, once it was."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.numbers: list[signal.Signals] = []

    def __call__(self, number: signal.Signals) -> None:
        self.numbers.append(number)
        self._event.set()

    def wait(self) -> list[signal.Signals]:
        assert self._event.wait(60)
        return self.numbers


def notice(**options: Any) -> Notice:
    return Notice(**{"budget_s": 600, "in_flight": lambda: None} | options)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


def test_a_signal_is_noticed_and_all_is_as_before_afterwards() -> None:
    before = handlers()
    received = Received()
    with notice(on_received=received) as noticed:
        assert noticed.received is None
        assert handlers() != before
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received.wait() == [signal.SIGUSR1]
        assert noticed.received is signal.SIGUSR1
    assert handlers() == before
    assert not any(thread.name == "stillframe-notice" for thread in threading.enumerate())
    assert signal.set_wakeup_fd(-1) == -1


def test_an_echo_changes_nothing_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    received = Received()
    with caplog.at_level(logging.INFO, "stillframe"), notice(on_received=received) as noticed:
        os.kill(os.getpid(), signal.SIGTERM)
        received.wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received.numbers == [signal.SIGTERM]
    assert noticed.received is signal.SIGTERM
    assert "SIGUSR1 came right after SIGTERM: nothing changes" in caplog.text


def get_a_second_one() -> None:
    received = Received()
    with notice(on_received=received, in_flight=lambda: "checkpoint-3: written 61%") as noticed:
        os.kill(os.getpid(), signal.SIGUSR1)
        received.wait()
        noticed._received_s -= ECHO_S  # as if so much time had passed
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)


def test_a_second_signal_ends_the_process_at_once() -> None:
    with pytest.raises(RankFailed) as raised:
        run_process(get_a_second_one)
    assert f"ended with exit code {PREEMPTED_STATUS}" in str(raised.value)
    assert "SIGTERM came after SIGUSR1, and the process ends now: checkpoint-3: written 61%" in str(raised.value)


def test_those_who_waited_for_signals_before_get_them_too() -> None:
    heard: list[int] = []
    handler_before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        fd_before = signal.set_wakeup_fd(theirs.fileno())
        try:
            with notice():
                os.kill(os.getpid(), signal.SIGUSR1)
                ours.settimeout(60)
                assert ours.recv(1) == bytes([signal.SIGUSR1])
            os.kill(os.getpid(), signal.SIGUSR1)
            assert ours.recv(1) == bytes([signal.SIGUSR1])
            assert heard == [signal.SIGUSR1] * 2
        finally:
            assert signal.set_wakeup_fd(fd_before) == theirs.fileno()
            signal.signal(signal.SIGUSR1, handler_before)


def test_what_others_set_inside_stays() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with notice():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def end_a_child() -> tuple[int, list[signal.Signals]]:
    """How a forked process ends by SIGTERM, and what this one noticed of that; then it gets a signal itself."""
    received = Received()
    with notice(on_received=received):
        ready_fd, child_fd = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(child_fd, b"x")
            signal.pause()
            os._exit(99)
        os.read(ready_fd, 1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        return os.waitstatus_to_exitcode(status), received.wait()


def test_a_signal_for_a_child_is_not_one_for_the_process() -> None:
    assert run_process(end_a_child) == (-signal.SIGTERM, [signal.SIGUSR1])


def use_up_the_budget(of_another: bool) -> None:
    with notice(budget_s=0.2, in_flight=lambda: "checkpoint-3: written 61%") as noticed:
        if of_another:
            noticed.begin("SIGTERM on rank 7")
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(60)


@pytest.mark.parametrize(("of_another", "why"), [(False, "SIGTERM"), (True, "SIGTERM on rank 7")])
def test_a_process_that_is_not_out_in_time_says_how_far_it_is_and_ends(of_another: bool, why: str) -> None:
    with pytest.raises(RankFailed) as raised:
        run_process(use_up_the_budget, of_another)
    assert f"ended with exit code {PREEMPTED_STATUS}" in str(raised.value)
    assert f"{why} came 0.2 s ago, and the process ends now: checkpoint-3: written 61%" in str(raised.value)


def test_without_signals_nothing_is_done() -> None:
    before = handlers()
    with notice(signals=()) as noticed:
        assert handlers() == before
    assert noticed.received is None


def test_only_the_main_thread_notices_signals() -> None:
    outcome: list[BaseException] = []

    def enter() -> None:
        try:
            notice().__enter__()
        except OptionError as error:
            outcome.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(60)
    assert [str(error) for error in outcome] == [
        "signals can be noticed from the main thread only, where Python handles them"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_s": 0}, "budget_s must be"),
        ({"budget_s": float("nan")}, "budget_s must be"),
        ({"budget_s": True}, "budget_s must be"),
        ({"budget_s": "25"}, "budget_s must be"),
        ({"signals": ["SIGTERM"]}, "signals must be signals such as"),
        ({"signals": 15}, "signals must be signals such as"),
        ({"signals": [signal.SIGKILL]}, "signals: no process can handle SIGKILL"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        notice(**options)
