"""Triton kernels and their launchers. Never imports `reference`: tests compare two independent writings."""
