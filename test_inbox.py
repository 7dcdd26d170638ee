"""Tests of the inbox, its API and its page; they belong into test_smtprelay.py."""

from __future__ import annotations

import base64
import contextlib
import email.message
import hashlib
import http.client
import http.server
import io
import json
import logging
import os
import random
import shutil
import smtplib
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Callable

import pytest

import smtprelay
from test_smtprelay import FakeHop, Program, fetch, hop, program, start, wait_until  # noqa: F401

ROOT = Path(smtprelay.__file__).resolve().parent
MODULES = ROOT / ".ci" / "node_modules"

# === INBOX ===================================================================


def record(id: str, raw: bytes, to: tuple[str, ...] = ("bob@example.com",), **more: Any) -> Any:
    """A spool record for a message."""
    values: dict[str, Any] = {
        "id": id, "status": smtprelay.Status.HELD, "received_at": "2026-11-21T10:00:00.000Z",
        "client": "127.0.0.1", "helo": "box", "protocol": "ESMTP", "user": "",
        "reverse_path": "alice@example.com", "size": len(raw),
    }
    people = [smtprelay.Recipient(address) for address in to]
    return smtprelay.Message(**{**values, "recipients": people, **more})


class Box:
    """An inbox over messages in a dict, being its spool too; an id may be of any length."""

    def __init__(self) -> None:
        self.raws: dict[str, bytes] = {}
        self.records: dict[str, Any] = {}
        self.opened = 0
        self.trouble: OSError | None = None
        self.inbox = smtprelay.Inbox(self, smtprelay.Log(logging.getLogger("smtprelay.test")))  # type: ignore[arg-type]

    def load(self, stem: str) -> Any:
        return self.records[stem[11:]]

    def content(self, stem: str) -> BinaryIO:
        if self.trouble:
            raise self.trouble
        self.opened += 1
        return io.BytesIO(self.raws[stem[11:]])

    def put(self, raw: bytes, id: str = "", **more: Any) -> str:
        id = id or f"m{len(self.raws)}"
        self.raws[id], self.records[id] = raw, record(id, raw, **more)
        self.inbox.add("2026-11-21/" + id)
        return id


@pytest.fixture
def box() -> Iterator[Box]:
    box = Box()
    yield box
    box.inbox.close()


