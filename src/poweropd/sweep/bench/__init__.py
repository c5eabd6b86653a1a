"""`poweropd bench`: every reward and objective from one start, each at its own learning rate."""
