"""Executes PTX, the code that Triton compiles a kernel to, on the CPU.

All threads of a launch go together as NumPy vectors, those at the smallest place in the program first, so
that threads which part meet again. A trap is raised for whatever a GPU would trap on or silently get wrong:
accesses that are misaligned or outside of every tensor, barriers and warp-wide instructions that only some
threads reach, reads of shared memory that nothing was written to, races (see ptx_memory.py).

Registers hold all-one bits before they are written: NaN, and an address outside of everything. Approximations
(`ex2.approx`, `div.full`) are computed exactly and rounded, `fma.f64` rounds twice. What ptxas makes of the
PTX is not shown. A register takes a value a thread: launch few blocks.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ptx_memory import Global, Order, Shared, Trap

TYPES = {
    "pred": np.bool_,
    **{f"{letter}{bits}": np.dtype(f"{'i' if letter == 's' else 'u'}{bits // 8}")
       for letter in "bus" for bits in (8, 16, 32, 64)},
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "tf32": np.float32, "f64": np.float64,
}  # fmt: skip
OPCODES = {}
"""Mnemonic → function of (machine, instruction) that returns what executes it, a function of the mask."""


def opcode(*names):
    """Register what executes these mnemonics."""

    def register(function):
        OPCODES.update(dict.fromkeys(names, function))
        return function

    return register


class Instruction(NamedTuple):
    """One line of a program."""

    guard: str
    """"", "%p1" or "!%p1"."""
    parts: tuple[str, ...]
    """("ld", "global", "v4", "b32")."""
    operands: tuple[str, ...]
    line: str

    @property
    def kind(self):
        """The type at the end."""
        return self.parts[-1]


class Program:
    """A kernel's PTX, taken apart."""

    def __init__(self, ptx):
        ptx = re.sub(r"//.*", "", ptx)
        head, body = ptx.split(".entry", 1)[1].split("{", 1)
        self.name = re.match(r"\s*(\w+)", head)[1]
        self.parameters = re.findall(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)", head)
        self.threads = int(re.search(r"\.reqntid (\d+)", head)[1])
        self.registers = {}
        self.symbols = re.findall(r"\.shared \.align \d+ \.b8 (\w+)\[", ptx)
        if len(self.symbols) > 1:
            raise Trap(f"shared memory under several names {self.symbols}: not implemented")
        self.code, self.labels = [], {}
        for line in body.splitlines():
            line = line.strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.code)
            elif register := re.match(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", line):
                self.registers |= {f"%{register[2]}{i}": TYPES[register[1]] for i in range(int(register[3]))}
            elif line.startswith(".section"):
                break
            elif found := re.fullmatch(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*);", line):
                guard, name, rest = found.groups()
                operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^\s,]+", rest)
                self.code.append(Instruction(guard or "", tuple(name.split(".")), tuple(operands), line))
            elif line and not line.startswith(".") and line != "}":
                raise Trap(f"not implemented: {line}")


parse = lru_cache(maxsize=512)(Program)


def run(program, grid, arguments, tensors, shared):
    """Execute a launch.

    Parameters
    ----------
    program
        What to execute.
    grid
        Blocks in three dimensions.
    arguments
        Numbers, and tensors of `tensors`, in the order of the program's parameters; what is missing is 0.
    tensors
        The tensors that may be read and written, where they lie.
    shared
        Bytes of shared memory a block.

    Returns
    -------
    set of int
        The places in `program.code` that some thread has executed.

    Raises
    ------
    Trap
        With the line of the program.
    """
    return Machine(program, grid, arguments, tensors, shared).run()


