"""Proposes mutants of CUDA kernels: changes of one line of device code that some test should notice.

    barrier     remove a __syncthreads, __syncwarp or __threadfence
    compare     exchange < and <=, > and >=, == and !=
    shift       move one side of an order comparison by one
    mask        clear the upper half of a full warp mask
    guard       replace a condition, or one conjunct of it, by true

Device code is the code in functions marked __global__, __device__ or HOST_DEVICE, outside `#ifdef __CUDA_ARCH__`.
Constant expressions are not mutated. In `a < b ? a : b` of integers, `<` does not become `<=`, because the result would
stay the same.

`switched` writes all mutants of a file into one text, in which `mutant_is(NUMBER)` selects one at run time. All mutants
are therefore compiled together, once.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MARKS = re.compile(r"\b(__global__|__device__|HOST_DEVICE)\b")
#: clang-format puts spaces around operators and none inside template brackets.
COMPARISON = re.compile(r" (<=|>=|<|>|==|!=) ")
EXCHANGED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
BARRIER = re.compile(r"\b(__syncthreads\(\)|__syncwarp\([^()]*\)|__threadfence\(\));")
MASK = re.compile(r"\bkFullMask\b")
HALF_MASK = "0x0000ffffu"
#: Operands that occur only in comparisons of integers. They take precedence over the names in FLOATING.
INTEGER = re.compile(r"\b(threadIdx|warp|size|count|int64_t|num_\w+|k(?!Max\b)[A-Z]\w*|\d{2,})\b")
#: Operands that are floating-point numbers, for which a shift by one has no meaning.
FLOATING = re.compile(
    r"T\(\d|\b(iou|best_iou|min_iou|fg_iou|bg_iou|iou_threshold|inf|w|h|a|b|x|z|low|limit|log_ratio|min_log_ratio"
    r"|max_log_ratio|ratio|inter|logit|overlap|threshold|alpha|softplus|kMax)\b"
)
CONSTANT = re.compile(r"\b(static_assert|operator|constexpr|using)\b")
#: Text before the left operand of a comparison and text after its right operand, outside brackets.
BEFORE = re.compile(r"(&& |\|\| | \? | : |, |; |[^<>=!]= |\breturn |\{)$")
AFTER = re.compile(r" (&&|\|\||\?|:)( |$)|[,;{}]")
#: A name or a call that is a whole conjunct.
CONJUNCT = re.compile(
    r"(?:(?<=\()|(?<=&& )|(?<=[^<>=!]= )|(?<=; )|(?<=, )|(?<=return ))(?P<left>!?[\w.]+(?:\([^()]*\))?)(?= && )"
    r"|(?<= && )(?P<right>!?[\w.]+(?:\([^()]*\))?)(?=[);,]|:(?!:)| \?|$)"
)


#: Description of a change, start and end of the replaced text on the line, and the replacement.
Change = tuple[str, int, int, str]


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        file: Path relative to csrc.
        number: Number of the line, from 0.
        before: The unchanged line, of which `before[start:end]` is replaced.
        start: Start of the replaced text.
        end: End of the replaced text.
        by: The replacement.
        kind: barrier, compare, shift, mask or guard.
        id: The file, the text of the line, its number among equal lines, and the change. Moving lines does not change
            the id.
    """

    file: str
    number: int
    before: str
    start: int
    end: int
    by: str
    kind: str
    id: str

    @property
    def after(self) -> str:
        """Return the changed line."""
        return self.before[: self.start] + self.by + self.before[self.end :]


def device_lines(text: str) -> list[bool]:
    """Return for each line whether it is device code."""
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
    """Return the start and the end of the comparison whose operator is `code[start:end]`."""
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
    """Return whether a comparison compares integers, so that a shift by one makes sense."""
    return bool(INTEGER.search(comparison)) or not FLOATING.search(comparison)


def closing(code: str, opening: int) -> int | None:
    """Return the position of the bracket that closes the one at `opening`, None if it is on another line."""
    depth = 0
    for position in range(opening, len(code)):
        depth += (code[position] == "(") - (code[position] == ")")
        if depth == 0:
            return position
    return None


def loop_ends(code: str, left: int) -> bool:
    """Return whether the comparison at `left` ends its loop, which would not end if the comparison were true."""
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
    """Return whether a comparison of integers selects one of its own operands.

    The operands are equal where < and <= differ, so exchanging the two changes nothing.
    """
    operands = {code[left : comparison.start()], code[comparison.end() : right]}
    choice = re.match(r" \? (?:int\()?(.+?)\)? : (.+?)[;)]", code[right:])
    return choice is not None and {choice[1], choice[2]} == operands and compares_indices(code[left:right])


