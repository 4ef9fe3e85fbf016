"""Bytes to text: which encoding a file proves to be in, found in bounded memory.

Nothing is repaired: no byte becomes a replacement character.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import cast

from sftx.data.files.blob import MAGICS, Blob
from sftx.errors import DataError, did_you_mean

# Up to this share of bad sequences a file is UTF-8 with an odd bad byte; Chinese in GB18030 has 0.4 and more.
MAX_BAD_SHARE = 0.2
SAMPLE = 20_000
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_COMMON_HANZI = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去"
    "法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知全三又关点"
    "正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿"
)
# A strict decode proves little: GB18030 accepts most bytes of Big5, Korean, Japanese and one-byte encodings.
MIN_HANZI = 12
MIN_HANZI_SHARE = 0.8
"""Of all characters that are not ASCII."""
MIN_HIGH_BYTES = 0.95
"""Share of second bytes from 0xA1 up (GB2312): real simplified Chinese has nearly no others."""
MIN_BEYOND_HANGUL = 0.15
"""Share of first bytes from 0xC9 up, where KS X 1001 has no Hangul: Chinese has about 0.4, Korean none."""
MIN_COMMON = 0.25
"""Share of common hanzi: Chinese has 0.4 to 0.6, other text read as GB18030 at most 0.1."""
# What charset-normalizer may propose, as Python spells it; the rest of its list is rare or a subset.
PROPOSABLE = {
    "big5": "big5", "big5hkscs": "big5hkscs", "cp949": "cp949", "euc_kr": "cp949",
    "shift_jis": "cp932", "cp932": "cp932",
    "euc_jp": "euc_jp", "euc_jis_2004": "euc_jp", "gb18030": "gb18030", "gbk": "gb18030", "gb2312": "gb18030",
    "koi8_r": "koi8_r", "cp874": "cp874", "latin_1": "cp1252", **{f"cp125{i}": f"cp125{i}" for i in range(9)},
}  # fmt: skip
_NOT_ASCII = re.compile(r"[^\W\x00-\x7f]")
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype|html|table|\?xml|head|body)\b", re.I)
_PRIVATE_USE = re.compile("[\ue000-\uf8ff\U000f0000-\U0010fffd]")


@dataclass(frozen=True)
class Survey:
    """What one pass over a file's text finds."""

    encoding: str
    characters: int
    blank: bool
    """True when it has only line ends."""
    nul: bool
    sample: str
    """The first characters that are not ASCII."""


class BadByteError(Exception):
    """A byte that the encoding does not allow."""

    def __init__(self, encoding: str, offset: int, byte: int, reason: str) -> None:
        self.encoding, self.offset = encoding, offset
        super().__init__(f"byte 0x{byte:02X} at byte offset {offset} is not valid {encoding} ({reason})")


def survey(blob: Blob, encoding: str, *, utf8_only: str | None, names: Iterable[str]) -> Survey:
    """Find a file's encoding, unless it is given, and decode all of it once.

    `utf8_only` names a format that must be UTF-8; `names` are columns by which UTF-16 and UTF-32 are recognised.

    Raises:
        DataError: the file is no text, or its bytes do not prove an encoding.
    """
    head = blob.head(4096)
    for magic, message in MAGICS:
        if head.startswith(magic):
            raise DataError(f"{blob.path}: {message}")
    if _MARKUP.match(head):
        raise DataError(f"{blob.path}: this is HTML or XML (some programs export it as .xls or .csv); save it as CSV")
    if encoding != "auto":
        return _strict(blob, _known(blob, encoding))
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)) or _wide(head, names, "utf-32-le", "utf-32-be"):
        raise DataError(f"{blob.path}: this is UTF-32; save it as UTF-8, or set data.encoding=utf-32")
    for mark, name in BOMS:
        if head.startswith(mark):
            if utf8_only and name != "utf-8-sig":
                raise DataError(
                    f"{blob.path}: {utf8_only} must be UTF-8, this is {name}; save it as UTF-8 or set data.encoding="
                )
            return _strict(blob, name)
    wide = None if utf8_only else _wide(head, names, "utf-16-le", "utf-16-be")
    if wide:
        return _strict(blob, wide)
    try:
        return _survey(blob, "utf-8")
    except BadByteError as error:
        if not utf8_only:
            return _legacy(blob, error)
        if _bad_share(blob, "utf-8") <= MAX_BAD_SHARE:
            raise DataError(_bad_byte(blob, error)) from error
        raise _undecided(blob, error) from error


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
    """Return the codec to decode with: a file declared as UTF-16 that has no mark is little-endian."""
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
            sample += "".join(m.group() for m in islice(_NOT_ASCII.finditer(text), SAMPLE - len(sample)))
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


