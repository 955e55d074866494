"""Four bits for the frozen weights: NF4, double quantisation, the linear layer that holds them, LoftQ."""
