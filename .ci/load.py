"""Generates SMTP load on loopback; has the sinks where mail ends.

One process, one epoll, canned bytes: as many clients as asked for, each in lock-step
(nothing is sent before the reply to what went before). A wrong reply is a failure.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

PATIENCE = 120.0  # seconds: what takes longer has failed


class Failed(Exception):
    """A measurement that could not be taken."""


def content(size: int) -> bytes:
    """Return a message of `size` octets with the dot that ends it."""
    head = b"From: <a@bench.test>\r\nTo: <b@bench.test>\r\nSubject: load\r\n\r\n"
    line = b"The quick brown fox jumps over the lazy dog, and nobody minds at all.\r\n"
    return (head + line * (size // len(line)))[: size - 2] + b"\r\n.\r\n"


def script(messages: int, size: int) -> list[tuple[bytes, bytes]]:
    """Return one session: each reply code to wait for, with what to send then."""
    first = [
        (b"220", b"EHLO bench.test\r\n"),
        (b"250", b"MAIL FROM:<a@bench.test>\r\n"),
        (b"250", b"RCPT TO:<b@bench.test>\r\n"),
        (b"250", b"DATA\r\n"),
        (b"354", content(size)),
    ]
    return [*first, *first[1:] * (messages - 1), (b"250", b"QUIT\r\n"), (b"221", b"")]


def connect(port: int) -> socket.socket:
    """Start to connect to a server on loopback."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect_ex(("127.0.0.1", port))
    return sock


def complete(reply: bytes) -> bool:
    """Tell whether the last line of a reply is there: a code, then no hyphen."""
    last = reply.rfind(b"\n", 0, -1) + 1
    return reply.endswith(b"\n") and reply[last + 3 : last + 4] != b"-"


class Client:
    """One session of the load."""

    __slots__ = ("at", "begun", "reply", "sock", "unsent")

    def __init__(self, port: int) -> None:
        self.begun = time.monotonic()
        self.sock = connect(port)
        self.at = 0  # where it is in the script
        self.reply = b""
        self.unsent = memoryview(b"")


class Load:
    """Sessions at a port: `clients` at once, `messages` in each, `sessions` in all."""

    def __init__(
        self, port: int, clients: int, messages: int, size: int = 4096, sessions: float = math.inf
    ) -> None:
        self.port = port
        self.script = script(messages, size)
        self.left = sessions
        self.epoll = select.epoll()
        self.live: dict[int, Client] = {}
        self.reset()
        for _ in range(clients):
            self.open()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.live.values():
            client.sock.close()
        self.epoll.close()

    def reset(self) -> None:
        """Begin to count."""
        self.accepted = 0
        self.durations: list[float] = []
        self.begun, self.worked = time.monotonic(), time.process_time()

    def run(self, seconds: float = PATIENCE, tick: Callable[[], None] = lambda: None) -> None:
        """Work for some seconds, or to the last session, with a tick each half second."""
        now = time.monotonic()
        end, next_tick = now + seconds, now + 0.5
        while self.live and now < end:
            for fd, event in self.epoll.poll(0.1):
                if event & select.EPOLLOUT:
                    self.send(self.live[fd])
                if event & ~select.EPOLLOUT:
                    self.receive(self.live[fd])
            now = time.monotonic()
            if now >= next_tick:
                tick()
                next_tick = now + 0.5
        if self.live and self.left < math.inf:
            raise Failed(f"{len(self.live)} sessions are not through after {seconds:.0f} s")
        self.elapsed = now - self.begun
        self.busy = (time.process_time() - self.worked) / self.elapsed

    def open(self) -> None:
        """Open the next session, if one is left."""
        if self.left > 0:
            self.left -= 1
            client = Client(self.port)
            self.live[client.sock.fileno()] = client
            self.epoll.register(client.sock, select.EPOLLIN)

    def receive(self, client: Client) -> None:
        """Take what came; when it is the whole of the right reply, go on in the script."""
        data = client.sock.recv(65536)
        client.reply += data
        if data and not complete(client.reply):
            return
        expected, following = self.script[client.at]
        if not client.reply.startswith(expected):
            raise Failed(f"expected {expected!r}, got {client.reply!r}")
        if expected == b"250" and self.script[client.at - 1][0] == b"354":
            self.accepted += 1
        if not following:
            self.close(client)
            return
        client.at += 1
        client.reply = b""
        client.unsent = memoryview(following)
        self.send(client)

    def send(self, client: Client) -> None:
        """Send as much as goes; wait to be writable only while some is left."""
        size = len(client.unsent)
        with contextlib.suppress(BlockingIOError):
            client.unsent = client.unsent[client.sock.send(client.unsent) :]
        if client.unsent:
            self.epoll.modify(client.sock, select.EPOLLIN | select.EPOLLOUT)
        elif size > 65536:
            self.epoll.modify(client.sock, select.EPOLLIN)

    def close(self, client: Client) -> None:
        """Close a session that is through; open the next."""
        self.durations.append(time.monotonic() - client.begun)
        del self.live[client.sock.fileno()]
        client.sock.close()
        self.open()


