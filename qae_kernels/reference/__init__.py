"""The mathematics in plain PyTorch: any dtype including float64, differentiated by autograd. The truth of all tests."""
