"""Tests of the closed doors: TLS, logins, accounts, limits, audit."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hmac
import ipaddress
import json
import logging
import os
import random
import re
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator  # noqa: UP035

import pytest

import smtprelay
from test_smtprelay import (  # noqa: F401
    PROGRAM,
    QUICK,
    Dialogue,
    FakeHop,
    Program,
    Spool,
    fetch,
    hop,
    metric,
    need,
    program,
    run,
    start,
    wait_until,
)

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
LOG = smtprelay.Log(logging.getLogger("smtprelay.test"))
KEY = "mp_live_4242"
HASH_END = ":" + "0" * 32 + ":" + "0" * 64
NOON = 1_795_262_400.0  # 2026-11-21 12:00:00 UTC


def cheap_hash(password: str, making: str = "scrypt:1024:8:1") -> str:
    making = f"{making}:{'ab' * 16}"
    return f"{making}:{smtprelay.derive(password, making)}"


USERS: dict[str, Any] = {
    "app": {"password": cheap_hash("grün"), "api_key": KEY, "allowed_domains": ["example.com"]},
    "old": {"password": "tanstaaftanstaaf"},
    "job": {"api_key": "mp_live_77"},
}


class Ticker:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


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
        listener = relay.receiving.listeners[0]
        threading.Thread(target=listener.process_request, args=(theirs, client), daemon=True).start()


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


# === ACCOUNTS ================================================================


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
    assert smtprelay.fits(smtprelay.PASSWORD, stored) and stored.startswith("scrypt:16384:8:5:")
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
    assert smtprelay.fits(smtprelay.PASSWORD, value) is good


MISTAKES: list[tuple[Any, list[str]]] = [
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
    ({"a": {"api_key": KEY}, "b": {"api_key": KEY}}, ["account b: name or api_key is account a's"]),
    ({"a": {"api_key": "b"}, "b": {"password": "x"}}, ["account b: name or api_key is account a's"]),
    ({"a": {"quota_daily": "5"}, "b": 1}, ["a: quota_daily: ", "a: expected a password", "b: exp"]),
]


@pytest.mark.parametrize("users, expected", MISTAKES)
def test_users_file_mistakes(tmp_path: Path, users: Any, expected: list[str]) -> None:
    with pytest.raises(smtprelay.AccountsError) as caught:
        store(tmp_path, users)
    assert len(caught.value.mistakes) == len(expected)
    for line, words in zip(caught.value.mistakes, expected):
        assert words in line and KEY not in line


def test_what_is_secret_is_in_no_repr() -> None:
    shown = [smtprelay.Account("a", "s3cret", "s3cret", relay_password="s3cret"),
             smtprelay.Settings(auth_password="s3cret", relay_password="s3cret")]  # fmt: skip
    assert "s3cret" not in repr(shown)
    names = [each.name for each in dataclasses.fields(smtprelay.Account)]
    assert ["name", *smtprelay.ACCOUNT_KEYS] == names


def test_account_of_the_environment(tmp_path: Path) -> None:
    settings: Any = {"auth_user": "env", "auth_password": "x"}
    both = store(tmp_path, {"a": {"password": "y", "api_key": "", "allowed_domains": []}}, **settings)
    assert both.get("a") == smtprelay.Account("a", "y")  # empty is not set
    assert [each.name for each in both.listed()] == ["a", "env"] and both.login("env", "x").account
    with pytest.raises(smtprelay.AccountsError, match="SMTP_AUTH_USER has the same name"):
        store(tmp_path, {"env": {"password": "y"}}, **settings)
    assert not smtprelay.Accounts(smtprelay.Settings(), LOG).configured()


def test_what_should_not_stay_so_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = users_file(tmp_path, {"a": {"password": "s3cret"}, "b": {"api_key": "k"}, "c": {"password": cheap_hash("x")}})
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
    assert accounts.get("other") and "expected JSON" in accounts.trouble
    assert accounts.get("other")
    assert caplog.text.count("the last good accounts stay") == 1  # not at each look
    (tmp_path / "users.json").unlink()
    assert accounts.get("other") and "No such file" in accounts.trouble
    users_file(tmp_path, {"back": {"password": "xy"}})
    assert accounts.get("back") and not accounts.get("other") and accounts.trouble == ""


def test_change_users(tmp_path: Path) -> None:
    path = str(tmp_path / "users.json")
    smtprelay.change_users(path, {"a": {"password": "x", "quota_daily": 5}})
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    smtprelay.change_users(path, {"a": {"quota_daily": None}, "b": {"api_key": "k"}, "never": None})
    assert json.loads(Path(path).read_text()) == {"a": {"password": "x"}, "b": {"api_key": "k"}}
    before = Path(path).read_bytes()
    with pytest.raises(smtprelay.AccountsError, match="account a: quota_daily"):
        smtprelay.change_users(path, {"a": {"quota_daily": "many"}})
    assert Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ["users.json"]  # no draft, no lock
    (tmp_path / "link").symlink_to(path)
    smtprelay.change_users(str(tmp_path / "link"), {"b": None})
    assert (tmp_path / "link").is_symlink() and list(json.loads(Path(path).read_text())) == ["a"]


def in_threads(n: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_changes_go_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "users.json")
    in_threads(5, lambda n: smtprelay.change_users(path, {f"u{n}": {"password": "x"}}))
    assert len(json.loads(Path(path).read_text())) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    path = users_file(tmp_path, {})
    os.chown(path, 12345, 12345)
    smtprelay.change_users(path, {"a": {"password": "x"}})
    assert (os.stat(path).st_uid, os.stat(path).st_gid) == (12345, 12345)


LOGINS = [
    ("app", "grün", "app"),
    ("app", KEY, "app"),
    (KEY, "grün", "app"),
    (KEY, KEY, "app"),
    ("old", "tanstaaftanstaaf", "old"),
    ("mp_live_77", "mp_live_77", "job"),
    ("app", "wrong", None),
    ("app", "", None),
    ("old", "", None),
    ("job", "", None),
    ("job", KEY, None),
    (KEY, "mp_live_77", None),
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
        login = accounts.login(user, password)
        assert (login.account.name if login.account else None) == name, user
        assert login.reply == (smtprelay.AUTH_OK if name else smtprelay.AUTH_WRONG)
        assert not {KEY, "mp_live_99999"} & {login.user} and login.user.isprintable()
        assert len(hashed) == 1 if name is None else len(hashed) <= 1
        assert all(making.startswith("scrypt:1024:8:1:") for making in hashed)


def test_a_login_is_remembered_until_the_file_changes(tmp_path: Path, hashed: list[str]) -> None:
    accounts = store(tmp_path, USERS)
    for tries in range(3):
        assert accounts.login("app", "grün").account and len(hashed) == 1, tries
    assert not accounts.login("app", "gru\0n").account
    users_file(tmp_path, {"app": {"password": cheap_hash("new")}})
    assert not accounts.login("app", "grün").account and accounts.login("app", "new").account


def test_logins_that_cannot_be_checked_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accounts = store(tmp_path, USERS)
    monkeypatch.setattr(smtprelay, "TURN_PATIENCE", 0.02)
    for _ in range(smtprelay.LOGINS_AT_ONCE):
        accounts._turns.acquire()
    assert talk(accounts, "PLAIN", b64("\0app\0grün"))[1].reply == smtprelay.ACCOUNTS_NOT_NOW
    for _ in range(smtprelay.LOGINS_AT_ONCE):
        accounts._turns.release()
    monkeypatch.setattr(smtprelay, "derive", lambda password, making: (_ for _ in ()).throw(MemoryError()))
    for _ in range(3):
        assert talk(accounts, "PLAIN", b64("\0app\0grün"))[1].reply == smtprelay.ACCOUNTS_NOT_NOW


def test_by_key(tmp_path: Path) -> None:
    accounts = store(tmp_path, USERS)
    assert accounts.by_key(KEY) == accounts.get("app")
    assert accounts.by_key("app") is None and accounts.by_key("") is None


PLAIN_ONLY: dict[str, Any] = {"a": {"password": "x"}}
OFFERS: list[tuple[Any, Any, bool, list[str]]] = [
    (PLAIN_ONLY, {}, True, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    (PLAIN_ONLY, {}, False, ["CRAM-MD5"]),
    (PLAIN_ONLY, {"auth_insecure": True}, False, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    (PLAIN_ONLY, {"auth_methods": ("login",)}, True, ["LOGIN"]),
    ({**PLAIN_ONLY, "b": {"api_key": "k"}}, {}, True, ["PLAIN", "LOGIN", "CRAM-MD5"]),
    ({**PLAIN_ONLY, "b": {"password": cheap_hash("x")}}, {}, True, ["PLAIN", "LOGIN"]),
    ({"a": {"password": cheap_hash("x")}}, {}, False, []),
]


@pytest.mark.parametrize("users, settings, secure, expected", OFFERS)
def test_offers(tmp_path: Path, users: Any, settings: Any, secure: bool, expected: list[str]) -> None:
    assert store(tmp_path, users, **settings).offers(secure) == expected


# -- SASL --


def talk(accounts: Any, mechanism: str, *lines: bytes | None) -> Any:
    """Run an exchange: the first line is the initial response or None; returns 334s and Login."""
    challenges: list[str] = []
    answers = iter(lines[1:])

    def ask(challenge: str) -> bytes:
        challenges.append(challenge)
        line = next(answers)
        assert line is not None
        return line

    return challenges, smtprelay.authenticate(accounts, mechanism, lines[0], ask)


BASE64 = [(b"", b""), (b"YQ==", b"a"), (b"YWJj", b"abc"), *((line, None) for line in (
    b"=", b"==", b"====", b"YQ", b"YQ=", b"Y Q==", b"YQ==YQ==", b"YQ==\n", b"\xff\xff\xff\xff", b"*"))]  # fmt: skip


@pytest.mark.parametrize("line, expected", BASE64)
def test_decode_base64(line: bytes, expected: bytes | None) -> None:
    assert smtprelay.decode_base64(line) == expected


def test_cram_md5_is_that_of_rfc_2195() -> None:
    settings = smtprelay.Settings(auth_user="tim", auth_password="tanstaaftanstaaf", hostname="postoffice.reston.mci.net")
    accounts = smtprelay.Accounts(settings, LOG, random=lambda _: "1896.697170952")
    asked, login = talk(accounts, "CRAM-MD5", None, b"dGltIGI5MTNhNjAyYzdlZGE3YTQ5NWI0ZTZlNzMzNGQzODkw")
    assert base64.b64decode(asked[0]) == b"<1896.697170952@postoffice.reston.mci.net>"
    assert login.account


CRAMS = [
    ("old", "tanstaaftanstaaf", True),
    ("app", KEY, True),  # the hash cannot, the key can
    ("mp_live_77", "mp_live_77", True),
    ("app", "grün", False),
    ("old", "", False),
    ("job", "", False),
    ("nobody", "", False),
]


@pytest.mark.parametrize("user, secret, good", CRAMS)
def test_cram_md5(tmp_path: Path, user: str, secret: str, good: bool) -> None:
    accounts = store(tmp_path, USERS)
    accounts.random = lambda _: "42"
    accounts.settings = dataclasses.replace(accounts.settings, hostname="relay.example")
    digest = hmac.new(secret.encode(), b"<42@relay.example>", "md5").hexdigest()
    assert (talk(accounts, "CRAM-MD5", None, b64(f"{user} {digest}"))[1].account is not None) is good


def test_cram_md5_challenges_differ(tmp_path: Path) -> None:
    accounts = store(tmp_path, USERS)
    assert len({talk(accounts, "CRAM-MD5", None, b"*")[0][0] for _ in range(5)}) == 5


def test_responses_of_random_octets_never_raise(tmp_path: Path, hashed: list[str]) -> None:
    accounts, source = store(tmp_path, USERS), random.Random(3)
    for _ in range(50):
        line = bytes(source.choice(b"AZ+/=*\0 \r\n\xff") for _ in range(source.randrange(12)))
        for mechanism in smtprelay.MECHANISMS:
            for lines in ((line, line, line), (None, line, line)):
                assert talk(accounts, mechanism, *lines)[1].account is None


# -- who may send as whom --

COM = ("example.com",)
SENDERS: list[tuple[tuple[str, ...], str, bool]] = [
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


@pytest.mark.parametrize("domains, reverse_path, allowed", SENDERS)
def test_may_send_as(domains: tuple[str, ...], reverse_path: str, allowed: bool) -> None:
    account = smtprelay.Account("a", "x", allowed_domains=domains)
    assert smtprelay.may_send_as(account, reverse_path) is allowed


def test_labels_of_random_letters_never_raise() -> None:
    source = random.Random(4)
    for _ in range(1000):
        word = "".join(source.choice("abz019-\xfc\ud800.") for _ in range(source.randrange(80)))
        assert isinstance(smtprelay.label_key("xn--" + word), str)


# -- how much --

CLIENTS = [
    ("192.0.2.1", "192.0.2.1"),
    ("::ffff:192.0.2.1", "192.0.2.1"),
    ("2001:db8::1", "2001:db8::/64"),
    ("2001:db8:0:0:ffff::", "2001:db8::/64"),
    ("fe80::1%eth0", "fe80::/64"),
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


def test_bucket_fills_at_its_rate() -> None:
    clock = Ticker()
    buckets = smtprelay.Buckets(clock=clock)
    assert [buckets.take("a", 6, 3) for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b", 6, 3)
    clock.now += 9.9
    assert not buckets.take("a", 6, 3)
    clock.now += 0.1
    assert [buckets.take("a", 6, 3) for _ in range(2)] == [True, False]
    buckets.give("a", 6)
    assert [buckets.take("a", 6, 3) for _ in range(2)] == [True, False]
    clock.now += 3600
    assert [buckets.take("a", 6, 3) for _ in range(4)] == [True, True, True, False]
    assert all(buckets.take("none", 0, 1) for _ in range(100))


def test_bucket_table_is_bounded() -> None:
    clock = Ticker()
    buckets = smtprelay.Buckets(size=100, clock=clock)
    for n in range(1000):
        clock.now += 0.001
        buckets.take(str(n), 60, 1)
        buckets.take("busy", 60, 1)  # touched all the time, so it never falls out
    assert len(buckets._full_at) == 100
    assert not buckets.take("busy", 60, 1) and not buckets.take("999", 60, 1) and buckets.take("0", 60, 1)


def test_quota_is_reserved_then_charged() -> None:
    quotas = smtprelay.Quotas("", LOG, now=Ticker(NOON))
    assert quotas.reserve("a", 2) and quotas.reserve("a", 2)
    assert not quotas.reserve("a", 2)  # two under way
    quotas.settle("a", accepted=False)
    assert quotas.reserve("a", 2)
    quotas.settle("a", accepted=True)
    quotas.settle("a", accepted=True)
    assert not quotas.reserve("a", 2) and quotas.reserve("", 0)
    assert quotas.today("a") == {"received": 2} and quotas.today("c") == {}
    assert quotas._reserved == {"": 1}


def test_quotas_survive_a_restart_and_days_are_utc(tmp_path: Path) -> None:
    clock, home = Ticker(NOON), str(tmp_path)
    first = smtprelay.Quotas(home, LOG, now=clock)
    first.count("a", "received")
    first.count("", "sent")
    first.save()
    assert sorted(os.listdir(home)) == ["2026-11-21.0.json", "minutes.0.json"]
    assert stat.S_IMODE((tmp_path / "2026-11-21.0.json").stat().st_mode) == 0o600
    clock.now += 12 * 3600 - 1
    again = smtprelay.Quotas(home, LOG, now=clock)
    assert not again.reserve("a", 1) and again.today() == {"received": 1, "sent": 1}
    clock.now += 1
    assert again.reserve("a", 1)
    again.settle("a", accepted=True)
    again.save()
    assert again.days("a") == {"2026-11-21": {"received": 1}, "2026-11-22": {"received": 1}}
    clock.now += smtprelay.USAGE_DAYS * 86400
    again.save()
    assert list(again.days()) == ["2026-11-22"]


@pytest.mark.parametrize("gone, kept, free", [(0, "", 0), (31, "", 1), (61, "", 2), (-9999, "", 0), (0, "[]", 2)])
def test_the_minute_survives_a_restart(tmp_path: Path, gone: float, kept: str, free: int) -> None:
    clock, home = Ticker(NOON), str(tmp_path)
    first = smtprelay.Quotas(home, LOG, now=clock)
    assert [first.minutes.take("a", 2, 2) for _ in range(3)] == [True, True, False]
    first.save()
    if kept:
        (tmp_path / "minutes.0.json").write_text(kept)
    clock.now += gone
    again = smtprelay.Quotas(home, LOG, now=clock)
    assert [again.minutes.take("a", 2, 2) for _ in range(3)] == [True] * free + [False] * (3 - free)


def test_processes_see_each_other(tmp_path: Path) -> None:
    one, two = (smtprelay.Quotas(str(tmp_path), LOG, part, Ticker(NOON)) for part in "01")
    one.count("a", "received")
    one.save()
    two.save()
    assert not two.reserve("a", 1)
    two.count("a", "received")
    two.save()
    one.save()
    assert one.today("a") == two.today("a") == {"received": 2}


def test_counts_outlive_a_full_disk(tmp_path: Path) -> None:
    home = str(tmp_path / "usage")
    quotas = smtprelay.Quotas(home, LOG, now=Ticker(NOON))
    quotas.count("a", "received")
    shutil.rmtree(home)
    with pytest.raises(OSError):
        quotas.save()
    os.mkdir(home)
    quotas.save()
    assert smtprelay.Quotas(home, LOG, now=Ticker(NOON)).today() == {"received": 1}


@pytest.mark.parametrize("content", ["", "[]", '{"a": 5}', '{"a": {"sent": "x"}}', "\xff"])
def test_broken_counts_are_logged(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "2026-11-21.0.json").write_text(content, "latin-1")
    quotas = smtprelay.Quotas(str(tmp_path), LOG, now=Ticker(NOON))
    assert quotas.today() == {} and "counts_lost" in caplog.text


def test_a_quota_holds_however_many_come_at_once() -> None:
    quotas = smtprelay.Quotas("", LOG, now=Ticker(NOON))
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


NAMES = [("relay.example", True), ("localhost", True), ("127.0.0.1", True), ("::1", True), ("other.example", False)]


@pytest.mark.parametrize("name, good", NAMES)
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
        with pytest.raises(smtprelay.TlsError, match=re.escape(words)):
            smtprelay.server_context(cert, key)
    with pytest.raises(smtprelay.TlsError, match="SMTP_RELAY_CA_FILE"):
        smtprelay.client_context(empty)


@needs_openssl
def test_a_changed_pair_is_reread(tmp_path: Path, pair: str, caplog: pytest.LogCaptureFixture) -> None:
    mine = tmp_path / "mine.pem"
    shutil.copy(pair, mine)
    tls = smtprelay.ServerTls(str(mine), str(mine), LOG)
    first = tls.current()
    assert tls.current() is first
    mine.write_text("broken")
    assert tls.current() is first and "one of them is not PEM" in tls.trouble
    assert tls.current() is first and caplog.text.count("the last good pair stays") == 1
    mine.unlink()
    assert tls.current() is first and "No such file" in tls.trouble
    os.replace(smtprelay.self_signed(str(tmp_path), "relay.example")[0], mine)
    second = tls.current()
    assert second is not first and tls.trouble == ""
    assert handshake(second, smtprelay.client_context(str(mine)), "localhost")[0] == "TLSv1.3"


# === SESSION =================================================================

GOOD = plain("old", "tanstaaftanstaaf")
NULL = "\\0"
B_APP, B_WORD = b64("app").decode(), b64("grün").decode()
AUTHS = {
    "initial response": f"C: {plain('app', 'grün')}\nS: 235 2.7.0",
    "in two steps": f"C: AUTH PLAIN\nS: 334 \nC: {plain('app', 'grün')[11:]}\nS: 235 2.7.0",
    "lower case": f"C: auth plain {plain('app', 'grün')[11:]}\nS: 235",
    "login": f"C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: {B_APP}\nS: 334 UGFzc3dvcmQ6\nC: {B_WORD}\nS: 235 2.7.0",
    "login with user": f"C: AUTH LOGIN {B_APP}\nS: 334 UGFzc3dvcmQ6\nC: {B_WORD}\nS: 235 2.7.0",
    "key as user": f"C: {plain(KEY, 'grün')}\nS: 235",
    "key as both": f"C: {plain(KEY, KEY)}\nS: 235",
    "own authzid": f"C: AUTH PLAIN {b64('app' + chr(0) + 'app' + chr(0) + 'grün').decode()}\nS: 235",
    "another's authzid": f"C: AUTH PLAIN {b64('old' + chr(0) + 'app' + chr(0) + 'grün').decode()}\nS: 535 5.7.8",
    "wrong": f"C: {plain('app', 'x')}\nS: 535 5.7.8 Authentication credentials invalid",
    "unknown user": f"C: {plain('nobody', 'x')}\nS: 535 5.7.8 Authentication credentials invalid",
    "wrong, then right": f"C: {plain('app', 'x')}\nS: 535\nC: {GOOD}\nS: 235",
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
    "twice": f"C: {GOOD}\nS: 235\nC: {GOOD}\nS: 503 5.5.1",
    "twice, after EHLO": f"C: {GOOD}\nS: 235\nC: EHLO x\nS: 250\nC: {GOOD}\nS: 503 5.5.1",
    "in a transaction": f"C: {GOOD}\nS: 235\nC: MAIL FROM:<a@b.test>\nS: 250\nC: {GOOD}\nS: 503 5.5.1",
    "after HELO": f"C: HELO x\nS: 250\nC: {GOOD}\nS: 503 5.5.1",
    "login first": "C: MAIL FROM:<a@b.test>\nS: 530 5.7.0\nC: MAIL nonsense\nS: 530\nC: RCPT TO:<a@b.test>\nS: 503",
    "login still first": f"C: {plain('app', 'x')}\nS: 535\nC: MAIL FROM:<a@example.com>\nS: 530 5.7.0",
    "AUTH=": f"C: {GOOD}\nS: 235\nC: MAIL FROM:<a@b.test> AUTH=<>\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@b.test> AUTH=e+3Dmc2@example.com\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@b.test> AUTH=e+zz\nS: 501 5.5.4",
    "domain": f"C: {plain('app', 'grün')}\nS: 235\nC: MAIL FROM:<a@other.test>\nS: 550 5.7.1\n"
    "C: MAIL FROM:<>\nS: 550 5.7.1\nC: MAIL FROM:<a@example.com>\nS: 250\nC: RSET\nS: 250\n"
    "C: MAIL FROM:<a@other.test>\nS: 550 5.7.1\nC: RCPT TO:<b@c.test>\nS: 503",
    "domain of the second message": f"C: {plain('app', 'grün')}\nS: 235\nC: MAIL FROM:<a@EXAMPLE.com>\nS: 250\n"
    "C: RCPT TO:<b@c.test>\nS: 250\nC: DATA\nS: 354\nC: x\\r\\n.\nS: 250\nC: MAIL FROM:<a@other.test>\nS: 550 5.7.1",
    "null sender without a list": f"C: {GOOD}\nS: 235\nC: MAIL FROM:<>\nS: 250",
}


@pytest.mark.parametrize("name", AUTHS)
def test_auth(doors: Any, name: str) -> None:
    with greeted(doors) as client:
        client.play(AUTHS[name], random.Random(name))


def test_auth_comes_after_ehlo(doors: Any) -> None:
    with Dialogue((doors.host, doors.port)) as client:
        client.ask(GOOD, "503 5.5.1")
        client.ask("STARTTLS", "503 5.5.1")


def test_unknown_user_and_wrong_password_sound_alike(doors: Any) -> None:
    def refused(user: str, password: str) -> str:
        with greeted(doors) as client:
            return client.ask(plain(user, password), "535")

    assert len({refused(*login) for login in [("app", "x"), ("nobody", "x"), ("", ""), ("old", ""), ("job", "x")]}) == 1


FAR = "198.51.100.7"
FAR_DOORS = [
    ("PLAIN needs TLS", "", plain("old", "x"), "538 5.7.11"),
    ("LOGIN needs TLS", "", "AUTH LOGIN", "538 5.7.11"),
    ("CRAM-MD5 does not", "", "AUTH CRAM-MD5", "334"),
    ("PLAIN under TLS", "tls", GOOD, "235"),
    ("no login, no mail", "", "MAIL FROM:<a@b.test>", "530 5.7.0"),
    ("nor under TLS", "tls", "MAIL FROM:<a@b.test>", "530 5.7.0"),
]


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
        client.ask(GOOD, "502 5.5.1")
        client.ask("STARTTLS", "502 5.5.1")
        client.ask("MAIL FROM:<a@b.test>", "250")


def test_tls_required(start: Callable[..., Any], pair: str) -> None:
    relay = start(SMTP_TLS_REQUIRED="1", SMTP_TLS_CERT=pair, SMTP_TLS_KEY=pair, SMTP_AUTH_ANY="1")
    with greeted(relay) as client:
        assert "AUTH" not in client.ask("EHLO x", "250")
        for line in ("HELO x", "MAIL FROM:<a@b.test>", "RCPT TO:<a@b.test>", "DATA", GOOD, "VRFY a", "HELP", "BDAT 0"):
            client.ask(line, "530 5.7.0")
        for line in ("EHLO x", "NOOP", "RSET"):
            client.ask(line, "250")
        start_tls(client, pair)
        client.ask("EHLO x", "250")
        client.ask(GOOD, "235")
        assert "ESMTPSA" in sent(relay, client)


def sent(relay: Any, client: Dialogue, sender: str = "a@example.com") -> str:
    """Send a message; return the headers that it got."""
    reply = client.mail(b"Subject: x\r\n\r\nx\r\n", sender)
    assert reply.startswith("250"), reply
    (stem,) = (s for s in relay.parts.spool.contents if reply.split()[-1] in s) if relay.parts.settings.storage == "memory" else ("",)
    if stem:
        return str(relay.parts.spool.contents[stem].decode())
    (path,) = Path(relay.parts.settings.spool).glob(f"*/{reply.split()[-1]}*.eml")
    return path.read_text()


# -- STARTTLS --


def test_everything_is_forgotten_at_starttls(doors: Any, pair: str) -> None:
    with greeted(doors) as client:
        client.ask(GOOD, "235")
        client.ask("MAIL FROM:<a@b.test>", "250")
        start_tls(client, pair)
        client.ask("MAIL FROM:<a@b.test>", "503 5.5.1")  # no EHLO
        client.ask("AUTH PLAIN", "503 5.5.1")
        client.ask("RCPT TO:<a@b.test>", "503 5.5.1")
        client.ask("EHLO x", "250")
        client.ask("MAIL FROM:<a@b.test>", "530 5.7.0")  # no login
        client.ask("STARTTLS", "503 5.5.1")
        client.ask("STARTTLS now", "501 5.5.4")
        client.ask(GOOD, "235")
        assert "ESMTPSA" in sent(doors, client)
    assert doors.parts.accounts.get("old") and reserved_nothing(doors)


def reserved_nothing(relay: Any) -> bool:
    return bool(wait_until(lambda: not relay.receiving.reception.guard.quotas._reserved))


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
        client.ask(GOOD, "235")
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
        client.ask(GOOD, "235")
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
    ("any login, networks", {"SMTP_PORT": ":2525", "SMTP_AUTH_ANY": "1", "SMTP_ALLOW_NETWORKS": "0.0.0.0/0"}, 78,
     "SMTP_AUTH_ANY=1: expected loopback"),
    ("any login, smtps", {"SMTP_SMTPS_PORT": ":465", "SMTP_AUTH_ANY": "1", "SMTP_TLS_SELF_SIGNED": "1"}, 78, "SMTP_AUTH_ANY=1"),
    ("loopback", {"SMTP_PORT": "2525"}, 0, "fine"),
    ("a socket", {"SMTP_PORT": "unix:/run/smtp.sock"}, 0, "fine"),
    ("networks", {"SMTP_PORT": ":2525", "SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, 0, "fine"),
    ("an account", {"SMTP_PORT": ":2525", "SMTP_AUTH_USER": "a", "SMTP_AUTH_PASSWORD": "x"}, 0, "fine"),
    ("half an account", {"SMTP_AUTH_USER": "a"}, 78, "SMTP_AUTH_USER: expected SMTP_AUTH_PASSWORD"),
    ("TLS required without", {"SMTP_TLS_REQUIRED": "1"}, 78, "SMTP_TLS_REQUIRED, SMTP_SMTPS_PORT: expected"),
]  # fmt: skip


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
    ({}, FAR, "554 5.7.1"),
    ({"SMTP_AUTH_REQUIRED": "0"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, "127.0.0.1", "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, BRIDGE, "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16"}, "local", "250"),
    ({"SMTP_ALLOW_NETWORKS": "172.17.0.0/16", "SMTP_AUTH_REQUIRED": "0"}, BRIDGE, "250"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, FAR, "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, "2001:db8::1", "530 5.7.0"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY}, "127.0.0.1", "250"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY, "SMTP_AUTH_ANY": "1"}, FAR, "554 5.7.1"),
    ({"SMTP_ALLOW_NETWORKS": ANYBODY, "SMTP_AUTH_ANY": "1", "SMTP_AUTH_REQUIRED": "0"}, "::2", "554 5.7.1"),
    ({"SMTP_AUTH_ANY": "1"}, "127.0.0.1", "530 5.7.0"),
    ({"SMTP_AUTH_ANY": "1", "SMTP_AUTH_REQUIRED": "0"}, "::1", "250"),
    ({"SMTP_AUTH_REQUIRED": "1"}, "127.0.0.1", "530 5.7.0"),
]


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


@pytest.mark.parametrize("header, want", [
    (b"PROXY TCP4 198.51.100.7 127.0.0.1 1 2\r\n", "554 5.7.1"), (b"PROXY TCP4 172.17.0.1 127.0.0.1 1 2\r\n", "530 5.7.0"),
    (b"PROXY TCP6 ::ffff:172.17.0.1 ::1 1 2\r\n", "530 5.7.0"), (b"PROXY UNKNOWN\r\n", "530 5.7.0"),
    (b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n", "250")])  # fmt: skip
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


@pytest.mark.parametrize("first, second, third", [
    (FAR, FAR, "198.51.100.8"), ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"), ("local", "local", "127.0.0.1")])  # fmt: skip
def test_connections_per_client(start: Callable[..., Any], first: str, second: str, third: str) -> None:
    relay = start(SMTP_MAX_CONNECTIONS_PER_CLIENT="1", SMTP_ALLOW_NETWORKS=ANYBODY)
    with Visitor(relay, first):
        with Visitor(relay, second) as one_too_many:
            assert one_too_many.greeting.startswith("421 4.3.2") and one_too_many.closed()
        with Visitor(relay, third) as other:
            assert other.greeting.startswith("220")
    assert metric(relay, "smtp_connections_refused_total") == 1
    wait_until(lambda: not relay.receiving.reception.clients)
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
    for login, want in ((GOOD, "250"), (GOOD, "450 4.7.1"), (plain("job", "mp_live_77"), "250")):
        with greeted(relay) as client:
            client.ask(login, "235")
            client.ask("MAIL FROM:<a@b.test>", want)


def test_a_quota_is_charged_at_the_250_alone(start: Callable[..., Any], tmp_path: Path) -> None:
    relay = start(SMTP_USERS_FILE=users_file(tmp_path, {"a": {"password": "x", "quota_daily": 2}}), SMTP_MAX_SIZE="100")
    quotas = relay.receiving.reception.guard.quotas
    ends = ["RSET", "EHLO x", "NOOP", "MAIL FROM:<second@b.test>"]
    with greeted(relay) as client:
        client.ask(plain("a", "x"), "235")
        for end in ends:
            client.ask("MAIL FROM:<a@b.test>", "250")
            client.ask(end, "250|503")
            client.ask("RSET", "250")
            assert not quotas._reserved
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
                wait_until(lambda: "".join(p.read_text() for p in counts.glob("2*.r.json")).count('"received": 2') == 2)
                wait_until(lambda: '"minute"' in (counts / "minutes.r.json").read_text())
            relay.stop(number)
            relay.start()


# === OBSERVING ===============================================================


def audited(path: Path) -> list[dict[str, Any]]:
    """Read an audit log; every line of it is one object of ours."""
    lines = [json.loads(line) for line in path.read_bytes().decode("ascii").split("\n")[:-1]]
    assert all(re.fullmatch(r"[0-9T:.-]+Z", line["time"]) and line["event"] for line in lines)
    return lines


def test_an_audit_line_for_each_event(program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path, pair: str) -> None:
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
        "session_start", "session_end", "login", "refused", "blocked", "quota", "accepted", "delivered", "failed"}  # fmt: skip
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
def test_no_password_in_any_log(program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path, form: str) -> None:
    secrets = ["Kennwort-1", "Kennwort-2", "Kennwort-3", "falsches-Kennwort", "mp_live_geheim", "mp_live_gestern"]
    good, own, relay_secret, wrong, key, old_key = secrets
    users = {"app": {"password": cheap_hash(good), "api_key": key, "relay_password": own}, "clear": {"password": own}}
    next_hop, audit = hop(users={"hop": relay_secret}), tmp_path / "audit"
    relay = program(SMTP_DEBUG="1", SMTP_LOG_LEVEL="debug", SMTP_LOG_FORMAT=form, SMTP_AUDIT_LOG=str(audit), SMTP_AUTH_FAILURES="50",
                    SMTP_USERS_FILE=users_file(tmp_path, users), SMTP_RELAY_USERNAME="hop", SMTP_RELAY_PASSWORD=relay_secret,
                    SMTP_MAX_ERRORS="100", **next_hop.settings())  # fmt: skip
    with greeted(relay) as client:
        client.ask(plain("app", wrong), "535")
        client.ask(plain("nobody", wrong), "535")
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
        client.ask(GOOD, "235")  # the last good one
    users_file(tmp_path, {"new": {"password": "x"}})
    assert fetch(relay, "/readyz")[0] == 200
    with greeted(relay) as client:
        client.ask(GOOD, "535")
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
        client.ask(GOOD, "235")


def test_sighup_rereads_accounts_and_certificate(program: Callable[..., Program], tmp_path: Path, pair: str) -> None:
    mine = tmp_path / "mine.pem"
    shutil.copy(pair, mine)
    relay = program(SMTP_USERS_FILE=users_file(tmp_path, USERS), SMTP_TLS_CERT=str(mine), SMTP_TLS_KEY=str(mine))
    relay.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "certificate_reread" in relay.log())
    with greeted(relay, pair=pair) as client:
        client.ask(GOOD, "235")


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


# === CLIENTS =================================================================
# Each mechanism in each TLS mode, by programs that people use.

WORD = "Kennwort & Co"
MODES = ["clear", "starttls", "tls"]
METHODS = ["PLAIN", "LOGIN", "CRAM-MD5"]


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory, pair: str) -> Iterator[Any]:
    """A relay with one account and every mechanism, in clear, with STARTTLS, and on a TLS port."""
    settings = {**QUICK, "SMTP_STORAGE": "memory", "SMTP_TLS_CERT": pair, "SMTP_TLS_KEY": pair, "SMTP_SMTPS_PORT": "127.0.0.1:0",
                "SMTP_AUTH_USER": "ann", "SMTP_AUTH_PASSWORD": WORD, "SMTP_AUTH_FAILURES": "1000"}  # fmt: skip
    with smtprelay.start(**settings) as relay:
        yield relay


def door(relay: Any, mode: str) -> int:
    return int(relay.parts.smtps[0].getsockname()[1] if mode == "tls" else relay.port)


def by_curl(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    (home / "letter").write_text("Subject: x\r\n\r\nx\r\n")
    scheme = "smtps" if mode == "tls" else "smtp"
    command = [need("curl"), "-sS", f"{scheme}://127.0.0.1:{door(relay, mode)}", "--cacert", pair, "--user", f"ann:{word}",
               "--login-options", f"AUTH={method}", "--mail-from", "a@b.test", "--mail-rcpt", "c@d.test", "-T", str(home / "letter")]  # fmt: skip
    return subprocess.run(command + ["--ssl-reqd"] * (mode == "starttls"), capture_output=True, timeout=20).returncode


def by_swaks(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    tls = {"clear": [], "starttls": ["-tls"], "tls": ["--tls-on-connect"]}[mode]
    command = [need("swaks"), "--server", f"127.0.0.1:{door(relay, mode)}", "--from", "a@b.test", "--to", "c@d.test",
               "--auth", method, "--auth-user", "ann", "--auth-password", word, *tls]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if "not available" in done.stdout + done.stderr:
        pytest.skip("swaks lacks a Perl module: " + done.stderr.strip()[-100:])
    return done.returncode


def by_msmtp(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    tls = {"clear": "tls off", "starttls": "tls on\ntls_starttls on", "tls": "tls on\ntls_starttls off"}[mode]
    config = home / "msmtprc"
    config.write_text(f"account default\nhost 127.0.0.1\nport {door(relay, mode)}\nfrom a@b.test\nauth {method.lower()}\nuser ann\n"
                      f'passwordeval "cat {home}/word"\n{tls}\n' + ("" if mode == "clear" else f"tls_trust_file {pair}\n"))  # fmt: skip
    config.chmod(0o600)
    (home / "word").write_text(word + "\n")
    command = [need("msmtp"), "-C", str(config), "c@d.test"]
    return subprocess.run(command, input=b"Subject: x\n\nx\n", capture_output=True, timeout=20).returncode


def by_smtplib(relay: Any, pair: str, mode: str, method: str, word: str, home: Path) -> int:
    context = smtprelay.client_context(pair)
    port = door(relay, mode)
    with smtplib.SMTP_SSL("127.0.0.1", port, context=context) if mode == "tls" else smtplib.SMTP("127.0.0.1", port) as client:
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


@pytest.mark.parametrize("client", [by_curl, by_swaks, by_msmtp, by_smtplib])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", MODES)
def test_each_mechanism_in_each_mode(open_house: Any, pair: str, tmp_path: Path, client: Any, method: str, mode: str) -> None:
    before = metric(open_house, "smtp_messages_received_total")
    assert client(open_house, pair, mode, method, WORD, tmp_path) == 0
    assert metric(open_house, "smtp_messages_received_total") == before + 1


@pytest.mark.parametrize("client", [by_curl, by_swaks, by_msmtp, by_smtplib])
def test_each_client_understands_a_refused_login(open_house: Any, pair: str, tmp_path: Path, client: Any) -> None:
    before = metric(open_house, "smtp_auth_attempts_total")["failure"]
    assert client(open_house, pair, "starttls", "PLAIN", "falsch", tmp_path) != 0
    assert metric(open_house, "smtp_auth_attempts_total")["failure"] > before


def test_nodemailer(open_house: Any, pair: str) -> None:
    modules = next((str(p / ".ci/node_modules") for p in Path(__file__).resolve().parents if (p / ".ci/node_modules").is_dir()),
                   os.environ.get("NODE_PATH", ""))  # fmt: skip
    if not (Path(modules) / "nodemailer").is_dir():
        pytest.skip("nodemailer is not installed (npm ci in .ci)")
    cases = [{"mode": mode, "port": door(open_house, mode), "method": method, "word": word}
             for mode in MODES for method, word in [*((m, WORD) for m in METHODS), ("PLAIN", "falsch")]]  # fmt: skip
    done = subprocess.run([need("node"), "-e", NODE, json.dumps(cases), pair], env={**os.environ, "NODE_PATH": modules},
                          capture_output=True, text=True, timeout=30)  # fmt: skip
    assert done.stdout.split() == ["0", "0", "0", "535"] * 3, (done.stdout, done.stderr)


@pytest.mark.parametrize("mode", ["starttls", "tls"])
def test_openssl_s_client(open_house: Any, pair: str, mode: str) -> None:
    how = ["-starttls", "smtp"] if mode == "starttls" else []
    talk = subprocess.run(
        [need("openssl"), "s_client", "-connect", f"127.0.0.1:{door(open_house, mode)}", *how, "-CAfile", pair, "-verify_return_error",
         "-verify_hostname", "relay.example", "-crlf", "-quiet"],
        input="EHLO x\nQUIT\n", capture_output=True, text=True, timeout=20)  # fmt: skip
    assert "250-ENHANCEDSTATUSCODES" in talk.stdout and "221 2.0.0" in talk.stdout
    assert "STARTTLS" not in talk.stdout and "AUTH PLAIN" in talk.stdout
