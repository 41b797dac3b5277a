"""The production path without Triton: plain PyTorch in chunks of rows, no [N, V] autograd graph. CPU and debugging."""
