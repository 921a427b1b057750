"""Compile Triton kernels ahead of time, without a GPU, and look at what came out.

Hints about alignment come from sample arguments through Triton's own specialisation, so a kernel is compiled
as a launch with these shapes would compile it. Registers and spills come from ptxas, shared memory from
cuobjdump, instructions from nvdisasm (all three ship with Triton). Which argument an access belongs to is
read from the PTX: addresses are followed from the kernel's parameters to its loads and stores.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from .dispatch import AotConfig, interpreting

ARCHS = (80, 90, 100)  # A100, H100, B200
OPS = ("masking", "loss", "linear_loss", "gathering", "varlen_attention")
# Six blocks of four warps are then resident on a multiprocessor.
MAX_REGISTERS = 80
SHARED = {80: 164, 90: 228, 100: 228}
"""KiB of shared memory of a multiprocessor; each block takes 1 KiB beside its own."""
WIDE = 128


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one kernel configuration became on one architecture."""

    name: str
    arch: int
    signature: Mapping[str, str]
    """Argument → Triton type, in the order of a launch, without what was compiled in."""
    divisible_by_16: tuple[str, ...]
    """Arguments of which the code assumes it: integers, and addresses in bytes."""
    null_pointers: int
    """How many null pointers a launch passes after the arguments (scratch memory that is not used)."""
    num_warps: int
    registers: int
    """A thread."""
    spills: int
    """Bytes of spill stores and loads."""
    shared: int
    """Bytes of static shared memory a block, plus what a launch must ask for."""
    loads: Mapping[str, Mapping[int, int]]
    """Argument → width in bits → number of load instructions in the PTX."""
    stores: Mapping[str, Mapping[int, int]]
    sass: Mapping[str, int]
    """Instruction, for example "LDG.128", → number in the machine code."""
    rounds_bf16: bool
    """Whether the PTX rounds to bfloat16 to nearest (cvt.rn)."""
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @property
    def resident_warps(self) -> int:
        """How many of a multiprocessor's 64 warps registers and shared memory leave room for."""
        # A multiprocessor has 65,536 registers and gives them to warps in units of 256.
        of_warp = -(-self.registers * 32 // 256) * 256
        blocks = 65_536 // (of_warp * self.num_warps), SHARED[self.arch] * 1024 // (self.shared + 1024)
        # No more than 64 warps and 32 blocks are resident.
        return min(64, 32 * self.num_warps, self.num_warps * min(blocks))

    def to_dict(self) -> dict[str, Any]:
        """Return all but the code, ready for JSON."""
        skip = ("ptx", "cubin")
        kept = {k: v for k, v in self.__dict__.items() if k not in skip}
        return {**kept, "resident_warps": self.resident_warps}


def configs() -> list[AotConfig]:
    """Return the production configurations that the ops declare in their `AOT_CONFIGS`."""
    found: list[AotConfig] = []
    for op in OPS:
        found += getattr(importlib.import_module(f".{op}.triton", __package__), "AOT_CONFIGS", [])
    return found


def source_of(config: AotConfig, arch: int) -> ASTSource:
    """Return what a launch with a configuration's arguments hands to the compiler for one architecture."""
    backend = make_backend(GPUTarget("cuda", arch, 32))
    samples = {name: _sample(value) for name, value in config.arguments.items()}
    bind = create_function_from_signature(config.kernel.signature, config.kernel.params, backend)
    bound, specialization, options = bind(**samples, **config.constants, num_warps=config.num_warps)
    _, signature, constants, attributes = config.kernel._pack_args(
        backend, {**options, "num_warps": config.num_warps}, bound, specialization, options
    )
    return ASTSource(config.kernel, signature, constants, attributes)


def compile_config(config: AotConfig, arch: int) -> Report:
    """Compile one configuration for one architecture.

    Parameters
    ----------
    config
        The kernel, sample arguments and constants.
    arch
        Compute capability times ten: 80, 90, 100.

    Raises
    ------
    RuntimeError
        In a process in which Triton's interpreter replaces the compiler.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET: got 1, expected it unset: the interpreter compiles nothing")
    source = source_of(config, arch)
    options = {"num_warps": config.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, spills = _ptxas(ptx, arch)
    runtime = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
    pointers = [name if kind.startswith("*") else "" for name, kind in runtime.items()]
    loads, stores = accesses(ptx, pointers)
    names = list(source.signature)
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    return Report(
        name=config.name,
        arch=arch,
        signature=runtime,
        divisible_by_16=tuple(names[path[0]] for path, hints in source.attrs.items() if hints),
        null_pointers=header.count(".param") - len(runtime),
        num_warps=config.num_warps,
        registers=registers,
        spills=spills,
        shared=max(compiled.metadata.shared, _static_shared(cubin)),
        loads=loads,
        stores=stores,
        sass=_instructions(cubin),
        rounds_bf16=re.search(r"cvt\.rn(\.\w+)*\.bf16", ptx) is not None,
        ptx=ptx,
        cubin=cubin,
    )


def problems(config: AotConfig, report: Report) -> list[str]:
    """Return what is wrong with a compiled configuration, one sentence a fault; empty if it is good."""
    found = []
    if report.spills:
        found.append(f"spills: got {report.spills} bytes, expected 0; make the tile smaller")
    allowed = MAX_REGISTERS if config.max_registers is None else config.max_registers
    if report.registers > allowed:
        found.append(f"registers: got {report.registers} a thread, expected at most {allowed}")
    for name in config.wide:
        seen = {"load": report.loads.get(name, {}), "store": report.stores.get(name, {})}
        if not any(seen.values()):
            found.append(f"{name}: got no access at all, expected loads or stores")
        for kind, widths in seen.items():
            narrow = {w: n for w, n in widths.items() if w != WIDE}
            if narrow:
                listed = ", ".join(f"{n} of {w} bits" for w, n in sorted(narrow.items()))
                found.append(f"{name}: got {kind}s narrower than {WIDE} bits ({listed}), expected none")
    for name in config.computed:
        value = config.arguments[name]
        if isinstance(value, tuple) and value[1] == torch.bfloat16 and not report.rounds_bf16:
            found.append(f"{name}: got bfloat16 stores without cvt.rn.bf16, expected rounding to nearest")
    return found


def check(config: AotConfig, report: Report) -> None:
    """Raise a ValueError that names kernel, architecture and every fault; see :func:`problems`."""
    found = problems(config, report)
    if found:
        raise ValueError(f"{config.name} on sm_{report.arch}: " + "; ".join(found))


def accesses(
    ptx: str, parameters: Sequence[str]
) -> tuple[dict[str, dict[int, int]], dict[str, dict[int, int]]]:
    """Attribute the global loads and stores of a PTX listing to the kernel's parameters.

    Parameters
    ----------
    ptx
        The listing.
    parameters
        Names of the parameters in the order of the kernel's signature in the listing; "" for a number.

    Returns
    -------
    tuple
        loads and stores, each: parameter → width in bits → number of instructions. An access whose address
        comes from no parameter is filed under "?".
    """
    origin: dict[str, frozenset[str]] = {}
    lines = [line.strip() for line in ptx.splitlines()]
    for _ in range(8):  # registers of loops may be read before the line that writes them
        before = dict(origin)
        for line in lines:
            _follow(line, origin, parameters)
        if origin == before:
            break
    counted: dict[str, dict[str, Counter[int]]] = {"ld": {}, "st": {}}
    for line in lines:
        match = re.search(r"\b(ld|st)\.global((?:\.[\w:]+)*)\s", line)
        if match is None:
            continue
        address = re.search(r"\[\s*(%\w+)", line)
        names = origin.get(address[1], frozenset()) if address else frozenset()
        name = "/".join(sorted(names)) or "?"
        counted[match[1]].setdefault(name, Counter())[_width(match[2])] += 1
    loads, stores = ({n: dict(c) for n, c in counted[kind].items()} for kind in ("ld", "st"))
    return loads, stores


def _follow(line: str, origin: dict[str, frozenset[str]], parameters: Sequence[str]) -> None:
    """Note which parameters a 64-bit address register comes from."""
    match = re.match(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+(%rd\w*)\s*,(.*);", line)
    if match is None:
        return
    operation, target, rest = match.groups()
    if operation.startswith("ld.param"):
        index = re.search(r"_param_(\d+)", rest)
        names = {parameters[int(index[1])]} - {""} if index and int(index[1]) < len(parameters) else set()
    # A loaded value is data: it does not carry on the address it was loaded from.
    elif operation.startswith(("ld.", "atom.")):
        return
    else:
        names = {name for register in re.findall(r"%rd\w*", rest) for name in origin.get(register, ())}
    if names:
        origin[target] = origin.get(target, frozenset()) | names


def _width(modifiers: str) -> int:
    """Return the bits that an access with these PTX modifiers moves, for example ".v4.b32" → 128."""
    vector = re.search(r"\.v(\d)", modifiers)
    element = re.search(r"\.[bfsu]f?(\d+)(?:x2)?$", modifiers)
    if element is None:
        raise ValueError(f"modifiers: got {modifiers!r}, expected a PTX type at the end")
    return int(element[1]) * (int(vector[1]) if vector else 1)


def _sample(value: tuple[tuple[int, ...], torch.dtype] | int | float) -> Any:
    return torch.empty(value[0], dtype=value[1]) if isinstance(value, tuple) else value


def _tool(name: str, arch: int | None = None) -> str:
    if name == "ptxas" and arch is not None and arch >= 100:
        name = "ptxas_blackwell"  # Triton ships one for Blackwell beside the other
    return str(getattr(knobs.nvidia, name).path)


def _ptxas(ptx: str, arch: int) -> tuple[int, int]:
    """Return registers a thread and bytes spilled, with the flags of Triton's own call."""
    target = re.search(r"\.target (sm_\w+)", ptx)
    if target is None:
        raise ValueError("ptx: got a listing without .target")
    gpu = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [_tool("ptxas", arch), "-lineinfo", "-v", "--regAllocOptLevel=2", f"--gpu-name={gpu}"]
        log = _run([*command, str(source), "-o", str(Path(folder) / "kernel.o")])
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise ValueError(f"ptxas: got no register count in {log!r}")
    return int(registers[1]), sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def _static_shared(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        log = _run([_tool("cuobjdump"), "-res-usage", file.name])
    return max((int(n) for n in re.findall(r"SHARED:(\d+)", log)), default=0)


def _instructions(cubin: bytes) -> dict[str, int]:
    """Return the memory instructions of the machine code, by width: LDG, STG, and LDL, STL of spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run([_tool("nvdisasm"), "-c", file.name])
    found: Counter[str] = Counter()
    for kind, modifiers in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)\b", listing):
        width = re.search(r"\.(?:ENL2\.)?[SU]?(8|16|64|128|256)\b", modifiers)
        found[f"{kind}.{width[1] if width else 32}"] += 1
    return dict(found)


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {result.stderr[-2000:]}")
    return result.stdout + result.stderr


def compile_all(archs: Iterable[int], only: str = "") -> list[tuple[AotConfig, Report]]:
    """Compile every production configuration whose name holds `only`, on all cores."""
    chosen = [config for config in configs() if only in config.name]
    jobs = [(index, arch) for arch in archs for index in range(len(chosen))]
    _CHOSEN[:] = chosen
    # Cores that this process may use, in a container fewer than the machine has.
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(_compile_job, jobs))
    return [(chosen[index], report) for (index, _), report in zip(jobs, reports, strict=True)]


_CHOSEN: list[AotConfig] = []
"""What a forked worker compiles: kernels cannot be sent to it."""


def _compile_job(job: tuple[int, int]) -> Report:
    index, arch = job
    return compile_config(_CHOSEN[index], arch)


def build(archs: Iterable[int], out: Path, only: str = "") -> Path:
    """Write PTX, cubin and a manifest for projects that load kernels without Triton.

    Parameters
    ----------
    archs
        Compute capabilities times ten.
    out
        Folder; gets NAME.smXX.ptx, NAME.smXX.cubin and manifest.json.
    only
        Part of the names to build; all by default.

    Returns
    -------
    Path
        The manifest: a list of objects with the fields of :class:`Report`, file names and the entry point.

    Raises
    ------
    ValueError
        If a configuration fails :func:`check`, or no configuration is chosen.
    """
    compiled = compile_all(archs, only)
    if not compiled:
        names = ", ".join(sorted({config.name.split(".")[0] for config in configs()}))
        raise ValueError(f"only: got {only!r}, which is part of no kernel's name, expected part of {names} …")
    out.mkdir(parents=True, exist_ok=True)
    manifest = []
    for config, report in compiled:
        check(config, report)
        stem = f"{report.name}.sm{report.arch}"
        (out / f"{stem}.ptx").write_text(report.ptx)
        (out / f"{stem}.cubin").write_bytes(report.cubin)
        entry = re.search(r"\.entry (\w+)", report.ptx)
        manifest.append(
            {
                **report.to_dict(),
                "entry": entry[1] if entry else "",
                "constants": {name: str(value) for name, value in config.constants.items()},
                "ptx": f"{stem}.ptx",
                "cubin": f"{stem}.cubin",
            }
        )
    path = out / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    return path
