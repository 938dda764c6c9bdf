"""How rows are hidden, what left (the ledger), and how both are checked."""
