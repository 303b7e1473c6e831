"""What a training works with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras

from hpcai_cli.cadence import Cadence
from hpcai_cli.engine.compression.distillation import Teacher
from hpcai_cli.engine.compression.pruning import KeptZeros, MagnitudePruning
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.elastic import Crew
from hpcai_cli.engine.energy import JobMeter
from hpcai_cli.engine.profiling import Profiler
from hpcai_cli.engine.replicas import Replicas
from hpcai_cli.engine.step import Wishes
from hpcai_cli.engine.store import Dataset
from hpcai_cli.pulse import Pulse
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run
from hpcai_cli.signals import StopRequest
from hpcai_cli.time_limit import TimeLimit


@dataclass
class Job:
    """What a training works with."""

    recipe: Recipe
    run: Run
    dataset: Dataset
    ranks: Serial | Horovod
    build_model: Callable[[Recipe], keras.Model]
    augment: Callable | None = None
    adapt: Callable | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    tensorboard: bool = False
    final_augment: Callable | None = None
    """Takes the place of `augment` in the last epochs, by the recipe's final_share."""
    describe: Callable[[], None] = lambda: None
    """Writes recipe.json and manifest.json of a resumed run, once it is known that the checkpoint fits."""
    teacher: Teacher | None = None
    """Whose scores the model learns beside the labels."""
    prune: Callable[[keras.Model, int], MagnitudePruning | KeptZeros] | None = None
    """Returns what sets weights of the model to zero, in a training of so many steps."""
    first_choice: int = 1
    """The first epoch that may be chosen as the best: weights that go to zero little by little are all gone then."""
    finished: Callable[[keras.Model], keras.Model] = lambda model: model
    """Returns what is saved of a model that was trained."""
    profiler: Profiler | None = None
    """Looks into some of the steps."""
    energy: JobMeter | None = None
    """Measures the joules from here to the result."""
    autotune_log: Path | None = None
    """Where Horovod writes what it tries, on rank 0."""
    replicas: Replicas | None = None
    """The copies of the model among the ranks; one on each by default."""
    pulse: Pulse = field(default_factory=Pulse)
    """Is told that the work goes on."""
    cadence: Cadence = Cadence()
    until_epoch: int | None = None
    """The epoch after which the training saves itself and ends, to be resumed."""
    limit: TimeLimit = field(default_factory=lambda: TimeLimit(None))
    wishes: Wishes = field(default_factory=Wishes)
    crew: Crew | None = None
    """The ranks of an elastic job, who go on without those that are lost."""

    def __post_init__(self):
        self.replicas = self.replicas or Replicas(self.ranks)
