"""Side by side with what people use: `python -m benchmarks` measures, and writes benchmarks/results/table.md."""
