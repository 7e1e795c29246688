"""The paper in numbers of size r x r: what an adapter is, which modules share a vector, P and P'. No module."""
