"""capsrun reproduces *Dynamic Routing Between Capsules* (Sabour, Frosst, Hinton, NIPS 2017)."""

__version__ = "0.1.0"
