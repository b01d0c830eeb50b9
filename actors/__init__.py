"""Segmenters behind one Protocol, and the encoder that runs them inside Ray actors."""
