"""Compile Triton kernels for GPUs that are not here, from the launches that the code itself makes.

:func:`caught` stands in the place of a module's kernels and keeps what they would have been
launched with; :func:`build` compiles such a launch as Triton's JIT would and reads registers,
spills and the width of every load of every argument from what came out. Needs the package
``triton``, whose wheel brings the compilers; no GPU and no driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks._launches import Launch, caught, fake

__all__ = ["TARGETS", "Built", "Launch", "build", "caught", "fake", "faults"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TYPES = {
    torch.bool: "*i1",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


class Built(NamedTuple):
    """What a compiled launch takes."""

    name: str
    registers: int
    spilled: int
    """Bytes."""
    shared: int
    """Bytes."""
    warps: int
    loads: dict[str, list[int]]
    """The bytes that one thread reads with each load in the code, by the argument pointed to."""
    code: str
    """PTX or amdgcn."""

    def narrow(self, *names: str, below: int = 16) -> dict[str, int]:
        """How many loads of each argument read fewer bytes, where any does."""
        counts = {n: sum(size < below for size in self.loads.get(n, ())) for n in names}
        return {name: count for name, count in counts.items() if count}


def faults(launch: Launch, target: str, wide: tuple[str, ...], *, stack: int = 0) -> list[str]:
    """Compile a launch for a target of :data:`TARGETS`, and say what is wrong with the result.

    Args:
        wide: the arguments that no thread may read fewer than 8 bytes at a time.
        stack: how many bytes of spilled registers are allowed.
    """
    built = build(launch, TARGETS[target])
    what = f"{target} {built.name} {list(launch.options.values())}"
    found = [f"{what}: {built.spilled} bytes spilled"] if built.spilled > stack else []
    lost = [name for name in wide if name in launch.given and name not in built.loads]
    found += [f"{what}: no load of {name} was found" for name in lost]
    narrow = built.narrow(*wide, below=8)
    return found + [f"{what}: {count} narrow loads of {name}" for name, count in narrow.items()]


def build(launch: Launch, target: GPUTarget) -> Built:
    """Compile a launch as the JIT would: 1 is a constant, and alignment to 16 is known."""
    kernel, given = launch.kernel, launch.given
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attrs: dict[tuple[int], list[list[Any]]] = {}
    for i, param in enumerate(kernel.params):
        value = given[param.name]
        fixed = param.is_constexpr or value is None
        plain = not (param.do_not_specialize or isinstance(value, torch.Tensor))
        if fixed or (plain and value == 1 and not isinstance(value, bool)):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[param.name] = _TYPES[value.dtype]
            # An allocation starts at a multiple of 256 bytes.
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else _int_type(value)
            aligned = plain and isinstance(value, int) and value % 16 == 0
        if aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    options = {k: v for k, v in launch.options.items() if k not in kernel.arg_names}
    if target.backend == "hip":
        options.pop("launch_pdl", None)
    made = triton.compile(ASTSource(kernel, signature, constants, attrs), target, options)
    pointers = [n for n, kind in signature.items() if kind != "constexpr"]
    loads = _loads(made.asm["llir"], pointers)
    metadata = made.metadata
    if target.backend == "hip":
        code = made.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", code)
        spilled = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", code)
        spilled = max(spilled, _number(r"\.private_segment_fixed_size:\s+(\d+)", code))
    else:
        code = made.asm["ptx"]
        registers, spilled = _used(made.asm["cubin"])
    return Built(
        metadata.name, registers, spilled, metadata.shared, metadata.num_warps, loads, code
    )


def _int_type(value: int) -> str:
    return "i1" if isinstance(value, bool) else "i32" if -(2**31) <= value < 2**31 else "i64"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spilled registers go, of a binary for NVIDIA."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        ran = subprocess.run(tool, check=True, capture_output=True, text=True)
    return _number(r"REG:(\d+)", ran.stdout), _number(r"STACK:(\d+)", ran.stdout)


# In LLVM's form every value has one name, so that a pointer leads back to its argument.
_DERIVED = re.compile(
    r"^\s*(%[\w.]+) = (?:tail call )?(?:getelementptr|select|phi|bitcast|addrspacecast|freeze"
    r"|(?:noundef )?(?:nonnull )?ptr addrspace\(8\) @llvm\.amdgcn\.make\.buffer\.rsrc)\b(.*)$"
)
_POINTER = re.compile(r"ptr(?: addrspace\(\d\))?(?: [a-z]\w*)* (%[\w.]+)|[\[,]\s*(%[\w.]+)")
_ASM = re.compile(r"ld\.global(?:\.[\w:]+?)*?(?:\.v(\d))?\.b(\d+) ")
_ASYNC = re.compile(r"cp\.async\.\w+\.shared\.global [^,]*, [^,]*, 0x([0-9a-f]+)")
_AMD = re.compile(
    r"= (?:tail call )?(?:load (?P<load>[^,]+), ptr addrspace\(1\) (?P<from>%[\w.]+)"
    r"|(?P<buffer>\S+(?: x \w+>)?) @llvm\.amdgcn\.raw\.ptr\.buffer\.load[^(]*"
    r"\(ptr addrspace\(8\) (?P<rsrc>%[\w.]+))"
)


def _size(kind: str) -> int:
    """Bytes of an LLVM type: ``i16``, ``<8 x i16>``, ``<4 x float>``."""
    found = re.fullmatch(r"<(\d+) x (\w+)>", kind)
    count, one = (int(found[1]), found[2]) if found else (1, kind)
    sizes = {"half": 2, "bfloat": 2, "float": 4, "double": 8, "ptr": 8}
    return count * (sizes[one] if one in sizes else max(int(one[1:]) // 8, 1))


def _loads(llir: str, pointers: list[str]) -> dict[str, list[int]]:
    """Return the bytes of each load of global memory, by the argument it reads."""
    head = re.search(r"^define [^@]*@\w+\(.*$", llir, re.M)
    assert head is not None
    names = re.findall(r"(%\d+)(?=[,)])", head[0])
    origin = dict(zip(names, pointers, strict=False))
    lines = llir[head.end() :].splitlines()
    # A value that a loop carries is named before it is made.
    for _ in range(4):
        for line in lines:
            found = _DERIVED.match(line)
            if found is None or found[1] in origin:
                continue
            sources = [a or b for a, b in _POINTER.findall(found[2])]
            if "getelementptr" in line:
                sources = sources[:1]
            known = [origin[source] for source in sources if source in origin]
            if known:
                origin[found[1]] = known[0]
    loads: dict[str, list[int]] = {}
    for line in lines:
        if " asm " in line:
            text, _, args = line.partition('", "')
            target = re.search(r"ptr addrspace\(1\) (%[\w.]+)", args)
            sizes = [int(v or 1) * int(b) // 8 for v, b in _ASM.findall(text)]
            sizes += [int(size, 16) for size in _ASYNC.findall(text)]
            source = target[1] if target else ""
        elif found := _AMD.search(line):
            source = found["from"] or found["rsrc"]
            sizes = [_size(found["load"] or found["buffer"])]
        else:
            continue
        if sizes:
            loads.setdefault(origin.get(source, source), []).extend(sizes)
    return loads
