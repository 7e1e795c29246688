"""U and sigma of a frozen weight: proven by their residual, cached by the weight's content."""