def comparisons(code: str) -> Iterator[Change]:
    """Yield the changes of the comparisons on one line."""
    for order, match in enumerate(COMPARISON.finditer(code), 1):
        start, end, operator = match.start(1), match.end(1), match[1]
        left, right = operand_bounds(code, start, end)
        label = f"`{code[left:right]}`" + (f" ({order})" if len(COMPARISON.findall(code)) > 1 else "")
        if not chooses(match, code, left, right):
            exchanged = code[left:start] + EXCHANGED[operator] + code[end:right]
            yield f"compare {label}: {EXCHANGED[operator]}", left, right, exchanged
        if operator not in ("==", "!=") and compares_indices(code[left:right]):
            # `a < b` becomes `a + 1 < b`. The other direction, `a - 1 < b`, is `a <= b`, which "compare" makes.
            shift = {"<": "+ 1", "<=": "- 1", ">": "- 1", ">=": "+ 1"}[operator]
            yield f"shift {label}: {shift}", left, right, f"{code[left : start - 1]} {shift}{code[start - 1 : right]}"
        if not loop_ends(code, left):
            yield f"guard {label}", left, right, "true"


def conditions(code: str) -> Iterator[Change]:
    """Yield the changes of conditions on one line: whole conditions of `if`, and names and calls joined by &&."""
    for match in re.finditer(r"\bif \(", code):
        end = closing(code, match.end() - 1)
        if end is not None:
            yield f"guard `{code[match.end() : end]}`", match.end(), end, "true"
    for match in CONJUNCT.finditer(code):
        yield f"guard `{match['left'] or match['right']}`", match.start(), match.end(), "true"


def changes(code: str) -> Iterator[Change]:
    """Yield all changes of one line."""
    for match in BARRIER.finditer(code):
        yield f"barrier `{match[1]}`", match.start(), match.end(), ";"
    for order, match in enumerate(MASK.finditer(code), 1):
        yield f"mask {order}", match.start(), match.end(), HALF_MASK
    yield from comparisons(code)
    yield from conditions(code)


def mutants(file: str, text: str) -> list[Mutant]:
    """Return all mutants of one file."""
    lines, chosen = text.splitlines(), device_lines(text)
    seen: Counter[str] = Counter()
    result = []
    for number, line in enumerate(lines):
        if not chosen[number]:
            continue
        code = re.sub(r"\s*//.*", "", line)
        seen[code.strip()] += 1
        which = f" #{seen[code.strip()]}" if seen[code.strip()] > 1 else ""
        if CONSTANT.search(code):
            continue
        texts = {line}
        for what, start, end, by in changes(code):
            name = f"{file}: {code.strip()}{which} | {what}"
            mutant = Mutant(file, number, line, start, end, by, what.split()[0], name)
            if mutant.after not in texts:
                texts.add(mutant.after)
                result.append(mutant)
    return result


def switched(text: str, numbers: Mapping[Mutant, int]) -> str:
    """Return the text of a file with all its mutants, of which `mutant_is(NUMBER)` selects one, from number 1."""
    lines = text.split("\n")
    by_line: dict[int, list[Mutant]] = defaultdict(list)
    for mutant in numbers:
        by_line[mutant.number].append(mutant)
    for number, on_line in by_line.items():
        lines[number] = switched_part(lines[number], 0, len(lines[number]), on_line, numbers)
    return "\n".join(lines)


def switched_part(line: str, start: int, end: int, within: list[Mutant], numbers: Mapping[Mutant, int]) -> str:
    """Return `line[start:end]` with these mutants, all of which lie within it."""
    spans = sorted({(mutant.start, mutant.end) for mutant in within}, key=lambda span: (span[0], -span[1]))
    parts, done = [], start
    for left, right in spans:
        if left < done:
            if right > done:
                raise ValueError(f"mutants of {line!r} overlap")
            continue  # the span is inside the previous one
        here = [mutant for mutant in within if (mutant.start, mutant.end) == (left, right)]
        inside = [m for m in within if left <= m.start and m.end <= right and m not in here]
        switch = switched_part(line, left, right, inside, numbers)
        for mutant in here:
            switch = alternative(switch, mutant, numbers[mutant])
        parts += [line[done:left], switch]
        done = right
    return "".join([*parts, line[done:end]])


def alternative(switch: str, mutant: Mutant, number: int) -> str:
    """Return code that runs the mutant if it is selected, and `switch` otherwise."""
    if mutant.kind == "barrier":
        return f"{{ if (!mutant_is({number})) {switch} }}"
    if mutant.by == "true":
        return f"(mutant_is({number}) || ({switch}))"
    return f"(mutant_is({number}) ? ({mutant.by}) : ({switch}))"


def apply(text: str, mutant: Mutant) -> str:
    """Return the file with the mutant in place of the unchanged line."""
    lines = text.split("\n")
    if lines[mutant.number] != mutant.before:
        raise ValueError(f"line {mutant.number + 1} of {mutant.file} is not {mutant.before!r}")
    lines[mutant.number] = mutant.after
    return "\n".join(lines)
