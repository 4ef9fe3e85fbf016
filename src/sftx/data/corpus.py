"""Find the corpus, convert it once to records in the cache, and open those."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from sftx.config.bounds import Bounds
from sftx.data.encode.policy import EncodePolicy
from sftx.data.files.sources import Source, fetch, find_file, find_sources
from sftx.data.records.columns import FIELDS, RESERVED
from sftx.data.records.read import FileReader, How, described, suffixes
from sftx.data.records.record import Record, origin_text
from sftx.data.records.schemas import describe_columns
from sftx.data.store.cache import SKIPPED, Names, entry_folder, open_entry
from sftx.data.store.digests import Stamp, known_sha256, stamp
from sftx.errors import DataError
from sftx.files import write_chunks

__all__ = ["Converted", "Corpus", "LoadedFile", "convert", "find_file", "find_sources"]

if TYPE_CHECKING:  # numpy and torch are imported when a corpus is read, not when its settings are checked
    from sftx.data.batches.stream_files import StreamedFiles
    from sftx.data.records.choose import ChoosePolicy
    from sftx.data.store.record_store import RecordStore

READER_VERSION = 11
"""Part of the cache key: raise it when the same file would be read differently."""


@dataclass(frozen=True)
class LoadedFile:
    """A corpus as it was read: its records, and what was detected on the way."""

    path: Path
    """The file, or the folder that holds the files."""
    sha256: str
    files: tuple[dict[str, Any], ...]
    """Of each file: path, source, sha256, rows, format, encoding, delimiter, schema, and what became of its columns."""
    records: RecordStore
    skipped_rows: int = 0

    @property
    def encoding(self) -> str | None:
        """The encoding, or all there are."""
        return self._all("encoding")

    @property
    def delimiter(self) -> str | None:
        """The delimiter, or all there are."""
        return self._all("delimiter")

    @property
    def format(self) -> str | None:
        """The format, or all there are."""
        return self._all("format")

    @property
    def schema(self) -> str | None:
        """The schema, or all there are."""
        return self._all("schema")

    @property
    def how_read(self) -> str:
        """What was detected, as it is logged."""
        return described(self.format, self.encoding, self.delimiter)

    @property
    def columns(self) -> list[str]:
        """What became of the columns, as it is logged; once for files that have the same, with the first one's name."""
        described: dict[str, str] = {}
        for file in self.files:
            described.setdefault(describe_columns(file["columns"]), Path(file["path"]).name)
        return [f"{name}: {text}" if len(described) > 1 else text for text, name in described.items()]

    @property
    def notes(self) -> list[str]:
        """What was left out or chosen while the files were read, to be stated."""
        return [f"{file['path']}: {note}" for file in self.files for note in file["notes"]]

    def _all(self, name: str) -> str | None:
        return ", ".join(dict.fromkeys(str(file[name]) for file in self.files if file[name] is not None)) or None

    def skipped(self) -> Iterator[str]:
        """Yield each reason for which a row was left out, as `file:line: reason`."""
        if self.skipped_rows:
            with (self.records.folder / SKIPPED).open(encoding="utf-8") as file:
                for text in file:
                    file_number, line, number, reason = json.loads(text)
                    yield f"{origin_text(self.files[file_number]['path'], line, number)}: {reason}"

    def facts(self) -> dict[str, object]:
        """Return the manifest's entry for the corpus."""
        made: dict[str, object] = {
            "path": str(self.path),
            "sha256": self.sha256,
            "rows": len(self.records),
            "format": self.format,
            "encoding": self.encoding,
            "delimiter": self.delimiter,
            "schema": self.schema,
            "columns": self.columns,
            "records": str(self.records.path),
        }
        if self.skipped_rows:
            made["skipped_rows"] = self.skipped_rows
        return made | ({"files": list(self.files)} if len(self.files) > 1 else {})


