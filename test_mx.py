"""Delivery by lanes: next hops that fail, MX mode, failover, reports, faults."""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import random
import re
import shutil
import smtplib
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

import pytest

import smtprelay
from smtprelay import Message, Scheduler, Settings, Status
from test_resolver import FakeDns, dns_answer, dns_question, dns_record

QUICK = {"SMTP_RETRY_INITIAL_DELAY": "30ms", "SMTP_RETRY_MAX_DELAY": "100ms", "SMTP_RETRY_JITTER": "0", "SMTP_HOSTNAME": "relay.test"}


def until(truth: Callable[[], Any], seconds: float = 5.0, shown: Callable[[], Any] = str) -> Any:
    """Wait until something is true; return it."""
    end = time.monotonic() + seconds
    while True:
        value = truth()
        if value:
            return value
        assert time.monotonic() < end, f"did not come true in time: {shown()}"
        time.sleep(0.005)


class FakeHop(socketserver.ThreadingTCPServer):
    """A scripted next hop: `script` maps a stage to what it does there, once for each item of a list.

    A reply is sent as it stands; None is the usual one. Words: drop, hang, trickle, endless, garbage, long.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, script: dict[str, Any] | None = None, extensions: str = "PIPELINING", host: str = "127.0.0.1", port: int = 0) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), HopSession)
        self.script, self.extensions = {k: list(v) if isinstance(v, list) else v for k, v in (script or {}).items()}, extensions
        self.commands: list[str] = []
        self.mails: list[tuple[list[str], bytes]] = []
        self.connections = 0
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> FakeHop:
        return self

    def __exit__(self, *args: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    @property
    def place(self) -> str:
        return smtprelay.host_port(*self.server_address[:2])  # type: ignore[arg-type]

    def at(self, stage: str) -> str | None:
        step = self.script.get(stage)
        if isinstance(step, list):
            return step.pop(0) if step else None
        return step

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Dropped(Exception):
    pass


class HopSession(socketserver.StreamRequestHandler):
    server: FakeHop

    def say(self, stage: str, usual: str) -> str:
        said = self.server.at(stage) or usual
        if said == "drop":
            raise Dropped
        if said in ("hang", "trickle", "endless"):
            while not self.server.over.wait(0.02):
                if said == "trickle":
                    self.wfile.write(b"2")
                if said == "endless":
                    self.wfile.write(b"250-more and more\r\n" * 1000)
            raise Dropped
        self.wfile.write({"garbage": b"\x00\xffnonsense\r\n", "long": b"2" * 70000 + b"\r\n"}.get(said, said.encode() + b"\r\n"))
        return said

    def handle(self) -> None:
        self.server.connections += 1
        with contextlib.suppress(Dropped, OSError):
            self.say("greeting", "220 hop.test ESMTP")
            recipients: list[str] = []
            has_sender = False
            for line in self.rfile:
                command = line.decode("utf-8", "replace").rstrip("\r\n")
                self.server.commands.append(command)
                verb = command[:4].upper()
                if verb == "EHLO":
                    lines = ["hop.test", *self.server.extensions.split(",")]
                    self.say("hello", "\r\n".join([*(f"250-{x}" for x in lines[:-1]), f"250 {lines[-1]}"]))
                elif verb == "QUIT":
                    return
                elif verb == "MAIL":
                    recipients, has_sender = [], self.say("mail", "250 ok").startswith("250")
                elif verb == "RCPT":
                    usual = self.server.at("rcpt") or "250 ok" if has_sender else "503 no sender"
                    if self.say("rcpt:" + command[9:].partition(">")[0], usual).startswith("25"):
                        recipients.append(command[9:].partition(">")[0])
                elif verb == "DATA":
                    if not self.say("data", "354 go" if recipients else "503 nobody").startswith("354"):
                        continue
                    content = b"".join(iter(self.rfile.readline, b".\r\n"))
                    if self.server.at("content") == "take and drop":
                        self.server.mails.append((recipients, content))
                        return
                    answer = self.server.at("end") or "250 ok taken"
                    if answer.startswith("250"):
                        self.server.mails.append((recipients, content))
                    self.say("-", answer)
                else:
                    self.say(verb.lower(), {"RSET": "250 ok", "AUTH": "235 ok"}.get(verb, "502 what"))


def send(relay: smtprelay.Relay, *to: str, sender: str = "me@here.test", content: bytes = b"Subject: hi\r\n\r\nhello\r\n",
         mail: list[str] | None = None, rcpt: list[str] | None = None) -> str:
    with smtplib.SMTP(relay.host, relay.port, timeout=5) as client:
        client.sendmail(sender, list(to), content, mail or [], rcpt or [])
    return newest(relay)


def newest(relay: smtprelay.Relay) -> str:
    return max(stem for stem, _ in relay.parts.spool.names())


def record(relay: smtprelay.Relay, stem: str) -> Message:
    return relay.parts.spool.load(stem)


def statuses(relay: smtprelay.Relay, stem: str) -> dict[str, str]:
    return {r.address.partition("@")[0]: r.status.value for r in record(relay, stem).recipients}


def finished(relay: smtprelay.Relay, stem: str) -> Message:
    until(lambda: record(relay, stem).status in (Status.FORWARDED, Status.FAILED), shown=lambda: record(relay, stem))
    return record(relay, stem)


@contextlib.contextmanager
def relaying(*hops: FakeHop | str, **settings: str) -> Iterator[smtprelay.Relay]:
    places = ",".join(h if isinstance(h, str) else h.place for h in hops)
    with smtprelay.start(**{**QUICK, "SMTP_RELAY_HOST": places, "SMTP_RELAY_TIMEOUT": "300ms", **settings}) as relay:
        yield relay


# -- every failure at every stage --

HOST, LATER, NEVER, DONE = "host", "retrying", "failed", "forwarded"
SILENT = ("drop", "hang", "trickle", "garbage", "long", "endless")
TABLE = [
    *((stage, how, HOST) for stage in ("greeting", "hello") for how in (*SILENT, "421 going", "554 no")),
    *(("mail", how, LATER) for how in (*SILENT, "451 later")),
    ("mail", "421 going", HOST), ("mail", "530 log in", HOST), ("mail", "550 no", NEVER),
    *(("rcpt", how, LATER) for how in (*SILENT, "450 grey", "452 many", "552 many")),
    ("rcpt", "550 no", NEVER), ("rcpt", "421 going", HOST),
    *(("data", how, LATER) for how in (*SILENT, "451 later")), ("data", "554 no", NEVER),
    *(("end", how, LATER) for how in (*SILENT, "451 later", "452 full")), ("end", "554 spam", NEVER),
]


@pytest.mark.parametrize("row", TABLE, ids=" ".join)
def test_what_a_failure_means(row: tuple[str, str, str]) -> None:
    """The first time it goes wrong, then it goes well; a host's trouble is no attempt of the message."""
    stage, how, meaning = row
    extension = ("PIPELINING", "8BITMIME")[TABLE.index(row) % 2]
    with FakeHop({stage: [how]}, extension) as hop, relaying(hop, SMTP_BOUNCE="0", SMTP_RELAY_TIMEOUT="120ms") as relay:
        message = finished(relay, send(relay, "bob@there.test"))
        assert message.status.value == (NEVER if meaning == NEVER else DONE)
        assert message.attempts == (2 if meaning == LATER else 1)
        assert len(hop.mails) == (0 if meaning == NEVER else 1)


