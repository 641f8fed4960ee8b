"""Proposes mutants of CUDA kernels: small changes of one line of device code, each of which some test should notice.

    barrier     a __syncthreads or __syncwarp is left out
    compare     < and <= are exchanged, > and >=, == and !=
    shift       one side of an order comparison moves by one
    mask        a full warp mask loses its upper half
    guard       a condition, or one conjunct of it, is taken to be true

Device code is what functions marked __global__, __device__ or HOST_DEVICE hold, outside of `#ifdef __CUDA_ARCH__`.
Left out are constant expressions, and `a < b ? a : b` of integers with `<=`, which is the same function.

`switched` writes all mutants of a file into one text, in which `mutant_is(NUMBER)` chooses at run time: they are
compiled together, once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
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
CONSTANT = re.compile(r"\b(static_assert|operator|constexpr)\b")
#: Where an operand of a comparison begins and ends, outside of brackets.
BEFORE = re.compile(r"(&& |\|\| | \? | : |, |; |[^<>=!]= |\breturn |\{)$")
AFTER = re.compile(r" (&&|\|\||\?|:)( |$)|[,;{}]")
#: A name or call that is a whole conjunct.
CONJUNCT = re.compile(
    r"(?:(?<=\()|(?<=&& )|(?<=[^<>=!]= )|(?<=; )|(?<=, )|(?<=return ))(?P<left>!?[\w.]+(?:\([^()]*\))?)(?= && )"
    r"|(?<= && )(?P<right>!?[\w.]+(?:\([^()]*\))?)(?=[);,]|:(?!:)| \?|$)"
)


#: What is done, where it begins and ends on the line, and what takes its place.
Change = tuple[str, int, int, str]


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    file: str
    number: int  # of the line, from 0
    before: str
    start: int  # what is replaced: before[start:end]
    end: int
    by: str
    kind: str
    id: str  # stays the same when lines move: file, the line's text, which of several equal lines, what is changed

    @property
    def after(self) -> str:
        """The changed line."""
        return self.before[: self.start] + self.by + self.before[self.end :]


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


def chooses(comparison: re.Match[str], code: str, left: int, right: int) -> bool:
    """Whether a comparison of integers chooses between its own operands, which are equal where < and <= differ."""
    operands = {code[left : comparison.start()], code[comparison.end() : right]}
    choice = re.match(r" \? (?:int\()?(.+?)\)? : (.+?)[;)]", code[right:])
    return choice is not None and {choice[1], choice[2]} == operands and compares_indices(code[left:right])


def comparisons(code: str) -> Iterator[Change]:
    """Mutants of the comparisons of one line."""
    for order, match in enumerate(COMPARISON.finditer(code), 1):
        start, end, operator = match.start(1), match.end(1), match[1]
        left, right = operand_bounds(code, start, end)
        label = f"`{code[left:right]}`" + (f" ({order})" if len(COMPARISON.findall(code)) > 1 else "")
        if not chooses(match, code, left, right):
            exchanged = code[left:start] + EXCHANGED[operator] + code[end:right]
            yield f"compare {label}: {EXCHANGED[operator]}", left, right, exchanged
        if operator not in ("==", "!=") and compares_indices(code[left:right]):
            # Next to the other boundary: `a < b` becomes `a + 1 < b`, since `a - 1 < b` is `a <= b`.
            shift = {"<": "+ 1", "<=": "- 1", ">": "- 1", ">=": "+ 1"}[operator]
            yield f"shift {label}: {shift}", left, right, f"{code[left : start - 1]} {shift}{code[start - 1 : right]}"
        if not loop_ends(code, left):
            yield f"guard {label}", left, right, "true"


def conditions(code: str) -> Iterator[Change]:
    """Mutants of conditions that are no single comparison: whole `if`s, and names and calls joined by &&."""
    for match in re.finditer(r"\bif \(", code):
        end = closing(code, match.end() - 1)
        if end is not None:
            yield f"guard `{code[match.end() : end]}`", match.end(), end, "true"
    for match in CONJUNCT.finditer(code):
        yield f"guard `{match['left'] or match['right']}`", match.start(), match.end(), "true"


def changes(code: str) -> Iterator[Change]:
    """All mutants of one line of code."""
    for match in BARRIER.finditer(code):
        yield f"barrier `{match[1]}`", match.start(), match.end(), ";"
    for order, match in enumerate(MASK.finditer(code), 1):
        yield f"mask {order}", match.start(), match.end(), HALF_MASK
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
        code = re.sub(r"\s*//.*", "", line)
        seen[code.strip()] += 1
        which = f" #{seen[code.strip()]}" if seen[code.strip()] > 1 else ""
        if CONSTANT.search(code):
            continue
        results = {line}
        for what, start, end, by in changes(code):
            name = f"{file}: {code.strip()}{which} | {what}"
            mutant = Mutant(file, number, line, start, end, by, what.split()[0], name)
            if mutant.after not in results:
                results.add(mutant.after)
                found.append(mutant)
    return found


def switched(text: str, numbers: Mapping[Mutant, int]) -> str:
    """The file with all its mutants in it: `mutant_is` says by their numbers, from 1, which one runs."""
    lines = text.split("\n")
    by_line: dict[int, list[Mutant]] = defaultdict(list)
    for mutant in numbers:
        by_line[mutant.number].append(mutant)
    for number, found in by_line.items():
        lines[number] = switched_part(lines[number], 0, len(lines[number]), found, numbers)
    return "\n".join(lines)


def switched_part(line: str, start: int, end: int, found: list[Mutant], numbers: Mapping[Mutant, int]) -> str:
    """line[start:end] with these mutants, all of which lie in it."""
    spans = sorted({(mutant.start, mutant.end) for mutant in found}, key=lambda span: (span[0], -span[1]))
    parts, done = [], start
    for left, right in spans:
        if left < done:
            if right > done:
                raise ValueError(f"mutants of {line!r} overlap")
            continue  # inside of the span before
        here = [mutant for mutant in found if (mutant.start, mutant.end) == (left, right)]
        inside = [m for m in found if left <= m.start and m.end <= right and m not in here]
        switch = switched_part(line, left, right, inside, numbers)
        for mutant in here:
            switch = alternative(switch, mutant, numbers[mutant])
        parts += [line[done:left], switch]
        done = right
    return "".join([*parts, line[done:end]])


def alternative(switch: str, mutant: Mutant, number: int) -> str:
    """Code that does what the mutant does, or else what `switch` does."""
    if mutant.kind == "barrier":
        return f"{{ if (!mutant_is({number})) {switch} }}"
    if mutant.by == "true":
        return f"(mutant_is({number}) || ({switch}))"
    return f"(mutant_is({number}) ? ({mutant.by}) : ({switch}))"


def apply(text: str, mutant: Mutant) -> str:
    """The file with the mutant's line."""
    lines = text.split("\n")
    if lines[mutant.number] != mutant.before:
        raise ValueError(f"line {mutant.number + 1} of {mutant.file} is not {mutant.before!r}")
    lines[mutant.number] = mutant.after
    return "\n".join(lines)
