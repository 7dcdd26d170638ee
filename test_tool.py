"""Tests of the command line, the library, and what tests are given."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import http.client
import io
import json
import logging
import os
import re
import shutil
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Callable
from unittest import mock

import pytest

import smtprelay

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "smtprelay.py")
QUICK = f"import sys; sys.path.insert(0, '{HERE}'); import smtprelay; sys.exit(smtprelay.main())"  # compiled once


def settings(**env: str) -> smtprelay.Settings:
    return smtprelay.Settings.read(env)


# === 03 SETTINGS =============================================================

PRESETS = [  # SMTP_RELAY_HOST and what else is set: host, port, TLS
    ({"SMTP_RELAY_HOST": "gmail"}, [("smtp.gmail.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "ses:eu-west-1"}, [("email-smtp.eu-west-1.amazonaws.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "fastmail"}, [("smtp.fastmail.com", 465)], "tls"),
    ({"SMTP_RELAY_HOST": "M365"}, [("smtp.office365.com", 587)], "starttls"),
    ({"SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_PORT": "465", "SMTP_RELAY_TLS": "tls"}, [("smtp.gmail.com", 465)], "tls"),
    ({"SMTP_RELAY_HOST": "sendgrid,mail.example:2525"}, [("smtp.sendgrid.net", 587), ("mail.example", 2525)], "starttls"),
    ({"SMTP_RELAY_HOST": "localhost"}, [("localhost", 587)], "opportunistic"),
]


@pytest.mark.parametrize("env, hosts, tls", PRESETS)
def test_a_preset_fills_host_port_and_tls(env: dict[str, str], hosts: list[tuple[str, int]], tls: str) -> None:
    read = settings(**env)
    assert (list(read.smart_hosts), read.relay_tls) == (hosts, tls)


@pytest.mark.parametrize("text", ["ses", "ses:", "ses:here", "gmail:x", ":25"])
def test_a_wrong_smart_host_names_the_presets(text: str) -> None:
    with pytest.raises(smtprelay.SettingsError, match=r"SMTP_RELAY_HOST='.*': expected host or host:port.*ses:REGION"):
        settings(SMTP_RELAY_HOST=text)


def test_spaces_of_an_app_password_go_and_of_no_other() -> None:
    env = {"SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_USERNAME": "me"}
    assert settings(**env, SMTP_RELAY_PASSWORD="abcd efgh ijkl mnop").relay_password == "abcdefghijklmnop"
    assert settings(**env, SMTP_RELAY_PASSWORD="two words").relay_password == "two words"
    env["SMTP_RELAY_HOST"] = "mail.example"
    assert settings(**env, SMTP_RELAY_PASSWORD="abcd efgh ijkl mnop").relay_password == "abcd efgh ijkl mnop"


def test_waits_are_scaled_and_a_seed_repeats_them() -> None:
    scaled = settings(SMTP_TIME_SCALE="1000", SMTP_SEED="7")
    plain = settings(SMTP_SEED="7")
    waits = [[smtprelay.backoff(s, n, smtprelay.Scheduler(s).rng) for n in range(1, 20)] for s in (plain, scaled, scaled)]
    assert waits[1] == waits[2] == [w / 1000 for w in waits[0]]
    assert settings(SMTP_SEED="8").seed != scaled.seed
    with pytest.raises(smtprelay.SettingsError):
        settings(SMTP_TIME_SCALE="0")


# === 05 WIRE: the PROXY protocol =============================================

V2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_HEADERS = [  # what the balancer sends, the client that is meant; None: closed without a word
    (b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 25\r\n", "192.0.2.7"),
    (b"PROXY TCP6 2001:db8::7 ::1 4711 25\r\n", "2001:db8::7"),
    (b"PROXY UNKNOWN\r\n", "127.0.0.1"),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", "127.0.0.1"),
    (V2 + b"\x21\x11\0\x0c" + bytes([192, 0, 2, 9, 127, 0, 0, 1, 0, 1, 0, 25]), "192.0.2.9"),
    (V2 + b"\x21\x21\0\x24" + bytes.fromhex("20010db8000000000000000000000009") + bytes(20), "2001:db8::9"),
    (V2 + b"\x21\x11\0\x0f" + bytes([192, 0, 2, 9, 127, 0, 0, 1, 0, 1, 0, 25]) + b"\x04\0\0", "192.0.2.9"),
    (V2 + b"\x20\0\0\0", "127.0.0.1"),
    (V2 + b"\x21\0\0\0", "127.0.0.1"),
    (b"PROXY TCP4 192.0.2.7\r\n", None),
    (b"PROXY TCP4 192.0.2.700 127.0.0.1 1 2\r\n", None),
    (b"EHLO here\r\n", None),
    (b"P" * 5000 + b"\r\n", None),
    (V2 + b"\x31\x11\0\x0c" + bytes(12), None),
    (V2 + b"\x21\x11\xff\xff" + bytes(12), None),
    (V2 + b"\x21\x11\0\x02\0\0", None),
]


@pytest.fixture(scope="module")
def balanced() -> Iterator[smtprelay.Relay]:
    with smtprelay.start(SMTP_PROXY_NETWORKS="loopback", SMTP_ALLOW_NETWORKS="loopback,192.0.2.0/24,2001:db8::/32",
                         SMTP_AUTH_REQUIRED="0") as relay:
        yield relay


def talk(address: tuple[str, int], *pieces: bytes) -> bytes:
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
    heard = talk((balanced.host, balanced.port), header[:5], header[5:])
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
    assert talk(address, b"PROXY TCP4 198.51.100.1 127.0.0.1 1 2\r\n").startswith(b"554 5.7.1")
    assert talk(address, b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\nEHLO early\r\n").startswith(b"554 5.5.1")


def test_sessions_are_counted_for_the_proxied_client() -> None:
    env = {"SMTP_PROXY_NETWORKS": "loopback", "SMTP_ALLOW_NETWORKS": "192.0.2.0/24", "SMTP_MAX_CONNECTIONS_PER_CLIENT": "1", "SMTP_AUTH_REQUIRED": "0"}
    with smtprelay.start(**env) as relay, socket.create_connection((relay.host, relay.port), 5) as first:
        first.sendall(b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n")
        assert first.recv(100).startswith(b"220")
        assert talk((relay.host, relay.port), b"PROXY TCP4 192.0.2.1 127.0.0.1 1 2\r\n").startswith(b"421")
        assert talk((relay.host, relay.port), b"PROXY TCP4 192.0.2.2 127.0.0.1 1 2\r\n").startswith(b"220")
        assert relay.receiving.reception.clients["192.0.2.1"] == 1


# === 23 SENDMAIL =============================================================

Mail = tuple[smtprelay.Message, bytes]


def mails(relay: smtprelay.Relay) -> list[Mail]:
    """What a relay has, without the Received header that it added."""
    spool = relay.parts.spool
    return [(spool.load(stem), without_trace(spool.content(stem).read())) for stem, _ in spool.names()]


def without_trace(content: bytes) -> bytes:
    lines = content.split(b"\r\n")
    return b"\r\n".join(lines[3 + (b"\tfor <" in lines[2]):] if lines[0].startswith(b"Received: from") else lines)


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
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{QUICK}" sendmail "$@"\n')
    script.chmod(0o755)
    return clean_env(SMTP_PORT=f"127.0.0.1:{relay.port}", SMTP_HOSTNAME="box.example", HOME=str(tmp_path),
                     PATH=f"{script.parent}:{os.environ['PATH']}", SENDMAIL=str(script), TZ="UTC", LOGNAME="me", USER="me")


def run(*command: str, env: Mapping[str, str], stdin: bytes = b"", status: int = 0, cwd: object = None) -> str:
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, timeout=30, cwd=str(cwd or HERE))
    assert done.returncode == status, (done.stdout, done.stderr)
    return done.stdout.decode()


ERRANDS = [  # what programs call sendmail with: sender, recipients, -t, a dot ends it
    ("-t -i", None, [], True, False),  # PHP
    ("-ti", None, [], True, False),
    ("-FCronDaemon -i -B8BITMIME -oem root", None, ["root"], False, False),  # cron, Debian's
    ("-FCronDaemon -odi -oem -oi -t -f root", "root", [], True, False),  # cron, cronie's
    ("-oem -oi -f me@x.example -- a@b.example c", "me@x.example", ["a@b.example", "c"], False, False),  # mutt
    ("-oem -oi -N failure,delay -R hdrs -B8BITMIME -- a", None, ["a"], False, False),  # mutt with DSN
    ("-i -f me@x.example a@b.example", "me@x.example", ["a@b.example"], False, False),  # git send-email
    ("-i -m -v -r me -- a", "me", ["a"], False, False),  # s-nail
    ("-f<> a", "", ["a"], False, True),
    ("-f  a", "", ["a"], False, True),
    ("-fme a b", "me", ["a", "b"], False, True),
    ("-O DeliveryMode=b -OIgnoreDots=1 -X /dev/null -V id -L tag -h 3 -p smtp:x -Am -G -U -n -x0 a", "unknown", [], False, False),
    ("-O DeliveryMode=b -OIgnoreDots=1 -X /dev/null -V id -L tag -h 3 -p smtp:x -Am -GUn -d0.1 a", None, ["a"], False, False),
    ("-o i a", None, ["a"], False, False),
    ("-f", "needs a value", [], False, False),
    ("-bd", "serve", [], False, False),
]


@pytest.mark.parametrize("line, sender, recipients, from_headers, dot_ends", ERRANDS)
def test_sendmails_flags_are_read_in_every_spelling(line: str, sender: str | None, recipients: list[str],
                                                    from_headers: bool, dot_ends: bool) -> None:
    words = line.split(" ")
    if sender in ("unknown", "needs a value", "serve"):
        with pytest.raises(ValueError, match=sender):
            smtprelay.read_errand(words)
        return
    errand = smtprelay.read_errand(words)
    assert (errand.sender, errand.recipients, errand.from_headers, errand.dot_ends) == (sender, recipients, from_headers, dot_ends)


MODES = [("-bp", "queue"), ("-bi", "nothing"), ("-I", "nothing"), ("-bs", "smtp"), ("-q", "flush"), ("-q30m", "flush"), ("-qRx", "flush"), ("-bm", "deliver"), ("-bv", "deliver")]


@pytest.mark.parametrize("flag, mode", MODES)
def test_sendmails_modes(flag: str, mode: str) -> None:
    assert smtprelay.read_errand([flag]).mode == mode


LETTERS = [  # what is written, flags: who gets it, what must be in it, what must not
    (b"To: a@b.example, Carl <c>\nCc: d@e.example\nBcc: f@g.example\nSubject: s\n\nbody\n", "-t",
     ["a@b.example", "c@box", "d@e.example", "f@g.example"], [b"\r\n\r\nbody\r\n"], [b"f@g"]),
    (b"To: old@b.example\nResent-To: new@b.example\nResent-Bcc: blind@b.example\n\nx\n", "-t",
     ["new@b.example", "blind@b.example"], [b"To: old@b.example\r\n"], [b"blind"]),
    (b"To: a@b.example\nX: 1\n\nx\n", "-t extra@b.example", ["extra@b.example", "a@b.example"], [], []),
    (b"no header at all\n", "a", ["a@box"], [b"\r\n\r\nno header at all\r\n", b"From: me@box\r\n", b"Date: ", b"Message-ID: <"], []),
    (b"From me Mon Jan 1\nSubject: mbox\n\nx\n", "a", ["a@box"], [b"Subject: mbox\r\n"], [b"From me"]),
    (b"Subject: x\n\none\n.\ntwo\n", "a", ["a@box"], [b"one\r\n"], [b"two"]),
    (b"Subject: x\n\none\n.\ntwo\n", "-i a", ["a@box"], [b"one\r\n.\r\ntwo\r\n"], []),
    (b"Subject: x\r\n\r\none\r\ntwo\rthree", "a", ["a@box"], [b"one\r\ntwo\r\nthree\r\n"], [b"\r\r"]),
    (b"Subject: x\nFrom: Own <own@x.example>\nDate: d\nMessage-ID: <m@x>\n\nx\n", "-F Other a", ["a@box"], [b"From: Own <own@x.example>\r\n"], [b"Other", b"+0000"]),
    (b"\nx\n", "-F Cron -f root a", ["a@box"], [b"From: Cron <root@box>\r\n"], []),
    (b"Subject: folded\n words\n\n\nx\n", "a,b", ["a@box", "b@box"], [b"Subject: folded\r\n words\r\n", b"\r\n\r\n\r\nx\r\n"], []),
    (b"", "a", ["a@box"], [b"From: "], []),
]


@pytest.mark.parametrize("raw, flags, recipients, has, lacks", LETTERS)
def test_a_message_is_completed(raw: bytes, flags: str, recipients: list[str], has: list[bytes], lacks: list[bytes],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "me")
    letter = smtprelay.write_letter(raw, smtprelay.read_errand(flags.split()), "box")
    assert letter.recipients == recipients
    assert all(part in letter.content for part in has), letter.content
    assert not any(part in letter.content for part in lacks), letter.content
    assert letter.content.count(b"\n") == letter.content.count(b"\r\n") == letter.content.count(b"\r")


def test_nobody_to_send_to_is_a_mistake_of_usage(env: dict[str, str]) -> None:
    run("sendmail", "-t", env=env, stdin=b"Subject: x\n\nx\n", status=64)


def test_sendmail_hands_over_to_the_relay_by_smtp(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    run("sendmail", "-oi", "-F", "J\u00fcrgen", "bob", env=env, stdin="Subject: \u00fc\n\n.\n..\n".encode())
    (record, content), = mails(relay)
    assert (record.reverse_path, [r.address for r in record.recipients], record.protocol) == ("me@box.example", ["bob@box.example"], "ESMTP")
    assert record.flags == ("8BITMIME", "HOLD")
    assert content.endswith(b"\r\n\r\n.\r\n..\r\n") and b"From: =?utf-8?" in content


def test_sendmail_passes_on_what_the_sender_wants_to_be_told(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    run("sendmail", "-N", "failure,delay", "-Rhdrs", "bob", env=env, stdin=b"x\n")
    (record, _), = mails(relay)
    assert (record.recipients[0].notify, record.ret) == ("FAILURE,DELAY", "HDRS")


def test_sendmail_takes_portions(env: dict[str, str]) -> None:
    with smtprelay.start(SMTP_MAX_RECIPIENTS="2") as relay:
        run("sendmail", "a", "b", "c", "d", "e", env={**env, "SMTP_PORT": f"127.0.0.1:{relay.port}"}, stdin=b"x\n")
        assert sorted(len(record.recipients) for record, _ in mails(relay)) == [1, 2, 2]


def test_what_the_relay_refuses_sendmail_refuses(env: dict[str, str]) -> None:
    with smtprelay.start(SMTP_MAX_SIZE="1K") as relay:
        run("sendmail", "a", env={**env, "SMTP_PORT": f"127.0.0.1:{relay.port}"}, stdin=b"x\n" * 1000, status=69)
        assert mails(relay) == []


def spooled(path: Path) -> list[Mail]:
    spool = smtprelay.FileSpool(settings(SMTP_SPOOL=str(path)), smtprelay.Log(logging.getLogger("test")))
    return [(spool.load(stem), without_trace(spool.content(stem).read())) for stem, _ in spool.names()]


def test_sendmail_spools_itself_where_no_relay_runs(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": unused_port(), "SMTP_SPOOL": str(tmp_path / "spool")}
    run("sendmail", "-f", "me@x.example", "bob", env=env, stdin=b"Subject: x\n\nhello\n")
    (record, content), = spooled(tmp_path / "spool")
    assert (record.status.value, record.client, record.flags) == ("received", "local", ())
    assert content.endswith(b"\r\n\r\nhello\r\n")
    with smtprelay.start(SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool"), SMTP_RELAY_HOST=unused_port()) as relay:
        until(lambda: len(relay.delivering.scheduler) == 1)


def test_a_running_relay_finds_what_was_spooled_beside_it(env: dict[str, str], tmp_path: Path) -> None:
    with smtprelay.start(SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool"), SMTP_RELAY_HOST=unused_port()) as relay:
        until(lambda: relay.delivering.rescans == 0.0)
        run("sendmail", "bob", env={**env, "SMTP_PORT": unused_port(), "SMTP_SPOOL": str(tmp_path / "spool")}, stdin=b"x\n")
        until(lambda: len(relay.delivering.scheduler) == 1)


NO_SPOOL: list[dict[str, str]] = [{}, {"SMTP_STORAGE": "memory"}, {"SMTP_SPOOL": "/proc/nowhere"}]


@pytest.mark.parametrize("more", NO_SPOOL)
def test_sendmail_that_can_do_neither_says_75(env: dict[str, str], tmp_path: Path, more: dict[str, str]) -> None:
    run("sendmail", "bob", env={**env, "SMTP_PORT": unused_port(), **more}, stdin=b"x\n", status=75, cwd=tmp_path)
    assert not (tmp_path / "data").exists()


def test_sendmail_goes_by_its_own_names(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    names = {}
    for name in ("sendmail", "mailq", "newaliases"):
        (tmp_path / name).symlink_to(PROGRAM)
        names[name] = str(tmp_path / name)
    env["SMTP_SPOOL"] = str(tmp_path / "spool")
    run(sys.executable, names["sendmail"], "bob", env=env, stdin=b"x\n")
    run(sys.executable, names["newaliases"], env=env)
    run(sys.executable, names["sendmail"], "bob", env={**env, "SMTP_PORT": unused_port()}, stdin=b"x\n")
    assert len(mails(relay)) == 1
    listed = run(sys.executable, names["mailq"], env={**env, "SMTP_HEALTH_ADDR": "off"})
    assert "to bob@box.example" in listed and "1 message" in listed


@pytest.mark.parametrize("running", [True, False])
def test_sendmail_speaks_smtp_on_its_standard_streams(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path, running: bool) -> None:
    if not running:
        env = {**env, "SMTP_PORT": unused_port(), "SMTP_SPOOL": str(tmp_path / "spool")}
    said = run("sendmail", "-bs", env=env, stdin=b"EHLO me\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nX: y\r\n\r\nx\r\n.\r\nQUIT\r\n")
    assert re.fullmatch(r"220 .*250 2.0.0 Ok: queued as \w+\r\n221 [^\n]*\n", said.replace("\r\r", "\r"), re.S), said
    (record, content), = mails(relay) if running else spooled(tmp_path / "spool")
    assert content == b"X: y\r\n\r\nx\r\n"


def unused_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def needs(program: str) -> str:
    path = shutil.which(program)
    if not path:
        pytest.skip(f"{program} is not installed")
    return path


def the_only(relay: smtprelay.Relay) -> tuple[list[str], str, bytes]:
    (record, content), = mails(relay)
    return [r.address for r in record.recipients], record.reverse_path, content


def test_mutt(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "muttrc").write_text(f'set sendmail="{env["SENDMAIL"]} -oem -oi"\nset from=me@x.example\nset use_envelope_from=yes\nset copy=no\n')
    run(needs("mutt"), "-n", "-F", str(tmp_path / "muttrc"), "-s", "Hello", "-b", "blind@d.example", "--", "a@b.example", env=env, stdin="K\u00e4se\n".encode())
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "blind@d.example"}, "me@x.example")
    assert b"Subject: Hello\r\n" in content and b"blind" not in content


def test_s_nail(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    run(needs("s-nail"), "-n", "-S", f"mta={env['SENDMAIL']}", "-s", "Hello", "-r", "me@x.example", "-c", "c@d.example", "a@b.example", env=env, stdin=b"x\n.\ny\n")
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "c@d.example"}, "me@x.example")
    assert content.endswith(b"\r\n\r\nx\r\n.\r\ny\r\n")


def test_git_send_email(relay: smtprelay.Relay, env: dict[str, str], tmp_path: Path) -> None:
    git = needs("git")
    if subprocess.run([git, "send-email", "-h"], capture_output=True, env=env).returncode > 1:
        pytest.skip("git send-email is not installed")
    for command in ("init -q .", "config user.name Me", "config user.email me@x.example", "commit -q --allow-empty -m First",
                    "-c core.hooksPath=/dev/null commit -q --allow-empty -m Second"):
        run(git, *command.split(), env=env, cwd=tmp_path)
    (tmp_path / "file").write_text("x\n")
    run(git, "add", "file", env=env, cwd=tmp_path)
    run(git, "commit", "-q", "-m", "Add a file", env=env, cwd=tmp_path)
    run(git, "send-email", "--quiet", "--confirm=never", "--envelope-sender=bounce@x.example", f"--smtp-server={env['SENDMAIL']}", "--to=a@b.example", "-1", env=env, cwd=tmp_path)
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "me@x.example"}, "bounce@x.example")
    assert b"Subject: [PATCH] Add a file\r\n" in content


def test_php_mail(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    script = r'var_dump(mail("a@b.example", "Hello", "one\r\n.\ntwo", "From: me@x.example\r\nBcc: blind@d.example", "-fbounce@x.example"));'
    assert "true" in run(needs("php"), "-d", f"sendmail_path={env['SENDMAIL']} -t -i", "-r", script, env=env)
    to, sender, content = the_only(relay)
    assert (to, sender) == (["a@b.example", "blind@d.example"], "bounce@x.example")
    assert content.endswith(b"\r\n\r\none\r\n.\r\ntwo\r\n") and b"blind" not in content


def test_cron(relay: smtprelay.Relay, env: dict[str, str]) -> None:
    job = "From: root (Cron Daemon)\nTo: root\nSubject: Cron <root@box> backup\nContent-Type: text/plain; charset=UTF-8\n\ndone\n"
    run("sh", "-c", f"printf '{job}' | {env['SENDMAIL']} -FCronDaemon -i -B8BITMIME -oem root", env=env)
    to, sender, content = the_only(relay)
    assert (to, sender) == (["root@box.example"], "me@box.example")
    assert b"From: root (Cron Daemon)\r\n" in content


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
    run(sys.executable, "-c", script, str(relay.port), env=clean_env())
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
    run(sys.executable, "-c", script, str(relay.port), env=clean_env())
    to, sender, content = the_only(relay)
    assert (set(to), sender) == ({"a@b.example", "blind@d.example"}, "me@x.example")
    assert b"Subject: Hello\r\n" in content and b"blind" not in content

# === 22 LIBRARY ==============================================================

MAIL = b"From: me@x.example\r\nTo: bob@b.example\r\nSubject: Your code\r\n\r\nYour code is 482913, or go to https://x.example/in?t=1\r\n"


def mail_to(relay: smtprelay.Relay, *recipients: str, content: bytes = MAIL) -> None:
    with smtplib.SMTP(relay.host, relay.port, timeout=5) as smtp:
        smtp.sendmail("me@x.example", recipients or ["bob@b.example"], content)


def test_a_test_waits_for_its_mail(relay: smtprelay.Relay) -> None:
    mail_to(relay)
    mail = relay.wait(to="bob@b.example", subject="code", timeout=5)
    assert (mail.codes, mail.links, mail.reverse_path, mail.recipients) == (["482913"], ["https://x.example/in?t=1"], "me@x.example", ["bob@b.example"])
    assert (mail.subject, mail.from_, mail.to, mail.html, mail.attachments) == ("Your code", "me@x.example", ["bob@b.example"], "", [])
    assert mail.headers["subject"] == "Your code" and mail.raw.endswith(MAIL) and "482913" in mail.text
    assert [m.id for m in relay.messages] == [mail.id]
    with pytest.raises(TimeoutError, match=r"to='ann'.* what came: <Email 'Your code'"):
        relay.wait(to="ann", timeout=0.01)
    with pytest.raises(TimeoutError):
        relay.wait(to="bob", timeout=0.01, after=mail)
    with pytest.raises(TimeoutError):
        relay.wait(to="ob@b.example", timeout=0.01)
    threading.Timer(0.02, mail_to, (relay,)).start()
    assert relay.wait(to="bob", after=mail).sequence > mail.sequence
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
    assert (taken.reverse_path, taken.recipients) == ("me@x.example", ["bob@b.example"]) and taken.raw.endswith(MAIL)


SCRIPTS = [  # steps, how the message ends, attempts, copies taken
    ([], "forwarded", 1, 1),
    (["451 busy"] * 3, "forwarded", 4, 1),
    (["550 no"], "failed", 1, 0),
    (["rcpt 550 who?"], "failed", 1, 0),
    (["mail 451 later", "data 421 going"], "forwarded", 3, 1),
    (["drop", "accept"], "forwarded", 2, 1),
    (["mail drop", "connect 421 busy", "connect 554 go away", "rcpt 450 grey"], "forwarded", 3, 1),
]


@pytest.mark.parametrize("steps, status, attempts, copies", SCRIPTS)
def test_the_simulated_smart_host_answers_by_script(steps: list[str], status: str, attempts: int, copies: int) -> None:
    with smtprelay.start(SMTP_DELIVERY="relay", SMTP_TIME_SCALE="1000", SMTP_SEED="1", SMTP_BOUNCE="0") as relay:
        relay.upstream.script(*steps)
        mail_to(relay)
        id = relay.wait().id
        until(lambda: relay.backstage.status_of(id) == status)
        assert (relay.upstream.attempts, len(relay.upstream.received)) == (attempts, copies)


def test_eight_hours_of_back_off_pass_in_a_second() -> None:
    waits = []
    for _ in range(2):
        with smtprelay.start(SMTP_DELIVERY="relay", SMTP_TIME_SCALE="50000", SMTP_SEED="7", SMTP_RETRY_JITTER="0.1") as relay:
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
    with smtprelay.start(SMTP_RELAY_HOST=unused_port()) as relay:
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


def is_as(before: object) -> bool:
    return (set(threading.enumerate()), open_files()) == before


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
        until(functools.partial(is_as, before), 2)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        smtprelay.start().stop()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.03


def test_a_wrong_setting_leaves_nothing_either() -> None:
    before = (set(threading.enumerate()), open_files())
    for wrong in ({"SMTP_MAX_SIZE": "big"}, {"SMTP_MAX_SIZ": "1K"}):
        with pytest.raises(smtprelay.SettingsError, match="SMTP_MAX_SIZ"):
            smtprelay.start(**wrong)
    assert (set(threading.enumerate()), open_files()) == before


def run_pytest(tmp_path: Path, test: str, *flags: str, conftest: str = "") -> str:
    (tmp_path / "test_it.py").write_text(test)
    (tmp_path / "conftest.py").write_text(conftest)
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, str(tmp_path)], capture_output=True, timeout=60,
                          cwd=tmp_path, env=clean_env(PYTHONPATH=HERE, SMTP_PORT="1", PYTHONDONTWRITEBYTECODE="1"))
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


@pytest.mark.parametrize("flags, conftest", [
    (["-p", "smtprelay", "--strict-markers"], ""), ([], "from smtprelay import smtp_relay, smtp_relay_session"), (["-p", "smtprelay", "-n", "2"], "")])
def test_pytests_fixtures(tmp_path: Path, flags: list[str], conftest: str) -> None:
    if "-n" in flags:
        pytest.importorskip("xdist")
    said = run_pytest(tmp_path, PLUGIN_TEST, *flags, conftest=conftest)
    assert "1 failed, 6 passed" in said, said
    assert "mail received (1)" in said and "Subject: Shown" in said and "test_failing" in said


def test_without_pytest_there_are_no_fixtures() -> None:
    run(sys.executable, "-c", "import smtprelay, sys; assert not hasattr(smtprelay, 'smtp_relay') and 'pytest' not in sys.modules", env=clean_env())

# === 24 DOCTOR ===============================================================

def findings(capsys: pytest.CaptureFixture[str], **env: str) -> tuple[dict[str, tuple[str, str, str]], int]:
    """Run the doctor here, and return its findings by what they are about, with its exit status."""
    read = settings(**env)
    status = smtprelay.doctor(read, argparse.Namespace(json=True, domain=None))
    listed = json.loads(capsys.readouterr().out)
    return {f["about"]: (f["mark"], f["found"], f["advice"]) for f in listed}, status


def test_the_doctor_finds_all_well_and_sends_nothing(relay: smtprelay.Relay, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = {"SMTP_RELAY_HOST": f"127.0.0.1:{relay.port}", "SMTP_SPOOL": str(tmp_path)}
    found, status = findings(capsys, **env)
    assert status == 0 and {f[0] for f in found.values()} == {"ok"}, found
    assert list(found) == ["spool", "name", "IPv4", "egress", "greeting", "clock", "EHLO", "TLS", "size"]
    assert "ESMTP" in found["greeting"][1] and "SIZE 10485760" in found["EHLO"][1]
    assert relay.messages == []


DIAGNOSES: list[tuple[dict[str, str], dict[str, str], str, str, str]] = [  # the server's settings, ours, what is found: about, mark, in its advice
    ({"SMTP_MAX_SIZE": "1K"}, {}, "size", "warn", "SMTP_MAX_SIZE=1024"),
    ({"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"}, {}, "login", "warn", "set it"),
    ({"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"}, {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "right"}, "login", "ok", ""),
    ({"SMTP_AUTH_USER": "me", "SMTP_AUTH_PASSWORD": "right"}, {"SMTP_RELAY_USERNAME": "me", "SMTP_RELAY_PASSWORD": "wrong"}, "login", "fail", "app password"),
    ({}, {"SMTP_RELAY_TLS": "starttls"}, "starttls", "fail", "SMTP_RELAY_TLS="),
    ({"SMTP_TLS_SELF_SIGNED": "1"}, {"SMTP_RELAY_TLS": "starttls"}, "starttls", "fail", "SMTP_RELAY_CA_FILE"),
    ({"SMTP_TLS_SELF_SIGNED": "1"}, {"SMTP_RELAY_TLS": "starttls", "SMTP_RELAY_TLS_VERIFY": "0"}, "certificate", "warn", "SMTP_RELAY_TLS_VERIFY=1"),
    ({}, {"SMTP_STORAGE": "memory"}, "spool", "warn", "SMTP_STORAGE=file"),
    ({}, {"SMTP_SPOOL": "/proc/nowhere"}, "spool", "fail", "SMTP_SPOOL"),
    ({}, {"SMTP_RELAY_HOST": "unused"}, "IPv4", "fail", "SMTP_RELAY_PORT"),
    ({}, {"SMTP_RELAY_HOST": "no-such-host.invalid"}, "no-such-host.invalid:587", "fail", "resolv.conf"),
    ({}, {"SMTP_DELIVERY": "hold"}, "delivery", "warn", "SMTP_RELAY_HOST"),
    ({}, {"SMTP_DELIVERY": "mx"}, "delivery", "warn", "doctor example.com"),
]


@pytest.mark.parametrize("theirs, ours, about, mark, advice", DIAGNOSES)
def test_the_doctor_says_what_to_do(theirs: dict[str, str], ours: dict[str, str], about: str, mark: str, advice: str,
                                    tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with smtprelay.start(**theirs) as relay:
        ours = {k: unused_port() if v == "unused" else v for k, v in ours.items()}
        found, status = findings(capsys, **{"SMTP_RELAY_HOST": f"127.0.0.1:{relay.port}", "SMTP_SPOOL": str(tmp_path), **ours})
    assert found[about][0] == mark and advice in found[about][2], found
    assert status == (mark == "fail")


CLOCKS = [  # a greeting, the time here, what is found
    ("220 a ESMTP Exim Sat, 21 Nov 2026 03:00:00 +0000", 1795230000.0, "ok"),
    ("220 a ESMTP Exim Sat, 21 Nov 2026 03:00:00 +0000", 1795233600.0, "warn"),
    ("220 a ESMTP", 0.0, "ok"),
]


@pytest.mark.parametrize("greeting, now, mark", CLOCKS)
def test_the_doctor_compares_clocks(greeting: str, now: float, mark: str) -> None:
    assert smtprelay.examine_clock(greeting, now).mark == mark


# === 25 COMMAND LINE =========================================================

@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a relay that runs as a program, with one message held in it."""
    place = tmp_path_factory.mktemp("served")
    smtp, http_ = unused_port(), unused_port()
    env = clean_env(SMTP_PORT=smtp, SMTP_HEALTH_ADDR=http_, SMTP_SPOOL=str(place / "spool"), SMTP_API_TOKEN="t0ken", SMTP_HOSTNAME="box.example")
    with subprocess.Popen([sys.executable, PROGRAM], env=env, stderr=subprocess.DEVNULL) as program:
        ask(env, "healthcheck", "--wait")
        ask(env, "sendmail", "bob", stdin=MAIL.replace(b"\r\n", b"\n"))
        yield env
        program.terminate()


