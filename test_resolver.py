from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv6Address
from pathlib import Path

import pytest

import smtprelay

# === RESOLVER ================================================================
#
# A scripted server on UDP and TCP answers from a zone, or by a function that may
# do anything wrong; its messages are built here, not with the code under test.
# The same questions then go to a real dnsmasq.

A, NS, CNAME, SOA, MX, AAAA = 1, 2, 5, 6, 15, 28
UDP, TCP = "udp", "tcp"
RA, TC, NXDOMAIN, SERVFAIL, REFUSED = 0x0080, 0x0200, 3, 2, 5


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
        data = (
            dns_name("ns.test") + dns_name("root.test") + struct.pack("!5I", 1, 2, 3, 4, int(value))
        )
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


Script = Callable[[bytes, str], "list[bytes]"]  # query and transport, to datagrams or TCP octets


class FakeDns:
    """A DNS server on a free port of loopback. `asked` holds (name, type, transport)."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[tuple[str, int, str]] = []
        self.tcp, self.udp = self.bind()
        self.server = self.udp.getsockname()[:2]
        self.threads = [
            threading.Thread(target=serve, daemon=True)
            for serve in (self.serve_udp, self.serve_tcp)
        ]
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
    answer = dns_answer(
        query, *records, *found, *no, flags=RA if exists else RA | NXDOMAIN, authority=len(no)
    )
    if transport == TCP:
        return [struct.pack("!H", len(answer)) + answer]
    return [answer if len(answer) <= 512 else dns_answer(query, flags=RA | TC)]


@pytest.fixture
def dns() -> Iterator[FakeDns]:
    with FakeDns(zone_answer) as server:
        yield server


def resolver_of(*servers: FakeDns, timeout: float = 1.0) -> smtprelay.Resolver:
    return smtprelay.Resolver([s.server for s in servers], timeout, rng=random.Random(7))


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
    assert outcome(lambda: [host.name for host in resolver.mx_hosts(domain)]) == expected


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
    resolver = smtprelay.Resolver([("127.0.0.1", 1)], 0.1)
    began = time.monotonic()
    assert outcome(lambda: resolver.mx_hosts(domain)) == (550, "5.1.2")
    assert outcome(lambda: resolver.addresses(domain)) == (550, "5.1.2")
    assert time.monotonic() - began < 0.5


ADDRESSES = [
    ("mx.one.test", ["2001:db8::1", "192.0.2.1", "192.0.2.2"]),
    ("implicit.test", ["192.0.2.3"]),
    ("cn.test", ["192.0.2.11"]),
    ("[127.0.0.1]", ["127.0.0.1"]),
    ("[IPv6:2001:DB8:0::1]", ["2001:db8::1"]),
    ("[ipv6:::ffff:192.0.2.1]", [str(IPv6Address("::ffff:192.0.2.1"))]),
    ("empty.test", (550, "5.4.4")),
    ("nowhere.test", (550, "5.1.2")),
    ("servfail.test", (451, "4.4.3")),
]


@pytest.mark.parametrize(("host", "expected"), ADDRESSES)
def test_addresses(dns: FakeDns, host: str, expected: object) -> None:
    assert outcome(lambda: resolver_of(dns).addresses(host)) == expected


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
    assert outcome(lambda: [(h.name, a) for h, a in resolver.targets(hosts)]) == expected


def test_a_host_is_looked_up_when_its_turn_comes(dns: FakeDns) -> None:
    resolver = resolver_of(dns)
    next(resolver.targets([smtprelay.MxHost(1, "mx.one.test"), smtprelay.MxHost(2, "c.test")]))
    assert {name for name, _, _ in dns.asked} == {"mx.one.test"}


def test_equal_preferences_are_shuffled_and_no_others(dns: FakeDns) -> None:
    resolver = resolver_of(dns)
    orders = {tuple(host.name for host in resolver.mx_hosts("order.test")) for _ in range(100)}
    assert len(orders) == 6
    assert {order[3:] for order in orders} == {("b.test", "c.test")}


def test_a_host_named_twice_has_its_better_preference(dns: FakeDns) -> None:
    assert resolver_of(dns).mx_hosts("twice.test") == [smtprelay.MxHost(10, "a1.test")]


def test_preferred_to_our_own_name() -> None:
    hosts = [
        smtprelay.MxHost(p, n)
        for p, n in ((1, "a.test"), (5, "us.test"), (5, "b.test"), (9, "c.test"))
    ]
    assert smtprelay.preferred_to("US.test", hosts) == hosts[:1]
    assert smtprelay.preferred_to("other.test", hosts) == hosts
    assert outcome(lambda: smtprelay.preferred_to("us.test", hosts[1:])) == (554, "5.4.6")


NAMES = [  # octets, offset, (name, offset after it) or what is wrong
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


@pytest.mark.parametrize(("octets", "at", "expected"), NAMES)
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

GOOD = "192.0.2.1"


def good(query: bytes) -> bytes:
    return dns_answer(query, dns_record("x.test", A, GOOD))


def framed(octets: bytes) -> bytes:
    return struct.pack("!H", len(octets)) + octets


def over_tcp(answer: Callable[[bytes], list[bytes]]) -> Script:
    return lambda query, via: answer(query) if via == TCP else [dns_answer(query, flags=RA | TC)]


def pointer_answer(offset: int) -> Callable[[bytes, str], list[bytes]]:
    """An answer whose record's owner points at an offset from that pointer."""

    def script(query: bytes, _: str) -> list[bytes]:
        pointer = struct.pack("!H", 0xC000 | (len(query) + offset))
        return [dns_answer(query, pointer + dns_record("", A, GOOD)[1:])]

    return script


