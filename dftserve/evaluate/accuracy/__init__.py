"""Right answers through the sampler: MMLU, GSM8K, HumanEval, refusals."""
