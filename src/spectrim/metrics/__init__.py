"""What a model costs and what it achieves: inputs, evaluation, multiply-accumulates, latency, tables."""
