"""What a compiled program does on one device, read from its HLO text: products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, and with it only one of all scanned layers. Here everything is
counted as often as it runs: trip counts come from the loops' conditions. Arrays in on-chip memory (`S(1)` and the like
in a layout) are no memory traffic, a slice of an array reads the slice only, and an update in place writes the update.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
# What moves no data of its own: names for arrays, and what is counted inside.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "custom-call", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its element type, its sizes, and whether it lies in main memory."""

    dtype: str
    sizes: tuple[int, ...]
    is_main: bool

    @property
    def bytes(self) -> int:
        """Its size, padding of tiles left out."""
        width = _BYTES.get(self.dtype) or max(int(re.sub(r"\D.*", "", self.dtype.lstrip("suf")) or 8) // 8, 1)
        return math.prod(self.sizes) * (0 if self.dtype == "token" else width)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The computation that `name=%...` refers to, or ""."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else ""


@dataclasses.dataclass
class Cost:
    """What runs on one device.

    Attributes:
        flops: of matrix products, two per multiplication.
        bytes: read from and written to main memory.
        collectives: by kind, the bytes each device sends (a ring's share: an all-reduce moves an array about twice).
        counts: by kind, how many run.
        network: bytes each device sends to other slices (a ring's share).
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    network: float = 0.0

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds what another computation does, so many times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.network += times * other.network
        for mine, theirs in ((self.collectives, other.collectives), (self.counts, other.counts)):
            for kind, value in theirs.items():
                mine[kind] += times * value


class Program:
    """A parsed module.

    Args:
        text: `compiled.as_text()`.
        steps: trips of loops whose end depends on data (decoding): the most that they may take.
        once: count every loop as one trip, as XLA's cost analysis does.
    """

    def __init__(self, text: str, steps: int = 1, once: bool = False):
        """Parses the text."""
        self._steps, self._once = steps, once
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._known: dict[tuple[str, bool], Cost] = {}
        self._entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{", line)
            if header and not line.startswith((" ", "HloModule")):
                current = self._computations[header[2]] = {}
                self._entry = header[2] if header[1] else self._entry
            elif line.startswith("  ") and " = " in line:
                instruction = _instruction(line)
                current[instruction.name] = instruction

    @cached_property
    def cost(self) -> Cost:
        """Of one run of the program."""
        return self._cost(self._entry, is_fused=False)

    def _cost(self, name: str, is_fused: bool) -> Cost:
        if (name, is_fused) in self._known:
            return self._known[name, is_fused]
        total = self._known[name, is_fused] = Cost()
        computation = self._computations[name]
        for one in computation.values():
            if one.opcode in ("convolution", "dot"):
                total.flops += _flops(one, computation)
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # A reduction fused with the slice that follows it sends what a reduce-scatter does.
                is_scatter = is_fused and kind == "all-reduce" and "all-reduce-scatter" in name
                kind = "reduce-scatter" if is_scatter else kind
                total.collectives[kind] += _sent(kind, one, computation)
                total.counts[kind] += 1
            if one.opcode == "send":
                total.network += _sent_to_slices(one, computation)
            for attribute in ("calls", "called_computation"):
                if one.attribute(attribute) and one.opcode in ("fusion", "call", "async-start"):
                    total.add(self._cost(one.attribute(attribute), one.opcode == "fusion"))
            if one.opcode == "call":
                total.add(self._cost(one.attribute("to_apply"), is_fused=False))
            elif one.opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", one.rest.partition("branch_computations=")[2].partition("}")[0])
                branches = branches or [one.attribute("true_computation"), one.attribute("false_computation")]
                total.add(max((self._cost(branch, False) for branch in branches), key=lambda cost: cost.flops))
            elif one.opcode == "while":
                trips = 1 if self._once else self._trips(one, computation)
                total.add(self._cost(one.attribute("body"), False), trips)
                total.add(self._cost(one.attribute("condition"), False), trips + 1)
            if not is_fused:
                total.bytes += self._traffic(one, computation)
        return total

    # ---- loops -------------------------------------------------------------------------------------------------------

    def _trips(self, loop: Instruction, around: Mapping[str, Instruction]) -> int:
        """How often a loop runs: what XLA says, or what its counter, start, step and bound say, or `steps`."""
        if found := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(found[1])
        condition = self._computations[loop.attribute("condition")]
        body = self._computations[loop.attribute("body")]
        test = next(one for one in condition.values() if one.is_root)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return self._steps
        index = _element(condition.get(test.operands[0]))
        bound = _constant(condition.get(test.operands[1]))
        if index is None or bound is None:
            return self._steps
        start = _constant(_source(around, around[loop.operands[0]].operands, index))
        step = 1
        following = _source(body, next(one for one in body.values() if one.is_root).operands, index)
        if following is not None and following.opcode == "add":
            steps = [_constant(body.get(operand)) for operand in following.operands]
            step = next((one for one in steps if one), 1)
        return -(-(bound - (start or 0)) // step)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _traffic(self, one: Instruction, computation: Mapping[str, Instruction]) -> float:
        """Bytes that an instruction outside fusions reads from and writes to main memory."""
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return 0.0
        shapes = [computation[name].shapes for name in one.operands if name in computation]
        if one.opcode == "fusion":
            return self._fusion_traffic(self._computations[one.attribute("calls")], one.shapes)
        if one.opcode.endswith("-start"):  # operands and results side by side; a copy names its result first
            count = sum(map(len, shapes))
            results = one.shapes[:1] if one.opcode == "copy-start" else one.shapes[count : 2 * count]
            read = _size(results if one.opcode == "slice-start" else shapes[0])
            return _main(results) + (read if shapes[0][0].is_main else 0)
        if one.opcode in _SLICES:
            return _main(one.shapes) + (_size(one.shapes) if shapes and shapes[0][0].is_main else 0)
        if one.opcode == "send":  # its result names its operand
            return _main(shapes[0])
        if one.opcode == "dynamic-update-slice":
            return _main(shapes[1]) + (_size(shapes[1]) if one.shapes[0].is_main else 0)
        return _main(one.shapes) + sum(map(_main, shapes))

    def _fusion_traffic(self, fused: Mapping[str, Instruction], results: tuple[Shape, ...]) -> float:
        total = 0.0
        in_place: set[str] = set()
        root = next(one for one in fused.values() if one.is_root)
        outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for output, shape in zip(outputs, results, strict=False):
            while output.opcode in ("bitcast", "copy", "convert") and output.operands[0] in fused:
                output = fused[output.operands[0]]
            if output.opcode == "dynamic-update-slice":
                in_place.add(_origin(fused, output.operands[0]))
                total += _size(fused[output.operands[1]].shapes) if shape.is_main else 0
            else:
                total += _main((shape,))
        for one in fused.values():
            if one.opcode != "parameter" or one.name in in_place:
                continue
            if not one.shapes[0].is_main:
                continue
            users = _users(fused, one.name)
            if users and all(user.opcode in _SLICES and _origin(fused, user.operands[0]) == one.name for user in users):
                total += sum(_size(user.shapes) for user in users)
            else:
                total += _main(one.shapes)
        return total


# ---- reading ---------------------------------------------------------------------------------------------------------


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    shape_text, right = _balanced(right) if right.startswith("(") else right.split(" ", 1)
    opcode, _, _ = right.strip().partition("(")
    operands, rest = _balanced(right.strip()[len(opcode) :])
    shapes = tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), not re.search(r"S\([1-9]", layout or ""))
        for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", shape_text)
    )
    names = tuple(re.findall(r"%([\w.\-]+)", operands))
    if opcode in ("constant", "parameter"):
        rest = operands + rest
    return Instruction(left.strip().removeprefix("ROOT ").lstrip("%"), opcode, shapes, names, rest, "ROOT " in left)


def _balanced(text: str) -> tuple[str, str]:
    """Splits a text that starts with a parenthesis behind the one that closes it."""
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:end], text[end:]
    return text, ""


def _size(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes)


def _main(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if shape.is_main)


def _element(one: Instruction | None) -> int | None:
    found = re.search(r"index=(\d+)", one.rest) if one is not None and one.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _constant(one: Instruction | None) -> int | None:
    found = re.match(r"\((-?\d+)\)", one.rest) if one is not None and one.opcode == "constant" else None
    return int(found[1]) if found else None


def _source(computation: Mapping[str, Instruction], operands: tuple[str, ...], index: int) -> Instruction | None:
    """What the `index`-th operand is, behind copies of it."""
    one = computation.get(operands[index]) if index < len(operands) else None
    while one is not None and one.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        one = computation.get(one.operands[0])
    return one


def _origin(fused: Mapping[str, Instruction], name: str) -> str:
    while name in fused and fused[name].opcode in ("bitcast", "copy", "convert") and fused[name].operands:
        name = fused[name].operands[0]
    return name


def _users(fused: Mapping[str, Instruction], name: str) -> list[Instruction]:
    """What reads an array, looking through bitcasts."""
    found = []
    for one in fused.values():
        if name in one.operands:
            found += _users(fused, one.name) if one.opcode == "bitcast" else [one]
    return found


# ---- products and collectives ----------------------------------------------------------------------------------------


def _flops(one: Instruction, computation: Mapping[str, Instruction]) -> float:
    left, right = (computation[name].shapes[0].sizes for name in one.operands[:2])
    output = one.shapes[0].sizes
    if one.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
        inner = math.prod(left[int(axis)] for axis in dims[1].split(",") if axis) if dims else 1
        return 2.0 * math.prod(output) * inner
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels, one.rest
    left_of, right_of, out_of = ({label: axis for axis, label in enumerate(text)} for text in labels.groups())
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", one.rest) or ["", ""])[1]))
    groups = re.search(r"feature_group_count=(\d+)", one.rest)
    total = 2.0 * output[out_of["b"]] * output[out_of["f"]] * right[right_of["i"]] / (int(groups[1]) if groups else 1)
    spatial = sorted(label for label in out_of if label.isdigit())
    for index, label in enumerate(spatial):

        def of(name: str, default: str, index: int = index) -> list[int]:
            return [
                int(part) for part in window.get(name, "x".join([default] * len(spatial))).split("x")[index].split("_")
            ]

        low = of("pad", "0_0")[0]
        stride, holes, spread = of("stride", "1")[0], of("lhs_dilate", "1")[0], of("rhs_dilate", "1")[0]
        at = np.arange(output[out_of[label]])[:, None] * stride - low
        at = at + np.arange(right[right_of[label]])[None, :] * spread
        # Places that lie on an element of the input, not on padding or between two elements.
        total *= int(((at % holes == 0) & (at >= 0) & (at < left[left_of[label]] * holes)).sum())
    return total


def _sent(kind: str, one: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Bytes that each device of a ring sends."""
    inputs = sum(_size(computation[name].shapes) for name in one.operands if name in computation)
    if kind == "collective-permute":
        return _size(computation[one.operands[0]].shapes)
    members = _members(one.rest)
    if kind == "all-gather":
        return inputs * (members - 1)
    share = inputs * (members - 1) / members
    return 2 * share if kind == "all-reduce" else share


def _sent_to_slices(one: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Bytes that a device sends to other slices, of what it hands to the runtime between them."""
    found = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', one.rest)
    if not found:
        return 0.0
    ranges = [[int(end) for end in part.split(":")] for part in found[1].split(",")]
    slices = sum(1 + ends[-1] - ends[0] for ends in ranges)
    size = _size(computation[one.operands[0]].shapes)
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.rest)
    shares = {"ALL_GATHER": slices - 1, "REDUCE_SCATTER": (slices - 1) / slices, "ALL_TO_ALL": (slices - 1) / slices}
    shares["ALL_REDUCE"] = 2 * (slices - 1) / slices
    return size * shares.get(kind[1] if kind else "", 1.0)


def _members(rest: str) -> int:
    """Devices in a group of a collective."""
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(found[1].split(",")) if found else 1
