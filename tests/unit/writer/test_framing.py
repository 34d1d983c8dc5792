from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.writer.framing import MAX_JSON_BYTES, Connection, PeerGone, ProtocolError


def connect() -> tuple[Connection, Connection]:
    """Both ends, in this process, which then is its own peer."""
    left, right = socket.socketpair()
    return Connection(left, os.pidfd_open(os.getpid())), Connection(right, os.pidfd_open(os.getpid()))


@pytest.fixture
def ends() -> Iterator[tuple[Connection, Connection]]:
    left, right = connect()
    yield left, right
    left.close()
    right.close()


json_objects = st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers(0, 2**63)), max_size=4)


@given(st.lists(st.tuples(json_objects, st.binary(max_size=200_000)), min_size=1, max_size=4))
@settings(deadline=None, max_examples=30)
def test_frames_arrive_whole_and_in_order(messages: list[tuple[dict[str, object], bytes]]) -> None:
    left, right = connect()

    def send_all() -> None:
        for message, blob in messages:
            left.send(message, blob, timeout_s=30)

    sender = threading.Thread(target=send_all)
    sender.start()
    for message, blob in messages:
        frame = right.receive(timeout_s=30)
        assert frame is not None
        assert (frame.message, frame.blob, frame.descriptors) == (message, blob, ())
    sender.join(30)
    left.close()
    right.close()


def test_descriptors_come_with_their_frame(ends: tuple[Connection, Connection]) -> None:
    left, right = ends
    memory_fd = os.memfd_create("one")
    os.write(memory_fd, b"shared")
    left.send({"n": 1}, timeout_s=5)
    left.send({"n": 2}, b"blob", descriptors=(memory_fd,), timeout_s=5)
    left.send({"n": 3}, timeout_s=5)
    os.close(memory_fd)
    frames = [right.receive(timeout_s=5) for _ in range(3)]
    assert [(frame.message["n"], len(frame.descriptors)) for frame in frames if frame] == [(1, 0), (2, 1), (3, 0)]
    assert frames[1] is not None
    (received_fd,) = frames[1].descriptors
    assert os.pread(received_fd, 10, 0) == b"shared"
    assert not os.get_inheritable(received_fd)
    os.close(received_fd)


def test_waiting_is_bounded_and_can_be_cut_short(ends: tuple[Connection, Connection]) -> None:
    left, right = ends
    assert right.receive(timeout_s=0.01) is None
    wake_fd = os.eventfd(1)
    assert right.receive(timeout_s=3600, wake_fd=wake_fd) is None
    os.close(wake_fd)
    assert left.can_send()
    with pytest.raises(TimeoutError, match="took no more bytes"):
        left.send({}, bytes(8 << 20), timeout_s=0.01)
    assert not left.can_send()


def test_what_was_sent_before_the_end_is_received() -> None:
    left, right = connect()
    left.send({"last": "words"}, timeout_s=5)
    left.close()
    frame = right.receive(timeout_s=5)
    assert frame is not None
    assert frame.message == {"last": "words"}
    with pytest.raises(PeerGone):
        right.receive(timeout_s=5)
    with pytest.raises(PeerGone):
        right.send({}, timeout_s=5)
    right.close()


def test_the_death_of_the_peer_is_seen_though_someone_holds_its_end_open() -> None:
    left, right = socket.socketpair()
    peer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    connection = Connection(left, os.pidfd_open(peer.pid))
    assert connection.receive(timeout_s=0) is None
    peer.communicate()
    with pytest.raises(PeerGone):
        connection.receive(timeout_s=30)
    with pytest.raises(PeerGone):
        connection.send({}, bytes(8 << 20), timeout_s=30)
    connection.close()
    right.close()


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        (struct.pack("<IQ", MAX_JSON_BYTES + 1, 0), "a frame of"),
        (struct.pack("<IQ", 2, 2**40), "a frame of"),
        (struct.pack("<IQ", 0, 0), "a frame of"),
        (struct.pack("<IQ", 2, 0) + b"{]", "without JSON"),
        (struct.pack("<IQ", 2, 0) + b"\xff\xff", "without JSON"),
        (struct.pack("<IQ", 2, 0) + b"[]", "no object"),
    ],
)
def test_what_is_no_frame_is_refused(raw: bytes, complaint: str) -> None:
    left, right = socket.socketpair()
    connection = Connection(right, os.pidfd_open(os.getpid()))
    left.sendall(raw)
    with pytest.raises(ProtocolError, match=complaint):
        connection.receive(timeout_s=5)
    connection.close()
    left.close()