def raw_record(octets: bytes) -> Script:
    return lambda query, _: [dns_answer(query, octets)]


def a_record(data: bytes, length: int) -> bytes:
    return dns_name("x.test") + struct.pack("!HHIH", A, 1, 60, length) + data


TROUBLE: list[tuple[str, Script]] = [
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
    ("refused", lambda q, _: [dns_answer(q, flags=RA | REFUSED)]),
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
    ("label type 0x40", raw_record(b"\x41" + dns_record("x.test", A, GOOD))),
    ("label type 0x80", raw_record(b"\x80" + dns_record("x.test", A, GOOD))),
    ("name of 256", raw_record(dns_record(".".join(["x" * 50] * 5), A, GOOD))),
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
def test_one_bad_server_is_transient_and_costs_little(_: str, script: Script) -> None:
    with FakeDns(script) as bad, FakeDns(lambda q, _: [good(q)]) as well:
        began = time.monotonic()
        assert outcome(lambda: resolver_of(bad, timeout=0.15).addresses("x.test")) == (451, "4.4.3")
        assert time.monotonic() - began < 1
        assert len(bad.asked) >= 3
        assert resolver_of(bad, well, timeout=0.6).addresses("x.test") == [GOOD]


def noise(query: bytes) -> list[bytes]:
    """Datagrams that are no answers."""
    return [b"", b"\0", query, bytes([query[0] ^ 1]) + good(query)[1:], os.urandom(100)][1:]


FINE: list[tuple[str, Script]] = [
    ("noise first", lambda q, _: [*noise(q), good(q)]),
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
        lambda q, _: [
            dns_answer(q, dns_record("x.test", A, "192.0.2.7", family=3), good(q)[len(q) :])
        ],
    ),
    (
        "others' records",
        lambda q, _: [dns_answer(q, dns_record("y.test", A, "192.0.2.7"), good(q)[len(q) :])],
    ),
]


@pytest.mark.parametrize(("_", "script"), FINE, ids=[name for name, _ in FINE])
def test_odd_but_right_answers(_: str, script: Script) -> None:
    with FakeDns(script) as server:
        assert resolver_of(server).addresses("x.test") == [GOOD]


def test_a_server_that_is_not_there_is_passed_over(dns: FakeDns) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        closed = sock.getsockname()
    resolver = smtprelay.Resolver([closed, ("fe80::1%nosuch", 53), dns.server], 2)
    assert resolver.mx_hosts("one.test") == [smtprelay.MxHost(10, "mx.one.test")]
    with pytest.raises(
        smtprelay.ResolveError, match=r"x\.test: DNS lookup failed \(127\.0\.0\.1: "
    ):
        smtprelay.Resolver([closed], 0.1).mx_hosts("x.test")


