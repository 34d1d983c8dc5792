"""Frames over a Unix stream socket between the trainer and its writer: a JSON object, a blob, maybe descriptors.

    offset  size  field
    0       4     length of the JSON object, u32 little-endian
    4       8     length of the blob, u64 little-endian
    12      ...   the JSON object (UTF-8), then the blob

Both ends hold a pidfd of the other process, because end-of-file is not enough to see it die: a process that was forked
from the trainer (a data loader's worker) holds a copy of the trainer's end and keeps it open.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

_HEADER = struct.Struct("<IQ")
# No honest message comes near: a plan of a million extents has 40 MB of JSON. Beyond, the stream is out of step.
MAX_JSON_BYTES = 1 << 30
MAX_BLOB_BYTES = 1 << 32
_MAX_DESCRIPTORS = 4
_DESCRIPTOR_BYTES = array.array("i").itemsize


class PeerGone(Exception):
    """The other process has ended or closed its socket."""


class ProtocolError(Exception):
    """What came is no frame; the two ends are out of step, and nothing that follows can be understood."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message. Its receiver owns the descriptors and closes them."""

    message: dict[str, Any]
    blob: bytes
    descriptors: tuple[int, ...]


class Connection:
    """One end of the socketpair. Sending and receiving may happen in two threads, but each in one at a time."""

    def __init__(self, sock: socket.socket, peer_pidfd: int) -> None:
        """Take over `sock` and `peer_pidfd`; `close` closes both."""
        sock.setblocking(False)
        self._sock = sock
        self._peer_pidfd = peer_pidfd
        self._incoming = bytearray(_HEADER.size)
        self._received_bytes = 0
        self._lengths: tuple[int, int] | None = None
        self._descriptors: list[int] = []

    def close(self) -> None:
        """Hang up: the peer sees the end even if a forked process holds a copy of this end."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        os.close(self._peer_pidfd)

    def send(
        self, message: dict[str, Any], blob: bytes = b"", *, descriptors: tuple[int, ...] = (), timeout_s: float
    ) -> None:
        """Send one frame, whole; the other process gets duplicates of `descriptors`.

        Raises PeerGone, TimeoutError if the peer did not take it all within `timeout_s`, ValueError if it is too large.
        """
        text = json.dumps(message, separators=(",", ":")).encode("ascii")
        if len(text) > MAX_JSON_BYTES or len(blob) > MAX_BLOB_BYTES:
            raise ValueError(f"a message of {len(text)} + {len(blob)} bytes is larger than what a frame may hold")
        rest = memoryview(b"".join((_HEADER.pack(len(text), len(blob)), text, blob)))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        deadline = time.monotonic() + timeout_s
        while rest:
            try:
                sent_bytes = self._sock.sendmsg([rest], rights)
            except BlockingIOError:
                if not self._wait(select.POLLOUT, deadline, wake_fd=None):
                    raise TimeoutError(f"the peer took no more bytes within {timeout_s} s") from None
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise PeerGone from error
            rest = rest[sent_bytes:]
            rights = []

    def can_send(self) -> bool:
        """Whether a small frame would be taken at once: a socket is writable while its buffer is mostly free."""
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        return bool(poller.poll(0))

    def receive(self, *, timeout_s: float, wake_fd: int | None = None) -> Frame | None:
        """The next frame; None if there is no whole one within `timeout_s`, or once `wake_fd` is readable.

        What the peer sent before it went is still received. Raises PeerGone after that, and ProtocolError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                frame = self._receive_some()
            except BlockingIOError:
                if not self._wait(select.POLLIN, deadline, wake_fd):
                    return None
                continue
            if frame is not None:
                return frame

    def _wait(self, event: int, deadline: float, wake_fd: int | None) -> bool:
        """Wait until the socket is ready for `event`: False at the deadline or if woken, PeerGone if the peer ended."""
        poller = select.poll()
        poller.register(self._sock, event)
        poller.register(self._peer_pidfd, select.POLLIN)
        if wake_fd is not None:
            poller.register(wake_fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        if self._peer_pidfd in ready:
            # poll looks at one descriptor after the other: the last words may have come since it looked at the socket.
            ready |= {fd for fd, _ in poller.poll(0)}
        if self._sock.fileno() in ready:
            return True
        if self._peer_pidfd in ready:
            raise PeerGone
        return False

    def _receive_some(self) -> Frame | None:
        """Read what is there, never past the current frame, so that descriptors are known to belong to it."""
        ancillary_bytes = socket.CMSG_SPACE(_MAX_DESCRIPTORS * _DESCRIPTOR_BYTES)
        with memoryview(self._incoming)[self._received_bytes :] as free:
            try:
                count, ancillary, flags, _ = self._sock.recvmsg_into([free], ancillary_bytes, socket.MSG_CMSG_CLOEXEC)
            except ConnectionResetError as error:
                raise PeerGone from error
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole_bytes = len(data) // _DESCRIPTOR_BYTES * _DESCRIPTOR_BYTES
                self._descriptors.extend(array.array("i", data[:whole_bytes]))
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("descriptors were lost on the way; this process may have too many files open")
        if count == 0:
            raise PeerGone
        self._received_bytes += count
        if self._received_bytes < len(self._incoming):
            return None
        if self._lengths is None:
            self._begin_body()
            return None
        return self._end_frame(*self._lengths)

    def _begin_body(self) -> None:
        json_bytes, blob_bytes = _HEADER.unpack(self._incoming)
        if not 2 <= json_bytes <= MAX_JSON_BYTES or blob_bytes > MAX_BLOB_BYTES:
            raise ProtocolError(f"a frame of {json_bytes} + {blob_bytes} bytes")
        self._lengths = (json_bytes, blob_bytes)
        self._incoming = bytearray(json_bytes + blob_bytes)
        self._received_bytes = 0

    def _end_frame(self, json_bytes: int, blob_bytes: int) -> Frame:
        text, blob = self._incoming[:json_bytes], bytes(memoryview(self._incoming)[json_bytes:])
        descriptors = tuple(self._descriptors)
        self._descriptors = []
        self._lengths = None
        self._incoming = bytearray(_HEADER.size)
        self._received_bytes = 0
        try:
            message = json.loads(text)
        except ValueError as error:
            raise ProtocolError("a frame without JSON") from error
        if not isinstance(message, dict):
            raise ProtocolError("a frame whose JSON is no object")
        return Frame(message=message, blob=blob, descriptors=descriptors)