@dataclass(frozen=True)
class Corpus:
    """How a corpus is read; group `data`."""

    format: Literal["auto", "csv", "jsonl", "json", "parquet", "arrow", "xlsx"] = "auto"
    encoding: str = "auto"
    delimiter: str = "auto"
    schema: Literal["auto", "human_assistant", "alpaca", "sharegpt", "messages", "firefly", "prompt_completion"] = (
        "auto"
    )
    columns: dict[str, str | None] = field(default_factory=dict)
    fill_down: list[str] = field(default_factory=list)
    on_bad_rows: Literal["error", "skip"] = "error"
    train_on: Literal["all", "last"] = "all"
    too_long: Literal["truncate_right", "truncate_prompt", "drop", "split", "error"] = "truncate_right"
    system: str | None = None
    category_prefix: dict[str, str] = field(default_factory=dict)
    duplicates: Literal["keep", "drop_exact", "drop_near"] = "keep"
    near_threshold: Annotated[float, Bounds(above=0, at_most=1)] = 0.8
    conflicts: Literal["keep", "keep_first", "drop", "error"] = "keep"
    cap_per_category: Annotated[int | None, Bounds(at_least=1)] = None
    cap_per_source: Annotated[int | None, Bounds(at_least=1)] = None
    category_weights: Annotated[dict[str, float], Bounds(at_least=0)] = field(default_factory=dict)
    source_weights: Annotated[dict[str, float], Bounds(at_least=0)] = field(default_factory=dict)
    temperature: Annotated[float, Bounds(above=0)] = 1.0
    num_workers: Annotated[int | None, Bounds(at_least=0, at_most=1024)] = None
    streaming: bool = False
    shuffle_window: Annotated[int, Bounds(at_least=1)] = 10_000

    def encode_policy(self, max_length: int) -> EncodePolicy:
        """Return how its conversations become rows."""
        prefix = dict(self.category_prefix)
        return EncodePolicy(max_length, self.too_long, self.train_on, self.system, prefix, self.on_bad_rows)

    def choose_policy(self) -> ChoosePolicy:
        """Return which of its records are used, and how often."""
        from sftx.data.records.choose import ChoosePolicy

        return ChoosePolicy(
            self.duplicates,
            self.near_threshold,
            self.conflicts,
            self.cap_per_category,
            self.cap_per_source,
            dict(self.category_weights),
            dict(self.source_weights),
            self.temperature,
        )

    def load(self, folder: str, name: str | Sequence[str], *, key: str, keep_columns: bool) -> LoadedFile:
        """Read what `name` means in `folder` (or its `csv/`), through a copy that is cached by content.

        Raises:
            DataError: no such file, found twice, or a file that cannot be read exactly.
        """
        return self.read(fetch(find_sources(folder, name, key=key), key=key), keep_columns=keep_columns)

    def stream(self, folder: str, name: str | Sequence[str], *, keep_columns: bool, limit: int | None) -> StreamedFiles:
        """Find what `name` means, to be read as it is trained on; `limit` records of it at most.

        Raises:
            DataError: no such file, or found twice.
        """
        from sftx.data.batches.stream_files import StreamedFiles

        sources = find_sources(folder, name, key="train_file_name")
        return StreamedFiles(sources, self._how(), keep_columns, self.on_bad_rows == "skip", limit)

    def _how(self) -> How:
        return How(self.format, self.encoding, self.delimiter, self.schema, dict(self.columns), tuple(self.fill_down))

    def read(self, sources: Sequence[Source], *, keep_columns: bool) -> LoadedFile:
        """Read files in order, through a copy that is cached by their content.

        Raises:
            DataError: a file that cannot be read exactly.
        """
        from sftx.data.store.record_store import RecordStore

        stamps = [stamp(source.path) for source in sources]
        digests = [known_sha256(source.path) for source in sources]
        settings = [*asdict(self._how()).values(), self.on_bad_rows]
        parts = [[digest, *suffixes(source.path)] for digest, source in zip(digests, sources, strict=True)]
        key = hashlib.sha256(json.dumps([READER_VERSION, parts, keep_columns, settings]).encode()).hexdigest()[:32]
        path = sources[0].path if len(sources) == 1 else sources[0].path.parent
        facts = open_entry(key, lambda into: self._convert(into, sources, stamps, keep_columns), Names(path.name))
        files = tuple(
            {"path": str(source.path), "source": source.name, "sha256": digest} | facts_of_file
            for source, digest, facts_of_file in zip(sources, digests, facts["sources"], strict=True)
        )
        paths, names = [str(source.path) for source in sources], [source.name for source in sources]
        records = RecordStore(entry_folder(key), paths, names, facts["categories"])
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return LoadedFile(path, whole, files, records, facts["skipped_rows"])

    def _convert(
        self, into: Path, sources: Sequence[Source], stamps: Sequence[Stamp], keep_columns: bool
    ) -> dict[str, Any]:
        """Fill a folder with the records of files; return what else is to be known of them."""
        from sftx.data.store.record_store import json_line, write_records

        how = self._how()
        files: list[dict[str, Any]] = []
        skipped: set[tuple[int, int, int]] = set()
        """Rows, by file and line: one may be left out for several reasons."""

        def records() -> Iterator[tuple[int, Record]]:
            for number, source in enumerate(sources):

                def skip(line: int, record: int, reason: str, number: int = number) -> None:
                    skipped.add((number, line, record))
                    reasons.write(json_line([number, line, record, reason]))

                on_skip = skip if self.on_bad_rows == "skip" else None
                reader = FileReader(source.path, how, keep_columns=keep_columns, source=source.name, on_skip=on_skip)
                rows = 0
                for record in reader:
                    rows += 1
                    yield number, record
                facts_of_file = {"format": reader.format, "encoding": reader.encoding, "delimiter": reader.delimiter}
                files.append(
                    {"rows": rows}
                    | facts_of_file
                    | {"schema": reader.schema, "columns": reader.used.facts(), "notes": reader.notes}
                )

        with (into / SKIPPED).open("wb") as reasons:
            facts = write_records(into, records())
        for source, before in zip(sources, stamps, strict=True):
            if stamp(source.path) != before:  # its hash may be another content's than what was read
                raise DataError(f"{source.path}: was changed while it was read; run the same command again")
        return facts | {"sources": files, "skipped_rows": len(skipped)}


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    rows: int
    schema: Literal["human_assistant", "messages"]
    loaded: LoadedFile


