"""A graph as plain types, for a file: numbers, strings, containers and tensors."""

from __future__ import annotations

from typing import Any

from cvkernels.freeze.graph import Graph, Node, Ref
from cvkernels.freeze.ops import GRAPH_OPS, Call


def encode(graph: Graph) -> dict[str, Any]:
    """What :func:`decode` makes the graph of.

    Raises:
        ValueError: the graph calls code, or returns an instance of a class.
    """
    for node in graph.nodes:
        if isinstance(node.op, Call):
            raise ValueError(
                f"save: layer {node.layer!r} is a {node.op.called} that is called as it is, "
                f"and a file of plain types holds no code; use torch.save(frozen, path) and "
                f"torch.load(path, weights_only=False)"
            )
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    nodes = [
        {
            "op": node.op.name,
            "layer": node.layer,
            "note": node.note,
            "inputs": [numbers[source] for source in node.inputs],
            "attrs": dict(vars(node.op)),
        }
        for node in graph.nodes
    ]
    results = [numbers[node] for node in graph.results]
    return {"nodes": nodes, "results": results, "output": _encoded(graph.output)}


def decode(content: dict[str, Any]) -> Graph:
    nodes: list[Node] = []
    for fields in content["nodes"]:
        # encode writes none, and a chain of methods by name could reach any code.
        if fields["op"] == Call.name:
            raise ValueError("it calls code, which frozen.save never writes")
        op = GRAPH_OPS[fields["op"]](**fields["attrs"])
        inputs = [nodes[number] for number in fields["inputs"]]
        nodes.append(Node(op, inputs, fields["layer"], note=fields["note"]))
    results = [nodes[number] for number in content["results"]]
    return Graph(nodes, results, _decoded(content["output"]))


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
