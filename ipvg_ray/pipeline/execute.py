"""A plan becomes one streaming execution on Ray Data, with an actor pool per stage."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

if not os.environ.get("RAY_ADDRESS"):
    # A local start writes a token, and a second start wants the first one's mode. A cluster that others started has a
    # mode of its own: with another one, actors of a driver that joins it die before they run.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Readers work in bursts. Ray would end their processes after a second, and each start takes two of a core.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU workers see the machine as it is; no warning

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.exceptions import ExecutionTimeoutError

from ipvg_ray.errors import UserError
from ipvg_ray.pipeline.deaths import LastWords, keep_traces, oom_kills, trace_folder
from ipvg_ray.pipeline.desk import ledger_at, listening
from ipvg_ray.pipeline.groups import LedGroup
from ipvg_ray.pipeline.lead import GivenUpError, bound_lead
from ipvg_ray.pipeline.ledger import Event, Who
from ipvg_ray.pipeline.places import Room, claimed, places
from ipvg_ray.pipeline.plan import Step, rows_ahead, rows_dealt
from ipvg_ray.pipeline.spot import Notice, Watch, drain
from ipvg_ray.pipeline.stage import Resources
from ipvg_ray.pipeline.store import Store
from ipvg_ray.pipeline.tickets import TicketFile, read_rows
from ipvg_ray.pipeline.worker import Worker, WorkerSpec, WorkerStartError
from ipvg_ray.storage import StorageError

READ_CPUS = 0.5
_DEALT_BY_TASK = 16
_ROWS_READ = 16384
"""How often one read task deals, and about how many rows in all: enough that it is worth its cost."""
_READ_TASKS = 4096
"""Read tasks in front of a stage at most, as each takes the driver a millisecond; then they read more rows each."""
_READERS = 4
"""Read tasks that may be under way at a time where a pool wants as many."""
_ROWS_REBUILT = 1024
"""Light rows that are rebuilt at a time at least."""
_START_TRIES = 4
"""Workers of a stage that may fail to start one after another before the run ends."""
_WORDS = 10
"""Lines of a worker's own words that are shown: torch explains a wrong checkpoint over several."""
_GROW_AT = 0.8
"""Batches in work, as a share of what a pool can have in work, from which on it grows."""
_PATIENCE = 4.0
"""How often its slowest stage's time limit must pass without anything moving before an execution is given up."""


class LossError(UserError):
    """Nodes, workers or objects were lost in a way that Ray could not mend, or the run's storage could not be written;
    what is finished is kept."""


_LOSSES = (
    ray.exceptions.ObjectLostError,
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnavailableError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.OwnerDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RaySystemError,
)


