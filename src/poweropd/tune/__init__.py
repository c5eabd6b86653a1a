"""`poweropd tune`: a short search over alpha and learning rate, and a recipe with what it found."""
