"""One adapted layer: linear, convolution, embedding, a stack of experts, or the shard of one."""