def read_span(dealt: int, rows: int) -> int:
    """Rows that one read task rebuilds, of so many rows in all, to deal them out `dealt` at a time.

    Rows with pictures pass through it some 128 MB at a time, which is what Ray collects; light rows all at once.
    """
    worth_it = max(1, min(_DEALT_BY_TASK, _ROWS_READ // dealt))
    return dealt * max(worth_it, -(-rows // (_READ_TASKS * dealt)))


@dataclass(frozen=True)
class Flow:
    """How many rows at a time go where, stage by stage.

    Attributes:
        dealt: rows that go to a worker at a time.
        ahead: rows that may wait in front of the stage.
        promised: rows that each read task under way is counted on for.
    """

    dealt: dict[str, int]
    ahead: dict[str, int]
    promised: dict[str, int]

    @staticmethod
    def of(steps: Sequence[Step], tickets: dict[str, TicketFile]) -> Flow:
        """The flow of an execution."""
        dealt: dict[str, int] = {}
        ahead: dict[str, int] = {}
        promised: dict[str, int] = {}
        rows, before, last = 0, None, 0
        for step in steps:
            asks, entering = step.stage.resources(), tickets[step.name].rows if step.name in tickets else 0
            rows += entering  # an identity counts once, so of samples there are as many or more
            own = dealt[step.name] = rows_dealt(asks, step.light, rows)
            ahead[step.name] = rows_ahead(asks, before, own, last)
            wanted = max(_DEALT_BY_TASK * own, ahead[step.name] // _READERS)
            promised[_reader(step.name)] = min(read_span(own, entering), wanted)
            before, last = asks, own
        return Flow(dealt, ahead, promised)


def connect() -> None:
    """Join the cluster that this process belongs to (`RAY_ADDRESS`, a Ray job), else start one on this machine."""
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
    else:
        ray.init(address="local", include_dashboard=False, **quiet)


def execute(
    steps: Sequence[Step],
    specs: dict[str, WorkerSpec],
    tickets: dict[str, TicketFile],
    on_events: Callable[[Sequence[Event]], None],
    desk: Any,
) -> None:
    """Run to the end everything the tickets name.

    Args:
        specs: per stage, how its workers are made.
        tickets: per stage, the rows that enter at it; stages without any may be left out.
        on_events: called about twice a second, in a thread of its own, with what the workers told.
        desk: of `ipvg_ray.pipeline.desk.make_desk`.

    Raises:
        WorkerStartError: where a stage's workers cannot start.
        LossError: where so much was lost that this execution cannot end; another may.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A worker whose node dies, or that Ray Data gives up while it still loads, counts as one that could not start.
    context.max_consecutive_actor_init_deaths = _START_TRIES
    flow = Flow.of(steps, tickets)
    context.execution_no_progress_timeout_s = no_progress_limit(steps, flow.dealt)
    context.actor_pool_util_upscaling_threshold = _GROW_AT
    context.memory_usage_poll_interval_s = None  # a thread for each task, to tell what nobody asks
    bound_lead(context, flow.ahead, flow.promised)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with places(steps) as offices, listening(desk, specs[steps[0].name].store, on_events):
        dataset = _dataset(steps, specs, tickets, flow.dealt, desk, offices)
        try:
            for _ in dataset.iter_internal_ref_bundles() if dataset is not None else ():
                pass
        except (ray.exceptions.RayError, ExecutionTimeoutError, GivenUpError) as error:
            raise _explained(error) from error


def no_progress_limit(steps: Sequence[Step], dealt: Mapping[str, int]) -> int:
    """Seconds in which something must move, from the slowest stage's time limit; -1 where a stage has none.

    Ray's own guard of half an hour would fail one long video. A worker may also wait as long for a node, or load.
    """
    limits = {step.name: step.stage.resources().time_limit_s for step in steps}
    if not all(limits.values()):
        return -1
    return int(max(1800.0, _PATIENCE * max(limit * dealt[name] for name, limit in limits.items())))


def _dataset(
    steps: Sequence[Step],
    specs: dict[str, WorkerSpec],
    tickets: dict[str, TicketFile],
    dealt: Mapping[str, int],
    desk: Any,
    offices: dict[str, Any],
) -> Dataset | None:
    dataset: Dataset | None = None
    before: Step | None = None
    for step in steps:
        rows = dealt[step.name]
        if dataset is not None and before is not None and (before.explodes or dealt[before.name] > rows):
            dataset = _dealt(dataset, rows)
        entering = tickets.get(step.name)
        if entering is not None and entering.rows:
            fresh = _read(entering, step, rows, specs[step.name].store)
            dataset = fresh if dataset is None else dataset.union(fresh)
        if dataset is not None:
            dataset = _map(dataset, step, specs[step.name], desk, offices.get(step.name))
        before = step
    return dataset


def _dealt(dataset: Dataset, rows: int) -> Dataset:
    """Cut into blocks of what is dealt at a time: bigger ones would tie rows to one worker while others idle.

    A task for every block that is cut, so only where blocks may be bigger; Ray itself joins those that are smaller.
    """
    cut = dataset.repartition(target_num_rows_per_block=rows, strict=False)
    # Ray would ask for a whole core. It has no argument for that, and joins tasks only where they ask for the same.
    cut._logical_plan.dag.ray_remote_args["num_cpus"] = READ_CPUS  # type: ignore[attr-defined]
    return cut


def _reader(stage: str) -> str:
    """The name of what reads the rows that enter at a stage, in Ray's dashboards and logs too."""
    return f"read_{stage}"


def _read(tickets: TicketFile, step: Step, dealt: int, store: Store) -> Dataset:
    """The rows of a ticket file in blocks of what is dealt at a time.

    One kind of task reads and cuts: Ray joins `map_batches` and the cut behind it, but not `read_datasource` and one.
    """
    batch = step.stage.resources().batch_size
    piece = max(batch, _ROWS_REBUILT) if step.light else batch

    def read(span: pa.Table) -> Iterator[pa.Table]:
        start, stop = (span[name][0].as_py() for name in ("start", "stop"))
        yield from read_rows(tickets, start, stop, piece, store.stopping)

    read.__name__ = _reader(step.name)
    rows = read_span(dealt, tickets.rows)
    starts = range(0, tickets.rows, rows)
    spans = [pa.table({"start": [start], "stop": [min(start + rows, tickets.rows)]}) for start in starts]
    fresh = ray.data.from_blocks(spans)  # `from_arrow` would run a task for each
    return _dealt(fresh.map_batches(read, batch_size=None, batch_format="pyarrow", num_cpus=READ_CPUS), dealt)


def _map(dataset: Dataset, step: Step, spec: WorkerSpec, desk: Any, office: Any) -> Dataset:
    asks = step.stage.resources()
    operator = type(step.name, (_StageActor,), {})  # the class's name is the operator's in Ray's dashboards and logs
    return dataset.map_batches(
        operator,
        fn_constructor_args=(spec, desk, office),
        batch_size=asks.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            min_size=asks.min_workers,
            max_size=asks.max_workers,
            initial_size=asks.initial_workers or None,
            max_tasks_in_flight_per_actor=_in_flight(asks),
            max_concurrent_calls_per_actor=asks.concurrency,
            enable_true_multi_threading=asks.concurrency > 1,
        ),
        num_cpus=asks.cpus,
        num_gpus=0 if office else asks.gpus,  # a group that spans nodes has its cards from its placement group
        **_remote_args(asks),
    )


def _in_flight(asks: Resources) -> int:
    """Batches dealt to one worker at a time.

    One more than it works on hides the way to it. But a row that is worth a batch of its own takes minutes, and must
    not lie in one worker's queue while another stands idle.
    """
    return 1 if asks.batch_size == 1 and asks.concurrency == 1 else 2 * asks.concurrency


def _remote_args(asks: Resources) -> dict[str, Any]:
    """Ray's arguments that Ray Data announced to remove: kept in this one place (ray < 2.64).

    Ray counts lost nodes among a worker's restarts, so a number here would end runs on spot nodes. What bounds restarts
    is the ledger: a batch that keeps killing workers is taken apart and the guilty row set aside, and workers that die
    outside of any batch end the run.
    """
    args: dict[str, Any] = {"max_restarts": -1, "max_task_retries": -1}
    if asks.memory_gb:
        args["memory"] = int(asks.memory_gb * 2**30)
    if asks.accelerator_type:
        args["accelerator_type"] = asks.accelerator_type
    if asks.label_selector:
        args["label_selector"] = dict(asks.label_selector)
    return args


class _StageActor:
    """A stage's worker inside a Ray Data actor; the leader of its ranks, where the stage asks for some."""

    def __init__(self, spec: WorkerSpec, desk: Any, office: Any) -> None:
        asks = spec.step.stage.resources()
        # Before torch, ONNX and OpenCV are imported by the stage's setup: they size their pools from these.
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
            os.environ[name] = str(asks.threads)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models lie in the cache; a worker never goes to the network
        here = ray.get_runtime_context()
        who = Who(
            worker=here.get_actor_id() or "",
            process=here.get_worker_id(),
            node=here.get_node_id(),
            host=os.uname().nodename,
            trace=str(trace_folder(spec.store.session_dir) / f"{spec.step.name}-{here.get_worker_id()}"),
            oom_kills=oom_kills(),
        )
        keep_traces(spec.store.session_dir)
        last_words = LastWords(who.trace) if spec.store.is_open() else None

        def noticed(notice: Notice) -> None:
            node = notice.node or who.node
            desk.leaving.remote(node)
            drain(node, notice)

        self.group: LedGroup | None = None

        def others() -> Notice | None:
            return self.group.notice() if self.group else None

        # Ray starts this actor again on another node, and gives it what was not begun.
        self.spot = Watch(noticed, leave=lambda: os._exit(0), others=others if office else None)
        room = None
        if office:
            waiting = last_words.pause if last_words else nullcontext
            room = Room(claimed(office), lambda node: bool(ray.get(desk.is_lost.remote(node))), waiting)
            room.wait()  # before the start is noted, which a node that comes late must not count against
        device, ranks = "cuda" if asks.gpus else "cpu", spec.step.stage.ranks()
        group = self.group = LedGroup(ranks, device, asks.threads, room) if ranks else None
        gpus = here.get_accelerator_ids().get("GPU", [])
        ledger = ledger_at(desk, spec.store)
        self.worker = Worker(spec, "cpu" if group else device, ledger, who, last_words, group, gpus)

    def __call__(self, batch: pa.Table) -> pa.Table:
        with self.spot.batch():
            return self.worker(batch)


def _explained(error: BaseException) -> BaseException:
    """The worker's own words, where its start is what failed; a loss, where that is what happened; else the error."""
    text = str(error)
    marker = f"{WorkerStartError.__name__}: "
    if marker in text:
        lines = text.split(marker)[-1].splitlines()
        return WorkerStartError("\n".join(lines[:_WORDS]).rstrip())
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (*_LOSSES, ExecutionTimeoutError, GivenUpError, StorageError)):
            return LossError(f"{type(seen).__name__}: {seen}".partition("\n")[0])
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error


def shutdown() -> None:
    """Leave the cluster; a local one ends."""
    ray.shutdown()
