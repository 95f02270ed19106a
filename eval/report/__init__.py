"""Measurements become tables, figures and pages."""
