"""Language models: loading, student and teacher, attention, sharding, sizes."""
