"""Memory of an executed kernel: which bytes may be touched, which hold something, and who touched them last.

Two accesses of one byte, one of them a write, race unless something orders them: a barrier of the block for
threads of different warps, that or `bar.warp.sync` for lanes of one warp, nothing for different blocks.
Writes of the same value do not race: Triton lets every thread that holds a value store it.
"""

import ctypes

import numpy as np

REGION = 1 << 40
"""Distance of the address ranges of two tensors: no overrun of one lands in another."""


class Trap(Exception):
    """What a GPU would trap on, or what it would do without a word although the program does not allow it."""


class Race(Trap):
    """Two threads touch one byte, one of them writes it, and nothing orders them."""


class Order:
    """Blocks, warps and the barriers that they have passed."""

    def __init__(self, blocks, threads):
        lanes = np.arange(blocks * threads, dtype=np.int32)
        self.block, self.warp = lanes // threads, lanes // 32
        self.barriers = np.zeros(len(lanes), np.int32)  # of the thread's block
        self.syncs = np.zeros(len(lanes), np.int32)  # of the thread's warp

    def between(self, then, barriers, syncs, now):
        """Return what is missing between earlier accesses and those of threads `now`.

        0 nothing (also where `then` is no thread, -1), 1 a barrier of the warp, 2 one of the block,
        3 different blocks.
        """
        blocks = self.block[then] != self.block[now]
        warps = (self.warp[then] != self.warp[now]) & (barriers == self.barriers[now])
        lanes = (self.warp[then] == self.warp[now]) & (then != now) & (syncs == self.syncs[now])
        return np.where(then < 0, 0, np.where(blocks, 3, np.where(warps, 2, lanes)))


class Last:
    """The last access of each byte: its thread (-1: none), and the barriers that it had passed."""

    def __init__(self, size, order):
        self.order = order
        self.thread = np.full(size, -1, np.int32)
        self.barriers, self.syncs = np.zeros((2, size), np.int32)

    def missing(self, at, now):
        """Return what is missing between the last access of bytes `at` and one of threads `now`."""
        then = self.thread[at]
        if (then < 0).all():
            return np.zeros(at.shape, np.int8)
        return self.order.between(then, self.barriers[at], self.syncs[at], now)

    def set(self, at, now):
        self.thread[at], self.barriers[at], self.syncs[at] = (
            now,
            self.order.barriers[now],
            self.order.syncs[now],
        )


class Bytes:
    """Some bytes, with checks of every access.

    Parameters
    ----------
    data
        uint8 [size], read and written in place.
    allowed
        bool [size]: what an access may touch.
    written
        bool [size]: what holds something.
    order
        Who is ordered with whom.
    """

    def __init__(self, data, allowed, written, order):
        self.data, self.allowed, self.written, self.order = data, allowed, written, order
        self.writer, self.reader = Last(len(data), order), Last(len(data), order)
        self.spread = np.zeros(len(data), np.int8)  # what was missing between the last reader and others
        self.unfenced = np.zeros(len(data), bool)  # written, and not yet visible to the asynchronous proxy

    def read(self, at, lanes):
        """Return bytes [n, width] at offsets `at` [n, width] for lanes [n]."""
        self._inside(at)
        if not self.written[at].all():
            raise Trap("a read of memory that nothing was written to")
        now = np.broadcast_to(lanes[:, None], at.shape)
        if self.writer.missing(at, now).any():
            raise Race("a read races with a write")
        spread = np.maximum(self._others(at, now), self.reader.missing(at, now))
        self.reader.set(at, now)
        self.spread[at] = spread
        together = self.reader.missing(at, now)  # lanes of this instruction that read the same byte
        several = together > 0
        np.maximum.at(self.spread, at[several], together[several].astype(np.int8))
        return self.data[at]

    def write(self, at, lanes, values):
        """Write bytes [n, width]."""
        self._inside(at)
        now = np.broadcast_to(lanes[:, None], at.shape)
        if self.reader.missing(at, now).any() or self._others(at, now).any():
            raise Race("a write races with a read")
        unordered = (self.writer.missing(at, now) > 0) & (self.data[at] != values)
        self.data[at] = values
        if unordered.any() or (self.data[at] != values).any():
            raise Race("writes of different values race")
        self.writer.set(at, now)
        self.written[at] = self.unfenced[at] = True

    def _inside(self, at):
        if len(at) and (at.min() < 0 or at.max() >= len(self.data) or not self.allowed[at].all()):
            raise Trap("an access outside of every tensor")

    def _others(self, at, now):
        """Return what is missing between readers before the last one and threads `now`."""
        spread, order = self.spread[at], self.order
        block = (spread == 2) & (self.reader.barriers[at] == order.barriers[now])
        warp = order.warp[self.reader.thread[at]] == order.warp[now]
        lanes = (spread == 1) & warp & (self.reader.syncs[at] == order.syncs[now])
        return np.where((spread == 3) | block | lanes, spread, 0)


