"""Finds the ops that use a file of csrc, and the texts on which the result of a mutant depends."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

from tools.mutants.mutations import Mutant, apply

#: A string or character literal, or a comment.
LITERAL_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\')|//[^\n]*|/\*.*?\*/', re.DOTALL)


def included(source: Path) -> set[str]:
    """Return the headers that a source of csrc includes, directly or not, as paths relative to csrc."""
    csrc = source.parent
    headers: set[str] = set()
    waiting = [source]
    while waiting:
        includer = waiting.pop()
        for name in re.findall(r'#include "([\w./]+)"', includer.read_text()):
            header = includer.parent / name
            path = str(header.relative_to(csrc))
            if path not in headers and header.exists():
                headers.add(path)
                waiting.append(header)
    return headers


def ops_of(file: str, csrc: Path) -> list[str]:
    """Return the ops whose kernels are compiled from this file. The op of the same name comes first."""
    stem = re.sub(r"(_cuda)?\.\w+$", "", Path(file).name)
    ops = [path.name.removesuffix("_cuda.cu") for path in sorted(csrc.glob("*_cuda.cu"))]
    users = [op for op in ops if file == f"{op}_cuda.cu" or file in included(csrc / f"{op}_cuda.cu")]
    return sorted(users, key=lambda op: (op != stem, ("matching", "nms", "detect").count(op) == 0))


def mutated_files(csrc: Path) -> list[str]:
    """Return the files of the kernels and the headers that they include."""
    kernels = sorted(csrc.glob("*_cuda.cu"))
    headers = {name for kernel in kernels for name in included(kernel)}
    return [path.name for path in kernels] + sorted(headers)


def sources_of(file: str, csrc: Path) -> dict[str, str]:
    """Return the texts of all files, by name, from which the ops that use this file are compiled."""
    kernels = {f"{op}_cuda.cu" for op in ops_of(file, csrc)}
    headers = {name for kernel in kernels for name in included(csrc / kernel)}
    return {name: (csrc / name).read_text() for name in sorted({file} | kernels | headers)}


@functools.lru_cache(maxsize=256)
def without_layout(text: str) -> str:
    """Return a C++ text without comments and layout, which changes only if the code changes.

    Every run of white space becomes one space, and none is left beside brackets, commas and semicolons. Preprocessor
    directives keep their line.
    """
    literals: list[str] = []

    def set_aside(match: re.Match[str]) -> str:
        if match[1] is None:
            return " "
        literals.append(match[1])
        return f"\0{len(literals) - 1}\0"

    text = LITERAL_OR_COMMENT.sub(set_aside, text)
    parts = []
    for directive, code in re.findall(r"^[ \t]*(#(?:\\\n|[^\n])*)|((?:^(?![ \t]*#)[^\n]*\n?)+)", text, re.MULTILINE):
        line = " ".join((directive or code).split())
        if line:
            parts.append(line if directive else re.sub(r" ?([()\[\]{},;]) ?", r"\1", line))
    return re.sub("\0(\\d+)\0", lambda match: literals[int(match[1])], "\n".join(parts))


def key_of(mutant: Mutant, sources: dict[str, str]) -> str:
    """Return the key of a mutant's result: a hash of the mutated code that `sources_of` returns."""
    changed = {**sources, mutant.file: apply(sources[mutant.file], mutant)}
    code = {name: without_layout(text) for name, text in changed.items()}
    return hashlib.sha256(json.dumps([mutant.file, code], sort_keys=True).encode()).hexdigest()[:20]
