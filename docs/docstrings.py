"""What griffe, which reads the docstrings for the site, has to be told of this package."""

from __future__ import annotations

import re
from typing import Any

import griffe

# Parameters that share an entry, and the entry's text: that of the first, others refer to it.
SHARED = re.compile(r"^( +)([a-z]\w*)((?:, [a-z]\w*)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
ROLE = re.compile(r":(?:mod|func|class|meth|data):`~?([\w.]+)`")


class OpFolders(griffe.Extension):
    """The folders of ops, which have no __init__.py (a function's name would shadow its folder)."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        if pkg.path != "cvkernels":
            return
        ops = pkg["ops"]
        for folder in sorted(path for path in ops.filepath.parent.iterdir() if path.is_dir()):
            if folder.name in ops.members:
                continue
            module = griffe.Module(folder.name, filepath=[folder], parent=ops)
            ops.set_member(folder.name, module)
            for file in sorted(folder.glob("*.py")):
                visited = griffe.visit(
                    file.stem, filepath=file, code=file.read_text(), parent=module,
                    lines_collection=loader.lines_collection,
                    modules_collection=loader.modules_collection,
                )  # fmt: skip
                module.set_member(file.stem, visited)
        _rewrite(pkg)


def _rewrite(parent: griffe.Object) -> None:
    """Every docstring, with an entry per parameter and names in place of Sphinx's roles."""
    if parent.docstring is not None:
        text = SHARED.sub(_apart, parent.docstring.value)
        parent.docstring.value = ROLE.sub(r"`\1`", text)
    for member in parent.members.values():
        if not member.is_alias:
            _rewrite(member)


def _apart(entry: re.Match) -> str:
    indent, first, others, text = entry.groups()
    lines = [f"{indent}{first}: {text}"]
    lines += [f"{indent}{name}: see `{first}`." for name in others.split(", ")[1:]]
    return "\n".join(lines)