def ask(env: Mapping[str, str], *words: str, status: int = 0, stdin: bytes = b"") -> str:
    """Run a verb in this process, as a user would with this environment."""
    out, given = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.TextIOWrapper(io.BytesIO(stdin))
    with mock.patch.dict(os.environ, env, clear=True), mock.patch.object(sys, "stdin", given), contextlib.redirect_stdout(out):
        try:
            ended: object = smtprelay.main(list(words))
        except SystemExit as e:
            ended = e.code
    assert ended == status
    out.seek(0)
    return out.read()


def test_the_verbs_speak_to_the_running_relay(served: dict[str, str]) -> None:
    assert "to bob@box.example" in ask(served, "queue")
    entry, = json.loads(ask(served, "queue", "--json"))
    assert "482913" in ask(served, "show", entry["id"])
    assert json.loads(ask(served, "show", entry["id"], "--json"))["status"] == "held"
    assert ask(served, "wait", "--to", "bob", "--code") == "482913\n"
    assert ask(served, "wait", "--subject", "your code", "--link") == "https://x.example/in?t=1\n"
    ask(served, "wait", "--to", "ann", "--timeout", "10ms", status=1)
    ask(served, "retry", entry["id"], status=1)  # nowhere to send it
    ask({**served, "SMTP_API_TOKEN": "wrong"}, "queue", status=1)
    ask(served, "remove", "0" * 16, status=1)
    ask(served, "remove", entry["id"])
    assert ask(served, "queue") == "the queue is empty\n"


