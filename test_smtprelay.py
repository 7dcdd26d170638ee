"""The tests of smtprelay.py, chapter by chapter, from the outside where that can be.

Two ways to run the relay: `start(...)` inside this process, and `Program`, the real
program as a process of its own. Against it stand `Dialogue`, a client on a raw socket,
and `FakeHop`, a next hop that can do anything wrong at any stage. No port is fixed, no
sleep is longer than 50 ms, nothing inside the standard library is replaced.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import email
import hashlib
import hmac
import http.client
import json
import os
import random
import re
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import pytest

import smtprelay

PROGRAM = Path(smtprelay.__file__).resolve()
SOURCE = PROGRAM.read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
MAIL = b"From: ann@client.test\r\nSubject: hello\r\n\r\nOne line.\r\n"

# === STAGE ===================================================================
# What the tests play on. Everything waits with wait_until(), in steps of 10 ms.

QUICK = {
    "SMTP_PORT": "127.0.0.1:0",
    "SMTP_HEALTH_ADDR": "127.0.0.1:0",
    "SMTP_HOSTNAME": "relay.test",
    "SMTP_STORAGE": "file",
    "SMTP_FSYNC": "0",
    "SMTP_SPOOL_MIN_FREE": "0",
    "SMTP_RETRY_INITIAL_DELAY": "0.03s",
    "SMTP_RETRY_MAX_DELAY": "0.1s",
    "SMTP_RELAY_TIMEOUT": "5s",
    "SMTP_BOUNCE": "0",
}


def wait_until(predicate: Callable[[], Any], timeout: float = 8.0) -> Any:
    """Return the first true value of predicate; fail the test when none comes in time."""
    end = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


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
        """Say the C: lines in random segments, hear the S: lines; a|b is either."""
        waiting = b""
        for side, _, text in (line.strip().partition(": ") for line in script.strip().split("\n")):
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
        self.output = home / "program.log"
        self.start()

    def spawn(self, *arguments: str, command: list[str] | None = None) -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"], **self.env}
        command = command or [sys.executable, str(PROGRAM)]
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


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Run programs that are killed at the end of the test."""
    with contextlib.ExitStack() as stack:

        def make(**settings: str) -> Program:
            home = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
            home.mkdir()
            made = Program(home, **settings)
            stack.callback(lambda: (made.process.kill(), made.process.wait()))
            return made

        yield make


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    env = {"PATH": os.environ["PATH"], **settings}
    command = [sys.executable, str(PROGRAM), *arguments]
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
                 users: dict[str, str] | None = None, methods: str = "PLAIN LOGIN CRAM-MD5") -> None:  # fmt: skip
        super().__init__(("127.0.0.1", 0), HopSession, bind_and_activate=False)
        self.script, self.offers, self.tls, self.implicit = dict(script or {}), offers.split(), tls, implicit
        self.users, self.methods = users, methods
        self.messages: list[Got] = []  # those it said 250 to
        self.refused: list[Got] = []  # whole, but not accepted
        self.commands: list[str] = []
        self.logins: list[tuple[str, str]] = []
        self.connections = 0
        self.closing, self.listening = threading.Event(), False
        self.server_bind()
        self.port = self.server_address[1]
        if listen:
            self.listen()

    def listen(self) -> None:
        self.server_activate()
        self.listening = True
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.closing.set()
        if self.listening:
            self.listening = False
            self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a peer that went away."""

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
        return {"SMTP_RELAY_HOST": f"127.0.0.1:{self.port}", **more}

    def delivered(self) -> collections.Counter[str]:
        """Count accepted messages by recipient."""
        return collections.Counter(path.split(">")[0].split("<")[-1] for got in self.messages for path in got.rcpts)


class HopSession(socketserver.StreamRequestHandler):
    """One connection to a FakeHop; `act` returns the code it gave, 0 when it is over."""

    server: FakeHop

    def handle(self) -> None:
        self.server.connections += 1
        self.number, self.secure, self.mail, self.rcpts = self.server.connections, False, "", []
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
        act = self.server.next_act([*more, stage], usual)
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
        offers = [f"SIZE {10**8}" if word == "SIZE" else word.replace("=", " ") for word in self.server.offers]
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
        self.mail, self.rcpts = line if code == 250 else "", []
        return code

    def do_rcpt(self, line: str) -> int:
        address = line.split("<")[-1].split(">")[0]
        usual = "250 2.1.5 ok" if self.mail else "503 5.5.1 MAIL first"
        code = self.act("rcpt", usual, f"rcpt {address}") if self.mail else self.say(usual)
        self.rcpts += [line] if code == 250 else []
        return code

    def do_data(self, line: str) -> int:
        if (code := self.act("data", "354 go on" if self.rcpts else "503 5.5.1 no recipients")) != 354:
            return code
        lines = []
        while (text := self.rfile.readline()) not in (b".\r\n", b""):
            lines.append(text[1:] if text.startswith(b".") else text)
        if text == b"":
            return 0
        got = Got(self.number, self.mail, tuple(self.rcpts), b"".join(lines), self.secure)
        code = self.act("end", "250 2.0.0 taken")
        (self.server.messages if code == 250 else self.server.refused).append(got)
        return code

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
        ({"SMTP_RELAY_HOTS": "x"}, 0, "SMTP_RELAY_HOTS.*SMTP_RELAY_HOST"),
        ({"SMTP_DELIVERY": "relay"}, 78, "SMTP_RELAY_HOST"),
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
    for name, default in {"SMTP_PORT": "2525", "SMTP_MAX_SIZE": "10MiB", "SMTP_RETRY_MAX_AGE": "5d", "SMTP_KEEP": "7d"}.items():
        assert re.search(rf"(?s){name}\b.{{0,400}}?{default}", text), name
    assert all(name in text for name in [*WRONG, "SMTP_RELAY_PASSWORD", "SMTP_DEBUG"])


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, bool(re.search(r"\d+\.\d+", done.stdout))) == (0, True)


def test_unknown_verb_is_a_usage_error() -> None:
    assert run("frobnicate").returncode in (2, 64)


# === OBSERVING ===============================================================


def test_nothing_a_client_sends_can_forge_a_log_line(program: Callable[..., Program]) -> None:
    relay = program(SMTP_DEBUG="1", SMTP_LOG_LEVEL="debug")
    with hello(relay) as client:
        for line in ('MAIL FROM:<"\\u001b[31m"@x>', "FOO\rforged line", "NOOP \x00\x1b]0;title\x07", "VRFY \u2028\u0085"):
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
    lines = [json.loads(line) for line in relay.log().splitlines() if not line.startswith("smtprelay ")]
    assert any(queue_id in json.dumps(line) for line in lines)


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


# === WIRE ====================================================================

TALK = {
    "the usual": """
        C: EHLO client.test
        S: 250-relay.test
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: RCPT TO:<bob@hop.test>
        S: 250 2.1.5
        C: DATA
        S: 354
        C: Subject: x\\r\\n\\r\\nbody\\r\\n.
        S: 250 2.0.0
        C: QUIT
        S: 221 2.0.0
        S: closed""",
    "pipelined, replies in order": """
        C: EHLO client.test
        S: 250-relay.test
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
        C: heLO client.test
        S: 250 relay.test
        C: mail from:<ann@client.test>\\x20
        S: 250 2.1.0
        C: rcpt to:<bob@hop.test>
        S: 250 2.1.5
        C: data\\x20
        S: 354
        C: .
        S: 250 2.0.0""",
    "out of order": """
        C: MAIL FROM:<ann@client.test>
        S: 503 5.5.1
        C: EHLO client.test
        S: 250-relay.test
        C: RCPT TO:<bob@hop.test>
        S: 503 5.5.1
        C: DATA
        S: 503 5.5.1
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: DATA
        S: 503 5.5.1|554 5.5.1
        C: MAIL FROM:<ann@client.test>
        S: 503 5.5.1
        C: RCPT TO:<bob
        S: 501 5.1.3
        C: DATA
        S: 554 5.5.1|503 5.5.1
        C: RCPT TO:<bob@hop.test>
        S: 250 2.1.5
        C: DATA
        S: 354
        C: .
        S: 250 2.0.0
        C: RCPT TO:<bob@hop.test>
        S: 503 5.5.1""",
    "RSET, EHLO and HELO end a transaction": """
        C: EHLO client.test
        S: 250-relay.test
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: RSET
        S: 250 2.0.0
        C: RCPT TO:<bob@hop.test>
        S: 503 5.5.1
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: EHLO client.test
        S: 250-relay.test
        C: RCPT TO:<bob@hop.test>
        S: 503 5.5.1
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: HELO client.test
        S: 250 relay.test
        C: DATA
        S: 503 5.5.1""",
    "what else there is": """
        C: HELP
        S: 214
        C: NOOP
        S: 250 2.0.0
        C: NOOP with words
        S: 250 2.0.0
        C: RSET
        S: 250 2.0.0
        C: EHLO client.test
        S: 250-relay.test
        C: HELP MAIL
        S: 214
        C: VRFY bob
        S: 252
        C: EXPN list
        S: 502 5.5.1|252|550
        C: VRFY
        S: 501 5.5.4
        C: RSET now
        S: 501 5.5.4
        C: DATA now
        S: 501 5.5.4|503 5.5.1
        C: QUIT now
        S: 501 5.5.4""",
    "not a command": """
        C: EHLO client.test
        S: 250-relay.test
        C: FOO
        S: 500 5.5.2
        C: \\x20
        S: 500 5.5.2
        C: \\x00NOOP
        S: 500 5.5.2|501 5.5.4
        C: NOOP\\x00
        S: 500 5.5.2|501 5.5.4
        C: NOOP \\x7f\\x1b[2J
        S: 500 5.5.2|501 5.5.4
        C: NOOP \\xff\\xfe
        S: 500 5.5.2|501 5.5.4
        C: \\xd0\\x9d\\xd0\\x9e
        S: 500 5.5.2|501 5.5.4
        C: NOOP\\rNOOP
        S: 500 5.5.2|501 5.5.4
        C: TURN
        S: 500 5.5.2|502 5.5.1
        C: NOOP
        S: 250 2.0.0""",
    "EHLO and HELO want a name": """
        C: EHLO
        S: 501 5.5.4
        C: HELO
        S: 501 5.5.4
        C: EHLO bad\\x01name
        S: 501 5.5.4|500 5.5.2
        C: EHLO [127.0.0.1]
        S: 250-relay.test
        C: EHLO [IPv6:::1]
        S: 250-relay.test
        C: EHLO under_score
        S: 250-relay.test""",
    "BDAT": """
        C: EHLO client.test
        S: 250-relay.test
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
        C: EHLO client.test
        S: 250-relay.test
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
        C: EHLO client.test
        S: 250-relay.test
        C: BDAT 6\\r\\nRSET
        C: NOOP
        S: 503 5.5.1
        S: 250 2.0.0
        C: MAIL FROM:<ann@client.test>
        S: 250 2.1.0
        C: BDAT 6 LAST\\r\\nRSET
        C: NOOP
        S: 503 5.5.1|554 5.5.1
        S: 250 2.0.0
        C: RSET
        S: 250 2.0.0
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        C: BDAT 6\\r\\nabcd
        S: 250 2.1.0
        S: 250 2.1.5
        S: 250 2.0.0
        C: DATA
        S: 503 5.5.1
        C: MAIL FROM:<ann@client.test>
        S: 503 5.5.1
        C: RCPT TO:<carol@hop.test>
        S: 503 5.5.1
        C: RSET
        S: 250 2.0.0
        C: BDAT 0 LAST
        S: 503 5.5.1""",
    "BDAT arguments": """
        C: EHLO client.test
        S: 250-relay.test
        C: MAIL FROM:<ann@client.test>
        C: RCPT TO:<bob@hop.test>
        S: 250 2.1.0
        S: 250 2.1.5
        C: BDAT
        S: 501 5.5.4
        C: BDAT x
        S: 501 5.5.4
        C: BDAT -1
        S: 501 5.5.4
        C: BDAT +1
        S: 501 5.5.4
        C: BDAT \\xb2
        S: 501 5.5.4|500 5.5.2
        C: NOOP
        S: 250 2.0.0""",
    "too many recipients, the good ones kept": """
        C: EHLO client.test
        S: 250-relay.test
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
        C: .
        S: 250 2.0.0""",
    "declared too big": """
        C: EHLO client.test
        S: 250-relay.test
        C: MAIL FROM:<ann@client.test> SIZE=20001
        S: 552 5.3.4
        C: MAIL FROM:<ann@client.test> SIZE=20000
        S: 250 2.1.0""",
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
    "nothing": b"",
    "an empty line": b"\r\n",
    "a dot": b".\r\n",
    "dots": b".\r\n..\r\n...\r\n.a\r\n. \r\n\r\n.\r\n",
    "no headers": b"just words\r\n",
    "begins with a blank": b" folded?\r\n\r\nbody\r\n",
    "8 bit": bytes(range(128, 256)) + b"\r\n",
    "NUL and controls": bytes(set(range(32)) - {10, 13}) + b"\r\n\x7f\r\n",
    "a long line": b"x" * 15000 + b"\r\n",
    "our own headers": b"X-Envelope-To: <evil@x.test>\r\nReceived: from nowhere\r\n\r\n.\r\n",
    "many short lines": b".\r\n" * 3000,
}


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


NEAR_ENDS = [b"\n.\n", b"\r\n.\n", b"\n.\r\n", b"\r.\r", b"\r.\r\n", b"\r\n.\r", b"\n\n.\r\n", b"\r\n.\r\r\n", b"\r\n.\n\r\n",
             b"\r\n\r.\r\n", b"a\nb", b"a\rb", b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"\r\n\n.\r", b"\x00\n.\x00\r\n"]  # fmt: skip


@pytest.mark.parametrize("near", NEAR_ENDS)
@pytest.mark.parametrize("filler", [b"", b"x" * 70 + b"\r\n", b"y" * 30000 + b"\r\n"], ids=["short", "line", "over-long"])
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
        for chunks, want in (((b"a\nb\r\n",), "554 5.6.0"), ((b"a\rb\r\n",), "554 5.6.0"), ((b"a\r", b"b"), "554 5.6.0"),
                             ((b"a\r", b"\nb\r\n"), "250 2.0.0"), ((b"no newline at the end",), "250 2.0.0")):  # fmt: skip
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


SLOW = [
    ("SMTP_COMMAND_TIMEOUT", [], b""),
    ("SMTP_COMMAND_TIMEOUT", ["EHLO x"], b"N" * 1000),
    ("SMTP_DATA_TIMEOUT", ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@hop.test>", "DATA"], b"x\r\n" * 1000),
    ("SMTP_DATA_TIMEOUT", ["EHLO x", "MAIL FROM:<>", "RCPT TO:<b@hop.test>", "BDAT 5000"], b"x\r\n" * 1000),
    ("SMTP_SESSION_TIMEOUT", ["EHLO x"], b"NOOP\r\n" * 1000),
]


@pytest.mark.parametrize(("name", "lines", "trickle"), SLOW)
def test_deadlines_are_absolute(start: Callable[..., Any], name: str, lines: list[str], trickle: bytes) -> None:
    relay = start(SMTP_STORAGE="memory", **{name: "0.3s"})
    began = time.monotonic()
    with dial(relay) as client, contextlib.suppress(ConnectionError):
        for line in lines[:-1] if "BDAT" in str(lines) else lines:
            client.ask(line)
        client.send((lines[-1] + "\r\n").encode() if "BDAT" in str(lines) else b"")
        client.sock.settimeout(0.02)
        answer = drip(client, trickle)
    assert 0.2 < time.monotonic() - began < 2
    assert answer == b"" or answer.splitlines()[-1].startswith(b"421 4.4.2")


def drip(client: Dialogue, data: bytes) -> bytes:
    """Send an octet each 20 ms until the other side has closed; return what it said."""
    heard = b""
    for position in range(200):
        client.sock.sendall(data[position : position + 1])
        with contextlib.suppress(TimeoutError, socket.timeout):
            if not (block := client.sock.recv(4096)):
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


HTTP_REQUESTS = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"CONNECT x:25 HTTP/1.1\r\n\r\n", b"PUT /a HTTP/1.0\r\n\r\n",
                 b"POST / HTTP/1.1\r\nHost: x\r\n\r\nEHLO x\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<c@d.test>\r\n"]  # fmt: skip


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


# === GRAMMAR =================================================================

LONG = "x" * 64
GOOD_PATHS = {
    "<ann@b.test>": "ann@b.test",
    "<>": "",
    "<ann+tag@b>": "ann+tag@b",
    "<ann@[127.0.0.1]>": "ann@[127.0.0.1]",
    "<ann@[IPv6:::1]>": "ann@[IPv6:::1]",
    '<"an n"@b.test>': '"an n"@b.test',
    '<"a>b"@b.test>': '"a>b"@b.test',
    '<"a\\"b@c"@b.test>': '"a\\"b@c"@b.test',
    "<@one.test,@two.test:ann@b.test>": "ann@b.test",
    "<!#$%&'*+-/=?^_`{|}~@b.test>": "!#$%&'*+-/=?^_`{|}~@b.test",
    f"<{LONG}@b.test>": f"{LONG}@b.test",
    "<ann@b-1.2c.test>": "ann@b-1.2c.test",
}
BAD_PATHS = [
    "<ann@b.test", "<ann@@b.test>", "<an n@b.test>", "<@b.test>", "<ann@>", "<ann@b.test>x", "<ann@[999.1.1.1]>",
    "<ann@[IPv6:zz]>", "<ann@[]>", "<ann@[127.0.0.1>", '<"ann@b.test>', '<"a"b@c.test>', "<@one.test:>", "<<ann@b.test>>",
    "<ann@b.test>>", "<ann@b..test>", "<ann@.test>", f"<{LONG * 12}@b.test>", f"<ann@{'a.' * 1000}test>",
    f"<{'@x.test,' * 200}@y.test:ann@b.test>", "<ann@b.test,bob@b.test>", "<ann@b(c).test>", "", "<", ">", "<ann@b,test>",
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
    ("", "501 5.5.4"),
    ("TO:<ann@b.test>", "501 5.5.4|501 5.1.7"),
    ("FROM", "501 5.5.4"),
    ("from: <ann@b.test>", "250 2.1.0"),
    ("FROM:<ann@b.test> SIZE=100 BODY=8BITMIME", "250 2.1.0"),
    ("FROM:<ann@b.test> body=7bit", "250 2.1.0"),
    ("FROM:<ann@b.test> SMTPUTF8", "250 2.1.0"),
    ("FROM:<ann@b.test> SIZE=", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=abc", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=-1", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE", "501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=" + "9" * 20, "552 5.3.4|501 5.5.4"),
    ("FROM:<ann@b.test> SIZE=" + "9" * 900, "552 5.3.4|501 5.5.4|500 5.5.2"),
    ("FROM:<ann@b.test> BODY=BINARYMIME", "501 5.5.4|555 5.5.4"),
    ("FROM:<ann@b.test> BODY", "501 5.5.4"),
    ("FROM:<ann@b.test> SMTPUTF8=1", "501 5.5.4"),
    ("FROM:<ann@b.test> FOO=bar", "555 5.5.4"),
    ("FROM:<ann@b.test> FOO", "555 5.5.4"),
    ("FROM:<\u00e4nn@b.test>", "553 5.6.7"),
    ("FROM:<\u00e4nn@b\u00fc.test> SMTPUTF8", "250 2.1.0"),
]


@pytest.mark.parametrize(("argument", "want"), MAIL_ARGUMENTS)
def test_mail_arguments(holding: Any, argument: str, want: str) -> None:
    with hello(holding) as client:
        client.ask(f"MAIL {argument}", want)


RCPT_ARGUMENTS = [
    ("TO:<postmaster>", "250 2.1.5"),
    ("to:<PostMaster>", "250 2.1.5"),
    ("TO:<>", "501 5.1.3"),
    ("TO:<bob>", "501 5.1.3"),
    ("TO:<bob@hop.test> FOO=1", "555 5.5.4"),
    ("TO:<b\u00f6b@hop.test>", "553 5.6.7"),
    ("", "501 5.5.4"),
    ("FROM:<bob@hop.test>", "501 5.5.4|501 5.1.3"),
]


@pytest.mark.parametrize(("argument", "want"), RCPT_ARGUMENTS)
def test_rcpt_arguments(holding: Any, argument: str, want: str) -> None:
    with hello(holding) as client:
        client.ask("MAIL FROM:<ann@b.test>", "250 2.1.0")
        client.ask(f"RCPT {argument}", want)


@pytest.mark.parametrize("octets", [b"\x00", b"\x01", b"\t\x0b", b"\x7f", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\r"])
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
    assert (record["reverse_path"], record["recipients"][0]["address"]) == ("\u00e4nn@b\u00fc.test", "b\u00f6b@hop.test")


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
    assert set(record) >= {"v", "id", "status", "received_at", "client", "helo", "protocol", "user", "reverse_path", "size",
                           "recipients", "attempts", "next_attempt_at", "last_error", "history", "finished_at"}  # fmt: skip
    assert set(record["recipients"][0]) >= {"address", "status", "code", "reply", "host"}
    assert set(record["history"][0]) == {"at", "status", "detail"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", record["received_at"])
    assert (record["size"], record["client"], record["helo"], record["status"]) == (len(MAIL), "127.0.0.1", "client.test", "held")


@pytest.mark.parametrize(
    ("script", "status", "suffix"),
    [({}, "forwarded", ".forwarded.json"), ({"mail": "550 5.1.0 no"}, "failed", ".failed.json"), ({"mail": "450 4.2.0 wait"}, "retrying", ".json")],
)
def test_the_name_of_the_record_says_how_it_stands(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop],
                                                   script: Script, status: str, suffix: str) -> None:  # fmt: skip
    spool, next_hop = Spool(tmp_path / "spool"), hop(script=script)
    said(start(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_BOUNCE="0", **next_hop.settings()))
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


def linked(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


STRANGE = {
    "an .eml that is cut short": cut_short,
    "an empty .eml": lambda path: path.write_bytes(b""),
    "an .eml that is not ours": lambda path: path.write_bytes(b"From: x\r\n\r\n" * 100),
    "a symbolic link": linked,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_does_not_parse_is_set_aside(program: Callable[..., Program], hop: Callable[..., FakeHop], name: str) -> None:
    relay, next_hop = program(**DEAF), hop()
    bad, good = said(relay, MAIL, MAIL)
    relay.stop(signal.SIGKILL)
    [path] = relay.spool.files(f"{bad}*.eml")
    for sidecar in relay.spool.files("*.json"):
        sidecar.unlink()
    STRANGE[name](path)
    relay.start(**next_hop.settings())
    wait_until(lambda: list((relay.spool.root / "bad").rglob(f"*{bad}*")))
    relay.spool.await_status("forwarded", good)
    assert len(next_hop.messages) == 1
    assert bad in relay.log()


@pytest.mark.parametrize("place", ["notes.txt", "2026-11-20/notes.txt", "2026-11-20/x_y.eml", "2026-99-99/a.eml"])
def test_foreign_names_are_set_aside(program: Callable[..., Program], place: str) -> None:
    relay = program()
    relay.stop()
    path = relay.spool.root / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    relay.start()
    wait_until(lambda: any(p.is_file() and p.read_text() == "mine" for p in (relay.spool.root / "bad").rglob("*")))
    said(relay)


@pytest.mark.parametrize("damage", ["kept", "removed", "torn", "garbage"])
def test_what_is_owed_is_delivered_after_a_kill(program: Callable[..., Program], hop: Callable[..., FakeHop], damage: str) -> None:
    relay, next_hop = program(**DEAF), hop()
    content = b"X-Envelope-To: <evil@x.test>\r\n\r\n.\r\n\x00\xff\r\n"
    [queue_id] = said(relay, content, to=("bob@hop.test", '"carol c"@hop.test'))
    relay.spool.known()
    relay.stop(signal.SIGKILL)
    for path in relay.spool.files("*.json"):
        if damage == "removed":
            path.unlink()
        elif damage != "kept":
            path.write_bytes(path.read_bytes()[:50] if damage == "torn" else b'{"v": 1, "recipients": 7}')
    relay.start(**next_hop.settings())
    relay.spool.await_status("forwarded", queue_id)
    assert next_hop.delivered() == {"bob@hop.test": 1, '"carol c"@hop.test': 1}
    assert next_hop.messages[0].content.endswith(b"\r\n" + content)
    assert next_hop.messages[0].content.startswith(b"Received: from client.test")


def test_a_recipient_that_was_served_is_not_served_again(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"rcpt carol@hop.test": "450 4.2.1 busy"})
    relay = program(SMTP_RETRY_INITIAL_DELAY="1h", **next_hop.settings())
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
        answer = client.ask("MAIL FROM:<ann@client.test> SIZE=5000")
        if answer.startswith("250"):
            client.ask("RCPT TO:<bob@hop.test>")
            answer = client.ask("DATA")
        if answer.startswith("354"):
            client.send(b"x" * 4000 + b"\r\n.\r\n")
            answer = client.reply()
        assert answer.startswith("452 4.3.1")
        client.ask("NOOP", "250")


@pytest.mark.parametrize(("settings", "left"), [({"SMTP_SPOOL_MAX_MESSAGES": "2"}, 2), ({"SMTP_SPOOL_MAX_SIZE": "10K"}, 2)])
def test_the_oldest_held_message_makes_room(start: Callable[..., Any], tmp_path: Path, settings: dict[str, str], left: int) -> None:
    spool = Spool(tmp_path / "spool")
    ids = said(start(**settings), *[b"x" * 4000 + b"\r\n"] * 4)
    wait_until(lambda: [path.name.partition("_")[0] for path in spool.files("*.eml")] == ids[-left:])


def test_finished_messages_go_when_their_time_is_over(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
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


# === SCHEDULER ===============================================================


def test_attempts_are_counted_and_end(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"mail": "450 4.2.0 never"})
    said(start(SMTP_RETRY_MAX_ATTEMPTS="3", SMTP_BOUNCE="0", **next_hop.settings()))
    record = Spool(tmp_path / "spool").await_status("failed")
    assert (record["attempts"], sum(line.startswith("MAIL") for line in next_hop.commands)) == (3, 3)
    assert record["recipients"][0]["code"] == 450


def test_one_attempt_only_without_retry(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"end": "451 4.3.0 later"})
    said(start(SMTP_RETRY="0", **next_hop.settings()))
    assert Spool(tmp_path / "spool").await_status("failed")["attempts"] == 1
    assert len(next_hop.refused) == 1


def test_a_message_that_is_too_old_fails(start: Callable[..., Any], tmp_path: Path) -> None:
    said(start(SMTP_RETRY_MAX_AGE="0.3s", **DEAF))
    Spool(tmp_path / "spool").await_status("failed")


def test_an_unreachable_host_costs_no_attempt(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
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


# === DELIVERY ================================================================

BUSY = "450 4.2.1 busy"
PASSING = [  # trouble that comes once: the message arrives all the same
    *[(stage, act) for stage in ("greeting", "ehlo", "mail", "rcpt", "data", "end") for act in
      ("drop", "reset", "421 4.3.2 closing", "drop 421 4.3.2 bye", "451 4.3.0 later", "raw \\xff\\x00\\r\\n", "endless 250-more\\r\\n",
       "endless x", "hang")],
    ("connect", "drop"), ("greeting", "554 5.3.2 no service"), ("greeting", "trickle 220 hop.test"), ("ehlo", "502 5.5.1 what?"),
    ("ehlo", "trickle 250 hop.test"), ("mail", "trickle 250 2.1.0 ok"), ("rcpt bob@hop.test", BUSY),
    ("rcpt bob@hop.test", "452 4.5.3 too many"), ("end", "trickle 250 2.0.0 ok"), ("end", "451 4.3.0 one\n451 4.3.0 two"),
    ("quit", "hang"), ("quit", "500 5.5.2 no"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "act"), PASSING)
@pytest.mark.parametrize("offers", ["PIPELINING 8BITMIME SIZE", ""], ids=["pipelined", "plain"])
def test_passing_trouble(start: Callable[..., Any], hop: Callable[..., FakeHop], stage: str, act: str, offers: str) -> None:
    next_hop = hop(script={stage: [act]}, offers=offers)
    relay = start(SMTP_STORAGE="memory", SMTP_RELAY_TIMEOUT="0.3s", **next_hop.settings())
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
    said(start(SMTP_RETRY_INITIAL_DELAY="1h", **next_hop.settings()), to=("bob@hop.test", "carol@hop.test"))
    whole = next(status for status in ("retrying", "failed", "forwarded") if status in (bob[0], carol[0]))
    record = spool.await_status(whole)
    assert [(r["status"], r["code"]) for r in record["recipients"]] == [bob, carol]
    wanted = [text[4:9] for text in script.values()] if whole == "retrying" else []
    assert all(any(word in str(record["recipients"]) for word in wanted[:1]) for _ in wanted)


def test_no_answer_after_the_final_dot_may_be_a_duplicate(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(script={"end": ["drop"]})
    relay = program(**next_hop.settings())
    said(relay)
    relay.spool.await_status("forwarded")
    assert (len(next_hop.refused) + len(next_hop.messages), "duplicate" in relay.log()) == (2, True)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_content_arrives_octet_by_octet(start: Callable[..., Any], hop: Callable[..., FakeHop], content: bytes) -> None:
    next_hop = hop()
    said(start(**next_hop.settings()), content)
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


def test_utf8_addresses_need_smtputf8_at_the_next_hop(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop = hop(offers="8BITMIME")
    with hello(start(SMTP_BOUNCE="0", **next_hop.settings())) as client:
        client.ask("MAIL FROM:<ann@client.test> SMTPUTF8", "250")
        client.ask("RCPT TO:<böb@hop.test>", "250")
        client.content(b".\r\n")
    assert "SMTPUTF8" in str(Spool(tmp_path / "spool").await_status("failed")["recipients"])
    assert (next_hop.messages, next_hop.refused) == ([], [])


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
    ("opportunistic", "right", False, RIGHT_CA, True),
    ("none", "right", False, {}, False),
    ("tls", "right", True, RIGHT_CA, True),
    ("tls", "right", True, {}, None),
    ("", "right", False, RIGHT_CA, True),
]


@pytest.mark.parametrize(("tls", "pair", "implicit", "more", "secure"), TLS_CASES)
def test_tls_to_the_next_hop(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop], pairs: dict[str, Pair], tls: str,
                             pair: str, implicit: bool, more: dict[str, str], secure: bool | None) -> None:  # fmt: skip
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


@pytest.mark.parametrize(("methods", "asked", "used"), [
    ("PLAIN LOGIN CRAM-MD5", "plain", "PLAIN"), ("PLAIN LOGIN CRAM-MD5", "login", "LOGIN"),
    ("PLAIN LOGIN CRAM-MD5", "cram-md5", "CRAM-MD5"), ("LOGIN", "auto", "LOGIN"), ("PLAIN", "auto", "PLAIN"), ("LOGIN", "", "LOGIN"),
])  # fmt: skip
def test_login_at_the_next_hop(start: Callable[..., Any], hop: Callable[..., FakeHop], methods: str, asked: str, used: str) -> None:
    next_hop = hop(users={"ann": "pass word"}, methods=methods)
    login = {"SMTP_RELAY_USERNAME": "ann", "SMTP_RELAY_PASSWORD": "pass word"}
    said(start(**next_hop.settings(), **login, **({"SMTP_RELAY_AUTH": asked} if asked else {})))
    wait_until(lambda: next_hop.messages)
    assert next_hop.logins == [(used, "ann")]


def test_a_refused_login_is_the_hosts_trouble(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    next_hop, login = hop(users={"ann": "new"}), {"SMTP_RELAY_USERNAME": "ann", "SMTP_RELAY_PASSWORD": "old"}
    said(start(SMTP_RETRY_MAX_ATTEMPTS="1", **next_hop.settings(), **login))
    wait_until(lambda: len(next_hop.logins) >= 2)
    assert next_hop.users
    next_hop.users["ann"] = "old"
    assert Spool(tmp_path / "spool").await_status("forwarded")["attempts"] == 1


def test_connections_are_reused_and_a_lost_one_costs_nothing(start: Callable[..., Any], tmp_path: Path, hop: Callable[..., FakeHop]) -> None:
    spool, next_hop = Spool(tmp_path / "spool"), hop(script={"end": ["250 2.0.0 ok", "250 2.0.0 ok", "drop 250 2.0.0 bye"]})
    relay = start(SMTP_WORKERS="1", SMTP_RELAY_CONNECTIONS="1", SMTP_RETRY_MAX_ATTEMPTS="1", **next_hop.settings())
    for _ in range(4):
        spool.await_status("forwarded", *said(relay))
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


# === SESSION =================================================================


def test_the_final_reply_names_the_queue_id_in_the_files(holding: Any, held: Spool) -> None:
    [queue_id] = said(holding)
    assert [path.name.split("_")[0] for path in held.files(f"{queue_id}_*.eml")] == [queue_id]


@pytest.mark.parametrize(("count", "where", "want"), [(50, "head", "250"), (51, "head", "554 5.4.6"), (60, "body", "250")])
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


# === LISTENER ================================================================


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


# === HTTP ====================================================================


@pytest.mark.parametrize(("method", "path", "status"), [
    *[("GET", path, 200) for path in ("/healthz", "/health", "/readyz", "/livez", "/metrics", "/debug/vars", "/metrics?format=prometheus")],
    ("HEAD", "/healthz", 200), ("GET", "/nothing", 404), ("POST", "/healthz", 405), ("DELETE", "/metrics", 405), ("GET", "/../etc/passwd", 404),
])  # fmt: skip
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


METRICS = """smtp_messages_received_total smtp_messages_queued_total smtp_messages_delivered_total smtp_messages_deferred_total
    smtp_messages_failed_total smtp_messages_expired_total smtp_messages_rejected_total smtp_delivery_failures_total
    smtp_bytes_received_total smtp_queue_depth smtp_queue_oldest_age_seconds smtp_sessions_active smtp_connections_total
    smtp_connections_refused_total smtp_delivery_duration_seconds smtp_disk_free_bytes smtp_uptime_seconds smtp_build_info""".split()


def test_metrics_in_both_forms(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:
    relay = start(SMTP_MAX_SIZE="100", **hop(script={"rcpt bob@hop.test": "550 5.1.1 who?"}).settings())
    said(relay, MAIL, to=("bob@hop.test",))
    said(relay, MAIL, to=("carol@hop.test",))
    with hello(relay) as client:
        assert client.mail(b"x" * 200 + b"\r\n").startswith("552")
    for name, value in {"received": 2, "delivered": 1, "failed": 1}.items():
        wait_until(lambda name=name, value=value: metric(relay, f"smtp_messages_{name}_total") == value)
    flat = json.loads(fetch(relay, "/debug/vars")[2])
    assert {"cmdline", "memstats"} <= set(flat)
    assert [name for name in METRICS if not any(key.startswith(name) for key in flat)] == []
    assert metric(relay, "smtp_bytes_received_total") >= 2 * len(MAIL)
    for text in (fetch(relay, "/metrics?format=prometheus"), fetch(relay, "/metrics", Accept="text/plain;version=0.0.4")):
        assert text[1].startswith("text/plain") and "version=0.0.4" in text[1]
        assert [name for name in METRICS if f"# TYPE {name} " not in text[2]] == []
        assert re.search(r'(?m)^smtp_messages_rejected_total\{code="552"\} 1$', text[2])
        assert "@" not in text[2]
    checked = subprocess.run([need("promtool"), "check", "metrics"], input=text[2], capture_output=True, text=True, timeout=20)
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
    for data in (b"\x00\xff\r\n\r\n", b"GET " + b"/" * 100000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n"):
        with socket.create_connection((host, int(port)), 8) as client, contextlib.suppress(ConnectionError):
            client.sendall(data)
            assert re.match(rb"HTTP/1\.[01] 4\d\d|.*Error code: 4\d\d|$", client.recv(4096), re.S)
    assert fetch(holding, "/livez")[0] == 200


# === RELAY ===================================================================


def need(program: str) -> str:
    """Return where a program is; skip the test when it is nowhere."""
    path = shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin:/usr/lib/postfix/sbin")
    return path or pytest.skip(f"{program} is not installed")


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


def test_a_stop_waits_for_nobody_longer_than_ten_seconds(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    relay = program(**hop(script={"end": "hang"}).settings())
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
    assert time.monotonic() - began < 10


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


def test_a_socket_from_systemd_is_used(program: Callable[..., Program]) -> None:
    relay = program()
    relay.stop()
    with socket.create_server(("127.0.0.1", 0)) as given:
        code = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
                "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); os.execv(sys.executable, [sys.executable, sys.argv[2]])")  # fmt: skip
        command = [sys.executable, "-c", code, str(given.fileno()), str(PROGRAM)]
        with relay.output.open("wb") as output:
            relay.process = subprocess.Popen(command, env={"PATH": os.environ["PATH"], **relay.env}, stdout=output, stderr=output,
                                             pass_fds=[given.fileno()])  # fmt: skip
        wait_until(relay.ready)
        relay.port = given.getsockname()[1]
    said(relay)
    with dial(relay) as client:
        assert client.greeting.startswith("220 relay.test")


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


def test_nothing_acknowledged_is_lost_by_sigkill(program: Callable[..., Program], hop: Callable[..., FakeHop]) -> None:
    next_hop, rng, stop = hop(script={"end": ["451 4.3.0 later", "drop"] * 20}), random.Random(7), threading.Event()
    relay, acknowledged = program(SMTP_FSYNC="1", **next_hop.settings()), set[str]()
    clients = [threading.Thread(target=load, args=(relay, acknowledged, stop, name), daemon=True) for name in "abc"]
    for client in clients:
        client.start()
    for _ in range(3):
        enough = len(acknowledged) + rng.randint(20, 60)
        wait_until(lambda enough=enough: len(acknowledged) >= enough)
        relay.stop(signal.SIGKILL)
        relay.start()
    stop.set()
    for client in clients:
        client.join(10)

    def arrived() -> set[str]:
        return {got.content.split(b"Subject: ")[1].split(b"\r\n")[0].decode() for got in list(next_hop.messages)}

    wait_until(lambda: acknowledged <= arrived(), 20)
    assert len(acknowledged) > 60
    assert set(os.listdir(relay.spool.root / "bad")) == set() or all("part" in str(p) for p in (relay.spool.root / "bad").rglob("*.*"))


LETTER = b"From: ann@client.test\nTo: bob@hop.test\nSubject: gr\xc3\xbc\xc3\x9fe\n\n.\n..\nbody \xe2\x82\xac\n" + b"y" * 900 + b"\n"


def by_curl(relay: Any, letter: Path) -> None:
    command = [need("curl"), "-sS", "--crlf", f"smtp://127.0.0.1:{relay.port}/client.test", "--mail-from", "ann@client.test"]
    subprocess.run([*command, "--mail-rcpt", "bob@hop.test", "-T", str(letter)], check=True, timeout=20)


def by_swaks(relay: Any, letter: Path) -> None:
    command = [need("swaks"), "--server", f"127.0.0.1:{relay.port}", "--from", "ann@client.test", "--to", "bob@hop.test", "--pipeline"]
    subprocess.run([*command, "--data", f"@{letter}"], check=True, capture_output=True, timeout=20)


def by_smtplib(relay: Any, letter: Path) -> None:
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.sendmail("ann@client.test", ["bob@hop.test"], letter.read_bytes().replace(b"\n", b"\r\n"), ["BODY=8BITMIME"])


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
        dumps = wait_until(lambda: [p.read_bytes() for p in tmp_path.glob("[0-9]*.*") if b"One line." in p.read_bytes()])
        assert len(dumps) == 20
    finally:
        sink.kill()
        sink.wait()


POSTFIX_MAIN = """
compatibility_level = 3.6
queue_directory = {home}/queue
data_directory = {home}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
maillog_file = {home}/log
maillog_file_prefixes = {home}
myhostname = postfix.test
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
mydestination =
virtual_mailbox_domains = hop.test
virtual_mailbox_base = {home}/mail
virtual_mailbox_maps = static:box/
virtual_uid_maps = static:65534
virtual_gid_maps = static:65534
smtpd_recipient_restrictions = permit_mynetworks, reject
local_header_rewrite_clients =
"""
POSTFIX_MASTER = """
127.0.0.1:{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
proxymap unix - - n - - proxymap
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
error unix - - n - - error
virtual unix - n n - - virtual
anvil unix - - n - 1 anvil
postlog unix-dgram n - n - 1 postlogd
"""


@pytest.fixture
def postfix(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Run a Postfix of our own; yield its port and its one maildir."""
    command, port, home = need("postfix"), free_port(), tmp_path / "postfix"
    if os.geteuid() != 0:
        pytest.skip("Postfix must be started by root")
    for name, user in (("etc", "root"), ("queue", "root"), ("data", "postfix"), ("mail", "nobody")):
        (home / name).mkdir(parents=True)
        shutil.chown(home / name, user)
    for parent in [home, *list(home.parents)[:-2]]:
        parent.chmod(parent.stat().st_mode | 0o055)
    (home / "etc/main.cf").write_text(POSTFIX_MAIN.format(home=home))
    (home / "etc/master.cf").write_text(POSTFIX_MASTER.format(port=port))
    control = [command, "-c", str(home / "etc")]
    subprocess.run([*control, "start"], check=True, capture_output=True, timeout=20)
    try:
        wait_until(lambda: answers(port))
        yield port, home / "mail/box/new"
    finally:
        subprocess.run([*control, "stop"], check=True, capture_output=True, timeout=20)


def test_forwarding_into_postfix(start: Callable[..., Any], tmp_path: Path, postfix: tuple[int, Path]) -> None:
    port, box = postfix
    relay = start(SMTP_RELAY_HOST=f"127.0.0.1:{port}")
    content = LETTER.replace(b"\n", b"\r\n")
    said(relay, *[content] * 10)
    wait_until(lambda: box.exists() and len(list(box.iterdir())) == 10)
    assert all(path.read_bytes().endswith(LETTER) for path in box.iterdir())
    with hello(relay) as client:
        client.ask("MAIL FROM:<> BODY=8BITMIME", "250")
        client.ask("RCPT TO:<stranger@elsewhere.test>", "250")
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


# === COMMAND LINE ============================================================


def test_first_lines_name_what_was_bound_where_mail_goes_and_the_spool(program: Callable[..., Program]) -> None:
    for settings, words in (({}, "held"), ({"SMTP_RELAY_HOST": "127.0.0.1:9"}, "127.0.0.1:9")):
        relay = program(**settings)
        wait_until(lambda relay=relay, words=words: words in relay.log() and str(relay.spool.root) in relay.log())


def test_verification_that_is_off_is_a_warning(program: Callable[..., Program]) -> None:
    relay = program(SMTP_RELAY_TLS_VERIFY="0", **DEAF)
    wait_until(lambda: re.search(r"(?i)warn.*SMTP_RELAY_TLS_VERIFY", relay.log()))


# === SHAPE ===================================================================
# What the file itself looks like.

BANNER = re.compile(r"(?m)^# === (?:\d\d )?([A-Z]+(?: [A-Z]+)*) =+$")
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_length(function: Any) -> int:
    """Count the lines of a function without its docstring."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return int(function.end_lineno - first.lineno + 1)


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
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else [node]
        for target in targets:
            name = getattr(target, "id", None) or getattr(target, "name", "")
            home.setdefault(name, chapter(node))
    local = {name.arg for name in ast.walk(TREE) if isinstance(name, ast.arg)}
    local |= {n.id for f in FUNCTIONS for n in ast.walk(f) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    notes = [a.annotation for a in ast.walk(TREE) if isinstance(a, (ast.arg, ast.AnnAssign))] + [f.returns for f in FUNCTIONS]
    local |= {n.id for note in notes if note for n in ast.walk(note) if isinstance(n, ast.Name)}  # types may look ahead
    late = {f"{node.id} in line {node.lineno}" for node in ast.walk(TREE)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and home.get(node.id, 0) > chapter(node) and node.id not in local}  # fmt: skip
    assert late == set()


def test_functions_are_short() -> None:
    lengths = sorted(body_length(function) for function in FUNCTIONS)
    assert [f.name for f in FUNCTIONS if body_length(f) > 45] == []
    assert statistics.median(lengths) <= 8
    assert lengths[len(lengths) * 9 // 10] < 25


def test_every_signature_has_its_types() -> None:
    bare = [f.name for f in FUNCTIONS for a in [*f.args.args, *f.args.kwonlyargs] if not a.annotation and a.arg not in ("self", "cls")]
    assert bare + [f.name for f in FUNCTIONS if f.returns is None] == []


def test_imports_are_the_standard_library_alone() -> None:
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    if sys.version_info >= (3, 10):
        assert {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) == set()
    inner = [node for node in imports if node.col_offset]
    assert {alias.name for node in inner for alias in node.names} <= {"ctypes"}  # wanted with a key alone


def test_keys_of_tables_are_unique() -> None:
    for node in ast.walk(TREE):
        keys = []
        if isinstance(node, ast.Dict):
            keys = [ast.dump(key) for key in node.keys if key]
        elif isinstance(node, (ast.Tuple, ast.List)) and node.elts and all(isinstance(e, (ast.Tuple, ast.Call)) for e in node.elts):
            rows = [e.elts if isinstance(e, ast.Tuple) else e.args for e in node.elts]  # type: ignore[attr-defined]
            said = [[getattr(e, "value", None) for e in row] for row in rows if row]
            keys = [str(row[:2] if row[0] in ("GET", "POST", "PUT", "DELETE") else row[0]) for row in said if isinstance(row[0], str)]
        assert [key for key, times in collections.Counter(keys).items() if times > 1] == [], node.lineno


def test_readme_and_help_name_the_same_settings() -> None:
    table = re.findall(r"(?m)^\| *`?(SMTP_\w+)`?", PROGRAM.with_name("README.md").read_text())
    assert sorted(table) == sorted(set(re.findall(r"(?m)^ +(SMTP_\w+)", run("--help").stdout)))


def test_the_service_file_is_hardened() -> None:
    unit = PROGRAM.with_name("smtprelay.service")
    assert {"DynamicUser", "StateDirectory"} <= set(re.findall(r"(?m)^(\w+)=", unit.read_text()))
    done = subprocess.run([need("systemd-analyze"), "security", "--offline=true", str(unit)], capture_output=True, text=True, timeout=20)
    exposure = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert exposure and float(exposure[1]) <= 1.5, done.stdout[-300:] + done.stderr
