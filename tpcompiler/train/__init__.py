"""The bundled trainer: mixed precision over tensor × data parallel ranks."""