def test_one_recipient_fails_alone() -> None:
    script = {"rcpt:grey@x.test": ["450 later"], "rcpt:no@x.test": "550 5.1.1 no such user"}
    with FakeHop(script) as hop, relaying(hop, SMTP_BOUNCE="0") as relay:
        stem = send(relay, "yes@x.test", "grey@x.test", "no@x.test")
        message = finished(relay, stem)
        assert statuses(relay, stem) == {"yes": DONE, "grey": DONE, "no": NEVER}
        assert [rs for rs, _ in hop.mails] == [["yes@x.test"], ["grey@x.test"]]
        assert message.recipients[2].reply == "5.1.1 no such user"


def test_no_answer_after_the_dot_is_sent_again() -> None:
    with FakeHop({"content": ["take and drop"]}) as hop, relaying(hop) as relay:
        assert finished(relay, send(relay, "bob@x.test")).status is Status.FORWARDED
        assert len(hop.mails) == 2


def test_the_transcript_is_kept_and_shows_no_secret() -> None:
    with FakeHop({"mail": ["451 4.7.1 come back"]}, "AUTH PLAIN") as hop, \
            relaying(hop, SMTP_RELAY_USERNAME="app", SMTP_RELAY_PASSWORD="geheim") as relay:
        lines = finished(relay, send(relay, "bob@x.test")).transcript
        assert "S: 451 4.7.1 come back" in lines and "C: AUTH PLAIN ***" in lines
        assert lines[0].startswith("-- 2") and lines[0].endswith(hop.place)
        assert sum(line.startswith("-- ") for line in lines) == 2


