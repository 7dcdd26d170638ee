"""Tests of what is kept: encryption at rest, and everything that tries to break it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import smtprelay

# === SEALING =================================================================

KEY, OTHER_KEY = bytes(range(32)), bytes(32)
CHUNK, FULL = smtprelay.CHUNK_SIZE, smtprelay.SEALED_CHUNK
ALTERED = "was cut or altered"


def fixed_random(size: int) -> bytes:
    return b"\xaa" * size


def sealer(key: bytes = KEY) -> smtprelay.Sealer:
    return smtprelay.Sealer(key)


def noise(size: int, seed: int = 8) -> bytes:
    return random.Random(seed).getrandbits(8 * size + 8).to_bytes(size + 1, "big")[:size]


def chunks_of(data: bytes) -> list[bytes]:
    """Cut a sealed file into its head and chunks."""
    body = data[smtprelay.HEAD_SIZE:]
    return [data[:smtprelay.HEAD_SIZE]] + [body[at:at + FULL] for at in range(0, len(body), FULL)]


def refusal(data: bytes, name: str = "a.eml", key: bytes = KEY) -> str:
    """Return why `data` cannot be read; fails if it can to the end."""
    with pytest.raises(smtprelay.SealError) as caught:
        sealer(key).unseal(data, name)
    return str(caught.value)


# The GCM specification's test cases 13 to 16, then NIST's gcmEncryptExtIV256: key, nonce, AAD,
# text, cipher text and tag.
_K = "feffe9928665731c6d6a8f9467308308" * 2
_P = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
_C = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
GCM_VECTORS = [
    ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    (
        "00" * 32,
        "00" * 12,
        "",
        "00" * 16,
        "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919",
    ),
    (_K, "cafebabefacedbaddecaf888", "", _P, _C + "b094dac5d93471bdec1a502270e3cc6c"),
    (
        _K,
        "cafebabefacedbaddecaf888",
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        _P[:120],
        _C[:120] + "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
    (
        "b52c505a37d78eda5dd34f20c22540ea1b58963cf8e5bf8ffa85f9f2492505b4",
        "516c33929df5a3284ff463d7",
        "",
        "",
        "bdc1ac884d332457a1d2664f168c76f0",
    ),
    (
        "31bdadd96698c204aa9ce1448ea94ae1fb4a9a0b3c9d773b51bb1822666b8f22",
        "0d18e06c7c725ac9e362e1ce",
        "",
        "2db5168e932556f8089a0622981d017d",
        "fa4362189661d163fcd6a56d8bf0405ad636ac1bbedd5cc3ee727dc2ab4a9489",
    ),
    (
        "92e11dcdaa866f5ce790fd24501f92509aacf4cb8b1339d50c9c1240935dd08b",
        "ac93a1a6145299bde902f21a",
        "1e0889016f67601c8ebea4943bc23ad6",
        "2d71bcfa914e4ac045b2aa60955fad24",
        "8995ae2e6df3dbf96fac7b7137bae67feca5aa77d51d4a0a14d9c51e1da474ab",
    ),
]


@pytest.mark.parametrize(("key", "nonce", "aad", "text", "box"), GCM_VECTORS)
def test_gcm_is_the_standard_one(key: str, nonce: str, aad: str, text: str, box: str) -> None:
    lib = smtprelay.open_libcrypto(smtprelay.libcrypto_names())
    k, n, a, t, b = (bytes.fromhex(value) for value in (key, nonce, aad, text, box))
    assert smtprelay.gcm(lib, k, n, a, t) == b
    assert smtprelay.gcm(lib, k, n, a, b[:-16], b[-16:]) == t
    for bad in (b[:-1] + bytes([b[-1] ^ 1]), bytes([b[0] ^ 1]) + b[1:]):
        assert smtprelay.gcm(lib, k, n, a, bad[:-16], bad[-16:]) is None
    assert smtprelay.gcm(lib, k, n, a + b"!", b[:-16], b[-16:]) is None


HKDF_VECTORS = [  # RFC 5869 A.1 and A.3, the first 32 octets
    (
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    ("", "", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"),
]


@pytest.mark.parametrize(("salt", "info", "derived"), HKDF_VECTORS)
def test_hkdf_is_the_standard_one(salt: str, info: str, derived: str) -> None:
    secret = smtprelay.hkdf(b"\x0b" * 22, bytes.fromhex(salt), bytes.fromhex(info))
    assert secret.hex() == derived


def test_the_format_does_not_change() -> None:
    data = smtprelay.Sealer(KEY, fixed_random).seal(b"hello", "a.eml")
    assert data[:8] == b"\x8fSEALED\x01"
    assert data[16:48] == b"\xaa" * 32
    lib = smtprelay.open_libcrypto(smtprelay.libcrypto_names())
    key = smtprelay.hkdf(KEY, data[16:48], b"smtprelay file")
    assert smtprelay.gcm(lib, key, bytes(11) + b"\1", data[:48] + b"a.eml", data[48:-16], data[-16:]) == b"hello"
    assert hashlib.sha256(data).hexdigest()[:16] == "8d4e2aa732d3a583"


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 200_000])
def test_what_was_sealed_comes_back(size: int) -> None:
    text, cut = noise(size), random.Random(size)
    writer = sealer().writer("a.eml")
    assert writer
    data, at = b"", 0
    while at < size:
        step = cut.choice([1, 76, 4096, CHUNK, 3 * CHUNK])
        data += writer.update(text[at:at + step])
        at += step
    data += writer.update(b"", last=True)
    assert len(data) == 48 + size + 16 * max(1, -(-size // CHUNK))
    assert size < 32 or text[:32] not in data
    reader = sealer().reader(io.BytesIO(data), "a.eml")
    pieces = iter(lambda: reader.read(cut.choice([1, 100, 8192, 100_000])), b"")
    assert b"".join(pieces) == text
    for _ in range(20):
        at = reader.seek(cut.randrange(size + 1))
        assert reader.read(100) == text[at:at + 100] and reader.tell() == min(at + 100, size)
    assert reader.seek(0, os.SEEK_END) == size


def test_the_reader_is_as_good_as_an_open_file(tmp_path: Path) -> None:
    text = b"Subject: tea\r\n\r\n" + b"cup\r\n" * 30_000
    path = tmp_path / "a.eml"
    path.write_bytes(sealer().seal(text, "a.eml"))
    file = path.open("rb")
    with sealer().reader(file, "a.eml") as reader:
        assert reader.readline() == b"Subject: tea\r\n"
        assert b"".join(reader) == text[14:]
    assert file.closed


def test_no_nonce_serves_twice_under_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    gcm, used = smtprelay.gcm, []

    def spy(lib: Any, key: bytes, nonce: bytes, *rest: Any) -> bytes | None:
        used.append((key, nonce))
        return gcm(lib, key, nonce, *rest)

    monkeypatch.setattr(smtprelay, "gcm", spy)
    for _ in range(3):
        sealer().seal(noise(3 * CHUNK), "a.eml")
    assert len(used) == len(set(used)) == 9


def test_every_flipped_bit_of_a_small_file_is_noticed() -> None:
    data = sealer().seal(b"hello", "a.eml")
    for bit in range(8 * 8, 8 * len(data)):  # one in the magic makes it a plain file, and no message
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        assert ("another key" if bit < 16 * 8 else ALTERED) in refusal(bytes(bad))


@pytest.mark.parametrize("size", [0, 5, 3 * CHUNK, 2 * CHUNK + 9])
def test_a_cut_is_noticed_on_opening(size: int) -> None:
    data = sealer().seal(noise(size), "a.eml")
    edges = {48 + n * FULL + d for n in range(4) for d in (-1, 0, 1, 15, 16, 17)}
    for cut in {*range(1, 60), len(data) - 1, len(data) - 16, *edges}:
        if cut < len(data):
            with pytest.raises(smtprelay.SealError, match=ALTERED):
                sealer().reader(io.BytesIO(data[:cut]), "a.eml")


def test_chunks_keep_their_order_and_number() -> None:
    text = noise(3 * CHUNK + 9)
    head, a, b, c, d = chunks_of(sealer().seal(text, "a.eml"))
    other = chunks_of(sealer().seal(text, "a.eml"))
    for wrong in (
        [b, a, c, d], [a, a, b, c, d], [a, c, d], [a, b, d], [d], [a, b, c], [a, b, c, d, d],
        [a, b, c, d, b"x"], [a, b, c, d, head, a, b, c, d],
        [a, other[2], c, d],  # from another sealing of the same text
    ):
        assert ALTERED in refusal(b"".join([head, *wrong]))
    assert ALTERED in refusal(b"".join([other[0], a, b, c, d]))
    assert sealer().unseal(b"".join([head, a, b, c, d]), "a.eml") == text


def test_files_and_sidecars_cannot_be_exchanged() -> None:
    one = sealer().seal(b"one", "1.eml")
    for name in ("2.eml", "1.json", "bad\udcff.eml"):
        assert f"{name} {ALTERED}, or is not the file of this name" in refusal(one, name)


def test_nothing_follows_an_error() -> None:
    parts = chunks_of(sealer().seal(noise(3 * CHUNK), "a.eml"))
    parts[2] = parts[2][:9] + bytes([parts[2][9] ^ 1]) + parts[2][10:]
    reader = sealer().reader(io.BytesIO(b"".join(parts)), "a.eml")
    assert reader.read(CHUNK) == noise(3 * CHUNK)[:CHUNK]
    for _ in range(2):
        with pytest.raises(smtprelay.SealError):
            reader.read(1)


def test_a_wrong_key_is_told_from_damage() -> None:
    data = sealer().seal(b"hello", "a.eml")
    assert "another key than SMTP_SPOOL_KEY" in refusal(data, key=OTHER_KEY)
    assert "SMTP_SPOOL_KEY is not set" in refusal(data, key=b"")


def test_a_plain_file_stays_readable() -> None:
    for text in (b"", b"X-Envelope-From: <>\r\n\r\n" + noise(CHUNK), b"{}", b"\x8f?"):
        for key in (KEY, b""):
            assert sealer(key).unseal(text, "a.eml") == text
    assert sealer(b"").seal(b"hello", "a.eml") == b"hello"
    assert sealer(b"").seal_text("secret", "app") == "secret"


def test_a_secret_is_one_line_of_ascii() -> None:
    line = sealer().seal_text("pass wörd", "app/relay_password")
    assert line.startswith("sealed:") and line.isascii() and line.isprintable() and " " not in line
    assert sealer().unseal_text(line, "app/relay_password") == "pass wörd"
    assert sealer().unseal_text("plain", "app/relay_password") == "plain"
    with pytest.raises(smtprelay.SealError, match=ALTERED):
        sealer().unseal_text(line, "other/relay_password")
    for bad in ("", "?", "é", "aGVsbG8=", line[7:-1], line[7:20], line[7:30] + "?" + line[30:]):
        with pytest.raises(smtprelay.SealError):
            sealer().unseal_text("sealed:" + bad, "app/relay_password")


def settings(folder: Path, **more: str) -> smtprelay.Settings:
    return smtprelay.Settings.read({"SMTP_SPOOL": str(folder / "spool"), **more})


def spool_of(folder: Path, **more: str) -> smtprelay.FileSpool:
    s = settings(folder, **more)
    spool = smtprelay.FileSpool(s, smtprelay.open_log(s))
    spool.open()
    return spool


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def keep(spool: smtprelay.FileSpool, content: bytes, block: int = 100_000) -> str:
    """Put a message into a spool; return its stem."""
    draft = spool.draft(smtprelay.Envelope("a@example.com", "127.0.0.1", "me", recipients=["b@example.com"]))
    for at in range(0, len(content), block):
        draft.write(content[at:at + block])
    return draft.commit()


@pytest.mark.parametrize("size", [0, 100, 10 * 1024 * 1024])
def test_a_sealed_spool_shows_nothing_and_loses_nothing(tmp_path: Path, size: int) -> None:
    content = b"Subject: secret words\r\n\r\n" + noise(size)
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())
    stem = keep(spool, content)
    message = spool.load(stem)
    assert message.size == len(content)
    message.last_error = "secret reply"
    spool.save(message)
    spool.close()
    for name, data in listing(tmp_path / "spool").items():
        assert b"secret" not in data and b"example.com" not in data, name
    again = spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())
    assert again.load(stem).last_error == "secret reply"
    with again.content(stem) as file:
        assert file.read().endswith(b"0000\r\n" + content)
    again.remove(stem)
    again.close()


@pytest.mark.parametrize("key", ["", KEY.hex()])
@pytest.mark.parametrize("size", [100, 600_000])
def test_a_message_cut_anywhere_is_not_taken_for_one(tmp_path: Path, key: str, size: int) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=key, SMTP_FSYNC="0")
    stem = keep(spool, b"x" * size)
    path = tmp_path / "spool" / f"{stem}.eml"
    data = path.read_bytes()
    for cut in [0, 1, 7, 60, 300, size // 2, 48 + FULL, len(data) - 1, *random.Random(1).sample(range(len(data)), 20)]:
        path.write_bytes(data[:min(cut, len(data) - 1)])
        with pytest.raises(smtprelay.SpoolError):
            spool.load(stem)
    path.write_bytes(data)
    assert spool.load(stem).size == size
    spool.close()


def test_a_torn_sealed_record_is_rebuilt(tmp_path: Path) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())
    message = spool.load(keep(spool, b"x"))
    message.attempts = 3
    spool.save(message)
    path = tmp_path / "spool" / f"{message.stem}.json"
    data = path.read_bytes()
    for bad, attempts in ((data, 3), (b"", 0), (data[:-1], 0), (data[:10], 0), (message.to_json(), 3)):
        path.write_bytes(bad)
        assert spool.load(message.stem).attempts == attempts
    spool.close()


@pytest.mark.parametrize(("key", "words"), [
    (OTHER_KEY.hex(), "sealed with another key"), ("", "SMTP_SPOOL_KEY is not set"), ("ab", "64 hexadecimal digits")])
def test_a_wrong_key_stops_the_program_and_touches_nothing(tmp_path: Path, key: str, words: str) -> None:
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())
    keep(spool, b"x")
    spool.close()
    assert os.stat(tmp_path / "spool/key.check").st_mode & 0o777 == 0o600
    before = listing(tmp_path)
    env = {"SMTP_SPOOL": str(tmp_path / "spool"), "SMTP_SPOOL_KEY": key, "SMTP_PORT": "127.0.0.1:0", "SMTP_HEALTH_ADDR": "off"}
    ran = subprocess.run([sys.executable, smtprelay.__file__], env={**os.environ, **env}, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 78
    assert "SMTP_SPOOL_KEY" in ran.stderr and words in ran.stderr and (not key or key not in ran.stderr)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("mark", [b"", b"?", b"\x8fSEAL", b"key.chec"])
def test_a_damaged_mark_is_an_error(tmp_path: Path, mark: bytes) -> None:
    spool_of(tmp_path).close()
    (tmp_path / "spool/key.check").write_bytes(mark)
    with pytest.raises(smtprelay.SettingsError, match=r"key\.check was (cut or )?altered"):
        spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())


def test_a_key_can_come_from_a_file_and_later(tmp_path: Path) -> None:
    spool = spool_of(tmp_path)
    old = keep(spool, b"plain")
    spool.close()
    (tmp_path / "key").write_text(KEY.hex() + "\n")
    spool = spool_of(tmp_path, SMTP_SPOOL_KEY_FILE=str(tmp_path / "key"))
    assert spool.load(old).size == 5
    assert (tmp_path / "spool" / f"{keep(spool, b'x')}.eml").read_bytes().startswith(smtprelay.MAGIC)
    spool.close()


def test_ssl_brings_its_own_libcrypto() -> None:
    import ssl

    lib = smtprelay.open_libcrypto(smtprelay.libcrypto_names()[:1])
    assert lib.OpenSSL_version_num() == ssl.OPENSSL_VERSION_NUMBER


def test_no_libcrypto_is_a_start_up_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smtprelay, "libcrypto_names", lambda: ["/nonexistent/libcrypto.so.3", "libc.so.6"])
    with pytest.raises(smtprelay.SettingsError, match="SMTP_SPOOL_KEY=.a secret.: expected .*libcrypto"):
        spool_of(tmp_path, SMTP_SPOOL_KEY=KEY.hex())


def test_ctypes_is_loaded_for_a_key_only() -> None:
    code = ("import sys, smtprelay\n"
            "smtprelay.Sealer().seal(b'', '')\n"
            "assert 'ctypes' not in sys.modules\n"
            "smtprelay.Sealer(bytes(32))\n"
            "assert 'ctypes' in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], cwd=Path(smtprelay.__file__).parent, check=True, timeout=30)


def test_one_sealer_serves_many_threads() -> None:
    shared, wrong = sealer(), []

    def work(number: int) -> None:
        for turn in range(20):
            text, name = noise(50_000 + turn, number), f"{number}.eml"
            if shared.unseal(shared.seal(text, name), name) != text:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_10_mib_stream_in_little_memory(tmp_path: Path) -> None:
    path, block, blocks = tmp_path / "a.eml", noise(CHUNK), 160
    writer = sealer().writer("a.eml")
    assert writer
    tracemalloc.start()
    with path.open("wb") as file:
        for _ in range(blocks):
            file.write(writer.update(block))
        file.write(writer.update(b"", last=True))
    with sealer().reader(path.open("rb"), "a.eml") as reader:
        while reader.read(CHUNK):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size == 48 + blocks * FULL
    assert peak < 1 << 20
