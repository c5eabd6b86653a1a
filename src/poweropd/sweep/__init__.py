"""`poweropd sweep`: many runs of one recipe, and the table that compares them."""
