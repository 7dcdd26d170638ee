"""Tests of the command line, the library, and what tests are given."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

import smtprelay

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "smtprelay.py")


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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
