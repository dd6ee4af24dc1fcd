"""Pages about the package's modules, from their docstrings.

The docstrings are Markdown, and the first of a module is its lecture: a page shows it whole, then
the public classes and functions in the order of the file. Nothing is imported, so the site builds
without torch.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring(node: ast.Module | ast.ClassDef | Function) -> str:
    return inspect.cleandoc(ast.get_docstring(node) or "")


def signature(node: Function, method: bool = False) -> str:
    """Name, parameters, and what is returned, as the source has them."""
    arguments = node.args
    plain = any(ast.unparse(d).endswith("staticmethod") for d in node.decorator_list)
    if method and not plain and arguments.args:
        arguments.args = arguments.args[1:]  # self
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(arguments)}){returns}"


def directive(kind: str, head: str, body: list[str], depth: int) -> str:
    """A MyST directive; the outermost has the longest fence."""
    fence = ":" * (6 - depth)
    inner = "\n\n".join(part for part in body if part)
    return f"{fence}{{py:{kind}}} {head}\n\n{inner}\n{fence}"


def public(name: str) -> bool:
    return not name.startswith("_")


def members(node: ast.ClassDef) -> Iterator[str]:
    """Fields and methods of a class."""
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            if public(child.target.id):
                head = f"{child.target.id}\n:type: {ast.unparse(child.annotation)}"
                yield directive("attribute", head, [], 1)
        elif isinstance(child, Function) and public(child.name):
            names = [ast.unparse(d) for d in child.decorator_list]
            if "property" in names:
                of = f"\n:type: {ast.unparse(child.returns)}" if child.returns else ""
                yield directive("property", child.name + of, [docstring(child)], 1)
            else:
                kind = "classmethod" if "classmethod" in names else "method"
                kind = "staticmethod" if "staticmethod" in names else kind
                yield directive(kind, signature(child, method=True), [docstring(child)], 1)


def describe(tree: ast.Module) -> Iterator[str]:
    """The public functions and classes of a module."""
    for node in tree.body:
        if isinstance(node, Function) and public(node.name):
            yield directive("function", signature(node), [docstring(node)], 0)
        elif isinstance(node, ast.ClassDef) and public(node.name):
            made = [c for c in node.body if isinstance(c, Function) and c.name == "__init__"]
            arguments = signature(made[0], method=True)[len("__init__") :] if made else ""
            head = node.name + arguments.removesuffix(" -> None")
            about = [docstring(node), *(docstring(c) for c in made), *members(node)]
            yield directive("class", head, about, 0)


def section(path: Path, name: str, title: str, level: int) -> str:
    """A module: its lecture, then what is in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = [
        f"{'#' * level} {title}",
        f"```{{py:module}} {name}\n```",
        docstring(tree),
        *describe(tree),
    ]
    return "\n\n".join(part for part in parts if part)


def pages(package: Path) -> dict[str, str]:
    """Page by name, for each module and each package within."""
    found = {}
    for path in sorted(package.glob("*.py")):
        if public(path.stem):
            found[path.stem] = section(path, f"{package.name}.{path.stem}", f"`{path.stem}`", 1)
    for first in sorted(package.glob("*/__init__.py")):
        folder = first.parent
        dotted = f"{package.name}.{folder.name}"
        parts = [section(first, dotted, f"`{folder.name}`", 1)]
        for path in sorted(folder.glob("*.py")):
            if public(path.stem):
                parts.append(section(path, f"{dotted}.{path.stem}", f"`{path.stem}`", 2))
        found[folder.name] = "\n\n".join(parts)
    return {name: text + "\n" for name, text in found.items()}
