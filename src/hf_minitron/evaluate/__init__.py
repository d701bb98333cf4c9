"""How good a model is: perplexity, benchmark suites and throughput."""
