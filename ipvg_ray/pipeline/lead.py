"""How far a stage may run ahead of the next one: a backpressure policy for Ray Data, counted in rows.

Ray's own policies count bytes of the object store, and only once half of it is full. A million rows of text would wait
in front of the videos as a million blocks, each a few kilobytes of the driver's memory; and while a pool of GPUs is
still being fetched, nothing would hold the stages before it. Here the rows that wait in front of a stage are bounded
from the start.

With `execute.py` this is all that knows Ray Data, and it uses what is internal to it: `ray < 2.64`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray.data import DataContext
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data._internal.execution.operators.union_operator import UnionOperator

_ROWS = "ipvg_ray.rows_ahead"
_PROMISES = "ipvg_ray.promises"
_DEALING = "StreamingRepartition"
"""Ray's name for operators that only cut the stream into other blocks."""


class GivenUpError(Exception):
    """The execution was given up; the message says why."""


_given_up: list[str] = []
"""Why the execution under way is given up, if it is. Ray Data has no call to end one from another thread."""


def give_up(why: str) -> None:
    """End the execution that is under way in this process with a `GivenUpError`, from any thread."""
    _given_up.append(why)


def bound_lead(context: DataContext, rows_ahead: Mapping[str, int], promises: Mapping[str, int]) -> None:
    """Let at most about so many rows wait in front of each stage, beside those that are being made.

    Args:
        rows_ahead: rows by stage name; each at least two batches of the stage, so that a batch can fill up.
        promises: rows that are counted on from each task of a reader that is under way, by the reader's name.
    """
    _given_up.clear()
    context.set_config(_ROWS, dict(rows_ahead))
    context.set_config(_PROMISES, dict(promises))
    policies = [*ENABLED_BACKPRESSURE_POLICIES, LeadPolicy]
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, policies)


class LeadPolicy(BackpressurePolicy):
    """Holds back whatever feeds a stage in front of which enough rows wait."""

    def __init__(self, data_context: DataContext, topology: Any, resource_manager: Any) -> None:
        super().__init__(data_context, topology, resource_manager)
        rows_ahead = data_context.get_config(_ROWS, {})
        self.promises = {
            op: rows
            for op in topology
            for reader, rows in data_context.get_config(_PROMISES, {}).items()
            if f"({reader})" in op.name and not isinstance(op, ActorPoolMapOperator)
        }
        self.feeds: dict[Any, tuple[Any, list[Any], int]] = {}
        for stage in topology:
            for name, rows in rows_ahead.items():
                if isinstance(stage, ActorPoolMapOperator) and f"({name})" in stage.name:
                    sources = list(_sources(stage))
                    self.feeds.update(dict.fromkeys(sources, (stage, sources, rows)))

    def _enough(self, op: Any, promised: int = 0) -> bool:
        if op not in self.feeds:
            return False
        stage, sources, rows = self.feeds[op]
        made = sum(source.metrics.rows_task_outputs_generated for source in sources)
        return bool(made + promised - stage.metrics.rows_inputs_of_submitted_tasks >= rows)

    def _promised(self, op: Any) -> int:
        """About what a reader's tasks under way will still deal.

        Without it another task would begin while one waits to hand on its rows, in a process of its own, which Ray
        ends when it has been idle and starts again at the next: that costs more than all reading.
        """
        return int(op.metrics.num_tasks_running) * self.promises.get(op, 0)

    def can_add_input(self, op: Any) -> bool:
        """Whether the operator may begin another task."""
        return not self._enough(op, self._promised(op))

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        """Bytes that may be taken from tasks that are under way: readers wait while nothing is taken.

        Asked in every turn of Ray Data's own loop. Raises GivenUpError.
        """
        if _given_up:
            raise GivenUpError(_given_up[0])
        return 0 if self._enough(op) else None


def _sources(op: Any) -> Iterator[Any]:
    """The operators whose rows reach `op` unchanged: stages and readers."""
    for before in op.input_dependencies:
        if isinstance(before, UnionOperator) or before.name.startswith(_DEALING):
            yield from _sources(before)
        else:
            yield before
