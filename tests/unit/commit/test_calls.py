"""A process that ends while a thread of it waits for the store ends with its own status, whatever comes meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from stillframe.commit.calls import Calls

REPOSITORY_DIR = Path(__file__).parents[3]

# `sys.late` goes while the interpreter finalizes. It says so, and is then told that what the threads wait for is there.
CODE = """
import socket, sys, threading, time
from datetime import timedelta
from torch.distributed import TCPStore
from stillframe.commit.store import BoundedStore

class Late:
    def __del__(self, stdout=sys.stdout, stdin=sys.stdin, sleep=time.sleep):
        stdout.write("finalizing\\n")
        stdout.flush()
        stdin.readline()
        sleep(0.5)  # in which threads that come back from their calls want to go on

sys.late = Late()

def connect():
    return TCPStore("127.0.0.1", int(sys.argv[1]), None, False, timeout=timedelta(seconds=60), wait_for_workers=False)

def wait(store):
    store.set(threading.current_thread().name, "waits now")
    store.get("key", 60)

for remote in (False, True):
    store = BoundedStore(connect(), remote=remote, answer_timeout_s=60)
    threading.Thread(target=wait, args=[store], name=f"{remote}", daemon=True).start()
unnamed = socket.socketpair()  # connected, to no address
connect().wait(["False", "True"], timedelta(seconds=60))
raise ValueError("loss is nan")
"""


def test_the_status_is_that_of_the_exception(tmp_path: Path) -> None:
    timeout = timedelta(seconds=60)
    server = TCPStore("127.0.0.1", 0, None, True, timeout=timeout, wait_for_workers=False)
    with (tmp_path / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", CODE, str(server.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_DIR), *filter(None, sys.path)])},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "finalizing\n", (tmp_path / "stderr").read_text()
            server.set("key", "text")
            process.stdin.write("go on\n")
            process.stdin.flush()
            assert process.wait(60) == 1
        finally:
            process.kill()
    said = (tmp_path / "stderr").read_text()
    assert said.splitlines()[-1] == "ValueError: loss is nan", said
    assert "Exception ignored" not in said


def test_once_the_interpreter_ends_only_the_main_thread_begins_a_call() -> None:
    calls, began = Calls(), threading.Event()
    calls.end()

    def call() -> None:
        with calls.calling(HashStore()):
            began.set()

    other = threading.Thread(target=call, daemon=True)  # stands still from now on
    other.start()
    assert not began.wait(0.3)
    assert other.is_alive()
    with calls.calling(HashStore()):
        pass
