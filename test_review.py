"""What a review of the delivering half found: each test failed once."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import smtprelay
from smtprelay import UNREAD, Envelope, Message, Recipient, Scheduler, Settings, Status
from test_smtprelay import MAIL, hello, hop, said, start, wait_until  # noqa: F401

DAY = 86400.0
STEM = "2026-11-21/" + "0" * 16 + "_" + "0" * 16


def settings(**given: str) -> Settings:
    return Settings.read(given)


def spooled(spool: Any, *to: str, flags: tuple[str, ...] = (), id: str = "") -> str:
    """Put a message into a spool behind the relay's back; return its stem."""
    envelope = Envelope("ann@x.test", "127.0.0.1", "x", "ESMTP", "", flags, list(to) or ["bob@hop.test"])
    draft = spool.draft(envelope)
    if id:
        draft = type(draft)(spool, envelope, id)
    draft.write(MAIL)
    return str(draft.commit())


def relaying(start: Any, hop: Any, **more: str) -> Any:
    return start(SMTP_DELIVERY="relay", **hop.settings(**{"SMTP_RELAY_TLS": "none", **more}))


def status(relay: Any, stem: str) -> Status:
    return relay.delivering.spool.load(stem).status  # type: ignore[no-any-return]


def aged_id(age: float) -> str:
    return f"{int((time.time() - age) * 1e6):013x}abc"


