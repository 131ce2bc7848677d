"""Runs all ranks and compares outputs and every gradient with the plain model's."""
