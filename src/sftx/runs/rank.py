"""`python -m sftx.runs.rank` is one of several processes of a run; `supervisor.py` starts it.

It is told its configuration by the process that started it, over its standard input and as plain values,
and asks once more whether everything in it may run.
"""

from __future__ import annotations

import faulthandler
import marshal
import os
import sys
from pathlib import Path
from typing import Any

from sftx.errors import EXIT_FAULT, ConfigError, SftxError
from sftx.parallel import watch
from sftx.parallel.board import TOGETHER, Board
from sftx.parallel.started import WHERE
from sftx.processes import die_with_parent
from sftx.signals import Signals, end_unmoved, heard


def main() -> None:
    """Train as one rank; what it comes to is told to the supervisor."""
    die_with_parent()
    end_unmoved()
    told: dict[str, Any] = marshal.loads(sys.stdin.buffer.read())
    if os.getppid() != told["parent"]:
        os._exit(1)  # it ended before the kernel was asked to watch it
    sys.path[:], sys.argv[:] = told["path"], told["argv"]
    faulthandler.enable(all_threads=False)
    faulthandler.register(WHERE, file=told["where"], all_threads=False)
    rank = int(os.environ["RANK"])
    board = Board(told["board"], int(os.environ["WORLD_SIZE"]))
    watch.current = watcher = watch.Watch(rank, board, told["reports"], told["door"])
    try:
        results = _train(told)
    except BaseException as error:
        watcher.report(error)
        if isinstance(error, SystemExit):
            raise
        sys.exit(error.exit_code if isinstance(error, SftxError) else EXIT_FAULT)  # the supervisor says it
    with watcher.meeting(TOGETHER):  # one that does not come to its end is missed
        watcher.tell(finished=results)


def _train(told: dict[str, Any]) -> list[dict[str, Any]]:
    from sftx.config.check import config_from
    from sftx.config.options import user_folders
    from sftx.config.safety import unlisted

    with Signals(), heard():
        user_folders[:] = map(Path, told["folders"])
        for config in told["configs"]:
            if problems := unlisted(config, config["allow_targets"], lambda _: "config"):
                raise ConfigError(problems)
        from sftx.run import run
        from sftx.runs.result import Result

        results = run([config_from(config) for config in told["configs"]], told["notes"], told["command"])
    return [result.plain() for result in results if isinstance(result, Result)]  # with several ranks none fails alone


if __name__ == "__main__":
    main()
