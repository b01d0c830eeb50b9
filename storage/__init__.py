"""Everything that touches a file: images, cohorts, the embedding store, tables and transforms."""
