"""The benchmarks behind the package's claim: what an adapted layer costs beside the frozen one, and beside its rivals.

    python -m bench.grid --help

    shapes.py        linear layers of real models, and the order in which the grid is walked
    contenders.py    one adapter, built once, as every contender
    gate.py          each contender against the float64 truth, before it is timed
    timing.py        interleaved rounds and their quantiles
    memory.py        bytes saved for backward, peak temporaries, bytes written
    roofline.py      the physical limit: one read and one write of y at the stream bandwidth of this machine
    layers.py        the grid of single layers       -> layers.csv.gz, memory.csv
    whole_model.py   training step and generation    -> model.csv
    breakdown.py     where adapter time goes         -> breakdown.csv
    report.py        tables for the terminal; plots.py draws the PNGs
"""
