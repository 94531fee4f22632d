"""What becomes of the rows: results kept by machine, tables, plots, and the guard."""
