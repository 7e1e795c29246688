"""What leaves the process: the adapter file, LoRA directories."""