# -- one dead next hop --

def test_a_dead_host_costs_one_connection_a_step() -> None:
    with FakeHop({"greeting": ["554 no"] * 3}) as hop, \
            relaying(hop, SMTP_RETRY_INITIAL_DELAY="100ms", SMTP_RETRY_MULTIPLIER="1") as relay:
        with smtplib.SMTP(relay.host, relay.port) as client:
            for i in range(100):
                client.sendmail("me@here.test", [f"u{i}@x.test"], b"\r\nhello\r\n")
        until(lambda: hop.connections == 2)
        until(lambda: relay.delivering.scheduler.lanes["smarthost"].steps == 2)
        until(lambda: len(hop.mails) == 100)
        assert hop.connections <= 3 + 4
        until(lambda: {relay.parts.spool.load(stem).attempts for stem, _ in relay.parts.spool.names()} == {1})


def test_failover_and_back() -> None:
    with FakeHop({"greeting": ["421 busy"]}) as first, FakeHop() as second, relaying(first, second) as relay:
        assert finished(relay, send(relay, "a@x.test")).recipients[0].host == "127.0.0.1"
        assert (len(first.mails), len(second.mails)) == (0, 1)
        finished(relay, send(relay, "b@x.test"))
        assert (len(first.mails), len(second.mails)) == (1, 1)


def test_a_host_that_hangs_is_tried_last_for_a_while() -> None:
    with FakeHop({"greeting": ["hang"] * 9}) as first, FakeHop() as second, relaying(first, second, SMTP_RELAY_TIMEOUT="1100ms") as relay:
        for to in "abc":
            finished(relay, send(relay, f"{to}@x.test"))
        assert (first.connections, len(second.mails)) == (1, 3)


def test_xoauth2_rereads_its_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    with FakeHop({"auth": ["334 eyJzdGF0dXMiOiI0MDEifQ=="], "": ["535 5.7.8 expired"]}, "AUTH XOAUTH2") as hop, \
            relaying(hop, SMTP_RELAY_AUTH="xoauth2", SMTP_RELAY_USERNAME="me", SMTP_RELAY_PASSWORD_FILE=str(token),
                     SMTP_RETRY_INITIAL_DELAY="200ms") as relay:
        stem = send(relay, "bob@x.test")
        until(lambda: record(relay, stem).last_error)
        assert "535" in record(relay, stem).last_error
        token.write_text("new\n")
        finished(relay, stem)
        said = [smtprelay.base64.b64decode(c.split()[2]) for c in hop.commands if c.startswith("AUTH")]
        assert said == [b"user=me\1auth=Bearer old\1\1", b"user=me\1auth=Bearer new\1\1"]


# -- what is sent, and to whom --

def test_rewriting() -> None:
    with FakeHop() as hop, relaying(hop, SMTP_RELAY_RETURN_PATH="bounces@here.test", SMTP_RELAY_REDIRECT_TO="dev@here.test") as relay:
        stem = send(relay, "a@x.test", "b@x.test")
        finished(relay, stem)
        assert statuses(relay, stem) == {"a": DONE, "b": DONE}
        assert hop.mails[0][0] == ["dev@here.test"]
        assert hop.mails[0][1].startswith(b"X-Original-To: a@x.test\r\nX-Original-To: b@x.test\r\nReceived: ")
        assert "MAIL FROM:<bounces@here.test>" in hop.commands
        finished(relay, send(relay, "c@x.test", sender=""))
        assert "MAIL FROM:<>" in hop.commands