def test_an_alias_alone_is_asked_on_and_a_long_chain_is_not() -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        name, kind = dns_question(query)
        number = int(name.split(".")[0])
        if number == 5:
            return [dns_answer(query, dns_record(name, kind, GOOD if kind == A else "2001:db8::5"))]
        return [dns_answer(query, dns_record(name, CNAME, f"{number + 1}.test"))]

    with FakeDns(script) as server:
        assert resolver_of(server).addresses("0.test") == ["2001:db8::5", GOOD]
        assert outcome(lambda: resolver_of(server).addresses("6.test")) == (451, "4.4.3")
        assert len(server.asked) == 12 + 16


def test_one_family_failing_does_not_hide_the_other() -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        return [
            good(query) if dns_question(query)[1] == A else dns_answer(query, flags=RA | SERVFAIL)
        ]

    with FakeDns(script) as server:
        assert resolver_of(server).addresses("x.test") == [GOOD]


@pytest.mark.parametrize("failing", [A, AAAA])
def test_a_failure_for_now_outweighs_one_for_good(failing: int) -> None:
    def script(query: bytes, _: str) -> list[bytes]:
        fails = dns_question(query)[1] == failing
        return [dns_answer(query, flags=RA | (SERVFAIL if fails else NXDOMAIN))]

    with FakeDns(script) as server:
        assert outcome(lambda: resolver_of(server).addresses("x.test")) == (451, "4.4.3")


def test_ids_and_ports_are_fresh_for_each_try() -> None:
    seen: list[bytes] = []

    def script(query: bytes, _: str) -> list[bytes]:
        seen.append(query[:2])
        return [good(query)]

    with FakeDns(script) as server:
        resolver = smtprelay.Resolver([server.server], 1)
        for number in range(20):
            outcome(lambda: resolver.mx_hosts(f"n{number}.test"))  # noqa: B023
    assert len(set(seen)) > 18


# The cache


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


CACHED = [  # records and flags of the answer, seconds remembered
    ((dns_record("x.test", MX, "1 a1.test", ttl=20),), 0, RA, 20),
    ((dns_record("x.test", MX, "1 a1.test", ttl=0),), 0, RA, 0),
    ((dns_record("x.test", MX, "1 a1.test", ttl=1 << 30),), 0, RA, 3600),
    (
        (dns_record("x.test", CNAME, "y.test", ttl=5), dns_record("y.test", MX, "1 a1.test")),
        0,
        RA,
        5,
    ),
    ((dns_record("test", SOA, "40"),), 1, RA, 40),
    ((dns_record("test", SOA, "40", ttl=10),), 1, RA | NXDOMAIN, 10),
    ((dns_record("test", SOA, "86400", ttl=86400),), 1, RA | NXDOMAIN, 300),
    ((), 0, RA | NXDOMAIN, 0),
    ((), 0, RA | SERVFAIL, 10),
]


@pytest.mark.parametrize(("records", "authority", "flags", "seconds"), CACHED)
def test_answers_are_remembered(
    records: tuple[bytes, ...], authority: int, flags: int, seconds: int
) -> None:
    clock = Clock()
    with FakeDns(
        lambda q, _: [dns_answer(q, *records, flags=flags, authority=authority)]
    ) as server:
        resolver = smtprelay.Resolver([server.server], 1, clock=clock)
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
    assert len(resolver._cache) == 10


