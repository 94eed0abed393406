"""Context parallelism over processes. Not collected by name: test_parallel.py starts it, once a process.

Arguments: the coordinator's address, how many processes, which of them this is. XLA_FLAGS gives each two devices. Every
process has the whole problem and compares its own devices' parts with the float64 oracle.
"""

import sys

import jax
import numpy as np

from attention_cases import Case, oracle, segments
from heddle import Mask
from heddle.attention import balance
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
    print("same", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
