"""The predictors, and the weights that are shipped for them."""