def test_only_allowed_recipients_are_sent_to() -> None:
    with FakeHop() as hop, relaying(hop, SMTP_RELAY_ALLOWED_RECIPIENTS=r"@ok\.test$") as relay:
        stem = send(relay, "a@ok.test", "b@x.test")
        until(lambda: record(relay, stem).status is Status.HELD)
        assert statuses(relay, stem) == {"a": DONE, "b": "held"}
        smtprelay.Backstage(relay.delivering).release(record(relay, stem).id, [])
        finished(relay, stem)
        assert [rs for rs, _ in hop.mails] == [["a@ok.test"], ["b@x.test"]]


# -- reports --

def test_a_failure_is_reported_once() -> None:
    script = {"rcpt:a@x.test": "550 5.1.1 nobody", "rcpt:b@x.test": "550 5.1.1 nobody"}
    with FakeHop(script, "DSN") as hop, relaying(hop) as relay:
        stem = send(relay, "a@x.test", "b@x.test", "c@x.test", mail=["ENVID=abc"], rcpt=["ORCPT=rfc822;o@x.test"])
        finished(relay, stem)
        until(lambda: len(hop.mails) == 2)
        to, text = hop.mails[1]
        assert to == ["me@here.test"] and "MAIL FROM:<>" in hop.commands
        assert text.count(b"Action: failed") == 2 and b"Final-Recipient: rfc822; b@x.test" in text
        assert b"Original-Envelope-Id: abc" in text and b"Original-Recipient: rfc822; o@x.test" in text
        assert b"Subject: hi" in text and b"\r\nhello\r\n" not in text
        until(lambda: record(relay, newest(relay)).status is Status.FORWARDED)


@pytest.mark.parametrize("sender, settings, rcpt", [
    ("", {}, []), ("me@here.test", {"SMTP_BOUNCE": "0"}, []), ("me@here.test", {}, ["NOTIFY=NEVER"]), ("me@here.test", {}, ["NOTIFY=DELAY"])])
def test_no_report(sender: str, settings: dict[str, str], rcpt: list[str]) -> None:
    with FakeHop({"rcpt:a@x.test": "550 no"}) as hop, relaying(hop, **settings) as relay:
        finished(relay, send(relay, "a@x.test", sender=sender, rcpt=rcpt))
        assert len(list(relay.parts.spool.names())) == 1


def test_dsn_is_passed_on_where_it_is_offered() -> None:
    mail, rcpt = ["RET=HDRS", "ENVID=e1"], ["NOTIFY=SUCCESS,FAILURE", "ORCPT=rfc822;x@y.test"]
    with FakeHop({}, "DSN") as able, relaying(able) as relay:
        finished(relay, send(relay, "a@x.test", mail=mail, rcpt=rcpt))
        assert "MAIL FROM:<me@here.test> RET=HDRS ENVID=e1" in able.commands
        assert "RCPT TO:<a@x.test> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;x@y.test" in able.commands
        assert len(list(relay.parts.spool.names())) == 1
    with FakeHop() as unable, relaying(unable) as relay:
        finished(relay, send(relay, "a@x.test", mail=mail, rcpt=rcpt))
        until(lambda: len(unable.mails) == 2)
        assert b"Action: relayed" in unable.mails[1][1] and "MAIL FROM:<me@here.test>" in unable.commands


@pytest.mark.parametrize("command", [
    "MAIL FROM:<a@b> RET=ALL", "MAIL FROM:<a@b> ENVID=+0D+0A", "MAIL FROM:<a@b> ENVID=" + "x" * 101,
    "RCPT TO:<a@b> NOTIFY=NEVER,DELAY", "RCPT TO:<a@b> ORCPT=nothing", "RCPT TO:<a@b> ORCPT=rfc822;+0A"])
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
        stem = send(relay, '"a b"@x.test', mail=["RET=FULL", "ENVID=e+2B"], rcpt=["NOTIFY=FAILURE", "ORCPT=rfc822;<x>"])
        until(lambda: list(tmp_path.glob("2*/*.json")))
        next(tmp_path.glob("2*/*.json")).unlink()
        m = record(relay, stem)
        assert (m.ret, m.envid, m.recipients[0].address, m.recipients[0].notify, m.recipients[0].orcpt) == (
            "FULL", "e+2B", '"a b"@x.test', "FAILURE", "rfc822;<x>")


# -- MX mode --

