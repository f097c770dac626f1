"""All SQL: the tables, and what is asked of them."""
