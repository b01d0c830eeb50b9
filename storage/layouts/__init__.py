"""Readers of the folders in which public data sets come, one file per layout."""