class Shared:
    """The shared memory of all blocks, `size` bytes each."""

    def __init__(self, blocks, size, order):
        self.size, self.order = size, order
        total = blocks * size
        self.bytes = Bytes(np.zeros(total, np.uint8), np.ones(total, bool), np.zeros(total, bool), order)

    def at(self, addresses, lanes, width):
        """Return offsets [n, width] of accesses of `width` bytes."""
        if (addresses % width).any():
            raise Trap(f"a misaligned access of {width} bytes")
        if len(addresses) and (addresses.min() < 0 or addresses.max() + width > self.size):
            raise Trap(f"an access outside of the {self.size} bytes of shared memory")
        return (addresses + self.order.block[lanes] * self.size)[:, None] + np.arange(width)

    def read(self, addresses, lanes, width):
        return self.bytes.read(self.at(addresses, lanes, width), lanes)

    def write(self, addresses, lanes, values):
        self.bytes.write(self.at(addresses, lanes, values.shape[1]), lanes, values)


class Global:
    """The tensors of a launch, each at an address range of its own with its alignment kept.

    Parameters
    ----------
    tensors
        What the launch is given; parts of one memory share a range.
    order
        Who is ordered with whom.
    """

    def __init__(self, tensors, order):
        spans = sorted({(t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors if t.numel()})
        self.starts, self.regions, self.pointers = [], [], []
        for start, end in spans:
            if self.pointers and start < self.pointers[-1][1]:
                self.pointers[-1][1] = max(end, self.pointers[-1][1])
            else:
                self.pointers.append([start, end])
        for number, (start, end) in enumerate(self.pointers):
            self.starts.append((number + 1) * REGION + start % 4096)
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
            self.regions.append(Bytes(data, np.zeros(end - start, bool), np.ones(end - start, bool), order))
        for tensor in tensors:
            if tensor.numel():
                self._allow(tensor)

    def address(self, tensor):
        """Return what the kernel gets for a tensor."""
        number = self._number(tensor)
        return 0 if number is None else self.starts[number] + tensor.data_ptr() - self.pointers[number][0]

    def _number(self, tensor):
        found = (n for n, (start, end) in enumerate(self.pointers) if start <= tensor.data_ptr() < end)
        return next(found, None) if tensor.numel() else None

    def _allow(self, tensor):
        number = self._number(tensor)
        offset = np.zeros((), np.int64) + (tensor.data_ptr() - self.pointers[number][0])
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offset = offset[..., None] + np.arange(size) * stride * tensor.itemsize
        self.regions[number].allowed[(offset.reshape(-1, 1) + np.arange(tensor.itemsize))] = True

    def _each(self, addresses, width):
        """Yield (accesses, region, offsets [n, width]) of each tensor that some of the accesses hit."""
        if (addresses % width).any():
            raise Trap(f"a misaligned access of {width} bytes")
        numbers = addresses // REGION - 1
        for number in np.unique(numbers):
            if not 0 <= number < len(self.regions):
                raise Trap("an access outside of every tensor")
            mine = numbers == number
            yield (
                mine,
                self.regions[number],
                (addresses[mine] - self.starts[number])[:, None] + np.arange(width),
            )

    def read(self, addresses, lanes, width):
        values = np.empty((len(addresses), width), np.uint8)
        for mine, region, at in self._each(addresses, width):
            values[mine] = region.read(at, lanes[mine])
        return values

    def write(self, addresses, lanes, values):
        for mine, region, at in self._each(addresses, values.shape[1]):
            region.write(at, lanes[mine], values[mine])

    def update(self, addresses, lanes, width, change):
        """Replace values one lane after another, as atomics do; return what was there."""
        before = np.empty((len(addresses), width), np.uint8)
        for mine, region, at in self._each(addresses, width):
            region._inside(at)
            now = np.broadcast_to(lanes[mine][:, None], at.shape)
            if region.writer.missing(at, now).any() or region.reader.missing(at, now).any():
                raise Race("an atomic races with a plain access")
            for row, place in zip(np.flatnonzero(mine), at, strict=True):
                before[row] = region.data[place]
                region.data[place] = change(row, before[row])
        return before


def _extent(tensor):
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.itemsize
