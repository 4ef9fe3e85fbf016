"""The data of a run, from files to rows: what is read, chosen, held out, mixed and tokenised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sftx.build import build
from sftx.config.derive import sequences_per_device
from sftx.config.schema import TrainConfig
from sftx.data.batches.stream_files import StreamedFiles
from sftx.data.batches.streaming import Encoder, StreamedFeed, StreamOrder
from sftx.data.corpus import Corpus, LoadedFile
from sftx.data.encode.template import ChatTemplate
from sftx.data.records.choose import Facts, choose, facts_of, mixed
from sftx.data.records.split import split
from sftx.data.store.cache import Names
from sftx.data.store.record_store import RecordView
from sftx.data.store.rows import MemoryRows, Rows, open_rows, rises
from sftx.errors import DataError


@dataclass(frozen=True)
class Selection:
    """Which records of a corpus are trained on, as often as they stand here, and which are held out."""

    corpus: Corpus
    files: list[LoadedFile]
    """The training corpus, and the file that is held out, if there is one."""
    training: np.ndarray
    held_out: np.ndarray
    left_out: list[str]
    """Records that a policy leaves out, as `file:line: why`."""


@dataclass(frozen=True)
class Data:
    """The rows of a run, and where they came from."""

    files: list[LoadedFile | StreamedFiles]
    train: Rows
    """All of them; of a corpus that is streamed the first ones, to look at."""
    held_out: Rows
    left_out: list[str]
    """Records that are not used, as `file:line: why`."""
    stream: Stream | None = None


@dataclass(frozen=True)
class Stream:
    """A corpus that is tokenised as it is trained on."""

    files: StreamedFiles
    encoder: Encoder
    window: int

    def feed(self, config: TrainConfig, world_size: int) -> StreamedFeed:
        """Return what feeds a trial."""
        order = StreamOrder(
            seed=config.seed,
            window=self.window,
            batching=config.batching,
            max_length=config.max_seq_length,
            sequences_per_step=sequences_per_device(config) * world_size,
        )
        return StreamedFeed(self.files.reader(), self.encoder, order, config.dataloader_num_workers)


def open_data(config: TrainConfig) -> Callable[[ChatTemplate], Data]:
    """Find and read the corpus; return what makes rows of it once the template is known.

    Raises:
        DataError: it cannot be read exactly, or nothing is left, or nothing can be held out.
    """
    corpus: Corpus = build(config.data)
    if corpus.streaming:
        return partial(_streamed, config, corpus)
    selection = select(config, corpus)
    return lambda template: tokenise(selection, config, template)


def _streamed(config: TrainConfig, corpus: Corpus, template: ChatTemplate) -> Data:
    """Look at the first records of a corpus that is streamed, and at the file that is held out."""
    keep = not config.remove_unused_columns
    files = corpus.stream(
        config.train_file_path, config.train_file_name, keep_columns=keep, limit=config.max_train_rows
    )
    policy = corpus.encode_policy(config.max_seq_length)
    stream = Stream(files, partial(template.encode_batch, policy=policy), corpus.shuffle_window)
    encoded = stream.encoder(files.sample())
    rows = [row for found in encoded if not isinstance(found, str) for row in found]
    if not rows:
        raise DataError(f"{files.path}: none of the first {len(encoded)} records can be trained on: {encoded[0]}")
    if config.eval_file_name is None:
        return Data([files], MemoryRows(rows), MemoryRows([]), [], stream)
    held = corpus.load(config.train_file_path, config.eval_file_name, key="eval_file_name", keep_columns=keep)
    for file in held.files:
        if files.holds(Path(str(file["path"])), str(file["sha256"])):
            raise _trained_too(str(file["path"]))
    indices = np.arange(len(held.records))[: config.eval_max_rows]
    held_out, skipped = _held_out_rows(held, indices, corpus, config, template)
    return Data([files, held], MemoryRows(rows), held_out, skipped, stream)


def select(config: TrainConfig, corpus: Corpus) -> Selection:
    """Read the corpus and choose its records.

    Raises:
        DataError: it cannot be read exactly, or nothing is left, or nothing can be held out.
    """
    keep = not config.remove_unused_columns
    loaded = corpus.load(config.train_file_path, config.train_file_name, key="train_file_name", keep_columns=keep)
    held_out = None
    if config.eval_file_name is not None:
        folder, name = config.train_file_path, config.eval_file_name
        held_out = corpus.load(folder, name, key="eval_file_name", keep_columns=keep)
    return select_from(loaded, held_out, corpus, config)


def select_from(loaded: LoadedFile, held_out_file: LoadedFile | None, corpus: Corpus, config: TrainConfig) -> Selection:
    """Choose the records of a corpus that is read, and of what is held out.

    Raises:
        DataError: nothing is left, or nothing can be held out.
    """
    trained = {file["sha256"] for file in loaded.files}
    for file in held_out_file.files if held_out_file is not None else ():
        if file["sha256"] in trained:
            raise _trained_too(str(file["path"]))
    indices = np.arange(len(loaded.records))[: config.max_train_rows]
    left_out: list[str] = []
    policy, facts = corpus.choose_policy(), None
    if policy.chooses:
        facts = facts_of(loaded.records[: len(indices)])
        choice = choose(facts, loaded.records, policy, config.seed)
        indices = choice.kept
        left_out += [f"{loaded.records.origin(i)}: {why}" for i, why in choice.left_out]
    files = [loaded]
    if held_out_file is not None:
        files.append(held_out_file)
        held_out = np.arange(len(held_out_file.records))[: config.eval_max_rows]
    else:
        training, held = split(RecordView(loaded.records, indices), config.eval_ratio, config.eval_max_rows)
        indices, held_out = training.indices, held.indices
        if config.eval_ratio > 0 and not len(held_out):
            raise DataError(
                f"{loaded.path}: too few rows ({len(indices)}) to hold some out: set eval_ratio=0 or eval_file_name."
            )
    return Selection(corpus, files, _mixed(facts, indices, corpus, config.seed), held_out, left_out)


def _trained_too(path: str) -> DataError:
    return DataError(f"{path}: to be held out, but it is trained on too. Name another eval_file_name.")


def _mixed(facts: Facts | None, indices: np.ndarray, corpus: Corpus, seed: int) -> np.ndarray:
    return indices if facts is None else mixed(facts, indices, corpus.choose_policy(), seed)


def tokenise(selection: Selection, config: TrainConfig, template: ChatTemplate) -> Data:
    """Return the rows of a selection; a corpus is tokenised once and kept.

    Raises:
        DataError: no record can be trained on, or none that is held out.
    """
    train, skipped = rows_of(selection.files[0], selection.training, selection.corpus, config, template)
    if not len(train):
        raise DataError(f"{selection.files[0].path}: no row can be trained on. The first: {(skipped or ['none'])[0]}")
    held_out, more = _held_out_rows(selection.files[-1], selection.held_out, selection.corpus, config, template)
    return Data([*selection.files], train, held_out, [*selection.left_out, *skipped, *more])


def _held_out_rows(
    loaded: LoadedFile, indices: np.ndarray, corpus: Corpus, config: TrainConfig, template: ChatTemplate
) -> tuple[Rows, list[str]]:
    held_out, skipped = rows_of(loaded, indices, corpus, config, template)
    if len(indices) and not held_out.supervised.any():
        raise DataError("no held-out row can be evaluated.")
    return held_out, skipped


def rows_of(
    loaded: LoadedFile, indices: np.ndarray, corpus: Corpus, config: TrainConfig, template: ChatTemplate
) -> tuple[Rows, list[str]]:
    """Return the rows of some records, each record as often as its index is given, and why others have none."""
    if not len(indices):
        return MemoryRows([]), []
    records = loaded.records[: config.max_train_rows if indices.max() < (config.max_train_rows or 0) else None]
    every = open_rows(
        loaded.records.key,
        records,
        template,
        corpus.encode_policy(config.max_seq_length),
        workers=corpus.num_workers,
        names=Names(loaded.path.name, config.model_name_or_path, config.template_name or ""),
    )
    chosen = every.of_records(indices)
    skipped = [str(s) for s in chosen.skipped]
    if rises(indices):
        return chosen, skipped
    return every.select(_repeated(every.records, indices)), skipped


def _repeated(records: np.ndarray, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the rows of each index, in order, as often as it stands there."""
    first = np.searchsorted(records, indices, side="left")
    last = np.searchsorted(records, indices, side="right")
    return np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
