"""Proposes mutants of CUDA kernels: small changes of one line of device code, each of which some test should notice.

    barrier     a __syncthreads or __syncwarp is left out
    compare     < and <= are exchanged, > and >=, == and !=
    shift       one side of an order comparison moves by one
    mask        a full warp mask loses its upper half
    guard       a condition, or one conjunct of it, is taken to be true

Device code is what functions marked __global__, __device__ or HOST_DEVICE hold, outside of `#ifdef __CUDA_ARCH__`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

MARKS = re.compile(r"\b(__global__|__device__|HOST_DEVICE)\b")
#: clang-format puts spaces around operators and none inside of template brackets.
COMPARISON = re.compile(r" (<=|>=|<|>|==|!=) ")
EXCHANGED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\([^()]*\));")
MASK = re.compile(r"\bkFullMask\b")
HALF_MASK = "0x0000ffffu"
#: Operands that show that a comparison is one of integers, whatever short names stand beside them.
INTEGER = re.compile(r"\b(threadIdx|warp|size|count|int64_t|num_\w+|k(?!Max\b)[A-Z]\w*|\d{2,})\b")
#: Operands of comparisons that are not indices: a shift by one has no meaning for them.
FLOATING = re.compile(
    r"T\(\d|\b(iou|best_iou|min_iou|fg_iou|bg_iou|iou_threshold|inf|w|h|a|b|x|z|low|limit|log_ratio|min_log_ratio"
    r"|max_log_ratio|ratio|inter|logit|overlap|threshold|alpha|softplus|kMax)\b"
)
#: Where an operand of a comparison begins and ends, outside of brackets.
BEFORE = re.compile(r"(&& |\|\| | \? | : |, |; |[^<>=!]= |\breturn |\{)$")
AFTER = re.compile(r" && | \|\| | \? | : |[,;{}]")
#: A name or call that is a whole conjunct.
CONJUNCT = re.compile(
    r"(?:(?<=\()|(?<=&& )|(?<=[^<>=!]= )|(?<=; )|(?<=, )|(?<=return ))(?P<left>!?[\w.]+(?:\([^()]*\))?)(?= && )"
    r"|(?<= && )(?P<right>!?[\w.]+(?:\([^()]*\))?)(?=[);:,]| \?|$)"
)


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    file: str
    number: int  # of the line, from 0
    before: str
    after: str
    kind: str
    id: str  # stays the same when lines move: file, the line's text, which of several equal lines, what is changed


def device_lines(text: str) -> list[bool]:
    """Whether each line is device code."""
    lines = text.splitlines()
    chosen = [False] * len(lines)
    depth, inside, hidden = 0, False, 0
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if code.startswith("#"):
            if re.match(r"#if.*__CUDA_ARCH__", code) or (hidden and code.startswith("#if")):
                hidden += 1
            elif hidden and re.match(r"#(else|endif)", code):
                hidden -= 1
            continue
        if hidden or not code.strip():
            continue
        if not inside and MARKS.search(code) and not code.rstrip().endswith(";"):
            inside, depth, opened = True, 0, False
        if inside:
            chosen[number] = opened or "{" in code
            depth += code.count("{") - code.count("}")
            opened = opened or "{" in code
            if opened and depth <= 0:
                inside = False
    return chosen


def operand_bounds(code: str, start: int, end: int) -> tuple[int, int]:
    """Where the comparison with the operator at start..end begins and ends."""
    depth, left = 0, start
    while left > 0 and not (depth == 0 and BEFORE.search(code[:left])):
        depth += (code[left - 1] in ")]") - (code[left - 1] in "([")
        if depth < 0:
            break
        left -= 1
    depth, right = 0, end
    while right < len(code) and not (depth == 0 and AFTER.match(code, right)):
        depth += (code[right] in "([") - (code[right] in ")]")
        if depth < 0:
            break
        right += 1
    while code[left] == " ":
        left += 1
    return left, right - (len(code[:right]) - len(code[:right].rstrip()))


def compares_indices(comparison: str) -> bool:
    """Whether the next integer is another case for the comparison."""
    return bool(INTEGER.search(comparison)) or not FLOATING.search(comparison)


def closing(code: str, opening: int) -> int | None:
    """Position of the bracket that closes the one at `opening`, if it is on the line."""
    depth = 0
    for position in range(opening, len(code)):
        depth += (code[position] == "(") - (code[position] == ")")
        if depth == 0:
            return position
    return None


def loop_ends(code: str, left: int) -> bool:
    """Whether the comparison that begins at `left` is the one that ends its loop: without it, nothing would."""
    loop = re.match(r"\s*(for|while) \(", code)
    if loop is None and not re.search(r"\bfor \([^;]*;[^;]*$", code[:left]):
        return False
    body = closing(code, code.index("(")) if loop else None
    if body is not None and left > body:
        return False
    variable = re.match(r"\w+", code[left:])
    advanced = variable and re.search(rf"(\+\+{variable[0]}\b|\b{variable[0]} \+= )", code)
    return bool(advanced) or "&&" not in code


def comparisons(code: str) -> Iterator[tuple[str, str]]:
    """Mutants of the comparisons of one line: what is done, and the changed line."""
    for order, match in enumerate(COMPARISON.finditer(code), 1):
        start, end, operator = match.start(1), match.end(1), match[1]
        left, right = operand_bounds(code, start, end)
        label = f"`{code[left:right]}`" + (f" ({order})" if len(COMPARISON.findall(code)) > 1 else "")
        yield f"compare {label}: {EXCHANGED[operator]}", code[:start] + EXCHANGED[operator] + code[end:]
        if operator not in ("==", "!=") and compares_indices(code[left:right]):
            # Next to the other boundary: `a < b` becomes `a + 1 < b`, since `a - 1 < b` is `a <= b`.
            shift = {"<": "+ 1", "<=": "- 1", ">": "- 1", ">=": "+ 1"}[operator]
            yield f"shift {label}: {shift}", f"{code[: start - 1]} {shift}{code[start - 1 :]}"
        if not loop_ends(code, left):
            yield f"guard {label}", code[:left] + "true" + code[right:]


def conditions(code: str) -> Iterator[tuple[str, str]]:
    """Mutants of conditions that are no single comparison: whole `if`s, and names and calls joined by &&."""
    for match in re.finditer(r"\bif \(", code):
        end = closing(code, match.end() - 1)
        if end is not None:
            yield f"guard `{code[match.end() : end]}`", code[: match.end()] + "true" + code[end:]
    for match in CONJUNCT.finditer(code):
        name = match["left"] or match["right"]
        yield f"guard `{name}`", code[: match.start()] + "true" + code[match.end() :]


def changes(code: str) -> Iterator[tuple[str, str]]:
    """All mutants of one line of code."""
    for match in BARRIER.finditer(code):
        yield f"barrier `{match[1]}`", code[: match.start()] + ";" + code[match.end() :]
    for order, match in enumerate(MASK.finditer(code), 1):
        yield f"mask {order}", code[: match.start()] + HALF_MASK + code[match.end() :]
    yield from comparisons(code)
    yield from conditions(code)


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of one file."""
    lines, chosen = text.splitlines(), device_lines(text)
    seen: Counter[str] = Counter()
    found = []
    for number, line in enumerate(lines):
        if not chosen[number]:
            continue
        code, comment = re.match(r"(.*?)(\s*//.*)?$", line).groups()  # type: ignore[union-attr]
        seen[code.strip()] += 1
        which = f" #{seen[code.strip()]}" if seen[code.strip()] > 1 else ""
        if re.search(r"\bstatic_assert\b|\boperator\b", code):
            continue
        results = {code}
        for what, changed in changes(code):
            if changed not in results:
                results.add(changed)
                name = f"{file}: {code.strip()}{which} | {what}"
                found.append(Mutant(file, number, line, changed + (comment or ""), what.split()[0], name))
    return found


def apply(text: str, mutant: Mutant) -> str:
    """The file with the mutant's line."""
    lines = text.split("\n")
    if lines[mutant.number] != mutant.before:
        raise ValueError(f"line {mutant.number + 1} of {mutant.file} is not {mutant.before!r}")
    lines[mutant.number] = mutant.after
    return "\n".join(lines)
