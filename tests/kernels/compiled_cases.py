"""The kernels as machine code for sm_80 and sm_90. Not collected by name: test_compile.py runs it."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from heddle.kernels import plan

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  #: bytes of shared memory a block may use
INPUTS = {
    "forward": ["query"] * 3 + ["int32"] * 3,
    "backward_kv": ["query"] * 3 + ["int32"] * 3 + ["query", "float32", "float32"],
    "backward_q": ["query"] * 3 + ["int32"] * 3 + ["query", "float32", "float32"],
    "decode": ["query"] * 3 + ["int32"] * 2,
    "combine": ["float32"] * 2,
    "delta": ["query", "query", "float32"],
}


def launches(dim: int, capability: int) -> dict[str, plan.Launch]:
    """Every kernel of one large problem in bfloat16."""
    seq = 32768
    strides = tuple((seq * heads * dim, heads * dim, dim) for heads in (64, 8, 8))
    problem = plan.Problem(1, seq, seq, 64, 8, dim, dim, 1, 0, dim**-0.5, strides)

    def tile(kernel):
        return plan.tile(kernel, dim, dim, 2, capability)

    decode, combine = plan.plan_decode(problem, tile("decode"), 264)
    return {
        "forward": plan.plan_forward(problem, tile("forward")),
        "backward_kv": plan.plan_backward_kv(problem, tile("backward_kv")),
        "backward_q": plan.plan_backward_q(problem, tile("backward_q")),
        "decode": decode,
        "combine": combine,
        "delta": plan.plan_delta(problem),
    }


def spilled(launch: plan.Launch, inputs: list[str], capability: int, path: Path) -> int:
    """Bytes of stack (spilled registers) of the kernel compiled for ``capability``, which fits in shared memory."""
    pointers = {"query": "*bf16", "float32": "*fp32", "int32": "*i32"}
    arrays = iter([*inputs, *(kind for kind, _ in launch.outputs)])
    signature, attributes = {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
        elif name in launch.integers:
            signature[name] = "i32"
        else:
            signature[name] = pointers[next(arrays)]
        # As at a launch: allocations are aligned, and so are these strides.
        if name not in launch.constants and launch.integers.get(name, 16) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    constants = {(launch.kernel.arg_names.index(name),): value for name, value in launch.constants.items()}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared <= SHARED[capability]
    path.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", path]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", report)
    return int(stack)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_kernels_compile(dim, capability, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as our launches ask for
    spills = {
        name: spilled(launch, INPUTS[name], capability, tmp_path / f"{name}.cubin")
        for name, launch in launches(dim, capability).items()
    }
    assert not any(spills.values()), spills