MX, A = 15, 1


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
        more = {"SMTP_DELIVERY": "mx", "SMTP_MX_PORT": str(port), "SMTP_DNS_SERVER": smtprelay.host_port(*dns.server), "SMTP_RELAY_TIMEOUT": "500ms"}
        with smtprelay.start(**{**QUICK, **more, **settings}) as relay:
            yield relay


def test_mail_goes_to_the_best_mx_that_answers() -> None:
    with FakeHop({"greeting": "554 no"}, host="127.0.0.2") as first, FakeHop(host="127.0.0.3", port=first.server_address[1]) as second, \
            by_mx(first.server_address[1], zone(mx_x_test="10 mx1.test,20 mx2.test", a_mx1_test="127.0.0.2", a_mx2_test="127.0.0.3")) as relay:
        r = finished(relay, send(relay, "bob@x.test")).recipients[0]
        assert (r.host, r.ip, r.tls, r.verified) == ("mx2.test", "127.0.0.3", "", False)
        assert first.connections == 1 and len(second.mails) == 1


def test_domains_with_the_same_hosts_share_a_transaction_and_a_dead_one_holds_nobody() -> None:
    script = zone(mx_x_test="10 mx.test", mx_y_test="10 mx.test", mx_dead_test="10 dead.test", a_mx_test="127.0.0.2", a_dead_test="127.0.0.9",
                  mx_null_test="0 ")
    with FakeHop(host="127.0.0.2") as hop, by_mx(hop.server_address[1], script, SMTP_BOUNCE="0") as relay:
        stem = send(relay, "a@dead.test", "b@x.test", "c@y.test", "d@null.test", "e@none.test")
        until(lambda: list(statuses(relay, stem).values()) == ["retrying", DONE, DONE, NEVER, NEVER] or statuses(relay, stem)["a"] == "received"
              and list(statuses(relay, stem).values())[1:] == [DONE, DONE, NEVER, NEVER])
        assert hop.mails[0][0] == ["b@x.test", "c@y.test"]
        assert record(relay, stem).status in (Status.RETRYING, Status.FORWARDING) and record(relay, stem).attempts == 1
        until(lambda: relay.delivering.scheduler.lanes["dead.test"].steps > 0)


def test_a_refusal_for_now_is_waited_out_in_each_lane() -> None:
    script = zone(mx_x_test="10 mx.test", mx_y_test="10 mx.test", a_mx_test="127.0.0.2")
    with FakeHop({"rcpt": ["450 grey", "450 grey"]}, host="127.0.0.2") as hop, by_mx(hop.server_address[1], script) as relay:
        message = finished(relay, send(relay, "b@x.test", "c@y.test"))
        assert [r.attempts for r in message.recipients] == [2, 2]
        assert sum(c.startswith("RCPT") for c in hop.commands) == 4


def test_we_do_not_deliver_to_ourselves() -> None:
    with by_mx(0, zone(a_own_test="127.0.0.1", mx_named_test="5 relay.test", a_relay_test="127.0.0.5"), SMTP_BOUNCE="0") as relay:
        relay.delivering.delivery.settings = smtprelay.dataclasses.replace(relay.parts.settings, mx_port=relay.port)
        for domain in ("own.test", "named.test"):
            message = finished(relay, send(relay, "bob@" + domain))
            assert message.status is Status.FAILED and "5.4.6" in message.last_error
    with FakeHop({"hello": "250 RELAY.test"}, host="127.0.0.2") as hop, by_mx(hop.server_address[1], zone(a_x_test="127.0.0.2"), SMTP_BOUNCE="0") as relay:
        assert "5.4.6" in finished(relay, send(relay, "bob@x.test")).last_error


def test_a_failed_handshake_never_falls_back_to_plaintext() -> None:
    with FakeHop({"star": "220 go"}, "STARTTLS", host="127.0.0.2") as hop, by_mx(hop.server_address[1], zone(a_x_test="127.0.0.2")) as relay:
        stem = send(relay, "bob@x.test")
        until(lambda: "TLS failed" in record(relay, stem).last_error)
        assert not any(c.startswith("MAIL") for c in hop.commands) and record(relay, stem).attempts == 0


# -- the scheduler alone --

class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stem_at(number: int) -> str:
    now = int(time.time() * 1e6) + number
    return f"2026-11-21/{now:013x}abc_0123456789abcdef"


