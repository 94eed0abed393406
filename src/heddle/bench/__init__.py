"""Benchmarks: ours beside its peers, in one interleaved run on one machine."""
