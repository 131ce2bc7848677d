"""What every tensor dimension is made of: the notation of rules, their table, and unification over a graph."""
