"""Instructions of PTX that a warp, or four, carry out together on matrices: ldmatrix, stmatrix, mma, wgmma.

Layouts are those of the PTX ISA's figures. Products are exact and sums float64, rounded to float32 once an
instruction; tensor cores round sums in ways that are not documented.
"""

import numpy as np
from ptx import elements, opcode
from ptx_memory import Trap

LANE = np.arange(32)
ROW, PAIR = LANE // 4, LANE % 4


@opcode("ldmatrix", "stmatrix")
def _matrix(machine, instruction):
    """Matrices of 8 × 8 values of 16 bits; row i of matrix j lies at the address of lane 8 j + i."""
    parts, operands = instruction.parts, instruction.operands
    loading = parts[0] == "ldmatrix"
    if "m8n8" not in parts or parts[-1] != "b16":
        raise Trap("not implemented")
    registers, address = operands if loading else operands[::-1]
    address, registers = machine.address(address), elements(registers)
    shared = machine.memory["shared"]
    if "trans" in parts:  # a lane holds one column of two rows
        rows, columns, width = np.stack([2 * PAIR, 2 * PAIR + 1], 1), np.stack([2 * ROW, 2 * ROW], 1), 2
    else:
        rows, columns, width = ROW[:, None], 4 * PAIR[:, None], 4
    sides = [(machine.source if not loading else machine.target)(register, "b32") for register in registers]

    def step(mask):
        warps = machine.warps(mask)
        lanes = np.repeat(warps.reshape(-1), rows.shape[1])
        starts = address()[warps]
        used = starts[:, : 8 * len(registers)]
        if (used % 16).any():
            raise Trap("a misaligned row of a matrix")
        for number, side in enumerate(sides):
            at = (starts[:, 8 * number + rows] + columns).reshape(-1)
            if loading:
                found = shared.read(at, lanes, width).reshape(-1, 4).view(np.uint32)[:, 0]
                whole = np.empty(machine.count, np.uint32)
                whole[warps.reshape(-1)] = found
                side(whole, mask)
            else:
                values = np.broadcast_to(side(), machine.count)[warps.reshape(-1)]
                shared.write(at, lanes, np.ascontiguousarray(values).view(np.uint8).reshape(-1, width))

    return step


def numbers(words, kind):
    """Return registers [..., registers] of operands as float64 [..., registers, values a register]."""
    words = np.ascontiguousarray(words)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)
    if kind == "bf16":
        return (
            (words[..., None].view(np.uint16).astype(np.uint32) << np.uint32(16))
            .view(np.float32)
            .astype(float)
        )
    return words[..., None].view(np.float16).astype(np.float64)


