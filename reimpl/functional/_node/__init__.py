"""A layer's two passes as one description, run by Python or by a compiled autograd node."""
