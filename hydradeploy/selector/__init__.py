"""Which subnet: budgets, what each cell says of them, and the choice. Needs no runtime and no numpy."""
