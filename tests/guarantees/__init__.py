"""What docs/guarantees.md promises: one module a kind, right values from float64 dense weights or the bare library."""
