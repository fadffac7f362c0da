"""The stage contract: one class says what a stage needs, adds and asks of a machine. Nothing here knows Ray.

A stage is handed rows (plain dictionaries) and gives back, row by row and in order, the columns it adds, or a
`RowError`. The engine does the rest: batching, checkpoints, failures, resume, seeds, placement.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from ipvg_ray import schema

if TYPE_CHECKING:
    from ipvg_ray.config import Config, StageSection

Grain = Literal["identity", "sample"]
Row = dict[str, Any]
"""Column name to value. Pictures are `{"bytes": bytes | None, "path": str | None}`, vectors are lists of floats.

Every row also has `identity_id`, the samples' rows `sample_id` and `prompt_id`, and all of them `seed`, a number
in [0, 2^63) derived from (run seed, row, stage): whatever is random in a row must come from it alone.
"""


class RowError(Exception):
    """This row cannot be finished; the others of its batch can.

    Args:
        kind: a short fixed word, such as `no_face`, by which failures are counted and filtered.
        message: what happened and what mends it, in a sentence for the user.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


def derived_seed(seed: int, *part: object) -> int:
    """A seed in [0, 2^63) of its own for one part of a row's work, such as one try of one call, from the row's seed."""
    hashed = hashlib.blake2b("/".join(map(str, (seed, *part))).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "big") >> 1


class WorkerBrokenError(Exception):
    """Raised by `process` where nothing more can come of this worker, such as an engine that has died.

    The engine ends the process; the worker that takes its place is given the rows again. Counts as a death.
    """


class StageDefinitionError(TypeError):
    """A stage class that contradicts the contract; raised when the stage is made, before anything runs."""


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage asks of a machine.

    Attributes:
        cpus: CPU cores reserved; may be a fraction, 0 for workers that live off a GPU.
        gpus: below 1 a share of one card, else a whole number: a group of cards of one node that work on one row.
        memory_gb: host memory reserved, GiB; 0 reserves none.
        accelerator_type: the card's name as Ray knows it (`H100`, `L4`), or None for any.
        label_selector: labels that a worker's node must have, such as `{"ipvg-ray/pool": "one-gpu"}`; values may also
            be `!value`, `in(a,b)` and `!in(a,b)`, as Ray reads them.
        min_workers, max_workers: the pool's bounds.
        initial_workers: how many it begins with; 0 for min_workers.
        batch_size: rows handed to one `process` call at most.
        concurrency: batches one worker has in work at a time. Above 1 `process` is called from so many threads at once.
        threads: what torch and ONNX may use in one worker.
        time_limit_s: seconds one row may take before its worker is ended and the row tried again; 0 for no limit.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    accelerator_type: str | None = None
    label_selector: Mapping[str, str] = field(default_factory=dict)
    min_workers: int = 1
    max_workers: int = 1
    initial_workers: int = 0
    batch_size: int = 1
    concurrency: int = 1
    threads: int = 1
    time_limit_s: float = 0.0


class MediaWriter(Protocol):
    """Publishes a finished media file into the run."""

    def publish(self, folder: str, identity_id: str, name: str, suffix: str, data: bytes) -> str:
        """Write `data` whole or not at all; returns the path relative to the run, safe whatever the ids hold."""
        ...


class Scratch(Protocol):
    """A small store beside the run for work in progress. What is in it outlives workers and starts of the run, and is
    seen only by stages with the same fingerprint."""

    def read(self, name: str) -> bytes | None:
        """What was written under that name last, or None."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Keep `data` whole or not at all, in place of what was there."""
        ...

    def remove(self, name: str) -> None:
        """Forget it, if it is there."""
        ...


@dataclass(frozen=True)
class RankContext:
    """What the engine gives a rank when it starts.

    Attributes:
        rank, ranks: its number, and how many there are.
        device: `cuda`, of which it sees one card, or `cpu`.
        threads: how many threads it may use.
        alive: to be called with a few words at every step of long work. When no rank of a group has done so for the
            group's `stall_s`, it is taken to hang.
    """

    rank: int
    ranks: int
    device: str
    threads: int
    alive: Callable[[str], None]


class Rendezvous(Protocol):
    """How the ranks of a group meet, in whatever library they talk through. Sent to each rank, which keeps its own."""

    def open(self, host: str, ranks: int) -> Any:
        """In rank 0: open the place where all meet, reachable at the address `host`; returns what leads there."""
        ...

    def join(self, place: Any, context: RankContext) -> None:
        """In every rank, rank 0 too, before `Ranks.make`: go to `place`, and come back when all have met."""
        ...


@dataclass(frozen=True)
class Ranks:
    """The group of processes that a worker leads, one for each card.

    Attributes:
        size: how many.
        make: called once in each rank; makes the object whose methods `Group.run` calls. Loads models.
        across_nodes: whether they may be spread over nodes; else all run on the worker's own.
        stall_s: seconds without a sign of any rank after which they are taken to hang; 0 for no limit.
        rebuilds: how often the group is made anew for one call before that call is given up.
        stage: whose models each rank's node must have before `make` is called; a new one, that has not been set up.
        rendezvous: how they meet; None where they need not.
        warm: imports what `make` will need, and touches no card. Where it is given, the leader keeps as many processes
            in reserve that have called it, from which a group is made anew in a second or two.
    """

    size: int
    make: Callable[[RankContext], Any]
    across_nodes: bool = False
    stall_s: float = 0.0
    rebuilds: int = 2
    stage: Stage | None = None
    rendezvous: Rendezvous | None = None
    warm: Callable[[], None] | None = None


