"""The cost of a compiled program on one device, from its HLO text: products, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once, so only one of all scanned layers. Here everything counts as
often as it runs: trip counts come from the loops' conditions. Arrays in on-chip memory (`S(1)` and the like in a
layout) cause no traffic, a slice of an array reads the slice only, and an update in place writes the update only.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
# Opcodes that move no data: names for arrays, and calls, whose bodies are counted.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier", "custom-call", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Products of a query with all keys, or of the same size, in splash attention's kernels, which XLA does not look into.
_KERNELS = {"fwd": 2, "dkv": 4, "dq": 3}


class Shape(NamedTuple):
    """One array: its element type, its sizes, and whether it is in main memory."""

    dtype: str
    sizes: tuple[int, ...]
    is_main: bool

    @property
    def bytes(self) -> int:
        """Its size without the padding of tiles."""
        width = _BYTES.get(self.dtype) or max(int(re.sub(r"\D.*", "", self.dtype.lstrip("suf")) or 8) // 8, 1)
        return math.prod(self.sizes) * (0 if self.dtype == "token" else width)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """The computation that `name=%...` refers to, or ""."""
        return _group(rf"\b{name}=%?([\w.\-]+)", self.rest)


@dataclasses.dataclass
class Cost:
    """The cost of a computation on one device; of collectives, what each device of a ring sends."""

    flops: float = 0.0  # of matrix products, two per multiplication
    bytes: float = 0.0  # read from and written to main memory
    collectives: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))  # bytes by kind
    counts: dict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))  # collectives by kind
    network: float = 0.0  # bytes sent to other slices
    # Of attention kernels, as if no block were masked; those of a causal mask skip up to half of it.
    kernel_flops: float = 0.0

    def add(self, other: "Cost", times: float = 1) -> None:
        """Adds the cost of another computation that runs `times` times."""
        self.flops += times * other.flops
        self.kernel_flops += times * other.kernel_flops
        self.bytes += times * other.bytes
        self.network += times * other.network
        for kind in other.counts:
            self.collectives[kind] += times * other.collectives[kind]
            self.counts[kind] += times * other.counts[kind]


class Program:
    """A parsed HLO module."""

    def __init__(self, text: str, steps: int = 1, once: bool = False):
        """Parses the text.

        Args:
            text: `compiled.as_text()`.
            steps: trips of loops whose end depends on data (decoding): their maximum.
            once: count every loop as one trip, as XLA's cost analysis does.
        """
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
        """Cost of one run of the program."""
        return self._cost(self._entry, is_fused=False)

    def _cost(self, name: str, is_fused: bool) -> Cost:
        if (name, is_fused) in self._known:
            return self._known[name, is_fused]
        total = self._known[name, is_fused] = Cost()
        computation = self._computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode in ("convolution", "dot"):
                total.flops += _flops(instruction, computation)
            elif opcode == "custom-call":
                total.kernel_flops += _kernel_flops(instruction, computation)
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # A reduction fused with the slice that follows it sends what a reduce-scatter does.
                is_scatter = is_fused and kind == "all-reduce" and "all-reduce-scatter" in name
                kind = "reduce-scatter" if is_scatter else kind
                total.collectives[kind] += _sent(kind, instruction, computation)
                total.counts[kind] += 1
            if opcode == "send":
                total.network += _sent_to_slices(instruction, computation)
            for attribute in ("calls", "called_computation"):
                if (called := instruction.attribute(attribute)) and opcode in ("fusion", "call", "async-start"):
                    total.add(self._cost(called, opcode == "fusion"))
            if opcode == "call":
                total.add(self._cost(instruction.attribute("to_apply"), is_fused=False))
            elif opcode == "conditional":
                branches = re.findall(r"%([\w.\-]+)", _group(r"branch_computations=([^}]*)", instruction.rest))
                branches = branches or [instruction.attribute(f"{name}_computation") for name in ("true", "false")]
                costs = [self._cost(branch, False) for branch in branches]
                total.add(max(costs, key=lambda cost: cost.flops + cost.kernel_flops))
            elif opcode == "while":
                trips = 1 if self._once else self._trips(instruction, computation)
                total.add(self._cost(instruction.attribute("body"), False), trips)
                total.add(self._cost(instruction.attribute("condition"), False), trips + 1)
            if not is_fused:
                total.bytes += self._traffic(instruction, computation)
        return total

    def _trips(self, loop: Instruction, around: Mapping[str, Instruction]) -> int:
        """Number of trips: from XLA's note, else from counter, start, step and bound, else `steps`."""
        if trips := _group(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(trips)
        condition = self._computations[loop.attribute("condition")]
        body = self._computations[loop.attribute("body")]
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return self._steps
        index = _integer(condition.get(test.operands[0]), "get-tuple-element", r"index=(\d+)")
        bound = _integer(condition.get(test.operands[1]))
        if index is None or bound is None:
            return self._steps
        start = _integer(_source(around, around[loop.operands[0]].operands, index))
        step = 1
        following = _source(body, _root(body).operands, index)
        if following is not None and following.opcode == "add":
            step = next(filter(None, (_integer(body.get(operand)) for operand in following.operands)), 1)
        return -(-(bound - (start or 0)) // step)

    def _traffic(self, instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
        """Bytes that an instruction outside fusions reads from and writes to main memory."""
        opcode, results = instruction.opcode, instruction.shapes
        if (opcode in _FREE and not _kernel(instruction)) or opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [computation[name].shapes for name in instruction.operands if name in computation]
        if opcode == "fusion":
            return self._fusion_traffic(self._computations[instruction.attribute("calls")], results)
        if opcode.endswith("-start"):  # operands and results side by side; a copy names its result first
            count = sum(map(len, operands))
            results = results[:1] if opcode == "copy-start" else results[count : 2 * count]
            read = _size(results if opcode == "slice-start" else operands[0])
            return _main(results) + (read if operands[0][0].is_main else 0)
        if opcode in _SLICES:
            return _main(results) + (_size(results) if operands and operands[0][0].is_main else 0)
        if opcode == "send":  # its result names its operand
            return _main(operands[0])
        if opcode == "dynamic-update-slice":
            return _main(operands[1]) + (_size(operands[1]) if results[0].is_main else 0)
        return _main(results) + sum(map(_main, operands))

    def _fusion_traffic(self, fused: Mapping[str, Instruction], results: tuple[Shape, ...]) -> float:
        total = 0.0
        in_place: set[str] = set()
        root = _root(fused)
        outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for output, shape in zip(outputs, results, strict=False):
            output = fused[_origin(fused, output.name)]
            if output.opcode == "dynamic-update-slice":
                in_place.add(_origin(fused, output.operands[0]))
                total += _size(fused[output.operands[1]].shapes) if shape.is_main else 0
            else:
                total += _main((shape,))
        for name, instruction in fused.items():
            if instruction.opcode != "parameter" or name in in_place or not instruction.shapes[0].is_main:
                continue
            users = _users(fused, name)
            if users and all(user.opcode in _SLICES and _origin(fused, user.operands[0]) == name for user in users):
                total += sum(_size(user.shapes) for user in users)
            else:
                total += _main(instruction.shapes)
        return total


def _instruction(line: str) -> Instruction:
    left, _, right = line.partition(" = ")
    shape_text, right = _balanced(right) if right.startswith("(") else right.split(" ", 1)
    opcode = right.strip().partition("(")[0]
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
    """Splits a text that starts with a parenthesis after the one that closes it."""
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


def _group(pattern: str, text: str) -> str:
    """The first group of a pattern's first match, or ""."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _integer(instruction: Instruction | None, opcode: str = "constant", pattern: str = r"^\((-?\d+)\)") -> int | None:
    """The value of a constant, or the integer that a pattern finds in an instruction of another opcode."""
    digits = _group(pattern, instruction.rest) if instruction is not None and instruction.opcode == opcode else ""
    return int(digits) if digits else None


def _source(computation: Mapping[str, Instruction], operands: tuple[str, ...], index: int) -> Instruction | None:
    """The instruction that makes the `index`-th operand, followed through copies."""
    if index >= len(operands) or operands[index] not in computation:
        return None
    return computation[_origin(computation, operands[index], ("copy", "bitcast", "copy-done", "copy-start"))]


def _origin(
    computation: Mapping[str, Instruction], name: str, through: tuple[str, ...] = ("bitcast", "copy", "convert")
) -> str:
    """The name of the array that `name` is a copy of."""
    while computation[name].opcode in through and computation[name].operands[0] in computation:
        name = computation[name].operands[0]
    return name


def _users(fused: Mapping[str, Instruction], name: str) -> list[Instruction]:
    """The instructions that read an array, directly or through bitcasts."""
    users = []
    for user in fused.values():
        if name in user.operands:
            users += _users(fused, user.name) if user.opcode == "bitcast" else [user]
    return users


def _flops(product: Instruction, computation: Mapping[str, Instruction]) -> float:
    left, right = (computation[name].shapes[0].sizes for name in product.operands[:2])
    output = product.shapes[0].sizes
    if product.opcode == "dot":
        axes = _group(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        return 2.0 * math.prod(output) * math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.rest)
    assert labels, product.rest
    left_of, right_of, out_of = ({label: axis for axis, label in enumerate(text)} for text in labels.groups())
    window = dict(re.findall(r"(\w+)=([\w\-]+)", _group(r"window=\{([^}]*)\}", product.rest)))
    groups = int(_group(r"feature_group_count=(\d+)", product.rest) or 1)
    total = 2.0 * output[out_of["b"]] * output[out_of["f"]] * right[right_of["i"]] / groups
    spatial = sorted(label for label in out_of if label.isdigit())
    settings = {"pad": "0", "stride": "1", "lhs_dilate": "1", "rhs_dilate": "1"}
    for index, label in enumerate(spatial):
        low, stride, holes, spread = (
            int(window[name].split("x")[index].partition("_")[0] if name in window else default)
            for name, default in settings.items()
        )
        at = np.arange(output[out_of[label]])[:, None] * stride - low
        at = at + np.arange(right[right_of[label]])[None, :] * spread
        # Positions on an element of the input, not on padding or between two elements.
        total *= int(((at % holes == 0) & (at >= 0) & (at < left[left_of[label]] * holes)).sum())
    return total


def _kernel(instruction: Instruction) -> str:
    """Which of splash attention's kernels a custom call is, "" for other instructions."""
    return _group(r"splash_mha_(fwd|dkv|dq)", instruction.name) if instruction.opcode == "custom-call" else ""


def _kernel_flops(instruction: Instruction, computation: Mapping[str, Instruction]) -> float:
    kernel = _kernel(instruction)
    if not kernel:
        return 0.0
    # Operands are two arrays on blocks, then queries and keys `[batch, heads, length, head_dim]`.
    *outer, length, head_dim = computation[instruction.operands[2]].shapes[0].sizes
    return 2.0 * _KERNELS[kernel] * math.prod(outer) * length * length * head_dim


def _sent(kind: str, collective: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Bytes that each device of a ring sends."""
    if kind == "collective-permute":
        return _size(computation[collective.operands[0]].shapes)
    inputs = sum(_size(computation[name].shapes) for name in collective.operands if name in computation)
    return inputs * _ring(kind, _members(collective.rest))


def _sent_to_slices(send: Instruction, computation: Mapping[str, Instruction]) -> float:
    """Bytes that a device sends to other slices, of what it hands to the runtime between them."""
    target = _group(r'_xla_megascale_target="\{([\d,:]+)\}', send.rest)
    if not target:
        return 0.0
    ranges = [[int(end) for end in part.split(":")] for part in target.split(",")]
    slices = sum(1 + ends[-1] - ends[0] for ends in ranges)
    kind = _group(r'_xla_megascale_transfer_type="(\w+)"', send.rest).lower().replace("_", "-")
    return _size(computation[send.operands[0]].shapes) * _ring(kind, slices)


def _ring(kind: str, members: int) -> float:
    """How many times its input each member of a ring sends."""
    share = (members - 1) / members
    times = {"all-gather": members - 1, "all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
    return times.get(kind, 1.0)


def _members(rest: str) -> int:
    """Devices in a group of a collective."""
    if size := _group(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(size)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", mesh[2]))
    return len(_group(r"replica_groups=\{\{([\d,]*)\}", rest).split(","))
