"""Distil a teacher's distribution over the vocabulary into a smaller student."""
