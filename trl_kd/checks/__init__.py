"""What is looked at before a run starts: whether it fits, and whether teacher, student and data belong together."""
