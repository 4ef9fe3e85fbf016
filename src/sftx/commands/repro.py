"""`sftx repro RUN`: run a run again, and compare the two bit by bit."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sftx import INSTALLED, PROJECT_ROOT
from sftx.errors import EXIT_FAULT
from sftx.terminal import counted, visible

if TYPE_CHECKING:
    from sftx.runs.saved.comparison import Verdict
    from sftx.runs.saved.saved_run import SavedRun
    from sftx.runs.saved.then_and_now import ThenAndNow


def add(groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]]) -> None:
    """Add `repro`."""
    parser = groups[""].add_parser(
        "repro",
        help="run a run again from its folder, and compare the two bit by bit",
        description="Say what differs between a run and now (code, versions, hardware, data, model), run its "
        "config.yaml again in a new folder, and compare metrics and weights to the last bit. The exit code is 0 for "
        "the same bits, 1 otherwise. They are expected on a CPU, and on a GPU if the run had deterministic=true; both "
        "with the same versions and hardware.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="key=value",
        help="paths that lead elsewhere now, such as train_file_path=DIR; what a file cannot give: "
        "allow_targets=[...], trust_remote_code=true; what was masked as a secret",
    )
    parser.add_argument(
        "--output_dir", "--output-dir", metavar="DIR", help="where to train; default: beside it, RUN-repro"
    )
    parser.add_argument("--check", action="store_true", help="only say the differences; exit code 1 if there are any")
    parser.add_argument("--anyway", action="store_true", help="train although settings, data or model are others")
    parser.set_defaults(run=_repro)


def _repro(arguments: argparse.Namespace) -> int:
    from sftx.runs.saved.rerun import check_ranks, command, from_its_directory, ranks_here, rerun_config
    from sftx.runs.saved.saved_run import open_run

    beside = str(Path.cwd() if INSTALLED else PROJECT_ROOT)  # the user's own modules are found as training finds them
    if beside not in sys.path:
        sys.path.append(beside)
    run = open_run(arguments.folder)
    if not arguments.check:
        check_ranks(run, ranks_here())  # first: the rules would ask for another `parallel`, which is not to be changed
    as_stored = rerun_config(run, arguments.words)
    if not arguments.check:
        check_ranks(run, ranks_here(as_stored))
    config = from_its_directory(as_stored, run, arguments.words, Path.cwd())
    from sftx.runs.saved.then_and_now import output_of, then_and_now

    is_main = os.environ.get("RANK", "0") == "0"
    found = then_and_now(run, config, download=not arguments.check)
    if is_main:
        _print(_found_lines(run, found, moved=config != as_stored))
    if arguments.check:
        return int(bool(found))
    folder = output_of(run, arguments.output_dir)
    if found.content and not arguments.anyway:
        if is_main:
            _print(
                ["Not started: with other settings, data or model it is another run. To train all the same: --anyway"]
            )
        return EXIT_FAULT
    from sftx.runs.launch import launch
    from sftx.runs.result import single

    extra = [f"--output_dir={arguments.output_dir}"] if arguments.output_dir else []
    again = command(run, *arguments.words, *(["--anyway"] if arguments.anyway else []), *extra)
    result = single(launch([replace(config, output_dir=str(folder))], [], again))
    return _judged(run, result.output_dir, found.expected) if is_main else 0


def _found_lines(run: SavedRun, found: ThenAndNow, *, moved: bool) -> Iterable[str]:
    from sftx.commands.run_report import difference_lines, folded, headings

    yield from headings("repro", run)
    if moved:
        yield f"relative paths: from {visible(str(run.directory))}, where the run was started"
    if not found:
        yield "then and now: no difference in code, versions, hardware, settings, data and model"
    for title, differences in (("of the machine and the code", found.machine), ("of the run", found.content)):
        if differences:
            yield f"differences {title}, then -> now: {len(differences)}"
        for d in differences:
            yield from difference_lines(d, ("then", "now "))
    if found.expected:
        yield f"a repetition is expected to be {found.expected}"
    for remark in found.remarks:
        yield from folded(f"note: {visible(remark)}", indent=6)


def _judged(run: SavedRun, folder: Path, expected: str | None) -> int:
    from sftx.runs.saved.comparison import judge
    from sftx.runs.saved.saved_run import open_run

    verdict = judge(run, open_run(folder))
    _print(["", *_verdict_lines(run, folder, verdict, expected)])
    return 0 if verdict.same else EXIT_FAULT


def _verdict_lines(run: SavedRun, folder: Path, verdict: Verdict, expected: str | None) -> Iterable[str]:
    from sftx.commands.run_report import change_words

    if verdict.same:
        part = "" if run.status == "completed" else f" as far as {run.path} came"
        weights = ", and the weights in final/" if verdict.compared_weights else ""
        metrics = counted(len(verdict.metrics), "metric")
        yield f"Same bits{part}: {metrics} at {counted(verdict.shared_steps, 'step')}{weights}."
    elif verdict.first is not None:
        yield f"Not the same bits: {visible(verdict.first.metric)} differs first, at {change_words(verdict.first)}"
    elif not verdict.weights and not verdict.shared_steps:
        yield f"Nothing to compare: {run.path} recorded no step, and has no final/."
    else:
        yield "Not the same bits."
    if not verdict.compared_weights:
        yield f"  weights: not compared, {run.path} has none in final/"
    for d in verdict.weights:
        yield f"  {visible(d.key)}: sha256 {str(d.a)[:16]} -> {str(d.b)[:16]}"
    unequal = [m for m in verdict.metrics if m.steps_a != m.steps_b] if run.status == "completed" else []
    if unequal and verdict.same:
        yield f"  {run.path} has more records of {len(unequal)} metrics, from where an earlier attempt ended"
    elif verdict.first is None:
        for m in unequal:
            yield f"  {visible(m.name)}: {m.steps_a} records -> {m.steps_b}"
    if expected and not verdict.same:
        yield f"  expected: {expected}"
    yield f"  every difference: sftx diff {run.path} {folder}"


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
