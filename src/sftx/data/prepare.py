"""The data of a run, from files to rows: what is read, chosen, held out, mixed and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sftx.build import build
from sftx.config.schema import TrainConfig
from sftx.data.cache import Names, RecordFile, open_rows
from sftx.data.choose import Facts, choose, facts_of, mixed
from sftx.data.corpus import Corpus, LoadedFile
from sftx.data.record_store import RecordView
from sftx.data.split import split
from sftx.data.store import MemoryRows, Rows, rises
from sftx.data.template import ChatTemplate
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

    files: list[LoadedFile]
    train: Rows
    held_out: Rows
    left_out: list[str]
    """Records that are not used, as `file:line: why`."""


def select(config: TrainConfig) -> Selection:
    """Read the corpus and choose its records.

    Errors:
        DataError: it cannot be read exactly, or nothing is left, or nothing can be held out.
    """
    corpus: Corpus = build(config.data)
    keep = not config.remove_unused_columns
    loaded = corpus.load(config.train_file_path, config.train_file_name, key="train_file_name", keep_columns=keep)
    places = np.arange(len(loaded.records))[: config.max_train_rows]
    left_out: list[str] = []
    policy, facts = corpus.choose_policy(), None
    if policy.chooses:
        facts = facts_of(loaded.records[: len(places)])
        choice = choose(facts, loaded.records, policy, config.seed)
        places = choice.kept
        left_out += [f"{loaded.records.origin(i)}: {why}" for i, why in choice.left_out]
    files = [loaded]
    if config.eval_file_name is not None:
        files.append(_held_out_file(corpus, config, loaded, keep))
        held_out = np.arange(len(files[1].records))[: config.eval_max_rows]
    else:
        training, held = split(RecordView(loaded.records, places), config.eval_ratio, config.eval_max_rows)
        places, held_out = training.places, held.places
        if config.eval_ratio > 0 and not len(held_out):
            raise DataError(
                f"{loaded.path}: {len(places)} rows are too few to hold some out: set eval_ratio=0 or eval_file_name."
            )
    return Selection(corpus, files, _mixed(facts, places, corpus, config.seed), held_out, left_out)


def _held_out_file(corpus: Corpus, config: TrainConfig, training: LoadedFile, keep_columns: bool) -> LoadedFile:
    assert config.eval_file_name is not None
    loaded = corpus.load(config.train_file_path, config.eval_file_name, key="eval_file_name", keep_columns=keep_columns)
    if loaded.sha256 == training.sha256:
        raise DataError(f"eval_file_name={config.eval_file_name}: is the training file itself: nothing is held out.")
    return loaded


def _mixed(facts: Facts | None, places: np.ndarray, corpus: Corpus, seed: int) -> np.ndarray:
    return places if facts is None else mixed(facts, places, corpus.choose_policy(), seed)


def tokenise(selection: Selection, config: TrainConfig, template: ChatTemplate) -> Data:
    """Return the rows of a selection; a corpus is tokenised once and kept.

    Errors:
        DataError: no record can be learned from, or none that is held out.
    """
    train, skipped = rows_of(selection.files[0], selection.training, selection.corpus, config, template)
    held_out, more = rows_of(selection.files[-1], selection.held_out, selection.corpus, config, template)
    if not len(train):
        raise DataError(f"{selection.files[0].path}: no row can be learned from. The first: {(skipped or ['none'])[0]}")
    if len(selection.held_out) and not held_out.supervised.any():
        raise DataError("no held-out row can be evaluated.")
    return Data(selection.files, train, held_out, [*selection.left_out, *skipped, *more])


def rows_of(
    loaded: LoadedFile, places: np.ndarray, corpus: Corpus, config: TrainConfig, template: ChatTemplate
) -> tuple[Rows, list[str]]:
    """Return the rows of some records, each record as often as its place is given, and why others have none."""
    if not len(places):
        return MemoryRows([]), []
    records = loaded.records[: config.max_train_rows if places.max() < (config.max_train_rows or 0) else None]
    every = open_rows(
        records,
        [RecordFile(str(f["path"]), str(f["sha256"])) for f in loaded.files],
        template,
        corpus.encode_policy(config.max_seq_length),
        workers=corpus.num_workers,
        selection=loaded.jsonl.parent.name,  # follows from how the files were read
        names=Names(loaded.path.name, config.model_name_or_path, config.template_name or ""),
    )
    chosen = every.of_records(places)
    skipped = [str(s) for s in chosen.skipped]
    if rises(places):
        return chosen, skipped
    return every.select(_repeated(every.records, places)), skipped


def _repeated(records: np.ndarray, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the rows of each place, in order, as often as it stands there."""
    first = np.searchsorted(records, places, side="left")
    last = np.searchsorted(records, places, side="right")
    return np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
