"""Writes report.md from the JSON lines of peers.py: `python benchmarks/report.py`."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from peer_parts.cases import BASE, CASES, FASTEST, PACKAGES, PEERS, RANK, Case
from peer_parts.records import Row, latest

FOLDER = Path(__file__).resolve().parent
SAME_TOKENS, SAME_LOSS = 0.02, 1e-3
OURS, OTHERS = PEERS[0], PEERS[1:]
RATE = "rate_tokens_cpu"
FACTORS = {
    "base": "Base case",
    "batching": "Batching",
    "threads": "Threads",
    "mode": "What is trained",
    "checkpointing": "Checkpointing",
    "accumulation": "Accumulation",
    "model": "Model",
}
HEAD = """# sftx and other trainers

Made by `python benchmarks/report.py` from `peers.jsonl`, which `benchmarks/peers.py` writes; its docstring says how.

    make bench-peers                                    # the base case
    make bench-peers ARGS='--cases all --minutes 600'   # all cases

The base case: {base}.
Same rows, seed, optimizer (AdamW, constant rate {rate:g}, gradients clipped at 1; litgpt clips none), fp32, CPU. Each
trainer's fastest exact batching in it: {fastest}.

Rates are real tokens (no padding) by CPU-second of the process over the whole training loop, in which all trainers
learn from the same rows; `later` leaves out the first step, and so depends on which rows came first. A ratio is sftx's
rate by the trainer's: above 1, sftx is faster. Figures are medians over rounds, ratios the median of those of each
round. `work`: how the tokens differ from sftx's, and the loss of the untrained model.
"""


class Report:
    """The rows of record, and what is said of them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = latest(rows)

    def done(self, case: str, peer: str, kind: str = "timed") -> dict[int, Row]:
        """Return by their round the runs that came to their end."""
        return {
            row["round"]: row
            for row in self.rows
            if (row["case"], row["peer"], row["kind"], row["status"]) == (case, peer, kind, "done")
        }

    def median(self, case: str, peer: str, name: str, kind: str = "timed") -> float | None:
        """Return the median of a figure."""
        values = [row[name] for row in self.done(case, peer, kind).values() if row.get(name) is not None]
        return statistics.median(values) if values else None

    def ratio(self, ours: str, case: str, peer: str, name: str) -> float | None:
        """Return the median of sftx's figure in case `ours` by a trainer's in `case`, of rounds that both have."""
        mine, theirs = self.done(ours, OURS), self.done(case, peer)
        both = [(mine[number].get(name), theirs[number].get(name)) for number in mine.keys() & theirs.keys()]
        ratios = [a / b for a, b in both if a and b]
        return statistics.median(ratios) if ratios else None

    def trouble(self, case: str, peer: str) -> str:
        """Return why a trainer has no figures in a case."""
        failed = [row for row in self.rows if (row["case"], row["peer"], row["status"]) == (case, peer, "failed")]
        return f"failed: {failed[-1]['error']}" if failed else "not run"

    def missing(self, case: str) -> list[str]:
        """Return the others that have not been run in a case, be it that they failed."""
        there = {row["peer"] for row in self.rows if row["case"] == case and row["status"] != "not run"}
        return [peer for peer in OTHERS if peer not in there]

    def text(self) -> str:
        """Return the whole report."""
        fastest = ", ".join(f"{peer} {batching.replace('_', ' ')}" for peer, batching in FASTEST.items())
        parts = [HEAD.format(base=_described(BASE), rate=BASE.rate, fastest=fastest), self._machine(), self._required()]
        for factor, title in FACTORS.items():
            cases = [case for case in CASES.values() if case.factor == factor]
            parts.append(self._training(title, cases))
        parts += [self._start(), self._data()]
        return "\n".join(parts)

    def _machine(self) -> str:
        done = [row for row in self.rows if row["status"] == "done"]
        machines = sorted({row["machine"] for row in done if "machine" in row})
        loads = [row["load"] for row in done]
        versions: dict[str, set[str]] = {}
        for row in done:
            package = PACKAGES.get(row["peer"])
            names = {f"{name} {version}" for name, version in row["versions"].items() if version and name != package}
            own = row["versions"].get(package) if package else row["commit"]
            versions.setdefault(f"{row['peer']} ({', '.join(sorted(names))})", set()).add(str(own))
        lines = [f"Machine: {'; '.join(machines) or 'not known'}.", ""]
        lines[0] += f" Load when a run began: {min(loads)} to {max(loads)}." if loads else ""
        lines += [f"- {peer}: {', '.join(sorted(own))}" for peer, own in sorted(versions.items())]
        return "\n".join([*lines, ""])

    # --- what is required --------------------------------------------------------------------------------------------

    def _required(self) -> str:
        start = "start-warm" if self.done("start-warm", OURS) else "base"
        rows = [
            self._faster("TRL, packed", 2.4, [("base", "trl")]),
            self._faster("TRL, padded", 5.5, [("padded", "trl")]),
            self._faster("the best of the others, in any batching", 1.9, _any_batching()),
            self._faster("the same, micro-batches of 2 (steps of 8) for them", None, _pairs(("accumulation-4",))),
            self._least("peak memory, MB", "peak_rss_mb", may_equal=True),
            self._least("CPU-seconds from process start to the loop", "start_cpu_s", may_equal=False, case=start),
            self._same("tokens", "tokens", "timed", SAME_TOKENS, relative=True),
            self._same("loss of the untrained model", "loss_mean", "check", SAME_LOSS, relative=False),
        ]
        return "## Required, in the base case\n\n" + _table(("what", "goal", "found", "verdict"), rows)

    def _faster(self, name: str, goal: float | None, against: Sequence[tuple[str, str]]) -> tuple[str, ...]:
        """Return the row of a ratio of rates: the least of those to several settings."""
        what, wanted = f"tokens/CPU-s against {name}", f">= {goal}" if goal else "none"
        found = {(case, peer): self.ratio("base", case, peer, RATE) for case, peer in against}
        known = {pair: ratio for pair, ratio in found.items() if ratio is not None}
        if not known:
            return what, wanted, "not run", "-"
        (case, peer), least = min(known.items(), key=lambda one: one[1])
        said = f"{least:.2f} ({peer}, {case})"
        return what, wanted, said, self._verdict(least >= goal, against) if goal else "-"

    def _least(self, name: str, figure: str, *, may_equal: bool, case: str = "base") -> tuple[str, ...]:
        mine = self.median(case, OURS, figure)
        theirs = {peer: self.median(case, peer, figure) for peer in OTHERS}
        known = {peer: value for peer, value in theirs.items() if value is not None}
        goal = "at most the least of the others" if may_equal else "below every other"
        if mine is None or not known:
            return name, goal, "not run", "-"
        peer, least = min(known.items(), key=lambda one: one[1])
        good = mine <= least if may_equal else mine < least
        digits = 0 if least >= 100 else 1
        said = f"{mine:,.{digits}f}; {peer} {least:,.{digits}f}" + (f" ({case})" if case != "base" else "")
        return name, goal, said, self._verdict(good, _pairs([case]))

    def _same(self, name: str, figure: str, kind: str, within: float, *, relative: bool) -> tuple[str, ...]:
        differences = {peer: self._difference("base", peer, figure, kind, relative) for peer in OTHERS}
        known = {peer: value for peer, value in differences.items() if value is not None}
        goal = f"within {within:.0%}" if relative else f"within {within:g}"
        if not known:
            return name, goal, "not run", "-"
        peer, most = max(known.items(), key=lambda one: abs(one[1]))
        said = f"{most:+.1%}" if relative else f"{most:+.1g}"
        return (
            f"{name}, of {len(known)} others",
            goal,
            f"{said} ({peer})",
            self._verdict(abs(most) <= within, _pairs(["base"])),
        )

    def _verdict(self, good: bool, against: Iterable[tuple[str, str]]) -> str:
        """Say whether a goal is met; a missing run can still spoil it."""
        if not good:
            return "**fail**"
        missing = [f"{peer} ({case})" for case, peer in against if peer in self.missing(case)]
        return f"not known without {', '.join(missing)}" if missing else "pass"

    def _difference(self, case: str, peer: str, figure: str, kind: str, relative: bool) -> float | None:
        mine, theirs = self.median(case, OURS, figure, kind), self.median(case, peer, figure, kind)
        if mine is None or theirs is None:
            return None
        return theirs / mine - 1 if relative else theirs - mine

    # --- tables ------------------------------------------------------------------------------------------------------

    def _training(self, title: str, cases: Sequence[Case]) -> str:
        rows: list[tuple[str, ...]] = []
        for case in cases:
            if not any(row["case"] == case.name and row["status"] != "not run" for row in self.rows):
                rows.append((_name(case), "all", "", "", "", "", "", "", "not run"))
                continue
            rows += [self._training_row(case, peer) for peer in PEERS]
        head = ("case", "trainer", "tokens/CPU-s", "ratio", "later", "tokens/s", "ratio", "peak MB", "work")
        return f"## {title}\n\n" + _table(head, rows)

    def _training_row(self, case: Case, peer: str) -> tuple[str, ...]:
        name = _name(case) if peer == OURS else ""
        runs = self.done(case.name, peer)
        if not runs:
            return name, peer, "", "", "", "", "", "", self.trouble(case.name, peer)
        figures = [RATE, "later_tokens_cpu", "rate_tokens_wall", "peak_rss_mb"]
        cpu, later, wall, peak = (_number(self.median(case.name, peer, figure)) for figure in figures)
        ratios = [_times(self.ratio(case.name, case.name, peer, figure)) for figure in (RATE, "rate_tokens_wall")]
        if peer == OURS:
            ratios = ["", ""]
        return name, peer, cpu, ratios[0], later, wall, ratios[1], peak, self._work(case.name, peer)

    def _work(self, case: str, peer: str) -> str:
        """Say by how much a trainer's work differs from sftx's."""
        if peer == OURS:
            tokens, loss = self.median(case, OURS, "tokens"), self.median(case, OURS, "loss_mean", "check")
            return f"{_number(tokens)} tokens, loss {loss:.4f}" if loss is not None else f"{_number(tokens)} tokens"
        tokens = self._difference(case, peer, "tokens", "timed", relative=True)
        loss = self._difference(case, peer, "loss_mean", "check", relative=False)
        said = [] if tokens is None else [f"{tokens:+.1%} tokens"]
        said += [] if loss is None else [f"loss {loss:+.1g}"]
        unequal = abs(tokens or 0) > SAME_TOKENS or abs(loss or 0) > SAME_LOSS
        return ", ".join(said) + (": **unequal**" if unequal else "")

    def _start(self) -> str:
        names = ("start_cpu_s", "start_wall_s", "first_step_cpu_s", "first_step_wall_s", "cpu_s", "wall_s")
        rows = []
        for peer in PEERS:
            there = bool(self.done("base", peer))
            rows.append((peer, *(_number(self.median("base", peer, name), 1) for name in names)))
            rows[-1] = rows[-1] if there else (peer, self.trouble("base", peer), *[""] * 5)
        head = ("trainer", "to the loop, CPU-s", "s", "to the end of step 1, CPU-s", "s", "whole, CPU-s", "s")
        said = "Of the base case, from the start of the process, with empty caches; warm: below, of 32 rows."
        return f"## Start-up\n\n{said}\n\n" + _table(head, rows)

    def _data(self) -> str:
        rows: list[tuple[str, ...]] = []
        for case in (case for case in CASES.values() if case.prepares):
            kind = f"{case.rows:,} rows, {'warm' if case.warm else 'cold'}"
            if not any(row["case"] == case.name and row["status"] != "not run" for row in self.rows):
                rows.append((kind, "all", "not run", "", ""))
                continue
            rows += [(kind if peer == OURS else "", *self._data_row(case, peer)) for peer in PEERS]
        said = (
            "From the start of the process to the first step, with start-up; warm: made before, with the same caches."
            "\nlitgpt makes rows only as they are trained on. The making of rows by itself: `tokenise.py`, results.md."
        )
        return f"## Data\n\n{said}\n\n" + _table(("rows", "trainer", "CPU-s", "s", "its CPU-s by sftx's"), rows)

    def _data_row(self, case: Case, peer: str) -> tuple[str, ...]:
        if not self.done(case.name, peer):
            return peer, self.trouble(case.name, peer), "", ""
        cpu, wall = (_number(self.median(case.name, peer, f"start_{kind}_s"), 1) for kind in ("cpu", "wall"))
        ratio = self.ratio(case.name, case.name, peer, "start_cpu_s")
        return peer, cpu, wall, _times(1 / ratio) if ratio and peer != OURS else ""


