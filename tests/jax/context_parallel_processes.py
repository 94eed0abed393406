"""Context parallelism over processes. Not collected by name: test_context_parallel.py starts it, once a process.

Arguments: the coordinator's address, how many processes, which of them this is. XLA_FLAGS gives each two devices. Every
process has the whole problem and compares its own devices' parts with the float64 oracle.
"""

import sys

import dilated_oracle
import jax
import numpy as np

from attention_cases import Case, oracle, segments
from heddle import Mask
from heddle.attention import balance
from heddle.jax.dilated_distributed import distributed_dilated_attention
from heddle.jax.parallel import context_attend, shard

SEQ = 64
CASES = [
    Case("documents", SEQ, SEQ, lambda: Mask.documents(segments(30, 5, 17, padding=12)), heads=4, batch=2),
    Case("window and prefix", SEQ, SEQ, lambda: Mask.window(SEQ, 9, prefix=5), heads=4, kv_heads=1, value_dim=24),
]


def main(address: str, processes: int, process: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, process, initialization_timeout=60)
    mesh = jax.make_mesh((2 * processes,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    for case in CASES:
        arrays, mask = case.arrays(), case.mask()
        want = oracle(case, arrays)
        order = balance.by_area(mask, 2 * processes, chunk=4)
        rows = shard(tuple(arrays[name] for name in ("query", "d_out", "d_lse")), "context", order, mesh=mesh)
        keys = shard((arrays["key"], arrays["value"]), "context", mesh=mesh)
        part = shard(mask, "context", order, mesh=mesh)
        for method in ("all_gather", "ring"):

            @jax.jit
            def run(query, d_out, d_lse, key, value, mask, method=method):
                def forward(query, key, value):
                    return context_attend(query, key, value, mask, "context", method, mesh=mesh, return_lse=True)

                results, backward = jax.vjp(forward, query, key, value)
                return *results, *backward((d_out, d_lse))

            for name, got in zip(("out", "lse", "dq", "dk", "dv"), run(*rows, *keys, part)):
                whole = want[name] if name in ("dk", "dv") else want[name][:, order]
                assert len(got.addressable_shards) == 2
                for shard_ in got.addressable_shards:
                    np.testing.assert_allclose(
                        shard_.data, whole[shard_.index], rtol=1e-5, atol=1e-5, err_msg=f"{case.name} {method} {name}"
                    )
    dilated_attention(mesh)
    print("same", flush=True)


def dilated_attention(mesh) -> None:
    """Segments within a device's part, over the devices of one process, and over all."""
    rng, lists = np.random.default_rng(0), ([8, 2 * SEQ // mesh.size, SEQ], [1, 2, 3])
    inputs = rng.normal(size=(4, 2, SEQ, 4, 8)).astype(np.float32)
    want = dilated_oracle.dilated(
        *inputs[:3], *lists, True, d_out=inputs[3], d_lse=np.zeros(inputs[0].shape[:3])
    )  # fmt: skip

    @jax.jit
    def run(query, key, value, d_out):
        def forward(*arrays):
            return distributed_dilated_attention(*arrays, *lists, "context", is_causal=True, mesh=mesh)

        out, backward = jax.vjp(forward, query, key, value)
        return out, *backward(d_out)

    found = run(*shard(tuple(inputs), "context", mesh=mesh))
    for name, got, whole in zip(("out", "dq", "dk", "dv"), found, (want[0], *want[2:])):
        for part in got.addressable_shards:
            np.testing.assert_allclose(part.data, whole[part.index], rtol=0, atol=2e-5, err_msg=f"dilated {name}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
