"""Theory as tools: convolution spectra, Lipschitz bounds, neural collapse, convex duality, shrinkage. No other room imports it."""