def _wide(head: bytes, names: Iterable[str], *codecs_: str) -> str | None:
    """Return the encoding of several bytes a character in which the beginning of a file has a known name."""
    if b"\0" not in head:
        return None
    lowered, names = head.lower(), list(names)
    for codec in codecs_:
        width = 4 if "32" in codec else 2
        # In the other byte order the same bytes stand at another offset; "not found" (-1) is none of ours.
        if any(lowered.find(name.encode(codec).lower()) % width == 0 for name in names):
            return codec
    return None


def _legacy(blob: Blob, error: BadByteError) -> Survey:
    """Return the survey as GB18030 of a file that is not UTF-8, or raise DataError that proposes encodings."""
    if _bad_share(blob, "utf-8") <= MAX_BAD_SHARE:
        raise DataError(_bad_byte(blob, error)) from error
    try:
        found = _survey(blob, "gb18030")
    except BadByteError as bad:
        if _bad_share(blob, "gb18030") <= MAX_BAD_SHARE and _is_chinese(_sample(blob, "gb18030")):
            raise DataError(_bad_byte(blob, bad)) from bad
    else:
        if _is_chinese(found.sample) and not any(map(_PRIVATE_USE.search, _texts(blob, "gb18030"))):
            return found
    raise _undecided(blob, error) from error


def _is_chinese(sample: str) -> bool:
    """Return True if characters decoded as GB18030 can hardly be anything but simplified Chinese."""
    hanzi = [character for character in sample if "\u4e00" <= character <= "\u9fff"]
    if len(hanzi) < max(MIN_HANZI, MIN_HANZI_SHARE * len(sample)):
        return False
    pairs = [character.encode("gb18030") for character in hanzi]
    high = sum(pair[1] >= 0xA1 for pair in pairs)
    beyond_hangul = sum(pair[0] >= 0xC9 for pair in pairs)
    common = sum(character in _COMMON_HANZI for character in hanzi)
    n = len(hanzi)
    return high >= MIN_HIGH_BYTES * n and beyond_hangul >= MIN_BEYOND_HANGUL * n and common >= MIN_COMMON * n


def _undecided(blob: Blob, error: BadByteError) -> DataError:
    """Return a refusal that shows how the first line that is not UTF-8 reads in each likely encoding."""
    start = max(error.offset - 65536, 0)
    raw = _window(blob, start, 131072)
    at = error.offset - start
    begin = max(raw.rfind(b"\n", 0, at), raw.rfind(b"\r", 0, at)) + 1
    line = re.split(rb"[\r\n]", raw[begin:], maxsplit=1)[0]
    readings = {name: text for name in _proposals(raw) if (text := _reading(line, name))}
    place = f"{blob.path}:{line_of(blob, error.encoding, error.offset)}"
    if not readings:
        return DataError(f"{_bad_byte(blob, error)}, or set data.encoding=")
    shown = ", ".join(f"data.encoding={name} reads it as `{text}`" for name, text in list(readings.items())[:4])
    return DataError(
        f"{place}: {error.args[0]}, and nothing proves another encoding. Save the file as UTF-8, or set the encoding "
        f"that reads this line correctly: {shown}"
    )


def _proposals(raw: bytes) -> list[str]:
    """Return encodings that charset-normalizer proposes, and those that are mistaken for them most often."""
    import charset_normalizer  # only an undecided file pays for it

    found = [PROPOSABLE[m.encoding] for m in charset_normalizer.from_bytes(raw) if m.encoding in PROPOSABLE]
    found = list(dict.fromkeys(found))[:2]
    western = not found or any(name[:4] == "cp12" for name in found)
    return list(dict.fromkeys([*(["cp1252"] if western else []), *found, "gb18030"]))


def _reading(line: bytes, encoding: str) -> str | None:
    """Return what stands around a line's first character beyond ASCII, or None if the encoding does not allow it."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(line)  # its last character may be cut
    except UnicodeDecodeError:
        return None
    at = next((i for i, character in enumerate(text) if not character.isascii()), 0)
    if any(unicodedata.category(character) in ("Cc", "Co", "Cn") for character in text if character != "\t"):
        return None
    return text[max(at - 15, 0) : at + 15].strip()


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
    characters = (m.group() for text in _texts(blob, encoding, "ignore") for m in _NOT_ASCII.finditer(text))
    return "".join(islice(characters, SAMPLE))


def _bad_byte(blob: Blob, error: BadByteError) -> str:
    line = line_of(blob, error.encoding, error.offset)
    return f"{blob.path}:{line}: {cast('str', error.args[0])}; fix that place, or save the whole file as UTF-8"