def places(kind):
    """Return where the values of operand registers lie, for 16 rows of A: (row, k), [32, 4, values]."""
    register = np.arange(4)
    row = ROW[:, None, None] + 8 * (register % 2)[None, :, None]
    if kind == "tf32":
        return row, PAIR[:, None, None] + 4 * (register // 2)[None, :, None]
    k = 2 * PAIR[:, None, None] + 8 * (register // 2)[None, :, None] + np.arange(2)
    return np.broadcast_to(row, k.shape), k


def gather(machine, registers, lanes, kind):
    """Return A [n, 16, depth] from its four registers, of lanes [n, 32]."""
    words = np.stack([machine.register(register).view(np.uint32)[lanes] for register in registers], -1)
    row, k = places(kind)
    matrix = np.empty((len(lanes), 16, k.max() + 1))
    matrix[:, row, k] = numbers(words, kind)
    return matrix


@opcode("mma")
def _mma(machine, instruction):
    """mma.sync of 16 × 8 results, depth 16 (16-bit types) or 8 (TF32)."""
    parts = instruction.parts
    kind = parts[7] if len(parts) > 8 else ""
    shape = {"bf16": "m16n8k16", "f16": "m16n8k16", "tf32": "m16n8k8"}.get(kind)
    if parts[3] != shape or (parts[6], parts[9]) != ("f32", "f32"):
        raise Trap("not implemented")
    d, a, b, c = map(elements, instruction.operands)
    targets = [machine.target(register, "f32") for register in d]
    c = [machine.source(register, "f32") for register in c]
    row, k = (place[:, ::2] for place in places(kind))  # B has columns where A has rows

    def step(mask):
        lanes = machine.warps(mask)
        left = gather(machine, a, lanes, kind)
        words = np.stack([machine.register(register).view(np.uint32)[lanes] for register in b], -1)
        right = np.empty((len(lanes), left.shape[2], 8))
        right[:, k, row] = numbers(words, kind)
        product = left @ right
        whole = np.empty(machine.count, np.float32)
        for number, target in enumerate(targets):
            before = np.broadcast_to(c[number](), machine.count)[lanes]
            sums = product[:, ROW + 8 * (number // 2), 2 * PAIR + number % 2] + before
            whole[lanes] = sums.astype(np.float32)
            target(whole, mask)

    return step


def described(machine, descriptor, lanes, rows, kind, transposed):
    """Return an operand [n, rows, depth] of wgmma from shared memory, for warp groups with lanes [n, 128].

    A descriptor holds, in units of 16 bytes, where the operand starts, its leading and its stride offset; and
    how 16-byte pieces are swizzled in rows of 128, 64 or 32 bytes.
    """
    words = descriptor()[lanes[:, 0]] if len(descriptor()) > 1 else np.repeat(descriptor(), len(lanes))
    start, leading, stride = (
        (words >> np.uint64(b) & np.uint64(0x3FFF)).astype(np.int64) * 16 for b in (0, 16, 32)
    )
    modes = words >> np.uint64(62)
    if len(np.unique(modes)) > 1 or (words >> np.uint64(49) & np.uint64(7)).any():
        raise Trap("not implemented")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[int(modes[0])]
    size = 4 if kind == "tf32" else 2
    depth = 32 // size
    r, k = np.arange(rows)[None, :, None], np.arange(depth)[None, None, :]
    leading, stride = leading[:, None, None], stride[:, None, None]
    if transposed:  # rows are next to each other
        many, byte = r * size // width, r * size % width
        if width == 16:
            leading, stride = stride, leading
        offset = many * leading + byte + k // 8 * stride + k % 8 * width
    elif width == 16:
        offset = r // 8 * stride + r % 8 * 16 + k * size // 16 * leading + k * size % 16
    else:
        offset = r // 8 * stride + r % 8 * width + k * size
    at = start[:, None, None] + offset
    at = at ^ (at >> 3 & width - 16 & 0x70)  # the piece's number is xored with the row's
    shape = at.shape
    owner = np.repeat(lanes[:, 0], rows * depth)
    shared = machine.memory["shared"]
    where = shared.at(at.reshape(-1), owner, size)
    if shared.bytes.unfenced[where].any():
        raise Trap("wgmma reads what was written without fence.proxy.async")
    found = shared.bytes.read(where, owner)
    if kind == "tf32":
        return numbers(found.view(np.uint32)[:, 0], kind).reshape(shape)
    bits = found.view(np.uint16)[:, 0]
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64).reshape(shape)
    return bits.view(np.float16).astype(np.float64).reshape(shape)


@opcode("fence")
def _fence(machine, instruction):
    if instruction.parts[1:3] != ("proxy", "async"):
        return lambda mask: None
    shared = machine.memory["shared"].bytes

    def step(mask):
        mine = np.flatnonzero(shared.unfenced)
        shared.unfenced[mine[mask[shared.writer.thread[mine]]]] = False

    return step


@opcode("wgmma")
def _wgmma(machine, instruction):
    """wgmma of 64 rows, whose results are there when its group is waited for."""
    parts, operands = instruction.parts, instruction.operands
    if parts[1] == "fence":
        return lambda mask: None
    if parts[1] == "commit_group":
        return lambda mask: machine.commit("wgmma", mask)
    if parts[1] == "wait_group":
        return lambda mask: machine.wait("wgmma", mask, int(operands[0], 0))
    kind = parts[6]
    depth = {"bf16": 16, "f16": 16, "tf32": 8}.get(kind)
    columns = int(parts[4].split("n")[1].split("k")[0])
    if parts[4] != f"m64n{columns}k{depth}" or parts[5] != "f32" or parts[7] != kind:
        raise Trap("not implemented")
    d, a, b, scale, *signs = operands
    transposed = [flag == "1" for flag in signs[2:]]
    if signs[:2] != ["1", "1"]:
        raise Trap("not implemented")
    targets, before = zip(
        *((machine.target(r, "f32"), machine.source(r, "f32")) for r in elements(d)), strict=True
    )
    a = elements(a) if a.startswith("{") else machine.source(a, "u64")
    b = machine.source(b, "u64")
    adds = machine.source(scale, "pred") if scale.startswith("%") else machine.source(scale, "b32")

    def step(mask):
        machine.warps(mask)
        add = np.broadcast_to(adds(), machine.count).astype(bool)

        def work(ready):
            lanes = machine.warps(ready).reshape(-1, 128)
            if isinstance(a, list):
                left = gather(machine, a, lanes.reshape(-1, 32), kind).reshape(len(lanes), 64, depth)
            else:
                left = described(machine, a, lanes, 64, kind, len(transposed) > 1 and transposed[0])
            right = described(machine, b, lanes, columns, kind, bool(transposed) and transposed[-1])
            product = left @ right.swapaxes(1, 2)
            whole, thread = np.empty(machine.count, np.float32), np.arange(128)
            for number, (target, old) in enumerate(zip(targets, before, strict=True)):
                row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (number // 2 % 2)
                sums = product[:, row, 8 * (number // 4) + 2 * (thread % 4) + number % 2]
                whole[lanes] = (sums + np.where(add[lanes], old()[lanes], 0)).astype(np.float32)
                target(whole, ready)

        machine.later("wgmma", mask, work)

    return step
