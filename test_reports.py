from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Callable
from datetime import datetime, timezone
from email.message import EmailMessage, Message
from typing import Any

import pytest

import smtprelay

# === REPORTS =================================================================

NOW = datetime(2026, 11, 21, 3, 0, tzinfo=timezone.utc)
HEAD = b"From: ann@example.org\r\nSubject: Hello\r\n\tworld\r\nMessage-ID: <1@example.org>\r\n\r\n"
FULL = HEAD + b"Hi Bob,\r\n..\r\n\r\nbye\r\n"
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
        assert all(TYPED.fullmatch(str(group[name])) for name in FIELDS & set(group.keys()) - PLAIN)
        assert kind != "delivery-status" or str(group).isascii()


PLAIN = {"Action", "Status"}


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
        (message(), FULL),
        (message(ret="HDRS"), FULL),
    ):
        part = list(parse(reported(record, full=full)).iter_parts())[2]
        assert part.get_content_type() == "text/rfc822-headers"
        assert part.get_content().split("\r\n")[1:3] == ["Subject: Hello", " world"]


def test_full_original_is_returned_octet_for_octet() -> None:
    for full in (FULL, HEAD + b"caf\xc3\xa9 \xff\r\n"):
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


EVIL = "a\r\nBcc: all@example.com\r\n\r\n--x\r\n\0\x85\u2028\u202e\udcff=?utf-8?q?=0D=0ABcc:_e?= "


def test_hostile_text_adds_no_field() -> None:
    record = message(
        bob(address=EVIL, reply=EVIL, host=EVIL, orcpt=EVIL),
        bob(address="\xe9" + EVIL, reply=EVIL * 1000, orcpt="utf-8;" + EVIL, code=0),
        reverse_path=EVIL,
        envid=EVIL,
        id=EVIL,
        received_at=EVIL,
        ret="FULL",
    )
    for way_back in (EVIL, "\xe9" + EVIL):
        record.reverse_path = way_back
        raw = smtprelay.build_report(record, EVIL[-40:].encode("utf-8", "replace"), EVIL, NOW)
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
    ("still owed", message(bob(), bob(status=smtprelay.Status.RETRYING)), 0),
    ("held besides", message(bob(), bob(status=smtprelay.Status.HELD)), 1),
    ("told", message(history=[{"status": "failed", "detail": smtprelay.REPORTED}]), 0),
]


@pytest.mark.parametrize("record, count", [row[1:] for row in WANTS], ids=[row[0] for row in WANTS])
def test_wants_report(record: smtprelay.Message, count: int) -> None:
    assert len(smtprelay.wants_report(record)) == count


def test_cap_allows_so_many_an_hour() -> None:
    now = [0.0]
    cap = smtprelay.ReportCap(2, lambda: now[0])
    assert [cap.take(), cap.take(), cap.take()] == [True, True, False]
    now[0] = 3599.0
    assert not cap.take()
    now[0] = 3600.0
    assert [cap.take(), cap.take(), cap.take()] == [True, True, False]
    assert not smtprelay.ReportCap(0).take()


# === GRAMMAR (delivery status parameters) ====================================

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
    assert smtprelay.decode_xtext(value) is None


RET = [("FULL", "FULL"), ("hdrs", "HDRS"), ("", None), ("BODY", None)]
ENVID = [
    ("QQ314159", "QQ314159"),
    ("a+2Bb+41", "a+2BbA"),
    ("x" * 100, "x" * 100),
    ("x" * 101, None),
    ("", None),
    ("+0A", None),
    ("a b", None),
]
NOTIFY = [
    ("NEVER", "NEVER"),
    ("success,Failure", "SUCCESS,FAILURE"),
    ("FAILURE,SUCCESS,DELAY", "FAILURE,SUCCESS,DELAY"),
    ("NEVER,SUCCESS", None),
    ("", None),
    ("FAILURE,", None),
    ("FAILURE," * 4, None),
    ("ALWAYS", None),
    ("FA\u0130LURE", None),
]
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
    ("utf-8;b\xf6b@example.com", None),
    (r"utf-8;\x{D}\x{A}", None),
    (r"utf-8;\x{0D}@example.com", None),
    (r"utf-8;\x{D800}@example.com", None),
    (r"utf-8;\x{110000}@example.com", None),
    (r"utf-8;\x{0000041}@example.com", None),
    ("utf-8;a+2Bb@example.com", None),
    (r"utf-8;a\b@example.com", None),
    ("utf-8;", None),
]
TABLES = (
    [(smtprelay.is_ret, *row) for row in RET]
    + [(smtprelay.is_envid, *row) for row in ENVID]
    + [(smtprelay.is_notify, *row) for row in NOTIFY]
    + [(smtprelay.is_orcpt, *row) for row in ORCPT]
)


@pytest.mark.parametrize("good, value, kept", TABLES)
def test_parameter(good: Callable[[str], bool], value: str, kept: str | None) -> None:
    assert good(value) == (kept is not None)


def test_orcpt_is_raw_utf8_only_after_smtputf8() -> None:
    assert smtprelay.is_orcpt("utf-8;b\xf6b@ex\xe4mple.com", smtputf8=True)
    assert not smtprelay.is_orcpt("utf-8;b\udcc3b@example.com", True)
    assert not smtprelay.is_orcpt("utf-8;" + "\xe9" * 248, True)


UNITEXT = [
    ("bob", "bob", "bob"),
    ("b\xf6b", "b\xf6b", r"b\x{F6}b"),
    ("a+b=c d", r"a\x{2B}b\x{3D}c\x{20}d", r"a\x{2B}b\x{3D}c\x{20}d"),
    ("a\\x{41}", r"a\x{5C}x{41}", r"a\x{5C}x{41}"),
    ("\U0001f4eb\u200c", "\U0001f4eb\\x{200C}", r"\x{1F4EB}\x{200C}"),
]


@pytest.mark.parametrize("text, wide, narrow", UNITEXT)
def test_unitext_there_and_back(text: str, wide: str, narrow: str) -> None:
    special = smtprelay.UNITEXT_SPECIAL
    assert smtprelay.encode_unitext(text, special, utf8=True) == wide
    assert smtprelay.encode_unitext(text, special) == narrow
    assert smtprelay.decode_unitext(wide) == smtprelay.decode_unitext(narrow) == text


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
        assert not smtprelay.is_envid(value)
        assert not smtprelay.is_notify(value)
        assert not smtprelay.is_orcpt("utf-8;" + value)
