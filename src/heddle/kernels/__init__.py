"""Triton kernels that know no framework, and the plan of their launches."""
