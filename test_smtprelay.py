"""The tests of smtprelay.py, chapter by chapter, from the outside where that can be.

Two ways to run the relay: `start(...)` inside this process, and `Program`, the real
program as a process of its own. Against it stand `Dialogue`, a client on a raw socket,
and `FakeHop`, a next hop that can do anything wrong at any stage. No port is fixed, no
sleep is longer than 50 ms, nothing inside the standard library is replaced.
"""

from __future__ import annotations

import ast
import base64
import codecs
import collections
import contextlib
import email
import email.message
import email.policy
import errno
import fcntl
import functools
import gc
import getpass
import grp
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pty
import pwd
import random
import re
import resource
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from email.message import EmailMessage, Message
from ipaddress import IPv6Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple
from unittest import mock

import pytest

import smtprelay

PROGRAM = Path(smtprelay.__file__).resolve()
ROOT = PROGRAM.parent
ONE_LINER = f"import sys; sys.path.insert(0, '{ROOT}'); import smtprelay; sys.exit(smtprelay.main())"  # compiled once
SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
MAIL = b"From: ann@client.test\r\nSubject: hello\r\n\r\nOne line.\r\n"
NOON = 1_795_262_400.0  # 2026-11-21 12:00:00 UTC


# === STAGE ===================================================================
# What the tests play on. Everything waits with wait_until(), in steps of 10 ms.

QUICK = {
    "SMTP_PORT": "127.0.0.1:0",
    "SMTP_HEALTH_ADDR": "127.0.0.1:0",
    "SMTP_HOSTNAME": "relay.test",
    "SMTP_STORAGE": "file",
    "SMTP_FSYNC": "0",
    "SMTP_SPOOL_MIN_FREE": "0",
    "SMTP_RETRY_INITIAL_DELAY": "0.01s",
    "SMTP_RETRY_MAX_DELAY": "0.05s",
    "SMTP_RELAY_TIMEOUT": "5s",
    "SMTP_RELAY_REPLY_TIMEOUT": "5s",
    "SMTP_BOUNCE": "0",
}


def wait_until(predicate: Callable[[], Any], timeout: float = 10.0, shown: Callable[[], Any] = str) -> Any:
    """Return the first true value of predicate; fail the test, saying what is shown, when none comes in time."""
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(ConnectionError):  # of HTTP, when it has no thread to spare
            if value := predicate():
                return value
        assert time.monotonic() < end, f"waited in vain: {shown()}"
        time.sleep(0.003)


def assert_linear(work: Callable[[int], object], size: int) -> None:
    """Fail where the work of a size takes this thread far more than eight times that of an eighth of it."""
    spent = []
    for n in (size // 8, size):
        begun = time.thread_time()
        work(n)
        spent.append(time.thread_time() - begun)
    assert spent[1] < 16 * spent[0] + 0.2, spent


class Ticker:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Dialogue:
    """A client on a raw socket; as a context manager it has read the greeting."""

    def __init__(self, address: Any, timeout: float = 8.0) -> None:
        if isinstance(address, str):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(timeout)
            self.sock.connect(address)
        else:
            self.sock = socket.create_connection(address, timeout)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Dialogue:
        self.greeting = self.reply()
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
        self.sock.close()

    def send(self, data: bytes, rng: random.Random | None = None) -> None:
        """Send data, in random segments when there is a rng."""
        while rng and len(data) > 1:
            cut = rng.randint(1, min(len(data), 40))
            self.sock.sendall(data[:cut])
            data = data[cut:]
        self.sock.sendall(data)

    def reply(self) -> str:
        """Read one reply, of all its lines; "" once the other side has closed."""
        lines = []
        with contextlib.suppress(ConnectionError):
            while line := self.file.readline():
                assert line.endswith(b"\r\n"), line
                lines.append(line[:-2].decode("utf-8"))
                if line[3:4] != b"-":
                    break
        return "\n".join(lines)

    def ask(self, line: str, want: str = "") -> str:
        """Send one command and return the reply, which begins with `want` (a|b)."""
        self.send(line.encode() + b"\r\n")
        answer = self.reply()
        assert answer.startswith(tuple(want.split("|"))), (line, want, answer)
        return answer

    def closed(self) -> bool:
        return self.reply() == ""

    def envelope(self, sender: str = "ann@client.test", *recipients: str) -> None:
        self.ask(f"MAIL FROM:<{sender}>", "250 2.1.0")
        for recipient in recipients or ("bob@hop.test",):
            self.ask(f"RCPT TO:<{recipient}>", "250 2.1.5")

    def content(self, wire: bytes, rng: random.Random | None = None) -> str:
        """Send DATA and content as it goes over the wire, its end included."""
        self.ask("DATA", "354")
        self.send(wire, rng)
        return self.reply()

    def mail(self, content: bytes = MAIL, sender: str = "ann@client.test", *to: str) -> str:
        """Send one whole message; return the final reply."""
        self.envelope(sender, *to)
        return self.content(stuffed(content))

    def play(self, script: str, rng: random.Random) -> None:
        """Say the C: lines in random segments, hear the S: lines, or what stands after ->; a|b is either."""
        waiting = b""
        for side, _, text in (line.strip().partition(": ") for line in script.replace(" -> ", "\nS: ").strip().split("\n")):
            if side == "C":
                waiting += unescaped(text) + b"\r\n"
                continue
            self.send(waiting, rng)
            waiting, answer = b"", self.reply()
            wanted = answer == "" if text == "closed" else answer.startswith(tuple(text.split("|")))
            assert wanted, (text, answer, script)


def unescaped(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode("latin-1")


def stuffed(content: bytes) -> bytes:
    """Return content as it goes over the wire after DATA (RFC 5321, 4.5.2)."""
    return re.sub(rb"(?m)^\.", b"..", content) + b".\r\n"


@pytest.fixture(scope="session", autouse=True)
def sweeping_often() -> Iterator[None]:
    """What a relay does each second, it does each 50 ms, here and in `Program`."""
    with mock.patch.object(smtprelay, "SWEEP_EVERY", 0.05):
        yield


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start relays in this process, by default holding mail in memory."""
    with contextlib.ExitStack() as stack:

        def make(**settings: str) -> Any:
            given = {**QUICK, "SMTP_SPOOL": str(tmp_path / "spool"), **settings}
            return stack.enter_context(smtprelay.start(**given))

        yield make


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Spool:
    """The spool of `holding`."""
    return Spool(tmp_path_factory.mktemp("holding") / "spool")


@pytest.fixture(scope="module")
def holding(held: Spool) -> Iterator[Any]:
    """One relay that holds, shared by all tests that only talk to it."""
    settings = {**QUICK, "SMTP_SPOOL": str(held.root), "SMTP_MAX_SIZE": "20000"}
    with smtprelay.start(**settings, SMTP_MAX_ERRORS="1000", SMTP_MAX_RECIPIENTS="3") as relay:
        yield relay


def dial(relay: Any) -> Dialogue:
    return Dialogue((relay.host, relay.port))


def hello(relay: Any) -> contextlib.AbstractContextManager[Dialogue]:
    """Return a dialogue that is past EHLO."""

    @contextlib.contextmanager
    def opened() -> Iterator[Dialogue]:
        with dial(relay) as client:
            client.ask("EHLO client.test", "250")
            yield client

    return opened()


def said(relay: Any, *messages: bytes, to: tuple[str, ...] = ()) -> list[str]:
    """Send messages over one connection; return their queue ids."""
    with hello(relay) as client:
        replies = [client.mail(message, "ann@client.test", *to) for message in messages or (MAIL,)]
    assert all(reply.startswith("250 2.0.0") for reply in replies), replies
    return [reply.split()[-1] for reply in replies]


class Spool(NamedTuple):
    """A spool directory, read from outside."""

    root: Path

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(f"[0-9]*/{pattern}"))

    def records(self) -> list[dict[str, Any]]:
        """Return all records, oldest first; one that is just being renamed is left out."""
        found = []
        for path in self.files("*.json"):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_bytes()))
        return found

    def record(self, queue_id: str = "") -> dict[str, Any]:
        return next((r for r in self.records() if queue_id in ("", r.get("id"))), {})

    def known(self, queue_id: str = "") -> dict[str, Any]:
        """Wait for a record (a sidecar may be written after the 250) and return it."""
        return dict(wait_until(lambda: self.record(queue_id)))

    def await_status(self, status: str, queue_id: str = "", timeout: float = 8.0) -> Any:
        """Wait until a record has the status; return it."""
        fits = lambda: self.record(queue_id).get("status") == status  # noqa: E731
        try:
            wait_until(fits, timeout)
        except AssertionError:
            pytest.fail(f"not {status} but {self.records()}")
        return self.record(queue_id)

    def content(self, queue_id: str = "") -> bytes:
        """Return the stored content, our own headers at its head taken off."""
        path = next(p for p in self.files("*.eml") if p.name.startswith(queue_id))
        size = self.known(queue_id)["size"]
        stored = path.read_bytes()
        head, content = stored[: len(stored) - size], stored[len(stored) - size :]
        assert re.fullmatch(rb"(?:X-Envelope-[^\n]*\r?\n)+Received:[^\n]*\n(?:[ \t][^\n]*\n)*", head), head
        return content


class Program:
    """smtprelay.py as a process; everything it prints is in its log."""

    def __init__(self, home: Path, **settings: str) -> None:
        self.home = home
        self.env = {**QUICK, "SMTP_SPOOL": str(home / "spool"), **settings}
        self.spool = Spool(Path(self.env["SMTP_SPOOL"]))
        self.output, self.code = home / "program.log", ONE_LINER.replace("; sys.exit", "; smtprelay.SWEEP_EVERY = 0.05; sys.exit")
        self.start()

    def spawn(self, *arguments: str, command: list[str] | None = None) -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"], **self.env}
        command = command or [sys.executable, "-c", self.code]
        with self.output.open("wb") as output:
            return subprocess.Popen([*command, *arguments], env=env, cwd=self.home, stdout=output, stderr=output)

    def start(self, **settings: str) -> Program:
        self.env.update(settings)
        self.process = self.spawn()
        found = wait_until(lambda: self.ready() or self.process.poll() is not None)
        assert found is not True, self.log()
        self.host, self.port, web = "127.0.0.1", int(found[1]), int(found[2])
        self.http_url = f"http://127.0.0.1:{web}"
        return self

    def ready(self) -> re.Match[str] | None:
        return re.search(r"(?s)smtp://127\.0\.0\.1:(\d+).*http://127\.0\.0\.1:(\d+)", self.log())

    def log(self) -> str:
        return self.output.read_text("utf-8", "surrogateescape")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(12)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Run programs that are killed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(**settings: str) -> Program:
            home = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
            home.mkdir()
            made = Program(home, **settings)
            stack.callback(made.end)
            return made

        yield make


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    env = {"PATH": os.environ["PATH"], **settings}
    command = [sys.executable, "-c", ONE_LINER, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=20)


class Got(NamedTuple):
    """One message as a FakeHop had it."""

    connection: int
    mail: str
    rcpts: tuple[str, ...]
    content: bytes
    secure: bool


Script = dict[str, Any]  # pytest is run on 3.9 or newer


class FakeHop(socketserver.ThreadingTCPServer):
    """A scripted next hop on a free port.

    `script` maps a stage (connect, greeting, ehlo, helo, starttls, auth, mail, rcpt,
    "rcpt <address>", data, end, rset, quit) to what happens there: a string, always; a
    list, one for each time and then as usual. The string is the reply's text ("450
    4.2.1 later", lines parted by newlines) or, with one of TROUBLES before it, trouble.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Script | None = None, offers: str = "PIPELINING 8BITMIME SMTPUTF8 SIZE",
                 listen: bool = True, tls: ssl.SSLContext | None = None, implicit: bool = False,
                 users: dict[str, str] | None = None, methods: str = "PLAIN LOGIN CRAM-MD5",
                 host: str = "127.0.0.1", port: int = 0) -> None:  # fmt: skip
        super().__init__((host, port), HopSession, bind_and_activate=False)
        self.script, self.offers, self.tls, self.implicit = dict(script or {}), offers.split(), tls, implicit
        self.users, self.methods = users, methods
        self.messages: list[Got] = []  # those it said 250 to
        self.refused: list[Got] = []  # whole, but not accepted
        self.commands: list[str] = []
        self.logins: list[tuple[str, str]] = []
        self.connections = 0
        self.closing, self.listening = threading.Event(), False
        self.server_bind()
        self.host, self.port = host, self.server_address[1]
        self.place = f"{host}:{self.port}"
        if listen:
            self.listen()

    def listen(self) -> None:
        self.server_activate()
        self.listening = True
        threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True).start()

    def stop(self) -> None:
        self.closing.set()
        if self.listening:
            self.listening = False
            self.shutdown()
        self.server_close()

    def __enter__(self) -> FakeHop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a peer that went away."""

    def note(self, got: Got, taken: bool) -> None:
        """Keep a message, before its reply is said: what is cut off then counts as said."""
        (self.messages if taken else self.refused).append(got)

    @property
    def mails(self) -> list[tuple[list[str], bytes]]:
        """The recipients and the content of each message taken."""
        return [([path.split(">")[0].split("<")[-1] for path in got.rcpts], got.content) for got in self.messages]

    def next_act(self, stages: list[str], usual: str) -> str:
        for stage in stages:
            act = self.script.get(stage)
            if isinstance(act, str):
                return act
            if act:
                return str(act.pop(0))
        return usual

    def settings(self, **more: str) -> dict[str, str]:
        """Return what points a relay to this hop."""
        return {"SMTP_RELAY_HOST": self.place, **more}

    def delivered(self) -> collections.Counter[str]:
        """Count accepted messages by recipient."""
        return collections.Counter(address for rcpts, _ in self.mails for address in rcpts)


class HopSession(socketserver.StreamRequestHandler):
    """One connection to a FakeHop; `act` returns the code it gave, 0 when it is over."""

    server: FakeHop
    disable_nagle_algorithm = True  # it answers pipelined commands one by one, and 40 ms each would wait for an ACK

    def handle(self) -> None:
        self.server.connections += 1
        self.number, self.secure, self.mail = self.server.connections, False, ""
        self.rcpts: list[str] = []
        if self.server.implicit:
            self.encrypt()
        if self.server.next_act(["connect"], "") == "drop" or not self.act("greeting", "220 hop.test"):
            return
        while line := self.rfile.readline(5000).decode("utf-8", "replace"):
            self.server.commands.append(line.rstrip("\r\n"))
            verb = line.split(":")[0].split()[0].lower() if line.strip() else "empty"
            step = getattr(self, f"do_{verb}", None)
            if not (step(line.rstrip("\r\n")) if step else self.act(verb, "502 5.5.1 what?")):
                return

    def act(self, stage: str, usual: str, *more: str) -> int:
        return self.play(self.server.next_act([*more, stage], usual))

    def play(self, act: str) -> int:
        name, _, rest = act.partition(" ")
        if name in TROUBLES:
            return TROUBLES[name](self, rest)
        return self.say(act)

    def say(self, text: str) -> int:
        *some, last = text.split("\n")
        lines = [f"{last[:3]}-{line[4:] if line[3:4] in '- ' else line}" for line in some] + [last]
        self.wfile.write("".join(f"{line}\r\n" for line in lines).encode())
        return int(last[:3]) if last[:3] != "221" else 0

    def encrypt(self) -> None:
        assert self.server.tls
        self.request = self.connection = self.server.tls.wrap_socket(self.request, server_side=True)
        self.secure = True
        self.setup()

    def do_ehlo(self, line: str) -> int:
        offers = [f"SIZE {10**8}" if word == "SIZE" else word.replace("=", " ", 1) for word in self.server.offers]
        offers += ["STARTTLS"] if self.server.tls and not self.secure else []
        offers += [f"AUTH {self.server.methods}"] if self.server.users else []
        return self.act("ehlo", "\n".join(["250 hop.test", *(f"250 {offer}" for offer in offers)]))

    def do_helo(self, line: str) -> int:
        return self.act("helo", "250 hop.test")

    def do_starttls(self, line: str) -> int:
        if (code := self.act("starttls", "220 go on")) == 220:
            self.encrypt()
        return code

    def do_auth(self, line: str) -> int:
        method, _, initial = line.partition(" ")[2].partition(" ")
        user = self.login(method.upper(), initial)
        self.server.logins.append((method.upper(), user))
        return self.act("auth", "235 2.7.0 welcome" if user else "535 5.7.8 no")

    def login(self, method: str, initial: str) -> str:
        """Return the user whose password was right, else ""."""
        users = self.server.users or {}
        if method == "XOAUTH2":
            return initial
        if method == "PLAIN":
            _, user, password = base64.b64decode(initial or self.asked("")).decode().split("\0")
            return user if users.get(user) == password else ""
        if method == "LOGIN":
            user = base64.b64decode(initial or self.asked("Username:")).decode()
            return user if users.get(user) == base64.b64decode(self.asked("Password:")).decode() else ""
        user, digest = base64.b64decode(self.asked("<1@hop.test>")).decode().split(" ")
        right = hmac.new(users.get(user, "").encode(), b"<1@hop.test>", "md5").hexdigest()
        return user if user in users and digest == right else ""

    def asked(self, challenge: str) -> str:
        self.say("334 " + base64.b64encode(challenge.encode()).decode())
        answer = self.rfile.readline(5000).decode().strip()
        self.server.commands.append(answer)
        return answer

    def do_mail(self, line: str) -> int:
        code = self.act("mail", "250 2.1.0 ok")
        self.mail, self.rcpts = line if code in (250, 251, 252) else "", []
        return code

    def do_rcpt(self, line: str) -> int:
        address = line.split("<")[-1].split(">")[0]
        usual = "250 2.1.5 ok" if self.mail else "503 5.5.1 MAIL first"
        code = self.act("rcpt", usual, f"rcpt {address}") if self.mail else self.say(usual)
        self.rcpts += [line] if code in (250, 251, 252) else []
        return code

    def do_data(self, line: str) -> int:
        if (code := self.act("data", "354 go on" if self.rcpts else "503 5.5.1 no recipients")) != 354:
            return code
        lines: list[bytes] = []
        if "middle" in self.server.script and self.server.script["middle"]:
            self.play(self.server.next_act(["middle"], ""))
            self.request.shutdown(socket.SHUT_WR)
            return self.hang("")
        while (text := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(text[1:] if text.startswith(b".") else text)
        if text == b"":
            return 0
        got = Got(self.number, self.mail, tuple(self.rcpts), b"".join(lines), self.secure)
        act = self.server.next_act(["end"], "250 2.0.0 taken")
        self.server.note(got, act.startswith(("2", "trickle 2", "take", "slow")))
        return self.play(act)

    def do_rset(self, line: str) -> int:
        return self.act("rset", "250 2.0.0 ok")

    def do_noop(self, line: str) -> int:
        return self.act("noop", "250 2.0.0 ok")

    def do_quit(self, line: str) -> int:
        return self.act("quit", "221 2.0.0 bye")

    def drop(self, rest: str) -> int:
        """Close, after a last reply if there is one."""
        return self.say(rest) * 0 if rest else 0

    def reset(self, rest: str) -> int:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.request.close()
        return 0

    def hang(self, rest: str) -> int:
        self.server.closing.wait(20)
        return 0

    def trickle(self, rest: str) -> int:
        """Send the reply, an octet each 5 ms."""
        for octet in f"{rest}\r\n".encode():
            self.wfile.write(bytes([octet]))
            time.sleep(0.005)
        return int(rest[:3])

    def slow(self, rest: str) -> int:
        """Reply after so many milliseconds."""
        after, _, text = rest.partition(" ")
        self.server.closing.wait(int(after) / 1000)
        return self.say(text)

    def drip(self, rest: str) -> int:
        """Send octets for ever, one each 20 ms."""
        with contextlib.suppress(OSError):
            while not self.server.closing.wait(0.02):
                self.wfile.write(b"2")
        return 0

    def endless(self, rest: str) -> int:
        """Send a reply that never ends, until the other side has had enough."""
        with contextlib.suppress(OSError):
            while not self.server.closing.is_set():
                self.wfile.write(rest.encode().decode("unicode_escape").encode("latin-1") * 500)
        return 0

    def raw(self, rest: str) -> int:
        self.wfile.write(unescaped(rest))
        return 299


TROUBLES: dict[str, Callable[[HopSession, str], int]] = {
    "drop": HopSession.drop,
    "reset": HopSession.reset,
    "hang": HopSession.hang,
    "trickle": HopSession.trickle,
    "take": HopSession.drop,
    "slow": HopSession.slow,
    "drip": HopSession.drip,
    "garbage": lambda session, rest: session.raw(r"\x00\xffnonsense\r\n"),
    "long": lambda session, rest: session.raw("2" * 70_000 + r"\r\n"),
    "endless": HopSession.endless,
    "raw": HopSession.raw,
}


@pytest.fixture
def hop() -> Iterator[Callable[..., FakeHop]]:
    """Make next hops that are gone after the test."""
    made: list[FakeHop] = []

    def make(**arguments: Any) -> FakeHop:
        made.append(FakeHop(**arguments))
        return made[-1]

    yield make
    for one in made:
        one.stop()


class Pair(NamedTuple):
    """A certificate for 127.0.0.1 or, wrong, for another host; both in PEM files."""

    cert: str
    server: ssl.SSLContext


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Make self-signed pairs, the right one and the wrong one."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl")
    return {"right": make_pair(tmp_path_factory.mktemp("right"), "IP:127.0.0.1,DNS:localhost"),
            "wrong": make_pair(tmp_path_factory.mktemp("wrong"), "DNS:other.test")}  # fmt: skip


def make_pair(home: Path, names: str) -> Pair:
    cert, key = str(home / "cert.pem"), str(home / "key.pem")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=hop.test"
    subprocess.run([*command.split(), "-addext", f"subjectAltName={names}", "-keyout", key, "-out", cert],
                   check=True, capture_output=True)  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return Pair(cert, context)


def fetch(relay: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, str, Any]:
    """Ask the relay's HTTP side; return status, content type and body."""
    connection = http.client.HTTPConnection(relay.http_url.split("//")[1], timeout=8)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers.get("Content-Type", ""), answer.read().decode()


def metric(relay: Any, name: str) -> Any:
    return json.loads(fetch(relay, "/metrics")[2]).get(name)


def settings_of(**env: str) -> smtprelay.Settings:
    return smtprelay.Settings.read(env)


MODULES = ROOT / ".ci" / "node_modules"


DAY = 86400.0


STEM = "2026-11-21/" + "0" * 16 + "_" + "0" * 16


def settings(**given: str) -> smtprelay.Settings:
    return smtprelay.Settings.read(given)


def spooled_in_review(spool: Any, *to: str, flags: tuple[str, ...] = (), id: str = "") -> str:
    """Put a message into a spool behind the relay's back; return its stem."""
    envelope = smtprelay.Envelope("ann@x.test", "127.0.0.1", "x", "ESMTP", "", flags, list(to) or ["bob@hop.test"])
    draft = spool.draft(envelope)
    if id:
        draft = type(draft)(spool, envelope, id)
    draft.write(MAIL)
    return str(draft.commit())


def relaying_in_review(start: Any, hop: Any, **more: str) -> Any:
    return start(SMTP_DELIVERY="relay", **hop.settings(**{"SMTP_RELAY_TLS": "none", **more}))


def status(relay: Any, stem: str) -> smtprelay.Status:
    return relay.delivering.spool.load(stem).status


def aged_id(age: float) -> str:
    return f"{int((time.time() - age) * 1e6):013x}abc"


def said_stem(relay: Any) -> str:
    """Send a message; return its stem once it is in the inbox."""
    id = said(relay)[0]
    relay.delivering.catch_up()
    return str(relay.delivering.inbox.entry(id).stem)


def receivers(relay: Program) -> list[int]:
    """Return the receiving processes: children that hold the SMTP socket but not the HTTP one."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(relay.process.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))[1:]


DIES_BEFORE_IT_TELLS = """
import os
def die(self, stem, owed=True):
    try: os.close(os.open("dead", os.O_CREAT | os.O_EXCL))
    except FileExistsError: return announce(self, stem, owed)
    os.kill(os.getpid(), 9)
announce, smtprelay.Link.announce = smtprelay.Link.announce, die
"""


# === REPLIES =================================================================
# Each reply of the contract's table is heard in a dialogue somewhere below; here is
# only what holds for all of them.


def test_every_reply_has_a_code_and_an_enhanced_code_of_its_class(holding: Any) -> None:
    commands = ["NOOP", "RSET", "FOO", "MAIL", "RCPT TO:<a@b>", "VRFY a", "HELP", "EXPN a", "DATA", "BDAT x", "QUIT"]
    with hello(holding) as client:
        for command in commands:
            for line in client.ask(command).split("\n"):
                assert re.match(r"([245])\d\d[ -]\1\.\d{1,3}\.\d{1,3} [\x20-\x7e]+$", line), line
                assert len(line) <= 510


# === SETTINGS ================================================================


WRONG = {
    "SMTP_PORT": "99999", "SMTP_MAX_SIZE": "ten", "SMTP_MAX_RECIPIENTS": "-1", "SMTP_COMMAND_TIMEOUT": "5 parsecs",
    "SMTP_STORAGE": "tape", "SMTP_DELIVERY": "pigeon", "SMTP_RELAY_TLS": "perhaps", "SMTP_RELAY_PORT": "0x19",
    "SMTP_RETRY_MULTIPLIER": "many", "SMTP_RETRY_JITTER": "1.5", "SMTP_FSYNC": "maybe", "SMTP_WORKERS": "0",
    "SMTP_ALLOW_NETWORKS": "10.0.0.0/99", "SMTP_HEALTH_ADDR": "host:port:more", "SMTP_LOG_LEVEL": "loud",
    "SMTP_LOG_FORMAT": "xml", "SMTP_RELAY_CA_FILE": "/nonexistent/ca.pem", "SMTP_KEEP": "-7d",
    "SMTP_HOSTNAME": "two words",
}  # fmt: skip


def test_all_wrong_values_are_reported_at_once() -> None:
    done = run("check", **WRONG)
    assert done.returncode == 78
    text = done.stdout + done.stderr
    assert [name for name, value in WRONG.items() if not re.search(rf"{name}\b.*{re.escape(value)}", text)] == []
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("settings", "status", "words"),
    [
        ({}, 0, ""),
        ({"SMTP_MAX_SIZE": "1GiB", "SMTP_KEEP": "1.5h", "SMTP_FSYNC": "off"}, 0, ""),
        ({"SMTP_RELAY_HOTS": "x"}, 78, "SMTP_RELAY_HOTS.*SMTP_RELAY_HOST"),
        ({"SMTP_DELIVERY": "relay"}, 78, "SMTP_RELAY_HOST"),
        ({"SMTP_PORT": "25,unix:x"}, 78, "SMTP_PORT='25,unix:x': expected .*an absolute path after unix:"),
        ({"SMTP_SPOOL": "/dev/null"}, 78, "SMTP_SPOOL='/dev/null': expected a directory"),
        ({"SMTP_RELAY_PASSWORD": "a", "SMTP_RELAY_PASSWORD_FILE": "/dev/null"}, 78, "SMTP_RELAY_PASSWORD"),
        ({"SMTP_RELAY_PASSWORD_FILE": "/nonexistent"}, 78, "SMTP_RELAY_PASSWORD_FILE"),
    ],
)
def test_check(settings: dict[str, str], status: int, words: str) -> None:
    done = run("check", **settings)
    assert (done.returncode, bool(re.search(words, done.stdout + done.stderr))) == (status, True), done


def test_serve_refuses_a_wrong_value_too() -> None:
    assert run(SMTP_MAX_SIZE="ten").returncode == 78


def test_help_names_every_setting_with_its_default() -> None:
    text = run("--help").stdout
    for line in "SMTP_PORT 2525", "SMTP_MAX_SIZE 10MiB", "SMTP_RETRY_MAX_AGE 5d", "SMTP_KEEP 7d":
        name, default = line.split()
        assert re.search(rf"(?s){name}\b.{{0,400}}?{default}", text), name
    assert all(name in text for name in [*WRONG, "SMTP_RELAY_PASSWORD", "SMTP_DEBUG"])


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, bool(re.search(r"\d+\.\d+", done.stdout))) == (0, True)


def test_unknown_verb_is_a_usage_error() -> None:
    assert run("frobnicate").returncode in (2, 64)
    assert "invalid duration value: 'soon'" in run("wait", "--timeout", "soon").stderr


PRESETS = [  # SMTP_RELAY_HOST and what else is set: host, port, TLS
    ({"SMTP_RELAY_HOST": "gmail"}, [("smtp.gmail.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "ses:eu-west-1"}, [("email-smtp.eu-west-1.amazonaws.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "fastmail"}, [("smtp.fastmail.com", 465)], "tls"),
    ({"SMTP_RELAY_HOST": "M365"}, [("smtp.office365.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_PORT": "465", "SMTP_RELAY_TLS": "tls"}, [("smtp.gmail.com", 465)], "tls"),
    (
        {"SMTP_RELAY_HOST": "sendgrid,mail.example:2525"},
        [("smtp.sendgrid.net", 587), ("mail.example", 2525)],
        "starttls",
    ),
    ({"SMTP_RELAY_HOST": "localhost"}, [("localhost", 587)], "opportunistic"),
]


@pytest.mark.parametrize("env, hosts, tls", PRESETS)
def test_a_preset_fills_host_port_and_tls(env: dict[str, str], hosts: list[tuple[str, int]], tls: str) -> None:
    read = settings_of(**env)
    assert ([place[:2] for place in read.smart_hosts], read.relay_tls) == (hosts, tls)


@pytest.mark.parametrize("text", ["ses", "ses:", "ses:here", "gmail:x", ":25"])
def test_a_wrong_smart_host_names_the_presets(text: str) -> None:
    with pytest.raises(smtprelay.SettingsError, match=r"SMTP_RELAY_HOST='.*': expected host or host:port.*ses:REGION"):
        settings_of(SMTP_RELAY_HOST=text)


@pytest.mark.parametrize(
    ("host", "password", "sent"),
    [
        ("gmail", "abcd efgh ijkl mnop", "abcdefghijklmnop"),
        ("smtp.gmail.com", "abcd efgh ijkl mnop", "abcdefghijklmnop"),
        ("fastmail", "abcd efgh ijkl mnop", "abcdefghijklmnop"),
        ("gmail", "two words", "two words"),
        ("mail.example", "abcd efgh ijkl mnop", "abcd efgh ijkl mnop"),
    ],
)
def test_spaces_of_an_app_password_go_and_of_no_other(host: str, password: str, sent: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "password").write_text(password + "\n")
    for given in {"SMTP_RELAY_PASSWORD": password}, {"SMTP_RELAY_PASSWORD_FILE": str(tmp_path / "password")}:
        s = settings_of(SMTP_RELAY_HOST=host, SMTP_RELAY_USERNAME="me", **given)
        target = smtprelay.Target(*s.smart_hosts[0], s.relay_username, s.relay_password)
        log = smtprelay.Log(logging.getLogger("test"))
        hop, said = smtprelay.NextHop(s, target, log), mock.Mock(return_value=(235, "ok"))
        monkeypatch.setattr(hop, "ask", said)
        hop.features = {"auth": "PLAIN"}
        hop.login()
        assert base64.b64decode(said.call_args[0][1].split()[2]).decode() == f"\0me\0{sent}"


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("tags", ["", "a=from:x", "My Tag=subject:hi is:unread; b = to:x;"], ["x", "=from:a", "a=", "a=b;;c", "a=b; c"]),
        ("web_root", ["/", "/mail", "/a/b/"], ["mail", "//x", "/a b", "https://x/mail", "/a?b"]),
        ("relay_host", ["a.example:25,b", "[::1]:25"], ["mail.example:25:tls", "mail.example:99999", "::1"]),
        ("dns_server", ["", "::1", "[::1]:53"], ["x", "1.2.3.4:0"]),
        ("retry_multiplier", ["1", "2.5"], ["0.9", "²", "9" * 400]),
        ("spool_max_messages", ["0", "7"], ["1.5", "1e3", "-1", "1" * 4400]),
        ("workers", ["1"], ["0", "none"]),
    ],
)
def test_forms_of_values(name: str, right: list[str], wrong: list[str]) -> None:
    env = f"SMTP_{name.upper()}"
    for text in right:
        settings_of(**{env: text})
    for text in wrong:
        with pytest.raises(smtprelay.SettingsError, match=f"{env}='.*': expected "):
            settings_of(**{env: text})


@pytest.mark.parametrize("name", ["SMTP_RELAY_REDIRECT", "SMTP_SPOOL_DIR", "SMTP_TLS_CERTIFICATE", "SMTP_MAX_MESSAGE"])
def test_a_name_that_begins_like_ours_is_a_mistake(name: str) -> None:
    with pytest.raises(smtprelay.SettingsError, match=f"^{name} is not a setting; did you mean SMTP_[A-Z_]+[?]$"):
        settings_of(**{name: "x", "SMTP_HOST": "an.application"})


@pytest.mark.parametrize("verb", ["serve", "check"])
def test_a_name_that_begins_like_ours_stops_the_start(verb: str) -> None:
    done = run(verb, SMTP_RELAY_REDIRECT="x", SMTP_HOST="an.application", SMTP_PORT="0")
    assert (done.returncode, "SMTP_RELAY_REDIRECT is not a setting" in done.stderr) == (78, True), done


@pytest.mark.parametrize("name", ["SMTP_HOST", "SMTP_USER", "SMTP_TLS", "SMTP_FROM_NAME"])
def test_a_name_that_may_be_an_applications_is_a_warning(name: str) -> None:
    done = run("check", **{name: "x"})
    assert (done.returncode, f"{name} is not a setting" in done.stderr) == (0, True), done


def test_port_465_means_tls_from_the_first_byte() -> None:
    hosts = settings_of(SMTP_RELAY_HOST="a.example:465,b.example,c.example:587").smart_hosts
    assert [tls for _, _, tls in hosts] == ["tls", "starttls", "starttls"]
    assert settings_of(SMTP_RELAY_HOST="a.example", SMTP_RELAY_PORT="465").smart_hosts == (("a.example", 465, "tls"),)
    assert settings_of(SMTP_RELAY_HOST="a.example:465", SMTP_RELAY_TLS="none").smart_hosts[0][2] == "none"


def test_a_missing_password_file_is_one_line_about_it(tmp_path: Path) -> None:
    env = {"SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_USERNAME": "me"}
    done = run("check", **env, SMTP_RELAY_PASSWORD_FILE="/none")
    assert done.stderr == (
        "smtprelay: SMTP_RELAY_PASSWORD_FILE='/none': expected a file that can be read: No such file or directory\n")
    both = run("check", SMTP_SPOOL_KEY="0" * 64, SMTP_SPOOL_KEY_FILE="/none").stderr
    assert both == "smtprelay: SMTP_SPOOL_KEY and SMTP_SPOOL_KEY_FILE are both set: expected one of them\n"


@pytest.mark.parametrize(("word", "level"), [("warning", "warn"), ("ERR", "error"), ("trace", "debug"), ("Info", "info")])
def test_levels_have_plain_synonyms(word: str, level: str) -> None:
    assert settings_of(SMTP_LOG_LEVEL=word).log_level == level


def test_waits_are_scaled_and_a_seed_repeats_them() -> None:
    scaled = settings_of(SMTP_TIME_SCALE="1000", SMTP_SEED="7")
    plain = settings_of(SMTP_SEED="7")
    waits = [
        [smtprelay.backoff(s, n, smtprelay.Scheduler(s).rng) for n in range(1, 20)] for s in (plain, scaled, scaled)
    ]
    assert waits[1] == waits[2] == [w / 1000 for w in waits[0]]
    assert settings_of(SMTP_SEED="8").seed != scaled.seed
    with pytest.raises(smtprelay.SettingsError):
        settings_of(SMTP_TIME_SCALE="0")


# === OBSERVING ===============================================================


def test_nothing_a_client_sends_can_forge_a_log_line(program: Callable[..., Program]) -> None:
    relay = program(SMTP_DEBUG="1", SMTP_LOG_LEVEL="debug")
    with hello(relay) as client:
        for line in (
            'MAIL FROM:<"\\u001b[31m"@x>',
            "FOO\rforged line",
            "NOOP \x00\x1b]0;title\x07",
            "VRFY \u2028\u0085",
        ):
            client.ask(line.replace("\\u001b", "\x1b"))
    with Dialogue((relay.host, relay.port)) as client:
        client.ask("EHLO forged\rlevel=error")
    relay.stop()
    assert "NOOP" in relay.log()
    assert re.findall("[^\n\x20-\x7e\xa0-\u2027\u202a-\uffff]", relay.log()) == []
    assert not re.search(r"(?m)^(forged|level=error)", relay.log())


def test_json_log_is_one_object_a_line_and_names_the_queue_id(program: Callable[..., Program]) -> None:
    relay = program(SMTP_LOG_FORMAT="json")
    [queue_id] = said(relay)
    relay.stop()
    lines = [json.loads(line) for line in relay.log().splitlines()]
    assert any(line.get("id") == queue_id for line in lines) and "smtprelay" in lines[0]["said"]


def test_a_log_file_is_its_owners_alone_begins_with_what_was_bound_and_is_reopened(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    path = tmp_path / "log"
    relay = program(SMTP_LOG_FILE=str(path))
    [first] = said(relay)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text().startswith("smtprelay ")
    assert f"received id={first} " in path.read_text() and "received" not in relay.log()
    path.rename(tmp_path / "old")
    [second] = said(relay)
    assert f"received id={second} " in path.read_text() and second not in (tmp_path / "old").read_text()


def test_a_log_line_costs_few_calls(tmp_path: Path) -> None:
    log, calls = smtprelay.Log(str(tmp_path / "log")), []
    log.info("warm up", one="a", two="b c")
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    log.info("received", id="x" * 16, sender="a@b", size=5, client="::1", helo="x", protocol="ESMTP", to="c@d")
    sys.setprofile(None)
    assert len(calls) <= 8, calls


def test_debug_log_masks_secrets(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    secret = "s3cret-pass"
    for method in ("plain", "login", "cram-md5"):
        next_hop = hop(users={"ann": secret})
        more = {"SMTP_RELAY_USERNAME": "ann", "SMTP_RELAY_PASSWORD": secret, "SMTP_RELAY_AUTH": method}
        relay = program(SMTP_DEBUG="1", SMTP_LOG_LEVEL="debug", **next_hop.settings(), **more)
        said(relay)
        relay.spool.await_status("forwarded")
        relay.stop()
        encoded = [base64.b64encode(text.encode()).decode() for text in (secret, f"\0ann\0{secret}")]
        assert [text for text in [secret, *encoded] if text in relay.log()] == []
        assert "AUTH" in relay.log() and "MAIL FROM" in relay.log()


def audited(path: Path) -> list[dict[str, Any]]:
    """Read an audit log; every line of it is one object of ours."""
    lines = [json.loads(line) for line in path.read_bytes().decode("ascii").split("\n")[:-1]]
    assert all(re.fullmatch(r"[0-9T:.-]+Z", line["time"]) and line["event"] for line in lines)
    return lines


def test_an_audit_line_for_each_event(
    program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path, pair: str
) -> None:
    users = {"a": {"password": "x", "allowed_domains": ["b.test"]}, "once": {"password": "x", "quota_daily": 1}}
    audit, next_hop = tmp_path / "audit", hop(script={"rcpt no@hop.test": "550 no"})
    relay = program(SMTP_AUDIT_LOG=str(audit), SMTP_USERS_FILE=users_file(tmp_path, users), SMTP_MAX_ERRORS="3",
                    SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair, **next_hop.settings())  # fmt: skip
    with greeted(relay, pair=pair) as client:
        client.ask(plain("a", "wrong"), "535")
        client.ask(plain("a", "x"), "235")
        client.ask("MAIL FROM:<a@other.test>", "550")
        assert client.mail(b"x\r\n", "ok@b.test").startswith("250")
        assert client.mail(b"x\r\n", "ok@b.test", "no@hop.test").startswith("250")
        client.ask("FOO", "500")
        client.ask("FOO", "421")
    with greeted(relay) as client:
        client.ask(plain("once", "x"), "235")
        assert client.mail(b"x\r\n").startswith("250")
        client.ask("MAIL FROM:<a@b.test>", "450")
    wait_until(lambda: {"failed", "delivered"} <= {line["event"] for line in audited(audit)})
    wait_until(lambda: [line["event"] for line in audited(audit)].count("session_end") == 2)
    events = audited(audit)
    assert {line["event"] for line in events} == {
        "session_start",
        "session_end",
        "login",
        "refused",
        "blocked",
        "quota",
        "accepted",
        "delivered",
        "failed",
    }
    logins = [(line["user"], line["result"], line["tls"]) for line in events if line["event"] == "login"]
    assert logins == [("a", "failure", "TLSv1.3"), ("a", "success", "TLSv1.3"), ("once", "success", "")]
    [accepted, *_] = [line for line in events if line["event"] == "accepted"]
    assert (accepted["user"], accepted["sender"], accepted["recipients"]) == ("a", "ok@b.test", ["bob@hop.test"])
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600


def test_nothing_a_client_sends_can_forge_an_audit_line(start: Callable[..., Any], tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    relay = start(SMTP_AUDIT_LOG=str(audit), SMTP_AUTH_ANY="1", SMTP_MAX_ERRORS="100")
    evil = 'x\n{"time": "2026-01-01T00:00:00Z", "event": "forged"}\r\n\x1b[31m\u2028\x85'
    with greeted(relay) as client:
        for line in (plain(evil, "x"), plain(evil[::-1], "x")):
            client.ask(line, "235|503")
        client.ask('MAIL FROM:<"\u2028\u0085"@b.test> SMTPUTF8', "250|501")
        client.ask("RSET", "250")
        client.ask("MAIL FROM:<a@b.test> X-\u2028=1", "501|555")
        client.ask("MAIL FROM:<a@b.test> X=1", "555")
        sent(relay, client)
    wait_until(lambda: any(line["event"] == "session_end" for line in audited(audit)))
    assert "forged" not in {line["event"] for line in audited(audit)}


@pytest.mark.parametrize("name", ["SMTP_AUDIT_LOG", "SMTP_LOG_FILE"])
def test_a_log_that_cannot_be_written_is_a_wrong_value(tmp_path: Path, name: str) -> None:
    for path in (tmp_path, tmp_path / "none" / "log"):
        with pytest.raises(smtprelay.SettingsError, match=name):
            smtprelay.Settings.read({name: str(path)})
    assert smtprelay.Settings.read({name: str(tmp_path / "log")}) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_password_in_any_log(
    program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path, form: str
) -> None:
    secrets = ["Kennwort-1", "Kennwort-2", "Kennwort-3", "falsches-Kennwort", "mp_live_geheim", "mp_live_gestern"]
    good, own, relay_secret, wrong, key, old_key = secrets
    users = {"app": {"password": cheap_hash(good), "api_key": key, "relay_password": own}, "clear": {"password": own}}
    next_hop, audit = hop(users={"hop": relay_secret}), tmp_path / "audit"
    relay = program(
        SMTP_DEBUG="1",
        SMTP_LOG_LEVEL="debug",
        SMTP_LOG_FORMAT=form,
        SMTP_AUDIT_LOG=str(audit),
        SMTP_AUTH_FAILURES="50",
        SMTP_USERS_FILE=users_file(tmp_path, users),
        SMTP_RELAY_USERNAME="hop",
        SMTP_RELAY_PASSWORD=relay_secret,
        SMTP_MAX_ERRORS="100",
        **next_hop.settings(),
    )
    with greeted(relay) as client:
        client.ask(plain("app", wrong), "535")
        client.ask(plain("nobody", wrong), "535")
    with greeted(relay) as client:  # each failure of a session is answered more slowly
        client.ask(plain(old_key, wrong), "535")
        client.ask("AUTH LOGIN", "334")
        client.ask(b64("app").decode(), "334")
        client.ask(b64(wrong).decode(), "535")
        client.ask("AUTH GSSAPI", "504")  # a client that goes on regardless
        client.ask(b64(good).decode(), "500")
        client.ask(good, "500")
        client.ask(f"AUTH {good}", "504")
        client.ask(f"AUTH  PLAIN {b64(good).decode()}", "501")
        client.ask(f"AUTH\tPLAIN {b64(good).decode()}", "500")
        client.ask(f" AUTH PLAIN {b64(good).decode()}", "500")
        client.ask("AUTH PLAIN " + good, "501")
        client.ask(plain(key, good), "235")
        client.mail()
    relay.spool.await_status("forwarded")
    (tmp_path / "users.json").write_text(json.dumps(users)[:-1])
    fetch(relay, "/readyz")
    relay.stop()
    logs = relay.log() + audit.read_text() + "".join(p.read_text() for p in (relay.spool.root / "usage").iterdir())
    hidden = [*secrets, *(b64(secret).decode() for secret in secrets), *(plain("", s)[-12:] for s in secrets)]
    assert [line for line in logs.split("\n") for text in hidden if text in line] == []
    assert "AUTH PLAIN ***" in logs and "MAIL FROM" in logs and "users_file_broken" in logs


def test_readyz_names_a_broken_users_file(program: Callable[..., Program], tmp_path: Path) -> None:
    relay = program(SMTP_USERS_FILE=users_file(tmp_path, USERS))
    assert wait_until(lambda: fetch(relay, "/readyz")[0] == 200)
    users_file(tmp_path, "{")
    status, _, body = fetch(relay, "/readyz")
    assert status == 503 and "users.json" in body and "expected JSON" in body
    with greeted(relay) as client:
        client.ask(GOOD_LOGIN, "235")  # the last good one
    users_file(tmp_path, {"new": {"password": "x"}})
    assert fetch(relay, "/readyz")[0] == 200
    with greeted(relay) as client:
        client.ask(GOOD_LOGIN, "535")
        client.ask(plain("new", "x"), "235")
        users_file(tmp_path, {"other": {"password": "xyz"}})
        client.ask("MAIL FROM:<a@b.test>", "530 5.7.0")  # an account that is gone sends no more


def test_a_half_that_is_made_anew_keeps_the_last_good_accounts(program: Callable[..., Program], tmp_path: Path) -> None:
    relay = program(SMTP_USERS_FILE=users_file(tmp_path, USERS))
    users_file(tmp_path, "{")
    children = Path(f"/proc/{relay.process.pid}/task/{relay.process.pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    before = set(wait_until(lambda: children.read_text().split()))
    for child in before:
        os.kill(int(child), signal.SIGKILL)
    wait_until(lambda: len(set(children.read_text().split()) - before) == 2)
    with greeted(relay) as client:
        client.ask(GOOD_LOGIN, "235")


def test_sighup_rereads_accounts_and_certificate(program: Callable[..., Program], tmp_path: Path, pair: str) -> None:
    mine = tmp_path / "mine.pem"
    shutil.copy(pair, mine)
    relay = program(SMTP_USERS_FILE=users_file(tmp_path, USERS), SMTP_TLS_CERT=str(mine), SMTP_TLS_KEY=str(mine))
    relay.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "certificate_reread" in relay.log())
    with greeted(relay, pair=pair) as client:
        client.ask(GOOD_LOGIN, "235")


@pytest.mark.parametrize("broken", ["users", "pair", "both"])
def test_what_is_broken_at_the_start_is_an_error(tmp_path: Path, pair: str, broken: str) -> None:
    (tmp_path / "broken.pem").write_text("x")
    settings = {**QUICK, "SMTP_SPOOL": str(tmp_path / "spool")}
    if broken != "pair":
        settings["SMTP_USERS_FILE"] = users_file(tmp_path, {"a": {"password": "s3cret", "qota": 1}, "b": {}})
    if broken != "users":
        settings.update(SMTP_TLS_CERT=str(tmp_path / "broken.pem"), SMTP_TLS_KEY=pair)
    done = run(**settings)
    assert done.returncode == 78 and "Traceback" not in done.stderr and "s3cret" not in done.stderr
    assert ("account a: qota: no such key" in done.stderr and "account b" in done.stderr) is (broken != "pair")
    assert ("SMTP_TLS_CERT" in done.stderr) is (broken != "users")


def test_metrics_of_the_doors(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_AUTH_USER="ann", SMTP_AUTH_PASSWORD="x", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair)
    with greeted(relay, pair=pair) as client:
        client.ask(plain("ann", "wrong"), "535")
        client.ask(plain("ann", "x"), "235")
        assert metric(relay, "smtp_sessions_active") == 1
    assert metric(relay, "smtp_tls_sessions_total") == 1
    assert metric(relay, "smtp_auth_attempts_total") == {"success": 1, "failure": 1}
    assert metric(relay, "smtp_messages_rejected_total")["535"] == 1
    text = fetch(relay, "/metrics?format=prometheus")[2]
    assert 'smtp_auth_attempts_total{result="failure"} 1' in text and "ann" not in text


def test_a_log_that_cannot_be_reopened_stops_nothing(tmp_path: Path, capsys: Any) -> None:
    place = tmp_path / "logs"
    place.mkdir()
    log = smtprelay.open_log(settings(SMTP_LOG_FILE=str(place / "log")))
    log.info("one")
    place.rename(tmp_path / "old")
    log.info("two")
    assert re.search(r"info two log_error=.*No such file or directory", capsys.readouterr().err)
    place.mkdir()
    log.info("three")
    assert "info three" in (place / "log").read_text()


def test_a_listener_that_lags_gets_the_end_whoever_publishes() -> None:
    feed = smtprelay.Feed()
    events, keeps_up = feed.subscribe(), feed.subscribe()

    def publish(_: int) -> None:
        for _ in range(300):
            feed.publish({})
            keeps_up.get(timeout=5)

    in_threads(4, publish)
    assert [events.get_nowait() for _ in range(1000)] == [{}] * 1000
    assert None in [events.get_nowait() for _ in range(events.qsize())]
    assert feed.listeners == {keeps_up} and keeps_up.empty()


# === WIRE ====================================================================


TALK = {
    "the usual": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: RCPT TO:<bob@hop.test> -> 250 2.1.5
        C: DATA -> 354
        C: Subject: x\\r\\n\\r\\nbody\\r\\n. -> 250 2.0.0
        C: QUIT -> 221 2.0.0
        S: closed""",
    "pipelined, replies in order": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        C: RCPT TO:<bad
        C: RCPT TO:<carol@hop.test>
        C: DATA
        S: 250 2.1.0
        S: 250 2.1.5
        S: 501 5.1.3
        S: 250 2.1.5
        S: 354
        C: x\\r\\n.
        C: MAIL FROM:<ann@client.test>
        C: NOOP
        C: QUIT
        S: 250 2.0.0
        S: 250 2.1.0
        S: 250 2.0.0
        S: 221 2.0.0
        S: closed""",
    "any case, blanks at the end, no extensions after HELO": """
        C: heLO client.test -> 250 relay.test
        C: mail from:<ann@client.test> SIZE=5 -> 555 5.5.4
        C: mail from:<ann@client.test>\\x20 -> 250 2.1.0
        C: rcpt to:<bob@hop.test> -> 250 2.1.5
        C: data\\x20 -> 354
        C: . -> 250 2.0.0""",
    "out of order": """
        C: MAIL FROM:<ann@client.test> -> 503 5.5.1
        C: EHLO client.test -> 250-relay.test
        C: RCPT TO:<bob@hop.test> -> 503 5.5.1
        C: DATA -> 503 5.5.1
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: DATA -> 503 5.5.1|554 5.5.1
        C: MAIL FROM:<ann@client.test> -> 503 5.5.1
        C: RCPT TO:<bob -> 501 5.1.3
        C: DATA -> 554 5.5.1|503 5.5.1
        C: RCPT TO:<bob@hop.test> -> 250 2.1.5
        C: DATA -> 354
        C: . -> 250 2.0.0
        C: RCPT TO:<bob@hop.test> -> 503 5.5.1""",
    "RSET, EHLO and HELO end a transaction": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: RSET -> 250 2.0.0
        C: RCPT TO:<bob@hop.test> -> 503 5.5.1
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: EHLO client.test -> 250-relay.test
        C: RCPT TO:<bob@hop.test> -> 503 5.5.1
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: HELO client.test -> 250 relay.test
        C: DATA -> 503 5.5.1""",
    "what else there is": """
        C: HELP -> 214
        C: NOOP -> 250 2.0.0
        C: NOOP with words -> 250 2.0.0
        C: RSET -> 250 2.0.0
        C: EHLO client.test -> 250-relay.test
        C: HELP MAIL -> 214
        C: VRFY bob -> 252
        C: EXPN list -> 502 5.5.1|252|550
        C: VRFY -> 501 5.5.4
        C: RSET now -> 501 5.5.4
        C: DATA now -> 501 5.5.4|503 5.5.1
        C: QUIT now -> 501 5.5.4""",
    "not a command": """
        C: EHLO client.test -> 250-relay.test
        C: FOO -> 500 5.5.2
        C: \\x20 -> 500 5.5.2
        C: \\x00NOOP -> 500 5.5.2|501 5.5.4
        C: NOOP\\x00 -> 500 5.5.2|501 5.5.4
        C: NOOP \\x7f\\x1b[2J -> 500 5.5.2|501 5.5.4
        C: NOOP \\xff\\xfe -> 500 5.5.2|501 5.5.4
        C: \\xd0\\x9d\\xd0\\x9e -> 500 5.5.2|501 5.5.4
        C: NOOP\\rNOOP -> 500 5.5.2|501 5.5.4
        C: TURN -> 500 5.5.2|502 5.5.1
        C: NOOP -> 250 2.0.0""",
    "EHLO and HELO want a name": """
        C: EHLO -> 501 5.5.4
        C: HELO -> 501 5.5.4
        C: EHLO bad\\x01name -> 501 5.5.4|500 5.5.2
        C: EHLO [127.0.0.1] -> 250-relay.test
        C: EHLO [IPv6:::1] -> 250-relay.test
        C: EHLO under_score -> 250-relay.test""",
    "BDAT": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        C: BDAT 7\\r\\n.\\r\\n..
        C: BDAT 0
        C: BDAT 3 last\\r\\n.
        S: 250 2.1.0
        S: 250 2.1.5
        S: 250 2.0.0
        S: 250 2.0.0
        S: 250 2.0.0""",
    "BDAT, zero LAST": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        C: BDAT 7\\r\\n.\\r\\n..
        C: BDAT 0 LAST
        C: NOOP
        S: 250 2.1.0
        S: 250 2.1.5
        S: 250 2.0.0
        S: 250 2.0.0
        S: 250 2.0.0""",
    "BDAT among others": """
        C: EHLO client.test -> 250-relay.test
        C: BDAT 6\\r\\nRSET
        C: NOOP
        S: 503 5.5.1
        S: 250 2.0.0
        C: MAIL FROM:<ann@client.test> -> 250 2.1.0
        C: BDAT 6 LAST\\r\\nRSET
        C: NOOP
        S: 503 5.5.1|554 5.5.1
        S: 250 2.0.0
        C: RSET -> 250 2.0.0
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        C: BDAT 6\\r\\nabcd
        S: 250 2.1.0
        S: 250 2.1.5
        S: 250 2.0.0
        C: DATA -> 503 5.5.1
        C: MAIL FROM:<ann@client.test> -> 503 5.5.1
        C: RCPT TO:<carol@hop.test> -> 503 5.5.1
        C: RSET -> 250 2.0.0
        C: BDAT 0 LAST -> 503 5.5.1""",
    "BDAT arguments": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        S: 250 2.1.0
        S: 250 2.1.5
        C: BDAT -> 501 5.5.4
        C: BDAT x -> 501 5.5.4
        C: BDAT -1 -> 501 5.5.4
        C: BDAT +1 -> 501 5.5.4
        C: BDAT \\xb2 -> 501 5.5.4|500 5.5.2
        C: NOOP -> 250 2.0.0""",
    "too many recipients, the good ones kept": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<a@hop.test>
        C: RCPT TO:<b@hop.test>
        C: RCPT TO:<c@hop.test>
        C: RCPT TO:<d@hop.test>
        C: DATA
        S: 250 2.1.0
        S: 250 2.1.5
        S: 250 2.1.5
        S: 250 2.1.5
        S: 452 4.5.3
        S: 354
        C: . -> 250 2.0.0""",
    "declared too big": """
        C: EHLO client.test -> 250-relay.test
        C: MAIL FROM:<ann@client.test> SIZE=20001 -> 552 5.3.4
        C: MAIL FROM:<ann@client.test> SIZE=20000 -> 250 2.1.0""",
}


@pytest.mark.parametrize("name", TALK)
def test_dialogue(holding: Any, name: str) -> None:
    for seed in range(3):
        with dial(holding) as client:
            client.play(TALK[name], random.Random(seed))


def test_ehlo_lists_what_the_contract_says(start: Callable[..., Any]) -> None:
    with dial(start()) as client:
        first, *lines = client.ask("EHLO client.test").split("\n")
    assert client.greeting.startswith("220 relay.test ")
    assert first.startswith("250-relay.test")
    offers = {line[4:] for line in lines}
    assert offers == {"SIZE 10485760", "8BITMIME", "SMTPUTF8", "PIPELINING", "CHUNKING", "ENHANCEDSTATUSCODES",
                      "LIMITS RCPTMAX=100", "DSN", "HELP"}  # fmt: skip


CONTENTS = {
    "nothing": b"", "an empty line": b"\r\n", "a dot": b".\r\n",
    "dots": b".\r\n..\r\n...\r\n.a\r\n. \r\n\r\n.\r\n", "no headers": b"just words\r\n",
    "begins with a blank": b" folded?\r\n\r\nbody\r\n", "8 bit": bytes(range(128, 256)) + b"\r\n",
    "NUL and controls": bytes(set(range(32)) - {10, 13}) + b"\r\n\x7f\r\n",
    "a long line": b"x" * 15000 + b"\r\n",
    "our own headers": b"X-Envelope-To: <evil@x.test>\r\nReceived: from nowhere\r\n\r\n.\r\n",
    "many short lines": b".\r\n" * 3000,
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_content_is_kept_octet_by_octet_however_it_is_split(holding: Any, held: Spool, name: str) -> None:
    content = CONTENTS[name]
    with hello(holding) as client:
        for seed in range(4):
            client.envelope()
            wire = stuffed(content)
            head = wire[: max(0, len(wire) - 300)]
            client.ask("DATA", "354")
            client.send(head)
            client.send(wire[len(head) :], random.Random(seed))
            assert held.content(client.reply().split()[-1]) == content


def test_end_of_content_is_found_at_every_split(holding: Any, held: Spool) -> None:
    wire, after = b"a\r\n..\r\n..b\r\n.\r\n", b"NOOP\r\n"
    with hello(holding) as client:
        for cut in range(1, len(wire + after)):
            client.envelope()
            client.ask("DATA", "354")
            client.send((wire + after)[:cut])
            time.sleep(0.001)
            client.send((wire + after)[cut:])
            assert held.content(client.reply().split()[-1]) == b"a\r\n.\r\n.b\r\n"
            assert client.reply().startswith("250 2.0.0")


class Pieces(smtprelay.Wire):
    """A wire that brings what it is given, piece by piece."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__(socket.socket(), math.inf)
        self.pieces = [*pieces]
        self.sock.close()

    def fill(self, reading: bool = True, most: int = 0) -> None:
        self.buffer += self.pieces.pop(0)


def test_content_means_the_same_however_it_is_split() -> None:
    rng, bits = random.Random(7), [b"\r", b"\n", b".", b"a", b"\r\n", b"\r\n.", b"\n."]
    for _ in range(4000):
        data = b"".join(rng.choice(bits) for _ in range(rng.randint(0, 14))) + b"\r\n.\r\nQUIT\r\n"
        raw, _, rest = (b"\r\n" + data).partition(b"\r\n.\r\n")
        lines = re.split(rb"\r\n|\r|\n", (raw + b"\r\n")[2:])
        mended = b"\r\n".join(line[len(line) > 1 and line[:1] == b"." :] for line in lines)
        bare = bool(re.search(rb"\r(?!\n)|(?<!\r)\n", raw))
        cuts = sorted(rng.sample(range(1, len(data)), rng.randint(0, 6))) if rng.random() < 0.7 else range(1, len(data))
        for lenient in (False, True):
            wire = Pieces(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])))
            kept = io.BytesIO()
            content = smtprelay.Content(kept, 100, lenient)
            smtprelay.read_data(wire, content)
            content.end()
            assert wire.buffer + b"".join(wire.pieces) == rest, data
            reply = getattr(content.trouble, "reply", None)
            assert reply == (smtprelay.BARE_NEWLINE if bare and not lenient else None), data
            assert reply or (kept.getvalue(), content.size) == (mended, len(mended)), (data, cuts)


NEAR_ENDS = [
    b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n\n.\r\n", b"\r\n.\r\r\n",
    b"\r\n.\n\r\n", b"\r\n\r.\r\n", b"a\nb", b"a\rb", b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n\n.\r",
    b"\x00\n.\x00\r\n",
]  # fmt: skip


@pytest.mark.parametrize("near", NEAR_ENDS)
@pytest.mark.parametrize(
    "filler", [b"", b"x" * 70 + b"\r\n", b"y" * 30000 + b"\r\n"], ids=["short", "line", "over-long"]
)
def test_bare_newlines_end_nothing_and_are_refused(holding: Any, held: Spool, near: bytes, filler: bytes) -> None:
    before = len(held.files("*.eml"))
    evil = b"MAIL FROM:<evil@x.test>\r\nRCPT TO:<victim@x.test>\r\nDATA\r\nSubject: evil\r\n"
    with hello(holding) as client:
        for seed in range(3):
            client.envelope()
            client.ask("DATA", "354")
            client.send(b"Subject: x\r\n\r\n" + filler + b"body")
            client.send(near + evil, random.Random(seed))
            client.send(filler + b"\r\n.\r\n")
            assert client.reply().startswith(("552 5.3.4", "554 5.6.0")[len(filler) < 20000 :])
            client.ask("NOOP", "250 2.0.0")
    assert len(held.files("*.eml")) == before


def test_bare_newline_in_bdat_is_refused_but_not_a_split_crlf(holding: Any, held: Spool) -> None:
    with hello(holding) as client:
        for chunks, want in (
            ((b"a\nb\r\n",), "554 5.6.0"),
            ((b"a\rb\r\n",), "554 5.6.0"),
            ((b"a\r", b"b"), "554 5.6.0"),
            ((b"a\r", b"\nb\r\n"), "250 2.0.0"),
            ((b"no newline at the end",), "250 2.0.0"),
        ):
            client.envelope()
            for chunk in chunks[:-1]:
                client.send(b"BDAT %d\r\n" % len(chunk) + chunk)
                assert client.reply().startswith("250 2.0.0")
            client.send(b"BDAT %d LAST\r\n" % len(chunks[-1]) + chunks[-1])
            answer = client.reply()
            assert answer.startswith(want), chunks
            if want.startswith("250"):
                assert held.content(answer.split()[-1]) == b"".join(chunks)
            client.ask("RSET", "250")


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("how", ["DATA", "BDAT", "BDAT in chunks"])
def test_the_size_limit_is_exact(holding: Any, held: Spool, how: str, extra: int) -> None:
    content = b".\r\n" * 6665 + b"x" * (3 + extra) + b"\r\n"
    assert len(content) == 20000 + extra
    with hello(holding) as client:
        client.envelope()
        if how == "DATA":
            answer = client.content(stuffed(content))
        else:
            cut = 12000 if how == "BDAT in chunks" else 0
            if cut:
                client.send(b"BDAT %d\r\n" % cut + content[:cut])
                assert client.reply().startswith("250 2.0.0")
            client.send(b"BDAT %d LAST\r\n" % (len(content) - cut) + content[cut:])
            answer = client.reply()
        assert answer.startswith("552 5.3.4" if extra else "250 2.0.0")
        client.ask("NOOP", "250 2.0.0")
        assert extra or held.content(answer.split()[-1]) == content


def test_the_size_limit_is_10485760_by_default(start: Callable[..., Any]) -> None:
    line = b"x" * 1022 + b"\r\n"
    with hello(start(SMTP_STORAGE="memory")) as client:
        assert client.mail(line * 10240).startswith("250 2.0.0")
        assert client.mail(line * 10239 + b"x" * 1023 + b"\r\n").startswith("552 5.3.4")
        assert client.mail().startswith("250 2.0.0")


def test_over_long_lines_are_refused_in_step(holding: Any) -> None:
    with hello(holding) as client:
        for length in (5000, 20000, 200000):
            client.send(b"NOOP " + b"x" * length + b"\r\nNOOP\r\n")
            assert client.reply().startswith("500 5.5.2")
            assert client.reply().startswith("250 2.0.0")


def test_a_line_that_ends_in_lf_alone_is_not_obeyed(holding: Any) -> None:
    with hello(holding) as client:
        client.send(b"NOOP\nFOO\r\nRSET\r\n")
        replies = [client.reply()]
        while replies[-1].startswith("500 5.5.2"):
            replies.append(client.reply())
        assert replies[-1].startswith("250") and 2 <= len(replies) <= 3, replies


def test_a_line_without_end_is_no_memory(holding: Any) -> None:
    with hello(holding) as client, contextlib.suppress(ConnectionError):
        for _ in range(64):
            client.send(b"x" * 65536)
        client.send(b"\r\n")
        assert client.reply()[:3] in ("500", "421")


GIVING = ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@hop.test>"]
SLOW = [  # the deadline, what is said, and what then comes octet by octet
    *(("SMTP_COMMAND_TIMEOUT", lines, trickle) for lines in ([], ["EHLO x"]) for trickle in (b"", b"N")),
    *(("SMTP_DATA_TIMEOUT", [*GIVING, "DATA"], trickle) for trickle in (b"", b"x\r\n")),
    ("SMTP_DATA_TIMEOUT", [*GIVING, "BDAT 5000"], b"x\r\n"),
    ("SMTP_SESSION_TIMEOUT", ["EHLO x"], b"NOOP\r\n"),
]


@pytest.mark.parametrize(("name", "lines", "trickle"), SLOW)
def test_deadlines_are_absolute(start: Callable[..., Any], name: str, lines: list[str], trickle: bytes) -> None:
    relay = start(SMTP_STORAGE="memory", **{name: "0.15s"})
    began = time.monotonic()
    with dial(relay) as client:
        for line in lines[:-1] if "BDAT" in str(lines) else lines:
            client.ask(line)
        client.send((lines[-1] + "\r\n").encode() if "BDAT" in str(lines) else b"")
        client.sock.settimeout(0.02)
        answer = drip(client, trickle * 1000)
    assert 0.1 < time.monotonic() - began < 2
    assert trickle and answer == b"" or answer.splitlines()[-1].startswith(b"421 4.4.2")


def drip(client: Dialogue, data: bytes) -> bytes:
    """Send an octet each 20 ms until the other side has closed, or reset; return what it said."""
    heard = b""
    for position in range(200):
        with contextlib.suppress(TimeoutError, socket.timeout):
            try:
                client.sock.sendall(data[position : position + 1])
                block = client.sock.recv(4096)
            except ConnectionError:
                return heard
            if not block:
                return heard
            heard += block
    pytest.fail("it still listens")


def test_a_client_that_does_not_read_is_let_go(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_COMMAND_TIMEOUT="0.3s")
    with dial(relay) as client:
        client.sock.settimeout(0.05)
        with contextlib.suppress(OSError):
            while True:
                client.send(b"HELP\r\n" * 10000)
        wait_until(lambda: metric(relay, "smtp_sessions_active") == 0, 4)


HTTP_REQUESTS = [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"CONNECT x:25 HTTP/1.1\r\n\r\n",
    b"PUT /a HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\n\r\nEHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n",
]


@pytest.mark.parametrize("request_text", HTTP_REQUESTS)
def test_http_is_shown_the_door(holding: Any, request_text: bytes) -> None:
    with dial(holding) as client:
        client.send(request_text)
        assert client.reply()[:3] in ("421", "500", "502", "554", "")
        assert client.closed()


def test_a_client_that_talks_before_the_greeting_is_refused(holding: Any) -> None:
    def refused() -> bool:
        client = Dialogue((holding.host, holding.port))
        with contextlib.closing(client.sock), contextlib.closing(client.file):
            client.sock.sendall(b"EHLO x\r\n")
            return client.reply()[:3] in ("421", "554", "")

    wait_until(refused)  # the first tries may lose the race with the greeting


# -- the PROXY protocol --

V2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_HEADERS = [  # what the balancer sends, the client that is meant; None: closed without a word
    (b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 25\r\n", "192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 ::1 4711 25\r\n", "2001:db8::7"), (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", "127.0.0.1"),
    (V2 + b"\x21\x11\0\x0c" + bytes([192, 0, 2, 9, 127, 0, 0, 1, 0, 1, 0, 25]), "192.0.2.9"),
    (V2 + b"\x21\x21\0\x24" + bytes.fromhex("20010db8000000000000000000000009") + bytes(20), "2001:db8::9"),
    (V2 + b"\x21\x11\0\x0f" + bytes([192, 0, 2, 9, 127, 0, 0, 1, 0, 1, 0, 25]) + b"\x04\0\0", "192.0.2.9"),
    (V2 + b"\x20\0\0\0", "127.0.0.1"), (V2 + b"\x21\0\0\0", "127.0.0.1"), (b"PROXY TCP4 192.0.2.7\r\n", None),
    (b"PROXY TCP4 192.0.2.700 127.0.0.1 1 2\r\n", None), (b"EHLO here\r\n", None),
    (b"P" * 5000 + b"\r\n", None), (V2 + b"\x31\x11\0\x0c" + bytes(12), None),
    (V2 + b"\x21\x11\xff\xff" + bytes(12), None), (V2 + b"\x21\x11\0\x02\0\0", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def balanced() -> Iterator[smtprelay.Relay]:
    with smtprelay.start(
        SMTP_PROXY_NETWORKS="loopback",
        SMTP_ALLOW_NETWORKS="loopback,192.0.2.0/24,2001:db8::/32",
        SMTP_AUTH_REQUIRED="0",
    ) as relay:
        yield relay


def talk_proxied(address: tuple[str, int], *pieces: bytes) -> bytes:
    """Send pieces, a segment each; return all that comes back."""
    with socket.create_connection(address, 5) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        heard = b""
        try:
            for block in iter(lambda: sock.recv(65536), b""):
                heard += block
                if heard.startswith(b"220") and heard.count(b"\n") == 1:
                    sock.sendall(b"EHLO here\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")
                if b"\r\n354" in heard and b"queued" not in heard:
                    sock.sendall(b"Subject: x\r\n\r\nx\r\n.\r\nQUIT\r\n")
        except ConnectionResetError:
            pass
        return heard


@pytest.mark.parametrize("header, client", PROXY_HEADERS)
def test_a_balancer_names_the_client(balanced: smtprelay.Relay, header: bytes, client: str | None) -> None:
    heard = talk_proxied((balanced.host, balanced.port), header[:5], header[5:])
    assert (b"queued" in heard) == (client is not None), heard
    if client:
        id = heard.split(b"queued as ")[1].split()[0].decode()
        spool = balanced.parts.spool
        record = next(spool.load(stem) for stem, _ in spool.names() if id in stem)
        assert record.client == client
    else:
        assert heard == b""


def test_a_proxied_client_is_judged_by_its_own_address(balanced: smtprelay.Relay) -> None:
    address = (balanced.host, balanced.port)
    assert talk_proxied(address, b"PROXY TCP4 198.51.100.1 127.0.0.1 1 2\r\n").startswith(b"554 5.7.1")
    assert talk_proxied(address, b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\nEHLO early\r\n").startswith(b"554 5.5.1")


def test_sessions_are_counted_for_the_proxied_client() -> None:
    env = {
        "SMTP_PROXY_NETWORKS": "loopback",
        "SMTP_ALLOW_NETWORKS": "192.0.2.0/24",
        "SMTP_MAX_CONNECTIONS_PER_CLIENT": "1",
        "SMTP_AUTH_REQUIRED": "0",
    }
    with smtprelay.start(**env) as relay, socket.create_connection((relay.host, relay.port), 5) as first:
        first.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n")
        assert first.recv(100).startswith(b"220")
        assert talk_proxied((relay.host, relay.port), b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n").startswith(b"421")
        assert talk_proxied((relay.host, relay.port), b"PROXY TCP4 192.0.2.2 127.0.0.1 1 2\r\n").startswith(b"220")
        wait_until(lambda: [s.client for s in relay.receiving.reception.sessions] == ["192.0.2.1"])


def test_replies_that_nobody_reads_do_not_pile_up(start: Callable[..., Any]) -> None:
    relay = start()
    with dial(relay) as client:
        client.ask("EHLO x", "250")
        wire = next(iter(relay.receiving.reception.sessions)).wire
        client.send(b"BDAT 400000\r\n" + b"x" * 400000)
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError if sys.version_info > (3, 10) else socket.timeout):
            while True:  # until the relay reads no more
                client.send(b"HELP\r\n" * 10000)
        assert len(wire.out) < smtprelay.OUT_MOST + 1000 and len(wire.buffer) <= 2 * smtprelay.READ_MOST


def test_pipelined_commands_do_not_make_the_buffer_grow() -> None:
    ours, theirs = socket.socketpair()
    wire = smtprelay.Wire(ours, time.monotonic() + 5)
    sender = threading.Thread(target=lambda: (theirs.sendall(b"NOOP x\r\n" * 40_000), theirs.close()))  # type: ignore[func-returns-value]
    sender.start()
    with ours, contextlib.suppress(smtprelay.PeerGone):
        while wire.line() == b"NOOP x\r\n":
            pass
    sender.join()
    assert len(wire.buffer) <= 2 * smtprelay.READ_MOST


# === GRAMMAR =================================================================


LONG = "x" * 64
GOOD_PATHS = {
    "<ann@b.test>": "ann@b.test", "<>": "", "<ann+tag@b>": "ann+tag@b", "<ann@[127.0.0.1]>": "ann@[127.0.0.1]",
    "<ann@[IPv6:::1]>": "ann@[IPv6:::1]", '<"an n"@b.test>': '"an n"@b.test', '<"a>b"@b.test>': '"a>b"@b.test',
    '<"a\\"b@c"@b.test>': '"a\\"b@c"@b.test', "<@one.test,@two.test:ann@b.test>": "ann@b.test",
    "<!#$%&'*+-/=?^_`{|}~@b.test>": "!#$%&'*+-/=?^_`{|}~@b.test", f"<{LONG}@b.test>": f"{LONG}@b.test",
    "<ann@b-1.2c.test>": "ann@b-1.2c.test",
}  # fmt: skip
BAD_PATHS = [
    "<ann@b.test", "<ann@@b.test>", "<an n@b.test>", "<@b.test>", "<ann@>", "<ann@b.test>x",
    "<ann@[999.1.1.1]>", "<ann@[IPv6:zz]>", "<ann@[]>", "<ann@[127.0.0.1>", '<"ann@b.test>', '<"a"b@c.test>',
    "<@one.test:>", "<<ann@b.test>>", "<ann@b.test>>", "<ann@b..test>", "<ann@.test>", f"<{LONG * 12}@b.test>",
    f"<ann@{'a.' * 1000}test>", f"<{'@x.test,' * 200}@y.test:ann@b.test>", "<ann@b.test,bob@b.test>",
    "<ann@b(c).test>", "", "<", ">", "<ann@b,test>",
]  # fmt: skip


@pytest.mark.parametrize("path", GOOD_PATHS)
def test_good_paths(holding: Any, held: Spool, path: str) -> None:
    with hello(holding) as client:
        client.ask(f"MAIL FROM:{path}", "250 2.1.0")
        client.ask(f"RCPT TO:{path if path != '<>' else '<postmaster>'}", "250 2.1.5")
        record = held.known(client.content(b".\r\n").split()[-1])
    assert record["reverse_path"] == GOOD_PATHS[path]
    assert [r["address"] for r in record["recipients"]] == [GOOD_PATHS[path] or "postmaster"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_bad_paths(holding: Any, path: str) -> None:
    too_long = "|500 5.5.2" if len(path) > 500 else ""
    with hello(holding) as client:
        client.ask(f"MAIL FROM:{path}", f"501 5.1.7|501 5.5.4{too_long}")
        client.ask("MAIL FROM:<ann@b.test>", "250 2.1.0")
        client.ask(f"RCPT TO:{path}", f"501 5.1.3|501 5.5.4{too_long}")


MAIL_ARGUMENTS = [
    ("", "501 5.5.4"), ("TO:<ann@b.test>", "501 5.5.4|501 5.1.7"), ("FROM", "501 5.5.4"),
    ("from: <ann@b.test>", "250 2.1.0"), ("FROM:<ann@b.test> SIZE=100 BODY=8BITMIME", "250 2.1.0"),
    ("FROM:<ann@b.test> body=7bit", "250 2.1.0"), ("FROM:<ann@b.test> SMTPUTF8", "250 2.1.0"),
    ("FROM:<ann@b.test> SIZE=", "501 5.5.4"), ("FROM:<ann@b.test> SIZE=abc", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=-1", "501 5.5.4"), ("FROM:<ann@b.test> SIZE", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=" + "9" * 20, "552 5.3.4|501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=" + "9" * 900, "552 5.3.4|501 5.5.4|500 5.5.2"),
    ("FROM:<ann@b.test> BODY=BINARYMIME", "501 5.5.4|555 5.5.4"), ("FROM:<ann@b.test> BODY", "501 5.5.4"),
    ("FROM:<ann@b.test> SMTPUTF8=1", "501 5.5.4"), ("FROM:<ann@b.test> FOO=bar", "555 5.5.4"),
    ("FROM:<ann@b.test> FOO", "555 5.5.4"), ("FROM:<\u00e4nn@b.test>", "553 5.6.7"),
    ("FROM:<\u00e4nn@b\u00fc.test> SMTPUTF8", "250 2.1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "want"), MAIL_ARGUMENTS)
def test_mail_arguments(holding: Any, argument: str, want: str) -> None:
    with hello(holding) as client:
        client.ask(f"MAIL {argument}", want)


RCPT_ARGUMENTS = [
    ("TO:<postmaster>", "250 2.1.5"), ("to:<PostMaster>", "250 2.1.5"), ("TO:<>", "501 5.1.3"),
    ("TO:<bob>", "501 5.1.3"), ("TO:<bob@hop.test> FOO=1", "555 5.5.4"),
    ("TO:<b\u00f6b@hop.test>", "553 5.6.7"), ("", "501 5.5.4"), ("FROM:<bob@hop.test>", "501 5.5.4|501 5.1.3"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "want"), RCPT_ARGUMENTS)
def test_rcpt_arguments(holding: Any, argument: str, want: str) -> None:
    with hello(holding) as client:
        client.ask("MAIL FROM:<ann@b.test>", "250 2.1.0")
        client.ask(f"RCPT {argument}", want)


@pytest.mark.parametrize(
    "octets", [b"\x00", b"\x01", b"\t\x0b", b"\x7f", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\r"]
)
def test_control_characters_and_broken_utf8_in_addresses(holding: Any, octets: bytes) -> None:
    with hello(holding) as client:
        for verb in (b"MAIL FROM:", b"RCPT TO:"):
            client.send(verb + b"<a" + octets + b"b@c.test>" + b" SMTPUTF8" * (verb[:1] == b"M") + b"\r\n")
            assert client.reply()[:3] in ("500", "501", "553")
            client.ask("RSET", "250")
            client.ask("MAIL FROM:<ann@b.test> SMTPUTF8", "250")


def test_utf8_addresses_are_kept(holding: Any, held: Spool) -> None:
    with hello(holding) as client:
        client.ask("MAIL FROM:<\u00e4nn@b\u00fc.test> SMTPUTF8", "250")
        client.ask("RCPT TO:<b\u00f6b@hop.test>", "250")
        record = held.known(client.content(b".\r\n").split()[-1])
    assert (record["reverse_path"], record["recipients"][0]["address"]) == (
        "\u00e4nn@b\u00fc.test",
        "b\u00f6b@hop.test",
    )


# -- delivery status parameters --

XTEXT = [
    ("bob@example.com", "bob@example.com"),
    ("a+b=c d", "a+2Bb+3Dc+20d"),
    ("tilde~bang!", "tilde~bang!"),
]


@pytest.mark.parametrize("text, value", XTEXT)
def test_xtext(text: str, value: str) -> None:
    assert smtprelay.decode_xtext(value) == text


@pytest.mark.parametrize(
    "value",
    ["", "a b", "a=b", "a+2", "a+2G", "+0D+0A", "a+00", "a+7F", "a+E9", "\xe9", "a\r\n", "+"],
)
def test_xtext_refused(value: str) -> None:
    assert smtprelay.decode_xtext(value) == ""


RET = [("FULL", "FULL"), ("hdrs", "HDRS"), ("", None), ("BODY", None)]
ENVID = [
    ("QQ314159", "QQ314159"), ("a+2Bb+41", "a+2BbA"), ("x" * 100, "x" * 100), ("x" * 101, None), ("", None),
    ("+0A", None), ("a b", None),
]  # fmt: skip
NOTIFY = [
    ("NEVER", "NEVER"), ("success,Failure", "SUCCESS,FAILURE"),
    ("FAILURE,SUCCESS,DELAY", "FAILURE,SUCCESS,DELAY"), ("NEVER,SUCCESS", None), ("", None), ("FAILURE,", None),
    ("FAILURE," * 4, None), ("ALWAYS", None), ("FA\u0130LURE", None),
]  # fmt: skip
ORCPT = [
    ("rfc822;bob@example.com", "rfc822;bob@example.com"),
    ("RFC822;a+2Bb@example.com", "RFC822;a+2Bb@example.com"),
    ("x400;/S=bob/".replace("=", "+3D"), "x400;/S+3Dbob/"),
    ("rfc822;", None),
    ("rfc822", None),
    (";bob@example.com", None),
    ("rf c;bob@example.com", None),
    ("rfc822;a+0D+0AData@example.com", None),
    ("rfc822;b\xf6b@example.com", None),
    ("rfc822;" + "x" * 493, "rfc822;" + "x" * 493),
    ("rfc822;" + "x" * 494, None),
    (r"utf-8;b\x{F6}b@example.com", r"utf-8;b\x{F6}b@example.com"),
    ("utf-8;b\xf6b@example.com", "utf-8;b\xf6b@example.com"),  # where MAIL said SMTPUTF8
    (r"utf-8;\x{D}\x{A}", None),
    (r"utf-8;\x{0D}@example.com", None),
    (r"utf-8;\x{D800}@example.com", None),
    (r"utf-8;\x{110000}@example.com", None),
    (r"utf-8;\x{0000041}@example.com", None),
    ("utf-8;a+2Bb@example.com", None),
    (r"utf-8;a\b@example.com", None),
    ("utf-8;", None),
]
TABLES = [(name, *row) for name, rows in (("RET", RET), ("ENVID", ENVID), ("NOTIFY", NOTIFY)) for row in rows]


@pytest.mark.parametrize("name, value, kept", TABLES)
def test_parameter(name: str, value: str, kept: str | None) -> None:
    assert bool(re.fullmatch(smtprelay.PARAMETERS[name][1], value)) == (kept is not None)


@pytest.mark.parametrize("value, kept", ORCPT)
def test_original_recipient(value: str, kept: str | None) -> None:
    assert bool(smtprelay.original_recipient(value, True)) == (kept is not None)


def test_orcpt_is_raw_utf8_only_after_smtputf8(holding: Any) -> None:
    assert smtprelay.original_recipient("utf-8;b\xf6b@ex\xe4mple.com", True)
    assert not smtprelay.original_recipient("utf-8;b\udcc3b@example.com", True)
    assert not smtprelay.original_recipient("utf-8;" + "\xe9" * 248, True)
    with hello(holding) as client:
        for smtputf8, want in (("", "553 5.6.7"), (" SMTPUTF8", "250")):
            client.ask(f"MAIL FROM:<a@b.test>{smtputf8}", "250")
            client.ask("RCPT TO:<b@c.test> ORCPT=utf-8;b\xf6b@c.test", want)
            client.ask("RCPT TO:<b@c.test> ORCPT=utf-8;b+F6b@c.test", "501 5.5.4")
            client.ask("RSET", "250")


UNITEXT = [
    ("bob", "bob", "bob"), ("b\xf6b", "b\xf6b", r"b\x{F6}b"),
    ("a+b=c d", r"a\x{2B}b\x{3D}c\x{20}d", r"a\x{2B}b\x{3D}c\x{20}d"),
    ("a\\x{41}", r"a\x{5C}x{41}", r"a\x{5C}x{41}"),
    ("\U0001f4eb\u200c", "\U0001f4eb\\x{200C}", r"\x{1F4EB}\x{200C}"),
]  # fmt: skip


@pytest.mark.parametrize("text, wide, narrow", UNITEXT)
def test_unitext_there_and_back(text: str, wide: str, narrow: str) -> None:
    special = smtprelay.UNITEXT_SPECIAL
    assert smtprelay.encode_unitext(text, special, utf8=True) == wide
    assert smtprelay.encode_unitext(text, special) == narrow
    assert smtprelay.decode_xtext(wide, True) == smtprelay.decode_xtext(narrow, True) == text


def test_report_addresses() -> None:
    assert smtprelay.original_recipient("", False) == ""
    assert smtprelay.original_recipient("rfc822;a b", True) == ""
    assert smtprelay.original_recipient("rfc822;a+2Bb@x.test", False) == "rfc822; a+b@x.test"
    assert smtprelay.original_recipient("utf-8;\xf6@x.test", False) == r"utf-8; \x{F6}@x.test"
    assert smtprelay.original_recipient("utf-8;\xf6@x.test", True) == "utf-8; \xf6@x.test"
    assert smtprelay.final_recipient('"a b"@x.test', True) == 'rfc822; "a b"@x.test'
    assert smtprelay.final_recipient("\xf6+1@x.test", False) == r"utf-8; \x{F6}\x{2B}1@x.test"


def test_hostile_values_take_no_time() -> None:
    for value in ("+2B" * 300_000, "\\x{" * 300_000, "FAILURE," * 100_000):
        assert not any(re.fullmatch(smtprelay.PARAMETERS[name][1], value) for name in ("ENVID", "NOTIFY"))
        assert not smtprelay.original_recipient("utf-8;" + value, True)


@pytest.mark.parametrize("domain", ["-b.test", "b-.test", "b.-c", "b.c-", "b..c", "", "."])
def test_domains_that_do_not_parse(holding: Any, domain: str) -> None:
    with hello(holding) as client:
        client.ask(f"MAIL FROM:<a@{domain}>", "501 5.1.7")


@pytest.mark.parametrize("domain", ["b", "b-c.test", "b--c.test", "xn--bcher-kva.test", "1.test"])
def test_domains_that_do(holding: Any, domain: str) -> None:
    with hello(holding) as client:
        client.ask(f"MAIL FROM:<a@{domain}>", "250 2.1.0")


def test_an_address_that_is_not_utf_8_is_refused_in_our_own_words(holding: Any) -> None:
    with hello(holding) as client:
        client.send(b"MAIL FROM:<\xff@b.test> SMTPUTF8\r\n")
        assert client.reply() == "501 5.1.7 Bad sender address: not UTF-8"


ADDRESS_LISTS = [  # (as it is written, (name, address) pairs)
    ('a@x <a@x>', [('a@x', 'a@x')]), ('a@x, b@x,', [('', 'a@x'), ('', 'b@x')]),
    ('a@x; b@x', [('', 'a@x'), ('', 'b@x')]), ('Jim (the 1st, of 2) <j@x>', [('Jim (the 1st, of 2)', 'j@x')]),
    ('Acme, Inc. <a@x>', [('Acme, Inc.', 'a@x')]), ('MyApp [x] <a@x>', [('MyApp [x]', 'a@x')]),
    ('bob@e (Bob, the builder), eve@e', [('Bob, the builder', 'bob@e'), ('', 'eve@e')]),
    ('root, Bob <b@x>', [('', 'root'), ('Bob', 'b@x')]),
    ('Doe, John <j@x>, x@y', [('Doe, John', 'j@x'), ('', 'x@y')]), ('Postmaster', [('', 'Postmaster')]),
    ('Friends: a@x, Bob <b@x>; c@x', [('', 'a@x'), ('Bob', 'b@x'), ('', 'c@x')]),
    ('undisclosed-recipients:;', []), ('undisclosed-recipients:', []), ('undisclosed recipients', []),
    ('"Doe, John" <j@x>', [('Doe, John', 'j@x')]), ('"john doe"@x', [('', '"john doe"@x')]),
    ('"Bob <b@x>, eve@x', [('Bob', 'b@x'), ('', 'eve@x')]),
    ('Bob (home <b@x>, eve@x', [('Bob home', 'b@x'), ('', 'eve@x')]),
    ('Bob <b@x, Eve <e@x>', [('Bob', 'b@x'), ('Eve', 'e@x')]), ('<b@x, c@x>', [('', 'b@x'), ('', 'c@x')]),
    ('<<a@x>>', [('', 'a@x')]), ('< a @ x >', [('', 'a@x')]), ('<@r,@s:a@x>', [('', 'a@x')]),
    ('<mailto:a@x>', [('', 'a@x')]), ('mailto:a@x', [('', 'a@x')]),
    ('Bob <b@x> Eve <e@x>', [('Bob', 'b@x'), ('Eve', 'e@x')]), ('a@x b@x', [('', 'a@x'), ('', 'b@x')]),
    ("'a@x' <a@x>", [("'a@x'", 'a@x')]), ("'a@x'", [('', 'a@x')]), ('<a@x> (Bob)', [('Bob', 'a@x')]),
    ('(Bob) <a@x>', [('Bob', 'a@x')]), ('a@x (Bob (junior))', [('Bob (junior)', 'a@x')]),
    ('Bob a@x', [('Bob', 'a@x')]), ("['a@x', 'b@x']", [('', 'a@x'), ('', 'b@x')]), ('[a@x]', [('', 'a@x')]),
    ('a@[IPv6:::1]', [('', 'a@[IPv6:::1]')]), ('a@[1.2.3.4], b@x', [('', 'a@[1.2.3.4]'), ('', 'b@x')]),
    ('Re: Foo <a@x>', [('Re: Foo', 'a@x')]),
    ('=?utf-8?q?Bob,_(Jr)?= <b@x>', [('=?utf-8?q?Bob,_(Jr)?=', 'b@x')]),
    ('=?utf-8?Q?Acme, Inc?= <a@x>', [('=?utf-8?Q?Acme, Inc?=', 'a@x')]), ('<>', []), (',,;,', []),
    ("O'Brien <o@x>", [("O'Brien", 'o@x')]), ('Dr. Who <d@x>', [('Dr. Who', 'd@x')]),
    ('a..b@x, .a@x', [('', 'a..b@x'), ('', '.a@x')]),
    ('jörg@x, Jörg <jörg@exämple>', [('', 'jörg@x'), ('Jörg', 'jörg@exämple')]),
    ('Doe\\, John <j@x>', [('Doe\\, John', 'j@x')]),
    ('a@x,b@x;c@x\r\n d@x', [('', 'a@x'), ('', 'b@x'), ('', 'c@x'), ('', 'd@x')]),
    ('"a\\"b" <a@x>', [('a"b', 'a@x')]), ('@x, a@, b@x', [('', 'b@x')]),
    ('root,daemon', [('', 'root'), ('', 'daemon')]), ('Bob@home <b@x>', [('Bob@home', 'b@x')]),
    ('A, B, C Ltd. <a@x>, B <b@x>', [('A, B, C Ltd.', 'a@x'), ('B', 'b@x')]),
    ('Bob "The" B <b@x>', [('Bob The B', 'b@x')]), ('"Bob"<b@x>', [('Bob', 'b@x')]),
    ('a@x\x00,b@x', [('', 'a@x\x00'), ('', 'b@x')]), ('Bob <>, a@x', [('', 'a@x')]),
    ('MyApp [x, y] <a@x>', [('MyApp [x, y]', 'a@x')]), ('Foo "bar, Baz <b@x>', [('Foo bar, Baz', 'b@x')]),
    ('Web App <app@x>', [('Web App', 'app@x')]), ('Acme Corp, a@x', [('', 'a@x')]),
    ('Bob <b@x>, Acme, Inc. <i@x>; c@x', [('Bob', 'b@x'), ('Acme, Inc.', 'i@x'), ('', 'c@x')]),
    ('<root>', [('', 'root')]), ('a@x.', [('', 'a@x.')]),
    ('Tom & Jerry <t@x>, x@y', [('Tom & Jerry', 't@x'), ('', 'x@y')]),
    ('Sales: North <s@x>', [('Sales: North', 's@x')]), ('mailto:a@x, mailto:b@x', [('', 'a@x'), ('', 'b@x')]),
]  # fmt: skip


@pytest.mark.parametrize("text, pairs", ADDRESS_LISTS)
def test_address_lists(text: str, pairs: list[tuple[str, str]]) -> None:
    assert smtprelay.read_addresses(text) == pairs


@pytest.mark.parametrize(
    "text", ["(", "a:", "<", '"a\\', "a@b.example,", '<"', '"\\"', "[[@", "=?a?q?x", "(\\(", '<"<\\', "A,", "<a@x,>", ";:", "a@x ("]
)
def test_address_lists_take_linear_time(text: str) -> None:
    assert_linear(lambda n: smtprelay.read_addresses(text * n), 25_000)


def test_address_lists_of_any_signs_raise_nothing() -> None:
    rng = random.Random(3)
    for _ in range(5000):
        for _, address in smtprelay.read_addresses("".join(rng.choices('ab@<>,;:()[]"\\ .=?é', k=rng.randrange(40)))):
            assert address and address == address.strip()


# === SEALING =================================================================


SEAL_KEY, OTHER_KEY = bytes(range(32)), bytes(32)
CHUNK, FULL_CHUNK = smtprelay.CHUNK_SIZE, smtprelay.SEALED_CHUNK
ALTERED = "was cut or altered"


def sealer(key: bytes = SEAL_KEY) -> smtprelay.Sealer:
    return smtprelay.Sealer(key)


def noise(size: int, seed: int = 8) -> bytes:
    return random.Random(seed).getrandbits(8 * size + 8).to_bytes(size + 1, "big")[:size]


def chunks_of(data: bytes) -> list[bytes]:
    """Cut a sealed file into its head and chunks."""
    body = data[smtprelay.HEAD_SIZE :]
    return [data[: smtprelay.HEAD_SIZE]] + [body[at : at + FULL_CHUNK] for at in range(0, len(body), FULL_CHUNK)]


def refusal(data: bytes, name: str = "a.eml", key: bytes = SEAL_KEY) -> str:
    """Return why `data` cannot be read; fails if it can to the end."""
    with pytest.raises(smtprelay.SpoolError) as caught:
        sealer(key).unseal(data, name)
    return str(caught.value)


# The GCM specification's test cases 13 to 16, then NIST's gcmEncryptExtIV256: key, nonce, AAD,
# text, cipher text and tag.
_K = "feffe9928665731c6d6a8f9467308308" * 2
_P = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
_C = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
GCM_VECTORS = [
    ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    (
        "00" * 32,
        "00" * 12,
        "",
        "00" * 16,
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919",
    ),
    (_K, "cafebabefacedbaddecaf888", "", _P, _C + "b094dac5d93471bdec1a502270e3cc6c"),
    (
        _K,
        "cafebabefacedbaddecaf888",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        _P[:120],
        _C[:120] + "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
    (
        "b52c505a37d78eda5dd34f20c22540ea1b58963cf8e5bf8ffa85f9f2492505b4",
        "516c33929df5a3284ff463d7",
        "",
        "",
        "bdc1ac884d332457a1d2664f168c76f0",
    ),
    (
        "31bdadd96698c204aa9ce1448ea94ae1fb4a9a0b3c9d773b51bb1822666b8f22",
        "0d18e06c7c725ac9e362e1ce",
        "",
        "2db5168e932556f8089a0622981d017d",
        "fa4362189661d163fcd6a56d8bf0405ad636ac1bbedd5cc3ee727dc2ab4a9489",
    ),
    (
        "92e11dcdaa866f5ce790fd24501f92509aacf4cb8b1339d50c9c1240935dd08b",
        "ac93a1a6145299bde902f21a",
        "1e0889016f67601c8ebea4943bc23ad6",
        "2d71bcfa914e4ac045b2aa60955fad24",
        "8995ae2e6df3dbf96fac7b7137bae67feca5aa77d51d4a0a14d9c51e1da474ab",
    ),
]


@pytest.mark.parametrize(("key", "nonce", "aad", "text", "box"), GCM_VECTORS)
def test_gcm_is_the_standard_one(key: str, nonce: str, aad: str, text: str, box: str) -> None:
    lib = smtprelay.open_libcrypto()
    k, a, t, b = (bytes.fromhex(value) for value in (key, aad, text, box))
    n = int(nonce, 16)
    assert smtprelay.gcm(lib, k, a, n, t) == b
    assert smtprelay.gcm(lib, k, a, n, b[:-16], b[-16:]) == t
    for bad in (b[:-1] + bytes([b[-1] ^ 1]), bytes([b[0] ^ 1]) + b[1:]):
        assert smtprelay.gcm(lib, k, a, n, bad[:-16], bad[-16:]) is None
    assert smtprelay.gcm(lib, k, a + b"!", n, b[:-16], b[-16:]) is None


HKDF_VECTORS = [  # RFC 5869 A.1 and A.3, the first 32 octets
    (
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    ("", "", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
]


@pytest.mark.parametrize(("salt", "info", "derived"), HKDF_VECTORS)
def test_hkdf_is_the_standard_one(salt: str, info: str, derived: str) -> None:
    secret = smtprelay.hkdf(b"\x0b" * 22, bytes.fromhex(salt), bytes.fromhex(info))
    assert secret.hex() == derived


def test_the_format_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: b"\xaa" * size)
    data = sealer().seal(b"hello", "a.eml")
    assert data[:8] == b"\x8fSEALED\x01"
    assert data[16:48] == b"\xaa" * 32
    lib = smtprelay.open_libcrypto()
    key = smtprelay.hkdf(SEAL_KEY, data[16:48], b"smtprelay file")
    assert smtprelay.gcm(lib, key, data[:48] + b"a.eml", 1, data[48:-16], data[-16:]) == b"hello"
    assert hashlib.sha256(data).hexdigest()[:16] == "8d4e2aa732d3a583"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 200_000])
def test_what_was_sealed_comes_back(size: int) -> None:
    text, cut = noise(size), random.Random(size)
    writer = smtprelay.SealWriter(sealer(), "a.eml")
    data, at = b"", 0
    while at < size:
        step = cut.choice([1, 76, 4096, CHUNK, 3 * CHUNK])
        data += writer.update(text[at : at + step])
        at += step
    data += writer.update(b"", last=True)
    assert len(data) == 48 + size + 16 * max(1, -(-size // CHUNK))
    assert size < 32 or text[:32] not in data
    reader = sealer().reader(io.BytesIO(data), "a.eml")
    pieces = iter(lambda: reader.read(cut.choice([1, 100, 8192, 100_000])), b"")
    assert b"".join(pieces) == text
    for _ in range(20):
        at = reader.seek(cut.randrange(size + 1))
        assert reader.read(100) == text[at : at + 100] and reader.tell() == min(at + 100, size)
    assert reader.seek(0, os.SEEK_END) == size


def test_the_reader_is_as_good_as_an_open_file(tmp_path: Path) -> None:
    text = b"Subject: tea\r\n\r\n" + b"cup\r\n" * 30_000
    path = tmp_path / "a.eml"
    path.write_bytes(sealer().seal(text, "a.eml"))
    file = path.open("rb")
    with sealer().reader(file, "a.eml") as reader:
        assert reader.readline() == b"Subject: tea\r\n"
        assert b"".join(reader) == text[14:]
    assert file.closed


def test_no_nonce_serves_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    gcm, used = smtprelay.gcm, []

    def spy(lib: Any, key: bytes, aad: bytes, nonce: int, *rest: Any) -> bytes | None:
        used.append((key, nonce))
        return gcm(lib, key, aad, nonce, *rest)

    monkeypatch.setattr(smtprelay, "gcm", spy)
    for _ in range(3):
        sealer().seal(noise(3 * CHUNK), "a.eml")
    assert len(used) == len(set(used)) == 9


def test_every_flipped_bit_of_a_small_file_is_noticed() -> None:
    data = sealer().seal(b"hello", "a.eml")
    for bit in range(8 * 8, 8 * len(data)):  # one in the magic makes it a plain file, and no message
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        assert ("another key" if bit < 16 * 8 else ALTERED) in refusal(bytes(bad))


@pytest.mark.parametrize("size", [0, 5, 3 * CHUNK, 2 * CHUNK + 9])
def test_a_cut_is_noticed_on_opening(size: int) -> None:
    data = sealer().seal(noise(size), "a.eml")
    edges = {48 + n * FULL_CHUNK + d for n in range(4) for d in (-1, 0, 1, 15, 16, 17)}
    for cut in {*range(1, 60), len(data) - 1, len(data) - 16, *edges}:
        if cut < len(data):
            with pytest.raises(smtprelay.SpoolError, match=ALTERED):
                sealer().reader(io.BytesIO(data[:cut]), "a.eml")


def test_chunks_keep_their_order_and_number() -> None:
    text = noise(3 * CHUNK + 9)
    head, a, b, c, d = chunks_of(sealer().seal(text, "a.eml"))
    other = chunks_of(sealer().seal(text, "a.eml"))
    for wrong in (
        [b, a, c, d],
        [a, a, b, c, d],
        [a, c, d],
        [a, b, d],
        [d],
        [a, b, c],
        [a, b, c, d, d],
        [a, b, c, d, b"x"],
        [a, b, c, d, head, a, b, c, d],
        [a, other[2], c, d],  # from another sealing of the same text
    ):
        assert ALTERED in refusal(b"".join([head, *wrong]))
    assert ALTERED in refusal(b"".join([other[0], a, b, c, d]))
    assert sealer().unseal(b"".join([head, a, b, c, d]), "a.eml") == text


def test_files_and_sidecars_cannot_be_exchanged() -> None:
    one = sealer().seal(b"one", "1.eml")
    for name in ("2.eml", "1.json", "bad\udcff.eml"):
        assert f"{name} {ALTERED}, or is not the file of this name" in refusal(one, name)


def test_nothing_follows_an_error() -> None:
    parts = chunks_of(sealer().seal(noise(3 * CHUNK), "a.eml"))
    parts[2] = parts[2][:9] + bytes([parts[2][9] ^ 1]) + parts[2][10:]
    reader = sealer().reader(io.BytesIO(b"".join(parts)), "a.eml")
    assert reader.read(CHUNK) == noise(3 * CHUNK)[:CHUNK]
    for _ in range(2):
        with pytest.raises(smtprelay.SpoolError):
            reader.read(1)


def test_a_wrong_key_is_told_from_damage() -> None:
    data = sealer().seal(b"hello", "a.eml")
    assert "another key than SMTP_SPOOL_KEY" in refusal(data, key=OTHER_KEY)
    assert "SMTP_SPOOL_KEY is not set" in refusal(data, key=b"")


def test_a_plain_file_stays_readable() -> None:
    for text in (b"", b"X-Envelope-From: <>\r\n\r\n" + noise(CHUNK), b"{}", b"\x8f?"):
        for key in (SEAL_KEY, b""):
            assert sealer(key).unseal(text, "a.eml") == text
    assert sealer(b"").seal(b"hello", "a.eml") == b"hello"
    assert sealer(b"").seal_text("secret", "app") == "secret"


def test_a_secret_is_one_line_of_ascii() -> None:
    line = sealer().seal_text("pass wörd", "app/relay_password")
    assert line.startswith("sealed:") and line.isascii() and line.isprintable() and " " not in line
    assert sealer().unseal_text(line, "app/relay_password") == "pass wörd"
    assert sealer().unseal_text("plain", "app/relay_password") == "plain"
    with pytest.raises(smtprelay.SpoolError, match=ALTERED):
        sealer().unseal_text(line, "other/relay_password")
    for bad in ("?", "é", line[7:-1], line[7:20], line[7:30] + "?" + line[30:]):
        with pytest.raises(smtprelay.SpoolError):
            sealer().unseal_text("sealed:" + bad, "app/relay_password")


def settings_at(folder: Path, **more: str) -> smtprelay.Settings:
    return smtprelay.Settings.read({"SMTP_SPOOL": str(folder / "spool"), **more})


def spool_of(folder: Path, **more: str) -> smtprelay.Spool:
    s = settings_at(folder, **more)
    spool = smtprelay.Spool(s, smtprelay.open_log(s))
    spool.open()
    return spool


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep(spool: smtprelay.Spool, content: bytes, block: int = 100_000) -> str:
    """Put a message into a spool; return its stem."""
    draft = spool.draft(smtprelay.Envelope("a@example.com", "127.0.0.1", "me", recipients=["b@example.com"]))
    for at in range(0, len(content), block):
        draft.write(content[at : at + block])
    return draft.commit()


@pytest.mark.parametrize("size", [0, 100, 10 * 1024 * 1024])
def test_a_sealed_spool_shows_nothing_and_loses_nothing(tmp_path: Path, size: int) -> None:
    content = b"Subject: secret words\r\n\r\n" + noise(size)
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())
    stem = keep(spool, content)
    message = spool.load(stem)
    assert message.size == len(content)
    message.last_error = "secret reply"
    spool.save(message)
    spool.close()
    for name, data in listing(tmp_path / "spool").items():
        assert b"secret" not in data and b"example.com" not in data, name
    again = spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())
    assert again.load(stem).last_error == "secret reply"
    with again.content(stem) as file:
        assert file.read().endswith(b"0000\r\n" + content)
    again.remove(stem)
    again.close()


@pytest.mark.parametrize("key", ["", SEAL_KEY.hex()])
@pytest.mark.parametrize("size", [100, 600_000])
def test_a_message_cut_anywhere_is_not_taken_for_one(tmp_path: Path, key: str, size: int) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=key, SMTP_FSYNC="0")
    stem = keep(spool, b"x" * size)
    path = tmp_path / "spool" / f"{stem}.eml"
    data = path.read_bytes()
    for cut in [
        0,
        1,
        7,
        60,
        300,
        size // 2,
        48 + FULL_CHUNK,
        len(data) - 1,
        *random.Random(1).sample(range(len(data)), 20),
    ]:
        path.write_bytes(data[: min(cut, len(data) - 1)])
        with pytest.raises(smtprelay.SpoolError):
            spool.load(stem)
    path.write_bytes(data)
    assert spool.load(stem).size == size
    spool.close()


def test_a_torn_sealed_record_is_rebuilt(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())
    message = spool.load(keep(spool, b"x"))
    message.attempts = 3
    spool.save(message)
    path = tmp_path / "spool" / f"{message.stem}.json"
    data = path.read_bytes()
    for bad, attempts in ((data, 3), (b"", 0), (data[:-1], 0), (data[:10], 0), (message.to_json(), 3)):
        path.write_bytes(bad)
        assert spool.load(message.stem).attempts == attempts
    spool.close()


@pytest.mark.parametrize(
    ("key", "words"),
    [(OTHER_KEY.hex(), "sealed with another key"), ("", "SMTP_SPOOL_KEY is not set"), ("ab", "64 hexadecimal digits")],
)
def test_a_wrong_key_stops_the_program_and_touches_nothing(tmp_path: Path, key: str, words: str) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())
    keep(spool, b"x")
    spool.close()
    assert os.stat(tmp_path / "spool/key.check").st_mode & 0o777 == 0o600
    before = listing(tmp_path)
    env = {
        "SMTP_SPOOL": str(tmp_path / "spool"),
        "SMTP_SPOOL_KEY": key,
        "SMTP_PORT": "127.0.0.1:0",
        "SMTP_HEALTH_ADDR": "off",
    }
    for verb in "serve", "check":
        ran = run(verb, **env)
        assert ran.returncode == 78
        assert "SMTP_SPOOL_KEY" in ran.stderr and words in ran.stderr and (not key or key not in ran.stderr)
        assert listing(tmp_path) == before


@pytest.mark.parametrize("mark", [b"", b"?", b"\x8fSEAL", b"key.chec"])
def test_a_damaged_mark_is_an_error(tmp_path: Path, mark: bytes) -> None:
    spool_of(tmp_path).close()
    (tmp_path / "spool/key.check").write_bytes(mark)
    with pytest.raises(smtprelay.SettingsError, match=r"key\.check was (cut or )?altered"):
        spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())


def test_a_key_can_come_from_a_file_and_later(tmp_path: Path) -> None:
    spool = spool_of(tmp_path)
    old = keep(spool, b"plain")
    spool.close()
    (tmp_path / "key").write_text(SEAL_KEY.hex() + "\n")
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY_FILE=str(tmp_path / "key"))
    assert spool.load(old).size == 5
    assert (tmp_path / "spool" / f"{keep(spool, b'x')}.eml").read_bytes().startswith(smtprelay.MAGIC)
    spool.close()


def test_ssl_brings_its_own_libcrypto() -> None:
    import ssl

    lib = smtprelay.open_libcrypto()
    assert lib.OpenSSL_version_num() == ssl.OPENSSL_VERSION_NUMBER


def test_no_libcrypto_is_a_start_up_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    tried = mock.Mock(return_value=ctypes.CDLL("libc.so.6"))
    monkeypatch.setattr(ctypes, "PyDLL", tried)
    with pytest.raises(smtprelay.SettingsError, match="SMTP_SPOOL_KEY.*: expected .*libcrypto"):
        spool_of(tmp_path, SMTP_SPOOL_KEY=SEAL_KEY.hex())
    assert tried.call_count == 3


def test_ctypes_is_loaded_for_a_key_only() -> None:
    code = (
        "import sys, smtprelay\n"
        "smtprelay.Sealer().seal(b'', '')\n"
        "assert 'ctypes' not in sys.modules\n"
        "smtprelay.Sealer(bytes(32))\n"
        "assert 'ctypes' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(smtprelay.__file__).parent, check=True, timeout=30)


def test_one_sealer_serves_many_threads() -> None:
    shared, wrong = sealer(), []

    def work(number: int) -> None:
        for turn in range(20):
            text, name = noise(50_000 + turn, number), f"{number}.eml"
            if shared.unseal(shared.seal(text, name), name) != text:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_10_mib_stream_in_little_memory(tmp_path: Path) -> None:
    path, block, blocks = tmp_path / "a.eml", noise(CHUNK), 160
    writer = smtprelay.SealWriter(sealer(), "a.eml")
    tracemalloc.start()
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(writer.update(block))
        file.write(writer.update(b"", last=True))
    with sealer().reader(path.open("rb"), "a.eml") as reader:
        while reader.read(CHUNK):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size == 48 + blocks * FULL_CHUNK
    assert peak < 1 << 20


# === SPOOL ===================================================================


DEAF = {"SMTP_RELAY_HOST": "127.0.0.1:9", "SMTP_DELIVERY": "relay"}  # discard: nobody listens there


def test_names_modes_and_envelope_of_the_files(start: Callable[..., Any], tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    [queue_id] = said(start(), to=("Bob@Hop.test", "carol@hop.test"))
    digest = hashlib.sha256(b"bob@hop.test").hexdigest()[:16]
    [stored] = spool.files("*.eml")
    assert stored.name == f"{queue_id}_{digest}.eml"
    assert stored.parent.name in (time.strftime("%Y-%m-%d", time.gmtime(time.time() - late)) for late in (0, 5))
    wait_until(lambda: spool.files(f"{queue_id}_{digest}.json"))
    for path in [spool.root, *spool.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    head = stored.read_bytes().split(b"Received:")[0].decode()
    assert all(line.startswith("X-Envelope-") for line in head.splitlines())
    assert [word for word in ("ann@client.test", "Bob@Hop.test", "carol@hop.test") if f"<{word}>" not in head] == []


def test_record_has_the_fields_of_the_contract(start: Callable[..., Any], tmp_path: Path) -> None:
    said(start())
    record = Spool(tmp_path / "spool").known()
    words = (
        "v id status received_at client helo protocol user reverse_path size recipients attempts next_attempt_at "
        "last_error history finished_at"
    )
    assert set(record) >= set(words.split(" "))
    assert set(record["recipients"][0]) >= {"address", "status", "code", "reply", "host"}
    assert set(record["history"][0]) == {"at", "status", "detail"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", record["received_at"])
    told = record["size"], record["client"], record["helo"], record["status"]
    assert told == (len(MAIL), "127.0.0.1", "client.test", "held")


@pytest.mark.parametrize(
    ("script", "status", "suffix"),
    [
        ({}, "forwarded", ".forwarded.json"),
        ({"mail": "550 5.1.0 no"}, "failed", ".failed.json"),
        ({"mail": "450 4.2.0 wait"}, "retrying", ".json"),
    ],
)
def test_the_name_of_the_record_says_how_it_stands(
    start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop], script: Script, status: str, suffix: str
) -> None:
    spool, next_hop = Spool(tmp_path / "spool"), hop(script=script)
    said(start(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", SMTP_BOUNCE="0", **next_hop.settings()))
    record = spool.await_status(status)
    names = [path.name.partition(".")[2] for path in [*spool.files("*.json"), *spool.files("*.eml")]]
    assert sorted(names) == sorted([suffix[1:], "eml"])
    assert record["history"][-1]["status"] == status
    assert bool(record["finished_at"]) == (suffix != ".json")
    assert bool(record["next_attempt_at"]) == (status == "retrying")


def test_a_second_process_is_told_who_has_the_spool(program: Callable[..., Program]) -> None:
    first = program()
    done = run(**first.env)
    assert done.returncode == 75
    assert str(first.process.pid) in done.stderr + done.stdout


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


STRANGE = {
    "an .eml that is cut short": cut_short,
    "an empty .eml": lambda path: path.write_bytes(b""),
    "an .eml that is not ours": lambda path: path.write_bytes(b"From: x\r\n\r\n" * 100),
    "a symbolic link": linked,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": piped,
}


def test_what_does_not_parse_is_set_aside(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    relay, next_hop = program(**DEAF), hop()
    *bad, good = said(relay, *[MAIL] * (len(STRANGE) + 1))
    relay.stop(signal.SIGKILL)
    for sidecar in relay.spool.files("*.json"):
        sidecar.unlink()
    for queue_id, spoil in zip(bad, STRANGE.values()):
        [path] = relay.spool.files(f"{queue_id}*.eml")
        spoil(path)
    relay.start(**next_hop.settings())
    relay.spool.await_status("forwarded", good)
    for name, queue_id in zip(STRANGE, bad):
        wait_until(lambda: list((relay.spool.root / "bad").rglob(f"*{queue_id}*")))  # noqa: B023
        assert queue_id in relay.log(), name
    assert len(next_hop.messages) == 1


def test_foreign_names_are_set_aside(program: Callable[..., Program]) -> None:
    relay = program()
    relay.stop()
    places = ("2026-11-20/notes.txt", "2026-11-20/x_y.eml", "2026-99-99/a.eml")
    for place in places:
        path = relay.spool.root / place
        path.parent.mkdir(exist_ok=True)
        path.write_text(place)
    relay.start()
    bad = relay.spool.root / "bad"
    wait_until(lambda: {p.read_text() for p in bad.rglob("*") if p.is_file()} == {*places})
    said(relay)


@pytest.mark.parametrize("verb", ["serve", "check", "queue", "retry all", "remove 0", "show 0"])
def test_a_directory_that_is_no_spool_is_refused_and_left_alone(tmp_path: Path, verb: str) -> None:
    things = {tmp_path / ".env": "SECRET=1", tmp_path / ".git" / "HEAD": "ref", tmp_path / "bad" / "code.py": "pass"}
    for path, text in things.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    done = run(*verb.split(), SMTP_SPOOL=str(tmp_path), SMTP_PORT="0", SMTP_HEALTH_ADDR="off")
    assert (done.returncode, "SMTP_SPOOL" in done.stderr, ".env, .git" in done.stderr) == (78, True, True), done
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == things


def test_days_that_hold_what_is_not_ours_make_no_spool(tmp_path: Path) -> None:
    picture = tmp_path / "2024-05-01" / "cat.jpg"
    picture.parent.mkdir()
    picture.write_bytes(b"miaow")
    done = run("check", SMTP_SPOOL=str(tmp_path))
    assert (done.returncode, "2024-05-01" in done.stderr, picture.exists()) == (78, True, True), done
    picture.rename(picture.with_name(f"{'0' * 16}_{'0' * 16}.eml"))  # as sendmail leaves it before the first start
    (tmp_path / ".arrived").touch()
    (tmp_path / "lost+found").mkdir()
    assert run("check", SMTP_SPOOL=str(tmp_path)).returncode == 0


def test_a_mount_point_and_notes_beside_the_days_are_left_alone(program: Callable[..., Program]) -> None:
    relay = program()
    relay.stop()
    for name in ("lost+found", "notes"):
        (relay.spool.root / name).mkdir()
    relay.start()
    [queue_id] = said(relay)
    relay.spool.known(queue_id)
    assert {p.name for p in relay.spool.root.iterdir()} >= {"lost+found", "notes"}


def test_what_is_owed_is_delivered_after_a_kill(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    relay, next_hop = program(**DEAF), hop()
    content = b"X-Envelope-To: <evil@x.test>\r\n\r\n.\r\n\x00\xff\r\n"
    ids = said(relay, *[content] * 4, to=("bob@hop.test", '"carol c"@hop.test'))
    wait_until(lambda: len(relay.spool.files("*.json")) == 4)
    relay.stop(signal.SIGKILL)
    _, removed, torn, garbage = sorted(relay.spool.files("*.json"))
    removed.unlink()
    torn.write_bytes(torn.read_bytes()[:50])
    garbage.write_bytes(b'{"v": 1, "recipients": 7}')
    relay.start(**next_hop.settings())
    for queue_id in ids:
        relay.spool.await_status("forwarded", queue_id)
    assert next_hop.delivered() == {"bob@hop.test": 4, '"carol c"@hop.test': 4}
    for message in next_hop.messages:
        assert message.content.endswith(b"\r\n" + content)
        assert message.content.startswith(b"Received: from client.test")


def test_a_recipient_that_was_served_is_not_served_again(
    program: Callable[..., Program], hop: Callable[..., FakeHop]
) -> None:
    next_hop = hop(script={"rcpt carol@hop.test": "450 4.2.1 busy"})
    relay = program(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", **next_hop.settings())
    said(relay, to=("bob@hop.test", "carol@hop.test"))
    due = relay.spool.await_status("retrying")["next_attempt_at"]
    relay.stop(signal.SIGKILL)
    next_hop.script.clear()
    relay.start()
    assert relay.spool.known()["next_attempt_at"] == due
    with hello(relay) as client:
        client.ask("NOOP")
    assert next_hop.delivered() == {"bob@hop.test": 1}
    relay.process.send_signal(signal.SIGUSR1)
    relay.spool.await_status("forwarded")
    assert next_hop.delivered() == {"bob@hop.test": 1, "carol@hop.test": 1}


def test_held_mail_stays_held_over_a_restart(program: Callable[..., Program]) -> None:
    relay = program()
    said(relay)
    relay.stop(signal.SIGKILL)
    relay.start()
    assert relay.spool.await_status("held")["id"]


FULL = [
    ({"SMTP_SPOOL_MIN_FREE": "900000GiB"}, 0),
    ({"SMTP_QUEUE_SIZE": "2", **DEAF}, 2),
    ({"SMTP_SPOOL_MAX_MESSAGES": "2", **DEAF}, 2),
    ({"SMTP_SPOOL_MAX_SIZE": "10K", **DEAF}, 2),
]


@pytest.mark.parametrize("storage", ["file", "memory"])
@pytest.mark.parametrize(("settings", "fit"), FULL)
def test_a_full_spool_says_452(start: Callable[..., Any], settings: dict[str, str], fit: int, storage: str) -> None:
    if storage == "memory" and "SMTP_SPOOL_MIN_FREE" in settings:
        return
    relay = start(SMTP_STORAGE=storage, **settings)
    with hello(relay) as client:
        for _ in range(fit):
            assert client.mail(b"x" * 4000 + b"\r\n").startswith("250")
        relay.delivering.catch_up()  # what is on its way to the other half is not counted
        answer = client.ask("MAIL FROM:<ann@client.test> SIZE=5000")
        if answer.startswith("250"):
            client.ask("RCPT TO:<bob@hop.test>")
            answer = client.ask("DATA")
        if answer.startswith("354"):
            client.send(b"x" * 4000 + b"\r\n.\r\n")
            answer = client.reply()
        assert answer.startswith("452 4.3.1")
        client.ask("NOOP", "250")


@pytest.mark.parametrize(
    ("settings", "left"), [({"SMTP_SPOOL_MAX_MESSAGES": "2"}, 2), ({"SMTP_SPOOL_MAX_SIZE": "10K"}, 2)]
)
def test_the_oldest_held_message_makes_room(
    start: Callable[..., Any], tmp_path: Path, settings: dict[str, str], left: int
) -> None:
    spool = Spool(tmp_path / "spool")
    ids = said(start(**settings), *[b"x" * 4000 + b"\r\n"] * 4)
    wait_until(lambda: [path.name.partition("_")[0] for path in spool.files("*.eml")] == ids[-left:])


def test_finished_messages_go_when_their_time_is_over(
    program: Callable[..., Program], hop: Callable[..., FakeHop]
) -> None:
    relay = program(**hop().settings())
    said(relay)
    relay.spool.await_status("forwarded")
    relay.stop()
    [record] = relay.spool.files("*.json")
    record.write_text(record.read_text().replace(time.strftime("%Y-", time.gmtime()), "2020-"))
    for path in relay.spool.files("*"):
        os.utime(path, (1577836800, 1577836800))
    (relay.spool.root / record.parent.name).rename(relay.spool.root / "2020-01-01")
    relay.start()
    wait_until(lambda: relay.spool.files("*") == [])


def test_memory_leaves_nothing_on_disk(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"end": ["451 4.3.0 once"]})
    said(start(SMTP_STORAGE="memory", **next_hop.settings()))
    wait_until(lambda: next_hop.messages)
    assert next_hop.messages[0].content.endswith(MAIL)
    assert list(tmp_path.iterdir()) == []


def test_a_finished_record_counts_more_than_one_left_over(start: Any) -> None:
    relay = start()
    spool = relay.delivering.spool
    stem = spooled_in_review(spool)
    message = spool.load(stem)
    spool.save_first(message)
    message.status = smtprelay.Status.FORWARDED
    spool.save(message)
    Path(spool.path(stem + ".json")).write_text(json.dumps({**json.loads(message.to_json()), "status": "held"}))
    assert spool.load(stem).status is smtprelay.Status.FORWARDED


def test_another_writer_of_the_spool_is_left_alone(start: Any) -> None:
    relay = start()
    d = relay.delivering
    wait_until(lambda: not d.spool.tidying)
    other = smtprelay.Spool(relay.settings, d.log)  # as sendmail does when the relay is busy
    draft = other.draft(smtprelay.Envelope("", "local", "x", "ESMTP", "", (), ["bob@hop.test"]))
    draft.write(b"x" * 300000)
    d.find()
    draft.commit()
    d.find()
    assert draft.stem in [stem for stem, _ in d.spool.names()]


def test_a_hundred_thousand_names_take_little_memory() -> None:
    tracemalloc.start()
    s = smtprelay.Scheduler(settings(SMTP_RELAY_HOST="h"))
    stems = [f"2026-01-01/{i:016x}_{i:016x}" for i in range(20000)]
    before = tracemalloc.get_traced_memory()[0]
    s.put_all(stems, smtprelay.UNREAD)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert used / len(stems) < 120, used


def test_a_stray_that_cannot_be_removed_holds_up_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    spool = smtprelay.Spool(settings_at(tmp_path), smtprelay.Log(logging.getLogger("test")))
    spool.open()
    stem = spooled_in_review(spool)
    (Path(spool.root) / f"{stem[:11]}{'0' * 16}_{'0' * 16}.json").write_text("{}")
    refused = mock.Mock(side_effect=PermissionError(1, "not yours"))
    monkeypatch.setattr(spool.store, "remove", refused)
    assert [name for name, _ in spool.names()] == [stem]
    assert refused.called
    spool.close()


def test_a_record_is_never_missing_while_it_is_reopened(tmp_path: Path, monkeypatch: Any) -> None:
    spool = smtprelay.Spool(settings_at(tmp_path), smtprelay.Log(logging.getLogger("test")))
    spool.open()
    message = spool.load(spooled_in_review(spool))
    message.move(smtprelay.Status.FAILED)
    spool.save(message)
    message.move(smtprelay.Status.RETRYING)
    monkeypatch.setattr(spool.store, "rename", mock.Mock(side_effect=OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        spool.save(message)
    assert spool.load(message.stem).status is smtprelay.Status.FAILED
    spool.close()


def test_a_reader_never_finds_half_a_finished_record(tmp_path: Path, monkeypatch: Any) -> None:
    spool = smtprelay.Spool(settings_at(tmp_path), smtprelay.Log(logging.getLogger("test")))
    spool.open()
    message = spool.load(spooled_in_review(spool))
    message.attempts = 3
    spool.save(message)
    message.move(smtprelay.Status.FAILED)
    full = mock.Mock(side_effect=lambda fd, data: (os.write(fd, data[:40]), 1 / 0))  # as a reader may come upon it
    monkeypatch.setattr(smtprelay, "write_all", full)
    with pytest.raises(ZeroDivisionError):
        spool.save(message)
    assert full.called and spool.load(message.stem).attempts == 3
    spool.close()


def test_queue_ids_rise_and_each_process_makes_its_own(program: Callable[..., Program]) -> None:
    relay = program(SMTP_PROCESSES="2", **DEAF)
    ids: list[str] = []

    def both_have_made_some() -> bool:
        ids.extend(said(relay, MAIL, MAIL))
        return {id[13] for id in ids} == {"1", "2"}  # the number of the process

    wait_until(both_have_made_some)
    assert ids == sorted(ids)


# === ACCOUNTS ================================================================


needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
LOG = smtprelay.Log(logging.getLogger("a relay under test"))
API_KEY = "mp_live_4242"
HASH_END = ":" + "0" * 32 + ":" + "0" * 64


def cheap_hash(password: str, making: str = "scrypt:1024:8:1") -> str:
    making = f"{making}:{'ab' * 16}"
    return f"{making}:{smtprelay.derive(password, making)}"


USERS: dict[str, Any] = {
    "app": {"password": cheap_hash("grün"), "api_key": API_KEY, "allowed_domains": ["example.com"]},
    "old": {"password": "tanstaaftanstaaf"},
    "job": {"api_key": "mp_live_77"},
}


def users_file(home: Path, users: Any) -> str:
    path = home / "users.json"
    path.write_text(users if isinstance(users, str) else json.dumps(users))
    path.chmod(0o600)
    return str(path)


def b64(text: str | bytes) -> bytes:
    return base64.b64encode(text.encode() if isinstance(text, str) else text)


def plain(user: str, password: str) -> str:
    return "AUTH PLAIN " + b64(f"\0{user}\0{password}").decode()


class Visitor(Dialogue):
    """A client from any address: its connection is handed to the listener as if accepted from there."""

    def __init__(self, relay: Any, client: str) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(8)
        self.file = self.sock.makefile("rb")
        hold = relay.receiving.listeners[0].process_request
        threading.Thread(target=hold, args=(theirs, client), daemon=True).start()


def start_tls(client: Dialogue, pair: str) -> None:
    """Say STARTTLS, then shake hands."""
    client.ask("STARTTLS", "220")
    client.sock = smtprelay.client_context(pair).wrap_socket(client.sock, server_hostname="localhost")
    client.file = client.sock.makefile("rb")


@contextlib.contextmanager
def greeted(relay: Any, client: str = "", pair: str = "") -> Iterator[Dialogue]:
    """Open a dialogue past EHLO, from an address, under TLS if there is a certificate."""
    with Visitor(relay, client) if client else Dialogue((relay.host, relay.port)) as dialogue:
        dialogue.ask("EHLO client.test", "250")
        if pair:
            start_tls(dialogue, pair)
            dialogue.ask("EHLO client.test", "250")
        yield dialogue


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One self-signed certificate for relay.example, with its key, in one file."""
    need("openssl")
    return smtprelay.self_signed(str(tmp_path_factory.mktemp("pair")), "relay.example")[0]


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory, pair: str) -> Iterator[Any]:
    """One relay with accounts and TLS, shared by all tests that only talk to it."""
    home = tmp_path_factory.mktemp("doors")
    settings = {**QUICK, "SMTP_STORAGE": "memory", "SMTP_USERS_FILE": users_file(home, USERS), "SMTP_TLS_CERT": pair,
                "SMTP_TLS_KEY": pair, "SMTP_AUTH_FAILURES": "100000", "SMTP_MAX_ERRORS": "1000",
                "SMTP_ALLOW_NETWORKS": "0.0.0.0/0,::/0", "SMTP_SMTPS_PORT": "127.0.0.1:0"}  # fmt: skip
    with smtprelay.start(**settings) as relay:
        yield relay


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make new hashes cheap and note every one computed."""
    computed: list[str] = []
    derive = smtprelay.derive

    def noted(password: str, making: str) -> str:
        computed.append(making)
        return derive(password, making)

    monkeypatch.setattr(smtprelay, "NEW_HASH", "scrypt:1024:8:1")
    monkeypatch.setattr(smtprelay, "derive", noted)
    return computed


def store(home: Path, users: Any, **settings: Any) -> Any:
    return smtprelay.Accounts(smtprelay.Settings(users_file=users_file(home, users), **settings), LOG)


def test_derive_agrees_with_rfc_7914() -> None:
    made = smtprelay.derive("password", f"scrypt:1024:8:16:{b'NaCl'.hex()}")
    assert made == "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b373162"


def test_a_new_hash_may_stand_in_the_file_and_checks() -> None:
    stored = smtprelay.hash_password("grün")
    assert smtprelay.fits(smtprelay.ACCOUNT_KEYS["password"][0], stored) and stored.startswith("scrypt:16384:8:5:")
    assert smtprelay.check_password("grün", stored) and not smtprelay.check_password("grun", stored)


PASSWORDS = [
    ("scrypt:16384:8:5" + HASH_END, True),
    ("scrypt:16385:8:5" + HASH_END, False),  # not a power of two
    ("scrypt:1073741824:8:1" + HASH_END, False),  # a terabyte
    ("scrypt:16384:8:99" + HASH_END, False),
    ("scrypt:16384:8" + HASH_END, False),
    ("scrypt:16384:8:5:zz:00", False),
    ("scrypt:", False),
    ("in clear: with colons", True),
    ("new\nline", False),
    ("", False),
]


@pytest.mark.parametrize("value, good", PASSWORDS)
def test_password_kinds(value: str, good: bool) -> None:
    assert smtprelay.fits(smtprelay.ACCOUNT_KEYS["password"][0], value) is good


ACCOUNT_MISTAKES: list[tuple[Any, list[str]]] = [
    ("[]", ["expected a JSON object of accounts by name"]),
    ("{", ["expected JSON: "]),
    ("[" * 100_000, ["expected JSON: "]),
    ({"a": "x"}, ["account a: expected a JSON object"]),
    ({"": {"password": "x"}}, ["account '': expected a name of 1 to 255"]),
    ({"a\n": {"password": "x"}}, ["account 'a\\n': expected a name"]),
    ({"a": {}}, ["account a: expected a password or an api_key"]),
    ({"a": {"password": 5}}, ["account a: password: expected a scrypt hash"]),
    ({"a": {"api_key": "a b"}}, ["account a: api_key: expected printable ASCII"]),
    ({"a": {"password": "x", "qota": 1}}, ["account a: qota: no such key"]),
    ({"a": {"password": "x", "quota_daily": True}}, ["account a: quota_daily: expected a whole"]),
    ({"a": {"password": "x", "quota_daily": -1}}, ["account a: quota_daily: expected a whole"]),
    ({"a": {"password": "x", "allowed_domains": "e.x"}}, ["account a: allowed_domains: expected"]),
    ({"a": {"password": "x", "allowed_domains": ["@e.x"]}}, ["account a: allowed_domains: "]),
    ({"a": {"api_key": API_KEY}, "b": {"api_key": API_KEY}}, ["account b: name or api_key is account a's"]),
    ({"a": {"api_key": "b"}, "b": {"password": "x"}}, ["account b: name or api_key is account a's"]),
    ({"a": {"quota_daily": "5"}, "b": 1}, ["a: quota_daily: ", "a: expected a password", "b: exp"]),
]


@pytest.mark.parametrize("users, expected", ACCOUNT_MISTAKES)
def test_users_file_mistakes(tmp_path: Path, users: Any, expected: list[str]) -> None:
    with pytest.raises(smtprelay.SettingsError) as caught:
        store(tmp_path, users)
    assert len(caught.value.problems) == len(expected)
    for line, words in zip(caught.value.problems, expected):
        assert words in line and API_KEY not in line


def test_what_is_secret_is_in_no_repr() -> None:
    shown = [smtprelay.Account("a", "s3cret", "s3cret", relay_password="s3cret"),
             smtprelay.Settings(auth_password="s3cret", relay_password="s3cret")]  # fmt: skip
    assert "s3cret" not in repr(shown)
    assert ("name", *smtprelay.ACCOUNT_KEYS) == smtprelay.Account._fields


def test_account_of_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings: Any = {"auth_user": "env", "auth_password": "x"}
    both = store(tmp_path, {"a": {"password": "y", "api_key": "", "allowed_domains": []}}, **settings)
    assert both.get("a") == smtprelay.Account("a", "y")  # empty is not set
    assert [each.name for each in both.listed()] == ["a", "env"] and both.login("env", "x")[1]
    with pytest.raises(smtprelay.SettingsError, match="SMTP_AUTH_USER has the same name"):
        store(tmp_path, {"env": {"password": "y"}}, **settings)
    caplog.set_level(logging.INFO)
    nobody = smtprelay.Accounts(smtprelay.Settings(), LOG)
    nobody.file.current(anew=True)
    assert not nobody.configured and "reread" not in caplog.text  # there is no file


def test_what_should_not_stay_so_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = users_file(
        tmp_path, {"a": {"password": "s3cret"}, "b": {"api_key": "k"}, "c": {"password": cheap_hash("x")}}
    )
    smtprelay.Accounts(smtprelay.Settings(users_file=path), LOG)
    assert "passwords in clear: a (" in caplog.text and "owner" not in caplog.text
    os.chmod(path, 0o640)
    smtprelay.Accounts(smtprelay.Settings(users_file=path), LOG)
    assert "chmod 600" in caplog.text and "s3cret" not in caplog.text


def test_a_changed_users_file_is_reread_and_a_broken_one_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accounts = store(tmp_path, {"a": {"password": "x"}})
    users_file(tmp_path, {"other": {"password": "x"}})
    assert accounts.get("a") is None and accounts.get("other")
    users_file(tmp_path, '{"a": ')
    assert accounts.get("other") and "expected JSON" in accounts.file.trouble
    assert accounts.get("other")
    assert caplog.text.count("what was last good stays") == 1  # not at each look
    (tmp_path / "users.json").unlink()
    assert accounts.get("other") and "No such file" in accounts.file.trouble
    users_file(tmp_path, {"back": {"password": "xy"}})
    assert accounts.get("back") and not accounts.get("other") and accounts.file.trouble == ""


PLAINLY = smtprelay.Sealer()


def test_change_account(tmp_path: Path) -> None:
    path = str(tmp_path / "users.json")
    smtprelay.change_account(path, "a", {"password": "x", "quota_daily": 5}, PLAINLY)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    for name, change in ("a", {"quota_daily": None}), ("b", {"api_key": "k"}), ("never", None):
        smtprelay.change_account(path, name, change, PLAINLY)
    assert json.loads(Path(path).read_text()) == {"a": {"password": "x"}, "b": {"api_key": "k"}}
    before = Path(path).read_bytes()
    with pytest.raises(smtprelay.SettingsError, match="account a: quota_daily"):
        smtprelay.change_account(path, "a", {"quota_daily": "many"}, PLAINLY)
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["users.json"]  # no draft, no lock
    (tmp_path / "link").symlink_to(path)
    smtprelay.change_account(str(tmp_path / "link"), "b", None, PLAINLY)
    assert (tmp_path / "link").is_symlink() and list(json.loads(Path(path).read_text())) == ["a"]


def in_threads(n: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_changes_go_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "users.json")
    in_threads(5, lambda n: smtprelay.change_account(path, f"u{n}", {"password": "x"}, PLAINLY))
    assert len(json.loads(Path(path).read_text())) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    path = users_file(tmp_path, {})
    os.chown(path, 12345, 12346)
    os.chmod(path, 0o640)
    smtprelay.change_account(path, "a", {"password": "x"}, PLAINLY)
    now = os.stat(path)
    assert (now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode)) == (12345, 12346, 0o640)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_file_that_is_a_mount_is_rewritten_in_place(tmp_path: Path) -> None:
    path, source = tmp_path / "users.json", tmp_path / "elsewhere" / "users.json"
    source.parent.mkdir()
    source.write_text(json.dumps({"a": {"password": "x" * 500}}))
    path.touch()
    if subprocess.run(["mount", "--bind", source, path], capture_output=True).returncode:
        pytest.skip("no mount can be had here")
    try:
        smtprelay.change_account(str(path), "a", {"password": "y"}, PLAINLY)
        assert json.loads(source.read_text()) == {"a": {"password": "y"}}
        assert os.listdir(source.parent) == ["users.json"]
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_lock_file_left_over_blocks_nothing(tmp_path: Path) -> None:
    path = users_file(tmp_path, {})
    (tmp_path / "users.json.lock").touch()
    smtprelay.change_account(path, "a", {"password": "x"}, PLAINLY)
    assert "a" in json.loads(Path(path).read_text())


LOGINS = [
    ("app", "grün", "app"),
    ("app", API_KEY, "app"),
    (API_KEY, "grün", "app"),
    (API_KEY, API_KEY, "app"),
    ("old", "tanstaaftanstaaf", "old"),
    ("mp_live_77", "mp_live_77", "job"),
    ("app", "wrong", None),
    ("app", "", None),
    ("old", "", None),
    ("job", "", None),
    ("job", API_KEY, None),
    (API_KEY, "mp_live_77", None),
    ("mp_live_99999", "mp_live_99999", None),
    ("APP", "grün", None),
    ("nobody", "grün", None),
    ("", "", None),
    ("app\0", "grün", None),
    ("\udcff", "\udcff", None),
]


def test_logins_and_the_work_that_each_costs(tmp_path: Path, hashed: list[str]) -> None:
    accounts = store(tmp_path, USERS)
    for user, password, name in LOGINS:
        hashed.clear()
        account, good = accounts.login(user, password)
        assert (account.name if good else None) == name, user
        assert not {API_KEY, "mp_live_99999"} & {account.name} and account.name.isprintable()
        assert len(hashed) == 1 if name is None else len(hashed) <= 1
        assert all(making.startswith("scrypt:1024:8:1:") for making in hashed)


def test_a_login_is_remembered_until_the_file_changes(tmp_path: Path, hashed: list[str]) -> None:
    accounts = store(tmp_path, USERS)
    for tries in range(3):
        assert accounts.login("app", "grün")[1] and len(hashed) == 1, tries
    assert not accounts.login("app", "gru\0n")[1]
    users_file(tmp_path, {"app": {"password": cheap_hash("new")}})
    assert not accounts.login("app", "grün")[1] and accounts.login("app", "new")[1]


def test_logins_that_cannot_be_checked_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = store(tmp_path, USERS)
    monkeypatch.setattr(smtprelay, "TURN_PATIENCE", 0.02)
    for _ in range(smtprelay.LOGINS_AT_ONCE):
        accounts._turns.acquire()
    assert sasl_talk(accounts, "PLAIN", b64("\0app\0grün"))[1] == smtprelay.ACCOUNTS_NOT_NOW
    for _ in range(smtprelay.LOGINS_AT_ONCE):
        accounts._turns.release()
    monkeypatch.setattr(smtprelay, "derive", lambda password, making: (_ for _ in ()).throw(MemoryError()))
    for _ in range(3):
        assert sasl_talk(accounts, "PLAIN", b64("\0app\0grün"))[1] == smtprelay.ACCOUNTS_NOT_NOW


def test_by_key(tmp_path: Path) -> None:
    accounts = store(tmp_path, USERS)
    assert accounts.by_key(API_KEY) == accounts.get("app")
    assert accounts.by_key("app") is None and accounts.by_key("") is None


PLAIN_ONLY: dict[str, Any] = {"a": {"password": "x"}}
AUTH_OFFERS: list[tuple[Any, Any, bool, list[str]]] = [
    (PLAIN_ONLY, {}, True, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    (PLAIN_ONLY, {}, False, ["CRAM-MD5"]),
    (PLAIN_ONLY, {"auth_insecure": True}, False, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    (PLAIN_ONLY, {"auth_methods": ("login",)}, True, ["LOGIN"]),
    ({**PLAIN_ONLY, "b": {"api_key": "k"}}, {}, True, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    ({**PLAIN_ONLY, "b": {"password": cheap_hash("x")}}, {}, True, ["PLAIN", "LOGIN"]),
    ({"a": {"password": cheap_hash("x")}}, {}, False, []),
]


@pytest.mark.parametrize("users, settings, secure, expected", AUTH_OFFERS)
def test_offers(tmp_path: Path, users: Any, settings: Any, secure: bool, expected: list[str]) -> None:
    assert store(tmp_path, users, **settings).offers(secure) == expected


# -- SASL --


def sasl_talk(accounts: Any, mechanism: str, *lines: bytes | None) -> Any:
    """Run an exchange: the first line is the initial response or None; returns 334s, and the account or the refusal."""
    challenges: list[str] = []
    answers = iter(lines[1:])

    def ask(challenge: str) -> bytes:
        challenges.append(challenge)
        line = next(answers)
        assert line is not None
        return line

    try:
        account, good = smtprelay.authenticate(accounts, mechanism, lines[0], ask)
        return challenges, account if good else None
    except smtprelay.Refused as e:
        return challenges, e.reply


BASE64 = [(b"", ""), (b"YQ==", "a"), (b"YWJj", "abc"), *((line, None) for line in (
    b"=", b"==", b"====", b"YQ", b"YQ=", b"Y Q==", b"YQ==YQ==", b"YQ==\n", b"\xff\xff\xff\xff", b"*"))]  # fmt: skip


@pytest.mark.parametrize("line, expected", BASE64)
def test_responses_are_strict_base64(line: bytes, expected: str | None) -> None:
    if expected is not None:
        assert smtprelay.response(line) == expected
        return
    with pytest.raises(smtprelay.Refused) as error:
        smtprelay.response(line)
    assert error.value.reply == (smtprelay.AUTH_CANCELLED if line == b"*" else smtprelay.AUTH_MALFORMED)


def test_cram_md5_is_that_of_rfc_2195() -> None:
    accounts = smtprelay.Accounts(smtprelay.Settings(auth_user="tim", auth_password="tanstaaftanstaaf"), LOG)
    challenge, digest = "<1896.697170952@postoffice.reston.mci.net>", "b913a602c7eda7a495b4e6e7334d3890"
    assert accounts.login_cram("tim", challenge, digest) == (smtprelay.Account("tim", "tanstaaftanstaaf"), True)


CRAMS = [
    ("old", "tanstaaftanstaaf", True),
    ("app", API_KEY, True),  # the hash cannot, the key can
    ("mp_live_77", "mp_live_77", True),
    ("app", "grün", False),
    ("old", "", False),
    ("job", "", False),
    ("nobody", "", False),
]


@pytest.mark.parametrize("user, secret, good", CRAMS)
def test_cram_md5(tmp_path: Path, user: str, secret: str, good: bool) -> None:
    accounts = store(tmp_path, USERS, hostname="relay.example")

    def answer(challenge: str) -> bytes:
        text = base64.b64decode(challenge)
        assert re.fullmatch(rb"<[0-9a-f]{32}@relay.example>", text)
        return b64(f"{user} {hmac.new(secret.encode(), text, 'md5').hexdigest()}")

    assert smtprelay.authenticate(accounts, "CRAM-MD5", None, answer)[1] is good


def test_cram_md5_challenges_differ(tmp_path: Path) -> None:
    accounts = store(tmp_path, USERS)
    assert len({sasl_talk(accounts, "CRAM-MD5", None, b"*")[0][0] for _ in range(5)}) == 5


def test_responses_of_random_octets_never_raise(tmp_path: Path, hashed: list[str]) -> None:
    accounts, source = store(tmp_path, USERS), random.Random(3)
    for _ in range(50):
        line = bytes(source.choice(b"AZ+/=*\0 \r\n\xff") for _ in range(source.randrange(12)))
        for mechanism in smtprelay.MECHANISMS:
            for lines in ((line, line, line), (None, line, line)):
                assert not isinstance(sasl_talk(accounts, mechanism, *lines)[1], smtprelay.Account)


# -- who may send as whom --

COM = ("example.com",)
SENDER_RULES: list[tuple[tuple[str, ...], str, bool]] = [
    ((), "", True),
    ((), "anyone@anywhere.example", True),
    (COM, "a@example.com", True),
    (COM, "a@EXAMPLE.Com", True),
    (("Example.COM",), "a@example.com", True),
    (COM, '"b@example.org"@example.com', True),
    (COM, '"a@example.com"@example.org', False),
    (COM, "", False),
    (COM, "postmaster", False),
    (COM, "a@sub.example.com", False),
    (COM, "a@badexample.com", False),
    (COM, "a@example.com.", False),
    (COM, "a@example.com.example.org", False),
    (COM, "a@[192.0.2.1]", False),
    (("*.example.com",), "a@sub.example.com", True),
    ((".example.com",), "a@x.sub.example.com", True),
    (("*.example.com",), "a@example.com", False),
    (("*.example.com",), "a@badexample.com", False),
    (("example.com", "example.org"), "a@example.org", True),
    (("bücher.example",), "a@xn--bcher-kva.example", True),
    (("xn--bcher-kva.example",), "a@BÜCHER.example", True),
    (("bücher.example",), "a@bu\u0308cher.example", True),  # the same in two code points
    (("strasse.example",), "a@straße.example", False),
    (COM, "a@xn--example-.com", False),
    (COM, "a@ex\u0430mple.com", False),  # a Cyrillic letter
    (COM, "a@xn--99999999999.com", False),
]


@pytest.mark.parametrize("domains, reverse_path, allowed", SENDER_RULES)
def test_may_send_as(domains: tuple[str, ...], reverse_path: str, allowed: bool) -> None:
    account = smtprelay.Account("a", "x", allowed_domains=domains)
    assert smtprelay.may_send_as(account, reverse_path) is allowed


def test_labels_of_random_letters_never_raise() -> None:
    source = random.Random(4)
    for _ in range(1000):
        word = "".join(source.choice("abz019-\xfc\ud800.") for _ in range(source.randrange(80)))
        assert isinstance(smtprelay.with_a_labels("xn--" + word), str)


# -- how much --

CLIENTS = [
    ("192.0.2.1", "192.0.2.1"),
    ("2001:db8::1", "2001:db8::/64"),
    ("2001:db8:0:0:ffff::", "2001:db8::/64"),
    ("local", "local"),
]


@pytest.mark.parametrize("address, key", CLIENTS)
def test_client_key(address: str, key: str) -> None:
    assert smtprelay.client_key(address) == key


def test_client_name() -> None:
    for host, name in (("192.0.2.1", "192.0.2.1"), ("::ffff:192.0.2.1", "192.0.2.1"), ("::ffff:c000:201", "192.0.2.1"),
                       ("fe80::1%eth0", "fe80::1"), ("::1", "::1")):  # fmt: skip
        assert smtprelay.client_name(socket.AF_INET6, (host, 1, 0, 0)) == name
    assert smtprelay.client_name(socket.AF_UNIX, "") == "local"


def test_relay_passwords_are_sealed_with_the_key_of_the_spool(tmp_path: Path) -> None:
    path, key = str(tmp_path / "users.json"), bytes(range(32))
    smtprelay.change_account(path, "app", {"password": "x", "relay_password": "hush"}, smtprelay.Sealer(key))
    assert "hush" not in Path(path).read_text() and "sealed:" in Path(path).read_text()
    log = smtprelay.Log(logging.getLogger("sealed"))
    found = {}
    for text in (key.hex(), "", "00" * 32):
        settings = smtprelay.Settings.read({"SMTP_USERS_FILE": path, "SMTP_SPOOL_KEY": text})
        try:
            account = smtprelay.Accounts(settings, log).get("app")
            found[text] = account.relay_password if account else "nobody"
        except smtprelay.SettingsError as e:
            found[text] = str(e)
    assert found[key.hex()] == "hush"
    assert "SMTP_SPOOL_KEY is not set" in found[""] and "another key" in found["00" * 32]


def test_bucket_fills_at_its_rate() -> None:
    clock = Ticker()
    buckets = smtprelay.Buckets(clock=clock)
    assert [buckets.take("a", 6, 3) for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b", 6, 3)
    clock.now += 9.9
    assert not buckets.take("a", 6, 3)
    clock.now += 0.1
    assert [buckets.take("a", 6, 3) for _ in range(2)] == [True, False]
    assert buckets.take("a", 6, 3, -1)
    assert [buckets.take("a", 6, 3) for _ in range(2)] == [True, False]
    clock.now += 3600
    assert [buckets.take("a", 6, 3) for _ in range(4)] == [True, True, True, False]
    clock.now -= 3600  # set back: no emptier than empty
    assert not buckets.take("a", 6, 3)
    clock.now += 10
    assert buckets.take("a", 6, 3)


def test_bucket_table_is_bounded() -> None:
    clock = Ticker()
    buckets = smtprelay.Buckets(size=100, clock=clock)
    for n in range(1000):
        clock.now += 0.001
        buckets.take(str(n), 60, 1)
        buckets.take("busy", 60, 1)  # touched all the time, so it never falls out
    assert len(buckets.full_at) == 100
    assert not buckets.take("busy", 60, 1) and not buckets.take("999", 60, 1) and buckets.take("0", 60, 1)


def test_quota_is_reserved_then_charged() -> None:
    quotas = smtprelay.Quotas("", LOG, Ticker(NOON))
    assert quotas.reserve("a", 2) and quotas.reserve("a", 2)
    assert not quotas.reserve("a", 2)  # two under way
    quotas.settle("a", accepted=False)
    assert quotas.reserve("a", 2)
    quotas.settle("a", accepted=True)
    quotas.settle("a", accepted=True)
    assert not quotas.reserve("a", 2) and quotas.reserve("b", 1)
    assert quotas.today("a") == {"received": 2} and quotas.today("c") == {}
    assert +quotas._reserved == {"b": 1}


def test_quotas_survive_a_restart_and_days_are_utc(tmp_path: Path) -> None:
    clock, home = Ticker(NOON), str(tmp_path)
    first = smtprelay.Quotas(home, LOG, clock)
    first.count("a", "received")
    first.count("", "sent")
    first.save()
    assert os.listdir(home) == ["2026-11-21.json"]
    assert stat.S_IMODE((tmp_path / "2026-11-21.json").stat().st_mode) == 0o600
    clock.now += 12 * 3600 - 1
    again = smtprelay.Quotas(home, LOG, clock)
    assert not again.reserve("a", 1) and again.today("a") == {"received": 1} and again.today("") == {"sent": 1}
    clock.now += 1
    assert again.reserve("a", 1)
    again.settle("a", accepted=True)
    assert again.days("a") == {"2026-11-21": {"received": 1}, "2026-11-22": {"received": 1}}
    assert again.days()["2026-11-21"] == {"received": 1, "sent": 1}
    clock.now += smtprelay.USAGE_DAYS * 86400
    again.save()
    assert list(again.days()) == ["2026-11-22"]


@pytest.mark.parametrize("gone, free", [(0, 0), (31, 1), (61, 2), (-9999, 0)])
def test_the_minute_survives_a_restart(tmp_path: Path, gone: float, free: int) -> None:
    clock, home = Ticker(NOON), str(tmp_path)
    first = smtprelay.Quotas(home, LOG, clock)
    assert [first.minutes.take("a", 2, 2) for _ in range(3)] == [True, True, False]
    first.count("a", "received")
    first.save()
    clock.now += gone
    again = smtprelay.Quotas(home, LOG, clock)
    assert [again.minutes.take("a", 2, 2) for _ in range(3)] == [True] * free + [False] * (3 - free)
    clock.now += 61  # even where the clock was set back, a minute is enough
    assert again.minutes.take("a", 2, 2) and list(again.days("a").values()) == [{"received": 1}]


def test_processes_see_each_other(tmp_path: Path) -> None:
    one, two = (smtprelay.Quotas(str(tmp_path), LOG, Ticker(NOON)) for _ in range(2))
    one.count("a", "received")
    one.save()
    two.save()
    assert not two.reserve("a", 1)
    two.count("a", "received")
    assert two.days("a") == {"2026-11-21": {"received": 2}}
    two.save()
    one.save()
    assert one.today("a") == two.today("a") == {"received": 2}


def test_no_count_is_lost_between_processes(tmp_path: Path) -> None:
    def work(_: int) -> None:
        quotas = smtprelay.Quotas(str(tmp_path), LOG, Ticker(NOON))
        for _ in range(20):
            quotas.count("a", "received")
            quotas.save()

    in_threads(4, work)
    assert smtprelay.Quotas(str(tmp_path), LOG, Ticker(NOON)).today("a") == {"received": 80}


def test_counts_outlive_a_full_disk(tmp_path: Path) -> None:
    home = str(tmp_path / "usage")
    quotas = smtprelay.Quotas(home, LOG, Ticker(NOON))
    quotas.count("a", "received")
    shutil.rmtree(home)
    with pytest.raises(OSError):
        quotas.save()
    os.mkdir(home)
    quotas.save()
    assert smtprelay.Quotas(home, LOG, Ticker(NOON)).today("a") == {"received": 1}


def test_a_disk_full_at_midnight_adds_no_day_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticker(NOON + 12 * 3600 - 1)
    quotas = smtprelay.Quotas(str(tmp_path), LOG, clock)
    quotas.count("a", "received")
    clock.now += 1
    quotas.count("a", "received")
    replace = smtprelay.replace_file

    def full_today(path: str, *rest: Any) -> None:
        if path.endswith("22.json"):
            raise OSError(errno.ENOSPC, "full")
        replace(path, *rest)

    monkeypatch.setattr(smtprelay, "replace_file", full_today)
    for _ in range(3):
        with pytest.raises(OSError):
            quotas.save()
        assert quotas.today("a") == {"received": 1} and not quotas.reserve("a", 1)
    monkeypatch.setattr(smtprelay, "replace_file", replace)
    quotas.save()
    assert quotas.days("a") == {"2026-11-21": {"received": 1}, "2026-11-22": {"received": 1}}


@pytest.mark.parametrize("content", ["", "{", '["a", 5]', '[["a", "sent", "x"]]', '[[1, "sent", 5]]', '[["a", "sent"]]', "5", "\xff"])
def test_broken_counts_are_logged_once(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "2026-11-21.json").write_text(content, "latin-1")
    quotas = smtprelay.Quotas(str(tmp_path), LOG, Ticker(NOON))
    quotas.save()
    assert quotas.today("a") == {} and caplog.text.count("counts_lost") == 1


def test_a_quota_holds_however_many_come_at_once() -> None:
    quotas = smtprelay.Quotas("", LOG, Ticker(NOON))
    granted: list[bool] = []

    def work(_: int) -> None:
        for _ in range(50):
            granted.append(quotas.reserve("a", 120))
            if granted[-1]:
                quotas.settle("a", accepted=True)

    in_threads(4, work)
    assert quotas.today("a")["received"] == 120


# === TLS =====================================================================


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> Any:
    """Shake hands over a socketpair; returns the client's protocol and compression, or its error."""
    left, right = socket.socketpair()
    left.settimeout(5)
    right.settimeout(5)

    def serve(_: int) -> None:
        with contextlib.suppress(OSError), server.wrap_socket(left, server_side=True) as tls:
            tls.sendall(b"220")

    thread = threading.Thread(target=serve, args=(0,))
    thread.start()
    try:
        with client.wrap_socket(right, server_hostname=name) as tls:
            assert tls.recv(3) == b"220"
            return tls.version(), tls.compression()
    except ssl.SSLError as error:
        return error
    finally:
        right.close()
        thread.join()
        left.close()


CERT_NAMES = [
    ("relay.example", True),
    ("localhost", True),
    ("127.0.0.1", True),
    ("::1", True),
    ("other.example", False),
]


@pytest.mark.parametrize("name, good", CERT_NAMES)
def test_the_self_signed_pair_is_good_for_its_names(pair: str, name: str, good: bool) -> None:
    strict = smtprelay.client_context(pair)
    strict.verify_flags |= ssl.VERIFY_X509_STRICT
    result = handshake(smtprelay.server_context(pair, pair), strict, name)
    assert result == ("TLSv1.3", None) if good else isinstance(result, ssl.SSLError)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_protocols_are_refused(pair: str) -> None:
    server = smtprelay.server_context(pair, pair)
    client = smtprelay.client_context(verify=False)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(server, client, "x")[0] == "TLSv1.2"
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    assert isinstance(handshake(server, client, "x"), ssl.SSLError)


@needs_openssl
def test_self_signed_is_kept_then_renewed(tmp_path: Path) -> None:
    def made(hostname: str, after_days: int) -> bytes:
        clock = Ticker(NOON + after_days * 86400)
        return Path(smtprelay.self_signed(str(tmp_path), hostname, clock)[0]).read_bytes()

    first = made("relay.example", 0)
    assert os.listdir(tmp_path) == ["self-signed.pem"]
    assert stat.S_IMODE((tmp_path / "self-signed.pem").stat().st_mode) == 0o600
    assert made("relay.example", 794) == first != made("relay.example", 795)
    assert b"other.example" in made("other.example", 795)
    (tmp_path / "self-signed.pem").write_bytes(b"\xff broken")
    assert b"BEGIN CERTIFICATE" in made("other.example", 795)


FIXED = "DNS:localhost, IP:127.0.0.1, IP:::1"
SUBJECTS = [("relay.example", f"DNS:relay.example, {FIXED}"), *((name, FIXED) for name in (
    "localhost", "[127.0.0.1]", "a,email:copy", "$ENV::HOME", "a\nb", "a\n"))]  # fmt: skip


@pytest.mark.parametrize("hostname, names", SUBJECTS)
def test_subject_names(hostname: str, names: str) -> None:
    assert smtprelay.subject_names(hostname) == names


def test_no_openssl_is_a_clear_error(tmp_path: Path) -> None:
    settings = {**QUICK, "SMTP_SPOOL": str(tmp_path / "spool"), "SMTP_TLS_SELF_SIGNED": "1", "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=settings, capture_output=True, text=True, timeout=20)
    assert done.returncode == 78 and "SMTP_TLS_SELF_SIGNED needs the openssl program" in done.stderr
    assert "Traceback" not in done.stderr


@needs_openssl
def test_pairs_that_cannot_be_used(tmp_path: Path, pair: str) -> None:
    locked, other, empty = (str(tmp_path / name) for name in ("locked", "other", "empty"))
    smtprelay.openssl("ec", "-aes256", "-passout", "pass:x", "-in", pair, "-out", locked)
    smtprelay.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", other)
    Path(empty).touch()
    table = [
        (pair, locked, "the key is encrypted"),
        (pair, other, "KEY_VALUES_MISMATCH"),
        (empty, pair, "one of them is not PEM"),
        (pair, "/none/key.pem", "No such file or directory: '/none/key.pem'"),
        (str(tmp_path), pair, "Is a directory"),
    ]
    for cert, key, words in table:
        with pytest.raises(smtprelay.SettingsError, match=re.escape(words)):
            smtprelay.server_context(cert, key)
    with pytest.raises(smtprelay.SettingsError, match="SMTP_RELAY_CA_FILE"):
        smtprelay.client_context(empty)


@needs_openssl
def test_a_changed_pair_is_reread(tmp_path: Path, pair: str, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "mine.pem"
    shutil.copy(pair, mine)
    tls = smtprelay.Watched("certificate", [str(mine)], lambda: smtprelay.server_context(str(mine), str(mine)), LOG)
    first = tls.current()
    assert tls.current() is first
    mine.write_text("broken")
    assert tls.current() is first and "one of them is not PEM" in tls.trouble
    assert tls.current() is first and caplog.text.count("what was last good stays") == 1
    mine.unlink()
    assert tls.current() is first and "No such file" in tls.trouble
    os.replace(smtprelay.self_signed(str(tmp_path), "relay.example")[0], mine)
    second = tls.current()
    assert second is not first and tls.trouble == ""
    assert handshake(second, smtprelay.client_context(str(mine)), "localhost")[0] == "TLSv1.3"


# === SCHEDULER ===============================================================


def test_attempts_are_counted_and_end(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"mail": "450 4.2.0 never"})
    said(start(SMTP_RETRY_MAX_ATTEMPTS="3", SMTP_BOUNCE="0", **next_hop.settings()))
    record = Spool(tmp_path / "spool").await_status("failed")
    assert (record["attempts"], sum(line.startswith("MAIL") for line in next_hop.commands)) == (3, 3)
    assert record["recipients"][0]["code"] == 450


def test_the_reason_is_that_of_who_is_still_owed_it(start: Any, tmp_path: Path, hop: Any) -> None:
    next_hop = hop(script={"rcpt no@hop.test": "550 5.1.1 who?", "rcpt busy@hop.test": "451 4.2.1 later"})
    relay = start(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", **next_hop.settings())
    with hello(relay) as client:
        client.mail(MAIL, "ann@client.test", "no@hop.test", "busy@hop.test")
    assert "451 4.2.1 later" in Spool(tmp_path / "spool").await_status("retrying")["last_error"]


def test_who_failed_is_reported_at_once_and_each_just_once(start: Any, tmp_path: Path, hop: Any) -> None:
    script = {"rcpt no@hop.test": "550 5.1.1 who?", "rcpt busy@hop.test": ["451 4.2.1 later", "550 5.2.1 closed"]}
    next_hop = hop(script=script)
    relay = start(SMTP_BOUNCE="1", SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", **next_hop.settings())
    with hello(relay) as client:
        reply = client.mail(MAIL, "ann@client.test", "no@hop.test", "busy@hop.test")
    wait_until(lambda: next_hop.delivered()["ann@client.test"] == 1)
    record = Spool(tmp_path / "spool").await_status("retrying", reply.split()[-1])
    assert [(r["status"], r["reported"]) for r in record["recipients"]] == [("failed", True), ("retrying", False)]
    relay.delivering.scheduler.flush()
    wait_until(lambda: next_hop.delivered()["ann@client.test"] == 2)
    Spool(tmp_path / "spool").await_status("failed", reply.split()[-1])
    came = [content for rcpts, content in next_hop.mails if "ann@client.test" in rcpts]
    reports = [email.message_from_bytes(content) for content in came]
    reached = [re.findall("Final-Recipient: rfc822; (.*)", str(report)) for report in reports]
    assert reached == [["no@hop.test"], ["busy@hop.test"]]
    assert len({report["Message-ID"] for report in reports}) == 2


def test_one_attempt_only_without_retry(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"end": "451 4.3.0 later"})
    said(start(SMTP_RETRY="0", **next_hop.settings()))
    assert Spool(tmp_path / "spool").await_status("failed")["attempts"] == 1
    assert len(next_hop.refused) == 1


def test_a_message_that_is_too_old_fails(start: Callable[..., Any], tmp_path: Path) -> None:
    said(start(SMTP_RETRY_MAX_AGE="0.3s", **DEAF))
    Spool(tmp_path / "spool").await_status("failed")


def test_an_unreachable_host_costs_no_attempt(
    start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]
) -> None:
    spool, next_hop = Spool(tmp_path / "spool"), hop(listen=False)
    said(start(SMTP_RETRY_MAX_ATTEMPTS="1", **next_hop.settings()), MAIL, MAIL, MAIL)
    wait_until(lambda: [record["status"] for record in spool.records()] == ["retrying"] * 3)
    assert {record["attempts"] for record in spool.records()} == {0}
    next_hop.listen()
    wait_until(lambda: len(next_hop.messages) == 3)
    assert wait_until(lambda: {record["status"] for record in spool.records()} == {"forwarded"})


def test_a_list_of_smart_hosts_is_tried_in_order(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    dead, sick, well = hop(listen=False), hop(script={"greeting": "421 4.3.2 closed"}), hop()
    said(start(SMTP_RELAY_HOST=",".join(f"127.0.0.1:{one.port}" for one in (dead, sick, well))))
    wait_until(lambda: well.messages)
    assert sick.connections >= 1


# -- the scheduler alone --


def stem_at(number: int) -> str:
    now = int(time.time() * 1e6) + number
    return f"{smtprelay.iso_time(now / 1e6)[:10]}/{now:013x}abc_0123456789abcdef"


def scheduler(clock: Ticker, **env: str) -> smtprelay.Scheduler:
    return smtprelay.Scheduler(smtprelay.Settings.read({"SMTP_RETRY_JITTER": "0", **env}), clock, random.Random(1))


def give_back(s: smtprelay.Scheduler, task: Any, delay: float = 0.0) -> None:
    """End an attempt after which the message waits in the same lane again."""
    s.put(task.stem, task.lane, delay)
    s.done(task.stem)


def test_dead_next_hops_leave_workers_to_others() -> None:
    clock = Ticker()
    s = scheduler(clock, SMTP_DELIVERY="mx")
    for i in range(200):
        s.put(stem_at(i), f"dead{i % 20}.test")
    failed = list(iter(lambda: s.take(False), None))
    assert len(failed) == 6  # of 8, before any has answered: two are kept back
    s.put(stem_at(999), "good.test")
    assert s.take(False) is None
    for t in failed:
        s.throttle(t.lane, "dead")
        give_back(s, t, 0.0)
    for _ in range(4):  # each dead lane has its turn, none a second one before good.test
        tasks = list(iter(lambda: s.take(False), None))
        assert sum(s.lanes[t.lane].steps > 0 for t in tasks) <= 4
        if "good.test" in [t.lane for t in tasks]:
            return
        for t in tasks:
            s.throttle(t.lane, "dead")
            give_back(s, t, 0.0)
        clock.now += 10
    raise AssertionError("good.test was starved")


def test_a_slow_lane_gets_half_and_a_quick_one_all_its_connections() -> None:
    clock = Ticker()
    s = scheduler(clock, SMTP_DELIVERY="mx", SMTP_RELAY_CONNECTIONS="8")
    for i in range(40):
        s.put(stem_at(i), "slow.test")
    s.put(stem_at(50), "other.test", 3600)
    first = s.take(False)
    assert first and s.take(False) is None  # a lane that has not answered yet gets one
    s.put(stem_at(60), "third.test")
    s.release("slow.test", False)
    clock.now += 2
    assert sorted(t.lane for t in iter(lambda: s.take(False), None)) == ["slow.test"] * 3 + ["third.test"]


def test_a_message_is_in_one_workers_hands() -> None:
    s = scheduler(Ticker(), SMTP_DELIVERY="mx")
    stem = stem_at(1)
    s.put(stem, "a.test")
    s.put(stem, "b.test")
    one = s.take(False)
    assert one and s.take(False) is None and len(s) == 1
    s.done(one.stem)
    two = s.take(False)
    assert two and two.lane == "b.test" and len(s) == 1
    s.done(two.stem)
    assert len(s) == 0 and not s.take(False) and s.lanes == {} and s.waiting == {}


def test_a_next_hop_that_answers_at_once_keeps_one_worker_busy_and_a_slower_one_more() -> None:
    clock = Ticker()
    s = scheduler(clock)
    for i in range(8):
        s.put(stem_at(i), "smarthost")
    for took in (0.002, 0.002, 0.05):
        task = s.take(False)
        assert task and s.take(False) is None
        s.release("smarthost", False)
        clock.now += took
        s.done(task.stem)
    assert len(list(iter(lambda: s.take(False), None))) == 4


def test_a_host_that_takes_no_more_connections_is_given_no_more_for_a_while() -> None:
    clock = Ticker()
    s = scheduler(clock)
    for i in range(9):
        s.put(stem_at(i), "smarthost")
    first = s.take(False)
    s.release("smarthost", False)
    clock.now += 0.1
    tasks: list[Any] = [first, s.take(False), s.take(False)]
    assert all(tasks) and s.crowd("smarthost") == 2 and s.crowd("smarthost") == 0
    give_back(s, tasks.pop(), 0.0)
    assert s.take(False) is None
    s.done(tasks.pop().stem)
    tasks.append(s.take(False))
    assert tasks[-1] and s.take(False) is None
    clock.now += 61
    assert len(list(iter(lambda: s.take(False), None))) == 2


def test_slow_and_dead_next_hops_leave_workers_to_one_that_is_not_known_yet() -> None:
    clock = Ticker()
    s = scheduler(clock, SMTP_DELIVERY="mx", SMTP_RELAY_CONNECTIONS="8")
    for i in range(40):
        s.put(stem_at(i), f"slow{i % 2}.test")
    for _ in range(2):
        task = s.take(False)
        assert task
        s.release(task.lane, False)
    clock.now += 300  # a reply may take that long
    assert len(list(iter(lambda: s.take(False), None))) == 2  # half of all workers
    s.put(stem_at(99), "new.test")
    assert s.take(False)


def test_what_is_too_old_is_first_when_a_throttled_lane_is_tried_again() -> None:
    clock = Ticker()
    s = scheduler(clock, SMTP_RETRY_MAX_AGE="1h")
    old = [stem_at(i - 7200_000_000) for i in range(5)]
    young = [stem_at(i) for i in range(2)]
    for stem in [*young, *old]:
        s.put(stem, "smarthost")
    task = s.take(False)
    assert task and task.stem == young[0]
    s.throttle("smarthost", "dead")
    give_back(s, task)
    clock.now += 3600
    for stem in [*old, *young[::-1]]:  # that one is tried last that was tried before
        task = s.take(False)
        assert task and task.stem == stem
        s.done(task.stem)


def test_a_throttled_lane_whose_mail_is_all_in_hand_is_let_out_again() -> None:
    clock = Ticker()
    s = scheduler(clock, SMTP_RELAY_CONNECTIONS="2")
    for i in range(2):
        s.put(stem_at(i), "smarthost")
    slow = s.take(False)
    s.release("smarthost", False)
    assert s.take(False) is None  # it may answer at once
    clock.now += 0.1
    quick = s.take(False)
    assert slow and quick
    delay, _ = s.throttle("smarthost", "dead")
    s.done(quick.stem)  # which was removed meanwhile; the other one still waits for its answer
    assert s.take(False) is None
    clock.now += delay + 1
    assert s.take(False) is None
    give_back(s, slow, 0.0)
    assert s.take(False) == slow


def test_a_throttled_next_hop_can_be_tried_at_once() -> None:
    clock = Ticker()
    s = scheduler(clock)
    s.put(stem_at(1), "smarthost")
    task = s.take(False)
    assert task
    s.throttle("smarthost", "dead")
    give_back(s, task, 0.0)
    assert s.take(False) is None
    s.probe(["smarthost"])
    assert s.take(False) == task
    s.throttle("smarthost", "dead")
    give_back(s, task, 0.0)
    assert s.take(False) is None


@pytest.mark.parametrize("seed", range(40))
def test_the_scheduler_forgets_no_message(seed: int) -> None:
    """Whatever happens, in any order, all that is owed is handed out once the next hops answer."""
    rng, clock = random.Random(seed), Ticker()
    s = scheduler(clock, SMTP_DELIVERY="mx", SMTP_WORKERS=str(rng.choice([1, 2, 8])), SMTP_RELAY_CONNECTIONS="2")
    lanes, owed, held = [f"{name}.test" for name in "abc"], collections.defaultdict[str, set[str]](set), []
    for number in range(300):
        choice, lane = rng.random(), rng.choice(lanes)
        if choice < 0.1:  # seldom: lanes are to run empty
            stem = stem_at(-rng.choice([0, 6 * 86400_000_000]) + number)  # some are too old
            s.put(stem, lane, rng.choice([0.0, 0.0, 5.0]))
            owed[stem].add(lane)
        elif choice < 0.55:
            held += [task] if (task := s.take(False)) else []
        elif choice < 0.75:
            clock.now += rng.choice([0.1, 3.0, 3.0, 100.0])
        elif choice < 0.76:
            s.flush()
        elif choice < 0.78 and owed:
            s.probe([lane])
        elif choice < 0.8 and owed and s.seize(stem := rng.choice([*owed])):
            if rng.random() < 0.5:  # removed
                del owed[stem]
                s.drop(stem)
                s.done(stem)
            else:
                owed[stem] = {lane}
                s.done(stem)
                s.put(stem, lane)
        elif held:
            finish_somehow(s, held.pop(rng.randrange(len(held))), rng, owed)
    for task in held:
        give_back(s, task, 0.0)
    clock.now += 7200  # past every back-off
    for _ in range(2000):
        if not (task := s.take(False)):
            break
        s.release(task.lane)
        s.done(task.stem)
        owed[task.stem].discard(task.lane)
        clock.now += 60
    assert {stem: names for stem, names in owed.items() if names} == {}
    assert len(s) == 0 and s.take(False) is None and not s.lanes


def finish_somehow(s: smtprelay.Scheduler, task: Any, rng: random.Random, owed: dict[str, set[str]]) -> None:
    """End an attempt in one of the ways it can end."""
    end = rng.random()
    if end < 0.6:
        delay, _ = s.throttle(task.lane, "dead")
        give_back(s, task, rng.choice([0.0, delay]))
    elif end < 0.7:
        s.release(task.lane)
        give_back(s, task, rng.choice([0.0, 1.0, 50.0]))
    else:
        s.release(task.lane, False)
        s.release(task.lane)
        owed[task.stem].discard(task.lane)
        s.done(task.stem)


def test_a_message_is_in_one_hand_at_a_time() -> None:
    s = smtprelay.Scheduler(settings(SMTP_RELAY_HOST="h"))
    s.put(STEM, "old")
    task = s.take(False)
    assert task and not s.seize(STEM)
    give_back(s, task, 5.0)
    assert s.seize(STEM) and s.active[STEM] == smtprelay.UNREAD and s.take(False) is None
    seized = smtprelay.Task(STEM, smtprelay.UNREAD)
    give_back(s, seized, 0.0)
    assert s.take(False) == seized and len(s) == 1


def test_a_lane_without_mail_is_forgotten_though_it_was_throttled() -> None:
    s = smtprelay.Scheduler(settings(SMTP_RELAY_HOST="h"))
    s.put(STEM, "dead")
    task = s.take(False)
    assert task
    s.throttle("dead", "no answer")
    give_back(s, task, 0.0)
    s.flush()
    task = s.take(False)
    assert task
    s.done(task.stem)
    assert s.take(False) is None and not s.lanes


# === RESOLVER ================================================================
#
# A scripted server on UDP and TCP answers from a zone, or by a function that may
# do anything wrong; its messages are built here, not with the code under test.
# The same questions then go to a real dnsmasq.

A, NS, CNAME, SOA, MX, AAAA = 1, 2, 5, 6, 15, 28
UDP, TCP = "udp", "tcp"
RA, TC, NXDOMAIN, SERVFAIL, DNS_REFUSED = 0x0080, 0x0200, 3, 2, 5


def dns_name(text: str) -> bytes:
    labels = [label.encode("latin-1") for label in text.split(".")] if text else []
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def dns_record(owner: str, kind: int, value: str, ttl: int = 60, family: int = 1) -> bytes:
    """A record from its zone file text."""
    if kind in (A, AAAA):
        data = socket.inet_pton(socket.AF_INET if kind == A else socket.AF_INET6, value)
    elif kind == MX:
        preference, _, host = value.partition(" ")
        data = struct.pack("!H", int(preference)) + dns_name(host)
    elif kind == SOA:
        data = dns_name("ns.test") + dns_name("root.test") + struct.pack("!5I", 1, 2, 3, 4, int(value))
    else:
        data = dns_name(value)
    return dns_name(owner) + struct.pack("!HHIH", kind, family, ttl, len(data)) + data


def dns_answer(query: bytes, *records: bytes, flags: int = RA, authority: int = 0) -> bytes:
    """An answer that echoes a query's id and question; the last `authority` records follow."""
    counts = struct.pack("!4H", 1, len(records) - authority, authority, 0)
    return query[:2] + struct.pack("!H", 0x8100 | flags) + counts + query[12:] + b"".join(records)


def dns_question(query: bytes) -> tuple[str, int]:
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode())
        at += 1 + query[at]
    return ".".join(labels), int.from_bytes(query[at + 1 : at + 3], "big")


DnsScript = Callable[[bytes, str], "list[bytes]"]  # query and transport, to datagrams or TCP octets


class FakeDns:
    """A DNS server on a free port of loopback. `asked` holds (name, type, transport)."""

    def __init__(self, script: DnsScript) -> None:
        self.script = script
        self.asked: list[tuple[str, int, str]] = []
        self.tcp, self.udp = self.bind()
        self.server = self.udp.getsockname()[:2]
        self.threads = [threading.Thread(target=serve, daemon=True) for serve in (self.serve_udp, self.serve_tcp)]
        for thread in self.threads:
            thread.start()

    def bind(self) -> tuple[socket.socket, socket.socket]:
        while True:
            tcp = socket.create_server(("127.0.0.1", 0))
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                udp.bind(tcp.getsockname())
                return tcp, udp
            except OSError:
                tcp.close()
                udp.close()

    def answers(self, query: bytes, transport: str) -> list[bytes]:
        self.asked.append((*dns_question(query), transport))
        return self.script(query, transport)

    def serve_udp(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                query, peer = self.udp.recvfrom(4096)
                if not query:
                    return
                for datagram in self.answers(query, UDP):
                    self.udp.sendto(datagram, peer)

    def serve_tcp(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self.tcp.accept()
                with peer, peer.makefile("rb") as stream, contextlib.suppress(OSError):
                    length = stream.read(2)
                    if not length:
                        return
                    for octets in self.answers(stream.read(int.from_bytes(length, "big")), TCP):
                        peer.sendall(octets)

    def __enter__(self) -> FakeDns:
        return self

    def __exit__(self, *_: object) -> None:
        """Ends both threads by an empty datagram and an empty connection."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", self.server)
        socket.create_connection(self.server).close()
        for thread in self.threads:
            thread.join(5)
        self.tcp.close()
        self.udp.close()


ZONE: dict[tuple[str, int], tuple[str, ...]] = {
    ("one.test", MX): ("10 mx.one.test",),
    ("mx.one.test", A): ("192.0.2.1", "192.0.2.2"),
    ("mx.one.test", AAAA): ("2001:db8::1",),
    ("order.test", MX): ("30 c.test", "10 a1.test", "20 b.test", "10 a2.test", "10 A3.TEST"),
    ("a1.test", A): ("192.0.2.11",),
    ("c.test", A): ("192.0.2.13",),
    ("twice.test", MX): ("20 a1.test", "10 A1.test", "30 a1.test"),
    ("implicit.test", A): ("192.0.2.3",),
    ("null.test", MX): ("0 ",),
    ("nullish.test", MX): ("0 ", "10 a1.test"),
    ("empty.test", NS): ("ns.test",),
    ("deadhosts.test", MX): ("10 nowhere.test", "20 empty.test"),
    ("halfdead.test", MX): ("10 servfail.test", "20 nowhere.test"),
    ("lasthope.test", MX): ("10 servfail.test", "20 nowhere.test", "30 a1.test"),
    ("literal.test", MX): ("10 192.0.2.9",),
    ("odd.test", MX): (
        "10 192.0.2.9",
        "20 mx\xff.test",
        "30 a b.test",
        "40 [192.0.2.1]",
        "50 a1.test",
    ),
    ("alias.test", CNAME): ("one.test",),
    ("aliases.test", CNAME): ("alias.test",),
    ("ring.test", CNAME): ("rong.test",),
    ("rong.test", CNAME): ("ring.test",),
    ("dangling.test", CNAME): ("nowhere.test",),
    ("weird.test", CNAME): ("caf\xe9.test",),
    ("hostalias.test", MX): ("10 ring.test", "20 cn.test"),
    ("cn.test", CNAME): ("a1.test",),
    ("xn--bcher-kva.test", MX): ("10 a1.test",),
    ("many.test", MX): tuple(f"{n} host{n}.a-long-enough-name.test" for n in range(100, 0, -1)),
}


def zone_answer(query: bytes, transport: str) -> list[bytes]:
    """Answers from ZONE as a recursive server does: aliases followed, SOA under a "no"."""
    (name, kind), records = dns_question(query), []
    if name == "servfail.test":
        return [dns_answer(query, flags=RA | SERVFAIL)]
    for _ in range(5):
        if (name, CNAME) not in ZONE:
            break
        records += [dns_record(name, CNAME, ZONE[name, CNAME][0])]
        name = ZONE[name, CNAME][0]
    found = [dns_record(name, kind, value) for value in ZONE.get((name, kind), ())]
    exists = any(owner == name for owner, _ in ZONE)
    no = [] if found else [dns_record("test", SOA, "30")]
    answer = dns_answer(query, *records, *found, *no, flags=RA if exists else RA | NXDOMAIN, authority=len(no))
    if transport == TCP:
        return [struct.pack("!H", len(answer)) + answer]
    return [answer if len(answer) <= 512 else dns_answer(query, flags=RA | TC)]


@pytest.fixture
def dns() -> Iterator[FakeDns]:
    with FakeDns(zone_answer) as server:
        yield server


def resolver_of(*servers: FakeDns, timeout: float = 1.0) -> smtprelay.Resolver:
    return smtprelay.Resolver([smtprelay.Address(*s.server) for s in servers], timeout=timeout)


def names_of(hosts: list[tuple[int, str]]) -> list[str]:
    return [name for _, name in hosts]


def addresses_of(resolver: smtprelay.Resolver, host: str) -> list[str]:
    return [address for _, address in resolver.targets([(0, host)])]


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or the code and enhanced code of its ResolveError."""
    try:
        return call()
    except smtprelay.ResolveError as error:
        assert error.permanent == (error.reply.code >= 500)
        return error.reply.code, error.reply.enhanced


HOSTS = [  # domain, hosts or failure
    ("one.test", ["mx.one.test"]),
    ("ONE.test.", ["mx.one.test"]),
    ("twice.test", ["a1.test"]),
    ("implicit.test", ["implicit.test"]),
    ("empty.test", ["empty.test"]),
    ("alias.test", ["mx.one.test"]),
    ("aliases.test", ["mx.one.test"]),
    ("nullish.test", ["a1.test"]),
    ("odd.test", ["a1.test"]),
    ("bücher.test", ["a1.test"]),
    ("BÜCHER.test.", ["a1.test"]),
    ("bu\u0308cher.test", ["a1.test"]),
    ("[127.0.0.1]", ["[127.0.0.1]"]),
    ("[IPv6:::1]", ["[IPv6:::1]"]),
    ("many.test", [f"host{n}.a-long-enough-name.test" for n in range(1, 17)]),
    ("null.test", (556, "5.1.10")),
    ("nowhere.test", (550, "5.1.2")),
    ("dangling.test", (550, "5.1.2")),
    ("literal.test", (550, "5.4.4")),
    ("servfail.test", (451, "4.4.3")),
    ("ring.test", (451, "4.4.3")),
    ("weird.test", (550, "5.1.2")),
]


@pytest.mark.parametrize(("domain", "expected"), HOSTS)
def test_mx_hosts(dns: FakeDns, domain: str, expected: object) -> None:
    resolver = resolver_of(dns)
    assert outcome(lambda: names_of(resolver.mx_hosts(domain))) == expected


BAD_DOMAINS = [
    "",
    ".",
    "a..test",
    ".test",
    "192.0.2.1",
    "a b.test",
    "a\0.test",
    "a/b.test",
    "x" * 64 + ".test",
    ".".join(["x" * 60] * 5),
    "x" * 100000,
    "ü" * 100000,
    "faß.test",
    "a\u200db.test",
    "ü\ud800.test",
    "ü" * 60 + ".test",
    "１.test",
    "[",
    "[]",
    "[127.0.0.1",
    "[127.0.0.11",
    "[IPv6:::11",
    "[127.0.0.256]",
    "[127.1]",
    "[::1]",
    "[IPv6:127.0.0.1]",
    "[IPv6:fe80::1%lo]",
    "[IPv6:::1",
    "[x.test]",
    "[127.0.0.1]]",
    "[127.0.0.1]\n",
]


@pytest.mark.parametrize("domain", BAD_DOMAINS)
def test_bad_domains_fail_at_once(domain: str) -> None:
    resolver = smtprelay.Resolver([smtprelay.Address("127.0.0.1", 1)], timeout=0.1)
    began = time.monotonic()
    assert outcome(lambda: resolver.mx_hosts(domain)) == (550, "5.1.2")
    assert time.monotonic() - began < 0.5


ADDRESS_RECORDS = [
    ("mx.one.test", ["2001:db8::1", "192.0.2.1", "192.0.2.2"]),
    ("implicit.test", ["192.0.2.3"]),
    ("cn.test", ["192.0.2.11"]),
    ("[127.0.0.1]", ["127.0.0.1"]),
    ("[IPv6:2001:DB8:0::1]", ["2001:db8::1"]),
    ("[ipv6:::ffff:192.0.2.1]", [str(IPv6Address("::ffff:192.0.2.1"))]),
    ("empty.test", (550, "5.4.4")),
    ("nowhere.test", (550, "5.4.4")),
    ("servfail.test", (451, "4.4.3")),
]


@pytest.mark.parametrize(("host", "expected"), ADDRESS_RECORDS)
def test_addresses_of_a_host(dns: FakeDns, host: str, expected: object) -> None:
    assert outcome(lambda: addresses_of(resolver_of(dns), host)) == expected


TARGETS = [  # domain, (host, address) pairs or failure: RFC 5321 5.1 when no host is usable
    ("one.test", [("mx.one.test", a) for a in ("2001:db8::1", "192.0.2.1", "192.0.2.2")]),
    ("implicit.test", [("implicit.test", "192.0.2.3")]),
    ("lasthope.test", [("a1.test", "192.0.2.11")]),
    ("hostalias.test", [("cn.test", "192.0.2.11")]),
    ("[127.0.0.1]", [("[127.0.0.1]", "127.0.0.1")]),
    ("deadhosts.test", (550, "5.4.4")),
    ("halfdead.test", (451, "4.4.3")),
    ("empty.test", (550, "5.4.4")),
]


@pytest.mark.parametrize(("domain", "expected"), TARGETS)
def test_targets(dns: FakeDns, domain: str, expected: object) -> None:
    resolver = resolver_of(dns)
    hosts = resolver.mx_hosts(domain)
    assert outcome(lambda: list(resolver.targets(hosts))) == expected


def test_a_host_is_looked_up_when_its_turn_comes(dns: FakeDns) -> None:
    resolver = resolver_of(dns)
    next(resolver.targets([(1, "mx.one.test"), (2, "c.test")]))
    assert {name for name, _, _ in dns.asked} == {"mx.one.test"}


def test_equal_preferences_are_shuffled_and_no_others(dns: FakeDns) -> None:
    resolver = resolver_of(dns)
    orders = {tuple(names_of(resolver.mx_hosts("order.test"))) for _ in range(100)}
    assert len(orders) == 6
    assert {order[3:] for order in orders} == {("b.test", "c.test")}


def test_a_host_named_twice_has_its_better_preference(dns: FakeDns) -> None:
    assert resolver_of(dns).mx_hosts("twice.test") == [(10, "a1.test")]


def test_only_hosts_before_our_own_count(dns: FakeDns) -> None:
    for own_name, expected in (
        ("B.test", {"a1.test", "a2.test", "a3.test"}),
        ("c.test", {"a1.test", "a2.test", "a3.test", "b.test"}),
        ("a2.TEST", (554, "5.4.6")),
    ):
        resolver = smtprelay.Resolver([smtprelay.Address(*dns.server)], own_name)
        assert outcome(lambda: {*names_of(resolver.mx_hosts("order.test"))}) == expected  # noqa: B023


DNS_NAMES = [  # octets, offset, (name, offset after it) or what is wrong
    (b"\0", 0, ("", 1)),
    (b"\1A\4Test\0", 0, ("a.test", 8)),
    (b"\4test\0\1a\xc0\0", 6, ("a.test", 10)),
    (b"\4test\0\1a\xc0\0\xc0\6", 10, ("a.test", 12)),
    (b"\3a.b\1\\\1\xff\0", 0, ("a\\b.\\.\ufffd", 9)),
    (b"\x3f" + b"x" * 63 + b"\0", 0, ("x" * 63, 65)),
    (b"\1x" * 127 + b"\0", 0, (".".join("x" * 127), 255)),
    (b"\1x" * 126 + b"\2xx\0", 0, "over-long"),
    (b"\x40" + b"x" * 64 + b"\0", 0, "over-long"),
    (b"\xbf" + b"x" * 191 + b"\0", 0, "over-long"),
    (b"\xc0\0", 0, "not backwards"),
    (b"\1a\xc0\0", 0, "not backwards"),
    (b"\1a\xc0\4\1b\xc0\0", 4, "not backwards"),
    (b"\xc0\2\0", 0, "not backwards"),
    (b"\xc0\2\xc0\0", 2, "not backwards"),
]


@pytest.mark.parametrize(("octets", "at", "expected"), DNS_NAMES)
def test_names(octets: bytes, at: int, expected: object) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            smtprelay.read_name(octets, at)
    else:
        assert smtprelay.read_name(octets, at) == expected
        for cut in range(at, min(len(octets), smtprelay.read_name(octets, at)[1])):
            with pytest.raises(IndexError):
                smtprelay.read_name(octets[:cut], at)


# What servers do wrong. Each script is (name, what UDP and TCP answer); all but the last
# rows fail for now, with one server, and succeed when a good one stands beside it.

GOOD_ADDRESS = "192.0.2.1"


def good(query: bytes) -> bytes:
    return dns_answer(query, dns_record("x.test", A, GOOD_ADDRESS))


def framed(octets: bytes) -> bytes:
    return struct.pack("!H", len(octets)) + octets


def over_tcp(answer: Callable[[bytes], list[bytes]]) -> DnsScript:
    return lambda query, via: answer(query) if via == TCP else [dns_answer(query, flags=RA | TC)]


def pointer_answer(offset: int) -> Callable[[bytes, str], list[bytes]]:
    """An answer whose record's owner points at an offset from that pointer."""

    def script(query: bytes, _: str) -> list[bytes]:
        pointer = struct.pack("!H", 0xC000 | (len(query) + offset))
        return [dns_answer(query, pointer + dns_record("", A, GOOD_ADDRESS)[1:])]

    return script


def raw_record(octets: bytes) -> DnsScript:
    return lambda query, _: [dns_answer(query, octets)]


def a_record(data: bytes, length: int) -> bytes:
    return dns_name("x.test") + struct.pack("!HHIH", A, 1, 60, length) + data


TROUBLE: list[tuple[str, DnsScript]] = [
    ("silent", lambda q, _: []),
    ("empty", lambda q, _: [b""]),
    ("short", lambda q, _: [q[:2], q[:11], good(q)[:14]]),
    ("echo", lambda q, _: [q]),
    ("other id", lambda q, _: [bytes([q[0] ^ 1]) + good(q)[1:]]),
    ("other name", lambda q, _: [good(q).replace(b"\1x\4test\0\0\1", b"\1y\4test\0\0\1", 1)]),
    ("other type", lambda q, _: [good(q).replace(b"\4test\0\0\1", b"\4test\0\0\2", 1)]),
    ("other opcode", lambda q, _: [good(q)[:2] + b"\xa1" + good(q)[3:]]),
    ("no question", lambda q, _: [q[:2] + b"\x81\x80" + bytes(8)]),
    ("two questions", lambda q, _: [good(q)[:5] + b"\2" + good(q)[6:]]),
    ("servfail", lambda q, _: [dns_answer(q, flags=RA | SERVFAIL)]),
    ("refused", lambda q, _: [dns_answer(q, flags=RA | DNS_REFUSED)]),
    ("rcode 11", lambda q, _: [dns_answer(q, flags=RA | 11)]),
    (
        "referral",
        lambda q, _: [dns_answer(q, dns_record("test", NS, "ns.test"), flags=0, authority=1)],
    ),
    ("nxdomain, no recursion", lambda q, _: [dns_answer(q, flags=NXDOMAIN)]),
    ("count too high", lambda q, _: [good(q)[:7] + b"\2" + good(q)[8:]]),
    ("65535 records", lambda q, _: [good(q)[:6] + b"\xff\xff" + good(q)[8:]]),
    ("cut", lambda q, _: [good(q)[:-1]]),
    ("pointer to itself", pointer_answer(0)),
    ("pointer forward", pointer_answer(2)),
    ("pointer past the end", pointer_answer(5000)),
    ("pointer cut", raw_record(b"\xc0")),
    ("label type 0x40", raw_record(b"\x41" + dns_record("x.test", A, GOOD_ADDRESS))),
    ("label type 0x80", raw_record(b"\x80" + dns_record("x.test", A, GOOD_ADDRESS))),
    ("name of 256", raw_record(dns_record(".".join(["x" * 50] * 5), A, GOOD_ADDRESS))),
    ("address of 3", raw_record(a_record(b"\1\2\3", 3))),
    ("address of 16", raw_record(a_record(bytes(16), 16))),
    ("length past the end", raw_record(a_record(b"\1\2\3\4", 400))),
    ("cname too long", raw_record(dns_name("x.test") + b"\0\5\0\1\0\0\0\0\0\4\1y\0\0")),
    ("cname cut", raw_record(dns_name("x.test") + b"\0\5\0\1\0\0\0\0\0\1\1")),
    ("tcp closed", over_tcp(lambda q: [])),
    ("tcp length alone", over_tcp(lambda q: [b"\1"])),
    ("tcp cut", over_tcp(lambda q: [framed(good(q))[:-1]])),
    ("tcp length of 0", over_tcp(lambda q: [b"\0\0"])),
    ("tcp other id", over_tcp(lambda q: [framed(bytes([q[0] ^ 1]) + good(q)[1:])])),
    ("tcp garbage", over_tcp(lambda q: [b"\x7f" * 70000])),
]


@pytest.mark.parametrize(("_", "script"), TROUBLE, ids=[name for name, _ in TROUBLE])
def test_one_bad_server_is_transient_and_costs_little(_: str, script: DnsScript) -> None:
    with FakeDns(script) as bad, FakeDns(lambda q, _: [good(q)]) as well:
        began = time.monotonic()
        assert outcome(lambda: addresses_of(resolver_of(bad, timeout=0.06), "x.test")) == (451, "4.4.3")
        assert time.monotonic() - began < 1
        wait_until(lambda: len(bad.asked) >= 3)
        assert addresses_of(resolver_of(bad, well, timeout=0.3), "x.test") == [GOOD_ADDRESS]


def dns_noise(query: bytes) -> list[bytes]:
    """Datagrams that are no answers."""
    return [b"", b"\0", query, bytes([query[0] ^ 1]) + good(query)[1:], os.urandom(100)][1:]


FINE: list[tuple[str, DnsScript]] = [
    ("noise first", lambda q, _: [*dns_noise(q), good(q)]),
    ("over TCP", over_tcp(lambda q: [framed(good(q))])),
    ("over TCP in pieces", over_tcp(lambda q: [bytes([octet]) for octet in framed(good(q))])),
    ("upper case", lambda q, _: [good(q).replace(b"test", b"TEST")]),
    ("owner by pointer", pointer_answer(12 - 24)),
    ("more after it", lambda q, _: [good(q) + b"\xff" * 40]),
    (
        "unknown type",
        lambda q, _: [dns_answer(q, dns_record("x.test", 99, "z"), good(q)[len(q) :])],
    ),
    (
        "unknown class",
        lambda q, _: [dns_answer(q, dns_record("x.test", A, "192.0.2.7", family=3), good(q)[len(q) :])],
    ),
    (
        "others' records",
        lambda q, _: [dns_answer(q, dns_record("y.test", A, "192.0.2.7"), good(q)[len(q) :])],
    ),
]


@pytest.mark.parametrize(("_", "script"), FINE, ids=[name for name, _ in FINE])
def test_odd_but_right_answers(_: str, script: DnsScript) -> None:
    with FakeDns(script) as server:
        assert addresses_of(resolver_of(server), "x.test") == [GOOD_ADDRESS]


def test_a_server_that_is_not_there_is_passed_over(dns: FakeDns) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        closed = sock.getsockname()
    servers = [smtprelay.Address(*server) for server in (closed, ("fe80::1%nosuch", 53), dns.server)]
    assert smtprelay.Resolver(servers, timeout=2).mx_hosts("one.test") == [(10, "mx.one.test")]
    with pytest.raises(smtprelay.ResolveError, match=r"x\.test: DNS lookup failed \(127\.0\.0\.1: "):
        smtprelay.Resolver(servers[:1], timeout=0.1).mx_hosts("x.test")


def test_an_alias_alone_is_asked_on_and_a_long_chain_is_not() -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        name, kind = dns_question(query)
        number = int(name.split(".")[0])
        if number == 5:
            return [dns_answer(query, dns_record(name, kind, GOOD_ADDRESS if kind == A else "2001:db8::5"))]
        return [dns_answer(query, dns_record(name, CNAME, f"{number + 1}.test"))]

    with FakeDns(script) as server:
        assert addresses_of(resolver_of(server), "0.test") == ["2001:db8::5", GOOD_ADDRESS]
        assert outcome(lambda: addresses_of(resolver_of(server), "6.test")) == (451, "4.4.3")
        assert len(server.asked) == 12 + 16


def test_one_family_failing_does_not_hide_the_other() -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        return [good(query) if dns_question(query)[1] == A else dns_answer(query, flags=RA | SERVFAIL)]

    with FakeDns(script) as server:
        assert addresses_of(resolver_of(server), "x.test") == [GOOD_ADDRESS]


@pytest.mark.parametrize("failing", [A, AAAA])
def test_a_failure_for_now_outweighs_one_for_good(failing: int) -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        fails = dns_question(query)[1] == failing
        return [dns_answer(query, flags=RA | (SERVFAIL if fails else NXDOMAIN))]

    with FakeDns(script) as server:
        assert outcome(lambda: addresses_of(resolver_of(server), "x.test")) == (451, "4.4.3")


def test_ids_and_ports_are_fresh_for_each_try() -> None:
    seen: list[bytes] = []

    def script(query: bytes, _: str) -> list[bytes]:
        seen.append(query[:2])
        return [good(query)]

    with FakeDns(script) as server:
        resolver = resolver_of(server)
        for number in range(20):
            outcome(lambda: resolver.mx_hosts(f"n{number}.test"))  # noqa: B023
    assert len(set(seen)) > 18


# The cache


CACHED = [  # records and flags of the answer, seconds remembered
    ((dns_record("x.test", MX, "1 a1.test", ttl=20),), 0, RA, 20),
    ((dns_record("x.test", MX, "1 a1.test", ttl=0),), 0, RA, 0),
    ((dns_record("x.test", MX, "1 a1.test", ttl=1 << 30),), 0, RA, 3600),
    (
        (dns_record("x.test", CNAME, "y.test", ttl=5), dns_record("y.test", MX, "1 a1.test", ttl=5)),
        0,
        RA,
        5,
    ),
    ((dns_record("test", SOA, "86400", ttl=86400),), 1, RA, 60),
    ((), 0, RA | NXDOMAIN, 60),
    ((), 0, RA | SERVFAIL, 10),
]


@pytest.mark.parametrize(("records", "authority", "flags", "seconds"), CACHED)
def test_answers_are_remembered(records: tuple[bytes, ...], authority: int, flags: int, seconds: int) -> None:
    clock = Ticker()
    with FakeDns(lambda q, _: [dns_answer(q, *records, flags=flags, authority=authority)]) as server:
        resolver = smtprelay.Resolver([smtprelay.Address(*server.server)], timeout=1, clock=clock)
        first = outcome(lambda: resolver.mx_hosts("x.test"))
        asked = len(server.asked)
        clock.now += max(0, seconds - 0.01)
        assert outcome(lambda: resolver.mx_hosts("X.test")) == first
        assert len(server.asked) == asked * (1 if seconds else 2)
        clock.now += 0.02
        assert outcome(lambda: resolver.mx_hosts("x.test")) == first
        assert len(server.asked) == asked * (2 if seconds else 3)


def test_the_cache_is_bounded(dns: FakeDns, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "MAX_CACHED_ANSWERS", 10)
    resolver = resolver_of(dns)
    for number in range(30):
        outcome(lambda: resolver.mx_hosts(f"n{number}.test"))  # noqa: B023
    assert len(dns.asked) == 30
    outcome(lambda: resolver.mx_hosts("n29.test"))
    assert len(dns.asked) == 30
    outcome(lambda: resolver.mx_hosts("n0.test"))
    assert len(dns.asked) == 31
    assert len(resolver._cache) <= 10


def test_many_threads_share_a_resolver(dns: FakeDns) -> None:
    resolver, wrong = resolver_of(dns, timeout=5), []

    def work(seed: int) -> None:
        for domain, expected in random.Random(seed).sample(HOSTS, len(HOSTS)):
            got = outcome(lambda: names_of(resolver.mx_hosts(domain)))  # noqa: B023
            if got != expected:
                wrong.append((domain, got))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


# Settings

SERVERS = [
    ("127.0.0.1", ("127.0.0.1", 53)),
    ("127.0.0.1:5353", ("127.0.0.1", 5353)),
    ("::1", ("::1", 53)),
    ("[::1]", ("::1", 53)),
    ("[::1]:5353", ("::1", 5353)),
    ("fe80::1%eth0", ("fe80::1%eth0", 53)),
    ("[fe80::1%eth0]:54", ("fe80::1%eth0", 54)),
]


@pytest.mark.parametrize(("text", "expected"), SERVERS)
def test_dns_server_setting(text: str, expected: tuple[str, int]) -> None:
    assert smtprelay.dns_servers(text)[0][:2] == expected


@pytest.mark.parametrize(
    "text",
    [
        ":53",
        "dns.test",
        "dns.test:53",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:x",
    ]
    + ["127.0.0.1:５３", "[::1", "[::1]53", "::1]:53", "[]:53", "127.1"],
)
def test_bad_dns_server_setting(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        smtprelay.dns_servers(text)


RESOLV_CONF = [
    ("nameserver 192.0.2.1\n", [("192.0.2.1", 53)]),
    (
        "# x\n; y\nsearch test\n\tnameserver\t192.0.2.1 # z\nnameserver fe80::1%eth0\n",
        [("192.0.2.1", 53), ("fe80::1%eth0", 53)],
    ),
    (
        "nameserver 1.1.1.1\nnameserver ::1\nnameserver 1.1.1.2\nnameserver 1.1.1.3\n",
        [("1.1.1.1", 53), ("::1", 53), ("1.1.1.2", 53)],
    ),
    (
        "nameserver\nnameserver dns.test\n#nameserver 1.1.1.1\nnameservers 1.1.1.1\n\xff",
        [("127.0.0.1", 53)],
    ),
    ("", [("127.0.0.1", 53)]),
]


@pytest.mark.parametrize(("text", "expected"), RESOLV_CONF)
def test_resolv_conf(tmp_path: Path, text: str, expected: list[tuple[str, int]]) -> None:
    (tmp_path / "resolv.conf").write_text(text, encoding="latin-1")
    assert [server[:2] for server in smtprelay.system_dns_servers(str(tmp_path / "resolv.conf"))] == expected


def test_no_resolv_conf(tmp_path: Path) -> None:
    assert smtprelay.system_dns_servers(str(tmp_path / "none")) == [smtprelay.Address("127.0.0.1", 53)]


# The reader under fire


def sample_answers(query: bytes) -> list[bytes]:
    """Answers with every kind of record and with pointers into each other."""
    mx = b"\xc0\x0c" + struct.pack("!HHIH", MX, 1, 60, 7) + b"\0\x0a\2mx\xc0\x0c"
    alias = b"\xc0\x0c" + struct.pack("!HHIH", CNAME, 1, 60, 4) + b"\1y\xc0\x0e"
    return [
        dns_answer(query, mx, mx, alias, dns_record("y.test", MX, "5 a1.test")),
        dns_answer(query, dns_record("x.test", A, GOOD_ADDRESS), dns_record("x.test", AAAA, "::1")),
        dns_answer(query, dns_record("test", SOA, "30"), flags=RA | NXDOMAIN, authority=1),
    ]


def damage(rng: random.Random, message: bytes) -> bytes:
    octets = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        octets[rng.randrange(len(octets))] = rng.choice((0, 1, 0x3F, 0x40, 0xC0, 0xFF, rng.getrandbits(8)))
    start = rng.randrange(len(octets))
    piece = octets[start : start + rng.randrange(40)]
    cut = rng.choice((len(octets), rng.randrange(len(octets) + 1)))
    return bytes(octets[:cut] + (piece if rng.random() < 0.2 else b""))


def test_damaged_answers_are_read_or_refused() -> None:
    rng, began, read = random.Random(20261121), time.monotonic(), 0
    samples = sample_answers(b"\0\1" + bytes(10) + dns_name("x.test") + b"\0\x0f\0\1")
    for _ in range(10000):
        with contextlib.suppress(ValueError, IndexError, struct.error):
            answer = smtprelay.parse_answer(damage(rng, rng.choice(samples)), "x.test", MX)
            assert len(answer.records) <= smtprelay.MAX_HOSTS
            read += 1
    assert read > 500
    assert time.monotonic() - began < 10


def test_damaged_answers_end_as_resolve_errors() -> None:
    rng = random.Random(20261121)

    def script(query: bytes, transport: str) -> list[bytes]:
        message = damage(rng, rng.choice(sample_answers(query)))
        return [framed(message) if transport == TCP else message]

    with FakeDns(script) as server:
        for _ in range(50):
            began, resolver = time.monotonic(), resolver_of(server, timeout=0.03)
            outcome(lambda: list(resolver.targets(resolver.mx_hosts("x.test"))))  # noqa: B023
            assert time.monotonic() - began < 2


def chained_answer(pointers: int) -> bytes:
    """An answer of 512 records whose owners are that many pointers away from the question."""
    head = b"\0\1\x81\x80\0\1\2\0\0\0\0\0" + dns_name("x") + b"\0\1\0\1"
    start = len(head) + 11  # of the first record's data, of a type that is not read
    targets = [12, *range(start, start + 2 * pointers, 2)]
    chain = b"".join(struct.pack("!H", 0xC000 | target) for target in targets)
    first = b"\0" + struct.pack("!HHIH", 99, 1, 60, 2 * pointers) + chain[: 2 * pointers]
    rest = chain[2 * pointers :] + struct.pack("!HHIH", A, 1, 60, 4) + bytes(4)
    return head + first + rest * 511


def test_the_worst_message_is_read_in_bounded_time() -> None:
    began = time.monotonic()
    answer = smtprelay.parse_answer(chained_answer(200), "x", A)
    assert len(answer.records) == smtprelay.MAX_HOSTS
    with pytest.raises(ValueError, match="too many parts"):
        smtprelay.parse_answer(chained_answer(300), "x", A)
    many = chained_answer(1)
    with pytest.raises(ValueError, match="too many records"):
        smtprelay.parse_answer(many[:6] + b"\2\1" + many[8:] + many[-16:], "x", A)
    assert time.monotonic() - began < 1


# A real server

DNSMASQ = shutil.which("dnsmasq", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
DNSMASQ_ZONE = [
    "--local=/test/",
    "--mx-host=one.test,mx.one.test,10",
    "--host-record=mx.one.test,192.0.2.1,2001:db8::1",
    "--mx-host=order.test,b.test,20",
    "--mx-host=order.test,a.test,10",
    "--host-record=implicit.test,192.0.2.3",
    "--dns-rr=null.test,15,000000",
    "--cname=alias.test,implicit.test",
    "--txt-record=empty.test,x",
    "--mx-host=dead.test,nowhere.test,10",
    *[f"--mx-host=many.test,host{n}.a-long-enough-name.test,{n}" for n in range(1, 41)],
    *[f"--mx-host={domain}.test,{host}" for domain in "xy" for host in ("mx.pf.test,10", "down.test,5")],  # see postfix
    "--host-record=mx.pf.test,127.0.0.1",
    "--host-record=down.test,127.0.0.5",
]
REAL = [
    ("one.test", [("mx.one.test", "2001:db8::1"), ("mx.one.test", "192.0.2.1")]),
    ("implicit.test", [("implicit.test", "192.0.2.3")]),
    ("alias.test", [("alias.test", "192.0.2.3")]),
    ("null.test", (556, "5.1.10")),
    ("nowhere.test", (550, "5.1.2")),
    ("empty.test", (550, "5.4.4")),
    ("dead.test", (550, "5.4.4")),
    ("elsewhere.example", (451, "4.4.3")),
]


def resolves(server: tuple[str, int]) -> bool:
    resolver = smtprelay.Resolver([smtprelay.Address(*server)], timeout=0.3)
    return outcome(lambda: resolver.mx_hosts("one.test")) == [(10, "mx.one.test")]


@pytest.fixture(scope="module")
def dnsmasq() -> Iterator[tuple[str, int]]:
    if not DNSMASQ:
        pytest.skip("dnsmasq is not installed (Debian: dnsmasq-base)")
    while True:  # until a port is free for UDP and for TCP
        with socket.create_server(("127.0.0.1", 0)) as probe:
            server = probe.getsockname()
        command = [DNSMASQ, "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file",
                   f"--port={server[1]}", "--listen-address=127.0.0.1", "--bind-interfaces", f"--user={getpass.getuser()}",
                   "--log-facility=-", *DNSMASQ_ZONE]  # fmt: skip
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            try:
                if wait_until(lambda: process.poll() or resolves(server)) is True:  # noqa: B023
                    yield server
                    return
            finally:
                process.kill()


@pytest.mark.parametrize(("domain", "expected"), REAL)
def test_dnsmasq(dnsmasq: tuple[str, int], domain: str, expected: object) -> None:
    resolver = smtprelay.Resolver([smtprelay.Address(*dnsmasq)], timeout=2)
    assert outcome(lambda: list(resolver.targets(resolver.mx_hosts(domain)))) == expected


def test_dnsmasq_long_answer_over_tcp(dnsmasq: tuple[str, int]) -> None:
    hosts = smtprelay.Resolver([smtprelay.Address(*dnsmasq)], timeout=2).mx_hosts("many.test")
    assert [preference for preference, _ in hosts] == list(range(1, 17))


# === DELIVERY ================================================================


BUSY = "450 4.2.1 busy"
PASSING = [  # trouble that comes once: the message arrives all the same
    ("connect", "drop"),
    ("greeting", "554 5.3.2 no service"),
    ("greeting", "trickle 220 hop.test"),
    ("ehlo", "502 5.5.1 what?"),
    ("ehlo", "trickle 250 hop.test"),
    ("mail", "trickle 250 2.1.0 ok"),
    ("rcpt bob@hop.test", BUSY),
    ("rcpt bob@hop.test", "452 4.5.3 too many"),
    ("end", "trickle 250 2.0.0 ok"),
    ("end", "451 4.3.0 one\n451 4.3.0 two"),
    ("quit", "hang"),
    ("quit", "500 5.5.2 no"),
]


@pytest.mark.parametrize(("stage", "act"), PASSING)
@pytest.mark.parametrize("offers", ["PIPELINING 8BITMIME SIZE", ""], ids=["pipelined", "plain"])
def test_passing_trouble(
    start: Callable[..., Any], hop: Callable[..., FakeHop], stage: str, act: str, offers: str
) -> None:
    next_hop = hop(script={stage: [act]}, offers=offers)
    relay = start(SMTP_STORAGE="memory", SMTP_RELAY_REPLY_TIMEOUT="0.2s", **next_hop.settings())
    said(relay, to=("bob@hop.test", "carol@hop.test"))
    wait_until(lambda: set(next_hop.delivered()) == {"bob@hop.test", "carol@hop.test"})
    wait_until(lambda: metric(relay, "smtp_messages_delivered_total") == 1 and metric(relay, "smtp_queue_depth") == 0)
    assert next_hop.script[stage] == [] or stage == "quit"
    assert set(next_hop.delivered().values()) == {1}


LASTING = [  # (script, status and code of bob, of carol)
    ({}, ("forwarded", 250), ("forwarded", 250)),
    ({"mail": "550 5.7.1 not you"}, ("failed", 550), ("failed", 550)),
    ({"mail": BUSY}, ("retrying", 450), ("retrying", 450)),
    ({"rcpt bob@hop.test": "550 5.1.1 who?"}, ("failed", 550), ("forwarded", 250)),
    ({"rcpt bob@hop.test": BUSY}, ("retrying", 450), ("forwarded", 250)),
    ({"rcpt bob@hop.test": "550 5.1.1 who?", "rcpt carol@hop.test": BUSY}, ("failed", 550), ("retrying", 450)),
    ({"rcpt": "551 5.1.6 moved"}, ("failed", 551), ("failed", 551)),
    ({"rcpt": "552 5.5.3 too many"}, ("retrying", 552), ("retrying", 552)),  # RFC 5321, 4.5.3.1.10
    ({"data": "554 5.7.1 no"}, ("failed", 554), ("failed", 554)),
    ({"data": "451 4.3.0 later"}, ("retrying", 451), ("retrying", 451)),
    ({"end": "554 5.7.1 spam"}, ("failed", 554), ("failed", 554)),
    ({"end": "451 4.7.1 greylisted"}, ("retrying", 451), ("retrying", 451)),
    ({"rcpt bob@hop.test": "550 5.1.1 who?", "end": "452 4.3.1 full"}, ("failed", 550), ("retrying", 452)),
]


@pytest.mark.parametrize(("script", "bob", "carol"), LASTING)
@pytest.mark.parametrize("offers", ["PIPELINING", ""], ids=["pipelined", "plain"])
def test_lasting_trouble(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop], script: Script,
                         bob: tuple[str, int], carol: tuple[str, int], offers: str) -> None:  # fmt: skip
    spool, next_hop = Spool(tmp_path / "spool"), hop(script=script, offers=offers)
    said(start(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", **next_hop.settings()), to=("bob@hop.test", "carol@hop.test"))
    whole = next(status for status in ("retrying", "failed", "forwarded") if status in (bob[0], carol[0]))
    record = spool.await_status(whole)
    assert [(r["status"], r["code"]) for r in record["recipients"]] == [bob, carol]
    wanted = [text[4:9] for text in script.values()] if whole == "retrying" else []
    assert all(any(word in str(record["recipients"]) for word in wanted[:1]) for _ in wanted)


def test_no_answer_after_the_final_dot_may_be_a_duplicate(
    program: Callable[..., Program], hop: Callable[..., FakeHop]
) -> None:
    next_hop = hop(script={"end": ["drop"]})
    relay = program(**next_hop.settings())
    said(relay)
    relay.spool.await_status("forwarded")
    assert (len(next_hop.refused) + len(next_hop.messages), "duplicate" in relay.log()) == (2, True)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_content_arrives_octet_by_octet(start: Callable[..., Any], hop: Callable[..., FakeHop], content: bytes) -> None:
    next_hop = hop()
    said(start(SMTP_RELAY_REPAIR="0", **next_hop.settings()), content)
    got = wait_until(lambda: next_hop.messages)[0].content
    assert got.endswith(content)
    assert re.fullmatch(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*", got[: len(got) - len(content)])


OFFERS = [  # (what the next hop offers, parameters of MAIL that came in, what must and may not be in MAIL that goes out)
    ("", "", "", "SIZE BODY SMTPUTF8"),
    ("SIZE", "", "SIZE=", "BODY SMTPUTF8"),
    ("8BITMIME SIZE", " BODY=8BITMIME", "SIZE= BODY=8BITMIME", "SMTPUTF8"),
    ("SIZE", " BODY=8BITMIME", "SIZE=", "BODY SMTPUTF8"),
    ("SMTPUTF8 8BITMIME", " SMTPUTF8", "SMTPUTF8", "SIZE"),
]


@pytest.mark.parametrize(("offers", "given", "must", "may_not"), OFFERS)
def test_parameters_only_where_offered(start: Callable[..., Any], hop: Callable[..., FakeHop], offers: str, given: str,
                                       must: str, may_not: str) -> None:  # fmt: skip
    next_hop = hop(offers=offers)
    with hello(start(**next_hop.settings())) as client:
        client.ask(f"MAIL FROM:<{'änn' if 'UTF8' in given else 'ann'}@client.test>{given}", "250")
        client.ask("RCPT TO:<bob@hop.test>", "250")
        client.content(b"\xe4\r\n.\r\n")
    mail = wait_until(lambda: next_hop.messages)[0].mail
    assert [word for word in must.split() if word not in mail] == []
    assert [word for word in may_not.split() if word in mail] == []


def test_null_reverse_path_goes_out_as_it_came(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop()
    with hello(start(**next_hop.settings())) as client:
        client.mail(MAIL, "", '"b o b"@hop.test')
    got = wait_until(lambda: next_hop.messages)[0]
    assert got.mail.startswith("MAIL FROM:<>") or got.mail.startswith("mail FROM:<>")
    assert '<"b o b"@hop.test>' in got.rcpts[0]


RIGHT_CA = {"SMTP_RELAY_CA_FILE": "right"}
TLS_CASES = [  # (tls, pair, implicit, more settings, True: over TLS, False: in clear, None: not at all)
    ("starttls", "right", False, RIGHT_CA, True),
    ("starttls", "right", False, {}, None),
    ("starttls", "wrong", False, {"SMTP_RELAY_CA_FILE": "wrong"}, None),
    ("starttls", "right", False, {"SMTP_RELAY_TLS_VERIFY": "0"}, True),
    ("starttls", "", False, {}, None),
    ("opportunistic", "", False, {}, False),
    ("opportunistic", "right", False, RIGHT_CA, False),  # on loopback, where nobody listens
    ("none", "right", False, {}, False),
    ("tls", "right", True, RIGHT_CA, True),
    ("tls", "right", True, {}, None),
    ("", "wrong", False, {}, False),
]


@pytest.mark.parametrize(("tls", "pair", "implicit", "more", "secure"), TLS_CASES)
def test_tls_to_the_next_hop(
    start: Callable[..., Any],
    tmp_path: Path,
    hop: Callable[..., FakeHop],
    pairs: dict[str, Pair],
    tls: str,
    pair: str,
    implicit: bool,
    more: dict[str, str],
    secure: bool | None,
) -> None:
    spool = Spool(tmp_path / "spool")
    next_hop = hop(tls=pairs[pair].server if pair else None, implicit=implicit)
    settings = next_hop.settings(**{**more, **({"SMTP_RELAY_TLS": tls} if tls else {})})
    if "SMTP_RELAY_CA_FILE" in more:
        settings["SMTP_RELAY_CA_FILE"] = pairs[more["SMTP_RELAY_CA_FILE"]].cert
    said(start(**settings))
    if secure is None:
        wait_until(lambda: next_hop.connections >= 2)
        assert [line for line in next_hop.commands if line.upper().startswith("MAIL")] == []
        assert spool.await_status("retrying")["attempts"] == 0
    else:
        spool.await_status("forwarded")
        assert [got.secure for got in next_hop.messages] == [secure]


@pytest.mark.parametrize(
    ("methods", "asked", "used"),
    [
        ("PLAIN LOGIN CRAM-MD5", "plain", "PLAIN"),
        ("PLAIN LOGIN CRAM-MD5", "login", "LOGIN"),
        ("PLAIN LOGIN CRAM-MD5", "cram-md5", "CRAM-MD5"),
        ("LOGIN", "auto", "LOGIN"),
        ("PLAIN", "auto", "PLAIN"),
        ("LOGIN", "", "LOGIN"),
    ],
)
def test_login_at_the_next_hop(
    start: Callable[..., Any], hop: Callable[..., FakeHop], methods: str, asked: str, used: str
) -> None:
    next_hop = hop(users={"ann": "pass word"}, methods=methods)
    login = {"SMTP_RELAY_USERNAME": "ann", "SMTP_RELAY_PASSWORD": "pass word"}
    said(start(**next_hop.settings(), **login, **({"SMTP_RELAY_AUTH": asked} if asked else {})))
    wait_until(lambda: next_hop.messages)
    assert next_hop.logins == [(used, "ann")]


def test_a_refused_login_is_the_hosts_trouble(
    start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]
) -> None:
    next_hop, login = hop(users={"ann": "new"}), {"SMTP_RELAY_USERNAME": "ann", "SMTP_RELAY_PASSWORD": "old"}
    said(start(SMTP_RETRY_MAX_ATTEMPTS="1", **next_hop.settings(), **login))
    wait_until(lambda: len(next_hop.logins) >= 2)
    assert next_hop.users
    next_hop.users["ann"] = "old"
    assert Spool(tmp_path / "spool").await_status("forwarded")["attempts"] == 1


def test_connections_are_reused_and_a_lost_one_costs_nothing(
    start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]
) -> None:
    spool, next_hop = (
        Spool(tmp_path / "spool"),
        hop(script={"end": ["250 2.0.0 ok", "250 2.0.0 ok", "drop 250 2.0.0 bye"]}),
    )
    relay = start(SMTP_WORKERS="1", SMTP_RELAY_CONNECTIONS="1", SMTP_RETRY_MAX_ATTEMPTS="1", **next_hop.settings())
    for _ in range(4):
        spool.await_status("forwarded", said(relay)[0])
    assert next_hop.connections == 2
    assert next_hop.delivered() == {"bob@hop.test": 3}  # the third got its 250 as the connection went


def test_many_messages_arrive_once_each(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop()
    relay = start(**next_hop.settings())
    said(relay, *[b"Subject: %d\r\n\r\n" % number for number in range(60)])
    wait_until(lambda: len(next_hop.messages) >= 60)
    wait_until(lambda: metric(relay, "smtp_messages_delivered_total") == 60)
    assert len({got.content.split(b"Subject: ")[1] for got in next_hop.messages}) == len(next_hop.messages) == 60
    assert next_hop.connections <= 4


QUICK_LANES = {
    "SMTP_RETRY_INITIAL_DELAY": "10ms",
    "SMTP_RETRY_MAX_DELAY": "50ms",
    "SMTP_RETRY_JITTER": "0",
    "SMTP_HOSTNAME": "relay.test",
}


def send_to(
    relay: smtprelay.Relay,
    *to: str,
    sender: str = "me@here.test",
    content: bytes = b"Subject: hi\r\n\r\nhello\r\n",
    mail: list[str] | None = None,
    rcpt: list[str] | None = None,
) -> str:
    with smtplib.SMTP(relay.host, relay.port, timeout=5) as client:
        client.sendmail(sender, list(to), content, mail or [], rcpt or [])
    return newest(relay)


def newest(relay: smtprelay.Relay) -> str:
    return max(stem for stem, _ in relay.parts.spool.names())


def record_of(relay: smtprelay.Relay, stem: str) -> smtprelay.Message:
    return relay.parts.spool.load(stem)


def statuses(relay: smtprelay.Relay, stem: str) -> dict[str, str]:
    return {r.address.partition("@")[0]: r.status.value for r in record_of(relay, stem).recipients}


def finished(relay: smtprelay.Relay, stem: str, timeout: float = 10.0) -> smtprelay.Message:
    """Wait until a message is finished; its record is whole by then."""

    def last() -> smtprelay.Message | None:
        record = record_of(relay, stem)
        return record if record.status in smtprelay.FINISHED else None

    return wait_until(last, timeout, lambda: record_of(relay, stem))


@contextlib.contextmanager
def relaying(*hops: FakeHop | str, **settings: str) -> Iterator[smtprelay.Relay]:
    places = ",".join(h if isinstance(h, str) else h.place for h in hops)
    with smtprelay.start(
        **{**QUICK_LANES, "SMTP_RELAY_HOST": places, "SMTP_RELAY_REPLY_TIMEOUT": "300ms", **settings}
    ) as relay:
        yield relay


# -- every failure at every stage --

HOST, LATER, NEVER, DONE = "host", "retrying", "failed", "forwarded"
SILENT = ("drop", "reset", "hang", "drip", "garbage", "raw \\xff\\x00\\r\\n", "long", "endless 250-more\\r\\n", "endless x")
TABLE = [
    *((stage, how, HOST) for stage in ("greeting", "ehlo") for how in (*SILENT, "421 going", "drop 421 bye", "554 no")),
    *(("mail", how, LATER) for how in (*SILENT, "451 later")),
    *((stage, how, LATER) for stage in ("mail", "rcpt", "data", "end") for how in ("421 going", "drop 421 bye")),
    ("mail", "530 log in", HOST),
    ("mail", "550 no", NEVER),
    *(("rcpt", how, LATER) for how in (*SILENT, "450 grey", "452 many", "552 many")),
    ("rcpt", "550 no", NEVER),
    *(("data", how, LATER) for how in (*SILENT, "451 later")),
    ("data", "554 no", NEVER),
    *(("end", how, LATER) for how in (*SILENT, "451 later", "452 full")),
    ("end", "554 spam", NEVER),
]


@pytest.mark.parametrize("row", TABLE, ids=" ".join)
def test_what_a_failure_means(row: tuple[str, str, str]) -> None:
    """The first time it goes wrong, then it goes well; a host's trouble is no attempt of the message."""
    stage, how, meaning = row
    extension = ("PIPELINING", "8BITMIME")[TABLE.index(row) % 2]
    with FakeHop({stage: [how]}, extension) as hop, relaying(hop, SMTP_BOUNCE="0", SMTP_RELAY_REPLY_TIMEOUT="120ms") as relay:
        message = finished(relay, send_to(relay, "bob@there.test"))
        assert message.status.value == (NEVER if meaning == NEVER else DONE)
        assert message.attempts == (2 if meaning == LATER else 1)
        assert len(hop.mails) == (0 if meaning == NEVER else 1)


def test_one_recipient_fails_alone() -> None:
    script = {"rcpt grey@x.test": ["450 later"], "rcpt no@x.test": "550 5.1.1 no such user"}
    with FakeHop(script) as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        stem = send_to(relay, "yes@x.test", "grey@x.test", "no@x.test")
        message = finished(relay, stem)
        assert statuses(relay, stem) == {"yes": DONE, "grey": DONE, "no": NEVER}
        assert [rs for rs, _ in hop.mails] == [["yes@x.test"], ["grey@x.test"]]
        assert message.recipients[2].reply == "5.1.1 no such user"


def test_the_transcript_is_kept_and_shows_no_secret() -> None:
    with (
        FakeHop({"mail": ["451 4.7.1 come back"]}, users={"app": "geheim"}, methods="PLAIN") as hop,
        relaying(hop, SMTP_RELAY_USERNAME="app", SMTP_RELAY_PASSWORD="geheim") as relay,
    ):
        lines = finished(relay, send_to(relay, "bob@x.test")).transcript
        assert "S: 451 4.7.1 come back" in lines and "C: AUTH PLAIN ***" in lines
        assert lines[0].startswith("-- 2") and lines[0].endswith(hop.place)
        assert sum(line.startswith("-- ") for line in lines) == 2


# -- next hops as they are --


def taken(*hops: FakeHop) -> list[list[str]]:
    """Who got something from each next hop."""
    return [sorted(address.partition("@")[0] for address in one.delivered().elements()) for one in hops]


@pytest.mark.parametrize("offers", ["PIPELINING", ""], ids=["pipelined", "plain"])
@pytest.mark.parametrize(("stage", "reply"), [
    ("greeting", "raw 221 odd\\r\\n"), ("ehlo", "raw 251-hop.test\\r\\n251 PIPELINING\\r\\n"), ("mail", "251 ok"),
    ("rcpt", "252 maybe"), ("rcpt", "251 one\n251 two"), ("end", "252 taken"), ("end", "200 one\n200 two"),
])  # fmt: skip
def test_replies_are_judged_by_their_first_digit(offers: str, stage: str, reply: str) -> None:
    with FakeHop({stage: reply}, offers) as hop, relaying(hop) as relay:
        message = finished(relay, send_to(relay, "bob@x.test"))
        assert (message.status.value, message.attempts) == (DONE, 1)
        assert len(hop.messages) == 1 and hop.messages[0].content.endswith(b"hello\r\n") and not hop.refused


@pytest.mark.parametrize("script", [{"rcpt": "550 5.1.1 who?"}, {"rcpt": ["450 later"]}, {"mail": ["451 later"]}])
def test_content_that_nobody_is_to_have_is_never_ended(script: Script) -> None:
    """With PIPELINING, DATA may be answered 354 though no recipient was taken: a lone dot would be an empty message."""
    with FakeHop({**script, "data": ["354 go on"]}) as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        message = finished(relay, send_to(relay, "bob@x.test"))
        assert all(got.content.endswith(b"hello\r\n") for got in hop.messages + hop.refused)
        assert len(hop.messages) == (message.status.value == DONE) and "" not in hop.commands
        assert hop.connections == len(hop.messages) + 1


def test_patience_is_for_each_reply() -> None:
    slow = {stage: [f"slow 100 {reply}"] for stage, reply in (
        ("greeting", "220 hop.test"), ("ehlo", "250 hop.test"), ("mail", "250 ok"), ("rcpt", "250 ok"), ("data", "354 go"))}
    times = {"SMTP_RELAY_TIMEOUT": "80ms", "SMTP_RELAY_REPLY_TIMEOUT": "400ms"}
    with FakeHop({**slow, "end": ["slow 500 250 ok"]}, "") as hop, relaying(hop, **times) as relay:
        assert finished(relay, send_to(relay, "bob@x.test")).attempts == 1
        assert (len(hop.messages), hop.connections) == (1, 1)


@pytest.mark.parametrize("how", ["421 4.3.2 not that one", "drop 421 no", "drop"])
def test_421_for_one_message_holds_up_no_other(how: str) -> None:
    with FakeHop({"rcpt bad@x.test": how}) as hop, relaying(hop, SMTP_RETRY_INITIAL_DELAY="20s",
                                                           SMTP_RETRY_MAX_DELAY="20s") as relay:
        bad = send_to(relay, "bad@x.test")
        for name in "abcde":
            finished(relay, send_to(relay, f"{name}@x.test"))
        record = record_of(relay, bad)
        assert (record.status.value, record.attempts) == (LATER, 1)
        assert not any(lane.steps for lane in relay.delivering.scheduler.lanes.values())


SECOND = [  # what the first host does, who gets it there, who at the second host, and what becomes of a and b
    ({"greeting": "421 busy"}, "", "ab", DONE, DONE),
    ({"mail": "451 later"}, "", "ab", DONE, DONE),
    ({"rcpt a@x.test": "450 grey"}, "b", "a", DONE, DONE),
    ({"rcpt a@x.test": "550 no"}, "b", "", NEVER, DONE),
    ({"rcpt a@x.test": "550 no", "rcpt b@x.test": "421 going"}, "", "b", NEVER, DONE),
    ({"rcpt": "drop"}, "", "ab", DONE, DONE),
    ({"data": "451 later"}, "", "ab", DONE, DONE),
    ({"data": "drop"}, "", "ab", DONE, DONE),
    ({"end": "451 later"}, "", "ab", DONE, DONE),
    ({"end": "drop"}, "", "", LATER, LATER),  # it may have been taken
    ({"end": "354 go on"}, "", "", LATER, LATER),  # and so may this
    ({"end": "554 spam"}, "", "", NEVER, NEVER),
    ({"mail": "550 no"}, "", "", NEVER, NEVER),
    ({"ehlo": "raw 250-hop\r\n250 SIZE 40\r\n"}, "", "ab", DONE, DONE),
]


@pytest.mark.parametrize("row", SECOND, ids=lambda row: str(row[0]))
def test_the_second_host_is_asked_for_those_concerned(row: tuple[Script, str, str, str, str]) -> None:
    script, first, second, *ends = row
    with FakeHop(script) as one, FakeHop() as two, relaying(one, two, SMTP_RETRY_INITIAL_DELAY="1h", SMTP_BOUNCE="0") as relay:
        stem = send_to(relay, "a@x.test", "b@x.test")
        wait_until(lambda: list(statuses(relay, stem).values()) == ends, shown=lambda: record_of(relay, stem))
        assert taken(one, two) == [[*first], [*second]]
        assert record_of(relay, stem).attempts == 1


SMALL: Script = {"ehlo": "raw 250-hop\r\n250 SIZE 40\r\n"}
AWAY: Script = {"greeting": "554 no"}


@pytest.mark.parametrize(("first", "second"), [(SMALL, SMALL), (SMALL, AWAY), (AWAY, SMALL)], ids=range(3))
def test_what_no_host_can_take_is_refused_for_good_and_only_then(first: Script, second: Script) -> None:
    with FakeHop(first) as one, FakeHop(second) as two, relaying(one, two, SMTP_BOUNCE="0") as relay:
        stem = send_to(relay, "a@x.test")
        record = wait_until(lambda: record_of(relay, stem).attempts and record_of(relay, stem))
        assert (record.status.value == NEVER, record.recipients[0].code == 552) == (first == second,) * 2


@pytest.mark.parametrize("said", ["SIZE \xc2\xb2", "SIZE " + "9" * 4400, "SIZE", "SIZE -1", "LIMITS RCPTMAX=" + "9" * 4400], ids=range(5))
def test_numbers_from_outside_have_a_bound(said: str) -> None:
    with FakeHop({"ehlo": f"raw 250-hop\r\n250 {said}\r\n"}) as hop, relaying(hop) as relay:
        assert finished(relay, send_to(relay, "a@x.test")).attempts == 1


@pytest.mark.parametrize("offers", ["PIPELINING LIMITS=RCPTMAX=2", "LIMITS=RCPTMAX=2"])
def test_a_limit_of_recipients_means_several_transactions(offers: str) -> None:
    with FakeHop(offers=offers) as hop, relaying(hop) as relay:
        assert finished(relay, send_to(relay, *(f"{name}@x.test" for name in "abcde"))).attempts == 1
        assert [len(rcpts) for rcpts, _ in hop.mails] == [2, 2, 1] and hop.connections == 1


def test_a_provider_is_known_to_have_a_limit() -> None:
    assert smtprelay.recipient_limit("email-smtp.eu-west-1.amazonaws.com") == 50
    assert not smtprelay.recipient_limit("mail.example.com")


@pytest.mark.parametrize("how", ["421 4.7.0 enough", "451 4.7.0 enough", "drop 421 enough", "drop"])
def test_a_connection_that_has_had_its_fill_is_replaced_at_once(how: str) -> None:
    class Ten(FakeHop):
        def next_act(self, stages: list[str], usual: str) -> str:
            session = sum(got.connection == self.connections for got in self.messages)
            return how if stages == ["mail"] and session >= 10 else super().next_act(stages, usual)

    with Ten() as hop, relaying(hop, SMTP_RELAY_CONNECTIONS="1", SMTP_RETRY_INITIAL_DELAY="1h") as relay:
        for i in range(45):
            send_to(relay, f"u{i}@x.test")
        wait_until(lambda: len(hop.messages) == 45)
        assert hop.connections == 5 and set(hop.delivered().values()) == {1}
        wait_until(lambda: {record_of(relay, stem).attempts for stem, _ in relay.parts.spool.names()} == {1})


@pytest.mark.parametrize("offers", ["PIPELINING", ""], ids=["pipelined", "plain"])
def test_a_stray_answer_is_never_taken_for_that_to_the_next_command(offers: str) -> None:
    script = {"end": ["raw 250 one\\r\\n250 two\\r\\n"], "rcpt no@x.test": "550 5.1.1 who?"}
    with FakeHop(script, offers) as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        finished(relay, send_to(relay, "a@x.test"))
        stem = send_to(relay, "yes@x.test", "no@x.test")
        assert (finished(relay, stem).attempts, statuses(relay, stem)) == (1, {"yes": DONE, "no": NEVER})
        assert hop.connections == 2
    script = {"rcpt a@x.test": ["raw 550 5.1.1 who?\\r\\n550 5.1.1 who?\\r\\n"]}
    with FakeHop(script, offers) as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        stem = send_to(relay, "a@x.test", "b@x.test")
        finished(relay, stem)
        assert statuses(relay, stem)["b"] == DONE and hop.delivered()["b@x.test"] == 1


def test_a_reset_that_is_refused_is_no_verdict_on_the_next_message() -> None:
    script = {"rcpt no@x.test": "550 5.1.1 who?", "rset": "502 5.5.1 what?"}
    with FakeHop(script, "") as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        finished(relay, send_to(relay, "no@x.test"))
        assert finished(relay, send_to(relay, "yes@x.test")).attempts == 1
        assert hop.delivered() == {"yes@x.test": 1} and hop.connections == 2


def test_content_that_breaks_off_is_an_outcome(log: Caught, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeHop({"data": ["drop 354 go on"]}) as hop, relaying(hop) as relay:
        assert finished(relay, send_to(relay, "a@x.test", content=b"\r\n" + b".\r\n" * 100_000)).attempts == 2
    whole, calls = smtprelay.Outgoing.blocks, itertools.count()

    def blocks(content: smtprelay.Outgoing) -> Iterable[bytes]:
        if next(calls) == 1:
            raise smtprelay.SpoolError("was altered")
        return whole(content)

    monkeypatch.setattr(smtprelay.Outgoing, "blocks", blocks)
    with FakeHop(offers="LIMITS=RCPTMAX=1") as hop, relaying(hop, SMTP_RELAY_REPAIR="0") as relay:
        finished(relay, send_to(relay, "a@x.test", "b@x.test"))
        assert hop.delivered() == {"a@x.test": 1, "b@x.test": 1}
    assert not [line for line in log.lines if "attempt_bug" in line]


@pytest.mark.parametrize("reply", ["454 4.7.0 not now", "502 5.5.1 what?"])
def test_a_refused_starttls_means_plaintext_where_tls_is_not_required(reply: str) -> None:
    script = zone(a_x_test="127.0.0.2")
    with FakeHop({"starttls": reply}, "STARTTLS", host="127.0.0.2") as hop, by_mx(hop.port, script) as relay:
        assert finished(relay, send_to(relay, "bob@x.test")).recipients[0].tls == "" and len(hop.mails) == 1


def test_a_machine_without_a_full_name_says_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "raspberrypi")
    with FakeHop() as hop, relaying(hop, SMTP_HOSTNAME="") as relay:
        finished(relay, send_to(relay, "bob@x.test"))
        assert hop.commands[0] == "EHLO [127.0.0.1]"
        assert any("raspberrypi is no full name" in line for line in smtprelay.first_lines(relay.parts))
        found = smtprelay.examine_dialogue(relay.settings, smtprelay.Target(hop.host, hop.port, "none"))
        assert any("EHLO [127.0.0.1]" in str(finding) for finding in found)
    with FakeHop() as hop, relaying(hop, SMTP_HOSTNAME="mail") as relay:
        finished(relay, send_to(relay, "bob@x.test"))
        assert hop.commands[0] == "EHLO mail"


@pytest.mark.parametrize("reply", [
    "504 5.5.2 <relay.test>: Helo command rejected: need fully-qualified hostname", "550 5.7.1 Invalid HELO name",
    "504 5.5.2 <relay.test>: need fully-qualified hostname"])  # fmt: skip
def test_what_a_host_has_against_our_name_is_no_verdict_on_a_recipient(reply: str) -> None:
    with FakeHop({"rcpt": [reply]}) as hop, relaying(hop) as relay:
        message = finished(relay, send_to(relay, "bob@x.test"))
        assert (message.status.value, message.attempts) == (DONE, 1)
        one = smtprelay.NextHop(settings_of(), smtprelay.Target(hop.host, hop.port, "none"), smtprelay.Log(os.devnull))
        assert one.judge("rcpt", 504, "<bob>: need fully-qualified address").status is smtprelay.Status.FAILED


UTF8 = [  # sender, header, who gets it at a host without SMTPUTF8, and as whom
    ("ann@x.test", "Subject: hi", ["b@x.test", "c@xn--bcher-kva.test"]),
    ("ann@b\u00fccher.test", "Subject: hi", ["b@x.test", "c@xn--bcher-kva.test"]),
    ("\u00e4nn@x.test", "Subject: hi", []),
    ("ann@x.test", "Subject: h\u00ef", []),
]


@pytest.mark.parametrize(("sender", "head", "there"), UTF8)
def test_who_needs_no_smtputf8_gets_it_without(sender: str, head: str, there: list[str]) -> None:
    with FakeHop(offers="8BITMIME") as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        with hello(relay) as client:
            client.ask(f"MAIL FROM:<{sender}> SMTPUTF8", "250")
            for to in ("b@x.test", "c@b\u00fccher.test", "d\u00f6@x.test"):
                client.ask(f"RCPT TO:<{to}>", "250")
            client.content(f"{head}\r\n\r\nhello\r\n.\r\n".encode())
        stem = wait_until(lambda: newest(relay))
        assert [r.code for r in finished(relay, stem).recipients] == ([250, 250, 553] if there else [553] * 3)
        assert [rcpts for rcpts, _ in hop.mails] == ([there] if there else [])
        assert not there or hop.messages[0].mail.startswith("MAIL FROM:<ann@") and hop.messages[0].mail.isascii()


LOGINS_TRIED = [  # methods offered, script, what is said
    ("PLAIN LOGIN", {"auth": ["504 5.5.4 not that"]}, ["PLAIN", "LOGIN"]),
    ("CRAM-MD5 PLAIN LOGIN", {"auth": ["535 no", "534 no"]}, ["CRAM-MD5", "PLAIN", "LOGIN"]),
    ("=PLAIN", {}, ["PLAIN"]),
    ("LOGIN=", {}, ["LOGIN"]),
]


@pytest.mark.parametrize(("methods", "script", "said"), LOGINS_TRIED)
def test_a_mechanism_that_is_not_taken_is_followed_by_the_next(methods: str, script: Script, said: list[str]) -> None:
    offers = f"AUTH={methods.strip('=')}" if "=" in methods else ""
    with FakeHop(dict(script), users={"u": "p w"}, methods="X" if offers else methods) as hop:
        if offers:
            hop.script["ehlo"] = f"raw 250-hop\r\n250 {offers}\r\n"
        with relaying(hop, SMTP_RELAY_USERNAME="u", SMTP_RELAY_PASSWORD="p w") as relay:
            assert finished(relay, send_to(relay, "b@x.test")).attempts == 1
            assert [method for method, _ in hop.logins] == said and hop.connections == 1


def test_a_challenge_after_an_initial_response_is_answered() -> None:
    script: Script = {"auth": ["334 "]}
    plain = base64.b64encode(b"\0u\0p").decode()
    script[plain.lower()] = "235 2.7.0 ok"
    with FakeHop(script, "AUTH=PLAIN") as hop, relaying(hop, SMTP_RELAY_USERNAME="u", SMTP_RELAY_PASSWORD="p") as relay:
        finished(relay, send_to(relay, "b@x.test"))
        assert hop.commands[1:3] == [f"AUTH PLAIN {plain}", plain]


def test_a_limit_of_connections_is_no_trouble() -> None:
    class Two(FakeHop):
        def next_act(self, stages: list[str], usual: str) -> str:
            if stages == ["greeting"] and self.connections > 1:
                return "drop 421 4.7.0 too many connections"
            return super().next_act(stages, usual)

    more = {"SMTP_RETRY_INITIAL_DELAY": "1h", "SMTP_RELAY_REPLY_TIMEOUT": "2s"}
    with Two({"end": "slow 100 250 ok"}) as hop, relaying(hop, **more) as relay:
        stems = [send_to(relay, f"u{i}@x.test") for i in range(6)]
        for stem in stems:
            assert finished(relay, stem).attempts == 1
        assert set(hop.delivered().values()) == {1} and len(hop.messages) == 6


def test_a_verdict_in_the_middle_of_the_content_is_read() -> None:
    more = {"SMTP_MAX_SIZE": "50MiB", "SMTP_BOUNCE": "0"}
    with FakeHop({"middle": ["slow 50 552 5.3.4 too big"]}) as hop, relaying(hop, **more) as relay:
        big = b"Subject: big\r\n\r\n" + b"x" * 70 + b"\r\n" + (b"y" * 76 + b"\r\n") * 200_000
        stem = send_to(relay, "b@x.test", content=big)
        wait_until(lambda: record_of(relay, stem).recipients[0].code == 552, shown=lambda: record_of(relay, stem))
        assert finished(relay, stem).status.value == NEVER and hop.connections == 1


def test_no_command_of_ours_becomes_two() -> None:
    with FakeHop() as hop:
        settings = settings_of(SMTP_RELAY_HOST=hop.place, SMTP_RELAY_TLS="none")
        log = smtprelay.Log(logging.getLogger("x"))
        for bad in ("a@x.test>\r\nRCPT TO:<evil@x.test", "a@x.test\n", "a\0@x.test"):
            for sender, to in ((bad, "b@x.test"), ("me@x.test", bad)):
                one = smtprelay.NextHop(settings, smtprelay.Target(hop.host, hop.port, "none"), log)
                one.open()
                people = [smtprelay.Recipient(to), smtprelay.Recipient("good@x.test")]
                record = smtprelay.Message("", smtprelay.Status.RECEIVED, "", sender, people)
                outcomes: dict[str, smtprelay.Outcome] = {}
                one.transaction(record, people, smtprelay.Outgoing(io.BytesIO(MAIL)), outcomes)
                assert outcomes[to].status is smtprelay.Status.FAILED
                with pytest.raises(smtprelay.Trouble):
                    one.ask("mail", b"VRFY x\r\nQUIT")
                one.close()
        assert taken(hop) == [["good"] * 3] and not [c for c in hop.commands if "evil" in c]


def test_no_tls_context_is_made_where_no_tls_is_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(smtprelay, "client_context", lambda *_: made.append(1))
    with FakeHop() as hop, relaying(hop) as relay:
        finished(relay, send_to(relay, "b@x.test"))
        assert not made


def test_what_is_avoided_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "SLOW", -1.0)
    monkeypatch.setattr(smtprelay, "AVOID_TIME", 0.0)
    settings = settings_of(SMTP_RELAY_HOST="h", SMTP_RELAY_TIMEOUT="1s")
    delivery = smtprelay.Delivery(settings, smtprelay.Log(logging.getLogger("x")), mock.Mock())
    record = smtprelay.Message("", smtprelay.Status.RECEIVED, "", "", [smtprelay.Recipient("a@x.test")])
    parcel = record.recipients, smtprelay.Outgoing(io.BytesIO(MAIL))
    for i in range(9):
        delivery.try_each([smtprelay.Target("127.0.0.1", 1, "none", ip=f"127.0.0.{i + 1}")], record, [parcel], lambda: None)
    assert len(delivery.avoided) < 5


# -- what is sent, and to whom, by the settings --


def through(content: bytes, offers: str = "8BITMIME", to: tuple[str, ...] = ("b@x.test",), sender: str = "me@here.test",
            **settings: str) -> Got:  # fmt: skip
    with FakeHop(offers=f"SIZE {offers}") as hop, relaying(hop, **settings) as relay:
        send_to(relay, *to, content=content, sender=sender)
        got = wait_until(lambda: hop.messages)[0]
        assert f"SIZE={len(got.content)}" in got.mail
        return Got(*got)


def beyond_trace(content: bytes) -> bytes:
    """What follows our Received."""
    return re.sub(rb"^Received:[^\n]*\n(?:[ \t][^\n]*\n)*", b"", content)


LACKING = [  # what came, whether Message-ID and Date are added, whether an empty line is
    (b"Subject: x\r\n\r\nbody\r\n", "both", False),
    (b"Date: now\r\nmessage-id: <1@x>\r\n\r\nbody\r\n", "", False),
    (b"DATE: now\r\n\r\nMessage-ID: no header\r\n", "Message-ID", False),
    (b"Just text\r\nand more: text\r\n", "both", True),
    (b" folded?\r\n", "both", True),
    (b"\r\nbody\r\n", "both", False),
    (b"Subject: header alone\r\n", "both", False),
    (b"DKIM-Signature: v=1\r\nSubject: signed\r\n\r\nbody\r\n", "", False),
]


@pytest.mark.parametrize(("content", "added", "line"), LACKING)
def test_what_a_submission_lacks_is_added(content: bytes, added: str, line: bool) -> None:
    got = beyond_trace(through(content).content)
    names = {"both": ["Message-ID", "Date"], "": []}.get(added, [added])
    head = got[: len(got) - len(content)] if content else got
    assert got.endswith(content)
    assert re.findall(rb"(?m)^([\w-]+):", head) == [name.encode() for name in names]
    assert head.endswith(b"\r\n\r\n") == line
    assert through(content, SMTP_RELAY_REPAIR="0").content.endswith(b"+0000\r\n" + content)


def test_a_body_right_after_the_fields_gets_its_empty_line() -> None:
    content = b"Subject: x\r\n folded\r\nHello you\r\nbye: now\r\n"
    head, _, body = beyond_trace(through(content, SMTP_RELAY_FROM="me@g.test").content).partition(b"\r\n\r\n")
    assert body == b"Hello you\r\nbye: now\r\n" and re.search(rb"(?s)Message-ID:.*folded\r\nFrom: <me@g.test>", head)
    signed = b"DKIM-Signature: v=1\r\n" + content
    assert through(signed).content.endswith(signed)


WORDY = b"word " * 400
RECODED = [  # head, body, encoding in the end (of the first part that has one)
    (b"Content-Type: text/html", WORDY, "quoted-printable"),
    (b"Subject: plain", b"gr\xc3\xbc\xc3\x9fe", "quoted-printable"),
    (b"Subject: none", b"\xd0\xb6" * 2000, "base64"),
    (b"Content-Type: application/x\r\nContent-Transfer-Encoding: 8bit", b"\xff\xfe" * 30, "base64"),
    (b"Content-Transfer-Encoding: base64", base64.b64encode(b"x" * 3000), "base64"),
    (b"Content-Type: text/plain\r\nContent-Transfer-Encoding: quoted-printable", b"=41" * 600, "quoted-printable"),
    (b'Content-Type: multipart/mixed; boundary="b"\r\nContent-Transfer-Encoding: 8bit',
     b"--b\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\ngr\xc3\xbc\xc3\x9fe\r\n"
     b"--b\r\nContent-Type: message/rfc822\r\n\r\nSubject: in\r\n\r\n" + WORDY + b"\r\n--b--\r\nend", "quoted-printable"),
]  # fmt: skip


def test_a_long_header_is_folded_and_a_body_left_alone() -> None:
    content = b"Subject: x\r\nReferences: " + b"<1234567@x.test> " * 99 + b"\r\n\r\nbody\r\n"
    got = through(content).content
    assert max(map(len, got.split(b"\r\n"))) <= 998 and got.endswith(b"\r\n\r\nbody\r\n")
    assert re.sub(rb"\r\n(?= )", b"", got).endswith(content.partition(b"\r\n")[2])


def texts(content: bytes) -> list[bytes]:
    """What a reader gets of each leaf."""
    leaves = [part for part in email.message_from_bytes(content).walk() if not part.is_multipart()]
    return [bytes(part.get_payload(decode=True)).rstrip() for part in leaves]


@pytest.mark.parametrize(("head", "body", "encoding"), RECODED, ids=range(len(RECODED)))
def test_long_lines_and_8_bits_are_encoded(head: bytes, body: bytes, encoding: str) -> None:
    content = head + b"\r\n\r\n" + body + b"\r\n"
    got = through(content, offers="").content
    assert got.isascii() and max(map(len, got.split(b"\r\n"))) <= 998 and b"\n" not in got.replace(b"\r\n", b"")
    assert texts(got) == texts(content) and f"Content-Transfer-Encoding: {encoding}".encode() in got
    assert b"Content-Transfer-Encoding: 8bit" not in got
    assert b"MIME-Version: 1.0" in got or encoding.encode() in head or b"multipart" in head
    assert beyond_trace(through(content, offers="", SMTP_RELAY_REPAIR="0").content) == content


def test_parts_beyond_measure_stay_as_they_are() -> None:
    head, part = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n", b"--b\r\n\r\n\xff\r\n"
    got = through(head + part * (smtprelay.PARTS_MOST + 100) + b"--b--\r\n", offers="").content
    assert got.count(part) == 100 and got.endswith(part * 100 + b"--b--\r\n") and got.count(b"=FF") == smtprelay.PARTS_MOST


@pytest.mark.parametrize("content", [
    b"Content-Type: multipart/signed; boundary=b\r\n\r\n--b\r\n\r\n" + WORDY + b"\xff\r\n--b--\r\n",
    b"DKIM-Signature: v=1\r\nSubject: x\r\n\r\n" + WORDY + b"\xff\r\n",
    b"Content-Type: message/rfc822\r\n\r\nDKIM-Signature: v=1\r\n\r\n" + WORDY + b"\xff\r\n",
    b"Content-Type: multipart/mixed\r\n\r\n" + WORDY + b"\xff\r\n",
])  # fmt: skip
def test_what_is_signed_stays_as_it_is_with_a_line_in_the_log(content: bytes, log: Caught) -> None:
    assert through(content, offers="").content.endswith(content.partition(b"\r\n\r\n")[2])
    assert any("sent_as_it_came" in line for line in log.lines)


def test_content_that_needs_no_repair_is_not_read_into_memory() -> None:
    big = io.BytesIO(b"Received: x\r\nDate: x\r\nMessage-ID: x\r\n\r\n" + (b"y" * 76 + b"\r\n") * 130_000)
    delivery = smtprelay.Delivery(settings_of(SMTP_RELAY_HOST="h"), smtprelay.Log(logging.getLogger("x")), mock.Mock())
    record = smtprelay.Message("0" * 16, smtprelay.Status.RECEIVED, "", "", [], len(big.getvalue()) - 13)
    tracemalloc.start()
    try:
        content = delivery.content(record, big, [])
        assert sum(map(len, content.blocks())) == content.size == len(big.getvalue())
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20  # of 10 MiB, with what other threads take
    finally:
        tracemalloc.stop()


AUTHORS_SEEN = [  # From as it came, as it leaves, Reply-To
    (b"From: root@pi", b"From: <me@g.test>", b"Reply-To: root@pi"),
    (b"From: root@pi (Cron Daemon)", b"From: Cron Daemon <me@g.test>", b"Reply-To: root@pi (Cron Daemon)"),
    (b'From: "Acme, Inc."\r\n <a@x.test>', b'From: "Acme, Inc." <me@g.test>', b'Reply-To: "Acme, Inc."\r\n <a@x.test>'),
    (b"From: =?utf-8?q?J=C3=B6rg?= <j@x.test>", b"From: =?utf-8?q?J=C3=B6rg?= <me@g.test>", b"Reply-To: =?utf-8?q?J"),
    (b"From: a@x.test, B <b@x.test>", b"From: <me@g.test>", b"Reply-To: a@x.test, B <b@x.test>"),
    (b"From: A <a@x.test>\r\nReply-To: r@x.test", b"From: A <me@g.test>", b"Reply-To: r@x.test"),
    (b"From: Me <ME@g.test>", b"From: Me <me@g.test>", b""),
    (b"X-No: author", b"From: <me@g.test>", b""),
]


@pytest.mark.parametrize(("came", "leaves", "reply_to"), AUTHORS_SEEN)
def test_relay_from_replaces_the_author(came: bytes, leaves: bytes, reply_to: bytes) -> None:
    content = came + b"\r\nSubject: x\r\nDate: x\r\nMessage-ID: <x>\r\n\r\nFrom: body\r\n"
    got = through(content, SMTP_RELAY_FROM="me@g.test")
    head, _, body = got.content.partition(b"\r\n\r\n")
    assert head.count(b"\r\nFrom:") == 1 and leaves + b"\r\n" in head + b"\r\n" and body == b"From: body\r\n"
    assert reply_to in head and head.count(b"Reply-To:") == bool(reply_to)
    assert got.mail.startswith("MAIL FROM:<me@g.test>")
    assert through(content, sender="", SMTP_RELAY_FROM="me@g.test").mail.startswith("MAIL FROM:<>")


ALIASES = f"""
# a comment
root: me@g.test
postmaster: root
"web master": "one@x.test",
    two@x.test
loop: pool
pool: loop
keep: keep, copy@x.test
program: |/bin/false
both: ann@elsewhere.test, ann
ann: ann@x.test
twice: ann, team
team: ann, bill
many: {", ".join(f"u{i}@x.test" for i in range(120))}, ann
"""
LOCALS = [  # recipient, SMTP_LOCAL_TO, where it goes
    ("root@relay.test", "", ["me@g.test"]),
    ("Postmaster@RELAY.test", "", ["me@g.test"]),
    ('"web master"@relay.test', "", ["one@x.test", "two@x.test"]),
    ("loop@relay.test", "", ["loop@relay.test"]),
    ("loop@relay.test", "all@g.test", ["all@g.test"]),
    ("keep@localhost", "all@g.test", ["all@g.test", "copy@x.test"]),
    ("nobody@relay.test", "all@g.test", ["all@g.test"]),
    ("nobody@relay.test", "", ["nobody@relay.test"]),
    ("program@relay.test", "all@g.test", ["all@g.test"]),
    ("root@elsewhere.test", "all@g.test", ["root@elsewhere.test"]),
    ("root", "", ["me@g.test"]),
    ("both", "", ["ann@elsewhere.test", "ann@x.test"]),
    ("twice", "all@g.test", ["ann@x.test", "all@g.test"]),
    ("team@relay.test", "", ["ann@x.test", "bill@relay.test"]),
    ("many", "", [*(f"u{i}@x.test" for i in range(120)), "ann@x.test"]),
]


@pytest.mark.parametrize(("address", "local_to", "expected"), LOCALS)
def test_mail_for_local_users(tmp_path: Path, address: str, local_to: str, expected: list[str]) -> None:
    (tmp_path / "aliases").write_text(ALIASES)
    given = {"SMTP_RELAY_HOST": "h", "SMTP_HOSTNAME": "relay.test", "SMTP_ALIASES": str(tmp_path / "aliases")}
    settings = settings_of(**given, **({"SMTP_LOCAL_TO": local_to} if local_to else {}))
    delivery = smtprelay.Delivery(settings, smtprelay.Log(logging.getLogger("x")), mock.Mock())
    assert sorted(delivery.finals(address)) == sorted(expected)


def test_local_mail_arrives_with_its_original_address_and_aliases_are_reread(tmp_path: Path) -> None:
    aliases = tmp_path / "aliases"
    aliases.write_text("root: one@x.test, two@x.test\n")
    script = {"rcpt two@x.test": ["450 later"]}
    with FakeHop(script) as hop, relaying(hop, SMTP_ALIASES=str(aliases), SMTP_LOCAL_TO="all@x.test") as relay:
        finished(relay, send_to(relay, "root@relay.test", "bob@x.test", "cron@relay.test"))
        assert hop.delivered() == {"one@x.test": 1, "two@x.test": 1, "bob@x.test": 1, "all@x.test": 1}
        original = {rcpts[0]: re.findall(rb"X-Original-To: (.*)\r", content) for rcpts, content in hop.mails}
        assert original == {"one@x.test": [b"root@relay.test"], "two@x.test": [b"root@relay.test"], "bob@x.test": [],
                            "all@x.test": [b"cron@relay.test"]}
        assert all(content.endswith(b"\r\n\r\nhello\r\n") for _, content in hop.mails)  # whole, each time
        aliases.write_text("root: three@x.test\n")
        finished(relay, send_to(relay, "root@relay.test"))
        assert hop.delivered()["three@x.test"] == 1


def test_an_alias_is_done_when_all_were_tried_and_one_has_it(tmp_path: Path) -> None:
    aliases = tmp_path / "aliases"
    aliases.write_text("a: a@x.test\nb: b@x.test\nc: c@x.test\nall: a, b\n")
    more = {"SMTP_ALIASES": str(aliases), "SMTP_BOUNCE": "0"}
    with FakeHop({"rcpt b@x.test": ["drop"]}, "") as hop, relaying(hop, **more) as relay:
        finished(relay, send_to(relay, *(f"{name}@relay.test" for name in "abc")))
        assert hop.delivered() == {"a@x.test": 1, "b@x.test": 1, "c@x.test": 1}
    for first in ("450 later", "550 who?"):
        with FakeHop({"rcpt b@x.test": [first] + ["550 who?"] * 9}) as hop, relaying(hop, **more) as relay:
            assert finished(relay, send_to(relay, "all@relay.test")).status.value == DONE
            assert hop.delivered() == {"a@x.test": 1}
    with FakeHop({"rcpt": "550 who?"}) as hop, relaying(hop, **more) as relay:
        stem = send_to(relay, "all@relay.test")
        assert finished(relay, stem).status.value == NEVER
        assert relay.delivering.delivery.finals_owed(record_of(relay, stem).recipients[0]) == ["a@x.test", "b@x.test"]


@pytest.mark.parametrize("targets", ["a@none.test, b@x.test", "b@x.test, a@none.test", "b@x.test, c@y.test"])
def test_an_alias_with_targets_in_several_lanes(tmp_path: Path, targets: str) -> None:
    (tmp_path / "aliases").write_text(f"all: {targets}\n")
    script = zone(mx_x_test="10 mx.test", a_mx_test="127.0.0.2", a_y_test="127.0.0.2")
    with (
        FakeHop({"rcpt b@x.test": ["450 later"], "rcpt c@y.test": "550 who?"}, host="127.0.0.2") as hop,
        by_mx(hop.port, script, SMTP_ALIASES=str(tmp_path / "aliases"), SMTP_BOUNCE="0") as relay,
    ):
        message = finished(relay, send_to(relay, "all@relay.test"))
        assert (message.status.value, hop.delivered()) == (DONE, {"b@x.test": 1})


# -- one dead next hop --


def test_a_dead_host_costs_one_connection_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        FakeHop({"greeting": ["554 no"] * 3}) as hop,
        relaying(hop, SMTP_RETRY_INITIAL_DELAY="100ms", SMTP_RETRY_MULTIPLIER="1") as relay,
    ):
        at_each_step: list[int] = []
        throttle = relay.delivering.scheduler.throttle

        def noted(name: str, reason: str) -> tuple[float, bool]:
            at_each_step.append(hop.connections)
            return throttle(name, reason)

        monkeypatch.setattr(relay.delivering.scheduler, "throttle", noted)
        with smtplib.SMTP(relay.host, relay.port) as client:
            for i in range(100):
                client.sendmail("me@here.test", [f"u{i}@x.test"], b"\r\nhello\r\n")
        wait_until(lambda: len(hop.mails) == 100)
        assert at_each_step == [1, 2, 3]
        assert hop.connections <= 3 + 4
        wait_until(lambda: {relay.parts.spool.load(stem).attempts for stem, _ in relay.parts.spool.names()} == {1})


def test_failover_and_back() -> None:
    with FakeHop({"greeting": ["421 busy"]}) as first, FakeHop() as second, relaying(first, second) as relay:
        assert finished(relay, send_to(relay, "a@x.test")).recipients[0].host == "127.0.0.1"
        assert (len(first.mails), len(second.mails)) == (0, 1)
        finished(relay, send_to(relay, "b@x.test"))
        assert (len(first.mails), len(second.mails)) == (1, 1)


def test_a_host_that_is_passed_over_is_named(log: Caught) -> None:
    with FakeHop({"greeting": ["421 busy"]}) as first, FakeHop() as second, relaying(first, second) as relay:
        transcript = finished(relay, send_to(relay, "a@x.test")).transcript
        (line,) = (line for line in log.lines if "next_hop_passed_over" in line)
        assert f"host={first.place} " in line and "421 busy" in line
        assert [line for line in transcript if line.startswith("!!")] == ["!! 127.0.0.1: 421 busy"]


@pytest.mark.parametrize("stage", ["greeting", "rcpt"])
def test_a_host_that_hangs_is_tried_last_for_a_while(stage: str) -> None:
    with (
        FakeHop({stage: ["hang"] * 9}) as first,
        FakeHop() as second,
        relaying(first, second, SMTP_RELAY_REPLY_TIMEOUT="1100ms") as relay,
    ):
        for to in "abc":
            finished(relay, send_to(relay, f"{to}@x.test"))
        assert (first.connections, len(second.mails)) == (1, 3)


def test_xoauth2_rereads_its_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    with (
        FakeHop({"auth": ["334 eyJzdGF0dXMiOiI0MDEifQ=="], "empty": ["535 5.7.8 expired"]}, "AUTH=XOAUTH2") as hop,
        relaying(
            hop,
            SMTP_RELAY_AUTH="xoauth2",
            SMTP_RELAY_USERNAME="me",
            SMTP_RELAY_PASSWORD_FILE=str(token),
            SMTP_RETRY_INITIAL_DELAY="200ms",
        ) as relay,
    ):
        stem = send_to(relay, "bob@x.test")
        wait_until(lambda: record_of(relay, stem).last_error)
        assert "535" in record_of(relay, stem).last_error
        token.write_text("new\n")
        finished(relay, stem)
        said = [smtprelay.base64.b64decode(c.split()[2]) for c in hop.commands if c.startswith("AUTH")]
        assert said == [b"user=me\1auth=Bearer old\1\1", b"user=me\1auth=Bearer new\1\1"]


# -- what is sent, and to whom --


def test_rewriting() -> None:
    with (
        FakeHop(offers="") as hop,
        relaying(hop, SMTP_RELAY_RETURN_PATH="bounces@here.test", SMTP_RELAY_REDIRECT_TO="dev@here.test") as relay,
    ):
        stem = send_to(relay, "a@x.test", "b@x.test")
        finished(relay, stem)
        assert statuses(relay, stem) == {"a": DONE, "b": DONE}
        assert hop.mails[0][0] == ["dev@here.test"]
        assert hop.mails[0][1].startswith(b"X-Original-To: a@x.test\r\nX-Original-To: b@x.test\r\nReceived: ")
        assert "MAIL FROM:<bounces@here.test>" in hop.commands
        finished(relay, send_to(relay, "c@x.test", sender=""))
        assert "MAIL FROM:<>" in hop.commands


def test_only_allowed_recipients_are_sent_to() -> None:
    with FakeHop() as hop, relaying(hop, SMTP_RELAY_ALLOWED_RECIPIENTS=r"@ok\.test$") as relay:
        stem = send_to(relay, "a@ok.test", "b@x.test")
        wait_until(lambda: record_of(relay, stem).status is smtprelay.Status.HELD)
        assert statuses(relay, stem) == {"a": DONE, "b": "held"}
        relay.delivering.release(record_of(relay, stem).id, [])
        finished(relay, stem)
        assert [rs for rs, _ in hop.mails] == [["a@ok.test"], ["b@x.test"]]


# -- MX mode --


def zone(**records: str) -> Callable[[bytes, str], list[bytes]]:
    """A DNS script: mx_<domain> and a_<host> with _ for dots; what is not named does not exist."""

    def script(query: bytes, transport: str) -> list[bytes]:
        name, kind = dns_question(query)
        key = {MX: "mx_", A: "a_"}.get(kind, "?") + name.replace(".", "_")
        values = records.get(key, "").split(",")
        if values == [""]:
            known = any(k.endswith("_" + name.replace(".", "_")) for k in records)
            return [dns_answer(query, flags=0x80 if known else 0x83)]
        return [] if values == ["silence"] else [dns_answer(query, *(dns_record(name, kind, v) for v in values))]

    return script


@contextlib.contextmanager
def by_mx(port: int, script: Callable[[bytes, str], list[bytes]], **settings: str) -> Iterator[smtprelay.Relay]:
    with FakeDns(script) as dns:
        more = {
            "SMTP_DELIVERY": "mx",
            "SMTP_MX_PORT": str(port),
            "SMTP_DNS_SERVER": smtprelay.host_port(*dns.server),
            "SMTP_RELAY_TIMEOUT": "500ms",
            "SMTP_RELAY_REPLY_TIMEOUT": "500ms",
        }
        with smtprelay.start(**{**QUICK_LANES, **more, **settings}) as relay:
            yield relay


def test_mail_goes_to_the_best_mx_that_answers() -> None:
    with (
        FakeHop({"greeting": "554 no"}, host="127.0.0.2") as first,
        FakeHop(host="127.0.0.3", port=first.port) as second,
        by_mx(
            first.port,
            zone(mx_x_test="10 mx1.test,20 mx2.test", a_mx1_test="127.0.0.2", a_mx2_test="127.0.0.3"),
        ) as relay,
    ):
        r = finished(relay, send_to(relay, "bob@x.test")).recipients[0]
        assert (r.host, r.ip, r.tls, r.verified) == ("mx2.test", "127.0.0.3", "", False)
        assert first.connections == 1 and len(second.mails) == 1


def test_domains_with_the_same_hosts_share_a_transaction_and_a_dead_one_holds_nobody() -> None:
    script = zone(
        mx_x_test="10 mx.test",
        mx_y_test="10 mx.test",
        mx_dead_test="10 dead.test",
        a_mx_test="127.0.0.2",
        a_dead_test="127.0.0.9",
        mx_null_test="0 ",
    )
    with FakeHop(host="127.0.0.2") as hop, by_mx(hop.port, script, SMTP_BOUNCE="0") as relay:
        stem = send_to(relay, "a@dead.test", "b@x.test", "c@y.test", "d@null.test", "e@none.test")
        wait_until(
            lambda: (
                list(statuses(relay, stem).values()) == ["retrying", DONE, DONE, NEVER, NEVER]
                or statuses(relay, stem)["a"] == "received"
                and list(statuses(relay, stem).values())[1:] == [DONE, DONE, NEVER, NEVER]
            )
        )
        assert hop.mails[0][0] == ["b@x.test", "c@y.test"]
        assert (
            record_of(relay, stem).status in (smtprelay.Status.RETRYING, smtprelay.Status.FORWARDING)
            and record_of(relay, stem).attempts == 1
        )
        wait_until(lambda: relay.delivering.scheduler.lanes["dead.test"].steps > 0)


def test_a_refusal_for_now_is_waited_out_in_each_lane() -> None:
    script = zone(mx_x_test="10 mx.test", mx_y_test="10 mx.test", a_mx_test="127.0.0.2")
    with (
        FakeHop({"rcpt": ["450 grey", "450 grey"]}, host="127.0.0.2") as hop,
        by_mx(hop.port, script) as relay,
    ):
        message = finished(relay, send_to(relay, "b@x.test", "c@y.test"))
        assert [r.attempts for r in message.recipients] == [2, 2]
        assert sum(c.startswith("RCPT") for c in hop.commands) == 4


def test_we_do_not_deliver_to_ourselves() -> None:
    with by_mx(
        0, zone(a_own_test="127.0.0.1", mx_named_test="5 relay.test", a_relay_test="127.0.0.5"), SMTP_BOUNCE="0"
    ) as relay:
        relay.delivering.delivery.settings = relay.parts.settings.but(mx_port=relay.port)
        for domain in ("own.test", "named.test"):
            message = finished(relay, send_to(relay, "bob@" + domain))
            assert message.status is smtprelay.Status.FAILED and "5.4.6" in message.last_error
    with (
        FakeHop({"ehlo": "250 RELAY.test"}, host="127.0.0.2") as hop,
        by_mx(hop.port, zone(a_x_test="127.0.0.2"), SMTP_BOUNCE="0") as relay,
    ):
        assert "5.4.6" in finished(relay, send_to(relay, "bob@x.test")).last_error


def test_a_failed_handshake_never_falls_back_to_plaintext() -> None:
    with (
        FakeHop({"starttls": "drop 220 go"}, "STARTTLS", host="127.0.0.2") as hop,
        by_mx(hop.port, zone(a_x_test="127.0.0.2")) as relay,
    ):
        stem = send_to(relay, "bob@x.test")
        wait_until(lambda: "TLS failed" in record_of(relay, stem).last_error, shown=lambda: record_of(relay, stem))
        assert not any(c.startswith("MAIL") for c in hop.commands) and record_of(relay, stem).attempts == 0


# -- TLS to MX hosts, with another relay as the host --


def test_tls_is_used_and_verified_when_offered(tmp_path: Path) -> None:
    cert, key = smtprelay.self_signed(str(tmp_path), "mx.test")
    script = zone(mx_x_test="10 mx.test", a_mx_test="127.0.0.2")
    with smtprelay.start(SMTP_PORT="127.0.0.2:0", SMTP_TLS_CERT=cert, SMTP_TLS_KEY=key, SMTP_HOSTNAME="mx.test") as mx:
        for more, expected in ({"SMTP_RELAY_CA_FILE": cert}, True), ({"SMTP_RELAY_TLS_VERIFY": "0"}, False):
            with by_mx(mx.port, script, **more) as relay:
                r = finished(relay, send_to(relay, "bob@x.test")).recipients[0]
                assert (r.host, r.ip, r.tls, r.verified) == ("mx.test", "127.0.0.2", "TLSv1.3", expected)
        with by_mx(mx.port, script) as relay:
            stem = send_to(relay, "bob@x.test")
            wait_until(lambda: "certificate" in record_of(relay, stem).last_error.lower())
            assert record_of(relay, stem).attempts == 0


# -- a real Postfix, as smart host and as MX, and a real dnsmasq --

MAIN_CF = """
compatibility_level = 3.6
queue_directory = {top}/queue
data_directory = {top}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = {owner}
setgid_group = {group}
myhostname = mx.pf.test
mydestination =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
local_header_rewrite_clients =
smtpd_relay_restrictions = permit_mynetworks, reject
virtual_mailbox_domains = x.test, y.test
virtual_mailbox_maps = inline:{{bob@x.test=box/, bob@y.test=box/}}
virtual_mailbox_base = {top}/mail
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
virtual_minimum_uid = 100
maillog_file = {top}/log
maillog_file_prefixes = /
smtpd_tls_security_level = may
smtpd_tls_cert_file = {top}/cert.pem
smtpd_tls_key_file = {top}/cert.pem
"""


def some_owner() -> tuple[str, str]:
    """Postfix wants an owner and a group of its own; where it was never configured, any will do."""
    for user, group in (("postfix", "postdrop"), ("uucp", "staff")):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(user).pw_name, grp.getgrnam(group).gr_name
    pytest.skip("no user for Postfix")


@pytest.fixture(scope="module")
def postfix() -> Iterator[tuple[str, int, str]]:
    """Start a Postfix on loopback; give its port and its directory with cert.pem, log and mail."""
    dist = Path("/usr/share/postfix/master.cf.dist")
    if not shutil.which("postfix", path="/usr/sbin") or not dist.exists() or os.getuid():
        pytest.skip("needs Postfix, and root")
    owner, group = some_owner()
    with tempfile.TemporaryDirectory(prefix="pf") as top:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        for name in ("etc", "queue/pid", "data", "mail/box"):
            os.makedirs(f"{top}/{name}")
        os.chmod(top, 0o755)
        shutil.chown(f"{top}/data", owner)
        for name in ("mail", "mail/box"):
            os.chown(f"{top}/{name}", 65534, 65534)
        os.rename(smtprelay.self_signed(top, "mx.pf.test")[0], f"{top}/cert.pem")
        Path(f"{top}/etc/main.cf").write_text(MAIN_CF.format(top=top, owner=owner, group=group))
        os.utime(f"{top}/etc/main.cf", (1, 1))  # when it is younger than two seconds, Postfix waits and reads it again
        master = re.sub(r"(?m)^smtp      inet", f"{port}      inet", dist.read_text())
        Path(f"{top}/etc/master.cf").write_text(re.sub(r"(?m)^(\S+ +\S+ +\S+ +\S+ +)y( )", r"\1n\2", master))
        Path(f"{top}/etc/dynamicmaps.cf").touch()
        run = functools.partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        started = run(["/usr/sbin/postfix", "-c", f"{top}/etc", "start"])
        try:
            assert started.returncode == 0, started.stderr
            yield "127.0.0.1", port, top
        finally:
            run(["/usr/sbin/postfix", "-c", f"{top}/etc", "abort"])  # stop waits in steps of a second


def delivered(top: str) -> list[bytes]:
    return (
        [path.read_bytes() for path in Path(top, "mail/box/new").glob("*")]
        if Path(top, "mail/box/new").exists()
        else []
    )


def test_postfix_as_smart_host(postfix: tuple[str, int, str]) -> None:
    host, port, top = postfix
    content = b"Subject: dots\r\n\r\n.\r\n..two\r\nend" + b"\r\nline" * 20000 + b"\r\n"
    with smtprelay.start(
        SMTP_RELAY_HOST=f"{host}:{port}", SMTP_RELAY_TLS="starttls", SMTP_RELAY_TLS_VERIFY="0", **QUICK_LANES
    ) as relay:
        before = len(delivered(top))
        stem = send_to(relay, "bob@x.test", "nobody@x.test", content=content)
        message = finished(relay, stem)
        assert statuses(relay, stem) == {"bob": DONE, "nobody": NEVER}
        assert (message.recipients[0].tls, message.recipients[0].verified) == ("TLSv1.3", False)
        assert message.recipients[1].code == 550 and "unknown in virtual mailbox table" in message.recipients[1].reply
        wait_until(lambda: len(delivered(top)) > before, 30)
        assert max(delivered(top), key=len).endswith(content.replace(b"\r\n", b"\n").partition(b"\n\n")[2])


def test_postfix_as_mx_found_by_dnsmasq(postfix: tuple[str, int, str], dnsmasq: tuple[str, int]) -> None:
    host, port, top = postfix
    settings = {"SMTP_DELIVERY": "mx", "SMTP_MX_PORT": str(port), "SMTP_DNS_SERVER": f"127.0.0.1:{dnsmasq[1]}"}
    with smtprelay.start(**settings, SMTP_RELAY_CA_FILE=f"{top}/cert.pem", SMTP_BOUNCE="0", **QUICK_LANES) as relay:
        before = len(delivered(top))
        stem = send_to(relay, "bob@x.test", "bob@y.test", "bob@gone.test")
        message = finished(relay, stem, 60)
        assert [r.status.value for r in message.recipients] == [DONE, DONE, NEVER]
        r = message.recipients[0]
        assert (r.host, r.ip, r.tls, r.verified) == ("mx.pf.test", host, "TLSv1.3", True)
        assert message.recipients[2].reply.startswith("5.1.2 gone.test")
        wait_until(lambda: len(delivered(top)) == before + 2, 30)
        assert message.recipients[0].reply == message.recipients[1].reply  # one transaction


# -- many next hops at once --


def test_two_hanging_hosts_hold_up_nobody() -> None:
    script = zone(a_slow1_test="127.0.0.5", a_slow2_test="127.0.0.6", a_good_test="127.0.0.7")
    with (
        FakeHop({"greeting": "hang"}, host="127.0.0.5") as slow,
        FakeHop({"rcpt": "hang"}, "8BITMIME", host="127.0.0.6", port=slow.port) as slower,
        FakeHop(host="127.0.0.7", port=slow.port) as good,
        by_mx(slow.port, script, SMTP_RELAY_REPLY_TIMEOUT="2s") as relay,
    ):
        for i in range(10):
            send_to(relay, f"u{i}@slow1.test")
            send_to(relay, f"u{i}@slow2.test")
        began = time.monotonic()
        for i in range(10):
            finished(relay, send_to(relay, f"u{i}@good.test"))
        assert time.monotonic() - began < 1.8 and len(good.mails) == 10
        assert slow.connections == 1
        slow.closing.set()  # the relay's stop need not wait for them
        slower.closing.set()


def test_what_was_delivered_stays_so_after_a_restart(tmp_path: Path) -> None:
    script = zone(a_grey_test="127.0.0.5", a_good_test="127.0.0.5")
    with FakeHop({"rcpt a@grey.test": ["450 later"]}, host="127.0.0.5") as hop:
        settings = {"SMTP_STORAGE": "file", "SMTP_SPOOL": str(tmp_path), "SMTP_FSYNC": "0"}
        with by_mx(
            hop.port,
            script,
            SMTP_RETRY_INITIAL_DELAY="300ms",
            SMTP_RETRY_MAX_DELAY="1s",
            SMTP_MAX_SIZE="1MiB",
            **settings,
        ) as relay:
            stem = send_to(relay, "a@grey.test", "b@good.test")
            wait_until(lambda: statuses(relay, stem) == {"a": LATER, "b": DONE})
        with by_mx(hop.port, script, **settings) as relay:
            message = finished(relay, stem)
        assert statuses(relay, stem) == {"a": DONE, "b": DONE} and message.recipients[0].attempts == 2
        assert sorted(rs for rs, _ in hop.mails) == [["a@grey.test"], ["b@good.test"]]


def test_an_account_may_have_a_host_of_its_own(tmp_path: Path) -> None:
    with FakeHop() as common, FakeHop(users={"u": "w"}, methods="PLAIN") as own:
        users = tmp_path / "users.json"
        users.write_text(
            json.dumps(
                {
                    "app": {"password": "p", "relay_host": own.place, "relay_username": "u", "relay_password": "w"},
                    "b": {"password": "p"},
                }
            )
        )
        users.chmod(0o600)
        with relaying(common, SMTP_USERS_FILE=str(users), SMTP_AUTH_INSECURE="1") as relay:
            for name in ("app", "b"):
                with smtplib.SMTP(relay.host, relay.port) as client:
                    client.login(name, "p")
                    client.sendmail("me@here.test", ["bob@x.test"], b"\r\nhello\r\n")
                finished(relay, newest(relay))
        assert (len(common.mails), len(own.mails)) == (1, 1)
        assert any(c.startswith("AUTH PLAIN ") for c in own.commands)


@pytest.mark.parametrize("host", ["smtp..example.com", "x" * 70 + ".test"])
def test_a_name_that_cannot_be_looked_up_is_the_hosts_trouble(start: Any, host: str) -> None:
    relay = start(SMTP_DELIVERY="relay", SMTP_RELAY_HOST=host)
    stem = said_stem(relay)
    wait_until(lambda: "cannot connect" in relay.delivering.spool.load(stem).last_error)
    assert relay.delivering.scheduler.lanes["smarthost"].steps > 0


def test_a_peer_that_is_gone_at_once_is_the_hosts_trouble(start: Any, hop: Any, monkeypatch: Any) -> None:
    class Gone(socket.socket):
        def getpeername(self) -> Any:
            raise OSError(107, "Transport endpoint is not connected")

    h = hop()
    relay = relaying_in_review(start, h)
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda to, *rest: Gone() if to[1] == h.port else connect(to, *rest))
    stem = said_stem(relay)
    wait_until(lambda: "not connected" in relay.delivering.spool.load(stem).last_error)


# === REPORTS =================================================================
# -- reports --


def test_a_failure_is_reported_once() -> None:
    script = {"rcpt a@x.test": "550 5.1.1 nobody", "rcpt b@x.test": "550 5.1.1 nobody"}
    with FakeHop(script, "DSN") as hop, relaying(hop) as relay:
        stem = send_to(relay, "a@x.test", "b@x.test", "c@x.test", mail=["ENVID=abc"], rcpt=["ORCPT=rfc822;o@x.test"])
        finished(relay, stem)
        wait_until(lambda: len(hop.mails) == 2)
        to, text = hop.mails[1]
        assert to == ["me@here.test"] and "MAIL FROM:<>" in hop.commands
        assert text.count(b"Action: failed") == 2 and b"Final-Recipient: rfc822; b@x.test" in text
        assert b"Original-Envelope-Id: abc" in text and b"Original-Recipient: rfc822; o@x.test" in text
        assert b"Subject: hi" in text and b"\r\nhello\r\n" not in text
        wait_until(lambda: record_of(relay, newest(relay)).status is smtprelay.Status.FORWARDED)


@pytest.mark.parametrize(
    "sender, settings, rcpt",
    [
        ("", {}, []),
        ("me@here.test", {"SMTP_BOUNCE": "0"}, []),
        ("me@here.test", {}, ["NOTIFY=NEVER"]),
        ("me@here.test", {}, ["NOTIFY=DELAY"]),
    ],
)
def test_no_report(sender: str, settings: dict[str, str], rcpt: list[str]) -> None:
    with FakeHop({"rcpt a@x.test": "550 no"}) as hop, relaying(hop, **settings) as relay:
        finished(relay, send_to(relay, "a@x.test", sender=sender, rcpt=rcpt))
        assert len(list(relay.parts.spool.names())) == 1


def test_dsn_is_passed_on_where_it_is_offered() -> None:
    mail, rcpt = ["RET=HDRS", "ENVID=e1"], ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;x@y.test"]
    with FakeHop({}, "DSN") as able, relaying(able) as relay:
        finished(relay, send_to(relay, "a@x.test", mail=mail, rcpt=rcpt))
        assert "MAIL FROM:<me@here.test> RET=HDRS ENVID=e1" in able.commands
        assert "RCPT TO:<a@x.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;x@y.test" in able.commands
        assert len(list(relay.parts.spool.names())) == 1
    with FakeHop(offers="") as unable, relaying(unable) as relay:
        finished(relay, send_to(relay, "a@x.test", mail=mail, rcpt=rcpt))
        wait_until(lambda: len(unable.mails) == 2)
        assert b"Action: relayed" in unable.mails[1][1] and "MAIL FROM:<me@here.test>" in unable.commands


@pytest.mark.parametrize(
    "command",
    [
        "MAIL FROM:<a@b> RET=ALL",
        "MAIL FROM:<a@b> ENVID=+0D+0A",
        "MAIL FROM:<a@b> ENVID=" + "x" * 101,
        "RCPT TO:<a@b> NOTIFY=NEVER,DELAY",
        "RCPT TO:<a@b> ORCPT=nothing",
        "RCPT TO:<a@b> ORCPT=rfc822;+0A",
    ],
)
def test_bad_dsn_parameters(command: str) -> None:
    with smtprelay.start() as relay, smtplib.SMTP(relay.host, relay.port) as client:
        client.ehlo("x")
        assert client.has_extn("dsn")
        if command.startswith("RCPT"):
            client.mail("a@b.test")
        assert client.docmd(command)[0] == 501


def test_dsn_survives_without_the_record(tmp_path: Path) -> None:
    settings = {"SMTP_STORAGE": "file", "SMTP_SPOOL": str(tmp_path), "SMTP_FSYNC": "0"}
    with smtprelay.start(**settings) as relay:
        stem = send_to(
            relay, '"a b"@x.test', mail=["RET=FULL", "ENVID=e+2B"], rcpt=["NOTIFY=FAILURE", "ORCPT=rfc822;<x>"]
        )
        wait_until(lambda: list(tmp_path.glob("2*/*.json")))
        next(tmp_path.glob("2*/*.json")).unlink()
        m = record_of(relay, stem)
        assert (m.ret, m.envid, m.recipients[0].address, m.recipients[0].notify, m.recipients[0].orcpt) == (
            "FULL",
            "e+2B",
            '"a b"@x.test',
            "FAILURE",
            "rfc822;<x>",
        )


NOW = datetime(2026, 11, 21, 3, 0, tzinfo=timezone.utc)
HEAD = b"From: ann@example.org\r\nSubject: Hello\r\n\tworld\r\nMessage-ID: <1@example.org>\r\n\r\n"
FULL_MAIL = HEAD + b"Hi Bob,\r\n..\r\n\r\nbye\r\n"
FAILED, FORWARDED = smtprelay.Status.FAILED, smtprelay.Status.FORWARDED


def bob(**changes: Any) -> smtprelay.Recipient:
    values = {
        "address": "bob@example.com",
        "status": FAILED,
        "code": 550,
        "reply": "5.1.1 <bob@example.com>: user unknown",
        "host": "mx.example.com",
    }
    return smtprelay.Recipient(**{**values, **changes})


def message(*recipients: smtprelay.Recipient, **changes: Any) -> smtprelay.Message:
    values = {
        "id": "660c1121a94a1216",
        "size": 1234,
        "status": FAILED,
        "received_at": "2026-11-21T02:00:00Z",
        "reverse_path": "ann@example.org",
        "recipients": list(recipients) or [bob()],
    }
    return smtprelay.Message(**{**values, **changes})


def reported(record: smtprelay.Message, head: bytes = HEAD, full: bytes | None = None) -> bytes:
    raw = smtprelay.build_report(record, head if full is None else full, "relay.example", NOW)
    well_formed(raw)
    return raw


def well_formed(raw: bytes) -> None:
    """Holds for every report, whatever went in."""
    assert raw.endswith(b"--\r\n") and b"\0" not in raw
    assert not re.search(rb"\r(?!\n)|(?<!\r)\n", raw)
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    mail = parse(raw)
    assert not mail.defects and not any(part.defects for part in mail.iter_parts())
    assert len(list(mail.iter_parts())) == 3
    assert set(mail.keys()) == {
        *("From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted", "MIME-Version"),
        "Content-Type",
    }
    rfc_3464(groups(raw), mail["Content-Type"].params["report-type"])
    for part in raw.split(mail.get_boundary("").encode())[2:-1]:
        declared, _, body = part.partition(b"\r\n\r\n")
        assert (b"Encoding: 7bit" in declared) == body.isascii()


ONCE = {"Final-Recipient", "Action", "Status", "Diagnostic-Code"}
FIELDS = ONCE | {"Original-Recipient", "Remote-MTA"}
TYPED = re.compile(r"(dns|rfc822|RFC822|utf-8|smtp|x-smtprelay|[\w ]+);\s.*", re.S)


def rfc_3464(fields: list[Message], kind: str) -> None:
    """Holds the groups of fields against sections 2.2 and 2.3."""
    whole, *each = fields
    assert whole.keys()[0] == "Reporting-MTA" and str(whole["Reporting-MTA"]).startswith("dns; ")
    assert set(whole.keys()) <= {"Reporting-MTA", "Original-Envelope-Id", "Arrival-Date"}
    assert each, "a report is on one recipient at least"
    for group in each:
        assert len(group.keys()) == len(set(group.keys())) and ONCE <= set(group.keys()) <= FIELDS
        assert group["Action"] == "failed" and re.fullmatch(r"[45](\.\d{1,3}){2}", group["Status"])
        assert all(TYPED.fullmatch(str(group[name])) for name in FIELDS & set(group.keys()) - PLAIN_FIELDS)
        assert kind != "delivery-status" or str(group).isascii()


PLAIN_FIELDS = {"Action", "Status"}


def parse(raw: bytes) -> EmailMessage:
    mail = email.message_from_bytes(raw, policy=email.policy.SMTP)
    assert isinstance(mail, EmailMessage)
    return mail


def groups(raw: bytes) -> list[Message]:
    """Reads the groups of fields of the second part, either type."""
    part = list(parse(raw).iter_parts())[1]
    if part.get_content_type() == "message/delivery-status":
        return part.get_payload()  # type: ignore[return-value]
    boundary = parse(raw).get_boundary("").encode()
    body = raw.split(b"--" + boundary)[2].partition(b"\r\n\r\n")[2]
    return [email.message_from_bytes(group) for group in body.split(b"\r\n\r\n") if group.strip()]


def words(raw: bytes) -> str:
    return str(next(iter(parse(raw).iter_parts())).get_content()).replace("\r\n", "\n")


def test_report_is_a_multipart_report() -> None:
    mail = parse(reported(message()))
    assert mail.get_content_type() == "multipart/report"
    assert mail.get_param("report-type") == "delivery-status"
    assert [part.get_content_type() for part in mail.iter_parts()] == [
        *("text/plain", "message/delivery-status", "text/rfc822-headers")
    ]
    assert mail["To"] == "ann@example.org" and mail["Auto-Submitted"] == "auto-replied"
    assert mail["From"].addresses[0].addr_spec == "MAILER-DAEMON@relay.example"
    assert mail["Date"].datetime == NOW
    assert mail["Message-ID"] == "<report.660c1121a94a1216@relay.example>"


def test_fields_for_programs() -> None:
    record = message(
        bob(orcpt="rfc822;bob+2Blist@example.net"),
        bob(address="carl@example.com", code=0, reply="too old", host=""),
        bob(address="dora@example.com", status=FORWARDED),
        envid="QQ+2B31",
    )
    whole, first, second = groups(reported(record))
    assert whole.items() == [
        ("Reporting-MTA", "dns; relay.example"),
        ("Original-Envelope-Id", "QQ+31"),
        ("Arrival-Date", "Sat, 21 Nov 2026 02:00:00 +0000"),
    ]
    assert first.items() == [
        ("Original-Recipient", "rfc822; bob+list@example.net"),
        ("Final-Recipient", "rfc822; bob@example.com"),
        ("Action", "failed"),
        ("Status", "5.1.1"),
        ("Remote-MTA", "dns; mx.example.com"),
        ("Diagnostic-Code", "smtp; 550 5.1.1 <bob@example.com>: user unknown"),
    ]
    assert second.items() == [
        ("Final-Recipient", "rfc822; carl@example.com"),
        ("Action", "failed"),
        ("Status", "4.4.0"),
        ("Diagnostic-Code", "x-smtprelay; too old"),
    ]


def test_words_say_who_why_and_what_to_do() -> None:
    told = words(reported(message(bob(), bob(address="eve@example.com", status=FORWARDED))))
    assert "\nbob@example.com\n    The mail server mx.example.com said:\n" in told
    assert "\n        550 5.1.1 <bob@example.com>: user unknown\n" in told
    assert "What to do: Their server does not know this address." in told
    assert "Sat, 21 Nov 2026 02:00:00 +0000 (1234 octets)" in told
    assert "660c1121a94a1216" in told and "eve@" not in told


STATUS = [
    (550, "5.1.1 no", "5.1.1", "does not know this address"),
    (550, "550 5.1.1 no", "5.1.1", "does not know this address"),
    (550, "550-5.1.1 no", "5.1.1", "does not know this address"),
    (550, "no such user", "5.0.0", "no such address"),
    (550, "4.1.1 a lie", "5.0.0", "no such address"),
    (550, "2.1.5 a lie", "5.0.0", "no such address"),
    (550, "5.\u0661.1 odd", "5.0.0", "no such address"),
    (550, "5.1.1: no", "5.1.1", "does not know this address"),
    (550, "5.1.1000 odd", "5.0.0", "no such address"),
    (550, "5.4.1 Recipient address rejected", "5.4.1", "no such address"),
    (556, "5.1.10 null MX", "5.1.10", "takes no mail at all"),
    (552, "5.2.2 full", "5.2.2", "mailbox is full"),
    (452, "4.2.2 full", "4.2.2", "mailbox is full"),
    (552, "too much", "5.0.0", "full, or the message is too big"),
    (552, "5.3.4 big", "5.3.4", "Send a smaller one"),
    (451, "try later", "4.0.0", "No more is known"),
    (0, "4.4.1 no answer", "4.4.1", "not to be reached"),
    (0, "", "4.4.0", "not to be reached"),
    (0, "5.1.2 no such domain", "5.1.2", "after the @"),
    (550, "5.7.26 no SPF", "5.7.26", "Their rules refuse it"),
    (550, "5.6.7 no", "5.6.7", "such letters"),
    (554, "5.9.9 what", "5.9.9", "No more is known"),
]


@pytest.mark.parametrize("code, reply, status, advice", STATUS)
def test_status_and_advice(code: int, reply: str, status: str, advice: str) -> None:
    raw = reported(message(bob(code=code, reply=reply)))
    assert groups(raw)[1]["Status"] == status
    assert advice in " ".join(words(raw).split())


def test_original_headers_alone() -> None:
    for record, full in (
        (message(), FULL_MAIL),
        (message(ret="HDRS"), FULL_MAIL),
    ):
        part = list(parse(reported(record, full=full)).iter_parts())[2]
        assert part.get_content_type() == "text/rfc822-headers"
        assert part.get_content().split("\r\n")[1:3] == ["Subject: Hello", " world"]


def test_full_original_is_returned_octet_for_octet() -> None:
    for full in (FULL_MAIL, HEAD + b"caf\xc3\xa9 \xff\r\n"):
        raw = reported(message(ret="FULL"), full=full)
        boundary = parse(raw).get_boundary("").encode()
        assert raw.split(b"\r\n--" + boundary)[3].partition(b"\r\n\r\n")[2] == full
        assert list(parse(raw).iter_parts())[2].get_content_type() == "message/rfc822"


MISFITS = {
    "long": b"x" * 999,
    "NUL": b"\0",
    "bare LF": b"a\nb\r\n",
    "bare CR": b"a\rb\r\n",
    "big": b"y\r\n" * 400_000,
}


@pytest.mark.parametrize("body", MISFITS.values(), ids=MISFITS)
def test_full_original_that_does_not_fit_leaves_its_headers(body: bytes) -> None:
    raw = reported(message(ret="FULL"), full=HEAD + body)
    assert list(parse(raw).iter_parts())[2].get_content_type() == "text/rfc822-headers"
    assert len(raw) < 4096


def test_smtputf8_way_back_gets_a_global_report() -> None:
    record = message(
        bob(address="b\xf6b+x@ex\xe4mple.com", orcpt=r"utf-8;b\x{F6}b@x.test", reply="5.1.1 n\xf6"),
        reverse_path="\u5c0f\u660e@example.org",
        ret="FULL",
    )
    head = "Subject: caf\xe9\r\n\r\n".encode()
    raw = reported(record, head, head)
    mail = parse(raw)
    assert mail.get_param("report-type") == "global-delivery-status"
    assert [part.get_content_type() for part in mail.iter_parts()] == [
        *("text/plain", "message/global-delivery-status", "message/global")
    ]
    assert "\r\nTo: <\u5c0f\u660e@example.org>\r\n".encode() in raw
    assert "\r\nFinal-Recipient: utf-8; b\xf6b\\x{2B}x@ex\xe4mple.com\r\n".encode() in raw
    assert "\r\nDiagnostic-Code: smtp; 550 5.1.1 n\xf6\r\n".encode() in raw


def test_ascii_way_back_gets_ascii_fields() -> None:
    record = message(bob(address="b\xf6b@example.com", orcpt="utf-8;b\xf6b@x", reply="5.1.1 n\xf6"))
    raw = reported(record, "Subject: caf\xe9\r\n\r\n".encode())
    group = groups(raw)[1]
    assert group["Final-Recipient"] == r"utf-8; b\x{F6}b@example.com"
    assert group["Original-Recipient"] == r"utf-8; b\x{F6}b@x"
    assert group["Diagnostic-Code"] == r"smtp; 550 5.1.1 n\xf6"
    assert "b\xf6b@example.com" in words(raw)
    kinds = [part.get_content_type() for part in parse(raw).iter_parts()]
    assert kinds[1:] == ["message/delivery-status", "message/global-headers"]


EVIL_NAME = "a\r\nBcc: all@example.com\r\n\r\n--x\r\n\0\x85\u2028\u202e\udcff=?utf-8?q?=0D=0ABcc:_e?= "


def test_hostile_text_adds_no_field() -> None:
    record = message(
        bob(address=EVIL_NAME, reply=EVIL_NAME, host=EVIL_NAME, orcpt=EVIL_NAME),
        bob(address="\xe9" + EVIL_NAME, reply=EVIL_NAME * 1000, orcpt="utf-8;" + EVIL_NAME, code=0),
        reverse_path=EVIL_NAME,
        envid=EVIL_NAME,
        id=EVIL_NAME,
        received_at=EVIL_NAME,
        ret="FULL",
    )
    for way_back in (EVIL_NAME, "\xe9" + EVIL_NAME):
        record.reverse_path = way_back
        raw = smtprelay.build_report(record, EVIL_NAME[-40:].encode("utf-8", "replace"), EVIL_NAME, NOW)
        well_formed(raw)
        assert b"\r\nBcc" not in raw and "\u202e".encode() not in raw


def test_encoded_words_in_a_reply_stay_as_they_are() -> None:
    reply = "5.7.1 =?utf-8?q?=0D=0AX:_y?= see https://example.com/" + "x" * 200
    raw = reported(message(bob(reply=reply)))
    assert f"smtp; 550 {reply}".encode() in raw.replace(b"\r\n ", b" ")


def test_long_address_is_never_broken() -> None:
    address = "x" * 64 + "@" + "y" * 180 + ".example"
    raw = reported(message(bob(address=address), reverse_path=address))
    assert groups(raw)[1]["Final-Recipient"].split() == ["rfc822;", address]
    assert parse(raw)["To"].addresses[0].addr_spec == address


def test_size_is_bounded() -> None:
    wide = "\u5c0f" * 80
    many = [bob(address=f"{wide}{n}@x.test", reply=wide * 100) for n in range(600)]
    head = b"X: " + b"y" * 5000 + b"\r\n" + b"A: b\r\n" * 100_000
    raw = smtprelay.build_report(message(*many), head, "relay.example", NOW)
    assert len(raw) < 2 * 1024 * 1024 and max(map(len, raw.split(b"\r\n"))) <= 998
    assert raw.count(b"\r\nFinal-Recipient:") == 500 and b"and 100 more." in raw


def test_a_part_cannot_hold_the_boundary() -> None:
    first = parse(reported(message())).get_boundary("").encode()
    raw = reported(message(), HEAD.replace(b"Hello", b"Hello\r\n--" + first + b"--"))
    assert parse(raw).get_boundary("").encode() != first


WANTS = [
    ("refused", message(), 1),
    ("null sender", message(reverse_path=""), 0),
    ("NOTIFY=NEVER", message(bob(notify="NEVER")), 0),
    ("no FAILURE", message(bob(notify="SUCCESS,DELAY")), 0),
    ("FAILURE", message(bob(notify="DELAY,FAILURE")), 1),
    ("each his own", message(bob(notify="NEVER"), bob(), bob(status=FORWARDED)), 1),
    ("delivered", message(bob(status=FORWARDED)), 0),
    ("others still owed", message(bob(), bob(status=smtprelay.Status.RETRYING)), 1),
    ("held besides", message(bob(), bob(status=smtprelay.Status.HELD)), 1),
    ("told", message(bob(reported=True)), 0),
]


@pytest.mark.parametrize("record, count", [row[1:] for row in WANTS], ids=[row[0] for row in WANTS])
def test_wants_report(record: smtprelay.Message, count: int) -> None:
    assert len(smtprelay.wants_report(record)) == count


# === FAULTS ==================================================================
# -- scripted failures --

FAULT_RULES = "rcpt to=*@slow.test 450 4.2.0 greylisted first 2; mail from=bad@* 550 no; end to=lost@* drop kept; data to=full@* 452; rcpt to=wait@* delay 40ms"  # noqa: E501


def test_scripted_failures() -> None:
    with smtprelay.start(SMTP_FAULTS=FAULT_RULES) as relay, smtplib.SMTP(relay.host, relay.port) as c:
        c.ehlo("x")
        assert c.mail("bad@x.test") == (550, b"5.0.0 no")
        assert c.mail("good@x.test")[0] == 250
        assert [c.rcpt("a@slow.test") for _ in range(3)] == [(450, b"4.2.0 greylisted")] * 2 + [
            (250, b"2.1.5 Recipient ok")
        ]
        assert c.rcpt("b@SLOW.test")[0] == 450
        began = time.monotonic()
        assert c.rcpt("wait@x.test")[0] == 250 and time.monotonic() - began >= 0.04
        assert c.rcpt("full@x.test")[0] == 250
        assert c.docmd("DATA")[0] == 452
        assert c.docmd("DATA")[0] == 503
        with pytest.raises(smtplib.SMTPServerDisconnected):
            c.sendmail("good@x.test", ["lost@x.test"], b"\r\nhello\r\n")
        assert len(list(relay.parts.spool.names())) == 1


def test_a_fault_at_the_greeting() -> None:
    with smtprelay.start(SMTP_FAULTS="connect 421 busy first 1; connect drop first 1") as relay:
        for expected in (smtplib.SMTPConnectError, smtplib.SMTPServerDisconnected):
            with pytest.raises(expected):
                smtplib.SMTP(relay.host, relay.port)
        smtplib.SMTP(relay.host, relay.port).close()


@pytest.mark.parametrize(
    "rules",
    [
        "nowhere 450",
        "rcpt",
        "rcpt 250 ok",
        "connect to=x drop",
        "mail drop kept",
        "rcpt 450 a first x",
        "rcpt delay x",
        "rcpt 450 \xe9",
    ],
)
def test_wrong_rules_are_reported(rules: str) -> None:
    with pytest.raises(smtprelay.SettingsError, match="SMTP_FAULTS: rule 2"):
        smtprelay.Faults("mail 450 x; " + rules)


def test_a_scripted_code_that_we_never_give_ourselves(start: Callable[..., Any]) -> None:
    relay = start(SMTP_FAULTS="mail 455 odd")
    with hello(relay) as client:
        client.ask("MAIL FROM:<a@b.test>", "455 4.0.0 odd")
        client.ask("NOOP", "250")
    assert metric(relay, "smtp_messages_rejected_total")["other"] == 1


def test_scripted_faults_are_counted_across_processes(program: Callable[..., Program]) -> None:
    relay = program(**{**QUICK, "SMTP_PROCESSES": "3", "SMTP_FAULTS": "mail 451 later after 5 first 5"})
    wait_until(lambda: len(receivers(relay)) == 3)
    replies = []
    for _ in range(15):
        with hello(relay) as client:
            replies.append(client.ask("MAIL FROM:<a@b.test>")[:3])
    assert replies == ["250"] * 5 + ["451"] * 5 + ["250"] * 5


# === SESSION =================================================================


def test_the_final_reply_names_the_queue_id_in_the_files(holding: Any, held: Spool) -> None:
    [queue_id] = said(holding)
    assert [path.name.split("_")[0] for path in held.files(f"{queue_id}_*.eml")] == [queue_id]


@pytest.mark.parametrize(
    ("count", "where", "want"), [(100, "head", "250"), (101, "head", "554 5.4.6"), (120, "body", "250")]
)
def test_a_loop_is_seen(holding: Any, count: int, where: str, want: str) -> None:
    trace = b"Received: from a by b;\r\n\tdate\r\n" * count
    with hello(holding) as client:
        answer = client.mail(trace + b"\r\nx\r\n" if where == "head" else b"Subject: x\r\n\r\n" + trace)
        assert answer.startswith(want)
        client.ask("NOOP", "250")


def test_too_many_errors_end_the_session(start: Callable[..., Any]) -> None:
    with hello(start(SMTP_STORAGE="memory", SMTP_MAX_ERRORS="3")) as client:
        client.send(b"FOO\r\n" * 10)
        replies = [client.reply()]
        while not replies[-1].startswith("421"):
            assert replies[-1].startswith("500 5.5.2")
            replies.append(client.reply())
        assert replies[-1].startswith("421 4.7.0") and 3 <= len(replies) <= 4
        assert client.closed()


def test_trouble_of_our_own_is_451_and_says_nothing_of_the_inside(start: Callable[..., Any], tmp_path: Path) -> None:
    relay, today = start(), tmp_path / "spool" / time.strftime("%Y-%m-%d", time.gmtime())
    wait_until(lambda: fetch(relay, "/readyz")[0] == 200)
    shutil.rmtree(today, ignore_errors=True)
    today.write_text("in the way")
    with hello(relay) as client:
        client.envelope()
        answer = client.ask("DATA", "354|451 4.3.0")
        if answer.startswith("354"):
            client.send(b".\r\n")
            answer = client.reply()
        assert answer.startswith("451 4.3.0")
        assert "spool" not in answer.replace("in the spool", "") and "Err" not in answer
        today.unlink()
        client.ask("RSET", "250")
        assert client.mail().startswith("250")


def test_a_client_that_goes_away_inside_a_message_leaves_nothing(start: Callable[..., Any], tmp_path: Path) -> None:
    spool, relay = Spool(tmp_path / "spool"), start()
    for last in (b"DATA\r\nSubject: half", b"DATA\r\nx\r\n.", b"BDAT 100\r\nhalf", b"BDAT 4\r\nhalf"):
        with hello(relay) as client:
            client.envelope()
            client.send(last)
    wait_until(lambda: metric(relay, "smtp_sessions_active") == 0)
    assert spool.files("*") == []
    assert metric(relay, "smtp_messages_received_total") == 0


GOOD_LOGIN = plain("old", "tanstaaftanstaaf")
NULL = "\\0"
B_APP, B_WORD = b64("app").decode(), b64("grün").decode()
AUTHS = {
    "initial response": f"C: {plain('app', 'grün')}\nS: 235 2.7.0",
    "in two steps": f"C: AUTH PLAIN\nS: 334 \nC: {plain('app', 'grün')[11:]}\nS: 235 2.7.0",
    "lower case": f"C: auth plain {plain('app', 'grün')[11:]}\nS: 235",
    "login": f"C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: {B_APP}\nS: 334 UGFzc3dvcmQ6\nC: {B_WORD}\nS: 235 2.7.0",
    "login with user": f"C: AUTH LOGIN {B_APP}\nS: 334 UGFzc3dvcmQ6\nC: {B_WORD}\nS: 235 2.7.0",
    "key as user": f"C: {plain(API_KEY, 'grün')}\nS: 235",
    "key as both": f"C: {plain(API_KEY, API_KEY)}\nS: 235",
    "own authzid": f"C: AUTH PLAIN {b64('app' + chr(0) + 'app' + chr(0) + 'grün').decode()}\nS: 235",
    "another's authzid": f"C: AUTH PLAIN {b64('old' + chr(0) + 'app' + chr(0) + 'grün').decode()}\nS: 535 5.7.8",
    "wrong": f"C: {plain('app', 'x')}\nS: 535 5.7.8 Authentication credentials invalid",
    "unknown user": f"C: {plain('nobody', 'x')}\nS: 535 5.7.8 Authentication credentials invalid",
    "wrong, then right": f"C: {plain('app', 'x')}\nS: 535\nC: {GOOD_LOGIN}\nS: 235",
    "cram, wrong": f"C: AUTH CRAM-MD5\nS: 334 \nC: {b64('old 00').decode()}\nS: 535 5.7.8",
    "cram with initial response": f"C: AUTH CRAM-MD5 {b64('old 00').decode()}\nS: 501 5.5.2",
    "cancelled": "C: AUTH PLAIN\nS: 334\nC: *\nS: 501 5.7.0\nC: NOOP\nS: 250",
    "cancelled late": f"C: AUTH LOGIN {B_APP}\nS: 334\nC: *\nS: 501\nC: NOOP\nS: 250",
    "bad base64": "C: AUTH PLAIN !!!\nS: 501 5.5.2\nC: AUTH LOGIN\nS: 334\nC: YQ\nS: 501 5.5.2\nC: NOOP\nS: 250",
    "empty": "C: AUTH PLAIN =\nS: 501 5.5.2\nC: AUTH PLAIN\nS: 334\nC: =\nS: 501 5.5.2",
    "two parts": f"C: AUTH PLAIN {b64('app' + chr(0) + 'x').decode()}\nS: 501 5.5.2",
    "unknown mechanism": "C: AUTH XOAUTH2 YQ==\nS: 504 5.5.4\nC: AUTH GSSAPI\nS: 504",
    "no mechanism": "C: AUTH\nS: 501 5.5.4",
    "line of 20 KB": f"C: AUTH PLAIN {'A' * 20000}\nS: 500 5.5.2\nC: NOOP\nS: 250",
    "answer of 20 KB": f"C: AUTH PLAIN\nS: 334\nC: {'A' * 20000}\nS: 500 5.5.2\nC: NOOP\nS: 250",
    "answer of 12 KB": f"C: AUTH PLAIN\nS: 334\nC: {'AAAA' * 3000}\nS: 501 5.5.2\nC: NOOP\nS: 250",
    "twice": f"C: {GOOD_LOGIN}\nS: 235\nC: {GOOD_LOGIN}\nS: 503 5.5.1",
    "twice, after EHLO": f"C: {GOOD_LOGIN}\nS: 235\nC: EHLO x\nS: 250\nC: {GOOD_LOGIN}\nS: 503 5.5.1",
    "in a transaction": f"C: {GOOD_LOGIN}\nS: 235\nC: MAIL FROM:<a@b.test>\nS: 250\nC: {GOOD_LOGIN}\nS: 503 5.5.1",
    "after HELO": f"C: HELO x\nS: 250\nC: {GOOD_LOGIN}\nS: 503 5.5.1",
    "login first": "C: MAIL FROM:<a@b.test>\nS: 530 5.7.0\nC: MAIL nonsense\nS: 530\nC: RCPT TO:<a@b.test>\nS: 503",
    "login still first": f"C: {plain('app', 'x')}\nS: 535\nC: MAIL FROM:<a@example.com>\nS: 530 5.7.0",
    "AUTH=": f"C: {GOOD_LOGIN}\nS: 235\nC: MAIL FROM:<a@b.test> AUTH=<>\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@b.test> AUTH=e+3Dmc2@example.com\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@b.test> AUTH=e+zz\nS: 501 5.5.4",
    "domain": f"C: {plain('app', 'grün')}\nS: 235\nC: MAIL FROM:<a@other.test>\nS: 550 5.7.1\n"
    "C: MAIL FROM:<>\nS: 550 5.7.1\nC: MAIL FROM:<a@example.com>\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@other.test>\nS: 550 5.7.1\nC: RCPT TO:<b@c.test>\nS: 503",
    "domain of the second message": f"C: {plain('app', 'grün')}\nS: 235\nC: MAIL FROM:<a@EXAMPLE.com>\nS: 250\n"
    "C: RCPT TO:<b@c.test>\nS: 250\nC: DATA\nS: 354\nC: x\\r\\n.\nS: 250\nC: MAIL FROM:<a@other.test>\nS: 550 5.7.1",
    "null sender without a list": f"C: {GOOD_LOGIN}\nS: 235\nC: MAIL FROM:<>\nS: 250",
}


@pytest.mark.parametrize("name", AUTHS)
def test_auth(doors: Any, name: str) -> None:
    with greeted(doors) as client:
        client.play(AUTHS[name], random.Random(name))


def test_auth_comes_after_ehlo(doors: Any) -> None:
    with Dialogue((doors.host, doors.port)) as client:
        client.ask(GOOD_LOGIN, "503 5.5.1")
        client.ask("STARTTLS", "503 5.5.1")


def test_unknown_user_and_wrong_password_sound_alike(doors: Any) -> None:
    def refused(user: str, password: str) -> str:
        with greeted(doors) as client:
            return client.ask(plain(user, password), "535")

    assert len({refused(*login) for login in [("app", "x"), ("nobody", "x"), ("", ""), ("old", ""), ("job", "x")]}) == 1


FAR = "198.51.100.7"
FAR_DOORS = [
    ("PLAIN needs TLS", "", plain("old", "x"), "538 5.7.11"),
    ("LOGIN needs TLS", "", "AUTH LOGIN", "538 5.7.11"), ("CRAM-MD5 does not", "", "AUTH CRAM-MD5", "334"),
    ("PLAIN under TLS", "tls", GOOD_LOGIN, "235"),
    ("no login, no mail", "", "MAIL FROM:<a@b.test>", "530 5.7.0"),
    ("nor under TLS", "tls", "MAIL FROM:<a@b.test>", "530 5.7.0"),
]  # fmt: skip


@pytest.mark.parametrize("client", [FAR, "2001:db8::7"])
@pytest.mark.parametrize("name, tls, line, want", FAR_DOORS)
def test_from_afar(doors: Any, pair: str, client: str, name: str, tls: str, line: str, want: str) -> None:
    with greeted(doors, client, pair if tls else "") as dialogue:
        dialogue.ask(line, want)


def test_ehlo_offers_what_can_be_used_now(doors: Any, pair: str) -> None:
    heard = []
    for client, tls in (("", ""), ("", pair), (FAR, ""), (FAR, pair)):
        with greeted(doors, client, tls) as dialogue:
            lines = dialogue.ask("EHLO x", "250").split("\n")
            heard.append([line[4:] for line in lines if line[4:].startswith(("AUTH", "STARTTLS"))])
    assert heard == [["STARTTLS", "AUTH PLAIN LOGIN"], ["AUTH PLAIN LOGIN"], ["STARTTLS"], ["AUTH PLAIN LOGIN"]]


def test_auth_insecure(start: Callable[..., Any]) -> None:
    relay = start(SMTP_AUTH_INSECURE="1", SMTP_AUTH_USER="ann", SMTP_AUTH_PASSWORD="x", SMTP_ALLOW_NETWORKS="0.0.0.0/0")
    with greeted(relay, FAR) as client:
        assert "AUTH PLAIN LOGIN CRAM-MD5" in client.ask("EHLO x", "250")
        client.ask(plain("ann", "x"), "235")


def test_without_accounts_or_pair_there_is_neither(start: Callable[..., Any]) -> None:
    with greeted(start()) as client:
        assert not re.search("AUTH|STARTTLS", client.ask("EHLO x", "250"))
        client.ask(GOOD_LOGIN, "502 5.5.1")
        client.ask("STARTTLS", "502 5.5.1")
        client.ask("MAIL FROM:<a@b.test>", "250")


def test_tls_required(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_TLS_REQUIRED="1", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair, SMTP_AUTH_ANY="1")
    with greeted(relay) as client:
        assert "AUTH" not in client.ask("EHLO x", "250")
        for line in (
            "HELO x",
            "MAIL FROM:<a@b.test>",
            "RCPT TO:<a@b.test>",
            "DATA",
            GOOD_LOGIN,
            "VRFY a",
            "HELP",
            "BDAT 0",
        ):
            client.ask(line, "530 5.7.0")
        for line in ("EHLO x", "NOOP", "RSET"):
            client.ask(line, "250")
        start_tls(client, pair)
        client.ask("EHLO x", "250")
        client.ask(GOOD_LOGIN, "235")
        assert "ESMTPSA" in sent(relay, client)


def sent(relay: Any, client: Dialogue, sender: str = "a@example.com") -> str:
    """Send a message; return the headers that it got."""
    reply = client.mail(b"Subject: x\r\n\r\nx\r\n", sender)
    assert reply.startswith("250"), reply
    if relay.parts.settings.storage == "memory":
        (octets,) = (v for k, v in relay.parts.spool.store.files.items() if reply.split()[-1] in k and "eml" in k)
        return str(octets.decode())
    (path,) = Path(relay.parts.settings.spool).glob(f"*/{reply.split()[-1]}*.eml")
    return path.read_text()


# -- STARTTLS --


def test_everything_is_forgotten_at_starttls(doors: Any, pair: str) -> None:
    with greeted(doors) as client:
        client.ask(GOOD_LOGIN, "235")
        client.ask("MAIL FROM:<a@b.test>", "250")
        start_tls(client, pair)
        client.ask("MAIL FROM:<a@b.test>", "503 5.5.1")  # no EHLO
        client.ask("AUTH PLAIN", "503 5.5.1")
        client.ask("RCPT TO:<a@b.test>", "503 5.5.1")
        client.ask("EHLO x", "250")
        client.ask("MAIL FROM:<a@b.test>", "530 5.7.0")  # no login
        client.ask("STARTTLS", "503 5.5.1")
        client.ask("STARTTLS now", "501 5.5.4")
        client.ask(GOOD_LOGIN, "235")
        assert "ESMTPSA" in sent(doors, client)
    assert doors.parts.accounts.get("old") and reserved_nothing(doors)


def reserved_nothing(relay: Any) -> bool:
    return bool(wait_until(lambda: not +relay.receiving.reception.quotas._reserved))


INJECTED = [b"NOOP\r\n", b"RSET\r\nMAIL FROM:<evil@x>\r\n", b"x", b"\r\n"]


@pytest.mark.parametrize("more", INJECTED)
def test_plaintext_after_starttls_ends_the_session(doors: Any, more: bytes) -> None:
    with greeted(doors) as client:
        client.send(b"STARTTLS\r\n" + more)
        assert client.reply().startswith("554 5.5.1") and client.closed()


def test_plaintext_that_comes_late_is_no_command(doors: Any, pair: str) -> None:
    """A command slipped in between STARTTLS and the handshake is heard neither before nor after it."""
    before = metric(doors, "smtp_tls_sessions_total")
    with greeted(doors) as client:
        client.ask("STARTTLS", "220")
        client.send(b"NOOP\r\nEHLO evil\r\n")
        with contextlib.suppress(OSError):
            answer = client.sock.recv(4096)
            assert not re.search(b"(?m)^[2-5][0-9][0-9] ", answer)
    assert metric(doors, "smtp_tls_sessions_total") == before


def test_nothing_is_answered_in_clear_after_the_220(doors: Any) -> None:
    with greeted(doors) as client:
        client.ask("STARTTLS", "220")
        client.sock.shutdown(socket.SHUT_WR)
        assert not re.search(b"(?m)^[2-5][0-9][0-9]", client.sock.recv(4096))


def test_the_handshake_has_the_command_deadline(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_COMMAND_TIMEOUT="0.2s", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair, SMTP_SMTPS_PORT="127.0.0.1:0")
    for port, starttls in ((relay.port, True), (relay.parts.smtps[0].getsockname()[1], False)):
        client = Dialogue((relay.host, port))
        if starttls:
            client.reply()
            client.ask("EHLO x", "250")
            client.ask("STARTTLS", "220")
        began = time.monotonic()
        with contextlib.suppress(OSError):
            while client.sock.send(b"\x16"[:1]) and time.monotonic() < began + 5:  # a hello that never ends
                client.sock.settimeout(0.04)
                with contextlib.suppress(socket.timeout):
                    if not client.sock.recv(100):
                        break
        assert time.monotonic() - began < 2
        client.sock.close()


@pytest.mark.parametrize("politely", [True, False])
def test_a_tls_close_inside_a_message_is_no_message(doors: Any, pair: str, politely: bool) -> None:
    before = metric(doors, "smtp_messages_received_total")
    with greeted(doors, pair=pair) as client:
        client.ask(GOOD_LOGIN, "235")
        client.envelope()
        client.ask("DATA", "354")
        client.send(b"Subject: x\r\n\r\nhalf\r\n")
        if politely:
            with contextlib.suppress(OSError):
                client.sock.settimeout(0.2)
                assert isinstance(client.sock, ssl.SSLSocket)
                client.sock.unwrap()
        else:
            socket.socket.shutdown(client.sock, socket.SHUT_RDWR)
    assert reserved_nothing(doors)
    assert metric(doors, "smtp_messages_received_total") == before


def test_an_idle_tls_session_hears_421_at_the_end(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair)
    with greeted(relay, pair=pair) as client, greeted(relay, pair=pair) as other:
        other.envelope()
        began = time.monotonic()
        threading.Thread(target=relay.receiving.stop).start()
        assert client.reply().startswith("421 4.3.2") and other.reply().startswith("421 4.3.2")
        assert time.monotonic() - began < 2


def test_a_message_under_tls_with_pipelining_and_a_large_body(doors: Any, pair: str) -> None:
    with greeted(doors, pair=pair) as client:
        client.ask(GOOD_LOGIN, "235")
        body = b"Subject: x\r\n\r\n" + b"y" * 998 + b"\r\n"
        client.send(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<b@c.test>\r\nDATA\r\n")
        assert [client.reply()[:3] for _ in range(3)] == ["250", "250", "354"]
        client.send(body * 3000 + b".\r\nNOOP\r\n", None)
        assert [client.reply()[:3] for _ in range(2)] == ["250", "250"]


# -- no open relay --

WAYS: list[tuple[str, dict[str, str], int, str]] = [
    ("every interface", {"SMTP_PORT": ":2525"}, 78, "SMTP_PORT: expected accounts"),
    ("every interface in words", {"SMTP_PORT": "0.0.0.0:2525"}, 78, "SMTP_PORT: expected accounts"),
    ("IPv6", {"SMTP_PORT": "[::]:2525"}, 78, "SMTP_PORT: expected accounts"),
    ("one of a list", {"SMTP_PORT": "2525,192.0.2.9:25"}, 78, "SMTP_PORT: expected accounts"),
    ("smtps", {"SMTP_SMTPS_PORT": ":465", "SMTP_TLS_SELF_SIGNED": "1"}, 78, "SMTP_PORT: expected accounts"),
    ("no login wanted", {"SMTP_PORT": ":2525", "SMTP_AUTH_REQUIRED": "0"}, 78, "SMTP_PORT: expected accounts"),
    ("any login", {"SMTP_PORT": ":2525", "SMTP_AUTH_ANY": "1"}, 78, "SMTP_AUTH_ANY=1: expected loopback"),
    (
        "any login, networks",
        {"SMTP_PORT": ":2525", "SMTP_AUTH_ANY": "1", "SMTP_ALLOW_NETWORKS": "0.0.0.0/0"},
        78,
        "SMTP_AUTH_ANY=1: expected loopback",
    ),
    (
        "any login, smtps",
        {"SMTP_SMTPS_PORT": ":465", "SMTP_AUTH_ANY": "1", "SMTP_TLS_SELF_SIGNED": "1"},
        78,
        "SMTP_AUTH_ANY=1",
    ),
    (
        "any login, private networks",
        {"SMTP_PORT": ":2525", "SMTP_AUTH_ANY": "1", "SMTP_ALLOW_NETWORKS": "172.16.0.0/12 loopback"},
        0,
        "fine",
    ),
    ("loopback", {"SMTP_PORT": "2525"}, 0, "fine"),
    ("a socket", {"SMTP_PORT": "unix:/run/smtp.sock"}, 0, "fine"),
    ("networks", {"SMTP_PORT": ":2525", "SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, 0, "fine"),
    ("an account", {"SMTP_PORT": ":2525", "SMTP_AUTH_USER": "a", "SMTP_AUTH_PASSWORD": "x"}, 0, "fine"),
    ("half an account", {"SMTP_AUTH_USER": "a"}, 78, "SMTP_AUTH_USER: expected SMTP_AUTH_PASSWORD"),
    ("TLS required without", {"SMTP_TLS_REQUIRED": "1"}, 78, "SMTP_TLS_REQUIRED, SMTP_SMTPS_PORT: expected"),
]


@pytest.mark.parametrize("name, settings, status, words", WAYS)
def test_doors_that_do_not_open_by_mistake(name: str, settings: dict[str, str], status: int, words: str) -> None:
    try:
        smtprelay.Settings.read(settings)
        assert status == 0
    except smtprelay.SettingsError as e:
        assert status == 78 and any(words in problem for problem in e.problems), e.problems


def test_the_program_refuses_to_be_an_open_relay() -> None:
    done = run(SMTP_PORT=":0", SMTP_HEALTH_ADDR="off")
    assert done.returncode == 78 and "SMTP_PORT: expected accounts" in done.stderr


ANYBODY = "0.0.0.0/0,::/0"
BRIDGE = "172.17.0.1"
VISITS = [
    ({}, FAR, "554 5.7.1"), ({"SMTP_AUTH_REQUIRED": "0"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, "127.0.0.1", "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, BRIDGE, "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, "local", "250"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16", "SMTP_AUTH_REQUIRED": "0"}, BRIDGE, "250"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, FAR, "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, "2001:db8::1", "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, "127.0.0.1", "250"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY, "SMTP_AUTH_ANY": "1"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY, "SMTP_AUTH_ANY": "1"}, "172.17.0.3", "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY, "SMTP_AUTH_ANY": "1", "SMTP_AUTH_REQUIRED": "0"}, "::2", "554 5.7.1"),
    ({"SMTP_AUTH_ANY": "1"}, "127.0.0.1", "530 5.7.0"),
    ({"SMTP_AUTH_ANY": "1", "SMTP_AUTH_REQUIRED": "0"}, "::1", "250"),
    ({"SMTP_AUTH_REQUIRED": "1"}, "127.0.0.1", "530 5.7.0"),
]  # fmt: skip


@pytest.mark.parametrize("settings, client, want", VISITS)
def test_who_may_come_and_send(start: Callable[..., Any], settings: dict[str, str], client: str, want: str) -> None:
    relay = start(**settings)
    with Visitor(relay, client) as visitor:
        if want.startswith("554"):
            assert visitor.greeting.startswith(want) and visitor.closed()
            assert metric(relay, "smtp_connections_refused_total") == 1
            return
        visitor.ask("EHLO x", "250")
        visitor.ask("MAIL FROM:<a@b.test>", want)


@pytest.mark.parametrize(
    "header, want",
    [
        (b"PROXY TCP4 198.51.100.7 127.0.0.1 1 2\r\n", "554 5.7.1"),
        (b"PROXY TCP4 172.17.0.1 127.0.0.1 1 2\r\n", "530 5.7.0"),
        (b"PROXY TCP6 ::ffff:172.17.0.1 ::1 1 2\r\n", "530 5.7.0"),
        (b"PROXY UNKNOWN\r\n", "530 5.7.0"),
        (b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", "250"),
    ],
)
def test_a_balancer_on_loopback_makes_nobody_local(start: Callable[..., Any], header: bytes, want: str) -> None:
    relay = start(SMTP_PROXY_NETWORKS="loopback", SMTP_ALLOW_NETWORKS="loopback,172.17.0.0/16")
    client = Dialogue((relay.host, relay.port))
    client.send(header)
    greeting = client.reply()
    if want.startswith("554"):
        assert greeting.startswith(want)
    else:
        client.ask("EHLO x", "250")
        client.ask("MAIL FROM:<a@b.test>", want)
    client.__exit__()


def own_address() -> str:
    """Return an address of this machine that is not loopback; skip the test when it has none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(("203.0.113.1", 9))
        if not ipaddress.ip_address(sock.getsockname()[0]).is_loopback:
            return str(sock.getsockname()[0])
    pytest.skip("this machine has no address but loopback")


def test_a_real_client_from_beyond_loopback(start: Callable[..., Any], pair: str) -> None:
    address = own_address()
    relay = start(SMTP_PORT=f"{address}:0", SMTP_AUTH_USER="ann", SMTP_AUTH_PASSWORD="x", SMTP_TLS_CERT=pair,
                  SMTP_TLS_KEY=pair, SMTP_ALLOW_NETWORKS=f"{address}/32")  # fmt: skip
    with greeted(relay) as client:
        client.ask("MAIL FROM:<a@b.test>", "530 5.7.0")
        client.ask(plain("ann", "x"), "538 5.7.11")
        start_tls(client, pair)
        client.ask("EHLO x", "250")
        client.ask(plain("ann", "x"), "235")
        client.ask("MAIL FROM:<a@b.test>", "250")


# -- limits --


def test_failed_logins_end_in_421_for_the_address(start: Callable[..., Any], tmp_path: Path) -> None:
    audit = tmp_path / "audit"
    relay = start(SMTP_AUTH_USER="ann", SMTP_AUTH_PASSWORD="x", SMTP_AUTH_FAILURES="2", SMTP_AUDIT_LOG=str(audit),
                  SMTP_ALLOW_NETWORKS=ANYBODY, SMTP_AUTH_INSECURE="1")  # fmt: skip
    for _ in range(3):  # neither a good login nor one that was given up counts
        with greeted(relay, FAR) as client:
            client.ask("AUTH PLAIN", "334")
            client.ask("*", "501")
            client.ask(plain("ann", "x"), "235")
        with greeted(relay, FAR) as client:
            client.ask("AUTH PLAIN", "334")
    for _ in range(2):
        with greeted(relay, FAR) as client:
            client.ask(plain("ann", "wrong"), "535")
    with greeted(relay, FAR) as client:
        client.ask(plain("ann", "x"), "421 4.7.0")
        assert client.closed()
    with greeted(relay, "198.51.100.8") as client:
        client.ask(plain("ann", "x"), "235")
    assert metric(relay, "smtp_auth_attempts_total") == {"success": 4, "failure": 2}
    assert any(line["event"] == "blocked" and line["client"] == FAR for line in audited(audit))


def test_failures_are_answered_ever_more_slowly(doors: Any) -> None:
    took = []
    with greeted(doors) as client:
        for _ in range(4):
            began = time.monotonic()
            client.ask(plain("app", "x"), "535")
            took.append(time.monotonic() - began)
    assert took[3] > 0.3 > took[0] and took[2] > took[0]


def test_too_many_errors(start: Callable[..., Any]) -> None:
    with greeted(start(SMTP_MAX_ERRORS="2", SMTP_AUTH_ANY="1")) as client:
        client.ask("MAIL FROM:<a@b.test>", "530")
        client.ask("AUTH FOO", "504")
        client.ask("AUTH PLAIN !", "421 4.7.0")
        assert client.closed()


@pytest.mark.parametrize(
    "first, second, third",
    [(FAR, FAR, "198.51.100.8"), ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"), ("local", "local", "127.0.0.1")],
)
def test_connections_per_client(start: Callable[..., Any], first: str, second: str, third: str) -> None:
    relay = start(SMTP_MAX_CONNECTIONS_PER_CLIENT="1", SMTP_ALLOW_NETWORKS=ANYBODY)
    with Visitor(relay, first):
        with Visitor(relay, second) as one_too_many:
            assert one_too_many.greeting.startswith("421 4.3.2") and one_too_many.closed()
        with Visitor(relay, third) as other:
            assert other.greeting.startswith("220")
    assert metric(relay, "smtp_connections_refused_total") == 1
    wait_until(lambda: not relay.receiving.reception.sessions)
    with Visitor(relay, second) as again:
        assert again.greeting.startswith("220")


def test_rate_limit_and_burst(start: Callable[..., Any], tmp_path: Path) -> None:
    relay = start(SMTP_RATE_LIMIT="1", SMTP_RATE_BURST="2", SMTP_AUDIT_LOG=str(tmp_path / "audit"))
    with greeted(relay) as client, greeted(relay, "127.0.0.9") as other:
        assert [client.mail()[:9] for _ in range(2)] == ["250 2.0.0"] * 2
        client.ask("MAIL FROM:<a@b.test>", "450 4.7.1")
        assert other.mail().startswith("250")
    assert metric(relay, "smtp_rate_limited_total") == 1
    assert [line["limit"] for line in audited(tmp_path / "audit") if line["event"] == "quota"] == ["rate"]


def test_rates_are_by_account_where_there_is_one(start: Callable[..., Any], tmp_path: Path) -> None:
    relay = start(SMTP_RATE_LIMIT="1", SMTP_RATE_BURST="1", SMTP_USERS_FILE=users_file(tmp_path, USERS))
    for login, want in ((GOOD_LOGIN, "250"), (GOOD_LOGIN, "450 4.7.1"), (plain("job", "mp_live_77"), "250")):
        with greeted(relay) as client:
            client.ask(login, "235")
            client.ask("MAIL FROM:<a@b.test>", want)


def test_an_account_that_was_removed_sends_no_more(start: Callable[..., Any], tmp_path: Path) -> None:
    path = users_file(tmp_path, USERS)
    with greeted(start(SMTP_USERS_FILE=path)) as client:
        client.ask(GOOD_LOGIN, "235")
        assert client.mail().startswith("250")
        users_file(tmp_path, {name: user for name, user in USERS.items() if name != "old"})
        client.ask("MAIL FROM:<a@b.test>", "530 5.7.0")


def test_a_quota_is_charged_at_the_250_alone(start: Callable[..., Any], tmp_path: Path) -> None:
    relay = start(SMTP_USERS_FILE=users_file(tmp_path, {"a": {"password": "x", "quota_daily": 2}}), SMTP_MAX_SIZE="100")
    quotas = relay.receiving.reception.quotas
    ends = ["RSET", "EHLO x", "NOOP", "MAIL FROM:<second@b.test>"]
    with greeted(relay) as client:
        client.ask(plain("a", "x"), "235")
        for end in ends:
            client.ask("MAIL FROM:<a@b.test>", "250")
            client.ask(end, "250|503")
            client.ask("RSET", "250")
            assert not +quotas._reserved
        assert client.mail(b"x" * 200 + b"\r\n").startswith("552")
        assert client.mail(b"x\ny\r\n").startswith("554")
        client.ask("MAIL FROM:<a@b.test>", "250")
        client.ask("RCPT TO:<a@b.test>", "250")
        client.send(b"BDAT 3\r\nx\r\nBDAT 200 LAST\r\n" + b"x" * 200)
        assert [client.reply()[:3] for _ in range(2)] == ["250", "552"]
        client.ask("MAIL FROM:<a@b.test>", "250")
    assert reserved_nothing(relay) and quotas.today("a") == {}
    with greeted(relay) as client, greeted(relay) as other:
        for one in (client, other):
            one.ask(plain("a", "x"), "235")
            one.ask("MAIL FROM:<a@b.test>", "250")
        with greeted(relay) as third:
            third.ask(plain("a", "x"), "235")
            third.ask("MAIL FROM:<a@b.test>", "450 4.7.1")  # two are under way
    assert reserved_nothing(relay) and quotas.today("a") == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_quotas_over_a_restart(program: Callable[..., Program], tmp_path: Path, number: int) -> None:
    users = {"day": {"password": "x", "quota_daily": 2}, "minute": {"password": "x", "quota_per_minute": 2}}
    relay = program(SMTP_USERS_FILE=users_file(tmp_path, users))
    counts = relay.spool.root / "usage"
    for sends in ([0, 1], []):
        for user in users:
            with greeted(relay) as client:
                client.ask(plain(user, "x"), "235")
                assert [client.mail()[:3] for _ in sends] == ["250" for _ in sends]
                client.ask("MAIL FROM:<a@b.test>", "450 4.7.1")
        if sends:
            if number == signal.SIGKILL:  # what happened in the last second is forgotten
                wait_until(lambda: "".join(p.read_text() for p in counts.glob("2*.json")).count('"received", 2') == 2)
            relay.stop(number)
            relay.start()


def test_white_space_at_the_end_of_a_command_means_nothing(holding: Any) -> None:
    """RFC 5321 4.1.1: servers should tolerate it."""
    with hello(holding) as client:
        client.ask("NOOP\t ", "250")
        client.ask("MAIL FROM:<a@b.test>\t", "250")
        client.ask("NOOP \t x", "500 5.5.2")
        client.ask("QUIT \t", "221")


def test_vrfy_takes_an_address_beyond_ascii(holding: Any) -> None:
    """RFC 6531 3.7.4.2."""
    with hello(holding) as client:
        client.ask("VRFY Jürgen SMTPUTF8", "252")
        client.ask("EXPN Jürgen SMTPUTF8", "502")
        client.ask("NOOP Jürgen", "500")


def test_bdat_before_tls_stays_in_step(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_TLS_REQUIRED="1", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair)
    with hello(relay) as client:
        client.send(b"BDAT 6 LAST\r\nQUIT\r\nNOOP\r\n")
        assert client.reply().startswith("530 5.7.0")
        assert client.reply().startswith("250 2.0.0")


def test_who_said_mail_before_the_queue_was_full_is_put_off_at_the_end(start: Any, hop: Any) -> None:
    relay = relaying_in_review(start, hop(listen=False), SMTP_QUEUE_SIZE="1")
    with hello(relay) as first, hello(relay) as second:
        for client in (first, second):
            client.ask("MAIL FROM:<ann@x.test>", "250")
            client.ask("RCPT TO:<bob@hop.test>", "250")
            client.ask("DATA", "354")
        assert first.ask("hello\r\n.").startswith("250")
        relay.delivering.catch_up()
        assert second.ask("hello\r\n.").startswith("452 4.3.1")
        second.ask("NOOP", "250")


DEVICES: list[tuple[str, list[str], str, str]] = [  # what an old device says at last; the reply without and with the setting
    ("", ["HELO"], "501", "250"), ("", ["EHLO my old  printer"], "501", "250"), ("", ["EHLO (scan)"], "501", "250"),
    ("EHLO x", ["MAIL FROM:ann@x.test"], "501 5.1.7", "250"), ("EHLO x", ["MAIL FROM: ann"], "501 5.1.7", "250"),
    ("EHLO x", ["MAIL FROM:<ann> SIZE=9"], "501 5.1.7", "250"), ("EHLO x", ["MAIL FROM:Scan <ann@x.test>"], "501", "250"),
    ("EHLO x", ["MAIL FROM:<>", "RCPT TO:bob NOTIFY=NEVER"], "501 5.1.3", "250"), ("EHLO x", ["MAIL FROM:"], "501", "501"),
    ("EHLO x", ["MAIL FROM:<>", "RCPT TO:"], "501 5.1.3", "501 5.1.3"), ("EHLO x", ["MAIL FROM:a b@x"], "501", "501"),
    ("HELO x", ["MAIL FROM:<> SIZE=9"], "555", "250"), ("EHLO x", ["AUTH PLAIN AGFubgB4eQ"], "501 5.5.2", "235"),
    ("EHLO x", ["AUTH PLAIN =", "AGFubgB4eQ"], "500", "235"), ("EHLO x", ["AUTH LOGIN", "YW5u", "eHk"], "501 5.5.2", "235"),
    ("EHLO x", ["AUTH LOGIN", "*"], "501 5.7.0", "501 5.7.0"), ("EHLO x", ["AUTH PLAIN AGFubgB4e"], "501", "501 5.5.2"),
]  # fmt: skip


@pytest.mark.parametrize("lenient", [False, True])
def test_what_old_devices_say_is_understood_where_that_is_wanted(start: Any, lenient: bool) -> None:
    relay = start(SMTP_LENIENT=str(int(lenient)), SMTP_AUTH_USER="ann", SMTP_AUTH_PASSWORD="xy", SMTP_AUTH_REQUIRED="0")
    for hello_, lines, *wants in DEVICES:
        with dial(relay) as client:
            replies = [client.ask(line) for line in ([hello_] if hello_ else []) + lines]
            assert replies[-1].startswith(wants[lenient]), (lines, replies)
    if lenient:
        with dial(relay) as client:
            for line in ("HELO", "MAIL FROM:root", "RCPT TO:bob", "DATA", "."):
                client.ask(line, "250|354")
        [(stem, _)] = relay.delivering.spool.names()
        record = relay.delivering.spool.load(stem)
        assert (record.reverse_path, record.recipients[0].address) == ("root@relay.test", "bob@relay.test")


@pytest.mark.parametrize("settings, client, want", [
    ({"SMTP_ALLOW_NETWORKS": "loopback 198.51.100.0/24"}, FAR, "250"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, FAR, "501"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, "127.0.0.1", "250"),
])  # fmt: skip
def test_lenience_is_for_loopback_and_named_networks(start: Any, settings: dict[str, str], client: str, want: str) -> None:
    with Visitor(start(SMTP_LENIENT="1", **settings), client) as visitor:
        visitor.ask("HELO", want)


MENDED = [  # content as it is on the wire, without its end; as it is kept
    (b"a\nb\r\n", b"a\r\nb\r\n"), (b"a\rb\r\n", b"a\r\nb\r\n"), (b"a\r\r\n\n\r\n", b"a\r\n\r\n\r\n\r\n"),
    (b"a\n.\nMAIL FROM:<>\r\n", b"a\r\n.\r\nMAIL FROM:<>\r\n"), (b"a\n.\r\nQUIT\r\n", b"a\r\n.\r\nQUIT\r\n"),
    (b"a\r.\rQUIT\r\n", b"a\r\n.\r\nQUIT\r\n"), (b"a\r\n.\nQUIT\r\n", b"a\r\n.\r\nQUIT\r\n"),
    (b"a\r\n.\r\r\nQUIT\r\n", b"a\r\n.\r\n\r\nQUIT\r\n"), (b".\nQUIT\r\n", b".\r\nQUIT\r\n"),
    (b"a\n..b\n...\n..\r\n", b"a\r\n.b\r\n..\r\n.\r\n"), (b"..a\r\n..\r\n", b".a\r\n.\r\n"), (b"\n", b"\r\n"),
]  # fmt: skip


def test_bare_line_ends_are_mended_where_that_is_wanted_and_smuggle_nothing(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_LENIENT="1", SMTP_DELIVERY="relay", **h.settings(SMTP_RELAY_TLS="none", SMTP_RELAY_REPAIR="0"))
    with hello(relay) as client:
        for content, kept in MENDED:
            for seed in range(4):
                taken = len(h.messages)
                client.envelope()
                client.ask("DATA", "354")
                client.send(content + (b".\r\n" if content.endswith(b"\r\n") else b"\r\n.\r\n"), random.Random(seed))
                assert client.reply().startswith("250 2.0.0"), content
                client.ask("NOOP", "250 2.0.0 Ok")
                wait_until(functools.partial(lambda n: len(h.messages) > n, taken))
                kept_here = kept if content.endswith(b"\r\n") else kept + b"\r\n"
                assert h.messages[taken].content.endswith(b"\r\n" + kept_here), (content, h.messages[taken])
        client.envelope()
        client.send(b"BDAT 4\r\na\nb\rBDAT 2 LAST\r\n\nc")
        assert [client.reply()[:3] for _ in range(2)] == ["250", "250"]
        wait_until(lambda: h.messages[-1].content.endswith(b"a\r\nb\r\nc\r\n"))
    assert len(h.messages) == 4 * len(MENDED) + 1


ADMITTED: list[tuple[list[bytes], int, str]] = [  # blocks, recipients, what a session would say
    ([MAIL], 1, ""), ([MAIL[:50], MAIL[50:]], 3, ""), ([b"split between CR\r", b"\nand LF\r\n"], 1, ""),
    ([b"bare\nLF\r\n"], 1, "554 5.6.0"), ([b"bare\rCR\r\n"], 1, "554 5.6.0"), ([b"x" * 2000], 1, "552 5.3.4"),
    ([b"Received: x\r\n" * 101 + MAIL], 1, "554 5.4.6"), ([MAIL], 4, "452 4.5.3"), ([MAIL], 0, "554 5.5.1"),
]  # fmt: skip


def test_every_entrance_has_the_rules_of_a_session(start: Any, tmp_path: Path) -> None:
    relay = start(SMTP_MAX_SIZE="1999", SMTP_MAX_RECIPIENTS="3", SMTP_AUDIT_LOG=str(tmp_path / "audit"))
    reception, ids = relay.delivering.reception, []
    for blocks, many, want in ADMITTED:
        envelope = smtprelay.Envelope("a@b.test", "local", user="u", recipients=[f"{n}@c.test" for n in range(many)])
        try:
            ids.append(reception.admit(envelope, iter(blocks)))
            assert not want and fetch(relay, f"/api/v1/message/{ids[-1]}/raw")[2].endswith(b"".join(blocks).decode())
        except smtprelay.Refused as e:
            assert want and str(e).startswith(want)
    assert [line["id"] for line in audited(tmp_path / "audit") if line["event"] == "accepted"] == ids
    refusals = [line["reply"][:9] for line in audited(tmp_path / "audit") if line["event"] == "refused"]
    assert refusals == [want for _, _, want in ADMITTED if want]
    assert [m.id for m in relay.messages] == ids and metric(relay, "smtp_messages_received_total") == len(ids) == 3


def test_commits_come_in_the_order_in_which_they_were_asked_for() -> None:
    turns, order = smtprelay.Turns(1), []

    def take(name: int) -> None:
        with turns:
            order.append(name)

    threads = [threading.Thread(target=take, args=(n,)) for n in range(20)]
    with turns:
        for n, thread in enumerate(threads):
            thread.start()
            wait_until(functools.partial(lambda n: len(turns.queue) == n + 1, n))
    for thread in threads:
        thread.join()
    assert order == list(range(20)) and turns.free == 1


@pytest.mark.parametrize("limit", [{"SMTP_QUEUE_SIZE": "1"}, {"SMTP_SPOOL_MAX_SIZE": "120"}])
def test_no_entrance_has_room_where_there_is_none(start: Any, hop: Any, limit: dict[str, str]) -> None:
    relay = relaying_in_review(start, hop(listen=False), **limit)
    admit = relay.delivering.reception.admit
    admit(smtprelay.Envelope("a@b.test", recipients=["bob@hop.test"]), [b"x" * 98 + b"\r\n"])
    with pytest.raises(smtprelay.Refused, match="452 4.3.1"):
        admit(smtprelay.Envelope("a@b.test", recipients=["bob@hop.test"]), [b"x" * 98 + b"\r\n"])
    mail = {"From": {"Email": "a@b.test"}, "To": [{"Email": "c@d.test"}], "Text": "x" * 100}
    assert api(relay, "POST", "/api/v1/send", mail)[0] == 503


# === LISTENER ================================================================


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="no processors to choose here")
def test_a_crowd_of_sessions_keeps_to_one_processor(start: Any) -> None:
    before = set(threading.enumerate())
    relay = start(SMTP_STORAGE="memory")

    def policies() -> set[tuple[int, int]]:
        ids = [t.native_id for t in set(threading.enumerate()) - before if t.name == "session"]
        return {(os.sched_getscheduler(id), len(os.sched_getaffinity(id))) for id in ids if id}

    usual = (os.SCHED_OTHER, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as crowd:
        for _ in range(smtprelay.CROWD + 1):
            crowd.enter_context(hello(relay))
        wait_until(lambda: (os.SCHED_BATCH, 1) in policies())

    def alone() -> bool:
        wait_until(lambda: not metric(relay, "smtp_sessions_active"))
        with hello(relay):
            return policies() == {usual}

    wait_until(alone)  # each thread that waits takes its turn


def test_one_session_too_many_gets_421(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_MAX_CONNECTIONS="2")
    with dial(relay) as first, dial(relay):
        with dial(relay) as third:
            assert third.greeting.startswith("421 4.3.2") and third.closed()
        first.ask("QUIT", "221")

        def again() -> bool:
            with dial(relay) as client:
                return client.greeting.startswith("220")

        wait_until(again)


def test_a_peer_outside_the_networks_gets_554(start: Callable[..., Any]) -> None:
    with dial(start(SMTP_STORAGE="memory", SMTP_ALLOW_NETWORKS="192.0.2.0/24")) as client:
        assert client.greeting.startswith("554 5.7.1") and client.closed()


def test_ipv4_and_ipv6_share_a_free_port(start: Callable[..., Any]) -> None:
    relay = start(SMTP_PORT="0")
    for host in ("127.0.0.1", "::1"):
        with Dialogue((host, relay.port)) as client:
            client.ask("EHLO client.test", "250")
            assert client.mail().startswith("250")


def test_several_addresses_and_a_unix_socket(program: Callable[..., Program], tmp_path: Path) -> None:
    path = tmp_path / "s"
    relay = program(SMTP_PORT=f"127.0.0.1:0, unix:{path}, 127.0.0.1:0")
    for _ in range(2):
        ports = set(re.findall(r"smtp://127\.0\.0\.1:(\d+)", relay.log()))
        assert len(ports) == 2
        for address in [str(path), *(("127.0.0.1", int(port)) for port in ports)]:
            with Dialogue(address) as client:
                client.ask("EHLO client.test", "250")
                assert client.mail().startswith("250")
        relay.stop(signal.SIGKILL)  # which leaves the socket's name behind
        relay.start()
    relay.stop()
    assert not path.exists()


def test_a_port_that_is_taken_is_a_clear_error(program: Callable[..., Program], tmp_path: Path) -> None:
    done = run(**{**QUICK, "SMTP_SPOOL": str(tmp_path / "other"), "SMTP_PORT": f"127.0.0.1:{program().port}"})
    assert (done.returncode in (1, 69, 71, 75, 78), "Traceback" in done.stderr) == (True, False)


def test_many_sessions_at_once(holding: Any) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(holding)) for _ in range(200)]
        for client in clients:
            client.send(b"EHLO client.test\r\n")
        assert all(client.reply().startswith("250") for client in clients)


def test_no_more_sessions_than_allowed_however_many_come_at_once(start: Callable[..., Any]) -> None:
    relay = start(SMTP_MAX_CONNECTIONS="20")
    clients = [socket.create_connection((relay.host, relay.port), 8) for _ in range(60)]
    with contextlib.ExitStack() as stack:
        for client in clients:
            stack.enter_context(client)
        greetings = [client.recv(100)[:3] for client in clients]
    assert (greetings.count(b"220"), greetings.count(b"421")) == (20, 40)


def test_a_thread_that_stumbles_still_accepts(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    relay, whole = start(), smtprelay.Session

    def stumbling(*args: Any) -> Any:
        monkeypatch.setattr(smtprelay, "Session", whole)
        raise MemoryError

    monkeypatch.setattr(smtprelay, "Session", stumbling)
    with Dialogue((relay.host, relay.port)) as client:
        assert client.greeting.startswith("421")
    with dial(relay) as client:
        assert client.greeting.startswith("220")


def test_a_listener_is_a_socketserver(start: Callable[..., Any]) -> None:
    """What the plan asks for: its handler holds the session."""
    listener: Any = start().receiving.listeners[0]
    assert isinstance(listener, socketserver.ThreadingTCPServer)
    handler: Any = listener.RequestHandlerClass
    assert issubclass(handler, socketserver.BaseRequestHandler)


def test_with_no_descriptor_left_it_waits_and_says_so_once(start: Callable[..., Any], caplog: Any) -> None:
    relay = start()
    listener, real = relay.receiving.listeners[0], relay.receiving.listeners[0].socket
    listener.socket = mock.Mock(accept=mock.Mock(side_effect=OSError(errno.EMFILE, "too many")))
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(OSError, match="too many"):
            listener.get_request()
    listener.socket = real
    assert time.monotonic() - began >= 0.3 and caplog.text.count("accept_failed") == 1


@pytest.mark.parametrize("port", ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0", "unix:"])
def test_stop_wakes_all_who_wait(start: Callable[..., Any], tmp_path: Path, port: str) -> None:
    path = f"{tmp_path}/s" if port == "unix:" else ""
    relay = start(SMTP_PORT=f"127.0.0.1:0 {port}{path}", SMTP_ALLOW_NETWORKS="127.0.0.0/8 ::1 10.0.0.0/8")
    listener = relay.receiving.listeners[-1]
    address: Any = path or listener.socket.getsockname()[:2]
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(Dialogue(address))
    wait_until(lambda: not relay.receiving.reception.sessions)
    began = time.monotonic()
    relay.receiving.stop()
    assert time.monotonic() - began < 1.3 and listener.waiting == 0


# === INBOX ===================================================================


def record_for(id: str, raw: bytes, to: tuple[str, ...] = ("bob@example.com",), **more: Any) -> Any:
    """A spool record for a message."""
    values: dict[str, Any] = {
        "id": id,
        "status": smtprelay.Status.HELD,
        "received_at": "2026-11-21T10:00:00.000Z",
        "client": "127.0.0.1",
        "helo": "box",
        "protocol": "ESMTP",
        "user": "",
        "reverse_path": "alice@example.com",
        "size": len(raw),
    }
    people = [smtprelay.Recipient(address) for address in to]
    return smtprelay.Message(**{**values, "recipients": people, **more})


def mail_of(raw: bytes) -> Any:
    """A message as it is read, from Alice to Bob by its envelope."""
    return smtprelay.Email(record_for("x", raw), raw)


def mail_with(text: str, page: str = "", subject: str = "") -> Any:
    """A mail of a text, an HTML and a subject."""
    part = "--=\r\nContent-Type: text/{}; charset=utf-8\r\n\r\n{}\r\n"
    head = f"Subject: {subject}\r\nContent-Type: multipart/alternative; boundary==\r\n\r\n"
    return mail_of((head + part.format("plain", text) + part.format("html", page) + "--=--").encode())


class Box:
    """An inbox over messages in a dict, being its spool too; an id may be of any length."""

    on_disk = False

    def __init__(self) -> None:
        self.raws: dict[str, bytes] = {}
        self.records: dict[str, Any] = {}
        self.opened = 0
        self.trouble: OSError | None = None
        self.inbox = smtprelay.Inbox(self, smtprelay.Log(logging.getLogger("a relay under test")))  # type: ignore[arg-type]

    def fetch(self, stem: str, done: bool) -> tuple[Any, BinaryIO]:
        if self.trouble:
            raise self.trouble
        self.opened += 1
        return self.records[stem[11:]], io.BytesIO(self.raws[stem[11:]])

    def load(self, stem: str) -> Any:
        return self.records[stem[11:]]

    def put(self, raw: bytes, id: str = "", **more: Any) -> str:
        id = id or f"m{len(self.raws)}"
        self.raws[id], self.records[id] = raw, record_for(id, raw, **more)
        self.inbox.add("2026-11-21/" + id)
        return id


def asking(box: Box, words: str = "", page: tuple[int, int] = (0, 50)) -> Any:
    """Stand in for a request."""
    return SimpleNamespace(
        inbox=box.inbox, words=words, zone="", query={}, path="/api/v1/messages", number=lambda name, _: page[name == "limit"]
    )


def listed(box: Box, words: str = "", page: tuple[int, int] = (0, 50)) -> Any:
    return smtprelay.list_messages(asking(box, words, page))


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.inbox.close()


PLAIN_MAIL = (
    b"Received: from box\r\nFrom: Alice <alice@example.com>\r\n"
    b'To: "Doe, Bob" <bob@example.com>, carol@example.com\r\n'
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?= from\r\n =?utf-8?b?w4RseQ==?=\r\n"
    b"Message-ID: <1@example.com>\r\nDate: Sat, 21 Nov 2026 10:00:00 +0100\r\n"
    b"\r\nHello Bob,\r\nsee you.\r\n"
)
MIME_TREE = (
    b"From: a@b.example\r\nTo: c@d.example\r\nSubject: tree\r\nMIME-Version: 1.0\r\n"
    b'Content-Type: multipart/mixed; boundary="out"\r\n\r\npreamble\r\n'
    b"--out\r\nContent-Type: multipart/related; boundary=outer\r\n\r\n"
    b"--outer\r\nContent-Type: multipart/alternative; boundary=x\r\n\r\n"
    b"--x\r\nContent-Type: text/plain; charset=iso-8859-1\r\n"
    b"Content-Transfer-Encoding: quoted-printable\r\n\r\nna=EFve=\r\n text\r\n"
    b'--x\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<p>na\xc3\xafve <img src="cid:logo%40x">'
    b" <a href='https://x.example/?a=1&amp;b=2'>go</a>\r\n"
    b"--x--\r\n--outer\r\nContent-Type: image/png; name=logo.png\r\nContent-ID: <logo@x>\r\n"
    b"Content-Transfer-Encoding: base64\r\n\r\niVBO\r\nRw==\r\n--outer--\r\n"
    b"--out\r\nContent-Type: application/pdf\r\n"
    b"Content-Disposition: attachment; filename*=utf-8''r%C3%A9sum%C3%A9.pdf\r\n\r\n%PDF\r\n"
    b"--out\r\nContent-Type: message/rfc822\r\n\r\nSubject: inner\r\n\r\nbody\r\n"
    b"--out--\r\nepilogue"
)


def test_read_plain() -> None:
    mail = mail_of(PLAIN_MAIL)
    assert mail.subject == "Grüße from Äly"
    assert people(mail.people["to"]) == [("Doe, Bob", "bob@example.com"), ("", "carol@example.com")]
    assert mail.text == "Hello Bob,\nsee you.\n"
    assert mail.date == "2026-11-21T10:00:00+01:00"
    assert [p.number for p in mail.parts] == ["0"]
    assert [name for name, _ in mail.fields][:2] == ["Received", "From"]


def test_read_tree() -> None:
    mail = mail_of(MIME_TREE)
    shape = [(p.number, p.content_type, p.role, p.filename) for p in mail.parts]
    assert shape == [
        ("1.1.1", "text/plain", "body", ""),
        ("1.1.2", "text/html", "body", ""),
        ("1.2", "image/png", "inline", "logo.png"),
        ("2", "application/pdf", "attachment", "résumé.pdf"),
        ("3", "message/rfc822", "attachment", ""),
    ]
    assert mail.text == "naïve text"
    assert [p.content for p in mail.parts[2:]] == [
        b"\x89PNG",
        b"%PDF",
        b"Subject: inner\r\n\r\nbody",
    ]
    assert '<img src="data:image/png;base64,iVBORw==">' in smtprelay.view_html(mail)
    assert mail.links == ["https://x.example/?a=1&b=2"]


MEGABYTE = 1 << 20
LENGTH = MEGABYTE // 4
MULTIPART = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
HTML_HEAD = b"Content-Type: text/html\r\n\r\n"

READ = [  # (content, text, attachments)
    (b"", "", 0),
    (b"\r\n", "", 0),
    (b"just words", "just words", 0),
    (b"Subject: x\r\nno header here\r\nmore", "no header here\nmore", 0),
    (b"Subject: x\n\nbare\n", "bare\n", 0),
    (b"Content-Type: text/plain; charset=nonsense\r\n\r\n\xe9\xc3\xa9", "éÃ©", 0),
    (b"Content-Type: text/plain; charset=punycode\r\n\r\nabc", "abc", 0),
    (b"Content-Type: text/plain; charset=utf-16\r\n\r\n\xff\xfea\0", "a", 0),
    (
        b"Content-Type: text/html\r\n\r\n<!DOCTYPE html><?xml x?><p>a<br>b</p><style>x{}</style><!-- <b>no --><td>c<td>d",
        "a\nb\nc d",
        0,
    ),
    (b"Content-Type: multipart/mixed\r\n\r\nno boundary", "no boundary", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\nnever there", "never there", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nunclosed", "unclosed", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n--b\r\n--b--\r\n", "", 0),
    (
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n--b \nContent-Type: x/y\n\n2\n--b--",
        "one",
        1,
    ),
    (b"Content-Type: application/pdf\r\n\r\n%PDF", "", 1),
    (b'Content-Type: text/plain; name="a.txt"\r\n\r\nfile', "file", 0),
    (MULTIPART + b'--b\r\n\r\none\r\n--b\r\nContent-Type: text/plain; name="a.txt"\r\n\r\nfile\r\n--b--', "one", 1),
    (b"Content-Type: text/plain; format=flowed\r\n\r\nlong \r\nline\r\n> quoted \r\n> too\r\n-- \r\nme", "long line\n> quoted too\n-- \nme", 0),
    (b"Content-Type: text/plain; format=flowed; delsp=yes\r\n\r\nlo \r\nng\r\n  in", "long\n in", 0),
    (b"Content-Type: (a) text/plain (b) charset=\"ISO-8859-1\" (c)\r\n\r\n\x80", "\u20ac", 0),
    (b"Content-Transfer-Encoding: base64 (x)\r\n\r\naGk=", "hi", 0),
    (MULTIPART + b"--b\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--b--", "one\n--\ntwo", 0),
    (MULTIPART.replace(b"mixed", b"alternative") + b"--b\r\n\r\none\r\n--b\r\nContent-Type: text/calendar\r\n\r\nBEGIN\r\n--b--", "one", 0),
    (b">From x\r\nSubject: y\r\nno field\r\nX-B: z\r\n\r\nbody", "body", 0),
    (b"Content-Transfer-Encoding: base64\r\n\r\naGVsbG8*gd29ybGQ", "hello world", 0),
    (b"Content-Transfer-Encoding: base64\r\n\r\naGVsbG8gd29ybGQX=YW", "hello world\x17a", 0),
    (b"Content-Transfer-Encoding: quoted-printable\r\n\r\na=ZZ=\r\nb=", "a=ZZb", 0),
    (b"Content-Transfer-Encoding: x-unknown\r\n\r\nabc", "abc", 0),
    (b"Content-Type: text/<script>\r\n\r\nx", "", 1),
]


@pytest.mark.parametrize("raw, text, attachments", READ)
def test_read(raw: bytes, text: str, attachments: int) -> None:
    mail = mail_of(raw)
    assert (mail.text, len(mail.having("attachment"))) == (text, attachments)


def people(found: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(person["Name"], person["Address"]) for person in found]


CHARSETS = [  # (label, octets, text)
    ("ISO-8859-1", b"\x80 \xe9", "€ é"),
    ("us-ascii", b"caf\xc3\xa9", "café"),
    ("'Latin1'", b"\xe9", "é"),
    ("x-sjis", "①㈱髙".encode("cp932"), "①㈱髙"),
    ("iso-2022-jp", b"\x1b$B-!-j\x1b(B a", "①㈱ a"),
    ("iso-2022-jp", b"\x1b(I1\x1b(B", "ｱ"),
    ("EUC-JP", b"\xad\xa1\xa4\xa2\x8e\xb1\x8e\xb2\xa4\xa2", "①あｱｲあ"),
    ("iso-2022-jp", b"\x1b$B-!$\"\x1b(I12\x1b(B~a", "①あｱｲ~a"), ("iso-2022-jp", b"a\x1b$B-!-j\x1b(B", "a①㈱"),
    ("ks_c_5601-1987", "똠".encode("cp949"), "똠"),
    ("GB_2312-80", "镕".encode("gb18030"), "镕"),
    ("big5", "嘅".encode("big5hkscs"), "嘅"),
    ("windows-874", b"\xa1", "ก"),
    ("TIS-620", b"\xa1", "ก"),
    ("iso-8859-8-i", b"\xf9", "ש"),
    ("iso-8859-9", b"\xdd\xfe", "İş"),
    ("iso_8859-15:1998", b"\xa4", "€"),
    ("latin-2", b"\xb1", "ą"),
    ("cp1250 (x)", b"\xb9", "ą"),
    ("x-mac-cyrillic", b"\x80", "А"),
    ("koi8-u", b"\xa4", "є"),
    ("unicode-1-1-utf-7", b"+AOk-", "é"),
    ("UTF-16", "é".encode("utf-16"), "é"),
    ("utf-8", b"\xef\xbb\xbfa\xff", "a\ufffd"),
    ("", b"\xfc", "ü"),
    ("no-such", "ü".encode(), "ü"),
    ("punycode", b"abc-", "abc-"),
    ("", b"<meta http-equiv=Content-Type content='text/html; charset=koi8-r'>\xc1", "а"),
]


@pytest.mark.parametrize("label, octets, text", CHARSETS)
def test_charsets(label: str, octets: bytes, text: str) -> None:
    assert smtprelay.decode_text(octets, label).rpartition(">")[2] == text
    if label and "(" not in label:
        word = b"Subject: =?%s?B?%s?=\r\n\r\n" % (label.strip("'").encode(), base64.b64encode(octets))
        assert mail_of(word).subject == text


LABELS = """
utf-8: unicode-1-1-utf-8 unicode11utf8 unicode20utf8 utf-8 utf8 x-unicode20utf8
ibm866: 866 cp866 csibm866 ibm866
iso-8859-2: csisolatin2 iso-8859-2 iso-ir-101 iso8859-2 iso88592 iso_8859-2 iso_8859-2:1987 l2 latin2
iso-8859-3: csisolatin3 iso-8859-3 iso-ir-109 iso8859-3 iso88593 iso_8859-3 iso_8859-3:1988 l3 latin3
iso-8859-4: csisolatin4 iso-8859-4 iso-ir-110 iso8859-4 iso88594 iso_8859-4 iso_8859-4:1988 l4 latin4
iso-8859-5: csisolatincyrillic cyrillic iso-8859-5 iso-ir-144 iso8859-5 iso88595 iso_8859-5 iso_8859-5:1988
iso-8859-6: arabic asmo-708 csiso88596e csiso88596i csisolatinarabic ecma-114 iso-8859-6 iso-8859-6-e
iso-8859-6: iso-8859-6-i iso-ir-127 iso8859-6 iso88596 iso_8859-6 iso_8859-6:1987
iso-8859-7: csisolatingreek ecma-118 elot_928 greek greek8 iso-8859-7 iso-ir-126 iso8859-7 iso88597 iso_8859-7 iso_8859-7:1987 sun_eu_greek
iso-8859-8: csiso88598e csisolatinhebrew hebrew iso-8859-8 iso-8859-8-e iso-ir-138
iso-8859-8: iso8859-8 iso88598 iso_8859-8 iso_8859-8:1988 visual csiso88598i iso-8859-8-i logical
iso-8859-10: csisolatin6 iso-8859-10 iso-ir-157 iso8859-10 iso885910 l6 latin6
iso-8859-13: iso-8859-13 iso8859-13 iso885913
iso-8859-14: iso-8859-14 iso8859-14 iso885914
iso-8859-15: csisolatin9 iso-8859-15 iso8859-15 iso885915 iso_8859-15 l9
iso-8859-16: iso-8859-16
koi8-r: cskoi8r koi koi8 koi8-r koi8_r
koi8-u: koi8-ru koi8-u
mac_roman: csmacintosh mac macintosh x-mac-roman
cp874: dos-874 iso-8859-11 iso8859-11 iso885911 tis-620 windows-874
cp1250: cp1250 windows-1250 x-cp1250
cp1251: cp1251 windows-1251 x-cp1251
cp1252: ansi_x3.4-1968 cp1252 cp819 csisolatin1 ibm819 iso-8859-1 iso-ir-100
cp1252: iso8859-1 iso88591 iso_8859-1 iso_8859-1:1987 l1 latin1 windows-1252 x-cp1252
cp1253: cp1253 windows-1253 x-cp1253
cp1254: cp1254 csisolatin5 iso-8859-9 iso-ir-148 iso8859-9 iso88599 iso_8859-9 iso_8859-9:1989 l5 latin5 windows-1254 x-cp1254
cp1255: cp1255 windows-1255 x-cp1255
cp1256: cp1256 windows-1256 x-cp1256
cp1257: cp1257 windows-1257 x-cp1257
cp1258: cp1258 windows-1258 x-cp1258
mac_cyrillic: x-mac-cyrillic x-mac-ukrainian
gb18030: chinese csgb2312 csiso58gb231280 gb2312 gb_2312 gb_2312-80 gbk iso-ir-58 x-gbk gb18030
big5hkscs: big5 big5-hkscs cn-big5 csbig5 x-x-big5
euc_jp: cseucpkdfmtjapanese euc-jp x-euc-jp
iso2022_jp_ext: csiso2022jp iso-2022-jp
cp932: csshiftjis ms932 ms_kanji shift-jis shift_jis sjis windows-31j x-sjis
cp949: cseuckr csksc56011987 euc-kr iso-ir-149 korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949
utf_16_be: unicodefffe utf-16be
utf_16: utf-16
utf_16_le: csunicode iso-10646-ucs-2 ucs-2 unicode unicodefeff utf-16le
hz: hz-gb-2312
iso2022_kr: iso-2022-kr csiso2022kr
utf_7: utf-7 unicode-1-1-utf-7 csunicode11utf7
"""  # of WHATWG's Encoding standard, and some more, behind Python's codec


def test_every_label_of_a_charset_is_known() -> None:
    """But for those of ASCII: what says so is read as UTF-8 where it can be."""
    for codec, _, labels in (line.partition(": ") for line in LABELS.strip().split("\n")):
        for label in labels.split():
            found = smtprelay.find_codec(label)
            assert found and codecs.lookup(found).name == codecs.lookup(codec).name, label
    assert not any(map(smtprelay.find_codec, ("ascii", "us-ascii", "", "()", "x", "punycode", "rot13", "mbcs")))


SUBJECTS = [  # (as it is sent, as it is shown)
    ("=?utf-8?q?a?= =?utf-8?q?b?=", "ab"),
    ("=?utf-8?q?a?= b =?utf-8?q?c?=", "a b c"),
    ("=?utf-8?b?w4?= =?utf-8?b?qQ==?=", "é"),  # a character cut in two
    ("=?utf-8?Q?What??=", "What?"),
    ("=?UTF-8*en?Q?a b_c?=", "a b c"),
    ("ü =?iso-8859-1?q?=FC?= ü", "ü ü ü"),
    ("[=?utf-8?q?x?=] =?utf-8?q?=", "[x] =?utf-8?q?="),
    ("=?utf-8?q?a=0D=0Ab?=", "a  b"),
]


@pytest.mark.parametrize("sent, shown", SUBJECTS)
def test_encoded_words(sent: str, shown: str) -> None:
    assert mail_of(f"Subject: {sent}\r\n\r\n".encode()).subject == shown


def test_long_headers_lose_nothing_that_is_needed() -> None:
    to = ", ".join(f"=?utf-8?q?J=C3=BCrgen_the_{n}th?= <user{n}@example.com>" for n in range(1000))
    raw = "X-Long: " + "x" * MEGABYTE + f"\r\nTo: {to}\r\nCc: a@x\r\nto: b@x\r\nSubject: after\r\n\r\nbody"
    mail = mail_of(raw.encode())
    assert (len(mail.people["to"]), mail.people["to"][0]["Name"], mail.subject, mail.text) == (
        1001, "Jürgen the 0th", "after", "body")


PARAMETERS = [  # (Content-Type, type, parameters)
    ("text/html charset=utf-8", "text/html", {"charset": "utf-8"}),
    ('a/b; Name="x; y=\\"z"; q=1', "a/b", {"name": 'x; y="z', "q": "1"}),
    ("a/b; name=my file (1).pdf; x=y", "a/b", {"name": "my file (1).pdf", "x": "y"}),
    ('a/b; boundary="a (b)"; charset=x (y)', "a/b", {"boundary": "a (b)", "charset": "x"}),
    ("a/b; name*0*=utf-8''%C3; name*1*=%A9; name*2=.pdf", "a/b", {"name": "é.pdf"}),
    ("a/b; filename=plain; filename*=iso-8859-1'de'%FC", "a/b", {"filename": "ü"}),
    ("a/b; filename*=utf-8''%e2%82%ac; filename=plain", "a/b", {"filename": "€"}),
]


@pytest.mark.parametrize("value, kind, parameters", PARAMETERS)
def test_parameters(value: str, kind: str, parameters: dict[str, str]) -> None:
    assert smtprelay.header_parameters(value) == (kind, parameters)


CODES = [
    # (text, codes)
    ("Your code: 12 34 56", ["123456"]),
    ("Two-factor: 482913", ["482913"]),
    ("Your code 482913 expires in 10 minutes", ["482913"]),
    ("2-step verification - 482 913", ["482913"]),
    ("Mã xác minh của bạn là 553311", ["553311"]),
    ("رمز التحقق الخاص بك هو ٥٥٣٣١١", ["553311"]),
    ("आपका सत्यापन कोड 553311 है", ["553311"]),
    ("รหัสยืนยันของคุณคือ 553311", ["553311"]),
    ("Doğrulama kodunuz: 553311", ["553311"]),
    ("Twój kod weryfikacyjny to 553311", ["553311"]),
    ("Uw verificatiecode is 553311", ["553311"]),
    ("O seu código de verificação é 553311", ["553311"]),
    ("Kode verifikasi Anda adalah 553311", ["553311"]),
    ("Votre code de vérification est 553311", ["553311"]),
    ("Il tuo codice di verifica è 553311", ["553311"]),
    ("Ваш код подтверждения: 553311", ["553311"]),
    ("確認コードは 553311 です", ["553311"]),
    ("認証番号：５５３３１１", ["553311"]),
    ("인증번호는 553311 입니다", ["553311"]),
    ("驗證碼：553311", ["553311"]),
    ("Din engångskod är 553311", ["553311"]),
    ("Vahvistuskoodi: 553311", ["553311"]),
    ("Váš ověřovací kód je 553311", ["553311"]),
    ("Codul tău este 553311", ["553311"]),
    ("Ο κωδικός σας είναι 553311", ["553311"]),
    ("קוד האימות שלך הוא 553311", ["553311"]),
    ("Đơn hàng 553311 đã được giao", []),
    ("Ihre Bestellung 553311 ist unterwegs", []),
    ("Sipariş no: 553311, kod gerekmez", []),
    ("Pedido 553311 confirmado", []),
    ("Your verification code is 123456.", ["123456"]),
    ("Your verification code is:\n\n    482913\n\nIt expires in 10 minutes.", ["482913"]),
    ("482913 is your Acme verification code.", ["482913"]),
    ("G-284719 is your Google verification code.", ["G-284719"]),
    ("Use code ABC-123 to sign in.", ["ABC-123"]),
    ("Your one-time code: 123 456", ["123456"]),
    ("Your code: 1 2 3 4 5 6", ["123456"]),
    ("Enter 7731 as your PIN", ["7731"]),
    ("PIN: 2024", ["2024"]),
    ("Your OTP is 00123456", ["00123456"]),
    ("Code: x7k9q2", ["x7k9q2"]),
    ("Your confirmation code for Acme Inc. is X7K9QZ", ["X7K9QZ"]),
    ("To sign in enter the code WDJB-MJHT on your TV.", ["WDJB-MJHT"]),
    ("Ihr Bestätigungscode lautet 553311", ["553311"]),
    ("Tu código de verificación es 553311", ["553311"]),
    ("您的验证码是 553311,请勿泄露", ["553311"]),
    (
        "Here is the code you asked for. Do not share it with anyone.\n\n91 Main St\n\n771204",
        ["771204"],
    ),
    ("Backup codes:\n1234-5678\n2345-6789\n3456-7890", ["1234-5678", "2345-6789", "3456-7890"]),
    ("Order 48291 confirmed. Your code is 553311.", ["553311"]),
    (
        "Your code is 553311.\n\n(c) 2026 Acme, 1600 Amphitheatre Parkway, Mountain View, CA 94043",
        ["553311"],
    ),
    ("Your code is 553311. Questions? Call +1 (555) 123-4567 or 555-123-4567.", ["553311"]),
    ("Use 204060 to verify your password.", ["204060"]),
    ("Your login code is\n\n*123456*\n", ["123456"]),
    ("Security code 123456; expires 2026-11-21 10:30", ["123456"]),
    # none at all
    ("Welcome to Acme! Founded 2019, (c) 2026.", []),
    ("Your order 482913 of $1234.50 has shipped.", []),
    ("Invoice #482913 is due on 2026-11-21.", []),
    ("Call 555-123-4567 with your zip code 94107", []),
    ("Our postal code: 94107", []),
    ("Error code 404123? See status code 5001.", []),
    ("color: #123456; the code is in the repository", []),
    ("Your promo saves 1500 points", []),
    ("https://x.example/verify?code=123456 is your verification link", []),
    ("Your code expires in 3600 seconds", []),
    ("Reset your password within 1440 minutes", []),
    ("Meeting in room 1204 at 1430", []),
    ("Transfer of 5000 EUR: no code needed", []),
]


@pytest.mark.parametrize("text, found", CODES)
def test_codes(text: str, found: list[str]) -> None:
    assert mail_with(text).codes == found
    page = "<html><title>Code 999999</title><body><p>" + text.replace("\n", "<br>") + "</p>"
    assert mail_with("", page).codes == found


def test_codes_look_at_the_subject_and_the_html() -> None:
    assert mail_with("See above.", "", "123456 is your code").codes == ["123456"]
    assert mail_with("See the HTML part.", "<p>Code</p><b>123456</b>").codes == ["123456"]
    digits = "".join(f"<td>{n}</td>" for n in (4, 8, 2, 9, 1, 3))
    assert mail_with("", f"<p>Your code:</p><table><tr>{digits}</table>").codes == ["482913"]


LINKS = [  # (text, html, links)
    ("", "<a data-href=https://a.example href=' myapp://verify/42\n'>", ["myapp://verify/42"]),
    ("", "<a href=app:go><a href='tel:1'><a title='x' HREF = \"https://x.example/a b\">", ["app:go", "https://x.example/a%20b"]),
    ("https://x.example/r?t=ab_ and https://x.example/t-*, too", "", ["https://x.example/r?t=ab_", "https://x.example/t-*"]),
    ("*https://b.example/* _https://i.example_ [https://l.example]", "",
     ["https://b.example/", "https://i.example", "https://l.example"]),
    ("打开 https://c.example/a。谢谢", "", ["https://c.example/a"]),
    ("slack://open or (myapp://x/y).", "", ["slack://open", "myapp://x/y"]),
    ("", "<a href='https://x.example/?a=1&#38;b=2'>", ["https://x.example/?a=1&b=2"]),
    ("go to https://x.example/a?b=1.", "", ["https://x.example/a?b=1"]),
    (
        "(see https://x.example/a_(b)) <https://y.example/>",
        "",
        ["https://x.example/a_(b)", "https://y.example/"],
    ),
    (
        "https://t.example",
        '<a class=b href="https://h.example/?a&amp;b">',
        ["https://h.example/?a&b", "https://t.example"],
    ),
    ("", "<A HREF=https://h.example>x</A><a href='https://h.example'>", ["https://h.example"]),
    (
        "",
        "<a href='javascript:alert(1)'><a href=mailto:x@y><img src=https://i.example><link href=https://l.example>",
        [],
    ),
    ("", "<!-- <a href=https://no.example> --><script><a href=https://no.example></script>", []),
]


@pytest.mark.parametrize("text, page, found", LINKS)
def test_links(text: str, page: str, found: list[str]) -> None:
    assert mail_with(text, page).links == found


FILENAMES = [
    ("report.pdf", "report.pdf"),
    ("../../etc/passwd", "passwd"),
    ("C:\\evil\\a.exe", "a.exe"),
    (".bashrc", "bashrc"),
    ('a"b;c\r\nX: y.txt', "a_b_c__X_ y.txt"),
    ("résumé \u202egpj.exe", "résumé _gpj.exe"),
    ("", "attachment"),
    ("..", "attachment"),
    ("x" * 300 + ".tar", "x" * 96 + ".tar"),
    ("." + "y" * 300, "y" * 100),
]


@pytest.mark.parametrize("name, safe", FILENAMES)
def test_safe_filename(name: str, safe: str) -> None:
    assert smtprelay.safe_filename(name) == safe


SERVED = [  # (Content-Type, served as, disposition)
    ("image/png", "image/png", "inline"),
    ("text/plain; charset=latin-1", "text/plain; charset=latin-1", "inline"),
    ('text/plain; charset="x y"', "text/plain; charset=utf-8", "inline"),
    ("application/pdf", "application/pdf", "attachment"),
    ("text/html", "application/octet-stream", "attachment"),
    ("image/svg+xml", "application/octet-stream", "attachment"),
    ("text/xml", "application/octet-stream", "attachment"),
    ("application/xhtml+xml", "application/octet-stream", "attachment"),
    ("text/javascript", "application/octet-stream", "attachment"),
    ("multipart/x-mixed-replace; boundary=q", "text/plain; charset=utf-8", "inline"),
]


@pytest.mark.parametrize("sent, served, disposition", SERVED)
def test_part_headers(sent: str, served: str, disposition: str) -> None:
    raw = f'Content-Type: {sent}\r\nContent-Disposition: attachment; filename="a\\"\u00e9.x"\r\n\r\nx'
    headers = smtprelay.part_headers(mail_of(raw.encode()).parts[0])
    assert headers["Content-Type"] == served
    assert headers["Content-Disposition"].startswith(disposition + '; filename="a__.x"')
    assert all(value.isascii() and value.isprintable() for value in headers.values())
    assert "sandbox" in headers["Content-Security-Policy"]


SEARCHES = [  # (query, ids found)
    ("", "dcba"),
    ("from:alice", "ba"),
    ("FROM:Alice", "ba"),
    ("-from:alice", "dc"),
    ("!from:alice", "dc"),
    ("to:bob", "dba"),
    ("cc:carol", "b"),
    ("bcc:hidden@example.com", "c"),
    ("recipient:hidden", "c"),
    ("reply-to:desk", "b"),
    ("addressed:carol", "b"),
    ("subject:invoice", "b"),
    ('subject:"your invoice"', "b"),
    ('"your invoice"', "b"),
    ("message-id:b@x", "b"),
    ("message-id:<b@x>", "b"),
    ("is:read", "a"),
    ("-is:read", "dcb"),
    ("is:unread from:alice", "b"),
    ("is:tagged", "cb"),
    ("tag:Urgent", "b"),
    ("-tag:urgent", "dca"),
    ("has:attachment", "d"),
    ("has:attachments", "d"),
    ("-has:attachment", "cba"),
    ("has:inline", "d"),
    ("report.pdf", "d"),
    ("larger:1kb", "d"),
    ("smaller:1k", "cba"),
    ("larger:0.5M", ""),
    ("before:2026-11-20", "a"),
    ("after:2026-11-21T10:00:00Z", "dcb"),
    ("after:2026/11/22", "d"),
    ("before:nonsense", ""),
    ('after:"2026-11-19 00:00" before:"2026-11-20 00:00"', "a"),
    ("far away", "a"),
    ('"far away"', "a"),
    ("away far", "a"),
    ("-far", "dcb"),
    ("grüße", "b"),
    ("GRÜSSE", ""),
    ("unknown:word", ""),
    ('- ! : " ""', ""),
    ("*", ""),
    ("€", ""),
    ("(", ""),
    ("from:", "dcba"),
    ("from: subject:invoice", "b"),
    ("after:2026-11-20 before:", "dcb"),
    ("x.example/?a=1", "d"),
    ("logo.png", "d"),
    ("before:2026", ""),
    ("after:2026-11 from:dave", "c"),
    ("from:,", ""), ("after:1795132800", "dcb"), ("before:1795132800000", "a"),
    ("after:11/22/2026", "d"),
    ('after:"Nov 22, 2026"', "d"),
    ('before:"20 November 2026"', "a"),
    ('before:"22.11.2026 10:00 PM"', "cba"),
]


@pytest.fixture
def four(box: Box) -> Box:
    long = b"word " * 90 + b"far away\r\n"
    box.put(
        b"From: Alice <alice@example.com>\r\nTo: bob@example.com\r\n\r\n" + long,
        "a",
        received_at="2026-11-19T08:00:00Z",
    )
    box.put(
        b"From: alice@example.com\r\nTo: bob@example.com\r\nCc: Carol <carol@example.com>\r\n"
        b"Reply-To: desk@x\r\nSubject: =?utf-8?q?Gr=C3=BC=C3=9Fe=2C?= your invoice\r\n"
        b"Message-ID: <b@x>\r\nX-Tags: Urgent, x/y\r\n\r\nshort",
        "b",
    )
    box.put(
        b"From: dave@x.example\r\nTo: list@example.com\r\n\r\nblind",
        "c",
        to=("list@example.com", "hidden@example.com"),
    )
    box.put(
        MIME_TREE.replace(b"filename*=utf-8''r%C3%A9sum%C3%A9.pdf", b"filename=report.pdf").replace(
            b"c@d.example", b"bob@example.com"
        )
        + b" " * 500,
        "d",
        received_at="2026-11-23T00:00:00Z",
    )
    box.inbox.change(["a"], read=True)
    box.inbox.tag(["c", "nobody"], ["Second", "bad/tag"])
    return box


@pytest.mark.parametrize("query, found", SEARCHES)
def test_search(four: Box, query: str, found: str) -> None:
    page = four.inbox.search(smtprelay.compile_query(query, "UTC"))
    assert "".join(item["ID"] for item in page.items) == found
    assert page.total == len(found)
    assert page.unread == len(found.replace("a", ""))


def test_signs_are_looked_for_like_words(box: Box) -> None:
    for n, text in enumerate(("5 * 3 (x)", "5 € 🎉", "a\r\n" + "word " * 100 + "🎉")):
        box.put(f"Content-Type: text/plain; charset=utf-8\r\n\r\n{text}".encode(), f"m{n}")
    found = {q: [item["ID"] for item in box.inbox.search(smtprelay.compile_query(q)).items] for q in ("*", "€", "🎉", "(", "-🎉")}
    assert found == {"*": ["m0"], "€": ["m1"], "🎉": ["m2", "m1"], "(": ["m0"], "-🎉": ["m0"]}


def test_words_of_both_parts_are_found(box: Box) -> None:
    box.put(MULTIPART.replace(b"mixed", b"alternative") + b"--b\r\n\r\nplainly\r\n--b\r\nContent-Type: text/html\r\n\r\n"
            b"<p>rich&#108;y <a href='https://x.example/token-42'>go</a>\r\n--b--", to=("hidden@example.com",))
    for word in ("plainly", "richly", "token-42", "hidden@example.com"):
        assert box.inbox.search(smtprelay.compile_query(word)).total == 1, word


def test_moment_knows_time_zones() -> None:
    before, found, after = datetime.now(timezone.utc), smtprelay.search_moment("10:00 pm", "UTC"), datetime.now(timezone.utc)
    assert found in {f"{now:%Y-%m-%d}T22:00:00" for now in (before, after)}
    assert smtprelay.search_moment("2000", "UTC") == smtprelay.search_moment("01/01/2000", "UTC") == "2000-01-01T00:00:00"
    assert [smtprelay.search_moment(v) for v in ("13/13/2000", "yesterday", "2000-02-31", "9" * 5000)] == [""] * 4
    assert smtprelay.search_moment("2026-11-21", "Pacific/Auckland") == "2026-11-20T11:00:00"
    assert smtprelay.search_moment("2026-11-21t10:00+02:00", "Mars/Olympus") == "2026-11-21T08:00:00"
    assert smtprelay.search_moment("2026-11-21", "../../etc/passwd") == smtprelay.search_moment("2026-11-21")
    assert [smtprelay.search_size(v) for v in ("2kb", "1.5m", "10", "1 m", "x", "1g")] == [
        2048,
        1572864,
        10,
        1048576,
        0,
        0,
    ]


NEEDLES = [  # (fields and body, how often a search for what it holds not opens it)
    (b"\r\nshort needle", 0),
    (b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.b64encode(b"needle"), 0),
    (b"\r\n" + b"word " * 90 + b"needle", 1),
    (b"Content-Transfer-Encoding: quoted-printable\r\n\r\n=6eee=\r\ndle " + b"word " * 90, 1),
    (b"Content-Type: text/html\r\n\r\n<b>nee</b>dle", 1),
    (b"Content-Type: text/plain; charset=utf-16\r\n\r\n" + ("needle " * 90).encode("utf-16"), 1),
    (b"Content-Type: application/pdf; name=needle.pdf\r\n\r\n", 1),
]


@pytest.mark.parametrize("raw, opened", NEEDLES)
def test_search_finds_words_wherever_they_are(box: Box, raw: bytes, opened: int) -> None:
    box.put(b"Subject: x\r\n" + raw)
    held = {q: box.inbox.search(smtprelay.compile_query(q)).total for q in ("needle", "-needle", "absent")}
    assert held == {"needle": 1, "-needle": 0, "absent": 0}
    before = box.opened
    box.inbox.search(smtprelay.compile_query("absent"))
    assert box.opened - before == opened


def test_search_opens_nothing_it_knows(four: Box) -> None:
    four.inbox.search(smtprelay.compile_query("from:x"))
    before = four.opened
    four.inbox.search(smtprelay.compile_query("from:alice short"))
    assert four.opened == before + 1  # a's text is longer than its snippet
    four.inbox.search(smtprelay.compile_query("subject:nothing far"))
    assert four.opened == before + 1


def test_nothing_is_read_on_the_way_in(box: Box) -> None:
    for _ in range(100):
        box.put(PLAIN_MAIL)
    assert box.opened == 0
    assert [item["ID"] for item in box.inbox.search(limit=2).items] == ["m99", "m98"]
    assert box.opened == 2
    assert [item["ID"] for item in box.inbox.search(start=98, limit=50).items] == ["m1", "m0"]
    assert len(box.inbox.search(limit=0).items) == 100


def test_sequence_numbers_are_never_reused(box: Box) -> None:
    box.put(PLAIN_MAIL, "a")
    box.put(PLAIN_MAIL, "b")
    assert box.inbox.delete(["b", "nobody"]) == ["b"]
    box.put(PLAIN_MAIL, "c")
    assert box.inbox.add("2026-11-21/c") == box.inbox.last == 3
    assert box.inbox.delete() == ["a", "c"]
    assert (box.inbox.search().total, box.inbox.deleted) == (0, 3)
    assert box.inbox.get("latest") is None


def test_a_message_that_trips_the_reader_is_shown_as_such(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    real = smtprelay.read_mail

    def tripping(raw: bytes) -> Any:
        if b"evil" in raw:
            raise RecursionError("deep")
        return real(raw)

    monkeypatch.setattr(smtprelay, "read_mail", tripping)
    box.put(PLAIN_MAIL, "good")
    box.put(b"Subject: evil\r\n\r\n" + b"word " * 100, "bad")
    shown = listed(box)["messages"]
    assert [m["Subject"] for m in shown] == ["(cannot be read)", "Grüße from Äly"]
    assert [item["ID"] for item in box.inbox.search(smtprelay.compile_query("hello")).items] == ["good"]
    found = box.inbox.wait(smtprelay.compile_query("subject:from"), timeout=0)
    assert found and found["ID"] == "good"
    assert "cannot be read" in box.inbox.mail("bad").text
    assert box.inbox.delete() == ["good", "bad"]


def test_what_a_person_did_survives_a_restart(tmp_path: Path) -> None:
    for more in ({}, {"SMTP_SPOOL_KEY": "7" * 64}):
        spool = tmp_path / str(len(more))
        settings: dict[str, Any] = {"SMTP_STORAGE": "file", "SMTP_SPOOL": str(spool), "SMTP_FSYNC": "0", **more}
        with smtprelay.start(**settings) as relay:
            inbox, seen = relay.delivering.inbox, relay.delivering.inbox.last
            for n in range(3):
                submit(relay, f"n{n}")
                assert inbox.wait(smtprelay.ALL, since=seen, timeout=10)
                seen = inbox.last
            first, second, _ = list(inbox.entries)
            inbox.change([first], read=True)
            inbox.tag([second], ["Kept"])
            wait_until((spool / "inbox.json").exists)  # at once, not only at the end
        assert (b"Kept" in (spool / "inbox.json").read_bytes()) == (not more)
        with smtprelay.start(**settings) as relay:
            inbox = relay.delivering.inbox
            assert inbox.counts() == (3, 2, {"Kept": 1})
            item = inbox.get(first)
            assert item and item["Read"]
        for torn in ((spool / "inbox.json").read_bytes()[:20], b"[1]", b'{"x": 1}'):
            (spool / "inbox.json").write_bytes(torn)
            with smtprelay.start(**settings) as relay:
                assert relay.delivering.inbox.counts() == (3, 3, {})
        with smtprelay.start(**settings) as relay:
            relay.delivering.inbox.change(None, read=True)
        with smtprelay.start(**settings) as relay:
            assert relay.delivering.inbox.counts()[1] == 0


def test_tags_come_from_fields_addresses_and_rules(box: Box) -> None:
    box.inbox.rules = [("Big", smtprelay.compile_query("larger:1k")), ("greeting", smtprelay.compile_query("hello"))]
    box.put(b"X-Tags: One,one ,t*w/o\r\n\r\nHello", "a", to=("bob+plus+Two@example.com",))
    assert box.inbox.counts()[2] == {"greeting": 1, "One": 1, "plus": 1, "two": 1}
    box.inbox.tag(["a"], [])
    assert box.inbox.counts()[2] == {}


def test_a_message_that_is_gone_is_forgotten(box: Box) -> None:
    box.put(PLAIN_MAIL, "a")
    box.put(PLAIN_MAIL, "b")
    del box.raws["b"]
    latest = box.inbox.get("latest")
    assert latest and latest["ID"] == "a"
    assert box.inbox.search().total == 1
    assert box.inbox.get("b") is None


def test_a_message_that_cannot_be_read_is_kept(box: Box) -> None:
    box.put(PLAIN_MAIL, "a")
    box.trouble = OSError(24, "too many open files")
    assert box.inbox.search().items == []
    box.trouble = None
    assert len(box.inbox.search().items) == 1


def test_tags(four: Box) -> None:
    four.inbox.search(smtprelay.compile_query("from:x"))
    assert four.inbox.counts() == (4, 3, {"badtag": 1, "Second": 1, "Urgent": 1, "xy": 1})
    four.inbox.rename_tag("URGENT", "Later")
    four.inbox.rename_tag("second")
    assert four.inbox.counts()[2] == {"badtag": 1, "Later": 1, "xy": 1}
    four.inbox.change(None, read=True)
    assert four.inbox.counts()[1] == 0


# -- waiting


def later(call: Any, *args: Any) -> threading.Thread:
    thread = threading.Timer(0.02, call, args)
    thread.start()
    return thread


def test_wait_finds_what_is_there_or_comes(box: Box) -> None:
    to_bob = smtprelay.compile_query("to:bob")
    assert box.inbox.wait(to_bob, timeout=0.01) is None
    first, second = box.put(PLAIN_MAIL), box.put(PLAIN_MAIL)
    newest = box.inbox.wait(to_bob, timeout=0)
    assert newest and newest["ID"] == second
    oldest = box.inbox.wait(to_bob, since=0, timeout=0)
    assert oldest and oldest["ID"] == first
    following = box.inbox.wait(to_bob, since=oldest["sequence"], timeout=0)
    assert following and following["ID"] == second
    thread = later(box.put, PLAIN_MAIL, "new")
    found = box.inbox.wait(to_bob, since=following["sequence"], timeout=5)
    assert found and found["ID"] == "new"
    thread.join()


def test_wait_sleeps_through_other_mail(box: Box) -> None:
    thread = later(lambda: [box.put(PLAIN_MAIL.replace(b"bob@", b"x%d@" % n)) for n in range(50)])
    assert box.inbox.wait(smtprelay.compile_query("to:bob@"), timeout=0.1) is None
    thread.join()
    assert box.opened <= 50


def test_wait_does_not_poll(box: Box) -> None:
    before = time.thread_time()
    assert box.inbox.wait(smtprelay.compile_query("to:bob"), timeout=0.2) is None
    assert time.thread_time() - before < 0.02


def test_close_wakes_the_waiters(box: Box) -> None:
    thread = later(box.inbox.close)
    begun = time.monotonic()
    assert box.inbox.wait(smtprelay.compile_query("to:bob"), timeout=10) is None
    assert time.monotonic() - begun < 5
    thread.join()


def test_parallel_waiters_each_get_their_own_while_pruning(box: Box) -> None:
    found: dict[int, str] = {}
    ready = threading.Barrier(21)

    def wait(n: int) -> None:
        ready.wait()
        item = box.inbox.wait(smtprelay.compile_query(f"to:user{n}@"), since=0, timeout=10)
        found[n] = item["ID"] if item else "nothing"

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    ready.wait()
    for n in range(200):
        box.put(PLAIN_MAIL.replace(b"bob@", b"user%d@" % n), f"id{n}")
        if n > 100:
            box.inbox.delete([f"id{n - 50}"])
    for thread in threads:
        thread.join()
    assert found == {n: f"id{n}" for n in range(20)}


def test_email(box: Box) -> None:
    box.put(MIME_TREE + b"", "m7")
    mail = box.inbox.mail("m7")
    assert (mail.from_, mail.to, mail.subject) == ("a@b.example", ["c@d.example"], "tree")
    assert (mail.reverse_path, mail.recipients) == ("alice@example.com", ["bob@example.com"])
    assert [(p.filename, len(p.content)) for p in mail.attachments][:2] == [
        ("logo.png", 4),
        ("résumé.pdf", 4),
    ]
    assert mail.headers["subject"] == "tree"
    assert (mail.links, mail.codes, mail.raw) == (["https://x.example/?a=1&b=2"], [], MIME_TREE)
    assert repr(mail) == "<Email 'tree' from 'a@b.example' to ['bob@example.com'] id m7>"
    assert "Found: https://x.example/?a=1&b=2\n\nnaïve text" in str(mail)


MAILS = Path(__file__).parent / ".ci" / "mail"


@pytest.mark.parametrize("case", json.loads((MAILS / "expected.json").read_text("utf-8")), ids=lambda case: case["file"])
def test_mail_as_programs_write_it(box: Box, case: dict[str, Any]) -> None:
    """What is shown of a mail: a field of the API's message, a link, a code, the page of its HTML."""
    id = box.put((MAILS / case["file"]).read_bytes())
    item = box.inbox.get(id)
    assert item
    mail = box.inbox.mail(id)
    shown = smtprelay.waited_json(item, mail)
    shown.update(links=mail.links, codes=mail.codes, view=smtprelay.view_html(mail))
    for path, wanted in case["want"].items():
        name, _, how = path.partition(".")
        found = shown[name]
        if how == "addresses":
            found = [person["Address"] for person in found]
        if how == "count":
            found = len(found)
        assert (wanted in found) == (how == "contains") if how in ("contains", "lacks") else found == wanted, path


# -- JSON


SUMMARY_TYPES = {
    "ID": str,
    "MessageID": str,
    "Read": bool,
    "From": dict,
    "To": list,
    "Cc": list,
    "Bcc": list,
    "ReplyTo": list,
    "Subject": str,
    "Created": str,
    "Username": str,
    "Tags": list,
    "Size": int,
    "Attachments": int,
    "Snippet": str,
}
MESSAGE_TYPES = {
    "ID": str,
    "MessageID": str,
    "From": dict,
    "To": list,
    "Cc": list,
    "Bcc": list,
    "ReplyTo": list,
    "ReturnPath": str,
    "Subject": str,
    "ListUnsubscribe": dict,
    "Date": str,
    "Tags": list,
    "Username": str,
    "Text": str,
    "HTML": str,
    "Size": int,
    "Inline": list,
    "Attachments": list,
}


def types(value: dict[str, Any]) -> dict[str, type]:
    return {name: type(member) for name, member in value.items()}


def test_mailpit_json(four: Box) -> None:
    listing = listed(four, "to:bob", (0, 2))
    assert json.loads(json.dumps(listing)) == listing
    counts = {name: listing[name] for name in listing if name != "messages"}
    assert counts == {
        "total": 4,
        "unread": 3,
        "count": 2,
        "messages_count": 3,
        "messages_unread": 2,
        "start": 0,
        "tags": ["Second", "Urgent", "badtag", "xy"],
    }
    d, b = listing["messages"]
    assert types(d) == types(b) == {**SUMMARY_TYPES, "Status": str}
    assert b["From"] == {"Name": "", "Address": "alice@example.com"}
    assert (b["Cc"], b["Tags"]) == ([{"Name": "Carol", "Address": "carol@example.com"}], ["Urgent", "xy"])
    item = four.inbox.get("d")
    assert item
    whole = smtprelay.waited_json(item, four.inbox.mail("d"))
    assert types(whole) == {**SUMMARY_TYPES, **MESSAGE_TYPES, "Sequence": int, "Links": list, "Codes": list}
    assert types(whole["ListUnsubscribe"]) == {
        "Header": str,
        "Links": list,
        "Errors": str,
        "HeaderPost": str,
    }
    logo = whole["Inline"][0]
    sums = {name: hashlib.new(name, b"\x89PNG").hexdigest() for name in ("MD5", "SHA1", "SHA256")}
    assert logo.pop("Checksums") == sums
    assert logo == {
        "PartID": "1.2",
        "FileName": "logo.png",
        "ContentType": "image/png",
        "ContentID": "logo@x",
        "Size": 4,
    }
    assert [a["FileName"] for a in whole["Attachments"]] == ["report.pdf", "part-3.eml"]
    assert (whole["Sequence"], whole["Links"], whole["Codes"]) == (4, ["https://x.example/?a=1&b=2"], [])


def test_headers_json() -> None:
    mail = mail_of(
        b"MIME-version: 1.0\r\nmessage-ID: <x>\r\nReceived: a\r\nreceived: b\r\n c\r\n"
        b"X-\xc3\xa9: this is no field\r\nlast: d\r\n\r\n"
    )
    assert smtprelay.headers_json(mail) == {
        "Last": ["d"],
        "Message-Id": ["<x>"],
        "Mime-Version": ["1.0"],
        "Received": ["a", "b c"],
        "Return-Path": ["<alice@example.com>"],
        "Bcc": ["bob@example.com"],
    }
    assert list(smtprelay.headers_json(mail))[:2] == ["Bcc", "Last"]


def test_mailhog_json(box: Box) -> None:
    box.put(MIME_TREE)
    box.put(PLAIN_MAIL)
    listing = smtprelay.mailhog_messages(asking(box, "", (0, 2)))
    assert json.loads(json.dumps(listing)) == listing
    assert (listing["total"], listing["count"], listing["start"]) == (2, 2, 0)
    plain, tree = listing["items"]
    assert plain["Content"]["Headers"]["Message-ID"] == ["<1@example.com>"]
    assert plain["Content"]["Body"] == "Hello Bob,\r\nsee you.\r\n"
    assert plain["Raw"]["Data"] == PLAIN_MAIL.decode()
    assert plain["To"] == [{"Relays": None, "Mailbox": "bob", "Domain": "example.com", "Params": ""}]
    assert plain["MIME"] is None
    assert len(tree["MIME"]["Parts"]) == 5


# -- sending


SEND: dict[str, Any] = {
    "From": {"Name": "Jöhn, D", "Email": "john@example.com"},
    "To": [{"Name": "Jane", "Email": "jane@example.com"}],
    "Cc": [{"Email": "cc@example.com"}],
    "Bcc": ["bcc@example.com"],
    "ReplyTo": [{"Email": "desk@example.com"}],
    "Subject": "Grüße\r\nX-Evil: yes",
    "Text": "Hëllo",
    "HTML": "<p>Hi <img src='cid:logo'>",
    "Headers": {"X-IP": "1.2.3.4\r\nBcc: evil@example.com"},
    "Tags": ["Tag 1", "bad\r\ntag"],
    "Attachments": [
        {"Content": "iVBORw==", "Filename": "logo.png", "ContentID": "logo"},
        {
            "Content": "data:text/plain;base64,aGk=",
            "Filename": "../a.txt",
            "ContentType": "text/x-thing",
        },
    ],
}


def test_compose() -> None:
    raw, reverse_path, recipients = smtprelay.compose(SEND)
    assert reverse_path == "john@example.com"
    assert recipients == ["jane@example.com", "cc@example.com", "bcc@example.com"]
    assert b"\n" not in raw.replace(b"\r\n", b"") and raw.endswith(b"\r\n")
    mail = mail_of(raw)
    names = [name for name, _ in mail.fields]
    assert "Bcc" not in names and "X-Evil" not in names
    assert people(mail.people["from"]) == [("Jöhn, D", "john@example.com")]
    assert mail.subject == "Grüße  X-Evil: yes"
    assert (mail.text, mail.page) == ("Hëllo\n", "<p>Hi <img src='cid:logo'>\r\n")
    found = [(p.filename, p.content_type, p.role, p.content) for p in mail.parts if p.role != "body"]
    assert found == [
        ("logo.png", "image/png", "inline", b"\x89PNG"),
        ("a.txt", "text/x-thing", "attachment", b"hi"),
    ]
    assert smtprelay.header(mail.fields, "x-tags") == "badtag, Tag 1"
    assert smtprelay.header(mail.fields, "message-id").endswith("@example.com>")
    assert "data:image/png;base64," in smtprelay.view_html(mail)


MINIMAL: dict[str, Any] = {"from": {"email": "a@b.example"}, "to": [{"email": "c@d.example"}]}
REFUSED_SENDS = [  # (change, error begins with)
    ([], "body: must be an object"),
    ({"From": None}, "From.Email: invalid address ''"),
    ({"From": "a@b.example"}, "From: must be of type dict"),
    ({"From": {"Email": "nobody"}}, "From.Email: invalid address 'nobody'"),
    ({"From": {"Email": "a@b\r\nc"}}, "From.Email: invalid address"),
    ({"To": None}, "To: no recipients"),
    ({"To": {}}, "To: must be of type list"),
    ({"To": ["a@b.example"]}, "To[0]: must be an object"),
    ({"To": [{"Email": "a b@c"}]}, "To[0].Email: invalid address"),
    ({"To": [{"Email": "ä\x00@b.example"}]}, "To[0].Email: invalid address"),
    ({"Bcc": [1]}, "Bcc[0]: invalid address '1'"),
    ({"Subject": 1}, "Subject: must be of type str"),
    ({"Headers": {"To": "x"}}, "Headers: cannot set 'To'"),
    ({"Headers": {"X y": "x"}}, "Headers: cannot set 'X y'"),
    ({"Headers": {"Received": "x"}}, "Headers: cannot set 'Received'"),
    ({"Attachments": [{"Content": "*"}]}, "Attachments[0].Content: not base64"),
    ({"Attachments": [{"Content": "", "ContentType": "\r\n"}]}, "Attachments[0]: cannot be of ContentType"),
    ({"Attachments": [{"Content": "", "ContentType": "Multipart/mixed; boundary=x"}]}, "Attachments[0]: cannot be"),
    ({"Attachments": [{"Content": "", "ContentID": "a>b"}]}, "Attachments[0]: cannot be"),
    ({"Text": "\ud800"}, "body: "),
]


@pytest.mark.parametrize("change, error", REFUSED_SENDS)
def test_compose_refuses(change: Any, error: str) -> None:
    lowered = {name.lower(): value for name, value in change.items()} if change else {}
    with pytest.raises(smtprelay.BadRequest) as refused:
        smtprelay.compose({**MINIMAL, **lowered} if change else change)
    assert str(refused.value).startswith(error)


def test_compose_takes_the_least() -> None:
    raw, _, recipients = smtprelay.compose(MINIMAL)
    assert recipients == ["c@d.example"] and mail_of(raw).plain == ""
    html_only = mail_of(smtprelay.compose({**MINIMAL, "HTML": "<b>x"})[0])
    assert (html_only.plain, html_only.page) == ("", "<b>x\r\n")


def test_compose_writes_what_it_is_given_and_nothing_more() -> None:
    """Encoded words stay as they are (CVE-2024-6923), attachments keep their octets, whatever these are."""
    evil, word = "=?utf-8?q?a=0D=0ABcc=3A_x=40y.test=0D=0A=0D=0Abody?=", "=?utf-8?b?" + "QUJD" * 30 + "?="
    inner = b"Subject: in\rner\n\nbare\r\n.\r\n\0"
    body = {
        **MINIMAL,
        "Subject": evil,
        "From": {"Name": evil, "Email": "a@b.example"},
        "To": [{"Name": "Zoë " * 30, "Email": "zoë@bücher.example"}],
        "Headers": {"X-Evil": evil, "X-Long": "ä" * 500, "X-Word": word, "X-Spaces": "a  b" + " c" * 300, "X-One": "x" * 1500},
        "Text": "a\rb\nc\r\n.\r\n" + "x" * 2000 + "\0",
        "HTML": "<p>" + "é" * 400,
        "Attachments": [{"ContentType": "message/rfc822", "Content": base64.b64encode(inner).decode(), "Filename": "é.eml"}],
    }
    raw, _, recipients = smtprelay.compose(body)
    assert raw.count(b"\r\n") == raw.count(b"\r") == raw.count(b"\n") and b"\0" not in raw
    assert max(map(len, raw.split(b"\r\n"))) <= 998 and recipients == ["zoë@bücher.example"]
    mail = mail_of(raw)
    fields = dict(mail.fields)
    assert (fields["Subject"], fields["X-Evil"], fields["X-Word"], "Bcc" in fields) == (evil, evil, word, False)
    assert smtprelay.decode_words(fields["X-Long"]) == "ä" * 500 and fields["X-Spaces"] == body["Headers"]["X-Spaces"]
    assert [part.content for part in mail.parts if part.content_type == "message/rfc822"] == [inner]
    assert people(mail.people["to"]) == [(("Zoë " * 30).strip(), "zoë@bücher.example")]
    parsed = email.message_from_bytes(raw, policy=email.policy.default)
    texts = [part.get_content() for part in parsed.walk() if part.get_content_maintype() == "text"]
    assert [text.replace("\r\n", "\n") for text in texts[:2]] == ["a\nb\nc\n.\n" + "x" * 2000 + "\0\n", "<p>" + "é" * 400 + "\n"]


@pytest.mark.parametrize(
    "content, name, kind",
    [
        (b"\x89PNG\r\n\x1a\nxx", "a.txt", "image/png"),
        (b"%PDF-1.4", "", "application/pdf"),
        (b"  <!doctype html><p>", "a.csv", "text/html"),
        (b"one,two", "a.csv", "text/csv"),
        (b"\0\1", "a.wasm", "application/wasm"),
        (b"\0\1", "", "application/octet-stream"),
    ],
)
def test_a_files_type_is_told_by_its_octets(content: bytes, name: str, kind: str) -> None:
    file = {"Content": base64.b64encode(content).decode(), "Filename": name}
    part = mail_of(smtprelay.compose({**MINIMAL, "Text": "x", "Attachments": [file]})[0]).parts[1]
    assert (part.content_type, part.content) == (kind, content)


# -- hostile mail: nothing may raise, hang, or grow out of proportion


def bomb(depth: int) -> bytes:
    """A multipart inside a multipart, and so on."""
    head = (b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n) for n in range(depth))
    return b"".join(head) + b"\r\ndeep"


HOSTILE = {
    "parameters without values": MULTIPART + b"".join(
        b"--b\r\nContent-Type: text/plain;" + b"%dx" % n * 1500 + b"\r\n\r\n" for n in range(150)),
    "deep": bomb(2000),
    "deep and long": bomb(16) + b"\r\n--b" * (LENGTH // 5),
    "messages in messages": b"Content-Type: message/rfc822\r\n\r\n" * 10000,
    "10,000 parts": MULTIPART + b"--b\r\n\r\nx\r\n" * 10000,
    "empty parts": MULTIPART + b"--b\n" * (LENGTH // 4),
    "one line of boundaries": MULTIPART + b"--b" * (LENGTH // 3),
    "boundary of dashes": MULTIPART.replace(b"=b", b"=------") + b"\n-" * (LENGTH // 2),
    "header without end": b"X: " + b"a" * MEGABYTE,
    "folded header": b"Subject: a\r\n" + b" b\r\n" * (MEGABYTE // 4),
    "many headers": b"a:\r\n" * (LENGTH // 4),
    "encoded words": b"Subject: " + b"=?a?q?x" * 20000,
    "encoded words 2": b"Subject: " + b"=?utf-8?q?x?= " * 20000,
    "encoded words 3": b"From: " + b"=?utf-8?b?!!!!?= <" * 8000,
    "comments": b"From: " + b"(" * (LENGTH // 2),
    "groups": b"To: " + b"a:" * LENGTH,
    "quotes": b"To: " + b'"a\\' * LENGTH,
    "recipients": b"To: " + b"a@b.example," * 10000,
    "parameters": b"Content-Type: text/plain" + b'; a="b;c' * 60000,
    "continuations": b"Content-Type: text/plain" + b"; name*0*=utf-8''a; name*1=b; name*x=c" * 1000,
    "bad continuation": b"Content-Type: a/b; name*=a; name*0=x; charset*=punycode''utf-8\r\n\r\nx",
    "tags": HTML_HEAD + b"<" * LENGTH,
    "comments in html": HTML_HEAD + b"<!-- " * (LENGTH // 5),
    "scripts in html": HTML_HEAD + b"<script>" * (LENGTH // 8),
    "anchors": HTML_HEAD + b"<a href='https://x.example/" * (LENGTH // 27),
    "hrefs in one": b"Content-Type: text/html\r\n\r\n<a " + b"href=\"href='" * (LENGTH // 12),
    "entities": HTML_HEAD + b"&#" * (LENGTH // 2),
    "urls": b"\r\n" + b"https://" * (LENGTH // 8),
    "codes": b"\r\n" + b"code is 123456 " * (LENGTH // 15),
    "almost codes": b"\r\n" + b"code to a a a a A1B2 " * (LENGTH // 21),
    "digits": b"\r\n" + b"1 " * (LENGTH // 2),
    "spaces": b"\r\ncode" + b" " * LENGTH + b"123456",
    "base64": b"Content-Transfer-Encoding: base64\r\n\r\n" + b"=" * LENGTH + b"A",
    "nul": b"Subject: \0\r\n\0: x\r\n\r\n\0",
    "long number in html": HTML_HEAD + b"&#" + b"1" * 4400 + b"; &#x" + b"f" * LENGTH + b" &#" + b"0" * LENGTH + b"65;",
    "entity runs": HTML_HEAD + b"&amp" * (LENGTH // 4) + b"&" * LENGTH,
    "parts of many fields": MULTIPART + (b"--b\r\n" + b"X-Something-Longer:\r\n" * 480 + b"\r\nx\r\n") * 250,
    "cid quotes": HTML_HEAD + b"\"cid:" * (LENGTH // 5),
    "attributes": HTML_HEAD + b"<a " + b"x='" * (LENGTH // 3),
    "anchors without end": HTML_HEAD + b"<a " * (LENGTH // 3),
    "spaces before a doctype": HTML_HEAD + b"<!--" * (LENGTH // 4),
    "cids": HTML_HEAD + b"cid:" * (LENGTH // 4),
}


def read_all(raw: bytes) -> None:
    """Do with a message all that this chapter can."""
    box = Box()
    id = box.put(raw)
    item = box.inbox.get(id)
    assert item
    mail = box.inbox.mail(id)
    outputs = [
        smtprelay.summary_json(item),
        smtprelay.waited_json(item, mail),
        smtprelay.headers_json(mail),
        smtprelay.mailhog_messages(asking(box)),
        [smtprelay.part_headers(p) for p in mail.attachments],
    ]
    json.dumps(outputs).encode()
    str(mail), repr(mail), mail.headers.items(), smtprelay.view_html(mail)
    box.inbox.search(smtprelay.compile_query("nothing -subject:x has:attachment"))
    box.inbox.search(smtprelay.compile_query("nothing"))
    assert len(mail.parts) <= smtprelay.PART_LIMIT


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    raw = HOSTILE[name]
    assert_linear(lambda n: read_all(raw[:n]), len(raw))


def test_hostile_on_a_small_stack() -> None:
    done: list[str] = []
    old = threading.stack_size(128 * 1024)
    try:
        thread = threading.Thread(target=read_some, args=(done,))
        thread.start()
    finally:
        threading.stack_size(old)
    thread.join()
    assert len(done) == 4


def read_some(done: list[str]) -> None:
    for name in ("deep", "comments", "groups", "quotes"):
        read_all(HOSTILE[name])
        done.append(name)


WORDS = [
    b"Content-Type: ",
    b"multipart/mixed",
    b"text/html",
    b"; boundary=",
    b"b",
    b'"',
    b"\r\n",
    b"\r\n\r\n",
    b"--b",
    b"--",
    b"Content-Transfer-Encoding: base64",
    b"utf-8''",
    b"%ff",
    b"?=",
    b"Content-Disposition: attachment; filename*0*=",
    b"=?utf-8?q?",
    b"=?utf-8?b?",
    b"\xff\xfe",
    b"\0",
    b"From: ",
    b"<",
    b">",
    b"@",
    b"(",
    b"\\",
    b"a",
    b"code is 123456",
    b"https://x",
    b" ",
    b"<a href=",
    b"Subject: ",
    b"Content-ID: <",
    b"; charset=",
    b"utf-7",
    b"iso-2022-jp",
    b"cid:",
    b"Date: ",
    b"99999999999",
]


@pytest.mark.parametrize("seed", range(4))
def test_random_mail(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        raw = b"".join(rng.choices(WORDS, k=rng.randrange(80)))
        read_all(raw)
        read_all(bytes(rng.choice(MIME_TREE) if rng.random() < 0.03 else octet for octet in MIME_TREE))


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_is_the_one_the_email_package_sees(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        message = grow(rng, 3)
        raw = message.as_bytes()
        leaves = [p.get_payload(decode=True) for p in message.walk() if not p.is_multipart()]
        assert [p.content for p in mail_of(raw).parts] == leaves


def grow(rng: random.Random, depth: int) -> email.message.EmailMessage:
    message = email.message.EmailMessage()
    if not depth or rng.random() < 0.3:
        kind = rng.choice(("base64", "quoted-printable"))
        message.set_content("".join(rng.choices("aé =-\n", k=rng.randrange(60))), cte=kind)
        return message
    message.make_mixed()
    for _ in range(rng.randrange(1, 4)):
        message.attach(grow(rng, depth - 1))
    return message


VIEWS = [  # (HTML part, the page made of it)
    ("<p>x", "<base target=_blank><p>x"),
    ("<!doctype html><p>", "<!doctype html><base target=_blank><p>"),
    ("\ufeff<!-- a --><?xml?> <!DOCTYPE html><p>", "<!-- a --><?xml?> <!DOCTYPE html><base target=_blank><p>"),
    ("<META http-equiv=refresh content=0>", "<base target=_blank><meta http-equiv=off http-equiv=refresh content=0>"),
    ("<lin<link x>k rel=preconnect>", "<base target=_blank><lin<meta http-equiv=off x>k rel=preconnect>"),
    ("<link title=stylesheet rel=prefetch>", "<base target=_blank><meta http-equiv=off title=stylesheet rel=prefetch>"),
    ("<link rel=stylesheet href=x><base href=y>",
     "<base target=_blank><link rel=stylesheet href=x><meta http-equiv=off href=y>"),
    ("<a href=x target=_top><A href='#y'><abbr>",
     "<base target=_blank><a target=_blank rel=noopener href=x target=_top><A target=_self href='#y'><abbr>"),
    (
        "<img src=cid:none><img src='CID:pic'>",
        "<base target=_blank><img src=cid:none><img src='data:image/png;base64,iVBORw=='>",
    ),
    ("<img src=cid:evil>", "<base target=_blank><img src=data:image/png;base64,iVBORw==>"),
    *((f"<img src={cid}>", f"<base target=_blank><img src={cid[0]}data:image/png;base64,iVBORw=={cid[-1]}>") for cid in (
        "'cid:a (1)%40x'", '"cid&#58;A (1)@x"', '"CID:%61 (1)&#64;x"')),
    ("<p style='background:url(cid:pic)'>", "<base target=_blank><p style='background:url(data:image/png;base64,iVBORw==)'>"),
]


@pytest.mark.parametrize(("page", "shown"), VIEWS)
def test_view_html(page: str, shown: str) -> None:
    image = "\r\n--b\r\nContent-Type: image/{}\r\nContent-ID: <{}>\r\nContent-Transfer-Encoding: base64\r\n\r\niVBORw=="
    raw = f"Content-Type: multipart/related; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n\r\n{page}"
    raw += image.format("png", "pic") + image.format("svg+xml", "evil") + image.format("pjpeg", "a (1)@x")
    assert smtprelay.view_html(mail_of(raw.encode())) == shown


def test_an_image_that_is_shown_often_does_not_swell_the_page(box: Box) -> None:
    image = b"\r\n--b\r\nContent-Type: image/png\r\nContent-ID: <i>\r\n\r\n" + b"x" * 100_000
    page = b"--b\r\nContent-Type: text/html\r\n\r\n" + b"<img src=cid:i>" * 10_000
    mail = mail_of(b"Content-Type: multipart/related; boundary=b\r\n\r\n" + page + image)
    assert len(smtprelay.view_html(mail)) < smtprelay.EMBEDDED_LIMIT + 300_000


def test_ten_thousand_messages(box: Box) -> None:
    """A list costs less than reading 200 of 2,000 messages, a search less than reading all thrice; each less than 1 KiB."""
    samples = [letter(n) for n in range(50)]
    for n in range(2000):
        box.raws[f"{n:016d}"], box.records[f"{n:016d}"] = samples[n % 50], record_for(f"{n:016d}", samples[n % 50])

    def add(count: int) -> None:
        for id in itertools.islice(coming, count):
            box.inbox.add("2026-11-21/" + id)
        box.inbox.search(smtprelay.compile_query("subject:nothing"))
        gc.collect()

    coming = iter(list(box.raws))
    add(100)
    tracemalloc.start()  # which makes all slow
    before = tracemalloc.get_traced_memory()[0]
    add(400)
    spent = (tracemalloc.get_traced_memory()[0] - before) / 400
    tracemalloc.stop()
    print(f"{spent:.0f} octets a message")
    assert spent < 1024
    add(1500)

    def cost(work: Callable[[], object]) -> float:
        """Return the processor time of the quickest of three runs."""
        times = []
        for _ in range(3):
            begun = time.thread_time()
            work()
            times.append(time.thread_time() - begun)
        return min(times)

    reading = cost(lambda: [smtprelay.read_mail(sample) for sample in samples])
    assert cost(lambda: listed(box)) < 4 * reading
    for words in ("subject:visit", "insurance -nowhere"):
        assert cost(lambda: listed(box, words)) < 120 * reading  # noqa: B023


# === PAGE ====================================================================


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABgAAAAYCAMAAADXqc3KAAAABlBMVEWKOxL///82E77gAAAAQElEQVR42mNgxAEY6CTBgAHIlmDE"
    "Ig61HFOcEaoLVRxhB7IMhA+zHCED5cJdBZOB8RDORZFH8QeyXTQIkoGKWgCgkAFjTm4sFwAAAABJRU5ErkJggg=="
)
PEOPLE = ["Ada Park", "Bruno Keller", "Chidi Okafor", "Dana Whitfield", "Elif Demir", "Farah Aziz", "Goran Petrov", "Hana Sato"]
LETTER_SENDERS = (("Northwind Books", "orders@northwind.example"), ("Accounts", "no-reply@app.example"),
                  ("Tidewater Health", "visits@tidewater.example"), ("Build server", "ci@build.example"),
                  ("", "cron@db-3.internal.example"), ("Larkspur Travel", "hello@larkspur.example"))  # fmt: skip
LETTERS = (  # sender, subject, text
    (
        0,
        "Your order {n} is on its way",
        "Two parcels, arriving Tuesday. Track them at https://shop.example/track/{n}.\n\nThis is the plain text.",
    ),
    (1, "Confirm your address", "Your code is {code}. It is good for ten minutes."),
    (2, "Your visit on Thursday at 09:40", "Please bring your insurance card and arrive ten minutes early."),
    (3, "main: build {n} passed", "412 tests, 3 skipped, 4 min 12 s."),
    (4, "Backup finished", "14.2 GiB in 22 min. Oldest kept: 30 days."),
    (5, "Lisbon in March: three quiet hotels", "We kept the list short this time, and all three take dogs."),
    (0, "Invoice {n}", "Attached, due in 30 days. Thank you for reading with us."),
    (1, "Someone logged in from a new device", "Firefox on Linux, near Utrecht. Not you? Change your password."),
    (3, "main: build {n} failed", "test_queue_survives_restart: expected 3 messages owed, found 2."),
)
LOOK = """<!doctype html><html><head><style>
body{{margin:0;background:#f3efe8;font:16px/1.55 Georgia,serif;color:#2b2622}}
.card{{max-width:560px;margin:0 auto;background:#fff;padding:36px 40px}}
h1{{font-size:26px;font-weight:400;margin:0 0 12px}}.s{{color:#857b70;font-size:13px}}
.b{{display:inline-block;background:#8a3b12;color:#fff;padding:11px 22px;border-radius:4px;text-decoration:none;margin:16px 0}}
td{{padding:8px 0;border-bottom:1px solid #eee6da}}table{{width:100%;border-collapse:collapse;font-size:15px}}
</style></head><body><div class="card"><img id="logo" src="cid:logo" width="36" height="36" alt="">{}
<img src="http://remote.test/pixel.png" width="1" height="1" alt=""></div></body></html>"""
ORDER = LOOK.format("""<h1>Your order is on its way</h1>
<p>Two parcels left our warehouse this morning. They should be with you on <b>Tuesday</b>.</p>
<table><tr><td>The Old Ways<td align=right>1 &times; 14.00</tr><tr><td>Sea Room<td align=right>1 &times; 12.50</tr>
<tr><td>A Month in the Country<td align=right>2 &times; 9.00</tr></table>
<a class="b" href="https://shop.example/track/88213">Follow the parcels</a>
<p class="s">Northwind Books, 4 Harbour Street. You get this because you ordered something.</p>""")
VISIT = LOOK.format("""<h1>We look forward to your visit</h1>
<p>Dr. Ruth Amadi will see you on <b>Thursday at 09:40</b>, second floor.</p>
<p>Please bring your insurance card and arrive ten minutes early.</p>
<a class="b" href="https://tidewater.example/visits/3391">Change the time</a>
<p class="s">Tidewater Health, 12 Quay Road. <a id="jump" href="#terms">Terms</a></p>
<p class="s" id="terms" style="margin-top:1500px">Cancel a day before.</p>""")
EVIL_HOST = "http://evil.test"
HOSTILE_HTML = f"""<script>top.pwned=1;alert(1);fetch('{EVIL_HOST}/s')</script><img src=x onerror="alert(2)">
<img src="{EVIL_HOST}/i.png"><link rel=stylesheet href="{EVIL_HOST}/c.css"><link rel=prefetch href="{EVIL_HOST}/p">
<link rel=preconnect href="{EVIL_HOST}"><link rel="dns-prefetch" href="{EVIL_HOST}"><style>@import url({EVIL_HOST}/im.css);body{{background:url({EVIL_HOST}/b.png)}}
@font-face{{font-family:x;src:url({EVIL_HOST}/f.woff)}}p{{font-family:x}}</style>
<meta http-equiv=refresh content="0;url={EVIL_HOST}/r"><me<meta x>ta http-equiv=refresh content="0;url={EVIL_HOST}/r2"><base href="{EVIL_HOST}/" target=_top>
<form action="{EVIL_HOST}/form" target=_top><input name=a autofocus onfocus="alert(3)"><button id=go>Win</button></form>
<iframe src="{EVIL_HOST}/frame"></iframe><iframe srcdoc="<script>alert(4)</script>"></iframe>
<object data="{EVIL_HOST}/o"></object><embed src="{EVIL_HOST}/e"><video poster="{EVIL_HOST}/v"></video><audio src="{EVIL_HOST}/a" autoplay></audio>
<svg onload="alert(5)"><image href="{EVIL_HOST}/svg.png"/><use href="{EVIL_HOST}/u#x"/></svg>
<a id=out href="{EVIL_HOST}/click" target=_top>click</a> <a id=js href="javascript:alert(6)" target=_top>js</a>
<p>hostile body</p></script></style></textarea></title><img src=x onerror=alert(7)>"""  # noqa: E501
NASTY = (
    "</script><script>alert(8)</script><img src=x onerror=alert(9)>\u202egnp.exe \U0001f608 "
    + "Z\u0351\u036b\u0343" * 40
    + "A" * 3000
)


def letter(n: int) -> bytes:
    """Return the nth message of an invented company's day."""
    kind = (n * 7 + n // 9) % len(LETTERS) if n else 0
    sender, subject, text = LETTERS[kind]
    values = {"n": 88000 + n, "code": n * 7919 % 900000 + 100000}
    name = PEOPLE[n * 3 % len(PEOPLE)]
    body: dict[str, Any] = {
        "From": {"Name": LETTER_SENDERS[sender][0], "Email": LETTER_SENDERS[sender][1]},
        "To": [{"Name": name, "Email": name.split()[0].lower() + "@example.com"}],
        "Subject": subject.format(**values),
        "Text": text.format(**values),
    }
    if kind in (0, 2):
        logo = {"Content": base64.b64encode(PNG).decode(), "Filename": "logo.png", "ContentID": "logo"}
        body.update(HTML=VISIT if kind else ORDER, Attachments=[logo])
    if "Invoice" in subject:
        body.update(Attachments=[{"Content": "JVBERg==", "Filename": "invoice.pdf"}])
    return smtprelay.compose(body)[0]


def hostile_letter() -> bytes:
    """Return a message that tries to script the page, to tell on its reader, to break out, to be endless."""
    head = f'From: "{NASTY}" <mallory@evil.test>\r\nTo: "<svg onload=alert(11)>" <x@y.test>{", z@y.test" * 400}\r\nSubject: {NASTY}\r\n'
    parts = [
        f"Content-Type: text/html; charset=utf-8\r\n\r\n{HOSTILE_HTML}",
        "Content-Type: text/plain; charset=utf-8\r\n\r\njavascript:alert(13) data:text/html,x https://ok.example/<script>",
    ]
    name = "<img src=x onerror=alert(17)>/../../etc/passwd"
    parts += [
        f'Content-Type: text/html; name="{name}"\r\nContent-Disposition: attachment\r\n\r\n<script>alert(18)</script>'
    ] * 10000
    mail = f"{head}MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + "\r\n--b\r\n".join(
        parts
    )
    return mail.encode("utf-8")


def fill_spool(path: Path, letters: list[bytes]) -> None:
    """Put held messages into a spool, the first the oldest, spread over the last day."""
    rng, end = random.Random(7), time.time() - 60
    ages = sorted((rng.random() ** 1.15 * 82000 for _ in letters), reverse=True)
    settings = smtprelay.Settings.read({"SMTP_SPOOL": str(path), "SMTP_FSYNC": "0"})
    spool = smtprelay.Spool(settings, smtprelay.open_log(settings))
    spool.open()
    for content, age in zip(letters, ages):
        mail = mail_of(content)
        to = [person["Address"] for person in mail.people["to"][:3]]
        sender = mail.people["from"][0]["Address"]
        envelope = smtprelay.Envelope(sender, "127.0.0.1", "app", "ESMTP", flags=("HOLD",), recipients=to)
        draft = smtprelay.Draft(spool, envelope, f"{int((end - age) * 1e6):013x}abc")
        draft.write(content)
        draft.commit()
    spool.close()


def chromium() -> str:
    """Return the browser; skip the test where it, node or playwright-core is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
    if not browser or not shutil.which("node") or not (MODULES / "playwright-core").is_dir():
        pytest.skip("needs chromium, node, and playwright-core in .ci/node_modules (see .ci/install)")
    return browser


def first_minute(program: Callable[..., Program]) -> str:
    """What a terminal shows of the first minute, with the usual ports."""
    relay = program(SMTP_HOSTNAME="localhost")
    ports = {str(relay.port): "2525", relay.http_url.rpartition(":")[2]: "8080"}
    shown = ["$ python3 smtprelay.py &", *(line for line in relay.log().splitlines() if re.search("listening|mail is|spool", line))]
    letter = "printf 'From: app@example.com\\nTo: you@example.com\\nSubject: Your code\\n\\nIt is 482913.\\n'"
    curl = f"  curl --crlf -sT - smtp://localhost:{relay.port}/me --mail-from app@example.com --mail-rcpt you@example.com"
    send = f"{letter} |\n{curl}"
    for command in (send, "python3 smtprelay.py wait --to you@example.com", "python3 smtprelay.py wait --code",
                    "python3 smtprelay.py queue"):  # fmt: skip
        line = command.replace("|\n", "|").replace("python3 smtprelay.py", f"{sys.executable} {PROGRAM}")
        env = {**os.environ, **relay.env, "SMTP_HEALTH_ADDR": relay.http_url[7:]}
        done = subprocess.run(line, shell=True, env=env, capture_output=True, text=True)
        shown += ["$ " + command, *done.stdout.splitlines()]
    text = "\n".join(shown).replace(relay.env["SMTP_SPOOL"], "./data/spool")
    for port, usual in ports.items():
        text = text.replace(port, usual)
    return text


def test_the_page_in_a_real_browser(
    program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path
) -> None:
    """SMTP_TEST_SHOTS names a directory for screenshots, which this run makes (see .ci/pictures)."""
    browser = chromium()
    busy = {
        f"rcpt busy{n}@example.com": ["450 4.2.1 The mailbox is busy, try again later"]
        for n in ("-1", "-2", "-3", "-4", "-last")
    }
    next_hop = f"127.0.0.1:{hop(**{'script': busy}).port}"
    relays = {"SMTP_RELAY_HOST": next_hop, "SMTP_RETRY_INITIAL_DELAY": "1h", "SMTP_RETRY_MAX_DELAY": "1h"}
    fill_spool(tmp_path / "held", [*map(letter, range(118, 60, -1)), hostile_letter(), *map(letter, range(60, -1, -1))])
    held = program(**relays, SMTP_DELIVERY="hold", SMTP_SPOOL=str(tmp_path / "held"))
    users = tmp_path / "users.json"
    shop = {"password": "a long one", "allowed_domains": ["shop.example"], "quota_daily": 500}
    users.write_text(json.dumps({"shop": shop}))
    users.chmod(0o600)
    owed = program(**relays, SMTP_API_TOKEN="a token", SMTP_USERS_FILE=str(users))
    for n in range(1, 5):
        reminder = {"From": {"Email": "ann@example.com"}, "To": [{"Email": f"busy-{n}@example.com"}],
                    "Subject": f"Reminder {n}", "Text": "Sent.", "HTML": "<p>Sent."}  # fmt: skip
        api(owed, "POST", "/api/v1/send", reminder, token="a token")
    env = {
        "PATH": os.environ["PATH"],
        "HELD": held.http_url,
        "OWED": owed.http_url,
        "TOKEN": "a token",
        "CHROMIUM": browser,
        "SHOTS": os.environ.get("SMTP_TEST_SHOTS", ""),
        "TERMINAL": first_minute(program) if os.environ.get("SMTP_TEST_SHOTS") else "",
        "HOME": str(tmp_path),
    }
    run = subprocess.run(["node", str(ROOT / ".ci" / "page.mjs")], env=env, capture_output=True, text=True, timeout=120)
    print(run.stdout, run.stderr)
    assert run.returncode == 0 and "all is well" in run.stdout
    assert "_bug" not in held.log() + owed.log()


def test_a_date_that_cannot_be_read_is_named(relay: smtprelay.Relay) -> None:
    search = "/api/v1/search?query=" + urllib.parse.quote('before:2000 -after:someday larger:10K "smaller:huge" x after:')
    assert api(relay, "GET", search)[1]["Warnings"] == ["after:someday cannot be read", "smaller:huge cannot be read"]
    assert "Warnings" not in api(relay, "GET", "/api/v1/search?query=before:2000")[1]


def api(relay: Any, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> Any:
    """Make a request of a relay's API; return its status with the JSON or the text it answers."""
    host, _, port = relay.http_url[7:].rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        given["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), given)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status, json.loads(data) if is_json else data.decode("utf-8", "replace")


# === HTTP ====================================================================


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *[("GET", path, 200) for path in ("/healthz", "/health", "/readyz", "/livez", "/metrics", "/debug/vars")],
        ("GET", "/metrics?format=prometheus", 200),
        ("HEAD", "/healthz", 200),
        ("GET", "/nothing", 404),
        ("POST", "/healthz", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/../etc/passwd", 404),
    ],
)
def test_paths(holding: Any, method: str, path: str, status: int) -> None:
    assert fetch(holding, path, method)[0] == status


def test_health_says_ok_or_gives_the_parts(holding: Any) -> None:
    assert fetch(holding, "/healthz")[2].strip() == "OK"
    for parts in (fetch(holding, "/readyz", Accept="application/json"), fetch(holding, "/healthz?verbose")):
        assert parts[0] == 200 and {"listeners", "spool", "workers"} & set(re.findall(r"\w+", parts[2]))


def test_not_ready_without_a_spool(start: Callable[..., Any], tmp_path: Path) -> None:
    relay, spool = start(), tmp_path / "spool"
    spool.rename(tmp_path / "away")
    spool.write_text("in the way")
    wait_until(lambda: fetch(relay, "/readyz")[0] == 503)
    assert fetch(relay, "/livez")[0] == 200


METRICS = [
    "smtp_" + name
    for name in [
        "messages_received_total", "messages_queued_total", "messages_delivered_total", "messages_deferred_total", "messages_failed_total",
        "messages_expired_total", "messages_rejected_total", "delivery_failures_total", "bytes_received_total", "queue_depth",
        "queue_oldest_age_seconds", "sessions_active", "connections_total", "connections_refused_total", "delivery_duration_seconds",
        "disk_free_bytes", "uptime_seconds", "build_info",
    ]
]


def test_metrics_in_both_forms(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    relay = start(SMTP_MAX_SIZE="100", **hop(script={"rcpt bob@hop.test": "550 5.1.1 who?"}).settings())
    said(relay, MAIL, to=("bob@hop.test",))
    said(relay, MAIL, to=("carol@hop.test",))
    with hello(relay) as client:
        assert client.mail(b"x" * 200 + b"\r\n").startswith("552")
    wanted = {"received": 2, "delivered": 1, "failed": 1}
    wait_until(lambda: {name: metric(relay, f"smtp_messages_{name}_total") for name in wanted} == wanted)
    flat = json.loads(fetch(relay, "/debug/vars")[2])
    assert {"cmdline", "memstats"} <= set(flat)
    assert [name for name in METRICS if not any(key.startswith(name) for key in flat)] == []
    assert metric(relay, "smtp_bytes_received_total") >= 2 * len(MAIL)
    for text in (fetch(relay, "/metrics?format=prometheus"), fetch(relay, "/metrics", Accept="text/plain;version=0.0.4")):
        assert text[1].startswith("text/plain") and "version=0.0.4" in text[1]
        assert [name for name in METRICS if f"# TYPE {name} " not in text[2]] == []
        assert re.search(r'(?m)^smtp_messages_rejected_total\{code="552"\} 1$', text[2])
        assert "@" not in text[2]
    check = [need("promtool"), "check", "metrics"]
    checked = subprocess.run(check, input=text[2], capture_output=True, text=True, timeout=20)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_http_can_be_off(start: Callable[..., Any]) -> None:
    assert not start(SMTP_HEALTH_ADDR="off").http_url


def test_a_slow_http_client_holds_nobody(holding: Any) -> None:
    host, port = holding.http_url.split("//")[1].split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: ")
        assert fetch(holding, "/healthz")[0] == 200


def test_garbage_on_the_http_port(holding: Any) -> None:
    host, port = holding.http_url.split("//")[1].split(":")
    for data in (
        b"\x00\xff\r\n\r\n",
        b"GET " + b"/" * 100000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
    ):
        with socket.create_connection((host, int(port)), 8) as client, contextlib.suppress(ConnectionError):
            client.sendall(data)
            assert re.match(rb'HTTP/1\.[01] 4\d\d|.*"Error": "|$', client.recv(4096), re.S)
    assert fetch(holding, "/livez")[0] == 200


API = [
    "/api/v1/messages", "/api/v1/info", "/api/v1/message/latest", "/api/v1/events", "/api/v1/queue", "/api/v1/users", "/api/v1/chaos",
    "/view/latest.html", "/view/latest.txt", "/api/v2/messages",
]
PAGE_MAIL = b"From: ann@example.com\r\nSubject: hi\r\nContent-Type: text/html\r\n\r\n<p>hi\r\n"


def mailed(relay: Any, *letters: bytes, to: tuple[str, ...] = ("bob@example.com",)) -> None:
    with smtplib.SMTP(relay.host, relay.port) as client:
        for content in letters or (b"From: ann@example.com\r\nSubject: hi\r\n\r\nhi\r\n",):
            client.sendmail("envelope@example.com", to, content)


@pytest.mark.parametrize(
    ("headers", "get", "delete"),
    [
        ({}, 200, 200),
        ({"Host": "localhost:1"}, 200, 200),
        ({"Host": "[::1]:99"}, 200, 200),
        ({"Host": "relay.test"}, 200, 200),
        ({"Host": "mail:8080"}, 200, 200),
        ({"Host": "172.17.0.2:8080"}, 200, 200),
        ({"Host": ""}, 403, 403),
        ({"Host": "evil.test"}, 403, 403),
        ({"Host": "127.0.0.1.evil.test"}, 403, 403),
        ({"Host": "["}, 403, 403),
        ({"Origin": "http://evil.test"}, 200, 403),
        ({"Origin": "null"}, 200, 403),
        ({"Origin": "http://127.0.0.1"}, 200, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200, 200),
    ],
)
def test_other_sites_and_rebound_names_are_kept_out(
    start: Callable[..., Any], headers: dict[str, str], get: int, delete: int
) -> None:
    relay = start(SMTP_STORAGE="memory")
    answers = [fetch(relay, "/api/v1/messages", method, **headers)[0] for method in ("GET", "DELETE")]
    assert answers == [get, delete]
    assert fetch(relay, "/livez", **headers)[0] == fetch(relay, "/metrics", **headers)[0] == 200
    for proxy in ("Forwarded", "X-Forwarded-For", "x-forwarded-host", "X-Real-IP", "Via"):  # whoever asked it is not on this machine
        assert fetch(relay, "/api/v1/messages", **{**headers, proxy: "127.0.0.1"})[0] == 403
    own = headers.get("Host", relay.http_url[7:])
    assert fetch(relay, "/api/v1/messages", "DELETE", **{**headers, "Origin": f"http://{own}"})[0] == (
        200 if get == 200 else 403
    )


def test_a_link_from_elsewhere_may_open_the_page(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    assert fetch(relay, "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert fetch(relay, "/", Host="evil.test")[0] == 403


def test_the_token_opens_everything(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret")
    mailed(relay, PAGE_MAIL)
    bearer = {"Authorization": "Bearer secret"}
    basic = {"Authorization": "Basic " + base64.b64encode(b"any:secret").decode()}
    for path in API:
        assert fetch(relay, path)[0] == 401, path
        for wrong in ("Bearer secre", "Basic secret", "Digest secret"):
            assert fetch(relay, path, Authorization=wrong)[0] == 401, path
        if path != "/api/v1/events":
            assert fetch(relay, path, **bearer)[0] == fetch(relay, path, **basic, Host="relay.lan")[0] == 200, path
    status, kind, page = fetch(relay, "/", Host="relay.lan")
    assert (status, kind, page) == (401, "text/html; charset=utf-8", smtprelay.PAGE)
    assert fetch(relay, "/", **bearer)[0] == 200
    assert fetch(relay, "/api/v1/messages", "DELETE", **bearer, Origin="http://evil.test")[0] == 403


def test_the_view_key_opens_one_message(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret")
    mailed(relay, PAGE_MAIL, PAGE_MAIL)
    _, listed = api(relay, "GET", "/api/v1/messages", token="secret")
    one, other = (message["ID"] for message in listed["messages"])
    key = api(relay, "GET", f"/api/v1/message/{one}", token="secret")[1]["ViewKey"]
    assert fetch(relay, f"/view/{one}.html?key={key}")[0] == 200
    for path in (f"/view/{other}.html?key={key}", f"/view/{one}.html?key=", f"/view/{one}.txt?key={key}"):
        assert fetch(relay, path)[0] == 401
    assert fetch(relay, f"/api/v1/message/{one}?key={key}")[0] == 401


def test_without_a_token_strangers_are_not_served(program: Callable[..., Program]) -> None:
    relay = program(SMTP_HEALTH_ADDR="0.0.0.0:0 127.0.0.1:0")
    assert "SMTP_API_TOKEN: the page and /api serve this machine alone" in relay.log()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    if smtprelay.is_loopback(own):
        pytest.skip("this machine has no address beyond loopback")
    relay.http_url = f"http://{own}:" + relay.log().partition("http://0.0.0.0:")[2].split()[0]
    assert [fetch(relay, path)[0] for path in ("/", "/api/v1/messages", "/livez", "/metrics")] == [403, 403, 200, 200]


def test_networks_that_need_no_token(start: Callable[..., Any]) -> None:
    """And no proxy is taken for one of them."""
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret", SMTP_API_NETWORKS="127.0.0.1 10.0.0.0/8")
    answers = [fetch(relay, path)[0] for path in ("/", "/api/v1/messages", "/api/v1/queue")]
    assert (answers, fetch(relay, "/api/v1/messages", Via="1.1 proxy")[0]) == ([200, 200, 200], 401)
    assert fetch(relay, "/api/v1/messages", Host="evil.test")[0] == 403
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret", SMTP_API_NETWORKS="10.0.0.0/8")
    assert fetch(relay, "/api/v1/messages")[0] == 401


@pytest.mark.parametrize("root", ["/mail", "/mail/", "/tools/mail"])
def test_all_is_at_hand_under_the_web_root(start: Callable[..., Any], root: str) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_WEB_ROOT=root)
    mailed(relay, PAGE_MAIL)
    under = "/" + root.strip("/")
    for path in ("", "/", "/view/latest", "/search?q=x", "/view/latest.html", "/api/v1/messages", "/livez"):
        assert fetch(relay, under + path)[0] == fetch(relay, path or "/")[0] == 200
    assert fetch(relay, under + "x/api/v1/messages")[0] == 404


def test_http_over_a_unix_socket(program: Callable[..., Program], tmp_path: Path) -> None:
    place = tempfile.mkdtemp(dir="/tmp")
    try:
        relay = program(SMTP_HEALTH_ADDR=f"unix:{place}/web, 127.0.0.1:0", SMTP_API_NETWORKS="loopback")
        asked = [need("curl"), "-sS", "--unix-socket", f"{place}/web", "http://relay/api/v1/messages"]
        assert json.loads(subprocess.run(asked, capture_output=True, timeout=10).stdout)["total"] == 0
        for verb in ("healthcheck", "queue"):
            assert run(verb, **relay.env).returncode == 0
        assert f"listening on http://unix:{place}/web" in relay.log() and "serve this machine alone" not in relay.log()
        relay.stop()
        assert os.listdir(place) == []
    finally:
        shutil.rmtree(place)


def test_help_shows_the_tables(start: Callable[..., Any]) -> None:
    status, kind, page = fetch(start(SMTP_STORAGE="memory"), "/help")
    assert (status, kind) == (200, "text/html; charset=utf-8") and "<script" not in page
    for topic in ("settings", "replies", "http", "metrics", "spool", "exit"):
        assert f"<h2 id={topic}>" in page
    for cell in ("<td>SMTP_PORT", "<td>smtp_queue_depth", "/api/v1/wait", "5.3.4 ", "DATE/ID_HASH.eml", "<td>75"):
        assert cell in page, cell


def test_what_is_open_is_said_first(program: Callable[..., Program]) -> None:
    """And a setting of Mailpit's or MailHog's gets a line that names ours."""
    log = program(
        SMTP_AUTH_ANY="1", SMTP_API_NETWORKS="10.0.0.0/8", MP_MAX_MESSAGES="9", MP_SMTP_TLS_CERT="x", MH_HOSTNAME="x", MP_X="1",
        MP_SMTP_AUTH_ACCEPT_ANY="1",
    ).log()
    for words in (
        "SMTP_AUTH_ANY=1: any user and password", "SMTP_API_NETWORKS=10.0.0.0/8", "set SMTP_SPOOL_MAX_MESSAGES",
        "set SMTP_TLS_CERT", "set SMTP_AUTH_ANY=1 and SMTP_AUTH_REQUIRED=0",
        "MH_HOSTNAME is MailHog's: set SMTP_HOSTNAME", "MP_X is Mailpit's: nothing here",
    ):
        assert words in log, (words, log)
    assert {name.partition("=")[0] for ours in smtprelay.MAILPITS.values() for name in ours.split(" and ")} <= {
        *smtprelay.FIELDS, "SMTP_API_TOKEN_FILE"
    }


def test_a_message_may_be_saved(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    for query, disposition in (("", None), ("?dl=1", r'attachment; filename="[0-9a-f]{16}\.eml"')):
        with contextlib.closing(http.client.HTTPConnection(relay.http_url[7:], timeout=8)) as connection:
            connection.request("GET", "/api/v1/message/latest/raw" + query)
            said = connection.getresponse().headers["Content-Disposition"]
            assert said == disposition or re.fullmatch(str(disposition), said), said


def test_security_headers(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, MIME_TREE)
    policies = {}
    for path in (
        "/", "/api/v1/messages", "/view/latest.html", "/view/latest.html?remote=1", "/view/latest.txt", "/nothing", "/api/v1/message/latest/raw",
        "/api/v1/message/latest/part/2",
    ):
        with contextlib.closing(http.client.HTTPConnection(relay.http_url[7:], timeout=8)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            policies[path] = answer.headers["Content-Security-Policy"]
            body = answer.read()
        if path.endswith("/part/2"):
            assert answer.headers["Content-Disposition"].startswith("attachment;")
        if path == "/":
            script = body.partition(b"<script>")[2].partition(b"</script>")[0]
            assert base64.b64encode(hashlib.sha256(script).digest()).decode() in policies["/"]
            assert "unsafe" not in policies["/"]
            assert b"http://" not in re.sub(rb"http://(www\.w3\.org|\$\{)", b"", body)
    assert "sandbox" in policies["/view/latest.html"] and "script" not in policies["/view/latest.html?remote=1"]
    assert "*" not in policies["/view/latest.html"] and "img-src data: cid: *" in policies["/view/latest.html?remote=1"]


def watch_events(relay: Any, *sent: bytes, patience: float = 5.0) -> bytes:
    """Send octets to the HTTP side; return all that comes until it closes or nothing more does."""
    host, port = relay.http_url[7:].split(":")
    heard = b""
    with socket.create_connection((host, int(port)), patience) as client, contextlib.suppress(OSError):
        for data in sent:
            client.sendall(data)
        while data := client.recv(65536):
            heard += data
    return heard


@pytest.mark.parametrize(
    ("request_text", "first"),
    [
        (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b" 403 "),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", b" 400 "),
        (b"PATCH /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 405 "),
        (b"BREW /pot HTTP/1.1\r\n\r\n", b" 501 "),
        (b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", b" 413 "),
        *[
            (b"DELETE /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n" + body, first)
            for head, body, first in [
                (b"Content-Length: 0\r\nContent-Length: 2", b"{}", b" 400 "),
                (b"Content-Length: 2\r\nTransfer-Encoding: chunked", b"0\r\n\r\n", b" 400 "),
                (b"Transfer-Encoding: chunked", b"0x2\r\n{}\r\n0\r\n\r\n", b" 400 "),
                (b"Transfer-Encoding: chunked", b"2\r\n{}XX0\r\n\r\n", b" 400 "),
                (b"Transfer-Encoding: chunked", b"2000001\r\n", b" 413 "),
                (b"Transfer-Encoding: chunked", b"2\r\n{", b""),
                (b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n", b" 501 "),
                (b"X: no length, as Node sends it", b'{"ids": ["0"]}', b" 400 "),
                (b"X: no length, as Node sends it", b"ids=0", b" 400 "),
            ]
        ],
        (b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b" 411 "),
        (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b" 431 "),
        (b"DELETE /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n", b""),  # cut short: not obeyed
    ],
    ids=lambda value: value.decode("latin-1")[:40],
)
def test_odd_requests(start: Callable[..., Any], request_text: bytes, first: bytes) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    host, port = relay.http_url[7:].split(":")
    with socket.create_connection((host, int(port)), 5) as client:
        client.sendall(request_text)
        client.shutdown(socket.SHUT_WR)
        heard = client.makefile("rb").readline()
    assert first in heard and (first or not heard)
    assert api(relay, "GET", "/api/v1/messages")[1]["total"] == 1


def test_connections_are_kept_and_heads_have_no_body(start: Callable[..., Any]) -> None:
    heard = watch_events(
        start(SMTP_STORAGE="memory"),
        b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\n\r\n"
        b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n",
    )
    assert heard.count(b"HTTP/1.1 200") == 3 and b"<html" not in heard and heard.endswith(b"OK\n")


def test_what_is_refused_is_no_request_of_its_own(start: Callable[..., Any]) -> None:
    """The body that two lengths frame differently ends with the connection."""
    head = b"DELETE /api/v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 23\r\n\r\n"
    heard = watch_events(start(SMTP_STORAGE="memory"), head + b"GET /livez HTTP/1.1\r\n\r\n")
    assert heard.startswith(b"HTTP/1.1 400") and heard.count(b"HTTP/1.1") == 1 and b"\r\nConnection: close\r\n" in heard


def test_continue_is_said_only_to_who_may_go_on(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    head = b"PUT /api/v1/messages HTTP/1.1\r\nHost: %s\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert watch_events(relay, head % b"localhost", b"{}").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert watch_events(relay, head % b"evil.test").startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(
    "trickle",
    [b"GET / HTTP/1.1\r\nX-", b"PUT /api/v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"],
)
def test_deadlines_are_for_the_whole_request(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, trickle: bytes
) -> None:
    """A request that gets an octet now and then is cut off all the same."""
    monkeypatch.setattr(smtprelay, "HTTP_TIME", 0.15)
    host, port = start(SMTP_STORAGE="memory").http_url[7:].split(":")
    with socket.create_connection((host, int(port)), 5) as client:
        client.sendall(trickle)
        client.settimeout(0.02)

        def cut_off() -> bool:
            try:
                client.sendall(b"a")
                return not client.recv(100)
            except socket.timeout:
                return False
            except ConnectionError:
                return True

        wait_until(cut_off)


def test_who_does_not_read_is_cut_off(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "HTTP_TIME", 0.3)
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, b"Subject: big\r\n\r\n" + b"x" * 70 * 1_000 + b"\r\n" + (b"y" * 76 + b"\r\n") * 100_000)
    host, port = relay.http_url[7:].split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(b"GET /api/v1/message/latest/raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
        callers = relay.delivering.web[0].callers
        wait_until(lambda: callers)
        wait_until(lambda: not callers, 4)


def test_idle_connections_shut_nobody_out(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks nothing for longest loses his place; who is at work too often waits, but not for health."""
    monkeypatch.setattr(smtprelay, "HTTP_PER_CLIENT", 10)
    monkeypatch.setattr(smtprelay, "HTTP_CONNECTIONS", 15)
    relay = start(SMTP_STORAGE="memory")
    host, port = relay.http_url[7:].split(":")
    callers = relay.delivering.web[0].callers
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection((host, int(port)), 8)) for _ in range(40)]
        assert fetch(relay, "/healthz")[0] == fetch(relay, "/api/v1/messages")[0] == 200
        wait_until(lambda: len(callers) <= 15)
        for client in idle:
            client.close()
        wait_until(lambda: not callers)
        waiting = [stack.enter_context(socket.create_connection((host, int(port)), 8)) for _ in range(10)]
        for client in waiting:
            client.sendall(b"GET /api/v1/wait?timeout=60&to=nobody HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: [caller.since for caller in [*callers]] == [math.inf] * 10)
        assert fetch(relay, "/metrics")[0] == 200 and fetch(relay, "/api/v1/messages")[0] == 503
        late = [stack.enter_context(socket.create_connection((host, int(port)), 8)) for _ in range(20)]
        assert fetch(relay, "/metrics")[0] == 200 and len(late) == 20
        assert [caller.since for caller in [*callers]].count(math.inf) == 10  # and who is at work stays
        for client in waiting:
            client.close()  # and they who have hung up wait no more
        wait_until(lambda: fetch(relay, "/api/v1/messages")[0] == 200)


def test_no_descriptors_for_http(start: Callable[..., Any]) -> None:
    """The loop that accepts neither ends nor spins."""
    relay = start(SMTP_STORAGE="memory")
    server, errors = relay.delivering.web[0], [OSError(errno.EMFILE, "none left")] * 3
    begun = time.monotonic()
    with mock.patch.object(server, "socket", mock.Mock(wraps=server.socket)) as sock:
        sock.accept.side_effect = errors
        for error in errors:
            with pytest.raises(OSError, match=str(error.strerror)):
                server.get_request()
    assert time.monotonic() - begun >= 0.29 and fetch(relay, "/livez")[0] == 200


def test_event_streams_are_bounded_and_end(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "HTTP_PER_CLIENT", 5)
    relay = start(SMTP_STORAGE="memory")
    for _ in range(7):
        assert fetch(relay, "/api/v1/events", "HEAD")[0] == 200  # leaves none behind
    assert not relay.delivering.feed.listeners
    streams = [http.client.HTTPConnection(relay.http_url[7:], timeout=8) for _ in range(5)]
    for stream in streams:
        stream.request("GET", "/api/v1/events")
    answers = [stream.getresponse() for stream in streams]
    assert {answer.status for answer in answers} == {200} and answers[0].readline() == b": hello\n"
    assert api(relay, "GET", "/api/v1/events")[0] == 503
    mailed(relay)
    lines = [answers[0].readline() for _ in range(3)]
    assert lines[1] == b"event: received\n" and set(json.loads(lines[2][6:])) == {"type", "id", "seq", "at", "detail"}
    for answer, stream in zip(answers, streams):
        answer.close()
        stream.close()
    feed = relay.delivering.feed
    wait_until(lambda: feed.publish({"type": "received"}) or not feed.listeners)


def test_the_life_of_a_message_as_events(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    relay = start(**hop(script={"rcpt bob@example.com": ["450 4.2.1 later"]}).settings())
    events = relay.delivering.feed.subscribe()
    mailed(relay)
    life = "received forwarding retrying forwarding forwarded"
    assert [events.get(timeout=5)["type"] for _ in range(5)] == life.split()


class Hook(http.server.ThreadingHTTPServer):
    """A web server that fails twice before it takes what is POSTed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HookHandler)
        self.refusals, self.moved = 2, ""
        self.got, self.logins = list[Any](), list[Any]()


class HookHandler(http.server.BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.refusals -= 1
        if self.server.refusals < 0:
            self.server.got.append(body)
        self.server.logins.append(self.headers["Authorization"])
        self.send_response(302 if self.server.moved else 500 if self.server.refusals >= 0 else 204)
        self.send_header("Location", self.server.moved)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_webhook_is_tried_again(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "WEBHOOK_PAUSES", (0.01, 0.01))
    with Hook() as hook:
        threading.Thread(target=hook.serve_forever, args=(0.02,), daemon=True).start()
        relay = start(SMTP_STORAGE="memory", SMTP_WEBHOOK_URL=f"http://127.0.0.1:{hook.server_port}/hook")
        mailed(relay)
        wait_until(lambda: hook.got)
        hook.shutdown()
    assert [(event["type"], len(event["id"])) for event in hook.got] == [("received", 16)]


def test_the_webhook_follows_nobody(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """No redirect, and no proxy to this machine; its secrets go where they belong alone."""
    monkeypatch.setattr(smtprelay, "WEBHOOK_PAUSES", ())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Hook() as hook, Hook() as other:
        hook.refusals, hook.moved = 0, f"http://127.0.0.1:{other.server_port}/"
        for server in (hook, other):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://joe:s3cret@127.0.0.1:{hook.server_port}/hook?key=s3cret"
        relay = start(SMTP_STORAGE="memory", SMTP_WEBHOOK_URL=address)
        caplog.set_level(logging.DEBUG)
        mailed(relay)
        wait_until(lambda: "webhook_failed" in caplog.text)
        assert hook.logins == ["Basic " + base64.b64encode(b"joe:s3cret").decode()] and not other.got
        assert f"url=http://127.0.0.1:{hook.server_port}/hook " in caplog.text and "s3cret" not in caplog.text
        hook.shutdown()
        other.shutdown()
    shown = run("check", "--print", SMTP_WEBHOOK_URL=address).stdout
    assert f"SMTP_WEBHOOK_URL=http://127.0.0.1:{hook.server_port}/hook\n" in shown
    for wrong in ("ftp://joe:s3cret@x.test/a?s3cret", "http://joe:s3cret@/?s3cret", "http://x.test/\u00e9?s3cret"):
        said = run("check", SMTP_WEBHOOK_URL=wrong).stderr
        assert "SMTP_WEBHOOK_URL='" in said and "expected an http" in said and "s3cret" not in said


def test_changes_over_http_are_audited(start: Callable[..., Any], tmp_path: Path) -> None:
    relay = start(SMTP_STORAGE="memory", SMTP_AUDIT_LOG=str(tmp_path / "audit"))
    api(relay, "DELETE", "/api/v1/messages?x=\n".strip())
    api(relay, "DELETE", "/api/v1/messages", Host="evil.test")
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().split("\n") if line]
    changes = [(line["event"], line["status"], line["path"]) for line in lines if "method" in line]
    assert changes == [("changed", 200, "/api/v1/messages"), ("change_refused", 403, "/api/v1/messages")]


BAD = [  # (method, path, body, status, words): Mailpit's routes answer in text
    ("PUT", "/api/v1/messages", b"[1]", 400, "expected an object"),
    ("PUT", "/api/v1/messages", b"{", 400, "expected JSON"),
    ("PUT", "/api/v1/messages", b"", 400, "expected JSON"),
    ("PUT", "/api/v1/messages", b"[" * 100_000, 400, "expected JSON"),
    ("PUT", "/api/v1/messages", b'{"Read": "yes"}', 400, "Read"),
    ("PUT", "/api/v1/messages", b'{"IDs": ["x"], "Search": "hi"}', 400, "not both"),
    ("DELETE", "/api/v1/messages", b'{"IDs": "x"}', 400, "list of ids"),
    ("DELETE", "/api/v1/messages", b'{"IDs": ""}', 400, "list of ids"),
    ("DELETE", "/api/v1/messages", b'{"IDs": [1]}', 400, "list of ids"),
    ("DELETE", "/api/v1/messages", b'{"id": ["x"]}', 400, "expected IDs"),
    ("DELETE", "/api/v1/messages", b'{"Read": true}', 400, "expected IDs"),
    ("DELETE", "/api/v1/messages", b'{"search": ""}', 400, "expected what to look for"),
    ("PUT", "/api/v1/messages", b'{"Read": true, "Search": " "}', 400, "expected what to look for"),
    ("DELETE", "/api/v1/messages", b"nonsense", 400, "expected JSON"),
    ("DELETE", "/api/v1/search", b"", 400, "expected what to look for"),
    ("DELETE", "/api/v1/search?query=%20", b"", 400, "expected what to look for"),
    ("DELETE", "/api/v1/search?qurey=to:ann", b"", 400, "expected what to look for"),
    ("GET", "/api/v1/search?query=", None, 400, "expected what to look for"),
    ("GET", "/api/v1/message/latest?query=nobody", None, 404, "not found"),
    ("GET", "/view/nope.html", None, 404, "not found"),
    ("GET", "/api/v1/message/latest/html-check", None, 404, "html-check is not done here"),
    ("POST", "/api/v1/message/nope/release", b'{"To": ["a@b.test"]}', 404, "not found"),
    ("POST", "/api/v1/message/latest/release", b"{}", 400, "To"),
    ("POST", "/api/v1/message/latest/release", b'{"To": []}', 400, "To"),
    ("POST", "/api/v1/message/latest/release", b'{"To": ["no address"]}', 400, "no address"),
    ("PUT", "/api/v1/tags", b'{"Tags": [1]}', 400, "list of tags"),
    ("PUT", "/api/v1/tags/nope", b'{"Name": "x"}', 400, "tag not found"),
    ("DELETE", "/api/v1/tags/nope", b"", 400, "tag not found"),
    ("PUT", "/api/v1/chaos", b'{"Sender": {"Probability": 101}}', 400, "Sender"),
    ("PUT", "/api/v1/chaos", b'{"Sender": 1}', 400, ""),
    ("GET", "/api/v2/search?kind=about&query=hi", None, 400, "containing"),
    ("GET", "/api/v2/search?kind=to&query=", None, 400, "containing"),
]
OURS_BAD = [  # ours, and send, in JSON
    ("GET", "/api/v1/wait?timeout=x", None, 400, "timeout"),
    ("GET", "/api/v1/wait?timeout=0&query=nobody", None, 408, "no message matched"),
    ("GET", "/api/v1/wait?to=nobody@example.com&timeout=0", None, 408, "no message matched"),
    ("GET", "/api/v1/wait?to=&timeout=0", None, 400, "to: expected something"),
    ("GET", "/api/v1/wait?recipient=bob", None, 400, "recipient: not known here; expected to from subject"),
    ("GET", "/api/v1/queue?limt=3", None, 400, "limt: not known here; expected limit"),
    ("GET", "/api/v1/stats?day=1", None, 400, "day: not known here"),
    ("POST", "/api/v1/send", b"{}", 400, "From.Email"),
    ("POST", "/api/v1/queue/nope/retry", b"", 404, "not found"),
    ("POST", "/api/v1/users", b'{"name": "a"}', 400, "SMTP_USERS_FILE"),
    ("PUT", "/api/v1/faults", b'{"rules": ["sometimes"]}', 400, "expected a stage"),
    ("PUT", "/api/v1/faults", b"{}", 400, "list of rules"),
]


def test_errors_are_shaped_as_mailpits(start: Callable[..., Any]) -> None:
    """And whatever is refused has changed nothing."""
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    for method, path, body, status, words in BAD:
        got, kind, text = spoken(relay, method, path, body)
        assert (got, kind) == (status, "text/plain; charset=utf-8") and words in text, (method, path, text)
    for method, path, body, status, words in OURS_BAD:
        got, answer = api(relay, method, path, body)
        assert (got, list(answer)) == (status, ["Error"]) and words in answer["Error"], (method, path, answer)
    listed = api(relay, "GET", "/api/v1/messages?limit=x&start=-1")[1]
    assert (listed["total"], listed["unread"], listed["count"]) == (1, 1, 1)
    assert spoken(relay, "GET", "/view/latest.html")[::2] == (404, "this message has no HTML")
    assert api(relay, "GET", "/api/v1/messages")[1]["unread"] == 0  # to view it is to read it


def spoken(relay: Any, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, str]:
    """Make a request; return status, content type and text."""
    with contextlib.closing(http.client.HTTPConnection(relay.http_url[7:], timeout=8)) as connection:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("name", ["IDs", "ids", "IDS"])
def test_names_in_a_body_are_read_in_any_case(start: Callable[..., Any], name: str, form: bool) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, *[b"Subject: %d\r\n\r\nx\r\n" % n for n in range(3)])
    ids = [m["ID"] for m in api(relay, "GET", "/api/v1/messages")[1]["messages"]]

    def ask(method: str, path: str, **fields: Any) -> None:
        body = urllib.parse.urlencode(fields, doseq=True) if form else json.dumps(fields)
        kind = "application/x-www-form-urlencoded; charset=UTF-8" if form else "application/json"
        assert spoken(relay, method, path, body.encode(), Content_Type=kind)[::2] == (200, "ok")

    ask("PUT", "/api/v1/messages", **{name: ids[1:], name and "reAd": "true" if form else True})
    assert api(relay, "GET", "/api/v1/messages")[1]["unread"] == 1
    ask("PUT", "/api/v1/tags", **{name: ids[:1], "tags": ["one"]})
    assert api(relay, "GET", "/api/v1/search?query=tag:one")[1]["messages_count"] == 1
    ask("DELETE", "/api/v1/messages", **{name: ids[:1]})
    assert [m["ID"] for m in api(relay, "GET", "/api/v1/messages")[1]["messages"]] == ids[1:]


def test_a_tag_is_renamed_or_taken_off(start: Callable[..., Any]) -> None:
    """And what is to be taken off is not renamed, whatever the body says."""
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, b"X-Tags: one, two\r\n\r\nx\r\n")
    for method, tag, body, status, tags in (
        ("PUT", "ONE", {"Name": "two"}, 400, ["one", "two"]), ("PUT", "one", {"Name": "!"}, 400, ["one", "two"]),
        ("PUT", "one", {"name": "Three"}, 200, ["Three", "two"]), ("DELETE", "two", {"Name": "four"}, 200, ["Three"]),
    ):
        assert api(relay, method, f"/api/v1/tags/{tag}", body)[0] == status
        assert api(relay, "GET", "/api/v1/tags")[1] == tags


def test_a_release_goes_where_it_is_told(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop()
    relay = start(SMTP_DELIVERY="hold", **next_hop.settings())
    mailed(relay)
    assert api(relay, "POST", "/api/v1/message/latest/release", {"to": ["eve@example.com"]}) == (200, "ok")
    wait_until(lambda: next_hop.delivered() == {"eve@example.com": 1})


@pytest.mark.parametrize("signs", ["*", "€", "🎉", "%", "?!", "()", '","', "from:"])
def test_a_search_for_signs_finds_signs(start: Callable[..., Any], signs: str) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    path = "/api/v1/search?query=" + urllib.parse.quote(signs)
    assert signs == "from:" or api(relay, "GET", path)[1]["messages_count"] == 0  # which is ignored while it is typed
    answer = api(relay, "DELETE", path)
    assert answer[0] == 400 if signs == "from:" else answer == (200, "ok")
    assert api(relay, "GET", "/api/v1/messages")[1]["total"] == 1


def test_wait_heeds_whom_it_is_asked_for(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, b"From: Ann <ann@example.com>\r\nSubject: Two words\r\n\r\nx\r\n", to=("bob@example.com", "cy@x.test"))
    for query, status in {
        "to=bob@example.com": 200, "to=CY@x.test": 200, "to=ob@example.com": 408, "to=bob": 200, "to=eve": 408,
        "from=ann@example.com": 200, "from=bob@example.com": 408, "subject=two+words": 200, "subject=three": 408,
        "to=bob&from=ann&subject=Two&query=x": 200, "to=bob&query=zebra": 408,
    }.items():
        assert api(relay, "GET", f"/api/v1/wait?timeout=0&{query}")[0] == status, query


def test_an_answer_that_ends_the_connection_says_so(start: Callable[..., Any]) -> None:
    """And one that says nothing keeps it: Node's agent sends its next request there."""
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret")
    for method, path, body, status in [
        ("GET", "/api/v1/messages", None, 401), ("GET", "/nothing", None, 404), ("POST", "/livez", b"{}", 405),
        ("DELETE", "/api/v1/messages", b"{}", 401),
    ]:
        with contextlib.closing(http.client.HTTPConnection(relay.http_url[7:], timeout=8)) as connection:
            connection.request(method, path, body)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status and (body is None) == (answer.headers["Connection"] is None), path
            connection.request("GET", "/livez")  # over a new one where need be: that is what the field is for
            assert connection.getresponse().read() == b"OK\n"
    challenges = http.client.HTTPConnection(relay.http_url[7:], timeout=8)
    challenges.request("GET", "/api/v1/messages")
    assert "Basic" in (said := str(challenges.getresponse().headers.get_all("WWW-Authenticate"))) and "Bearer" in said
    challenges.close()


@pytest.mark.parametrize(
    ("settings", "body", "status", "words"),
    [
        ({"SMTP_MAX_RECIPIENTS": "2"}, {"Bcc": ["a@x.test", "b@x.test"]}, 503, "452 4.5.3"),
        ({"SMTP_QUEUE_SIZE": "1"}, {}, 503, "452 4.3.1"),
        ({"SMTP_SPOOL_MIN_FREE": "900000GiB"}, {}, 503, "452 4.3.1"),
        ({"SMTP_MAX_SIZE": "1000"}, {"Text": "x" * 1000}, 413, "1000 octets"),
    ],
)
def test_what_is_sent_over_http_meets_a_sessions_rules(
    start: Callable[..., Any], settings: dict[str, str], body: dict[str, Any], status: int, words: str
) -> None:
    relay = start(SMTP_RELAY_HOST="127.0.0.1:9", SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h", **settings)
    sent = {"From": {"Email": "a@b.test"}, "To": [{"Email": "c@d.test"}]}
    if "SMTP_QUEUE_SIZE" in settings:
        assert api(relay, "POST", "/api/v1/send", sent)[0] == 200
    got, answer = api(relay, "POST", "/api/v1/send", {**sent, **body})
    assert got == status and words in answer["Error"], answer


def test_info_is_mailpits(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    info = api(relay, "GET", "/api/v1/info")[1]
    names = "Version LatestVersion Database DatabaseSize Messages Unread Tags RuntimeStats SMTPPort Delivery RelayHost"
    assert list(info) == names.split() and (info["Messages"], info["Unread"], info["SMTPPort"]) == (1, 1, relay.port)
    stats = "Uptime Memory SMTPAccepted SMTPAcceptedSize SMTPRejected SMTPIgnored MessagesDeleted"
    assert list(info["RuntimeStats"]) == stats.split() and info["RuntimeStats"]["SMTPAccepted"] == 1


def test_who_sends_over_http_is_shown(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    sent = {"From": {"Email": "ä@b.test"}, "To": [{"Email": "c@d.test"}]}
    login = "Basic " + base64.b64encode(b"joe\r\nX: y:secret").decode()
    assert api(relay, "POST", "/api/v1/send", sent, Authorization=login)[0] == 200
    seen = api(relay, "GET", "/api/v1/message/latest")[1]
    assert (seen["Username"], seen["From"]["Address"]) == ("joe  X: y".partition(":")[0], "ä@b.test")


def test_a_chunked_body_is_read(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    head = b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b'{"From": {"Email": "a@b.test"}, "To": [{"Email": "c@d.test"}], "Subject": "in chunks"}'
    wire = b"".join(b"%x;a=b\r\n%s\r\n" % (len(body[at:at + 7]), body[at:at + 7]) for at in range(0, len(body), 7))
    after = b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n"
    heard = watch_events(relay, head, wire, b"0\r\nTrailer: x\r\n\r\n", after)
    assert heard.startswith(b"HTTP/1.1 200") and heard.endswith(b"OK\n")
    assert api(relay, "GET", "/api/v1/messages")[1]["messages"][0]["Subject"] == "in chunks"


def test_waiting_for_a_message_with_its_link_and_code(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    thread = later(
        mailed,
        relay,
        b"From: a@b.test\r\nTo: bob@example.com\r\nSubject: Welcome\r\n\r\nYour code is 123456, or https://x.test/go\r\n",
    )
    status, found = api(relay, "GET", "/api/v1/wait?query=to:bob+subject:welcome&since=0&timeout=5")
    assert (status, found["Codes"], found["Links"]) == (200, ["123456"], ["https://x.test/go"])
    assert found["ReturnPath"] == "envelope@example.com"
    assert api(relay, "GET", f"/api/v1/wait?query=to:bob&since={found['Sequence']}&timeout=0.05")[0] == 408
    thread.join()


def test_scripted_failures_over_http(program: Callable[..., Program]) -> None:
    """The receiving process hears of rules that were changed at the other, and so does a later session."""
    relay = program(SMTP_FAULTS="rcpt to=kept@* 452 4.3.1 kept")
    trigger = {"ErrorCode": 450, "Probability": 50}
    lowered = {name.lower(): value for name, value in trigger.items()}
    assert api(relay, "PUT", "/api/v1/chaos", {"sender": lowered})[1]["Sender"] == trigger
    rules = ["rcpt to=kept@* 452 4.3.1 kept", "mail 450 Chaos share 50"]
    assert api(relay, "GET", "/api/v1/faults")[1] == {"rules": rules}
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.ehlo()
        codes = []
        for _ in range(4):
            codes.append(client.mail("a@b.test")[0])
            client.rset()
    assert codes == [250, 450, 250, 450]
    assert api(relay, "PUT", "/api/v1/faults", {"rules": ["rcpt to=*@slow.test 451 4.7.1 slow"]})[0] == 200
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.ehlo()
        client.mail("a@b.test")
        assert [client.rcpt(to)[0] for to in ("x@slow.test", "kept@b.test")] == [451, 250]
    assert api(relay, "GET", "/api/v1/chaos")[1]["Sender"] == {"ErrorCode": 451, "Probability": 0}


MAILPIT = """
import { MailpitClient } from 'mailpit-api';
const mailpit = new MailpitClient(process.env.RELAY, { auth: { username: 'any', password: 'a token' } });
const out = {};
const step = async (name, work) => { out[name] = await work(); };
await step('sent', () => mailpit.sendMessage({ From: { Email: 'a@b.test', Name: 'Ann' }, To: [{ Email: 'c@d.test' }], Subject: 'Sent',
  Text: 'text', HTML: '<p>page <img src="cid:i">', Tags: ['one'], Headers: { 'X-Own': 'yes' },
  Attachments: [{ Content: 'iVBORw==', Filename: 'i.png', ContentID: 'i' }, { Content: 'aGk=', Filename: 'a.txt' }] }));
await step('found', () => mailpit.waitForMessage({ query: 'subject:sent has:attachment' }, { timeout: 2000, interval: 20 }));
await step('list', () => mailpit.listMessages(0, 10));
await step('search', () => mailpit.searchMessages({ query: 'from:ann is:read', start: 0, limit: 5 }));
await step('headers', () => mailpit.getMessageHeaders());
await step('source', () => mailpit.getMessageSource());
await step('html', () => mailpit.renderMessageHTML());
await step('text', () => mailpit.renderMessageText());
await step('part', async () => (await mailpit.getMessageAttachment(out.found.ID, out.found.Attachments[0].PartID)).text());
await step('thumb', async () => (await mailpit.getAttachmentThumbnail(out.found.ID, out.found.Inline[0].PartID)).type);
await step('unread', () => mailpit.setReadStatus({ IDs: [out.found.ID], Read: false }));
await step('unreads', async () => (await mailpit.searchMessages({ query: 'is:unread' })).messages_count);
await step('readAll', () => mailpit.setReadStatus({ Read: true, Search: 'subject:sent' }));
await step('reads', async () => (await mailpit.searchMessages({ query: 'is:read' })).messages_count);
await step('tag', () => mailpit.setTags({ IDs: [out.found.ID], Tags: ['two'] }));
await step('rename', () => mailpit.renameTag('two', 'three'));
await step('tags', () => mailpit.getTags());
await step('untag', () => mailpit.deleteTag('three'));
await step('release', () => mailpit.releaseMessage(out.found.ID, { To: ['z@d.test'] }));
await step('info', () => mailpit.getInfo());
await step('webui', () => mailpit.getConfiguration());
await step('chaos', () => mailpit.setChaosTriggers({ Recipient: { ErrorCode: 451, Probability: 100 } }));
await step('calm', () => mailpit.setChaosTriggers());
await step('deleted', () => mailpit.deleteMessagesBySearch({ query: 'to:nobody' }));
await step('gone', () => mailpit.deleteMessages({ IDs: [out.found.ID] }));
await step('error', () => mailpit.getMessageSummary('nope').catch(error => error.message));
console.log(JSON.stringify(out));
"""


def driven(relay: Any, code: str, needs: str, python: bool = False) -> Any:
    """Run a script over somebody's client of an API, in .ci/node_modules or .ci/venv; return what it prints as JSON."""
    venv = ROOT / ".ci/venv/bin/python"
    if not (venv.exists() if python else shutil.which("node") and (MODULES / needs).is_dir()):
        pytest.skip(f"needs {needs} (see .ci/install)")
    command = [str(venv), "-c", code] if python else ["node", "--input-type=module", "-e", code]
    env = {"PATH": os.environ["PATH"], "RELAY": relay.http_url, "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(command, cwd=ROOT / ".ci", capture_output=True, text=True, timeout=40, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_mailpits_own_client_works_unchanged(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop()
    relay = start(SMTP_STORAGE="memory", SMTP_DELIVERY="hold", SMTP_API_TOKEN="a token", **next_hop.settings())
    out = driven(relay, MAILPIT, "mailpit-api")
    found, listed = out["found"], out["list"]["messages"][0]
    assert found["ID"] == out["sent"]["ID"] == listed["ID"] and types(listed) == {**SUMMARY_TYPES, "Status": str}
    assert MESSAGE_TYPES.items() <= types(found).items()
    assert (found["From"], found["Tags"], found["Subject"]) == ({"Name": "Ann", "Address": "a@b.test"}, ["one"], "Sent")
    assert [part["FileName"] for part in found["Attachments"] + found["Inline"]] == ["a.txt", "i.png"]
    assert (out["search"]["messages_count"], out["headers"]["X-Own"]) == (1, ["yes"]) and "Subject: Sent" in out["source"]
    assert "data:image/png;base64,iVBORw==" in out["html"] and out["text"].strip() == "text"
    assert (out["part"], out["thumb"]) == ("hi", "image/png")
    assert (out["unreads"], out["reads"], out["tags"]) == (1, 1, ["three"])
    assert {out[name] for name in ("unread", "readAll", "tag", "rename", "untag", "release", "deleted", "gone")} == {"ok"}
    assert out["info"]["Messages"] == 2 and out["webui"]["MessageRelay"]["Enabled"] is True
    assert out["chaos"]["Recipient"] == {"ErrorCode": 451, "Probability": 100}
    assert out["calm"]["Recipient"]["Probability"] == 0
    assert "404" in out["error"]
    wait_until(lambda: next_hop.delivered() == {"z@d.test": 1})


MAILHOG = """
import mailhog from 'mailhog';
import awesome from 'mailhog-awesome';
const { hostname: host, port } = new URL(process.env.RELAY), hog = mailhog({ host, port });
const better = new awesome.MailhogClient({ host, port }), out = {};
const step = async (name, work) => { out[name] = await work(); };
await step('all', async () => (await hog.messages(0, 10)).items.map(m =>
  [m.subject, m.from, m.to, m.text?.trim(), m.html?.trim(), m.attachments.map(a => a.name)]));
await step('found', async () => [(await hog.latestFrom('ann@example.com')).subject, (await hog.latestTo('BOB@example.com')).subject,
  (await hog.latestContaining('Hello')).subject, (await hog.search('nobody', 'to')).total, (await hog.search('env', 'from')).total]);
await step('deleted', async () => (await hog.deleteMessage((await hog.messages(0, 1)).items[0].ID)).statusCode);
await step('last', async () => (await better.getLastEmail({ subject: 'One' })).text.trim());
await step('cleared', () => better.deleteEmails({ subject: 'One' }));
await step('left', async () => (await hog.messages()).total);
await step('emptied', async () => (await hog.deleteAll()).statusCode);
await step('end', async () => (await hog.messages()).total);
console.log(JSON.stringify(out));
"""
PYHOG = """
import json, os
import mailhog, openapi_client
url = os.environ["RELAY"]
host, port = url.split("//")[1].split(":")
hog = mailhog.Mailhog(host, int(port))
api = openapi_client.DefaultApi(openapi_client.ApiClient(openapi_client.Configuration(host=url)))
out = {
    "all": [[m.get_sender(), m.get_recipients(), m.get_subject()] for m in hog.messages().items],
    "found": [hog.search("hello").total, hog.search("bob@example.com", "to").count, hog.search("eve", "from").total],
    "pyhog": [api.api_v2_messages_get(limit=1).total, api.api_v2_search_get("to", "bob", limit=1).count],
}
hog.delete(hog.messages().items[0])
out["left"] = hog.messages().total
hog.delete_all()
print(json.dumps({**out, "end": hog.messages().total}))
"""
FIXTURE = """
import os, pytest
from mailpit.testing.pytest import mailpit_api

@pytest.mark.parametrize("mailpit_api", [os.environ["RELAY"]], indirect=True)
def test_it(mailpit_api):
    listed = mailpit_api.get_messages()
    assert (listed.total, listed.unread, [m.subject for m in listed.messages]) == (3, 3, ["Three", "Two", "One!"])
    mailpit_api.put_messages([listed.messages[0].id], "Read", True)
    assert mailpit_api.get_messages().unread == 2
    mailpit_api.delete_messages([listed.messages[0].id])
    assert [m.subject for m in mailpit_api.get_messages().messages] == ["Two", "One!"]
"""
PYTEST = """
import json, pathlib, subprocess, sys
done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", {}], capture_output=True, text=True)
print(json.dumps(done.stdout))
"""
THREE = (
    b"From: Ann <ann@example.com>\r\nTo: bob@example.com\r\nContent-Type: text/plain\r\nSubject: =?utf-8?q?One=21?=\r\n\r\nhello\r\n",
    b"From: ann@example.com\r\nTo: bob@example.com\r\nSubject: Two\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n"
    b"--x\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\nhello =C3=A4\r\n"
    b"--x\r\nContent-Type: text/html\r\n\r\n<p>hello\r\n"
    b'--x\r\nContent-Type: text/plain\r\nContent-Disposition: attachment; filename="a.txt"\r\n\r\nfile\r\n--x--\r\n',
    b"From: eve@example.com\r\nSubject: Three\r\n\r\nlast hello\r\n",
)


def test_mailhogs_clients_work_unchanged(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, *THREE)
    out = driven(relay, MAILHOG, "mailhog-awesome")
    assert out.pop("all") == [
        ["Three", "eve@example.com", None, None, None, []],
        ["Two", "ann@example.com", "bob@example.com", "hello ä", "<p>hello", ["a.txt"]],
        ["One!", "Ann <ann@example.com>", "bob@example.com", "hello", None, []],
    ]
    assert out.pop("found") == ["Two", "Three", "Three", 0, 3]
    assert out == {"deleted": 200, "last": "hello", "cleared": True, "left": 1, "emptied": 200, "end": 0}


def test_mailhogs_clients_in_python_work_unchanged(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, *THREE)
    sent = ["envelope@example.com", ["bob@example.com"]]
    shown = [[*sent, subject] for subject in ("Three", "Two", "=?utf-8?q?One=21?=")]
    want = {"all": shown, "found": [3, 3, 1], "pyhog": [3, 1], "left": 2, "end": 0}
    assert driven(relay, PYHOG, "mailhog and pyhog", python=True) == want


def test_mailpits_pytest_fixture_works_to_the_end(start: Callable[..., Any], tmp_path: Path) -> None:
    """Its last step deletes what is left, with a form as its body."""
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, *THREE)
    (tmp_path / "test_it.py").write_text(FIXTURE)
    assert "1 passed" in driven(relay, PYTEST.format(repr(str(tmp_path))), "mailpit-api-client", python=True)
    assert api(relay, "GET", "/api/v1/messages")[1]["total"] == 0


def test_mailhogs_addresses(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, to=("bob@example.com", "carol@example.com"))
    found = api(relay, "GET", "/api/v2/messages?limit=x")[1]
    assert found["total"] == 1 and found["items"][0]["Raw"]["To"] == ["bob@example.com", "carol@example.com"]
    assert api(relay, "GET", "/api/v2/search?kind=to&query=CAROL")[1]["total"] == 1
    assert api(relay, "DELETE", "/api/v1/messages", Accept="*/*") == (200, "ok")  # Mailpit's answer
    assert api(relay, "GET", "/api/v2/messages")[1]["total"] == 0


def test_held_mail_says_so_and_can_be_released(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop()
    relay = start(SMTP_DELIVERY="hold", **next_hop.settings())
    mailed(relay)
    seen = api(relay, "GET", "/api/v1/message/latest")[1]
    assert [r["status"] for r in seen["Delivery"]["recipients"]] == ["held"] == [seen["Delivery"]["status"]]
    path = f"/api/v1/message/{seen['ID']}"
    assert api(relay, "POST", f"/api/v1/queue/{seen['ID']}/retry")[0] == 200
    wait_until(lambda: api(relay, "GET", path)[1]["Status"] == "forwarded")
    after = api(relay, "GET", path)[1]["Delivery"]
    assert (after["recipients"][0]["status"], after["recipients"][0]["code"]) == ("forwarded", 250) and after["transcript"]
    assert api(relay, "POST", path + "/release", {"To": ["eve@example.com"]})[0] == 200
    wait_until(lambda: next_hop.delivered() == {"bob@example.com": 1, "eve@example.com": 1})
    wait_until(lambda: smtprelay_depth(relay) == 0)


def smtprelay_depth(relay: Any) -> int:
    return int(json.loads(fetch(relay, "/metrics")[2])["smtp_queue_depth"])


def test_the_queue_is_listed_retried_and_emptied(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={f"rcpt {name}@example.com": ["450 4.2.1 busy"] for name in ("a", "b", "c", "d")})
    relay = start(**next_hop.settings(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h"))
    for name in ("a", "b", "c", "d"):
        mailed(relay, to=(name + "@example.com",))
    wait_until(lambda: [m["status"] for m in api(relay, "GET", "/api/v1/queue")[1]["messages"]] == ["retrying"] * 4)
    shown = api(relay, "GET", "/api/v1/queue?limit=3")[1]
    first, second, third = shown["messages"]
    assert (shown["total"], first["attempts"], first["recipients"]) == (4, 1, ["a@example.com"]) and "450" in first["last_error"]
    assert api(relay, "POST", f"/api/v1/queue/{first['id']}/retry")[1] == {"retried": 1}
    wait_until(lambda: next_hop.delivered()["a@example.com"] == 1)
    assert api(relay, "DELETE", f"/api/v1/queue/{second['id']}")[0] == 200
    assert api(relay, "GET", f"/api/v1/message/{second['id']}")[0] == 404
    assert api(relay, "POST", "/api/v1/queue/all/retry")[1] == {"retried": 2}
    wait_until(lambda: next_hop.delivered() == {"a@example.com": 1, "c@example.com": 1, "d@example.com": 1})
    wait_until(lambda: api(relay, "GET", "/api/v1/queue")[1]["total"] == 0)


def test_figures_by_hour_by_day_and_in_all(start: Callable[..., Any]) -> None:
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    stats = wait_until(lambda: (s := api(relay, "GET", "/api/v1/stats")[1])["totals"]["received"] and s)
    assert stats["totals"] == {"received": 1, "forwarded": 0, "failed": 0} and len(stats["hours"]) == 24
    assert stats["hours"][-1]["received"] + stats["hours"][-2]["received"] == stats["days"][0]["received"] == 1


def test_an_accounts_own_mail_and_figures(start: Callable[..., Any], tmp_path: Path) -> None:
    users = tmp_path / "users.json"
    app = {"password": "a long one", "api_key": "mp_live_app", "quota_daily": 5}
    users.write_text(json.dumps({"app": app, "other": {"password": "b long one"}}))
    users.chmod(0o600)
    relay = start(SMTP_STORAGE="memory", SMTP_USERS_FILE=str(users))
    for name in ("app", "other"):
        with smtplib.SMTP(relay.host, relay.port) as client:
            client.login(name, {"app": "a long one", "other": "b long one"}[name])
            client.sendmail("a@b.test", ["c@d.test"], f"Subject: by {name}\r\n\r\nx\r\n")
    status, own = api(relay, "GET", "/api/emails", token="mp_live_app", Host="relay.lan")
    assert (status, own["total"], own["emails"][0]["subject"]) == (200, 1, "by app")
    assert api(relay, "GET", "/api/stats", token="mp_live_app")[1]["left_today"] == 4
    assert api(relay, "GET", "/api/emails", token="wrong")[0] == api(relay, "GET", "/api/stats")[0] == 401
    assert api(relay, "GET", "/api/emails", token="mp_live_app", Sec_Fetch_Site="cross-site")[0] == 403


@pytest.mark.parametrize("deep", [b"[", b'{"a":'], ids=["array", "object"])
def test_deep_json_ends_no_process(program: Callable[..., Program], deep: bytes) -> None:
    relay = program()
    request = urllib.request.Request(f"{relay.http_url}/api/v1/messages", deep * 100_000, method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request, timeout=10)
    assert "half_died" not in relay.log()


# === SENDMAIL ================================================================


Mail = tuple[smtprelay.Message, bytes]
ME = smtprelay.user_name(os.getuid())


def mails(relay: smtprelay.Relay) -> list[Mail]:
    """What a relay has, without the Received header that it added."""
    spool = relay.parts.spool
    return [(spool.load(stem), without_trace(spool.content(stem).read())) for stem, _ in spool.names()]


def without_trace(content: bytes) -> bytes:
    lines = content.split(b"\r\n")
    return b"\r\n".join(lines[3 + (b"\tfor <" in lines[2]) :] if lines[0].startswith(b"Received: from") else lines)


def clean_env(**env: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("SMTP_", "XDG_"))}, **env}


@pytest.fixture
def relay() -> Iterator[smtprelay.Relay]:
    with smtprelay.start() as relay:
        yield relay


@pytest.fixture
def env(relay: smtprelay.Relay, tmp_path: Path) -> dict[str, str]:
    """The environment of a program that sends by sendmail, to the relay of this test."""
    script = tmp_path / "bin" / "sendmail"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{ONE_LINER}" sendmail "$@"\n')
    script.chmod(0o755)
    return clean_env(
        SMTP_PORT=f"127.0.0.1:{relay.port}",
        SMTP_HOSTNAME="box.example",
        HOME=str(tmp_path),
        PATH=f"{script.parent}:{os.environ['PATH']}",
        SENDMAIL=str(script),
        TZ="UTC",
    )


def run_command(*command: str, env: Mapping[str, str], stdin: bytes = b"", status: int = 0, cwd: object = None) -> str:
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, timeout=30, cwd=str(cwd or ROOT))
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stdout.decode()


ERRANDS: list[tuple[str, Any]] = [  # what programs call sendmail with: sender, recipients, -t, a dot ends it; or why not
    ("-t -i", (None, [], True, False)),  # PHP
    ("-ti", (None, [], True, False)),
    ("-FCronDaemon -i -B8BITMIME -oem root", (None, ["root"], False, False)),  # cron, Debian's
    ("-FCronDaemon -odi -oem -oi -t -f root", ("root", [], True, False)),  # cron, cronie's
    ("-oem -oi -f me@x.example -- a@b.example c", ("me@x.example", ["a@b.example", "c"], False, False)),  # mutt
    ("-oem -oi -N failure,delay -R hdrs -B8BITMIME -- a", (None, ["a"], False, False)),  # mutt with DSN
    ("-i -f me@x.example a@b.example", ("me@x.example", ["a@b.example"], False, False)),  # git send-email
    ("-i -m -v -r me -- a", ("me", ["a"], False, False)),  # s-nail
    ("-E -i -t", (None, [], True, False)),  # bsd-mailx
    ("-G -Tqt -c -x -k -J -Y -Qwhy a", (None, ["a"], False, True)),
    ("-f<> a", ("<>", ["a"], False, True)),
    ("-f  a", ("", ["a"], False, True)),
    ("-fme a -vi b", ("me", ["a", "b"], False, False)),
    ("-O DeliveryMode=b -OIgnoreDots=1 -X /dev/null -V id -L tag -h 3 -p smtp:x -Am -GUn -d0.1 a", (None, ["a"], False, False)),
    ("-o i a", (None, ["a"], False, False)),
    ("-Am -Z a", "-Z not recognized"),
    ("--read-recipients a", "read-recipients not recognized"),
    ("-f", "-f requires argument"),
    ("-bd", "-bd is not done here; see the command serve"),
    ("-b", "-b is not done here$"),
]


@pytest.mark.parametrize("line, expected", ERRANDS)
def test_sendmails_flags_are_read_in_every_spelling(line: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            smtprelay.read_errand(line.split(" "))
        return
    _, flags, recipients = smtprelay.read_errand(line.split(" "))
    assert (flags.get("-f"), recipients, "-t" in flags, "-i" not in flags) == expected


INJECTED_PATH = "x@y.example>\r\nDATA"
SENDMAIL_INJECTIONS = [["-f", INJECTED_PATH, "a"], [f"-r{INJECTED_PATH}", "a"], ["-F", "Me\nBcc: b@c.example", "a"], ["a\nb@c.example"],
              ["-t", "--", "a\0b"], ["-FMe\r", "a"]]  # fmt: skip


@pytest.mark.parametrize("words", SENDMAIL_INJECTIONS)
def test_nobody_injects_through_sendmails_arguments(words: list[str]) -> None:
    with pytest.raises(ValueError, match="line end"):
        smtprelay.read_errand(words)


def test_what_would_inject_is_a_mistake_of_usage(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    for words in SENDMAIL_INJECTIONS[:3]:
        run_command("sendmail", *words, env=env, stdin=b"x\n", status=64)
    assert mails(relay) == []


SENDMAIL_MODES = [("-bp", "queue"), ("-bi", "nothing"), ("-I", "nothing"), ("-bv", "nothing"), ("-bs", "smtp"),
                  ("-q", "flush"), ("-vq", "flush"), ("-q30m", "flush"), ("-qRx", "flush"), ("-bm", "deliver")]  # fmt: skip


@pytest.mark.parametrize("flag, mode", SENDMAIL_MODES)
def test_sendmails_modes(flag: str, mode: str) -> None:
    assert smtprelay.read_errand([flag])[0] == mode


SENDMAIL_LETTERS = [  # what is written, flags: sender, who gets it, what must be in it, what must not
    (b"To: a@b.example, Carl <c>\nCc: d@e.example\nBcc: f@g.example\nSubject: s\n\nbody\n", "-t",
     "me@box a@b.example c@box d@e.example f@g.example", [b"To: a@b.example,\r\n\tCarl <c@box>\r\n", b"\r\n\r\nbody\r\n"], [b"f@g"]),
    (b"To: old@b.example\nResent-To: new@b.example\nResent-Bcc: blind@b.example\n\nx\n", "-t",
     "me@box new@b.example blind@b.example", [b"To: old@b.example\r\n"], [b"blind"]),
    (b"To: a@b.example\nX: 1\n\nx\n", "-t extra@b.example", "me@box extra@b.example a@b.example", [], []),
    (b"no header at all\n", "a", "me@box a@box",
     [b"\r\n\r\nno header at all\r\n", b"From: me@box\r\n", b"Date: ", b"Message-ID: <"], []),
    (b"From me Mon Jan 1\nSubject: mbox\n\nx\n", "a", "me@box a@box", [b"Subject: mbox\r\n"], [b"From me"]),
    (b">From me Mon Jan 1\nSubject: mbox\n\n>From x\n", "a", "me@box a@box", [b"Subject: mbox\r\n", b"\r\n\r\n>From x\r\n"], [b"From me"]),
    (b"Subject: x\n\none\n.\ntwo\n", "a", "me@box a@box", [b"one\r\n"], [b"two"]),
    (b"Subject: x\n\none\n.\ntwo\n", "-i a", "me@box a@box", [b"one\r\n.\r\ntwo\r\n"], []),
    (b"Subject: x\r\n\r\none\r\ntwo\rthree", "a", "me@box a@box", [b"one\r\ntwo\r\nthree\r\n"], [b"\r\r"]),
    (b"Subject: x\nFrom: Own <own@x.example>\nDate: d\nMessage-ID: <m@x>\n\nx\n", "-F Other a", "me@box a@box",
     [b"From: Own <own@x.example>\r\n"], [b"Other", b"+0000"]),
    (b"\nx\n", "-F Cron -f root a", "root@box a@box", [b"From: Cron <root@box>\r\n"], []),
    (b"From: root (Cron Daemon)\nTo: root\n\nx\n", "root", "me@box root@box", [b"From: Cron Daemon <root@box>\r\nTo: root@box\r\n"], []),
    ("From: J\u00f6rg <j>\nTo: undisclosed-recipients:;\n\nx\n".encode(), "a", "me@box a@box",
     [b"From: =?utf-8?b?SsO2cmc=?= <j@box>\r\nTo: undisclosed-recipients:;\r\n"], []),
    (b"Subject: folded\n words\n\n\nx\n", "a,b", "me@box a@box b@box",
     [b"Subject: folded\r\n words\r\n", b"\r\n\r\n\r\nx\r\n"], []),
    (b"To: a@b.example\nSubject: s\rBcc: eve@x.example\r\r\nX: y\n\n1%\r2%\n", "-t", "me@box a@b.example",
     [b"Subject: s Bcc: eve@x.example\r\nX: y\r\n", b"\r\n\r\n1%\r\n2%\r\n"], []),
    (b"", "a", "me@box a@box", [b"From: "], []),
    (b"x: y\n\nx\n", "-f Web\u00a0App\u00a0<app@x.example> a", "app@x.example a@box", [b"From: Web App <app@x.example>\r\n"], []),
    (b"x: y\n\nx\n", "-f <app@x.example> a", "app@x.example a@box", [b"From: app@x.example\r\n"], []),
    (b"x: y\n\nx\n", "-f <> a", " a@box", [b"From: me@box\r\n"], []),
    (b"x: y\n\nx\n", "-f j\u00f6rg@x.example a", "j\u00f6rg@x.example a@box", ["From: j\u00f6rg@x.example\r\n".encode()], []),
    (b"x: y\n\nx\n", "-F Web,\u00a0Inc. a", "me@box a@box", [b'From: "Web, Inc." <me@box>\r\n'], []),
    (b"To: a@b.example, ;; Bad Entry, c@d.example,\n\nx\n", "-t", "me@box a@b.example c@d.example", [], []),
    (b"To: Jim (the 1st, of 2) <j@x.example>; a@x.example <a@x.example>\nCc: MyApp [x] <m@x.example>, Acme, Inc. <i@x.example>\n\nx\n", "-t",
     "me@box j@x.example a@x.example m@x.example i@x.example", [], []),
]  # fmt: skip


@pytest.mark.parametrize("raw, flags, path, has, lacks", SENDMAIL_LETTERS)
def test_a_message_is_completed(raw: bytes, flags: str, path: str, has: list[bytes], lacks: list[bytes]) -> None:
    errand = smtprelay.read_errand([word.replace("\u00a0", " ") for word in flags.split(" ")])
    envelope, content = smtprelay.write_letter(raw, *errand[1:], "me", "box")
    assert " ".join([envelope.reverse_path, *envelope.recipients]) == path
    assert all(part in content for part in has), content
    assert not any(part in content for part in lacks), content
    assert content.count(b"\n") == content.count(b"\r\n") == content.count(b"\r")


def test_nobody_to_send_to_is_a_mistake_of_usage(env: dict[str, str]) -> None:
    run_command("sendmail", "-t", env=env, stdin=b"Subject: x\n\nx\n", status=64)


def test_sendmail_hands_over_to_the_relay_by_smtp(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    run_command("sendmail", "-oi", "-F", "J\u00fcrgen", "bob", env=env, stdin="Subject: \u00fc\n\n.\n..\n".encode())
    ((record, content),) = mails(relay)
    assert (record.reverse_path, [r.address for r in record.recipients], record.protocol) == (
        f"{ME}@box.example",
        ["bob@box.example"],
        "ESMTP",
    )
    assert record.flags == ("8BITMIME", "HOLD")
    assert content.endswith(b"\r\n\r\n.\r\n..\r\n") and b"From: =?utf-8?" in content


def test_sendmail_passes_on_what_the_sender_wants_to_be_told(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    run_command("sendmail", "-N", "failure,delay", "-Rhdrs", "bob", env=env, stdin=b"x\n")
    ((record, _),) = mails(relay)
    assert (record.recipients[0].notify, record.ret) == ("FAILURE,DELAY", "HDRS")


def test_sendmail_takes_portions(env: dict[str, str]) -> None:
    with smtprelay.start(SMTP_MAX_RECIPIENTS="2") as relay:
        run_command(
            "sendmail", "a", "b", "c", "d", "e", env={**env, "SMTP_PORT": f"127.0.0.1:{relay.port}"}, stdin=b"x\n"
        )
        assert sorted(len(record.recipients) for record, _ in mails(relay)) == [1, 2, 2]


def test_what_the_relay_refuses_sendmail_refuses(env: dict[str, str]) -> None:
    with smtprelay.start(SMTP_MAX_SIZE="1K") as relay:
        run_command(
            "sendmail", "a", env={**env, "SMTP_PORT": f"127.0.0.1:{relay.port}"}, stdin=b"x\n" * 1000, status=69
        )
        assert mails(relay) == []


def spooled(path: Path) -> list[Mail]:
    spool = smtprelay.Spool(settings_of(SMTP_SPOOL=str(path)), smtprelay.Log(logging.getLogger("test")))
    return [(spool.load(stem), without_trace(spool.content(stem).read())) for stem, _ in spool.names()]


def test_sendmail_spools_itself_where_no_relay_runs(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": free_place(), "SMTP_SPOOL": str(tmp_path / "spool")}
    run_command("sendmail", "-f", "me@x.example", "bob", env=env, stdin=b"Subject: x\n\nhello\n")
    ((record, content),) = spooled(tmp_path / "spool")
    assert (record.status.value, record.client, record.flags) == ("received", "local", ())
    assert content.endswith(b"\r\n\r\nhello\r\n")
    with smtprelay.start(
        SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool"), SMTP_RELAY_HOST=free_place()
    ) as relay:
        wait_until(lambda: len(relay.delivering.scheduler) == 1)


def test_a_running_relay_finds_what_was_spooled_beside_it(env: dict[str, str], tmp_path: Path) -> None:
    with smtprelay.start(
        SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool"), SMTP_RELAY_HOST=free_place()
    ) as relay:
        relay.delivering.catch_up()
        run_command(
            "sendmail",
            "bob",
            env={**env, "SMTP_PORT": free_place(), "SMTP_SPOOL": str(tmp_path / "spool")},
            stdin=b"x\n",
        )
        wait_until(lambda: len(relay.delivering.scheduler) == 1)


def test_the_spool_takes_only_what_the_relay_does_not_answer_for(env: dict[str, str], tmp_path: Path) -> None:
    with smtprelay.start(SMTP_MAX_RECIPIENTS="2", SMTP_FAULTS="rcpt to=c@* 421 going; rcpt to=d@* 550 no") as relay:
        env = {**env, "SMTP_PORT": f"127.0.0.1:{relay.port}", "SMTP_SPOOL": str(tmp_path / "spool")}
        run_command("sendmail", "a", "d", "b", "c", env=env, stdin=b"x\n", status=69)
        assert the_only(relay)[0] == ["a@box.example"]  # taken in a portion of its own: it is not sent twice
    assert [[r.address for r in record.recipients] for record, _ in spooled(tmp_path / "spool")] == [
        ["b@box.example", "c@box.example"]]


NO_SPOOL: list[dict[str, str]] = [{}, {"SMTP_STORAGE": "memory"}, {"SMTP_SPOOL": "/proc/nowhere"}, {"SMTP_SPOOL": "."}]


@pytest.mark.parametrize("more", NO_SPOOL)
def test_sendmail_that_can_do_neither_says_75(env: dict[str, str], tmp_path: Path, more: dict[str, str]) -> None:
    before = sorted(tmp_path.iterdir())
    env = {**env, "SMTP_PORT": free_place(), **more}
    run_command("sendmail", "bob", env=env, stdin=b"x\n", status=75, cwd=tmp_path)
    assert sorted(tmp_path.iterdir()) == before != []


def test_sendmail_goes_by_its_own_names(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    names = {}
    for name in ("sendmail", "mailq", "newaliases"):
        (tmp_path / name).symlink_to(PROGRAM)
        names[name] = str(tmp_path / name)
    env["SMTP_SPOOL"] = str(tmp_path / "spool")
    run_command(sys.executable, names["sendmail"], "bob", env=env, stdin=b"x\n")
    run_command(sys.executable, names["newaliases"], env=env)
    run_command(sys.executable, names["sendmail"], "bob", env={**env, "SMTP_PORT": free_place()}, stdin=b"x\n")
    assert len(mails(relay)) == 1
    listed = run_command(sys.executable, names["mailq"], env={**env, "SMTP_HEALTH_ADDR": "off"})
    assert "    bob@box.example\n" in listed and "-- 1 Kbytes in 1 Request.\n" in listed


def test_a_sealed_spool_takes_nothing_without_its_key(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": free_place(), "SMTP_SPOOL": str(tmp_path / "spool")}
    with smtprelay.start(SMTP_STORAGE="file", SMTP_SPOOL=env["SMTP_SPOOL"], SMTP_SPOOL_KEY="ab" * 32):
        pass
    run_command("sendmail", "bob", env=env, stdin=b"x\n", status=75)
    assert not list(Path(env["SMTP_SPOOL"]).glob("*/*.eml"))


def test_mailq_of_an_empty_queue_says_so(env: dict[str, str]) -> None:
    with smtprelay.start() as relay:
        env = {**env, "SMTP_HEALTH_ADDR": relay.http_url[7:]}
        assert run_command("sendmail", "-bp", env=env) == "Mail queue is empty\n"


def test_without_a_relay_the_spool_has_a_sessions_rules(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": free_place(), "SMTP_SPOOL": str(tmp_path / "spool"), "SMTP_MAX_SIZE": "1K"}
    run_command("sendmail", "a", env=env, stdin=b"x\n" * 1000, status=69)
    run_command("sendmail", "-i", "a", "b", "c", "d@-", env={**env, "SMTP_MAX_RECIPIENTS": "2"}, stdin=b"x\n", status=69)
    assert sorted(len(record.recipients) for record, _ in spooled(tmp_path / "spool")) == [1, 2]


class Submit:
    """A relay with a socket for launchers, and the launchers."""

    def __init__(self, path: Path, **settings: str) -> None:
        path.mkdir(exist_ok=True)
        self.path = str(path / "submit.sock")
        self.relay = smtprelay.start(SMTP_HOSTNAME="box.example", **settings)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(self.path)
        self.sock.listen(200)
        half = self.relay.delivering
        self.server = smtprelay.HttpServer(self.sock, half, smtprelay.SubmitHandler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        (path / "program").write_text('#!/bin/sh\necho "$@"\ncat\nexit 75\n')
        (path / "program").chmod(0o755)
        self.launcher = path / "sendmail"
        text = smtprelay.LAUNCHER.replace(smtprelay.SUBMIT_SOCKET, self.path)
        self.launcher.write_text(text.replace("/usr/local/bin/smtprelay", str(path / "program")))
        (path / "mailq").symlink_to("sendmail")

    def run(self, *words: str, stdin: bytes = b"", name: str = "sendmail") -> tuple[int, str, str]:
        program = str(self.launcher.with_name(name))
        command = [sys.executable, "-I", "-S", program, *words]
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=30, env={"LOGNAME": "liar"})
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def connect(self, *words: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        sock.connect(self.path)
        given = b"".join(word.encode() + b"\0" for word in words)
        sock.sendall(b"%08x" % len(given) + given)
        return sock

    def stop(self) -> None:
        smtprelay.stop_server(self.server)
        self.relay.stop()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Submit]]:
    made: list[Submit] = []

    def make(**settings: str) -> Submit:
        made.append(Submit(tmp_path / f"submit{len(made)}", **settings))
        return made[-1]

    yield make
    for each in made:
        each.stop()


def test_the_launcher_has_the_relay_do_it(launch: Callable[..., Submit]) -> None:
    s = launch()
    assert s.run("-FCronDaemon", "-i", "root", stdin=b"Subject: \xc3\xbc\nTo: root\n\n.\nx\n") == (0, "", "")
    to, sender, content = the_only(s.relay)
    assert (to, sender) == (["root@box.example"], f"{ME}@box.example")
    assert content.startswith(b"Subject: \xc3\xbc\r\nTo: root@box.example\r\n") and content.endswith(b"\r\n.\r\nx\r\n")
    ((record, _),) = mails(s.relay)
    assert (record.client, record.helo, record.protocol) == ("local", ME, "local")
    status, listed, _ = s.run(name="mailq")
    assert status == 0 and "    (held) SMTP_DELIVERY is hold\n    root@box.example\n" in listed and "-- 1 Kbytes in 1 Request." in listed
    s.relay.clear()
    assert s.run("-bp") == (0, "Mail queue is empty\n", "")
    assert s.run("-bv", "a", stdin=b"x\n") == s.run("-bi") == s.run("-q") == (0, "", "") and mails(s.relay) == []


def test_the_launcher_says_what_was_refused(launch: Callable[..., Submit]) -> None:
    s = launch(SMTP_MAX_SIZE="100K", SMTP_MAX_RECIPIENTS="2")
    assert s.run("-t", stdin=b"Subject: x\n\nx\n") == (64, "", "sendmail: nobody is named to send to\n")
    assert s.run("-f", "a\nb", "c") == (64, "", "sendmail: 'a\\nb' has a line end or a NUL\n")
    status, _, said = s.run("a", stdin=b"x" * 70 + b"\n" + b"y\n" * 600000)
    assert (status, said[:19]) == (69, "sendmail: 552 5.3.4")
    assert mails(s.relay) == []
    status, _, said = s.run("-i", "a", "b", "bad@-", "c", stdin=b"x\n")
    assert status == 69 and said.startswith("bad@-: 501 5.1.3 ") and said.count("\n") == 1
    status, _, said = s.run("-i", "-f", "me@-", "a", stdin=b"x\n")
    assert status == 69 and said.startswith("me@-: 501 5.1.7 ") and said.count("\n") == 1
    assert sorted(len(record.recipients) for record, _ in mails(s.relay)) == [1, 2]


def test_where_no_relay_answers_the_launcher_runs_the_program(launch: Callable[..., Submit], monkeypatch: Any) -> None:
    s = launch()
    assert s.run("-bs", stdin=b"QUIT\r\n") == (75, "sendmail -bs\nQUIT\r\n", "")  # a dialogue is not for the relay
    monkeypatch.setattr(smtprelay, "SUBMIT_CALLERS", 0)
    assert s.run("-t", "a b", stdin=b"x\n" * 99) == (75, "sendmail -t a b\n" + "x\n" * 99, "")
    os.unlink(s.path)
    assert s.run(name="mailq") == (75, "sendmail -bp\n", "")
    dies = socket.socket(socket.AF_UNIX)  # one that hangs up in the middle of a message
    dies.bind(s.path)
    dies.listen()

    def hang_up() -> None:
        client, _ = dies.accept()
        client.sendall(b">")
        client.recv(1 << 16)
        client.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    message = b"%d\n" * 300000 % tuple(range(300000))
    assert s.run("a", stdin=message) == (75, "sendmail a\n" + message.decode(), "")
    thread.join()
    dies.close()


def test_standard_streams_may_be_closed(launch: Callable[..., Submit], relay: smtprelay.Relay, env: dict[str, str]) -> None:
    s = launch()
    launcher, program = f"{sys.executable} -I -S {s.launcher}", f"{sys.executable} {PROGRAM} sendmail"
    for command, status in [
        (f"{launcher} a >&- 2>&-", 0),
        (f"{launcher} -f x@- a 2>&-", 69),
        (f"{launcher} a <&-", 75),  # a mistake of the caller's, who meant to say something
        (f"{program} a <&- 2>&1", 75),
        (f"{program} -bs <&- 2>&1", 75),
        (f"{program} -bi <&-", 0),
        (f"{program} b </dev/null", 0),
    ]:
        said = run_command("sh", "-c", command, env=env, stdin=b"x\n", status=status)
        if status == 75:
            assert said in ("sendmail a\n", "smtprelay: sendmail: standard input is closed: there is nothing to send\n")
    assert [[r.address for r in m.recipients] for at in (s.relay, relay) for m, _ in mails(at)] == [["a@box.example"], ["b@box.example"]]


def test_half_a_message_is_none(launch: Callable[..., Submit]) -> None:
    s = launch()
    with s.connect("a") as sock:
        assert sock.recv(1) == b">"
        sock.sendall(b"00000002x\n")
    with s.connect("a") as sock:
        assert sock.recv(1) == b">"
        sock.sendall(b"00000002y\n00000000")
        assert sock.recv(10) == b"0\n"
    assert [content[-5:] for _, content in mails(s.relay)] == [b"\r\ny\r\n"]


@pytest.mark.parametrize("said", [b"", b"ffffffff", b"-0000001", b"00000004-bs\0", b"zzzzzzzz", b"7fffffffa\0"])
def test_nonsense_on_the_socket_is_hung_up_on(launch: Callable[..., Submit], said: bytes) -> None:
    s = launch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(s.path)
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        assert re.fullmatch(b"|>|64\nsendmail: .*\n", sock.recv(1000))
    assert s.run("-bi") == (0, "", "")


def test_a_slow_caller_holds_up_nobody_and_not_for_ever(launch: Callable[..., Submit]) -> None:
    s = launch(SMTP_COMMAND_TIMEOUT="0.3", SMTP_DATA_TIMEOUT="0.3")
    with s.connect("a") as slow:
        assert slow.recv(1) == b">"
        assert s.run("a", stdin=b"x\n") == (0, "", "")
        assert slow.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as mute:
        mute.settimeout(5)
        mute.connect(s.path)
        assert mute.recv(1) == b""


def test_the_launcher_costs_little_more_than_python(launch: Callable[..., Submit]) -> None:
    assert set(re.findall(r"(?m)^ *import (.*?) *(?:#.*)?$", smtprelay.LAUNCHER)) == {"os, sys, _socket"}
    assert smtprelay.SUBMIT_SOCKET in smtprelay.LAUNCHER and smtprelay.LAUNCHER.startswith("#!/usr/bin/python3 -IS\n")
    s = launch()
    spent = lambda: sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))  # noqa: E731
    nothing, mail = [math.inf], [math.inf]  # processor time, the relay's with it; whatever else the machine does
    while len(mail) < 50 and min(mail) >= 1.5 * min(nothing):
        started = spent()
        subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True)
        begun = spent()
        subprocess.run([sys.executable, "-I", "-S", str(s.launcher), "a"], input=b"x\n", check=True)
        nothing, mail = [*nothing, begun - started], [*mail, spent() - begun]
    print(f"launcher: {min(mail) / min(nothing):.2f} times an empty program")
    assert min(mail) < 2 * min(nothing)


@pytest.mark.parametrize("running", [True, False])
def test_sendmail_speaks_smtp_on_its_standard_streams(
    relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path, running: bool
) -> None:
    if not running:
        env = {**env, "SMTP_PORT": free_place(), "SMTP_SPOOL": str(tmp_path / "spool")}
    said = run_command(
        "sendmail",
        "-bs",
        env=env,
        stdin=b"EHLO me\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nX: y\r\n\r\nx\r\n.\r\nQUIT\r\n",
    )
    assert re.fullmatch(r"220 .*250 2.0.0 Ok: queued as \w+\r\n221 [^\n]*\n", said.replace("\r\r", "\r"), re.S), said
    ((record, content),) = mails(relay) if running else spooled(tmp_path / "spool")
    assert content == b"X: y\r\n\r\nx\r\n"


def the_only(relay: smtprelay.Relay) -> tuple[list[str], str, bytes]:
    ((record, content),) = mails(relay)
    return [r.address for r in record.recipients], record.reverse_path, content


def test_mutt(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "muttrc").write_text(
        f'set sendmail="{env["SENDMAIL"]} -oem -oi"\nset from=me@x.example\nset use_envelope_from=yes\nset copy=no\n'
    )
    words = f"-n -F {tmp_path}/muttrc -s Hello -b blind@d.example -- a@b.example".split()
    run_command(need("mutt"), *words, env=env, stdin="K\u00e4se\n".encode())
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "blind@d.example"}, "me@x.example")
    assert b"Subject: Hello\r\n" in content and b"blind" not in content


def test_s_nail(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    words = f"-n -S mta={env['SENDMAIL']} -s Hello -r me@x.example -c c@d.example a@b.example".split()
    run_command(need("s-nail"), *words, env=env, stdin=b"x\n.\ny\n")
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "c@d.example"}, "me@x.example")
    assert content.endswith(b"\r\n\r\nx\r\n.\r\ny\r\n")


def test_git_send_email(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    git = need("git")
    lacks = subprocess.run([need("perl"), "-MMail::Address", "-e1"], capture_output=True, env=env).returncode
    if lacks or subprocess.run([git, "send-email", "-h"], capture_output=True, env=env).returncode > 1:
        pytest.skip("git send-email is not installed")
    (tmp_path / "file").write_text("x\n")
    send = f"send-email --quiet --confirm=never --envelope-sender=bounce@x.example --smtp-server={env['SENDMAIL']} --to=a@b.example -1"
    for command in ("init -q .", "config user.name Me", "config user.email me@x.example",
                    "commit -q --allow-empty -m First", "add file", "commit -q -m Add\u00a0a\u00a0file", send):  # fmt: skip
        run_command(git, *[word.replace("\u00a0", " ") for word in command.split(" ")], env=env, cwd=tmp_path)
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "me@x.example"}, "bounce@x.example")
    assert b"Subject: [PATCH] Add a file\r\n" in content


def test_php_mail(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    script = r'var_dump(mail("a@b.example", "Hello", "one\r\n.\ntwo", "From: me@x.example\r\nBcc: blind@d.example", "-fbounce@x.example"));'
    assert "true" in run_command(need("php"), "-d", f"sendmail_path={env['SENDMAIL']} -t -i", "-r", script, env=env)
    to, sender, content = the_only(relay)
    assert (to, sender) == (["a@b.example", "blind@d.example"], "bounce@x.example")
    assert content.endswith(b"\r\n\r\none\r\n.\r\ntwo\r\n") and b"blind" not in content


def test_cron(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    job = "From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@box> backup\nContent-Type: text/plain; charset=UTF-8\n\ndone\n"
    run_command("sh", "-c", f"printf '{job}' | {env['SENDMAIL']} -FCronDaemon -i -B8BITMIME -oem root", env=env)
    to, sender, content = the_only(relay)
    assert (to, sender) == (["root@box.example"], f"{ME}@box.example")
    assert b"From: Cron Daemon <root@box.example>\r\nTo: root@box.example\r\n" in content


def test_django(relay: smtprelay.Relay) -> None:
    pytest.importorskip("django")
    script = """
import sys
from django.conf import settings
settings.configure(EMAIL_HOST="127.0.0.1", EMAIL_PORT=int(sys.argv[1]), DEFAULT_CHARSET="utf-8")
from django.core.mail import EmailMultiAlternatives
mail = EmailMultiAlternatives("Gr\\u00fc\\u00dfe", "text", "Me <me@x.example>", ["a@b.example"], bcc=["blind@d.example"])
mail.attach_alternative("<b>html</b>", "text/html")
assert mail.send() == 1
"""
    run_command(sys.executable, "-c", script, str(relay.port), env=clean_env())
    to, sender, content = the_only(relay)
    assert (to, sender) == (["a@b.example", "blind@d.example"], "me@x.example")
    assert b"<b>html</b>" in content and b"blind" not in content


def test_flask_mail(relay: smtprelay.Relay) -> None:
    pytest.importorskip("flask_mail")
    script = """
import sys
from flask import Flask
from flask_mail import Mail, Message
app = Flask("app")
app.config.update(MAIL_SERVER="127.0.0.1", MAIL_PORT=int(sys.argv[1]), MAIL_DEFAULT_SENDER="me@x.example")
with app.app_context():
    Mail(app).send(Message("Hello", ["a@b.example"], "text", bcc=["blind@d.example"]))
"""
    run_command(sys.executable, "-c", script, str(relay.port), env=clean_env())
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "blind@d.example"}, "me@x.example")
    assert b"Subject: Hello\r\n" in content and b"blind" not in content


# === RELAY ===================================================================


def need(program: str) -> str:
    """Return where a program is; skip the test when it is nowhere."""
    path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/usr/lib/postfix/sbin")
    return path or pytest.skip(f"{program} is not installed")


def test_what_nobody_has_read_is_summed_up_once_it_is_quiet(start: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(smtprelay, "SWEEP_EVERY", 0.02)
    monkeypatch.setattr(smtprelay, "CALM_TIME", 0.05)
    relay = start()
    said(relay, MAIL, MAIL, MAIL)
    wait_until(lambda: len(relay.delivering.inbox.after()) == 3)
    wait_until(lambda: all(entry.packed for entry in relay.delivering.inbox.after()))


def test_start_reads_no_environment_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SMTP_BANNER", "from the environment")
    monkeypatch.chdir(tmp_path)
    before = set(threading.enumerate())
    settings = {**QUICK, "SMTP_STORAGE": "memory"}
    with smtprelay.start(**settings) as one, smtprelay.start(**settings) as two:
        assert one.port != two.port
        with dial(one) as client:
            assert client.greeting.startswith("220 relay.test") and "environment" not in client.greeting
        said(two)
        assert (metric(one, "smtp_messages_received_total"), metric(two, "smtp_messages_received_total")) == (0, 1)
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        socket.create_connection((one.host, one.port), 1).close()


def test_a_stop_waits_for_nobody_longer_than_its_patience(
    program: Callable[..., Program], hop: Callable[..., FakeHop]
) -> None:
    relay = program(**hop(script={"end": "hang"}).settings())
    relay.stop()
    impatient = "for h in (smtprelay.Receiving, smtprelay.Delivering): h.stop.__defaults__ = (0.4,)"
    relay.code = ONE_LINER.replace("; sys.exit", f"\n{impatient}\nsys.exit")
    relay.start()
    said(relay)
    with hello(relay) as inside, hello(relay) as idle:
        inside.envelope()
        inside.ask("DATA", "354")
        began = time.monotonic()
        relay.process.send_signal(signal.SIGTERM)
        assert idle.reply().startswith("421 4.3.2")
        inside.sock.settimeout(11)
        assert inside.reply()[:3] in ("421", "")
    assert relay.process.wait(11) == 0
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_relay_stops_at_once(program: Callable[..., Program], number: int) -> None:
    relay = program()
    with hello(relay) as idle:
        began = time.monotonic()
        relay.process.send_signal(number)
        assert idle.reply().startswith("421 4.3.2") and idle.closed()
    assert (relay.process.wait(11), time.monotonic() - began < 2) == (0, True)


def test_a_stop_finishes_a_message_in_hand(program: Callable[..., Program]) -> None:
    relay = program()
    with hello(relay) as client:
        client.envelope()
        client.ask("DATA", "354")
        client.send(b"Subject: x\r\n")
        relay.process.send_signal(signal.SIGTERM)
        wait_until(lambda: refuses(relay))
        client.send(b"\r\nx\r\n.\r\n")
        assert client.reply().startswith("250 2.0.0")
    assert relay.process.wait(11) == 0
    assert len(relay.spool.files("*.eml")) == 1


def refuses(relay: Program) -> bool:
    """Tell whether nobody listens any more."""
    try:
        with Dialogue((relay.host, relay.port), 0.3) as client:
            return not client.greeting.startswith("220")
    except OSError:
        return True


def test_sighup_reopens_the_log_file(program: Callable[..., Program], tmp_path: Path) -> None:
    log, old = tmp_path / "relay.log", tmp_path / "relay.log.1"
    relay = program(SMTP_LOG_FILE=str(log))
    said(relay)
    wait_until(log.exists)
    log.rename(old)
    relay.process.send_signal(signal.SIGHUP)
    wait_until(lambda: said(relay) and log.exists())
    [queue_id] = said(relay)
    wait_until(lambda: queue_id in log.read_text())
    assert queue_id not in old.read_text()


def test_systemd_is_told(program: Callable[..., Program], tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(tmp_path / "n"))
        notify.settimeout(8)
        relay = program(NOTIFY_SOCKET=str(tmp_path / "n"))
        assert b"READY=1" in notify.recv(1000)
        relay.process.send_signal(signal.SIGTERM)
        assert b"STOPPING=1" in notify.recv(1000)
    assert relay.process.wait(11) == 0


def test_sockets_from_systemd_are_used(program: Callable[..., Program], tmp_path: Path) -> None:
    relay = program()
    relay.stop()
    with socket.create_server(("127.0.0.1", 0)) as given, socket.socket(socket.AF_UNIX) as submit:
        submit.bind(str(tmp_path / "submit.sock"))
        submit.listen()
        code = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='smtp:submit');"
            "os.execv(sys.executable, [sys.executable, sys.argv[3]])"
        )
        fds = given.fileno(), submit.fileno()
        command = [sys.executable, "-c", code, *map(str, fds), str(PROGRAM)]
        env = {"PATH": os.environ["PATH"], **relay.env}
        with relay.output.open("wb") as output:
            relay.process = subprocess.Popen(command, env=env, stdout=output, stderr=output, pass_fds=fds)
        wait_until(relay.ready)
        relay.port = given.getsockname()[1]
    said(relay)
    with dial(relay) as client:
        assert client.greeting.startswith("220 relay.test")
    launcher = tmp_path / "launcher"
    launcher.write_text(smtprelay.LAUNCHER.replace(smtprelay.SUBMIT_SOCKET, str(tmp_path / "submit.sock")))
    run_command(sys.executable, "-I", "-S", str(launcher), "bob", env={}, stdin=b"Subject: by the launcher\n\nx\n")
    wait_until(lambda: re.search(f"client=local .*helo={ME} ", relay.log()))


def load(relay: Program, acknowledged: set[str], stop: threading.Event, name: str) -> None:
    """Send numbered messages until told to stop; keep the numbers that got their 250."""
    number = 0
    while not stop.is_set():
        with contextlib.suppress(OSError, AssertionError), hello(relay) as client:
            while not stop.is_set():
                number += 1
                if client.mail(b"Subject: %s-%d-\r\n\r\nx\r\n" % (name.encode(), number)).startswith("250 2.0.0"):
                    acknowledged.add(f"{name}-{number}-")
        stop.wait(0.02)


LETTER = (
    b"From: ann@client.test\nTo: bob@hop.test\nSubject: gr\xc3\xbc\xc3\x9fe\n\n.\n..\nbody \xe2\x82\xac\n"
    + b"y" * 900
    + b"\n"
)


def by_curl(relay: Any, letter: Path) -> None:
    command = [
        need("curl"),
        "-sS",
        "--crlf",
        f"smtp://127.0.0.1:{relay.port}/client.test",
        "--mail-from",
        "ann@client.test",
    ]
    subprocess.run([*command, "--mail-rcpt", "bob@hop.test", "-T", str(letter)], check=True, timeout=20)


def by_swaks(relay: Any, letter: Path) -> None:
    command = [
        need("swaks"),
        "--server",
        f"127.0.0.1:{relay.port}",
        "--from",
        "ann@client.test",
        "--to",
        "bob@hop.test",
        "--pipeline",
    ]
    subprocess.run([*command, "--data", f"@{letter}"], check=True, capture_output=True, timeout=20)


def by_smtplib(relay: Any, letter: Path) -> None:
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.sendmail(
            "ann@client.test", ["bob@hop.test"], letter.read_bytes().replace(b"\n", b"\r\n"), ["BODY=8BITMIME"]
        )


@pytest.mark.parametrize("client", [by_curl, by_swaks, by_smtplib])
def test_real_clients(holding: Any, held: Spool, tmp_path: Path, client: Callable[[Any, Path], None]) -> None:
    known = {record["id"] for record in held.records()}
    letter = tmp_path / "letter"
    letter.write_bytes(LETTER)
    client(holding, letter)
    [queue_id] = wait_until(lambda: {record["id"] for record in held.records()} - known)
    assert held.content(queue_id).rstrip() == LETTER.replace(b"\n", b"\r\n").rstrip()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def free_place() -> str:
    return f"127.0.0.1:{free_port()}"


def answers(port: int) -> bool:
    try:
        with Dialogue(("127.0.0.1", port), 1) as client:
            return client.greeting.startswith("220")
    except OSError:
        return False


def test_forwarding_into_smtp_sink(start: Callable[..., Any], tmp_path: Path) -> None:
    port = free_port()
    command = [need("smtp-sink"), "-u", "nobody", "-d", "%S.", f"127.0.0.1:{port}", "100"]
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    sink = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port))
        relay = start(SMTP_RELAY_HOST=f"127.0.0.1:{port}", SMTP_RELAY_TLS="none")
        said(relay, *[MAIL] * 20)
        wait_until(lambda: metric(relay, "smtp_messages_delivered_total") == 20)
        dumps = wait_until(
            lambda: [p.read_bytes() for p in tmp_path.glob("[0-9]*.*") if b"One line." in p.read_bytes()]
        )
        assert len(dumps) == 20
    finally:
        sink.kill()
        sink.wait()


def test_forwarding_into_postfix(start: Callable[..., Any], postfix: tuple[str, int, str]) -> None:
    host, port, top = postfix
    before = set(delivered(top))
    relay = start(SMTP_RELAY_HOST=f"{host}:{port}", SMTP_RELAY_TLS="none")
    said(relay, *[LETTER.replace(b"\n", b"\r\n")] * 10, to=("bob@x.test",))
    wait_until(lambda: len(set(delivered(top)) - before) == 10)
    assert all(content.endswith(LETTER) for content in set(delivered(top)) - before)
    assert wait_until(lambda: metric(relay, "smtp_messages_delivered_total") == 10)


def test_forwarding_into_a_second_smtprelay(program: Callable[..., Program]) -> None:
    last = program()
    first = program(SMTP_RELAY_HOST=f"127.0.0.1:{last.port}", SMTP_HOSTNAME="first.test")
    content = b"".join(name + b": x\r\n" for name in (b"Subject", b"X-Envelope-To")) + b"\r\n.\r\n\x00\xff\r\n"
    said(first, *[content] * 5, to=("bob@hop.test", '"c d"@hop.test'))
    wait_until(lambda: [len(relay.spool.files("*.eml")) for relay in (first, last)] == [5, 5])
    wait_until(lambda: {record["status"] for record in first.spool.records()} == {"forwarded"})
    stored = last.spool.content().split(b"\r\n", 1)[0]
    assert stored.startswith(b"Received: from client.test")
    assert last.spool.content().endswith(content)
    assert last.spool.known()["helo"] == "first.test"


# -- each mechanism in each TLS mode, by programs that people use --

WORD = "Kennwort & Co"
TLS_MODES = ["clear", "starttls", "tls"]
METHODS = ["PLAIN", "LOGIN", "CRAM-MD5"]


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory, pair: str) -> Iterator[Any]:
    """A relay with one account and every mechanism, in clear, with STARTTLS, and on a TLS port."""
    settings = {
        **QUICK,
        "SMTP_STORAGE": "memory",
        "SMTP_TLS_CERT": pair,
        "SMTP_TLS_KEY": pair,
        "SMTP_SMTPS_PORT": "127.0.0.1:0",
        "SMTP_AUTH_USER": "ann",
        "SMTP_AUTH_PASSWORD": WORD,
        "SMTP_AUTH_FAILURES": "1000",
    }
    with smtprelay.start(**settings) as relay:
        yield relay


def door(relay: Any, mode: str) -> int:
    return int(relay.parts.smtps[0].getsockname()[1] if mode == "tls" else relay.port)


def login_by_curl(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    (home / "letter").write_text("Subject: x\r\n\r\nx\r\n")
    scheme = "smtps" if mode == "tls" else "smtp"
    command = [
        need("curl"),
        "-sS",
        f"{scheme}://127.0.0.1:{door(relay, mode)}",
        "--cacert",
        pair,
        "--user",
        f"ann:{word}",
        "--login-options",
        f"AUTH={method}",
        "--mail-from",
        "a@b.test",
        "--mail-rcpt",
        "c@d.test",
        "-T",
        str(home / "letter"),
    ]
    return subprocess.run(command + ["--ssl-reqd"] * (mode == "starttls"), capture_output=True, timeout=20).returncode


def login_by_swaks(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    tls = {"clear": [], "starttls": ["-tls"], "tls": ["--tls-on-connect"]}[mode]
    command = [need("swaks"), "--server", f"127.0.0.1:{door(relay, mode)}", "--from", "a@b.test", "--to", "c@d.test",
               "--auth", method, "--auth-user", "ann", "--auth-password", word, *tls]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if "not available" in done.stdout + done.stderr:
        pytest.skip("swaks lacks a Perl module: " + done.stderr.strip()[-100:])
    return done.returncode


def login_by_msmtp(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    tls = {"clear": "tls off", "starttls": "tls on\ntls_starttls on", "tls": "tls on\ntls_starttls off"}[mode]
    config = home / "msmtprc"
    config.write_text(
        f"account default\nhost 127.0.0.1\nport {door(relay, mode)}\nfrom a@b.test\nauth {method.lower()}\nuser ann\n"
        f'passwordeval "cat {home}/word"\n{tls}\n' + ("" if mode == "clear" else f"tls_trust_file {pair}\n")
    )
    config.chmod(0o600)
    (home / "word").write_text(word + "\n")
    command = [need("msmtp"), "-C", str(config), "c@d.test"]
    return subprocess.run(command, input=b"Subject: x\n\nx\n", capture_output=True, timeout=20).returncode


def login_by_smtplib(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    context = smtprelay.client_context(pair)
    port = door(relay, mode)
    with (
        smtplib.SMTP_SSL("127.0.0.1", port, context=context)
        if mode == "tls"
        else smtplib.SMTP("127.0.0.1", port) as client
    ):
        if mode == "starttls":
            client.starttls(context=context)
        client.ehlo()
        client.user, client.password = "ann", word
        try:
            client.auth(method, getattr(client, "auth_" + method.lower().replace("-", "_")))
        except smtplib.SMTPAuthenticationError as e:
            return e.smtp_code
        client.sendmail("a@b.test", ["c@d.test"], b"Subject: x\r\n\r\nx\r\n")
    return 0


NODE = """
const nodemailer = require('nodemailer');
const [cases, ca] = [JSON.parse(process.argv[1]), require('fs').readFileSync(process.argv[2])];
(async () => { for (const c of cases) {
  const t = nodemailer.createTransport({host: '127.0.0.1', port: c.port, secure: c.mode === 'tls', ignoreTLS: c.mode === 'clear',
    requireTLS: c.mode === 'starttls', tls: {ca}, authMethod: c.method, auth: {user: 'ann', pass: c.word}});
  try { await t.sendMail({from: 'a@b.test', to: 'c@d.test', subject: 'x', text: 'x'}); console.log(0); }
  catch (e) { console.log(e.responseCode || e.message); }
} })();
"""


@pytest.mark.parametrize("client", [login_by_curl, login_by_swaks, login_by_msmtp, login_by_smtplib])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", TLS_MODES)
def test_each_mechanism_in_each_mode(
    open_house: Any, pair: str, tmp_path: Path, client: Any, method: str, mode: str
) -> None:
    before = metric(open_house, "smtp_messages_received_total")
    assert client(open_house, pair, mode, method, WORD, tmp_path) == 0
    assert metric(open_house, "smtp_messages_received_total") == before + 1


@pytest.mark.parametrize("client", [login_by_curl, login_by_swaks, login_by_msmtp, login_by_smtplib])
def test_each_client_understands_a_refused_login(open_house: Any, pair: str, tmp_path: Path, client: Any) -> None:
    before = metric(open_house, "smtp_auth_attempts_total")["failure"]
    assert client(open_house, pair, "starttls", "PLAIN", "falsch", tmp_path) != 0
    assert metric(open_house, "smtp_auth_attempts_total")["failure"] > before


def test_nodemailer(open_house: Any, pair: str) -> None:
    modules = next(
        (str(p / ".ci/node_modules") for p in Path(__file__).resolve().parents if (p / ".ci/node_modules").is_dir()),
        os.environ.get("NODE_PATH", ""),
    )
    if not (Path(modules) / "nodemailer").is_dir():
        pytest.skip("nodemailer is not installed (npm ci in .ci)")
    cases = [
        {"mode": mode, "port": door(open_house, mode), "method": method, "word": word}
        for mode in TLS_MODES
        for method, word in [*((m, WORD) for m in METHODS), ("PLAIN", "falsch")]
    ]
    done = subprocess.run([need("node"), "-e", NODE, json.dumps(cases), pair], env={**os.environ, "NODE_PATH": modules},
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.stdout.split() == ["0", "0", "0", "535"] * 3, (done.stdout, done.stderr)


@pytest.mark.parametrize("mode", ["starttls", "tls"])
def test_openssl_s_client(open_house: Any, pair: str, mode: str) -> None:
    how = ["-starttls", "smtp"] if mode == "starttls" else []
    talk = subprocess.run(
        [
            need("openssl"),
            "s_client",
            "-connect",
            f"127.0.0.1:{door(open_house, mode)}",
            *how,
            "-CAfile",
            pair,
            "-verify_return_error",
            "-verify_hostname",
            "relay.example",
            "-crlf",
            "-quiet",
        ],
        input="EHLO x\nQUIT\n",
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "250-ENHANCEDSTATUSCODES" in talk.stdout and "221 2.0.0" in talk.stdout
    assert "STARTTLS" not in talk.stdout and "AUTH PLAIN" in talk.stdout


def test_what_was_found_and_then_announced_is_sent_once(start: Any, hop: Any) -> None:
    h = hop()
    relay = relaying_in_review(start, h)
    d = relay.delivering
    stem = spooled_in_review(d.spool)
    d.find()  # as after an overflow of the Link, or another's sendmail
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED)
    relay.parts.link.announce(stem)
    last = said(relay)[0]
    d.catch_up()
    wait_until(lambda: status(relay, d.inbox.entry(last).stem) is smtprelay.Status.FORWARDED)
    assert len(h.messages) == 2


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_after_an_attempt_repeats_no_delivery(start: Any, hop: Any, error: Exception, monkeypatch: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h)
    count = relay.delivering.reception.quotas.count
    bugs = [error]

    def stumbling(*given: Any) -> None:
        if bugs:
            raise bugs.pop()
        count(*given)

    monkeypatch.setattr(relay.delivering.reception.quotas, "count", stumbling)
    with hello(relay) as client:
        client.mail(MAIL, "ann@client.test", "bob@hop.test", "no@hop.test")
    wait_until(lambda: [status(relay, s) for s, _ in relay.delivering.spool.names()] == [smtprelay.Status.FAILED])
    assert h.delivered()["bob@hop.test"] == 1


def test_a_bug_in_a_report_does_not_repeat_the_delivery(start: Any, hop: Any, monkeypatch: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1")

    def stumble(*given: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(smtprelay, "build_report", stumble)
    with hello(relay) as client:
        client.mail(MAIL, "ann@client.test", "bob@hop.test", "no@hop.test")
    wait_until(lambda: [status(relay, s) for s, _ in relay.delivering.spool.names()] == [smtprelay.Status.FAILED])
    assert h.delivered()["bob@hop.test"] == 1


def test_what_was_released_is_not_too_old(start: Any, hop: Any) -> None:
    h = hop(script={"end": ["450 4.2.0 later"]})
    relay = start(SMTP_DELIVERY="hold", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    stem = spooled_in_review(d.spool, flags=("HOLD",), id=aged_id(20 * DAY))
    d.find()
    wait_until(lambda: stem in d.held)
    assert relay.release() == 1
    wait_until(lambda: status(relay, stem) in (smtprelay.Status.FORWARDED, smtprelay.Status.FAILED))
    assert status(relay, stem) is smtprelay.Status.FORWARDED and len(h.refused) == 1


def test_what_was_released_waits_for_a_dead_host(start: Any, hop: Any) -> None:
    h = hop(listen=False)
    relay = start(SMTP_DELIVERY="hold", SMTP_RETRY_INITIAL_DELAY="5s", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    stem = spooled_in_review(d.spool, flags=("HOLD",), id=aged_id(20 * DAY))
    d.find()
    wait_until(lambda: stem in d.held)
    relay.release()
    wait_until(lambda: d.metrics.get("smtp_messages_deferred_total") > 0)
    time.sleep(0.05)
    assert d.metrics.get("smtp_delivery_failures_total") < 5  # it does not go round and round
    assert status(relay, stem) is smtprelay.Status.RETRYING


def test_a_copy_released_where_mail_is_held_is_sent_and_counted(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_DELIVERY="hold", SMTP_RELAY_ALLOWED_RECIPIENTS="nobody", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    queue_id = said(relay)[0]
    d.catch_up()
    relay.delivering.release(queue_id, ["carl@hop.test"], beyond=True)
    wait_until(lambda: h.delivered()["carl@hop.test"] == 1)
    wait_until(lambda: d.metrics.get("smtp_queue_depth") == 0)


def test_a_link_that_overflowed_in_hold_mode_leaves_the_depth_alone(start: Any) -> None:
    relay = start()
    d = relay.delivering
    stem = spooled_in_review(d.spool, flags=("HOLD",))
    relay.parts.link.announce(smtprelay.LOOK)
    wait_until(lambda: stem in d.held and d.metrics.get("smtp_queue_depth") == 0)
    hours = sum(n for (_, kind), n in d.hours.items() if kind == "received")
    d.find()
    assert sum(n for (_, kind), n in d.hours.items() if kind == "received") == hours
    assert len(d.scheduler) == 0  # what is held is not read again


def test_a_message_is_released_once(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_DELIVERY="hold", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    queue_id = said(relay)[0]
    d.catch_up()
    stem = d.inbox.entry(queue_id).stem
    assert d.scheduler.seize(stem)
    for change in (lambda: relay.delivering.release(queue_id, []), lambda: relay.delivering.remove([queue_id])):
        with pytest.raises(smtprelay.HttpError, match="just now"):
            change()
    d.scheduler.done(stem)
    relay.delivering.release(queue_id, [])
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED)
    wait_until(lambda: d.metrics.get("owed_bytes") == 0)
    assert len(h.messages) == 1


def test_what_is_held_back_says_why_and_is_counted(start: Any, hop: Any) -> None:
    relay = relaying_in_review(start, hop(), SMTP_RELAY_ALLOWED_RECIPIENTS="@hop.test$")
    said(relay, to=("bob@else.test",))
    (entry,) = wait_until(lambda: relay.delivering.queue()["held"])
    assert entry["reason"] == "not among SMTP_RELAY_ALLOWED_RECIPIENTS"
    wait_until(lambda: metric(relay, "smtp_messages_held") == 1)
    relay.delivering.retry("held")
    wait_until(lambda: metric(relay, "smtp_messages_held") == 0)


def test_a_copy_goes_beyond_the_allowed_recipients_only_when_told_to(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_DELIVERY="hold", SMTP_RELAY_ALLOWED_RECIPIENTS="^dan", **h.settings(SMTP_RELAY_TLS="none"))
    id, delivering = said_stem(relay)[11:27], relay.delivering
    assert delivering.queue()["held"][0]["reason"] == "SMTP_DELIVERY is hold"
    status, answer, *_ = api(relay, "POST", f"/api/v1/message/{id}/release", {"To": ["eve@hop.test", "dan@hop.test"]})
    assert status == 400 and "eve@hop.test" in str(answer) and "dan@hop.test" not in str(answer)
    delivering.release(id, ["dan@hop.test"])
    given = {"To": ["eve@hop.test"], "Beyond": True}
    assert api(relay, "POST", f"/api/v1/message/{id}/release", given)[0] == 200
    wait_until(lambda: h.delivered() == {"dan@hop.test": 1, "eve@hop.test": 1})


def test_the_queue_verbs_mean_the_same_without_a_running_relay(start: Any, hop: Any, tmp_path: Path) -> None:
    h = hop()
    environ = {**QUICK, "SMTP_SPOOL": str(tmp_path / "spool"), "SMTP_HEALTH_ADDR": "off", "SMTP_DELIVERY": "mx"}
    spool = smtprelay.Spool(settings(**environ), smtprelay.Log(logging.getLogger("none")))
    spool.open()
    held, again, failed, gone = (spooled_in_review(spool, flags=("HOLD",) * (n == 0)) for n in range(4))
    for stem in (again, failed):
        message = spool.load(stem)
        message.move(smtprelay.Status.FORWARDING)
        message.move(smtprelay.Status.RETRYING if stem == again else smtprelay.Status.FAILED, "later")
        message.recipients[0].status = message.status
        message.next_attempt_at = smtprelay.iso_time(time.time() + 3600)
        spool.save(message)
    spool.close()
    shown = verb(environ, "queue")
    assert "SMTP_DELIVERY is hold" in shown and "due in" in shown and "3 messages" in shown
    verb(environ, "retry", "all")
    assert "due in" not in verb(environ, "queue")
    for words in (["retry", failed[11:27]], ["retry", "all", "--held"], ["remove", gone[11:27]]):
        verb(environ, *words)
    verb(environ, "remove", gone[11:27], status=1)
    start(**h.settings(SMTP_RELAY_TLS="none", SMTP_SPOOL=environ["SMTP_SPOOL"], SMTP_DELIVERY="relay"))
    wait_until(lambda: len(h.messages) == 3)
    assert not (tmp_path / "spool" / f"{gone}.eml").exists()


def in_queue(relay: Any) -> list[Any]:
    """Return what the queue shows: the reason and whether a time is named, for each message."""
    queue = relay.delivering.queue()
    return [(entry["reason"], bool(entry["next_attempt_at"])) for entry in queue["messages"]]


def test_all_that_waits_for_a_dead_next_hop_says_so(start: Any, hop: Any) -> None:
    relay = relaying_in_review(start, hop(listen=False), SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h")
    said(relay, MAIL, MAIL, MAIL)
    shown = wait_until(lambda: len(found := in_queue(relay)) == 3 and all(r for r, _ in found) and found)
    assert all("cannot connect" in reason and due for reason, due in shown), shown


def test_one_who_failed_is_reported_though_another_is_held_back(start: Any, hop: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1", SMTP_RELAY_ALLOWED_RECIPIENTS="^(no|ann)@")
    said(relay, to=("no@hop.test", "held@hop.test"))
    wait_until(lambda: h.delivered() == {"ann@client.test": 1})
    assert len(relay.delivering.held) == 1


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), smtprelay.Refused(smtprelay.SPOOL_FULL)])
def test_a_report_that_the_disk_does_not_take_is_owed(
    start: Any, hop: Any, error: Exception, monkeypatch: Any
) -> None:
    monkeypatch.setattr(smtprelay, "WRITE_AGAIN", 0.05)
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1", SMTP_SPOOL_MAX_MESSAGES="100")
    full = mock.patch.object(relay.delivering.reception, "admit", side_effect=error)
    with full:
        said(relay, to=("no@hop.test",))
        ((reason, is_due),) = wait_until(lambda: [m for m in in_queue(relay) if m[0].startswith("the report")])
        assert str(error) in reason and is_due
        wait_until(lambda: metric(relay, "smtp_messages_failed_total") == 1)
        assert metric(relay, "smtp_queue_depth") == 1
    wait_until(lambda: h.delivered() == {"ann@client.test": 1})
    wait_until(lambda: metric(relay, "smtp_queue_depth") == 0)
    assert metric(relay, "smtp_messages_failed_total") == 1


def test_a_report_that_was_owed_is_sent_after_a_restart(start: Any, hop: Any, tmp_path: Path) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    given = h.settings(SMTP_RELAY_TLS="none", SMTP_SPOOL=str(tmp_path / "s"), SMTP_DELIVERY="relay", SMTP_BOUNCE="1")
    relay = start(**given)
    with mock.patch.object(relay.delivering.reception, "admit", side_effect=OSError(errno.ENOSPC, "full")):
        said(relay, to=("no@hop.test",))
        wait_until(lambda: [m for m in in_queue(relay) if m[0].startswith("the report")])
        relay.stop()
    start(**given)
    wait_until(lambda: h.delivered() == {"ann@client.test": 1})


def test_a_full_queue_has_room_for_the_report_on_what_is_in_it(start: Any, hop: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1", SMTP_QUEUE_SIZE="1")
    said(relay, to=("no@hop.test",))
    wait_until(lambda: h.delivered() == {"ann@client.test": 1} and metric(relay, "smtp_queue_depth") == 0)


def test_failures_past_the_cap_of_reports_go_into_one_report_later(start: Any, hop: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(smtprelay, "REPORTS_AN_HOUR", 1)
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1")
    ids = said(relay, *[MAIL] * 4, to=("no@hop.test",))
    wait_until(lambda: in_queue(relay) == [(smtprelay.REPORTS_PUT_OFF, True)] * 3)
    wait_until(lambda: metric(relay, "smtp_messages_failed_total") == 4 and len(h.messages) == 1)
    relay.delivering.reports.take("", 1 / 60, 1, -1)  # an hour later
    relay.delivering.scheduler.flush()
    wait_until(lambda: h.delivered() == {"ann@client.test": 2} and metric(relay, "smtp_queue_depth") == 0)
    told = h.messages[-1].content.decode()
    assert told.count("Final-Recipient: rfc822; no@hop.test") == 3
    assert sum(id in re.sub(r"\s+", " ", told) for id in ids) == 3


LONG_LINE = "y" * 78 + "\r\n"
LONG_FIELD = "X-Long: " + LONG_LINE[8:]


@pytest.mark.parametrize(
    ("head", "body", "kept"),
    [(0, 80, ["message/rfc822"]), (0, 7000, ["text/rfc822-headers"]), (7000, 80, [])],
)
def test_a_report_is_made_to_fit_the_largest_size(start: Any, hop: Any, head: int, body: int, kept: list[str]) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1", SMTP_MAX_SIZE="8K")
    mail = f"Subject: hi\r\n{head // 80 * LONG_FIELD}\r\n{body // 80 * LONG_LINE}"
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.sendmail("ann@client.test", "no@hop.test", mail, ["RET=FULL"])
    wait_until(lambda: h.messages and metric(relay, "smtp_queue_depth") == 0)
    kinds = [part.get_content_type() for part in parse(h.messages[0].content).iter_parts()]
    assert kinds == ["text/plain", "message/delivery-status", *kept]
    assert b"who?" in h.messages[0].content


def test_a_report_that_can_never_fit_is_given_up(start: Any, hop: Any, log: Caught) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying_in_review(start, h, SMTP_BOUNCE="1", SMTP_MAX_SIZE="1K")
    said(relay, to=("no@hop.test",))
    wait_until(lambda: relay.delivering.finished)
    (stem,) = relay.delivering.finished
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FAILED and metric(relay, "smtp_queue_depth") == 0)
    assert any("report_failed" in line for line in log.lines) and not relay.delivering.spool.load(stem).owed


def test_whatever_an_attempt_raises_age_is_judged_and_the_reason_recorded(
    start: Any, hop: Any, monkeypatch: Any, log: Caught
) -> None:
    relay = relaying_in_review(start, hop(), SMTP_RETRY_MAX_AGE="0.5s", SMTP_RETRY_MAX_DELAY="0.1s")
    monkeypatch.setattr(relay.delivering.delivery, "attempt", mock.Mock(side_effect=ValueError("SIZE ²")))
    stem = said_stem(relay)
    wait_until(lambda: "SIZE ²" in relay.delivering.spool.load(stem).last_error)
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FAILED)
    wait_until(lambda: relay.delivering.spool.load(stem).attempts > 1)


def test_a_file_that_cannot_be_opened_for_now_puts_its_message_off_for_a_moment(
    start: Any, hop: Any, monkeypatch: Any
) -> None:
    h = hop()
    relay = relaying_in_review(start, h, SMTP_RETRY_MAX_DELAY="1h", SMTP_RETRY_INITIAL_DELAY="0.3s")
    fetch, few = relay.delivering.spool.fetch, [OSError(errno.EMFILE, "Too many open files")] * 2
    shown: list[Any] = []

    def stumbling(stem: str, **only: Any) -> Any:  # `only`: for the record alone
        if few and not only:
            raise few.pop()
        shown.extend(in_queue(relay) if not only else ())
        return fetch(stem, **only)

    monkeypatch.setattr(relay.delivering.spool, "fetch", stumbling)
    said(relay)
    wait_until(lambda: h.messages)
    assert shown == [("trouble here: [Errno 24] Too many open files", True)]
    wait_until(lambda: not relay.delivering.stumbles)


def test_421_for_one_message_is_its_own_trouble(start: Any, hop: Any) -> None:
    h = hop(script={"rcpt bad@hop.test": "drop 421 4.3.2 not now"})
    relay = relaying_in_review(start, h, SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h")
    (bad,) = said(relay, to=("bad@hop.test",))
    said(relay, *[MAIL] * 5)
    wait_until(lambda: len(h.messages) == 5)
    message = wait_until(lambda: (m := relay.delivering.load(bad)).attempts and m)
    assert message.attempts == 1
    assert not any(lane.steps for lane in relay.delivering.scheduler.lanes.values())


def test_a_host_that_says_421_to_all_is_throttled(start: Any, hop: Any, log: Caught) -> None:
    h = hop(script={"mail": "drop 421 4.3.2 not now"})
    relay = relaying_in_review(start, h, SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h")
    said(relay, *[MAIL] * 12)
    wait_until(lambda: any("next_hop_throttled" in line for line in log.lines))
    relay.delivering.catch_up()
    tried = [m.attempts for m in relay.delivering.records(relay.delivering.scheduler.snapshot(99)[0])]
    assert len(tried) == 12 and sum(tried) <= 8


def test_after_a_lost_answer_the_waits_grow(start: Any, hop: Any) -> None:
    h = hop(script={"end": ["take"] * 4})
    relay = relaying_in_review(start, h, SMTP_RETRY_INITIAL_DELAY="0.02s", SMTP_RETRY_MAX_DELAY="1h", SMTP_RETRY_JITTER="0")
    stem = said_stem(relay)
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED)
    history = relay.delivering.spool.load(stem).history
    tried = [smtprelay.unix_time(entry["at"]) for entry in history if entry["status"] == "forwarding"]
    waits = [b - a for a, b in zip(tried, tried[1:])]
    assert all(wait >= 0.018 * 2**n for n, wait in enumerate(waits)) and len(waits) >= 3, history


def test_a_crowded_next_hop_costs_no_attempt_and_one_log_line(start: Any, hop: Any, log: Caught, monkeypatch: Any) -> None:
    h = hop()
    relay = relaying_in_review(start, h)
    monkeypatch.setattr(smtprelay, "CROWDED_PAUSE", 0.02)
    attempt, crowded = relay.delivering.delivery.attempt, [smtprelay.Attempt({}, None, [], True)] * 3
    monkeypatch.setattr(relay.delivering.delivery, "attempt", lambda *a: crowded.pop() if crowded else attempt(*a))
    stem = said_stem(relay)
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED)
    assert relay.delivering.spool.load(stem).attempts == 1
    assert sum("next_hop_crowded" in line for line in log.lines) == 1, log.lines


def test_a_link_that_was_full_has_the_spool_looked_through() -> None:
    link = smtprelay.Link()
    said = 0
    while link.announce(STEM):
        said += 1
    heard: list[str] = []
    while heard.count(STEM) < said:
        heard += link.read() or []
    assert smtprelay.LOOK in heard and said > 300
    link.writer.close()


def test_who_is_not_heard_is_not_let_in_past_a_limit(start: Any) -> None:
    relay = start(SMTP_QUEUE_SIZE="5", SMTP_DELIVERY="relay", SMTP_RELAY_HOST=free_place())
    reception = relay.receiving.reception
    assert reception.has_room(1)
    reception.announce = lambda stem, owed: False
    said(relay)
    assert not reception.has_room(1)
    reception.unheard_until = 0.0
    assert reception.has_room(1)


def test_accounts_that_change_during_an_attempt_lose_no_message(start: Any, hop: Any, monkeypatch: Any) -> None:
    h = hop(listen=False)
    relay = relaying_in_review(start, h)
    d = relay.delivering
    routes, calls = d.delivery.routes, []

    def moving(message: smtprelay.Message) -> dict[str, list[smtprelay.Recipient]]:
        calls.append(1)
        return {"elsewhere": message.pending()} if len(calls) in (2, 3) else routes(message)

    monkeypatch.setattr(d.delivery, "routes", moving)
    said(relay)
    h.listen()
    wait_until(lambda: h.messages)


def test_what_is_being_held_is_counted_once(start: Any) -> None:
    relay = start(SMTP_SPOOL_MAX_MESSAGES="1")
    d, stem = relay.delivering, said_stem(relay)
    assert d.scheduler.seize(stem)
    d.make_room()
    assert stem in d.held
    d.scheduler.done(stem)


def test_a_job_that_fails_holds_up_no_other(start: Any, monkeypatch: Any, log: Caught) -> None:
    d, looked = start().delivering, threading.Event()
    for job in (d.delivery, "drop_idle"), (d, "make_room"), (d.reception.quotas, "save"):
        monkeypatch.setattr(*job, mock.Mock(side_effect=OSError(28, "full")))
    monkeypatch.setattr(d, "look_again", looked.set)
    assert looked.wait(5)
    wait_until(lambda: len(log.bugs()) >= 3)


def test_what_nobody_has_told_of_is_found_in_time(start: Any, hop: Any) -> None:
    h = hop()
    relay = relaying_in_review(start, h)
    stem = spooled_in_review(relay.delivering.spool)
    relay.delivering.look_at = 0.0
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED)
    assert relay.delivering.look_at > time.monotonic()


def test_the_octets_of_what_is_deleted_are_owed_no_more(start: Any, hop: Any) -> None:
    many = {"SMTP_RETRY_INITIAL_DELAY": "1h", "SMTP_SPOOL_MAX_SIZE": "1M"}
    relay = relaying_in_review(start, hop(listen=False), **many)
    first, second = said(relay, MAIL, MAIL)
    owed = functools.partial(relay.delivering.metrics.get, "owed_bytes")
    relay.delivering.catch_up()
    wait_until(lambda: metric(relay, "smtp_messages_deferred_total") and not relay.delivering.scheduler.active)
    both = owed()
    relay.delivering.remove([first])
    assert owed() == both / 2
    relay.delivering.remove([second])
    assert owed() == 0


def test_a_retry_that_comes_too_late_sends_nothing_twice(start: Any, hop: Any, monkeypatch: Any) -> None:
    h = hop()
    relay = relaying_in_review(start, h)
    stem = said_stem(relay)
    wait_until(lambda: status(relay, stem) is smtprelay.Status.FORWARDED and not len(relay.delivering.scheduler))
    before = relay.delivering.spool.load(stem)
    before.status = smtprelay.Status.RETRYING  # as it was when the request came
    monkeypatch.setattr(relay.delivering, "load", lambda _: before)
    with pytest.raises(smtprelay.HttpError, match="forwarded already"):
        relay.delivering.retry(before.id)
    wait_until(lambda: len(relay.delivering.scheduler) == 0)
    assert len(h.messages) == 1


def test_what_is_finished_is_not_sent_again_though_it_is_told_of_twice(start: Any, hop: Any) -> None:
    h = hop()
    relay = relaying_in_review(start, h)
    stem = said_stem(relay)
    wait_until(lambda: stem in relay.delivering.finished and not len(relay.delivering.scheduler))
    relay.delivering.scheduler.put(stem, smtprelay.SMARTHOST)
    wait_until(lambda: not len(relay.delivering.scheduler))
    assert len(h.messages) == 1


def test_half_a_line_in_the_link_is_no_message(start: Any) -> None:
    relay = start()
    relay.parts.link.writer.write(b"11-21/0123\n")
    stem = said_stem(relay)
    assert [relay.delivering.inbox.entry(id).stem for id in list(relay.delivering.inbox.entries)] == [stem]


def test_a_second_signal_to_stop_gives_no_more_time(monkeypatch: Any) -> None:
    told: list[int] = []
    supervisor = smtprelay.Supervisor(mock.Mock(settings=mock.Mock(processes=1)))
    monkeypatch.setattr(supervisor, "signal_children", told.append)
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: told.append(seconds))
    supervisor.stop()
    supervisor.stop()
    assert told == [signal.SIGTERM, smtprelay.STOP_AFTER]


def test_several_receiving_processes(program: Callable[..., Program]) -> None:
    relay = program(**{**QUICK, "SMTP_PROCESSES": "3", "SMTP_MAX_CONNECTIONS": "30"})
    wait_until(lambda: len(receivers(relay)) == 3)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Dialogue((relay.host, relay.port))) for _ in range(30)]
        ids = set()
        for client in clients:
            client.ask("EHLO client.test", "250")
            ids.add(client.mail()[-16:])
        assert len(ids) == 30
        assert len({id[13:] for id in ids}) > 1  # more than one process took some
        wait_until(lambda: metric(relay, "smtp_sessions_active") == 30)
        assert metric(relay, "smtp_messages_received_total") == 30
        with Dialogue((relay.host, relay.port)) as late:
            assert late.greeting.startswith("421 4.3.2")
    os.kill(receivers(relay)[0], signal.SIGKILL)
    wait_until(lambda: len(receivers(relay)) == 2)
    wait_until(lambda: len(receivers(relay)) == 3)
    for _ in range(5):
        with hello(relay) as client:
            assert client.mail().startswith("250")


def test_what_is_counted_by_client_is_counted_in_one_process() -> None:
    read = smtprelay.Settings.read
    usual = read({}).processes
    assert usual == min(2, os.cpu_count() or 1) and read({"SMTP_PROCESSES": "3"}).processes == 3
    for name, value in (
        ("RATE_LIMIT", "9"),
        ("MAX_CONNECTIONS_PER_CLIENT", "9"),
        ("USERS_FILE", "u"),
        ("STORAGE", "memory"),
    ):
        assert read({"SMTP_PROCESSES": "3", f"SMTP_{name}": value}).processes == 1
    assert read({"SMTP_PROCESSES": "3", "SMTP_AUTH_USER": "u", "SMTP_AUTH_PASSWORD": "p"}).processes == 1


def test_a_message_that_a_dead_process_had_kept_is_sent(
    program: Callable[..., Program], hop: Callable[..., FakeHop]
) -> None:
    taker = hop()
    relay = program(**{**QUICK, **taker.settings(), "SMTP_PROCESSES": "2"})
    relay.stop()
    relay.code = ONE_LINER.replace("; sys.exit", f"\n{DIES_BEFORE_IT_TELLS}\nsys.exit")
    relay.start()
    with hello(relay) as client, contextlib.suppress(OSError):
        assert client.mail() == ""
    wait_until(lambda: len(taker.messages) == 1)
    wait_until(lambda: metric(relay, "smtp_queue_depth") == 0)
    said(relay)
    wait_until(lambda: len(taker.messages) == 2 and metric(relay, "smtp_queue_depth") == 0)


# === LIBRARY =================================================================


CODE_MAIL = b"From: me@x.example\r\nTo: bob@b.example\r\nSubject: Your code\r\n\r\nYour code is 482913, or go to https://x.example/in?t=1\r\n"


def mail_to(relay: smtprelay.Relay, *recipients: str, content: bytes = CODE_MAIL) -> None:
    with smtplib.SMTP(relay.host, relay.port, timeout=5) as smtp:
        smtp.sendmail("me@x.example", recipients or ["bob@b.example"], content)


def test_a_test_waits_for_its_mail(relay: smtprelay.Relay) -> None:
    mail_to(relay)
    mail = relay.wait(to="bob@b.example", subject="code", timeout=5)
    assert (mail.codes, mail.links) == (["482913"], ["https://x.example/in?t=1"])
    assert (mail.reverse_path, mail.recipients) == ("me@x.example", ["bob@b.example"])
    assert (mail.subject, mail.from_, mail.to) == ("Your code", "me@x.example", ["bob@b.example"])
    assert (mail.html, mail.attachments) == ("", [])
    assert mail.headers["subject"] == "Your code" and mail.raw.endswith(CODE_MAIL) and "482913" in mail.text
    assert [m.id for m in relay.messages] == [mail.id]
    with pytest.raises(TimeoutError, match=r"to='ann'.* what came: <Email 'Your code'"):
        relay.wait(to="ann", timeout=0.01)
    with pytest.raises(TimeoutError):
        relay.wait(to="bob", timeout=0.01, after=mail)
    with pytest.raises(TimeoutError):
        relay.wait(to="ob@b.example", timeout=0.01)
    threading.Timer(0.02, mail_to, (relay,)).start()
    assert relay.wait(to="bob", after=mail).sequence > mail.sequence
    assert relay.wait(from_="ME@x.example", since=mail.sequence).sequence == relay.sequence
    with pytest.raises(TimeoutError, match="from_='you'"):
        relay.wait(from_="you", timeout=0.01)
    with pytest.raises(TimeoutError):
        relay.wait(since=relay.sequence, timeout=0.01)
    relay.clear()
    assert relay.messages == []


def test_bcc_is_waited_for_by_the_envelope(relay: smtprelay.Relay) -> None:
    mail_to(relay, "bob@b.example", "Blind@c.example")
    assert relay.wait(to="blind@c.example", timeout=1).recipients == ["bob@b.example", "Blind@c.example"]


def test_held_mail_is_released_to_the_simulated_smart_host(relay: smtprelay.Relay) -> None:
    mail_to(relay)
    mail_to(relay, "ann@b.example")
    assert relay.upstream.received == []
    assert relay.release(relay.wait(to="ann")) == 1
    assert [t.recipients for t in relay.upstream.wait(1)] == [["ann@b.example"]]
    assert relay.release() == 1
    taken = relay.upstream.wait(2)[1]
    assert (taken.reverse_path, taken.recipients) == ("me@x.example", ["bob@b.example"]) and taken.raw.endswith(
        CODE_MAIL
    )


SCRIPTS = [  # steps, how the message ends, attempts, copies taken
    ([], "forwarded", 1, 1),
    (["451 busy"] * 3, "forwarded", 4, 1),
    (["550 no"], "failed", 1, 0),
    (["rcpt 550 who?"], "failed", 1, 0),
    (["mail 451 later", "data 421 going"], "forwarded", 3, 1),
    (["drop", "accept"], "forwarded", 2, 1), (["rcpt 250 ok", "250", "451 no"], "forwarded", 1, 1),
    (["mail drop", "connect 421 busy", "connect 554 go away", "rcpt 450 grey"], "forwarded", 3, 1),
    (["delay 20ms 450 slow", "drop kept", "data delay 20ms"], "forwarded", 3, 2),
]


@pytest.mark.parametrize("steps, status, attempts, copies", SCRIPTS)
def test_the_simulated_smart_host_answers_by_script(steps: list[str], status: str, attempts: int, copies: int) -> None:
    with smtprelay.start(SMTP_DELIVERY="relay", SMTP_TIME_SCALE="1000", SMTP_SEED="1", SMTP_BOUNCE="0") as relay:
        relay.upstream.script(*steps)
        mail_to(relay)
        id = relay.wait().id
        wait_until(lambda: relay.delivering.load(id).status == status)
        assert (relay.upstream.attempts, len(relay.upstream.received)) == (attempts, copies)


def test_eight_hours_of_back_off_pass_in_a_second() -> None:
    waits = []
    for _ in range(2):
        with smtprelay.start(
            SMTP_DELIVERY="relay", SMTP_TIME_SCALE="50000", SMTP_SEED="7", SMTP_RETRY_JITTER="0.1"
        ) as relay:
            relay.upstream.script(*["451 busy"] * 16)
            started = time.monotonic()
            mail_to(relay)
            relay.upstream.wait(1)
            assert time.monotonic() - started < 5
            waits.append(relay.delivering.scheduler.rng.random())
    assert waits[0] == waits[1]


@pytest.mark.parametrize("step", ["", "reject", "rcpt", "rcpt no", "999 x", "250x"])
def test_a_step_that_is_none_is_refused(relay: smtprelay.Relay, step: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        relay.upstream.script(step)


def test_a_real_smart_host_is_not_simulated() -> None:
    with smtprelay.start(SMTP_RELAY_HOST=free_place()) as relay:
        assert relay.parts.settings.delivery == "relay"
        with pytest.raises(AttributeError, match="SMTP_RELAY_HOST"):
            assert relay.upstream


def test_relays_do_not_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMTP_PORT", "1")
    monkeypatch.setenv("SMTP_HOSTNAME", "elsewhere.example")
    with smtprelay.start(SMTP_HOSTNAME="one.example") as one, smtprelay.start() as two:
        assert len({one.port, two.port, one.http_url, two.http_url}) == 4
        assert (one.settings.hostname, "elsewhere" in two.settings.hostname) == ("one.example", False)
        mail_to(one)
        assert one.wait() and two.messages == []


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def is_as(before: tuple[set[threading.Thread], int]) -> bool:
    """Tell whether no thread and no file is new; what tests before this one left may have ended."""
    return set(threading.enumerate()) <= before[0] and open_files() <= before[1]


def test_nothing_is_left_behind_and_it_is_quick() -> None:
    for _ in range(2):  # the first one imports and caches
        before = (set(threading.enumerate()), open_files())
        relay = smtprelay.start(SMTP_DELIVERY="relay", SMTP_TLS_SELF_SIGNED="0")
        keeps = http.client.HTTPConnection(relay.host, int(relay.http_url.rpartition(":")[2]), timeout=5)
        keeps.request("GET", "/livez")
        assert keeps.getresponse().read() == b"OK\n"
        idle = socket.create_connection((relay.host, relay.port))
        mail_to(relay)
        relay.upstream.wait(1)
        relay.stop()
        keeps.close()
        idle.close()
        gc.collect()
        wait_until(functools.partial(is_as, before), 2)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        smtprelay.start().stop()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.03


def test_settings_are_text_numbers_flags_or_lists() -> None:
    with smtprelay.start(SMTP_MAX_SIZE=1000, SMTP_RETRY=False, SMTP_AUTH_METHODS=["plain", "login"]) as relay:
        settings = relay.settings
        assert (settings.max_size, settings.retry, settings.auth_methods) == (1000, False, ("plain", "login"))


def test_a_wrong_setting_leaves_nothing_either() -> None:
    before = (set(threading.enumerate()), open_files())
    for wrong in ({"SMTP_MAX_SIZE": "big"}, {"SMTP_MAX_SIZ": "1K"}):
        with pytest.raises(smtprelay.SettingsError, match="SMTP_MAX_SIZ"):
            smtprelay.start(**wrong)
    wait_until(functools.partial(is_as, before))


def run_pytest(tmp_path: Path, test: str, *flags: str, conftest: str = "") -> str:
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "conftest.py").write_text(conftest)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, str(tmp_path)],
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
        env=clean_env(PYTHONPATH=str(ROOT), SMTP_PORT="1", PYTHONDONTWRITEBYTECODE="1"),
    )
    return done.stdout.decode() + done.stderr.decode()


PLUGIN_TEST = """
import smtplib, pytest

def send(relay):
    with smtplib.SMTP(relay.host, relay.port) as smtp:
        smtp.sendmail("me@x.example", ["bob@b.example"], b"Subject: Shown\\r\\n\\r\\nhello\\r\\n")

@pytest.mark.parametrize("n", range(4))
def test_each_has_its_own(smtp_relay, n):
    send(smtp_relay)
    smtp_relay.wait(to="bob@b.example")
    assert len(smtp_relay.messages) == 1

@pytest.mark.smtp_relay(SMTP_DELIVERY="relay")
def test_marked(smtp_relay):
    send(smtp_relay)
    assert smtp_relay.upstream.wait()

def test_session(smtp_relay_session):
    send(smtp_relay_session)

def test_failing(smtp_relay):
    send(smtp_relay)
    assert smtp_relay.messages == []
"""


@pytest.mark.parametrize(
    "flags, conftest",
    [
        (["-p", "smtprelay", "--strict-markers"], ""),
        ([], "from smtprelay import smtp_relay, smtp_relay_session"),
        (["-p", "smtprelay", "-n", "2"], ""),
    ],
)
def test_pytests_fixtures(tmp_path: Path, flags: list[str], conftest: str) -> None:
    if "-n" in flags:
        pytest.importorskip("xdist")
    said = run_pytest(tmp_path, PLUGIN_TEST, *flags, conftest=conftest)
    assert "1 failed, 6 passed" in said, said
    assert "mail received (1)" in said and "Subject: Shown" in said and "test_failing" in said


def test_without_pytest_there_are_no_fixtures() -> None:
    code = "import smtprelay, sys; assert not hasattr(smtprelay, 'smtp_relay') and 'pytest' not in sys.modules"
    run_command(sys.executable, "-c", code, env=clean_env())


def test_a_relay_that_is_stopped_leaves_descriptors_of_others_alone(start: Any) -> None:
    relay = start()
    relay.stop()
    mine = [os.pipe() for _ in range(20)]
    try:
        relay.delivering.catch_up()
        assert relay.parts.link.announce(STEM) is False
        relay.stop()
        for reader, writer in mine:
            os.fstat(reader)
            os.fstat(writer)
            assert int.from_bytes(fcntl.ioctl(reader, termios.FIONREAD, bytes(4)), sys.byteorder) == 0
    finally:
        for pair in mine:
            os.close(pair[0])
            os.close(pair[1])


def test_the_library_leaves_the_size_of_stacks_alone(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_size = mock.Mock(return_value=0)  # a thread that somebody else starts meanwhile would have it
    monkeypatch.setattr(threading, "stack_size", set_size)
    relay = start()
    with hello(relay), hello(relay), hello(relay) as client:
        assert client.mail().startswith("250")
    set_size.assert_not_called()


# === DOCTOR ==================================================================


def findings(capsys: pytest.CaptureFixture[str], **env: str) -> tuple[dict[str, tuple[str, str, str]], int]:
    """Run the doctor here, and return its findings by what they are about, with its exit status."""
    with mock.patch.dict(os.environ, clean_env(**env), clear=True):
        status = smtprelay.main(["doctor", "--json"])
    listed = json.loads(capsys.readouterr().out)
    return {f["about"]: (f["mark"], f["found"], f["advice"]) for f in listed}, status


def test_the_doctor_finds_all_well_and_sends_nothing(
    relay: smtprelay.Relay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env = {"SMTP_RELAY_HOST": f"127.0.0.1:{relay.port}", "SMTP_SPOOL": str(tmp_path), "SMTP_HOSTNAME": "us.test"}
    found, status = findings(capsys, **env)
    assert status == 0 and {f[0] for f in found.values()} == {"ok"}, found
    assert list(found) == ["spool", "name", "IPv4", "egress", "greeting", "clock", "EHLO", "TLS", "size"]
    assert "ESMTP" in found["greeting"][1] and "SIZE 10485760" in found["EHLO"][1]
    assert relay.messages == []


DIAGNOSES: list[
    tuple[dict[str, str], dict[str, str], str, str, str]
] = [  # the server's settings, ours, what is found: about, mark, in its advice
    ({"SMTP_MAX_SIZE": "1K"}, {}, "size", "warn", "SMTP_MAX_SIZE=1024"),
    ({"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"}, {}, "login", "warn", "set it"),
    (
        {"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"},
        {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "right"},
        "login",
        "ok",
        "",
    ),
    (
        {"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"},
        {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "wrong"},
        "login",
        "fail",
        "app password",
    ),
    ({}, {"SMTP_RELAY_TLS": "starttls"}, "starttls", "fail", "SMTP_RELAY_TLS="),
    ({"SMTP_TLS_SELF_SIGNED": "1"}, {"SMTP_RELAY_TLS": "starttls"}, "starttls", "fail", "SMTP_RELAY_CA_FILE"),
    (
        {"SMTP_TLS_SELF_SIGNED": "1"},
        {"SMTP_RELAY_TLS": "starttls", "SMTP_RELAY_TLS_VERIFY": "0"},
        "certificate",
        "warn",
        "SMTP_RELAY_TLS_VERIFY=1",
    ),
    ({}, {"SMTP_STORAGE": "memory"}, "spool", "warn", "SMTP_STORAGE=file"),
    ({}, {"SMTP_SPOOL": "/proc/nowhere"}, "spool", "fail", "SMTP_SPOOL"),
    ({}, {"SMTP_RELAY_HOST": "unused"}, "IPv4", "fail", "SMTP_RELAY_PORT"),
    ({}, {"SMTP_RELAY_HOST": "no-such-host.invalid"}, "no-such-host.invalid:587", "fail", "resolv.conf"),
    ({}, {"SMTP_DELIVERY": "hold"}, "delivery", "warn", "SMTP_RELAY_HOST"),
    ({}, {"SMTP_DELIVERY": "mx", "SMTP_DNS_SERVER": "unused"}, "DNS", "fail", "SMTP_DNS_SERVER"),
    ({}, {"SMTP_RELAY_HOST": "unused"}, "egress", "fail", "network"),
    (  # what went well before the login failed is still told
        {"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right", "SMTP_TLS_SELF_SIGNED": "1"},
        {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "wrong", "SMTP_RELAY_TLS": "starttls",
         "SMTP_RELAY_TLS_VERIFY": "0"},
        "certificate", "warn", "SMTP_RELAY_TLS_VERIFY=1",
    ),
    (
        {"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right", "SMTP_AUTH_METHODS": "plain"},
        {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "x", "SMTP_RELAY_AUTH": "xoauth2"},
        "login", "fail", "SMTP_RELAY_AUTH",
    ),
    ({}, {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "x"}, "login", "fail", "takes no login"),
]  # fmt: skip


@pytest.mark.parametrize("theirs, ours, about, mark, advice", DIAGNOSES)
def test_the_doctor_says_what_to_do(
    theirs: dict[str, str],
    ours: dict[str, str],
    about: str,
    mark: str,
    advice: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with smtprelay.start(**theirs) as relay:
        ours = {k: free_place() if v == "unused" else v for k, v in ours.items()}
        found, status = findings(
            capsys, **{"SMTP_RELAY_HOST": f"127.0.0.1:{relay.port}", "SMTP_SPOOL": str(tmp_path), **ours}
        )
    assert found[about][0] == mark and advice in found[about][2], found
    assert status == any(f[0] == "fail" for f in found.values())


CLOCKS = [  # a greeting, the time here, what is found
    ("220 a ESMTP Exim Sat, 21 Nov 2026 03:00:00 +0000", 1795230000.0, "ok"),
    ("220 a ESMTP Exim Sat, 21 Nov 2026 03:00:00 +0000", 1795233600.0, "warn"),
    ("220 a ESMTP", 0.0, "ok"),
]


@pytest.mark.parametrize("greeting, now, mark", CLOCKS)
def test_the_doctor_compares_clocks(greeting: str, now: float, mark: str) -> None:
    assert smtprelay.examine_clock(greeting, now)[0] == mark


# === INSTALL =================================================================


def install(root: Path, *words: str, stdin: bytes = b"", status: int = 0, name: str = "install") -> str:
    return verb({}, name, "--root", str(root), *words, stdin=stdin, status=status)


def test_the_unit_in_the_repository_is_the_one_that_install_writes(tmp_path: Path) -> None:
    install(tmp_path)
    units = tmp_path / "etc/systemd/system"
    assert (units / "smtprelay.service").read_text() == PROGRAM.with_name("smtprelay.service").read_text()
    for unit in ("smtprelay.socket", "smtprelay.service"):
        done = subprocess.run([need("systemd-analyze"), "verify", units / unit], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    done = subprocess.run([need("systemd-analyze"), "security", "--offline=true", units / "smtprelay.service"],
                          capture_output=True, text=True, timeout=20)  # fmt: skip
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure and float(exposure[1]) <= 1.5, done.stdout[-300:] + done.stderr


def test_an_installation_is_upgraded_and_removed(tmp_path: Path) -> None:
    secret = b"abcd efgh ijkl mnop\n"
    install(tmp_path, "--relay", "gmail", "--user", "me@gmail.com", "--port", "25", "--sendmail", stdin=secret)
    place = lambda path: tmp_path / path.lstrip("/")  # noqa: E731
    env, password = place(smtprelay.ENVIRONMENT_FILE), place(smtprelay.PASSWORD_FILE)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (env, password)] == [0o600, 0o600]
    assert password.read_bytes() == secret and secret.decode().strip() not in env.read_text()
    assert "LoadCredential=relay-password:/etc/smtprelay/relay-password" in place(smtprelay.DROP_IN).read_text()
    named = {"SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_USERNAME": "me@gmail.com", "SMTP_PORT": "25"}
    assert smtprelay.read_assignments(env.read_text()) == named
    program = place(smtprelay.PROGRAM)
    assert stat.S_IMODE(program.stat().st_mode) == 0o755 and len(program.read_text().splitlines()) == 3
    code = program.read_text().replace("/usr/local", f"{tmp_path}/usr/local")
    python, flags = code.split("\n")[0][2:].split()
    for verb, status, said in [("version", 0, f"smtprelay {smtprelay.__version__}\n"), ("nonsense", 64, "")]:
        done = subprocess.run([python, flags, "-c", code, verb], capture_output=True, text=True, env={}, timeout=20)
        assert (done.returncode, done.stdout, bool(done.stderr)) == (status, said, bool(status))
    assert list(place("usr/local/lib/smtprelay/__pycache__").iterdir())
    for link in smtprelay.SENDMAIL_LINKS:
        assert os.readlink(place(link)) == smtprelay.LAUNCHED
    with env.open("a") as file:
        file.write("SMTP_KEEP=1d\nSMTP_BANNER='it is \"me\"'\n")
    place(smtprelay.LAUNCHED).write_text("old")
    install(tmp_path, "--relay", "mail.example.com:465")  # the rest stays
    named.update(SMTP_RELAY_HOST="mail.example.com:465", SMTP_KEEP="1d", SMTP_BANNER='it is "me"')
    assert smtprelay.read_assignments(env.read_text()) == named and password.read_bytes() == secret
    assert place(smtprelay.LAUNCHED).read_text().startswith("#!")
    assert "would remove" in install(tmp_path, "--dry-run", name="uninstall") and program.exists()
    install(tmp_path, name="uninstall")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir())
    assert left == ["etc/smtprelay/relay-password", "etc/smtprelay/smtprelay.env"]
    install(tmp_path)
    assert place(smtprelay.DROP_IN).exists()  # the password is still there, so it is still used
    install(tmp_path, "--purge", name="uninstall")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_what_install_says_before_it_does_anything(tmp_path: Path, capsys: Any) -> None:
    shown = install(tmp_path, "--relay", "gmail", "--user", "me", "--dry-run")
    assert "SMTP_RELAY_HOST=gmail" in shown and "ExecStart=" in shown and not list(tmp_path.iterdir())
    install(tmp_path, "--user", "me", status=64)
    install(tmp_path, "--relay", "ses", status=78)
    install(tmp_path, "--relay", "gmail", "--user", "me", stdin=b"\n", status=65)
    assert not list(tmp_path.iterdir())
    (tmp_path / "usr/sbin").mkdir(parents=True)
    (tmp_path / "usr/sbin/sendmail").write_text("exim")
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/mailq").symlink_to("/etc/alternatives/mta-mailq")
    capsys.readouterr()
    install(tmp_path, "--sendmail", status=1)
    said = capsys.readouterr().err
    assert "dpkg-divert --local --rename --add /usr/sbin/sendmail" in said
    assert "update-alternatives --install /usr/bin/mailq mta-mailq" in said
    install(tmp_path, name="uninstall")
    assert (tmp_path / "usr/sbin/sendmail").read_text() == "exim"


def test_the_verbs_know_the_installed_settings(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for name in ("ENVIRONMENT_FILE", "PASSWORD_FILE"):
        monkeypatch.setattr(smtprelay, name, str(tmp_path / name))
    (tmp_path / "ENVIRONMENT_FILE").write_text("# mine\nSMTP_RELAY_HOST=gmail\nSMTP_RELAY_USERNAME='me'\nSMTP_PORT=2626\n")
    (tmp_path / "PASSWORD_FILE").write_text("x\n")
    shown = verb({}, "check", "--print")
    assert "SMTP_PORT=127.0.0.1:2626" in shown and "SMTP_SPOOL=/var/lib/smtprelay/spool" in shown
    assert "ENVIRONMENT_FILE" in capsys.readouterr().err
    assert "SMTP_PORT=127.0.0.1:2525" in verb({"SMTP_KEEP": "1d"}, "check", "--print")  # the environment names something


# === COMMAND LINE ============================================================


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memfd_create here: the script runs on as it is")
@pytest.mark.parametrize("words", [["{}"], ["{}", "serve"]], ids=" ".join)
def test_a_script_goes_on_from_its_compiled_form(program: Callable[..., Program], words: list[str]) -> None:
    relay = program()
    relay.stop()
    for module in ("types", "queue", "smtprelay"):  # what lies about where it is started is none of its business
        (relay.home / f"{module}.py").write_text("raise SystemExit('wrong module')")
    script = ROOT / "smtprelay.py"
    with script.open("rb") as text, relay.output.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *(word.format(script) for word in words)],
            stdin=text, stdout=output, stderr=output, cwd=relay.home, env={"PATH": os.environ["PATH"], **relay.env},
        )  # fmt: skip
    try:
        found = wait_until(relay.ready)
        with smtplib.SMTP("127.0.0.1", int(found[1])) as client:
            client.sendmail("a@b.test", ["c@d.test"], b"Subject: compiled\r\n\r\nhello\r\n")
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
        assert command[1] == b"-c" and not list(relay.home.glob("__pycache__"))
    finally:
        process.terminate()
        assert process.wait(12) == 0


def test_first_lines_name_what_was_bound_where_mail_goes_and_the_spool(program: Callable[..., Program]) -> None:
    for settings, words in (({}, "held"), ({"SMTP_RELAY_HOST": "127.0.0.1:9"}, "127.0.0.1:9")):
        relay = program(**settings)
        wait_until(lambda: words in relay.log() and str(relay.spool.root) in relay.log())  # noqa: B023


def test_verification_that_is_off_is_a_warning(program: Callable[..., Program]) -> None:
    relay = program(SMTP_RELAY_TLS_VERIFY="0", **DEAF)
    wait_until(lambda: re.search(r"(?i)warn.*SMTP_RELAY_TLS_VERIFY", relay.log()))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a relay that runs as a program, with one message held in it."""
    place = tmp_path_factory.mktemp("served")
    smtp, http_ = free_place(), free_place()
    env = clean_env(
        SMTP_PORT=smtp,
        SMTP_HEALTH_ADDR=http_,
        SMTP_SPOOL=str(place / "spool"),
        SMTP_API_TOKEN="t0ken",
        SMTP_HOSTNAME="box.example",
    )
    with subprocess.Popen([sys.executable, PROGRAM], env=env, stderr=subprocess.DEVNULL) as program:
        verb(env, "healthcheck", "--wait")
        letter = CODE_MAIL.replace(b"\r\n", b"\n")
        subprocess.run([sys.executable, PROGRAM, "sendmail", "bob"], env=env, input=letter, check=True, timeout=20)
        yield env
        program.terminate()


def verb(env: Mapping[str, str], *words: str, status: int = 0, stdin: bytes = b"") -> str:
    """Run a verb in this process, as a user would with this environment."""
    out, given = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.TextIOWrapper(io.BytesIO(stdin))
    with (
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(sys, "stdin", given),
        contextlib.redirect_stdout(out),
    ):
        try:
            ended: object = smtprelay.main(list(words))
        except SystemExit as e:
            ended = e.code
    assert ended == status
    out.seek(0)
    return out.read()


def test_the_verbs_speak_to_the_running_relay(served: dict[str, str]) -> None:
    assert "to bob@box.example" in verb(served, "queue")
    (entry,) = json.loads(verb(served, "queue", "--json"))
    assert "482913" in verb(served, "show", entry["id"])
    shown = json.loads(verb(served, "show", "latest", "--json"))
    assert (shown["id"], shown["status"]) == (entry["id"], "held")
    assert verb(served, "wait", "--to", "bob", "--code") == "482913\n"
    assert verb(served, "wait", "--subject", "your code", "--link") == "https://x.example/in?t=1\n"
    verb(served, "wait", "--to", "ann", "--timeout", "10ms", status=1)
    verb(served, "retry", entry["id"], status=1)  # nowhere to send it
    verb({**served, "SMTP_API_TOKEN": "wrong"}, "queue", status=1)
    verb(served, "remove", "0" * 16, status=1)
    verb(served, "remove", "latest")
    verb(served, "remove", "latest", status=1)
    assert verb(served, "queue") == "the queue is empty\n"


def in_a_terminal(env: Mapping[str, str], *arguments: str) -> tuple[subprocess.Popen[bytes], int]:
    """Run the program in a session and a terminal of its own; return it and the terminal's other end."""
    terminal, its = pty.openpty()
    code = 'exec 0<>"$0" 1>&0 2>&0; exec "$@"'  # the first terminal that the session's leader opens becomes its own
    process = subprocess.Popen(["sh", "-c", code, os.ttyname(its), sys.executable, str(PROGRAM), *arguments], env=env,
                               stdin=its, start_new_session=True)  # fmt: skip
    os.close(its)
    return process, terminal


def test_a_password_that_is_not_given(tmp_path: Path) -> None:
    process, terminal = in_a_terminal(clean_env(SMTP_USERS_FILE="u"), "user", "add", "ann")
    said = b""
    with contextlib.suppress(OSError):  # at its end
        while block := os.read(terminal, 1000):
            said += block
            if said.endswith(b"Password: "):
                os.write(terminal, b"\x04")
    os.close(terminal)
    assert process.wait(10) == 65
    assert said.endswith(b"smtprelay: no password was given\r\n")


def test_what_cannot_be_opened_is_named_with_its_setting(tmp_path: Path, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"127.0.0.1:{taken.getsockname()[1]}"
        for setting in ("SMTP_PORT", "SMTP_SMTPS_PORT", "SMTP_HEALTH_ADDR"):
            places = {"SMTP_PORT": "127.0.0.1:0", "SMTP_HEALTH_ADDR": "off", "SMTP_TLS_SELF_SIGNED": "1"}
            verb(clean_env(**{**places, setting: place}, SMTP_SPOOL=str(tmp_path / "s")), "serve", status=69)
            shown = f"smtprelay: {setting}: cannot listen on {place}: Address already in use\n"
            assert capsys.readouterr().err == shown
    verb(clean_env(SMTP_SPOOL="/proc/x"), "serve", status=69)
    assert capsys.readouterr().err.startswith("smtprelay: SMTP_SPOOL: cannot open /proc/x: ")


def test_check_reads_the_files_that_settings_name(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".counts").write_text("mine")
    (tmp_path / "users").write_text('{"ann": {"password": "x", "quota_dayly": 5}}')
    env = clean_env(SMTP_USERS_FILE="users", SMTP_FAULTS="bogus", SMTP_TLS_CERT="users", SMTP_TLS_KEY="users")
    verb(env, "check", status=78)
    said = capsys.readouterr().err
    assert "quota_dayly" in said and "bogus" in said and "SMTP_TLS_CERT" in said
    verb(clean_env(SMTP_USERS_FILE="none"), "check", status=78)
    assert "SMTP_USERS_FILE: cannot read it" in capsys.readouterr().err
    assert verb(clean_env(), "check") == "settings are fine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".counts", "users"]


def test_who_waits_for_a_code_gets_the_newest_message_that_has_one(start: Any) -> None:
    relay = start()
    said(relay, CODE_MAIL, CODE_MAIL.replace(b"482913", b"111222"), b"Subject: News\r\n\r\nNothing new.\r\n")
    for query, status, wanted in (("", 200, []), ("&with=code", 200, ["111222"]), ("&with=colour", 400, None)):
        got = api(relay, "GET", f"/api/v1/wait?timeout=5{query}")
        assert got[0] == status and (wanted is None or got[1]["Codes"] == wanted)
    status, answer = api(relay, "GET", "/api/v1/wait?query=subject:News&with=link&timeout=0")[:2]
    assert status == 408 and "no message with a link" in str(answer)


def test_sendmail_says_what_it_knows(capsys: Any) -> None:
    shown = verb({}, "sendmail", "--help")
    assert shown.startswith("usage: ") and all(flag in shown for flag in ("-t", "-i", "-f", "-F", "-bs", "-bp", "-q"))


def test_the_verbs_read_the_spool_where_no_relay_runs(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": free_place(), "SMTP_HEALTH_ADDR": free_place(), "SMTP_SPOOL": str(tmp_path / "spool")}
    verb(env, "queue", status=69)
    verb(env, "wait", status=69)
    run_command("sendmail", "bob", env=env, stdin=b"Subject: x\n\nhello\n")
    (entry,) = json.loads(verb(env, "queue", "--json"))
    assert (entry["status"], entry["recipients"]) == ("received", ["bob@box.example"])
    assert verb(env, "show", entry["id"]).endswith("\n\nhello\n")
    verb(env, "retry", "all")
    verb(env, "retry", "nothing", status=1)
    verb(env, "retry", "latest")
    with smtprelay.start(SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool")):
        verb(env, "remove", entry["id"], status=75)  # a relay has it, but cannot be spoken to
    assert json.loads(verb(env, "show", "latest", "--json"))["id"] == entry["id"]
    verb(env, "remove", "latest")
    assert verb(env, "queue") == "the queue is empty\n"


def test_accounts_are_managed_in_their_file(tmp_path: Path) -> None:
    env = clean_env(SMTP_USERS_FILE=str(tmp_path / "users.json"))
    key = verb(
        env, "user", "add", "app", "--domain", "x.example", "--daily", "5", "--api-key", stdin=b"secret\n"
    ).strip()
    account = smtprelay.read_users(str(tmp_path / "users.json"))["app"]
    assert account["api_key"] == key and smtprelay.check_password("secret", account["password"])
    assert json.loads(verb(env, "user", "list", "--json")) == [
        {"name": "app", "allowed_domains": ["x.example"], "quota_daily": 5}
    ]
    verb(env, "user", "add", "app", stdin=b"x\n", status=1)
    verb(env, "user", "passwd", "app", stdin=b"new\n")
    account = smtprelay.read_users(str(tmp_path / "users.json"))["app"]
    assert smtprelay.check_password("new", account["password"]) and account["quota_daily"] == 5
    verb(env, "user", "passwd", "app", stdin=b"\n", status=65)
    verb(env, "user", "remove", "app")
    assert verb(env, "user", "list") == ""
    verb(clean_env(), "user", "list", status=78)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_help_has_every_table_as_wide_as_the_terminal(width: int, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    env = clean_env(COLUMNS=str(width))
    for topic, rows in smtprelay.TOPICS.items():
        shown = verb(env, "help", topic)
        assert max(map(len, shown.splitlines())) <= min(width, 100)
        words = " ".join(shown.split())
        assert all(word in words for row in list(rows())[1:] for word in row[0].split() if len(word) < 50), topic
    for more in ([], ["queue"], ["install"]):
        assert max(map(len, verb(env, "help", *more).splitlines())) <= min(width, 100)
    assert verb(env, "help") == verb(env, "--help") and verb(env, "version") == verb(env, "--version")
    verb(env, "help", "nonsense", status=64)


def test_status_tells_how_the_relay_fares(served: dict[str, str]) -> None:
    assert re.search(r"workers +ok\n", verb(served, "status")) and " held" in verb(served, "status")
    verb({**served, "SMTP_HEALTH_ADDR": free_place()}, "status", status=69)


def test_another_server_on_the_port_is_noticed(capsys: Any) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
        verb(clean_env(SMTP_HEALTH_ADDR=f"127.0.0.1:{other.server_port}"), "healthcheck", status=1)
        other.shutdown()
    assert "is not smtprelay" in capsys.readouterr().err


def test_the_first_lines_name_what_is_unusual(start: Any) -> None:
    unusual = {"SMTP_RELAY_REDIRECT_TO": "me@x.test", "SMTP_RELAY_ALLOWED_RECIPIENTS": "@x[.]test$", "SMTP_LENIENT": "1",
               "SMTP_FAULTS": "rcpt to=a@b.c 450", "SMTP_TIME_SCALE": "60", "SMTP_RELAY_FROM": "me@x.test"}  # fmt: skip
    lines = "\n".join(smtprelay.first_lines(start(**unusual).parts))
    assert [name for name in smtprelay.UNUSUAL if name in lines] == [n for n in smtprelay.UNUSUAL if n in {
        **unusual, "SMTP_FSYNC": "0"}]  # fmt: skip
    assert "warning: SMTP_RELAY_REDIRECT_TO=me@x.test: " in lines


def test_healthcheck_does_not_wait_for_a_relay_that_has_ended(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(smtprelay, "ENDED_AFTER", 1.0)
    env = clean_env(SMTP_SPOOL=str(tmp_path / "spool"), SMTP_LOG_FILE=str(tmp_path / "log"), SMTP_HEALTH_ADDR=free_place())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env["SMTP_PORT"] = f"127.0.0.1:{taken.getsockname()[1]}"
        verb(env, "serve", status=69)
        capsys.readouterr()
        verb(env, "healthcheck", "--wait", status=1)
    assert re.search("the relay has ended; .*cannot listen", capsys.readouterr().err)


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_verbs_do_without_standard_streams(streams: str, tmp_path: Path) -> None:
    env = clean_env(SMTP_SPOOL=str(tmp_path / "no"), SMTP_HEALTH_ADDR=free_place(), SMTP_USERS_FILE=str(tmp_path / "u"))
    wanted = {"help": 0, "queue": 69, "user add ann": 65, "bogus": 64, "check": 78}
    running = [subprocess.Popen(["sh", "-c", f'exec "$0" -c "$1" {words} {streams}', sys.executable, ONE_LINER], env=env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for words in wanted]  # fmt: skip
    said = [process.communicate(timeout=20)[1] for process in running]
    assert [process.returncode for process in running] == [*wanted.values()] and "Traceback" not in str(said), said


def test_any_locale_prints_any_address(tmp_path: Path) -> None:
    env = clean_env(SMTP_SPOOL=str(tmp_path / "spool"), SMTP_HEALTH_ADDR=free_place(), PYTHONIOENCODING="ascii")
    spooled_in_review(spool_of(tmp_path), "jürgen@bücher.test")
    assert "j\\xfcrgen@b\\xfccher.test" in run_command(sys.executable, str(PROGRAM), "queue", env=env)


def test_root_leaves_the_spool_to_its_owner() -> None:
    if os.geteuid():
        pytest.skip("only root can give files away")
    with tempfile.TemporaryDirectory() as name:  # pytest's own are closed to others, and closed again by its next run
        leave_the_spool(Path(name))


def leave_the_spool(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    spool = spool_of(tmp_path)
    queue_id = spooled_in_review(spool, "bob@hop.test", flags=("HOLD",))[11:27]
    spool.close()
    for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]:
        os.chown(path, 4321, 4321)
    env = clean_env(SMTP_SPOOL=str(tmp_path / "spool"), SMTP_HEALTH_ADDR=free_place(), SMTP_PORT=free_place(),
                    SMTP_RELAY_HOST="127.0.0.1:9")  # fmt: skip
    script = tmp_path / "smtprelay.py"
    shutil.copy(PROGRAM, script)
    run_command(sys.executable, str(script), "retry", "held", env=env)
    assert {path.stat().st_uid for path in (tmp_path / "spool").rglob("*")} == {4321}
    assert json.loads(next((tmp_path / "spool").glob(f"2*/{queue_id}*.json")).read_text())["status"] == "retrying"
    for words, status in (("queue", 69), ("serve", 69)):  # someone else is told whose it is
        done = subprocess.run(["/usr/bin/python3", script, words], env=env, capture_output=True, text=True, timeout=20,
                              user=1234, group=1234)  # fmt: skip
        assert done.returncode == status and "belongs to user4321" in done.stderr, done.stderr


def test_ctrl_c_ends_a_verb_without_a_traceback() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # a relay in this process may have blocked it
    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = clean_env(SMTP_HEALTH_ADDR=f"127.0.0.1:{silent.getsockname()[1]}")
        process = subprocess.Popen([sys.executable, str(PROGRAM), "queue"], env=env, stderr=subprocess.PIPE,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
        with silent.accept()[0]:
            process.send_signal(signal.SIGINT)
            assert (process.communicate(timeout=10)[1], process.returncode) == (b"", 130)


def test_an_old_python_can_read_why_it_is_too_old() -> None:
    ast.parse(SOURCE, feature_version=(3, 8))
    guard = next(node for node in TREE.body if isinstance(node, ast.If))
    assert "version_info < (3, 9)" in ast.unparse(guard) and "needs Python 3.9" in ast.unparse(guard)
    after = [n for n in TREE.body if n.lineno < guard.lineno]
    assert all(isinstance(n, (ast.Expr, ast.Import, ast.ImportFrom)) for n in after)


def test_a_terminal_that_closes_ends_what_it_started(tmp_path: Path) -> None:
    env = clean_env(SMTP_SPOOL=str(tmp_path / "spool"), SMTP_PORT="127.0.0.1:0", SMTP_HEALTH_ADDR="off")
    process, terminal = in_a_terminal(env)
    try:
        said = b""
        while b"spool in" not in said:
            said += os.read(terminal, 1000)
        time.sleep(0.05)
        os.close(terminal)
        process.wait(12)
    finally:  # it and its halves: none may outlive the test
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def slowed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process and its children run for a fifth of the time alone."""
    over = threading.Event()

    def pace() -> None:
        while not over.is_set():
            for number, seconds in ((signal.SIGSTOP, 0.04), (signal.SIGCONT, 0.01)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                over.wait(seconds)

    thread = threading.Thread(target=pace)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)


def test_a_slow_machine_is_not_left_alone(tmp_path: Path) -> None:
    """A relay at a fifth of the pace, and what is run beside it; processor time, in units of a small program."""
    env = clean_env(SMTP_SPOOL=str(tmp_path / "spool"), SMTP_PORT=free_place(), SMTP_HEALTH_ADDR=free_place())

    def used() -> float:
        """Return the processor time of all programs that have ended: whatever else runs changes it little."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    def cost(*command: str) -> float:
        begun = used()
        run_command(sys.executable, "-c", *command, env=env, stdin=b"Subject: x\n\nx\n")
        return used() - begun

    begun = used()
    with subprocess.Popen([sys.executable, "-c", ONE_LINER], env=env, stderr=subprocess.DEVNULL, start_new_session=True) as relay:
        with slowed(relay):
            verb(env, "healthcheck", "--wait")
            unit = cost("import http.client, json, argparse")
            took = {"healthcheck": cost(ONE_LINER, "healthcheck"), "sendmail": cost(ONE_LINER, "sendmail", "bob")}
        relay.terminate()
    took["relay"] = used() - begun - unit - sum(took.values())
    shown = {name: round(each / unit, 1) for name, each in took.items()}
    print("a slow machine, in units of a small program:", shown)
    assert max(shown.values()) < 10, shown


CLI_MISTAKES = [
    (["--bogus"], 64),
    (["quue"], 64),
    (["queue", "--bogus"], 64),
    (["retry"], 64),
    (["wait", "--timeout", "x"], 64),
    (["queue", "--help"], 0),
    (["--version"], 0),
]


@pytest.mark.parametrize("words, status", CLI_MISTAKES)
def test_mistakes_of_usage(words: list[str], status: int) -> None:
    verb(clean_env(), *words, status=status)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_for_the_shell(shell: str) -> None:
    path, script = need(shell), verb({}, "--completion", shell)
    assert all(name in script for name in (*smtprelay.COMMANDS, "sendmail", "--subject"))
    run_command(path, "-n", env=clean_env(), stdin=script.encode())
    if shell == "bash":
        said = run_command(
            path,
            "-c",
            script + "\nCOMP_WORDS=(smtprelay.py wait --t) COMP_CWORD=2; _smtprelay; echo ${COMPREPLY[@]}",
            env=clean_env(),
        )
        assert said == "--to --timeout\n"


SHOWN = [
    (smtprelay.size_shown, 999, "999"),
    (smtprelay.size_shown, 1200, "1.2K"),
    (smtprelay.size_shown, 35 << 20, "35M"),
    (smtprelay.time_shown, 45, "45s"),
    (smtprelay.time_shown, 150, "2m"),
    (smtprelay.time_shown, 3 * 86400, "3d"),
    (smtprelay.time_shown, -5, "0s"),
]


@pytest.mark.parametrize("shown, value, text", SHOWN)
def test_figures_for_people(shown: Callable[[float], str], value: float, text: str) -> None:
    assert shown(value) == text


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))


# === SHAPE ===================================================================
# What the file itself looks like.

BANNER = re.compile(r"(?m)^# === (?:\d\d )?([A-Z]+(?: [A-Z]+)*) =+$")
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_banners_are_the_contents_list() -> None:
    lines = [line for line in SOURCE.split("\n") if line.startswith("# ===")]
    assert {len(line) for line in lines} == {79}
    listed = re.findall(r"(?m)^ +(?:\d\d )?([A-Z]+(?: [A-Z]+)*)(?:  |: )", ast.get_docstring(TREE, clean=False) or "")
    assert BANNER.findall(SOURCE) == listed
    tests = BANNER.findall(Path(__file__).read_text())
    assert [name for name in tests if name in listed] == [name for name in listed if name in tests]


def test_chapters_use_only_earlier_chapters() -> None:
    starts = [SOURCE.count("\n", 0, match.start()) for match in BANNER.finditer(SOURCE)]
    chapter = lambda node: sum(start < node.lineno for start in starts)  # noqa: E731
    home: dict[str, int] = {}
    for node in TREE.body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else [node]
        )
        for target in targets:
            name = str(getattr(target, "id", "") or getattr(target, "name", ""))
            assert not name or name not in home, f"{name} is a name of two things"
            home[name] = chapter(node)
    local = {name.arg for name in ast.walk(TREE) if isinstance(name, ast.arg)}
    local |= {n.id for f in FUNCTIONS for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    notes = [a.annotation for a in ast.walk(TREE) if isinstance(a, (ast.arg, ast.AnnAssign))] + [
        f.returns for f in FUNCTIONS
    ]
    local |= {n.id for note in notes if note for n in ast.walk(note) if isinstance(n, ast.Name)}  # types may look ahead
    late = {
        f"{node.id} in line {node.lineno}"
        for node in ast.walk(TREE)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Load)
        and home.get(node.id, 0) > chapter(node)
        and node.id not in local
    }
    assert late == set()


def test_every_signature_has_its_types() -> None:
    bare = [
        f.name
        for f in FUNCTIONS
        for a in [*f.args.args, *f.args.kwonlyargs]
        if not a.annotation and a.arg not in ("self", "cls")
    ]
    assert bare + [f.name for f in FUNCTIONS if f.returns is None] == []


def test_imports_are_the_standard_library_alone() -> None:
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    if sys.version_info >= (3, 10):
        assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == set()
    inner = {alias.name for node in imports if node.col_offset for alias in node.names}
    assert inner == {  # what few starts ever need
        "ctypes", "difflib", "getopt", "getpass", "logging", "shlex", "subprocess", "textwrap",
        "urllib.request", "zoneinfo",
    }  # fmt: skip


def test_keys_of_tables_are_unique() -> None:
    tables = [node.value for node in TREE.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value]
    for node in (node for table in tables for node in ast.walk(table)):
        keys = []
        if isinstance(node, ast.Dict):
            keys = [ast.dump(key) for key in node.keys if key]
        elif (
            isinstance(node, (ast.Tuple, ast.List))
            and node.elts
            and all(isinstance(e, (ast.Tuple, ast.Call)) for e in node.elts)
        ):
            rows = [e.elts if isinstance(e, ast.Tuple) else e.args for e in node.elts]  # type: ignore[attr-defined]
            said = [[getattr(e, "value", None) for e in row] for row in rows if row]
            keys = [
                str(row[:2] if row[0] in ("GET", "POST", "PUT", "DELETE") else row[0])
                for row in said
                if isinstance(row[0], str)
            ]
        assert [key for key, times in collections.Counter(keys).items() if times > 1] == []


PYTHON_BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", PROGRAM.with_name("README.md").read_text())
DJANGO = """
import django
from django.conf import settings
settings.configure(MAILERS={"default": {"BACKEND": "django.core.mail.backends.smtp.EmailBackend"}})
django.setup()
"""


@pytest.mark.parametrize("number", range(len(PYTHON_BLOCKS)))
def test_the_readmes_python_runs_as_it_stands(tmp_path: Path, number: int) -> None:
    block = PYTHON_BLOCKS[number]
    for framework, version in (("django", (6, 1)), ("flask_mail", ())):
        if f"from {framework}" in block and getattr(pytest.importorskip(framework), "VERSION", ()) < version:
            pytest.skip(f"{framework} is older than the block")
    shutil.copy(PROGRAM, tmp_path)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["smtprelay"]\n' + DJANGO * ("django" in block))
    (tmp_path / "test_it.py").write_text(block)
    pytest_it = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "def test_" in block else []
    done = subprocess.run([sys.executable, *pytest_it, "test_it.py"], cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("relayed", "most"), [(False, 135), (True, 250)])
def test_a_message_costs_few_calls(start: Any, hop: Any, relayed: bool, most: int) -> None:
    """Count Python calls from MAIL to the end of what becomes of it; a new layer shows here first."""
    calls: collections.Counter[str] = collections.Counter()
    counted = threading.Event()

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "call" and counted.is_set():  # asked for its name, a thread that ends is made anew as a dummy
            calls[frame.f_code.co_name] += not threading.current_thread().name.startswith("Thread-")  # the next hop's

    threading.setprofile(profile)
    try:
        relay = relaying_in_review(start, hop()) if relayed else start()
        done = lambda: relay.delivering.finished if relayed else relay.delivering.held  # noqa: E731
        with hello(relay) as client:
            for n in range(60):
                if n == 20:
                    wait_until(lambda: len(done()) == 20 and not relay.delivering.sidecars)
                    counted.set()
                client.mail(b"x" * 70 + b"\r\n")
            wait_until(lambda: len(done()) == 60 and not relay.delivering.sidecars)
            counted.clear()
    finally:
        threading.setprofile(None)
    each = sum(calls.values()) / 40
    assert each <= most, f"{each:.0f} calls a message, most of all {calls.most_common(12)}"


def test_readme_and_help_name_the_same_settings() -> None:
    table = re.findall(r"(?m)^\| *`?(SMTP_\w+)`?", PROGRAM.with_name("README.md").read_text())
    assert sorted(table) == sorted(set(re.findall(r"(?m)^ +(SMTP_\w+)", run("--help").stdout)))


# === BREAKING ================================================================
#
# Everything here runs the real thing and hurts it. With BREAKING=long the same
# tests do many more rounds (.ci/break).

MANY_ROUNDS = os.environ.get("BREAKING") == "long"


class BookHop(FakeHop):
    """A next hop that keeps a book of what it answered 250, and fails as often as `flaky` says."""

    def __init__(self, flaky: float = 0.0, seed: int = 1) -> None:
        self.flaky, self.rng, self.down = flaky, random.Random(seed), False
        self.taken: collections.Counter[str] = collections.Counter()
        self.cut: collections.Counter[str] = collections.Counter()
        self.open: set[Any] = set()  # connections that are still read
        super().__init__(offers="")

    def __enter__(self) -> BookHop:
        return self

    def next_act(self, stages: list[str], usual: str) -> str:
        stage = stages[-1]
        if self.down and stage == "connect":
            return "drop"
        if stage in ("mail", "rcpt", "data", "end") and self.rng.random() < self.flaky:
            return "drop" if stage == "end" or self.rng.random() < 0.3 else "451 4.3.0 later"
        return usual

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request_thread(request, client_address)
        self.open.discard(request)

    def note(self, got: Got, taken: bool) -> None:
        super().note(got, taken)
        (self.taken if taken else self.cut)[re.findall(rb"(?m)^X-Book: (\S+)", got.content)[0].decode()] += 1


class Victim:
    """The program as a user runs it, on one spool and one port for its whole life."""

    def __init__(self, folder: Path, prelude: str = "", **settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as smtp, socket.create_server(("127.0.0.1", 0)) as http:
            self.port, self.http = smtp.getsockname()[1], http.getsockname()[1]
        self.spool, self.log, self.prelude = folder / "spool", folder / "log", prelude
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SMTP_")}
        self.env = {
            **clean,
            "SMTP_SPOOL": str(self.spool),
            "SMTP_PORT": f"127.0.0.1:{self.port}",
            "SMTP_HEALTH_ADDR": f"127.0.0.1:{self.http}",
            "SMTP_RETRY_INITIAL_DELAY": "20ms",
            "SMTP_RETRY_MAX_DELAY": "300ms",
            "SMTP_SPOOL_MIN_FREE": "0",
            **settings,
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.under: list[str] = []

    def start(self) -> Victim:
        code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport smtprelay\n{self.prelude}\nsys.exit(smtprelay.main(['serve']))"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.under, sys.executable, "-c", code], env=self.env, stdout=log, stderr=log, cwd="/"
            )
        wait_until(self.answers, 20)
        return self

    def answers(self) -> bool:
        assert self.process and self.process.poll() is None, self.log.read_text()
        try:
            with self.connect(1):
                return True
        except (OSError, smtplib.SMTPException):
            return False

    def connect(self, timeout: float = 10) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.port, "client.example", timeout)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def figure(self, name: str) -> float:
        return float(json.loads(self.get("/debug/vars")[1])[name])

    def children(self) -> list[int]:
        assert self.process
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process
        self.process.terminate()
        return self.process.wait(15)

    def __enter__(self) -> Victim:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self.process and self.process.poll() is None:
            self.kill()

    def owed(self) -> set[str]:
        """Return the third book: the recipients' keys of all messages that are not finished."""
        keys, key = set(), bytes.fromhex(self.env.get("SMTP_SPOOL_KEY", ""))
        for path in self.spool.glob("*-*-*/*.eml"):
            with contextlib.suppress(FileNotFoundError):
                if not path.with_suffix(".forwarded.json").exists():
                    file = path.open("rb")
                    with sealer(key).reader(file, f"{path.parent.name}/{path.name}") as text:
                        keys |= set(re.findall(r"X-Envelope-To: <(\w+)@", text.read(2000).decode("latin-1")))
        return keys


def booked(key: str, size: int = 100) -> bytes:
    return f"X-Book: {key}\r\nSubject: test\r\n\r\n".encode() + b"line of text\r\n" * (size // 14)


def send_keyed(client: smtplib.SMTP, key: str, size: int = 100) -> int:
    """Send one message to key@example.com; return the code of the last reply."""
    for code, _ in (client.mail("a@example.com"), client.rcpt(f"{key}@example.com")):
        if code != 250:
            client.rset()
            return code
    return client.data(booked(key, size))[0]


class Clients:
    """Eight clients that send without end, and keep the first book: what was acknowledged."""

    def __init__(self, program: Victim, count: int = 8) -> None:
        self.program, self.acknowledged, self.over = program, set[str](), threading.Event()
        self.threads = [threading.Thread(target=self.work, args=(n,), daemon=True) for n in range(count)]

    def work(self, number: int) -> None:
        rng, turn = random.Random(number), 0
        while not self.over.is_set():
            with contextlib.suppress(OSError, smtplib.SMTPException), self.program.connect(2) as client:
                client.ehlo()
                while not self.over.is_set():
                    turn += 1
                    key = f"k{number}x{turn}"
                    if send_keyed(client, key, rng.choice([10, *[2000] * 6, 400_000])) == 250:
                        self.acknowledged.add(key)
                    self.over.wait(rng.random() * (0.2 if MANY_ROUNDS else 0.02))  # the books are read in each round
            self.over.wait(0.01)

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(20)


def kill_campaign(folder: Path, rounds: int, alone: bool, **settings: str) -> None:
    """Kill the program, or one of its halves, at seeded moments; balance the books after each and at the end."""
    rng, excused = random.Random(rounds), collections.Counter[str]()
    with BookHop(0.15) as hop, Victim(folder, SMTP_RELAY_HOST=hop.place, SMTP_FSYNC="0", **settings) as program:
        with Clients(program) as clients:
            halves = len(program.children())
            for _ in range(rounds):
                time.sleep(rng.random() * 0.25)
                if alone:
                    victim = rng.choice(program.children())
                    os.kill(victim, signal.SIGKILL)
                    wait_until(lambda: len(program.children()) == halves and victim not in program.children())  # noqa: B023
                else:
                    program.kill()
                    known = set(clients.acknowledged)
                    wait_until(lambda: not in_use(program.spool) and not hop.open)  # it has heard all that was said
                owed = program.owed()
                excused.update(key for key in list(hop.taken) if key in owed)  # said 250, not written down
                if not alone:
                    assert known <= owed | set(hop.taken)
                    program.start()
        hop.flaky = 0.0
        depth = functools.partial(program.figure, "smtp_queue_depth")
        wait_until(lambda: depth() == 0 and not program.owed(), 60, lambda: f"depth {depth()}, owed {program.owed()}")
        twice = {k: n for k, n in hop.taken.items() if n > 1 + excused[k] + hop.cut[k]}
        assert clients.acknowledged - set(hop.taken) == set()
        assert twice == {}
        assert program.figure("smtp_queue_depth") == 0
        assert "_bug" not in program.log.read_text()
        assert not [p for p in (program.spool / "bad").iterdir() if p.name.endswith(".eml")]
        print(
            f"{rounds} kills: {len(clients.acknowledged)} acknowledged, {len(hop.taken)} taken, "
            f"{sum(hop.taken.values()) - len(hop.taken)} second copies"
        )


def in_use(spool: Path) -> bool:
    with (spool / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


@pytest.mark.parametrize("alone", [False, True])
def test_break_by_sigkill(tmp_path: Path, alone: bool) -> None:
    kill_campaign(tmp_path, (50 if alone else 100) if MANY_ROUNDS else 3, alone)


def test_break_by_sigkill_when_sealed(tmp_path: Path) -> None:
    kill_campaign(tmp_path, 20 if MANY_ROUNDS else 1, False, SMTP_SPOOL_KEY=SEAL_KEY.hex())


class FaultyOs:
    """The os module, but for what is in `trouble`: {function: errno, or a function in its place}."""

    def __init__(self) -> None:
        self.trouble: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        real, wrong = getattr(os, name), self.trouble.get(name)
        if callable(wrong):
            return wrong
        return functools.partial(self.fail, name, real) if wrong else real

    def fail(self, name: str, real: Any, *args: Any, **more: Any) -> Any:
        reading = name == "open" and not args[1] & os.O_CREAT
        if reading or name not in self.trouble or name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode):
            return real(*args, **more)
        raise OSError(self.trouble[name], os.strerror(self.trouble[name]))


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> FaultyOs:
    monkeypatch.setattr(smtprelay, "SWEEP_EVERY", 60.0)  # the counts that the sweeper saves would fail, too
    faulty = FaultyOs()
    monkeypatch.setattr(smtprelay, "os", faulty)
    return faulty


class Caught(logging.Handler):
    """What the library's relays have logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def bugs(self) -> list[str]:
        return [line for line in self.lines if "_bug" in line]


@pytest.fixture
def log() -> Iterator[Caught]:
    logger, caught = logging.getLogger("smtprelay.library"), Caught()
    logger.addHandler(caught)
    logger.setLevel(logging.WARNING)  # whatever a verb that was run here has left
    yield caught
    logger.removeHandler(caught)
    logger.setLevel(logging.NOTSET)


def relay_at(folder: Path, hop: BookHop | None = None, **settings: str) -> smtprelay.Relay:
    more = {"SMTP_RELAY_HOST": hop.place} if hop else {}
    return smtprelay.start(
        **{
            "SMTP_STORAGE": "file",
            "SMTP_SPOOL": str(folder / "spool"),
            "SMTP_RETRY_INITIAL_DELAY": "20ms",
            "SMTP_RETRY_MAX_DELAY": "100ms",
            "SMTP_SPOOL_MIN_FREE": "0",
            **more,
            **settings,
        }
    )


def submit(relay: smtprelay.Relay, key: str, size: int = 100) -> int:
    with smtplib.SMTP(relay.host, relay.port, "client.example", 10) as client:
        client.ehlo()
        code = send_keyed(client, key, size)
        assert client.noop()[0] == 250  # in step, whatever the disk does
        return code


def readiness(relay: smtprelay.Relay) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(relay.http_url + "/readyz", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


DISK_FAULTS = [
    ("open", errno.ENOSPC, 452),
    ("open", errno.EROFS, 451),
    ("open", errno.EMFILE, 451),
    ("write", errno.ENOSPC, 452),
    ("write", errno.EDQUOT, 452),
    ("write", errno.EIO, 451),
    ("fsync", errno.EIO, 451),
    ("fsync", errno.ENOSPC, 452),
    ("rename", errno.EIO, 451),
    ("makedirs", errno.ENOSPC, 452),
]


@pytest.mark.parametrize("size", [100, 300_000])
def test_break_by_a_failing_disk(
    tmp_path: Path, faulty: FaultyOs, log: Caught, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtprelay, "WRITE_AGAIN", 0.02)
    with BookHop() as hop, relay_at(tmp_path, hop) as relay:
        for n, (name, error, code) in enumerate(DISK_FAULTS):
            faulty.trouble[name] = error
            relay.parts.spool.folder = ""  # as at midnight
            assert submit(relay, f"bad{n}", size) == code, (name, errno.errorcode[error])
            if name in ("open", "write"):
                assert readiness(relay) == (503, f"spool: cannot write: {os.strerror(error)}\n")
            faulty.trouble["unlink"] = errno.EROFS  # not even tidying up works
            assert submit(relay, f"worse{n}", size) == code
            faulty.trouble.clear()
            assert submit(relay, f"good{n}", size) == 250
            assert readiness(relay) == (200, "OK\n")
        wait_until(lambda: sum(hop.taken.values()) >= len(DISK_FAULTS))
        wait_until(lambda: relay.delivering.metrics.get("smtp_queue_depth") == 0)
        wait_until(lambda: not relay.delivering.unwritten)
    refused = {f"worse{n}" for n, fault in enumerate(DISK_FAULTS) if fault[0] == "fsync"}  # could not be taken back
    assert {f"good{n}": 1 for n in range(len(DISK_FAULTS))} == {k: n for k, n in hop.taken.items() if k not in refused}
    assert log.bugs() == []
    spool = smtprelay.Spool(settings_at(tmp_path), relay.parts.log)
    assert {status for _, status in spool.names()} <= {smtprelay.Status.FORWARDED, None}


def test_break_by_a_disk_that_takes_little_at_a_time(tmp_path: Path, faulty: FaultyOs) -> None:
    faulty.trouble["write"] = lambda fd, data: os.write(fd, data[:1000])
    with BookHop() as hop, relay_at(tmp_path, hop) as relay:
        assert submit(relay, "big", 50_000) == 250
        wait_until(lambda: hop.taken["big"] == 1)
        assert hop.messages[0].content.endswith(booked("big", 50_000))


def test_break_by_a_disk_that_fills_when_mail_was_delivered(
    tmp_path: Path, faulty: FaultyOs, log: Caught, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtprelay, "WRITE_AGAIN", 0.02)
    with BookHop() as hop, relay_at(tmp_path, hop) as relay:
        hop.down = True
        assert submit(relay, "one") == 250
        wait_until(lambda: list((tmp_path / "spool").glob("*-*/*.json")))
        faulty.trouble["write"] = errno.ENOSPC
        hop.down = False
        wait_until(lambda: hop.taken["one"])
        wait_until(lambda: sum("record_not_written" in line for line in log.lines) > 3)
        assert relay.delivering.metrics.get("smtp_queue_depth") == 1
        faulty.trouble.clear()
        wait_until(lambda: list((tmp_path / "spool").glob("*-*/*.forwarded.json")))
        wait_until(lambda: relay.delivering.metrics.get("smtp_queue_depth") == 0)
        assert relay.delivering.unwritten == {}
    assert hop.taken == {"one": 1}
    assert log.bugs() == []


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small file system at a folder, where that is allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(
    ("options", "size", "least", "code", "reason"),
    [
        ("size=16m", 400_000, "0", 452, ""),
        ("size=16m", 400_000, "1MiB", 452, "less free space than SMTP_SPOOL_MIN_FREE"),
        ("size=16m,nr_inodes=200", 100, "0", 452, "cannot write: No space left on device"),
    ],
)
def test_break_by_a_full_disk(tmp_path: Path, options: str, size: int, least: str, code: int, reason: str) -> None:
    with small_disk(tmp_path / "disk", options) as disk, BookHop() as hop:
        hop.down = True
        with Victim(
            disk, SMTP_RELAY_HOST=hop.place, SMTP_LOG_FILE=str(tmp_path / "log"), SMTP_SPOOL_MIN_FREE=least
        ) as program:
            program.log = tmp_path / "log"
            answers: list[int] = []
            for n in range(300):
                with program.connect() as client:
                    client.ehlo()
                    answers.append(send_keyed(client, f"k{n}", size))
                if len(answers) > 30 and 250 not in answers[-5:]:
                    break
            kept = {f"k{n}" for n, answer in enumerate(answers) if answer == 250}
            assert set(answers) == {250, code}
            assert program.get("/readyz") == (
                (503, f"spool: {reason}\n") if reason else (200, "OK\n")
            )  # small mail fits
            subprocess.run(["mount", "-o", "remount,rw,size=64m,nr_inodes=9999", disk], check=True)
            hop.down = False
            assert program.get("/readyz")[0] == 200
            wait_until(lambda: set(hop.taken) == kept, 20)
            wait_until(lambda: program.figure("smtp_queue_depth") == 0)
            with program.connect() as client:
                client.ehlo()
                assert send_keyed(client, "after", size) == 250
            wait_until(lambda: hop.taken["after"] == 1)
            assert program.stop() == 0
        assert set(hop.taken.values()) == {1}
        assert "_bug" not in (tmp_path / "log").read_text()


def test_break_by_a_read_only_disk_at_start(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        spool_of(disk).close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        env = {**os.environ, "SMTP_SPOOL": str(disk / "spool"), "SMTP_PORT": "127.0.0.1:0", "SMTP_HEALTH_ADDR": "off"}
        ran = subprocess.run([sys.executable, smtprelay.__file__], env=env, capture_output=True, text=True, timeout=20)
        assert (ran.returncode, ran.stderr.count("\n")) == (69, 1)
        assert "Read-only file system" in ran.stderr


# -- junk, power, clock --

GOOD_STEM = "0123456789abcdef_0123456789abcdef"
BAD_STEM = "0123456789abcde{}_0123456789abcdef"


def test_break_by_junk_in_the_spool(tmp_path: Path, log: Caught) -> None:
    spool = spool_of(tmp_path)
    good = keep(spool, booked("good"))
    torn, day = keep(spool, booked("torn")), tmp_path / "spool" / good[:10]
    spool.close()
    (tmp_path / "spool" / f"{torn}.eml").write_bytes(b"X-Envelope-Size: 000000000099")
    stems = [BAD_STEM.format(f"{n:x}") for n in range(8)]
    for stem, data in zip(stems, (b"", b"\0" * 4096, b"X-Envelope-Size: 1\r\n" * 10_000, MAGIC_ONLY, noise(5000))):
        (day / f"{stem}.eml").write_bytes(data)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"not ours")
    (day / f"{stems[5]}.eml").symlink_to(outside / "file")
    os.mkfifo(day / f"{stems[6]}.eml")
    (day / f"{stems[7]}.eml").mkdir()
    (tmp_path / "spool" / f"{good}.json").write_bytes(b'{"id":' + b"[" * 9_000_000)
    (tmp_path / "spool" / f"{good}.tmp").write_bytes(b"{")
    for name in (
        "README",
        "core.1",
        ".hidden",
        "\udcff.eml",
        GOOD_STEM,
        f"{GOOD_STEM}.json.bak",
        f"{GOOD_STEM}.deadbeef.part",
    ):
        (day / name).write_bytes(b"foreign")
    (tmp_path / "spool" / "notes.txt").write_bytes(b"foreign")
    (tmp_path / "spool" / "2026-13-45").symlink_to(outside)
    os.mkfifo(tmp_path / "spool" / "2026-01-01")
    (day / f"{GOOD_STEM}.json").write_bytes(b"")  # its message is gone
    with BookHop() as hop, relay_at(tmp_path, hop) as relay:
        wait_until(lambda: hop.taken["good"] == 1)
        wait_until(lambda: relay.delivering.metrics.get("smtp_queue_depth") == 0)
        wait_until(lambda: readiness(relay)[0] == 200)
    left = {path.name for path in day.iterdir()}
    assert left == {f"{good[11:]}.eml", f"{good[11:]}.forwarded.json"}
    bad = [path.name for path in (tmp_path / "spool" / "bad").iterdir()]
    assert len(bad) == 8 + 1 + 7  # nothing was removed that held anything
    assert {"notes.txt", "2026-13-45", "2026-01-01"} <= {path.name for path in (tmp_path / "spool").iterdir()}
    assert sum("set_aside " in line for line in log.lines) == len(bad)
    assert (outside / "file").read_bytes() == b"not ours" and len(list(outside.iterdir())) == 1  # links lead nowhere
    assert log.bugs() == []


MAGIC_ONLY = smtprelay.MAGIC + bytes(100)


def test_break_by_a_message_of_another_owner(tmp_path: Path, log: Caught, faulty: FaultyOs) -> None:
    spool = spool_of(tmp_path)
    keep(spool, booked("theirs"))
    spool.close()

    def refuse(path: str, flags: int, *mode: int, **more: Any) -> int:
        if path.endswith(".eml"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return os.open(path, flags, *mode, **more)

    faulty.trouble["open"] = refuse
    with BookHop() as hop, relay_at(tmp_path, hop):
        wait_until(lambda: sum("spool_error" in line for line in log.lines) > 2)
        faulty.trouble.clear()
        wait_until(lambda: hop.taken["theirs"] == 1)
    assert log.bugs() == []


class ShiftedTime:
    """The time module with another time of day."""

    def __init__(self, at: float) -> None:
        self.shift = at - time.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def time(self) -> float:
        return time.time() + self.shift

    def time_ns(self) -> int:
        return time.time_ns() + int(self.shift * 1e9)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (NOON, NOON - 3600),
        (NOON, NOON + 86400),
        (NOON, NOON + 365 * 86400),
        (NOON, NOON - 365 * 86400),
        (60.0, NOON),
        (NOON, 60.0),
        (NOON + 43199.9, NOON + 43200.1),
    ],
)
def test_break_by_setting_the_clock(
    tmp_path: Path, log: Caught, monkeypatch: pytest.MonkeyPatch, before: float, after: float
) -> None:
    clock = ShiftedTime(before)
    monkeypatch.setattr(smtprelay, "time", clock)
    monkeypatch.setattr(smtprelay, "SWEEP_EVERY", 0.02)
    with BookHop() as hop:
        hop.down = True
        with relay_at(tmp_path, hop) as relay:
            assert submit(relay, "one") == submit(relay, "two") == 250
            wait_until(lambda: any("next_hop_throttled" in line for line in log.lines))
            clock.shift = after - time.time()
            assert submit(relay, "three", 300_000) == 250
            tries = sum("next_hop_throttled" in line for line in log.lines)
            time.sleep(0.15)
            assert sum("next_hop_throttled" in line for line in log.lines) - tries <= 4  # no storm
            assert hop.taken == {}
        hop.down = before < 1e7  # what is too old is tried once more; the age of what came in 1970 is not known
        with relay_at(tmp_path, hop) as relay:  # what it finds tells it nothing false
            time.sleep(0.05)
            hop.down = False
            wait_until(lambda: len(hop.taken) == 3)
            wait_until(lambda: relay.delivering.metrics.get("smtp_queue_depth") == 0)
    assert set(hop.taken.values()) == {1}
    assert log.bugs() == []


# -- power --


class RecordingOs:
    """The os module, noting what is done to files, in order, so that a crash can be played at any point."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        fd = os.open(path, flags, mode)
        if flags & (os.O_CREAT | os.O_DIRECTORY):
            self.paths[fd] = path
            self.done.append(("open", path, bool(flags & os.O_DIRECTORY)))
        return fd

    def write(self, fd: int, data: Any) -> int:
        self.done.append(("write", self.paths.get(fd), -1, bytes(data)))
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes, at: int) -> int:
        self.done.append(("write", self.paths.get(fd), at, data))
        return os.pwrite(fd, data, at)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new)
        self.paths = {fd: new if path == old else path for fd, path in self.paths.items()}
        self.done.append(("rename", old, new))

    def fsync(self, fd: int) -> None:
        self.done.append(("fsync", self.paths[fd]))

    def makedirs(self, path: str, *more: Any, **named: Any) -> None:
        self.done.append(("makedirs", path))
        os.makedirs(path, *more, **named)


FileTree = dict[str, bytes]  # path: content; a directory's ends with a slash


def after_crash(done: list[tuple[Any, ...]]) -> Iterator[FileTree]:
    """Yield what may be on the disk when the power goes: all that was synced, and any kind of part of the rest."""
    live: FileTree = {}
    safe: FileTree = {}
    for step in done:
        path = step[1]
        if step[0] == "makedirs":
            live[path + "/"] = b""
        elif step[0] == "open" and not step[2]:
            live[path] = b""
        elif step[0] == "write" and path:
            data = live.get(path, b"")
            at = len(data) if step[2] < 0 else step[2]
            live[path] = data[:at] + step[3] + data[at + len(step[3]) :]
        elif step[0] == "rename":
            live[step[2]] = live.pop(path)
            if path in safe:
                safe[step[2]] = safe.pop(path)
        elif (
            step[0] == "fsync"
            and path + "/" in {os.path.dirname(p.rstrip("/")) + "/" for p in live}
            and path not in live
        ):
            safe.update({p: b"" for p in live if p.endswith("/") and os.path.dirname(p[:-1]) == path})
        elif step[0] == "fsync":
            safe[path] = live[path]
    yield live
    yield safe
    for torn in (
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: bytes(len(data)),
        lambda data: data[:-1],
    ):
        yield {
            p: data if p in safe and safe[p] == data else safe[p] if p in safe else torn(data)
            for p, data in live.items()
        }
    yield {p: data for p, data in live.items() if not p.endswith(".json")}  # names that were never written
    yield {p: data for p, data in live.items() if p in safe or p.endswith(("/", ".json", ".tmp"))}


def plant(root: Path, tree: FileTree) -> bool:
    """Make a tree on the disk; a file whose directory was lost is lost with it."""
    for path in sorted(tree):
        if path.endswith("/"):
            Path(path).mkdir(parents=True, exist_ok=True)
        elif Path(path).parent.is_dir() and Path(path).is_relative_to(root):
            Path(path).write_bytes(tree[path])
    return True


@pytest.mark.parametrize("key", ["", SEAL_KEY.hex()])
def test_break_by_power_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    disk = RecordingOs()
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=key)
    monkeypatch.setattr(smtprelay, "os", disk)
    disk.done.append(("makedirs", str(tmp_path / "spool/bad")))
    disk.done.append(("fsync", str(tmp_path / "spool")))
    for size in (10, 300_000, 10):
        stem = keep(spool, b"x" * size)
        disk.done.append(("said", stem))
        message = spool.load(stem)
        for attempts in (1, 2) if size != 300_000 else ():
            message.attempts = attempts
            spool.save(message)
        if size == 300_000:
            message.move(smtprelay.Status.FORWARDING)
            message.move(smtprelay.Status.FORWARDED)
            spool.save(message)
    monkeypatch.setattr(smtprelay, "os", os)
    spool.close()
    mark = {p: p.read_bytes() for p in [tmp_path / "spool/key.check"] if key}
    states = [tree for n in range(2, len(disk.done) + 1) for tree in after_crash(disk.done[:n])]
    lengths = [n for n in range(2, len(disk.done) + 1) for _ in after_crash(disk.done[:n])]
    for tree, n in zip(states, lengths):
        shutil.rmtree(tmp_path / "spool")
        (tmp_path / "spool").mkdir()
        for path, data in mark.items():
            path.write_bytes(data)
        plant(tmp_path / "spool", tree)
        said = {step[1] for step in disk.done[:n] if step[0] == "said"}
        after = spool_of(tmp_path, SMTP_SPOOL_KEY=key)
        found = {}
        for stem, _ in after.names():
            with contextlib.suppress(smtprelay.SpoolError):
                found[stem] = after.load(stem).size
        after.close()
        assert said <= found.keys(), (n, disk.done[n - 1], sorted(tree))
        assert set(found.values()) <= {10, 300_000}
    assert len(states) > 100


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.parametrize("fsync", ["1", "0"])
def test_break_by_looking_for_the_sync(tmp_path: Path, fsync: str) -> None:
    trace = tmp_path / "trace"
    program = Victim(tmp_path, SMTP_FSYNC=fsync)
    calls = "trace=write,pwrite64,rename,renameat,renameat2,fsync,fdatasync,sendto"
    program.under = ["strace", "-D", "-f", "-s", "60", "-e", calls, "-o", str(trace)]
    with program, program.connect() as client:
        client.ehlo()
        assert [send_keyed(client, f"k{n}", size) for n, size in enumerate((10, 300_000, 10, 2000))] == [250] * 4
    wait_until(lambda: trace.read_text(errors="replace").count("+++ ") > 2)
    lines = trace.read_text(errors="replace").splitlines()
    said = [n for n, line in enumerate(lines) if "queued as" in line]
    assert len(said) == 4
    for start, end in zip([0, *said], said):
        steps = [
            word for line in lines[start:end] for word in ("rename", "fsync(") if word in line and ".tmp" not in line
        ]
        synced = steps[-2:] == ["rename", "fsync("]  # the content and, with it, its last name
        assert synced == (fsync == "1"), lines[start:end]
        if fsync == "1":
            last = max(
                n for n in range(start, end) if "write" in lines[n] and "X-Env" in lines[n] or "pwrite64" in lines[n]
            )
            assert last < max(n for n in range(start, end) if "fsync(" in lines[n])


# -- descriptors, threads, memory --

LIMITS = """
import os, resource
resource.setrlimit(resource.RLIMIT_{name}, ({limit}, {limit}))
{more}
"""
OPEN_SPOOL = "import ctypes, encodings.idna, locale; os.setgid(65534); os.setuid(65534)"


def crowd(program: Victim, count: int) -> tuple[list[socket.socket], int]:
    """Connect many clients that say nothing; return those that were greeted, and how many were refused or left waiting."""
    held, refused = [], 0
    for _ in range(count):
        sock = socket.socket()
        sock.settimeout(0.5)
        try:
            sock.connect(("127.0.0.1", program.port))
            greeted = sock.recv(3) == b"220"
        except OSError:
            greeted = False
        held.append(sock) if greeted else sock.close()
        refused += not greeted
    return held, refused


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors_of(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


@pytest.mark.parametrize(
    ("name", "limit", "more"),
    [
        ("NOFILE", 64, ""),
        ("NPROC", 80, OPEN_SPOOL),
        pytest.param("AS", 700 << 20, "", marks=pytest.mark.skipif(not MANY_ROUNDS, reason="takes long: .ci/break")),
    ],
)
def test_break_by_limits(tmp_path: Path, name: str, limit: int, more: str) -> None:
    if name == "NPROC":
        if os.getuid():
            pytest.skip("the limit counts all processes of this user")
        tmp_path = Path(tempfile.mkdtemp(prefix="break-"))  # one that another user may enter
        os.chown(tmp_path, 65534, 65534)
        os.chmod(tmp_path, 0o700)
    with (
        BookHop() as hop,
        Victim(
            tmp_path, LIMITS.format(name=name, limit=limit, more=more), SMTP_RELAY_HOST=hop.place, SMTP_WORKERS="4"
        ) as program,
    ):
        children = program.children()
        with program.connect() as client:
            client.ehlo()
            assert send_keyed(client, "before") == 250
            wait_until(lambda: hop.taken["before"] == 1)
            descriptors = descriptors_of(children)
            hop.down = True
            assert send_keyed(client, "waiting") == 250
            held, refused = crowd(program, 200)
            assert held and (refused or name == "AS")
            used = sum(map(processor_time, children))
            time.sleep(0.25)
            assert sum(map(processor_time, children)) - used < 0.12  # no spin
            hop.down = False
            assert send_keyed(client, "during") == 250
            wait_until(lambda: hop.taken["during"] == hop.taken["waiting"] == 1)
            for sock in held:
                sock.close()
            wait_until(
                lambda: program.figure("smtp_sessions_active") == 1, shown=lambda: program.log.read_text()[-2000:]
            )
            wait_until(lambda: descriptors_of(children) <= descriptors + 4)  # no leak
        with program.connect() as client:
            client.ehlo()
            assert send_keyed(client, "after", 200_000) == 250
        wait_until(lambda: hop.taken["after"] == 1)
        assert program.children() == children
        assert program.stop() == 0
        assert "_bug" not in program.log.read_text()


def test_break_by_trouble_inside_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the content must never be taken for commands."""

    def fail(self: smtprelay.Content, block: bytes) -> None:
        raise MemoryError

    monkeypatch.setattr(smtprelay.Content, "take", fail)
    with smtprelay.start() as relay, socket.create_connection((relay.host, relay.port), 5) as sock:
        assert sock.recv(100).startswith(b"220")
        sock.sendall(b"HELO me\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n")
        wait_until(lambda: b"354" in sock.recv(10_000))
        sock.sendall(b"Subject: x\r\n\r\nMAIL FROM:<evil@example.com>\r\n" * 1000 + b".\r\n")
        answer = b"".join(iter(lambda: sock.recv(1000), b""))
        assert answer.startswith(b"451") and answer.count(b"\r\n") == 1


@pytest.mark.skipif(not MANY_ROUNDS, reason="takes 10 s: .ci/break")
def test_break_by_big_mail_in_little_memory(tmp_path: Path) -> None:
    """Forty clients send 10 MiB at once, where there is memory for a fraction of it."""
    with Victim(tmp_path, LIMITS.format(name="AS", limit=300 << 20, more="")) as program:
        children, codes = program.children(), list[int]()

        def work() -> None:
            with contextlib.suppress(OSError, smtplib.SMTPException), program.connect(60) as client:
                client.ehlo()
                codes.append(send_keyed(client, "big", 10_000_000))

        threads = [threading.Thread(target=work) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert program.children() == children
        assert 250 in codes and set(codes) <= {250, 421, 451}
        with program.connect() as client:
            client.ehlo()
            assert send_keyed(client, "after") == 250
        assert len(list(program.spool.glob("*-*/*.eml"))) == codes.count(250) + 1
        assert not list(program.spool.glob("*-*/*.part"))


# -- backlog --


def pile(folder: Path, count: int) -> list[str]:
    """Fill a spool with messages that are owed; return their stems in order."""
    spool = spool_of(folder, SMTP_FSYNC="0")
    envelope = smtprelay.Envelope("a@example.com", "127.0.0.1", "me", recipients=["b@example.com"])
    stems = []
    for n in range(count):
        draft = spool.draft(envelope)
        draft.write(booked(f"n{n}"))
        stems.append(draft.commit())
    spool.close()
    return stems


def memory_of(pid: int) -> float:
    """Return what a process has of its own, in MiB."""
    return float(
        sum(int(x) for x in re.findall(r"Private_\w+: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())) / 1024
    )


def test_break_by_a_backlog(tmp_path: Path) -> None:
    count = 100_000 if MANY_ROUNDS else 5_000
    pile(tmp_path, count)
    with BookHop() as hop:
        hop.down = True
        program = Victim(tmp_path, SMTP_RELAY_HOST=hop.place, SMTP_LOG_LEVEL="error", SMTP_RETRY_MAX_DELAY="1s")
        started = time.monotonic()
        with program:
            slowest = 0.0
            while program.figure("smtp_queue_depth") < count:
                before = time.monotonic()
                program.connect(5).close()
                slowest = max(slowest, time.monotonic() - before)
                assert time.monotonic() - started < 10
            known = time.monotonic() - started
            memory = max(map(memory_of, program.children()))
        print(f"{count} messages: known after {known:.2f} s, {memory:.0f} MiB, port within {slowest * 1000:.0f} ms")
    assert known < 2.0 + 1.0  # the second is for Python itself on a busy machine
    assert slowest < 0.3
    assert memory < 60


def test_break_by_flapping(tmp_path: Path) -> None:
    """The next hop goes and comes; a second here stands for a minute."""
    count, turns = (20_000, 60) if MANY_ROUNDS else (200, 3)
    pile(tmp_path, count)
    with (
        BookHop() as hop,
        Victim(tmp_path, SMTP_RELAY_HOST=hop.place, SMTP_LOG_LEVEL="error", SMTP_RETRY_MAX_DELAY="100ms") as program,
    ):
        for turn in range(turns):
            hop.down = turn % 2 == 0
            time.sleep(1.0 if MANY_ROUNDS else 0.1)
        hop.down = False
        wait_until(lambda: len(hop.taken) == count and program.figure("smtp_queue_depth") == 0, 120)
        assert set(hop.taken.values()) == {1}
        order = [int(re.findall(rb"X-Book: n(\d+)", body)[0]) for _, body in hop.mails]
        late = sum(abs(place - n) for place, n in enumerate(order)) / count
        assert late < 100  # oldest first, but for those that several connections pass at once
        assert "_bug" not in program.log.read_text()


def test_break_by_restarts_in_the_middle_of_a_delay(tmp_path: Path) -> None:
    rounds = 50 if MANY_ROUNDS else 4
    with BookHop(1.0) as hop:
        more = {"SMTP_RETRY_INITIAL_DELAY": "1h", "SMTP_RETRY_MAX_DELAY": "2h", "SMTP_RETRY_JITTER": "0"}
        with relay_at(tmp_path, hop, **more) as relay:
            assert [submit(relay, f"k{n}") for n in range(5)] == [250] * 5
            wait_until(lambda: len(list((tmp_path / "spool").glob("*-*/*.json"))) == 5)
        before = {p: json.loads(p.read_bytes()) for p in (tmp_path / "spool").glob("*-*/*.json")}
        for _ in range(rounds):
            with relay_at(tmp_path, hop, **more) as relay:
                wait_until(lambda: len(relay.delivering.scheduler.heap) == 5)
                dues = sorted(relay.delivering.scheduler.heap)
                left = [due - time.monotonic() for due, _, _ in dues]
                assert all(3500 < seconds < 3601 for seconds in left)
        assert {p: json.loads(p.read_bytes()) for p in (tmp_path / "spool").glob("*-*/*.json")} == before
        assert {record["attempts"] for record in before.values()} == {1}
        hop.flaky = 0.0
        with relay_at(tmp_path, hop, **more) as relay:
            wait_until(lambda: len(relay.delivering.scheduler.heap) == 5)
            relay.delivering.scheduler.flush()
            wait_until(lambda: sum(hop.taken.values()) == 5)


# -- hostile clients --


class ProtocolModel:
    """A small model of the protocol: what one more command has to be answered with."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.helo = self.mail = self.login = self.chunks = self.tls = False
        self.recipients = self.errors = 0

    def step(self) -> tuple[bytes, list[int]]:
        """Return what to send, and the codes of the replies to it."""
        action = self.rng.choice(HOSTILE_ACTIONS)
        sent, codes = action(self)
        self.errors += sum(code >= 500 for code in codes)
        return sent, codes

    def reset(self) -> None:
        self.mail = self.chunks = False
        self.recipients = 0

    def start_tls(self) -> int:
        """Return the code of the reply to STARTTLS; after 220 all that was said before counts for nothing."""
        if self.tls or not self.helo:
            return 503
        self.tls, self.helo, self.login = True, False, False
        self.reset()
        return 220

    def greet(self) -> tuple[bytes, list[int]]:
        if self.rng.random() < 0.2:
            return self.rng.choice([b"EHLO\r\n", b"EHLO a b\r\n", b"HELO \xc3\xa9\r\n"]), [0]
        self.helo = True
        self.reset()
        return b"EHLO client.example\r\n", [250]

    def simple(self) -> tuple[bytes, list[int]]:
        return self.rng.choice(
            [
                (b"NOOP\r\n", [250]),
                (b"noop x y\r\n", [250]),
                (b"VRFY a\r\n", [252]),
                (b"HELP\r\n", [214]),
                (b"EXPN a\r\n", [502]),
                (b"DATA x\r\n", [501]),
                (b"QUIT now\r\n", [501]),
            ]
        )

    def rset(self) -> tuple[bytes, list[int]]:
        self.reset()
        return b"RSET\r\n", [250]

    def garbage(self) -> tuple[bytes, list[int]]:
        line = bytes(self.rng.choice(b'ABC dt<>@:="\\\xff\x01.') for _ in range(self.rng.randrange(1, 60)))
        return b"X" + line + self.rng.choice([b"\r\n", b"\n"]), [500]

    def long(self) -> tuple[bytes, list[int]]:
        return b"NOOP " + b"x" * self.rng.randrange(20_000, 50_000) + b"\r\n", [500]

    def auth(self) -> tuple[bytes, list[int]]:
        ready = self.helo and not self.mail and not self.login
        if self.rng.random() < 0.3:
            return b"AUTH NONSENSE\r\n", [503 if not self.helo or self.mail or self.login else 504]
        if self.rng.random() < 0.3:
            return (b"AUTH LOGIN\r\n*\r\n", [334, 501]) if ready else (b"AUTH LOGIN\r\n", [503])
        self.login |= ready
        return b"AUTH PLAIN AGEAYg==\r\n", [235 if ready else 503]

    def from_(self) -> tuple[bytes, list[int]]:
        bad = self.rng.choice(HOSTILE_PATHS) if self.rng.random() < 0.3 else None
        if not self.helo or self.chunks or self.mail:
            return b"MAIL FROM:<a@example.com>\r\n", [503]
        if bad:
            return b"MAIL FROM:" + bad + b"\r\n", [0]
        self.mail = True
        return b"MAIL FROM:<a@example.com> SIZE=100\r\n", [250]

    def to(self) -> tuple[bytes, list[int]]:
        if not self.mail or self.chunks:
            return b"RCPT TO:<b@example.com>\r\n", [503]
        if self.rng.random() < 0.3:
            return b"RCPT TO:" + self.rng.choice(HOSTILE_PATHS) + b"\r\n", [0]
        self.recipients += 1
        return b"RCPT TO:<b@example.com>\r\n", [250]

    def data(self) -> tuple[bytes, list[int]]:
        if not self.mail or self.chunks:
            return b"DATA\r\n", [503]
        if not self.recipients:
            return b"DATA\r\n", [554]
        self.reset()
        body, code = self.rng.choice(
            [
                (b"Subject: x\r\n\r\nhello\r\n", 250),
                (b"", 250),
                (b"..\r\n...\r\n", 250),
                (b"QUIT\r\nMAIL FROM:<x@y.z>\r\n", 250),
                (b"a\nb\r\n", 554),
                (b"a\r\n.\nb\r\n", 554),
                (b"a\n.\r\nb\r\n", 554),
                (b"x" * 200_000 + b"\r\n", 552),
            ]
        )
        return b"DATA\r\n" + body + b".\r\n", [354, code]

    def bdat(self) -> tuple[bytes, list[int]]:
        body = b"some octets\r\n" * self.rng.randrange(3)
        last = self.rng.random() < 0.5
        sent = b"BDAT %d%s\r\n%s" % (len(body), b" LAST" if last else b"", body)
        if not self.mail:
            return sent, [503]
        if not self.recipients:
            self.reset()
            return sent, [554]
        self.chunks = True
        if last:
            self.reset()
        return sent, [250]


HOSTILE_ACTIONS = (
    ProtocolModel.greet,
    ProtocolModel.simple,
    ProtocolModel.rset,
    ProtocolModel.garbage,
    ProtocolModel.auth,
    ProtocolModel.from_,
    ProtocolModel.from_,
    ProtocolModel.to,
    ProtocolModel.to,
    ProtocolModel.data,
    ProtocolModel.data,
    ProtocolModel.bdat,
    ProtocolModel.bdat,
) * 4 + (ProtocolModel.long,)
HOSTILE_PATHS = (
    b"a@b",
    b"<a@b",
    b"<a b@c>",
    b"<@>",
    b"<a@-b>",
    b'<"a@b>',
    b"<a@b> NO=WAY",
    b"<" + b"a" * 2000 + b"@b>",
    b"<a@[300.1.1.1]>",
    b"<a@b>>",
    b"<a..b@c>",
    b"<a@b> SIZE=x SIZE=y",
    b"<\xff@b>",
    b"<a@b>X",
)


class ReplyCodes:
    """Reads replies from a socket, one at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.file = sock.makefile("rb")

    def code(self) -> int:
        while True:
            line = self.file.readline()
            if line[3:4] != b"-":
                return int(line[:3] or b"0")


UNVERIFIED = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
UNVERIFIED.check_hostname, UNVERIFIED.verify_mode = False, ssl.CERT_NONE


def fuzz_session(host: str, port: int, seed: int, commands: int) -> int:
    """Hold one session with the model; return how many commands were sent."""
    rng = random.Random(seed)
    model, sent = ProtocolModel(rng), 0
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(socket.create_connection((host, port), 20))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader = ReplyCodes(sock)
        assert reader.code() == 220
        while sent < commands:
            if rng.random() < 0.02:
                sock.sendall(b"STARTTLS\r\n")
                code = reader.code()
                assert code == model.start_tls(), f"seed {seed}: STARTTLS answered {code}"
                if code == 220:
                    sock = stack.enter_context(UNVERIFIED.wrap_socket(sock))
                    reader = ReplyCodes(sock)
            batch = [model.step() for _ in range(rng.choice([1, 1, 2, 5, 20]))]
            data = b"".join(part for part, _ in batch)
            pieces = rng.choice([1, 1, 1, 2, 7])
            for n in range(pieces):
                sock.sendall(data[len(data) * n // pieces : len(data) * (n + 1) // pieces])
            for part, codes in batch:
                for expected in codes:
                    got = reader.code()
                    known = got == expected or (not expected and 500 <= got < 560)
                    assert known, f"seed {seed}: {part[:80]!r} answered {got}, expected {expected or '5xx'}"
            sent += len(batch)
        sock.sendall(b"QUIT\r\n")
        assert reader.code() == 221
    return sent


def test_break_by_hostile_sessions(log: Caught, pair: str) -> None:
    total, sent, seed = (1_000_000 if MANY_ROUNDS else 6_000), 0, 0
    limits = {
        "SMTP_MAX_ERRORS": "1000000",
        "SMTP_AUTH_ANY": "1",
        "SMTP_AUTH_REQUIRED": "0",
        "SMTP_AUTH_FAILURES": "1000000",
        "SMTP_MAX_SIZE": "100K",
        "SMTP_SPOOL_MAX_MESSAGES": "50",
        "SMTP_LOG_LEVEL": "error",
        "SMTP_MAX_RECIPIENTS": "1000000",
        "SMTP_TLS_CERT": pair,
        "SMTP_TLS_KEY": pair,
    }
    with smtprelay.start(**limits) as relay:
        log.setLevel(logging.ERROR)
        logging.getLogger("smtprelay.library").setLevel(logging.ERROR)
        early = 0.0
        while sent < total:
            sent += fuzz_session(relay.host, relay.port, seed, 1000)
            seed += 1
            if seed == 5:
                early = memory_of(os.getpid())
        assert memory_of(os.getpid()) < early + 16
    assert log.bugs() == []


def test_break_by_hostile_connections(log: Caught) -> None:
    """What does not even try to speak SMTP, or leaves in the middle; and the same for HTTP."""
    rng = random.Random(8)
    with smtprelay.start(SMTP_COMMAND_TIMEOUT="1s") as relay:
        http_port = int(relay.http_url.rpartition(":")[2])
        for n in range(2000 if MANY_ROUNDS else 150):
            with socket.create_connection((relay.host, (relay.port, http_port)[n % 2]), 5) as sock:
                start_of = (b"EHLO x\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<b@c.d>\r\nDATA\r\n", b"GET /api/v1/")[n % 2]
                sock.sendall(start_of[: rng.randrange(len(start_of) + 1)] + noise(rng.randrange(300), n))
                if rng.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # leave with a reset
        for _ in range(2000 if MANY_ROUNDS else 100):
            path = bytes(
                rng.choice(b'/api/v1messagesearch?query=%20%ff&limit=-19."()[]:') for _ in range(rng.randrange(60))
            )
            with socket.create_connection((relay.host, http_port), 5) as sock:
                sock.sendall(
                    b"%s /%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                    % (rng.choice([b"GET", b"POST", b"PUT", b"DELETE", b"\xff"]), path, rng.choice([0, 0, 5, -1]))
                )
                sock.shutdown(socket.SHUT_WR)
                answer = sock.recv(12)
                assert answer[9:10] != b"5" or answer[9:12] == b"501", (path, answer)
        assert submit(relay, "after") == 250
        wait_until(lambda: not relay.receiving.reception.sessions)
    assert log.bugs() == []


def test_break_by_hostile_addresses() -> None:
    rng, alphabet = random.Random(8), '<>@."\\ab:,[]IPv6:1 é\x00\x7f=-'
    for _ in range(300_000 if MANY_ROUNDS else 20_000):
        text = "<" * (rng.random() < 0.9) + "".join(rng.choice(alphabet) for _ in range(rng.randrange(30)))
        try:
            address, rest = smtprelay.parse_path(text)
        except ValueError:
            continue
        assert not address or smtprelay.parse_path(f"<{address}>") == (address, "")  # what is taken can be sent on
        assert "\x00" not in address and "\r" not in address
    for evil in (
        "<" + "a." * 600 + "@b>",
        '<"' + "\\a" * 5000,
        "<" + "@a," * 5000,
        "<a@" + "b." * 5000 + ">",
        "<a@[" + ":" * 5000 + "]>",
    ):
        started = time.perf_counter()
        with contextlib.suppress(ValueError):
            smtprelay.parse_path(evil)
        assert time.perf_counter() - started < 0.05