def _pairs(cases: Iterable[str]) -> list[tuple[str, str]]:
    return [(case, peer) for case in cases for peer in OTHERS]


def _any_batching() -> list[tuple[str, str]]:
    """Return the base case of each of the others and its other batchings; the fastest is that of the base case."""
    other = [(case, peer) for case, peer in _pairs(("padded", "packed")) if FASTEST[peer] != CASES[case].batching]
    return _pairs(["base"]) + other


def _name(case: Case) -> str:
    return "base" if case is BASE else _described(case)


def _described(case: Case) -> str:
    """Return what a case is; of one that is not the base, what it changes."""
    said = {
        "model": f"model {case.model}",
        "mode": f"LoRA r={RANK} on all linear layers" if case.mode == "lora" else case.mode,
        "batching": f"{case.batching} batching",
        "rows": f"{case.rows} rows",
        "batch": f"{case.batch} a micro-batch",
        "accumulation": f"{case.accumulation} accumulated",
        "threads": f"{case.threads} thread{'s' * (case.threads > 1)}",
        "checkpointing": f"checkpointing {'on' if case.checkpointing else 'off'}",
    }
    changed = [text for name, text in said.items() if case is BASE or getattr(case, name) != getattr(BASE, name)]
    return ", ".join(changed)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines) + "\n"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=FOLDER / "peers.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER / "report.md")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in asked.file.read_text(encoding="utf-8").splitlines()]
    asked.out.write_text(Report(rows).text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
