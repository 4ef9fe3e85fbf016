"""A run as a recipe: engine, data, model, trials, training, results.

`run` takes a list of configurations that share base and data. A plain run is a list of one.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sftx.build import build
from sftx.config.schema import TrainConfig
from sftx.effective import Effective
from sftx.errors import StoppedError
from sftx.logs import RunLog, ThirdPartyLog
from sftx.parallel import supervised
from sftx.parallel.engine import Engine
from sftx.runs import manifest
from sftx.runs.begin import Setting, open_trial
from sftx.runs.end import finish_trial, note_failure
from sftx.runs.result import Failure, Result, Results
from sftx.runs.resume import identity_of, kernels_of, open_folders, resume_command
from sftx.runs.setup import check_shared, open_session, open_trials
from sftx.signals import Signals
from sftx.training.determinism import deterministic_kernels
from sftx.training.loop import train
from sftx.training.measure.flops import work_of
from sftx.training.measure.perf import reset_peak_memory
from sftx.training.memory import memory_explained
from sftx.training.probing import compile_limits_noted, compile_model, probe
from sftx.training.saving.preflight import check_room
from sftx.training.saving.run_folder import RunFolder
from sftx.training.saving.saver import Saver
from sftx.training.trial import Session, Trial


def run(configs: Sequence[TrainConfig], notes: Sequence[str] = (), command: str = "") -> Results:
    """Train one trial for each configuration, over one base; return a result or a failure for each.

    Raises:
        SftxError: an error that the user can fix, before anything is written where that is possible; of several
            trials the first one's error if all failed.
    """
    first = configs[0]
    with ExitStack() as stack:
        third_party = stack.enter_context(ThirdPartyLog())
        signals = stack.enter_context(Signals())
        stack.enter_context(deterministic_kernels(first.deterministic))
        stack.enter_context(memory_explained())
        check_shared(configs)
        engine: Engine = build(first.parallel).start(first.device)
        reset_peak_memory(engine.device)
        results = _Run(configs, engine, signals, third_party).results(notes, command)
    failures = [result for result in results if isinstance(result, Failure)]
    if len(failures) == len(results):
        raise failures[0].error
    return results


class _Run:
    """The trials of one call, and what must be closed after them."""

    def __init__(
        self, configs: Sequence[TrainConfig], engine: Engine, signals: Signals, third_party: ThirdPartyLog
    ) -> None:
        self.configs, self.engine, self.signals = configs, engine, signals
        self.saver = Saver(asynchronous=configs[0].async_save)
        self.log = RunLog(third_party, is_main=engine.is_main)
        self.folders: list[RunFolder] = []
        self.trials: list[Trial] = []

    def results(self, notes: Sequence[str], command: str) -> Results:
        """Train all trials; close everything, however that ends."""
        finished = False
        try:
            results = self._results(notes, command)
            finished = True
            return results
        except BaseException as error:
            stopped = isinstance(error, StoppedError) or self.signals.received is not None
            if stopped or not supervised.failed_by_another(error):
                note_failure(self.trials, self.engine, error, stopped=stopped)
            raise
        finally:
            self.saver.close()
            for trial in self.trials:
                trial.close()
            for folder in self.folders:
                folder.unlock()
            self.log.close()
            self.engine.close(together=finished)

    def _results(self, notes: Sequence[str], command: str) -> Results:
        configs, engine, first = self.configs, self.engine, self.configs[0]
        for config in configs:
            if config.output_dir is not None:
                RunFolder(Path(config.output_dir)).check(config.resume)
        effective = Effective(remarks=[*notes, *engine.remarks])
        session, data, source = open_session(first, engine, effective, self.saver, self.signals)
        identities = [identity_of(config, engine.world_size, data, source) for config in configs]
        configs, self.folders = open_folders(configs, identities, engine)
        if command and len(configs) == 1:
            session.resume_command = resume_command(command, first, self.folders[0].path)
        self.trials = open_trials(configs, self.folders, session, data, effective)
        probe(configs[0], session, self.trials, kernels_of(self.folders[0]))
        session.work = work_of(session.model)
        compile_model(configs[0], session, self.trials)
        check_room(self.trials, session)
        command = command or manifest.command_line()
        setting = Setting(data, source, command, manifest.environment(), self.log)
        return self._train(session, setting, identities)

    def _train(self, session: Session, setting: Setting, identities: Sequence[dict[str, Any]]) -> Results:
        """Train the trials that are not finished already, and return the outcome of each."""
        outcomes: dict[str, Result | Failure] = {}

        def ended(trial: Trial) -> None:
            if trial.error is None:
                outcomes[trial.name] = finish_trial(trial, session)
            else:
                note_failure([trial], self.engine, trial.error, stopped=False)
                outcomes[trial.name] = Failure(trial.folder.path, trial.step, trial.error)
            trial.close()

        for trial, who in zip(self.trials, identities, strict=True):
            with trial.active(session):
                if (finished := open_trial(trial, session, setting, who)) is not None:
                    outcomes[trial.name], trial.ended = finished, True
        supervised.send(folders=[str(trial.folder.path) for trial in self.trials])
        self.engine.barrier()  # the main rank has made folders and started trackers
        gc.enable()  # disabled at startup
        if unfinished := [trial for trial in self.trials if not trial.ended]:
            with compile_limits_noted(session, unfinished):
                train(session, unfinished, ended)
        return [outcomes[trial.name] for trial in self.trials]
