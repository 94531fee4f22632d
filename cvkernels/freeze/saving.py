"""Frozen models and tables of choices in files of plain types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cvkernels.freeze.graph import Graph, Node, Ref

if TYPE_CHECKING:
    from cvkernels.freeze.frozen import Frozen

FORMAT = 1


def save(frozen: Frozen, path: str | Path) -> None:
    graph = frozen.graph
    for node in graph.nodes:
        if node.op == "call":
            raise ValueError(
                f"save: layer {node.layer!r} is a {_name(node.attrs['target'])} that is called as "
                f"it is, and a file of plain types holds no code; use torch.save(frozen, path) and "
                f"torch.load(path, weights_only=False)"
            )
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    nodes = [
        {
            "op": node.op,
            "layer": node.layer,
            "inputs": [numbers[source] for source in node.inputs],
            "attrs": node.attrs,
        }
        for node in graph.nodes
    ]
    content = {
        "format": FORMAT,
        "nodes": nodes,
        "results": [numbers[node] for node in graph.results],
        "output": _encoded(graph.output),
        "dtype": str(frozen.dtype).removeprefix("torch."),
        "device": str(frozen.device),
        "channels": frozen.channels,
        "table": dict(frozen.table),
    }
    torch.save(content, path)


def load_frozen(path: str | Path) -> Frozen:
    """The frozen model that ``frozen.save(path)`` wrote, on the device that it was frozen on.

    Nothing but tensors and plain types is read (``torch.load`` with ``weights_only=True``).

    Raises:
        ValueError: the file holds something else, or was written by a newer version.
    """
    from cvkernels.freeze.frozen import Frozen

    content = torch.load(path, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"load_frozen: {path} is no frozen model of this version; write one with "
            f"frozen.save(path)"
        )
    nodes: list[Node] = []
    for fields in content["nodes"]:
        inputs = [nodes[number] for number in fields["inputs"]]
        nodes.append(Node(fields["op"], inputs, fields["layer"], **fields["attrs"]))
    results = [nodes[number] for number in content["results"]]
    graph = Graph(nodes, results, _decoded(content["output"]))
    dtype = getattr(torch, content["dtype"])
    device = torch.device(content["device"])
    return Frozen(graph, dtype, device, content["table"], content["channels"])


def _name(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def _encoded(structure: Any) -> Any:
    """The structure in plain types: (kind, content)."""
    if isinstance(structure, Ref):
        return ("ref", structure.index)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        raise ValueError(
            f"save: the model returns a {type(structure).__name__}, and a file of plain types "
            f"holds no class; use torch.save(frozen, path) and torch.load(path, weights_only=False)"
        )
    if isinstance(structure, dict):
        return ("dict", {key: _encoded(value) for key, value in structure.items()})
    if isinstance(structure, (tuple, list)):
        kind = "tuple" if isinstance(structure, tuple) else "list"
        return (kind, [_encoded(value) for value in structure])
    return ("value", structure)


def _decoded(structure: tuple) -> Any:
    kind, content = structure
    if kind == "ref":
        return Ref(content)
    if kind == "dict":
        return {key: _decoded(value) for key, value in content.items()}
    if kind in ("tuple", "list"):
        parts = [_decoded(value) for value in content]
        return tuple(parts) if kind == "tuple" else parts
    return content


def read_table(table: Mapping[str, str] | str | Path | None) -> Mapping[str, str]:
    """The choices of a table or of the file that holds it."""
    if table is None:
        return {}
    if isinstance(table, (str, Path)):
        table = json.loads(Path(table).read_text())
    if not isinstance(table, Mapping):
        raise TypeError(
            f"freeze: table must be what cvkernels.tune returned, or its file, got "
            f"{type(table).__name__}"
        )
    return table
