"""Pure functions on arrays (numpy, scipy, torch): no Ray, no files, no configuration files."""