def test_what_was_found_and_then_announced_is_sent_once(start: Any, hop: Any) -> None:
    h = hop()
    relay = relaying(start, h)
    d = relay.delivering
    stem = spooled(d.spool)
    d.find()  # as after an overflow of the Link, or another's sendmail
    wait_until(lambda: status(relay, stem) is Status.FORWARDED)
    d.metrics.inc("smtp_queue_depth")  # as the session does
    relay.parts.link.announce(stem)
    last = said(relay)[0]
    wait_until(lambda: status(relay, d.inbox.stem(last)) is Status.FORWARDED)
    assert len(h.messages) == 2
    d.metrics.inc("smtp_queue_depth", -1)


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug")])
def test_a_bug_after_an_attempt_repeats_no_delivery(start: Any, hop: Any, error: Exception, monkeypatch: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying(start, h)
    count = relay.delivering.guard.quotas.count
    bugs = [error]

    def stumbling(*given: Any) -> None:
        if bugs:
            raise bugs.pop()
        count(*given)

    monkeypatch.setattr(relay.delivering.guard.quotas, "count", stumbling)
    with hello(relay) as client:
        client.mail(MAIL, "ann@client.test", "bob@hop.test", "no@hop.test")
    wait_until(lambda: [status(relay, s) for s, _ in relay.delivering.spool.names()] == [Status.FAILED])
    assert h.delivered()["bob@hop.test"] == 1


def test_a_bug_in_a_report_does_not_repeat_the_delivery(start: Any, hop: Any, monkeypatch: Any) -> None:
    h = hop(script={"rcpt no@hop.test": "550 5.1.1 who?"})
    relay = relaying(start, h, SMTP_BOUNCE="1")

    def stumble(*given: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(relay.delivering, "draft_report", stumble)
    with hello(relay) as client:
        client.mail(MAIL, "ann@client.test", "bob@hop.test", "no@hop.test")
    wait_until(lambda: [status(relay, s) for s, _ in relay.delivering.spool.names()] == [Status.FAILED])
    assert h.delivered()["bob@hop.test"] == 1


def test_what_was_released_is_not_too_old(start: Any, hop: Any) -> None:
    h = hop(script={"end": ["450 4.2.0 later"]})
    relay = start(SMTP_DELIVERY="hold", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    stem = spooled(d.spool, flags=("HOLD",), id=aged_id(20 * DAY))
    d.find()
    wait_until(lambda: stem in d.held)
    assert relay.release() == 1
    wait_until(lambda: status(relay, stem) in (Status.FORWARDED, Status.FAILED))
    assert status(relay, stem) is Status.FORWARDED and len(h.refused) == 1


def test_what_was_released_waits_for_a_dead_host(start: Any, hop: Any) -> None:
    h = hop(listen=False)
    relay = start(SMTP_DELIVERY="hold", SMTP_RETRY_INITIAL_DELAY="5s", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    stem = spooled(d.spool, flags=("HOLD",), id=aged_id(20 * DAY))
    d.find()
    wait_until(lambda: stem in d.held)
    relay.release()
    wait_until(lambda: d.metrics.get("smtp_messages_deferred_total") > 0)
    time.sleep(0.05)
    assert d.metrics.get("smtp_delivery_failures_total") < 5  # it does not go round and round
    assert status(relay, stem) is Status.RETRYING


def test_a_message_is_in_one_hand_at_a_time() -> None:
    s = Scheduler(settings(SMTP_RELAY_HOST="h"))
    s.put(STEM, "old")
    task = s.take(0)
    assert task and s.seize(STEM) is None
    s.done(task, 5.0)
    seized = s.seize(STEM)
    assert seized and seized.lane == UNREAD and s.take(0) is None
    s.done(seized, 0.0)
    assert s.take(0) == seized and len(s) == 1


def test_a_copy_released_where_mail_is_held_is_sent_and_counted(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_DELIVERY="hold", SMTP_RELAY_ALLOWED_RECIPIENTS="nobody", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    queue_id = said(relay)[0]
    d.catch_up()
    relay.backstage.release(queue_id, ["carl@hop.test"])
    wait_until(lambda: h.delivered()["carl@hop.test"] == 1)
    wait_until(lambda: d.metrics.get("smtp_queue_depth") == 0)
    assert d.metrics.own("heard") == 0


def test_a_link_that_overflowed_in_hold_mode_leaves_the_depth_alone(start: Any) -> None:
    relay = start()
    d = relay.delivering
    stem = spooled(d.spool, flags=("HOLD",))
    d.metrics.inc("rescan")
    wait_until(lambda: stem in d.held)
    assert d.metrics.get("smtp_queue_depth") == 0
    hours = sum(n for (_, kind), n in d.hours.items() if kind == "received")
    d.find()
    assert sum(n for (_, kind), n in d.hours.items() if kind == "received") == hours
    assert len(d.scheduler) == 0  # what is held is not read again


def test_a_message_is_released_once(start: Any, hop: Any) -> None:
    h = hop()
    relay = start(SMTP_DELIVERY="hold", **h.settings(SMTP_RELAY_TLS="none"))
    d = relay.delivering
    queue_id = said(relay)[0]
    d.catch_up()
    stem = d.inbox.stem(queue_id)
    task = d.scheduler.seize(stem)
    for change in (lambda: relay.backstage.release(queue_id, []), lambda: relay.backstage.delete([queue_id])):
        with pytest.raises(smtprelay.HttpError, match="just now"):
            change()
    d.scheduler.done(task)
    relay.backstage.release(queue_id, [])
    wait_until(lambda: status(relay, stem) is Status.FORWARDED)
    wait_until(lambda: d.metrics.get("owed_bytes") == 0)
    assert len(h.messages) == 1


def test_a_finished_record_counts_more_than_one_left_over(start: Any) -> None:
    relay = start()
    spool = relay.delivering.spool
    stem = spooled(spool)
    message = spool.load(stem)
    spool.save_first(message)
    message.status = Status.FORWARDED
    spool.save(message)
    Path(spool.path(stem + ".json")).write_text(json.dumps({**json.loads(message.to_json()), "status": "held"}))
    assert spool.load(stem).status is Status.FORWARDED


def test_another_writer_of_the_spool_is_left_alone(start: Any) -> None:
    relay = start()
    d = relay.delivering
    wait_until(lambda: not d.spool.tidying)
    other = smtprelay.FileSpool(relay.settings, d.log)  # as sendmail does when the relay is busy
    draft = other.draft(Envelope("", "local", "x", "ESMTP", "", (), ["bob@hop.test"]))
    draft.write(b"x" * 300000)
    d.find()
    draft.commit()
    d.find()
    assert draft.stem in [stem for stem, _ in d.spool.names()]


def test_a_lane_without_mail_is_forgotten_though_it_was_throttled() -> None:
    s = Scheduler(settings(SMTP_RELAY_HOST="h"))
    s.put(STEM, "dead")
    task = s.take(0)
    assert task
    s.throttle("dead", "no answer")
    s.done(task, 0.0)
    s.flush()
    task = s.take(0)
    assert task
    s.done(task)
    assert s.take(0) is None and not s.lanes


def test_accounts_that_change_during_an_attempt_lose_no_message(start: Any, hop: Any, monkeypatch: Any) -> None:
    h = hop(listen=False)
    relay = relaying(start, h)
    d = relay.delivering
    routes, calls = d.delivery.routes, []

    def moving(message: Message) -> dict[str, list[Recipient]]:
        calls.append(1)
        return {"elsewhere": message.pending()} if len(calls) in (2, 3) else routes(message)

    monkeypatch.setattr(d.delivery, "routes", moving)
    said(relay)
    h.listen()
    wait_until(lambda: h.messages)


def test_a_hundred_thousand_names_take_little_memory() -> None:
    tracemalloc.start()
    s = Scheduler(settings(SMTP_RELAY_HOST="h"))
    stems = [f"2026-01-01/{i:016x}_{i:016x}" for i in range(20000)]
    before = tracemalloc.get_traced_memory()[0]
    s.put_all(stems, UNREAD)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert used / len(stems) < 120, used
