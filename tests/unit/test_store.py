"""Rows on disk: what goes in comes out, is found again under its key, and is the same however it was made."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftx import cli
from sftx.data.encode.policy import EncodePolicy
from sftx.data.encode.row import Row
from sftx.data.encode.template import ChatTemplate, template_source
from sftx.data.records.record import Record, pair
from sftx.data.store import cache, token_store, tokenise
from sftx.data.store.cache import Names
from sftx.data.store.rows import MemoryRows, Rows, TokenRows, open_rows
from sftx.data.store.token_store import Block, to_batch, token_key, write_rows
from sftx.errors import ConfigError, DataError, SftxError
from sftx.model.loading.builtin import ensure_builtin

POLICY = EncodePolicy(64)
CORPUS = "0" * 32


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ensure_builtin())


@pytest.fixture
def template(tokenizer: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer, template_source("chatml"), ["<|im_end|>"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTX_CACHE", str(tmp_path / "cache"))


def corpus(count: int, seed: int = 0) -> list[Record]:
    draw = random.Random(seed)
    words = ["你好", "ask", "tell", "细胞", "theory", "<|im_end|>", "12", "SELECT", "name", "é\n\n", "ok"]
    return [
        pair(
            f"category {i // 700}",
            " ".join(draw.choices(words, k=draw.randint(1, 12 if i % 50 else 120))),
            " ".join(draw.choices(words, k=draw.randint(1, 40))),
            "corpus.csv",
            i + 2,
            {},
        )
        for i in range(count)
    ]


def encoded(template: ChatTemplate, records: list[Record], max_length: int = 64) -> tuple[list[Row], list[str]]:
    """Return the rows and the reasons that `encode_batch` alone gives."""
    found = template.encode_batch(records, EncodePolicy(max_length))
    rows = [row for rows in found if not isinstance(rows, str) for row in rows]
    return rows, [f"{r.origin}: {why}" for r, why in zip(records, found, strict=True) if isinstance(why, str)]


def same(a: Row, b: Row) -> bool:
    alike = (a.category, a.origin, a.full_length) == (b.category, b.origin, b.full_length)
    arrays = np.array_equal(a.ids_T, b.ids_T) and np.array_equal(a.weights_T, b.weights_T)
    return alike and arrays and a.ids_T.dtype == b.ids_T.dtype and a.weights_T.dtype == b.weights_T.dtype


def stored(folder: Path, rows: list[Row], batches: int = 1, skipped: list[tuple[int, str]] | None = None) -> TokenRows:
    """Write rows, each of a record of its own, and two further records without rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(rows)), batches)
    blocks = [Block(to_batch([rows[i] for i in part], part.tolist())) for part in parts]
    blocks[0].skipped += skipped or []
    assert write_rows(folder, blocks) == {"rows": len(rows), "tokens": sum(len(row.ids_T) for row in rows)}
    records = [pair(row.category, "q", "a", *_place(row.origin), {}) for row in rows]
    return TokenRows(
        folder, [*records, *(pair("x", "q", "a", f"{name}.csv", n, {}) for name, n in (("b", 7), ("a", 8)))]
    )


def _place(origin: str) -> tuple[str, int]:
    file, _, line = origin.rpartition(":")
    return file, int(line)


# --- the store -------------------------------------------------------------------------------------------------------

WEIGHTS = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.1, 2.5])


@st.composite
def random_rows(draw: st.DrawFn) -> list[Row]:
    rows = []
    for i in range(draw(st.integers(0, 12))):
        weights = draw(st.lists(WEIGHTS, min_size=1, max_size=20))
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=len(weights), max_size=len(weights)))
        file = draw(st.sampled_from(["a.csv", "b.csv"]))
        rows.append(
            Row(
                np.array(ids, dtype=np.int32),
                np.array(weights, dtype=np.float32),
                draw(st.sampled_from(["x", "y", "细胞", ""])),
                f"{file}:{i + 1}",
                len(ids) + draw(st.integers(0, 3)),
            )
        )
    return rows


