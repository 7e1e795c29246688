"""What a step is said to be made of: every matrix product counts as one."""
import re

import torch
from torch.profiler import ProfilerActivity, profile

from demo import profiling, recipes, tasks, training, workers
from demo.models import load_model


def test_every_product_of_a_step_is_counted():
    model = load_model("tiny")
    workers.adapt(model.module, recipes.adapter_config(13, 21))
    settings = training.Settings(steps=1, prompts=2, samples=2, lr=0.01, temperature=1.0)
    run = training.Run(model, tasks.task("digit-sums"), settings)
    run.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.step()
    products = {e.key for e in profiler.key_averages() if re.fullmatch(r"aten::(add|badd)?b?(mm|mv)_?", e.key)}
    assert {"aten::mm", "aten::addmm_"} <= products <= profiling.PRODUCTS, products
    found = profiling.profile_step(run)
    assert model.dtype == torch.float32
    assert 0 < found.products < found.total and 0 < found.kernel_total < found.total