def test_many_threads_share_a_resolver(dns: FakeDns) -> None:
    resolver, wrong = resolver_of(dns, timeout=5), []

    def work(seed: int) -> None:
        for domain, expected in random.Random(seed).sample(HOSTS, len(HOSTS)):
            got = outcome(lambda: [host.name for host in resolver.mx_hosts(domain)])  # noqa: B023
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
    assert smtprelay.dns_server(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":53",
        "dns.test",
        "dns.test:53",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:x",
    ]
    + ["127.0.0.1:５３", "[::1", "[::1]53", "::1]:53", "[]:53", "127.1", "127.0.0.1 "],
)
def test_bad_dns_server_setting(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        smtprelay.dns_server(text)


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
    assert smtprelay.system_dns_servers(str(tmp_path / "resolv.conf")) == expected


def test_no_resolv_conf(tmp_path: Path) -> None:
    assert smtprelay.system_dns_servers(str(tmp_path / "none")) == [("127.0.0.1", 53)]


# The reader under fire


def sample_answers(query: bytes) -> list[bytes]:
    """Answers with every kind of record and with pointers into each other."""
    mx = b"\xc0\x0c" + struct.pack("!HHIH", MX, 1, 60, 7) + b"\0\x0a\2mx\xc0\x0c"
    alias = b"\xc0\x0c" + struct.pack("!HHIH", CNAME, 1, 60, 4) + b"\1y\xc0\x0e"
    return [
        dns_answer(query, mx, mx, alias, dns_record("y.test", MX, "5 a1.test")),
        dns_answer(query, dns_record("x.test", A, GOOD), dns_record("x.test", AAAA, "::1")),
        dns_answer(query, dns_record("test", SOA, "30"), flags=RA | NXDOMAIN, authority=1),
    ]


def damage(rng: random.Random, message: bytes) -> bytes:
    octets = bytearray(message)
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        octets[rng.randrange(len(octets))] = rng.choice(
            (0, 1, 0x3F, 0x40, 0xC0, 0xFF, rng.getrandbits(8))
        )
    start = rng.randrange(len(octets))
    piece = octets[start : start + rng.randrange(40)]
    cut = rng.choice((len(octets), rng.randrange(len(octets) + 1)))
    return bytes(octets[:cut] + (piece if rng.random() < 0.2 else b""))


def test_damaged_answers_raise_nothing_but_value_error() -> None:
    rng, began, read = random.Random(20261121), time.monotonic(), 0
    samples = sample_answers(b"\0\1" + bytes(10) + dns_name("x.test") + b"\0\x0f\0\1")
    for _ in range(10000):
        with contextlib.suppress(ValueError):
            answer = smtprelay.parse_answer(damage(rng, rng.choice(samples)))
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
    answer = smtprelay.parse_answer(chained_answer(200))
    assert len(answer.records) == smtprelay.MAX_HOSTS
    with pytest.raises(ValueError, match="too many parts"):
        smtprelay.parse_answer(chained_answer(300))
    many = chained_answer(1)
    with pytest.raises(ValueError, match="too many records"):
        smtprelay.parse_answer(many[:6] + b"\2\1" + many[8:] + many[-16:])
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


def is_up(server: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(server, 1).close()
        return True
    return False


@pytest.fixture(scope="module")
def dnsmasq() -> Iterator[tuple[str, int]]:
    if not DNSMASQ:
        pytest.skip("dnsmasq is not installed (Debian: dnsmasq-base)")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = sock.getsockname()
    where = [f"--port={server[1]}", "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file"]
    plain = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts"]
    command = [
        DNSMASQ,
        *plain,
        *where,
        f"--user={getpass.getuser()}",
        "--log-facility=-",
        *DNSMASQ_ZONE,
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        ends = time.monotonic() + 10
        while not is_up(server) and time.monotonic() < ends:
            assert process.poll() is None
            time.sleep(0.02)
        yield server
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(("domain", "expected"), REAL)
def test_dnsmasq(dnsmasq: tuple[str, int], domain: str, expected: object) -> None:
    resolver = smtprelay.Resolver([dnsmasq], 2)
    found = outcome(lambda: [(h.name, a) for h, a in resolver.targets(resolver.mx_hosts(domain))])
    assert found == expected


def test_dnsmasq_long_answer_over_tcp(dnsmasq: tuple[str, int]) -> None:
    hosts = smtprelay.Resolver([dnsmasq], 2).mx_hosts("many.test")
    assert [host.preference for host in hosts] == list(range(1, 17))
