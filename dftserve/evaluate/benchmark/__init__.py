"""The Style Diversity Benchmark: its tasks, and running them."""