class Group(Protocol):
    """A worker's ranks, as its stage sees them."""

    def run(self, method: str, *args: Any) -> Any:
        """Call a method of every rank's object with the same arguments, all at once; returns what rank 0 returned.

        Where a rank dies, hangs, or raises while others do not, all are ended, made anew, and called again.

        Raises:
            RowError: of kind `group_lost`, where that has happened too often.
            Exception: what all ranks raised alike; the group is then whole.
        """
        ...


@dataclass(frozen=True)
class StageContext:
    """What the engine gives a worker when it starts.

    Attributes:
        device: `cuda` where the worker itself was given a GPU, else `cpu`; the cards of a group are its ranks'.
        threads: how many threads the worker may use.
        media: where finished media files go.
        run_dir: the run's directory or URI prefix; media URIs in rows are relative to it.
        scratch: for work in progress that another worker may go on with; None where a row is run apart from its run.
        group: the worker's ranks, where `Stage.ranks` asks for some.
    """

    device: str
    threads: int
    media: MediaWriter
    run_dir: str
    scratch: Scratch | None = None
    group: Group | None = None


class Stage(ABC):
    """One step of the pipeline. Subclasses set the four class variables and write `setup` and `process`.

    Class attributes:
        name: also the name of its table, its schema and its section of the configuration.
        grain: `identity` (once per face) or `sample` (once per face and prompt).
        needs: columns read, from the identities or samples table or from earlier stages.
        version: raise it when the same configuration gives other results; part of the fingerprint.
        media: folders of the run that this stage publishes files into.

    The columns a stage adds are those of `schemas/<name>.yaml`.
    """

    name: ClassVar[str]
    grain: ClassVar[Grain]
    needs: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1
    media: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config) -> None:
        """Keep the configuration; load nothing. The plan makes stages on machines without their models.

        Raises:
            StageDefinitionError: where the class leaves out what the contract wants.
        """
        # Not in __init_subclass__: classes sent to workers by value are rebuilt there before they have attributes.
        for attribute, kind in (("name", str), ("grain", str), ("needs", tuple)):
            if not isinstance(getattr(self, attribute, None), kind):
                raise StageDefinitionError(
                    f"{type(self).__name__} must set `{attribute}` ({kind.__name__}) on the class"
                )
        if self.grain not in ("identity", "sample"):
            raise StageDefinitionError(f"{type(self).__name__}.grain is {self.grain!r}, not 'identity' or 'sample'")
        self.config = config

    @classmethod
    def table(cls) -> schema.Table:
        """The table of the columns this stage adds; `schemas/<name>.yaml` unless a subclass brings its own."""
        return schema.table(cls.name)

    @property
    def settings(self) -> StageSection:
        """This stage's section of the configuration."""
        section: StageSection = getattr(self.config, self.name)
        return section

    def resources(self) -> Resources:
        """What one worker asks of a machine, from the section's `pool`."""
        return Resources(**self.settings.pool.model_dump())

    def notes(self) -> Sequence[str]:
        """What a plan should say of this stage besides its pool; nothing is loaded for it."""
        return ()

    def ranks(self) -> Ranks | None:
        """The group that each worker leads; None where it works alone. `resources` asks for the cards of all ranks."""
        return None

    def models(self) -> Mapping[str, Path]:
        """Field of the section that names a model, to the file or folder it stands for.

        The plan refuses to run while one is missing, and their contents are part of the fingerprint.
        """
        return {}

    def optional_models(self) -> Mapping[str, Path]:
        """As `models`, of those that the stage would use and can do without; `models pull` fetches them too."""
        return {}

    def wanted_models(self) -> Mapping[str, Path]:
        """Of `optional_models` those that a run may still bring to this machine, before it asks for `models`."""
        return self.optional_models()

    def fingerprint_settings(self) -> dict[str, Any]:
        """What of the configuration changes this stage's results: its section without pool and model names."""
        settings = self.settings.model_dump(mode="json", exclude={"pool"})
        return {key: value for key, value in settings.items() if key not in self.models()}

    def setup(self, context: StageContext) -> None:  # noqa: B027 - most stages load models, none has to
        """Load models. Called once in each worker, before its first row."""

    @abstractmethod
    def process(self, rows: Sequence[Row]) -> Sequence[Row | RowError]:
        """The added columns of each row, in the rows' order. Called from several threads where the pool's concurrency
        is above 1.

        A row that cannot be finished gets a `RowError` in its place. If the call itself raises while it holds several
        rows, the engine calls again with each row alone, so that only the guilty one fails.
        """

    def teardown(self) -> None:  # noqa: B027 - optional
        """Release what `setup` took. Not called when a worker is killed."""
