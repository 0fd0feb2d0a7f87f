"""Speed and memory, ours beside the references and the hardware's limit: `python -m benchmarks --help`."""
