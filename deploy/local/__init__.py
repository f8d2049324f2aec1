"""A whole mesh on one machine, out of embedded parts."""
