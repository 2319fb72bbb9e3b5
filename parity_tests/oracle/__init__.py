"""The oracles: every technique once more in NumPy alone, computing in the dtype of the arrays it is given."""
