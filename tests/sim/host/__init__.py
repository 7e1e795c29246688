"""The CUDA sources compiled by g++ and run on the CPU: see emulator.py for its use, emulator.h for what it is."""
