"""Compiles every case of every kernel for one GPU without having it: `python ahead.py CAPABILITY`, JSON out.

In a process of its own, for in one that interprets kernels they cannot be compiled. What a kernel takes of
the GPU is read off the machine code; loads and tensor cores off the PTX, which names them one to one, for to
disassemble a case takes longer than to compile it.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from shoestring.ops import kernels
from shoestring.ops.kernels.case import Case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# 16 bytes of global memory in one instruction: to registers, to shared memory, or a tile by the copy engine.
WIDE_LOAD = r"ld\.global[.\w:]*\.(v4\.\w32|v2\.\w64)|cp\.async\.c[ag][.\w]*[^;]*, (0x10|16)\b|cp\.async\.bulk"


def all_cases() -> list[Case]:
    """The `AOT_CASES` of all files of the room."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    return [case for module in modules for case in getattr(module, "AOT_CASES", [])]


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """Registers, spills, shared memory, and what stands in the code."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if (signature[name].startswith("*") and name not in case.unaligned) or name in case.aligned
    }
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _resource_usage(file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage[:1000]
    code = compiled.asm["ptx"]
    return {
        "name": case.name,
        "registers": int(found[1]),
        "spilled": int(found[2]),
        "shared": compiled.metadata.shared,
        "wide": bool(re.search(WIDE_LOAD, code)),
        "dots": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)\b", code)),
        "id_is_wide": _id_is_wide(compiled.asm["ttir"]),
        "limits": [case.max_registers, case.max_shared, case.wide, case.dots],
    }


def _id_is_wide(ir: str) -> bool:
    """Whether no program id is multiplied while it has 32 bits."""
    narrow = set(re.findall(r"(%\w+) = tt\.get_program_id", ir))
    products = re.findall(r"arith\.muli (%\w+), (%\w+)[^:\n]*: i32", ir)
    return not any(side in narrow for pair in products for side in pair)


def _resource_usage(path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    wanted = int(sys.argv[1])
    print(json.dumps([compile_case(c, wanted) for c in all_cases() if wanted in c.capabilities]))
