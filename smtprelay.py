#!/usr/bin/env python3
"""smtprelay: a mail relay in one file.

It accepts mail on localhost, makes it safe on disk before it answers 250, and
then delivers it in the background: to a smart host, to the recipients' MX
hosts, or to nobody (held in the inbox until someone releases it).

    client -> Listener -> Session -> Spool -> Scheduler -> Delivery -> next hop
                                       ^                      |
                                       '------ Outcome -------'
    browser, curl, Prometheus, tests -> HTTP -> Inbox (reads the Spool)

Mail moves left to right only. Receiving and delivering are two halves that meet
in the spool on disk, in a pipe that carries the names of new messages, and in a
page of shared counters; so they run as threads of one process or as processes
of their own, and the rest of the file cannot tell.

Promises, in this order: nothing that got its 250 is lost; it is delivered at
least once; nobody can use this as an open relay; a slow or hostile peer on
either side never stops the others.

Contents:
    01 REPLIES       every reply, as values
    02 MESSAGES      envelope, record, outcome; the life of a message
    03 SETTINGS      each SMTP_* variable, declared once
    04 OBSERVING     log lines and counters
    05 WIRE          deadlines, lines, content in blocks
    06 GRAMMAR       pure functions from octets to values
    07 SEALING       encryption at rest
    08 SPOOL         the files, and what each means
    09 ACCOUNTS      who may send, as whom, and how much
    10 TLS           contexts for both sides, the self-signed pair
    11 SCHEDULER     what is tried next, and when
    12 RESOLVER      which hosts take mail for a domain
    13 DELIVERY      one attempt at a next hop
    14 REPORTS       what a sender is told of a message that failed
    15 FAULTS        failures on order, for tests
    16 SESSION       the protocol: one method for each verb
    17 LISTENER      connections and the threads that serve them
    18 INBOX         reading mail: MIME, search, waiting, links and codes
    19 PAGE          the inbox and queue page, one document
    20 HTTP          health, metrics, the mail API, and its guards
    21 SENDMAIL      the command of that name
    22 RELAY         joins the parts: workers, processes, start and stop
    23 LIBRARY       the relay in a test: start(), a simulated smart host, fixtures
    24 DOCTOR        what stands between this machine and the next hop
    25 INSTALL       the program at home: files, units, launchers, and their removal
    26 COMMAND LINE  one function for each verb
"""

from __future__ import annotations

import marshal
import os
import signal
import sys

if sys.version_info < (3, 9):  # noqa: UP036 (said as long as it can be read)
    sys.exit(f"smtprelay: needs Python 3.9 or newer; this is {sys.version.split()[0]} ({sys.executable})")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends an import without a traceback; main() sets it anew
if (__name__ == "__main__" and __spec__ is None and sys.argv[1:] in ([], ["serve"]) and sys.executable
        and hasattr(os, "memfd_create") and None not in (sys.stdin, sys.stdout, sys.stderr)):
    # While a script runs, Python holds on to its syntax tree: 20 MB in each process. So the server goes on from
    # its compiled form, in a program that never saw the text; here, so that the rest of the file is run once.
    try:
        with open(os.memfd_create("smtprelay", 0), "w+b") as compiled:
            marshal.dump(sys._getframe().f_code, compiled)
            compiled.seek(0)
            os.execv(sys.executable, [sys.executable, "-c", """if True:
                import marshal, sys
                fd, sys.path[0] = int(sys.argv.pop(1)), sys.argv[1].rpartition("/")[0]
                import signal
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                del sys.argv[0]
                module = sys.modules["smtprelay"] = type(sys)("smtprelay")
                module.__file__ = sys.argv[0]
                with open(fd, "rb") as compiled:
                    exec(marshal.load(compiled), vars(module))
                sys.exit(module.main())
                """, str(compiled.fileno()), os.path.abspath(sys.argv[0]), *sys.argv[1:]])
    except OSError:
        pass  # then as it is

import argparse
import base64
import binascii
import bisect
import dataclasses
import datetime
import email.errors
import email.header
import email.message
import email.utils
import enum
import errno
import fcntl
import fnmatch
import gc
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import math
import mimetypes
import mmap
import pwd
import queue
import random
import re
import resource
import secrets
import select
import shutil
import socket
import socketserver
import ssl
import stat
import string
import struct
import tempfile
import threading
import time
import traceback
import unicodedata
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from itertools import chain, groupby, islice, takewhile
from json import JSONEncoder, dumps, loads
from os import EX_CONFIG, EX_DATAERR, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE
from os.path import abspath, dirname, exists
from secrets import token_hex
from threading import Condition, Event, Lock, RLock, Thread
from time import monotonic
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, NamedTuple, TypeVar, Union, cast
from urllib.parse import parse_qs, parse_qsl, quote, unquote, unquote_to_bytes, urlencode, urlsplit

if TYPE_CHECKING:
    import ctypes
    import logging
__version__ = "0.2.0"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Fields = dict[str, Any]  # of a JSON object
DAY = 86400.0
Value = TypeVar("Value")
EX_NO = 1  # all others are those of sysexits.h


# === 01 REPLIES ==============================================================
#
# Every reply this server gives, as values, so that the session's methods hold rules and no wording.
# RFC 5321 4.2 for the codes, RFC 3463 for the enhanced ones. A reply of ours never tells what is
# inside: trouble here is 451 4.3.0.

class Reply(NamedTuple):
    """An SMTP reply: code, enhanced code ("" for none), text (lines parted by a newline)."""

    code: int
    enhanced: str
    text: str

    def __str__(self) -> str:
        return " ".join(filter(None, (str(self.code), self.enhanced, self.text)))

    def __call__(self, text: str) -> Reply:
        """Return the same reply in other words."""
        return Reply(self.code, self.enhanced, text)


class Refused(Exception):
    """A rule was broken; `reply` says which."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply


@lru_cache(maxsize=128)
def reply_octets(reply: Reply) -> bytes:
    """Return a reply as it is sent (RFC 5321 4.2.1)."""
    mark = reply.enhanced and f"{reply.enhanced} "
    lines = [f"{reply.code}-{mark}{line}\r\n" for line in reply.text.split("\n")]
    lines[-1] = lines[-1].replace("-", " ", 1)
    return "".join(lines).encode("utf-8", "replace")


def read_reply(line: str) -> Reply:
    """Make a reply of a line as it is sent, with an enhanced code."""
    code, enhanced, text = line.split(" ", 2)
    return Reply(int(code), enhanced, text)


HELP = read_reply("214 2.0.0 HELO EHLO MAIL RCPT DATA BDAT STARTTLS AUTH RSET NOOP QUIT VRFY EXPN HELP: see RFC 5321")
BYE = read_reply("221 2.0.0 Bye")
OK = read_reply("250 2.0.0 Ok")
SENDER_OK = read_reply("250 2.1.0 Sender ok")
RECIPIENT_OK = read_reply("250 2.1.5 Recipient ok")
CANNOT_VERIFY = read_reply("252 2.5.2 Cannot verify, but will take mail and try to deliver it")
GO_AHEAD = Reply(354, "", "End data with <CR><LF>.<CR><LF>")

AUTH_OK = read_reply("235 2.7.0 Authentication succeeded")
TLS_READY = read_reply("220 2.0.0 Ready to start TLS")

STOPPING = read_reply("421 4.3.2 Service is stopping, try again later")
TOO_MANY_SESSIONS = read_reply("421 4.3.2 Too many sessions, try again later")
TIMED_OUT = read_reply("421 4.4.2 Timed out waiting for you")
TOO_MANY_ERRORS = read_reply("421 4.7.0 Too many errors")
TOO_MANY_LOGINS = read_reply("421 4.7.0 Too many failed logins, try again later")
RATE_SPENT = read_reply("450 4.7.1 Too many messages for now, try again later")
INTERNAL = read_reply("451 4.3.0 Could not take this now, try again later")
SPOOL_FULL = read_reply("452 4.3.1 No room in the spool, try again later")
TOO_MANY_RECIPIENTS = read_reply("452 4.5.3 Too many recipients")

ACCOUNTS_NOT_NOW = read_reply("454 4.7.0 Logins cannot be checked now, try again later")

UNKNOWN_COMMAND = read_reply("500 5.5.2 Unknown command")
LINE_TOO_LONG = read_reply("500 5.5.2 Line too long")
BAD_LINE = read_reply("500 5.5.2 Control or 8-bit character in a command, or a line that does not end with CRLF")
BAD_ARGUMENT = read_reply("501 5.5.4 Bad argument")
BAD_SENDER = read_reply("501 5.1.7 Bad sender address")
BAD_RECIPIENT = read_reply("501 5.1.3 Bad recipient address")
NOT_IMPLEMENTED = read_reply("502 5.5.1 Not implemented")
SEQUENCE = read_reply("503 5.5.1 Out of order")
AUTH_CANCELLED = read_reply("501 5.7.0 Authentication cancelled")
AUTH_MALFORMED = read_reply("501 5.5.2 Not base64, or not a response this mechanism knows")
UNKNOWN_MECHANISM = read_reply("504 5.5.4 Unknown authentication mechanism")
LOGIN_FIRST = read_reply("530 5.7.0 Log in first")
TLS_FIRST = read_reply("530 5.7.0 Say STARTTLS first")
AUTH_WRONG = read_reply("535 5.7.8 Authentication credentials invalid")
MECHANISM_NEEDS_TLS = read_reply("538 5.7.11 This mechanism needs TLS: say STARTTLS first")
WRONG_DOMAIN = read_reply("550 5.7.1 This account may not send as that domain")
TOO_BIG = read_reply("552 5.3.4 Message is larger than this server takes")
LOST = Reply(0, "", "")  # not sent: the connection ends in its place
NEED_SMTPUTF8 = read_reply("553 5.6.7 This address needs SMTPUTF8")
NOT_SMTP = read_reply("554 5.5.1 This is SMTP, not HTTP")
TALKED_EARLY = read_reply("554 5.5.1 You spoke before the greeting, or between STARTTLS and the handshake")
NOT_ALLOWED = read_reply("554 5.7.1 Your address may not use this server")
NO_RECIPIENTS = read_reply("554 5.5.1 No valid recipients")
LOOP = read_reply("554 5.4.6 Too many Received headers: this message is looping")
BARE_NEWLINE = read_reply("554 5.6.0 Bare CR or LF in the message: lines end with CRLF (with curl, add --crlf)")
BAD_PARAMETER = read_reply("555 5.5.4 Unknown parameter")


# === 02 MESSAGES =============================================================
#
# The values that move through the program. An Envelope is what a session has heard; a Message is
# the spool's record of it, to and from JSON; an Outcome is what one attempt meant for one
# recipient. A message has one owner at a time (the session, nobody, a worker), so none is locked.
# MOVES is the life of a message.

@lru_cache(maxsize=16)
def iso_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def iso_time(seconds: float) -> str:
    """Return a Unix time as ISO 8601 UTC, to the millisecond."""
    return f"{iso_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


def unix_time(text: str) -> float:
    """Return the Unix time of what `iso_time` wrote; 0.0 for anything else."""
    try:
        return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return 0.0


@lru_cache(maxsize=256)
def stem_of(id: str, recipient: str) -> str:
    """Return the stem of a message: its UTC date, its id, a hash that hides the first recipient."""
    hidden = hashlib.sha256(recipient.lower().encode("utf-8", "surrogateescape")).hexdigest()
    return f"{iso_second(id_micros(id) // 1000000)[:10]}/{id}_{hidden[:16]}"


def id_micros(id: str) -> int:
    """Return the time of arrival that a queue id holds, in microseconds since 1970."""
    return int(id[:13], 16)


class Status(str, enum.Enum):
    """Where a message, or one recipient of it, stands."""

    RECEIVED = "received"
    HELD = "held"
    FORWARDING = "forwarding"
    RETRYING = "retrying"
    FORWARDED = "forwarded"
    FAILED = "failed"


FINISHED = (Status.FORWARDED, Status.FAILED)
SETTLED = (*FINISHED, Status.HELD)
MOVES = {before: after for before, _, *after in map(str.split, """\
received -> held forwarding retrying failed
held -> forwarding retrying
forwarding -> forwarded failed retrying held
retrying -> forwarding failed retrying held
forwarded ->
failed -> retrying
""".splitlines())}
HELD_BY_MODE, HELD_BY_RULE = "SMTP_DELIVERY is hold", "not among SMTP_RELAY_ALLOWED_RECIPIENTS"
HISTORY_KEPT = 100
RECORD_ENCODER = JSONEncoder(default=vars, ensure_ascii=False)


@dataclass
class Recipient:
    """A forward-path and what became of it. `reply` holds the next hop's words."""

    address: str
    status: Status = Status.RECEIVED
    code: int = 0
    reply: str = ""
    host: str = ""
    ip: str = ""  # where the host was, its TLS version, and whether its certificate was verified
    tls: str = ""
    verified: bool = False
    dsn: bool = False
    attempts: int = 0
    notify: str = ""  # as the sender asked, RFC 3461
    orcpt: str = ""
    reported: bool = False  # the sender has been told what became of it
    passed: list[str] = field(default_factory=list)  # of its addresses by SMTP_ALIASES


def needed_flags(content: bytes, *addresses: str) -> tuple[str, ...]:
    """Return what a message asks of whoever takes it (RFC 6152, RFC 6531)."""
    return ("8BITMIME",) * (not content.isascii()) + ("SMTPUTF8",) * (not "".join(addresses).isascii())


@dataclass
class Envelope:
    """What a session has heard of a transaction, and from whom."""

    reverse_path: str
    client: str = ""
    helo: str = ""
    protocol: str = "SMTP"
    user: str = ""
    flags: tuple[str, ...] = ()  # of 8BITMIME, SMTPUTF8, HOLD, RELEASED (a copy of a held one)
    recipients: list[str] = field(default_factory=list)
    asked: str = ""  # about reports, as it stands behind the reverse-path (RFC 3461)
    asked_for: dict[str, str] = field(default_factory=dict)  # and behind each forward-path


@dataclass
class Message:
    """The spool's record of a message. Times are ISO 8601 UTC, sizes octets."""

    id: str
    status: Status
    received_at: str
    reverse_path: str
    recipients: list[Recipient]
    size: int = 0
    client: str = ""
    helo: str = ""
    protocol: str = ""
    user: str = ""
    flags: tuple[str, ...] = ()
    attempts: int = 0
    next_attempt_at: str = ""
    last_error: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    finished_at: str = ""
    owed: str = ""  # what is still to be done here, and why it was not: a report, a record
    v: int = 1
    ret: str = ""
    envid: str = ""
    transcript: list[str] = field(default_factory=list)  # of the last attempts

    def move(self, status: Status, detail: str = "") -> None:
        """Change the status, noting it in the history; ValueError for a move that MOVES lacks."""
        if status not in MOVES[self.status]:
            raise ValueError(f"{self.id} cannot go from {self.status.value} to {status.value}")
        self.status = status
        self.note(detail)
        if status in FINISHED:
            self.finished_at, self.next_attempt_at = self.history[-1]["at"], ""

    def note(self, detail: str) -> None:
        """Add to the history."""
        self.history.append({"at": iso_time(time.time()), "status": self.status._value_, "detail": detail})
        if len(self.history) > HISTORY_KEPT:  # keep how it began, lose the middle
            del self.history[HISTORY_KEPT // 2]

    @property
    def stem(self) -> str:
        """The name of its files, without their ends."""
        return stem_of(self.id, self.recipients[0].address)

    def pending(self) -> list[Recipient]:
        """Return the recipients that are still owed this message; those held back are not."""
        return [r for r in self.recipients if r.status not in SETTLED]

    def to_json(self) -> bytes:
        """Return the record as the spool keeps it."""
        return RECORD_ENCODER.encode(self.__dict__).encode("utf-8", "surrogateescape")

    @classmethod
    def from_json(cls, data: bytes) -> Message:
        """Read a record; ValueError says what is wrong with it."""
        try:
            raw = loads(data)
            message = cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})
            message.status = Status(message.status)
            message.flags = tuple(message.flags)
            message.recipients = [
                Recipient(**{**r, "status": Status(r["status"])}) for r in raw["recipients"]]
        except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as e:
            raise ValueError(f"not a record: {e}") from None
        return message


class Outcome(NamedTuple):
    """What an attempt meant for one recipient; `reply` is the next hop's, or the network's."""

    status: Status
    of_host: bool  # whom it concerns: every message for the next hop, or this one alone
    code: int
    reply: str
    host: str = ""
    ip: str = ""
    tls: str = ""
    verified: bool = False
    dsn: bool = False  # the next hop offers DSN: it reports what the sender asked for
    lost: bool = False  # the content was sent and not answered: it may have been taken

    def __str__(self) -> str:
        said = f"{self.code} {self.reply}" if self.code else self.reply
        return f"{self.host}: {said}" if self.host else said


# === 03 SETTINGS =============================================================
#
# Each setting is one attribute of Settings: its parser, default and help. The name in the
# environment is SMTP_ and the attribute's in capitals. Parsing, error texts, --help and the
# README's table derive from here. A parser returns a text's value, or raises ValueError with what
# was expected. All mistakes are reported at once, no secret shown.

class SettingsError(Exception):
    """One or more settings are wrong; `problems` has a line for each."""

    status = EX_CONFIG

    def __init__(self, *problems: str) -> None:
        super().__init__("; ".join(problems))
        self.problems = [*problems]


class Address(NamedTuple):
    """Where to listen: a host and port, or the path of a Unix socket."""

    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else host_port(self.host, self.port)


Addresses = tuple[Address, ...]
PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # none: not known


def host_port(host: str, port: int) -> str:
    """Return host and port as one text, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


Networks = tuple[Union[ipaddress.IPv4Network, ipaddress.IPv6Network], ...]


def numeric(kind: Callable[[float], Value], expected: str, least: float = 0, most: float = 1e15,
            units: str = "=1") -> Callable[[str], Value]:
    """Return a parser of numbers, with a unit behind them where there are units."""
    worth = dict(unit.split("=") for unit in units.split())

    def parse(text: str) -> Value:
        match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})\s*([A-Za-z]*)", text)
        value = float(match[1]) * float(worth.get(match[2].lower(), "nan")) if match else math.nan
        if not least <= value <= most or kind is int and value % 1:
            raise ValueError(expected)
        return kind(value)
    return parse


size = numeric(round, "a size such as 10MiB, 64K or 1048576", units="=1 b=1 k=1024 kb=1024 kib=1024 m=1048576 "
               "mb=1048576 mib=1048576 g=1073741824 gb=1073741824 gib=1073741824")
duration = numeric(float, "a duration such as 30s, 5m, 1h or 5d", units="=1 ms=0.001 s=1 m=60 h=3600 d=86400")
count = numeric(int, "a whole number, 0 or more", most=999_999_999)
positive = numeric(int, "a whole number, 1 or more", 1, 999_999_999)
port_number = numeric(int, "a port from 0 to 65535", most=65535)
duration.__name__, count.__name__ = "duration", "count"  # so argparse calls them


def like(kind: Callable[[str], Value], expected: str, pattern: str = "(?s).*") -> Callable[[str], Value]:
    """Return a parser for a text that a pattern fits, or for none at all; what `kind` raises is said, too."""
    def parse(text: str) -> Value:
        if text and not re.fullmatch(pattern, text):
            raise ValueError(expected)
        try:
            return kind(text)
        except (ValueError, re.error) as e:
            raise ValueError(f"{expected} ({e})") from None
    return parse


def choice(allowed: str) -> Callable[[str], str]:
    """Return a parser for one of the words allowed, or none; `this=that` lets this word mean that one."""
    table = {word: meant or word for word, _, meant in (each.partition("=") for each in allowed.split())}
    return like(lambda text: table.get(text.lower(), ""), "one of " + ", ".join(table), "(?ai)" + "|".join(table))


yes_no = choice("1 true=1 yes=1 on=1 0 false=0 no=0 off=0")
methods = like(lambda text: words(text.lower()), "a list of plain, login, cram-md5",
               r"(?i)((plain|login|cram-md5)([,\s]+|$))+")
printable = like(str, "up to 200 printable ASCII characters", "[ -~]{0,200}")
host_name = like(str, "a host name such as mail.example.com", r"[A-Za-z0-9._:\[\]-]{1,255}")
mailbox = like(str, "an address such as bob@example.com", r"[^\s<>@]{1,250}@[^\s<>@]{1,250}")


def flag(text: str) -> bool:
    return yes_no(text) == "1"


def readable(text: str) -> str:
    if text and not os.access(text, os.R_OK):
        raise ValueError("a file that can be read")
    return text


def appendable(text: str) -> str:
    place = text if exists(text) else dirname(text) or "."
    if text and (os.path.isdir(text) or not os.access(place, os.W_OK)):
        raise ValueError("a file that can be written")
    return text


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^,\s]+", text))


def split_port(text: str, default: str) -> tuple[str, int]:
    """Split host:port, [v6]:port or a host alone; ValueError says what was expected."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\[\]:/\s]*))(?::([0-9]+))?", text)
    if not match:
        raise ValueError("host, host:port or [IPv6]:port")
    return match[1] or match[2] or "", port_number(match[3] or default)


def places(text: str) -> Addresses:
    """Read a list of places to listen: a port alone means both loopback addresses, off none."""
    found = []
    named = {"": "0.0.0.0 ::", "*": "0.0.0.0", "localhost": "127.0.0.1 ::1"}
    for part in words(text):
        if part.startswith("unix:/"):
            found.append(Address("", 0, part[5:]))
        elif part.lower() not in ("off", "none"):
            host, port = split_port(f"localhost:{part}" if part.isdigit() else part, "none")
            found += [Address(str(ipaddress.ip_address(each)), port) for each in named.get(host, host).split()]
    return tuple(found)


def dns_servers(text: str) -> Addresses:
    """Read a list of addr, addr:port or [IPv6]:port."""
    ends = [split_port(f"[{part}]" if part.count(":") > 1 and "[" not in part else part, "53") for part in words(text)]
    return tuple(Address(str(ipaddress.ip_address(host)), port or port_number("none")) for host, port in ends)


def shown_url(url: str) -> str:
    """Return a web address without what may be secret in it: user, password and query."""
    return re.sub(r"(?<=://)[^/?#]*@", "", re.sub("[?#].*", "", url))


def networks(text: str) -> Networks:
    return tuple(ipaddress.ip_network(w, strict=False) for w in words(text.replace("loopback", "127.0.0.0/8 ::1")))


listen = like(places, "a port, addr:port, :port, an absolute path after unix:, or a list of them")
clients = like(networks, "networks such as 192.168.1.0/24 or fd00::/8, or loopback")


def are_private(given: Networks) -> bool:
    """Tell whether networks are all this machine's or private (RFC 1918, 3927, 4193, 4291); Pythons differ on it."""
    homes = networks("loopback 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 169.254.0.0/16 fc00::/7 fe80::/10")
    return all(any(n.version == home.version and n.subnet_of(home) for home in homes) for n in given)  # type: ignore


# A provider's name in SMTP_RELAY_HOST: its host (* is the REGION of ses:REGION), with a port where that is not the
# usual one, and how many recipients one transaction may have, 0 where that is not known.
PRESETS = {name: (host, int(most)) for name, host, most in map(str.split, """\
gmail smtp.gmail.com 100
ses email-smtp.*.amazonaws.com 50
m365 smtp.office365.com 500
mailgun smtp.mailgun.org 1000
sendgrid smtp.sendgrid.net 1000
postmark smtp.postmarkapp.com 50
smtp2go mail.smtp2go.com 0
fastmail smtp.fastmail.com:465 0
""".splitlines())}


@lru_cache(maxsize=64)
def recipient_limit(host: str) -> int | None:
    """Return how many recipients a provider takes in one transaction, 0 if unknown; None for another host."""
    return next((most for known, most in PRESETS.values() if fnmatch.fnmatch(host.lower(), known.split(":")[0])), None)


def usable_password(host: str, password: str) -> str:
    """Return a password as its provider takes it: an app password is shown in four groups that are typed as one."""
    if recipient_limit(host) is not None and re.fullmatch(r"[A-Za-z0-9]{4}( [A-Za-z0-9]{4}){3}", password):
        return password.replace(" ", "")
    return password


def hop_list(text: str) -> tuple[str, ...]:
    """Read a list of smart hosts, with a provider's host in place of its name."""
    hops = []
    for part in words(text):
        name, _, region = part.lower().partition(":")
        known = re.fullmatch("[a-z]{2}(-[a-z]+)+-[0-9]" if name == "ses" else "", region)
        hop = part if name not in PRESETS else PRESETS[name][0].replace("*", region) if known else ""
        if not split_port(hop, "25")[0]:
            raise ValueError(f"host or host:port, a list of them, or {', '.join(PRESETS)} (ses:REGION)")
        hops.append(hop)
    return tuple(hops)


class Setting(NamedTuple):
    """A declaration; `shown` is said in place of a default that depends. A secret may also come from NAME_FILE."""

    parse: Callable[[str], Any]
    default: str  # as a user would write it
    help: str
    secret: bool
    shown: str


def setting(parse: Callable[[str], Value], text: str, *, secret: bool = False, shown: str = "") -> Value:
    """Declare a setting by `default | help`, or `help`; its value is of the type that its parser returns."""
    default, _, help = text.rpartition(" | ")
    return cast(Value, Setting(parse, default, help, secret, shown or default))


class Settings:
    """What the SMTP_* environment variables say: sizes in octets, durations in seconds."""

    port = setting(
        listen, "2525 | where to listen: a port (on 127.0.0.1 and ::1), addr:port, :port for every interface, "
        "unix:/path, or a list; 0 is any free port")
    smtps_port = setting(listen, "the same, for listeners with TLS from the first byte")
    hostname = setting(host_name, "the name in greetings, HELO and Received", shown="this machine's name")
    banner = setting(printable, "smtprelay ready | the words after the host name in the 220")
    allow_networks = setting(clients, "loopback | clients that may connect: a list of networks")
    proxy_networks = setting(
        clients, "balancers whose connections open with a PROXY header (v1 or v2) that names the client")
    max_size = setting(size, "10MiB | octets of content in one message")
    max_recipients = setting(positive, "100 | recipients in one transaction")
    max_connections = setting(positive, "1000 | sessions at once; one more gets 421")
    max_connections_per_client = setting(count, "0 | sessions at once from one address; 0 is no limit")
    max_errors = setting(positive, "20 | bad commands before 421")
    command_timeout = setting(duration, "5m | time for one command line")
    data_timeout = setting(duration, "10m | time for the content of one message")
    session_timeout = setting(duration, "1h | time for the whole session")
    tls_cert = setting(readable, "PEM certificate; with SMTP_TLS_KEY, STARTTLS is offered")
    tls_key = setting(readable, "PEM key; both are reread when they change")
    tls_self_signed = setting(flag, "0 | make a self-signed pair, kept in the spool, when no pair is set")
    tls_required = setting(flag, "0 | nothing but EHLO, NOOP, RSET, STARTTLS, QUIT before TLS")
    auth_user = setting(str, "one account's name")
    auth_password = setting(str, "and its password", secret=True)
    users_file = setting(str, "a JSON file of accounts; reread when it changes")
    auth_required = setting(
        lambda text: flag(text) if text else None, "no MAIL before AUTH", shown="1 if accounts exist")
    auth_methods = setting(methods, "plain,login,cram-md5 | mechanisms offered")
    auth_insecure = setting(flag, "0 | allow PLAIN and LOGIN without TLS off loopback")
    auth_any = setting(flag, "0 | accept any user and password (tests); loopback and private networks only")
    auth_failures = setting(positive, "5 | failed logins a minute from one address, then 421")
    rate_limit = setting(
        count, "0 | messages a minute for an account, or a client address where there is none; 0 is no limit")
    rate_burst = setting(positive, "10 | messages at once before the rate holds")
    faults = setting(
        str, "scripted failures for tests: rules such as `rcpt to=*@slow.test 450 greylisted first 2`, parted by ; "
        "(see README)")
    storage = setting(choice("file memory"), "file | where messages are kept: file or memory")
    spool = setting(str, "./data/spool | the spool's directory")
    spool_max_size = setting(size, "0 | octets of spool; past it finished messages go first; 0 is no limit")
    spool_max_messages = setting(count, "0 | messages in the spool, likewise; 0 is no limit")
    spool_min_free = setting(size, "64MiB | less free disk space than this: 452")
    spool_key = setting(
        like(bytes.fromhex, "64 hexadecimal digits", "[0-9A-Fa-f]{64}"),
        "32 octets in hexadecimal: messages at rest are AES-256-GCM", secret=True)
    keep = setting(duration, "7d | how long finished messages stay; a held one has no age limit")
    fsync = setting(flag, "1 | sync each message to disk before its 250; 0 is for tests")
    queue_size = setting(count, "0 | messages owed at once; past it 452; 0 is no limit")
    delivery = setting(
        choice("hold relay mx"), "hold, relay (to a smart host) or mx (straight to the recipients' hosts)",
        shown="relay with SMTP_RELAY_HOST, else hold")
    relay_host = setting(
        hop_list, "the smart host: host or host:port, a list tried in order, or gmail, ses:REGION, m365, mailgun, "
        "sendgrid, postmark, smtp2go, fastmail")
    relay_port = setting(port_number, "0 | the smart host's port", shown="587; 465 with tls; 25 with none")
    relay_tls = setting(
        choice("starttls tls opportunistic none ssl=tls smtps=tls"),
        "starttls (required), tls (from the first octet), opportunistic, none; a host with port 465 means tls",
        shown="starttls; opportunistic for a loopback host and for mx")
    relay_tls_verify = setting(flag, "1 | 0 skips certificate verification")
    relay_ca_file = setting(readable, "PEM roots to trust instead of the system's")
    relay_username = setting(str, "login at the smart host")
    relay_password = setting(str, "and its password, or OAuth token", secret=True)
    relay_password_file = setting(str, "a file with it, reread for each login")
    relay_auth = setting(choice("auto plain login cram-md5 xoauth2"), "auto | auto, plain, login, cram-md5, xoauth2")
    relay_return_path = setting(mailbox, "replaces the reverse-path (never the null one)")
    relay_redirect_to = setting(mailbox, "every recipient becomes this one; the original stays in X-Original-To")
    relay_allowed_recipients = setting(
        like(lambda text: re.compile(text, re.IGNORECASE), "a regular expression"),
        "regular expression, found anywhere in the address; others are held, not sent")
    relay_connections = setting(positive, "4 | connections to one next hop at once")
    relay_timeout = setting(duration, "30s | time for reaching a next hop: connection and TLS")
    relay_reply_timeout = setting(duration, "5m | time for each reply of a next hop, twice that after the final dot")
    relay_from = setting(mailbox, "replaces the header From's address and the reverse-path")
    relay_repair = setting(flag, "1 | adds what a submission lacks on its way out; 0 sends it as it came")
    local_to = setting(mailbox, "where mail for local users goes: names alone, or at this host's name")
    aliases = setting(readable, "a file like /etc/aliases, read with SMTP_LOCAL_TO")
    lenient = setting(flag, "0 | take what old devices send (loopback and named networks alone)")
    mx_port = setting(port_number, "25 | the port of the recipients' hosts in mx mode")
    dns_server = setting(
        like(dns_servers, "an IP address, or address:port"), "addr or addr:port, or a list, for mx mode",
        shown="from resolv.conf")
    bounce = setting(flag, "1 | a failed message sends its sender a report")
    retry = setting(flag, "1 | 0: one attempt only")
    retry_max_attempts = setting(count, "0 | attempts that the next hop answered; 0 is no limit")
    retry_initial_delay = setting(duration, "5s | the first delay")
    retry_max_delay = setting(duration, "1h | the longest delay")
    retry_multiplier = setting(
        numeric(float, "a number, 1 or more", least=1), "2.0 | each delay is this many times the one before")
    retry_jitter = setting(
        numeric(float, "a number from 0 to 1", most=1),
        "0.5 | each delay is multiplied by a random factor in [1-jitter, 1]")
    retry_max_age = setting(duration, "5d | older than this, a message has failed")
    time_scale = setting(
        numeric(float, "a number above 0", least=1e-9),
        "1 | tests: waits before another attempt, and SMTP_RETRY_MAX_AGE, are this many times shorter")
    seed = setting(str, "tests: makes the random factors of the waits the same in each run")
    workers = setting(positive, "8 | delivery threads")
    processes = setting(
        count, "0 | receiving processes that share the listening sockets; one alone where there is much to count: "
        "with accounts, SMTP_RATE_LIMIT, SMTP_MAX_CONNECTIONS_PER_CLIENT, and with SMTP_STORAGE=memory",
        shown="2; 1 on one processor")
    health_addr = setting(
        listen, "127.0.0.1:8080 | the HTTP listener: addr:port, :port for every interface, off; port 0 is any free "
        "port")
    api_token = setting(printable, "Bearer token for /api and the page; needed for them off loopback", secret=True)
    api_networks = setting(clients, "loopback | from where the API and the page need no token: a list of networks")
    tags = setting(
        like(str, "TAG=SEARCH, or several parted by ;", r"(\s*[^\s=;][^=;]*=\s*[^;\s][^;]*(;|$))+\s*"),
        "rules that tag messages: TAG=SEARCH, parted by ;")
    web_root = setting(
        like(str, "a path such as /mail", "/|(/[A-Za-z0-9._~-]+)+/?"),
        "/ | the path under which a reverse proxy shows the page")
    webhook_url = setting(
        like(str, "an http:// or https:// address",
             r"https?://([^\s/?#@]*@)?(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{1,5})?([/?#][!-~]*)?"),
        "POSTed a JSON event on received, forwarded, failed")
    log_level = setting(
        choice("debug info warn error warning=warn notice=info information=info trace=debug verbose=debug err=error "
               "crit=error critical=error alert=error emerg=error fatal=error"),
        "info | debug, info, warn, error")
    log_format = setting(choice("text json"), "text | text or json")
    log_file = setting(appendable, "a file for the log", shown="stderr")
    audit_log = setting(appendable, "a file for a JSON line for each session, login, refusal and message")
    debug = setting(flag, "0 | 1: both dialogues in the log, secrets masked")

    def __init__(self, **given: Any) -> None:
        """Take values as they are; all else is as it is where nothing is set."""
        vars(self).update({name[5:].lower(): f.parse(f.default) for name, f in FIELDS.items()}, **given)
        self.hostname = self.hostname or machine_name()
        self.delivery = self.delivery or ("relay" if self.relay_host else "hold")
        self.relay_port = self.relay_port or {"tls": 465, "none": 25}.get(self.relay_tls, 587)
        ends = [split_port(h, str(self.relay_port)) for h in self.relay_host]
        easy = self.delivery == "mx" or (ends and all(is_loopback(host) for host, _ in ends))
        usual = "tls" if ends and all(p == 465 for _, p in ends) else "opportunistic" if easy else "starttls"
        self.relay_tls = self.relay_tls or usual
        # in the order in which they are tried: name, port, and SMTP_RELAY_TLS for it; RFC 8314 3.3: nobody
        # speaks STARTTLS at 465
        self.smart_hosts = tuple((host, port, "tls" if port == 465 and self.relay_tls != "none" else self.relay_tls)
                                 for host, port in ends)
        # what is counted by client or account is counted in one place
        counts = self.rate_limit or self.max_connections_per_client or self.auth_user or self.users_file
        most = 1 if len(PROCESSORS) == 1 else 2
        self.processes = 1 if counts or self.storage == "memory" else self.processes or most

    def but(self, **changed: Any) -> Settings:
        """Return the same settings but for some."""
        return Settings(**{**vars(self), **changed})

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """Read all settings from environment variables; SettingsError lists every mistake."""
        values, wrong = {}, {}
        for name in FIELDS:
            try:
                values[name[5:].lower()] = read_setting(env, name)
            except ValueError as e:
                wrong[name] = str(e)
        settings = cls(**values)
        problems = unknown_settings(env)[0] + [*wrong.values()] + [
            text for holds, text in conflicts(settings)  # what follows from a mistake is not said, too
            if holds and not wrong.keys() & re.findall("SMTP_[A-Z_]+", text)]
        if problems:
            raise SettingsError(*problems)
        return settings


def machine_name() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "localhost"


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine, without asking DNS."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rpartition(".")[2] == "localhost"


def is_open(places: Addresses) -> bool:
    """Tell whether one of them is open to more than this machine."""
    return not all(place.path or is_loopback(place.host) for place in places)


def conflicts(s: Settings) -> list[tuple[object, str]]:
    """Return what settings may not say together: whether they do, and what is expected."""
    listening = *s.port, *s.smtps_port
    open_, nobody = is_open(listening), s.allow_networks == networks("loopback")
    return [
        (s.delivery == "relay" and not s.relay_host,
         "SMTP_DELIVERY='relay': expected SMTP_RELAY_HOST to name the smart host"),
        (s.delivery != "mx" and any(is_loopback(host) and port in [a.port for a in listening]
                                    for host, port, _ in s.smart_hosts),
         "SMTP_RELAY_HOST: expected another server than this one"),
        (s.delivery == "mx" and s.relay_tls == "tls",
         "SMTP_RELAY_TLS='tls': expected starttls, opportunistic or none with SMTP_DELIVERY=mx"),
        (s.relay_username and not s.relay_password,
         "SMTP_RELAY_USERNAME: expected SMTP_RELAY_PASSWORD (or SMTP_RELAY_PASSWORD_FILE) beside it"),
        (not s.port, "SMTP_PORT: expected a place to listen"),
        (open_ and nobody and not (s.auth_user or s.users_file),
         "SMTP_PORT: expected accounts, or SMTP_ALLOW_NETWORKS to name who may come, "
         "since this listens beyond loopback"),
        (open_ and s.auth_any and (nobody or not are_private(s.allow_networks)),
         "SMTP_AUTH_ANY=1: expected loopback addresses alone in SMTP_PORT, or private networks alone in "
         "SMTP_ALLOW_NETWORKS, since it lets anybody in"),
        (bool(s.auth_user) != bool(s.auth_password),
         "SMTP_AUTH_USER: expected SMTP_AUTH_PASSWORD (or SMTP_AUTH_PASSWORD_FILE) beside it, and the other way round"),
        (bool(s.tls_cert) != bool(s.tls_key),
         "SMTP_TLS_CERT: expected SMTP_TLS_KEY beside it, and the other way round"),
        ((s.tls_required or s.smtps_port) and not (s.tls_cert or s.tls_self_signed),
         "SMTP_TLS_REQUIRED, SMTP_SMTPS_PORT: expected SMTP_TLS_CERT and SMTP_TLS_KEY, or SMTP_TLS_SELF_SIGNED=1"),
    ]


FIELDS = {f"SMTP_{name.upper()}": f for name, f in vars(Settings).items() if isinstance(f, Setting)}


def read_secret(env: Mapping[str, str], name: str) -> str:
    """Return a secret from NAME or from the file that NAME_FILE names."""
    path = env.get(name + "_FILE", "")
    if not path:
        return env.get(name, "")
    if env.get(name):
        raise ValueError(f"{name} and {name}_FILE are both set: expected one of them")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(64 * KIB).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", "it is not UTF-8")
        raise ValueError(f"{name}_FILE={path!r}: expected a file that can be read: {why}") from None


def read_setting(env: Mapping[str, str], name: str) -> Any:
    """Return one setting; ValueError names it, its value (never a secret's) and what is expected."""
    f = FIELDS[name]
    text = read_secret(env, name) if f.secret else env.get(name, "").strip()
    try:
        return f.parse(text or f.default)
    except ValueError as e:
        shown = "(a secret)" if f.secret else repr(shown_url(text) if "://" in text else text)
        raise ValueError(f"{name}={shown}: expected {e}") from None


# Mailpit's and MailHog's settings, by what does the same here
MAILPITS = {name: ours for line in """\
SMTP_PORT: MP_SMTP_BIND_ADDR MH_SMTP_BIND_ADDR; SMTP_HEALTH_ADDR: MP_UI_BIND_ADDR MH_API_BIND_ADDR MH_UI_BIND_ADDR
SMTP_SPOOL: MP_DATABASE MP_DATA_FILE MH_MAILDIR_PATH; SMTP_SPOOL_MAX_MESSAGES: MP_MAX_MESSAGES; SMTP_KEEP: MP_MAX_AGE
SMTP_MAX_SIZE: MP_MAX_MESSAGE_SIZE; SMTP_MAX_RECIPIENTS: MP_SMTP_MAX_RECIPIENTS; SMTP_HOSTNAME: MH_HOSTNAME
SMTP_WEB_ROOT: MP_WEBROOT MH_UI_WEB_PATH; SMTP_API_TOKEN: MP_UI_AUTH MH_AUTH_FILE; SMTP_API_TOKEN_FILE: MP_UI_AUTH_FILE
SMTP_AUTH_USER and SMTP_AUTH_PASSWORD: MP_SMTP_AUTH; SMTP_USERS_FILE: MP_SMTP_AUTH_FILE; SMTP_TLS_CERT: MP_SMTP_TLS_CERT
SMTP_AUTH_ANY=1 and SMTP_AUTH_REQUIRED=0: MP_SMTP_AUTH_ACCEPT_ANY; SMTP_AUTH_INSECURE: MP_SMTP_AUTH_ALLOW_INSECURE
SMTP_TLS_KEY: MP_SMTP_TLS_KEY; SMTP_SMTPS_PORT: MP_SMTP_REQUIRE_TLS; SMTP_TLS_REQUIRED: MP_SMTP_REQUIRE_STARTTLS
SMTP_RELAY_HOST: MP_SMTP_RELAY_CONFIG MH_OUTGOING_SMTP; SMTP_DELIVERY=relay: MP_SMTP_RELAY_ALL; SMTP_TAGS: MP_TAG
SMTP_RELAY_ALLOWED_RECIPIENTS: MP_SMTP_RELAY_MATCHING MP_SMTP_RELAY_ALLOWED_RECIPIENTS; SMTP_LOG_FILE: MP_LOG_FILE
SMTP_FAULTS: MP_ENABLE_CHAOS MP_CHAOS_TRIGGERS MH_INVITE_JIM; SMTP_WEBHOOK_URL: MP_WEBHOOK_URL
SMTP_LOG_LEVEL=debug: MP_VERBOSE; SMTP_LOG_LEVEL=error: MP_QUIET
""".replace("\n", "; ").split("; ") for ours, _, theirs in [line.partition(": ")] for name in theirs.split()}


def unknown_settings(env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return a line for each SMTP_* name that is no setting: mistakes, then what may be an application's own.

    A mistake begins like two settings of ours or more: SMTP_RELAY_REDIRECT must not deliver to customers."""
    real = {*FIELDS, *(name + "_FILE" for name, f in FIELDS.items() if f.secret)}
    first_words = Counter(name.split("_")[1] for name in FIELDS)
    found: tuple[list[str], list[str]] = ([], [])
    others = {"MP": "Mailpit's", "MH": "MailHog's"}
    for name in sorted(env.keys() - real):
        whose, word, *more = f"{name}_".split("_")
        if whose == "SMTP":
            mistake = len(more) > 1 and first_words[word] > 1
            found[not mistake].append(f"{name} is not a setting{nearest(name, real, 0.5)}")
        elif whose in others:
            ours = f"set {MAILPITS[name]}" if name in MAILPITS else "nothing here is like it"
            found[1].append(f"{name} is {others[whose]}: {ours}")
    return found


def nearest(name: str, names: Iterable[str], likeness: float) -> str:
    """Return a question after the name that was probably meant, "" where none is like it."""
    import difflib

    near = difflib.get_close_matches(name, names, 1, likeness)
    return f"; did you mean {near[0]}?" if near else ""


# === 04 OBSERVING ============================================================
#
# What the program says of itself: log lines, an audit trail, events, counters. A line is one event
# with named fields, as text (event key=value ...) or as JSON; control characters in values are
# escaped, so nothing a client sends can forge a line. A file is opened anew for each, so that it
# may be rotated, and needs no lock.
#
# Counters are declared once in METRICS and live in one page of memory that all processes share: a
# row of doubles for each process, summed by whoever reads. A process writes its own row only, under
# its own lock, a leaf.

LEVELS = {"debug": 10, "info": 20, "warn": 30, "error": 40}  # as in the logging module
PLAIN = re.compile(r"[!#-<>-\[\]-~]+").fullmatch  # no blank, quote, equals sign, backslash
EVENT_ENCODER = JSONEncoder(default=str)


def append_line(path: str, line: str) -> None:
    """Append a line to a file that its owner alone may read, in one write: lines stay whole."""
    with open(path, "ab", buffering=0, opener=partial(os.open, mode=0o600)) as file:
        file.write(line.encode("utf-8", "backslashreplace") + b"\n")


class Log:
    """Writes one line for each event to a file, to standard error ("") or to a logger, which has its own level."""

    def __init__(self, sink: logging.Logger | str, as_json: bool = False, level: str = "info") -> None:
        self.sink, self.as_json, self.level = sink, as_json, LEVELS[level]
        self.debug, self.info, self.warn, self.error = (partial(self.write, each) for each in LEVELS)

    def write(self, level: str, event: str, /, **fields: object) -> None:
        number, sink = LEVELS[level], self.sink
        if number < self.level if isinstance(sink, str) else not sink.isEnabledFor(number):
            return
        line = self.line(level, event, fields)
        if not isinstance(sink, str):
            sink.log(number, "%s", line)
            return
        try:
            if sink:
                return append_line(sink, line)
        except OSError as e:  # its directory was moved away, or is full: that stops no mail
            line = self.line(level, event, {**fields, "log_error": e})
        self.tell(line)

    def line(self, level: str, event: str, fields: Mapping[str, object]) -> str:
        now = iso_time(time.time())
        if self.as_json:  # a NamedTuple is what it prints as, not all that is in it
            fields = {name: str(value) if isinstance(value, tuple) else value for name, value in fields.items()}
            return EVENT_ENCODER.encode({"time": now, "level": level, "event": event, **fields})
        line = f"{now} {level} {event}"
        for name, value in fields.items():
            text = str(value)
            if not PLAIN(text):
                text = dumps(text, ensure_ascii=not text.isprintable())
            line += f" {name}={text}"
        return line

    def tell(self, line: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # it may be closed
            sys.stderr.write(line + "\n")

    def greet(self, lines: Sequence[str]) -> None:
        """Write what is said at the start to standard error, for people, and in its form to the log."""
        for line in lines:
            event = self.line("info", "start", {"said": line}) if self.as_json else line
            if self.sink and isinstance(self.sink, str):
                with suppress(OSError):
                    append_line(self.sink, event)
            self.tell(line if self.sink else event)

    def bug(self, event: str, **fields: object) -> None:
        """Log the unexpected exception in hand with its traceback, on one line."""
        self.error(event, **fields, error=repr(sys.exc_info()[1]), traceback=traceback.format_exc())


def open_log(settings: Settings) -> Log:
    """Return the program's own log."""
    level = "debug" if settings.debug else settings.log_level
    return Log(settings.log_file, settings.log_format == "json", level)


EVENTS_WAITING = 1000


class Feed:
    """Hands events to whoever listens; who lags gets the end, None. No lock: each step on set and queue is whole."""

    def __init__(self) -> None:
        self.listeners: set[queue.SimpleQueue[Any]] = set()

    def subscribe(self) -> queue.SimpleQueue[Any]:
        """Return a queue of events to come; who has heard enough takes it from the listeners."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.listeners.add(events)
        return events

    def publish(self, event: Fields | None) -> None:
        for events in [*self.listeners]:
            lags = events.qsize() >= EVENTS_WAITING
            if lags:
                self.listeners.discard(events)
            events.put(None if lags else event)


BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CODES = words("421 450 451 452 454 500 501 502 503 504 530 535 538 550 552 553 554 555 other")
LABELS: dict[str, Sequence[str]] = {  # every value of each
    "": ("",), "code": CODES, "result": ("success", "failure"), "version": (__version__,),
    "le": ("sum", *map(str, BUCKETS), "+Inf", "count")}  # of a histogram: from a value's bucket on all are counted up


# name, kind, help, label
METRICS = [line.split("|") for line in """\
smtp_messages_received_total|counter|Messages that got their 250.|
smtp_messages_queued_total|counter|Messages accepted to be delivered.|
smtp_messages_delivered_total|counter|Messages forwarded to every recipient.|
smtp_messages_deferred_total|counter|Attempts that left a message to be tried again.|
smtp_messages_failed_total|counter|Messages that failed for a recipient for good.|
smtp_messages_expired_total|counter|Messages that failed because they were too old.|
smtp_messages_rejected_total|counter|Refusals, by reply code.|code
smtp_delivery_failures_total|counter|Attempts in which a next hop did not take a message.|
smtp_bytes_received_total|counter|Octets of content accepted.|
smtp_queue_depth|gauge|Messages owed.|
smtp_queue_oldest_age_seconds|gauge|Age of the oldest message owed.|
smtp_messages_held|gauge|Messages held until someone releases them.|
smtp_sessions_active|gauge|Sessions open now.|
smtp_connections_total|counter|Connections accepted.|
smtp_connections_refused_total|counter|Connections turned away.|
smtp_tls_sessions_total|counter|Sessions that came under TLS.|
smtp_auth_attempts_total|counter|Logins tried, by result.|result
smtp_rate_limited_total|counter|Messages put off by a rate or a quota.|
smtp_delivery_duration_seconds|histogram|Time that one attempt took.|le
smtp_disk_free_bytes|gauge|Free space where the spool is.|
smtp_uptime_seconds|gauge|Time since start.|
smtp_build_info|gauge|1, labelled with the version.|version
""".splitlines()]
CELLS = {key: i for i, key in enumerate([  # the place in a row of each metric and label value
    *((name, value) for name, _, _, label in METRICS for value in LABELS[label]),
    # not shown: what the halves tell each other by the same means
    ("owed_bytes", ""), ("alive", ""), ("started", "")])}


class Metrics:
    """The counters of one relay: a writer's own row, and the sum of all rows for readers."""

    def __init__(self, cells: Any = None, row: int = 0, rows: int = 2) -> None:
        self.cells = cells or memoryview(mmap.mmap(-1, rows * len(CELLS) * 8)).cast("d")
        self.base = row * len(CELLS)
        self.lock = Lock()

    def row(self, row: int) -> Metrics:
        """Return the same counters, for the writer of another row."""
        return Metrics(self.cells, row)

    def inc(self, name: str, n: float = 1, label: str = "") -> None:
        cell = self.base + CELLS[name, label]
        with self.lock:
            self.cells[cell] += n

    def set(self, name: str, value: float, label: str = "") -> None:
        self.cells[self.base + CELLS[name, label]] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        total = self.base + CELLS[name, "sum"]
        with self.lock:
            self.cells[total] += value
            for cell in range(total + 1 + bisect.bisect_left(BUCKETS, value), total + len(LABELS["le"])):
                self.cells[cell] += 1

    def get(self, name: str, label: str = "") -> float:
        """Return the sum of all rows, an int where it is whole."""
        value = sum(self.each(name, label))
        return int(value) if value == int(value) else value

    def values(self, name: str, label: str) -> dict[str, float]:
        return {value: self.get(name, value) for value in LABELS[label]}

    def each(self, name: str, label: str = "") -> list[float]:
        """Return every process's part of a metric."""
        return list(self.cells[CELLS[name, label]::len(CELLS)])


def expvar(metrics: Metrics) -> Fields:
    """Return the metrics as Go's expvar does: one flat object, a map where there is a label."""
    return {"cmdline": sys.argv, "memstats": {"Sys": memory_used()},
            **{name: metrics.values(name, label) if label else metrics.get(name) for name, _, _, label in METRICS}}


def memory_used() -> int:
    """Return the most memory that this process has had, in octets."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else KIB)


def prometheus(metrics: Metrics) -> str:
    """Return the metrics in Prometheus's text format, version 0.0.4."""
    lines = []
    for name, kind, help, label in METRICS:
        lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
        for at, value in metrics.values(name, label).items():
            mark = f'{{{label}="{at}"}}' if label else ""
            if kind == "histogram":
                mark = f"_{at}" if at in ("sum", "count") else f"_bucket{mark}"
            lines.append(f"{name}{mark} {value}")
    return "\n".join(lines) + "\n"


# === 05 WIRE =================================================================
#
# A connection as both sides of the program see it: lines and blocks in, replies out, until a
# deadline, which is a moment on the monotonic clock. What is written waits until the next read
# would block, so a pipelined burst is answered with one segment (RFC 2920), but never more than
# OUT_MOST of it. Each Wire belongs to one thread.
#
# Content is handled in whole blocks. Between blocks the longest tail that could belong to a line
# end or to CRLF.CRLF is held back, so that the end is found at any split, a doubled dot is never
# cut in half, and CR and LF are counted together.

LINE_LIMIT, AUTH_LINE_LIMIT = 4096, 12288  # RFC 4954 4.3
READ_MOST, OUT_MOST = 64 * KIB, 64 * KIB  # malloc asks the kernel for each piece of 128 KiB
END = b"\r\n.\r\n"
UNDECIDED = re.compile(rb"(?:\r\n?|\n)(?:\.\r?)?\Z")  # a block's end that the next may change
HEAD_LIMIT = 128 * KIB
MAX_RECEIVED = 100


class PeerGone(Exception):
    """The peer closed the connection, or broke it."""


class Wire:
    """A socket with a reading buffer and replies that wait for the next read."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock, self.deadline = sock, deadline
        self.buffer = b""  # what has come and is not taken yet
        self.out = b""
        self.timeout = -1.0  # after which the socket gives up; -1.0: not known

    def fill(self, reading: bool = True, most: int = READ_MOST) -> None:
        """Send what waits; then read what there is, once, and no more than so many octets.

        TimeoutError when the deadline passes, PeerGone when the connection is closed or broken."""
        while self.out or reading:
            left = self.deadline - monotonic()
            if left <= 0:
                raise TimeoutError("deadline passed")
            if not min(left / 4, 10.0) <= self.timeout <= left:
                # It gives up somewhat before the deadline: to tell it each time costs system calls.
                self.timeout = 0.9 * left
                limit_calls(self.sock, self.timeout)
            try:
                if self.out:
                    self.out = self.out[self.sock.send(self.out):]
                if self.out or not reading:
                    continue
                block = self.sock.recv(min(most, READ_MOST))
            except (socket.timeout, BlockingIOError):  # the deadline is asked once more
                continue
            except OSError as e:
                raise PeerGone(str(e)) from None
            if not block:
                raise PeerGone("closed by the peer")
            self.buffer += block
            return

    def line(self, limit: int = LINE_LIMIT) -> bytes:
        """Return the next line with its end; Refused once one that is too long has passed by."""
        scanned, too_long = 0, False
        while not (end := self.buffer.find(b"\n", scanned) + 1):
            scanned = len(self.buffer)
            if scanned >= limit:
                self.buffer, scanned, too_long = b"", 0, True
            self.fill(most=limit)  # of a burst, not more than is soon taken from it
        line, self.buffer = self.buffer[:end], self.buffer[end:]
        if too_long or end > limit:
            raise Refused(LINE_TOO_LONG)
        return line

    def blocks(self, octets: int) -> Iterator[bytes]:
        """Yield the next octets, so many, as they come; what follows them is not read."""
        while octets:
            if not self.buffer:
                self.fill(most=octets)
            block, self.buffer = self.buffer[:octets], self.buffer[octets:]
            octets -= len(block)
            yield block

    def read(self, octets: int) -> bytes:
        return b"".join(self.blocks(octets))

    def write(self, data: bytes) -> None:
        """Send this before the next read that would block, or now when much waits."""
        self.out += data
        if len(self.out) > OUT_MOST:
            self.fill(reading=False)

    def flush(self) -> None:
        """Send what waits; PeerGone when it cannot be sent."""
        self.fill(reading=False)


def limit_calls(sock: socket.socket, seconds: float) -> None:
    """Make each call on a socket give up after so many seconds.

    The kernel does it where it can: Python's own way costs one more system call for each read
    and write, and the interpreter's lock is given away around it."""
    seconds = max(seconds, 0.001)  # none at all would be no limit
    if not isinstance(sock, ssl.SSLSocket):
        with suppress(OSError):  # Python and this kernel differ on the size of the time
            limit = struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.settimeout(None)
            return
    sock.settimeout(seconds)


class Content:
    """The content of one message as it passes into a draft: judged, counted, written in blocks.

    `lenient` makes CRLF of each bare CR and LF before anything else is done with it. `trouble` is a
    rule that was broken, or what the disk said: from then on nothing is written."""

    def __init__(self, draft: Any, limit: int, lenient: bool = False) -> None:
        self.draft, self.limit, self.lenient = draft, limit, lenient
        self.size = 0
        self.trouble: Refused | OSError | None = None
        self.head, self.carry = bytearray(b"\r\n"), b""

    def take(self, block: bytes, skip: int | None = None) -> None:
        """Take a block that does not end between CR and LF.

        `skip`: its transparency is to be undone (RFC 5321 4.5.2), and so many octets go before it."""
        if not block.count(b"\r\n") == block.count(b"\n") == block.count(b"\r"):
            if self.lenient:
                block = re.sub(rb"\r\n?|\n", b"\r\n", block)
            else:
                self.trouble = Refused(BARE_NEWLINE)
        if skip is not None and b"\r\n." in block:
            # A dot alone between line ends that were bare has ended nothing: it is kept, and doubled
            # on its way out. So is one at the end of a block: its line end is held back there.
            block = re.sub(rb"\r\n\.(?!\r\n|\Z)", b"\r\n", block)
        block = block[skip:]
        self.size += len(block)
        if self.size > self.limit:
            self.trouble = self.trouble or Refused(TOO_BIG)
        if len(self.head) < HEAD_LIMIT:
            self.head += block
        if block and not self.trouble:
            try:
                self.draft.write(block)
            except OSError as e:  # the rest must be read all the same: the session stays in step
                self.trouble = e

    def feed(self, block: bytes) -> None:
        """Take a block that may end anywhere (RFC 3030): a last CR waits for its LF."""
        block = self.carry + block
        cut = len(block) - block.endswith(b"\r")
        self.carry = block[cut:]
        self.take(block[:cut])

    def end(self) -> None:
        """Judge what can be judged only now: a last CR, the header section."""
        if self.carry:
            self.take(self.carry)
        if self.head.partition(b"\r\n\r\n")[0].lower().count(b"\r\nreceived:") > MAX_RECEIVED:  # RFC 5321 6.3
            self.trouble = self.trouble or Refused(LOOP)


def read_data(wire: Wire, content: Content) -> None:
    """Read content up to CRLF.CRLF alone; what was read last is the line that asked for it."""
    wire.buffer, skip = b"\r\n" + wire.buffer, 2  # what ended DATA: content may open with its own end
    while (at := wire.buffer.find(END)) < 0:
        tail = UNDECIDED.search(wire.buffer, max(len(wire.buffer) - 4, 0))
        stop = tail.start() if tail else len(wire.buffer)
        if stop:
            content.take(wire.buffer[:stop], skip)
            wire.buffer, skip = wire.buffer[stop:], 0
        wire.fill()
    content.take(wire.buffer[:at + 2], skip)
    wire.buffer = wire.buffer[at + len(END):]


PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"
PROXY_V1 = rb"PROXY (?:UNKNOWN(?: [^\r\n]*)?|TCP[46] ([0-9a-fA-F.:]+) [0-9a-fA-F.:]+(?: [0-9]{1,5}){2})\r\n"


def proxied_client(wire: Wire) -> str:
    """Read a balancer's PROXY header, v1 or v2, and not an octet more: TLS may begin after it.

    Returns the client's address, "" when the balancer speaks for itself; ValueError for
    anything else (haproxy.org's proxy-protocol.txt, 2.1 and 2.2)."""
    head = wire.read(6)
    if head == PROXY_V2[:6]:
        head += wire.read(10)
        length = int.from_bytes(head[14:], "big")
        if head[:12] != PROXY_V2 or head[12] not in (0x20, 0x21) or length > 4096:
            raise ValueError("not a PROXY header")
        octets = {1: 4, 2: 16}.get(head[13] >> 4, 0)  # of an address, by family
        address = wire.read(length)[:octets * (head[12] & 1)]
        return str(ipaddress.ip_address(address)) if address else ""
    while head.startswith(b"PROXY ") and not head.endswith(b"\n") and len(head) < 107:
        head += wire.read(1)
    found = re.fullmatch(PROXY_V1, head)
    if not found:
        raise ValueError("not a PROXY header")
    return str(ipaddress.ip_address(found[1].decode())) if found[1] else ""


# === 06 GRAMMAR ==============================================================
#
# Pure functions from octets to values: paths and their parameters, addresses. What a peer says is
# parsed by patterns, the whole of a thing by one; ValueError and Refused have the words for the
# peer. Only the reader of address lists raises nothing, for what it reads no peer can mend. Limits
# are about four times those of RFC 5321 4.5.3.1; no pattern here can backtrack, since in each the
# next octet alone decides.

LOCAL_LIMIT, PATH_LIMIT = 256, 1280
BAD_OCTETS = re.compile(rb"[\x00-\x1f\x7f]")
ATEXT = r'[^\x00-\x20"(),.:;<>@[\\\]\x7f]+'
QUOTED_STRING = r'"(?:[^"\\\x00-\x1f\x7f]|\\[\x20-\x7e])*"'
# Underscores are in use; U-labels pass. Said by what may not be in it: to compile what may takes 25 ms.
LABEL = r"(?!-)[^\x00-,./:-@[-^`{-\x7f]{1,252}(?<!-)"
DOMAIN = rf"{LABEL}(?:\.{LABEL})*\.?"
CUT_PATH = r'(?s)<((?:[^">]|"(?:[^"\\]|\\.)*")*)>((?: .*)?)'
PATH = (  # behind a source route; the domain may be a literal such as [127.0.0.1] or [IPv6:::1]
    rf"(?:@{DOMAIN}(?:,@{DOMAIN})*:)?(({ATEXT}(?:\.{ATEXT})*|{QUOTED_STRING})"
    rf"@(?:{DOMAIN}|\[((?ai:IPv6:)?)([^]]*)\]))")
EVENT = "(?:SUCCESS|FAILURE|DELAY)"
XTEXT = r"(?:[!-*,-<>-~]|\+(?:[2-6][0-9A-F]|7[0-9A-E]))+"  # RFC 3461 4, of printable ASCII
# A parameter: whose it is, what its value must be, what is said of another (RFC 1870, 3461, 4954,
# 6152, 6531). Who submitted a message first (AUTH) is not passed on.
PARAMETERS = {
    "SIZE": ("MAIL", "[0-9]{1,20}", "SIZE takes a number of octets"),
    "BODY": ("MAIL", "(?ai:7BIT|8BITMIME)", "BODY is 7BIT or 8BITMIME"),
    "SMTPUTF8": ("MAIL", "", "SMTPUTF8 takes no value"),
    "AUTH": ("MAIL", f"<>|{XTEXT}", "AUTH takes <> or an address as xtext"),
    "RET": ("MAIL", "(?ai:FULL|HDRS)", "RET is FULL or HDRS"),
    "ENVID": ("MAIL", rf"(?=.{{1,100}}\Z){XTEXT}", "ENVID is at most 100 characters of printable ASCII as xtext"),
    "NOTIFY": ("RCPT", f"(?ai:NEVER|{EVENT}(?:,{EVENT}){{0,2}})",
               "NOTIFY is NEVER, or a list of SUCCESS, FAILURE, DELAY"),
    "ORCPT": ("RCPT", ".+", "ORCPT is an address type, a semicolon, an address as xtext"),
}


def parse_path(text: str, hostname: str = "") -> tuple[str, str]:
    """Parse <path> and what follows it; source routes are dropped (RFC 5321 4.1.2, appendix C).

    With a hostname as old devices mean it: brackets may be missing, a local part alone is at that host."""
    if hostname and text and not text.startswith("<"):
        _, bracket, after = text.partition("<")
        path, blank, rest = text.partition(" ")
        text = f"<{after}" if bracket else f"<{path}>{blank}{rest}"
    cut = re.fullmatch(CUT_PATH, text)
    path, rest = cut.groups() if cut else ("@", "")
    if hostname and path and "@" not in path:
        path = f"{path}@{hostname}"
    if path.lower() in ("", "postmaster"):  # RFC 5321 4.1.1.3
        return path, rest
    found = re.fullmatch(PATH, path) if len(path) <= PATH_LIMIT else None
    try:
        if not found or len(found[2]) > LOCAL_LIMIT:
            raise ValueError
        if found[4] is not None:
            (ipaddress.IPv6Address if found[3] else ipaddress.IPv4Address)(found[4])
    except ValueError:
        raise ValueError("expected <local-part@domain>") from None
    return found[1], rest


def asked(**parameters: str) -> str:
    """Return what the sender asked about reports, as it stands behind a path."""
    return "".join(f" {name}={value}" for name, value in parameters.items() if value)


@lru_cache(maxsize=256)
def read_path(verb: str, argument: bytes, extended: bool, lenient: str) -> tuple[str, Mapping[str, str], str]:
    """Return path, parameters, and what they ask, of what follows MAIL or RCPT; many messages have the same.

    An unknown parameter is 555 (RFC 5321 4.1.1.11), as is any after HELO, which was offered none."""
    prefix, bad = (b"FROM:", BAD_SENDER) if verb == "MAIL" else (b"TO:", BAD_RECIPIENT)
    if argument[:len(prefix)].upper() != prefix:
        raise Refused(BAD_ARGUMENT(f"Expected {prefix.decode()}<address>"))
    try:
        address, rest = parse_path(argument[len(prefix):].lstrip(b" ").decode("utf-8"), lenient)
    except ValueError as e:
        why = "not UTF-8" if isinstance(e, UnicodeDecodeError) else e
        raise Refused(bad(f"{bad.text}: {why}")) from None
    found: dict[str, str] = {}
    for part in rest.split():
        name, _, value = part.partition("=")
        name = name.upper()
        whose, pattern, expected = PARAMETERS.get(name, ("", "(?!)", "Malformed parameter"))
        if re.fullmatch("[A-Z0-9-]+", name) and (whose != verb or not (extended or lenient)):
            raise Refused(BAD_PARAMETER(f"Unknown parameter {name}"))
        if name in found or not re.fullmatch(pattern, value):
            raise Refused(BAD_ARGUMENT(expected))
        found[name] = value.upper() if "(?ai:" in pattern else value
    return address, found, asked(**{name: found.get(name, "") for name in ("RET", "ENVID", "NOTIFY", "ORCPT")})


# -- what MAIL and RCPT say about reports (RFC 3461; RFC 6533 for addresses beyond ASCII) --
#
# A value is checked, and kept as it goes on to the next hop. Decoded it is safe in a
# header, too: an escaped CR LF never gets in.

ORCPT_MAX = 500  # octets, RFC 3461 4.2
# The alternatives begin with different characters, so this does not backtrack.
UNITEXT = r"(?:[!-*,-<>-\[\]-~]|[^\x00-\x7f]|\\x\{(?:10|0?[0-9A-Fa-f])?[0-9A-Fa-f]{2,4}\})+"
UNITEXT_SPECIAL = " +=\\"  # RFC 6533 3: neither form has them bare


def decode_xtext(value: str, wide: bool = False) -> str:
    """Read xtext or, if wide, a utf-8 type address; "" if it is malformed or hides a control character."""
    good, escape = (UNITEXT, r"\\x\{([0-9A-Fa-f]{2,6})\}") if wide else (XTEXT, r"\+(..)")
    if not re.fullmatch(good, value):
        return ""
    text = re.sub(escape, lambda digits: chr(int(digits[1], 16)), value)
    return "" if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", text) else text


def encode_unitext(text: str, special: str = "", utf8: bool = False) -> str:
    r"""Write as \x{HEX} what is special, unprintable or, unless utf8, not ASCII (RFC 6533 3)."""
    return "".join(c if c.isprintable() and c not in special and (utf8 or c.isascii())
                   else f"\\x{{{ord(c):02X}}}" for c in text)


def original_recipient(orcpt: str, utf8: bool) -> str:
    """Write ORCPT as a report's Original-Recipient (RFC 3464 2.3.1, RFC 6533 3); "" if it is malformed.

    It may be UTF-8 as it is only where MAIL said SMTPUTF8."""
    kind, _, address = orcpt.partition(";")
    wide = kind.lower() == "utf-8"
    text = decode_xtext(address, wide)
    if not text or not re.fullmatch("[A-Za-z0-9-]{1,30}", kind) or len(orcpt.encode("utf-8", "replace")) > ORCPT_MAX:
        return ""
    return f"{kind}; {encode_unitext(address, utf8=utf8) if wide else text}"


def final_recipient(address: str, utf8: bool) -> str:
    """Write an address as a report's Final-Recipient (RFC 3464 2.3.2, RFC 6533 3)."""
    if address.isascii():
        return f"rfc822; {address}"
    return f"utf-8; {encode_unitext(address, UNITEXT_SPECIAL, utf8)}"


# -- addresses as programs write them, in header fields and on command lines

QUOTED = r'"(?:[^"\\]|\\.)*"'
ENCODED_WORD = r"=\?[^?\s]*\?[bBqQ]\?[^?]*\?="
IN_COMMENT = r"[^()\\]|\\."
# A bracket belongs to an atom with its end, as in a name or an address literal, or alone. A comment may
# hold others, and those others. "<a@x, b@y>" has lost an end: what there is of it is another's.
ADDRESS_TOKEN = (
    rf'(?s)(?P<atom>(?:{QUOTED}(?=@)|{ENCODED_WORD}|\[[^][<>@]*\]|\\.|[^\s"(),:;<>\\[])+)'
    rf'|(?P<quoted>{QUOTED})|<(?![^<>",]+@[^<>",]*,)(?P<angle>(?:{QUOTED}|[^<>"])*)>|(?P<space>\s+)'
    rf"|\((?P<comment>(?:{IN_COMMENT}|\((?:{IN_COMMENT}|\((?:{IN_COMMENT})*\))*\))*)\)|.")
LOCAL_PART_ALONE = r"[^\s@\"()<>:,;\\=?]*\w[^\s@\"()<>:,;\\=?]*"


def read_addresses(text: str) -> list[tuple[str, str]]:
    """Read an address list leniently: (display name, address) pairs; raises nothing, in linear time.

    It takes RFC 5322 3.4 and what programs write in its stead: names with commas, brackets, dots
    or comments in them, semicolons, lost quotes and brackets. A local part alone is an address,
    too: who delivers here completes it. What is no address is left out, and costs no other."""
    found: list[tuple[str, str]] = []
    held: list[str] = []  # before a comma: the beginning of a name, or local parts
    said: list[tuple[str, str]] = []  # in the entry under way
    angle, groups_end = False, text.rfind(";")
    for token in chain(re.finditer(ADDRESS_TOKEN, text), re.finditer(";", ";")):
        kind, value = token.lastgroup or token[0], token[token.lastgroup or 0]
        if kind in '<>()["':  # what opens and never ends is no more than a space
            kind, value = "space", " "
        elif kind == "atom" and "@" in value.strip("@"):
            kind = "address"
        elif kind == "quoted":
            value = re.sub(r"(?s)\\(.)", r"\1", value[1:-1])
        elif kind == ":" and token.start() < groups_end:
            kind = "group"
        if kind not in ("angle", ",", ";", "group"):
            if kind == ":" and said and said[-1][1].lower() == "mailto":
                said.pop()
            else:
                said.append((kind, value))
            continue
        note = next((value for kind, value in reversed(said) if kind == "comment"), "")
        words = " ".join("".join(v for k, v in said if k not in ("address", "comment")).split())
        bare = [bare_address(v) for k, v in said if k == "address"]
        if kind == "angle":
            name = "".join(f"({v})" if k == "comment" else v for k, v in said)
            name = " ".join(", ".join([*held, name]).split())
            found += [(note if name == f"({note})" else name, bare_address(value))]
            held = []
        elif angle and not bare:  # a name behind its address
            found[-1] = (found[-1][0] or words or note, found[-1][1])
        else:
            alone = not bare and re.fullmatch(LOCAL_PART_ALONE, words)
            # "Doe, John <j@x>" is one, "root, John <j@x>" are two: users' names are in lower case.
            if kind == "," and words and not bare and (held or not alone or words != words.lower()):
                held += [words]
            else:
                found += [("", local) for local in held if re.fullmatch(LOCAL_PART_ALONE, local)]
                found += [("" if n else words or note, address) for n, address in enumerate(bare)]
                found += [(note, words)] if alone and kind != "group" else []
                held = []
        said, angle = [], kind == "angle"
    return [(name, address) for name, address in found if address]


def bare_address(text: str) -> str:
    """Take off what is not the address: spaces, a source route, a scheme, quotes around it."""
    if '"' in text:
        return text.strip()
    text = re.sub(r"(?i)^(?:@[^:]*:|mailto:|smtp:)", "", re.sub(r" ?([@.]) ?", r"\1", " ".join(text.split())))
    return text.strip("' \\" if "[" in text[1:] else "' \\[]")


def with_a_labels(domain: str) -> str:
    """Return a domain in lower case with A-labels; in NFC, where it is not certain which they are.

    Python's IDNA is that of 2003, in which straße.example is strasse.example: they are two."""
    name = unicodedata.normalize("NFC", domain.lower())
    with suppress(UnicodeError):
        if not name.isascii() and len(name) < 254:  # the codec is quadratic (CVE-2022-45061)
            form = name.encode("idna")
            if form.decode("idna") == name:
                return form.decode()
    return name


# === 07 SEALING ==============================================================
#
# Makes content, records and relay passwords unreadable without SMTP_SPOOL_KEY, by AES-256-GCM of
# ssl's own libcrypto; ctypes is imported only when there is a key.
#
#     file   = head chunk...
#     head   = 8F "SEALED" 01 | key id, 8 octets | salt, 32 random octets
#     chunk  = cipher text of 65536 octets, the last one's of as many as are left | tag, 16
#     key    = HKDF-SHA256(SMTP_SPOOL_KEY, salt, "smtprelay file"): no nonce comes twice under it
#     nonce  = number of the chunk from 0, 11 octets | 1 for the last chunk, else 0
#     AAD    = head | name of the file
#     key id = the first 8 octets of HKDF-SHA256(SMTP_SPOOL_KEY, no salt, "smtprelay key id")
#
# The name ties a file to its message. Opening proves the last chunk, so a cut is noticed at once.
# Not hidden: sizes, times, names. Not detected: an old copy under its name, and a plain file in a
# sealed one's place (so that a key can be added later). A Sealer never changes and serves every
# thread; a reader or writer has one owner.

MAGIC = b"\x8fSEALED\x01"
HEAD_SIZE, CHUNK_SIZE, TAG_SIZE = 48, 64 * KIB, 16
SEALED_CHUNK = CHUNK_SIZE + TAG_SIZE
SEALED_TEXT, KEY_CHECK = "sealed:", "key.check"
GET_TAG, SET_TAG = 0x10, 0x11  # EVP_CTRL_AEAD_*: macros, which no library exports


class SpoolError(Exception):
    """What is in the spool, or sealed, cannot be read, or nothing can be sealed."""


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """Derive 32 octets from `key` with HKDF-SHA256 (RFC 5869 2)."""
    return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\x01", "sha256")


def open_libcrypto() -> ctypes.PyDLL:
    """Open the libcrypto of Python's ssl; SpoolError when there is none."""
    import ctypes  # for those alone who set a key
    major = ssl.OPENSSL_VERSION_INFO[0]
    version = "1.1" if major == 1 else major
    # A symbol is looked up in a module's dependencies too; None is the program itself, where _ssl may be
    # built in. Else a library of the same version: macOS ends a process that loads one without a version.
    own = getattr(sys.modules.get("_ssl"), "__file__", None)
    for name in (own, f"libcrypto.so.{version}", f"libcrypto.{version}.dylib"):
        with suppress(OSError, AttributeError):
            # Not CDLL: it lets the GIL go, and a busy process takes 5 ms to give it back; a chunk takes 0.05 ms.
            library = ctypes.PyDLL(name)
            library.OpenSSL_version_num.restype = ctypes.c_ulong
            library.EVP_aes_256_gcm.restype = library.EVP_CIPHER_CTX_new.restype = ctypes.POINTER(ctypes.c_char)
            if library.OpenSSL_version_num() >> 28 == major:
                return library
    raise SpoolError(f"this Python's ssl ({ssl.OPENSSL_VERSION}) is not linked with a shared libcrypto")


def gcm(lib: Any, key: bytes, aad: bytes, nonce: int, data: bytes, tag: bytes = b"") -> bytes | None:
    """Run AES-256-GCM once: encrypt and append a tag or, with a tag, decrypt; None if it was altered, or OSError."""
    import ctypes
    out = ctypes.create_string_buffer(len(data) + TAG_SIZE)
    end, count = ctypes.byref(out, len(data)), ctypes.byref(ctypes.c_int())
    context = lib.EVP_CIPHER_CTX_new()
    try:
        if not (context
                and lib.EVP_CipherInit_ex(context, lib.EVP_aes_256_gcm(), None, key, nonce.to_bytes(12, "big"), not tag)
                and lib.EVP_CipherUpdate(context, None, count, aad, len(aad))
                and lib.EVP_CipherUpdate(context, out, count, data, len(data))
                and (not tag or lib.EVP_CIPHER_CTX_ctrl(context, SET_TAG, TAG_SIZE, tag))
                # Here the tag is made, or checked: what `out` holds is not to be used before.
                and ((sound := lib.EVP_CipherFinal_ex(context, end, count)) or tag)
                and (tag or lib.EVP_CIPHER_CTX_ctrl(context, GET_TAG, TAG_SIZE, end))):
            raise OSError("libcrypto cannot run AES-256-GCM")
    finally:
        lib.EVP_CIPHER_CTX_free(context)
    return out.raw[:len(data) if tag else None] if sound else None


class SealWriter:
    """Seals a stream as it comes, holding back at most a chunk."""

    def __init__(self, sealer: Sealer, name: str) -> None:
        self.head = sealer.magic + os.urandom(32)
        self.cipher = sealer.cipher(self.head, name)
        self.held, self.number = bytearray(), 0

    def update(self, data: bytes, last: bool = False) -> bytes:
        """Take some of the text; return what can be written of it: all, with the last."""
        self.held += data
        out, self.head = bytearray(self.head), b""
        while last or len(self.held) > CHUNK_SIZE:  # not >=: the last chunk is marked
            done = len(self.held) <= CHUNK_SIZE
            out += self.cipher(self.number << 8 | done, bytes(self.held[:CHUNK_SIZE]))
            del self.held[:CHUNK_SIZE]
            self.number += 1
            last = last and not done
        return bytes(out)


class SealReader:
    """The raw half of a sealed file: what io.BufferedReader asks of its `raw`."""

    def __init__(self, file: BinaryIO, name: str, cipher: Callable[..., Any]) -> None:
        self.file, self.name, self.cipher = file, name, cipher
        body = file.seek(0, os.SEEK_END) - HEAD_SIZE
        self.last = max(body - 1, 0) // SEALED_CHUNK
        self.size = body - (self.last + 1) * TAG_SIZE
        self.number, self.text = -1, b""
        self.at = self.last * CHUNK_SIZE
        self.read()  # proves the last chunk
        self.at = 0

    def __getattr__(self, name: str) -> Any:
        """All else is as with the file: readable, seekable, flush, close, closed."""
        return getattr(self.file, name)

    def read(self, most: int = CHUNK_SIZE) -> bytes:
        """Return some of the text, of one chunk at most, b"" at the end; SpoolError when it is not what was sealed."""
        number = min(self.at // CHUNK_SIZE, self.last)
        if number != self.number:
            self.file.seek(HEAD_SIZE + number * SEALED_CHUNK)
            box = self.file.read(SEALED_CHUNK)
            nonce, tag = number << 8 | (number == self.last), box[-TAG_SIZE:].rjust(TAG_SIZE)
            text = self.cipher(nonce, box[:-TAG_SIZE], tag)
            if text is None:
                raise SpoolError(f"{self.name} was cut or altered, or is not the file of this name")
            self.number, self.text = number, text
        skip = self.at - number * CHUNK_SIZE
        part = self.text[skip:skip + most]
        self.at += len(part)
        return part

    def readinto(self, buffer: memoryview) -> int:
        part = self.read(len(buffer))
        buffer[:len(part)] = part
        return len(part)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


class Sealer:
    """Seals under one key of 32 octets, or none: plain. What has a name is opened by that alone."""

    def __init__(self, key: bytes = b"") -> None:
        self.key, self.magic = key, MAGIC + hkdf(key, b"", b"smtprelay key id")[:8]
        self.lib = open_libcrypto() if key else None

    def cipher(self, head: bytes, name: str) -> Callable[..., Any]:
        """Return what seals a chunk of one file, by its nonce, or opens it, with a tag."""
        key = hkdf(self.key, head[-32:], b"smtprelay file")
        return partial(gcm, self.lib, key, head + name.encode("utf-8", "surrogateescape"))

    def reader(self, file: BinaryIO, name: str) -> BinaryIO:
        """Return a reader of the text of `file`, which is itself returned when it is plain.

        SpoolError, from here or from any read: the key is wrong, or the file is not what was sealed."""
        head = file.read(HEAD_SIZE)
        if not head or not MAGIC.startswith(head[:len(MAGIC)]):  # sealed ones may be cut, even in the first octets
            file.seek(0)
            return file
        if self.lib is None:
            raise SpoolError(f"{name} is sealed, but SMTP_SPOOL_KEY is not set")
        if len(head) == HEAD_SIZE and not head.startswith(self.magic):
            raise SpoolError(f"{name} is sealed with another key than SMTP_SPOOL_KEY")
        raw = SealReader(file, name, self.cipher(head, name))
        return io.BufferedReader(cast(io.RawIOBase, raw), CHUNK_SIZE)

    def seal(self, data: bytes, name: str) -> bytes:
        """Seal a whole record."""
        return SealWriter(self, name).update(data, last=True) if self.lib else data

    def unseal(self, data: bytes, name: str) -> bytes:
        """Return what seal() was given, or plain data as it is; SpoolError as reader()."""
        return self.reader(io.BytesIO(data), name).read()

    def seal_text(self, text: str, name: str) -> str:
        """Seal a short secret into one line of ASCII, to be kept in a JSON file."""
        return SEALED_TEXT + base64.b64encode(self.seal(text.encode(), name)).decode() if self.lib else text

    def unseal_text(self, text: str, name: str) -> str:
        """Return what seal_text() was given, or plain text as it is; SpoolError as unseal()."""
        if not text.startswith(SEALED_TEXT):
            return text
        try:
            return self.unseal(base64.b64decode(text[len(SEALED_TEXT):], validate=True), name).decode()
        except ValueError:
            raise SpoolError(f"{name} was altered") from None


def open_sealer(settings: Settings) -> Sealer:
    """Return the sealer of a spool; SettingsError when there is no libcrypto or it has another key.

    The first start with a key leaves a mark, key.check; what is plain from before stays readable."""
    try:
        sealer = Sealer(settings.spool_key)
        with suppress(FileNotFoundError), open(os.path.join(settings.spool, KEY_CHECK), "rb") as file:
            if sealer.unseal(file.read(KIB), KEY_CHECK) != KEY_CHECK.encode():
                raise SpoolError(f"{KEY_CHECK} was altered")
    except SpoolError as e:
        raise SettingsError(
            f"SMTP_SPOOL_KEY=(a secret): expected a key that works for {settings.spool}: {e}") from None
    return sealer


# === 08 SPOOL ================================================================
#
# Where messages are kept. A message is a stem, <date>/<id>_<hash>, and these files:
#
#     on disk                      means                          at start
#     STEM.RUN.part                being received in that run     another run's: to bad/
#     STEM.eml                     acknowledged, owed or held     read, then queued
#     STEM.eml + .json             the same, with its progress    read, then queued when due
#     ... + .forwarded.json        finished: the name says so,    kept for SMTP_KEEP
#     ... + .failed.json           whatever is inside             kept for SMTP_KEEP
#     STEM.json without .eml       its removal was cut off        removed
#     STEM.tmp                     a record that was being saved  removed
#     anything else beside these   not ours                       to bad/, never deleted
#
# The .eml is written as .part, renamed, then synced once: on the file systems in use (ext4, xfs,
# btrfs) the sync makes the new name durable with the content. A sidecar is never synced; lost or
# torn, it is rebuilt from the .eml. The session that owns a Draft writes it; afterwards the worker
# that owns the message does. So nothing here needs a lock but the making of ids.

NAME = re.compile(r"[0-9a-f]{16}_[0-9a-f]{16}(\.eml|(\.forwarded|\.failed)?\.json|\.[0-9a-f]+\.part|\.tmp)")
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
DONE = {".forwarded.json": Status.FORWARDED, ".failed.json": Status.FAILED}
SIDECARS = (*DONE, ".json")  # the first there counts
DRAFT_BLOCK = 256 * KIB
RECORD_LIMIT = 8 * MIB
READ_AT_ONCE = 64 * KIB
TO_THE_END = "to the end"  # the size of a sealed message, whose chunks tell where it ends
ARRIVED = ".arrived"  # written by sendmail, when it has spooled a message itself
SEEN = "inbox.json"  # what a person did to messages: read state and tags
KEPT_NAMES = (".lock", ".probe", ARRIVED, "bad", "faults", "faults.counts", "tls", "usage", KEY_CHECK, SEEN)


class SpoolBusy(Exception):
    """Another process has this spool."""

    status = EX_TEMPFAIL


# -- what a message opens with --

@lru_cache(maxsize=16)
def mail_date(seconds: int) -> str:
    """Return a Unix time as RFC 5322 writes it, in UTC."""
    return email.utils.formatdate(seconds).replace("-0000", "+0000")


def read_asked(text: str) -> tuple[str, Fields]:
    """Undo `<path>` and `asked`."""
    if not text.endswith(">") or " " in text:
        [(path, rest)] = re.findall(f"{CUT_PATH}$", text)
        return path, {name.lower(): value for name, value in re.findall(r"(\w+)=(\S+)", rest)}
    return text[1:-1], {}


def envelope_block(envelope: Envelope, id: str, hostname: str) -> bytes:
    """Return the envelope headers behind X-Envelope-Size, then our Received (RFC 5321 4.4)."""
    e = envelope
    only = f"\r\n\tfor <{e.recipients[0]}>" if len(e.recipients) == 1 else ""
    trace = (f"Received: from {e.helo or 'unknown'} ([{'IPv6:' if ':' in e.client else ''}{e.client}])\r\n"
             f"\tby {hostname} (smtprelay) with {e.protocol} id {id}{only};\r\n"
             f"\t{mail_date(id_micros(id) // 1000000)}\r\n").encode("utf-8", "surrogateescape")
    to = "".join([f"X-Envelope-To: <{r}>{e.asked_for.get(r, '')}\r\n" for r in e.recipients])
    flags = f"X-Envelope-Flags: {' '.join(e.flags)}\r\n" if e.flags else ""
    return (f"X-Envelope-Trace: {len(trace)}\r\nX-Envelope-Id: {id}\r\n"
            f"X-Envelope-From: <{e.reverse_path}>{e.asked}\r\n{to}{flags}"
            f"X-Envelope-Client: {e.client}\r\nX-Envelope-Helo: {e.helo}\r\n"
            f"X-Envelope-Protocol: {e.protocol}\r\nX-Envelope-User: {e.user}\r\n"
            ).encode("utf-8", "surrogateescape") + trace


def read_block(file: BinaryIO) -> list[tuple[str, str]]:
    """Read the envelope headers from the start of an .eml, leaving the file behind them."""
    raw = b""
    while (line := file.readline(8192)).startswith(b"X-Envelope-"):
        raw += line
    file.seek(len(raw))
    return re.findall("X-Envelope-([^:\n]+): ([^\r\n]*)", raw.decode("utf-8", "surrogateescape"))


def first_record(file: BinaryIO) -> Message:
    """Rebuild a record from the .eml alone, leaving the file at the message; SpoolError when it is cut short."""
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    block = read_block(file)
    try:
        one = dict(block)
        rest = length - file.tell() - int(one["Trace"])
        size = rest if one["Size"].strip() == TO_THE_END else int(one["Size"])
        if rest < size or size < 0:
            raise SpoolError(f"content is cut short: {length} octets")
        flags = tuple(one.get("Flags", "").split())
        held = HELD_BY_MODE if "HOLD" in flags else ""
        status = Status.HELD if held else Status.RECEIVED
        received = iso_time(id_micros(one["Id"]) / 1e6)
        reverse_path, told = read_asked(one["From"])
        recipients = [Recipient(path, status, **of) for path, of in (read_asked(v) for k, v in block if k == "To")]
        return Message(
            one["Id"], status, received, reverse_path, recipients, size,
            one["Client"], one["Helo"], one["Protocol"], one["User"], flags, **told,
            history=[{"at": received, "status": status.value, "detail": held}])
    except (KeyError, TypeError, ValueError, OverflowError, OSError) as e:
        raise SpoolError(f"envelope headers do not parse: {e!r}") from None


# -- files, and what stands for them in tests --

def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it: os.write may stop short on a full disk."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def write_file(path: str, data: bytes, how: int = os.O_TRUNC, sync: bool = False) -> None:
    """Write a small private file whole."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | how | os.O_NOFOLLOW, 0o600)
    try:
        write_all(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: str, content: bytes, sync: bool = False) -> None:
    """Write a private file whole or not at all; owner, group and mode of one that was there stay.

    A file that is a mount of its own, as containers have them, cannot be replaced: it is rewritten in place."""
    draft = os.path.join(dirname(path), f".{token_hex(8)}")
    try:
        write_file(draft, content, os.O_EXCL, sync)
        with suppress(FileNotFoundError):
            was = os.stat(path)
            os.chmod(draft, stat.S_IMODE(was.st_mode))
            if os.geteuid() == 0:  # root changes a file which the relay, not root, must go on reading
                os.chown(draft, was.st_uid, was.st_gid)
        os.replace(draft, path)
    except OSError as e:
        remove_file(draft)
        if e.errno not in (errno.EBUSY, errno.EACCES, errno.EROFS):
            raise
        write_file(path, content, 0, sync=True)  # the same error again where it is no mount
        os.truncate(path, len(content))


def remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        """It is gone already."""


def read_whole(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def open_small(path: str) -> BinaryIO:
    """Open a file; a small one is read at once, which costs fewer system calls."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        start = os.read(fd, READ_AT_ONCE)
    finally:
        os.close(fd)
    return io.BytesIO(start) if len(start) < READ_AT_ONCE else open(path, "rb")


class Disk:
    """Where a spool's files are: what is asked of them, which can be asked of Memory, too."""

    read, write, remove = staticmethod(open_small), staticmethod(write_file), staticmethod(remove_file)
    rename, names, size = staticmethod(os.rename), staticmethod(os.listdir), staticmethod(os.path.getsize)


class Memory:
    """The same without a disk, for tests: nothing outlives the process."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def read(self, path: str) -> BinaryIO:
        return io.BytesIO(self.files[path])

    def write(self, path: str, data: bytes, how: int = 0) -> None:
        if how == os.O_EXCL and path in self.files:
            raise FileExistsError(path)
        self.files[path] = data

    def rename(self, old: str, new: str) -> None:
        self.files[new] = self.files.pop(old)

    def remove(self, path: str) -> None:
        self.files.pop(path, None)

    def size(self, path: str) -> int:
        return len(self.files[path])

    def names(self, folder: str) -> Iterable[str]:
        depth = folder.count("/") + 1
        return {path.split("/")[depth] for path in list(self.files) if path.startswith(folder)}


def check_spool(path: str) -> None:
    """Refuse a directory with things in it that is no spool of ours, touching nothing; SettingsError."""
    try:
        names = set(os.listdir(path))
    except NotADirectoryError:
        raise SettingsError(f"SMTP_SPOOL={path!r}: expected a directory") from None
    except OSError:  # made when it is opened, which says what else is wrong
        return
    if names >= {".lock", "bad"}:  # which every spool has that was opened once
        return
    # sendmail may have been here first; but pictures are kept in directories of dates, too
    days = {n for n in names if re.fullmatch(DATE, n) and os.path.isdir(f"{path}/{n}")
            and all(map(NAME.fullmatch, os.listdir(f"{path}/{n}")))}
    strange = sorted(names - days - {*KEPT_NAMES, "lost+found"})
    if strange:
        raise SettingsError(f"SMTP_SPOOL={path!r}: expected a directory that is empty, or a relay's own; "
                            f"this one holds {', '.join(strange[:3])}")


class Spool:
    """Messages on disk, or in memory. OSError from a method means the disk; SpoolError, what lies on it."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings, self.log = settings, log
        self.on_disk = settings.storage == "file"
        self.root = abspath(settings.spool)
        if self.on_disk:
            check_spool(self.root)
        self.store: Disk | Memory = Disk() if self.on_disk else Memory()
        self.sealer = open_sealer(settings) if self.on_disk else Sealer()
        self.lock, self.last_id = Lock(), 0
        self.maker, self.run = token_hex(2)[:3], token_hex(4)
        self.folder = ""  # a date's directory that is surely there
        self.tidying = False
        self.lock_file = -1

    def open(self) -> None:
        """Make the directories and take the lock; SpoolBusy says who has it."""
        if not self.on_disk:
            return
        for path in (self.root, self.path("bad")):
            os.makedirs(path, 0o700, exist_ok=True)
        self.lock_file = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        for _ in range(20):  # the halves of a relay that was killed have a moment to notice
            try:
                fcntl.flock(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        else:
            holder = os.pread(self.lock_file, 200, 0).decode("ascii", "replace").strip()
            self.close()
            raise SpoolBusy(f"spool {self.root} is in use by {holder or 'another process'}")
        self.tidying = True
        os.ftruncate(self.lock_file, 0)
        os.pwrite(self.lock_file, f"process {os.getpid()}\n".encode(), 0)
        if self.settings.spool_key and not exists(self.path(KEY_CHECK)):
            replace_file(self.path(KEY_CHECK), self.sealer.seal(KEY_CHECK.encode(), KEY_CHECK), sync=True)

    def close(self) -> None:
        if self.lock_file >= 0:
            os.close(self.lock_file)
            self.lock_file = -1

    def free(self) -> int:
        """Return the octets that an ordinary user may still write."""
        return shutil.disk_usage(self.root).free if self.on_disk else sys.maxsize

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def draft(self, envelope: Envelope) -> Draft:
        """Begin a message; nothing is on disk before its first large block or its commit."""
        with self.lock:  # ids sort by arrival: the time in microseconds, then who made it
            self.last_id = max(self.last_id + 1, time.time_ns() // 1000)
            id = f"{self.last_id:013x}{self.maker}"
        return Draft(self, envelope, id)

    def names(self) -> Iterator[tuple[str, Status | None]]:
        """Yield the stem of each message by age, with the status of a finished one."""
        for day in sorted(filter(re.compile(DATE).fullmatch, self.store.names(self.root))):
            if os.path.islink(f"{self.root}/{day}"):
                continue  # what is elsewhere is not ours
            try:
                names = sorted(self.store.names(f"{self.root}/{day}"), reverse=True)
            except OSError as e:
                self.log.error("spool_unreadable", directory=day, error=e)
                continue
            while names:  # a great many are not kept twice
                start, ends = names[-1][:33], []
                while names and names[-1].startswith(start):
                    ends.append(names.pop()[33:])
                if self.tidying:
                    self.tidy(f"{day}/{start}", ends)
                if ".eml" in ends and NAME.fullmatch(start + ".eml"):
                    yield f"{day}/{start}", next(filter(None, map(DONE.get, ends)), None)
        self.tidying = False  # later, what looks left over is being written just now, here or by sendmail

    def tidy(self, stem: str, ends: Sequence[str]) -> None:
        """Deal with what no message needs: what is not ours is set aside, as is a cut-off arrival."""
        for end in {*ends} - {f".{self.run}.part"}:
            if not NAME.fullmatch(stem[11:] + end):
                self.set_aside(stem + end, "not a name of ours")
            elif end.endswith(".part"):
                self.set_aside(stem + end, "never acknowledged")
            elif end == ".tmp" or ".eml" not in ends:
                try:
                    self.store.remove(self.path(stem + end))
                except OSError as e:  # it is not ours to remove: the rest of the spool is to be read
                    self.log.error("not_removed", file=stem + end, error=e)

    def set_aside(self, name: str, reason: str) -> None:
        """Move a file into bad/."""
        target = f"bad/{name.replace('/', '_')}.{token_hex(4)}"
        try:
            self.store.rename(self.path(name), self.path(target))
            self.log.warn("set_aside", file=name, reason=reason, now=target)
        except (OSError, KeyError) as e:
            self.log.error("set_aside_failed", file=name, reason=reason, error=e)

    def open_file(self, stem: str, end: str) -> BinaryIO:
        """Open a file of a message, unsealed; KeyError when it is gone, SpoolError when it cannot be."""
        try:
            file = self.store.read(f"{self.root}/{stem}{end}")
            return self.sealer.reader(file, stem + (".eml" if end == ".eml" else ".json"))
        except (FileNotFoundError, KeyError):
            raise KeyError(stem) from None
        except OSError as e:
            if e.errno not in (errno.EISDIR, errno.ELOOP):
                raise
            raise SpoolError(f"{stem}{end} is no file") from None

    def content(self, stem: str) -> BinaryIO:
        """Open a message as it leaves: our Received header, then what was received; KeyError when it is gone."""
        file = self.open_file(stem, ".eml")
        read_block(file)
        return file

    def load(self, stem: str) -> Message:
        """Return the record of a message; KeyError when it is gone, SpoolError when it is damaged."""
        message, file = self.fetch(stem, done=True)
        file.close()
        return message

    def fetch(self, stem: str, done: bool = False) -> tuple[Message, BinaryIO]:
        """Return record and content, as `load` and `content` do; `done`: it may be finished already.

        The record is the first sidecar that there is, rebuilt from the .eml where that cannot be read."""
        file = self.open_file(stem, ".eml")
        try:
            message = first_record(file)
            for end in SIDECARS if done else SIDECARS[-1:]:
                try:
                    with self.open_file(stem, end) as sidecar:
                        message = Message.from_json(sidecar.read(RECORD_LIMIT))
                except KeyError:
                    continue
                except (ValueError, SpoolError) as e:
                    self.log.warn("record_rebuilt", stem=stem, reason=e)
                message.status = DONE.get(end, message.status)
                break
            return message, file
        except BaseException:
            file.close()
            raise

    def save(self, message: Message) -> None:
        """Write a message's record, under the name that its status calls for."""
        path, is_done = self.path(message.stem), message.status in FINISHED and not message.owed
        end = f".{message.status._value_}.json" if is_done else ".json"
        self.store.write(path + ".tmp", self.sealer.seal(message.to_json(), message.stem + ".json"))
        self.store.rename(path + ".tmp", path + end)  # torn by a power cut or not, its name says all that counts
        for other in {*SIDECARS} - {end}:
            self.store.remove(path + other)

    def save_first(self, message: Message) -> None:
        """Write the first record of a message, unless it has one."""
        name = message.stem + ".json"
        with suppress(FileExistsError):  # it was delivered, or tried, in the meantime
            self.store.write(self.path(name), self.sealer.seal(message.to_json(), name), os.O_EXCL)

    def remove(self, stem: str) -> None:
        """Remove a message; content first, so that what is cut off is never mistaken for one owed."""
        for end in (".eml", *SIDECARS):
            self.store.remove(self.path(stem + end))

    def size(self, stem: str) -> int:
        """Return the octets that a message's content takes."""
        return self.store.size(f"{self.root}/{stem}.eml")

    def finished_at(self, stem: str, status: Status) -> float:
        """Return when a message was finished, as Unix time; OSError in memory, where nothing is found by its name."""
        return os.path.getmtime(f"{self.root}/{stem}.{status.value}.json")

    def probe(self) -> None:
        """Write a little and remove it; OSError when the spool takes no writes."""
        self.store.write(self.path(".probe"), b"x" * 64)
        self.store.remove(self.path(".probe"))


class Draft:
    """A message on its way into the spool: write its content in blocks, then commit or abort."""

    def __init__(self, spool: Spool, envelope: Envelope, id: str) -> None:
        self.spool, self.envelope, self.id = spool, envelope, id
        self.stem = stem_of(id, envelope.recipients[0])
        self.final = f"{spool.root}/{self.stem}.eml"
        self.part = f"{spool.root}/{self.stem}.{spool.run}.part"
        self.seal = SealWriter(spool.sealer, self.stem + ".eml") if spool.sealer.lib else None
        self.waiting, self.size, self.fd = io.BytesIO(), 0, -1
        self.waiting.write(envelope_block(envelope, id, spool.settings.hostname))

    def write(self, block: bytes) -> None:
        self.size += self.waiting.write(block)
        if self.waiting.tell() >= DRAFT_BLOCK and self.spool.on_disk:
            self.flush()

    def flush(self, last: bool = False) -> None:
        """Write what waits to the .part, which the first call makes and opens with the size, where that is known."""
        spool, folder = self.spool, self.spool.path(self.stem[:10])
        data, self.waiting = self.waiting.getvalue(), io.BytesIO()
        if self.fd < 0:
            size = b"%-12s" % TO_THE_END.encode() if self.seal else b"%012d" % self.size
            data = b"X-Envelope-Size: %s\r\n%s" % (size, data)
            if not spool.on_disk:
                return spool.store.write(self.final, data)
            while self.fd < 0:
                try:
                    if spool.folder != folder:
                        raise FileNotFoundError
                    self.fd = os.open(self.part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                except FileNotFoundError:
                    os.makedirs(folder, 0o700, exist_ok=True)
                    sync_directory(spool.root)
                    spool.folder = folder
        write_all(self.fd, self.seal.update(data, last) if self.seal else data)

    def commit(self) -> str:
        """Make the message durable, its name included, and return its stem; OSError when it is not kept."""
        begun = self.fd >= 0
        self.flush(last=True)
        if begun and not self.seal:
            os.pwrite(self.fd, b"%012d" % self.size, len("X-Envelope-Size: "))
        if self.fd >= 0:
            os.rename(self.part, self.final)
            try:
                if self.spool.settings.fsync:
                    os.fsync(self.fd)  # once: after one that failed the kernel may call the next a success
            except OSError:
                with suppress(OSError):  # what stays is sent, and by the client once more
                    os.unlink(self.final)
                raise
            os.close(self.fd)
            self.fd = -1
        return self.stem

    def abort(self) -> None:
        """Forget the message; harmless after commit."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with suppress(OSError):  # what stays is set aside at the next start
                os.close(fd)
                os.unlink(self.part)


# === 09 ACCOUNTS =============================================================
#
# Who may send, as whom, and how much. `Accounts` is the store, `authenticate` the one way in;
# `may_send_as`, `Buckets` and `Quotas` hold back who got in.
#
# A login names an account by its name or its api_key, and proves it by the password or the api_key:
# a client with one secret for both fields is served, too. Each login that fails costs one password
# hash, for an unknown user as for a wrong password; one that succeeded is remembered as a keyed
# hash until the account changes.
#
# Sessions, HTTP and the sweeper call it, on their own threads. What was read from the users file is
# one value, swapped whole; Buckets and Quotas have a leaf lock each, not held across disk. A
# changed file is seen at the next login or MAIL, for the price of a stat. What several processes
# change is changed under its directory's lock.

LOGINS_AT_ONCE = 2  # hashes computed at a time: bounds memory and what guessers can burn
TURN_PATIENCE = 20.0
API_KEY = "mp_live_"  # how each begins
USAGE_DAYS = 35
USAGE_COUNTS = 300_000  # a day; only SMTP_AUTH_ANY can bring that many


class Account(NamedTuple):
    """Someone who may send; 0 and empty are no limit."""

    name: str
    password: str = ""  # a hash, or in clear
    api_key: str = ""
    allowed_domains: tuple[str, ...] = ()
    quota_daily: int = 0  # messages a UTC day
    quota_per_minute: int = 0
    relay_host: str = ""
    relay_username: str = ""
    relay_password: str = ""

    def __repr__(self) -> str:  # shows no secret
        return self.name


# A hash says how it was made; the pattern allows what a login may cost, up to 128 MiB.
# New ones take 16 MiB and about 0.3 s, which is what OWASP advises.
NEW_HASH = "scrypt:16384:8:5"
HASH = r"scrypt:(1024|2048|4096|8192|16384|32768|65536|131072):8:([1-9]|1[0-6]):[0-9a-f]{32}:[0-9a-f]{64}"


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # the client's octets need not be UTF-8


def derive(password: str, making: str) -> str:
    """Compute a key by scrypt:n:r:p:salt (RFC 7914), in hex."""
    _, n, r, p, salt = making.split(":")
    return hashlib.scrypt(encoded(password), salt=bytes.fromhex(salt), n=int(n), r=int(r), p=int(p),
                          maxmem=256 * MIB, dklen=32).hex()


def is_hash(stored: str) -> bool:
    return stored.startswith("scrypt:")


def hash_password(password: str) -> str:
    """Hash a password for the users file: scrypt:n:r:p:salt:key."""
    making = f"{NEW_HASH}:{token_hex(16)}"
    return f"{making}:{derive(password, making)}"


def check_password(password: str, stored: str) -> bool:
    making, _, key = stored.rpartition(":")
    return hmac.compare_digest(derive(password, making), key)


def same_secret(known: str, given: str) -> bool:
    """Compare in constant time; an account without a secret has none to match."""
    return hmac.compare_digest(encoded(known), encoded(given)) and known != ""


def new_api_key() -> str:
    return API_KEY + token_hex(20)


# -- the users file --

CHARACTERS = r"[^\x00-\x1f\x7f\ud800-\udfff]{1,1000}"
TEXT, WORD, NUMBER = f"str {CHARACTERS}", "str [!-~]{1,255}", "int [0-9]+"
QUOTED_DOMAIN = r"'(\*?\.)?[^\s@*.,;:/'\\]+(\.[^\s@*.,;:/'\\]+)*'"
ACCOUNT_KEYS = {
    "password": (rf"str ((?!scrypt:){CHARACTERS}|{HASH})",
                 "expected a scrypt hash (`user passwd` makes one), or a password"),
    "api_key": (WORD, "expected printable ASCII, no spaces"),
    "allowed_domains": (rf"list \[({QUOTED_DOMAIN}(, |(?=])))*]",
                        'expected a list of domains such as "example.com" or "*.example.com"'),
    "quota_daily": (NUMBER, "expected a whole number, 0 for no limit"),
    "quota_per_minute": (NUMBER, "expected a whole number, 0 for no limit"),
    "relay_host": (WORD, "expected host or host:port"),
    "relay_username": (TEXT, "expected a text"),
    "relay_password": (TEXT, "expected a text"),
}


def fits(pattern: str, value: object) -> bool:
    """Tell whether a pattern fits a value's type and text; True is no int here."""
    return re.fullmatch(pattern, f"{type(value).__name__} {value}") is not None


def read_users(path: str) -> Fields:
    """Read the users file as JSON. Raises SettingsError or OSError."""
    try:
        users = loads(read_whole(path))
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"expected JSON: {error}") from None
    if not isinstance(users, dict):
        raise SettingsError("expected a JSON object of accounts by name")
    return users


def given_keys(fields: Mapping[str, Any]) -> Fields:
    """Drop what is empty, which is the same as not set."""
    return {key: value for key, value in fields.items() if value not in (None, "", [])}


def parse_users(users: Mapping[str, Any]) -> Logins:
    """Index the accounts by what a client may give as user name; SettingsError lists every mistake, and no value."""
    mistakes: list[str] = []
    logins: Logins = {}
    for name, fields in users.items():
        if len(name) > 255 or not fits(TEXT, name):
            name, wrong = ascii(name[:64]), ["expected a name of 1 to 255 printable characters"]
        elif not isinstance(fields, dict):
            wrong = ["expected a JSON object"]
        else:
            given = given_keys(fields)
            wrong = [f"{key}: {mistake}" for key, value in given.items()
                     for kind, mistake in [ACCOUNT_KEYS.get(key, ("", "no such key"))] if not fits(kind, value)]
            if not {"password", "api_key"} & given.keys():
                wrong.append("expected a password or an api_key")
        if not wrong:
            given["allowed_domains"] = tuple(given.get("allowed_domains", ()))
            account = Account(name, **given)
            others = {logins.setdefault(login, account).name for login in (name, account.api_key or name)}
            wrong = [f"name or api_key is account {other}'s, too" for other in sorted(others - {name})]
        mistakes += [f"account {name}: {mistake}" for mistake in wrong]
    if mistakes:
        raise SettingsError(*mistakes)
    return logins


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """Hold the lock of a directory: a file in it is another one after each change."""
    lock = os.open(directory, os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def change_account(path: str, name: str, change: Mapping[str, Any] | None, sealer: Sealer) -> None:
    """Merge a change into an account of the users file, one caller at a time, making it if need be.

    None removes the account, or one key of it. With SMTP_SPOOL_KEY every relay_password is sealed:
    it cannot be a hash. SettingsError: the file would not load; OSError: it cannot be written."""
    path = os.path.realpath(path)  # replace what a link names, not the link
    with locked(dirname(path)):
        users = read_users(path) if exists(path) else {}
        parse_users(users)
        if change is None:
            users.pop(name, None)
        else:
            users[name] = given_keys({**users.get(name, {}), **change})
        parse_users(users)
        for each, fields in users.items():
            password = fields.get("relay_password", "")
            if password and not password.startswith(SEALED_TEXT):
                fields["relay_password"] = sealer.seal_text(password, f"{each}/relay_password")
        replace_file(path, (dumps(users, indent=2, ensure_ascii=False) + "\n").encode(), sync=True)


class Watched:
    """What was read from files, and is read anew when one of them changes. Thread-safe.

    What cannot be read raises at the start, without a value to begin with; later the last good one stays."""

    def __init__(self, name: str, paths: Sequence[str], read: Callable[[], Any], log: Log, value: Any = None) -> None:
        self.name, self.paths, self.read, self.log, self.trouble = name, [*filter(None, paths)], read, log, ""
        self.seen = ([], value) if value is not None else (self.stamps(), read())

    def stamps(self) -> list[tuple[int, int, int]]:
        """Read what changes when a file does."""
        found = []
        for path in self.paths:
            with suppress(OSError):
                now = os.stat(path)
                found.append((now.st_mtime_ns, now.st_size, now.st_ino))
        return found

    def current(self, anew: bool = False) -> Any:
        """Return what the files say now, or said when they were last good; `anew` rereads them in any case (SIGHUP)."""
        stamps, value = self.stamps(), self.seen[1]  # first: a change while reading is seen the next time
        if anew or stamps != self.seen[0]:
            try:
                value, self.trouble = self.read(), ""
                if self.paths:
                    self.log.info(f"{self.name}_reread", files=", ".join(self.paths))
            except (SettingsError, OSError) as error:
                self.trouble = f"{self.name} {', '.join(self.paths)}: {error}"
                self.log.error(f"{self.name}_broken", reason=self.trouble, now="what was last good stays")
            self.seen = stamps, value
        return value


# -- the store --

Login = tuple[Account, bool]  # who it is, with a name fit for the log, and whether that was proved
Logins = dict[str, Account]  # by what a client may give as user name


def named(logins: Mapping[str, Account], user: str) -> Account:
    """Find who is meant; a stranger has no secret, and a name that is fit for the log."""
    shown = f"{API_KEY}***" if user.startswith(API_KEY) else user[:64]  # a key mistyped, or of yesterday
    return logins.get(user) or Account(shown if shown.isprintable() else ascii(shown))


class Accounts:
    """The accounts of SMTP_AUTH_USER and SMTP_USERS_FILE. Thread-safe."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings, self.log, self._key = settings, log, secrets.token_bytes(32)
        self._proved: dict[bytes, Account] = {}  # at most four for each account: two names, two secrets
        self._turns = threading.BoundedSemaphore(LOGINS_AT_ONCE)
        # whether there may be logins, even if the file names nobody yet
        self.configured = bool(settings.auth_user or settings.users_file or settings.auth_any)
        self.file = Watched("users_file", [settings.users_file], self._read, log)

    def _read(self) -> Logins:
        path, user = self.settings.users_file, self.settings.auth_user
        users = read_users(path) if path else {}
        if user and user in users:
            raise SettingsError(f"account {user}: SMTP_AUTH_USER has the same name")
        mine = {user: {"password": self.settings.auth_password}} if user else {}
        logins, sealer = parse_users({**users, **mine}), Sealer(self.settings.spool_key)
        try:
            logins = {login: a._replace(relay_password=sealer.unseal_text(
                a.relay_password, f"{a.name}/relay_password")) for login, a in logins.items()}
        except SpoolError as e:
            raise SettingsError(str(e)) from None
        clear = [name for name in users if not is_hash(logins[name].password or "scrypt:")]
        if clear:
            self.log.warn("users_file", file=path,
                          warning=f"passwords in clear: {', '.join(clear)} (`user passwd` hashes them)")
        if path and os.stat(path).st_mode & 0o077:
            self.log.warn("users_file", file=path, warning="not only its owner may read it (chmod 600)")
        return logins

    def listed(self) -> list[Account]:
        """List the accounts, those of the file in its order."""
        return [account for login, account in self.file.current().items() if login == account.name]

    def get(self, name: str) -> Account | None:
        """Find an account by its name; None once it is gone from the file."""
        account: Account | None = self.file.current().get(name)
        known = account and account.name == name
        return account if known else Account(name) if self.settings.auth_any else None

    def by_key(self, api_key: str) -> Account | None:
        """Find the account whose api_key this is (HTTP's Bearer)."""
        account: Account | None = self.file.current().get(api_key)
        return account if account and same_secret(account.api_key, api_key) else None

    def offers(self, secure: bool) -> list[str]:
        """Name the mechanisms for EHLO; secure is TLS, or a client on loopback.

        Not CRAM-MD5 while one account cannot use it: curl would choose it, fail, and try nothing else."""
        secure = secure or self.settings.auth_insecure
        cram = self.settings.auth_any or not any(is_hash(a.password) for a in self.file.current().values())
        return [name for name in map(str.upper, self.settings.auth_methods) if (cram if name == "CRAM-MD5" else secure)]

    def login(self, user: str, password: str) -> Login:
        """Check a user name with a password. Refused when no turn comes, or no memory is left."""
        logins: Logins = self.file.current()
        account = named(logins, user)
        ticket = hmac.digest(self._key, encoded(f"{len(user)} {user}{password}"), "sha256")
        if self.settings.auth_any or self._proved.get(ticket) == account:
            return account, True
        if not self._turns.acquire(timeout=TURN_PATIENCE):
            raise Refused(ACCOUNTS_NOT_NOW)
        try:
            hashed = is_hash(account.password)
            good = same_secret(account.api_key, password) or not hashed and same_secret(account.password, password)
            if not good:  # a failure costs one hash, whoever it was
                hashes = [each.password for each in (account, *logins.values()) if is_hash(each.password)]
                good = check_password(password, [*hashes, f"{NEW_HASH}:{token_hex(16)}:"][0]) and hashed
        except (MemoryError, ValueError) as error:  # ValueError: OpenSSL has none left
            self.log.error("login_not_checked", error=error)
            raise Refused(ACCOUNTS_NOT_NOW) from None
        finally:
            self._turns.release()
        if good:
            self._proved[ticket] = account
        return account, good

    def login_cram(self, user: str, challenge: str, digest: str) -> Login:
        """Check a CRAM-MD5 digest (RFC 2195), at the same work for every user."""
        account, good = named(self.file.current(), user), self.settings.auth_any
        for secret in (account.password, account.api_key):
            wanted = hmac.digest(encoded(secret), encoded(challenge), "md5").hex()
            good |= same_secret(wanted, digest) and secret != "" and not is_hash(secret)
        return account, good


# -- SASL (RFC 4954): a mechanism asks, the session carries the lines --

# what each asks first; CRAM-MD5 alone hides the password from who listens
MECHANISMS = {"PLAIN": "", "LOGIN": "Username:", "CRAM-MD5": "<{}@{}>"}


def response(line: bytes) -> str:
    """Decode a client's strict base64 (RFC 4648 section 4); Refused for "*" and all else."""
    try:
        if len(line) % 4:
            raise ValueError("cut short")
        return base64.b64decode(line, validate=True).decode("utf-8", "surrogateescape")
    except ValueError:
        raise Refused(AUTH_CANCELLED if line == b"*" else AUTH_MALFORMED) from None


def authenticate(accounts: Accounts, mechanism: str, initial: bytes | None,
                 ask: Callable[[str], bytes]) -> Login:
    """Run one AUTH exchange (RFC 4954 4) to its end; Refused when no password was tried.

    `initial` is AUTH's second argument, if there was one; `ask` sends a 334 and returns the client's line."""
    def hear(challenge: str) -> str:
        return response(ask(base64.b64encode(challenge.encode()).decode()))

    challenge = MECHANISMS[mechanism].format(token_hex(16), accounts.settings.hostname)
    # "=" is how an initial response of no octets is written
    first = hear(challenge) if initial is None else response(b"" if initial == b"=" else initial)
    if mechanism == "LOGIN":  # in no RFC, but some clients know nothing else
        return accounts.login(first, hear("Password:"))
    if mechanism == "CRAM-MD5":  # RFC 2195: the server speaks first, an initial response is an error
        user, space, digest = first.rpartition(" ")
        if initial is not None or not space:
            raise Refused(AUTH_MALFORMED)
        return accounts.login_cram(user, challenge, digest)
    parts = first.split("\0")  # PLAIN, RFC 4616
    if len(parts) != 3:
        raise Refused(AUTH_MALFORMED)
    authzid, user, password = parts
    return accounts.login(user, password if authzid in ("", user) else "")  # nobody acts for another


# -- who may send as whom --

def may_send_as(account: Account, reverse_path: str) -> bool:
    """Tell whether an account may use a reverse-path; with a domain list never the null one.

    A domain is matched exactly; "*.x" and ".x" match what is below x, not x."""
    found = with_a_labels(reverse_path.rpartition("@")[2])
    for each in account.allowed_domains:
        wanted = with_a_labels(each.lstrip("*."))
        if found.endswith("." + wanted) if each.startswith(("*", ".")) else found == wanted:
            return True
    return not account.allowed_domains


# -- how much --

@lru_cache(maxsize=1024)
def client_key(address: str) -> str:
    """Name whom an address belongs to: one IPv6 host has a whole /64 to come from."""
    return str(ipaddress.ip_network((address, 64), strict=False)) if ":" in address else address


class Buckets:
    """A token bucket for each key, in a table of bounded size. Thread-safe.

    A bucket is the time at which it will be full; without one it is. The one untouched for longest goes first."""

    def __init__(self, size: int = 10_000, clock: Callable[[], float] = monotonic) -> None:
        self._size, self._clock, self._lock = size, clock, Lock()
        # not a dict: the more keys were removed, the longer it looks for its oldest
        self.full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, key: str, per_minute: float, burst: int, n: int = 1) -> bool:
        """Take a token, if there is one; with an n of -1, put one back."""
        each, now = 60.0 / per_minute, self._clock()
        with self._lock:
            taken = max(self.full_at.pop(key, now) - now, 0)
            taken = min(taken, burst * each)  # no emptier than empty, if the clock was set back
            granted = taken <= (burst - n) * each + 1e-6
            self.full_at[key] = now + taken + n * each * granted
            if len(self.full_at) > self._size:
                self.full_at.popitem(last=False)
        return granted


USED, FULL_AT = ("received", "sent", "failed"), "minute is full at"
Counts = Counter[tuple[str, str, str]]  # by day, account and what is counted


class Quotas:
    """Counts by UTC day and account: daily quotas and statistics. Thread-safe.

    All processes add to the file of a day, which says what the last minute took (quota_per_minute), too.
    `save` is called each second, so SIGKILL forgets a second at most. A message counts once, at its 250.
    The account "" is nobody's."""

    def __init__(self, directory: str, log: Log, now: Callable[[], float] = time.time) -> None:
        self._directory, self._log, self._now = directory, log, now  # "": nothing is kept
        self._lock = RLock()
        self._new, self._saved = Counts(), Counts()  # what no file says yet; what today's says
        self._reserved: Counter[str] = Counter()
        self.minutes = Buckets(clock=now)  # quota_per_minute, by account; on wall time, since a file keeps it
        if directory:
            os.makedirs(directory, 0o700, exist_ok=True)
            self.save()
            self.minutes.full_at.update((name, at) for (_, name, what), at in self._saved.items() if what == FULL_AT)

    def reserve(self, name: str, limit: int) -> bool:
        """Set one message aside at MAIL, unless the account's daily limit is spent."""
        with self._lock:
            granted = self.today(name).get("received", 0) + self._reserved[name] < limit
            self._reserved[name] += granted
        return granted

    def settle(self, name: str, accepted: bool) -> None:
        """Charge what was reserved at 250, or give it back at any other end."""
        with self._lock:
            self._reserved[name] -= 1
            if accepted:
                self.count(name, "received")

    def count(self, name: str, what: str) -> None:
        """Add one to today's figure for an account: received, sent or failed."""
        key = self._day(), name, what
        with self._lock:
            if len(self._saved) + len(self._new) >= USAGE_COUNTS and not self._saved[key] + self._new[key]:
                key = key[0], "", what
            self._new[key] += 1

    def today(self, name: str) -> dict[str, int]:
        """Give today's figures of an account."""
        day = self._day()
        with self._lock:
            return {what: n for what in USED if (n := self._saved[day, name, what] + self._new[day, name, what])}

    def days(self, name: str | None = None) -> dict[str, dict[str, int]]:
        """Give the figures of each day kept, oldest first, of one account or of all."""
        found: defaultdict[str, dict[str, int]] = defaultdict(Counter)
        with self._lock:
            counts = +self._new
        for file in os.listdir(self._directory) if self._directory else ():
            counts += self._read(file[:10])
        for (day, who, what), n in sorted(counts.items()):
            if name in (None, who) and what in USED:
                found[day][what] += n
        return found

    def save(self) -> None:
        """Add what is new to the files, and read what other processes added. Raises OSError."""
        if not self._directory:
            return
        today = self._day()
        with locked(self._directory):
            for day in {today, *(day for day, _, _ in [*self._new])}:
                with self._lock:
                    new = Counts({key: n for key, n in self._new.items() if key[0] == day})
                kept = self._read(day) + new
                if new:
                    kept |= Counts({(day, name, FULL_AT): math.ceil(at)
                                    for name, at in [*self.minutes.full_at.items()]})
                    rows = [[*key[1:], n] for key, n in kept.items()]
                    replace_file(f"{self._directory}/{day}.json", dumps(rows).encode())
                with self._lock:
                    self._new -= new
                    self._saved = kept if day == today else self._saved
            for file in os.listdir(self._directory):
                if re.match(DATE, file) and file < self._day(USAGE_DAYS * DAY):
                    os.unlink(f"{self._directory}/{file}")

    def _day(self, ago: float = 0) -> str:
        return iso_time(self._now() - ago)[:10]

    def _read(self, day: str) -> Counts:
        """Read the file of a day; a broken one is logged, counts nothing and goes."""
        path = f"{self._directory}/{day}.json"
        try:
            rows = loads(read_whole(path))
            return Counts({(day, who + "", what + ""): int(n) for who, what, n in rows})
        except FileNotFoundError:
            pass
        except (ValueError, TypeError) as error:
            self._log.error("counts_lost", file=path, error=error)
            os.unlink(path)
        return Counts()


# === 10 TLS ==================================================================
#
# Contexts for both sides, and the pair of SMTP_TLS_SELF_SIGNED. Sessions ask for the context at
# each handshake, on their own thread: its files are Watched. Ciphers are Python's own choice: it
# moves with the release, a list here would not.

SELF_SIGNED_DAYS = 825  # the most that Apple's clients accept
RENEW_BEFORE_DAYS = 30


def server_context(cert: str, key: str) -> ssl.SSLContext:
    """Make the context for sessions: TLS 1.2 or later. Raises SettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # a client renegotiating in a loop makes the server pay; LibreSSL has no such flag
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    # an end without goodbye is an end all the same: content has its own; and after it we can still say 421
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    try:
        for path in (cert, key):  # ssl's own error does not say which one is missing
            open(path, "rb").close()
        context.load_cert_chain(cert, key, password=no_passphrase)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error) or "one of them is not PEM"
        raise SettingsError(f"certificate {cert}, key {key}: {reason}") from None
    return context


def no_passphrase() -> str:
    """Stand in for a prompt on the terminal, which would wait for ever."""
    raise ValueError("the key is encrypted, a server needs it in clear")


def client_context(ca_file: str = "", verify: bool = True) -> ssl.SSLContext:
    """Make the context for next hops: TLS 1.2 or later, verified unless told otherwise. Raises SettingsError.

    ssl.create_default_context is not as strict in each Python, and writes session keys to SSLKEYLOGFILE."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif not ca_file:
        context.load_default_certs()
    else:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ValueError) as error:
            raise SettingsError(f"SMTP_RELAY_CA_FILE {ca_file}: {error}") from None
    return context


def self_signed(directory: str, hostname: str, now: Callable[[], float] = time.time) -> tuple[str, str]:
    """Make, keep and renew a P-256 certificate with its key; SettingsError, OSError.

    Returns the path of each: one file, so that a rename changes both. Its first line says what it was made for."""
    os.makedirs(directory, 0o700, exist_ok=True)
    pem, names, made = os.path.join(directory, "self-signed.pem"), subject_names(hostname), b""
    today, renewal = [f"# {names} renew {iso_time(now() + days * DAY)[:10]}".encode()
                      for days in (0, SELF_SIGNED_DAYS - RENEW_BEFORE_DAYS)]
    with suppress(FileNotFoundError):
        made = read_whole(pem).partition(b"\n")[0]
    if not today < made <= renewal:
        replace_file(pem, renewal + b"\n" + make_pair(directory, names), sync=True)
    return pem, pem


def subject_names(hostname: str) -> str:
    """Write the subjectAltName of the self-signed certificate, openssl's way."""
    # it goes into openssl's configuration, where "$" and a comma mean something
    own = [f"DNS:{hostname.lower()}"] if re.fullmatch(r"[A-Za-z0-9._-]{1,253}", hostname) else []
    return ", ".join(dict.fromkeys([*own, "DNS:localhost", "IP:127.0.0.1", "IP:::1"]))


OPENSSL_CONFIG = """\
[req]
prompt = no
distinguished_name = subject
x509_extensions = extensions
[subject]
CN = smtprelay
[extensions]
subjectAltName = {names}
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
"""


def make_pair(directory: str, names: str) -> bytes:
    """Make a key and its certificate, both PEM.

    In two steps with a configuration file: LibreSSL (macOS) has no -addext, and answers
    `req -newkey ec -pkeyopt` with a broken key and exit status 0."""
    key, config = openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout"), f"{directory}/openssl.cnf"
    write_file(config, OPENSSL_CONFIG.format(names=names).encode())
    cert = openssl("req", "-new", "-x509", "-sha256", "-days", str(SELF_SIGNED_DAYS), "-config", config,
                   "-key", "/dev/stdin", given=key)
    remove_file(config)
    return key + cert


def openssl(*arguments: str, given: bytes = b"") -> bytes:
    """Run the openssl program; returns what it printed. Raises SettingsError."""
    import subprocess

    try:
        return subprocess.run(("openssl", *arguments), input=given, capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        words = (getattr(error, "stderr", b"") or b"").decode("utf-8", "replace").strip()[-300:]
        raise SettingsError(f"SMTP_TLS_SELF_SIGNED needs the openssl program: {error} {words}") from None


# === 11 SCHEDULER ============================================================
#
# Which message is tried next, and when. Each next hop has a Lane. A message waits in the lane of
# each next hop that is owed it, and is in one worker's hands at a time. A lane's queue holds what
# is due, in that order; one heap holds what is for later: messages that were refused for now, and
# lanes whose next hop could not be reached. Such a lane keeps its mail and lets one probe through
# at a time, which costs no message an attempt: each time another message, and at once all that are
# too old by then, to fail. take() goes round the lanes that may have mail.
#
# Workers are few, and a next hop may answer slowly or not at all. So a lane has one worker until
# its next hop has answered, and one for each few messages while that answers at once: it takes the
# next one itself, and nobody need be woken. A lane has a rank: all workers are for quick ones,
# three in four for those not known yet or worse, half for those that are slow or fail. Of the
# workers that wait one looks at the clock, the others are called. One leaf lock; workers and HTTP
# call in.

UNREAD = "(unread)"  # the lane of messages whose record says what is owed: found, or not written
UNSORTED = "(unsorted)"  # and of new ones, whose next hops are not known yet
LOCAL_LANES = (UNREAD, UNSORTED)
AT_ONCE, SLOW = 0.01, 1.0  # seconds
FEW = 8  # messages that a worker can do after the one in hand, where that is done at once
IN_HAND = -1.0  # in place of when it is due: its turn came while a worker had it for another lane
CROWDED_TIME = 60.0
MISSED_MOST = 3  # messages in a row that a next hop left unanswered: then it is its own trouble
QUICK, UNKNOWN, BAD = range(3)  # the rank of a lane
NOWHERE: Mapping[str, float] = {}


def backoff(settings: Settings, attempts: int, rng: random.Random) -> float:
    """Return the seconds to wait after so many attempts: exponential, capped, with jitter."""
    delay = settings.retry_max_delay
    with suppress(OverflowError):
        delay = min(delay, settings.retry_initial_delay * settings.retry_multiplier ** (attempts - 1))
    return delay * rng.uniform(1 - settings.retry_jitter, 1) / settings.time_scale


class Lane:
    """The mail that waits for one next hop, and what is known of that."""

    def __init__(self, name: str) -> None:
        self.name, self.is_local = name, name in LOCAL_LANES
        self.queue: deque[str] = deque()  # what is due
        self.here = {name: 0.0}  # where one waits that is due here alone; never changed
        self.running: dict[str, float] = {}  # stem: since when, oldest first
        self.proven = self.is_local  # has answered
        self.took = 0.0  # seconds, its last task
        self.throttled_until, self.steps, self.reason = 0.0, 0, ""
        self.crowded_until, self.room = 0.0, 0
        self.missed: set[str] = set()  # messages in a row that got no answer

    def pace(self, now: float) -> float:
        """Return the seconds that a message takes: the last one, or what is longest in hand."""
        return max(self.took, now - next(iter(self.running.values()), now))

    def rank(self, now: float) -> int:
        """Return how much it can be trusted to give its workers back soon."""
        if self.steps or self.pace(now) >= SLOW and not self.is_local:
            return BAD
        return QUICK if self.proven else UNKNOWN


class Task(NamedTuple):
    """A message to be tried now, and the lane that it came from."""

    stem: str
    lane: str


class Scheduler:
    """Hands out messages as they fall due. Times are seconds of `clock`; `show` is told how many are owed."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = monotonic,
                 rng: random.Random | None = None, show: Callable[[int], None] = lambda owed: None) -> None:
        self.settings, self.clock, self.show = settings, clock, show
        self.rng = rng or random.Random(settings.seed or None)
        self.lock = RLock()
        self.changed = Condition(self.lock)
        self.lanes: dict[str, Lane] = {}
        self.ready: dict[str, Lane] = {}  # those that may have mail for now, in order
        self.heap: list[tuple[float, str, str]] = []  # due, stem ("": the lane itself), lane
        # stem -> lane -> due; 0.0 once it is in its queue, or IN_HAND. All that is owed is here,
        self.waiting: dict[str, Mapping[str, float]] = {}  # and NOWHERE else what is in hand alone
        self.active: dict[str, str] = {}  # stem -> lane
        self.alarm = math.inf  # when the worker that waits for the clock will look
        self.stopped = False

    # -- what comes in --

    def put(self, stem: str, lane: str, delay: float = 0.0) -> None:
        """Let a message wait for a next hop, for so many seconds from now."""
        with self.lock:
            if delay > 0:
                due = self.clock() + delay
                self.waiting[stem] = {**self.waiting.get(stem, NOWHERE), lane: due}
                heapq.heappush(self.heap, (due, stem, lane))
            else:
                self._enter(stem, lane)
            self._stir(lane)

    def put_all(self, stems: Iterable[str], lane: str) -> None:
        """Queue messages that are not known yet, all at once, before the first of them is taken."""
        with self.lock:
            for stem in stems:
                if stem not in self.waiting:
                    self._enter(stem, lane)
            self._stir(lane)
            self.show(len(self.waiting))

    def done(self, stem: str) -> None:
        """Give a message back; nobody is woken: the worker comes back for more itself."""
        with self.lock:
            name = self.active.pop(stem)
            lane = self.ready[name] = self.lanes[name]
            lane.took = self.clock() - lane.running.pop(stem)
            if self.waiting[stem]:
                for other in [k for k, due in self.waiting[stem].items() if due == IN_HAND]:
                    self._enter(stem, other)
                self._stir()
            else:
                del self.waiting[stem]
            self.show(len(self.waiting))

    def seize(self, stem: str) -> bool:
        """Take a message out of turn; False when it is in other hands. Give it back by done()."""
        with self.lock:
            if stem in self.active:
                return False
            self._enter("", UNREAD)
            self.active[stem], self.waiting[stem] = UNREAD, NOWHERE
            self.lanes[UNREAD].running[stem] = self.clock()
            return True

    def drop(self, stem: str) -> None:
        """Forget where else a message waits that is in hand."""
        with self.lock:
            self.waiting[stem] = NOWHERE

    def _enter(self, stem: str, name: str) -> None:
        """Put a message into the queue of a lane that may have mail now ("": none)."""
        lane = self.lanes.get(name) or self.lanes.setdefault(name, Lane(name))
        self.ready[name] = lane
        places = self.waiting.get(stem, NOWHERE)
        if stem and places.get(name) != 0.0:
            self.waiting[stem] = {**places, name: 0.0} if places and [*places] != [name] else lane.here
            lane.queue.append(stem)

    def _ripen(self, now: float) -> None:
        """Let in what is due by now."""
        while self.heap and self.heap[0][0] <= now:
            due, stem, name = heapq.heappop(self.heap)
            if not stem or self.waiting.get(stem, NOWHERE).get(name) == due:
                self._enter(stem, name)

    # -- what goes out --

    def take(self, wait: bool = True) -> Task | None:
        """Return the next task; None when stopped, or when there is none and we do not wait."""
        with self.lock:
            while not self.stopped:
                now = self.clock()
                self._ripen(now)
                lane, look_at = self._first(now)
                if lane:
                    stem, name = lane.queue.popleft(), lane.name
                    others = dict(self.waiting[stem])
                    del others[name], self.ready[name]
                    self.waiting[stem] = others or NOWHERE
                    if lane.queue:
                        self.ready[name] = lane  # behind the others
                    self.active[stem], lane.running[stem] = name, now
                    if self.ready or self.heap:
                        self._stir()
                    return Task(stem, name)
                if not wait:
                    return None
                if look_at < self.alarm:
                    self.alarm = look_at
                    self.changed.wait(min(look_at - now, threading.TIMEOUT_MAX))
                    self.alarm = math.inf
                else:
                    self.changed.wait()
        return None

    def _first(self, now: float, only: str = "") -> tuple[Lane | None, float]:
        """Return the first lane that may have one more worker, or else when to look again."""
        worst, look_at = BAD, self.heap[0][0] if self.heap else math.inf
        if len(self.lanes) > 1 and self.ready:  # else there is nobody to keep workers for
            busy = [self.lanes[name].rank(now) for name in self.active.values()]
            for rank in (BAD, UNKNOWN):
                if len([r for r in busy if r >= rank]) >= max(1, self.settings.workers * (4 - rank) // 4):
                    worst = rank - 1
        for name in [only] if only in self.ready else [*self.ready]:
            lane = self.ready[name]
            while lane.queue:
                stem = lane.queue[0]
                places = self.waiting.get(stem, NOWHERE)
                is_here = places.get(name) == 0.0  # else it was removed, or put off
                if is_here and stem not in self.active:
                    break
                lane.queue.popleft()
                if is_here:
                    self.waiting[stem] = {**places, name: IN_HAND}
            if not lane.queue or now < lane.throttled_until:
                del self.ready[name]  # the heap has it until its probe is due
                if not lane.queue and not lane.running and now >= max(lane.throttled_until, lane.crowded_until):
                    del self.lanes[name]
                continue
            room = self.settings.relay_connections if lane.proven else 1
            if now < lane.crowded_until:
                room = min(room, lane.room)
            if len(lane.running) < room and (worst == BAD or lane.rank(now) <= worst):
                if len(lane.queue) >= FEW * len(lane.running) or lane.pace(now) >= AT_ONCE:
                    return lane, now
                look_at = min(look_at, next(iter(lane.running.values())) + AT_ONCE)
        return None, look_at

    def _stir(self, only: str = "") -> None:
        """Wake one worker, if it has something to do (in a lane) before any that waits will look."""
        lane, look_at = self._first(self.clock(), only)
        if lane or look_at < self.alarm:
            self.changed.notify()

    # -- what is known of a next hop: told by a worker that has a task of its lane --

    def throttle(self, name: str, reason: str) -> tuple[float, bool]:
        """Hold all mail for a next hop that cannot be reached; return the seconds, and if that is new."""
        with self.lock:
            lane, now = self.lanes[name], self.clock()
            first = not lane.steps or now >= lane.throttled_until  # else it was under way by then
            if first:
                lane.steps += 1
                lane.reason, lane.proven = reason, False
                lane.throttled_until = now + backoff(self.settings, lane.steps, self.rng)
                heapq.heappush(self.heap, (lane.throttled_until, "", name))
                old = time.time() - self.settings.retry_max_age / self.settings.time_scale
                first_young = f"{iso_time(old)[:10]}/{int(old * 1e6):013x}"
                lane.queue = deque(sorted(lane.queue, key=first_young.__lt__))  # the old can but fail
            return lane.throttled_until - now, first

    def release(self, name: str, throttled: bool = True) -> None:
        """Let more workers follow: the next hop answered; and one that was throttled took what it was sent."""
        lane = self.lanes[name]
        if throttled:
            lane.missed.clear()
        if not lane.proven and (throttled or not lane.steps):
            with self.lock:
                lane.proven, lane.steps, lane.reason, lane.throttled_until = True, 0, "", 0.0
                self.ready[name] = lane
                self._stir()

    def miss(self, name: str, stem: str) -> bool:
        """Note that a message got no answer; tell if so many have that it is the next hop's trouble."""
        lane = self.lanes[name]
        lane.missed.add(stem)
        return len(lane.missed) >= MISSED_MOST or lane.steps > 0

    def crowd(self, name: str) -> int:
        """Note that a next hop takes no more connections than it has: return how many, 0 if known."""
        with self.lock:
            lane, now = self.lanes[name], self.clock()
            room = max(1, len(lane.running) - 1)
            if now < lane.crowded_until and lane.room <= room:
                return 0
            lane.crowded_until, lane.room = now + CROWDED_TIME, room
            heapq.heappush(self.heap, (lane.crowded_until, "", name))  # to be forgotten then
            return room

    def flush(self) -> None:
        """Make everything due now, and try throttled next hops at once."""
        with self.lock:
            self._ripen(math.inf)
            self.probe(self.lanes)

    def probe(self, names: Iterable[str]) -> None:
        """Let next hops that are throttled be tried at once."""
        with self.lock:
            for name in [name for name in names if name in self.lanes]:
                self.lanes[name].throttled_until = 0.0
                self._enter("", name)
            self._stir()

    # -- for people --

    def snapshot(self, limit: int) -> tuple[list[str], list[Fields]]:
        """Return the oldest stems, and the state of each next hop, for people to read."""
        with self.lock:
            stems = heapq.nsmallest(limit, self.waiting)
            now, wall = self.clock(), time.time()
            hops = [{"name": lane.name, "state": "throttled" if lane.steps else "ok",
                     "active": len(lane.running), "waiting": len(lane.queue),
                     "reason": lane.reason, "until": iso_time(wall + lane.throttled_until - now) if lane.steps else ""}
                    for lane in self.lanes.values() if not lane.is_local]
        return stems, hops

    def __len__(self) -> int:
        """Return how many messages are owed."""
        return len(self.waiting)

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            self.changed.notify_all()


# === 12 RESOLVER =============================================================
#
# Which hosts take mail for a domain (RFC 5321 5.1), asked of DNS (RFC 1035) by the delivery threads
# in mx mode. A domain gives hosts in the order to try them, a host gives addresses, and whatever
# goes wrong is one ResolveError with the reply to record: 5xx fails the mail, 4xx keeps it.
#
# Each try has a connected UDP socket of its own, hence a random port, and a random id: what does
# not echo both and the question is passed over. A truncated answer is asked for again over TCP.
# Every server is asked in turn, DNS_ROUNDS times, each for the same time. The readers take hostile
# octets: a pointer only ever goes backwards, and the loops have limits. To recurse and to check
# DNSSEC is the servers' work.
#
# The cache is a dict, whose operations are whole: no lock. With no servers given, resolv.conf is
# read for each question, so that a laptop may change networks.

A, CNAME, MX, AAAA = 1, 5, 15, 28
DNS_RCODES = words("NOERROR FORMERR SERVFAIL NXDOMAIN NOTIMP REFUSED YXDOMAIN YXRRSET NXRRSET NOTAUTH NOTZONE "
                   "DSOTYPENI RCODE12 RCODE13 RCODE14 RCODE15")
NXDOMAIN = 3
DNS_HEADER_SIZE = 12
DNS_ROUNDS = 3
MAX_DNS_RECORDS = 512  # in one answer
MAX_NAME_STEPS = 256  # labels and pointers in one name
MAX_ALIASES = 8
MAX_HOSTS = 16  # of a domain, and addresses of a host: to own more buys no more of our time
MAX_CACHED_ANSWERS = 1000
MAX_TTL, NEGATIVE_TTL, FAILURE_TTL = 3600.0, 60.0, 10.0  # seconds in the cache, at most
HOST_NAME = r"(?!.{254})([a-z0-9_-]{1,63}\.)*(?![0-9]+$)[a-z0-9_-]{1,63}"  # 192.0.2.1 is none

NULL_MX = read_reply("556 5.1.10 takes no mail (null MX)")
NO_DOMAIN = read_reply("550 5.1.2 no such domain in DNS")
BAD_DOMAIN = read_reply("550 5.1.2 neither a domain name nor an address literal")
BAD_IDN = read_reply("550 5.1.2 no certain ASCII form of this name; write its xn-- form")
NO_ADDRESS = read_reply("550 5.4.4 no mail host with an address")
LOOPS_BACK = read_reply("554 5.4.6 mail would loop back to this host")
DNS_FAILED = read_reply("451 4.4.3 DNS lookup failed")


class ResolveError(Exception):
    """A name that leads to no address; `reply` says why."""

    def __init__(self, reply: Reply, name: str) -> None:
        shown = name[:255] if name.isprintable() else ascii(name[:255])
        self.reply = reply(f"{shown}: {reply.text}")
        self.permanent = reply.code >= 500
        super().__init__(self.reply.text)


class DnsAnswer(NamedTuple):
    """What DNS says to a question."""

    records: list[tuple[int, str]]  # an MX's preference, else 0; an address or a name
    ttl: float
    alias: str = ""  # a name that is to be asked for instead
    failure: Reply | None = None


def ascii_domain(domain: str) -> str:
    """Return a domain as DNS is asked for it: lower case, A-labels, no last dot."""
    name = with_a_labels(domain.removesuffix("."))
    if not re.fullmatch(HOST_NAME, name):
        raise ResolveError(BAD_DOMAIN if domain.isascii() else BAD_IDN, domain)
    return name


def literal_address(literal: str) -> str:
    """Return the address in `[192.0.2.1]` or `[IPv6:2001:db8::1]` (RFC 5321 4.1.3)."""
    # a scope (%) is not for a stranger to name
    found = re.fullmatch(r"\[(?i:(IPv6:))?([^]%]*)\]", literal)
    with suppress(ValueError):
        if found:
            return str((ipaddress.IPv6Address if found[1] else ipaddress.IPv4Address)(found[2]))
    raise ResolveError(BAD_DOMAIN, literal)


def system_dns_servers(path: str = "/etc/resolv.conf") -> list[Address]:
    """Return resolv.conf's name servers, this host's where it names none."""
    servers: list[Address] = []
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        for name in re.findall(r"(?m)^[ \t]*nameserver[ \t]+(\S+)", file.read()):
            with suppress(ValueError):
                servers += dns_servers(name)
    return servers[:3] or [Address("127.0.0.1", 53)]


def parse_answer(message: bytes, name: str, asked_for: int) -> DnsAnswer:
    """Read an answer (RFC 1035 4.1); ValueError, IndexError or struct.error when it is none."""
    records, alias = [], ""
    longest, at = MAX_TTL, DNS_HEADER_SIZE + len(name) + 6
    flags, count = struct.unpack_from("!2xH2xH", message)
    rcode = flags & 0x000F
    if rcode not in (0, NXDOMAIN):
        raise ValueError(DNS_RCODES[rcode])
    if not flags & 0x0480:  # AA or RA: a mere referral looks like "no such record", which is final
        raise ValueError("server does not recurse")
    if count > MAX_DNS_RECORDS:
        raise ValueError("too many records")
    for _ in range(count):
        owner, at = read_name(message, at)
        kind, internet, ttl, length = struct.unpack_from("!HHIH", message, at)
        start, at = at + 10, at + 10 + length
        if owner != name or kind not in (asked_for, CNAME) or internet != 1:
            continue
        longest, data = min(longest, ttl), message[:at]
        if kind in (A, AAAA):
            family = socket.AF_INET if kind == A else socket.AF_INET6
            records.append((0, socket.inet_ntop(family, data[start:])))
            continue
        value, end = read_name(data, start + 2 * (kind == MX))
        if end != at:
            raise ValueError("record of the wrong length")
        if kind == MX:
            records.append((int.from_bytes(data[start:start + 2], "big"), value))
        else:
            alias = value
    if at > len(message):
        raise ValueError("truncated answer")
    records.sort(key=lambda record: record[0])
    return DnsAnswer(records[:MAX_HOSTS], longest if records else min(longest, NEGATIVE_TTL), alias,
                     NO_DOMAIN if rcode == NXDOMAIN else None)


def read_name(message: bytes, at: int) -> tuple[str, int]:
    """Read a name, lower-cased, with the offset after it (RFC 1035 4.1.4)."""
    labels: list[str] = []
    start, end, size = at, 0, 1
    for _ in range(MAX_NAME_STEPS):
        length = message[at]
        at += 1
        if length == 0:
            return ".".join(labels).lower(), end or at
        if length >= 0xC0:
            end = end or at + 1
            at = (length & 0x3F) << 8 | message[at]
            if at >= start:
                raise ValueError("compression pointer not backwards")
            start = at
            continue
        size += length + 1
        if length > 63 or size > 255:
            raise ValueError("over-long name")
        # A dot inside a label must not make two of it; no host has a backslash.
        labels.append(message[at:at + length].decode("ascii", "replace").replace(".", "\\"))
        at += length  # beyond the message after a cut label: message[at] then raises
    raise ValueError("name of too many parts")


class Resolver:
    """Answers where mail for a domain goes (RFC 5321 5.1, 7505), or raises ResolveError. Thread-safe.

    `own_name` is ours among mail hosts; `timeout` is in seconds for one question."""

    def __init__(self, servers: Sequence[Address] = (), own_name: str = "", timeout: float = 6.0,
                 clock: Callable[[], float] = monotonic) -> None:
        self._servers, self._timeout, self._clock = servers, timeout, clock
        self._own_name = own_name.lower()
        self._cache: dict[tuple[str, int], tuple[float, DnsAnswer]] = {}

    def mx_hosts(self, domain: str) -> list[tuple[int, str]]:
        """Return preference and name of a domain's mail hosts before our own, best first, equal ones shuffled."""
        if domain.startswith("["):
            literal_address(domain)
            return [(0, domain)]
        name = ascii_domain(domain)
        records = self._records(name, MX) or [(0, name)]
        if not any(host for _, host in records):
            raise ResolveError(NULL_MX, name)
        best = {host: preference for preference, host in reversed(records) if re.fullmatch(HOST_NAME, host)}
        if not best:
            raise ResolveError(NO_ADDRESS, name)
        own = best.get(self._own_name, math.inf)
        hosts = [(preference, host) for host, preference in best.items() if preference < own]
        if not hosts:
            raise ResolveError(LOOPS_BACK, self._own_name)
        return sorted(hosts, key=lambda host: (host[0], random.random()))

    def targets(self, hosts: Sequence[tuple[int, str]]) -> Iterator[tuple[str, str]]:
        """Yield each host with each address, looked up when its turn comes: IPv6 first, the families in turn.

        ResolveError after the last host if none had an address: transient if any lookup was."""
        failure, found = ResolveError(NO_ADDRESS, hosts[0][1]), False
        for _, host in hosts:
            families = [[literal_address(host)]] if host.startswith("[") else []
            for kind in () if families else (AAAA, A):
                try:
                    families.append([value for _, value in self._records(host, kind)])
                except ResolveError as e:
                    failure = failure if e.permanent else e
            # Where IPv6 does not work, that costs one connection attempt and not all of them.
            pairs = itertools.zip_longest(*families)
            for address in [address for pair in pairs for address in pair if address][:MAX_HOSTS]:
                found = True
                yield host, address
        if not found:
            raise failure

    def _records(self, name: str, kind: int) -> list[tuple[int, str]]:
        """Return the records of one kind, following aliases from answer to answer."""
        for _ in range(MAX_ALIASES):
            expires, answer = self._cache.get((name, kind), (0.0, None))
            if not answer or self._clock() >= expires:
                answer = self._ask(name, kind)
                if len(self._cache) >= MAX_CACHED_ANSWERS:
                    self._cache.clear()
                self._cache[name, kind] = self._clock() + answer.ttl, answer
            if answer.alias:
                name = ascii_domain(answer.alias)
                continue
            if answer.failure:
                raise ResolveError(answer.failure, name)
            return answer.records
        raise ResolveError(DNS_FAILED("too many aliases in DNS"), name)

    def _ask(self, name: str, kind: int) -> DnsAnswer:
        """Return what the first server says that answers."""
        tries = [*(self._servers or system_dns_servers())] * DNS_ROUNDS
        labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
        for server in tries:
            until = self._clock() + self._timeout / len(tries)
            query = secrets.token_bytes(2) + b"\1\0\0\1" + bytes(6) + labels + struct.pack("!xHH", kind, 1)
            try:
                message = self._exchange(server, socket.SOCK_DGRAM, query, until)
                if message[2] & 0x02:
                    message = self._exchange(server, socket.SOCK_STREAM, query, until)
                return parse_answer(message, name, kind)
            except (OSError, ValueError, IndexError, struct.error) as error:
                text = f"{DNS_FAILED.text} ({server[0]}: {error})"
        return DnsAnswer([], FAILURE_TTL, failure=DNS_FAILED(text))

    def _exchange(self, server: Address, kind: int, query: bytes, until: float) -> bytes:
        """Return the server's answer to a query; OSError when there is none in time."""
        *kinds, _, address = socket.getaddrinfo(*server[:2], type=kind, flags=socket.AI_NUMERICHOST)[0]
        # On TCP a message stands behind its length (RFC 7766 8).
        stream, octets = kind == socket.SOCK_STREAM, b""
        with socket.socket(*kinds) as sock:
            sock.settimeout(max(0.001, until - self._clock()))
            sock.connect(address)
            sock.sendall(struct.pack("!H", len(query)) + query if stream else query)
            while (left := until - self._clock()) > 0:
                sock.settimeout(left)
                block = sock.recv(65535)
                octets = octets + block if stream else block
                if stream and block and len(octets) < 2 + int.from_bytes(octets[:2], "big"):
                    continue
                message = octets[2:] if stream else octets
                # the response to this query: same id, same single question, whose name may be in any case
                if (message[:2] + message[4:6] + message[DNS_HEADER_SIZE:len(query)].lower()
                        == query[:2] + query[4:6] + query[DNS_HEADER_SIZE:] and message[2] & 0xF8 == 0x80):
                    return message
                if stream:
                    break
        raise OSError("no answer")


# === 13 DELIVERY =============================================================
#
# One attempt to pass a message on: who goes where (routes), places to try in turn, a connection to
# each (NextHop, kept for the next message), one transaction for each portion of recipients. MAIL,
# RCPT and DATA go out in one segment where PIPELINING is offered. A reply is judged by its first
# digit (RFC 5321 4.2), has a deadline of its own, which counts from the last octet sent (4.5.3.2),
# and an end.
#
# MEANINGS is the one table from (stage, answer) to whether it is for good, and for this message
# alone. Whom one host does not take for now is offered to the next in the same attempt (5.1); whom
# a host has taken, or may have, to no other. An attempt returns an Outcome for each recipient it
# settled, or that of the host, when the next hop itself is what failed: this costs the message no
# attempt.
#
# A lane is a next hop by name: the smart hosts, an account's own, or a domain, whose hosts DNS
# gives. A host that took long to fail is tried last for a while.

REUSE_MESSAGES, REUSE_IDLE = 100, 5.0
CONTENT_PATIENCE = 2  # RFC 5321 4.5.3.2.6 asks for more time after the final dot than elsewhere
CONTENT_TIME = 3600.0  # for sending the content of one message, however slowly it is taken
TARGETS_MOST = 5  # tried in one attempt
AVOID_TIME = 60.0
GROUPING_TIME = 5.0  # for looking up who shares hosts with the domain in hand
SMARTHOST = "smarthost"
REPLY_LIMIT = 64 * KIB
TRANSCRIPT_KEPT = 200  # lines of a message's
REPLY_KEPT = 1000  # characters of a reply that go into a record
PARTS_MOST = 10000  # of a message that is mended
REWRITE_MOST = 512 * KIB  # octets of a header that may be
LINE_MOST = 998  # octets before CRLF (RFC 5322 2.1.1)
ENCODINGS = (b"7bit", b"8bit", b"binary", b"quoted-printable")  # and base64 (RFC 2045 6)

LATER, NEVER = Status.RETRYING, Status.FAILED


@dataclass(eq=False)
class Trouble(Exception):
    """The next hop did not do what was asked: at which stage, what it said (code 0: no answer)."""

    stage: str
    code: int
    reply: str


# A stage, the code of the answer there (0: none) and its text; what it means, and whether for every
# message. The first that fits counts. What a host has against us is no verdict on a recipient;
# <helo> is our name.
MEANINGS = (
    (r"\w+ 2", Status.FORWARDED, False),
    (r"(connect|greeting|hello|starttls|login) |\w+ 53[0458]", LATER, True),
    (r"(mail|rcpt) 5.*\b(helo|ehlo)\b", LATER, True),
    (r"offers", NEVER, True),  # it lacks what this message needs: another may have it
    (r"rcpt 552", LATER, False),  # an old 452 (RFC 5321 4.5.3.1.10)
    (r"\w+ 5", NEVER, False),
    (r"", LATER, False),
)
STALE = r"rset|mail [0-4]|(rcpt|data) 421"  # what a connection says that is of no more use


class Target(NamedTuple):
    """A place to connect to, and on what terms."""

    host: str
    port: int
    tls: str  # starttls, tls, opportunistic, none
    username: str = ""
    password: str = ""
    ip: str = ""  # known in mx mode only

    def __repr__(self) -> str:  # without the password
        return host_port(self.host, self.port) + (f" [{self.ip}]" if self.ip else "")


# -- what leaves --

class Outgoing:
    """Content as it leaves: octets of ours, then a file from where it stands; `size` is of both."""

    def __init__(self, file: BinaryIO, head: bytes = b"", start: int = 0) -> None:
        self.file, self.head, self.start = file, head, start
        self.size = len(head) + file.seek(0, os.SEEK_END) - start
        self.long = self.eight = False  # as far as survey() has looked

    def blocks(self) -> Iterable[bytes]:
        self.file.seek(self.start)
        return chain([self.head], iter(partial(self.file.read, 64 * KIB), b""))

    def survey(self) -> Outgoing:
        """Find out whether there are lines that are too long, and 8-bit octets."""
        text, at = b"", 0
        for block in self.blocks():
            text, at = text[at:] + block, 0  # what no line end was found in goes on
            self.eight = self.eight or not block.isascii()
            while len(text) - at > LINE_MOST + 1:  # with its CR
                end = text.rfind(b"\n", at, at + LINE_MOST + 2) + 1
                self.long = self.long or not end
                at = end or len(text)
        return self

    def mended(self, seven: bool) -> Outgoing:
        """Return it with short lines and, where asked for, in seven bits, as far as can be."""
        return Outgoing(io.BytesIO(mend(b"".join(self.blocks()), seven, itertools.count()))).survey()

    @cached_property
    def seven(self) -> Outgoing:
        """What is sent to a next hop without 8BITMIME (RFC 6152 3)."""
        return self.mended(seven=True)


Parcels = Sequence[tuple["list[Recipient]", Outgoing]]  # who is to have what


def mend(part: bytes, seven: bool, walked: Iterator[int], depth: int = 0) -> bytes:
    """Return a message, or a part of one, with short lines and, where asked for, in seven bits.

    What is signed or not to be read as MIME stays as it is (RFC 2045, 6152 3), as do parts beyond
    measure; `walked` counts them."""
    head, _, body = (b"\r\n" + part).partition(b"\r\n\r\n")  # each field has its CRLF before it
    unfolded = re.sub(rb"\r\n[ \t]+", b" ", head)
    fields = dict(re.findall(rb"\r\n([^\s:]+)[ \t]*:[ \t]*([^\r\n]*)", unfolded.lower()))
    kind = fields.get(b"content-type", b"text/plain")
    encoding = before = fields.get(b"content-transfer-encoding", b"7bit").strip()
    if depth > 20 or next(walked) > PARTS_MOST or b"dkim-signature" in fields or kind.startswith(
            (b"multipart/signed", b"multipart/encrypted", b"multipart/digest")):
        return part
    if (body.isascii() or not seven) and max(map(len, body.split(b"\r\n"))) <= LINE_MOST:
        pass  # but for its header, perhaps
    elif kind.startswith((b"multipart/", b"message/rfc822")):
        named = re.search(
            rb"""(?im)^content-type[ \t]*:.*?\bboundary=("[^"]+"|[^\s;"]+)""", unfolded)
        if kind.startswith(b"message/"):
            body = mend(body, seven, walked, depth + 1)
        elif named:
            mark = b"--" + re.escape(named[1].strip(b'"'))
            inner = rb"(?s)((?:^|\r\n)%s[ \t]*)(?=\r\n)(.*?)(?=\r\n%s(?:--)?[ \t]*(?:\r\n|\Z)|\Z)"
            body = re.sub(inner % (mark, mark), lambda found: found[1] + b"\r\n" + mend(
                found[2][2:], seven, walked, depth + 1), body)
        encoding = b"7bit" if encoding == b"8bit" else encoding
    elif encoding == b"base64":
        body = b"\r\n".join(re.findall(rb".{1,76}", b"".join(body.split()))) + b"\r\n"
    elif encoding in ENCODINGS and not kind.startswith(b"message/"):
        plain = binascii.a2b_qp(body) if encoding == b"quoted-printable" else body
        body, encoding = base64.encodebytes(plain).replace(b"\n", b"\r\n"), b"base64"
        quoted = re.sub(rb"\r?\n", b"\r\n", binascii.b2a_qp(plain, istext=True))
        if kind.startswith(b"text/") and len(quoted) <= 2 * len(plain) + KIB:  # else hardly ASCII
            body, encoding = quoted, b"quoted-printable"
    if encoding != before and (encoding != b"7bit" or body.isascii()):
        field = rb"(?i)\r\ncontent-transfer-encoding[ \t]*:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*"
        head = re.sub(field, b"", head) + b"\r\nContent-Transfer-Encoding: " + encoding
        head += b"\r\nMIME-Version: 1.0" * (b"mime-version" not in fields)
    folded = rb".{1,%d}\Z|.{1,%d}(?= )|.+" % (LINE_MOST, LINE_MOST - 1)  # RFC 5322 2.2.3
    head = re.sub(rb"[^\r\n]{%d,}" % (LINE_MOST + 1),
                  lambda line: b"\r\n".join(re.findall(folded, line[0])), head)
    return b"\r\n".join([head, b"", body])[2:]


def with_author(fields: bytes, names: Container[bytes], address: str) -> bytes:
    """Put an address into a header's From, and who was there into Reply-To, if there is none."""
    field = rb"(?im)^from[ \t]*:((?:.*\n[ \t])*.*\n?)"
    found = re.search(field, fields)
    old = found[1].strip() if found else b""
    authors = read_addresses(b" ".join(old.split()).decode("utf-8", "replace"))
    phrase = email.utils.formataddr((authors[0][0] if len(authors) == 1 else "", ""))[:-2]
    new = f"From: {phrase}<{address}>\r\n".encode()
    fields = re.sub(field, lambda _: new, fields, count=1) if found else fields + new
    if old and b"reply-to" not in names and address.lower().encode() not in old.lower():
        fields += b"Reply-To: %s\r\n" % old
    return fields


# -- a connection --

class NextHop:
    """One connection to a next hop; Trouble says why it was not opened or a message not passed."""

    def __init__(self, settings: Settings, target: Target, log: Log,
                 context: Callable[[], ssl.SSLContext] = client_context) -> None:
        self.settings, self.target, self.log, self.context = settings, target, log, context
        self.name = settings.hostname  # that it knows us by
        self.features: dict[str, str] = {}
        self.limits: dict[str, int] = {}  # SIZE and RCPTMAX, as far as it has one
        self.transcript: list[str] = []
        self.sent, self.since = 0, monotonic()  # when it was last taken, or given back
        self.clean, self.spent = True, False  # between two messages; of no more use
        self.ip = self.tls = ""

    def open(self) -> None:
        """Connect, say hello, start TLS and log in, as the target asks."""
        target = self.target
        try:
            place = target.ip or target.host, target.port
            places = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)  # an even share for each
            sock = socket.create_connection(place, self.settings.relay_timeout / len(places))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.ip = sock.getpeername()[0]  # fails when the peer has gone already
            ours = str(sock.getsockname()[0]).partition("%")[0]
        except (OSError, ValueError) as e:  # UnicodeError: a name that IDNA does not take
            raise Trouble("connect", 0, f"cannot connect: {e}") from None
        if is_nameless(self.settings):
            self.name = f"[IPv6:{ours}]" if ":" in ours else f"[{ours}]"
        self.wire = Wire(sock, 0.0)  # each command and reply has a deadline of its own
        if target.tls == "tls":
            self.secure("connect")
        self.ask("greeting", below=300)
        self.hello()
        if target.tls == "starttls" or target.tls == "opportunistic" and (
                target.ip or not is_loopback(target.host)):  # else nobody can listen
            self.start_tls()
        if target.username:
            self.login()

    def secure(self, stage: str) -> None:
        """Put TLS under the connection."""
        name = self.target.ip if self.target.host.startswith("[") else self.target.host
        try:
            self.wire.sock.settimeout(self.settings.relay_timeout)
            sock = self.context().wrap_socket(self.wire.sock, server_hostname=name)
            self.tls, self.wire = sock.version() or "", Wire(sock, 0.0)
        except (OSError, ValueError, SettingsError) as e:
            raise Trouble(stage, 0, f"TLS failed: {e}") from None

    def hello(self) -> None:
        """EHLO, or HELO to a next hop that knows no better (RFC 5321 3.2)."""
        for verb in ("EHLO", "HELO"):
            code, text = self.ask("hello", f"{verb} {self.name}".encode())
            if code < 500:
                break
        if code >= 300:
            raise Trouble("hello", code, text)
        if self.target.ip and text.lower().split()[:1] == [self.settings.hostname.lower()]:
            reply = f"{LOOPS_BACK.enhanced} {self.target}: {LOOPS_BACK.text}"
            raise Trouble("loop", LOOPS_BACK.code, reply)
        self.features = {}
        offers = re.findall(r"(?m)^([^ =\n]+)[ =]*(.*)", text.partition("\n")[2])  # AUTH=, too
        for name, argument in offers:
            known = self.features.get(name.lower(), "")
            self.features[name.lower()] = f"{known} {argument}".strip()
        limit = r"(?m)(?:^| )(SIZE|RCPTMAX)[ =]+([0-9]{1,18})(?![0-9])"  # RFC 1870, 9422
        self.limits = {name: int(most) for name, most in re.findall(limit, text.upper())}

    def start_tls(self) -> None:
        """STARTTLS (RFC 3207); nothing said before the handshake counts after it."""
        code, text = 0, "STARTTLS is not offered, and SMTP_RELAY_TLS=starttls requires it"
        if "starttls" in self.features:
            code, text = self.ask("starttls", b"STARTTLS")
        if code // 100 != 2:
            if self.target.tls == "starttls" or self.spent:
                raise Trouble("starttls", code, text)
            return  # nothing was started: in clear, as if it had not been offered
        if self.wire.buffer:
            raise Trouble("starttls", 0, "something was sent between STARTTLS and the handshake")
        self.secure("starttls")
        self.hello()

    def login(self) -> None:
        """AUTH with the mechanism that is set, or those offered until one is taken (RFC 4954).

        The smart host's password is reread from its file: a token does not last."""
        s, user, password = self.settings, self.target.username, self.target.password
        offered = self.features.get("auth", "").upper().split()
        wanted = {"auto": "CRAM-MD5 PLAIN LOGIN"}.get(s.relay_auth, s.relay_auth.upper())
        reply = f"no common AUTH mechanism: offered {' '.join(offered) or 'none'}"
        refused = Trouble("login", 0, reply)
        try:
            if s.relay_password_file and password == s.relay_password:
                named = {"SMTP_RELAY_PASSWORD_FILE": s.relay_password_file}
                password = read_secret(named, "SMTP_RELAY_PASSWORD")
            password = usable_password(self.target.host, password)
            plain, token = f"\0{user}\0{password}", f"user={user}\1auth=Bearer {password}\1\1"
            responses = {  # the initial one, and those to each 334
                "PLAIN": [plain, plain], "XOAUTH2": [token, ""],
                "LOGIN": ["", user, password], "CRAM-MD5": ["", user]}
            for mechanism in [m for m in wanted.split() if m in offered]:
                opening, text = f"AUTH {mechanism} ".encode(), ""
                for response in responses[mechanism]:
                    if mechanism == "CRAM-MD5" and response:
                        challenge = base64.b64decode(text)
                        response += " " + hmac.new(password.encode(), challenge, "md5").hexdigest()
                    secret = base64.b64encode(response.encode())
                    code, text = self.ask("login", (opening + secret).rstrip())
                    opening = b""
                    if code // 100 != 3:
                        break
                if code < 300:
                    return
                refused = Trouble("login", code, text)
                if code not in (504, 534, 535):
                    break
        except ValueError as e:  # no password to be read, a challenge that is not base64
            raise Trouble("login", 0, str(e)) from None
        except Trouble as trouble:  # when it hung up after a refusal, that is the reason
            raise (refused if refused.code else trouble) from None
        raise refused

    def ask(self, stage: str, *lines: bytes, below: int = 600,
            seconds: float = 0.0) -> tuple[int, str]:
        """Send command lines, if any, in one segment; return the code and text of the next reply.

        Trouble when there is none that parses, or its code is not below one. Whatever went into a
        line, it cannot become two."""
        wire, data, raw, text, line = self.wire, b"\r\n".join((*lines, b"")), b"", b"", b"   -"
        if len(data) - len(data.translate(None, b"\r\n\0")) != 2 * len(lines):
            raise Trouble(stage, 501, "5.5.2 there is a line end or a NUL in a command of ours")
        wire.deadline = monotonic() + (seconds or self.settings.relay_reply_timeout)
        try:
            if lines:
                if wire.buffer:  # it would be taken for the answer to this
                    raise OSError("it said what nobody asked for")
                secret = rb"^(AUTH \S+ )?\S+(?=\r)"
                self.note("C: ", re.sub(secret, rb"\1***", data) if stage == "login" else data)
                wire.write(data)
            while line[3:4] == b"-":
                line = wire.line(REPLY_LIMIT)
                raw, text = raw + line, text + line[4:].strip() + b"\n"
                if len(raw) > REPLY_LIMIT:
                    raise OSError("reply does not end")
            self.note("S: ", raw)
            if not line[:3].isdigit() or not b"200" <= line[:3] <= b"599":
                raise OSError(f"not a reply: {line[:100]!r}")
        except (PeerGone, Refused, OSError) as e:
            self.spent = True
            raise Trouble(stage, 0, f"connection lost: {e}") from None
        code, said = int(line[:3]), text[:-1].decode("utf-8", "replace")
        self.spent = self.spent or code == 421
        if code >= below:
            raise Trouble(stage, code, said)
        return code, said

    def note(self, who: str, octets: bytes) -> None:
        """Keep lines for the transcript."""
        lines = octets[:4 * KIB].decode("utf-8", "replace").replace("\r", "").rstrip("\n")
        shown = (who + lines.replace("\n", "\n" + who)).split("\n")
        self.transcript += shown
        for line in shown if self.settings.debug else ():
            self.log.debug("wire", host=self.target, line=line)

    def judge(self, stage: str, code: int, reply: str) -> Outcome:
        """Return what an answer means, and how it was come by."""
        case = f"{stage} {code} {reply}".replace(f"<{self.name}>", "<helo>")
        status, of_host = next((status, of_host) for pattern, status, of_host in MEANINGS
                               if re.match("(?is)" + pattern, case))
        verified = bool(self.tls) and self.settings.relay_tls_verify
        return Outcome(status, of_host, code, reply[:REPLY_KEPT], self.target.host, self.ip,
                       self.tls, verified, "dsn" in self.features, stage == "content" and not code)

    def spelled(self, address: str) -> str | None:
        """Return an address as this next hop takes it, with A-labels at need, or None."""
        if address.isascii() and address.isprintable():
            return address
        if "smtputf8" in self.features and not re.search("[\0-\x1f\x7f]", address):
            return address
        local, _, domain = address.rpartition("@")
        with suppress(ResolveError):
            if local.isascii() and local.isprintable():
                return f"{local}@{ascii_domain(domain)}"
        return None

    def commands(self, message: Message, recipients: Sequence[Recipient], content: Outgoing,
                 outcomes: dict[str, Outcome]) -> tuple[list[str], list[bytes]]:
        """Return whom a transaction can be for, and its lines; the others get an outcome."""
        offered, limit = self.features, self.limits.get("SIZE", 0)
        if 0 < limit < content.size:
            reply = f"5.3.4 message has {content.size} octets, the next hop takes {limit}"
            raise Trouble("offers", 552, reply)
        sender, utf8, head = self.spelled(message.reverse_path), "SMTPUTF8" in message.flags, b""
        if utf8 and "smtputf8" not in offered:
            head = b"".join(islice(content.blocks(), 2)).partition(b"\r\n\r\n")[0]
        there, lines = [], [f"MAIL FROM:<{sender}>"]
        for r in recipients:
            address = self.spelled(r.address)
            if sender is None or address is None or not head.isascii():
                reply = "5.6.7 it needs SMTPUTF8, which the next hop does not offer"
                outcomes[r.address] = self.judge("offers", 553, reply)
                continue
            there.append(r.address)
            lines.append(f"RCPT TO:<{address}>")
            utf8 = utf8 or not address.isascii()
            if "dsn" in offered:  # RFC 3461 5.2.1
                orcpt = encode_unitext(r.orcpt, utf8="smtputf8" in offered)
                fits = len(orcpt.encode()) <= ORCPT_MAX  # it grew in ASCII: none, not a 501
                lines[-1] += asked(NOTIFY=r.notify, ORCPT=orcpt if fits else "")
        parameters = {
            "size": f" SIZE={content.size}",
            "8bitmime": " BODY=8BITMIME" if content.eight or "8BITMIME" in message.flags else "",
            "smtputf8": " SMTPUTF8" if utf8 or not lines[0].isascii() else "",
            "dsn": asked(RET=message.ret, ENVID=message.envid),
        }
        lines[0] += "".join([text for name, text in parameters.items() if name in offered])
        return there, [line.encode("utf-8", "surrogateescape") for line in (*lines, "DATA")]

    def transaction(self, message: Message, recipients: Sequence[Recipient], content: Outgoing,
                    outcomes: dict[str, Outcome]) -> None:
        """Carry out one transaction, entering outcomes; Trouble is that of who has none."""
        eight = "8bitmime" in self.features
        content = content.seven if content.eight and not eight else content
        if content.long or content.eight and not eight:
            self.log.warn("sent_as_it_came", id=message.id, host=self.target, eight=content.eight,
                          long=content.long)  # lines of more than 998 octets
        there, lines = self.commands(message, recipients, content, outcomes)
        if not there:
            return
        self.sent += 1
        if self.sent > 1:
            poll = select.poll()
            poll.register(self.wire.sock, select.POLLIN)
            if poll.poll(0):  # an answer to nothing would be taken for that to a command
                raise Trouble("mail", 0, "it said what nobody asked for, or hung up")
        if not self.clean:
            self.ask("rset", b"RSET", below=300)
        self.clean = False
        self.spent = pipelined = "pipelining" in self.features  # if refused: answers are under way
        now = len(lines) if pipelined else 1
        self.ask("mail", *lines[:now], below=300)
        self.spent = False
        for address in there:
            code, text = self.ask("rcpt", *lines[now:][:1])
            now += not pipelined
            if code == 421:
                raise Trouble("rcpt", code, text)
            if code >= 300:
                outcomes[address] = self.judge("rcpt", code, text)
        taken = set(there) - outcomes.keys()
        if not taken and not pipelined:
            return
        code, text = self.ask("data", *lines[now:])
        if code < 300 or self.wire.buffer[:1] in (b"2", b"3"):
            self.spent = True
            outcomes.clear()  # whose was which?
            raise Trouble("data", 0, f"answers out of step: {code} {text}")
        if not taken:  # an end of content now might send an empty message: hang up
            self.spent = self.spent or code < 400
            return
        if code >= 400:
            raise Trouble("data", code, text)
        self.send_content(content)
        patience = CONTENT_PATIENCE * self.settings.relay_reply_timeout
        code, text = self.ask("content", seconds=patience)
        if code >= 300:
            self.spent = self.spent or code < 400  # whatever that means: it may have been taken
            raise Trouble("content", code if code >= 400 else 0, text)
        self.clean = True
        outcomes.update(dict.fromkeys(taken, self.judge("content", code, text)))

    def send_content(self, content: Outgoing) -> None:
        """Send content in blocks with its dots doubled, and the final dot (RFC 5321 4.5.2)."""
        latest, last, stage = monotonic() + CONTENT_TIME, b"\r\n", "data"
        try:
            if self.wire.buffer:
                raise OSError("an answer before the content")
            for block in content.blocks():
                patience = monotonic() + self.settings.relay_reply_timeout
                self.wire.deadline = min(patience, latest)
                self.wire.write((last[-1:] + block).replace(b"\n.", b"\n..")[1:])
                last = (last + block)[-2:]
            stage = "content"
            self.wire.write(b".\r\n" if last == b"\r\n" else b"\r\n.\r\n")
            self.wire.flush()
        except (PeerGone, OSError, SpoolError) as e:  # no final dot: half a message would end in it
            self.spent, trouble = True, Trouble(stage, 0, f"cannot send the content: {e}")
            self.wire.out = b""
            with suppress(Trouble):  # it may have said why before it hung up
                code, text = self.ask("content", seconds=1.0)
                trouble = Trouble("content", code, text) if code >= 400 else trouble
            raise trouble from None

    def close(self) -> None:
        """Say QUIT, unless it is of no more use, and go; what it answers changes nothing."""
        with suppress(OSError, AttributeError), self.wire.sock as sock:
            if not self.spent:
                sock.settimeout(1.0)
                sock.sendall(b"QUIT\r\n")


# -- where to --

def is_own_address(ip: str) -> bool:
    """Tell whether an address is one of this machine's."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with suppress(OSError), socket.create_server((ip, 0), family=family):
        return True
    return False


def is_nameless(settings: Settings) -> bool:
    """Tell whether this machine has no full name: EHLO says its address then (RFC 5321 4.1.4)."""
    return "." not in settings.hostname and settings.hostname == machine_name()


def read_aliases(text: str) -> dict[str, list[str]]:
    """Read a file like /etc/aliases: names and addresses, without files and programs."""
    aliases, bare = {}, re.sub(r"(?m)(?:^|\s)#.*$", "", text)
    for name, value in re.findall(r"(?m)^([^\s:][^:\n]*):((?:.*\n+[ \t])*.*)", bare):
        targets = [target.strip().strip('"') for target in re.findall(r'(?:"[^"]*"|[^,"])+', value)]
        aliases[name.strip().strip('"').lower()] = [t for t in targets if t and t[0] not in "/|:\\"]
    return aliases


class Attempt(NamedTuple):
    """What an attempt came to: outcomes by address, the host's trouble if any, what was said.

    `trouble` is for what happened up to the login; later, 421 or no answer is an outcome of the
    message. A crowded host refused one more connection while others of ours were open: the message
    is tried again, uncharged."""

    outcomes: dict[str, Outcome]
    trouble: Outcome | None
    transcript: list[str]
    crowded: bool = False


class Delivery:
    """Makes attempts, keeping connections. Workers share it; its lock is a leaf."""

    def __init__(self, settings: Settings, log: Log, accounts: Accounts,
                 own: Sequence[int] = ()) -> None:  # the ports where this relay listens
        self.settings, self.log, self.accounts, self.own = settings, log, accounts, own
        self.resolver = Resolver(settings.dns_server, settings.hostname)
        self.lock = Lock()
        self.idle: list[NextHop] = []
        self.live: set[NextHop] = set()  # those that are open
        self.avoided: dict[Target, float] = {}
        self.aliases = Watched(
            "aliases", [settings.aliases],
            lambda: read_aliases(read_whole(settings.aliases).decode("utf-8", "replace")), log, {})
        self.local = {"localhost", settings.hostname.lower(), machine_name().lower()}
        login = settings.relay_username, settings.relay_password
        self.usual = [Target(*place, *login) for place in settings.smart_hosts]
        self.rewrites = bool(settings.relay_redirect_to or settings.local_to or settings.aliases)
        self.stopped = False

    @cached_property
    def context(self) -> ssl.SSLContext:
        return client_context(self.settings.relay_ca_file, self.settings.relay_tls_verify)

    # -- where to --

    def lane(self) -> str:
        """Return the lane of a message of which no more than the name is known."""
        several = self.settings.delivery == "mx" or self.accounts.configured
        return UNSORTED if several else SMARTHOST

    def smart(self, message: Message) -> tuple[str, Iterable[Target]] | None:
        """Return lane and hosts of a message that is not sent by MX: its account's, or ours."""
        account = self.accounts.get(message.user) if message.user else None
        if account and account.relay_host:
            host, port = split_port(account.relay_host, "587")
            tls = "tls" if port == 465 else "opportunistic" if is_loopback(host) else "starttls"
            target = Target(host, port, tls, account.relay_username, account.relay_password)
            return f"{account.relay_host} ({account.name})", [target]
        return None if self.settings.delivery == "mx" else (SMARTHOST, self.usual)

    def routes(self, message: Message) -> dict[str, list[Recipient]]:
        """Return the recipients that are still owed a message, by lane."""
        pending, smart = message.pending(), self.smart(message)
        if smart:
            return {smart[0]: pending}
        found: dict[str, list[Recipient]] = {}
        for r in pending:
            for domain in dict.fromkeys(map(domain_of, self.finals_owed(r))):
                found.setdefault(domain, []).append(r)
        return found

    def finals(self, address: str) -> list[str]:
        """Return the addresses to which mail for an address goes by the settings."""
        s = self.settings
        if s.relay_redirect_to or not self.rewrites:
            return [s.relay_redirect_to or address]
        aliases, names, found, seen = self.aliases.current(), [(address, "")], [], set()
        for name, origin in names:  # grows meanwhile, by each alias once
            local, _, domain = name.rpartition("@") if "@" in name else (name, "", "localhost")
            known = local.strip('"').lower()
            targets = aliases.get(known)
            if domain.lower().rstrip(".") not in self.local:
                found.append(name)
            elif targets and known not in seen:
                seen.add(known)
                names += [(target, known) for target in targets]
            elif not targets or s.local_to and known == origin:  # names itself: for here, too
                found.append(s.local_to or f"{local}@{s.hostname}")
        return list(dict.fromkeys(found)) or [s.local_to or address]

    def finals_owed(self, recipient: Recipient) -> list[str]:
        """Return those that have not got it yet; one at least, should the aliases have changed."""
        finals, passed = self.finals(recipient.address), recipient.passed
        left = [a for a in finals if a not in passed] if passed else finals
        return [a for a in left if "!" + a not in passed] or left or finals[:1]

    def is_allowed(self, address: str) -> bool:
        return all(map(self.settings.relay_allowed_recipients.search, self.finals(address)))

    def mx_targets(self, domain: str) -> Iterator[Target]:
        """Yield each address of each host of a domain, up to our own (RFC 5321 5.1)."""
        port, found = self.settings.mx_port, False
        for host, ip in self.resolver.targets(self.resolver.mx_hosts(domain)):
            if port in self.own and is_own_address(ip):
                if not found:
                    raise ResolveError(LOOPS_BACK, host)
                return
            found = True
            yield Target(host, port, self.settings.relay_tls, ip=ip)

    # -- an attempt --

    def attempt(self, message: Message, lane: str, file: BinaryIO,
                reached: Callable[[], None] = lambda: None) -> Attempt:
        """Try to pass a message on to whom it is owed in a lane; call `reached` once connected."""
        s, smart, lanes = self.settings, self.smart(message), [lane]
        latest = monotonic() + GROUPING_TIME
        for other in () if smart else self.routes(message):  # same hosts: sent together
            with suppress(ResolveError):
                if other != lane and monotonic() < latest and (
                        {*self.resolver.mx_hosts(other)} == {*self.resolver.mx_hosts(lane)}):
                    lanes.append(other)
        parcels: dict[tuple[str, ...], list[Recipient]] = {}
        stands: dict[str, list[Recipient]] = {}  # for whom each address does
        plan: list[tuple[Recipient, list[str], bool]] = []  # are others of his in other lanes?
        for r in message.pending():
            finals = self.finals_owed(r)
            here = [a for a in finals if smart or domain_of(a) in lanes]
            plan += [(r, here, len(here) < len(finals))] if here else []
            for address in here:
                stands.setdefault(address, []).append(r)
        for address, people in stands.items():
            same = [r for r in people if r.address == address] or [Recipient(address)]
            changed = tuple([r.address for r in people if r.address != address])
            parcels.setdefault(changed, []).append(same[0])
        return_path = message.reverse_path and (s.relay_return_path or s.relay_from)
        sent = dataclasses.replace(message, reverse_path=return_path) if return_path else message
        contents = [(people, self.content(message, file, changed))
                    for changed, people in parcels.items()]
        try:
            targets = smart[1] if smart else self.mx_targets(lane)
            attempt = self.try_each(targets, sent, contents, reached)
        except ResolveError as e:
            said = f"{e.reply.enhanced} {e.reply.text}"
            if not e.permanent:
                return Attempt({}, Outcome(LATER, True, e.reply.code, said), [])
            outcome = Outcome(NEVER, False, e.reply.code, said)
            attempt = Attempt(dict.fromkeys(stands, outcome), None, [])
        if attempt.outcomes and self.rewrites:
            return attempt._replace(outcomes=self.settled(message, plan, attempt.outcomes))
        return attempt

    def settled(self, message: Message, plan: Iterable[tuple[Recipient, list[str], bool]],
                outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
        """Return the outcomes of recipients from those of the addresses that stand for them.

        One with several has it when all were tried and one has it. In `passed` are those that need
        it no more, with "!" before them if they have refused it."""
        found = {}
        for r, here, elsewhere in plan:
            mine = [outcomes[address] for address in here]
            for address, o in zip(here, mine):
                if o.status is NEVER and address != r.address:
                    self.log.warn("alias_refused", id=message.id, alias=address, reason=o)
                if o.status is not LATER:
                    r.passed.append("!" + address if o.status is NEVER else address)
            said = min(mine, key=lambda o: (LATER, Status.FORWARDED, NEVER).index(o.status))
            has = [address for address in r.passed if address[0] != "!"]
            if has and said.status is NEVER:
                text = f"{has[0]} has it, refused by {said}"
                said = said._replace(status=Status.FORWARDED, code=250, reply=text)
            if said.status is LATER or not elsewhere:
                found[r.address] = said
        return found

    def content(self, message: Message, file: BinaryIO, originals: Sequence[str]) -> Outgoing:
        """Return a message as it leaves: X-Original-To, new author, what it lacks (RFC 6409 8).

        What is added stands below our Received. A message with a DKIM signature is not repaired:
        it may cover what is not there, too."""
        s, begin = self.settings, file.tell()
        original = "".join([f"X-Original-To: {address}\r\n" for address in originals])
        head, start = original.encode("utf-8", "surrogateescape"), begin
        first = file.read(REWRITE_MOST) if s.relay_repair or s.relay_from else b""
        top = max(file.seek(0, os.SEEK_END) - start - message.size, 0)  # below our Received
        field = rb"[!-9;-~]+[ \t]*:[^\n]*(?:\n|\Z)(?:[ \t][^\n]*(?:\n|\Z))*"
        fields = re.findall(rb"\A(?:%s)*" % field, first[top:])[0]
        end = top + len(fields)
        if first and (len(first) < REWRITE_MOST or b"\n" in first[end:]):  # not beyond measure
            names = set(re.findall(rb"(?m)^([^\s:]+)[ \t]*:", fields.lower()))
            signed, added = b"dkim-signature" in names, b""
            if s.relay_repair and not signed:
                if b"message-id" not in names:
                    added = f"Message-ID: <{message.id}@{s.hostname}>\r\n".encode()
                if b"date" not in names:
                    added += f"Date: {mail_date(id_micros(message.id) // 1000000)}\r\n".encode()
            if s.relay_from:
                fields = with_author(fields, names, s.relay_from)
            if not (signed or first.startswith(b"\r\n", end) or top < end == len(first)):
                fields += b"\r\n"  # what follows is no field: it is the body
            head, start = head + first[:top] + added + fields, start + end
        out = Outgoing(file, head, start)
        if s.relay_repair and out.survey().long:
            out = out.mended(seven=False)
        file.seek(begin)  # others may get it in another form
        return out

    def try_each(self, targets: Iterable[Target], message: Message, parcels: Parcels,
                 reached: Callable[[], None]) -> Attempt:
        """Try target after target for whom none has taken or refused for good (RFC 5321 5.1)."""
        outcomes: dict[str, Outcome] = {}
        lines: list[str] = []
        trouble, passed, spoke = Outcome(LATER, True, 0, "no smart host"), "", False
        if self.avoided:  # what lately took long to fail comes last
            now = monotonic()
            targets = sorted(targets, key=lambda target: self.avoided.get(target, 0.0) > now)
        for target in islice(targets, TARGETS_MOST):
            if passed:
                self.log.warn("next_hop_passed_over", id=message.id, host=passed, reason=trouble)
            lines.append(f"-- {iso_time(time.time())} {target}")
            found = self.attempt_at(target, message, parcels, reached, lines)
            first, passed = next(iter(found.values())), ""
            if first.of_host and all(o.of_host and o.status is LATER for o in found.values()):
                trouble, passed = first, str(target)
                with self.lock:
                    others = target in [hop.target for hop in self.live]
                if trouble.code // 100 == 4 and others and not spoke:
                    return Attempt({}, None, lines, crowded=True)
                lines.append(f"!! {trouble}")
            spoke = spoke or not passed
            for address, o in found.items():
                old = outcomes.get(address)  # what one said to the message itself is worth more
                if not old or not o.of_host or old.of_host and o.status is LATER:
                    outcomes[address] = o
            # Another is asked for whom this one has surely not taken it, and may not.
            left = {address for address, o in outcomes.items()
                    if not o.lost and (o.status is LATER or o.of_host)}
            if not left:
                break
            parcels = [(owed, content) for people, content in parcels
                       if (owed := [r for r in people if r.address in left])]
        return Attempt(outcomes, None, lines) if spoke else Attempt({}, trouble, lines)

    def attempt_at(self, target: Target, message: Message, parcels: Parcels,
                   reached: Callable[[], None], transcript: list[str]) -> dict[str, Outcome]:
        """Try one target, in portions where it has a limit; return an outcome for each recipient."""
        outcomes: dict[str, Outcome] = {}
        work, stale = list(parcels), False
        while work:
            people, content = work.pop(0)
            hop = self.take(target, fresh=stale)
            found: dict[str, Outcome] = {}
            stale = False
            try:
                if hop not in self.live:
                    hop.open()
                    with self.lock:
                        self.live.add(hop)
                reached()
                most = hop.limits.get("RCPTMAX") or recipient_limit(target.host) or len(people)
                if most < len(people):
                    work.insert(0, (people[most:], content))
                    people = people[:most]
                hop.transaction(message, people, content, found)
                if hop.clean and len(people) > 1:  # the others next (RFC 5321 4.5.3.1.10)
                    more = [r for r in people if found[r.address].code in (452, 552)]
                    work = [(more, content), *work] if more else work
            except Trouble as e:
                stale = hop.sent > 1 and re.match(STALE, f"{e.stage} {e.code}") is not None
                if stale:  # it has had its fill, or was left: replaced without blame
                    hop.spent = True
                    work.insert(0, (people, content))
                    continue
                judged = hop.judge(*e.args)
                if judged.lost:
                    self.log.warn("possible_duplicate", id=message.id, host=target,
                                  reason="no answer to the content")
                for r in people:
                    found.setdefault(r.address, judged)
                if hop not in self.live or hop.spent and judged.status is LATER:  # so do the others
                    rest = [r.address for others, _ in work for r in others]
                    found.update(dict.fromkeys(rest, judged._replace(lost=False)))
                    work = []
            except BaseException:  # content that cannot be read: it must not end in a final dot
                hop.spent = True
                raise
            finally:
                transcript += hop.transcript
                self.give(hop)
            outcomes.update(found)
        return outcomes

    def take(self, target: Target, fresh: bool) -> NextHop:
        """Return a kept connection, or a new one that is not open yet."""
        now = monotonic()
        with self.lock:
            for hop in () if fresh else self.idle:
                if hop.target == target and hop.since > now - REUSE_IDLE:
                    self.idle.remove(hop)
                    hop.transcript, hop.since = [], now
                    return hop
            if target in self.avoided:  # its time is up: one caller tries it
                patience = 2 * self.settings.relay_reply_timeout
                self.avoided[target] = now + max(AVOID_TIME, patience)
        return NextHop(self.settings, target, self.log, lambda: self.context)

    def give(self, hop: NextHop) -> None:
        """Keep a connection for the next message, unless it has done its share."""
        now = monotonic()
        took, hop.since = now - hop.since, now
        with self.lock:
            failed = hop.spent or hop not in self.live
            done = failed or self.stopped or hop.sent >= REUSE_MESSAGES
            if failed and took > SLOW:  # for as long as it took: at most half the time of a worker
                self.avoided = {t: at for t, at in self.avoided.items() if at > now - AVOID_TIME}
                self.avoided[hop.target] = now + max(AVOID_TIME, took)
            if not done:
                self.avoided.pop(hop.target, None)
                self.idle.append(hop)
        if done:
            self.part(hop)

    def part(self, hop: NextHop) -> None:
        """Close a connection."""
        with self.lock:
            self.live.discard(hop)
        hop.close()

    def drop_idle(self, older_than: float = REUSE_IDLE) -> None:
        """Close connections that have been kept for longer than so many seconds."""
        latest = monotonic() - older_than
        with self.lock:
            out = [hop for hop in self.idle if hop.since <= latest]
            self.idle = [hop for hop in self.idle if hop not in out]
        for hop in out:
            self.part(hop)

    def stop(self) -> None:
        self.stopped = True
        self.drop_idle(0.0)


def domain_of(address: str) -> str:
    return address.rpartition("@")[2].lower().rstrip(".")


# === 14 REPORTS ==============================================================
#
# What failed for good is told to its sender, once for each recipient, though others may still be
# owed the message: a multipart/report (RFC 3464, 6522) of words for people, fields for programs,
# and the original's headers. Called by the delivery thread that has the message; pure.
#
# Addresses, replies and headers come from strangers, so header_lines writes every field: nothing
# unprintable, at most 900 octets, folded at spaces alone. email.message is no help here: it decodes
# the encoded words in a reply, folds a long address into one, and has let line ends through
# (CVE-2024-6923).
#
# A report is as international as its way back: only if the reverse-path needs SMTPUTF8 does the
# report, as message/global-delivery-status (RFC 6533). Otherwise all its fields are ASCII.

REPORTED = "report sent"  # the detail in a record's history
REPORTS_PUT_OFF = "the report is put off: as many as may went out within the hour"
REPORT_RECIPIENTS_MAX = 500
REPORT_HEAD_MAX = 64 * KIB
REPORT_FULL_MAX = MIB  # RET=FULL beyond it gets the headers alone
REPORT_FRAME = 2 * KIB  # at most, what is around the parts of a report
FIELD_MAX, REPLY_MAX = 900, 600  # octets; a line has 998 at most (RFC 5322 2.1.1)
ENHANCED = r"(?:[0-9]{3}[ -])?([45]\.[0-9]{1,3}\.[0-9]{1,3})(?![0-9])"

# What to do, by RFC 3463 status, else subject.detail, else subject, else reply code.
WHAT_TO_DO = {
    "5.4.1": "Mostly that means: no such address. Check it for a typing mistake.",  # Microsoft 365
    "1": "Their server does not know this address. Check it for a typing mistake.",
    "1.2": "There is no such mail domain. Check what stands after the @.",
    "1.8": "They do not accept your own address. Check the address you send from.",
    "1.10": "That domain takes no mail at all. Check what stands after the @.",
    "2": "The mailbox cannot take mail now. Reach its owner another way.",
    "2.2": "The mailbox is full. Send it again once its owner has made room.",
    "3.4": "The message is too big for them. Send a smaller one, or a link to the files.",
    "4": "Their server was not to be reached. Check what stands after the @, or send it later.",
    "4.6": "The message went round in a circle. Tell whoever runs your mail server.",
    "6": "Something in it was refused. Send it in a plainer form, or without attachments.",
    "6.7": "Their server cannot take addresses with such letters. Use another address.",
    "7": "Their rules refuse it: often as suspected spam, or because your mail server may not "
    "send for your domain. Show the reply above to whoever runs your mail server.",
    "550": "Mostly that means: no such address. Check it for a typing mistake.",
    "552": "The mailbox is full, or the message is too big.",
    "": "No more is known than that. Show it to whoever runs your mail server.",
}


def wants_report(message: Message) -> list[Recipient]:
    """Return the recipients that the sender is to hear of, and has not.

    Those are the ones that failed, and those that asked for NOTIFY=SUCCESS of a next hop
    that knows no DSN (RFC 3461 5.2.2). RFC 5321 6.1: the null sender is told nothing."""
    told = []
    for r in message.recipients if message.reverse_path else ():
        passed = "reported by them" if r.dsn else "SUCCESS"
        event = {Status.FAILED: "FAILURE", Status.FORWARDED: passed}.get(r.status)
        if not r.reported and event in (r.notify or "FAILURE").split(","):
            told.append(r)
    return told


def build_report(message: Message, original: bytes, hostname: str, now: datetime.datetime,
                 others: Sequence[Message] = (), most: int = sys.maxsize) -> bytes:
    """Build the report to message.reverse_path, to be sent from the null sender.

    original is the message as it came, as far as REPORT_FULL_MAX and an octet; now is aware. It goes
    back whole if RET=FULL asked for it and it is no longer, else its headers, or nothing of it where
    the report would be longer than `most`. The recipients of `others`, from the same sender, are told
    of with it. RFC 3464, 6522, 6533."""
    told = [r for m in (message, *others) for r in wants_report(m)]
    utf8 = not message.reverse_path.isascii()
    kind = "global-delivery-status" if utf8 else "delivery-status"
    earlier = sum(r.reported for r in message.recipients)
    lost = any(r.status is Status.FAILED for r in told)
    words, fields = told_of(message, told, hostname, others, utf8)
    bodies = [("text/plain; charset=utf-8", words), (f"message/{kind}", fields)]
    room = most - REPORT_FRAME - len(words) - len(fields)
    bodies += [part for part in returned_parts(message, original) if len(part[1]) <= room][:1]
    parts = [f"Content-Type: {media}\r\nContent-Transfer-Encoding: "
             f"{'7bit' if body.isascii() else '8bit'}\r\n\r\n".encode() + body
             for media, body in bodies]
    # No part can hold its own hash, so no original can end the report early.
    boundary = hashlib.sha256(b"".join(parts)).hexdigest()[:32]
    head = header_lines({
        "From": f"Mail Delivery System <MAILER-DAEMON@{hostname}>",
        "To": f"<{message.reverse_path}>",
        "Subject": "Your message could not be delivered" if lost else "Your message has left",
        "Date": email.utils.format_datetime(now),
        "Message-ID": f"<report{earlier or ''}.{message.id}@{hostname}>",
        "Auto-Submitted": "auto-replied",
        "MIME-Version": "1.0",
        "Content-Type": f'multipart/report; report-type={kind}; boundary="{boundary}"',
    }, utf8)
    between = f"\r\n--{boundary}".encode()
    return (between + b"\r\n").join([head, *parts]) + between + b"--\r\n"


def told_of(message: Message, told: Sequence[Recipient], hostname: str, others: Sequence[Message],
            utf8: bool) -> tuple[bytes, bytes]:
    """Tell who did not get the message, why, what to do: in words for people, fields for programs."""
    arrived = mail_date(int(unix_time(message.received_at)))
    words = [f"This is the mail server {hostname}.", "",
             f"It is about your message of {arrived} ({message.size} octets)."]
    if others:
        ids = ", ".join(m.id for m in others)
        also = f"It is also about {len(others)} more of your messages, by their queue ids: {ids}."
        words += [*wrapped(also), ""]
    lost: list[str] = []
    passed: list[str] = []
    groups = [{
        "Reporting-MTA": f"dns; {hostname}",
        "Original-Envelope-Id": decode_xtext(message.envid),
        "Arrival-Date": arrived,
    }]
    for r in told[:REPORT_RECIPIENTS_MAX]:
        code, kind, found = str(r.code), r.code // 100, re.match(ENHANCED, r.reply)
        spoke, failed = r.host and r.code, r.status is Status.FAILED
        bare = not r.code or r.reply.startswith(code)
        said = one_line((r.reply if bare else f"{code} {r.reply}") or "no answer", REPLY_MAX)
        # RFC 3463: the reply's enhanced code, or one that says no more than its code
        status = found[1] if found and kind in (0, int(found[1][0])) else (
            {0: "4.4.0", 2: "2.0.0", 4: "4.0.0"}.get(kind, "5.0.0"))
        keys = (status, status[2:], status[2:].partition(".")[0], code, "")
        advice = next(WHAT_TO_DO[key] for key in keys if key in WHAT_TO_DO)
        if failed:
            lost += ["", r.address,
                     f"    The mail server {r.host} said:" if spoke else "    What went wrong:",
                     *wrapped(said, 8), *wrapped(f"What to do: {advice}", 4)]
        else:
            passed.append(f"{r.address} ({r.host})")
        groups.append({  # RFC 3464 2.3
            "Original-Recipient": original_recipient(r.orcpt, utf8),
            "Final-Recipient": final_recipient(r.address, utf8),
            "Action": "failed" if failed else "relayed",
            "Status": status,
            "Remote-MTA": r.host and f"dns; {r.host}",
            "Diagnostic-Code": f"{'smtp' if spoke else 'x-smtprelay'}; {said}",
        })
    if lost:
        words += ["It did not reach these recipients, and will not be tried again:", *lost]
    if passed:
        words += ["", "For these it was passed on to a mail server that reports no delivery:", "",
                  *passed]
    if len(told) > REPORT_RECIPIENTS_MAX:
        words += ["", f"and {len(told) - REPORT_RECIPIENTS_MAX} more."]
    words += ["", f"The original follows, where it fits. Its queue id here was {message.id}."]
    return ("".join(f"{one_line(line)}\r\n" for line in words).encode(),
            b"\r\n".join(header_lines(group, utf8) for group in groups))


def returned_parts(message: Message, original: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield type and body of what gives the original back: whole if asked for; its headers."""
    head = original.partition(b"\r\n\r\n")[0] + b"\r\n"
    text = head[:REPORT_HEAD_MAX].rpartition(b"\r\n")[0].decode("utf-8", "replace")
    no_8bit = rb"(?m)\0|\r(?!\n)|(?<!\r)\n|^[^\r\n]{999}"  # RFC 2045 2.8
    fits = len(original) <= REPORT_FULL_MAX and not re.search(no_8bit, original)
    if message.ret == "FULL" and fits:
        plain = text.isascii() or "\ufffd" in text
        yield "message/rfc822" if plain else "message/global", original
    kind = "text/rfc822-headers" if text.isascii() else "message/global-headers"
    yield kind, "".join(f"{one_line(line)}\r\n" for line in text.split("\r\n")).encode()


def header_lines(fields: Mapping[str, str], utf8: bool) -> bytes:
    """Write header fields of whatever values, but for empty ones: the guard against injection."""
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    if not utf8:
        lines = [line.encode("ascii", "backslashreplace").decode() for line in lines]
    return "".join("\r\n ".join(wrapped(one_line(line))) + "\r\n" for line in lines).encode()


def one_line(text: str, octets: int = FIELD_MAX) -> str:
    """Make text one line of at most so many octets, a space for each unprintable character."""
    printable = "".join(c if c.isprintable() else " " for c in text[:octets])
    return printable.encode()[:octets].decode("utf-8", "ignore")


def wrapped(text: str, indent: int = 0) -> list[str]:
    import textwrap

    before = " " * indent
    return textwrap.wrap(text, 76 + indent, initial_indent=before, subsequent_indent=before,
                         break_long_words=False, break_on_hyphens=False)


# === 15 FAULTS ===============================================================
#
# Failures on order (SMTP_FAULTS), for people who test how their application mails. A session asks
# at each stage; an answer takes the place of the true one. Rules stand one a line, or between
# semicolons:
#
#     STAGE [to=GLOB] [from=GLOB] [delay TIME] [CODE TEXT | drop | drop kept]
#           [first N] [after N] [share PERCENT]
#
#     rcpt to=*@slow.test 450 greylisted first 2    each recipient's first two tries
#     end from=ci@* drop kept after 3               from the fourth on, the 250 is lost
#     connect delay 5s; mail 451 4.3.0 busy
#
# STAGE is connect, auth, mail, rcpt, data or end (after the final dot; drop kept: the message is
# taken, but its answer is not sent). Rules are tried in order: a delay adds up and goes on to the
# next, anything else ends the search. first and after count the times a rule was reached, for each
# recipient if it has to=; a share of them is spread evenly. The same questions always get the same
# answers. The library's simulated smart host plays a script of steps, rules that are each for once.
# Rules and counts are in a file that all processes share, so that rules may change over HTTP;
# Mailpit's chaos triggers become rules with a share. The lock is a leaf.

FAULT_STAGES = {"connect": "", "auth": "", "mail": "from", "rcpt": "from to", "data": "from to",
                "end": "from to"}
FAULT_RULE = (
    rf"(?: (?P<stage>{'|'.join(FAULT_STAGES)}))?(?P<globs>(?: (?:to|from)=\S+)*)(?: delay (?P<delay>\S+))?"
    r"(?: (?P<answer>accept|drop|drop kept|(?P<code>(?P<kind>[45])[0-9]{2})"
    r"(?: (?P<status>(?P=kind)\.[0-9]{1,3}\.[0-9]{1,3}))?(?: (?P<text>[ -~]{1,400}?))?))?"
    r"(?P<when>(?: (?:first|after|share) \S+)*)")
FAULT_COUNTS_MOST = 10_000  # recipients remembered; then the oldest is forgotten
HANG_UP = Reply(0, "", "drop")  # not sent, as LOST
# Mailpit's triggers, each with its stage and usual code
CHAOS = {"Sender": ("mail", 451), "Recipient": ("rcpt", 451), "Authentication": ("auth", 535)}
CHAOS_RULE = r"(?m)^%s ([0-9]+) Chaos share ([0-9]+)$"


class Fault(NamedTuple):
    """A rule: after a delay its reply or none, a share of the times after < n <= after + first."""

    rule: str
    stage: str
    globs: dict[str, str]
    delay: float = 0.0
    reply: Reply | None = None
    first: int = 10**9
    after: int = 0
    share: int = 100


def parse_fault(rule: str, step: bool = False) -> Fault:
    """Read a rule, or a step of a script, which may let pass and needs no stage for the end."""
    match = re.fullmatch(FAULT_RULE, " " + " ".join(rule.split()))
    found = defaultdict(str, match.groupdict("") if match else ())
    stage, answer, delay = found["stage"] or "end" * step, found["answer"], found["delay"]
    globs = dict(glob.lower().split("=", 1) for glob in found["globs"].split())
    if (not stage or not globs.keys() <= {*FAULT_STAGES[stage].split()} or not (answer or delay)
            or answer == "accept" and not step
            or answer == "drop kept" and stage != "end"):
        raise ValueError(f"a stage ({', '.join(FAULT_STAGES)}), to= and from= (not at the first two), delay TIME, "
                         "a code from 400 to 599 and printable ASCII or drop, then first, after, share")
    reply = {"drop": HANG_UP, "drop kept": LOST}.get(answer)
    if found["code"]:
        status = found["status"] or f"{found['kind']}.0.0"
        reply = Reply(int(found["code"]), status, found["text"] or "Scripted failure")
    when = found["when"].split()
    return Fault(rule, stage, globs, duration(delay) if delay else 0.0, reply,
                 **dict(zip(when[::2], map(count, when[1::2]))))


@lru_cache(maxsize=8)
def read_faults(text: str) -> list[Fault]:
    """Read rules; ValueError names each wrong one, and what was expected."""
    rules, wrong = [], []
    for number, rule in enumerate(filter(None, map(str.strip, re.split(r"[;\n]", text))), 1):
        try:
            rules.append(parse_fault(rule))
        except ValueError as e:
            wrong.append(f"rule {number} ({rule[:80]!r}): expected {e}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return rules


def to_chaos(rules: str) -> Fields:
    """Return Mailpit's chaos triggers, read from the rules that with_chaos made of them."""
    return {name: {"ErrorCode": int(code), "Probability": int(share)}
            for name, (stage, usual) in CHAOS.items()
            for code, share in re.findall(CHAOS_RULE % stage, rules) or [(usual, 0)]}


def with_chaos(rules: str, triggers: Mapping[str, Any]) -> str:
    """Return the rules with other chaos triggers; ValueError names one that is wrong."""
    for name, (stage, usual) in CHAOS.items():
        trigger = {k.lower(): v for k, v in triggers[name].items()}
        code, share = trigger.get("errorcode", usual), trigger.get("probability", 0)
        if {type(code), type(share)} != {int} or not (400 <= code <= 599 and 0 <= share <= 100):
            raise ValueError(f"{name}: expected an ErrorCode from 400 to 599, a Probability from 0 to 100")
        rules = re.sub(CHAOS_RULE % stage, "", rules) + f"\n{stage} {code} Chaos share {share}" * bool(share)
    return rules


class Faults:
    """Answers by the rules, counting how often each was reached. SettingsError lists wrong ones."""

    def __init__(self, text: str, path: str = "") -> None:
        self.lock, self.path = Lock(), path  # "": no other process asks
        self.on = mmap.mmap(-1, 1)  # in all processes: there are rules
        self.state: Fields = {"rules": "", "counts": {}}
        try:
            self.change(text)
        except ValueError as e:
            raise SettingsError(f"SMTP_FAULTS: {e}") from None

    @contextmanager
    def shared(self) -> Iterator[Fields]:
        """Hold rules and counts, to look at or to change."""
        with self.lock:
            if not (self.path and self.on[0]):
                yield self.state
                return
            with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                state = loads(file.readline() or dumps(self.state))  # someone may have tidied the spool
                yield state
                file.seek(0)
                file.write(dumps(state).encode() + b"\n")  # whole, whenever we are killed
                file.truncate()

    def change(self, text: str) -> None:
        """Go by these rules from now on, in all processes; ValueError names each wrong one."""
        rules = "\n".join(fault.rule for fault in read_faults(text))
        self.on[0] |= bool(rules)
        with self.shared() as state:
            state.update(rules=rules, counts={})
        self.on[0] = bool(rules)

    @property
    def text(self) -> str:
        """The rules, one a line."""
        with self.shared() as state:
            return str(state["rules"])

    def answer(self, stage: str, sender: str = "", *recipients: str) -> Fault:
        """Return what is to be played at a stage, without a reply for the true answer."""
        last, delay, fits = Fault("", stage, {}), 0.0, fnmatch.fnmatchcase
        with self.shared() as state:
            counts = state["counts"]
            for number, fault in enumerate(read_faults(state["rules"])):
                to = fault.globs.get("to")
                met = [r for r in map(str.lower, recipients) if fits(r, to)] if to else [""]
                if fault.stage != stage or not met or not fits(sender.lower(), fault.globs.get("from", "*")):
                    continue
                key = f"{number} {met[0]}"
                n = counts[key] = counts.pop(key, 0) + 1
                if len(counts) > FAULT_COUNTS_MOST:
                    del counts[next(iter(counts))]
                share = n * fault.share // 100 > (n - 1) * fault.share // 100
                if share and fault.after < n <= fault.after + fault.first:
                    last, delay = fault, delay + fault.delay
                    if fault.reply:
                        break
        return last._replace(delay=delay)


# === 16 SESSION ==============================================================
#
# One connection's state and rules. The loop does what is the same for every command once: read a
# line, find the verb, check what must come first, count errors, write the reply. A verb's method
# holds its own rule alone and returns a Reply. VERBS, at the end, and GRAMMAR's PARAMETERS are the
# whole protocol at a glance.
#
# A session runs on one thread and shares only the Reception: accounts, limits, counters (its lock
# is a leaf), and the way into the spool, which is that of every other entrance, too. Who delivers
# hears of a new message by its stem alone.

PLAIN_VERBS = ("EHLO", "NOOP", "RSET", "STARTTLS", "QUIT", "BDAT")  # without TLS; the last looks for it itself
UTF8_VERBS = ("MAIL", "RCPT", "VRFY", "EXPN")  # RFC 6531 3.3, 3.7.4
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STEM_LENGTH = len(stem_of("0" * 16, ""))
LINK_FULL = 15 * KIB  # octets; the smallest pipes in use hold 16 KiB
LOOK = "="  # a mark: look through the spool
LINK_QUIET = 0.005  # seconds without a new message after which there is time for sidecars
CROWD = 3  # threads at work from which on they keep to one processor
# Commits at once, first come, first served: at 50 clients that took a session's p99 from 237 to
# 127 ms, with no message a second less. 8 and 16 at once changed nothing, 1 halved the rate.
COMMITS = 4
NOBODY = Account("")
DESCRIPTORS_KEPT = 40  # for all but sessions, which need two each: a connection and a file


def keep_together(bound: bool | None, crowded: bool, pick: int) -> bool:
    """Bind the calling thread to one processor when there is a crowd; return whether it is bound now.

    Threads that pass the interpreter's lock between processors do half the work. Each process
    picks another processor (-1 is the last); where this is not to be had, only speed is lost."""
    if PROCESSORS and crowded != bound:
        places = (PROCESSORS[pick % len(PROCESSORS)],) if crowded else PROCESSORS
        policy = os.SCHED_BATCH if crowded else os.SCHED_OTHER
        with suppress(OSError):
            os.sched_setaffinity(0, places)
            os.sched_setscheduler(0, policy, os.sched_param(0))
    return crowded


def descriptors(wanted: int = 0) -> int:
    """Return how many descriptors this process may have, after asking for those wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # never without a limit
    most = min(max(soft, wanted), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


class Link:
    """A pipe that carries words to the delivering half: stems, and marks.

    Writes are atomic and never block. A stem that finds no room lies in the spool, and whoever
    reads the pipe is told to look there (LOOK) when it was as good as full."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self.reader, self.writer = io.FileIO(reader), io.FileIO(writer, "w")
        self.poll = select.poll()
        self.poll.register(reader, select.POLLIN)

    def announce(self, word: str, owed: bool = True) -> bool:
        """Send a word, which comes out when all before it have; False when there is no room, or nobody to hear it."""
        try:
            return bool(self.writer.write(word.encode() + b"\n"))
        except (OSError, ValueError):  # the latter: it is closed
            return False

    def read(self, patience: float | None = None) -> list[str] | None:
        """Return the words that have come, none after so many seconds without any; None at their end."""
        if patience is not None and not self.poll.poll(1000 * patience):
            return []
        block = self.reader.read(64 * KIB)  # may cut a word only when the pipe is full
        if not block:
            self.reader.close()
            return None
        return block.decode().split() + [LOOK] * (len(block) >= LINK_FULL)


class Turns:
    """A few places, given to threads in the order in which they ask."""

    def __init__(self, places: int) -> None:
        self.lock, self.free = Lock(), places
        self.queue: deque[Lock] = deque()

    def __enter__(self) -> None:
        with self.lock:
            if self.free:
                self.free -= 1
                return
            turn = Lock()
            turn.acquire()
            self.queue.append(turn)
        turn.acquire()  # until a place is handed over

    def __exit__(self, *exc: object) -> None:
        with self.lock:
            if self.queue:
                self.queue.popleft().release()
            else:
                self.free += 1


@dataclass(eq=False)
class Reception:
    """The only way into the spool, for sessions and every other entrance: accounts, limits, counts.

    `announce` makes a new message known by its stem, and whether it is owed, to who delivers;
    False: it could not."""

    settings: Settings
    spool: Spool
    metrics: Metrics
    log: Log
    announce: Callable[[str, bool], bool]
    accounts: Accounts
    tls: Watched | None
    quotas: Quotas
    faults: Faults

    def __post_init__(self) -> None:
        settings = self.settings
        self.watched = [file for file in (self.accounts.file, self.tls) if file]
        self.logins = Buckets()  # failed ones, by client
        self.rates = Buckets()  # SMTP_RATE_LIMIT, by account or client
        # each event is an info; without a file none is kept
        self.audit = Log(settings.audit_log, as_json=True, level="info" if settings.audit_log else "error")
        self.greeting = Reply(220, "", f"{settings.hostname} ESMTP {settings.banner}")
        self.sessions: set[Session] = set()  # without a lock: each step on it is whole
        self.stopping, self.turns = False, Turns(COMMITS)
        self.free_checked = self.exhausted_at = -math.inf
        self.has_free_space = True
        self.unheard_until = 0.0  # who delivers is behind: how much is owed is not known
        self.pick = 0  # the processor that a crowd of sessions keeps to
        room = max((descriptors() - DESCRIPTORS_KEPT) // 2, 1)
        self.most_sessions = min(settings.max_connections, room)

    def trouble(self) -> str:
        """Return what is wrong with the users file or the certificate as they are now."""
        for file in self.watched:
            file.current()
        return "; ".join(file.trouble for file in self.watched if file.trouble)

    def reload(self) -> None:
        """Reread accounts and certificate (SIGHUP)."""
        for file in self.watched:
            file.current(anew=True)

    # -- who is here --

    def crowded(self, client: str) -> bool:
        """Tell whether a client has too many sessions, or all together have."""
        proxied = in_networks(client, self.settings.proxy_networks)
        limit = 0 if proxied else self.settings.max_connections_per_client
        keys = [client_key(other.client) for other in [*self.sessions]] if limit else []
        active = self.metrics.get("smtp_sessions_active")
        return active > self.most_sessions or limit < keys.count(client_key(client))

    def refused(self, reply: Reply, client: str, user: str) -> None:
        """Count and note a refusal."""
        code = str(reply.code)
        self.metrics.inc("smtp_messages_rejected_total", 1, code if code in CODES else "other")
        self.log.info("refused", client=client, reply=reply)
        self.audit.info("refused", client=client, user=user, reply=str(reply))

    # -- the way into the spool --

    def has_room(self, size: int) -> bool:
        """Tell whether so many octets fit; the file system is asked ten times a second at most."""
        s, now = self.settings, monotonic()
        if s.queue_size or s.spool_max_messages or s.spool_max_size:
            owed = self.metrics.get("smtp_queue_depth")
            if (now < self.unheard_until or 0 < s.queue_size <= owed
                    or 0 < s.spool_max_messages <= owed
                    or 0 < s.spool_max_size < self.metrics.get("owed_bytes") + size):
                return False
        if now - self.free_checked > 0.1:
            self.has_free_space, self.free_checked = self.spool.free() >= s.spool_min_free, now
        return self.has_free_space

    def admit(self, envelope: Envelope, blocks: Iterable[bytes]) -> str:
        """Take in a whole message that no session brought, by the same rules; return its id, or raise Refused."""
        try:
            if not envelope.recipients:
                raise Refused(NO_RECIPIENTS)
            if len(envelope.recipients) > self.settings.max_recipients:
                raise Refused(TOO_MANY_RECIPIENTS)
            content = self.begin(envelope)
            try:
                for block in blocks:
                    content.feed(block)
                return self.keep(content)
            finally:
                content.draft.abort()
        except Refused as e:
            self.refused(e.reply, envelope.client, envelope.user)
            raise

    def begin(self, envelope: Envelope, lenient: bool = False) -> Content:
        """Begin a message; in hold mode only a copy that somebody released is owed to anybody."""
        if self.settings.delivery == "hold" and not {"HOLD", "RELEASED"} & {*envelope.flags}:
            envelope.flags += ("HOLD",)
        return Content(self.spool.draft(envelope), self.settings.max_size, lenient)

    def keep(self, content: Content) -> str:
        """Judge a message whose content is over, make it safe, then known; return its id, or raise Refused."""
        draft: Draft = content.draft
        envelope = draft.envelope
        content.end()
        size, owed = content.size, "HOLD" not in envelope.flags
        try:
            if content.trouble:
                raise content.trouble
            if not self.has_room(size):  # others came in since MAIL
                raise Refused(SPOOL_FULL)
            with self.turns:
                stem = draft.commit()
        except OSError as e:
            self.log.error("spool_error", client=envelope.client, error=e)
            raise Refused(SPOOL_FULL if e.errno in DISK_FULL else INTERNAL) from None
        self.metrics.inc("smtp_messages_received_total")
        self.metrics.inc("smtp_bytes_received_total", size)
        if owed:
            self.metrics.inc("smtp_messages_queued_total")
        if not self.announce(stem, owed):
            self.unheard_until = monotonic() + 1.0
        told = {"id": draft.id, "sender": envelope.reverse_path, "recipients": envelope.recipients,
                "size": size, "client": envelope.client}
        self.audit.info("accepted", **told, user=envelope.user)
        told["recipients"] = ",".join(envelope.recipients)
        self.log.info("received", **told, helo=envelope.helo, protocol=envelope.protocol)
        return draft.id


class Session:
    """A connection from a client, from its greeting to its end (RFC 5321 3)."""

    tls = lenient = helo = ""  # tls: its version; lenient: the host's name, to complete addresses
    extended = over = quitting = False  # extended: helo was EHLO's
    account, failed_logins, errors = NOBODY, 0, 0
    envelope: Envelope | None = None
    content: Content | None = None  # since DATA, or the first BDAT

    def __init__(self, reception: Reception, sock: socket.socket, client: str,
                 implicit_tls: bool = False) -> None:
        self.reception, self.settings = reception, reception.settings
        self.client, self.implicit_tls = client, implicit_tls
        self.is_local = client == "local" or is_loopback(client)
        self.latest = monotonic() + self.settings.session_timeout
        self.wire = Wire(sock, 0.0)

    # -- the loop --

    def run(self) -> None:
        """Hold the whole dialogue, then close; what is unexpected is 451, and ends only content it broke off."""
        reception = self.reception
        step: Callable[[], Reply | None] = self.greet
        reception.metrics.inc("smtp_sessions_active")  # first: two processes may not take the last place
        reception.sessions.add(self)
        reception.audit.info("session_start", client=self.client)
        try:
            while not self.over:
                self.wire.deadline = min(monotonic() + self.settings.command_timeout, self.latest)
                try:
                    reply = step()
                except Refused as e:
                    reply = e.reply
                except (PeerGone, TimeoutError):
                    raise
                except Exception:
                    reception.log.bug("session_bug", client=self.client)
                    self.forget()
                    reply = INTERNAL
                if reply:
                    self.answer(reply)
                step = self.obey
            self.wire.flush()
            if not self.quitting:
                self.linger()
        except (PeerGone, TimeoutError) as e:  # the peer may no longer listen
            words = TIMED_OUT if isinstance(e, TimeoutError) else STOPPING if reception.stopping else None
            if words:
                self.wire.deadline = monotonic() + 1.0
                with suppress(PeerGone, TimeoutError):
                    self.answer(words)
                    self.wire.flush()
        finally:
            self.forget()
            reception.audit.info("session_end", client=self.client, user=self.account.name, tls=self.tls)
            sock = self.wire.sock
            if isinstance(sock, ssl.SSLSocket):  # TLS's own close, without waiting for the peer's
                with suppress(OSError, ValueError):
                    sock.settimeout(0)
                    sock.unwrap()
            sock.close()
            reception.sessions.discard(self)
            reception.metrics.inc("smtp_sessions_active", -1)

    def greet(self) -> Reply:
        """Return the greeting, or why there is none; where any login is good nobody from afar gets it."""
        reception, settings = self.reception, self.settings
        self.over, spoken = True, b""
        if in_networks(self.client, settings.proxy_networks):
            self.meet_balancer()
        client, allowed = self.client, settings.allow_networks
        crowded = reception.crowded(client)
        if self.implicit_tls and not crowded:
            self.handshake()
        else:
            with suppress(OSError):  # nobody has spoken; the socket blocks (`limit_calls`)
                spoken = self.wire.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if crowded:
            self.quitting, refusal = True, TOO_MANY_SESSIONS
        elif client != "local" and (settings.auth_any and not are_private(networks(client))
                                    or not in_networks(client, allowed)):
            refusal = NOT_ALLOWED
        elif spoken:
            refusal = TALKED_EARLY
        else:
            named = tuple(n for n in allowed if n.prefixlen and not n.is_loopback)
            if settings.lenient and (self.is_local or in_networks(client, named)):
                self.lenient = settings.hostname
            self.fault("connect")
            self.over = False
            return reception.greeting
        reception.metrics.inc("smtp_connections_refused_total")
        return refusal

    def meet_balancer(self) -> None:
        """Learn from a balancer who the client is; a bad header ends the session without a word."""
        try:
            named = proxied_client(self.wire)
        except ValueError as e:
            self.reception.log.warn("bad_proxy_header", client=self.client, error=e)
            raise PeerGone("bad PROXY header") from None
        self.client = plain_address(named or self.client)
        self.is_local = bool(named) and is_loopback(self.client)  # one not named may be anybody

    def obey(self) -> Reply | None:
        """Read a command, check what each must pass, then do as it says."""
        if self.reception.stopping:
            return STOPPING
        line = self.wire.line(AUTH_LINE_LIMIT)
        if self.settings.debug:
            self.reception.log.debug("wire", client=self.client, line="C: " + shown_command(line))
        if len(line) > LINE_LIMIT and line[:5].upper() != b"AUTH ":
            return LINE_TOO_LONG
        command = line[:-2].rstrip(b" \t")  # white space at the end means nothing, RFC 5321 4.1.1
        if not line.endswith(b"\r\n") or BAD_OCTETS.search(command):
            return BAD_LINE
        first, _, argument = command.partition(b" ")
        name, argument = first.decode("latin-1").upper(), argument.lstrip(b" ")
        verb = VERBS.get(name)
        if verb is None:
            self.over = b" HTTP/" in argument
            return NOT_SMTP if self.over else UNKNOWN_COMMAND
        if not argument.isascii() and name not in UTF8_VERBS:
            return BAD_LINE
        if self.settings.tls_required and name not in PLAIN_VERBS and not self.tls:
            return TLS_FIRST
        wanted = verb.syntax.partition(" ")[2]
        if bool(argument) != bool(wanted) and wanted[:1] != "[":
            return BAD_ARGUMENT(f"Syntax: {verb.syntax}")
        if verb.after == "EHLO" and not self.helo or verb.after == "MAIL" and not self.envelope:
            return SEQUENCE(f"Say {verb.after} first")
        if self.content and name in ("MAIL", "RCPT", "DATA"):
            return SEQUENCE("Only BDAT may follow BDAT")
        return verb.act if isinstance(verb.act, Reply) else verb.act(self, argument)

    def answer(self, reply: Reply) -> None:
        """Write a reply, counting refusals; too many end the session."""
        if reply.code >= 400:
            self.reception.refused(reply, self.client, self.account.name)
            self.errors += reply.code >= 500
            if self.errors > self.settings.max_errors:
                reply = TOO_MANY_ERRORS
            self.over |= reply.code == 421  # RFC 5321 3.8
            if self.over and reply not in (STOPPING, TIMED_OUT):
                self.reception.audit.info("blocked", client=self.client, reason=reply.text)
        if self.settings.debug:
            self.reception.log.debug("wire", client=self.client, line=f"S: {reply}")
        self.wire.write(reply_octets(reply))

    def fault(self, stage: str, sender: str = "", *recipients: str) -> bool:
        """Do as SMTP_FAULTS says at a stage: wait, hang up, raise Refused; True: the true reply is not to be sent."""
        reception = self.reception
        if not reception.faults.on[0]:
            return False
        fault = reception.faults.answer(stage, sender, *recipients)
        end = monotonic() + fault.delay
        while (left := end - monotonic()) > 0 and not reception.stopping:
            time.sleep(min(0.05, left))
        if fault.reply is HANG_UP:
            raise PeerGone("dropped by SMTP_FAULTS")
        if fault.reply and fault.reply is not LOST:
            raise Refused(fault.reply)
        return fault.reply is LOST

    def linger(self) -> None:
        """Read what comes for a moment: closing on unread data would destroy our last reply."""
        self.wire.deadline = monotonic() + 1.0
        with suppress(PeerGone, TimeoutError, OSError):
            shut(self.wire.sock, socket.SHUT_WR)
            while True:
                self.wire.buffer = b""
                self.wire.fill()

    def forget(self, accepted: bool = False) -> None:
        """Drop the transaction (RFC 5321 4.1.1.5); one accepted is counted for its account."""
        if self.envelope and self.account.quota_daily:
            self.reception.quotas.settle(self.account.name, accepted)
        elif accepted:
            self.reception.quotas.count(self.account.name, "received")
        if self.content and not accepted:
            self.content.draft.abort()
        self.envelope = self.content = None

    # -- hello, and commands that change nothing --

    def hello(self, argument: bytes, extended: bool) -> Reply:
        """HELO, or EHLO, which lists what there is for this client now (RFC 5321 4.1.1.1)."""
        settings, accounts, good = self.settings, self.reception.accounts, r"A-Za-z0-9._:%\[\]~+-"
        name = argument.decode("latin-1")
        if self.lenient:  # an old device has no name, or one with blanks
            name = re.sub(f"[^{good}]+", "-", name)[:255] or "unnamed"
        if not re.fullmatch(f"[{good}]{{1,255}}", name):
            return BAD_ARGUMENT("Expected a domain or an address literal")
        self.forget()
        self.helo, self.extended = name, extended
        if not extended:
            return Reply(250, "", settings.hostname)
        lines = (f"{settings.hostname} greets {name}\nSIZE {settings.max_size}\n8BITMIME\nSMTPUTF8\nPIPELINING\n"
                 f"CHUNKING\nENHANCEDSTATUSCODES\nDSN\nHELP\nLIMITS RCPTMAX={settings.max_recipients}")
        if self.reception.tls and not self.tls:
            lines += "\nSTARTTLS"
        if accounts.configured and (self.tls or not settings.tls_required):
            mechanisms = " ".join(accounts.offers(self.is_local or bool(self.tls)))
            lines += f"\nAUTH {mechanisms}" * bool(mechanisms)
        return Reply(250, "", lines)

    def rset(self, argument: bytes) -> Reply:
        self.forget()
        return OK

    def quit(self, argument: bytes) -> Reply:
        self.over = self.quitting = True
        return BYE

    # -- closed doors --

    def starttls(self, argument: bytes) -> Reply | None:
        """STARTTLS (RFC 3207): what came before the handshake counts for nothing after it."""
        if self.reception.tls is None:
            return NOT_IMPLEMENTED("There is no TLS here")
        if self.tls:
            return SEQUENCE("TLS is on already")
        if self.wire.buffer:  # CVE-2011-0411
            self.over = True
            return TALKED_EARLY
        self.answer(TLS_READY)
        self.wire.flush()
        self.forget()
        self.handshake()
        self.helo, self.account = "", NOBODY
        return None

    def handshake(self) -> None:
        """Put TLS under the connection, under the command deadline; PeerGone when it fails."""
        assert self.reception.tls is not None
        try:
            sock = self.reception.tls.current().wrap_socket(
                self.wire.sock, server_side=True, do_handshake_on_connect=False)
            self.wire.sock, self.wire.timeout = sock, -1.0
            limit_calls(sock, self.wire.deadline - monotonic())
            sock.do_handshake()
        except OSError as e:
            self.reception.log.info("tls_failed", client=self.client, error=e)
            raise PeerGone(f"TLS: {e}") from None
        self.tls = sock.version() or "TLS"
        self.reception.metrics.inc("smtp_tls_sessions_total")

    def auth(self, argument: bytes) -> Reply:
        """AUTH (RFC 4954); failures are answered ever more slowly."""
        reception, accounts = self.reception, self.reception.accounts
        who, rate = client_key(self.client), self.settings.auth_failures
        first, _, initial = argument.partition(b" ")
        mechanism = first.decode("latin-1").upper()
        if self.account.name or self.envelope or not self.extended:
            return SEQUENCE("AUTH comes once, after EHLO, outside a transaction")
        if not accounts.configured:
            return NOT_IMPLEMENTED("There are no accounts here")
        if mechanism.lower() not in self.settings.auth_methods:
            return UNKNOWN_MECHANISM
        safe = self.is_local or self.tls or self.settings.auth_insecure
        if mechanism != "CRAM-MD5" and not safe:
            return MECHANISM_NEEDS_TLS
        self.fault("auth")
        if not reception.logins.take(who, rate, rate):
            return TOO_MANY_LOGINS
        if self.lenient:  # with "=" old devices wish to be asked
            initial = b"" if initial == b"=" else padded(initial)
        good = True
        try:
            account, good = authenticate(accounts, mechanism, initial or None, self.ask)
        finally:
            if good:
                reception.logins.take(who, rate, rate, -1)
        self.account, result = account if good else NOBODY, "success" if good else "failure"
        reception.metrics.inc("smtp_auth_attempts_total", 1, result)
        for log in (reception.log, reception.audit):
            log.info("login", client=self.client, user=account.name, mechanism=mechanism, result=result, tls=self.tls)
        if not good:
            self.failed_logins += 1
            time.sleep(min(0.025 * 2 ** self.failed_logins, 2.0))
        return AUTH_OK if good else AUTH_WRONG

    def ask(self, challenge: str) -> bytes:
        """Send a 334 and return the client's line (RFC 4954 4; 12288 octets at most)."""
        self.wire.write(f"334 {challenge}\r\n".encode())
        line = self.wire.line(AUTH_LINE_LIMIT).rstrip(b"\r\n")
        return padded(line) if self.lenient else line

    # -- the transaction --

    def mail(self, argument: bytes) -> Reply:
        """MAIL FROM (RFC 5321 4.1.1.2)."""
        settings, reception = self.settings, self.reception
        if self.envelope:
            return SEQUENCE("A transaction is open already")
        if self.account.name:  # it may be gone from the file, or its limits may have changed
            self.account = reception.accounts.get(self.account.name) or NOBODY
        needed = settings.auth_required
        account = self.account
        if not account.name and (reception.accounts.configured or not self.is_local if needed is None else needed):
            return LOGIN_FIRST
        address, given, asked = read_path("MAIL", argument, self.extended, self.lenient)
        size, utf8 = int(given.get("SIZE", "0")), "SMTPUTF8" in given
        if address.lower() == "postmaster":
            return BAD_SENDER
        if size > settings.max_size:
            return TOO_BIG
        if not utf8 and not address.isascii():
            return NEED_SMTPUTF8
        self.fault("mail", address)
        if not reception.has_room(size):
            return SPOOL_FULL
        if account.allowed_domains and not may_send_as(account, address):
            return WRONG_DOMAIN
        who = account.name or f"client {client_key(self.client)}"
        minute, day, quotas = account.quota_per_minute, account.quota_daily, reception.quotas
        limit = ("rate" if settings.rate_limit and not reception.rates.take(
                     who, settings.rate_limit, settings.rate_burst) else
                 "quota_per_minute" if minute and not quotas.minutes.take(account.name, minute, minute) else
                 "quota_daily" if day and not quotas.reserve(account.name, day) else "")
        if limit:
            reception.metrics.inc("smtp_rate_limited_total")
            reception.audit.info("quota", client=self.client, user=account.name, limit=limit)
            return RATE_SPENT
        flags = ("8BITMIME",) * (given.get("BODY") == "8BITMIME") + ("SMTPUTF8",) * utf8
        protocol = "UTF8SMTP" if utf8 else "ESMTP"  # RFC 3848, 6531
        protocol = protocol + "S" * bool(self.tls) + "A" * bool(account.name) if self.extended else "SMTP"
        self.envelope = Envelope(address, self.client, self.helo, protocol, account.name, flags, asked=asked)
        return SENDER_OK

    def rcpt(self, argument: bytes) -> Reply:
        """RCPT TO (RFC 5321 4.1.1.3)."""
        envelope = self.envelope
        assert envelope is not None
        address, given, asked = read_path("RCPT", argument, self.extended, self.lenient)
        utf8, orcpt = "SMTPUTF8" in envelope.flags, given.get("ORCPT", "")
        if not utf8 and not (address + orcpt).isascii():
            return NEED_SMTPUTF8
        if orcpt and not original_recipient(orcpt, utf8):
            return BAD_ARGUMENT(PARAMETERS["ORCPT"][2])
        if not address:
            return BAD_RECIPIENT
        if len(envelope.recipients) >= self.settings.max_recipients:
            return TOO_MANY_RECIPIENTS
        self.fault("rcpt", envelope.reverse_path, address)
        if address not in envelope.recipients:
            envelope.recipients.append(address)
            envelope.asked_for[address] = asked
        return RECIPIENT_OK

    def data(self, argument: bytes) -> Reply:
        """DATA (RFC 5321 4.1.1.4), or BDAT (RFC 3030), whose octets are read whatever the answer."""
        chunk = re.fullmatch(rb"([0-9]{1,15})( +LAST)?", argument.upper()) if argument else None
        if argument and not chunk:
            return BAD_ARGUMENT("Syntax: BDAT octets [LAST]")
        octets = int(chunk[1]) if chunk else 0
        self.wire.deadline = min(monotonic() + self.settings.data_timeout, self.latest)
        try:
            content = self.content = self.content or self.begin()
        except Refused as e:
            if chunk or e.reply is not NO_RECIPIENTS:
                self.forget()
            for _ in self.wire.blocks(octets):
                """It is not taken for commands."""
            raise
        self.over = True  # what is left of content that breaks off is not to be taken for commands
        id, envelope = "", content.draft.envelope
        if chunk:
            for block in self.wire.blocks(octets):
                content.feed(block)
        else:
            self.wire.write(reply_octets(GO_AHEAD))
            read_data(self.wire, content)
        self.over = False
        if chunk and not (chunk[2] or content.trouble):
            return OK
        try:
            lost = self.fault("end", envelope.reverse_path, *envelope.recipients)
            id = self.reception.keep(content)
        finally:
            self.forget(bool(id))
        if lost:
            raise PeerGone("dropped by SMTP_FAULTS")
        return OK(f"Ok: queued as {id}")

    def begin(self) -> Content:
        """Begin the content of the transaction, or raise Refused."""
        envelope = self.envelope
        if self.settings.tls_required and not self.tls:
            raise Refused(TLS_FIRST)
        if not envelope:
            raise Refused(SEQUENCE("Say MAIL first"))
        if not envelope.recipients:
            raise Refused(NO_RECIPIENTS)
        self.fault("data", envelope.reverse_path, *envelope.recipients)
        return self.reception.begin(envelope, bool(self.lenient))


class Verb(NamedTuple):
    """A command: its name and argument, which may be missing in brackets; what it does, or its only reply."""

    syntax: str
    act: Reply | Callable[[Session, bytes], Reply | None]
    after: str = ""  # what must come first


VERBS = {verb.syntax.partition(" ")[0]: verb for verb in (
    Verb("HELO [domain]", lambda session, name: session.hello(name, False)),
    Verb("EHLO [domain]", lambda session, name: session.hello(name, True)),
    Verb("MAIL FROM:<address> [parameters]", Session.mail, "EHLO"),
    Verb("RCPT TO:<address> [parameters]", Session.rcpt, "MAIL"),
    Verb("DATA", Session.data),
    Verb("BDAT octets [LAST]", Session.data),
    Verb("STARTTLS", Session.starttls, "EHLO"),
    Verb("AUTH mechanism [initial response]", Session.auth, "EHLO"),
    Verb("RSET", Session.rset),
    Verb("NOOP [text]", OK),
    Verb("QUIT", Session.quit),
    Verb("VRFY text", CANNOT_VERIFY),
    Verb("EXPN text", NOT_IMPLEMENTED("There are no lists here")),
    Verb("HELP [text]", HELP))}


def padded(line: bytes) -> bytes:
    """Complete base64 whose padding an old device left out; "*" cancels (RFC 4954 4)."""
    return line if line == b"*" else line + b"=" * (-len(line) % 4)


def shown_command(line: bytes) -> str:
    """Return a command for the log; who goes on after AUTH failed sends a password as a command."""
    text = line.decode("utf-8", "replace").rstrip()
    name, mechanism, *more = [*text.upper().split(), "", ""]
    if name != "AUTH":
        return text if name in VERBS else "***"
    return f"AUTH {mechanism if mechanism in MECHANISMS else '***'}{' ***' * any(more)}"


def shut(sock: socket.socket, how: int) -> None:
    """Shut one direction of a connection; SSLSocket's own way drops TLS, and goes on in clear."""
    with suppress(OSError):
        socket.socket.shutdown(sock, how)


def client_name(family: int, address: Any) -> str:
    """Return a client's address as text; IPv4 in IPv6's clothes is IPv4."""
    return "local" if family == socket.AF_UNIX else plain_address(str(address[0]))


@lru_cache(maxsize=1024)
def plain_address(text: str) -> str:
    ip = ipaddress.ip_address(text.partition("%")[0])
    return str(getattr(ip, "ipv4_mapped", None) or ip)


@lru_cache(maxsize=1024)
def in_networks(client: str, networks: tuple[Any, ...]) -> bool:
    return client != "local" and any(ipaddress.ip_address(client) in network for network in networks)


# === 17 LISTENER =============================================================
#
# Where connections come from and how they end. A Listener is a socketserver over a socket that is
# bound already. Its threads wait in accept themselves, and the one that gets a connection holds the
# session: no hand-over, which would cost 15 us, and no start of a thread, 80 us, but while the load
# grows. Receiving is the whole receiving half of the program. The lock of a listener is a leaf.

SPARE_THREADS = 16  # that wait for a connection; more than that end
BACKLOG = 1024
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
EXHAUSTED_LOGGED = 10.0  # seconds between two lines that say so
STOP_PATIENCE = 8.0


def accept(sock: socket.socket, reception: Reception) -> tuple[socket.socket, Any]:
    """Accept a connection; with no descriptor left say so now and then, and wait instead of spinning."""
    try:
        return sock.accept()
    except OSError as e:
        if e.errno in EXHAUSTED:
            if monotonic() > reception.exhausted_at + EXHAUSTED_LOGGED:
                reception.exhausted_at = monotonic()
                reception.log.error("accept_failed", error=e)
            time.sleep(0.1)
        raise


class SessionHandler(socketserver.BaseRequestHandler):
    """Holds the session on one connection."""

    server: Listener

    def handle(self) -> None:
        Session(self.server.reception, self.request, self.client_address, self.server.tls).run()


class Listener(socketserver.ThreadingTCPServer):
    """Accepts connections on one bound socket; each thread holds the session that it accepted."""

    def __init__(self, sock: socket.socket, reception: Reception, tls: bool) -> None:
        socketserver.BaseServer.__init__(self, ("", 0), SessionHandler)  # without a socket of its own
        self.socket = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        self.reception, self.tls = reception, tls
        self.lock = Lock()
        self.waiting = 0  # threads that wait for a connection

    def start_thread(self) -> None:
        """Start a thread; RuntimeError when none can be had."""
        Thread(target=self.work, name="session", daemon=True).start()

    def work(self) -> None:
        """Accept and hold one session after the other, until enough other threads wait."""
        bound = None  # unknown: a thread begins where the one that started it was bound to
        while not self.reception.stopping:
            with self.lock:
                if self.waiting >= SPARE_THREADS:
                    return
                self.waiting += 1
            try:
                request, client = self.get_request()
            except OSError:
                continue
            finally:
                with self.lock:
                    self.waiting -= 1
            bound = keep_together(bound, len(self.reception.sessions) >= CROWD, self.reception.pick)
            self.process_request(request, client)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = accept(self.socket, self.reception)
        self.reception.metrics.inc("smtp_connections_total")
        return sock, client_name(sock.family, address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hold a session on the caller's thread, or turn it away with 421 without waiting."""
        reception = self.reception
        try:
            if not self.waiting:  # another thread must accept while this one is busy
                self.start_thread()
            if not reception.stopping:
                return self.finish_request(request, client_address)
        except Exception as e:  # no thread or no memory; the next connection may find some
            reception.log.error("session_not_started", error=e)
        with suppress(OSError):
            request.settimeout(0)
            request.send(reply_octets(TOO_MANY_SESSIONS))
        request.close()


class Receiving:
    """The receiving half: its listeners and the sessions they serve."""

    def __init__(self, reception: Reception, plain: Sequence[socket.socket],
                 tls: Sequence[socket.socket]) -> None:
        self.reception = reception
        self.stopped = Event()
        self.listeners = [Listener(sock, reception, sock in tls) for sock in (*plain, *tls)]
        self.counter = Thread(target=self.keep_counts, name="counter", daemon=True)

    def start(self) -> None:
        self.reception.metrics.set("alive", monotonic())
        self.counter.start()
        for listener in self.listeners:
            listener.start_thread()

    def stop(self, patience: float = STOP_PATIENCE) -> None:
        """Stop accepting, end idle sessions, give those in the middle of a message some time."""
        self.reception.stopping = True
        for listener in self.listeners:
            end = monotonic() + 1.0
            while listener.waiting and monotonic() < end:
                knock(listener)
                time.sleep(0.0005)
            listener.server_close()
        end = monotonic() + patience
        while self.reception.sessions and monotonic() < end:
            for session in list(self.reception.sessions):
                if not session.over:  # it waits for a command: its next read finds the end
                    shut(session.wire.sock, socket.SHUT_RD)
            time.sleep(0.002)
        self.stopped.set()
        self.counter.join()

    def keep_counts(self) -> None:
        """Write quotas down each second, and at the end; say that someone waits for connections."""
        stopped = False
        while not stopped:
            full = len(self.reception.sessions) >= self.reception.settings.max_connections
            if full or all(listener.waiting for listener in self.listeners):
                self.reception.metrics.set("alive", monotonic())
            stopped = self.stopped.wait(1.0)
            try:
                self.reception.quotas.save()
            except OSError as e:
                self.reception.log.error("counts_not_saved", error=e)


def knock(server: socketserver.TCPServer) -> None:
    """Wake a thread that waits for a connection, with one of our own."""
    with suppress(OSError), socket.socket(server.socket.family) as call:
        call.settimeout(0.2)
        call.connect(server.socket.getsockname())


def stop_server(server: socketserver.TCPServer) -> None:
    """Stop a server's loop at once."""
    stopper = Thread(target=server.shutdown)
    stopper.start()
    knock(server)
    stopper.join()
    server.server_close()


def bind_all(setting: str, addresses: Sequence[Address], log: Log) -> list[socket.socket]:
    """Listen at a setting's addresses, port 0 the same on both families; OSError names one where it cannot be done."""
    bound: list[socket.socket] = []
    port, lacks_ipv6 = 0, (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    for address in addresses:
        path, is_v6 = address.path, ":" in address.host
        family = socket.AF_UNIX if path else socket.AF_INET6 if is_v6 else socket.AF_INET
        place = path or (address.host, address.port or port * (address.host in ("::1", "::")))
        try:
            with suppress(FileNotFoundError), socket.socket(family) as probe:
                if path and stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path):
                    os.unlink(path)  # one that a relay which is gone has left
            sock = socket.create_server(place, family=family, backlog=BACKLOG)
            if path:
                os.chmod(path, 0o666)  # as open as a loopback port
        except OSError as e:
            if bound and is_v6 and e.errno in lacks_ipv6:
                log.warn("no_ipv6", address=address, error=e)
                continue
            for sock in bound:
                sock.close()
            raise OSError(e.errno, f"{setting}: cannot listen on {address}: {os.strerror(e.errno or 0)}") from None
        bound.append(sock)
        port = 0 if path else sock.getsockname()[1]
    return bound


def socket_text(sock: socket.socket) -> str:
    """Return where a socket listens, as a user would write it."""
    name = sock.getsockname()
    return f"unix:{name}" if isinstance(name, str) else host_port(name[0], name[1])


# === 18 INBOX ================================================================
#
# Purpose: reading mail. It is listed, searched, waited for, and put into the JSON of Mailpit's API
# v1 and MailHog's v2, for HTTP and the library; nothing here writes to the spool.
#
#   record, content -> read_mail -> Email, its Parts -> waited_json, headers_json, view_html
#                   -> summarise -> packed in the Inbox -> Item -> search, messages_json
#
# Threads: any. `Inbox` has one Condition; under it only its own dict is touched, never the disk.
# Receiving costs a dict entry and a notify: a summary is made when somebody first reads. A waiter
# tries only the sequence numbers that it has not seen; none is ever given twice.
#
# Mail is hostile. The walk along boundaries is ours: the email package's parser tries every open
# boundary on every line, so that 1 MiB can take it 17 s, and changes between versions. Nothing that
# reads mail raises for what it says; if it does, Email shows the one message as unreadable. Time is
# linear in a mail's size; depth, parts and header octets have limits.

HEADERS_MOST = 512 * KIB  # octets of the header fields that are kept, of all parts together
TEXT_LIMIT = 128 * 1024  # characters in which links and codes are looked for
SEARCH_LIMIT = 1024 * 1024  # octets in which words are looked for; of HTML made text
PART_LIMIT = 1000
DEPTH_LIMIT = 16
SNIPPET = 200
EMBEDDED_LIMIT = 16 * MIB  # octets of images, encoded, put into one page

FIELD_NAME = rb"[!-9;-~]+[ \t]*:"
NEEDED_FIELD = (rb"(?i)(?:from|to|cc|bcc|reply-to|subject|date|message-id|content-[a-z-]+"
                rb"|mime-version|list-unsubscribe(?:-post)?|x-tags|return-path)[ \t]*:")
COMMON_ADDRESS = r"(?a)(?:([\w .'-]*) )?<([\w.+=-]+@[\w.-]+)>|([\w.+=-]+@[\w.-]+)"
NO_BREAKS = dict.fromkeys([*range(32), 127, 0x85, 0x2028, 0x2029], " ")

Headers = list[tuple[str, str]]  # in order, unfolded, encoded words left as they are
Person = dict[str, str]  # {"Name", "Address"} as in Mailpit's JSON; either may be ""


def header(headers: Headers, name: str) -> str:
    """Give the first value of a header field, "" where there is none."""
    return next((value for key, value in headers if key.lower() == name), "")


# Labels of charsets by the table of WHATWG's Encoding standard, without signs ("iso-8859-1:1987"
# is iso885911987), behind the Python codec that senders mean, a superset where that is usual.
# Labels in a registry's manner (iso8859N, latinN, cp125N) are read by rule.
CHARSETS = """
utf_8: utf8 unicode11utf8 unicode20utf8 cp1252: iso88591 iso885911987 latin1 l1 cp819 ibm819 isoir100 csisolatin1
ansix341968 iso646us 437us cp1254: iso88599 iso885991989 latin5 l5 isoir148 csisolatin5 cp874: iso885911 tis620 dos874
iso8859_2: l2 isoir101 csisolatin2 iso8859_3: l3 isoir109 csisolatin3 iso8859_4: l4 isoir110 csisolatin4 iso8859_5:
isoir144 csisolatincyrillic cyrillic iso8859_6: arabic asmo708 csiso88596e csiso88596i csisolatinarabic ecma114
iso88596e iso88596i isoir127 iso8859_7: csisolatingreek ecma118 elot928 greek greek8 isoir126 suneugreek iso8859_8:
csiso88598e csiso88598i csisolatinhebrew hebrew iso88598e iso88598i isoir138 visual logical iso8859_10: latin6 l6
isoir157 csisolatin6 iso8859_13: latin7 iso8859_14: latin8 iso8859_15: latin9 l9 latin0 csisolatin9 iso8859_16: latin10
l10 cp866: 866 ibm866 csibm866 koi8_r: koi koi8 koi8r cskoi8r koi8_u: koi8u koi8ru mac_roman: macintosh mac macroman
csmacintosh mac_cyrillic: maccyrillic macukrainian gb18030: gb18030 gb2312 gbk cp936 ms936 chinese csgb2312
csiso58gb231280 gb231280 isoir58 euccn hz: hz hzgb2312 big5hkscs: big5 big5hkscs cnbig5 csbig5 cp950 cp932: shiftjis
sjis ms932 mskanji windows31j csshiftjis euc_jp: eucjp cseucpkdfmtjapanese iso2022_jp_ext: iso2022jp iso2022jp1
iso2022jp2 csiso2022jp cp50220 cp50221 cp949: euckr ksc5601 ksc56011987 ksc56011989 ksc56 korean cseuckr csksc56011987
isoir149 uhc iso2022_kr: iso2022kr csiso2022kr utf_16: utf16 utf_16_le: utf16le unicode unicodefeff csunicode ucs2
iso10646ucs2 utf_16_be: utf16be unicodefffe utf_32: utf32 utf_7: utf7 unicode11utf7 csunicode11utf7
"""


@lru_cache(maxsize=256)
def find_codec(label: str) -> str:
    """Give the Python codec that a charset's label means, "" where it is none."""
    key = re.sub(r"\([^()]*\)|[^a-z0-9]", "", label[:100].lower()).lstrip("x")
    known = re.search(rf"(\w+):[^:]*\s{key}\s", CHARSETS)
    iso = re.fullmatch(r"(?:iso8859|latin)([2-8]|1[03-6])(?:19\d\d|20\d\d)?", key)
    page = re.fullmatch("(?:windows|cp|ms|ibm|cspc)"
                        "(125[0-8]|874|949|932|437|737|775|85[02578]|86[0-69])", key)
    if known:
        return known[1]
    return f"iso8859_{iso[1]}" if iso else f"cp{page[1]}" if page else ""


def decode_text(octets: bytes, charset: str = "") -> str:
    """Decode octets leniently: what the charset cannot say becomes U+FFFD.

    No label, one that is unknown, or US-ASCII: it is UTF-8 if it can be, else what HTML's own
    <meta> says, else windows-1252."""
    if octets.startswith(b"\xef\xbb\xbf"):
        octets, charset = octets[3:], "utf-8"
    codec = find_codec(charset)
    if not codec:
        with suppress(UnicodeDecodeError):
            return octets.decode()
        pattern = rb"(?i)<meta\b[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})"
        said = re.search(pattern, octets[:4096])
        codec = find_codec(said[1].decode("latin-1")) if said else ""
        codec = "cp1252" if codec[:6] in ("", "utf_16") else codec
    with suppress(UnicodeError, OverflowError):
        return octets.decode(codec)
    if codec in ("euc_jp", "iso2022_jp_ext"):  # with the rows that only Microsoft's tables have
        return decode_jis(octets).decode("cp932", "replace")
    return octets.decode(codec, "replace")


def decode_jis(octets: bytes) -> bytes:
    """Turn ISO-2022-JP or EUC-JP into Shift_JIS, which has a codec with all that senders use."""
    def shift(found: re.Match[bytes]) -> bytes:
        if not found[2]:  # half as wide; or of JIS X 0212, which Shift_JIS has not
            return found[1] or b"?"
        lead, trail = divmod((found[2][0] - 0xA1) * 94 + found[2][1] - 0xA1, 188)
        return bytes((lead + 0x81 + 0x40 * (lead > 30), trail + 0x40 + (trail > 62)))

    chunks = []
    for mode, run, before in re.findall(rb"\x1b(\$[@B]|\([BIJ])([^\x1b]*)|([^\x1b]+|\x1b)", octets):
        if mode in (b"$@", b"$B", b"(I"):
            mark = b"\x8e" * (mode == b"(I")
            run = b"".join(mark + bytes([o | 0x80]) if o > 32 else bytes([o]) for o in run)
        chunks.append(run + before)
    return re.sub(rb"\x8e([\xa1-\xdf])|\x8f..|([\xa1-\xfe]{2})", shift, b"".join(chunks))


def decode_words(value: str) -> str:
    """Decode the encoded words of a header value (RFC 2047), and keep what stands between."""
    def decoded(run: re.Match[str]) -> str:  # of words in one charset: a character may be cut in two
        words = re.findall(rb"(?s)=\?[^?]*\?(.)\?(.*?)\?=", run[0].encode("utf-8", "replace"))
        octets = (unbase64(word) if kind in b"bB" else binascii.a2b_qp(word, header=True)
                  for kind, word in words)
        return decode_text(b"".join(octets), run[1])

    if "=?" not in value:
        return value
    end = value.rfind("?=") + 2  # each that begins before it has an end
    words = re.sub(r"(?i)(\?=)\s+(?==\?[^?\s]*\?[bq]\?)", r"\1", value[:end])
    run = (r"(?is)=\?([^?\s*]*)(?:\*[^?\s]*)?\?[bq]\?.*?\?="
           r"(?:=\?\1(?:\*[^?\s]*)?\?[bq]\?.*?\?=)*")
    return (re.sub(run, decoded, words) + value[end:]).translate(NO_BREAKS)


def addresses(value: str) -> list[Person]:
    """Read an address list, its names decoded."""
    common = re.fullmatch(COMMON_ADDRESS, value)  # ten times as fast
    pairs = ([((common[1] or "").strip(), common[2] or common[3])] if common
             else read_addresses(value))
    if "=?" in value and not any("@" in address for _, address in pairs):  # encoded whole
        pairs = read_addresses(decode_words(value))
    return [{"Name": decode_words(name), "Address": decode_words(address)}
            for name, address in pairs]


def read_headers(raw: bytes, start: int, end: int, limit: int) -> tuple[Headers, int]:
    """Read a header block; give its fields with the offset of the body.

    A line that is no field costs itself alone where a field follows. A field that is not needed may
    take a quarter of what is left of the limit."""
    kept: Headers = []
    at, room, last_line = start, limit, start + 8 * limit
    line = re.compile(rb"(%s[^\n]*(?:\n[ \t]+[^\s][^\n]*)*(?:\n|\Z))|\S[^\n]*\n(?=%s)"
                      % (FIELD_NAME, FIELD_NAME))
    while at < last_line and (found := line.match(raw, at, end)):
        size = found.end() - at
        if not found[1] and at == start and not re.match(b">?From ", found[0]):
            break  # the body, be it without an empty line before it
        if found[1] and (size <= room // 4 and len(kept) < 2000
                         or size <= room and re.match(NEEDED_FIELD, found[1])):
            name, _, value = decode_text(found[1]).replace("\r\n", "").partition(":")
            kept.append((name.rstrip(), value.translate(NO_BREAKS).strip()))
            room -= size
        at = found.end()
    blank, spent = re.compile(rb"(?m)^[ \t\r]*(?:\n|\Z)"), at >= last_line
    empty = (blank.search if spent else blank.match)(raw, at, end)  # past the fields not looked at
    return kept, empty.end() if empty else end if spent else at


class Part(NamedTuple):
    """One leaf of the MIME tree, numbered as in /message/{id}/part/{number}."""

    number: str
    headers: Headers
    content_type: str
    parameters: dict[str, str]  # of the Content-Type
    role: str  # "body", "inline" (the HTML may refer to it, RFC 2392) or "attachment"
    filename: str
    content_id: str
    raw: bytes = b""  # the body as sent

    @property
    def content(self) -> bytes:
        """The body without its transfer encoding."""
        # Senders write "base64;" and "base64 (with a comment)", too.
        encoding, _ = header_parameters(header(self.headers, "content-transfer-encoding"))
        if encoding in ("base64", "b", "base-64"):
            return unbase64(self.raw)
        return binascii.a2b_qp(self.raw) if encoding == "quoted-printable" else self.raw

    @property
    def text(self) -> str:
        """The body as text, its line ends as sent, format=flowed unwrapped (RFC 3676)."""
        text = decode_text(self.content, self.parameters.get("charset", ""))
        form, delsp = (self.parameters.get(name, "").lower() for name in ("format", "delsp"))
        if self.content_type != "text/plain" or form != "flowed":
            return text

        def unwrapped(block: re.Match[str]) -> str:  # of one depth of quotes
            words = re.sub(r"(?m)^>* ?", "", block[0])
            words = re.sub(r"(?m)(?<!^--) \n(?!-- $)", " " * (delsp != "yes"), words)
            return re.sub("(?m)^", block[1] + " " * bool(block[1]), words)

        return re.sub(r"(?m)^(>*)(?!>).*(?:\n\1(?!>).*)*", unwrapped, text.replace("\r\n", "\n"))


def unbase64(octets: bytes) -> bytes:
    try:
        return binascii.a2b_base64(octets)
    except binascii.Error:  # cut short: with a digit more it is whole, and with an octet too many
        return binascii.a2b_base64(octets + b"A==")[:-1]


@lru_cache(maxsize=256)
def header_parameters(value: str) -> tuple[str, dict[str, str]]:
    """Split a header value into its first word and its parameters (RFC 2045, 2231), leniently."""
    value = value[:4096]
    word = re.findall(r"""(?:\s|\([^()]*\))*["']?([^\s;("']*)""", value)[0].lower()
    found: dict[str, bytes] = {}
    charsets: dict[str, str] = {}
    # A value without quotes goes on over spaces, but not over what looks like the next parameter.
    pattern = (r'(?<![^\s;="(),])([^\s;="(),]+?)(?:\*(\d{1,3}))?(\*?)\s*=\s*'
               r'(?:"((?:[^"\\]|\\.)*)"?|([^;\s"]*(?:[ \t]+(?![^\s;=]+\s*=)[^;\s]+)*))')
    for name, number, encoded, quoted, plain in re.findall(pattern, value):
        name = name.lower()
        plain = plain if name in ("name", "filename") else plain.partition(" (")[0]
        text = re.sub(r"\\(.)", r"\1", quoted) or plain
        if name in found and not number and not encoded:
            continue
        if number in ("", "0"):
            found[name] = b""
            if encoded and text.count("'") >= 2:
                charsets[name], _, text = text.split("'", 2)
        found[name] = found.get(name, b"") + (
            unquote_to_bytes(text) if encoded else text.encode("utf-8", "replace"))
    return word, {name: decode_text(octets, charsets.get(name, "")) for name, octets in found.items()}


ENDINGS = """
text/plain txt, text/html html, text/x-amp-html html, text/calendar ics, text/csv csv, text/vcard vcf,
message/rfc822 eml, application/pdf pdf, application/zip zip,
image/png png, image/jpeg jpg, image/gif gif, image/webp webp, """
SIGNATURES = rb"""
image/png \x89PNG
image/jpeg \xff\xd8\xff
image/gif GIF8
image/bmp BM.{4}\0\0\0\0
image/webp RIFF.{4}WEBP
image/avif .{4}ftypavif
application/pdf %PDF-
application/zip PK\x03\x04
application/x-gzip \x1f\x8b\x08
text/html \s*(?:<!doctype html|<html)\b
image/svg+xml \s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,300}?-->\s*)?<svg\b
text/xml \s*<\?xml"""  # how a file of each type begins


def first_octets_type(head: bytes) -> str:
    return next((str(kind, "ascii") for kind, start in re.findall(rb"(\S+) (.+)", SIGNATURES)
                 if re.match(b"(?si)" + start, head)), "")


def true_type(part: Part) -> str:
    """Tell a part's type: of what is sent as any octets, or as an image, by the first octets."""
    if re.match("image/|.*/octet-stream$", part.content_type):
        head = part._replace(raw=part.raw[:800]).content
        return first_octets_type(head) or part.content_type
    return part.content_type


def file_name(part: Part) -> str:
    """Name a part as a file."""
    ending = re.search(rf"\s{re.escape(true_type(part))} (\w+),", ENDINGS)
    unnamed = f"part-{part.number}" + (f".{ending[1]}" if ending else "")
    return part.filename or part.content_id or unnamed


def describe_part(number: str, headers: Headers, among: str = "") -> Part:
    """Describe a part by its header fields; `among` is the type of the multipart it stands in."""
    kind, more = header_parameters(header(headers, "content-type") or "text/plain")
    disposition, named = header_parameters(header(headers, "content-disposition"))
    cid = decode_words(header(headers, "content-id")).strip("<> ")[:250]
    filename = decode_words(named.get("filename") or more.get("name", ""))[:250]
    if not re.fullmatch(r"(?a)[a-z0-9][\w.+-]{0,99}/[\w.+-]{1,100}", kind):
        text = "text/html" if kind == "html" else "text/plain"
        kind = "application/octet-stream" if "/" in kind else text
    role = "attachment"
    if disposition != "attachment":
        if kind in ("text/plain", "text/html") and not (disposition and filename):
            role = "body"
        elif disposition == "inline" or (disposition or not kind.startswith("message/")) and (
                cid or among == "multipart/alternative" or kind.startswith("image/")):
            role = "inline"
    return Part(number, headers, kind, more, role, filename, cid)


def read_mail(raw: bytes) -> tuple[Headers, list[Part]]:
    """Parse a message (RFC 5322, 2045) in time linear in its size, raising nothing.

    Parts count as in Mailpit: 1, 2, 2.1, and 0 for a message that has none. A message inside is a
    leaf. The more has been read of the parts' headers, the less is read of the next."""
    parts: list[Part] = []
    todo = [("", 0, len(raw), "")]
    top: Headers = []
    room = 4 * HEADERS_MOST
    for _ in range(PART_LIMIT):
        number, start, end, among = todo.pop()
        headers, body = read_headers(raw, start, end, max(room // 4, 256))
        top, room = top or headers, room - (body - start)
        part = describe_part(number.rstrip(".") or "0", headers, among)
        multipart = part.content_type.startswith("multipart/")
        boundary, pieces = part.parameters.get("boundary"), []
        if multipart and boundary and number.count(".") < DEPTH_LIMIT:  # RFC 2046 5.1.1
            mark = re.escape(boundary.encode("utf-8", "replace"))
            line = re.compile(rb"\n--%s(--)?[ \t\r]*(?=\n|\Z)" % mark)
            lines = list(islice(line.finditer(raw, body - 1, end), PART_LIMIT))
            opening = takewhile(lambda line: not line[1], lines)
            ends = [*(line.start() for line in lines[1:]), end]
            pieces = [(line.end() + 1, end) for line, end in zip(opening, ends)]
        todo += [(f"{number}{n}.", *pieces[n - 1], part.content_type)
                 for n in range(len(pieces), 0, -1)]
        if not pieces:  # a multipart without parts is shown, not lost
            kind, role = ("text/plain", "body") if multipart else (part.content_type, part.role)
            if part.filename and ("body", kind) in ((p.role, p.content_type) for p in parts):
                role = "attachment" if role == "body" else role  # one more text with a name
            content = raw[body : end - (raw[end - 1 : end] == b"\r")]
            parts.append(part._replace(content_type=kind, role=role, raw=content))
        if not todo:
            break
    return top, parts


class Email:
    """A received message as a test sees it: `relay.wait(to="bob@example.com").codes[0]`."""

    def __init__(self, record: Message, raw: bytes, sequence: int = 0) -> None:
        self.id, self.record, self.raw, self.sequence = record.id, record, raw, sequence
        self.reverse_path = record.reverse_path
        self.recipients = [r.address for r in record.recipients]
        try:
            self.fields, self.parts = read_mail(raw)
            _ = self.subject, self.date, self.people, self.links
        except Exception as error:  # whatever it is
            words = f"This message cannot be read ({type(error).__name__}). Its source is whole."
            self.fields, self.parts = read_mail(f"Subject: (cannot be read)\n\n{words}".encode())
        self.from_ = self.people["from"][0]["Address"]
        self.to, self.cc = ([p["Address"] for p in self.people[name]] for name in ("to", "cc"))

    @cached_property
    def people(self) -> dict[str, list[Person]]:
        """Who is named in all fields of a name: From has one, Bcc those whom no field names, too."""
        people = {name: [person for key, value in self.fields if key.lower() == name
                         for person in addresses(value)]
                  for name in ("from", "to", "cc", "bcc", "reply-to")}
        people["from"] = people["from"] or [
            {"Name": decode_words(header(self.fields, "from"))[:1000], "Address": ""}]
        named = {p["Address"].lower() for name in ("to", "cc", "bcc") for p in people[name]}
        people["bcc"] += [{"Name": "", "Address": address} for address in self.recipients
                          if address.lower() not in named]
        return people

    @cached_property
    def subject(self) -> str:
        return decode_words(header(self.fields, "subject"))

    @property
    def date(self) -> str:
        """The Date field as ISO 8601, "" where it makes no sense."""
        try:
            when = email.utils.parsedate_to_datetime(header(self.fields, "date")[:100])
            return when.replace(tzinfo=when.tzinfo or datetime.timezone.utc).isoformat()
        except Exception:  # of which the package raises many kinds
            return ""

    @cached_property
    def page(self) -> str:
        """The HTML bodies, their line ends as sent."""
        return "\n".join(part.text for part in self.having("body", "html"))

    @cached_property
    def plain(self) -> str:
        """The text/plain bodies, their line ends as sent."""
        texts = (part.text for part in self.having("body", "plain"))
        return "\n--\n".join(filter(str.strip, texts))

    @property
    def html(self) -> str:
        return self.page.replace("\r\n", "\n")

    @cached_property
    def text(self) -> str:
        """The text/plain body, or else the readable text of the HTML one; lines end in LF."""
        return self.plain.replace("\r\n", "\n") or strip_html(self.page[:SEARCH_LIMIT])

    @cached_property
    def links(self) -> list[str]:
        """The links of any scheme that opens a page or an app: the HTML's, then the text's."""
        found, text = [], self.text[:TEXT_LIMIT]
        for tag in re.finditer(ANCHOR, self.page[:TEXT_LIMIT]):
            url = re.sub(r"[\t\r\n]", "", attributes(tag[2] or "").get("href", "")).strip()
            found.append(url.replace(" ", "%20"))
        pairs = {")": "(", "]": "[", "}": "{"}
        for match in re.finditer(URL, text) if "://" in text else ():
            # What ends the sentence is not the link's, nor is a mark that stands before it, too.
            url, before = match[0], text[match.start() - 1 : match.start()]
            ends = ".,;:!?'|\\" + before * (before in "*_~")
            while url[-1] in ends or url.count(url[-1]) > url.count(pairs.get(url[-1], url[-1])):
                url = url[:-1]
            found.append(url)
        return [url for url in dict.fromkeys(found) if re.match(LINK, url)]

    @cached_property
    def codes(self) -> list[str]:
        """The verification codes, the surest kind found, in order: letters and digits near a
        word such as code, OTP or PIN; no year, price, phone or order number, postal code, colour."""
        words = f"{self.subject}\n{self.text}"
        return codes_in(words) or codes_in(strip_html(self.page[:TEXT_LIMIT]))

    def having(self, role: str, kind: str = "") -> list[Part]:
        """The parts with this role, whose type says `kind`."""
        return [p for p in self.parts if p.role == role and kind in p.content_type]

    @property
    def attachments(self) -> list[Part]:
        """What is no body, with filename, content_type and content."""
        return [p for p in self.parts if p.role != "body"]

    @property
    def headers(self) -> email.message.Message:
        """The header fields, decoded: `headers["X-Id"]`, `headers.get_all("Received")`."""
        decoded = email.message.Message()
        for name, value in self.fields:
            decoded[name] = decode_words(value)
        return decoded

    def __repr__(self) -> str:
        return f"<Email {self.subject!r} from {self.from_!r} to {self.recipients} id {self.id}>"

    def __str__(self) -> str:
        """What a failing test prints."""
        files = ", ".join(f"{p.filename} ({p.content_type})" for p in self.attachments)
        to, found = ", ".join(self.recipients), [*self.codes, *self.links[:20]]
        head = f"From: {self.from_}\nTo: {to}\nSubject: {self.subject}\nFiles: {files}"
        return "\n".join([head, *(f"Found: {f}" for f in found), "", self.text[:2000]])


# A comment, or an element whose text is not shown; what is not closed goes to the end.
NOT_SHOWN = r"(?is)<!--.*?(?:-->|\Z)|<(style|script|title|template)\b.*?(?:</\1[^>]*>?|\Z)"
ANCHOR = NOT_SHOWN + r"|<a(?:rea)?(?![^\s<>/])([^<>]*)"
BLOCK_TAG = (r"(?i)</?(?:br|p|div|tr|li|ul|ol|table|h[1-6r]|blockquote|pre|section)"
             r"(?![^\s<>/])[^<>]*>?")
ATTRIBUTE = r"""([^\s"'>/=]+)(?:\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+)))?"""
URL = (r"(?i)(?<![a-z0-9])[a-z][a-z0-9+.-]{1,20}://"
       r"""[^\s<>"\x00-\x1f\u3000-\u303f\uff01-\uff65]{1,4000}""")
LINK = (r"(?i)(?!(?:javascript|data|vbscript|cid|mid|mailto|tel|sms|about|blob|file):)"
        r"[a-z][a-z0-9+.-]*:.")


def unescape(text: str) -> str:
    """Replace HTML's entities; a number too long for any character is none, whatever its base."""
    return html.unescape(re.sub(r"(?i)&#(?:x[0-9a-f]{9,}|[0-9]{9,});?", "\ufffd", text))


def attributes(tag: str) -> dict[str, str]:
    """Give the attributes of a tag, the first of each name, as browsers do."""
    found = reversed(re.findall(ATTRIBUTE, tag[:8000]))
    return {name.lower(): unescape("".join(values)) for name, *values in found}


def strip_html(page: str) -> str:
    """Give the readable text of an HTML page, a line for each block."""
    page = re.sub(NOT_SHOWN, "", page.replace("\n", " "))
    page = re.sub("(?i)<(?=t[dh])", " <", re.sub(BLOCK_TAG, "\n", page))
    page = re.sub("(?i)</?[a-z!?][^<>]*>?", "", page)
    lines = (" ".join(line.split()) for line in unescape(page).split("\n"))
    return "\n".join(filter(None, lines))


# Words for code, in the languages of most mail. Those of scripts without spaces, or with signs that
# are no letters to Python, may stand in the middle of a word.
CODE_WORDS = (
    r"(?:\b(?:(?:pass)?codes?|otp|pin|password|token|verification|2fa|tan|(?:two|2)[- ]?(?:factor|step)|c[oó]digos?"
    r"|codice|cod(?:ul)?|k[oó]d\w{0,8}|koodi\w{0,3}|mã|sandi|senha|clave|contraseña|mot de passe|passwort|kennwort"
    r"|wachtwoord|hasło|şifre\w{0,5}|код\w{0,3}|парол\w{0,3}|κωδικ\w{1,3})\b|\w(?:code|koodi?|kode|kod)\b"
    r"|码|碼|コード|認証番号|暗証番号|パスワード|인증|코드|비밀번호|رمز|كود|کد|कोड|ओटीपी|पिन|รหัส|โค้ด|קוד|কোড)")
CODE_TOKEN = (r"(?a)(?<![\w.,/#$€£¥+@=&?%-])(?:\d(?: \d){3,7}|\d{2}(?: \d{2}){2,3}|\d{3} \d{3}"
              r"|[A-Z]{1,3}-\d{4,8}|(?=[A-Z]{4}-[A-Z]{4}|[A-Z-]*\d)[A-Z0-9]{3,5}-[A-Z0-9]{3,5}"
              r"|(?=[A-Za-z]{0,9}\d)[A-Za-z0-9]{4,10})(?![\w%/@€£$=-]|[.,:]\w| \d{2,4}\b)")
# How sure a code is that stands between \x01 and \x02, by the first that fits: 0 is none, 3 the surest.
CODE_VERDICTS = (
    (r"(?i)(?:\b(?:order|invoice|ticket|case|ref|reference|account|zip|postal|post|area|tel|phone|call"
     r"|fax|mobile|error|status|ext|room|suite|box|version|bestellung|rechnung|kundennummer|plz|pedido|factura|fatura"
     r"|commande|facture|ordine|fattura|zamówienie|sipariş|pesanan|заказ|telefon|teléfono)"
     r"(?: ?(?:code|number|no|nr|id|is))?|đơn hàng|订单|注文番号|[$€£¥#№]|\b\d{1,3}\)?)[\s.:#-]{0,3}\x01", 0),
    (r"(?i)\x02 ?(?:usd|eur|gbp|dollars?|euros?|seconds?|minutes?|hours?|days?|items?"
     r"|points?|users?|minuten|minutos|minuti|zł|руб)\b", 0),
    (rf"(?i){CODE_WORDS}[^\w\n]{{0,4}}(?:(?:is|to|for|below|number)\b(?: [\w.-]{{1,20}}){{0,4}})?\W{{0,9}}\x01", 3),
    (rf"(?i)\x02\W{{0,4}}(?:is|as|to)\b[^.\n]{{0,40}}?{CODE_WORDS}", 3),
    (r"\x01(?:(?:19|20)\d\d\x02|[^\x02]*[a-z])", 0),  # a year, a word
    (r"[A-Z]{2} \x01\d{5}\x02", 0),  # a postal code
    (rf"(?is){CODE_WORDS}.*\x01", 2), (rf"(?is)\x02.*{CODE_WORDS}", 1),
)


def codes_in(text: str) -> list[str]:
    text = unicodedata.normalize("NFC", text[:TEXT_LIMIT])
    text = re.sub(r"\d", lambda digit: str(int(digit[0])), text)  # of any script
    flat = "\n".join(" ".join(line.split()) for line in re.sub(URL, " ", text).split("\n"))
    weights: dict[str, int] = {}
    end, weight = 0, 0
    for match in re.finditer(CODE_TOKEN, flat):
        start, code = match.start(), match[0]
        if not weight or flat[end:start].strip(" \n,;|"):  # it is not one of a list
            after = flat[match.end() : match.end() + 60]
            around = f"{flat[max(0, start - 90) : start]}\x01{code}\x02{after}"
            weight = next((sure for words, sure in CODE_VERDICTS if re.search(words, around)), 0)
        end, code = match.end(), code.replace(" ", "")
        weights[code] = max(weight, weights.get(code, 0))
    best = max(weights.values(), default=0)
    return [code for code, weight in weights.items() if weight == best > 0]


def safe_filename(name: str) -> str:
    """Turn a sender's file name into one of 100 characters that is safe to save under."""
    name = name.replace("\\", "/").rpartition("/")[2]
    name = "".join(c if c.isprintable() and c not in '<>:"|?*;%' else "_" for c in name)
    return name.strip(" .")[-100:].strip(" .") or "attachment"


def disposition(kind: str, filename: str) -> str:
    """Write a Content-Disposition, the name in ASCII and as it is (RFC 6266, appendix D)."""
    plain, quoted = re.sub(r"[^ -~]", "_", filename), quote(filename, safe="")
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quoted}"


def part_headers(part: Part) -> dict[str, str]:
    """Give the header fields a part is served with; only what cannot run is shown inline."""
    kind = true_type(part)
    if re.search("html|xml|script|svg|xsl|flash|java|wasm|replace", kind):
        kind = "application/octet-stream"
    harmless = re.fullmatch("text/plain|image/(?:png|jpeg|gif|webp|bmp|avif)", kind)
    if kind.startswith("text/"):
        charset = part.parameters.get("charset", "")
        known = re.fullmatch(r"(?a)[\w.:+-]{1,40}", charset) and find_codec(charset)
        kind += f"; charset={charset if known else 'utf-8'}"
    shown = disposition("inline" if harmless else "attachment", safe_filename(file_name(part)))
    return {"Content-Type": kind, "Content-Disposition": shown, "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox"}


def view_html(mail: Email) -> str:
    """Give the HTML body as a page for a sandboxed frame, with the images that came along in it.

    Links open in a tab of their own. What no policy stops (a refresh, a base, a DNS lookup ahead)
    is made a <meta> that says nothing: to cut it out could join what stood apart."""
    def own(tag: re.Match[str]) -> str:
        name, found = tag[1].lower(), attributes(tag[2])
        if name in ("a", "area"):
            here = found.get("href", "").strip().startswith("#")
            return f"<{tag[1]} {'target=_self' if here else 'target=_blank rel=noopener'}{tag[2]}"
        style = r"(?i)\s*(?:alternate\s+)?stylesheet\s*"
        shown = name == "link" and re.fullmatch(style, found.get("rel", ""))
        return tag[0] if shown else f"<meta http-equiv=off{tag[2]}"

    page = re.sub(r"(?i)<(a|area|meta|base|link)((?=[\s/>])[^<>]{0,4000})", own, embed_images(mail))
    # What is looked ahead for and then taken is taken once: one comment, not as many as fit.
    before = r"(?is)\A(?:(?:(?=([\s\ufeff]+|<!--.*?-->|<\?[^>]*>))\1)*<!doctype[^>]*>)?"
    return re.sub(before, r"\g<0><base target=_blank>", page, count=1)


def embed_images(mail: Email) -> str:
    """Give the HTML body with its cid: addresses (RFC 2392) made data, while there is room."""
    room = EMBEDDED_LIMIT

    def unquoted(text: str) -> str:
        return unquote(unescape(text)).strip(" <>").lower()

    def embedded(cid: re.Match[str]) -> str:
        nonlocal room
        part = parts.get(unquoted(cid[3] or cid[4]))
        kinds = (true_type(part), mimetypes.guess_type(part.filename)[0] or "") if part else ()
        kind = next((kind for kind in kinds if kind.startswith("image/")), "")
        if not part or not kind or len(part.raw) > room:
            return cid[0]
        data = base64.b64encode(part.content).decode()
        room -= len(data) + 100
        return f"{cid[1] or ''}{cid[2]}data:{kind};base64,{data}"

    parts = {unquoted(name): p for p in mail.parts for name in (p.filename, p.content_id) if name}
    # A cid goes as far as its quotes, which may be entities, else to a space or a bracket.
    address = (r"""(?is)("|'|&quot;|&apos;|&#0?3[49];|&#x2[27];)?(\s{0,9})"""
               r"""cid(?::|%3a|&#58;|&#x3a;|&colon;)"""
               r"""(?:(?(1)(.{1,600}?)(?=\1)|(?!))|([^\s"'<>)\\]{1,300}))""")
    return re.sub(address, embedded, mail.page) if parts else mail.page


# An item is what Mailpit's list shows of a message, with three more for searches. What of it cannot
# change is kept packed, as the JSON of its values: some 500 octets, where a dict takes 4,000.
Item = Fields
PACKED_FIELDS = ("ID MessageID From To Cc Bcc ReplyTo Subject Created Username Size Attachments "
                 "Snippet inline whole")  # how many inline parts; whether the snippet is the text


def summarise(mail: Email) -> bytes:
    """Give the values of PACKED_FIELDS, packed."""
    record, (sender, *others) = mail.record, mail.people.values()
    text = " ".join((strip_html(mail.page[:32000]) or mail.plain[:32000]).split())
    files, inline = len(mail.having("attachment")), len(mail.having("inline"))
    whole = not mail.page and not mail.attachments and len(mail.plain) <= SNIPPET
    message_id = header(mail.fields, "message-id").strip("<> ")[:1000]
    values = (record.id, message_id or f"{record.id}@smtprelay", sender[0], *others,
              mail.subject[:1000], record.received_at, record.user, len(mail.raw), files,
              text[:SNIPPET] + "..." * (len(text) > SNIPPET), inline, whole)
    return dumps(values, ensure_ascii=False).encode("utf-8", "replace")


def clean_tags(tags: Iterable[str]) -> list[str]:
    """Sort tags, the first spelling of each, without the signs that Mailpit takes out of them."""
    cleaned = (" ".join(re.sub(r"[^\w .@-]", "", tag).split())[:100] for tag in tags)
    tags = {tag.lower(): tag for tag in reversed(list(cleaned)) if tag}
    return sorted(tags.values(), key=str.lower)


def clean(text: str) -> str:
    """Bring text and search words into one form: lower case, single spaces, no brackets."""
    return " ".join(re.sub('[\ufeff<>",;()]', " ", text).lower().split())


Test = Callable[[Item], bool]
Query = tuple[tuple[Test, bool], ...]  # a compiled search: tests, each with what it must say
ALL: Query = ()
SEARCH_FIELDS = {  # where a word is looked for; Mailpit has no recipient:
    "to": "To", "from": "From", "cc": "Cc", "bcc": "Bcc", "reply-to": "ReplyTo",
    "addressed": "From To Cc Bcc ReplyTo", "recipient": "To Cc Bcc",
    "subject": "Subject", "message-id": "MessageID", " ": "From To Cc Bcc ReplyTo Subject Snippet",
}
SEARCH_STATES = {"is:read": "Read", "is:unread": "Read", "is:tagged": "Tags",
                 "has:attachment": "Attachments", "has:inline": "inline"}
SEARCH_LIMITS: dict[str, tuple[str, Any]] = {
    "larger": ("Size", int.__gt__), "smaller": ("Size", int.__lt__),
    "before": ("Created", str.__lt__), "after": ("Created", str.__ge__)}


def words_of(value: Any) -> str:
    """Join what stands in a text, a person, or a list of them."""
    values = value.values() if isinstance(value, dict) else value
    return value if isinstance(value, str) else " ".join(map(words_of, values))


def holds(name: str, word: str, item: Item) -> bool:
    """Whether a message holds a search word in a field; where that is all signs, as it stands.

    In any field (" ") also means its text, HTML, links, and the names of its parts."""
    def texts() -> Iterator[Any]:
        yield [item[field] for field in SEARCH_FIELDS[name].split()]
        if name == " " and not item["whole"]:
            mail = item["open"]()
            page = strip_html(mail.page[:SEARCH_LIMIT])
            yield mail.plain, page, mail.links, [part.filename for part in mail.parts]

    shape = clean if clean(word) else str.strip
    return any(word in shape(words_of(text)) for text in texts())


def matches(query: Query, item: Item) -> bool:
    return all(test(item) == wanted for test, wanted in query)


def compile_query(text: str, zone: str = "") -> Query:
    """Compile Mailpit's search words; any other word is looked for in the text.

    All terms must hold; a leading - or ! turns one round, double quotes keep one together. `zone`
    names the time zone of before: and after:, the machine's where it is not known."""
    tests: list[tuple[Test, bool]] = []
    terms = re.findall(r'(?:"[^"]*"?|[^\s"])+', text[:10000])
    # Words come last, for they may read the message.
    for term in sorted(terms, key=lambda term: ":" not in term):
        found = re.fullmatch(r"(?s)\s*([-!]?)(\S.*?)\s*", term.replace('"', ""))
        test = compile_term(found[2], zone) if found else None
        tests += [(test, not found[1])] if found and test else []
    return tuple(tests)


def compile_term(term: str, zone: str) -> Test | None:
    """Compile one term; None where nothing stands behind a field: "from:" is yet being typed."""
    name, colon, behind = term.lower().partition(":")
    value = clean(behind)
    if state := SEARCH_STATES.get(f"{name}:{value.rstrip('s')}"):
        return lambda item: bool(item[state]) is (value != "unread")
    if colon and not behind and name in (*SEARCH_FIELDS, *SEARCH_LIMITS, "is", "has", "tag"):
        return None
    if value and name in SEARCH_FIELDS:
        return partial(holds, name, value)
    if value and name == "tag":
        return lambda item: value in map(str.lower, item["Tags"])
    if name in SEARCH_LIMITS:
        field, compare = SEARCH_LIMITS[name]
        limit = search_size(value) if field == "Size" else search_moment(value, zone)
        if limit:
            return lambda item: compare(item[field], limit)
    return partial(holds, " ", clean(term) or term)


def misread_terms(query: Query) -> list[str]:
    """Return the terms whose date or size cannot be read; they are looked for as words."""
    words = ("".join(test.args) for test, _ in query if isinstance(test, partial))
    return [word[1:] for word in words if re.match(f" (?:{'|'.join(SEARCH_LIMITS)}):.", word)]


def search_size(value: str) -> int:
    """Read a size such as 2kb or 1.5m, 0 where it is none."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,9})?) ?([km]?)b?", value)
    return int(float(match[1]) * 1024 ** " km".index(match[2] or " ")) if match else 0


# As in ISO 8601, in America, in Germany, and with a month's name.
DATES = ("%Y-%m-%d|%Y-%m|%Y|%Y/%m/%d|%Y/%m|%Y.%m.%d|%m/%d/%Y|%d.%m.%Y"
         "|%d %b %Y|%d %B %Y|%b %d %Y|%B %d %Y")
CLOCKS = "| %H:%M| %H:%M:%S| %H:%M%z| %H:%M:%S%z| %I:%M %p| %I %p"


def search_moment(value: str, zone: str = "") -> str:
    """Read a date or time as people write it, as UTC to the second; "" where it is none."""
    if re.fullmatch("[0-9]{9,10}|[0-9]{13}", value):  # seconds or milliseconds since 1970
        return iso_time(int(value[:10]))[:19]
    here = None
    with suppress(ValueError, LookupError, OSError):
        import zoneinfo

        here = zoneinfo.ZoneInfo(zone) if zone else None
    text = re.sub(r"(?<=:\d\d)\.\d+|(?<=\d)(?:ST|ND|RD|TH)\b|(?<=[A-Z])\.", "", value[:60].upper())
    text = re.sub(r"(?<=\d)(?:T(?=\d)| ?(?=[AP]M))", " ", text)
    said = text, f"{datetime.datetime.now(here):%Y-%m-%d} {text}"  # a time alone is of today
    for moment, date, clock in itertools.product(said, DATES.split("|"), CLOCKS.split("|")):
        with suppress(ValueError, OverflowError, OSError):
            when = datetime.datetime.strptime(moment, date + clock)
            when = when.replace(tzinfo=when.tzinfo or here)
            return when.astimezone(datetime.timezone.utc).isoformat()[:19]
    return ""


class Entry(NamedTuple):
    """A message in the inbox: its place, what a person did, what is shown of it, packed."""

    id: str
    stem: str
    sequence: int
    read: bool = False
    given: list[str] | None = None  # tags in place of those found
    found: Sequence[str] = ()  # the tags that it came with, and those by rule
    packed: bytes = b""

    @property
    def tags(self) -> Sequence[str]:
        """The tags as far as known."""
        return self.found if self.given is None else self.given


class Listing(NamedTuple):
    """Some messages of a list, newest first, with how many it has in all."""

    items: list[Item]
    total: int
    unread: int


class Inbox:
    """The index of all messages: order, read flags, tags, waiting.

    `first` is the first sequence number, above those of an earlier run where clients outlive it."""

    def __init__(self, spool: Spool, log: Log, first: int = 1,
                 rules: Iterable[tuple[str, str]] = ()) -> None:
        self.spool, self.log = spool, log
        self.changed = Condition(Lock())
        self.entries: dict[str, Entry] = {}  # oldest first
        self.last, self.closed, self.deleted = first - 1, False, 0
        self.rules = [(tag, compile_query(words)) for tag, words in rules]
        self.kept: dict[str, tuple[bool, list[str] | None]] = {}  # of messages not yet added
        self.touched = False
        with suppress(Exception):  # not there, or torn in whatever way
            if spool.on_disk:
                kept = loads(spool.sealer.unseal(read_whole(spool.path(SEEN)), SEEN))
                self.kept = {id: (read, tags) for id, (read, tags) in kept.items()}

    def add(self, stem: str) -> int:
        """Append a message unless it is there; give its sequence number."""
        with self.changed:
            id = stem[11:27]
            if id not in self.entries:
                self.last += 1
                self.entries[id] = Entry(id, stem, self.last, *self.kept.pop(id, ()))
                self.changed.notify_all()
            return self.entries[id].sequence

    def entry(self, id: str) -> Entry:
        """Give the entry of a message, or of the `latest`; KeyError when it is gone."""
        with self.changed:
            return self.entries[next(reversed(self.entries), "") if id == "latest" else id]

    def delete(self, ids: Iterable[str] | None = None) -> list[str]:
        """Forget messages, all for None; give the ids of those that were here."""
        with self.changed:
            gone = [entry for entry in self.chosen(ids) if self.entries.pop(entry.id, None)]
            self.touched |= any(entry.read or entry.given is not None for entry in gone)
            self.deleted += len(gone)
            return [entry.id for entry in gone]

    def close(self) -> None:
        """Send every waiter away empty-handed."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def wait(self, query: Query, since: int | None = None, timeout: float = 5.0,
             gone: Callable[[], bool] = lambda: False) -> Item | None:
        """Block until a message matches; None after `timeout` seconds.

        With `since`, the oldest match numbered above it; without, the newest that is there, or
        else the next to come. A caller that is `gone`, which is asked each second, is sent away."""
        deadline, seen = monotonic() + timeout, since or 0
        while True:
            last, fresh = self.last, self.after(seen)
            found = next(self.matching(fresh if since is None else fresh[::-1], query), None)
            left = deadline - monotonic()
            if found or left <= 0 or self.closed or gone():
                return found
            since = seen = last
            with self.changed:
                if self.last <= seen and not self.closed:
                    self.changed.wait(min(left, 1.0))

    def after(self, since: int = 0) -> list[Entry]:
        """The entries numbered above `since`, newest first."""
        with self.changed:
            newest_first = reversed(self.entries.values())
            return list(takewhile(lambda entry: entry.sequence > since, newest_first))

    def chosen(self, ids: Iterable[str] | None) -> list[Entry]:
        """The entries with some ids, all for None."""
        return list(filter(None, map(self.entries.get, [*self.entries] if ids is None else ids)))

    def matching(self, entries: Iterable[Entry], query: Query = ALL) -> Iterator[Item]:
        """Show the messages that match; one that is gone meanwhile is forgotten."""
        for entry in entries:
            try:
                item = self.shown(entry)
                if matches(query, item):
                    yield item
            except (KeyError, FileNotFoundError, SpoolError):
                self.delete([entry.id])
            except OSError as error:
                self.log.warn("unreadable", id=entry.id, error=error)
            except Exception:  # a fault of ours with one message is not one with all
                self.log.bug("unsearchable")

    def shown(self, entry: Entry) -> Item:
        """Show an entry, which is summed up on first reading."""
        if not entry.packed:
            mail = self.mail(entry.id)
            entry = entry._replace(packed=summarise(mail))
            tags = decode_words(header(mail.fields, "x-tags")).split(",")
            for path in mail.recipients:
                tags += path.rpartition("@")[0].split("+")[1:]
            tags += [tag for tag, query in self.rules if matches(query, self.shown(entry))]
            entry = entry._replace(found=tuple(clean_tags(tags)))
            self.change([entry.id], packed=entry.packed, found=entry.found)
        return {**dict(zip(PACKED_FIELDS.split(), loads(entry.packed))), "Read": entry.read,
                "Tags": list(entry.tags), "sequence": entry.sequence,
                "open": partial(self.mail, entry.id, SEARCH_LIMIT)}

    def mail(self, id: str, limit: int = -1) -> Email:
        """Read a message, so many octets of it; KeyError or OSError when it is gone."""
        entry = self.entry(id)
        record, content = self.spool.fetch(entry.stem, done=True)
        with content:
            return Email(record, content.read(limit), entry.sequence)

    def get(self, id: str, query: Query = ALL) -> Item | None:
        """Find a message by its id; `latest` is the newest that matches the query."""
        if id == "latest":
            return self.wait(query, timeout=0)
        return next(self.matching(self.chosen([id])), None)

    def search(self, query: Query = ALL, start: int = 0, limit: int = 50) -> Listing:
        """List the messages that match, newest first; limit 0 is none."""
        entries = self.after()
        if query:  # else only the page itself needs summaries
            entries = self.chosen(item["ID"] for item in self.matching(entries, query))
        page = entries[start : start + limit if limit else None]
        unread = sum(not entry.read for entry in entries)
        return Listing(list(self.matching(page)), len(entries), unread)

    def counts(self) -> tuple[int, int, dict[str, int]]:
        """Count all messages, those unread, and those with each tag, as far as known."""
        self.summarise_rest(within=0.2)
        entries = self.after()
        tags = Counter(tag for entry in entries for tag in entry.tags)
        unread = sum(not entry.read for entry in entries)
        return len(entries), unread, dict(sorted(tags.items()))

    def change(self, ids: Iterable[str] | None, **new: Any) -> None:
        """Give entries, all for None, other values, such as `read`."""
        with self.changed:
            self.entries |= {e.id: e._replace(**new) for e in self.chosen(ids)}
            self.touched |= "packed" not in new

    def tag(self, ids: Iterable[str], tags: Iterable[str]) -> None:
        """Replace the tags of messages."""
        self.change(ids, given=clean_tags(tags))

    def rename_tag(self, old: str, new: str = "") -> None:
        """Rename a tag on every message, or take it off where there is no new name."""
        self.summarise_rest()
        for entry in self.after():
            renamed = [new if tag.lower() == old.lower() else tag for tag in entry.tags]
            if renamed != list(entry.tags):
                self.tag([entry.id], renamed)

    def summarise_rest(self, within: float = math.inf, most: int | None = None) -> None:
        """Sum up what nobody has looked at yet of the newest messages, for so many seconds."""
        deadline = monotonic() + within
        for _ in self.matching(entry for entry in self.after()[:most] if not entry.packed):
            if self.closed or monotonic() > deadline:
                break

    def save(self) -> None:
        """Write what a person did since the last time beside the messages: read state and tags."""
        if not self.touched or not self.spool.on_disk:
            return
        with self.changed:
            self.touched = False
            kept = {**self.kept, **{entry.id: (entry.read, entry.given) for entry in self.chosen(None)
                                    if entry.read or entry.given is not None}}
        try:
            sealed = self.spool.sealer.seal(dumps(kept).encode(), SEEN)
            replace_file(self.spool.path(SEEN), sealed)
        except OSError as error:  # of no weight beside the mail: tried again
            self.log.warn("inbox_not_saved", error=error)
            self.touched = True


def summary_json(item: Item) -> Fields:
    """Mailpit's MessageSummary: one of a list."""
    return {name: value for name, value in item.items() if name[0].isupper()}


def attachment_json(part: Part) -> Fields:
    """Mailpit's Attachment: size and checksums are those of the decoded content."""
    content = part.content
    return {
        "PartID": part.number, "ContentType": true_type(part), "ContentID": part.content_id,
        "FileName": file_name(part), "Size": len(content),
        "Checksums": {name: hashlib.new(name, content, usedforsecurity=False).hexdigest()
                      for name in ("MD5", "SHA1", "SHA256")},
    }


def waited_json(item: Item, mail: Email) -> Fields:
    """Mailpit's Message: one whole, with sequence number, links and codes, which are ours."""
    listed, post = (header(mail.fields, f"list-unsubscribe{end}") for end in ("", "-post"))
    found = [re.sub(r"\s", "", link) for link in re.findall(r"<([^<>]{1,4000})>", listed)]
    links = [link for link in found if re.match("(?i)(?:https?://|mailto:).", link)]
    wrong = ""
    if (listed or post) and (not links or links != found):
        wrong = "it names no link, or one that is not of http, https or mailto"
    elif post and (post != "List-Unsubscribe=One-Click" or "https:" not in str(links).lower()):
        wrong = "List-Unsubscribe-Post is not List-Unsubscribe=One-Click, or there is no https link"
    return {
        **summary_json(item), "Subject": mail.subject, "Date": mail.date or item["Created"],
        "ReturnPath": mail.reverse_path, "HTML": mail.page, "Text": mail.plain or mail.text,
        "Inline": [attachment_json(part) for part in mail.having("inline")],
        "Attachments": [attachment_json(part) for part in mail.having("attachment")],
        "ListUnsubscribe": {"Header": listed, "Links": links, "HeaderPost": post, "Errors": wrong},
        "Sequence": item["sequence"], "Links": mail.links, "Codes": mail.codes,
    }


def headers_json(mail: Email) -> dict[str, list[str]]:
    """The header fields by name, sorted and spelt as Go does (Message-Id).

    Return-Path and Bcc are there as the envelope has them, as in Mailpit."""
    found = grouped([(string.capwords(name, "-"), value) for name, value in mail.fields])
    bcc = ", ".join(person["Address"] for person in mail.people["bcc"])
    ours = {"Return-Path": [f"<{mail.reverse_path}>"], **({"Bcc": [bcc]} if bcc else {})}
    return dict(sorted({**ours, **found}.items()))


def grouped(headers: Headers) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for name, value in headers:
        values.setdefault(name, []).append(value)
    return values


class BadRequest(ValueError):
    """A request that will not do; the text names the field and goes into {"Error": text}."""


MAILBOX = r"(?a)[^\s<>()\[\]\\,;:\"@]{1,250}@[^\s<>()\[\]\\,;:\"@]{1,250}"
OWN_FIELDS = ("(?i)to|from|cc|bcc|reply-to|date|subject|content-.*|mime-version|x-tags|received"
              "|x-envelope-.*")


def take_field(body: Any, path: str, default: Any) -> Any:
    """Take a field of default's type out of a JSON object, its name in any case as in Go."""
    outer, _, name = path.rpartition(".")
    if not isinstance(body, dict):
        raise BadRequest(f"{outer or 'body'}: must be an object")
    value = {key.lower(): value for key, value in body.items()}.get(name.lower())
    if not isinstance(value, (type(default), type(None))):
        raise BadRequest(f"{path}: must be of type {type(default).__name__}")
    return default if value is None else value


def read_mailbox(value: Any, path: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or not re.fullmatch(MAILBOX, value):
        raise BadRequest(f"{path}: invalid address {str(value)[:100]!r}")
    return value


def read_person(value: Any, path: str) -> tuple[str, str]:
    """Read a {"Name", "Email"} object: as it is written into a field, and the address alone."""
    name = take_field(value, f"{path}.Name", "").translate(NO_BREAKS)[:200].strip()
    address = read_mailbox(take_field(value, f"{path}.Email", ""), f"{path}.Email")
    return f"{phrase(name)} <{address}>" if name else address, address


def read_each(body: Any, path: str, read: Callable[[Any, str], Value]) -> list[Value]:
    return [read(v, f"{path}[{n}]") for n, v in enumerate(take_field(body, path, []))]


def compose(body: Any) -> tuple[bytes, str, list[str]]:
    """Build content, reverse-path, recipients from POST /api/v1/send; raises BadRequest.

    Every octet of it is written here, for the email package decodes what it is given and
    writes it anew: an encoded word could become a field of its own (CVE-2024-6923)."""
    sender = read_person(take_field(body, "From", {}), "From")
    to, cc, reply_to = (read_each(body, name, read_person) for name in ("To", "Cc", "ReplyTo"))
    recipients = [address for _, address in (*to, *cc)] + read_each(body, "Bcc", read_mailbox)
    if not recipients:
        raise BadRequest("To: no recipients")
    fields = {"Date": email.utils.formatdate(), "Subject": take_field(body, "Subject", ""),
              "X-Tags": ", ".join(clean_tags(map(str, take_field(body, "Tags", []))))}
    for name, value in take_field(body, "Headers", {}).items():
        if re.fullmatch(OWN_FIELDS, name) or not re.fullmatch(r"[!-9;-~]{1,76}", name):
            raise BadRequest(f"Headers: cannot set {name[:76]!r}")
        fields[name] = str(value)
    if "message-id" not in map(str.lower, fields):
        fields["Message-ID"] = f"<{token_hex(12)}@{sender[1].rpartition('@')[2]}>"
    try:
        head = {"From": [sender], "To": to, "Cc": cc, "Reply-To": reply_to}
        lines = [f"{name}: " + ",\r\n ".join(written for written, _ in people)
                 for name, people in head.items() if people]
        lines += [f"{name}: {folded(value, name)}" for name, value in fields.items() if value]
        content = "\r\n".join([*lines, "MIME-Version: 1.0", ""]).encode() + written_body(body)
    except UnicodeEncodeError as e:  # half of a pair of surrogates
        raise BadRequest(f"body: {e}") from None
    return content, sender[1], list(dict.fromkeys(recipients))


def folded(value: str, name: str = "") -> str:
    """Write a field's value, folded at spaces; what is not ASCII, or one long word, is encoded."""
    value = value.translate(NO_BREAKS)
    charset = "utf-8" if max(map(len, value.split(" "))) > 900 else None
    return email.header.Header(value, charset, header_name=name).encode(linesep="\r\n")


def phrase(name: str) -> str:
    """Write a name before an address."""
    return f'"{email.utils.quote(name)}"' if name.isascii() else folded(name)


def written_body(body: Any) -> bytes:
    """Write the MIME fields and the body: text, HTML and attachments."""
    text, page = (take_field(body, name, "") for name in ("Text", "HTML"))
    files = read_each(body, "Attachments", read_attachment)
    shown = [part for cid, part in files if cid and page]
    others = [part for cid, part in files if not (cid and page)]
    bodies = [written_text(b"plain", text)] if text or not page else []
    bodies += [multipart(b"related", [written_text(b"html", page), *shown])] if page else []
    return multipart(b"mixed", [multipart(b"alternative", bodies), *others])


def multipart(kind: bytes, parts: Sequence[bytes]) -> bytes:
    """Join parts, each with its fields; one alone stands for itself."""
    if len(parts) == 1:
        return parts[0]
    mark = token_hex(16).encode()
    joined = b"".join(b"--%s\r\n%s\r\n" % (mark, part) for part in parts)
    return (b'Content-Type: multipart/%s; boundary="%s"\r\n\r\n%s--%s--\r\n'
            % (kind, mark, joined, mark))


def written_text(kind: bytes, text: str) -> bytes:
    """Write a text part; its line ends are CRLF, whatever they were."""
    lines = re.sub(r"\r\n?|\n", "\r\n", text).rstrip("\r\n") + "\r\n"
    return (b"Content-Type: text/%s; charset=utf-8\r\n"
            b"Content-Transfer-Encoding: quoted-printable\r\n\r\n%s"
            % (kind, binascii.b2a_qp(lines.encode())))


def read_attachment(value: Any, path: str) -> tuple[str, bytes]:
    """Read an attachment; return its content id and the part, in base64 whatever it is."""
    name, cid, kind, coded = (take_field(value, f"{path}.{key}", "")
                              for key in ("Filename", "ContentID", "ContentType", "Content"))
    try:
        # Browsers put data:...; before it.
        content = base64.b64decode(coded.rpartition(",")[2], validate=True)
    except ValueError:
        raise BadRequest(f"{path}.Content: not base64") from None
    kind = (kind or first_octets_type(content[:600]) or mimetypes.guess_type(name)[0]
            or "application/octet-stream")
    name = safe_filename(name)
    if not (re.fullmatch(r"(?!(?i:multipart)/)[!-.0-~]+/[ -~]{1,200}", kind)
            and re.fullmatch(r"[!-;=?-~]{0,200}", cid)):
        raise BadRequest(f"{path}: cannot be of ContentType {kind[:100]!r}, ContentID {cid[:100]!r}")
    head = (f"Content-Type: {kind}\r\nContent-Transfer-Encoding: base64\r\n"
            f"Content-Disposition: {disposition('inline' if cid else 'attachment', name)}\r\n"
            + f"Content-ID: <{cid}>\r\n" * bool(cid))
    return cid, head.encode() + b"\r\n" + base64.encodebytes(content).replace(b"\n", b"\r\n")


# === 19 PAGE =================================================================
#
# The inbox and queue page: one HTML document that loads nothing from elsewhere. It talks to the API
# of HTTP and nothing else; whatever a mail says goes in as text, never as markup, and HTML mail is
# shown in a sandboxed frame. Its policy names the hashes of its own script and style, so no other
# can run.

PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>smtprelay</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'
 viewBox='0 0 16 16'%3E%3Cpath d='M1 3h14v10H1z' fill='%232456c8'/%3E%3Cpath
 d='M1.5 4 8 9l6.5-5' fill='none' stroke='white' stroke-width='1.3'/%3E%3C/svg%3E">
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#ffffff, #17171a); --wash: light-dark(#f8f7f5, #1d1d21);
  --line: light-dark(#e6e4e0, #2f2f35); --edge: light-dark(#918e88, #75747c);
  --ink: light-dark(#1c1b1a, #eae9e7); --soft: light-dark(#63605b, #a5a3a0);
  --pick: light-dark(#e8eefb, #27324b); --accent: light-dark(#2456c8, #93b4ff);
  --good: light-dark(#1b7340, #74c99a); --warn: light-dark(#8f5400, #e5b463);
  --bad: light-dark(#b0241c, #ff9489); --mono: ui-monospace, Menlo, Consolas, monospace;
}
.forwarded, .ok, .on { --tone: var(--good); }
.deferred, .retrying, .throttled { --tone: var(--warn); }
.failed { --tone: var(--bad); }
* { box-sizing: border-box; margin: 0; padding: 0; }
body:is([data-empty], :not([data-view=inbox])) :is(#tools, #list), [data-view=inbox] #side {
  display: none; }
body { display: grid; grid-template-rows: auto minmax(0, 1fr); height: 100dvh;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere;
  font: 14px/1.45 Inter, system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 20px; font-weight: 600; line-height: 1.3; letter-spacing: -.014em; }
h1:focus { outline: none; }
h2 { font-size: 13px; font-weight: 600; }
a { color: var(--accent); text-underline-offset: 2px; }
header, #strip, #tools, .row, [role=tablist], th, td { border-bottom: 1px solid var(--line); }
header, nav, #tools, .row div, .acts, [role=tablist], .view, .title, .try { display: flex; }
header, #tools, .view, .title { align-items: center; }
time, dt, th, .soft, nav a, nav span, #live, .hours, figcaption, #tools span, .tag, button.plain,
[role=tab], dialog p, dialog label { color: var(--soft); }
time { white-space: nowrap; }
pre, code, .mono { font: 12.5px/1.55 var(--mono); }
pre { white-space: pre-wrap; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
button, input { padding: 4px 10px; font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 6px; }
button { white-space: nowrap; cursor: pointer; }
button:hover, input { border-color: var(--edge); }
button[aria-pressed=true] { background: var(--pick); border-color: var(--accent); }
button.main { color: var(--paper); background: var(--accent); border-color: transparent; }
button.danger:hover { color: var(--bad); border-color: currentColor; }
button.plain { padding: 4px 6px; background: none; border-color: transparent; }
button.plain:hover { color: var(--ink); }
.busy::after { content: " …"; }
/* The bar */
header { gap: 4px 20px; padding: 5px 16px; }
nav, [role=tablist] { gap: 18px; }
nav a, [role=tab] { padding: 7px 0; border: 0; border-radius: 0; background: none;
  text-decoration: none; outline-offset: -2px !important; }
:is(nav a, [role=tab]):is(:hover, [aria-current=page], [aria-selected=true]) { color: var(--ink); }
:is([aria-current=page], [aria-selected=true]) { box-shadow: inset 0 -2px var(--accent); }
nav span, #live, th, .hours, figcaption, .row :is(time, .status, .files) { font-size: 12px; }
#search { display: block; width: 100%; max-width: 480px; margin: auto; border-color: var(--line); }
#search::placeholder { color: var(--soft); opacity: 1; }
#live::before, .status::before { content: ""; display: inline-block; width: 7px; height: 7px;
  margin-right: 6px; border-radius: 50%; background: currentColor; }
#live::before { color: var(--tone, var(--warn)); }
/* Two columns, the rail and the pane */
main { display: grid; grid-template-columns: clamp(320px, 32vw, 440px) minmax(0, 1fr); }
#rail, #pane { display: flex; flex-direction: column; min-height: 0; }
#rail, #strip, #search, .frame { background: var(--wash); }
#rail { border-right: 1px solid var(--line); }
#pane { overflow: auto; }
#strip { min-height: 115px; padding: 14px 16px 10px; }
#strip svg { display: block; width: 100%; height: 52px; shape-rendering: crispEdges; }
#strip rect { fill: var(--tone, var(--edge)); }
#strip .hit { fill: transparent; }
#strip g:hover .hit { fill: var(--pick); }
#strip .axis { fill: var(--line); }
.hours { display: grid; grid-template-columns: repeat(4, 1fr); }
figcaption { display: flex; flex-wrap: wrap; gap: 0 12px; margin-top: 4px; }
figcaption span, .status, .files { color: var(--tone, var(--soft)); white-space: nowrap; }
#tools { padding: 4px 10px 4px 16px; font-size: 12px; }
[role=search], #tools span, .title h1 { flex: 1; }
#list { flex: 1; overflow-y: auto; outline-offset: -2px; }
#rows { position: relative; }
.row { position: absolute; inset: 0 0 auto; height: 56px; padding: 8px 16px; contain: strict; }
.row div { gap: 10px; align-items: baseline; white-space: nowrap; cursor: default; }
.row .clip { flex: 1; min-width: 0; overflow: hidden; text-overflow: ellipsis; }
.row .clip bdi + bdi { margin-left: 6px; }
.row:hover { background: var(--paper); }
.row.cursor { box-shadow: inset 3px 0 var(--edge); }
.row[aria-selected=true] { background: var(--pick); box-shadow: inset 3px 0 var(--accent); }
.row:not(.unread) b { font-weight: inherit; }
.row.unread time { color: var(--accent); }
.tag, kbd { margin-right: 4px; padding: 0 5px; font-size: 11px; border: 1px solid var(--line);
  border-radius: 4px; }
/* A message */
#head { padding: 18px 24px 12px; }
#head h1, #head dd { max-height: 5lh; overflow: auto; }
dl { display: grid; grid: auto / auto 1fr; gap: 1px 16px; align-items: baseline; margin-top: 8px; }
.acts { flex-wrap: wrap; gap: 6px; margin-top: 14px; }
.code { font: 600 15px/1.4 var(--mono); letter-spacing: .06em; }
:is(dd, .view, .do) button { margin-left: 6px; padding: 1px 9px; }
[role=tablist] { flex: none; padding: 0 24px; overflow-x: auto; }
#body { flex: 1; padding: 18px 24px; outline-offset: -2px; }
:is(#body, .sheet) h2 { margin: 26px 0 6px; }
#body h2:first-child { margin-top: 0; }
#body.html { display: flex; flex-direction: column; min-height: 360px; padding: 0; }
.view { padding: 6px 24px; font-size: 12.5px; }
.view .soft { margin-right: auto; white-space: nowrap; }
.frame { flex: 1; overflow: auto hidden; border-top: 1px solid var(--line); }
iframe { display: block; width: 100%; min-width: 720px; height: 100%; border: 0; background: #fff;
  color-scheme: light; }
.phone iframe { width: 375px; min-width: 0; max-width: 100%; margin: auto; }
table { width: 100%; border-collapse: collapse; }
th { font-weight: 500; text-align: left; }
th, td { padding: 7px 16px 7px 0; vertical-align: top; }
td { min-width: 9ch; }
th:first-child { width: 30%; }
td.do { padding: 5px 0; white-space: nowrap; text-align: right; }
.box { padding: 9px 12px; background: var(--wash); border-radius: 6px; }
/* Overview, queue, accounts */
.sheet { width: 100%; max-width: 1040px; padding: 20px 24px; }
.sheet p, dialog p { margin-top: 6px; }
.title { gap: 8px; min-height: 32px; margin-bottom: 8px; }
.try { flex-wrap: wrap; gap: 8px; align-items: start; margin-top: 8px; }
.try code { flex: 1 400px; }
.try span { display: inline-block; max-width: 100%; }
#side { padding: 14px 16px; overflow: auto; }
#side table { margin-bottom: 20px; }
#side :is(th, td) { padding: 3px 0; border: 0; }
#side :is(th, td) + :is(th, td) { padding-left: 12px; text-align: right; }
/* What is said, what is asked */
#said { position: fixed; bottom: 20px; left: 50%; translate: -50%; max-width: 90vw;
  padding: 8px 16px; color: var(--paper); background: var(--ink); border-radius: 8px;
  opacity: 0; pointer-events: none; }
#said.shown { opacity: 1; }
#heard { position: fixed; clip-path: inset(50%); pointer-events: none; }
dialog { width: min(440px, 92vw); margin: auto; padding: 20px 24px; color: inherit;
  background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
dialog::backdrop { background: #0005; }
dialog h2 { font-size: 16px; }
dialog label { display: block; margin-top: 12px; font-size: 12px; }
dialog input { display: block; width: 100%; margin-top: 3px; font-size: 14px; color: var(--ink); }
dialog dl { gap: 6px 16px; margin: 12px 0; }
@media (min-width: 761px) { .back { display: none; } }
@media (max-width: 760px) {
  header { flex-wrap: wrap; gap: 4px 10px; padding: 6px 16px; }
  #live { margin-left: auto; font-size: 0; }
  [role=search] { order: 1; flex-basis: 100%; }
  #search { max-width: none; font-size: 16px; }
  main { grid-template-columns: minmax(0, 1fr); }
  #rail { border-right: 0; }
  header b, #pane thead, [data-open] #rail,
  [data-view=inbox]:not([data-open], [data-empty]) #pane { display: none; }
  body:is([data-empty], [data-view=queue], [data-view=accounts]) {
    & main { display: flex; flex-direction: column; overflow: auto; }
    & #rail { display: contents; }
    & #side { order: 1; overflow: visible; }
    & #pane { flex: none; overflow: visible; }
  }
  #head, #body, .sheet, .view, [role=tablist] { padding-left: 16px; padding-right: 16px; }
  .back { margin: -8px 0 4px -6px; }
  #pane :is(.acts, .view) button { padding: 3px 7px; }
  #pane tr { display: block; padding: 10px 0; border-bottom: 1px solid var(--line); }
  #pane td { display: grid; grid-template-columns: 9ch 1fr; padding: 1px 0; border: 0; }
  #pane td::before { content: attr(data-label); grid-row: span 3; color: var(--soft); }
  #pane td.do { display: block; padding-top: 6px; }
}
</style>
</head>
<body data-view="inbox">
<header>
  <b>smtprelay</b>
  <nav aria-label="Views">
    <a href="#/inbox">Inbox <span id="unread"></span></a>
    <a href="#/queue">Queue <span id="owed"></span></a>
    <a href="#/accounts">Accounts</a>
  </nav>
  <form role="search">
    <input id="search" type="search" autocomplete="off" spellcheck="false"
      aria-label="Search messages" placeholder="Search, or from: to: is:unread">
  </form>
  <span id="live" role="status"></span>
  <button id="theme" class="plain" aria-label="Switch between dark and light">◐</button>
  <button id="help" class="plain" aria-label="Keys and search words">?</button>
</header>
<main>
  <section id="rail" aria-label="Traffic and messages">
    <figure id="strip"></figure>
    <div id="tools"></div>
    <div id="list" role="listbox" tabindex="0" aria-label="Messages">
      <div id="rows" role="presentation"></div>
    </div>
    <div id="side"></div>
  </section>
  <section id="pane" aria-label="Reading"></section>
</main>
<div id="said" role="status"></div>
<div id="heard" role="status"></div>
<noscript>This page needs JavaScript; the same mail is at /api/v1/messages.</noscript>
<script>
'use strict';
/* Mail is hostile: what came from it enters the document as text, by h() alone, never as markup;
   only http(s) links can be followed; HTML mail is shown by the server in a sandboxed frame. */
const ROW = 56, PAGE = 50, LONG = 500000;
const OWED = ['received', 'forwarding', 'retrying'];
const ROOT = location.pathname.replace(/(\/(view\/[^/]*|search)|\/?)$/, '/');  /* behind a proxy */
const $ = id => document.getElementById(id);
const list = $('list'), rows = $('rows'), pane = $('pane');
const state = {
  view: 'inbox', id: '', message: null, tab: 'html', phone: innerWidth < 760, remote: false,
  query: '', listed: null, total: 0, unread: 0, rows: new Map(), cursor: -1,
  queue: {messages: [], next_hops: [], total: 0}, users: [], info: {}, stats: {}, token: '',
  lost: false, busy: false, warning: '', theme: '',
};

/* == Building == */
/* Makes the element `tag.class`; children are nodes and text, and nothing else can come in. */
function h(name, children, props = {}) {
  const [tag, kind] = name.split('.');
  const node = ['svg', 'g', 'rect'].includes(tag)
    ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [key, value] of Object.entries({class: kind, ...props})) {
    if (key.startsWith('on')) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...flat(children));
  return node;
}
const flat = children => [children].flat(9).filter(child => child || child === 0);
/* Replaces what a node holds; the focus stays on the control of the same key. */
function fill(node, children) {
  const key = node.contains(document.activeElement) && document.activeElement.dataset.key;
  node.replaceChildren(...flat(children));
  if (key) node.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}
const button = (name, work, kind = '', props) => h('button' + kind, name,
  {type: 'button', 'data-key': name, onclick: () => attempt(work), ...props});
const copier = text => button('Copy', () => copy(text), '', {'data-key': 'copy ' + text});
const follow = url => h('a', url, {href: url, target: '_blank', rel: 'noopener noreferrer'});
const bdi = text => h('bdi', text);
const sheet = (title, ...rest) => fill(pane, h('div.sheet', [h('div.title', title), rest]));
const soft = children => h('span.soft', children);
const status = word => h('span', word, {class: 'status ' + word});
const time = (at, text) => h('time', text, {datetime: at, title: dated(FULL, at)});
const ticking = at => h('time', relative(at), {'data-at': at, title: dated(FULL, at)});
const few = (all, draw, most = 500) => all.length <= most ? all.map(draw)
  : [all.slice(0, most).map(draw), ` and ${count(all.length - most)} more`];
const table = (heads, lines) => h('table', [
  h('thead', h('tr', heads.map(head => h('th', head, {scope: 'col'})))),
  h('tbody', few(lines, line => h('tr', line.map((inside, i) =>
    h(heads[i] ? 'td' : 'td.do', h('div', inside), {'data-label': heads[i]})))))]);

/* == Words and numbers == */
const enc = encodeURIComponent;
const count = n => Number(n || 0).toLocaleString('en');
const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? '' : 's'}`;
const person = who => who?.Name || who?.Address || 'nobody';
const names = text => text.split(/[\s,;]+/).filter(Boolean);
const short = text => text.length <= LONG ? text
  : text.slice(0, LONG) + '\n\n… cut here: download the message to read all of it.';
const BYTES = {style: 'unit', unit: 'byte', notation: 'compact', unitDisplay: 'narrow'};
const octets = n => n.toLocaleString('en', BYTES);
/* A URL in a text ends before what ends the sentence; brackets in it come in pairs. */
const WEB = /(https?:\/\/(?:\([^\s<>"()]*\)|[^\s<>"()])*(?:\([^\s<>"()]*\)|[^\s<>"'.,;:!?()\]}]))/i;
const linked = text => text.split(WEB).map((part, i) => i % 2 && i < 4e3 ? follow(part) : part);
const format = how => new Intl.DateTimeFormat('en-GB', how);
const CLOCK = format({timeStyle: 'short'}), SECONDS = format({timeStyle: 'medium'});
const DAY = format({day: 'numeric', month: 'short'});
const FULL = format({dateStyle: 'medium', timeStyle: 'long'});
const dated = (format, at) => isNaN(Date.parse(at)) ? '' : format.format(new Date(at));
const when = at => dated(dated(DAY, at) === DAY.format() ? CLOCK : DAY, at);
const AGO = new Intl.RelativeTimeFormat('en', {style: 'short', numeric: 'auto'});
function relative(at) {
  const seconds = Math.round((Date.parse(at) - Date.now()) / 1000);
  const [size, unit] = [[86400, 'day'], [3600, 'hour'], [60, 'minute'], [1, 'second']]
    .find(([size]) => size <= Math.abs(seconds) || size === 1);
  return AGO.format(Math.trunc(seconds / size), unit);
}

/* == Asking the server == */
async function api(method, path, body) {
  const {token, lost} = state;
  const headers = {'Content-Type': 'application/json', Authorization: 'Bearer ' + token};
  const answer = await fetch(ROOT + path, {method, headers, body: body && JSON.stringify(body)})
    .catch(() => null);
  state.lost = !answer;
  if (lost !== state.lost) render();
  if (!answer) throw new Error('Cannot reach the relay.');
  if (answer.status === 401) {
    if (token === state.token) await logIn();
    return api(method, path, body);
  }
  if (answer.ok) return answer;
  const text = await answer.text();  /* plain, as Mailpit's clients want it, or JSON */
  const said = text.startsWith('{"Error"') ? JSON.parse(text).Error : text.slice(0, 300);
  throw new Error(said || answer.statusText);
}
const get = async path => (await api('GET', path)).json();
const mail = (id, part = '') => `api/v1/message/${enc(id)}${part}`;
/* All requests that met a 401 wait for this one form. The token is kept in memory alone. */
function logIn() {
  const note = state.token ? 'That token was not accepted.' : 'This needs the API token.';
  const field = {name: 'token', label: 'Token', type: 'password', required: ''};
  return logIn.asked ||= ask('Log in', note, 'Log in', [field], '')
    .then(form => { state.token = form?.token || ''; logIn.asked = null; });
}

/* == Listening == */
const sleep = ms => new Promise(done => setTimeout(done, ms));
const attempt = work => (async () => work())().catch(error => say(error.message));
/* Does the work soon, never twice at once, and once more if it was asked for meanwhile. */
function soon(ms, work) {
  let next = null, last = Promise.resolve();
  return () => {
    next ||= last = last.then(() => sleep(ms)).then(() => { next = null; return attempt(work); });
  };
}
const reloadSoon = soon(60, reload), updateSoon = soon(150, updateMessage);
const figuresSoon = soon(500, loadFigures);
const everythingSoon = () => [reloadSoon, figuresSoon].forEach(load => load());
/* Has the relay do something, says that it is done, and looks at everything anew. */
async function change(done, method, path, body) {
  const answer = await api(method, path, body);
  say(done);
  everythingSoon();
  updateSoon();
  return answer;
}
/* Reads server-sent events by hand, because EventSource cannot send a token. */
async function listen() {
  const show = (word, kind = '') => Object.assign($('live'), {textContent: word, className: kind});
  for (let pause = 500; ; pause = Math.min(pause * 2, 15000)) {
    try {
      const answer = await api('GET', 'api/v1/events');
      pause = 500;
      show('live', 'on');
      attempt(loadFigures);
      reloadSoon();
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let part, kept = ''; !(part = await reader.read()).done;) {
        const heard = kept + part.value;
        if (heard.includes('data:')) everythingSoon();
        if (heard.includes(state.id)) updateSoon();
        kept = part.value.slice(-99);  /* where an event may have been cut */
      }
    } catch {
      if (!state.lost) everythingSoon();  /* refused, so look every while */
    }
    show(state.lost ? 'not reached' : 'reconnecting');
    await sleep(pause);
  }
}

/* == What is always there == */
function render() {
  const {view, id, unread, total, query, lost, busy, warning} = state, owed = state.queue.total;
  $('unread').textContent = unread ? count(unread) : '';
  $('owed').textContent = owed ? count(owed) : '';
  document.title = (unread ? `(${count(unread)}) ` : '') + 'smtprelay';
  for (const link of document.querySelectorAll('nav a'))
    link.setAttribute('aria-current', link.hash === '#/' + view ? 'page' : 'false');
  document.body.dataset.view = view;
  document.body.toggleAttribute('data-open', id !== '');
  document.body.toggleAttribute('data-empty', view === 'inbox' && !total && !query);
  const found = busy ? 'Searching' : query ? `${count(total)} found` : plural(total, 'message');
  fill($('tools'), [h(busy ? 'span.busy' : 'span', lost ? 'Cannot reach the relay'
    : [found, warning && `: ${warning}`], {role: 'status'}),
  !query && unread > 0 && button('Mark all read', () => mark([], true), '.plain'),
  total > 0 && button(query ? 'Delete found' : 'Delete all', deleteAll, '.plain')]);
  renderList();
  if (view === 'queue') renderQueue();
  else if (view === 'accounts') renderAccounts();
  else if (!id) renderOverview();
}

/* Reads what stands beside the mail. */
async function loadFigures() {
  const parts = ['info', 'stats', `queue?limit=${state.view === 'queue' ? 200 : 1}`, 'users'];
  const [info, stats, queue, {users}] = await Promise.all(parts.map(part => get('api/v1/' + part)));
  Object.assign(state, {info, stats, queue, users});
  renderStrip();
  render();
}

/* == The strip: what came in stands on the line, what went out hangs from it == */
const FLOWS = ['received', 'forwarded', 'deferred', 'failed'];
const sum = numbers => numbers.reduce((all, n) => all + n, 0);
function renderStrip() {
  const {hours} = state.stats, out = hour => sum(FLOWS.slice(1).map(key => hour[key]));
  const up = Math.max(1, ...hours.map(hour => hour.received));
  const scale = 49 / (up + Math.max(...hours.map(out))), line = up * scale;
  const box = (x, y, width, height, kind) => h('rect.' + kind, '', {x, y, width, height});
  const words = some => FLOWS.map(key => [key, sum(some.map(hour => hour[key]))])
    .filter(([key, n]) => n > 0 || key === 'received')
    .map(([key, n]) => h('span.' + key, `${count(n)} ${key} `));
  const caption = h('figcaption', words(hours));
  const column = (hour, i) => {
    const tall = FLOWS.map(key => hour[key] && Math.max(1, hour[key] * scale));
    const bars = FLOWS.map((key, n) =>
      box(i * 10, line + (n && 2) - tall[0] + sum(tall.slice(0, n)), 6, tall[n], key));
    return h('g', [box(i * 10 - 2, 0, 10, 52, 'hit'), bars],
      {onpointerenter: () => fill(caption, [`${dated(CLOCK, hour.at)}:`, words([hour])]),
        onpointerleave: () => fill(caption, words(hours))});
  };
  const plot = h('svg', [hours.map(column), box(0, line, 236, 1, 'axis')], {viewBox: '0 0 236 52',
    preserveAspectRatio: 'none', role: 'img', 'aria-label': `Last day: ${caption.textContent}`});
  const marks = hours.filter((_, i) => i % 6 === 0).map(hour => h('span', dated(CLOCK, hour.at)));
  fill($('strip'), [plot, h('div.hours', marks, {'aria-hidden': 'true'}), caption]);
}

/* == The list: only what is in sight is fetched, and only that is in the document == */
const rowAt = i => state.rows.get(i);
const indexOf = id => [...state.rows.keys()].find(i => rowAt(i).ID === id) ?? -1;
const slice = (start, limit) => get((state.query ? `api/v1/search?query=${enc(state.query)}&`
  : 'api/v1/messages?') + `start=${start}&limit=${limit}`);
function inSight() {
  const first = Math.floor(list.scrollTop / ROW) - 8;
  const last = first + Math.ceil(list.clientHeight / ROW) + 16;
  return [Math.max(0, first), Math.min(state.total, last)];
}
/* Fetches what is in sight anew, from the top for a new search. */
async function reload() {
  const {query, total} = state, same = query === state.listed;
  const [first, last] = same ? inSight() : [0, 0], start = first - first % PAGE;
  const slow = setTimeout(() => { state.busy = !same; render(); }, 200);
  const answer = await slice(start, PAGE * Math.max(1, Math.ceil((last - start) / PAGE)))
    .finally(() => { clearTimeout(slow); state.busy = false; });
  if (query !== state.query) return;
  const {cursor} = state, under = state.id || rowAt(cursor)?.ID, all = answer.messages;
  Object.assign(state, {listed: query, total: answer.messages_count, unread: answer.unread,
    warning: answer.Warnings?.join('; '), rows: new Map(all.map((row, i) => [start + i, row]))});
  const now = indexOf(under), grown = same ? Math.max(0, state.total - total) : 0;
  state.cursor = now >= 0 || !same ? now : Math.min(cursor, state.total - 1);
  rows.style.height = ROW * state.total + 'px';
  if (!same) list.scrollTop = 0;  /* mail that came in above does not move what is being read */
  else if (list.scrollTop > ROW) list.scrollTop += grown * ROW;
  const fresh = all.slice(0, total && !start ? grown : 0);
  if (fresh.length) $('heard').textContent = fresh.length > 1 ? `${fresh.length} new messages`
    : `New message from ${person(fresh[0].From)}: ${fresh[0].Subject}`;
  render();
}
/* Keeps each row that is still right, so that a press survives a live update. */
function renderList() {
  const old = [...rows.children], [first, last] = inSight(), wanted = [];
  for (let i = first; i < last; i++) {
    const node = rowAt(i) && drawRow(rowAt(i), i);
    if (node) wanted.push(old.find(other => other.isEqualNode(node)) || node);
  }
  if (wanted.length !== old.length || wanted.some((node, i) => node !== old[i]))
    rows.replaceChildren(...wanted);
  list.setAttribute('aria-activedescendant', 'row-' + state.cursor);
}
function drawRow(row, i) {
  const {cursor, info, id, total} = state;
  const kind = `row ${row.Read ? '' : 'unread'} ${i === cursor ? 'cursor' : ''}`;
  const to = [row.To, row.Cc, row.Bcc].flat();
  /* How mail ordinarily ends here goes without saying. */
  const ordinary = info.Delivery === 'hold' ? 'held' : 'forwarded';
  const node = h('div', [
    h('div', [h('span.clip', [h('bdi', h('b', person(row.From))),
      h('bdi.soft', ['to ', to[0]?.Address || 'nobody',
        to.length > 1 && ` +${to.length - 1}`])]), time(row.Created, when(row.Created))]),
    h('div', [h('span.clip', [h('bdi', h('b', row.Subject || '(no subject)')),
      h('bdi.soft', row.Snippet)]), few(row.Tags, tag => h('span.tag', tag), 2),
    row.Attachments > 0 && h('span.files', plural(row.Attachments, 'file')),
    row.Status !== ordinary && status(row.Status)])],
  {id: 'row-' + i, class: kind, role: 'option', 'data-id': row.ID,
    'aria-selected': String(row.ID === id), 'aria-posinset': i + 1, 'aria-setsize': total,
    onclick: () => open(row.ID)});
  node.style.top = i * ROW + 'px';
  return node;
}
function scrolled() {
  const [first, last] = inSight();
  if ((first < last && !rowAt(first)) || (last && !rowAt(last - 1))) reloadSoon();
  renderList();
}
function move(step) {
  if (state.view !== 'inbox' || !state.total) return;
  const i = state.cursor = Math.max(0, Math.min(state.total - 1, state.cursor + step));
  list.scrollTop = Math.max((i + 1) * ROW - list.clientHeight, Math.min(list.scrollTop, i * ROW));
  renderList();
  if (state.id && rowAt(i)) open(rowAt(i).ID);
}
/* Scrolls to a message that was opened by its address: ids sort the list, the newest first. */
async function reveal(id) {
  if (state.listed !== state.query) await reload();
  let low = 0, high = state.total;
  while (low < high && indexOf(id) < 0) {
    const middle = low + high >> 1, row = rowAt(middle) || (await slice(middle, 1)).messages[0];
    if (row?.ID > id) low = middle + 1;
    else high = middle;
  }
  if (indexOf(id) >= 0) return;
  list.scrollTop = low * ROW - list.clientHeight / 2;
  await reload();
}

/* == Where we are: #/inbox, #/message/ID, #/search/WORDS, #/queue, #/accounts == */
const go = (hash, instead) => instead ? location.replace(hash) : location.assign(hash);
const open = id => go('#/message/' + enc(id), state.id);
const listOf = query => query ? '#/search/' + enc(query) : '#/inbox';
function close() {
  go(listOf(state.query));
  list.focus({preventScroll: true});
}
function route() {
  const [, view, rest = ''] = location.hash.split('/');
  const word = decodeURIComponent(rest.replace(/%(?![0-9a-f]{2})/gi, '%25'));
  state.view = ['queue', 'accounts'].includes(view) ? view : 'inbox';
  state.id = view === 'message' ? word : '';
  if (state.message?.ID !== state.id) state.message = null;
  if (state.view === 'inbox' && !state.id) {
    const query = view === 'search' ? word : '';
    if (document.activeElement !== $('search')) $('search').value = query;
    if (query !== state.query) attempt(() => { state.query = query; return reload(); });
  }
  render();
  if (state.id) attempt(openMessage);
  else if (state.view !== 'inbox') attempt(loadFigures);
}

/* == Nothing open == */
function renderOverview() {
  const {info, listed, lost, query, total} = state, key = name => h('kbd', name);
  const host = location.hostname, port = info.SMTPPort || 2525;
  const lines = [`printf 'Subject: Hello\\r\\n\\r\\nIt works.\\r\\n' | curl -T - smtp://${host}:` +
      `${port}/me --mail-from me@example.com --mail-rcpt you@example.com`,
  `python3 -c "import smtplib; smtplib.SMTP('${host.replace(/[[\]]/g, '')}', ${port}).sendmail(` +
      `'me@example.com', 'you@example.com', 'Subject: Hello\\n\\nIt works.')"`];
  const mode = {hold: 'Mail is held here. Nothing leaves this machine until you release it.',
    relay: `Mail goes on to ${info.RelayHost || 'the smart host'}.`,
    mx: 'Mail goes straight to its recipients’ servers.'}[info.Delivery];
  const title = lost ? 'Cannot reach the relay' : listed === null ? 'Reading the mail'
    : total ? 'Nothing open' : query ? 'Nothing found' : 'No mail yet';
  sheet(h('h1', title, {class: listed === null && !lost ? 'busy' : ''}),
    h('p.soft', lost ? 'It has stopped, or the network is down; this page goes on trying.' : mode),
    total > 0 && h('p.soft', [key('j'), ' and ', key('k'), ' move, ', key('Enter'), ' opens, ',
      key('?'), ' shows every key.']),
    !lost && listed !== null && [h('h2', total || query ? 'Send another' : 'Send the first one'),
      lines.map(line => h('div.try', [
        h('code.box', line.split(' ').map(word => [h('span', word), ' '])), copier(line)]))]);
}

/* == A message == */
async function openMessage() {
  const {id} = state, known = state.message;
  const message = await get(mail(id)).catch(error => say(error.message));
  if (id !== state.id || known !== state.message) return;
  if (!message) return close();
  if (id === 'latest') history.replaceState(null, '', '#/message/' + enc(message.ID));
  Object.assign(state, {message, id: message.ID, remote: false});
  renderMessage();
  $('subject').focus({preventScroll: true});
  await reveal(message.ID);
  if (message !== state.message) return;
  const row = rowAt(state.cursor = indexOf(message.ID));
  if (row && !row.Read) { row.Read = true; state.unread -= 1; }
  render();
}
/* Redraws what delivery changes; the mail itself is left as it stands. */
async function updateMessage() {
  const {id} = state, message = id && await get(mail(id));
  if (!message || id !== state.message?.ID) return;
  state.message = message;
  renderHead();
  if (state.tab === 'delivery') renderBody();
}
const files = m => [...m.Attachments, ...m.Inline];
const links = m => [...m.Codes.map(code => ['code', code]), ...m.Links.map(url => ['link', url])];
const TABS = [  /* key, name, how many (0 hides it, true is not a number), what it shows */
  ['html', 'HTML', m => Boolean(m.HTML), showHTML],
  ['text', 'Text', () => true, m => h('pre', linked(short(m.Text || '(no text)')))],
  ['source', 'Source', () => true, async m =>
    h('pre', short(await (await api('GET', mail(m.ID, '/raw'))).text()))],
  ['headers', 'Headers', () => true, showHeaders],
  ['attachments', 'Attachments', m => files(m).length, showFiles],
  ['links', 'Links', m => links(m).length, m => table(['Kind', 'Text', ''], links(m).map(([kind,
    text]) => [soft(kind), /^https?:/i.test(text) ? follow(text) : bdi(text), copier(text)]))],
  ['delivery', 'Delivery', () => true, m => showDelivery(m.Delivery)],
];
const tabs = () => TABS.filter(([, , many]) => many(state.message));
const tabNow = () => tabs().find(([key]) => key === state.tab) || tabs()[0];
function renderMessage() {
  fill(pane, [h('div', '', {id: 'head'}), h('div', '', {role: 'tablist', 'aria-label': 'Parts'}),
    h('div', '', {id: 'body', role: 'tabpanel', tabindex: 0})]);
  pane.scrollTop = 0;
  renderHead();
  renderTabs();
  renderBody();
}
function renderHead() {
  const m = state.message, {Status: now, Delivery: d} = m;
  const mailbox = (who, i) => [i > 0 && ', ', h('bdi', who.Name
    ? [who.Name, soft(` <${who.Address}>`)] : who.Address)];
  const people = {From: [m.From], To: m.To, Cc: m.Cc, Bcc: m.Bcc, 'Reply to': m.ReplyTo};
  const lines = [...Object.entries(people).map(([name, some]) => [name, few(some, mailbox, 12)]),
    ['Date', soft(`${dated(FULL, m.Date)} · ${octets(m.Size)}`)],
    ['Tags', few(m.Tags, tag => h('span.tag', tag), 12)],
    ['Status', [status(now), d.next_attempt_at && [' ', ticking(d.next_attempt_at)],
      now !== 'forwarded' && d.last_error && soft(' · ' + d.last_error)]],
    ['Code', few(m.Codes, code => [h('span.code', code), copier(code)], 3)]];
  const first = OWED.includes(now) ? button('Retry now', () => retry(m.ID), '.main')
    : now === 'held' ? button('Release', () => release(m), '.main')
      : button('Resend', () => release(m));
  fill($('head'), [button('← Inbox', close, '.plain', {class: 'plain back'}),
    h('h1', bdi(m.Subject || '(no subject)'), {id: 'subject', tabindex: -1, 'data-key': 'subject'}),
    h('dl', lines.map(([name, inside]) => flat(inside).length > 0 && [
      h('dt', name), h('dd', inside)])),
    h('div.acts', [first, button('Mark unread', () => mark([m.ID], false)),
      button('Save', () => download(mail(m.ID, '/raw'), m.ID + '.eml')),
      button('Delete', () => remove(m.ID), '.danger')])]);
}
function renderTabs() {
  const now = tabNow()[0], all = tabs();
  const pick = key => { keep({tab: key}); renderTabs(); renderBody(); };
  const arrow = ({key}) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[key], at = all.findIndex(([key]) => key === now);
    if (!step) return;
    pick(all[(at + step + all.length) % all.length][0]);
    pane.querySelector('[aria-selected=true]').focus();
  };
  fill(pane.querySelector('[role=tablist]'), all.map(([key, name, many]) => {
    const n = many(state.message);
    return button(n === true ? name : `${name} ${count(n)}`, () => pick(key), '', {role: 'tab',
      id: 'tab-' + key, 'data-key': 'tab-' + key, 'aria-controls': 'body',
      'aria-selected': String(key === now), tabindex: key === now ? 0 : -1, onkeydown: arrow});
  }));
}
async function renderBody() {
  const {ID} = state.message, [key, , , show] = tabNow();
  let shown = '';
  try { shown = await show(state.message); } catch (error) { shown = soft(error.message); }
  if (ID !== state.message?.ID || tabNow()[0] !== key) return;
  $('body').className = key;
  $('body').setAttribute('aria-labelledby', 'tab-' + key);
  fill($('body'), shown);
}
/* The frame may open links in a tab of their own, and nothing else; no script runs in it. */
function showHTML(m) {
  const {phone, remote} = state, asked = `key=${m.ViewKey}&remote=${Number(remote)}`;
  const wide = phone => () => { keep({phone}); return renderBody(); };
  return [h('div.view', [
    soft(remote ? 'Remote content on' : 'Remote content off'),
    !remote && button('Load it', () => { state.remote = true; return renderBody(); }),
    button('Desktop', wide(false), '', {'aria-pressed': String(!phone)}),
    button('Phone', wide(true), '', {'aria-pressed': String(phone)})]),
  h(phone ? 'div.frame phone' : 'div.frame', h('iframe', '', {title: 'HTML mail',
    sandbox: 'allow-popups allow-popups-to-escape-sandbox', referrerpolicy: 'no-referrer',
    src: `${ROOT}view/${enc(m.ID)}.html?${asked}`}))];
}
async function showHeaders(m) {
  const line = ([name, values]) => [values].flat().map(value => [soft(bdi(name)), bdi(value)]);
  return table(['Name', 'Value'], Object.entries(await get(mail(m.ID, '/headers'))).flatMap(line));
}
function showFiles(m) {
  return table(['Name', 'Type', 'Size', ''], files(m).map(file => {
    const name = file.FileName || 'part-' + file.PartID;
    const path = mail(m.ID, '/part/' + enc(file.PartID));
    return [bdi(name), soft([file.ContentType, file.ContentID && ', inline']),
      soft(octets(file.Size)), button('Download', () => download(path, name))];
  }));
}
function showDelivery(d) {
  return [h('h2', 'Recipients'),
    table(['Address', 'Status', 'Reply', 'Host'], d.recipients.map(who =>
      [bdi(who.address), status(who.status), who.reply ? [who.code > 0 && `${who.code} `, who.reply]
        : soft('not asked yet'), soft(who.host)])),
    h('h2', `History, ${plural(d.attempts, 'attempt')}`),
    table(['Time', 'Status', 'Detail'], d.history.map(step =>
      [time(step.at, dated(SECONDS, step.at)), status(step.status), step.detail])),
    d.transcript.length > 0 && [h('h2', 'Transcript'),
      h('pre.box', short(d.transcript.join('\n')), {tabindex: 0})]];
}

/* == What can be done to messages == */
/* A held message whose recipients stay goes to them itself; to others goes a copy. */
async function release(m) {
  const held = m.Status === 'held', verb = held ? 'Release' : 'Resend';
  const known = m.Delivery.recipients.map(who => who.address), value = known.join(', ');
  const form = await ask(`${verb} this message`, 'To these addresses, separated by commas.', verb,
    [{name: 'to', label: 'To', value, required: ''}]);
  if (!form) return;
  const To = names(form.to), stay = held && To.join() === known.join();
  await change(`On its way to ${form.to}.`, 'POST',
    ...stay ? [`api/v1/queue/${enc(m.ID)}/retry`] : [mail(m.ID, '/release'), {To}]);
}
const retry = id => change('Trying now.', 'POST', `api/v1/queue/${enc(id)}/retry`);
async function remove(id, status) {
  const i = indexOf(id), next = rowAt(i + 1) || rowAt(i - 1);
  if (OWED.includes(status || rowAt(i)?.Status || state.message?.Status)
    && !await ask('Delete it?', 'It is still owed, and will not be delivered.', 'Delete')) return;
  await change('Deleted.', 'DELETE', 'api/v1/messages', {IDs: [id]});
  if (state.id) i >= 0 && next ? open(next.ID) : close();
}
async function deleteAll() {
  const {query, total} = state, what = plural(total, 'message');
  const note = query ? `All that match ${query}` : 'The whole inbox.';
  if (!await ask(`Delete ${what}?`, note, 'Delete')) return;
  const found = query ? 'search?query=' + enc(query) : 'messages';
  await change(`Deleted ${what}.`, 'DELETE', 'api/v1/' + found);
  if (state.id) close();
}
async function mark(IDs, Read) {
  await api('PUT', 'api/v1/messages', {IDs, Read});
  if (state.id && !Read) close();
  await reload();
}
async function download(path, name) {
  const url = URL.createObjectURL(await (await api('GET', path)).blob());
  h('a', '', {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
async function copy(text) {
  if (!navigator.clipboard) throw new Error('The browser lets only https and localhost copy.');
  await navigator.clipboard.writeText(text);
  say('Copied.');
}

/* == The queue and the next hops == */
function renderQueue() {
  const {messages, total, next_hops: hops} = state.queue;
  const line = m => [
    [h('a', bdi(m.recipients.slice(0, 2).join(', ')),
      {href: '#/message/' + enc(m.id), 'data-key': m.id}),
      m.recipients.length > 2 && ` +${m.recipients.length - 2}`,
      h('div.soft', ['from ', bdi(m.reverse_path || 'the null sender')])],
    [status(m.status), h('div', m.last_error)], m.attempts,
    m.next_attempt_at && ticking(m.next_attempt_at),
    [button('Retry', () => retry(m.id), '', {'data-key': 'retry ' + m.id}),
      button('Delete', () => remove(m.id, m.status), '.danger', {'data-key': 'delete ' + m.id})]];
  const hop = it => [[bdi(it.name), h('div.soft', [
    `${count(it.active)} active, ${count(it.waiting)} waiting`,
    it.until && [', probe ', ticking(it.until)]]), h('div.soft', it.reason)], status(it.state)];
  fill($('side'), table(['Next hops', hops.length ? 'State' : 'none yet'], hops.map(hop)));
  sheet([h('h1', total ? `${count(total)} owed` : 'Nothing is owed'),
    total > 0 && button('Retry all', () => retry('all'))],
  total > 0 && table(['Message', 'Reason', 'Attempts', 'Next', ''], messages.map(line)),
  total > messages.length && h('p.soft', `The first ${messages.length} are shown.`));
}

/* == Accounts == */
function renderAccounts() {
  const {users, stats} = state;
  const quota = ({used_today: used, quota_daily: most}) => most ? [h('meter', '',
    {max: most, high: most - 0.5, value: used}), ` ${count(used)} of ${count(most)}`] : count(used);
  const line = user => [bdi(user.name), user.allowed_domains?.join(', ') || soft('any domain'),
    quota(user), user.quota_per_minute || soft('no limit'),
    [button('Change', () => editUser(user), '', {'data-key': 'change ' + user.name}),
      button('Remove', () => removeUser(user.name), '.danger',
        {'data-key': 'remove ' + user.name})]];
  const figures = (head, items, name) => items?.length > 0 && table([head, 'In', 'Out', 'Failed'],
    items.map(it => [name(it), count(it.received), count(it.forwarded), count(it.failed)]));
  fill($('side'), [figures('Day', stats.days, day => dated(DAY, day.at)),
    figures('Account', stats.accounts, account => bdi(account.name))]);
  sheet([h('h1', 'Accounts'), button('Add account', () => editUser())],
    users.length ? table(['Name', 'Sends as', 'Today', 'A minute', ''], users.map(line))
      : h('p.soft', 'None: nobody has to log in.'));
}
async function editUser(user) {
  const number = (name, label, value = 0) => ({name, label, value, type: 'number', min: 0});
  const form = await ask(user ? `Change ${user.name}` : 'Add an account', '', 'Save', flat([
    !user && {name: 'name', label: 'Name', required: ''},
    {name: 'password', type: 'password', autocomplete: 'new-password',
      label: `Password (empty: ${user ? 'the old one stays' : 'the API key is one'})`},
    {name: 'domains', label: 'Domains it may send as (empty: any)',
      value: user?.allowed_domains?.join(', ')},
    number('daily', 'Messages a day (0: no limit)', user?.quota_daily),
    number('minute', 'Messages a minute (0: no limit)', user?.quota_per_minute)]));
  if (!form) return;
  const [method, path] = user ? ['PUT', '/' + enc(user.name)] : ['POST', ''];
  const answer = await change('Saved.', method, 'api/v1/users' + path, {
    name: user?.name || form.name, password: form.password || undefined,
    allowed_domains: names(form.domains), quota_daily: Number(form.daily),
    quota_per_minute: Number(form.minute)});
  if (user) return;
  const {name, api_key: value} = await answer.json();
  await ask(`Account ${name}`, 'Shown this once: keep it somewhere safe.', 'Done',
    [{name: 'key', label: 'API key', value, readonly: ''}], '');
}
const removeUser = async name =>
  await ask(`Remove ${name}?`, 'It will not be able to log in.', 'Remove')
    && change('Removed.', 'DELETE', 'api/v1/users/' + enc(name));

/* == Saying and asking == */
function say(text) {
  clearTimeout(say.timer);
  Object.assign($('said'), {textContent: text, className: 'shown'});
  say.timer = setTimeout(() => { $('said').className = ''; }, 4000);
}
/* Asks in a dialog. Resolves to the fields' values, or to null when it was called off. */
async function ask(title, note, verb, fields = [], cancel = 'Cancel') {
  const form = h('form', [h('h2', title, {id: 'asked'}), h('p', note),
    fields.map(({label, ...props}) =>
      h('label', [label, h('input', '', {autocomplete: 'off', ...props})])),
    h('div.acts', [h('button.main', verb, {value: verb, autofocus: !fields.length}),
      cancel && h('button', cancel, {value: '', formnovalidate: ''})])], {method: 'dialog'});
  const dialog = h('dialog', form, {'aria-labelledby': 'asked'});
  document.body.append(dialog);
  dialog.showModal();
  await new Promise(done => { dialog.onclose = done; });
  dialog.remove();
  return dialog.returnValue ? Object.fromEntries(new FormData(form)) : null;
}

/* == Keys == */
const chosen = () => state.id || rowAt(state.cursor)?.ID;
const KEYS = {
  'j': ['next message', () => move(1)],
  'k': ['message before', () => move(-1)],
  'Enter': ['open it', () => chosen() && open(chosen())],
  'r': ['release, resend or retry now', () => pane.querySelector('.acts button')?.click()],
  'u': ['mark unread', () => chosen() && mark([chosen()], false)],
  '#': ['delete', () => chosen() && remove(chosen())],
  '/': ['search', () => $('search').select()],
  'Esc': ['back to the list; in the search, all mail again', () => state.id && close()],
  '?': ['show this', help],
};
const SAME = {ArrowDown: 'j', ArrowUp: 'k', Escape: 'Esc'};
const WORDS = 'from: to: cc: bcc: addressed: subject: message-id: tag: is:read is:unread ' +
  'has:attachment before: after: larger: smaller:';
function help() {
  const keys = Object.entries(KEYS).map(([key, [does]]) => [h('dt', h('kbd', key)), h('dd', does)]);
  return ask('Keys', [h('dl', keys), 'The search knows ', h('span.mono', WORDS),
    ' and "quoted words"; a leading minus turns one around. ',
    h('a', 'More help', {href: ROOT + 'help', target: '_blank'})], 'Close', [], '');
}
function press(event) {
  const {key, target} = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog')) return;
  if (target.matches('input')) {
    if (key !== 'Escape') return;
    target.value = '';
    search();
    return list.focus({preventScroll: true});
  }
  if (key.startsWith('Arrow') && target !== list && target !== document.body) return;
  const work = KEYS[SAME[key] || key]?.[1];
  if (!work || (key === 'Enter' && target.matches('button, a'))) return;
  event.preventDefault();
  attempt(work);
}

/* == Beginning == */
function search() {
  const query = $('search').value.trim(), {id, view} = state;
  if (query !== state.query || view !== 'inbox') go(listOf(query), view === 'inbox' && !id);
}
/* What a person chose stays in this browser. */
function keep(choice) {
  const {theme, tab, phone} = Object.assign(state, choice);
  document.documentElement.style.colorScheme = theme;
  try { localStorage.smtprelay = JSON.stringify({theme, tab, phone}); } catch { /* not allowed */ }
}
function begin() {
  try { keep(JSON.parse(localStorage.smtprelay)); } catch { /* nothing kept */ }
  const place = location.pathname.slice(ROOT.length), words = new URLSearchParams(location.search);
  const hash = place.startsWith('view/') ? '#/message/' + place.slice(5)
    : place === 'search' && listOf(words.get('q') || words.get('query'));
  if (hash) history.replaceState(null, '', ROOT + hash);
  route();
  listen();
}
$('search').oninput = soon(150, search);
document.forms[0].onsubmit = event => { event.preventDefault(); search(); list.focus(); };
$('help').onclick = help;
const DARK = matchMedia('(prefers-color-scheme: dark)');
$('theme').onclick = () =>
  keep({theme: (state.theme ? state.theme === 'dark' : DARK.matches) ? 'light' : 'dark'});
list.onscroll = () => requestAnimationFrame(scrolled);
Object.assign(window, {onresize: scrolled, onkeydown: press, onhashchange: route});
setInterval(() => document.querySelectorAll('[data-at]').forEach(
  node => { node.textContent = relative(node.dataset.at); }), 1000);
setInterval(figuresSoon, 60000);
begin();
</script>
</body>
</html>
"""


def page_policy() -> str:
    """Return the page's policy: of style and script those of these hashes alone."""
    inline = re.findall(r"(?s)<(style|script)>(.*?)</\1>", PAGE)
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                     for _, text in inline)
    return (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
            "img-src 'self' data:; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'")


# === 20 HTTP =================================================================
#
# The web side over http.server: health and metrics, the mail API, the page, the webhook. A route is
# declared where its function stands: method and path, what it does, who may call it, which
# parameters it knows. The function takes a Request; what it returns is sent as text, octets or
# JSON. `admit` is the one guard: it turns strangers away, DNS rebinding by the Host header (a
# rebinding page cannot know the token), other sites' pages by Origin and Sec-Fetch-Site, and
# whoever comes through a proxy without the token. Each connection has a thread, each request a
# deadline.

HTTP_TIME = 30.0  # for the whole of a request, and for its answer
HTTP_CONNECTIONS = 220
HTTP_WORKING, HTTP_PER_CLIENT = 200, 150  # of them asking for more than health and metrics
HTTP_BODY = 32 * MIB
HEARTBEAT = 15.0
HTML = "text/html; charset=utf-8"
WEBHOOK_TIME = 10.0
WEBHOOK_PAUSES = (1.0, 5.0)  # before an event is sent again


class HttpError(Exception):
    """A request that gets an error: its status and its words."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


# -- routes, and who may call them --

# Who may call a route: who has SMTP_API_TOKEN, or needs none for where it asks from; the same, or
# who has the key to this one message; who has an account's api_key; anybody; anybody, but with 401
# where it lacks the token: the page, which holds no mail and asks for it.
ADMIN, VIEW, ACCOUNT, OPEN, SHELL = "admin", "view", "account", "open", "shell"


class Route(NamedTuple):
    """A method, a path with {names}, what it does, who may call it, which parameters it knows."""

    method: str
    path: str
    does: str
    access: str
    takes: str | None  # None: all others are ignored, and errors are text, as with Mailpit
    action: Callable[[Request], Any]  # which returns text, octets, blocks, else JSON; None is "ok"


ROUTES: list[Route] = []


def route(said: str, access: str = ADMIN) -> Callable[[Any], Any]:
    """Declare routes: "METHOD /path /path: what it does"; a path of ours ends in ?what&it&takes."""
    def declare(action: Any) -> Any:
        where, _, does = said.partition(": ")
        method, *paths = where.split()
        for path in paths:
            path, ours, known = path.partition("?")
            takes = known.replace("&", " ") if ours else None
            ROUTES.append(Route(method, path, does, access, takes, action))
        return action
    return declare


def view_key(token: str, id: str) -> str:
    """Return the key that opens one message's HTML: a sandboxed frame cannot send the token."""
    return hmac.new(token.encode(), f"view {id}".encode(), "sha256").hexdigest()[:32]


# -- a connection's requests --

class Request(http.server.BaseHTTPRequestHandler):
    """The requests of a connection, in turn; a route may set the answer's status and fields."""

    protocol_version, server_version, sys_version = "HTTP/1.1", f"smtprelay/{__version__}", ""
    default_request_version = protocol_version
    error_message_format, error_content_type = "%(message)s\n", "text/plain; charset=utf-8"
    timeout = HTTP_TIME
    server: HttpServer
    rfile: Any
    route: Any
    body: Any  # None: not read
    account: Any  # whose key this is

    def setup(self) -> None:
        super().setup()
        self.relay, self.inbox = self.server.relay, self.server.relay.inbox
        self.client = client_name(self.connection.family, self.client_address)
        read = self.rfile.readline

        def read_line(limit: int = LINE_LIMIT) -> Any:
            line = read(limit)  # http.server takes a connection's end for that of the header
            if len(line) < limit and not line.endswith(b"\n"):
                raise PeerGone
            return line

        self.rfile.readline = read_line
        self.since = monotonic()  # it asks nothing since then; inf: it is at work
        self.server.callers.add(self)

    def finish(self) -> None:
        self.server.callers.discard(self)
        super().finish()

    def find_route(self) -> Route:
        """Find the route, under SMTP_WEB_ROOT or not; note its path's names and its query."""
        try:
            url = urlsplit(self.path)
        except ValueError:
            raise BadRequest("the address does not parse") from None
        root = re.escape(self.relay.settings.web_root.strip("/"))
        self.query = dict(parse_qsl(url.query, keep_blank_values=True))
        self.words, self.zone = (self.query.get(name, "") for name in ("query", "tz"))
        self.path = re.sub(f"^/{root}(/|$)", "/", url.path)
        error = HttpError(404, "not found")
        for route in ROUTES:
            pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+?)", route.path)
            if match := re.fullmatch(pattern, self.path):
                self.names = {k: unquote(v) for k, v in match.groupdict().items()}
                if route.method == self.command.replace("HEAD", "GET"):
                    return route
                error = HttpError(405, "method not allowed")
        raise error

    def admit(self) -> None:
        """Let a request through, or raise HttpError."""
        s, headers, (*_, access, takes, _) = self.relay.settings, self.headers, self.route
        if access == OPEN:
            return
        secret, host = self.login()[1], headers.get("Host", "")
        site = headers.get("Sec-Fetch-Site", "none")
        same = headers.get("Origin", f"://{host}").partition("://")[2] == host
        # Another site may link to our page, but not make a browser ask for more.
        same |= self.command in ("GET", "HEAD")
        if access != SHELL and not (same and site in ("same-origin", "none")):
            raise HttpError(403, "requests from other sites are not taken")
        # This machine needs no token where none is set, networks that SMTP_API_NETWORKS names need
        # none at all. Where a proxy stands between, its address is no proof of who asks.
        trusted = (self.client == "local" or is_loopback(self.client)) and not s.api_token
        if s.api_networks != networks("loopback"):
            trusted |= in_networks(self.client, s.api_networks)
        proxied = r"(?im)^(?:forwarded|x-forwarded-.*|x-real-ip|via)$"
        if access == ACCOUNT:
            self.account = self.relay.reception.accounts.by_key(secret)
            if not self.account:
                raise HttpError(401, "an account's key is needed: Authorization: Bearer API_KEY")
        elif same_secret(s.api_token, secret):
            pass
        elif trusted and not re.search(proxied, "\n".join(headers)):
            # A rebound name has a dot, and is no address.
            own = r"[^.]+|[0-9.]+|.*:.*|.*\.localhost|" + re.escape(s.hostname.lower())
            if not re.fullmatch(own, re.sub(r":\d*$", "", host.lower()).strip("[].")):
                raise HttpError(403, f"Host {host[:99]!r} is neither this machine nor SMTP_HOSTNAME")
        elif not s.api_token:
            raise HttpError(403, "until SMTP_API_TOKEN is set only this machine is served, and no proxy")
        elif access == SHELL:
            self.status = 401
        elif access != VIEW or not same_secret(
                view_key(s.api_token, self.names["id"]), self.query.get("key", "")):
            raise HttpError(401, "a token is needed: Authorization: Bearer SMTP_API_TOKEN")
        for name in self.query:
            if takes is not None and name not in takes.split():
                raise BadRequest(f"{name[:99]}: not known here; expected {takes or 'no parameters'}")

    def read_fields(self) -> Fields:
        """Read the body's fields, of JSON or a form: in lower case, for Mailpit takes any."""
        # What cannot be read is refused: to guess could be to delete all.
        body, kind = self.body.strip(), self.headers.get("Content-Type", "")
        try:
            if body[:1] in b"{[" or not kind.startswith("application/x-www-form-urlencoded"):
                value = loads(body or b"{}")
            else:
                value = {}  # blank values are read, bad ones are not
                for name, given in parse_qs(body.decode(), True, True).items():
                    name, last = name.removesuffix("[]"), given[-1]
                    value[name] = given if name.lower() in ("ids", "tags", "to") else (
                        {"true": True, "false": False}.get(last.lower(), last))
        except (ValueError, RecursionError) as e:
            raise BadRequest(f"body: expected JSON: {e}") from None
        if not isinstance(value, dict):
            raise BadRequest("body: expected an object")
        return {name.lower(): v for name, v in value.items()}

    def strings(self, name: str) -> list[str]:
        values = self.fields.get(name.lower())
        values = [] if values is None else values
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise BadRequest(f"{name}: expected a list of {name.lower()}")
        return values

    def number(self, name: str, default: Any) -> Any:
        """Return a number of the query, of default's type; what is none is ignored, or refused."""
        text = self.query.get(name, "")
        if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,6})?", text):
            return type(default)(float(text))
        if text and self.route.takes is not None:
            raise BadRequest(f"{name}: expected a number, not {text[:40]!r}")
        return default

    def item(self) -> Item:
        """Return the message that the path names; `latest` may come with a query."""
        item = self.inbox.get(self.names["id"], compile_query(self.words, self.zone))
        if item is None:
            raise KeyError
        return item

    def mail(self) -> Email:
        return self.inbox.mail(self.item()["ID"])

    def login(self) -> tuple[str, str]:
        """Return the user and secret of Basic, which Mailpit's clients send, or Bearer's token."""
        scheme, _, told = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "basic":
            user, _, secret = decode_text(unbase64(told.encode("utf-8", "replace"))).partition(":")
            return user, secret
        return "", told.strip() * (scheme.lower() == "bearer")

    def heard(self) -> Any:
        """Return what has come and was not read; None for nothing, b"" where it has hung up."""
        self.connection.setblocking(False)
        try:
            return self.rfile.peek(8) or self.connection.recv(8, socket.MSG_PEEK)
        except OSError as e:
            return None if isinstance(e, BlockingIOError) else b""
        finally:
            self.connection.settimeout(HTTP_TIME)

    # -- reading and answering --

    def respond(self) -> None:
        self.status, self.head, self.route, self.body = 200, dict[str, str](), None, None
        answer = self.tried()
        if self.command not in ("GET", "HEAD"):
            self.relay.audit.info("changed" if self.status < 400 else "change_refused",
                                  status=self.status, client=self.client, method=self.command,
                                  path=self.path.partition("?")[0])
        self.send_answer(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = respond

    def tried(self) -> Any:
        """Find the route, let the caller through, read the body, act; return what comes of it."""
        try:
            self.route = self.find_route()
            self.admit()
            self.body = self.read_body()
            self.fields = self.read_fields()
            if self.route.access != OPEN:
                working = [c.client for c in self.server.callers.copy() if c.since == math.inf]
                if len(working) >= HTTP_WORKING or working.count(self.client) >= HTTP_PER_CLIENT:
                    raise HttpError(503, "too many requests: all but health and metrics must wait")
                self.since = math.inf
                self.relay.catch_up()
            value = self.route.action(self)
            return "ok" if value is None else value
        except (HttpError, BadRequest, SettingsError) as e:
            self.status, text = getattr(e, "status", 400), str(e)
        except (KeyError, FileNotFoundError, SpoolError):
            self.status, text = 404, "message not found"
        except (PeerGone, TimeoutError, socket.timeout, ConnectionError):
            raise
        except Exception:
            self.relay.log.bug("http_bug", path=self.path)
            self.status, text = 500, "internal error"
        self.head, found = {}, self.route
        framed = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.close_connection |= framed and self.body is None
        as_text = found and found.takes is None and found.path != "/api/v1/send"  # as Mailpit does
        return text if as_text else {"Error": text}

    def read_body(self) -> bytes:
        """Read the body; what a proxy may read otherwise than we do is refused (RFC 9112 6.3)."""
        codings = self.headers.get_all("Transfer-Encoding", [])
        framed = [*{*self.headers.get_all("Content-Length", [])}, *codings]
        if len(framed) > 1 or codings and self.request_version == "HTTP/1.0":
            raise BadRequest("expected one Content-Length, or else Transfer-Encoding: chunked")
        if codings and codings[0].strip().lower() != "chunked":
            raise HttpError(501, "Transfer-Encoding: expected chunked")
        if framed and not codings and not re.fullmatch("[0-9]{1,12}", framed[0]):
            raise HttpError(411, "Content-Length: expected a number of octets")
        # Node sends DELETE's body with no field that tells of it; and no body means all.
        following = self.command == "DELETE" and not framed and self.heard() or b""
        if not re.match(b"[A-Z]+ |$", following):
            self.close_connection = True
            raise BadRequest("a body needs Content-Length, or Transfer-Encoding: chunked")
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        body = bytearray()
        for size in self.chunks() if codings else map(int, framed):
            if len(body) + size > HTTP_BODY:
                raise HttpError(413, f"body is larger than {HTTP_BODY} octets")
            block = self.rfile.read(size)
            if len(block) < size:
                raise PeerGone
            body += block
        return bytes(body)

    def chunks(self) -> Iterator[int]:
        """Read the lines around chunks, and yield the size of each (RFC 9112 7.1)."""
        size = -1
        while size:
            line = self.rfile.readline().partition(b";")[0].strip()
            if not re.fullmatch(b"[0-9A-Fa-f]{1,8}", line):
                raise BadRequest("Transfer-Encoding: expected the size of a chunk")
            size = int(line, 16)
            yield size
            while self.rfile.readline().strip():
                if size:  # else it is the trailer, which is skipped
                    raise BadRequest("Transfer-Encoding: expected the end of a chunk")

    def send_answer(self, body: Any) -> None:
        """Send text, octets, blocks that end with the connection, or anything else as JSON."""
        fields = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store",
                  "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                  "Cross-Origin-Resource-Policy": "same-origin",
                  "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
        if isinstance(body, Generator):
            self.close_connection = True
        else:
            if not isinstance(body, (bytes, str)):
                fields["Content-Type"] = "application/json"
                body = dumps(body, default=vars, ensure_ascii=False)
            body = [body.encode("utf-8", "replace") if isinstance(body, str) else body]
            fields["Content-Length"] = str(len(body[0]))
        fields.update(self.head)
        if self.close_connection:
            fields["Connection"] = "close"  # which send_header does, too
        self.send_response(self.status)
        for name, value in fields.items():
            self.send_header(name, value)
        # Who sends Bearer, as our page does, asks for the token by itself: a browser need not.
        login = self.headers.get("Authorization", "")
        asks = "Bearer" in login or fields["Content-Type"] == HTML
        for scheme in ("Bearer", "Basic")[:2 - asks] if self.status == 401 else ():
            self.send_header("WWW-Authenticate", f'{scheme} realm="smtprelay"')
        self.end_headers()
        self.connection.settimeout(HTTP_TIME)
        for block in body if self.command != "HEAD" else ():
            self.wfile.write(block)
        self.since = monotonic()

    def handle_expect_100(self) -> bool:
        """Say nothing yet: read_body asks for the body once the caller has been let through."""
        return True

    def log_message(self, format: str, *args: Any) -> None:
        self.relay.log.debug("http", client=self.client, request=format % args)


class HttpServer(http.server.ThreadingHTTPServer):
    """Serves HTTP on a bound socket; for health and metrics there is always a place."""

    daemon_threads = True

    def __init__(self, sock: socket.socket, relay: Delivering,
                 handler: type[socketserver.BaseRequestHandler] = Request) -> None:
        socketserver.BaseServer.__init__(self, ("", 0), handler)  # without a socket of its own
        self.socket, self.relay = sock, relay
        self.callers: set[Any] = set()  # without a lock: each step on it is whole

    def get_request(self) -> tuple[socket.socket, Any]:
        return accept(self.socket, self.relay.reception)

    def service_actions(self) -> None:
        """Cut off who takes too long to ask, and where places run out, who is idle for longest."""
        # A time for each read would begin anew with each octet.
        end = monotonic() - HTTP_TIME
        idle = sorted(self.callers, key=lambda caller: caller.since)
        for n, caller in enumerate(idle, HTTP_CONNECTIONS):
            if n < len(idle) or caller.since < end:
                shut(caller.connection, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log that no thread was to be had, or a bug; that a client went away is no news."""
        error = sys.exc_info()[1]
        if isinstance(error, RuntimeError):
            self.relay.log.warn("no_thread_for_http", error=error)
        elif error and not isinstance(error, (OSError, PeerGone)):
            self.relay.log.bug("http_bug")


# -- health and metrics --

route("GET /livez: 200 while the process answers", OPEN)(lambda request: "OK\n")


@route("GET /healthz /health /readyz: 200 `OK` when the listeners answer, the workers "
       "live and the spool takes writes; else 503 and why. `?verbose` gives the parts", OPEN)
def show_health(request: Request) -> Any:
    d = request.relay
    beat = min(filter(None, d.metrics.each("alive")), default=-math.inf)
    dead = [t.name for t in d.threads if t.name.startswith("worker") and not t.is_alive()]
    wrong = {"listeners": "no sign of life from the listeners" * (monotonic() - beat >= 5),
             "workers": dead and f"dead: {', '.join(dead)}",
             "spool": "", "accounts": d.reception.trouble()}
    try:
        d.spool.probe()
        if d.spool.free() < d.settings.spool_min_free:
            wrong["spool"] = "less free space than SMTP_SPOOL_MIN_FREE"
    except OSError as e:
        wrong["spool"] = f"cannot write: {e.strerror}"
    why = "; ".join(f"{part}: {trouble}" for part, trouble in wrong.items() if trouble)
    request.status = 503 if why else 200
    if "verbose" in request.query or "application/json" in request.headers.get("Accept", ""):
        return {"status": "unavailable" if why else "ok",
                **{part: trouble or "ok" for part, trouble in wrong.items()}}
    return f"{why or 'OK'}\n"


@route("GET /metrics /debug/vars: JSON in expvar's manner; Prometheus text where `Accept` "
       "asks for it, or with `?format=prometheus`", OPEN)
def show_metrics(request: Request) -> Any:
    d, m = request.relay, request.relay.metrics
    oldest, _ = d.scheduler.snapshot(1)
    age = time.time() - id_micros(oldest[0][11:]) / 1e6 if oldest else 0.0
    m.set("smtp_queue_oldest_age_seconds", max(0.0, age))
    m.set("smtp_messages_held", len(d.held))
    m.set("smtp_uptime_seconds", round(monotonic() - m.get("started"), 1))
    m.set("smtp_build_info", 1, __version__)
    with suppress(OSError):
        m.set("smtp_disk_free_bytes", min(d.spool.free(), 1 << 53))
    form = request.query.get("format", request.headers.get("Accept", ""))
    if re.search("prometheus|text/plain|openmetrics", form):
        request.head["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
        return prometheus(m)
    return expvar(m)


# -- mail: Mailpit's API v1, and MailHog's v2 --

def chosen(request: Request, *others: str) -> list[str] | None:
    """Return what a search, or a body's IDs or Search, chooses; None for neither: all."""
    if request.path.endswith("/search"):
        request.fields = {"search": request.words}
    given, ids = request.fields, request.strings("IDs")
    words = take_field(given, "Search", "")
    if given and not given.keys() & {"ids", "search", *others} or ids and words:
        raise BadRequest("body: expected IDs or a Search, not both")
    if not words and (others or ids or "search" not in given):
        return ids or None
    query = compile_query(words, request.zone)
    if query == ALL:
        raise BadRequest("query: expected what to look for; all are at /api/v1/messages")
    return [item["ID"] for item in request.inbox.search(query, 0, 0).items]


def status_of(inbox: Inbox, id: str) -> str:
    """Return a message's status, "" when it is gone."""
    try:
        return inbox.spool.load(inbox.entry(id).stem).status.value
    except (KeyError, OSError, SpoolError):
        return ""


@route("GET /api/v1/messages: list (`start`, `limit`)")
@route("GET /api/v1/search: list what `query` finds")
def list_messages(request: Request) -> Any:
    inbox, words = request.inbox, request.words
    start, limit = request.number("start", 0), request.number("limit", 50)
    if request.path.endswith("/search") and not words.strip():
        raise BadRequest("query: expected what to look for")
    query = compile_query(words, request.zone)
    page = inbox.search(query, start, limit)
    total, unread, tags = inbox.counts()
    shown = {
        "total": total, "unread": unread, "count": len(page.items), "messages_count": page.total,
        "messages_unread": page.unread, "start": start, "tags": list(tags), "messages": [
            {**summary_json(item), "Status": status_of(inbox, item["ID"])} for item in page.items]}
    if misread := misread_terms(query):
        shown["Warnings"] = [f"{term} cannot be read" for term in misread]
    return shown


@route("PUT /api/v1/messages: mark `IDs`, or what a `Search` finds, `Read` or not (neither: all)")
def mark_messages(request: Request) -> None:
    if not request.body.strip():
        raise BadRequest("body: expected JSON")
    request.inbox.change(chosen(request, "read"), read=take_field(request.fields, "Read", False))


@route("DELETE /api/v1/search: delete what `query` finds")
@route("DELETE /api/v1/messages: delete `IDs`, or what a `Search` finds (neither: all)")
@route("DELETE /api/v1/messages/{id}: MailHog's: delete one")
def delete_messages(request: Request) -> bytes | None:
    one = "id" in request.names
    request.relay.remove([request.item()["ID"]] if one else chosen(request))
    # MailHog's clients, which say nothing of what they accept, take no body but an empty one
    bare = not request.body and not request.query and "Accept" not in request.headers
    return b"" if one or bare else None


@route("GET /api/v1/message/{id}: one message, which marks it read: people, subject, text, "
       "HTML, parts, delivery. `latest` is an id, and may come with a `query`")
def show_message(request: Request) -> Any:
    inbox, item = request.inbox, request.item()
    id = item["ID"]
    inbox.change([id], read=True)
    mail = inbox.mail(id)
    return {**waited_json(item, mail), "Status": mail.record.status, "Delivery": mail.record,
            "ViewKey": view_key(request.relay.settings.api_token, id)}


@route("GET /api/v1/message/{id}/raw: its octets; `dl=1`: to be saved")
def show_raw(request: Request) -> bytes:
    mail = request.mail()
    if request.query.get("dl") == "1":
        request.head["Content-Disposition"] = f'attachment; filename="{mail.id}.eml"'
    return mail.raw


@route("GET /api/v1/message/{id}/part/{part} /api/v1/message/{id}/part/{part}/thumb: one part, "
       "decoded; what could run in a browser is a download")
def show_part(request: Request) -> bytes:
    for part in request.mail().parts:
        if part.number == request.names["part"]:
            request.head = part_headers(part)
            return part.content
    raise HttpError(404, "part not found")


@route("GET /api/v1/message/{id}/html-check /api/v1/message/{id}/link-check "
       "/api/v1/message/{id}/sa-check /api/events: 404: HTML check, link check, spam check and "
       "WebSocket are not done here")
def not_done(request: Request) -> Any:
    raise HttpError(404, f"{request.path.rpartition('/')[2]} is not done here")


@route("GET /view/{id}.html: its HTML, sandboxed; `remote=1` loads what is elsewhere", VIEW)
@route("GET /view/{id}.txt: its text")
def view(request: Request) -> Any:
    mail = request.mail()
    request.inbox.change([mail.id], read=True)
    if request.path.endswith(".txt"):
        return mail.text
    if not mail.page:
        raise HttpError(404, "this message has no HTML")
    sources = "img-src data:; style-src 'unsafe-inline'"
    if request.query.get("remote") == "1":
        sources = "img-src data: cid: *; style-src 'unsafe-inline' *; font-src *; media-src *"
    request.head = {
        "Content-Type": HTML, "X-DNS-Prefetch-Control": "off",
        "Content-Security-Policy":  # links open in their own tab
            f"default-src 'none'; {sources}; form-action 'none'; base-uri 'none'; "
            "frame-ancestors 'self'; sandbox allow-popups allow-popups-to-escape-sandbox"}
    return view_html(mail)


@route('POST /api/v1/message/{id}/release: send a message to the addresses in `To`; those that '
       'SMTP_RELAY_ALLOWED_RECIPIENTS leaves out only with `"Beyond": true`')
def release_message(request: Request) -> None:
    to, beyond = read_each(request.fields, "To", read_mailbox), take_field(request.fields, "Beyond", False)
    if not to:
        raise BadRequest("To: no recipients")
    request.relay.release(request.item()["ID"], to, beyond)


@route("POST /api/v1/send: put a message in, given as JSON")
def send_message(request: Request) -> Any:
    (content, sender, to), most = compose(request.fields), request.relay.settings.max_size
    if len(content) > most:
        raise HttpError(413, f"message is larger than {most} octets")
    user = request.login()[0][:200].translate(NO_BREAKS)
    flags = needed_flags(content, sender, *to)
    envelope = Envelope(sender, request.client, "http", "HTTP", user, flags, to)
    return {"ID": request.relay.store(envelope, [content])}


route("GET /api/v1/message/{id}/headers: its header fields")(
    lambda request: headers_json(request.mail()))
route("GET /api/v1/tags: the tags that there are")(lambda request: list(request.inbox.counts()[2]))
route("PUT /api/v1/tags: give `IDs` these `Tags` alone")(
    lambda request: request.inbox.tag(request.strings("IDs"), request.strings("Tags")))


@route("PUT /api/v1/tags/{tag}: rename to `Name`")
@route("DELETE /api/v1/tags/{tag}: take it off all messages")
def change_tag(request: Request) -> None:
    known, old, new = {*map(str.lower, request.inbox.counts()[2])}, request.names["tag"], ""
    if old.lower() not in known:
        raise BadRequest(f"tag not found: {old[:100]}")
    if request.command == "PUT":
        new = "".join(clean_tags([take_field(request.fields, "Name", "")]))
        if not new:
            raise BadRequest("Name: expected a tag")
        if new.lower() in known - {old.lower()}:
            raise BadRequest(f"tag already exists: {new}")
    request.inbox.rename_tag(old, new)


@route("GET /api/v1/info: version, counts, memory")
def show_info(request: Request) -> Any:
    d, m = request.relay, request.relay.metrics
    total, unread, tags = d.inbox.counts()
    stats = {"Uptime": int(monotonic() - m.get("started")), "Memory": memory_used(),
             "SMTPAccepted": int(m.get("smtp_messages_received_total")),
             "SMTPAcceptedSize": int(m.get("smtp_bytes_received_total")),
             "SMTPRejected": 0, "SMTPIgnored": 0, "MessagesDeleted": d.inbox.deleted}
    return {"Version": __version__, "LatestVersion": __version__, "Database": d.settings.spool,
            "DatabaseSize": 0, "Messages": total, "Unread": unread, "Tags": tags,
            "RuntimeStats": stats, "SMTPPort": d.port, "Delivery": d.settings.delivery,
            "RelayHost": ", ".join(host_port(*h[:2]) for h in d.settings.smart_hosts)}


@route("GET /api/v1/webui: what Mailpit's clients ask for at start")
def show_webui(request: Request) -> Any:
    s = request.relay.settings
    hosts = ", ".join(host_port(*h[:2]) for h in s.smart_hosts)
    relay = {"Enabled": request.relay.can_release, "ReturnPath": s.relay_return_path,
             "SMTPServer": hosts, "OverrideFrom": s.relay_from,
             "AllowedRecipients": s.relay_allowed_recipients.pattern, "BlockedRecipients": ""}
    return {"Label": "smtprelay", "MessageRelay": relay, "SpamAssassin": False,
            "ChaosEnabled": True, "DuplicatesIgnored": False}


@route("GET /api/v2/messages: MailHog's list")
@route("GET /api/v2/search: MailHog's search: `kind` is from, to or containing")
def mailhog_messages(request: Request) -> Any:
    inbox, kind, query = request.inbox, request.query.get("kind", ""), ALL
    start, limit = request.number("start", 0), request.number("limit", 50)

    def holds(item: Item) -> bool:
        mail = inbox.mail(item["ID"])
        known = {"from": [mail.reverse_path, item["From"]], "to": [mail.recipients, item["To"]],
                 "containing": [decode_text(mail.raw), mail.text, mail.html, mail.subject]}[kind]
        return request.words.lower() in words_of(known).lower()

    def path(address: str) -> Fields:
        mailbox, _, domain = address.rpartition("@")
        return {"Relays": None, "Mailbox": mailbox, "Domain": domain, "Params": ""}

    def content(fields: Headers, body: bytes) -> Fields:
        return {"Headers": grouped(fields), "Body": decode_text(body), "Size": len(body),
                "MIME": None}

    if request.path.endswith("/search"):
        if kind not in words("from to containing") or not request.words:
            raise BadRequest("expected a query, and a kind: from, to, containing")
        query = ((holds, True),)
    page, items = inbox.search(query, start, limit), []
    for item in page.items:
        mail = inbox.mail(item["ID"])
        parts = [content(p.headers, p.raw) for p in mail.parts if p.number != "0"]
        items.append({
            "ID": mail.id, "Created": mail.record.received_at,
            "Raw": {"From": mail.reverse_path, "To": mail.recipients, "Helo": mail.record.helo,
                    "Data": decode_text(mail.raw)},
            "From": path(mail.reverse_path), "To": [*map(path, mail.recipients)],
            "Content": content(mail.fields, mail.raw.partition(b"\r\n\r\n")[2]),
            "MIME": {"Parts": parts} if parts else None})
    return {"total": page.total, "count": len(items), "start": start, "items": items}


# -- waiting, events, queue, faults, accounts: ours --

@route("GET /api/v1/wait?to&from&subject&query&with&since&timeout&tz: block until a message "
       "comes that is to `to`, from `from`, about `subject`, matches `query` and has a code or "
       "a link (`with`), up to `timeout` seconds, or 408; `since` is a sequence number. With "
       "its links and codes")
def wait_for_message(request: Request) -> Any:
    q, inbox, part = request.query, request.inbox, request.query.get("with", "")
    since = request.number("since", 0) if "since" in q else None
    timeout = min(request.number("timeout", 10.0), 300.0)
    if part not in ("", "code", "link"):
        raise BadRequest("with: expected code or link")
    names = "to", "subject", "from"
    for name in names:
        if q.get(name) == "":  # a variable that is not set is not anybody
            raise BadRequest(f"{name}: expected something")

    def fits(item: Item) -> bool:
        meant = is_meant(item, *(q.get(name, "") for name in names))
        return meant and (not part or bool(getattr(inbox.mail(item["ID"]), f"{part}s")))

    query = (*compile_query(request.words, request.zone), (fits, True))
    item = inbox.wait(query, since, timeout, lambda: request.heard() == b"")
    if item is None:
        part = f" with a {part}" if part else ""
        raise HttpError(408, f"no message{part} matched within {timeout:g} seconds")
    return waited_json(item, inbox.mail(item["ID"]))


def is_meant(item: Item, to: str, subject: str, sender: str) -> bool:
    """Tell whether a message is what is asked for; without @ a part of an address will do."""
    def among(wanted: str, people: list[Person]) -> bool:
        known = [person["Address"].lower() for person in people]
        return wanted.lower() in (known if "@" in wanted else " ".join(known))

    return (among(to, item["To"] + item["Cc"] + item["Bcc"]) and among(sender, [item["From"]])
            and subject.lower() in item["Subject"].lower())


@route("GET /api/v1/events?: server-sent events: received, forwarding, retrying, forwarded, failed")
def show_events(request: Request) -> Any:
    feed = request.relay.feed

    def stream() -> Generator[bytes, None, None]:
        events, said = feed.subscribe(), ": hello"
        try:
            while said:
                yield f"{said}\n\n".encode()
                try:
                    event = events.get(timeout=HEARTBEAT)
                    said = f"event: {event['type']}\ndata: {dumps(event)}" if event else ""
                except queue.Empty:
                    said = ": still here"  # a comment finds out who has gone
        finally:
            feed.listeners.discard(events)

    request.head["Content-Type"] = "text/event-stream"
    return stream()


route("DELETE /api/v1/queue/{id}?: remove it for good")(
    lambda request: request.relay.remove([request.relay.load(request.names["id"]).id]))
route("POST /api/v1/queue/{id}/retry?: try it now; a held one goes to its own recipients; the "
      "id may be `all`, or `held`")(
    lambda request: {"retried": request.relay.retry(request.names["id"])})
route("GET /api/v1/queue?limit: what is owed, what is held, and the next hops")(
    lambda request: request.relay.queue(request.number("limit", 200)))


@route("GET /api/v1/faults?: the rules of `SMTP_FAULTS`")
@route("PUT /api/v1/faults?: put other `rules` in their place, until the relay stops")
@route("GET /api/v1/chaos: Mailpit's failures on order, as rules of `SMTP_FAULTS`")
@route("PUT /api/v1/chaos: set them; one that is not named is off")
def show_faults(request: Request) -> Any:
    faults, chaos, fields = request.relay.faults, request.path.endswith("/chaos"), request.fields
    if request.command == "PUT":
        if not chaos and "rules" not in fields:
            raise BadRequest("rules: expected a list of rules")
        given = {stage: take_field(fields, stage, {}) for stage in CHAOS}
        try:
            faults.change(
                with_chaos(faults.text, given) if chaos else "\n".join(request.strings("rules")))
        except ValueError as e:
            raise BadRequest(str(e)) from None
    return to_chaos(faults.text) if chaos else {"rules": faults.text.splitlines()}


@route("GET /api/v1/stats?: figures by hour, by day and by account")
def show_stats(request: Request) -> Any:
    d, now, quotas = request.relay, int(time.time() // 3600), request.relay.reception.quotas
    kinds = {"received": "received", "forwarded": "delivered", "failed": "failed"}  # and their counters

    def used(figures: Mapping[str, int]) -> dict[str, int]:
        return {"received": 0, "failed": 0, **figures, "forwarded": figures.get("sent", 0)}

    return {
        "hours": [{"at": iso_time(h * 3600), "deferred": d.hours[h, "retrying"],
                   **{kind: d.hours[h, kind] for kind in kinds}} for h in range(now - 23, now + 1)],
        "days": [{"at": day, **used(figures)} for day, figures in quotas.days().items()],
        "accounts": [{"name": a.name, **used(quotas.today(a.name))}
                     for a in d.reception.accounts.listed()],
        "totals": {kind: int(d.metrics.get(f"smtp_messages_{counted}_total"))
                   for kind, counted in kinds.items()}}


def account_json(request: Request, account: Account) -> Fields:
    today, most = request.relay.reception.quotas.today(account.name), account.quota_daily
    used = today.get("received", 0)
    shown = words("name allowed_domains quota_daily quota_per_minute relay_host")
    return {**{name: getattr(account, name) for name in shown},
            "has_api_key": bool(account.api_key), "today": today, "used_today": used,
            "left_today": max(0, most - used) if most else None}


route("GET /api/v1/users?: list accounts")(lambda request: {"users": [
    account_json(request, account) for account in request.relay.reception.accounts.listed()]})


@route("POST /api/v1/users?: make one; its key is shown this once")
@route("PUT /api/v1/users/{name}?: change it")
@route("DELETE /api/v1/users/{name}?: remove it")
def change_user(request: Request) -> Any:
    s, given, new = request.relay.settings, request.fields, request.command == "POST"
    name = request.names.get("name") or take_field(given, "name", "")
    if not s.users_file:
        raise BadRequest("there is no accounts file: set SMTP_USERS_FILE")
    if new == any(a.name == name for a in request.relay.reception.accounts.listed()):
        trouble = f"account {name!r} {'is there already' if new else 'not found'}"
        raise HttpError(409 if new else 404, trouble)
    changed = {k: v for k, v in given.items() if k in ACCOUNT_KEYS and k != "password"}
    if password := take_field(given, "password", ""):
        changed["password"] = hash_password(password)
    if new:
        changed.setdefault("api_key", new_api_key())
    change = None if request.command == "DELETE" else changed
    change_account(s.users_file, name, change, Sealer(s.spool_key))
    return given_keys({"name": name, "api_key": changed.get("api_key")})


@route("GET /api/emails?limit: the account's own messages", ACCOUNT)
@route("GET /api/stats?: the account's own figures", ACCOUNT)
def show_account(request: Request) -> Any:
    name, inbox = request.account.name, request.inbox
    if request.path.endswith("/stats"):
        days = request.relay.reception.quotas.days(name)
        return {"account": name, **account_json(request, request.account), "days": days}
    mine: Query = ((lambda item: item["Username"] == name, True),)
    page = inbox.search(mine, 0, request.number("limit", 50))
    return {"total": page.total, "emails": [
        {"id": i["ID"], "subject": i["Subject"], "size": i["Size"],
         "to": [p["Address"] for p in i["To"]], "created": i["Created"],
         "status": status_of(inbox, i["ID"])} for i in page.items]}


@route("GET / /view/{id} /search: the page; at a message, at what `q` finds", SHELL)
def show_page(request: Request) -> str:
    request.head = {"Content-Type": HTML, "Content-Security-Policy": page_policy()}
    return PAGE


# -- the webhook --

def run_webhook(d: Delivering, events: queue.SimpleQueue[Any]) -> None:
    """POST events to SMTP_WEBHOOK_URL until the relay stops; when too many wait, start anew."""
    import urllib.request as web

    url, shown = urlsplit(d.settings.webhook_url), shown_url(d.settings.webhook_url)
    login, _, place = url.netloc.rpartition("@")
    target = url._replace(netloc=place, fragment="").geturl()
    headers = {"Content-Type": "application/json"}
    if login:
        secret = base64.b64encode(unquote_to_bytes(login)).decode()
        headers["Authorization"] = f"Basic {secret}"
    opener = web.OpenerDirector()  # one that follows no redirect
    for handler in (web.ProxyHandler({} if is_loopback(url.hostname or "") else None),
                    web.HTTPHandler(), web.HTTPSHandler(), web.HTTPDefaultErrorHandler(),
                    web.HTTPErrorProcessor()):
        opener.add_handler(handler)
    while True:
        event = events.get()
        if d.stopping.is_set():
            return
        if event is None:
            events = d.feed.subscribe()
            d.log.warn("webhook_behind", url=shown)
            continue
        if event["type"] not in words("received forwarded failed"):
            continue
        for pause in (0.0, *WEBHOOK_PAUSES):
            if d.stopping.wait(pause):
                return
            try:  # RFC 9110 calls 2xx success
                request = web.Request(target, dumps(event).encode(), headers)
                opener.open(request, timeout=WEBHOOK_TIME).close()
                break
            except (OSError, ValueError, http.client.HTTPException) as e:
                trouble = e
        else:
            d.log.error("webhook_failed", url=shown, id=event["id"], error=trouble)


# === 21 SENDMAIL =============================================================
#
# sendmail's command, for programs that know no other way to send: cron, PHP, mutt, git send-email,
# s-nail. There are two ways. LAUNCHER is what stands in sendmail's place on a machine where the
# relay is installed: it costs no time, and hands what it was given to SubmitHandler in the
# delivering half, where the caller is who the kernel says. Where no relay answers, the whole
# program does the errand: by SMTP to the relay after all, else into the spool, by the same rules. A
# relay that starts later finds it there; one that runs is told through the file ARRIVED.
#
# Exit status 75 means that the message was not taken and may be tried again.

SENDMAIL_NAMES = {"sendmail": [], "mailq": ["-bp"], "newaliases": ["-bi"]}
# A flag's value is none, attached to it ("-oi", may be empty), or there or in the next word ("-f x").
ALONE, ATTACHED, TAKEN = "cEGIiJkmnstUvxY", "AbdeqQT", "BCDFLMNORVXfhopr"
SENDMAIL_MODES = {"m": "deliver", "a": "deliver", "s": "smtp", "p": "queue", **dict.fromkeys("ihHv", "nothing")}  # -b
SENDMAIL_HELP = """\
usage: smtprelay.py sendmail [-i] [-t] [-f SENDER] [-F NAME] [RECIPIENT ...] < message

  -t         take recipients from To, Cc and Bcc     -bs  speak SMTP on standard input and output
  -i         a line of one dot does not end it       -bp  list the queue (as mailq)
  -f SENDER  the envelope sender                     -q   try all that is owed now
  -F NAME    the sender's full name                  other flags of sendmail are taken, and mean nothing"""

SUBMIT_SOCKET = "/run/smtprelay/submit.sock"
SUBMIT_CALLERS, SUBMIT_WORDS = 20, MIB
# To the relay: eight hexadecimal digits, so many octets of arguments, a NUL behind each; where it says ">", the
# message in such blocks, the last one empty. From it: the exit status, a line end, and what is to be said.
LAUNCHER = """\
#!/usr/bin/python3 -IS
# sendmail, mailq and newaliases: what is asked of them the running relay does, else the whole program.
import os, sys, _socket  # socket itself takes as long to load as all the rest

SOCKET, PROGRAM = "/run/smtprelay/submit.sock", "/usr/local/bin/smtprelay"
words = {"mailq": ["-bp"], "newaliases": ["-bi"]}.get(os.path.basename(sys.argv[0]), []) + sys.argv[1:]
given, answer, letter = b"".join(os.fsencode(word) + b"\\0" for word in words), b"", -1
stdin = iter(lambda: os.read(0, 65536), b"")
try:
    if not sys.stdin:  # closed; the socket would be descriptor 0
        raise OSError("the program says what is wrong")
    relay = _socket.socket(_socket.AF_UNIX)
    relay.settimeout(60)
    relay.connect(SOCKET)
    relay.sendall(b"%08x" % len(given) + given)
    answer = relay.recv(1)
    if answer == b">":
        answer, letter = b"", os.memfd_create("letter")
        try:
            for block in stdin:
                os.write(letter, block)
                relay.sendall(b"%08x" % len(block) + block)
            relay.sendall(b"00000000")
        except BrokenPipeError:
            pass  # it has heard enough, and says why
        relay.settimeout(600)
    for block in iter(lambda: relay.recv(65536), b""):
        answer += block
except OSError:
    pass
status, told, text = answer.partition(b"\\n")
if told:
    try:
        os.write(1 if status == b"0" else 2, text)
    except OSError:
        pass  # who closed it does not want to read it
    os._exit(int(status))
if letter >= 0:  # the relay has died: the program gets what has been read, and the rest
    for block in stdin:
        os.write(letter, block)
    os.lseek(letter, 0, 0)
    os.dup2(letter, 0)
os.execv(PROGRAM, [PROGRAM, "sendmail", *words])
"""


class Complaint(Exception):
    """Ends a verb: what to say, and the exit status."""

    def __init__(self, text: str, status: int = EX_NO) -> None:
        super().__init__(text)
        self.status = status


def read_errand(words: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Read sendmail's command line: what is to be done, the flags, the recipients; ValueError says what is wrong."""
    import getopt

    words = [word + "-" * bool(re.fullmatch(f"-[{ALONE}]*[{ATTACHED}]", word)) for word in words]
    try:
        flags, recipients = getopt.gnu_getopt(words, ALONE + re.sub("(.)", r"\1:", ATTACHED + TAKEN))
    except getopt.GetoptError as e:
        raise ValueError(str(e)) from None
    given = {}
    for flag, value in flags:
        given["-i" if re.match("-o?i|-O(?i:ignoredots)", flag + value) else "-f" if flag == "-r" else flag] = value
    mode = given.get("-b", "m")
    if mode not in SENDMAIL_MODES:
        hint = "; see the command serve" if mode in ("d", "D") else ""
        raise ValueError(f"-b{mode.rstrip('-')} is not done here{hint}")
    for text in (given.get("-f", ""), given.get("-F", ""), *recipients):
        if re.search("[\r\n\0]", text):  # it would be a command, or a header field, of the caller's own
            raise ValueError(f"{text!r} has a line end or a NUL")
    return "flush" if "-q" in given else "nothing" if "-I" in given else SENDMAIL_MODES[mode], given, recipients


def write_letter(raw: bytes, flags: Mapping[str, str], wanted: Iterable[str], me: str,
                 hostname: str) -> tuple[Envelope, bytes]:
    """Complete a message: who it is from and for, its date and its id; ValueError when it is for nobody.

    A name alone, as cron's, is one of this machine's: so it stands in the envelope, and in From, To and Cc. A CR
    alone ends a line of the body, as of a progress bar, but begins no field: a stranger may have put it there."""
    def people(text: str) -> list[tuple[str, str]]:
        return [(name, address if "@" in address else f"{address}@{hostname}")
                for name, address in read_addresses(text)]

    raw = re.sub(rb"(?<!\r)\r+(?=\n|\Z)", b"", raw).removesuffix(b"\n") + b"\n"
    if "-i" not in flags:
        raw = re.split(rb"(?m)^\.$", raw, maxsplit=1)[0]
    # an mbox line at the top is no field, and no body
    header = rb"\A(?:>?From .*\n)?((?:[!-9;-~]+[ \t]*:.*\n(?:[ \t].*\S.*\n)*)*)\n?"
    _, head, body = re.split(header, raw, maxsplit=1)
    given = flags.get("-f", me)
    author, sender = next(iter(people(given)), ("", ""))
    if not sender and given.strip(" <>"):
        raise ValueError(f"{given!r} is no address")
    text = head.replace(b"\r", b" ").decode("utf-8", "surrogateescape")
    fields = re.findall(r"(?m)^([!-9;-~]+)[ \t]*:(.*(?:\n[ \t].*)*)", text)
    known = {name.lower() for name, _ in fields}
    targets = known & {"resent-to", "resent-cc", "resent-bcc"} or {"to", "cc", "bcc"}
    fields += [(name, f" {text}") for name, text in {
        "From": write_mailbox(flags.get("-F") or author, sender or f"{me}@{hostname}"),
        "Date": email.utils.formatdate(localtime=True),
        "Message-ID": email.utils.make_msgid(domain=hostname)}.items() if name.lower() not in known]
    wanted, kept = [*wanted], []
    for name, text in fields:
        kind = name.lower()
        if "-t" in flags and kind in targets:
            wanted.append(text)
        if kind in ("from", "to", "cc") and people(text) != read_addresses(text):
            text = " " + ",\n\t".join(write_mailbox(*person) for person in people(text))
        if kind not in ("bcc", "resent-bcc"):
            kept.append(f"{name}:{text}\n")
    recipients = [*dict.fromkeys(address for text in wanted for _, address in people(text))]
    if not recipients:
        raise ValueError("nobody is named to send to")
    written = "".join([*kept, "\n"]).encode("utf-8", "surrogateescape") + body.replace(b"\r", b"\n")
    content = written.replace(b"\n", b"\r\n")
    notify, ret = (asked(**{name: value * bool(re.fullmatch(PARAMETERS[name][1], value))})  # RFC 3461
                   for name in ("NOTIFY", "RET") for value in [flags.get(f"-{name[0]}", "").upper()])
    return Envelope(sender, "local", me, "local", "", needed_flags(content, sender, *recipients),
                    recipients, ret, dict.fromkeys(recipients, notify)), content


def write_mailbox(name: str, address: str) -> str:
    """Return a name and an address as they stand in a header; what is an encoded word already stays."""
    plain = "=?" in name or name.isascii() and not re.search(r'[][\\()<>@,:;".]', name)
    return f"{name if plain else phrase(name)} <{address}>" if name else address


def user_name(uid: int) -> str:
    """Return a user's name in this machine, as an address can have it."""
    try:
        return re.sub(r"[^\w.+-]", "_", pwd.getpwuid(uid).pw_name)
    except KeyError:  # a user without a name, as containers have them
        return f"user{uid}"


def dial(address: Address, seconds: float) -> socket.socket:
    """Connect to where a relay of this machine listens."""
    if not address.path:
        return socket.create_connection((address.host, address.port), seconds)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(seconds)
    sock.connect(address.path)
    return sock


def enter_spool(settings: Settings) -> None:
    """Make sure that this user may use the spool, root as its owner: the relay must be able to read all of it."""
    path = abspath(settings.spool)
    try:
        owner = os.stat(path)
    except FileNotFoundError:
        raise Complaint(f"no relay answers, and there is no spool at {path}", EX_UNAVAILABLE) from None
    except PermissionError:
        owner = os.stat(dirname(path))
    if os.geteuid() == 0 and owner.st_uid:
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        who = user_name(owner.st_uid)
        raise Complaint(f"no relay answers, and the spool {path} belongs to {who}: be {who}, or root", EX_UNAVAILABLE)


def own_reception(settings: Settings, trouble: object) -> Reception:
    """Return a way into the spool where the relay does not answer; Complaint when there is none.

    Where nobody has named a spool, only one that a relay has made is used: cron's directory is no place for mail.
    Whether it is sent or held is for the relay to say, whose settings cron's sendmail does not know."""
    open_door = settings.but(
        delivery="relay", users_file="", auth_required=False, tls_required=False, rate_limit=0, audit_log="")
    log = Log(os.devnull, level="error")
    try:
        if settings.storage == "memory":
            raise FileNotFoundError("it is in the relay's memory")
        if "SMTP_SPOOL" in os.environ:
            os.makedirs(settings.spool, 0o700, exist_ok=True)
        enter_spool(settings)
        spool = Spool(open_door, log)
    except (Complaint, OSError, SettingsError) as e:
        raise Complaint(f"cannot take the message now: relay: {trouble}; spool: {e}", EX_TEMPFAIL) from None

    def announce(stem: str, owed: bool) -> bool:
        with suppress(OSError):
            write_file(spool.path(ARRIVED), b"")
        return True

    return Reception(open_door, spool, Metrics(), log, announce, Accounts(open_door, log), None,
                     Quotas("", log), Faults(""))


def admit_letter(reception: Reception, envelope: Envelope, content: bytes) -> dict[str, str]:
    """Put a message into the spool, in portions; return the replies to those recipients that were refused."""
    refused, left, most = {}, envelope.recipients, reception.settings.max_recipients
    while left:
        portion, left = left[:most], left[most:]
        try:
            reception.admit(dataclasses.replace(envelope, recipients=portion), [content])
        except (Refused, OSError) as e:
            refused.update(dict.fromkeys(portion, str(getattr(e, "reply", INTERNAL))))
    return refused


def act(relay: Delivering, method: str, path: str, limit: int = 1000) -> Any:
    """Do what a route does, for a caller in this process who may do anything; HttpError says what is wrong."""
    request = Request.__new__(Request)  # on no connection
    request.relay, request.inbox, request.command, request.head = relay, relay.inbox, method, {}
    request.path = f"{quote(path)}?limit={limit}"
    try:
        value = request.find_route().action(request)
    except (KeyError, FileNotFoundError):
        raise HttpError(404, "message not found") from None
    return value if isinstance(value, bytes) else loads(dumps(value, default=vars))


def do_errand(words: Sequence[str], me: str, hostname: str, order: Callable[[str, str], Any],
              read: Callable[[], bytes], send: Callable[[Envelope, bytes], dict[str, str]]) -> tuple[int, str]:
    """Do what sendmail was asked to; return the exit status and what is to be said.

    NotImplementedError for a dialogue, which only the whole program can hold."""
    try:
        mode, flags, recipients = read_errand(words)
        if mode == "smtp":
            raise NotImplementedError
        if mode == "queue":
            return 0, mailq(order("GET", "/api/v1/queue"))
        if mode == "flush":
            order("POST", "/api/v1/queue/all/retry")
        if mode != "deliver":
            return 0, ""
        envelope, content = write_letter(read(), flags, recipients, me, hostname)
    except Refused as e:
        return EX_UNAVAILABLE, f"sendmail: {e.reply}\n"
    except ValueError as e:
        return EX_USAGE, f"sendmail: {e}\n"
    refused = {}
    for bad, address in (BAD_SENDER, envelope.reverse_path), *((BAD_RECIPIENT, a) for a in envelope.recipients):
        try:
            parse_path(f"<{address}>")
        except ValueError as e:
            refused[address] = f"{bad}: {e}"
    envelope.recipients = [address for address in envelope.recipients if address not in refused]
    if envelope.reverse_path not in refused:
        refused.update(send(envelope, content))
    status = {"4": EX_TEMPFAIL, "5": EX_UNAVAILABLE}.get(min(refused.values(), default="")[:1], 0)
    return status, "".join(f"{address}: {reply}\n" for address, reply in refused.items())


def complain(*lines: object) -> None:
    for line in lines:
        print(f"smtprelay: {line}", file=sys.stderr)


def send(settings: Settings, envelope: Envelope, content: bytes) -> dict[str, str]:
    """Hand a message to the relay by SMTP, as to any next hop, and into the spool for whom that does not answer.

    Return the replies to those recipients that were refused."""
    place, quiet = settings.port[0], settings.but(users_file="", aliases="")
    owed = [Recipient(a, **read_asked(f"<{a}>{envelope.asked_for[a]}")[1]) for a in envelope.recipients]
    message = Message("", Status.RECEIVED, "", envelope.reverse_path, owed, flags=envelope.flags,
                      **read_asked(f"<>{envelope.asked}")[1])
    log = Log(os.devnull, level="error")
    delivery = Delivery(quiet, log, Accounts(quiet, log))
    outcomes = delivery.attempt_at(
        Target(place.host, place.port, "none", settings.auth_user, settings.auth_password), message,
        [(owed, Outgoing(io.BytesIO(content)))], lambda: None, [])
    delivery.stop()
    told, unanswered = {}, []
    for address, o in outcomes.items():
        if o.status is LATER and (o.of_host or o.code in (0, 421)):
            unanswered.append(address)
        elif o.status is not Status.FORWARDED:
            told[address] = f"{o.code} {o.reply}"
    if unanswered:
        envelope.recipients = unanswered
        told.update(admit_letter(own_reception(settings, outcomes[unanswered[0]]), envelope, content))
    return told


def speak_smtp(settings: Settings, given: int) -> int:
    """Pass SMTP from a descriptor on, and the answers to standard output (sendmail -bs)."""
    try:
        sock = dial(settings.port[0], settings.relay_timeout)
    except OSError as e:
        sock, theirs = socket.socketpair()
        Thread(target=Session(own_reception(settings, e), theirs, "local").run, daemon=True).start()
    sock.settimeout(None)
    os.write(1, sock.recv(4096))  # nothing may be said before the greeting

    def pass_on() -> None:
        with suppress(OSError):
            for block in iter(lambda: os.read(given, 64 * KIB), b""):
                sock.sendall(block)
            sock.shutdown(socket.SHUT_WR)

    Thread(target=pass_on, daemon=True).start()
    for block in iter(lambda: sock.recv(64 * KIB), b""):
        write_all(1, block)
    return 0


def mailq(listed: Mapping[str, Any]) -> str:
    """Return the queue as mailq prints it: monitoring looks for the words of the last line."""
    rows, lines = [*listed["messages"], *listed["held"]], []
    for row in rows:
        lines += [f"{row['id']} {row['size']:>8} {row['received_at'][:19]}  {row['reverse_path'] or 'MAILER-DAEMON'}",
                  f"    ({row['status']}) {row['reason']}",
                  *(f"    {address}" for address in row["recipients"])]
    total = f"-- {-(-sum(row['size'] for row in rows) // KIB)} Kbytes in {len(rows)} Request{'s' * (len(rows) != 1)}."
    return "\n".join([*lines, total if rows else "Mail queue is empty"]) + "\n"


class SubmitHandler(socketserver.BaseRequestHandler):
    """One launcher: what it was asked to do, and how it went; after SUBMIT_CALLERS it is left to itself."""

    server: HttpServer
    since = math.inf  # always at work

    def handle(self) -> None:
        sock, callers, relay = self.request, self.server.callers, self.server.relay
        if len(callers) >= SUBMIT_CALLERS:
            return
        callers.add(self)
        wire = Wire(sock, monotonic() + relay.settings.command_timeout)

        def read_letter() -> bytes:
            """Ask for the message and read it; PeerGone where its end does not come: half a message is none."""
            letter, wire.deadline = bytearray(), monotonic() + relay.settings.data_timeout
            wire.write(b">")
            while more := int(wire.read(8), 16):
                if len(letter) + more > relay.settings.max_size:
                    raise Refused(TOO_BIG)
                letter += wire.read(more)
            return bytes(letter)

        with suppress(ValueError, NotImplementedError):  # it hears nothing, and does it by itself
            words = wire.read(min(int(wire.read(8), 16), SUBMIT_WORDS))
            uid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            status, said = do_errand(
                words.decode("utf-8", "surrogateescape").split("\0")[:-1], user_name(uid), relay.settings.hostname,
                partial(act, relay), read_letter, partial(admit_letter, relay.reception))
            shut(sock, socket.SHUT_RD)  # who is still writing learns it
            sock.settimeout(relay.settings.command_timeout)
            sock.sendall(f"{status}\n{said}".encode("utf-8", "surrogateescape"))

    def finish(self) -> None:
        self.server.callers.discard(self)


# === 22 RELAY ================================================================
#
# Joins the parts. Delivering is the delivering half: it takes in the stems that the Link brings and
# those it finds in the spool, and its workers move messages through their lives. Supervisor runs
# both halves as processes of their own, made by fork before there are threads, and makes a half
# that died anew; the lock, the listening sockets, the Link and the counters are the supervisor's,
# so a half that is remade finds all as it was. LIBRARY runs both as threads.
#
# What is owed has a time and a reason, be it a delivery, a report or a record that the disk did not
# take: the scheduler has it, and the same workers do it (wrap_up). Threads here: reader (Link,
# spool), workers, sweeper.

SWEEP_EVERY = 1.0
CALM_TIME = 10.0  # seconds without a new message after which there is time for the inbox
LOOK_EVERY = 600.0  # through the whole spool, for what nobody has told of
WRITE_AGAIN = 5.0  # seconds until what the disk did not take is tried again
CLOCK_WAS_SET = 1577836800.0  # 2020: times before it come from a clock that was not set yet
CLOCK_JUMP = 3600.0
QUEUE_SHOWS = ("id", "status", "reverse_path", "size", "attempts", "last_error", "received_at")
NOWHERE_TO = "there is nowhere to send it: set SMTP_RELAY_HOST"
BY_HAND = {Status.HELD: "released", Status.FAILED: "retried by hand"}  # from then on its age counts anew
REPORTS_AN_HOUR, REPORTED_AT_ONCE = 100, 100  # reports; messages of one sender in one of them
CROWDED_PAUSE = 1.0

Shelf = dict[str, tuple[float, int]]  # stem: since when, octets; oldest first


class Delivering:
    """The delivering half: scheduler, workers, records."""

    def __init__(self, parts: Parts) -> None:
        self.settings, self.spool, self.log = parts.settings, parts.spool, parts.log
        self.link, self.pair, self.metrics = parts.link, parts.pair, parts.metrics.row(DELIVERING_ROW)
        reception = self.reception = parts.reception(self.metrics)
        reception.announce = lambda stem, owed: self.take_in([stem], owed)  # it needs no Link
        self.audit, self.faults, self.port = reception.audit, reception.faults, (*parts.own, 0)[0]
        self.scheduler = Scheduler(self.settings, show=partial(self.metrics.set, "smtp_queue_depth"))
        self.delivery = Delivery(self.settings, self.log, reception.accounts, parts.own)
        self.can_release = bool(self.settings.relay_host or self.settings.delivery == "mx")
        tags = re.findall("([^=;]+)=([^;]*)", self.settings.tags)
        self.inbox = Inbox(self.spool, self.log, int(time.time()) * 1000, tags)
        self.feed, self.reports = Feed(), Buckets()
        self.hours: Counter[tuple[int, str]] = Counter()
        self.marks: dict[str, Event] = {}
        self.web = [HttpServer(sock, self) for sock in parts.http] + [
            HttpServer(sock, self, SubmitHandler) for sock in parts.submit]
        self.threads: list[Thread] = []
        self.stopping, self.lock = Event(), Lock()
        self.finished: Shelf = {}
        self.held: Shelf = {}
        self.owed: Shelf = {}  # this, and octets, only where SMTP_SPOOL_MAX_SIZE is set
        self.shelves = {Status.HELD: self.held, **dict.fromkeys(FINISHED, self.finished)}
        self.octets = self.octets_owed = 0
        self.sidecars: deque[str] = deque()
        self.unwritten: dict[str, Message] = {}  # what the disk has not taken, by stem
        self.stumbles: dict[str, tuple[int, str, str]] = {}  # stem: how often, why, until when
        self.late: dict[str, set[str]] = {}  # sender: stems whose report is past the cap
        self.told: dict[str, str] = {}  # stem: the report that tells of it
        self.look_at = self.came_at = 0.0
        self.clock_set, self.skew = CLOCK_WAS_SET, time.time() - monotonic()

    def start(self) -> None:
        """Start the threads; what the spool holds is found in the background."""
        jobs = [("reader", self.read), ("sweeper", self.sweep)]
        jobs += [("http", server.serve_forever) for server in self.web]
        jobs += [(f"worker-{i}", self.work) for i in range(self.settings.workers)]
        if self.settings.webhook_url:
            jobs.append(("webhook", partial(run_webhook, self, self.feed.subscribe())))
        for name, job in jobs:
            thread = Thread(target=job, name=name, daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self, patience: float = STOP_PATIENCE) -> None:
        """Let workers finish what they have in hand."""
        self.stopping.set()
        self.scheduler.stop()
        self.inbox.close()
        self.feed.publish(None)
        for server in self.web:
            stop_server(server)
        self.inbox.save()
        end = monotonic() + patience
        for thread in self.threads:
            if thread.name.startswith(("worker", "sweeper")):
                thread.join(max(0.0, end - monotonic()))
        for message in list(self.unwritten.values()):
            with suppress(OSError):
                self.spool.save(message)
        self.delivery.stop()

    # -- what comes in --

    def read(self) -> None:
        """Take in what the spool holds, then what arrives; so the inbox is in order of arrival."""
        try:
            self.look_again()
        except Exception:
            self.log.bug("find_bug")
        while (words := self.link.read(LINK_QUIET if self.sidecars else None)) is not None:
            try:
                before = self.came_at
                self.take_in([word for word in words if len(word) == STEM_LENGTH], self.settings.delivery != "hold")
                for word in words:
                    if word == LOOK:
                        self.look_at = 0.0
                    elif word in self.marks:  # all before it is in
                        self.marks.pop(word).set()
                if not words and self.sidecars:  # these can wait: they say what the .eml says
                    message, content = self.spool.fetch(self.sidecars.popleft())
                    content.close()  # not by load: it looks for the sidecar that is to be written
                    self.spool.save_first(message)
                if 0 < self.came_at - before < 2 * LINK_QUIET:  # to be woken for each of many would cost both sides
                    time.sleep(LINK_QUIET)
            except (KeyError, OSError, SpoolError) as e:
                self.log.debug("sidecar_not_written", error=e)
            except Exception:
                self.log.bug("intake_bug")

    def find(self) -> None:
        """Queue what the spool holds, by name only: workers read the records."""
        owed, known = [], self.inbox.last
        for stem, done in self.spool.names():
            if self.inbox.add(stem) > known:
                self.hours[id_micros(stem[11:]) // 3600000000, "received"] += 1
            if done is None and stem not in self.held:
                owed.append(stem)
                if self.settings.spool_max_size and stem not in self.owed:
                    self.shelve(stem, Status.RECEIVED)
            elif done and stem not in self.finished:
                with suppress(OSError):
                    self.shelve(stem, done, self.spool.finished_at(stem, done))
        self.scheduler.put_all(owed, UNREAD)
        if owed:
            self.log.info("queue_found", messages=len(owed))

    def take_in(self, stems: Sequence[str], owed: bool) -> bool:
        """Queue messages that are new, or hold them."""
        known = self.inbox.last
        stems = [stem for stem in stems if self.inbox.add(stem) > known]
        for stem in stems:
            if not owed:
                self.shelve(stem, Status.HELD)
                self.sidecars.append(stem)
            elif self.settings.spool_max_size:
                self.shelve(stem, Status.RECEIVED)
            self.tell("received", stem)
        if stems:
            self.came_at = monotonic()
            if owed:
                self.scheduler.put_all(stems, self.delivery.lane())
            self.make_room()
        return True

    def catch_up(self) -> None:
        """Wait until all that was announced is taken in: who got a 250 may look for it now."""
        if not self.stopping.is_set():
            mark = f"={token_hex(8)}"
            seen = self.marks[mark] = Event()
            self.link.announce(mark)
            if not seen.wait(1.0):
                self.marks.pop(mark, None)

    def record(self, stem: str) -> Message:
        """Return a message's record as it is now, whether the disk has taken it or not."""
        return self.unwritten.get(stem) or self.spool.load(stem)

    def tell(self, kind: str, stem: str, detail: str = "") -> None:
        """Publish an event in the life of a message."""
        now = time.time()
        self.hours[int(now // 3600), kind] += 1
        if self.feed.listeners:
            self.feed.publish({"type": kind, "id": stem[11:27], "at": iso_time(now), "detail": detail,
                               "seq": self.inbox.add(stem) if kind == "received" else 0})

    # -- what is kept --

    def shelve(self, stem: str, status: Status | None, at: float = 0.0) -> bool:
        """Note where a message of this status lies (None: nowhere), since when; tell if it lay anywhere."""
        weighed, octets, found = self.settings.spool_max_size > 0, 0, False
        shelf = self.shelves.get(status, self.owed if weighed else None) if status else None
        if weighed and shelf is not None:
            with suppress(OSError):
                octets = self.spool.size(stem)
        with self.lock:
            for other in (self.owed, self.held, self.finished):
                if stem in other:
                    found, less = True, other.pop(stem)[1]
                    self.octets -= less
                    self.octets_owed -= less if other is self.owed else 0
            if shelf is not None:
                shelf[stem] = at or time.time(), octets
                self.octets += octets
                self.octets_owed += octets if shelf is self.owed else 0
        if weighed:
            self.metrics.set("owed_bytes", self.octets_owed)
        return found

    def make_room(self) -> None:
        """Remove what is past SMTP_KEEP and, past the spool's limits, the oldest that is not owed."""
        s = self.settings
        for shelf in (self.finished, self.held) if s.delivery == "hold" else (self.finished,):
            while shelf:
                with self.lock:
                    stem, (at, _) = next(iter(shelf.items()), ("", (math.inf, 0)))
                is_old = shelf is self.finished and max(at, self.clock_set) < time.time() - s.keep
                if not (is_old or 0 < s.spool_max_messages < len(self.inbox.entries)
                        or 0 < s.spool_max_size < self.octets):
                    break
                try:
                    if self.shelve(stem, None):  # else another thread was quicker
                        self.discard(stem)
                except OSError as e:
                    self.log.error("not_removed", stem=stem, error=e)

    def discard(self, stem: str) -> None:
        """Remove a message from everywhere; its record may be gone already."""
        self.shelve(stem, None)
        self.spool.remove(stem)
        self.unwritten.pop(stem, None)
        self.inbox.delete([stem[11:27]])
        self.log.info("removed", id=stem[11:27])
        self.tell("removed", stem)

    # -- workers --

    def work(self) -> None:
        bound = False
        while not self.stopping.is_set():
            try:
                task = self.scheduler.take()
                if bound != (len(self.scheduler.active) >= CROWD):
                    bound = keep_together(bound, not bound, -1)
                if task:
                    self.work_at(task)
            except Exception:
                self.log.bug("worker_bug")
                self.stopping.wait(SWEEP_EVERY)

    def work_at(self, task: Task) -> None:
        """Do one task, come what may: what makes us stumble waits as after a refusal, and says why."""
        stem, lane = task
        try:
            if lane in LOCAL_LANES:
                self.sort(stem)
            else:
                self.deliver(stem, lane)
            self.stumbles.pop(stem, None)
        except SpoolError as e:
            self.spool.set_aside(stem + ".eml", str(e))
        except Exception as e:
            if isinstance(e, KeyError) and e.args == (stem,):  # removed while it waited
                self.unwritten.pop(stem, None)
                return
            times = self.stumbles.get(stem, (0,))[0] + 1
            delay = backoff(self.settings, times, self.scheduler.rng)
            self.scheduler.put(stem, lane, delay)
            self.stumbles[stem] = times, f"trouble here: {e}", iso_time(time.time() + delay)
            if isinstance(e, OSError):
                self.log.error("spool_error", stem=stem, error=e, seconds=round(delay, 1))
            else:
                self.log.bug("delivery_bug", stem=stem)
        finally:
            self.scheduler.done(stem)

    def sort(self, stem: str) -> None:
        """Do what a message's record says is owed here, and queue it for its next hops in time."""
        message = self.record(stem)
        unsettled = message.status not in SETTLED
        if (message.status is Status.RECEIVED and self.settings.delivery == "hold"
                and "RELEASED" not in message.flags):
            for r in message.pending():
                r.status = Status.HELD
            message.move(Status.HELD, HELD_BY_MODE)
        if message.owed or stem in self.unwritten or unsettled and not message.pending():
            self.wrap_up(message)
        elif not unsettled:
            self.shelve(stem, message.status)
            if message.status is Status.HELD:
                self.spool.save_first(message)
        if message.pending():
            wait = unix_time(message.next_attempt_at) - time.time()
            for lane in self.delivery.routes(message):
                if lane not in self.scheduler.waiting[stem]:
                    self.scheduler.put(stem, lane, min(wait, self.settings.retry_max_delay))

    def deliver(self, stem: str, lane: str) -> None:
        """Make one attempt, and queue the message for the next where one is owed."""
        if stem in self.finished or stem in self.held:
            return None  # told of twice, by the Link and by a look through the spool
        message, content = self.spool.fetch(stem)
        with content:
            message = self.unwritten.get(stem, message)
            for r in message.recipients if "RELEASED" not in message.flags else ():
                if r.status is Status.RECEIVED and not self.delivery.is_allowed(r.address):
                    r.status, r.reply = Status.HELD, HELD_BY_RULE
            self.unwritten[stem] = message  # come what may
            owed = self.delivery.routes(message).get(lane)
            if not owed:  # it is held back, or an account's host has changed
                return self.scheduler.put(stem, UNREAD)
            if self.scheduler.lanes[lane].steps and self.expires(message, owed):
                return None
            if message.status is not Status.FORWARDING:
                message.move(Status.FORWARDING)
            if self.feed.listeners:
                self.tell("forwarding", stem)
            started, reached = monotonic(), partial(self.scheduler.release, lane, False)
            try:
                attempt = self.delivery.attempt(message, lane, content, reached)
            except Exception as e:  # whatever it is, the message waits for itself, no longer than any
                self.log.bug("attempt_bug", id=message.id)
                trouble = Outcome(LATER, False, 0, f"trouble here: {e!r}")
                attempt = Attempt({r.address: trouble for r in owed}, None, [])
        if attempt.crowded:
            room = self.scheduler.crowd(lane)
            if room:
                self.log.warn("next_hop_crowded", next_hop=lane, connections=room)
            others = len(self.scheduler.lanes[lane].running) > 1  # else another lane's are in its way
            return self.scheduler.put(stem, lane, 0.0 if others else CROWDED_PAUSE)
        self.metrics.observe("smtp_delivery_duration_seconds", monotonic() - started)
        message.transcript = [*message.transcript, *attempt.transcript][-TRANSCRIPT_KEPT:]
        return self.settle(message, lane, owed, attempt)

    def settle(self, message: Message, lane: str, tried: Sequence[Recipient], attempt: Attempt) -> None:
        """Enter an attempt's outcomes into the record; who was refused for now waits for the next.

        Trouble with the next hop, which costs no attempt, or several messages unanswered, throttle it."""
        s, trouble, why, unanswered = self.settings, attempt.trouble, "", not attempt.trouble
        owed: list[Recipient] = []
        for r in tried if trouble else message.pending():
            o = trouble or attempt.outcomes.get(r.address)
            if o is None:
                continue
            vars(r).update(zip(o._fields[2:-1], o[2:-1]))  # code to dsn
            if not trouble:
                r.status, r.attempts = o.status, r.attempts + 1
            later = o.status is LATER
            if later and not owed or not why and o.status is NEVER:
                why = str(o)  # if anyone is still owed it, the reason is theirs
            owed += [r] if later else []
            unanswered = unanswered and later and o.code in (0, 421) and bool(o.host)
        message.attempts = max(message.attempts, *[r.attempts for r in message.recipients])
        if why:
            self.metrics.inc("smtp_delivery_failures_total")
            message.last_error = why
        if not trouble and not unanswered:
            self.scheduler.release(lane)
        if not owed:
            self.wrap_up(message)
        elif not s.retry or not trouble and 0 < s.retry_max_attempts <= message.attempts:
            self.fail(message, owed, f"{why} (attempt {message.attempts} was the last)")
        elif not self.expires(message, owed):
            delay = backoff(s, max(r.attempts for r in owed), self.scheduler.rng)
            if len(owed) < len(attempt.outcomes) and any(r.code in (452, 552) for r in owed):
                delay = 0.0  # it takes them in portions, RFC 5321 4.5.3.1.10
            if trouble or unanswered and self.scheduler.miss(lane, message.stem):
                seconds, is_new = self.scheduler.throttle(lane, why)
                if is_new:
                    self.log.warn("next_hop_throttled", next_hop=lane, seconds=round(seconds, 1), reason=why)
                delay = seconds if trouble else delay
            message.next_attempt_at = iso_time(time.time() + delay)
            message.move(Status.RETRYING, why)
            self.metrics.inc("smtp_messages_deferred_total")
            self.tell("retrying", message.stem, why)
            self.log.info("retrying", id=message.id, seconds=round(delay, 1), attempts=message.attempts, reason=why)
            self.wrap_up(message)
            if trouble:
                return self.scheduler.put(message.stem, lane)  # which holds it
            for name, recipients in self.delivery.routes(message).items():
                if any(r in owed for r in recipients):
                    self.scheduler.put(message.stem, name, delay)

    def expires(self, message: Message, recipients: Iterable[Recipient]) -> bool:
        """Give up on recipients of a message that has waited for too long; tell whether it has."""
        self.watch_clock()  # times from before it was set prove nothing
        since = now = time.time()
        for entry in reversed(message.history):
            at = unix_time(entry["at"])
            since = min(since, at) if at >= self.clock_set else since
            if entry["detail"] in BY_HAND.values():
                break
        if (now - since) * self.settings.time_scale <= self.settings.retry_max_age:
            return False
        self.metrics.inc("smtp_messages_expired_total")
        self.fail(message, recipients, f"not delivered within {self.settings.retry_max_age:g} seconds; "
                                       f"{message.last_error}")
        return True

    def fail(self, message: Message, recipients: Iterable[Recipient], reason: str) -> None:
        for r in recipients:
            r.status, r.reply = Status.FAILED, r.reply or reason
        message.last_error = reason
        self.wrap_up(message)

    # -- what is owed here: reports, ends, records --

    def wrap_up(self, message: Message) -> None:
        """Finish a message that nobody is owed, report on it, write its record; what cannot be, is owed."""
        stem, delay = message.stem, 0.0
        if message.status not in SETTLED and not message.pending():
            self.scheduler.drop(stem)
            self.finish(message)
        message.owed, untold = "", wants_report(message) if self.settings.bounce else []
        if untold and stem not in self.told:
            message.owed, delay = self.report(message)
        report = self.told.pop(stem, "")
        if untold and report:
            message.owed, delay = "", 0.0
            for r in untold:
                r.reported = True
            message.note(REPORTED)
            self.log.info("reported", id=message.id, report=report)
        if message.status in FINISHED:
            message.next_attempt_at = iso_time(time.time() + delay) if delay else ""
        try:
            self.spool.save(message)
            self.unwritten.pop(stem, None)
        except OSError as e:  # kept, so that nothing is sent twice
            self.unwritten[stem], delay = message, WRITE_AGAIN
            message.owed = f"the record is not written: {e}"
            self.log.error("record_not_written", id=message.id, error=e)
        if delay:
            self.scheduler.put(stem, UNREAD, delay)
            if stem in self.told:  # by another worker, since we looked
                self.scheduler.put(stem, UNREAD)
        elif message.status in SETTLED:
            self.shelve(stem, message.status)

    def finish(self, message: Message) -> None:
        """Say that nobody is owed a message any more, or only those held back."""
        statuses, last = [r.status for r in message.recipients], message.recipients[-1]
        if Status.HELD in statuses:
            self.log.info("held", id=message.id, reason=HELD_BY_RULE)
            return message.move(Status.HELD, HELD_BY_RULE)
        failed = Status.FAILED in statuses
        word, event, counted = ("failed",) * 3 if failed else ("forwarded", "delivered", "sent")
        why = message.last_error * failed
        message.move(Status(word), why)
        self.metrics.inc(f"smtp_messages_{event}_total")
        self.tell(word, message.stem, why)
        self.log.info(word, id=message.id, host=last.host, code=last.code, reply=last.reply, attempts=message.attempts)
        if self.audit.sink:
            self.audit.info(event, id=message.id, user=message.user,
                            recipients=[vars(r) for r in message.recipients])
        self.reception.quotas.count(message.user, counted)

    def report(self, message: Message) -> tuple[str, float]:
        """Tell a message's sender whom it did not reach, once; or return why not yet, and for how long.

        Past the cap, what failed of one sender's messages goes into one report later."""
        stem, to, rate = message.stem, message.reverse_path, REPORTS_AN_HOUR / 60
        if not self.reports.take("", rate, REPORTS_AN_HOUR):
            self.late.setdefault(to, set()).add(stem)
            self.log.warn("report_put_off", id=message.id, reason=REPORTS_PUT_OFF)
            return REPORTS_PUT_OFF, 3600.0
        late = sorted(self.late.pop(to, set()) - {stem})[:REPORTED_AT_ONCE]
        others = [m for m in self.records(late) if wants_report(m)]
        try:
            self.metrics.inc("smtp_queue_depth", -1 - len(others))  # it takes the place of these
            with self.spool.content(stem) as file:
                original = file.read(REPORT_FULL_MAX + 1)
            host, written = self.settings.hostname, datetime.datetime.now(datetime.timezone.utc)
            data = build_report(message, original, host, written, others, self.settings.max_size)
            envelope = Envelope("", "local", host, "ESMTP", "", needed_flags(data, to), [to])
            id = self.reception.admit(envelope, [data])
        except Exception as e:
            self.reports.take("", rate, REPORTS_AN_HOUR, -1)
            why = f"the report is not written: {e}"
            if not isinstance(e, (OSError, Refused)):
                self.log.bug("report_bug", id=message.id)
                return why, self.settings.retry_max_delay
            self.log.error("report_failed", id=message.id, error=e)
            if isinstance(e, Refused) and e.reply.code >= 500 and not others:
                return "", 0.0  # it is too large, as short as it can be
            return why, WRITE_AGAIN
        for one in (message, *others):
            self.told[one.stem] = id
        for one in others:
            self.scheduler.put(one.stem, UNREAD)
        return "", 0.0

    # -- what goes on beside --

    def sweep(self) -> None:
        """Do what is done every second."""
        while not self.stopping.wait(SWEEP_EVERY):
            for job in (self.delivery.drop_idle, self.watch_clock, self.make_room, self.look_again,
                        self.reception.quotas.save, self.inbox.save, self.sum_up):
                try:
                    job()
                except Exception:  # the others are done all the same
                    self.log.bug("sweep_bug")

    def sum_up(self) -> None:
        """Read what nobody has looked at once nothing has come for a while: a search is quick then."""
        if monotonic() - self.came_at > CALM_TIME:
            self.inbox.summarise_rest(within=0.2, most=10_000)

    def watch_clock(self) -> None:
        """Notice that the clock was set forward: ages from before that are not to be trusted."""
        skew = time.time() - monotonic()
        if skew - self.skew > CLOCK_JUMP:
            self.clock_set = time.time()
            self.log.warn("clock_was_set", seconds=round(skew - self.skew))
        self.skew = skew

    def look_again(self) -> None:
        """Find what no Link told of: it was full, sendmail has spooled beside us, a half has died.

        Now and then for the sake of it, and the self-signed pair is renewed in time; sessions reread it."""
        if self.spool.on_disk and exists(self.spool.path(ARRIVED)):
            os.unlink(self.spool.path(ARRIVED))
            self.look_at = 0.0
        if monotonic() > self.look_at:
            self.look_at = monotonic() + LOOK_EVERY
            try:
                self.find()
            except BaseException:
                self.look_at = 0.0
                raise
            if self.settings.tls_self_signed and not self.settings.tls_cert:
                self_signed(dirname(self.pair[0]), self.settings.hostname)

    # -- what people may do to the messages: the same whether the relay runs or not --
    #
    # Where none runs, this half was not started; whatever a verb asks for then goes into the
    # records, to be found by the next start. HttpError says what is wrong.

    def load(self, id: str) -> Message:
        """Return the record of a message."""
        try:
            return self.record(self.inbox.entry(id).stem)
        except KeyError:
            raise HttpError(404, f"message {id} not found") from None

    def records(self, stems: Iterable[str]) -> Iterator[Message]:
        """Yield the records of those messages that can be read."""
        for stem in stems:
            try:
                yield self.record(stem)
            except (KeyError, OSError, SpoolError) as e:
                self.log.debug("not_shown", stem=stem, error=e)

    def queue(self, limit: int = 200) -> Fields:
        """Return what is owed and what is held, oldest first, with reasons; and the next hops' states."""
        stems, hops = self.scheduler.snapshot(limit)
        lists: tuple[list[Any], list[Any]] = [], []  # by whether they are held
        for m in self.records(dict.fromkeys([*stems, *[*self.held][:limit]])):
            is_held = m.status is Status.HELD
            reason = m.owed or is_held and m.history[-1]["detail"] or m.last_error
            _, reason, due = self.stumbles.get(m.stem, (0, reason, m.next_attempt_at))
            for hop in hops if not reason else ():
                if hop["reason"] and hop["name"] in self.scheduler.waiting.get(m.stem, ()):
                    reason, due = hop["reason"], hop["until"]
            lists[is_held].append({
                **{name: vars(m)[name] for name in QUEUE_SHOWS}, "next_attempt_at": due, "reason": reason,
                "recipients": [r.address for r in m.recipients if r.status not in FINISHED]})
        return {"messages": lists[0], "held": lists[1], "total": len(self.scheduler), "next_hops": hops}

    def retry(self, id: str) -> int:
        """Try a message now, or "all" that are owed, or release all "held"; return how many.

        A message that is held is released, one that has failed is owed again."""
        if id == "all" and self.threads:
            self.scheduler.flush()
            return len(self.scheduler)
        if id in ("all", "held"):
            stems = [*self.held] if self.threads else self.scheduler.snapshot(sys.maxsize)[0]
            chosen = [m for m in self.records(stems) if (m.status is Status.HELD) == (id == "held")]
        else:
            chosen = [self.load(id)]
        for message in chosen:
            self.owe(message.stem, id != "all")  # what is in hand is tried just now
        return len(chosen)

    def release(self, id: str, to: list[str], beyond: bool = False) -> None:
        """Let a held message go; to other recipients, or when it went already, a copy goes.

        Those must be among SMTP_RELAY_ALLOWED_RECIPIENTS, unless `beyond` says otherwise."""
        if not self.can_release:
            raise HttpError(400, NOWHERE_TO)
        message = self.load(id)
        own = [r.address for r in message.recipients]
        if message.status is Status.HELD and (not to or to == own):
            if not self.owe(message.stem):
                raise HttpError(409, f"being delivered just now: {id}")
            return
        barred = [a for a in to if a not in own and not self.delivery.is_allowed(a)]
        if barred and not beyond:
            raise HttpError(400, f"not among SMTP_RELAY_ALLOWED_RECIPIENTS: {', '.join(barred)}; "
                            'with "Beyond": true it goes there all the same')
        flags = (*(f for f in message.flags if f not in ("HOLD", "RELEASED")), "RELEASED")
        envelope = Envelope(message.reverse_path, message.client, message.helo, message.protocol,
                            message.user, flags, to or own)
        with self.spool.content(message.stem) as content:
            self.store(envelope, iter(lambda: content.read(64 * KIB), b""))

    def owe(self, stem: str, again: bool = True) -> bool:
        """Make a message due now, and owed `again` if it is held or has failed; False when it is in hand."""
        if not self.scheduler.seize(stem):
            return False
        try:
            message = self.record(stem)
            was = message.status
            if was is Status.FORWARDED:
                raise HttpError(409, "it was forwarded already; release it to send a copy")
            if was is Status.HELD and not self.can_release:
                raise HttpError(400, NOWHERE_TO)
            if was in SETTLED and again:
                self.shelve(stem, Status.RETRYING)
                for r in message.recipients:
                    r.status = Status.RETRYING if r.status is was else r.status
                message.move(Status.RETRYING, BY_HAND[was])
                message.finished_at = message.owed = ""
            message.next_attempt_at = ""
            self.spool.save(message)
            self.unwritten.pop(stem, None)
            self.scheduler.probe(self.delivery.routes(message))
        finally:
            self.scheduler.put(stem, UNREAD)  # whoever reads it next knows what to do
            self.scheduler.done(stem)
        return True

    def remove(self, ids: list[str] | None) -> None:
        """Remove messages, all for None; one that is being delivered at this moment is left."""
        busy = []
        for id in list(self.inbox.entries) if ids is None else ids:
            with suppress(KeyError):
                stem = self.inbox.entry(id).stem
                if not self.scheduler.seize(stem):
                    busy.append(id)
                    continue
                try:
                    self.discard(stem)
                finally:
                    self.scheduler.done(stem)
        if busy:
            raise HttpError(409, f"being delivered just now: {', '.join(busy[:10])}")

    def store(self, envelope: Envelope, blocks: Iterable[bytes]) -> str:
        """Make a message durable and queue it; return its id."""
        try:
            return self.reception.admit(envelope, blocks)
        except Refused as e:
            raise HttpError(503 if e.reply.code < 500 else 400, str(e.reply)) from None


DELIVERING_ROW, RECEIVING_ROW = 0, 1  # of the counters; one more for each of SMTP_PROCESSES


class Parts:
    """What both halves are made from: it outlives a half that has to be made anew."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings, self.log, self.link = settings, log, Link()
        self.spool = Spool(settings, log)
        self.metrics = Metrics(rows=RECEIVING_ROW + settings.processes)
        self.metrics.set("started", monotonic())
        self.opened = ExitStack()
        none: list[socket.socket] = []
        self.smtp = self.smtps = self.http = self.submit = none  # the last for sendmail's launchers
        self.quotas = Quotas("", log)  # in memory both halves share them
        self.pair = (settings.tls_cert, settings.tls_key)
        self.own: list[int] = []  # SMTP's TCP ports

    def open(self, inherit: bool = True) -> None:
        """Take the spool, then make or inherit the sockets; SpoolBusy or OSError says what is taken."""
        try:
            self.spool.open()
        except OSError as e:
            place = e.filename or self.settings.spool
            raise OSError(e.errno, f"SMTP_SPOOL: cannot open {place}: {e.strerror}") from None
        with ExitStack() as stack:  # which closes all, unless all goes well
            stack.callback(self.spool.close)
            s, given = self.settings, inherited_sockets() if inherit else {}
            self.smtp, self.smtps, self.http, self.submit = [
                [*map(stack.enter_context, given.get(name) or bind_all(setting, addresses, self.log))]
                for name, setting, addresses in (
                    ("smtp", "SMTP_PORT", s.port), ("smtps", "SMTP_SMTPS_PORT", s.smtps_port),
                    ("http", "SMTP_HEALTH_ADDR", s.health_addr), ("submit", "", ()))]
            self.own = [sock.getsockname()[1] for sock in self.smtp + self.smtps if sock.family != socket.AF_UNIX]
            if s.tls_self_signed and not s.tls_cert:
                place = self.spool.path("tls") if self.spool.on_disk else stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="smtprelay-"))
                self.pair = self_signed(place, s.hostname)
            self.open_doors()
            self.opened = stack.pop_all()

    def open_doors(self) -> None:
        """Read faults, accounts and certificate; SettingsError says what is wrong with them.

        Once, before anything is forked: a half made anew has them whatever became of the files."""
        problems: list[str] = []
        path = self.spool.path("faults") if self.spool.on_disk else ""
        try:
            self.faults = Faults(self.settings.faults, path)
        except SettingsError as e:
            problems += e.problems
        try:
            self.accounts = Accounts(self.settings, self.log)
        except SettingsError as e:
            problems += [f"SMTP_USERS_FILE {self.settings.users_file}: {problem}" for problem in e.problems]
        except OSError as e:
            problems.append(f"SMTP_USERS_FILE: cannot read it: {e}")
        try:
            self.tls = Watched("certificate", self.pair, lambda: server_context(*self.pair), self.log) \
                if self.pair[0] else None
        except SettingsError as e:
            problems.append(f"SMTP_TLS_CERT, SMTP_TLS_KEY: {e}")
        if problems:
            raise SettingsError(*problems)

    def close(self) -> None:
        self.opened.close()
        for address in (*self.settings.port, *self.settings.smtps_port, *self.settings.health_addr):
            if address.path:
                with suppress(OSError):
                    os.unlink(address.path)

    def at_rest(self) -> Delivering:
        """Return the half whose verbs act on a spool without a relay; to change it, its lock must be ours."""
        self.accounts, self.tls = Accounts(self.settings, self.log), None
        self.faults = Faults(self.settings.faults)
        half = Delivering(self)
        half.find()
        return half

    def reception(self, metrics: Metrics) -> Reception:
        """Make the way in for one half, with quotas of its own."""
        quotas = Quotas(self.spool.path("usage"), self.log) if self.spool.on_disk else self.quotas
        return Reception(self.settings, self.spool, metrics, self.log, self.link.announce, self.accounts,
                         self.tls, quotas, self.faults)

    def receiving(self, row: int = RECEIVING_ROW) -> Receiving:
        """Make a receiving half: one of SMTP_PROCESSES, which share the listening sockets."""
        reception = self.reception(self.metrics.row(row))
        reception.metrics.set("smtp_sessions_active", 0)  # those of one that died
        reception.pick = row - RECEIVING_ROW
        return Receiving(reception, self.smtp, self.smtps)


def inherited_sockets() -> dict[str, list[socket.socket]]:
    """Return the sockets from systemd, by FileDescriptorName, else smtp's (sd_listen_fds(3))."""
    found = defaultdict[str, list[socket.socket]](list)
    many = int(os.environ.get("LISTEN_FDS", "0")) if os.environ.get("LISTEN_PID") == str(os.getpid()) else 0
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") + [""] * many
    for number, name in enumerate(names[:many], 3):
        found[name if name in ("smtps", "http", "submit") else "smtp"].append(socket.socket(fileno=number))
    return found


def notify_systemd(state: str) -> None:
    """Tell systemd of a change of state (sd_notify(3)); without systemd do nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS_HANDLED = (*STOP_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM)
STOP_AFTER = 9
RESTART_PAUSE = 0.5


def stop_signals() -> tuple[int, ...]:
    """Return what stops the relay: SIGHUP, too, on a terminal, since that is how one ends."""
    return (*STOP_SIGNALS, signal.SIGHUP) if os.isatty(0) or os.isatty(2) else STOP_SIGNALS


class Supervisor:
    """Runs the halves as processes, passes signals on to them, and makes one that died anew."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.children: dict[int, int] = {}  # process: its row of the counters
        self.alive_pipe = os.pipe()
        self.stopping = False

    def run(self) -> int:
        """Serve until a signal ends it; return the exit status."""
        stops = stop_signals()  # asked while the terminal is there
        self.spawn_missing()
        notify_systemd("READY=1")
        while self.children or not self.stopping:
            number = signal.sigwait(SIGNALS_HANDLED)
            if number == signal.SIGCHLD:
                self.reap()
            elif number == signal.SIGALRM and self.stopping:
                self.signal_children(signal.SIGKILL)
            elif number == signal.SIGALRM:
                self.spawn_missing()
            elif number in stops:
                self.stop()
            else:
                self.signal_children(number)
        return 0

    def stop(self) -> None:
        """Tell the halves to stop; STOP_AFTER seconds from the first time they are killed."""
        if self.stopping:
            return
        self.stopping = True
        notify_systemd("STOPPING=1")
        self.signal_children(signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, STOP_AFTER)  # and not to make a half anew
        while signal.SIGALRM in signal.sigpending():
            signal.sigwait([signal.SIGALRM])

    def signal_children(self, number: int) -> None:
        for child in self.children:
            with suppress(ProcessLookupError):
                os.kill(child, number)

    def reap(self) -> None:
        """Note which children have ended; one that should not have is made anew in a moment."""
        for child, row in list(self.children.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del self.children[child]
            if ended and not self.stopping:
                self.parts.log.error("half_died", row=row, status=status)
                self.parts.link.announce(LOOK)  # it may have kept a message and told nobody
                signal.setitimer(signal.ITIMER_REAL, RESTART_PAUSE)

    def spawn_missing(self) -> None:
        """Fork the halves that are not there: without threads here, what they inherit is whole."""
        for row in {*range(RECEIVING_ROW + self.parts.settings.processes)} - {*self.children.values()}:
            try:
                child = os.fork()
            except OSError as e:  # no process to be had: try again later
                self.parts.log.error("half_not_started", row=row, error=e)
                signal.setitimer(signal.ITIMER_REAL, RESTART_PAUSE)
                continue
            if child:
                self.children[child] = row
                continue
            status = EX_TEMPFAIL
            try:
                self.be(row)
                status = 0
            except BaseException:
                self.parts.log.bug("half_failed", row=row)
            finally:
                os._exit(status)

    def be(self, row: int) -> None:
        """Be a half of the program until told to stop, or end at once when the supervisor is gone."""
        parts = self.parts

        def outlive_nobody() -> None:
            os.read(self.alive_pipe[0], 1)
            os._exit(EX_TEMPFAIL)

        os.close(self.alive_pipe[1])
        Thread(target=outlive_nobody, name="supervisor-watch", daemon=True).start()
        parts.spool.maker = f"{row % 16:x}{token_hex(1)}"  # no two make the same id
        receives = row >= RECEIVING_ROW
        for sock in parts.http + parts.submit if receives else parts.smtp + parts.smtps:
            sock.close()
        half: Receiving | Delivering = parts.receiving(row) if receives else Delivering(parts)
        threading.stack_size(256 * KIB if receives else 4 * MIB)  # not the usual 8 MiB; deep JSON takes 2
        half.start()
        heed_signals(half)
        half.stop()


def heed_signals(*halves: Receiving | Delivering) -> None:
    """Act on signals until one says stop; a half alone leaves a terminal's to the supervisor."""
    stops = stop_signals() if len(halves) > 1 else (signal.SIGTERM,)
    while True:
        number = signal.sigwait(SIGNALS_HANDLED)
        if number in stops:
            return
        for half in halves:
            if number == signal.SIGHUP:
                half.reception.reload()
            elif number == signal.SIGUSR1 and isinstance(half, Delivering):
                half.scheduler.flush()


# === 23 LIBRARY ==============================================================
#
# The relay in the hands of a test: `start()`, the Relay that it returns, and two fixtures, which
# are there when pytest is. Each Relay stands alone: sockets of its own, memory of its own, nothing
# from the environment, and nothing left of it after stop(). Unless told of a smart host it has one
# in the same process, an Upstream that answers by script; unless told to deliver it holds what it
# gets.

class Taken(NamedTuple):
    """A message that the simulated smart host took."""

    reverse_path: str
    recipients: list[str]
    raw: bytes


class Upstream:
    """A smart host that answers by script: `relay.upstream.script("451 busy", "rcpt 550 who?")`.

    A step is "accept" (or "250 ok"), "drop" (hang up without an answer), or a refusal, after a delay if it has one.
    It holds for the end of a message's content, unless a stage is before it: connect, mail, rcpt, data.
    Steps are taken in order, each when its stage comes; after the last one all is accepted."""

    def __init__(self) -> None:
        settings = Settings(storage="memory", hostname="upstream", max_size=sys.maxsize, max_recipients=sys.maxsize,
                            max_errors=sys.maxsize)
        log = Log(os.devnull, level="error")
        self.changed = Condition()
        self.steps: deque[Fault] = deque()
        self.received: list[Taken] = []
        self.attempts = 0  # MAIL commands seen
        self.on = (True,)  # as Faults, in whose place it answers
        self.spool, self.socket = Spool(settings, log), socket.create_server(("127.0.0.1", 0))
        reception = Reception(settings, self.spool, Metrics(), log, self.take, Accounts(settings, log), None,
                              Quotas("", log), cast(Faults, self))
        self.receiving = Receiving(reception, [self.socket], [])
        self.receiving.start()

    def script(self, *steps: str) -> None:
        """Add steps; ValueError for one that is none."""
        for step in steps:
            try:
                accepts = re.fullmatch(r"((?!delay)\S+ )?2\d\d( .*)?", step)
                self.steps.append(parse_fault(f"{accepts[1] or ''}accept" if accepts else step, step=True))
            except ValueError:
                raise ValueError(f"{step!r} is not [STAGE] [delay TIME] accept|drop|reply, "
                                 f"STAGE one of {', '.join(FAULT_STAGES)}") from None

    def answer(self, stage: str, *_: str) -> Fault:
        """Return the step that is to be played at a stage, one without a reply for the true answer."""
        with self.changed:
            self.attempts += stage == "mail"
            due = self.steps and self.steps[0].stage == stage
            return self.steps.popleft() if due else Fault("", stage, {})

    def take(self, stem: str, _: bool) -> bool:
        """Note a message that was accepted."""
        message, file = self.spool.fetch(stem)
        raw = file.read()[-message.size:]  # what stands before it is the smart host's own Received
        self.spool.remove(stem)
        with self.changed:
            self.received.append(Taken(message.reverse_path, [r.address for r in message.recipients], raw))
            self.changed.notify_all()
        return True

    def wait(self, count: int = 1, timeout: float = 5.0) -> list[Taken]:
        """Block until so many messages are taken, and return them; TimeoutError after so many seconds."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.received) >= count, timeout):
                raise TimeoutError(f"{len(self.received)} of {count} messages came within {timeout:g} s, "
                                   f"in {self.attempts} attempts")
            return list(self.received)


class Relay:
    """A running relay whose halves are threads of this process; stop() leaves nothing behind."""

    def __init__(self, parts: Parts, upstream: Upstream | None = None) -> None:
        self.parts, self.settings, self._upstream = parts, parts.settings, upstream
        self.delivering, self.receiving = Delivering(parts), parts.receiving()
        self.host, self.port = parts.smtp[0].getsockname()[:2]
        self.http_url = f"http://{socket_text(parts.http[0])}" if parts.http else ""
        self.delivering.start()
        self.receiving.start()

    def stop(self) -> None:
        self.receiving.stop(STOP_PATIENCE / 2)
        self.parts.link.writer.close()
        self.delivering.stop(STOP_PATIENCE / 2)
        self.parts.close()
        if self._upstream:
            self._upstream.receiving.stop()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def upstream(self) -> Upstream:
        """The simulated smart host; AttributeError where SMTP_RELAY_HOST names a real one."""
        if not self._upstream:
            raise AttributeError("SMTP_RELAY_HOST names a smart host: there is no simulated one")
        return self._upstream

    @property
    def messages(self) -> list[Email]:
        """All messages there are, in order of arrival."""
        self.delivering.catch_up()
        inbox = self.delivering.inbox
        return [inbox.mail(item["ID"]) for item in reversed(inbox.search(limit=0).items)]

    def wait(self, to: str = "", subject: str = "", timeout: float = 5.0, after: Email | None = None,
             since: int | None = None, from_: str = "") -> Email:
        """Return the newest message to someone, with words in its subject, or else the next to come.

        An address without an @ is a part of one. With `after`, one that arrived after that message; with `since`,
        after that sequence number (`relay.sequence` before the mail is sent). TimeoutError, which tells what did
        arrive, when there is none within `timeout` seconds."""
        query: Query = ((lambda item: is_meant(item, to, subject, from_), True),)
        item = self.delivering.inbox.wait(query, after.sequence if after else since, timeout)
        if not item:
            asked = {"to": to, "subject": subject, "from_": from_}
            wanted = " ".join(f"{k}={v!r}" for k, v in asked.items() if v) or "any"
            came = "; ".join(map(repr, self.messages)) or "none"
            raise TimeoutError(f"no message ({wanted}) within {timeout:g} seconds; what came: {came}")
        return self.delivering.inbox.mail(item["ID"])

    @property
    def sequence(self) -> int:
        """The number of the latest message: what comes later has a greater one."""
        self.delivering.catch_up()
        return self.delivering.inbox.last

    def clear(self) -> None:
        """Remove all messages, those that the simulated smart host took and its script."""
        self.delivering.catch_up()
        with suppress(HttpError):  # some are being delivered just now
            self.delivering.remove(None)
        if self._upstream:
            self._upstream.received.clear()
            self._upstream.steps.clear()

    def release(self, message: Email | None = None) -> int:
        """Let a held message go, or all of them; return how many."""
        self.delivering.catch_up()
        if message and self.delivering.load(message.id).status is not Status.HELD:
            return 0
        return self.delivering.retry(message.id if message else "held")


def start(**settings: object) -> Relay:
    """Start a relay in this process, any setting by its name; free ports and memory if not told.

    A value is text as in the environment, a number, a flag or a list; no environment variables are read.
    Without SMTP_RELAY_HOST its smart host is simulated (`relay.upstream`), and mail is held
    until relay.release(), unless SMTP_DELIVERY is "relay" or "mx".
    SettingsError lists what is wrong with the settings."""
    import logging

    given = {k: ",".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for k, v in settings.items()}
    unknown = sum(unknown_settings(given), [])
    if unknown:
        raise SettingsError(*unknown)
    defaults = {"SMTP_PORT": "127.0.0.1:0", "SMTP_HEALTH_ADDR": "127.0.0.1:0", "SMTP_STORAGE": "memory"}
    real = given.get("SMTP_RELAY_HOST") or given.get("SMTP_DELIVERY") == "mx"
    upstream = None if real else Upstream()
    if upstream:
        place = socket_text(upstream.socket)
        defaults.update(SMTP_DELIVERY="hold", SMTP_RELAY_HOST=place, SMTP_RELAY_TLS="none")
    try:
        log = Log(logging.getLogger("smtprelay.library"))
        parts = Parts(Settings.read({**defaults, **given}), log)
        parts.open(inherit=False)
        return Relay(parts, upstream)
    except BaseException:
        if upstream:
            upstream.receiving.stop()
        raise


# -- pytest: `-p smtprelay`, or `from smtprelay import smtp_relay` in a conftest --

pytest: Any = sys.modules.get("pytest")
MAILS_SHOWN = 10


def relay_fixture(request: Any) -> Iterator[Relay]:
    """A relay for the test; its settings are those of @pytest.mark.smtp_relay(SMTP_...="...").

    Pytest shows the mail that it received with a test that failed."""
    marker = request.node.get_closest_marker("smtp_relay")
    with start(**{**(marker.kwargs if marker else {}), **getattr(request, "param", {})}) as relay:
        yield relay
        mails = relay.messages
        text = ("-" * 40 + "\n").join(f"{mail}\n" for mail in mails[:MAILS_SHOWN])
        if request.scope == "function":
            request.node.add_report_section("teardown", f"mail received ({len(mails)})", text or "none")


if pytest:
    smtp_relay = pytest.fixture(name="smtp_relay")(relay_fixture)
    smtp_relay_session = pytest.fixture(name="smtp_relay_session", scope="session")(relay_fixture)

    def pytest_configure(config: Any) -> None:
        config.addinivalue_line("markers", 'smtp_relay(SMTP_...="..."): settings of the test\'s relay')


# === 24 DOCTOR ===============================================================
#
# What stands between this machine and the next hop, found out by going there as Delivery would, up
# to but not including MAIL. Each finding is one line: a mark, what was found, and what to do about
# it. A fail is what mail will fail on. Nothing is changed anywhere.

PORT_PATIENCE = 5.0
PORTS_TRIED = (25, 465, 587)
DOMAIN_HOSTS = 3  # hosts of a domain that are examined


def size_shown(octets: float) -> str:
    """Return a size for people: 999, 1.2K, 34M."""
    for unit in ("", "K", "M", "G"):
        if octets < 1000 or unit == "G":
            break
        octets /= 1024
    return f"{octets:.1f}{unit}" if unit and octets < 10 else f"{octets:.0f}{unit}"


def time_shown(seconds: float) -> str:
    """Return a duration for people: 45s, 12m, 3h, 2d."""
    for unit, length in (("d", DAY), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


Finding = tuple[str, ...]  # ok, warn or fail; what it is about; what was found; what to do unless it is ok
HOSTNAME_ADVICE = "set SMTP_HOSTNAME to a name that DNS knows for this machine's address"
ADVICE = {  # for how a dialogue ended: the stage, SMTP_RELAY_AUTH, the host, what it said
    ".*: TLS failed: SMTP_RELAY_CA_FILE": "name a PEM file that can be read",
    ".*CERTIFICATE_VERIFY_FAILED": "if the certificate is one of your own, name its root in SMTP_RELAY_CA_FILE; "
    "else check the host's name and the clock",
    "connect": "a firewall or the provider may block this port; try another (587, 465, 2525) with SMTP_RELAY_PORT",
    "greeting": "the server does not want this machine: ask its operator, or use another smart host",
    "hello": HOSTNAME_ADVICE,
    "starttls": "set SMTP_RELAY_TLS=tls for a port such as 465 that speaks TLS from the first byte, "
    "or none if it has no TLS",
    "loop": "this machine's own name answers there: set SMTP_HOSTNAME to one of its own",
    "login .*: no common .* none": "this port takes no login: unset SMTP_RELAY_USERNAME, or use the port for "
    "submission (587 or 465)",
    "login .*: no common": "set SMTP_RELAY_AUTH to one that is offered, or auto",
    "login xoauth2": "a token lasts an hour or so: write a fresh one into SMTP_RELAY_PASSWORD_FILE",
    # what a provider's host wants, beyond the login that its web site takes
    ".*gmail.com:": "Gmail wants an app password, which an account with 2-step verification can make: "
    "myaccount.google.com/apppasswords",
    ".*office365.com:": "allow SMTP AUTH for this mailbox, or set SMTP_RELAY_AUTH=xoauth2 with a token",
    ".*amazonaws.com:": "SES wants an SMTP credential from its console; an access key is none",
    ".*sendgrid.net:": "the user name is the word apikey, the password an API key",
    ".*postmarkapp.com:": "user name and password are both the server's API token",
    ".*mailgun.org:": "Mailgun wants the SMTP credential of this domain, not the account's login",
    ".*fastmail.com:": "Fastmail wants an app password",
    "": "check SMTP_RELAY_USERNAME and SMTP_RELAY_PASSWORD; some providers want an app password",
}


def examine_spool(settings: Settings) -> Finding:
    """Say whether mail can be kept here."""
    if settings.storage == "memory":
        return "warn", "spool", "in memory: what is not delivered is lost at the end", "set SMTP_STORAGE=file"
    path = above = abspath(settings.spool)
    while not os.path.isdir(above):
        above = dirname(above)
    if not os.access(above, os.W_OK):
        us, owner = user_name(os.geteuid()), user_name(os.stat(above).st_uid)
        return ("fail", "spool", f"{above} cannot be written to by {us}; it belongs to {owner}",
                "set SMTP_SPOOL, or give this user the right to write there")
    free = shutil.disk_usage(above).free
    return ("fail" if free < settings.spool_min_free else "ok", "spool", f"{path}, {size_shown(free)} free",
            "make room, or lower SMTP_SPOOL_MIN_FREE")


def examine_addresses(settings: Settings, target: Target, addresses: Sequence[str]) -> Iterator[Finding]:
    """Examine a next hop whose addresses are known: its ports, then a dialogue with it."""
    opens: set[tuple[str, int]] = set()

    def try_port(*place: Any) -> None:
        with suppress(OSError), socket.create_connection(place, PORT_PATIENCE):
            opens.add(place)

    places = {(a, target.port) for a in addresses} | {(addresses[0], port) for port in PORTS_TRIED}
    threads = [Thread(target=try_port, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reached = [a for a in addresses if (a, target.port) in opens]
    yield "ok", "name", f"{target.host} is {', '.join(addresses)}"
    for label, six in (("IPv4", False), ("IPv6", True)):
        family = {a for a in addresses if (":" in a) == six}
        if family:
            good = family & {*reached}
            yield ("ok" if good else "warn" if reached else "fail", label,
                   f"port {target.port} {'opens' if good else 'does not open'}",
                   "each connection may lose time on it; mend the route" if reached else ADVICE["connect"])
    at = [str(port) for port in PORTS_TRIED if (addresses[0], port) in opens]
    yield ("ok" if reached else "warn" if at else "fail", "egress",
           f"of the usual ports {PORTS_TRIED}, open: {', '.join(at) or 'none'}",
           f"try SMTP_RELAY_PORT={at[-1]}" if at else
           "nothing of that host can be reached: is this machine on the network, and may it send mail?")
    if reached:
        yield from examine_dialogue(settings, target._replace(ip=reached[0]) if target.ip else target)


def examine_dialogue(settings: Settings, target: Target) -> Iterator[Finding]:
    """Connect, say hello, start TLS and log in, and tell what was seen on the way."""
    trouble, hop = None, NextHop(settings, target, Log(os.devnull, level="error"), partial(
        client_context, settings.relay_ca_file, settings.relay_tls_verify))
    try:
        hop.open()
    except Trouble as e:
        trouble = e
    greeting = next((line[3:] for line in hop.transcript if line.startswith("S: 220")), "")
    if greeting:
        yield "ok", "greeting", greeting
        yield examine_clock(greeting, time.time())
    if hop.features:
        yield "ok", "EHLO", "; ".join(f"{name.upper()} {value}".strip() for name, value in hop.features.items())
        if is_nameless(settings):
            yield "warn", "hostname", f"{settings.hostname} is no full name: we say EHLO {hop.name}", HOSTNAME_ADVICE
    if not trouble or trouble.stage == "login":
        yield from examine_tls(hop)
    if trouble:
        case = f"{trouble.stage} {settings.relay_auth} {target.host}: {trouble.reply}"
        yield ("fail", trouble.stage, f"{trouble.code or ''} {trouble.reply}".strip(),
               next(advice for pattern, advice in ADVICE.items() if re.match(pattern, case)))
    else:
        if target.username:
            yield "ok", "login", f"as {target.username}"
        elif "auth" in hop.features:
            yield ("warn", "login", "offered, but SMTP_RELAY_USERNAME is not set",
                   "set it, if the server refuses mail without")
        theirs = hop.limits.get("SIZE", 0)
        yield ("warn" if 0 < theirs < settings.max_size else "ok", "size",
               f"it takes {theirs or 'any number of'} octets, we accept {settings.max_size}",
               f"set SMTP_MAX_SIZE={theirs}")
    hop.close()


def examine_tls(hop: NextHop) -> Iterator[Finding]:
    """Say how safe a connection is: whose the certificate is, and for how long it is good."""
    sock = hop.wire.sock
    if not isinstance(sock, ssl.SSLSocket):
        yield ("ok" if is_loopback(hop.target.host) else "warn", "TLS", "none: mail and password go in clear",
               "set SMTP_RELAY_TLS=starttls or tls, if the server has it")
        return
    yield "ok", "TLS", f"{sock.version()}, {(sock.cipher() or ('',))[0]}"
    shown: Fields = dict(sock.getpeercert() or {})
    if not shown:
        yield ("warn", "certificate", "not verified",
               "set SMTP_RELAY_TLS_VERIFY=1, with SMTP_RELAY_CA_FILE if the root is your own")
        return
    issuer = dict(chain(*shown["issuer"]))
    days = int((ssl.cert_time_to_seconds(shown["notAfter"]) - time.time()) / DAY)
    yield ("warn" if days < 14 else "ok", "certificate",
           f"verified, from {issuer.get('organizationName') or issuer.get('commonName', '?')}, {days} days left",
           "tell its operator to renew it")


def examine_clock(greeting: str, now: float) -> Finding:
    """Compare the clock with the date in a greeting, where there is one."""
    written = re.search(r"\d{1,2} [A-Z][a-z]{2} [12]\d{3} \d\d:\d\d:\d\d [+-]\d{4}", greeting)
    read = email.utils.parsedate_tz(written[0]) if written else None
    if not read:
        return "ok", "clock", f"reads {iso_time(now)}; the greeting has no date to compare it with"
    off = now - email.utils.mktime_tz(read)
    return ("warn" if abs(off) > 300 else "ok", "clock",
            f"{abs(off):.0f} seconds {'ahead of' if off > 0 else 'behind'} the server's",
            "set it (timedatectl set-ntp true): mail is judged by its date")


def diagnose(settings: Settings, domain: str = "") -> Iterator[Finding]:
    """Yield all findings for the smart hosts that are set, or for the hosts that take mail for a domain."""
    yield examine_spool(settings)
    if settings.delivery == "mx" and not domain:
        domain = "gmail.com"
        yield ("ok", "delivery", f"straight to the recipients' hosts; those of {domain} stand for all: "
               "name another domain to examine: doctor example.com")
    if domain:
        servers = settings.dns_server or system_dns_servers()
        try:
            resolver = Resolver(servers)
            hosts = resolver.mx_hosts(domain)
            yield "ok", "MX", f"{domain}: {', '.join(f'{name} ({preference})' for preference, name in hosts)}"
            for host in hosts[:DOMAIN_HOSTS]:
                addresses = [ip for _, ip in resolver.targets([host])]
                target = Target(host[1], settings.mx_port, settings.relay_tls, ip=addresses[0])
                yield from examine_addresses(settings, target, addresses)
        except ResolveError as e:
            asked = ", ".join(map(str, servers))
            yield ("fail", "DNS", f"{e} (asked: {asked})", "check the domain's spelling" if e.permanent else
                   "check SMTP_DNS_SERVER or /etc/resolv.conf: straight to the recipients' hosts needs DNS")
        return
    if settings.delivery == "hold":
        yield "warn", "delivery", "mail is held here, nothing is sent", "set SMTP_RELAY_HOST to name a smart host"
    for name, port, tls in settings.smart_hosts:
        try:
            found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as e:  # UnicodeError: a name that IDNA does not take
            yield ("fail", host_port(name, port), f"the name is not found: {e}",
                   "check SMTP_RELAY_HOST, and this machine's DNS (/etc/resolv.conf)")
            continue
        target = Target(name, port, tls, settings.relay_username, settings.relay_password)
        yield from examine_addresses(settings, target, [*dict.fromkeys(str(place[4][0]) for place in found)])


# === 25 INSTALL ==============================================================
#
# The program as a service of this machine. `install` copies this file into a place of its own and
# compiles it there, and writes a command that runs the compiled form, systemd's units, and a file
# of settings, which nothing ever overwrites: run again it upgrades. `uninstall` takes away what
# install wrote; settings and mail stay.
#
# What is written is a table of texts first, so that --dry-run prints what an install would write,
# and --root puts it elsewhere, for packagers and for tests. There no user is made and no service
# started.
#
# The service has a user of its own, and not DynamicUser's private directory, so that root's
# sendmail can put mail into the spool beside it. smtprelay.service in the repository is the unit
# SERVICE; a test compares them.

SERVICE_USER = "smtprelay"
INSTALLED = "/usr/local/lib/smtprelay/smtprelay.py"
LAUNCHED = "/usr/local/lib/smtprelay/sendmail"
PROGRAM = "/usr/local/bin/smtprelay"
ENVIRONMENT_FILE = "/etc/smtprelay/smtprelay.env"
PASSWORD_FILE = "/etc/smtprelay/relay-password"
STATE = "/var/lib/smtprelay"
UNIT = "/etc/systemd/system/smtprelay.service"
SOCKET_UNIT = "/etc/systemd/system/smtprelay.socket"
DROP_IN = f"{UNIT}.d/relay-password.conf"
SENDMAIL_LINKS = ("/usr/sbin/sendmail", "/usr/bin/mailq", "/usr/bin/newaliases")
HIDDEN = ("/home/", "/root/", "/run/user/")  # what ProtectHome=yes hides from the service

# Most verbs are over before collecting garbage pays, or taking the program apart at its end: a fifth of their time.
RUN_COMPILED = """\
#!{python} -IS
import gc, os, signal, sys; gc.disable(); signal.signal(signal.SIGINT, signal.SIG_DFL); sys.path.insert(0, "{folder}")
import smtprelay; os._exit(smtprelay.main())
"""
SET_UP = f"""\
getent passwd {SERVICE_USER} >/dev/null || useradd --system --user-group --no-create-home --home-dir {STATE} \\
    --shell /usr/sbin/nologin {SERVICE_USER}
install -d -m 700 -o {SERVICE_USER} -g {SERVICE_USER} {STATE}
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl stop smtprelay.service smtprelay.socket  # a socket is not started beside its service
    systemctl enable --now --quiet smtprelay.socket smtprelay.service
    echo "smtprelay runs. Settings: {ENVIRONMENT_FILE}, then: systemctl restart smtprelay"
    exit
fi
secret=
if [ -e {PASSWORD_FILE} ]; then
    chown {SERVICE_USER}:{SERVICE_USER} {PASSWORD_FILE}
    secret="SMTP_RELAY_PASSWORD_FILE={PASSWORD_FILE} "
fi
echo "systemd does not run here, so nothing was started. Have this run at each start, as root:
    set -a; . {ENVIRONMENT_FILE}; SMTP_SPOOL={STATE}/spool ${{secret}}exec setpriv --init-groups \
--reuid {SERVICE_USER} --regid {SERVICE_USER} {PROGRAM} serve"
"""
STOP = f"""\
[ ! -d /run/systemd/system ] || [ ! -e {UNIT} ] ||
    systemctl disable --now --quiet smtprelay.socket smtprelay.service
"""
CLEAN_UP = "[ ! -d /run/systemd/system ] || systemctl daemon-reload"
COMPILE = "import py_compile, sys; py_compile.compile(sys.argv[1], dfile=sys.argv[2], doraise=True)"

SERVICE = f"""\
# smtprelay as a system service, as `python3 smtprelay.py install` writes it.
#
# Settings stand in {ENVIRONMENT_FILE}, one SMTP_...=value a line.
# A secret is better a credential, which only the service can read; in a drop-in:
#
#   [Service]
#   LoadCredential=relay-password:{PASSWORD_FILE}
#   Environment=SMTP_RELAY_PASSWORD_FILE=%d/relay-password

[Unit]
Description=smtprelay, a mail relay in one file
Documentation=file:{INSTALLED}
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart=/usr/bin/env {PROGRAM} serve
ExecReload=/bin/kill -HUP $MAINPID
Sockets=smtprelay.socket
Restart=on-failure
RestartSec=2
RestartPreventExitStatus=64 78
TimeoutStopSec=15
KillMode=mixed

Environment=SMTP_SPOOL={STATE}/spool
EnvironmentFile=-{ENVIRONMENT_FILE}

User={SERVICE_USER}
StateDirectory=smtprelay
StateDirectoryMode=0700
UMask=0077
LimitNOFILE=8192

# A port below 1024 may be set. Users are not private: the socket tells who sends.
CapabilityBoundingSet=CAP_NET_BIND_SERVICE
AmbientCapabilities=CAP_NET_BIND_SERVICE
NoNewPrivileges=yes
PrivateDevices=yes
PrivateMounts=yes
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProcSubset=pid
ProtectSystem=strict
RemoveIPC=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
Also=smtprelay.socket
"""
SOCKET = f"""\
[Unit]
Description=where sendmail hands its mail to smtprelay

[Socket]
ListenStream={SUBMIT_SOCKET}
FileDescriptorName=submit
SocketMode=0666
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""
CREDENTIAL = f"""\
[Service]
LoadCredential=relay-password:{PASSWORD_FILE}
Environment=SMTP_RELAY_PASSWORD_FILE=%d/relay-password
"""
COMMON_SETTINGS = {  # what the file of settings begins with, each with its help and commented out
    "SMTP_PORT": "25", "SMTP_RELAY_HOST": "gmail", "SMTP_RELAY_USERNAME": "me@gmail.com",
    "SMTP_LOCAL_TO": "me@example.com", "SMTP_RELAY_FROM": "me@gmail.com", "SMTP_HOSTNAME": "box.example.com",
    "SMTP_HEALTH_ADDR": "127.0.0.1:8080", "SMTP_KEEP": "30d", "SMTP_LOG_LEVEL": "warn",
}


def ask_password(prompt: str = "Password: ") -> str:
    """Read a password twice from the terminal, or once from the first line of standard input."""
    import getpass

    given = {""}
    with suppress(EOFError):
        given = ({getpass.getpass(prompt), getpass.getpass("Once more: ")} if sys.stdin.isatty() else
                 {sys.stdin.readline().rstrip("\r\n")})
    password = given.pop()
    if given or not password:
        raise Complaint("the passwords differ" if given else "no password was given", EX_DATAERR)
    return password


def read_assignments(text: str) -> dict[str, str]:
    """Read NAME=value lines as systemd's EnvironmentFile= does."""
    lines = re.findall(r"(?m)^[ \t]*(\w+)[ \t]*=[ \t]*(['\"]?)(.*?)\2[ \t]*$", text)
    return {name: value for name, _, value in lines}


def interpreter() -> str:
    """Return a Python that the service can run, too."""
    for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if exists(path) and not path.startswith(HIDDEN):
            return path
    raise Complaint(f"the service cannot run {sys.executable}: install with a Python outside of home directories")


def installation(root: str, changes: Mapping[str, str], password: str, sendmail: bool) -> dict[str, str]:
    """Return the text of every file of an installation."""
    import shlex

    python, program = interpreter(), os.fsdecode(read_whole(__file__))
    settings = "# Settings of the service smtprelay; `smtprelay help settings` shows all.\n" + "".join(
        f"\n# {FIELDS[name].help}\n#{name}={value}\n" for name, value in COMMON_SETTINGS.items())
    with suppress(FileNotFoundError):
        settings = os.fsdecode(read_whole(root + ENVIRONMENT_FILE))
    for name, value in changes.items():  # in the place of what is there, or commented out
        before, *after = re.split(rf"(?m)^(?:# ?)?{name}=.*\n", settings)
        settings = f"{before}{name}={shlex.quote(value)}\n{''.join(after)}"
    files = {
        INSTALLED: program, PROGRAM: RUN_COMPILED.format(python=python, folder=dirname(INSTALLED)),
        UNIT: SERVICE, SOCKET_UNIT: SOCKET, ENVIRONMENT_FILE: settings}
    if password:
        files[PASSWORD_FILE] = f"{password}\n"
    if password or exists(root + PASSWORD_FILE):
        files[DROP_IN] = CREDENTIAL
    if sendmail or exists(root + LAUNCHED):
        files[LAUNCHED] = f"#!{python} -IS\n{LAUNCHER.partition(chr(10))[2]}"
    return files


def chosen_root(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Return the directory that stands for /, and whether this machine itself is to be changed, which takes root."""
    root = arguments.root.rstrip("/")
    live = not (root or arguments.dry_run)
    if live and os.geteuid():
        raise Complaint("this changes /usr/local and /etc: run it with sudo (--dry-run shows what)")
    return root, live


def install(arguments: argparse.Namespace) -> int:
    """Make this program a service of this machine, or upgrade it; settings and mail stay.

    --relay HOST     the smart host, as in SMTP_RELAY_HOST: gmail, host:port
    --user NAME      the login there; asks for the password
    --port PORT      where to listen, as in SMTP_PORT
    --sendmail       be sendmail, mailq and newaliases, too
    --root DIR       put all files under this directory, and start nothing
    --dry-run        print what would be done"""
    (root, live), password, status = chosen_root(arguments), "", 0
    if arguments.user and not arguments.relay:
        raise Complaint("--user needs --relay", EX_USAGE)
    changes = given_keys({"SMTP_RELAY_HOST": arguments.relay, "SMTP_RELAY_USERNAME": arguments.user,
                          "SMTP_PORT": arguments.port})
    if arguments.user:
        password = "..." if arguments.dry_run else ask_password(f"Password of {arguments.user} at {arguments.relay}: ")
    files = installation(root, changes, password, arguments.sendmail)
    if changes:  # else what is there may be as it is: an upgrade must not fail on it
        written = read_assignments(files[ENVIRONMENT_FILE])
        Settings.read({"SMTP_RELAY_PASSWORD": "its own" * (DROP_IN in files), **written})
    os.umask(0o022)
    for path, text in files.items():
        mode = 0o600 if path in (ENVIRONMENT_FILE, PASSWORD_FILE) else 0o755 if text.startswith("#!") else 0o644
        print(f"{root}{path} ({mode:o})")
        if arguments.dry_run:
            print(f"    (this file, {len(text)} characters)" if path == INSTALLED else text)
            continue
        os.makedirs(dirname(root + path), exist_ok=True)
        replace_file(root + path, os.fsencode(text))
        os.chmod(root + path, mode)
    if arguments.dry_run:
        return 0
    run_tool(interpreter(), "-IS", "-c", COMPILE, root + INSTALLED, INSTALLED)
    for path in SENDMAIL_LINKS if arguments.sendmail else ():
        now = link_at(root + path)
        if not os.path.lexists(root + path):
            os.makedirs(dirname(root + path), exist_ok=True)
            os.symlink(LAUNCHED, root + path)
            print(f"{root}{path} -> {LAUNCHED}")
        elif now != LAUNCHED:
            way = f"dpkg-divert --local --rename --add {path}, then install --sendmail again"
            if now.startswith("/etc/alternatives/"):
                way = f"update-alternatives --install {path} {os.path.basename(now)} {LAUNCHED} 100"
            complain(f"{path} is left to {os.path.realpath(root + path)}; on Debian this makes it smtprelay's: {way}")
            status = EX_NO
    if live:
        run_tool("sh", "-ec", SET_UP)
    return status


def link_at(path: str) -> str:
    return os.readlink(path) if os.path.islink(path) else ""


def run_tool(*command: str) -> None:
    """Run another program, which says itself what is wrong; Complaint when it fails."""
    import subprocess

    sys.stdout.flush()  # it comes before what that says
    if subprocess.run(command).returncode:
        raise Complaint(f"{' '.join(command[:2])} failed", EX_UNAVAILABLE)


def uninstall(arguments: argparse.Namespace) -> None:
    """Remove what install wrote; --purge removes settings and mail, too.

    --purge          remove settings and mail, too
    --root DIR       put all files under this directory, and start nothing
    --dry-run        print what would be done"""
    root, live = chosen_root(arguments)
    kept = [dirname(ENVIRONMENT_FILE), STATE]
    doomed = [dirname(INSTALLED), PROGRAM, UNIT, SOCKET_UNIT, dirname(DROP_IN),
              *(path for path in SENDMAIL_LINKS if link_at(root + path) == LAUNCHED), *kept * arguments.purge]
    if live:
        run_tool("sh", "-ec", STOP)
    for path in (root + path for path in doomed if os.path.lexists(root + path)):
        print(f"would remove {path}" if arguments.dry_run else f"removed {path}")
        if not arguments.dry_run:
            run_tool("rm", "-r", path)
    if live:
        run_tool("sh", "-ec", CLEAN_UP + f"; userdel {SERVICE_USER}" * arguments.purge)
    if not arguments.purge:
        print(f"kept: {' and '.join(kept)} (--purge removes them)")


# === 26 COMMAND LINE =========================================================
#
# One function for each verb; it takes its arguments, and returns the exit status, of sysexits.h, if
# it is not 0. Its docstring is its help and lists the arguments: argparse and the completion of
# shells are made from that. Settings come from the environment, or, where that names none, from the
# file of the installed service.
#
# Verbs that ask about mail are requests to the running relay; where none answers, the same routes
# act on the spool, and those that change it take its lock.

Arguments = argparse.Namespace
Row = tuple[str, ...]


class NoRelay(Exception):
    """No relay answers over HTTP."""

    status = EX_UNAVAILABLE


def tell(arguments: Arguments, value: object, lines: Iterable[str]) -> None:
    """Print what was found, as JSON or as lines for people, each when it is known."""
    for line in lines:
        if not arguments.json:
            print(line, flush=True)
    if arguments.json:
        print(dumps(value, indent=1, ensure_ascii=False))


def ask(settings: Settings, method: str, path: str, patience: float = 10.0, **query: object) -> Any:
    """Ask the running relay; return its answer, JSON or octets; NoRelay, or Complaint when it refuses."""
    if not settings.health_addr:
        raise NoRelay("SMTP_HEALTH_ADDR is off: there is nothing to ask")
    address = settings.health_addr[0]
    connection = http.client.HTTPConnection("localhost", address.port)
    words = urlencode(given_keys(query))
    try:
        connection.sock = dial(address, patience)
        connection.request(method, f"{quote(path)}?{words}", headers={
            "Accept": "application/json", "Authorization": f"Bearer {settings.api_token}"})
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException) as e:
        raise NoRelay(f"no relay answers at {address}: {e}") from None
    finally:
        connection.close()
    if not answer.getheader("Server", "").startswith("smtprelay/"):
        raise NoRelay(f"what answers at {address} is not smtprelay: see SMTP_HEALTH_ADDR")
    is_json = answer.getheader("Content-Type") == "application/json"
    found: Any = loads(body) if is_json else body
    if answer.status < 400:
        return found
    if answer.status == 401:
        raise Complaint("the relay wants the SMTP_API_TOKEN that it was started with: set it here, too")
    text = body[:300].decode("utf-8", "replace").strip()
    raise Complaint(found.get("Error", text) if is_json else text, EX_NO if answer.status < 500 else EX_UNAVAILABLE)


def read_environment(say: bool = True) -> Settings:
    """Read the settings from the environment; where it names none, from the installed service's file."""
    env, spool = dict(os.environ), {"SMTP_SPOOL": f"{STATE}/spool"}
    if not any(name.removesuffix("_FILE") in FIELDS for name in env):
        try:
            env.update({**spool, **read_assignments(os.fsdecode(read_whole(ENVIRONMENT_FILE)))})
            if exists(PASSWORD_FILE) and "SMTP_RELAY_PASSWORD" not in env:
                env.setdefault("SMTP_RELAY_PASSWORD_FILE", PASSWORD_FILE)
            said = f"settings are those of {ENVIRONMENT_FILE}"
        except FileNotFoundError:
            say = False  # nothing is installed
        except OSError as e:
            env.update(spool)
            said = f"{ENVIRONMENT_FILE}: {e.strerror}; the defaults are taken"
        if say:
            complain(said)
    complain(*unknown_settings(env)[1])
    return Settings.read(env)


def order(settings: Settings, method: str, path: str) -> Any:
    """Have the running relay do something, or do it to the spool where none runs."""
    try:
        return ask(settings, method, path)
    except NoRelay:
        enter_spool(settings)
    quiet = settings.but(users_file="", faults="", log_level="error", log_file="", debug=False)
    parts = Parts(quiet, open_log(quiet))
    if method != "GET":
        parts.spool.open()
    try:
        return act(parts.at_rest(), method, path, 1 << 30)
    except HttpError as e:
        raise Complaint(str(e)) from None
    finally:
        parts.spool.close()


def queue_(arguments: Arguments) -> None:
    """List what is owed and held.

    --json  print JSON"""
    listed = order(read_environment(), "GET", "/api/v1/queue")
    rows, lines = [*listed["messages"], *listed["held"]], []
    for row in rows:
        age = time_shown(time.time() - unix_time(row["received_at"]))
        due = unix_time(row["next_attempt_at"]) - time.time()
        size, to = size_shown(row["size"]), ", ".join(row["recipients"])
        lines.append(f"{row['id']}  {row['status']:<10}  {age:>4} {size:>5}  <{row['reverse_path']}> to {to}")
        why = ", ".join(filter(None, (row["reason"], f"due in {time_shown(due)}" * (due > 0))))
        lines += [f"    {why}"] * bool(why)
    total = size_shown(sum(row["size"] for row in rows))
    lines.append(f"{len(rows)} message{'s' * (len(rows) != 1)}, {total}" if rows else "the queue is empty")
    tell(arguments, rows, lines)


def retry_(arguments: Arguments) -> None:
    """Try a message, or all that is owed, at once; a held one is released, with "held" all of them.

    ID        a queue id, "all" that are owed, or all that are "held"
    --held    with all: release those that are held"""
    id = "held" if arguments.held and arguments.id == "all" else arguments.id
    done = order(read_environment(), "POST", f"/api/v1/queue/{id}/retry")
    print(f"{done['retried']} due as soon as a relay runs", file=sys.stderr)


def remove(arguments: Arguments) -> None:
    """Remove a message for good, whether it is owed, held or finished.

    ID  a queue id"""
    order(read_environment(), "DELETE", f"/api/v1/queue/{arguments.id}")


def show(arguments: Arguments) -> None:
    """Print a message: its record, then its content.

    ID        a queue id
    --json    print JSON"""
    settings, path = read_environment(), f"/api/v1/message/{arguments.id}"
    content, record = order(settings, "GET", path + "/raw"), order(settings, "GET", path)["Delivery"]
    tell(arguments, record, (
        f"{name}: {dumps(each, ensure_ascii=False) if isinstance(each, dict) else each}"
        for name, value in record.items() for each in (value if isinstance(value, list) else [value])))
    if not arguments.json:
        sys.stdout.buffer.write(b"\n" + content.replace(b"\r\n", b"\n"))


def wait(arguments: Arguments) -> None:
    """Block until a message arrives; print it, or just the code or link of one that has any.

    --to ADDRESS     a recipient
    --subject WORDS  words of the subject
    --since N        only after the message with this sequence number (see --json)
    --timeout TIME   how long, up to 5m (30s)
    --code           print its verification code alone
    --link           print its first link alone
    --json           print JSON"""
    part = "code" if arguments.code else "link" if arguments.link else ""
    found = ask(read_environment(), "GET", "/api/v1/wait", arguments.timeout + 10, **{
        "to": arguments.to, "subject": arguments.subject, "timeout": arguments.timeout, "with": part,
        "since": arguments.since})
    if part:
        print(found[f"{part.title()}s"][0])
    else:
        tell(arguments, found, [
            f"From: {found['From']['Address']}", f"To: {', '.join(p['Address'] for p in found['To'])}",
            f"Subject: {found['Subject']}\n\n{found['Text']}"])


def user(arguments: Arguments) -> None:
    """Add, list or remove accounts, or change a password, in SMTP_USERS_FILE.

    ACTION           add, list, remove or passwd
    [NAME]           whose account
    --domain DOMAIN  may send as this domain (again for more)
    --daily N        messages a day
    --per-minute N   messages a minute
    --api-key        make an API key, and print it
    --json           print JSON"""
    settings, action, name, change = read_environment(), arguments.action, arguments.name, None
    path = settings.users_file
    if not path:
        raise Complaint("SMTP_USERS_FILE is not set: it names the file of accounts", EX_CONFIG)
    try:
        users = read_users(path) if exists(path) else {}
        if action == "list":
            limits = ("allowed_domains", "quota_daily", "quota_per_minute", "relay_host")
            rows = [{"name": name, **{k: fields[k] for k in limits if fields.get(k)}} for name, fields in users.items()]
            return tell(arguments, rows, (
                "  ".join(f"{k}={setting_text(v)}" for k, v in row.items())[len("name="):] for row in rows))
        if not name:
            raise Complaint(f"user {action} needs a NAME", EX_USAGE)
        if (name in users) == (action == "add"):
            raise Complaint(f"account {name} {'is there already' if name in users else 'is not there'}")
        if action != "remove":
            change = given_keys({
                "password": hash_password(ask_password()), "allowed_domains": arguments.domain,
                "quota_daily": arguments.daily, "quota_per_minute": arguments.per_minute,
                "api_key": new_api_key() if arguments.api_key else ""})
        change_account(path, name, change, Sealer(settings.spool_key))
    except (SettingsError, SpoolError, OSError) as e:
        raise Complaint(f"SMTP_USERS_FILE {path}: {e}", EX_CONFIG) from None
    if change and arguments.api_key:
        print(change["api_key"])


def doctor(arguments: Arguments) -> int:
    """Try the next hop and say what stands in the way; sends nothing.

    [DOMAIN]  examine the hosts that take this domain's mail
    --json    print JSON"""
    found: list[dict[str, str]] = []

    def lines() -> Iterator[str]:
        for mark, about, what, *more in diagnose(read_environment(), arguments.domain or ""):
            advice = "".join(more) * (mark != "ok")
            found.append({"mark": mark, "about": about, "found": what, "advice": advice})
            yield f"{mark:<4} {about:<11} {what}{advice and f': {advice}'}"

    tell(arguments, found, lines())
    return EX_NO * any(f["mark"] == "fail" for f in found)


def serve(arguments: Arguments) -> int:
    """Run the relay (what happens without a command)."""
    settings = Settings.read(os.environ)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_HANDLED)  # kept so by all threads and children
    descriptors(2 * settings.max_connections + 4 * DESCRIPTORS_KEPT)
    log = open_log(settings)
    try:
        parts = Parts(settings, log)
        parts.open()
        lines = first_lines(parts) + [f"warning: {text}" for text in unknown_settings(os.environ)[1]]
    except (SettingsError, SpoolBusy, OSError) as e:
        lines = getattr(e, "problems", [getattr(e, "strerror", "") or str(e)])
        if isinstance(e, PermissionError) and abspath(settings.spool) in str(e):
            lines[0] += f"; the spool belongs to {user_name(os.stat(settings.spool).st_uid)}"
        log.greet([f"smtprelay: {line}" for line in lines])
        return getattr(e, "status", EX_UNAVAILABLE)
    log.greet([f"smtprelay {__version__}: {line}" for line in lines])
    gc.enable()  # which the installed command has put off
    gc.collect()
    gc.freeze()  # what stands now stays: the halves share its pages
    with suppress(ImportError, OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)  # what compiling this file has left in the heap, a third of all
    try:
        return serve_here(parts) if settings.storage == "memory" else Supervisor(parts).run()
    finally:
        parts.close()
        log.info("stopped")


def serve_here(parts: Parts) -> int:
    """Run both halves in this process: memory cannot be shared with another."""
    relay = Relay(parts)
    notify_systemd("READY=1")
    heed_signals(relay.delivering, relay.receiving)
    notify_systemd("STOPPING=1")
    relay.stop()
    return 0


UNUSUAL = {  # settings that are worth a line at the start when they are not as usual: what that means
    "SMTP_RELAY_REDIRECT_TO": "all mail goes to this address, whoever it is for",
    "SMTP_RELAY_ALLOWED_RECIPIENTS": "mail for others is held, not sent",
    "SMTP_RELAY_FROM": "all mail is from this address",
    "SMTP_FAULTS": "failures on order",
    "SMTP_TIME_SCALE": "waits are this many times shorter",
    "SMTP_LENIENT": "what old devices send is taken",
    "SMTP_AUTH_ANY": "any user and password will do for whoever SMTP_ALLOW_NETWORKS lets in",
    "SMTP_API_NETWORKS": "from there the page and /api need no token",
    "SMTP_RELAY_TLS_VERIFY": "certificates of next hops are not verified",
    "SMTP_FSYNC": "mail acknowledged just before a power failure is lost",
}


def first_lines(parts: Parts) -> list[str]:
    """Return the lines that say what was bound, where mail goes and where it is kept."""
    s = parts.settings
    where = {"hold": "held here until someone releases it",
             "relay": "to " + ", ".join(f"{host_port(*h[:2])} (TLS: {h[2]})" for h in s.smart_hosts),
             "mx": f"straight to the recipients' hosts (port {s.mx_port}, TLS: {s.relay_tls})"}[s.delivery]
    lines = [f"listening on {scheme}://{socket_text(sock)}" for scheme in ("smtp", "smtps", "http")
             for sock in getattr(parts, scheme)]
    place = "memory: mail is lost when this stops" if s.storage == "memory" else abspath(s.spool)
    lines += [f"mail is {where}", f"spool in {place}"]
    for name, words in UNUSUAL.items():
        value = getattr(s, name[5:].lower())
        if value != read_setting({}, name):
            lines.append(f"warning: {name}={setting_text(value)}: {words}")
    listens_beyond = is_open((*s.port, *s.smtps_port))
    lets_in_others = not all(is_loopback(str(n.network_address)) for n in s.allow_networks)
    beyond = listens_beyond and lets_in_others
    return lines + [f"warning: {words}" for holds, words in [
        (s.delivery != "hold" and is_nameless(s),
         f"SMTP_HOSTNAME is not set, and {s.hostname} is no full name: "
         "next hops are greeted with an address in its place"),
        (beyond and s.auth_required is False,
         "SMTP_AUTH_REQUIRED=0: whoever SMTP_ALLOW_NETWORKS lets in may send without a login"),
        (beyond and s.auth_required is not False and not parts.accounts.configured,
         "clients beyond loopback must log in, but there are no accounts (SMTP_AUTH_REQUIRED=0 lets them send)"),
        (is_open(s.health_addr) and s.api_networks == networks("loopback") and not s.api_token,
         "SMTP_HEALTH_ADDR is beyond loopback without SMTP_API_TOKEN: the page and /api serve this machine alone"),
        (listens_beyond and not lets_in_others,
         "this listens beyond loopback, but SMTP_ALLOW_NETWORKS lets in nobody from there"),
    ] if holds]


def check(arguments: Arguments) -> None:
    """Read the settings, and the files that they name, and say all that is wrong; --print shows them.

    --print  print every setting"""
    settings = read_environment()
    if settings.storage == "file":
        check_spool(abspath(settings.spool))
        open_sealer(settings)
    unseen = settings.but(storage="memory", log_file="", log_level="warn")  # nothing is touched
    Parts(unseen, open_log(unseen)).open_doors()
    if arguments.print:
        for name, f in FIELDS.items():
            value = getattr(settings, name[5:].lower())
            shown = shown_url(value) if name == "SMTP_WEBHOOK_URL" else setting_text(value)
            print(f"{name}={'***' if f.secret and value else shown}")
    else:
        print("settings are fine")


def setting_text(value: Any) -> str:
    """Return a setting's value as a user would write it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value.pattern if isinstance(value, re.Pattern) else int(value) if isinstance(value, bool) else value)


def status(arguments: Arguments) -> None:
    """Say whether the relay runs, how it fares, and what it owes; exit 0 when it is ready."""
    settings = read_environment()
    parts, listed = ask(settings, "GET", "/readyz", verbose=1), ask(settings, "GET", "/api/v1/queue")
    for name, how in parts.items():
        print(f"{name:<10} {how}")
    print(f"queue      {listed['total']} owed, {len(listed['held'])} held")


ENDED_AFTER = 3.0  # a relay that is started again has the spool by then


def healthcheck(arguments: Arguments) -> None:
    """Exit 0 when the relay is ready; --wait waits for it, up to a minute, but not for one that has ended.

    --wait  wait up to a minute"""
    settings, begun, seen = read_environment(), time.time(), 0.0
    if not settings.health_addr:
        raise Complaint("SMTP_HEALTH_ADDR is off: there is nothing to ask", EX_CONFIG)
    while True:
        try:
            ask(settings, "GET", "/readyz", 5.0)
            return
        except (NoRelay, Complaint) as e:
            why, now = str(e), time.time()
        if not arguments.wait or now > begun + 60:
            raise Complaint(why)
        with suppress(FileNotFoundError), open(f"{settings.spool}/.lock", "rb") as lock:
            try:  # when a relay had the spool, as far as can be seen: when the last one took it, or now
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                seen = max(seen, os.fstat(lock.fileno()).st_mtime)
            except BlockingIOError:
                seen = now
        if begun - ENDED_AFTER < seen < now - ENDED_AFTER:
            with suppress(OSError), open(settings.log_file, encoding="utf-8", errors="replace") as file:
                why = "".join(deque(file, 1)).rstrip()
            raise Complaint(f"the relay has ended; {why}")
        time.sleep(0.1)


def sendmail(words: Sequence[str]) -> int:
    """Send a message as the program sendmail does (-t -i -f -F -bs -bp -q ...)."""
    if list(words) == ["--help"]:
        print(SENDMAIL_HELP)
        return 0
    settings = read_environment(say=False)  # cron would mail it

    def given() -> BinaryIO:
        if not hasattr(sys.stdin, "buffer"):
            raise Complaint("sendmail: standard input is closed: there is nothing to send", EX_TEMPFAIL)
        return sys.stdin.buffer

    try:
        status, said = do_errand(
            words, user_name(os.getuid()), settings.hostname, partial(order, settings),
            lambda: given().read(), partial(send, settings))
    except NotImplementedError:
        return speak_smtp(settings, given().fileno())
    if status:
        complain(*said.splitlines())
    else:
        print(said, end="")
    return status


# -- help --

GROUPS = {  # what is said above the first setting of each group, in the order of the code
    "SMTP_PORT": "Listening, limits", "SMTP_TLS_CERT": "TLS, logins, rates", "SMTP_FAULTS": "Failures on order",
    "SMTP_STORAGE": "The spool", "SMTP_DELIVERY": "Delivery", "SMTP_RETRY": "Retries", "SMTP_HEALTH_ADDR": "HTTP",
    "SMTP_LOG_LEVEL": "Logs",
}


def settings_table() -> Iterator[Row]:
    yield "name", "default", "meaning"
    for name, f in FIELDS.items():
        if name in GROUPS:
            yield (GROUPS[name],)
        file = f" (or `{name}_FILE`)" if f.secret and f"{name}_FILE" not in FIELDS else ""
        yield name, f.shown, f.help + file


def replies_table() -> Iterator[Row]:
    yield "code", "enhanced code, text"
    ours = takewhile(lambda value: value is not Status, globals().values())  # those of the chapter REPLIES
    refusals = sorted({value for value in ours if isinstance(value, Reply) and value.code >= 400})
    for code, same in groupby(refusals, lambda reply: reply.code):
        yield str(code), "; ".join(f"{r.enhanced} {r.text}" for r in same)


def http_table() -> Iterator[Row]:
    yield "path", "methods", "for", "does"
    who = {OPEN: "anyone", ACCOUNT: "API key", SHELL: "anyone; shows nothing without the token"}
    for (method, does, access), same in groupby(ROUTES, lambda r: (r.method, r.does, r.access)):
        yield " ".join(route.path for route in same), method, who.get(access, "token"), does


def metrics_table() -> Iterator[Row]:
    yield "metric", "kind", "meaning"
    for name, kind, help, label in METRICS:
        yield name + (f"{{{label}}}" if label else ""), kind, help


SPOOL_TABLE = """\
file|what it is
DATE/ID_HASH.eml|a message: X-Envelope- fields, our Received, the content; it never changes
DATE/ID_HASH.json|its record, while it is owed or held; made anew from the .eml if it is lost
DATE/ID_HASH.forwarded.json|the record of one that was delivered
DATE/ID_HASH.failed.json|the record of one that was given up
bad/|what could not be read: moved there, never deleted
tls/ usage/ faults|the self-signed pair; what accounts have used; rules changed over HTTP
inbox.json|what was read and tagged in the inbox; begun anew when it cannot be read
.lock|held by the relay that runs"""
EXIT_TABLE = """\
status|meaning
0|done
1|a no: not ready, not found, nothing came in time
64|wrong usage
65|wrong input
69|nothing to talk to: no relay, no spool, a place to listen that is taken; sendmail: refused for good
75|not now: the spool is in use, the message was not taken; try again
78|wrong settings"""


def rows_of(table: str) -> list[Row]:
    return [tuple(line.split("|")) for line in table.split("\n")]


TOPICS: dict[str, Callable[[], Iterable[Row]]] = {
    "settings": settings_table, "replies": replies_table, "http": http_table, "metrics": metrics_table,
    "spool": lambda: rows_of(SPOOL_TABLE), "exit": lambda: rows_of(EXIT_TABLE)}


@route("GET /help: these tables: settings, replies, HTTP, metrics, spool, exit status", OPEN)
def show_help(request: Request) -> str:
    """The tables of `smtprelay.py help TOPIC`, as a page."""
    page = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=color-scheme content='light dark'>"
            "<title>smtprelay: help</title><h1>smtprelay</h1>", *(f"<a href=#{topic}>{topic}</a>" for topic in TOPICS)]
    for topic, table in TOPICS.items():
        rows = ("".join(f"<td>{html.escape(cell.replace('`', ''))}" for cell in row) for row in table())
        page.append(f"<h2 id={topic}>{topic}</h2><table><tr valign=top>{'<tr valign=top>'.join(rows)}</table>")
    request.head["Content-Type"] = HTML
    return "\n".join(page)


def line_width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 100))


def laid_out(rows: Iterable[Row]) -> str:
    """Lay a table out for this terminal: the first cell, beside it the last, and what is between them in brackets."""
    import textwrap

    lines, width = [], line_width()
    for name, *rest in islice(rows, 1, None):
        if not rest:
            lines += ["", f"{name}:"]
            continue
        *between, text = rest
        facts, text = "; ".join(filter(None, between)), text.replace("`", "")
        if len(name) > 25:
            lines += textwrap.wrap(name, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
            name = ""
        lines += textwrap.wrap(text + f" [{facts}]" * bool(facts), width, initial_indent=f"  {name:<26}",
                               subsequent_indent=" " * 28)
    return "\n".join(lines)


def help_(arguments: Arguments) -> None:
    """Print this help; or a table: settings, replies, http, metrics, spool, exit; or the help of a command.

    [TOPIC]  a table, or a command"""
    if arguments.topic in TOPICS:
        print(laid_out(TOPICS[arguments.topic]()).lstrip("\n"))
    elif arguments.topic:
        run_command([arguments.topic, "--help"])
    else:
        commands = [("command", ""), *((name, summary_of(action)) for name, action in COMMANDS.items())]
        print(f"""\
usage: smtprelay.py [COMMAND [...]]
       (or --version, or --completion bash|zsh)

Accepts mail on localhost, keeps it safe, and forwards it.
With no settings at all it listens on port 2525, holds what
it gets, and shows it on http://127.0.0.1:8080.

commands:
{laid_out(commands)}

settings (environment variables):
{laid_out(settings_table())}""")


def version(arguments: Arguments) -> None:
    """Print the version."""
    print(f"smtprelay {__version__}")


ACTIONS = ("add", "list", "remove", "passwd")
COMPLETION = """\
_smtprelay() {{
    local words="{verbs}"
    [ $COMP_CWORD -gt 1 ] && case ${{COMP_WORDS[1]}} in
{cases}
        *) words="";;
    esac
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
[ -z "$ZSH_VERSION" ] || {{ autoload -U +X bashcompinit && bashcompinit; }}
complete -F _smtprelay smtprelay smtprelay.py"""


def completion(arguments: Arguments) -> None:
    """Print what makes a shell complete verbs and their options, also as --completion.

    SHELL  bash or zsh"""
    cases = []
    for name, action in COMMANDS.items():
        words = [*re.findall(r"(?m)^ *(--\S+)", action.__doc__ or ""), *{"user": ACTIONS, "help": TOPICS}.get(name, ())]
        cases.append(f'        {name})  words="{" ".join(words)}";;')
    print(COMPLETION.format(verbs=" ".join(COMMANDS), cases="\n".join(cases)))


# -- the verbs --

VERB_ACTIONS: tuple[Callable[[Any], int | None], ...] = (
    serve, check, doctor, status, queue_, retry_, remove, show, wait, user, healthcheck, sendmail, install, uninstall,
    help_, version, completion)
COMMANDS = {action.__name__.strip("_"): action for action in VERB_ACTIONS}
KINDS: dict[str, Fields] = {  # what argparse is to know of an argument, by the word that stands for its value
    "N": {"type": count}, "TIME": {"type": duration, "default": 30.0}, "DIR": {"default": ""},
    "ACTION": {"choices": ACTIONS}, "SHELL": {"choices": ("bash", "zsh")}, "DOMAIN": {"action": "append"},
    **dict.fromkeys(("[DOMAIN]", "[NAME]", "[TOPIC]"), {"nargs": "?"}),
}


def summary_of(action: Callable[..., object]) -> str:
    return (action.__doc__ or "").partition("\n")[0]


def run_command(words: list[str]) -> int:
    """Run a verb; SystemExit after --help, and after a mistake in its arguments."""
    said, *rest = words or ["serve"]
    name = "help" if said == "-h" else said.removeprefix("--")
    if name == "sendmail":  # whose flags are its own
        return sendmail(rest)
    if name not in COMMANDS:
        raise Complaint(f"{said!r} is not a command{nearest(name, COMMANDS, 0.6) or '; see --help'}", EX_USAGE)
    action = COMMANDS[name]
    parser = argparse.ArgumentParser(f"smtprelay.py {name}", description=summary_of(action), formatter_class=(
        partial(argparse.HelpFormatter, width=line_width())))
    for flag, value, text in re.findall(r"(?m)^ *(--\S+)? ?(\S*)  +(\S.+)", action.__doc__ or ""):
        word = value.strip("[]")
        how = {"metavar": word, **KINDS.get(value, {})} if value else {"action": "store_true"}
        parser.add_argument(flag or word.lower(), help=text, **how)
    return action(parser.parse_args(rest)) or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        called = SENDMAIL_NAMES.get(os.path.basename(sys.argv[0]))
        words = words if called is None else ["sendmail", *called, *words]
    sys.stdin = sys.stdin or io.StringIO()  # where it was closed; its number may be another file's by now
    sys.stdout, sys.stderr = (
        s or open(os.devnull, "w", errors="replace") for s in (sys.stdout, sys.stderr))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an address that the locale cannot show
    try:
        status = run_command(words)
        sys.stdout.flush()
        return status
    except SystemExit as e:  # argparse has said why
        return EX_USAGE if e.code else 0
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (Complaint, NoRelay, SettingsError, SpoolBusy, SpoolError, OSError) as e:
        complain(*getattr(e, "problems", [e]))
        return getattr(e, "status", EX_TEMPFAIL)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
