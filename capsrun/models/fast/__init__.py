"""The same numbers as the plain functions of `models/`, to rounding, faster."""