class Machine:
    """The state of a launch."""

    def __init__(self, program, grid, arguments, tensors, shared):
        self.program = program
        x, y, z = grid
        self.blocks, threads = x * y * z, program.threads
        self.count = self.blocks * threads
        self.order = Order(self.blocks, threads)
        self.memory = {
            "global": Global(tensors, self.order),
            "shared": Shared(self.blocks, shared, self.order),
        }
        thread, block = np.arange(self.count, dtype=np.uint32) % threads, self.order.block.astype(np.uint32)
        zero = np.zeros(self.count, np.uint32)
        self.special = {
            "%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%ntid.x": zero + threads,
            "%laneid": thread % 32,
            "%ctaid.x": block % x, "%ctaid.y": block // x % y, "%ctaid.z": block // (x * y),
            "%nctaid.x": zero + x, "%nctaid.y": zero + y, "%nctaid.z": zero + z,
        }  # fmt: skip
        self.registers = {}
        self.parameters = {}
        for place, (kind, name) in enumerate(program.parameters):
            value = arguments[place] if place < len(arguments) else 0
            if hasattr(value, "data_ptr"):
                value = self.memory["global"].address(value)
            dtype = np.dtype(TYPES[kind])
            value = value if dtype.kind == "f" else int(value) & (1 << 8 * dtype.itemsize) - 1
            self.parameters[name] = np.array([value], dtype)
        self.committed = {name: np.zeros(self.count, np.int64) for name in ("copy", "wgmma")}  # groups
        self.work = []  # asynchronous: [name, threads that have yet to wait for it, their group, function]

    def run(self):
        steps = [None] * len(self.program.code)
        seen = set()
        waiting = {0: np.ones(self.count, bool)}
        with np.errstate(all="ignore"):
            while waiting:
                place = min(waiting)
                here = waiting.pop(place)
                if place == len(steps):
                    raise Trap("the end of the program without ret")
                instruction = self.program.code[place]
                try:
                    going = here & self.guard(instruction.guard) if instruction.guard else here
                    if instruction.guard and not going.any():
                        self._go(waiting, place + 1, here)
                        continue
                    seen.add(place)
                    if instruction.parts[0] == "bra":
                        self._go(waiting, self.program.labels[instruction.operands[0]], going)
                        here = here & ~going
                    elif instruction.parts[0] in ("ret", "exit"):
                        here = here & ~going
                    else:
                        if steps[place] is None:
                            steps[place] = self.decode(instruction)
                        steps[place](going)
                except Trap as trap:
                    raise type(trap)(f"{self.program.name}: {trap}: {instruction.line}") from None
                self._go(waiting, place + 1, here)
        if self.work:
            raise Trap(f"{self.program.name}: asynchronous work that nobody waits for")
        return seen

    @staticmethod
    def _go(waiting, place, mask):
        if place in waiting:
            waiting[place] = waiting[place] | mask
        elif mask.any():
            waiting[place] = mask

    def guard(self, name):
        value = self.register(name.lstrip("!"))
        return ~value if name.startswith("!") else value

    def decode(self, instruction):
        try:
            return OPCODES[instruction.parts[0]](self, instruction)
        except KeyError as unknown:
            raise Trap(f"not implemented ({unknown})") from None

    def register(self, name):
        if name not in self.registers:
            if name not in self.program.registers:
                raise Trap(f"no register {name}")
            dtype = np.dtype(self.program.registers[name])
            self.registers[name] = np.frombuffer(bytearray(b"\xff" * dtype.itemsize * self.count), dtype)
            if dtype == np.bool_:
                self.registers[name] = np.zeros(self.count, bool)
        return self.registers[name]

    def source(self, operand, kind):
        """Return a function that gives an operand's values, [threads] or one for all."""
        dtype = np.dtype(TYPES[kind])
        value = self._values(operand, dtype)
        if kind == "bf16":
            return lambda: (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return lambda: value

    def _values(self, operand, dtype):
        if operand in self.special:
            value = self.special[operand]
            return value.view(dtype) if dtype.itemsize == 4 else value.astype(dtype)
        if operand.startswith("%"):
            value = self.register(operand)
            if value.dtype == dtype:
                return value
            if value.dtype.itemsize < dtype.itemsize:
                raise Trap(f"{operand} is narrower than {dtype}")
            return value.view(dtype)[:: value.dtype.itemsize // dtype.itemsize]
        if operand in self.program.symbols:
            return np.zeros(1, dtype)
        floating = operand[:2] in ("0f", "0d")  # its bits
        number = int(operand[2:], 16) if floating else int(operand.rstrip("U"), 0)
        if dtype == np.bool_:
            return np.array([number != 0])
        bits = np.dtype(f"u{dtype.itemsize}")
        return np.array([number & (1 << 8 * dtype.itemsize) - 1], bits).view(dtype)

    def target(self, operand, kind):
        """Return a function of (values, mask) that sets a register, narrow integers extended to its width."""
        if operand == "_":
            return lambda values, mask: None
        register, dtype = self.register(operand), np.dtype(TYPES[kind])
        if register.dtype.itemsize > dtype.itemsize and dtype.kind in "iu":
            dtype = np.dtype(f"{dtype.kind}{register.dtype.itemsize}")
        view = register.view(dtype)
        if kind == "bf16":
            return lambda values, mask: np.copyto(view, round_bf16(values), where=mask)
        return lambda values, mask: np.copyto(view, values, where=mask, casting="unsafe")

    def address(self, operand):
        """Return a function that gives addresses, int64 [threads]."""
        base, offset = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        wide = base.startswith("%") and self.register(base).dtype.itemsize == 8
        value = self.source(base, "u64" if wide else "u32")
        return lambda: np.broadcast_to(value().astype(np.int64) + int(offset or 0), self.count)

    def warps(self, mask):
        """Return the lanes of the warps in `mask`, [warps, 32]; all or none of a warp may be in it."""
        lanes = np.flatnonzero(mask)
        if len(lanes) % 32 or (lanes[::32] % 32).any() or (lanes[31::32] - lanes[::32] != 31).any():
            raise Trap("only some lanes of a warp are here")
        return lanes.reshape(-1, 32)

    def later(self, name, mask, work):
        """Put work, a function of the threads that it is done for, into the open group of each thread."""
        self.work.append([name, mask.copy(), self.committed[name].copy(), work])

    def commit(self, name, mask):
        self.committed[name][mask] += 1

    def wait(self, name, mask, pending):
        """Do the work of all committed groups but the last `pending`, for the threads that wait."""
        for item in self.work:
            kind, threads, group, work = item
            ready = (
                threads & mask & (group < self.committed[name] - pending) if kind == name else mask & False
            )
            if ready.any():
                work(ready)
                item[1] = threads & ~ready
        self.work = [item for item in self.work if item[1].any()]


def elements(operand):
    """Return the registers of a vector operand."""
    return [one.strip() for one in operand.strip("{} ").split(",")]


def round_bf16(values):
    """Round float32 (or wider) to the bits of bfloat16, to nearest even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _hi(a, b):
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def _shift(a, by, left):
    bits = 8 * a.dtype.itemsize
    amount = np.minimum(by, bits - 1).astype(a.dtype)
    if left:
        return np.where(by >= bits, a.dtype.type(0), a << amount)
    beyond = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(by >= bits, beyond, a >> amount)


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(object)) // np.maximum(np.abs(b.astype(object)), 1)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def _fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(c.dtype)


VALUES = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "fma": _fma, "min": np.fmin,
    "max": np.fmax, "rem": lambda a, b: a - _divide(a, b) * b, "neg": np.negative, "abs": np.abs,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a), "rcp": lambda a: 1 / a,
    "ex2": np.exp2, "lg2": np.log2, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
}  # fmt: skip
"""Functions of operands that all have the type of the result."""


def _rounded_once(function):
    return lambda a: function(a.astype(np.float64)).astype(a.dtype)


def _flush(a):
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def _pairs(machine, instruction, function):
    """Arithmetic on two values a register."""
    if instruction.kind not in ("f16x2", "f32x2") or set(instruction.parts[1:-1]) - {"rn"}:
        raise Trap("not implemented")
    element = TYPES[instruction.kind[:-2]]
    bits = "b64" if element == np.float32 else "b32"
    target, *sources = instruction.operands
    target, sources = machine.target(target, bits), [machine.source(source, bits) for source in sources]

    def step(mask):
        values = function(*(source().view(element).reshape(-1, 2) for source in sources))
        target(np.ascontiguousarray(values).view(TYPES[bits])[:, 0], mask)

    return step


@opcode(*VALUES)
def _value(machine, instruction):
    name, *modifiers, kind = instruction.parts
    if name == "mul" and kind[0] in "us":
        return _integers(machine, instruction)
    if kind.endswith("x2"):
        return _pairs(machine, instruction, VALUES[name])
    if set(modifiers) - {"rn", "approx", "full", "ftz", "NaN", "f32"}:
        raise Trap("not implemented")
    function = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in modifiers else VALUES[name]
    if "approx" in modifiers:
        function = _rounded_once(function)
    target, *operands = instruction.operands
    wide = "f32" if "f32" in modifiers else kind  # "add.f32.bf16": the last operand and the result are wider
    kinds = [*[kind] * (len(operands) - 1), wide if len(operands) > 1 else kind]
    sources = [machine.source(*pair) for pair in zip(operands, kinds, strict=True)]
    target = machine.target(target, wide)
    if "ftz" in modifiers:
        return lambda mask: target(_flush(function(*(_flush(source()) for source in sources))), mask)
    return lambda mask: target(function(*(source() for source in sources)), mask)


@opcode("mad")
def _integers(machine, instruction):
    """Products of integers: the lower half, the upper half or all of it; `mad` adds a third operand."""
    name, how, kind = instruction.parts
    wide = f"{kind[0]}{2 * int(kind[1:])}" if how == "wide" else kind
    if how not in ("lo", "hi", "wide") or (how == "hi" and kind[1:] != "32"):
        raise Trap("not implemented")
    a, b = (machine.source(operand, kind) for operand in instruction.operands[1:3])
    target = machine.target(instruction.operands[0], wide)
    dtype = np.dtype(TYPES[wide])
    product = _hi if how == "hi" else lambda a, b: a.astype(dtype) * b.astype(dtype)
    if name == "mul":
        return lambda mask: target(product(a(), b()), mask)
    c = machine.source(instruction.operands[3], wide)
    return lambda mask: target(product(a(), b()) + c(), mask)


@opcode("shl", "shr")
def _shifts(machine, instruction):
    kind, left = instruction.kind, instruction.parts[0] == "shl"
    a, by = machine.source(instruction.operands[1], kind), machine.source(instruction.operands[2], "u32")
    target = machine.target(instruction.operands[0], kind)
    return lambda mask: target(_shift(a(), by(), left), mask)


@opcode("bfe")
def _extract(machine, instruction):
    """A field of bits; a signed one carries its highest bit on."""
    if instruction.kind not in ("u32", "s32"):
        raise Trap("not implemented")
    value, start, length = (
        machine.source(operand, kind)
        for operand, kind in zip(instruction.operands[1:], (instruction.kind, "u32", "u32"), strict=True)
    )
    target = machine.target(instruction.operands[0], instruction.kind)

    def step(mask):
        first, bits = start().astype(np.int64) & 255, length().astype(np.int64) & 255
        field = (value().astype(np.int64) >> np.minimum(first, 63)) & ((1 << np.minimum(bits, 32)) - 1)
        if instruction.kind == "s32":
            negative = (bits > 0) & (field >> np.maximum(bits - 1, 0) & 1 == 1)
            field = np.where(negative, field - (1 << bits), field)
        target(field, mask)

    return step


@opcode("prmt")
def _permute(machine, instruction):
    """Bytes of two words, picked by nibbles; the upper bit of a nibble repeats the byte's sign."""
    a, b, pick = (machine.source(operand, "u32") for operand in instruction.operands[1:])
    target = machine.target(instruction.operands[0], "u32")
    if len(instruction.parts) > 2:
        raise Trap("not implemented")

    def step(mask):
        both = a().astype(np.uint64) | b().astype(np.uint64) << np.uint64(32)
        result = np.zeros(machine.count, np.uint32)
        for place in range(4):
            nibble = pick() >> np.uint32(4 * place) & np.uint32(15)
            byte = both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint64(128), 255, 0), byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * place)
        target(result, mask)

    return step


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
               "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
               "hs": np.greater_equal}  # fmt: skip


