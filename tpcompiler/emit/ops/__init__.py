"""Calls as source: idioms, exact spellings, and the remarks behind them."""
