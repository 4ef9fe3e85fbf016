"""Bytes to text: which encoding a file proves to be in, told in bounded memory.

Nothing is repaired: no byte becomes a replacement character.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import NoReturn, cast

from sftx.data.blob import MAGICS, Blob
from sftx.errors import DataError, did_you_mean

# Up to this share of bad sequences a file is UTF-8 with an odd bad byte; Chinese in GB18030 has 0.4 and more.
MAX_BAD_SHARE = 0.2
SAMPLE = 20_000
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# A strict decode proves little (GB18030 takes most Big5, Korean and Japanese bytes), so a legacy
# encoding must also yield enough of the letters that any text of its language is full of.
_CHINESE = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿"
    "這個們來時國說對學會過發後麼為與間問題從現進種關樣點還機體無業內開當沒動實長將兩應頭見產話給門東聲員論處義幾條係氣電數報結務場計"
)
_KANA = frozenset(map(chr, range(0x3041, 0x30FF)))
_HANGUL = frozenset("이다는을의에가고지하기로사한를은도서리나어대해인있수들자시아그일니요것정보원장안과만으")
# Encoding, letters, least share of them. Other encodings measure up to 0.06 as GB18030, 0.21 as Big5.
LEGACY = (
    ("gb18030", _CHINESE, 0.15),
    ("big5hkscs", _CHINESE, 0.4),
    ("cp932", _KANA, 0.4),
    ("cp949", _HANGUL, 0.3),
)
_FOREIGN_LETTER = re.compile(r"[^\W\x00-\x7f]")


@dataclass(frozen=True)
class Survey:
    """What one pass over a file's text says."""

    encoding: str
    characters: int
    blank: bool
    """True when it has only line ends."""
    nul: bool
    sample: str
    """The first letters that are not ASCII."""


class BadByteError(Exception):
    """A byte that the encoding does not allow."""

    def __init__(self, encoding: str, offset: int, byte: int, reason: str) -> None:
        self.encoding, self.offset = encoding, offset
        super().__init__(f"byte 0x{byte:02X} at byte offset {offset} is not valid {encoding} ({reason})")


def survey(blob: Blob, encoding: str, *, utf8_only: str | None, names: Iterable[str]) -> Survey:
    """Tell a file's encoding, unless it is given; raises DataError when its bytes do not prove one.

    `utf8_only` names a format that must be UTF-8; `names` are columns by which UTF-16 is recognised.
    """
    head = blob.head(4096)
    for magic, message in MAGICS:
        if head.startswith(magic):
            raise DataError(f"{blob.path}: {message}")
    if encoding != "auto":
        return _strict(blob, _known(blob, encoding))
    for mark, name in BOMS:
        if head.startswith(mark):
            if utf8_only and name != "utf-8-sig":
                raise DataError(
                    f"{blob.path}: {utf8_only} must be UTF-8, this is {name}; save it as UTF-8 or give its encoding"
                )
            return _strict(blob, name)
    wide = None if utf8_only else _utf16_without_bom(head, names)
    if utf8_only or wide:
        return _strict(blob, wide or "utf-8")
    try:
        return _survey(blob, "utf-8")
    except BadByteError as error:
        return _legacy(blob, error)


@contextmanager
def open_text(blob: Blob, encoding: str) -> Iterator[io.TextIOWrapper]:
    """Open the text; line ends are kept: CRLF, CR and LF only, where str.splitlines breaks at U+2028 too."""
    with blob.open() as file:
        text = io.TextIOWrapper(file, _decoder_name(blob, encoding), newline="")
        try:
            yield text
        except UnicodeError as error:
            raise DataError(f"{blob.path}: changed while it was read; run again") from error
        finally:
            text.detach()


@contextmanager
def text_lines(blob: Blob, encoding: str) -> Iterator[Iterator[str]]:
    """Open the lines with their endings."""
    with open_text(blob, encoding) as text:
        yield _unmarked(text)


def _unmarked(lines: Iterator[str]) -> Iterator[str]:
    """Drop byte order marks: a second one, or that of an explicit "utf-8", is never part of the first name."""
    first = next(lines, "").lstrip("\ufeff")
    return chain([first], lines) if first else lines


def line_of(blob: Blob, encoding: str, offset: int) -> int:
    """Return the line (from 1) of a byte."""
    ends, last = 0, ""
    for text in _texts(blob, encoding, "ignore", stop=offset):
        # A CRLF may be split between two chunks.
        ends += text.count("\n") + text.count("\r") - text.count("\r\n") - (last == "\r" and text.startswith("\n"))
        last = text[-1:] or last
    return ends + 1


