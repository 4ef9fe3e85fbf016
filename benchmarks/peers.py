"""sftx against other trainers: the same model, rows, seed and settings; one JSON line a run, in peers.jsonl.

    make bench-peers                                    # makes the environments, runs the base case, writes report.md
    make bench-peers ARGS='--cases all --minutes 600'   # goes on with what is missing
    python benchmarks/peers.py --cases base,padded --peers sftx,trl --venv trl=FOLDER

Each trainer runs in a process of its own, in the environment `.cache/benchmarks/venvs/<trainer>`; sftx by `train.py`
in the one that runs this. Rounds alternate: A B C A B C. A case changes one thing of the base case (`--list`). A run
that is in peers.jsonl for this commit is not made again, one that fails is a line with its error, and one for which
there was no time is a line that says so.

Equal work is shown by the tokens, and by a further run of each case and trainer, of kind `check`: 8 rows and a learning
rate of 1e-12. The mean loss of its epoch, weighted by tokens, is that of the untrained model on all its rows, in
whatever order and batches; the loss of the first step would depend on which rows come first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from peer_parts import launch
from peer_parts.cases import CANNOT, CASES, PEERS
from peer_parts.records import KEY, Key, Kind, Records
from work import ROOT, WORK, model_folder

FILE = ROOT / "benchmarks" / "peers.jsonl"
MEASURED = ("src", "conf", "train.py", "benchmarks/work.py", "benchmarks/peer_parts")
"""What a commit must change to be measured again."""


def main(words: Sequence[str] | None = None) -> int:
    asked = _arguments(words)
    if asked.list:
        for case in CASES.values():
            print(json.dumps(case.facts()))
        return 0
    records, commit = Records(asked.file), _commit()
    end = time.monotonic() + 60 * asked.minutes
    for key in _planned(asked, commit):
        if records.has(key) and not asked.again:
            continue
        if time.monotonic() + records.longest(key) > end:
            continue
        row = dict(zip(KEY, key, strict=True)) | _made(key, asked)
        records.add(row)
        print(json.dumps(row), flush=True)
    records.put_off(_planned(asked, commit), f"the {asked.minutes:g} minutes were over")
    return 0


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_names(list(CASES)), default=["base"], help="names, or all; default: base")
    parser.add_argument("--peers", type=_names(list(PEERS)), default=list(PEERS), help="names, or all (default)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=15, help="after these no more runs start")
    parser.add_argument("--run-minutes", type=float, default=30, help="after these a run is stopped")
    parser.add_argument(
        "--venv", action="append", default=[], metavar="PEER=FOLDER", help="an environment that is there"
    )
    parser.add_argument("--again", action="store_true", help="also make the runs that are there")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--list", action="store_true", help="print the cases")
    asked = parser.parse_args(words)
    asked.venvs = {peer: WORK / "venvs" / peer for peer in PEERS}
    for word in asked.venv:
        peer, _, folder = word.partition("=")
        if peer not in PEERS or not folder:
            parser.error(f"--venv {word}: wanted PEER=FOLDER")
        asked.venvs[peer] = Path(folder)
    return asked


def _names(known: list[str]) -> Callable[[str], list[str]]:
    """Return what reads a list of names from the command line."""

    def split(text: str) -> list[str]:
        words = known if text == "all" else text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        return words

    return split


def _planned(asked: argparse.Namespace, commit: str) -> Iterator[Key]:
    """Yield the runs in their order: of each case the rounds, in which trainers alternate, and the check."""
    for case in asked.cases:
        kinds: list[tuple[Kind, int]] = [("timed", number) for number in range(1, asked.rounds + 1)]
        if not CASES[case].prepares:
            kinds.insert(1, ("check", 0))
        for kind, number in kinds:
            for peer in asked.peers:
                yield case, peer, kind, number, commit


def _made(key: Key, asked: argparse.Namespace) -> dict[str, object]:
    """Make a run, and the one before it whose caches it needs."""
    name, peer, kind, _, _ = key
    case = CASES[name].check if kind == "check" else CASES[name]
    python = sys.executable if peer == "sftx" else str(asked.venvs[peer] / "bin" / "python")
    if (peer, name) in CANNOT:
        return {"status": "failed", "error": CANNOT[peer, name]}
    if not Path(python).exists():
        return {"status": "failed", "error": f"no environment: make bench-peers makes venvs/{peer}"}
    launch.make_work(case)
    spec = launch.spec_of(case, peer, model_folder(case.model))
    if case.warm and not launch.made_before(spec):
        launch.run(spec | {"warm": False}, python, seconds=60 * asked.run_minutes)
    return {"batching": spec["batching"]} | launch.run(spec, python, seconds=60 * asked.run_minutes)


def _commit() -> str:
    """Return the last commit that changed what is measured; with `+` when the files are not those of a commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words, "--", *MEASURED], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("+" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    sys.exit(main())
