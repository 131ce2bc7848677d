"""What the compiler knows about each op: one record, whose line has a notation of its own."""