def scheduler(clock: Clock, **env: str) -> Scheduler:
    return Scheduler(Settings.read({"SMTP_RETRY_JITTER": "0", **env}), clock, random.Random(1))


def test_dead_next_hops_leave_workers_to_others() -> None:
    clock = Clock()
    s = scheduler(clock, SMTP_DELIVERY="mx")
    for i in range(200):
        s.put(stem_at(i), f"dead{i % 20}.test")
    failed = list(iter(lambda: s.take(0), None))
    assert len(failed) == 6  # of 8, before any has answered: two are kept back
    s.put(stem_at(999), "good.test")
    assert s.take(0) is None
    for t in failed:
        s.throttle(t.lane, "dead")
        s.done(t, 0.0)
    for _ in range(4):  # each dead lane has its turn, none a second one before good.test
        tasks = list(iter(lambda: s.take(0), None))
        assert sum(s.lanes[t.lane].steps > 0 for t in tasks) <= 4
        if "good.test" in [t.lane for t in tasks]:
            return
        for t in tasks:
            s.throttle(t.lane, "dead")
            s.done(t, 0.0)
        clock.now += 10
    raise AssertionError("good.test was starved")


def test_a_slow_lane_gets_half_and_a_quick_one_all_its_connections() -> None:
    clock = Clock()
    s = scheduler(clock, SMTP_DELIVERY="mx", SMTP_RELAY_CONNECTIONS="8")
    for i in range(40):
        s.put(stem_at(i), "slow.test")
    s.put(stem_at(50), "other.test", 3600)
    first = s.take(0)
    assert first and s.take(0) is None  # a lane that has not answered yet gets one
    s.put(stem_at(60), "third.test")
    s.reached("slow.test")
    clock.now += 2
    assert sorted(t.lane for t in iter(lambda: s.take(0), None)) == ["slow.test"] * 3 + ["third.test"]


def test_a_message_is_in_one_workers_hands() -> None:
    s = scheduler(Clock(), SMTP_DELIVERY="mx")
    stem = stem_at(1)
    s.put(stem, "a.test")
    s.put(stem, "b.test")
    one = s.take(0)
    assert one and s.take(0) is None and len(s) == 1
    s.done(one)
    two = s.take(0)
    assert two and two.lane == "b.test" and len(s) == 1
    s.done(two)
    assert len(s) == 0 and s.lanes == {} and s.waiting == {}


def test_what_is_too_old_leaves_a_throttled_lane() -> None:
    clock = Clock()
    s = scheduler(clock, SMTP_RETRY_MAX_AGE="1h")
    old = [f"2026-11-20/{int((time.time() - 7200) * 1e6) + i:013x}abc_0123456789abcdef" for i in range(5)]
    for stem in [*old, stem_at(1)]:
        s.put(stem, "smarthost")
    task = s.take(0)
    assert task
    s.throttle("smarthost", "dead")
    s.done(task, 0.0)
    assert [t.stem for t in iter(lambda: s.take(0), None)] == old


# -- scripted failures --

FAULTS = "rcpt to=*@slow.test 450 4.2.0 greylisted first 2; mail from=bad@* 550 no; end to=lost@* drop kept; data to=full@* 452; rcpt to=wait@* delay 40ms"


def test_scripted_failures() -> None:
    with smtprelay.start(SMTP_FAULTS=FAULTS) as relay, smtplib.SMTP(relay.host, relay.port) as c:
        c.ehlo("x")
        assert c.mail("bad@x.test") == (550, b"5.0.0 no")
        assert c.mail("good@x.test")[0] == 250
        assert [c.rcpt("a@slow.test") for _ in range(3)] == [(450, b"4.2.0 greylisted")] * 2 + [(250, b"2.1.5 Recipient ok")]
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


@pytest.mark.parametrize("rules", ["nowhere 450", "rcpt", "rcpt 250 ok", "connect to=x drop", "mail drop kept", "rcpt 450 a first x", "rcpt delay x", "rcpt 450 \xe9"])
def test_wrong_rules_are_reported(rules: str) -> None:
    with pytest.raises(smtprelay.SettingsError, match="SMTP_FAULTS: rule 2"):
        smtprelay.Faults("mail 450 x; " + rules)