def hold(port: int, count: int, patience: float = 2.0) -> tuple[list[socket.socket], int]:
    """Open sessions; return them with how many were greeted before none was for `patience`."""
    opened = {sock.fileno(): sock for sock in (connect(port) for _ in range(count))}
    epoll, served = select.epoll(), 0
    for fd in opened:
        epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
    while served < count and (ready := epoll.poll(patience)):
        served += sum(opened[fd].recv(512).startswith(b"220") for fd, _ in ready)
    epoll.close()
    return list(opened.values()), served


def wait_for_220(port: int, patience: float = 10.0) -> None:
    """Wait until a server greets."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
            if sock.recv(512).startswith(b"220"):
                return
        time.sleep(0.001)
    raise Failed(f"no 220 in {patience:.0f} s")


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# Two sinks: Debian's smtp-sink for all that is compared; our own, which does next to
# nothing, to show beside it how much load there can be.


class Sink:
    """Debian's smtp-sink, which ends after `count` messages (0: never)."""

    def __init__(self, count: int = 0, port: int = 0) -> None:
        self.port = port or free_port()
        limit = ["-M", str(count)] if count else []
        self.process = subprocess.Popen(
            ["smtp-sink", "-u", "nobody", *limit, f"127.0.0.1:{self.port}", "1024"]
        )

    def __enter__(self) -> Sink:
        wait_for_220(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        """Wait for the last message; without polling, which would round the time up."""
        pidfd = os.pidfd_open(self.process.pid)
        done, _, _ = select.select([pidfd], [], [], PATIENCE)
        os.close(pidfd)
        if not done:
            raise Failed(f"not every message reached the sink in {PATIENCE:.0f} s")


class TrivialSink:
    """Our own sink in a process of its own: a canned reply to each read."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.listener.getsockname()[1]
        self.epoll = select.epoll()
        self.peers: dict[int, socket.socket] = {}
        self.tails: dict[int, bytes] = {}  # of content that has not ended

    def __enter__(self) -> TrivialSink:
        self.pid = os.fork()
        if not self.pid:
            try:
                self.serve()
            finally:
                os._exit(1)  # never back into the parent's code
        self.listener.close()
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def serve(self) -> None:
        """Serve for ever."""
        self.epoll.register(self.listener, select.EPOLLIN)
        while True:
            for fd, _ in self.epoll.poll():
                if fd in self.peers:
                    with contextlib.suppress(ConnectionError):
                        self.answer(fd, self.peers[fd].recv(65536))
                else:
                    peer, _ = self.listener.accept()
                    self.peers[peer.fileno()] = peer
                    self.epoll.register(peer, select.EPOLLIN)
                    peer.send(b"220 sink\r\n")

    def answer(self, fd: int, data: bytes) -> None:
        """Answer what one read brought."""
        if not data:
            self.peers.pop(fd).close()
            self.tails.pop(fd, None)
        elif fd in self.tails:
            self.tails[fd] = (self.tails[fd] + data)[-5:]
            if self.tails[fd] == b"\r\n.\r\n":
                del self.tails[fd]
                self.peers[fd].send(b"250 ok\r\n")
        elif data == b"DATA\r\n":
            self.tails[fd] = b""
            self.peers[fd].send(b"354 go on\r\n")
        else:
            self.peers[fd].send(b"221 bye\r\n" if data == b"QUIT\r\n" else b"250 ok\r\n")


def generator_itself(seconds: float) -> Iterator[tuple[str, list[float], str]]:
    """Yield what the load generator does against our sink and smtp-sink, with the unit."""
    large = 9 * 1024 * 1024
    cases = [(clients, messages, 4096) for messages in (1, 100) for clients in (1, 10, 50, 200)]
    for clients, messages, size in [*cases, (1, 5, large), (10, 5, large)]:
        rates = []
        with TrivialSink() as own, Sink() as debian:
            for port in (own.port, debian.port):
                with Load(port, clients, messages, size) as load:
                    load.run(seconds / 4)
                    load.reset()
                    load.run(seconds)
                    unit = size / 1e6 if size == large else 1
                    rates.append(load.accepted / load.elapsed * unit)
        label = f"{size // 1024:,} KiB, messages a connection: {messages}, clients: {clients}"
        yield label, rates, "MB/s" if size == large else "msg/s"
