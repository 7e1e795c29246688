"""An adapted nn.Linear as one node of autograd, and the plan by which a layer calls it: in Python, and again in C++."""
