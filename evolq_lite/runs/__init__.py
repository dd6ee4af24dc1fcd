"""A run from beginning to end. Read with lesson 6, in this order: source, folder, run, workers."""