def _compare(name, a, b):
    if a.dtype.kind != "f":
        return COMPARISONS[name](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return unordered if name == "nan" else ~unordered
    if len(name) == 3:  # "ltu": or unordered
        return COMPARISONS[name[:2]](a, b) | unordered
    return COMPARISONS[name](a, b) & ~unordered


@opcode("setp")
def _setp(machine, instruction):
    parts, operands = instruction.parts, instruction.operands
    if set(parts[2:-1]) - {"and", "or", "xor"} or "|" in operands[0]:
        raise Trap("not implemented")
    a, b = (machine.source(operand, instruction.kind) for operand in operands[1:3])
    target = machine.target(operands[0], "pred")
    if parts[2] in ("and", "or", "xor"):
        join, third = VALUES[parts[2]], operands[3]
        return lambda mask: target(join(_compare(parts[1], a(), b()), machine.guard(third)), mask)
    return lambda mask: target(_compare(parts[1], a(), b()), mask)


@opcode("selp")
def _selp(machine, instruction):
    # bits are chosen, not values: a number is not rounded on the way
    kind = f"b{8 * np.dtype(TYPES[instruction.kind]).itemsize}"
    a, b = (machine.source(operand, kind) for operand in instruction.operands[1:3])
    which = machine.source(instruction.operands[3], "pred")
    target = machine.target(instruction.operands[0], kind)
    return lambda mask: target(np.where(which(), a(), b()), mask)


@opcode("mov", "cvta")
def _mov(machine, instruction):
    target, value = instruction.operands
    kind = instruction.kind
    if target.startswith("{") or value.startswith("{"):
        packed = value if target.startswith("{") else target
        parts = elements(target if target.startswith("{") else value)
        narrow = np.dtype(TYPES[f"b{int(kind[1:]) // len(parts)}"])
        pieces = machine.register(packed).view(narrow).reshape(machine.count, len(parts))
        registers = [None if part == "_" else machine.register(part).view(narrow) for part in parts]

        def step(mask):
            for place, register in enumerate(registers):
                if register is not None:
                    pair = register, pieces[:, place]
                    np.copyto(*(pair if packed == value else pair[::-1]), where=mask)

        return step
    source, store = machine.source(value, kind), machine.target(target, kind)
    return lambda mask: store(source(), mask)


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("cvt")
def _cvt(machine, instruction):
    *modifiers, to, source_kind = instruction.parts[1:]
    sources = [machine.source(operand, source_kind) for operand in instruction.operands[1:]]
    if to.endswith("x2"):
        if modifiers != ["rn"]:
            raise Trap("not implemented")
        high, low = (_narrow(source, to[:-2]) for source in sources)
        target = machine.target(instruction.operands[0], "b32")
        return lambda mask: target(high().astype(np.uint32) << np.uint32(16) | low(), mask)
    value, target = sources[0], machine.target(instruction.operands[0], to)
    if to == "tf32":
        if "rna" not in modifiers:
            raise Trap("not implemented")
        half, mantissa = np.uint32(1 << 12), np.uint32(0xFFFFE000)
        return lambda mask: target(((value().view(np.uint32) + half) & mantissa).view(np.float32), mask)
    dtype = np.dtype(np.float32 if to == "bf16" else TYPES[to])
    integer = next((ROUND[m] for m in modifiers if m in ROUND), None)
    floating = source_kind in ("f16", "bf16", "f32", "f64")
    unknown = {m for m in modifiers if m not in (*ROUND, "rn", "ftz")}
    if unknown or (floating and dtype.kind in "iu" and integer is None):
        raise Trap("not implemented")

    def step(mask):
        values = value()
        if integer is not None:
            values = integer(values.astype(np.float64))
            if dtype.kind in "iu":  # out of range: the nearest integer there is; NaN: 0
                limits = np.iinfo(dtype)
                clipped = np.clip(np.nan_to_num(values, nan=0.0), limits.min, limits.max)
                values = np.where(values >= limits.max, limits.max, clipped.astype(dtype))
        target(values.astype(dtype), mask)

    return step


def _narrow(source, kind):
    """Return a function that gives the bits of values rounded to 16 bits."""
    if kind == "bf16":
        return lambda: round_bf16(source())
    return lambda: source().astype(np.float16).view(np.uint16)


@opcode("ld", "st", "red", "atom")
def _access(machine, instruction):
    parts, kind = instruction.parts, instruction.kind
    if parts[1] == "param":
        name = instruction.operands[1].strip("[] ")
        value = machine.parameters[name].view(TYPES[kind])
        target = machine.target(instruction.operands[0], kind)
        return lambda mask: target(value, mask)
    space = next((part.split("::")[0] for part in parts if part.split("::")[0] in machine.memory), None)
    if space is None:
        raise Trap("not implemented")
    memory, dtype = machine.memory[space], np.dtype(TYPES[kind])
    if parts[0] in ("red", "atom"):
        return _atomic(machine, instruction, memory, dtype)
    loading = parts[0] == "ld"
    values, address = instruction.operands[:2] if loading else instruction.operands[1::-1]
    address, registers = machine.address(address), elements(values)
    width = dtype.itemsize * len(registers)
    if loading:
        targets = [machine.target(register, kind) for register in registers]

        def step(mask):
            lanes = np.flatnonzero(mask)
            found = memory.read(address()[lanes], lanes, width).view(dtype)
            whole = np.empty((len(registers), machine.count), dtype)
            whole[:, lanes] = found.T
            for target, row in zip(targets, whole, strict=True):
                target(row, mask)

        return step
    sources = [machine.source(register, kind) for register in registers]

    def store(mask):
        lanes = np.flatnonzero(mask)
        data = np.stack([np.broadcast_to(source(), machine.count)[lanes] for source in sources], 1)
        memory.write(address()[lanes], lanes, data.view(np.uint8))

    return store


def _atomic(machine, instruction, memory, dtype):
    """One lane after another; there is no other order to test."""
    parts, kind, operands = instruction.parts, instruction.kind, list(instruction.operands)
    targets = elements(operands.pop(0)) if parts[0] == "atom" else []
    targets = [machine.target(target, kind) for target in targets]
    address = machine.address(operands[0])
    values = [[machine.source(one, kind) for one in elements(operand)] for operand in operands[1:]]
    change = {
        **VALUES,
        "exch": lambda old, new: new,
        "cas": lambda old, test, new: np.where(old == test, new, old),
    }
    name = next((part for part in parts[1:] if part in change), None)
    if name is None or kind == "bf16" or memory is machine.memory["shared"]:
        raise Trap("not implemented")

    def step(mask):
        lanes = np.flatnonzero(mask)
        given = [
            np.stack([np.broadcast_to(one(), machine.count)[lanes] for one in each], 1) for each in values
        ]

        def update(row, old):
            return change[name](old.view(dtype), *(each[row] for each in given)).astype(dtype).view(np.uint8)

        before = memory.update(address()[lanes], lanes, dtype.itemsize * len(values[0]), update).view(dtype)
        whole = np.empty((len(targets), machine.count), dtype)
        for target, row, old in zip(targets, whole, before.T, strict=False):
            row[lanes] = old
            target(row, mask)

    return step


@opcode("cp")
def _copy(machine, instruction):
    """cp.async: reaches shared memory when its group is waited for."""
    parts, operands = instruction.parts, instruction.operands
    if parts[2] == "commit_group":
        return lambda mask: machine.commit("copy", mask)
    if parts[2] == "wait_group":
        return lambda mask: machine.wait("copy", mask, int(operands[0], 0))
    if parts[1] != "async" or parts[3:5] != ("shared", "global"):
        raise Trap("not implemented")
    to, source, width = machine.address(operands[0]), machine.address(operands[1]), int(operands[2], 0)
    size = machine.source(operands[3] if len(operands) > 3 else str(width), "u32")

    def step(mask):
        lanes = np.flatnonzero(mask)
        sizes = np.broadcast_to(size(), machine.count)[lanes]
        if not np.isin(sizes, (0, width)).all():
            raise Trap("not implemented")
        full = sizes == width
        data = np.zeros((len(lanes), width), np.uint8)
        data[full] = machine.memory["global"].read(source()[lanes][full], lanes[full], width)
        at = to()[lanes]

        def work(ready):
            mine = ready[lanes]
            machine.memory["shared"].write(at[mine], lanes[mine], data[mine])

        machine.later("copy", mask, work)

    return step


@opcode("bar", "barrier")
def _barrier(machine, instruction):
    if instruction.parts[:2] == ("bar", "warp"):

        def sync(mask):
            machine.order.syncs[machine.warps(mask)] += 1

        return sync
    if instruction.parts[1] != "sync" or instruction.operands != ("0",):
        raise Trap("not implemented")

    def step(mask):
        counts = mask.reshape(machine.blocks, -1).sum(1)
        if not np.isin(counts, (0, machine.program.threads)).all():
            raise Trap("only some threads of a block are here")
        machine.order.barriers[mask] += 1
        machine.order.syncs[mask] += 1

    return step


@opcode("shfl")
def _shuffle(machine, instruction):
    how, operands = instruction.parts[2], instruction.operands
    target = machine.target(operands[0].split("|")[0], "b32")
    value, by = machine.source(operands[1], "b32"), machine.source(operands[2], "u32")
    if how not in ("bfly", "idx") or operands[3:] != ("31", "-1") or "|" in operands[0]:
        raise Trap("not implemented")

    def step(mask):
        machine.warps(mask)
        lane = np.arange(machine.count)
        offset = np.broadcast_to(by(), machine.count).astype(np.int64) & 31
        source = lane ^ offset if how == "bfly" else lane // 32 * 32 + offset
        target(np.broadcast_to(value(), machine.count)[source], mask)

    return step


@opcode("redux")
def _redux(machine, instruction):
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}[instruction.parts[2]].reduce  # fmt: skip
    kind, dtype = instruction.kind, TYPES[instruction.kind]
    value = machine.source(instruction.operands[1], kind)
    target = machine.target(instruction.operands[0], kind)

    def step(mask):
        machine.warps(mask)
        rows = np.broadcast_to(value(), machine.count).reshape(-1, 32)
        target(np.repeat(reduce(rows, axis=1, dtype=dtype), 32), mask)

    return step
