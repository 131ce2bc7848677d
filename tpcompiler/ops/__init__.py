"""What the compiler knows about each op: one record, with a rule in a notation of its own."""
