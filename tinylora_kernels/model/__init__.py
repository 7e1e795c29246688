"""A whole model: which modules, adapting them, what is adapted, merging, and what merging loses."""
