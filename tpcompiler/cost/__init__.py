"""Predicts the seconds and bytes that a program takes on a machine, without the machine."""
