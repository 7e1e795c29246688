"""The paper's experiment on models that train on a CPU: accuracy against the number of trained parameters.

    make study                       the tiny decoder, everything: about an hour on two cores
    make study QUICK=1               a smaller one in under ten minutes
    make study MODEL=smollm2         SmolLM2-135M-Instruct on additions, a shorter run
    make study MODEL=<directory>     any local transformers model, on a GPU where there is one
    make study SCALING=1             the numbers that models of several sizes need, and what an adapter does elsewhere

Every trained run is a row of <model>.csv; a study that was stopped goes on from the rows that are there. The figures
are drawn from the rows: docs/study.md shows them and says what they mean.

    design.py           what is run: methods, objectives, learning rates, seeds
    methods.py          TinyLoRA, LoRA-XS, LoRA, full fine-tuning: what trains, and how many runs share a batch
    training.py         one step of GRPO or SFT for the runs that share a batch; held-out scores
    demonstrations.py   what SFT imitates: own correct samples, or a foreign style
    runner.py           units of work over processes; rows as they finish
    rollouts.py         rollouts from merged, rounded weights, with and without importance weights
    rounding.py         how much of an update survives being merged into bfloat16 weights
    scaling.py          numbers that reach 95% of the best gain, against the size of the model
    transfer.py         an adapter on tasks it was not trained on
    summary.py          best of sweep, tables
    figures.py          plots
"""