def convert(files: Sequence[Path], out: Path, corpus: Corpus | None = None, *, keep_columns: bool = True) -> Converted:
    """Write files as one plain JSONL: category, human, assistant when each record is one question, else messages.

    Raises:
        DataError: a file that cannot be read exactly, or a column that has a name of the new form.
        RunFolderError: the result cannot be written.
    """
    from sftx.data.store.record_store import json_line

    if Path(out).resolve() in {Path(file).resolve() for file in files}:
        raise DataError(f"{out}: is one of the files to convert; give another name for the result")
    sources = [s for file in files for s in find_sources(".", str(file), key="")]
    corpus = corpus or Corpus()
    loaded = corpus.read(sources, keep_columns=keep_columns)
    ignored = {name.casefold() for name, column in corpus.columns.items() if column is None and name in FIELDS}
    plain = all(_is_plain(record) for record in loaded.records)
    write_chunks(Path(out), (json_line(_row(record, RESERVED | ignored, plain=plain)) for record in loaded.records))
    return Converted(len(loaded.records), "human_assistant" if plain else "messages", loaded)


def _is_plain(record: Record) -> bool:
    """Return True if a record is no more than one question and its answer."""
    if record.tools or [m.role for m in record.messages] != ["user", "assistant"]:
        return False
    return all(m.weight is m.reasoning is m.name is None and not m.tool_calls for m in record.messages)


def _row(record: Record, reserved: Set[str], *, plain: bool) -> dict[str, object]:
    from sftx.data.store.record_store import message_dict

    made: dict[str, object] = {"category": record.category}
    if plain:
        made |= {"human": record.human, "assistant": record.assistant}
    else:
        made["messages"] = [message_dict(m) for m in record.messages]
        made |= {"tools": list(record.tools)} if record.tools else {}
    made |= {"weight": record.weight} if record.weight != 1.0 else {}
    for name in record.extra:
        if name.casefold() in reserved:
            raise DataError(
                f"{record.origin}: the column `{name}` would be taken for something else in the result; rename it, "
                "or convert without the other columns"
            )
    return made | record.extra