def test_the_verbs_read_the_spool_where_no_relay_runs(env: dict[str, str], tmp_path: Path) -> None:
    env = {**env, "SMTP_PORT": unused_port(), "SMTP_HEALTH_ADDR": unused_port(), "SMTP_SPOOL": str(tmp_path / "spool")}
    ask(env, "queue", status=69)
    ask(env, "wait", status=69)
    run("sendmail", "bob", env=env, stdin=b"Subject: x\n\nhello\n")
    entry, = json.loads(ask(env, "queue", "--json"))
    assert (entry["status"], entry["recipients"]) == ("received", ["bob@box.example"])
    assert ask(env, "show", entry["id"]).endswith("\n\nhello\n")
    ask(env, "retry", "all")
    ask(env, "retry", "nothing", status=1)
    with smtprelay.start(SMTP_STORAGE="file", SMTP_SPOOL=str(tmp_path / "spool")):
        ask(env, "remove", entry["id"], status=75)  # a relay has it, but cannot be spoken to
    ask(env, "remove", entry["id"])
    assert ask(env, "queue") == "the queue is empty\n"


def test_accounts_are_managed_in_their_file(tmp_path: Path) -> None:
    env = clean_env(SMTP_USERS_FILE=str(tmp_path / "users.json"))
    key = ask(env, "user", "add", "app", "--domain", "x.example", "--daily", "5", "--api-key", stdin=b"secret\n").strip()
    account = smtprelay.read_users(str(tmp_path / "users.json"))["app"]
    assert account["api_key"] == key and smtprelay.check_password("secret", account["password"])
    assert json.loads(ask(env, "user", "list", "--json")) == [{"name": "app", "allowed_domains": ["x.example"], "quota_daily": 5}]
    ask(env, "user", "add", "app", stdin=b"x\n", status=1)
    ask(env, "user", "passwd", "app", stdin=b"new\n")
    account = smtprelay.read_users(str(tmp_path / "users.json"))["app"]
    assert smtprelay.check_password("new", account["password"]) and account["quota_daily"] == 5
    ask(env, "user", "passwd", "app", stdin=b"\n", status=65)
    ask(env, "user", "remove", "app")
    assert ask(env, "user", "list") == ""
    ask(clean_env(), "user", "list", status=78)


