"""What the trainer holds of its writer process: start it, hand it plans and requests, wait for receipts.

The process is started by exec, once, and never forked from the trainer. It ends by itself when the connection does, so
none is left behind by a trainer that is killed, nor by a client that is dropped without `close`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import site
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import stillframe
from stillframe.limits import WriterLimits
from stillframe.receipts import receipt_from_object
from stillframe.records import Receipt, WritePlan, WriteRequest
from stillframe.writer.attempt import total_bytes
from stillframe.writer.framing import Connection, Frame, PeerGone, ProtocolError
from stillframe.writer.messages import plan_to_object, request_to_object

_log = logging.getLogger("stillframe")

MEANT_FOR_THE_TRAINER = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
"""What schedulers, launchers and terminals send to every process of a job to have it end. A writer heeds none of them:
its trainer does, and may need it for one more checkpoint."""


class WriterError(Exception):
    """A writer process did not do what it was asked. Internal: the commit turns it into one of `stillframe.errors`.

    `kind` is "failed" (the process reported an error and can be used again), "died" (it has ended; make a new client)
    or "timeout" (it was silent or late, and was killed; make a new client). `errno` and `file_name` are those of the
    failed file operation, where that is what happened.
    """

    def __init__(
        self,
        kind: Literal["failed", "died", "timeout"],
        reason: str,
        *,
        errno: int | None = None,
        file_name: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.errno = errno
        self.file_name = file_name


class WriterClient:
    """One rank's writer process, as its trainer sees it.

    `set_plans` and `write` are for one thread at a time (another one gets RuntimeError); `close` and `pid` for any.
    A context manager: leaving it closes.
    """

    def __init__(
        self,
        *,
        start_timeout_s: float = 60.0,
        heartbeat_timeout_s: float = 60.0,
        signal_timeout_s: float = 10.0,
        python: str = sys.executable,
        limits: WriterLimits | None = None,
    ) -> None:
        """Start the process and wait until it is ready. What of `limits` the system does not grant is logged.

        `heartbeat_timeout_s` is how long it may be silent during a write before it counts as hung, `signal_timeout_s`
        how long it gets to end once told to: at its next block when it is to stop, at the kernel's next chance after
        SIGKILL; neither takes long unless the disk hangs. Raises WriterError if it ends or is not ready within
        `start_timeout_s` (it is gone then), and OSError if it cannot be started.
        """
        self._signal_timeout_s = signal_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._plans: dict[int, WritePlan] = {}
        self._closed = False
        self._conversation = threading.Lock()  # held from a question to its answer
        self._sending = threading.Lock()  # held for one frame; `close` sends while another thread waits for an answer
        self._closing = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self._process = _start(python, theirs.fileno(), limits or WriterLimits())
                self._connection = Connection(ours, os.pidfd_open(self._process.pid))
            except BaseException:
                ours.close()
                raise
        self._finalizer = weakref.finalize(self, _hang_up, self._connection, os.getpid())
        try:
            ready = self._receive(start_timeout_s, "start")
            self._expect("ready", ready)
            for refused in ready.message["refused"]:
                _log.warning("the writer process (pid %d) goes on without a limit: %s", self.pid, refused)
        except BaseException:
            self._kill()
            self._finalizer()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's id, also after its end."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs; a client whose process has ended is of no more use than to be closed."""
        return self._process.poll() is None

    def set_plans(self, plans: Sequence[WritePlan], arena_fd: int, *, timeout_s: float = 60.0) -> None:
        """Give the process its plans, all over one arena, and the arena's memory; blocks until it has mapped it.

        The plans before are forgotten, and their arena unmapped. The caller keeps `arena_fd` and may close it. Raises
        WriterError; kind "failed" means that a plan is impossible, and no plan is set.
        """
        with self._one_conversation():
            self._plans = {}
            message = {"type": "plans", "plans": [plan_to_object(plan) for plan in plans]}
            self._send(message, descriptors=(arena_fd,), timeout_s=timeout_s)
            answer = self._receive(timeout_s, "map the arena")
            if answer.message.get("type") == "refused":
                raise WriterError("failed", str(answer.message["reason"]))
            self._expect("planned", answer)
            self._plans = {plan.plan_id: plan for plan in plans}

    def write(
        self, request: WriteRequest, *, timeout_s: float, on_progress: Callable[[int, int], None] | None = None
    ) -> Receipt:
        """Have one attempt written; blocks until it is durable, and returns the receipt that lies in the directory.

        `on_progress(done_bytes, total_bytes)` is called from this thread: once with 0 when the request has been handed
        over, then as the process reports, a few times a second at most. The arena must not change until this returns
        or raises. Whichever it does, the process writes no more of it: one that is late or silent is killed.

        Raises WriterError, after at most `timeout_s` and the few seconds of a kill.
        """
        with self._one_conversation():
            plan = self._plans.get(request.plan_id)
            if plan is None:
                raise RuntimeError(f"write was called before set_plans with plan {request.plan_id}")
            deadline = time.monotonic() + timeout_s
            # The process keeps the working directory that it was started in; ours may have changed.
            data, blob = request_to_object(replace(request, directory=request.directory.absolute()))
            all_bytes = total_bytes(plan, request)
            self._send({"type": "write", "request": data, "timeout_s": timeout_s}, blob, timeout_s=timeout_s)
            try:
                if on_progress is not None:
                    on_progress(0, all_bytes)
                return self._await_receipt(deadline, timeout_s, all_bytes, on_progress)
            except WriterError:
                raise
            except BaseException:
                # Nobody waits for this write any more, and the arena's owner believes it free.
                self._kill()
                raise

    def close(self, timeout_s: float = 60.0) -> None:
        """End the process and release everything; blocks at most `timeout_s` and the few seconds of a kill.

        A write in hand in another thread is waited for as long; after that it is stopped, and that `write` raises.
        May be called more than once. Raises WriterError only if the process cannot be killed, because the kernel
        holds it in a call that hangs; even if that call returns one day, it leaves no receipt.
        """
        with self._closing:
            if self._closed:
                return
            self._end(timeout_s)
            self._closed = True
            # Another thread may be on its way out of `write`, and uses the descriptors until then. If it hangs in its
            # own on_progress, they are left to the garbage collector.
            if self._conversation.acquire(timeout=self._signal_timeout_s):
                self._finalizer()
                self._conversation.release()

    def _await_receipt(
        self,
        deadline: float,
        timeout_s: float,
        all_bytes: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> Receipt:
        done_bytes, waits_for_slot = 0, False
        while True:
            rest_s = max(0.0, deadline - time.monotonic())
            if rest_s < self._heartbeat_timeout_s:
                what = f"write more than {done_bytes} of {all_bytes} bytes"
                what += " (it waited for its turn: all write slots of this host were taken)" if waits_for_slot else ""
                answer = self._receive(rest_s, what, allowed_s=timeout_s)
            else:
                answer = self._receive(self._heartbeat_timeout_s, "give a sign of life")
            message = answer.message
            if message.get("type") == "failed":
                raise WriterError(
                    "failed", str(message["reason"]), errno=message["errno"], file_name=message["file_name"]
                )
            if message.get("type") == "receipt":
                return receipt_from_object(message.get("receipt"))
            self._expect("progress", answer)
            done_bytes, waits_for_slot = int(message["done_bytes"]), bool(message["waits_for_slot"])
            if on_progress is not None:
                on_progress(done_bytes, all_bytes)

    @contextmanager
    def _one_conversation(self) -> Iterator[None]:
        if not self._conversation.acquire(blocking=False):
            raise RuntimeError("another thread is using this WriterClient, which serves one at a time")
        try:
            if self._closed:
                raise RuntimeError("this WriterClient is closed")
            yield
        finally:
            self._conversation.release()

    def _send(
        self, message: dict[str, Any], blob: bytes = b"", *, descriptors: tuple[int, ...] = (), timeout_s: float
    ) -> None:
        try:
            with self._sending:
                self._connection.send(message, blob, descriptors=descriptors, timeout_s=timeout_s)
        except PeerGone as error:
            raise self._died() from error
        except TimeoutError as error:
            self._kill()
            reason = f"the writer process (pid {self.pid}) took no message for {timeout_s:g} s and was killed"
            raise WriterError("timeout", reason) from error

    def _receive(self, timeout_s: float, what: str, *, allowed_s: float | None = None) -> Frame:
        """The next frame; raises WriterError, with the process gone, if it ends or does not do `what` in time."""
        try:
            frame = self._connection.receive(timeout_s=timeout_s)
        except PeerGone as error:
            raise self._died() from error
        except ProtocolError as error:
            self._kill()
            raise WriterError("died", f"the writer process (pid {self.pid}) was killed: it sent {error}") from error
        if frame is None:
            self._kill()
            waited_s = timeout_s if allowed_s is None else allowed_s
            raise WriterError(
                "timeout",
                f"the writer process (pid {self.pid}) did not {what} within {waited_s:g} s and was killed",
            )
        return frame

    def _expect(self, kind: str, frame: Frame) -> None:
        found = frame.message.get("type")
        if found != kind:
            self._kill()
            raise WriterError(
                "died", f"the writer process (pid {self.pid}) was killed: it sent {found!r}, not {kind!r}"
            )

    def _died(self) -> WriterError:
        """What to raise once the process has hung up: how it ended."""
        if not self._wait_for_end(self._signal_timeout_s):
            self._kill()
        return WriterError("died", f"the writer process (pid {self.pid}) {_ending(self._process.poll())}")

    def _end(self, timeout_s: float) -> None:
        if self._end_by("close", timeout_s) or self._end_by("stop", self._signal_timeout_s):
            return
        if not self._kill():
            raise WriterError(
                "timeout",
                f"the writer process (pid {self.pid}) cannot be killed: the kernel holds it in a call that hangs, "
                f"most likely on the disk; /proc/{self.pid}/stack says which",
            )

    def _end_by(self, message: Literal["close", "stop"], timeout_s: float) -> bool:
        """Whether the process ended in time once it was told so."""
        deadline = time.monotonic() + timeout_s
        if self._sending.acquire(timeout=timeout_s):
            try:
                self._connection.send({"type": message}, timeout_s=max(0.0, deadline - time.monotonic()))
            except (PeerGone, TimeoutError):
                pass  # it has ended, or it hangs: what follows sees to both
            finally:
                self._sending.release()
        return self._wait_for_end(max(0.0, deadline - time.monotonic()))

    def _kill(self) -> bool:
        """SIGKILL; whether it ended in a few seconds. From the signal on it neither writes nor leaves a receipt."""
        self._process.kill()
        return self._wait_for_end(self._signal_timeout_s)

    def _wait_for_end(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def _start(python: str, socket_fd: int, limits: WriterLimits) -> subprocess.Popen[bytes]:
    """Start the process by exec. It gets `socket_fd` and standard error, and no other descriptor of ours."""
    site_dirs = site.getsitepackages() + ([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])
    # A folder of the user's own, in which nobody else can hold the locks.
    slots_directory = str(Path(tempfile.gettempdir()) / f"stillframe-{os.geteuid()}")
    limits_text = json.dumps(asdict(limits) | {"slots_directory": slots_directory})
    # The process inherits what this thread blocks, and keeps it: so none of these ever reaches it, not even while it
    # starts. Whoever wants it to end ends its trainer, or sends SIGKILL.
    blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_THE_TRAINER)
    try:
        return subprocess.Popen(
            [python, "-P", "-m", "stillframe.writer.process", str(socket_fd), str(os.getpid()), limits_text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(socket_fd,),
            # A session of its own, out of reach of what is sent to the trainer's process group or terminal.
            start_new_session=True,
            env=_environment(Path(stillframe.__file__).parent.parent, site_dirs),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)


def _environment(package_root: Path, site_dirs: list[str]) -> dict[str, str]:
    """This process's environment, in which Python finds the same stillframe as we do, however we found it."""
    environment = dict(os.environ)
    # A directory of installed packages is left where Python puts it: on PYTHONPATH it would come before the standard
    # library, and an old backport in it (of pathlib, say) would take the place of the real module.
    if package_root not in (Path(directory) for directory in site_dirs):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package_root), environment.get("PYTHONPATH")]))
    return environment


def _hang_up(connection: Connection, owner_pid: int) -> None:
    # A process that was forked from the trainer inherits the client; when it ends, the connection is not its to close.
    if os.getpid() == owner_pid:
        connection.close()


def _ending(returncode: int | None) -> str:
    """How a process ended, in words that say what to do."""
    if returncode is None:
        return "has hung up, and cannot be killed: the kernel holds it in a call that hangs"
    if returncode >= 0:
        return f"ended with status {returncode}; what it had to say is on standard error"
    name = signal.Signals(-returncode).name
    hint = "; if nobody sent that, the kernel did because memory ran out: see its log" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
