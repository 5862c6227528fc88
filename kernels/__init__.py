"""HOW the hot spots are computed: one file per operation. Imports nothing else of this project."""
