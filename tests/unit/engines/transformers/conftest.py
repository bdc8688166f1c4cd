"""Hypothesis without a time limit for an example: these tests compute, on cores that others use too."""

from hypothesis import settings

settings.register_profile("computing", deadline=None)
settings.load_profile("computing")
