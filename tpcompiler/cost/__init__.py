"""Seconds and bytes: what a program takes on a machine, predicted without one."""
