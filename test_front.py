"""Tests of the front: what a review of the receiving half has found."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest

import smtprelay
from test_smtprelay import (  # noqa: F401
    QUICK,
    Dialogue,
    Program,
    Spool,
    dial,
    hello,
    held,
    holding,
    metric,
    pair,
    program,
    start,
    wait_until,
)

# === GRAMMAR =================================================================


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


# === SESSION =================================================================


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


def test_a_scripted_code_that_we_never_give_ourselves(start: Callable[..., Any]) -> None:
    relay = start(SMTP_FAULTS="mail 455 odd")
    with hello(relay) as client:
        client.ask("MAIL FROM:<a@b.test>", "455 4.0.0 odd")
        client.ask("NOOP", "250")
    assert metric(relay, "smtp_messages_rejected_total")["other"] == 1


def test_bdat_before_tls_stays_in_step(start: Callable[..., Any], pair: str) -> None:  # noqa: F811
    relay = start(SMTP_TLS_REQUIRED="1", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair)
    with hello(relay) as client:
        client.send(b"BDAT 6 LAST\r\nQUIT\r\nNOOP\r\n")
        assert client.reply().startswith("530 5.7.0")
        assert client.reply().startswith("250 2.0.0")


# === WIRE ====================================================================


def test_pipelined_commands_do_not_make_the_buffer_grow() -> None:
    ours, theirs = socket.socketpair()
    wire = smtprelay.Wire(ours, smtprelay.Deadline(5))
    sender = threading.Thread(target=lambda: (theirs.sendall(b"NOOP x\r\n" * 40_000), theirs.close()))
    sender.start()
    with ours, contextlib.suppress(smtprelay.PeerGone):
        while wire.line() == b"NOOP x\r\n":
            pass
    sender.join()
    assert len(wire.buffer) <= 4 * smtprelay.BLOCK_FIRST


@pytest.mark.parametrize("said", [b"", b"EHLO client.test\r\n", b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n"])
@pytest.mark.parametrize("trickle", [False, True])
def test_deadlines_hold_however_slowly_a_client_talks(start: Callable[..., Any], said: bytes, trickle: bool) -> None:
    relay = start(SMTP_COMMAND_TIMEOUT="0.2s", SMTP_DATA_TIMEOUT="0.2s")
    with dial(relay) as client:
        client.send(said)
        began, client.sock = time.monotonic(), client.sock
        client.sock.settimeout(0.02 if trickle else 2.0)
        heard = b""
        while b"421" not in heard and time.monotonic() < began + 2:
            with contextlib.suppress(socket.timeout):
                heard += client.sock.recv(4096)
            if trickle:
                with contextlib.suppress(OSError):
                    client.sock.sendall(b"x")
        assert b"421 4.4.2" in heard
        assert 0.15 < time.monotonic() - began < 0.8


# === LISTENER ================================================================


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


# === SMTP_PROCESSES ==========================================================


def receivers(relay: Program) -> list[int]:
    """Return the receiving processes: children that hold the SMTP socket but not the HTTP one."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(relay.process.pid)], capture_output=True, text=True)
    return sorted(map(int, listed.stdout.split()))[1:]


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


def test_processes_cannot_share_memory() -> None:
    with pytest.raises(smtprelay.SettingsError, match="SMTP_PROCESSES"):
        smtprelay.Settings.read({"SMTP_PROCESSES": "2", "SMTP_STORAGE": "memory"})
