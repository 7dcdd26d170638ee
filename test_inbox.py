"""Tests of the inbox, its API and its page; they belong into test_smtprelay.py."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import smtprelay
from test_smtprelay import FakeHop, Program, hop, program, start, wait_until  # noqa: F401

ROOT = Path(smtprelay.__file__).resolve().parent
MODULES = ROOT / ".ci" / "node_modules"

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
HOSTILE = f"""<script>top.pwned=1;alert(1);fetch('{EVIL}/s')</script><img src=x onerror="alert(2)">
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
    parts = [f"Content-Type: text/html; charset=utf-8\r\n\r\n{HOSTILE}",
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
    import http.client
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
