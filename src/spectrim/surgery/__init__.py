"""Model in, model out: select, factorize, calibrate, prune, correct, merge, coverage."""
