"""Measurements of a model: quality, memory, speed, energy, tasks."""
