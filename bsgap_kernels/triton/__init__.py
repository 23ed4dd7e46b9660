"""Triton kernels and their launchers. Importing this package, `table` or `config` needs no triton."""
