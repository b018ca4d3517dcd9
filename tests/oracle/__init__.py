"""What tests compare with: float64 NumPy over lists that are not padded; its data."""