MISTAKES = [(["--bogus"], 64), (["quue"], 64), (["queue", "--bogus"], 64), (["retry"], 64), (["wait", "--timeout", "x"], 64), (["queue", "--help"], 0), (["--version"], 0)]


@pytest.mark.parametrize("words, status", MISTAKES)
def test_mistakes_of_usage(words: list[str], status: int) -> None:
    ask(clean_env(), *words, status=status)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_for_the_shell(shell: str) -> None:
    path, script = needs(shell), smtprelay.completion(shell)
    assert all(name in script for name in (*smtprelay.COMMANDS, "sendmail", "--subject"))
    run(path, "-n", env=clean_env(), stdin=script.encode())
    if shell == "bash":
        said = run(path, "-c", script + "\nCOMP_WORDS=(smtprelay.py wait --t) COMP_CWORD=2; _smtprelay; echo ${COMPREPLY[@]}", env=clean_env())
        assert said == "--to --timeout\n"


SHOWN = [(smtprelay.size_shown, 999, "999"), (smtprelay.size_shown, 1200, "1.2K"), (smtprelay.size_shown, 35 << 20, "35M"),
         (smtprelay.time_shown, 45, "45s"), (smtprelay.time_shown, 150, "2m"), (smtprelay.time_shown, 3 * 86400, "3d"), (smtprelay.time_shown, -5, "0s")]


@pytest.mark.parametrize("shown, value, text", SHOWN)
def test_figures_for_people(shown: Callable[[float], str], value: float, text: str) -> None:
    assert shown(value) == text

if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
