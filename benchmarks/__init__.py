"""Compare speed with other libraries: `python -m benchmarks` measures and writes benchmarks/results/table.md."""
