"""Where people already train: transformers, TRL, verl. Each module translates names and imports its own framework."""