PLAIN = (
    b"Received: from box\r\nFrom: Alice <alice@example.com>\r\n"
    b'To: "Doe, Bob" <bob@example.com>, carol@example.com\r\n'
    b"Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?= from\r\n =?utf-8?b?w4RseQ==?=\r\n"
    b"Message-ID: <1@example.com>\r\nDate: Sat, 21 Nov 2026 10:00:00 +0100\r\n"
    b"\r\nHello Bob,\r\nsee you.\r\n"
)
TREE = (
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
    mail = smtprelay.read_mail(PLAIN)
    assert mail.subject == "Grüße from Äly"
    assert people(mail.people("to")) == [("Doe, Bob", "bob@example.com"), ("", "carol@example.com")]
    assert mail.text == "Hello Bob,\nsee you.\n"
    assert mail.date == "2026-11-21T10:00:00+01:00"
    assert mail.message_id == "1@example.com"
    assert [p.number for p in mail.parts] == ["0"]
    assert [name for name, _ in mail.headers][:2] == ["Received", "From"]


def test_read_tree() -> None:
    mail = smtprelay.read_mail(TREE)
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
    assert smtprelay.links(mail.text, mail.html) == ["https://x.example/?a=1&b=2"]


READ = [  # (content, text, attachments)
    (b"", "", 0),
    (b"\r\n", "", 0),
    (b"just words", "just words", 0),
    (b"Subject: x\r\nno header here\r\nmore", "no header here\nmore", 0),
    (b"Subject: x\n\nbare\n", "bare\n", 0),
    (b"Content-Type: text/plain; charset=nonsense\r\n\r\n\xe9\xc3\xa9", "\ufffdé", 0),
    (b"Content-Type: text/plain; charset=punycode\r\n\r\nabc", "abc", 0),
    (b"Content-Type: text/plain; charset=utf-16\r\n\r\n\xff\xfea\0", "a", 0),
    (
        b"Content-Type: text/html\r\n\r\n<p>a<br>b</p><style>x{}</style><!-- <b>no --><td>c<td>d",
        "a\nb\nc d",
        0,
    ),
    (b"Content-Type: multipart/mixed\r\n\r\nno boundary", "no boundary", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\nnever there", "never there", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nunclosed", "unclosed", 0),
    (b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n--b\r\n--b--\r\n", "", 0),
    (
        b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n"
        b"--b \nContent-Type: x/y\n\n2\n--b--",
        "one",
        1,
    ),
    (b"Content-Type: application/pdf\r\n\r\n%PDF", "", 1),
    (b'Content-Type: text/plain; name="a.txt"\r\n\r\nfile', "", 1),
    (b"Content-Transfer-Encoding: base64\r\n\r\naGVsbG8*gd29ybGQ", "hello world", 0),
    (b"Content-Transfer-Encoding: base64\r\n\r\naGVsbG8gd29ybGQX=YW", "hello world\x17a", 0),
    (b"Content-Transfer-Encoding: quoted-printable\r\n\r\na=ZZ=\r\nb=", "a=ZZb", 0),
    (b"Content-Transfer-Encoding: x-unknown\r\n\r\nabc", "abc", 0),
    (b"Content-Type: text/<script>\r\n\r\nx", "", 1),
]


@pytest.mark.parametrize("raw, text, attachments", READ)
def test_read(raw: bytes, text: str, attachments: int) -> None:
    mail = smtprelay.read_mail(raw)
    assert (mail.text, len(mail.having("attachment"))) == (text, attachments)


ADDRESSES = [
    ("a@b.example", [("", "a@b.example")]),
    (
        "=?utf-8?q?J=2C_x=40y?= <j@b.example>, k@b.example",
        [("J, x@y", "j@b.example"), ("", "k@b.example")],
    ),
    ("team: a@b.example, c@d.example;", [("", "a@b.example"), ("", "c@d.example")]),
    ("undisclosed-recipients:;", []),
    ("(" * 20000, []),
    ("a:" * 8000, []),
    ("<" * 8000, []),
]


@pytest.mark.parametrize("value, expected", ADDRESSES)
def test_addresses(value: str, expected: list[tuple[str, str]]) -> None:
    found = people(smtprelay.addresses(value))
    assert found == expected or (not expected and len(found) < 10)


def people(found: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(person["Name"], person["Address"]) for person in found]


CODES = [
    # (text, codes)
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
    assert smtprelay.codes(text) == found
    page = "<html><title>Code 999999</title><body><p>" + text.replace("\n", "<br>") + "</p>"
    assert smtprelay.codes("", page) == found


def test_codes_look_at_the_subject_and_the_html() -> None:
    assert smtprelay.codes("See above.", "", "123456 is your code") == ["123456"]
    assert smtprelay.codes("See the HTML part.", "<p>Code</p><b>123456</b>") == ["123456"]
    digits = "".join(f"<td>{n}</td>" for n in (4, 8, 2, 9, 1, 3))
    assert smtprelay.codes("", f"<p>Your code:</p><table><tr>{digits}</table>") == ["482913"]


LINKS = [  # (text, html, links)
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
    assert smtprelay.links(text, page) == found


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
    raw = (
        f'Content-Type: {sent}\r\nContent-Disposition: attachment; filename="a\\"\u00e9.x"\r\n\r\nx'
    )
    headers = smtprelay.part_headers(smtprelay.read_mail(raw.encode()).parts[0])
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
    ("before:1700000000", ""),
    ("before:nonsense", ""),
    ('after:"2026-11-19 00:00" before:"2026-11-20 00:00"', "a"),
    ("far away", "a"),
    ('"far away"', "a"),
    ("away far", "a"),
    ("-far", "dcb"),
    ("grüße", "b"),
    ("GRÜSSE", ""),
    ("unknown:word", ""),
    ('- ! : " ""', "dcba"),
    ("*", "dcba"),
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
        TREE.replace(b"filename*=utf-8''r%C3%A9sum%C3%A9.pdf", b"filename=report.pdf").replace(
            b"c@d.example", b"bob@example.com"
        )
        + b" " * 500,
        "d",
        received_at="2026-11-23T00:00:00Z",
    )
    box.inbox.mark(["a"], True)
    box.inbox.tag(["c", "nobody"], ["Second", "bad/tag"])
    return box


@pytest.mark.parametrize("query, found", SEARCHES)
def test_search(four: Box, query: str, found: str) -> None:
    page = four.inbox.search(smtprelay.compile_query(query, "UTC"))
    assert "".join(item.id for item in page.items) == found
    assert page.total == len(found)
    assert page.unread == len(found.replace("a", ""))


def test_moment_knows_time_zones() -> None:
    assert smtprelay.search_moment("2026-11-21", "Pacific/Auckland") == "2026-11-20T11:00:00"
    assert (
        smtprelay.search_moment("2026-11-21t10:00+02:00", "Mars/Olympus") == "2026-11-21T08:00:00"
    )
    assert smtprelay.search_moment("2026-11-21", "../../etc/passwd") == smtprelay.search_moment(
        "2026-11-21"
    )
    assert (
        smtprelay.search_moment("1763719200000")
        == smtprelay.search_moment("1763719200")
        == "2025-11-21T10:00:00"
    )
    assert [smtprelay.search_size(v) for v in ("2kb", "1.5m", "10", "1 m", "x", "1g")] == [
        2048,
        1572864,
        10,
        1048576,
        0,
        0,
    ]


PLACES = [  # (fields and body, where its text is found)
    (b"\r\nshort", "snippet"),
    (b"\r\n" + b"word " * 90, "raw"),
    (
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\nsplit nee=\r\ndle h=C3=A9 "
        + b"word " * 90,
        "raw",
    ),
    (b"Content-Transfer-Encoding: quoted-printable\r\n\r\n=6eeedle " + b"word " * 90, "parts"),
    (b"Content-Transfer-Encoding: base64\r\n\r\n" + base64.b64encode(b"needle " * 90), "parts"),
    (b"Content-Type: text/html\r\n\r\n<b>nee</b>dle " + b"word " * 90, "parts"),
    (
        b"Content-Type: text/plain; charset=utf-16\r\n\r\n" + ("needle " * 90).encode("utf-16"),
        "parts",
    ),
    (b"Content-Type: text/plain; charset=latin-1\r\n\r\nneedle h\xe9 " + b"word " * 90, "raw"),
    (b"Content-Type: application/pdf; name=needle.pdf\r\n\r\n", "parts"),
]


@pytest.mark.parametrize("raw, place", PLACES)
def test_search_finds_words_wherever_they_are(box: Box, raw: bytes, place: str) -> None:
    box.put(b"Subject: x\r\n" + raw)
    latest = box.inbox.get("latest")
    assert latest and latest.summary["place"] == place
    held = {
        q: box.inbox.search(smtprelay.compile_query(q)).total
        for q in ("needle", "-needle", "absent", "é")
    }
    needle = int(place != "snippet" and (b"word" not in raw or b"nee" in raw or b"=6ee" in raw))
    assert held == {"needle": needle, "-needle": 1 - needle, "absent": 0,
                    "é": int(b"\xe9" in raw or b"=C3=A9" in raw)}


def test_search_opens_nothing_it_knows(four: Box) -> None:
    four.inbox.search(smtprelay.compile_query("from:x"))
    before = four.opened
    four.inbox.search(smtprelay.compile_query("from:alice short"))
    assert four.opened == before + 1  # a's text is longer than its snippet
    four.inbox.search(smtprelay.compile_query("subject:nothing far"))
    assert four.opened == before + 1


def test_nothing_is_read_on_the_way_in(box: Box) -> None:
    for _ in range(100):
        box.put(PLAIN)
    assert box.opened == 0
    assert [item.id for item in box.inbox.search(limit=2).items] == ["m99", "m98"]
    assert box.opened == 2
    assert [item.id for item in box.inbox.search(start=98, limit=50).items] == ["m1", "m0"]
    assert len(box.inbox.search(limit=0).items) == 100


def test_sequence_numbers_are_never_reused(box: Box) -> None:
    box.put(PLAIN, "a")
    box.put(PLAIN, "b")
    assert box.inbox.delete(["b", "nobody"]) == ["b"]
    box.put(PLAIN, "c")
    assert box.inbox.add("2026-11-21/c") == box.inbox.last == 3
    assert box.inbox.delete() == ["a", "c"]
    assert (box.inbox.search().total, box.inbox.deleted) == (0, 3)
    assert box.inbox.get("latest") is None


def test_a_message_that_is_gone_is_forgotten(box: Box) -> None:
    box.put(PLAIN, "a")
    box.put(PLAIN, "b")
    del box.raws["b"]
    latest = box.inbox.get("latest")
    assert latest and latest.id == "a"
    assert box.inbox.search().total == 1
    assert box.inbox.get("b") is None


def test_a_message_that_cannot_be_read_is_kept(box: Box) -> None:
    box.put(PLAIN, "a")
    box.trouble = OSError(24, "too many open files")
    assert box.inbox.search().items == []
    box.trouble = None
    assert len(box.inbox.search().items) == 1


def test_tags(four: Box) -> None:
    four.inbox.search(smtprelay.compile_query("from:x"))
    assert four.inbox.counts() == (4, 3, {"Second": 1, "Urgent": 1})
    four.inbox.rename_tag("Urgent", "Later")
    four.inbox.rename_tag("Second")
    assert four.inbox.counts()[2] == {"Later": 1}
    four.inbox.mark(None, True)
    assert four.inbox.counts()[1] == 0


# -- waiting


def later(call: Any, *args: Any) -> threading.Thread:
    thread = threading.Timer(0.02, call, args)
    thread.start()
    return thread


def test_wait_finds_what_is_there_or_comes(box: Box) -> None:
    to_bob = smtprelay.compile_query("to:bob")
    assert box.inbox.wait(to_bob, timeout=0.01) is None
    first, second = box.put(PLAIN), box.put(PLAIN)
    newest = box.inbox.wait(to_bob, timeout=0)
    assert newest and newest.id == second
    oldest = box.inbox.wait(to_bob, since=0, timeout=0)
    assert oldest and oldest.id == first
    following = box.inbox.wait(to_bob, since=oldest.sequence, timeout=0)
    assert following and following.id == second
    thread = later(box.put, PLAIN, "new")
    found = box.inbox.wait(to_bob, since=following.sequence, timeout=5)
    assert found and found.id == "new"
    thread.join()


def test_wait_sleeps_through_other_mail(box: Box) -> None:
    thread = later(lambda: [box.put(PLAIN.replace(b"bob@", b"x%d@" % n)) for n in range(50)])
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
        found[n] = item.id if item else "nothing"

    threads = [threading.Thread(target=wait, args=(n,)) for n in range(20)]
    for thread in threads:
        thread.start()
    ready.wait()
    for n in range(200):
        box.put(PLAIN.replace(b"bob@", b"user%d@" % n), f"id{n}")
        if n > 100:
            box.inbox.delete([f"id{n - 50}"])
    for thread in threads:
        thread.join()
    assert found == {n: f"id{n}" for n in range(20)}


def test_email(box: Box) -> None:
    box.put(TREE + b"", "m7")
    item = box.inbox.get("m7")
    assert item
    mail = box.inbox.email(item)
    assert (mail.from_, mail.to, mail.subject) == ("a@b.example", ["c@d.example"], "tree")
    assert (mail.reverse_path, mail.recipients) == ("alice@example.com", ["bob@example.com"])
    assert [(p.filename, len(p.content)) for p in mail.attachments][:2] == [
        ("logo.png", 4),
        ("résumé.pdf", 4),
    ]
    assert mail.headers["subject"] == "tree"
    assert (mail.links, mail.codes, mail.raw) == (["https://x.example/?a=1&b=2"], [], TREE)
    assert repr(mail) == "<Email 'tree' from 'a@b.example' to ['bob@example.com'] id m7>"
    assert "Found: https://x.example/?a=1&b=2\n\nnaïve text" in str(mail)


# -- JSON


SUMMARY_TYPES = {
    "ID": str, "MessageID": str, "Read": bool, "From": dict, "To": list, "Cc": list, "Bcc": list,
    "ReplyTo": list, "Subject": str, "Created": str, "Username": str, "Tags": list, "Size": int,
    "Attachments": int, "Snippet": str,
}
MESSAGE_TYPES = {
    "ID": str, "MessageID": str, "From": dict, "To": list, "Cc": list, "Bcc": list, "ReplyTo": list,
    "ReturnPath": str, "Subject": str, "ListUnsubscribe": dict, "Date": str, "Tags": list,
    "Username": str, "Text": str, "HTML": str, "Size": int, "Inline": list, "Attachments": list,
}


def types(value: dict[str, Any]) -> dict[str, type]:
    return {name: type(member) for name, member in value.items()}


def test_mailpit_json(four: Box) -> None:
    listing = smtprelay.messages_json(four.inbox, smtprelay.compile_query("to:bob"), 0, 2)
    assert json.loads(json.dumps(listing)) == listing
    counts = {name: listing[name] for name in listing if name != "messages"}
    assert counts == {
        "total": 4, "unread": 3, "count": 2, "messages_count": 3, "messages_unread": 2, "start": 0,
        "tags": ["Second", "Urgent"],
    }
    d, b = listing["messages"]
    assert types(d) == types(b) == SUMMARY_TYPES
    assert b["From"] == {"Name": "", "Address": "alice@example.com"}
    assert (b["Cc"], b["Tags"]) == ([{"Name": "Carol", "Address": "carol@example.com"}], ["Urgent"])
    item = four.inbox.get("d")
    assert item
    whole = smtprelay.message_json(item, four.inbox.mail("d"), four.records["d"])
    assert types(whole) == MESSAGE_TYPES
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
    assert [a["FileName"] for a in whole["Attachments"]] == ["report.pdf", "part-3"]
    waited = smtprelay.waited_json(item, four.inbox.mail("d"), four.records["d"])
    assert (waited["Sequence"], waited["Links"], waited["Codes"]) == (
        4,
        ["https://x.example/?a=1&b=2"],
        [],
    )


def test_headers_and_info_json(four: Box) -> None:
    mail = smtprelay.read_mail(
        b"MIME-version: 1.0\r\nmessage-ID: <x>\r\nReceived: a\r\nreceived: b\r\n c\r\n"
        b"X-\xc3\xa9: this begins the body\r\nlast: d\r\n\r\n"
    )
    assert smtprelay.headers_json(mail) == {
        "Message-Id": ["<x>"],
        "Mime-Version": ["1.0"],
        "Received": ["a", "b c"],
    }
    info = smtprelay.info_json(four.inbox, "1.0", "spool", DatabaseSize=9, Uptime=5)
    assert set(info) == {
        "Version",
        "LatestVersion",
        "Database",
        "DatabaseSize",
        "Messages",
        "Unread",
        "Tags",
        "RuntimeStats",
    }
    assert set(info["RuntimeStats"]) == {
        "Uptime", "Memory", "MessagesDeleted", "SMTPAccepted", "SMTPAcceptedSize", "SMTPRejected",
        "SMTPIgnored",
    }
    assert (
        info["Messages"],
        info["Unread"],
        info["RuntimeStats"]["Uptime"],
        info["DatabaseSize"],
    ) == (4, 3, 5, 9)


def test_mailhog_json(box: Box) -> None:
    box.put(TREE)
    box.put(PLAIN)
    listing = smtprelay.mailhog_json(box.inbox, smtprelay.ALL, 0, 2)
    assert json.loads(json.dumps(listing)) == listing
    assert (listing["total"], listing["count"], listing["start"]) == (2, 2, 0)
    plain, tree = listing["items"]
    assert plain["Content"]["Headers"]["Message-ID"] == ["<1@example.com>"]
    assert plain["Content"]["Body"] == "Hello Bob,\r\nsee you.\r\n"
    assert plain["Raw"]["Data"] == PLAIN.decode()
    assert plain["To"] == [
        {"Relays": None, "Mailbox": "bob", "Domain": "example.com", "Params": ""}
    ]
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
    mail = smtprelay.read_mail(raw)
    names = [name for name, _ in mail.headers]
    assert "Bcc" not in names and "X-Evil" not in names
    assert people(mail.people("from")) == [("Jöhn, D", "john@example.com")]
    assert mail.subject == "Grüße  X-Evil: yes"
    assert (mail.text, mail.html) == ("Hëllo\n", "<p>Hi <img src='cid:logo'>\n")
    found = [
        (p.filename, p.content_type, p.role, p.content) for p in mail.parts if p.role != "body"
    ]
    assert found == [
        ("logo.png", "image/png", "inline", b"\x89PNG"),
        ("a.txt", "text/x-thing", "attachment", b"hi"),
    ]
    assert smtprelay.header(mail.headers, "x-tags") == "Tag 1"
    assert smtprelay.header(mail.headers, "message-id").endswith("@example.com>")
    assert "data:image/png;base64," in smtprelay.view_html(mail)


MINIMAL: dict[str, Any] = {"from": {"email": "a@b.example"}, "to": [{"email": "c@d.example"}]}
REFUSED = [  # (change, error begins with)
    ([], "body: must be an object"),
    ({"From": None}, "From.Email: invalid address ''"),
    ({"From": "a@b.example"}, "From: must be of type dict"),
    ({"From": {"Email": "nobody"}}, "From.Email: invalid address 'nobody'"),
    ({"From": {"Email": "a@b\r\nc"}}, "From.Email: invalid address"),
    ({"To": None}, "To: no recipients"),
    ({"To": {}}, "To: must be of type list"),
    ({"To": ["a@b.example"]}, "To[0]: must be an object"),
    ({"To": [{"Email": "a b@c"}]}, "To[0].Email: invalid address"),
    ({"To": [{"Email": "ä@b.example"}]}, "To[0].Email: invalid address"),
    ({"Bcc": [1]}, "Bcc[0]: invalid address '1'"),
    ({"Subject": 1}, "Subject: must be of type str"),
    ({"Headers": {"To": "x"}}, "Headers: cannot set 'To'"),
    ({"Headers": {"X y": "x"}}, "Headers: cannot set 'X y'"),
    ({"Headers": {"Received": "x"}}, "Headers: cannot set 'Received'"),
    ({"Attachments": [{"Content": "*"}]}, "Attachments[0].Content: not base64"),
    ({"Attachments": [{"Content": "", "ContentType": "\r\n"}]}, "body: "),
    ({"Text": "\ud800"}, "body: "),
]


@pytest.mark.parametrize("change, error", REFUSED)
def test_compose_refuses(change: Any, error: str) -> None:
    lowered = {name.lower(): value for name, value in change.items()} if change else {}
    with pytest.raises(smtprelay.BadRequest) as refused:
        smtprelay.compose({**MINIMAL, **lowered} if change else change)
    assert str(refused.value).startswith(error)


def test_compose_takes_the_least() -> None:
    raw, _, recipients = smtprelay.compose(MINIMAL)
    assert recipients == ["c@d.example"] and smtprelay.read_mail(raw).plain == "\n"
    html_only = smtprelay.read_mail(smtprelay.compose({**MINIMAL, "HTML": "<b>x"})[0])
    assert (html_only.plain, html_only.html) == ("", "<b>x\n")


def test_release_to() -> None:
    assert smtprelay.release_to({"To": ["a@b.example"]}) == ["a@b.example"]
    bodies: tuple[Any, ...] = ({}, {"To": []}, {"To": ["x"]}, [], None)
    for body in bodies:
        with pytest.raises(smtprelay.BadRequest):
            smtprelay.release_to(body)


# -- hostile mail: nothing may raise, hang, or grow out of proportion


def bomb(depth: int) -> bytes:
    """A multipart inside a multipart, and so on."""
    head = (
        b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (n, n)
        for n in range(depth)
    )
    return b"".join(head) + b"\r\ndeep"


MEGABYTE = 1 << 20
MULTIPART = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
HTML = b"Content-Type: text/html\r\n\r\n"
HOSTILE = {
    "deep": bomb(2000),
    "deep and long": bomb(16) + b"\r\n--b" * (MEGABYTE // 5),
    "messages in messages": b"Content-Type: message/rfc822\r\n\r\n" * 10000,
    "10,000 parts": MULTIPART + b"--b\r\n\r\nx\r\n" * 10000,
    "empty parts": MULTIPART + b"--b\n" * (MEGABYTE // 4),
    "one line of boundaries": MULTIPART + b"--b" * (MEGABYTE // 3),
    "boundary of dashes": MULTIPART.replace(b"=b", b"=------") + b"\n-" * (MEGABYTE // 2),
    "header without end": b"X: " + b"a" * MEGABYTE,
    "folded header": b"Subject: a\r\n" + b" b\r\n" * (MEGABYTE // 4),
    "many headers": b"a:\r\n" * (MEGABYTE // 4),
    "encoded words": b"Subject: " + b"=?a?q?x" * 20000,
    "encoded words 2": b"Subject: " + b"=?utf-8?q?x?= " * 20000,
    "encoded words 3": b"From: " + b"=?utf-8?b?!!!!?= <" * 20000,
    "comments": b"From: " + b"(" * MEGABYTE,
    "groups": b"To: " + b"a:" * MEGABYTE,
    "quotes": b"To: " + b'"a\\' * MEGABYTE,
    "recipients": b"To: " + b"a@b.example," * 90000,
    "parameters": b"Content-Type: text/plain" + b'; a="b;c' * 100000,
    "continuations": b"Content-Type: text/plain" + b"; name*0*=utf-8''a; name*1=b; name*x=c" * 1000,
    "bad continuation": b"Content-Type: a/b; name*=a; name*0=x; charset*=punycode''utf-8\r\n\r\nx",
    "tags": HTML + b"<" * MEGABYTE,
    "comments in html": HTML + b"<!-- " * (MEGABYTE // 5),
    "scripts in html": HTML + b"<script>" * (MEGABYTE // 8),
    "anchors": HTML + b"<a href='https://x.example/" * (MEGABYTE // 27),
    "hrefs in one": b"Content-Type: text/html\r\n\r\n<a " + b"href=\"href='" * (MEGABYTE // 12),
    "entities": HTML + b"&#" * (MEGABYTE // 2),
    "urls": b"\r\n" + b"https://" * (MEGABYTE // 8),
    "codes": b"\r\n" + b"code is 123456 " * (MEGABYTE // 15),
    "almost codes": b"\r\n" + b"code to a a a a A1B2 " * (MEGABYTE // 21),
    "digits": b"\r\n" + b"1 " * (MEGABYTE // 2),
    "spaces": b"\r\ncode" + b" " * MEGABYTE + b"123456",
    "base64": b"Content-Transfer-Encoding: base64\r\n\r\n" + b"=" * MEGABYTE + b"A",
    "nul": b"Subject: \0\r\n\0: x\r\n\r\n\0",
    "cids": HTML + b"cid:" * (MEGABYTE // 4),
}


def read_all(raw: bytes) -> None:
    """Do with a message all that this chapter can."""
    box = Box()
    id = box.put(raw)
    item = box.inbox.get(id)
    assert item
    mail = box.inbox.email(item)
    outputs = [
        smtprelay.summary_json(item), smtprelay.waited_json(item, mail.mail, box.records[id]),
        smtprelay.headers_json(mail.mail), smtprelay.mailhog_json(box.inbox, smtprelay.ALL),
        [smtprelay.part_headers(p) for p in mail.attachments],
    ]
    json.dumps(outputs).encode()
    str(mail), repr(mail), mail.headers.items(), smtprelay.view_html(mail.mail)
    box.inbox.search(smtprelay.compile_query("nothing -subject:x has:attachment"))
    box.inbox.search(smtprelay.compile_query("nothing"))
    assert len(mail.mail.parts) <= smtprelay.PART_LIMIT


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(name: str) -> None:
    begun = time.process_time()
    read_all(HOSTILE[name])
    spent = time.process_time() - begun
    assert spent < 20  # a hang, not a speed


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
    b"Content-Type: ", b"multipart/mixed", b"text/html", b"; boundary=", b"b", b'"', b"\r\n",
    b"\r\n\r\n", b"--b", b"--", b"Content-Transfer-Encoding: base64", b"utf-8''", b"%ff", b"?=",
    b"Content-Disposition: attachment; filename*0*=", b"=?utf-8?q?", b"=?utf-8?b?", b"\xff\xfe",
    b"\0", b"From: ", b"<", b">", b"@", b"(", b"\\", b"a", b"code is 123456", b"https://x", b" ",
    b"<a href=", b"Subject: ", b"Content-ID: <", b"; charset=", b"utf-7", b"iso-2022-jp", b"cid:",
    b"Date: ", b"99999999999",
]


@pytest.mark.parametrize("seed", range(4))
def test_random_mail(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        raw = b"".join(rng.choices(WORDS, k=rng.randrange(80)))
        read_all(raw)
        read_all(bytes(rng.choice(TREE) if rng.random() < 0.03 else octet for octet in TREE))


@pytest.mark.parametrize("seed", range(4))
def test_the_tree_is_the_one_the_email_package_sees(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        message = grow(rng, 3)
        raw = message.as_bytes()
        leaves = [p.get_payload(decode=True) for p in message.walk() if not p.is_multipart()]
        assert [p.content for p in smtprelay.read_mail(raw).parts] == leaves


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
    ("<META http-equiv=refresh content=0>", "<base target=_blank><x-META http-equiv=refresh content=0>"),
    ("<lin<link x>k rel=preconnect>", "<base target=_blank><lin<x-link x>k rel=preconnect>"),
    ("<link rel=stylesheet href=x><base href=y>", "<base target=_blank><link rel=stylesheet href=x><x-base href=y>"),
    ("<img src=cid:none><img src='CID:pic'>", "<base target=_blank><img src=cid:none><img src='data:image/png;base64,iVBORw=='>"),
    ("<img src=cid:evil>", "<base target=_blank><img src=cid:evil>"),
]


@pytest.mark.parametrize(("page", "shown"), VIEWS)
def test_view_html(page: str, shown: str) -> None:
    image = "\r\n--b\r\nContent-Type: image/{}\r\nContent-ID: <{}>\r\nContent-Transfer-Encoding: base64\r\n\r\niVBORw=="
    raw = f"Content-Type: multipart/related; boundary=b\r\n\r\n--b\r\nContent-Type: text/html\r\n\r\n{page}"
    raw += image.format("png", "pic") + image.format("svg+xml", "evil")
    assert smtprelay.view_html(smtprelay.read_mail(raw.encode())) == shown


def test_an_image_that_is_shown_often_does_not_swell_the_page(box: Box) -> None:
    image = b"\r\n--b\r\nContent-Type: image/png\r\nContent-ID: <i>\r\n\r\n" + b"x" * 100_000
    page = b"--b\r\nContent-Type: text/html\r\n\r\n" + b"<img src=cid:i>" * 10_000
    mail = smtprelay.read_mail(b"Content-Type: multipart/related; boundary=b\r\n\r\n" + page + image)
    assert len(smtprelay.view_html(mail)) < smtprelay.EMBEDDED_LIMIT + 300_000


def test_ten_thousand_messages(box: Box) -> None:
    """The list answers in 50 ms, a search in 500 ms; a message costs less than 1 KiB. Generous here: machines differ."""
    samples = [letter(n) for n in range(50)]
    for n in range(2000):
        box.raws[f"{n:016d}"], box.records[f"{n:016d}"] = samples[n % 50], record(f"{n:016d}", samples[n % 50])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for id in box.raws:
        box.inbox.add("2026-11-21/" + id)
    box.inbox.search(smtprelay.compile_query("subject:nothing"))
    spent = (tracemalloc.get_traced_memory()[0] - before) / 2000
    tracemalloc.stop()
    assert spent < 1024
    times = []
    for query in (smtprelay.ALL, smtprelay.compile_query("subject:visit"), smtprelay.compile_query("insurance -nowhere")):
        begun = time.process_time()
        smtprelay.messages_json(box.inbox, query)
        times.append(time.process_time() - begun)
    assert times[0] < 0.05 and max(times) < 0.5, times


# === PAGE ====================================================================

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAABgAAAAYCAMAAADXqc3KAAAABlBMVEWKOxL///82E77gAAAAQElEQVR42mNgxAEY6CTBgAHIlmDE"
    "Ig61HFOcEaoLVRxhB7IMhA+zHCED5cJdBZOB8RDORZFH8QeyXTQIkoGKWgCgkAFjTm4sFwAAAABJRU5ErkJggg==")
PEOPLE = ("Ada Park", "Bruno Keller", "Chidi Okafor", "Dana Whitfield", "Elif Demir", "Farah Aziz", "Goran Petrov", "Hana Sato")
SENDERS = (
    ("Northwind Books", "orders@northwind.example"), ("Accounts", "no-reply@app.example"),
    ("Tidewater Health", "visits@tidewater.example"), ("Build server", "ci@build.example"),
    ("", "cron@db-3.internal.example"), ("Larkspur Travel", "hello@larkspur.example"))
LETTERS = (  # sender, subject, text
    (0, "Your order {n} is on its way", "Two parcels, arriving Tuesday. Track them at https://shop.example/track/{n}.\n\nThis is the plain text."),
    (1, "Confirm your address", "Your code is {code}. It is good for ten minutes."),
    (2, "Your visit on Thursday at 09:40", "Please bring your insurance card and arrive ten minutes early."),
    (3, "main: build {n} passed", "412 tests, 3 skipped, 4 min 12 s."),
    (4, "Backup finished", "14.2 GiB in 22 min. Oldest kept: 30 days."),
    (5, "Lisbon in March: three quiet hotels", "We kept the list short this time, and all three take dogs."),
    (0, "Invoice {n}", "Attached, due in 30 days. Thank you for reading with us."),
    (1, "Someone logged in from a new device", "Firefox on Linux, near Utrecht. Not you? Change your password."),
    (3, "main: build {n} failed", "test_queue_survives_restart: expected 3 messages owed, found 2."))
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
<p class="s">Tidewater Health, 12 Quay Road.</p>""")
EVIL = "http://evil.test"
HOSTILE_HTML = f"""<script>top.pwned=1;alert(1);fetch('{EVIL}/s')</script><img src=x onerror="alert(2)">
<img src="{EVIL}/i.png"><link rel=stylesheet href="{EVIL}/c.css"><link rel=prefetch href="{EVIL}/p">
<link rel=preconnect href="{EVIL}"><link rel="dns-prefetch" href="{EVIL}"><style>@import url({EVIL}/im.css);body{{background:url({EVIL}/b.png)}}
@font-face{{font-family:x;src:url({EVIL}/f.woff)}}p{{font-family:x}}</style>
<meta http-equiv=refresh content="0;url={EVIL}/r"><me<meta x>ta http-equiv=refresh content="0;url={EVIL}/r2"><base href="{EVIL}/" target=_top>
<form action="{EVIL}/form" target=_top><input name=a autofocus onfocus="alert(3)"><button id=go>Win</button></form>
<iframe src="{EVIL}/frame"></iframe><iframe srcdoc="<script>alert(4)</script>"></iframe>
<object data="{EVIL}/o"></object><embed src="{EVIL}/e"><video poster="{EVIL}/v"></video><audio src="{EVIL}/a" autoplay></audio>
<svg onload="alert(5)"><image href="{EVIL}/svg.png"/><use href="{EVIL}/u#x"/></svg>
<a id=out href="{EVIL}/click" target=_top>click</a> <a id=js href="javascript:alert(6)" target=_top>js</a>
<p>hostile body</p></script></style></textarea></title><img src=x onerror=alert(7)>"""
NASTY = "</script><script>alert(8)</script><img src=x onerror=alert(9)>\u202egnp.exe \U0001f608 " + "Z\u0351\u036b\u0343" * 40 + "A" * 3000


def letter(n: int) -> bytes:
    """Return the nth message of an invented company's day."""
    kind = (n * 7 + n // 9) % len(LETTERS) if n else 0
    sender, subject, text = LETTERS[kind]
    values = {"n": 88000 + n, "code": n * 7919 % 900000 + 100000}
    name = PEOPLE[n * 3 % len(PEOPLE)]
    body: dict[str, Any] = {
        "From": {"Name": SENDERS[sender][0], "Email": SENDERS[sender][1]},
        "To": [{"Name": name, "Email": name.split()[0].lower() + "@example.com"}],
        "Subject": subject.format(**values), "Text": text.format(**values)}
    if kind in (0, 2):
        logo = {"Content": base64.b64encode(PNG).decode(), "Filename": "logo.png", "ContentID": "logo"}
        body.update(HTML=VISIT if kind else ORDER, Attachments=[logo])
    if "Invoice" in subject:
        body.update(Attachments=[{"Content": "JVBERg==", "Filename": "invoice.pdf"}])
    return smtprelay.compose(body)[0]


def hostile_letter() -> bytes:
    """Return a message that tries to script the page, to tell on its reader, to break out, to be endless."""
    head = f'From: "{NASTY}" <mallory@evil.test>\r\nTo: "<svg onload=alert(11)>" <x@y.test>{", z@y.test" * 400}\r\nSubject: {NASTY}\r\n'
    parts = [f"Content-Type: text/html; charset=utf-8\r\n\r\n{HOSTILE_HTML}",
             "Content-Type: text/plain; charset=utf-8\r\n\r\njavascript:alert(13) data:text/html,x https://ok.example/<script>"]
    name = "<img src=x onerror=alert(17)>/../../etc/passwd"
    parts += [f'Content-Type: text/html; name="{name}"\r\nContent-Disposition: attachment\r\n\r\n<script>alert(18)</script>'] * 10000
    mail = f"{head}MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n" + "\r\n--b\r\n".join(parts)
    return mail.encode("utf-8")


class PastIds:
    """Queue ids of the last day, so that a new spool looks lived in."""

    def __init__(self, times: Iterator[float]) -> None:
        self.times = times

    def next(self) -> str:
        return f"{int(next(self.times) * 1e6):013x}abc"


def fill_spool(path: Path, letters: list[bytes]) -> None:
    """Put held messages into a spool, the first the oldest, spread over the last day."""
    rng, end = random.Random(7), time.time() - 60
    ages = sorted((rng.random() ** 1.15 * 82000 for _ in letters), reverse=True)
    settings = smtprelay.Settings.read({"SMTP_SPOOL": str(path), "SMTP_FSYNC": "0"})
    spool = smtprelay.FileSpool(settings, smtprelay.open_log(settings))
    spool.ids = PastIds(end - age for age in ages)  # type: ignore[assignment]
    spool.open()
    for content in letters:
        mail = smtprelay.read_mail(content)
        to = [person["Address"] for person in mail.people("to")[:3]]
        draft = spool.draft(smtprelay.Envelope(mail.people("from")[0]["Address"], "127.0.0.1", "app", "ESMTP", flags=("HOLD",), recipients=to))
        draft.write(content)
        draft.commit()
    spool.close()


def chromium() -> str:
    """Return the browser; skip the test where it, node or playwright-core is missing."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
    if not browser or not shutil.which("node") or not (MODULES / "playwright-core").is_dir():
        pytest.skip("needs chromium, node, and playwright-core in .ci/node_modules (see .ci/install)")
    return browser


def test_the_page_in_a_real_browser(program: Callable[..., Program], hop: Callable[..., FakeHop], tmp_path: Path) -> None:  # noqa: F811
    """SMTP_TEST_SHOTS names a directory for the README's screenshots, which this run makes."""
    browser = chromium()
    busy = {f"rcpt busy{n}@example.com": ["450 4.2.1 The mailbox is busy, try again later"] for n in ("-1", "-2", "-3", "-4", "-last")}
    next_hop = hop(**{"script": busy})
    relays = {"SMTP_RELAY_HOST": f"127.0.0.1:{next_hop.port}", "SMTP_RETRY_INITIAL_DELAY": "1h", "SMTP_RETRY_MAX_DELAY": "1h"}
    fill_spool(tmp_path / "held", [*map(letter, range(118, 60, -1)), hostile_letter(), *map(letter, range(60, -1, -1))])
    held = program(**relays, SMTP_DELIVERY="hold", SMTP_SPOOL=str(tmp_path / "held"))
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"shop": {"password": "a long one", "allowed_domains": ["shop.example"], "quota_daily": 500}}))
    users.chmod(0o600)
    owed = program(**relays, SMTP_API_TOKEN="a token", SMTP_USERS_FILE=str(users))
    for n in range(1, 5):
        ask(owed, "POST", "/api/v1/send", {"From": {"Email": "ann@example.com"}, "To": [{"Email": f"busy-{n}@example.com"}],
                                           "Subject": f"Reminder {n}", "Text": "Sent.", "HTML": "<p>Sent."}, token="a token")
    env = {"PATH": os.environ["PATH"], "HELD": held.http_url, "OWED": owed.http_url, "TOKEN": "a token", "CHROMIUM": browser,
           "SHOTS": os.environ.get("SMTP_TEST_SHOTS", ""), "HOME": str(tmp_path)}
    run = subprocess.run(["node", str(ROOT / ".ci" / "page.mjs")], env=env, capture_output=True, text=True, timeout=120)
    print(run.stdout, run.stderr)
    assert run.returncode == 0 and "all is well" in run.stdout
    assert "_bug" not in held.log() + owed.log()


def ask(relay: Any, method: str, path: str, body: Any = None, token: str = "", **headers: str) -> Any:
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

API = ("/api/v1/messages", "/api/v1/info", "/api/v1/message/latest", "/api/v1/events", "/api/v1/queue", "/api/v1/users", "/api/v1/chaos",
       "/view/latest.html", "/view/latest.txt", "/api/v2/messages")


def mailed(relay: Any, *letters: bytes, to: tuple[str, ...] = ("bob@example.com",)) -> None:
    with smtplib.SMTP(relay.host, relay.port) as client:
        for content in letters or (b"From: ann@example.com\r\nSubject: hi\r\n\r\nhi\r\n",):
            client.sendmail("envelope@example.com", to, content)


@pytest.mark.parametrize(("headers", "get", "delete"), [
    ({}, 200, 200), ({"Host": "localhost:1"}, 200, 200), ({"Host": "[::1]:99"}, 200, 200), ({"Host": "relay.test"}, 200, 200),
    ({"Host": "evil.test"}, 403, 403), ({"Host": "127.0.0.1.evil.test"}, 403, 403), ({"Host": "["}, 403, 403),
    ({"Origin": "http://evil.test"}, 200, 403), ({"Origin": "null"}, 200, 403), ({"Origin": "http://127.0.0.1"}, 200, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403, 403), ({"Sec-Fetch-Site": "same-site"}, 403, 403), ({"Sec-Fetch-Site": "same-origin"}, 200, 200),
])
def test_other_sites_and_rebound_names_are_kept_out(start: Callable[..., Any], headers: dict[str, str], get: int, delete: int) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    assert (fetch(relay, "/api/v1/messages", **headers)[0], fetch(relay, "/api/v1/messages", "DELETE", **headers)[0]) == (get, delete)
    assert fetch(relay, "/livez", **headers)[0] == fetch(relay, "/metrics", **headers)[0] == 200
    own = headers.get("Host", relay.http_url[7:])
    assert fetch(relay, "/api/v1/messages", "DELETE", **{**headers, "Origin": f"http://{own}"})[0] == (200 if get == 200 else 403)


def test_a_link_from_elsewhere_may_open_the_page(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    assert fetch(relay, "/", **{"Sec-Fetch-Site": "cross-site"})[0] == 200
    assert fetch(relay, "/", Host="evil.test")[0] == 403


def test_the_token_opens_everything(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret")
    mailed(relay)
    bearer, basic = {"Authorization": "Bearer secret"}, {"Authorization": "Basic " + base64.b64encode(b"any:secret").decode()}
    for path in API:
        for wrong in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}, {"Authorization": "Digest secret"}):
            assert fetch(relay, path, **wrong)[0] == 401, path
        if path != "/api/v1/events":
            assert fetch(relay, path, **bearer)[0] == fetch(relay, path, **basic, Host="relay.lan")[0] == 200, path
    status, kind, page = fetch(relay, "/", Host="relay.lan")
    assert (status, kind, page) == (401, "text/html; charset=utf-8", smtprelay.PAGE)
    assert fetch(relay, "/", **bearer)[0] == 200
    assert fetch(relay, "/api/v1/messages", "DELETE", **bearer, Origin="http://evil.test")[0] == 403


def test_the_view_key_opens_one_message(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory", SMTP_API_TOKEN="secret")
    mailed(relay)
    mailed(relay)
    _, listed = ask(relay, "GET", "/api/v1/messages", token="secret")
    one, other = (message["ID"] for message in listed["messages"])
    key = ask(relay, "GET", f"/api/v1/message/{one}", token="secret")[1]["ViewKey"]
    assert fetch(relay, f"/view/{one}.html?key={key}")[0] == 200
    for path in (f"/view/{other}.html?key={key}", f"/view/{one}.html?key=", f"/view/{one}.txt?key={key}", f"/api/v1/message/{one}?key={key}"):
        assert fetch(relay, path)[0] == 401


def test_without_a_token_strangers_are_not_served(program: Callable[..., Program]) -> None:  # noqa: F811
    relay = program(SMTP_HEALTH_ADDR="0.0.0.0:0 127.0.0.1:0")
    assert "SMTP_API_TOKEN: the page and /api serve this machine alone" in relay.log()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # no packet is sent
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    if smtprelay.is_loopback(own):
        pytest.skip("this machine has no address beyond loopback")
    relay.http_url = f"http://{own}:" + relay.log().partition("http://0.0.0.0:")[2].split()[0]
    assert [fetch(relay, path)[0] for path in ("/", "/api/v1/messages", "/livez", "/metrics")] == [403, 403, 200, 200]


def test_security_headers(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, TREE)
    policies = {}
    for path in ("/", "/api/v1/messages", "/view/latest.html", "/view/latest.html?remote=1", "/view/latest.txt", "/nothing",
                 "/api/v1/message/latest/raw", "/api/v1/message/latest/part/2"):
        with contextlib.closing(http.client.HTTPConnection(relay.http_url[7:], timeout=8)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert (answer.headers["X-Content-Type-Options"], answer.headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
            policies[path] = answer.headers["Content-Security-Policy"]
            body = answer.read()
        if path.endswith("/part/2"):
            assert answer.headers["Content-Disposition"].startswith("attachment;")
        if path == "/":
            script = body.partition(b"<script>")[2].partition(b"</script>")[0]
            assert base64.b64encode(hashlib.sha256(script).digest()).decode() in policies["/"]
            assert "unsafe" not in policies["/"] and b"http://" not in body.replace(b"http://www.w3.org", b"").replace(b"http://${", b"")
    assert "sandbox" in policies["/view/latest.html"] and "script" not in policies["/view/latest.html?remote=1"]
    assert "*" not in policies["/view/latest.html"] and "img-src data: cid: *" in policies["/view/latest.html?remote=1"]


def talk(relay: Any, *sent: bytes, patience: float = 5.0) -> bytes:
    """Send octets to the HTTP side; return all that comes until it closes or nothing more does."""
    host, port = relay.http_url[7:].split(":")
    heard = b""
    with socket.create_connection((host, int(port)), patience) as client, contextlib.suppress(OSError):
        for data in sent:
            client.sendall(data)
        while data := client.recv(65536):
            heard += data
    return heard


@pytest.mark.parametrize(("request_text", "first"), [
    (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b" 403 "), (b"GET http://[/ HTTP/1.1\r\n\r\n", b" 400 "),
    (b"PATCH /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n\r\n", b" 405 "), (b"BREW /pot HTTP/1.1\r\n\r\n", b" 501 "),
    (b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", b" 413 "),
    (b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b" 411 "),
    (b"POST /api/v1/send HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", b" 411 "),
    (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b" 431 "),
    (b"DELETE /api/v1/messages HTTP/1.1\r\nHost: localhost\r\n", b""),  # cut short: not obeyed
])
def test_odd_requests(start: Callable[..., Any], request_text: bytes, first: bytes) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    mailed(relay)
    host, port = relay.http_url[7:].split(":")
    with socket.create_connection((host, int(port)), 5) as client:
        client.sendall(request_text)
        client.shutdown(socket.SHUT_WR)
        heard = client.makefile("rb").readline()
    assert first in heard and (first or not heard)
    assert ask(relay, "GET", "/api/v1/messages")[1]["total"] == 1


def test_connections_are_kept_and_heads_have_no_body(start: Callable[..., Any]) -> None:  # noqa: F811
    heard = talk(start(SMTP_STORAGE="memory"), b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\n\r\n"
                 b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert heard.count(b"HTTP/1.1 200") == 3 and b"<html" not in heard and heard.endswith(b"OK\n")


def test_continue_is_said_only_to_who_may_go_on(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    head = b"PUT /api/v1/messages HTTP/1.1\r\nHost: %s\r\nContent-Length: 2\r\nExpect: 100-continue\r\nConnection: close\r\n\r\n"
    assert talk(relay, head % b"localhost", b"{}").startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")
    assert talk(relay, head % b"evil.test").startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("trickle", [b"GET / HTTP/1.1\r\nX-", b"PUT /api/v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n"])
def test_deadlines_are_for_the_whole_request(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, trickle: bytes) -> None:  # noqa: F811
    monkeypatch.setattr(smtprelay, "HTTP_TIME", 0.3)
    host, port = start(SMTP_STORAGE="memory").http_url[7:].split(":")
    begun = time.monotonic()
    with socket.create_connection((host, int(port)), 5) as client, contextlib.suppress(OSError):
        client.sendall(trickle)
        client.settimeout(0.02)
        while time.monotonic() < begun + 3:
            client.sendall(b"a")
            with contextlib.suppress(socket.timeout):
                if not client.recv(100):
                    break
    assert time.monotonic() < begun + 2


def test_who_does_not_read_is_cut_off(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(smtprelay, "HTTP_TIME", 0.3)
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, b"Subject: big\r\n\r\n" + b"x" * 70 * 1_000 + b"\r\n" + (b"y" * 76 + b"\r\n") * 100_000)
    host, port = relay.http_url[7:].split(":")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(b"GET /api/v1/message/latest/raw HTTP/1.1\r\nHost: localhost\r\n\r\n")
        room = relay.delivering.web[0].room
        wait_until(lambda: room._value < smtprelay.HTTP_CONNECTIONS)
        wait_until(lambda: room._value == smtprelay.HTTP_CONNECTIONS, 4)


def test_event_streams_are_bounded_and_end(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    for _ in range(smtprelay.EVENT_STREAMS + 2):
        assert fetch(relay, "/api/v1/events", "HEAD")[0] == 200  # leaves none behind
    streams = [http.client.HTTPConnection(relay.http_url[7:], timeout=8) for _ in range(smtprelay.EVENT_STREAMS)]
    for stream in streams:
        stream.request("GET", "/api/v1/events")
    answers = [stream.getresponse() for stream in streams]
    assert {answer.status for answer in answers} == {200} and answers[0].readline() == b": hello\n"
    assert ask(relay, "GET", "/api/v1/events")[0] == 503
    mailed(relay)
    lines = [answers[0].readline() for _ in range(3)]
    assert lines[1] == b"event: received\n" and set(json.loads(lines[2][6:])) == {"type", "id", "seq", "at", "detail"}
    for answer, stream in zip(answers, streams):
        answer.close()
        stream.close()


def test_the_life_of_a_message_as_events(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:  # noqa: F811
    relay = start(**hop(script={"rcpt bob@example.com": ["450 4.2.1 later"]}).settings())
    events = relay.delivering.feed.subscribe(100)
    mailed(relay)
    assert [events.get(timeout=5)["type"] for _ in range(5)] == ["received", "forwarding", "retrying", "forwarding", "forwarded"]


class Hook(http.server.ThreadingHTTPServer):
    """A web server that fails twice before it takes what is POSTed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HookHandler)
        self.refusals, self.got = 2, list[Any]()


class HookHandler(http.server.BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.refusals -= 1
        if self.server.refusals < 0:
            self.server.got.append(body)
        self.send_response(500 if self.server.refusals >= 0 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_the_webhook_is_tried_again(start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(smtprelay, "WEBHOOK_PAUSES", (0.01, 0.01))
    with Hook() as hook:
        threading.Thread(target=hook.serve_forever, args=(0.02,), daemon=True).start()
        relay = start(SMTP_STORAGE="memory", SMTP_WEBHOOK_URL=f"http://127.0.0.1:{hook.server_port}/hook")
        mailed(relay)
        wait_until(lambda: hook.got)
        hook.shutdown()
    assert [(event["type"], len(event["id"])) for event in hook.got] == [("received", 16)]


def test_changes_over_http_are_audited(start: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory", SMTP_AUDIT_LOG=str(tmp_path / "audit"))
    ask(relay, "DELETE", "/api/v1/messages?x=\n".strip())
    ask(relay, "DELETE", "/api/v1/messages", Host="evil.test")
    lines = [json.loads(line) for line in (tmp_path / "audit").read_text().split("\n") if line]
    changes = [(line["event"], line["status"], line["path"]) for line in lines if "method" in line]
    assert changes == [("changed", 200, "/api/v1/messages"), ("change_refused", 403, "/api/v1/messages")]


BAD = [  # (method, path, body, status, words)
    ("PUT", "/api/v1/messages", b"[1]", 400, "expected an object"), ("PUT", "/api/v1/messages", b"{", 400, "expected JSON"),
    ("PUT", "/api/v1/messages", b"[" * 100_000, 400, "expected JSON"), ("DELETE", "/api/v1/messages", b'{"IDs": "x"}', 400, "list of ids"),
    ("GET", "/api/v1/messages?limit=-1", None, 400, "limit"), ("GET", "/api/v1/wait?timeout=x", None, 400, "timeout"),
    ("GET", "/api/v1/wait?timeout=0", None, 408, "no message matched"), ("GET", "/api/v1/message/latest", None, 404, "not found"),
    ("GET", "/view/nope.html", None, 404, "not found"), ("POST", "/api/v1/message/nope/release", b'{"To": ["a@b.test"]}', 404, "not found"),
    ("POST", "/api/v1/send", b"{}", 400, "From.Email"), ("PUT", "/api/v1/tags", b'{"Tags": [1]}', 400, "list of tags"),
    ("POST", "/api/v1/queue/nope/retry", b"", 404, "not found"), ("POST", "/api/v1/users", b'{"name": "a"}', 400, "SMTP_USERS_FILE"),
    ("PUT", "/api/v1/faults", b'{"rules": ["sometimes"]}', 400, "expected a stage"), ("PUT", "/api/v1/faults", b"{}", 400, "list of rules"),
    ("PUT", "/api/v1/chaos", b'{"Sender": {"Probability": 101}}', 400, "Sender"), ("PUT", "/api/v1/chaos", b'{"Sender": 1}', 400, ""),
]


def test_errors_are_shaped_as_mailpits(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    for method, path, body, status, words in BAD:
        got, answer = ask(relay, method, path, body)
        assert (got, list(answer)) == (status, ["Error"]) and words in answer["Error"], (method, path, answer)


def test_waiting_for_a_message_with_its_link_and_code(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    thread = later(mailed, relay, b"From: a@b.test\r\nTo: bob@example.com\r\nSubject: Welcome\r\n\r\nYour code is 123456, or https://x.test/go\r\n")
    status, found = ask(relay, "GET", "/api/v1/wait?query=to:bob+subject:welcome&since=0&timeout=5")
    assert (status, found["Codes"], found["Links"], found["ReturnPath"]) == (200, ["123456"], ["https://x.test/go"], "envelope@example.com")
    assert ask(relay, "GET", f"/api/v1/wait?query=to:bob&since={found['Sequence']}&timeout=0.05")[0] == 408
    thread.join()


def test_scripted_failures_over_http(program: Callable[..., Program]) -> None:  # noqa: F811
    """The receiving process hears of rules that were changed at the other, and so does a later session."""
    relay = program(SMTP_FAULTS="rcpt to=kept@* 452 4.3.1 kept")
    assert ask(relay, "PUT", "/api/v1/chaos", {"Sender": {"ErrorCode": 450, "Probability": 50}})[1]["Sender"] == {"ErrorCode": 450, "Probability": 50}
    assert ask(relay, "GET", "/api/v1/faults")[1] == {"rules": ["rcpt to=kept@* 452 4.3.1 kept", "mail 450 Chaos share 50"]}
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.ehlo()
        codes = []
        for _ in range(4):
            codes.append(client.mail("a@b.test")[0])
            client.rset()
    assert codes == [250, 450, 250, 450]
    assert ask(relay, "PUT", "/api/v1/faults", {"rules": ["rcpt to=*@slow.test 451 4.7.1 slow"]})[0] == 200
    with smtplib.SMTP(relay.host, relay.port) as client:
        client.ehlo()
        client.mail("a@b.test")
        assert [client.rcpt(to)[0] for to in ("x@slow.test", "kept@b.test")] == [451, 250]
    assert ask(relay, "GET", "/api/v1/chaos")[1]["Sender"] == {"ErrorCode": 451, "Probability": 0}


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


def test_mailpits_own_client_works_unchanged(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:  # noqa: F811
    if not shutil.which("node") or not (MODULES / "mailpit-api").is_dir():
        pytest.skip("needs node, and mailpit-api in .ci/node_modules (see .ci/install)")
    next_hop = hop()
    relay = start(SMTP_STORAGE="memory", SMTP_DELIVERY="hold", SMTP_API_TOKEN="a token", **next_hop.settings())
    done = subprocess.run(["node", "--input-type=module", "-e", MAILPIT], cwd=MODULES.parent, capture_output=True, text=True, timeout=30,
                          env={"PATH": os.environ["PATH"], "RELAY": relay.http_url})
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    found, listed = out["found"], out["list"]["messages"][0]
    assert found["ID"] == out["sent"]["ID"] == listed["ID"] and types(listed) == {**SUMMARY_TYPES, "Status": str}
    assert MESSAGE_TYPES.items() <= types(found).items()
    assert (found["From"], found["Tags"], found["Subject"]) == ({"Name": "Ann", "Address": "a@b.test"}, ["one"], "Sent")
    assert [part["FileName"] for part in found["Attachments"] + found["Inline"]] == ["a.txt", "i.png"]
    assert out["search"]["messages_count"] == 1 and out["headers"]["X-Own"] == ["yes"] and "Subject: Sent" in out["source"]
    assert "data:image/png;base64,iVBORw==" in out["html"] and out["text"].strip() == "text"
    assert (out["part"], out["thumb"]) == ("hi", "image/png")
    assert (out["unreads"], out["reads"], out["tags"]) == (1, 1, ["three"])
    assert {out[name] for name in ("unread", "readAll", "tag", "rename", "untag", "release", "deleted", "gone")} == {"ok"}
    assert out["info"]["Messages"] == 2 and out["webui"]["MessageRelay"]["Enabled"] is True
    assert out["chaos"]["Recipient"] == {"ErrorCode": 451, "Probability": 100} and out["calm"]["Recipient"]["Probability"] == 0
    assert "404" in out["error"]
    wait_until(lambda: next_hop.delivered() == {"z@d.test": 1})


def test_mailhogs_addresses(start: Callable[..., Any]) -> None:  # noqa: F811
    relay = start(SMTP_STORAGE="memory")
    mailed(relay, to=("bob@example.com", "carol@example.com"))
    found = ask(relay, "GET", "/api/v2/messages")[1]
    assert found["total"] == 1 and found["items"][0]["Raw"]["To"] == ["bob@example.com", "carol@example.com"]
    assert ask(relay, "DELETE", "/api/v1/messages")[0] == 200 and ask(relay, "GET", "/api/v2/messages")[1]["total"] == 0


def test_held_mail_says_so_and_can_be_released(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:  # noqa: F811
    next_hop = hop()
    relay = start(SMTP_DELIVERY="hold", **next_hop.settings())
    mailed(relay)
    seen = ask(relay, "GET", "/api/v1/message/latest")[1]
    assert [r["status"] for r in seen["Delivery"]["recipients"]] == ["held"] == [seen["Delivery"]["status"]]
    path = f"/api/v1/message/{seen['ID']}"
    assert ask(relay, "POST", path + "/release", {})[0] == 200
    wait_until(lambda: ask(relay, "GET", path)[1]["Status"] == "forwarded")
    after = ask(relay, "GET", path)[1]["Delivery"]
    assert (after["recipients"][0]["status"], after["recipients"][0]["code"]) == ("forwarded", 250) and after["transcript"]
    assert ask(relay, "POST", path + "/release", {"To": ["eve@example.com"]})[0] == 200
    wait_until(lambda: next_hop.delivered() == {"bob@example.com": 1, "eve@example.com": 1})
    wait_until(lambda: smtprelay_depth(relay) == 0)


def smtprelay_depth(relay: Any) -> int:
    return int(json.loads(fetch(relay, "/metrics")[2])["smtp_queue_depth"])


def test_the_queue_is_listed_retried_and_emptied(start: Callable[..., Any], hop: Callable[..., FakeHop]) -> None:  # noqa: F811
    next_hop = hop(script={f"rcpt {name}@example.com": ["450 4.2.1 busy"] for name in ("a", "b", "c", "d")})
    relay = start(**next_hop.settings(SMTP_RETRY_INITIAL_DELAY="1h", SMTP_RETRY_MAX_DELAY="1h"))
    for name in ("a", "b", "c", "d"):
        mailed(relay, to=(name + "@example.com",))
    wait_until(lambda: len([m for m in ask(relay, "GET", "/api/v1/queue")[1]["messages"] if m["status"] == "retrying"]) == 4)
    shown = ask(relay, "GET", "/api/v1/queue?limit=3")[1]
    first, second, third = shown["messages"]
    assert shown["total"] == 4 and (first["attempts"], first["recipients"]) == (1, ["a@example.com"]) and "450" in first["last_error"]
    assert ask(relay, "POST", f"/api/v1/queue/{first['id']}/retry")[1] == {"retried": 1}
    wait_until(lambda: next_hop.delivered()["a@example.com"] == 1)
    assert ask(relay, "DELETE", f"/api/v1/queue/{second['id']}")[0] == 200 and ask(relay, "GET", f"/api/v1/message/{second['id']}")[0] == 404
    assert ask(relay, "POST", "/api/v1/queue/all/retry")[1] == {"retried": 2}
    wait_until(lambda: next_hop.delivered() == {"a@example.com": 1, "c@example.com": 1, "d@example.com": 1})
    wait_until(lambda: ask(relay, "GET", "/api/v1/queue")[1]["total"] == 0)


def test_an_accounts_own_mail_and_figures(start: Callable[..., Any], tmp_path: Path) -> None:  # noqa: F811
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"app": {"password": "a long one", "api_key": "mp_live_app", "quota_daily": 5}, "other": {"password": "b long one"}}))
    users.chmod(0o600)
    relay = start(SMTP_STORAGE="memory", SMTP_USERS_FILE=str(users))
    for name in ("app", "other"):
        with smtplib.SMTP(relay.host, relay.port) as client:
            client.login(name, {"app": "a long one", "other": "b long one"}[name])
            client.sendmail("a@b.test", ["c@d.test"], f"Subject: by {name}\r\n\r\nx\r\n")
    status, own = ask(relay, "GET", "/api/emails", token="mp_live_app", Host="relay.lan")
    assert (status, own["total"], own["emails"][0]["subject"]) == (200, 1, "by app")
    assert ask(relay, "GET", "/api/stats", token="mp_live_app")[1]["left_today"] == 4
    assert ask(relay, "GET", "/api/emails", token="wrong")[0] == ask(relay, "GET", "/api/stats")[0] == 401
    assert ask(relay, "GET", "/api/emails", token="mp_live_app", Sec_Fetch_Site="cross-site")[0] == 403
