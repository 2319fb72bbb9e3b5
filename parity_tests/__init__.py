"""The proof: generic tests that hold every declared technique against PyTorch and the NumPy oracle."""