def _texts(blob: Blob, encoding: str, errors: str = "strict", stop: int | None = None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(_decoder_name(blob, encoding))(errors)
    done = 0
    try:
        for chunk in blob.chunks():
            done += len(chunk)
            if stop is not None and done >= stop:
                yield decoder.decode(chunk[: len(chunk) - (done - stop)], final=True)
                return
            yield decoder.decode(chunk)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        # Codecs that eat a byte order mark, or kept bytes of the chunk before, count from elsewhere: the end is sure.
        offset = done - len(error.object) + error.start
        raise BadByteError(encoding, offset, error.object[error.start], error.reason) from error


def _decoder_name(blob: Blob, encoding: str) -> str:
    """Return the codec to decode with: a file said to be UTF-16 that has no mark is little-endian."""
    name = codecs.lookup(encoding).name
    marks = {"utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}
    return f"{name}-le" if name in marks and not blob.head(4).startswith(marks[name]) else encoding


def _survey(blob: Blob, encoding: str) -> Survey:
    """Decode all of a file; raises BadByteError."""
    characters, blank, nul, started, sample = 0, True, False, False, ""
    for text in _texts(blob, encoding):
        if not started:
            text = text.lstrip("\ufeff")
            started = bool(text)
        characters += len(text)
        blank = blank and not text.strip("\r\n")
        nul = nul or "\0" in text
        if len(sample) < SAMPLE and not text.isascii():
            sample += "".join(m.group() for m in islice(_FOREIGN_LETTER.finditer(text), SAMPLE - len(sample)))
    return Survey(encoding, characters, blank, nul, sample)


def _strict(blob: Blob, encoding: str) -> Survey:
    """Decode all bytes; raises DataError with the line and the byte that the encoding does not allow."""
    try:
        return _survey(blob, encoding)
    except BadByteError as error:
        raise DataError(_bad_byte(blob, error)) from error
    except UnicodeError as error:
        raise DataError(f"{blob.path}: is not valid {encoding}: {error}") from error


def _known(blob: Blob, encoding: str) -> str:
    """Return an encoding that Python knows and can decode piece by piece."""
    try:
        b"a".decode(encoding, "ignore")
        codecs.getincrementaldecoder(encoding)
    except UnicodeError:  # a byte is less than a character of UTF-16: Python knows it
        return encoding
    except (LookupError, ValueError):
        import encodings.aliases

        hint = did_you_mean(encoding, encodings.aliases.aliases)
        raise DataError(f"{blob.path}: `{encoding}` is not a text encoding that Python knows.{hint}") from None
    return encoding


def _utf16_without_bom(head: bytes, names: Iterable[str]) -> str | None:
    """Recognise UTF-16 by a known name in the header, each letter with its NUL."""
    if b"\0" not in head:
        return None
    lowered = head.lower()
    for codec in ("utf-16-le", "utf-16-be"):
        # In the other byte order the same bytes stand at an odd offset; "not found" (-1) is odd too.
        if any(lowered.find(name.encode(codec).lower()) % 2 == 0 for name in names):
            return codec
    return None


def _legacy(blob: Blob, error: BadByteError) -> Survey:
    """Return the first legacy encoding that proves itself for what is not UTF-8; else raise DataError."""
    if _bad_share(blob, "utf-8") <= MAX_BAD_SHARE:
        raise DataError(_bad_byte(blob, error)) from error
    possible: list[str] = []
    for name, letters, share in LEGACY:
        try:
            found = _survey(blob, name)
        except BadByteError as bad:
            if _bad_share(blob, name) <= MAX_BAD_SHARE and _looks_like(_sample(blob, name), letters, share):
                raise DataError(_bad_byte(blob, bad)) from bad
        else:
            if _looks_like(found.sample, letters, share):
                return found
            possible.append(name)
    _undecided(blob, error, possible)


def _undecided(blob: Blob, error: BadByteError, possible: list[str]) -> NoReturn:
    import charset_normalizer  # only an undecided file pays for it

    guess = charset_normalizer.from_bytes(_window(blob, max(error.offset - 4096, 0), 65536)).best()
    likely = dict.fromkeys(possible[:1] + ([guess.encoding] if guess else []))
    hint = f" (it may be {' or '.join(likely)})" if likely else ""
    raise DataError(
        f"{_bad_byte(blob, error)}, or give its encoding{hint}: it cannot be told for sure. "
        "Any bytes are valid Latin-1, so data.encoding=latin-1 (or cp1252) is only ever taken when you say so"
    )


def _window(blob: Blob, start: int, size: int) -> bytes:
    with blob.open() as file:
        left = start
        while left > 0 and (skipped := file.read(min(left, 1 << 20))):
            left -= len(skipped)
        return file.read(size)


def _bad_share(blob: Blob, encoding: str) -> float:
    """Return the share of bad sequences among all that are not ASCII."""
    foreign = bad = 0
    for text in _texts(blob, encoding, "replace"):
        foreign += len(text) - len(text.encode("ascii", "ignore"))
        bad += text.count("\ufffd")
    # A U+FFFD that the file really holds is not a bad sequence.
    bad -= sum(text.count("\ufffd") for text in _texts(blob, encoding, "ignore")) if bad else 0
    return bad / max(foreign, 1)


def _sample(blob: Blob, encoding: str) -> str:
    letters = (m.group() for text in _texts(blob, encoding, "ignore") for m in _FOREIGN_LETTER.finditer(text))
    return "".join(islice(letters, SAMPLE))


def _looks_like(sample: str, letters: frozenset[str], share: float) -> bool:
    return bool(sample) and sum(letter in letters for letter in sample) >= share * len(sample)


def _bad_byte(blob: Blob, error: BadByteError) -> str:
    line = line_of(blob, error.encoding, error.offset)
    return f"{blob.path}:{line}: {cast('str', error.args[0])}; mend that place, or save the whole file as UTF-8"