@given(rows=random_rows(), batches=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_what_goes_in_comes_out(rows: list[Row], batches: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    kept = stored(tmp_path_factory.mktemp("store"), rows, batches)
    memory = MemoryRows(rows)
    assert len(kept) == len(memory) == len(rows)
    assert all(same(a, b) for a, b in zip(kept, rows, strict=True))
    for attribute in ("lengths", "full_lengths", "loss_weights", "supervised", "records", "truncated"):
        mine, theirs = getattr(kept, attribute), getattr(memory, attribute)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype, attribute
    assert [kept.categories[n] for n in kept.category_numbers] == [row.category for row in rows]
    assert kept.loss_weights.tolist() == [row.loss_weight for row in rows]
    assert kept.supervised.tolist() == [row.supervised_tokens for row in rows]
    assert kept.tokens == sum(len(row.ids_T) for row in rows)
    assert len(kept.truncated) == sum(row.truncated for row in rows)


def _rows(count: int) -> list[Row]:
    return [
        Row(np.arange(i + 1, dtype=np.int32), np.full(i + 1, 0.5, np.float32), "xy"[i % 2], f"a.csv:{i + 1}", i + 1)
        for i in range(count)
    ]


def test_rows_can_be_chosen_and_sent_to_another_process(tmp_path: Path) -> None:
    skipped = [(10, "too long"), (11, "empty")]
    kept: Rows = stored(tmp_path, _rows(10), 3, skipped)
    assert same(kept[-1], _rows(10)[9])
    with pytest.raises(IndexError):
        kept[10]
    assert [len(row.ids_T) for row in kept[2:8:2]] == [3, 5, 7]
    chosen = kept.of_records([8, 3, 11])
    assert chosen.records.tolist() == [3, 8]
    assert chosen.lengths.tolist() == [4, 9]
    assert [str(s) for s in chosen.skipped] == ["a.csv:8: empty"]
    assert [str(s) for s in kept.skipped] == ["b.csv:7: too long", "a.csv:8: empty"]
    assert chosen.origin(1) == chosen[1].origin == "a.csv:9"
    for rows in (kept, chosen):
        sent = pickle.loads(pickle.dumps(rows))
        assert all(same(a, b) for a, b in zip(sent, rows, strict=True))
    kept[0].ids_T[0] = 5  # a row is the caller's own
    assert kept[0].ids_T[0] == 0


# --- the key ---------------------------------------------------------------------------------------------------------


def test_whatever_the_tokens_follow_from_is_in_the_key(tokenizer: Any, template: ChatTemplate) -> None:
    other = pickle.loads(pickle.dumps(tokenizer))
    other.add_tokens(["细胞理论"])
    source = template_source("chatml")
    stop = ["<|im_end|>"]
    keys = [
        token_key(CORPUS, 5, template, POLICY),
        token_key("1" * 32, 5, template, POLICY),
        token_key(CORPUS, 4, template, POLICY),
        token_key(CORPUS, 5, ChatTemplate(other, source, stop), POLICY),
        token_key(CORPUS, 5, ChatTemplate(tokenizer, source + " ", stop), POLICY),
        token_key(CORPUS, 5, ChatTemplate(tokenizer, source, ["<|endoftext|>", *stop]), POLICY),
        token_key(CORPUS, 5, template, replace(POLICY, max_length=65)),
        token_key(CORPUS, 5, template, replace(POLICY, too_long="drop")),
        token_key(CORPUS, 5, template, replace(POLICY, train_on="last")),
    ]
    assert len(set(keys)) == len(keys)
    again = ChatTemplate(pickle.loads(pickle.dumps(tokenizer)), source, stop)
    assert token_key(CORPUS, 5, again, POLICY) == keys[0]


def test_the_key_follows_the_version_of_sftx_data(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    before = token_key(CORPUS, 5, template, POLICY)
    monkeypatch.setattr(token_store, "DATA_VERSION", token_store.DATA_VERSION + 1)
    assert token_key(CORPUS, 5, template, POLICY) != before


# --- the cache -------------------------------------------------------------------------------------------------------


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    builds: list[int] = []
    encode = tokenise.encode_blocks

    def counted(*arguments: Any) -> Any:
        builds.append(1)
        return encode(*arguments)

    monkeypatch.setattr(tokenise, "encode_blocks", counted)
    return builds


def test_a_corpus_is_tokenised_once(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    records = corpus(60)
    cold = open_rows(CORPUS, records, template, POLICY)
    warm = open_rows(CORPUS, [replace(r, file="moved.csv") for r in records], template, POLICY)
    assert len(builds) == 1
    expected, reasons = encoded(template, records)
    assert all(same(a, b) for a, b in zip(cold, expected, strict=True))
    assert [str(s) for s in cold.skipped] == reasons
    assert len(reasons) > 0
    assert len(cold.truncated) == sum(row.truncated for row in expected) > 0
    assert warm[0].origin == "moved.csv:" + cold[0].origin.partition(":")[2]


@pytest.mark.parametrize("harm", ["cut", "emptied", "facts", "foreign", "no rows", "footer", "inside"])
def test_a_harmed_cache_is_made_anew(template: ChatTemplate, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    builds = count_builds(monkeypatch)
    records = corpus(30)
    folder = open_rows(CORPUS, records, template, POLICY).folder
    arrow, facts = folder / "rows.arrow", folder / "facts.json"
    match harm:
        case "cut":
            arrow.write_bytes(arrow.read_bytes()[:-9])
        case "emptied":
            arrow.write_bytes(b"")
        case "facts":
            facts.write_text("{", encoding="utf-8")
        case "foreign":
            other = open_rows(CORPUS, records[:-1], template, POLICY).folder
            arrow.write_bytes((other / "rows.arrow").read_bytes())
        case "no rows":
            arrow.unlink()
        case "footer":
            whole = bytearray(arrow.read_bytes())
            whole[-60:-20] = bytes(40)
            arrow.write_bytes(whole)
        case "inside":
            whole = bytearray(arrow.read_bytes())
            whole[len(whole) // 2] ^= 1
            arrow.write_bytes(whole)
    before = len(builds)
    rows = open_rows(CORPUS, records, template, POLICY)
    assert len(builds) == before + 1
    assert all(same(a, b) for a, b in zip(rows, encoded(template, records)[0], strict=True))
    open_rows(CORPUS, records, template, POLICY)
    assert len(builds) == before + 1


def test_nothing_is_kept_when_no_record_can_be_used(template: ChatTemplate) -> None:
    with pytest.raises(DataError, match=r"no row can be trained on. The first of 3: corpus.csv:2: \d+ prompt tokens"):
        open_rows(CORPUS, corpus(3), template, EncodePolicy(2))
    assert cache.entries() == []
    assert [p.name for p in (cache.cache_root() / "corpora").iterdir() if p.is_dir()] == []


BUILDER = """
import os, pickle, sys, time
from pathlib import Path
from sftx.data.store import tokenise
from sftx.data.store.rows import open_rows
from sftx.data.encode.template import ChatTemplate
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
made, records, policy = pickle.loads((folder / "job").read_bytes())
encode = tokenise.encode_blocks
def noted(*arguments):
    with (folder / "builds").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    for block in encode(*arguments):
        yield block
        time.sleep(pause)
tokenise.encode_blocks = noted
template = ChatTemplate(*made)
(folder / f"ready.{os.getpid()}").touch()
while not (folder / "go").exists():
    time.sleep(0.02)
rows = open_rows('key', records, template, policy)
print(len(rows), int(rows.lengths.sum()))
"""


@pytest.fixture
def start_builder(tmp_path: Path, template: ChatTemplate) -> Callable[[float], subprocess.Popen[str]]:
    """Return a function that starts a process that opens `corpus(40)`, and rests after each block."""
    made = template.tokenizer, template.source, template.stop_tokens
    (tmp_path / "job").write_bytes(pickle.dumps((made, corpus(40), POLICY)))

    def start(pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", BUILDER, str(tmp_path), str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    return start


def builds(tmp_path: Path) -> int:
    file = tmp_path / "builds"
    return len(file.read_text().splitlines()) if file.exists() else 0


def wait_for(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


@pytest.mark.parametrize("count", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_of_many_processes_one_builds(tmp_path: Path, start_builder: Any, count: int) -> None:
    started = [start_builder(0.5) for _ in range(count)]
    wait_for(lambda: len(list(tmp_path.glob("ready.*"))) == count, 200)
    (tmp_path / "go").touch()
    said = {process.communicate(timeout=60)[0] for process in started}
    assert [process.returncode for process in started] == [0] * count
    assert builds(tmp_path) == 1
    assert len(said) == 1


def test_a_killed_builder_leaves_nothing_that_matters(
    tmp_path: Path, template: ChatTemplate, start_builder: Any
) -> None:
    (tmp_path / "go").touch()
    victim = start_builder(60)
    folder = tmp_path / "cache" / "corpora"
    wait_for(lambda: builds(tmp_path) and list(folder.glob(".*/rows.arrow")))
    (key,) = cache.keys()
    assert not cache.remove(key), "a store that is being built is left alone"
    victim.kill()
    victim.communicate()
    assert list(folder.glob(".*"))
    records = corpus(40)
    rows = open_rows("key", records, template, POLICY)
    assert rows.folder.name == key
    assert len(rows) == len(encoded(template, records)[0])
    assert not list(folder.glob(".*")), "what the killed process left is gone"
    assert cache.remove(key)
    assert list(folder.iterdir()) == []


# --- many processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "ALONE", 0)
    monkeypatch.setattr(tokenise, "CHUNK", 20)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("counts", [(0, 1, 3), pytest.param((0, None), marks=pytest.mark.slow)])
def test_the_bytes_are_the_same_however_many_processes(
    template: ChatTemplate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int | None, ...]
) -> None:
    records = corpus(300)
    hashes = set()
    for count in counts:
        monkeypatch.setenv("SFTX_CACHE", str(tmp_path / str(count)))
        rows = open_rows(CORPUS, records, template, POLICY, workers=count)
        assert rows.skipped
        files = [(rows.folder / name).read_bytes() for name in ("rows.arrow", "skipped.jsonl", "facts.json")]
        hashes.add(hashlib.sha256(b"".join(files)).hexdigest())
    assert len(hashes) == 1
    expected, reasons = encoded(template, records)
    assert all(same(a, b) for a, b in zip(rows, expected, strict=True))
    assert [str(s) for s in rows.skipped] == reasons


class Records(list[Record]):
    """Records whose reading, in the process that tokenises, does something else at record 50."""

    def __init__(self, records: list[Record], trouble: str) -> None:
        super().__init__(records)
        self.trouble = trouble

    def __getitem__(self, index: Any) -> Any:
        if index == 50:
            if self.trouble == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "hangs":
                Path(os.environ["SFTX_CACHE"], "hangs").touch()
                time.sleep(600)
            raise {"refused": DataError("corpus.csv:52: refused"), "fault": ZeroDivisionError("a fault")}[self.trouble]
        return super().__getitem__(index)


def descendants() -> set[int]:
    import psutil

    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        (
            "killed",
            SftxError,
            "tokenizer worker was killed by signal 9; its results were discarded.*data.num_workers=2, or 0",
        ),
        ("refused", DataError, "corpus.csv:52: refused"),
        pytest.param("fault", ZeroDivisionError, "a fault", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_a_process_is_one_error(
    template: ChatTemplate, trouble: str, kind: type[Exception], said: str
) -> None:
    before = descendants()
    with pytest.raises(kind, match=said) as caught:
        open_rows(CORPUS, Records(corpus(200), trouble), template, POLICY, workers=2)
    assert trouble != "fault" or "__getitem__" in str(caught.value.__cause__), "the place in the other process is told"
    assert descendants() <= before
    folder = cache.cache_root() / "corpora"
    assert [p.name for p in folder.iterdir() if not p.name.endswith(".lock")] == [], "nothing half-written is left"
    assert cache.entries() == []


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupt_ends_all(template: ChatTemplate) -> None:
    before = descendants()
    Path(os.environ["SFTX_CACHE"]).mkdir(parents=True)
    hangs = Path(os.environ["SFTX_CACHE"], "hangs")
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    signal.signal(signal.SIGALRM, lambda *_: hangs.exists() and signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            open_rows(CORPUS, Records(corpus(200), "hangs"), template, POLICY, workers=2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, interrupted)
    assert descendants() <= before
    assert not list((cache.cache_root() / "corpora").glob("*/"))


@pytest.mark.usefixtures("small_chunks")
def test_workers_end_with_a_process_that_is_killed(template: ChatTemplate) -> None:
    import psutil

    cache = Path(os.environ["SFTX_CACHE"])
    cache.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        open_rows(CORPUS, Records(corpus(200), "hangs"), template, POLICY, workers=2)
        os._exit(1)
    wait_for((cache / "hangs").exists)
    workers = psutil.Process(child).children(recursive=True)
    assert len(workers) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_small_corpora_are_tokenised_here() -> None:
    assert tokenise.worker_count(8, 1999) == 0
    assert tokenise.worker_count(8, 2001) == 5
    assert tokenise.worker_count(4, 10**6) == 4
    assert tokenise.worker_count(0, 10**6) == 0
    with pytest.raises(ConfigError, match=r"`data\.num_workers`: expected null or an integer >= 0, got -1"):
        tokenise.worker_count(-1, 5)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_stores(template: ChatTemplate) -> list[str]:
    names = Names("corpus.csv", "qwen-tiny", "chatml")
    return [open_rows(str(n), corpus(n), template, POLICY, names=names).folder.name for n in (30, 20)]


def test_ls_and_rm(two_stores: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "cache", "ls"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["key", "corpus", "model", "/", "template", "rows", "tokens", "size", "age"]
    assert {line.split()[0] for line in said[1:3]} == {key[:12] for key in two_stores}
    assert "corpus.csv" in said[1]
    assert "qwen-tiny / chatml" in said[1]
    assert said[3].startswith("2 corpora, ")
    assert cli.run(["data", "cache", "rm", two_stores[0][:8]]) == 0
    assert [entry.key for entry in cache.entries()] == [two_stores[1]]
    with pytest.raises(DataError, match="no such key"):
        cli.run(["data", "cache", "rm", "zzz"])
    with pytest.raises(DataError, match="--all"):
        cli.run(["data", "cache", "rm"])
    assert cli.run(["data", "cache", "rm", "--all"]) == 0
    capsys.readouterr()
    cli.run(["data", "cache", "ls"])
    assert capsys.readouterr().out == "nothing is kept\n"
    assert list((cache.cache_root() / "corpora").iterdir()) == []


def test_ls_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sftx.cli import run; run(['data', 'cache', 'ls']); "
        "print({'torch', 'numpy', 'pyarrow', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "nothing is kept\nset()\n"
    module = subprocess.run([sys.executable, "-m", "sftx", "data", "cache", "rm", "x"], capture_output=True, text=True)
    assert (module.returncode, module.stderr) == (2, "sftx: x: no such key.\n")


@pytest.mark.slow
def test_a_run_that_has_its_rows_imports_nothing_for_making_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "category,human,assistant\n" + "".join(f"c,q{i},a\n" for i in range(9)), encoding="utf-8"
    )
    code = (
        "import sys\n"
        "from sftx.config.checks.check import freeze\n"
        "from sftx.config.composition.prepare import compose_checked\n"
        "from sftx.data.prepare import open_data\n"
        "from sftx.model.loading.family import family_named, family_of\n"
        "from sftx.model.loading.load import find_model, load_template\n"
        f"words = ['data=csv', 'train_file_path={tmp_path}', 'train_file_name=a.csv', 'data.duplicates=drop_exact']\n"
        "config = freeze(compose_checked(words))\n"
        "source = find_model(config.model_name_or_path)\n"
        "family, _ = family_of(config.model, source.model_type, downloaded=source.downloaded)\n"
        "template = load_template(source, family, None, family_named)\n"
        "assert len(open_data(config)(template).train[0].ids_T)\n"
        "heavy = {'datasets', 'pandas', 'pyarrow.parquet', 'pyarrow.dataset', 'pyarrow.compute'}\n"
        "print((heavy | {'sftx.data.store.tokenise'}) & set(sys.modules))"
    )
    env = {**os.environ, "SFTX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in ("cold", "warm"):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
