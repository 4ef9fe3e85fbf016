"""`python -m sftx.runs.rank` is one of several processes of a run; `supervisor.py` starts it.

It reads its order, with the configurations, from its standard input as plain values, and checks once more
whether everything in it may run.
"""

from __future__ import annotations

import faulthandler
import marshal
import os
import sys
from pathlib import Path
from typing import Any

from sftx.errors import EXIT_FAULT, ConfigError, SftxError
from sftx.parallel import supervised
from sftx.parallel.rank_process import WHERE
from sftx.parallel.shared_state import ALL_RANKS, SharedState
from sftx.processes import die_with_parent
from sftx.signals import Signals, disregard, unblocked


def main() -> None:
    """Train as one rank and report the outcome to the supervisor."""
    die_with_parent()
    disregard()
    order: dict[str, Any] = marshal.loads(sys.stdin.buffer.read())
    if os.getppid() != order["parent"]:
        os._exit(1)  # it ended before the kernel watched it
    sys.path[:], sys.argv[:] = order["path"], order["argv"]
    faulthandler.enable(all_threads=False)
    faulthandler.register(WHERE, file=order["where"], all_threads=False)
    rank = int(os.environ["RANK"])
    state = SharedState(order["state"], int(os.environ["WORLD_SIZE"]))
    supervised.current = link = supervised.Supervised(rank, state, order["reports"], order["rendezvous"])
    try:
        results = _train(order)
    except BaseException as error:
        link.report(error)
        if isinstance(error, SystemExit):
            raise
        sys.exit(error.exit_code if isinstance(error, SftxError) else EXIT_FAULT)  # the supervisor says it
    with link.collective(ALL_RANKS):  # a rank that does not end is missed here
        link.send(finished=results)


def _train(order: dict[str, Any]) -> list[dict[str, Any]]:
    from sftx.config.checks.check import config_from
    from sftx.config.options import user_folders
    from sftx.config.untrusted.allowlist import unlisted

    with Signals(), unblocked():
        user_folders[:] = map(Path, order["folders"])
        for config in order["configs"]:
            if problems := unlisted(config, config["allow_targets"], lambda _: "config"):
                raise ConfigError(problems)
        from sftx.run import run
        from sftx.runs.result import Result

        results = run([config_from(config) for config in order["configs"]], order["notes"], order["command"])
    return [result.plain() for result in results if isinstance(result, Result)]  # with several ranks none fails alone


if __name__ == "__main__":
    main()
