"""A few lines over `onnx.helper`, so that a graph reads like the computation it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 9  # what onnxruntime has read since 1.16; newer onnx packages would write a version older runtimes refuse

Value = str | np.ndarray | int | float
"""A tensor of the graph by name, or a constant: int becomes int64, float becomes float32."""

Shape = Sequence[int | str]
"""Dimensions; a text is a dynamic one's name."""
Output = tuple[str, Shape]
"""A tensor of the graph and the shape it is announced with."""


class Graph:
    """Collects the nodes and constants of one ONNX graph; every method that adds a node returns its output's name."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def const(self, value: np.ndarray | int | float) -> str:
        """Name of a constant tensor."""
        if not isinstance(value, np.ndarray):
            value = np.asarray(value, dtype=np.int64 if isinstance(value, int) else np.float32)
        name = f"c{len(self._constants)}"
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def op(self, kind: str, *inputs: Value, name: str | None = None, **attributes: Any) -> str:
        """Add a node of one output and return that output's name; an input of "" is an optional one left out."""
        return self.ops(kind, 1, *inputs, name=name, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: Value, name: str | None = None, **attributes: Any) -> list[str]:
        """Add a node of several outputs and return their names."""
        names = [value if isinstance(value, str) else self.const(value) for value in inputs]
        label = name or f"{kind}_{len(self._nodes)}"
        results = [label if outputs == 1 else f"{label}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, names, results, name=label, **attributes))
        return results

    def cast(self, value: Value, to: type) -> str:
        """Cast to a numpy scalar type."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(to)))

    def pick(self, vector: Value, index: int) -> str:
        """Element `index` of a vector, as a scalar."""
        return self.op("Gather", vector, index)

    def column(self, value: Value, axis: int = 1) -> str:
        """`value` with a new axis of length 1 at `axis`."""
        return self.op("Unsqueeze", value, np.array([axis]))

    def flat(self, value: Value) -> str:
        """`value` as a vector."""
        return self.op("Reshape", value, np.array([-1]))

    def slice(self, value: Value, axis: int, start: int, stop: int) -> str:
        """`value[start:stop]` along one axis."""
        return self.op("Slice", value, np.array([start]), np.array([stop]), np.array([axis]))

    def save(
        self,
        path: Path,
        inputs: Mapping[str, Shape],
        outputs: Mapping[str, Output],
    ) -> None:
        """Check the graph and write it.

        Args:
            path: the file.
            inputs: name to shape; all are float32.
            outputs: name to (tensor of the graph, shape), float32.
        """
        for public, (tensor, _) in outputs.items():
            self._nodes.append(helper.make_node("Identity", [tensor], [public], name=f"out_{public}"))
        graph = helper.make_graph(
            self._nodes,
            path.stem,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, (_, s) in outputs.items()],
            list(self._constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "ipvg_ray"
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString())
