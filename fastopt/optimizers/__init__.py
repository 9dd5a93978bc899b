"""The optimizer classes: documentation, state and coefficients of each rule."""
