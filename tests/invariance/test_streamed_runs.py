"""Runs on a corpus that is streamed: the steps of one that is not, resumed exactly, shared by ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import SMALL, TWO_RANKS, over
from tests.invariance.test_invariance import assert_same_weights, curve

from sftx.errors import ConfigError, DataError
from sftx.run import run
from sftx.training.saving.metrics import read_metrics


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files of 11 and 13 rows; one line of the second is not JSON."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, start, count in (("a", 0, 11), ("b", 11, 13)):
        rows = [
            json.dumps({"category": "c", "human": f"question {i}", "assistant": f"answer {i} " + "word " * (i % 5)})
            for i in range(start, start + count)
        ]
        rows[3:3] = ["{not JSON"] if name == "b" else []
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def streamed(folder: Path, *words: str) -> list[str]:
    usual = [
        f"train_file_path={folder}", "train_file_name='*.jsonl'", "data.streaming=true", "data.on_bad_rows=skip",
        "data.shuffle_window=8", "eval_ratio=0", "max_train_rows=null", "per_device_train_batch_size=2",
        "gradient_accumulation_steps=2", "lora_dropout=0.2", "callback=log_batches",
    ]  # fmt: skip
    return over(usual, *words)


def batches(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "batches.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batching", ["padding_free", "packed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_equals_an_uninterrupted_one(
    make_config, corpus: Path, batching: str, workers: int, one_thread: None
) -> None:
    """Stopped within the first pass and the second: 24 rows are 6 steps, or fewer of packs."""
    shared = streamed(corpus, f"batching={batching}", f"dataloader_num_workers={workers}", "save_strategy=steps")
    straight = make_config(*shared, "save_steps=2", "max_steps=9", output="straight")
    run([straight])
    for stop in ("max_steps=4", "max_steps=7", "max_steps=9"):
        run([make_config(*shared, "save_steps=2", stop, output="resumed")])
    a, b = Path(straight.output_dir), Path(straight.output_dir).parent / "resumed"
    assert curve(a) == curve(b)
    assert len(curve(a)) == 9
    assert_same_weights(a, b)
    assert batches(a) == batches(b)
    told = [(f / "streamed_rows.jsonl").read_text() for f in (a, b)]
    assert told[0] == told[1]
    assert told[0].count("b.jsonl:4: bad JSON") == 1
    last = read_metrics(b / "metrics.jsonl")[-1]
    assert last["data/left_out_rows"] == 1
    assert 1 < last["epoch"] <= 9


def test_a_pass_holds_every_row_and_is_said(make_config, corpus: Path, captured) -> None:
    config = make_config(*streamed(corpus, "max_steps=12", "mode=lora"))
    run([config])
    folder = Path(config.output_dir)
    rows = [row for b in batches(folder) for row in b["rows"]]
    assert len(rows) == 48
    assert sorted(rows[:24]) == sorted(rows[24:]) == sorted(set(rows))
    assert rows[:24] != rows[24:]
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["data"][0]["streamed"] is True
    assert [f["path"] for f in facts["data"][0]["files"]] == [str(corpus / "a.jsonl"), str(corpus / "b.jsonl")]
    assert facts["rows"]["train"] is None
    assert "(streamed)" in (folder / "README.md").read_text()
    assert not list(Path(corpus).glob("**/*.arrow"))


def test_streamed_rows_are_those_of_a_corpus_that_is_read_first(make_config, corpus: Path, captured) -> None:
    tokens = []
    for words in ((), ("data.streaming=false",)):
        run([make_config(*streamed(corpus, "max_steps=6", *words), output=f"run{len(words)}")])
        folder = Path(captured.trial.folder.path)
        tokens.append(
            (sum(b["tokens"] for b in batches(folder)), sorted(r for b in batches(folder) for r in b["rows"]))
        )
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_two_ranks_share_a_stream(make_config, cli, corpus: Path, tmp_path: Path) -> None:
    """Each micro-batch of one process is one rank's, and no other."""
    shared = [w for w in streamed(corpus, "max_steps=5", "mode=lora") if "accumulation" not in w]
    alone = make_config(*shared, "gradient_accumulation_steps=4", output="alone")
    run([alone])
    ranked = over(SMALL, *shared, "parallel=ddp", "gradient_accumulation_steps=2", f"output_dir={tmp_path / 'ddp'}")
    done = cli(*ranked, launcher=TWO_RANKS)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(x) for r in (0, 1) for x in (tmp_path / f"ddp/batches-rank{r}.jsonl").read_text().splitlines()]
    ranks = [b for b in ranks if b["rows"]]
    assert sorted(ranks, key=lambda b: (b["step"], b["micro_batch"])) == batches(Path(alone.output_dir))
    for one, other in zip(curve(Path(alone.output_dir)), curve(tmp_path / "ddp"), strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["max_steps=null"], r"`data.streaming=true` needs max_steps"),
        (["eval_ratio=0.1"], r"cannot hold rows out of what is not read first: set eval_file_name or eval_ratio=0"),
        (["save_strategy=epoch"], r"when a pass ends is not known: set save_strategy=steps"),
        (["data.duplicates=drop_exact", "data.temperature=2"], r"as data.duplicates, data.temperature must"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(make_config, corpus: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*streamed(corpus, *words))


def test_a_row_that_is_not_sound_ends_the_run_when_it_is_met(make_config, corpus: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl:4: bad JSON"):
        run([make_config(*streamed(corpus, "data.on_bad_rows=error"))])


def test_what_is_trained_on_cannot_be_held_out(make_config, corpus: Path) -> None:
    for words in ((), ("data.streaming=false",)):
        with pytest.raises(DataError, match=r"a\.jsonl: to be held out, but it is trained on too"):
            run([make_config(*streamed(corpus, "eval_file_name=a.jsonl", *words))])


def test_a_hub_dataset_is_streamed(make_config, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself streams the files that stand in for the hub's; nothing is kept of them."""
    import datasets

    asked: list[tuple[str, dict]] = []
    load = datasets.load_dataset
    (corpus / "b.jsonl").unlink()

    def load_dataset(name: str, **how: object) -> object:
        asked.append((name, how))
        return load("json", data_files=str(corpus / "a.jsonl"), **how)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    typed = ["train_file_name=owner/name", "max_steps=6", "save_strategy=steps", "save_steps=2"]
    straight, parts = (make_config(*streamed(corpus, *typed), output=name) for name in ("straight", "parts"))
    run([straight])
    for stop in ("max_steps=3", "max_steps=6"):
        run([make_config(*streamed(corpus, *(w for w in typed if "max_steps" not in w), stop), output="parts")])
    a, b = Path(straight.output_dir), Path(parts.output_dir)
    assert batches(a) == batches(b)
    assert sorted(r for x in batches(a)[:6] for r in x["rows"]) == sorted(f"owner/name:{i}" for i in range(1, 12))
    assert set(map(str, asked)) == {str(("owner/name", {"split": "train", "streaming": True}))}
    assert json.loads((a / "manifest.json").read_text())["data"][0]["format"] == "hub"


def test_a_hub_that_falls_silent_is_said(make_config, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, **how: object) -> object:
        yield {"category": "c", "human": "q", "assistant": "a"}
        raise ConnectionError("the line is dead\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError,
        match=r"train_file_name=owner/name: row 2 cannot be had: the line is dead. Run the same command again",
    ):
        run([make_config(*streamed(corpus, "train_file_name=owner/name"))])