# -- TLS to MX hosts, with another relay as the host --

def test_tls_is_used_and_verified_when_offered(tmp_path: Path) -> None:
    cert, key = smtprelay.self_signed(str(tmp_path), "mx.test")
    script = zone(mx_x_test="10 mx.test", a_mx_test="127.0.0.2")
    with smtprelay.start(SMTP_PORT="127.0.0.2:0", SMTP_TLS_CERT=cert, SMTP_TLS_KEY=key, SMTP_HOSTNAME="mx.test") as mx:
        for more, expected in ({"SMTP_RELAY_CA_FILE": cert}, True), ({"SMTP_RELAY_TLS_VERIFY": "0"}, False):
            with by_mx(mx.port, script, **more) as relay:
                r = finished(relay, send(relay, "bob@x.test")).recipients[0]
                assert (r.host, r.ip, r.tls, r.verified) == ("mx.test", "127.0.0.2", "TLSv1.3", expected)
        with by_mx(mx.port, script) as relay:
            stem = send(relay, "bob@x.test")
            until(lambda: "certificate" in record(relay, stem).last_error.lower())
            assert record(relay, stem).attempts == 0


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
        master = re.sub(r"(?m)^smtp      inet", f"{port}      inet", dist.read_text())
        Path(f"{top}/etc/master.cf").write_text(re.sub(r"(?m)^(\S+ +\S+ +\S+ +\S+ +)y( )", r"\1n\2", master))
        Path(f"{top}/etc/dynamicmaps.cf").touch()
        run = functools.partial(subprocess.run, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        started = run(["/usr/sbin/postfix", "-c", f"{top}/etc", "start"])
        try:
            assert started.returncode == 0, started.stderr
            yield "127.0.0.1", port, top
        finally:
            run(["/usr/sbin/postfix", "-c", f"{top}/etc", "stop"])


def delivered(top: str) -> list[bytes]:
    return [path.read_bytes() for path in Path(top, "mail/box/new").glob("*")] if Path(top, "mail/box/new").exists() else []


def test_postfix_as_smart_host(postfix: tuple[str, int, str]) -> None:
    host, port, top = postfix
    content = b"Subject: dots\r\n\r\n.\r\n..two\r\nend" + b"\r\nline" * 20000 + b"\r\n"
    with smtprelay.start(SMTP_RELAY_HOST=f"{host}:{port}", SMTP_RELAY_TLS="starttls", SMTP_RELAY_TLS_VERIFY="0", **QUICK) as relay:
        before = len(delivered(top))
        stem = send(relay, "bob@x.test", "nobody@x.test", content=content)
        message = finished(relay, stem)
        assert statuses(relay, stem) == {"bob": DONE, "nobody": NEVER}
        assert (message.recipients[0].tls, message.recipients[0].verified) == ("TLSv1.3", False)
        assert message.recipients[1].code == 550 and "unknown in virtual mailbox table" in message.recipients[1].reply
        until(lambda: len(delivered(top)) > before, 10)
        assert max(delivered(top), key=len).endswith(content.replace(b"\r\n", b"\n").partition(b"\n\n")[2])


def knows(port: int, domain: str) -> bool:
    """Tell whether a DNS server is up."""
    with contextlib.suppress(smtprelay.ResolveError):
        return bool(smtprelay.Resolver([("127.0.0.1", port)], 0.3).mx_hosts(domain))
    return False


def test_postfix_as_mx_found_by_dnsmasq(postfix: tuple[str, int, str]) -> None:
    host, port, top = postfix
    dnsmasq = shutil.which("dnsmasq", path="/usr/sbin:/usr/bin")
    if not dnsmasq:
        pytest.skip("needs dnsmasq")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        dns = probe.getsockname()[1]
    records = ["--mx-host=x.test,mx.pf.test,10", "--mx-host=x.test,down.test,5", "--mx-host=y.test,mx.pf.test,10", "--mx-host=y.test,down.test,5",
               f"--host-record=mx.pf.test,{host}", "--host-record=down.test,127.0.0.5", "--local=/test/"]
    server = subprocess.Popen([dnsmasq, "-k", "-C", "/dev/null", "--no-hosts", "--no-resolv", "--listen-address=127.0.0.1", "--bind-interfaces", "--user=root",
                               "--pid-file=", f"--port={dns}", *records], stderr=subprocess.DEVNULL)
    try:
        until(lambda: knows(dns, "x.test"))
        with smtprelay.start(SMTP_DELIVERY="mx", SMTP_MX_PORT=str(port), SMTP_DNS_SERVER=f"127.0.0.1:{dns}", SMTP_RELAY_CA_FILE=f"{top}/cert.pem",
                             SMTP_BOUNCE="0", **QUICK) as relay:
            before = len(delivered(top))
            stem = send(relay, "bob@x.test", "bob@y.test", "bob@gone.test")
            message = finished(relay, stem)
            assert [r.status.value for r in message.recipients] == [DONE, DONE, NEVER]
            r = message.recipients[0]
            assert (r.host, r.ip, r.tls, r.verified) == ("mx.pf.test", host, "TLSv1.3", True)
            assert message.recipients[2].reply.startswith("5.1.2 gone.test")
            until(lambda: len(delivered(top)) == before + 2, 10)
            assert message.recipients[0].reply == message.recipients[1].reply  # one transaction
    finally:
        server.terminate()
        server.wait()


# -- many next hops at once --

def test_two_hanging_hosts_hold_up_nobody() -> None:
    script = zone(a_slow1_test="127.0.0.5", a_slow2_test="127.0.0.6", a_good_test="127.0.0.7")
    with FakeHop({"greeting": "hang"}, host="127.0.0.5") as slow, \
            FakeHop({"rcpt": "hang"}, "8BITMIME", host="127.0.0.6", port=slow.server_address[1]), \
            FakeHop(host="127.0.0.7", port=slow.server_address[1]) as good, \
            by_mx(slow.server_address[1], script, SMTP_RELAY_TIMEOUT="3s") as relay:
        for i in range(10):
            send(relay, f"u{i}@slow1.test")
            send(relay, f"u{i}@slow2.test")
        began = time.monotonic()
        for i in range(10):
            finished(relay, send(relay, f"u{i}@good.test"))
        assert time.monotonic() - began < 2 and len(good.mails) == 10
        assert slow.connections == 1


def test_what_was_delivered_stays_so_after_a_restart(tmp_path: Path) -> None:
    script = zone(a_grey_test="127.0.0.5", a_good_test="127.0.0.5")
    with FakeHop({"rcpt:a@grey.test": ["450 later"]}, host="127.0.0.5") as hop:
        settings = {"SMTP_STORAGE": "file", "SMTP_SPOOL": str(tmp_path), "SMTP_FSYNC": "0"}
        with by_mx(hop.server_address[1], script, SMTP_RETRY_INITIAL_DELAY="300ms", SMTP_RETRY_MAX_DELAY="1s",
                   SMTP_MAX_SIZE="1MiB", **settings) as relay:
            stem = send(relay, "a@grey.test", "b@good.test")
            until(lambda: statuses(relay, stem) == {"a": LATER, "b": DONE})
        with by_mx(hop.server_address[1], script, **settings) as relay:
            message = finished(relay, stem)
        assert statuses(relay, stem) == {"a": DONE, "b": DONE} and message.recipients[0].attempts == 2
        assert sorted(rs for rs, _ in hop.mails) == [["a@grey.test"], ["b@good.test"]]


def test_an_account_may_have_a_host_of_its_own(tmp_path: Path) -> None:
    with FakeHop() as common, FakeHop({}, "AUTH PLAIN") as own:
        users = tmp_path / "users.json"
        users.write_text(smtprelay.json.dumps({"app": {"password": "p", "relay_host": own.place, "relay_username": "u", "relay_password": "w"}, "b": {"password": "p"}}))
        users.chmod(0o600)
        with relaying(common, SMTP_USERS_FILE=str(users), SMTP_AUTH_INSECURE="1") as relay:
            for name in ("app", "b"):
                with smtplib.SMTP(relay.host, relay.port) as client:
                    client.login(name, "p")
                    client.sendmail("me@here.test", ["bob@x.test"], b"\r\nhello\r\n")
                finished(relay, newest(relay))
        assert (len(common.mails), len(own.mails)) == (1, 1)
        assert any(c.startswith("AUTH PLAIN ") for c in own.commands)
