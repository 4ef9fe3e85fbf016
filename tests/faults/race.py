"""Processes that all need the same things of one cold cache at once, the first that builds one of them being killed.

`python -m tests.faults.race FOLDER COUNT KIND SEED` prints what became of them, as JSON. They are forked from one
process that has imported everything, and start when a pipe is closed. KIND is what the victim is killed in:
`records`, `tokens`, `models` (the embedded model), or `none`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.kill import own_output, warm
from tests.faults.runs import composed

LONGEST = {"records": 0.2, "tokens": 1.0, "models": 2.0}
"""Seconds within which the victim dies, or else when it has built all but not published it."""


def need_everything(folder: Path) -> str:
    """Open corpus, tokens and model as a run does, and return a hash of them all."""
    from sftx.data.prepare import open_data
    from sftx.model.loading.family import family_named, family_of
    from sftx.model.loading.load import find_model, load_template

    config = composed(folder / "run", "max_train_rows=400", "data.num_workers=1")
    rows_for = open_data(config)
    source = find_model(config.model_name_or_path)
    family, _ = family_of(config.model, source.model_type, downloaded=source.downloaded)
    data = rows_for(load_template(source, family, config.template_name, family_named, trust_remote_code=False))
    found = hashlib.sha256()
    for rows in (data.train, data.held_out):
        for row in rows:
            found.update(row.ids_T.tobytes() + row.weights_T.tobytes() + row.origin.encode())
    for file in sorted(source.folder.iterdir()):
        found.update(file.name.encode() + file.read_bytes())
    return found.hexdigest()


def note(folder: Path, *words: object) -> None:
    """Append a line to what all processes tell, in one write."""
    descriptor = os.open(folder / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def watch_builds(folder: Path, victims: str, after: float) -> None:
    """Note each build, and kill the process that makes the first of the kind that a victim is wanted for."""
    import sftx.data.corpus
    import sftx.data.store.rows
    import sftx.files

    original = sftx.files.write_folder
    kinds: list[str] = []
    for module, kind in ((sftx.data.corpus, "records"), (sftx.data.store.rows, "tokens")):

        def opened(*arguments: Any, kind: str = kind, open_entry: Any = module.open_entry) -> Any:
            kinds.append(kind)
            return open_entry(*arguments)

        module.open_entry = opened  # type: ignore[attr-defined]

    def watched(into: Path, fill: Callable[[Path], None], **named: Any) -> None:
        kind = kinds[-1] if into.parent.name == "corpora" else into.parent.name

        def filled(temporary: Path) -> None:
            note(folder, "began", kind)
            victim = kind == victims and first(folder / "victim")
            if victim:
                note(folder, "killed", kind)
                timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL))
                timer.start()
            fill(temporary)
            if victim:
                os.kill(os.getpid(), signal.SIGKILL)
            note(folder, "built", kind)

        original(into, filled, **named)

    for name, module in list(sys.modules.items()):
        if name.startswith("sftx.") and getattr(module, "write_folder", None) is original:
            module.write_folder = watched  # type: ignore[attr-defined]


def first(mark: Path) -> bool:
    """Return True if no process has been here before."""
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def forked(folder: Path, gate: tuple[int, int], victims: str, after: float) -> int:
    """Fork a process that waits until the parent alone could open the gate and has, and leaves its hash."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        said = os.open(folder / f"{os.getpid()}.said", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        watch_builds(folder, victims, after)
        os.close(gate[1])
        os.read(gate[0], 1)
        note(folder, "found", need_everything(folder))
        code = 0
    except Exception:  # noqa: BLE001 - it is told to the parent by the exit code, and written down
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Start the processes, wait for them, and say what became of them."""
    out = own_output()
    folder, count, victims, seed = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    import torch

    torch.set_num_threads(1)
    import sftx.model.loading.builtin
    import sftx.run  # noqa: F401

    os.environ["SFTX_CACHE"] = str(folder / "warm")
    warm(lambda: need_everything(folder))
    os.environ["SFTX_CACHE"] = str(folder / "cache")
    after = random.Random(seed).uniform(0, LONGEST.get(victims, 0))
    gate = os.pipe()
    children = {forked(folder, gate, victims, after) for _ in range(count)}
    os.close(gate[0])
    os.close(gate[1])
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    told = (folder / "told").read_text().splitlines()
    print(json.dumps({"codes": sorted(codes), "told": told}), file=out)


if __name__ == "__main__":
    main()
