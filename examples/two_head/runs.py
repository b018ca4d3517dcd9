"""A run that can be stopped, and goes on from there: checkpoints, Ctrl-C, progress."""

import argparse
import contextlib
import itertools
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

import wloss_jax as wl


class Curve(NamedTuple):
    """What is recorded during training."""

    step: list[int]
    train: list[float]
    test: list[float]


class Run:
    """A training run: how far it is, and what it has recorded.

    Attributes:
      step: the number of the step, from 1.
      loss: the training loss since the last record, for the caller to add to.
      curve: what was recorded.
      stopped: whether Ctrl-C ended it.
    """

    def __init__(
        self,
        num_steps: int,
        modules: Any,
        manager: ocp.CheckpointManager | None,
        interrupted: threading.Event,
    ):
        self.num_steps, self.modules = num_steps, modules
        self.manager, self.interrupted = manager, interrupted
        self.step, self.stopped = 0, False
        self.loss, self.curve = wl.WeightedMean.zeros(), Curve([], [], [])

    @property
    def is_due(self) -> bool:
        """Whether another tenth of the run is done: time to `record`."""
        tenth = max(self.num_steps // 10, 1)
        return self.step % tenth == 0 or self.step == self.num_steps

    def record(self, *, test: float) -> None:
        """Records the training loss since the last record, and the test's."""
        self.curve.step.append(self.step)
        self.curve.train.append(float(self.loss.compute()))
        self.curve.test.append(test)

    def batches(self, stream: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches of the steps that are left, and saves between them."""
        # What was trained on before is drawn again, and passed over.
        rest = itertools.islice(stream, self.step, self.num_steps)
        progress = tqdm(
            rest, initial=self.step, total=self.num_steps, desc="training", unit="step"
        )
        for batch in progress:
            self.step += 1
            yield batch
            progress.set_postfix(loss=f"{self.loss.compute():.4f}", refresh=False)
            if self.is_due:
                self.loss = wl.WeightedMean.zeros()
            self.stopped = self.interrupted.is_set()
            if self.manager and (self.is_due or self.stopped):
                self.save()
            if self.stopped:
                break
        progress.close()

    def save(self) -> None:
        """Saves all that the run needs to go on after this step."""
        self.manager.save(
            self.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave((nnx.state(self.modules), self.loss)),
                curve=ocp.args.JsonSave(self.curve._asdict()),
            ),
        )

    def restore(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        if self.manager is None or (step := self.manager.latest_step()) is None:
            return
        saved = self.manager.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore((nnx.state(self.modules), self.loss)),
                curve=ocp.args.JsonRestore(),
            ),
        )
        state, self.loss = saved.arrays
        nnx.update(self.modules, state)
        self.step, self.curve = step, Curve(**saved.curve)


@contextlib.contextmanager
def resume(options: argparse.Namespace, modules: Any) -> Iterator[Run]:
    """Begins a run, or goes on with it; ends the program if Ctrl-C stopped it.

    Args:
      options: the command line; without ``checkpoint``, nothing is saved.
      modules: the model and its optimizer, which are saved and restored.
    """
    with open_checkpoints(options) as manager, delayed_interrupt() as interrupted:
        run = Run(options.steps, modules, manager, interrupted)
        run.restore()
        yield run
    if run.stopped:
        print(f"stopped after step {run.step} of {run.num_steps}", end=", ")
        print(
            f"saved in {options.checkpoint}: the same command goes on from there"
            if options.checkpoint
            else "not saved: that takes --checkpoint"
        )
        sys.exit(130)


def open_checkpoints(
    options: argparse.Namespace,
) -> contextlib.AbstractContextManager[ocp.CheckpointManager | None]:
    """Opens the directory of a run; exits if it holds a run with other options."""
    if options.checkpoint is None:
        return contextlib.nullcontext()
    output = ("checkpoint", "plot", "json")
    settings = {k: str(v) for k, v in vars(options).items() if k not in output}
    manager = ocp.CheckpointManager(
        options.checkpoint.absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=1),
        metadata=settings,  # which stays what it was when the directory was made
    )
    began_with = manager.metadata().custom_metadata
    others = [f"{k}={v}" for k, v in began_with.items() if settings.get(k) != v]
    if others:
        names = ", ".join(others)
        sys.exit(f"error: {options.checkpoint} holds a run with other options: {names}")
    return manager


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[threading.Event]:
    """Turns Ctrl-C into an event, so that the step can finish; a second is at once."""
    event = threading.Event()

    def handle(*_: object) -> None:
        event.set()
        signal.signal(signal.SIGINT, default)

    default = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, default)
