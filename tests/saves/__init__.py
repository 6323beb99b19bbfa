"""Saves that are cut off at random moments, runs that go on from what is left, bits that flip on the disk."""
