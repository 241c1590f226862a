"""Pure tensor maths, on torch alone."""
